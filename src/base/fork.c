/* SPDX-License-Identifier: MIT */
/*
 * What fork() must not give to the child, and how the child knows what is its parent's.
 *
 * Owns the set of this library's descriptors and the number of the process. A child (a data loader,
 * say) would inherit the descriptors and keep connections and shared memory alive after its parent
 * has ended; so it closes them. Shared memory is mapped so that a child does not have it. What an
 * object's owner is told by is a word in a page that the kernel wipes in a child; it is read on the
 * way of every operation and costs a load. Runs on any thread.
 * Must not hand out descriptors 0 to 2: whoever writes to stderr would write into them where the
 * program has closed its own.
 */
#include "src/base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#define LOWEST_FD 3
#define MAX_TRACKED_FDS 65536 /* one above that is served, but not closed in children */

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* no fork() while it is held */
static uint8_t tracked[MAX_TRACKED_FDS / 8];

static _Atomic uint32_t last_process;
static _Atomic uint32_t unwiped; /* in place of the page where there is none */
static _Atomic uint32_t *process = &unwiped;

static void before_fork(void) {
    pthread_mutex_lock(&lock);
}

static void after_fork_parent(void) {
    pthread_mutex_unlock(&lock);
}

static void after_fork_child(void) {
    for (int i = 0; i < (int)sizeof(tracked); i++) {
        for (int bit = 0; tracked[i] != 0 && bit < 8; bit++) {
            if (tracked[i] & 1u << bit) {
                close(i * 8 + bit);
            }
        }
        tracked[i] = 0;
    }
    atomic_store(process, 0); /* for kernels that do not wipe */
    pthread_mutex_unlock(&lock);
}

static void begin(void) {
    const size_t bytes = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page != MAP_FAILED) {
        madvise(page, bytes, MADV_WIPEONFORK); /* children of clone(), too */
        process = page;
    }
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

uint32_t epi_process(void) {
    pthread_once(&once, begin);
    uint32_t mine = atomic_load(process);
    if (mine == 0) {
        const uint32_t next = atomic_fetch_add(&last_process, 1) + 1;
        if (atomic_compare_exchange_strong(process, &mine, next)) {
            mine = next;
        }
    }
    return mine;
}

bool epi_is_forked(uint32_t made_by) {
    return atomic_load_explicit(process, memory_order_relaxed) != made_by;
}

/* ---- descriptors ---------------------------------------------------------------------------- */

void epi_fd_begin(void) {
    pthread_once(&once, begin);
    pthread_mutex_lock(&lock);
}

int epi_fd_keep(int fd) {
    int kept = fd >= 0 ? fd : -errno;
    if (fd >= 0 && fd < LOWEST_FD) {
        kept = fcntl(fd, F_DUPFD_CLOEXEC, LOWEST_FD);
        kept = kept >= 0 ? kept : -errno;
        close(fd);
    }
    if (kept >= 0 && kept < MAX_TRACKED_FDS) {
        tracked[kept / 8] |= (uint8_t)(1u << kept % 8);
    }
    pthread_mutex_unlock(&lock);
    return kept;
}

void epi_fd_close(int *fd) {
    if (*fd < 0) {
        return;
    }
    pthread_mutex_lock(&lock);
    const bool ours = *fd >= MAX_TRACKED_FDS || (tracked[*fd / 8] & 1u << *fd % 8) != 0;
    if (ours) { /* else it was closed when this process was forked */
        if (*fd < MAX_TRACKED_FDS) {
            tracked[*fd / 8] &= (uint8_t) ~(1u << *fd % 8);
        }
        close(*fd);
    }
    pthread_mutex_unlock(&lock);
    *fd = -1;
}

/* ---- shared memory -------------------------------------------------------------------------- */

void *epi_map_shared(int fd, size_t bytes) {
    pthread_once(&once, begin);
    pthread_mutex_lock(&lock);
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    const int err = errno;
    if (p != MAP_FAILED) {
        madvise(p, bytes, MADV_DONTFORK);
    }
    pthread_mutex_unlock(&lock);
    errno = err;
    return p != MAP_FAILED ? p : NULL;
}
