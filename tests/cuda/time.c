/* SPDX-License-Identifier: MIT */
/*
 * Timing, declared in try.h. One problem: T tokens per rank, uniform top-k routing, bf16 rows of
 * `hidden` elements, and fp8 rows of as many bytes with a float32 scale per 128.
 *
 * How time is taken. One thread issues everything. For each iteration all streams are made to wait
 * for a word in host memory; then, rank by rank, the begin event, the kernel and the end event
 * are queued; then the word is set, so that all ranks start within about the time of a PCIe
 * read. A rank's time is its end event minus its begin event: from the start of the call on the
 * device to usable output, without the host's time to launch. A sample is the maximum over ranks;
 * printed are median, minimum and maximum of the samples. "host" is the median of the time
 * from setting the word to the host having seen all streams end. "back to back" is the time of
 * `iterations` operations queued one behind the other, divided by their number. GB/s is the
 * largest number of row bytes that any GPU sent to or received from others, over the median;
 * sidecars are not counted. Outputs of the last iteration are compared with what they must be.
 */
#include "tests/cuda/try.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/tap.h"

#define EXPANDED_ALIGN 8
#define MAX_ITERATIONS 1000

enum op {
    OP_ROUTE,
    OP_UNCACHED,
    OP_VIEW,
    OP_MEMORY,
    OP_EXPANDED,
    OP_FP8_VIEW,
    OP_FP8_MEMORY,
    OP_FP8_EXPANDED,
    OP_COMBINE_VIEW,
    OP_COMBINE_MEMORY,
    OP_COMBINE_EXPANDED,
    NUM_OPS
};

static const struct {
    const char *name;
    enum rig_kernel kernel;
    bool fp8, expanded, view;
    bool first_only; /* with the first shape only */
} ops[NUM_OPS] = {
    [OP_ROUTE] = {"route", RIG_ROUTE, false, false, false, true},
    [OP_UNCACHED] = {"bf16 dispatch uncached, view", RIG_DISPATCH, false, false, true, true},
    [OP_VIEW] = {"bf16 dispatch cached, view", RIG_DISPATCH, false, false, true, false},
    [OP_MEMORY] = {"bf16 dispatch cached, memory", RIG_DISPATCH, false, false, false, false},
    [OP_EXPANDED] = {"bf16 dispatch cached, expanded", RIG_DISPATCH, false, true, false, true},
    [OP_FP8_VIEW] = {"fp8 dispatch cached, view", RIG_DISPATCH, true, false, true, false},
    [OP_FP8_MEMORY] = {"fp8 dispatch cached, memory", RIG_DISPATCH, true, false, false, false},
    [OP_FP8_EXPANDED] = {"fp8 dispatch cached, expanded", RIG_DISPATCH, true, true, false,
                         true},
    [OP_COMBINE_VIEW] = {"bf16 combine from view", RIG_COMBINE, false, false, true, false},
    [OP_COMBINE_MEMORY] = {"bf16 combine from memory", RIG_COMBINE, false, false, false, false},
    [OP_COMBINE_EXPANDED] = {"bf16 combine expanded, weighted", RIG_COMBINE, false, true, false,
                             true},
};

union args {
    struct k_route_args route;
    struct k_dispatch_args dispatch;
    struct k_combine_args combine;
};

/* One rank's data on both sides. */
struct mine {
    struct inputs in, in8;             /* bf16 and fp8 */
    uint8_t *x, *x8;                   /* host: [T][2 H], [T][H] */
    struct ref_recv compact, expanded; /* of the small twin of the problem: sources */
    uint8_t *sum, *weighted;           /* host: what combine must give */
    uint64_t recv_x, recv_ids, recv_weights, recv_source, recv_scales, counts, offsets, num;
    uint64_t expanded_weights, out;
    union args args[2]; /* by slot */
};

