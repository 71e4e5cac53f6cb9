/* SPDX-License-Identifier: MIT */
/*
 * The receive half of a low-latency dispatch. Function bodies for ll_dispatch.k.c. A row's place at an
 * expert is the sum of the lower sources' counts and the index in its sidecar, so blocks take rows in
 * any order and the output is the same.
 */
#ifndef KERNEL_LL_RECEIVE_H
#define KERNEL_LL_RECEIVE_H

#include "kernel/ll_send.h"

/* Rows at each expert, or of compact output: R * M. */
static K_INLINE k_i32 ll_expert_rows(const struct k_ll_dispatch_args *a) {
    return a->g.num_ranks * a->ll.max_tokens;
}

/* Nothing of this source holds: it was masked before, or its counts did not come (ll_settle). */
static K_INLINE k_bool ll_is_absent(const struct k_thread *k, k_i32 source) {
    const struct k_ll_peer *p = k->mask.ll ? &k->mask.ll->peers[source] : 0;
    return p && (ll_was_masked(k, k_load(&p->mask)) ||
                 k_load(&p->verdict) == K_LL_NOTE(k->mask.kernel, K_LL_ABSENT));
}

static K_INLINE const k_u64 *ll_counts_of(const struct k_ll_dispatch_args *a,
                                          const struct ll_call *c, k_i32 source) {
    return ll_own_words(&a->g, c, &a->ll.map.counts, source);
}

static K_INLINE k_bool ll_compact(const struct k_ll_dispatch_args *a) {
    return (a->signature & K_LL_SIG_COMPACT) != 0;
}

/* ---- counts --------------------------------------------------------------------------------- */

/* Whether all words of a source's counts are here, which each lane has for itself; or NULL. */
static K_FN k_bool ll_await_counts(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                   const struct ll_call *c, k_i32 source, k_bool looks) {
    const k_i32 num = K_LL_HEADER + a->g.num_local;
    const k_u64 *words = ll_counts_of(a, c, source);
    k_bool ok = 1;
    for (k_i32 base = 0; ok && base < num; base += K_LANES) {
        const k_i32 i = base + k->lane;
        const k_bool is_word = i <= K_LL_ROWS || (i >= K_LL_HEADER && i < num);
        k_u32 value = 0;
        if (looks) {
            ok = k_all(k, !is_word || (k_u32)(k_load(words + i) >> 32) == c->tag);
        } else {
            ok = k_await_word(k, is_word ? words + i : 0, c->tag, source, K_PHASE_COUNTS,
                              &value);
        }
    }
    return ok;
}

/*
 * With masks every block knows of every source whether its counts hold before it relies on any, as all
 * places depend on that; and all blocks must think the same. Who has waited in vain claims the verdict
 * and looks once more before it says so. Who has seen the counts looks at the verdict behind them: in the
 * opposite order, so that one of the two sees the other.
 */
static K_FN k_bool ll_settle(struct k_thread *k, const struct k_ll_dispatch_args *a,
                             const struct ll_call *c) {
    k_bool ok = 1;
    for (k_i32 s = k->warp; ok && s < a->g.num_ranks; s += k->num_warps) {
        if (ll_is_masked(k, s)) {
            continue;
        }
        k_u64 *verdict = &k->mask.ll->peers[s].verdict;
        const k_u64 pending = K_LL_NOTE(k->mask.kernel, K_LL_PENDING);
        k->mask.is_gone = 0;
        ok = ll_await_counts(k, a, c, s, 0);
        if (ll_any_gone(k) &&
            k_ballot(k, k->lane == 0 && k_raise_old(verdict, pending) < pending) != 0) {
            const k_bool here = ll_await_counts(k, a, c, s, 1);
            if (k->lane == 0) {
                k_publish_local(verdict,
                                K_LL_NOTE(k->mask.kernel, here ? K_LL_PRESENT : K_LL_ABSENT));
            }
        }
        struct k_spinner spin = K_SPINNER;
        while (k_acquire(verdict) == pending) {
            k_pause(&spin); /* who has claimed it waits for nobody */
        }
    }
    return k_barrier(k, ok);
}

