/* SPDX-License-Identifier: MIT */
/*
 * The case generator declared in cases.h: all that is random in a case comes from its two
 * seeds. Routing, tensors and numbers; no rank is involved.
 */
#include "tests/cases.h"

#include <stdio.h>
#include <string.h>

#include "tests/tap.h"
#include "tests/world.h"

int64_t case_rand(uint64_t *state, int64_t n) {
    return (int64_t)(tap_rand(state) % (uint64_t)n);
}

/* ---- numbers --------------------------------------------------------------------------- */

void case_fill_bits(void *data, size_t bytes, uint64_t *state) {
    uint8_t *to = data;

    while (bytes) {
        const uint64_t bits = tap_rand(state);
        const size_t n = bytes < 8 ? bytes : 8;
        memcpy(to, &bits, n);
        to += n;
        bytes -= n;
    }
}

/* A random sign and mantissa of a float32 with the given power of two. */
static float with_exponent(int exponent, uint64_t *state) {
    const uint32_t bits = ((uint32_t)tap_rand(state) & 0x807FFFFFu) | (uint32_t)(exponent + 127)
                                                                          << 23;
    float f;

    memcpy(&f, &bits, 4);
    return f;
}

float case_weight(uint64_t *state) {
    return with_exponent((int)case_rand(state, 8) - 5, state);
}

void case_fill_finite(int dtype, void *data, int64_t n, uint64_t *state) {
    const size_t elem = ep_dtype_bytes(dtype);
    const int mantissa = dtype == EP_F32 ? 23 : dtype == EP_F16 ? 10 : 7;

    for (int64_t i = 0; i < n; i++) {
        uint8_t *to = (uint8_t *)data + (size_t)i * elem;
        const uint64_t bits = tap_rand(state);
        uint32_t small = (uint32_t)(bits & ((1u << mantissa) - 1));
        const int far =
            dtype == EP_F16 ? (int)case_rand(state, 20) - 14 : (int)case_rand(state, 220) - 120;
        switch (bits >> 60) {
        case 0: /* a zero or a denormal, by its bits: sign on top, exponent zero */
            small = bits & (1u << 30) ? 0 : small;
            small |= bits & (1u << 31) ? 1u << (8 * elem - 1) : 0;
            memcpy(to, &small, elem); /* little endian, like every platform of libep */
            break;
        case 1:
            ref_store(dtype, with_exponent(far, state), to);
            break;
        default:
            ref_store(dtype, with_exponent((int)case_rand(state, 5) - 2, state), to);
        }
    }
}

/* ---- tensors --------------------------------------------------------------------------- */

struct ep_tensor case_tensor(struct pool *pool, int dtype, const void *packed, int64_t rows,
                             int64_t cols, enum case_stride stride) {
    const size_t elem = ep_dtype_bytes(dtype);
    const int64_t pad = elem < 16 ? 32 / (int64_t)elem : 2;
    struct ep_tensor t = EP_TENSOR_INIT;
    size_t bytes = 0;

    ep_tensor_2d(&t, dtype, NULL, rows, cols);
    t.stride[0] = stride == STRIDE_PACKED    ? cols
                  : stride == STRIDE_PADDED  ? cols + pad
                  : stride == STRIDE_COLUMNS ? 1
                                             : 3;
    t.stride[1] = stride == STRIDE_COLUMNS ? rows : stride == STRIDE_SPARSE ? 3 * rows + 1 : 1;
    if (rows && cols) {
        bytes = (size_t)((rows - 1) * t.stride[0] + (cols - 1) * t.stride[1] + 1) * elem;
    }
    t.data = bytes ? pool_fill(pool, bytes, 0xA5) : NULL;
    for (int64_t i = 0; packed && i < rows * cols; i++) {
        const int64_t at = i / cols * t.stride[0] + i % cols * t.stride[1];
        memcpy((uint8_t *)t.data + (size_t)at * elem,
               (const uint8_t *)packed + (size_t)i * elem, elem);
    }
    return t;
}

/* Ids in their type; the reference keeps them as int64_t. */
static struct ep_tensor id_tensor(struct test_case *c, const int64_t *ids, int64_t tokens) {
    const int64_t n = tokens * c->topk;
    int32_t *narrow = pool_zero(&c->pool, (size_t)n * 4);

