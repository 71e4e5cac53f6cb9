/* SPDX-License-Identifier: MIT */
/*
 * What the parts of `ep bench` share: a case and what its ranks measured, the table of
 * operations, and a rank at work. A measurement is an operation (bench_ops.c) on rows of one
 * type, timed by the clock of the case (bench_clock.c) and said by bench_report.c.
 * Shapes: R ranks, T tokens per rank, K experts per token, E experts.
 */
#ifndef TOOLS_BENCH_H
#define TOOLS_BENCH_H

#include "tools/gpu.h"
#include "tools/tool.h"

enum { BENCH_MAX_RANKS = 64, BENCH_MAX_ITEMS = 32, BENCH_CHAIN = 128 };

enum bench_device { BENCH_HOST, BENCH_CUDA };
enum bench_dtype { BENCH_BF16, BENCH_FP8, BENCH_F32, BENCH_NUM_DTYPES };
enum bench_routing { BENCH_UNIFORM, BENCH_GROUPED, BENCH_SKEWED, BENCH_HALF, BENCH_FROM_FILE };
extern const char *const bench_dtype_names[];   /* by enum bench_dtype */
extern const char *const bench_routing_names[]; /* by enum bench_routing */

struct bench_params {
    int64_t ranks, tokens, hidden, topk, experts, groups, topk_groups, iters, warmup, workers;
    int64_t seed;
    int64_t max_tokens; /* of the plan; 0: as many as a rank has */
    int device;
    int dtype; /* cuda, low latency: -1 is bf16 and fp8 */
    int routing;
    const char *routing_file;
    bool threads, expanded, uncached, arena_only, memory_only, no_check, no_graph;
    int ll; /* --mode: 0 throughput, 1 low latency */
};

/* ---- routing_file.c: what people write ----------------------------------------------------- */

/* Expert ids, apart from each other by spaces, commas, semicolons or lines. Returns how many there are,
 * of which the first `room` are in ids; -1, and why, when there is anything else in the text. */
int64_t routing_parse(const char *text, size_t bytes, int64_t num_experts, int32_t *ids,
                      int64_t room, char *why, size_t why_bytes);

enum { SWEEP_MAX_AXES = 5, SWEEP_MAX_VALUES = 16, SWEEP_MAX_CASES = 256 };

struct sweep_axis {
    size_t at; /* the field of struct bench_params */
    int64_t values[SWEEP_MAX_VALUES];
    int num;
};
struct sweep {
    struct sweep_axis axes[SWEEP_MAX_AXES];
    int num;
};
/* "tokens=128,4096;hidden=2048,7168". Returns the number of cases; -1, and why. */
int sweep_parse(const char *text, struct sweep *out, char *why, size_t why_bytes);
/* The fields of case `index`. */
void sweep_set(const struct sweep *sweep, int index, struct bench_params *p);

/* "bf16"; "fp8 and bf16". */
const char *bench_types(const struct bench_params *p);
/* Bytes of a row, of its scales, and of a row of combine. */
int64_t bench_row_bytes(const struct bench_params *p, int dtype);
int64_t bench_scale_bytes(const struct bench_params *p, int dtype);

/* ---- bench_ops.c: what can be measured ---------------------------------------------------- */

struct bench;

/* COPY is the host's limit: all ranks copy rows at once, first and last. From LL_TRIP on: low-latency
 * mode, a dispatch and a combine, or one of them. */
enum bench_kind {
    BENCH_COPY,
    BENCH_ROUTE,
    BENCH_DISPATCH,
    BENCH_COMBINE,
    BENCH_LL_TRIP,
    BENCH_LL_DISPATCH,
    BENCH_LL_COMBINE,
    BENCH_NUM_KINDS
};
/* Where rows come out. EXPANDED is in memory too; on the host --expanded makes the others so. */
enum bench_form { BENCH_ARENA, BENCH_MEMORY, BENCH_EXPANDED };

