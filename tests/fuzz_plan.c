/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the plan: any bytes become a configuration. Checked beyond what the sanitizers see (no
 * overflow, no bad access): a refusal has a sentence; sums are right; the regions of the arena are
 * aligned, lie one behind the other and inside it, and hold what they must; so do a handle's
 * arrays; nothing is refused for its memory without a limit; and it is all the same twice.
 *
 * A number is a byte that says of which kind it is, then its bytes; what is missing is 0.
 */
#include <stdlib.h>
#include <string.h>

#include "src/ep/plan.h"
#include "tests/fuzz.h"

#define PAGE 4096
#define ALIGN 256
#define MAX_EXPERTS 65536

struct input {
    const uint8_t *at;
    size_t left;
};

static uint64_t raw(struct input *in, int num_bytes) {
    uint64_t v = 0;
    for (int i = 0; i < num_bytes; i++) {
        v |= in->left ? (uint64_t)*in->at << (8 * i) : 0;
        in->at += in->left > 0;
        in->left -= in->left > 0;
    }
    return v;
}

/* Small numbers, powers of two and their neighbours, and any bits at all. */
static int64_t number(struct input *in) {
    const uint64_t kind = raw(in, 1), high = kind >> 3;
    switch (kind & 7) {
    case 0:
        return (int64_t)high;
    case 1:
        return (int64_t)raw(in, 1) * 16;
    case 2:
        return (int64_t)raw(in, 2);
    case 3:
        return (int32_t)(uint32_t)raw(in, 4);
    case 4:
        return (int64_t)raw(in, 8);
    case 5:
        return (int64_t)1 << high;
    case 6:
        return ((int64_t)1 << high) - 1;
    default:
        return -(int64_t)high;
    }
}

/* The map of experts to ranks, mostly within bounds; the rest of the input, over and over. */
static int32_t *make_map(struct input *in, int num_experts, int num_ranks) {
    const struct input start = *in;
    int32_t *map = malloc((size_t)num_experts * sizeof(*map));
    must(map != NULL);
    for (int e = 0; e < num_experts; e++) {
        if (in->left == 0) {
            *in = start;
        }
        const int v = (int)raw(in, 2);
        map[e] = v == 0xffff ? v : num_ranks > 0 ? v % num_ranks : v;
    }
    return map;
}

/* `claimed`: the size that the caller's struct says it has. */
static int32_t *read_config(struct input *in, struct ep_group_config *c, uint32_t *claimed) {
    const uint64_t how = raw(in, 1);
    *c = (struct ep_group_config)EP_GROUP_CONFIG_INIT;
    c->num_ranks = (int32_t)number(in);
    c->num_experts = (int32_t)number(in);
    c->max_tokens = (int32_t)number(in);
    c->max_topk = (int32_t)number(in);
    c->max_row_bytes = (int32_t)number(in);
    c->max_scale_bytes = (int32_t)number(in);
    c->num_slots = (int32_t)number(in);
    c->flags = (uint32_t)number(in);
    c->max_recv_rows = number(in);
    c->max_expanded_rows = number(in);
    c->memory_limit_bytes = number(in);
    c->timeout_ms = number(in);
    c->num_workers = (int32_t)number(in);
    c->mask_routing = (int32_t)number(in);
    if (how & 1) {
        c->max_row_bytes &= ~(EP_ROW_ALIGN - 1);
    }
    *claimed = c->size ^ ((how & 6) == 6 ? (uint32_t)raw(in, 4) : 0);
    int32_t *map = NULL;
    if ((how & 8) && c->num_experts > 0 && c->num_experts <= MAX_EXPERTS) {
        map = make_map(in, c->num_experts, c->num_ranks);
    }
    c->expert_rank = map;
    if (how & 16) {
        c->most_tokens = number(in);
        c->most_recv_rows = number(in);
    }
    return map;
}

/* The next region of the arena: where the last one ended, give or take its alignment. */
static void region(uint64_t *end, uint64_t at, int64_t bytes) {
    must(bytes >= 0 && at % ALIGN == 0 && at >= *end && at - *end < ALIGN);
    *end = at + (uint64_t)bytes;
}

