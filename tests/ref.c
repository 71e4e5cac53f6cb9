/* SPDX-License-Identifier: MIT */
/*
 * The reference declared in ref.h: plain loops in the order the header names. Must not become
 * clever: whoever doubts the library has to be able to check this file by eye. It needs float
 * arithmetic without contraction, which -std=c11 (gcc) or -ffp-contract=off (clang) gives.
 */
#include "tests/ref.h"

#include <string.h>

#include "ep.h"

static int owner(const struct ref_problem *p, int64_t id) {
    return id >= 0 && id < p->num_experts ? p->expert_rank[id] : -1;
}

bool ref_goes_to(const struct ref_problem *p, int src, int64_t token, int dst) {
    const struct ref_input *in = &p->in[src];

    if (in->mask) {
        return in->mask[token * p->num_ranks + dst] != 0;
    }
    for (int k = 0; k < p->topk; k++) {
        if (owner(p, in->ids[token * p->topk + k]) == dst) {
            return true;
        }
    }
    return false;
}

int ref_num_local(const struct ref_problem *p, int rank) {
    int n = 0;

    for (int e = 0; e < p->num_experts; e++) {
        n += p->expert_rank[e] == rank;
    }
    return n;
}

/* The index of an expert among those of its rank. */
static int local_index(const struct ref_problem *p, int64_t expert) {
    int n = 0;

    for (int64_t e = 0; e < expert; e++) {
        n += p->expert_rank[e] == p->expert_rank[expert];
    }
    return n;
}

void ref_layout(struct pool *pool, const struct ref_problem *p, int rank,
                struct ref_layout *out) {
    const struct ref_input *in = &p->in[rank];
    const size_t ranks = (size_t)p->num_ranks;

    out->tokens_per_rank = pool_zero(pool, ranks * 4);
    out->tokens_per_expert = pool_zero(pool, (size_t)p->num_experts * 4);
    out->token_in_rank = pool_zero(pool, (size_t)in->num_tokens * ranks);
    out->tokens_per_node = pool_zero(pool, ranks * 4);
    for (int64_t t = 0; t < in->num_tokens; t++) {
        int last = -1; /* the node that it was counted for */
        for (int r = 0; r < p->num_ranks; r++) {
            const bool goes = ref_goes_to(p, rank, t, r);
            const int node = p->node ? p->node[r] : 0;
            out->token_in_rank[t * p->num_ranks + r] = goes;
            out->tokens_per_rank[r] += goes;
            out->tokens_per_node[node] += goes && node != last;
            last = goes ? node : last;
        }
        for (int k = 0; in->ids && k < p->topk; k++) {
            const int64_t id = in->ids[t * p->topk + k];
            if (owner(p, id) >= 0) {
                out->tokens_per_expert[id]++;
            }
        }
    }
}

/* ---- dispatch -------------------------------------------------------------------------- */

/* Fills in the payload of row i from a source token. */
static void copy_row(const struct ref_problem *p, struct ref_recv *v, int64_t i, int src,
                     int64_t token) {
    const struct ref_input *in = &p->in[src];

    memcpy(v->x + (size_t)i * p->row_bytes, in->x + (size_t)token * p->row_bytes, p->row_bytes);
    if (v->scales) {
        memcpy(v->scales + (size_t)i * p->scale_bytes,
               in->scales + (size_t)token * p->scale_bytes, p->scale_bytes);
    }
    v->source[2 * i] = src;
    v->source[2 * i + 1] = (int32_t)token;
}

static void compact_rows(const struct ref_problem *p, int rank, struct ref_recv *v) {
    int64_t i = 0;

    for (int src = 0; src < p->num_ranks; src++) {
        const struct ref_input *in = &p->in[src];
        for (int64_t t = 0; t < in->num_tokens; t++) {
            if (!ref_goes_to(p, src, t, rank)) {
                continue;
            }
            copy_row(p, v, i, src, t);
            v->selection[i] = -1;
            for (int k = 0; k < p->topk; k++) {
                const int64_t id = in->ids[t * p->topk + k];
                const bool mine = owner(p, id) == rank;
                v->ids[i * p->topk + k] = mine ? local_index(p, id) : -1;
                if (v->weights) {
                    v->weights[i * p->topk + k] = mine ? in->weights[t * p->topk + k] : 0;
                }
            }
            i++;
        }
    }
}

