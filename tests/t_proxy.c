/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * The proxy between kernels and the network: warps of three ranks send packets to each other's regions,
 * through rings, proxies and a network, with credits for the slots, as 0014 has it. Under
 * ThreadSanitizer this shows that each hand-off orders what it must: a packet's bytes, written by a warp,
 * read by a proxy, written by another and read by a warp; and the slots of both, used again.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "kernel/put.h"
#include "src/proxy/proxy.h"
#include "tests/tap.h"

#define RANKS 3
#define LANES 2 /* a sending and a receiving warp for each */
#define SLOTS 4
#define PACKET 512
#define KIND_PACKET 0u
#define KIND_CREDIT 1u

/* A rank's region: packets that it sends, credits that it sends, packets that come, credits that come. */
struct region {
    unsigned char out[RANKS][LANES][SLOTS][PACKET];
    uint64_t credit_out[RANKS][LANES][SLOTS];
    unsigned char in[RANKS][LANES][SLOTS][PACKET];
    uint64_t credit_in[RANKS][LANES][SLOTS];
};

struct rank {
    struct epi_net *net;
    struct epi_proxy *proxy;
    struct epi_net_region registered;
    struct epi_net_remote to[RANKS];
    struct region *mem;
    void *shared;
    k_u64 tickets;
    _Atomic int num_lost, lost_peer;
};

static struct rank ranks[RANKS];
static int num_packets;
static _Atomic int num_wrong, num_late;

static void on_lost(void *ctx, int peer, ep_status status, const char *why) {
    struct rank *r = ctx;
    atomic_store(&r->lost_peer, peer);
    atomic_fetch_add(&r->num_lost, 1);
    diag("lost: %d, %s", status, why);
}

static bool open_ranks(const char *provider, const struct epi_net_faults *faults,
                       int64_t timeout_ns) {
    char address[EPI_NET_ADDRESS_BYTES];
    bool good = true;
    memset(ranks, 0, sizeof(ranks));
    for (int i = 0; i < RANKS; i++) {
        struct rank *r = &ranks[i];
        const struct epi_net_config c = {.self = i,
                                         .num_peers = RANKS,
                                         .max_in_flight = LANES * SLOTS * (int)K_PUT_KINDS,
                                         .timeout_ns = timeout_ns,
                                         .provider = provider,
                                         .interface = "lo",
                                         .faults = &faults[i]};
        r->mem = epi_alloc(sizeof(*r->mem));
        r->shared = epi_alloc(epi_proxy_bytes(RANKS, LANES, SLOTS));
        good &= epi_net_open(&r->net, &c) == EP_OK &&
                epi_net_register(r->net, r->mem, sizeof(*r->mem), -1, &r->registered) == EP_OK;
    }
    for (int i = 0; i < RANKS * RANKS && good; i++) {
        const int a = i / RANKS, b = i % RANKS;
        const size_t bytes = epi_net_address(ranks[b].net, address);
        ranks[a].to[b] = ranks[b].registered.remote;
        good &= a == b || epi_net_add_peer(ranks[a].net, b, address, bytes) == EP_OK;
    }
    for (int i = 0; i < RANKS && good; i++) {
        const struct epi_proxy_config c = {.net = ranks[i].net,
                                           .self = i,
                                           .num_peers = RANKS,
                                           .num_lanes = LANES,
                                           .num_slots = SLOTS,
                                           .from = &ranks[i].registered,
                                           .to = ranks[i].to,
                                           .shared = ranks[i].shared,
                                           .tickets = &ranks[i].tickets,
                                           .on_lost = on_lost,
                                           .ctx = &ranks[i]};
        good = epi_proxy_start(&ranks[i].proxy, &c) == EP_OK;
    }
    return good || ok(false, "three ranks with proxies: %s", ep_last_error());
}

static void close_ranks(void) {
    for (int i = 0; i < RANKS; i++) {
        epi_proxy_stop(&ranks[i].proxy, epi_deadline_after(0));
        epi_net_close(&ranks[i].net, epi_deadline_after(0));
        epi_free(ranks[i].mem);
        epi_free(ranks[i].shared);
    }
}

/* ---- what a kernel would do ----------------------------------------------------------------- */

/* False: not in a minute. */
static bool await_done(k_u64 table, const struct k_net *n, k_u32 what) {
    const k_u64 *word = (const k_u64 *)table + K_PUT_WORD(n, what);
    for (int64_t i = 0; k_acquire(word) != K_PUT_DONE(what); i++) {
        sched_yield();
        if (i % 1024 == 1023 && tap_now() > 0 && atomic_load(&num_late)) {
            return false;
        }
    }
    return true;
}

