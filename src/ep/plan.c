/* SPDX-License-Identifier: MIT */
/*
 * Computes plans. Pure functions; see plan.h.
 */
#include "src/ep/plan.h"

#include <string.h>

#define REGION_ALIGN 256
#define PAGE 4096
#define MAX_ROWS ((int64_t)1 << 30) /* row numbers are 32-bit in words */

static int64_t align_up(int64_t v, int64_t to) {
    return (v + to - 1) / to * to;
}

int epi_default_rank(int num_experts, int num_ranks, int e) {
    int each = num_experts / num_ranks, more = num_experts % num_ranks;
    int split = more * (each + 1); /* experts of the ranks that have one more */
    return e < split ? e / (each + 1) : more + (e - split) / each;
}

static ep_status check_range(const char *name, int64_t value, int64_t min, int64_t max) {
    if (value < min || value > max) {
        return epi_fail(EP_ERR_ARG, "ep_group_config.%s is %lld, must be %lld..%lld", name,
                        (long long)value, (long long)min, (long long)max);
    }
    return EP_OK;
}

ep_status epi_check_map(const char *tag, const int32_t *map, int num_experts, int num_ranks) {
    for (int e = 0; map && e < num_experts; e++) {
        if (map[e] < 0 || map[e] >= num_ranks) {
            return epi_fail(EP_ERR_ARG, "%s.expert_rank[%d] is %d, must be 0..%d", tag, e,
                            map[e], num_ranks - 1);
        }
    }
    return EP_OK;
}

static ep_status check_config(const struct ep_group_config *c, int num_ranks) {
    const struct {
        const char *name;
        int64_t value, min, max;
    } rules[] = {
        {"num_ranks", num_ranks, 1, EP_MAX_RANKS},
        {"num_experts", c->num_experts, 1, 65536},
        {"max_tokens", c->max_tokens, 1, EPI_MOST_TOKENS},
        {"max_topk", c->max_topk, 0, EP_MAX_TOPK},
        {"max_row_bytes", c->max_row_bytes, EP_ROW_ALIGN, 1 << 24},
        {"max_scale_bytes", c->max_scale_bytes, 0, 1 << 20},
        {"num_slots", c->num_slots, 0, 64},
        {"max_recv_rows", c->max_recv_rows, 0, MAX_ROWS},
        {"most_tokens", c->most_tokens ? c->most_tokens : c->max_tokens, c->max_tokens,
         EPI_MOST_TOKENS},
        {"most_recv_rows", c->most_recv_rows ? c->most_recv_rows : c->max_recv_rows,
         c->max_recv_rows, MAX_ROWS},
        {"max_expanded_rows", c->max_expanded_rows, 0, MAX_ROWS},
        {"memory_limit_bytes", c->memory_limit_bytes, 0, INT64_MAX},
        {"timeout_ms", c->timeout_ms ? c->timeout_ms : 100, 100, 86400000},
        {"num_workers", c->num_workers, 0, 1024},
        {"flags", c->flags, 0, EP_GROUP_EXPANDED_VIEW | EP_GROUP_LL_EXACT | EP_GROUP_LL_MASKS},
        {"ll_max_tokens", c->ll_max_tokens, 0, 1 << 20},
        {"ll_timeout_ms", c->ll_timeout_ms, 0, 86400000},
    };
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) {
        EPI_TRY(check_range(rules[i].name, rules[i].value, rules[i].min, rules[i].max));
    }
    if (c->max_topk == 0 && !c->mask_routing) {
        return epi_fail(EP_ERR_ARG,
                        "ep_group_config.max_topk is 0, must be 1..%d, or set "
                        "mask_routing",
                        EP_MAX_TOPK);
    }
    if (c->max_row_bytes % EP_ROW_ALIGN) {
        return epi_fail(EP_ERR_ARG,
                        "ep_group_config.max_row_bytes is %d, must be a multiple of %d",
                        c->max_row_bytes, EP_ROW_ALIGN);
    }
    if (c->ll_max_tokens > 0 && c->max_topk == 0) {
        return epi_fail(EP_ERR_ARG,
                        "ep_group_config.ll_max_tokens is %d and max_topk 0: "
                        "low-latency mode needs expert ids",
                        c->ll_max_tokens);
    }
    if ((c->flags & EP_GROUP_LL_MASKS && !c->ll_max_tokens) ||
        (c->ll_timeout_ms && !(c->flags & EP_GROUP_LL_MASKS))) {
        return epi_fail(
            EP_ERR_ARG, "ep_group_config.%s",
            c->ll_timeout_ms && c->ll_max_tokens
                ? "ll_timeout_ms is set without EP_GROUP_LL_MASKS"
                : "flags has EP_GROUP_LL_MASKS, and ll_max_tokens is 0: there is no "
                  "low-latency mode to mask ranks in");
    }
    return epi_check_map("ep_group_config", c->expert_rank, c->num_experts, num_ranks);
}

