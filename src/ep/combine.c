/* SPDX-License-Identifier: MIT */
/*
 * Combine on the host side: from checked arguments to the kernel's.
 */
#include "src/ep/group.h"

/* Rows of x that the kernel will read, known only now that the dispatch has run. */
static ep_status check_x_rows(const struct epi_op *op) {
    const struct k_handle *k = &op->h->k;
    const struct k_combine_args *a = &op->args.combine;
    const int64_t rows =
        (a->flags & K_DO_EXPAND) ? (int64_t)k->expert_start[a->g.num_local] : k->counts->rows;
    if (a->x_rows < rows) {
        return epi_fail(EP_ERR_ARG,
                        "x.shape[0] is %lld, must be at least the %lld rows received",
                        (long long)a->x_rows, (long long)rows);
    }
    return EP_OK;
}

static ep_status combine_before(struct epi_op *op) {
    ep_group *g = op->h->group;
    if (atomic_load(&op->h->lacks_rows)) {
        return epi_fail(EP_ERR_STATE, "combine after a dispatch that did not fit");
    }
    const ep_status st = check_x_rows(op);
    if (st != EP_OK) { /* the peers are in this operation: do not let them wait */
        epi_group_raise(g, st, g->rank, op->number);
    }
    return st;
}

static const struct epi_op_kind combine_kind = {.name = "ep_combine",
                                                .kernel = EPI_KERNEL_COMBINE,
                                                .check = epi_group_check,
                                                .before = combine_before};

static void set_args(struct epi_op *op, const struct epi_call *call,
                     const struct ep_combine_args *a) {
    const ep_handle *h = op->h;
    struct k_combine_args *k = &op->args.combine;
    k->x_rows = a->x->shape[0];
    k->dtype = a->x->dtype;
    k->stages = op->shape.stages;
    k->stage_bytes = op->shape.stage_bytes;
    k->flags = (h->expanded ? K_DO_EXPAND : 0) | (a->topk_weights ? K_DO_WEIGHTS : 0) |
               (h->expanded || a->weights ? K_DO_REDUCE : 0);
    epi_args_fill(call, &epi_combine_rules, a, EPI_IN | EPI_OUT, k);
}

ep_status epi_combine(ep_handle *h, const struct epi_call *call,
                      const struct ep_combine_args *a, void *stream) {
    const struct epi_load load = {epi_row_bytes(a->x), h->topk, h->expanded, true};
    struct epi_op op;
    epi_op_begin(&op, &combine_kind, h, a->num_workers, &load);
    set_args(&op, call, a);
    if (!h->group->backend->on_device && !stream && atomic_load(&h->pending) == 0 &&
        !atomic_load(&h->lacks_rows)) {
        EPI_TRY(check_x_rows(&op)); /* known already: refuse before the peers are involved */
    }
    return epi_op_issue(&op, stream);
}
