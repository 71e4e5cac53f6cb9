/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Rank 0 and another rank believe each other when, and only when, both have proved that they hold the
 * job's key: not one with another key, not what was recorded, sent back or changed, and nothing that
 * comes before the proof. What is said after it is believed, bounded and cleaned.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/gpu.h"
#include "tests/meet.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define SOON_NS (20 * EPI_NS_PER_S)
#define VAIN_NS (300 * EPI_NS_PER_MS) /* of a rank 0 to which nobody will come */

/* One of the two sides, as the library has it, on a thread of its own. */
struct side {
    struct epi_meet meet;
    int fd;
    struct epi_conn conns[2]; /* rank 0's are by rank, the other's is the first */
    ep_status status;
    char text[EPI_ERROR_TEXT_BYTES];
    pthread_t thread;
};

static void *be_side(void *arg) {
    struct side *s = arg;
    struct epi_listeners guest = {.guest = s->fd};
    s->status = s->meet.rank == 0 ? epi_meet_root(&s->meet, &guest, s->conns)
                                  : epi_meet_peer_over(&s->meet, s->fd, &s->conns[0]);
    snprintf(s->text, sizeof(s->text), "%s", ep_last_error());
    return NULL;
}

/* The library's own descriptors, or epi_conn_close would leave them open. */
static void make_pair(int ends[2]) {
    int fds[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0) {
        printf("Bail out! no socket pair\n");
        exit(1);
    }
    for (int i = 0; i < 2; i++) {
        epi_fd_begin();
        ends[i] = epi_fd_keep(fds[i]);
    }
}

static void side_begin(struct side *s, int rank, int fd, const char *job, int64_t timeout_ns) {
    memset(s, 0, sizeof(*s));
    meet_of(&s->meet, 1, rank, 2, job);
    s->meet.timeout_ns = timeout_ns;
    s->meet.deadline = epi_deadline_after(timeout_ns);
    s->fd = fd;
    epi_conn_init(&s->conns[0], -1, 0, 0);
    epi_conn_init(&s->conns[1], -1, 1, 0);
    pthread_create(&s->thread, NULL, be_side, s);
}

static void side_end(struct side *s) {
    pthread_join(s->thread, NULL);
    epi_conn_close(&s->conns[0]);
    epi_conn_close(&s->conns[1]);
}

static bool side_says(const struct side *s, const char *what) {
    bool found = strstr(s->text, what) != NULL;
    if (!found) {
        diag("\"%s\" does not say \"%s\"", s->text, what);
    }
    return found;
}

/* ---- the test as one side ---- */

/* The next frame on conn; false: the other side has closed. */
static bool await_frame(struct epi_conn *conn, struct epi_frame *frame) {
    const struct epi_deadline deadline = epi_deadline_after(SOON_NS);
    epi_conn_flush(conn);
    while (!epi_deadline_expired(deadline)) {
        epi_conn_fill(conn);
        int n = epi_conn_next(conn, frame);
        if (n != 0 || conn->doomed) {
            return n > 0;
        }
        struct pollfd p = {.fd = conn->fd, .events = POLLIN};
        poll(&p, 1, 100);
    }
    return false;
}

static void send_frame(struct epi_conn *conn, enum epi_frame_type type, const void *data,
                       size_t bytes) {
    epi_conn_send(conn, &(struct epi_frame){.type = type, .data = data, .data_bytes = bytes});
    epi_conn_flush(conn);
}

static struct epi_claim honest_claim(void) {
    return (struct epi_claim){
        .version = epi_meet_version(), .num_ranks = 2, .rank = 1, .process = 1};
}

/* ---- both sides are the library's ---- */

static void test_both(void) {
    static const struct {
        const char *job[2];
        ep_status status[2];
        const char *says[2];
    } cases[] = {
        {{"a", "a"}, {EP_OK, EP_OK}, {"", ""}},
        {{"a", "b"},
         {EP_ERR_TIMEOUT, EP_ERR_PEER},
         {"missing: 1 (turned away: ", "does not hold this job's key"}},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct side root;
        struct side peer;
        int ends[2];
        make_pair(ends);
        bool good = cases[i].status[0] == EP_OK;
        side_begin(&root, 0, ends[0], cases[i].job[0], good ? SOON_NS : VAIN_NS);
        side_begin(&peer, 1, ends[1], cases[i].job[1], SOON_NS);
        pthread_join(root.thread, NULL);
        if (good) {
            ok(root.conns[1].fd == ends[0], "rank 0 has the rank's connection");
            epi_meet_start(root.conns, 2);
            epi_conn_flush(&root.conns[1]);
        }
        side_end(&peer);
        epi_conn_close(&root.conns[1]);
        ok(root.status == cases[i].status[0] && side_says(&root, cases[i].says[0]),
           "keys %s and %s: rank 0", cases[i].job[0], cases[i].job[1]);
        ok(peer.status == cases[i].status[1] && side_says(&peer, cases[i].says[1]),
           "keys %s and %s: rank 1", cases[i].job[0], cases[i].job[1]);
    }
}

/* ---- against rank 0 ---- */

