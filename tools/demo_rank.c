/* SPDX-License-Identifier: MIT */
/*
 * One rank of `ep demo`: per step it routes its tokens, dispatches them, computes its experts and
 * combines the answers.
 *
 * Owns its experts' weights and its buffers. Answers are written over the received rows in the
 * arena and sent from there: no copy. The arithmetic is the host's, so a rank on a GPU copies
 * inputs there and rows back and forth.
 */
#include <stdlib.h>

#include "tools/demo.h"

/* What the library reads and writes: host memory, or the GPU's. */
struct buffers {
    int32_t *ids;         /* [batch][topk] */
    float *weights;       /* [batch][topk] */
    uint16_t *x;          /* [batch][hidden] */
    uint16_t *shared_out; /* [batch][hidden] */
    uint16_t *out;        /* [batch][hidden] */
    float *recv_weights;  /* [max rows] */
    int32_t *offsets;     /* [local experts + 1] */
};

struct worker {
    struct demo *demo;
    struct rank *rank;
    struct rank_report *report;
    struct moe moe;
    struct gpu *gpu; /* NULL: a host rank */
    ep_group *group;
    ep_handle *handle;
    struct buffers here; /* this process's; x and out are of the step */
    struct buffers at;   /* the library's: the same, or on the GPU */
    uint16_t *rows;      /* on a GPU: the host's copy of what was received */
    int64_t max_rows;
};

/* Adds the time since *from to a phase and moves *from on. */
static void lap(struct worker *w, enum phase phase, int64_t *from) {
    int64_t now_ns = epi_now_ns();
    w->report->ns[phase] += now_ns - *from;
    *from = now_ns;
}

static void count_remote(struct worker *w, int num) {
    for (int t = 0; t < num; t++) {
        uint64_t seen[EP_MAX_RANKS / 64] = {0};
        for (int k = 0; k < MOE_TOPK; k++) {
            int owner =
                expert_owner(w->here.ids[t * MOE_TOPK + k], MOE_EXPERTS, w->rank->num_ranks);
            if (owner != w->rank->rank) {
                w->report->selections_remote++;
                w->report->rows_remote += (seen[owner / 64] >> owner % 64 & 1) == 0;
                seen[owner / 64] |= UINT64_C(1) << owner % 64;
            }
        }
    }
}

static void compute_experts(struct worker *w, uint16_t *rows) {
    const int32_t *offsets = w->here.offsets;
    for (int i = 0; i < w->moe.num; i++) {
        uint16_t *x = rows + (int64_t)offsets[i] * MOE_HIDDEN;
        int num = offsets[i + 1] - offsets[i];
        moe_expert(&w->moe, w->moe.first + i, x, num, x);
        w->demo->shared->expert_load[w->moe.first + i] += num;
        w->report->selections_here += num;
    }
}

/* ---- copies: nothing for host ranks ------------------------------------------------------ */

static ep_status send_inputs(struct worker *w, int64_t num) {
    if (!w->gpu) {
        w->at.x = w->here.x;
        w->at.out = w->here.out;
        return EP_OK;
    }
    int64_t selections = num * MOE_TOPK * (int64_t)sizeof(int32_t); /* a weight is as large */
    ep_status st = gpu_in(w->gpu, w->at.ids, w->here.ids, selections);
    st = st == EP_OK ? gpu_in(w->gpu, w->at.weights, w->here.weights, selections) : st;
    return st == EP_OK ? gpu_in(w->gpu, w->at.x, w->here.x, num * ROW_BYTES) : st;
}

static ep_status fetch_rows(struct worker *w, const struct ep_tensor *rows, uint16_t **host) {
    *host = rows->data;
    if (!w->gpu) {
        return EP_OK;
    }
    int32_t *offsets = w->here.offsets;
    ep_status st =
        gpu_out(w->gpu, offsets, w->at.offsets, (w->moe.num + 1) * (int64_t)sizeof(*offsets));
    *host = w->rows;
    return st == EP_OK
               ? gpu_out(w->gpu, w->rows, rows->data, (int64_t)offsets[w->moe.num] * ROW_BYTES)
               : st;
}

static ep_status send_answers(struct worker *w, const struct ep_tensor *rows, int64_t num) {
    if (!w->gpu) {
        return EP_OK;
    }
    ep_status st =
        gpu_in(w->gpu, rows->data, w->rows, (int64_t)w->here.offsets[w->moe.num] * ROW_BYTES);
    return st == EP_OK ? gpu_in(w->gpu, w->at.shared_out, w->here.shared_out, num * ROW_BYTES)
                       : st;
}

