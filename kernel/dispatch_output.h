/* SPDX-License-Identifier: MIT */
/*
 * What a dispatch writes for its caller beside the rows: counts and offsets, a received row's
 * source, ids, weights and scales, and what is filled where nothing arrives. Function bodies for
 * dispatch.k.c. `prepare_outputs` is for all warps of block 0, whose results hold once go_recv is
 * published; the rest is for any warp, each row by one. Nothing here waits for a peer.
 */
#ifndef KERNEL_DISPATCH_OUTPUT_H
#define KERNEL_DISPATCH_OUTPUT_H

#include "kernel/dispatch_sidecar.h"

static K_INLINE void write_i32(const struct k_array *to, k_i64 i, k_i32 v) {
    if (to->data) {
        *(k_i32 *)k_row(to, i) = v;
    }
}

/* What a warp tells the others of its block. */
static K_INLINE k_u32 *warp_word(struct k_thread *k, k_i32 warp) {
    return (k_u32 *)((k_u8 *)k_shared(k) + (k_u64)warp * (k_u64)k->g->scratch_bytes);
}

/* All warps of a block: k_scan over all their lanes. The caller's next barrier ends the use of the
 * words. */
static K_FN k_u32 scan_block(struct k_thread *k, k_u32 x, k_u32 *total) {
    k_u32 sum = 0, lower = 0;
    const k_u32 before = k_scan(k, x, &sum);
    if (k->lane == 0) {
        *warp_word(k, k->warp) = sum;
    }
    k_barrier(k, 1);
    sum = 0;
    for (k_i32 w = k->lane; w < k->num_warps; w += K_LANES) {
        const k_u32 n = *warp_word(k, w);
        sum += n;
        lower += w < k->warp ? n : 0;
    }
    k_scan(k, lower, &lower);
    k_scan(k, sum, total);
    return lower + before;
}

/* scan_block of numbers whose sums may need more than 32 bits, where the host says that they may: the
 * low bits, of which a thousand lanes' sum fits, and the others. */
#define K_LOW_BITS 21

static K_FN k_u64 scan_rows(struct k_thread *k, const struct k_dispatch_args *a, k_u64 x,
                            k_u64 *total) {
    const k_bool wide = (a->flags & K_DO_WIDE) != 0;
    k_u32 low = (k_u32)x, sum = 0;
    if (!wide) {
        low = scan_block(k, low, &sum);
        *total = sum;
        return low;
    }
    const k_u32 mask = (1u << K_LOW_BITS) - 1u;
    k_u32 high_sum = 0;
    low = scan_block(k, low & mask, &sum);
    k_barrier(k, 1);
    const k_u32 high = scan_block(k, (k_u32)(x >> K_LOW_BITS), &high_sum);
    *total = sum + ((k_u64)high_sum << K_LOW_BITS);
    return low + ((k_u64)high << K_LOW_BITS);
}

static K_INLINE k_u64 aligned(const struct k_dispatch_args *a, k_u64 rows) {
    const k_u32 align = (k_u32)a->alignment;
    return (a->flags & K_DO_WIDE) ? (rows + align - 1) / align * align
                                  : ((k_u32)rows + align - 1) / align * align;
}

/* A place in expanded output: what lies beyond those that 31 bits can name is in no output. */
static K_INLINE k_u32 place_of(k_u64 row) {
    return row < 0x7fffffffu ? (k_u32)row : 0x7fffffffu;
}

/* Block 0: rows per expert, where experts start in expanded output, and the small outputs. Each
 * lane takes a run of experts, of one if there are lanes enough. */
