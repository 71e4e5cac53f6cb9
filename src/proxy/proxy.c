/* SPDX-License-Identifier: MIT */
/*
 * The loop of the proxy: entries of the ring become writes, events become words. Owns its thread, and
 * the words and the ring in memory that its caller has given. It spins while anything is under way or
 * has just been, then sleeps for a millisecond at a time, and after seconds of that for longer, until
 * something arrives or somebody wakes it.
 *
 * Order: a kernel's bytes, its release of word 0, the acquire here, the write; there, the arrival that
 * is polled, the release of its word, the kernel's acquire. Must not wait for one peer: the endpoint
 * takes as many writes to each as kernels may begin.
 */
#include "src/proxy/proxy.h"

#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "kernel/abi.h"

#define SPINS 2000 /* empty looks before it sleeps */
#define NAP_MS 1
#define MANY_NAPS 500 /* then they are long: what is idle costs nothing */
#define LONG_NAP_MS 20
#define LOOKS 1024 /* turns between two looks at what the owner looks at */
#define MOST_EVENTS 32
#define MOST_ENTRIES 32 /* taken in a row */

struct epi_proxy {
    struct epi_proxy_config c;
    struct k_net n;
    pthread_t thread;
    uint64_t next; /* ticket of the entry that is looked at */
    _Atomic uint64_t writes, bytes, arrived, dropped, held_up;
    _Atomic bool stops;
    struct epi_deadline until; /* it then drains */
    int wake_fd;               /* an eventfd */
    _Atomic bool sleeps, woken;
};

static uint64_t num_words(int peers, int lanes, int slots) {
    return (uint64_t)peers * (uint64_t)lanes * K_PUT_KINDS * (uint64_t)slots;
}

static uint64_t num_entries(int peers, int lanes, int slots) {
    uint64_t entries = 1;
    while (entries < num_words(peers, lanes, slots)) {
        entries *= 2;
    }
    return entries;
}

uint64_t epi_proxy_bytes(int num_peers, int num_lanes, int num_slots) {
    return num_entries(num_peers, num_lanes, num_slots) * sizeof(struct k_put_entry) +
           2 * 8 * num_words(num_peers, num_lanes, num_slots);
}

static _Atomic k_u64 *word_at(k_u64 address) {
    return (_Atomic k_u64 *)(uintptr_t)address;
}

static void count_one(_Atomic uint64_t *counter, uint64_t more) {
    atomic_fetch_add_explicit(counter, more, memory_order_relaxed);
}

/* ---- from kernels --------------------------------------------------------------------------- */

/* The next write, if there is one and the endpoint takes it. */
static bool take_entry(struct epi_proxy *p) {
    const k_u64 at = p->n.ring + (p->next & (p->n.entries - 1u)) * sizeof(struct k_put_entry);
    const k_u64 word = atomic_load_explicit(word_at(at), memory_order_acquire);
    if ((uint32_t)(word >> 32) != (uint32_t)(p->next + 1)) {
        return false;
    }
    const uint32_t what = (uint32_t)word;
    const int peer = (int)K_PUT_PEER(what);
    const struct epi_net_write w = {
        .from = p->c.from,
        .from_offset = atomic_load_explicit(word_at(at + 8), memory_order_relaxed),
        .to = p->c.to[peer < p->c.num_peers ? peer : p->c.self],
        .to_offset = atomic_load_explicit(word_at(at + 16), memory_order_relaxed),
        .bytes = atomic_load_explicit(word_at(at + 24), memory_order_relaxed),
        .data = K_PUT_WHAT(p->c.self, K_PUT_LANE(what), K_PUT_KIND(what), K_PUT_NUMBER(what)),
        .token = what};
    const ep_status st = epi_net_write(p->c.net, peer, &w);
    if (st == EP_AGAIN) {
        count_one(&p->held_up, 1);
        return false;
    }
    p->next++;
    count_one(st == EP_OK ? &p->writes : &p->dropped, 1);
    count_one(&p->bytes, st == EP_OK ? w.bytes : 0);
    return true;
}

/* ---- to kernels ----------------------------------------------------------------------------- */

/* Peers are believed as far as the table goes: they share a job, not a version of everything. */
static void publish_done(const struct epi_proxy *p, k_u64 table, uint32_t what) {
    if (K_PUT_PEER(what) < p->n.peers && K_PUT_LANE(what) < p->n.lanes) {
        atomic_store_explicit(word_at(table + 8 * K_PUT_WORD(&p->n, what)), K_PUT_DONE(what),
                              memory_order_release);
    }
}

static int take_events(struct epi_proxy *p) {
    struct epi_net_event event[MOST_EVENTS];
    const int num = epi_net_poll(p->c.net, event, MOST_EVENTS);
    for (int i = 0; i < num; i++) {
        const struct epi_net_event *e = &event[i];
        if (e->kind == EPI_NET_SENT) {
            publish_done(p, p->n.sent, (uint32_t)e->token);
        } else if (e->kind == EPI_NET_ARRIVED) {
            count_one(&p->arrived, 1);
            publish_done(p, p->n.arrived, e->data);
        } else {
            p->c.on_lost(p->c.ctx, e->peer, e->status, e->why);
        }
    }
    return num;
}