    for (int64_t i = 0; i < n; i++) {
        narrow[i] = (int32_t)ids[i];
    }
    return case_tensor(&c->pool, c->id_dtype, c->id_dtype == EP_I64 ? (void *)ids : narrow,
                       tokens, c->topk, c->id_stride);
}

/* ---- routing --------------------------------------------------------------------------- */

static void build_map(struct test_case *c, uint64_t *s) {
    const int e = c->num_experts, r = c->num_ranks;
    const int empty = (int)case_rand(s, r);
    int at = 0;

    c->expert_rank = pool_zero(&c->pool, (size_t)e * 4);
    for (int i = 0; i < r; i++) { /* contiguous blocks: even or of random lengths */
        int n = e / r + (i < e % r);
        if (c->map != MAP_EVEN) {
            n = i == r - 1 ? e - at : (int)case_rand(s, e - at + 1);
        }
        for (int j = 0; j < n; j++) {
            c->expert_rank[at++] = i;
        }
    }
    for (int i = 0; c->map >= MAP_RANDOM && i < e; i++) {
        int rank = (int)case_rand(s, r);
        if (c->map == MAP_EMPTY_RANK && rank == empty && r > 1) {
            rank = (rank + 1) % r;
        }
        c->expert_rank[i] = rank;
    }
}

/* The experts a token may choose from; returns how many. */
static int candidates(const struct test_case *c, int favourite, int32_t *out, uint64_t *s) {
    bool group[8] = {false};
    int n = 0;

    for (int i = 0; i < 4; i++) { /* 4 of 8, each once */
        int g = (int)case_rand(s, 8);
        while (group[g]) {
            g = (g + 1) % 8;
        }
        group[g] = true;
    }
    for (int e = 0; e < c->num_experts; e++) {
        const bool chosen =
            c->routing == ROUTE_ONE_RANK     ? c->expert_rank[e] == c->expert_rank[favourite]
            : c->routing == ROUTE_ONE_EXPERT ? e == favourite
            : c->routing == ROUTE_GROUPS     ? group[(int64_t)e * 8 / c->num_experts]
            : c->routing == ROUTE_NOWHERE    ? false
                                             : true;
        if (chosen) {
            out[n++] = e;
        }
    }
    return n;
}

/* K ids of one token, without repetition; -1 where the candidates run out. */
static void choose(const struct test_case *c, int favourite, int64_t *ids, uint64_t *s) {
    int32_t pick[4096];
    int n = candidates(c, favourite, pick, s);

    for (int k = 0; k < c->topk; k++) {
        int64_t i;
        ids[k] = -1;
        if (n == 0 || (c->routing == ROUTE_HOLES && case_rand(s, 3) == 0)) {
            continue;
        }
        i = case_rand(s, n);
        if (c->routing == ROUTE_SKEWED) {
            i = i * i / n * i / n;
        }
        if (c->routing == ROUTE_DUPLICATES) {
            ids[k] = pick[(favourite + case_rand(s, 3)) % n];
            continue;
        }
        ids[k] = pick[i];
        memmove(&pick[i], &pick[i + 1], (size_t)(n - i - 1) * 4);
        n--;
    }
}

static void build_routing(struct test_case *c, int rank, int64_t tokens, int favourite,
                          uint64_t *s) {
    struct ref_input *in = &c->in[rank];

    if (c->mask) {
        const int64_t n = tokens * c->num_ranks;
        uint8_t *mask = pool_zero(&c->pool, (size_t)n);
        for (int64_t i = 0; i < n && c->routing != ROUTE_NOWHERE; i++) {
            mask[i] = (uint8_t)(case_rand(s, 3) ? 0 : 1 + case_rand(s, 255));
        }
        in->mask = mask;
        c->mask_t[rank] =
            case_tensor(&c->pool, EP_U8, mask, tokens, c->num_ranks, c->mask_stride);
    } else {
        int64_t *ids = pool_zero(&c->pool, (size_t)(tokens * c->topk) * 8);
        for (int64_t t = 0; t < tokens; t++) {
            const int token_favourite = (int)case_rand(s, c->num_experts);
            choose(c, c->routing == ROUTE_DUPLICATES ? token_favourite : favourite,
                   ids + t * c->topk, s);
        }
        in->ids = ids;
        c->ids[rank] = id_tensor(c, ids, tokens);
    }
}

