/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Structs of other versions of ep.h: a shorter one is taken as if the rest were 0, a longer one if
 * the rest is 0, an output is written as far as it goes and no further. Every struct of ep.h is
 * tried 8 bytes shorter and 8 bytes longer. What has no size is refused by its name.
 */
#include <stdio.h>
#include <string.h>

#include "tests/tap.h"
#include "tests/world.h"

#define TOKENS 4
#define POISON 0xA5

/* Room behind a struct for fields of a later version. */
#define WIDE(tag)                                                                              \
    union {                                                                                    \
        struct tag is;                                                                         \
        unsigned char bytes[sizeof(struct tag) + 16];                                          \
    }

struct call {
    ep_group *group;
    int64_t ids[TOKENS][2];
    _Alignas(16) float x[TOKENS][4], recv[2 * TOKENS][4], out[TOKENS][4];
    int32_t counts[8], ends[2], per_rank[1], prefix[64];
    struct ep_tensor ids_t, x_t, recv_t, out_t, ends_t, per_rank_t, prefix_t;
};

/* What is common to all: how a call took a struct of that many bytes with that byte behind it. */
typedef ep_status (*take_fn)(ep_handle *h, struct call *c, uint32_t size, unsigned char behind);

static ep_status take_route(ep_handle *h, struct call *c, uint32_t size, unsigned char behind) {
    WIDE(ep_routing) r = {.is = EP_ROUTING_INIT};
    r.is.topk_ids = &c->ids_t;
    r.bytes[sizeof(r.is)] = behind;
    r.is.size = size;
    return ep_handle_route(h, &r.is, NULL);
}

static ep_status take_tensor(ep_handle *h, struct call *c, uint32_t size,
                             unsigned char behind) {
    WIDE(ep_tensor) t = {.is = c->ids_t};
    struct ep_routing r = EP_ROUTING_INIT;
    t.bytes[sizeof(t.is)] = behind;
    t.is.size = size;
    r.topk_ids = &t.is;
    return ep_handle_route(h, &r, NULL);
}

static ep_status take_layout(ep_handle *h, struct call *c, uint32_t size,
                             unsigned char behind) {
    WIDE(ep_layout) l = {.is = EP_LAYOUT_INIT};
    l.is.tokens_per_rank = &c->per_rank_t;
    l.is.channel_prefix = &c->prefix_t; /* the last field: a shorter struct lacks it */
    l.bytes[sizeof(l.is)] = behind;
    l.is.size = size;
    memset(c->prefix, POISON, sizeof(c->prefix));
    const ep_status st = ep_handle_layout(h, &l.is, NULL);
    if (st == EP_OK) {
        const bool written = c->prefix[0] != (int32_t)0xA5A5A5A5;
        ok(written == (size >= sizeof(l.is)), "ep_layout of %u bytes: the last field is %s",
           size, written ? "taken" : "not there");
    }
    return st;
}

static ep_status take_dispatch(ep_handle *h, struct call *c, uint32_t size,
                               unsigned char behind) {
    WIDE(ep_dispatch_args) a = {.is = EP_DISPATCH_ARGS_INIT};
    a.is.x = &c->x_t;
    a.is.recv_x = &c->recv_t;
    a.is.expert_ends = &c->ends_t; /* the last field */
    a.bytes[sizeof(a.is)] = behind;
    a.is.size = size;
    c->ends[0] = -7;
    const ep_status st = ep_dispatch(h, &a.is, NULL);
    if (st == EP_OK) {
        ok(c->ends[0] == (size < sizeof(a.is) ? -7 : TOKENS),
           "ep_dispatch_args of %u bytes: expert_ends[0] is %d", size, c->ends[0]);
    }
    return st;
}

static ep_status take_combine(ep_handle *h, struct call *c, uint32_t size,
                              unsigned char behind) {
    WIDE(ep_combine_args) a = {.is = EP_COMBINE_ARGS_INIT};
    a.is.x = &c->recv_t;
    a.is.out = &c->out_t;
    a.bytes[sizeof(a.is)] = behind;
    a.is.size = size;
    return ep_combine(h, &a.is, NULL);
}

