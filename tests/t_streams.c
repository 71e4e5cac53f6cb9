/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Streams and events of a host group: a whole layer queued without waiting, two handles on two
 * streams, order between streams by events, and errors of queued work at the synchronisation.
 */
#include <stdatomic.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

/* Holds a stream back until the test opens the gate. */
static void wait_for_gate(void *arg) {
    atomic_int *gate = arg;

    while (!atomic_load(gate)) {
        tap_sleep_ms(1);
    }
}

struct expert {
    struct run *run;
    struct ep_tensor answers; /* the arena, in the combine's type */
};

/* The experts: writes the answers where the rows lie. */
static void compute(void *arg) {
    struct expert *e = arg;
    const struct trial *t = e->run->t;
    const size_t elem = ep_dtype_bytes((ep_dtype)t->dtype);
    const size_t bytes = (size_t)t->hidden * elem;

    run_check_rows(e->run, &e->run->view);
    for (int64_t i = 0; i < t->recv[e->run->w->rank].num_rows; i++) {
        memcpy((uint8_t *)e->answers.data + (size_t)(i * e->answers.stride[0]) * elem,
               t->answers[e->run->w->rank].x + (size_t)i * bytes, bytes);
    }
}

static void streams_create(struct world *w, ep_stream **stream, int n) {
    for (int i = 0; i < n; i++) {
        world_is(w, ep_stream_create(&stream[i], w->group), EP_OK, "ep_stream_create");
    }
}

/* Route, dispatch, experts, combine: all queued before any of it has run. */
static void a_layer_without_waiting(struct world *w) {
    const struct trial *t = w->ctx;
    atomic_int gate = 0;
    ep_stream *stream = NULL;
    ep_handle *handle = NULL;
    struct expert e = {.answers = EP_TENSOR_INIT};
    struct run r;

    run_create(&r, w, t);
    e.run = &r;
    streams_create(w, &stream, 1);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, ep_stream_run(stream, wait_for_gate, &gate), EP_OK, "ep_stream_run");
    world_is(w, run_route(&r, handle, stream), EP_OK, "ep_handle_route");
    for (int i = 0; i < 3; i++) {
        world_is(w, ep_dispatch(handle, &r.dispatch, stream), EP_OK, "ep_dispatch");
        world_is(w,
                 ep_handle_arena(handle, r.dispatch.flags & EP_DISPATCH_EXPANDED,
                                 (ep_dtype)t->dtype, t->hidden, &e.answers),
                 EP_OK, "ep_handle_arena");
        world_check(w, e.answers.shape[0] >= t->recv[w->rank].num_rows,
                    "the view is too short");
        e.answers.shape[0] = t->recv[w->rank].num_rows; /* as long as the top-k weights */
        world_is(w, ep_stream_run(stream, compute, &e), EP_OK, "ep_stream_run");
        r.combine.x = &e.answers;
        world_is(w, ep_combine(handle, &r.combine, stream), EP_OK, "ep_combine");
        atomic_store(&gate, 1);
        world_is(w, ep_stream_sync(stream), EP_OK, "ep_stream_sync");
        run_check_combine(&r);
        atomic_store(&gate, i == 0); /* the last round is held back again */
        world_is(w, ep_stream_run(stream, wait_for_gate, &gate), EP_OK, "ep_stream_run");
    }
    atomic_store(&gate, 1);
    ep_handle_destroy(&handle);
    ep_stream_destroy(&stream);
    world_check(w, !stream, "the stream's pointer is not NULL");
    run_free(&r);
}

