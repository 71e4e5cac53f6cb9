/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * What a member may cost, and what another user can do: one that floods rank 0 is told as dead with
 * the reason, a rank that runs out of time again and again is not; other users' processes neither
 * join nor listen in a rank's place.
 */
#include <pthread.h>
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

#define NOBODY 65534 /* the user that is not ours */

struct scene {
    int port;
    int num_names; /* that the other user takes */
    bool with_key;
    _Atomic int step;
};

static bool await_step(struct scene *s, int step) {
    for (int i = 0; i < 10000 && s->step < step; i++) {
        tap_sleep_ms(2);
    }
    return s->step >= step;
}

/* ---- members ---- */

struct insult {
    int port;
    enum { TOO_MANY_CALLS, ASKS_AGAIN, ASKS_FOR_NOTHING } kind;
    const char *says;
};

static void insult(struct epi_conn *conn, const struct insult *in) {
    struct epi_frame call = {.type = EPI_FRAME_GATHER};
    struct epi_frame ask = {.type = EPI_FRAME_ASK};
    const uint64_t num_calls = in->kind == TOO_MANY_CALLS ? 1000 : 1;
    for (call.seq = 1; call.seq <= num_calls; call.seq++) {
        epi_conn_send(conn, &call);
    }
    ask.seq = in->kind == ASKS_FOR_NOTHING ? 2 : 1;
    for (int i = 0; in->kind != TOO_MANY_CALLS && i < 1000; i++) {
        epi_conn_send(conn, &ask);
    }
}

/* Rank 1 has met like the others, and then misbehaves. */
static int insult_rank(int rank, void *ctx) {
    const struct insult *in = ctx;
    struct rig_footprint was = rig_footprint();
    struct epi_boot *boot = NULL;
    if (rank == 1) {
        struct epi_meet m;
        struct epi_conn conn;
        meet_of(&m, in->port, 1, 3, NULL);
        ok(epi_meet_peer(&m, &conn) == EP_OK, "a member meets: %s", ep_last_error());
        insult(&conn, in);
        for (int i = 0; i < 1000 && epi_conn_flush(&conn) && epi_conn_fill(&conn); i++) {
            tap_sleep_ms(10);
        }
        ok(conn.doomed != NULL, "it is thrown out");
        epi_conn_close(&conn);
        return 0;
    }
    ok(meet_join(&boot, in->port, rank, 3, NULL, MEET_LONG_NS) == EP_OK, "rank %d: %s", rank,
       ep_last_error());
    if (boot) {
        ep_status st = EP_OK;
        for (int i = 0; i < 1000 && st == EP_OK; i++) {
            st = epi_boot_barrier(boot, meet_in_time());
        }
        ok(st == EP_ERR_PEER && meet_says("rank 1 died: ") && meet_says(in->says),
           "all are told: %s", ep_last_error());
    }
    epi_boot_destroy(&boot);
    ok(rig_same_footprint(was), "nothing is left");
    return 0;
}

/* Rank 1 is late for three calls of rank 0, which are not three contributions that wait. */
static int late_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct epi_boot *boot = NULL;
    int all[2];
    ok(meet_join(&boot, s->port, rank, 2, NULL, MEET_LONG_NS) == EP_OK, "rank %d: %s", rank,
       ep_last_error());
    for (int i = 0; rank == 0 && i < 4; i++) {
        ok(epi_boot_allgather(boot, &i, sizeof(i), all,
                              epi_deadline_after(100 * EPI_NS_PER_MS)) == EP_ERR_TIMEOUT &&
               meet_says(i < 2 ? "missing: 1" : "unanswered still"),
           "call %d runs out of time", i);
    }
    if (rank == 0) {
        s->step = 1;
    }
    await_step(s, 1);
    for (int i = 0; i < 2 && rank == 1; i++) {
        ok(epi_boot_allgather(boot, &i, sizeof(i), all, meet_in_time()) == EP_OK && all[0] == i,
           "the two that were made are met: %s", ep_last_error());
    }
    if (rank == 1) {
        s->step = 2;
    }
    await_step(s, 2);
    meet_check_group(boot, rank, 2);
    epi_boot_destroy(&boot);
    return 0;
}

static void test_members(void) {
    struct insult insults[] = {{0, TOO_MANY_CALLS, "it calls without waiting for the others"},
                               {0, ASKS_AGAIN, "it asks for the same call again"},
                               {0, ASKS_FOR_NOTHING, "or for one it has not made"}};
    for (size_t i = 0; i < sizeof(insults) / sizeof(insults[0]); i++) {
        insults[i].port = tap_free_port();
        ok(tap_spawn_ranks(3, insult_rank, &insults[i], 60) == 0, "a member: %s",
           insults[i].says);
    }
    struct scene *s = tap_shared(sizeof(*s));
    s->port = tap_free_port();
    ok(tap_spawn_ranks(2, late_rank, s, 60) == 0, "a rank that runs out of time may go on");
}

/* ---- another user ---- */