/* What the maxima use is within what the ceilings have, and larger maxima move nothing. */
static void check_growth(const struct ep_group_config *c, const struct epi_plan *p) {
    struct ep_group_config most = *c;
    struct epi_plan all = *p;
    uint64_t end = 0, used = 0;
    most.max_tokens = epi_most_tokens(c);
    most.max_recv_rows = c->most_recv_rows ? c->most_recv_rows : c->max_recv_rows;
    most.memory_limit_bytes = 0;
    must(epi_plan_again(&most, &all) == EP_OK);
    must(memcmp(&all.map, &p->map, sizeof(p->map)) == 0 && all.length == p->length);
    must((uint64_t)all.info.arena_bytes == all.length);
    for (int i = 0; i < p->num_uses; i++) {
        const struct epi_mem_use *u = &p->use[i];
        must(u->at >= end && u->used <= all.use[i].used && all.use[i].used <= u->stride);
        end = u->at + u->parts * u->stride;
        used += u->parts * u->used;
    }
    must(end <= p->length && (uint64_t)p->info.arena_bytes - used < PAGE);
}

static void check_map(const struct ep_group_config *c, const struct epi_plan *p) {
    if (epi_plan_grows(c)) {
        check_growth(c, p);
        return;
    }
    const struct ep_plan_info *i = &p->info;
    const struct k_map *m = &p->map;
    const int64_t ranks = c->num_ranks, chans = i->num_channels;
    uint64_t end = 0;
    region(&end, m->board, (int64_t)sizeof(struct k_board));
    region(&end, m->ready, 2 * ranks * K_READY_STRIDE * 8);
    region(&end, m->counts, 2 * ranks * p->count_words * 8);
    region(&end, m->bases, 2 * ranks * K_BASE_WORDS * 8);
    region(&end, m->progress, ranks * chans * 8);
    region(&end, m->returned, ranks * chans * 8);
    region(&end, m->recv, (int64_t)m->recv_slot_bytes * p->num_slots);
    region(&end, m->side, (int64_t)m->side_slot_bytes * p->num_slots);
    region(&end, m->land, i->max_combine_rows * c->max_row_bytes);
    region(&end, m->land_side, i->max_combine_rows * c->max_topk * 4);
    region(&end, m->expanded, (int64_t)m->expanded_slot_bytes * p->num_slots);
    must(end <= (uint64_t)i->arena_bytes && (uint64_t)i->arena_bytes - end < PAGE + ALIGN);
    must(m->recv_slot_bytes >= (uint64_t)(i->max_recv_rows * c->max_row_bytes));
    must(m->side_slot_bytes >= (uint64_t)(i->max_recv_rows * i->sidecar_row_bytes));
    must(m->expanded_slot_bytes >= (uint64_t)(i->max_expanded_rows * c->max_row_bytes));
    must(m->recv_slot_bytes % ALIGN == 0 && m->side_slot_bytes % ALIGN == 0 &&
         m->expanded_slot_bytes % ALIGN == 0);
}

static void check_info(const struct ep_group_config *c, const struct epi_plan *p) {
    const struct ep_plan_info *i = &p->info;
    const int64_t parts = i->control_bytes + i->recv_bytes + i->sidecar_bytes +
                          i->combine_bytes + i->expanded_bytes;
    must(i->size == sizeof(*i) && parts == i->arena_bytes && i->arena_bytes % PAGE == 0);
    must(i->control_bytes > 0 && i->recv_bytes > 0 && i->sidecar_bytes > 0 &&
         i->combine_bytes > 0 && i->expanded_bytes >= 0 && i->local_bytes > 0);
    must(i->num_channels >= 1 && i->num_channels <= EPI_MAX_CHANNELS);
    must(i->max_recv_rows >= 1 && i->max_recv_rows <= (int64_t)c->max_tokens * c->num_ranks);
    must(i->max_combine_rows >= c->max_tokens);
    must((i->max_expanded_rows > 0) <= ((c->flags & EP_GROUP_EXPANDED_VIEW) != 0));
    must(i->sidecar_row_bytes >= 4 * (1 + 3 * (int64_t)c->max_topk) + c->max_scale_bytes &&
         i->sidecar_row_bytes % 16 == 0);
    must(p->max_dests >= 1 && p->max_dests <= c->num_ranks);
    must((int64_t)p->max_local * c->num_ranks >= c->num_experts);
    must(p->num_slots >= 1 && p->num_slots <= 64);
}

