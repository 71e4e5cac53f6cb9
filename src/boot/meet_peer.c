/* SPDX-License-Identifier: MIT */
/*
 * The other ranks' side of the rendezvous: find rank 0, say HELLO, wait for START.
 *
 * Owns the one connection until it is handed over. Runs on the creating thread. Rank 0 may
 * start later, and the address may belong to someone else until then, so everything short of an
 * answer by libep is tried again until the deadline.
 * Must not try again once rank 0 has said WELCOME: from there on a loss is a failure.
 */
#include "src/boot/parts.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#define FIRST_PAUSE_NS (5 * EPI_NS_PER_MS)
#define LONGEST_PAUSE_NS (200 * EPI_NS_PER_MS)
#define CONNECT_NS (3 * EPI_NS_PER_S)
/* With several addresses to try, one that answers with silence must not use up the time. */
#define SILENCE_NS (10 * EPI_NS_PER_S)

enum outcome { OUTCOME_DONE, OUTCOME_RETRY, OUTCOME_FAILED };

struct visit {
    const struct epi_meet *meet;
    struct epi_conn *conn;
    bool is_welcome;
    bool has_asked;
    ep_status status;
    char last[300]; /* why the last attempt came to nothing */
};

static void say_hello(struct visit *v, int fd) {
    uint8_t body[EPI_WIRE_HELLO_BYTES];
    struct epi_hello hello = {.protocol = EPI_WIRE_PROTOCOL,
                              .version = epi_meet_version(),
                              .num_ranks = (uint32_t)v->meet->num_ranks,
                              .rank = (uint32_t)v->meet->rank,
                              .job = v->meet->job};
    epi_wire_put_hello(body, &hello);
    epi_conn_init(v->conn, fd, 0, EPI_WIRE_HEADER_BYTES + EPI_BOOT_MAX_TOTAL_BYTES);
    epi_conn_send(
        v->conn,
        &(struct epi_frame){.type = EPI_FRAME_HELLO, .data = body, .data_bytes = sizeof(body)});
}

static enum outcome fail(struct visit *v, ep_status status, const char *text) {
    v->status = epi_fail(status, "rendezvous: %s", text);
    return OUTCOME_FAILED;
}

/* OUTCOME_RETRY here: go on listening. */
static enum outcome on_frame(struct visit *v, const struct epi_frame *frame) {
    char text[EPI_WIRE_TEXT_BYTES + 1];
    const char *bare = text;
    epi_frame_text(frame, text);
    switch (frame->type) {
    case EPI_FRAME_WELCOME:
        v->is_welcome = true;
        return OUTCOME_RETRY;
    case EPI_FRAME_START:
        return OUTCOME_DONE;
    case EPI_FRAME_REJECT:
        if (strncmp(bare, "rendezvous: ", 12) == 0) {
            bare += 12;
        }
        return fail(v, (ep_status)frame->status, bare);
    case EPI_FRAME_TELL:
        return fail(v, EP_ERR_TIMEOUT, text);
    default:
        v->conn->doomed = "it sent a wrong frame";
        return OUTCOME_RETRY;
    }
}

static enum outcome on_deadline(struct visit *v, struct epi_deadline *until) {
    char text[400];
    if (!v->is_welcome) {
        epi_format(text, sizeof(text),
                   "something at %s accepts connections, but does not answer "
                   "as rank 0 of libep",
                   v->meet->where);
        epi_format(v->last, sizeof(v->last), "%s", text);
        return epi_deadline_expired(v->meet->deadline) ? fail(v, EP_ERR_TIMEOUT, text)
                                                       : OUTCOME_RETRY;
    }
    if (!v->has_asked) {
        v->has_asked = true;
        *until = epi_deadline_after(EPI_MEET_GRACE_NS);
        epi_conn_send(v->conn, &(struct epi_frame){.type = EPI_FRAME_ASK});
        return OUTCOME_RETRY;
    }
    epi_format(text, sizeof(text),
               "rank 0 at %s is here, but not all others came within %.1f s", v->meet->where,
               (double)v->meet->timeout_ns / 1e9);
    return fail(v, EP_ERR_TIMEOUT, text);
}

