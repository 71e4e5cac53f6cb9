/* SPDX-License-Identifier: MIT */
/*
 * Low-latency mode on the host side: the rules of the arguments of both kinds, the public functions that
 * check them, and the kernels' arguments. op.c does the rest. Which operation a call is, and whether it
 * is legal now, is known to the kernels alone, because graphs replay some that nobody has issued.
 */
#include "src/ep/group.h"

#include <string.h>

/* What a call does; the parts that a kernel gets as flags. */
#define BOTH (K_LL_SEND | K_LL_RECEIVE)

#define FIELD(f, to) EPI_FIELD(ep_ll_dispatch_args, f, k_ll_dispatch_args, to)
static const struct epi_rule ll_dispatch_rules[] = {
    {FIELD(x, x), EPI_IN | EPI_REQUIRED | EPI_ROW_BYTES, EPI_DIMS(T, HIDDEN), EPI_ROWS,
     EPI_AS(X, ROWS), 0},
    {FIELD(scales, scales), EPI_IN | EPI_SCALE_BYTES, EPI_DIMS(T, SCALES), EPI_SCALES,
     EPI_AS(SCALES, ANY), 0},
    {FIELD(topk_ids, ids), EPI_IN | EPI_REQUIRED, EPI_DIMS(T, K), EPI_IDS, EPI_AS(NONE, DENSE),
     0},
    {FIELD(topk_weights, weights), EPI_IN, EPI_DIMS(T, K), EPI_TYPE(EP_F32), EPI_AS(NONE, ANY),
     0},
    {FIELD(handle, ll.head), EPI_IN | EPI_OUT | EPI_REQUIRED | EPI_ADDRESS,
     EPI_DIMS(LL_HANDLE, NONE), EPI_TYPE(EP_U8), EPI_AS(NONE, DENSE), 0},
    {FIELD(recv_x, recv_x), EPI_OUT | EPI_REQUIRED | EPI_ROW_BYTES, EPI_DIMS(LL_ROWS, HIDDEN),
     EPI_ROWS, EPI_AS(NONE, ROWS), 0},
    {FIELD(recv_scales, recv_scales), EPI_OUT, EPI_DIMS(LL_COLUMNS, LL_EACH), EPI_SCALES,
     EPI_AS(SCALES, ROWS), EPI_NO_SCALES},
    {FIELD(recv_topk_ids, recv_ids), EPI_OUT, EPI_DIMS(LL_ROWS, K), EPI_IDS, EPI_AS(NONE, ANY),
     EPI_EXPANDED},
    {FIELD(recv_topk_weights, recv_weights), EPI_OUT, EPI_DIMS(LL_ROWS, K), EPI_TYPE(EP_F32),
     EPI_AS(NONE, ANY), EPI_EXPANDED | EPI_NO_WEIGHTS},
    {FIELD(recv_source, recv_source), EPI_OUT, EPI_DIMS(LL_ROWS, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(expert_counts, expert_counts), EPI_OUT, EPI_DIMS(L, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(expert_totals, expert_totals), EPI_OUT, EPI_DIMS(L, NONE), EPI_TYPE(EP_I32),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(ranges, ranges), EPI_OUT, EPI_DIMS(LL_LISTS, R), EPI_TYPE(EP_I64),
     EPI_AS(NONE, DENSE), 0},
    {FIELD(wait_ns, wait_ns), EPI_OUT, EPI_DIMS(R, NONE), EPI_TYPE(EP_I64), EPI_AS(NONE, DENSE),
     0},
};
#undef FIELD
EPI_RULES(epi_ll_dispatch_rules, ll_dispatch_rules);

#define FIELD(f, to) EPI_FIELD(ep_ll_combine_args, f, k_ll_combine_args, to)
static const struct epi_rule ll_combine_rules[] = {
    {FIELD(handle, ll.head), EPI_IN | EPI_OUT | EPI_REQUIRED | EPI_ADDRESS,
     EPI_DIMS(LL_HANDLE, NONE), EPI_TYPE(EP_U8), EPI_AS(NONE, DENSE), 0},
    {FIELD(x, x), EPI_IN | EPI_REQUIRED | EPI_ROW_BYTES, EPI_DIMS(LL_ROWS, HIDDEN),
     EPI_TYPE(EP_BF16), EPI_AS(NONE, ROWS), 0},
    {FIELD(topk_weights, weights), EPI_IN | EPI_OUT, EPI_DIMS(T, K), EPI_TYPE(EP_F32),
     EPI_AS(NONE, ANY), 0}, /* both halves read it */
    {FIELD(out, out), EPI_OUT | EPI_REQUIRED | EPI_ROW_BYTES, EPI_DIMS(T, HIDDEN),
     EPI_TYPE(EP_BF16), EPI_AS(NONE, ROWS), 0},
    {FIELD(wait_ns, wait_ns), EPI_IN | EPI_OUT, EPI_DIMS(R, NONE), EPI_TYPE(EP_I64),
     EPI_AS(NONE, DENSE), 0},
};
#undef FIELD
EPI_RULES(epi_ll_combine_rules, ll_combine_rules);

/* ---- what a kernel has refused -------------------------------------------------------------- */

ep_status epi_ll_tell_refused(ep_group *g) {
    struct k_board *b = g->backend->board(g, g->rank);
    const k_u64 w = atomic_exchange((_Atomic k_u64 *)&b->refused, 0);
    const char *kind = w >> 32 == K_OP_LL_COMBINE ? "combine" : "dispatch";
    switch ((k_u32)w) {
    case 0:
        return EP_OK;
    case K_REFUSED_SEND:
        return epi_fail(EP_ERR_STATE,
                        "ep_ll_%s: two operations of this kind are in flight: receive the "
                        "older one first",
                        kind);
    case K_REFUSED_BARRIER:
        return epi_fail(
            EP_ERR_STATE,
            "ep_ll_barrier: an operation of low-latency mode was sent and not received");
    case K_REFUSED_RECEIVE:
        return epi_fail(EP_ERR_STATE,
                        "ep_ll_%s_recv: the handle's %s was not sent, or has been received",
                        kind, kind);
    default:
        return epi_fail(EP_ERR_STATE,
                        "ep_ll_%s: the handle is of no dispatch of this shape that was "
                        "received here since the last ep_ll_barrier",
                        kind);
    }
}

static ep_status ll_after(struct epi_op *op) {
    EPI_TRY(epi_ll_tell_refused(op->g));
    return epi_masks_tell(op->g);
}

/* A host operation behind a fault, whose kernel is not run: it has no rows, as if it had failed. */
static void clear_counts(struct epi_op *op) {
    const struct k_ll_dispatch_args *a = &op->args.ll_dispatch;
    const size_t local = (size_t)a->g.num_local;
    if (a->expert_counts.data) {
        memset((void *)a->expert_counts.data, 0, local * sizeof(int32_t));
    }
    if (a->ranges.data) {
        const size_t lists = a->signature & K_LL_SIG_COMPACT ? 1 : local;
        memset((void *)a->ranges.data, 0, lists * (size_t)a->g.num_ranks * sizeof(int64_t));
    }
}

static const struct epi_op_kind ll_dispatch_kind = {.kernel = EPI_KERNEL_LL_DISPATCH,
                                                    .faults = &epi_faults_end_ll,
                                                    .counts_itself = true,
                                                    .clear = clear_counts,
                                                    .after = ll_after};
static const struct epi_op_kind ll_combine_kind = {.kernel = EPI_KERNEL_LL_COMBINE,
                                                   .faults = &epi_faults_end_ll,
                                                   .counts_itself = true,
                                                   .after = ll_after};

/* ---- checks --------------------------------------------------------------------------------- */

static ep_status check_call(ep_group *g, const char *fn, int max_tokens, int num_workers) {
    const int most = g->config.ll_max_tokens;
    EPI_NOT_FORKED(fn, "group", g->process);
    EPI_TRY(epi_group_admit(g));
    if (!most) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "%s: the group was created with ll_max_tokens 0 and has no low-latency "
                        "mode",
                        fn);
    }
    if (max_tokens < 0 || max_tokens > most) {
        return epi_fail(EP_ERR_ARG, "max_tokens is %d, must be 0..%d (ll_max_tokens)",
                        max_tokens, most);
    }
    if (num_workers < 0) {
        return epi_fail(EP_ERR_ARG, "num_workers is %d, must be at least 0", num_workers);
    }
    return epi_check_not_open(fn, g);
}

