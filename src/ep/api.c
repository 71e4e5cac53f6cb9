/* SPDX-License-Identifier: MIT */
/*
 * The public functions of groups, handles and operations: each checks its arguments, says what is
 * wrong with them, and calls the file that does the work. Nothing else happens here.
 */
#include "src/ep/group.h"

#include <string.h>

#define NOT_NULL(fn, arg)                                                                      \
    if (!(arg)) {                                                                              \
        return epi_fail(EP_ERR_ARG, fn ": " #arg " is NULL");                                  \
    }
#define SIZE_IS(tag, arg)                                                                      \
    if ((arg)->size != sizeof(struct tag)) {                                                   \
        return epi_fail(EP_ERR_VERSION,                                                        \
                        #tag ".size is %u, this library's is %zu: initialise it with the "     \
                             "EP_..._INIT macro of the header of this version",                \
                        (arg)->size, sizeof(struct tag));                                      \
    }

#define T(d) EPI_TYPE(EP_##d)
#define IDS (T(I32) | T(I64))
#define SCALES (T(BF16) | T(F16) | T(F32) | T(F8E4M3) | T(F8E5M2) | T(U8) | T(I16) | T(I32))
#define ROWS (SCALES | T(I64))
#define SUMMABLE (T(BF16) | T(F16) | T(F32))

uint32_t ep_version(void) {
    return EP_VERSION_MAJOR * 10000 + EP_VERSION_MINOR * 100 + EP_VERSION_PATCH;
}

/* ---- group ---------------------------------------------------------------------------------- */

ep_status ep_plan(const struct ep_group_config *config, struct ep_plan_info *info) {
    struct epi_plan plan;
    NOT_NULL("ep_plan", config);
    NOT_NULL("ep_plan", info);
    SIZE_IS(ep_plan_info, info);
    epi_clear_error();
    ep_status st = epi_plan(config, config->num_ranks, &plan);
    if (st == EP_OK || st == EP_ERR_NOMEM) {
        *info = plan.info;
    }
    return st;
}

static ep_status check_config(const struct ep_group_config *config) {
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
    return epi_plan(&known, known.num_ranks, &plan);
}

ep_status ep_group_create(ep_group **out, const struct ep_group_config *config) {
    NOT_NULL("ep_group_create", out);
    NOT_NULL("ep_group_create", config);
    SIZE_IS(ep_group_config, config);
    epi_clear_error();
    ep_status st = check_config(config);
    return st == EP_OK ? epi_group_create(out, config) : epi_fail_to_come(config, st);
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
    return group ? group->num_local : 0;
}

int ep_group_num_nodes(const ep_group *group) {
    return group ? 1 : 0;
}

ep_status ep_group_plan(const ep_group *group, struct ep_plan_info *info) {
    NOT_NULL("ep_group_plan", group);
    NOT_NULL("ep_group_plan", info);
    SIZE_IS(ep_plan_info, info);
    *info = group->plan.info;
    return EP_OK;
}

ep_status ep_group_abort(ep_group *group) {
    NOT_NULL("ep_group_abort", group);
    epi_group_raise(group, EP_ERR_INTERRUPTED, group->rank, 0);
    return EP_OK;
}

ep_status ep_group_fault(ep_group *group, struct ep_fault *fault) {
    NOT_NULL("ep_group_fault", group);
    NOT_NULL("ep_group_fault", fault);
    SIZE_IS(ep_fault, fault);
    epi_group_describe(group, fault);
    return EP_OK;
}

ep_status ep_group_stats(ep_group *group, struct ep_group_stats *stats) {
    NOT_NULL("ep_group_stats", group);
    NOT_NULL("ep_group_stats", stats);
    SIZE_IS(ep_group_stats, stats);
    struct k_ctl copy;
    const struct k_ctl *ctl = group->ctl;
    if (group->cuda) {
        EPI_TRY(epi_cuda_read_ctl(group, &copy));
        ctl = &copy;
    }
    const struct {
        uint64_t *to;
        const k_u64 *from;
    } words[] = {{&stats->num_dispatches, &ctl->num_ops[0]},
                 {&stats->num_combines, &ctl->num_ops[1]},
                 {&stats->rows_sent, &ctl->rows_sent},
                 {&stats->rows_received, &ctl->rows_received},
                 {&stats->remote_bytes_sent, &ctl->remote_bytes},
                 {&stats->local_bytes_sent, &ctl->local_bytes},
                 {&stats->wait_ns, &ctl->wait_ns},
                 {&stats->dispatch_ns, &ctl->op_ns[0]},
                 {&stats->combine_ns, &ctl->op_ns[1]}};
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        *words[i].to =
            atomic_load_explicit((const _Atomic k_u64 *)words[i].from, memory_order_relaxed);
    }
    return EP_OK;
}