/* From one array of a handle to what is behind it. */
static size_t gap(const void *from, const void *to) {
    must((uintptr_t)to >= (uintptr_t)from && (uintptr_t)to % ALIGN == 0);
    return (uintptr_t)to - (uintptr_t)from;
}

static void check_handle(const struct ep_group_config *c, const struct epi_plan *p) {
    struct k_handle h = {0};
    const uintptr_t block = (uintptr_t)1 << 40;
    struct k_handle less = {0};
    const struct ep_handle_config most = {sizeof(most), c->max_tokens, c->max_topk, 0};
    const struct ep_handle_config least = {sizeof(least), 1, c->max_topk ? 1 : 0, 0};
    const size_t bytes = epi_plan_handle(c, p, &most, block, &h);
    must(epi_plan_handle(c, p, &least, block, &less) <= bytes);
    must(bytes == (size_t)p->info.handle_bytes && (uintptr_t)h.num_dests == block);
    const size_t tokens = (size_t)c->max_tokens, topk = (size_t)c->max_topk;
    must(gap(h.num_dests, h.dest_rank) >= tokens * 4);
    must(gap(h.dest_rank, h.dest_slot) >= tokens * (size_t)p->max_dests * 4);
    must(gap(h.ids, h.sel_index) >= tokens * topk * 4);
    must(gap(h.expand_row, h.counts) >= (size_t)p->info.max_recv_rows * topk * 4);
    const size_t columns = K_ROUTE_COLUMNS((size_t)c->num_experts, (size_t)p->num_ranks);
    must(gap(h.counters, h.totals) >= (size_t)p->info.num_channels * columns * 4);
    must(block + bytes - (uintptr_t)h.sync >= 8);
}

/* A caller's struct of any size: what lies behind it is 0, as far as one may be. */
static void check_size(const struct ep_group_config *c, uint32_t claimed, ep_status st) {
    union {
        struct ep_group_config is;
        unsigned char bytes[1024];
    } wide;
    struct ep_plan_info info = EP_PLAN_INFO_INIT;
    memset(&wide, 0, sizeof(wide));
    wide.is = *c;
    wide.is.size = claimed;
    const ep_status got = ep_plan(&wide.is, &info);
    if (claimed < 8 || claimed > sizeof(wide) || claimed % 8) {
        must(got == EP_ERR_VERSION);
    } else {
        must(claimed < sizeof(*c) ? got != EP_ERR_VERSION : got == st);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    struct input in = {data, bytes};
    struct ep_group_config c;
    struct epi_plan p, again;
    struct ep_plan_info info = EP_PLAN_INFO_INIT;
    uint32_t claimed;
    int32_t *map = read_config(&in, &c, &claimed);
    epi_clear_error();
    const ep_status st = epi_plan(&c, c.num_ranks, NULL, &p);
    must(st == EP_OK || st == EP_ERR_ARG || st == EP_ERR_NOMEM);
    must((st == EP_OK) == (epi_error_text()[0] == 0));
    if (st == EP_OK || st == EP_ERR_NOMEM) {
        check_info(&c, &p);
        check_map(&c, &p);
        check_handle(&c, &p);
        must((st == EP_ERR_NOMEM) ==
             (c.memory_limit_bytes > 0 && p.info.arena_bytes > c.memory_limit_bytes));
        for (int e = 0; e < c.num_experts; e += 1 + c.num_experts / 64) {
            const int r = epi_default_rank(c.num_experts, c.num_ranks, e);
            must(r >= 0 && r < c.num_ranks);
        }
    }
    must(epi_plan(&c, c.num_ranks, NULL, &again) == st && memcmp(&p, &again, sizeof(p)) == 0);
    must(ep_plan(&c, &info) == st);
    must((st != EP_OK && st != EP_ERR_NOMEM) || memcmp(&info, &p.info, sizeof(info)) == 0);
    check_size(&c, claimed, st);
    free(map);
    return 0;
}
