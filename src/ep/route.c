/* SPDX-License-Identifier: MIT */
/*
 * Routing and layout of a handle on the host side, public functions and all: local work, queued like
 * an operation. No peer takes part.
 */
#include "src/ep/group.h"

#define FIELD(f, to) EPI_FIELD(ep_routing, f, k_route_args, to)
static const struct epi_rule route_rules[] = {
    {FIELD(topk_ids, ids), EPI_IN, EPI_DIMS(T, K), EPI_IDS, EPI_AS(NONE, ANY), 0},
    {FIELD(token_in_rank, mask), EPI_IN, EPI_DIMS(T, R), EPI_TYPE(EP_U8), EPI_AS(NONE, ANY), 0},
};
EPI_RULES(epi_route_rules, route_rules);
#undef FIELD

#define FIELD(f) EPI_FIELD(ep_layout, f, k_layout_args, f)
static const struct epi_rule layout_rules[] = {
    {FIELD(tokens_per_rank), EPI_OUT | EPI_ADDRESS, EPI_DIMS(R, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(tokens_per_node), EPI_OUT | EPI_ADDRESS, EPI_DIMS(NODES, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(tokens_per_expert), EPI_OUT | EPI_ADDRESS, EPI_DIMS(E, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), EPI_BY_MASK},
    {FIELD(token_in_rank), EPI_OUT | EPI_ADDRESS, EPI_DIMS(T, R), EPI_TYPE(EP_U8),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(channel_prefix), EPI_OUT | EPI_ADDRESS, EPI_DIMS(R, CHANNELS), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
};
EPI_RULES(epi_layout_rules, layout_rules);

/* In the place of the first bad selection until the kernel has come to its end: a fault of the
 * group also ends the waits of its blocks for each other. */
#define UNFINISHED (~UINT64_C(0) - 1)

ep_status epi_bad_selection(const ep_handle *h, int topk, uint64_t number, int64_t id,
                            const char *then) {
    const uint64_t each = topk > 0 ? (uint64_t)topk : 1;
    const long long token = (long long)(number / each), k = (long long)(number % each);
    return epi_fail(EP_ERR_ARG,
                    "topk_ids[%lld][%lld] is %lld, must be -1 or 0..%d (token %lld, k %lld)%s",
                    token, k, (long long)id, h->experts->num - 1, token, k, then);
}

static ep_status route_before(struct epi_op *op) {
    op->args.op.h.bad[0] = UNFINISHED;
    return EP_OK;
}

static ep_status route_after(struct epi_op *op) {
    ep_handle *h = op->h;
    const uint64_t bad = op->args.op.h.bad[0];
    if (bad == UNFINISHED) {
        EPI_TRY(epi_group_check_next(h->group));
        return epi_fail(EP_ERR_INTERNAL, "the routing was not computed");
    }
    return op->args.route.id_bytes && bad != ~UINT64_C(0)
               ? epi_bad_selection(h, op->args.op.topk, bad, op->args.op.h.counts->bad_id, "")
               : EP_OK;
}

static void route_failed(struct epi_op *op) {
    op->h->routed = false;
}

static const struct epi_op_kind route_kind = {.kernel = EPI_KERNEL_ROUTE,
                                              .before = route_before,
                                              .after = route_after,
                                              .failed = route_failed};
static const struct epi_op_kind layout_kind = {.kernel = EPI_KERNEL_LAYOUT};

static ep_status run_route(ep_handle *h, const struct epi_call *call,
                           const struct ep_routing *r, void *stream) {
    struct epi_op op;
    struct k_route_args *k = &op.args.route;
    const int tokens = (int)call->dim[EPI_DIM_T];
    h->excess = tokens > h->group->config.max_tokens ? tokens : 0;
    h->tokens = h->excess ? 0 : tokens;
    h->topk = r->topk_ids ? (int)call->dim[EPI_DIM_K] : 0;
    h->by_mask = !r->topk_ids;
    h->dispatched = false;
    h->routed = true;
    const struct epi_load load = {0, h->topk, false, false};
    epi_op_begin(&op, &route_kind, h, 0, &load);
    k->id_bytes = !r->topk_ids ? 0 : r->topk_ids->dtype == EP_I64 ? 8 : 4;
    k->lenient = (h->config.flags & EP_HANDLE_LENIENT_IDS) != 0;
    k->ticket = ++h->routed_by;
    k->excess = (k_u32)h->excess;
    epi_args_fill(call, &epi_route_rules, r, EPI_IN, k);
    const ep_status st = epi_op_issue(&op, stream);
    h->captured = (op.flags & EPI_OP_CAPTURED) != 0;
    return st;
}

static ep_status run_layout(ep_handle *h, const struct epi_call *call,
                            const struct ep_layout *l, void *stream) {
    const struct epi_load load = {0, h->topk, false, false};
    struct epi_op op;
    epi_op_begin(&op, &layout_kind, h, 0, &load);
    op.args.layout.num_nodes = h->group->nodes.num;
    op.args.layout.rank_node = h->group->far ? h->group->far->node : NULL;
    epi_args_fill(call, &epi_layout_rules, l, EPI_OUT, &op.args.layout);
    return epi_op_issue(&op, stream);
}

/* More tokens than the group's maximum are told to all ranks by the dispatch; in a graph, whose every
 * replay would be refused, or beyond what any group can hold, they are an error here. */
static ep_status check_tokens(const ep_handle *h, const char *name, int64_t tokens,
                              void *stream) {
    const int most = h->config.max_tokens, groups = h->group->config.max_tokens;
    bool capturing = false;
    if (tokens > groups) {
        EPI_TRY(h->group->backend->is_capturing(h->group, stream, &capturing));
    }
    return tokens > most && (tokens <= groups || tokens > EPI_MOST_TOKENS || capturing)
               ? epi_fail(EP_ERR_ARG, "%s.shape[0] is %lld, must be 0..%d (max_tokens)%s", name,
                          (long long)tokens, most, capturing ? " in a capture" : "")
               : EP_OK;
}

/* ---- the public functions -------------------------------------------------------------------- */

ep_status ep_handle_route(ep_handle *handle, const struct ep_routing *routing, void *stream) {
    struct ep_routing r;
    struct epi_call c;
    EPI_NOT_NULL("ep_handle_route", handle);
    EPI_NOT_NULL("ep_handle_route", routing);
    EPI_NOT_FORKED("ep_handle_route", "handle", handle->process);
    EPI_TAKE(ep_routing, &r, routing);
    const struct ep_handle_config *most = &handle->config;
    epi_life_join(handle->group->life);
    if (handle->group->open_handle == handle) {
        return epi_fail(EP_ERR_STATE,
                        "ep_handle_route: an operation of the handle has begun and not "
                        "finished");
    }
    if (!r.topk_ids == !r.token_in_rank) {
        return epi_fail(EP_ERR_ARG, "ep_routing: set topk_ids or token_in_rank, %s",
                        r.topk_ids ? "not both" : "neither is set");
    }
    if (r.token_in_rank && !handle->group->config.mask_routing) {
        return epi_fail(EP_ERR_ARG, "token_in_rank needs ep_group_config.mask_routing");
    }
    EPI_TRY(epi_handle_fit(handle));
    epi_call_begin(&c, handle->group);
    EPI_TRY(epi_args_check(&c, &epi_route_rules, &r, EPI_IN));
    const int64_t tokens = c.dim[EPI_DIM_T], topk = c.dim[EPI_DIM_K];
    if (r.topk_ids && (topk < 1 || topk > most->max_topk)) {
        return epi_fail(EP_ERR_ARG, "topk_ids.shape[1] is %lld, must be 1..%d (max_topk)",
                        (long long)topk, most->max_topk);
    }
    EPI_TRY(check_tokens(handle, r.topk_ids ? "topk_ids" : "token_in_rank", tokens, stream));
    struct epi_experts *experts;
    EPI_TRY(
        epi_experts_find(handle->group, "ep_routing", r.num_experts, r.expert_rank, &experts));
    epi_handle_take_experts(handle, experts);
    return run_route(handle, &c, &r, stream);
}

ep_status ep_handle_layout(ep_handle *handle, const struct ep_layout *layout, void *stream) {
    struct ep_layout l;
    struct epi_call c;
    EPI_NOT_NULL("ep_handle_layout", handle);
    EPI_NOT_NULL("ep_handle_layout", layout);
    EPI_NOT_FORKED("ep_handle_layout", "handle", handle->process);
    EPI_TAKE(ep_layout, &l, layout);
    if (!handle->routed) {
        return epi_fail(EP_ERR_STATE, "ep_handle_layout: the handle is not routed");
    }
    if (handle->excess) {
        return epi_fail(
            EP_ERR_CAPACITY,
            "ep_handle_layout: the handle was routed with %d tokens and max_tokens is %d",
            handle->excess, handle->group->config.max_tokens);
    }
    epi_call_of(&c, handle, false);
    EPI_TRY(epi_args_check(&c, &epi_layout_rules, &l, EPI_OUT));
    return run_layout(handle, &c, &l, stream);
}
