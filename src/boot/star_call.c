/* SPDX-License-Identifier: MIT */
/*
 * The caller's side of a star: making and freeing it, and waiting for a collective.
 *
 * Owns the star until it is freed. Runs on the threads that call boot, never on the control
 * thread: a call leaves its request under the lock, kicks the control thread and waits. The
 * input is copied first, and the output is written by the control thread only under the lock
 * and while the request is active, so a caller that gives up may free both.
 * Must not touch the connections once the control thread runs.
 */
#include "src/boot/parts.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

ep_status epi_star_make(struct epi_star **out, int rank, int num_ranks) {
    struct epi_star *star = epi_alloc(sizeof(*star));
    bool has_lock = star && pthread_mutex_init(&star->lock, NULL) == 0;
    if (!has_lock || epi_cond_init(&star->cond) != 0) {
        if (has_lock) {
            pthread_mutex_destroy(&star->lock);
        }
        epi_free(star);
        return epi_fail(EP_ERR_NOMEM, "rendezvous: no memory");
    }
    star->rank = rank;
    star->num_ranks = num_ranks;
    star->process = epi_process();
    star->num_conns = rank == 0 ? num_ranks : 1;
    star->rounds.num_ranks = num_ranks;
    star->kick_fd = epi_sock_kicker();
    star->conns = epi_alloc_array((size_t)star->num_conns, sizeof(*star->conns));
    star->polls = epi_alloc_array((size_t)star->num_conns + 1, sizeof(*star->polls));
    star->state = epi_alloc_array((size_t)num_ranks, sizeof(*star->state));
    for (int i = 0; star->conns && i < star->num_conns; i++) {
        epi_conn_init(&star->conns[i], -1, i, 0);
    }
    int err = star->kick_fd < 0 ? -star->kick_fd : 0;
    if (err != 0 || !star->conns || !star->polls || !star->state) {
        epi_star_free(star);
        return err != 0 ? epi_fail(EP_ERR_SYSTEM, "rendezvous: eventfd: %s", strerror(err))
                        : epi_fail(EP_ERR_NOMEM, "rendezvous: no memory");
    }
    *out = star;
    return EP_OK;
}

int epi_star_run(struct epi_star *star) {
    int err = epi_thread_start(&star->thread, epi_star_main, star, "ep-control");
    star->has_thread = err == 0;
    return err;
}

static void kick(struct epi_star *star) {
    uint64_t one = 1;
    ssize_t n;
    do {
        n = write(star->kick_fd, &one,
                  sizeof(one)); /* or the counter is full of kicks already */
    } while (n < 0 && errno == EINTR);
}

void epi_star_free(struct epi_star *star) {
    /* A forked child has neither the thread nor, thanks to sock.c, the descriptors. */
    bool is_ours = !epi_is_forked(star->process);
    if (star->has_thread && is_ours) {
        pthread_mutex_lock(&star->lock);
        star->stop = true;
        pthread_mutex_unlock(&star->lock);
        kick(star);
        pthread_join(star->thread, NULL);
    }
    for (int i = 0; star->conns && i < star->num_conns; i++) {
        epi_conn_close(&star->conns[i]);
    }
    epi_fd_close(&star->kick_fd);
    epi_rounds_clear(&star->rounds);
    epi_free(star->conns);
    epi_free(star->polls);
    epi_free(star->state);
    epi_packet_drop(star->posted);
    if (is_ours) { /* in a child a thread of the parent may seem to be waiting still */
        pthread_cond_destroy(&star->cond);
        pthread_mutex_destroy(&star->lock);
    }
    epi_free(star);
}

void epi_star_tell(struct epi_star *star, uint64_t word) {
    pthread_mutex_lock(&star->lock);
    const bool is_news = star->num_words < EPI_BOOT_MAX_WORDS &&
                         (star->num_words == 0 || star->word[star->num_words - 1] != word);
    if (is_news) {
        star->word[star->num_words++] = word;
    }
    pthread_mutex_unlock(&star->lock);
    kick(star);
}

