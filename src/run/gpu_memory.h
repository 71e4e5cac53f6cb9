/* SPDX-License-Identifier: MIT */
/*
 * A device's memory as the ranks of a process share it; see gpu_memory.c. For gpu.c.
 */
#ifndef EPI_GPU_MEMORY_H
#define EPI_GPU_MEMORY_H

#include "src/cu/cu.h"
#include "src/run/run.h"

struct epi_gpu_memory;

ep_status epi_gpu_memory_open(struct epi_gpu_memory **out, int device);
void epi_gpu_memory_close(struct epi_gpu_memory **memory);
void *epi_gpu_memory_pool(const struct epi_gpu_memory *m);
/* A chunk of EPI_GPU_CHUNK_BYTES, zeroed; given back when no kernel writes to it any more. */
ep_status epi_gpu_memory_take(struct epi_gpu_memory *m, void **chunk);
void epi_gpu_memory_give(struct epi_gpu_memory *m, void *chunk);

#endif
