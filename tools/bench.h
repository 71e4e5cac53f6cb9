/* SPDX-License-Identifier: MIT */
/*
 * What the parts of `ep bench` share: the parameters of one case and what its ranks measured.
 * Shapes: R ranks, T tokens per rank, K experts per token, E experts.
 */
#ifndef TOOLS_BENCH_H
#define TOOLS_BENCH_H

#include "tool.h"

enum { BENCH_MAX_RANKS = 64 };

enum bench_dtype { DTYPE_BF16, DTYPE_FP8, DTYPE_F32 };
enum bench_routing { ROUTING_UNIFORM, ROUTING_GROUPED, ROUTING_SKEWED, ROUTING_FILE };
extern const char *const dtype_names[];   /* by enum bench_dtype */
extern const char *const routing_names[]; /* by enum bench_routing */

enum bench_phase {
    PHASE_MEMCPY, /* the limit: all ranks copy rows at once, first and last; the faster counts */
    PHASE_ROUTE,
    PHASE_DISPATCH_ARENA, /* counts exchanged: the first dispatch of a routing */
    PHASE_DISPATCH_ARENA_CACHED,
    PHASE_DISPATCH_MEMORY,
    PHASE_DISPATCH_MEMORY_CACHED,
    PHASE_COMBINE_ARENA,
    PHASE_COMBINE_MEMORY,
    PHASE_MEMCPY_AGAIN,
    NUM_PHASES
};

struct bench_params {
    int64_t ranks, tokens, hidden, topk, experts, groups, topk_groups, iters, warmup, workers;
    int64_t seed;
    int dtype;
    int routing;
    const char *routing_file;
    bool threads, expanded, uncached, arena_only, memory_only, no_check;
};

/* When a rank called and when it could use the output, on the one clock of the machine. */
struct bench_time {
    int64_t start_ns, end_ns;
};

/* One case, in memory shared by the ranks and the parent. */
struct bench_case {
    struct bench_params p;
    int64_t row_bytes, scale_bytes; /* of dispatch, per row */
    int64_t answer_bytes;           /* of combine, per row */
    int64_t arena_bytes;            /* per rank */
    int64_t memcpy_bytes;           /* read and written by each rank in PHASE_MEMCPY */
    int64_t traffic[BENCH_MAX_RANKS][BENCH_MAX_RANKS]; /* rows [from][to] */
    int64_t selections;                                /* (token, k) with an expert */
    int64_t output_rows[BENCH_MAX_RANKS];              /* rows of each rank's dispatch output */
    int32_t *ids;                                      /* [R][T][K] */
    struct bench_time *times;                          /* [NUM_PHASES][iters][R] */
    char why[512];                                     /* of a case that failed */
    int64_t p50[NUM_PHASES], p99[NUM_PHASES];          /* 0: not measured */
};

/* What one phase moved, summed over the ranks, and how long that must take at least. */
struct bench_line {
    const char *name;    /* "dispatch to arena, cached" */
    const char *key;     /* "dispatch_arena_cached" */
    const char *formula; /* of the limit's bytes */
    double limit_bytes, remote_bytes, logical_bytes;
    double limit_ns;
};

/* bench.c: runs one case and returns an exit status; *out, if set, is what it measured. Quiet:
 * complaints go to (*out)->why, and it may not take longer than 30 s. */
int bench_case(const struct bench_params *p, bool quiet, struct bench_case **out);
/* routing.c: fills in ids, traffic and selections. 0, or 1 after a complaint. */
int routing_make(struct bench_case *c);
/* bench_rank.c: measures and checks; arg is the case. */
int bench_rank(struct rank *rank, void *arg);
void bench_config(const struct bench_case *c, struct ep_group_config *config);
bool bench_measures(const struct bench_params *p, enum bench_phase phase);
/* bench_report.c */
double bench_memcpy_rate(const struct bench_case *c); /* bytes per ns, all ranks together */
int64_t bench_rows(const struct bench_case *c, bool remote);
struct bench_line bench_line(const struct bench_case *c, enum bench_phase phase);
void report_text(const struct bench_case *c);
void report_csv(FILE *out, const struct bench_case *c, bool header);
void report_json(FILE *out, struct bench_case *const *cases, int num_cases);
/* svg.c: 0, or 1 after a complaint. */
int svg_write(const char *path, struct bench_case *const *cases, int num_cases);

#endif
