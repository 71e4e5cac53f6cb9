/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Ranks meet while any one allocation of one of them fails: it and the others end in time, say why,
 * and keep nothing.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/meet.h"
#include "tests/rig.h"
#include "tests/tap.h"

struct sweep {
    int port;
    int victim;
    pthread_barrier_t *barrier;
    int *done;
};

static int sweep_rank(int rank, void *ctx) {
    struct sweep *s = ctx;
    int num_failed = 0;
    for (int n = 1; !*s->done; n++) {
        char bytes[600] = {0};
        char all[1200];
        struct rig_footprint was = rig_footprint();
        struct epi_boot *boot = NULL;
        if (rank == s->victim) {
            epi_alloc_fail_at(epi_alloc_count() + n);
        }
        uint64_t until = epi_alloc_count() + (uint64_t)n;
        ep_status st = meet_join(&boot, s->port, rank, 2, "sweep", 600 * EPI_NS_PER_MS);
        if (st == EP_OK) {
            st = epi_boot_allgather(boot, bytes, sizeof(bytes), all,
                                    epi_deadline_after(20 * EPI_NS_PER_S));
            ok(st != EP_ERR_TIMEOUT, "%d: nobody waits for who lacks memory", n);
        }
        epi_boot_destroy(&boot);
        num_failed += st != EP_OK;
        ok(st == EP_OK || ep_last_error()[0] != '\0', "a failure has a text");
        ok(rig_same_footprint(was), "%d: nothing is left after %s", n, ep_status_string(st));
        epi_alloc_fail_at(0);
        pthread_barrier_wait(s->barrier);
        if (rank == s->victim && epi_alloc_count() < until) {
            *s->done = 1; /* it had fewer than n allocations to make */
        }
        pthread_barrier_wait(s->barrier);
    }
    ok(num_failed >= 8, "%d of the failures were felt", num_failed);
    return 0;
}

/* Two jobs, which differ in the rank that lacks memory, at the same time. */
static void test_sweep(void) {
    struct sweep s[2];
    struct tap_ranks ranks[2];
    pthread_barrierattr_t attr;
    pthread_barrierattr_init(&attr);
    pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    tap_expect_log("dropped a connection");
    tap_expect_log(" died: ");
    for (int victim = 0; victim < 2; victim++) {
        s[victim] = (struct sweep){.port = tap_free_port(),
                                   .victim = victim,
                                   .barrier = tap_shared(sizeof(pthread_barrier_t)),
                                   .done = tap_shared(sizeof(int))};
        pthread_barrier_init(s[victim].barrier, &attr, 2);
        if (!ok(tap_ranks_start(&ranks[victim], 2, sweep_rank, &s[victim]) == 0, "started")) {
            return;
        }
    }
    for (int victim = 0; victim < 2; victim++) {
        ok(tap_ranks_wait(&ranks[victim], 90) == 0, "any allocation of rank %d may fail",
           victim);
        tap_ranks_free(&ranks[victim]);
    }
}

static struct {
    ep_world *world;
    pthread_barrier_t barrier;
} threads;

/* Rank 0 has no memory to meet the other, which comes later. */
static int thread_rank(int rank, void *ctx) {
    struct epi_boot_config config = {.world = threads.world, .rank = rank, .num_ranks = 2};
    const struct epi_deadline d = epi_deadline_after(20 * EPI_NS_PER_S);
    struct epi_boot *boot = NULL;
    char all[2], one = 1;
    (void)ctx;
    ok(epi_boot_create(&boot, &config) == EP_OK, "threads meet: %s", ep_last_error());
    if (rank == 0) {
        epi_alloc_fail_at(epi_alloc_count() + 1);
        ok(epi_boot_allgather(boot, &one, 1, all, d) == EP_ERR_NOMEM, "no memory: %s",
           ep_last_error());
        epi_alloc_fail_at(0);
    }
    pthread_barrier_wait(&threads.barrier);
    ok(rank == 0 || (epi_boot_allgather(boot, &one, 1, all, d) == EP_ERR_PEER &&
                     strstr(ep_last_error(), "rank 0 failed: no memory")),
       "who comes later is told: %s", ep_last_error());
    epi_boot_destroy(&boot);
    return 0;
}

static void test_threads(void) {
    pthread_barrier_init(&threads.barrier, NULL, 2);
    ok(ep_world_create(&threads.world, 2) == EP_OK, "a world: %s", ep_last_error());
    tap_run_threads(2, thread_rank, NULL);
    ep_world_destroy(&threads.world);
}

int main(void) {
    gpu_never("how ranks meet");
    tap_deadline(100);
    test_threads();
    test_sweep();
    return done_testing();
}
