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

#define K_LL_IDS 8 /* ids, or entries, that a lane has under way at once */

/* Selection number i (t * K + k) of this rank: an expert, or -1. */
static K_INLINE k_i32 ll_id(const struct k_ll_dispatch_args *a, k_i32 i) {
    const k_i64 id = a->id_bytes == 8 ? ((const k_i64 *)a->ids.data)[i]
                                      : (k_i64)((const k_i32 *)a->ids.data)[i];
    return id >= 0 && id < a->g.num_experts ? (k_i32)id : -1;
}

static K_INLINE k_i32 ll_rank_of(const struct k_ll_dispatch_args *a, k_i32 id) {
    return id < 0 ? -1 : a->g.expert_rank[id];
}

/* ---- who selects what ------------------------------------------------------------------------ */

/* Where a token's row goes: in the block's scratch, made by its warps together. */
struct ll_dests {
    k_i32 rank[K_MAX_TOPK];  /* of selection k, or -1 */
    k_u32 index[K_MAX_TOPK]; /* within (source, expert) */
    k_u32 row
        [K_MAX_TOPK]; /* within (source, rank), at the first selection of each rank; or nowhere */
};
#define K_LL_NOWHERE 0xffffffffu
_Static_assert(sizeof(struct ll_dests) + 4 * K_MAX_TOPK <= K_SCRATCH_BYTES(1),
               "one warp's scratch holds it, and a token's entries");

/*
 * The rest of the block's scratch is a list of this rank's selections: {first : 2 | rank : 10 | expert : 20},
 * `first` being 0 at a token's first selection of a rank. What is counted is how many entries are alike.
 */
#define K_LL_IS_EXPERT 0x800fffffu
#define K_LL_IS_ROW 0xfff00000u
#define K_LL_NO_ENTRY 0xffffffffu
#define K_LL_NOT_FIRST 0x40000000u
_Static_assert(K_MAX_RANKS <= 1 << 10, "an entry has 10 bits for a rank");

static K_INLINE k_u32 ll_row_entry(k_i32 rank) {
    return (k_u32)rank << 20;
}

static K_INLINE k_u32 *ll_entries(struct k_thread *k) {
    return (k_u32 *)((k_u8 *)k_shared(k) + sizeof(struct ll_dests));
}

/* Tokens whose selections the list holds at once. */
static K_INLINE k_i32 ll_most_listed(struct k_thread *k, const struct k_ll_dispatch_args *a) {
    const k_i32 bytes = (k_i32)k_shared_bytes(k), least = k->num_warps * a->g.scratch_bytes;
    return (k_max(bytes, least) - (k_i32)sizeof(struct ll_dests)) / 4 / a->topk;
}

/* All warps of a block list tokens `from` to `end`: each lane takes a token. */
static K_FN void ll_list(struct k_thread *k, const struct k_ll_dispatch_args *a, k_i32 from,
                         k_i32 end) {
    for (k_i32 t = from + k->warp * K_LANES + k->lane; t < end; t += k->num_warps * K_LANES) {
        k_u32 *entry = ll_entries(k) + (t - from) * a->topk;
        for (k_i32 base = 0; base < a->topk; base += K_LL_IDS) {
            k_i32 id[K_LL_IDS], rank[K_LL_IDS];
            K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
                id[i] = base + i < a->topk ? ll_id(a, t * a->topk + base + i) : -1;
            }
            K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
                rank[i] = ll_rank_of(a, id[i]);
            }
            K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
                k_bool first = 1;
                K_UNROLL for (k_i32 j = 0; j < i; j++) {
                    first = first && rank[j] != rank[i];
                }
                for (k_i32 j = 0; j < base; j++) {
                    first = first && (entry[j] == K_LL_NO_ENTRY ||
                                      (entry[j] & K_LL_IS_ROW & ~K_LL_NOT_FIRST) !=
                                          ll_row_entry(rank[i]));
                }
                if (base + i < a->topk) {
                    entry[base + i] = id[i] < 0 ? K_LL_NO_ENTRY
                                                : ll_row_entry(rank[i]) | (k_u32)id[i] |
                                                      (first ? 0 : K_LL_NOT_FIRST);
                }
            }
        }
    }
}

/* How many of the first `num` entries are of the same expert as `mine`, and how many are the first of
 * their token for the same rank. */
struct ll_alike {
    k_u32 expert, rank;
};

static K_FN struct ll_alike ll_count_alike(struct k_thread *k, k_i32 num, k_u32 mine) {
    const k_u32 *entry = ll_entries(k);
    const k_u32 id = mine & K_LL_IS_EXPERT, row = mine & K_LL_IS_ROW & ~K_LL_NOT_FIRST;
    struct ll_alike n = {0, 0};
    for (k_i32 base = k->lane; base < num; base += K_LL_IDS * K_LANES) {
        K_UNROLL for (k_i32 i = 0; i < K_LL_IDS; i++) {
            const k_i32 at = base + i * K_LANES;
            const k_u32 other = at < num ? entry[at] : K_LL_NO_ENTRY;
            n.expert += (other & K_LL_IS_EXPERT) == id;
            n.rank += (other & K_LL_IS_ROW) == row;
        }
    }
    n.expert = k_sum(k, n.expert);
    n.rank = k_sum(k, n.rank);
    return n;
}

