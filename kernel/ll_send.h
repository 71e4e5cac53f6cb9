/* SPDX-License-Identifier: MIT */
/*
 * The send half of a low-latency dispatch. Function bodies for ll_dispatch.k.c. A token's row has a place
 * of its own at every rank, so it is on its way as soon as it is known where it goes. Which row of an
 * expert it becomes every block counts for itself, in sums by expert of the ids before it.
 */
#ifndef KERNEL_LL_SEND_H
#define KERNEL_LL_SEND_H

#include "kernel/ll_row.h"

/* The shape of a call, which a receiving kernel finds in the handle. */
struct ll_shape {
    k_i32 topk, tokens;
    k_i32 scales_at, row_at, wire_bytes; /* in a row on the wire */
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
    s->scales_at = 16 * s->topk;
    s->row_at = c->sends ? a->row_at : head->row_at;
    s->wire_bytes = c->sends ? a->ll.wire_bytes : head->wire_bytes;
    s->header.compared[0] = s->signature;
    s->header.compared[1] = s->types;
    s->header.compared[2] = (k_u32)a->row_bytes;
    s->header.compared[3] = a->g.experts;
    s->header.compared[4] = (k_u32)a->ll.max_tokens;
}

#define K_LL_IDS 8 /* that a lane has under way at once */

/* Selection number i (t * K + k) of this rank: an expert, or -1. */
static K_INLINE k_i32 ll_id(const struct k_ll_dispatch_args *a, k_i32 i) {
    const k_i64 id = a->id_bytes == 8 ? ((const k_i64 *)a->ids.data)[i]
                                      : (k_i64)((const k_i32 *)a->ids.data)[i];
    return id >= 0 && id < a->g.num_experts ? (k_i32)id : -1;
}

/* ---- who selects what ------------------------------------------------------------------------ */

/* Where a token's row goes: at the start of the block's shared memory, made by one warp. */
struct ll_dests {
    k_i32 rank[K_MAX_TOPK];  /* of selection k, or -1 */
    k_i32 local[K_MAX_TOPK]; /* its expert there; -1 also where that rank is left out */
    k_i32 first[K_MAX_TOPK]; /* the rank, at that selection of it which has the row; or -1 */
    k_u32 index[K_MAX_TOPK]; /* of a sidecar */
};
_Static_assert(sizeof(struct ll_dests) <= K_SCRATCH_BYTES(1), "a warp's scratch holds it");

/* Behind that each warp has a stage for what it receives; and behind these are sums by expert. */
static K_INLINE void *ll_own_stage(struct k_thread *k) {
    return (k_u8 *)k_shared(k) + sizeof(struct ll_dests) +
           (k_u64)k->warp * (k_u64)K_LL_STAGE_BYTES;
}

struct ll_sums {
    k_u32 *
        sum; /* of experts `first` to `end`: how many selections there are in what was counted */
    k_i32 most, first, end;
    k_i32 counted; /* tokens; -1: none since `first` was set */
};

/* Of the first experts that there is room for, mostly all. */
static K_INLINE struct ll_sums ll_no_sums(struct k_thread *k,
                                          const struct k_ll_dispatch_args *a) {
    const k_i32 at = (k_i32)sizeof(struct ll_dests) + k->num_warps * K_LL_STAGE_BYTES;
    const k_i32 least = k->num_warps * (a->g.scratch_bytes + K_LL_STAGE_BYTES);
    const k_i32 most = (k_max((k_i32)k_shared_bytes(k), least) - at) / 4;
    const struct ll_sums s = {(k_u32 *)((k_u8 *)k_shared(k) + at), most, 0,
                              k_min(most, a->g.num_experts), -1};
    return s;
}

/* Goes on to the next experts, after the last of them to the first: false. */
static K_INLINE k_bool ll_next_sums(const struct k_ll_dispatch_args *a, struct ll_sums *s) {
    const k_bool more = s->end < a->g.num_experts;
    if (more || s->first > 0) {
        s->first = more ? s->end : 0;
        s->end = k_min(s->first + s->most, a->g.num_experts);
        s->counted = -1;
    }
    return more;
}

/* Adds ids number `at`, `at` + step, ... before `end`. A function of its own, of values: what it would read of
 * the kernel's arguments is not in constant memory here. */
