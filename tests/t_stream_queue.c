/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * What is queued on a stream is never waited for by whoever queues it, however much there is; and a
 * function that a stream runs is not left to wait for its own end.
 */
#include <stdatomic.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define MANY 1000
#define BATCHES 60 /* of a layer, each of four pieces of work */

static void wait_for_gate(void *arg) {
    atomic_int *gate = arg;

    while (!atomic_load(gate)) {
        tap_sleep_ms(1);
    }
}

static void count(void *arg) {
    ++*(int *)arg; /* a race if two ran at once */
}

/* Calls, records and waits behind a function that waits for the thread that queues them. */
static void much_is_queued(struct world *w) {
    atomic_int gate = 0;
    int ran = 0;
    ep_stream *stream = NULL;
    ep_event *event = NULL;

    world_is(w, ep_stream_create(&stream, w->group), EP_OK, "ep_stream_create");
    world_is(w, ep_event_create(&event, w->group), EP_OK, "ep_event_create");
    for (int round = 0; round < 2; round++) {
        atomic_store(&gate, 0);
        world_is(w, ep_stream_run(stream, wait_for_gate, &gate), EP_OK, "ep_stream_run");
        for (int i = 0; i < MANY; i++) {
            world_is(w, ep_stream_run(stream, count, &ran), EP_OK, "ep_stream_run");
            world_is(w, ep_event_record(event, stream), EP_OK, "ep_event_record");
            world_is(w, ep_stream_wait(stream, event), EP_OK, "ep_stream_wait");
        }
        world_check(w, ran == round * MANY, "%d have run before the gate was opened", ran);
        atomic_store(&gate, 1);
        world_is(w, ep_event_sync(event), EP_OK, "ep_event_sync");
        world_is(w, ep_stream_sync(stream), EP_OK, "ep_stream_sync");
        world_check(w, ran == (round + 1) * MANY, "%d have run", ran);
    }
    ep_event_destroy(&event);
    ep_stream_destroy(&stream);
}

/* One rank's world for the thread of the other. */
static struct world *_Atomic second;
static atomic_int is_done;

/* Rank 0's thread queues all of its own micro-batches and then all of rank 1's. */
static void one_thread_drives_two_ranks(struct world *w) {
    const struct trial *t = w->ctx;
    struct world *of[2] = {w, NULL};
    struct run r[2];
    ep_handle *handle[2] = {NULL, NULL};
    ep_stream *stream[2] = {NULL, NULL};

    if (w->rank == 1) {
        atomic_store(&second, w);
        wait_for_gate(&is_done);
        return;
    }
    while (!(of[1] = atomic_load(&second))) {
        tap_sleep_ms(1);
    }
    for (int i = 0; i < 2; i++) {
        run_create(&r[i], of[i], t);
        world_is(of[i], ep_handle_create(&handle[i], of[i]->group, NULL), EP_OK, "a handle");
        world_is(of[i], ep_stream_create(&stream[i], of[i]->group), EP_OK, "a stream");
    }
    for (int i = 0; i < 2; i++) {
        for (int n = 0; n < BATCHES; n++) {
            world_is(of[i], run_route(&r[i], handle[i], stream[i]), EP_OK, "route");
            world_is(of[i], ep_dispatch(handle[i], &r[i].dispatch, stream[i]), EP_OK,
                     "dispatch");
            world_is(of[i], ep_dispatch(handle[i], &r[i].dispatch, stream[i]), EP_OK, "cached");
            world_is(of[i], ep_combine(handle[i], &r[i].combine, stream[i]), EP_OK, "combine");
        }
    }
    for (int i = 0; i < 2; i++) {
        world_is(of[i], ep_stream_sync(stream[i]), EP_OK, "ep_stream_sync");
        run_check_outputs(&r[i]);
        run_check_combine(&r[i]);
        ep_handle_destroy(&handle[i]);
        ep_stream_destroy(&stream[i]);
        run_free(&r[i]);
    }
    atomic_store(&is_done, 1);
}

/* What a function that the stream runs asks for, and what it was told. */
struct inside {
    ep_stream *stream;
    ep_event *before, *after;
    ep_handle *handle;
    ep_status of_sync, of_before, of_after;
    atomic_int gate, has_run;
};

