/* SPDX-License-Identifier: MIT */
/*
 * Opens, connects and closes the endpoint and the proxy of a rank between nodes, and says when a peer
 * cannot be written to. Owns the registered memory. Run by the threads that create and destroy groups; the
 * proxy's thread calls on_lost and on_look, which must not block.
 */
#include "src/ep/wires.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* A peer that cannot be written to has died or left more often than not: the control star says so first. */
#define DOUBT_NS (2 * EPI_NS_PER_S)
/* How long a rank stays for peers that may be in its last operation still. */
#define STAY_NS EPI_NS_PER_S
#define DRAIN_NS EPI_NS_PER_S

/* What the proxy has to say of a rank. */
struct lost {
    atomic_int status; /* EP_OK: it can be written to */
    int64_t since;
    const char *why; /* both: before the status */
};

struct epi_wires {
    ep_group *g;
    struct epi_net *net;
    struct epi_proxy *proxy;
    struct epi_net_region region;
    void *staging; /* NULL: none */
    size_t bytes;
    void *shared; /* the proxy's with kernels */
    k_u64 *tickets;
    struct epi_net_remote *to; /* [num_ranks] */
    struct lost *lost;         /* [num_ranks] */
    k_u64 passed_on;           /* the fault that other nodes were told */
    int lanes, slots;
};

/* What ranks tell each other. */
struct card {
    struct epi_net_remote region;
    uint64_t bytes; /* of the address */
    uint8_t address[EPI_NET_ADDRESS_BYTES];
};

/* Whether this rank and `r` write to each other: one relays for the other. */
static bool is_wired(const ep_group *g, int r) {
    const struct epi_nodes *n = &g->nodes;
    return n->node[r] != n->own &&
           (epi_relay(n, g->rank, n->node[r]) == r || epi_relay(n, r, n->own) == g->rank);
}

/* ---- while there is a group ----------------------------------------------------------------- */

static void on_lost(void *ctx, int peer, ep_status status, const char *why) {
    struct epi_wires *w = ctx;
    w->lost[peer].since = epi_now_ns();
    w->lost[peer].why = why;
    atomic_store(&w->lost[peer].status, status);
}

/* The first that is not gone and could not be written to for long enough. */
static int find_lost(const struct epi_wires *w) {
    for (int r = 0; r < w->g->num_ranks; r++) {
        const struct lost *l = &w->lost[r];
        const int status = atomic_load(&l->status);
        if (status != EP_OK && !epi_group_is_gone(w->g, r) &&
            (status == EP_ERR_TIMEOUT || epi_now_ns() - l->since > DOUBT_NS)) {
            return r;
        }
    }
    return -1;
}

/* Kernels write a fault to the boards of their node: this passes it on. */
static void on_look(void *ctx) {
    struct epi_wires *w = ctx;
    if (!atomic_load(&w->g->board)) {
        return; /* the group is being made */
    }
    const k_u64 fault = epi_group_raised(w->g);
    if (fault != w->passed_on) {
        w->passed_on = fault;
        epi_boot_tell(w->g->boot, fault);
    }
    const int lost = epi_group_faulted(w->g) ? -1 : find_lost(w);
    if (lost >= 0) {
        epi_log(EPI_LOG_WARN, "rank %d cannot be written to: %s", lost, w->lost[lost].why);
        epi_group_raise(w->g, EP_ERR_TIMEOUT, lost, 0);
    }
}

const char *epi_wires_why(const struct epi_wires *w, int rank) {
    return w && atomic_load(&w->lost[rank].status) != EP_OK ? w->lost[rank].why : "";
}

void *epi_wires_staging(const struct epi_wires *w) {
    return w->staging;
}

const struct k_net *epi_wires_net(const struct epi_wires *w) {
    return epi_proxy_net(w->proxy);
}

struct epi_proxy_counts epi_wires_counts(const struct epi_wires *w) {
    return epi_proxy_counts(w->proxy);
}

void epi_wires_wake(struct epi_wires *w) {
    epi_proxy_wake(w->proxy);
}

/* ---- create --------------------------------------------------------------------------------- */

