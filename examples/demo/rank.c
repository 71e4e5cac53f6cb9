/* SPDX-License-Identifier: MIT */
/*
 * One rank of `ep demo`: per step it routes its tokens, dispatches them, computes its experts
 * and combines the answers.
 *
 * Owns its experts' weights and its buffers. Answers are written over the received rows and
 * sent from there: on the host these are in the arena, and nothing is copied. The arithmetic
 * is the host's, so all that a rank on a GPU reads and writes is in pinned memory, which both
 * reach.
 */
#include <stdlib.h>

#include "examples/demo/demo.h"

struct worker {
    struct demo *demo;
    struct rank *rank;
    struct rank_report *report;
    struct moe moe;
    struct gpu *gpu; /* NULL: a host rank */
    ep_group *group;
    ep_handle *handle;
    int32_t *ids;         /* [batch][topk] */
    float *weights;       /* [batch][topk] */
    uint16_t *x;          /* [batch][hidden] */
    uint16_t *shared_out; /* [batch][hidden] */
    uint16_t *out;        /* [batch][hidden] */
    uint16_t *recv;       /* [max rows][hidden]; NULL on the host: a view of the arena */
    float *recv_weights;  /* [max rows] */
    int32_t *offsets;     /* [local experts + 1] */
    int64_t max_rows;
    bool out_of_memory;
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
                tool_expert_rank(w->ids[t * MOE_TOPK + k], MOE_EXPERTS, w->rank->num_ranks);
            if (owner != w->rank->rank) {
                w->report->selections_remote++;
                w->report->rows_remote += (seen[owner / 64] >> owner % 64 & 1) == 0;
                seen[owner / 64] |= UINT64_C(1) << owner % 64;
            }
        }
    }
}

static void compute_experts(struct worker *w, uint16_t *rows) {
    const int32_t *offsets = w->offsets;
    for (int i = 0; i < w->moe.num; i++) {
        uint16_t *x = rows + (int64_t)offsets[i] * MOE_HIDDEN;
        int num = offsets[i + 1] - offsets[i];
        moe_expert(&w->moe, w->moe.first + i, x, num, x);
        w->demo->shared->expert_load[w->moe.first + i] += num;
        w->report->selections_here += num;
    }
}

/* ---- operations: done when they return ---------------------------------------------------- */

static void *stream_of(const struct worker *w) {
    return w->gpu ? gpu_stream(w->gpu) : NULL;
}

static ep_status finish(struct worker *w, ep_status st) {
    if (st != EP_OK || !w->gpu) {
        return st;
    }
    EPI_TRY(gpu_sync(w->gpu));
    return ep_handle_status(w->handle);
}

static ep_status do_route(struct worker *w, int num) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_tensor_2d(&ids, EP_I32, w->ids, num, MOE_TOPK);
    routing.topk_ids = &ids;
    return finish(w, ep_handle_route(w->handle, &routing, stream_of(w)));
}

/* *rows becomes this rank's rows, grouped by expert. */
static ep_status do_dispatch(struct worker *w, int num, struct ep_tensor *rows) {
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    struct ep_tensor rows_in, weights, recv_weights, offsets;
    ep_tensor_2d(&rows_in, EP_BF16, w->x, num, MOE_HIDDEN);
    ep_tensor_2d(&weights, EP_F32, w->weights, num, MOE_TOPK);
    ep_tensor_1d(&recv_weights, EP_F32, w->recv_weights, w->max_rows);
    ep_tensor_1d(&offsets, EP_I32, w->offsets, w->moe.num + 1);
    args.flags = EP_DISPATCH_EXPANDED | (w->recv ? 0 : EP_DISPATCH_ARENA);
    ep_tensor_2d(rows, EP_BF16, w->recv, w->max_rows, MOE_HIDDEN);
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
    ep_tensor_1d(&weights, EP_F32, w->recv_weights, rows->shape[0]);
    ep_tensor_2d(&shared_out, EP_BF16, w->shared_out, num, MOE_HIDDEN);
    ep_tensor_2d(&result, EP_BF16, w->out, num, MOE_HIDDEN);
    args.x = rows;
    args.weights = &weights;
    args.bias[0] = &shared_out;
    args.out = &result;
    return finish(w, ep_combine(w->handle, &args, stream_of(w)));
}

