/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Endpoints between nodes: one list of tests, which the fake network passes and every provider of
 * libfabric that can be used over loopback. All endpoints of a rig are driven by one thread in turn,
 * so that a seed of the fake is replayed exactly; threads and processes have tests of their own.
 */
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "src/net/net.h"
#include "tests/tap.h"

#define MOST_ENDS 3
#define NUM_WRITES 64
#define PLACE_BYTES 1024
#define IN_FLIGHT 16
#define LONG_NS (60 * EPI_NS_PER_S)
#define SHORT_NS (300 * EPI_NS_PER_MS)

/* One endpoint, and what it has seen. */
struct end {
    struct epi_net *net;
    struct epi_net_region out_region, in_region;
    unsigned char *out, *in;         /* [MOST_ENDS][IN_FLIGHT], [MOST_ENDS][NUM_WRITES] */
    bool busy[MOST_ENDS][IN_FLIGHT]; /* places of `out` */
    int num_begun[MOST_ENDS], num_sent[MOST_ENDS];
    int seen[MOST_ENDS][NUM_WRITES]; /* by source */
    int num_arrived, num_wrong;
    bool lost[MOST_ENDS], is_silent; /* silent: it does not poll */
    ep_status lost_status;
    char why[EPI_NET_TEXT_BYTES];
    uint64_t trace;
};

struct rig {
    const char *provider;
    int num, endless; /* 1 + the end to which there is always one more write, or 0 */
    uint64_t seed;
    struct end end[MOST_ENDS];
};

static const char *providers[8];
static int num_providers;

/* ---- contents ------------------------------------------------------------------------------- */

static uint64_t of_write(uint64_t seed, int from, int to, int number) {
    uint64_t state = seed * 1000003 + (uint64_t)(from * 64 + to) * 65537 + (uint64_t)number;
    return tap_rand(&state);
}

static uint64_t bytes_of(const struct rig *r, int from, int to, int number) {
    return 1 + of_write(r->seed, from, to, number) % PLACE_BYTES;
}

static void fill(const struct rig *r, int from, int to, int number, unsigned char *out) {
    const uint64_t bytes = bytes_of(r, from, to, number);
    uint64_t state = of_write(r->seed, from, to, number);
    for (uint64_t i = 0; i < bytes; i += 8) {
        const uint64_t word = tap_rand(&state) | UINT64_C(0x0101010101010101);
        memcpy(out + i, &word, bytes - i < 8 ? bytes - i : 8);
    }
}

static unsigned char *place_in(const struct end *e, int from, int number) {
    return e->in + (size_t)(from * NUM_WRITES + number) * PLACE_BYTES;
}

/* Only a failure is a test point: there are many. */
static bool need(bool good, const char *what, int a, int b) {
    return good || ok(false, "%s (%d, %d): %s", what, a, b, ep_last_error());
}

/* ---- rigs ----------------------------------------------------------------------------------- */

static bool end_open(struct rig *r, int i, const struct epi_net_faults *faults,
                     int64_t timeout_ns) {
    struct end *e = &r->end[i];
    const struct epi_net_config c = {.self = i,
                                     .num_peers = r->num,
                                     .max_in_flight = IN_FLIGHT,
                                     .timeout_ns = timeout_ns,
                                     .provider = r->provider,
                                     .interface = "lo",
                                     .faults = faults};
    const size_t out_bytes = (size_t)MOST_ENDS * IN_FLIGHT * PLACE_BYTES;
    const size_t in_bytes = (size_t)MOST_ENDS * NUM_WRITES * PLACE_BYTES;
    e->out = calloc(1, out_bytes);
    e->in = calloc(1, in_bytes);
    return need(e->out && e->in && epi_net_open(&e->net, &c) == EP_OK &&
                    epi_net_register(e->net, e->out, out_bytes, -1, &e->out_region) == EP_OK &&
                    epi_net_register(e->net, e->in, in_bytes, -1, &e->in_region) == EP_OK,
                r->provider, i, r->num);
}

static void end_close(struct end *e) {
    epi_net_close(&e->net, epi_deadline_after(0));
    free(e->out);
    free(e->in);
}

