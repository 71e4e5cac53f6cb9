/* SPDX-License-Identifier: MIT */
/*
 * What the parts of `ep bench` share: the parameters of one case and what its ranks measured.
 * Shapes: R ranks, T tokens per rank, K experts per token, E experts.
 */
#ifndef TOOLS_BENCH_H
#define TOOLS_BENCH_H

#include "tools/tool.h"

enum { BENCH_MAX_RANKS = 64 };

enum bench_device { DEVICE_HOST, DEVICE_CUDA };
enum bench_dtype { DTYPE_BF16, DTYPE_FP8, DTYPE_F32 };
enum bench_routing {
    ROUTING_UNIFORM,
    ROUTING_GROUPED,
    ROUTING_SKEWED,
    ROUTING_HALF,
    ROUTING_FILE
};
extern const char *const dtype_names[];   /* by enum bench_dtype */
extern const ep_dtype bench_row_types[];  /* the same as the library says it */
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
    int device;
    int dtype; /* cuda: -1 is bf16 and fp8 */
    int routing;
    const char *routing_file;
    bool threads, expanded, uncached, arena_only, memory_only, no_check, no_graph;
};

/* When a rank called and when it could use the output, on the one clock of the machine. */
struct bench_time {
    int64_t start_ns, end_ns;
};

struct bench_cuda;

/* One case, in memory shared by the ranks and the parent. With --device cuda what was measured
 * is in `cuda`, and neither bytes per row nor phases mean anything here. */
