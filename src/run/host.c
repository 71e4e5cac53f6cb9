/* SPDX-License-Identifier: MIT */
/*
 * Kernels as host threads. Owns the pool of a rank: its threads, the teams of its blocks and
 * their shared memory, all made at create. A launch wakes as many threads as it needs; with one
 * worker it is a plain call, and so is a local kernel while the pool is in another, which may be
 * waiting for a peer. Must not look into a kernel's arguments.
 */
#include "src/run/run.h"

#include <string.h>

#include "kernel/lang.h"

#define DECLARE(NAME, name, file, args, set, symbol)                                           \
    void k_entry_##args(struct k_thread *k, const void *a);
K_KERNELS(DECLARE)
#undef DECLARE

#define ENTRY(NAME, name, file, args, set, symbol) k_entry_##args,
static const k_entry_fn entries[EPI_KERNEL_COUNT] = {K_KERNELS(ENTRY)};
#undef ENTRY

struct worker {
    struct epi_run *run;
    int index; /* 1.. ; 0 is whoever launches */
    pthread_t thread;
};

/* What one kernel at a time has: how its threads are arranged, and their memory. */
struct launch {
    pthread_mutex_t busy; /* held while a kernel runs */
    struct epi_grid grid;
    k_entry_fn entry;
    const void *args;
    struct k_team *team; /* one per block */
    uint8_t *shared;     /* [workers][warp_bytes] */
};

struct epi_run {
    uint32_t process; /* that made it, and has its threads */
    int workers, started;
    size_t warp_bytes;
    const struct k_hooks *hooks;
    struct worker *worker; /* [workers], [0] unused */
    struct launch all;     /* a kernel that any of them run */
    struct launch aside;   /* one that its caller runs alone while they are busy */
    pthread_mutex_t mutex; /* guards what follows */
    pthread_cond_t wake, done;
    uint64_t generation;
    int active, left;
    bool stop;
};

struct epi_grid epi_run_grid(int workers) {
    struct epi_grid g = {1, workers, 1};
    if (workers >= 4) {
        g.blocks = workers / 2 < 8 ? workers / 2 : 8;
        g.warps = workers / g.blocks;
        g.send_blocks = (g.blocks + 1) / 2;
    }
    return g;
}

static void run_warp(const struct epi_run *run, const struct launch *l, int index) {
    const struct epi_grid *g = &l->grid;
    const int block = index / g->warps;
    struct k_thread k = {.block = block,
                         .num_blocks = g->blocks,
                         .warp = index % g->warps,
                         .num_warps = g->warps,
                         .team = &l->team[block],
                         .hooks = run->hooks};
    l->entry(&k, l->args);
}

static void *worker_main(void *arg) {
    struct worker *w = arg;
    struct epi_run *run = w->run;
    uint64_t seen = 0;
    pthread_mutex_lock(&run->mutex);
    for (;;) {
        while (!run->stop && (run->generation == seen || w->index >= run->active)) {
            seen = run->generation;
            pthread_cond_wait(&run->wake, &run->mutex);
        }
        if (run->stop) {
            break;
        }
        seen = run->generation;
        pthread_mutex_unlock(&run->mutex);
        run_warp(run, &run->all, w->index);
        pthread_mutex_lock(&run->mutex);
        if (--run->left == 0) {
            pthread_cond_signal(&run->done);
        }
    }
    pthread_mutex_unlock(&run->mutex);
    return NULL;
}

/* `busy` is held. */
static void prepare(const struct epi_run *run, struct launch *l, enum epi_kernel kernel,
                    const void *args, int workers) {
    l->grid = epi_run_grid(workers);
    l->entry = entries[kernel];
    l->args = args;
    for (int b = 0; b < l->grid.blocks; b++) {
        memset(&l->team[b], 0, sizeof(l->team[b]));
        l->team[b].shared = l->shared + (size_t)b * (size_t)l->grid.warps * run->warp_bytes;
    }
}

