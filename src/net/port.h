/* SPDX-License-Identifier: MIT */
/*
 * Between net.c, which has the queues, deadlines and lost peers, and a provider, which has the NIC.
 * One thread at a time, that of the endpoint. Nothing here is for others.
 */
#ifndef EPI_NET_PORT_H
#define EPI_NET_PORT_H

#include "src/net/net.h"

/* A write, from its call to its end. Provider memory, while it is posted. */
struct epi_net_op {
    void *scratch[8]; /* first, and the provider's */
    struct epi_net_write w;
    int peer;
    bool is_posted;
    int64_t deadline_ns; /* of epi_ran_ns() */
    struct epi_net_op *next,
        *before; /* writes to the peer in order of their calls; free ones */
};

struct epi_net_done {
    struct epi_net_op
        *op;          /* a posted one, which is not the provider's any more; or NULL: ... */
    uint32_t data;    /* ... of a write that has arrived */
    ep_status status; /* of an op */
    char why[EPI_NET_TEXT_BYTES / 2]; /* it failed */
};

/* A provider's endpoint begins with this. */
struct epi_net_port {
    const struct epi_net_ops *ops;
    struct epi_net_limits limits;
    char name[48];
};

struct epi_net_ops {
    size_t size;
    /* The defaults of the configuration have been filled in. */
    ep_status (*open)(struct epi_net_port **out, const struct epi_net_config *config);
    size_t (*address)(struct epi_net_port *port, void *out,
                      size_t room); /* 0: why is the text */
    ep_status (*add_peer)(struct epi_net_port *port, int peer, const void *address,
                          size_t bytes);
    ep_status (*add_region)(struct epi_net_port *port, struct epi_net_region *region);
    void (*remove_region)(struct epi_net_port *port, struct epi_net_region *region);
    /* EP_OK: `op` stays as it is until poll gives it back. EP_AGAIN: try again after a poll. Else it
     * cannot be done, and the text says why. */
    ep_status (*write)(struct epi_net_port *port, struct epi_net_op *op);
    int (*poll)(struct epi_net_port *port, struct epi_net_done *done, int max);
    /* Readable when poll may have something; -1: it has by now, or there is no such descriptor. */
    int (*wait_fd)(struct epi_net_port *port);
    /* Afterwards no op and no region is touched. */
    void (*close)(struct epi_net_port *port);
};

extern const struct epi_net_ops epi_net_fake, epi_net_fabric;

#endif