static ep_status check_host_group(const char *fn, const void *out, const ep_group *group) {
    if (!out || !group) {
        return epi_fail(EP_ERR_ARG, "%s: %s is NULL", fn, out ? "group" : "out");
    }
    return group->cuda
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
    return group && group->cuda ? epi_gpu_stream(epi_cuda_gpu(group)) : NULL;
}

/* ---- handle --------------------------------------------------------------------------------- */

/* Whether the memory of each tensor is of the group's kind. */
struct named {
    const char *name;
    const struct ep_tensor *t;
};

static ep_status check_places(const ep_group *g, const struct named *list, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (list[i].t && list[i].t->data) {
            EPI_TRY(epi_cuda_check_place(g, list[i].name, list[i].t));
        }
    }
    return EP_OK;
}
#define PLACES(g, ...)                                                                         \
    do {                                                                                       \
        const struct named places[] = {__VA_ARGS__};                                           \
        EPI_TRY(check_places(g, places, sizeof(places) / sizeof(places[0])));                  \
    } while (0)

ep_status ep_handle_create(ep_handle **out, ep_group *group,
                           const struct ep_handle_config *config) {
    static const struct ep_handle_config defaults = EP_HANDLE_CONFIG_INIT;
    NOT_NULL("ep_handle_create", out);
    NOT_NULL("ep_handle_create", group);
    struct ep_handle_config c = defaults;
    if (config) {
        SIZE_IS(ep_handle_config, config);
        c = *config;
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

static ep_status check_not_begun(const char *fn, const ep_handle *h) {
    if (h->group->begun) {
        return epi_fail(EP_ERR_STATE, "%s: a dispatch of this group has begun and not finished",
                        fn);
    }
    return EP_OK;
}

ep_status ep_handle_route(ep_handle *handle, const struct ep_routing *routing, void *stream) {
    NOT_NULL("ep_handle_route", handle);
    NOT_NULL("ep_handle_route", routing);
    SIZE_IS(ep_routing, routing);
    const struct ep_group_config *g = &handle->group->config;
    const struct ep_tensor *ids = routing->topk_ids, *mask = routing->token_in_rank;
    if (handle->group->begun == handle) {
        return epi_fail(EP_ERR_STATE,
                        "ep_handle_route: the handle's dispatch has begun and not "
                        "finished");
    }
    if (!ids == !mask) {
        return epi_fail(EP_ERR_ARG, "ep_routing: set topk_ids or token_in_rank, %s",
                        ids ? "not both" : "neither is set");
    }
    if (ids) {
        EPI_TRY(epi_check_tensor("topk_ids", ids, 2, -1, -1, IDS, EPI_ANY_STRIDE));
        if (ids->shape[1] < 1 || ids->shape[1] > handle->config.max_topk) {
            return epi_fail(EP_ERR_ARG, "topk_ids.shape[1] is %lld, must be 1..%d (max_topk)",
                            (long long)ids->shape[1], handle->config.max_topk);
        }
    } else {
        if (!g->mask_routing) {
            return epi_fail(EP_ERR_ARG, "token_in_rank needs ep_group_config.mask_routing");
        }
        EPI_TRY(epi_check_tensor("token_in_rank", mask, 2, -1, handle->group->num_ranks, T(U8),
                                 EPI_ANY_STRIDE));
    }
    const int64_t tokens = (ids ? ids : mask)->shape[0];
    if (tokens > handle->config.max_tokens) {
        return epi_fail(EP_ERR_ARG, "%s.shape[0] is %lld, must be 0..%d (max_tokens)",
                        ids ? "topk_ids" : "token_in_rank", (long long)tokens,
                        handle->config.max_tokens);
    }
    PLACES(handle->group, {"topk_ids", ids}, {"token_in_rank", mask});
    return epi_handle_route(handle, routing, stream);
}

static ep_status check_optional(const char *name, const struct ep_tensor *t, int ndim,
                                int64_t d0, int64_t d1, uint32_t types, uint32_t layout) {
    return t ? epi_check_tensor(name, t, ndim, d0, d1, types, layout) : EP_OK;
}

ep_status ep_handle_layout(ep_handle *handle, const struct ep_layout *layout, void *stream) {
    NOT_NULL("ep_handle_layout", handle);
    NOT_NULL("ep_handle_layout", layout);
    SIZE_IS(ep_layout, layout);
    const ep_group *g = handle->group;
    if (!handle->routed) {
        return epi_fail(EP_ERR_STATE, "ep_handle_layout: the handle is not routed");
    }
    if (handle->by_mask && layout->tokens_per_expert) {
        return epi_fail(EP_ERR_ARG,
                        "tokens_per_expert: a handle routed by a mask has no experts");
    }
    EPI_TRY(check_optional("tokens_per_rank", layout->tokens_per_rank, 1, g->num_ranks, 0,
                           T(I32), EPI_DENSE));
    EPI_TRY(
        check_optional("tokens_per_node", layout->tokens_per_node, 1, 1, 0, T(I32), EPI_DENSE));
    EPI_TRY(check_optional("tokens_per_expert", layout->tokens_per_expert, 1,
                           g->config.num_experts, 0, T(I32), EPI_DENSE));
    EPI_TRY(check_optional("token_in_rank", layout->token_in_rank, 2, handle->tokens,
                           g->num_ranks, T(U8), EPI_DENSE));
    EPI_TRY(check_optional("channel_prefix", layout->channel_prefix, 2, g->num_ranks,
                           g->plan.info.num_channels, T(I32), EPI_DENSE));
    PLACES(g, {"tokens_per_rank", layout->tokens_per_rank},
           {"tokens_per_node", layout->tokens_per_node},
           {"tokens_per_expert", layout->tokens_per_expert},
           {"token_in_rank", layout->token_in_rank},
           {"channel_prefix", layout->channel_prefix});
    return epi_handle_layout(handle, layout, stream);
}

ep_status ep_handle_status(ep_handle *handle) {
    NOT_NULL("ep_handle_status", handle);
    return epi_handle_status(handle);
}

ep_status ep_handle_counts(ep_handle *handle, int64_t *rows, int32_t *rows_per_source,
                           int32_t *rows_per_expert) {
    NOT_NULL("ep_handle_counts", handle);
    if (!handle->dispatched) {
        return epi_fail(EP_ERR_STATE,
                        "ep_handle_counts: the handle was not dispatched since it was "
                        "routed");
    }
    return epi_handle_counts(handle, rows, rows_per_source, rows_per_expert);
}

ep_status ep_handle_arena(ep_handle *handle, uint32_t flags, ep_dtype dtype, int64_t cols,
                          struct ep_tensor *view) {
    NOT_NULL("ep_handle_arena", handle);
    NOT_NULL("ep_handle_arena", view);
    const struct ep_group_config *g = &handle->group->config;
    const int64_t bytes = (int64_t)ep_dtype_bytes(dtype) * cols;
    if (!handle->dispatched) {
        return epi_fail(EP_ERR_STATE, "ep_handle_arena: the handle was not dispatched");
    }
    if ((flags & EP_DISPATCH_EXPANDED) && !(g->flags & EP_GROUP_EXPANDED_VIEW)) {
        return epi_fail(EP_ERR_ARG,
                        "an expanded view needs EP_GROUP_EXPANDED_VIEW in the group");
    }
    if (cols < 1 || bytes < 1 || bytes % EP_ROW_ALIGN || bytes > g->max_row_bytes) {
        return epi_fail(
            EP_ERR_ARG,
            "a row of %lld elements of dtype %d has %lld bytes, must be a multiple of "
            "%d up to %d (max_row_bytes)",
            (long long)cols, (int)dtype, (long long)bytes, EP_ROW_ALIGN, g->max_row_bytes);
    }
    return epi_handle_arena(handle, flags, dtype, cols, view);
}

/* ---- dispatch ------------------------------------------------------------------------------- */

static ep_status check_row_bytes(const ep_handle *h, const struct ep_tensor *x) {
    const int64_t bytes = x->shape[1] * (int64_t)ep_dtype_bytes((ep_dtype)x->dtype);
    const int64_t most = h->group->config.max_row_bytes;
    if (bytes < EP_ROW_ALIGN || bytes % EP_ROW_ALIGN || bytes > most) {
        return epi_fail(
            EP_ERR_ARG,
            "x: a row of %lld elements has %lld bytes, must be a multiple of %d up to "
            "%lld (max_row_bytes)",
            (long long)x->shape[1], (long long)bytes, EP_ROW_ALIGN, (long long)most);
    }
    return EP_OK;
}

static ep_status check_inputs(const ep_handle *h, const struct ep_dispatch_args *a) {
    NOT_NULL("ep_dispatch", a->x);
    EPI_TRY(epi_check_tensor("x", a->x, 2, h->tokens, -1, ROWS, EPI_ANY_STRIDE));
    EPI_TRY(check_row_bytes(h, a->x));
    EPI_TRY(epi_check_tensor("x", a->x, 2, h->tokens, -1, ROWS, EPI_ROWS));
    EPI_TRY(check_optional("scales", a->scales, 2, h->tokens, -1, SCALES, EPI_ANY_STRIDE));
    EPI_TRY(check_optional("topk_weights", a->topk_weights, 2, h->tokens, h->topk, T(F32),
                           EPI_ANY_STRIDE));
    if (a->topk_weights && h->by_mask) {
        return epi_fail(EP_ERR_ARG,
                        "topk_weights: a handle routed by a mask has no selections");
    }
    if (a->scales) {
        const int64_t bytes =
            a->scales->shape[1] * (int64_t)ep_dtype_bytes((ep_dtype)a->scales->dtype);
        if (bytes > h->group->config.max_scale_bytes) {
            return epi_fail(EP_ERR_ARG,
                            "scales: %lld per row are %lld bytes, must be at most %d "
                            "(max_scale_bytes)",
                            (long long)a->scales->shape[1], (long long)bytes,
                            h->group->config.max_scale_bytes);
        }
    }
    PLACES(h->group, {"x", a->x}, {"scales", a->scales}, {"topk_weights", a->topk_weights});
    return EP_OK;
}

static ep_status check_scales_out(const struct ep_dispatch_args *a, const struct ep_tensor *in,
                                  int64_t n) {
    const struct ep_tensor *out = a->recv_scales;
    if (!out) {
        return EP_OK;
    }
    if (!in) {
        return epi_fail(EP_ERR_ARG, "recv_scales is given and scales is not");
    }
    const int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)in->dtype);
    if ((a->flags & EP_DISPATCH_SCALES_COLUMN_MAJOR) == 0) {
        return epi_check_tensor("recv_scales", out, 2, n, in->shape[1], EPI_TYPE(in->dtype),
                                EPI_DENSE);
    }
    EPI_TRY(epi_check_tensor("recv_scales", out, 2, n, in->shape[1], EPI_TYPE(in->dtype),
                             EPI_ANY_STRIDE));
    if (out->shape[0] > 0 && out->shape[1] > 0 &&
        (out->stride[0] != 1 || out->stride[1] < out->shape[0] ||
         out->stride[1] * bytes % 16 != 0)) {
        return epi_fail(EP_ERR_ARG,
                        "recv_scales strides are {%lld, %lld}, must be {1, at least %lld and a "
                        "multiple of 16 bytes} (column-major)",
                        (long long)out->stride[0], (long long)out->stride[1],
                        (long long)out->shape[0]);
    }
    return EP_OK;
}

