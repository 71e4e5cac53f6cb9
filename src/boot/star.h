/* SPDX-License-Identifier: MIT */
/*
 * The star of control connections after the rendezvous. See star.c (the control thread) and
 * star_call.c (what the caller's thread does).
 */
#ifndef EPI_BOOT_STAR_H
#define EPI_BOOT_STAR_H

#include <poll.h>
#include <sys/types.h>

#include "src/base/base.h"
#include "src/boot/conn.h"
#include "src/boot/rounds.h"

enum epi_rank_state { EPI_RANK_ALIVE, EPI_RANK_DEAD, EPI_RANK_LEFT };

/* The one collective this rank may be in. */
struct epi_request {
    bool active;  /* a caller waits; out is its memory */
    bool done;    /* status is set, and out when it is EP_OK */
    bool ask;     /* the caller has run out of time: find out for whom it waited */
    bool told;    /* text says for whom */
    uint64_t seq; /* the number of this rank's call */
    void *out;
    size_t bytes;
    ep_status status;
    char text[EPI_WIRE_TEXT_BYTES + 1];
};

struct epi_star {
    int rank;
    int num_ranks;
    pid_t pid; /* of the process whose thread serves this star */
    void (*on_dead)(void *ctx, int rank, const char *why);
    void *on_dead_ctx;
    pthread_t thread;
    bool has_thread;
    int kick_fd; /* wakes the control thread */

    /* The control thread's own: rank 0 has one connection per rank (its own stays closed), the
     * others have one, to rank 0. */
    struct epi_conn *conns;
    int num_conns;
    struct pollfd *polls;

    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t cond;
    bool stop;
    struct epi_request req;
    struct epi_packet *posted; /* a contribution the control thread has not taken yet */
    uint64_t num_calls;
    uint8_t *state;   /* [num_ranks] enum epi_rank_state */
    ep_status broken; /* not EP_OK: no collective can succeed any more */
    char broken_text[EPI_WIRE_TEXT_BYTES + 1];
    struct epi_rounds rounds; /* rank 0's */
};

/* The star without connections and without its thread. */
ep_status epi_star_make(struct epi_star **out, int rank, int num_ranks);
/* Starts the control thread; the connections are open. 0 or errno. */
int epi_star_run(struct epi_star *star);
void epi_star_free(struct epi_star *star);

ep_status epi_star_allgather(struct epi_star *star, const void *in, size_t bytes, void *out,
                             struct epi_deadline deadline);

void epi_star_kick(struct epi_star *star);
/* The control thread's main function. */
void *epi_star_main(void *star);

#endif
