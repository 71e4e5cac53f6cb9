/* SPDX-License-Identifier: MIT */
/*
 * The smallest complete use of libep: one Mixture-of-Experts layer, forward.
 *
 *     ep run -n 4 -- build/examples/moe_layer      4 processes that find each other; the same with
 *                                                  torchrun, mpirun, mpiexec and srun
 *     build/examples/moe_layer                     4 threads of one process
 *
 * Every rank has 256 tokens of 64 numbers. Each token goes to 2 of 16 experts, wherever those
 * are; expert e multiplies a row by e + 1; the answers come back and are added up per token.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "ep.h"

enum { NUM_EXPERTS = 16, TOPK = 2, TOKENS = 256, HIDDEN = 64, NUM_THREADS = 4 };

static ep_world *world; /* where threads meet; NULL when ranks are processes */

/* Every call returns a status; ep_last_error() is the sentence that goes with a bad one. */
static void must(ep_status st, const char *what) {
    if (st != EP_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, ep_status_string(st), ep_last_error());
        exit(1);
    }
}

/* The experts of this rank. A received row says which of them it wants; answers add up. */
static void compute(float *x, const int32_t *ids, int64_t rows, int first_expert) {
    for (int64_t i = 0; i < rows; i++) {
        float factor = 0;
        for (int k = 0; k < TOPK; k++) {
            int32_t local = ids[i * TOPK + k]; /* -1: that choice lies on another rank */
            factor += local >= 0 ? (float)(first_expert + local + 1) : 0;
        }
        for (int h = 0; h < HIDDEN; h++) {
            x[i * HIDDEN + h] *= factor;
        }
    }
}

/* y = layer(x), both [TOKENS][HIDDEN]; ids [TOKENS][TOPK]. Returns the rows received. */
static int64_t forward(ep_group *group, float *x, int32_t *ids, float *y) {
    int rank = ep_group_rank(group), num_ranks = ep_group_num_ranks(group);
    struct ep_tensor t_ids, t_x, t_recv, t_recv_ids, t_y;

    /* A handle is the routing of one micro-batch; it can be dispatched and combined often. */
    ep_handle *handle = NULL;
    struct ep_routing routing = EP_ROUTING_INIT;
    ep_tensor_2d(&t_ids, EP_I32, ids, TOKENS, TOPK);
    routing.topk_ids = &t_ids;
    must(ep_handle_create(&handle, group, NULL), "ep_handle_create");
    must(ep_handle_route(handle, &routing, NULL), "ep_handle_route");

    /* Dispatch. There must be room for the worst case: every token of every rank comes here. */
    int64_t room = (int64_t)num_ranks * TOKENS, rows = 0;
    float *recv = calloc((size_t)room * HIDDEN, sizeof(*recv));
    int32_t *recv_ids = calloc((size_t)room * TOPK, sizeof(*recv_ids));
    must(recv && recv_ids ? EP_OK : EP_ERR_NOMEM, "calloc");
    struct ep_dispatch_args dispatch = EP_DISPATCH_ARGS_INIT;
    ep_tensor_2d(&t_x, EP_F32, x, TOKENS, HIDDEN);
    ep_tensor_2d(&t_recv, EP_F32, recv, room, HIDDEN);
    ep_tensor_2d(&t_recv_ids, EP_I32, recv_ids, room, TOPK);
    dispatch.x = &t_x;
    dispatch.recv_x = &t_recv;
    dispatch.recv_topk_ids = &t_recv_ids;
    must(ep_dispatch(handle, &dispatch, NULL), "ep_dispatch");
    must(ep_handle_counts(handle, &rows, NULL, NULL), "ep_handle_counts");

    /* The experts compute, here in place. They are spread over the ranks in order. */
    int more = NUM_EXPERTS % num_ranks; /* the first ranks hold one more */
    int first = rank * (NUM_EXPERTS / num_ranks) + (rank < more ? rank : more);
    compute(recv, recv_ids, rows, first);

    /* Combine: the answers go back to their tokens and are added. */
    struct ep_combine_args combine = EP_COMBINE_ARGS_INIT;
    ep_tensor_2d(&t_y, EP_F32, y, TOKENS, HIDDEN);
    combine.x = &t_recv;
    combine.out = &t_y;
    must(ep_combine(handle, &combine, NULL), "ep_combine");
    ep_handle_destroy(&handle);
    free(recv_ids);
    free(recv);
    return rows;
}

/* One rank: joins the group, makes tokens, runs the layer, checks it. 0 when all is right. */
static int run_rank(int rank_of_thread) {
    static _Thread_local float x[TOKENS * HIDDEN], y[TOKENS * HIDDEN];
    static _Thread_local int32_t ids[TOKENS * TOPK];
    /* A group is made once: it allocates all memory that dispatch and combine will use. */
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    if (world) { /* otherwise the environment says who is who, as launchers set it */
        config.world = world;
        config.rank = rank_of_thread;
        config.num_ranks = NUM_THREADS;
    }
    config.num_experts = NUM_EXPERTS;
    config.max_tokens = TOKENS;
    config.max_topk = TOPK;
    config.max_row_bytes = HIDDEN * sizeof(float);
    ep_group *group;
    must(ep_group_create(&group, &config), "ep_group_create");
    int rank = ep_group_rank(group);

    /* In a model the router chooses the experts of a token; here a formula does. */
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        x[i] = (float)(rank + i % 100);
    }
    for (int i = 0; i < TOKENS * TOPK; i++) {
        ids[i] = (rank * 3 + i * 5) % NUM_EXPERTS;
    }
    int64_t rows = forward(group, x, ids, y);
    int wrong = 0; /* these are whole, small numbers: the sums are exact */
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        int t = i / HIDDEN * TOPK;
        wrong += y[i] != x[i] * (float)(ids[t] + 1 + ids[t + 1] + 1);
    }
    printf("rank %d of %d: %d tokens went out, %d rows came in, %s\n", rank,
           ep_group_num_ranks(group), TOKENS, (int)rows,
           wrong == 0 ? "every answer is right" : "ANSWERS ARE WRONG");
    ep_group_destroy(&group);
    return wrong;
}

static void *thread_main(void *rank) {
    return run_rank(*(int *)rank) == 0 ? NULL : rank; /* NULL is good */
}

/* Whether a launcher started this process as one rank: each has a name for that. A program that is
 * always launched need not look: ep_group_create knows them all. */
static int is_launched(void) {
    static const char *const names[] = {"RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK",
                                        "SLURM_STEP_ID"};
    int found = 0;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        found += getenv(names[i]) != NULL;
    }
    return found;
}

int main(void) {
    if (is_launched()) {
        return run_rank(-1) != 0;
    }
    pthread_t threads[NUM_THREADS];
    int ranks[NUM_THREADS], failed = 0;
    must(ep_world_create(&world, NUM_THREADS), "ep_world_create");
    for (int i = 0; i < NUM_THREADS; i++) {
        ranks[i] = i;
        failed = pthread_create(&threads[i], NULL, thread_main, &ranks[i]);
        must(failed == 0 ? EP_OK : EP_ERR_SYSTEM, "pthread_create");
    }
    void *bad = NULL;
    for (int i = 0; i < NUM_THREADS; i++) {
        failed += pthread_join(threads[i], &bad) != 0 || bad != NULL;
    }
    ep_world_destroy(&world);
    return failed != 0;
}