/* No output shares memory with an input. */
static ep_status check_overlaps(const struct ep_dispatch_args *a, bool arena) {
    const struct {
        const char *name;
        const struct ep_tensor *t;
    } in[] = {{"x", a->x}, {"scales", a->scales}, {"topk_weights", a->topk_weights}},
      out[] = {
          {"recv_x", arena ? NULL : a->recv_x},  {"recv_scales", a->recv_scales},
          {"recv_topk_ids", a->recv_topk_ids},   {"recv_topk_weights", a->recv_topk_weights},
          {"recv_source", a->recv_source},       {"expert_counts", a->expert_counts},
          {"expert_offsets", a->expert_offsets}, {"num_rows", a->num_rows}};
    for (size_t i = 0; i < sizeof(in) / sizeof(in[0]); i++) {
        for (size_t o = 0; o < sizeof(out) / sizeof(out[0]); o++) {
            if (epi_overlap(in[i].t, out[o].t)) {
                return epi_fail(EP_ERR_ARG, "%s overlaps %s", out[o].name, in[i].name);
            }
        }
    }
    return EP_OK;
}

/* Outputs have one capacity; `x` and `scales` are the inputs they must match. */
static ep_status check_outputs(const ep_handle *h, const struct ep_dispatch_args *a,
                               const struct ep_tensor *x, const struct ep_tensor *scales,
                               bool weights) {
    const bool arena = (a->flags & EP_DISPATCH_ARENA) != 0;
    const bool expand = (a->flags & EP_DISPATCH_EXPANDED) != 0;
    const int64_t local = h->group->num_local;
    const struct ep_tensor *per_row[] = {arena ? NULL : a->recv_x, a->recv_scales,
                                         a->recv_topk_ids, a->recv_topk_weights,
                                         a->recv_source};
    int64_t n = -1;
    for (size_t i = 0; i < sizeof(per_row) / sizeof(per_row[0]); i++) {
        n = n < 0 && per_row[i] ? per_row[i]->shape[0] : n;
    }
    if (!arena && a->recv_x) {
        EPI_TRY(epi_check_tensor("recv_x", a->recv_x, 2, n, x->shape[1], EPI_TYPE(x->dtype),
                                 EPI_ROWS));
    }
    EPI_TRY(check_scales_out(a, scales, n));
    if (a->recv_topk_ids && (expand || h->by_mask)) {
        return epi_fail(EP_ERR_ARG, "recv_topk_ids: %s has none",
                        expand ? "expanded output" : "a mask routing");
    }
    if (a->expert_offsets && !expand) {
        return epi_fail(EP_ERR_ARG,
                        "expert_offsets: compact output has none, ask for expanded");
    }
    if (a->recv_topk_weights && !weights) {
        return epi_fail(EP_ERR_ARG, "recv_topk_weights is given and topk_weights is not");
    }
    EPI_TRY(
        check_optional("recv_topk_ids", a->recv_topk_ids, 2, n, h->topk, IDS, EPI_ANY_STRIDE));
    EPI_TRY(check_optional("recv_topk_weights", a->recv_topk_weights, expand ? 1 : 2, n,
                           h->topk, T(F32), EPI_ANY_STRIDE));
    EPI_TRY(check_optional("recv_source", a->recv_source, 2, n, 2, T(I32), EPI_DENSE));
    EPI_TRY(check_optional("expert_counts", a->expert_counts, 1, local, 0, T(I32), EPI_DENSE));
    EPI_TRY(check_optional("expert_offsets", a->expert_offsets, 1, local + 1, 0, T(I32),
                           EPI_DENSE));
    EPI_TRY(check_optional("num_rows", a->num_rows, 1, 1, 0, T(I32), EPI_DENSE));
    PLACES(h->group, {"recv_x", arena ? NULL : a->recv_x}, {"recv_scales", a->recv_scales},
           {"recv_topk_ids", a->recv_topk_ids}, {"recv_topk_weights", a->recv_topk_weights},
           {"recv_source", a->recv_source}, {"expert_counts", a->expert_counts},
           {"expert_offsets", a->expert_offsets}, {"num_rows", a->num_rows});
    return check_overlaps(a, arena);
}

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

