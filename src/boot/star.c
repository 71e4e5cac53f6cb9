/* SPDX-License-Identifier: MIT */
/*
 * The control thread of a star: serves the connections between rank 0 and the others.
 *
 * Owns the connections. Runs as one thread per process for the life of the boot, asleep in poll
 * unless something happens. Rank 0's gathers contributions, hands out results, and passes on
 * who died or left; the others' talk to rank 0 only. Nothing is sent on an idle connection: the
 * kernel's keepalive finds vanished hosts, a closed socket is a dead process, and one that is
 * merely stopped keeps its socket and lives.
 * Must not wait for any single peer, nor hold the lock while it calls on_dead.
 */
#include "src/boot/parts.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define FAREWELL_NS EPI_NS_PER_S
#define CHECK_MS 1000 /* how often a connection with bytes on the way is looked at */

/* ---- verdicts; the lock is held ---------------------------------------------------------- */

static void finish(struct epi_star *star, ep_status status, const char *text) {
    if (star->req.active && !star->req.done) {
        star->req.done = true;
        star->req.status = status;
        epi_format(star->req.text, sizeof(star->req.text), "%s", text);
        pthread_cond_broadcast(&star->cond);
    }
}

static void set_broken(struct epi_star *star, ep_status status, const char *text) {
    if (star->broken == EP_OK) {
        star->broken = status;
        epi_format(star->broken_text, sizeof(star->broken_text), "%s", text);
    }
    finish(star, star->broken, star->broken_text);
}

/* ---- telling ----------------------------------------------------------------------------- */

static void send_packet_to_all(struct epi_star *star, struct epi_packet *packet) {
    for (int i = 0; i < star->num_conns; i++) {
        epi_conn_send_packet(&star->conns[i], packet);
    }
    epi_packet_drop(packet);
}

static void send_to_all(struct epi_star *star, const struct epi_frame *frame) {
    send_packet_to_all(star, epi_packet_make(frame));
}

/* A word of a rank's, which is not said to itself. */
static void send_word(struct epi_star *star, int from, uint64_t word) {
    struct epi_packet *packet =
        epi_packet_make(&(struct epi_frame){.type = EPI_FRAME_WORD, .seq = word});
    for (int i = 0; i < star->num_conns; i++) {
        if (star->rank != 0 || i != from) {
            epi_conn_send_packet(&star->conns[i], packet);
        }
    }
    epi_packet_drop(packet);
    if (from != star->rank && star->on_told) {
        star->on_told(star->ctx, word);
    }
}

static void send_text_to_all(struct epi_star *star, struct epi_frame head, const char *text) {
    head.data = (const uint8_t *)text;
    head.data_bytes = epi_wire_text_bytes(text);
    send_to_all(star, &head);
}

/* A rank is gone: remember, fail what needs it, pass it on, and say so once. */
static void rank_gone(struct epi_star *star, int rank, enum epi_rank_state state,
                      const char *why) {
    char text[EPI_WIRE_TEXT_BYTES + 1];
    if (state == EPI_RANK_DEAD) {
        epi_format(text, sizeof(text), "rank %d died: %s", rank, why);
    } else {
        epi_format(text, sizeof(text), "rank %d has left the group", rank);
    }
    pthread_mutex_lock(&star->lock);
    bool is_news = star->state[rank] == EPI_RANK_ALIVE;
    if (is_news) {
        star->state[rank] = (uint8_t)state;
        set_broken(star, EP_ERR_PEER, text);
    }
    pthread_mutex_unlock(&star->lock);
    if (!is_news) {
        return;
    }
    if (star->rank == 0) {
        struct epi_frame head = {.type = EPI_FRAME_LEFT, .rank = (uint32_t)rank};
        if (state == EPI_RANK_DEAD) {
            head.type = EPI_FRAME_DEAD;
        }
        send_text_to_all(star, head, state == EPI_RANK_DEAD ? why : "");
    }
    if (state == EPI_RANK_LEFT) {
        epi_log(EPI_LOG_DEBUG, "%s", text);
        return;
    }
    epi_log(EPI_LOG_WARN, "%s", text);
    if (star->on_dead) {
        star->on_dead(star->ctx, rank, why);
    }
}

/* ---- rounds, at rank 0 ------------------------------------------------------------------- */

/* The lock is held. Rank 0 cannot serve any more; better all fail than all wait. */
static void fault_no_memory(struct epi_star *star, size_t bytes) {
    char text[EPI_ROUND_TEXT_BYTES];
    epi_format(text, sizeof(text), "allgather: rank 0 has no memory for %zu bytes per rank",
               bytes);
    set_broken(star, EP_ERR_NOMEM, text);
    struct epi_frame head = {.type = EPI_FRAME_FAULT, .status = EP_ERR_NOMEM};
    send_text_to_all(star, head, text);
}