static unsigned char byte_of(int from, int to, int lane, int number, int i) {
    return (unsigned char)(from * 7 + to * 31 + lane * 101 + number * 13 + i);
}

/* Slot by slot, when the peer has given it back and the network has let go of it. */
static int send_packets(int rank, int lane) {
    struct rank *r = &ranks[rank];
    const struct k_net *n = epi_proxy_net(r->proxy);
    bool good = true;
    for (int number = 0; number < num_packets && good; number++) {
        for (int p = 0; p < RANKS && good; p++) {
            const k_u32 what = K_PUT_WHAT(p, lane, KIND_PACKET, number);
            const k_u32 before = K_PUT_WHAT(p, lane, KIND_PACKET, number - SLOTS);
            const k_u32 credit = K_PUT_WHAT(p, lane, KIND_CREDIT, number - SLOTS);
            unsigned char *at = r->mem->out[p][lane][number % SLOTS];
            if (p == rank) {
                continue;
            }
            good = number < SLOTS ||
                   (await_done(n->sent, n, before) && await_done(n->arrived, n, credit));
            for (int i = 0; i < PACKET && good; i++) {
                at[i] = byte_of(rank, p, lane, number, i);
            }
            if (good) {
                k_put(n, what, (k_u64)(at - (unsigned char *)r->mem),
                      offsetof(struct region, in[rank][lane][number % SLOTS]), PACKET);
            }
        }
    }
    return good ? 0 : 1;
}

static int receive_packets(int rank, int lane) {
    struct rank *r = &ranks[rank];
    const struct k_net *n = epi_proxy_net(r->proxy);
    bool good = true;
    for (int number = 0; number < num_packets && good; number++) {
        for (int p = 0; p < RANKS && good; p++) {
            const k_u32 packet = K_PUT_WHAT(p, lane, KIND_PACKET, number);
            const k_u32 credit = K_PUT_WHAT(p, lane, KIND_CREDIT, number);
            const int slot = number % SLOTS;
            if (p == rank) {
                continue;
            }
            good = await_done(n->arrived, n, packet);
            for (int i = 0; i < PACKET && good; i++) {
                if (r->mem->in[p][lane][slot][i] != byte_of(p, rank, lane, number, i)) {
                    atomic_fetch_add(&num_wrong, 1);
                    break;
                }
            }
            good = good &&
                   (number < SLOTS ||
                    await_done(n->sent, n, K_PUT_WHAT(p, lane, KIND_CREDIT, number - SLOTS)));
            if (good) {
                r->mem->credit_out[p][lane][slot] = (uint64_t)number;
                k_put(n, credit, offsetof(struct region, credit_out[p][lane][slot]),
                      offsetof(struct region, credit_in[rank][lane][slot]), 8);
            }
        }
    }
    return good ? 0 : 1;
}

static int run_warp(int warp, void *ctx) {
    (void)ctx;
    const int rank = warp / (2 * LANES), lane = warp / 2 % LANES;
    return warp % 2 ? receive_packets(rank, lane) : send_packets(rank, lane);
}

static void *run_clock(void *seconds) {
    for (double end = tap_now() + *(int *)seconds;
         tap_now() < end && !atomic_load(&num_late);) {
        tap_sleep_ms(20);
    }
    atomic_store(&num_late, 1);
    return NULL;
}

/* ---- tests ---------------------------------------------------------------------------------- */

static void test_packets(const char *provider) {
    uint64_t state = tap_seed();
    struct epi_net_faults faults[RANKS] = {{0}};
    pthread_t clock;
    int seconds = tap_scaled(60);
    uint64_t bytes = 0, arrived = 0, dropped = 0;
    num_packets = tap_quick() ? 40 : 100 * tap_effort();
    for (int i = 0; i < RANKS; i++) {
        faults[i].seed = tap_rand(&state);
        faults[i].max_delay = 3 * (uint32_t)i;
        faults[i].connect_tries = 30;
        faults[i].again_permille = 100;
    }
    if (!open_ranks(provider, faults, 60 * EPI_NS_PER_S)) {
        return;
    }
    atomic_store(&num_late, 0);
    pthread_create(&clock, NULL, run_clock, &seconds);
    const int failed = tap_run_threads(RANKS * LANES * 2, run_warp, NULL);
    atomic_store(&num_late, 1);
    pthread_join(clock, NULL);
    /* The last credits may be on their way. */
    const uint64_t want = 2ull * RANKS * (RANKS - 1) * LANES * (uint64_t)num_packets;
    for (int i = 0; i < 5000 && arrived < want; i++) {
        arrived = 0;
        for (int r = 0; r < RANKS; r++) {
            arrived += epi_proxy_counts(ranks[r].proxy).arrived;
        }
        tap_sleep_ms(arrived < want);
    }
    for (int r = 0; r < RANKS; r++) {
        const struct epi_proxy_counts c = epi_proxy_counts(ranks[r].proxy);
        bytes += c.bytes;
        dropped += c.dropped + c.held_up;
    }
    ok(failed == 0 && atomic_load(&num_wrong) == 0,
       "%s: %d packets in each of %d lanes, all right", provider, num_packets,
       RANKS * (RANKS - 1) * LANES);
    ok(arrived == want && bytes == want / 2 * (PACKET + 8) && dropped == 0,
       "%s: %llu writes of %llu bytes are counted, none is dropped or held up", provider,
       (unsigned long long)arrived, (unsigned long long)bytes);
    close_ranks();
}

