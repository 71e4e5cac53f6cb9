/* SPDX-License-Identifier: MIT */
/*
 * The arenas of a group and the mappings by which ranks reach each other's. L1: knows bytes, not
 * what lies in them.
 *
 * On one host all ranks' arenas are one piece of shared memory, in rank order: a sealed memfd,
 * made and fully allocated by rank 0, whose descriptor the others get over a Unix socket (that it
 * arrives is the proof that they share a host). Ranks that are threads share one mapping.
 */
#ifndef EPI_MEM_H
#define EPI_MEM_H

#include "src/base/exchange.h"

struct epi_mem;

struct epi_mem_config {
    struct epi_exchange exchange;
    size_t arena_bytes; /* of each rank; whole pages */
    bool threads;       /* the ranks are threads of this process */
    struct epi_deadline deadline;
};

/*
 * Collective: all succeed or all fail. Arenas start zeroed.
 * EP_ERR_NOMEM says how much was asked for and how much there is; EP_ERR_UNSUPPORTED names ranks
 * that are on another host; EP_ERR_SYSTEM.
 */
ep_status epi_mem_create(struct epi_mem **out, const struct epi_mem_config *config);

/* Unmaps. Local; the memory itself goes when the last rank has unmapped it. */
void epi_mem_destroy(struct epi_mem **mem);

/* Rank r's arena as mapped here. */
void *epi_mem_arena(const struct epi_mem *mem, int rank);

#endif
