/* SPDX-License-Identifier: MIT */
/*
 * Arenas in device memory. Ranks that are threads use each other's at the addresses where they
 * were made; between processes a descriptor of each is passed to all others, who map it. What
 * cannot be done is told as a pair of ranks. Called by the threads that create groups; owns
 * nothing: pieces belong to the mapping.
 */
#include "src/mem/shared.h"

#include <string.h>

static ep_status create_own(struct epi_mapping *map, const struct epi_mem_config *c, int *fd) {
    const struct epi_mem_device *d = c->device;
    const int rank = c->exchange.rank;
    const ep_status st = d->create
                             ? d->create(d->ctx, c->arena_bytes, &map->piece[rank], fd)
                             : epi_fail(EP_ERR_UNSUPPORTED, "its device has no such memory");
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

static ep_status between_threads(struct epi_mapping *map, const struct epi_mem_config *c) {
    const struct epi_exchange *x = &c->exchange;
    const struct epi_mem_device *d = c->device;
    void **peers = epi_alloc_array((size_t)x->num_ranks, sizeof(*peers));
    ep_status st = create_own(map, c, NULL);
    if (!peers && st == EP_OK) {
        st = epi_fail(EP_ERR_NOMEM, "no memory to hear %d ranks", x->num_ranks);
    }
    st = epi_mem_agree(c, st, "allocating the arenas");
    if (st == EP_OK) {
        st = x->allgather(x->ctx, &d->ctx, sizeof(d->ctx), peers);
    }
    if (st == EP_OK) {
        for (int r = 0; st == EP_OK && r < x->num_ranks; r++) {
            if (r != x->rank) {
                st = d->admit ? d->admit(d->ctx, &map->piece[x->rank], peers[r])
                              : epi_fail(EP_ERR_UNSUPPORTED, "its device admits no other");
                st = st == EP_OK ? EP_OK : cannot_map(st, r, x->rank);
            }
        }
        st = epi_mem_agree(c, st, "mapping the arenas");
    }
    epi_free(peers);
    return st;
}

static ep_status import_all(struct epi_mapping *map, const struct epi_mem_config *c,
                            const int *fds) {
    const struct epi_mem_device *d = c->device;
    const int rank = c->exchange.rank;
    ep_status st = EP_OK;
    for (int r = 0; st == EP_OK && r < c->exchange.num_ranks; r++) {
        if (r != rank) {
            st = d->import ? d->import(d->ctx, fds[r], c->arena_bytes, &map->piece[r])
                           : epi_fail(EP_ERR_UNSUPPORTED, "its device cannot import memory");
            st = st == EP_OK ? EP_OK : cannot_map(st, rank, r);
        }
    }
    return st;
}

static ep_status between_processes(struct epi_mapping *map, const struct epi_mem_config *c) {
    const int num_ranks = c->exchange.num_ranks;
    struct epi_share share;
    int own = -1;
    ep_status st = create_own(map, c, &own);
    int *fds = epi_alloc_array((size_t)num_ranks, sizeof(*fds));
    if (!fds && st == EP_OK) {
        st = epi_fail(EP_ERR_NOMEM, "no memory for %d descriptors", num_ranks);
    }
    for (int r = 0; fds && r < num_ranks; r++) {
        fds[r] = r == c->exchange.rank ? own : -1;
    }
    st = epi_share_open(&share, c, num_ranks, st);
    if (st == EP_OK) {
        st = epi_share_pass(&share, c, fds);
        if (st == EP_OK) {
            st = import_all(map, c, fds);
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

ep_status epi_device_arenas(struct epi_mapping *map, const struct epi_mem_config *c) {
    return c->threads ? between_threads(map, c) : between_processes(map, c);
}
