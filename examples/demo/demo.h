/* SPDX-License-Identifier: MIT */
/*
 * What the parts of `ep demo` share: the layer's input and output, and what the ranks report.
 * It is built into the program `ep` and uses its helpers; an example that stands alone is
 * moe_layer.c.
 */
#ifndef EXAMPLES_DEMO_H
#define EXAMPLES_DEMO_H

#include "examples/demo/moe.h"
#include "tools/gpu.h"
#include "tools/tool.h"

#define ROW_BYTES (MOE_HIDDEN * 2)

enum phase { ROUTER, ROUTE, DISPATCH, EXPERTS, COMBINE, NUM_PHASES };

struct rank_report {
    int64_t ns[NUM_PHASES];
    int64_t rows_remote;       /* rows sent to other ranks: one per token and rank */
    int64_t selections_remote; /* experts chosen on other ranks */
    int64_t selections_here;   /* rows this rank's experts computed */
    int64_t arena_bytes;
};

struct demo_shared {
    _Atomic int64_t tokens_done;
    struct rank_report rank[EP_MAX_RANKS];
    int64_t expert_load[MOE_EXPERTS]; /* each written by the rank that holds the expert */
};

struct demo {
    int64_t num_ranks;
    int64_t num_tokens; /* 0: the whole text */
    int64_t batch;      /* tokens per rank and step */
    bool is_cut;        /* the file is longer than what is used of it */
    const char *file;
    const struct gpu_look *gpus; /* NULL: host ranks */
    uint16_t *x;                 /* [tokens][hidden] */
    uint16_t *out;               /* [tokens][hidden], shared */
    struct demo_shared *shared;
    int64_t num_steps;
};

/* rank.c: one rank's part of all steps; arg is the demo. */
int demo_rank(struct rank *rank, void *arg);

#endif