/* In a source's message: its selections of local expert e, or (e = L) its rows for this rank. NULL: it
 * has none. */
static K_INLINE const k_u64 *ll_count_word(const struct k_thread *k,
                                           const struct k_ll_dispatch_args *a,
                                           const struct ll_call *c, k_i32 source, k_i32 e) {
    return ll_is_absent(k, source) ? 0
                                   : ll_counts_of(a, c, source) +
                                         (e < a->g.num_local ? K_LL_HEADER + e : K_LL_ROWS);
}

/* Where the ranges of e are; 0: it has none. */
static K_INLINE k_u64 ll_ranges_of(const struct k_ll_dispatch_args *a, k_i32 e) {
    const k_bool all = e == a->g.num_local;
    return a->ranges.data && ll_compact(a) == all ? k_row(&a->ranges, all ? 0 : e) : 0;
}

/* Selections of local expert e by all sources: its count and where each source's rows are. With L for
 * e: the rows of compact output. */
static K_FN k_bool ll_take_expert(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                  const struct ll_call *c, k_i32 e) {
    const k_i32 ranks = a->g.num_ranks;
    const k_u64 ranges = ll_ranges_of(a, e);
    k_u32 sum = 0;
    for (k_i32 base = 0; base < ranks; base += K_LANES) {
        const k_i32 s = base + k->lane;
        const k_u64 *word = s < ranks ? ll_count_word(k, a, c, s, e) : 0;
        k_u32 count = 0, all = 0;
        if (!k_await_word(k, word, c->tag, s, K_PHASE_COUNTS, &count)) {
            return 0;
        }
        const k_u32 before = sum + k_scan(k, count, &all);
        if (s < ranks && ranges) {
            *(k_u64 *)(ranges + 8ull * (k_u64)s) = (k_u64)before << 32 | count;
        }
        sum += all;
    }
    if (e == a->g.num_local) {
        return 1;
    }
    if (k->lane == 0 && a->expert_counts.data) {
        *(k_u32 *)k_row(&a->expert_counts, e) = sum;
    }
    if (k->lane == 0 && a->expert_totals.data) {
        *(k_u32 *)k_row(&a->expert_totals, e) += sum;
    }
    return 1;
}

/* After a failure the expert has no rows, so that kernels behind this one stay in bounds. */
static K_FN void ll_clear_expert(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 k_i32 e) {
    const k_u64 ranges = ll_ranges_of(a, e);
    for (k_i32 s = k->lane; ranges && s < a->g.num_ranks; s += K_LANES) {
        *(k_u64 *)(ranges + 8ull * (k_u64)s) = 0;
    }
    if (k->lane == 0 && e < a->g.num_local && a->expert_counts.data) {
        *(k_u32 *)k_row(&a->expert_counts, e) = 0;
    }
}

/* Warps share out the experts, from the grid's end, as blocks at its start have rows first. `ok`: the
 * warp has not failed; whoever has clears what is its own, and nobody else writes there. */
static K_FN k_bool ll_take_counts(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                  const struct ll_call *c, k_bool ok) {
    const k_i32 last = k->num_blocks - 1;
    const k_i32 num = a->g.num_local + (ll_compact(a) ? 1 : 0);
    for (k_i32 e = k->warp * k->num_blocks + last - k->block; e < num;
         e += k_stride(k, k->num_blocks)) {
        ok = ok && ll_take_expert(k, a, c, e);
        if (!ok) {
            ll_clear_expert(k, a, e);
        }
    }
    return ok;
}

/* ---- rows ----------------------------------------------------------------------------------- */

#define K_LL_SOURCES 4 /* whose counts a lane asks for at once */

/* Where the selections of a received row go, in the warp's stage: the block's list is over, but what is
 * in front of it may be read still. */
