/* SPDX-License-Identifier: MIT */
/*
 * The thread that writes to other nodes for a rank's kernels, and tells them what has arrived: between
 * a ring in memory that kernels share (kernel/abi_net.h) and an endpoint of src/net.
 *
 * Any thread may start, wake and stop it, one at a time. While it runs the endpoint is its own.
 * Must not know what is in the rows; allocates, locks and calls the system for no write.
 */
#ifndef EPI_PROXY_H
#define EPI_PROXY_H

#include "kernel/abi.h"
#include "src/net/net.h"

struct epi_proxy;

struct epi_proxy_config {
    struct epi_net *net; /* of at least lanes * slots * K_PUT_KINDS writes in flight */
    int self, num_peers, num_lanes, num_slots; /* slots: a power of two */
    const struct epi_net_region *from;         /* this rank's region */
    const struct epi_net_remote *to;           /* [num_peers] the peers'; both outlive it */
    void *shared;   /* epi_proxy_bytes of zeroed memory that kernels reach, 64-byte aligned */
    k_u64 *tickets; /* 0; in the kernels' own memory */
    /* On its thread, once for each peer that is lost. May not call the proxy. */
    void (*on_lost)(void *ctx, int peer, ep_status status, const char *why);
    /* The same thread looks at what its owner has to look at: now and then, when idle each 20 ms. Or NULL. */
    void (*on_look)(void *ctx);
    void *ctx;
};

uint64_t epi_proxy_bytes(int num_peers, int num_lanes, int num_slots);
ep_status epi_proxy_start(struct epi_proxy **out, const struct epi_proxy_config *config);
/* The endpoint is the caller's again. What kernels have handed over and was not sent by the deadline is
 * forgotten. */
void epi_proxy_stop(struct epi_proxy **proxy, struct epi_deadline deadline);

const struct k_net *epi_proxy_net(const struct epi_proxy *proxy); /* for kernels */
/* There will be work: an idle proxy sleeps for a millisecond at a time, after some seconds longer. */
void epi_proxy_wake(struct epi_proxy *proxy);

struct epi_proxy_counts {
    uint64_t writes, bytes, arrived;
    uint64_t dropped; /* writes to a peer that is lost, or that were wrong */
    uint64_t held_up; /* looks at a write that the endpoint took no sooner */
};
struct epi_proxy_counts epi_proxy_counts(const struct epi_proxy *proxy);

#endif
