/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * What is local waits for no peer and agrees on nothing with one: groups are destroyed in any order,
 * also while a peer is in an operation; handles are made and destroyed in any order and are as large
 * as they are asked to be; a handle is routed beside a dispatch that waits for a peer.
 */
#include <stdatomic.h>
#include <stdio.h>

#include "tests/calls.h"
#include "tests/rig.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 3
#define TIMEOUT_MS 60000 /* who waits for it has not kept to the bound below */
#define AT_ONCE_S 20.0

/* ---- groups ----------------------------------------------------------------------------- */

struct meeting {
    ep_world *world;
    char address[2][32];
};

/* Rank 0 destroys them as they were made, rank 1 the other way round, as a garbage collector does. */
static int in_any_order(int rank, void *ctx) {
    const struct meeting *m = ctx;
    ep_group *group[2] = {NULL, NULL};
    int bad = 0;

    for (int i = 0; i < 2; i++) {
        struct ep_group_config c = rig_tiny(rank, RANKS, TIMEOUT_MS);
        c.world = m->world;
        c.address = m->world ? NULL : m->address[i];
        bad += !ok(call_group_create(&group[i], &c) == EP_OK, "create: %s", ep_last_error());
    }
    const double start = tap_now();
    call_group_destroy(&group[rank == 1]);
    tap_sleep_ms(rank == 2 ? 300 : 0);
    call_group_destroy(&group[rank != 1]);
    const double took = tap_now() - start;
    bad += !ok(took < AT_ONCE_S, "rank %d: both groups are destroyed in %.1f s", rank, took);
    return bad;
}

static void destroy_in_any_order(bool processes) {
    struct meeting m = {.world = NULL};

    processes = gpu_processes(processes);
    for (int i = 0; i < 2; i++) {
        snprintf(m.address[i], sizeof(m.address[i]), "127.0.0.1:%d", tap_free_port());
    }
    ok(processes || ep_world_create(&m.world, RANKS) == EP_OK, "a place to meet");
    ok(gpu_run_ranks(RANKS, processes, in_any_order, &m, 60) == 0,
       "groups are destroyed in another order on each rank, %s",
       processes ? "processes" : "threads");
    ep_world_destroy(&m.world);
}

/* All but the last rank leave while that has received nothing yet: its rows are there. */
static void leave_a_peer_in_an_operation(struct world *w) {
    const struct trial *t = w->ctx;
    struct ep_dispatch_args in = EP_DISPATCH_ARGS_INIT;
    struct run r;
    ep_handle *handle = NULL;

    run_create(&r, w, t);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    in.x = r.dispatch.x;
    in.topk_weights = r.dispatch.topk_weights;
    if (w->rank == RANKS - 1) {
        world_is(w, call_dispatch_begin(handle, &in, NULL), EP_OK, "ep_dispatch_begin");
        world_barrier(w); /* the others are gone */
        world_is(w, call_dispatch_finish(handle, &r.dispatch, NULL), EP_OK, "finish");
        run_check_dispatch(&r, handle);
        world_fails(w, run_combine(&r, handle, NULL), EP_ERR_PEER, "ep_group_destroy",
                    "an operation without the others");
    } else {
        world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "ep_dispatch");
        run_check_dispatch(&r, handle);
        ep_handle_destroy(&handle);
        const double start = tap_now();
        call_group_destroy(&w->group);
        world_check(w, tap_now() - start < AT_ONCE_S, "destroy took %.1f s", tap_now() - start);
        world_barrier(w);
    }
    ep_handle_destroy(&handle);
    run_free(&r);
}

/* ---- handles ---------------------------------------------------------------------------- */

/* Rank r makes r more than it uses, in between, and destroys some. */
static void handles_of_each_rank(struct world *w) {
    ep_handle *used[3] = {NULL}, *other[RANKS] = {NULL};

    for (int i = 0; i < w->rank; i++) {
        world_is(w, ep_handle_create(&other[i], w->group, NULL), EP_OK, "another handle");
    }
    for (int i = 0; i < 3; i++) {
        const int at = w->rank == 1 ? 2 - i : i;
        world_is(w, ep_handle_create(&used[at], w->group, NULL), EP_OK, "a handle");
    }
    ep_handle_destroy(&other[0]);
    for (int i = 0; i < 6; i++) {
        trial_pass(w, w->ctx, used[i % 3]);
    }
    for (int i = 0; i < 3; i++) {
        ep_handle_destroy(&used[w->rank == 2 ? 2 - i : i]);
    }
    for (int i = 0; i < RANKS; i++) {
        ep_handle_destroy(&other[i]);
    }
}

/* Handles that are just large enough for what each rank sends, beside one of full size. */
static void handles_of_any_size(struct world *w) {
    const struct trial *t = w->ctx;
    struct ep_handle_config config = EP_HANDLE_CONFIG_INIT;
    int64_t most = 0, bytes = 0;
    ep_handle *handle = NULL;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;

    config.max_tokens = (int32_t)t->c->in[w->rank].num_tokens;
    config.max_tokens = config.max_tokens ? config.max_tokens : 1;
    world_is(w, ep_group_plan(w->group, &plan), EP_OK, "ep_group_plan");
    world_is(w, ep_handle_plan(w->group, NULL, &most), EP_OK, "ep_handle_plan");
    world_is(w, ep_handle_plan(w->group, &config, &bytes), EP_OK, "ep_handle_plan");
    world_check(w, most == plan.handle_bytes && bytes > 0 && bytes <= most,
                "the largest handle takes %lld, this one %lld, the plan says %lld",
                (long long)most, (long long)bytes, (long long)plan.handle_bytes);
    world_is(w, ep_handle_create(&handle, w->group, w->rank ? &config : NULL), EP_OK,
             "ep_handle_create");
    for (int i = 0; i < 3; i++) {
        trial_pass(w, t, handle);
    }
    ep_handle_destroy(&handle);
}