/* Lengths that M and the experts give. */
static void begin_call(struct epi_call *c, const ep_group *g, int max_tokens,
                       const struct epi_experts *experts, bool compact) {
    epi_call_begin(c, g);
    epi_call_experts(c, experts);
    c->dim[EPI_DIM_LL_EACH] = (int64_t)g->num_ranks * max_tokens;
    c->dim[EPI_DIM_LL_LISTS] = compact ? 1 : experts->num_local;
    c->dim[EPI_DIM_LL_ROWS] = c->dim[EPI_DIM_LL_EACH] * c->dim[EPI_DIM_LL_LISTS];
    c->dim[EPI_DIM_LL_HANDLE] = g->plan.info.ll_handle_bytes;
}

static ep_status check_handle(const struct ep_tensor *t) {
    return (uintptr_t)t->data % EP_ROW_ALIGN
               ? epi_fail(EP_ERR_ARG, "handle.data is %p, must be a multiple of %d", t->data,
                          EP_ROW_ALIGN)
               : EP_OK;
}

/* T and K of a send; those of a receive are in the handle. */
static ep_status check_lengths(const struct epi_call *c, int max_tokens) {
    const int64_t tokens = c->dim[EPI_DIM_T], topk = c->dim[EPI_DIM_K];
    const int most = c->group->config.max_topk;
    if (tokens > max_tokens) {
        return epi_fail(EP_ERR_ARG, "%lld tokens, must be at most %d (max_tokens)",
                        (long long)tokens, max_tokens);
    }
    if (topk == 0 || topk > most) {
        return epi_fail(EP_ERR_ARG, "topk_ids.shape[1] is %lld, must be 1..%d (max_topk)",
                        (long long)topk, most);
    }
    return EP_OK;
}

