/* SPDX-License-Identifier: MIT */
/*
 * The one list of kernels. From it follow the numbers that src/run gives them, the host bodies,
 * what is compiled for a GPU and when, and what the driver for tests can launch.
 *
 *   X(NAME, name, file, args, set, symbol)
 *
 * `args`, a struct of abi.h that begins with K_OP_FIELDS, is that of a K_KERNEL in `file`, whose
 * compiled name is `symbol`: in namespaces, because users of profilers look for `::dispatch` and
 * `::combine`, in either mode. The kernels of a set are compiled and loaded together, when a group
 * that needs one of them is created: who never asks for a mode does not wait for its kernels.
 */
#ifndef KERNEL_KERNELS_H
#define KERNEL_KERNELS_H

#include "kernel/abi.h"

#define K_KERNELS(X)                                                                           \
    X(ROUTE, route, "kernel/route.k.c", k_route_args, THROUGHPUT,                              \
      "_ZN7deep_ep10throughput5routeE12k_route_args")                                          \
    X(LAYOUT, layout, "kernel/layout.k.c", k_layout_args, THROUGHPUT,                          \
      "_ZN7deep_ep10throughput6layoutE13k_layout_args")                                        \
    X(DISPATCH, dispatch, "kernel/dispatch.k.c", k_dispatch_args, THROUGHPUT,                  \
      "_ZN7deep_ep10throughput8dispatchE15k_dispatch_args")                                    \
    X(COMBINE, combine, "kernel/combine.k.c", k_combine_args, THROUGHPUT,                      \
      "_ZN7deep_ep10throughput7combineE14k_combine_args")                                      \
    X(LL_DISPATCH, ll_dispatch, "kernel/ll_dispatch.k.c", k_ll_dispatch_args, LOW_LATENCY,     \
      "_ZN7deep_ep11low_latency8dispatchE18k_ll_dispatch_args")                                \
    X(LL_COMBINE, ll_combine, "kernel/ll_combine.k.c", k_ll_combine_args, LOW_LATENCY,         \
      "_ZN7deep_ep11low_latency7combineE17k_ll_combine_args")                                  \
    X(LL_MASKS, ll_masks, "kernel/ll_masks.k.c", k_ll_masks_args, LOW_LATENCY,                 \
      "_ZN7deep_ep11low_latency5masksE15k_ll_masks_args")

#define K_KERNEL_SETS(X) X(THROUGHPUT) X(LOW_LATENCY)

/* What a launch may carry, on every GPU and driver. */
#define K_MAX_ARG_BYTES 4096

#define K_ASSERT_ARGS(NAME, name, file, args, set, symbol)                                     \
    _Static_assert(sizeof(struct args) <= K_MAX_ARG_BYTES, #args);                             \
    _Static_assert(__builtin_offsetof(struct args, row_bytes) ==                               \
                       __builtin_offsetof(struct k_op, row_bytes),                             \
                   #args " begins with K_OP_FIELDS");
K_KERNELS(K_ASSERT_ARGS)
#undef K_ASSERT_ARGS

#endif
