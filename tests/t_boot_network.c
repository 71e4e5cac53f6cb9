/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Ranks that meet over TCP: only with a key, only at addresses of rank 0's host that were named, at
 * all of them or at none; whoever holds the port before rank 0 is not believed. Where no network
 * is needed there is no port.
 */
#include <netinet/in.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/gpu.h"
#include "tests/meet.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define KEY "a secret of the test"

struct scene {
    int port, next_port;
    const char *host;
    _Atomic int step;
};

/* As the configuration would make it if the address were not this host's loopback. */
static void over_tcp(struct epi_meet *m, const struct scene *s, int rank) {
    meet_of(m, s->port, rank, 2, "net");
    m->over_tcp = true;
    snprintf(m->host, sizeof(m->host), "%s", s->host);
}

static int dial_tcp(int port) {
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static int occupy(int port) {
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int on = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    ok(bind(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0 && listen(fd, 8) == 0,
       "a program occupies the port");
    return fd;
}

/* ---- who holds the port first ---- */

/* Rank 2 of the test is a stranger who listens before rank 0 does, and answers HELLO with a proof
 * that he cannot make, then with a rejection. */
static void be_impostor(struct scene *s) {
    int listener = occupy(s->port);
    s->step = 1;
    for (int i = 0; i < 3; i++) {
        uint8_t said[EPI_WIRE_HEADER_BYTES + EPI_WIRE_HELLO_BYTES];
        uint8_t body[EPI_WIRE_HEADER_BYTES + EPI_WIRE_PROOF_BYTES] = {0};
        struct epi_proof proof = {.protocol = EPI_WIRE_PROTOCOL};
        struct epi_frame lie = {.type = EPI_FRAME_PROOF, .data_bytes = EPI_WIRE_PROOF_BYTES};
        int fd = accept(listener, NULL, NULL);
        ok(recv(fd, said, sizeof(said), MSG_WAITALL) == (ssize_t)sizeof(said),
           "a rank says HELLO");
        if (i == 1) {
            lie = (struct epi_frame){.type = EPI_FRAME_REJECT, .status = EP_ERR_MISMATCH};
        }
        epi_wire_header(body, &lie);
        epi_wire_put_proof(body + EPI_WIRE_HEADER_BYTES, &proof);
        (void)!send(fd, body, EPI_WIRE_HEADER_BYTES + lie.data_bytes, MSG_NOSIGNAL);
        ok(recv(fd, said, sizeof(said), 0) <= 0, "and nothing more to an impostor");
        close(fd);
    }
    close(listener);
    s->step = 2;
}

/* Two ranks find each other. */
static void find(const struct epi_meet *m, int rank) {
    struct epi_conn conns[2];
    struct epi_listeners listeners = {0};
    epi_conn_init(&conns[0], -1, 0, 0);
    epi_conn_init(&conns[1], -1, 1, 0);
    if (rank == 0) {
        ok(epi_meet_listen(m, &listeners) == EP_OK, "listen: %s", ep_last_error());
        ok(epi_meet_root(m, &listeners, conns) == EP_OK, "rank 0: %s", ep_last_error());
        epi_meet_start(conns, 2);
        epi_conn_flush(&conns[1]);
        tap_sleep_ms(100);
    } else {
        ok(epi_meet_peer(m, &conns[0]) == EP_OK, "rank 1 finds the right one: %s",
           ep_last_error());
    }
    epi_listeners_close(&listeners);
    epi_conn_close(&conns[0]);
    epi_conn_close(&conns[1]);
}

static int impostor_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct epi_meet m;
    if (rank == 2) {
        be_impostor(s);
        return 0;
    }
    while (s->step < (rank == 0 ? 2 : 1)) {
        tap_sleep_ms(2);
    }
    over_tcp(&m, s, rank);
    find(&m, rank);
    return 0;
}

/* Rank 2 of the test is a service that has the first of the job's ports, and keeps it. */
static int taken_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct epi_meet m;
    if (rank == 2) {
        struct pollfd p = {.fd = occupy(s->port), .events = POLLIN};
        s->step = 1;
        while (s->step < 3) {
            if (poll(&p, 1, 20) > 0) {
                close(accept(p.fd, NULL, NULL));
            }
        }
        close(p.fd);
        return 0;
    }
    while (s->step < 1) {
        tap_sleep_ms(2);
    }
    over_tcp(&m, s, rank);
    m.launch.num_ports = 2;
    m.launch.ports[0] = s->port;
    m.launch.ports[1] = s->next_port;
    find(&m, rank);
    s->step++;
    return 0;
}