static int most_local_experts(const struct ep_group_config *c, int num_ranks) {
    if (!c->expert_rank) {
        return (c->num_experts + num_ranks - 1) / num_ranks;
    }
    int count[EP_MAX_RANKS] = {0}, most = 0;
    for (int e = 0; e < c->num_experts; e++) {
        int n = ++count[c->expert_rank[e]];
        most = n > most ? n : most;
    }
    return most;
}

static int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

/* How many of `most` channels so many tokens use: one at least, by their number alone. */
static int num_channels(int tokens, int num_ranks, int most) {
    const int lone = num_ranks > EPI_LONE_RANKS   ? 1
                     : tokens < EPI_LONE_CHANNELS ? tokens
                                                  : EPI_LONE_CHANNELS;
    const int large = ceil_div(tokens, EPI_CHANNEL_TOKENS), n = large > lone ? large : lone;
    return n > most ? most : n > 0 ? n : 1;
}

/* For how many ranks of other nodes a rank of the node is the relay, at most. */
static int most_sources(const struct epi_nodes *n, int node) {
    int sources = 0;
    for (int d = 0; d < n->num; d++) {
        sources += d != node ? ceil_div(epi_node_ranks(n, d), epi_node_ranks(n, node)) : 0;
    }
    return sources;
}

/* What does not depend on the maxima that may grow: shapes of packets and messages. */
static ep_status set_far(const struct ep_group_config *c, const struct epi_nodes *n,
                         struct epi_plan *p) {
    struct k_far_map *m = &p->far;
    p->num_nodes = n ? n->num : 1;
    if (p->num_nodes == 1) {
        return EP_OK;
    }
    for (int d = 0; d < n->num; d++) {
        const int near = epi_node_ranks(n, d), sources = most_sources(n, d);
        m->most_near = near > m->most_near ? near : m->most_near;
        m->most_sources = sources > m->most_sources ? sources : m->most_sources;
    }
    const int64_t record = c->max_row_bytes + p->info.sidecar_row_bytes;
    const int64_t entry = 4 * (K_FAR_ENTRY + m->most_near);
    const int64_t head = align_up(4 * (K_FAR_HEAD + m->most_near) + entry, 16);
    const int64_t all = head + EPI_CHANNEL_TOKENS * (record + entry);
    m->most_tokens = epi_most_tokens(c);
    m->lanes = EPI_FAR_LANES;
    m->slots = EPI_FAR_SLOTS;
    m->packet_bytes =
        (int)align_up(all < EPI_PACKET_MOST ? all : EPI_PACKET_MOST + head, REGION_ALIGN);
    m->control_bytes = (int)align_up(4 * (int64_t)m->most_near * p->count_words +
                                         4 * (K_FAR_READY_WORDS + m->most_near),
                                     REGION_ALIGN);
    m->relay_rows = 0;
    const int64_t relay_rows =
        (int64_t)m->most_tokens * (p->max_dests < m->most_near ? p->max_dests : m->most_near);
    if (relay_rows * m->most_sources > MAX_ROWS) {
        return epi_fail(EP_ERR_ARG,
                        "a relay would add up %lld answers of %d ranks each, at most %lld in "
                        "all: lower max_tokens",
                        (long long)relay_rows, m->most_sources, (long long)MAX_ROWS);
    }
    m->relay_rows = (k_i32)relay_rows;
    m->block_bytes =
        (uint64_t)(2 * m->slots) * (uint64_t)(m->lanes * m->packet_bytes + m->control_bytes) +
        REGION_ALIGN;
    p->net_lanes = m->lanes;
    p->net_slots = m->slots;
    p->net_write_bytes =
        (uint64_t)(m->packet_bytes > m->control_bytes ? m->packet_bytes : m->control_bytes);
    /* Partners: relays, and sources, of which most are relays. */
    p->net_bytes = m->block_bytes * (uint64_t)(n->num - 1 + m->most_sources);
    return EP_OK;
}