/* ---- from arguments to the kernels' --------------------------------------------------------- */

/* The public struct is the same for both halves: each looks at its own tensors, and the handle. */
static uint32_t roles_of(uint32_t part) {
    return (part & K_LL_SEND ? EPI_IN : 0) | (part & K_LL_RECEIVE ? EPI_OUT : 0);
}

/* All SMs that the group may have, unless the caller or the group says less. On a device those are what
 * it was promised (cuda_sms.c), so blocks that wait here are in the sum of the process too. */
static int workers_of(const ep_group *g, int asked) {
    return asked ? asked : g->workers ? g->workers : g->most_workers;
}

void epi_ll_fill(struct epi_op *op, struct k_ll *ll, int max_tokens) {
    const ep_group *g = op->g;
    ll->ctl = g->ll_ctl;
    ll->peers = g->masks ? epi_masks_peers(g->ll_ctl) : NULL;
    ll->map = g->plan.ll;
    ll->group_tokens = g->config.ll_max_tokens;
    ll->group_topk = g->config.max_topk;
    ll->max_tokens = max_tokens;
}

/* Before the tables' checks, which it tells the form of the call. */
static ep_status check_ll_form(struct epi_call *c, const struct ep_ll_dispatch_args *a,
                               uint32_t part) {
    const uint32_t known = EP_LL_FP8 | EP_LL_SCALES_POWER_OF_2 | EP_LL_COMPACT;
    c->is = (a->flags & EP_LL_COMPACT ? 0 : EPI_EXPANDED) |
            ((part & K_LL_SEND) && !a->topk_weights ? EPI_NO_WEIGHTS : 0);
    if ((a->flags & ~known) || (a->flags & ~EP_LL_COMPACT) == EP_LL_SCALES_POWER_OF_2) {
        return epi_fail(EP_ERR_ARG,
                        "ep_ll_dispatch_args.flags is 0x%x, known are 0x%x, and "
                        "EP_LL_SCALES_POWER_OF_2 only with EP_LL_FP8",
                        a->flags, known);
    }
    if (a->flags & EP_LL_FP8) {
        c->like[EPI_LIKE_X] = EPI_TYPE(EP_BF16);
        c->like[EPI_LIKE_SCALES] = EPI_TYPE(EP_F32) | EPI_TYPE(EP_I32);
        return a->scales ? epi_fail(EP_ERR_ARG, "scales are given with EP_LL_FP8, which makes "
                                                "its own")
                         : EP_OK;
    }
    c->is |= (part & K_LL_SEND) && !a->scales ? EPI_NO_SCALES : 0;
    return EP_OK;
}

