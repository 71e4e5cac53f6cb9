/* SPDX-License-Identifier: MIT */
/*
 * Rank 0's side of the rendezvous: looks at whoever comes, and waits for all ranks.
 *
 * Owns the connections until all ranks have come. Runs on the creating thread, in one poll
 * loop. Anybody may reach the listeners: who does not prove in time that it holds the job's key
 * costs a small buffer until then and a log line at most; who proves it but does not belong is told.
 * Must not let a stranger end the rendezvous, nor fill it, nor wait beyond the deadline; must not
 * look at a rank's version, number or size before its proof.
 */
#include "src/boot/parts.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#define SHAKE_TIMEOUT_NS (5 * EPI_NS_PER_S)
#define NUM_SPARE_STRANGERS 64
#define MAX_ACCEPTS 64 /* per turn and listener */
#define LOG_PAUSE_NS EPI_NS_PER_S
#define LIST_BYTES 160
#define REASON_BYTES 320

struct stranger {
    struct epi_conn conn;
    struct epi_shake shake;
    struct epi_deadline deadline;
    uint64_t number; /* in the order of their coming */
    bool is_ready;
    char name[EPI_ADDR_TEXT_BYTES];
};

struct gathering {
    const struct epi_meet *meet;
    struct epi_conn *conns; /* [num_ranks], fd -1 until the rank is here */
    bool *here;             /* [num_ranks] */
    uint64_t *process;      /* [num_ranks] of those that are here */
    int num_here;           /* rank 0 included */
    struct stranger *strangers;
    int num_strangers;
    int max_strangers;
    uint64_t num_came;
    struct pollfd *polls;
    struct epi_deadline quiet_until; /* no line about strangers before */
    uint64_t num_unlogged;
    char turned_away[REASON_BYTES]; /* the last who was, for the text of a timeout */
    ep_status status;               /* set by whatever makes the rendezvous fail */
};

uint32_t epi_meet_version(void) {
    return EP_VERSION_MAJOR * 10000u + EP_VERSION_MINOR * 100u + EP_VERSION_PATCH;
}

/* ---- strangers --------------------------------------------------------------------------- */

