/* SPDX-License-Identifier: MIT */
/*
 * One rank of `ep bench`: makes its rows, times each phase and checks what came out.
 *
 * Owns all buffers of a rank. Rows are stretches of one table of small whole numbers; where a
 * stretch begins follows from source rank, token and phase, so a receiver knows every byte it
 * must get, an old result cannot pass for a new one, and sums are exact. Only the library call
 * lies between the two clock readings.
 */
#include <stdlib.h>

#include "bench.h"

#define TABLE_STARTS 4096
#define MEMCPY_MIN_BYTES ((int64_t)16 << 20)

struct bench {
    struct rank *rank;
    struct bench_case *c;
    const struct bench_params *p;
    ep_group *group;
    ep_handle *handle;
    enum bench_phase phase;
    int64_t num_rows;               /* of the output here: received, or expanded */
    int64_t num_scales;             /* per row */
    int first_expert;               /* of this rank */
    ep_dtype answer_type;           /* of combine */
    size_t element, answer_element; /* bytes of dispatch's and of combine's elements */
    char *table, *answer_table;     /* the same numbers in both types */
    char *x, *recv, *out;
    float *scales, *recv_scales, *weights, *recv_weights;
    int32_t *recv_ids, *recv_source;
    struct ep_tensor view; /* recv_x of the last dispatch */
    void *owned[16];
    int num_owned;
};

static void fill_table(char *table, size_t element, int64_t num) {
    for (int64_t i = 0; i < num; i++) {
        int v = (int)(rand_hash(7, (uint64_t)i) % 31) - 15;
        if (element == 1) {
            table[i] = (char)(v + 15);
        } else if (element == 2) {
            ((uint16_t *)(void *)table)[i] = bf16_from_float((float)v);
        } else {
            ((float *)(void *)table)[i] = (float)v;
        }
    }
}

static double read_number(const char *at, size_t element) {
    return element == 4 ? (double)*(const float *)(const void *)at
                        : (double)bf16_to_float(*(const uint16_t *)(const void *)at);
}

/* Rounds a sum as combine does when it leaves a rank. */
static double rounded(double sum, size_t element) {
    return element == 4 ? sum : (double)bf16_to_float(bf16_from_float((float)sum));
}

/* Where in the table the row of a token begins, in elements. */
static int64_t start_of(const struct bench *b, int64_t source, int64_t token) {
    uint64_t row = (uint64_t)(source * b->p->tokens + token);
    return (int64_t)(rand_hash(row, (uint64_t)b->phase) % TABLE_STARTS);
}

static float scale_of(const struct bench *b, int64_t source, int64_t token, int64_t i) {
    return (float)((start_of(b, source, token) + i) % 1021);
}

static float weight_of(int64_t k) {
    return k % 2 == 0 ? 1.0f : 0.5f; /* exact in every sum here */
}

static int owner_of(const struct bench *b, int32_t id) {
    return id < 0 ? -1 : expert_owner(id, (int)b->p->experts, (int)b->p->ranks);
}

static void fill_input(struct bench *b) {
    for (int64_t t = 0; t < b->p->tokens; t++) {
        const char *row = b->table + start_of(b, b->rank->rank, t) * (int64_t)b->element;
        memcpy(b->x + t * b->c->row_bytes, row, (size_t)b->c->row_bytes);
        for (int64_t i = 0; i < b->num_scales; i++) {
            b->scales[t * b->num_scales + i] = scale_of(b, b->rank->rank, t, i);
        }
    }
}

/* ---- operations -------------------------------------------------------------------------- */

static ep_status do_route(struct bench *b) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_tensor_2d(&ids, EP_I32, b->c->ids + b->rank->rank * b->p->tokens * b->p->topk,
                 b->p->tokens, b->p->topk);
    routing.topk_ids = &ids;
    return ep_handle_route(b->handle, &routing, NULL);
}

