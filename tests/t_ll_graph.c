/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Low-latency operations captured in CUDA graphs: with an odd number of operations of a kind, in halves
 * with other operations between, replayed many times, in turn with each other and with eager calls, and
 * several behind each other. Replays that are out of order are refused by the device's own counters:
 * they write nothing, and the group goes on.
 */
#include <stdio.h>
#include <string.h>

#include "src/cu/driver.h"
#include "src/ep/args.h"
#include "tests/graph.h"
#include "tests/ll.h"
#include "tests/stage.h"
#include "tests/tap.h"

#define RANKS 3
#define TURNS 24

/* A step whose tensors have images at addresses that stay. */
struct live {
    struct ll_run run;
    struct ep_ll_dispatch_args dispatch;
    struct ep_ll_combine_args combine;
    int64_t waits[RANKS];
    struct ep_tensor wait_ns;
    struct stage stage;
};

struct scene {
    struct world *w;
    struct live l[LL_STEPS];
    void *stream;
};

static void live_create(struct live *l, struct world *w, const struct ll_step *s) {
    uint64_t arena;
    size_t arena_bytes;

    ll_create(&l->run, w, s);
    l->dispatch = l->run.dispatch;
    l->combine = l->run.combine;
    ep_tensor_1d(&l->wait_ns, EP_I64, l->waits, RANKS);
    l->dispatch.wait_ns = &l->wait_ns;
    call_arena(w->group, &arena, &arena_bytes);
    stage_begin(&l->stage, call_gpu(w->group), arena, arena_bytes);
    stage_all(&l->stage, &epi_ll_dispatch_rules, &l->dispatch, 0);
    stage_all(&l->stage, &epi_ll_combine_rules, &l->combine, 0);
    stage_lay(&l->stage);
}

/* Outputs are poisoned, handles too. */
static void renew(struct live *l) {
    for (int i = 0; i < LL_OUTPUTS; i++) {
        memset(l->run.got[i], 0xA5, l->run.bytes[i]);
    }
    stage_copy_in(&l->stage);
}

/* What is on the device, when all that is queued has run. */
static void fetch(struct scene *s, struct live *l) {
    stage_copy_out(&l->stage, s->stream);
    world_is(s->w, call_stream_sync(s->w->group, s->stream), EP_OK, "waiting");
    world_is(s->w, stage_check(&l->stage), EP_OK, "what was written");
}

static void check_all(struct scene *s, struct live *l, int dispatches) {
    fetch(s, l);
    ll_expect(&l->run, dispatches);
    ll_check_dispatch(&l->run);
    ll_check_combine(&l->run);
}

/* ---- calls, captured or not ----------------------------------------------------------------- */

static void dispatch(struct scene *s, int step, enum call_half half) {
    world_is(s->w, plain_ll_dispatch(s->w->group, &s->l[step].dispatch, half, s->stream), EP_OK,
             "dispatch");
}

static void combine(struct scene *s, int step, enum call_half half) {
    world_is(s->w, plain_ll_combine(s->w->group, &s->l[step].combine, half, s->stream), EP_OK,
             "combine");
}

/* One operation of each kind. */
static void whole(struct scene *s) {
    dispatch(s, 0, CALL_BOTH);
    combine(s, 0, CALL_BOTH);
}

/* Halves, with whole operations of another step between; three combines. */
static void halves(struct scene *s) {
    dispatch(s, 1, CALL_SEND);
    dispatch(s, 2, CALL_BOTH);
    dispatch(s, 1, CALL_RECV);
    combine(s, 1, CALL_SEND);
    combine(s, 2, CALL_BOTH);
    combine(s, 1, CALL_RECV);
    combine(s, 1, CALL_BOTH);
}

/* Two in flight, received in the other order. */
static void eager(struct scene *s) {
    dispatch(s, 3, CALL_SEND);
    dispatch(s, 0, CALL_SEND);
    dispatch(s, 0, CALL_RECV);
    dispatch(s, 3, CALL_RECV);
    combine(s, 0, CALL_BOTH);
    combine(s, 3, CALL_BOTH);
}