static void run_all(struct epi_run *run, enum epi_kernel kernel, const void *args,
                    int workers) {
    const bool fits = workers >= 1 && workers <= run->workers;
    prepare(run, &run->all, kernel, args, fits ? workers : run->workers);
    int threads = run->all.grid.blocks * run->all.grid.warps;
    if (threads > 1) {
        pthread_mutex_lock(&run->mutex);
        run->generation++;
        run->active = threads;
        run->left = threads - 1;
        pthread_cond_broadcast(&run->wake);
        pthread_mutex_unlock(&run->mutex);
    }
    run_warp(run, &run->all, 0);
    if (threads > 1) {
        pthread_mutex_lock(&run->mutex);
        while (run->left > 0) {
            pthread_cond_wait(&run->done, &run->mutex);
        }
        pthread_mutex_unlock(&run->mutex);
    }
    pthread_mutex_unlock(&run->all.busy);
}

void epi_run_kernel(struct epi_run *run, enum epi_kernel kernel, const void *args,
                    int workers) {
    pthread_mutex_lock(&run->all.busy);
    run_all(run, kernel, args, workers);
}

void epi_run_local(struct epi_run *run, enum epi_kernel kernel, const void *args, int workers) {
    if (pthread_mutex_trylock(&run->all.busy) == 0) {
        run_all(run, kernel, args, workers);
        return;
    }
    pthread_mutex_lock(&run->aside.busy);
    prepare(run, &run->aside, kernel, args, 1);
    run_warp(run, &run->aside, 0);
    pthread_mutex_unlock(&run->aside.busy);
}

static bool launch_init(struct launch *l, int workers, size_t warp_bytes) {
    pthread_mutex_init(&l->busy, NULL);
    l->team = epi_alloc_array((size_t)workers, sizeof(*l->team));
    l->shared = epi_alloc_array((size_t)workers, warp_bytes);
    return l->team && l->shared;
}

static void launch_free(struct launch *l) {
    epi_free(l->team);
    epi_free(l->shared);
}

ep_status epi_run_create(struct epi_run **out, int workers, size_t warp_bytes,
                         const struct k_hooks *hooks) {
    if (hooks->size != sizeof(*hooks)) {
        return epi_fail(EP_ERR_INTERNAL, "hooks of %llu bytes, kernels expect %zu",
                        (unsigned long long)hooks->size, sizeof(*hooks));
    }
    struct epi_run *run = epi_alloc(sizeof(*run));
    if (!run) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a pool of %d workers", workers);
    }
    pthread_mutex_init(&run->mutex, NULL);
    pthread_cond_init(&run->wake, NULL);
    pthread_cond_init(&run->done, NULL);
    run->process = epi_process();
    run->workers = workers;
    run->warp_bytes = warp_bytes;
    run->hooks = hooks;
    run->worker = epi_alloc_array((size_t)workers, sizeof(*run->worker));
    const bool all = launch_init(&run->all, workers, warp_bytes);
    const bool aside = launch_init(&run->aside, 1, warp_bytes);
    ep_status st = EP_OK;
    if (!run->worker || !all || !aside) {
        st = epi_fail(EP_ERR_NOMEM, "no memory for a pool of %d workers%s", workers,
                      epi_alloc_why());
    }
    for (int i = 1; st == EP_OK && i < workers; i++) {
        run->worker[i].run = run;
        run->worker[i].index = i;
        int err =
            epi_thread_start(&run->worker[i].thread, worker_main, &run->worker[i], "ep-worker");
        if (err) {
            st = epi_fail(EP_ERR_NOMEM, "cannot start worker thread %d of %d: %s", i, workers,
                          strerror(err));
            break;
        }
        run->started = i;
    }
    if (st != EP_OK) {
        epi_run_destroy(&run);
        return st;
    }
    *out = run;
    return EP_OK;
}

static void stop_threads(struct epi_run *run) {
    pthread_mutex_lock(&run->mutex);
    run->stop = true;
    pthread_cond_broadcast(&run->wake);
    pthread_mutex_unlock(&run->mutex);
    for (int i = 1; i <= run->started; i++) {
        pthread_join(run->worker[i].thread, NULL);
    }
    pthread_cond_destroy(&run->wake);
    pthread_cond_destroy(&run->done);
    pthread_mutex_destroy(&run->mutex);
    pthread_mutex_destroy(&run->all.busy);
    pthread_mutex_destroy(&run->aside.busy);
}

void epi_run_destroy(struct epi_run **run_p) {
    struct epi_run *run = *run_p;
    *run_p = NULL;
    if (!run) {
        return;
    }
    if (!epi_is_forked(run->process)) {
        stop_threads(run);
    }
    launch_free(&run->all);
    launch_free(&run->aside);
    epi_free(run->worker);
    epi_free(run);
}
