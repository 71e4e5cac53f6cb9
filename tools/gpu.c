/* SPDX-License-Identifier: MIT */
/*
 * The GPU of one rank: memory, a stream and one for work beside it, two events that take the time, a word
 * that holds the stream back, and graphs.
 *
 * Owns what it makes and makes its device's context the current one of the rank's thread. The
 * functions of graphs are not among those that src/cu opens: they are taken here from the
 * driver that it has loaded.
 */
#include "tools/gpu.h"

#include <dlfcn.h>
#include <stdlib.h>

#include "src/cu/cu.h"

enum { MAX_BLOCKS = 32, MAX_NODES = 64 };

#define CAPTURE_THREAD_LOCAL 1
#define NODE_KERNEL 0

struct kernel_node { /* CUDA_KERNEL_NODE_PARAMS_v2 */
    void *function;
    unsigned grid[3], block[3], shared_bytes;
    void **params, **extra;
    void *kernel, *context;
};
_Static_assert(sizeof(struct kernel_node) == 72, "CUDA_KERNEL_NODE_PARAMS_v2");

/* X(field, symbol, arguments) */
#define SYMBOLS(X)                                                                             \
    X(CtxSetCurrent, "cuCtxSetCurrent", (void *))                                              \
    X(GetErrorName, "cuGetErrorName", (int, const char **))                                    \
    X(StreamBeginCapture, "cuStreamBeginCapture_v2", (void *, int))                            \
    X(StreamEndCapture, "cuStreamEndCapture", (void *, void **))                               \
    X(GraphInstantiate, "cuGraphInstantiateWithFlags", (void **, void *, unsigned long long))  \
    X(GraphLaunch, "cuGraphLaunch", (void *, void *))                                          \
    X(GraphExecDestroy, "cuGraphExecDestroy", (void *))                                        \
    X(GraphDestroy, "cuGraphDestroy", (void *))                                                \
    X(GraphGetNodes, "cuGraphGetNodes", (void *, void **, size_t *))                           \
    X(GraphNodeGetType, "cuGraphNodeGetType", (void *, int *))                                 \
    X(GraphKernelNodeGetParams, "cuGraphKernelNodeGetParams_v2", (void *, struct kernel_node *))

struct driver {
#define FIELD(name, symbol, args) int(*name) args;
    SYMBOLS(FIELD)
#undef FIELD
};

struct gpu {
    struct epi_cu_device device;
    struct driver driver;
    void *stream, *beside;
    void *mark[2], *turn; /* events; turn: where the other stream goes on */
    uint32_t *word;       /* pinned; the stream is held until it is `held` */
    uint32_t held;
    uint64_t blocks[MAX_BLOCKS];
    void *pinned[MAX_BLOCKS];
    int num_blocks, num_pinned;
};

struct gpu_graph {
    const struct driver *driver;
    void *graph, *exec;
};

void *gpu_driver_function(const char *name) {
    void *lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    return lib ? dlsym(lib, name) : NULL;
}

static ep_status load(struct driver *driver) {
#define LOAD(name, symbol, args)                                                               \
    *(void **)&driver->name = gpu_driver_function(symbol);                                     \
    if (!driver->name) {                                                                       \
        return epi_fail(EP_ERR_UNSUPPORTED, "the driver has no " symbol);                      \
    }
    SYMBOLS(LOAD)
#undef LOAD
    return EP_OK;
}

static ep_status result(const struct driver *driver, int code, const char *call) {
    const char *name = NULL;
    if (code == 0) {
        return EP_OK;
    }
    driver->GetErrorName(code, &name);
    return epi_fail(EP_ERR_SYSTEM, "%s: %s (%d)", call, name ? name : "unknown error", code);
}
#define CALL(driver, name, ...) result(driver, (driver)->name(__VA_ARGS__), "cu" #name)

