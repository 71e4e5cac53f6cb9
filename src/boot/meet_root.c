/* SPDX-License-Identifier: MIT */
/*
 * Rank 0's side of the rendezvous: waits for all ranks, in one poll loop.
 *
 * Owns the connections until all ranks have come. Runs on the creating thread. Who has proved that
 * it holds the key, but does not belong, is told; strangers.c is about those who have not.
 * Must not wait beyond the deadline, and a moment in which a failure is told.
 */
#include "src/boot/gather.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#define NUM_SPARE_STRANGERS 64
#define LIST_BYTES 160

uint32_t epi_meet_version(void) {
    return EP_VERSION_MAJOR * 10000u + EP_VERSION_MINOR * 100u + EP_VERSION_PATCH;
}

/* ---- claims ------------------------------------------------------------------------------ */

static ep_status check_claim(struct epi_gathering *g, const struct epi_claim *c,
                             char text[EPI_REASON_BYTES]) {
    const struct epi_meet *m = g->meet;
    if (c->version != epi_meet_version()) {
        epi_format(text, EPI_REASON_BYTES,
                   "rank %u runs libep %u, rank 0 runs %u; all ranks must use the same libep",
                   c->rank, c->version, epi_meet_version());
        return EP_ERR_VERSION;
    }
    if (c->num_ranks != (uint32_t)m->num_ranks) {
        epi_format(text, EPI_REASON_BYTES,
                   "rank %u was told there are %u ranks, rank 0 was told %d", c->rank,
                   c->num_ranks, m->num_ranks);
        return EP_ERR_MISMATCH;
    }
    if (c->rank >= c->num_ranks) {
        epi_format(text, EPI_REASON_BYTES, "a process claims to be rank %u of %d", c->rank,
                   m->num_ranks);
        return EP_ERR_MISMATCH;
    }
    if (c->rank == 0 && m->launch.by_hand) {
        g->is_giving_way = true;
        epi_format(
            text, EPI_REASON_BYTES,
            "two processes claim to be rank 0 of %d, and the launcher names no job: this "
            "one, perhaps left over, gives way to the newer; set EP_JOB to a name for "
            "each job",
            m->num_ranks);
        return EP_ERR_MISMATCH;
    }
    if (c->rank == 0 || g->here[c->rank]) {
        epi_format(text, EPI_REASON_BYTES, "two processes claim to be rank %u of %d", c->rank,
                   m->num_ranks);
        return EP_ERR_MISMATCH;
    }
    return EP_OK;
}

static void admit(struct epi_gathering *g, int index, const struct epi_claim *c) {
    struct epi_conn *conn = &g->conns[c->rank];
    *conn = g->strangers[index].conn;
    epi_log(EPI_LOG_DEBUG, "rendezvous: rank %u is here, from %s", c->rank,
            g->strangers[index].name);
    epi_stranger_forget(g, index);
    conn->rank = (int)c->rank;
    conn->in_limit = EPI_WIRE_HEADER_BYTES + EPI_BOOT_MAX_BYTES;
    conn->out_limit = g->meet->num_ranks * (1 + EPI_BOOT_MAX_WORDS) + EPI_CONN_MAX_OUT;
    g->here[c->rank] = true;
    g->process[c->rank] = c->process;
    g->num_here++;
    epi_conn_send(conn, &(struct epi_frame){.type = EPI_FRAME_WELCOME});
    epi_conn_flush(conn);
}

/* Another thread of a process whose rank is here makes another group: it comes again. */
static bool is_other_group(struct epi_gathering *g, const struct epi_claim *c) {
    return c->rank > 0 && c->rank < (uint32_t)g->meet->num_ranks && g->here[c->rank] &&
           g->process[c->rank] == c->process;
}

/* Of a rank that nobody needs to wait for any more. One without a rank of ours stands for another. */
static void count_told(struct epi_gathering *g, const struct epi_claim *c) {
    const bool is_rank = c->rank < (uint32_t)g->meet->num_ranks;
    g->num_here += !is_rank || !g->here[c->rank];
    if (is_rank) {
        g->here[c->rank] = true;
    }
}

/* A rank that has failed before it could come says why: all fail with it. */
static void on_failed_rank(struct epi_gathering *g, int index, const struct epi_claim *c,
                           const struct epi_frame *frame) {
    char why[EPI_WIRE_TEXT_BYTES + 1];
    struct epi_frame text = *frame;
    text.data += EPI_WIRE_CLAIM_BYTES;
    text.data_bytes -= EPI_WIRE_CLAIM_BYTES;
    epi_frame_text(&text, why);
    epi_stranger_part(g, index, &(struct epi_frame){.type = EPI_FRAME_WELCOME}, "");
    count_told(g, c);
    if (g->verdict != EP_OK) {
        return;
    }
    if (c->rank < (uint32_t)g->meet->num_ranks) {
        g->status = epi_fail(EP_ERR_PEER, "rendezvous: rank %u failed: %s", c->rank, why);
    } else {
        g->status = epi_fail(EP_ERR_PEER, "rendezvous: a rank failed: %s", why);
    }
}

void epi_gather_claim(struct epi_gathering *g, int index, const struct epi_claim *c,
                      const struct epi_frame *frame) {
    char text[EPI_REASON_BYTES];
    if (c->status != EP_OK) {
        on_failed_rank(g, index, c, frame);
        return;
    }
    if (g->verdict != EP_OK) {
        count_told(g, c);
        epi_stranger_part(g, index,
                          &(struct epi_frame){.type = EPI_FRAME_REJECT, .status = g->verdict},
                          g->verdict_text);
        return;
    }
    if (is_other_group(g, c)) {
        epi_stranger_part(g, index, &(struct epi_frame){.type = EPI_FRAME_BUSY}, "");
        return;
    }
    ep_status st = check_claim(g, c, text);
    if (st == EP_OK) {
        admit(g, index, c);
        return;
    }
    const bool is_hopeless = st == EP_ERR_VERSION ||
                             c->num_ranks != (uint32_t)g->meet->num_ranks || g->is_giving_way;
    epi_stranger_turn_away(g, index, st, text);
    if (g->meet->is_job_named && is_hopeless) {
        count_told(g, c);
        g->status = epi_fail(st, "rendezvous: %s", text);
    }
}

