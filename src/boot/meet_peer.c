/* SPDX-License-Identifier: MIT */
/*
 * The other ranks' side of the rendezvous: find rank 0, prove who one is, wait for START.
 *
 * Owns the one connection until it is handed over. Runs on the creating thread. Rank 0 may
 * start later, and the place may belong to someone else until then, so everything short of an
 * answer by one who holds the job's key is tried again until the deadline.
 * Must not believe, nor tell anything to, who has not proved that he holds the key; must not try
 * again once rank 0 has said WELCOME: from there on a loss is a failure.
 */
#include "src/boot/parts.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#define FIRST_PAUSE_NS (5 * EPI_NS_PER_MS)
#define LONGEST_PAUSE_NS (200 * EPI_NS_PER_MS)
#define LONGEST_LOCAL_PAUSE_NS (20 * EPI_NS_PER_MS) /* where a try costs next to nothing */
#define CONNECT_NS (3 * EPI_NS_PER_S)
/* One that answers with silence must not use up the time for the other places. */
#define SILENCE_NS (10 * EPI_NS_PER_S)
/* After that long in vain it is asked whether the address is this host's at all. */
#define DOUBT_AFTER_NS EPI_NS_PER_S
#define DOUBT_NS (2 * EPI_NS_PER_S) /* for a name server to answer */

enum outcome { OUTCOME_DONE, OUTCOME_RETRY, OUTCOME_FAILED };

struct visit {
    const struct epi_meet *meet;
    struct epi_conn *conn;
    struct epi_shake shake;
    bool is_welcome;
    bool has_asked;
    int num_tries;
    ep_status status;
    char last[300];  /* why the last attempt came to nothing */
    char doubt[200]; /* why none may ever come to anything */
};

static enum outcome fail(struct visit *v, ep_status status, const char *text) {
    v->status = epi_fail(status, "rendezvous: %s", text);
    return OUTCOME_FAILED;
}

static enum outcome retry(struct visit *v, const char *why) {
    epi_format(v->last, sizeof(v->last), "%s", why);
    return OUTCOME_RETRY;
}

static void claim(struct visit *v) {
    const struct epi_meet *m = v->meet;
    struct epi_claim c = {.version = epi_meet_version(),
                          .num_ranks = (uint32_t)m->num_ranks,
                          .rank = (uint32_t)m->rank,
                          .status = m->has_failed ? EP_ERR_PEER : EP_OK,
                          .process = epi_this_process()};
    epi_shake_claim(&v->shake, v->conn, &c, m->failed);
}

/* What has a verdict comes from rank 0, proved. OUTCOME_RETRY: go on listening. */
static enum outcome on_frame(struct visit *v, const struct epi_frame *frame) {
    char text[EPI_WIRE_TEXT_BYTES + 1];
    const char *bare = text;
    if (!v->shake.is_proved) {
        v->conn->doomed = epi_shake_check_root(&v->shake, frame);
        if (!v->conn->doomed) {
            claim(v);
        }
        return OUTCOME_RETRY;
    }
    epi_frame_text(frame, text);
    switch (frame->type) {
    case EPI_FRAME_WELCOME:
        v->is_welcome = true;
        return v->meet->has_failed ? OUTCOME_DONE : OUTCOME_RETRY;
    case EPI_FRAME_START:
        if (!v->is_welcome) {
            break;
        }
        v->conn->in_limit = EPI_WIRE_HEADER_BYTES + EPI_BOOT_MAX_TOTAL_BYTES;
        return OUTCOME_DONE;
    case EPI_FRAME_BUSY:
        v->conn->doomed = "another group of this process is forming there, and still is";
        return OUTCOME_RETRY;
    case EPI_FRAME_REJECT:
        if (strncmp(bare, "rendezvous: ", 12) == 0) {
            bare += 12;
        }
        return fail(v, (ep_status)frame->status, bare);
    case EPI_FRAME_TELL:
        return fail(v, EP_ERR_TIMEOUT, text);
    default:
        break;
    }
    v->conn->doomed = "it sent a wrong frame";
    return OUTCOME_RETRY;
}