struct bench {
    struct rig *rig;
    const struct timing *t;
    struct test_case c, c8; /* c8 shares all but the rows */
    struct mine m[RIG_MAX_RANKS];
    struct pool pool[RIG_MAX_RANKS];
    uint8_t *pinned;
    size_t row_bytes, row8_bytes;
    int64_t rows_crossed; /* the most of any rank, in or out */
    bool gated;
    bool filled; /* the handles are: a shape has been measured */
};

/* ---- the problem ----------------------------------------------------------------------- */

static void fill_rows(struct bench *b, int r) {
    const size_t n = (size_t)b->t->num_tokens * (size_t)b->t->hidden;
    uint16_t *x = malloc(2 * n + 8);
    uint8_t *x8 = malloc(n + 8);
    uint64_t s = 77 + (uint64_t)r;

    if (!x || !x8) {
        printf("FATAL: no memory for rows\n");
        exit(3);
    }
    for (size_t i = 0; i < n; i++) { /* bf16 of a size around 1 */
        const uint64_t bits = tap_rand(&s);
        x[i] = (uint16_t)((bits & 0x807F) | (125 + (bits >> 20 & 3)) << 7);
        x8[i] = (uint8_t)(bits >> 32);
    }
    b->m[r].x = (uint8_t *)x;
    b->m[r].x8 = x8;
}

/* Of one token: the weights of its selections, rank by rank. */
struct terms {
    float weight[EP_MAX_TOPK];
    int end[RIG_MAX_RANKS]; /* one past a rank's last; ranks without any are left out */
    int num_ranks;
};

static void find_terms(const struct ref_problem *p, int r, int64_t t, struct terms *out) {
    const struct ref_input *in = &p->in[r];
    int n = 0;

    out->num_ranks = 0;
    for (int d = 0; d < p->num_ranks; d++) {
        const int before = n;
        for (int j = 0; j < p->topk; j++) {
            const int64_t id = in->ids[t * p->topk + j];
            if (id >= 0 && p->expert_rank[id] == d) {
                out->weight[n++] = in->weights[t * p->topk + j];
            }
        }
        if (n > before) {
            out->end[out->num_ranks++] = n;
        }
    }
}

/* What combine must give when every answer is the row that was sent: the row as often as it has
 * destinations; and, expanded, weighted by the top-k weights per rank. */
static void fill_sums(struct bench *b, int r) {
    struct mine *m = &b->m[r];
    const int64_t tokens = b->c.problem.in[r].num_tokens;

    m->sum = malloc((size_t)tokens * b->row_bytes + 8);
    m->weighted = malloc((size_t)tokens * b->row_bytes + 8);
    if (!m->sum || !m->weighted) {
        printf("FATAL: no memory for sums\n");
        exit(3);
    }
    for (int64_t t = 0; t < tokens; t++) {
        struct terms terms;
        find_terms(&b->c.problem, r, t, &terms);
        for (int64_t h = 0; h < b->t->hidden; h++) {
            const size_t at = (size_t)t * b->row_bytes + (size_t)h * 2;
            const float x = ref_load(EP_BF16, m->x + at);
            float sum = 0, weighted = 0;
            for (int d = 0, j = 0; d < terms.num_ranks; d++) {
                float y = 0;
                uint16_t rounded;
                for (; j < terms.end[d]; j++) {
                    const float term = x * terms.weight[j];
                    y = y + term;
                }
                ref_store(EP_BF16, y, &rounded);
                sum = sum + x;
                weighted = weighted + ref_load(EP_BF16, &rounded);
            }
            ref_store(EP_BF16, sum, m->sum + at);
            ref_store(EP_BF16, weighted, m->weighted + at);
        }
    }
}

struct build_task {
    struct bench *b;
    int rank;
};

static void *build_main(void *arg) {
    const struct build_task *task = arg;
    struct bench *b = task->b;
    const int r = task->rank;

    fill_rows(b, r);
    ref_dispatch(&b->pool[r], &b->c.problem, r, false, 1, &b->m[r].compact);
    ref_dispatch(&b->pool[r], &b->c.problem, r, true, EXPANDED_ALIGN, &b->m[r].expanded);
    fill_sums(b, r);
    return NULL;
}

