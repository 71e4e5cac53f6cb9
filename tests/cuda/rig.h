/* SPDX-License-Identifier: MIT */
/*
 * The rig: several ranks of one process on one or several GPUs, each with its arena, its tables
 * and a stream, and the kernels of the library compiled for them. It fills the kernels' arguments
 * as src/ep does for host groups, with device memory. For GPU machines; see try.c.
 *
 * One thread drives it. Whatever the driver refuses ends the program with a sentence: this is a
 * program for finding out.
 */
#ifndef TESTS_CUDA_RIG_H
#define TESTS_CUDA_RIG_H

#include "kernel/abi.h"
#include "src/cu/cu.h"
#include "src/ep/plan.h"

#define RIG_MAX_RANKS 8
#define RIG_POISON 0xA5
#define RIG_ROW_POISON 0x7F /* in arenas: huge numbers in every float type */

/* How kernels are launched. */
struct rig_shape {
    int blocks, send_blocks, warps;
    int stages, stage_bytes; /* of each warp's mover */
};

enum rig_kernel { RIG_ROUTE, RIG_LAYOUT, RIG_DISPATCH, RIG_COMBINE, RIG_NUM_KERNELS };

struct rig_options {
    int num_ranks;
    bool multi_gpu;  /* rank r on device r; else all on device 0 */
    bool generic;    /* the mover of sm_80 */
    int cooperative; /* launches; -1: where a device has one rank */
    int64_t timeout_ms;
};

/* Kernels for one number of warps, on every device. */
struct rig_build {
    int warps;
    void *module[RIG_MAX_RANKS][3];
    struct epi_cu_kernel kernel[RIG_MAX_RANKS][RIG_NUM_KERNELS];
};

struct rig_rank {
    struct epi_cu_device *device;
    void *stream, *spare; /* spare: to look at memory while kernels run */
    void *begin, *end;    /* events */
    struct k_group g;     /* as the kernels get it: device addresses */
    struct k_handle h;
    uint64_t arena, tables, block, ctl;
    uint64_t *item; /* device memory of the current case */
    int num_items, max_items;
};

struct rig {
    struct rig_options o;
    struct epi_cu_device device[RIG_MAX_RANKS];
    int num_devices;
    bool cooperative;
    struct epi_nvrtc *nvrtc;
    struct rig_build build[8];
    int num_builds;
    struct rig_shape shape;
    struct ep_group_config config;
    struct epi_plan plan;
    struct rig_rank rank[RIG_MAX_RANKS];
    struct k_ctl *looked; /* pinned, one per rank */
    uint32_t *gate;       /* pinned; streams held by rig_hold wait for it */
    uint32_t gate_value;
    uint32_t epoch; /* operations launched */
};

/* Ends the program unless st is EP_OK. */
void rig_must(ep_status st, const char *what);

/* EP_ERR_UNSUPPORTED without a GPU, with its text. */
ep_status rig_open(struct rig *rig, const struct rig_options *o);
void rig_close(struct rig *rig);
/* Compiles for the shape's warps unless that is done; checks that all fits on the devices. False
 * with a printed reason if it does not. */
bool rig_use_shape(struct rig *rig, const struct rig_shape *shape);
/* Compiles all kernels for all architectures and prints what they need; no device is used.
 * Returns how many did not compile. */
int rig_compile_only(void);

/* Makes the arenas, tables and handles of a group; frees those of the last one. */
void rig_group(struct rig *rig, const struct ep_group_config *config);
void rig_free_group(struct rig *rig);

/* Device memory of a rank until rig_free_items. */
uint64_t rig_alloc(struct rig *rig, int rank, size_t bytes);
void rig_free_items(struct rig *rig);
void rig_in(struct rig *rig, int rank, uint64_t to, const void *from, size_t bytes);
void rig_out(struct rig *rig, int rank, void *to, uint64_t from, size_t bytes);
void rig_fill(struct rig *rig, int rank, uint64_t at, int byte, size_t bytes);
/* Fills the arena's data with numbers nobody sent. `all` false: only where answers land. */
void rig_poison_arena(struct rig *rig, int rank, bool all);

/* Queues a kernel; its arguments' struct is copied. */
void rig_launch(struct rig *rig, int rank, enum rig_kernel kernel, const void *args);
/* What a launch takes of shared memory per block. */
size_t rig_shared_bytes(const struct rig *rig, enum rig_kernel kernel);

/* Waits for all streams. If they do not end, prints every rank's words and ends the program. */
void rig_wait(struct rig *rig, const char *what);
/* rig_wait, then: has no rank faulted, and is each at the epoch it should be at? Prints. */
bool rig_sound(struct rig *rig, const char *what);
void rig_print_ranks(struct rig *rig);

/* Holds all streams until rig_release: queued kernels then start together. False: cannot. */
bool rig_hold(struct rig *rig);
void rig_release(struct rig *rig);

/* Seconds of a monotonic clock. */
double rig_now(void);

#endif