/* Lays out regions one behind the other. */
static uint64_t take(uint64_t *at, int64_t bytes) {
    uint64_t start = *at;
    *at += (uint64_t)align_up(bytes, REGION_ALIGN);
    return start;
}

/*
 * The arena, region by region, in order. A region has one part or several of equal size (slots), and
 * counts towards the sum of its class; one that a configuration has no use for has 0 bytes. A new
 * mode adds rows, and a class if its user has another field to lower.
 */
enum class { CONTROL, RECEIVED, SIDECARS, ANSWERS, VIEWS, LOW_LATENCY, NUM_CLASSES };

struct region {
    enum class of;
    k_u64 *offset;     /* in the map */
    k_u64 *slot_bytes; /* NULL: there is one part */
    int64_t bytes;     /* of a part */
    int64_t used;      /* of these with the maxima; 0: all */
};

struct epi_ll_wire epi_plan_ll_wire(int row_bytes, int topk, int scale_bytes) {
    const int row_at = (int)align_up(16 * topk + 8 * ((scale_bytes + 3) / 4), K_LL_GROUP);
    const int batches = (row_bytes + K_LL_BATCH_BYTES - 1) / K_LL_BATCH_BYTES;
    struct epi_ll_wire w = {row_at, row_at + batches * K_LL_BATCH_WIRE};
    return w;
}

int epi_plan_ll_answer_bytes(int row_bytes) {
    /* LogFMT that encodes nothing has its metadata besides. */
    return (int)align_up(row_bytes + row_bytes / (2 * K_LL_GROUP) * 4, K_LL_GROUP);
}

/* Handles of low-latency mode; returns their bytes. */
static int64_t lay_out_ll_handle(const struct ep_group_config *c, int num_ranks,
                                 struct k_ll_map *m) {
    const int64_t ranks = num_ranks, tokens = c->ll_max_tokens, topk = c->max_topk;
    uint64_t at = 0;
    take(&at, (int64_t)sizeof(struct k_ll_head));
    m->dest = take(&at, tokens * topk * 4);
    m->chosen = take(&at, tokens * topk * 4);
    m->given = take(&at, tokens * topk * 4);
    m->count = take(&at, ranks * 4);
    m->place = take(&at, ranks * tokens * topk * 4);
    m->weight = take(&at, ranks * tokens * topk * 4);
    return (int64_t)at;
}

/* The parts of a region of low-latency mode. */
static void set_ll_parts(const struct ep_group_config *c, struct epi_plan *p) {
    struct k_ll_map *m = &p->ll;
    const int row = c->max_row_bytes, topk = c->max_topk;
    const uint64_t tokens = (uint64_t)c->ll_max_tokens;
    m->counts.stride = (uint64_t)(K_LL_HEADER + p->max_local) * 8;
    m->header.stride = K_LL_HEADER * 8;
    const uint64_t answers = c->flags & EP_GROUP_LL_EXACT ? tokens * (uint64_t)topk : tokens;
    m->answered.stride = answers * K_LL_MOST_SLICES * 8;
    m->weights.stride = tokens * (uint64_t)topk * 8;
    /* A row that is cast is shorter, but short ones have as many batches, and have scales. */
    const int plain = epi_plan_ll_wire(row, topk, c->max_scale_bytes).bytes;
    const int cast = epi_plan_ll_wire(row / 2, topk, row / 2 / K_LL_GROUP * 4).bytes;
    m->rows.stride = tokens * (uint64_t)(plain > cast ? plain : cast);
    m->answers.stride = answers * (uint64_t)epi_plan_ll_answer_bytes(row);
}

