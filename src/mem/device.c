/* SPDX-License-Identifier: MIT */
/*
 * Arenas in device memory: addresses for all that an arena may become, and pieces of memory behind
 * those of its bytes that are used, put there one by one, by all ranks together. Ranks that are
 * threads use each other's pieces at the addresses where they were made; between processes a
 * descriptor of each is passed to all others, who map it. What cannot be done is told as a pair of
 * ranks. Called by the threads that create groups and let them grow; owns nothing: pieces belong to
 * the mapping.
 */
#include "src/mem/shared.h"

#include <string.h>

/* A piece of every arena. */
struct run {
    uint64_t at, bytes;
};

static ep_status no_way(const char *lacks) {
    return epi_fail(EP_ERR_UNSUPPORTED, "its device %s", lacks);
}

/* Threads need no addresses for what others make. */
static bool has_to_map(const struct epi_mem_config *c, int index) {
    return epi_mem_rank(c, index) == c->exchange.rank || !c->threads;
}

ep_status epi_device_reserve(struct epi_mapping *map, const struct epi_mem_config *c) {
    const struct epi_mem_device *d = c->device;
    ep_status st = EP_OK;
    for (int r = 0; st == EP_OK && r < map->num_arenas; r++) {
        struct epi_arena *a = &map->arena[r];
        if (has_to_map(c, r)) {
            st = d->reserve ? d->reserve(d->ctx, c->arena_bytes, &a->addresses, &a->page)
                            : no_way("has no such memory");
            st = st == EP_OK ? EP_OK
                             : epi_fail(st, "rank %d cannot make its arena: %s",
                                        c->exchange.rank, epi_error_text());
        }
    }
    return epi_mem_agree(c, st, "allocating the arenas");
}

static struct epi_runs runs_of(const struct epi_mapping *map, const struct epi_mem_config *c,
                               const struct epi_mem_use *was, const struct epi_mem_use *now) {
    return (struct epi_runs){
        was, now, c->num_uses, map->arena[epi_mem_index(c, c->exchange.rank)].page, 0, 0, 0};
}

static void give_back(const struct epi_mem_device *d, struct epi_backed **at) {
    struct epi_backed *b = *at;
    *at = b->next;
    if (b->piece.address) {
        d->release(d->ctx, &b->piece);
    }
    epi_free(b);
}

void epi_device_release(const struct epi_mem_device *d, struct epi_arena *a) {
    while (a->backed) {
        give_back(d, &a->backed);
    }
    if (a->addresses.address) {
        d->release(d->ctx, &a->addresses);
    }
}

void epi_device_drop(struct epi_mapping *map, const struct epi_mem_config *c,
                     const struct epi_mem_use *was, const struct epi_mem_use *now) {
    struct epi_runs w = runs_of(map, c, was, now);
    struct run run;
    while (epi_next_run(&w, &run.at, &run.bytes)) {
        for (int r = 0; r < map->num_arenas; r++) {
            struct epi_backed **at = &map->arena[r].backed;
            while (has_to_map(c, r) && *at) {
                const uint64_t is = (*at)->piece.address; /* 0: it never came to be */
                if (!is || is == map->arena[r].addresses.address + run.at) {
                    give_back(c->device, at);
                } else {
                    at = &(*at)->next;
                }
            }
        }
    }
}

/* A place for a piece, which is none yet. */
static struct epi_backed *add_place(struct epi_arena *a) {
    struct epi_backed *b = epi_alloc(sizeof(*b));
    if (b) {
        b->next = a->backed;
        a->backed = b;
    } else {
        epi_fail(EP_ERR_NOMEM, "no memory to note a piece of an arena");
    }
    return b;
}

static ep_status create_own(struct epi_mapping *map, const struct epi_mem_config *c,
                            const struct run *run, int *fd) {
    const struct epi_mem_device *d = c->device;
    const int rank = c->exchange.rank;
    struct epi_arena *a = &map->arena[epi_mem_index(c, rank)];
    struct epi_backed *b = add_place(a);
    if (!b) {
        return EP_ERR_NOMEM;
    }
    const ep_status st = d->create ? d->create(d->ctx, a->addresses.address + run->at,
                                               (size_t)run->bytes, &b->piece, fd)
                                   : no_way("has no such memory");
    if (st == EP_OK && fd) { /* the device does not know how descriptors are kept here */
        epi_fd_begin();
        const int kept = epi_fd_keep(*fd);
        *fd = kept < 0 ? -1 : kept;
        return kept < 0 ? epi_fail(EP_ERR_SYSTEM, "rank %d has no descriptor for its arena: %s",
                                   rank, strerror(-kept))
                        : EP_OK;
    }
    return st == EP_OK
               ? EP_OK
               : epi_fail(st, "rank %d cannot make its arena: %s", rank, epi_error_text());
}

