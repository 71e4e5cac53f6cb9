/* SPDX-License-Identifier: MIT */
/*
 * What a rank of a group of several nodes has of the network: an endpoint, memory that others write to,
 * and the proxy that writes for its kernels. Made and closed with the group; of a group of one node there
 * is nothing of it.
 */
#ifndef EPI_WIRES_H
#define EPI_WIRES_H

#include "src/ep/group.h"
#include "src/proxy/proxy.h"

struct epi_wires;

/* Collective; *out stays NULL for one node. EP_ERR_UNSUPPORTED says of each provider why it is not used. */
ep_status epi_wires_create(struct epi_wires **out, ep_group *g, const struct epi_exchange *x);
/* Nothing is written any more, here or by others, and the thread has ended; before the control star goes.
 * Waits, up to a second or two, for peers that may need what is under way; after a fault for nobody. */
void epi_wires_stop(struct epi_wires *w);
void epi_wires_free(struct epi_wires **wires, bool forked);

/* The registered memory of plan.net_bytes, whose peers are numbered by rank. */
void *epi_wires_staging(const struct epi_wires *w);
const struct k_net *epi_wires_net(const struct epi_wires *w);
struct epi_proxy_counts epi_wires_counts(const struct epi_wires *w);
/* An operation begins: the proxy may be asleep. */
void epi_wires_wake(struct epi_wires *w);

/* Why this rank cannot write to `rank`; "" where it can. */
const char *epi_wires_why(const struct epi_wires *w, int rank);

#endif