static ep_status take_handle(ep_handle *h, struct call *c, uint32_t size,
                             unsigned char behind) {
    WIDE(ep_handle_config) k = {.is = EP_HANDLE_CONFIG_INIT};
    ep_handle *made = NULL;
    (void)h;
    k.is.max_topk = size < sizeof(k.is) ? 99 : 0; /* too many, but a shorter struct lacks it */
    k.bytes[sizeof(k.is)] = behind;
    k.is.size = size;
    const ep_status st = ep_handle_create(&made, c->group, &k.is);
    ep_handle_destroy(&made);
    return st;
}

static void sizes(const char *tag, size_t bytes, take_fn take, ep_handle *h, struct call *c) {
    const uint32_t size = (uint32_t)bytes;
    ok(take(h, c, size, 0) == EP_OK, "%s as it is: %s", tag, ep_last_error());
    ok(take(h, c, size - 8, 0) == EP_OK, "%s, 8 bytes shorter: %s", tag, ep_last_error());
    ok(take(h, c, size + 8, 0) == EP_OK, "%s, 8 bytes longer, all 0: %s", tag, ep_last_error());
    ok(take(h, c, size + 8, 1) == EP_ERR_VERSION && strstr(ep_last_error(), ".size"),
       "%s, 8 bytes longer and one is set: %s", tag, ep_last_error());
    ok(take(h, c, 0, 0) == EP_ERR_VERSION && strstr(ep_last_error(), ".size is 0"),
       "%s without a size: %s", tag, ep_last_error());
    ok(take(h, c, size + 4, 0) == EP_ERR_VERSION && take(h, c, 1 << 20, 0) == EP_ERR_VERSION,
       "%s of no version's size: %s", tag, ep_last_error());
}

/* ---- outputs -------------------------------------------------------------------------------- */

typedef ep_status (*give_fn)(ep_group *g, void *out);

static ep_status give_plan(ep_group *g, void *out) {
    return ep_group_plan(g, out);
}

static ep_status give_stats(ep_group *g, void *out) {
    return ep_group_stats(g, out);
}

static ep_status give_fault(ep_group *g, void *out) {
    return ep_group_fault(g, out);
}

static void outputs(const char *tag, size_t bytes, give_fn give, ep_group *g) {
    static _Alignas(8) unsigned char whole[1024], part[1024];
    memset(whole, POISON, sizeof(whole));
    const uint32_t sizes[] = {(uint32_t)bytes, (uint32_t)bytes - 8, (uint32_t)bytes + 8};
    memcpy(whole, &sizes[0], 4);
    ok(give(g, whole) == EP_OK && whole[bytes] == POISON, "%s as it is", tag);
    for (int i = 1; i < 3; i++) {
        const size_t holds = sizes[i] < bytes ? sizes[i] : bytes;
        memset(part, POISON, sizeof(part));
        memcpy(part, &sizes[i], 4);
        ok(give(g, part) == EP_OK, "%s of %u bytes: %s", tag, sizes[i], ep_last_error());
        ok(memcmp(part, &sizes[i], 4) == 0 && memcmp(part + 4, whole + 4, holds - 4) == 0 &&
               part[holds] == POISON && part[holds + 7] == POISON,
           "%s of %u bytes is written so far, and keeps its size", tag, sizes[i]);
    }
    memset(part, 0, sizeof(part));
    ok(give(g, part) == EP_ERR_VERSION && strstr(ep_last_error(), tag), "%s without a size: %s",
       tag, ep_last_error());
}

/* ---- configurations ------------------------------------------------------------------------- */

static struct ep_group_config small_config(void) {
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;
    c.num_ranks = 1;
    c.rank = 0;
    c.num_experts = 2;
    c.max_tokens = TOKENS;
    c.max_topk = 2;
    c.max_row_bytes = 16;
    return c;
}

