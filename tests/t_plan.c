/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * ep_plan: pure arithmetic. Sums and page sizes, limits and what their messages name, growth
 * with every field, SMs by the documented formula, and a group's arena that is what the plan said,
 * to the byte.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "src/ep/group.h"
#include "tests/cases.h"
#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/world.h"

static struct ep_group_config base(int num_ranks) {
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;

    c.num_ranks = num_ranks;
    c.num_experts = 64;
    c.max_tokens = 128;
    c.max_topk = 8;
    c.max_row_bytes = 1024;
    c.max_scale_bytes = 32;
    return c;
}

/* A random valid configuration. */
static struct ep_group_config random_config(uint64_t *s) {
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;

    c.num_ranks = 1 + (int)case_rand(s, case_rand(s, 5) ? 16 : EP_MAX_RANKS);
    c.num_experts = 1 + (int)case_rand(s, 600);
    c.max_tokens = 1 + (int)case_rand(s, 5000);
    c.max_topk = 1 + (int)case_rand(s, EP_MAX_TOPK);
    c.max_row_bytes = EP_ROW_ALIGN * (int)(1 + case_rand(s, 1000));
    c.max_scale_bytes = (int)case_rand(s, 500);
    c.num_slots = (int)case_rand(s, 5);
    c.max_recv_rows = case_rand(s, 2) ? 1 + case_rand(s, c.max_tokens) : 0;
    c.flags = case_rand(s, 2) ? EP_GROUP_EXPANDED_VIEW : 0;
    c.max_expanded_rows = c.flags && case_rand(s, 2) ? 1 + case_rand(s, 100000) : 0;
    c.mask_routing = (int)case_rand(s, 2);
    return c;
}

static int64_t parts(const struct ep_plan_info *i) {
    return i->control_bytes + i->recv_bytes + i->sidecar_bytes + i->combine_bytes +
           i->expanded_bytes;
}

static bool sums_are_right(const struct ep_plan_info *i) {
    const int64_t page = sysconf(_SC_PAGESIZE);

    return i->control_bytes > 0 && i->recv_bytes > 0 && i->sidecar_bytes > 0 &&
           i->combine_bytes > 0 && i->expanded_bytes >= 0 && i->local_bytes > 0 &&
           i->handle_bytes > 0 && i->num_channels > 0 && i->sidecar_row_bytes > 0 &&
           i->arena_bytes == (parts(i) + page - 1) / page * page;
}

static void sums(uint64_t seed) {
    uint64_t s = seed;

    for (int i = 0; i < 500; i++) {
        const struct ep_group_config c = random_config(&s);
        struct ep_plan_info info = EP_PLAN_INFO_INIT, again = EP_PLAN_INFO_INIT;
        const int64_t worst = (int64_t)c.num_ranks * c.max_tokens;

        if (ep_plan(&c, &info) != EP_OK || ep_plan(&c, &again) != EP_OK ||
            memcmp(&info, &again, sizeof(info)) != 0 || !sums_are_right(&info) ||
            info.max_recv_rows != (c.max_recv_rows ? c.max_recv_rows : worst) ||
            (c.max_expanded_rows && info.max_expanded_rows != c.max_expanded_rows) ||
            (info.max_expanded_rows > 0) != (c.flags != 0)) {
            ok(false,
               "plan %d: %s; control %lld recv %lld sidecar %lld combine %lld expanded "
               "%lld arena %lld; recv rows %lld expanded rows %lld",
               i, ep_last_error(), (long long)info.control_bytes, (long long)info.recv_bytes,
               (long long)info.sidecar_bytes, (long long)info.combine_bytes,
               (long long)info.expanded_bytes, (long long)info.arena_bytes,
               (long long)info.max_recv_rows, (long long)info.max_expanded_rows);
            return;
        }
    }
    ok(true, "500 random plans are sums of their parts in whole pages");
}

