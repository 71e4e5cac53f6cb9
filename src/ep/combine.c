/* SPDX-License-Identifier: MIT */
/*
 * Combine on the host side: the rules of its arguments, the public function that checks them, and
 * the kernel's arguments. op.c does the rest.
 */
#include "src/ep/group.h"

#define FIELD(f, to) EPI_FIELD(ep_combine_args, f, k_combine_args, to)
static const struct epi_rule combine_rules[] = {
    {FIELD(x, x), EPI_IN | EPI_REQUIRED | EPI_ROW_BYTES, EPI_DIMS(ROWS, HIDDEN), EPI_SUMMABLE,
     EPI_AS(X, ROWS), 0},
    {FIELD(weights, weights), EPI_IN, EPI_DIMS(ROWS, NONE), EPI_TYPE(EP_F32), EPI_AS(NONE, ANY),
     0},
    {FIELD(topk_weights, topk_weights), EPI_IN | EPI_FLAT, EPI_DIMS(ROWS, K), EPI_TYPE(EP_F32),
     EPI_AS(NONE, ANY), EPI_BY_MASK},
    {FIELD(bias[0], bias0), EPI_LATE, EPI_DIMS(T, HIDDEN), EPI_SUMMABLE, EPI_AS(X, ROWS), 0},
    {FIELD(bias[1], bias1), EPI_LATE, EPI_DIMS(T, HIDDEN), EPI_SUMMABLE, EPI_AS(X, ROWS), 0},
    {FIELD(out, out), EPI_OUT | EPI_REQUIRED, EPI_DIMS(T, HIDDEN), EPI_SUMMABLE,
     EPI_AS(X, ROWS), 0},
    {FIELD(out_topk_weights, out_weights), EPI_OUT, EPI_DIMS(T, K), EPI_TYPE(EP_F32),
     EPI_AS(NONE, ANY), EPI_NO_WEIGHTS},
};
EPI_RULES(epi_combine_rules, combine_rules);

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
    const ep_status st = op->flags & EPI_OP_FINISH ? EP_OK : check_x_rows(op);
    if (st != EP_OK) { /* the peers are in this operation: do not let them wait */
        epi_group_raise(g, st, g->rank, op->number);
    }
    return st;
}

static const struct epi_op_kind combine_kind = {
    .kernel = EPI_KERNEL_COMBINE, .faults = &epi_faults_end_group, .before = combine_before};

static void fill_inputs(struct epi_op *op, const struct epi_call *call,
                        const struct ep_combine_args *a) {
    const ep_handle *h = op->h;
    struct k_combine_args *k = &op->args.combine;
    k->x_rows = a->x->shape[0] < INT32_MAX ? a->x->shape[0] : INT32_MAX;
    k->far = h->group->far;
    k->types = K_TYPES(a->x->dtype, EP_DTYPE_NONE);
    k->dtype = a->x->dtype;
    k->stages = op->shape.stages;
    k->stage_bytes = op->shape.stage_bytes;
    k->flags = K_DO_SEND | (h->expanded ? K_DO_EXPAND : 0) |
               (a->topk_weights ? K_DO_WEIGHTS : 0) |
               (h->expanded || a->weights ? K_DO_REDUCE : 0);
    epi_args_fill(call, &epi_combine_rules, a, EPI_IN, k);
}

static ep_status run_combine(const char *fn, ep_handle *h, const struct epi_call *call,
                             const struct ep_combine_args *a, uint32_t part, void *stream) {
    struct epi_op op;
    uint32_t captured = 0;
    if (part) {
        EPI_TRY(epi_half_stream(fn, h, part, stream, &captured));
    }
    if (part == EPI_OP_FINISH) {
        epi_half_continue(&op, h);
    } else {
        const struct epi_load load = {epi_row_bytes(a->x), h->topk, h->expanded, true};
        epi_op_begin(&op, &combine_kind, h, a->num_workers, &load);
        op.flags |= part;
        fill_inputs(&op, call, a);
        if (!h->group->backend->on_device && !stream && atomic_load(&h->pending) == 0 &&
            !atomic_load(&h->lacks_rows)) {
            EPI_TRY(check_x_rows(&op)); /* known already: refuse before peers are involved */
        }
    }
    if (part != EPI_OP_BEGIN) {
        op.args.op.flags |= K_DO_RECV;
        epi_args_fill(call, &epi_combine_rules, a, EPI_OUT | EPI_LATE, &op.args.combine);
    }
    op.flags |= captured;
    return epi_op_issue(&op, stream);
}

static ep_status combine(const char *fn, ep_handle *handle, const struct ep_combine_args *args,
                         uint32_t part, void *stream) {
    struct ep_combine_args a;
    struct epi_call c;
    EPI_NOT_NULL("ep_combine", handle);
    EPI_NOT_NULL("ep_combine", args);
    EPI_NOT_FORKED(fn, "handle", handle->process);
    EPI_TAKE(ep_combine_args, &a, args);
    EPI_TRY(epi_group_admit(handle->group));
    EPI_TRY(epi_half_admit(fn, handle, &combine_kind, part));
    if (part != EPI_OP_FINISH && !handle->dispatched) {
        return epi_fail(EP_ERR_STATE, "%s: the handle was not dispatched since it was routed",
                        fn);
    }
    if (a.flags || a.num_workers < 0) {
        return epi_fail(EP_ERR_ARG, "ep_combine_args.%s is %d, must be %s",
                        a.flags ? "flags" : "num_workers",
                        a.flags ? (int)a.flags : a.num_workers, a.flags ? "0" : "at least 0");
    }
    epi_call_of(&c, handle, handle->expanded);
    if (part == EPI_OP_FINISH) {
        epi_half_recall(&c, handle);
    } else {
        c.is |= a.topk_weights ? 0 : EPI_NO_WEIGHTS;
    }
    EPI_TRY(epi_args_check(&c, &epi_combine_rules, &a, epi_half_roles(part)));
    if (part == EPI_OP_BEGIN) {
        handle->open_call = c;
    }
    return run_combine(fn, handle, &c, &a, part, stream);
}

ep_status ep_combine(ep_handle *handle, const struct ep_combine_args *args, void *stream) {
    return combine("ep_combine", handle, args, 0, stream);
}

ep_status ep_combine_begin(ep_handle *handle, const struct ep_combine_args *args,
                           void *stream) {
    return combine("ep_combine_begin", handle, args, EPI_OP_BEGIN, stream);
}

ep_status ep_combine_finish(ep_handle *handle, const struct ep_combine_args *args,
                            void *stream) {
    return combine("ep_combine_finish", handle, args, EPI_OP_FINISH, stream);
}