static ep_status do_dispatch(struct bench *b, bool arena) {
    static const ep_dtype types[] = {EP_BF16, EP_F8E4M3, EP_F32};
    const struct bench_params *p = b->p;
    struct ep_tensor x, scales, weights, recv_scales, recv_ids, recv_weights, source;
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.flags = (p->expanded ? EP_DISPATCH_EXPANDED : 0) | (arena ? EP_DISPATCH_ARENA : 0);
    ep_tensor_2d(&x, types[p->dtype], b->x, p->tokens, p->hidden);
    ep_tensor_2d(&weights, EP_F32, b->weights, p->tokens, p->topk);
    ep_tensor_2d(&recv_ids, EP_I32, b->recv_ids, b->num_rows, p->topk);
    ep_tensor_2d(&recv_weights, EP_F32, b->recv_weights, b->num_rows, p->topk);
    if (p->expanded) {
        ep_tensor_1d(&recv_weights, EP_F32, b->recv_weights, b->num_rows);
    }
    ep_tensor_2d(&source, EP_I32, b->recv_source, b->num_rows, 2);
    ep_tensor_2d(&b->view, types[p->dtype], b->recv, b->num_rows, p->hidden);
    args.x = &x;
    args.topk_weights = &weights;
    args.recv_x = &b->view;
    args.recv_topk_ids = p->expanded ? NULL : &recv_ids;
    args.recv_topk_weights = &recv_weights;
    args.recv_source = &source;
    if (b->num_scales > 0) {
        ep_tensor_2d(&scales, EP_F32, b->scales, p->tokens, b->num_scales);
        ep_tensor_2d(&recv_scales, EP_F32, b->recv_scales, b->num_rows, b->num_scales);
        args.scales = &scales;
        args.recv_scales = &recv_scales;
    }
    return ep_dispatch(b->handle, &args, NULL);
}

static ep_status do_combine(struct bench *b) {
    struct ep_combine_args args = EP_COMBINE_ARGS_INIT;
    struct ep_tensor weights, out;
    ep_tensor_1d(&weights, EP_F32, b->recv_weights, b->view.shape[0]);
    ep_tensor_2d(&out, b->answer_type, b->out, b->p->tokens, b->p->hidden);
    args.x = &b->view;
    args.weights = b->p->expanded ? &weights : NULL;
    args.out = &out;
    return ep_combine(b->handle, &args, NULL);
}

static void copy_rows(struct bench *b) {
    int64_t bytes = b->c->row_bytes;
    for (int64_t done = 0; done < b->c->memcpy_bytes / 2;) {
        for (int64_t t = 0; t < b->p->tokens; t++, done += bytes) {
            memcpy(b->out + t * b->c->answer_bytes, b->x + t * bytes, (size_t)bytes);
        }
    }
}

static ep_status run_once(struct bench *b) {
    switch (b->phase) {
    case PHASE_ROUTE:
        return do_route(b);
    case PHASE_DISPATCH_ARENA:
    case PHASE_DISPATCH_ARENA_CACHED:
        return do_dispatch(b, true);
    case PHASE_DISPATCH_MEMORY:
    case PHASE_DISPATCH_MEMORY_CACHED:
        return do_dispatch(b, false);
    case PHASE_COMBINE_ARENA:
    case PHASE_COMBINE_MEMORY:
        return do_combine(b);
    default:
        copy_rows(b);
        return EP_OK;
    }
}

/* ---- checks ------------------------------------------------------------------------------ */

static char *view_row(const struct bench *b, int64_t i, size_t element) {
    return (char *)b->view.data + i * b->view.stride[0] * (int64_t)element;
}

/* Row i of the output must be that of (source, token), chosen as k (expanded). */
static bool row_is_right(const struct bench *b, int64_t i, int64_t source, int64_t token,
                         int64_t k) {
    const struct bench_params *p = b->p;
    const char *want = b->table + start_of(b, source, token) * (int64_t)b->element;
    const char *row = view_row(b, i, b->element);
    bool right = i < b->num_rows && b->recv_source[2 * i] == source &&
                 b->recv_source[2 * i + 1] == token &&
                 memcmp(row, want, (size_t)b->c->row_bytes) == 0;
    for (int64_t s = 0; right && s < b->num_scales; s++) {
        right = b->recv_scales[i * b->num_scales + s] == scale_of(b, source, token, s);
    }
    const int32_t *ids = b->c->ids + (source * p->tokens + token) * p->topk;
    for (int64_t j = 0; right && !p->expanded && j < p->topk; j++) {
        bool here = owner_of(b, ids[j]) == b->rank->rank;
        right = b->recv_ids[i * p->topk + j] == (here ? ids[j] - b->first_expert : -1) &&
                b->recv_weights[i * p->topk + j] == (here ? weight_of(j) : 0);
    }
    return right && (!p->expanded || b->recv_weights[i] == weight_of(k));
}

/* Every row in the one order that ep.h allows. */
static int check_dispatch(struct bench *b) {
    const struct bench_params *p = b->p;
    int64_t i = 0;
    for (int64_t e = 0; e < (p->expanded ? p->experts : 1); e++) {
        for (int64_t t = 0; t < p->ranks * p->tokens; t++) {
            bool once = false;
            for (int64_t k = 0; k < p->topk && !once; k++) {
                int32_t id = b->c->ids[t * p->topk + k];
                if ((p->expanded && id != e) || owner_of(b, id) != b->rank->rank) {
                    continue;
                }
                if (!row_is_right(b, i, t / p->tokens, t % p->tokens, k)) {
                    return rank_fail(
                        b->rank, EP_OK,
                        "check: row %lld of %s is not that of rank %lld, token %lld",
                        (long long)i, bench_line(b->c, b->phase).name,
                        (long long)(t / p->tokens), (long long)(t % p->tokens));
                }
                i++;
                once = !p->expanded;
            }
        }
    }
    return 0;
}