/* Of x. */
static int row_dtype(const struct ep_ll_dispatch_args *a, uint32_t part) {
    return a->flags & EP_LL_FP8 ? EP_BF16 : part & K_LL_SEND ? a->x->dtype : a->recv_x->dtype;
}

/* After them: rows. */
static ep_status check_types(const struct epi_call *c, const struct ep_ll_dispatch_args *a,
                             uint32_t part) {
    const int64_t hidden = c->dim[EPI_DIM_HIDDEN];
    const bool cast = (a->flags & EP_LL_FP8) != 0;
    const int want = cast ? EP_F8E4M3 : row_dtype(a, part);
    if (cast && hidden % K_LL_GROUP) {
        return epi_fail(EP_ERR_ARG, "rows of %lld channels: with EP_LL_FP8 a multiple of %d",
                        (long long)hidden, K_LL_GROUP);
    }
    return (part & K_LL_RECEIVE) && a->recv_x->dtype != want
               ? epi_fail(EP_ERR_ARG, "recv_x.dtype is %s, must be %s",
                          epi_dtype_name(a->recv_x->dtype), epi_dtype_name(want))
               : EP_OK;
}

/* And what is taken of scales: as many as are sent, if that is known to this half. */
static ep_status check_scales(struct epi_call *c, const struct ep_ll_dispatch_args *a) {
    const struct ep_tensor *t = a->recv_scales;
    const int64_t local = c->dim[EPI_DIM_LL_LISTS],
                  groups = c->dim[EPI_DIM_HIDDEN] / K_LL_GROUP;
    const bool cast = (a->flags & EP_LL_FP8) != 0, packed = cast && t && t->dtype == EP_I32;
    const int64_t sent = c->dim[EPI_DIM_SCALES];
    const int64_t columns = packed                   ? (groups + 3) / 4
                            : cast                   ? groups
                            : sent < 0 && t && local ? t->shape[0] / local
                                                     : sent;
    c->dim[EPI_DIM_SCALES] = columns;
    if (t && !cast) {
        EPI_TRY(epi_check_scale_bytes(c->group, columns, t->dtype));
    }
    if (packed && !(a->flags & EP_LL_SCALES_POWER_OF_2)) {
        return epi_fail(EP_ERR_ARG, "recv_scales is EP_I32, exponents: they need "
                                    "EP_LL_SCALES_POWER_OF_2");
    }
    return t && t->shape[0] != local * columns
               ? epi_fail(
                     EP_ERR_ARG,
                     "recv_scales.shape[0] is %lld, must be %lld: %lld for each of %d lists of "
                     "rows",
                     (long long)t->shape[0], (long long)(local * columns), (long long)columns,
                     (int)local)
               : EP_OK;
}