/* One local expert's group, from row i on; returns the row after it. */
static int64_t expert_group(const struct ref_problem *p, int64_t expert, struct ref_recv *v,
                            int64_t i) {
    for (int src = 0; src < p->num_ranks; src++) {
        const struct ref_input *in = &p->in[src];
        for (int64_t t = 0; t < in->num_tokens; t++) {
            for (int k = 0; k < p->topk; k++) {
                if (in->ids[t * p->topk + k] != expert) {
                    continue;
                }
                copy_row(p, v, i, src, t);
                v->selection[i] = k;
                if (v->weights) {
                    v->weights[i] = in->weights[t * p->topk + k];
                }
                i++;
            }
        }
    }
    return i;
}

static void count(const struct ref_problem *p, int rank, int64_t alignment,
                  struct ref_recv *v) {
    int64_t end = 0;

    for (int src = 0; src < p->num_ranks; src++) {
        for (int64_t t = 0; t < p->in[src].num_tokens; t++) {
            v->rows_per_source[src] += ref_goes_to(p, src, t, rank);
            for (int k = 0; k < p->topk; k++) {
                const int64_t id = p->in[src].ids[t * p->topk + k];
                if (owner(p, id) == rank) {
                    v->counts[local_index(p, id)]++;
                }
            }
        }
        v->num_rows += v->rows_per_source[src];
        v->source_ends[src] = (int32_t)v->num_rows;
    }
    for (int e = 0; e < v->num_local; e++) {
        v->offsets[e] = (int32_t)end;
        end += (v->counts[e] + alignment - 1) / alignment * alignment;
        v->expert_ends[e] = v->expanded ? v->offsets[e] + v->counts[e] : (int32_t)end;
    }
    if (v->expanded) {
        v->offsets[v->num_local] = (int32_t)end;
        v->num_rows = end;
    }
}

void ref_dispatch(struct pool *pool, const struct ref_problem *p, int rank, bool expanded,
                  int64_t alignment, struct ref_recv *out) {
    struct ref_recv v = {.expanded = expanded, .num_local = ref_num_local(p, rank)};
    size_t rows, per_row;
    int local = 0;

    v.counts = pool_zero(pool, (size_t)v.num_local * 4);
    v.offsets = pool_zero(pool, (size_t)(v.num_local + 1) * 4);
    v.rows_per_source = pool_zero(pool, (size_t)p->num_ranks * 4);
    v.source_ends = pool_zero(pool, (size_t)p->num_ranks * 4);
    v.expert_ends = pool_zero(pool, (size_t)v.num_local * 4);
    count(p, rank, alignment, &v);
    rows = (size_t)v.num_rows;
    per_row = expanded ? 1 : (size_t)p->topk;
    v.x = pool_zero(pool, rows * p->row_bytes);
    v.scales = p->scale_bytes ? pool_zero(pool, rows * p->scale_bytes) : NULL;
    v.ids = expanded ? NULL : pool_zero(pool, rows * per_row * 8);
    v.weights = p->in[0].weights ? pool_zero(pool, rows * per_row * 4) : NULL;
    v.source = pool_fill(pool, rows * 8, 0xFF);
    v.selection = pool_fill(pool, rows * 4, 0xFF);
    if (!expanded) {
        compact_rows(p, rank, &v);
    }
    for (int e = 0; expanded && e < p->num_experts; e++) {
        if (p->expert_rank[e] == rank) {
            expert_group(p, e, &v, v.offsets[local++]);
        }
    }
    *out = v;
}

/* ---- combine: every sum is float32 from +0 on, so a lone -0 becomes +0 ------------------- */

