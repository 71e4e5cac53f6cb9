/* SPDX-License-Identifier: MIT */
/*
 * The send half of a low-latency dispatch. Function bodies for ll_dispatch.k.c. Every block counts for
 * itself where its rows go: a pass over the ids before it, which no other block is asked for.
 */
#ifndef KERNEL_LL_SEND_H
#define KERNEL_LL_SEND_H

#include "kernel/ll.h"

/* The shape of a call, which a receiving kernel finds in the handle. */
struct ll_shape {
    k_i32 topk, tokens;
    k_i32 side_at, side_words; /* of a sidecar, without scales */
    k_i32 wire_bytes;
    k_u32 signature, types;
    struct ll_header header;
};

static K_INLINE void ll_shape_of(const struct k_ll_dispatch_args *a, const struct ll_call *c,
                                 struct ll_shape *s) {
    const struct k_ll_head *head = a->ll.head;
    s->topk = c->sends ? a->topk : head->topk;
    s->tokens = c->sends ? a->tokens : head->tokens;
    s->signature =
        c->sends ? a->signature | ((k_u32)a->topk << K_LL_SIG_TOPK_SHIFT) : head->signature;
    s->types = c->sends ? a->types : head->types;
    s->side_at = c->sends ? a->side_at : head->side_at;
    s->wire_bytes = c->sends ? a->ll.wire_bytes : head->wire_bytes;
    s->side_words = K_SIDE_SCALES(s->topk, s->signature & K_LL_SIG_WEIGHTS);
    s->header.compared[0] = s->signature;
    s->header.compared[1] = s->types;
    s->header.compared[2] = (k_u32)a->row_bytes;
    s->header.compared[3] = a->g.experts;
    s->header.compared[4] = (k_u32)a->ll.max_tokens;
}

/* Selection number i (t * K + k) of this rank: an expert, or -1. */
static K_INLINE k_i32 ll_id(const struct k_ll_dispatch_args *a, k_i32 i) {
    const k_i64 id = a->id_bytes == 8 ? ((const k_i64 *)a->ids.data)[i]
                                      : (k_i64)((const k_i32 *)a->ids.data)[i];
    return id >= 0 && id < a->g.num_experts ? (k_i32)id : -1;
}

static K_INLINE k_i32 ll_rank_of(const struct k_ll_dispatch_args *a, k_i32 id) {
    return id < 0 ? -1 : a->g.expert_rank[id];
}

/* How many of the first `num` selections are of expert e. */
static K_FN k_u32 ll_count_expert(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                  k_i32 e, k_i32 num) {
    k_u32 count = 0, all = 0;
    for (k_i32 i = k->lane; i < num; i += K_LANES) {
        count += ll_id(a, i) == e;
    }
    k_scan(k, count, &all);
    return all;
}

/* How many of the first `num` tokens go to rank p. */
static K_FN k_u32 ll_count_rank(struct k_thread *k, const struct k_ll_dispatch_args *a, k_i32 p,
                                k_i32 num) {
    k_u32 count = 0, all = 0;
    for (k_i32 t = k->lane; t < num; t += K_LANES) {
        k_bool goes = 0;
        for (k_i32 i = 0; i < a->topk; i++) {
            goes = goes || ll_rank_of(a, ll_id(a, t * a->topk + i)) == p;
        }
        count += goes;
    }
    k_scan(k, count, &all);
    return all;
}

/* ---- counts --------------------------------------------------------------------------------- */

/* The warps of the rank share out headers (item p < R) and counts (item R + e). */
static K_FN k_bool ll_send_counts(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                  const struct ll_call *c, const struct ll_shape *s) {
    const struct k_group *g = &a->g;
    const k_i32 items = g->num_ranks + g->num_experts;
    k_bool ok = 1;
    for (k_i32 i = k->warp * k->num_blocks + k->block; ok && i < items;
         i += k_stride(k, k->num_blocks)) {
        const k_i32 e = i - g->num_ranks;
        const k_i32 p = e < 0 ? (g->rank + i) % g->num_ranks : g->expert_rank[e];
        const struct k_peer at = k_peer_at(g, p, ll_part(g, c, &a->ll.map.counts, g->rank));
        if (e < 0) {
            const k_u32 rows = ll_count_rank(k, a, p, s->tokens);
            ok = ll_await_free(k, c, p);
            if (ok && !k->mask.is_gone) {
                ll_post_header(k, c, at, &s->header, rows, (k_u32)ll_slices(s->tokens));
            }
        } else {
            const k_u32 count = ll_count_expert(k, a, e, s->tokens * s->topk);
            ok = ll_await_free(k, c, p);
            if (ok && !k->mask.is_gone && k->lane == 0) {
                k_post(k_peer_plus(at, 8ull * (k_u64)(K_LL_HEADER + g->expert_local[e])),
                       K_WORD(c->tag, count));
            }
        }
    }
    return ok;
}