static void build_problem(struct bench *b) {
    const struct timing *t = b->t;
    pthread_t thread[RIG_MAX_RANKS];
    struct build_task task[RIG_MAX_RANKS];
    const double start = rig_now();

    case_default(&b->c, b->rig->o.num_ranks, 1);
    b->c.num_experts = t->num_experts;
    b->c.max_tokens = t->num_tokens;
    b->c.tokens = TOKENS_MAX;
    b->c.topk = t->topk;
    b->c.hidden = 8; /* a small twin: the reference says which rows go where */
    b->c.row_dtype = EP_BF16;
    b->c.num_scales = t->hidden / 128;
    b->c.scale_dtype = EP_F32;
    case_build(&b->c);
    b->row_bytes = (size_t)t->hidden * 2;
    b->row8_bytes = (size_t)t->hidden;
    for (int r = 0; r < b->rig->o.num_ranks; r++) {
        task[r] = (struct build_task){b, r};
        if (pthread_create(&thread[r], NULL, build_main, &task[r])) {
            printf("FATAL: no thread\n");
            exit(3);
        }
    }
    for (int r = 0; r < b->rig->o.num_ranks; r++) {
        pthread_join(thread[r], NULL);
    }
    b->c.problem.row_bytes = b->row_bytes;
    b->c.problem.scale_bytes = 0;
    b->c8 = b->c;
    b->c8.problem.row_bytes = b->row8_bytes;
    b->c8.problem.scale_bytes = (size_t)b->c.num_scales * 4;
    b->c.num_scales = 0;
    printf("problem built in %.1f s\n", rig_now() - start);
}

static void count_crossing(struct bench *b) {
    const int ranks = b->rig->o.num_ranks;

    b->rows_crossed = 0;
    for (int r = 0; r < ranks; r++) {
        int64_t in = 0, out = 0;
        for (int p = 0; p < ranks; p++) {
            in += p != r ? b->m[r].compact.rows_per_source[p] : 0;
            out += p != r ? b->m[p].compact.rows_per_source[r] : 0;
        }
        in = in > out ? in : out;
        b->rows_crossed = b->rows_crossed > in ? b->rows_crossed : in;
        printf("  rank %d: %lld rows received, %lld expanded, at most %lld in or out cross\n",
               r, (long long)b->m[r].compact.num_rows, (long long)b->m[r].expanded.num_rows,
               (long long)in);
    }
}

static void build_group(struct bench *b) {
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;

    c.num_ranks = b->rig->o.num_ranks;
    c.num_experts = b->t->num_experts;
    c.max_tokens = b->t->num_tokens;
    c.max_topk = b->t->topk;
    c.max_row_bytes = (int32_t)b->row_bytes;
    c.max_scale_bytes = (int32_t)b->c8.problem.scale_bytes;
    rig_group(b->rig, &c);
    printf("arena %.1f MB per rank, %d channels, handle %.1f MB\n",
           (double)b->rig->plan.info.arena_bytes * 1e-6, b->rig->plan.info.num_channels,
           (double)b->rig->plan.info.handle_bytes * 1e-6);
}