static ep_status fetch_output(struct worker *w, int64_t num) {
    return w->gpu ? gpu_out(w->gpu, w->here.out, w->at.out, num * ROW_BYTES) : EP_OK;
}

/* ---- operations: done when they return ---------------------------------------------------- */

static void *stream_of(const struct worker *w) {
    return w->gpu ? gpu_stream(w->gpu) : NULL;
}

static ep_status finish(struct worker *w, ep_status st) {
    st = st == EP_OK && w->gpu ? gpu_sync(w->gpu) : st;
    return st == EP_OK && w->gpu ? ep_handle_status(w->handle) : st;
}

static ep_status do_route(struct worker *w, int num) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_tensor_2d(&ids, EP_I32, w->at.ids, num, MOE_TOPK);
    routing.topk_ids = &ids;
    return finish(w, ep_handle_route(w->handle, &routing, stream_of(w)));
}

/* *rows becomes a view of the arena: this rank's rows, grouped by expert. */
static ep_status do_dispatch(struct worker *w, int num, struct ep_tensor *rows) {
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    struct ep_tensor rows_in, weights, recv_weights, offsets;
    ep_tensor_2d(&rows_in, EP_BF16, w->at.x, num, MOE_HIDDEN);
    ep_tensor_2d(&weights, EP_F32, w->at.weights, num, MOE_TOPK);
    ep_tensor_1d(&recv_weights, EP_F32, w->at.recv_weights, w->max_rows);
    ep_tensor_1d(&offsets, EP_I32, w->at.offsets, w->moe.num + 1);
    args.flags = EP_DISPATCH_EXPANDED | EP_DISPATCH_ARENA;
    args.x = &rows_in;
    args.topk_weights = &weights;
    args.recv_x = rows;
    args.recv_topk_weights = &recv_weights;
    args.expert_offsets = &offsets;
    return finish(w, ep_dispatch(w->handle, &args, stream_of(w)));
}

/* out = shared expert + weighted sum of the answers, which lie where the rows were. */
static ep_status do_combine(struct worker *w, const struct ep_tensor *rows, int num) {
    struct ep_combine_args args = EP_COMBINE_ARGS_INIT;
    struct ep_tensor weights, shared_out, result;
    ep_tensor_1d(&weights, EP_F32, w->at.recv_weights, rows->shape[0]);
    ep_tensor_2d(&shared_out, EP_BF16, w->at.shared_out, num, MOE_HIDDEN);
    ep_tensor_2d(&result, EP_BF16, w->at.out, num, MOE_HIDDEN);
    args.x = rows;
    args.weights = &weights;
    args.bias[0] = &shared_out;
    args.out = &result;
    return finish(w, ep_combine(w->handle, &args, stream_of(w)));
}

/* One micro-batch: num tokens, which may be 0 here while other ranks have some left. */
static int step(struct worker *w, int num) {
    struct ep_tensor rows = EP_TENSOR_INIT;
    uint16_t *received = NULL;
    int64_t from = epi_now_ns();
    moe_route(&w->moe, w->here.x, num, w->here.ids, w->here.weights);
    lap(w, ROUTER, &from);
    ep_status st = send_inputs(w, num);
    lap(w, COPIES, &from);
    st = st == EP_OK ? do_route(w, num) : st;
    lap(w, ROUTE, &from);
    st = st == EP_OK ? do_dispatch(w, num, &rows) : st;
    lap(w, DISPATCH, &from);
    st = st == EP_OK ? fetch_rows(w, &rows, &received) : st;
    if (st != EP_OK) {
        return rank_fail(w->rank, st, "route and dispatch");
    }
    lap(w, COPIES, &from);
    compute_experts(w, received);
    moe_expert(&w->moe, MOE_SHARED, w->here.x, num, w->here.shared_out);
    lap(w, EXPERTS, &from);
    st = send_answers(w, &rows, num);
    lap(w, COPIES, &from);
    st = st == EP_OK ? do_combine(w, &rows, num) : st;
    lap(w, COMBINE, &from);
    st = st == EP_OK ? fetch_output(w, num) : st;
    lap(w, COPIES, &from);
    count_remote(w, num);
    return st == EP_OK ? 0 : rank_fail(w->rank, st, "combine");
}

/* ---- everything -------------------------------------------------------------------------- */

