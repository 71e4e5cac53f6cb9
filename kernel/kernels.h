/* SPDX-License-Identifier: MIT */
/*
 * The one list of kernels. From it follow the numbers that src/run gives them, the host bodies,
 * what is compiled for a GPU and when, and what the driver for tests can launch.
 *
 *   X(NAME, name, file, args, set)
 *
 * `name` is what K_KERNEL names in `file`; `args` is a struct of abi.h that begins with
 * K_OP_FIELDS. The kernels of a set are compiled and loaded together, when a group that needs one
 * of them is created: who never asks for a mode does not wait for its kernels.
 */
#ifndef KERNEL_KERNELS_H
#define KERNEL_KERNELS_H

#include "kernel/abi.h"

#define K_KERNELS(X)                                                                           \
    X(ROUTE, route, "kernel/route.k.c", k_route_args, THROUGHPUT)                              \
    X(LAYOUT, layout, "kernel/layout.k.c", k_layout_args, THROUGHPUT)                          \
    X(DISPATCH, dispatch, "kernel/dispatch.k.c", k_dispatch_args, THROUGHPUT)                  \
    X(COMBINE, combine, "kernel/combine.k.c", k_combine_args, THROUGHPUT)                      \
    X(LL_DISPATCH, ll_dispatch, "kernel/ll_dispatch.k.c", k_ll_dispatch_args, LOW_LATENCY)     \
    X(LL_COMBINE, ll_combine, "kernel/ll_combine.k.c", k_ll_combine_args, LOW_LATENCY)         \
    X(LL_MASKS, ll_masks, "kernel/ll_masks.k.c", k_ll_masks_args, LOW_LATENCY)

#define K_KERNEL_SETS(X) X(THROUGHPUT) X(LOW_LATENCY)

/* What a launch may carry, on every GPU and driver. */
#define K_MAX_ARG_BYTES 4096

#define K_ASSERT_ARGS(NAME, name, file, args, set)                                             \
    _Static_assert(sizeof(struct args) <= K_MAX_ARG_BYTES, #args);                             \
    _Static_assert(__builtin_offsetof(struct args, row_bytes) ==                               \
                       __builtin_offsetof(struct k_op, row_bytes),                             \
                   #args " begins with K_OP_FIELDS");
K_KERNELS(K_ASSERT_ARGS)
#undef K_ASSERT_ARGS

#endif