/* faults: one for each end, or NULL. */
static bool rig_open(struct rig *r, const char *provider, int num, uint64_t seed,
                     const struct epi_net_faults *faults, int64_t timeout_ns) {
    char address[EPI_NET_ADDRESS_BYTES];
    bool good = true;
    memset(r, 0, sizeof(*r));
    r->provider = provider;
    r->num = num;
    r->seed = seed;
    for (int i = 0; i < num && good; i++) {
        good = end_open(r, i, faults ? &faults[i] : NULL, timeout_ns);
    }
    for (int i = 0; i < num * num && good; i++) {
        const int a = i / num, b = i % num;
        const size_t bytes = epi_net_address(r->end[b].net, address);
        good = a == b ||
               need(epi_net_add_peer(r->end[a].net, b, address, bytes) == EP_OK, "meet", a, b);
    }
    return good;
}

static void rig_close(struct rig *r) {
    for (int i = 0; i < r->num; i++) {
        end_close(&r->end[i]);
    }
}

/* ---- driving -------------------------------------------------------------------------------- */

/* The next write of `from` to `to`, if its place is free; false: not now. */
static bool send_next(struct rig *r, int from, int to, const struct epi_net_remote *remote) {
    struct end *e = &r->end[from];
    if (r->endless == to + 1 && e->num_begun[to] == NUM_WRITES) {
        e->num_begun[to] = 0;
    }
    const int number = e->num_begun[to], place = number % IN_FLIGHT;
    if (number == NUM_WRITES || e->busy[to][place] || e->lost[to]) {
        return false;
    }
    const size_t at = (size_t)(to * IN_FLIGHT + place) * PLACE_BYTES;
    fill(r, from, to, number, e->out + at);
    const struct epi_net_write w = {.from = &e->out_region,
                                    .from_offset = at,
                                    .to = *remote,
                                    .to_offset =
                                        (uint64_t)(from * NUM_WRITES + number) * PLACE_BYTES,
                                    .bytes = bytes_of(r, from, to, number),
                                    .data = (uint32_t)from << 16 | (uint32_t)number,
                                    .token = (uint64_t)place};
    if (epi_net_write(e->net, to, &w) != EP_OK) {
        return false;
    }
    e->busy[to][place] = true;
    e->num_begun[to]++;
    return true;
}

static void take_arrival(struct rig *r, int to, uint32_t data) {
    struct end *e = &r->end[to];
    unsigned char want[PLACE_BYTES];
    const int from = (int)(data >> 16), number = (int)(data & 0xffff);
    if (from >= r->num || number >= NUM_WRITES || e->seen[from][number]++) {
        e->num_wrong++;
        diag("%d was told %08x, which nobody sent or which came before", to, data);
        return;
    }
    fill(r, from, to, number, want);
    if (memcmp(place_in(e, from, number), want, bytes_of(r, from, to, number)) != 0) {
        e->num_wrong++;
        diag("%d was told of write %d of %d, whose bytes are not here", to, number, from);
    }
    e->num_arrived++;
}

/* One poll of an end; what its events say. */
static int poll_end(struct rig *r, int i) {
    struct end *e = &r->end[i];
    struct epi_net_event events[7];
    const int n = epi_net_poll(e->net, events, 7);
    for (int k = 0; k < n; k++) {
        const struct epi_net_event *v = &events[k];
        const uint64_t about[4] = {v->kind, (uint64_t)v->peer, v->data, v->token};
        e->trace = epi_hash(e->trace, about, sizeof(about));
        if (v->kind == EPI_NET_SENT) {
            /* The source is this end's again: what is written there now must not travel. */
            memset(e->out + (size_t)(v->peer * IN_FLIGHT + (int)v->token) * PLACE_BYTES, 0,
                   PLACE_BYTES);
            e->busy[v->peer][v->token] = false;
            e->num_sent[v->peer]++;
        } else if (v->kind == EPI_NET_ARRIVED) {
            take_arrival(r, i, v->data);
        } else {
            need(!e->lost[v->peer], "lost twice", i, v->peer);
            e->lost[v->peer] = true;
            e->lost_status = v->status;
            strcpy(e->why, v->why);
        }
    }
    return n;
}

static bool is_finished(const struct rig *r, int i) {
    const struct end *e = &r->end[i];
    int want = 0;
    for (int p = 0; p < r->num; p++) {
        if (p != i && !r->end[p].is_silent) {
            if (!e->lost[p] && e->num_sent[p] < NUM_WRITES) {
                return false;
            }
            want += r->end[p].lost[i] || e->lost[p] ? 0 : NUM_WRITES;
        }
    }
    return e->num_arrived >= want;
}

