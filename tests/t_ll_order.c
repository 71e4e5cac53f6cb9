/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Low-latency operations in any legal order: two micro-batches with halves, received in either order, of
 * other routings, shapes and maxima from round to round, on streams, with throughput operations and
 * delays between; and EP_TEST_PAIRS round trips that all differ, a few unless it is set. A rank that is
 * late is seen in the time that its peers have waited for it. And operations that are refused: they write
 * nothing, and the group goes on.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/ll.h"
#include "tests/tap.h"

#define RANKS 3
#define LATE 1 /* a rank */
#define LATE_MS 200

static void create_all(struct ll_run r[LL_STEPS], struct world *w) {
    const struct ll_steps *all = w->ctx;

    for (int i = 0; i < LL_STEPS; i++) {
        ll_create(&r[i], w, &all->s[i]);
    }
}

static void destroy_all(struct ll_run r[LL_STEPS]) {
    for (int i = 0; i < LL_STEPS; i++) {
        ll_destroy(&r[i]);
    }
}

/* ---- legal orders --------------------------------------------------------------------------- */

static void must(struct world *w, ep_status st, const char *what) {
    world_is(w, st, EP_OK, what);
}

/* Two micro-batches, a and b; each rank receives in the order that it likes. */
static void two_batches(struct world *w, struct ll_run *a, struct ll_run *b, uint64_t *state) {
    const bool swap = case_rand(state, 2); /* the state is each rank's own */
    struct ll_run *first = swap ? b : a, *second = swap ? a : b;

    must(w, ll_dispatch(a, CALL_SEND, NULL), "send a");
    must(w, ll_dispatch(b, CALL_SEND, NULL), "send b");
    tap_sleep_ms((int)case_rand(state, 3));
    must(w, ll_dispatch(first, CALL_RECV, NULL), "receive");
    ll_check_dispatch(first);
    must(w, ll_dispatch(second, CALL_RECV, NULL), "receive");
    ll_check_dispatch(second);
    must(w, ll_combine(a, CALL_SEND, NULL), "send answers of a");
    if (case_rand(state, 2)) {
        must(w, ll_combine(a, CALL_RECV, NULL), "receive answers of a");
        ll_check_combine(a);
        must(w, ll_combine(b, CALL_BOTH, NULL), "answers of b");
        ll_check_combine(b);
        return;
    }
    must(w, ll_combine(b, CALL_SEND, NULL), "send answers of b");
    tap_sleep_ms((int)case_rand(state, 3));
    must(w, ll_combine(second, CALL_RECV, NULL), "receive answers");
    must(w, ll_combine(first, CALL_RECV, NULL), "receive answers");
    ll_check_combine(a);
    ll_check_combine(b);
}

static void rounds(struct world *w) {
    const struct ll_steps *all = w->ctx;
    uint64_t common = all->seed, own = all->seed + 17 * (uint64_t)(w->rank + 1);
    struct ll_run r[LL_STEPS];

    create_all(r, w);
    const int num = (tap_quick() ? 20 : 60) * tap_effort();
    for (int i = 0; i < num; i++) {
        const int a = (int)case_rand(&common, LL_STEPS);
        const int b = (a + 1 + (int)case_rand(&common, LL_STEPS - 1)) % LL_STEPS;
        if (case_rand(&common, 3) == 0) {
            ll_pass(&r[a], case_rand(&common, 2));
        } else {
            two_batches(w, &r[a], &r[b], &own);
        }
        if (case_rand(&common, 4) == 0) { /* again, of the same handle */
            must(w, ll_combine(&r[a], CALL_BOTH, NULL), "combine again");
            ll_check_combine(&r[a]);
        }
    }
    destroy_all(r);
}

/* Round trips with EP_TEST_PAIRS. */
static int num_changes(void) {
    const char *text = getenv("EP_TEST_PAIRS");
    return text ? atoi(text) : (tap_quick() ? 5 : 20) * tap_effort();
}

/* On one group, each of another routing, shape, maximum and form than the one before. */
static void changes(struct world *w) {
    const struct ll_steps *all = w->ctx;
    uint64_t common = all->seed + 1, own = all->seed + 29 * (uint64_t)(w->rank + 1);

    for (int i = 0; i < num_changes() && !w->bad; i++) {
        struct ll_step s;
        struct ll_run r;
        ll_init(&s, RANKS, tap_rand(&common));
        s.c.hidden = 128 * (1 + case_rand(&common, 5));
        s.c.max_tokens = 1 + (int)case_rand(&common, 16);
        s.max_tokens = s.c.max_tokens + (int)case_rand(&common, 4);
        s.c.topk = 2 + (int)case_rand(&common, 3);
        s.c.routing = (enum case_routing)case_rand(&common, NUM_ROUTINGS);
        s.c.tokens = (enum case_tokens)case_rand(&common, NUM_TOKENS);
        s.flags = (case_rand(&common, 2) ? EP_LL_FP8 : 0) |
                  (case_rand(&common, 3) ? 0 : EP_LL_COMPACT);
        s.weights_now = !(s.flags & EP_LL_COMPACT) && case_rand(&common, 2);
        s.exact = !(s.flags & EP_LL_COMPACT) && case_rand(&common, 2);
        ll_build(&s);
        ll_create(&r, w, &s);
        tap_sleep_ms((int)case_rand(&own, 64) / 60);
        ll_pass(&r, case_rand(&common, 2));
        ll_destroy(&r);
        ll_free(&s);
    }
}