/* One micro-batch: the next num tokens, which may be 0 here while other ranks have some left. */
static int step(struct worker *w, int64_t first, int num) {
    struct ep_tensor rows = EP_TENSOR_INIT;
    memcpy(w->x, w->demo->x + first * MOE_HIDDEN, (size_t)num * ROW_BYTES);
    int64_t from = epi_now_ns();
    moe_route(&w->moe, w->x, num, w->ids, w->weights);
    lap(w, ROUTER, &from);
    ep_status st = do_route(w, num);
    lap(w, ROUTE, &from);
    st = st == EP_OK ? do_dispatch(w, num, &rows) : st;
    lap(w, DISPATCH, &from);
    if (st != EP_OK) {
        return rank_fail(w->rank, st, "route and dispatch");
    }
    compute_experts(w, rows.data);
    moe_expert(&w->moe, MOE_SHARED, w->x, num, w->shared_out);
    lap(w, EXPERTS, &from);
    st = do_combine(w, &rows, num);
    lap(w, COMBINE, &from);
    if (st != EP_OK) {
        return rank_fail(w->rank, st, "combine");
    }
    memcpy(w->demo->out + first * MOE_HIDDEN, w->out, (size_t)num * ROW_BYTES);
    count_remote(w, num);
    return 0;
}

/* ---- everything -------------------------------------------------------------------------- */

static void *get(struct worker *w, int64_t num, int64_t bytes) {
    size_t all = (size_t)(num * bytes);
    void *p = w->gpu ? gpu_alloc_pinned(w->gpu, all) : malloc(all);
    w->out_of_memory = w->out_of_memory || !p;
    return p;
}

static bool allocate(struct worker *w) {
    int64_t batch = w->demo->batch;
    w->ids = get(w, batch * MOE_TOPK, sizeof(*w->ids));
    w->weights = get(w, batch * MOE_TOPK, sizeof(*w->weights));
    w->x = get(w, batch, ROW_BYTES);
    w->shared_out = get(w, batch, ROW_BYTES);
    w->out = get(w, batch, ROW_BYTES);
    w->recv_weights = get(w, w->max_rows, sizeof(*w->recv_weights));
    w->offsets = get(w, MOE_EXPERTS + 1, sizeof(*w->offsets));
    w->recv = w->gpu ? get(w, w->max_rows, ROW_BYTES) : NULL;
    return !w->out_of_memory;
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
    while (tool_expert_rank(first, MOE_EXPERTS, w->rank->num_ranks) < w->rank->rank) {
        first++;
    }
    w->report->arena_bytes = plan.arena_bytes;
    w->max_rows = plan.max_expanded_rows;
    if (!moe_create(&w->moe, first, ep_group_num_local_experts(w->group)) || !allocate(w)) {
        return rank_fail(w->rank, EP_OK, "no memory");
    }
    return 0;
}

int demo_rank(struct rank *rank, void *arg) {
    struct demo *demo = arg;
    struct worker w = {.demo = demo, .rank = rank, .report = &demo->shared->rank[rank->rank]};
    int failed = worker_open(&w);
    int64_t first = demo->num_tokens * rank->rank / rank->num_ranks;
    int64_t end = demo->num_tokens * (rank->rank + 1) / rank->num_ranks;
    for (int64_t i = 0; i < demo->num_steps && failed == 0; i++) {
        int num = (int)(end - first < demo->batch ? end - first : demo->batch);
        failed = step(&w, first, num);
        first += num;
        atomic_fetch_add(&demo->shared->tokens_done, num);
    }
    ep_handle_destroy(&w.handle);
    ep_group_destroy(&w.group);
    gpu_close(&w.gpu);
    return failed;
}
