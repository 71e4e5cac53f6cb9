/* SPDX-License-Identifier: MIT */
/*
 * The public functions of dispatch and combine. What their tensors must be is in args.c.
 */
#include "src/ep/group.h"

#include <string.h>

static ep_status check_not_open(const char *fn, const ep_handle *h) {
    return h->group->open_handle
               ? epi_fail(EP_ERR_STATE,
                          "%s: a dispatch of this group has begun and not finished", fn)
               : EP_OK;
}

static void begin_call(struct epi_call *c, const ep_handle *h, bool expanded) {
    epi_call_begin(c, h->group);
    c->is = (h->by_mask ? EPI_BY_MASK : 0) | (expanded ? EPI_EXPANDED : EPI_COMPACT);
    c->dim[EPI_DIM_T] = h->tokens;
    c->dim[EPI_DIM_K] = h->topk;
}

/* ---- dispatch ------------------------------------------------------------------------------- */

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

/* What the inputs of finish were. */
static void recall_inputs(struct epi_call *c, const ep_handle *h) {
    const struct k_dispatch_args *begun = &h->open_op.args.dispatch;
    c->dim[EPI_DIM_HIDDEN] = h->x_cols;
    c->like[EPI_LIKE_X] = EPI_TYPE(h->x_dtype);
    if (h->scales_dtype != EP_DTYPE_NONE) {
        c->dim[EPI_DIM_SCALES] = begun->num_scales;
        c->like[EPI_LIKE_SCALES] = EPI_TYPE(h->scales_dtype);
    } else {
        c->is |= EPI_NO_SCALES;
    }
    c->is |= begun->flags & K_DO_WEIGHTS ? 0 : EPI_NO_WEIGHTS;
    c->num_seen = h->num_inputs;
    memcpy(c->seen, h->input, sizeof(h->input));
}

static ep_status dispatch(const char *fn, ep_handle *handle,
                          const struct ep_dispatch_args *args, uint32_t part, void *stream) {
    struct ep_dispatch_args a;
    struct epi_call c;
    EPI_NOT_NULL("ep_dispatch", handle);
    EPI_NOT_NULL("ep_dispatch", args);
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
    if (part != EPI_OP_FINISH) {
        EPI_TRY(check_not_open(fn, h));
    } else if (h->group->open_handle != h) {
        return epi_fail(EP_ERR_STATE,
                        "ep_dispatch_finish: no dispatch of this handle has begun: call "
                        "ep_dispatch_begin first");
    }
    begin_call(&c, h, (a.flags & EP_DISPATCH_EXPANDED) != 0);
    c.is |= (a.flags & EP_DISPATCH_ARENA ? EPI_ARENA : 0) |
            (a.flags & EP_DISPATCH_SCALES_COLUMN_MAJOR ? EPI_COLUMN_MAJOR : 0);
    if (part != EPI_OP_BEGIN) {
        EPI_TRY(check_form(h, &a));
    }
    if (part == EPI_OP_FINISH) {
        recall_inputs(&c, h);
    } else {
        c.is |= (a.scales ? 0 : EPI_NO_SCALES) | (a.topk_weights ? 0 : EPI_NO_WEIGHTS);
    }
    EPI_TRY(epi_args_check(&c, &epi_dispatch_rules, &a,
                           (part != EPI_OP_FINISH ? EPI_IN : 0) |
                               (part != EPI_OP_BEGIN ? EPI_OUT : 0)));
    return epi_dispatch(handle, &c, &a, part, stream);
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

/* ---- combine -------------------------------------------------------------------------------- */

ep_status ep_combine(ep_handle *handle, const struct ep_combine_args *args, void *stream) {
    struct ep_combine_args a;
    struct epi_call c;
    EPI_NOT_NULL("ep_combine", handle);
    EPI_NOT_NULL("ep_combine", args);
    EPI_TAKE(ep_combine_args, &a, args);
    EPI_TRY(epi_group_admit(handle->group));
    EPI_TRY(check_not_open("ep_combine", handle));
    if (!handle->dispatched) {
        return epi_fail(EP_ERR_STATE, "ep_combine: the handle was not dispatched since it was "
                                      "routed");
    }
    if (a.flags || a.num_workers < 0) {
        return epi_fail(EP_ERR_ARG, "ep_combine_args.%s is %d, must be %s",
                        a.flags ? "flags" : "num_workers",
                        a.flags ? (int)a.flags : a.num_workers, a.flags ? "0" : "at least 0");
    }
    begin_call(&c, handle, handle->expanded);
    c.is |= a.topk_weights ? 0 : EPI_NO_WEIGHTS;
    EPI_TRY(epi_args_check(&c, &epi_combine_rules, &a, EPI_IN | EPI_OUT));
    return epi_combine(handle, &c, &a, stream);
}
