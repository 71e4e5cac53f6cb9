/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * A rank that is a thread and ends without a word is told as dead, soon; one whose group another
 * thread takes over, or whose work a stream has still to run, is not.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "tests/calls.h"
#include "tests/rig.h"
#include "tests/tap.h"
#include "tests/world.h"

#define RANKS 3
#define TIMEOUT_MS 60000
#define SOON_S 20.0
#define LATE_MS 1800 /* longer than a rank may be without a thread */

/* What happens to the last rank. */
enum end { ENDS, IS_TAKEN_OVER, HAS_WORK_LEFT };

struct scene {
    ep_world *world;
    enum end end;
    ep_group *left; /* by the thread that has ended */
    void *stream;
    ep_handle *handle;
    struct gpu_piece piece; /* of a CUDA group: */
    atomic_uint *word;      /* what its stream waits for */
    atomic_int gate;        /* the same of a host group */
};

static ep_status make(ep_group **out, struct scene *s, int rank) {
    struct ep_group_config c = rig_tiny(rank, RANKS, TIMEOUT_MS);
    c.world = s->world;
    return call_group_create(out, &c);
}

static ep_status use(ep_handle *handle, void *stream) {
    static int32_t ids[4] = {0, 1, 2, 0};
    _Alignas(16) static uint8_t x[4][16];
    struct ep_tensor ids_t, x_t;
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;

    ep_tensor_2d(&ids_t, EP_I32, ids, 4, 1);
    ep_tensor_2d(&x_t, EP_U8, x, 4, 16);
    routing.topk_ids = &ids_t;
    args.x = &x_t;
    const ep_status st = call_route(handle, &routing, stream);
    return st == EP_OK ? call_dispatch(handle, &args, stream) : st;
}

static void wait_for_gate(void *arg) {
    while (!atomic_load((atomic_int *)arg)) {
        tap_sleep_ms(1);
    }
}

/* False where the driver cannot hold a stream. */
static bool hold(struct scene *s) {
    struct gpu *gpu = call_gpu(s->left);
    if (!gpu) {
        return ep_stream_run(s->stream, wait_for_gate, &s->gate) == EP_OK;
    }
    gpu_take(gpu, sizeof(*s->word), &s->piece);
    s->word = (atomic_uint *)(void *)s->piece.host;
    atomic_store(s->word, 0);
    return epi_cu_stream_hold(&gpu->device, s->stream, (uint32_t *)s->word, 1) == EP_OK;
}

static void release(struct scene *s) {
    atomic_store(&s->gate, 1);
    if (s->word) {
        atomic_store(s->word, 1);
    }
}

/* The first thread of the last rank: makes its group and ends. */
static void *end_without_a_word(void *arg) {
    struct scene *s = arg;
    ok(make(&s->left, s, RANKS - 1) == EP_OK, "create: %s", ep_last_error());
    if (s->end == HAS_WORK_LEFT) {
        ok(call_stream_create(&s->stream, s->left) == EP_OK &&
               ep_handle_create(&s->handle, s->left, NULL) == EP_OK && hold(s) &&
               use(s->handle, s->stream) == EP_OK,
           "work is left behind: %s", ep_last_error());
    }
    return NULL;
}

static int last_rank(struct scene *s) {
    pthread_t thread;
    ep_status st = EP_OK;

    if (pthread_create(&thread, NULL, end_without_a_word, s) != 0) {
        return 1;
    }
    pthread_join(thread, NULL);
    if (s->end == ENDS) {
        return 0; /* what is left is destroyed when the others have ended */
    }
    if (s->end == IS_TAKEN_OVER) {
        st = ep_handle_create(&s->handle, s->left, NULL);
    }
    tap_sleep_ms(LATE_MS);
    if (s->end == IS_TAKEN_OVER) {
        st = st == EP_OK ? use(s->handle, NULL) : st;
    } else {
        release(s);
        st = call_stream_sync(s->left, s->stream);
    }
    const bool good = ok(st == EP_OK, "the last rank: %s", ep_last_error());
    ep_handle_destroy(&s->handle);
    call_stream_destroy(s->left, &s->stream);
    if (s->word) {
        gpu_give(call_gpu(s->left), &s->piece);
    }
    call_group_destroy(&s->left);
    return good ? 0 : 1;
}

static int rank_main(int rank, void *ctx) {
    struct scene *s = ctx;
    struct ep_fault fault = EP_FAULT_INIT;
    ep_group *group = NULL;
    ep_handle *handle = NULL;

    if (rank == RANKS - 1) {
        return last_rank(s);
    }
    ep_status st = make(&group, s, rank);
    st = st == EP_OK ? ep_handle_create(&handle, group, NULL) : st;
    const double start = tap_now();
    st = st == EP_OK ? use(handle, NULL) : st;
    const double took = tap_now() - start;
    bool good =
        ok(st == (s->end == ENDS ? EP_ERR_PEER : EP_OK), "rank %d: %s", rank, ep_last_error());
    if (s->end == ENDS) {
        ep_group_fault(group, &fault);
        good = ok(fault.status == EP_ERR_PEER && fault.rank == RANKS - 1,
                  "the fault is of rank %d: %s", fault.rank, fault.message) &&
               ok(took < SOON_S, "it is noticed after %.1f s", took) && good;
    }
    ep_handle_destroy(&handle);
    call_group_destroy(&group);
    return good ? 0 : 1;
}

static void run(enum end end, const char *name) {
    struct scene s = {.end = end};
    ok(ep_world_create(&s.world, RANKS) == EP_OK, "a world");
    ok(gpu_run_ranks(RANKS, false, rank_main, &s, 60) == 0, "%s", name);
    call_group_destroy(&s.left);
    ep_world_destroy(&s.world);
}

int main(void) {
    gpu_program();
    tap_deadline(120);
    run(ENDS, "a rank whose thread has ended is dead");
    run(IS_TAKEN_OVER, "a rank that another thread has taken over lives");
    run(HAS_WORK_LEFT, "a rank whose stream has work to do lives");
    return done_testing();
}
