/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Compact dispatch: one row per (token, rank) by source rank and token, with ids, weights,
 * sources and counts, for every kind of routing, expert map and token count.
 */
#include <stdio.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

static const struct form tight = {.alignment = 1, .id_dtype = EP_I64};
static const struct form roomy = {
    .alignment = 1, .id_dtype = EP_I32, .slack = 5, .padded = true, .num_workers = 3};

static void routings_and_maps(uint64_t seed) {
    for (int routing = 0; routing < NUM_ROUTINGS; routing++) {
        for (int map = 0; map < NUM_MAPS; map++) {
            char name[64];
            struct test_case c;

            case_default(&c, 4, seed++);
            c.routing = (enum case_routing)routing;
            c.map = (enum case_map)map;
            snprintf(name, sizeof(name), "routing %d, map %d", routing, map);
            trial_case(&c, map % 2 ? &roomy : &tight, false, name);
        }
    }
}

struct shape {
    const char *name;
    int ranks, experts, tokens, topk;
    enum case_tokens kind;
};

static const struct shape shapes[] = {
    {"one rank", 1, 4, 30, 2, TOKENS_MAX},
    {"one token, one expert", 1, 1, 1, 1, TOKENS_MAX},
    {"two ranks", 2, 6, 100, 3, TOKENS_MAX},
    {"fewer experts than ranks", 5, 3, 20, 2, TOKENS_MIXED},
    {"top-1", 4, 16, 50, 1, TOKENS_MIXED},
    {"top-64", 4, 128, 20, EP_MAX_TOPK, TOKENS_MIXED},
    {"top-64 of fewer experts", 3, 7, 20, EP_MAX_TOPK, TOKENS_MIXED},
    {"one token per rank", 4, 16, 20, 4, TOKENS_ONE},
    {"no token at all", 4, 16, 20, 4, TOKENS_NONE},
    {"many tokens", 4, 256, 1000, 8, TOKENS_MAX},
    {"nine ranks", 9, 100, 33, 5, TOKENS_MIXED},
};

static void all_shapes(uint64_t seed) {
    for (size_t i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
        struct test_case c;

        case_default(&c, shapes[i].ranks, seed + i);
        c.num_experts = shapes[i].experts;
        c.max_tokens = shapes[i].tokens;
        c.topk = shapes[i].topk;
        c.tokens = shapes[i].kind;
        c.weights = i % 3 != 2;
        trial_case(&c, i % 2 ? &roomy : &tight, false, shapes[i].name);
    }
}

/* Each output alone, and none. */
static void any_output_may_be_missing(uint64_t seed) {
    struct form form = roomy;
    bool good = true;

    for (int i = -1; i <= OUT_NUM_ROWS && good; i++) {
        struct test_case c;

        case_default(&c, 2, seed);
        c.num_scales = 3;
        c.scale_dtype = EP_F32;
        form.skip = i < 0 ? (1u << OUT_Y) - 1 : ((1u << OUT_Y) - 1) & ~(1u << i);
        good = trial_case(&c, &form, false, "only one output or none is asked for");
    }
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();
    struct test_case c;

    tap_deadline(300);
    routings_and_maps(seed);
    all_shapes(seed + 1000);
    any_output_may_be_missing(seed + 2000);
    case_default(&c, 4, seed + 3000);
    trial_case(&c, &tight, true, "uniform");
    case_default(&c, 3, seed + 3001);
    c.map = MAP_RANDOM;
    c.routing = ROUTE_HOLES;
    c.max_tokens = 200;
    trial_case(&c, &roomy, true, "holes, random map");
    return done_testing();
}