static void build_rank(struct bench *b, int r) {
    struct rig *rig = b->rig;
    struct mine *m = &b->m[r];
    const int64_t tokens = b->c.in[r].num_tokens, k = b->t->topk;
    const size_t rows = (size_t)m->compact.num_rows, wide = (size_t)m->expanded.num_rows;
    const size_t most = rows > wide ? rows : wide;

    m->in.ids = mirror(rig, r, &b->c.ids[r]);
    m->in.weights = mirror(rig, r, &b->c.topk_weights[r]);
    m->in.x = (struct k_array){rig_alloc(rig, r, (size_t)tokens * b->row_bytes),
                               (k_i64)b->row_bytes, 2};
    rig_in(rig, r, m->in.x.data, m->x, (size_t)tokens * b->row_bytes);
    m->in8 = m->in;
    m->in8.scales = mirror(rig, r, &b->c8.scales[r]);
    m->in8.x = (struct k_array){rig_alloc(rig, r, (size_t)tokens * b->row8_bytes),
                                (k_i64)b->row8_bytes, 1};
    rig_in(rig, r, m->in8.x.data, m->x8, (size_t)tokens * b->row8_bytes);
    m->recv_x = rig_alloc(rig, r, most * b->row_bytes);
    m->recv_ids = rig_alloc(rig, r, rows * (size_t)k * 8);
    m->recv_weights = rig_alloc(rig, r, rows * (size_t)k * 4);
    m->recv_source = rig_alloc(rig, r, most * 8);
    m->recv_scales = rig_alloc(rig, r, most * b->c8.problem.scale_bytes);
    m->counts = rig_alloc(rig, r, 4 * (size_t)b->t->num_experts);
    m->offsets = rig_alloc(rig, r, 4 * (size_t)b->t->num_experts + 4);
    m->num = rig_alloc(rig, r, 4);
    m->expanded_weights = rig_alloc(rig, r, wide * 4);
    m->out = rig_alloc(rig, r, (size_t)tokens * b->row_bytes);
    /* Gaps are not read; the others are the top-k weights of their rows. */
    rig_in(rig, r, m->expanded_weights, m->expanded.weights, wide * 4);
}

/* ---- arguments of one operation -------------------------------------------------------- */

static uint64_t slot_at(const struct bench *b, int r, int slot) {
    return b->rig->rank[r].arena + b->rig->plan.map.recv +
           (uint64_t)slot * b->rig->plan.map.recv_slot_bytes;
}

static void dispatch_args(struct bench *b, enum op op, int r, int slot) {
    const struct test_case *c = ops[op].fp8 ? &b->c8 : &b->c;
    const struct mine *m = &b->m[r];
    const bool wide = ops[op].expanded;
    const k_i64 k = b->t->topk;
    struct k_dispatch_args *a = &b->m[r].args[slot].dispatch;

    fill_dispatch(b->rig, r, c, ops[op].fp8 ? &m->in8 : &m->in, op != OP_UNCACHED, slot, a);
    a->capacity = a->x_rows = wide ? m->expanded.num_rows : m->compact.num_rows;
    if (!ops[op].view) {
        a->recv_x = (struct k_array){m->recv_x, a->row_bytes, 1};
    }
    a->recv_source = (struct k_array){m->recv_source, 8, 4};
    a->expert_counts = (struct k_array){m->counts, 4, 0};
    a->num_rows = (struct k_array){m->num, 4, 0};
    if (ops[op].fp8) {
        a->recv_scales = (struct k_array){m->recv_scales, (k_i64)c->problem.scale_bytes, 4};
    }
    if (wide) {
        a->flags |= K_DO_EXPAND;
        a->alignment = EXPANDED_ALIGN;
        a->recv_weights = (struct k_array){m->expanded_weights, 4, 0};
        a->expert_offsets = (struct k_array){m->offsets, 4, 0};
    } else {
        a->id_bytes = 8;
        a->recv_ids = (struct k_array){m->recv_ids, 8 * k, 8};
        a->recv_weights = (struct k_array){m->recv_weights, 4 * k, 4};
    }
}

static void combine_args(struct bench *b, enum op op, int r, int slot) {
    const struct mine *m = &b->m[r];
    struct k_combine_args *a = &b->m[r].args[slot].combine;

    fill_combine(b->rig, r, &b->c, EP_BF16, b->t->hidden, a);
    a->x = (struct k_array){ops[op].view ? slot_at(b, r, 0) : m->recv_x, a->row_bytes, 2};
    a->out = (struct k_array){m->out, a->row_bytes, 2};
    if (ops[op].expanded) {
        a->flags |= K_DO_EXPAND | K_DO_REDUCE;
        a->weights = (struct k_array){m->expanded_weights, 4, 0};
    }
}