static ep_status open_all(struct gpu *gpu, int device) {
    void *word = NULL;
    EPI_TRY(epi_cu_device_open(&gpu->device, device));
    EPI_TRY(load(&gpu->driver));
    EPI_TRY(CALL(&gpu->driver, CtxSetCurrent, gpu->device.context));
    EPI_TRY(epi_cu_stream_create(&gpu->device, &gpu->stream));
    EPI_TRY(epi_cu_stream_create(&gpu->device, &gpu->beside));
    EPI_TRY(epi_cu_event_create_plain(&gpu->device, &gpu->turn));
    EPI_TRY(epi_cu_event_create(&gpu->device, &gpu->mark[GPU_BEGIN]));
    EPI_TRY(epi_cu_event_create(&gpu->device, &gpu->mark[GPU_END]));
    EPI_TRY(epi_cu_alloc_host(&gpu->device, &word, sizeof(*gpu->word)));
    gpu->word = word;
    *gpu->word = 0;
    return EP_OK;
}

ep_status gpu_open(struct gpu **out, int device) {
    struct gpu *gpu = epi_alloc(sizeof(*gpu));
    if (!gpu) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a GPU");
    }
    ep_status st = open_all(gpu, device);
    if (st != EP_OK) {
        gpu_close(&gpu);
        return st;
    }
    *out = gpu;
    return EP_OK;
}

void gpu_close(struct gpu **gpu) {
    struct gpu *g = *gpu;
    *gpu = NULL;
    if (!g) {
        return;
    }
    if (g->device.context) {
        void *word = g->word;
        if (g->word) {
            gpu_release(g);
        }
        for (int i = 0; i < g->num_blocks; i++) {
            epi_cu_free(&g->device, &g->blocks[i]);
        }
        for (int i = 0; i < g->num_pinned; i++) {
            epi_cu_free_host(&g->device, &g->pinned[i]);
        }
        for (int i = 0; i < 2; i++) {
            epi_cu_event_destroy(&g->device, &g->mark[i]);
        }
        epi_cu_event_destroy(&g->device, &g->turn);
        epi_cu_stream_destroy(&g->device, &g->beside);
        epi_cu_stream_destroy(&g->device, &g->stream);
        epi_cu_free_host(&g->device, &word);
        epi_cu_device_close(&g->device);
    }
    epi_free(g);
}

void *gpu_stream(const struct gpu *gpu) {
    return gpu->stream;
}

/* ---- memory ------------------------------------------------------------------------------ */

void *gpu_alloc(struct gpu *gpu, int64_t num, int64_t bytes) {
    uint64_t *at = &gpu->blocks[gpu->num_blocks];
    if (gpu->num_blocks == MAX_BLOCKS) {
        epi_fail(EP_ERR_INTERNAL, "more than %d blocks of device memory", MAX_BLOCKS);
        return NULL;
    }
    if (epi_cu_alloc(&gpu->device, at, (size_t)(num * bytes)) != EP_OK) {
        return NULL;
    }
    gpu->num_blocks++;
    return (void *)(uintptr_t)*at;
}

void *gpu_alloc_pinned(struct gpu *gpu, size_t bytes) {
    void **at = &gpu->pinned[gpu->num_pinned];
    if (gpu->num_pinned == MAX_BLOCKS) {
        epi_fail(EP_ERR_INTERNAL, "more than %d blocks of pinned memory", MAX_BLOCKS);
        return NULL;
    }
    gpu->num_pinned += epi_cu_alloc_host(&gpu->device, at, bytes) == EP_OK;
    return *at;
}

ep_status gpu_fill(struct gpu *gpu, void *to, int byte, int64_t bytes) {
    return epi_cu_fill(&gpu->device, gpu->stream, (uint64_t)(uintptr_t)to, byte, (size_t)bytes);
}

ep_status gpu_fill_beside(struct gpu *gpu, void *to, int byte, int64_t bytes) {
    EPI_TRY(epi_cu_event_record(&gpu->device, gpu->turn, gpu->stream));
    EPI_TRY(epi_cu_event_wait(&gpu->device, gpu->beside, gpu->turn));
    EPI_TRY(
        epi_cu_fill(&gpu->device, gpu->beside, (uint64_t)(uintptr_t)to, byte, (size_t)bytes));
    return epi_cu_event_record(&gpu->device, gpu->turn, gpu->beside);
}

