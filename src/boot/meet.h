/* SPDX-License-Identifier: MIT */
/*
 * The rendezvous over TCP: from addresses to open connections. See meet_root.c, meet_peer.c.
 */
#ifndef EPI_BOOT_MEET_H
#define EPI_BOOT_MEET_H

#include "src/base/base.h"
#include "src/boot/conn.h"
#include "src/boot/sock.h"

#define EPI_MEET_MAX_ADDRS 8
/* An answer that is owed after the deadline: who is missing, or why one was turned away. */
#define EPI_MEET_GRACE_NS (EPI_NS_PER_S / 2)

struct epi_meet {
    int rank;
    int num_ranks;
    uint64_t job;
    bool is_job_named; /* a rank of this job with another idea of it makes all ranks fail */
    struct epi_addr addrs[EPI_MEET_MAX_ADDRS]; /* of rank 0, in the order to be tried */
    int num_addrs;
    char host[256]; /* instead of addrs, when not empty: a name, resolved while waiting */
    int port;
    char where[300]; /* rank 0's address, for people */
    int64_t timeout_ns;
    struct epi_deadline deadline;
};

/* Where rank 0 listens; *fd is the listener. */
ep_status epi_meet_listen(const struct epi_meet *meet, int *fd);
/* Rank 0: fills conns[1..num_ranks-1]; on failure all are closed, and told why. */
ep_status epi_meet_root(const struct epi_meet *meet, int listen_fd, struct epi_conn *conns);
/* Rank 0: all are here; queued, sent by whoever flushes the connections next. */
void epi_meet_start(struct epi_conn *conns, int num_ranks);
/* Rank 0: gives up; tells every open connection and closes it. */
void epi_meet_reject_all(struct epi_conn *conns, int num_ranks, ep_status status,
                         const char *text);
/* Others: a connection to rank 0, after its START. */
ep_status epi_meet_peer(const struct epi_meet *meet, struct epi_conn *conn);

uint32_t epi_meet_version(void);

#endif