static void prepare(struct bench *b, enum op op) {
    for (int r = 0; r < b->rig->o.num_ranks; r++) {
        struct mine *m = &b->m[r];
        for (int slot = 0; slot < 2; slot++) {
            memset(&m->args[slot], 0, sizeof(m->args[slot]));
            if (op == OP_ROUTE) {
                fill_route(b->rig, r, &b->c, &m->in, &m->args[slot].route);
            } else if (ops[op].kernel == RIG_DISPATCH) {
                dispatch_args(b, op, r, slot);
            } else {
                combine_args(b, op, r, slot);
            }
        }
    }
}

static void launch_all(struct bench *b, enum op op, int i) {
    for (int r = 0; r < b->rig->o.num_ranks; r++) {
        rig_launch(b->rig, r, ops[op].kernel, &b->m[r].args[i & 1]);
    }
    b->rig->epoch += ops[op].kernel >= RIG_DISPATCH;
}

/* ---- what must have come out ----------------------------------------------------------- */

/* Received rows, by the sources that the reference names. */
static bool rows_are(struct bench *b, enum op op, int r, uint64_t at) {
    const struct mine *m = &b->m[r];
    const struct ref_recv *v = ops[op].expanded ? &m->expanded : &m->compact;
    const size_t bytes = ops[op].fp8 ? b->row8_bytes : b->row_bytes;

    rig_out(b->rig, r, b->pinned, at, (size_t)v->num_rows * bytes);
    for (int64_t i = 0; i < v->num_rows; i++) {
        const int src = v->source[2 * i];
        if (src < 0) {
            continue;
        }
        const uint8_t *x = ops[op].fp8 ? b->m[src].x8 : b->m[src].x;
        const uint8_t *want = x + (size_t)v->source[2 * i + 1] * bytes;
        const uint8_t *got = b->pinned + (size_t)i * bytes;
        if (memcmp(got, want, bytes) != 0) {
            size_t j = 0;
            while (got[j] == want[j]) {
                j++;
            }
            printf(
                "    rank %d, row %lld of %lld (source %d, token %d), byte %zu: %02x instead "
                "of %02x\n",
                r, (long long)i, (long long)v->num_rows, src, v->source[2 * i + 1], j, got[j],
                want[j]);
            return false;
        }
    }
    return true;
}

static bool sources_are(struct bench *b, enum op op, int r) {
    const struct mine *m = &b->m[r];
    const struct ref_recv *v = ops[op].expanded ? &m->expanded : &m->compact;
    const size_t bytes = (size_t)v->num_rows * 8;

    rig_out(b->rig, r, b->pinned, m->recv_source, bytes);
    if (memcmp(b->pinned, v->source, bytes) != 0) {
        printf("    rank %d: recv_source differs\n", r);
        return false;
    }
    return true;
}

static bool sums_are(struct bench *b, enum op op, int r) {
    const struct mine *m = &b->m[r];
    const size_t bytes = (size_t)b->c.in[r].num_tokens * b->row_bytes;
    const uint8_t *want = ops[op].expanded ? m->weighted : m->sum;

    rig_out(b->rig, r, b->pinned, m->out, bytes);
    for (size_t i = 0; i < bytes; i++) {
        if (b->pinned[i] != want[i]) {
            printf("    rank %d, token %zu, byte %zu of its row: %02x instead of %02x\n", r,
                   i / b->row_bytes, i % b->row_bytes, b->pinned[i], want[i]);
            return false;
        }
    }
    return true;
}

static bool results_are(struct bench *b, enum op op, int last_slot) {
    bool good = true;

    for (int r = 0; op != OP_ROUTE && r < b->rig->o.num_ranks; r++) {
        if (ops[op].kernel == RIG_COMBINE) {
            good = sums_are(b, op, r) && good;
        } else {
            good =
                sources_are(b, op, r) &&
                rows_are(b, op, r, ops[op].view ? slot_at(b, r, last_slot) : b->m[r].recv_x) &&
                good;
        }
    }
    return good;
}