static void rows(void) {
    struct ep_group_config c = base(4);
    struct ep_plan_info info = EP_PLAN_INFO_INIT;

    ok(ep_plan(&c, &info) == EP_OK && info.recv_bytes >= 2 * 512 * 1024 &&
           info.max_combine_rows == 128 * 4,
       "rows of two slots fit; a token has at most min(R, K) answers");
    c.max_topk = 2;
    ok(ep_plan(&c, &info) == EP_OK && info.max_combine_rows == 128 * 2, "and with K < R, K");
    c.mask_routing = 1;
    ok(ep_plan(&c, &info) == EP_OK && info.max_combine_rows == 128 * 4, "with masks, R");
    c = base(4);
    c.max_topk = 0;
    c.mask_routing = 1;
    ok(ep_plan(&c, &info) == EP_OK, "max_topk 0 if every routing is a mask");
    c = base(4);
    c.flags = EP_GROUP_EXPANDED_VIEW;
    ok(ep_plan(&c, &info) == EP_OK && info.max_expanded_rows >= 4 * 128 * 8 &&
           info.expanded_bytes >= info.max_expanded_rows * 1024,
       "the worst expanded view holds every selection");
}

/* What low-latency mode takes beside the caller's outputs, for a decode step of a large model. */
static void low_latency(void) {
    struct ep_group_config c = base(4);
    struct ep_plan_info without = EP_PLAN_INFO_INIT, with = EP_PLAN_INFO_INIT;

    c.num_experts = 288;
    c.max_row_bytes = 2 * 7168;
    const ep_status st = ep_plan(&c, &without);
    c.ll_max_tokens = 128;
    ok(st == EP_OK && ep_plan(&c, &with) == EP_OK, "low-latency mode has a plan");
    ok(without.ll_bytes == 0 && without.ll_handle_bytes == 0 &&
           with.ll_bytes > 2 * 4 * 128 * 7168 &&
           with.ll_bytes + with.ll_handle_bytes <= 64 << 20 &&
           with.arena_bytes - without.arena_bytes <= 64 << 20,
       "low-latency mode, 128 tokens of 7168 channels, top-8 of 288, 4 ranks: %lld bytes and "
       "%lld for a handle, at most 64 MB",
       (long long)with.ll_bytes, (long long)with.ll_handle_bytes);
    c.flags = EP_GROUP_LL_EXACT;
    ok(ep_plan(&c, &with) == EP_OK && with.ll_bytes > 2ll * 4 * 128 * 8 * 14336 &&
           with.ll_bytes + with.ll_handle_bytes <= 160 << 20,
       "with room for exact sums: %lld bytes, at most 160 MB", (long long)with.ll_bytes);
}

/* Makes field i larger; false when there is no such field. */
static bool grow(struct ep_group_config *c, int i, const char **name) {
    static const char *const names[] = {
        "num_experts",   "max_tokens",      "max_topk",  "max_row_bytes", "num_slots",
        "max_recv_rows", "max_scale_bytes", "num_ranks", "mask_routing",  "max_expanded_rows"};

    if (i >= 10) {
        return false;
    }
    *name = names[i];
    c->num_experts += i == 0 ? 64 : 0;
    c->max_tokens += i == 1 ? 128 : 0;
    c->max_topk += i == 2 ? 8 : 0;
    c->max_row_bytes += i == 3 ? 1024 : 0;
    c->num_slots += i == 4 ? 2 : 0;
    c->max_recv_rows += i == 5 ? 512 : 0;
    c->max_scale_bytes += i == 6 ? 512 : 0;
    c->num_ranks += i == 7 ? 8 : 0;
    c->mask_routing = i == 8;
    c->max_expanded_rows += i == 9 ? 512 : 0;
    return true;
}

static void growth(void) {
    for (int i = 0;; i++) {
        struct ep_group_config c = base(16);
        struct ep_plan_info small = EP_PLAN_INFO_INIT, large = EP_PLAN_INFO_INIT;
        const char *name;

        c.num_slots = 2;
        c.max_recv_rows = i == 7 ? 0 : 512;
        c.flags = EP_GROUP_EXPANDED_VIEW;
        c.max_expanded_rows = 1024;
        if (ep_plan(&c, &small) != EP_OK || !grow(&c, i, &name)) {
            break;
        }
        ok(ep_plan(&c, &large) == EP_OK &&
               large.arena_bytes + large.handle_bytes + large.local_bytes >
                   small.arena_bytes + small.handle_bytes + small.local_bytes &&
               large.arena_bytes >= small.arena_bytes &&
               large.handle_bytes >= small.handle_bytes,
           "more %s costs more", name);
    }
}