static enum outcome talk(struct visit *v) {
    struct epi_deadline until = v->meet->deadline;
    if (v->meet->num_addrs > 1) {
        until = epi_deadline_min(until, epi_deadline_after(SILENCE_NS));
    }
    for (;;) {
        epi_conn_flush(v->conn);
        epi_conn_fill(v->conn);
        struct epi_frame frame;
        while (epi_conn_next(v->conn, &frame) > 0) {
            enum outcome outcome = on_frame(v, &frame);
            if (outcome != OUTCOME_RETRY) {
                return outcome;
            }
            until = v->has_asked ? until : v->meet->deadline;
        }
        if (v->conn->doomed) {
            char text[200];
            epi_format(text, sizeof(text), "lost rank 0: %s", v->conn->doomed);
            epi_format(v->last, sizeof(v->last), "%s", text);
            return v->is_welcome ? fail(v, EP_ERR_PEER, text) : OUTCOME_RETRY;
        }
        if (epi_deadline_expired(until)) {
            enum outcome outcome = on_deadline(v, &until);
            if (outcome != OUTCOME_RETRY || !v->is_welcome) {
                return outcome;
            }
            continue;
        }
        struct pollfd p = {.fd = v->conn->fd, .events = epi_conn_events(v->conn)};
        if (poll(&p, 1, epi_deadline_left_ms(until)) < 0 && errno != EINTR) {
            return fail(v, EP_ERR_SYSTEM, strerror(errno));
        }
    }
}

static enum outcome try_address(struct visit *v, const struct epi_addr *addr) {
    struct epi_deadline soon =
        epi_deadline_min(v->meet->deadline, epi_deadline_after(CONNECT_NS));
    int fd = epi_sock_connect(addr, soon);
    if (fd == -EMFILE || fd == -ENFILE) {
        v->status =
            epi_fail(EP_ERR_SYSTEM, "rendezvous: cannot open a socket: %s", strerror(-fd));
        return OUTCOME_FAILED;
    }
    if (fd < 0) {
        epi_format(v->last, sizeof(v->last), "%s", strerror(-fd));
        return OUTCOME_RETRY;
    }
    say_hello(v, fd);
    enum outcome outcome = talk(v);
    if (outcome != OUTCOME_DONE) {
        epi_conn_close(v->conn);
    }
    return outcome;
}

static enum outcome try_all(struct visit *v) {
    const struct epi_meet *m = v->meet;
    struct epi_addr resolved[EPI_MEET_MAX_ADDRS];
    const struct epi_addr *addrs = m->addrs;
    int num = m->num_addrs;
    if (m->host[0] != '\0') {
        bool is_name;
        const char *why =
            epi_addr_resolve(m->host, m->port, resolved, EPI_MEET_MAX_ADDRS, &num, &is_name);
        if (why) {
            epi_format(v->last, sizeof(v->last), "%s", why);
            return OUTCOME_RETRY;
        }
        addrs = resolved;
    }
    enum outcome outcome = OUTCOME_RETRY;
    for (int i = 0; i < num && outcome == OUTCOME_RETRY; i++) {
        outcome = try_address(v, &addrs[i]);
    }
    return outcome;
}

ep_status epi_meet_peer(const struct epi_meet *meet, struct epi_conn *conn) {
    struct visit v = {.meet = meet, .conn = conn, .last = "no answer"};
    int64_t pause_ns = FIRST_PAUSE_NS;
    for (;;) {
        enum outcome outcome = try_all(&v);
        if (outcome == OUTCOME_DONE) {
            return EP_OK;
        }
        if (outcome == OUTCOME_FAILED) {
            return v.status;
        }
        if (epi_deadline_expired(meet->deadline)) {
            return epi_fail(EP_ERR_TIMEOUT,
                            "rendezvous: rank %d found no rank 0 at %s within %.1f s (%s)",
                            meet->rank, meet->where, (double)meet->timeout_ns / 1e9, v.last);
        }
        int64_t left_ns = epi_deadline_left_ns(meet->deadline);
        epi_sleep_ns(pause_ns < left_ns ? pause_ns : left_ns);
        pause_ns = pause_ns * 2 < LONGEST_PAUSE_NS ? pause_ns * 2 : LONGEST_PAUSE_NS;
    }
}
