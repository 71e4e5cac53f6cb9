/* SPDX-License-Identifier: MIT */
/*
 * What is behind the row movers of check builds (tests/late/mover.h): three helpers for each thread
 * that runs warps; and the hesitations of warps before they tell something. Linked into the
 * ThreadSanitizer variant only.
 *
 * To ThreadSanitizer a helper is a thread, but it is a fiber: the warp's own thread makes its
 * copies, some time after they were asked for, and at the latest when the warp awaits them. So a
 * helper costs nothing while it has nothing to do, and what is reported does not depend on how
 * threads happen to run. Switching to a fiber and back orders nothing. The only order is from the
 * post of a copy to that copy, and from the copy to who awaits it: each has two words of its own
 * for that, so that awaiting one copy says nothing of the next. A store is read by one helper and
 * written by another: who awaits the read knows nothing of the write, as with a bulk copy that has
 * read its source and is on its way.
 *
 * Helpers serve one thread for as long as it lives and are made when it first moves a row. Threads
 * never share them: that would order warps that nothing else orders.
 */
#include <pthread.h>
#include <sanitizer/tsan_interface.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernel/lang.h"

#define SLOTS 128

/* One copy; `posted` and `done` exist for the order that they make. */
struct slot {
    void *dst;
    const void *src;
    size_t bytes;
    k_u64 posted, done;
};

/* A queue of copies. All but what `slot` says of order is known to the thread alone. */
struct helper {
    void *fiber;
    k_u64 posted, done;
    struct slot slot[SLOTS];
};

struct k_late {
    k_u32 random;
    struct helper helper[K_LATE_HELPERS];
};

static pthread_key_t key;

static void end_thread(void *arg) {
    struct k_late *l = arg;
    for (int i = 0; i < K_LATE_HELPERS; i++) {
        __tsan_destroy_fiber(l->helper[i].fiber);
    }
    free(l);
}

/* When the program is loaded: a pthread_once would order the threads that come later. */
__attribute__((constructor)) static void make_key(void) {
    if (pthread_key_create(&key, end_thread) != 0) {
        abort();
    }
}

struct k_late *k_late_begin(void) {
    static const char *const names[K_LATE_HELPERS] = {"late loader", "late reader",
                                                      "late writer"};
    struct k_late *l = pthread_getspecific(key);
    if (!l) {
        l = calloc(1, sizeof(*l));
        if (!l || pthread_setspecific(key, l) != 0) {
            abort();
        }
        l->random = 1;
        for (int i = 0; i < K_LATE_HELPERS; i++) {
            l->helper[i].fiber = __tsan_create_fiber(0);
            __tsan_set_fiber_name(l->helper[i].fiber, names[i]);
        }
    }
    return l;
}

/* ---- what helpers do ------------------------------------------------------------------------ */

/* Loads are copied and done with. */
__attribute__((noinline)) static void load(void *dst, const void *src, size_t bytes,
                                           const k_u64 *posted, k_u64 *done) {
    (void)__atomic_load_n(posted, __ATOMIC_ACQUIRE);
    memcpy(dst, src, bytes);
    __atomic_store_n(done, 1, __ATOMIC_RELEASE);
}

/* The first half of a store; the copy that it returns is posted to the writer. */
__attribute__((noinline)) static void *
read_row(const void *src, size_t bytes, const k_u64 *posted, k_u64 *done, k_u64 *posted_on) {
    (void)__atomic_load_n(posted, __ATOMIC_ACQUIRE);
    void *row = malloc(bytes);
    if (!row) {
        abort();
    }
    memcpy(row, src, bytes);
    __atomic_store_n(done, 1, __ATOMIC_RELEASE);
    __atomic_store_n(posted_on, 1, __ATOMIC_RELEASE);
    return row;
}

/* The second half. */
__attribute__((noinline)) static void write_row(void *dst, void *row, size_t bytes,
                                                const k_u64 *posted, k_u64 *done) {
    (void)__atomic_load_n(posted, __ATOMIC_ACQUIRE);
    memcpy(dst, row, bytes);
    free(row);
    __atomic_store_n(done, 1, __ATOMIC_RELEASE);
}

static struct slot *slot_of(struct helper *h, k_u64 ticket) {
    return &h->slot[ticket % SLOTS];
}