/* The message names a field that, lowered, makes the plan smaller. */
static bool names_a_field(const char *message) {
    static const char *const fields[] = {"max_tokens",     "max_row_bytes", "max_recv_rows",
                                         "num_slots",      "max_topk",      "max_expanded_rows",
                                         "max_scale_bytes"};
    bool named = false;

    for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++) {
        named = named || strstr(message, fields[i]);
    }
    return named;
}

static void limit(void) {
    struct ep_group_config c = base(8);
    struct ep_plan_info info = EP_PLAN_INFO_INIT, over = EP_PLAN_INFO_INIT;
    struct world_setup s;
    char bytes[32];

    ep_plan(&c, &info);
    c.memory_limit_bytes = info.arena_bytes;
    ok(ep_plan(&c, &over) == EP_OK, "an arena of exactly the limit");
    memset(&over, 0, sizeof(over));
    over.size = sizeof(over);
    c.memory_limit_bytes = info.arena_bytes - 1;
    ok(ep_plan(&c, &over) == EP_ERR_NOMEM, "one byte less");
    diag("%s", ep_last_error());
    snprintf(bytes, sizeof(bytes), "%lld", (long long)c.memory_limit_bytes);
    ok(strstr(ep_last_error(), "memory_limit_bytes") && strstr(ep_last_error(), bytes) &&
           names_a_field(ep_last_error()),
       "the message names the limit and what to lower");
    ok(over.arena_bytes == info.arena_bytes && over.recv_bytes == info.recv_bytes,
       "the plan is filled in all the same");
    world_defaults(&s, 2);
    s.config.memory_limit_bytes = 1;
    s.create = EP_ERR_NOMEM;
    s.create_says = "memory_limit_bytes";
    ok(world_run(&s) == 0, "ep_group_create refuses it too");
}

/* Bytes of the memory files this process has mapped. */
static int64_t mapped_bytes(void) {
    FILE *f = fopen("/proc/self/maps", "r");
    unsigned long long from, to;
    char line[512];
    int64_t sum = 0;

    while (f && fgets(line, sizeof(line), f)) {
        if (strstr(line, "/memfd:") && !strstr(line, "tap") &&
            sscanf(line, "%llx-%llx", &from, &to) == 2) {
            sum += (int64_t)(to - from);
        }
    }
    if (f) {
        fclose(f);
    }
    return sum;
}

static void body(struct world *w) {
    const struct ep_plan_info *want = w->ctx;
    struct ep_plan_info got = EP_PLAN_INFO_INIT;

    world_is(w, ep_group_plan(w->group, &got), EP_OK, "ep_group_plan");
    world_check(w, memcmp(&got, want, sizeof(got)) == 0, "the group's plan is another one");
    world_check(w, mapped_bytes() == w->num_ranks * want->arena_bytes,
                "%lld bytes are mapped, not %d arenas of %lld", (long long)mapped_bytes(),
                w->num_ranks, (long long)want->arena_bytes);
}

static void groups(uint64_t seed) {
    uint64_t state = seed;

    for (int i = 0; i < 6; i++) {
        struct ep_plan_info info = EP_PLAN_INFO_INIT;
        struct world_setup s;
        struct ep_group_config c;

        world_defaults(&s, i < 3 ? 1 + i : 3);
        s.config.flags = i % 2 ? EP_GROUP_EXPANDED_VIEW : 0;
        s.config.max_tokens = 1 + (int)case_rand(&state, 300);
        s.config.max_scale_bytes = (int)case_rand(&state, 100);
        c = s.config;
        c.num_ranks = s.num_ranks;
        ok(ep_plan(&c, &info) == EP_OK, "ep_plan");
        s.body = body;
        s.ctx = &info;
        s.processes = i != 0; /* of threads, each would count the others' arenas */
        ok(world_run(&s) == 0, "arenas of %lld bytes, %d ranks", (long long)info.arena_bytes,
           s.num_ranks);
    }
}

/* In how many channels so many tokens travel, and how many each group's have: by the tokens, not by
 * the plan, if it has so many. */
