/* SPDX-License-Identifier: MIT */
/*
 * The operations that `ep bench` measures, on host ranks and on GPUs: one table. A new one is a
 * row and, where its arguments are new, a function that runs it.
 *
 * Owns nothing. Must not take time: it says what is timed, bench_clock.c how.
 */
#include "tools/bench.h"

const char *const bench_dtype_names[] = {"bf16", "fp8", "f32"};

const char *bench_types(const struct bench_params *p) {
    return p->dtype < 0 ? "fp8 and bf16" : bench_dtype_names[p->dtype];
}

static const ep_dtype row_types[] = {EP_BF16, EP_F8E4M3, EP_F32}; /* by enum bench_dtype */
static const int element_bytes[] = {2, 1, 4};

int64_t bench_row_bytes(const struct bench_params *p, int dtype) {
    return p->hidden * element_bytes[dtype];
}

int64_t bench_scale_bytes(const struct bench_params *p, int dtype) {
    return dtype == BENCH_FP8 ? (p->hidden + 127) / 128 * 4 : 0;
}

/* ---- running them ------------------------------------------------------------------------- */

static ep_status run_copy(struct bench *b) {
    int64_t bytes = b->d.row_bytes;
    for (int64_t done = 0; done < b->c->memcpy_bytes / 2;) {
        for (int64_t t = 0; t < b->p->tokens; t++, done += bytes) {
            memcpy(b->d.at.out + t * b->c->row_bytes, b->d.at.x + t * bytes, (size_t)bytes);
        }
    }
    return EP_OK;
}

static ep_status run_route(struct bench *b) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_tensor_2d(&ids, EP_I32, b->at.ids, b->p->tokens, b->p->topk);
    routing.topk_ids = &ids;
    return ep_handle_route(b->handle, &routing, bench_stream(b));
}

static ep_status run_dispatch(struct bench *b) {
    const struct bench_params *p = b->p;
    const struct bench_data *d = &b->d;
    const struct bench_buffers *at = &b->at;
    struct ep_tensor x, scales, weights, recv_scales, recv_ids, recv_weights, source, num_rows;
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.flags = (d->expanded ? EP_DISPATCH_EXPANDED : 0) |
                 (b->item->op->form == BENCH_ARENA ? EP_DISPATCH_ARENA : 0);
    ep_tensor_2d(&x, row_types[d->dtype], at->x, p->tokens, p->hidden);
    ep_tensor_2d(&weights, EP_F32, at->weights, p->tokens, p->topk);
    ep_tensor_2d(&recv_ids, EP_I32, at->recv_ids, d->num_rows, p->topk);
    ep_tensor_2d(&recv_weights, EP_F32, at->recv_weights, d->num_rows, p->topk);
    if (d->expanded) {
        ep_tensor_1d(&recv_weights, EP_F32, at->recv_weights, d->num_rows);
    }
    ep_tensor_2d(&source, EP_I32, at->recv_source, d->num_rows, 2);
    ep_tensor_1d(&num_rows, EP_I32, at->num_recv, 1);
    ep_tensor_2d(&b->view, row_types[d->dtype], at->recv, d->num_rows, p->hidden);
    args.x = &x;
    args.topk_weights = &weights;
    args.recv_x = &b->view;
    args.recv_topk_ids = d->expanded ? NULL : &recv_ids;
    args.recv_topk_weights = &recv_weights;
    args.recv_source = &source;
    args.num_rows = &num_rows;
    if (d->num_scales > 0) {
        ep_tensor_2d(&scales, EP_F32, at->scales, p->tokens, d->num_scales);
        ep_tensor_2d(&recv_scales, EP_F32, at->recv_scales, d->num_rows, d->num_scales);
        args.scales = &scales;
        args.recv_scales = &recv_scales;
    }
    return ep_dispatch(b->handle, &args, bench_stream(b));
}

/* The answers are the rows, where the dispatch has left them. */
static ep_status run_combine(struct bench *b) {
    struct ep_combine_args args = EP_COMBINE_ARGS_INIT;
    struct ep_tensor weights, out;
    ep_tensor_1d(&weights, EP_F32, b->at.recv_weights, b->view.shape[0]);
    ep_tensor_2d(&out, row_types[b->d.dtype], b->at.out, b->p->tokens, b->p->hidden);
    args.x = &b->view;
    args.weights = b->d.expanded ? &weights : NULL;
    args.out = &out;
    return ep_combine(b->handle, &args, bench_stream(b));
}

/* The dispatch that a cached one and a combine rest on. */
static ep_status dispatched(struct bench *b) {
    EPI_TRY(run_route(b));
    EPI_TRY(run_dispatch(b));
    return b->c->clock->settle(b);
}

ep_status bench_route_anew(struct bench *b) {
    return b->item->op->cached ? EP_OK : run_route(b);
}

ep_status bench_links(struct bench *b, ep_status (*fn)(struct bench *b)) {
    const struct bench_op *op = b->item->op;
    const int links = op->chain + (b->more && !op->between);
    for (b->link = 0; fn && b->link < links; b->link++) {
        EPI_TRY(fn(b));
    }
    return EP_OK;
}

