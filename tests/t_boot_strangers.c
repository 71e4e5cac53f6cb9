/* SPDX-License-Identifier: MIT */
/* class: timed, long */
/*
 * Who does not belong to a job is turned away and told why, does not disturb it, and leaves nothing
 * behind; who is missing is named.
 */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tests/gpu.h"
#include "tests/meet.h"
#include "tests/rig.h"
#include "tests/tap.h"

struct odd {
    int port;
    int num_ranks;
    _Atomic int is_over;
};

static ep_status join(struct odd *o, int rank, int num_ranks, const char *job,
                      int64_t timeout_ns, struct epi_boot **boot) {
    return meet_join(boot, o->port, rank, num_ranks, job, timeout_ns);
}

/* Two jobs at one address at the same time, and a rank that takes itself for one of a third. */
static int jobs_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct rig_footprint was = rig_footprint();
    struct epi_boot *boot = NULL;
    if (rank == 4) {
        ep_status st = join(o, 1, 2, "green", MEET_SHORT_NS, &boot);
        ok(st == EP_ERR_TIMEOUT && meet_says("found no rank 0"), "green finds nobody");
        return 0;
    }
    ok(join(o, rank % 2, 2, rank < 2 ? "red" : "blue", MEET_LONG_NS, &boot) == EP_OK,
       "a job meets: %s", ep_last_error());
    if (boot) {
        int all[2];
        ok(epi_boot_allgather(boot, &rank, sizeof(rank), all, meet_in_time()) == EP_OK &&
               all[0] == rank / 2 * 2 && all[1] == rank / 2 * 2 + 1,
           "and only itself");
    }
    epi_boot_destroy(&boot);
    ok(rig_same_footprint(was), "nothing is left");
    return 0;
}

/* Two threads of each process make a group at the same address at the same time. */
struct pair {
    struct odd *odd;
    int rank;
};

static int pair_thread(int thread, void *ctx) {
    struct pair *p = ctx;
    struct epi_boot *boot = NULL;
    (void)thread;
    ok(join(p->odd, p->rank, 2, "pair", MEET_LONG_NS, &boot) == EP_OK, "one of two: %s",
       ep_last_error());
    if (boot) {
        meet_check_group(boot, p->rank, 2);
    }
    epi_boot_destroy(&boot);
    return 0;
}

static int pair_rank(int rank, void *ctx) {
    struct pair p = {ctx, rank};
    return tap_run_threads(2, pair_thread, &p);
}

/* Two processes take themselves for rank 0. */
static int two_roots_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    if (rank == 0) {
        ok(join(o, 0, 2, "two", MEET_LONG_NS, &boot) == EP_OK, "the first: %s",
           ep_last_error());
    } else {
        struct epi_meet m;
        meet_of(&m, o->port, 1, 2, "two");
        close(meet_dial(&m, 0)); /* the first is here */
        ok(join(o, 0, 2, "two", MEET_LONG_NS, &boot) == EP_ERR_SYSTEM &&
               meet_says("as rank 0 of this job") && meet_says("EP_JOB"),
           "the second is told");
        ok(join(o, 1, 2, "two", MEET_LONG_NS, &boot) == EP_OK, "and would do as rank 1: %s",
           ep_last_error());
    }
    epi_boot_destroy(&boot);
    return 0;
}

/* Rank 2 of the test is a second rank 1 of a group of 3 whose real rank 2 comes last. */
static int duplicate_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    if (rank == 2) {
        tap_sleep_ms(500);
        ep_status st = join(o, 1, 3, "blue", MEET_LONG_NS, &boot);
        ok(st == EP_ERR_MISMATCH && meet_says("two processes claim to be rank 1"),
           "it is told");
    }
    ok(join(o, rank, 3, "blue", MEET_LONG_NS, &boot) == EP_OK, "the others: %s",
       ep_last_error());
    epi_boot_destroy(&boot);
    return 0;
}

