/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Combine: float32 sums in the order of the header, rounded once (compact) or twice (weighted,
 * expanded), with biases and top-k weights back, in every type.
 */
#include <stdio.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

static const int dtypes[] = {EP_BF16, EP_F16, EP_F32};
static const char *const dtype_names[] = {"bf16", "f16", "f32"};

static void run(struct test_case *c, const struct form *form, int d, bool back, bool processes,
                const char *name) {
    struct trial t;

    case_build(c);
    trial_init(&t, c);
    trial_form(&t, form);
    t.dtype = dtypes[d];
    t.hidden = d == 2 ? 20 : 72;
    t.back = back;
    trial_build(&t);
    trial_run(&t, processes, name);
    trial_free(&t);
    case_free(c);
}

static void every_option(uint64_t seed) {
    for (int i = 0; i < 3 * 3 * 2 * 2 * 2; i++) {
        const int d = i % 3, bias = i / 3 % 3;
        const bool weighted = i / 9 % 2, expanded = i / 18 % 2, back = i / 36 % 2;
        const struct form form = {.expanded = expanded,
                                  .weighted = weighted,
                                  .num_bias = bias,
                                  .alignment = 3,
                                  .padded = i % 2,
                                  .slack = i % 5,
                                  .id_dtype = EP_I64};
        char name[128];
        struct test_case c;

        case_default(&c, 4, seed + (uint64_t)i);
        c.routing = i % 4 == 1 ? ROUTE_HOLES : i % 4 == 3 ? ROUTE_DUPLICATES : ROUTE_UNIFORM;
        snprintf(name, sizeof(name), "%s, %d biases%s%s%s", dtype_names[d], bias,
                 weighted ? ", weighted" : "", expanded ? ", expanded" : "",
                 back ? ", weights back" : "");
        run(&c, &form, d, back, i % 24 == 19, name);
    }
}

/* Ranks may differ in what is their own: form, weights, biases. */
static void every_rank_its_own_options(uint64_t seed) {
    struct test_case c;
    struct trial t;

    case_default(&c, 4, seed);
    case_build(&c);
    trial_init(&t, &c);
    for (int r = 0; r < 4; r++) {
        t.form[r].expanded = r % 2;
        t.form[r].weighted = r / 2;
        t.form[r].num_bias = r % 3;
    }
    trial_build(&t);
    trial_run(&t, false, "every rank its own form, weights and biases");
    trial_free(&t);
    case_free(&c);
}

/* Sums past the largest number become infinity, not the largest number and not NaN. */
static void overflow(uint64_t seed) {
    struct test_case c;
    struct trial t;

    case_default(&c, 3, seed);
    case_build(&c);
    trial_init(&t, &c);
    t.dtype = EP_F16;
    t.form[1].expanded = true;
    trial_build(&t);
    for (int r = 0; r < 3; r++) {
        const int64_t n = t.recv[r].num_rows * t.hidden;
        for (int64_t i = 0; i < n; i++) {
            ref_store(EP_F16, 30000.0f + (float)(i % 1000), t.answers[r].x + 2 * i);
        }
    }
    trial_rebuild(&t);
    trial_run(&t, false, "f16 sums that overflow");
    trial_free(&t);
    case_free(&c);
}

/* Every 16-bit number once, infinities and NaNs too, plain and times a weight. */
static void every_number(uint64_t seed, int d, bool expanded) {
    const struct form form = {.expanded = expanded, .weighted = true, .id_dtype = EP_I64};
    struct test_case c;
    struct trial t;
    char name[64];

    case_default(&c, 1, seed);
    c.max_tokens = 16;
    c.tokens = TOKENS_MAX;
    c.topk = 1;
    case_build(&c);
    trial_init(&t, &c);
    trial_form(&t, &form);
    t.dtype = dtypes[d];
    t.hidden = 8192;
    trial_build(&t);
    for (int64_t i = 0; i < t.recv[0].num_rows * t.hidden; i++) {
        const uint16_t bits = (uint16_t)(i % (8 * t.hidden));
        memcpy(t.answers[0].x + 2 * i, &bits, 2);
    }
    for (int64_t i = 0; i < t.recv[0].num_rows / 2; i++) {
        t.answers[0].weights[i] = 1;
    }
    trial_rebuild(&t);
    snprintf(name, sizeof(name), "every %s%s", dtype_names[d], expanded ? ", expanded" : "");
    trial_run(&t, false, name);
    trial_free(&t);
    case_free(&c);
}