static ep_status run_behind(struct bench *b) {
    EPI_TRY(b->item->op->between(b));
    const ep_status st = b->more ? b->item->op->run(b) : EP_OK;
    return st == EP_OK && b->gpu && b->item->op->joins ? gpu_join(b->gpu) : st;
}

ep_status bench_run(struct bench *b) {
    return bench_links(b, b->item->op->between ? run_behind : b->item->op->run);
}

ep_status bench_prepare(struct bench *b, int mode) {
    struct bench_item given = *b->item;
    if (bench_is_ll(given.op)) {
        given.dtype = BENCH_BF16; /* which low-latency mode casts itself */
    }
    bench_data_use(&b->d, &given, (uint64_t)(b->index * BENCH_NUM_MODES + mode));
    b->d.what = bench_item_name(b->p, b->item);
    EPI_TRY(b->c->clock->fill(b));
    rank_barrier(b->rank); /* no GPU waits while another rank still makes its rows */
    return b->item->op->prepare ? b->item->op->prepare(b) : EP_OK;
}

/* ---- the table ---------------------------------------------------------------------------- */

#define TO_VIEW "read T + write N"
#define TO_MEMORY "read T + write N + read N + write N"
#define TO_EXPANDED "read T + write N + read N + write S"
/* Answers of a rank to itself are read where they are. */
#define ANSWERS "read R + write R + read N + write T"
#define ANSWERS_EXPANDED "read S + write N + read N + write T"

/* Low-latency mode has packed output only. A chain is timed as a whole, without the host between its
 * links. Two sends without a receive are the most there can be: what a second half takes more than one. */
#define LL(key, name, kind, run, moved)                                                        \
    key, name, BENCH_LL_##kind, BENCH_MEMORY, true, bench_ll_prepare, bench_ll_##run, NULL,    \
        moved

#define COLD_CHAIN 4

/* Timed once, with nothing around it. */
#define ALONE NULL, 1, NULL, NULL, NULL, false, 0
#define CHAIN(flags) BENCH_CHAIN, NULL, NULL, NULL, false, flags

static const struct bench_op ops[] = {
    {"memcpy", "memcpy of rows", BENCH_COPY, BENCH_MEMORY, true, NULL, run_copy, NULL, NULL,
     ALONE},
    {"route", "route", BENCH_ROUTE, BENCH_MEMORY, true, NULL, run_route, NULL, NULL, ALONE},
    {"dispatch_arena_cached", "dispatch to arena, cached", BENCH_DISPATCH, BENCH_ARENA, true,
     dispatched, run_dispatch, TO_VIEW, TO_EXPANDED, ALONE},
    {"dispatch_arena", "dispatch to arena", BENCH_DISPATCH, BENCH_ARENA, false, NULL,
     run_dispatch, TO_VIEW, TO_EXPANDED, ALONE},
    {"dispatch_memory_cached", "dispatch to memory, cached", BENCH_DISPATCH, BENCH_MEMORY, true,
     dispatched, run_dispatch, TO_MEMORY, TO_EXPANDED, ALONE},
    {"dispatch_memory", "dispatch to memory", BENCH_DISPATCH, BENCH_MEMORY, false, NULL,
     run_dispatch, TO_MEMORY, TO_EXPANDED, ALONE},
    {"dispatch_expanded_cached", "dispatch expanded, cached", BENCH_DISPATCH, BENCH_EXPANDED,
     true, dispatched, run_dispatch, NULL, TO_EXPANDED, ALONE},
    {"dispatch_expanded", "dispatch expanded", BENCH_DISPATCH, BENCH_EXPANDED, false, NULL,
     run_dispatch, NULL, TO_EXPANDED, ALONE},
    {"combine_arena", "combine from arena", BENCH_COMBINE, BENCH_ARENA, true, dispatched,
     run_combine, ANSWERS, ANSWERS_EXPANDED, ALONE},
    {"combine_memory", "combine from memory", BENCH_COMBINE, BENCH_MEMORY, true, dispatched,
     run_combine, ANSWERS, ANSWERS_EXPANDED, ALONE},
    {"combine_expanded", "combine expanded, weighted", BENCH_COMBINE, BENCH_EXPANDED, true,
     dispatched, run_combine, NULL, ANSWERS_EXPANDED, ALONE},
    {LL("ll_round_trip", "round trip", TRIP, trip, TO_EXPANDED), ANSWERS_EXPANDED, CHAIN(0)},
    {LL("ll_round_trip_cold", "round trip, cold", TRIP, trip, TO_EXPANDED), ANSWERS_EXPANDED,
     COLD_CHAIN, NULL, NULL, bench_ll_other, false, 0},
    {LL("ll_two_trips_beside", "two in halves, beside", TRIP, two_trips, NULL), NULL,
     COLD_CHAIN, NULL, NULL, bench_ll_other, true, 0},
    {LL("ll_dispatch", "dispatch", DISPATCH, dispatch, TO_EXPANDED), NULL, CHAIN(0)},
    {LL("ll_dispatch_send", "dispatch, send half", DISPATCH, dispatch_send, "read T + write N"),
     NULL, 1, NULL, bench_ll_dispatch_recv, NULL, false, 0},
    {LL("ll_dispatch_recv", "dispatch, receive half", DISPATCH, dispatch_recv,
        "read N + write S"),
     NULL, 1, bench_ll_dispatch_send, NULL, NULL, false, 0},
    {LL("ll_combine", "combine", COMBINE, combine, ANSWERS_EXPANDED), NULL, CHAIN(0)},
    {LL("ll_combine_send", "combine, send half", COMBINE, combine_send, "read S + write N"),
     NULL, 1, NULL, bench_ll_combine_recv, NULL, false, 0},
    {LL("ll_combine_recv", "combine, receive half", COMBINE, combine_recv, "read N + write T"),
     NULL, 1, bench_ll_combine_send, NULL, NULL, false, 0},
    {LL("ll_combine_weights", "combine, weights given", COMBINE, combine, ANSWERS_EXPANDED),
     NULL, CHAIN(BENCH_LL_WEIGHTS)},
    {LL("ll_combine_exact", "combine, exact", COMBINE, combine, NULL), NULL,
     CHAIN(EP_LL_EXACT)},
    {LL("ll_combine_logfmt", "combine, LogFMT", COMBINE, combine, NULL), NULL,
     CHAIN(EP_LL_LOGFMT)},
};