/* A throughput operation between the halves, which not all ranks have at the same place. */
static void between(struct world *w) {
    const struct ll_steps *all = w->ctx;
    const struct test_case *c = &all->s[2].c;
    struct ep_routing routing;
    ep_handle *h = NULL;
    struct ll_run r[LL_STEPS];
    struct ep_dispatch_args d = EP_DISPATCH_ARGS_INIT;

    create_all(r, w);
    must(w, ep_handle_create(&h, w->group, NULL), "ep_handle_create");
    case_routing(c, w->rank, &routing);
    must(w, call_route(h, &routing, NULL), "route");
    d.flags = EP_DISPATCH_ARENA;
    d.x = &c->x[w->rank];
    for (int i = 0; i < 6; i++) {
        must(w, ll_dispatch(&r[0], CALL_SEND, NULL), "send");
        if (w->rank == 1) {
            must(w, ll_dispatch(&r[0], CALL_RECV, NULL), "receive");
        }
        must(w, call_dispatch(h, &d, NULL), "throughput dispatch");
        if (w->rank != 1) {
            must(w, ll_dispatch(&r[0], CALL_RECV, NULL), "receive");
        }
        ll_check_dispatch(&r[0]);
        must(w, ll_combine(&r[0], CALL_BOTH, NULL), "combine");
        ll_check_combine(&r[0]);
    }
    ep_handle_destroy(&h);
    destroy_all(r);
}

/* Halves on streams of their own. */
static void streams(struct world *w) {
    struct ll_run r[LL_STEPS];
    void *s[2];

    create_all(r, w);
    for (int i = 0; i < 2; i++) {
        must(w, call_stream_create(&s[i], w->group), "stream");
    }
    for (int i = 0; i < 8; i++) {
        struct ll_run *a = &r[i % LL_STEPS];
        must(w, ll_dispatch(a, CALL_SEND, s[i % 2]), "send");
        must(w, call_stream_sync(w->group, s[i % 2]), "sync");
        must(w, ll_dispatch(a, CALL_RECV, s[1 - i % 2]), "receive");
        must(w, call_stream_sync(w->group, s[1 - i % 2]), "sync");
        ll_check_dispatch(a);
        must(w, ll_combine(a, CALL_BOTH, s[i % 2]), "combine");
        must(w, call_stream_sync(w->group, s[i % 2]), "sync");
        ll_check_combine(a);
    }
    for (int i = 0; i < 2; i++) {
        call_stream_destroy(w->group, &s[i]);
    }
    destroy_all(r);
}

/* ---- how long was waited -------------------------------------------------------------------- */

static atomic_int *num_sent; /* by ranks that are not late; all processes share it */

/* Until the ranks that are not late have come so far `num` times, and then, if it is this one, longer. */
static void await_others(struct world *w, int num) {
    while (atomic_load(num_sent) < num * (RANKS - 1)) {
        tap_sleep_ms(1);
    }
    tap_sleep_ms(w->rank == LATE ? LATE_MS : 0);
}

/* An operation in which a rank sends after all others have, which then receive: nobody has waited for
 * them, not even the one that is late. */
static void with_late(struct ll_run *r,
                      ep_status (*op)(struct ll_run *, enum call_half, void *), int num,
                      const int64_t waits[RANKS], int64_t *received_ns) {
    struct world *w = r->w;
    if (w->rank != LATE) {
        must(w, op(r, CALL_SEND, NULL), "send");
        atomic_fetch_add(num_sent, 1);
    }
    await_others(w, num);
    if (w->rank == LATE) {
        must(w, op(r, CALL_SEND, NULL), "send late");
    }
    const double start = tap_now();
    must(w, op(r, CALL_RECV, NULL), "receive");
    *received_ns += (int64_t)(1e9 * (tap_now() - start)) + 1000;
    for (int p = 0; p < RANKS; p++) {
        const bool late = p == LATE && w->rank != LATE;
        world_check(w, late ? waits[p] <= *received_ns : waits[p] == 0,
                    "%lld ns for rank %d, after receives of %lld ns", (long long)waits[p], p,
                    (long long)*received_ns);
    }
}

