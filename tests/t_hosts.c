/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Ranks of several hosts, which are network namespaces of this machine with a cable between them: how
 * they meet with a key, by the caller's allgather and by a launcher's word; that each host is a node; what
 * a death, a stop and a cut cable are to the others. Needs root.
 */
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/ep/wires.h"
#include "tests/fake.h"
#include "tests/tap.h"

#define RANKS 4
#define KEY "a secret of the test"
#define SECONDS 60

static char space[2][32]; /* the hosts: ranks 0 and 1 are on the first */

/* How a run meets, and what happens then. */
struct run {
    const char *address; /* of rank 0; NULL: by the allgather, or as the environment says */
    bool gathers, by_launcher, has_key, over_libfabric;
    ep_status create;
    const char *says;
    void (*then)(int rank, ep_group *g, struct run *r);
    struct fake_meeting meeting;
    atomic_int at_work;
};

static struct run *run;

/* ---- hosts ------------------------------------------------------------------------------ */

static bool shell(const char *text) {
    return system(text) == 0;
}

static void pull_down(void) {
    char text[200];
    snprintf(text, sizeof(text), "ip netns del %s 2>/dev/null; ip netns del %s 2>/dev/null",
             space[0], space[1]);
    shell(text);
}

/* A cable with an end in each. */
static bool put_up(void) {
    char text[1000];
    for (int i = 0; i < 2; i++) {
        snprintf(space[i], sizeof(space[i]), "ep%d%c", (int)getpid(), 'a' + i);
    }
    snprintf(
        text, sizeof(text),
        "{ ip netns add %1$s && ip netns add %2$s && "
        "ip -n %1$s link add up0 type veth peer name up0 netns %2$s && "
        "for s in %1$s %2$s; do ip -n $s link set lo up && ip -n $s link set up0 up; done && "
        "ip -n %1$s addr add 10.77.0.1/24 dev up0 && "
        "ip -n %2$s addr add 10.77.0.2/24 dev up0; } 2>/dev/null",
        space[0], space[1]);
    return shell(text);
}

static bool enter(const char *name) {
    char path[64];
    snprintf(path, sizeof(path), "/run/netns/%s", name);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const bool good = fd >= 0 && setns(fd, CLONE_NEWNET) == 0;
    close(fd);
    return good;
}

/* ---- ranks ------------------------------------------------------------------------------ */

static int gather(void *ctx, const void *in, void *out, size_t bytes) {
    const struct epi_exchange x = fake_exchange(ctx);
    return x.allgather(x.ctx, in, bytes, out) == EP_OK ? 0 : 1;
}

static void set_number(const char *name, int n) {
    char text[16];
    snprintf(text, sizeof(text), "%d", n);
    setenv(name, text, 1);
}

static void be_launched(int rank) {
    set_number("RANK", rank);
    set_number("WORLD_SIZE", RANKS);
    set_number("LOCAL_RANK", rank % 2);
    set_number("LOCAL_WORLD_SIZE", RANKS / 2);
    setenv("MASTER_ADDR", "10.77.0.1", 1);
    setenv("MASTER_PORT", "24100", 1);
    setenv("EP_JOB", "hosts", 1);
}

static int rank_main(int rank, void *ctx) {
    struct run *r = ctx;
    struct fake_seat seat = {&r->meeting, rank, 0, SECONDS * EPI_NS_PER_S};
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;
    ep_group *g = NULL;

    if (!ok(enter(space[rank / 2]), "rank %d is on its host", rank)) {
        return 1;
    }
    if (!r->over_libfabric) {
        setenv("EP_NET_PROVIDER", "fake:2", 1);
    }
    if (r->has_key) {
        setenv("EP_JOB_KEY", KEY, 1);
    }
    if (r->by_launcher) {
        be_launched(rank);
    } else {
        c.rank = rank;
        c.num_ranks = RANKS;
        c.address = r->address;
        c.allgather = r->gathers ? gather : NULL;
        c.allgather_ctx = &seat;
    }
    c.num_experts = RANKS;
    c.max_tokens = 8;
    c.max_topk = 2;
    c.max_row_bytes = 64;
    c.timeout_ms = 20000;
    ep_status st = ep_group_create(&g, &c);
    bool good = ok(st == r->create && (!r->says || strstr(ep_last_error(), r->says)),
                   "ep_group_create: %s (%s)", ep_status_string(st), ep_last_error());
    if (st == EP_OK) {
        good &=
            ok(ep_group_num_nodes(g) == 2 && g->nodes.own == rank / 2, "each host is a node");
        if (r->then) {
            r->then(rank, g, r);
        }
        ep_group_destroy(&g);
    }
    return good && tap_num_failed() == 0 ? 0 : 1;
}

