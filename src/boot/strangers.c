/* SPDX-License-Identifier: MIT */
/*
 * Those who have come to rank 0 and have not proved yet that they hold the job's key.
 *
 * Owns their connections, of which a fixed number are kept for a few seconds each, the oldest of
 * the silent going first. Runs on the creating thread, called by meet_root.c's loop. Anybody may
 * reach the listeners: each costs a small buffer until it is dropped, and all together one log
 * line per second.
 * Must not let a stranger end the rendezvous, fill it or slow it down, nor look at a rank's version,
 * number or size before its proof.
 */
#include "src/boot/gather.h"

#include <errno.h>
#include <string.h>

#define SHAKE_TIMEOUT_NS (5 * EPI_NS_PER_S)
#define MAX_ACCEPTS 64 /* per turn and listener */
#define LOG_PAUSE_NS EPI_NS_PER_S

/* However many come, there is one line per second. */
static void log_stranger(struct epi_gathering *g, const char *name, const char *verb,
                         const char *why) {
    if (!epi_deadline_expired(g->quiet_until)) {
        g->num_unlogged++;
        return;
    }
    g->quiet_until = epi_deadline_after(LOG_PAUSE_NS);
    if (g->num_unlogged > 0) {
        epi_log(EPI_LOG_WARN, "rendezvous: %s %s: %s; and %llu more before it", verb, name, why,
                (unsigned long long)g->num_unlogged);
    } else {
        epi_log(EPI_LOG_WARN, "rendezvous: %s %s: %s", verb, name, why);
    }
    g->num_unlogged = 0;
}

void epi_stranger_forget(struct epi_gathering *g, int index) {
    g->strangers[index] = g->strangers[--g->num_strangers];
}

void epi_stranger_drop(struct epi_gathering *g, int index, const char *why) {
    struct epi_stranger *s = &g->strangers[index];
    if (s->shake.has_answered) { /* it speaks libep's language: worth a word at a timeout */
        epi_format(g->turned_away, sizeof(g->turned_away), "%s: %s", s->name, why);
    }
    log_stranger(g, s->name, "dropped a connection from", why);
    epi_conn_close(&s->conn);
    epi_stranger_forget(g, index);
}

/* The last word to one who has proved himself. */
void epi_stranger_part(struct epi_gathering *g, int index, const struct epi_frame *head,
                       const char *text) {
    struct epi_conn *conn = &g->strangers[index].conn;
    epi_conn_send_text(conn, head, text);
    epi_conn_flush(conn); /* a new socket has room for it */
    epi_conn_close(conn);
    epi_stranger_forget(g, index);
}

void epi_stranger_turn_away(struct epi_gathering *g, int index, ep_status status,
                            const char *text) {
    epi_format(g->turned_away, sizeof(g->turned_away), "%s", text);
    log_stranger(g, g->strangers[index].name, "turned away", text);
    epi_stranger_part(g, index, &(struct epi_frame){.type = EPI_FRAME_REJECT, .status = status},
                      text);
}

/* The oldest goes first, of those that have said nothing yet if there are any. False: none is here. */
static bool drop_oldest(struct epi_gathering *g, const char *why) {
    int oldest = -1;
    for (int i = 0; i < g->num_strangers; i++) {
        const struct epi_stranger *s = &g->strangers[i];
        const struct epi_stranger *o = oldest >= 0 ? &g->strangers[oldest] : NULL;
        if (!o || s->shake.has_answered < o->shake.has_answered ||
            (s->shake.has_answered == o->shake.has_answered && s->number < o->number)) {
            oldest = i;
        }
    }
    if (oldest >= 0) {
        epi_stranger_drop(g, oldest, why);
    }
    return oldest >= 0;
}

/* Errors of the one connection that was to be accepted, not of accepting. */
static bool is_passing(int err) {
    static const int passing[] = {
        EAGAIN,    EWOULDBLOCK, EINTR,        ECONNABORTED, ENETDOWN,   EPROTO,    ENOPROTOOPT,
        EHOSTDOWN, ENONET,      EHOSTUNREACH, ENETUNREACH,  EOPNOTSUPP, ETIMEDOUT, ECONNRESET};
    for (size_t i = 0; i < sizeof(passing) / sizeof(passing[0]); i++) {
        if (err == passing[i]) {
            return true;
        }
    }
    return false;
}