static void send_0(struct scene *s) {
    dispatch(s, 0, CALL_SEND);
}

static void send_1(struct scene *s) {
    dispatch(s, 1, CALL_SEND);
}

static void send_2(struct scene *s) {
    dispatch(s, 2, CALL_SEND);
}

static void receive_0(struct scene *s) {
    dispatch(s, 0, CALL_RECV);
}

static void receive_1(struct scene *s) {
    dispatch(s, 1, CALL_RECV);
}

static void combine_0(struct scene *s) {
    combine(s, 0, CALL_BOTH);
}

static bool capture(struct scene *s, void (*calls)(struct scene *), struct graph *g) {
    *g = (struct graph){NULL, NULL};
    if (!graph_begin(s->w, s->stream)) {
        return false;
    }
    calls(s);
    return graph_end(s->w, s->stream, g);
}

/* ---- legal replays -------------------------------------------------------------------------- */

/* Replays add how long they have waited. */
static void late(struct scene *s, const struct graph *g) {
    for (int i = 0; i < 2; i++) {
        const int64_t before = s->l[0].waits[1];
        tap_sleep_ms(s->w->rank == 1 ? 100 : 0);
        graph_launch(s->w, g, s->stream);
        fetch(s, &s->l[0]);
        world_check(s->w, s->w->rank == 1 || s->l[0].waits[1] - before > 20000000,
                    "%lld ns for a rank that was late by 100 ms",
                    (long long)(s->l[0].waits[1] - before));
    }
}

static void turns(struct scene *s) {
    const struct ll_steps *all = s->w->ctx;
    uint64_t state = all->seed; /* the same on all ranks */
    struct graph a, b;

    if (capture(s, whole, &a) && capture(s, halves, &b)) {
        for (int i = 0; i < TURNS; i++) {
            const int what = (int)case_rand(&state, 4), times = 1 + (int)case_rand(&state, 3);
            for (int j = 0; j < LL_STEPS; j++) {
                renew(&s->l[j]);
            }
            for (int j = 0; j < times; j++) {
                if (what != 1) {
                    graph_launch(s->w, &a, s->stream);
                }
                if (what == 1 || what == 2) {
                    graph_launch(s->w, &b, s->stream);
                }
            }
            if (what == 3) {
                eager(s);
                check_all(s, &s->l[3], 1);
            }
            if (what != 1) {
                check_all(s, &s->l[0], times + (what == 3));
            }
            if (what == 1 || what == 2) {
                check_all(s, &s->l[1], times);
                check_all(s, &s->l[2], times);
            }
            if (!world_is(s->w, ep_ll_status(s->w->group), EP_OK, "ep_ll_status")) {
                diag("turn %d of kind %d, %d times", i, what, times);
                break;
            }
        }
        late(s, &a);
    }
    graph_destroy(s->w, &a);
    graph_destroy(s->w, &b);
}

/* ---- replays that are out of order ---------------------------------------------------------- */

enum { SEND_0, SEND_1, SEND_2, RECEIVE_0, RECEIVE_1, COMBINE_0, WHOLE, NUM_GRAPHS };

/* NULL: it is legal. Else it is refused once, and nothing was written to the step's tensors. */
static void replay(struct scene *s, const struct graph *g, int step, const char *words) {
    struct live *l = &s->l[step];
    struct pool pool = {0};
    uint8_t *before[LL_OUTPUTS];

    fetch(s, l);
    for (int i = 0; words && i < LL_OUTPUTS; i++) {
        before[i] = pool_zero(&pool, l->run.bytes[i]);
        memcpy(before[i], l->run.got[i], l->run.bytes[i]);
    }
    graph_launch(s->w, g, s->stream);
    fetch(s, l);
    if (words) {
        world_fails(s->w, ep_ll_status(s->w->group), EP_ERR_STATE, words, "a wrong replay");
    }
    world_is(s->w, ep_ll_status(s->w->group), EP_OK, "told once, if at all");
    for (int i = 0; words && i < LL_OUTPUTS; i++) {
        world_check(s->w, memcmp(before[i], l->run.got[i], l->run.bytes[i]) == 0,
                    "%s: output %d was written", words, i);
    }
    pool_free(&pool);
}