static ep_status map_staging(struct epi_wires *w) {
    struct epi_room room;
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    w->bytes = (size_t)((w->g->plan.net_bytes + page) / page * page);
    void *p = MAP_FAILED;
    errno = ENOMEM;
    if (!epi_alloc_should_fail() && epi_room_has(EPI_ROOM_PRIVATE, w->bytes, &room)) {
        p = mmap(NULL, w->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    if (p == MAP_FAILED) {
        return epi_fail(EP_ERR_NOMEM, "no memory for %zu bytes on their way between nodes: %s",
                        w->bytes, strerror(errno));
    }
    w->staging = p;
    madvise(p, w->bytes, MADV_DONTFORK); /* a NIC's pages must not become a child's copies */
    madvise(p, w->bytes, MADV_HUGEPAGE);
    return EP_OK;
}

static ep_status open_and_register(struct epi_wires *w) {
    const ep_group *g = w->g;
    const struct epi_net_faults fake = {.max_write_bytes = g->plan.net_write_bytes};
    const struct epi_net_config c = {.faults = &fake,
                                     .self = g->rank,
                                     .num_peers = g->num_ranks,
                                     .max_in_flight = w->lanes * w->slots * (int)K_PUT_KINDS,
                                     .timeout_ns = g->timeout_ns};
    EPI_TRY(map_staging(w));
    EPI_TRY(epi_net_open(&w->net, &c));
    const uint64_t most = epi_net_limits(w->net).max_write_bytes;
    if (most < g->plan.net_write_bytes) {
        return epi_fail(
            EP_ERR_UNSUPPORTED,
            "provider %s writes %llu bytes at once, and %llu are needed for rows of "
            "max_row_bytes",
            epi_net_provider(w->net), (unsigned long long)most,
            (unsigned long long)g->plan.net_write_bytes);
    }
    return epi_net_register(w->net, w->staging, w->bytes, -1, &w->region);
}

static ep_status alloc_wires(struct epi_wires *w) {
    const size_t ranks = (size_t)w->g->num_ranks;
    w->lanes = w->g->plan.net_lanes ? w->g->plan.net_lanes : 1;
    w->slots = w->g->plan.net_slots ? w->g->plan.net_slots : 1;
    w->shared = epi_alloc(epi_proxy_bytes(w->g->num_ranks, w->lanes, w->slots));
    w->tickets = epi_alloc(sizeof(*w->tickets));
    w->to = epi_alloc_array(ranks, sizeof(*w->to));
    w->lost = epi_alloc_array(ranks, sizeof(*w->lost));
    return w->shared && w->tickets && w->to && w->lost
               ? open_and_register(w)
               : epi_fail(EP_ERR_NOMEM, "no memory for what is on its way between %d ranks%s",
                          w->g->num_ranks, epi_alloc_why());
}

static ep_status add_peers(struct epi_wires *w, const struct card *all) {
    for (int r = 0; r < w->g->num_ranks; r++) {
        if (is_wired(w->g, r)) {
            w->to[r] = all[r].region;
            EPI_TRY(epi_net_add_peer(w->net, r, all[r].address, (size_t)all[r].bytes));
        }
    }
    const struct epi_proxy_config c = {.net = w->net,
                                       .self = w->g->rank,
                                       .num_peers = w->g->num_ranks,
                                       .num_lanes = w->lanes,
                                       .num_slots = w->slots,
                                       .from = &w->region,
                                       .to = w->to,
                                       .shared = w->shared,
                                       .tickets = w->tickets,
                                       .on_lost = on_lost,
                                       .on_look = on_look,
                                       .ctx = w};
    return epi_proxy_start(&w->proxy, &c);
}

static ep_status connect_all(struct epi_wires *w, const struct epi_exchange *x, ep_status st) {
    struct card mine;
    struct card *all = epi_alloc_array((size_t)x->num_ranks, sizeof(*all));
    if (!all && st == EP_OK) {
        st = epi_fail(EP_ERR_NOMEM, "no memory to hear %d ranks", x->num_ranks);
    }
    st = epi_agree(x, st, "opening the network");
    if (st == EP_OK) {
        memset(&mine, 0, sizeof(mine));
        mine.region = w->region.remote;
        mine.bytes = epi_net_address(w->net, mine.address);
        st = x->allgather(x->ctx, &mine, sizeof(mine), all);
    }
    if (st == EP_OK) {
        st = epi_agree(x, add_peers(w, all), "connecting the nodes");
    }
    epi_free(all);
    return st;
}

ep_status epi_wires_create(struct epi_wires **out, ep_group *g, const struct epi_exchange *x) {
    if (g->nodes.num == 1) {
        return EP_OK;
    }
    struct epi_wires *w = epi_alloc(sizeof(*w));
    if (w) {
        w->g = g;
        *out = w;
    }
    return connect_all(
        w, x,
        w ? alloc_wires(w)
          : epi_fail(EP_ERR_NOMEM, "no memory for what is between nodes%s", epi_alloc_why()));
}

/* ---- the end -------------------------------------------------------------------------------- */

/* Those who have come to their own end need nothing of this rank any more. */
static bool all_gone(const struct epi_wires *w) {
    bool gone = true;
    for (int r = 0; gone && r < w->g->num_ranks; r++) {
        gone = !is_wired(w->g, r) || epi_group_is_gone(w->g, r);
    }
    return gone;
}

void epi_wires_stop(struct epi_wires *w) {
    if (!w) {
        return;
    }
    const bool good = w->proxy && atomic_load(&w->g->board) && !epi_group_faulted(w->g);
    const struct epi_deadline stay = epi_deadline_after(STAY_NS);
    while (good && !all_gone(w) && !epi_group_faulted(w->g) && !epi_deadline_expired(stay)) {
        epi_sleep_ns(EPI_NS_PER_MS);
    }
    epi_proxy_stop(&w->proxy, epi_deadline_after(good ? DRAIN_NS : 0));
    on_look(w); /* what kernels have raised since its last look */
    epi_net_close(&w->net, epi_deadline_after(0));
}

void epi_wires_free(struct epi_wires **wires, bool forked) {
    struct epi_wires *w = *wires;
    *wires = NULL;
    if (!w) {
        return;
    }
    if (!forked && w->staging) {
        munmap(w->staging, w->bytes);
    }
    epi_free(w->shared);
    epi_free(w->tickets);
    epi_free(w->to);
    epi_free(w->lost);
    epi_free(w);
}
