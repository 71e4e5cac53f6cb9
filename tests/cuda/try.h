/* SPDX-License-Identifier: MIT */
/*
 * Timing, for try.c: one shape of launch after the other on one large problem.
 */
#ifndef TESTS_CUDA_TRY_H
#define TESTS_CUDA_TRY_H

#include "tests/cuda/check.h"

struct timing {
    int num_tokens, hidden, topk, num_experts;
    int warmup, iterations;
    const struct rig_shape *shapes;
    int num_shapes;
};

/* False: a rank has faulted. */
bool time_all(struct rig *rig, const struct timing *t);

#endif
