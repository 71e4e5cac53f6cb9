/* SPDX-License-Identifier: MIT */
/*
 * A world: the meeting place of ranks that are threads of one process.
 *
 * Owns its sessions. A rank's k-th join belongs to session k, so several groups can be made of
 * a world one after another or side by side, and a failed attempt of one rank is matched by a
 * failed attempt of every other. A session ends when each rank has joined it and left. Runs on
 * the ranks' threads; one lock per world, one condition per session.
 * Must not wait for a rank that has left: leaving wakes everyone.
 */
#include "src/boot/parts.h"

#include <stdatomic.h>
#include <string.h>

#define LIST_BYTES 200

struct member {
    bool joined, left;
    uint64_t num_calls;
    void (*on_told)(void *ctx, uint64_t word);
    void *ctx;
};

struct epi_session {
    struct epi_session *next;
    ep_world *world;
    uint64_t number;
    pthread_cond_t cond;
    int num_left;
    struct member *member; /* [num_ranks] */
    struct epi_rounds rounds;
    char left_why[LIST_BYTES]; /* of the first rank that left with a reason */
    bool is_lost; /* one is missing: without a rank of this world, or without memory to come */
};

struct ep_world {
    _Atomic uint32_t process; /* whose threads its ranks are; 0: being adopted */
    int num_ranks;
    pthread_mutex_t lock;
    uint64_t *num_joins; /* [num_ranks] */
    struct epi_session *sessions;
};

/* ---- the world --------------------------------------------------------------------------- */

ep_status ep_world_create(ep_world **out, int num_ranks) {
    epi_clear_error();
    epi_opt_begin();
    EPI_NOT_NULL("ep_world_create", out);
    if (num_ranks < 1 || num_ranks > EP_MAX_RANKS) {
        return epi_fail(EP_ERR_ARG, "num_ranks is %d, it must be in 1..%d", num_ranks,
                        EP_MAX_RANKS);
    }
    ep_world *world = epi_alloc(sizeof(*world));
    uint64_t *num_joins = epi_alloc_array((size_t)num_ranks, sizeof(*num_joins));
    if (!world || !num_joins || pthread_mutex_init(&world->lock, NULL) != 0) {
        epi_free(num_joins);
        epi_free(world);
        return epi_fail(EP_ERR_NOMEM, "no memory for a world of %d ranks", num_ranks);
    }
    atomic_init(&world->process, epi_process());
    world->num_ranks = num_ranks;
    world->num_joins = num_joins;
    *out = world;
    return EP_OK;
}

/* Where no rank is in it, it is but memory, of which a forked process has a copy. */
bool epi_boot_world_adopt(ep_world *world) {
    const uint32_t mine = epi_process();
    uint32_t owner = atomic_load(&world->process);
    while (owner != mine) {
        if (owner != 0 && atomic_compare_exchange_strong(&world->process, &owner, 0)) {
            const bool idle = !world->sessions;
            if (idle) {
                pthread_mutex_init(&world->lock, NULL); /* a thread of the parent may hold it */
            }
            atomic_store(&world->process, idle ? mine : owner);
            return idle;
        }
        owner = atomic_load(&world->process);
    }
    return true;
}

int epi_world_num_ranks(ep_world *world) {
    return world->num_ranks;
}

static void session_free(struct epi_session *session) {
    if (session) {
        epi_rounds_clear(&session->rounds);
        epi_free(session->member);
        pthread_cond_destroy(&session->cond);
        epi_free(session);
    }
}

void ep_world_destroy(ep_world **world_ptr) {
    if (!world_ptr || !*world_ptr) {
        return;
    }
    ep_world *world = *world_ptr;
    *world_ptr = NULL;
    if (!epi_boot_world_adopt(world)) {
        epi_free(world->num_joins); /* its sessions may be as no thread would leave them */
        epi_free(world);
        return;
    }
    pthread_mutex_lock(&world->lock);
    bool in_use = false;
    for (struct epi_session *s = world->sessions; s; s = s->next) {
        for (int r = 0; r < world->num_ranks; r++) {
            in_use = in_use || (s->member[r].joined && !s->member[r].left);
        }
    }
    pthread_mutex_unlock(&world->lock);
    if (in_use) {
        epi_log(EPI_LOG_ERROR,
                "ep_world_destroy: a group of this world still exists; the world "
                "is not freed");
        return;
    }
    while (world->sessions) {
        struct epi_session *session = world->sessions;
        world->sessions = session->next;
        session_free(session);
    }
    pthread_mutex_destroy(&world->lock);
    epi_free(world->num_joins);
    epi_free(world);
}