/* The answers were the rows themselves: a token's sum is its row times what each rank adds. */
static int check_combine(struct bench *b) {
    const struct bench_params *p = b->p;
    size_t element = b->answer_element;
    for (int64_t t = 0; t < p->tokens; t++) {
        const int32_t *ids = b->c->ids + (b->rank->rank * p->tokens + t) * p->topk;
        const char *row = b->answer_table + start_of(b, b->rank->rank, t) * (int64_t)element;
        double factor[BENCH_MAX_RANKS] = {0};
        for (int64_t k = 0; k < p->topk; k++) {
            if (ids[k] >= 0) {
                double *f = &factor[owner_of(b, ids[k])];
                *f = p->expanded ? *f + (double)weight_of(k) : 1;
            }
        }
        for (int64_t h = 0; h < p->hidden; h++) {
            double v = read_number(row + h * (int64_t)element, element);
            double got =
                read_number(b->out + t * b->c->answer_bytes + h * (int64_t)element, element);
            double sum = 0;
            for (int64_t r = 0; r < p->ranks; r++) {
                sum += factor[r] != 0 ? rounded(factor[r] * v, element) : 0;
            }
            if (got != rounded(sum, element)) {
                return rank_fail(
                    b->rank, EP_OK, "check: %s: token %lld, column %lld is %g, not %g",
                    bench_line(b->c, b->phase).name, (long long)t, (long long)h, got, sum);
            }
        }
    }
    return 0;
}

/* ---- phases ------------------------------------------------------------------------------ */

/* Before a combine: a dispatch of the form it answers, and the answers in their place. */
static ep_status prepare_combine(struct bench *b) {
    bool arena = b->phase == PHASE_COMBINE_ARENA;
    ep_status st = do_dispatch(b, arena);
    if (st == EP_OK && arena) {
        st = ep_handle_arena(b->handle, b->p->expanded ? EP_DISPATCH_EXPANDED : 0,
                             b->answer_type, b->p->hidden, &b->view);
        b->view.shape[0] = b->num_rows;
    } else {
        ep_tensor_2d(&b->view, b->answer_type, b->recv, b->num_rows, b->p->hidden);
    }
    for (int64_t i = 0; st == EP_OK && i < b->num_rows; i++) {
        int64_t start = start_of(b, b->recv_source[2 * i], b->recv_source[2 * i + 1]);
        memcpy(view_row(b, i, b->answer_element),
               b->answer_table + start * (int64_t)b->answer_element,
               (size_t)b->c->answer_bytes);
    }
    return st;
}

static int measure(struct bench *b, enum bench_phase phase) {
    bool uncached = phase == PHASE_DISPATCH_ARENA || phase == PHASE_DISPATCH_MEMORY;
    bool combine = phase == PHASE_COMBINE_ARENA || phase == PHASE_COMBINE_MEMORY;
    struct bench_time *times = b->c->times + phase * b->p->iters * b->p->ranks + b->rank->rank;
    b->phase = phase;
    fill_input(b);
    ep_status st = combine ? prepare_combine(b) : EP_OK;
    for (int64_t i = -b->p->warmup; i < b->p->iters && st == EP_OK; i++) {
        st = uncached ? do_route(b) : EP_OK;
        rank_barrier(b->rank);
        int64_t start_ns = epi_now_ns();
        st = st == EP_OK ? run_once(b) : st;
        if (i >= 0) {
            times[i * b->p->ranks] = (struct bench_time){start_ns, epi_now_ns()};
        }
    }
    if (st != EP_OK) {
        return rank_fail(b->rank, st, "%s", bench_line(b->c, phase).name);
    }
    if (b->p->no_check || phase == PHASE_ROUTE || phase == PHASE_MEMCPY ||
        phase == PHASE_MEMCPY_AGAIN) {
        return 0;
    }
    return combine ? check_combine(b) : check_dispatch(b);
}

/* Zeroed, hence resident: no page fault is timed. */
static void *get(struct bench *b, int64_t num, size_t bytes) {
    return b->owned[b->num_owned++] = epi_alloc_array((size_t)num, bytes);
}

