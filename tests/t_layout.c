/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * ep_handle_layout: counts per rank, node and expert, the token-in-rank matrix, and channels as
 * prefix sums over contiguous ranges of tokens that depend on the number of tokens alone; from
 * ids and from masks.
 */
#include <stdio.h>
#include <string.h>

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define GUARD 64

/* The outputs of one call, each with 0xA5 behind it. */
struct outputs {
    struct pool pool;
    struct ep_tensor per_rank, per_node, per_expert, in_rank, prefix;
    struct ep_layout layout;
};

static int num_channels(const ep_group *group) {
    struct ep_plan_info info = EP_PLAN_INFO_INIT;

    return ep_group_plan(group, &info) == EP_OK ? info.num_channels : 0;
}

static struct ep_tensor make(struct pool *pool, int dtype, int64_t rows, int64_t cols) {
    const size_t bytes = (size_t)(rows * (cols ? cols : 1)) * ep_dtype_bytes((ep_dtype)dtype);
    void *data = pool_fill(pool, bytes + GUARD, 0xA5);
    struct ep_tensor t;

    if (cols) {
        ep_tensor_2d(&t, (ep_dtype)dtype, data, rows, cols);
    } else {
        ep_tensor_1d(&t, (ep_dtype)dtype, data, rows);
    }
    return t;
}

static void outputs_create(struct outputs *o, struct world *w, const struct test_case *c) {
    const int64_t tokens = c->in[w->rank].num_tokens;

    *o = (struct outputs){.layout = EP_LAYOUT_INIT};
    o->per_rank = make(&o->pool, EP_I32, c->num_ranks, 0);
    o->per_node = make(&o->pool, EP_I32, ep_group_num_nodes(w->group), 0);
    o->per_expert = make(&o->pool, EP_I32, c->num_experts, 0);
    o->in_rank = make(&o->pool, EP_U8, tokens, c->num_ranks);
    o->prefix = make(&o->pool, EP_I32, c->num_ranks, num_channels(w->group));
    o->layout.tokens_per_rank = &o->per_rank;
    o->layout.tokens_per_node = &o->per_node;
    o->layout.tokens_per_expert = c->mask ? NULL : &o->per_expert;
    o->layout.token_in_rank = &o->in_rank;
    o->layout.channel_prefix = &o->prefix;
}

static void same(struct world *w, const struct ep_tensor *t, const void *want,
                 const char *what) {
    const int64_t n = t->shape[0] * (t->ndim == 2 ? t->shape[1] : 1);
    const size_t bytes = (size_t)n * ep_dtype_bytes((ep_dtype)t->dtype);
    const uint8_t *got = t->data;
    bool guard = true;

    for (size_t i = 0; i < GUARD; i++) {
        guard = guard && got[bytes + i] == 0xA5;
    }
    world_check(w, guard, "%s: written past its end", what);
    world_check(w, memcmp(got, want, bytes) == 0, "%s differs", what);
}

/* The end of each channel, from a routing that sends every token everywhere. */
static const int32_t *channel_ends(struct world *w, const struct test_case *c,
                                   struct outputs *all) {
    const int64_t tokens = c->in[w->rank].num_tokens;
    struct ep_routing routing = EP_ROUTING_INIT;
    ep_handle *handle = NULL;
    struct ep_tensor mask;

    outputs_create(all, w, c);
    all->layout.tokens_per_expert = NULL;
    ep_tensor_2d(&mask, EP_U8, pool_fill(&all->pool, (size_t)(tokens * c->num_ranks), 1),
                 tokens, c->num_ranks);
    routing.token_in_rank = &mask;
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, call_route(handle, &routing, NULL), EP_OK, "ep_handle_route(all)");
    world_is(w, call_layout(handle, &all->layout, NULL), EP_OK, "ep_handle_layout(all)");
    ep_handle_destroy(&handle);
    return all->prefix.data;
}

static void check_channels(struct world *w, const struct test_case *c,
                           const struct outputs *o) {
    const int channels = num_channels(w->group);
    const int64_t tokens = c->in[w->rank].num_tokens;
    struct outputs all;
    const int32_t *ends = channel_ends(w, c, &all);
    int32_t *want = pool_zero(&all.pool, (size_t)(c->num_ranks * channels) * 4);

    world_check(w, channels > 0 && ends[channels - 1] == tokens, "the last channel's end");
    for (int ch = 0; ch < channels; ch++) {
        world_check(w, ends[ch] >= (ch ? ends[ch - 1] : 0), "channel %d ends early", ch);
        for (int64_t t = 0; t < ends[ch] && t < tokens; t++) {
            for (int r = 0; r < c->num_ranks; r++) {
                want[r * channels + ch] += ref_goes_to(&c->problem, w->rank, t, r);
            }
        }
    }
    same(w, &o->prefix, want, "channel_prefix");
    pool_free(&all.pool);
}

static void body(struct world *w) {
    const struct test_case *c = w->ctx;
    struct ep_routing routing;
    struct outputs o;
    struct ref_layout ref;
    struct ep_layout none = EP_LAYOUT_INIT;
    ep_handle *handle = NULL;

    outputs_create(&o, w, c);
    ref_layout(&o.pool, &c->problem, w->rank, &ref);
    case_routing(c, w->rank, &routing);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_fails(w, call_layout(handle, &o.layout, NULL), EP_ERR_STATE, "rout",
                "layout of a handle not routed");
    world_is(w, call_route(handle, &routing, NULL), EP_OK, "ep_handle_route");
    world_is(w, call_layout(handle, &none, NULL), EP_OK, "no output at all");
    world_is(w, call_layout(handle, &o.layout, NULL), EP_OK, "ep_handle_layout");
    same(w, &o.per_rank, ref.tokens_per_rank, "tokens_per_rank");
    const int nodes = c->problem.node ? c->problem.node[w->num_ranks - 1] + 1 : 1;
    if (world_check(w, ep_group_num_nodes(w->group) == nodes, "there are %d nodes", nodes)) {
        same(w, &o.per_node, ref.tokens_per_node, "tokens_per_node");
    }
    if (!c->mask) {
        same(w, &o.per_expert, ref.tokens_per_expert, "tokens_per_expert");
    }
    same(w, &o.in_rank, ref.token_in_rank, "token_in_rank");
    check_channels(w, c, &o);
    ep_handle_destroy(&handle);
    pool_free(&o.pool);
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();

    tap_deadline(120);
    for (int i = 0; i < 3 * NUM_ROUTINGS; i++) {
        struct test_case c;
        struct world_setup s;
        char what[512];

        case_default(&c, 1 + i % 5, seed + (uint64_t)i);
        c.routing = (enum case_routing)(i % NUM_ROUTINGS);
        c.map = (enum case_map)(i % NUM_MAPS);
        c.max_tokens = i % 7 == 0 ? 1000 : 1 + 9 * i;
        c.mask = i % 5 == 3;
        c.id_stride = (enum case_stride)(i % NUM_STRIDES);
        c.weights = false;
        case_build(&c);
        world_defaults(&s, c.num_ranks);
        s.config.num_experts = c.num_experts;
        s.config.max_tokens = c.max_tokens;
        s.config.expert_rank = c.expert_rank;
        s.config.mask_routing = 1;
        s.config.num_workers = i % 4;
        s.processes = i % 8 == 5;
        s.body = body;
        s.ctx = &c;
        case_describe(&c, what, sizeof(what));
        ok(world_run(&s) == 0, "%s", what);
        case_free(&c);
    }
    return done_testing();
}