/* The row of (source rank, token, selection) at a receiver, -1 if there is none. */
static int64_t find_row(const struct ref_recv *v, int src, int64_t token, int k) {
    for (int64_t i = 0; i < v->num_rows; i++) {
        if (v->source[2 * i] == src && v->source[2 * i + 1] == token && v->selection[i] == k) {
            return i;
        }
    }
    return -1;
}

/* y_r of the header for one element: rows[] are the rows of the token at the rank. */
static float rank_answer(const struct ref_combine *c, int r, const int64_t *rows, int num_rows,
                         int64_t h, size_t elem) {
    const struct ref_answers *a = &c->answers[r];
    float sum = 0;
    uint8_t rounded[4];

    for (int i = 0; i < num_rows; i++) {
        const float x = ref_load(c->dtype, a->x + (size_t)(rows[i] * c->hidden + h) * elem);
        const float term = a->weights ? x * a->weights[rows[i]] : x;
        sum = sum + term;
    }
    ref_store(c->dtype, sum, rounded);
    return ref_load(c->dtype, rounded);
}

/* The rows of a token at rank r in the order of their k; returns how many. */
static int token_rows(const struct ref_problem *p, const struct ref_recv *v, int src,
                      int64_t token, int r, int64_t *rows) {
    int n = 0;

    if (!ref_goes_to(p, src, token, r)) {
        return 0;
    }
    if (!v->expanded) {
        rows[0] = find_row(v, src, token, -1);
        return 1;
    }
    for (int k = 0; k < p->topk; k++) {
        if (owner(p, p->in[src].ids[token * p->topk + k]) == r) {
            rows[n++] = find_row(v, src, token, k);
        }
    }
    return n;
}

static void weights_back(const struct ref_problem *p, const struct ref_combine *c, int r,
                         const int64_t *rows, int num_rows, float *sums) {
    const struct ref_answers *a = &c->answers[r];

    for (int k = 0; num_rows && k < p->topk && !c->recv[r].expanded; k++) {
        sums[k] += a->topk_weights[rows[0] * p->topk + k];
    }
    for (int i = 0; i < num_rows && c->recv[r].expanded; i++) {
        sums[c->recv[r].selection[rows[i]]] += a->topk_weights[rows[i]];
    }
}

/* The sum of a node's ranks, rounded, joins those of the nodes before; and begins anew. */
static void add_node(const struct ref_combine *c, float *node_sums, float *sums, int topk,
                     float *node_back, float *back) {
    for (int64_t h = 0; h < c->hidden; h++) {
        uint8_t rounded[4];
        ref_store(c->dtype, node_sums[h], rounded);
        sums[h] += ref_load(c->dtype, rounded);
        node_sums[h] = 0;
    }
    for (int k = 0; k < topk; k++) {
        back[k] += node_back[k];
        node_back[k] = 0;
    }
}

void ref_combine(const struct ref_problem *p, int rank, const struct ref_combine *c,
                 const uint8_t *const bias[2], uint8_t *out, float *out_topk_weights) {
    const size_t elem = c->dtype == EP_F32 ? 4 : 2;
    struct pool pool = {0};
    float *sums = pool_zero(&pool, (size_t)c->hidden * sizeof(*sums));
    float *node_sums = pool_zero(&pool, (size_t)c->hidden * sizeof(*sums));

    for (int64_t t = 0; t < p->in[rank].num_tokens; t++) {
        float back[EP_MAX_TOPK] = {0}, node_back[EP_MAX_TOPK] = {0};
        memset(node_sums, 0, (size_t)c->hidden * sizeof(*sums));
        memset(sums, 0, (size_t)c->hidden * sizeof(*sums));
        for (int b = 0; b < 2; b++) {
            for (int64_t h = 0; bias[b] && h < c->hidden; h++) {
                sums[h] += ref_load(c->dtype, bias[b] + (size_t)(t * c->hidden + h) * elem);
            }
        }
        for (int r = 0; r < p->num_ranks; r++) {
            int64_t rows[EP_MAX_TOPK];
            const int n = token_rows(p, &c->recv[r], rank, t, r, rows);
            for (int64_t h = 0; n && h < c->hidden; h++) {
                (p->node ? node_sums : sums)[h] += rank_answer(c, r, rows, n, h, elem);
            }
            if (out_topk_weights) {
                weights_back(p, c, r, rows, n, p->node ? node_back : back);
            }
            if (p->node && (r + 1 == p->num_ranks || p->node[r] != p->node[r + 1])) {
                add_node(c, node_sums, sums, p->topk, node_back, back);
            }
        }
        for (int64_t h = 0; h < c->hidden; h++) {
            ref_store(c->dtype, sums[h], out + (size_t)(t * c->hidden + h) * elem);
        }
        for (int k = 0; out_topk_weights && k < p->topk; k++) {
            out_topk_weights[t * p->topk + k] = back[k];
        }
    }
    pool_free(&pool);
}

