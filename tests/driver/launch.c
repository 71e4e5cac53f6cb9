/* SPDX-License-Identifier: MIT */
/*
 * The driver's kernels: a launch runs the host body of a kernel on a thread for each warp, and the
 * stream's thread waits for all of them. Launches of several ranks run at once and wait for each
 * other, so every launch that runs has all its threads.
 *
 * The threads are a stream's for as long as it lives, and kept for the next when it has gone. What
 * ran on such a thread before is then what the stream's earlier launches did, which come before
 * this one anyhow: ThreadSanitizer takes nothing for ordered that a device does not order. For the
 * same reason each thread is woken by a word of its own, and warps that end only count down.
 */
#include "tests/driver/driver.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DECLARE(NAME, name, file, args, set, symbol)                                           \
    void k_entry_##args(struct k_thread *k, const void *a);
K_KERNELS(DECLARE)
static const struct kernel {
    const char *name;
    k_entry_fn entry;
    size_t arg_bytes;
} kernels[] = {
#define ROW(NAME, name, file, args, set, symbol) {symbol, k_entry_##args, sizeof(struct args)},
    K_KERNELS(ROW)};

DEFINE(cuModuleLoadData, void **module, const void *image) {
    driver_stop_all(); /* as measured */
    *module = (void *)(uintptr_t)image;
    return 0;
}
DEFINE(cuModuleUnload, void *module) {
    driver_stop_all();
    (void)module;
    return 0;
}
DEFINE(cuModuleGetFunction, void **function, void *module, const char *name) {
    (void)module;
    for (size_t i = 0; i < sizeof(kernels) / sizeof(kernels[0]); i++) {
        if (strcmp(name, kernels[i].name) == 0) {
            *function = (void *)(uintptr_t)&kernels[i];
            return 0;
        }
    }
    return CU_INVALID_VALUE;
}
DEFINE(cuFuncGetAttribute, int *value, int attribute, void *function) {
    (void)function;
    *value = attribute == 0 ? 1024 : 0;
    return 0;
}
DEFINE(cuFuncSetAttribute, void *function, int attribute, int value) {
    (void)function, (void)attribute, (void)value;
    return 0;
}
DEFINE(cuFuncLoad, void *function) {
    (void)function;
    return 0;
}

/* ---- threads -------------------------------------------------------------------------------- */

/* A block of a real launch starts when a multiprocessor is free. Here every seventh launch has one
 * that starts so late that the others have ended, if they do not wait for it. */
#define LATE_EVERY 7
#define LATE_US 20000

struct launch {
    const struct op *op;
    atomic_int left; /* warps that have not ended */
    sem_t ended;
};

struct hand {
    sem_t wake;
    struct launch *launch; /* what follows is set before a wake, and read after it */
    struct k_thread k;
    bool late;
    struct hand *next;
};

static pthread_mutex_t idle_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct hand *idle;

static void await(sem_t *s) {
    while (sem_wait(s) != 0) { /* a signal came */
    }
}

static void *hand_main(void *arg) {
    struct hand *h = arg;
    for (;;) {
        await(&h->wake);
        struct launch *l = h->launch;
        if (h->late) {
            usleep(LATE_US);
        }
        l->op->entry(&h->k, l->op->args);
        if (atomic_fetch_sub_explicit(&l->left, 1, memory_order_release) == 1) {
            sem_post(&l->ended);
        }
    }
    return NULL;
}

static struct hand *hire(void) {
    pthread_mutex_lock(&idle_mutex);
    struct hand *h = idle;
    idle = h ? h->next : NULL;
    pthread_mutex_unlock(&idle_mutex);
    if (!h) {
        pthread_t thread;
        h = calloc(1, sizeof(*h));
        if (!h || sem_init(&h->wake, 0, 0) != 0 ||
            pthread_create(&thread, NULL, hand_main, h) != 0) {
            abort();
        }
        pthread_setname_np(thread, "driver-warp");
        pthread_detach(thread);
    }
    return h;
}

static void enlarge(struct crew *crew, int num) {
    if (crew->num < num) {
        crew->hand = realloc(crew->hand, (size_t)num * sizeof(*crew->hand));
        if (!crew->hand) {
            abort();
        }
    }
    while (crew->num < num) {
        crew->hand[crew->num++] = hire();
    }
}

void driver_dismiss(struct crew *crew) {
    pthread_mutex_lock(&idle_mutex);
    for (int i = 0; i < crew->num; i++) {
        crew->hand[i]->next = idle;
        idle = crew->hand[i];
    }
    pthread_mutex_unlock(&idle_mutex);
    free(crew->hand);
}

/* ---- launches ------------------------------------------------------------------------------- */

static void run_warps(struct launch *l, struct k_team *teams, int late) {
    const int warps = l->op->warps, num = l->op->blocks * warps;
    struct crew *crew = l->op->crew;
    enlarge(crew, num);
    atomic_store_explicit(&l->left, num, memory_order_relaxed);
    sem_init(&l->ended, 0, 0);
    for (int i = 0; i < num; i++) {
        struct hand *h = crew->hand[i];
        h->launch = l;
        h->late = i / warps == late;
        h->k = (struct k_thread){.block = i / warps,
                                 .num_blocks = l->op->blocks,
                                 .warp = i % warps,
                                 .num_warps = warps,
                                 .team = &teams[i / warps]};
        sem_post(&h->wake);
    }
    await(&l->ended);
    while (atomic_load_explicit(&l->left, memory_order_acquire) != 0) {
    }
    sem_destroy(&l->ended);
}

static void run_launch(struct op *op) {
    static atomic_uint launches;
    const unsigned launch = atomic_fetch_add_explicit(&launches, 1, memory_order_relaxed);
    const int blocks = op->blocks;
    struct k_team *teams = calloc((size_t)blocks, sizeof(*teams));
    unsigned char *shared = NULL;
    const size_t each = ((size_t)op->shared_bytes + 255) / 256 * 256;
    if (!teams || posix_memalign((void **)&shared, 256, each * (size_t)blocks) != 0) {
        abort();
    }
    memset(shared, 0xcd, each * (size_t)blocks);
    for (int i = 0; i < blocks; i++) {
        teams[i].shared = shared + (size_t)i * each;
    }
    struct launch l = {.op = op};
    run_warps(&l, teams, launch % LATE_EVERY ? -1 : (int)(launch / LATE_EVERY) % blocks);
    free(shared);
    free(teams);
}

/* For tests: the process's launch number `n` from now on fails, and a captured one counts. */
static atomic_int until_failure;
DEFINE(driver_fail_launch, int n) {
    atomic_store(&until_failure, n);
    return 0;
}

DEFINE(cuLaunchKernel, void *function, unsigned blocks, unsigned by, unsigned bz,
       unsigned threads, unsigned ty, unsigned tz, unsigned shared_bytes, void *stream,
       void **params, void **extra) {
    const struct kernel *kernel = function;
    (void)extra;
    if (atomic_load_explicit(&until_failure, memory_order_relaxed) > 0 &&
        atomic_fetch_sub(&until_failure, 1) == 1) {
        return CU_OUT_OF_MEMORY;
    }
    struct op *op = driver_op(run_launch);
    if (by * bz * ty * tz != 1 || threads % 32 != 0) {
        abort();
    }
    op->blocks = (int)blocks;
    op->warps = (int)threads / 32;
    op->shared_bytes = (int)shared_bytes;
    op->entry = kernel->entry;
    memcpy(op->args, params[0], kernel->arg_bytes);
    return driver_queue(stream, op);
}