/* ep_plan reads one struct and writes another. */
static void configs(void) {
    WIDE(ep_group_config) c = {.is = small_config()};
    WIDE(ep_plan_info) info = {.is = EP_PLAN_INFO_INIT};

    c.is.size += 8;
    ok(ep_plan(&c.is, &info.is) == EP_OK && info.is.num_channels > 0,
       "ep_group_config, 8 bytes longer: %s", ep_last_error());
    c.bytes[sizeof(c.is)] = 1;
    ok(ep_plan(&c.is, &info.is) == EP_ERR_VERSION &&
           strstr(ep_last_error(), "ep_group_config.size"),
       "ep_group_config, 8 bytes longer and one is set: %s", ep_last_error());
    c.is.size = sizeof(c.is) - 8;
    c.is.most_recv_rows = -5; /* the last 8 bytes */
    ok(ep_plan(&c.is, &info.is) == EP_OK, "ep_group_config, 8 bytes shorter: %s",
       ep_last_error());
    info.is.size -= 8;
    memset(&info.is.ll_handle_bytes, POISON, 8);
    ok(ep_plan(&c.is, &info.is) == EP_OK && info.is.ll_handle_bytes != 0 &&
           ((unsigned char *)&info.is.ll_handle_bytes)[0] == POISON,
       "ep_plan_info, 8 bytes shorter: its last field is not written");
    info.is.size = sizeof(info.is) + 8;
    memset(info.bytes + sizeof(info.is), POISON, 8);
    ok(ep_plan(&c.is, &info.is) == EP_OK && info.bytes[sizeof(info.is)] == POISON,
       "ep_plan_info, 8 bytes longer: what it holds behind is not looked at: %s",
       ep_last_error());
}

static void one_rank(struct world *w) {
    static struct call c;
    ep_handle *h = NULL;

    c.group = w->group;
    for (int t = 0; t < TOKENS; t++) {
        c.ids[t][0] = 0;
        c.ids[t][1] = 1;
    }
    ep_tensor_2d(&c.ids_t, EP_I64, c.ids, TOKENS, 2);
    ep_tensor_2d(&c.x_t, EP_F32, c.x, TOKENS, 4);
    ep_tensor_2d(&c.recv_t, EP_F32, c.recv, 2 * TOKENS, 4);
    ep_tensor_2d(&c.out_t, EP_F32, c.out, TOKENS, 4);
    ep_tensor_1d(&c.ends_t, EP_I32, c.ends, 2);
    ep_tensor_1d(&c.per_rank_t, EP_I32, c.per_rank, 1);
    struct ep_plan_info info = EP_PLAN_INFO_INIT;
    ep_group_plan(w->group, &info);
    ep_tensor_2d(&c.prefix_t, EP_I32, c.prefix, 1, info.num_channels);
    ok(ep_handle_create(&h, w->group, NULL) == EP_OK, "a handle: %s", ep_last_error());
    sizes("ep_handle_config", sizeof(struct ep_handle_config), take_handle, h, &c);
    sizes("ep_routing", sizeof(struct ep_routing), take_route, h, &c);
    sizes("ep_tensor", sizeof(struct ep_tensor), take_tensor, h, &c);
    sizes("ep_layout", sizeof(struct ep_layout), take_layout, h, &c);
    sizes("ep_dispatch_args", sizeof(struct ep_dispatch_args), take_dispatch, h, &c);
    sizes("ep_combine_args", sizeof(struct ep_combine_args), take_combine, h, &c);
    outputs("ep_plan_info", sizeof(struct ep_plan_info), give_plan, w->group);
    outputs("ep_group_stats", sizeof(struct ep_group_stats), give_stats, w->group);
    outputs("ep_fault", sizeof(struct ep_fault), give_fault, w->group);
    ep_handle_destroy(&h);
}

int main(void) {
    struct world_setup s;

    tap_deadline(60);
    configs();
    world_defaults(&s, 1);
    s.host = true;
    s.config = small_config();
    s.config.rank = s.config.num_ranks = -1;
    s.body = one_rank;
    ok(world_run(&s) == 0, "a group of one rank");
    return done_testing();
}