enum attack {
    HONEST,
    CHANGED,        /* a bit of the claim */
    SENT_BACK,      /* rank 0's own proof as the peer's */
    RECORDED,       /* a claim that was right for other nonces */
    NO_HELLO,       /* a claim at once */
    TWO_HELLOS,     /* another one in place of the claim */
    RANK_TOO_LARGE, /* proved, but no rank */
    OTHER_VERSION,
    OTHER_SIZE,
    FAILED, /* comes to say that it has failed */
    NUM_ATTACKS
};

static void claim_to_root(enum attack attack, struct epi_conn *conn,
                          const struct epi_key *key) {
    struct epi_shake shake;
    struct epi_frame frame;
    struct epi_claim claim = honest_claim();
    uint8_t body[EPI_WIRE_CLAIM_BYTES];
    if (attack == NO_HELLO) {
        memset(body, 0, sizeof(body));
        send_frame(conn, EPI_FRAME_CLAIM, body, sizeof(body));
        return;
    }
    epi_shake_hello(&shake, key, conn);
    if (!ok(await_frame(conn, &frame) && frame.type == EPI_FRAME_PROOF &&
                !epi_shake_check_root(&shake, &frame),
            "rank 0 proves itself first")) {
        return;
    }
    claim.rank = attack == RANK_TOO_LARGE ? UINT32_MAX : 1;
    claim.version += attack == OTHER_VERSION;
    claim.num_ranks += attack == OTHER_SIZE;
    claim.status = attack == FAILED ? EP_ERR_ARG : EP_OK;
    epi_wire_put_claim(body, &claim);
    if (attack == SENT_BACK) {
        struct epi_proof proof;
        epi_wire_get_proof(frame.data, &proof);
        memcpy(body, proof.tag, sizeof(proof.tag));
        send_frame(conn, EPI_FRAME_CLAIM, body, sizeof(body));
    } else if (attack == TWO_HELLOS) {
        epi_shake_hello(&shake, key, conn);
    } else {
        if (attack == RECORDED) {
            shake.root_nonce[0] ^= 1;
        }
        epi_shake_claim(&shake, conn, &claim, attack == FAILED ? "its \x1b[31mtext\n" : "");
    }
}

/* Flips a bit of the claim on its way out. */
static void change_last_packet(struct epi_conn *conn, int victim_fd) {
    uint8_t bytes[256];
    int ends[2];
    make_pair(ends);
    int own = conn->fd;
    conn->fd = ends[0];
    epi_conn_flush(conn);
    conn->fd = own;
    ssize_t n = recv(ends[1], bytes, sizeof(bytes), 0);
    bytes[EPI_WIRE_HEADER_BYTES + EPI_WIRE_PROOF_TAG_BYTES + 8] ^= 2; /* its rank */
    ok(n > 0 && send(victim_fd, bytes, (size_t)n, MSG_NOSIGNAL) == n, "a claim is changed");
    epi_fd_close(&ends[0]);
    epi_fd_close(&ends[1]);
}

static void test_root(void) {
    static const struct {
        ep_status status;
        const char *says;   /* rank 0 */
        const char *answer; /* to the rank; NULL: none */
    } want[NUM_ATTACKS] = {
        [HONEST] = {EP_OK, "", ""},
        [CHANGED] = {EP_ERR_TIMEOUT, "it does not hold this job's key", NULL},
        [SENT_BACK] = {EP_ERR_TIMEOUT, "it does not hold this job's key", NULL},
        [RECORDED] = {EP_ERR_TIMEOUT, "it does not hold this job's key", NULL},
        [NO_HELLO] = {EP_ERR_TIMEOUT, "missing: 1", NULL},
        [TWO_HELLOS] = {EP_ERR_TIMEOUT, "something else than its own", NULL},
        [RANK_TOO_LARGE] = {EP_ERR_TIMEOUT, "a process claims to be rank 4294967295 of 2",
                            "a process claims to be rank 4294967295 of 2"},
        [OTHER_VERSION] = {EP_ERR_VERSION, "rank 1 runs libep", "all ranks must use the same"},
        [OTHER_SIZE] = {EP_ERR_MISMATCH, "rank 1 was told there are 3 ranks", "was told 2"},
        [FAILED] = {EP_ERR_PEER, "rank 1 failed: its ?[31mtext?", ""},
    };
    for (enum attack a = HONEST; a < NUM_ATTACKS; a++) {
        struct side root;
        struct epi_conn conn;
        struct epi_frame frame;
        struct epi_meet peer;
        int ends[2];
        make_pair(ends);
        meet_of(&peer, 1, 1, 2, "job");
        epi_conn_init(&conn, ends[1], 0, EPI_CONN_STRANGER_BYTES);
        side_begin(&root, 0, ends[0], "job",
                   want[a].status == EP_ERR_TIMEOUT ? VAIN_NS : SOON_NS);
        claim_to_root(a, &conn, &peer.key);
        if (a == CHANGED) {
            change_last_packet(&conn, ends[1]);
        }
        char text[EPI_WIRE_TEXT_BYTES + 1] = "";
        const bool is_answered = await_frame(&conn, &frame);
        if (is_answered) {
            epi_frame_text(&frame, text);
        }
        side_end(&root);
        epi_conn_close(&conn);
        ok(root.status == want[a].status && side_says(&root, want[a].says),
           "attack %d: rank 0: %s", (int)a, root.text);
        ok(is_answered == (want[a].answer != NULL) &&
               (!is_answered || strstr(text, want[a].answer)),
           "attack %d: it is answered: %s", (int)a, text);
    }
}

