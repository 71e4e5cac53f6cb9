/* SPDX-License-Identifier: MIT */
/*
 * Groups for tests: starts R ranks as threads or as processes, lets each create its group, runs
 * a body on every rank and destroys the group. A body checks with world_check and world_is and
 * goes on after a failure, so that its peers are not left waiting; a call that fails where it
 * should not also aborts the group, so that they fail at once and not at the timeout.
 */
#ifndef TESTS_WORLD_H
#define TESTS_WORLD_H

#include <stdbool.h>

#include "ep.h"

#define WORLD_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

/* One rank of a running test. */
struct world {
    int rank, num_ranks;
    ep_group *group; /* NULL where create was meant to fail */
    void *ctx;       /* the test's; shared by ranks that are threads, copied to processes */
    int bad;         /* failed checks */
    int barriers;    /* this rank's calls of world_barrier */
};

struct world_setup {
    struct ep_group_config config; /* all but rank, num_ranks and how to meet */
    int num_ranks;
    bool processes; /* unless EP_TEST_RANKS says otherwise (gpu.h) */
    bool host;      /* host groups, whatever gpu_wanted() */
    void (*tune)(struct ep_group_config *config, int rank, void *ctx); /* or NULL */
    void (*body)(struct world *w);
    void *ctx;
    ep_status create;        /* what ep_group_create must return on every rank */
    const char *create_says; /* and its message must contain; or NULL */
};

/* A small configuration: 4 experts per rank, 16 tokens, K 4, rows of 256 bytes. */
void world_defaults(struct world_setup *s, int num_ranks);
/* Runs the ranks; returns how many of them failed. */
int world_run(const struct world_setup *s);

/* How EP_TEST_NODES divides so many ranks: "2" into two nodes, "3" into three of which the first is the
 * largest; else they are one, and the answer is false. As EP_NODE_SIZE has it, and by rank. */
bool world_nodes(int num_ranks, char *sizes, size_t bytes, int32_t *node);

/* Waits until all ranks are here, by other means than the library's. */
void world_barrier(struct world *w);
/* Counts and prints a failure; returns good. */
bool world_check(struct world *w, bool good, const char *fmt, ...) WORLD_PRINTF(3, 4);
/* got must be want; otherwise the message of the library is printed too. */
bool world_is(struct world *w, ep_status got, ep_status want, const char *what);
/* As world_is, and ep_last_error() must contain every word of the list "a|b|c". */
bool world_fails(struct world *w, ep_status got, ep_status want, const char *words,
                 const char *what);

#endif