/* What the operation will read or write, so that old results cannot pass for new ones. */
static void set_stage(struct bench *b, enum op op) {
    for (int r = 0; r < b->rig->o.num_ranks; r++) {
        const struct mine *m = &b->m[r];
        const size_t rows = (size_t)m->compact.num_rows * b->row_bytes;
        const size_t wide = (size_t)m->expanded.num_rows * b->row_bytes;
        if (ops[op].kernel == RIG_DISPATCH) {
            rig_poison_arena(b->rig, r, true);
            rig_fill(b->rig, r, m->recv_x, RIG_POISON, rows > wide ? rows : wide);
        } else if (ops[op].kernel == RIG_COMBINE) {
            rig_poison_arena(b->rig, r, false);
            rig_fill(b->rig, r, m->out, RIG_POISON,
                     (size_t)b->c.in[r].num_tokens * b->row_bytes);
        }
    }
    rig_wait(b->rig, "poisoning");
}

/* Answers for combine: the rows as they were sent, by a dispatch of the right form. */
static bool provide_answers(struct bench *b, enum op op) {
    const enum op from = op == OP_COMBINE_VIEW     ? OP_VIEW
                         : op == OP_COMBINE_MEMORY ? OP_MEMORY
                                                   : OP_EXPANDED;
    set_stage(b, from);
    prepare(b, from);
    launch_all(b, from, 0);
    return rig_sound(b->rig, "a dispatch before combine");
}

/* ---- measuring ------------------------------------------------------------------------- */

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void record(struct bench *b, bool begin) {
    for (int r = 0; r < b->rig->o.num_ranks; r++) {
        const struct rig_rank *k = &b->rig->rank[r];
        rig_must(epi_cu_event_record(k->device, begin ? k->begin : k->end, k->stream), "event");
    }
}

/* Rank by rank: begin event, n launches, end event; held until all are queued. */
static double timed(struct bench *b, enum op op, int n, int i, double *host_us) {
    double most = 0, start = rig_now();
    const bool held = b->gated && rig_hold(b->rig);

    if (n == 1) {
        for (int r = 0; r < b->rig->o.num_ranks; r++) {
            const struct rig_rank *k = &b->rig->rank[r];
            rig_must(epi_cu_event_record(k->device, k->begin, k->stream), "event");
            rig_launch(b->rig, r, ops[op].kernel, &b->m[r].args[i & 1]);
            rig_must(epi_cu_event_record(k->device, k->end, k->stream), "event");
        }
        b->rig->epoch += ops[op].kernel >= RIG_DISPATCH;
    } else {
        record(b, true);
        for (int j = 0; j < n; j++) {
            launch_all(b, op, i + j);
        }
        record(b, false);
    }
    if (held) {
        start = rig_now();
        rig_release(b->rig);
    }
    rig_wait(b->rig, ops[op].name);
    *host_us = 1e6 * (rig_now() - start);
    for (int r = 0; r < b->rig->o.num_ranks; r++) {
        const struct rig_rank *k = &b->rig->rank[r];
        double us = 0;
        rig_must(epi_cu_event_elapsed(k->device, k->begin, k->end, &us), "elapsed time");
        most = us > most ? us : most;
    }
    return most / n;
}

