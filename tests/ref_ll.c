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

/* log2 of a magnitude in 2^-16, the nearest whole one; of 0 minus infinity. */
static double log_of(uint16_t bits) {
    return rint(log2(fabs((double)ref_load(EP_BF16, &bits))) * 65536);
}

/* 2^(e * 2^-23), as kernel/ll_logfmt.h says: its error is below 2^-22, which t_ll looks at. */
static float exp_of(int e) {
    static const float c[] = {0.0018671309808269143f, 0.009017027914524078f,
                              0.05579991638660431f,   0.24016444385051727f,
                              0.6931512951850891f,    1.0f};
    const int whole = (int)floor(e / 8388608.0);
    const float z = (float)(e - whole * 8388608.0) / 8388608.0f;
    float y = 0;

    for (int i = 0; i < 6; i++) {
        y = y * z;
        y = y + c[i];
    }
    return ldexpf(y, whole);
}

/* What becomes of channel x among others of which `least` to `most` are the magnitudes. */
static float log_value(uint16_t x, uint16_t least, uint16_t most) {
    const double a = log_of(most), b = fmax(log_of(least), a - 32 * 65536);
    const float span = (float)(a - b);
    const float at = (float)(log_of(x) - b) * (510.0f / span);
    const float code = floorf(at + (1.5f - span * 2.59230064e-9f));
    if (!(code >= 1)) {
        return 0;
    }
    const float up = (code - 1) * (span * 128.0f / 510.0f);
    const float y = exp_of((int)b * 128 + (int)(up + 0.5f));
    return x & 0x8000 ? -y : y;
}

int ref_logfmt(const uint16_t *x, int64_t hidden, float *out) {
    const int64_t block = hidden % 1024 ? 512 : 1024;
    int num_encoded = 0;

    for (int64_t from = 0; from < hidden; from += block) {
        const int64_t end = from + block < hidden ? from + block : hidden;
        uint16_t least[8] = {0}, most[8] = {0};
        bool encoded = true;
        for (int64_t h = from; h < end; h++) {
            const int64_t d = (h - from) / 128;
            const uint16_t bits = x[h] & 0x7fff;
            least[d] = h % 128 == 0 || bits < least[d] ? bits : least[d];
            most[d] = bits > most[d] ? bits : most[d];
        }
        for (int64_t d = 0; d < (end - from) / 128; d++) {
            encoded = encoded && most[d] < 0x3f80 && least[d] < most[d];
        }
        for (int64_t h = from; h < end; h++) {
            const int64_t d = (h - from) / 128;
            out[h] = encoded ? log_value(x[h], least[d], most[d]) : ref_load(EP_BF16, &x[h]);
        }
        num_encoded += encoded;
    }
    return num_encoded;
}

/* The row that a rank has for selection k of the token; -1: none. Compact ones are of all selections. */
static int64_t row_of(const struct ref_recv *v, int rank, int64_t t, int k) {
    for (int64_t i = 0; i < v->num_rows; i++) {
        if (v->source[2 * i] == rank && v->source[2 * i + 1] == t &&
            (v->expanded ? v->selection[i] : 0) == k) {
            return i;
        }
    }
    return -1;
}

/* Answer n for the token: exact the row of selection n, which counts `weight` times, else what rank n has
 * summed. False: there is none. */
static bool answer(const struct ref_problem *p, int rank, int64_t t, int n,
                   const struct ref_combine *c, bool exact, float *sums, float *weight) {
    bool any = false;

    memset(sums, 0, (size_t)c->hidden * sizeof(*sums));
    *weight = 1;
    for (int r = exact ? 0 : n; r < (exact ? p->num_ranks : n + 1); r++) {
        for (int k = exact ? n : 0; k < (exact ? n + 1 : p->topk); k++) {
            const struct ref_answers *a = &c->answers[r];
            const bool chosen = !c->recv[r].expanded || p->in[rank].ids[t * p->topk + k] >= 0;
            const int64_t i = chosen ? row_of(&c->recv[r], rank, t, k) : -1;
            for (int64_t h = 0; i >= 0 && h < c->hidden; h++) {
                const float x = ref_load(c->dtype, a->x + (size_t)(i * c->hidden + h) * 2);
                const float term = a->weights && !exact ? x * a->weights[i] : x;
                sums[h] = sums[h] + term;
            }
            *weight = i >= 0 && exact && a->weights ? a->weights[i] : *weight;
            any = any || i >= 0;
        }
    }
    return any;
}

int ref_combine_ll(const struct ref_problem *p, int rank, const struct ref_combine *c,
                   bool exact, bool logfmt, uint8_t *out) {
    struct pool pool = {0};
    const size_t hidden = (size_t)c->hidden;
    float *row = pool_zero(&pool, hidden * sizeof(*row));
    float *sums = pool_zero(&pool, hidden * sizeof(*sums));
    uint16_t *y = pool_zero(&pool, hidden * sizeof(*y));
    int num_encoded = 0;

    for (int64_t t = 0; t < p->in[rank].num_tokens; t++) {
        memset(sums, 0, hidden * sizeof(*sums));
        for (int n = 0; n < (exact ? p->topk : p->num_ranks); n++) {
            float weight;
            if (!answer(p, rank, t, n, c, exact, row, &weight)) {
                continue;
            }
            for (size_t h = 0; h < hidden; h++) {
                ref_store(c->dtype, row[h], &y[h]);
                row[h] = ref_load(c->dtype, &y[h]);
            }
            num_encoded += logfmt ? ref_logfmt(y, c->hidden, row) : 0;
            for (size_t h = 0; h < hidden; h++) {
                const float term = row[h] * weight;
                sums[h] = sums[h] + term;
            }
        }
        for (size_t h = 0; h < hidden; h++) {
            ref_store(c->dtype, sums[h], out + ((size_t)t * hidden + h) * 2);
        }
    }
    pool_free(&pool);
    return num_encoded;
}