struct bench_op {
    const char *key, *name;
    enum bench_kind kind;
    enum bench_form form;
    bool cached; /* otherwise each iteration routes anew: see bench_clock.c */
    ep_status (*prepare)(struct bench *b); /* once, before it is timed; NULL: nothing */
    ep_status (*run)(struct bench *b);
    /* What all ranks must read and write, of compact and of expanded rows: T rows go in, N are
     * received, R of them by other ranks, S selections are in expanded output. */
    const char *moved, *moved_expanded;
    /* Of low-latency mode: what BF16 answers add to the bytes, how many are timed in a row, and what comes
     * before and after each, outside of the time; NULL: nothing. */
    const char *answers;
    int chain;
    ep_status (*before)(struct bench *b);
    ep_status (*after)(struct bench *b);
    /* Between links; its own time is taken off. */
    ep_status (*between)(struct bench *b);
    bool joins;     /* on a GPU that is beside the link, which ends when both have */
    uint32_t flags; /* of the combine: EP_LL_..., BENCH_LL_WEIGHTS */
};

#define BENCH_LL_WEIGHTS (1u << 31) /* are given to it */

/* An operation on rows of one type. */
struct bench_item {
    const struct bench_op *op;
    int dtype;
    bool expanded;
};

/* Those that the parameters ask for, in the order of measurement; how many. */
int bench_items(const struct bench_params *p, struct bench_item items[BENCH_MAX_ITEMS]);
/* "bf16 dispatch to memory, cached", and "dispatch_memory_cached". */
struct text bench_item_name(const struct bench_params *p, const struct bench_item *item);
struct text bench_item_key(const struct bench_params *p, const struct bench_item *item);
/* Fresh rows, and what the operation rests on. */
ep_status bench_prepare(struct bench *b, int mode);
/* A new routing, where the operation is not cached. */
ep_status bench_route_anew(struct bench *b);
/* The operation, without routing, as often in a row as its chain has links. */
ep_status bench_run(struct bench *b);
/* The same of what comes before or after it, or nothing where that is NULL. */
ep_status bench_links(struct bench *b, ep_status (*fn)(struct bench *b));
static inline bool bench_is_ll(const struct bench_op *op) {
    return op->kind >= BENCH_LL_TRIP;
}
/* Its time is what a chain takes more with it than without: a half, of which two may be in a row, what one
 * more adds to one; else what links add to what is between them. */
static inline bool bench_is_difference(const struct bench_op *op) {
    return op->before || op->after || op->between;
}
/* The type of rows that is said of a whole case. */
static inline int bench_main_dtype(const struct bench_params *p) {
    return p->dtype < 0 ? BENCH_BF16 : p->dtype;
}

/* ---- a case -------------------------------------------------------------------------------- */

enum bench_mode { BENCH_EAGER, BENCH_GRAPH, BENCH_NUM_MODES };

/* Of one rank: when it began, or its stream was released, and how long it took from there. */
struct bench_sample {
    int64_t start_ns, ns;
};

struct bench_result {
    int64_t p50_ns, p99_ns, max_ns; /* 0: not measured */
};

/* Only with --device cuda. */
struct bench_gpus {
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
    double local;             /* a copy within a GPU: bytes read and written per ns */
    int64_t crossed_rows;     /* the most into or out of any device */
    int sms[BENCH_MAX_ITEMS]; /* blocks of the largest kernel; 0: unknown */
    int64_t skew_p50_ns, skew_p99_ns, skew_max_ns; /* between the first and the last release */
};

/* In memory shared by the ranks and the parent. */
struct bench_case {
    struct bench_params p;
    const struct bench_clock *clock;
    struct bench_item items[BENCH_MAX_ITEMS];
    int num_items;
    int64_t row_bytes, scale_bytes; /* the most of any item */
    int64_t arena_bytes;            /* per rank */
    int64_t memcpy_bytes;           /* read and written by each rank in COPY */
    int64_t traffic[BENCH_MAX_RANKS][BENCH_MAX_RANKS]; /* rows [from][to] */
    int64_t selections;                                /* (token, k) with an expert */
    int64_t received_rows[BENCH_MAX_RANKS];            /* by each rank: its compact output */
    int64_t selected_rows[BENCH_MAX_RANKS];            /* its expanded output */
    int32_t *ids;                                      /* [R][T][K] */
    struct bench_sample *samples;                      /* [items][modes][iters][R] */
    struct bench_result result[BENCH_MAX_ITEMS][BENCH_NUM_MODES];
    struct bench_gpus gpus;
    char why[512]; /* of a case that failed */
};

