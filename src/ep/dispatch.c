/* SPDX-License-Identifier: MIT */
/*
 * Dispatch on the host side: from checked arguments to the kernel's, in turn, and from what the
 * kernel left behind to a status. The task runs on a stream's thread or the caller's.
 */
#include "src/ep/group.h"

#include <string.h>

/* After a fault or a refusal: counts and offsets 0, ids and sources -1, so that kernels behind
 * this one stay in bounds. */
static void clear_outputs(const struct k_dispatch_args *a) {
    const struct {
        const struct k_array *to;
        int64_t n;
    } zeros[] = {{&a->expert_counts, a->g.num_local},
                 {&a->expert_offsets, a->g.num_local + 1},
                 {&a->num_rows, 1}};
    for (int i = 0; i < 3; i++) {
        char *at = (char *)(uintptr_t)zeros[i].to->data;
        for (int64_t j = 0; at && j < zeros[i].n; j++) {
            memset(at + j * zeros[i].to->s0, 0, 4);
        }
    }
    const bool rows = a->recv_ids.data || a->recv_source.data;
    for (int64_t r = 0; rows && r < a->capacity; r++) {
        char *ids = (char *)(uintptr_t)a->recv_ids.data;
        char *source = (char *)(uintptr_t)a->recv_source.data;
        for (int64_t j = 0; ids && j < a->topk; j++) {
            memset(ids + r * a->recv_ids.s0 + j * a->recv_ids.s1, 0xff, (size_t)a->id_bytes);
        }
        if (source) {
            memset(source + r * a->recv_source.s0, 0xff, 8);
        }
    }
}

/* Ends an operation whose rows did not fit anywhere and that had only begun. */
static void end_unfit(struct epi_dispatch_task *t) {
    struct k_dispatch_args a = t->args;
    a.flags = K_DO_RECV;
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

static void count_time(ep_group *g, int64_t ns, enum epi_dispatch_part part) {
    pthread_mutex_lock(&g->mutex);
    g->stats.num_dispatches += part != EPI_DISPATCH_BEGIN;
    g->stats.dispatch_ns += (uint64_t)ns;
    pthread_mutex_unlock(&g->mutex);
}

/* Runs the kernel and says how it went. */
static ep_status run_kernel(struct epi_dispatch_task *t) {
    ep_handle *h = t->h;
    ep_group *g = h->group;
    const int64_t start = epi_now_ns();
    epi_run_kernel(g->run, EPI_KERNEL_DISPATCH, &t->args, t->workers);
    t->ran = true;
    count_time(g, epi_now_ns() - start, t->part);
    ep_status st = epi_group_check(g, t->number);
    if (st != EP_OK) {
        return st;
    }
    if (t->args.flags & K_DO_COUNTS) {
        atomic_store(&h->unfit, h->k.counts->need != 0);
    }
    if (atomic_load(&h->unfit)) {
        if (t->part == EPI_DISPATCH_BEGIN) {
            end_unfit(t);
        }
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
    if (st != EP_OK) {
        clear_outputs(&t->args);
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
    t->workers =
        a->num_workers > 0 && a->num_workers < g->workers ? a->num_workers : g->workers;
    k->g = g->k;
    k->h = h->k;
    k->send_blocks = (k_u32)epi_run_grid(t->workers).send_blocks;
    k->handle_id = h->id;
    k->tokens = h->tokens;
    k->topk = h->topk;
    k->stages = EPI_HOST_STAGES;
    fill_inputs(k, a);
    t->cached = h->dispatched;
    k->flags |= t->cached ? 0 : K_DO_COUNTS;
    k->stage_bytes = epi_plan_stage_bytes(k->row_bytes);
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

ep_status epi_dispatch(ep_handle *h, const struct ep_dispatch_args *a, ep_stream *stream,
                       enum epi_dispatch_part part) {
    ep_group *g = h->group;
    struct epi_dispatch_task t;
    pthread_mutex_lock(&g->mutex);
    issue(&t, h, a, part);
    pthread_mutex_unlock(&g->mutex);
    if (part != EPI_DISPATCH_BEGIN) {
        t.args.flags |= K_DO_RECV;
        t.arena = (a->flags & EP_DISPATCH_ARENA) != 0;
        h->expanded = (a->flags & EP_DISPATCH_EXPANDED) != 0;
        fill_outputs(&t.args, a);
        if (t.arena) {
            fill_view(h, &t.args, a);
        }
    }
    atomic_fetch_add(&h->pending, 1);
    ep_status st = epi_stream_submit(stream, run_dispatch, &t, sizeof(t));
    if (st != EP_OK && stream == NULL) {
        take_back(h);
    }
    if (st == EP_OK && t.arena && stream == NULL && a->recv_x) {
        a->recv_x->shape[0] =
            h->expanded ? (int64_t)h->k.expert_start[g->num_local] : h->k.counts->rows;
    }
    return st;
}

void epi_dispatch_drop(ep_handle *h) {
    ep_group *g = h->group;
    struct epi_dispatch_task t;
    pthread_mutex_lock(&g->mutex);
    const bool begun = g->begun == h;
    if (begun) {
        issue(&t, h, NULL, EPI_DISPATCH_FINISH);
    }
    pthread_mutex_unlock(&g->mutex);
    if (begun) {
        t.args.flags |= K_DO_RECV;
        t.args.alignment = 1;
        t.args.capacity = INT32_MAX; /* no output has rows */
        atomic_fetch_add(&h->pending, 1);
        (void)epi_stream_submit(NULL, run_dispatch, &t, sizeof(t));
    }
}