/* ---- which of them ------------------------------------------------------------------------ */

/* Answers of FP8 rows are bf16, and what has no rows is measured once. */
static bool has_type(const struct bench_params *p, const struct bench_op *op, int dtype) {
    if (op->kind == BENCH_ROUTE || op->kind == BENCH_COMBINE || op->kind == BENCH_LL_COMBINE ||
        (op->kind == BENCH_COPY && p->ll)) {
        return dtype == (p->dtype == BENCH_F32 ? BENCH_F32 : BENCH_BF16);
    }
    return p->dtype < 0 ? dtype != BENCH_F32 : dtype == p->dtype;
}

static bool measures(const struct bench_params *p, const struct bench_op *op, int dtype) {
    bool host = p->device == BENCH_HOST;
    if (!has_type(p, op, dtype) || (op->kind == BENCH_COPY && !host)) {
        return false;
    }
    if (op->kind == BENCH_COPY) {
        return true;
    }
    if (p->ll || bench_is_ll(op)) {
        return p->ll && bench_is_ll(op);
    }
    if (op->kind == BENCH_ROUTE) {
        return true;
    }
    if (op->form == BENCH_ARENA ? p->memory_only : p->arena_only) {
        return false;
    }
    if (host ? op->form == BENCH_EXPANDED : p->expanded && op->form != BENCH_EXPANDED) {
        return false;
    }
    if (dtype == BENCH_FP8 && op->form == BENCH_EXPANDED && !p->expanded) {
        return false; /* only when asked for */
    }
    return !(op->kind == BENCH_DISPATCH && op->cached && p->uncached);
}

int bench_items(const struct bench_params *p, struct bench_item items[BENCH_MAX_ITEMS]) {
    static const int order[] = {BENCH_FP8, BENCH_BF16, BENCH_F32};
    const int num_ops = sizeof(ops) / sizeof(ops[0]);
    int num = 0;
    for (int i = 0; i < BENCH_NUM_KINDS * BENCH_NUM_DTYPES * num_ops; i++) {
        const struct bench_op *op = &ops[i % num_ops];
        int dtype = order[i / num_ops % BENCH_NUM_DTYPES];
        if ((int)op->kind == i / num_ops / BENCH_NUM_DTYPES && measures(p, op, dtype)) {
            bool expanded = p->ll                     ? true
                            : p->device == BENCH_HOST ? p->expanded
                                                      : op->form == BENCH_EXPANDED;
            items[num++] = (struct bench_item){op, dtype, expanded};
        }
    }
    if (items[0].op->kind == BENCH_COPY) {
        items[num++] = items[0]; /* again, at the end */
    }
    return num;
}

/* On GPUs routing anew is in the time: see bench_clock.c. */
static const char *routed(const struct bench_params *p, const struct bench_op *op,
                          const char *with) {
    return p->device == BENCH_CUDA && !op->cached ? with : "";
}

struct text bench_item_name(const struct bench_params *p, const struct bench_item *item) {
    bool typed =
        p->device == BENCH_CUDA ? item->op->kind != BENCH_ROUTE : bench_is_ll(item->op);
    struct text t;
    snprintf(t.s, sizeof(t.s), "%s%s%s%s", typed ? bench_dtype_names[item->dtype] : "",
             typed ? " " : "", routed(p, item->op, "route + "), item->op->name);
    return t;
}

struct text bench_item_key(const struct bench_params *p, const struct bench_item *item) {
    struct text t;
    snprintf(t.s, sizeof(t.s), "%s%s%s%s", routed(p, item->op, "route_"), item->op->key,
             bench_is_ll(item->op) ? "_" : "",
             bench_is_ll(item->op) ? bench_dtype_names[item->dtype] : "");
    return t;
}