static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

static void test_idle(void) {
    const struct epi_net_faults none[RANKS] = {{0}};
    open_ranks("fake", none, 60 * EPI_NS_PER_S);
    tap_sleep_ms(100 * tap_scaled(1));
    const double cpu = cpu_seconds(), start = tap_now();
    tap_sleep_ms(300);
    const double used = (cpu_seconds() - cpu) / (tap_now() - start);
    ok(used < 0.5, "three idle proxies take %.1f %% of a core", 100 * used);
    const struct k_net *n = epi_proxy_net(ranks[0].proxy);
    ranks[0].mem->credit_out[1][0][0] = 77;
    k_put(n, K_PUT_WHAT(1, 0, 0, 0), offsetof(struct region, credit_out[1][0][0]),
          offsetof(struct region, credit_in[0][0][0]), 8);
    epi_proxy_wake(ranks[0].proxy);
    atomic_store(&num_late, 0);
    ok(await_done(epi_proxy_net(ranks[1].proxy)->arrived, n, K_PUT_WHAT(0, 0, 0, 0)) &&
           ranks[1].mem->credit_in[0][0][0] == 77,
       "and wake for a write");
    close_ranks();
}

/* One peer takes nothing: it is lost once, and what goes to the other does not wait for that. */
static void test_lost(void) {
    const struct epi_net_faults faults[RANKS] = {{.again_peer = 1 + 2}};
    open_ranks("fake", faults, tap_scaled(1) * EPI_NS_PER_S / 2);
    const struct k_net *n = epi_proxy_net(ranks[0].proxy);
    atomic_store(&num_late, 0);
    bool good = true;
    for (int number = 0; number < 3 * SLOTS && good; number++) {
        if (number < SLOTS) {
            k_put(n, K_PUT_WHAT(2, 0, 0, number), 0, 0, PACKET);
        }
        good = number < SLOTS || await_done(n->sent, n, K_PUT_WHAT(1, 0, 0, number - SLOTS));
        k_put(n, K_PUT_WHAT(1, 0, 0, number), 0, 0, PACKET);
    }
    ok(good && atomic_load(&ranks[0].num_lost) == 0,
       "a peer that is never connected holds up none");
    for (int i = 0; i < 30000 && atomic_load(&ranks[0].num_lost) == 0; i++) {
        tap_sleep_ms(1);
    }
    k_put(n, K_PUT_WHAT(2, 1, 0, 0), 0, 0, PACKET);
    k_put(n, K_PUT_WHAT(1, 1, 0, 0), 0, 0, PACKET);
    good = await_done(n->sent, n, K_PUT_WHAT(1, 1, 0, 0));
    ok(good && atomic_load(&ranks[0].num_lost) == 1 && atomic_load(&ranks[0].lost_peer) == 2 &&
           epi_proxy_counts(ranks[0].proxy).dropped == 1,
       "it is lost once, and what kernels still send there is dropped");
    close_ranks();
}

int main(void) {
    struct epi_proxy *p = NULL;
    const struct epi_proxy_config bad = {.num_peers = 2, .num_lanes = 1, .num_slots = 3};
    tap_deadline(100);
    ok(epi_proxy_start(&p, &bad) == EP_ERR_ARG && strstr(ep_last_error(), "3 slots"),
       "slots are a power of two");
    struct epi_net_found found[16];
    char version[16];
    const int num = epi_net_find(found, 16, version);
    test_packets("fake");
    for (int i = 0; i < num; i++) {
        if (!found[i].why[0] && strstr(found[i].domains, "lo")) {
            test_packets(found[i].name);
        }
    }
    test_idle();
    test_lost();
    return done_testing();
}