/* Two micro-batches, each on a stream of its own, with the order of issue as the only tie. */
static void two_handles_on_two_streams(struct world *w) {
    struct run r[2];
    ep_stream *stream[2] = {NULL, NULL};
    ep_handle *handle[2] = {NULL, NULL};

    streams_create(w, stream, 2);
    for (int i = 0; i < 2; i++) {
        run_create(&r[i], w, w->ctx);
        world_is(w, ep_handle_create(&handle[i], w->group, NULL), EP_OK, "ep_handle_create");
        world_is(w, run_route(&r[i], handle[i], stream[i]), EP_OK, "ep_handle_route");
    }
    for (int n = 0; n < 6; n++) {
        world_is(w, run_dispatch(&r[0], handle[0], stream[0]), EP_OK, "ep_dispatch");
        world_is(w, run_dispatch(&r[1], handle[1], stream[1]), EP_OK, "ep_dispatch");
        world_is(w, run_combine(&r[1], handle[1], stream[1]), EP_OK, "ep_combine");
        world_is(w, run_combine(&r[0], handle[0], stream[0]), EP_OK, "ep_combine");
        for (int i = 0; i < 2; i++) {
            world_is(w, ep_stream_sync(stream[i]), EP_OK, "ep_stream_sync");
            run_check_dispatch(&r[i], handle[i]);
            run_check_combine(&r[i]);
        }
    }
    for (int i = 0; i < 2; i++) {
        ep_handle_destroy(&handle[i]);
        ep_stream_destroy(&stream[i]);
        run_free(&r[i]);
    }
}

static void append(void *arg) {
    int *list = arg; /* ordered by the streams and events alone: a race if they do not */
    const int n = ++list[0];

    list[n] = n;
}

static void append_ten(void *arg) {
    int *list = arg;

    list[++list[0]] = 10;
}

static void events(struct world *w) {
    atomic_int gate = 0;
    int list[16] = {0};
    ep_stream *stream[2] = {NULL, NULL};
    ep_event *event = NULL;

    streams_create(w, stream, 2);
    world_is(w, ep_event_create(&event, w->group), EP_OK, "ep_event_create");
    world_is(w, ep_event_query(event), EP_OK, "an unrecorded event has passed");
    world_is(w, ep_event_sync(event), EP_OK, "an unrecorded event is not waited for");
    world_is(w, ep_stream_wait(stream[0], event), EP_OK, "nor by a stream");
    ep_stream_run(stream[0], wait_for_gate, &gate);
    ep_stream_run(stream[0], append, list);
    world_is(w, ep_event_record(event, stream[0]), EP_OK, "ep_event_record");
    world_is(w, ep_stream_wait(stream[1], event), EP_OK, "ep_stream_wait");
    ep_stream_run(stream[1], append_ten, list);
    world_is(w, ep_event_query(event), EP_AGAIN, "an event behind a held stream");
    atomic_store(&gate, 1);
    world_is(w, ep_event_sync(event), EP_OK, "ep_event_sync");
    world_is(w, ep_event_query(event), EP_OK, "a passed event");
    world_is(w, ep_stream_sync(stream[1]), EP_OK, "ep_stream_sync");
    world_check(w, list[0] == 2 && list[1] == 1 && list[2] == 10, "order of the streams");
    /* The other way round, with the same event. */
    ep_stream_run(stream[1], append, list);
    ep_event_record(event, stream[1]);
    ep_stream_wait(stream[0], event);
    ep_stream_run(stream[0], append_ten, list);
    ep_event_record(event, stream[0]);
    world_is(w, ep_event_sync(event), EP_OK, "ep_event_sync");
    world_check(w, list[0] == 4 && list[3] == 3 && list[4] == 10, "order the other way round");
    ep_stream_run(stream[0], append, list);
    ep_event_destroy(&event);
    ep_stream_destroy(&stream[0]);
    world_check(w, list[0] == 5, "ep_stream_destroy waits for the work");
    ep_stream_destroy(&stream[1]);
    ep_stream_destroy(&stream[1]);
    ep_event_destroy(&event);
}