/* Everybody to everybody; false when it is not over in so many rounds and that time. */
static bool drive(struct rig *r, int max_rounds) {
    const struct epi_deadline limit = epi_deadline_after(LONG_NS);
    static int num_idle;
    for (int round = 0; round < max_rounds || max_rounds == 0; round++) {
        bool all = true;
        int num_events = 0;
        for (int i = 0; i < r->num; i++) {
            for (int p = 0; p < r->num && !r->end[i].is_silent; p++) {
                while (p != i && send_next(r, i, p, &r->end[p].in_region.remote)) {
                }
            }
            if (!r->end[i].is_silent) {
                num_events += poll_end(r, i);
                all &= is_finished(r, i);
            }
        }
        num_idle = num_events == 0 ? num_idle + 1 : 0;
        if (num_idle > 100) {
            epi_sleep_ns(20 * EPI_NS_PER_US);
        }
        if (all) {
            return true;
        }
        if (epi_deadline_expired(limit)) {
            break;
        }
    }
    return false;
}

static bool all_right(const struct rig *r) {
    bool right = true;
    for (int i = 0; i < r->num; i++) {
        right &= r->end[i].num_wrong == 0;
    }
    return right;
}

/* ---- the list ------------------------------------------------------------------------------- */

static void test_everybody(const char *provider) {
    static struct rig a, b;
    if (rig_open(&a, provider, 3, tap_seed(), NULL, LONG_NS) &&
        rig_open(&b, provider, 2, tap_seed() + 1, NULL, LONG_NS)) {
        bool done = false, other = false;
        for (int i = 0; i < 1000000 && !(done && other); i++) {
            done = done || drive(&a, 1);
            other = other || drive(&b, 1);
        }
        ok(done && all_right(&a), "%s: bytes arrive, and each data once, behind its bytes",
           provider);
        ok(other && all_right(&b), "%s: a second group beside it, too", provider);
        ok(epi_net_under_way(a.end[0].net) == 0, "%s: nothing is under way", provider);
    }
    rig_close(&a);
    rig_close(&b);
}

static void test_many_in_flight(const char *provider) {
    static struct rig r;
    if (rig_open(&r, provider, 2, tap_seed(), NULL, LONG_NS)) {
        struct epi_net_write w = {.from = &r.end[0].out_region,
                                  .to = r.end[1].in_region.remote,
                                  .bytes = PLACE_BYTES,
                                  .data = 0xffff0000};
        int num = 0;
        while (epi_net_write(r.end[0].net, 1, &w) == EP_OK) {
            num++;
        }
        ok(num == IN_FLIGHT && epi_net_write(r.end[0].net, 1, &w) == EP_AGAIN &&
               epi_net_under_way(r.end[0].net) == IN_FLIGHT,
           "%s: %d writes are under way, and no more", provider, num);
        const struct epi_deadline limit = epi_deadline_after(LONG_NS);
        struct epi_net_event v[4];
        int sent = 0, arrived = 0;
        while ((sent < num || arrived < num) && !epi_deadline_expired(limit)) {
            for (int i = 0; i < 2; i++) {
                const int n = epi_net_poll(r.end[i].net, v, 4);
                for (int k = 0; k < n; k++) {
                    sent += i == 0 && v[k].kind == EPI_NET_SENT;
                    arrived += i == 1 && v[k].kind == EPI_NET_ARRIVED && v[k].data == w.data;
                }
            }
        }
        ok(sent == num && arrived == num, "%s: all arrive", provider);
    }
    rig_close(&r);
}

/* Who does not poll takes a few writes, or none; then it is lost, and nobody else is. */
static void test_silent_peer(const char *provider) {
    static struct rig r;
    if (rig_open(&r, provider, 3, tap_seed(), NULL, tap_scaled(1) * EPI_NS_PER_S / 2)) {
        r.end[2].is_silent = true;
        const struct epi_deadline limit = epi_deadline_after(LONG_NS);
        while (!(r.end[0].lost[2] && r.end[1].lost[2]) && !epi_deadline_expired(limit)) {
            drive(&r, 1);
        }
        ok(r.end[0].lost_status == EP_ERR_TIMEOUT && strstr(r.end[0].why, "peer 2") &&
               strstr(r.end[1].why, "EP_TIMEOUT_MS"),
           "%s: a peer that does not poll is lost: %s", provider, r.end[0].why);
        ok(drive(&r, 0) && all_right(&r) && !r.end[0].lost[1] && !r.end[1].lost[0],
           "%s: the others have talked meanwhile", provider);
        const struct epi_net_write w = {.from = &r.end[0].out_region, .bytes = 1};
        ok(epi_net_write(r.end[0].net, 2, &w) == EP_ERR_TIMEOUT &&
               strcmp(ep_last_error(), r.end[0].why) == 0,
           "%s: later writes to it say why", provider);
    }
    rig_close(&r);
}