static bool run_ranks(struct run how, const char *name, int want_failed) {
    *run = how;
    run->meeting.num_ranks = RANKS;
    return ok(tap_spawn_ranks(RANKS, rank_main, run, SECONDS) == want_failed, "%s", name);
}

/* ---- what happens then ------------------------------------------------------------------ */

static double await_fault(ep_group *g, struct ep_fault *f, double seconds) {
    const double start = tap_now();
    *f = (struct ep_fault)EP_FAULT_INIT;
    while (f->status == EP_OK && tap_now() - start < seconds) {
        ep_group_fault(g, f);
        tap_sleep_ms(2);
    }
    return tap_now() - start;
}

static void at_work(struct run *r) {
    atomic_fetch_add(&r->at_work, 1);
    while (atomic_load(&r->at_work) < RANKS) {
        tap_sleep_ms(1);
    }
}

/* Both of a host at once. */
static void a_host_is_killed(int rank, ep_group *g, struct run *r) {
    struct ep_fault f;
    at_work(r);
    if (rank >= 2) {
        raise(SIGKILL);
    }
    const double took = await_fault(g, &f, 30);
    ok(f.status == EP_ERR_PEER && f.rank >= 2 && took < 5 * tap_scaled(1), "after %.1f s: %s",
       took, f.message);
}

static void rank_0_is_killed(int rank, ep_group *g, struct run *r) {
    struct ep_fault f;
    at_work(r);
    if (rank == 0) {
        raise(SIGKILL);
    }
    const double took = await_fault(g, &f, 30);
    ok(f.status == EP_ERR_PEER && f.rank == 0 && took < 5 * tap_scaled(1), "after %.1f s: %s",
       took, f.message);
}

static void set_cable(const char *how) {
    char text[100];
    snprintf(text, sizeof(text), "ip link set up0 %s", how);
    ok(shell(text), "the cable is %s", how);
}

static void the_cable_is_cut(int rank, ep_group *g, struct run *r) {
    struct ep_fault f;
    at_work(r);
    if (rank == 0) {
        set_cable("down");
    }
    const double took = await_fault(g, &f, 40);
    ok(f.status == EP_ERR_PEER && took < 30 * tap_scaled(1) && f.rank / 2 != rank / 2,
       "after %.1f s: %s", took, f.message);
}

static void the_cable_is_out_for_a_moment(int rank, ep_group *g, struct run *r) {
    struct ep_fault f;
    at_work(r);
    if (rank == 0) {
        set_cable("down");
        tap_sleep_ms(1000);
        set_cable("up");
    }
    await_fault(g, &f, 3);
    ok(f.status == EP_OK, "it is nobody's fault: %s", f.message);
}

int main(void) {
    char version[16];
    struct epi_net_found found;

    run = tap_shared(sizeof(*run));
    if (geteuid() != 0) {
        skip_all("network namespaces need root");
    }
    if (!put_up()) {
        pull_down();
        skip_all("this system makes no network namespaces (ip netns)");
    }
    tap_deadline(4 * SECONDS);
    run_ranks((struct run){.address = "10.77.0.1:24001", .has_key = true},
              "ranks of two hosts with a key meet at an address", 0);
    run_ranks((struct run){.by_launcher = true, .has_key = true},
              "ranks of two hosts with a key meet as the environment says", 0);
    run_ranks((struct run){.gathers = true}, "by the caller's allgather they need nothing", 0);
    tap_expect_log("without a key");
    run_ranks((struct run){.by_launcher = true},
              "where the launcher says that there are several hosts, a key is a warning", 0);
    if (epi_net_find(&found, 1, version) > 0) {
        run_ranks((struct run){.gathers = true, .over_libfabric = true}, "over libfabric", 0);
    } else {
        skip(1, "libfabric is not here");
    }
    tap_expect_log("died");
    run_ranks((struct run){.gathers = true, .then = a_host_is_killed}, "a host is killed", 2);
    run_ranks((struct run){.gathers = true, .then = rank_0_is_killed}, "rank 0 is killed", 1);
    run_ranks((struct run){.gathers = true, .then = the_cable_is_out_for_a_moment},
              "a cable that is out for a second", 0);
    run_ranks((struct run){.gathers = true, .then = the_cable_is_cut}, "a cable is cut", 0);
    pull_down();
    return done_testing();
}
