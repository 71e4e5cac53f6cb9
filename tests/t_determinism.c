/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Two runs give the same bytes, whatever the number of workers, on each rank its own: every run
 * is compared with the same images, the view of the arena included.
 */
#include <stdio.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

static const int workers[] = {1, 2, 5};

struct scene {
    struct trial t;
    int group_workers; /* 0: a different number on every rank */
};

static void tune(struct ep_group_config *config, int rank, void *ctx) {
    const struct scene *s = ctx;

    config->num_workers = s->group_workers ? s->group_workers : workers[rank % 3];
}

static void body(struct world *w) {
    struct scene *s = w->ctx;
    ep_handle *handle = NULL;

    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    for (int i = 0; i < 4; i++) {
        trial_pass(w, &s->t, handle);
    }
    ep_handle_destroy(&handle);
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();
    struct test_case c;
    struct scene s;

    tap_deadline(180);
    for (int variant = 0; variant < 2; variant++) {
        case_default(&c, 4, seed + (uint64_t)variant);
        c.max_tokens = 300;
        c.num_experts = 32;
        c.topk = 6;
        case_build(&c);
        trial_init(&s.t, &c);
        for (int r = 0; r < 4; r++) {
            s.t.form[r].expanded = (r + variant) % 2;
            s.t.form[r].arena = variant;
            s.t.form[r].zero_gaps = true;
            s.t.form[r].alignment = 8;
            s.t.form[r].weighted = variant;
        }
        trial_build(&s.t);
        for (int i = 0; i < 8; i++) { /* by the group's number, then by the call's */
            struct world_setup setup;
            const int n = i < 3 ? workers[i] : 0;
            for (int r = 0; r < 4; r++) {
                s.t.form[r].num_workers = i < 4   ? 0
                                          : i < 7 ? workers[i - 4]
                                                  : workers[(r + 1) % 3];
            }
            s.group_workers = n;
            trial_setup(&setup, &s.t);
            setup.tune = tune;
            setup.body = body;
            setup.ctx = &s;
            setup.processes = i == 3;
            ok(world_run(&setup) == 0, "variant %d, workers %d of the group, %d of the call",
               variant, n, s.t.form[0].num_workers);
        }
        trial_free(&s.t);
        case_free(&c);
    }
    return done_testing();
}
