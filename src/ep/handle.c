/* SPDX-License-Identifier: MIT */
/*
 * Handles: the routing of one micro-batch, in one block of memory made at create. Routing and
 * layout are local work on a stream; counts are what the last uncached dispatch learned.
 */
#include "src/ep/group.h"

#include <string.h>

static ep_status make_block(ep_handle *h) {
    ep_group *g = h->group;
    const size_t bytes = (size_t)g->plan.info.handle_bytes;
    if (g->cuda) {
        return epi_cuda_handle(h);
    }
    h->block = epi_alloc(bytes);
    if (!h->block) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a handle (%zu bytes)", bytes);
    }
    epi_plan_handle(&g->config, &g->plan, (uintptr_t)h->block, &h->k);
    h->notice = h->k.notice;
    return EP_OK;
}

ep_status epi_handle_create(ep_handle **out, ep_group *g,
                            const struct ep_handle_config *config) {
    ep_handle *h = epi_alloc(sizeof(*h));
    if (!h) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a handle");
    }
    h->group = g;
    h->config = *config;
    ep_status st = make_block(h);
    if (st != EP_OK) {
        epi_free(h);
        return st;
    }
    pthread_mutex_lock(&g->mutex);
    h->id = g->next_handle++ & 0xffff;
    h->k.tag = (k_u32)g->next_handle;
    g->num_handles++;
    pthread_mutex_unlock(&g->mutex);
    *out = h;
    return EP_OK;
}

void epi_handle_destroy(ep_handle **handle) {
    ep_handle *h = *handle;
    *handle = NULL;
    while (atomic_load(&h->pending) > 0) {
        epi_sleep_ns(50 * EPI_NS_PER_US); /* queued work has deadlines */
    }
    epi_dispatch_drop(h);
    pthread_mutex_lock(&h->group->mutex);
    h->group->num_handles--;
    pthread_mutex_unlock(&h->group->mutex);
    if (h->group->cuda) {
        epi_cuda_drop_handle(h);
    } else {
        epi_free(h->block);
    }
    epi_free(h);
}

/* ---- route ---------------------------------------------------------------------------------- */

struct route_task {
    ep_handle *h;
    struct k_route_args args;
};

/* In the place of the first bad selection until the kernel has come to its end: a fault of the
 * group also ends the waits of its blocks for each other. */
#define UNFINISHED (~UINT64_C(0) - 1)

static ep_status refuse_route(ep_group *g) {
    ep_status st = epi_group_refuse_next(g);
    return st != EP_OK ? st : epi_fail(EP_ERR_INTERNAL, "the routing was not computed");
}

static ep_status bad_selection(const ep_handle *h, int k_per_token, uint64_t number, int64_t id,
                               const char *then) {
    const uint64_t topk = k_per_token > 0 ? (uint64_t)k_per_token : 1;
    const long long token = (long long)(number / topk), k = (long long)(number % topk);
    return epi_fail(EP_ERR_ARG,
                    "topk_ids[%lld][%lld] is %lld, must be -1 or 0..%d (token %lld, k %lld)%s",
                    token, k, (long long)id, h->group->config.num_experts - 1, token, k, then);
}

static ep_status run_route(void *arg) {
    struct route_task *t = arg;
    ep_handle *h = t->h;
    h->k.bad[0] = UNFINISHED;
    epi_run_kernel(h->group->run, EPI_KERNEL_ROUTE, &t->args, h->group->workers);
    ep_status st = EP_OK;
    const uint64_t bad = h->k.bad[0];
    if (bad == UNFINISHED) {
        st = refuse_route(h->group);
    } else if (t->args.id_bytes && bad != ~UINT64_C(0)) {
        st = bad_selection(h, t->args.topk, bad, h->notice->bad_id, "");
    }
    atomic_fetch_sub(&h->pending, 1);
    return st;
}

/* Local work of a CUDA group: the stream has it when this returns. */
static ep_status run_on_device(ep_handle *h, enum epi_kernel kernel, const void *args,
                               void *stream, bool *capturing) {
    ep_group *g = h->group;
    const struct epi_load local = {0, h->topk, false, false};
    pthread_mutex_lock(&g->mutex);
    ep_status st =
        epi_cuda_run(g, kernel, args, epi_group_shape(g, 0, &local).workers, stream, capturing);
    pthread_mutex_unlock(&g->mutex);
    return st;
}

