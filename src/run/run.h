/* SPDX-License-Identifier: MIT */
/*
 * Runs kernels and queues work. L2: knows kernels by name and their arguments as bytes, nothing
 * of what they mean. On the host a kernel is a team of threads per block; a stream is one thread
 * with a queue.
 */
#ifndef EPI_RUN_H
#define EPI_RUN_H

#include "src/base/base.h"

enum epi_kernel {
    EPI_KERNEL_ROUTE,
    EPI_KERNEL_LAYOUT,
    EPI_KERNEL_DISPATCH,
    EPI_KERNEL_COMBINE,
    EPI_KERNEL_COUNT
};

/* Threads that run one rank's kernels, one kernel at a time. */
struct epi_run;

/* How `workers` threads are arranged: blocks of warps. One block unless there are enough threads
 * for some to receive while others send. */
struct epi_grid {
    int blocks, warps;
    int send_blocks;
};
struct epi_grid epi_run_grid(int workers);

/* `workers` is the most threads a kernel can have, the caller's included; `warp_bytes` of shared
 * memory are set aside for each. */
ep_status epi_run_create(struct epi_run **out, int workers, size_t warp_bytes);
void epi_run_destroy(struct epi_run **run);

/* Runs a kernel with `workers` threads (at most the pool's) and returns when all have left it.
 * The calling thread is one of them. Kernels of one pool run one after the other. */
void epi_run_kernel(struct epi_run *run, enum epi_kernel kernel, const void *args, int workers);

/* ---- streams -------------------------------------------------------------------------------- */

#define EPI_TASK_BYTES 2048

/* A queued piece of work: its argument is copied into the queue. Its status is kept for the next
 * synchronisation if it is the first that is not EP_OK, with the error text of the thread. */
typedef ep_status (*epi_task_fn)(void *arg);

/* Queues fn on the stream, or with stream NULL calls it here and returns its status. Blocks only
 * while the queue is full. */
ep_status epi_stream_submit(ep_stream *stream, epi_task_fn fn, const void *arg, size_t bytes);

#endif
