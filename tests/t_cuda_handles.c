/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Handles of CUDA groups come and go freely: any number at once, and while a stream is captured,
 * whose graph then uses what was made meanwhile.
 */
#include <stdio.h>
#include <string.h>

#include "src/cu/driver.h"
#include "tests/calls.h"
#include "tests/stage.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 2
#define MANY 1200
#define CAPTURE_GLOBAL 0

/* All alive at once; some of them are used, and others have their places afterwards. */
static void many(struct world *w) {
    static const int used[] = {0, MANY / 2, MANY - 1};
    struct pool pool = {0};
    ep_handle **h = pool_zero(&pool, MANY * sizeof(*h));
    bool good = true;

    for (int round = 0; good && round < 2; round++) {
        for (int i = 0; good && i < MANY; i++) {
            good = h[i] || world_is(w, ep_handle_create(&h[i], w->group, NULL), EP_OK,
                                    "ep_handle_create");
        }
        for (int i = 0; good && i < 3; i++) {
            trial_pass(w, w->ctx, h[used[i]]);
        }
        for (int i = 0; i < MANY; i++) {
            if (round == 1 || i % 3 == 0) {
                ep_handle_destroy(&h[i]);
            }
        }
    }
    pool_free(&pool);
}

/* ---- in a capture --------------------------------------------------------------------------- */

struct graph {
    void *graph, *exec;
};

static bool good(struct world *w, int result, const char *call) {
    return world_is(w, epi_cu_result(result, call), EP_OK, call);
}

static void replay(struct world *w, struct graph *g, void *stream) {
    int (*instantiate)(void **exec, void *graph, unsigned long long flags);
    int (*launch)(void *exec, void *stream);
    int (*destroy_exec)(void *exec), (*destroy)(void *graph);

    *(void **)&instantiate = gpu_symbol("cuGraphInstantiateWithFlags");
    *(void **)&launch = gpu_symbol("cuGraphLaunch");
    *(void **)&destroy_exec = gpu_symbol("cuGraphExecDestroy");
    *(void **)&destroy = gpu_symbol("cuGraphDestroy");
    if (good(w, instantiate(&g->exec, g->graph, 0), "cuGraphInstantiateWithFlags")) {
        for (int i = 0; i < 3; i++) {
            good(w, launch(g->exec, stream), "cuGraphLaunch");
        }
        world_is(w, epi_cu_stream_sync(&call_gpu(w->group)->device, stream), EP_OK, "waiting");
        good(w, destroy_exec(g->exec), "cuGraphExecDestroy");
    }
    good(w, destroy(g->graph), "cuGraphDestroy");
}

/* Routes, dispatches and combines with tensors that lie on the device already; and routes by experts
 * that the group has not seen. */
static void capture(struct world *w, struct run *r, struct stage stage[3], ep_handle *h,
                    ep_handle *other, void *stream) {
    struct ep_routing routing;
    struct ep_dispatch_args dispatch = r->dispatch;
    struct ep_combine_args combine = r->combine;

    case_routing(r->t->c, w->rank, &routing);
    stage_routing(&stage[0], &routing);
    stage_dispatch(&stage[1], &dispatch);
    stage_combine(&stage[2], &combine);
    for (int i = 0; i < 3; i++) {
        stage_lay(&stage[i]);
        stage_copy_in(&stage[i]);
    }
    world_is(w, ep_handle_route(h, &routing, stream), EP_OK, "route in a capture");
    world_is(w, ep_dispatch(h, &dispatch, stream), EP_OK, "dispatch in a capture");
    world_is(w, ep_combine(h, &combine, stream), EP_OK, "combine in a capture");
    routing.num_experts = 3;
    world_is(w, ep_handle_route(other, &routing, stream), EP_OK, "new experts in a capture");
}

static void made_in_a_capture(struct world *w) {
    int (*begin)(void *stream, int mode), (*end)(void *stream, void **graph);
    struct gpu *gpu = call_gpu(w->group);
    struct pool pool = {0};
    struct stage *stage = pool_zero(&pool, 3 * sizeof(*stage));
    struct graph g = {NULL, NULL};
    void *stream = NULL;
    const struct ep_handle_config lenient = {sizeof(lenient), 0, 0, EP_HANDLE_LENIENT_IDS};
    ep_handle *h = NULL, *other = NULL, *before = NULL;
    struct run r;
    uint64_t arena;
    size_t arena_bytes;

    *(void **)&begin = gpu_symbol("cuStreamBeginCapture_v2");
    *(void **)&end = gpu_symbol("cuStreamEndCapture");
    run_create(&r, w, w->ctx);
    call_arena(w->group, &arena, &arena_bytes);
    for (int i = 0; i < 3; i++) {
        stage_begin(&stage[i], gpu, arena, arena_bytes);
    }
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    world_is(w, ep_handle_create(&before, w->group, NULL), EP_OK, "ep_handle_create");
    trial_pass(w, w->ctx, before);
    world_barrier(w); /* nobody ends what others have begun: modes are the process's */
    if (world_is(w, epi_cu_enter(&gpu->device), EP_OK, "the device's context")) {
        good(w, begin(stream, CAPTURE_GLOBAL), "cuStreamBeginCapture");
        ep_handle_destroy(&before);
        for (int i = 0; i < 300; i++) { /* more than fit where the first are */
            world_is(w, ep_handle_create(&h, w->group, NULL), EP_OK, "create in a capture");
            if (i < 299) {
                ep_handle_destroy(&h);
            }
        }
        world_is(w, ep_handle_create(&other, w->group, &lenient), EP_OK, "and another");
        capture(w, &r, stage, h, other, stream);
        if (good(w, end(stream, &g.graph), "cuStreamEndCapture")) {
            world_barrier(w);
            replay(w, &g, stream);
        }
        epi_cu_leave();
    }
    for (int i = 0; i < 3; i++) {
        stage_copy_out(&stage[i], stream);
    }
    world_is(w, epi_cu_stream_sync(&gpu->device, stream), EP_OK, "waiting");
    for (int i = 0; i < 3; i++) {
        world_is(w, stage_check(&stage[i]), EP_OK, "what the graph wrote");
        stage_end(&stage[i]);
    }
    run_check_outputs(&r);
    run_check_combine(&r);
    call_stream_destroy(w->group, &stream);
    ep_handle_destroy(&h);
    ep_handle_destroy(&other);
    run_free(&r);
    pool_free(&pool);
}

/* ---- the test ------------------------------------------------------------------------------- */

int main(void) {
    gpu_only();
    const struct form form = {.id_dtype = EP_I64, .num_bias = 1};
    struct test_case c;
    uint64_t seed = tap_seed();

    tap_deadline(120);
    case_default(&c, RANKS, seed);
    trial_with(&c, &form, many, false, "more than a thousand handles at once");
    case_default(&c, RANKS, seed + 1);
    trial_with(&c, &form, made_in_a_capture, true, "a handle that is made in a capture");
    case_default(&c, RANKS, seed + 1);
    trial_with(&c, &form, made_in_a_capture, false, "a handle that is made in a capture");
    return done_testing();
}