struct ll_places {
    k_i32 at[K_MAX_TOPK];     /* a row of the output, or K_LL_... */
    k_i32 expert[K_MAX_TOPK]; /* whose it is, or 0 */
    k_f32 weight[K_MAX_TOPK];
};
_Static_assert(sizeof(struct ll_places) <= K_LL_STAGE_BYTES, "a warp's stage holds it");
_Static_assert(sizeof(struct ll_dests) <= K_SCRATCH_BYTES(1), "stages are behind it");

/* The row of compact output of a source's row j; -1: the rows of lower sources are not known. */
static K_FN k_i64 ll_compact_row(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, k_i32 source, k_i32 j) {
    k_i64 at = j;
    for (k_i32 base = 0; base < source; base += K_LANES) {
        const k_i32 lower = base + k->lane;
        const k_u64 *word = lower < source ? ll_count_word(k, a, c, lower, a->g.num_local) : 0;
        k_u32 count = 0, all = 0;
        if (!k_await_word(k, word, c->tag, lower, K_PHASE_COUNTS, &count)) {
            return -1;
        }
        k_scan(k, count, &all);
        at += all;
    }
    return at;
}

static K_INLINE void ll_put_id(const struct k_ll_dispatch_args *a, k_i64 row, k_i32 i,
                               k_i32 e) {
    if (a->recv_ids.data && a->recv_id_bytes == 8) {
        *(k_i64 *)k_at(&a->recv_ids, row, i) = e;
    } else if (a->recv_ids.data) {
        *(k_i32 *)k_at(&a->recv_ids, row, i) = e;
    }
}

/* Compact: the row is written once, at the place that the first of this rank's selections says; and beside
 * it, by the warp that notes, which of this rank's experts it is for. */
static K_FN k_bool ll_find_compact(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                   const struct ll_call *c, const struct ll_shape *s,
                                   k_i32 source, const k_u8 *side, k_bool notes,
                                   struct ll_places *to) {
    k_i64 at = -1;
    k_u32 j = 0;
    k_bool found = 0;
    for (k_i32 base = 0; base < s->topk; base += K_LANES) {
        const k_i32 i = base + k->lane < s->topk ? base + k->lane : -1;
        struct k_16 w = {K_LL_NONE, 0, 0, 0};
        if (!ll_take_selection(k, c, side, i, source, &w)) {
            return 0;
        }
        const k_u64 here = k_ballot(k, i >= 0 && (k_i32)w.x >= 0);
        if (here && !found) {
            j = k_from(k, w.y, k_lowest(here));
            found = 1;
        }
    }
    at = ll_any_gone(k) ? 0 : ll_compact_row(k, a, c, source, (k_i32)j);
    for (k_i32 base = 0; at >= 0 && base < s->topk; base += K_LANES) {
        const k_i32 i = base + k->lane;
        if (i < s->topk) {
            to->at[i] = i == 0 ? (k_i32)at : K_LL_NOWHERE;
            to->expert[i] = 0;
            to->weight[i] = 1.0f;
        }
        struct k_16 w = {0, 0, 0, 0};
        if (notes && i < s->topk && k_take16(side + 16 * i, c->tag, &w)) {
            ll_put_id(a, at, i, (k_i32)w.x);
            if (a->recv_weights.data) {
                *(k_u32 *)k_at(&a->recv_weights, at, i) = (k_i32)w.x >= 0 ? w.z : 0;
            }
        }
    }
    k_syncwarp(k);
    return at >= 0;
}

/* Adds to `at` the counts of local expert e (-1: none) by lower sources, several at once as long as all
 * of them are here; the first that was not added. With masks none: any may be absent. */
