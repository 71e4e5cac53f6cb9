/* SPDX-License-Identifier: MIT */
/*
 * Rank 0's side of the rendezvous: listens, looks at whoever comes, and waits for all ranks.
 *
 * Owns the connections until all ranks have come. Runs on the creating thread, in one poll
 * loop. Anybody can reach the port: whoever does not say a proper HELLO in time is dropped with
 * one log line and costs 256 bytes until then; whoever says one but does not belong is told.
 * Must not let a stranger end the rendezvous, nor wait beyond the deadline.
 */
#include "src/boot/parts.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#define HELLO_TIMEOUT_NS (5 * EPI_NS_PER_S)
#define NUM_SPARE_STRANGERS 64
#define LIST_BYTES 160

struct stranger {
    struct epi_conn conn;
    struct epi_deadline deadline;
    char name[EPI_ADDR_TEXT_BYTES];
};

struct gathering {
    const struct epi_meet *meet;
    struct epi_conn *conns; /* [num_ranks], fd -1 until the rank is here */
    bool *here;             /* [num_ranks] */
    int num_here;           /* rank 0 included */
    struct stranger *strangers;
    int num_strangers;
    int max_strangers;
    struct pollfd *polls;
    char turned_away[200]; /* the last who was, for the text of a timeout */
    ep_status status;      /* set by whatever makes the rendezvous fail */
};

uint32_t epi_meet_version(void) {
    return EP_VERSION_MAJOR * 10000u + EP_VERSION_MINOR * 100u + EP_VERSION_PATCH;
}

/* ---- listening --------------------------------------------------------------------------- */

ep_status epi_meet_listen(const struct epi_meet *meet, int *fd) {
    struct epi_addr addr[EPI_MEET_MAX_ADDRS];
    int num = 0;
    bool is_name = true;
    const char *why = NULL;
    int listener = -EADDRNOTAVAIL;
    if (meet->host[0] != '\0') {
        why =
            epi_addr_resolve(meet->host, meet->port, addr, EPI_MEET_MAX_ADDRS, &num, &is_name);
    }
    /* A name may mean one address here and another elsewhere (Debian's hosts file calls the
     * host itself 127.0.1.1), so only a literal address restricts whom we listen to. */
    if (!why && num > 0 && (!is_name || strcmp(meet->host, "localhost") == 0)) {
        listener = epi_sock_listen(&addr[0]);
    }
    if (listener == -EADDRNOTAVAIL) {
        epi_addr_any(meet->port, true, &addr[0]);
        listener = epi_sock_listen(&addr[0]);
        if (listener == -EAFNOSUPPORT || listener == -EADDRNOTAVAIL) {
            epi_addr_any(meet->port, false, &addr[0]);
            listener = epi_sock_listen(&addr[0]);
        }
    }
    if (listener >= 0) {
        *fd = listener;
        return EP_OK;
    }
    const char *advice = "";
    if (listener == -EADDRINUSE) {
        advice = "; another program or job listens there: end it, or choose another port "
                 "(EP_PORT, or the address)";
    } else if (listener == -EACCES) {
        advice = "; choose a port of 1024 or above (EP_PORT, or the address)";
    } else if (listener == -EMFILE) {
        advice = "; raise the limit of open files (ulimit -n)";
    }
    return epi_fail(EP_ERR_SYSTEM, "rendezvous: rank 0 cannot listen on %s: %s%s", meet->where,
                    strerror(-listener), advice);
}

/* ---- strangers --------------------------------------------------------------------------- */

static void forget(struct gathering *g, int index) {
    g->strangers[index] = g->strangers[--g->num_strangers];
}

static void drop(struct gathering *g, int index, const char *why) {
    struct stranger *s = &g->strangers[index];
    epi_log(EPI_LOG_WARN, "rendezvous: dropped a connection from %s: %s", s->name, why);
    epi_conn_close(&s->conn);
    forget(g, index);
}

static void turn_away(struct gathering *g, int index, ep_status status, const char *text) {
    struct stranger *s = &g->strangers[index];
    epi_format(g->turned_away, sizeof(g->turned_away), "%s", text);
    epi_log(EPI_LOG_WARN, "rendezvous: turned away %s: %s", s->name, text);
    struct epi_frame head = {.type = EPI_FRAME_REJECT, .status = status};
    epi_conn_send_text(&s->conn, &head, text);
    epi_conn_flush(&s->conn); /* a new socket has room for it */
    epi_conn_close(&s->conn);
    forget(g, index);
}