static void set_dispatch(struct epi_op *op, const struct epi_call *c,
                         const struct ep_ll_dispatch_args *a, uint32_t part, int max_tokens) {
    struct k_ll_dispatch_args *k = &op->args.ll_dispatch;
    const bool cast = (a->flags & EP_LL_FP8) != 0;
    const int hidden = (int)c->dim[EPI_DIM_HIDDEN];
    const int topk = c->dim[EPI_DIM_K] < 0 ? 0 : (int)c->dim[EPI_DIM_K];
    const struct ep_tensor *scales = part & K_LL_SEND ? a->scales : a->recv_scales;
    const int num_scales = cast || !scales ? 0 : (int)c->dim[EPI_DIM_SCALES];
    epi_ll_fill(op, &k->ll, max_tokens);
    k->flags = part;
    k->types = K_TYPES(row_dtype(a, part), num_scales > 0 ? scales->dtype : EP_DTYPE_NONE);
    if (num_scales > 0) { /* where there is no expert, a receive does not know */
        k->types |= (k_u32)num_scales;
        k->scale_bytes = (int)ep_dtype_bytes((ep_dtype)scales->dtype);
    }
    const struct epi_ll_wire wire = epi_plan_ll_wire(
        cast ? hidden : k->row_bytes, topk,
        cast ? hidden / K_LL_GROUP * 4 : K_LL_NUM_SCALES(k->types) * k->scale_bytes);
    k->signature = (a->topk_weights ? K_LL_SIG_WEIGHTS : 0) | (cast ? K_LL_SIG_CAST : 0) |
                   (a->flags & EP_LL_SCALES_POWER_OF_2 ? K_LL_SIG_POWER_OF_2 : 0) |
                   (a->flags & EP_LL_COMPACT ? K_LL_SIG_COMPACT : 0);
    k->ll.wire_bytes = wire.bytes;
    k->row_at = wire.row_at;
    if (part & K_LL_SEND) {
        k->tokens = (k_i32)c->dim[EPI_DIM_T];
        k->id_bytes = a->topk_ids->dtype == EP_I64 ? 8 : 4;
    }
    k->topk = topk;
    k->recv_id_bytes =
        (part & K_LL_RECEIVE) && a->recv_topk_ids && a->recv_topk_ids->dtype == EP_I64 ? 8 : 4;
    k->packed_scales =
        cast && (part & K_LL_RECEIVE) && a->recv_scales && a->recv_scales->dtype == EP_I32;
    epi_args_fill(c, &epi_ll_dispatch_rules, a, roles_of(part), k);
}

static ep_status run_ll_dispatch(ep_group *g, struct ep_ll_dispatch_args a,
                                 struct epi_experts *experts, int max_tokens, uint32_t part,
                                 void *stream) {
    struct epi_call c;
    struct epi_op op;
    begin_call(&c, g, max_tokens, experts, a.flags & EP_LL_COMPACT);
    EPI_TRY(check_ll_form(&c, &a, part));
    EPI_TRY(epi_args_check(&c, &epi_ll_dispatch_rules, &a, roles_of(part)));
    EPI_TRY(check_handle(a.handle));
    EPI_TRY(check_lengths(&c, max_tokens));
    EPI_TRY(check_types(&c, &a, part));
    if (part & K_LL_RECEIVE) {
        EPI_TRY(check_scales(&c, &a));
    }
    const int row_bytes =
        (int)c.dim[EPI_DIM_HIDDEN] * (int)ep_dtype_bytes((ep_dtype)row_dtype(&a, part));
    const struct epi_load load = {row_bytes, g->config.max_topk, true, false};
    epi_op_of_group(&op, &ll_dispatch_kind, g, workers_of(g, a.num_workers), &load);
    epi_op_experts(&op, experts);
    op.args.op.row_bytes = row_bytes;
    set_dispatch(&op, &c, &a, part, max_tokens);
    return epi_op_issue(&op, stream);
}