/*
 * Each token has two answers of two terms each, and an answer is rounded before it is added: 1 + 2^-9
 * becomes 1, and 1 + 2^-8 again 1, where one rounding of all would give more.
 */
static void two_roundings(uint64_t seed) {
    const struct form form = {.expanded = true, .id_dtype = EP_I64};
    const uint16_t one = 0x3f80;
    const float small = 1.0f / 512;
    struct test_case c;
    struct trial t;

    case_default(&c, 2, seed);
    c.num_experts = c.topk = 4;
    c.tokens = TOKENS_MAX;
    case_build(&c);
    trial_init(&t, &c);
    trial_form(&t, &form);
    trial_build(&t);
    for (int r = 0; r < 2; r++) {
        for (int64_t i = 0; i < t.recv[r].num_rows * t.hidden; i++) {
            const bool first = r == 0 && i < t.recv[r].offsets[1] * t.hidden;
            ref_store(EP_BF16, first ? 1.0f : small, t.answers[r].x + 2 * i);
        }
    }
    trial_rebuild(&t);
    bool all = true;
    for (int64_t i = 0; i < c.in[0].num_tokens * t.hidden; i++) {
        all = all && memcmp(t.y[0] + 2 * i, &one, 2) == 0;
    }
    ok(all, "the reference rounds twice");
    trial_run(&t, false, "answers are rounded before they are added, a rank's own too");
    trial_free(&t);
    case_free(&c);
}

static void shapes(uint64_t seed) {
    const struct form form = {.weighted = true, .num_bias = 2, .id_dtype = EP_I64};
    const struct form expanded = {.expanded = true, .num_bias = 1, .id_dtype = EP_I64};
    struct test_case c;

    case_default(&c, 4, seed);
    c.routing = ROUTE_NOWHERE;
    run(&c, &form, 0, true, false, "tokens sent nowhere get their biases");
    case_default(&c, 4, seed);
    c.routing = ROUTE_NOWHERE;
    run(&c, &(struct form){.id_dtype = EP_I64}, 0, false, false,
        "tokens sent nowhere get zeros without biases");
    case_default(&c, 2, seed);
    c.topk = EP_MAX_TOPK;
    c.num_experts = 80;
    run(&c, &expanded, 0, true, false, "top-64, expanded");
    case_default(&c, 9, seed);
    c.num_experts = 64;
    c.topk = 32;
    c.map = MAP_RANDOM;
    run(&c, &form, 1, true, false, "nine ranks, top-32");
    case_default(&c, 4, seed);
    c.mask = true;
    c.topk = 0;
    c.weights = false;
    run(&c, &form, 0, false, false, "routed by a mask");
}

/* On GPUs, answers so long, and so few for each warp, that they are published in two parts. */
static void long_answers(uint64_t seed) {
    struct test_case c;
    struct trial t;

    case_default(&c, 2, seed);
    c.tokens = TOKENS_MAX;
    case_build(&c);
    trial_init(&t, &c);
    t.hidden = 7168;
    trial_build(&t);
    trial_run(&t, false, "two ranks, hidden 7168");
    trial_free(&t);
    case_free(&c);
}

/* Fewer answers than warps: each is cut into slices, and sent when all of those are summed. */
static void few_answers(uint64_t seed) {
    const struct form form = {
        .expanded = true, .weighted = true, .num_workers = 4, .id_dtype = EP_I64};
    struct test_case c;
    struct trial t;

    case_default(&c, 2, seed);
    c.max_tokens = 3;
    case_build(&c);
    trial_init(&t, &c);
    trial_form(&t, &form);
    t.hidden = 7168;
    t.back = true;
    trial_build(&t);
    trial_run(&t, false, "three tokens, four workers, weights back");
    trial_free(&t);
    case_free(&c);
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();

    tap_deadline(300);
    every_option(seed);
    every_rank_its_own_options(seed + 1000);
    overflow(seed + 2000);
    for (int i = 0; i < 4; i++) {
        every_number(seed + 2500 + (uint64_t)i, i % 2, i / 2);
    }
    two_roundings(seed + 2600);
    shapes(seed + 3000);
    long_answers(seed + 4000);
    few_answers(seed + 5000);
    return done_testing();
}
