/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * CUDA groups and several streams: the operations of a group run in the order of their calls,
 * whatever streams they are on; several handles and groups are in flight at once; several threads
 * call at the same time; and a stream that takes no work ends nothing.
 */
#include <stdio.h>
#include <string.h>

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 3   /* of two groups with streams of their own: all have hardware queues */
#define WORKERS 4 /* two groups of all ranks fit on one device */
#define ROUNDS 6
#define CAPTURE_THREAD_LOCAL 1

/* Where the ranks of a second group meet. */
struct scene {
    struct trial t[2];
    struct test_case c[2];
    struct ep_group_config config;
    ep_world *world;
    char address[32];
};

static void streams_create(struct world *w, void *stream[2]) {
    for (int i = 0; i < 2; i++) {
        world_is(w, call_stream_create(&stream[i], w->group), EP_OK, "a stream");
    }
}

/* Two micro-batches, each on a stream of its own, with the order of the calls as the only tie. */
static void two_handles(struct world *w) {
    const struct scene *s = w->ctx;
    struct run r[2];
    void *stream[2] = {NULL, NULL};
    ep_handle *h[2] = {NULL, NULL};

    streams_create(w, stream);
    for (int i = 0; i < 2; i++) {
        run_create(&r[i], w, &s->t[i]);
        world_is(w, ep_handle_create(&h[i], w->group, NULL), EP_OK, "ep_handle_create");
        world_is(w, run_route(&r[i], h[i], stream[i]), EP_OK, "route");
    }
    for (int n = 0; n < ROUNDS; n++) {
        world_is(w, run_dispatch(&r[0], h[0], stream[0]), EP_OK, "ep_dispatch");
        world_is(w, run_dispatch(&r[1], h[1], stream[1]), EP_OK, "ep_dispatch");
        world_is(w, run_combine(&r[1], h[1], stream[1]), EP_OK, "ep_combine");
        world_is(w, run_combine(&r[0], h[0], stream[0]), EP_OK, "ep_combine");
        for (int i = 0; i < 2; i++) {
            world_is(w, call_stream_sync(w->group, stream[i]), EP_OK, "what was found");
            run_check_dispatch(&r[i], h[i]);
            run_check_combine(&r[i]);
        }
    }
    for (int i = 0; i < 2; i++) {
        call_stream_destroy(w->group, &stream[i]);
        ep_handle_destroy(&h[i]);
        run_free(&r[i]);
    }
}

/* One handle: routed on one stream, dispatched on the other, combined on the first, and so on.
 * Nobody waits in between, and no event is recorded by the test. */
static void alternately(struct world *w) {
    const struct scene *s = w->ctx;
    struct run r[2];
    void *stream[2] = {NULL, NULL};
    ep_handle *h = NULL;
    int at = 0;

    streams_create(w, stream);
    world_is(w, ep_handle_create(&h, w->group, NULL), EP_OK, "ep_handle_create");
    for (int n = 0; n < ROUNDS; n++) {
        struct run *now = &r[n % 2];
        run_create(now, w, &s->t[n % 2]);
        world_is(w, run_route(now, h, stream[at++ % 2]), EP_OK, "route");
        world_is(w, run_dispatch(now, h, stream[at++ % 2]), EP_OK, "ep_dispatch");
        world_is(w, run_combine(now, h, stream[at++ % 2]), EP_OK, "ep_combine");
        world_is(w, run_combine(now, h, stream[at++ % 2]), EP_OK, "again");
        for (int i = 0; i < 2; i++) {
            world_is(w, call_stream_sync(w->group, stream[i]), EP_OK, "what was found");
        }
        run_check_dispatch(now, h);
        run_check_combine(now);
        run_free(now);
        at += n % 3;
    }
    for (int i = 0; i < 2; i++) {
        call_stream_destroy(w->group, &stream[i]);
    }
    ep_handle_destroy(&h);
}

/* ---- a second group ------------------------------------------------------------------------ */