static void build_data(struct test_case *c, int rank, uint64_t *s) {
    struct ref_input *in = &c->in[rank];
    const int64_t tokens = in->num_tokens;
    uint8_t *x = pool_zero(&c->pool, (size_t)tokens * c->problem.row_bytes);

    case_fill_bits(x, (size_t)tokens * c->problem.row_bytes, s);
    in->x = x;
    c->x[rank] = case_tensor(&c->pool, c->row_dtype, x, tokens, c->hidden, c->x_stride);
    if (c->num_scales) {
        uint8_t *scales = pool_zero(&c->pool, (size_t)tokens * c->problem.scale_bytes);
        case_fill_bits(scales, (size_t)tokens * c->problem.scale_bytes, s);
        in->scales = scales;
        c->scales[rank] = case_tensor(&c->pool, c->scale_dtype, scales, tokens, c->num_scales,
                                      c->scale_stride);
    }
    if (c->weights) {
        float *weights = pool_zero(&c->pool, (size_t)(tokens * c->topk) * 4);
        for (int64_t i = 0; i < tokens * c->topk; i++) {
            weights[i] = case_weight(s);
        }
        in->weights = weights;
        c->topk_weights[rank] =
            case_tensor(&c->pool, EP_F32, weights, tokens, c->topk, c->weight_stride);
    }
}

static int64_t num_tokens(const struct test_case *c, int rank, uint64_t *s) {
    const int64_t any = case_rand(s, c->max_tokens + 1);

    switch (c->tokens) {
    case TOKENS_MAX:
        return c->max_tokens;
    case TOKENS_MIXED:
        return rank == 0 && c->num_ranks > 1 ? 0 : rank == 1 ? c->max_tokens : any;
    case TOKENS_ONE:
        return 1;
    default:
        return 0;
    }
}

void case_build(struct test_case *c) {
    const size_t ranks = (size_t)c->num_ranks;
    uint64_t route = c->seed, data = c->data_seed;
    char sizes[256];
    int favourite;

    memset(&c->pool, 0, sizeof(c->pool));
    build_map(c, &route);
    c->in = pool_zero(&c->pool, ranks * sizeof(*c->in));
    c->ids = pool_zero(&c->pool, ranks * sizeof(*c->ids));
    c->mask_t = pool_zero(&c->pool, ranks * sizeof(*c->ids));
    c->x = pool_zero(&c->pool, ranks * sizeof(*c->ids));
    c->scales = pool_zero(&c->pool, ranks * sizeof(*c->ids));
    c->topk_weights = pool_zero(&c->pool, ranks * sizeof(*c->ids));
    c->problem = (struct ref_problem){
        .num_ranks = c->num_ranks,
        .num_experts = c->num_experts,
        .topk = c->topk,
        .expert_rank = c->expert_rank,
        .row_bytes = (size_t)c->hidden * ep_dtype_bytes(c->row_dtype),
        .scale_bytes =
            c->num_scales ? (size_t)c->num_scales * ep_dtype_bytes(c->scale_dtype) : 0,
        .in = c->in,
    };
    int32_t *node = pool_zero(&c->pool, ranks * sizeof(*node));
    if (world_nodes(c->num_ranks, sizes, sizeof(sizes), node)) {
        c->problem.node = node;
    }
    favourite = (int)case_rand(&route, c->num_experts);
    for (int r = 0; r < c->num_ranks; r++) {
        c->in[r].num_tokens = num_tokens(c, r, &route);
        build_routing(c, r, c->in[r].num_tokens, favourite, &route);
        build_data(c, r, &data);
    }
}

void case_free(struct test_case *c) {
    pool_free(&c->pool);
}

/* ---- shapes ---------------------------------------------------------------------------- */

void case_default(struct test_case *c, int num_ranks, uint64_t seed) {
    *c = (struct test_case){
        .seed = seed,
        .data_seed = seed ^ 0xD47A,
        .num_ranks = num_ranks,
        .num_experts = 4 * num_ranks,
        .max_tokens = 40,
        .topk = 4,
        .tokens = TOKENS_MIXED,
        .row_dtype = EP_BF16,
        .hidden = 64,
        .id_dtype = EP_I64,
        .weights = true,
    };
}

