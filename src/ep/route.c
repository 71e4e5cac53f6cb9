/* SPDX-License-Identifier: MIT */
/*
 * Routing and layout of a handle: local work, queued like an operation. No peer takes part.
 */
#include "src/ep/group.h"

/* In the place of the first bad selection until the kernel has come to its end: a fault of the
 * group also ends the waits of its blocks for each other. */
#define UNFINISHED (~UINT64_C(0) - 1)

ep_status epi_bad_selection(const ep_handle *h, int topk, uint64_t number, int64_t id,
                            const char *then) {
    const uint64_t each = topk > 0 ? (uint64_t)topk : 1;
    const long long token = (long long)(number / each), k = (long long)(number % each);
    return epi_fail(EP_ERR_ARG,
                    "topk_ids[%lld][%lld] is %lld, must be -1 or 0..%d (token %lld, k %lld)%s",
                    token, k, (long long)id, h->group->config.num_experts - 1, token, k, then);
}

static ep_status route_before(struct epi_op *op) {
    op->h->k.bad[0] = UNFINISHED;
    return EP_OK;
}

static ep_status route_after(struct epi_op *op) {
    ep_handle *h = op->h;
    const uint64_t bad = h->k.bad[0];
    if (bad == UNFINISHED) {
        EPI_TRY(epi_group_check_next(h->group));
        return epi_fail(EP_ERR_INTERNAL, "the routing was not computed");
    }
    return op->args.route.id_bytes && bad != ~UINT64_C(0)
               ? epi_bad_selection(h, op->args.op.topk, bad, h->notice->bad_id, "")
               : EP_OK;
}

static void route_failed(struct epi_op *op) {
    op->h->routed = false;
}

static const struct epi_op_kind route_kind = {.name = "ep_handle_route",
                                              .kernel = EPI_KERNEL_ROUTE,
                                              .local = true,
                                              .before = route_before,
                                              .after = route_after,
                                              .failed = route_failed};
static const struct epi_op_kind layout_kind = {
    .name = "ep_handle_layout", .kernel = EPI_KERNEL_LAYOUT, .local = true};

ep_status epi_handle_route(ep_handle *h, const struct epi_call *call,
                           const struct ep_routing *r, void *stream) {
    struct epi_op op;
    struct k_route_args *k = &op.args.route;
    h->tokens = (int)call->dim[EPI_DIM_T];
    h->topk = r->topk_ids ? (int)call->dim[EPI_DIM_K] : 0;
    h->by_mask = !r->topk_ids;
    h->dispatched = false;
    h->routed = true;
    const struct epi_load load = {0, h->topk, false, false};
    epi_op_begin(&op, &route_kind, h, 0, &load);
    k->id_bytes = !r->topk_ids ? 0 : r->topk_ids->dtype == EP_I64 ? 8 : 4;
    k->lenient = (h->config.flags & EP_HANDLE_LENIENT_IDS) != 0;
    k->ticket = ++h->routed_by;
    epi_args_fill(call, &epi_route_rules, r, EPI_IN, k);
    const ep_status st = epi_op_issue(&op, stream);
    h->captured = (op.flags & EPI_OP_CAPTURED) != 0;
    return st;
}

ep_status epi_handle_layout(ep_handle *h, const struct epi_call *call,
                            const struct ep_layout *l, void *stream) {
    const struct epi_load load = {0, h->topk, false, false};
    struct epi_op op;
    epi_op_begin(&op, &layout_kind, h, 0, &load);
    op.args.layout.num_nodes = 1;
    epi_args_fill(call, &epi_layout_rules, l, EPI_OUT, &op.args.layout);
    return epi_op_issue(&op, stream);
}