/* ---- ranks that are here ----------------------------------------------------------------- */

static void text_of_missing_ranks(struct epi_gathering *g, char *out, size_t out_bytes) {
    char list[LIST_BYTES];
    epi_rank_list(g->here, false, g->meet->num_ranks, list, sizeof(list));
    const bool has_story = g->turned_away[0] != '\0';
    const char *note = g->meet->launch.note;
    if (!g->has_doubted) {
        g->has_doubted = true;
        epi_meet_doubt(g->meet, epi_deadline_after(EPI_MEET_GRACE_NS), g->doubt);
    }
    epi_format(
        out, out_bytes, "%d of %d ranks arrived within %.1f s; missing: %s%s%s%s%s%s%s%s",
        g->num_here, g->meet->num_ranks, (double)g->meet->timeout_ns / 1e9, list,
        has_story ? " (turned away: " : "", g->turned_away, has_story ? ")" : "",
        g->meet->may_be_far ? " (from this host alone: ranks of other hosts need EP_JOB_KEY)"
                            : "",
        g->doubt[0] != '\0' ? "; "
        : note[0] != '\0'   ? "; "
                            : "",
        g->doubt, g->doubt[0] != '\0' ? "" : note);
}

static void read_frames_of_rank(struct epi_gathering *g, struct epi_conn *conn) {
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

static int fill_polls(struct epi_gathering *g, const struct epi_listeners *listeners,
                      struct epi_deadline *wake) {
    int num = 0;
    *wake = g->deadline;
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
static void gather_step(struct epi_gathering *g, const struct epi_listeners *listeners) {
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
            epi_strangers_accept(g, listeners->fds[i]);
        }
    }
    for (int i = 0; i < g->num_strangers && g->status == EP_OK;) {
        if (g->strangers[i].is_ready && epi_stranger_hear(g, i)) {
            continue;
        }
        if (epi_deadline_expired(g->strangers[i].deadline)) {
            epi_stranger_drop(g, i, "it has not proved in time that it belongs here");
            continue;
        }
        i++;
    }
    if (g->status == EP_OK && g->num_here < g->meet->num_ranks &&
        epi_deadline_expired(g->deadline)) {
        char text[EPI_WIRE_TEXT_BYTES];
        text_of_missing_ranks(g, text, sizeof(text));
        g->status = epi_fail(EP_ERR_TIMEOUT, "rendezvous: %s", text);
    }
}

static void begin_gathering(struct epi_gathering *g, const struct epi_meet *meet,
                            struct epi_conn *conns) {
    size_t n = (size_t)meet->num_ranks;
    *g = (struct epi_gathering){.meet = meet, .conns = conns, .num_here = 1};
    g->max_strangers = meet->num_ranks + NUM_SPARE_STRANGERS;
    g->deadline = meet->deadline;
    g->verdict = meet->has_failed ? EP_ERR_PEER : EP_OK;
    epi_format(g->verdict_text, sizeof(g->verdict_text), "%s", meet->failed);
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

static void end_gathering(struct epi_gathering *g) {
    epi_strangers_end(g);
    epi_free(g->here);
    epi_free(g->process);
    epi_free(g->strangers);
    epi_free(g->polls);
}

static void await_ranks(struct epi_gathering *g, const struct epi_listeners *listeners) {
    while (g->status == EP_OK && g->num_here < g->meet->num_ranks) {
        gather_step(g, listeners);
    }
}

/* It has failed: those that are here are told, and those that come within a moment. What ranks
 * disagree in, and a deadline, are everyone's; what else befell rank 0 is its own. */
static void tell_all(struct epi_gathering *g, const struct epi_listeners *listeners) {
    const ep_status st = g->status;
    char text[EPI_ERROR_TEXT_BYTES];
    const bool is_shared = st == EP_ERR_TIMEOUT || st == EP_ERR_MISMATCH ||
                           st == EP_ERR_VERSION || st == EP_ERR_PEER;
    epi_format(text, sizeof(text), "%s", epi_error_text());
    epi_meet_reject_all(g->conns, g->meet->num_ranks, is_shared ? st : EP_ERR_PEER, text);
    if (is_shared && st != EP_ERR_TIMEOUT && g->verdict == EP_OK && !g->is_giving_way) {
        g->status = EP_OK;
        g->verdict = st;
        epi_format(g->verdict_text, sizeof(g->verdict_text), "%s", text);
        g->deadline = epi_deadline_min(g->deadline, epi_deadline_after(EPI_MEET_SAY_FAILED_NS));
        await_ranks(g, listeners);
    }
    g->status = epi_fail(st, "%s", text);
}

ep_status epi_meet_root(const struct epi_meet *meet, const struct epi_listeners *listeners,
                        struct epi_conn *conns) {
    struct epi_gathering g;
    begin_gathering(&g, meet, conns);
    if (listeners->guest > 0 && g.status == EP_OK) {
        epi_stranger_let_in(&g, listeners->guest, &(struct epi_addr){.ss.ss_family = AF_UNIX});
    }
    await_ranks(&g, listeners);
    if (g.status != EP_OK) {
        tell_all(&g, listeners);
    }
    end_gathering(&g);
    return g.status;
}
