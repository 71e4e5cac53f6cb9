/* SPDX-License-Identifier: MIT */
/*
 * Ranks that are threads of one process. See world.c.
 */
#ifndef EPI_BOOT_WORLD_H
#define EPI_BOOT_WORLD_H

#include "src/base/base.h"

struct epi_session;

int epi_world_num_ranks(ep_world *world);
/* Collective: waits for all ranks of the world. */
ep_status epi_world_join(ep_world *world, int rank, int64_t timeout_ns,
                         struct epi_session **out);
ep_status epi_world_allgather(struct epi_session *session, int rank, const void *in,
                              size_t bytes, void *out, struct epi_deadline deadline);
void epi_world_leave(struct epi_session *session, int rank);

#endif