static K_INLINE k_u32 ll_entry(const struct k_ll_dispatch_args *a, k_i32 id) {
    return id < 0 ? K_LL_NO_ENTRY : ll_row_entry(ll_rank_of(a, id)) | (k_u32)id;
}

/* ---- counts --------------------------------------------------------------------------------- */

static K_INLINE void ll_post_count(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                   const struct ll_call *c, const struct ll_shape *s, k_i32 e,
                                   k_i32 p, k_u32 count) {
    const struct k_group *g = &a->g;
    const struct k_peer at = k_peer_at(g, p, ll_part(g, c, &a->ll.map.counts, g->rank));
    if (e < 0) {
        ll_post_header(k, c, at, &s->header, count, (k_u32)ll_slices(s->tokens));
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
    const k_i32 items = g->num_ranks + g->num_experts, most = ll_most_listed(k, a);
    k_bool ok = 1;
    for (k_i32 first = ll_last_first(k) - k->warp; first < items;
         first += k_stride(k, k->num_blocks)) {
        const k_i32 i = first + k->warp, e = i - g->num_ranks;
        const k_i32 p = i >= items ? -1
                        : e < 0    ? (g->rank + i) % g->num_ranks
                                   : g->expert_rank[e];
        const k_u32 mine = e < 0 ? ll_row_entry(p) : (k_u32)e;
        k_u32 count = 0;
        for (k_i32 from = 0; from < s->tokens; from += most) {
            const k_i32 end = k_min(from + most, s->tokens);
            if (!listed) {
                k_barrier(k, 1);
                ll_list(k, a, from, end);
                k_barrier(k, 1);
            }
            const struct ll_alike n = ll_count_alike(k, (end - from) * a->topk, mine);
            count += e < 0 ? n.rank : n.expert;
        }
        ok = ok && ll_await_one_free(k, c, p);
        if (ok && p >= 0 && !k->mask.is_gone) {
            ll_post_count(k, a, c, s, e, p, count);
        }
    }
    return ok;
}

/* ---- rows ----------------------------------------------------------------------------------- */

/*
 * What the list, which begins with token `from`, says of token t's selections, added to what was counted
 * before; the warps take them in turn. Of several that go to one rank the first has the row.
 */
static K_FN k_bool ll_add_counts(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, k_i32 from, k_i32 most, k_i32 t,
                                 struct ll_dests *d) {
    const k_i32 own = (t - from) * a->topk;
    const k_bool last = t - from < most;
    k_bool ok = 1;
    for (k_i32 i = k->warp; ok && i < a->topk; i += k->num_warps) {
        const k_u32 mine =
            last ? ll_entries(k)[own + i] : ll_entry(a, ll_id(a, t * a->topk + i));
        const k_i32 p = mine == K_LL_NO_ENTRY ? -1 : (k_i32)(mine >> 20 & 1023u);
        const k_bool first = last && p >= 0 && (mine & K_LL_NOT_FIRST) == 0;
        struct ll_alike n = {0, 0};
        if (p >= 0) {
            n = ll_count_alike(k, last ? own + i : most * a->topk, mine);
        }
        ok = ll_await_one_free(k, c, k->lane == 0 && first ? p : -1);
        if (k->lane == 0) {
            const k_u32 row = n.rank + (from ? d->row[i] : 0);
            d->rank[i] = p;
            d->index[i] = n.expert + (from ? d->index[i] : 0);
            d->row[i] = !last || (first && !k->mask.is_gone) ? row : K_LL_NOWHERE;
        }
    }
    return ok;
}

/* Of token t, by all warps of the block. Everything before t is counted, as much at once as the list
 * holds. */
static K_FN k_bool ll_find_dests(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, k_i32 t, k_bool listed,
                                 struct ll_dests *d) {
    const k_i32 most = ll_most_listed(k, a);
    k_bool ok = 1;
    for (k_i32 from = 0; ok && from <= t; from += most) {
        if (!listed) {
            ll_list(k, a, from, k_min(from + most, t + 1));
            k_barrier(k, 1);
        }
        ok = k_barrier(k, ll_add_counts(k, a, c, from, most, t, d));
    }
    return ok;
}

static K_INLINE k_bool ll_is_dest(const struct ll_dests *d, k_i32 i) {
    return d->row[i] != K_LL_NOWHERE;
}

/* Where selection i's rank has the row. */
static K_INLINE struct k_peer ll_row_at(const struct k_ll_dispatch_args *a,
                                        const struct ll_call *c, const struct ll_dests *d,
                                        k_i32 i) {
    return k_peer_at(&a->g, d->rank[i],
                     ll_part(&a->g, c, &a->ll.map.rows, a->g.rank) +
                         (k_u64)d->row[i] * (k_u64)a->ll.wire_bytes);
}

/* A bit for each selection that has a row there: of ll_dests.row, or ll_places.at. */
static K_INLINE k_u64 ll_mask_of(struct k_thread *k, const k_u32 *row, k_i32 topk) {
    k_u64 mask = 0;
    for (k_i32 base = 0; base < topk; base += K_LANES) {
        const k_i32 i = base + k->lane;
        mask |= (k_u64)k_ballot(k, i < topk && row[i] != K_LL_NOWHERE) << base;
    }
    return mask;
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
                              const struct ll_call *c, const struct ll_shape *s, k_i32 t,
                              const struct ll_dests *d) {
    const k_i32 words = s->side_words + (K_LL_NUM_SCALES(a->types) * a->scale_bytes + 3) / 4;
    for (k_i32 i = k->warp; i < a->topk; i += k->num_warps) {
        if (!ll_is_dest(d, i)) {
            continue;
        }
        const struct k_peer side = k_peer_plus(ll_row_at(a, c, d, i), (k_u64)a->side_at);
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
                                  const struct ll_call *c, const struct ll_shape *s,
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
            const struct k_peer to = ll_row_at(a, c, d, k_lowest(left));
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

/* By all warps of a block, to every rank that the token goes to. `pieces`: the first batch. */
static K_FN k_bool ll_send_slice(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, const struct ll_shape *s,
                                 const struct ll_slice *u, k_bool listed,
                                 struct ll_pieces *pieces) {
    const struct k_group *g = &a->g;
    struct ll_dests *d = (struct ll_dests *)k_shared(k);
    const k_bool cast = (a->signature & K_LL_SIG_CAST) != 0;
    const k_i32 each = 16 * K_AHEAD * K_LANES * k->num_warps; /* bytes of a batch */
    if (!ll_find_dests(k, a, c, u->t, listed, d)) {
        return 0;
    }
    if (u->slice == 0) { /* while the row is on its way */
        ll_send_side(k, a, c, s, u->t, d);
    }
    const k_u64 mask = ll_mask_of(k, d->row, a->topk);
    for (k_i32 i = 0; i * each < u->part.end - u->part.from; i++) {
        struct ll_pieces next;
        ll_load_pieces(k, k_row(&a->x, u->t), u->part, cast, i + 1, &next);
        if (cast) {
            ll_send_cast(k, a, c, s, u->part, i, pieces, d, mask);
        } else {
            for (k_u64 left = mask; left; left &= left - 1) {
                ll_store_pieces(k, ll_row_at(a, c, d, k_lowest(left)), u->part, i, pieces);
            }
        }
        *pieces = next;
    }
    k_barrier(k, 1); /* the slice is stored, by all warps */
    for (k_i32 i = k->warp * K_LANES + k->lane; i < a->topk; i += k->num_warps * K_LANES) {
        if (ll_is_dest(d, i)) {
            const k_u64 word = (k_u64)d->row[i] * (k_u64)u->slices + (k_u64)u->slice;
            k_publish(k_peer_at(g, d->rank[i],
                                ll_part(g, c, &a->ll.map.arrived, g->rank) + 8ull * word),
                      K_WORD(c->tag, u->slices));
        }
    }
    if (u->slice == 0 && k->warp == k->num_warps - 1) {
        ll_note_dests(k, a, u->t, d);
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
    const k_i32 slices = ll_slices(s->tokens), units = s->tokens * slices;
    const k_bool cast = (a->signature & K_LL_SIG_CAST) != 0;
    const k_bool listed = s->tokens <= ll_most_listed(k, a);
    struct ll_slice u = ll_slice_of(a, k->block, slices);
    struct ll_pieces pieces;
    if (k->block < units) { /* on its way while it is counted where it goes */
        ll_load_pieces(k, k_row(&a->x, u.t), u.part, cast, 0, &pieces);
    }
    if (listed) {
        ll_list(k, a, 0, s->tokens);
    }
    ll_write_head(k, a, c, s);
    k_bool ok = k_barrier(k, ll_await_all_free(k, c)) && ll_send_counts(k, a, c, s, listed);
    ok = k_barrier(k, ok);
    for (k_i32 i = k->block; ok && i < units; i += k->num_blocks) {
        u = ll_slice_of(a, i, slices);
        if (i != k->block) {
            ll_load_pieces(k, k_row(&a->x, u.t), u.part, cast, 0, &pieces);
        }
        ok = ll_send_slice(k, a, c, s, &u, listed, &pieces);
    }
    return ok;
}

#endif