/* ---- sessions; the world's lock is held -------------------------------------------------- */

static struct epi_session *session_make(ep_world *world, uint64_t number) {
    struct epi_session *session = epi_alloc(sizeof(*session));
    if (!session || epi_cond_init(&session->cond) != 0) {
        epi_free(session);
        return NULL;
    }
    session->member = epi_alloc_array((size_t)world->num_ranks, sizeof(*session->member));
    if (!session->member) {
        session_free(session);
        return NULL;
    }
    session->world = world;
    session->number = number;
    session->rounds.num_ranks = world->num_ranks;
    session->next = world->sessions;
    world->sessions = session;
    return session;
}

static struct epi_session *session_find(ep_world *world, uint64_t number) {
    struct epi_session *session = world->sessions;
    while (session && session->number != number) {
        session = session->next;
    }
    return session;
}

/* Two threads that both claim a rank: the first still waits in the session before. */
static bool is_waiting_elsewhere(ep_world *world, int rank) {
    for (struct epi_session *s = world->sessions; s; s = s->next) {
        bool complete = true;
        for (int r = 0; r < world->num_ranks; r++) {
            complete = complete && s->member[r].joined;
        }
        if (!complete && s->member[rank].joined && !s->member[rank].left) {
            return true;
        }
    }
    return false;
}

static ep_status session_enter(ep_world *world, int rank, struct epi_session **out) {
    if (is_waiting_elsewhere(world, rank)) {
        return epi_fail(EP_ERR_MISMATCH, "rendezvous: rank %d is claimed by two threads", rank);
    }
    uint64_t number = world->num_joins[rank] + 1;
    struct epi_session *session = session_find(world, number);
    if (!session) {
        session = session_make(world, number);
    }
    if (!session) {
        return epi_fail(EP_ERR_NOMEM, "rendezvous: no memory");
    }
    world->num_joins[rank] = number;
    session->member[rank].joined = true;
    *out = session;
    return EP_OK;
}

/* The first reason is the one that is told; or NULL. */
static void tell_why(struct epi_session *session, int rank, const char *why) {
    if (why && session->left_why[0] == '\0') {
        epi_format(session->left_why, sizeof(session->left_why), "rank %d failed: %s", rank,
                   why);
    }
    pthread_cond_broadcast(&session->cond);
}

static void session_exit(struct epi_session *session, int rank, const char *why) {
    ep_world *world = session->world;
    session->member[rank].left = true;
    tell_why(session, rank, why);
    if (++session->num_left == world->num_ranks) {
        struct epi_session **at = &world->sessions;
        while (*at != session) {
            at = &(*at)->next;
        }
        *at = session->next;
        session_free(session);
    }
}

void epi_world_listen(struct epi_session *session, int rank,
                      void (*on_told)(void *ctx, uint64_t word), void *ctx) {
    pthread_mutex_lock(&session->world->lock);
    session->member[rank].on_told = on_told;
    session->member[rank].ctx = ctx;
    pthread_mutex_unlock(&session->world->lock);
}

void epi_world_tell(struct epi_session *session, int rank, uint64_t word) {
    pthread_mutex_lock(&session->world->lock);
    for (int r = 0; r < session->world->num_ranks; r++) {
        const struct member *m = &session->member[r];
        if (r != rank && m->on_told && !m->left) {
            m->on_told(m->ctx, word);
        }
    }
    pthread_mutex_unlock(&session->world->lock);
}

void epi_world_leave(struct epi_session *session, int rank) {
    pthread_mutex_t *lock = &session->world->lock;
    pthread_mutex_lock(lock);
    session_exit(session, rank, NULL);
    pthread_mutex_unlock(lock);
}

/* A thread whose rank is none of the world's is one that will not come as the rank it should be. */
static void lose_session(ep_world *world, const char *why) {
    uint64_t number = world->num_joins[0];
    for (int r = 1; r < world->num_ranks; r++) {
        number = world->num_joins[r] < number ? world->num_joins[r] : number;
    }
    struct epi_session *session = session_find(world, number + 1);
    if (!session) {
        session = session_make(world, number + 1);
    }
    if (session) {
        session->is_lost = true;
        epi_format(session->left_why, sizeof(session->left_why), "a rank failed: %s", why);
        pthread_cond_broadcast(&session->cond);
    }
}