/* ---- rows ----------------------------------------------------------------------------------- */

/* Where a token's row goes: in the block's scratch, made by its warps together. */
struct ll_dests {
    k_i32 rank[K_MAX_TOPK];  /* of selection k, or -1 */
    k_u32 index[K_MAX_TOPK]; /* within (source, expert) */
    k_u32 row[K_MAX_TOPK];   /* within (source, rank) */
    struct k_peer
        at[K_MAX_TOPK]; /* the row's place, at the first selection of each rank; nowhere */
};
_Static_assert(sizeof(struct ll_dests) <= K_SCRATCH_BYTES(1), "one warp's scratch holds it");

static K_FN k_bool ll_find_dests(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, k_i32 t, struct ll_dests *d) {
    const struct k_group *g = &a->g;
    k_bool ok = 1;
    for (k_i32 i = k->warp; ok && i < a->topk; i += k->num_warps) {
        const k_i32 id = ll_id(a, t * a->topk + i), p = ll_rank_of(a, id);
        k_bool first = p >= 0;
        for (k_i32 base = 0; base < i; base += K_LANES) {
            const k_i32 j = base + k->lane;
            const k_bool other = j >= i || ll_rank_of(a, ll_id(a, t * a->topk + j)) != p;
            first = k_all(k, other) && first;
        }
        const k_u32 index = p >= 0 ? ll_count_expert(k, a, id, t * a->topk + i) : 0;
        const k_u32 row = first ? ll_count_rank(k, a, p, t) : 0;
        ok = ll_await_free(k, c, first ? p : -1);
        if (k->lane == 0) {
            d->rank[i] = p;
            d->index[i] = index;
            d->row[i] = row;
            d->at[i] = first && !k->mask.is_gone
                           ? k_peer_at(g, p,
                                       ll_part(g, c, &a->ll.map.rows, g->rank) +
                                           (k_u64)row * (k_u64)a->ll.wire_bytes)
                           : k_peer_own(0);
        }
    }
    return ok;
}

static K_INLINE k_bool ll_is_dest(const struct ll_dests *d, k_i32 i) {
    return !k_is_nowhere(d->at[i]);
}

/* Four bytes of token t's scales from byte `byte` on; past the end zeros. */
static K_INLINE k_u32 ll_scales_word(const struct k_ll_dispatch_args *a, k_i32 t, k_i32 byte) {
    k_u32 word = 0;
    for (k_i32 b = 0; b < 4; b += a->scale_bytes) {
        const k_i32 j = (byte + b) / a->scale_bytes;
        if (j < K_LL_NUM_SCALES(a->types)) {
            const k_u64 at = k_at(&a->scales, t, j);
            word |= (a->scale_bytes == 4   ? *(const k_u32 *)at
                     : a->scale_bytes == 2 ? *(const k_u16 *)at
                                           : *(const k_u8 *)at)
                    << (8 * b);
        }
    }
    return word;
}

/* The sidecar of token t, without scales of a cast, to each rank that it goes to: warps take turns. */
static K_FN void ll_send_side(struct k_thread *k, const struct k_ll_dispatch_args *a,
                              const struct ll_shape *s, k_i32 t, const struct ll_dests *d) {
    const k_i32 words = s->side_words + (K_LL_NUM_SCALES(a->types) * a->scale_bytes + 3) / 4;
    for (k_i32 i = k->warp; i < a->topk; i += k->num_warps) {
        if (!ll_is_dest(d, i)) {
            continue;
        }
        const struct k_peer side = k_peer_plus(d->at[i], (k_u64)a->side_at);
        for (k_i32 w = k->lane; w < words; w += K_LANES) {
            const k_i32 what = w == 0 ? 0 : (w - 1) / a->topk,
                        j = w == 0 ? 0 : (w - 1) % a->topk;
            const k_u32 word = w == 0 ? (k_u32)t
                               : w >= s->side_words
                                   ? ll_scales_word(a, t, 4 * (w - s->side_words))
                               : what == 0 ? (k_u32)ll_id(a, t * a->topk + j)
                               : what == 1 ? d->index[j]
                                           : *(const k_u32 *)k_at(&a->weights, t, j);
            k_store_u32(k_peer_plus(side, 4ull * (k_u64)w), word);
        }
    }
}

