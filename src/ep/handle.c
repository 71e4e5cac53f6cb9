/* SPDX-License-Identifier: MIT */
/*
 * Handles: the routing of one micro-batch, in one block of memory made at create, and what the last
 * uncached dispatch learned. Called by the threads that call the API.
 */
#include "src/ep/group.h"

#include <string.h>

ep_status epi_handle_create(ep_handle **out, ep_group *g,
                            const struct ep_handle_config *config) {
    ep_handle *h = epi_alloc(sizeof(*h));
    if (!h) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a handle");
    }
    h->group = g;
    h->process = g->process;
    h->config = *config;
    h->follows = config->max_tokens == g->config.max_tokens;
    h->experts = g->experts;
    epi_experts_hold(h->experts);
    h->bytes = epi_handle_bytes(g, config);
    atomic_init(&h->refs, 1);
    ep_status st = g->backend->make_handle(h);
    if (st != EP_OK) {
        epi_experts_let_go(h->experts);
        epi_free(h);
        return st;
    }
    pthread_mutex_lock(&g->mutex);
    h->k.tag = ++g->last_tag;
    g->num_handles++;
    pthread_mutex_unlock(&g->mutex);
    *out = h;
    return EP_OK;
}

ep_status epi_handle_fit(ep_handle *h) {
    ep_group *g = h->group;
    const struct ep_handle_config was = h->config;
    const struct epi_handle_memory memory = h->memory;
    const size_t bytes = h->bytes;
    if (g->plan.num_uses == 0) {
        return EP_OK;
    }
    h->config.max_tokens = h->follows ? g->config.max_tokens : was.max_tokens;
    h->bytes = epi_handle_bytes(g, &h->config);
    if (h->bytes == bytes) {
        return EP_OK;
    }
    struct epi_handle_memory *before = epi_alloc(sizeof(*before));
    const ep_status st = before ? g->backend->make_handle(h)
                                : epi_fail(EP_ERR_NOMEM, "no memory for a larger handle");
    if (st != EP_OK) {
        epi_free(before);
        h->config = was;
        h->bytes = bytes;
        return st;
    }
    *before = memory;
    h->memory.before = before;
    return EP_OK;
}

void epi_handle_take_experts(ep_handle *h, struct epi_experts *e) {
    struct epi_experts *was = h->experts;
    if (was != e && h->group->backend->settle_handle) {
        h->group->backend->settle_handle(h); /* the old ones go behind what reads them */
    }
    h->experts = e;
    epi_experts_let_go(was);
}

/* In a forked process the group may have been freed, or its mutex be held. */
static void free_memory(ep_handle *h, bool forked) {
    struct epi_handle_memory m = h->memory;
    while (m.block) {
        struct epi_handle_memory *before = m.before;
        if (forked) {
            epi_free(m.own_block);
        } else {
            h->group->backend->drop_memory(h->group, &m);
        }
        m = before ? *before : (struct epi_handle_memory){0};
        epi_free(before);
    }
}

size_t epi_handle_bytes(const ep_group *g, const struct ep_handle_config *config) {
    struct k_handle k;
    return epi_plan_handle(&g->config, &g->plan, config, 0, &k);
}

void epi_handle_destroy(ep_handle **handle) {
    ep_handle *h = *handle;
    *handle = NULL;
    if (epi_is_forked(h->process)) {
        free_memory(h, true);
        epi_free(h);
        return;
    }
    epi_half_drop(h);
    pthread_mutex_lock(&h->group->mutex);
    h->group->num_handles--;
    pthread_mutex_unlock(&h->group->mutex);
    atomic_fetch_add(&h->group->num_held, 1);
    epi_handle_release(h);
}

void epi_handle_hold(ep_handle *h) {
    atomic_fetch_add(&h->refs, 1);
}

void epi_handle_release(ep_handle *h) {
    if (atomic_fetch_sub(&h->refs, 1) == 1) {
        ep_group *g = h->group;
        if (g->backend->drop_handle) {
            g->backend->drop_handle(h);
        }
        free_memory(h, false);
        epi_experts_let_go(h->experts);
        epi_free(h);
        atomic_fetch_sub(&g->num_held, 1); /* the group may go now */
    }
}

/* ---- what arrived --------------------------------------------------------------------------- */

/* A replay of a later dispatch knows at least as much; tickets are compared as they wrap. */
bool epi_is_known(const k_u64 *word, uint64_t ticket) {
    const k_u64 w = atomic_load_explicit((const _Atomic k_u64 *)word, memory_order_acquire);
    return w != 0 && (int32_t)((uint32_t)(w >> 32) - (uint32_t)ticket) >= 0;
}

/* Waits for the exchange of operation `number` on this handle: as long as that may wait for peers,
 * and its stream may take to come to it. */
static ep_status await_counts(ep_handle *h) {
    ep_group *g = h->group;
    const int64_t most = 2 * g->timeout_ns;
    const struct epi_deadline d = epi_deadline_after(most);
    for (int turn = 0;; turn++) {
        if (epi_is_known(&h->memory.notice->known, h->counted_by)) {
            return EP_OK;
        }
        if (epi_group_is_over(g, h->counted_by) && atomic_load(&h->pending) == 0) {
            return epi_group_check(g, h->counted_by);
        }
        if (epi_deadline_expired(d)) {
            return epi_fail(
                EP_ERR_TIMEOUT,
                "the counts of the handle's dispatch are not known after %lld ms: its "
                "stream has not come to it; ask again when it has",
                (long long)(most / EPI_NS_PER_MS));
        }
        epi_sleep_ns(turn < 100 ? 2 * EPI_NS_PER_US : 50 * EPI_NS_PER_US);
    }
}