static K_COLD void ll_add_ids(k_u64 ids, k_i32 id_bytes, k_i32 first, k_i32 num, k_u32 *sum,
                              k_i32 at, k_i32 end, k_i32 step) {
    for (; at < end; at += K_LL_IDS * step) {
        k_i64 id[K_LL_IDS];
        if (id_bytes == 8) { /* past the end the last again: loads without conditions overlap */
            K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
                id[i] = ((const k_i64 *)ids)[k_min(at + i * step, end - 1)];
            }
        } else {
            K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
                id[i] = ((const k_i32 *)ids)[k_min(at + i * step, end - 1)];
            }
        }
        K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
            if (at + i * step < end && id[i] >= first && id[i] < first + num) {
                k_tally(sum + (id[i] - first));
            }
        }
    }
}

/* All warps of a block: the sums become those of all tokens before `end`, which is no less than before. */
static K_FN void ll_count_until(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                k_i32 end, struct ll_sums *s) {
    const k_i32 lane = k->warp * K_LANES + k->lane, lanes = k->num_warps * K_LANES;
    k_barrier(k, 1); /* nobody reads them any more */
    if (s->counted < 0) {
        for (k_i32 e = lane; e < s->end - s->first; e += lanes) {
            s->sum[e] = 0;
        }
        k_barrier(k, 1);
        s->counted = 0;
    }
    ll_add_ids(a->ids.data, a->id_bytes, s->first, s->end - s->first, s->sum,
               s->counted * a->topk + lane, end * a->topk, lanes);
    s->counted = end;
    k_barrier(k, 1);
}

/* How many of the first `num` tokens go to rank p, by one warp: what compact output needs. */
static K_COLD k_u32 ll_count_goes(k_u64 ids, k_i32 id_bytes, k_i32 num_experts, k_i32 topk,
                                  k_i32 num, k_i32 lane, const k_i32 *expert_rank, k_i32 p) {
    struct k_thread k = {0};
    k_u32 n = 0;
    K_ROLLED for (k_i32 t = lane; t < num; t += K_LANES) {
        k_bool goes = 0;
        K_ROLLED for (k_i32 i = t * topk; i < (t + 1) * topk; i++) {
            const k_i64 id =
                id_bytes == 8 ? ((const k_i64 *)ids)[i] : (k_i64)((const k_i32 *)ids)[i];
            goes = goes || (id >= 0 && id < num_experts && expert_rank[id] == p);
        }
        n += goes;
    }
    return k_sum(&k, n);
}

static K_INLINE k_u32 ll_count_tokens(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                      k_i32 num, k_i32 p) {
    return ll_count_goes(a->ids.data, a->id_bytes, a->g.num_experts, a->topk, num, k->lane,
                         a->g.expert_rank, p);
}

/* ---- counts --------------------------------------------------------------------------------- */

/* Headers to all ranks, by warps from the grid's end, and counts by lanes of the last blocks, as few tokens
 * leave blocks there without a row. */
static K_FN k_bool ll_send_counts(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                  const struct ll_call *c, const struct ll_shape *s) {
    const struct k_group *g = &a->g;
    const k_i32 lanes = k->num_warps * K_LANES, first = (k->num_blocks - 1 - k->block) * lanes;
    const k_bool compact = (a->signature & K_LL_SIG_COMPACT) != 0;
    const k_u32 most = (k_u32)a->ll.max_tokens; /* rows of an expert are for so many */
    k_bool ok = 1;
    for (k_i32 i = ll_last_first(k); ok && i < g->num_ranks; i += k_stride(k, k->num_blocks)) {
        const k_i32 p = (g->rank + i) % g->num_ranks;
        const k_u32 rows = compact ? ll_count_tokens(k, a, s->tokens, p) : 0;
        ok = ll_await_one_free(k, c, p);
        if (ok && !k->mask.is_gone) {
            ll_post_header(k, c, k_peer_at(g, p, ll_part(g, c, &a->ll.map.counts, g->rank)),
                           &s->header, (k_u32)s->tokens, rows);
        }
    }
    if (first >= g->num_experts) {
        return ok;
    }
    struct ll_sums sums = ll_no_sums(k, a);
    do {
        ll_count_until(k, a, s->tokens, &sums);
        for (k_i32 base = first; ok && base < g->num_experts; base += lanes * k->num_blocks) {
            const k_i32 e = base + k->warp * K_LANES + k->lane;
            const k_i32 p = e >= sums.first && e < sums.end ? g->expert_rank[e] : -1;
            ok = ll_await_one_free(k, c, p);
            if (ok && p >= 0 && !k->mask.is_gone) {
                const k_u64 at = ll_part(g, c, &a->ll.map.counts, g->rank);
                const k_u32 n = sums.sum[e - sums.first];
                k_post(k_peer_at(g, p, at + 8ull * (k_u64)(K_LL_HEADER + g->expert_local[e])),
                       K_WORD(c->tag, !compact && n > most ? most : n));
            }
        }
    } while (ll_next_sums(a, &sums));
    return ok;
}