ep_status epi_handle_route(ep_handle *h, const struct ep_routing *r, void *stream) {
    const struct ep_tensor *in = r->topk_ids ? r->topk_ids : r->token_in_rank;
    struct route_task t;
    memset(&t, 0, sizeof(t));
    t.h = h;
    t.args.g = h->group->k;
    t.args.h = h->k;
    t.args.tokens = (k_i32)in->shape[0];
    if (r->topk_ids) {
        t.args.topk = (k_i32)in->shape[1];
        t.args.id_bytes = in->dtype == EP_I64 ? 8 : 4;
        t.args.ids = epi_array(in);
    } else {
        t.args.mask = epi_array(in);
    }
    epi_plan_channels(&h->group->plan, t.args.tokens, &t.args.channels);
    t.args.lenient = (h->config.flags & EP_HANDLE_LENIENT_IDS) != 0;
    h->tokens = t.args.tokens;
    h->topk = t.args.topk;
    h->by_mask = !r->topk_ids;
    h->dispatched = false;
    h->routed = true;
    t.args.ticket = ++h->routed_by;
    if (h->group->cuda) {
        return run_on_device(h, EPI_KERNEL_ROUTE, &t.args, stream, &h->captured);
    }
    atomic_fetch_add(&h->pending, 1);
    ep_status st = epi_stream_submit(stream, run_route, &t, sizeof(t));
    if (st != EP_OK) {
        h->routed = false;
    }
    return st;
}

/* ---- layout --------------------------------------------------------------------------------- */

struct layout_task {
    ep_handle *h;
    struct k_layout_args args;
};

static ep_status run_layout(void *arg) {
    struct layout_task *t = arg;
    ep_group *g = t->h->group;
    epi_run_kernel(g->run, EPI_KERNEL_LAYOUT, &t->args, g->workers);
    atomic_fetch_sub(&t->h->pending, 1);
    return EP_OK;
}

static k_u64 address_of(const struct ep_tensor *t) {
    return t ? (k_u64)(uintptr_t)t->data : 0;
}

ep_status epi_handle_layout(ep_handle *h, const struct ep_layout *l, void *stream) {
    struct layout_task t;
    memset(&t, 0, sizeof(t));
    t.h = h;
    t.args.g = h->group->k;
    t.args.h = h->k;
    t.args.tokens = h->tokens;
    t.args.topk = h->topk;
    t.args.num_nodes = 1;
    t.args.tokens_per_rank = address_of(l->tokens_per_rank);
    t.args.tokens_per_node = address_of(l->tokens_per_node);
    t.args.tokens_per_expert = address_of(l->tokens_per_expert);
    t.args.token_in_rank = address_of(l->token_in_rank);
    t.args.channel_prefix = address_of(l->channel_prefix);
    if (h->group->cuda) {
        return run_on_device(h, EPI_KERNEL_LAYOUT, &t.args, stream, NULL);
    }
    atomic_fetch_add(&h->pending, 1);
    return epi_stream_submit(stream, run_layout, &t, sizeof(t));
}

/* ---- what arrived --------------------------------------------------------------------------- */

static bool is_known(const k_u64 *word, uint64_t ticket) {
    return (uint32_t)(atomic_load_explicit((const _Atomic k_u64 *)word, memory_order_acquire) >>
                      32) == (uint32_t)ticket;
}

/* Waits for the exchange of operation `number` on this handle. */
static ep_status await_counts(ep_handle *h) {
    ep_group *g = h->group;
    for (int turn = 0;; turn++) {
        if (is_known(&h->notice->known, h->counted_by)) {
            return EP_OK;
        }
        if (epi_group_ends(g, h->counted_by) && atomic_load(&h->pending) == 0) {
            return epi_group_check(g, h->counted_by);
        }
        epi_sleep_ns(turn < 100 ? 2 * EPI_NS_PER_US : 50 * EPI_NS_PER_US);
    }
}

/* What kernels of a CUDA group have found, told once. */
static ep_status take_findings(ep_handle *h) {
    struct k_counts *n = h->notice;
    /* Kernels of a handle that is gone may still write to the notice it had. */
    const uint64_t bad = n->bad_of == h->k.tag ? n->bad : ~UINT64_C(0);
    const uint64_t over = n->over >> 32 == h->k.tag ? n->over & UINT32_MAX : 0;
    if (!h->captured && n->routed != K_WORD(h->k.tag, h->routed_by)) {
        return EP_AGAIN;
    }
    n->bad = ~UINT64_C(0);
    n->over = 0;
    if (bad != ~UINT64_C(0)) {
        return bad_selection(h, h->topk, bad, n->bad_id, ": it was treated as -1");
    }
    if (over) {
        return epi_fail(EP_ERR_CAPACITY,
                        "%lld rows are needed and the outputs hold fewer: rows past them were "
                        "not written",
                        (long long)over);
    }
    return EP_OK;
}