/* What combine needs of token t: its selections, and where it went, ranks ascending, then -1. */
static K_FN void ll_note_dests(struct k_thread *k, const struct k_ll_dispatch_args *a, k_i32 t,
                               const struct ll_dests *d) {
    const k_i64 first = (k_i64)t * a->ll.group_topk;
    k_i32 *dest = (k_i32 *)ll_in_handle(&a->ll, a->ll.map.dest) + first;
    k_i32 *chosen = (k_i32 *)ll_in_handle(&a->ll, a->ll.map.chosen) + first;
    k_f32 *given = (k_f32 *)ll_in_handle(&a->ll, a->ll.map.given) + first;
    k_i32 num = 0;
    for (k_i32 j = 0; j < a->topk; j++) {
        num += ll_is_dest(d, j);
    }
    for (k_i32 i = k->lane; i < a->ll.group_topk; i += K_LANES) {
        if (i >= num) {
            dest[i] = -1;
        }
        if (i < a->topk) {
            chosen[i] = d->rank[i];
            given[i] = a->weights.data ? *(const k_f32 *)k_at(&a->weights, t, i) : 1.0f;
        }
        if (i < a->topk && ll_is_dest(d, i)) {
            k_i32 lower = 0;
            for (k_i32 j = 0; j < a->topk; j++) {
                lower += ll_is_dest(d, j) && d->rank[j] < d->rank[i];
            }
            dest[lower] = K_LL_DEST(d->rank[i], d->row[i]);
        }
    }
}

static K_FN void ll_send_plain(struct k_thread *k, const struct k_ll_dispatch_args *a, k_u64 x,
                               struct ll_span part, const struct ll_dests *d) {
    const k_i32 step = 16 * K_LANES * k->num_warps;
    for (k_i32 at = part.from + 16 * (k->warp * K_LANES + k->lane); at < part.end; at += step) {
        const struct k_16 v = k_load16((const void *)(x + (k_u64)at));
        for (k_i32 i = 0; i < a->topk; i++) {
            if (ll_is_dest(d, i)) {
                k_store16_to(k_peer_plus(d->at[i], (k_u64)at), v);
            }
        }
    }
}

/* The scale by which channels are multiplied, and the one that undoes it. */
static K_INLINE k_f32 ll_scale(k_f32 most, k_bool power_of_2, k_f32 *inverse) {
    const k_f32 amax = most > 1e-4f ? most : 1e-4f, want = amax * (1.0f / 448.0f);
    if (!power_of_2) {
        *inverse = want;
        return 448.0f / amax;
    }
    /* The exponent, rounded up; scales are normal numbers, as amax is not below 1e-4. */
    const k_u32 bits = k_bits(want), up = (bits & 0x7fffffu) != 0;
    const k_u32 exponent = k_min((k_i32)((bits >> 23) + up), 254);
    *inverse = k_float(exponent << 23);
    return k_float((254u - exponent) << 23);
}