/* ---- rows ----------------------------------------------------------------------------------- */

/* Where token t goes, by one warp. */
static K_FN k_bool ll_find_dests(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, k_i32 t, struct ll_dests *d) {
    for (k_i32 i = k->lane; i < a->topk; i += K_LANES) {
        const k_i32 id = ll_id(a, t * a->topk + i);
        d->rank[i] = id < 0 ? -1 : a->g.expert_rank[id];
        d->local[i] = id < 0 ? -1 : a->g.expert_local[id];
    }
    k_syncwarp(k);
    k_bool ok = 1;
    for (k_i32 base = 0; ok && base < a->topk; base += K_LANES) {
        const k_i32 i = base + k->lane;
        k_i32 p = i < a->topk ? d->rank[i] : -1;
        K_ROLLED for (k_i32 j = 0; j < a->topk && j < i; j++) {
            p = d->rank[j] == p ? -1 : p;
        }
        ok = ll_await_one_free(k, c, p);
        if (i < a->topk) {
            d->first[i] = k->mask.is_gone ? -1 : p;
        }
    }
    k_syncwarp(k);
    for (k_i32 i = k->lane; k->mask.ll && i < a->topk; i += K_LANES) {
        k_bool goes = 0;
        K_ROLLED for (k_i32 j = 0; j <= i; j++) {
            goes = goes || d->first[j] == d->rank[i];
        }
        d->local[i] = goes ? d->local[i] : -1;
    }
    return ok;
}