static K_FN k_bool prepare_outputs(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_handle *h = &a->h;
    const k_i32 num_local = a->g.num_local, ranks = a->g.num_ranks;
    const k_i32 me = k->warp * K_LANES + k->lane, all = k->num_warps * K_LANES;
    const k_i32 run = (num_local + all - 1) / all;
    const k_i32 first = k_min(me * run, num_local), end = k_min(first + run, num_local);
    k_u64 space = 0, total = 0;
    K_ROLLED for (k_i32 e = first; e < end; e++) {
        k_u64 rows = 0;
        for (k_i32 s = 0; s < ranks; s++) {
            rows += h->recv_expert[(k_i64)s * num_local + e];
        }
        h->expert_rows[e] = place_of(rows);
        write_i32(&a->expert_counts, e, (k_i32)place_of(rows));
        space += aligned(a, rows);
    }
    k_u64 start = scan_rows(k, a, space, &total);
    K_ROLLED for (k_i32 e = first; e < end; e++) {
        k_u64 at = start;
        h->expert_start[e] = place_of(start);
        write_i32(&a->expert_offsets, e, (k_i32)place_of(start));
        for (k_i32 s = 0; s < ranks; s++) {
            h->expert_base[(k_i64)s * num_local + e] = place_of(at);
            at += h->recv_expert[(k_i64)s * num_local + e];
        }
        const k_u64 end = start + aligned(a, at - start);
        write_i32(&a->expert_ends, e, (k_i32)place_of((a->flags & K_DO_EXPAND) ? at : end));
        start = end;
    }
    K_ROLLED for (k_i32 s = me; s < ranks; s += all) {
        write_i32(&a->source_ends, s, (k_i32)h->recv_base[s + 1]);
    }
    if (me == 0) {
        const k_i64 rows = (a->flags & K_DO_EXPAND) ? (k_i64)total : h->recv_base[ranks];
        h->expert_start[num_local] = (k_u32)(total < 0xffffffffu ? total : 0xffffffffu);
        write_i32(&a->expert_offsets, num_local, (k_i32)place_of(total));
        write_i32(&a->num_rows, 0, (k_i32)place_of((k_u64)rows));
        if (rows > a->capacity || (a->recv_x.data && rows > a->x_rows)) {
            h->notice->over = K_WORD(h->tag, rows < 0xffffffff ? rows : 0xffffffff);
            k_fail_op(k, K_END_OVER);
        }
    }
    k_syncwarp(k);
    k_bool ok = k_barrier(k, 1);
    if (me == 0) {
        k_store(&a->g.ctl->taken[K_TAKEN_PARTS], 0);
        k_publish_local(&a->g.ctl->go_recv, K_WORD(k->epoch, K_GO));
        k_add(&a->g.ctl->rows_received, h->recv_base[ranks]);
    }
    return ok;
}

static K_INLINE k_u32 *received_side(const struct k_dispatch_args *a, k_u32 row) {
    return (k_u32 *)k_own(&a->g, a->g.map.side + (k_u64)a->slot * a->g.map.side_slot_bytes +
                                     (k_u64)row * (k_u64)a->g.side_stride);
}

static K_INLINE const k_u8 *received_row(const struct k_dispatch_args *a, k_u32 row) {
    return k_own(&a->g, a->g.map.recv + (k_u64)a->slot * a->g.map.recv_slot_bytes +
                            (k_u64)row * (k_u64)a->row_bytes);
}

/* Index among this rank's experts of selection j of a received row; -1: another rank's. */
static K_INLINE k_i32 local_expert(const struct k_dispatch_args *a, const k_u32 *side,
                                   k_i32 j) {
    const k_i32 id = (k_i32)side[K_SIDE_IDS + j], at = id >= 0 ? id : 0;
    const k_i32 rank = a->g.expert_rank[at], local = a->g.expert_local[at]; /* both at once */
    return id >= 0 && rank == a->g.rank ? local : -1;
}

/* Expanded row of selection j of a received row of source s, or -1. */
static K_INLINE k_i32 expanded_row(const struct k_dispatch_args *a, k_i32 s, const k_u32 *side,
                                   k_i32 j) {
    const k_i32 e = local_expert(a, side, j);
    return e < 0 ? -1
                 : (k_i32)(a->h.expert_base[(k_i64)s * a->g.num_local + e] +
                           side[K_SIDE_INDICES(a->topk) + j]);
}

/* Scale j of a row, from its sidecar to output row `to`. */
static K_INLINE void unpack_scale(const struct k_dispatch_args *a, const k_u32 *side, k_i64 to,
                                  k_i32 j) {
    const k_u8 *from = (const k_u8 *)(side + side_scales_word(a));
    const k_u64 at = k_at(&a->recv_scales, to, j);
    if (a->scale_bytes == 4) {
        *(k_u32 *)at = ((const k_u32 *)from)[j];
    } else if (a->scale_bytes == 2) {
        *(k_u16 *)at = ((const k_u16 *)from)[j];
    } else {
        *(k_u8 *)at = from[j];
    }
}

