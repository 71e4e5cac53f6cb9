/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * One group, made with maxima, serves routings of any number of experts held by any ranks, with other
 * top-k, rows and scales each time: handles side by side, and one handle routed again and again. What
 * a routing may not name is refused before the handle changes. Of maps that nobody uses any more few
 * are kept, however many were named.
 */
#include <stdatomic.h>
#include <string.h>

#include "src/cu/driver.h"
#include "src/ep/group.h"

#include "tests/calls.h"
#include "tests/graph.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 4
#define MANY 10

struct many {
    struct test_case c[MANY];
    struct trial t[MANY];
};

static int32_t larger(int32_t a, int32_t b) {
    return a > b ? a : b;
}

/* A group for all of them. */
static void setup(struct world_setup *s, const struct many *m) {
    trial_setup(s, &m->t[0]);
    s->config.expert_rank = NULL;
    s->config.mask_routing = 1;
    for (int i = 0; i < MANY; i++) {
        struct ep_group_config *c = &s->config;
        struct world_setup one;
        trial_setup(&one, &m->t[i]);
        for (int r = 0; r < RANKS; r++) {
            const int local = ref_num_local(&m->c[i].problem, r);
            c->num_experts = larger(c->num_experts, RANKS * local);
        }
        c->max_tokens = larger(c->max_tokens, one.config.max_tokens);
        c->max_topk = larger(c->max_topk, one.config.max_topk);
        c->max_row_bytes = larger(c->max_row_bytes, one.config.max_row_bytes);
        c->max_scale_bytes = larger(c->max_scale_bytes, one.config.max_scale_bytes);
        c->flags |= one.config.flags;
        c->max_expanded_rows = c->max_expanded_rows > one.config.max_expanded_rows
                                   ? c->max_expanded_rows
                                   : one.config.max_expanded_rows;
    }
}

/* Dispatched and combined again, from what it knows. */
static void again(struct world *w, const struct trial *t, ep_handle *h) {
    struct run r;

    run_create(&r, w, t);
    if (world_is(w, run_dispatch(&r, h, NULL), EP_OK, "ep_dispatch, cached")) {
        run_check_dispatch(&r, h);
    }
    if (world_is(w, run_combine(&r, h, NULL), EP_OK, "ep_combine, again")) {
        run_check_combine(&r);
    }
    run_free(&r);
}

static void refused(struct world *w, ep_handle *h) {
    static const int32_t bad[3] = {0, RANKS, 0};
    int32_t crowded[1024] = {0};
    int64_t id = 0;
    struct ep_tensor ids;
    struct ep_routing r = EP_ROUTING_INIT;
    const int most = ep_group_num_local_experts(w->group); /* of rank 0, which has most */

    ep_tensor_2d(&ids, EP_I64, &id, 1, 1);
    r.topk_ids = &ids;
    r.num_experts = -1;
    world_fails(w, call_route(h, &r, NULL), EP_ERR_ARG, "num_experts is -1|0..", "-1 experts");
    r.num_experts = 100000;
    world_fails(w, call_route(h, &r, NULL), EP_ERR_ARG, "num_experts is 100000|group",
                "more experts than the group's");
    r.num_experts = 0;
    r.expert_rank = bad;
    world_fails(w, call_route(h, &r, NULL), EP_ERR_ARG, "expert_rank is given|num_experts is 0",
                "a map without a number");
    r.num_experts = 3;
    world_fails(w, call_route(h, &r, NULL), EP_ERR_ARG, "expert_rank[1] is 4|0..3",
                "an expert of no rank");
    r.num_experts = most + 1;
    r.expert_rank = crowded;
    if (w->rank == 0) {
        world_fails(w, call_route(h, &r, NULL), EP_ERR_ARG, "gives rank 0|experts, at most",
                    "a rank with more experts than any has in the group's map");
    }
}

/* ---- maps come and go ----------------------------------------------------------------------- */

#define NUM_MAPS 40
#define NUM_EXPERTS (2 * RANKS)

/* A map that is none of the others, on all ranks the same: who has which two. */
static void make_map(uint64_t seed, int32_t map[NUM_EXPERTS]) {
    for (int e = 0; e < NUM_EXPERTS; e++) {
        const int other = (int)(tap_rand(&seed) % (uint64_t)(e + 1));
        map[e] = map[other];
        map[other] = e / 2;
    }
}

/* How many tables the group has, or how many of this map. */
static int num_tables(ep_group *g, const int32_t *map) {
    int num = 0;

    pthread_mutex_lock(&g->mutex);
    for (const struct epi_experts *e = g->experts; e; e = e->next) {
        num += !map || (e->num == NUM_EXPERTS && memcmp(e->table, map, 4 * NUM_EXPERTS) == 0);
    }
    pthread_mutex_unlock(&g->mutex);
    return num;
}

/* One handle is routed by one map after the other; `in_use` tables are somebody else's. */
static void churn(struct world *w, ep_handle *h, uint64_t seed, int in_use, void *stream) {
    int32_t map[NUM_EXPERTS];
    int64_t id = 0;
    struct ep_tensor ids;
    struct ep_routing r = EP_ROUTING_INIT;
    int most = 0;

    ep_tensor_2d(&ids, EP_I64, &id, 0, 1);
    r.topk_ids = &ids;
    r.num_experts = NUM_EXPERTS;
    r.expert_rank = map;
    for (int i = 0; i < NUM_MAPS; i++) {
        make_map(seed + (uint64_t)i, map);
        world_is(w, call_route(h, &r, stream), EP_OK, "a route by one map more");
        const int num = num_tables(w->group, NULL);
        most = num > most ? num : most;
    }
    /* The group's own, the handle's, and the handle's before, at which nobody has looked yet. */
    world_check(w, most <= 3 + in_use + EPI_EXPERTS_UNUSED || (stream && !gpu_wanted()),
                "%d tables, %d in use", most, in_use);
}