/* Of a rank: received, of answers, of an expanded view. */
struct rows {
    int64_t recv, combine, expanded;
};

static void lay_out(const struct ep_group_config *c, struct epi_plan *p,
                    const struct rows *most, int64_t sums[NUM_CLASSES]) {
    struct k_map *m = &p->map;
    const struct ep_plan_info *info = &p->info;
    const int64_t ranks = p->num_ranks, chans = info->num_channels, row = c->max_row_bytes;
    struct k_ll_map *ll = &p->ll;
    struct k_far_map *far = &p->far;
    const int64_t nodes = p->num_nodes > 1 ? p->num_nodes : 0;
    const int64_t relayed = nodes ? (int64_t)far->most_sources * far->relay_rows : 0;
    const int64_t ll_parts = c->ll_max_tokens ? 2 * ranks : 0; /* two slots, by rank */
    const struct region regions[] = {
        {CONTROL, &m->board, NULL, (int64_t)sizeof(struct k_board), 0},
        {CONTROL, &m->ready, NULL, 2 * ranks * K_READY_STRIDE * 8, 0},
        {CONTROL, &m->counts, NULL, 2 * ranks * p->count_words * 8, 0},
        {CONTROL, &m->bases, NULL, 2 * ranks * K_BASE_WORDS * 8, 0},
        {CONTROL, &m->progress, NULL, ranks * chans * 8, 0},
        {CONTROL, &m->returned, NULL, ranks * chans * 8, 0},
        {CONTROL, &far->relayed, NULL, nodes * far->most_sources * far->most_near * chans * 8,
         0},
        {CONTROL, &far->returned, NULL, nodes * chans * 8, 0},
        {RECEIVED, &m->recv, &m->recv_slot_bytes, most->recv * row, info->max_recv_rows * row},
        {SIDECARS, &m->side, &m->side_slot_bytes, most->recv * info->sidecar_row_bytes,
         info->max_recv_rows * info->sidecar_row_bytes},
        {ANSWERS, &m->land, NULL, most->combine * row, info->max_combine_rows * row},
        {ANSWERS, &m->land_side, NULL, most->combine * c->max_topk * 4,
         info->max_combine_rows * c->max_topk * 4},
        {ANSWERS, &far->relay_land, NULL, relayed * row, 0},
        {ANSWERS, &far->relay_side, NULL, relayed * c->max_topk * 4, 0},
        {ANSWERS, &far->land, NULL, nodes * far->most_tokens * row, 0},
        {ANSWERS, &far->land_side, NULL, nodes * far->most_tokens * c->max_topk * 4, 0},
        {VIEWS, &m->expanded, &m->expanded_slot_bytes, most->expanded * row,
         info->max_expanded_rows * row},
        {LOW_LATENCY, &ll->counts.at, NULL, ll_parts * (int64_t)ll->counts.stride, 0},
        {LOW_LATENCY, &ll->header.at, NULL, ll_parts * (int64_t)ll->header.stride, 0},
        {LOW_LATENCY, &ll->answered.at, NULL, ll_parts * (int64_t)ll->answered.stride, 0},
        {LOW_LATENCY, &ll->weights.at, NULL, ll_parts * (int64_t)ll->weights.stride, 0},
        {LOW_LATENCY, &ll->consumed, NULL, ll_parts * K_LL_KINDS * 8, 0},
        {LOW_LATENCY, &ll->masked_by, NULL, ll_parts * 4, 0},
        {LOW_LATENCY, &ll->waits, NULL, ll_parts * 4, 0},
        {LOW_LATENCY, &ll->meeting, NULL, ll_parts * K_LL_MEETING * 4, 0},
        {LOW_LATENCY, &ll->rows.at, NULL, ll_parts * (int64_t)ll->rows.stride, 0},
        {LOW_LATENCY, &ll->answers.at, NULL, ll_parts * (int64_t)ll->answers.stride, 0},
    };
    uint64_t at = 0;
    int64_t all = 0;
    memset(sums, 0, NUM_CLASSES * sizeof(sums[0]));
    for (size_t i = 0; i < sizeof(regions) / sizeof(regions[0]); i++) {
        const struct region *r = &regions[i];
        const int64_t part = align_up(r->bytes, REGION_ALIGN),
                      parts = r->slot_bytes ? p->num_slots : 1;
        const int64_t used = r->used ? align_up(r->used, REGION_ALIGN) : part;
        *r->offset = take(&at, part * parts);
        if (r->slot_bytes) {
            *r->slot_bytes = (uint64_t)part;
        }
        p->use[i] =
            (struct epi_mem_use){*r->offset, (uint64_t)part, (uint64_t)used, (uint64_t)parts};
        sums[r->of] += used * parts;
        all += used * parts;
    }
    sums[CONTROL] += align_up(all, PAGE) - all; /* the rest of the last page */
    p->length = (uint64_t)align_up((int64_t)at, PAGE);
    p->num_uses = epi_plan_grows(c) ? (int)(sizeof(regions) / sizeof(regions[0])) : 0;
    _Static_assert(sizeof(regions) / sizeof(regions[0]) <= EPI_MAX_USES, "regions");
}

