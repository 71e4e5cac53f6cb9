/* SPDX-License-Identifier: MIT */
/*
 * Dispatch on the host side: the rules of its arguments, the public functions that check them, the
 * kernel's arguments, and from what the kernel left behind to a status. op.c does the rest.
 */
#include "src/ep/group.h"

#define FIELD(f, to) EPI_FIELD(ep_dispatch_args, f, k_dispatch_args, to)
static const struct epi_rule dispatch_rules[] = {
    {FIELD(x, x), EPI_IN | EPI_REQUIRED | EPI_ROW_BYTES, EPI_DIMS(T, HIDDEN), EPI_ROWS,
     EPI_AS(X, ROWS), 0},
    {FIELD(scales, scales), EPI_IN | EPI_SCALE_BYTES, EPI_DIMS(T, SCALES), EPI_SCALES,
     EPI_AS(SCALES, ANY), 0},
    {FIELD(topk_weights, weights), EPI_IN, EPI_DIMS(T, K), EPI_TYPE(EP_F32), EPI_AS(NONE, ANY),
     EPI_BY_MASK},
    {FIELD(recv_x, recv_x), EPI_OUT | EPI_NOT_ARENA, EPI_DIMS(ROWS, HIDDEN), EPI_ROWS,
     EPI_AS(X, ROWS), 0},
    {FIELD(recv_scales, recv_scales), EPI_OUT | EPI_COLUMNS, EPI_DIMS(ROWS, SCALES), EPI_SCALES,
     EPI_AS(SCALES, DENSE), EPI_NO_SCALES},
    {FIELD(recv_topk_ids, recv_ids), EPI_OUT, EPI_DIMS(ROWS, K), EPI_IDS, EPI_AS(NONE, ANY),
     EPI_EXPANDED | EPI_BY_MASK},
    {FIELD(recv_topk_weights, recv_weights), EPI_OUT | EPI_FLAT, EPI_DIMS(ROWS, K),
     EPI_TYPE(EP_F32), EPI_AS(NONE, ANY), EPI_NO_WEIGHTS},
    {FIELD(recv_source, recv_source), EPI_OUT, EPI_DIMS(ROWS, 2), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(expert_counts, expert_counts), EPI_OUT, EPI_DIMS(L, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(expert_offsets, expert_offsets), EPI_OUT, EPI_DIMS(L_END, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), EPI_COMPACT},
    {FIELD(num_rows, num_rows), EPI_OUT, EPI_DIMS(1, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(source_ends, source_ends), EPI_OUT, EPI_DIMS(R, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(expert_ends, expert_ends), EPI_OUT, EPI_DIMS(L, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
};
EPI_RULES(epi_dispatch_rules, dispatch_rules);

/* ---- hooks ---------------------------------------------------------------------------------- */

/* Under the group's mutex: what the handle is from now on. */
static void dispatch_issued(struct epi_op *op) {
    ep_handle *h = op->h;
    if (op->flags & EPI_OP_FINISH) {
        return;
    }
    op->args.dispatch.ticket = (k_u32)op->number;
    if (!(op->flags & EPI_OP_CACHED)) {
        h->counted_by = op->number;
    }
    h->dispatched = true;
}

static ep_status dispatch_before(struct epi_op *op) {
    ep_handle *h = op->h;
    if (!atomic_load(&h->lacks_rows)) {
        return EP_OK;
    }
    if (op->flags & EPI_OP_FINISH) {
        op->flags |= EPI_OP_OPEN; /* begin has ended the operation */
        return epi_fail_need(op->g, op->args.op.h.counts);
    }
    return op->flags & EPI_OP_CACHED
               ? epi_fail(EP_ERR_STATE,
                          "cached dispatch of a handle whose first dispatch did not fit")
               : EP_OK;
}

/* Rows that expanded output takes, which kernels count no further than 32 bits. */
static int64_t expanded_rows(const struct epi_op *op) {
    const struct k_handle *k = &op->args.op.h;
    const struct k_dispatch_args *a = &op->args.dispatch;
    int64_t sum = k->expert_start[a->g.num_local];
    if (sum < UINT32_MAX) {
        return sum;
    }
    sum = 0;
    for (int e = 0; e < a->g.num_local; e++) {
        int64_t rows = 0;
        for (int s = 0; s < a->g.num_ranks; s++) {
            rows += k->recv_expert[(int64_t)s * a->g.num_local + e];
        }
        sum += (rows + a->alignment - 1) / a->alignment * a->alignment;
    }
    return sum;
}

static ep_status check_output(const struct epi_op *op) {
    const struct k_dispatch_args *a = &op->args.dispatch;
    const bool expand = (a->flags & K_DO_EXPAND) != 0;
    const int64_t rows = expand ? expanded_rows(op) : op->args.op.h.counts->rows;
    const bool small_view = (op->flags & EPI_OP_ARENA) && rows > a->x_rows;
    if (!small_view && rows <= a->capacity) {
        return EP_OK;
    }
    atomic_store(&op->h->output_rows, rows);
    return small_view
               ? epi_fail(EP_ERR_CAPACITY,
                          "the expanded view needs %lld rows and max_expanded_rows is %lld",
                          (long long)rows, (long long)a->x_rows)
               : epi_fail(EP_ERR_CAPACITY,
                          "%lld rows are needed and the outputs hold %lld: rows past "
                          "them were not written",
                          (long long)rows, (long long)a->capacity);
}

static ep_status dispatch_after(struct epi_op *op) {
    ep_handle *h = op->h;
    if (op->args.op.flags & K_DO_COUNTS) {
        atomic_store(&h->lacks_rows, op->args.op.h.counts->need != 0);
    }
    if (atomic_load(&h->lacks_rows)) {
        return epi_fail_need(op->g, op->args.op.h.counts);
    }
    return op->flags & EPI_OP_BEGIN ? EP_OK : check_output(op);
}

static void dispatch_clear(struct epi_op *op) {
    struct k_dispatch_args a = op->args.dispatch;
    a.flags |= K_DO_NOTHING;
    epi_run_local(op->h->group->run, EPI_KERNEL_DISPATCH, &a, 1);
}

/* Nothing was dispatched, unless only the output was small. */
static void dispatch_failed(struct epi_op *op) {
    ep_handle *h = op->h;
    ep_group *g = h->group;
    pthread_mutex_lock(&g->mutex);
    h->dispatched =
        h->dispatched && !atomic_load(&h->lacks_rows) && !epi_group_is_over(g, g->issued);
    pthread_mutex_unlock(&g->mutex);
}

static const struct epi_op_kind dispatch_kind = {.kernel = EPI_KERNEL_DISPATCH,
                                                 .faults = &epi_faults_end_group,
                                                 .issued = dispatch_issued,
                                                 .before = dispatch_before,
                                                 .after = dispatch_after,
                                                 .clear = dispatch_clear,
                                                 .failed = dispatch_failed};

/* ---- from arguments to the kernel's --------------------------------------------------------- */

static void set_inputs(struct epi_op *op, const struct epi_call *call,
                       const struct ep_dispatch_args *a) {
    ep_handle *h = op->h;
    struct k_dispatch_args *k = &op->args.dispatch;
    const struct ep_tensor *scales = a->scales;
    k->num_scales = scales ? (k_i32)scales->shape[1] : 0;
    k->scale_bytes = scales ? (k_i32)ep_dtype_bytes((ep_dtype)scales->dtype) : 1;
    k->flags |= K_DO_SEND | (a->topk_weights ? K_DO_WEIGHTS : 0);
    k->far = h->group->far;
    k->types = K_TYPES(a->x->dtype, scales ? scales->dtype : EP_DTYPE_NONE);
    k->stages = op->shape.stages;
    k->stage_bytes = op->shape.stage_bytes;
    if (h->dispatched) {
        op->flags |= EPI_OP_CACHED;
    } else {
        k->flags |= K_DO_COUNTS;
    }
    epi_args_fill(call, &epi_dispatch_rules, a, EPI_IN, k);
    h->x_dtype = a->x->dtype;
    h->x_cols = a->x->shape[1];
}

static void take_slot(struct epi_op *op) {
    ep_group *g = op->h->group;
    pthread_mutex_lock(&g->mutex);
    op->h->slot = op->args.dispatch.slot = g->next_slot;
    g->next_slot = (g->next_slot + 1) % g->plan.num_slots;
    pthread_mutex_unlock(&g->mutex);
}

/* Output in the arena: compact rows are there already, expanded ones are copied to their view. */
static void set_view(struct epi_op *op, const struct ep_dispatch_args *a) {
    const ep_handle *h = op->h;
    struct k_dispatch_args *k = &op->args.dispatch;
    const uint32_t form = a->flags & EP_DISPATCH_EXPANDED;
    struct ep_tensor view;
    epi_handle_arena(h, form, (ep_dtype)h->x_dtype, h->x_cols, &view);
    if (form) {
        k->recv_x = epi_array(&view);
    }
    k->x_rows = view.shape[0];
    op->flags |= EPI_OP_ARENA;
    if (a->recv_x) {
        *a->recv_x = view;
    }
}

/* Rows of expanded output, at most. */
static int64_t most_rows(const struct epi_op *op) {
    const ep_group *g = op->h->group;
    return g->plan.info.max_recv_rows * op->h->topk +
           (int64_t)op->args.op.g.num_local * op->args.dispatch.alignment;
}

static void set_outputs(struct epi_op *op, const struct epi_call *call,
                        const struct ep_dispatch_args *a) {
    struct k_dispatch_args *k = &op->args.dispatch;
    const int64_t capacity = call->dim[EPI_DIM_ROWS];
    op->h->expanded = (a->flags & EP_DISPATCH_EXPANDED) != 0;
    atomic_store(&op->h->output_rows, 0);
    k->flags |= K_DO_RECV | (op->h->expanded ? K_DO_EXPAND : 0) |
                (a->flags & EP_DISPATCH_ZERO_GAPS ? K_DO_ZERO_GAPS : 0);
    k->alignment = a->alignment ? a->alignment : 1;
    k->id_bytes = a->recv_topk_ids && a->recv_topk_ids->dtype == EP_I64 ? 8 : 4;
    /* No output has rows, or more than offsets can name. */
    k->capacity = k->x_rows = capacity < 0 || capacity > INT32_MAX ? INT32_MAX : capacity;
    k->flags |= most_rows(op) > INT32_MAX ? K_DO_WIDE : 0;
    epi_args_fill(call, &epi_dispatch_rules, a, EPI_OUT, k);
    if (a->flags & EP_DISPATCH_ARENA) {
        set_view(op, a);
    }
}

/* A graph could lack no tokens. */
static ep_status check_captured(const ep_handle *h, uint32_t captured) {
    return captured && h->excess
               ? epi_fail(EP_ERR_STATE,
                          "dispatch: the handle was routed with %d tokens and max_tokens is "
                          "%d, which no graph can lack",
                          h->excess, h->group->config.max_tokens)
               : EP_OK;
}

static ep_status run_dispatch(const char *fn, ep_handle *h, const struct epi_call *call,
                              const struct ep_dispatch_args *a, uint32_t part, void *stream) {
    const struct epi_backend *b = h->group->backend;
    struct epi_op op;
    uint32_t captured = 0;
    EPI_TRY(epi_half_stream(fn, h, part, stream, &captured));
    EPI_TRY(check_captured(h, captured));
    if (part == EPI_OP_FINISH) {
        if (b->on_device && !captured) { /* what did not fit has no finish */
            EPI_TRY(epi_handle_await_fit(h, NULL));
        }
        epi_half_continue(&op, h);
        op.args.op.flags |= captured ? K_DO_BEHIND : 0;
    } else {
        const struct epi_load load = {epi_row_bytes(a->x), h->topk,
                                      (a->flags & EP_DISPATCH_EXPANDED) != 0, false};
        epi_op_begin(&op, &dispatch_kind, h, a->num_workers, &load);
        op.flags |= part;
        set_inputs(&op, call, a);
        take_slot(&op);
    }
    if (part != EPI_OP_BEGIN) {
        set_outputs(&op, call, a);
    }
    op.flags |= captured;
    const ep_status st = epi_op_issue(&op, stream);
    h->captured = captured != 0;
    if (st == EP_OK && (op.flags & EPI_OP_ARENA) && !b->on_device && !stream && a->recv_x) {
        a->recv_x->shape[0] =
            h->expanded ? (int64_t)h->k.expert_start[h->experts->num_local] : h->k.counts->rows;
    }
    return st;
}

/* ---- the public functions -------------------------------------------------------------------- */

static ep_status check_form(const ep_handle *h, const struct ep_dispatch_args *a) {
    const uint32_t known = EP_DISPATCH_EXPANDED | EP_DISPATCH_ARENA | EP_DISPATCH_ZERO_GAPS |
                           EP_DISPATCH_SCALES_COLUMN_MAJOR;
    if (a->flags & ~known) {
        return epi_fail(EP_ERR_ARG, "ep_dispatch_args.flags is 0x%x, known are 0x%x", a->flags,
                        known);
    }
    if (a->alignment < 0 || a->alignment > 65536) {
        return epi_fail(EP_ERR_ARG, "ep_dispatch_args.alignment is %d, must be 0..65536",
                        a->alignment);
    }
    if (a->flags & EP_DISPATCH_EXPANDED) {
        if (h->by_mask) {
            return epi_fail(EP_ERR_ARG,
                            "EP_DISPATCH_EXPANDED: a handle routed by a mask has no "
                            "experts");
        }
        if ((a->flags & EP_DISPATCH_ARENA) &&
            !(h->group->config.flags & EP_GROUP_EXPANDED_VIEW)) {
            return epi_fail(EP_ERR_ARG, "an expanded view needs EP_GROUP_EXPANDED_VIEW in the "
                                        "group");
        }
    }
    return EP_OK;
}

static ep_status dispatch(const char *fn, ep_handle *handle,
                          const struct ep_dispatch_args *args, uint32_t part, void *stream) {
    struct ep_dispatch_args a;
    struct epi_call c;
    EPI_NOT_NULL("ep_dispatch", handle);
    EPI_NOT_NULL("ep_dispatch", args);
    EPI_NOT_FORKED(fn, "handle", handle->process);
    EPI_TAKE(ep_dispatch_args, &a, args);
    const ep_handle *h = handle;
    EPI_TRY(epi_group_admit(h->group));
    if (!h->routed) {
        return epi_fail(EP_ERR_STATE, "%s: the handle is not routed", fn);
    }
    if (a.num_workers < 0) {
        return epi_fail(EP_ERR_ARG, "ep_dispatch_args.num_workers is %d, must be at least 0",
                        a.num_workers);
    }
    EPI_TRY(epi_half_admit(fn, h, &dispatch_kind, part));
    epi_call_of(&c, h, (a.flags & EP_DISPATCH_EXPANDED) != 0);
    c.is |= (a.flags & EP_DISPATCH_ARENA ? EPI_ARENA : 0) |
            (a.flags & EP_DISPATCH_SCALES_COLUMN_MAJOR ? EPI_COLUMN_MAJOR : 0);
    if (part != EPI_OP_BEGIN) {
        EPI_TRY(check_form(h, &a));
    }
    if (part == EPI_OP_FINISH) {
        epi_half_recall(&c, h);
    } else {
        c.is |= (a.scales ? 0 : EPI_NO_SCALES) | (a.topk_weights ? 0 : EPI_NO_WEIGHTS);
    }
    EPI_TRY(epi_args_check(&c, &epi_dispatch_rules, &a, epi_half_roles(part)));
    if (part == EPI_OP_BEGIN) {
        handle->open_call = c;
    }
    return run_dispatch(fn, handle, &c, &a, part, stream);
}

ep_status ep_dispatch(ep_handle *handle, const struct ep_dispatch_args *args, void *stream) {
    return dispatch("ep_dispatch", handle, args, 0, stream);
}

ep_status ep_dispatch_begin(ep_handle *handle, const struct ep_dispatch_args *args,
                            void *stream) {
    return dispatch("ep_dispatch_begin", handle, args, EPI_OP_BEGIN, stream);
}

ep_status ep_dispatch_finish(ep_handle *handle, const struct ep_dispatch_args *args,
                             void *stream) {
    return dispatch("ep_dispatch_finish", handle, args, EPI_OP_FINISH, stream);
}
