/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * What orders the operations of a CUDA group is the order of the calls, whatever the streams are:
 * also in two steps, on streams whose handles are alike, and behind work that waits. A host that
 * waits for what such a stream holds is told so in time.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/cu/driver.h"
#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 2
#define PER_THREAD ((void *)2) /* CU_STREAM_PER_THREAD: another stream in each thread */
#define SETTLE_MS 60           /* for kernels that run too early */

/* Two micro-batches, routed and dispatched once, and a word that holds a stream. */
struct two {
    struct world *w;
    const struct epi_cu_device *device;
    struct run run[2];
    ep_handle *handle[2];
    void *stream[2];
    struct gpu_piece piece, ids;
    uint32_t *word;
    atomic_int queued; /* by another thread */
};

static void two_create(struct two *t, struct world *w, bool dispatched) {
    struct gpu *gpu = call_gpu(w->group);

    *t = (struct two){.w = w, .device = &gpu->device};
    gpu_take(gpu, sizeof(*t->word), &t->piece);
    gpu_take(gpu, 4 * sizeof(int64_t), &t->ids);
    t->word = (uint32_t *)(void *)t->piece.host;
    for (int i = 0; i < 2; i++) {
        run_create(&t->run[i], w, w->ctx);
        world_is(w, call_stream_create(&t->stream[i], w->group), EP_OK, "a stream");
        world_is(w, ep_handle_create(&t->handle[i], w->group, NULL), EP_OK, "a handle");
        world_is(w, run_route(&t->run[i], t->handle[i], t->stream[0]), EP_OK, "route");
        if (dispatched) {
            world_is(w, run_dispatch(&t->run[i], t->handle[i], t->stream[0]), EP_OK,
                     "dispatch");
        }
    }
    world_is(w, call_stream_sync(w->group, t->stream[0]), EP_OK, "what was found");
}

/* False where the driver cannot hold a stream. */
static bool hold(struct two *t, void *stream) {
    __atomic_store_n(t->word, 0, __ATOMIC_SEQ_CST);
    return epi_cu_stream_hold(t->device, stream, t->word, 1) == EP_OK;
}

static void release(struct two *t) {
    tap_sleep_ms(SETTLE_MS);
    __atomic_store_n(t->word, 1, __ATOMIC_SEQ_CST);
}

static void two_free(struct two *t) {
    for (int i = 0; i < 2; i++) {
        call_stream_destroy(t->w->group, &t->stream[i]);
        ep_handle_destroy(&t->handle[i]);
        run_free(&t->run[i]);
    }
    gpu_give(call_gpu(t->w->group), &t->piece);
    gpu_give(call_gpu(t->w->group), &t->ids);
}

/* ---- two steps ------------------------------------------------------------------------------ */

/* Begin and finish of a handle whose counts are known, beside a combine that waits on another
 * stream: neither half may overtake it. */
static void cached_behind_another(struct world *w) {
    struct two t;

    two_create(&t, w, true);
    if (hold(&t, t.stream[0])) {
        world_is(w, run_combine(&t.run[0], t.handle[0], t.stream[0]), EP_OK, "combine");
        world_is(w, run_dispatch(&t.run[1], t.handle[1], t.stream[1]), EP_OK, "in two steps");
        release(&t);
        for (int i = 0; i < 2; i++) {
            world_is(w, call_stream_sync(w->group, t.stream[i]), EP_OK, "what was found");
        }
        run_check_combine(&t.run[0]);
        run_check_dispatch(&t.run[1], t.handle[1]);
        world_is(w, run_combine(&t.run[1], t.handle[1], t.stream[0]), EP_OK, "combine");
        world_is(w, call_stream_sync(w->group, t.stream[0]), EP_OK, "what was found");
        run_check_combine(&t.run[1]);
    }
    two_free(&t);
}

/* ---- streams that are alike ----------------------------------------------------------------- */

static void check_both(struct two *t) {
    for (int i = 0; i < 2; i++) {
        run_check_dispatch(&t->run[i], t->handle[i]);
    }
}

/* Rank 0 destroys a stream that still has work; the next one may have its handle. */
static void handle_of_another(struct world *w) {
    struct two t;

    two_create(&t, w, false);
    void *held = NULL, *next = NULL, *gone = NULL;
    world_is(w, call_stream_create(&held, w->group), EP_OK, "a stream");
    if (hold(&t, held)) {
        world_is(w, run_dispatch(&t.run[0], t.handle[0], held), EP_OK, "dispatch");
        if (w->rank == 0) {
            gone = held;
            epi_cu_stream_destroy(t.device, &held);
            world_is(w, call_stream_create(&next, w->group), EP_OK, "the next stream");
        }
        held = next ? next : held;
        world_is(w, run_dispatch(&t.run[1], t.handle[1], held), EP_OK, "dispatch");
        release(&t);
        world_is(w, call_stream_sync(w->group, held), EP_OK, "what was found");
        run_check_dispatch(&t.run[1], t.handle[1]);
        if (!gone || gone == held) { /* else nobody has looked at the other's outputs */
            run_check_dispatch(&t.run[0], t.handle[0]);
        }
    }
    call_stream_destroy(w->group, &held);
    two_free(&t);
}