/* However many come, there is one line per second. */
static void log_stranger(struct gathering *g, const char *name, const char *verb,
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

static void forget(struct gathering *g, int index) {
    g->strangers[index] = g->strangers[--g->num_strangers];
}

static void drop(struct gathering *g, int index, const char *why) {
    struct stranger *s = &g->strangers[index];
    if (s->shake.has_answered) { /* it speaks libep's language: worth a word at a timeout */
        epi_format(g->turned_away, sizeof(g->turned_away), "%s: %s", s->name, why);
    }
    log_stranger(g, s->name, "dropped a connection from", why);
    epi_conn_close(&s->conn);
    forget(g, index);
}

/* The last word to one who has proved himself. */
static void part(struct gathering *g, int index, const struct epi_frame *head,
                 const char *text) {
    struct epi_conn *conn = &g->strangers[index].conn;
    epi_conn_send_text(conn, head, text);
    epi_conn_flush(conn); /* a new socket has room for it */
    epi_conn_close(conn);
    forget(g, index);
}

static void turn_away(struct gathering *g, int index, ep_status status, const char *text) {
    epi_format(g->turned_away, sizeof(g->turned_away), "%s", text);
    log_stranger(g, g->strangers[index].name, "turned away", text);
    part(g, index, &(struct epi_frame){.type = EPI_FRAME_REJECT, .status = status}, text);
}

/* The oldest goes first, of those that have said nothing yet if there are any. False: none is here. */
static bool drop_oldest(struct gathering *g, const char *why) {
    int oldest = -1;
    for (int i = 0; i < g->num_strangers; i++) {
        const struct stranger *s = &g->strangers[i];
        const struct stranger *o = oldest >= 0 ? &g->strangers[oldest] : NULL;
        if (!o || s->shake.has_answered < o->shake.has_answered ||
            (s->shake.has_answered == o->shake.has_answered && s->number < o->number)) {
            oldest = i;
        }
    }
    if (oldest >= 0) {
        drop(g, oldest, why);
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

static void refuse_to_accept(struct gathering *g, int err) {
    const bool is_full = err == EMFILE || err == ENFILE;
    g->status =
        epi_fail(EP_ERR_SYSTEM, "rendezvous: rank 0 cannot accept a connection: %s%s",
                 strerror(err), is_full ? "; raise the limit of open files (ulimit -n)" : "");
}

static void let_in(struct gathering *g, int fd, const struct epi_addr *from) {
    if (g->num_strangers == g->max_strangers) {
        drop_oldest(g, "too many connections that prove nothing");
    }
    struct stranger *s = &g->strangers[g->num_strangers];
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
            epi_sock_close(&fd);
            return;
        }
    } else {
        epi_addr_text(from, s->name);
    }
    epi_conn_init(&s->conn, fd, -1, EPI_CONN_STRANGER_BYTES);
    g->num_strangers++;
}

static void accept_some(struct gathering *g, int listen_fd) {
    for (int i = 0; i < MAX_ACCEPTS && g->status == EP_OK; i++) {
        struct epi_addr from;
        int fd = epi_sock_accept(listen_fd, &from);
        if (fd >= 0) {
            let_in(g, fd, &from);
        } else if (fd == -EAGAIN || fd == -EWOULDBLOCK) {
            return;
        } else if (fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM || fd == -ENOBUFS) {
            if (!drop_oldest(g, "its descriptor is needed")) {
                refuse_to_accept(g, -fd);
            }
        } else if (!is_passing(-fd)) {
            refuse_to_accept(g, -fd);
        }
    }
}

/* ---- claims ------------------------------------------------------------------------------ */

static ep_status check_claim(struct gathering *g, const struct epi_claim *c,
                             char text[REASON_BYTES]) {
    const struct epi_meet *m = g->meet;
    const uint64_t host = epi_this_host();
    if (c->version != epi_meet_version()) {
        epi_format(text, REASON_BYTES,
                   "rank %u runs libep %u, rank 0 runs %u; all ranks must use the same libep",
                   c->rank, c->version, epi_meet_version());
        return EP_ERR_VERSION;
    }
    if (c->num_ranks != (uint32_t)m->num_ranks) {
        epi_format(text, REASON_BYTES,
                   "rank %u was told there are %u ranks, rank 0 was told %d", c->rank,
                   c->num_ranks, m->num_ranks);
        return EP_ERR_MISMATCH;
    }
    if (c->rank >= c->num_ranks) {
        epi_format(text, REASON_BYTES, "a process claims to be rank %u of %d", c->rank,
                   m->num_ranks);
        return EP_ERR_MISMATCH;
    }
    if (c->host != 0 && host != 0 && c->host != host) {
        epi_format(text, REASON_BYTES,
                   "rank %u is on another host, or in another network namespace, than rank 0; "
                   "this version joins ranks of one host",
                   c->rank);
        return EP_ERR_UNSUPPORTED;
    }
    if (c->rank == 0 || g->here[c->rank]) {
        epi_format(text, REASON_BYTES, "two processes claim to be rank %u of %d", c->rank,
                   m->num_ranks);
        return EP_ERR_MISMATCH;
    }
    return EP_OK;
}

static void admit(struct gathering *g, int index, const struct epi_claim *c) {
    struct epi_conn *conn = &g->conns[c->rank];
    *conn = g->strangers[index].conn;
    epi_log(EPI_LOG_DEBUG, "rendezvous: rank %u is here, from %s", c->rank,
            g->strangers[index].name);
    forget(g, index);
    conn->rank = (int)c->rank;
    conn->in_limit = EPI_WIRE_HEADER_BYTES + EPI_BOOT_MAX_BYTES;
    conn->out_limit = g->meet->num_ranks + EPI_CONN_MAX_OUT;
    g->here[c->rank] = true;
    g->process[c->rank] = c->process;
    g->num_here++;
    epi_conn_send(conn, &(struct epi_frame){.type = EPI_FRAME_WELCOME});
    epi_conn_flush(conn);
}

/* Another thread of a process whose rank is here makes another group: it comes again. */
static bool is_other_group(struct gathering *g, const struct epi_claim *c) {
    return c->rank > 0 && c->rank < (uint32_t)g->meet->num_ranks && g->here[c->rank] &&
           g->process[c->rank] == c->process;
}

/* A rank that has failed before it could come says why: all fail with it. */
static void on_failed_rank(struct gathering *g, int index, const struct epi_claim *c,
                           const struct epi_frame *frame) {
    char why[EPI_WIRE_TEXT_BYTES + 1];
    struct epi_frame text = *frame;
    text.data += EPI_WIRE_CLAIM_BYTES;
    text.data_bytes -= EPI_WIRE_CLAIM_BYTES;
    epi_frame_text(&text, why);
    part(g, index, &(struct epi_frame){.type = EPI_FRAME_WELCOME}, "");
    if (c->rank < (uint32_t)g->meet->num_ranks) {
        g->status = epi_fail(EP_ERR_PEER, "rendezvous: rank %u failed: %s", c->rank, why);
    } else {
        g->status = epi_fail(EP_ERR_PEER, "rendezvous: a rank failed: %s", why);
    }
}

static void on_claim(struct gathering *g, int index, const struct epi_claim *c,
                     const struct epi_frame *frame) {
    char text[REASON_BYTES];
    if (c->status != EP_OK) {
        on_failed_rank(g, index, c, frame);
        return;
    }
    if (g->meet->has_failed) {
        if (c->rank < (uint32_t)g->meet->num_ranks && !g->here[c->rank]) {
            g->here[c->rank] = true;
            g->num_here++;
        }
        part(g, index, &(struct epi_frame){.type = EPI_FRAME_REJECT, .status = EP_ERR_PEER},
             g->meet->failed);
        return;
    }
    if (is_other_group(g, c)) {
        part(g, index, &(struct epi_frame){.type = EPI_FRAME_BUSY}, "");
        return;
    }
    ep_status st = check_claim(g, c, text);
    if (st == EP_OK) {
        admit(g, index, c);
        return;
    }
    const bool is_hopeless = st == EP_ERR_VERSION || st == EP_ERR_UNSUPPORTED ||
                             c->num_ranks != (uint32_t)g->meet->num_ranks;
    turn_away(g, index, st, text);
    if (g->meet->is_job_named && is_hopeless) {
        g->status = epi_fail(st, "rendezvous: %s", text);
    }
}

/* Returns true when the stranger's place in the array is now another's, or nobody's. */
static bool look_at(struct gathering *g, int index) {
    struct stranger *s = &g->strangers[index];
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
            drop(g, index, s->conn.doomed);
            return true;
        }
        if (!s->shake.has_answered) {
            const char *wrong = epi_shake_answer(&s->shake, &g->meet->key, &frame, &s->conn);
            epi_conn_flush(&s->conn);
            if (wrong) {
                drop(g, index, wrong);
                return true;
            }
            continue;
        }
        const char *wrong = epi_shake_check_claim(&s->shake, &frame, &claim);
        if (wrong) {
            drop(g, index, wrong);
        } else {
            on_claim(g, index, &claim, &frame);
        }
        return true;
    }
}