static ep_status cannot_map(ep_status st, int rank, int owner) {
    return epi_fail(st, "rank %d cannot map the memory of rank %d: %s", rank, owner,
                    epi_error_text());
}

static ep_status between_threads(struct epi_mapping *map, const struct epi_mem_config *c,
                                 const struct run *run, void **peers) {
    const struct epi_exchange *x = &c->exchange;
    const struct epi_mem_device *d = c->device;
    ep_status st = EP_OK;
    EPI_TRY(epi_mem_agree(c, create_own(map, c, run, NULL), "allocating the arenas"));
    const struct epi_arena *own = &map->arena[epi_mem_index(c, x->rank)];
    for (int i = 0; st == EP_OK && i < c->num_ranks; i++) {
        const int r = epi_mem_rank(c, i);
        if (r != x->rank) {
            st = d->admit ? d->admit(d->ctx, &own->backed->piece, peers[r])
                          : no_way("admits no other");
            st = st == EP_OK ? EP_OK : cannot_map(st, r, x->rank);
        }
    }
    return epi_mem_agree(c, st, "mapping the arenas");
}

static ep_status import_all(struct epi_mapping *map, const struct epi_mem_config *c,
                            const struct run *run, const int *fds) {
    const struct epi_mem_device *d = c->device;
    const int rank = c->exchange.rank;
    ep_status st = EP_OK;
    for (int i = 0; st == EP_OK && i < c->num_ranks; i++) {
        const int r = epi_mem_rank(c, i);
        struct epi_arena *a = &map->arena[i];
        struct epi_backed *b = r != rank ? add_place(a) : NULL;
        if (r != rank) {
            st = !b          ? EP_ERR_NOMEM
                 : d->import ? d->import(d->ctx, fds[i], a->addresses.address + run->at,
                                         (size_t)run->bytes, &b->piece)
                             : no_way("cannot import memory");
            st = st == EP_OK ? EP_OK : cannot_map(st, rank, r);
        }
    }
    return st;
}

static ep_status between_processes(struct epi_mapping *map, const struct epi_mem_config *c,
                                   const struct run *run) {
    const int num_ranks = c->num_ranks;
    struct epi_share share;
    int own = -1;
    ep_status st = create_own(map, c, run, &own);
    int *fds = epi_alloc_array((size_t)num_ranks, sizeof(*fds));
    if (!fds && st == EP_OK) {
        st = epi_fail(EP_ERR_NOMEM, "no memory for %d descriptors", num_ranks);
    }
    for (int r = 0; fds && r < num_ranks; r++) {
        fds[r] = epi_mem_rank(c, r) == c->exchange.rank ? own : -1;
    }
    st = epi_share_open(&share, c, num_ranks, st);
    if (st == EP_OK) {
        st = epi_share_pass(&share, c, fds);
        if (st == EP_OK) {
            st = import_all(map, c, run, fds);
        }
        st = epi_mem_agree(c, st, "mapping the arenas");
    }
    epi_share_close(&share);
    for (int r = 0; fds && r < num_ranks; r++) {
        epi_fd_close(&fds[r]);
    }
    if (!fds) {
        epi_fd_close(&own);
    }
    epi_free(fds);
    return st;
}

/* Threads: whom each admits. */
static ep_status hear_peers(const struct epi_mem_config *c, void ***out) {
    const struct epi_exchange *x = &c->exchange;
    void **peers = epi_alloc_array((size_t)x->num_ranks, sizeof(*peers));
    ep_status st =
        peers ? EP_OK : epi_fail(EP_ERR_NOMEM, "no memory to hear %d ranks", x->num_ranks);
    *out = peers;
    EPI_TRY(epi_mem_agree(c, st, "allocating the arenas"));
    return x->allgather(x->ctx, &c->device->ctx, sizeof(c->device->ctx), peers);
}

ep_status epi_device_back(struct epi_mapping *map, const struct epi_mem_config *c,
                          const struct epi_mem_use *was, const struct epi_mem_use *now) {
    struct epi_runs w = runs_of(map, c, was, now);
    struct run run;
    void **peers = NULL;
    ep_status st = c->threads ? hear_peers(c, &peers) : EP_OK;
    while (st == EP_OK && epi_next_run(&w, &run.at, &run.bytes)) {
        st =
            c->threads ? between_threads(map, c, &run, peers) : between_processes(map, c, &run);
    }
    epi_free(peers);
    return st;
}
