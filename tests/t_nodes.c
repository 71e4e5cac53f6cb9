/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Which ranks are a node: those of a host, or as EP_NODE_SIZE says; what it must not say is refused by
 * all ranks alike. Memory is mapped within a node only. A group of several nodes refuses what it cannot
 * do yet, and a fault or a goodbye of one node reaches the others. Each rank has an endpoint and a proxy,
 * by which it writes to its relays, which cost nothing while they are idle and leave nothing behind.
 */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "kernel/put.h"
#include "src/ep/wires.h"

#include "tests/tap.h"
#include "tests/world.h"

/* ---- the topology alone ----------------------------------------------------------------- */

/* Each rank is on hosts[rank]; a place begins with the hint of its host. */
struct site {
    const char *hosts;
};

static ep_status gather(void *ctx, const void *in, size_t bytes, void *out) {
    const struct site *s = ctx;
    for (size_t r = 0; s->hosts[r]; r++) {
        char *to = (char *)out + r * bytes;
        memcpy(to, in, bytes);
        to[0] = s->hosts[r];
    }
    return EP_OK;
}

/* "0,1|2" are two nodes; then the ranks that relay for the last rank. */
static void describe(const struct epi_nodes *n, int num_ranks, char *out, size_t bytes) {
    size_t at = 0;
    for (int d = 0; d < n->num; d++) {
        for (int i = n->first[d]; i < n->first[d + 1]; i++) {
            const char *between = i > n->first[d] ? "," : d > 0 ? "|" : "";
            at += (size_t)snprintf(out + at, bytes - at, "%s%d", between, n->ranks[i]);
        }
    }
    at += (size_t)snprintf(out + at, bytes - at, " via");
    for (int d = 0; d < n->num; d++) {
        at += (size_t)snprintf(out + at, bytes - at, " %d", epi_relay(n, num_ranks - 1, d));
    }
}

static void topology(const char *sizes, const char *hosts, const char *want) {
    struct site s = {hosts};
    const int num_ranks = (int)strlen(hosts);
    const struct epi_exchange x = {gather, &s, num_ranks - 1, num_ranks};
    struct epi_nodes n = {0};
    char got[200] = "refused";

    setenv("EP_NODE_SIZE", sizes, 1);
    if (epi_nodes_create(&n, &x) == EP_OK) {
        describe(&n, num_ranks, got, sizeof(got));
        ok(n.own == n.node[num_ranks - 1] &&
               n.ranks[n.first[n.own] + n.local[num_ranks - 1]] == num_ranks - 1,
           "it finds itself");
    }
    ok(strcmp(got, want) == 0, "EP_NODE_SIZE=%s on hosts %s: %s", sizes, hosts, got);
    epi_nodes_free(&n);
    unsetenv("EP_NODE_SIZE");
}

static void refused(const char *sizes, const char *hosts, ep_status status, const char *says) {
    struct site s = {hosts};
    const int num_ranks = (int)strlen(hosts);
    const struct epi_exchange x = {gather, &s, 0, num_ranks};
    struct epi_nodes n = {0};

    setenv("EP_NODE_SIZE", sizes, 1);
    const ep_status st = epi_nodes_create(&n, &x);
    ok(st == status && strstr(ep_last_error(), says), "EP_NODE_SIZE=%s of %d ranks: %s", sizes,
       num_ranks, st == EP_OK ? "taken" : ep_last_error());
    unsetenv("EP_NODE_SIZE");
}

static void topologies(void) {
    topology("", "aaaa", "0,1,2,3 via 3");
    topology("", "abab", "0,2|1,3 via 2 3");
    topology("", "abb", "0|1,2 via 0 2");
    topology("2", "aaaaa", "0,1|2,3|4 via 0 2 4");
    topology("8", "aaa", "0,1,2 via 2");
    topology("2,3,1", "aaaaaa", "0,1|2,3,4|5 via 0 2 5");
    topology("1,3", "abbb", "0|1,2,3 via 0 3");
    topology("3,1", "aaab", "0,1,2|3 via 0 3");
    refused("2", "aba", EP_ERR_MISMATCH, "ranks 0 and 1");
    refused("2,2", "aaa", EP_ERR_ARG, "which make 3");
    refused("2,2", "aaaaa", EP_ERR_ARG, "which make 5");
    refused("0", "aa", EP_ERR_ARG, "\"0\"");
    refused("2,", "aa", EP_ERR_ARG, "\"2,\"");
    refused(",2", "aa", EP_ERR_ARG, "\",2\"");
    refused("2x", "aa", EP_ERR_ARG, "\"2x\"");
    refused("-1", "aa", EP_ERR_ARG, "\"-1\"");
    refused("99999999999999999999", "aa", EP_ERR_ARG, "must be the number of ranks");
}