void epi_world_fail(ep_world *world, int rank, const char *why) {
    struct epi_session *session = NULL;
    pthread_mutex_lock(&world->lock);
    if (rank < 0 || rank >= world->num_ranks) {
        lose_session(world, why);
    } else if (session_enter(world, rank, &session) == EP_OK) {
        session_exit(session, rank, why);
    }
    pthread_mutex_unlock(&world->lock);
}

/* ---- collectives ------------------------------------------------------------------------- */

/* A rank that has left and is not in the round will never be; -1: none. */
static int who_left(const struct epi_session *session, const struct epi_round *round) {
    for (int r = 0; r < session->world->num_ranks; r++) {
        if (session->member[r].left && !round->have[r]) {
            return r;
        }
    }
    return -1;
}

static ep_status round_status(const struct epi_session *session, const struct epi_round *round,
                              const char *what, int64_t waited_ns) {
    int num_ranks = session->world->num_ranks;
    char missing[LIST_BYTES];
    if (round->num_in == num_ranks) {
        return round->is_mismatch ? epi_fail(EP_ERR_MISMATCH, "%s", round->text) : EP_OK;
    }
    int left = who_left(session, round);
    if ((left >= 0 || session->is_lost) && session->left_why[0] != '\0') {
        return epi_fail(EP_ERR_PEER, "%s: %s", what, session->left_why);
    }
    if (left >= 0) {
        return epi_fail(EP_ERR_PEER, "%s: rank %d has left the group", what, left);
    }
    epi_rank_list(round->have, false, num_ranks, missing, sizeof(missing));
    return epi_fail(EP_ERR_TIMEOUT, "%s: %d of %d ranks arrived within %.1f s; missing: %s",
                    what, round->num_in, num_ranks, (double)waited_ns / 1e9, missing);
}

static ep_status join_round(struct epi_session *session, int rank, const void *in, size_t bytes,
                            void *out, struct epi_deadline deadline, const char *what) {
    ep_world *world = session->world;
    int64_t start_ns = epi_now_ns();
    pthread_mutex_lock(&world->lock);
    uint64_t seq = ++session->member[rank].num_calls;
    struct epi_round *round = epi_rounds_put(&session->rounds, seq, rank, in, bytes);
    if (!round) { /* this rank does not come: nobody is to wait for it */
        session->is_lost = true;
        tell_why(session, rank, "no memory");
        pthread_mutex_unlock(&world->lock);
        return epi_fail(EP_ERR_NOMEM, "%s: no memory for %zu bytes per rank", what, bytes);
    }
    if (round->num_in == world->num_ranks) {
        pthread_cond_broadcast(&session->cond);
    }
    while (round->num_in < world->num_ranks && who_left(session, round) < 0 &&
           !session->is_lost) {
        if (!epi_cond_wait(&session->cond, &world->lock, deadline)) {
            break;
        }
    }
    ep_status st = round_status(session, round, what, epi_now_ns() - start_ns);
    if (st == EP_OK && bytes > 0) {
        memcpy(out, round->data, bytes * (size_t)world->num_ranks);
    }
    if (++round->num_out == world->num_ranks) {
        epi_rounds_remove(&session->rounds, round);
    }
    pthread_mutex_unlock(&world->lock);
    return st;
}

ep_status epi_world_join(ep_world *world, int rank, int64_t timeout_ns,
                         struct epi_session **out) {
    struct epi_session *session = NULL;
    pthread_mutex_lock(&world->lock);
    ep_status st = session_enter(world, rank, &session);
    pthread_mutex_unlock(&world->lock);
    if (st != EP_OK) {
        /* This rank does not come; the others are told, if there is memory for that now. */
        if (st == EP_ERR_NOMEM) {
            epi_world_fail(world, rank, "rendezvous: no memory");
            epi_fail(st, "rendezvous: no memory");
        }
        return st;
    }
    struct epi_deadline deadline = epi_deadline_after(timeout_ns);
    st = join_round(session, rank, NULL, 0, NULL, deadline, "rendezvous");
    if (st != EP_OK) {
        epi_world_leave(session, rank);
        return st;
    }
    *out = session;
    return EP_OK;
}

ep_status epi_world_allgather(struct epi_session *session, int rank, const void *in,
                              size_t bytes, void *out, struct epi_deadline deadline) {
    return join_round(session, rank, in, bytes, out, deadline, "allgather");
}