/* ---- where rank 0 listens ---- */

static void test_listening(void) {
    struct scene s = {.port = tap_free_port(), .host = "127.0.0.1"};
    struct rig_footprint was = rig_footprint();
    struct epi_meet m;
    struct epi_listeners l = {0};
    struct epi_addr at = {.len = sizeof(at.ss)};
    char text[EPI_ADDR_TEXT_BYTES];
    over_tcp(&m, &s, 0);
    ok(epi_meet_listen(&m, &l) == EP_OK && l.num == 1, "one address: %s", ep_last_error());
    getsockname(l.fds[0], (struct sockaddr *)&at.ss, &at.len);
    epi_addr_text(&at, text);
    ok(strncmp(text, "127.0.0.1:", 10) == 0, "it listens at %s alone", text);
    epi_listeners_close(&l);

    s.host = "localhost";
    over_tcp(&m, &s, 0);
    struct epi_addr all[EPI_MEET_MAX_ADDRS];
    int num = 0;
    ok(!epi_meet_places(&m, all, &num) && epi_meet_listen(&m, &l) == EP_OK && l.num >= 1 &&
           l.num <= num,
       "a name: %d of its %d addresses are listened at", l.num, num);
    for (int i = 0; i < l.num; i++) {
        at.len = sizeof(at.ss);
        getsockname(l.fds[i], (struct sockaddr *)&at.ss, &at.len);
        epi_addr_text(&at, text);
        ok(strncmp(text, "127.", 4) == 0 || strncmp(text, "[::1]", 5) == 0, "%s", text);
    }
    epi_listeners_close(&l);

    int fd = occupy(s.port);
    ok(epi_meet_listen(&m, &l) == EP_ERR_SYSTEM && l.num == 0 && meet_says("in use") &&
           meet_says("EP_PORT"),
       "one of them is taken: none is listened at");
    close(fd);

    s.host = "127.0.0.1";
    over_tcp(&m, &s, 0);
    setenv("EP_IFNAME", "=lo", 1);
    ok(epi_meet_listen(&m, &l) == EP_OK, "the interface that is named: %s", ep_last_error());
    epi_listeners_close(&l);
    setenv("EP_IFNAME", "^lo", 1);
    ok(epi_meet_listen(&m, &l) == EP_ERR_ARG && meet_says("EP_IFNAME names: ^lo"),
       "another interface");
    unsetenv("EP_IFNAME");
    setenv("NCCL_SOCKET_IFNAME", "no-such,eth77", 1);
    ok(epi_meet_listen(&m, &l) == EP_ERR_ARG && meet_says("NCCL_SOCKET_IFNAME"),
       "an interface that is not there");
    unsetenv("NCCL_SOCKET_IFNAME");
    ok(rig_same_footprint(was), "nothing is left");
}

/* ---- what the configuration allows ---- */

static void test_keys(void) {
    struct epi_boot *boot = NULL;
    struct epi_boot_config config = {.num_ranks = 2, .timeout_ns = MEET_SHORT_NS};
    config.address = "198.51.100.7:29500"; /* an address for examples: nobody's */
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("not one of this host's"),
       "rank 0 at an address that it has not");
    config.rank = 1;
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("EP_JOB_KEY") &&
           meet_says("16 or more characters"),
       "another host without a key: what to set");
    config.address = "no-such-host.invalid:29500";
    ok(epi_boot_create(&boot, &config) == EP_ERR_TIMEOUT && meet_says("found no rank 0"),
       "a name that says nothing is looked for on this host");
    setenv("EP_JOB_KEY", "too short", 1);
    config.address = "127.0.0.1:29500";
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("16..200") &&
           !strstr(ep_last_error(), "too short"),
       "a key that is too short, which is not repeated");
    for (size_t i = 0; i < epi_opt_count(); i++) {
        ok(!strstr(epi_opt_info(i)->value, "too short"), "%s is not shown",
           epi_opt_info(i)->name);
    }
    setenv("EP_JOB_KEY", KEY, 1);
    config.address = "198.51.100.7:29500";
    config.rank = 0;
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG &&
           meet_says("not an address of this host"),
       "with a key rank 0 needs an address, too");
    unsetenv("EP_JOB_KEY");
}

