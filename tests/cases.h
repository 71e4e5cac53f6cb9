/* SPDX-License-Identifier: MIT */
/*
 * Test cases: shapes, expert maps, routings and data of all ranks, from a seed. A case is set
 * up by filling in the shape (or case_random), then case_build makes the data: packed for the
 * reference, and as tensors with the strides asked for, for the library. Built once, before the
 * ranks start; read-only from then on, so ranks may be threads or forked processes.
 */
#ifndef TESTS_CASES_H
#define TESTS_CASES_H

#include "ep.h"
#include "tests/pool.h"
#include "tests/ref.h"

enum case_map {
    MAP_EVEN,       /* the default one; expert_rank is NULL in the configuration */
    MAP_UNEVEN,     /* contiguous, blocks of random lengths */
    MAP_RANDOM,     /* any rank for any expert */
    MAP_EMPTY_RANK, /* random, and one rank holds none */
    NUM_MAPS
};

enum case_tokens {
    TOKENS_MAX,   /* max_tokens on every rank */
    TOKENS_MIXED, /* any number on each rank, 0 and the maximum among them */
    TOKENS_ONE,
    TOKENS_NONE,
    NUM_TOKENS
};

enum case_routing {
    ROUTE_UNIFORM,    /* K different experts */
    ROUTE_ONE_EXPERT, /* all tokens to one, nothing else */
    ROUTE_ONE_RANK,   /* all selections among the experts of one rank */
    ROUTE_HOLES,      /* uniform, a third of it -1 */
    ROUTE_NOWHERE,    /* all -1 */
    ROUTE_DUPLICATES, /* the same few experts again and again within a token */
    ROUTE_GROUPS,     /* uniform in 4 of 8 groups of experts */
    ROUTE_SKEWED,     /* low ids far more often */
    NUM_ROUTINGS
};

/* How a matrix lies in memory. */
enum case_stride {
    STRIDE_PACKED,
    STRIDE_PADDED,  /* row-major, rows 32 bytes or 2 elements apart, whichever is more */
    STRIDE_COLUMNS, /* column-major */
    STRIDE_SPARSE,  /* column-major, every third element */
    NUM_STRIDES
};

struct test_case {
    /* The shape: set by the test, case_default or case_random. */
    uint64_t seed;      /* of map, tokens and routing */
    uint64_t data_seed; /* of rows, scales and weights */
    int num_ranks, num_experts, max_tokens, topk;
    enum case_map map;
    enum case_tokens tokens;
    enum case_routing routing;
    bool mask; /* routed by masks; topk is 0 then */
    int row_dtype;
    int64_t hidden; /* elements of row_dtype */
    int scale_dtype;
    int64_t num_scales;
    enum case_stride scale_stride, id_stride, weight_stride, mask_stride;
    enum case_stride x_stride; /* STRIDE_PACKED or STRIDE_PADDED */
    int id_dtype;
    bool weights;

    /* The data: made by case_build. */
    struct pool pool;
    struct ref_problem problem;
    struct ref_input *in;           /* [R] */
    int32_t *expert_rank;           /* [E] */
    struct ep_tensor *ids, *mask_t; /* [R]; those that do not exist have dtype 0 */
    struct ep_tensor *x, *scales, *topk_weights;
};

/* A small, plain case: bf16, no scales, weights, uniform routing, even map, packed. */
void case_default(struct test_case *c, int num_ranks, uint64_t seed);
/* Anything the header allows, of a size that takes milliseconds. */
void case_random(struct test_case *c, uint64_t seed);
void case_build(struct test_case *c);
void case_free(struct test_case *c);
/* One line that says what the case is. */
void case_describe(const struct test_case *c, char *text, size_t bytes);
/* Points `routing` at the ids or the mask of a rank, and names the experts. */
void case_routing(const struct test_case *c, int rank, struct ep_routing *routing);

/* Finite numbers: zeros of both signs, denormals, close and far exponents; sums of up to 64 of
 * them times such a number overflow neither float32 nor, in practice, f16. */
void case_fill_finite(int dtype, void *data, int64_t n, uint64_t *state);
/* One such float32, at most 8 in magnitude, never zero. */
float case_weight(uint64_t *state);
void case_fill_bits(void *data, size_t bytes, uint64_t *state);
/* A number in 0..n-1. */
int64_t case_rand(uint64_t *state, int64_t n);

/* A tensor of the given stride holding a copy of packed[rows][cols], in memory just long
 * enough (NULL if it has no element); with packed NULL the elements are 0xA5. */
struct ep_tensor case_tensor(struct pool *pool, int dtype, const void *packed, int64_t rows,
                             int64_t cols, enum case_stride stride);

#endif
