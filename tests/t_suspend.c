/* SPDX-License-Identifier: MIT */
/* class: timed, long */
/*
 * A job that is stopped as a whole for longer than its timeout goes on as if nothing had been: by
 * Ctrl-Z, a batch system, a container's pause or a debugger, while its ranks meet and while they are
 * in an operation, once for long or several times. A rank that is stopped alone is late.
 */
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>

#include "tests/gpu.h"
#include "tests/rig.h"
#include "tests/tap.h"
#include "tests/world.h"

#define RANKS 3
#define TIMEOUT_MS (1600 * tap_scaled(1))

/* Shared by the ranks and the test. */
struct job {
    char address[32];
    bool alone;            /* rank 1 does not come, and is stopped alone */
    atomic_int in_create;  /* ranks that are about to meet the others ... */
    atomic_int in_op;      /* ... and to begin the dispatch, all but the last */
    atomic_int may_create; /* the last rank may */
    atomic_int may_op;
};

static void wait_for(const atomic_int *word, int value) {
    while (atomic_load(word) < value) {
        tap_sleep_ms(1);
    }
}

static ep_status one_dispatch(ep_group *group, int rank) {
    int32_t ids[4] = {0, 1, 2, rank};
    _Alignas(16) uint8_t x[4][16] = {{1}, {2}, {3}, {4}}, got[4 * RANKS][16];
    struct ep_tensor ids_t, x_t, got_t;
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_handle *handle = NULL;

    ep_tensor_2d(&ids_t, EP_I32, ids, 4, 1);
    ep_tensor_2d(&x_t, EP_U8, x, 4, 16);
    ep_tensor_2d(&got_t, EP_U8, got, 4 * RANKS, 16);
    routing.topk_ids = &ids_t;
    args.x = &x_t;
    args.recv_x = &got_t;
    ep_status st = ep_handle_create(&handle, group, NULL);
    st = st == EP_OK ? ep_handle_route(handle, &routing, NULL) : st;
    st = st == EP_OK ? ep_dispatch(handle, &args, NULL) : st;
    ep_handle_destroy(&handle);
    return st;
}

static int rank_main(int rank, void *ctx) {
    struct job *job = ctx;
    struct ep_group_config c = rig_tiny(rank, RANKS, TIMEOUT_MS);
    ep_group *group = NULL;
    const bool last = rank == RANKS - 1;

    c.address = job->address;
    if (last) {
        wait_for(&job->may_create, 1);
    } else {
        atomic_fetch_add(&job->in_create, 1);
    }
    if (!ok(ep_group_create(&group, &c) == EP_OK, "create: %s", ep_last_error())) {
        return 1;
    }
    if (last) {
        wait_for(&job->may_op, 1);
    } else {
        atomic_fetch_add(&job->in_op, 1);
    }
    const double start = tap_now();
    const ep_status want = job->alone ? EP_ERR_TIMEOUT : EP_OK;
    const ep_status st = one_dispatch(group, rank);
    /* The rank that was stopped is told by the others, who were late for nobody. */
    const bool good = st == want || (job->alone && last && st != EP_OK);
    ok(good, "rank %d: dispatch: %s: %s", rank, ep_status_string(st), ep_last_error());
    if (job->alone && !last) {
        const double took = tap_now() - start;
        ok(took > 0.7 * TIMEOUT_MS / 1000.0, "it waited for %.1f s", took);
    }
    ep_group_destroy(&group);
    return good ? 0 : 1;
}

static void signal_all(struct tap_ranks *t, int sig) {
    for (int r = 0; r < RANKS; r++) {
        tap_ranks_signal(t, r, sig);
    }
}

/* Stops all ranks `times` times, each for `ms`. */
static void suspend(struct tap_ranks *t, int times, int ms) {
    for (int i = 0; i < times; i++) {
        tap_sleep_ms(100);
        signal_all(t, SIGSTOP);
        tap_sleep_ms(ms);
        signal_all(t, SIGCONT);
    }
    tap_sleep_ms(200); /* the others wait on */
}

static void start(struct tap_ranks *t, struct job *job, bool alone) {
    snprintf(job->address, sizeof(job->address), "127.0.0.1:%d", tap_free_port());
    job->alone = alone;
    ok(tap_ranks_start(t, RANKS, rank_main, job) == 0, "the ranks start");
}

int main(void) {
    gpu_never("a GPU's kernels go on: t_cuda_suspend");
    struct tap_ranks together, apart;
    struct job *job = tap_shared(2 * sizeof(*job));

    tap_expect_log("alive but late");
    tap_deadline(120);
    start(&together, &job[0], false);
    start(&apart, &job[1], true);
    atomic_store(&job[1].may_create, 1);

    wait_for(&job[0].in_create, RANKS - 1);
    suspend(&together, 1, 2 * TIMEOUT_MS);
    atomic_store(&job[0].may_create, 1);
    wait_for(&job[1].in_op, RANKS - 1); /* its last rank comes when the others have given up */
    tap_ranks_signal(&apart, RANKS - 1, SIGSTOP);

    wait_for(&job[0].in_op, RANKS - 1);
    suspend(&together, 3, TIMEOUT_MS * 3 / 4);
    atomic_store(&job[0].may_op, 1);
    ok(tap_ranks_wait(&together, 60) == 0, "a job that was suspended goes on");
    tap_ranks_free(&together);

    for (int r = 0; r < RANKS - 1; r++) {
        ok(tap_ranks_wait_one(&apart, r, 60), "rank %d does not wait for ever", r);
    }
    atomic_store(&job[1].may_op, 1);
    tap_ranks_signal(&apart, RANKS - 1, SIGCONT);
    ok(tap_ranks_wait(&apart, 60) == 0, "a rank that was stopped alone was late");
    tap_ranks_free(&apart);
    return done_testing();
}
