/* SPDX-License-Identifier: MIT */
/*
 * The helper threads behind kernel/lang_late.h: each copies what one mover posts, in order and a
 * little late. In check builds only; elsewhere this file is empty. The only order it creates is
 * post -> copy and copy -> await: the queue's slots are atomics, so that reusing one orders
 * nothing. A store in two steps is post -> read -> write: who awaits the read knows nothing of
 * the write, as with a bulk copy that has read its source and is on its way.
 */
#include "src/base/base.h"

#if defined(K_LATE_MOVERS)

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernel/lang.h"

#define SLOTS 64

struct epi_late {
    pthread_t thread;
    _Atomic uint64_t posted, done;
    _Atomic bool stop;
    _Atomic(void *) dst[SLOTS];
    _Atomic(const void *) src[SLOTS];
    _Atomic size_t bytes[SLOTS];
    _Atomic(struct epi_late *) writer[SLOTS]; /* writes to dst what this thread has read */
    _Atomic bool owned[SLOTS];                /* src is a copy made for this, to be freed */
};

static uint64_t post(struct epi_late *l, void *dst, const void *src, size_t bytes,
                     struct epi_late *writer, bool owned) {
    uint64_t n = atomic_load_explicit(&l->posted, memory_order_relaxed);
    while (n - atomic_load_explicit(&l->done, memory_order_relaxed) >= SLOTS) {
        sched_yield();
    }
    size_t at = n % SLOTS;
    atomic_store_explicit(&l->dst[at], dst, memory_order_relaxed);
    atomic_store_explicit(&l->src[at], src, memory_order_relaxed);
    atomic_store_explicit(&l->bytes[at], bytes, memory_order_relaxed);
    atomic_store_explicit(&l->writer[at], writer, memory_order_relaxed);
    atomic_store_explicit(&l->owned[at], owned, memory_order_relaxed);
    atomic_store_explicit(&l->posted, n + 1, memory_order_release);
    return n + 1;
}

static void copy(struct epi_late *l, size_t at) {
    void *dst = atomic_load_explicit(&l->dst[at], memory_order_relaxed);
    const void *src = atomic_load_explicit(&l->src[at], memory_order_relaxed);
    const size_t bytes = atomic_load_explicit(&l->bytes[at], memory_order_relaxed);
    struct epi_late *writer = atomic_load_explicit(&l->writer[at], memory_order_relaxed);
    if (!writer) {
        memcpy(dst, src, bytes);
        if (atomic_load_explicit(&l->owned[at], memory_order_relaxed)) {
            free((void *)(uintptr_t)src);
        }
        return;
    }
    void *read = malloc(bytes);
    if (!read) {
        epi_log(EPI_LOG_ERROR, "check build: no memory for a late store");
        abort();
    }
    memcpy(read, src, bytes);
    post(writer, dst, read, bytes, NULL, true);
}

static void *late_main(void *arg) {
    struct epi_late *l = arg;
    uint32_t random = 1;
    for (uint64_t next = 0;;) {
        if (atomic_load_explicit(&l->posted, memory_order_acquire) == next) {
            if (atomic_load_explicit(&l->stop, memory_order_relaxed)) {
                return NULL;
            }
            sched_yield();
            continue;
        }
        random = random * 1664525u + 1013904223u;
        for (uint32_t i = random >> 30; i > 0; i--) {
            sched_yield();
        }
        copy(l, next % SLOTS);
        next++;
        atomic_store_explicit(&l->done, next, memory_order_release);
    }
}

struct epi_late *epi_late_start(void) {
    struct epi_late *l = calloc(1, sizeof(*l));
    if (!l || pthread_create(&l->thread, NULL, late_main, l) != 0) {
        epi_log(EPI_LOG_ERROR, "check build: no memory for a late mover");
        abort();
    }
    return l;
}

uint64_t epi_late_post(struct epi_late *l, void *dst, const void *src, size_t bytes) {
    return post(l, dst, src, bytes, NULL, false);
}

uint64_t epi_late_store(struct epi_late *reader, struct epi_late *writer, void *dst,
                        const void *src, size_t bytes) {
    return post(reader, dst, src, bytes, writer, false);
}

void epi_late_await(struct epi_late *l, uint64_t ticket) {
    while (atomic_load_explicit(&l->done, memory_order_acquire) < ticket) {
        sched_yield();
    }
}

void epi_late_stop(struct epi_late *l) {
    atomic_store_explicit(&l->stop, true, memory_order_relaxed);
    pthread_join(l->thread, NULL);
    free(l);
}

#else
typedef int epi_late_is_empty; /* ISO C wants a declaration */
#endif
