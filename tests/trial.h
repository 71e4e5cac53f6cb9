/* SPDX-License-Identifier: MIT */
/*
 * A trial: one case, what every rank asks for, and what the reference says every rank must get,
 * from dispatch and from combine. A run: one rank's buffers for one trial. Every byte that the
 * library might write is compared with an image of what it must contain afterwards: the value,
 * or the 0xA5 that was there before where the header promises nothing.
 *
 * A trial is built before the ranks start and read-only from then on. A run belongs to a rank.
 */
#ifndef TESTS_TRIAL_H
#define TESTS_TRIAL_H

#include "tests/cases.h"
#include "tests/world.h"

enum trial_output {
    OUT_X,
    OUT_SCALES,
    OUT_IDS,
    OUT_WEIGHTS,
    OUT_SOURCE,
    OUT_COUNTS,
    OUT_OFFSETS,
    OUT_SOURCE_ENDS,
    OUT_EXPERT_ENDS,
    OUT_NUM_ROWS,
    OUT_Y,      /* of combine */
    OUT_Y_TOPK, /* its top-k weights */
    NUM_OUTPUTS
};

/* What a rank may choose for itself, whatever the others do. */
struct form {
    bool expanded, zero_gaps, arena, columns;
    bool two_step; /* begin, counts, finish; begin and finish of combine */
    bool padded;   /* strides of rows larger than their length, in outputs and answers */
    bool weighted;
    int num_bias;
    int32_t alignment;
    int64_t slack; /* rows of capacity beyond those needed */
    int id_dtype;
    int num_workers;
    unsigned skip; /* bit i: output i is not asked for */
};

struct trial {
    const struct test_case *c;
    struct form *form; /* [R]; to be changed between trial_init and trial_build */
    int dtype;         /* of combine, as are: */
    int64_t hidden;
    bool back; /* top-k weights go back */

    struct pool pool;
    struct ref_recv *recv;       /* [R] */
    struct ref_answers *answers; /* [R] */
    uint8_t **bias[2];           /* [R] packed, or NULL */
    uint8_t **y;                 /* [R] packed */
    float **y_topk;              /* [R] */
};

/* Compact, one call, unpadded and plain on all ranks; combine in bf16. The case is built. */
void trial_init(struct trial *t, const struct test_case *c);
/* A random form on every rank, and a random combine. */
void trial_random(struct trial *t, uint64_t seed);
/* The same form on every rank. */
void trial_form(struct trial *t, const struct form *form);
void trial_build(struct trial *t);
/* The results again, after a test has changed the answers. */
void trial_rebuild(struct trial *t);
void trial_free(struct trial *t);
/* A group that is just large enough, or has room for more experts. */
void trial_setup(struct world_setup *s, const struct trial *t);

struct output {
    struct ep_tensor t;
    uint8_t *got, *want, *any; /* [bytes], with guards on both sides; any: not compared */
    size_t bytes;
};

struct run {
    struct world *w;
    const struct trial *t;
    const struct form *form;
    struct pool pool;
    struct output out[NUM_OUTPUTS];
    struct ep_tensor view; /* recv_x where it is a view of the arena */
    struct ep_tensor answers, weights, topk, bias[2];
    struct ep_dispatch_args dispatch;
    struct ep_combine_args combine;
};

void run_create(struct run *r, struct world *w, const struct trial *t);
void run_free(struct run *r);
/* Routes the handle as the case says. */
ep_status run_route(struct run *r, ep_handle *handle, void *stream);
void run_poison(struct run *r, enum trial_output from, enum trial_output to);
/* Poisons the outputs and calls. With a stream, synchronise it before the checks. */
ep_status run_dispatch(struct run *r, ep_handle *handle, void *stream);
ep_status run_combine(struct run *r, ep_handle *handle, void *stream);
bool run_check_dispatch(struct run *r, ep_handle *handle);
/* The same without ep_handle_counts. */
bool run_check_outputs(struct run *r);
bool run_check_combine(struct run *r);
/* The rows of a tensor (num_rows of them at least) against those the dispatch must give. */
bool run_check_rows(struct run *r, const struct ep_tensor *rows);

/* Route, dispatch and combine with all checks; NULL stream. */
void trial_pass(struct world *w, const struct trial *t, ep_handle *handle);
/* A body whose ctx is the trial: one pass with a handle of its own. */
void trial_body(struct world *w);
/* One pass of a trial on a group of its own, as threads or processes: one test point. */
bool trial_run(const struct trial *t, bool processes, const char *name);
/* Builds and runs a case with the same form on all ranks, and frees it. */
bool trial_with(struct test_case *c, const struct form *form, void (*body)(struct world *w),
                bool processes, const char *name);
/* The same with trial_body. */
bool trial_case(struct test_case *c, const struct form *form, bool processes, const char *name);

#endif
