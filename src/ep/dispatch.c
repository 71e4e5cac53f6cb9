/* SPDX-License-Identifier: MIT */
/*
 * Dispatch on the host side: from checked arguments to the kernel's, in turn, and from what the
 * kernel left behind to a status. The task runs on a stream's thread or the caller's.
 */
#include "src/ep/group.h"

#include <string.h>

/* A dispatch that is refused before its kernel runs leaves its outputs as a failed one does. */
static void clear_outputs(struct epi_dispatch_task *t) {
    struct k_dispatch_args a = t->args;
    a.flags |= K_DO_NOTHING;
    epi_run_kernel(t->h->group->run, EPI_KERNEL_DISPATCH, &a, 1);
}

static ep_status check_output(struct epi_dispatch_task *t) {
    const struct k_handle *k = &t->h->k;
    const bool expand = (t->args.flags & K_DO_EXPAND) != 0;
    const int64_t rows =
        expand ? (int64_t)k->expert_start[t->args.g.num_local] : k->counts->rows;
    if (t->arena && rows > t->args.x_rows) {
        return epi_fail(EP_ERR_CAPACITY,
                        "the expanded view needs %lld rows and max_expanded_rows is %lld",
                        (long long)rows, (long long)t->args.x_rows);
    }
    if (rows <= t->args.capacity) {
        return EP_OK;
    }
    return epi_fail(EP_ERR_CAPACITY,
                    "%lld rows are needed and the outputs hold %lld: rows past "
                    "them were not written",
                    (long long)rows, (long long)t->args.capacity);
}

/* Runs the kernel and says how it went. */
static ep_status run_kernel(struct epi_dispatch_task *t) {
    ep_handle *h = t->h;
    ep_group *g = h->group;
    epi_run_kernel(g->run, EPI_KERNEL_DISPATCH, &t->args, t->shape.workers);
    t->ran = true;
    ep_status st = epi_group_check(g, t->number);
    if (st != EP_OK) {
        return st;
    }
    if (t->args.flags & K_DO_COUNTS) {
        atomic_store(&h->unfit, h->k.counts->need != 0);
    }
    if (atomic_load(&h->unfit)) {
        return epi_unfit(h->k.counts, g->plan.info.max_recv_rows);
    }
    return EP_OK;
}

static ep_status run_dispatch(void *arg) {
    struct epi_dispatch_task *t = arg;
    ep_handle *h = t->h;
    ep_group *g = h->group;
    bool over = true;
    epi_group_await_turn(g, t->number);
    ep_status st = epi_group_check(g, t->number);
    if (st == EP_OK && t->part == EPI_DISPATCH_FINISH && atomic_load(&h->unfit)) {
        st = epi_unfit(h->k.counts, g->plan.info.max_recv_rows);
        over = false; /* begin has ended the operation */
    } else if (st == EP_OK && t->cached && atomic_load(&h->unfit)) {
        st = epi_fail(EP_ERR_STATE,
                      "cached dispatch of a handle whose first dispatch did not fit");
    } else if (st == EP_OK) {
        st = run_kernel(t);
        over = t->part != EPI_DISPATCH_BEGIN || st != EP_OK;
    }
    if (st == EP_OK && t->part != EPI_DISPATCH_BEGIN) {
        st = check_output(t);
    }
    if (st != EP_OK && !t->ran) {
        clear_outputs(t);
    }
    if (over) {
        epi_group_end(g, t->number, t->ran);
    }
    atomic_fetch_sub(&h->pending, 1);
    return st;
}

/* ---- from arguments to the kernel's --------------------------------------------------------- */

static void fill_inputs(struct k_dispatch_args *k, const struct ep_dispatch_args *a) {
    const int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)a->x->dtype);
    k->row_bytes = (k_i32)(a->x->shape[1] * bytes);
    k->x = epi_array(a->x);
    if (a->scales) {
        k->num_scales = (k_i32)a->scales->shape[1];
        k->scale_bytes = (k_i32)ep_dtype_bytes((ep_dtype)a->scales->dtype);
        k->scales = epi_array(a->scales);
    } else {
        k->scale_bytes = 1;
    }
    if (a->topk_weights) {
        k->flags |= K_DO_WEIGHTS;
        k->weights = epi_array(a->topk_weights);
    }
}

static int64_t first_dim(const struct ep_tensor *t, int64_t so_far) {
    return t ? t->shape[0] : so_far;
}

