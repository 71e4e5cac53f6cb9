/* SPDX-License-Identifier: MIT */
/*
 * route: from expert ids (or a token-in-rank mask) to the send side of a handle. Local to a rank.
 *
 * Every place is a stable prefix sum over tokens, so it depends on the routing alone: a warp takes
 * whole channels and walks their tokens in order, counting per rank and per expert; then the
 * counts of channels are summed up; then each channel adds what comes before it. No atomics.
 */
#include "kernel/op.h"

/* Selections that a warp looks at together. */
#define BATCH 64

struct route_scratch {
    k_i32 rank[BATCH];  /* of each selection, -1: none */
    k_i32 id[BATCH];    /* -1: none */
    k_i32 first[BATCH]; /* this selection is its token's first of its rank */
    /* At the last of the batch that names an expert, how often it was named; at the last first
     * of a rank, how many there are; else 0. */
    k_u16 expert_count[BATCH], rank_count[BATCH];
};

_Static_assert(sizeof(struct route_scratch) <= K_SCRATCH_BYTES(1), "route_scratch");
_Static_assert(BATCH >= K_MAX_TOPK, "a batch holds a token");

/*
 * Barrier number `step` (0, 1) of all blocks. Each has words of its own: a block that is through
 * the first may arrive at the second before another has seen that it was at the first.
 */
static K_FN k_bool route_sync(struct k_thread *k, const struct k_handle *h, k_i32 step) {
    k_u64 *words = h->sync + 2 + step * K_MAX_BLOCKS;
    k_bool ok = k_barrier(k, 1);
    if (k->num_blocks == 1) {
        return ok;
    }
    k_u32 mark = (k_u32)k_peek(&h->sync[0]) + 1u;
    if (k->warp == 0 && k->lane == 0) {
        k_publish_local(&words[k->block], K_WORD(mark, 0));
    }
    if (k->warp == 0) {
        for (k_i32 b = 0; b < k->num_blocks; b += K_LANES) {
            k_i32 mine = b + k->lane;
            k_u32 value = 0;
            ok = k_await(k, mine < k->num_blocks ? &words[mine] : 0, mark, k->g->rank,
                         K_PHASE_SELF, &value) &&
                 ok;
        }
    }
    return k_barrier(k, ok);
}

/* Expert id of selection j of token t; -1 if not selected, -2 if there is no such expert. */
static K_INLINE k_i32 read_id(const struct k_route_args *a, k_i32 t, k_i32 j) {
    k_u64 at = a->ids.data + (k_u64)((k_i64)t * a->ids.s0 + (k_i64)j * a->ids.s1);
    k_i64 id = a->id_bytes == 8 ? *(const k_i64 *)at : (k_i64) * (const k_i32 *)at;
    if (id >= 0 && id < a->g.num_experts) {
        return (k_i32)id;
    }
    return id == -1 || a->lenient ? -1 : -2;
}

/* What channel c counts of an expert or a rank: a row of channels for each. */
static K_INLINE k_u32 *expert_counter(const struct k_route_args *a, k_i32 e, k_i32 c) {
    return a->h.chan_expert + (k_i64)e * a->g.num_channels + c;
}

static K_INLINE k_u32 *rank_counter(const struct k_route_args *a, k_i32 r, k_i32 c) {
    return a->h.send_chan + (k_i64)r * (a->g.num_channels + 1) + c;
}

/* Reads the selections of tokens [t0, t0 + n / K) into the scratch. */
static K_FN void read_batch(struct k_thread *k, const struct k_route_args *a, k_i32 c, k_i32 t0,
                            k_i32 n, struct route_scratch *s) {
    const k_i32 topk = a->topk;
    for (k_i32 i = k->lane; i < n; i += K_LANES) {
        const k_u64 number = (k_u64)t0 * (k_u64)topk + (k_u64)i;
        k_i32 id = read_id(a, t0 + i / topk, i % topk);
        if (id == -2) {
            k_lower(&a->h.chan_bad[c], number);
            id = -1;
        }
        s->id[i] = id;
        s->rank[i] = id < 0 ? -1 : a->g.expert_rank[id];
        a->h.ids[number] = id;
    }
    k_syncwarp(k);
    for (k_i32 i = k->lane; i < n; i += K_LANES) {
        k_i32 first = s->rank[i] >= 0;
        for (k_i32 j = i - i % topk; j < i; j++) {
            first = first && s->rank[j] != s->rank[i];
        }
        s->first[i] = first;
    }
    k_syncwarp(k);
}