/* The lock is held. The time is up: ask rank 0 whom we waited for; the answer may also be the
 * result itself, at the last moment. */
static void ask_who_is_missing(struct epi_star *star) {
    struct epi_request *req = &star->req;
    struct epi_deadline grace = epi_deadline_after(EPI_MEET_GRACE_NS);
    req->ask = true;
    kick(star);
    while (!req->done && !req->told && epi_cond_wait(&star->cond, &star->lock, grace)) {
    }
    if (!req->done && !req->told) {
        epi_format(req->text, sizeof(req->text), "rank 0 does not answer");
    }
}

/* The lock is held. */
static ep_status wait_done(struct epi_star *star, struct epi_deadline deadline) {
    struct epi_request *req = &star->req;
    int64_t start_ns = epi_now_ns();
    while (!req->done && epi_cond_wait(&star->cond, &star->lock, deadline)) {
    }
    if (!req->done) {
        double waited_s = (double)(epi_now_ns() - start_ns) / 1e9;
        ask_who_is_missing(star);
        if (!req->done) {
            return epi_fail(EP_ERR_TIMEOUT, "allgather: after %.1f s, %s", waited_s, req->text);
        }
    }
    if (req->status == EP_OK) {
        return EP_OK;
    }
    const char *head = strncmp(req->text, "allgather: ", 11) == 0 ? "" : "allgather: ";
    return epi_fail(req->status, "%s%s", head, req->text);
}

/* The lock is held. A contribution that timed out before the control thread took it (it may be
 * in a long on_dead) has to go first. */
static ep_status post(struct epi_star *star, const void *in, size_t bytes, void *out,
                      struct epi_deadline deadline) {
    while (star->posted && epi_cond_wait(&star->cond, &star->lock, deadline)) {
    }
    if (star->posted) {
        return epi_fail(EP_ERR_TIMEOUT, "allgather: the control thread of this rank is busy");
    }
    uint64_t seq = star->num_calls + 1;
    if (seq > star->num_ended + EPI_STAR_MAX_OPEN) {
        return epi_fail(EP_ERR_TIMEOUT,
                        "allgather: the last %d calls of this rank, which ran out of time, are "
                        "unanswered still",
                        EPI_STAR_MAX_OPEN);
    }
    struct epi_frame frame = {
        .type = EPI_FRAME_GATHER, .seq = seq, .data = in, .data_bytes = bytes};
    star->posted = epi_packet_make(&frame);
    if (!star->posted) { /* who cannot come leaves, so that nobody waits */
        star->lacks = EPI_WIRE_HEADER_BYTES + bytes;
        kick(star);
        return epi_fail(EP_ERR_NOMEM, "allgather: no memory for %zu bytes", bytes);
    }
    star->num_calls = seq;
    star->req = (struct epi_request){.active = true, .seq = seq, .out = out, .bytes = bytes};
    kick(star);
    return EP_OK;
}

ep_status epi_star_allgather(struct epi_star *star, const void *in, size_t bytes, void *out,
                             struct epi_deadline deadline) {
    if (epi_is_forked(star->process)) {
        return epi_fail(EP_ERR_STATE,
                        "allgather: this group was made before fork(); it belongs "
                        "to the parent");
    }
    pthread_mutex_lock(&star->lock);
    ep_status st = EP_OK;
    if (star->req.active) {
        st = epi_fail(EP_ERR_STATE, "allgather: another thread of this rank is in one");
    } else if (star->broken != EP_OK) {
        st = epi_fail(star->broken, "allgather: %s", star->broken_text);
    } else {
        st = post(star, in, bytes, out, deadline);
        if (st == EP_OK) {
            st = wait_done(star, deadline);
        }
        star->req.active = false;
    }
    pthread_mutex_unlock(&star->lock);
    return st;
}