struct bench_case {
    struct bench_params p;
    struct bench_cuda *cuda;        /* NULL: host ranks */
    int64_t row_bytes, scale_bytes; /* of dispatch, per row */
    int64_t answer_bytes;           /* of combine, per row */
    int64_t arena_bytes;            /* per rank */
    int64_t memcpy_bytes;           /* read and written by each rank in PHASE_MEMCPY */
    int64_t traffic[BENCH_MAX_RANKS][BENCH_MAX_RANKS]; /* rows [from][to] */
    int64_t selections;                                /* (token, k) with an expert */
    int64_t received_rows[BENCH_MAX_RANKS];            /* by each rank: its compact output */
    int64_t selected_rows[BENCH_MAX_RANKS];            /* its expanded output */
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

/* Bytes of a row, of its scales, and of a row of combine. */
int64_t bench_row_bytes(const struct bench_params *p, int dtype);
int64_t bench_scale_bytes(const struct bench_params *p, int dtype);
int64_t bench_answer_bytes(const struct bench_params *p, int dtype);
/* Rows of a rank's output. */
static inline int64_t bench_output_rows(const struct bench_case *c, int64_t rank,
                                        bool expanded) {
    return expanded ? c->selected_rows[rank] : c->received_rows[rank];
}

/* ---- bench_data.c: what ranks send, in host memory, and what must have come of it ---------- */

/* The rows of one rank. Rows are stretches of one table of small whole numbers; where a stretch
 * begins follows from source rank, token and salt, so a receiver knows every byte it must get, an
 * old result cannot pass for a new one, and sums are exact. */
struct bench_data {
    struct rank *rank;
    const struct bench_case *c;
    const struct bench_params *p;
    /* Of the operation at hand. */
    const char *what; /* in complaints */
    uint64_t salt;
    bool expanded;
    int dtype;                     /* of dispatch */
    int64_t row_bytes, num_scales; /* per row */
    int64_t answer_bytes;
    size_t element, answer_element; /* bytes of dispatch's and of combine's elements */
    int64_t num_rows;               /* of the output here: received, or expanded */
    const char *rows;               /* the output that is to be checked ... */
    int64_t rows_stride;            /* ... and its bytes from row to row */
    /* Buffers, as large as the largest operation needs. */
    int first_expert; /* of this rank */
    char *table[5];   /* the same numbers as elements of 1, 2 and 4 bytes */
    char *x, *recv, *out;
    float *scales, *recv_scales, *weights, *recv_weights;
    int32_t *recv_ids, *recv_source;
    void *owned[16];
    int num_owned;
};

/* For operations on rows of the types in `dtypes` (bits), with up to so many rows of output.
 * False: no memory. */
bool data_create(struct bench_data *d, struct rank *rank, const struct bench_case *c,
                 int64_t max_rows, unsigned dtypes);
void data_destroy(struct bench_data *d);
/* Sets what concerns the operation, and fills in x and scales. */
void data_use(struct bench_data *d, const char *what, uint64_t salt, int dtype, bool expanded);
/* The answer that an expert gives to row i of the output: the row itself, as combine's type. */
const char *data_answer(const struct bench_data *d, int64_t i);
/* 0, or 1 after rank_fail: `rows` and the sidecars in recv_...; the sums in `out`. */
int check_dispatch(struct bench_data *d);
int check_combine(struct bench_data *d);

/* ---- bench_cuda.c: ranks on GPUs ----------------------------------------------------------- */

enum cuda_kind { CUDA_ROUTE, CUDA_DISPATCH, CUDA_COMBINE };
enum cuda_form { FORM_ARENA, FORM_MEMORY, FORM_EXPANDED }; /* expanded is in memory too */
enum { NUM_CUDA_OPS = 16 };
enum cuda_mode { MODE_EAGER, MODE_GRAPH, NUM_MODES };

struct cuda_op {
    const char *key;  /* "dispatch_memory_cached" */
    const char *name; /* "dispatch to memory, cached" */
    enum cuda_kind kind;
    bool fp8; /* rows; else bf16 or f32 */
    enum cuda_form form;
    bool cached; /* a dispatch that is not is timed with `route`, and stands behind the one that
                    is */
};
extern const struct cuda_op cuda_ops[NUM_CUDA_OPS];
extern const char *const cuda_modes[NUM_MODES]; /* "eager", "graph" */

/* From the release of all ranks to a rank's end event, and when it was released. */
struct cuda_sample {
    int64_t ns, released_ns;
};

struct cuda_result {
    int64_t p50_ns, p99_ns, max_ns; /* of the slowest rank of each iteration; 0: not measured */
};

/* In shared memory, beside the case. */
struct bench_cuda {
    _Atomic int64_t start_ns; /* when the ranks are to release their streams */
    bool held;                /* streams could be held: launches are not in the times */
    int num_devices;          /* that ranks are on */
    int device[BENCH_MAX_RANKS];
    char devices[256]; /* "4 x NVIDIA H200 (sm_90, 132 SMs)" */
    int driver_version;
    bool all_reach;          /* every device the memory of every other */
    char links_why[480];     /* why the link was not measured */
    double in_turn, at_once; /* the link's rate, bytes per ns: the faster of before and after */
    double first, last;
    int64_t crossed_rows;        /* the most into or out of any device */
    struct cuda_sample *samples; /* [NUM_CUDA_OPS][NUM_MODES][iters][R] */
    struct cuda_result result[NUM_CUDA_OPS][NUM_MODES];
    int sms[NUM_CUDA_OPS]; /* blocks of the largest kernel; 0: unknown */
    int64_t skew_p50_ns, skew_p99_ns, skew_max_ns; /* between the first and the last release */
};

bool cuda_measures(const struct bench_params *p, int op);
int cuda_dtype(const struct bench_params *p, int op);        /* of its rows */
struct text cuda_name(const struct bench_params *p, int op); /* with the type of its rows */
unsigned cuda_dtypes(const struct bench_params *p);          /* bits: all that are measured */
bool cuda_expands(const struct bench_params *p);             /* some operation does */
int cuda_rank(struct rank *rank, void *arg);
/* bench_cuda_case.c: what surrounds the ranks. GPUs, link, samples; as bench_case. */
int cuda_case(struct bench_case *c, bool quiet);
/* bench_cuda_report.c */
double cuda_link_rate(const struct bench_case *c); /* bytes per ns; 0: there is none */
void cuda_report_text(const struct bench_case *c);
void cuda_case_members(const struct bench_case *c, char *out, size_t room);
void cuda_result_members(const struct bench_case *c, int op, int mode, char *out, size_t room);

/* ---- host ranks, and what both have -------------------------------------------------------- */

/* bench.c: runs one case and returns an exit status; *out, if set, is what it measured. Quiet:
 * complaints go to (*out)->why, and it may not take longer than 30 s (host). */
int bench_case(const struct bench_params *p, bool quiet, struct bench_case **out);
/* routing.c: fills in ids, traffic and selections. 0, or 1 after a complaint. */
int routing_make(struct bench_case *c);
/* bench_rank.c: measures and checks host ranks; arg is the case. */
int bench_rank(struct rank *rank, void *arg);
void bench_config(const struct bench_case *c, struct ep_group_config *config);
bool bench_measures(const struct bench_params *p, enum bench_phase phase);
/* bench_report.c */
double bench_memcpy_rate(const struct bench_case *c); /* bytes per ns, all ranks together */
int64_t bench_rows(const struct bench_case *c, bool remote);
struct bench_line bench_line(const struct bench_case *c, enum bench_phase phase);
struct text bench_groups(const struct bench_params *p); /* " (4 of 8 groups)" or nothing */
double bench_imbalance(const struct bench_case *c, bool expanded); /* busiest rank / mean */
void report_text(const struct bench_case *c);
void report_csv(FILE *out, const struct bench_case *c, bool header);
void report_json(FILE *out, struct bench_case *const *cases, int num_cases);
/* svg.c: 0, or 1 after a complaint. */
int svg_write(const char *path, struct bench_case *const *cases, int num_cases);

#endif
