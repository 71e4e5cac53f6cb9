/* SPDX-License-Identifier: MIT */
/*
 * The layer that `ep demo` computes: a Mixture-of-Experts layer of DeepSeek-V3's shape with
 * narrower matrices. Rows are bfloat16, sums float32; a result is rounded where a GPU would.
 */
#ifndef EXAMPLES_DEMO_MOE_H
#define EXAMPLES_DEMO_MOE_H

#include <stdbool.h>
#include <stdint.h>

enum {
    MOE_HIDDEN = 256, /* DeepSeek-V3: 7168 */
    MOE_INTER = 64,   /* width of an expert; DeepSeek-V3: 2048 */
    MOE_EXPERTS = 256,
    MOE_TOPK = 8,
    MOE_GROUPS = 8,
    MOE_TOPK_GROUPS = 4,
    MOE_SHARED = MOE_EXPERTS /* the number of the shared expert */
};

/* Weights of the router, of experts first .. first + num - 1, and of the shared expert. */
struct moe {
    int first;
    int num;
    float *router;  /* [hidden][experts] */
    float *experts; /* [num + 1] x (gate and up [hidden][inter], down [inter][hidden]) */
};

bool moe_create(struct moe *moe, int first, int num);
void moe_destroy(struct moe *moe);

/* The input row of a word that follows another. */
void moe_embed(uint64_t word, uint64_t before, uint16_t *x);
/* ids and weights [num][MOE_TOPK] of the rows x [num][hidden]. */
void moe_route(const struct moe *moe, const uint16_t *x, int num, int32_t *ids, float *weights);
/* y = expert(x) for num rows; y may be x. */
void moe_expert(const struct moe *moe, int expert, const uint16_t *x, int num, uint16_t *y);

/* The whole layer for one token in this process: into y, rounded where num_ranks ranks round
 * and in their order; into exact in double, rounded nowhere. All weights must be here. */
void moe_dense(const struct moe *moe, const uint16_t *x, int num_ranks, uint16_t *y,
               double *exact);

#endif