static void channels(void) {
    static const struct {
        int ranks, max_tokens, tokens, num, in_group, size[K_CHANNEL_GROUPS];
        const char *what;
    } t[] = {
        {2, 4096, 4096, 640, 128, {12, 10, 6, 3, 1}, "many tokens"},
        {2, 8192, 4096, 640, 128, {12, 10, 6, 3, 1}, "half of the most"},
        {2, 512, 512, 215, 43, {4, 4, 2, 1, 1}, "more than there are lone channels"},
        {2, 128, 128, 128, 25, {1, 1, 1, 1, 1}, "a channel for each token"},
        {2, 4096, 128, 128, 25, {1, 1, 1, 1, 1}, "the same in a larger plan"},
        {2, 100, 3, 3, 0, {1, 1, 1, 1, 1}, "fewer than there are groups"},
        {2, 100, 0, 1, 0, {1, 1, 1, 1, 1}, "none"},
        {1024, 128, 128, 20, 4, {12, 10, 6, 3, 1}, "many ranks"},
    };

    for (size_t i = 0; EPI_LONE_CHANNELS == 256 && i < sizeof(t) / sizeof(*t); i++) {
        struct ep_group_config c = base(t[i].ranks);
        struct k_channels is;
        struct epi_plan p;

        c.max_tokens = t[i].max_tokens;
        if (!ok(epi_plan(&c, t[i].ranks, NULL, &p) == EP_OK, "%s", t[i].what)) {
            continue;
        }
        epi_plan_channels(&p, t[i].tokens, &is);
        ok(is.num == t[i].num && is.in_group == t[i].in_group && is.tokens == t[i].tokens &&
               memcmp(is.size, t[i].size, sizeof(is.size)) == 0,
           "%s: %d channels, %d in a group, of %d, %d, %d, %d, %d tokens", t[i].what, is.num,
           is.in_group, is.size[0], is.size[1], is.size[2], is.size[3], is.size[4]);
    }
}

/* The formula in docs/performance.md. */
static void sms(void) {
    static const struct {
        int major;
        bool nvlink;
        int ranks;
        struct epi_load load;
        int send, all;
        const char *what;
    } t[] = {
        {9, true, 4, {14336, 8, false, false}, 8, 24, "H100, long rows"},
        {9, true, 4, {6144, 8, false, false}, 8, 24, "H100, long enough"},
        {9, true, 4, {6128, 8, false, false}, 9, 27, "H100, rows a little shorter"},
        {9, true, 4, {4096, 8, false, false}, 12, 36, "H100, rows of 4 KiB"},
        {9, true, 4, {3072, 8, false, false}, 16, 48, "H100, short rows"},
        {9, true, 4, {16, 8, false, false}, 16, 48, "H100, the shortest row"},
        {9, true, 4, {14336, 0, false, false}, 8, 24, "H100, routed by mask"},
        {9, true, 4, {14336, 1, false, false}, 10, 30, "H100, to one peer"},
        {9, true, 2, {14336, 8, false, false}, 10, 30, "H100, one peer"},
        {9, true, 1, {14336, 8, false, false}, 10, 30, "H100, alone"},
        {9, true, 4, {14336, 8, true, false}, 8, 30, "H100, expanded"},
        {9, true, 8, {14336, 8, true, false}, 8, 24, "H100, few expanded"},
        {9, true, 4, {14336, 16, true, false}, 8, 40, "H100, many expanded"},
        {9, true, 2, {14336, 8, true, false}, 10, 50, "H100, one peer, many expanded"},
        {9, true, 4, {14336, 8, false, true}, 9, 24, "H100, answers"},
        {9, true, 4, {14336, 8, true, true}, 9, 30, "H100, expanded answers"},
        {9, true, 2, {14336, 8, false, true}, 9, 30, "H100, answers to one peer"},
        {8, true, 4, {14336, 8, false, false}, 6, 18, "A100"},
        {10, true, 4, {14336, 8, false, false}, 17, 51, "B200"},
        {9, false, 4, {14336, 8, false, false}, 2, 6, "over PCIe"},
    };

    for (size_t i = 0; i < sizeof(t) / sizeof(*t); i++) {
        const struct epi_sms n = epi_sms_for(t[i].major, t[i].nvlink, t[i].ranks, &t[i].load);

        ok(n.send == t[i].send && n.all == t[i].all, "%s: %d of %d SMs send, not %d of %d",
           t[i].what, t[i].send, t[i].all, n.send, n.all);
    }
}

int main(void) {
    gpu_never("no device is in it");
    uint64_t seed = tap_seed();

    tap_deadline(60);
    sums(seed);
    rows();
    low_latency();
    growth();
    limit();
    channels();
    sms();
    groups(seed + 1);
    return done_testing();
}