/* ---- ranks that are here ----------------------------------------------------------------- */

static void text_of_missing_ranks(struct gathering *g, char *out, size_t out_bytes) {
    char list[LIST_BYTES];
    epi_rank_list(g->here, false, g->meet->num_ranks, list, sizeof(list));
    const bool has_story = g->turned_away[0] != '\0';
    epi_format(out, out_bytes, "%d of %d ranks arrived within %.1f s; missing: %s%s%s%s%s",
               g->num_here, g->meet->num_ranks, (double)g->meet->timeout_ns / 1e9, list,
               has_story ? " (turned away: " : "", g->turned_away, has_story ? ")" : "",
               g->meet->may_be_far
                   ? " (from this host alone: ranks of other hosts need EP_JOB_KEY)"
                   : "");
}

static void read_frames_of_rank(struct gathering *g, struct epi_conn *conn) {
    struct epi_frame frame;
    epi_conn_fill(conn);
    while (epi_conn_next(conn, &frame) > 0) {
        if (frame.type == EPI_FRAME_ASK && !conn->has_asked) {
            conn->has_asked = true;
            char text[EPI_WIRE_TEXT_BYTES];
            text_of_missing_ranks(g, text, sizeof(text));
            struct epi_frame head = {.type = EPI_FRAME_TELL, .seq = frame.seq};
            epi_conn_send_text(conn, &head, text);
        } else {
            conn->doomed = frame.type == EPI_FRAME_BYE ? "it gave up" : "it sent a wrong frame";
            break;
        }
    }
    if (epi_conn_flush(conn)) {
        return;
    }
    g->status = epi_fail(EP_ERR_PEER, "rendezvous: rank %d came and went: %s", conn->rank,
                         conn->doomed);
    epi_conn_close(conn);
}

