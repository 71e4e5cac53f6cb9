/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Ranks that disagree are told so, all of them: about the configuration when the group is made,
 * and about an operation by its first message, before any row is sent.
 */
#include <string.h>

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/world.h"

#define RANKS 3

/* ---- at create ------------------------------------------------------------------------- */

static const char *const fields[] = {
    "num_experts", "max_tokens",   "max_topk",      "max_row_bytes",     "max_scale_bytes",
    "num_slots",   "expert_rank",  "max_recv_rows", "max_expanded_rows", "memory_limit_bytes",
    "timeout_ms",  "mask_routing", "flags"};
#define NUM_FIELDS (int)(sizeof(fields) / sizeof(*fields))

static void change_field(struct ep_group_config *c, int field) {
    static const int32_t map[4 * RANKS] = {2, 1, 0};

    switch (field) {
    case 0:
        c->num_experts++;
        break;
    case 1:
        c->max_tokens++;
        break;
    case 2:
        c->max_topk++;
        break;
    case 3:
        c->max_row_bytes += EP_ROW_ALIGN;
        break;
    case 4:
        c->max_scale_bytes = 4;
        break;
    case 5:
        c->num_slots = 3;
        break;
    case 6:
        c->expert_rank = map;
        break;
    case 7:
        c->max_recv_rows = 17;
        break;
    case 8:
        c->max_expanded_rows = 100;
        break;
    case 9:
        c->memory_limit_bytes = 1 << 30;
        break;
    case 10:
        c->timeout_ms += 1;
        break;
    case 11:
        c->mask_routing = 1;
        break;
    default:
        c->flags &= ~EP_GROUP_EXPANDED_VIEW;
    }
}

static void tune(struct ep_group_config *config, int rank, void *ctx) {
    const int *field = ctx;

    config->flags |= EP_GROUP_EXPANDED_VIEW;
    if (rank == 1) {
        change_field(config, *field);
    }
}

static void configurations(void) {
    for (int i = 0; i < NUM_FIELDS; i++) {
        for (int processes = 0; processes < gpu_ways(); processes++) {
            struct world_setup s;

            world_defaults(&s, RANKS);
            s.tune = tune;
            s.ctx = &i;
            s.create = EP_ERR_MISMATCH;
            s.create_says = fields[i];
            s.processes = processes;
            ok(world_run(&s) == 0, "%s differs, %s", fields[i],
               gpu_processes(processes) ? "processes" : "threads");
        }
    }
}

static void tune_workers(struct ep_group_config *config, int rank, void *ctx) {
    (void)ctx;
    config->num_workers = 1 + rank;
}

/* ---- at an operation ------------------------------------------------------------------- */

enum difference {
    ROW_BYTES,
    TOPK,
    WEIGHTS,
    SCALES,
    ROW_TYPE,
    SCALE_TYPE,
    EXPERTS,
    MAP,
    MAPS,
    KIND,
    HANDLE,
    CACHED,
    COMBINE_ROW_BYTES,
    COMBINE_DTYPE,
    COMBINE_WEIGHTS,
    NUM_DIFFERENCES
};

static const char *const difference_names[] = {"row bytes",
                                               "top-k",
                                               "top-k weights",
                                               "scale bytes",
                                               "type of rows",
                                               "type of scales",
                                               "experts",
                                               "map of experts",
                                               "maps of experts",
                                               "kind of operation",
                                               "handle",
                                               "cached or not",
                                               "row bytes of combine",
                                               "type of combine",
                                               "weights of combine"};

struct buffers {
    int64_t ids[4][4];
    _Alignas(16) uint8_t x[4][256], scales[4][16], y[16 * RANKS][256], out[4][256];
    float weights[4][4], topk[16 * RANKS][4];
    struct ep_tensor ids_t, x_t, scales_t, weights_t, y_t, topk_t, out_t;
    struct ep_dispatch_args dispatch;
    struct ep_combine_args combine;
};

/* This rank's arguments, those of rank 1 with the difference. */
static void prepare(struct buffers *b, enum difference what, bool odd) {
    memset(b, 0, sizeof(*b));
    for (int t = 0; t < 4; t++) {
        for (int k = 0; k < 4; k++) {
            b->ids[t][k] = (3 * t + k) % (4 * RANKS);
        }
    }
    ep_tensor_2d(&b->ids_t, EP_I64, b->ids, 4, odd && what == TOPK ? 3 : 4);
    b->ids_t.stride[0] = 4;
    ep_tensor_2d(&b->x_t, EP_U8, b->x, 4, odd && what == ROW_BYTES ? 128 : 256);
    if (odd && what == ROW_TYPE) { /* of as many bytes */
        ep_tensor_2d(&b->x_t, EP_BF16, b->x, 4, 128);
    }
    ep_tensor_2d(&b->scales_t, EP_U8, b->scales, 4, odd && what == SCALES ? 8 : 16);
    if (odd && what == SCALE_TYPE) {
        ep_tensor_2d(&b->scales_t, EP_I16, b->scales, 4, 8);
    }
    ep_tensor_2d(&b->weights_t, EP_F32, b->weights, 4, b->ids_t.shape[1]);
    b->dispatch = (struct ep_dispatch_args)EP_DISPATCH_ARGS_INIT;
    b->dispatch.x = &b->x_t;
    b->dispatch.scales = &b->scales_t;
    b->dispatch.topk_weights = odd && what == WEIGHTS ? NULL : &b->weights_t;
    ep_tensor_2d(&b->y_t, EP_BF16, b->y, 4 * RANKS,
                 odd && what == COMBINE_ROW_BYTES ? 64 : 128);
    b->out_t = b->y_t;
    b->out_t.data = b->out;
    b->out_t.shape[0] = 4;
    b->y_t.dtype = b->out_t.dtype = odd && what == COMBINE_DTYPE ? EP_F16 : EP_BF16;
    ep_tensor_2d(&b->topk_t, EP_F32, b->topk, 4 * RANKS, 4);
    b->combine = (struct ep_combine_args)EP_COMBINE_ARGS_INIT;
    b->combine.x = &b->y_t;
    b->combine.topk_weights = odd && what == COMBINE_WEIGHTS ? NULL : &b->topk_t;
    b->combine.out = &b->out_t;
}

