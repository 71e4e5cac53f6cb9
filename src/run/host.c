/* SPDX-License-Identifier: MIT */
/*
 * Kernels as host threads. Owns the pool of a rank: its threads, the teams of its blocks and
 * their shared memory, all made at create. A launch wakes as many threads as it needs; with one
 * worker it is a plain call. Must not look into a kernel's arguments.
 */
#include "src/run/run.h"

#include <string.h>

#include "kernel/lang.h"

#define DECLARE(NAME, name, file, args, set)                                                   \
    void k_entry_##name(struct k_thread *k, const void *a);
K_KERNELS(DECLARE)
#undef DECLARE

#define ENTRY(NAME, name, file, args, set) k_entry_##name,
static const k_entry_fn entries[EPI_KERNEL_COUNT] = {K_KERNELS(ENTRY)};
#undef ENTRY

struct worker {
    struct epi_run *run;
    int index; /* 1.. ; 0 is whoever launches */
    pthread_t thread;
};

struct epi_run {
    uint32_t process; /* that made it, and has its threads */
    int workers, started;
    size_t warp_bytes;
    const struct k_hooks *hooks;
    struct worker *worker;  /* [workers], [0] unused */
    struct k_team *team;    /* [workers], one per block */
    uint8_t *shared;        /* [workers][warp_bytes] */
    pthread_mutex_t launch; /* held while a kernel runs */
    pthread_mutex_t mutex;  /* guards what follows */
    pthread_cond_t wake, done;
    uint64_t generation;
    int active, left;
    bool stop;
    struct epi_grid grid;
    k_entry_fn entry;
    const void *args;
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

static void run_warp(struct epi_run *run, int index) {
    const struct epi_grid *g = &run->grid;
    const int block = index / g->warps;
    struct k_thread k = {.block = block,
                         .num_blocks = g->blocks,
                         .warp = index % g->warps,
                         .num_warps = g->warps,
                         .team = &run->team[block],
                         .hooks = run->hooks};
    run->entry(&k, run->args);
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
        run_warp(run, w->index);
        pthread_mutex_lock(&run->mutex);
        if (--run->left == 0) {
            pthread_cond_signal(&run->done);
        }
    }
    pthread_mutex_unlock(&run->mutex);
    return NULL;
}

void epi_run_kernel(struct epi_run *run, enum epi_kernel kernel, const void *args,
                    int workers) {
    if (workers < 1 || workers > run->workers) {
        workers = run->workers;
    }
    pthread_mutex_lock(&run->launch);
    run->grid = epi_run_grid(workers);
    run->entry = entries[kernel];
    run->args = args;
    for (int b = 0; b < run->grid.blocks; b++) {
        memset(&run->team[b], 0, sizeof(run->team[b]));
        run->team[b].shared =
            run->shared + (size_t)b * (size_t)run->grid.warps * run->warp_bytes;
    }
    int threads = run->grid.blocks * run->grid.warps;
    if (threads > 1) {
        pthread_mutex_lock(&run->mutex);
        run->generation++;
        run->active = threads;
        run->left = threads - 1;
        pthread_cond_broadcast(&run->wake);
        pthread_mutex_unlock(&run->mutex);
    }
    run_warp(run, 0);
    if (threads > 1) {
        pthread_mutex_lock(&run->mutex);
        while (run->left > 0) {
            pthread_cond_wait(&run->done, &run->mutex);
        }
        pthread_mutex_unlock(&run->mutex);
    }
    pthread_mutex_unlock(&run->launch);
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
    pthread_mutex_init(&run->launch, NULL);
    pthread_mutex_init(&run->mutex, NULL);
    pthread_cond_init(&run->wake, NULL);
    pthread_cond_init(&run->done, NULL);
    run->process = epi_process();
    run->workers = workers;
    run->warp_bytes = warp_bytes;
    run->hooks = hooks;
    run->worker = epi_alloc_array((size_t)workers, sizeof(*run->worker));
    run->team = epi_alloc_array((size_t)workers, sizeof(*run->team));
    run->shared = epi_alloc_array((size_t)workers, warp_bytes);
    ep_status st = EP_OK;
    if (!run->worker || !run->team || !run->shared) {
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
    pthread_mutex_destroy(&run->launch);
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
    epi_free(run->worker);
    epi_free(run->team);
    epi_free(run->shared);
    epi_free(run);
}
