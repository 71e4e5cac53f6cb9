/* SPDX-License-Identifier: MIT */
/*
 * The arithmetic of the demo's layer. Every sum has a fixed order, so a row's result does not
 * depend on which rows are beside it: the distributed layer and the one in a single process
 * can be compared bit by bit.
 *
 * Owns the weights it generates from fixed seeds. Knows nothing of ranks but the order in which
 * their sums are added.
 */
#include "examples/demo/moe.h"

#include <math.h>
#include <stdlib.h>

#include "tools/tool.h"

#define EXPERT_FLOATS (3 * MOE_HIDDEN * MOE_INTER)
#define ROUTED_SCALE 2.5f
#define SEED 20250101u

/* Uniform with the given variance. */
static void fill(float *out, int num, uint64_t seed, double variance) {
    uint64_t state = seed;
    float scale = (float)(sqrt(3 * variance) / (double)(UINT64_C(1) << 31));
    for (int i = 0; i < num; i++) {
        out[i] = (float)(int32_t)(tool_rand(&state) >> 32) * scale;
    }
}

bool moe_create(struct moe *moe, int first, int num) {
    moe->first = first;
    moe->num = num;
    moe->router = malloc(sizeof(float) * MOE_HIDDEN * MOE_EXPERTS);
    moe->experts = malloc(sizeof(float) * EXPERT_FLOATS * (size_t)(num + 1));
    if (!moe->router || !moe->experts) {
        moe_destroy(moe);
        return false;
    }
    fill(moe->router, MOE_HIDDEN * MOE_EXPERTS, SEED, 1.0 / MOE_HIDDEN);
    for (int i = 0; i <= num; i++) {
        float *w = moe->experts + (size_t)i * EXPERT_FLOATS;
        uint64_t seed = tool_rand_hash(SEED, (uint64_t)(i < num ? first + i : MOE_SHARED));
        fill(w, 2 * MOE_HIDDEN * MOE_INTER, seed, 1.0 / MOE_HIDDEN);
        fill(w + 2 * MOE_HIDDEN * MOE_INTER, MOE_HIDDEN * MOE_INTER, ~seed, 1.0 / MOE_INTER);
    }
    return true;
}

void moe_destroy(struct moe *moe) {
    free(moe->router);
    free(moe->experts);
    *moe = (struct moe){0};
}

void moe_embed(uint64_t word, uint64_t before, uint16_t *x) {
    float here[MOE_HIDDEN];
    float there[MOE_HIDDEN];
    fill(here, MOE_HIDDEN, word, 0.8);
    fill(there, MOE_HIDDEN, before, 0.2);
    for (int i = 0; i < MOE_HIDDEN; i++) {
        x[i] = bf16_from_float(here[i] + there[i]);
    }
}

/* Indices of the k largest of n, largest first; of equals the lower index. */
static void top(const float *score, int n, int k, int *out) {
    for (int i = 0; i < k; i++) {
        int best = -1;
        for (int j = 0; j < n; j++) {
            bool taken = false;
            for (int p = 0; p < i; p++) {
                taken = taken || out[p] == j;
            }
            if (!taken && (best < 0 || score[j] > score[best])) {
                best = j;
            }
        }
        out[i] = best;
    }
}

void moe_route(const struct moe *moe, const uint16_t *x, int num, int32_t *ids,
               float *weights) {
    enum { PER_GROUP = MOE_EXPERTS / MOE_GROUPS };
    for (int t = 0; t < num; t++) {
        float score[MOE_EXPERTS] = {0};
        for (int h = 0; h < MOE_HIDDEN; h++) {
            float xh = bf16_to_float(x[(size_t)t * MOE_HIDDEN + h]);
            for (int e = 0; e < MOE_EXPERTS; e++) {
                score[e] += xh * moe->router[h * MOE_EXPERTS + e];
            }
        }
        float group[MOE_GROUPS];
        for (int g = 0; g < MOE_GROUPS; g++) {
            int best[2];
            for (int e = g * PER_GROUP; e < (g + 1) * PER_GROUP; e++) {
                score[e] = 1 / (1 + expf(-score[e]));
            }
            top(score + g * PER_GROUP, PER_GROUP, 2, best);
            group[g] = score[g * PER_GROUP + best[0]] + score[g * PER_GROUP + best[1]];
        }
        int groups[MOE_TOPK_GROUPS];
        float allowed[MOE_EXPERTS] = {0}; /* a sigmoid is above 0 */
        top(group, MOE_GROUPS, MOE_TOPK_GROUPS, groups);
        for (int i = 0; i < MOE_TOPK_GROUPS; i++) {
            memcpy(allowed + groups[i] * PER_GROUP, score + groups[i] * PER_GROUP,
                   PER_GROUP * sizeof(float));
        }
        int chosen[MOE_TOPK];
        float sum = 0;
        top(allowed, MOE_EXPERTS, MOE_TOPK, chosen);
        for (int k = 0; k < MOE_TOPK; k++) {
            sum += score[chosen[k]];
        }
        for (int k = 0; k < MOE_TOPK; k++) {
            ids[t * MOE_TOPK + k] = chosen[k];
            weights[t * MOE_TOPK + k] = score[chosen[k]] / sum * ROUTED_SCALE;
        }
    }
}