static inline struct bench_sample *bench_samples(const struct bench_case *c, int item, int mode,
                                                 int64_t iteration) {
    int64_t at = (item * BENCH_NUM_MODES + mode) * c->p.iters + iteration;
    return c->samples + at * c->p.ranks;
}

/* Rows of a rank's output. */
static inline int64_t bench_output_rows(const struct bench_case *c, int64_t rank,
                                        bool expanded) {
    return expanded ? c->selected_rows[rank] : c->received_rows[rank];
}
int64_t bench_most_rows(const struct bench_case *c, int64_t rank); /* of any item */

/* bench_case.c: runs one case and returns an exit status; *out, if set, is what it measured.
 * Quiet: complaints go to (*out)->why, links are not measured, and there is a limit of time. */
int bench_case(const struct bench_params *p, bool quiet, struct bench_case **out);
void bench_config(const struct bench_case *c, struct ep_group_config *config);
/* routing.c: fills in ids, traffic and selections. 0, or 1 after a complaint. */
int bench_routing(struct bench_case *c);

/* ---- bench_data.c: what ranks send, in host memory, and what must have come of it ---------- */

/* What the operations read and write, in host memory or the GPU's, as large as the largest needs. */
struct bench_buffers {
    int32_t *ids, *recv_ids, *recv_source, *num_recv;
    float *scales, *weights, *recv_scales, *recv_weights;
    char *x, *recv, *out;
};

/* All but the ids, of zeroes where that is `get`'s way, with up to so many rows of output. False: get
 * has returned NULL. */
bool bench_get_buffers(struct bench_buffers *at, const struct bench_case *c, int64_t max_rows,
                       void *(*get)(void *from, int64_t num, int64_t bytes), void *from);

/* The rows of one rank. Rows are stretches of one table of small whole numbers; where a stretch
 * begins follows from source rank, token and salt, so a receiver knows every byte it must get, an
 * old result cannot pass for a new one, and sums are exact. */
struct bench_data {
    struct rank *rank;
    const struct bench_case *c;
    const struct bench_params *p;
    /* Of the operation at hand. */
    struct text what; /* in complaints */
    uint64_t salt;
    bool expanded;
    int dtype;
    uint32_t flags;
    int64_t row_bytes, num_scales; /* per row */
    size_t element;                /* bytes */
    int64_t num_rows;              /* of the output here: received, or expanded */
    const char *rows;              /* the output that is to be checked ... */
    int64_t rows_stride;           /* ... and its bytes from row to row */
    int first_expert;              /* of this rank */
    char *table[5];                /* the same numbers as elements of 1, 2 and 4 bytes */
    struct bench_buffers at;
    void *owned[32];
    int num_owned;
};

/* With up to so many rows of output. False: no memory. */
bool bench_data_create(struct bench_data *d, struct rank *rank, const struct bench_case *c,
                       int64_t max_rows);
void bench_data_destroy(struct bench_data *d);
/* Zeroed memory that lives as long as the data; NULL: there is none. */
void *bench_data_get(void *data, int64_t num, int64_t bytes);
/* What a token's row must be, in elements of so many bytes. */
const char *bench_row_of(const struct bench_data *d, int64_t source, int64_t token,
                         size_t element);
/* Sets what concerns the operation, and fills in x and scales. */
void bench_data_use(struct bench_data *d, const struct bench_item *item, uint64_t salt);
/* 0, or 1 after rank_fail: `rows` and what else came, or the sums in `out`. */
int bench_check_dispatch(struct bench_data *d);
int bench_check_combine(struct bench_data *d);

/* ---- bench_ll.c: low-latency mode ----------------------------------------------------------- */

struct bench_ll_outputs {
    float *scales;
    int32_t *source, *counts;
    int64_t *ranges;
};

struct bench_ll {
    int64_t local, each, handle_bytes; /* experts here; rows that each of them can receive */
    char *handle[2], *recv, *answers, *other;
    struct bench_ll_outputs at, here; /* what the library is given; what is checked */
};

