/* SPDX-License-Identifier: MIT */
/*
 * The public functions of handles, but for the operations.
 */
#include "src/ep/group.h"

/* *out is the configuration with the group's maxima where it has none. */
static ep_status with_maxima(const ep_group *group, const struct ep_handle_config *config,
                             struct ep_handle_config *out) {
    static const struct ep_handle_config defaults = EP_HANDLE_CONFIG_INIT;
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
    *out = c;
    return EP_OK;
}

ep_status ep_handle_create(ep_handle **out, ep_group *group,
                           const struct ep_handle_config *config) {
    struct ep_handle_config c;
    EPI_NOT_NULL("ep_handle_create", out);
    EPI_NOT_NULL("ep_handle_create", group);
    EPI_NOT_FORKED("ep_handle_create", "group", group->process);
    EPI_TRY(with_maxima(group, config, &c));
    epi_life_join(group->life);
    return epi_handle_create(out, group, &c);
}

ep_status ep_handle_plan(const ep_group *group, const struct ep_handle_config *config,
                         int64_t *bytes) {
    struct ep_handle_config c;
    EPI_NOT_NULL("ep_handle_plan", group);
    EPI_NOT_NULL("ep_handle_plan", bytes);
    EPI_TRY(with_maxima(group, config, &c));
    *bytes = (int64_t)epi_handle_bytes(group, &c);
    return EP_OK;
}

void ep_handle_destroy(ep_handle **handle) {
    if (handle && *handle) {
        epi_handle_destroy(handle);
    }
}

int ep_handle_num_local_experts(const ep_handle *handle) {
    return handle ? handle->experts->num_local : 0;
}

ep_status ep_handle_status(ep_handle *handle) {
    EPI_NOT_NULL("ep_handle_status", handle);
    EPI_NOT_FORKED("ep_handle_status", "handle", handle->process);
    return epi_handle_status(handle);
}

ep_status ep_handle_counts(ep_handle *handle, int64_t *rows, int32_t *rows_per_source,
                           int32_t *rows_per_expert) {
    EPI_NOT_NULL("ep_handle_counts", handle);
    EPI_NOT_FORKED("ep_handle_counts", "handle", handle->process);
    if (!handle->dispatched) {
        return epi_fail(EP_ERR_STATE,
                        "ep_handle_counts: the handle was not dispatched since it was "
                        "routed");
    }
    return epi_handle_counts(handle, rows, rows_per_source, rows_per_expert);
}

ep_status ep_handle_needs(ep_handle *handle, struct ep_needs *needs) {
    struct ep_needs n;
    EPI_NOT_NULL("ep_handle_needs", handle);
    EPI_NOT_NULL("ep_handle_needs", needs);
    EPI_NOT_FORKED("ep_handle_needs", "handle", handle->process);
    epi_handle_needs(handle, &n);
    return EPI_GIVE(ep_needs, needs, &n);
}

ep_status ep_handle_arena(ep_handle *handle, uint32_t flags, ep_dtype dtype, int64_t cols,
                          struct ep_tensor *view) {
    EPI_NOT_NULL("ep_handle_arena", handle);
    EPI_NOT_NULL("ep_handle_arena", view);
    EPI_NOT_FORKED("ep_handle_arena", "handle", handle->process);
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