static void held(void *arg) {
    while (!atomic_load((atomic_int *)arg)) {
        epi_sleep_ns(EPI_NS_PER_MS);
    }
}

/* What is queued has the map that it was routed by, although the handle has others by now. */
static void queued(struct world *w, const struct trial *t) {
    struct run r;
    ep_handle *h = NULL;
    void *stream = NULL;
    atomic_int go = 0;

    run_create(&r, w, t);
    world_is(w, ep_handle_create(&h, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    if (!gpu_wanted()) {
        world_is(w, ep_stream_run(stream, held, &go), EP_OK, "held");
    }
    world_is(w, run_route(&r, h, stream), EP_OK, "route");
    run_poison(&r, OUT_X, OUT_Y_TOPK);
    world_is(w, call_dispatch(h, &r.dispatch, stream), EP_OK, "dispatch");
    if (r.combine.x != &r.view) {
        world_is(w, call_combine(h, &r.combine, stream), EP_OK, "combine");
    }
    churn(w, h, 1000, 1, stream);
    atomic_store(&go, 1);
    world_is(w, call_stream_sync(w->group, stream), EP_OK, "what was queued");
    run_check_outputs(&r);
    if (r.combine.x != &r.view) {
        run_check_combine(&r);
    }
    call_stream_destroy(w->group, &stream);
    ep_handle_destroy(&h);
    run_free(&r);
}

/* Nobody knows when a graph is gone. */
static void captured(struct world *w, ep_handle *h) {
    const struct epi_cu_device *d = &call_gpu(w->group)->device;
    int32_t map[NUM_EXPERTS];
    struct ep_tensor ids;
    struct ep_routing r = EP_ROUTING_INIT;
    struct graph g = {NULL, NULL};
    void *stream = NULL;

    make_map(7, map);
    ep_tensor_2d(&ids, EP_I64, NULL, 0, 1);
    r.topk_ids = &ids;
    r.num_experts = NUM_EXPERTS;
    r.expert_rank = map;
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    if (world_is(w, epi_cu_enter(d), EP_OK, "the device's context")) {
        if (graph_begin(w, stream)) {
            world_is(w, ep_handle_route(h, &r, stream), EP_OK, "route in a capture");
            graph_end(w, stream, &g);
        }
        churn(w, h, 2000, 1, NULL);
        world_check(w, num_tables(w->group, map) == 1, "what a graph has stays");
        graph_launch(w, &g, stream);
        world_is(w, epi_cu_stream_sync(d, stream), EP_OK, "a replay");
        graph_destroy(w, &g);
        epi_cu_leave();
    }
    call_stream_destroy(w->group, &stream);
}

static void body(struct world *w) {
    const struct many *m = w->ctx;
    ep_handle *own[MANY] = {NULL}, *reused = NULL;

    world_is(w, ep_handle_create(&reused, w->group, NULL), EP_OK, "ep_handle_create");
    for (int i = 0; i < MANY; i++) {
        world_is(w, ep_handle_create(&own[i], w->group, NULL), EP_OK, "ep_handle_create");
        trial_pass(w, &m->t[i], own[i]);
        trial_pass(w, &m->t[i], reused);
        world_check(
            w, ep_handle_num_local_experts(reused) == ref_num_local(&m->c[i].problem, w->rank),
            "ep_handle_num_local_experts");
        again(w, &m->t[i / 2], own[i / 2]);
    }
    refused(w, own[1]);
    churn(w, reused, 3000, MANY, NULL);
    for (int i = 0; i < MANY; i++) {
        again(w, &m->t[i], own[i]);
    }
    for (int i = 0; i < MANY; i++) {
        ep_handle_destroy(&own[(i * 3 + w->rank) % MANY]); /* in another order on each rank */
    }
    churn(w, reused, 4000, 0, NULL);
    queued(w, &m->t[0]);
    if (gpu_wanted()) {
        captured(w, reused);
    }
    churn(w, reused, 5000, 1, NULL);
    trial_pass(w, &m->t[0], reused);
    ep_handle_destroy(&reused);
}

int main(void) {
    gpu_program();
    static struct many m;
    struct world_setup s;
    const uint64_t seed = tap_seed();

    tap_deadline(120);
    for (int i = 0; i < MANY; i++) {
        case_random(&m.c[i], seed + (uint64_t)i);
        m.c[i].num_ranks = RANKS;
        case_build(&m.c[i]);
        trial_init(&m.t[i], &m.c[i]);
        trial_random(&m.t[i], seed + 100 + (uint64_t)i);
        trial_build(&m.t[i]);
    }
    for (int processes = 0; processes < gpu_ways(); processes++) {
        setup(&s, &m);
        s.processes = processes;
        s.body = body;
        s.ctx = &m;
        ok(world_run(&s) == 0, "experts, top-k, rows and scales vary in one group, %s",
           gpu_processes(processes) ? "processes" : "threads");
    }
    for (int i = 0; i < MANY; i++) {
        trial_free(&m.t[i]);
        case_free(&m.c[i]);
    }
    return done_testing();
}
