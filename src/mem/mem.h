/* SPDX-License-Identifier: MIT */
/*
 * The arenas and boards of a group and the mappings by which ranks reach each other's. L1: knows
 * bytes, not what lies in them, and of a device only the calls it is handed.
 *
 * On one host the memory of all ranks is one piece of shared memory: a sealed memfd, made and fully
 * allocated by rank 0, whose descriptor the others get over a Unix socket (that it arrives is the
 * proof that they share a host). Ranks that are threads share one mapping. First come the arenas,
 * in rank order, then the boards, in rank order.
 *
 * With a device the arenas are its memory, and the shared memory holds only the boards and is made
 * known to the device. Where the devices of any two ranks cannot share memory, all ranks' arenas lie in
 * shared memory instead.
 *
 * An arena that can grow has addresses for all that it may become, everywhere, and memory behind what
 * it uses: pieces of a device's, or allocated pages of the shared memory.
 */
#ifndef EPI_MEM_H
#define EPI_MEM_H

#include "src/base/base.h"

struct epi_mem;

/* Memory of a device, or addresses for some. Plain data: whoever has a copy can use it. */
struct epi_mem_piece {
    uint64_t address; /* for kernels; 0: there is none */
    uint64_t own[3];  /* what the device keeps with it; not read here */
};

/*
 * A rank's device in the words of this directory. Outputs are set on success only, and
 * EP_ERR_UNSUPPORTED says that it cannot be done here: all ranks then do without. `release` and
 * `detach` cannot fail; whoever has `create` or `attach` has them.
 *
 * A caller that was built when the struct was shorter says so by `size`, as every table of
 * functions does in this library: what it lacks at the end is NULL here. A function that is NULL
 * is EP_ERR_UNSUPPORTED when it is needed, but for `attach`: then the device needs no telling.
 *
 * Ranks that are threads share their pieces and the mapping, and the last of them to leave, which
 * may be any, undoes what all have done, with its own ctx: `release` takes pieces that others
 * created, `detach` what another has attached. So what a piece or an attached mapping rests on (a
 * device's context) must last until all ranks of the process have left.
 */
struct epi_mem_device {
    size_t size; /* of the caller's struct */
    void *ctx;
    /* Addresses of an arena, in which pieces of whole pages (of *page bytes) can lie. */
    ep_status (*reserve)(void *ctx, size_t bytes, struct epi_mem_piece *out, size_t *page);
    /* A piece of own arena, at `at`: zeroed. `fd` is NULL, or gets a descriptor for the others, the
     * caller's to close. */
    ep_status (*create)(void *ctx, uint64_t at, size_t bytes, struct epi_mem_piece *out,
                        int *fd);
    /* Threads: lets a peer's device use a piece of own arena, at the same address. */
    ep_status (*admit)(void *ctx, const struct epi_mem_piece *own, void *peer_ctx);
    /* Processes: maps a piece of a peer's arena at `at`; the descriptor stays the caller's. */
    ep_status (*import)(void *ctx, int fd, uint64_t at, size_t bytes,
                        struct epi_mem_piece *out);
    /* Created or imported; then what was reserved. */
    void (*release)(void *ctx, const struct epi_mem_piece *piece);
    /* Makes host memory, whole pages, known to the devices of all ranks of this process. */
    ep_status (*attach)(void *ctx, void *host, size_t bytes, uint64_t *address);
    /* Takes a mapping that was attached over: unmaps it when the devices have forgotten it, now or
     * when that waits for nobody. */
    void (*detach)(void *ctx, void *host, size_t bytes);
};

enum epi_mem_kind {
    EPI_MEM_AUTO, /* on the device if that can be shared, else in host memory, with a warning */
    EPI_MEM_DEVICE, /* EP_ERR_UNSUPPORTED if it cannot */
    EPI_MEM_HOST
};

/* Of an arena, what is backed by memory: `used` bytes of each of the parts, which are `stride` apart.
 * Uses lie one behind the other. */
struct epi_mem_use {
    uint64_t at, stride, used, parts;
};

struct epi_mem_config {
    struct epi_exchange exchange;
    const int *
        ranks; /* that share the memory, ascending, this one among them; outlives the memory. Of ... */
    int num_ranks; /* ... so many; 0: all do. Other ranks of the exchange do the same with others */
    size_t arena_bytes;            /* of each rank; whole pages */
    const struct epi_mem_use *use; /* of each, until it grows; NULL: all, for good */
    int num_uses;
    size_t board_bytes; /* of each rank, always in host memory; whole pages, may be 0 */
    bool threads;       /* the ranks are threads of this process */
    struct epi_deadline deadline;
    const struct epi_mem_device *device; /* copied; NULL: arenas are host memory */
    int arena_kind;                      /* enum epi_mem_kind; the same on all ranks */
    bool alike;                          /* the status of a rank that fails is that of all */
};

/*
 * Collective: all succeed or all fail. Arenas and boards start zeroed.
 * EP_ERR_NOMEM says how much was asked for and how much there is; EP_ERR_UNSUPPORTED names ranks
 * that are on another host, or devices that cannot share memory; EP_ERR_SYSTEM.
 */
ep_status epi_mem_create(struct epi_mem **out, const struct epi_mem_config *config);

/*
 * Backs more of the arenas, which were created with uses: as many, that differ in `used` alone.
 * Collective: all return alike, and after a failure what was new is given back. Not after
 * EP_ERR_TIMEOUT, as it may be that others have not seen that and use what is here; then it must not be
 * called again. Nor host memory that devices may know, to which the next call comes back.
 */
ep_status epi_mem_grow(struct epi_mem *mem, struct epi_deadline deadline,
                       const struct epi_mem_use *was, const struct epi_mem_use *now);

/* Unmaps. Local; the memory itself goes when the last rank has unmapped it. */
void epi_mem_destroy(struct epi_mem **mem);

/* Rank r's arena and board as this process sees them, of a rank that shares the memory; an arena on a
 * device is NULL. */
void *epi_mem_arena(const struct epi_mem *mem, int rank);
void *epi_mem_board(const struct epi_mem *mem, int rank);
/* The same as this rank's kernels see them; without a device the host's pointers. */
uint64_t epi_mem_arena_address(const struct epi_mem *mem, int rank);
uint64_t epi_mem_board_address(const struct epi_mem *mem, int rank);
bool epi_mem_on_device(const struct epi_mem *mem);

#endif