static void fill_info(struct ep_plan_info *info, const int64_t sums[NUM_CLASSES]) {
    info->arena_bytes = 0;
    info->control_bytes = sums[CONTROL];
    info->recv_bytes = sums[RECEIVED];
    info->sidecar_bytes = sums[SIDECARS];
    info->combine_bytes = sums[ANSWERS];
    info->expanded_bytes = sums[VIEWS];
    info->ll_bytes = sums[LOW_LATENCY];
    for (int i = 0; i < NUM_CLASSES; i++) {
        info->arena_bytes += sums[i];
    }
}

static ep_status check_limit(const struct ep_group_config *c, const struct ep_plan_info *info,
                             const int64_t sums[NUM_CLASSES]) {
    const struct {
        int64_t bytes;
        const char *lower;
    } most[] = {
        {sums[RECEIVED] + sums[SIDECARS], "max_recv_rows (received rows take most)"},
        {sums[ANSWERS], "max_tokens or max_row_bytes (answers take most)"},
        {sums[CONTROL], "max_tokens (control words take most)"},
        {sums[VIEWS], "max_expanded_rows (expanded views take most)"},
        {sums[LOW_LATENCY], "ll_max_tokens (low-latency mode takes most)"},
    };
    size_t largest = 0;
    for (size_t i = 1; i < sizeof(most) / sizeof(most[0]); i++) {
        largest = most[i].bytes > most[largest].bytes ? i : largest;
    }
    if (!c->memory_limit_bytes || info->arena_bytes <= c->memory_limit_bytes) {
        return EP_OK;
    }
    return epi_fail(
        EP_ERR_NOMEM, "the arena needs %lld bytes, memory_limit_bytes is %lld: lower %s",
        (long long)info->arena_bytes, (long long)c->memory_limit_bytes, most[largest].lower);
}

/* With so many tokens and at most so many received rows; 0: the worst case. */
static ep_status resolve_rows(const struct ep_group_config *c, const struct epi_plan *p,
                              int64_t tokens, int64_t max_recv_rows, struct rows *out) {
    const int64_t worst = tokens * p->num_ranks;
    out->recv = max_recv_rows && max_recv_rows < worst ? max_recv_rows : worst;
    out->recv =
        c->most_recv_rows && out->recv > c->most_recv_rows ? c->most_recv_rows : out->recv;
    out->combine = tokens * p->max_dests;
    out->expanded = 0;
    if (c->flags & EP_GROUP_EXPANDED_VIEW) {
        const int64_t most =
            out->recv * c->max_topk + (int64_t)p->max_local * EPI_EXPANDED_SLACK;
        out->expanded = c->max_expanded_rows ? c->max_expanded_rows : most;
    } else if (c->max_expanded_rows) {
        return epi_fail(
            EP_ERR_ARG,
            "ep_group_config.max_expanded_rows is %lld without EP_GROUP_EXPANDED_VIEW",
            (long long)c->max_expanded_rows);
    }
    const struct {
        const char *what, *lower;
        int64_t rows;
    } sums[] = {{"max_recv_rows", "max_recv_rows or max_tokens", out->recv},
                {"answers of a rank", "max_tokens or max_topk", out->combine},
                {"max_expanded_rows", "max_expanded_rows", out->expanded}};
    for (size_t i = 0; i < sizeof(sums) / sizeof(sums[0]); i++) {
        if (sums[i].rows > MAX_ROWS) {
            return epi_fail(EP_ERR_ARG, "%s would be %lld rows, at most %lld: lower %s",
                            sums[i].what, (long long)sums[i].rows, (long long)MAX_ROWS,
                            sums[i].lower);
        }
    }
    return EP_OK;
}