static ep_status check_dispatch(const char *fn, const ep_handle *handle,
                                const struct ep_dispatch_args *args) {
    NOT_NULL("ep_dispatch", handle);
    NOT_NULL("ep_dispatch", args);
    SIZE_IS(ep_dispatch_args, args);
    EPI_TRY(epi_group_refuse(handle->group));
    if (!handle->routed) {
        return epi_fail(EP_ERR_STATE, "%s: the handle is not routed", fn);
    }
    if (args->num_workers < 0) {
        return epi_fail(EP_ERR_ARG, "ep_dispatch_args.num_workers is %d, must be at least 0",
                        args->num_workers);
    }
    return EP_OK;
}

ep_status ep_dispatch(ep_handle *handle, const struct ep_dispatch_args *args, void *stream) {
    EPI_TRY(check_dispatch("ep_dispatch", handle, args));
    EPI_TRY(check_not_begun("ep_dispatch", handle));
    EPI_TRY(check_form(handle, args));
    EPI_TRY(check_inputs(handle, args));
    EPI_TRY(check_outputs(handle, args, args->x, args->scales, args->topk_weights != NULL));
    return epi_dispatch(handle, args, stream, EPI_DISPATCH_ALL);
}

ep_status ep_dispatch_begin(ep_handle *handle, const struct ep_dispatch_args *args,
                            void *stream) {
    EPI_TRY(check_dispatch("ep_dispatch_begin", handle, args));
    EPI_TRY(check_not_begun("ep_dispatch_begin", handle));
    EPI_TRY(check_inputs(handle, args));
    return epi_dispatch(handle, args, stream, EPI_DISPATCH_BEGIN);
}

