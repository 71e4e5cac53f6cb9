/* SPDX-License-Identifier: MIT */
/*
 * Notices: what the kernels of a CUDA group's handles tell the host, one for each handle, in host
 * memory. There are as many as are asked for. The group's mutex guards them.
 */
#ifndef EPI_NOTICES_H
#define EPI_NOTICES_H

#include "src/run/run.h"

struct epi_notices {
    struct epi_notice_chunk *first;
};

/* One that no handle has; blank, but kernels of the handle that had it before may still write to
 * it: what they write names that handle. Does not wait. */
ep_status epi_notice_take(struct epi_notices *n, struct epi_gpu *gpu, struct k_counts **out);
void epi_notice_give(struct epi_notices *n, struct k_counts *notice);
/* When no kernel writes to any. */
void epi_notices_free(struct epi_notices *n, struct epi_gpu *gpu);

#endif