/* A helper makes its oldest copy. The thread becomes the helper for just that. */
static void step(struct k_late *l, enum k_late_helper who) {
    struct helper *h = &l->helper[who], *writer = &l->helper[K_LATE_WRITER];
    struct slot *s = slot_of(h, h->done + 1);
    void *const dst = s->dst, *row = NULL;
    const void *const src = s->src;
    const size_t bytes = s->bytes;
    struct slot *on = who == K_LATE_READER ? slot_of(writer, writer->posted + 1) : NULL;
    void *const self = __tsan_get_current_fiber();

    if (on && writer->posted - writer->done == SLOTS) {
        step(l, K_LATE_WRITER);
    }
    __tsan_switch_to_fiber(h->fiber, __tsan_switch_to_fiber_no_sync);
    if (who == K_LATE_LOADER) {
        load(dst, src, bytes, &s->posted, &s->done);
    } else if (who == K_LATE_READER) {
        row = read_row(src, bytes, &s->posted, &s->done, &on->posted);
    } else {
        write_row(dst, (void *)(uintptr_t)src, bytes, &s->posted, &s->done);
    }
    __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
    h->done++;
    if (on) {
        on->dst = dst;
        on->src = row;
        on->bytes = bytes;
        writer->posted++;
    }
}

/* A copy comes about by itself now and then, whichever helper's it is. */
static void pass_time(struct k_late *l) {
    l->random = l->random * 1664525u + 1013904223u;
    const enum k_late_helper who = (enum k_late_helper)(l->random >> 16 & 3);
    if (who < K_LATE_HELPERS && l->helper[who].done < l->helper[who].posted) {
        step(l, who);
    }
}

/* ---- what the mover asks for ---------------------------------------------------------------- */

k_u64 k_late_post(struct k_late *l, enum k_late_helper who, void *dst, const void *src,
                  size_t bytes) {
    struct helper *h = &l->helper[who];
    pass_time(l);
    if (h->posted - h->done == SLOTS) {
        step(l, who);
    }
    struct slot *s = slot_of(h, h->posted + 1);
    s->dst = dst;
    s->src = src;
    s->bytes = bytes;
    __atomic_store_n(&s->posted, 1, __ATOMIC_RELEASE);
    return ++h->posted;
}

void k_late_await(struct k_late *l, enum k_late_helper who, k_u64 ticket) {
    struct helper *h = &l->helper[who];
    pass_time(l);
    while (h->done < ticket) {
        step(l, who == K_LATE_WRITER && h->done == h->posted ? K_LATE_READER : who);
    }
    if (ticket) {
        (void)__atomic_load_n(&slot_of(h, ticket)->done, __ATOMIC_ACQUIRE);
    }
}

void k_late_end(struct k_late *l) {
    k_late_await(l, K_LATE_LOADER, l->helper[K_LATE_LOADER].posted);
    k_late_await(l, K_LATE_READER, l->helper[K_LATE_READER].posted);
    k_late_await(l, K_LATE_WRITER, l->helper[K_LATE_READER].posted);
}

/* ---- hesitation ----------------------------------------------------------------------------- */

static k_u32 first_random;

/* Before there is a second thread: the library reads no environment while it works, and a test counts. */
static __attribute__((constructor)) void read_seed(void) {
    const char *seed = getenv("EP_SEED");
    first_random = seed ? (k_u32)strtoull(seed, NULL, 10) : 0;
}

/* One in 128 sleeps for up to a quarter of a millisecond, one in 8 lets others run; by EP_SEED and
 * how many threads have hesitated before this one. Orders nothing. */
void k_late_hesitate(void) {
    static k_u32 num_threads;
    static _Thread_local k_u32 random;
    if (random == 0) {
        const k_u32 thread = __atomic_add_fetch(&num_threads, 1, __ATOMIC_RELAXED);
        random = first_random + thread * 2654435761u;
    }
    random = random * 1664525u + 1013904223u;
    if (random >> 25 == 0) {
        const struct timespec nap = {0, (long)(random >> 7 & 0x3ffff)};
        nanosleep(&nap, NULL);
    } else if (random >> 29 == 0) {
        sched_yield();
    }
}