static K_FN k_i32 ll_add_lower(struct k_thread *k, const struct k_ll_dispatch_args *a,
                               const struct ll_call *c, k_i32 source, k_i32 e, k_u32 *at) {
    const k_u64 *word = ll_counts_of(a, c, 0) + K_LL_HEADER + e;
    const k_u64 step = a->ll.map.counts.stride / 8;
    k_i32 lower = 0;
    K_ROLLED for (k_bool here = !k->mask.ll; here && lower < source;
                  lower += here ? K_LL_SOURCES : 0) {
        k_u32 sum = 0;
        K_UNROLL for (k_i32 i = 0; i < K_LL_SOURCES; i++) {
            const k_bool counts = e >= 0 && lower + i < source;
            const k_u64 w = counts ? k_load(word + (k_u64)i * step) : K_WORD(c->tag, 0);
            here = here && (k_u32)(w >> 32) == c->tag;
            sum += (k_u32)w;
        }
        here = k_all(k, here);
        *at += here ? sum : 0;
        word += K_LL_SOURCES * step;
    }
    return k_min(lower, source);
}

/* The counts of lower sources are awaited, lane by lane each for its selection's expert. */
static K_FN k_bool ll_find_places(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                  const struct ll_call *c, const struct ll_shape *s,
                                  k_i32 source, const k_u8 *side, struct ll_places *to) {
    const k_i32 most = ll_expert_rows(a);
    for (k_i32 base = 0; base < s->topk; base += K_LANES) {
        const k_i32 i = base + k->lane;
        struct k_16 w = {K_LL_NONE, 0, 0, 0};
        if (!ll_take_selection(k, c, side, i < s->topk ? i : -1, source, &w)) {
            return 0;
        }
        const k_i32 e = (k_i32)w.x;
        k_bool here = e >= 0 && e < a->g.num_local;
        k_u32 at = here ? w.y : 0;
        here = here && at < (k_u32)a->ll.max_tokens;
        k_i32 lower = ll_add_lower(k, a, c, source, here ? e : -1, &at);
        for (; lower < source; lower++) {
            const k_u64 *word = here ? ll_count_word(k, a, c, lower, e) : 0;
            k_u32 count = 0;
            if (!k_await_word(k, word, c->tag, lower, K_PHASE_COUNTS, &count)) {
                return 0;
            }
            at += count;
        }
        if (i < s->topk) {
            to->at[i] = here ? e * most + (k_i32)at : e < 0 ? K_LL_NOWHERE : K_LL_TOO_MANY;
            to->expert[i] = e;
            to->weight[i] = k_float(w.z);
        }
    }
    k_syncwarp(k);
    return 1;
}

/* What combine needs of token t of a source; `to` NULL: it did not come here. */
static K_FN void ll_note_row(struct k_thread *k, const struct k_ll_dispatch_args *a,
                             const struct ll_shape *s, k_i32 source, k_i32 t,
                             const struct ll_places *to) {
    const struct k_ll *ll = &a->ll;
    const k_i64 first = ll_row_of(ll, source, t, ll->group_topk);
    k_i32 *place = (k_i32 *)ll_in_handle(ll, ll->map.place) + first;
    k_f32 *weight = (k_f32 *)ll_in_handle(ll, ll->map.weight) + first;
    for (k_i32 i = k->lane; i < ll->group_topk; i += K_LANES) {
        place[i] = to && i < s->topk ? to->at[i] : K_LL_NOWHERE;
        if (place[i] >= 0) {
            weight[i] = to->weight[i];
            if (a->recv_source.data) {
                *(k_i32 *)k_row(&a->recv_source, to->at[i]) = t;
            }
        }
    }
}

/* Of a row. */
static K_INLINE k_i32 ll_num_scales(const struct k_ll_dispatch_args *a,
                                    const struct ll_shape *s) {
    return s->signature & K_LL_SIG_CAST ? a->row_bytes / (2 * K_LL_GROUP)
                                        : K_LL_NUM_SCALES(s->types);
}

static K_INLINE void ll_put_scale(const struct k_ll_dispatch_args *a, k_i32 bytes, k_i64 column,
                                  k_i32 row, k_u32 word) {
    const k_u64 at = k_at(&a->recv_scales, column, row);
    if (bytes == 4) {
        *(k_u32 *)at = word;
    } else if (bytes == 2) {
        *(k_u16 *)at = (k_u16)word;
    } else {
        *(k_u8 *)at = (k_u8)word;
    }
}