static void accept_all(struct gathering *g, int listen_fd) {
    for (;;) {
        struct epi_addr from;
        int fd = epi_sock_accept(listen_fd, &from);
        if (fd == -EINTR || fd == -ECONNABORTED) {
            continue;
        }
        if (fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM || fd == -ENOBUFS) {
            g->status = epi_fail(EP_ERR_SYSTEM,
                                 "rendezvous: rank 0 cannot accept a connection: %s; raise the "
                                 "limit of open files (ulimit -n)",
                                 strerror(-fd));
        }
        if (fd < 0) {
            return; /* none left, or an error of that one connection */
        }
        if (g->num_strangers == g->max_strangers) {
            drop(g, 0, "too many connections that say nothing");
        }
        struct stranger *s = &g->strangers[g->num_strangers++];
        epi_conn_init(&s->conn, fd, -1, EPI_CONN_STRANGER_BYTES);
        s->deadline = epi_deadline_after(HELLO_TIMEOUT_NS);
        epi_addr_text(&from, s->name);
    }
}

static ep_status check_hello(struct gathering *g, const struct epi_hello *h, char text[200]) {
    const struct epi_meet *m = g->meet;
    if (h->protocol != EPI_WIRE_PROTOCOL || h->version != epi_meet_version()) {
        epi_format(
            text, 200,
            "rank %u runs libep %u (protocol %u), rank 0 runs %u (protocol %u); all ranks "
            "must use the same libep",
            h->rank, h->version, h->protocol, epi_meet_version(), EPI_WIRE_PROTOCOL);
        return EP_ERR_VERSION;
    }
    if (h->job != m->job) {
        epi_format(text, 200,
                   "another job is using this address (%s); choose another port, or give all "
                   "ranks the same job name (EP_JOB)",
                   m->where);
        return EP_ERR_MISMATCH;
    }
    if (h->num_ranks != (uint32_t)m->num_ranks) {
        epi_format(text, 200, "rank %u was told there are %u ranks, rank 0 was told %d",
                   h->rank, h->num_ranks, m->num_ranks);
        return EP_ERR_MISMATCH;
    }
    if (h->rank >= h->num_ranks || h->rank == 0 || g->here[h->rank]) {
        epi_format(text, 200, "two processes claim to be rank %u of %d", h->rank, m->num_ranks);
        return EP_ERR_MISMATCH;
    }
    return EP_OK;
}

static void admit(struct gathering *g, int index, const struct epi_hello *h) {
    struct epi_conn *conn = &g->conns[h->rank];
    *conn = g->strangers[index].conn;
    epi_log(EPI_LOG_DEBUG, "rendezvous: rank %u is here, from %s", h->rank,
            g->strangers[index].name);
    forget(g, index);
    conn->rank = (int)h->rank;
    conn->in_limit = EPI_WIRE_HEADER_BYTES + EPI_BOOT_MAX_BYTES;
    g->here[h->rank] = true;
    g->num_here++;
    epi_conn_send(conn, &(struct epi_frame){.type = EPI_FRAME_WELCOME});
    epi_conn_flush(conn);
}

/* Returns true when the stranger's place in the array is now another's, or nobody's. */
static bool look_at(struct gathering *g, int index) {
    struct stranger *s = &g->strangers[index];
    struct epi_frame frame;
    epi_conn_fill(&s->conn);
    int n = epi_conn_next(&s->conn, &frame);
    if (n == 0 && !s->conn.doomed) {
        return false;
    }
    if (n <= 0 || frame.type != EPI_FRAME_HELLO) {
        drop(g, index, n > 0 ? "its first frame is not HELLO" : s->conn.doomed);
        return true;
    }
    struct epi_hello hello;
    char text[200];
    epi_wire_get_hello(frame.data, &hello);
    ep_status st = check_hello(g, &hello, text);
    if (st == EP_OK) {
        admit(g, index, &hello);
        return true;
    }
    bool is_ours = g->meet->is_job_named && hello.job == g->meet->job;
    bool is_hopeless = st == EP_ERR_VERSION || hello.num_ranks != (uint32_t)g->meet->num_ranks;
    turn_away(g, index, st, text);
    if (is_ours && is_hopeless) {
        g->status = epi_fail(st, "rendezvous: %s", text);
    }
    return true;
}

