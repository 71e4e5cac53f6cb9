/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * ep_group_stats: operations, rows and bytes are those of the reference, summed over all that
 * the group has done; times only grow. They may be asked for at any time.
 */
#include <stdatomic.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define DISPATCHES 3
#define COMBINES 2 /* after each dispatch */
#define REFUSED 50

/* Rows this rank sends to others (or to itself) in one dispatch, and has answered. */
static uint64_t rows_to(const struct trial *t, int rank, bool self) {
    uint64_t n = 0;

    for (int r = 0; r < t->c->num_ranks; r++) {
        for (int64_t i = 0; (r == rank) == self && i < t->c->in[rank].num_tokens; i++) {
            n += ref_goes_to(&t->c->problem, rank, i, r);
        }
    }
    return n;
}

/* Rows this rank receives from others. */
static uint64_t rows_from(const struct trial *t, int rank) {
    uint64_t n = 0;

    for (int r = 0; r < t->c->num_ranks; r++) {
        n += r == rank ? 0 : (uint64_t)t->recv[rank].rows_per_source[r];
    }
    return n;
}

static void check(struct world *w, const struct trial *t) {
    const uint64_t row = t->c->problem.row_bytes, answer = (uint64_t)t->hidden * 2;
    const uint64_t away = rows_to(t, w->rank, false), self = rows_to(t, w->rank, true);
    const uint64_t from = rows_from(t, w->rank);
    const uint64_t n = DISPATCHES, m = DISPATCHES * COMBINES;
    struct ep_group_stats s = EP_GROUP_STATS_INIT;

    world_is(w, ep_group_stats(w->group, &s), EP_OK, "ep_group_stats");
    world_check(w, s.num_dispatches == n && s.num_combines == m,
                "%llu dispatches, %llu combines", (unsigned long long)s.num_dispatches,
                (unsigned long long)s.num_combines);
    world_check(w, s.rows_sent == n * (away + self), "rows_sent %llu",
                (unsigned long long)s.rows_sent);
    world_check(w, s.rows_received == n * (from + self), "rows_received %llu",
                (unsigned long long)s.rows_received);
    world_check(w, s.remote_bytes_sent == n * away * row + m * from * answer,
                "remote_bytes_sent %llu, not %llu", (unsigned long long)s.remote_bytes_sent,
                (unsigned long long)(n * away * row + m * from * answer));
    world_check(w, s.local_bytes_sent == n * self * row + m * self * answer,
                "local_bytes_sent %llu, not %llu", (unsigned long long)s.local_bytes_sent,
                (unsigned long long)(n * self * row + m * self * answer));
    world_check(w, s.dispatch_ns > 0 && s.combine_ns > 0, "no time was spent");
}

static void body(struct world *w) {
    const struct trial *t = w->ctx;
    struct ep_group_stats before = EP_GROUP_STATS_INIT;
    ep_handle *handle = NULL;
    struct run r;

    world_is(w, ep_group_stats(w->group, &before), EP_OK, "ep_group_stats");
    world_check(w, before.num_dispatches == 0 && before.rows_sent == 0 && before.wait_ns == 0,
                "a new group has done something");
    run_create(&r, w, t);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    for (int i = 0; i < DISPATCHES; i++) {
        world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "ep_dispatch");
        for (int j = 0; j < COMBINES; j++) {
            world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine");
        }
    }
    check(w, t);
    ep_handle_destroy(&handle);
    run_free(&r);
}

/* ---- while operations are refused ----------------------------------------------------------- */

static void await_flag(void *arg) {
    while (!atomic_load((atomic_int *)arg)) {
        tap_sleep_ms(1);
    }
}

static void set_flag(void *arg) {
    atomic_store((atomic_int *)arg, 1);
}

/* Statistics are asked for while the stream's thread ends what it may not run any more: it does not
 * count, and the words may be read at any time (ThreadSanitizer looks). */
static void refused(struct world *w) {
    atomic_int go = 0, done = 0;
    struct ep_group_stats s = EP_GROUP_STATS_INIT;
    ep_handle *handle = NULL;
    ep_stream *stream = NULL;
    struct run r;

    run_create(&r, w, w->ctx);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    world_is(w, ep_stream_create(&stream, w->group), EP_OK, "ep_stream_create");
    world_is(w, ep_stream_run(stream, await_flag, &go), EP_OK, "ep_stream_run");
    for (int i = 0; i < REFUSED; i++) {
        world_is(w, run_dispatch(&r, handle, stream), EP_OK, "ep_dispatch");
    }
    world_is(w, ep_stream_run(stream, set_flag, &done), EP_OK, "ep_stream_run");
    world_is(w, ep_group_abort(w->group), EP_OK, "ep_group_abort");
    set_flag(&go);
    while (!atomic_load(&done)) {
        world_is(w, ep_group_stats(w->group, &s), EP_OK, "ep_group_stats");
    }
    world_is(w, ep_group_stats(w->group, &s), EP_OK, "ep_group_stats");
    world_check(w, s.num_dispatches == 0 && s.rows_sent == 0, "%llu dispatches",
                (unsigned long long)s.num_dispatches);
    world_is(w, ep_stream_sync(stream), EP_ERR_INTERRUPTED, "ep_stream_sync");
    ep_stream_destroy(&stream);
    ep_handle_destroy(&handle);
    run_free(&r);
}

static void check_refused(uint64_t seed) {
    const struct form form = {.id_dtype = EP_I32};
    struct test_case c;
    struct trial t;
    struct world_setup s;

    if (gpu_wanted()) {
        skip(1, "streams of host groups");
        return;
    }
    case_default(&c, 1, seed);
    case_build(&c);
    trial_init(&t, &c);
    trial_form(&t, &form);
    trial_build(&t);
    trial_setup(&s, &t);
    s.body = refused;
    ok(world_run(&s) == 0, "asked for while operations are refused");
    trial_free(&t);
    case_free(&c);
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();

    tap_deadline(60);
    for (int i = 0; i < 4; i++) {
        const struct form form = {
            .expanded = i % 2, .arena = i / 2, .id_dtype = EP_I64, .num_workers = i};
        struct test_case c;
        struct trial t;
        struct world_setup s;

        case_default(&c, 4, seed + (uint64_t)i);
        case_build(&c);
        trial_init(&t, &c);
        trial_form(&t, &form);
        trial_build(&t);
        trial_setup(&s, &t);
        s.config.num_workers = 1 + i;
        s.processes = i == 2;
        s.body = body;
        ok(world_run(&s) == 0, "%s, %d workers", form.expanded ? "expanded" : "compact", 1 + i);
        trial_free(&t);
        case_free(&c);
    }
    check_refused(seed + 4);
    return done_testing();
}