/* The row's scales, of which each word is awaited: a column of the output for each, or for each four
 * exponents. */
static K_FN k_bool ll_take_scales(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                  const struct ll_call *c, const struct ll_shape *s,
                                  k_i32 source, const k_u64 *words, const struct ll_places *to,
                                  k_u64 mask) {
    const k_bool cast = (s->signature & K_LL_SIG_CAST) != 0;
    const k_i32 most = ll_expert_rows(a), bytes = cast ? 4 : a->scale_bytes;
    const k_i32 all = ll_num_scales(a, s), columns = a->packed_scales ? (all + 3) / 4 : all;
    k_bool ok = 1;
    for (k_i32 base = 0; ok && base < columns; base += K_LANES) {
        const k_i32 w = base + k->lane, first = a->packed_scales ? 4 * w : w * bytes / 4;
        const k_i32 num = w >= columns ? 0 : a->packed_scales ? k_min(4, all - first) : 1;
        k_u32 value[4];
        ok = k_await_most(k, 4, words + first, 1, num, c->tag, source, K_PHASE_ROWS, value);
        if (!ok || k->mask.is_gone) {
            continue;
        }
        k_u32 word = value[0] >> (8 * (w * bytes % 4));
        if (a->packed_scales) {
            word = 0;
            K_UNROLL for (k_i32 b = 0; b < 4; b++) {
                word |= b < num ? (value[b] >> 23 & 0xffu) << (8 * b) : 0;
            }
        }
        for (k_u64 left = num ? mask : 0; left; left &= left - 1) {
            const k_i32 i = k_lowest(left), e = to->expert[i];
            ll_put_scale(a, bytes, (k_i64)e * columns + w, to->at[i] - e * most, word);
        }
    }
    return ok;
}

/* The row's batches from `first` on, every step-th, to each place in `mask`. */
static K_FN k_bool ll_take_row(struct k_thread *k, const struct k_ll_dispatch_args *a,
                               const struct ll_call *c, k_i32 source, const k_u8 *row,
                               k_i32 bytes, k_i32 first, k_i32 step, const struct ll_places *to,
                               k_u64 mask) {
    for (k_i32 b = first; b * K_LL_BATCH_BYTES < bytes; b += step) {
        K_ROLLED for (k_i32 j = k->lane * K_LL_RUN; j < K_LL_JOBS; j += K_LANES * K_LL_RUN) {
            struct ll_pieces p;
            if (!ll_take_pieces(k, c, row, bytes, b, j, source, &p)) {
                return 0;
            }
            if (k->mask.is_gone) {
                continue;
            }
            for (k_u64 left = mask; left; left &= left - 1) {
                ll_store_pieces(k_row(&a->recv_x, to->at[k_lowest(left)]), bytes, b, j, &p);
            }
        }
    }
    return 1;
}

/* One warp: part `part` of `parts` of a source's token t. Who has the first notes what combine needs, and who
 * has the last takes the scales. Of a source that is gone meanwhile ll_wipe takes back what came. */