/* Rank 2 comes when all is over, and learns why. */
static int world_size_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    if (rank == 2) {
        tap_sleep_ms(300);
    }
    ep_status st = join(o, rank, rank == 1 ? 4 : 3, "blue", MEET_LONG_NS, &boot);
    ok(st == EP_ERR_MISMATCH && meet_says("rank 1 was told there are 4 ranks") &&
           meet_says("told 3"),
       "all are told");
    return 0;
}

static void say(int fd, const void *data, size_t bytes) {
    ok(send(fd, data, bytes, MSG_NOSIGNAL) == (ssize_t)bytes, "the stranger speaks");
}

static int strangers_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct rig_footprint was = rig_footprint();
    struct epi_boot *boot = NULL;
    if (rank == 1) {
        static const char http[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        struct epi_meet m;
        uint8_t frame[EPI_WIRE_HEADER_BYTES];
        char answer[512] = "";
        meet_of(&m, o->port, 1, 2, NULL);
        int silent = meet_dial(&m, 0);
        int slow = meet_dial(&m, 0);
        say(slow, "LEP", 3); /* begins well and never goes on */
        int garbage = meet_dial(&m, 0);
        say(garbage, http, sizeof(http) - 1);
        ok(recv(garbage, answer, sizeof(answer), 0) <= 0, "garbage is hung up on");
        int liar = meet_dial(&m, 0);
        struct epi_frame lie = {.type = EPI_FRAME_RESULT, .data_bytes = 200 << 20};
        epi_wire_header(frame, &lie);
        say(liar, frame, sizeof(frame));
        for (int i = 0; i < 64; i++) {
            (void)!send(liar, answer, sizeof(answer), MSG_NOSIGNAL);
        }
        ok(recv(liar, answer, sizeof(answer), 0) <= 0, "a stranger may not fill our memory");
        int gone = meet_dial(&m, 0);
        close(gone);
        ok(join(o, 1, 2, NULL, MEET_LONG_NS, &boot) == EP_OK, "the rank: %s", ep_last_error());
        int fds[] = {silent, slow, garbage, liar};
        for (int i = 0; i < 4; i++) {
            close(fds[i]);
        }
    } else {
        ok(join(o, 0, 2, NULL, MEET_LONG_NS, &boot) == EP_OK, "rank 0: %s", ep_last_error());
    }
    if (boot) {
        meet_check_group(boot, rank, 2);
    }
    epi_boot_destroy(&boot);
    ok(rig_same_footprint(was), "nothing is left");
    return 0;
}

/* ---- a crowd ---- */

#define FEW_FILES 64

/* Connects, says nothing, and again, until rank 0 is gone. */
static void *flood(void *arg) {
    struct epi_meet *m = arg;
    struct epi_addr places[EPI_MEET_MAX_ADDRS];
    int num = 0;
    const double end = tap_now() + 2.5 * rig_scale();
    epi_meet_places(m, places, &num);
    while (tap_now() < end) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        (void)!connect(fd, (struct sockaddr *)&places[0].ss, places[0].len);
        close(fd);
    }
    return NULL;
}

/* Rank 2 of the test is the crowd. Rank 0's deadline holds in it, and then a group forms in it. */
static int crowd_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    const double start = tap_now();
    if (rank == 2) {
        pthread_t threads[3];
        struct epi_meet m;
        meet_of(&m, o->port, 1, 2, NULL);
        for (int i = 0; i < 3; i++) {
            pthread_create(&threads[i], NULL, flood, &m);
        }
        for (int i = 0; i < 3; i++) {
            pthread_join(threads[i], NULL);
        }
        return 0;
    }
    if (rank == 0) {
        ok(join(o, 0, 2, NULL, MEET_SHORT_NS, &boot) == EP_ERR_TIMEOUT &&
               meet_says("missing: 1"),
           "alone in a crowd");
        const double took = tap_now() - start;
        ok(took < 3.0 * rig_scale(), "the deadline holds: %.1f s", took);
        o->is_over = 1;
    }
    while (rank == 1 && !o->is_over) {
        tap_sleep_ms(5);
    }
    ok(join(o, rank, 2, NULL, MEET_LONG_NS, &boot) == EP_OK, "the group forms in the crowd: %s",
       ep_last_error());
    epi_boot_destroy(&boot);
    return 0;
}