void epi_meet_start(struct epi_conn *conns, int num_ranks) {
    for (int r = 1; r < num_ranks; r++) {
        epi_conn_send(&conns[r], &(struct epi_frame){.type = EPI_FRAME_START});
    }
}

void epi_meet_reject_all(struct epi_conn *conns, int num_ranks, ep_status status,
                         const char *text) {
    struct epi_frame head = {.type = EPI_FRAME_REJECT, .status = status};
    for (int r = 1; r < num_ranks; r++) {
        if (conns[r].fd >= 0) {
            epi_conn_drop_queue(&conns[r]);
            epi_conn_send_text(&conns[r], &head, text);
            epi_conn_flush(&conns[r]); /* nothing but WELCOME went before: there is room */
        }
        epi_conn_close(&conns[r]);
    }
}

/* ---- the loop ---------------------------------------------------------------------------- */

static int fill_polls(struct gathering *g, const struct epi_listeners *listeners,
                      struct epi_deadline *wake) {
    int num = 0;
    *wake = g->meet->deadline;
    for (int i = 0; i < listeners->num; i++) {
        g->polls[num++] = (struct pollfd){.fd = listeners->fds[i], .events = POLLIN};
    }
    for (int i = 0; i < g->num_strangers; i++) {
        struct epi_conn *conn = &g->strangers[i].conn;
        g->polls[num++] = (struct pollfd){.fd = conn->fd, .events = POLLIN};
        *wake = epi_deadline_min(*wake, g->strangers[i].deadline);
    }
    for (int r = 1; r < g->meet->num_ranks; r++) {
        if (g->conns[r].fd >= 0) {
            g->polls[num++] =
                (struct pollfd){.fd = g->conns[r].fd, .events = epi_conn_events(&g->conns[r])};
        }
    }
    return num;
}

