/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Numbers of operations go on beyond 32 bits: what words hold of one is never 0, which is what
 * memory says that nobody has written, and the words that are used in turn keep their turns. All
 * ranks stand shortly before the end when they begin, as after 2^32 operations.
 */
#include <stdio.h>

#include "src/ep/group.h"
#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

struct start {
    const struct trial *t;
    uint32_t epoch; /* of the last operation that has ended */
    int cached;     /* dispatches before the first that exchanges counts again */
};

static void go_to(ep_group *g, uint32_t epoch) {
    const k_u64 word = epoch;
    g->issued = epoch;
    if (gpu_wanted()) {
        call_write(g, &g->k.ctl->epoch, &word, sizeof(word));
    } else {
        g->ctl->epoch = epoch;
    }
}

static void across_the_end(struct world *w) {
    const struct start *s = w->ctx;
    ep_handle *handle = NULL;
    struct run r;

    go_to(w->group, s->epoch);
    world_barrier(w);
    run_create(&r, w, s->t);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    for (int turn = 0; turn < 3; turn++) {
        world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
        for (int i = 0; i < s->cached + 1; i++) {
            world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "ep_dispatch");
            run_check_dispatch(&r, handle);
        }
        world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine");
        run_check_combine(&r);
    }
    run_free(&r);
    ep_handle_destroy(&handle);
}

int main(void) {
    gpu_program();
    const struct form form = {.id_dtype = EP_I64, .slack = 2};
    uint64_t seed = tap_seed();

    tap_deadline(120);
    ok(K_NEXT((uint32_t)0xfffffffe) == 1 && K_NEXT((uint64_t)0xfffffffe) == 0x100000001,
       "the number after the last of 32 bits has the low half 1");
    for (int i = 0; i < 6; i++) {
        struct test_case c;
        struct trial t;
        struct world_setup setup;
        struct start s = {&t, 0xfffffffa + (uint32_t)i % 5, i % 3};

        case_default(&c, 3, seed + (uint64_t)i);
        case_build(&c);
        trial_init(&t, &c);
        trial_form(&t, &form);
        trial_build(&t);
        trial_setup(&setup, &t);
        setup.body = across_the_end;
        setup.ctx = &s;
        setup.processes = i == 5;
        ok(world_run(&setup) == 0, "from operation %u on, %d cached", s.epoch, s.cached);
        trial_free(&t);
        case_free(&c);
    }
    return done_testing();
}