/* ---- the thread ----------------------------------------------------------------------------- */

/* Until something arrives, somebody wakes it, or it is time to look: kernels do not wake anybody. */
static void take_nap(struct epi_proxy *p, int naps) {
    uint64_t woken;
    struct pollfd ready[2] = {{.fd = p->wake_fd, .events = POLLIN},
                              {.fd = epi_net_wait_fd(p->c.net), .events = POLLIN}};
    atomic_store(&p->sleeps, true);
    poll(ready, 2, naps < MANY_NAPS ? NAP_MS : LONG_NAP_MS);
    atomic_store(&p->sleeps, false);
    if (ready[0].revents && read(p->wake_fd, &woken, sizeof(woken)) < 0) {
        return; /* another nap has read it */
    }
}

static void *run_proxy(void *arg) {
    struct epi_proxy *p = arg;
    int idle = 0;
    for (uint32_t turn = 0;; turn++) {
        const bool stops = atomic_load(&p->stops);
        int num = take_events(p);
        for (int i = 0; i < MOST_ENTRIES && take_entry(p); i++) {
            num++;
        }
        idle = num > 0 || epi_net_under_way(p->c.net) > 0 ? 0 : idle + (idle < INT_MAX);
        if (stops && (idle > 0 || epi_deadline_expired(p->until))) {
            return NULL;
        }
        if (idle > SPINS) {
            take_nap(p, idle - SPINS);
            idle = atomic_exchange(&p->woken, false) ? 0 : idle;
        } else if (num == 0) {
            sched_yield();
        }
        if (p->c.on_look && (idle > SPINS || turn % LOOKS == 0)) {
            p->c.on_look(p->c.ctx);
        }
    }
}

void epi_proxy_wake(struct epi_proxy *p) {
    const uint64_t one = 1;
    atomic_store(&p->woken, true);
    if (atomic_load(&p->sleeps) && write(p->wake_fd, &one, sizeof(one)) < 0) {
        return; /* it is full: the proxy is being woken */
    }
}

ep_status epi_proxy_start(struct epi_proxy **out, const struct epi_proxy_config *config) {
    const struct epi_proxy_config *c = config;
    if (c->num_peers < 1 || c->num_peers > 1 << K_PUT_PEER_BITS || c->num_lanes < 1 ||
        c->num_lanes > 1 << K_PUT_LANE_BITS || c->num_slots < 1 ||
        (c->num_slots & (c->num_slots - 1)) || c->num_slots > 1 << (K_PUT_NUMBER_BITS - 1)) {
        return epi_fail(EP_ERR_ARG, "a proxy of %d peers, %d lanes and %d slots", c->num_peers,
                        c->num_lanes, c->num_slots);
    }
    struct epi_proxy *p = epi_alloc(sizeof(*p));
    if (!p) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a proxy%s", epi_alloc_why());
    }
    p->c = *c;
    p->n =
        (struct k_net){.ring = (k_u64)(uintptr_t)c->shared,
                       .tickets = (k_u64)(uintptr_t)c->tickets,
                       .entries = (k_u32)num_entries(c->num_peers, c->num_lanes, c->num_slots),
                       .peers = (k_u32)c->num_peers,
                       .lanes = (k_u32)c->num_lanes,
                       .slots = (k_u32)c->num_slots};
    p->n.sent = p->n.ring + p->n.entries * sizeof(struct k_put_entry);
    p->n.arrived = p->n.sent + 8 * num_words(c->num_peers, c->num_lanes, c->num_slots);
    epi_fd_begin();
    p->wake_fd = epi_fd_keep(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (p->wake_fd < 0 || epi_thread_start(&p->thread, run_proxy, p, "ep proxy") != 0) {
        epi_fd_close(&p->wake_fd);
        epi_free(p);
        return epi_fail(EP_ERR_SYSTEM,
                        "the thread that writes to other nodes cannot be started");
    }
    *out = p;
    return EP_OK;
}

void epi_proxy_stop(struct epi_proxy **proxy, struct epi_deadline deadline) {
    struct epi_proxy *p = *proxy;
    *proxy = NULL;
    if (p) {
        p->until = deadline;
        atomic_store(&p->stops, true);
        epi_proxy_wake(p);
        pthread_join(p->thread, NULL);
        epi_fd_close(&p->wake_fd);
        epi_free(p);
    }
}

const struct k_net *epi_proxy_net(const struct epi_proxy *p) {
    return &p->n;
}

struct epi_proxy_counts epi_proxy_counts(const struct epi_proxy *p) {
    return (struct epi_proxy_counts){atomic_load(&p->writes), atomic_load(&p->bytes),
                                     atomic_load(&p->arrived), atomic_load(&p->dropped),
                                     atomic_load(&p->held_up)};
}