/* A descriptor to sleep on, where there is one, is readable when something arrives and not before. */
static void test_sleep(const char *provider) {
    static struct rig r;
    if (rig_open(&r, provider, 2, tap_seed(), NULL, LONG_NS)) {
        const struct epi_deadline limit = epi_deadline_after(LONG_NS);
        struct epi_net *to = r.end[1].net;
        struct pollfd ready = {.fd = -1, .events = POLLIN};
        send_next(&r, 0, 1, &r.end[1].in_region.remote); /* connects them */
        while (r.end[1].num_arrived == 0 && !epi_deadline_expired(limit)) {
            poll_end(&r, 0);
            poll_end(&r, 1);
        }
        for (int i = 0; i < 1000 && ready.fd < 0; i++) {
            poll_end(&r, i % 2);
            ready.fd = epi_net_wait_fd(to);
        }
        if (ready.fd < 0) {
            diag("%s has no descriptor to sleep on", provider);
        } else {
            bool slept = poll(&ready, 1, 20) == 0;
            send_next(&r, 0, 1, &r.end[1].in_region.remote);
            poll_end(&r, 0);
            ok(slept && poll(&ready, 1, 20000) == 1, "%s: an arrival wakes who sleeps",
               provider);
            while (r.end[1].num_arrived < 2 && !epi_deadline_expired(limit)) {
                poll_end(&r, 0);
                poll_end(&r, 1);
            }
            ok(r.end[1].num_arrived == 2 && all_right(&r), "%s: and is there", provider);
        }
    }
    rig_close(&r);
}

/* The sender may hear of it, or only believe that it is sent: TCP drops what it cannot place. */
static void test_wrong_key(const char *provider) {
    static struct rig r;
    if (rig_open(&r, provider, 3, tap_seed(), NULL, LONG_NS)) {
        struct epi_net_remote wrong = r.end[1].in_region.remote;
        wrong.key ^= 0x5a5a;
        const struct epi_deadline limit = epi_deadline_after(LONG_NS);
        ok(send_next(&r, 0, 1, &wrong), "%s: a write with a wrong key begins", provider);
        int rounds = 0;
        while ((r.end[0].num_sent[1] + r.end[0].lost[1] == 0 || rounds < 2000) &&
               !epi_deadline_expired(limit)) {
            poll_end(&r, rounds++ % 2);
        }
        unsigned char any = 0;
        for (size_t i = 0; i < (size_t)MOST_ENDS * NUM_WRITES * PLACE_BYTES; i++) {
            any |= r.end[1].in[i];
        }
        ok(!any && r.end[1].num_arrived == 0, "%s: nothing is written, and nothing told: %s",
           provider, r.end[0].lost[1] ? r.end[0].why : "sent, and dropped there");
        send_next(&r, 0, 2, &r.end[2].in_region.remote);
        while (r.end[2].num_arrived == 0 && !epi_deadline_expired(limit)) {
            poll_end(&r, 0);
            poll_end(&r, 2);
        }
        ok(r.end[2].num_arrived == 1 && all_right(&r), "%s: others are written to", provider);
    }
    rig_close(&r);
}

static void test_close_in_flight(const char *provider) {
    static struct rig r;
    if (rig_open(&r, provider, 3, tap_seed(), NULL, LONG_NS)) {
        drive(&r, 3);
        while (send_next(&r, 0, 1, &r.end[1].in_region.remote)) {
        }
        const double start = tap_now();
        epi_net_close(&r.end[0].net, epi_deadline_after(50 * EPI_NS_PER_MS));
        memset(r.end[0].out, 0, (size_t)MOST_ENDS * IN_FLIGHT * PLACE_BYTES);
        ok(!r.end[0].net && tap_now() - start < tap_scaled(10),
           "%s: closed with writes in flight", provider);
        r.end[0].is_silent = true;
        for (int i = 1; i < 3; i++) {
            epi_net_give_up(r.end[i].net, 0, EP_ERR_PEER, "peer 0 has left");
        }
        ok(drive(&r, 0) && all_right(&r), "%s: the others go on", provider);
        ok(r.end[1].lost[0] && r.end[1].lost_status == EP_ERR_PEER &&
               strstr(r.end[1].why, "peer 0"),
           "%s: who was given up is lost once: %s", provider, r.end[1].why);
    }
    rig_close(&r);
}

