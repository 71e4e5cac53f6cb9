/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Low-latency dispatch and combine against the reference, every byte, in one call and in halves: casts,
 * scales, maps, routings, numbers of tokens and of ranks.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/ll.h"
#include "tests/ref_ll.h"
#include "tests/tap.h"

/* Outputs for so many experts have tens of megabytes, which ThreadSanitizer looks at one by one. */
#if defined(__SANITIZE_THREAD__)
#define MANY_EXPERTS_TOKENS 1
#else
#define MANY_EXPERTS_TOKENS 4
#endif

static void forms(uint64_t seed) {
    static const uint32_t flags[] = {0, EP_LL_FP8, EP_LL_FP8 | EP_LL_SCALES_POWER_OF_2,
                                     EP_LL_FP8 | EP_LL_SCALES_POWER_OF_2};
    for (int i = 0; i < 8; i++) {
        struct ll_step s;
        char name[64];
        ll_init(&s, 2 + i % 3, seed + (uint64_t)i);
        s.flags = flags[i % 4];
        s.packed = i % 4 == 3;
        s.c.hidden = i < 4 ? 256 : 640;
        s.c.weights = i != 1;
        s.weights_now = i == 1 || i == 3;
        s.exact = i == 3 || i == 4;
        s.c.id_dtype = i % 2 ? EP_I32 : EP_I64;
        snprintf(name, sizeof(name), "%s%s%s, hidden %d", i % 4 ? "E4M3" : "bf16",
                 i % 4 > 1 ? ", powers of two" : "", s.packed ? " as bytes" : "",
                 (int)s.c.hidden);
        ll_case(&s, i == 2, name);
    }
}

/* Rows that are quantised already: bytes of odd lengths, scales of every width. */
static void opaque(uint64_t seed) {
    static const int rows[] = {EP_U8, EP_F8E4M3, EP_F8E5M2, EP_F32};
    static const int scales[] = {EP_U8, EP_I16, EP_F32, EP_BF16};
    static const int hidden[] = {208, 512, 48, 136};
    for (int i = 0; i < 4; i++) {
        struct ll_step s;
        char name[64];
        ll_init(&s, 2 + i % 3, seed + (uint64_t)i);
        s.c.row_dtype = rows[i];
        s.c.scale_dtype = scales[i];
        s.c.hidden = hidden[i];
        s.c.num_scales = i == 3 ? 0 : 1 + 6 * i;
        s.c.scale_stride = (enum case_stride)(i % NUM_STRIDES);
        s.c.tokens = i == 1 ? TOKENS_ONE : TOKENS_MIXED;
        s.weights_now = i == 1;
        s.flags = i == 2 || i == 3 ? EP_LL_COMPACT : 0;
        snprintf(name, sizeof(name), "rows as they are, %d of type %d, %d scales", hidden[i],
                 rows[i], (int)s.c.num_scales);
        ll_case(&s, false, name);
    }
}

/* So short that a cast saves nothing, and its scales come on top. */
static void short_rows(uint64_t seed) {
    struct ll_step s;
    ll_init(&s, 3, seed);
    s.c.hidden = 128;
    s.c.num_experts = 12;
    s.c.topk = 8;
    s.c.tokens = TOKENS_MAX;
    s.flags = EP_LL_FP8;
    ll_case(&s, false, "rows of 128 channels, cast");
}

/* The cast of every bf16. */
static void values(uint64_t seed) {
    for (int i = 0; i < 2; i++) {
        struct ll_step s;
        ll_init(&s, 2, seed);
        s.flags = EP_LL_FP8 | (i ? EP_LL_SCALES_POWER_OF_2 : 0);
        s.all_values = true;
        s.c.num_experts = 2;
        s.c.topk = 1;
        s.c.tokens = TOKENS_MAX;
        s.c.max_tokens = s.max_tokens = 256;
        ll_case(&s, false, i ? "every bf16 cast, powers of two" : "every bf16 cast");
    }
}

/* Rows of LogFMT with blocks that are encoded and others that are not; the last may be short. */
static void logfmt(uint64_t seed) {
    static const int hidden[] = {2048, 1280, 640, 1280, 128, 1024};
    int num_encoded = 0;
    for (int i = 0; i < 6; i++) {
        struct ll_step s;
        char name[64];
        ll_init(&s, 2 + i % 3, seed + (uint64_t)i);
        s.logfmt = true;
        s.c.hidden = hidden[i];
        s.exact = i % 2;
        s.weights_now = i % 4 > 1;
        s.c.weights = i != 2;
        s.flags = i == 4 ? EP_LL_COMPACT : 0;
        s.weights_now = s.weights_now && i != 4;
        s.c.tokens = i == 5 ? TOKENS_ONE : TOKENS_MIXED;
        snprintf(name, sizeof(name), "LogFMT%s, hidden %d", s.exact ? ", exact" : "",
                 (int)s.c.hidden);
        ll_case(&s, i == 1, name);
        num_encoded += s.num_encoded;
    }
    ok(num_encoded > 0, "blocks were encoded: %d", num_encoded);
}