/* A bad id of one rank is its own error; the peers get the rows of its other selections. */
static void bad_id(struct world *w) {
    int64_t ids[3][2] = {{0, 1}, {2, w->rank == 1 ? 999 : 3}, {1, 0}};
    _Alignas(16) uint8_t x[3][64] = {{1}, {2}, {3}};
    struct ep_tensor ids_t, x_t;
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    atomic_int gate = 0;
    ep_stream *stream = NULL;
    ep_handle *handle = NULL;
    int32_t per_source[2] = {-1, -1};
    int64_t rows = -1;

    ep_tensor_2d(&ids_t, EP_I64, ids, 3, 2);
    ep_tensor_2d(&x_t, EP_U8, x, 3, 64);
    routing.topk_ids = &ids_t;
    args.x = &x_t;
    streams_create(w, &stream, 1);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    ep_stream_run(stream, wait_for_gate, &gate);
    world_is(w, ep_handle_route(handle, &routing, stream), EP_OK, "ep_handle_route");
    world_is(w, ep_dispatch(handle, &args, stream), EP_OK, "ep_dispatch");
    atomic_store(&gate, 1);
    if (w->rank == 1) {
        world_fails(w, ep_stream_sync(stream), EP_ERR_ARG, "999|token 1|k 1",
                    "a bad id, queued");
        world_is(w, ep_stream_sync(stream), EP_OK, "the error is returned once");
    } else {
        world_is(w, ep_stream_sync(stream), EP_OK, "a peer of the rank with the bad id");
        /* Experts 0 to 3 are on rank 0, 4 to 7 on rank 1: the rows are all here. */
        world_is(w, ep_handle_counts(handle, &rows, per_source, NULL), EP_OK, "counts");
        world_check(w, rows == 6 && per_source[0] == 3 && per_source[1] == 3,
                    "rows: %lld, %d and %d", (long long)rows, per_source[0], per_source[1]);
    }
    ep_handle_destroy(&handle);
    ep_stream_destroy(&stream);
}

/* Output that is too small is found by the queued work, and is this rank's error alone. */
static void small_output(struct world *w) {
    const struct trial *t = w->ctx;
    ep_stream *stream = NULL;
    ep_handle *handle = NULL;
    struct run r;

    run_create(&r, w, t);
    streams_create(w, &stream, 1);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, stream), EP_OK, "ep_handle_route");
    if (w->rank == 2) {
        struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
        struct ep_tensor x = *r.dispatch.recv_x;
        x.shape[0] = t->recv[2].num_rows - 1;
        args.x = r.dispatch.x;
        args.topk_weights = r.dispatch.topk_weights;
        args.recv_x = &x;
        world_is(w, ep_dispatch(handle, &args, stream), EP_OK, "ep_dispatch, queued");
        world_fails(w, ep_stream_sync(stream), EP_ERR_CAPACITY, "rows", "small output, queued");
    } else {
        world_is(w, run_dispatch(&r, handle, stream), EP_OK, "ep_dispatch");
        world_is(w, ep_stream_sync(stream), EP_OK, "ep_stream_sync");
        run_check_dispatch(&r, handle);
    }
    world_is(w, run_dispatch(&r, handle, stream), EP_OK, "ep_dispatch, large enough");
    world_is(w, run_combine(&r, handle, stream), EP_OK, "ep_combine");
    world_is(w, ep_stream_sync(stream), EP_OK, "ep_stream_sync");
    run_check_dispatch(&r, handle);
    run_check_combine(&r);
    ep_handle_destroy(&handle);
    ep_stream_destroy(&stream);
    run_free(&r);
}

static void run(uint64_t seed, const struct form *form, void (*body)(struct world *w),
                bool processes, const char *name) {
    struct test_case c;

    case_default(&c, 4, seed);
    c.tokens = TOKENS_MAX;
    trial_with(&c, form, body, processes, name);
}

int main(void) {
    gpu_never("ep_stream and ep_event");
    static const struct form plain = {.id_dtype = EP_I64, .slack = 2};
    static const struct form compact = {.arena = true, .id_dtype = EP_I64, .num_bias = 1};
    static const struct form expanded = {
        .arena = true, .expanded = true, .alignment = 4, .id_dtype = EP_I64};
    uint64_t seed = tap_seed();
    struct world_setup s;

    tap_deadline(120);
    run(seed, &compact, a_layer_without_waiting, false, "a layer without waiting");
    run(seed + 1, &expanded, a_layer_without_waiting, false, "the same, expanded");
    run(seed + 2, &expanded, a_layer_without_waiting, true, "the same, processes");
    run(seed + 3, &plain, two_handles_on_two_streams, false, "two handles on two streams");
    run(seed + 4, &plain, two_handles_on_two_streams, true, "the same, processes");
    run(seed + 5, &plain, events, false, "events");
    run(seed + 6, &plain, small_output, false, "small output is found by the queued work");
    world_defaults(&s, 2);
    s.body = bad_id;
    ok(world_run(&s) == 0, "a bad id is found by the queued work");
    return done_testing();
}
