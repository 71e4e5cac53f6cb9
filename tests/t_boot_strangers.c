/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Who does not belong to a job is turned away and told why, does not disturb it, and leaves nothing
 * behind; who is missing is named.
 */
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "src/boot/wire.h"
#include "tests/gpu.h"
#include "tests/meet.h"
#include "tests/rig.h"
#include "tests/tap.h"

struct odd {
    int port;
    int num_ranks;
};

static ep_status join(struct odd *o, int rank, int num_ranks, const char *job,
                      int64_t timeout_ns, struct epi_boot **boot) {
    return meet_join(boot, o->port, rank, num_ranks, job, timeout_ns);
}

static int wrong_job_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct rig_footprint was = rig_footprint();
    struct epi_boot *boot = NULL;
    if (rank == 1) {
        ep_status st = join(o, 1, 2, "red", MEET_LONG_NS, &boot);
        ok(st == EP_ERR_MISMATCH && meet_says("another job is using this address"),
           "red is told");
        ok(rig_same_footprint(was), "nothing is left of the failure");
    }
    ok(join(o, rank, 2, "blue", MEET_LONG_NS, &boot) == EP_OK, "blue meets: %s",
       ep_last_error());
    if (boot) {
        meet_check_group(boot, rank, 2);
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

static int world_size_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    ep_status st = join(o, rank, rank == 1 ? 4 : 3, "blue", MEET_LONG_NS, &boot);
    if (rank == 2 && st == EP_ERR_TIMEOUT) {
        return 0; /* came after all was over, and rank 0 was gone */
    }
    ok(st == EP_ERR_MISMATCH && meet_says("rank 1 was told there are 4 ranks") &&
           meet_says("told 3"),
       "all are told");
    return 0;
}

static int dial(int port) {
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < 2000; i++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0) {
            return fd;
        }
        close(fd);
        tap_sleep_ms(5);
    }
    return -1;
}

static void say(int fd, const void *data, size_t bytes) {
    ok(send(fd, data, bytes, MSG_NOSIGNAL) == (ssize_t)bytes, "the stranger speaks");
}

static size_t hello_bytes(uint8_t out[64], uint32_t version) {
    struct epi_hello hello = {EPI_WIRE_PROTOCOL, version, 2, 1, 0};
    struct epi_frame frame = {.type = EPI_FRAME_HELLO, .data_bytes = EPI_WIRE_HELLO_BYTES};
    epi_wire_header(out, &frame);
    epi_wire_put_hello(out + EPI_WIRE_HEADER_BYTES, &hello);
    return EPI_WIRE_HEADER_BYTES + EPI_WIRE_HELLO_BYTES;
}

static int strangers_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct rig_footprint was = rig_footprint();
    struct epi_boot *boot = NULL;
    if (rank == 1) {
        static const char http[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        uint8_t frame[64];
        char answer[512] = "";
        int silent = dial(o->port);
        int slow = dial(o->port);
        say(slow, "LEP", 3); /* begins well and never goes on */
        int garbage = dial(o->port);
        say(garbage, http, sizeof(http) - 1);
        ok(recv(garbage, answer, sizeof(answer), 0) <= 0, "garbage is hung up on");
        int liar = dial(o->port);
        struct epi_frame lie = {.type = EPI_FRAME_RESULT, .data_bytes = 200 << 20};
        epi_wire_header(frame, &lie);
        say(liar, frame, EPI_WIRE_HEADER_BYTES);
        for (int i = 0; i < 64; i++) {
            (void)!send(liar, answer, sizeof(answer), MSG_NOSIGNAL);
        }
        ok(recv(liar, answer, sizeof(answer), 0) <= 0, "a stranger may not fill our memory");
        int old = dial(o->port);
        say(old, frame, hello_bytes(frame, 1));
        ssize_t n = recv(old, answer, sizeof(answer) - 1, 0);
        struct epi_frame reject;
        ok(n > 0 && epi_wire_parse((uint8_t *)answer, (size_t)n, &reject) > 0 &&
               reject.type == EPI_FRAME_REJECT && reject.status == EP_ERR_VERSION,
           "another version is told so");
        int gone = dial(o->port);
        close(gone);
        ok(join(o, 1, 2, NULL, MEET_LONG_NS, &boot) == EP_OK, "the rank: %s", ep_last_error());
        int fds[] = {silent, slow, garbage, liar, old};
        for (int i = 0; i < 5; i++) {
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
    struct odd o = {.port = tap_free_port()};
    tap_expect_log("turned away");
    tap_expect_log("dropped a connection");
    ok(tap_spawn_ranks(2, wrong_job_rank, &o, 60) == 0, "another job's rank is turned away");
    ok(tap_spawn_ranks(3, duplicate_rank, &o, 60) == 0, "a rank that is there already is too");
    ok(tap_spawn_ranks(2, world_size_rank, &o, 60) == 0, "another world size fails the job");
    ok(tap_spawn_ranks(2, strangers_rank, &o, 60) == 0, "strangers do not disturb");
    ok(tap_spawn_ranks(2, missing_rank, &o, 60) == 0, "missing ranks are named by rank 0");
    o.num_ranks = 1;
    ok(tap_spawn_ranks(2, missing_rank, &o, 60) == 0, "and by another rank that gives up");
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
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons((uint16_t)o.port)};
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (!ok(bind(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0 && listen(fd, 8) == 0,
            "a program occupies the address")) {
        return;
    }
    ok(join(&o, 0, 2, NULL, MEET_LONG_NS, &boot) == EP_ERR_SYSTEM && meet_says("in use") &&
           meet_says("127.0.0.1") && meet_says("EP_PORT"),
       "an address in use: what and what to do");
    ok(join(&o, 1, 2, NULL, MEET_SHORT_NS, &boot) == EP_ERR_TIMEOUT &&
           meet_says("does not answer as rank"),
       "a program that is not rank 0");
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