ep_status epi_handle_status(ep_handle *h) {
    ep_group *g = h->group;
    if (epi_group_faulted(g)) {
        return epi_group_check_next(g);
    }
    if (!g->backend->on_device) {
        return atomic_load(&h->pending) > 0  ? EP_AGAIN
               : atomic_load(&h->lacks_rows) ? epi_fail_need(g, h->memory.notice)
                                             : EP_OK;
    }
    if (h->dispatched && !h->captured &&
        !epi_is_known(&h->memory.notice->known, h->counted_by)) {
        return EP_AGAIN;
    }
    if (h->dispatched && h->memory.notice->need) {
        return epi_fail_need(g, h->memory.notice);
    }
    return h->routed ? g->backend->take_findings(h) : EP_OK;
}

ep_status epi_fail_need(ep_group *g, const struct k_counts *c) {
    const bool of_rows = K_NEED_ROWS(c->need) != 0;
    char tokens[96] = "", rows[128] = "";
    pthread_mutex_lock(&g->mutex); /* ep_group_grow raises the maxima */
    const int max_tokens = g->config.max_tokens;
    const int64_t max_recv_rows = g->plan.info.max_recv_rows;
    const bool can_grow = g->plan.num_uses > 0;
    pthread_mutex_unlock(&g->mutex);
    if (c->tokens) {
        epi_format(tokens, sizeof(tokens), "rank %d has %lld tokens and max_tokens is %d%s",
                   K_NEED_RANK(c->tokens), (long long)K_NEED_ROWS(c->tokens), max_tokens,
                   of_rows ? ", and of other tokens " : "");
    }
    if (of_rows) {
        epi_format(
            rows, sizeof(rows), "rank %d would receive %lld rows and max_recv_rows is %lld",
            K_NEED_RANK(c->need), (long long)K_NEED_ROWS(c->need), (long long)max_recv_rows);
    }
    return epi_fail(EP_ERR_CAPACITY, "%s%s: %s at least so many", tokens, rows,
                    can_grow ? "let all ranks ask ep_group_grow for" : "create the group with");
}

void epi_handle_needs(const ep_handle *h, struct ep_needs *needs) {
    const struct k_counts *c = h->memory.notice;
    *needs = (struct ep_needs)EP_NEEDS_INIT;
    needs->output_rows = atomic_load(&h->output_rows);
    if (h->counted_by && epi_is_known(&c->known, h->counted_by)) {
        needs->max_tokens = (int32_t)K_NEED_ROWS(c->tokens);
        needs->max_recv_rows = K_NEED_ROWS(c->need);
    }
}

/* The counts that kernels left in their memory; the caller's are written when all are known. */
static ep_status read_counts(ep_handle *h, int32_t *per_source, int32_t *per_expert) {
    ep_group *g = h->group;
    const size_t ranks = (size_t)g->num_ranks,
                 local = per_expert ? (size_t)h->experts->num_local : 0;
    k_u32 *of_source = NULL;
    ep_status st = EP_OK;
    if (local) {
        of_source = epi_alloc_array(ranks * local, sizeof(*of_source));
        if (!of_source) {
            return epi_fail(EP_ERR_NOMEM, "no memory for counts");
        }
        st = g->backend->read(g, of_source, h->k.recv_expert, ranks * local * 4);
    }
    if (st == EP_OK && per_source) {
        st = g->backend->read(g, per_source, h->k.recv_count, ranks * 4);
    }
    for (size_t e = 0; st == EP_OK && e < local; e++) {
        int64_t sum = 0;
        for (size_t s = 0; s < ranks; s++) {
            sum += of_source[s * local + e];
        }
        per_expert[e] = (int32_t)(sum < INT32_MAX ? sum : INT32_MAX);
    }
    epi_free(of_source);
    return st;
}

ep_status epi_handle_await_fit(ep_handle *h, int64_t *rows) {
    ep_group *g = h->group;
    if (h->captured) {
        return epi_fail(EP_ERR_STATE,
                        "ep_handle_counts: the handle's last dispatch was captured "
                        "in a graph: read num_rows and expert_counts");
    }
    EPI_TRY(await_counts(h));
    if (h->memory.notice->need) {
        h->dispatched = false;
        if (h->open_op.kind && h->open_op.kind->kernel == EPI_KERNEL_DISPATCH) {
            epi_half_close(h); /* a combine wants its finish still */
        }
        return epi_fail_need(g, h->memory.notice);
    }
    if (rows) {
        *rows = h->memory.notice->rows;
    }
    return g->backend->take_findings(h);
}

ep_status epi_handle_counts(ep_handle *h, int64_t *rows, int32_t *per_source,
                            int32_t *per_expert) {
    int64_t known = 0;
    EPI_TRY(epi_handle_await_fit(h, &known));
    EPI_TRY(read_counts(h, per_source, per_expert));
    if (rows) {
        *rows = known;
    }
    return EP_OK;
}

ep_status epi_handle_arena(const ep_handle *h, uint32_t flags, ep_dtype dtype, int64_t cols,
                           struct ep_tensor *view) {
    const ep_group *g = h->group;
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