/* What the reference makes of a channel: of 511 numbers the nearest, but for 2e-5 of it, or 0. */
static void log_values(uint64_t seed) {
    bool good = true;
    for (int i = 0; good && i < 2000; i++) {
        uint16_t x[128];
        float y[128];
        double most = 0, least = 1;
        const int top = i % 7 ? 0x3f7f : 0x90, most_apart = 2 + i * i / 256;
        const int apart = most_apart < top ? most_apart : top + 1;
        for (int j = 0; j < 128; j++) { /* neighbours, exponents far apart, denormals */
            const uint64_t bits = tap_rand(&seed);
            const int below = j < 2 ? j : (int)((bits >> 20 & 0x7fff) % (unsigned)apart);
            x[j] = (uint16_t)((top - below) | (int)(bits & 0x8000));
            const double v = fabs(ref_load(EP_BF16, &x[j]));
            most = v > most ? v : most;
            least = v < least ? v : least;
        }
        const double a = log2(most), b = fmax(log2(least), a - 32), step = (a - b) / 510;
        const double edge = (exp2(b) + exp2(b - step)) / 2; /* below it is 0 */
        good = ref_logfmt(x, 128, y) == 1;
        for (int j = 0; good && j < 128; j++) {
            const double v = ref_load(EP_BF16, &x[j]);
            double best = 1;
            for (int c = 0; c < 511; c++) {
                best = fmin(best, fabs(exp2(b + c * step) - fabs(v)));
            }
            good = fabs((double)y[j] - v) <= best + fabs(v) * 2e-5 ||
                   (y[j] == 0 && fabs(v) < edge * (1 + 2e-5));
            if (!good) {
                diag("%g of %g to %g became %g", v, least, most, (double)y[j]);
            }
        }
    }
    ok(good, "LogFMT's numbers are the nearest");
}

static void shapes(uint64_t seed) {
    struct ll_step s;

    ll_init(&s, 1, seed);
    ll_case(&s, false, "one rank");
    ll_init(&s, 4, seed + 1);
    s.c.tokens = TOKENS_NONE;
    ll_case(&s, false, "no tokens anywhere");
    ll_init(&s, 4, seed + 2);
    s.c.tokens = TOKENS_ONE;
    s.flags = EP_LL_FP8;
    s.exact = true;
    ll_case(&s, false, "one token on each rank, in slices");
    ll_init(&s, 5, seed + 3);
    s.c.tokens = TOKENS_MIXED;
    s.c.map = MAP_EMPTY_RANK;
    s.named_experts = true;
    s.max_tokens += 3;
    ll_case(&s, false, "tokens differ, a rank without experts, M above T");
    ll_init(&s, 3, seed + 4);
    s.c.routing = ROUTE_ONE_EXPERT;
    ll_case(&s, false, "all to one expert");
    ll_init(&s, 3, seed + 5);
    s.c.routing = ROUTE_DUPLICATES;
    s.c.map = MAP_RANDOM;
    s.exact = true;
    ll_case(&s, false, "the same experts again and again");
    for (int i = 0; i < 4; i++) {
        ll_init(&s, 3, seed + 40 + (uint64_t)i);
        s.c.routing = ROUTE_DUPLICATES;
        s.c.map = MAP_RANDOM;
        s.c.num_experts = 2;
        s.exact = i % 2;
        s.logfmt = i > 1;
        s.weights_now = i == 0;
        ll_case(&s, false, "more often than they have rows");
    }
    ll_init(&s, 4, seed + 6);
    s.c.routing = ROUTE_HOLES;
    s.c.map = MAP_UNEVEN;
    s.weights_now = s.exact = true;
    ll_case(&s, true, "holes, uneven, other weights at combine, exact");
    ll_init(&s, 2, seed + 7);
    s.c.topk = EP_MAX_TOPK;
    s.c.num_experts = 80;
    s.c.weights = false;
    s.weights_now = true;
    ll_case(&s, false, "top-64");
    ll_init(&s, 4, seed + 8);
    s.c.num_experts = 896;
    s.c.topk = 16;
    s.c.max_tokens = s.max_tokens = MANY_EXPERTS_TOKENS;
    s.c.hidden = 3584;
    s.flags = EP_LL_FP8;
    ll_case(&s, false, "896 experts, top-16, hidden 3584");
    for (int i = 0; i < 3; i++) { /* E4M3, one slice; many rows; in slices */
        ll_init(&s, 4, seed + 20 + (uint64_t)i);
        s.flags = EP_LL_COMPACT | (i != 1 ? EP_LL_FP8 : 0);
        s.c.map = i == 2 ? MAP_EMPTY_RANK : MAP_RANDOM;
        s.c.routing = i == 1 ? ROUTE_DUPLICATES : ROUTE_HOLES;
        s.c.tokens = i == 2 ? TOKENS_ONE : TOKENS_MIXED;
        s.c.weights = i != 1;
        ll_case(&s, false, i ? "one row per rank" : "one row per rank, E4M3");
    }
    ll_init(&s, 3, seed + 9);
    s.num_workers = 1;
    s.named_experts = true;
    s.c.x_stride = STRIDE_PADDED;
    s.c.weight_stride = STRIDE_SPARSE;
    s.weights_now = true;
    ll_case(&s, false, "one worker, strides");
}

int main(void) {
    gpu_program();
    const uint64_t seed = tap_seed();

    tap_deadline(120);
    forms(seed);
    opaque(seed + 50);
    short_rows(seed);
    values(seed + 60);
    logfmt(seed + 80);
    log_values(seed + 90);
    shapes(seed + 100);
    return done_testing();
}