/* Writes destinations and expert indices of a batch, counted from the start of its channel. */
static K_FN void place_batch(struct k_thread *k, const struct k_route_args *a, k_i32 c,
                             k_i32 t0, k_i32 n, struct route_scratch *s) {
    const struct k_handle *h = &a->h;
    const k_i32 topk = a->topk;
    for (k_i32 i = k->lane; i < n; i += K_LANES) {
        const k_i32 t = t0 + i / topk, r = s->rank[i], id = s->id[i];
        const k_i32 begin = i - i % topk, end = begin + topk;
        k_i32 same = 0, later = 0, slot = 0, later_slot = 0, before = 0, num = 0;
        for (k_i32 j = 0; j < n; j++) { /* all of the batch: its order is the result */
            const k_i32 named = s->id[j] == id, goes = s->first[j] && s->rank[j] == r;
            same += j < i ? named : 0;
            later += j > i ? named : 0;
            slot += j < i ? goes : 0;
            later_slot += j > i ? goes : 0;
        }
        for (k_i32 j = begin; j < end; j++) {
            before += s->first[j] && s->rank[j] < r;
            num += s->first[j];
        }
        if (s->first[i]) {
            const k_i64 at = (k_i64)t * a->g.max_dests + before;
            h->dest_rank[at] = r;
            h->dest_slot[at] = *rank_counter(a, r, c) + (k_u32)slot;
        }
        h->sel_index[(k_i64)t * topk + i % topk] =
            id < 0 ? 0 : *expert_counter(a, id, c) + (k_u32)same;
        s->expert_count[i] = (k_u16)(later == 0 && id >= 0 ? same + 1 : 0);
        s->rank_count[i] = (k_u16)(later_slot == 0 && s->first[i] ? slot + 1 : 0);
        if (i == begin) {
            h->num_dests[t] = num;
        }
    }
    k_syncwarp(k);
    for (k_i32 i = k->lane; i < n; i += K_LANES) { /* one lane for each expert and each rank */
        if (s->expert_count[i]) {
            *expert_counter(a, s->id[i], c) += s->expert_count[i];
        }
        if (s->rank_count[i]) {
            *rank_counter(a, s->rank[i], c) += s->rank_count[i];
        }
    }
    k_syncwarp(k);
}

/* The same from a mask: one lane walks the ranks, since their order is the result. */
static K_FN void route_mask(struct k_thread *k, const struct k_route_args *a, k_i32 c,
                            k_i32 t) {
    const struct k_handle *h = &a->h;
    if (k->lane == 0) {
        k_i32 num = 0;
        for (k_i32 r = 0; r < a->g.num_ranks; r++) {
            const k_u8 *in = (const k_u8 *)(a->mask.data + (k_u64)((k_i64)t * a->mask.s0 +
                                                                   (k_i64)r * a->mask.s1));
            if (*in) {
                k_u32 *count = rank_counter(a, r, c);
                h->dest_rank[(k_i64)t * a->g.max_dests + num] = r;
                h->dest_slot[(k_i64)t * a->g.max_dests + num] = (*count)++;
                num++;
            }
        }
        h->num_dests[t] = num;
    }
    k_syncwarp(k);
}

