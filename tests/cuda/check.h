/* SPDX-License-Identifier: MIT */
/*
 * Checks: a test case and what its ranks ask for, run on the rig's GPUs and compared byte by byte
 * with the reference of tests/ref.h.
 */
#ifndef TESTS_CUDA_CHECK_H
#define TESTS_CUDA_CHECK_H

#include "tests/cuda/rig.h"
#include "tests/trial.h"

extern int num_passed, num_failed;

/* The last of a line of checks: counts and prints it. */
bool check(bool good, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Inputs of one rank in device memory. */
struct inputs {
    struct k_array ids, mask, x, scales, weights;
};

/* A copy of a host tensor in device memory, with its strides. */
struct k_array mirror(struct rig *rig, int rank, const struct ep_tensor *t);
/* The same array elsewhere. */
struct k_array array_at(const struct ep_tensor *t, uint64_t at);

void fill_route(const struct rig *rig, int rank, const struct test_case *c,
                const struct inputs *in, struct k_route_args *a);
/* All but the outputs: flags SEND and RECV, and COUNTS if uncached. */
void fill_dispatch(const struct rig *rig, int rank, const struct test_case *c,
                   const struct inputs *in, bool cached, int slot, struct k_dispatch_args *a);
void fill_combine(const struct rig *rig, int rank, const struct test_case *c, int dtype,
                  int64_t hidden, struct k_combine_args *a);

/* Runs the case (built by the caller) through all forms. False: a rank has faulted, the rig's
 * group is of no more use. */
bool check_case(struct rig *rig, struct test_case *c, const char *name);

#endif