static bool says(const char *what) {
    return ok(strstr(ep_last_error(), what) != NULL, "\"%s\" says %s", ep_last_error(), what);
}

static void test_limits(const char *provider) {
    static struct rig r;
    if (rig_open(&r, provider, 2, tap_seed(), NULL, LONG_NS)) {
        struct epi_net *net = r.end[0].net;
        struct epi_net_region region;
        const uint64_t most = epi_net_limits(net).max_write_bytes;
        const struct epi_net_write good = {
            .from = &r.end[0].out_region, .to = r.end[1].in_region.remote, .bytes = 64};
        struct epi_net_write w = good;
        w.bytes = 0;
        ok(epi_net_write(net, 1, &w) == EP_ERR_ARG && says("0 bytes"), "%s: no bytes",
           provider);
        if (most < UINT64_MAX) {
            w.bytes = most + 1;
            ok(epi_net_write(net, 1, &w) == EP_ERR_ARG && says("takes 1 to"), "too many bytes");
        }
        w = good;
        w.from_offset = UINT64_MAX - 8;
        ok(epi_net_write(net, 1, &w) == EP_ERR_ARG && says("the region"), "outside here");
        w = good;
        w.to_offset = w.to.bytes - 63;
        ok(epi_net_write(net, 1, &w) == EP_ERR_ARG && says("peer's region"), "outside there");
        ok(epi_net_write(net, 0, &good) == EP_ERR_STATE && says("peer 0"), "itself");
        ok(epi_net_register(net, &w, sizeof(w), 0, &region) == EP_ERR_UNSUPPORTED &&
               says("pinned"),
           "GPU memory is refused");
        ok(epi_net_add_peer(net, 1, "", 1) == EP_ERR_ARG && says("added already"), "twice");
    }
    rig_close(&r);
}

/* ---- threads and processes ------------------------------------------------------------------ */

/* How ranks that share no rig meet. */
struct meeting {
    const char *provider;
    struct {
        char address[EPI_NET_ADDRESS_BYTES];
        size_t bytes;
        struct epi_net_remote in;
        _Atomic int is_here, is_done;
    } rank[MOST_ENDS];
    int victim; /* who is killed in the middle; -1: nobody */
    _Atomic int num_ready, is_killed;
};

static bool meet_all(struct meeting *m, struct end *e, int rank) {
    m->rank[rank].bytes = epi_net_address(e->net, m->rank[rank].address);
    m->rank[rank].in = e->in_region.remote;
    atomic_store(&m->rank[rank].is_here, 1);
    for (int p = 0; p < MOST_ENDS; p++) {
        while (!atomic_load(&m->rank[p].is_here)) {
            tap_sleep_ms(1);
        }
        if (p != rank &&
            !need(epi_net_add_peer(e->net, p, m->rank[p].address, m->rank[p].bytes) == EP_OK,
                  "meet", rank, p)) {
            return false;
        }
    }
    return true;
}

/* What this rank still has to do; the victim, to be killed. Half of what goes to the victim waits until
 * it is dead, and then is written again and again: TCP takes some that nobody will read. */
static bool has_work(struct rig *r, struct meeting *m, int rank) {
    const struct end *e = &r->end[rank];
    const int half = NUM_WRITES / 2;
    int want = 0;
    bool works = rank == m->victim;
    for (int p = 0; p < MOST_ENDS; p++) {
        const bool waits = p == m->victim && !atomic_load(&m->is_killed);
        for (int i = 0; i < IN_FLIGHT && p != rank && !works; i++) {
            if ((waits && e->num_begun[p] == half) || !send_next(r, rank, p, &m->rank[p].in)) {
                break;
            }
        }
        want += p != rank && p != m->victim ? NUM_WRITES : 0;
    }
    for (int p = 0; p < MOST_ENDS && rank != m->victim; p++) {
        works |= p != rank && (p == m->victim ? !e->lost[p] : e->num_sent[p] < NUM_WRITES);
    }
    return works || e->num_arrived < want;
}

