/* SPDX-License-Identifier: MIT */
/*
 * Between nodes: an endpoint writes into memory that peers have registered, and each write tells
 * the peer 32 bits when its bytes are there. That is all a NIC is asked for; docs/decisions/0014
 * says why it is enough.
 *
 * What holds of a write, on every provider:
 *   - its bytes may be read at the peer once the peer has polled EPI_NET_ARRIVED with its data, which
 *     comes exactly once, and tells nothing of any other write: there is no order between writes;
 *   - its source may be changed once EPI_NET_SENT has been polled here, which tells nothing of the
 *     peer: the bytes may not be there yet;
 *   - it ends within the timeout: with EPI_NET_SENT, or with one EPI_NET_LOST for all writes to that
 *     peer. Nothing that happens to one peer delays writes to another.
 * A peer that does not poll takes a bounded number of writes; then its writers wait.
 *
 * Threads: one at a time for each endpoint, from open to close (what one does must happen before
 * what the next does). Endpoints have nothing in common, also in one process.
 * Must not: block (but in open and close), allocate, lock or call the system in write and poll,
 * beyond what the provider does; start a thread; log.
 */
#ifndef EPI_NET_H
#define EPI_NET_H

#include "src/base/base.h"

#define EPI_NET_ADDRESS_BYTES 320 /* the most that an endpoint's address has */
#define EPI_NET_MAX_PEERS 1024
#define EPI_NET_TEXT_BYTES 240

struct epi_net;

/* What the fake does wrong, all of it decided by the seed and by counting calls: fake.c. */
struct epi_net_faults {
    uint64_t seed;
    uint32_t max_delay; /* polls that the bytes of a write, and then its data, may be late */
    uint32_t connect_tries;         /* writes to each peer that find it not connected yet */
    uint32_t again_permille;        /* writes that find the NIC busy */
    uint32_t lost_sent_permille;    /* writes of which the sender never hears */
    uint32_t lost_arrived_permille; /* writes whose data never arrives */
    uint64_t kill_at;               /* at its n-th call the endpoint is dead; 0: never */
    int again_peer;                 /* 1 + the peer that is never connected; 0: none */
    int cut_peer;                   /* 1 + the peer to which the link goes down; 0: none */
    uint32_t cut_at, cut_polls;     /* from that write on, for so many polls; 0: for ever */
    uint64_t max_write_bytes;       /* 0: 4096 */
    uint32_t max_regions;           /* 0: 16 */
};

struct epi_net_config {
    int self, num_peers; /* self is one of the numbers, and no peer */
    int max_in_flight;   /* writes to each peer that are under way or wait; 0: 64 */
    int64_t timeout_ns;  /* of a write; 0: EP_TIMEOUT_MS */
    const char *
        provider; /* a name of libfabric's, "fake", or "fake:SEED", which is also slow and busy, "fake:SEED:N", which also loses N of a thousand completions at each end; NULL:
                      EP_NET_PROVIDER, else a choice */
    const char *interface; /* a domain of libfabric's; NULL: EP_NET_IFNAME, else the first */
    const struct epi_net_faults *faults; /* of the fake; NULL: none */
    bool device_memory;                  /* regions in GPU memory are wanted */
};

struct epi_net_limits {
    uint64_t max_write_bytes;
    bool device_memory;
};

/* A part of a peer's memory: what its owner gave away. To be sent as it is. */
struct epi_net_remote {
    uint64_t key, base, bytes;
};

/* Memory that peers may write to, and from which this endpoint writes. */
struct epi_net_region {
    void *start;
    uint64_t bytes;
    int device; /* -1: host memory; else the CUDA device */
    struct epi_net_remote remote;
    void *handle; /* the provider's */
};

struct epi_net_write {
    const struct epi_net_region *from; /* must not move while the write is under way */
    uint64_t from_offset;
    struct epi_net_remote to;
    uint64_t to_offset;
    uint64_t bytes; /* 1..max_write_bytes */
    uint32_t data;
    uint64_t token; /* the caller's; comes back with EPI_NET_SENT */
};