static void second_world(struct world *w, struct world *second) {
    const struct scene *s = w->ctx;
    struct ep_group_config config = s->config;

    *second = *w;
    second->group = NULL;
    second->bad = 0;
    config.rank = w->rank;
    config.num_ranks = w->num_ranks;
    config.world = s->world;
    config.address = s->world ? NULL : s->address;
    world_is(second, call_group_create(&second->group, &config), EP_OK, "a second group");
}

/* A pass that is queued on a stream, and later looked at. */
struct queued {
    struct world *w;
    struct run run;
    ep_handle *handle;
    void *stream;
};

static void queued_create(struct queued *q, struct world *w, const struct trial *t) {
    *q = (struct queued){.w = w};
    run_create(&q->run, w, t);
    world_is(w, call_stream_create(&q->stream, w->group), EP_OK, "a stream");
    world_is(w, ep_handle_create(&q->handle, w->group, NULL), EP_OK, "ep_handle_create");
}

static void queued_check(struct queued *q) {
    world_is(q->w, call_stream_sync(q->w->group, q->stream), EP_OK, "what was found");
    run_check_dispatch(&q->run, q->handle);
    run_check_combine(&q->run);
}

static void queued_free(struct queued *q) {
    call_stream_destroy(q->w->group, &q->stream);
    ep_handle_destroy(&q->handle);
    run_free(&q->run);
}

/* Two groups of the same ranks, both in flight. */
static void two_groups(struct world *w) {
    const struct scene *s = w->ctx;
    struct world second;
    struct queued q[2];

    second_world(w, &second);
    queued_create(&q[0], w, &s->t[0]);
    queued_create(&q[1], &second, &s->t[1]);
    for (int n = 0; n < ROUNDS; n++) {
        for (int i = 0; i < 2; i++) {
            world_is(q[i].w, run_route(&q[i].run, q[i].handle, q[i].stream), EP_OK, "route");
        }
        for (int i = 0; i < 2; i++) {
            world_is(q[i].w, run_dispatch(&q[i].run, q[i].handle, q[i].stream), EP_OK,
                     "ep_dispatch");
        }
        for (int i = 1; i >= 0; i--) {
            world_is(q[i].w, run_combine(&q[i].run, q[i].handle, q[i].stream), EP_OK,
                     "ep_combine");
        }
        queued_check(&q[n % 2]);
        queued_check(&q[1 - n % 2]);
    }
    queued_free(&q[0]);
    queued_free(&q[1]);
    call_group_destroy(&second.group);
    w->bad += second.bad;
}

/* ---- two threads --------------------------------------------------------------------------- */

static void *passes(void *arg) {
    struct queued *q = arg;

    for (int n = 0; n < 2 * ROUNDS; n++) {
        world_is(q->w, run_route(&q->run, q->handle, q->stream), EP_OK, "route");
        world_is(q->w, run_dispatch(&q->run, q->handle, q->stream), EP_OK, "ep_dispatch");
        world_is(q->w, run_combine(&q->run, q->handle, q->stream), EP_OK, "ep_combine");
        queued_check(q);
    }
    return NULL;
}

static void *routes(void *arg) {
    struct queued *q = arg;

    for (int n = 0; n < 8 * ROUNDS; n++) {
        world_is(q->w, run_route(&q->run, q->handle, q->stream), EP_OK, "route");
        world_is(q->w, call_stream_sync(q->w->group, q->stream), EP_OK, "what was found");
    }
    return NULL;
}

/* Each thread works with a group of its own. */
static void two_threads(struct world *w) {
    const struct scene *s = w->ctx;
    struct world second;
    struct queued q[2];
    pthread_t thread;

    second_world(w, &second);
    queued_create(&q[0], w, &s->t[0]);
    queued_create(&q[1], &second, &s->t[1]);
    if (world_check(w, pthread_create(&thread, NULL, passes, &q[1]) == 0, "a thread")) {
        passes(&q[0]);
        pthread_join(thread, NULL);
    }
    queued_free(&q[0]);
    queued_free(&q[1]);
    call_group_destroy(&second.group);
    w->bad += second.bad;
}

