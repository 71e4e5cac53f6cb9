/* SPDX-License-Identifier: MIT */
/*
 * Who is here: ranks meet, exchange small data, and learn of each other's deaths.
 *
 * A boot is made by one thread per rank; afterwards its collectives are called by one thread at
 * a time. Ranks are processes joined by a star of connections to rank 0, which one control
 * thread per process serves for the life of the boot, or threads of one process (an ep_world),
 * where there is no thread and no socket.
 * Must not know what a group does with what it exchanges; carries kilobytes, not payload.
 */
#ifndef EPI_BOOT_H
#define EPI_BOOT_H

#include "src/base/base.h"

struct epi_boot;

/* What one rank may give to an allgather, and what all give together. */
#define EPI_BOOT_MAX_BYTES ((size_t)1 << 20)
#define EPI_BOOT_MAX_TOTAL_BYTES ((size_t)256 << 20)

struct epi_boot_config {
    int rank;      /* -1: from the environment, then num_ranks is -1 too */
    int num_ranks; /* 1..EP_MAX_RANKS */
    /* The first that is set decides how the ranks meet; none of them: the environment. */
    ep_world *world;
    ep_allgather_fn allgather;
    void *allgather_ctx;
    const char *address; /* "host:port" or "[v6]:port", where rank 0 listens */
    const char *job;     /* NULL: EP_JOB, or the launcher's id of the job */
    int64_t timeout_ns;  /* for the rendezvous; 0: EP_TIMEOUT_MS */
    /* A peer's process died without a goodbye (or its host vanished). Called from the control
     * thread, once per rank, perhaps while epi_boot_create still runs, never after
     * epi_boot_destroy has returned. It may not call back
     * into the boot. NULL: nobody wants to know. Threads of a world do not die. */
    void (*on_dead)(void *ctx, int rank, const char *why);
    /* Another rank has called epi_boot_tell: likewise, of a world from that rank's thread. */
    void (*on_told)(void *ctx, uint64_t word);
    void *ctx; /* of both */
};

/*
 * Collective. EP_ERR_ARG, EP_ERR_NOMEM, EP_ERR_SYSTEM (the address cannot be had);
 * EP_ERR_TIMEOUT names the ranks that did not come; EP_ERR_MISMATCH: another job, world size or
 * rank twice; EP_ERR_VERSION: another version of libep; EP_ERR_PEER: a rank failed or died.
 */
ep_status epi_boot_create(struct epi_boot **out, const struct epi_boot_config *config);

/* Says goodbye, stops the control thread, frees everything; takes at most about a second. In a
 * process forked from the one that made the boot it only frees the memory. */
void epi_boot_destroy(struct epi_boot **boot);

int epi_boot_rank(const struct epi_boot *boot);
int epi_boot_num_ranks(const struct epi_boot *boot);
bool epi_boot_is_threads(const struct epi_boot *boot);

/*
 * Collective: out is [num_ranks][bytes]. bytes may be 0, and is bounded as said above.
 * EP_ERR_MISMATCH on every rank when they do not all give the same number of bytes;
 * EP_ERR_TIMEOUT names who has not called; EP_ERR_PEER names who died or left, and then every
 * later call fails the same way. A call that timed out has still been made: the next one of
 * this rank meets the next one of the others.
 */
ep_status epi_boot_allgather(struct epi_boot *boot, const void *in, size_t bytes, void *out,
                             struct epi_deadline deadline);
ep_status epi_boot_barrier(struct epi_boot *boot, struct epi_deadline deadline);

/* Says a word to all other ranks, from any thread; waits for nobody. It arrives before this rank's end is
 * told. Of one rank's words only so many are passed on: who says more says nothing new. */
#define EPI_BOOT_MAX_WORDS 8
void epi_boot_tell(struct epi_boot *boot, uint64_t word);

/* Whether this process can use the world: it has made it, or was forked when no rank was in it. */
bool epi_boot_world_adopt(ep_world *world);

/*
 * A rank that fails before it can call epi_boot_create says so here, so that the others, who wait
 * for it in theirs, get EP_ERR_PEER with its sentence at once: as a thread, by the allgather, or
 * at the address, where it tries for a second or two. Of the configuration only the ways to
 * meet, rank and num_ranks are looked at, and they may be wrong. Returns st, with the text that
 * epi_error_text() had.
 */
ep_status epi_boot_say_failed(const struct epi_boot_config *config, ep_status st);

#endif