static void from_within(void *arg) {
    struct inside *s = arg;

    wait_for_gate(&s->gate);
    s->of_sync = ep_stream_sync(s->stream);
    s->of_before = ep_event_sync(s->before);
    s->of_after = ep_event_sync(s->after);
    ep_handle_destroy(&s->handle); /* operations of it are queued behind */
    ep_stream_destroy(&s->stream);
}

static void note(void *arg) {
    atomic_store(&((struct inside *)arg)->has_run, 1);
}

/* All that is queued runs, in spite of what the first function did. */
static void a_stream_waits_for_itself(struct world *w) {
    struct inside s = {.stream = NULL};
    struct run r;
    ep_event *end = NULL;

    run_create(&r, w, w->ctx);
    world_is(w, ep_stream_create(&s.stream, w->group), EP_OK, "ep_stream_create");
    world_is(w, ep_handle_create(&s.handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, ep_event_create(&s.before, w->group), EP_OK, "ep_event_create");
    world_is(w, ep_event_create(&s.after, w->group), EP_OK, "ep_event_create");
    world_is(w, ep_event_create(&end, w->group), EP_OK, "ep_event_create");
    ep_event_record(s.before, s.stream);
    ep_stream_run(s.stream, from_within, &s);
    world_is(w, run_route(&r, s.handle, s.stream), EP_OK, "route");
    world_is(w, run_dispatch(&r, s.handle, s.stream), EP_OK, "dispatch");
    world_is(w, run_combine(&r, s.handle, s.stream), EP_OK, "combine");
    ep_event_record(s.after, s.stream);
    ep_stream_run(s.stream, note, &s);
    ep_event_record(end, s.stream);
    atomic_store(&s.gate, 1);
    world_is(w, ep_event_sync(end), EP_OK, "ep_event_sync");
    world_is(w, s.of_sync, EP_ERR_STATE, "ep_stream_sync of the own stream");
    world_is(w, s.of_before, EP_OK, "ep_event_sync of what is over");
    world_is(w, s.of_after, EP_ERR_STATE, "ep_event_sync of what comes later");
    world_check(w, atomic_load(&s.has_run) && !s.stream && !s.handle,
                "something queued did not run");
    run_check_outputs(&r);
    run_check_combine(&r);
    ep_event_destroy(&s.before);
    ep_event_destroy(&s.after);
    ep_event_destroy(&end);
    run_free(&r);
}

/* A handle may go while its operations are queued; the caller does not wait for them. */
static void a_handle_goes_before_its_work(struct world *w) {
    atomic_int gate = 0;
    ep_stream *stream = NULL;
    ep_handle *handle = NULL;
    struct run r;

    run_create(&r, w, w->ctx);
    world_is(w, ep_stream_create(&stream, w->group), EP_OK, "ep_stream_create");
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    ep_stream_run(stream, wait_for_gate, &gate);
    world_is(w, run_route(&r, handle, stream), EP_OK, "route");
    world_is(w, run_dispatch(&r, handle, stream), EP_OK, "dispatch");
    world_is(w, run_combine(&r, handle, stream), EP_OK, "combine");
    ep_handle_destroy(&handle);
    world_check(w, !handle, "the pointer is not cleared");
    atomic_store(&gate, 1);
    world_is(w, ep_stream_sync(stream), EP_OK, "ep_stream_sync");
    run_check_outputs(&r);
    run_check_combine(&r);
    ep_stream_destroy(&stream);
    run_free(&r);
}

static void run(uint64_t seed, void (*body)(struct world *w), const char *name) {
    static const struct form plain = {.id_dtype = EP_I64, .slack = 2};
    struct test_case c;

    case_default(&c, 2, seed);
    trial_with(&c, &plain, body, false, name);
}

int main(void) {
    gpu_never("ep_stream and ep_event");
    const uint64_t seed = tap_seed();

    tap_deadline(120);
    run(seed, much_is_queued, "thousands of pieces of work are queued at once");
    run(seed + 1, one_thread_drives_two_ranks, "one thread drives two ranks");
    run(seed + 2, a_stream_waits_for_itself, "a function waits for the stream that runs it");
    run(seed + 3, a_handle_goes_before_its_work, "a handle is destroyed before its work");
    return done_testing();
}