static int run_rank(int rank, void *ctx) {
    struct meeting *m = ctx;
    struct rig *r = calloc(1, sizeof(*r));
    struct end *e = &r->end[rank];
    const struct epi_deadline limit = epi_deadline_after(LONG_NS);
    *r = (struct rig){
        .provider = m->provider, .num = MOST_ENDS, .seed = 5, .endless = 1 + m->victim};
    bool met = end_open(r, rank, NULL, m->victim >= 0 ? 2 * EPI_NS_PER_S : LONG_NS) &&
               meet_all(m, e, rank);
    bool is_ready = false, others = true;
    while (met && others && !epi_deadline_expired(limit)) {
        const bool works = has_work(r, m, rank);
        if (!is_ready && m->victim >= 0 && rank != m->victim &&
            e->num_sent[m->victim] == NUM_WRITES / 2) {
            is_ready = true;
            atomic_fetch_add(&m->num_ready, 1);
        }
        atomic_store(&m->rank[rank].is_done, !works);
        if (poll_end(r, rank) == 0) {
            epi_sleep_ns(20 * EPI_NS_PER_US);
        }
        others = works;
        for (int p = 0; p < MOST_ENDS; p++) { /* who needs this rank's polls */
            others |= p != m->victim && !atomic_load(&m->rank[p].is_done);
        }
    }
    ok(met && !others && e->num_wrong == 0, "rank %d of %s has all", rank, m->provider);
    if (m->victim >= 0) {
        ok(e->lost[m->victim] && strstr(e->why, "peer 1"), "it has lost the victim: %s",
           e->why);
    }
    end_close(e);
    free(r);
    return 0;
}

static void test_threads(const char *provider) {
    struct meeting *m = tap_shared(sizeof(*m));
    m->provider = provider;
    m->victim = -1;
    ok(tap_run_threads(MOST_ENDS, run_rank, m) == 0, "%s: three threads", provider);
}

static void test_killed(const char *provider) {
    struct meeting *m = tap_shared(sizeof(*m));
    struct tap_ranks ranks;
    m->provider = provider;
    m->victim = 1;
    if (!ok(tap_ranks_start(&ranks, MOST_ENDS, run_rank, m) == 0, "three processes")) {
        return;
    }
    const double limit = tap_now() + tap_scaled(30);
    while (atomic_load(&m->num_ready) < MOST_ENDS - 1 && tap_now() < limit) {
        tap_sleep_ms(2);
    }
    tap_ranks_signal(&ranks, m->victim, SIGKILL);
    atomic_store(&m->is_killed, 1);
    ok(tap_ranks_wait(&ranks, 40) == 0, "%s: one of three processes is killed", provider);
    tap_ranks_free(&ranks);
}

/* ---- the fake alone ------------------------------------------------------------------------- */

static void test_again_for_ever(void) {
    const struct epi_net_faults faults[3] = {
        {.seed = 1, .connect_tries = 20, .again_peer = 1 + 2},
        {.seed = 2, .again_permille = 500},
        {.seed = 3, .max_delay = 3}};
    static struct rig r;
    if (rig_open(&r, "fake", 3, 1, faults, SHORT_NS)) {
        ok(drive(&r, 0) && all_right(&r),
           "a NIC that is busy, or not connected yet, is asked again");
        ok(r.end[0].lost[2] && r.end[0].lost_status == EP_ERR_TIMEOUT &&
               strstr(r.end[0].why, "peer 2") && strstr(r.end[0].why, "not taken by the NIC"),
           "until the deadline: %s", r.end[0].why);
        ok(!r.end[0].lost[1] && !r.end[1].lost[0] && !r.end[1].lost[2], "nobody else is lost");
    }
    rig_close(&r);
}

static void test_few_regions(void) {
    const struct epi_net_faults faults[2] = {{.seed = 1, .max_regions = 3}, {.seed = 2}};
    static struct rig r;
    if (rig_open(&r, "fake", 2, 1, faults, LONG_NS)) {
        struct epi_net_region a = {.handle = NULL}, b;
        char mem[64];
        ok(epi_net_register(r.end[0].net, mem, 64, -1, &a) == EP_OK &&
               epi_net_register(r.end[0].net, mem, 64, -1, &b) == EP_ERR_CAPACITY &&
               says("no more than 3 regions"),
           "regions are few");
        epi_net_unregister(r.end[0].net, &a);
        ok(!a.handle && epi_net_register(r.end[0].net, mem, 64, -1, &b) == EP_OK,
           "one that is given back is another's");
    }
    rig_close(&r);
}