ep_status epi_plan(const struct ep_group_config *c, int num_ranks,
                   const struct epi_nodes *nodes, struct epi_plan *p) {
    memset(p, 0, sizeof(*p));
    EPI_TRY(check_config(c, num_ranks));
    p->info.size = sizeof(p->info);
    p->num_ranks = num_ranks;
    p->num_slots = c->num_slots ? c->num_slots : 2;
    p->max_local = most_local_experts(c, num_ranks);
    p->max_dests = c->mask_routing || c->max_topk > num_ranks ? num_ranks : c->max_topk;
    p->info.num_channels = num_channels(epi_most_tokens(c), num_ranks, EPI_MAX_CHANNELS);
    p->count_words = 1 + p->max_local + p->info.num_channels;
    p->info.sidecar_row_bytes =
        K_SIDE_BYTES(K_SIDE_SCALES((int64_t)c->max_topk, true), (int64_t)c->max_scale_bytes);
    /* One more than workers: for what a thread runs beside them (src/run/host.c). */
    p->info.local_bytes = (int64_t)(epi_plan_table_bytes(num_ranks) +
                                    epi_plan_expert_bytes(c->num_experts, num_ranks) +
                                    (size_t)(c->num_workers ? c->num_workers + 1 : 2) *
                                        epi_plan_warp_bytes(c, p));
    EPI_TRY(set_far(c, nodes, p));
    return epi_plan_again(c, p);
}

ep_status epi_plan_again(const struct ep_group_config *c, struct epi_plan *p) {
    int64_t sums[NUM_CLASSES];
    struct rows rows, most;
    EPI_TRY(resolve_rows(c, p, c->max_tokens, c->max_recv_rows, &rows));
    EPI_TRY(resolve_rows(c, p, epi_most_tokens(c),
                         c->most_recv_rows ? c->most_recv_rows : c->max_recv_rows, &most));
    p->info.max_recv_rows = rows.recv;
    p->info.max_combine_rows = rows.combine;
    p->info.max_expanded_rows = rows.expanded;
    p->most_recv_rows = most.recv;
    set_ll_parts(c, p);
    lay_out(c, p, &most, sums);
    fill_info(&p->info, sums);
    if (c->ll_max_tokens) {
        p->info.ll_handle_bytes = lay_out_ll_handle(c, p->num_ranks, &p->ll);
    }
    struct k_handle h;
    const struct ep_handle_config whole = {sizeof(whole), c->max_tokens, c->max_topk, 0};
    p->info.handle_bytes = (int64_t)epi_plan_handle(c, p, &whole, 0, &h);
    return check_limit(c, &p->info, sums);
}

/* Channels of one token, and fewer channels than groups, are alike. */
void epi_plan_channels(const struct epi_plan *p, int tokens, struct k_channels *out) {
    static const int parts[K_CHANNEL_GROUPS] = {12, 10, 6, 3, 1}, all = 32;
    const int num = num_channels(tokens, p->num_ranks, p->info.num_channels);
    memset(out, 0, sizeof(*out));
    out->tokens = tokens;
    out->num = num;
    out->in_group = num / K_CHANNEL_GROUPS;
    const bool differ = out->in_group && tokens > num;
    int each = 0; /* of a channel of every group */
    for (int i = 0; i < K_CHANNEL_GROUPS; i++) {
        const int size =
            differ ? ceil_div(parts[i] * tokens, all * out->in_group) : ceil_div(tokens, num);
        out->size[i] = size ? size : 1; /* divisors, also of nothing */
        each += out->size[i];
    }
    if (differ) { /* sizes are rounded up: without this the last channels would be empty */
        out->in_group = ceil_div(tokens, each);
        out->num = K_CHANNEL_GROUPS * out->in_group;
    }
}

