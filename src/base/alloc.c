/* SPDX-License-Identifier: MIT */
/*
 * Allocation with two counters: how many were asked for, and how many are still out.
 *
 * Owns the process's fault injector: EP_TEST_ALLOC_FAIL=n makes the n-th request fail, which is
 * how tests walk every error path; the live count is how they see that none leaks. Runs on any
 * thread. Memory is zeroed and starts on its own cache line.
 * Must not report errors: the caller knows what the memory was for. Must not take what is not there:
 * the kernel hands out addresses, and kills whoever touches more of them than there is memory.
 */
#include "src/base/base.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define ALIGN_BYTES ((size_t)64)

static _Atomic uint64_t num_asked;
static _Atomic int64_t num_live;
static _Atomic uint64_t fails_at;
static _Thread_local char why[256];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void read_knob(void) {
    atomic_store(&fails_at, (uint64_t)epi_opt_int(EPI_OPT_TEST_ALLOC_FAIL));
}

void epi_alloc_fail_at(uint64_t nth) {
    pthread_once(&once, read_knob);
    atomic_store(&fails_at, nth);
}

bool epi_alloc_should_fail(void) {
    pthread_once(&once, read_knob);
    return atomic_fetch_add(&num_asked, 1) + 1 == atomic_load(&fails_at);
}

uint64_t epi_alloc_count(void) {
    pthread_once(&once, read_knob);
    return atomic_load(&num_asked);
}

int64_t epi_alloc_live(void) {
    return atomic_load(&num_live);
}

#define MUCH_BYTES ((size_t)16 << 20) /* to ask first takes less than to zero it */

const char *epi_alloc_why(void) {
    return why;
}

/* Zeroes memory, which is when it is taken; false: there is no more. */
static bool zero_all(char *p, size_t bytes) {
    size_t look_at = 0;
    for (size_t at = 0; at < bytes;) {
        if (bytes >= MUCH_BYTES && at >= look_at) {
            struct epi_room room;
            if (!epi_room_has(EPI_ROOM_PRIVATE, bytes - at, &room)) {
                epi_format(why, sizeof(why), ": %lld are left by %s", (long long)room.bytes,
                           room.limit);
                return false;
            }
            look_at = at + epi_room_step(&room);
        }
        const size_t part = bytes - at < MUCH_BYTES ? bytes - at : MUCH_BYTES;
        memset(p + at, 0, part);
        at += part;
    }
    return true;
}

void *epi_alloc(size_t bytes) {
    why[0] = '\0';
    if (epi_alloc_should_fail() || bytes > PTRDIFF_MAX - ALIGN_BYTES) {
        return NULL;
    }
    size_t padded_bytes = (bytes + ALIGN_BYTES - 1) & ~(ALIGN_BYTES - 1);
    if (padded_bytes == 0) {
        padded_bytes = ALIGN_BYTES;
    }
    void *p = aligned_alloc(ALIGN_BYTES, padded_bytes);
    if (p && !zero_all(p, padded_bytes)) {
        free(p);
        p = NULL;
    }
    if (p) {
        atomic_fetch_add(&num_live, 1);
    }
    return p;
}

void *epi_alloc_array(size_t num, size_t item_bytes) {
    if (item_bytes != 0 && num > SIZE_MAX / item_bytes) {
        return NULL;
    }
    return epi_alloc(num * item_bytes);
}

void epi_free(void *p) {
    if (p) {
        atomic_fetch_sub(&num_live, 1);
        free(p);
    }
}