/* Where all ranks are on this host nobody listens at a port, with a key and without. */
static int local_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct epi_boot *boot = NULL;
    if (rank == 1) {
        tap_sleep_ms(300);
        ok(dial_tcp(s->port) < 0, "no port is open while rank 0 waits");
    }
    ok(meet_join(&boot, s->port, rank, 2, NULL, MEET_LONG_NS) == EP_OK, "they meet: %s",
       ep_last_error());
    epi_boot_destroy(&boot);
    return 0;
}

static int other_key_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct epi_boot *boot = NULL;
    setenv("EP_JOB_KEY", rank == 0 ? KEY : KEY "!", 1);
    ep_status st = meet_join(&boot, s->port, rank, 2, NULL, MEET_SHORT_NS);
    ok(st == EP_ERR_TIMEOUT && meet_says(rank == 0 ? "missing: 1" : "found no rank 0"),
       "ranks with different keys do not meet");
    return 0;
}

/* By the host's own address that is not loopback. */
static int address_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    char address[300];
    struct epi_boot *boot = NULL;
    snprintf(address, sizeof(address), strchr(s->host, ':') ? "[%s]:%d" : "%s:%d", s->host,
             s->port);
    struct epi_boot_config config = {
        .rank = rank, .num_ranks = 2, .address = address, .timeout_ns = MEET_LONG_NS};
    for (int with_key = 0; with_key < 2; with_key++) {
        if (with_key) {
            setenv("EP_JOB_KEY", KEY, 1);
        }
        ok(epi_boot_create(&boot, &config) == EP_OK, "at %s %s: %s", address,
           with_key ? "over TCP" : "on this host", ep_last_error());
        if (boot) {
            meet_check_group(boot, rank, 2);
        }
        epi_boot_destroy(&boot);
    }
    return 0;
}

/* The address from which this host would reach others; false: it has none. */
static bool own_address(char out[64]) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9)};
    struct epi_addr own = {.len = sizeof(own.ss)};
    to.sin_addr.s_addr = htonl(0xc6336407); /* 198.51.100.7; nothing is sent */
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool found = connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0 &&
                 getsockname(fd, (struct sockaddr *)&own.ss, &own.len) == 0;
    close(fd);
    char text[EPI_ADDR_TEXT_BYTES];
    epi_addr_text(&own, text);
    snprintf(out, 64, "%.*s", (int)strcspn(text, ":"), text);
    return found;
}

int main(void) {
    gpu_never("how ranks meet");
    tap_deadline(100);
    tap_expect_log("dropped ");
    tap_expect_log("EP_JOB_KEY=");
    struct scene *s = tap_shared(sizeof(*s));
    char own[64];
    *s = (struct scene){.port = tap_free_port(), .host = "127.0.0.1"};
    test_listening();
    test_keys();
    ok(tap_spawn_ranks(2, local_rank, s, 60) == 0, "no port without a need");
    ok(tap_spawn_ranks(2, other_key_rank, s, 60) == 0, "keys differ");
    ok(tap_spawn_ranks(3, impostor_rank, s, 60) == 0, "an impostor");
    s->step = 0;
    s->next_port = tap_free_port();
    ok(tap_spawn_ranks(3, taken_rank, s, 60) == 0, "the job's next port, where one is taken");
    if (own_address(own)) {
        s->host = own;
        ok(tap_spawn_ranks(2, address_rank, s, 60) == 0, "an address of this host");
    } else {
        skip(1, "this host has no address but loopback");
    }
    return done_testing();
}