/* An address of nobody, of somebody else, and of an endpoint of another provider. */
static void test_strangers(void) {
    static struct rig r, other;
    char address[EPI_NET_ADDRESS_BYTES];
    if (rig_open(&r, "fake", 3, 1, NULL, LONG_NS)) {
        const struct epi_net_config c = {.self = 2, .num_peers = 3, .provider = "fake"};
        struct epi_net *net = NULL;
        ok(epi_net_open(&net, &c) == EP_OK, "an endpoint");
        size_t bytes = epi_net_address(r.end[0].net, address);
        ok(epi_net_add_peer(net, 1, address, bytes) == EP_ERR_ARG && says("peer 1"),
           "peer 0 is not peer 1");
        ok(epi_net_add_peer(net, 0, address, bytes - 1) == EP_ERR_ARG && says("no address"),
           "half an address");
        memset(address, 'x', sizeof(address));
        ok(epi_net_add_peer(net, 0, address, bytes) == EP_ERR_ARG && says("no address"),
           "what is none");
        epi_net_close(&net, epi_deadline_after(0));
        if (num_providers > 1 && rig_open(&other, providers[1], 2, 1, NULL, LONG_NS)) {
            const struct epi_net_config d = {.self = 0, .num_peers = 2, .provider = "fake"};
            bytes = epi_net_address(other.end[1].net, address);
            ok(epi_net_open(&net, &d) == EP_OK &&
                   epi_net_add_peer(net, 1, address, bytes) == EP_ERR_MISMATCH &&
                   says("EP_NET_PROVIDER"),
               "peers of two providers are told");
            epi_net_close(&net, epi_deadline_after(0));
        }
        rig_close(&other);
    }
    rig_close(&r);
}

/* What a seed does to each end. */
static void draw_faults(uint64_t seed, struct epi_net_faults f[MOST_ENDS], bool deadly) {
    uint64_t state = seed;
    for (int i = 0; i < MOST_ENDS; i++) {
        f[i] = (struct epi_net_faults){.seed = tap_rand(&state)};
        f[i].max_delay = (uint32_t)(tap_rand(&state) % 30);
        f[i].connect_tries = (uint32_t)(tap_rand(&state) % 40);
        f[i].again_permille = (uint32_t)(tap_rand(&state) % 3 * 300);
        f[i].cut_peer = tap_rand(&state) % 3 == 0 ? 1 + (i + 1) % MOST_ENDS : 0;
        f[i].cut_at = (uint32_t)(tap_rand(&state) % NUM_WRITES);
        f[i].cut_polls = 1 + (uint32_t)(tap_rand(&state) % 200);
    }
    if (deadly) {
        const int i = (int)(tap_rand(&state) % MOST_ENDS);
        switch (tap_rand(&state) % 5) {
        case 0:
            f[i].kill_at = 1 + tap_rand(&state) % 400;
            break;
        case 1:
            f[i].cut_peer = 1 + (i + 1) % MOST_ENDS;
            f[i].cut_polls = 0;
            break;
        case 2:
            f[i].lost_sent_permille = 20;
            break;
        case 3:
            f[i].lost_arrived_permille = 20;
            break;
        default:
            f[i].again_peer = 1 + (i + 1) % MOST_ENDS;
        }
    }
}

/* What all ends have seen, in one number; 0: it did not end well. */
static uint64_t run_seed(uint64_t seed) {
    static struct rig r;
    struct epi_net_faults f[MOST_ENDS];
    uint64_t trace = 0;
    draw_faults(seed, f, false);
    if (rig_open(&r, "fake", MOST_ENDS, seed, f, LONG_NS) && drive(&r, 0) && all_right(&r)) {
        for (int i = 0; i < MOST_ENDS; i++) {
            trace = trace * 31 + (r.end[i].trace | 1);
        }
    }
    rig_close(&r);
    return trace;
}

/* Never wrong bytes; and every write ends, as sent or with a peer that is lost. */
static bool run_deadly(uint64_t seed) {
    static struct rig r;
    struct epi_net_faults f[MOST_ENDS];
    bool good = false;
    draw_faults(seed, f, true);
    if (rig_open(&r, "fake", MOST_ENDS, seed, f, 40 * EPI_NS_PER_MS)) {
        const struct epi_deadline limit = epi_deadline_after(LONG_NS);
        bool ended = false;
        while (!ended && !epi_deadline_expired(limit)) {
            ended = true;
            drive(&r, 1);
            for (int i = 0; i < MOST_ENDS * MOST_ENDS; i++) {
                const struct end *e = &r.end[i / MOST_ENDS];
                const int p = i % MOST_ENDS;
                ended &= i / MOST_ENDS == p || e->lost[p] || e->num_sent[p] == NUM_WRITES;
            }
        }
        good = ended && all_right(&r);
    }
    rig_close(&r);
    return good;
}