static bool time_op(struct bench *b, enum op op) {
    const int n = b->t->iterations;
    double us[MAX_ITERATIONS], host[MAX_ITERATIONS], ignored;
    int i = 0;

    if (ops[op].kernel == RIG_COMBINE && !provide_answers(b, op)) {
        return false;
    }
    set_stage(b, op);
    prepare(b, op);
    for (int j = 0; j < b->t->warmup; j++) {
        timed(b, op, 1, i++, &ignored);
    }
    if (!rig_sound(b->rig, ops[op].name)) {
        return false;
    }
    for (int j = 0; j < n; j++) {
        us[j] = timed(b, op, 1, i++, &host[j]);
    }
    const double stream_us = timed(b, op, n, i, &ignored);
    i += n;
    if (!rig_sound(b->rig, ops[op].name)) {
        return false;
    }
    qsort(us, (size_t)n, sizeof(us[0]), compare);
    qsort(host, (size_t)n, sizeof(host[0]), compare);
    const bool good = results_are(b, op, (i - 1) & 1);
    const struct rig_shape *s = &b->rig->shape;
    const double bytes =
        (double)b->rows_crossed * (double)(ops[op].fp8 ? b->row8_bytes : b->row_bytes);
    printf(
        "%3d %3d %2d %d %5.1f %4zu | %-32s | %7.1f %7.1f %7.1f | %7.1f | %7.1f | %6.1f %6.1f "
        "| %s\n",
        s->blocks, s->send_blocks, s->warps, s->stages, s->stage_bytes / 1024.0,
        rig_shared_bytes(b->rig, ops[op].kernel) / 1024, ops[op].name, us[n / 2], us[0],
        us[n - 1], stream_us, host[n / 2], bytes * 1e-6,
        op == OP_ROUTE ? 0.0 : bytes * 1e-3 / us[n / 2], good ? "right" : "WRONG");
    fflush(stdout);
    check(good, "timing: %s gave wrong bytes", ops[op].name);
    return true;
}

static bool time_shape(struct bench *b, int number) {
    if (!rig_use_shape(b->rig, &b->t->shapes[number])) {
        return true;
    }
    for (int op = 0; op < NUM_OPS; op++) {
        /* The first shape routes and dispatches uncached: the handle is filled for the rest. */
        if ((!b->filled || !ops[op].first_only) && !time_op(b, (enum op)op)) {
            return false;
        }
    }
    b->filled = true;
    return true;
}

bool time_all(struct rig *rig, const struct timing *t) {
    static struct bench b; /* large */
    bool alive = true;
    size_t most = 0;
    void *pinned = NULL;

    if (t->iterations < 1 || t->iterations > MAX_ITERATIONS || t->hidden % 128 ||
        t->topk > t->num_experts) {
        printf("timing needs 1..%d iterations, hidden a multiple of 128, topk <= experts\n",
               MAX_ITERATIONS);
        return false;
    }
    memset(&b, 0, sizeof(b));
    b.rig = rig;
    b.t = t;
    printf("\ntiming: %d ranks, %d tokens each, hidden %d, top-%d of %d, %d iterations after "
           "%d\n",
           rig->o.num_ranks, t->num_tokens, t->hidden, t->topk, t->num_experts, t->iterations,
           t->warmup);
    build_problem(&b);
    count_crossing(&b);
    build_group(&b);
    for (int r = 0; r < rig->o.num_ranks; r++) {
        const size_t bytes = (size_t)b.m[r].expanded.num_rows * b.row_bytes;
        build_rank(&b, r);
        most = bytes > most ? bytes : most;
    }
    rig_must(
        epi_cu_alloc_host(&rig->device[0], &pinned, most + b.row_bytes * (size_t)t->num_tokens),
        "pinned memory");
    b.pinned = pinned;
    b.gated = rig_hold(rig);
    rig_release(rig);
    printf("%s\n", b.gated ? "ranks start together, by a word in host memory"
                           : "streams cannot be held: ranks start as they are launched");
    printf("shape: blocks, sending, warps, stages, stage KiB, shared KiB | operation | us: "
           "median min max | back to back | host | MB crossed, GB/s | bytes\n");
    for (int i = 0; alive && i < t->num_shapes; i++) {
        alive = time_shape(&b, i);
    }
    rig_free_group(rig);
    epi_cu_free_host(&rig->device[0], &pinned);
    for (int r = 0; r < rig->o.num_ranks; r++) {
        free(b.m[r].x);
        free(b.m[r].x8);
        free(b.m[r].sum);
        free(b.m[r].weighted);
        pool_free(&b.pool[r]);
    }
    case_free(&b.c);
    return alive;
}
