/* SPDX-License-Identifier: MIT */
/*
 * Inside src/mem: one shared memory object, device arenas, and how descriptors travel.
 */
#ifndef EPI_MEM_SHARED_H
#define EPI_MEM_SHARED_H

#include <stdatomic.h>

#include "src/mem/mem.h"

/* Of an arena on a device, a piece that lies behind its addresses. */
struct epi_backed {
    struct epi_mem_piece piece;
    struct epi_backed *next;
};

/* As this process has it; of threads only its owner touches it, until the last of them undoes all. */
struct epi_arena {
    struct epi_mem_piece addresses;
    size_t page;
    struct epi_backed *backed;
};

/* Bytes of the shared memory that the device knows. */
struct epi_attached {
    uint64_t at, end;
    struct epi_attached *next; /* in ascending order */
};

/* What a rank's epi_mem stands on; threads of a process share one, the last user undoes it. */
struct epi_mapping {
    void *base; /* of the shared memory */
    int fd;     /* of the same where it can grow; else -1 */
    size_t bytes;
    uint64_t address; /* of the same for kernels */
    struct epi_attached *attached;
    _Atomic int users;
    int num_arenas;           /* 0: they are in the shared memory; else num_ranks */
    struct epi_arena arena[]; /* of all who share it */
};

/* Those who share the memory are numbered: whose the i-th part is, and which is a rank's. */
static inline int epi_mem_rank(const struct epi_mem_config *c, int i) {
    return c->ranks ? c->ranks[i] : i;
}
static inline int epi_mem_index(const struct epi_mem_config *c, int rank) {
    int i = c->ranks ? 0 : rank;
    while (c->ranks && c->ranks[i] != rank) {
        i++;
    }
    return i;
}

/* epi_agree. With a device, EP_ERR_UNSUPPORTED is a verdict of all ranks or of none. */
ep_status epi_mem_agree(const struct epi_mem_config *c, ep_status mine, const char *step);

/* ---- runs.c ------------------------------------------------------------------------------- */

/* A walk over the pages of an arena that are to be backed: those that `now` uses and `was` (NULL:
 * nothing) does not. What follows these fields is the walk's own, and begins as zeros. */
struct epi_runs {
    const struct epi_mem_use *was, *now;
    int num_uses;
    uint64_t page;
    int use;
    uint64_t part, end;
};
/* The next run of consecutive ones, in ascending order; false: there is none. */
bool epi_next_run(struct epi_runs *w, uint64_t *at, uint64_t *bytes);

/* ---- memfd.c ------------------------------------------------------------------------------ */

/* A sealed memfd of `bytes`, allocated if it is to be `whole`, or -1 with the error told in *st. */
int epi_memfd_create(size_t bytes, bool whole, ep_status *st);
/* Allocates `bytes` from `at` on. EP_ERR_NOMEM. */
ep_status epi_memfd_allocate(int fd, uint64_t at, uint64_t bytes);
/* Gives the whole pages in there back. */
void epi_memfd_release(int fd, uint64_t at, uint64_t end);
/* Whether what rank `source` passed is such a one, of this user and of these bytes. */
ep_status epi_memfd_check(int fd, size_t bytes, int source);

/* ---- device.c ----------------------------------------------------------------------------- */

/* Collective: addresses for all arenas. What there is when it fails is released with the mapping. */
ep_status epi_device_reserve(struct epi_mapping *map, const struct epi_mem_config *c);
/* Collective: puts pieces behind them, this rank's own and those of the others. */
ep_status epi_device_back(struct epi_mapping *map, const struct epi_mem_config *c,
                          const struct epi_mem_use *was, const struct epi_mem_use *now);
/* Takes those back. */
void epi_device_drop(struct epi_mapping *map, const struct epi_mem_config *c,
                     const struct epi_mem_use *was, const struct epi_mem_use *now);
/* Of an arena: all, and its addresses. */
void epi_device_release(const struct epi_mem_device *d, struct epi_arena *a);

/* ---- share.c ------------------------------------------------------------------------------ */

#define EPI_FD_TOKEN 24

/* The first num_sources of those who share memory give a descriptor each to all others of them. */
struct epi_share {
    int num_sources;
    int listener;               /* -1: not a source */
    int *socket;                /* [num_sources], to each source; -1: to none */
    struct epi_greeting *hello; /* [num_ranks] */
    struct epi_deadline deadline;
};

/* Collective, ends in agreement: everybody is connected with all sources. `made` is whether this
 * rank has what comes next. Close it also after a failure. */
ep_status epi_share_open(struct epi_share *s, const struct epi_mem_config *c, int num_sources,
                         ep_status made);
/* fds is [num_sources]: a source's own is in its place, those of the others, -1 before, become
 * the caller's to close. Waits only for ranks that have agreed to come. */
ep_status epi_share_pass(struct epi_share *s, const struct epi_mem_config *c, int *fds);
void epi_share_close(struct epi_share *s);

/* ---- pass.c ------------------------------------------------------------------------------- */

/* Listens on an abstract Unix socket named by `token`, which it makes up. -1 on error. */
int epi_fd_listen(uint8_t token[EPI_FD_TOKEN], ep_status *st);
/* Serves `fd` to `count` processes of this user that know the token; they have connected. */
ep_status epi_fd_serve(int listener, const uint8_t token[EPI_FD_TOKEN], int fd, int count,
                       struct epi_deadline deadline);
/* Connects to rank `source`, who serves the descriptor, and does not wait until it does. -1 on
 * error. */
int epi_fd_connect(int source, const uint8_t token[EPI_FD_TOKEN], struct epi_deadline deadline,
                   ep_status *st);
/* Waits for the descriptor on such a connection; -1 on error. */
int epi_fd_receive(int source, int s, struct epi_deadline deadline, ep_status *st);

#endif