static enum outcome on_deadline(struct visit *v, struct epi_deadline *until) {
    char text[400];
    if (!v->is_welcome) {
        epi_format(text, sizeof(text),
                   "something at %s accepts connections, but does not answer "
                   "as rank 0 of libep",
                   v->meet->where);
        retry(v, text);
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
    struct epi_deadline until =
        epi_deadline_min(v->meet->deadline, epi_deadline_after(SILENCE_NS));
    for (;;) {
        epi_conn_flush(v->conn);
        epi_conn_fill(v->conn);
        struct epi_frame frame;
        while (epi_conn_next(v->conn, &frame) > 0) {
            enum outcome outcome = on_frame(v, &frame);
            if (outcome != OUTCOME_RETRY) {
                return outcome;
            }
            if (v->is_welcome && !v->has_asked) {
                until = v->meet->deadline;
            }
        }
        if (v->conn->doomed) {
            char text[300];
            epi_format(text, sizeof(text), v->shake.is_proved ? "lost rank 0: %s" : "%s",
                       v->conn->doomed);
            return v->is_welcome ? fail(v, EP_ERR_PEER, text) : retry(v, text);
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

static enum outcome talk_over(struct visit *v, int fd) {
    epi_conn_init(v->conn, fd, 0, EPI_CONN_STRANGER_BYTES);
    enum outcome outcome = epi_shake_hello(&v->shake, &v->meet->key, v->conn)
                               ? talk(v)
                               : fail(v, EP_ERR_SYSTEM, "this host gives no random numbers");
    if (outcome != OUTCOME_DONE || v->meet->has_failed) {
        epi_conn_close(v->conn);
    }
    return outcome;
}

static enum outcome try_address(struct visit *v, const struct epi_addr *addr) {
    struct epi_deadline soon =
        epi_deadline_min(v->meet->deadline, epi_deadline_after(CONNECT_NS));
    int uid = -1;
    int pid = -1;
    int fd = epi_sock_connect(addr, soon);
    if (fd == -EMFILE || fd == -ENFILE) {
        return fail(v, EP_ERR_SYSTEM,
                    "cannot open a socket: too many open files; raise the limit (ulimit -n)");
    }
    if (fd < 0) {
        const bool is_nobody = fd == -ECONNREFUSED && !v->meet->over_tcp;
        return is_nobody ? OUTCOME_RETRY
                         : retry(v, fd == -EAGAIN ? "its queue of connections is full"
                                                  : strerror(-fd));
    }
    if (addr->ss.ss_family == AF_UNIX && !epi_sock_is_same_user(fd, &uid, &pid)) {
        epi_fd_close(&fd);
        epi_format(v->last, sizeof(v->last),
                   "process %d of user %d listens there, who is not this user", pid, uid);
        return OUTCOME_RETRY;
    }
    return talk_over(v, fd);
}

static enum outcome try_all(struct visit *v) {
    struct epi_addr places[EPI_MEET_MAX_ADDRS];
    int num = 0;
    const char *why = epi_meet_places(v->meet, places, &num);
    enum outcome outcome = OUTCOME_RETRY;
    if (why) {
        return retry(v, why);
    }
    /* Rank 0 has the first name unless another user has: the others need not be tried each time. */
    if (!v->meet->over_tcp && v->num_tries++ % 8 != 0) {
        num = 1;
    }
    for (int i = 0; i < num && outcome == OUTCOME_RETRY; i++) {
        outcome = try_address(v, &places[i]);
    }
    return outcome;
}

static ep_status fail_alone(struct visit *v) {
    const struct epi_meet *m = v->meet;
    const char *more = v->doubt[0] != '\0' ? v->doubt : m->launch.note;
    return epi_fail(EP_ERR_TIMEOUT,
                    "rendezvous: rank %d found no rank 0 at %s within %.1f s (%s%s%s)", m->rank,
                    m->where, (double)m->timeout_ns / 1e9, v->last, more[0] != '\0' ? "; " : "",
                    more);
}

ep_status epi_meet_peer(const struct epi_meet *meet, struct epi_conn *conn) {
    struct visit v = {
        .meet = meet, .conn = conn, .last = "nobody of this job and user is there"};
    int64_t pause_ns = FIRST_PAUSE_NS;
    const int64_t longest_ns = meet->over_tcp ? LONGEST_PAUSE_NS : LONGEST_LOCAL_PAUSE_NS;
    const struct epi_deadline doubt_at = epi_deadline_after(DOUBT_AFTER_NS);
    bool has_doubted = false;
    for (;;) {
        enum outcome outcome = try_all(&v);
        if (outcome == OUTCOME_DONE) {
            return EP_OK;
        }
        if (outcome == OUTCOME_FAILED) {
            return v.status;
        }
        if (epi_deadline_expired(meet->deadline)) {
            return fail_alone(&v);
        }
        if (!has_doubted && epi_deadline_expired(doubt_at)) {
            has_doubted = true;
            epi_meet_doubt(meet, epi_deadline_min(meet->deadline, epi_deadline_after(DOUBT_NS)),
                           v.doubt);
        }
        int64_t left_ns = epi_deadline_left_ns(meet->deadline);
        epi_sleep_ns(pause_ns < left_ns ? pause_ns : left_ns);
        pause_ns = pause_ns * 2 < longest_ns ? pause_ns * 2 : longest_ns;
    }
}

ep_status epi_meet_peer_over(const struct epi_meet *meet, int fd, struct epi_conn *conn) {
    struct visit v = {.meet = meet, .conn = conn};
    switch (talk_over(&v, fd)) {
    case OUTCOME_DONE:
        return EP_OK;
    case OUTCOME_FAILED:
        return v.status;
    case OUTCOME_RETRY:
        break;
    }
    return epi_fail(EP_ERR_PEER, "rendezvous: %s", v.last);
}