static void a_small_handle_of_a_large_group(struct world *w) {
    struct ep_handle_config config = EP_HANDLE_CONFIG_INIT;
    int64_t most = 0, bytes = 0;

    config.max_tokens = 1;
    config.max_topk = 1;
    world_is(w, ep_handle_plan(w->group, NULL, &most), EP_OK, "ep_handle_plan");
    world_is(w, ep_handle_plan(w->group, &config, &bytes), EP_OK, "ep_handle_plan");
    world_check(w, bytes < most / 8, "%lld of %lld bytes", (long long)bytes, (long long)most);
    config.max_tokens = -1;
    world_fails(w, ep_handle_plan(w->group, &config, &bytes), EP_ERR_ARG, "max_tokens|-1",
                "ep_handle_plan");
    world_is(w, ep_handle_plan(NULL, NULL, &bytes), EP_ERR_ARG, "without a group");
    world_is(w, ep_handle_plan(w->group, NULL, NULL), EP_ERR_ARG, "without a place");
}

/* ---- route beside a dispatch ------------------------------------------------------------- */

static atomic_int is_routed; /* by the threads of rank 0: one world at a time */

struct beside {
    struct run *run;
    ep_handle *handle;
    ep_status status;
};

static void *route_beside(void *arg) {
    struct beside *b = arg;
    tap_sleep_ms(50); /* the dispatch waits by now */
    for (int i = 0; i < 3 && b->status == EP_OK; i++) {
        b->status = run_route(b->run, b->handle, NULL);
    }
    atomic_store(&is_routed, 1);
    return NULL;
}

/* Rank 1 comes to the dispatch when rank 0 has routed beside it. */
static void route_beside_a_dispatch(struct world *w) {
    const struct trial *t = w->ctx;
    ep_handle *handle[2] = {NULL, NULL};
    struct run r;
    pthread_t thread;

    run_create(&r, w, t);
    for (int i = 0; i < 2; i++) {
        world_is(w, ep_handle_create(&handle[i], w->group, NULL), EP_OK, "ep_handle_create");
    }
    struct beside b = {&r, handle[1], EP_OK};
    world_is(w, run_route(&r, handle[0], NULL), EP_OK, "ep_handle_route");
    if (w->rank == 0) {
        atomic_store(&is_routed, 0);
        world_barrier(w);
        world_check(w, pthread_create(&thread, NULL, route_beside, &b) == 0, "a thread");
    } else {
        world_barrier(w);
        const double start = tap_now();
        while (!atomic_load(&is_routed) && tap_now() - start < AT_ONCE_S) {
            tap_sleep_ms(1);
        }
        world_check(w, atomic_load(&is_routed),
                    "rank 0 has not routed, it waits for this rank");
    }
    world_is(w, run_dispatch(&r, handle[0], NULL), EP_OK, "ep_dispatch");
    run_check_dispatch(&r, handle[0]);
    if (w->rank == 0) {
        pthread_join(thread, NULL);
        world_is(w, b.status, EP_OK, "ep_handle_route beside a dispatch");
    } else {
        world_is(w, run_route(&r, handle[1], NULL), EP_OK, "ep_handle_route");
    }
    world_is(w, run_dispatch(&r, handle[1], NULL), EP_OK, "by what was routed beside");
    run_check_dispatch(&r, handle[1]);
    for (int i = 0; i < 2; i++) {
        ep_handle_destroy(&handle[i]);
    }
    run_free(&r);
}

static void run(struct test_case *c, void (*body)(struct world *w), bool processes,
                int num_workers, const char *name) {
    static const struct form form = {.id_dtype = EP_I64, .slack = 2};
    struct world_setup s;
    struct trial t;

    case_build(c);
    trial_init(&t, c);
    trial_form(&t, &form);
    trial_build(&t);
    trial_setup(&s, &t);
    s.config.timeout_ms = TIMEOUT_MS;
    s.config.num_workers = num_workers;
    s.body = body;
    s.processes = processes;
    ok(world_run(&s) == 0, "%s, %s, %d workers", name,
       gpu_processes(processes) ? "processes" : "threads", num_workers);
    trial_free(&t);
    case_free(c);
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();
    struct test_case c;
    struct world_setup s;

    tap_deadline(150);
    for (int processes = 0; processes < gpu_ways(); processes++) {
        destroy_in_any_order(processes);
        case_default(&c, RANKS, seed);
        run(&c, leave_a_peer_in_an_operation, processes, 0,
            "ranks leave a peer in an operation");
    }
    case_default(&c, RANKS, seed + 1);
    run(&c, handles_of_each_rank, false, 0, "handles are made and destroyed in any order");
    case_default(&c, RANKS, seed + 2);
    c.tokens = TOKENS_MIXED;
    run(&c, handles_of_any_size, true, 0, "handles of the size that each rank needs");
    world_defaults(&s, 2);
    s.config.max_tokens = 20000;
    s.body = a_small_handle_of_a_large_group;
    ok(world_run(&s) == 0, "a small handle of a large group is small");
    for (int workers = 1; !gpu_wanted() && workers < 4; workers += 2) {
        case_default(&c, 2, seed + 3);
        run(&c, route_beside_a_dispatch, false, workers, "route beside a dispatch that waits");
    }
    return done_testing();
}