static ep_status ll_dispatch(const char *fn, ep_group *g,
                             const struct ep_ll_dispatch_args *args, uint32_t part,
                             void *stream) {
    struct ep_ll_dispatch_args a;
    struct epi_experts *experts;
    EPI_NOT_NULL("ep_ll_dispatch", g);
    EPI_NOT_NULL("ep_ll_dispatch", args);
    EPI_TAKE(ep_ll_dispatch_args, &a, args);
    EPI_TRY(check_call(g, fn, a.max_tokens, a.num_workers));
    const int max_tokens = a.max_tokens ? a.max_tokens : g->config.ll_max_tokens;
    EPI_TRY(epi_experts_find(g, "ep_ll_dispatch_args", a.num_experts, a.expert_rank, &experts));
    const ep_status st = run_ll_dispatch(g, a, experts, max_tokens, part, stream);
    epi_experts_let_go(experts);
    return st;
}

static ep_status run_ll_combine(ep_group *g, struct ep_ll_combine_args a,
                                struct epi_experts *experts, int max_tokens, uint32_t part,
                                void *stream) {
    struct epi_call c;
    struct epi_op op;
    begin_call(&c, g, max_tokens, experts, a.flags & EP_LL_COMPACT);
    EPI_TRY(epi_args_check(&c, &epi_ll_combine_rules, &a, roles_of(part)));
    EPI_TRY(check_handle(a.handle));
    const int64_t hidden = c.dim[EPI_DIM_HIDDEN];
    EPI_TRY(check_lengths(&c, max_tokens));
    if ((a.flags & EP_LL_LOGFMT) && hidden % K_LL_GROUP) {
        return epi_fail(EP_ERR_ARG, "rows of %lld channels: with EP_LL_LOGFMT a multiple of %d",
                        (long long)hidden, K_LL_GROUP);
    }
    const struct epi_load load = {(int)hidden * 2, g->config.max_topk, true, true};
    epi_op_of_group(&op, &ll_combine_kind, g, workers_of(g, a.num_workers), &load);
    epi_op_experts(&op, experts);
    struct k_ll_combine_args *k = &op.args.ll_combine;
    epi_ll_fill(&op, &k->ll, max_tokens);
    k->flags = part;
    k->row_bytes = 2 * (k_i32)hidden;
    k->types = K_TYPES(EP_BF16, EP_DTYPE_NONE);
    k->form = (a.topk_weights ? K_LL_SIG_WEIGHTS_NOW : 0) |
              (a.flags & EP_LL_EXACT ? K_LL_SIG_EXACT : 0) |
              (a.flags & EP_LL_COMPACT ? K_LL_SIG_COMPACT : 0) |
              (a.flags & EP_LL_LOGFMT ? K_LL_SIG_LOGFMT : 0);
    k->tokens = (k_i32)c.dim[EPI_DIM_T]; /* -1, as of K 0: not known to this half */
    k->topk = c.dim[EPI_DIM_K] < 0 ? 0 : (k_i32)c.dim[EPI_DIM_K];
    k->ll.wire_bytes = epi_plan_ll_answer_bytes(k->row_bytes);
    epi_args_fill(&c, &epi_ll_combine_rules, &a, roles_of(part), k);
    return epi_op_issue(&op, stream);
}

