/* SPDX-License-Identifier: MIT */
/*
 * The reference: dispatch and combine of one rank, computed the slow and obvious way from the
 * inputs of all ranks. It follows the comments of ep.h word by word, shares no code with the
 * library and decides what is right. Pure functions; results live in the caller's pool.
 *
 * Everything here is packed: rows contiguous, ids int64_t. Strides are the callers' business.
 */
#ifndef TESTS_REF_H
#define TESTS_REF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tests/pool.h"

/* What one rank puts in. */
struct ref_input {
    int64_t num_tokens;
    const int64_t *ids;  /* [T][K], or NULL when routed by the mask; others than 0..E-1: none */
    const uint8_t *mask; /* [T][R] or NULL */
    const uint8_t *x;    /* [T][row_bytes] */
    const uint8_t *scales; /* [T][scale_bytes] or NULL */
    const float *weights;  /* [T][K] or NULL */
};

struct ref_problem {
    int num_ranks;
    int num_experts;
    int topk;                   /* 0 with masks */
    const int32_t *expert_rank; /* [E] */
    const int32_t *node;        /* [R] ascending; NULL: there is one */
    size_t row_bytes;
    size_t scale_bytes;
    const struct ref_input *in; /* [R] */
};

/* What a dispatch gives one rank. Gap rows of the expanded form have source -1, weight 0. */
struct ref_recv {
    bool expanded;
    int num_local;            /* L */
    int64_t num_rows;         /* compact: rows; expanded: end of the output */
    uint8_t *x;               /* [rows][row_bytes], zero in gaps */
    uint8_t *scales;          /* [rows][scale_bytes] or NULL */
    int64_t *ids;             /* compact: [rows][K] local index or -1 */
    float *weights;           /* compact [rows][K], expanded [rows]; NULL without weights */
    int32_t *source;          /* [rows][2] */
    int32_t *selection;       /* [rows] expanded: k; compact: -1 */
    int32_t *counts;          /* [L] */
    int32_t *offsets;         /* [L+1], expanded */
    int32_t *rows_per_source; /* [R], rows of the compact form ... */
    int32_t *source_ends;     /* [R] ... and where they end */
    int32_t *expert_ends;     /* [L] */
};

/* What one rank gives to combine, for the rows of its ref_recv. */
struct ref_answers {
    uint8_t *x;          /* [rows][hidden] */
    float *weights;      /* [rows] or NULL */
    float *topk_weights; /* compact [rows][K], expanded [rows]; or NULL */
};

struct ref_combine {
    int dtype; /* EP_BF16, EP_F16, EP_F32 */
    int64_t hidden;
    const struct ref_recv *recv;       /* [R] */
    const struct ref_answers *answers; /* [R] */
};

/* The layout of one rank's routing. */
struct ref_layout {
    int32_t *tokens_per_rank;   /* [R] */
    int32_t *tokens_per_expert; /* [E] */
    uint8_t *token_in_rank;     /* [T][R] */
    int32_t *tokens_per_node;   /* [nodes] */
};

void ref_layout(struct pool *pool, const struct ref_problem *p, int rank,
                struct ref_layout *out);
void ref_dispatch(struct pool *pool, const struct ref_problem *p, int rank, bool expanded,
                  int64_t alignment, struct ref_recv *out);

/* The answers of rank's tokens: out [T][hidden], out_topk_weights [T][K] or NULL; bias[i]
 * [T][hidden] or NULL. */
void ref_combine(const struct ref_problem *p, int rank, const struct ref_combine *c,
                 const uint8_t *const bias[2], uint8_t *out, float *out_topk_weights);

/* Whether a token of rank src goes to rank dst. */
bool ref_goes_to(const struct ref_problem *p, int src, int64_t token, int dst);
/* Experts of a rank. */
int ref_num_local(const struct ref_problem *p, int rank);

/* One element of EP_BF16, EP_F16 or EP_F32 to float and back, rounded to nearest even; rounded
 * to 16 bits every NaN becomes 0x7fff, which is what GPUs make of it. */
float ref_load(int dtype, const void *from);
void ref_store(int dtype, float value, void *to);

#endif
