/* SPDX-License-Identifier: MIT */
/*
 * The driver's captures and graphs. What is queued on a captured stream, or on one that waits for
 * an event of the capture, becomes a list of operations, in the order of the calls; a graph that
 * can be launched has a copy of it, and a launch queues copies of that on its stream. So branches
 * of a capture run one after the other, which a device may do as well.
 *
 * Owns the captures that go on. Functions are called from any thread, those of one graph from one
 * at a time.
 */
#include "tests/driver/driver.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

enum mode { GLOBAL, THREAD_LOCAL, RELAXED };
enum { STATUS_NONE, STATUS_ACTIVE, STATUS_INVALIDATED };
enum { NODE_KERNEL = 0, NODE_MEMCPY = 1 };

/* A stream that takes part in a capture. */
struct member {
    const void *stream;
    uint64_t newest; /* step of it: an operation or a join, counted through the capture */
    bool loose;      /* no other stream has waited for that */
    struct member *next;
};

struct graph {
    struct op *first, **last;
    /* while it is captured: */
    struct member *members;
    uint64_t num_steps;
    uint64_t id;
    int mode;
    pthread_t thread;   /* that began it */
    const void *stream; /* on which it began */
    bool invalid;
    struct graph *next;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct graph *captures; /* that go on; guarded by mutex, with what is in them */
/* How many: where there are none no lock is taken, which would order threads that a driver does
 * not order. */
static atomic_int num_open;
static _Thread_local int thread_mode = GLOBAL;

static struct graph *graph_new(void) {
    struct graph *g = calloc(1, sizeof(*g));
    if (!g) {
        abort();
    }
    g->last = &g->first;
    return g;
}

static void graph_free(struct graph *g) {
    while (g->first) {
        struct op *op = g->first;
        g->first = op->next;
        free(op);
    }
    while (g->members) {
        struct member *m = g->members;
        g->members = m->next;
        free(m);
    }
    free(g);
}

static void append(struct graph *g, struct op *op) {
    *g->last = op;
    g->last = &op->next;
}

static struct op *copy_of(const struct op *op) {
    struct op *copy = driver_op(op->run);
    *copy = *op;
    copy->next = NULL;
    return copy;
}

/* ---- captures ------------------------------------------------------------------------------- */

/* Where the capture is in the list, or the list's end; the mutex is held. */
static struct graph **find(uint64_t id) {
    struct graph **g = &captures;
    while (*g && (*g)->id != id) {
        g = &(*g)->next;
    }
    return g;
}

static struct member *member_of(struct graph *g, const void *stream) {
    struct member *m = g->members;
    while (m && m->stream != stream) {
        m = m->next;
    }
    if (!m) {
        m = calloc(1, sizeof(*m));
        if (!m) {
            abort();
        }
        m->stream = stream;
        m->next = g->members;
        g->members = m;
    }
    return m;
}

static void step(struct graph *g, const void *stream) {
    struct member *m = member_of(g, stream);
    m->newest = ++g->num_steps;
    m->loose = true;
}

/* Whether a stream that joined was joined by no other. */
static bool any_loose(const struct graph *g) {
    for (const struct member *m = g->members; m; m = m->next) {
        if (m->loose && m->stream != g->stream) {
            return true;
        }
    }
    return false;
}

bool driver_capture_open(uint64_t id) {
    if (id == 0) {
        return false;
    }
    pthread_mutex_lock(&mutex);
    const bool open = *find(id) != NULL;
    pthread_mutex_unlock(&mutex);
    return open;
}

bool driver_capture_add(void *stream, struct op *op) {
    const uint64_t id = *driver_capture_of(stream);
    if (id == 0) {
        return false;
    }
    pthread_mutex_lock(&mutex);
    struct graph *g = *find(id);
    if (g) {
        step(g, driver_stream(stream));
        append(g, op);
    }
    pthread_mutex_unlock(&mutex);
    return g != NULL;
}

struct driver_point driver_capture_point(void *stream) {
    struct driver_point at = {.stream = driver_stream(stream),
                              .capture = *driver_capture_of(stream)};
    pthread_mutex_lock(&mutex);
    const struct graph *g = *find(at.capture);
    at.num_steps = g ? g->num_steps : 0;
    pthread_mutex_unlock(&mutex);
    return at;
}

int driver_capture_join(void *stream, const struct driver_point *at) {
    uint64_t *ours = driver_capture_of(stream);
    int result = 0;
    pthread_mutex_lock(&mutex);
    struct graph *g = *find(at->capture), *other = *find(*ours);
    if (!g) {
        result = CAPTURED_EVENT;
    } else if (driver_is_legacy(stream)) {
        result = CU_STREAM_CAPTURE_IMPLICIT;
    } else if (other && other != g) {
        result = CAPTURE_MERGE;
    } else if (driver_stream(stream) != at->stream) {
        struct member *from = member_of(g, at->stream);
        from->loose = from->loose && from->newest > at->num_steps;
        step(g, driver_stream(stream));
        *ours = at->capture;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

bool driver_capture_spoil(uint64_t id) {
    if (id == 0) {
        return false;
    }
    pthread_mutex_lock(&mutex);
    struct graph *g = *find(id);
    if (g) {
        g->invalid = true;
    }
    pthread_mutex_unlock(&mutex);
    return g != NULL;
}

int driver_unsafe(void) {
    int result = 0;
    if (atomic_load_explicit(&num_open, memory_order_relaxed) == 0) {
        return 0;
    }
    pthread_mutex_lock(&mutex);
    for (struct graph *g = captures; g; g = g->next) {
        const bool ours = pthread_equal(g->thread, pthread_self());
        if (thread_mode != RELAXED && g->mode != RELAXED &&
            (ours || (thread_mode == GLOBAL && g->mode == GLOBAL))) {
            g->invalid = true;
            result = CAPTURE_UNSUPPORTED;
        }
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

DEFINE(cuThreadExchangeStreamCaptureMode, int *mode) {
    const int was = thread_mode;
    thread_mode = *mode;
    *mode = was;
    return 0;
}
DEFINE(cuStreamBeginCapture_v2, void *stream, int mode) {
    static uint64_t num_captures;
    if (driver_is_legacy(stream) || driver_is_captured(stream)) {
        return CAPTURE_UNSUPPORTED;
    }
    struct graph *g = graph_new();
    g->mode = mode;
    g->thread = pthread_self();
    g->stream = driver_stream(stream);
    pthread_mutex_lock(&mutex);
    g->id = ++num_captures;
    g->next = captures;
    captures = g;
    atomic_fetch_add_explicit(&num_open, 1, memory_order_relaxed);
    *driver_capture_of(stream) = g->id;
    pthread_mutex_unlock(&mutex);
    return 0;
}
DEFINE(cuStreamEndCapture, void *stream, void **graph) {
    *graph = NULL;
    pthread_mutex_lock(&mutex);
    struct graph **at = find(*driver_capture_of(stream)), *g = *at;
    const bool ours = g && g->stream == driver_stream(stream);
    if (ours) {
        *at = g->next;
        atomic_fetch_sub_explicit(&num_open, 1, memory_order_relaxed);
    }
    pthread_mutex_unlock(&mutex);
    if (!ours) {
        return CAPTURE_UNMATCHED;
    }
    if (g->invalid || any_loose(g)) {
        const int result = g->invalid ? CAPTURE_INVALIDATED : CAPTURE_UNJOINED;
        graph_free(g);
        return result;
    }
    *graph = g;
    return 0;
}
DEFINE(cuStreamGetCaptureInfo_v2, void *stream, int *status, uint64_t *id, void **graph,
       const void **dependencies, size_t *num) {
    const uint64_t newest = *driver_capture_of(stream);
    (void)graph, (void)dependencies, (void)num;
    *status = STATUS_NONE;
    *id = 0;
    if (newest == 0) {
        return 0;
    }
    pthread_mutex_lock(&mutex);
    const struct graph *g = *find(newest);
    *status = !g ? STATUS_NONE : g->invalid ? STATUS_INVALIDATED : STATUS_ACTIVE;
    *id = g ? g->id : 0;
    pthread_mutex_unlock(&mutex);
    return 0;
}

/* ---- graphs --------------------------------------------------------------------------------- */

DEFINE(cuGraphInstantiateWithFlags, void **exec, void *graph, unsigned long long flags) {
    const struct graph *from = graph;
    struct graph *g = graph_new();
    (void)flags;
    for (const struct op *op = from->first; op; op = op->next) {
        append(g, copy_of(op));
    }
    *exec = g;
    return 0;
}
DEFINE(cuGraphLaunch, void *exec, void *stream) {
    const struct graph *g = exec;
    for (const struct op *op = g->first; op; op = op->next) {
        driver_queue(stream, copy_of(op));
    }
    return 0;
}
DEFINE(cuGraphExecDestroy, void *exec) {
    graph_free(exec);
    return 0;
}
DEFINE(cuGraphDestroy, void *graph) {
    graph_free(graph);
    return 0;
}
DEFINE(cuGraphGetNodes, void *graph, void **nodes, size_t *num) {
    const struct graph *g = graph;
    const size_t room = nodes ? *num : 0;
    size_t n = 0;
    for (struct op *op = g->first; op; op = op->next, n++) {
        if (n < room) {
            nodes[n] = op;
        }
    }
    *num = nodes && n > room ? room : n;
    return 0;
}
DEFINE(cuGraphNodeGetType, void *node, int *type) {
    const struct op *op = node;
    *type = op->entry ? NODE_KERNEL : NODE_MEMCPY; /* the others are taken for copies */
    return 0;
}
struct kernel_node { /* CUDA_KERNEL_NODE_PARAMS_v2 */
    void *function;
    unsigned grid[3], block[3], shared_bytes;
    void **params, **extra;
    void *kernel, *context;
};
DEFINE(cuGraphKernelNodeGetParams_v2, void *node, struct kernel_node *params) {
    const struct op *op = node;
    if (!op->entry) {
        return CU_INVALID_VALUE;
    }
    *params = (struct kernel_node){.grid = {(unsigned)op->blocks, 1, 1},
                                   .block = {32 * (unsigned)op->warps, 1, 1},
                                   .shared_bytes = (unsigned)op->shared_bytes};
    return 0;
}
