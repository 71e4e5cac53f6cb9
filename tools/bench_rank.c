/* SPDX-License-Identifier: MIT */
/*
 * One host rank of `ep bench`: times each phase and checks what came out.
 *
 * Owns the rank's group and, through bench_data.c, its buffers. Only the library call lies
 * between the two clock readings.
 */
#include "tools/bench.h"

struct bench {
    struct rank *rank;
    struct bench_case *c;
    const struct bench_params *p;
    struct bench_data d;
    ep_group *group;
    ep_handle *handle;
    enum bench_phase phase;
    ep_dtype answer_type;  /* of combine */
    struct ep_tensor view; /* recv_x of the last dispatch */
};

/* ---- operations -------------------------------------------------------------------------- */

static ep_status do_route(struct bench *b) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_tensor_2d(&ids, EP_I32, b->c->ids + b->rank->rank * b->p->tokens * b->p->topk,
                 b->p->tokens, b->p->topk);
    routing.topk_ids = &ids;
    return ep_handle_route(b->handle, &routing, NULL);
}

static ep_status do_dispatch(struct bench *b, bool arena) {
    const struct bench_params *p = b->p;
    struct bench_data *d = &b->d;
    struct ep_tensor x, scales, weights, recv_scales, recv_ids, recv_weights, source;
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.flags = (p->expanded ? EP_DISPATCH_EXPANDED : 0) | (arena ? EP_DISPATCH_ARENA : 0);
    ep_tensor_2d(&x, bench_row_types[p->dtype], d->x, p->tokens, p->hidden);
    ep_tensor_2d(&weights, EP_F32, d->weights, p->tokens, p->topk);
    ep_tensor_2d(&recv_ids, EP_I32, d->recv_ids, d->num_rows, p->topk);
    ep_tensor_2d(&recv_weights, EP_F32, d->recv_weights, d->num_rows, p->topk);
    if (p->expanded) {
        ep_tensor_1d(&recv_weights, EP_F32, d->recv_weights, d->num_rows);
    }
    ep_tensor_2d(&source, EP_I32, d->recv_source, d->num_rows, 2);
    ep_tensor_2d(&b->view, bench_row_types[p->dtype], d->recv, d->num_rows, p->hidden);
    args.x = &x;
    args.topk_weights = &weights;
    args.recv_x = &b->view;
    args.recv_topk_ids = p->expanded ? NULL : &recv_ids;
    args.recv_topk_weights = &recv_weights;
    args.recv_source = &source;
    if (d->num_scales > 0) {
        ep_tensor_2d(&scales, EP_F32, d->scales, p->tokens, d->num_scales);
        ep_tensor_2d(&recv_scales, EP_F32, d->recv_scales, d->num_rows, d->num_scales);
        args.scales = &scales;
        args.recv_scales = &recv_scales;
    }
    return ep_dispatch(b->handle, &args, NULL);
}

static ep_status do_combine(struct bench *b) {
    struct ep_combine_args args = EP_COMBINE_ARGS_INIT;
    struct ep_tensor weights, out;
    ep_tensor_1d(&weights, EP_F32, b->d.recv_weights, b->view.shape[0]);
    ep_tensor_2d(&out, b->answer_type, b->d.out, b->p->tokens, b->p->hidden);
    args.x = &b->view;
    args.weights = b->p->expanded ? &weights : NULL;
    args.out = &out;
    return ep_combine(b->handle, &args, NULL);
}

static void copy_rows(struct bench *b) {
    int64_t bytes = b->c->row_bytes;
    for (int64_t done = 0; done < b->c->memcpy_bytes / 2;) {
        for (int64_t t = 0; t < b->p->tokens; t++, done += bytes) {
            memcpy(b->d.out + t * b->c->answer_bytes, b->d.x + t * bytes, (size_t)bytes);
        }
    }
}

static ep_status run_once(struct bench *b) {
    switch (b->phase) {
    case PHASE_ROUTE:
        return do_route(b);
    case PHASE_DISPATCH_ARENA:
    case PHASE_DISPATCH_ARENA_CACHED:
        return do_dispatch(b, true);
    case PHASE_DISPATCH_MEMORY:
    case PHASE_DISPATCH_MEMORY_CACHED:
        return do_dispatch(b, false);
    case PHASE_COMBINE_ARENA:
    case PHASE_COMBINE_MEMORY:
        return do_combine(b);
    default:
        copy_rows(b);
        return EP_OK;
    }
}

/* ---- phases ------------------------------------------------------------------------------ */

static int64_t view_stride(const struct bench *b, size_t element) {
    return b->view.stride[0] * (int64_t)element;
}

/* Before a combine: a dispatch of the form it answers, and the answers in their place. */
static ep_status prepare_combine(struct bench *b) {
    bool arena = b->phase == PHASE_COMBINE_ARENA;
    struct bench_data *d = &b->d;
    ep_status st = do_dispatch(b, arena);
    if (st == EP_OK && arena) {
        st = ep_handle_arena(b->handle, b->p->expanded ? EP_DISPATCH_EXPANDED : 0,
                             b->answer_type, b->p->hidden, &b->view);
        b->view.shape[0] = d->num_rows;
    } else {
        ep_tensor_2d(&b->view, b->answer_type, d->recv, d->num_rows, b->p->hidden);
    }
    for (int64_t i = 0; st == EP_OK && i < d->num_rows; i++) {
        memcpy((char *)b->view.data + i * view_stride(b, d->answer_element), data_answer(d, i),
               (size_t)d->answer_bytes);
    }
    return st;
}

