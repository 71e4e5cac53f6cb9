/* SPDX-License-Identifier: MIT */
/*
 * Declared in ref_ll.h. Must not become clever: casts look through all codes. It needs float arithmetic
 * without contraction, as ref.c does.
 */
#include "tests/ref_ll.h"

#include <math.h>
#include <string.h>

#include "ep.h"
#include "tests/ref.h"

float ref_from_e4m3(uint8_t code) {
    const int exponent = (code >> 3) & 15, mantissa = code & 7;
    const float magnitude = exponent ? ldexpf(1 + (float)mantissa / 8, exponent - 7)
                                     : ldexpf((float)mantissa / 8, -6);

    return code & 0x80 ? -magnitude : magnitude;
}

uint8_t ref_to_e4m3(float x) {
    static _Thread_local double
        value[0x7f]; /* of each code; 1 is never 0 once it is filled in */
    const double magnitude = fabs((double)x);
    int best = 0;

    for (int code = 0; value[1] == 0 && code < 0x7f; code++) {
        value[0x7e - code] = (double)ref_from_e4m3((uint8_t)(0x7e - code));
    }

    if (isnan(x)) {
        return 0x7f;
    }
    for (int code = 1; code < 0x7f; code++) {
        const double now = fabs(magnitude - value[code]);
        const double least = fabs(magnitude - value[best]);
        if (now < least || (now == least && code % 2 == 0)) {
            best = code;
        }
    }
    if (magnitude > 448) {
        best = 0x7e;
    }
    return (uint8_t)(best | (signbit(x) ? 0x80 : 0));
}

void ref_cast(const uint16_t x[128], bool power_of_2, uint8_t out[128], float *scale) {
    float amax = 1e-4f;

    for (int i = 0; i < 128; i++) {
        const float v = ref_load(EP_BF16, &x[i]);
        if (fabsf(v) > amax) {
            amax = fabsf(v);
        }
    }
    float by = 448.0f / amax;
    *scale = amax * (1.0f / 448.0f);
    if (power_of_2 && isinf(amax)) {
        *scale = ldexpf(1, 127);
        by = 0;
    } else if (power_of_2) {
        int exponent;
        const float fraction = frexpf(*scale, &exponent); /* 0.5 <= fraction < 1 */
        const int up = fraction == 0.5f ? exponent - 1 : exponent;
        *scale = ldexpf(1, up);
        by = ldexpf(1, -up);
    }
    for (int i = 0; i < 128; i++) {
        out[i] = ref_to_e4m3(ref_load(EP_BF16, &x[i]) * by);
    }
}

/* Adds the answer of the expert that is selection k of the token, wherever that is. */
static void add_selection(const struct ref_problem *p, int rank, int64_t t, int k,
                          const struct ref_combine *c, float *sums) {
    const int64_t id = p->in[rank].ids[t * p->topk + k];
    for (int r = 0; id >= 0 && r < p->num_ranks; r++) {
        const struct ref_recv *v = &c->recv[r];
        const struct ref_answers *a = &c->answers[r];
        for (int64_t i = 0; i < v->num_rows; i++) {
            if (v->source[2 * i] != rank || v->source[2 * i + 1] != t || v->selection[i] != k) {
                continue;
            }
            for (int64_t h = 0; h < c->hidden; h++) {
                const float x = ref_load(c->dtype, a->x + (size_t)(i * c->hidden + h) * 2);
                const float term = a->weights ? x * a->weights[i] : x;
                sums[h] = sums[h] + term;
            }
        }
    }
}

void ref_combine_exact(const struct ref_problem *p, int rank, const struct ref_combine *c,
                       uint8_t *out) {
    struct pool pool = {0};

    for (int64_t t = 0; t < p->in[rank].num_tokens; t++) {
        float *sums = pool_zero(&pool, (size_t)c->hidden * sizeof(*sums));
        for (int k = 0; k < p->topk; k++) {
            add_selection(p, rank, t, k, c, sums);
        }
        for (int64_t h = 0; h < c->hidden; h++) {
            ref_store(c->dtype, sums[h], out + (size_t)(t * c->hidden + h) * 2);
        }
    }
    pool_free(&pool);
}