/* ---- numbers --------------------------------------------------------------------------- */

static float float_of(uint32_t bits) {
    float f;

    memcpy(&f, &bits, 4);
    return f;
}

static uint32_t bits_of(float f) {
    uint32_t bits;

    memcpy(&bits, &f, 4);
    return bits;
}

static float load_f16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31;
    const uint32_t mantissa = h & 0x3FF;

    if (exponent == 31) {
        return float_of(sign | 0x7F800000u | mantissa << 13);
    }
    if (exponent == 0) { /* mantissa units of 2^-24: exact */
        const float value = (float)mantissa * 0x1p-24f;
        return float_of(sign | bits_of(value));
    }
    return float_of(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

static uint16_t store_f16(float f) {
    const uint32_t bits = bits_of(f);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const int exponent = (int)(bits >> 23 & 255) - 127 + 15; /* as f16 would bias it */
    const uint32_t fraction = bits & 0x7FFFFF;
    const uint32_t mantissa = fraction | 0x800000;
    /* 13 bits too many, and one more for each power of two below the smallest normal number */
    const int shift = exponent >= 1 ? 13 : 14 - exponent;
    uint32_t kept, rest;

    if (exponent == 255 - 127 + 15) {
        return fraction ? 0x7FFF : (uint16_t)(sign | 0x7C00);
    }
    if (exponent >= 31) {
        return sign | 0x7C00;
    }
    if (shift > 24) { /* under half of the smallest denormal */
        return sign;
    }
    kept = mantissa >> shift;
    rest = mantissa & ((1u << shift) - 1);
    if (rest > 1u << (shift - 1) || (rest == 1u << (shift - 1) && (kept & 1))) {
        kept++; /* may carry into the exponent, up to infinity, which is right */
    }
    return (uint16_t)(sign | (exponent >= 1 ? ((uint32_t)(exponent - 1) << 10) + kept : kept));
}

static uint16_t store_bf16(float f) {
    const uint32_t bits = bits_of(f);
    const uint32_t rest = bits & 0xFFFF;
    uint32_t kept = bits >> 16;

    if ((bits & 0x7FFFFFFF) > 0x7F800000) {
        return 0x7FFF;
    }
    if (rest > 0x8000 || (rest == 0x8000 && (kept & 1))) {
        kept++;
    }
    return (uint16_t)kept;
}

float ref_load(int dtype, const void *from) {
    uint16_t half;
    float f;

    if (dtype == EP_F32) {
        memcpy(&f, from, 4);
        return f;
    }
    memcpy(&half, from, 2);
    return dtype == EP_F16 ? load_f16(half) : float_of((uint32_t)half << 16);
}

void ref_store(int dtype, float value, void *to) {
    const uint16_t half = dtype == EP_F16 ? store_f16(value) : store_bf16(value);

    if (dtype == EP_F32) {
        memcpy(to, &value, 4);
    } else {
        memcpy(to, &half, 2);
    }
}
