/* SPDX-License-Identifier: MIT */
/*
 * A small layer for tests of bad luck: one rank's group, handle and buffers, whose data can be
 * checked by looking at it; a page that stops whoever reads it, so that a rank can be held in a
 * known phase of an operation; and a footprint, to see that nothing is left behind.
 *
 * A rig belongs to one rank, which is a process or a thread. Traps belong to the process. Of a CUDA
 * group kernels read copies, so that traps do not work there: what a trap would stop, rig_say says
 * by hand.
 */
#ifndef TESTS_RIG_H
#define TESTS_RIG_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "ep.h"

enum {
    RIG_TOKENS = 64, /* of each rank: four channels, four pages of rows */
    RIG_TOPK = 2,
    RIG_HIDDEN = 64, /* float32: 256 bytes */
    RIG_EXPERTS = 2, /* of each rank */
    RIG_MAX_RANKS = 8,
    RIG_MAX_ROWS = RIG_MAX_RANKS * RIG_TOKENS,
    RIG_SECONDS = 40 /* a group of ranks is killed after */
};

/* How the ranks meet: at a port of 127.0.0.1; in a world; or, with neither, as the environment
 * says. */
struct rig_meeting {
    int num_ranks;
    int port;
    ep_world *world;
    int timeout_ms;
};

struct rig {
    int rank, num_ranks;
    ep_group *group;
    ep_handle *handle;
    void *stream; /* NULL: calls are done when they return; owned; of call_stream_create */
    int32_t ids[RIG_TOKENS][RIG_TOPK];
    int32_t source[RIG_MAX_ROWS][2];
    int32_t num_rows;
    float (*x)[RIG_HIDDEN];    /* [RIG_TOKENS], whole pages */
    float (*recv)[RIG_HIDDEN]; /* [RIG_MAX_ROWS], whole pages; answers are what was received */
    float (*out)[RIG_HIDDEN];  /* [RIG_TOKENS] */
};

/* The least: an expert for each rank, 4 tokens of 16 bytes. Where they meet is the caller's. */
struct ep_group_config rig_tiny(int rank, int num_ranks, int timeout_ms);
/* Ranks 0 and 3 have one worker, the others more. */
void rig_config(struct ep_group_config *c, const struct rig_meeting *m, int rank,
                char address[32]);
/* Makes the group and the handle and routes it. Destroy the rig, also after a failure. */
ep_status rig_create(struct rig *r, const struct rig_meeting *m, int rank);
/* Only the group, or what is left to do after it. */
ep_status rig_group(struct rig *r, const struct rig_meeting *m, int rank);
ep_status rig_route(struct rig *r);
void rig_destroy(struct rig *r);

ep_status rig_dispatch(struct rig *r);
ep_status rig_combine(struct rig *r);
/* Whether what the call wrote is right. */
bool rig_dispatch_right(const struct rig *r);
bool rig_combine_right(const struct rig *r);
/* Dispatch and combine with checks. */
bool rig_pass(struct rig *r);

/* The rank's first messages of an operation, by hand; then it is silent. Of an uncached first
 * dispatch: that it is ready; counts that say 0 rows; counts that say 1 row for everybody, which
 * never comes, and where everybody's rows go. Of a combine after one dispatch: that it is ready. */
enum rig_said { RIG_READY, RIG_COUNTS, RIG_ROWS, RIG_COMBINE_READY };
void rig_say(struct rig *r, enum rig_said what);

/* Whoever touches the page of this row calls fn(arg) first, once; then the page is as before. One
 * trap at a time. fn may sleep, use atomics and end the process. */
void rig_trap(void *row, void (*fn)(void *arg), void *arg);
/* Rows in the middle of what dispatch sends to, and combine answers, all ranks. For a rank with one
 * worker. */
void *rig_middle_row(struct rig *r);
void *rig_middle_answer(struct rig *r);

/* What a process holds. */
struct rig_footprint {
    int fds, threads, arenas; /* arenas: mappings of the library's shared memory */
    int64_t allocs;
};
/* On a GPU first: opens the rank's device (-1: all that ranks use) and lets the library keep of it
 * what it keeps for good. */
void rig_warm(int rank);
/* Takes a footprint after the run-time has started what threads it starts by itself. Where the
 * driver is open only the library's threads are counted, and no descriptors of device files. */
struct rig_footprint rig_footprint(void);
/* Waits a moment for threads that are just ending; says what differs. */
bool rig_same_footprint(struct rig_footprint was);

/* Runs fn(rank, ctx) of all ranks as threads or processes, unless EP_TEST_RANKS says that there
 * are none: then *skipped is set. Returns how many failed. */
int rig_run(int num_ranks, bool processes, int (*fn)(int rank, void *ctx), void *ctx,
            bool *skipped);
/* After a fault the process can use its GPU; true on a host. */
bool rig_gpu_works(const struct rig *r);

/* The scale of all times that the library is told: TAP_TIMEOUT_SCALE. */
int rig_scale(void);
/* What `seconds` may become in a build that is slow, as sanitizers are; plainly: the same. */
double rig_within(double seconds);
/* Waits until *value is at least `least`; false after 20 s (scaled). */
bool rig_await(atomic_int *value, int least);
/* One sentence: not empty, one line, no cut, ends without a newline. */
bool rig_is_sentence(const char *text);

#endif
