/* SPDX-License-Identifier: MIT */
/*
 * A decode step for tests of low-latency mode: one case, what the reference says each rank must get from
 * dispatch and combine, and a rank's buffers for it. Every byte that may be written is compared with
 * what it must be afterwards: the value, or the 0xA5 of before where nothing may be written.
 *
 * A step is built before the ranks start and read-only from then on. A run belongs to a rank.
 */
#ifndef TESTS_LL_H
#define TESTS_LL_H

#include "tests/calls.h"
#include "tests/cases.h"
#include "tests/world.h"

struct ll_step {
    struct test_case c;
    int max_tokens;     /* M of the call; at least the case's */
    uint32_t flags;     /* EP_LL_... */
    bool packed;        /* scales as exponents, four in an element */
    bool named_experts; /* the calls name the case's, the group has more */
    bool exact, logfmt; /* combines */
    bool weights_now;   /* given to combine; those of the dispatch are not these */
    int num_workers;
    unsigned gone;   /* bits: ranks of which nothing comes; what the others get without them */
    bool all_values; /* rows of bf16 have every value, 65,536 elements on each rank */

    struct pool pool;
    struct ref_recv *recv;       /* [R] */
    struct ref_answers *answers; /* [R] of the experts */
    uint8_t **y;                 /* [R] what combine gives */
    int num_encoded;             /* blocks of its answers, in LogFMT */
    struct ep_tensor *now;       /* [R] weights given to combine */
};

/* Rows of 256 channels of bf16, with weights, M the case's; to be changed before ll_build. */
void ll_init(struct ll_step *s, int num_ranks, uint64_t seed);
void ll_build(struct ll_step *s);
void ll_free(struct ll_step *s);
/* A group that is just large enough. */
void ll_setup(struct world_setup *w, const struct ll_step *s);

/* Steps of several shapes, for one group that is large enough for each. */
#define LL_STEPS 4
struct ll_steps {
    struct ll_step s[LL_STEPS];
    uint64_t seed;
};
void ll_steps_build(struct ll_steps *all, int num_ranks, uint64_t seed);
void ll_steps_free(struct ll_steps *all);
/* The group, whose ranks run `body` with the steps as their context. */
void ll_steps_setup(struct world_setup *w, struct ll_steps *all, void (*body)(struct world *));

enum {
    LL_X,
    LL_SCALES,
    LL_IDS,
    LL_WEIGHTS,
    LL_SOURCE,
    LL_COUNTS,
    LL_RANGES,
    LL_TOTALS,
    LL_HANDLE,
    LL_Y,
    LL_OUTPUTS
};

struct ll_run {
    struct world *w;
    const struct ll_step *s;
    struct pool pool;
    struct ep_tensor t[LL_OUTPUTS];
    uint8_t *got[LL_OUTPUTS], *want[LL_OUTPUTS];
    size_t bytes[LL_OUTPUTS];
    struct ep_tensor answers;
    struct ep_ll_dispatch_args dispatch;
    struct ep_ll_combine_args combine;
};

void ll_create(struct ll_run *r, struct world *w, const struct ll_step *s);
void ll_destroy(struct ll_run *r);
/* The outputs are poisoned once before so many dispatches: totals are what these add to the poison. */
void ll_expect(struct ll_run *r, int dispatches);
/* Call; with CALL_BOTH and CALL_SEND after the outputs were poisoned. */
ep_status ll_dispatch(struct ll_run *r, enum call_half half, void *stream);
ep_status ll_combine(struct ll_run *r, enum call_half half, void *stream);
bool ll_check_dispatch(struct ll_run *r);
bool ll_check_combine(struct ll_run *r);

/* Dispatch and combine with all checks, in one call each or in halves. */
bool ll_pass(struct ll_run *r, bool halves);
/* Builds the step, runs a pass of each sort on a group of its own, and frees it: one test point. */
bool ll_case(struct ll_step *s, bool processes, const char *name);

#endif
