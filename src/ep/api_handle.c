/* SPDX-License-Identifier: MIT */
/*
 * The public functions of handles, but for the operations.
 */
#include "src/ep/group.h"

ep_status ep_handle_create(ep_handle **out, ep_group *group,
                           const struct ep_handle_config *config) {
    static const struct ep_handle_config defaults = EP_HANDLE_CONFIG_INIT;
    EPI_NOT_NULL("ep_handle_create", out);
    EPI_NOT_NULL("ep_handle_create", group);
    struct ep_handle_config c = defaults;
    if (config) {
        EPI_TAKE(ep_handle_config, &c, config);
    }
    const struct ep_group_config *g = &group->config;
    if (c.max_tokens < 0 || c.max_tokens > g->max_tokens) {
        return epi_fail(EP_ERR_ARG,
                        "ep_handle_config.max_tokens is %d, must be 0..%d (the group's)",
                        c.max_tokens, g->max_tokens);
    }
    if (c.max_topk < 0 || c.max_topk > g->max_topk) {
        return epi_fail(EP_ERR_ARG,
                        "ep_handle_config.max_topk is %d, must be 0..%d (the group's)",
                        c.max_topk, g->max_topk);
    }
    if (c.flags & ~EP_HANDLE_LENIENT_IDS) {
        return epi_fail(EP_ERR_ARG, "ep_handle_config.flags is 0x%x, known is 0x%x", c.flags,
                        EP_HANDLE_LENIENT_IDS);
    }
    c.max_tokens = c.max_tokens ? c.max_tokens : g->max_tokens;
    c.max_topk = c.max_topk ? c.max_topk : g->max_topk;
    return epi_handle_create(out, group, &c);
}

void ep_handle_destroy(ep_handle **handle) {
    if (handle && *handle) {
        epi_handle_destroy(handle);
    }
}

ep_status ep_handle_route(ep_handle *handle, const struct ep_routing *routing, void *stream) {
    struct ep_routing r;
    struct epi_call c;
    EPI_NOT_NULL("ep_handle_route", handle);
    EPI_NOT_NULL("ep_handle_route", routing);
    EPI_TAKE(ep_routing, &r, routing);
    const struct ep_handle_config *most = &handle->config;
    if (handle->group->open_handle == handle) {
        return epi_fail(EP_ERR_STATE,
                        "ep_handle_route: the handle's dispatch has begun and not "
                        "finished");
    }
    if (!r.topk_ids == !r.token_in_rank) {
        return epi_fail(EP_ERR_ARG, "ep_routing: set topk_ids or token_in_rank, %s",
                        r.topk_ids ? "not both" : "neither is set");
    }
    if (r.token_in_rank && !handle->group->config.mask_routing) {
        return epi_fail(EP_ERR_ARG, "token_in_rank needs ep_group_config.mask_routing");
    }
    epi_call_begin(&c, handle->group);
    EPI_TRY(epi_args_check(&c, &epi_route_rules, &r, EPI_IN));
    const int64_t tokens = c.dim[EPI_DIM_T], topk = c.dim[EPI_DIM_K];
    if (r.topk_ids && (topk < 1 || topk > most->max_topk)) {
        return epi_fail(EP_ERR_ARG, "topk_ids.shape[1] is %lld, must be 1..%d (max_topk)",
                        (long long)topk, most->max_topk);
    }
    if (tokens > most->max_tokens) {
        return epi_fail(EP_ERR_ARG, "%s.shape[0] is %lld, must be 0..%d (max_tokens)",
                        r.topk_ids ? "topk_ids" : "token_in_rank", (long long)tokens,
                        most->max_tokens);
    }
    return epi_handle_route(handle, &c, &r, stream);
}

ep_status ep_handle_layout(ep_handle *handle, const struct ep_layout *layout, void *stream) {
    struct ep_layout l;
    struct epi_call c;
    EPI_NOT_NULL("ep_handle_layout", handle);
    EPI_NOT_NULL("ep_handle_layout", layout);
    EPI_TAKE(ep_layout, &l, layout);
    if (!handle->routed) {
        return epi_fail(EP_ERR_STATE, "ep_handle_layout: the handle is not routed");
    }
    epi_call_begin(&c, handle->group);
    c.is = handle->by_mask ? EPI_BY_MASK : 0;
    c.dim[EPI_DIM_T] = handle->tokens;
    EPI_TRY(epi_args_check(&c, &epi_layout_rules, &l, EPI_OUT));
    return epi_handle_layout(handle, &c, &l, stream);
}

ep_status ep_handle_status(ep_handle *handle) {
    EPI_NOT_NULL("ep_handle_status", handle);
    return epi_handle_status(handle);
}

ep_status ep_handle_counts(ep_handle *handle, int64_t *rows, int32_t *rows_per_source,
                           int32_t *rows_per_expert) {
    EPI_NOT_NULL("ep_handle_counts", handle);
    if (!handle->dispatched) {
        return epi_fail(EP_ERR_STATE,
                        "ep_handle_counts: the handle was not dispatched since it was "
                        "routed");
    }
    return epi_handle_counts(handle, rows, rows_per_source, rows_per_expert);
}

ep_status ep_handle_arena(ep_handle *handle, uint32_t flags, ep_dtype dtype, int64_t cols,
                          struct ep_tensor *view) {
    EPI_NOT_NULL("ep_handle_arena", handle);
    EPI_NOT_NULL("ep_handle_arena", view);
    const struct ep_group_config *g = &handle->group->config;
    if (!handle->dispatched) {
        return epi_fail(EP_ERR_STATE, "ep_handle_arena: the handle was not dispatched");
    }
    if ((flags & EP_DISPATCH_EXPANDED) && !(g->flags & EP_GROUP_EXPANDED_VIEW)) {
        return epi_fail(EP_ERR_ARG,
                        "an expanded view needs EP_GROUP_EXPANDED_VIEW in the group");
    }
    if (!ep_dtype_bytes(dtype)) {
        return epi_fail(EP_ERR_ARG, "ep_handle_arena: dtype is %d, which is none", (int)dtype);
    }
    EPI_TRY(epi_check_row_bytes("view", cols, (int)dtype, g->max_row_bytes));
    return epi_handle_arena(handle, flags, dtype, cols, view);
}