/* The same seeds in each check, and others when there is time. */
static void test_seeds(void) {
    const int num = tap_quick() ? 4 : 10 * tap_effort();
    int wrong = 0, different = 0, bad = 0;
    for (int i = 0; i < num; i++) {
        const uint64_t seed = (i < 10 ? 1 : tap_seed()) + (uint64_t)i, trace = run_seed(seed);
        if (trace == 0) {
            wrong++;
            diag("seed %llu: not all has arrived", (unsigned long long)seed);
        } else if (run_seed(seed) != trace) {
            different++;
            diag("seed %llu: the same calls have seen something else",
                 (unsigned long long)seed);
        }
        if (!run_deadly(seed)) {
            bad++;
            diag("seed %llu: a write did not end, or wrong bytes", (unsigned long long)seed);
        }
    }
    ok(wrong == 0, "%d seeds of delays, refusals and links that go down: all arrives", num);
    ok(different == 0, "a seed is replayed exactly");
    ok(bad == 0, "%d seeds of deaths, partitions and lost completions: each write ends", num);
}

/* ---- libfabric ------------------------------------------------------------------------------ */

static void find_providers(void) {
    static struct epi_net_found found[32];
    char version[16];
    providers[num_providers++] = "fake";
    const int num = epi_net_find(found, 32, version);
    const int most = tap_scaled(1) == 1 ? 8 : 2; /* sanitizers do not see into libfabric */
    for (int i = 0; i < num && num_providers < most; i++) {
        diag("libfabric %s: %s (%s) %s", version, found[i].name, found[i].domains,
             found[i].why);
        if ((!found[i].why[0] || strstr(found[i].why, "is preferred")) &&
            strstr(found[i].domains, "lo")) {
            providers[num_providers++] = found[i].name;
        }
    }
    if (num_providers == 1) {
        skip(1, "no provider of libfabric over loopback: %s", ep_last_error());
    }
}

static void test_choice(void) {
    struct epi_net_config c = {.num_peers = 1, .provider = "nosuch"};
    struct epi_net *net = NULL;
    ok(epi_net_open(&net, &c) == EP_ERR_UNSUPPORTED && !net, "a provider that is not there: %s",
       ep_last_error());
    c = (struct epi_net_config){.num_peers = 0};
    ok(epi_net_open(&net, &c) == EP_ERR_ARG, "no peers");
    setenv("EP_NET_PROVIDER", "fake", 1);
    c = (struct epi_net_config){.num_peers = 1};
    ok(epi_net_open(&net, &c) == EP_OK && strcmp(epi_net_provider(net), "fake") == 0,
       "EP_NET_PROVIDER chooses");
    epi_net_close(&net, epi_deadline_after(0));
    unsetenv("EP_NET_PROVIDER");
    if (num_providers > 1) {
        setenv("EP_NET_IFNAME", "nosuch", 1);
        ok(epi_net_open(&net, &c) == EP_ERR_UNSUPPORTED && says("EP_NET_IFNAME"),
           "an interface that is not there");
        setenv("EP_NET_IFNAME", "lo", 1);
        ok(epi_net_open(&net, &c) == EP_OK, "EP_NET_IFNAME=lo: %s", ep_last_error());
        epi_net_close(&net, epi_deadline_after(0));
        unsetenv("EP_NET_IFNAME");
    }
}

int main(void) {
    tap_deadline(100);
    find_providers();
    for (int i = 0; i < num_providers; i++) {
        test_everybody(providers[i]);
        test_wrong_key(providers[i]);
        test_killed(providers[i]);
        test_sleep(providers[i]);
        if (i > 1 && tap_effort() == 1) {
            continue; /* not the one that is chosen */
        }
        test_many_in_flight(providers[i]);
        test_silent_peer(providers[i]);
        test_close_in_flight(providers[i]);
        test_limits(providers[i]);
        test_threads(providers[i]);
    }
    test_again_for_ever();
    test_few_regions();
    test_strangers();
    test_seeds();
    test_choice();
    return done_testing();
}