/* Silent connections take all descriptors that rank 0 may have. */
static int descriptors_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    int fds[2 * FEW_FILES];
    if (rank == 0) {
        const struct rlimit few = {FEW_FILES, FEW_FILES};
        setrlimit(RLIMIT_NOFILE, &few);
    } else {
        struct epi_meet m;
        meet_of(&m, o->port, 1, 2, NULL);
        for (int i = 0; i < 2 * FEW_FILES; i++) {
            fds[i] = meet_dial(&m, 0);
        }
    }
    ok(join(o, rank, 2, NULL, MEET_LONG_NS, &boot) == EP_OK, "rank %d: %s", rank,
       ep_last_error());
    if (boot) {
        meet_check_group(boot, rank, 2);
    }
    for (int i = 0; rank == 1 && i < 2 * FEW_FILES; i++) {
        close(fds[i]);
    }
    epi_boot_destroy(&boot);
    return 0;
}

/* A sandbox does not let rank 0 accept. */
static bool forbid_accept(void) {
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_accept4, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    const struct sock_fprog program = {sizeof(rules) / sizeof(rules[0]), rules};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

static int sandbox_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    if (rank == 0 && !forbid_accept()) {
        skip(1, "filters cannot be set here");
        join(o, 0, 2, NULL, MEET_LONG_NS, &boot);
    } else if (rank == 0) {
        const double start = tap_now();
        ok(join(o, 0, 2, NULL, MEET_LONG_NS, &boot) == EP_ERR_SYSTEM &&
               meet_says("cannot accept a connection: Operation not permitted"),
           "what is wrong is said");
        ok(tap_now() - start < rig_within(10), "and not waited for");
    } else {
        ep_status st = join(o, 1, 2, NULL, 2 * MEET_SHORT_NS, &boot);
        ok(st == EP_OK || st == EP_ERR_TIMEOUT, "the other does not wait for ever");
    }
    epi_boot_destroy(&boot);
    return 0;
}

/* Rank 0 has no descriptor and no stranger to close. */
static int no_descriptor_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    if (rank == 0) {
        const struct rlimit few = {FEW_FILES, FEW_FILES};
        int last[2] = {-1, -1};
        setrlimit(RLIMIT_NOFILE, &few);
        for (int fd = dup(0); fd >= 0; fd = dup(0)) {
            last[fd % 2] = fd;
        }
        close(last[0]); /* for the kicker and the listener */
        close(last[1]);
    }
    ep_status st = join(o, rank, 2, NULL, rank == 0 ? MEET_LONG_NS : 2 * MEET_SHORT_NS, &boot);
    if (rank == 0) {
        ok(st == EP_ERR_SYSTEM && meet_says("cannot accept") && meet_says("ulimit -n"),
           "rank 0 says what it lacks: %s", ep_last_error());
    } else {
        ok(st == EP_ERR_TIMEOUT || st == EP_ERR_PEER, "the other does not wait for ever");
    }
    return 0;
}