/* ---- groups ----------------------------------------------------------------------------- */

static void own_size(struct ep_group_config *config, int rank, void *ctx) {
    (void)ctx;
    (void)config;
    setenv("EP_NODE_SIZE", rank == 2 ? "3" : "2", 1);
}

static void low_latency(struct ep_group_config *config, int rank, void *ctx) {
    (void)rank;
    (void)ctx;
    config->ll_max_tokens = 4;
}

static void check_memory(struct world *w) {
    const struct epi_nodes *n = &w->group->nodes;
    for (int r = 0; r < w->num_ranks; r++) {
        const bool near = n->node[r] == n->own;
        world_check(w,
                    near == (w->group->k.peer[r] != 0) && near == (w->group->k.board[r] != 0),
                    "rank %d has %s address for rank %d", w->rank, near ? "no" : "an", r);
    }
}

static void await_fault(struct world *w, struct ep_fault *f) {
    *f = (struct ep_fault)EP_FAULT_INIT;
    for (int i = 0; i < 10000 && f->status == EP_OK; i++) {
        world_is(w, ep_group_fault(w->group, f), EP_OK, "ep_group_fault");
        tap_sleep_ms(f->status == EP_OK ? 1 : 0);
    }
}

/* What r has relays for, or what relays for r, writes to it and is written to. */
static void write_to_all(struct world *w) {
    const struct epi_wires *wires = w->group->wires;
    const struct epi_nodes *n = &w->group->nodes;
    const struct k_net *net = epi_wires_net(wires);
    k_u64 *staging = epi_wires_staging(wires);
    const double end = tap_now() + 60;

    world_barrier(w); /* the group is made */
    staging[0] = 1000 + (k_u64)w->rank;
    for (int back = 0; back < 2; back++) {
        for (int r = 0; r < w->num_ranks; r++) {
            const bool far = n->node[r] != n->own;
            const bool to = far && epi_relay(n, w->rank, n->node[r]) == r;
            const bool from = far && epi_relay(n, r, n->own) == w->rank;
            const k_u32 what = K_PUT_WHAT(r, 0, back, 0);
            const k_u64 *arrived = (const k_u64 *)net->arrived + K_PUT_WORD(net, what);
            const int place = 1 + back * w->num_ranks;
            if (back ? from : to) {
                k_put(net, what, 0, 8 * (k_u64)(place + w->rank), 8);
            }
            while ((back ? to : from) && k_acquire(arrived) == 0 && tap_now() < end) {
                tap_sleep_ms(1);
            }
            world_check(w, !(back ? to : from) || staging[place + r] == 1000 + (k_u64)r,
                        "what rank %d writes has not arrived", r);
        }
    }
}

/* Of two nodes: the second raises it. */
static void a_fault_crosses(struct world *w) {
    struct ep_needs needs = EP_NEEDS_INIT;
    struct ep_fault f;

    check_memory(w);
    write_to_all(w);
    world_check(w, ep_group_num_nodes(w->group) == 2, "two nodes");
    needs.max_tokens = 1;
    world_fails(w, ep_group_grow(w->group, &needs), EP_ERR_UNSUPPORTED, "2 nodes",
                "ep_group_grow");
    world_barrier(w);
    if (w->rank == 3) {
        world_is(w, ep_group_abort(w->group), EP_OK, "ep_group_abort");
    }
    await_fault(w, &f);
    world_check(w, f.status == EP_ERR_INTERRUPTED && f.reporter == 3, "%d: %s", f.status,
                f.message);
}

static void a_rank_dies(struct world *w) {
    struct ep_fault f;

    world_barrier(w);
    if (w->rank == 3) {
        raise(SIGKILL);
    }
    await_fault(w, &f);
    world_check(w, f.status == EP_ERR_PEER && f.rank == 3, "%d: %s", f.status, f.message);
}

/* Rank 3 lives, but its endpoint is gone: whoever writes there says so to all. */
static void a_link_goes(struct world *w) {
    const struct k_net *net = epi_wires_net(w->group->wires);
    struct ep_fault f;

    world_barrier(w);
    if (w->rank == 3) {
        epi_wires_stop(w->group->wires);
    }
    world_barrier(w);
    if (w->rank == 1) {
        k_put(net, K_PUT_WHAT(3, 0, 0, 0), 0, 0, 8);
    }
    await_fault(w, &f);
    world_check(w,
                f.status == EP_ERR_TIMEOUT && f.rank == 3 && f.reporter == 1 &&
                    strstr(f.message, "rank 1 cannot write to rank 3"),
                "%d: %s", f.status, f.message);
}

