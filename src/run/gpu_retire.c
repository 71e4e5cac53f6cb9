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

struct retired {
    struct epi_cu_device device; /* open for good, as all that have had kernels */
    void *host;
    size_t bytes;
    struct retired *next;
};

/* Who launches holds it to read, and who looks whether anybody has to write: never waiting. */
static pthread_rwlock_t gate = PTHREAD_RWLOCK_INITIALIZER;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards the lists */
static struct epi_gpu_activity *active;
static struct retired *all;

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

void epi_gpu_retired_add(const struct epi_cu_device *d, void *host, size_t bytes) {
    struct retired *r = epi_alloc(sizeof(*r));
    if (!r) {
        epi_log(EPI_LOG_WARN, "no memory to note %zu bytes of shared memory, which stay mapped",
                bytes);
        return;
    }
    *r = (struct retired){*d, host, bytes, NULL};
    pthread_mutex_lock(&mutex);
    r->next = all;
    all = r;
    pthread_mutex_unlock(&mutex);
}

/* Both locks are held. */
static bool any_busy(void) {
    for (const struct epi_gpu_activity *a = active; a; a = a->next) {
        if (atomic_load(&a->captured) ||
            (atomic_load(&a->launched) && epi_cu_event_query(a->device, a->last) == EP_AGAIN)) {
            return true;
        }
    }
    return false;
}

void epi_gpu_retired_free(void) {
    if (pthread_rwlock_trywrlock(&gate) != 0) {
        return; /* somebody is launching */
    }
    pthread_mutex_lock(&mutex);
    while (all && !any_busy()) {
        struct retired *r = all;
        all = r->next;
        epi_cu_unregister(&r->device, r->host);
        munmap(r->host, r->bytes);
        epi_free(r);
    }
    pthread_mutex_unlock(&mutex);
    pthread_rwlock_unlock(&gate);
}