static void fill_outputs(struct k_dispatch_args *k, const struct ep_dispatch_args *a) {
    const struct {
        struct k_array *to;
        const struct ep_tensor *from;
    } outs[] = {{&k->recv_scales, a->recv_scales},
                {&k->recv_ids, a->recv_topk_ids},
                {&k->recv_weights, a->recv_topk_weights},
                {&k->recv_source, a->recv_source},
                {&k->expert_counts, a->expert_counts},
                {&k->expert_offsets, a->expert_offsets},
                {&k->num_rows, a->num_rows}};
    for (size_t i = 0; i < sizeof(outs) / sizeof(outs[0]); i++) {
        *outs[i].to = epi_array(outs[i].from);
    }
    k->flags |= (a->flags & EP_DISPATCH_EXPANDED) ? K_DO_EXPAND : 0;
    k->flags |= (a->flags & EP_DISPATCH_ZERO_GAPS) ? K_DO_ZERO_GAPS : 0;
    k->alignment = a->alignment ? a->alignment : 1;
    k->id_bytes = a->recv_topk_ids && a->recv_topk_ids->dtype == EP_I64 ? 8 : 4;
    int64_t capacity = -1;
    capacity = first_dim(a->recv_topk_weights, capacity);
    capacity = first_dim(a->recv_topk_ids, capacity);
    capacity = first_dim(a->recv_source, capacity);
    capacity = first_dim(a->recv_scales, capacity);
    if ((a->flags & EP_DISPATCH_ARENA) == 0) {
        capacity = first_dim(a->recv_x, capacity);
        k->recv_x = epi_array(a->recv_x);
    }
    k->capacity = k->x_rows = capacity < 0 ? INT32_MAX : capacity; /* or no output has rows */
}

/* Output in the arena: compact rows are there already, expanded ones are copied to their view. */
static void fill_view(ep_handle *h, struct k_dispatch_args *k,
                      const struct ep_dispatch_args *a) {
    struct ep_tensor view;
    const uint32_t form = a->flags & EP_DISPATCH_EXPANDED;
    epi_handle_arena(h, form, (ep_dtype)h->x_dtype, h->x_cols, &view);
    if (form) {
        k->recv_x = epi_array(&view);
    }
    k->x_rows = view.shape[0];
    if (a->recv_x) {
        *a->recv_x = view;
    }
}

static void prepare_task(struct epi_dispatch_task *t, ep_handle *h,
                         const struct ep_dispatch_args *a, enum epi_dispatch_part part) {
    ep_group *g = h->group;
    struct k_dispatch_args *k = &t->args;
    memset(t, 0, sizeof(*t));
    t->h = h;
    t->part = part;
    k->g = g->k;
    k->h = h->k;
    k->handle_id = h->id;
    k->tokens = h->tokens;
    epi_plan_channels(&g->plan, h->tokens, &k->channels);
    k->topk = h->topk;
    fill_inputs(k, a);
    const struct epi_load load = {k->row_bytes, h->topk, (a->flags & EP_DISPATCH_EXPANDED) != 0,
                                  false};
    t->shape = epi_group_shape(g, a->num_workers, &load);
    t->cached = h->dispatched;
    k->flags |= t->cached ? 0 : K_DO_COUNTS;
    k->send_blocks = (k_u32)t->shape.send_blocks;
    k->stages = t->shape.stages;
    k->stage_bytes = t->shape.stage_bytes;
}

/* Under the group's mutex: what the operation is, and its number. */
static void issue(struct epi_dispatch_task *t, ep_handle *h, const struct ep_dispatch_args *a,
                  enum epi_dispatch_part part) {
    ep_group *g = h->group;
    if (part == EPI_DISPATCH_FINISH) {
        *t = h->begun;
        t->part = part;
        t->cached = true;
        t->args.flags &= ~(K_DO_SEND | K_DO_COUNTS);
        g->begun = NULL;
        return;
    }
    h->x_dtype = a->x->dtype;
    h->x_cols = a->x->shape[1];
    h->scales_dtype = a->scales ? a->scales->dtype : EP_DTYPE_NONE;
    prepare_task(t, h, a, part);
    h->slot = g->next_slot;
    g->next_slot = (g->next_slot + 1) % g->plan.num_slots;
    t->args.slot = h->slot;
    t->args.flags |= K_DO_SEND;
    t->number = ++g->issued;
    t->args.ticket = (k_u32)t->number;
    if (!t->cached) {
        h->counted_by = t->number;
    }
    h->dispatched = true;
    if (part == EPI_DISPATCH_BEGIN) {
        g->begun = h;
        h->begun = *t;
    }
}

/* A call without a stream has failed: nothing was dispatched, unless only the output was small. */
static void take_back(ep_handle *h) {
    ep_group *g = h->group;
    pthread_mutex_lock(&g->mutex);
    if (atomic_load(&h->unfit) || epi_group_ends(g, g->issued)) {
        h->dispatched = false;
        g->begun = g->begun == h ? NULL : g->begun;
    }
    pthread_mutex_unlock(&g->mutex);
}

/* What the operation writes. */
static void add_outputs(struct epi_dispatch_task *t, const struct ep_dispatch_args *a) {
    ep_handle *h = t->h;
    t->args.flags |= K_DO_RECV;
    t->arena = (a->flags & EP_DISPATCH_ARENA) != 0;
    h->expanded = (a->flags & EP_DISPATCH_EXPANDED) != 0;
    fill_outputs(&t->args, a);
    if (t->arena) {
        fill_view(h, &t->args, a);
    }
}