/* The lock is held. */
static void end_round(struct epi_star *star, struct epi_round *round) {
    struct epi_frame frame = {.type = EPI_FRAME_RESULT, .seq = round->seq};
    if (round->is_mismatch) {
        frame.status = EP_ERR_MISMATCH;
        frame.data = (const uint8_t *)round->text;
        frame.data_bytes = strlen(round->text);
    } else {
        frame.data = round->data;
        frame.data_bytes = round->bytes * (size_t)star->num_ranks;
    }
    struct epi_packet *packet = epi_packet_make(&frame);
    struct epi_request *req = &star->req;
    star->num_ended = round->seq;
    if (!packet) {
        fault_no_memory(star, round->bytes);
    } else {
        send_packet_to_all(star, packet);
        if (req->active && !req->done && req->seq == round->seq) {
            if (!round->is_mismatch && round->bytes > 0) {
                memcpy(req->out, round->data, frame.data_bytes);
            }
            finish(star, (ep_status)frame.status, round->text);
        }
    }
    epi_rounds_remove(&star->rounds, round);
}

/* The lock is held. */
static void contribute(struct epi_star *star, int rank, uint64_t seq, const void *in,
                       size_t bytes) {
    if (star->broken != EP_OK) {
        return;
    }
    struct epi_round *round = epi_rounds_put(&star->rounds, seq, rank, in, bytes);
    if (!round) {
        fault_no_memory(star, bytes);
    } else if (round->num_in == star->num_ranks) {
        end_round(star, round);
    }
}

/* The lock is held. Who is missing in the round that a caller has waited for too long. */
static void text_of_missing_calls(struct epi_star *star, uint64_t seq, char *out,
                                  size_t out_bytes) {
    struct epi_round *round = epi_rounds_find(&star->rounds, seq);
    char list[EPI_ROUND_TEXT_BYTES];
    if (!round) {
        epi_format(out, out_bytes, "none is missing any more");
        return;
    }
    epi_rank_list(round->have, false, star->num_ranks, list, sizeof(list));
    epi_format(out, out_bytes, "%d of %d ranks have called; missing: %s", round->num_in,
               star->num_ranks, list);
}

/* ---- frames ------------------------------------------------------------------------------ */

/* A rank holds itself back (star_call.c), so one that does not is no rank of ours any more. */
static void on_gather(struct epi_star *star, struct epi_conn *conn,
                      const struct epi_frame *frame) {
    if (frame->seq != conn->last_seq + 1) {
        conn->doomed = "it counts its calls wrongly";
        return;
    }
    conn->last_seq = frame->seq;
    pthread_mutex_lock(&star->lock);
    if (star->broken == EP_OK && frame->seq > star->num_ended + EPI_STAR_MAX_OPEN) {
        conn->doomed = "it calls without waiting for the others";
    } else {
        contribute(star, conn->rank, frame->seq, frame->data, frame->data_bytes);
    }
    pthread_mutex_unlock(&star->lock);
}

static void on_frame_at_root(struct epi_star *star, struct epi_conn *conn,
                             const struct epi_frame *frame) {
    switch (frame->type) {
    case EPI_FRAME_GATHER:
        on_gather(star, conn, frame);
        return;
    case EPI_FRAME_ASK: {
        char text[EPI_WIRE_TEXT_BYTES + 1];
        if (frame->seq <= conn->last_ask || frame->seq > conn->last_seq) {
            conn->doomed = "it asks for the same call again, or for one it has not made";
            return;
        }
        conn->last_ask = frame->seq;
        pthread_mutex_lock(&star->lock);
        text_of_missing_calls(star, frame->seq, text, sizeof(text));
        pthread_mutex_unlock(&star->lock);
        struct epi_frame head = {.type = EPI_FRAME_TELL, .seq = frame->seq};
        epi_conn_send_text(conn, &head, text);
        return;
    }
    case EPI_FRAME_WORD:
        if (conn->num_words++ == EPI_BOOT_MAX_WORDS) {
            conn->doomed = "it says more to all than a rank has to say";
            return;
        }
        send_word(star, conn->rank, frame->seq);
        return;
    case EPI_FRAME_BYE:
        epi_conn_close(conn);
        rank_gone(star, conn->rank, EPI_RANK_LEFT, "");
        return;
    default:
        conn->doomed = "it sent a frame that only rank 0 may send";
    }
}