static K_FN k_bool ll_take_token(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                 const struct ll_call *c, const struct ll_shape *s,
                                 k_i32 source, k_i32 t, k_i32 part, k_i32 parts) {
    const k_bool notes = part == 0;
    const k_u8 *side = k_own(&a->g, ll_part(&a->g, c, &a->ll.map.rows, source) +
                                        (k_u64)t * (k_u64)s->wire_bytes);
    struct ll_places *to = (struct ll_places *)ll_own_stage(k);
    struct k_16 w;
    k->mask.is_gone = 0;
    if (!ll_take_selection(k, c, side, 0, source, &w)) {
        return 0;
    }
    if (ll_any_gone(k)) {
        return 1;
    }
    if (w.x == K_LL_NONE) {
        if (notes) {
            ll_note_row(k, a, s, source, t, 0);
        }
        return 1;
    }
    if (!(ll_compact(a) ? ll_find_compact(k, a, c, s, source, side, notes, to)
                        : ll_find_places(k, a, c, s, source, side, to))) {
        return 0;
    }
    if (ll_any_gone(k)) {
        return 1;
    }
    if (notes) {
        ll_note_row(k, a, s, source, t, to);
    }
    const k_u64 mask = ll_mask_of(k, to->at, s->topk, 0);
    const k_i32 bytes = a->row_bytes / (s->signature & K_LL_SIG_CAST ? 2 : 1);
    k_bool ok = !a->recv_x.data ||
                ll_take_row(k, a, c, source, side + s->row_at, bytes, part, parts, to, mask);
    if (ok && part == parts - 1 && a->recv_scales.data) {
        ok = ll_take_scales(k, a, c, s, source, (const k_u64 *)(side + s->scales_at), to, mask);
    }
    k_syncwarp(k); /* the stage can be used again */
    return ok;
}

/* In how many parts warps share out each of `rows` rows, at most a batch to each. */
static K_INLINE k_i32 ll_row_parts(const struct k_thread *k, k_i32 rows, k_i32 batches) {
    return k_max(k_min(k_stride(k, k->num_blocks) / k_max(rows, 1), batches), 1);
}

/* The tokens of all sources, one list that is dealt to the warps; it begins with the next rank's. */
static K_FN k_bool ll_take_rows(struct k_thread *k, const struct k_ll_dispatch_args *a,
                                const struct ll_call *c, const struct ll_shape *s) {
    const struct k_group *g = &a->g;
    const k_i32 batches = ll_num_batches(a->row_bytes / (s->signature & K_LL_SIG_CAST ? 2 : 1));
    k_i32 before = 0, unit = k->block + k->warp * k->num_blocks;
    for (k_i32 base = 0; base < g->num_ranks; base += K_LANES) {
        const k_i32 mine = base + k->lane, of = (g->rank + 1 + mine) % g->num_ranks;
        const k_bool any = mine < g->num_ranks;
        k_u32 num_tokens = 0;
        k->mask.is_gone = any && ll_is_absent(k, of);
        if (!ll_await_header(k, c, any ? ll_counts_of(a, c, of) : 0, of, &s->header,
                             &num_tokens)) {
            return 0;
        }
        if (k_first(k, 0) == 0 && any) {
            ((k_u32 *)ll_in_handle(&a->ll, a->ll.map.count))[of] = num_tokens;
        }
        for (k_i32 i = 0; i < K_LANES && base + i < g->num_ranks; i++) {
            const k_i32 source = (g->rank + 1 + base + i) % g->num_ranks;
            const k_i32 tokens = (k_i32)k_from(k, num_tokens, i);
            const k_i32 parts = ll_row_parts(k, tokens * g->num_ranks, batches);
            const k_i32 units = tokens * parts;
            for (; unit < before + units; unit += k_stride(k, k->num_blocks)) {
                const k_i32 u = unit - before;
                if (!ll_take_token(k, a, c, s, source, u / parts, u % parts, parts)) {
                    return 0;
                }
            }
            before += units;
        }
    }
    return 1;
}

/* A kernel that only receives: the handle is of a dispatch of this shape. It knows of scales where it
 * takes them. */
static K_FN k_bool ll_is_of_shape(struct k_thread *k, const struct k_ll_dispatch_args *a) {
    const struct k_ll_head *h = a->ll.head;
    const k_u32 form = K_LL_SIG_CAST | K_LL_SIG_POWER_OF_2 | K_LL_SIG_COMPACT;
    return (h->row_bytes == a->row_bytes && h->experts == a->g.experts &&
            h->max_tokens == a->ll.max_tokens &&
            (h->signature & form) == (a->signature & form) &&
            K_SIG_ROW_TYPE(h->types ^ a->types) == 0 && (a->topk == 0 || h->topk == a->topk) &&
            (!a->recv_weights.data || (h->signature & K_LL_SIG_WEIGHTS)) &&
            (a->scale_bytes == 0 || K_SIG_SCALE_TYPE(h->types ^ a->types) == 0)) ||
           ll_refuse(k, K_REFUSED_HANDLE);
}

