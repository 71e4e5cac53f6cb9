/* SPDX-License-Identifier: MIT */
/*
 * The send half of a low-latency dispatch. Function bodies for ll_dispatch.k.c. A token's row has a place
 * of its own at every rank, so it is on its way as soon as it is known where it goes. Which row of an
 * expert it becomes every block counts for itself: a pass over the ids before it.
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

#define K_LL_IDS 8 /* ids, or entries, that a lane has under way at once */

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
};
_Static_assert(sizeof(struct ll_dests) <= K_SCRATCH_BYTES(1), "a warp's scratch holds it");

/* Behind it is a list of this rank's selections: expert, or -1. */
static K_INLINE k_i32 *ll_entries(struct k_thread *k) {
    return (k_i32 *)((k_u8 *)k_shared(k) + sizeof(struct ll_dests));
}

/* Tokens whose selections the list holds at once. */
static K_INLINE k_i32 ll_most_listed(struct k_thread *k, const struct k_ll_dispatch_args *a) {
    const k_i32 bytes = (k_i32)k_shared_bytes(k), least = k->num_warps * a->g.scratch_bytes;
    return (k_max(bytes, least) - (k_i32)sizeof(struct ll_dests)) / 4 / a->topk;
}

/* Entries `at`, `at` + step, ... of num, which are ids `first` and on. A function of its own, of values: what
 * it would read of the kernel's arguments is not in constant memory here. */
static K_COLD void ll_list_ids(k_u64 ids, k_i32 id_bytes, k_i32 num_experts, k_i32 first,
                               k_i32 *entry, k_i32 at, k_i32 num, k_i32 step) {
    for (; at < num; at += K_LL_IDS * step) {
        k_i64 id[K_LL_IDS];
        if (id_bytes == 8) { /* past the end the last again: loads without conditions overlap */
            K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
                id[i] = ((const k_i64 *)ids)[first + k_min(at + i * step, num - 1)];
            }
        } else {
            K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
                id[i] = ((const k_i32 *)ids)[first + k_min(at + i * step, num - 1)];
            }
        }
        K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
            if (at + i * step < num) {
                entry[at + i * step] = id[i] >= 0 && id[i] < num_experts ? (k_i32)id[i] : -1;
            }
        }
    }
}

/* All warps of a block list tokens `from` to `end`. */
static K_INLINE void ll_list(struct k_thread *k, const struct k_ll_dispatch_args *a, k_i32 from,
                             k_i32 end) {
    ll_list_ids(a->ids.data, a->id_bytes, a->g.num_experts, from * a->topk, ll_entries(k),
                k->warp * K_LANES + k->lane, (end - from) * a->topk, k->num_warps * K_LANES);
}

/* How many of the first `num` entries are expert `id`; the warp together. */
static K_FN k_u32 ll_count_ids(struct k_thread *k, k_i32 num, k_i32 id) {
    const k_i32 *entry = ll_entries(k);
    k_u32 n = 0;
    for (k_i32 base = k->lane; base < num; base += K_LL_IDS * K_LANES) {
        k_i32 other[K_LL_IDS];
        K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
            other[i] = entry[k_min(base + i * K_LANES, num - 1)];
        }
        K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
            n += (k_u32)(other[i] == id) & (k_u32)(base + i * K_LANES < num);
        }
    }
    return k_sum(k, n);
}

/* How many of the first `num` tokens of a list go to rank p: what compact output needs. */
static K_COLD k_u32 ll_count_goes(const k_i32 *entry, k_i32 topk, k_i32 num, k_i32 lane,
                                  const k_i32 *expert_rank, k_i32 p) {
    struct k_thread k = {0};
    k_u32 n = 0;
    K_ROLLED for (k_i32 t = lane; t < num; t += K_LANES) {
        k_bool goes = 0;
        K_ROLLED for (k_i32 i = 0; i < topk; i++) {
            const k_i32 id = entry[t * topk + i];
            goes = goes || (id >= 0 && expert_rank[id] == p);
        }
        n += goes;
    }
    return k_sum(&k, n);
}

static K_INLINE k_u32 ll_count_tokens(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                      k_i32 num, k_i32 p) {
    return ll_count_goes(ll_entries(k), a->topk, num, k->lane, a->g.expert_rank, p);
}

/* ---- counts --------------------------------------------------------------------------------- */

static K_INLINE void ll_post_count(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                   const struct ll_call *c, const struct ll_shape *s, k_i32 e,
                                   k_i32 p, k_u32 count) {
    const struct k_group *g = &a->g;
    const struct k_peer at = k_peer_at(g, p, ll_part(g, c, &a->ll.map.counts, g->rank));
    if (e < 0) {
        ll_post_header(k, c, at, &s->header, (k_u32)s->tokens, count);
    } else if (k->lane == 0) {
        k_post(k_peer_plus(at, 8ull * (k_u64)(K_LL_HEADER + g->expert_local[e])),
               K_WORD(c->tag, count));
    }
}

