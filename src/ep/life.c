/* SPDX-License-Identifier: MIT */
/*
 * Ranks that are threads, and end. A process that dies is noticed by its sockets; of a rank that is
 * a thread the group counts the threads that have made calls for it, and when the last of them has
 * ended its board says since when, on a device once it has no work there. Who waits for that rank looks
 * there (k_is_orphan): it is gone, unless another thread comes to take it over. Runs on threads that make
 * calls, and where they end. Must not touch a group that is destroyed: `closed` says so, under the lock.
 */
#include "src/ep/group.h"

struct epi_life {
    pthread_mutex_t lock;
    int refs;         /* the group's and one per member */
    int members;      /* threads that have made a call and not ended */
    bool closed;      /* the group is gone */
    bool unsure;      /* a thread could not be counted */
    uint32_t process; /* that made the group, which a child of it may have freed */
    ep_group *group;
};

/* A thread's part in a group. */
struct member {
    struct member *next;
    struct epi_life *life;
};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key; /* of a thread's list of members */
static bool has_key;
static _Thread_local const struct epi_life *newest; /* that this thread is a member of */

static void release(struct epi_life *l) {
    pthread_mutex_lock(&l->lock);
    const bool last = --l->refs == 0;
    pthread_mutex_unlock(&l->lock);
    if (last) {
        pthread_mutex_destroy(&l->lock);
        epi_free(l);
    }
}

/* The lock is held. What a stream has yet to run comes without the thread that queued it. */
static void note_end(struct epi_life *l) {
    l->members--;
    if (l->members == 0 && !l->closed && !l->unsure && !epi_is_forked(l->process)) {
        epi_group_set_orphan(l->group, true);
    }
}

/* A thread ends. */
static void leave_all(void *list) {
    for (struct member *m = list, *next; m; m = next) {
        next = m->next;
        pthread_mutex_lock(&m->life->lock);
        note_end(m->life);
        pthread_mutex_unlock(&m->life->lock);
        release(m->life);
        epi_free(m);
    }
}

static void make_thread_key(void) {
    has_key = pthread_key_create(&key, leave_all) == 0;
}

static bool is_closed(struct epi_life *l) {
    pthread_mutex_lock(&l->lock);
    const bool closed = l->closed;
    pthread_mutex_unlock(&l->lock);
    return closed;
}

/* The thread's list without the groups that are gone; *is_in: `l` is among the others. */
static struct member *prune(struct member *list, const struct epi_life *l, bool *is_in) {
    struct member *first = NULL;
    for (struct member *m = list, *next; m; m = next) {
        next = m->next;
        if (is_closed(m->life)) {
            release(m->life);
            epi_free(m);
        } else {
            *is_in = *is_in || m->life == l;
            m->next = first;
            first = m;
        }
    }
    return first;
}

ep_status epi_life_create(struct epi_life **out, ep_group *g) {
    struct epi_life *l = epi_alloc(sizeof(*l));
    if (!l) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a group");
    }
    pthread_mutex_init(&l->lock, NULL);
    l->refs = 1;
    l->process = g->process;
    l->group = g;
    *out = l;
    return EP_OK;
}

void epi_life_close(struct epi_life **life) {
    struct epi_life *l = *life;
    *life = NULL;
    if (l) {
        pthread_mutex_lock(&l->lock);
        l->closed = true;
        pthread_mutex_unlock(&l->lock);
        release(l);
    }
}

void epi_life_join(struct epi_life *l) {
    bool is_in = false;
    if (!l || newest == l) {
        return;
    }
    pthread_once(&once, make_thread_key);
    struct member *list = has_key ? prune(pthread_getspecific(key), l, &is_in) : NULL;
    struct member *m = has_key && !is_in ? epi_alloc(sizeof(*m)) : NULL;
    pthread_mutex_lock(&l->lock);
    if (m) {
        l->refs++;
        l->members++;
        epi_group_set_orphan(l->group, false);
    }
    l->unsure = l->unsure || (!m && !is_in);
    pthread_mutex_unlock(&l->lock);
    if (m) {
        m->life = l;
        m->next = list;
        list = m;
    }
    if (has_key) {
        pthread_setspecific(key, list);
        newest = m || is_in ? l : NULL;
    }
}
