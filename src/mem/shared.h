/* SPDX-License-Identifier: MIT */
/*
 * Inside src/mem: one shared memory object and how its descriptor travels.
 */
#ifndef EPI_MEM_SHARED_H
#define EPI_MEM_SHARED_H

#include "src/mem/mem.h"

/* What says that two processes may share a host: kernel boot and network namespace. A hint that
 * saves waiting; the proof is the descriptor that arrives. */
struct epi_host_hint {
    uint64_t boot[2];
    uint64_t net_inode;
};
void epi_host_hint(struct epi_host_hint *out);

/* A sealed memfd of `bytes`, fully allocated, or -1 with the error told in *st. */
int epi_memfd_create(size_t bytes, ep_status *st);

#define EPI_FD_TOKEN 24

/* Listens on an abstract Unix socket named by `token`, which it makes up. -1 on error. */
int epi_fd_listen(uint8_t token[EPI_FD_TOKEN], ep_status *st);
/* Serves `fd` to `count` processes of this user that know the token; they have connected. */
ep_status epi_fd_serve(int listener, const uint8_t token[EPI_FD_TOKEN], int fd, int count,
                       struct epi_deadline deadline);
/* Connects to who serves the descriptor, and does not wait until it does. -1 on error. */
int epi_fd_connect(const uint8_t token[EPI_FD_TOKEN], struct epi_deadline deadline,
                   ep_status *st);
/* Waits for the descriptor on such a connection; -1 on error. */
int epi_fd_receive(int s, struct epi_deadline deadline, ep_status *st);

#endif