static int check(struct bench *b, bool combine) {
    b->d.rows = b->view.data;
    b->d.rows_stride = view_stride(b, b->d.element);
    return combine ? check_combine(&b->d) : check_dispatch(&b->d);
}

static int measure(struct bench *b, enum bench_phase phase) {
    bool uncached = phase == PHASE_DISPATCH_ARENA || phase == PHASE_DISPATCH_MEMORY;
    bool combine = phase == PHASE_COMBINE_ARENA || phase == PHASE_COMBINE_MEMORY;
    struct bench_time *times = b->c->times + phase * b->p->iters * b->p->ranks + b->rank->rank;
    b->phase = phase;
    data_use(&b->d, bench_line(b->c, phase).name, (uint64_t)phase, b->p->dtype, b->p->expanded);
    ep_status st = combine ? prepare_combine(b) : EP_OK;
    for (int64_t i = -b->p->warmup; i < b->p->iters && st == EP_OK; i++) {
        st = uncached ? do_route(b) : EP_OK;
        rank_barrier(b->rank);
        int64_t start_ns = epi_now_ns();
        st = st == EP_OK ? run_once(b) : st;
        if (i >= 0) {
            times[i * b->p->ranks] = (struct bench_time){start_ns, epi_now_ns()};
        }
    }
    if (st != EP_OK) {
        return rank_fail(b->rank, st, "%s", bench_line(b->c, phase).name);
    }
    if (b->p->no_check || phase == PHASE_ROUTE || phase == PHASE_MEMCPY ||
        phase == PHASE_MEMCPY_AGAIN) {
        return 0;
    }
    return check(b, combine);
}

void bench_config(const struct bench_case *c, struct ep_group_config *config) {
    const struct bench_params *p = &c->p;
    config->num_ranks = (int32_t)p->ranks;
    config->num_experts = (int32_t)p->experts;
    config->max_tokens = (int32_t)p->tokens;
    config->max_topk = (int32_t)p->topk;
    config->max_row_bytes = (int32_t)c->answer_bytes;
    config->max_scale_bytes = (int32_t)c->scale_bytes;
    config->num_workers = (int32_t)p->workers;
    config->device = p->device == DEVICE_CUDA ? EP_DEVICE_CUDA : EP_DEVICE_HOST;
    bool view = p->device == DEVICE_HOST && p->expanded && !p->memory_only;
    config->flags = view ? EP_GROUP_EXPANDED_VIEW : 0;
    for (int r = 0; r < p->ranks && config->flags != 0; r++) {
        int64_t rows = bench_output_rows(c, r, true);
        config->max_expanded_rows =
            rows > config->max_expanded_rows ? rows : config->max_expanded_rows;
    }
}

bool bench_measures(const struct bench_params *p, enum bench_phase phase) {
    bool memory = phase == PHASE_DISPATCH_MEMORY || phase == PHASE_DISPATCH_MEMORY_CACHED ||
                  phase == PHASE_COMBINE_MEMORY;
    bool cached = phase == PHASE_DISPATCH_ARENA_CACHED || phase == PHASE_DISPATCH_MEMORY_CACHED;
    return phase == PHASE_ROUTE || phase == PHASE_MEMCPY || phase == PHASE_MEMCPY_AGAIN ||
           (!(memory ? p->arena_only : p->memory_only) && !(cached && p->uncached));
}

int bench_rank(struct rank *rank, void *arg) {
    struct bench_case *c = arg;
    struct bench b = {.rank = rank, .c = c, .p = &c->p};
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    bench_config(c, &config);
    rank_config(rank, &config);
    b.answer_type = c->p.dtype == DTYPE_F32 ? EP_F32 : EP_BF16;
    int64_t num_rows = bench_output_rows(c, rank->rank, c->p.expanded);
    int failed = data_create(&b.d, rank, c, num_rows, 1u << c->p.dtype)
                     ? 0
                     : rank_fail(rank, EP_OK, "no memory; lower --tokens");
    ep_status st = failed == 0 ? ep_group_create(&b.group, &config) : EP_OK;
    st = failed == 0 && st == EP_OK ? ep_handle_create(&b.handle, b.group, NULL) : st;
    if (st != EP_OK) {
        failed = rank_fail(rank, st, "creating the group");
    } else if (failed == 0 && rank->rank == 0) {
        ep_group_plan(b.group, &plan);
        c->arena_bytes = plan.arena_bytes;
    }
    for (int phase = 0; phase < NUM_PHASES && failed == 0; phase++) {
        if (bench_measures(&c->p, (enum bench_phase)phase)) {
            failed = measure(&b, (enum bench_phase)phase);
        }
    }
    ep_handle_destroy(&b.handle);
    ep_group_destroy(&b.group);
    data_destroy(&b.d);
    return failed;
}
