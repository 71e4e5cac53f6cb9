/* SPDX-License-Identifier: MIT */
/* A CUDA device as src/mem takes it. */
#ifndef EPI_CUDA_MEMORY_H
#define EPI_CUDA_MEMORY_H

#include "src/mem/mem.h"

struct epi_gpu;

/* Borrows the GPU until all ranks of the process have left the group's memory. */
struct epi_mem_device epi_cuda_memory(struct epi_gpu *gpu);

#endif
