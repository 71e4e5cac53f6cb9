/* SPDX-License-Identifier: MIT */
/* mutants: 20 */
/*
 * Fuzzes what stands behind the frames: rank 0 and another rank during the rendezvous, and their
 * control stars after it, over a socket pair. The one at the other end is this program's: it can do
 * the handshake, with the job's key or another, and then sends frames of any kind in any order,
 * sound or not, in pieces of any size.
 *
 * Checked beyond what the sanitizers see: nobody is let in, and no rank 0 is believed, without the
 * key; every end comes in time, with a printable sentence; no descriptor and no memory is left.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "src/boot/parts.h"
#include "tests/fuzz.h"

#define DEADLINE_NS (10 * EPI_NS_PER_MS)
#define MOST_NS (20 * EPI_NS_PER_S) /* a machine may be slow; never means for ever */
#define MAX_STREAM 8192

enum side { AT_ROOT, AT_PEER, STAR_OF_ROOT, STAR_OF_PEER, NUM_SIDES };

/* The first bytes of an input. */
struct scene {
    enum side side;
    bool knows_key, says_hello, claims; /* of the other end */
    int num_ranks;
    size_t piece;
};

/* The other end. */
struct other {
    struct scene s;
    struct epi_key key;
    int fd;
    struct fuzz_input data;
    uint8_t stream[MAX_STREAM];
    size_t bytes;
};

/* ---- the other end -------------------------------------------------------------------------- */

static void add(struct other *o, const void *data, size_t bytes) {
    if (bytes <= MAX_STREAM - o->bytes) {
        memcpy(o->stream + o->bytes, data, bytes);
        o->bytes += bytes;
    }
}

static void add_frame(struct other *o, const struct epi_frame *frame) {
    uint8_t header[EPI_WIRE_HEADER_BYTES];
    epi_wire_header(header, frame);
    add(o, header, sizeof(header));
    if (frame->data_bytes) {
        add(o, frame->data, frame->data_bytes);
    }
}

/* A frame of any kind, or any bytes. */
static void add_item(struct other *o) {
    const uint8_t type = fuzz_next(&o->data), fields = fuzz_next(&o->data),
                  rank = fuzz_next(&o->data);
    uint8_t data[256];
    size_t len = fuzz_next(&o->data);
    for (size_t i = 0; i < len; i++) {
        data[i] = fuzz_next(&o->data);
    }
    if (type & 0x80) {
        add(o, data, len);
        return;
    }
    add_frame(o, &(struct epi_frame){.type = (enum epi_frame_type)(type & 31),
                                     .seq = fields & 7,
                                     .status = -(int32_t)(fields >> 3 & 15),
                                     .rank = type & 0x40 ? 0xffffffff - rank : rank,
                                     .data = data,
                                     .data_bytes = len});
}

/* In pieces, so that frames arrive in parts; a reader that does not read does not stop it. */
static void send_stream(struct other *o) {
    const struct epi_deadline limit = epi_deadline_after(50 * EPI_NS_PER_MS);
    for (size_t at = 0; at < o->bytes && !epi_deadline_expired(limit);) {
        const size_t n = o->bytes - at < o->s.piece ? o->bytes - at : o->s.piece;
        const ssize_t sent = send(o->fd, o->stream + at, n, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) {
            at += (size_t)sent;
        } else if (errno != EAGAIN && errno != EINTR) {
            break;
        } else {
            epi_sleep_ns(EPI_NS_PER_MS / 10);
        }
    }
    o->bytes = 0;
}

/* One frame of the library's, into buf. */
static bool receive(struct other *o, uint8_t *buf, size_t room, struct epi_frame *frame) {
    const struct epi_deadline limit = epi_deadline_after(EPI_NS_PER_S);
    size_t have = 0;
    while (have < room && epi_wire_parse(buf, have, frame) == 0) {
        struct pollfd p = {.fd = o->fd, .events = POLLIN};
        const ssize_t n = poll(&p, 1, epi_deadline_left_ms(limit)) > 0
                              ? recv(o->fd, buf + have, 1, MSG_DONTWAIT)
                              : 0;
        if (n <= 0) {
            return false;
        }
        have++;
    }
    return true;
}

/* By rank 0's or the peer's own code, into a pair of its own, from where the bytes are taken. */
static void take(struct other *o, struct epi_conn *conn, int from) {
    uint8_t bytes[1024];
    epi_conn_flush(conn);
    const ssize_t n = recv(from, bytes, sizeof(bytes), MSG_DONTWAIT);
    if (n > 0) {
        add(o, bytes, (size_t)n);
    }
}

static void shake_as_peer(struct other *o, struct epi_conn *conn, int from) {
    struct epi_shake s;
    struct epi_frame frame;
    uint8_t buf[512];
    must(epi_shake_hello(&s, &o->key, conn));
    take(o, conn, from);
    send_stream(o);
    if (!receive(o, buf, sizeof(buf), &frame)) {
        return;
    }
    const bool believed = !epi_shake_check_root(&s, &frame);
    must(believed == o->s.knows_key);
    if (o->s.claims) {
        const uint8_t how = fuzz_next(&o->data), rank = fuzz_next(&o->data);
        const struct epi_claim c = {
            epi_meet_version() + (how & 1), (uint32_t)o->s.num_ranks + (how >> 1 & 1), rank,
            how & 4 ? EP_ERR_ARG : EP_OK, how & 8 ? epi_this_process() : how};
        epi_shake_claim(&s, conn, &c, how & 4 ? "max_topk is 100\x1b[2J" : "");
        take(o, conn, from);
    }
}