/* Where rank p has the row of token t. */
static K_INLINE struct k_peer ll_row_at(const struct k_ll_dispatch_args *a,
                                        const struct ll_call *c, k_i32 p, k_i32 t) {
    return k_peer_at(&a->g, p,
                     ll_part(&a->g, c, &a->ll.map.rows, a->g.rank) +
                         (k_u64)t * (k_u64)a->ll.wire_bytes);
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

/* What combine needs of token t: its selections, and where it went, ranks ascending, then -1. */
static K_FN void ll_note_dests(struct k_thread *k, const struct k_ll_dispatch_args *a, k_i32 t,
                               const struct ll_dests *d, k_u64 mask) {
    const k_i64 first = (k_i64)t * a->ll.group_topk;
    k_i32 *dest = (k_i32 *)ll_in_handle(&a->ll, a->ll.map.dest) + first;
    k_i32 *chosen = (k_i32 *)ll_in_handle(&a->ll, a->ll.map.chosen) + first;
    k_f32 *given = (k_f32 *)ll_in_handle(&a->ll, a->ll.map.given) + first;
    for (k_i32 i = k->lane; i < a->ll.group_topk; i += K_LANES) {
        k_i32 lower = 0, num = 0;
        K_ROLLED for (k_u64 left = mask; left; left &= left - 1) {
            lower += i < a->topk && d->first[k_lowest(left)] < d->first[i];
            num++;
        }
        chosen[i] = i < a->topk ? d->rank[i] : -1;
        if (i < a->topk) {
            given[i] = a->weights.data ? *(const k_f32 *)k_at(&a->weights, t, i) : 1.0f;
        }
        if (mask >> i & 1) {
            dest[lower] = d->first[i];
        }
        if (i >= num) {
            dest[i] = -1;
        }
    }
}

/* The ranks that token t does not go to are told so; by one warp. */
static K_FN k_bool ll_post_none(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                const struct ll_call *c, k_i32 t, const struct ll_dests *d) {
    k_bool ok = 1;
    for (k_i32 base = 0; ok && base < a->g.num_ranks; base += K_LANES) {
        k_i32 p = base + k->lane < a->g.num_ranks ? base + k->lane : -1;
        K_ROLLED for (k_i32 i = 0; i < a->topk; i++) {
            p = d->rank[i] == p ? -1 : p;
        }
        ok = ll_await_one_free(k, c, p);
        if (ok && p >= 0 && !k->mask.is_gone) {
            const struct k_16 packet = {K_LL_NONE, 0, 0, c->tag};
            k_post16(ll_row_at(a, c, p, t), packet);
        }
    }
    return ok;
}

/*
 * The index of each selection of token t, by all warps of a block: how many of the same expert are before it.
 * Of compact output how many tokens before it go to a rank, in the rank's first selection.
 */
static K_FN void ll_find_indices(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 k_i32 t, struct ll_dests *d, struct ll_sums *sums) {
    const k_i32 lane = k->warp * K_LANES + k->lane, lanes = k->num_warps * K_LANES;
    if (a->signature & K_LL_SIG_COMPACT) {
        for (k_i32 i = k->warp; i < a->topk; i += k->num_warps) {
            const k_u32 n = d->first[i] >= 0 ? ll_count_tokens(k, a, t, d->first[i]) : 0;
            if (k->lane == 0) {
                d->index[i] = n;
            }
        }
        return;
    }
    do {
        ll_count_until(k, a, t, sums);
        for (k_i32 i = lane; i < a->topk; i += lanes) {
            const k_i32 id = ll_id(a, t * a->topk + i);
            k_u32 n = id >= sums->first && id < sums->end ? sums->sum[id - sums->first] : 0;
            K_ROLLED for (k_i32 j = 0; j < i; j++) {
                n += d->rank[j] == d->rank[i] && d->local[j] == d->local[i];
            }
            if (id >= sums->first && id < sums->end) {
                d->index[i] = n;
            }
        }
    } while (ll_next_sums(a, sums));
}

/* The sidecar of token t, by all warps of a block: to each rank that it goes to, where it only knows its own
 * experts. */
static K_FN k_bool ll_send_sidecar(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                   const struct ll_call *c, k_i32 t, struct ll_dests *d,
                                   struct ll_sums *sums) {
    const k_i32 topk = a->topk;
    ll_find_indices(k, a, t, d, sums);
    k_barrier(k, 1);
    for (k_i32 n = k->warp * K_LANES + k->lane; n < topk * topk; n += k->num_warps * K_LANES) {
        const k_i32 i = n % topk, p = d->first[n / topk];
        if (p >= 0) {
            const k_bool own = d->rank[i] == p && d->local[i] >= 0;
            const struct k_16 packet = {
                (k_u32)(own ? d->local[i] : -1), own ? d->index[i] : 0,
                a->weights.data ? *(const k_u32 *)k_at(&a->weights, t, i) : k_bits(1.0f),
                c->tag};
            k_post16(k_peer_plus(ll_row_at(a, c, p, t), 16ull * (k_u64)i), packet);
        }
    }
    if (k->warp == k->num_warps - 1) {
        ll_note_dests(k, a, t, d, ll_mask_of(k, d->first, topk, 0));
    }
    return k->warp != 0 || ll_post_none(k, a, c, t, d);
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

/* One lane's channels of a group as E4M3, four in a word of `out`; the inverse of the group's scale. */
static K_INLINE k_f32 ll_cast(struct k_thread *k, const struct k_16 *x, k_bool power_of_2,
                              k_u32 *out) {
    k_f32 v[K_CAST_CHANNELS], inverse = 0.0f;
    k_u32 most = 0; /* bits of a magnitude: those of larger ones are larger */
    K_UNROLL for (k_i32 i = 0; i < (2 * K_LL_RUN); i++) {
        const k_u32 u[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
        K_UNROLL for (k_i32 j = 0; j < 4; j++) {
            v[8 * i + 2 * j] = k_from_bf16((k_u16)(u[j] & 0xffffu));
            v[8 * i + 2 * j + 1] = k_from_bf16((k_u16)(u[j] >> 16));
        }
    }
    K_UNROLL for (k_i32 i = 0; i < K_CAST_CHANNELS; i++) {
        const k_u32 m = k_bits(v[i]) & 0x7fffffffu;
        most = m > most && m <= 0x7f800000u ? m : most;
    }
    const k_f32 scale =
        ll_scale(k_float(k_group_most(k, most, K_CASTERS)), power_of_2, &inverse);
    K_UNROLL for (k_i32 i = 0; i < K_CAST_CHANNELS; i += 4) {
        out[i / 4] = k_to_e4m3_pair(v[i] * scale, v[i + 1] * scale) |
                     k_to_e4m3_pair(v[i + 2] * scale, v[i + 3] * scale) << 16;
    }
    return inverse;
}

/* What a lane loads of a batch: of rows that are cast twice the bytes, in the order of channels. */
struct ll_input {
    struct k_16 v[6 * K_LL_RUN];
};

static K_INLINE void ll_load_input(const struct k_ll_dispatch_args *a, k_i32 t, k_i32 batch,
                                   k_i32 j, struct ll_input *in) {
    const k_u64 x = k_row(&a->x, t);
    const struct k_16 none = {0, 0, 0, 0};
    if (a->signature & K_LL_SIG_CAST) {
        K_UNROLL for (k_i32 i = 0; i < 6 * K_LL_RUN; i++) {
            const k_i32 at = 2 * ll_piece_at(batch, j, i / 2) + 16 * (i % 2);
            in->v[i] = at < a->row_bytes ? k_load16((const void *)(x + (k_u64)at)) : none;
        }
    } else {
        K_UNROLL for (k_i32 i = 0; i < 3 * K_LL_RUN; i++) {
            const k_i32 at = ll_piece_at(batch, j, i);
            in->v[i] = at < a->row_bytes ? k_load16((const void *)(x + (k_u64)at)) : none;
        }
    }
}

/* The input as it travels; scales of a cast go to every rank from here. */
static K_INLINE void ll_make_pieces(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                    const struct ll_call *c, const struct ll_shape *s, k_i32 t,
                                    k_i32 batch, k_i32 j, const struct ll_dests *d, k_u64 mask,
                                    const struct ll_input *in, struct ll_pieces *out) {
    const k_bool power_of_2 = (a->signature & K_LL_SIG_POWER_OF_2) != 0;
    if (!(a->signature & K_LL_SIG_CAST)) {
        K_UNROLL for (k_i32 i = 0; i < 3 * K_LL_RUN; i++) {
            out->v[i] = in->v[i];
        }
        return;
    }
    K_UNROLL for (k_i32 r = 0; r < 3; r++) {
        k_u32 four[K_CAST_CHANNELS / 4];
        const k_f32 inverse = ll_cast(k, in->v + 2 * K_LL_RUN * r, power_of_2, four);
        K_UNROLL for (k_i32 n = 0; n < K_LL_RUN; n++) {
            const struct k_16 o = {four[4 * n], four[4 * n + 1], four[4 * n + 2],
                                   four[4 * n + 3]};
            out->v[r * K_LL_RUN + n] = o;
        }
        const k_i32 channel = ll_piece_at(batch, j, r * K_LL_RUN);
        const k_u64 at = (k_u64)s->scales_at + 8ull * (k_u64)(channel / K_LL_GROUP);
        const k_bool tells = 2 * channel < a->row_bytes && k->lane % K_CASTERS == 0;
        for (k_u64 left = tells ? mask : 0; left; left &= left - 1) {
            k_post(k_peer_plus(ll_row_at(a, c, d->first[k_lowest(left)], t), at),
                   K_WORD(c->tag, k_bits(inverse)));
        }
    }
}

/* Scales that come with a row, by all warps of a block. */
static K_FN void ll_send_scales(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                const struct ll_call *c, const struct ll_shape *s, k_i32 t,
                                const struct ll_dests *d) {
    const k_i32 words = (K_LL_NUM_SCALES(a->types) * a->scale_bytes + 3) / 4;
    for (k_i32 w = k->warp * K_LANES + k->lane; w < words; w += k->num_warps * K_LANES) {
        const k_u64 word = K_WORD(c->tag, ll_scales_word(a, t, 4 * w));
        const k_u64 at = (k_u64)s->scales_at + 8ull * (k_u64)w;
        for (k_i32 i = 0; i < a->topk; i++) {
            if (d->first[i] >= 0) {
                k_post(k_peer_plus(ll_row_at(a, c, d->first[i], t), at), word);
            }
        }
    }
}

/*
 * Units of work of blocks. Where there are blocks enough, sidecars and rows are units of their own, as it
 * takes a while to count where rows go, and rows are shared out among blocks until each warp has a batch;
 * sidecars come first. Else a unit is a token, all of it.
 */
struct ll_units {
    k_i32 num;
    k_i32 parts; /* of a row; 0: units are whole tokens */
};

static K_INLINE struct ll_units ll_units_of(const struct k_thread *k, k_i32 tokens,
                                            k_i32 batches) {
    const k_i32 most = (batches + k->num_warps - 1) / k->num_warps;
    const k_i32 room = tokens > 0 ? k_max(k->num_blocks / tokens - 1, 0) : 0;
    const struct ll_units u = {tokens * (1 + k_min(most, room)), k_min(most, room)};
    return u;
}

/* The row of token t, from batch `first` on every step-th; by each warp of a block. `in`: of the first. */
static K_FN void ll_send_row(struct k_thread *k, const struct k_ll_dispatch_args *a,
                             const struct ll_call *c, const struct ll_shape *s, k_i32 t,
                             k_i32 first, k_i32 step, const struct ll_dests *d,
                             struct ll_input *in) {
    const k_i32 bytes = a->row_bytes / (a->signature & K_LL_SIG_CAST ? 2 : 1);
    const k_u64 mask = ll_mask_of(k, d->first, a->topk, 0);
    for (k_i32 b = first; b * K_LL_BATCH_BYTES < bytes; b += step) {
        K_ROLLED for (k_i32 j = k->lane * K_LL_RUN; j < K_LL_JOBS; j += K_LANES * K_LL_RUN) {
            struct ll_pieces out;
            if (b != first || j >= K_LANES * K_LL_RUN) {
                ll_load_input(a, t, b, j, in);
            }
            ll_make_pieces(k, a, c, s, t, b, j, d, mask, in, &out);
            for (k_u64 left = mask; left; left &= left - 1) {
                const struct k_peer to = ll_row_at(a, c, d->first[k_lowest(left)], t);
                ll_post_pieces(k_peer_plus(to, (k_u64)s->row_at), bytes, b, j, &out, c->tag);
            }
        }
    }
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
        h->row_at = a->row_at;
        h->wire_bytes = a->ll.wire_bytes;
        h->types = a->types;
        h->experts = a->g.experts;
    }
}

static K_FN k_bool ll_send(struct k_thread *k, const struct k_ll_dispatch_args *a,
                           const struct ll_call *c, const struct ll_shape *s) {
    const k_bool cast = (a->signature & K_LL_SIG_CAST) != 0;
    const struct ll_units all =
        ll_units_of(k, s->tokens, ll_num_batches(a->row_bytes / (cast ? 2 : 1)));
    const k_i32 parts = k_max(all.parts, 1);
    struct ll_dests *d = (struct ll_dests *)k_shared(k);
    struct ll_sums sums = ll_no_sums(k, a);
    k_bool ok = 1;
    K_ROLLED for (k_i32 i = k->block; i == k->block || i < all.num; i += k->num_blocks) {
        const k_bool side = i < s->tokens, row = i < all.num && (!side || all.parts == 0);
        const k_i32 n = i - s->tokens, t = side ? i : n / parts;
        const k_i32 first = (side ? 0 : n % parts) * k->num_warps + k->warp;
        struct ll_input in;
        if (i != k->block) {
            k_barrier(k, 1); /* of the last unit nobody reads where it went any more */
        }
        if (row) { /* on its way while it is looked up where it goes */
            ll_load_input(a, t, first, k->lane * K_LL_RUN, &in);
        }
        if (i < all.num) {
            ok = ok && (k->warp != 0 || ll_find_dests(k, a, c, t, d));
        }
        if (i == k->block) {
            ll_write_head(k, a, c, s);
            ok = k_barrier(k, ok && ll_await_block_free(k, c, 0));
            ok = ok && ll_send_counts(k, a, c, s);
        }
        if (!k_barrier(k, ok)) {
            return 0;
        }
        if (row) {
            ll_send_row(k, a, c, s, t, first, parts * k->num_warps, d, &in);
        }
        if (side) {
            ll_send_scales(k, a, c, s, t, d);
            ok = ll_send_sidecar(k, a, c, t, d, &sums);
        }
    }
    return ok;
}

#endif
