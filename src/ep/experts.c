/* SPDX-License-Identifier: MIT */
/*
 * Which rank holds each expert: tables that kernels index, of the group's configuration and of other
 * numbers or maps that calls have named. Those stay while somebody uses them: a handle; a call; on the
 * host an operation that is queued, while a device gives memory back behind what was launched; and, as
 * nobody sees when a graph runs or goes, what was captured once, until the group ends. Of the others
 * the last few are kept. The list, the newest first, is guarded by the group's mutex; a table never
 * changes. Called by the threads that call the API.
 */
#include <string.h>

#include "src/ep/group.h"

static void fill(struct epi_experts *e, const int32_t *map, int rank, int num_ranks) {
    const size_t num = (size_t)e->num;
    k_i32 *of = e->table, *local = of + num, *grouped = local + num, *first = grouped + num;
    e->is_default = true;
    for (int i = 0; i < e->num; i++) {
        const int usual = epi_default_rank(e->num, num_ranks, i);
        of[i] = map ? map[i] : usual;
        e->is_default = e->is_default && of[i] == usual;
        local[i] = first[of[i] + 1]++;
    }
    for (int r = 0; r < num_ranks; r++) {
        first[r + 1] += first[r];
    }
    for (int i = 0; i < e->num; i++) {
        grouped[first[of[i]] + local[i]] = i;
    }
    e->num_local = first[rank + 1] - first[rank];
    e->hash = epi_hash(EPI_HASH_BEGIN, of, num * sizeof(*of));
}

ep_status epi_experts_create(struct epi_experts **out, const ep_group *g, int num,
                             const int32_t *map) {
    const size_t bytes = epi_plan_expert_bytes(num, g->num_ranks);
    struct epi_experts *e = epi_alloc(sizeof(*e) + bytes);
    if (!e) {
        return epi_fail(EP_ERR_NOMEM, "no memory for the tables of %d experts (%zu bytes)", num,
                        bytes);
    }
    e->num = num;
    e->at = (uintptr_t)e->table;
    fill(e, map, g->rank, g->num_ranks);
    *out = e;
    return EP_OK;
}

ep_status epi_experts_place(ep_group *g, struct epi_experts *e) {
    const size_t bytes = epi_plan_expert_bytes(e->num, g->num_ranks);
    return g->backend->place ? g->backend->place(g, e->table, bytes, &e->at) : EP_OK;
}

static void free_table(ep_group *g, struct epi_experts *e) {
    if (e->at != (uintptr_t)e->table) {
        g->backend->displace(g, &e->at);
    }
    epi_free(e);
}

static void drop_unused(ep_group *g) {
    int unused = 0;
    for (struct epi_experts **at = &g->experts->next; *at;) {
        struct epi_experts *e = *at;
        unused += !e->captured && atomic_load(&e->users) == 0;
        if (e->captured || atomic_load(&e->users) || unused <= EPI_EXPERTS_UNUSED) {
            at = &e->next;
        } else {
            *at = e->next;
            free_table(g, e);
        }
    }
}

/* A map that the group does not know. */
static ep_status add(ep_group *g, const char *tag, int num, const int32_t *map,
                     struct epi_experts **out) {
    struct epi_experts *e = NULL;
    EPI_TRY(epi_check_map(tag, map, num, g->num_ranks));
    EPI_TRY(epi_experts_create(&e, g, num, map));
    const k_i32 *first = e->table + 3 * (size_t)num;
    ep_status st = EP_OK;
    for (int r = 0; st == EP_OK && r < g->num_ranks; r++) {
        const int held = first[r + 1] - first[r], most = g->plan.max_local;
        if (held > most) {
            st = epi_fail(
                EP_ERR_ARG,
                "%s.expert_rank gives rank %d %d experts, at most %d (the most of a rank "
                "in ep_group_config)",
                tag, r, held, most);
        }
    }
    st = st == EP_OK ? epi_experts_place(g, e) : st;
    if (st != EP_OK) {
        epi_free(e);
        return st;
    }
    drop_unused(g);
    *out = e;
    return EP_OK;
}

static bool is_of(const struct epi_experts *e, int num, const int32_t *map) {
    return e->num == num &&
           (map ? memcmp(e->table, map, (size_t)num * sizeof(*map)) == 0 : e->is_default);
}

ep_status epi_experts_find(ep_group *g, const char *tag, int num, const int32_t *map,
                           struct epi_experts **out) {
    if (num < 0 || num > g->config.num_experts) {
        return epi_fail(EP_ERR_ARG, "%s.num_experts is %d, must be 0..%d (the group's)", tag,
                        num, g->config.num_experts);
    }
    if (num == 0 && map) {
        return epi_fail(EP_ERR_ARG, "%s.expert_rank is given and num_experts is 0", tag);
    }
    ep_status st = EP_OK;
    pthread_mutex_lock(&g->mutex);
    struct epi_experts **at = &g->experts, *e;
    while (*at && num != 0 && !is_of(*at, num, map)) {
        at = &(*at)->next;
    }
    e = *at;
    if (!e) {
        st = add(g, tag, num, map, &e);
    } else if (e != g->experts) {
        *at = e->next;
    }
    if (st == EP_OK) {
        if (e != g->experts) { /* the group's own stays the first */
            e->next = g->experts->next;
            g->experts->next = e;
        }
        epi_experts_hold(e);
        *out = e;
    }
    pthread_mutex_unlock(&g->mutex);
    return st;
}

void epi_experts_free(ep_group *g, bool forked) {
    while (g->experts) {
        struct epi_experts *e = g->experts;
        g->experts = e->next;
        if (forked) {
            epi_free(e);
        } else {
            free_table(g, e);
        }
    }
}

/* How ready messages name them: a default map by its number, others by 16 bits of a hash. */
static k_u32 signature_of(const struct epi_experts *e) {
    const k_u32 folded = (k_u32)(e->hash ^ e->hash >> 16 ^ e->hash >> 32 ^ e->hash >> 48);
    return e->is_default ? (k_u32)(e->num - 1) << K_SIG_COUNTED_SHIFT
                         : folded << K_SIG_COUNTED_SHIFT | K_SIG_MAPPED;
}

void epi_experts_use(const struct epi_experts *e, struct k_group *k) {
    const size_t num = (size_t)e->num;
    const k_i32 *of = (const k_i32 *)(uintptr_t)e->at;
    k->num_experts = e->num;
    k->num_local = e->num_local;
    k->experts = signature_of(e);
    k->expert_rank = of;
    k->expert_local = of + num;
    k->rank_expert = of + 2 * num;
    k->rank_first = of + 3 * num;
}
