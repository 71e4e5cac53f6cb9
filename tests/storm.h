/* SPDX-License-Identifier: MIT */
/*
 * A fault storm: scenes drawn from a seed. In a scene ranks create a group, route, dispatch and
 * combine in some order and in any form, and destroy it; one of them, the victim, has bad luck at
 * one step. What every rank may be told then, and how late, is said here; all bytes are known.
 *
 * storm.c draws a scene and its data, the same in every process. storm_rank.c is the life of one
 * rank. t_storm.c is the processes in which ranks live, one scene after the other.
 */
#ifndef TESTS_STORM_H
#define TESTS_STORM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "tests/ll.h"
#include "tests/trial.h"

enum {
    STORM_MAX_RANKS = 8,
    STORM_MAX_STEPS = 12,
    STORM_HANDLES = 2,
    STORM_CARD_BYTES = 1 << 14, /* of one rank in one allgather of the test's own */
    STORM_SECONDS = 60          /* no scene takes longer, scaled */
};

enum storm_fault {
    STORM_CALM,      /* nothing */
    STORM_DELAY,     /* the victim sleeps for some milliseconds */
    STORM_STOP,      /* it is stopped for some milliseconds (SIGSTOP) */
    STORM_KILL,      /* SIGKILL */
    STORM_EXIT,      /* it ends without a word */
    STORM_ABORT,     /* ep_group_abort */
    STORM_LEAVE,     /* it destroys its group although there is more to do */
    STORM_MISMATCH,  /* it calls something else */
    STORM_LATE,      /* it sleeps for longer than the timeout */
    STORM_STOP_LONG, /* it is stopped for longer than that */
    STORM_NUM_FAULTS
};

enum storm_call {
    STORM_CREATE,
    STORM_HANDLES_ROUTED, /* all handles are made and routed */
    STORM_ROUTE,          /* again */
    STORM_DISPATCH,
    STORM_COMBINE,
    STORM_DECODE, /* a low-latency dispatch and its combine */
    STORM_DESTROY
};

struct storm_step {
    enum storm_call call;
    int handle;
};

/* How one rank goes about it; its own affair. */
struct storm_habit {
    bool stream; /* operations are queued on a stream of its own */
    bool eager;  /* and each is awaited at once */
    int num_workers;
};

struct storm_scene {
    uint64_t seed;
    int num_ranks;
    bool threads;   /* ranks are threads of one process */
    bool decodes;   /* also in low-latency mode; not on GPUs, for which tests stage buffers */
    bool allgather; /* they meet by the test's own allgather, else at an address */
    int timeout_ms; /* scaled */
    bool is_short;  /* that is short, so that whoever is slow may be told EP_ERR_TIMEOUT too */
    enum storm_fault fault;
    int victim, step;
    bool async;   /* the fault comes delay_us after the step has begun, else right before it */
    int delay_us; /* also how long STORM_DELAY and STORM_STOP last, in tens */
    int num_steps;
    struct storm_step steps[STORM_MAX_STEPS];
    struct storm_habit habits[STORM_MAX_RANKS];

    struct test_case c[STORM_HANDLES];
    struct trial t[STORM_HANDLES];
    struct ll_step ll;
    struct ep_group_config config; /* all but rank, workers and the way to meet */
};

/* What the ranks of a scene share; in memory that all processes have. */
struct storm_cards {
    atomic_int calls[STORM_MAX_RANKS];
    uint8_t card[2][STORM_MAX_RANKS][STORM_CARD_BYTES];
};
struct storm_shared {
    uint64_t seed;          /* of the first scene; each further one has the next */
    atomic_int number;      /* of the scene that runs, from 1 on; -1: all are done */
    int port[2];            /* of its group and of the survivors' */
    atomic_llong struck_us; /* when the fault came; 0: not yet */
    atomic_int ended;       /* ranks that are done with the first group */
    atomic_int done;        /* processes that are done with the scene */
    atomic_int bad;         /* failed checks, of all scenes */
    struct storm_cards cards;
};

void storm_draw(struct storm_scene *s, uint64_t seed, int only_fault, bool only_threads,
                bool only_processes);
void storm_build(struct storm_scene *s); /* the data */
void storm_free(struct storm_scene *s);
void storm_describe(const struct storm_scene *s, char *text, size_t bytes);

/* The victim does not survive. */
bool storm_is_lethal(const struct storm_scene *s);
/* Whether a rank may be told st. */
bool storm_may_tell(const struct storm_scene *s, ep_status st);

/* The life of a rank, up to the end of its first group; world: of ranks that are threads.
 * Returns how many checks failed. A victim that is to die does not come back. */
int storm_rank(const struct storm_scene *s, struct storm_shared *shared, ep_world *world,
               int rank);

#endif
