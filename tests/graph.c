/* SPDX-License-Identifier: MIT */
/* Declared in graph.h. */
#include "tests/graph.h"

#include "src/cu/driver.h"
#include "tests/gpu.h"

#define CAPTURE_THREAD_LOCAL 1

static struct {
    int (*begin)(void *stream, int mode);
    int (*end)(void *stream, void **graph);
    int (*instantiate)(void **exec, void *graph, unsigned long long flags);
    int (*launch)(void *exec, void *stream);
    int (*destroy_exec)(void *exec);
    int (*destroy)(void *graph);
} cu;

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load_symbols(void) {
    *(void **)&cu.begin = gpu_symbol("cuStreamBeginCapture_v2");
    *(void **)&cu.end = gpu_symbol("cuStreamEndCapture");
    *(void **)&cu.instantiate = gpu_symbol("cuGraphInstantiateWithFlags");
    *(void **)&cu.launch = gpu_symbol("cuGraphLaunch");
    *(void **)&cu.destroy_exec = gpu_symbol("cuGraphExecDestroy");
    *(void **)&cu.destroy = gpu_symbol("cuGraphDestroy");
}

static bool good(struct world *w, int result, const char *call) {
    return world_is(w, epi_cu_result(result, call), EP_OK, call);
}

bool graph_begin(struct world *w, void *stream) {
    pthread_once(&once, load_symbols);
    return good(w, cu.begin(stream, CAPTURE_THREAD_LOCAL), "cuStreamBeginCapture");
}

bool graph_end(struct world *w, void *stream, struct graph *g) {
    return good(w, cu.end(stream, &g->graph), "cuStreamEndCapture") &&
           good(w, cu.instantiate(&g->exec, g->graph, 0), "cuGraphInstantiateWithFlags");
}

bool graph_launch(struct world *w, const struct graph *g, void *stream) {
    return good(w, cu.launch(g->exec, stream), "cuGraphLaunch");
}

void graph_destroy(struct world *w, struct graph *g) {
    if (g->exec) {
        good(w, cu.destroy_exec(g->exec), "cuGraphExecDestroy");
    }
    if (g->graph) {
        good(w, cu.destroy(g->graph), "cuGraphDestroy");
    }
    *g = (struct graph){NULL, NULL};
}
