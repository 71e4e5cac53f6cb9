/* SPDX-License-Identifier: MIT */
/*
 * layout: the local counts of a routed handle as the caller's tensors: tokens per rank, node and
 * expert, the prefix over channels, and which token goes where. Local to a rank; every lane of the
 * grid takes rows of the tensors for itself, and every warp nodes, so nobody waits.
 */
#include "kernel/op.h"

static K_INLINE k_i32 node_of(const struct k_layout_args *a, k_i32 rank) {
    return a->rank_node ? a->rank_node[rank] : 0;
}

/* The local counts of a routed handle, as the caller's tensors. */
K_KERNEL(throughput, layout, k_layout_args) {
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
                (k_i32)h->send_chan[(k_i64)r * (chans + 1) + k_min(c + 1, a->channels.num)];
        }
    }
    for (k_i32 e = me; a->tokens_per_expert && e < a->g.num_experts; e += all) {
        ((k_i32 *)a->tokens_per_expert)[e] = (k_i32)h->send_expert[e];
    }
    for (k_i32 n = k_first(k, 0); a->tokens_per_node && n < a->num_nodes;
         n += k_stride(k, k->num_blocks)) {
        k_u32 mine = 0, sum = 0;
        for (k_i32 t = k->lane; t < a->tokens; t += K_LANES) {
            k_u32 hit = 0;
            for (k_i32 j = 0; j < h->num_dests[t]; j++) {
                hit |= node_of(a, h->dest_rank[(k_i64)t * a->g.max_dests + j]) == n;
            }
            mine += hit;
        }
        k_scan(k, mine, &sum);
        if (k->lane == 0) {
            ((k_i32 *)a->tokens_per_node)[n] = (k_i32)sum;
        }
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