ep_status gpu_join(struct gpu *gpu) {
    return epi_cu_event_wait(&gpu->device, gpu->stream, gpu->turn);
}

ep_status gpu_in(struct gpu *gpu, void *to, const void *from, int64_t bytes) {
    return epi_cu_copy_in(&gpu->device, gpu->stream, (uint64_t)(uintptr_t)to, from,
                          (size_t)bytes);
}

ep_status gpu_out(struct gpu *gpu, void *to, const void *from, int64_t bytes) {
    return epi_cu_copy_out(&gpu->device, gpu->stream, to, (uint64_t)(uintptr_t)from,
                           (size_t)bytes);
}

ep_status gpu_sync(struct gpu *gpu) {
    return epi_cu_stream_sync(&gpu->device, gpu->stream);
}

/* ---- time -------------------------------------------------------------------------------- */

bool gpu_hold(struct gpu *gpu) {
    if (epi_cu_stream_hold(&gpu->device, gpu->stream, gpu->word, gpu->held + 1) != EP_OK) {
        return false;
    }
    gpu->held++;
    return true;
}

void gpu_release(struct gpu *gpu) {
    atomic_store((_Atomic uint32_t *)gpu->word, gpu->held);
}

ep_status gpu_mark(struct gpu *gpu, enum gpu_mark mark) {
    return epi_cu_event_record(&gpu->device, gpu->mark[mark], gpu->stream);
}

ep_status gpu_elapsed_ns(struct gpu *gpu, int64_t *ns) {
    double us = 0;
    ep_status st =
        epi_cu_event_elapsed(&gpu->device, gpu->mark[GPU_BEGIN], gpu->mark[GPU_END], &us);
    *ns = (int64_t)(us * 1000 + 0.5);
    return st;
}

/* ---- graphs ------------------------------------------------------------------------------ */

ep_status gpu_capture(struct gpu *gpu) {
    return CALL(&gpu->driver, StreamBeginCapture, gpu->stream, CAPTURE_THREAD_LOCAL);
}

ep_status gpu_captured(struct gpu *gpu, struct gpu_graph **out) {
    struct gpu_graph *g = epi_alloc(sizeof(*g));
    if (!g) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a graph");
    }
    g->driver = &gpu->driver;
    ep_status st = CALL(g->driver, StreamEndCapture, gpu->stream, &g->graph);
    st = st == EP_OK ? CALL(g->driver, GraphInstantiate, &g->exec, g->graph, 0) : st;
    if (st != EP_OK) {
        gpu_graph_destroy(&g);
        return st;
    }
    *out = g;
    return EP_OK;
}

ep_status gpu_replay(struct gpu *gpu, struct gpu_graph *graph) {
    return CALL(&gpu->driver, GraphLaunch, graph->exec, gpu->stream);
}

void gpu_graph_destroy(struct gpu_graph **graph) {
    struct gpu_graph *g = *graph;
    *graph = NULL;
    if (g && g->exec) {
        g->driver->GraphExecDestroy(g->exec);
    }
    if (g && g->graph) {
        g->driver->GraphDestroy(g->graph);
    }
    epi_free(g);
}

int gpu_graph_sms(const struct gpu_graph *graph) {
    void *nodes[MAX_NODES];
    size_t num = MAX_NODES;
    unsigned most = 0;
    if (graph->driver->GraphGetNodes(graph->graph, nodes, &num) != 0) {
        return 0;
    }
    for (size_t i = 0; i < num && i < MAX_NODES; i++) {
        struct kernel_node node = {0};
        int type = -1;
        if (graph->driver->GraphNodeGetType(nodes[i], &type) == 0 && type == NODE_KERNEL &&
            graph->driver->GraphKernelNodeGetParams(nodes[i], &node) == 0 &&
            node.grid[0] > most) {
            most = node.grid[0];
        }
    }
    return (int)most;
}