static void on_result(struct epi_star *star, struct epi_conn *conn,
                      const struct epi_frame *frame) {
    char text[EPI_WIRE_TEXT_BYTES + 1] = "";
    if (frame->status != EP_OK) {
        epi_frame_text(frame, text);
    }
    pthread_mutex_lock(&star->lock);
    struct epi_request *req = &star->req;
    const bool is_next = frame->seq == star->num_ended + 1 && frame->seq <= star->num_calls;
    if (!is_next) {
        conn->doomed = "it sent a result that nobody waits for";
    } else {
        star->num_ended = frame->seq;
    }
    if (is_next && req->active && !req->done && req->seq == frame->seq) {
        size_t total_bytes = req->bytes * (size_t)star->num_ranks;
        if (frame->status == EP_OK && frame->data_bytes != total_bytes) {
            conn->doomed = "it sent a result of the wrong size";
        } else {
            if (frame->status == EP_OK && total_bytes > 0) {
                memcpy(req->out, frame->data, total_bytes);
            }
            finish(star, (ep_status)frame->status, text);
        }
    }
    pthread_mutex_unlock(&star->lock);
}

static void on_tell(struct epi_star *star, const struct epi_frame *frame) {
    pthread_mutex_lock(&star->lock);
    struct epi_request *req = &star->req;
    if (req->active && !req->done && req->seq == frame->seq) {
        epi_frame_text(frame, req->text);
        req->told = true;
        pthread_cond_broadcast(&star->cond);
    }
    pthread_mutex_unlock(&star->lock);
}

static void on_frame_at_peer(struct epi_star *star, struct epi_conn *conn,
                             const struct epi_frame *frame) {
    char text[EPI_WIRE_TEXT_BYTES + 1];
    switch (frame->type) {
    case EPI_FRAME_RESULT:
        on_result(star, conn, frame);
        return;
    case EPI_FRAME_TELL:
        on_tell(star, frame);
        return;
    case EPI_FRAME_DEAD:
    case EPI_FRAME_LEFT:
        if (frame->rank >= (uint32_t)star->num_ranks || (int)frame->rank == star->rank) {
            conn->doomed = "it speaks of a rank that cannot be";
            return;
        }
        epi_frame_text(frame, text);
        rank_gone(star, (int)frame->rank,
                  frame->type == EPI_FRAME_DEAD ? EPI_RANK_DEAD : EPI_RANK_LEFT, text);
        return;
    case EPI_FRAME_FAULT:
        epi_frame_text(frame, text);
        pthread_mutex_lock(&star->lock);
        set_broken(star, (ep_status)frame->status, text);
        pthread_mutex_unlock(&star->lock);
        return;
    case EPI_FRAME_WORD:
        if (star->on_told) {
            star->on_told(star->ctx, frame->seq);
        }
        return;
    case EPI_FRAME_BYE:
        epi_conn_close(conn);
        rank_gone(star, 0, EPI_RANK_LEFT, "");
        return;
    default:
        conn->doomed = "it sent a frame that rank 0 does not send";
    }
}

/* What was said before the end is heard first: a BYE, say, right before the close. */
static void read_frames(struct epi_star *star, struct epi_conn *conn) {
    struct epi_frame frame;
    epi_conn_fill(conn);
    while (conn->fd >= 0 && epi_conn_next(conn, &frame) > 0) {
        if (star->rank == 0) {
            on_frame_at_root(star, conn, &frame);
        } else {
            on_frame_at_peer(star, conn, &frame);
        }
    }
}

/* Sends what can be sent without waiting, and closes the connections that are doomed. Before that
 * it reads them, because a rank that cannot be sent to may have said goodbye. A death is news for
 * the others, and to send it may doom their connections in turn, hence the loop. */
static void flush_all(struct epi_star *star) {
    bool again = true;
    while (again) {
        again = false;
        for (int i = 0; i < star->num_conns; i++) {
            struct epi_conn *conn = &star->conns[i];
            const bool could_send = !conn->doomed;
            if (conn->fd < 0 || epi_conn_flush(conn)) {
                continue;
            }
            const char *why = conn->doomed;
            if (could_send) {
                read_frames(star, conn);
            }
            if (conn->fd >= 0) {
                epi_conn_close(conn);
                rank_gone(star, conn->rank, EPI_RANK_DEAD, why);
            }
            again = true;
        }
    }
}

/* ---- the loop ---------------------------------------------------------------------------- */

/* The lock is held. The caller may have given up by now; its contribution counts all the same,
 * because the ranks must agree on how many calls each has made. */
static void take_posted(struct epi_star *star, struct epi_packet *packet) {
    if (star->rank == 0) {
        contribute(star, 0, star->num_calls, packet->data + EPI_WIRE_HEADER_BYTES,
                   packet->bytes - EPI_WIRE_HEADER_BYTES);
    } else {
        epi_conn_send_packet(&star->conns[0], packet);
    }
    epi_packet_drop(packet);
}