/* All ranks name six of the group's experts, but for the difference. */
static void name_experts(struct ep_routing *routing, enum difference what, bool odd) {
    static const int32_t maps[2][6] = {{0, 1, 2, 0, 1, 2}, {0, 1, 2, 0, 2, 1}};
    routing->num_experts = what == EXPERTS && odd ? 5 : 6;
    if ((what == MAP && odd) || what == MAPS) {
        routing->expert_rank = maps[what == MAPS && odd];
    }
}

static void faulted(struct world *w, ep_handle *handle, const struct buffers *b) {
    struct ep_fault fault = EP_FAULT_INIT;

    world_is(w, ep_group_fault(w->group, &fault), EP_OK, "ep_group_fault");
    world_check(w, fault.status == EP_ERR_MISMATCH, "fault: %d", fault.status);
    world_check(w, !strcmp(fault.phase, "ready"), "phase: %s", fault.phase);
    world_check(w, fault.message[0] != 0, "no message");
    world_check(w, fault.operation == EP_OP_DISPATCH || fault.operation == EP_OP_COMBINE,
                "operation: %d", fault.operation);
    world_is(w, call_dispatch(handle, &b->dispatch, NULL), EP_ERR_FAULTED, "dispatch after it");
    world_is(w, call_combine(handle, &b->combine, NULL), EP_ERR_FAULTED, "combine after it");
}

static void body(struct world *w) {
    const enum difference what = *(const enum difference *)w->ctx;
    const bool odd = w->rank == 1;
    const struct ep_handle_config lenient = {sizeof(lenient), 0, 0, EP_HANDLE_LENIENT_IDS};
    struct ep_routing routing = EP_ROUTING_INIT;
    struct buffers good, b;
    ep_handle *handle[2] = {NULL, NULL}, *used;
    ep_status st;

    prepare(&good, NUM_DIFFERENCES, false);
    prepare(&b, what, odd);
    for (int i = 0; i < 2; i++) {
        routing.topk_ids = what == TOPK ? &b.ids_t : &good.ids_t;
        if (what >= EXPERTS && what <= MAPS) {
            name_experts(&routing, what, odd);
        }
        world_is(w, ep_handle_create(&handle[i], w->group, &lenient), EP_OK,
                 "ep_handle_create");
        world_is(w, call_route(handle[i], &routing, NULL), EP_OK, "ep_handle_route");
        if (what >= KIND) {
            world_is(w, call_dispatch(handle[i], &good.dispatch, NULL), EP_OK, "ep_dispatch");
        }
    }
    if (what == CACHED && odd) {
        world_is(w, call_route(handle[0], &routing, NULL), EP_OK, "ep_handle_route");
    }
    world_barrier(w); /* or a late rank learns of the fault in the operation before */
    used = handle[what == HANDLE && odd];
    if ((what == KIND && odd) || what >= COMBINE_ROW_BYTES) {
        st = call_combine(used, &b.combine, NULL);
    } else {
        st = call_dispatch(used, &b.dispatch, NULL);
    }
    const bool type = what == ROW_TYPE || what == SCALE_TYPE || what == COMBINE_DTYPE;
    const bool noticed = !strstr(ep_last_error(), "ended the group"); /* here, not at a peer */
    world_fails(w, st, EP_ERR_MISMATCH,
                !noticed          ? "rank"
                : what == HANDLE  ? w->rank == 1 ? "rank|operation 2 here and in 1 there"
                                                 : "rank|operation 1 here and in 2 there"
                : what == EXPERTS ? w->rank == 1 ? "num_experts is 5 here and 6 there"
                                                 : "num_experts is 6 here and 5 there"
                : what == MAP     ? "map of experts is|expert_rank|default"
                : what == MAPS    ? "expert_rank (its hash) is"
                : type            ? "rank|of type EP_"
                                  : "rank",
                difference_names[what]);
    if (w->rank == 0) {
        diag("%s: %s", difference_names[what], ep_last_error());
    }
    faulted(w, handle[0], &b);
    ep_handle_destroy(&handle[0]);
    ep_handle_destroy(&handle[1]);
}

/* With workers enough for several blocks, some have rows on their way when the fault comes. */
static void operations(int workers) {
    for (int i = 0; i < NUM_DIFFERENCES; i++) {
        enum difference what = (enum difference)i;
        struct world_setup s;

        world_defaults(&s, RANKS);
        s.config.max_scale_bytes = 16;
        s.config.num_workers = workers;
        s.body = body;
        s.ctx = &what;
        s.processes = !workers && i % 4 == 1;
        ok(world_run(&s) == 0, "%s differs, %d workers", difference_names[i], workers);
    }
}

int main(void) {
    gpu_program();
    struct world_setup s;

    tap_seed();
    tap_deadline(120);
    configurations();
    world_defaults(&s, RANKS);
    s.tune = tune_workers;
    ok(world_run(&s) == 0, "num_workers may differ");
    operations(0);
    operations(6);
    return done_testing();
}
