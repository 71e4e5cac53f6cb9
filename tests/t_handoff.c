/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * The smallest program in which every hand-off of the protocol happens: two ranks, several warps
 * each, a dispatch into memory and a combine of what arrived. It is what scripts/must_fail.sh runs
 * against a library weakened on purpose: under ThreadSanitizer the true one is clean, and each
 * weakened one must be reported.
 */
#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/world.h"

#define TOKENS 64  /* several channels for each warp */
#define HIDDEN 128 /* float32: 512 bytes */
#define RANKS 2
#define TOPK 4

struct buffers {
    int32_t ids[TOKENS][TOPK];
    _Alignas(64) float x[TOKENS][HIDDEN], recv[RANKS * TOKENS][HIDDEN], out[TOKENS][HIDDEN];
};

static struct buffers buffers[RANKS];

/* Every token goes to both ranks, so its row comes back twice. */
static void body(struct world *w) {
    struct buffers *b = &buffers[w->rank];
    ep_handle *handle = NULL;
    struct ep_tensor ids, x, recv, out;
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_dispatch_args d = EP_DISPATCH_ARGS_INIT;
    struct ep_combine_args c = EP_COMBINE_ARGS_INIT;

    for (int t = 0; t < TOKENS; t++) {
        for (int k = 0; k < TOPK; k++) {
            b->ids[t][k] = (t + 3 * k) % (4 * RANKS);
        }
        b->ids[t][0] = 0;
        b->ids[t][1] = 4;
        for (int h = 0; h < HIDDEN; h++) {
            b->x[t][h] = (float)(w->rank * 1000 + t * 10 + h);
        }
    }
    ep_tensor_2d(&ids, EP_I32, b->ids, TOKENS, TOPK);
    ep_tensor_2d(&x, EP_F32, b->x, TOKENS, HIDDEN);
    ep_tensor_2d(&recv, EP_F32, b->recv, RANKS * TOKENS, HIDDEN);
    ep_tensor_2d(&out, EP_F32, b->out, TOKENS, HIDDEN);
    routing.topk_ids = &ids;
    d.x = &x;
    d.recv_x = &recv;
    c.x = &recv;
    c.out = &out;
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, call_route(handle, &routing, NULL), EP_OK, "ep_handle_route");
    for (int round = 0; round < 3; round++) {
        world_is(w, call_dispatch(handle, &d, NULL), EP_OK, "ep_dispatch");
        world_is(w, call_combine(handle, &c, NULL), EP_OK, "ep_combine");
    }
    bool good = true;
    for (int t = 0; t < TOKENS; t++) {
        for (int h = 0; h < HIDDEN; h++) {
            good = good && b->out[t][h] == 2 * b->x[t][h];
        }
    }
    world_check(w, good, "a token's row did not come back twice");
    ep_handle_destroy(&handle);
}

int main(void) {
    gpu_program();
    struct world_setup s;

    tap_deadline(60);
    world_defaults(&s, RANKS);
    s.config.num_experts = 4 * RANKS;
    s.config.max_tokens = TOKENS;
    s.config.max_topk = TOPK;
    s.config.max_row_bytes = HIDDEN * 4;
    s.config.num_workers = 4;
    s.body = body;
    ok(world_run(&s) == 0, "two ranks of four warps, as threads");
    return done_testing();
}