static const int row_dtypes[] = {EP_BF16, EP_F16, EP_F32, EP_F8E4M3, EP_F8E5M2,
                                 EP_U8,   EP_I16, EP_I32, EP_I64};
static const int scale_dtypes[] = {EP_U8, EP_F8E4M3, EP_BF16, EP_F16, EP_I16, EP_F32, EP_I32};

void case_random(struct test_case *c, uint64_t seed) {
    uint64_t s = seed;

    case_default(c, 1 + (int)case_rand(&s, case_rand(&s, 4) ? 5 : 9), seed);
    c->num_experts = 1 + (int)case_rand(&s, case_rand(&s, 3) ? 16 : 300);
    c->max_tokens = 1 + (int)case_rand(&s, case_rand(&s, 4) ? 24 : 200);
    c->topk = 1 + (int)case_rand(&s, case_rand(&s, 4) ? 8 : EP_MAX_TOPK);
    c->map = (enum case_map)case_rand(&s, NUM_MAPS);
    c->tokens = (enum case_tokens)case_rand(&s, case_rand(&s, 4) ? 2 : NUM_TOKENS);
    c->routing = (enum case_routing)case_rand(&s, NUM_ROUTINGS);
    c->mask = case_rand(&s, 8) == 0;
    c->row_dtype = row_dtypes[case_rand(&s, 9)];
    c->hidden = EP_ROW_ALIGN / (int64_t)ep_dtype_bytes(c->row_dtype) *
                (1 + case_rand(&s, case_rand(&s, 4) ? 16 : 150));
    c->scale_dtype = scale_dtypes[case_rand(&s, 7)];
    c->num_scales = case_rand(&s, 2) ? 1 + case_rand(&s, case_rand(&s, 4) ? 5 : 70) : 0;
    c->x_stride = (enum case_stride)case_rand(&s, 2);
    c->scale_stride = (enum case_stride)case_rand(&s, NUM_STRIDES);
    c->id_stride = (enum case_stride)case_rand(&s, NUM_STRIDES);
    c->weight_stride = (enum case_stride)case_rand(&s, NUM_STRIDES);
    c->mask_stride = (enum case_stride)case_rand(&s, NUM_STRIDES);
    c->id_dtype = case_rand(&s, 2) ? EP_I32 : EP_I64;
    c->weights = case_rand(&s, 4) != 0;
    if (c->mask) {
        c->topk = 0;
        c->weights = false;
    }
}

void case_describe(const struct test_case *c, char *text, size_t bytes) {
    static const char *const map[] = {"even", "uneven", "random", "empty-rank"};
    static const char *const tokens[] = {"max", "mixed", "one", "no"};
    static const char *const routing[] = {"uniform", "one-expert", "one-rank", "holes",
                                          "nowhere", "duplicates", "groups",   "skewed"};

    snprintf(text, bytes,
             "seed %llu: R %d, E %d (%s), T %d (%s), K %d%s, %s routing, rows %lld x dtype %d, "
             "scales %lld x dtype %d, ids %d, strides x %d s %d i %d w %d%s",
             (unsigned long long)c->seed, c->num_ranks, c->num_experts, map[c->map],
             c->max_tokens, tokens[c->tokens], c->topk, c->mask ? " (mask)" : "",
             routing[c->routing], (long long)c->hidden, c->row_dtype, (long long)c->num_scales,
             c->num_scales ? c->scale_dtype : 0, c->id_dtype, c->x_stride, c->scale_stride,
             c->id_stride, c->weight_stride, c->weights ? "" : ", no weights");
}

void case_routing(const struct test_case *c, int rank, struct ep_routing *routing) {
    *routing = (struct ep_routing)EP_ROUTING_INIT;
    routing->num_experts = c->num_experts;
    routing->expert_rank = c->map == MAP_EVEN ? NULL : c->expert_rank;
    if (c->mask) {
        routing->token_in_rank = &c->mask_t[rank];
    } else {
        routing->topk_ids = &c->ids[rank];
    }
}