/* Takes the first names of the job's, and reads what is said to it. */
static void squat(struct scene *s, const struct epi_meet *m) {
    struct epi_addr places[EPI_MEET_MAX_ADDRS];
    int fds[EPI_MEET_MAX_ADDRS];
    int num = 0;
    epi_meet_places(m, places, &num);
    ok(setresuid(NOBODY, NOBODY, NOBODY) == 0, "as another user");
    for (int k = 0; k < s->num_names; k++) {
        fds[k] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        ok(bind(fds[k], (struct sockaddr *)&places[k].ss, places[k].len) == 0 &&
               listen(fds[k], SOMAXCONN) == 0,
           "name %d is taken", k);
    }
    s->step = 1;
    int num_bytes = 0;
    while (s->step < 3) {
        for (int k = 0; k < s->num_names; k++) {
            char bytes[64];
            int fd = accept(fds[k], NULL, NULL);
            num_bytes += fd >= 0 && recv(fd, bytes, sizeof(bytes), 0) > 0;
            close(fd);
        }
        tap_sleep_ms(5);
    }
    ok(num_bytes == 0, "nobody says anything to another user");
}

/* Rank 2 of the test is another user's process. */
static int squat_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct epi_boot *boot = NULL;
    struct epi_meet m;
    meet_of(&m, s->port, 1, 2, NULL); /* without a key anybody can reckon the names */
    if (rank == 2) {
        squat(s, &m);
        return 0;
    }
    await_step(s, 1);
    if (s->with_key) {
        setenv("EP_JOB_KEY", "a secret of these two", 1);
    }
    const bool hopeless = s->num_names == 16 && !s->with_key;
    ep_status st =
        meet_join(&boot, s->port, rank, 2, NULL, hopeless ? MEET_SHORT_NS : MEET_LONG_NS);
    if (!hopeless) {
        ok(st == EP_OK, "rank %d: %s", rank, ep_last_error());
    } else if (rank == 0) {
        ok(st == EP_ERR_SYSTEM && meet_says("another user of this host") &&
               meet_says("EP_JOB_KEY"),
           "no name is left: what to do");
    } else {
        ok(st == EP_ERR_TIMEOUT && meet_says("who is not this user"), "who was there");
    }
    if (boot) {
        meet_check_group(boot, rank, 2);
    }
    epi_boot_destroy(&boot);
    s->step++;
    return 0;
}

/* Rank 2 of the test connects to rank 0's socket as another user, with all that a rank knows. */
static int intruder_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct epi_boot *boot = NULL;
    struct epi_meet m;
    if (rank == 2) {
        char byte;
        int num = 0;
        struct epi_addr places[EPI_MEET_MAX_ADDRS];
        meet_of(&m, s->port, 1, 2, NULL);
        epi_meet_places(&m, places, &num);
        close(meet_dial(&m, 0)); /* rank 0 is here */
        ok(setresuid(NOBODY, NOBODY, NOBODY) == 0, "as another user");
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        ok(connect(fd, (struct sockaddr *)&places[0].ss, places[0].len) == 0,
           "anybody can connect");
        struct epi_conn conn;
        struct epi_shake shake;
        epi_conn_init(&conn, fd, 0, EPI_CONN_STRANGER_BYTES);
        epi_shake_hello(&shake, &m.key, &conn);
        epi_conn_flush(&conn);
        ok(recv(fd, &byte, 1, 0) <= 0, "another user gets no answer");
        epi_conn_drop_queue(&conn);
        close(fd);
        s->step = 1;
        return 0;
    }
    if (rank == 1) {
        await_step(s, 1);
    }
    ok(meet_join(&boot, s->port, rank, 2, NULL, MEET_LONG_NS) == EP_OK, "rank %d: %s", rank,
       ep_last_error());
    epi_boot_destroy(&boot);
    return 0;
}

static void test_users(void) {
    if (geteuid() != 0) {
        skip(4, "only root can be two users");
        return;
    }
    struct scene *s[4];
    for (int i = 0; i < 4; i++) {
        s[i] = tap_shared(sizeof(*s[i]));
        s[i]->port = tap_free_port();
    }
    tap_expect_log("dropped ");
    tap_expect_log("another user holds");
    s[0]->num_names = 3;
    s[1]->num_names = 16;
    s[2]->num_names = 16;
    s[2]->with_key = true;
    ok(tap_spawn_ranks(3, squat_rank, s[0], 60) == 0, "names that another user holds");
    ok(tap_spawn_ranks(3, squat_rank, s[1], 60) == 0, "all of them");
    ok(tap_spawn_ranks(3, squat_rank, s[2], 60) == 0, "all of them, but there is a key");
    ok(tap_spawn_ranks(3, intruder_rank, s[3], 60) == 0, "another user at rank 0's socket");
}

int main(void) {
    gpu_never("how ranks meet");
    tap_deadline(100);
    tap_expect_log(" died: ");
    test_members();
    test_users();
    return done_testing();
}