static bool allocate(struct bench *b) {
    const struct bench_params *p = b->p;
    size_t answer_bytes = (size_t)b->c->answer_bytes; /* never less than row_bytes */
    int64_t table_num = TABLE_STARTS + p->hidden;
    b->num_rows = b->c->output_rows[b->rank->rank];
    b->num_scales = b->c->scale_bytes / (int64_t)sizeof(float);
    b->answer_type = p->dtype == DTYPE_F32 ? EP_F32 : EP_BF16;
    b->element = (size_t)(b->c->row_bytes / p->hidden);
    b->answer_element = answer_bytes / (size_t)p->hidden;
    while (owner_of(b, b->first_expert) < b->rank->rank && b->first_expert < p->experts) {
        b->first_expert++;
    }
    b->recv = get(b, b->num_rows, answer_bytes);
    b->recv_scales = get(b, b->num_rows, (size_t)b->c->scale_bytes);
    b->recv_ids = get(b, b->num_rows * p->topk, sizeof *b->recv_ids);
    b->recv_weights = get(b, b->num_rows * p->topk, sizeof *b->recv_weights);
    b->recv_source = get(b, b->num_rows * 2, sizeof *b->recv_source);
    b->x = get(b, p->tokens, (size_t)b->c->row_bytes);
    b->out = get(b, p->tokens, answer_bytes);
    b->scales = get(b, p->tokens, (size_t)b->c->scale_bytes);
    b->weights = get(b, p->tokens * p->topk, sizeof *b->weights);
    b->table = get(b, table_num, b->element);
    b->answer_table = get(b, table_num, b->answer_element);
    for (int i = 0; i < b->num_owned; i++) {
        if (b->owned[i] == NULL) {
            return false;
        }
    }
    fill_table(b->table, b->element, table_num);
    fill_table(b->answer_table, b->answer_element, table_num);
    for (int64_t i = 0; i < p->tokens * p->topk; i++) {
        b->weights[i] = weight_of(i % p->topk);
    }
    return true;
}

void bench_config(const struct bench_case *c, struct ep_group_config *config) {
    const struct bench_params *p = &c->p;
    config->num_ranks = (int32_t)p->ranks;
    config->num_experts = (int32_t)p->experts;
    config->max_tokens = (int32_t)p->tokens;
    config->max_topk = (int32_t)p->topk;
    config->max_row_bytes = (int32_t)c->answer_bytes;
    config->max_scale_bytes = (int32_t)c->scale_bytes;
    config->num_workers = (int32_t)p->workers;
    config->flags = p->expanded && !p->memory_only ? EP_GROUP_EXPANDED_VIEW : 0;
    for (int r = 0; r < p->ranks && config->flags != 0; r++) {
        int64_t rows = c->output_rows[r];
        config->max_expanded_rows =
            rows > config->max_expanded_rows ? rows : config->max_expanded_rows;
    }
}

bool bench_measures(const struct bench_params *p, enum bench_phase phase) {
    bool memory = phase == PHASE_DISPATCH_MEMORY || phase == PHASE_DISPATCH_MEMORY_CACHED ||
                  phase == PHASE_COMBINE_MEMORY;
    bool cached = phase == PHASE_DISPATCH_ARENA_CACHED || phase == PHASE_DISPATCH_MEMORY_CACHED;
    return phase == PHASE_ROUTE || phase == PHASE_MEMCPY || phase == PHASE_MEMCPY_AGAIN ||
           (!(memory ? p->arena_only : p->memory_only) && !(cached && p->uncached));
}

int bench_rank(struct rank *rank, void *arg) {
    struct bench_case *c = arg;
    struct bench b = {.rank = rank, .c = c, .p = &c->p};
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    bench_config(c, &config);
    rank_config(rank, &config);
    int failed = allocate(&b) ? 0 : rank_fail(rank, EP_OK, "no memory; lower --tokens");
    ep_status st = failed == 0 ? ep_group_create(&b.group, &config) : EP_OK;
    st = failed == 0 && st == EP_OK ? ep_handle_create(&b.handle, b.group, NULL) : st;
    if (st != EP_OK) {
        failed = rank_fail(rank, st, "creating the group");
    } else if (failed == 0 && rank->rank == 0) {
        (void)ep_group_plan(b.group, &plan);
        c->arena_bytes = plan.arena_bytes;
    }
    for (int phase = 0; phase < NUM_PHASES && failed == 0; phase++) {
        if (bench_measures(&c->p, (enum bench_phase)phase)) {
            failed = measure(&b, (enum bench_phase)phase);
        }
    }
    ep_handle_destroy(&b.handle);
    ep_group_destroy(&b.group);
    for (int i = 0; i < b.num_owned; i++) {
        epi_free(b.owned[i]);
    }
    return failed;
}
