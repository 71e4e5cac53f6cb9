/* SPDX-License-Identifier: MIT */
/*
 * When it is safe to ask the driver for what waits for every stream of a device; see gpu_retire.c.
 * For gpu.c.
 */
#ifndef EPI_GPU_RETIRE_H
#define EPI_GPU_RETIRE_H

#include <stdatomic.h>

#include "src/cu/cu.h"
#include "src/run/run.h"

/* Of each rank of this process on a device. */
struct epi_gpu_activity {
    const struct epi_cu_device *device;
    void *last;           /* event: the newest launch outside of captures ... */
    atomic_bool launched; /* ... of which there was one */
    atomic_bool captured; /* graphs may replay something: nobody sees when */
    atomic_int apart;     /* pieces of memory with launches that `last` is not behind */
    struct epi_gpu_activity *next;
};

void epi_gpu_activity_begin(struct epi_gpu_activity *a);
void epi_gpu_activity_end(struct epi_gpu_activity *a);
/* Whether something of it may be under way. */
bool epi_gpu_activity_goes_on(const struct epi_gpu_activity *a);

/* Around a launch and what makes it seen: `launched` and the record of `last`, or `captured`. */
void epi_gpu_launch_begin(void);
void epi_gpu_launch_end(void);

/* Host memory for kernels, as of epi_cu_register. */
ep_status epi_gpu_register(const struct epi_cu_device *d, void *host, size_t bytes,
                           uint64_t *address);
/* No kernel uses it any more: it is unregistered and unmapped when nothing that was launched can be
 * waited for. */
void epi_gpu_unregister(void *host);
/* Does that for all of it, if it may be now. */
void epi_gpu_free_retired(void);

#endif