static bool allocate_here(struct worker *w) {
    struct buffers *here = &w->here;
    size_t batch = (size_t)w->demo->batch;
    here->ids = malloc(sizeof(*here->ids) * batch * MOE_TOPK);
    here->weights = malloc(sizeof(*here->weights) * batch * MOE_TOPK);
    here->shared_out = malloc(batch * ROW_BYTES);
    here->recv_weights = malloc(sizeof(*here->recv_weights) * (size_t)w->max_rows);
    here->offsets = malloc(sizeof(*here->offsets) * (MOE_EXPERTS + 1));
    w->rows = w->gpu ? malloc((size_t)w->max_rows * ROW_BYTES) : NULL;
    w->at = *here;
    return here->ids && here->weights && here->shared_out && here->recv_weights &&
           here->offsets && (!w->gpu || w->rows);
}

static ep_status allocate_there(struct worker *w) {
    struct buffers *at = &w->at;
    int64_t batch = w->demo->batch;
    at->ids = gpu_alloc(w->gpu, batch * MOE_TOPK, sizeof(*at->ids));
    at->weights = gpu_alloc(w->gpu, batch * MOE_TOPK, sizeof(*at->weights));
    at->x = gpu_alloc(w->gpu, batch, ROW_BYTES);
    at->shared_out = gpu_alloc(w->gpu, batch, ROW_BYTES);
    at->out = gpu_alloc(w->gpu, batch, ROW_BYTES);
    at->recv_weights = gpu_alloc(w->gpu, w->max_rows, sizeof(*at->recv_weights));
    at->offsets = gpu_alloc(w->gpu, MOE_EXPERTS + 1, sizeof(*at->offsets));
    return at->ids && at->weights && at->x && at->shared_out && at->out && at->recv_weights &&
                   at->offsets
               ? EP_OK
               : EP_ERR_NOMEM;
}

/* What it allocates goes with the process. */
static int worker_open(struct worker *w) {
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    rank_config(w->rank, &config);
    config.flags = EP_GROUP_EXPANDED_VIEW;
    config.num_experts = MOE_EXPERTS;
    config.max_tokens = (int32_t)w->demo->batch;
    config.max_topk = MOE_TOPK;
    config.max_row_bytes = ROW_BYTES;
    ep_status st = EP_OK;
    if (w->demo->gpus) {
        config.device = EP_DEVICE_CUDA;
        config.device_index = gpu_of_rank(w->demo->gpus, w->rank->rank);
        st = gpu_open(&w->gpu, config.device_index);
    }
    st = st == EP_OK ? ep_group_create(&w->group, &config) : st;
    st = st == EP_OK ? ep_handle_create(&w->handle, w->group, NULL) : st;
    st = st == EP_OK ? ep_group_plan(w->group, &plan) : st;
    if (st != EP_OK) {
        return rank_fail(w->rank, st, "creating the group");
    }
    int first = 0;
    while (expert_owner(first, MOE_EXPERTS, w->rank->num_ranks) < w->rank->rank) {
        first++;
    }
    w->report->arena_bytes = plan.arena_bytes;
    w->max_rows = plan.max_expanded_rows;
    if (!moe_create(&w->moe, first, ep_group_num_local_experts(w->group)) ||
        !allocate_here(w)) {
        return rank_fail(w->rank, EP_OK, "no memory");
    }
    st = w->gpu ? allocate_there(w) : EP_OK;
    return st == EP_OK ? 0 : rank_fail(w->rank, st, "memory of the GPU");
}

int demo_rank(struct rank *rank, void *arg) {
    struct demo *demo = arg;
    struct worker w = {.demo = demo, .rank = rank, .report = &demo->shared->rank[rank->rank]};
    int failed = worker_open(&w);
    int64_t first = demo->num_tokens * rank->rank / rank->num_ranks;
    int64_t end = demo->num_tokens * (rank->rank + 1) / rank->num_ranks;
    for (int64_t i = 0; i < demo->num_steps && failed == 0; i++) {
        int num = (int)(end - first < demo->batch ? end - first : demo->batch);
        w.here.x = demo->x + first * MOE_HIDDEN;
        w.here.out = demo->out + first * MOE_HIDDEN;
        failed = step(&w, num);
        first += num;
        atomic_fetch_add(&demo->shared->tokens_done, num);
    }
    ep_handle_destroy(&w.handle);
    ep_group_destroy(&w.group);
    gpu_close(&w.gpu);
    return failed;
}