/* Ranks 0 and 2 of 4 come. */
static int missing_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct rig_footprint was = rig_footprint();
    struct epi_boot *boot = NULL;
    double start = tap_now();
    /* Once rank 0's clock runs out first, once the other's. */
    int64_t timeout_ns = (rank == 0) == (o->num_ranks == 0) ? MEET_SHORT_NS : MEET_SHORT_NS * 3;
    ep_status st = join(o, rank * 2, 4, NULL, timeout_ns, &boot);
    double took = tap_now() - start;
    bool is_first = timeout_ns == MEET_SHORT_NS;
    if (is_first || rank == 1) {
        ok(st == EP_ERR_TIMEOUT && meet_says("missing: 1, 3") && meet_says("2 of 4"),
           "the missing");
    } else {
        ok(st == EP_ERR_PEER && meet_says("rank 2 came and went"),
           "rank 0 learns that 2 gave up");
    }
    ok(took < 10.0, "in time: %.1f s", took);
    ok(rig_same_footprint(was), "nothing is left");
    return 0;
}

static void test_turned_away(void) {
    struct odd *o = tap_shared(sizeof(*o));
    o->port = tap_free_port();
    tap_expect_log("turned away");
    tap_expect_log("dropped ");
    ok(tap_spawn_ranks(5, jobs_rank, o, 60) == 0, "jobs at one address do not meet");
    ok(tap_spawn_ranks(2, pair_rank, o, 60) == 0, "two groups of the same ranks at once");
    ok(tap_spawn_ranks(2, two_roots_rank, o, 60) == 0, "two ranks 0");
    ok(tap_spawn_ranks(3, duplicate_rank, o, 60) == 0, "a rank that is there already");
    ok(tap_spawn_ranks(3, world_size_rank, o, 60) == 0, "another world size fails the job");
    ok(tap_spawn_ranks(2, strangers_rank, o, 60) == 0, "strangers do not disturb");
    ok(tap_spawn_ranks(3, crowd_rank, o, 60) == 0, "nor does a crowd of them");
    ok(tap_spawn_ranks(2, descriptors_rank, o, 60) == 0, "nor one that takes all descriptors");
    ok(tap_spawn_ranks(2, no_descriptor_rank, o, 60) == 0, "no descriptor");
    ok(tap_spawn_ranks(2, sandbox_rank, o, 60) == 0, "a sandbox that forbids to accept");
    ok(tap_spawn_ranks(2, missing_rank, o, 60) == 0, "missing ranks are named by rank 0");
    o->num_ranks = 1;
    ok(tap_spawn_ranks(2, missing_rank, o, 60) == 0, "and by another rank that gives up");
}

static void test_alone(void) {
    struct odd o = {.port = tap_free_port()};
    struct rig_footprint was = rig_footprint();
    struct epi_boot *boot = NULL;
    ok(join(&o, 1, 2, NULL, MEET_SHORT_NS, &boot) == EP_ERR_TIMEOUT &&
           meet_says("found no rank 0") && meet_says("127.0.0.1"),
       "no rank 0");
    ok(join(&o, 0, 3, NULL, MEET_SHORT_NS, &boot) == EP_ERR_TIMEOUT &&
           meet_says("missing: 1, 2"),
       "rank 0 alone");
    struct epi_meet m;
    struct epi_addr places[EPI_MEET_MAX_ADDRS];
    int num = 0;
    meet_of(&m, o.port, 0, 2, NULL);
    epi_meet_places(&m, places, &num);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (!ok(bind(fd, (struct sockaddr *)&places[0].ss, places[0].len) == 0 &&
                listen(fd, SOMAXCONN) == 0,
            "a thread of this process occupies the place")) {
        return;
    }
    ok(join(&o, 0, 2, NULL, MEET_SHORT_NS, &boot) == EP_ERR_TIMEOUT &&
           meet_says("another group of this process") && meet_says("127.0.0.1"),
       "a place in use: by whom, and what to do");
    ok(join(&o, 1, 2, NULL, MEET_SHORT_NS, &boot) == EP_ERR_TIMEOUT &&
           meet_says("does not answer as rank"),
       "one that is not rank 0");
    close(fd);
    ok(rig_same_footprint(was), "nothing is left");
}

int main(void) {
    gpu_never("how ranks meet");
    tap_deadline(100);
    test_alone();
    test_turned_away();
    return done_testing();
}