static K_INLINE void write_source(const struct k_dispatch_args *a, k_i64 row, k_i32 rank,
                                  k_i32 token) {
    if (a->recv_source.data) {
        k_i32 *at = (k_i32 *)k_row(&a->recv_source, row);
        at[0] = rank;
        at[1] = token;
    }
}

static K_INLINE void write_id(const struct k_dispatch_args *a, k_i64 row, k_i32 j, k_i32 id) {
    k_u64 at = k_at(&a->recv_ids, row, j);
    if (a->id_bytes == 8) {
        *(k_i64 *)at = id;
    } else {
        *(k_i32 *)at = id;
    }
}

static K_INLINE k_f32 *weight_at(const struct k_dispatch_args *a, k_i64 row, k_i32 j) {
    return (k_f32 *)k_at(&a->recv_weights, row, j);
}

/* Output rows that nothing arrived for: ids and sources -1, weights 0, gaps zero if asked. */
static K_FN void fill_row(struct k_thread *k, const struct k_dispatch_args *a, k_i64 row) {
    if (k->lane == 0) {
        write_source(a, row, -1, -1);
    }
    for (k_i32 j = k->lane; a->recv_ids.data && j < a->topk; j += K_LANES) {
        write_id(a, row, j, -1);
    }
    const k_i32 weights = (a->flags & K_DO_EXPAND) ? 1 : a->topk;
    for (k_i32 j = k->lane; a->recv_weights.data && j < weights; j += K_LANES) {
        *weight_at(a, row, j) = 0.0f;
    }
}

static K_FN void fill_gaps(struct k_thread *k, const struct k_dispatch_args *a, k_i32 warp,
                           k_i32 warps) {
    const struct k_handle *h = &a->h;
    const k_i64 most = a->x_rows > a->capacity ? a->x_rows : a->capacity;
    for (k_i32 e = warp; e < a->g.num_local; e += warps) {
        const k_i64 next = h->expert_start[e + 1], end = next < most ? next : most;
        for (k_i64 r = (k_i64)h->expert_start[e] + h->expert_rows[e]; r < end; r++) {
            if (r < a->capacity) {
                fill_row(k, a, r);
            }
            if ((a->flags & K_DO_ZERO_GAPS) && a->recv_x.data && r < a->x_rows) {
                k_zero(k, (void *)k_row(&a->recv_x, r), a->row_bytes);
            }
        }
    }
}

/* Fills what nothing arrives for; `warp` of `warps` that have nothing better to do at first. */
static K_FN void fill_rest(struct k_thread *k, const struct k_dispatch_args *a, k_i32 warp,
                           k_i32 warps) {
    k_i64 end = a->h.recv_base[a->g.num_ranks];
    if (a->flags & K_DO_EXPAND) {
        end = a->h.expert_start[a->g.num_local];
        fill_gaps(k, a, warp, warps);
    }
    const k_bool fills = a->recv_source.data || a->recv_ids.data || a->recv_weights.data;
    for (k_i64 r = end + warp; fills && r < a->capacity; r += warps) {
        fill_row(k, a, r);
    }
}

/* One warp, after a failure: counts and offsets 0, ids and sources -1, so that kernels behind
 * this one stay in bounds. */
static K_FN void clear_outputs(struct k_thread *k, const struct k_dispatch_args *a) {
    for (k_i32 e = k->lane; e <= a->g.num_local; e += K_LANES) {
        if (e < a->g.num_local) {
            write_i32(&a->expert_counts, e, 0);
            write_i32(&a->expert_ends, e, 0);
        }
        write_i32(&a->expert_offsets, e, 0);
    }
    for (k_i32 s = k->lane; s < a->g.num_ranks; s += K_LANES) {
        write_i32(&a->source_ends, s, 0);
    }
    if (k->lane == 0) {
        write_i32(&a->num_rows, 0, 0);
    }
    const k_bool fills = a->recv_source.data || a->recv_ids.data || a->recv_weights.data;
    for (k_i64 r = 0; fills && r < a->capacity; r++) {
        fill_row(k, a, r);
    }
}

#endif
