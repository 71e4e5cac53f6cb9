/* SPDX-License-Identifier: MIT */
/*
 * Host memory that is registered with a device and no longer used. To unregister it waits for every
 * stream of the device, and holds up everybody's launches meanwhile: a kernel of another rank of
 * this process may then wait for an operation that this thread has yet to call. So it stays until
 * no rank of the process has anything under way, which is looked at whenever a group has ended or
 * begins. What replays of graphs do is not seen; a rank of which something was captured counts as
 * busy. Any thread.
 */
#include "src/run/gpu_retire.h"

#include <sys/mman.h>

struct registered {
    struct epi_cu_device device; /* open for good, as all that have had kernels */
    void *host;
    size_t bytes;
    bool retired;
    struct registered *next;
};

/* Who launches holds it to read, and who looks whether anybody has to write: never waiting. */
static pthread_rwlock_t gate = PTHREAD_RWLOCK_INITIALIZER;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards the lists */
static struct epi_gpu_activity *active;
static struct registered *registered;

void epi_gpu_activity_begin(struct epi_gpu_activity *a) {
    pthread_mutex_lock(&mutex);
    a->next = active;
    active = a;
    pthread_mutex_unlock(&mutex);
}

void epi_gpu_activity_end(struct epi_gpu_activity *a) {
    pthread_mutex_lock(&mutex);
    struct epi_gpu_activity **at = &active;
    while (*at && *at != a) {
        at = &(*at)->next;
    }
    if (*at) {
        *at = a->next;
    }
    pthread_mutex_unlock(&mutex);
}

void epi_gpu_launch_begin(void) {
    pthread_rwlock_rdlock(&gate);
}

void epi_gpu_launch_end(void) {
    pthread_rwlock_unlock(&gate);
}

ep_status epi_gpu_register(const struct epi_cu_device *d, void *host, size_t bytes,
                           uint64_t *address) {
    struct registered *r = epi_alloc(sizeof(*r));
    if (!r) {
        return epi_fail(EP_ERR_NOMEM, "no memory to note %zu bytes of shared memory", bytes);
    }
    const ep_status st = epi_cu_register(d, host, bytes, address);
    if (st != EP_OK) {
        epi_free(r);
        return st;
    }
    *r = (struct registered){*d, host, bytes, false, NULL};
    pthread_mutex_lock(&mutex);
    r->next = registered;
    registered = r;
    pthread_mutex_unlock(&mutex);
    return EP_OK;
}

void epi_gpu_unregister(void *host) {
    pthread_mutex_lock(&mutex);
    for (struct registered *r = registered; r; r = r->next) {
        r->retired = r->retired || r->host == host;
    }
    pthread_mutex_unlock(&mutex);
}

bool epi_gpu_activity_goes_on(const struct epi_gpu_activity *a) {
    return atomic_load(&a->captured) ||
           (atomic_load(&a->launched) && epi_cu_event_query(a->device, a->last) == EP_AGAIN);
}

/* Both locks are held. */
static bool any_gpu_busy(void) {
    const struct epi_gpu_activity *a = active;
    while (a && atomic_load(&a->apart) == 0 && !epi_gpu_activity_goes_on(a)) {
        a = a->next;
    }
    return a != NULL;
}

/* Takes one that is retired out of the list; NULL: there is none. The mutex is held. */
static struct registered *take_one_retired(void) {
    struct registered **at = &registered;
    while (*at && !(*at)->retired) {
        at = &(*at)->next;
    }
    struct registered *r = *at;
    if (r) {
        *at = r->next;
    }
    return r;
}

void epi_gpu_free_retired(void) {
    struct registered *r;
    if (pthread_rwlock_trywrlock(&gate) != 0) {
        return; /* somebody is launching */
    }
    pthread_mutex_lock(&mutex);
    while (!any_gpu_busy() && (r = take_one_retired()) != NULL) {
        epi_cu_unregister(&r->device, r->host);
        munmap(r->host, r->bytes);
        epi_free(r);
    }
    pthread_mutex_unlock(&mutex);
    pthread_rwlock_unlock(&gate);
}