static K_FN void count_channel(struct k_thread *k, const struct k_route_args *a, k_i32 c) {
    const struct k_handle *h = &a->h;
    for (k_i32 e = k->lane; e < a->g.num_experts; e += K_LANES) {
        *expert_counter(a, e, c) = 0;
    }
    for (k_i32 r = k->lane; r < a->g.num_ranks; r += K_LANES) {
        *rank_counter(a, r, c) = 0;
    }
    if (k->lane == 0) {
        h->chan_bad[c] = ~0ull;
    }
    k_syncwarp(k);
    k_i32 t0, t1;
    channel_tokens(a->tokens, a->g.num_channels, c, &t0, &t1);
    if (a->id_bytes) {
        struct route_scratch *s = (struct route_scratch *)warp_scratch(k);
        const k_i32 most =
            K_LANES == 1 ? 1 : BATCH / a->topk; /* one lane gains nothing by more */
        for (k_i32 t = t0; t < t1; t += most) {
            const k_i32 n = (t1 - t < most ? t1 - t : most) * a->topk;
            read_batch(k, a, c, t, n, s);
            place_batch(k, a, c, t, n, s);
        }
        return;
    }
    for (k_i32 t = t0; t < t1; t++) {
        route_mask(k, a, c, t);
    }
}

/* Turns the counts of a row of channels into what lies before each; returns the sum. Each lane
 * adds up a run of channels, the lanes add up their runs. */
static K_FN k_u32 scan_channels(struct k_thread *k, k_u32 *counts, k_i32 chans) {
    const k_i32 run = (chans + K_LANES - 1) / K_LANES;
    const k_i32 first = at_most(k->lane * run, chans), end = at_most(first + run, chans);
    k_u32 sum = 0, total = 0;
    for (k_i32 c = first; c < end; c++) {
        sum += counts[c];
    }
    k_u32 before = k_scan(k, sum, &total);
    for (k_i32 c = first; c < end; c++) {
        const k_u32 n = counts[c];
        counts[c] = before;
        before += n;
    }
    return total;
}

/* Sums over channels: each warp of the grid takes ranks, then experts. */
static K_FN void sum_channels(struct k_thread *k, const struct k_route_args *a) {
    const struct k_handle *h = &a->h;
    const k_i32 chans = a->g.num_channels, experts = a->g.num_experts, ranks = a->g.num_ranks;
    for (k_i32 i = k_first(k, 0); i < ranks + experts; i += k_stride(k, k->num_blocks)) {
        if (i < ranks) {
            k_u32 *row = h->send_chan + (k_i64)i * (chans + 1);
            const k_u32 sum = scan_channels(k, row, chans);
            if (k->lane == 0) {
                row[chans] = sum;
                h->send_count[i] = sum;
            }
        } else {
            const k_u32 sum = scan_channels(k, expert_counter(a, i - ranks, 0), chans);
            if (k->lane == 0) {
                h->send_expert[i - ranks] = sum;
            }
        }
    }
}

/* Adds to a channel's slots and indices what the channels before it hold. */
static K_FN void shift_channel(struct k_thread *k, const struct k_route_args *a, k_i32 c) {
    const struct k_handle *h = &a->h;
    k_i32 t0, t1;
    channel_tokens(a->tokens, a->g.num_channels, c, &t0, &t1);
    const k_i32 dests = a->g.max_dests;
    for (k_i32 i = k->lane; i < (t1 - t0) * dests; i += K_LANES) {
        const k_i64 at = (k_i64)t0 * dests + i;
        if (i % dests < h->num_dests[t0 + i / dests]) {
            h->dest_slot[at] += *rank_counter(a, h->dest_rank[at], c);
        }
    }
    for (k_i32 i = k->lane; i < (t1 - t0) * a->topk; i += K_LANES) {
        const k_i64 at = (k_i64)t0 * a->topk + i;
        if (h->ids[at] >= 0) {
            h->sel_index[at] += *expert_counter(a, h->ids[at], c);
        }
    }
}