static void shake_as_root(struct other *o, struct epi_conn *conn, int from) {
    struct epi_shake s = {0};
    struct epi_frame frame;
    uint8_t buf[1024];
    if (receive(o, buf, sizeof(buf), &frame)) {
        epi_shake_answer(&s, &o->key, &frame, conn);
        take(o, conn, from);
        send_stream(o);
        if (o->s.knows_key) { /* what is sent before the claim has come is as good */
            receive(o, buf, sizeof(buf), &frame);
        }
    }
}

static void *other_main(void *arg) {
    struct other *o = arg;
    int pair[2];
    struct epi_conn conn;
    if (o->s.says_hello && o->s.side <= AT_PEER &&
        socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0) {
        epi_conn_init(&conn, pair[0], -1, EPI_CONN_STRANGER_BYTES);
        (o->s.side == AT_ROOT ? shake_as_peer : shake_as_root)(o, &conn, pair[1]);
        close(pair[1]);
        conn.fd = -1;
        close(pair[0]);
        epi_conn_close(&conn);
    }
    while (o->data.left) {
        add_item(o);
    }
    send_stream(o);
    shutdown(o->fd, SHUT_WR);
    uint8_t rest[256]; /* a goodbye that nobody reads is waited for */
    struct pollfd p = {.fd = o->fd, .events = POLLIN};
    while (poll(&p, 1, 1000) > 0 && recv(o->fd, rest, sizeof(rest), MSG_DONTWAIT) > 0) {
    }
    close(o->fd);
    return NULL;
}

/* ---- the library's end ---------------------------------------------------------------------- */

static void check_text(ep_status st) {
    must(st == EP_OK || epi_error_text()[0] != '\0');
    for (const char *text = epi_error_text(); *text; text++) {
        must((unsigned char)*text >= ' ' && *text != 127);
    }
}

static void meet(const struct scene *s, const struct epi_key *key, int fd) {
    struct epi_conn conns[8];
    struct epi_meet m = {.rank = s->side == AT_ROOT ? 0 : 1,
                         .num_ranks = s->num_ranks,
                         .key = *key,
                         .is_job_named = true,
                         .where = "a pair of sockets",
                         .timeout_ns = DEADLINE_NS,
                         .deadline = epi_deadline_after(DEADLINE_NS)};
    for (int r = 0; r < s->num_ranks; r++) {
        epi_conn_init(&conns[r], -1, r, 0);
    }
    ep_status st;
    if (s->side == AT_ROOT) {
        const struct epi_listeners guest = {.guest = fd};
        st = epi_meet_root(&m, &guest, conns);
    } else {
        st = epi_meet_peer_over(&m, fd, &conns[0]);
    }
    check_text(st);
    must(st != EP_OK || (s->knows_key && s->says_hello));
    must(st != EP_OK || s->side == AT_PEER || s->claims);
    for (int r = 0; r < s->num_ranks; r++) {
        must(st == EP_OK || conns[r].fd == -1);
        epi_conn_close(&conns[r]);
    }
}

static void on_dead(void *ctx, int rank, const char *why) {
    const struct epi_star *star = *(struct epi_star **)ctx;
    must(rank >= 0 && rank < star->num_ranks && rank != star->rank && why);
}

static void live(const struct scene *s, int fd) {
    struct epi_star *star = NULL;
    uint8_t in[8] = {1}, out[8 * 8];
    const int rank = s->side == STAR_OF_ROOT ? 0 : 1;
    must(epi_star_make(&star, rank, s->num_ranks) == EP_OK);
    star->on_dead = on_dead;
    star->ctx = &star;
    const size_t limit = rank == 0 ? EPI_BOOT_MAX_BYTES : EPI_BOOT_MAX_TOTAL_BYTES;
    epi_conn_init(&star->conns[rank == 0], fd, rank == 0, EPI_WIRE_HEADER_BYTES + limit);
    must(epi_star_run(star) == 0);
    for (int i = 0; i < 3; i++) {
        const ep_status st =
            epi_star_allgather(star, in, sizeof(in), out, epi_deadline_after(DEADLINE_NS / 4));
        check_text(st);
    }
    epi_star_free(star);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    static struct other o;
    struct epi_key key;
    pthread_t thread;
    int pair[2];
    setenv("EP_LOG", "error", 1);
    o = (struct other){.data = {data, bytes}};
    const uint8_t how = fuzz_next(&o.data), more = fuzz_next(&o.data);
    o.s.side = (enum side)(how % NUM_SIDES);
    o.s.knows_key = how & 4;
    o.s.says_hello = how & 8;
    o.s.claims = how & 16;
    o.s.num_ranks = 2 + (how >> 5) % 4;
    o.s.piece = 1 + more;
    epi_key_make(&key, "secret", 6, "job");
    epi_key_make(&o.key, "secret", o.s.knows_key ? 6 : 5, "job");
    epi_fd_begin(); /* the library closes its end as one of its own */
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    pair[0] = epi_fd_keep(pair[0]);
    must(fcntl(pair[0], F_SETFL, O_NONBLOCK) == 0);
    o.fd = pair[1];
    epi_clear_error();
    const int64_t live_before = epi_alloc_live(), start = epi_now_ns();
    must(pthread_create(&thread, NULL, other_main, &o) == 0);
    if (o.s.side <= AT_PEER) {
        meet(&o.s, &key, pair[0]);
    } else {
        live(&o.s, pair[0]);
    }
    pthread_join(thread, NULL);
    must(epi_now_ns() - start < MOST_NS);
    must(epi_alloc_live() == live_before);
    const int probe = dup(0); /* the lowest that is free: nothing has stayed open */
    static int lowest = -1;
    lowest = lowest < 0 ? probe : lowest;
    must(probe < 0 || probe == lowest);
    close(probe);
    return 0;
}