/* ---- ranks that are here ----------------------------------------------------------------- */

static void text_of_missing_ranks(struct gathering *g, char *out, size_t out_bytes) {
    char list[LIST_BYTES];
    epi_rank_list(g->here, false, g->meet->num_ranks, list, sizeof(list));
    epi_format(out, out_bytes, "%d of %d ranks arrived within %.1f s; missing: %s%s%s%s",
               g->num_here, g->meet->num_ranks, (double)g->meet->timeout_ns / 1e9, list,
               g->turned_away[0] != '\0' ? " (turned away: " : "", g->turned_away,
               g->turned_away[0] != '\0' ? ")" : "");
}

static void read_frames_of_rank(struct gathering *g, struct epi_conn *conn) {
    struct epi_frame frame;
    epi_conn_fill(conn);
    while (epi_conn_next(conn, &frame) > 0) {
        if (frame.type == EPI_FRAME_ASK) {
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

static int fill_polls(struct gathering *g, int listen_fd, struct epi_deadline *wake) {
    int num = 0;
    *wake = g->meet->deadline;
    g->polls[num++] = (struct pollfd){.fd = listen_fd, .events = POLLIN};
    for (int i = 0; i < g->num_strangers; i++) {
        g->polls[num++] = (struct pollfd){.fd = g->strangers[i].conn.fd, .events = POLLIN};
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

static void gather_step(struct gathering *g, int listen_fd) {
    struct epi_deadline wake;
    int num = fill_polls(g, listen_fd, &wake);
    if (poll(g->polls, (nfds_t)num, epi_deadline_left_ms(wake)) < 0 && errno != EINTR) {
        g->status = epi_fail(EP_ERR_SYSTEM, "rendezvous: poll: %s", strerror(errno));
        return;
    }
    int at = 1 + g->num_strangers;
    for (int r = 1; r < g->meet->num_ranks && g->status == EP_OK; r++) {
        if (g->conns[r].fd >= 0 && g->polls[at++].revents != 0) {
            read_frames_of_rank(g, &g->conns[r]);
        }
    }
    accept_all(g, listen_fd);
    for (int i = 0; i < g->num_strangers && g->status == EP_OK;) {
        if (look_at(g, i)) {
            continue;
        }
        if (epi_deadline_expired(g->strangers[i].deadline)) {
            drop(g, i, "it said nothing");
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

ep_status epi_meet_root(const struct epi_meet *meet, int listen_fd, struct epi_conn *conns) {
    size_t n = (size_t)meet->num_ranks;
    struct gathering g = {.meet = meet, .conns = conns, .num_here = 1};
    g.max_strangers = meet->num_ranks + NUM_SPARE_STRANGERS;
    g.here = epi_alloc_array(n, sizeof(*g.here));
    g.strangers = epi_alloc_array((size_t)g.max_strangers, sizeof(*g.strangers));
    g.polls = epi_alloc_array(1 + n + (size_t)g.max_strangers, sizeof(*g.polls));
    if (!g.here || !g.strangers || !g.polls) {
        g.status =
            epi_fail(EP_ERR_NOMEM, "rendezvous: no memory for %d ranks", meet->num_ranks);
    } else {
        g.here[0] = true;
    }
    while (g.status == EP_OK && g.num_here < meet->num_ranks) {
        gather_step(&g, listen_fd);
    }
    if (g.status != EP_OK) {
        /* A deadline and a disagreement are everyone's; what else befell rank 0 is its own. */
        bool is_shared = g.status == EP_ERR_TIMEOUT || g.status == EP_ERR_MISMATCH ||
                         g.status == EP_ERR_VERSION || g.status == EP_ERR_PEER;
        epi_meet_reject_all(conns, meet->num_ranks, is_shared ? g.status : EP_ERR_PEER,
                            epi_error_text());
    }
    while (g.num_strangers > 0) {
        g.num_strangers--;
        epi_conn_close(&g.strangers[g.num_strangers].conn);
    }
    epi_free(g.here);
    epi_free(g.strangers);
    epi_free(g.polls);
    return g.status;
}