/* Of a rank's outputs. */
int64_t bench_ll_bytes(const struct bench_params *p, int rank);
ep_status bench_ll_open(struct bench *b, int64_t handle_bytes);
ep_status bench_ll_prepare(struct bench *b);
ep_status bench_ll_trip(struct bench *b);
ep_status bench_ll_two_trips(struct bench *b);
ep_status bench_ll_dispatch(struct bench *b);
ep_status bench_ll_dispatch_send(struct bench *b);
ep_status bench_ll_dispatch_recv(struct bench *b);
ep_status bench_ll_combine(struct bench *b);
ep_status bench_ll_combine_send(struct bench *b);
ep_status bench_ll_combine_recv(struct bench *b);
/* Other code, which writes 64 MiB twice: on a GPU about 50 us. */
ep_status bench_ll_other(struct bench *b);
/* 0, or 1 after rank_fail. */
int bench_ll_check(struct bench *b);

/* ---- bench_clock.c: a rank, and how time is taken ------------------------------------------ */

struct bench {
    struct rank *rank;
    struct bench_case *c;
    const struct bench_params *p;
    struct bench_data d;
    struct bench_buffers at; /* what the library is given */
    ep_group *group;
    ep_handle *handle;
    int index;                     /* of the item */
    const struct bench_item *item; /* that is measured */
    struct ep_tensor view;         /* recv_x of the last dispatch */
    struct bench_ll ll;            /* only with --mode ll */
    struct gpu *gpu;               /* NULL: a host rank */
    struct gpu_graph *graph[2];    /* by `more`; NULL: eager */
    bool more;                     /* of a difference, the longer chain */
    int link;                      /* of the chain */
    int64_t started_ns;            /* the last instant that rank 0 named */
};

struct bench_clock {
    int num_modes;
    bool whole; /* an iteration lasts from the first rank's start to the last one's end; else as
                   long as its slowest rank */
    ep_status (*open)(struct bench *b);            /* memory, once the rank's data is there */
    ep_status (*fill)(struct bench *b);            /* x and scales have changed */
    ep_status (*begin)(struct bench *b, int mode); /* what comes before the first iteration */
    ep_status (*time)(struct bench *b, struct bench_sample *sample); /* one iteration */
    ep_status (*settle)(struct bench *b); /* what the work has found, now that it has ended */
    ep_status (*fetch)(struct bench *b);  /* the last output, to where it is checked */
};
extern const struct bench_clock bench_clocks[]; /* by enum bench_device */
void *bench_stream(const struct bench *b);
/* Measures and checks all items; arg is the case. */
int bench_rank(struct rank *rank, void *arg);

/* ---- bench_report.c, bench_export.c: for people, for programs ------------------------------ */

/* What is said of one operation in one mode. */
struct bench_line {
    const struct bench_item *item;
    const struct bench_result *result;
    int index, mode;
    double ns;         /* the median */
    const char *moved; /* "read T + write N"; "" where nothing is compared */
    double moved_bytes, remote_bytes,
        crossed_bytes; /* host; to other ranks; GPUs: into or out of
                                                        the busiest */
    double limit_ns;   /* of moved or crossed bytes; 0: none */
    double goal_ns;    /* GPUs: see bench_report.c; 0: none */
    double logical;    /* bytes per ns as DeepEP counts */
    double extra_ns;   /* more than the cached one before it; 0: not known */
};

extern const char *const bench_mode_names[BENCH_NUM_MODES]; /* "eager", "graph" */
/* False: it was not measured. */
bool bench_line(const struct bench_case *c, int index, int mode, struct bench_line *l);
/* Bytes per ns: of memcpy, read and written by all ranks together; of the link. 0: none. */
double bench_rate(const struct bench_case *c);
int64_t bench_rows(const struct bench_case *c, bool remote);
void bench_report_text(const struct bench_case *c);
/* Of cases that differ in tokens: what an operation costs anyhow, and what more tokens cost. */
void bench_report_growth(struct bench_case *const *cases, int num);
void bench_report_csv(FILE *out, const struct bench_case *c, bool header);
void bench_report_json(FILE *out, struct bench_case *const *cases, int num_cases);

#endif
