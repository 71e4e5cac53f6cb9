/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Several CUDA groups of one process: one that ends does not stop the operations of another, and
 * together they are promised no more SMs than a device has. Ranks are threads on one GPU.
 */
#include <stdio.h>

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 2
#define SETTLE_MS 30

struct scene {
    struct test_case c;
    struct trial t;
    struct ep_group_config config;
    ep_world *world; /* of groups beside the first */
};

/* A group beside the rank's, with failures of its own, of as many SMs. */
static ep_status beside_create(struct world *beside, struct world *w, int num_workers) {
    const struct scene *s = w->ctx;
    struct ep_group_config config = s->config;

    *beside = *w;
    beside->group = NULL;
    beside->bad = 0;
    beside->ctx = (void *)(uintptr_t)&s->t;
    config.rank = w->rank;
    config.num_ranks = w->num_ranks;
    config.world = s->world;
    config.num_workers = num_workers;
    return call_group_create(&beside->group, &config);
}

static void beside_destroy(struct world *beside, struct world *w) {
    call_group_destroy(&beside->group);
    w->bad += beside->bad;
}

/* Rank 0 has begun an operation that rank 1 joins only when a group of both has ended. */
static void one_ends(struct world *w) {
    const struct scene *s = w->ctx;
    struct world beside;
    struct run r;
    void *stream = NULL;
    ep_handle *h = NULL;

    world_is(w, beside_create(&beside, w, 1), EP_OK, "a second group");
    trial_body(&beside);
    run_create(&r, w, &s->t);
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    world_is(w, ep_handle_create(&h, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, h, stream), EP_OK, "route");
    world_is(w, call_stream_sync(w->group, stream), EP_OK, "what was found");
    if (w->rank == 0) {
        world_is(w, run_dispatch(&r, h, stream), EP_OK, "dispatch");
        tap_sleep_ms(SETTLE_MS); /* it waits for rank 1 */
    }
    world_barrier(w);
    beside_destroy(&beside, w);
    if (w->rank == 1) {
        world_is(w, run_dispatch(&r, h, stream), EP_OK, "dispatch");
    }
    world_is(w, call_stream_sync(w->group, stream), EP_OK, "what was found");
    run_check_dispatch(&r, h);
    call_stream_destroy(w->group, &stream);
    ep_handle_destroy(&h);
    run_free(&r);
}

/* The first group has one SM for each rank. One with a quarter for each fits, a second of that size
 * does not, before the other has gone; one that leaves it to the library takes what there is. */
static void shares(struct world *w) {
    const int quarter = call_gpu(w->group)->device.num_sms / 4;
    struct world beside[2];

    world_is(w, beside_create(&beside[0], w, quarter), EP_OK, "half of the device");
    world_fails(w, beside_create(&beside[1], w, quarter), EP_ERR_ARG, "promised|num_workers",
                "another half");
    world_is(w, beside_create(&beside[1], w, 0), EP_OK, "what is left");
    for (int i = 0; i < 2; i++) {
        trial_body(&beside[i]);
    }
    beside_destroy(&beside[1], w);
    beside_destroy(&beside[0], w);
    world_is(w, beside_create(&beside[1], w, quarter), EP_OK, "half of it again");
    trial_body(&beside[1]);
    beside_destroy(&beside[1], w);
}

static void run(uint64_t seed, void (*body)(struct world *w), int timeout_ms,
                const char *name) {
    const struct form form = {.id_dtype = EP_I64, .num_bias = 1};
    struct world_setup setup;
    struct scene s = {.world = NULL};

    case_default(&s.c, RANKS, seed);
    case_build(&s.c);
    trial_init(&s.t, &s.c);
    trial_form(&s.t, &form);
    trial_build(&s.t);
    trial_setup(&setup, &s.t);
    setup.config.num_workers = 1;
    setup.config.device_index = 0;
    setup.config.timeout_ms = timeout_ms ? timeout_ms : setup.config.timeout_ms;
    setup.body = body;
    setup.ctx = &s;
    s.config = setup.config;
    if (ok(ep_world_create(&s.world, RANKS) == EP_OK, "a second world")) {
        ok(world_run(&setup) == 0, "%s", name);
    }
    ep_world_destroy(&s.world);
    trial_free(&s.t);
    case_free(&s.c);
}

int main(void) {
    gpu_only();
    uint64_t seed = tap_seed();

    tap_deadline(120);
    if (gpu_processes(false)) {
        skip_all("ranks are threads here");
    }
    run(seed, one_ends, 10000, "a group that ends beside another's operation");
    run(seed + 1, shares, 0, "groups that share the SMs of a device");
    return done_testing();
}