ep_status epi_handle_status(ep_handle *h) {
    ep_group *g = h->group;
    if (epi_group_faulted(g)) {
        return epi_group_refuse_next(g);
    }
    if (!g->cuda) {
        return atomic_load(&h->pending) > 0 ? EP_AGAIN
               : atomic_load(&h->unfit)     ? epi_unfit(h->notice, g->plan.info.max_recv_rows)
                                            : EP_OK;
    }
    if (h->dispatched && !h->captured && !is_known(&h->notice->known, h->counted_by)) {
        return EP_AGAIN;
    }
    if (h->dispatched && h->notice->need) {
        return epi_unfit(h->notice, g->plan.info.max_recv_rows);
    }
    return h->routed ? take_findings(h) : EP_OK;
}

ep_status epi_unfit(const struct k_counts *c, int64_t max_recv_rows) {
    return epi_fail(
        EP_ERR_CAPACITY,
        "rank %d would receive %lld rows and max_recv_rows is %lld: create the group "
        "with max_recv_rows of at least %lld",
        K_NEED_RANK(c->need), (long long)K_NEED_ROWS(c->need), (long long)max_recv_rows,
        (long long)K_NEED_ROWS(c->need));
}

/* The counts that kernels left in memory that may be a device's. */
static ep_status read_counts(ep_handle *h, int32_t *per_source, int32_t *per_expert) {
    const int ranks = h->group->num_ranks, local = h->group->num_local;
    const size_t words = (size_t)ranks + (size_t)ranks * (size_t)local;
    k_u32 *copy = NULL;
    const k_u32 *source = h->k.recv_count, *expert = h->k.recv_expert;
    ep_status st = EP_OK;
    if (h->group->cuda && (per_source || per_expert)) {
        copy = epi_alloc_array(words, sizeof(*copy));
        if (!copy) {
            return epi_fail(EP_ERR_NOMEM, "no memory for counts");
        }
        source = copy;
        expert = copy + ranks;
        st = epi_cuda_read(h->group, copy, h->k.recv_count, (size_t)ranks * 4);
        if (st == EP_OK && per_expert) {
            st = epi_cuda_read(h->group, copy + ranks, h->k.recv_expert,
                               (size_t)ranks * (size_t)local * 4);
        }
    }
    for (int s = 0; st == EP_OK && per_source && s < ranks; s++) {
        per_source[s] = (int32_t)source[s];
    }
    for (int e = 0; st == EP_OK && per_expert && e < local; e++) {
        per_expert[e] = 0;
        for (int s = 0; s < ranks; s++) {
            per_expert[e] += (int32_t)expert[s * local + e];
        }
    }
    epi_free(copy);
    return st;
}

ep_status epi_handle_counts(ep_handle *h, int64_t *rows, int32_t *per_source,
                            int32_t *per_expert) {
    ep_group *g = h->group;
    if (h->captured) {
        return epi_fail(EP_ERR_STATE,
                        "ep_handle_counts: the handle's last dispatch was captured "
                        "in a graph: read num_rows and expert_counts");
    }
    ep_status st = await_counts(h);
    if (st != EP_OK) {
        return st;
    }
    if (h->notice->need) {
        pthread_mutex_lock(&g->mutex);
        h->dispatched = false; /* and a dispatch that has begun needs no finish */
        g->begun = g->begun == h ? NULL : g->begun;
        pthread_mutex_unlock(&g->mutex);
        return epi_unfit(h->notice, g->plan.info.max_recv_rows);
    }
    const int64_t known = h->notice->rows;
    st = g->cuda ? take_findings(h) : EP_OK;
    if (st == EP_OK) {
        st = read_counts(h, per_source, per_expert);
    }
    if (st == EP_OK && rows) {
        *rows = known;
    }
    return st;
}

ep_status epi_handle_arena(ep_handle *h, uint32_t flags, ep_dtype dtype, int64_t cols,
                           struct ep_tensor *view) {
    ep_group *g = h->group;
    const bool expanded = (flags & EP_DISPATCH_EXPANDED) != 0;
    const struct k_map *m = &g->plan.map;
    const int64_t bytes = (int64_t)ep_dtype_bytes(dtype) * cols;
    const int64_t slot = (int64_t)(expanded ? m->expanded_slot_bytes : m->recv_slot_bytes);
    const int64_t rows = expanded ? g->plan.info.max_expanded_rows : g->plan.info.max_recv_rows;
    char *arena = (char *)(uintptr_t)epi_mem_arena_address(g->mem, g->rank);
    ep_tensor_2d(view, dtype,
                 arena + (expanded ? m->expanded : m->recv) + (int64_t)h->slot * slot,
                 bytes > 0 && slot / bytes < rows ? slot / bytes : rows, cols);
    return EP_OK;
}