enum epi_net_event_kind { EPI_NET_SENT = 1, EPI_NET_ARRIVED, EPI_NET_LOST };

struct epi_net_event {
    enum epi_net_event_kind kind;
    int peer;       /* of SENT and LOST; who has written is not known, unless `data` says it */
    uint32_t data;  /* of ARRIVED */
    uint64_t token; /* of SENT */
    ep_status
        status; /* of LOST: EP_ERR_TIMEOUT, EP_ERR_PEER, or why the write cannot be done */
    const char
        *why; /* of LOST: a sentence that names the peer; lasts as long as the endpoint */
};

/*
 * EP_ERR_UNSUPPORTED names each provider and why it is not used; EP_ERR_ARG; EP_ERR_NOMEM;
 * EP_ERR_SYSTEM.
 */
ep_status epi_net_open(struct epi_net **out, const struct epi_net_config *config);

/* Gives what is under way until the deadline to leave, then takes the memory back from the NIC.
 * Regions are closed, too. What arrives meanwhile is forgotten. */
void epi_net_close(struct epi_net **net, struct epi_deadline deadline);

const char *epi_net_provider(const struct epi_net *net);
struct epi_net_limits epi_net_limits(const struct epi_net *net);

/* By which others reach this endpoint: opaque, at most EPI_NET_ADDRESS_BYTES; how many. */
size_t epi_net_address(const struct epi_net *net, void *out);
/* Once for each peer, before the first write to it; the peer does the same. EP_ERR_MISMATCH: it has
 * another provider. EP_ERR_ARG: that is no address. EP_ERR_PEER: nobody is there any more, where the
 * provider can tell. */
ep_status epi_net_add_peer(struct epi_net *net, int peer, const void *address, size_t bytes);

/* EP_ERR_UNSUPPORTED: the provider takes no memory of that kind; EP_ERR_CAPACITY: no more regions. */
ep_status epi_net_register(struct epi_net *net, void *start, uint64_t bytes, int device,
                           struct epi_net_region *out);
/* Nothing of it may be under way; what a lost peer was to get may be until close, which closes regions
 * itself. Who still writes there is refused. */
void epi_net_unregister(struct epi_net *net, struct epi_net_region *region);

/*
 * EP_OK: it has begun, or will; what becomes of it is an event. EP_AGAIN: max_in_flight writes to this
 * peer have not ended yet. EP_ERR_ARG: it is outside of a region, or too large. EP_ERR_STATE: no such
 * peer was added. EP_ERR_PEER, EP_ERR_TIMEOUT: the peer was lost, with the sentence of its event.
 */
ep_status epi_net_write(struct epi_net *net, int peer, const struct epi_net_write *write);
/* Moves everything on, and returns how many events it has told, up to max. */
int epi_net_poll(struct epi_net *net, struct epi_net_event *events, int max);
/* A descriptor to sleep on after a poll that told nothing: readable when there may be an event. -1: poll
 * again, or after a short sleep. Also then deadlines, and writes that the NIC has refused, want polls. */
int epi_net_wait_fd(struct epi_net *net);
/* Writes that have not ended. */
int epi_net_under_way(const struct epi_net *net);
/* Somebody else knows that the peer is gone: its writes end, with EPI_NET_LOST and this reason. */
void epi_net_give_up(struct epi_net *net, int peer, ep_status status, const char *why);

/* ---- what there is, for `ep doctor` --------------------------------------------------------- */

struct epi_net_found {
    char name[48];
    char domains[80]; /* its interfaces, or some of them */
    char why[120];    /* it is not used; "" for the one that would be */
};
/* How many of libfabric's providers were found, up to max, in the order of preference. 0: epi_error_text()
 * says why there are none. */
int epi_net_find(struct epi_net_found *found, int max, char version[16]);

#endif
