/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Expanded dispatch: one row per selection, grouped by local expert with aligned starts, gaps
 * zeroed on request and otherwise left alone, one weight per row, offsets and counts.
 */
#include <stdio.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

static void alignments(uint64_t seed) {
    static const int32_t alignment[] = {0, 1, 2, 7, 16, 128};

    for (size_t i = 0; i < 2 * sizeof(alignment) / sizeof(*alignment); i++) {
        const struct form form = {.expanded = true,
                                  .alignment = alignment[i / 2],
                                  .zero_gaps = i % 2,
                                  .slack = i % 3 ? 4 : 0,
                                  .padded = i % 2,
                                  .id_dtype = EP_I64};
        char name[64];
        struct test_case c;

        case_default(&c, 4, seed + i);
        c.num_scales = i % 2 ? 5 : 0;
        c.scale_dtype = EP_U8;
        snprintf(name, sizeof(name), "alignment %d, gaps %s", form.alignment,
                 form.zero_gaps ? "zeroed" : "left alone");
        trial_case(&c, &form, i == 5, name);
    }
}

static void routings_and_maps(uint64_t seed) {
    const struct form form = {
        .expanded = true, .alignment = 4, .zero_gaps = true, .id_dtype = EP_I64};

    for (int routing = 0; routing < NUM_ROUTINGS; routing++) {
        for (int map = 0; map < NUM_MAPS; map++) {
            char name[64];
            struct test_case c;

            case_default(&c, 4, seed++);
            c.routing = (enum case_routing)routing;
            c.map = (enum case_map)map;
            c.weights = routing != ROUTE_SKEWED;
            snprintf(name, sizeof(name), "routing %d, map %d", routing, map);
            trial_case(&c, &form, false, name);
        }
    }
}

/* The form is each rank's own: compact, expanded, aligned differently, in one operation. */
static void every_rank_its_own_form(uint64_t seed, bool processes) {
    struct test_case c;
    struct trial t;

    case_default(&c, 4, seed);
    c.max_tokens = 100;
    case_build(&c);
    trial_init(&t, &c);
    t.form[1].expanded = t.form[2].expanded = t.form[3].expanded = true;
    t.form[2].alignment = 16;
    t.form[2].zero_gaps = true;
    t.form[3].alignment = 5;
    trial_build(&t);
    trial_run(&t, processes, "every rank its own form");
    trial_free(&t);
    case_free(&c);
}

static void largest(uint64_t seed) {
    const struct form form = {.expanded = true, .alignment = 8, .id_dtype = EP_I64};
    struct test_case c;

    case_default(&c, 2, seed);
    c.topk = EP_MAX_TOPK;
    c.num_experts = 200;
    c.routing = ROUTE_DUPLICATES;
    trial_case(&c, &form, false, "top-64 of repeated experts");
    case_default(&c, 4, seed);
    c.tokens = TOKENS_NONE;
    trial_case(&c, &form, false, "no token at all");
    case_default(&c, 1, seed);
    trial_case(&c, &form, false, "one rank");
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();

    tap_deadline(300);
    alignments(seed);
    routings_and_maps(seed + 1000);
    every_rank_its_own_form(seed + 2000, false);
    every_rank_its_own_form(seed + 2001, true);
    largest(seed + 3000);
    return done_testing();
}