static void waits(struct world *w) {
    int64_t waited[3][RANKS] = {{0}}, received[2] = {0};
    struct ep_tensor t[3];
    struct ll_run r[LL_STEPS];

    create_all(r, w);
    for (int i = 0; i < 3; i++) {
        ep_tensor_1d(&t[i], EP_I64, waited[i], RANKS);
    }
    r[0].dispatch.wait_ns = &t[0];
    r[0].combine.wait_ns = &t[1];
    r[3].combine.wait_ns = &t[2];
    for (int i = 0; i < 4; i++) { /* of each kind two, which add */
        with_late(&r[0], i % 2 ? ll_combine : ll_dispatch, i + 1, waited[i % 2],
                  &received[i % 2]);
    }
    /* Where a combine brings weights, others need them to send. */
    must(w, ll_dispatch(&r[3], CALL_BOTH, NULL), "dispatch");
    atomic_fetch_add(num_sent, w->rank != LATE);
    await_others(w, 5);
    const double start = tap_now();
    must(w, ll_combine(&r[3], CALL_BOTH, NULL), "combine");
    const bool waited_for =
        tap_now() - start > LATE_MS / 1e3 / 2; /* unless it was late itself */
    for (int i = 0; i < 2 + waited_for && w->rank != LATE; i++) {
        world_check(w, waited[i][LATE] > LATE_MS * 1000000 / 5,
                    "operation %d: %lld ns for rank %d, which was late by %d ms", i,
                    (long long)waited[i][LATE], LATE, LATE_MS);
    }
    destroy_all(r);
}

/* ---- what is refused ------------------------------------------------------------------------ */

static void refused(struct world *w, ep_status st, const char *words, const char *what) {
    world_fails(w, st, EP_ERR_STATE, words, what);
}

/* Nothing was written since the outputs were poisoned. */
static void untouched(struct ll_run *r, int from, int to) {
    for (int i = from; i <= to; i++) {
        for (size_t b = 0; b < r->bytes[i]; b++) {
            if (r->got[i][b] != 0xA5) {
                world_check(r->w, false, "output %d was written", i);
                break;
            }
        }
    }
}

static void illegal(struct world *w) {
    struct ll_run r[LL_STEPS];

    create_all(r, w);
    refused(w, ll_dispatch(&r[0], CALL_RECV, NULL), "was not sent", "receive before send");
    refused(w, ll_combine(&r[0], CALL_BOTH, NULL), "no dispatch", "combine before dispatch");
    must(w, ll_dispatch(&r[0], CALL_SEND, NULL), "send 1");
    refused(w, ll_combine(&r[0], CALL_BOTH, NULL), "no dispatch", "combine before receive");
    must(w, ll_dispatch(&r[1], CALL_SEND, NULL), "send 2");
    refused(w, ll_dispatch(&r[2], CALL_SEND, NULL), "two operations", "a third send");
    refused(w, ll_dispatch(&r[2], CALL_BOTH, NULL), "two operations", "a third call");
    untouched(&r[2], LL_X, LL_HANDLE);
    must(w, ll_dispatch(&r[1], CALL_RECV, NULL), "receive 2");
    refused(w, ll_dispatch(&r[2], CALL_SEND, NULL), "two operations", "the older is in flight");
    ll_check_dispatch(&r[1]);
    refused(w, ll_dispatch(&r[1], CALL_RECV, NULL), "has been received", "a second receive");
    ll_check_dispatch(&r[1]);
    must(w, ll_dispatch(&r[0], CALL_RECV, NULL), "receive 1");
    ll_check_dispatch(&r[0]);
    refused(w, ll_combine(&r[0], CALL_RECV, NULL), "was not sent", "answers before their send");
    must(w, ll_combine(&r[0], CALL_BOTH, NULL), "combine");
    ll_check_combine(&r[0]);
    r[1].combine.max_tokens++; /* another shape than the handle's */
    r[1].answers.shape[0] =
        (int64_t)RANKS * r[1].combine.max_tokens * ep_group_num_local_experts(w->group);
    r[1].answers.stride[0] = 0;
    world_fails(w, ll_combine(&r[1], CALL_BOTH, NULL), EP_ERR_ARG, "x", "rows that overlap");
    r[1].combine.max_tokens--;
    r[1].answers.shape[0] = r[1].t[LL_X].shape[0];
    r[1].answers.stride[0] = r[1].s->c.hidden;
    must(w, ll_combine(&r[1], CALL_BOTH, NULL), "combine");
    ll_check_combine(&r[1]);
    ll_pass(&r[3], true);
    destroy_all(r);
}

static void run(struct ll_steps *all, void (*body)(struct world *), bool processes,
                const char *name) {
    struct world_setup w;

    ll_steps_setup(&w, all, body);
    w.processes = processes;
    w.config.num_workers = gpu_wanted() ? 0 : 4; /* blocks of several warps */
    ok(world_run(&w) == 0, "%s", name);
}

int main(void) {
    gpu_program();
    struct ll_steps all;

    tap_deadline(180 + num_changes() / 50);
    num_sent = tap_shared(sizeof(*num_sent));
    ll_steps_build(&all, RANKS, tap_seed());
    run(&all, rounds, false, "random rounds of two micro-batches, threads");
    run(&all, rounds, true, "random rounds of two micro-batches, processes");
    run(&all, changes, false, "another routing, shape and form with every round trip");
    run(&all, between, false, "throughput operations between the halves");
    run(&all, streams, false, "halves on two streams");
    run(&all, waits, false, "waits are told, of the rank that was late and no other");
    run(&all, illegal, false, "what is out of order is refused, and the group goes on");
    ll_steps_free(&all);
    return done_testing();
}