/* Ranks first, then those who spoke, then those who come: no crowd keeps a rank from being heard. */
static void gather_step(struct gathering *g, const struct epi_listeners *listeners) {
    struct epi_deadline wake;
    int num = fill_polls(g, listeners, &wake);
    int num_ready = poll(g->polls, (nfds_t)num, epi_deadline_left_ms(wake));
    if (num_ready < 0 && errno != EINTR) {
        g->status = epi_fail(EP_ERR_SYSTEM, "rendezvous: poll: %s", strerror(errno));
        return;
    }
    int at = listeners->num;
    for (int i = 0; i < g->num_strangers; i++) {
        g->strangers[i].is_ready = num_ready > 0 && g->polls[at++].revents != 0;
    }
    for (int r = 1; r < g->meet->num_ranks && num_ready > 0 && g->status == EP_OK; r++) {
        if (g->conns[r].fd >= 0 && g->polls[at++].revents != 0) {
            read_frames_of_rank(g, &g->conns[r]);
        }
    }
    for (int i = 0; i < listeners->num && num_ready > 0; i++) {
        if (g->polls[i].revents != 0) {
            accept_some(g, listeners->fds[i]);
        }
    }
    for (int i = 0; i < g->num_strangers && g->status == EP_OK;) {
        if (g->strangers[i].is_ready && look_at(g, i)) {
            continue;
        }
        if (epi_deadline_expired(g->strangers[i].deadline)) {
            drop(g, i, "it has not proved in time that it belongs here");
            continue;
        }
        i++;
    }
    if (g->status == EP_OK && g->num_here < g->meet->num_ranks &&
        epi_deadline_expired(g->meet->deadline)) {
        char text[EPI_WIRE_TEXT_BYTES];
        text_of_missing_ranks(g, text, sizeof(text));
        g->status = epi_fail(EP_ERR_TIMEOUT, "rendezvous: %s", text);
    }
}

static void begin_gathering(struct gathering *g, const struct epi_meet *meet,
                            struct epi_conn *conns) {
    size_t n = (size_t)meet->num_ranks;
    *g = (struct gathering){.meet = meet, .conns = conns, .num_here = 1};
    g->max_strangers = meet->num_ranks + NUM_SPARE_STRANGERS;
    g->quiet_until = epi_deadline_after(-1);
    g->here = epi_alloc_array(n, sizeof(*g->here));
    g->process = epi_alloc_array(n, sizeof(*g->process));
    g->strangers = epi_alloc_array((size_t)g->max_strangers, sizeof(*g->strangers));
    g->polls =
        epi_alloc_array(EPI_MEET_MAX_ADDRS + n + (size_t)g->max_strangers, sizeof(*g->polls));
    if (!g->here || !g->process || !g->strangers || !g->polls) {
        g->status =
            epi_fail(EP_ERR_NOMEM, "rendezvous: no memory for %d ranks", meet->num_ranks);
        return;
    }
    g->here[0] = true;
}

static void end_gathering(struct gathering *g) {
    if (g->num_unlogged > 0) {
        epi_log(EPI_LOG_WARN, "rendezvous: dropped %llu more connections",
                (unsigned long long)g->num_unlogged);
    }
    while (g->num_strangers > 0) {
        g->num_strangers--;
        epi_conn_close(&g->strangers[g->num_strangers].conn);
    }
    epi_free(g->here);
    epi_free(g->process);
    epi_free(g->strangers);
    epi_free(g->polls);
}

ep_status epi_meet_root(const struct epi_meet *meet, const struct epi_listeners *listeners,
                        struct epi_conn *conns) {
    struct gathering g;
    begin_gathering(&g, meet, conns);
    if (listeners->guest > 0 && g.status == EP_OK) {
        let_in(&g, listeners->guest, &(struct epi_addr){.ss.ss_family = AF_UNIX});
    }
    while (g.status == EP_OK && g.num_here < meet->num_ranks) {
        gather_step(&g, listeners);
    }
    if (g.status != EP_OK) {
        /* What ranks disagree in, and a deadline, are everyone's; what else befell rank 0 is its
         * own. */
        bool is_shared = g.status == EP_ERR_TIMEOUT || g.status == EP_ERR_MISMATCH ||
                         g.status == EP_ERR_VERSION || g.status == EP_ERR_PEER ||
                         g.status == EP_ERR_UNSUPPORTED;
        epi_meet_reject_all(conns, meet->num_ranks, is_shared ? g.status : EP_ERR_PEER,
                            epi_error_text());
    }
    end_gathering(&g);
    return g.status;
}