/* Takes over what the caller's thread has asked for. Returns true when it is time to stop. */
static bool take_requests(struct epi_star *star) {
    uint64_t kicks;
    ssize_t n = read(star->kick_fd, &kicks, sizeof(kicks));
    (void)n; /* nothing to read is fine */
    pthread_mutex_lock(&star->lock);
    struct epi_request *req = &star->req;
    if (star->posted) {
        take_posted(star, star->posted);
        star->posted = NULL;
        pthread_cond_broadcast(&star->cond);
    }
    while (star->num_words_sent < star->num_words) {
        send_word(star, star->rank, star->word[star->num_words_sent++]);
    }
    if (star->lacks && star->rank == 0) {
        fault_no_memory(star, star->lacks);
    } else if (star->lacks) {
        epi_conn_send_packet(&star->conns[0], NULL);
    }
    star->lacks = 0;
    if (req->ask) {
        req->ask = false;
        if (star->rank == 0) {
            text_of_missing_calls(star, req->seq, req->text, sizeof(req->text));
            req->told = true;
            pthread_cond_broadcast(&star->cond);
        } else {
            epi_conn_send(&star->conns[0],
                          &(struct epi_frame){.type = EPI_FRAME_ASK, .seq = req->seq});
        }
    }
    bool stop = star->stop;
    pthread_mutex_unlock(&star->lock);
    return stop;
}

/* How long to sleep at most because of this connection, -1: for ever. */
static int check_conn(struct epi_conn *conn) {
    conn->has_unacked = conn->has_unacked && epi_sock_has_unacked(conn->fd);
    if (!conn->has_unacked) {
        return -1;
    }
    if (epi_sock_vanished(conn->fd)) {
        conn->doomed = "its host does not answer";
        return 0;
    }
    return CHECK_MS;
}

static void wait_for_something(struct epi_star *star) {
    int num = 0;
    int wait_ms = -1;
    star->polls[num++] = (struct pollfd){.fd = star->kick_fd, .events = POLLIN};
    for (int i = 0; i < star->num_conns; i++) {
        struct epi_conn *conn = &star->conns[i];
        if (conn->fd >= 0) {
            int ms = check_conn(conn);
            wait_ms = wait_ms == -1 || (ms >= 0 && ms < wait_ms) ? ms : wait_ms;
            star->polls[num++] =
                (struct pollfd){.fd = conn->fd, .events = epi_conn_events(conn)};
        }
    }
    int ready = poll(star->polls, (nfds_t)num, wait_ms);
    num = 1;
    for (int i = 0; i < star->num_conns; i++) {
        if (star->conns[i].fd >= 0) {
            star->conns[i].is_ready = ready > 0 && star->polls[num].revents != 0;
            num++;
        }
    }
}

/* BYE to all, then wait until each has closed its side: closing with bytes unread would reset
 * the connection, and the reset could overtake the BYE and look like a death. */
static void farewell(struct epi_star *star) {
    struct epi_deadline deadline = epi_deadline_after(FAREWELL_NS);
    send_to_all(star, &(struct epi_frame){.type = EPI_FRAME_BYE});
    for (;;) {
        int num = 0;
        for (int i = 0; i < star->num_conns; i++) {
            struct epi_conn *conn = &star->conns[i];
            if (conn->fd < 0) {
                continue;
            }
            conn->in_used = conn->in_bytes; /* nobody listens any more */
            bool was_sent = !conn->out_first;
            if (!epi_conn_flush(conn) || !epi_conn_fill(conn)) {
                epi_conn_close(conn);
                continue;
            }
            if (!was_sent && !conn->out_first) {
                shutdown(conn->fd, SHUT_WR);
            }
            star->polls[num++] =
                (struct pollfd){.fd = conn->fd, .events = epi_conn_events(conn)};
        }
        if (num == 0 || epi_deadline_expired(deadline)) {
            return;
        }
        poll(star->polls, (nfds_t)num, epi_deadline_left_ms(deadline));
    }
}

void *epi_star_main(void *arg) {
    struct epi_star *star = arg;
    epi_log_set_rank(star->rank);
    while (!take_requests(star)) {
        /* Before the first poll too: frames may have come right behind START. */
        for (int i = 0; i < star->num_conns; i++) {
            if (star->conns[i].fd >= 0 && star->conns[i].is_ready) {
                read_frames(star, &star->conns[i]);
            }
        }
        flush_all(star);
        wait_for_something(star);
    }
    farewell(star);
    return NULL;
}