/* Channels from part.from to part.end (bytes of x) as E4M3, and their scales. */
static K_FN void ll_send_cast(struct k_thread *k, const struct k_ll_dispatch_args *a,
                              const struct ll_shape *s, k_u64 x, struct ll_span part,
                              const struct ll_dests *d) {
    const k_bool power_of_2 = (a->signature & K_LL_SIG_POWER_OF_2) != 0;
    const k_i32 in_warp = K_LANES / K_CASTERS, lane = k->lane % K_CASTERS;
    const k_i32 first = part.from / (2 * K_LL_GROUP), end = part.end / (2 * K_LL_GROUP);
    for (k_i32 base = first + k->warp * in_warp; base < end; base += in_warp * k->num_warps) {
        const k_i32 group = base + k->lane / K_CASTERS;
        const k_i32 channel = k_min(group, end - 1) * K_LL_GROUP + lane * K_CAST_CHANNELS;
        k_f32 v[K_CAST_CHANNELS], inverse = 0.0f;
        k_u32 most = 0; /* bits of a magnitude: those of larger ones are larger */
        k_u8 out[K_CAST_CHANNELS];
        K_UNROLL for (k_i32 i = 0; i < K_CAST_CHANNELS; i += 8) {
            const struct k_16 q = k_load16((const void *)(x + 2ull * (k_u64)(channel + i)));
            const k_u32 u[4] = {q.x, q.y, q.z, q.w};
            K_UNROLL for (k_i32 j = 0; j < 4; j++) {
                v[i + 2 * j] = k_from_bf16((k_u16)(u[j] & 0xffffu));
                v[i + 2 * j + 1] = k_from_bf16((k_u16)(u[j] >> 16));
            }
        }
        K_UNROLL for (k_i32 i = 0; i < K_CAST_CHANNELS; i++) {
            const k_u32 m = k_bits(v[i]) & 0x7fffffffu;
            most = m > most && m <= 0x7f800000u ? m : most;
        }
        const k_f32 scale =
            ll_scale(k_float(k_group_most(k, most, K_CASTERS)), power_of_2, &inverse);
        K_UNROLL for (k_i32 i = 0; i < K_CAST_CHANNELS; i++) {
            out[i] = k_to_e4m3(v[i] * scale);
        }
        for (k_i32 i = 0; group < end && i < a->topk; i++) {
            if (ll_is_dest(d, i)) {
                k_store_cast(k_peer_plus(d->at[i], (k_u64)channel), out);
                if (lane == 0) {
                    k_store_u32(
                        k_peer_plus(d->at[i],
                                    (k_u64)a->side_at + 4ull * (k_u64)(s->side_words + group)),
                        k_bits(inverse));
                }
            }
        }
    }
}

/* All warps of a block: slice `slice` of token t to every rank that it goes to. */
static K_FN k_bool ll_send_slice(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, const struct ll_shape *s, k_i32 t,
                                 k_i32 slice, k_i32 slices) {
    const struct k_group *g = &a->g;
    struct ll_dests *d = (struct ll_dests *)k_shared(k);
    const k_u64 x = k_row(&a->x, t);
    const struct ll_span part = ll_cut(a->row_bytes, 2 * K_LL_GROUP, slices, slice);
    if (!k_barrier(k, ll_find_dests(k, a, c, t, d))) {
        return 0;
    }
    if (a->signature & K_LL_SIG_CAST) {
        ll_send_cast(k, a, s, x, part, d);
    } else {
        ll_send_plain(k, a, x, part, d);
    }
    if (slice == 0) {
        ll_send_side(k, a, s, t, d);
        if (k->warp == k->num_warps - 1) {
            ll_note_dests(k, a, t, d);
        }
    }
    k_barrier(k, 1); /* the slice is stored, by all warps */
    for (k_i32 i = k->warp * K_LANES + k->lane; i < a->topk; i += k->num_warps * K_LANES) {
        if (ll_is_dest(d, i)) {
            const k_u64 word = (k_u64)d->row[i] * (k_u64)slices + (k_u64)slice;
            k_publish(k_peer_at(g, d->rank[i],
                                ll_part(g, c, &a->ll.map.arrived, g->rank) + 8ull * word),
                      K_WORD(c->tag, 1));
        }
    }
    return k_barrier(k, 1); /* the scratch can be used again */
}

static K_INLINE void ll_write_head(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                   const struct ll_call *c, const struct ll_shape *s) {
    if (k->block == 0 && k->warp == 0 && k->lane == 0) {
        struct k_ll_head *h = a->ll.head;
        h->owner = (k_u64)a->ll.ctl;
        h->number[0] = c->number;
        h->number[1] = 0;
        h->tokens = s->tokens;
        h->topk = s->topk;
        h->max_tokens = a->ll.max_tokens;
        h->signature = s->signature;
        h->row_bytes = a->row_bytes;
        h->side_at = a->side_at;
        h->wire_bytes = a->ll.wire_bytes;
        h->types = a->types;
        h->experts = a->g.experts;
    }
}

static K_FN k_bool ll_send(struct k_thread *k, const struct k_ll_dispatch_args *a,
                           const struct ll_call *c, const struct ll_shape *s) {
    const k_i32 slices = ll_slices(s->tokens);
    k_bool ok = k_barrier(k, ll_send_counts(k, a, c, s));
    ll_write_head(k, a, c, s);
    for (k_i32 u = k->block; ok && u < s->tokens * slices; u += k->num_blocks) {
        ok = ll_send_slice(k, a, c, s, u / slices, u % slices, slices);
    }
    return ok;
}

#endif