static void run_groups(bool processes) {
    const char *way = processes ? "processes" : "threads";
    struct world_setup s;

    world_defaults(&s, 4);
    s.host = true;
    s.processes = processes;
    s.body = a_fault_crosses;
    setenv("EP_NODE_SIZE", "1,3", 1);
    ok(world_run(&s) == 0, "memory ends at the node, and a fault does not, %s", way);
    s.body = a_link_goes;
    setenv("EP_NODE_SIZE", "2", 1);
    ok(processes || world_run(&s) == 0, "a rank that cannot be written to is the fault of all");
    s.create = EP_ERR_UNSUPPORTED;
    s.tune = low_latency;
    s.create_says = "2 nodes|ll_max_tokens";
    ok(world_run(&s) == 0, "low-latency mode between nodes is refused, %s", way);
    s.create = EP_ERR_ARG;
    s.tune = NULL;
    s.create_says = "EP_NODE_SIZE|which make 4";
    setenv("EP_NODE_SIZE", "1,2", 1);
    ok(world_run(&s) == 0, "sizes that are not those of all ranks are refused, %s", way);
    unsetenv("EP_NODE_SIZE");
}

/* CPU seconds of this process. */
static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

static void is_idle(struct world *w) {
    tap_sleep_ms(1500); /* at first a proxy is awake more often */
    world_barrier(w);
    const double cpu = cpu_seconds(), start = tap_now();
    tap_sleep_ms(500);
    const double used = (cpu_seconds() - cpu) / (tap_now() - start);
    world_check(w, used < 0.15, "an idle group takes %.1f %% of a core", 100 * used);
}

static int num_threads(void) {
    DIR *d = opendir("/proc/self/task");
    int n = -2; /* . and .. */
    while (d && readdir(d)) {
        n++;
    }
    if (d) {
        closedir(d);
    }
    return n;
}

/* Of threads, whose process is this one. */
static void leaves_nothing(void) {
    struct world_setup s;
    const int fds = tap_num_fds(), threads = num_threads();

    world_defaults(&s, 4);
    s.host = true;
    setenv("EP_NODE_SIZE", "2", 1);
    s.body = is_idle;
    ok(world_run(&s) == 0, "a group of two nodes that is idle costs nothing");
    const double start = tap_now();
    s.body = write_to_all;
    ok(world_run(&s) == 0, "writes between nodes, and at once the end, %s",
       getenv("EP_NET_PROVIDER"));
    ok(tap_now() - start < 20, "the end takes no longer than it may");
    for (int i = 0; i < 500 && num_threads() > threads; i++) {
        tap_sleep_ms(10);
    }
    ok(tap_num_fds() == fds && num_threads() == threads,
       "nothing is left: %d descriptors of %d, %d threads of %d", tap_num_fds(), fds,
       num_threads(), threads);
}

int main(void) {
    struct epi_net_found found;
    struct world_setup s;
    char version[16];

    tap_deadline(180);
    setenv("EP_NET_PROVIDER", "fake:1", 1);
    tap_expect_log("rank 3 cannot be written to");
    topologies();
    run_groups(false);
    run_groups(true);
    leaves_nothing();
    if (epi_net_find(&found, 1, version) > 0) {
        unsetenv("EP_NET_PROVIDER");
        setenv("EP_NET_IFNAME", "lo", 1);
        leaves_nothing(); /* what libfabric keeps for itself, it keeps once */
        setenv("EP_NET_PROVIDER", "fake", 1);
    } else {
        skip(4, "libfabric is not here");
    }
    world_defaults(&s, 4);
    s.host = s.processes = true;
    s.tune = own_size;
    s.create = EP_ERR_MISMATCH;
    s.create_says = "EP_NODE_SIZE|rank 0|rank 2";
    ok(world_run(&s) == 0, "ranks that disagree in EP_NODE_SIZE are named");
    s.create = EP_OK;
    s.tune = NULL;
    s.create_says = NULL;
    s.body = a_rank_dies;
    setenv("EP_NODE_SIZE", "2", 1);
    tap_expect_log("rank 3 died");
    ok(world_run(&s) == 1, "a death is known in all nodes");
    return done_testing();
}