/* ---- against another rank ---- */

/* What one that holds no key may say in place of a proof. */
static void test_peer_believes_nothing(void) {
    static const enum epi_frame_type types[] = {EPI_FRAME_WELCOME, EPI_FRAME_START,
                                                EPI_FRAME_REJECT,  EPI_FRAME_TELL,
                                                EPI_FRAME_BUSY,    EPI_FRAME_PROOF};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        struct side peer;
        struct epi_conn conn;
        struct epi_frame frame;
        uint8_t proof[EPI_WIRE_PROOF_BYTES] = {EPI_WIRE_PROTOCOL};
        int ends[2];
        make_pair(ends);
        epi_conn_init(&conn, ends[0], 1, EPI_CONN_STRANGER_BYTES);
        side_begin(&peer, 1, ends[1], "job", SOON_NS);
        ok(await_frame(&conn, &frame) && frame.type == EPI_FRAME_HELLO &&
               frame.data_bytes == EPI_WIRE_HELLO_BYTES,
           "HELLO says nothing but a number");
        memcpy(proof + 4, frame.data + 4, EPI_WIRE_NONCE_BYTES); /* its own number, sent back */
        struct epi_frame lie = {.type = types[i]};
        if (types[i] == EPI_FRAME_REJECT) {
            lie.status = EP_ERR_MISMATCH;
        } else if (types[i] == EPI_FRAME_PROOF) {
            lie.data = proof;
            lie.data_bytes = sizeof(proof);
        }
        epi_conn_send(&conn, &lie);
        epi_conn_flush(&conn);
        ok(!await_frame(&conn, &frame), "nothing more is said to a stranger");
        side_end(&peer);
        epi_conn_close(&conn);
        ok(peer.status == EP_ERR_PEER &&
               side_says(&peer, types[i] == EPI_FRAME_PROOF ? "does not hold this job's key"
                                                            : "something else than a proof"),
           "frame %d is not believed", (int)types[i]);
    }
}

/* One that is proved, and sends what it may not, or text that is not fit for a terminal. */
static void test_peer_bounds(void) {
    static const struct {
        enum epi_frame_type type;
        size_t bytes;
        const char *says;
    } cases[] = {{EPI_FRAME_RESULT, EPI_BOOT_MAX_TOTAL_BYTES, "no frame of libep"},
                 {EPI_FRAME_START, 0, "a wrong frame"},
                 {EPI_FRAME_GATHER, 8, "a wrong frame"},
                 {EPI_FRAME_REJECT, 8, "a?[31mb?"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct side peer;
        struct epi_conn conn;
        struct epi_shake shake = {0};
        struct epi_frame frame;
        struct epi_claim claim;
        struct epi_meet root;
        uint8_t header[EPI_WIRE_HEADER_BYTES];
        static uint8_t zeros[4096];
        int ends[2];
        make_pair(ends);
        meet_of(&root, 1, 0, 2, "job");
        epi_conn_init(&conn, ends[0], 1, 1 << 20);
        side_begin(&peer, 1, ends[1], "job", SOON_NS);
        ok(await_frame(&conn, &frame) && !epi_shake_answer(&shake, &root.key, &frame, &conn) &&
               await_frame(&conn, &frame) && !epi_shake_check_claim(&shake, &frame, &claim) &&
               claim.rank == 1 && claim.num_ranks == 2 && claim.version == epi_meet_version(),
           "a rank says who it is to one who is proved");
        struct epi_frame next = {.type = cases[i].type, .data_bytes = cases[i].bytes};
        if (cases[i].type == EPI_FRAME_REJECT) {
            next.status = EP_ERR_MISMATCH;
        }
        epi_wire_header(header, &next);
        (void)!send(conn.fd, header, sizeof(header), MSG_NOSIGNAL);
        (void)!send(
            conn.fd, cases[i].type == EPI_FRAME_REJECT ? (const void *)"a\x1b[31mb\n" : zeros,
            cases[i].bytes < sizeof(zeros) ? cases[i].bytes : sizeof(zeros), MSG_NOSIGNAL);
        side_end(&peer);
        epi_conn_close(&conn);
        ok(peer.status < 0 && side_says(&peer, cases[i].says), "frame %d: %s",
           (int)cases[i].type, peer.text);
    }
}

int main(void) {
    gpu_never("how ranks meet");
    tap_deadline(60);
    tap_expect_log("dropped a connection");
    tap_expect_log("turned away");
    struct rig_footprint was = rig_footprint();
    test_both();
    test_root();
    test_peer_believes_nothing();
    test_peer_bounds();
    ok(rig_same_footprint(was), "nothing is left");
    return done_testing();
}