/* Rows `from` to `end` of place `place` (an expert, or 0 in compact output) become zeros from nobody. */
static K_FN void ll_wipe_rows(struct k_thread *k, const struct k_ll_dispatch_args *a,
                              const struct ll_shape *s, k_i32 place, k_i32 from, k_i32 end) {
    const k_bool cast = (s->signature & K_LL_SIG_CAST) != 0;
    const k_i32 row_bytes = a->row_bytes / (cast ? 2 : 1), bytes = cast ? 4 : a->scale_bytes;
    const k_i32 scales = ll_num_scales(a, s);
    const k_i32 columns = a->packed_scales ? (scales + 3) / 4 : scales;
    for (k_i32 i = from; i < end; i++) {
        const k_i64 row = (k_i64)place * ll_expert_rows(a) + i;
        if (a->recv_x.data) {
            k_zero(k, (void *)k_row(&a->recv_x, row), row_bytes);
        }
        for (k_i32 w = k->lane; a->recv_scales.data && w < columns; w += K_LANES) {
            ll_put_scale(a, bytes, (k_i64)place * columns + w, i, 0);
        }
        if (a->recv_source.data && k->lane == 0) {
            *(k_i32 *)k_row(&a->recv_source, row) = -1;
        }
        for (k_i32 t = k->lane; ll_compact(a) && t < s->topk; t += K_LANES) {
            ll_put_id(a, row, t, -1);
            if (a->recv_weights.data) {
                *(k_u32 *)k_at(&a->recv_weights, row, t) = 0;
            }
        }
    }
}

/*
 * By the warp that leaves last: of ranks that this kernel has left out although their counts held, rows
 * may be here in part. None of them is left; counts stay.
 */
static K_FN void ll_wipe(struct k_thread *k, const struct k_ll_dispatch_args *a,
                         const struct ll_call *c, const struct ll_shape *s) {
    const k_i32 first = ll_compact(a) ? a->g.num_local : 0;
    const k_i32 last = ll_compact(a) ? first : a->g.num_local - 1;
    for (k_i32 source = 0; source < a->g.num_ranks; source++) {
        if (!ll_is_masked(k, source) || ll_is_absent(k, source)) {
            continue;
        }
        for (k_i32 e = first; e <= last; e++) {
            k_u32 from = 0;
            for (k_i32 lower = 0; lower < source; lower++) {
                const k_u64 *word = ll_count_word(k, a, c, lower, e);
                from += word ? (k_u32)k_load(word) : 0;
            }
            const k_u32 num = (k_u32)k_load(ll_count_word(k, a, c, source, e));
            ll_wipe_rows(k, a, s, e - first, (k_i32)from, (k_i32)(from + num));
            if (k->lane == 0 && ll_ranges_of(a, e)) {
                *(k_u64 *)(ll_ranges_of(a, e) + 8ull * (k_u64)source) = 0;
            }
        }
        if (k->lane == 0) {
            ((k_u32 *)ll_in_handle(&a->ll, a->ll.map.count))[source] = 0;
        }
    }
}

/* `ok`: the send half, if there was one, has not failed. */
static K_FN k_bool ll_receive(struct k_thread *k, const struct k_ll_dispatch_args *a,
                              const struct ll_call *c, const struct ll_shape *s, k_bool ok) {
    if (ok) {
        ll_time_waits(k, c, &a->ll.map.counts, K_PHASE_COUNTS, 0, &a->wait_ns);
    }
    ok = ok && (!k->mask.ll || ll_settle(k, a, c));
    return ll_take_counts(k, a, c, ok && ll_take_rows(k, a, c, s));
}

#endif
