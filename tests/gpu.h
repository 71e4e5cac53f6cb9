/* SPDX-License-Identifier: MIT */
/*
 * GPUs for tests. With EP_TEST_DEVICE=cuda the test programs make CUDA groups instead of host
 * groups and check the same; programs t_cuda_* do so wherever there is a device. In such a run:
 *
 *   EP_TEST_RANKS=threads|processes   all ranks are that, whatever a test says
 *   EP_TEST_ONE_GPU=1                 all ranks on device 0; else rank r on device r modulo their
 *                                     number
 *   EP_TEST_MEMORY=device|pinned|exact   what kernels get for the tests' buffers: device memory
 *                                     that is copied in and out around each call (the default),
 *                                     pinned host memory, or for each tensor device memory of
 *                                     exactly its size, so that compute-sanitizer sees what is
 *                                     read past its end; exact is for ranks that are processes,
 *                                     or one rank, because freeing may wait for kernels
 *   EP_TEST_DRIVER=1                  the driver is the one of tests/driver
 *
 * The driver does not survive a fork. The process that forks ranks therefore never opens it:
 * where ranks are threads they live in a forked process too, unless EP_TEST_RANKS=threads says
 * that this program forks nothing.
 */
#ifndef TESTS_GPU_H
#define TESTS_GPU_H

#include <limits.h>
#include <pthread.h>

#include "src/cu/cu.h"

/* ---- programs ------------------------------------------------------------------------------ */

/* Each begins with one of these. The first: for both kinds of groups. */
void gpu_program(void);
/* Of CUDA groups alone: skipped where there is no device, and in builds with sanitizers. */
void gpu_only(void);
/* Of host groups alone: skipped with EP_TEST_DEVICE=cuda. */
void gpu_never(const char *why);

bool gpu_wanted(void); /* groups are CUDA groups */
/* This process may open the driver now, because it will not fork ranks. */
bool gpu_may_open(void);
void gpu_forks_nothing(void);

/* Whether ranks are processes, where a test says `processes`. */
bool gpu_processes(bool processes);
/* In how many ways a test runs that is for both: one where EP_TEST_RANKS says which, else two. */
int gpu_ways(void);
/* Runs fn(rank, ctx) in threads or processes (ask gpu_processes), which may use the GPUs. Returns
 * how many failed. */
int gpu_run_ranks(int num_ranks, bool processes, int (*fn)(int rank, void *ctx), void *ctx,
                  int timeout_s);

/* Ends the program with "Bail out!" unless st is EP_OK. */
void gpu_must(ep_status st, const char *what);
/* NVRTC as this machine has it, for tests of compilation that need no device; else the program is
 * skipped. */
void gpu_nvrtc(char path[PATH_MAX]);
/* A function of the driver that src/cu does not use. */
void *gpu_symbol(const char *name);

/* ---- a rank's share of a device ------------------------------------------------------------ */

#define GPU_MAX_CHUNKS 16

/* Memory is handed out from chunks that are made when the rank begins, or when it needs more:
 * not one by one, because the driver may make an allocation wait for kernels. */
struct gpu_chunk {
    void *host; /* pinned */
    uint64_t device;
    size_t bytes, used;
    int num_pieces;
};

struct gpu {
    struct epi_cu_device device;
    bool own_stream;
    void *stream; /* in place of NULL; NULL itself where the rank is alone in its process */
    pthread_mutex_t mutex; /* guards the rest */
    struct gpu_chunk chunk[GPU_MAX_CHUNKS];
    int num_chunks;
    struct gpu *next; /* of those that are free */
};

/* The device of a rank (-1: that of the launcher's variables), or one by its index. */
int gpu_index(int rank);
struct gpu *gpu_open(int index, bool own_stream);
/* Kept for the next gpu_open; nothing is freed while kernels of other ranks run. */
void gpu_close(struct gpu **gpu);
/* Memory of the device is filled, copied out and right. */
bool gpu_works(struct gpu *g);

/* The same bytes twice: pinned memory, and device memory (with GPU_PINNED the same). 256-byte
 * aligned, of any contents. */
struct gpu_piece {
    uint8_t *host;
    uint64_t device;
    size_t bytes;
    int chunk;
};
void gpu_take(struct gpu *g, size_t bytes, struct gpu_piece *piece);
void gpu_give(struct gpu *g, struct gpu_piece *piece);
enum gpu_memory { GPU_DEVICE, GPU_PINNED, GPU_EXACT };
enum gpu_memory gpu_memory(void);

#endif