static void *dispatch_second(void *arg) {
    struct two *t = arg;

    world_is(t->w, run_dispatch(&t->run[1], t->handle[1], PER_THREAD), EP_OK, "dispatch");
    atomic_store(&t->queued, 1);
    gpu_must(epi_cu_stream_sync(t->device, PER_THREAD), "the thread's stream");
    return NULL;
}

/* Two threads of rank 0, each on its own default stream, whose handles are the same. */
static void default_of_threads(struct world *w) {
    struct two t;
    pthread_t thread;

    two_create(&t, w, false);
    struct gpu *gpu = call_gpu(w->group);
    void *first = w->rank == 0 ? PER_THREAD : t.stream[0], *was = gpu->stream;
    /* By which the test copies: the default stream of a process would wait for those of its threads. */
    gpu->stream = w->rank == 0 ? t.stream[0] : was;
    if (hold(&t, first)) {
        world_is(w, run_dispatch(&t.run[0], t.handle[0], first), EP_OK, "dispatch");
        const bool second =
            w->rank == 0 && pthread_create(&thread, NULL, dispatch_second, &t) == 0;
        if (!second) {
            world_is(w, run_dispatch(&t.run[1], t.handle[1], t.stream[1]), EP_OK, "dispatch");
        }
        while (second && !atomic_load(&t.queued)) {
            tap_sleep_ms(1);
        }
        release(&t);
        if (second) {
            pthread_join(thread, NULL);
        }
        for (int i = 0; i < 2; i++) {
            void *stream = w->rank == 0 ? PER_THREAD : t.stream[i];
            world_is(w, call_stream_sync(w->group, stream), EP_OK, "what was found");
        }
        check_both(&t);
    }
    gpu->stream = was;
    two_free(&t);
}

/* ---- waits of the host ---------------------------------------------------------------------- */

/* The stream does not come to the dispatch: whoever asks for its counts is told after the timeout,
 * and the group goes on when the stream does. */
static void counts_of_a_held_stream(struct world *w) {
    struct ep_fault fault = EP_FAULT_INIT;
    struct two t;

    two_create(&t, w, false);
    if (hold(&t, t.stream[0])) {
        world_is(w, run_dispatch(&t.run[0], t.handle[0], t.stream[0]), EP_OK, "dispatch");
        world_fails(w, ep_handle_counts(t.handle[0], NULL, NULL, NULL), EP_ERR_TIMEOUT,
                    "stream|ms", "counts of what has not run");
        world_is(w, ep_group_fault(w->group, &fault), EP_OK, "ep_group_fault");
        world_is(w, (ep_status)fault.status, EP_OK, "the group's fault");
        world_barrier(w);
        release(&t);
        world_is(w, call_stream_sync(w->group, t.stream[0]), EP_OK, "what was found");
        run_check_dispatch(&t.run[0], t.handle[0]);
    }
    two_free(&t);
}

/* ---- a launch that fails -------------------------------------------------------------------- */

#define CAPTURED 5
#define CAPTURE_THREAD_LOCAL 1

static void capture_some(struct two *t) {
    int (*begin)(void *stream, int mode), (*end)(void *stream, void **graph);
    int (*destroy)(void *graph);
    struct world *w = t->w;
    void *graph = NULL;

    *(void **)&begin = gpu_symbol("cuStreamBeginCapture_v2");
    *(void **)&end = gpu_symbol("cuStreamEndCapture");
    *(void **)&destroy = gpu_symbol("cuGraphDestroy");
    world_is(w, epi_cu_enter(t->device), EP_OK, "the device's context");
    world_check(w, begin(t->stream[1], CAPTURE_THREAD_LOCAL) == 0, "cuStreamBeginCapture");
    for (int i = 0; i < CAPTURED; i++) {
        world_is(w, run_dispatch(&t->run[1], t->handle[1], t->stream[1]), EP_OK, "captured");
    }
    world_check(w, end(t->stream[1], &graph) == 0, "cuStreamEndCapture");
    world_check(w, destroy(graph) == 0, "cuGraphDestroy");
    epi_cu_leave();
}

/* Operations that were captured and never ran do not make the others take a failed launch for one
 * that is yet to come. Rank 0 is a process. */
static void launch_fails(struct world *w) {
    int (*fail)(int n);
    struct ep_fault fault = EP_FAULT_INIT;
    struct two t;

    two_create(&t, w, true);
    capture_some(&t);
    if (w->rank != 0) {
        world_is(w, run_dispatch(&t.run[0], t.handle[0], t.stream[0]), EP_OK, "dispatch");
    }
    world_barrier(w);
    if (w->rank == 0) {
        *(void **)&fail = gpu_symbol("driver_fail_launch");
        fail(1);
        world_fails(w, run_dispatch(&t.run[0], t.handle[0], t.stream[0]), EP_ERR_NOMEM,
                    "ep_dispatch", "a launch that fails");
    } else {
        world_fails(w, call_stream_sync(w->group, t.stream[0]), EP_ERR_NOMEM, "rank 0|NOMEM",
                    "what was found");
    }
    world_is(w, ep_group_fault(w->group, &fault), EP_OK, "ep_group_fault");
    world_is(w, (ep_status)fault.status, EP_ERR_NOMEM, "the group's fault");
    world_barrier(w);
    two_free(&t);
}