/* ---- on a device ---------------------------------------------------------------------------- */

/* Under the group's mutex. A begun dispatch sends on the group's own stream, so that finish can
 * receive on the caller's at the same time. */
static ep_status launch(struct epi_dispatch_task *t, void *stream) {
    ep_group *g = t->h->group;
    struct epi_gpu *gpu = epi_cuda_gpu(g);
    const struct epi_shape *shape = &t->shape;
    ep_status st;
    if (t->part == EPI_DISPATCH_ALL) {
        return epi_cuda_run(g, EPI_KERNEL_DISPATCH, &t->args, shape->workers, stream, NULL);
    }
    if (t->part == EPI_DISPATCH_BEGIN) {
        st = epi_gpu_fork(gpu, stream);
        return st == EP_OK ? epi_cuda_run(g, EPI_KERNEL_DISPATCH, &t->args, shape->send_blocks,
                                          epi_gpu_stream(gpu), NULL)
                           : st;
    }
    const int rest = shape->workers - shape->send_blocks;
    st = epi_gpu_launch(gpu, EPI_KERNEL_DISPATCH, &t->args, rest < 1 ? 1 : rest, stream);
    if (st == EP_OK) {
        st = epi_gpu_join(gpu, stream);
    }
    return st == EP_OK ? epi_gpu_end(gpu, stream) : st;
}

static ep_status enqueue(ep_handle *h, const struct ep_dispatch_args *a, void *stream,
                         enum epi_dispatch_part part) {
    ep_group *g = h->group;
    struct epi_dispatch_task t;
    bool capturing = false;
    ep_status st = epi_group_refuse_next(g);
    if (st == EP_OK) {
        st = epi_gpu_is_capturing(epi_cuda_gpu(g), stream, &capturing);
    }
    if (st == EP_OK && capturing && part != EPI_DISPATCH_ALL) {
        st =
            epi_fail(EP_ERR_STATE,
                     "ep_dispatch_%s: the stream is being captured, and the size of the output "
                     "is learnt by the host: use ep_dispatch with worst-case outputs",
                     part == EPI_DISPATCH_BEGIN ? "begin" : "finish");
    }
    if (st == EP_OK && part == EPI_DISPATCH_FINISH) {
        st = epi_handle_counts(h, NULL, NULL, NULL); /* what did not fit has no finish */
    }
    if (st != EP_OK) {
        return st;
    }
    pthread_mutex_lock(&g->mutex);
    issue(&t, h, a, part);
    h->captured = capturing;
    if (part != EPI_DISPATCH_BEGIN) {
        add_outputs(&t, a);
    }
    st = launch(&t, stream);
    pthread_mutex_unlock(&g->mutex);
    if (st != EP_OK) { /* peers count on this operation */
        epi_group_raise(g, st, g->rank, t.number);
    }
    return st;
}

ep_status epi_dispatch(ep_handle *h, const struct ep_dispatch_args *a, void *stream,
                       enum epi_dispatch_part part) {
    ep_group *g = h->group;
    struct epi_dispatch_task t;
    if (g->cuda) {
        return enqueue(h, a, stream, part);
    }
    pthread_mutex_lock(&g->mutex);
    issue(&t, h, a, part);
    pthread_mutex_unlock(&g->mutex);
    if (part != EPI_DISPATCH_BEGIN) {
        add_outputs(&t, a);
    }
    atomic_fetch_add(&h->pending, 1);
    ep_status st = epi_stream_submit(stream, run_dispatch, &t, sizeof(t));
    if (st != EP_OK && !stream) {
        take_back(h);
    }
    if (st == EP_OK && t.arena && !stream && a->recv_x) {
        a->recv_x->shape[0] =
            h->expanded ? (int64_t)h->k.expert_start[g->num_local] : h->k.counts->rows;
    }
    return st;
}

/* On a device nobody waits to learn whether it fits: behind the kernel that sends, on its stream. */
void epi_dispatch_drop(ep_handle *h) {
    ep_group *g = h->group;
    struct epi_dispatch_task t;
    pthread_mutex_lock(&g->mutex);
    const bool begun = g->begun == h;
    if (begun) {
        issue(&t, h, NULL, EPI_DISPATCH_FINISH);
        t.args.flags |= K_DO_RECV;
        t.args.alignment = 1;
        t.args.capacity = INT32_MAX; /* no output has rows */
    }
    if (begun && g->cuda) {
        t.args.flags |= K_DO_DROP;
        launch(&t, epi_gpu_stream(epi_cuda_gpu(g)));
    }
    pthread_mutex_unlock(&g->mutex);
    if (begun && !g->cuda) {
        atomic_fetch_add(&h->pending, 1);
        epi_stream_submit(NULL, run_dispatch, &t, sizeof(t));
    }
}