/* One warp: where each rank's answers will land, and the first bad selection. */
static K_FN void finish_route(struct k_thread *k, const struct k_route_args *a) {
    const struct k_handle *h = &a->h;
    k_u64 bad = ~0ull;
    if (k->lane == 0) {
        k_u32 sum = 0;
        for (k_i32 r = 0; r < a->g.num_ranks; r++) {
            h->send_base[r] = sum;
            sum += h->send_count[r];
        }
        h->send_base[a->g.num_ranks] = sum;
        h->bad[0] = bad;
    }
    for (k_i32 c = k->lane; c < a->g.num_channels; c += K_LANES) {
        bad = h->chan_bad[c] < bad ? h->chan_bad[c] : bad;
    }
    k_syncwarp(k);
    k_lower(&h->bad[0], bad);
    k_syncwarp(k);
    if (k->lane == 0) {
        h->notice->bad = h->bad[0];
        k_publish_local(&h->notice->routed, a->ticket);
    }
}

static K_FN void leave_route(struct k_thread *k, const struct k_handle *h) {
    k_syncwarp(k);
    if (k->lane == 0) {
        k_u64 total = (k_u64)k->num_blocks * (k_u64)k->num_warps;
        if (k_add(&h->sync[1], 1) == total - 1) {
            k_poke(&h->sync[1], 0);
            k_poke(&h->sync[0], k_peek(&h->sync[0]) + 1);
        }
    }
}

K_KERNEL(route, k_route_args) {
    k_enter(k, &a->g, 0);
    for (k_i32 c = k_first(k, 0); c < a->g.num_channels; c += k_stride(k, k->num_blocks)) {
        count_channel(k, a, c);
    }
    if (route_sync(k, &a->h, 0)) {
        sum_channels(k, a);
        if (route_sync(k, &a->h, 1)) {
            for (k_i32 c = k_first(k, 0); c < a->g.num_channels;
                 c += k_stride(k, k->num_blocks)) {
                shift_channel(k, a, c);
            }
            if (k->block == k->num_blocks - 1 && k->warp == k->num_warps - 1) {
                finish_route(k, a);
            }
        }
    }
    leave_route(k, &a->h);
}

/* The local counts of a routed handle, as the caller's tensors. */
K_KERNEL(layout, k_layout_args) {
    k_enter(k, &a->g, 0);
    const struct k_handle *h = &a->h;
    const k_i32 ranks = a->g.num_ranks, chans = a->g.num_channels;
    const k_i32 me = k_first(k, 0) * K_LANES + k->lane;
    const k_i32 all = k_stride(k, k->num_blocks) * K_LANES;
    for (k_i32 r = me; r < ranks; r += all) {
        if (a->tokens_per_rank) {
            ((k_i32 *)a->tokens_per_rank)[r] = (k_i32)h->send_count[r];
        }
        for (k_i32 c = 0; a->channel_prefix && c < chans; c++) {
            ((k_i32 *)a->channel_prefix)[(k_i64)r * chans + c] =
                (k_i32)h->send_chan[(k_i64)r * (chans + 1) + c + 1];
        }
    }
    for (k_i32 e = me; a->tokens_per_expert && e < a->g.num_experts; e += all) {
        ((k_i32 *)a->tokens_per_expert)[e] = (k_i32)h->send_expert[e];
    }
    for (k_i32 n = me; a->tokens_per_node && n < a->num_nodes; n += all) {
        k_i32 sum = 0;
        for (k_i32 t = 0; t < a->tokens; t++) {
            k_i32 hit = 0;
            for (k_i32 j = 0; j < h->num_dests[t]; j++) {
                hit = hit || a->rank_node[h->dest_rank[(k_i64)t * a->g.max_dests + j]] == n;
            }
            sum += hit;
        }
        ((k_i32 *)a->tokens_per_node)[n] = sum;
    }
    for (k_i32 t = me; a->token_in_rank && t < a->tokens; t += all) {
        k_u8 *row = (k_u8 *)a->token_in_rank + (k_i64)t * ranks;
        for (k_i32 r = 0; r < ranks; r++) {
            row[r] = 0;
        }
        for (k_i32 j = 0; j < h->num_dests[t]; j++) {
            row[h->dest_rank[(k_i64)t * a->g.max_dests + j]] = 1;
        }
    }
}