/* ---- the test ------------------------------------------------------------------------------- */

static void both_end(struct two *t) {
    for (int i = 0; i < 2; i++) {
        world_is(t->w, call_stream_sync(t->w->group, t->stream[i]), EP_OK, "what was found");
    }
}

/* A handle is routed behind what the stream waits for, and destroyed. */
static void route_and_forget(struct two *t, void *stream) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_handle *handle = NULL;

    ep_tensor_2d(&ids, EP_I64, t->ids.host, 4, 1);
    routing.topk_ids = &ids;
    memset(t->ids.host, 0, t->ids.bytes);
    world_is(t->w, ep_handle_create(&handle, t->w->group, NULL), EP_OK, "a handle");
    world_is(t->w, ep_handle_route(handle, &routing, stream), EP_OK, "route");
    ep_handle_destroy(&handle);
}

/* The next micro-batch is routed while an operation waits on another stream. What uses that routing
 * waits for it, and a handle that goes first takes nothing with it. */
static void routed_beside_another(struct world *w) {
    struct two t;
    ep_status st = EP_AGAIN;

    two_create(&t, w, false);
    if (hold(&t, t.stream[0])) {
        world_is(w, run_dispatch(&t.run[0], t.handle[0], t.stream[0]), EP_OK, "dispatch");
        world_is(w, run_route(&t.run[1], t.handle[1], t.stream[1]), EP_OK, "route");
        for (int ms = 0; ms < 20000 && st == EP_AGAIN; ms++) {
            tap_sleep_ms(1);
            st = ep_handle_status(t.handle[1]);
        }
        world_is(w, st, EP_OK, "a routing beside a dispatch that waits");
        release(&t);
        both_end(&t);
        run_check_dispatch(&t.run[0], t.handle[0]);

        hold(&t, t.stream[1]);
        world_is(w, run_route(&t.run[1], t.handle[1], t.stream[1]), EP_OK, "route");
        world_is(w, run_dispatch(&t.run[1], t.handle[1], t.stream[0]), EP_OK, "dispatch");
        tap_sleep_ms(SETTLE_MS);
        world_is(w, ep_handle_status(t.handle[1]), EP_AGAIN, "before the routing");
        release(&t);
        both_end(&t);
        run_check_dispatch(&t.run[1], t.handle[1]);

        hold(&t, t.stream[1]);
        route_and_forget(&t, t.stream[1]);
        world_is(w, run_combine(&t.run[1], t.handle[1], t.stream[0]), EP_OK, "combine");
        release(&t);
        both_end(&t);
        run_check_combine(&t.run[1]);
    }
    two_free(&t);
}

/* One group for all of them, because processes are slow to start on a GPU. */
static void what_orders(struct world *w) {
    struct trial *t = w->ctx; /* the same case in one step and in two */

    w->ctx = &t[1];
    cached_behind_another(w);
    w->ctx = t;
    handle_of_another(w);
    default_of_threads(w);
    routed_beside_another(w);
}

static void run(uint64_t seed, void (*body)(struct world *w), int timeout_ms, bool processes,
                const char *name) {
    struct form form = {.id_dtype = EP_I64, .num_bias = 1};
    struct world_setup setup;
    struct test_case c;
    struct trial t[2];

    case_default(&c, RANKS, seed);
    case_build(&c);
    for (int i = 0; i < 2; i++) {
        trial_init(&t[i], &c);
        form.two_step = i;
        trial_form(&t[i], &form);
        trial_build(&t[i]);
    }
    trial_setup(&setup, t);
    setup.config.timeout_ms = timeout_ms ? timeout_ms : setup.config.timeout_ms;
    setup.body = body;
    setup.processes = processes;
    ok(world_run(&setup) == 0, "%s, %s", name,
       gpu_processes(processes) ? "processes" : "threads");
    trial_free(&t[0]);
    trial_free(&t[1]);
    case_free(&c);
}

int main(void) {
    gpu_only();
    uint64_t seed = tap_seed();

    tap_deadline(120);
    for (int processes = 0; processes < gpu_ways(); processes++) {
        run(seed, what_orders, 0, processes,
            "two steps, streams that are alike, and a routing, each beside what waits");
    }
    run(seed + 3, counts_of_a_held_stream, 1500, false,
        "the counts of a stream that does not come to its dispatch");
    if (getenv("EP_TEST_DRIVER") && gpu_processes(true)) {
        run(seed + 4, launch_fails, 0, true, "a launch that fails after captures");
    }
    return done_testing();
}
