/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * A routed and dispatched handle is used again and again: cached dispatches and combines of
 * other types and forms, several handles in turn, backward passes, and a new routing in an old
 * handle.
 */
#include <string.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define NUM_TRIALS 3

struct scene {
    struct test_case c[NUM_TRIALS];
    struct trial t[NUM_TRIALS];
};

/* Trials of one group. With one_routing they differ in data, types and forms only. */
static void scene_create(struct scene *s, uint64_t seed, bool one_routing) {
    for (int i = 0; i < NUM_TRIALS; i++) {
        case_default(&s->c[i], 4, one_routing ? seed : seed + (uint64_t)i);
        s->c[i].data_seed += (uint64_t)i;
        s->c[i].routing = one_routing ? ROUTE_HOLES : (enum case_routing)(2 * i + 1);
        s->c[i].row_dtype = i == 1 ? EP_F32 : EP_BF16;
        s->c[i].hidden = 64 - 16 * i;
        s->c[i].weights = i != 2;
        s->c[i].num_scales = i == 1 ? 6 : 0;
        s->c[i].scale_dtype = EP_F32;
        case_build(&s->c[i]);
        trial_init(&s->t[i], &s->c[i]);
        trial_random(&s->t[i], seed + 77 + (uint64_t)i);
        s->t[i].back = i != 2;
        for (int r = 0; r < 4; r++) {
            s->t[i].form[r].arena = false;
        }
        trial_build(&s->t[i]);
    }
}

static void scene_run(struct scene *s, void (*body)(struct world *w), bool processes,
                      const char *name) {
    struct world_setup setup;

    trial_setup(&setup, &s->t[0]);
    setup.config.max_row_bytes = 1024;
    setup.config.max_scale_bytes = 64;
    setup.processes = processes;
    setup.body = body;
    setup.ctx = s;
    if (!ok(world_run(&setup) == 0, "%s, %s", name, processes ? "processes" : "threads")) {
        diag("EP_SEED=%llu", (unsigned long long)tap_seed());
    }
    for (int i = 0; i < NUM_TRIALS; i++) {
        trial_free(&s->t[i]);
        case_free(&s->c[i]);
    }
}

static void dispatch(struct run *r, ep_handle *handle) {
    if (world_is(r->w, run_dispatch(r, handle, NULL), EP_OK, "ep_dispatch")) {
        run_check_dispatch(r, handle);
    }
}

static void combine(struct run *r, ep_handle *handle) {
    if (world_is(r->w, run_combine(r, handle, NULL), EP_OK, "ep_combine")) {
        run_check_combine(r);
    }
}

static void one_handle_many_times(struct world *w) {
    struct scene *s = w->ctx;
    struct run r[NUM_TRIALS];
    ep_handle *handle = NULL;

    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    for (int i = 0; i < NUM_TRIALS; i++) {
        run_create(&r[i], w, &s->t[i]);
    }
    world_is(w, run_route(&r[0], handle, NULL), EP_OK, "ep_handle_route");
    for (int i = 0; i < 9; i++) {
        dispatch(&r[i % NUM_TRIALS], handle);
        for (int n = 0; n < i % 4; n++) {
            combine(&r[i % NUM_TRIALS], handle);
        }
    }
    for (int i = 0; i < NUM_TRIALS; i++) {
        run_free(&r[i]);
    }
    ep_handle_destroy(&handle);
}

static void handles_in_turn(struct world *w) {
    static const int order[] = {0, 1, 2, ~1, ~0, 1, ~2, ~1, 0, ~0, ~0, 2, 2, ~2, ~1};
    struct scene *s = w->ctx;
    struct run r[NUM_TRIALS];
    ep_handle *handle[NUM_TRIALS] = {NULL};

    for (int i = 0; i < NUM_TRIALS; i++) {
        world_is(w, ep_handle_create(&handle[i], w->group, NULL), EP_OK, "ep_handle_create");
        run_create(&r[i], w, &s->t[i]);
        world_is(w, run_route(&r[i], handle[i], NULL), EP_OK, "ep_handle_route");
    }
    for (size_t i = 0; i < sizeof(order) / sizeof(*order); i++) {
        if (order[i] >= 0) {
            dispatch(&r[order[i]], handle[order[i]]);
        } else {
            combine(&r[~order[i]], handle[~order[i]]);
        }
    }
    for (int i = 0; i < NUM_TRIALS; i++) {
        run_free(&r[i]);
        ep_handle_destroy(&handle[i]);
    }
}

static void new_routing_in_an_old_handle(struct world *w) {
    struct scene *s = w->ctx;
    struct run r;
    ep_handle *handle = NULL;
    int64_t rows;

    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    for (int i = 0; i < 6; i++) {
        run_create(&r, w, &s->t[i % NUM_TRIALS]);
        world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
        world_fails(w, ep_handle_counts(handle, &rows, NULL, NULL), EP_ERR_STATE, "dispatch",
                    "counts after a new routing");
        world_fails(w, run_combine(&r, handle, NULL), EP_ERR_STATE, "dispatch",
                    "combine after a new routing");
        dispatch(&r, handle);
        combine(&r, handle);
        run_free(&r);
    }
    ep_handle_destroy(&handle);
}

/* What dispatch sent comes back as it was: the backward of a dispatch is a combine. */
static void backward(struct world *w) {
    const struct trial *t = w->ctx;
    const struct ref_input *in = &t->c->in[w->rank];
    const size_t n = (size_t)in->num_tokens * (size_t)t->c->topk;
    struct run r;
    ep_handle *handle = NULL;

    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    run_create(&r, w, t);
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    dispatch(&r, handle);
    r.combine.x = r.dispatch.recv_x;
    r.combine.weights = NULL;
    r.combine.topk_weights = r.dispatch.recv_topk_weights;
    if (world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine")) {
        const float *back = r.out[OUT_Y_TOPK].t.data;
        for (size_t i = 0; i < n; i++) {
            const float want = in->ids[i] < 0 ? 0 : in->weights[i];
            if (!world_check(w, !memcmp(&back[i], &want, 4), "weight %zu: %a, not %a", i,
                             (double)back[i], (double)want)) {
                break;
            }
        }
    }
    dispatch(&r, handle); /* the backward of the combine */
    run_free(&r);
    ep_handle_destroy(&handle);
}

static void backward_passes(uint64_t seed) {
    for (int i = 0; i < 4; i++) {
        struct test_case c;
        struct trial t;
        struct world_setup s;

        case_default(&c, 4, seed + (uint64_t)i);
        c.routing = i % 2 ? ROUTE_HOLES : ROUTE_UNIFORM;
        case_build(&c);
        trial_init(&t, &c);
        for (int r = 0; r < 4; r++) {
            t.form[r].expanded = i / 2 && r % 2;
        }
        trial_build(&t);
        trial_setup(&s, &t);
        s.body = backward;
        ok(world_run(&s) == 0, "combine of a dispatch restores the top-k weights%s",
           i / 2 ? ", some ranks expanded" : "");
        trial_free(&t);
        case_free(&c);
    }
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();
    struct scene s;

    tap_deadline(180);
    for (int processes = 0; processes < gpu_ways(); processes++) {
        scene_create(&s, seed + (uint64_t)processes, true);
        scene_run(&s, one_handle_many_times, processes, "one handle many times");
        scene_create(&s, seed + 100 + (uint64_t)processes, false);
        scene_run(&s, handles_in_turn, processes, "three handles in turn");
    }
    scene_create(&s, seed + 200, false);
    scene_run(&s, new_routing_in_an_old_handle, false, "new routing in an old handle");
    backward_passes(seed + 300);
    return done_testing();
}