static void wrong_order(struct scene *s, const struct graph g[NUM_GRAPHS]) {
    replay(s, &g[RECEIVE_0], 0, "was not sent");
    replay(s, &g[COMBINE_0], 0, "no dispatch");
    replay(s, &g[SEND_0], 0, NULL);
    replay(s, &g[COMBINE_0], 0, "no dispatch");
    replay(s, &g[SEND_1], 1, NULL);
    replay(s, &g[SEND_2], 2, "two operations");
    replay(s, &g[SEND_0], 0, "two operations"); /* the handle stays that of the first send */
    replay(s, &g[RECEIVE_1], 1, NULL);
    ll_check_dispatch(&s->l[1].run);
    replay(s, &g[RECEIVE_1], 1, "has been received");
    replay(s, &g[SEND_2], 2, "two operations");
    replay(s, &g[RECEIVE_0], 0, NULL);
    ll_check_dispatch(&s->l[0].run);
    replay(s, &g[COMBINE_0], 0, NULL);
    ll_check_combine(&s->l[0].run);
    replay(s, &g[RECEIVE_0], 0, "has been received");
}

static void out_of_order(struct scene *s) {
    void (*const calls[NUM_GRAPHS])(struct scene *) = {send_0,    send_1,    send_2, receive_0,
                                                       receive_1, combine_0, whole};
    struct graph g[NUM_GRAPHS];
    bool good = true;

    for (int i = 0; i < NUM_GRAPHS; i++) {
        good = capture(s, calls[i], &g[i]) && good;
    }
    for (int i = 0; good && i < 2; i++) { /* from even and from odd numbers */
        for (int j = 0; j < LL_STEPS; j++) {
            renew(&s->l[j]);
        }
        wrong_order(s, g);
        renew(&s->l[0]);
        graph_launch(s->w, &g[WHOLE], s->stream);
        check_all(s, &s->l[0], 1);
    }
    for (int i = 0; i < NUM_GRAPHS; i++) {
        graph_destroy(s->w, &g[i]);
    }
}

/* ---- the test ------------------------------------------------------------------------------- */

static void in_scene(struct world *w, void (*body)(struct scene *)) {
    const struct ll_steps *all = w->ctx;
    struct pool pool = {0};
    struct scene *s = pool_zero(&pool, sizeof(*s));

    s->w = w;
    for (int i = 0; i < LL_STEPS; i++) {
        live_create(&s->l[i], w, &all->s[i]);
    }
    world_is(w, call_stream_create(&s->stream, w->group), EP_OK, "a stream");
    if (world_is(w, epi_cu_enter(&call_gpu(w->group)->device), EP_OK, "the device's context")) {
        body(s);
        epi_cu_leave();
    }
    call_stream_destroy(w->group, &s->stream);
    for (int i = 0; i < LL_STEPS; i++) {
        stage_end(&s->l[i].stage);
        ll_destroy(&s->l[i].run);
    }
    pool_free(&pool);
}

static void legal_body(struct world *w) {
    in_scene(w, turns);
}

static void illegal_body(struct world *w) {
    in_scene(w, out_of_order);
}

static void run(struct ll_steps *all, void (*body)(struct world *), bool processes,
                const char *name) {
    struct world_setup w;

    ll_steps_setup(&w, all, body);
    w.processes = processes;
    ok(world_run(&w) == 0, "%s, %s", name, gpu_processes(processes) ? "processes" : "threads");
}

int main(void) {
    gpu_only();
    struct ll_steps all;

    tap_deadline(180);
    ll_steps_build(&all, RANKS, tap_seed());
    run(&all, legal_body, false, "two graphs and eager calls in turn");
    run(&all, legal_body, true, "two graphs and eager calls in turn");
    run(&all, illegal_body, false, "replays that are out of order are refused");
    ll_steps_free(&all);
    return done_testing();
}
