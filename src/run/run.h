/* SPDX-License-Identifier: MIT */
/*
 * Runs kernels and queues work. L2: knows kernels by name and their arguments as bytes, nothing
 * of what they mean. On the host a kernel is a team of threads per block; a stream is one thread
 * with a queue.
 */
#ifndef EPI_RUN_H
#define EPI_RUN_H

#include "kernel/kernels.h"
#include "src/base/base.h"

#define EPI_KERNEL_ENUM(NAME, name, file, args, set, symbol) EPI_KERNEL_##NAME,
enum epi_kernel { K_KERNELS(EPI_KERNEL_ENUM) EPI_KERNEL_COUNT };
#undef EPI_KERNEL_ENUM

#define EPI_KERNEL_SET_ENUM(NAME) EPI_KERNEL_SET_##NAME,
enum epi_kernel_set { K_KERNEL_SETS(EPI_KERNEL_SET_ENUM) EPI_NUM_KERNEL_SETS };
#undef EPI_KERNEL_SET_ENUM

/* The files of a set's kernels, each once; returns how many. */
int epi_kernel_files(enum epi_kernel_set set, const char *files[EPI_KERNEL_COUNT]);

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
 * memory are set aside for each. `hooks` outlive the pool. */
ep_status epi_run_create(struct epi_run **out, int workers, size_t warp_bytes,
                         const struct k_hooks *hooks);
void epi_run_destroy(struct epi_run **run);

/* Runs a kernel with `workers` threads (at most the pool's) and returns when all have left it.
 * The calling thread is one of them. Kernels of one pool run one after the other. */
void epi_run_kernel(struct epi_run *run, enum epi_kernel kernel, const void *args, int workers);
/* The same for a kernel that waits for no peer: while the pool is busy, alone on this thread. */
void epi_run_local(struct epi_run *run, enum epi_kernel kernel, const void *args, int workers);

/* ---- kernels on a CUDA device (gpu.c) ------------------------------------------------------- */

struct epi_cu_device;
struct epi_gpu;

/* Of every launch: warps of a block, and the ring of each warp's mover. */
struct epi_gpu_shape {
    int warps, stages, stage_bytes;
    int most_stages; /* smaller ones, in the same ring */
};

/* Opens the device. `scratch_bytes` of shared memory are each warp's own. EP_ERR_UNSUPPORTED says
 * what is missing. */
ep_status epi_gpu_create(struct epi_gpu **out, int device, int scratch_bytes, bool generic);
/* Compiles of a set what is not compiled and loads what is not loaded; before the first launch of
 * its kernels. */
ep_status epi_gpu_load(struct epi_gpu *g, enum epi_kernel_set set);
/* After epi_gpu_idle. Waits a moment for its own memory to be free, and longer only if no rank of the
 * process has anything under way. */
void epi_gpu_destroy(struct epi_gpu **gpu);
/* Registers host memory, a mapping, for the kernels of all devices of the process. When no kernel
 * uses it any more, detach: it is unregistered and unmapped when a group begins or ends and no rank
 * of the process has anything under way, because that waits for every stream of the device. */
ep_status epi_gpu_attach(struct epi_gpu *g, void *host, size_t bytes, uint64_t *address);
void epi_gpu_detach(void *host);
const struct epi_cu_device *epi_gpu_device(const struct epi_gpu *g);
void *epi_gpu_stream(const struct epi_gpu *g); /* of high priority */
struct epi_gpu_shape epi_gpu_shape(const struct epi_gpu *g);

/* Of any contents, and does not wait: for streams that have called epi_gpu_zero for it. */
ep_status epi_gpu_reserve(struct epi_gpu *g, uint64_t *at, size_t bytes);
/* On the stream, after epi_gpu_begin; but in a capture at once, and in no graph. */
ep_status epi_gpu_zero(struct epi_gpu *g, void *stream, uint64_t at, size_t bytes);
/* Returns at once; the memory goes when what was launched so far has ended. */
void epi_gpu_free(struct epi_gpu *g, uint64_t *at);
/* Host memory that kernels write to at the same address, zeroed; neither call waits. Given back when
 * no kernel writes to it any more. */
#define EPI_GPU_CHUNK_BYTES 16384
ep_status epi_gpu_take_chunk(struct epi_gpu *g, void **chunk);
void epi_gpu_give_chunk(struct epi_gpu *g, void *chunk);
/* Copies that do not wait for kernels; done on return. */
ep_status epi_gpu_in(struct epi_gpu *g, uint64_t to, const void *from, size_t bytes);
ep_status epi_gpu_out(struct epi_gpu *g, void *to, uint64_t from, size_t bytes);

/* Launches that use one piece of memory and nothing else that kernels write: they follow each other
 * and those launches that name the piece, but no others. Captured ones are as all others. */
struct epi_gpu_apart {
    void *event;   /* its newest launch ... */
    bool pending;  /* ... of which there was one, and no other that named it since */
    bool was_used; /* by another, since that */
};
ep_status epi_gpu_apart_create(struct epi_gpu *g, struct epi_gpu_apart *a);
/* What was launched so far is from now on waited for like all else. */
void epi_gpu_apart_join(struct epi_gpu *g, struct epi_gpu_apart *a);
void epi_gpu_apart_destroy(struct epi_gpu *g, struct epi_gpu_apart *a);

/* Launches of a rank follow each other: begin, launch, one caller at a time. Begin makes the stream
 * wait for the launch before and for what was launched for `a` (may be NULL); if this one is `apart`,
 * for the second alone. *capturing (may be NULL): the stream is being captured. `join`: after the
 * kernel the stream waits for the launch before. */
ep_status epi_gpu_begin(struct epi_gpu *g, void *stream, struct epi_gpu_apart *a, bool apart,
                        bool *capturing);
ep_status epi_gpu_launch(struct epi_gpu *g, enum epi_kernel kernel, const void *args,
                         int blocks, void *stream, bool join);
ep_status epi_gpu_is_capturing(struct epi_gpu *g, void *stream, bool *capturing);
/* Begin on the device's own stream, which waits for what is on `stream` now, too. */
ep_status epi_gpu_fork(struct epi_gpu *g, void *stream, struct epi_gpu_apart *a);
/* Begin beside the last launch on the device's own stream: after what that one waits for. */
ep_status epi_gpu_beside(struct epi_gpu *g, void *stream);
/* EP_OK: all that was launched outside of captures has ended; EP_AGAIN. */
ep_status epi_gpu_idle(struct epi_gpu *g);
/* Or something of it may be replayed. */
bool epi_gpu_busy(const struct epi_gpu *g);

/* ---- streams -------------------------------------------------------------------------------- */

#define EPI_TASK_BYTES 2048

/* A queued piece of work: its argument is copied into the queue. Its status is kept for the next
 * synchronisation if it is the first that is not EP_OK, with the error text of the thread. */
typedef ep_status (*epi_task_fn)(void *arg);

ep_status epi_stream_create(ep_stream **out);
ep_status epi_event_create(ep_event **out);

/* Room for one task more, so that submit cannot fail. EP_ERR_NOMEM. Stream NULL needs none. */
ep_status epi_stream_reserve(ep_stream *stream);
/* Queues fn on the stream, which has room reserved for it, or with stream NULL calls it here and
 * returns its status. Does not block. */
ep_status epi_stream_submit(ep_stream *stream, epi_task_fn fn, const void *arg, size_t bytes);

#endif