/* One thread routes a handle again and again, the other's operations go on; then the routed
 * handle is dispatched. */
static void routing_beside(struct world *w) {
    const struct scene *s = w->ctx;
    struct world second = *w; /* the same group, with failures of its own */
    struct queued q[2];
    pthread_t thread;

    second.bad = 0;
    queued_create(&q[0], w, &s->t[0]);
    queued_create(&q[1], &second, &s->t[1]);
    if (world_check(w, pthread_create(&thread, NULL, routes, &q[1]) == 0, "a thread")) {
        passes(&q[0]);
        pthread_join(thread, NULL);
    }
    passes(&q[1]);
    queued_free(&q[0]);
    queued_free(&q[1]);
    w->bad += second.bad;
}

/* ---- a stream that takes no work ------------------------------------------------------------ */

/* A capture that an error has ended: a dispatch on its stream is refused before it counts as one, and
 * the group goes on. */
static void spoilt_capture(struct world *w) {
    int (*begin)(void *stream, int mode), (*end)(void *stream, void **graph);
    const struct epi_cu_device *d = &call_gpu(w->group)->device;
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    struct ep_fault fault = EP_FAULT_INIT;
    struct ep_tensor ids, x;
    void *stream = NULL, *graph = NULL;
    struct gpu_piece piece[2];
    ep_handle *h = NULL;

    *(void **)&begin = gpu_symbol("cuStreamBeginCapture_v2");
    *(void **)&end = gpu_symbol("cuStreamEndCapture");
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    for (int i = 0; i < 2; i++) {
        gpu_take(call_gpu(w->group), 2 * EP_ROW_ALIGN, &piece[i]);
        gpu_must(epi_cu_fill(d, stream, piece[i].device, 0, 2 * EP_ROW_ALIGN), "ids and rows");
    }
    ep_tensor_2d(&ids, EP_I32, (void *)(uintptr_t)piece[0].device, 2, 1);
    ep_tensor_2d(&x, EP_F32, (void *)(uintptr_t)piece[1].device, 2, 4);
    routing.topk_ids = &ids;
    args.x = &x;
    world_is(w, ep_handle_create(&h, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, ep_handle_route(h, &routing, stream), EP_OK, "ep_handle_route");
    gpu_must(epi_cu_stream_sync(d, stream), "the stream");
    world_check(w, begin(stream, CAPTURE_THREAD_LOCAL) == 0, "cuStreamBeginCapture");
    epi_cu_stream_sync(d, stream); /* which a capture does not survive */
    world_fails(w, ep_dispatch(h, &args, stream), EP_ERR_STATE, "invalidated", "ep_dispatch");
    world_check(w, end(stream, &graph) != 0, "the capture has survived");
    world_is(w, ep_group_fault(w->group, &fault), EP_OK, "ep_group_fault");
    world_is(w, (ep_status)fault.status, EP_OK, "the group's fault");
    world_is(w, ep_dispatch(h, &args, stream), EP_OK, "ep_dispatch");
    gpu_must(epi_cu_stream_sync(d, stream), "the stream");
    world_is(w, ep_handle_status(h), EP_OK, "what was found");
    ep_handle_destroy(&h);
    call_stream_destroy(w->group, &stream);
    gpu_give(call_gpu(w->group), &piece[0]);
    gpu_give(call_gpu(w->group), &piece[1]);
}

/* ---- a handle after a handle --------------------------------------------------------------- */

/* What was queued for a handle that is gone, and found a bad id, says nothing to the next one. The
 * ranks are not in step, so nothing is given back to the driver while another holds its stream. */
static void after_another(struct world *w) {
    const struct epi_cu_device *d = &call_gpu(w->group)->device;
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    const size_t bytes = 2 * 4 * sizeof(int32_t);
    struct gpu_piece piece[3]; /* two lists of ids, and a word */
    void *stream = NULL;
    ep_handle *h = NULL;

    for (int i = 0; i < 3; i++) {
        gpu_take(call_gpu(w->group), bytes, &piece[i]);
    }
    uint32_t *word = (uint32_t *)(void *)piece[2].host;
    *word = 0;
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    for (int i = 0; i < 2; i++) { /* ids far too large, and -1 */
        gpu_must(epi_cu_fill(d, stream, piece[i].device, i ? 0xff : 0x77, bytes), "ids");
    }
    ep_tensor_2d(&ids, EP_I32, NULL, 2, 4);
    routing.topk_ids = &ids;
    if (epi_cu_stream_hold(d, stream, word, 1) == EP_OK) {
        for (int i = 0; i < 2; i++) {
            world_is(w, ep_handle_create(&h, w->group, NULL), EP_OK, "ep_handle_create");
            ids.data = (void *)(uintptr_t)piece[i].device;
            world_is(w, ep_handle_route(h, &routing, stream), EP_OK, "ep_handle_route");
            world_is(w, ep_handle_status(h), EP_AGAIN, "before it ran");
            if (i == 0) {
                ep_handle_destroy(&h);
            }
        }
        __atomic_store_n(word, 1, __ATOMIC_SEQ_CST);
        gpu_must(epi_cu_stream_sync(d, stream), "the stream");
        world_is(w, ep_handle_status(h), EP_OK, "after the other's bad id");
        ids.data = (void *)(uintptr_t)piece[0].device;
        world_is(w, ep_handle_route(h, &routing, stream), EP_OK, "ep_handle_route");
        gpu_must(epi_cu_stream_sync(d, stream), "the stream");
        world_is(w, ep_handle_status(h), EP_ERR_ARG, "a bad id of its own");
        ep_handle_destroy(&h);
    }
    call_stream_destroy(w->group, &stream);
    for (int i = 0; i < 3; i++) {
        gpu_give(call_gpu(w->group), &piece[i]);
    }
}

/* ---- the test ------------------------------------------------------------------------------ */

static void run(uint64_t seed, void (*body)(struct world *w), bool processes,
                const char *name) {
    static const struct form form[2] = {
        {.id_dtype = EP_I64, .slack = 2, .num_bias = 1},
        {.id_dtype = EP_I32, .expanded = true, .alignment = 4, .zero_gaps = true}};
    const bool are_processes = gpu_processes(processes);
    struct world_setup setup;
    struct scene s;

    memset(&s, 0, sizeof(s));
    for (int i = 0; i < 2; i++) {
        case_default(&s.c[i], RANKS, seed + (uint64_t)i);
        s.c[i].max_tokens = 40;
        case_build(&s.c[i]);
        trial_init(&s.t[i], &s.c[i]);
        trial_form(&s.t[i], &form[i]);
        trial_build(&s.t[i]);
    }
    trial_setup(&setup, &s.t[0]);
    setup.config.num_workers = WORKERS;
    setup.body = body;
    setup.ctx = &s;
    setup.processes = processes;
    s.config = setup.config;
    snprintf(s.address, sizeof(s.address), "127.0.0.1:%d", tap_free_port());
    if (are_processes || ok(ep_world_create(&s.world, RANKS) == EP_OK, "a second world")) {
        ok(world_run(&setup) == 0, "%s, %s", name, are_processes ? "processes" : "threads");
    }
    ep_world_destroy(&s.world);
    for (int i = 0; i < 2; i++) {
        trial_free(&s.t[i]);
        case_free(&s.c[i]);
    }
}

int main(void) {
    gpu_only();
    uint64_t seed = tap_seed();

    tap_deadline(180);
    for (int processes = 0; processes < gpu_ways(); processes++) {
        run(seed, two_handles, processes, "two handles on two streams");
        run(seed + 10, alternately, processes, "one handle on two streams alternately");
        run(seed + 20, two_groups, processes, "two groups in flight");
        run(seed + 30, two_threads, processes, "two groups, each by its thread");
        run(seed + 40, routing_beside, processes, "a handle routed beside operations");
        run(seed + 60, spoilt_capture, processes, "a stream whose capture was spoilt");
        run(seed + 50, after_another, processes, "a handle after one that left work behind");
    }
    return done_testing();
}