ep_status ep_dispatch_finish(ep_handle *handle, const struct ep_dispatch_args *args,
                             void *stream) {
    EPI_TRY(check_dispatch("ep_dispatch_finish", handle, args));
    if (handle->group->begun != handle) {
        return epi_fail(EP_ERR_STATE,
                        "ep_dispatch_finish: no dispatch of this handle has begun: call "
                        "ep_dispatch_begin first");
    }
    EPI_TRY(check_form(handle, args));
    struct ep_tensor x = EP_TENSOR_INIT, scales = EP_TENSOR_INIT;
    x.dtype = handle->x_dtype;
    x.ndim = 2;
    x.shape[1] = handle->x_cols;
    scales.dtype = handle->scales_dtype;
    scales.shape[1] = handle->begun.args.num_scales;
    EPI_TRY(check_outputs(handle, args, &x, handle->scales_dtype ? &scales : NULL,
                          (handle->begun.args.flags & K_DO_WEIGHTS) != 0));
    return epi_dispatch(handle, args, stream, EPI_DISPATCH_FINISH);
}

/* ---- combine -------------------------------------------------------------------------------- */

static ep_status check_combine(const ep_handle *h, const struct ep_combine_args *a) {
    NOT_NULL("ep_combine", a->x);
    NOT_NULL("ep_combine", a->out);
    EPI_TRY(epi_check_tensor("x", a->x, 2, -1, -1, SUMMABLE, EPI_ANY_STRIDE));
    EPI_TRY(check_row_bytes(h, a->x));
    EPI_TRY(epi_check_tensor("x", a->x, 2, -1, -1, SUMMABLE, EPI_ROWS));
    const int64_t n = a->x->shape[0], hidden = a->x->shape[1];
    const uint32_t type = EPI_TYPE(a->x->dtype);
    EPI_TRY(check_optional("weights", a->weights, 1, n, 0, T(F32), EPI_ANY_STRIDE));
    EPI_TRY(check_optional("topk_weights", a->topk_weights, h->expanded ? 1 : 2, n, h->topk,
                           T(F32), EPI_ANY_STRIDE));
    EPI_TRY(check_optional("bias[0]", a->bias[0], 2, h->tokens, hidden, type, EPI_ROWS));
    EPI_TRY(check_optional("bias[1]", a->bias[1], 2, h->tokens, hidden, type, EPI_ROWS));
    EPI_TRY(check_optional("out", a->out, 2, h->tokens, hidden, type, EPI_ROWS));
    EPI_TRY(check_optional("out_topk_weights", a->out_topk_weights, 2, h->tokens, h->topk,
                           T(F32), EPI_ANY_STRIDE));
    if (a->out_topk_weights && !a->topk_weights) {
        return epi_fail(EP_ERR_ARG, "out_topk_weights is given and topk_weights is not");
    }
    if (a->topk_weights && h->by_mask) {
        return epi_fail(EP_ERR_ARG,
                        "topk_weights: a handle routed by a mask has no selections");
    }
    const struct ep_tensor *in[] = {a->x, a->bias[0], a->bias[1]};
    static const char *const names[] = {"x", "bias[0]", "bias[1]"};
    for (int i = 0; i < 3; i++) {
        if (epi_overlap(a->out, in[i])) {
            return epi_fail(EP_ERR_ARG, "out overlaps %s", names[i]);
        }
    }
    PLACES(h->group, {"x", a->x}, {"weights", a->weights}, {"topk_weights", a->topk_weights},
           {"bias[0]", a->bias[0]}, {"bias[1]", a->bias[1]}, {"out", a->out},
           {"out_topk_weights", a->out_topk_weights});
    return EP_OK;
}

ep_status ep_combine(ep_handle *handle, const struct ep_combine_args *args, void *stream) {
    NOT_NULL("ep_combine", handle);
    NOT_NULL("ep_combine", args);
    SIZE_IS(ep_combine_args, args);
    EPI_TRY(epi_group_refuse(handle->group));
    EPI_TRY(check_not_begun("ep_combine", handle));
    if (!handle->dispatched) {
        return epi_fail(EP_ERR_STATE, "ep_combine: the handle was not dispatched since it was "
                                      "routed");
    }
    if (args->flags || args->num_workers < 0) {
        return epi_fail(EP_ERR_ARG, "ep_combine_args.%s is %d, must be %s",
                        args->flags ? "flags" : "num_workers",
                        args->flags ? (int)args->flags : args->num_workers,
                        args->flags ? "0" : "at least 0");
    }
    EPI_TRY(check_combine(handle, args));
    return epi_combine(handle, args, stream);
}
