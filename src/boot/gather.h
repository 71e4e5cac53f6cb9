/* SPDX-License-Identifier: MIT */
/*
 * Inside rank 0's side of the rendezvous: what meet_root.c (the ranks and the loop) and strangers.c
 * (who is not one yet) know of each other. Used by the creating thread.
 */
#ifndef EPI_BOOT_GATHER_H
#define EPI_BOOT_GATHER_H

#include "src/boot/parts.h"

#define EPI_REASON_BYTES 320

struct epi_stranger {
    struct epi_conn conn;
    struct epi_shake shake;
    struct epi_deadline deadline;
    uint64_t number; /* in the order of their coming */
    bool is_ready;
    char name[EPI_ADDR_TEXT_BYTES];
};

struct epi_gathering {
    const struct epi_meet *meet;
    struct epi_conn *conns; /* [num_ranks], fd -1 until the rank is here */
    bool *here;             /* [num_ranks] */
    uint64_t *process;      /* [num_ranks] of those that are here */
    int num_here;           /* rank 0 included */
    struct epi_deadline deadline;
    ep_status verdict; /* not EP_OK: it is over, and who comes now is told so */
    char verdict_text[EPI_WIRE_TEXT_BYTES];
    struct epi_stranger *strangers;
    int num_strangers;
    int max_strangers;
    uint64_t num_came;
    struct pollfd *polls;
    struct epi_deadline quiet_until; /* no line about strangers before */
    uint64_t num_unlogged;
    char turned_away[EPI_REASON_BYTES]; /* the last who was, for the text of a timeout */
    char doubt[200];                    /* the same: why nobody may ever come */
    bool has_doubted;
    bool is_giving_way; /* to a newer process, which takes this one's place */
    ep_status status;   /* set by whatever makes the rendezvous fail */
};

/* ---- strangers.c; index is the place in g->strangers, which another may have afterwards ------- */

void epi_strangers_accept(struct epi_gathering *g, int listen_fd);
void epi_stranger_let_in(struct epi_gathering *g, int fd, const struct epi_addr *from);
/* Reads what it has said; true when its place in the array is now another's, or nobody's. */
bool epi_stranger_hear(struct epi_gathering *g, int index);
/* Ends it: with a line in the log; with a last word, for one who has proved himself; with both. */
void epi_stranger_drop(struct epi_gathering *g, int index, const char *why);
void epi_stranger_part(struct epi_gathering *g, int index, const struct epi_frame *head,
                       const char *text);
void epi_stranger_turn_away(struct epi_gathering *g, int index, ep_status status,
                            const char *text);
/* It is none any more; its connection is somebody else's. */
void epi_stranger_forget(struct epi_gathering *g, int index);
void epi_strangers_end(struct epi_gathering *g);

/* ---- meet_root.c ----------------------------------------------------------------------------- */

/* A stranger has proved that it holds the key, and says who it is. */
void epi_gather_claim(struct epi_gathering *g, int index, const struct epi_claim *c,
                      const struct epi_frame *frame);

#endif