static const float *expert_weights(const struct moe *moe, int expert) {
    int index = expert == MOE_SHARED ? moe->num : expert - moe->first;
    return moe->experts + (size_t)index * EXPERT_FLOATS;
}

void moe_expert(const struct moe *moe, int expert, const uint16_t *x, int num, uint16_t *y) {
    const float *gate = expert_weights(moe, expert);
    const float *up = gate + MOE_HIDDEN * MOE_INTER;
    const float *down = up + MOE_HIDDEN * MOE_INTER;
    for (int t = 0; t < num; t++, x += MOE_HIDDEN, y += MOE_HIDDEN) {
        float g[MOE_INTER] = {0};
        float u[MOE_INTER] = {0};
        float out[MOE_HIDDEN] = {0};
        for (int h = 0; h < MOE_HIDDEN; h++) {
            float xh = bf16_to_float(x[h]);
            for (int i = 0; i < MOE_INTER; i++) {
                g[i] += xh * gate[h * MOE_INTER + i];
                u[i] += xh * up[h * MOE_INTER + i];
            }
        }
        for (int i = 0; i < MOE_INTER; i++) {
            float a = bf16_to_float(bf16_from_float(g[i] / (1 + expf(-g[i])) * u[i]));
            for (int h = 0; h < MOE_HIDDEN; h++) {
                out[h] += a * down[i * MOE_HIDDEN + h];
            }
        }
        for (int h = 0; h < MOE_HIDDEN; h++) {
            y[h] = bf16_from_float(out[h]);
        }
    }
}

/* out += weight * expert(x) in double. */
static void add_exact(const struct moe *moe, int expert, const uint16_t *x, double weight,
                      double *out) {
    const float *gate = expert_weights(moe, expert);
    const float *up = gate + MOE_HIDDEN * MOE_INTER;
    const float *down = up + MOE_HIDDEN * MOE_INTER;
    double g[MOE_INTER] = {0};
    double u[MOE_INTER] = {0};
    for (int h = 0; h < MOE_HIDDEN; h++) {
        double xh = bf16_to_float(x[h]);
        for (int i = 0; i < MOE_INTER; i++) {
            g[i] += xh * (double)gate[h * MOE_INTER + i];
            u[i] += xh * (double)up[h * MOE_INTER + i];
        }
    }
    for (int i = 0; i < MOE_INTER; i++) {
        double a = weight * g[i] / (1 + exp(-g[i])) * u[i];
        for (int h = 0; h < MOE_HIDDEN; h++) {
            out[h] += a * (double)down[i * MOE_HIDDEN + h];
        }
    }
}

/* One token as ranks sum it: each rank its experts in the order of k, then rank by rank. */
static void dense_row(const struct moe *moe, const uint16_t *x, const int32_t *ids,
                      const float *weights, int num_ranks, uint16_t *y) {
    uint16_t rows[MOE_TOPK][MOE_HIDDEN];
    float sum[MOE_HIDDEN];
    for (int k = 0; k < MOE_TOPK; k++) {
        moe_expert(moe, ids[k], x, 1, rows[k]);
    }
    moe_expert(moe, MOE_SHARED, x, 1, y);
    for (int h = 0; h < MOE_HIDDEN; h++) {
        sum[h] = bf16_to_float(y[h]);
    }
    for (int r = 0; r < num_ranks; r++) {
        float part[MOE_HIDDEN] = {0};
        bool any = false;
        for (int k = 0; k < MOE_TOPK; k++) {
            bool here = tool_expert_rank(ids[k], MOE_EXPERTS, num_ranks) == r;
            any = any || here;
            for (int h = 0; here && h < MOE_HIDDEN; h++) {
                part[h] += weights[k] * bf16_to_float(rows[k][h]);
            }
        }
        for (int h = 0; any && h < MOE_HIDDEN; h++) {
            sum[h] += bf16_to_float(bf16_from_float(part[h]));
        }
    }
    for (int h = 0; h < MOE_HIDDEN; h++) {
        y[h] = bf16_from_float(sum[h]);
    }
}

void moe_dense(const struct moe *moe, const uint16_t *x, int num_ranks, uint16_t *y,
               double *exact) {
    int32_t ids[MOE_TOPK];
    float weights[MOE_TOPK];
    moe_route(moe, x, 1, ids, weights);
    dense_row(moe, x, ids, weights, num_ranks, y);
    memset(exact, 0, sizeof(double) * MOE_HIDDEN);
    add_exact(moe, MOE_SHARED, x, 1, exact);
    for (int k = 0; k < MOE_TOPK; k++) {
        add_exact(moe, ids[k], x, (double)weights[k], exact);
    }
}