size_t epi_plan_table_bytes(int num_ranks) {
    return sizeof(struct k_ll_ctl) + (size_t)num_ranks * (sizeof(struct k_ll_peer) + 16);
}

size_t epi_plan_expert_bytes(int num_experts, int num_ranks) {
    return (size_t)num_experts * 12 + ((size_t)num_ranks + 1) * 4;
}

int epi_plan_stage_bytes(int row_bytes) {
    return row_bytes < EPI_HOST_STAGE_MIN   ? EPI_HOST_STAGE_MIN
           : row_bytes > EPI_HOST_STAGE_MAX ? EPI_HOST_STAGE_MAX
                                            : row_bytes;
}

size_t epi_plan_warp_bytes(const struct ep_group_config *c, const struct epi_plan *p) {
    const int stage = epi_plan_stage_bytes(c->max_row_bytes);
    const int ring = K_RING_BYTES(EPI_HOST_STAGES, stage);
    return (size_t)K_SCRATCH_BYTES(p->max_dests) +
           (size_t)(c->ll_max_tokens && ring < K_LL_STAGE_BYTES ? K_LL_STAGE_BYTES : ring);
}

size_t epi_plan_handle(const struct ep_group_config *c, const struct epi_plan *p,
                       const struct ep_handle_config *most, uint64_t block,
                       struct k_handle *k) {
    const int64_t ranks = p->num_ranks, chans = p->info.num_channels, tokens = most->max_tokens;
    const int64_t experts = c->num_experts, topk = most->max_topk, local = p->max_local;
    const int64_t come =
        tokens + (ranks - 1) * c->max_tokens; /* rows: peers may have larger ones */
    /* Where a peer may have grown and this rank not, what may come is not known. */
    const bool sure = !epi_plan_grows(c);
    const int64_t rows = sure && come < p->info.max_recv_rows ? come : p->info.max_recv_rows;
    const int64_t columns = K_ROUTE_COLUMNS(experts, ranks);
    const int64_t blocks = chans < K_MAX_BLOCKS ? chans : K_MAX_BLOCKS; /* of route, at most */
    uint64_t at = block;
#define TAKE(field, bytes) k->field = (void *)(uintptr_t)take(&at, bytes)
    TAKE(num_dests, tokens * 4);
    TAKE(dest_rank, tokens * p->max_dests * 4);
    TAKE(dest_slot, tokens * p->max_dests * 4);
    TAKE(ids, tokens * topk * 4);
    TAKE(sel_index, tokens * topk * 4);
    TAKE(send_count, ranks * 4);
    TAKE(send_base, (ranks + 1) * 4);
    TAKE(send_chan, ranks * (chans + 1) * 4);
    TAKE(send_expert, experts * 4);
    TAKE(counters, (chans + blocks) * columns * 4);
    TAKE(bad, 8);
    TAKE(recv_count, ranks * 4);
    TAKE(recv_base, (ranks + 1) * 4);
    TAKE(recv_chan, ranks * (chans + 1) * 4);
    TAKE(recv_channels, (ranks + 1) * 4);
    TAKE(recv_expert, ranks * local * 4);
    TAKE(expert_base, ranks * local * 4);
    TAKE(expert_start, (local + 1) * 4);
    TAKE(expert_rows, (local + 1) * 4);
    TAKE(remote_base, ranks * 4);
    TAKE(remote_where, ranks * 4);
    TAKE(answered, ranks * chans * 8);
    TAKE(expand_row, rows * topk * 4);
    TAKE(totals, blocks * columns * 8);
    TAKE(counts, (int64_t)sizeof(struct k_counts));
    TAKE(sync, 8);
#undef TAKE
    _Static_assert(REGION_ALIGN == K_FAR_BEHIND, "a relay's list lies behind sync");
    take(&at, (int64_t)p->far.most_sources *
                  (8 * p->far.lanes +
                   4 * (int64_t)p->far.most_tokens * (K_FAR_ENTRY + p->far.most_near)));
    k->notice = k->counts;
    return (size_t)(at - block);
}
