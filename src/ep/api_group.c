/* SPDX-License-Identifier: MIT */
/*
 * The public functions of groups: each checks its arguments, says what is wrong with them, and
 * calls the file that does the work. Nothing else happens here, nor in api_handle.c.
 */
#include "src/ep/group.h"

uint32_t ep_version(void) {
    return EP_VERSION_MAJOR * 10000 + EP_VERSION_MINOR * 100 + EP_VERSION_PATCH;
}

/* ---- group ---------------------------------------------------------------------------------- */

ep_status ep_plan(const struct ep_group_config *config, struct ep_plan_info *info) {
    struct ep_group_config c;
    struct epi_plan plan;
    EPI_NOT_NULL("ep_plan", config);
    EPI_NOT_NULL("ep_plan", info);
    EPI_TAKE(ep_group_config, &c, config);
    EPI_TRY(epi_check_size("ep_plan_info", info->size, sizeof(*info)));
    epi_clear_error();
    ep_status st = epi_plan(&c, c.num_ranks, NULL, &plan);
    if (st == EP_OK || st == EP_ERR_NOMEM) {
        EPI_TRY(EPI_GIVE(ep_plan_info, info, &plan.info));
    }
    return st;
}

static ep_status check_known(const struct ep_group_config *config) {
    if (config->device != EP_DEVICE_HOST && config->device != EP_DEVICE_CUDA) {
        return epi_fail(EP_ERR_ARG,
                        "ep_group_config.device is %d, must be EP_DEVICE_HOST or "
                        "EP_DEVICE_CUDA",
                        config->device);
    }
    struct epi_plan plan;
    struct ep_group_config known = *config;
    if (known.num_ranks < 1) { /* told when the ranks meet; then all of it is checked again */
        known.num_ranks = 1;
        known.expert_rank = NULL;
    }
    return epi_plan(&known, known.num_ranks, NULL, &plan);
}

ep_status ep_group_create(ep_group **out, const struct ep_group_config *config) {
    struct ep_group_config c;
    EPI_NOT_NULL("ep_group_create", out);
    EPI_NOT_NULL("ep_group_create", config);
    EPI_TAKE(ep_group_config, &c, config);
    epi_clear_error();
    epi_opt_begin();
    if (c.world && !epi_boot_world_adopt(c.world)) {
        return epi_fail(EP_ERR_STATE,
                        "ep_group_create: the world was made before fork(), when ranks were in "
                        "it: make another one here");
    }
    ep_status st = check_known(&c);
    return st == EP_OK ? epi_group_create(out, &c) : epi_fail_before_meeting(&c, st);
}

void ep_group_destroy(ep_group **group) {
    if (group && *group) {
        epi_group_destroy(group);
    }
}

int ep_group_rank(const ep_group *group) {
    return group ? group->rank : -1;
}

int ep_group_num_ranks(const ep_group *group) {
    return group ? group->num_ranks : 0;
}

int ep_group_num_local_experts(const ep_group *group) {
    return group ? group->experts->num_local : 0;
}

int ep_group_device_index(const ep_group *group) {
    return group && group->config.device == EP_DEVICE_CUDA ? group->config.device_index : -1;
}

int ep_group_num_nodes(const ep_group *group) {
    return group ? group->nodes.num : 0;
}

ep_status ep_group_plan(const ep_group *group, struct ep_plan_info *info) {
    EPI_NOT_NULL("ep_group_plan", group);
    EPI_NOT_NULL("ep_group_plan", info);
    EPI_NOT_FORKED("ep_group_plan", "group", group->process);
    return EPI_GIVE(ep_plan_info, info, &group->plan.info);
}

ep_status ep_group_grow(ep_group *group, const struct ep_needs *needs) {
    struct ep_needs n;
    EPI_NOT_NULL("ep_group_grow", group);
    EPI_NOT_NULL("ep_group_grow", needs);
    EPI_NOT_FORKED("ep_group_grow", "group", group->process);
    EPI_TAKE(ep_needs, &n, needs);
    return epi_group_grow(group, &n);
}

ep_status ep_group_abort(ep_group *group) {
    EPI_NOT_NULL("ep_group_abort", group);
    EPI_NOT_FORKED("ep_group_abort", "group", group->process);
    epi_group_raise(group, EP_ERR_INTERRUPTED, group->rank, 0);
    return EP_OK;
}

ep_status ep_group_fault(ep_group *group, struct ep_fault *fault) {
    EPI_NOT_NULL("ep_group_fault", group);
    EPI_NOT_NULL("ep_group_fault", fault);
    EPI_NOT_FORKED("ep_group_fault", "group", group->process);
    struct ep_fault f;
    epi_group_describe(group, &f);
    return EPI_GIVE(ep_fault, fault, &f);
}

ep_status ep_group_stats(ep_group *group, struct ep_group_stats *stats) {
    EPI_NOT_NULL("ep_group_stats", group);
    EPI_NOT_NULL("ep_group_stats", stats);
    EPI_NOT_FORKED("ep_group_stats", "group", group->process);
    struct k_ctl ctl;
    EPI_TRY(group->backend->read_ctl(group, &ctl));
    const struct ep_group_stats s = {.size = sizeof(s),
                                     .num_dispatches = ctl.num_ops[0],
                                     .num_combines = ctl.num_ops[1],
                                     .rows_sent = ctl.rows_sent,
                                     .rows_received = ctl.rows_received,
                                     .remote_bytes_sent = ctl.remote_bytes,
                                     .local_bytes_sent = ctl.local_bytes,
                                     .wait_ns = ctl.wait_ns,
                                     .dispatch_ns = ctl.op_ns[0],
                                     .combine_ns = ctl.op_ns[1]};
    return EPI_GIVE(ep_group_stats, stats, &s);
}

static ep_status check_host_group(const char *fn, const void *out, const ep_group *group) {
    if (!out || !group) {
        return epi_fail(EP_ERR_ARG, "%s: %s is NULL", fn, out ? "group" : "out");
    }
    EPI_NOT_FORKED(fn, "group", group->process);
    return group->backend->on_device
               ? epi_fail(EP_ERR_UNSUPPORTED,
                          "%s: the group is a CUDA group: use CUDA's streams and events", fn)
               : EP_OK;
}

ep_status ep_stream_create(ep_stream **out, ep_group *group) {
    EPI_TRY(check_host_group("ep_stream_create", out, group));
    return epi_stream_create(out);
}

ep_status ep_event_create(ep_event **out, ep_group *group) {
    EPI_TRY(check_host_group("ep_event_create", out, group));
    return epi_event_create(out);
}

void *ep_group_stream(const ep_group *group) {
    return group ? group->backend->stream(group) : NULL;
}
