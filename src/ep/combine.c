/* SPDX-License-Identifier: MIT */
/*
 * Combine on the host side: from checked arguments to the kernel's, in turn. The task runs on a
 * stream's thread or the caller's.
 */
#include "src/ep/group.h"

#include <string.h>

struct combine_task {
    ep_handle *h;
    struct k_combine_args args;
    uint64_t number;
    struct epi_shape shape;
};

/* Rows of x that the kernel will read, known only now that the dispatch has run. */
static ep_status check_rows(const struct combine_task *t) {
    const struct k_handle *k = &t->h->k;
    const int64_t rows = (t->args.flags & K_DO_EXPAND)
                             ? (int64_t)k->expert_start[t->args.g.num_local]
                             : k->counts->rows;
    if (t->args.x_rows < rows) {
        return epi_fail(EP_ERR_ARG,
                        "x.shape[0] is %lld, must be at least the %lld rows received",
                        (long long)t->args.x_rows, (long long)rows);
    }
    return EP_OK;
}

static ep_status run_combine(void *arg) {
    struct combine_task *t = arg;
    ep_group *g = t->h->group;
    bool ran = false;
    epi_group_await_turn(g, t->number);
    ep_status st = epi_group_check(g, t->number);
    if (st == EP_OK && atomic_load(&t->h->unfit)) {
        st = epi_fail(EP_ERR_STATE, "combine after a dispatch that did not fit");
    } else if (st == EP_OK && (st = check_rows(t)) != EP_OK) {
        /* The peers are in this operation: do not let them wait. */
        epi_group_raise(g, st, g->rank, t->number);
    } else if (st == EP_OK) {
        epi_run_kernel(g->run, EPI_KERNEL_COMBINE, &t->args, t->shape.workers);
        ran = true;
        st = epi_group_check(g, t->number);
    }
    epi_group_end(g, t->number, ran);
    atomic_fetch_sub(&t->h->pending, 1);
    return st;
}

static void prepare_task(struct combine_task *t, ep_handle *h,
                         const struct ep_combine_args *a) {
    ep_group *g = h->group;
    struct k_combine_args *k = &t->args;
    memset(t, 0, sizeof(*t));
    t->h = h;
    k->g = g->k;
    k->h = h->k;
    k->x_rows = a->x->shape[0];
    k->handle_id = h->id;
    k->tokens = h->tokens;
    epi_plan_channels(&g->plan, h->tokens, &k->channels);
    k->topk = h->topk;
    k->dtype = a->x->dtype;
    k->row_bytes = (k_i32)(a->x->shape[1] * (int64_t)ep_dtype_bytes((ep_dtype)a->x->dtype));
    const struct epi_load load = {k->row_bytes, h->topk, h->expanded, true};
    t->shape = epi_group_shape(g, a->num_workers, &load);
    k->send_blocks = (k_u32)t->shape.send_blocks;
    k->stages = t->shape.stages;
    k->stage_bytes = t->shape.stage_bytes;
    k->x = epi_array(a->x);
    k->weights = epi_array(a->weights);
    k->topk_weights = epi_array(a->topk_weights);
    k->bias0 = epi_array(a->bias[0]);
    k->bias1 = epi_array(a->bias[1]);
    k->out = epi_array(a->out);
    k->out_weights = epi_array(a->out_topk_weights);
    k->flags = (h->expanded ? K_DO_EXPAND : 0) | (a->topk_weights ? K_DO_WEIGHTS : 0) |
               (h->expanded || a->weights ? K_DO_REDUCE : 0);
}

/* On a device the stream has it when this returns; what it finds is told later. */
static ep_status enqueue(struct combine_task *t, void *stream) {
    ep_group *g = t->h->group;
    ep_status st = epi_group_refuse_next(g);
    if (st != EP_OK) {
        return st;
    }
    pthread_mutex_lock(&g->mutex);
    t->number = ++g->issued;
    st = epi_cuda_run(g, EPI_KERNEL_COMBINE, &t->args, t->shape.workers, stream, NULL);
    pthread_mutex_unlock(&g->mutex);
    if (st != EP_OK) { /* peers count on this operation */
        epi_group_raise(g, st, g->rank, t->number);
    }
    return st;
}

ep_status epi_combine(ep_handle *h, const struct ep_combine_args *a, void *stream) {
    ep_group *g = h->group;
    struct combine_task t;
    prepare_task(&t, h, a);
    if (g->cuda) {
        return enqueue(&t, stream);
    }
    if (!stream && atomic_load(&h->pending) == 0 && !atomic_load(&h->unfit)) {
        ep_status st = check_rows(&t); /* known already: refuse before the peers are involved */
        if (st != EP_OK) {
            return st;
        }
    }
    pthread_mutex_lock(&g->mutex);
    t.number = ++g->issued;
    pthread_mutex_unlock(&g->mutex);
    atomic_fetch_add(&h->pending, 1);
    return epi_stream_submit(stream, run_combine, &t, sizeof(t));
}