static ep_status ll_combine(const char *fn, ep_group *g, const struct ep_ll_combine_args *args,
                            uint32_t part, void *stream) {
    struct ep_ll_combine_args a;
    struct epi_experts *experts;
    EPI_NOT_NULL("ep_ll_combine", g);
    EPI_NOT_NULL("ep_ll_combine", args);
    EPI_TAKE(ep_ll_combine_args, &a, args);
    EPI_TRY(check_call(g, fn, a.max_tokens, a.num_workers));
    const uint32_t known =
        EP_LL_COMPACT | EP_LL_LOGFMT | (g->config.flags & EP_GROUP_LL_EXACT ? EP_LL_EXACT : 0);
    if (a.flags & ~known) {
        return epi_fail(
            EP_ERR_ARG,
            "ep_ll_combine_args.flags is 0x%x, known are 0x%x, EP_LL_EXACT in a group "
            "with EP_GROUP_LL_EXACT",
            a.flags, known);
    }
    if ((a.flags & EP_LL_COMPACT) && (a.topk_weights || (a.flags & EP_LL_EXACT))) {
        return epi_fail(
            EP_ERR_ARG,
            "ep_ll_combine_args.%s: with EP_LL_COMPACT a rank answers one row, which is "
            "summed already",
            a.topk_weights ? "topk_weights is given" : "flags has EP_LL_EXACT");
    }
    const int max_tokens = a.max_tokens ? a.max_tokens : g->config.ll_max_tokens;
    EPI_TRY(epi_experts_find(g, "ep_ll_combine_args", a.num_experts, a.expert_rank, &experts));
    const ep_status st = run_ll_combine(g, a, experts, max_tokens, part, stream);
    epi_experts_let_go(experts);
    return st;
}

/* ---- the public functions ------------------------------------------------------------------- */

ep_status ep_ll_dispatch(ep_group *group, const struct ep_ll_dispatch_args *args,
                         void *stream) {
    return ll_dispatch("ep_ll_dispatch", group, args, BOTH, stream);
}

ep_status ep_ll_dispatch_send(ep_group *group, const struct ep_ll_dispatch_args *args,
                              void *stream) {
    return ll_dispatch("ep_ll_dispatch_send", group, args, K_LL_SEND, stream);
}

ep_status ep_ll_dispatch_recv(ep_group *group, const struct ep_ll_dispatch_args *args,
                              void *stream) {
    return ll_dispatch("ep_ll_dispatch_recv", group, args, K_LL_RECEIVE, stream);
}

ep_status ep_ll_combine(ep_group *group, const struct ep_ll_combine_args *args, void *stream) {
    return ll_combine("ep_ll_combine", group, args, BOTH, stream);
}

ep_status ep_ll_combine_send(ep_group *group, const struct ep_ll_combine_args *args,
                             void *stream) {
    return ll_combine("ep_ll_combine_send", group, args, K_LL_SEND, stream);
}

ep_status ep_ll_combine_recv(ep_group *group, const struct ep_ll_combine_args *args,
                             void *stream) {
    return ll_combine("ep_ll_combine_recv", group, args, K_LL_RECEIVE, stream);
}

ep_status ep_ll_memory(ep_group *group, struct ep_tensor *view) {
    EPI_NOT_NULL("ep_ll_memory", group);
    EPI_NOT_NULL("ep_ll_memory", view);
    EPI_NOT_FORKED("ep_ll_memory", "group", group->process);
    const struct k_ll_map *m = &group->plan.ll;
    const k_u64 from = m->rows.at, parts = 2 * (k_u64)group->num_ranks;
    if (!group->config.ll_max_tokens) {
        return epi_fail(EP_ERR_UNSUPPORTED, "ep_ll_memory: ll_max_tokens of the group is 0");
    }
    ep_tensor_1d(view, EP_U8,
                 (void *)(uintptr_t)(epi_mem_arena_address(group->mem, group->rank) + from),
                 (int64_t)(m->answers.at - from + m->answers.stride * parts));
    return EP_OK;
}

ep_status ep_ll_status(ep_group *group) {
    EPI_NOT_NULL("ep_ll_status", group);
    EPI_NOT_FORKED("ep_ll_status", "group", group->process);
    if (epi_group_faulted(group)) {
        return epi_group_check_next(group);
    }
    EPI_TRY(epi_ll_tell_refused(group));
    return epi_masks_tell(group);
}
