/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * EP_TEST_PAIRS (100) dispatches and combines with changing routing, every output against the
 * reference. All of it twice, and once on a host group: the bits of all outputs are the same.
 * EP_TEST_NUM_RANKS (4) ranks.
 */
#include <stdlib.h>

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define MOST_RANKS 16
#define NUM_TRIALS 7

struct scene {
    struct test_case c[NUM_TRIALS];
    struct trial t[NUM_TRIALS];
    int num_pairs;
    uint64_t *hash; /* [MOST_RANKS], shared with ranks that are processes */
};

static int number(const char *name, int usual, int most) {
    const char *text = getenv(name);
    const int n = text ? atoi(text) : usual;

    return n < 1 ? usual : n > most ? most : n;
}

/* The hash of the bytes of all outputs that have a value. */
static void add_outputs(uint64_t *hash, const struct run *r) {
    for (int i = 0; i < NUM_OUTPUTS; i++) {
        const struct output *o = &r->out[i];
        for (size_t b = 0; o->got && b < o->bytes; b++) {
            if (!o->any[b]) {
                *hash = epi_hash(*hash, &o->got[b], 1);
            }
        }
    }
}

static void body(struct world *w) {
    const struct scene *s = w->ctx;
    uint64_t hash = EPI_HASH_BEGIN;
    struct run r[NUM_TRIALS];
    ep_handle *handle = NULL;
    bool go;

    for (int i = 0; i < NUM_TRIALS; i++) {
        run_create(&r[i], w, &s->t[i]);
    }
    go = world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    for (int n = 0; go && n < s->num_pairs; n++) {
        struct run *now = &r[(n * n + n / 3) % NUM_TRIALS];
        go = world_is(w, run_route(now, handle, NULL), EP_OK, "ep_handle_route") &&
             world_is(w, run_dispatch(now, handle, NULL), EP_OK, "ep_dispatch") &&
             run_check_dispatch(now, handle) &&
             world_is(w, run_combine(now, handle, NULL), EP_OK, "ep_combine") &&
             run_check_combine(now);
        add_outputs(&hash, now);
        world_check(w, go, "pair %d of %d", n, s->num_pairs);
    }
    s->hash[w->rank] = hash;
    ep_handle_destroy(&handle);
    for (int i = 0; i < NUM_TRIALS; i++) {
        run_free(&r[i]);
    }
}

static void scene_create(struct scene *s, int num_ranks, uint64_t seed) {
    for (int i = 0; i < NUM_TRIALS; i++) {
        struct test_case *c = &s->c[i];
        case_default(c, num_ranks, seed + (uint64_t)i);
        c->max_tokens = 64;
        c->routing = (enum case_routing)(i % NUM_ROUTINGS);
        c->hidden = 64 * (1 + i);
        c->row_dtype = i % 3 == 1 ? EP_F32 : EP_BF16;
        c->num_scales = i % 2 ? 3 : 0;
        c->scale_dtype = EP_F32;
        case_build(c);
        trial_init(&s->t[i], c);
        for (int r = 0; r < num_ranks; r++) {
            s->t[i].form[r].expanded = (r + i) % 3 == 0;
            s->t[i].form[r].zero_gaps = true;
            s->t[i].form[r].alignment = 1 + 3 * (i % 3);
            s->t[i].form[r].weighted = i % 2;
            s->t[i].form[r].num_bias = i % 3;
        }
        s->t[i].dtype = i % 3 == 0 ? EP_BF16 : i % 3 == 1 ? EP_F16 : EP_F32;
        s->t[i].hidden = 32 * (1 + i);
        trial_build(&s->t[i]);
    }
}

int main(void) {
    gpu_only();
    uint64_t seed = tap_seed();
    const int num_ranks = number("EP_TEST_NUM_RANKS", 4, MOST_RANKS);
    struct world_setup setup;
    struct scene s;
    uint64_t *hash[4];
    static const char *const names[4] = {"a host group", "threads", "threads again",
                                         "processes"};

    tap_deadline(300);
    s.num_pairs = number("EP_TEST_PAIRS", 100, 1 << 30);
    scene_create(&s, num_ranks, seed);
    trial_setup(&setup, &s.t[0]);
    setup.config.max_row_bytes = 4096;
    setup.config.max_scale_bytes = 16;
    setup.body = body;
    setup.ctx = &s;
    for (int i = 0; i < 4; i++) {
        bool same = true;
        s.hash = hash[i] = tap_shared(MOST_RANKS * sizeof(*s.hash));
        setup.host = i == 0;
        setup.processes = i == 3;
        ok(world_run(&setup) == 0, "%d pairs, %s", s.num_pairs, names[i]);
        for (int r = 0; r < num_ranks; r++) {
            same = same && hash[i][r] != 0 && hash[i][r] == hash[0][r];
        }
        ok(same, "the bits of all outputs are those of the host group, %s", names[i]);
    }
    for (int i = 0; i < NUM_TRIALS; i++) {
        trial_free(&s.t[i]);
        case_free(&s.c[i]);
    }
    return done_testing();
}
