/* SPDX-License-Identifier: MIT */
/*
 * route: from expert ids (or a token-in-rank mask) to the send side of a handle. Local to a rank.
 *
 * Every place is a stable prefix sum over tokens, so it depends on the routing alone: a warp takes
 * whole channels and walks their tokens in order, counting per rank and per expert; then the
 * counts of channels are summed up; then each channel adds what comes before it. No atomics.
 */
#include "kernel/op.h"

struct route_scratch {
    k_i32 rank[K_MAX_TOPK]; /* of each selection, -1: none */
    k_i32 id[K_MAX_TOPK];
    k_i32 first[K_MAX_TOPK]; /* this selection is the token's first of its rank */
    k_i32 last[K_MAX_TOPK];  /* how often its expert was named, at the last naming; else 0 */
};

_Static_assert(sizeof(struct route_scratch) <= K_SCRATCH_BYTES(1), "route_scratch");

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

/* Destinations and expert indices of one token, counted from the start of its channel. */
static K_FN void route_token(struct k_thread *k, const struct k_route_args *a, k_i32 c,
                             k_i32 t) {
    const struct k_handle *h = &a->h;
    struct route_scratch *s = (struct route_scratch *)warp_scratch(k);
    const k_i32 topk = a->topk, dests = a->g.max_dests, chans = a->g.num_channels + 1;
    k_u32 *experts = h->chan_expert + (k_i64)c * a->g.num_experts;
    for (k_i32 j = k->lane; j < topk; j += K_LANES) {
        k_i32 id = read_id(a, t, j);
        k_u64 number = (k_u64)t * (k_u64)topk + (k_u64)j;
        if (id == -2) {
            k_lower(&h->chan_bad[c], number);
            id = -1;
        }
        s->id[j] = id;
        s->rank[j] = id < 0 ? -1 : a->g.expert_rank[id];
        h->ids[number] = id;
    }
    k_syncwarp(k);
    for (k_i32 j = k->lane; j < topk; j += K_LANES) {
        k_i32 first = s->rank[j] >= 0;
        for (k_i32 i = 0; i < j; i++) {
            first = first && s->rank[i] != s->rank[j];
        }
        s->first[j] = first;
    }
    k_syncwarp(k);
    k_i32 num = 0;
    for (k_i32 j = 0; j < topk; j++) {
        num += s->first[j];
    }
    for (k_i32 j = k->lane; j < topk; j += K_LANES) {
        k_i32 before = 0, same = 0, later = 0, r = s->rank[j], id = s->id[j];
        for (k_i32 i = 0; i < topk; i++) {
            before += s->first[i] && s->rank[i] < r;
            same += i < j && s->id[i] == id;
            later += i > j && s->id[i] == id;
        }
        if (s->first[j]) {
            k_u32 *count = &h->send_chan[(k_i64)r * chans + c + 1];
            h->dest_rank[(k_i64)t * dests + before] = r;
            h->dest_slot[(k_i64)t * dests + before] = (*count)++;
        }
        /* Lanes that name one expert read its count; the last of them advances it below. */
        s->last[j] = later == 0 && id >= 0 ? same + 1 : 0;
        h->sel_index[(k_i64)t * topk + j] = id < 0 ? 0 : experts[id] + (k_u32)same;
    }
    k_syncwarp(k);
    for (k_i32 j = k->lane; j < topk; j += K_LANES) {
        if (s->last[j]) {
            experts[s->id[j]] += (k_u32)s->last[j];
        }
    }
    if (k->lane == 0) {
        h->num_dests[t] = num;
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
                k_u32 *count = &h->send_chan[(k_i64)r * (a->g.num_channels + 1) + c + 1];
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
        h->chan_expert[(k_i64)c * a->g.num_experts + e] = 0;
    }
    for (k_i32 r = k->lane; r < a->g.num_ranks; r += K_LANES) {
        h->send_chan[(k_i64)r * (a->g.num_channels + 1) + c + 1] = 0;
    }
    if (k->lane == 0) {
        h->chan_bad[c] = ~0ull;
    }
    k_syncwarp(k);
    k_i32 t0, t1;
    channel_tokens(a->tokens, a->g.num_channels, c, &t0, &t1);
    for (k_i32 t = t0; t < t1; t++) {
        if (a->id_bytes) {
            route_token(k, a, c, t);
        } else {
            route_mask(k, a, c, t);
        }
    }
}

/* Sums over channels: each lane of the grid takes ranks, then experts. */
static K_FN void sum_channels(struct k_thread *k, const struct k_route_args *a) {
    const struct k_handle *h = &a->h;
    const k_i32 chans = a->g.num_channels;
    const k_i32 me = k_first(k, 0) * K_LANES + k->lane;
    const k_i32 all = k_stride(k, k->num_blocks) * K_LANES;
    for (k_i32 r = me; r < a->g.num_ranks; r += all) {
        k_u32 *at = h->send_chan + (k_i64)r * (chans + 1);
        at[0] = 0;
        for (k_i32 c = 0; c < chans; c++) {
            at[c + 1] += at[c];
        }
        h->send_count[r] = at[chans];
    }
    for (k_i32 e = me; e < a->g.num_experts; e += all) {
        k_u32 sum = 0;
        for (k_i32 c = 0; c < chans; c++) {
            k_u32 *at = &h->chan_expert[(k_i64)c * a->g.num_experts + e];
            k_u32 n = *at;
            *at = sum;
            sum += n;
        }
        h->send_expert[e] = sum;
    }
}

/* Adds to a channel's slots and indices what the channels before it hold. */
static K_FN void shift_channel(struct k_thread *k, const struct k_route_args *a, k_i32 c) {
    const struct k_handle *h = &a->h;
    k_i32 t0, t1;
    channel_tokens(a->tokens, a->g.num_channels, c, &t0, &t1);
    for (k_i32 t = t0; t < t1; t++) {
        for (k_i32 j = k->lane; j < h->num_dests[t]; j += K_LANES) {
            k_i64 at = (k_i64)t * a->g.max_dests + j;
            h->dest_slot[at] +=
                h->send_chan[(k_i64)h->dest_rank[at] * (a->g.num_channels + 1) + c];
        }
        for (k_i32 j = k->lane; j < a->topk; j += K_LANES) {
            k_i64 at = (k_i64)t * a->topk + j;
            if (h->ids[at] >= 0) {
                h->sel_index[at] += h->chan_expert[(k_i64)c * a->g.num_experts + h->ids[at]];
            }
        }
    }
}

/* One lane: where each rank's answers will land, and the first bad selection. */
static K_FN void finish_route(const struct k_route_args *a) {
    const struct k_handle *h = &a->h;
    k_u32 sum = 0;
    for (k_i32 r = 0; r < a->g.num_ranks; r++) {
        h->send_base[r] = sum;
        sum += h->send_count[r];
    }
    h->send_base[a->g.num_ranks] = sum;
    k_u64 bad = ~0ull;
    for (k_i32 c = 0; c < a->g.num_channels; c++) {
        bad = h->chan_bad[c] < bad ? h->chan_bad[c] : bad;
    }
    h->bad[0] = bad;
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
            if (k->block == 0 && k->warp == 0 && k->lane == 0) {
                finish_route(a);
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