static const char *more_files(int err) {
    return err == EMFILE || err == ENFILE ? "; raise the limit of open files (ulimit -n)" : "";
}

static void refuse_to_accept(struct epi_gathering *g, int err) {
    g->status = epi_fail(EP_ERR_SYSTEM, "rendezvous: rank 0 cannot accept a connection: %s%s",
                         strerror(err), more_files(err));
}

void epi_stranger_let_in(struct epi_gathering *g, int fd, const struct epi_addr *from) {
    if (g->num_strangers == g->max_strangers) {
        drop_oldest(g, "too many connections that prove nothing");
    }
    struct epi_stranger *s = &g->strangers[g->num_strangers];
    memset(s, 0, sizeof(*s));
    s->number = g->num_came++;
    s->is_ready = true;
    s->deadline = epi_deadline_after(SHAKE_TIMEOUT_NS);
    if (from->ss.ss_family == AF_UNIX) {
        int uid = -1;
        int pid = -1;
        const bool is_ours = epi_sock_is_same_user(fd, &uid, &pid);
        epi_format(s->name, sizeof(s->name), "process %d of user %d", pid, uid);
        if (!is_ours) {
            log_stranger(g, s->name, "dropped a connection from",
                         "another user's ranks cannot join");
            epi_fd_close(&fd);
            return;
        }
    } else {
        epi_addr_text(from, s->name);
    }
    epi_conn_init(&s->conn, fd, -1, EPI_CONN_STRANGER_BYTES);
    g->num_strangers++;
}

void epi_strangers_accept(struct epi_gathering *g, int listen_fd) {
    for (int i = 0; i < MAX_ACCEPTS && g->status == EP_OK; i++) {
        struct epi_addr from;
        int fd = epi_sock_accept(listen_fd, &from);
        if (fd >= 0) {
            epi_stranger_let_in(g, fd, &from);
        } else if (fd == -EAGAIN || fd == -EWOULDBLOCK) {
            return;
        } else if (fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM || fd == -ENOBUFS) {
            if (!drop_oldest(g, "its descriptor is needed")) {
                refuse_to_accept(g, -fd);
            }
            epi_format(g->turned_away, sizeof(g->turned_away), "%s at rank 0%s", strerror(-fd),
                       more_files(-fd));
        } else if (!is_passing(-fd)) {
            refuse_to_accept(g, -fd);
        }
    }
}

/* Returns true when the stranger's place in the array is now another's, or nobody's. */
bool epi_stranger_hear(struct epi_gathering *g, int index) {
    struct epi_stranger *s = &g->strangers[index];
    struct epi_frame frame;
    struct epi_claim claim;
    s->is_ready = false;
    epi_conn_fill(&s->conn);
    for (;;) {
        int n = epi_conn_next(&s->conn, &frame);
        if (n == 0 && !s->conn.doomed) {
            return false;
        }
        if (n <= 0) {
            epi_stranger_drop(g, index, s->conn.doomed);
            return true;
        }
        if (!s->shake.has_answered) {
            const char *wrong = epi_shake_answer(&s->shake, &g->meet->key, &frame, &s->conn);
            epi_conn_flush(&s->conn);
            if (wrong) {
                epi_stranger_drop(g, index, wrong);
                return true;
            }
            continue;
        }
        const char *wrong = epi_shake_check_claim(&s->shake, &frame, &claim);
        if (wrong) {
            epi_stranger_drop(g, index, wrong);
        } else {
            epi_gather_claim(g, index, &claim, &frame);
        }
        return true;
    }
}

void epi_strangers_end(struct epi_gathering *g) {
    if (g->num_unlogged > 0) {
        epi_log(EPI_LOG_WARN, "rendezvous: dropped %llu more connections",
                (unsigned long long)g->num_unlogged);
    }
    while (g->num_strangers > 0) {
        g->num_strangers--;
        epi_conn_close(&g->strangers[g->num_strangers].conn);
    }
}