/* The warps of the rank share out headers (item p < R) and counts (item R + e), from the grid's end, as
 * few tokens leave blocks there without a row. `listed`: all tokens are in the list already. */
static K_FN k_bool ll_send_counts(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                  const struct ll_call *c, const struct ll_shape *s,
                                  k_bool listed) {
    const struct k_group *g = &a->g;
    const k_bool compact = (a->signature & K_LL_SIG_COMPACT) != 0;
    const k_i32 items = g->num_ranks + g->num_experts, most = ll_most_listed(k, a);
    k_bool ok = 1;
    for (k_i32 first = ll_last_first(k) - k->warp; first < items;
         first += k_stride(k, k->num_blocks)) {
        const k_i32 i = first + k->warp, e = i - g->num_ranks;
        const k_i32 p = i >= items ? -1
                        : e < 0    ? (g->rank + i) % g->num_ranks
                                   : g->expert_rank[e];
        k_u32 count = 0;
        for (k_i32 from = 0; from < s->tokens; from += most) {
            const k_i32 num = k_min(most, s->tokens - from);
            if (!listed) {
                k_barrier(k, 1);
                ll_list(k, a, from, from + num);
                k_barrier(k, 1);
            }
            if (e >= 0) {
                count += ll_count_ids(k, num * a->topk, e);
            } else if (compact) {
                count += ll_count_tokens(k, a, num, p);
            }
        }
        ok = ok && ll_await_one_free(k, c, p);
        if (ok && p >= 0 && !k->mask.is_gone) {
            const k_u32 most = (k_u32)a->ll.max_tokens; /* rows of an expert are for so many */
            ll_post_count(k, a, c, s, e, p, e >= 0 && !compact && count > most ? most : count);
        }
    }
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

/* The sidecar of token t, without indices and scales of a cast, to each rank that it goes to: warps take
 * turns. A rank is told of its own experts only. */
static K_FN void ll_send_side(struct k_thread *k, const struct k_ll_dispatch_args *a,
                              const struct ll_call *c, const struct ll_shape *s, k_i32 t,
                              const struct ll_dests *d) {
    const k_i32 topk = a->topk;
    const k_i32 scales = (K_LL_NUM_SCALES(a->types) * a->scale_bytes + 3) / 4;
    for (k_i32 i = k->warp; i < topk; i += k->num_warps) {
        const k_i32 p = d->first[i];
        if (p < 0) {
            continue;
        }
        const struct k_peer side = k_peer_plus(ll_row_at(a, c, p, t), (k_u64)a->side_at);
        for (k_i32 j = k->lane; j < topk; j += K_LANES) {
            const struct k_peer at = k_peer_plus(side, 4ull * (k_u64)j);
            k_store_u32(k_peer_plus(at, 4 * K_SIDE_IDS),
                        (k_u32)(d->rank[j] == p ? d->local[j] : -1));
            if (a->weights.data) {
                k_store_u32(k_peer_plus(at, 4ull * (k_u64)K_SIDE_WEIGHTS(topk)),
                            *(const k_u32 *)k_at(&a->weights, t, j));
            }
        }
        for (k_i32 w = k->lane; w < scales; w += K_LANES) {
            k_store_u32(k_peer_plus(side, 4ull * (k_u64)(s->side_words + w)),
                        ll_scales_word(a, t, 4 * w));
        }
    }
}

/*
 * The indices of token t's selections, to the rank of each: how many of the same expert are before it. Of
 * compact output one for each rank: how many tokens before it go there, in the place of the first. Warps
 * take selections in turn; a block lists as many tokens at once as it can.
 */
static K_FN void ll_send_indices(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, k_i32 t, k_bool listed,
                                 const struct ll_dests *d) {
    const k_bool compact = (a->signature & K_LL_SIG_COMPACT) != 0;
    const k_i32 most = ll_most_listed(k, a), topk = a->topk;
    for (k_i32 first = 0; first < topk; first += k->num_warps) {
        const k_i32 i = first + k->warp, p = i >= topk         ? -1
                                             : compact         ? d->first[i]
                                             : d->local[i] < 0 ? -1
                                                               : d->rank[i];
        k_u32 index = 0;
        for (k_i32 from = 0; from <= t; from += most) {
            const k_i32 num = k_min(most, t - from); /* whole tokens before t */
            if (!listed) {
                k_barrier(k, 1);
                ll_list(k, a, from, k_min(from + most, t + 1));
                k_barrier(k, 1);
            }
            if (p >= 0 && compact) {
                index += ll_count_tokens(k, a, num, p);
            } else if (p >= 0) {
                index +=
                    ll_count_ids(k, num * topk + (num < most ? i : 0), ll_id(a, t * topk + i));
            }
        }
        const k_u64 word = (k_u64)K_SIDE_INDICES(topk) + (k_u64)(compact ? 0 : i);
        if (p >= 0 && k->lane == 0) {
            k_store_u32(k_peer_plus(ll_row_at(a, c, p, t), (k_u64)a->side_at + 4 * word),
                        index);
        }
    }
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

/*
 * What a lane sends of a slice: pieces of 16 bytes, K_AHEAD at a time, which are on their way while it is
 * counted where they go. Cast, K_LL_PIECES of them are of one group.
 */
struct ll_pieces {
    struct k_16 v[K_AHEAD];
};
#define K_LL_PIECES (K_CAST_CHANNELS / 8)

/* Where piece i of batch `batch` is in the row of x; at part.end or behind it: nowhere. */
static K_INLINE k_i32 ll_piece_at(const struct k_thread *k, struct ll_span part, k_bool cast,
                                  k_i32 batch, k_i32 i) {
    const k_i32 lane = k->warp * K_LANES + k->lane, lanes = k->num_warps * K_LANES;
    if (!cast) {
        return part.from + 16 * (lane + (batch * K_AHEAD + i) * lanes);
    }
    const k_i32 round = batch * (K_AHEAD / K_LL_PIECES) + i / K_LL_PIECES;
    const k_i32 group = lane / K_CASTERS + round * (lanes / K_CASTERS);
    return part.from + 2 * K_LL_GROUP * group +
           16 * (lane % K_CASTERS * K_LL_PIECES + i % K_LL_PIECES);
}

static K_INLINE void ll_load_pieces(const struct k_thread *k, k_u64 x, struct ll_span part,
                                    k_bool cast, k_i32 batch, struct ll_pieces *p) {
    K_UNROLL for (k_i32 i = 0; i < K_AHEAD; i++) {
        const k_i32 at = ll_piece_at(k, part, cast, batch, i);
        const struct k_16 none = {0, 0, 0, 0};
        p->v[i] = at < part.end ? k_load16((const void *)(x + (k_u64)at)) : none;
    }
}

/* A batch of pieces as they are, to the row that begins at `to`. */
static K_INLINE void ll_store_pieces(const struct k_thread *k, struct k_peer to,
                                     struct ll_span part, k_i32 batch,
                                     const struct ll_pieces *p) {
    K_UNROLL for (k_i32 i = 0; i < K_AHEAD; i++) {
        const k_i32 at = ll_piece_at(k, part, 0, batch, i);
        if (at < part.end) {
            k_store16_to(k_peer_plus(to, (k_u64)at), p->v[i]);
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

/* One lane's channels of a group as E4M3, four in a word of `out`; the inverse of the group's scale. */
static K_INLINE k_f32 ll_cast(struct k_thread *k, const struct k_16 *x, k_bool power_of_2,
                              k_u32 *out) {
    k_f32 v[K_CAST_CHANNELS], inverse = 0.0f;
    k_u32 most = 0; /* bits of a magnitude: those of larger ones are larger */
    K_UNROLL for (k_i32 i = 0; i < K_LL_PIECES; i++) {
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

/* Whole groups, and their scales. */
static K_INLINE void ll_send_cast(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                  const struct ll_call *c, const struct ll_shape *s, k_i32 t,
                                  struct ll_span part, k_i32 batch, const struct ll_pieces *p,
                                  const struct ll_dests *d, k_u64 mask) {
    const k_bool power_of_2 = (a->signature & K_LL_SIG_POWER_OF_2) != 0;
    K_UNROLL for (k_i32 i = 0; i < K_AHEAD; i += K_LL_PIECES) {
        const k_i32 at = ll_piece_at(k, part, 1, batch, i), channel = at / 2;
        k_u32 out[K_CAST_CHANNELS / 4];
        const k_f32 inverse = ll_cast(k, p->v + i, power_of_2, out);
        const k_u64 scale_at =
            (k_u64)a->side_at + 4ull * (k_u64)(s->side_words + channel / K_LL_GROUP);
        for (k_u64 left = at < part.end ? mask : 0; left; left &= left - 1) {
            const struct k_peer to = ll_row_at(a, c, d->first[k_lowest(left)], t);
            k_store_cast(k_peer_plus(to, (k_u64)channel), out);
            if (k->lane % K_CASTERS == 0) {
                k_store_u32(k_peer_plus(to, scale_at), k_bits(inverse));
            }
        }
    }
}

/* A unit of work: slice `slice` of token t. */
struct ll_slice {
    k_i32 t, slice, slices;
    struct ll_span part;
};

static K_INLINE struct ll_slice ll_slice_of(const struct k_ll_dispatch_args *a, k_i32 unit,
                                            k_i32 slices) {
    struct ll_slice u = {unit / slices, unit % slices, slices, {0, 0}};
    u.part = ll_cut(a->row_bytes, 2 * K_LL_GROUP, slices, u.slice);
    return u;
}

/* One warp tells every rank of a slice: that it is there, or that the token does not go there. */
static K_FN k_bool ll_publish_slice(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                    const struct ll_call *c, const struct ll_slice *u,
                                    const struct ll_dests *d, k_u64 mask) {
    const struct k_group *g = &a->g;
    const k_u64 at = ll_part(g, c, &a->ll.map.arrived, g->rank) +
                     8ull * ((k_u64)u->t * (k_u64)u->slices + (k_u64)u->slice);
    for (k_i32 i = k->lane; i < a->topk; i += K_LANES) {
        if (mask >> i & 1) {
            k_publish(k_peer_at(g, d->first[i], at), K_WORD(c->tag, u->slices));
        }
    }
    k_bool ok = 1;
    for (k_i32 base = 0; ok && base < g->num_ranks; base += K_LANES) {
        k_i32 p = base + k->lane < g->num_ranks ? base + k->lane : -1;
        K_ROLLED for (k_i32 i = 0; i < a->topk; i++) {
            p = d->rank[i] == p ? -1 : p;
        }
        ok = ll_await_one_free(k, c, p);
        if (ok && p >= 0 && !k->mask.is_gone) {
            k_post(k_peer_at(g, p, at), K_WORD(c->tag, 0));
        }
    }
    return ok;
}

/* By all warps of a block, to every rank that the token goes to. `pieces`: the first batch. */
static K_FN k_bool ll_send_slice(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, const struct ll_shape *s,
                                 const struct ll_slice *u, k_bool listed,
                                 struct ll_pieces *pieces) {
    struct ll_dests *d = (struct ll_dests *)k_shared(k);
    const k_bool cast = (a->signature & K_LL_SIG_CAST) != 0;
    const k_i32 each = 16 * K_AHEAD * K_LANES * k->num_warps; /* bytes of a batch */
    const k_u64 mask = ll_mask_of(k, d->first, a->topk, 0);
    for (k_i32 i = 0; i * each < u->part.end - u->part.from; i++) {
        struct ll_pieces next;
        ll_load_pieces(k, k_row(&a->x, u->t), u->part, cast, i + 1, &next);
        if (cast) {
            ll_send_cast(k, a, c, s, u->t, u->part, i, pieces, d, mask);
        } else {
            for (k_u64 left = mask; left; left &= left - 1) {
                ll_store_pieces(k, ll_row_at(a, c, d->first[k_lowest(left)], u->t), u->part, i,
                                pieces);
            }
        }
        *pieces = next;
    }
    if (u->slice == 0) {
        ll_send_side(k, a, c, s, u->t, d);
        ll_send_indices(k, a, c, u->t, listed, d);
    }
    k_barrier(k, 1); /* the slice is stored, by all warps */
    if (u->slice == 0 && k->warp == k->num_warps - 1) {
        ll_note_dests(k, a, u->t, d, mask);
    }
    return k->warp != 0 || ll_publish_slice(k, a, c, u, d, mask);
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
    const k_i32 slices = ll_slices(s->tokens), units = s->tokens * slices;
    const k_bool listed = s->tokens <= ll_most_listed(k, a);
    struct ll_dests *d = (struct ll_dests *)k_shared(k);
    k_bool ok = 1;
    K_ROLLED for (k_i32 i = k->block; i == k->block || i < units; i += k->num_blocks) {
        const struct ll_slice u = ll_slice_of(a, i, slices);
        struct ll_pieces pieces;
        if (i != k->block) {
            k_barrier(k, 1); /* of the last slice nobody reads where it went any more */
        }
        if (i < units) { /* on its way while it is looked up where it goes */
            ll_load_pieces(k, k_row(&a->x, u.t), u.part, (a->signature & K_LL_SIG_CAST) != 0, 0,
                           &pieces);
            ok = ok && (k->warp != 0 || ll_find_dests(k, a, c, u.t, d));
        }
        if (i == k->block) {
            if (listed) {
                ll_list(k, a, 0, s->tokens);
            }
            ll_write_head(k, a, c, s);
            ok = k_barrier(k, ok && ll_await_block_free(k, c, 0));
            ok = ok && ll_send_counts(k, a, c, s, listed);
        }
        if (!k_barrier(k, ok)) {
            return 0;
        }
        ok = i >= units || ll_send_slice(k, a, c, s, &u, listed, &pieces);
    }
    return ok;
}

#endif
