/* SPDX-License-Identifier: MIT */
/*
 * The numbering half of route: selections into a warp's scratch, and from there, or from a mask,
 * the numbers of rows and selections, counted from the start of a warp's share. Function bodies
 * for route.k.c; a warp works by itself here and waits for nobody.
 */
#ifndef KERNEL_ROUTE_NUMBER_H
#define KERNEL_ROUTE_NUMBER_H

#include "kernel/op.h"

/* Selections that a warp holds in its scratch. */
#define K_HELD_SELECTIONS 128
/* What a lane asks for at once. */
#define K_FETCH (K_LANES == 1 ? 1 : 4)

/* A warp's selections, a batch of them. Numbering them turns each id into its row's number, and
 * takes the rank from those whose token goes there by an earlier one. */
struct route_scratch {
    k_i32 id[K_HELD_SELECTIONS];   /* -1: none */
    k_i32 rank[K_HELD_SELECTIONS]; /* -1: none */
};

_Static_assert(sizeof(struct route_scratch) <= K_SCRATCH_BYTES(1), "route_scratch");
_Static_assert(K_HELD_SELECTIONS >= K_MAX_TOPK, "a batch holds a token");

/* Of the blocks, and the warps of each, those that have a share, and how this run marks words. */
struct team {
    k_i32 blocks, warps;
    k_u32 mark;
    k_u32 *rows; /* this block's counters: [warps + 1][K_ROUTE_COLUMNS], at last those of all */
};

/* What a warp has to do: channels [c0, c1), which are tokens [t0, t1). */
struct share {
    k_i32 c0, c1, t0, t1;
    k_i32 held, held_end;  /* the tokens in the scratch */
    k_i32 token, j;        /* a lane begins with selection j of this token of a table of them */
    k_i32 tokens_on, j_on; /* its next selection is so many tokens and selections on */
    k_u32 bad;             /* ~ the first bad selection that this lane has seen, or 0 */
    k_u32 second;          /* this lane's rank's counter when the second channel began */
    k_u32 *counters;       /* [K_ROUTE_COLUMNS] */
    struct route_scratch *scratch;
};

static K_INLINE k_i32 num_columns(const struct k_route_args *a) {
    return K_ROUTE_COLUMNS(a->g.num_experts, a->g.num_ranks);
}

/* Counters of a column: sums, but the largest of the last, which is that of bad selections. */
static K_INLINE k_u32 add_column(const struct k_route_args *a, k_i32 col, k_u32 x, k_u32 y) {
    return col < a->g.num_experts + a->g.num_ranks ? x + y : x > y ? x : y;
}

/* ---- selections into the scratch ------------------------------------------------------------ */

/* Where a lane reads ids, from selection to selection. */
struct id_reader {
    k_u64 at, on, back; /* to the next, and more if that is in the next token */
    k_i32 j;
};

/* Ids of selections i and on, of n, all on their way at once. */
static K_INLINE void fetch_ids(struct id_reader *from, const struct share *w, k_i32 topk,
                               k_i32 i, k_i32 n, k_bool wide, k_i64 *id) {
    K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
        id[q] = -1;
        if (i + q * K_LANES < n) {
            id[q] = wide ? *(const k_i64 *)from->at : (k_i64) * (const k_i32 *)from->at;
        }
        from->at += from->on;
        from->j += w->j_on;
        if (from->j >= topk) {
            from->j -= topk;
            from->at += from->back;
        }
    }
}

/* Takes token t and those behind it into the scratch, as many as fit. */
static K_FN void hold_tokens(struct k_thread *k, const struct k_route_args *a, struct share *w,
                             k_i32 t) {
    const k_i32 topk = a->topk,
                end = t + k_min(w->t1 - t, (k_i32)(K_HELD_SELECTIONS / (k_u32)topk));
    const k_i32 n = (end - t) * topk;
    const k_i64 s0 = a->ids.s0, s1 = a->ids.s1;
    struct id_reader from;
    from.at = a->ids.data + (k_u64)((k_i64)(t + w->token) * s0 + (k_i64)w->j * s1);
    from.on = (k_u64)((k_i64)w->tokens_on * s0 + (k_i64)w->j_on * s1);
    from.back = (k_u64)(s0 - (k_i64)topk * s1);
    from.j = w->j;
    w->held = t;
    w->held_end = end;
    K_ROLLED for (k_i32 i = k->lane; i < n + k->lane; i += K_FETCH * K_LANES) {
        k_i64 id[K_FETCH];
        k_i32 rank[K_FETCH];
        if (a->id_bytes == 8) {
            fetch_ids(&from, w, topk, i, n, 1, id);
        } else {
            fetch_ids(&from, w, topk, i, n, 0, id);
        }
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            const k_bool good = (k_u64)id[q] < (k_u64)a->g.num_experts;
            rank[q] = good ? a->g.expert_rank[id[q]] : -1;
            if (!good && id[q] != -1 && !a->lenient) {
                const k_u32 bad = ~(k_u32)(t * topk + i + q * K_LANES);
                w->bad = bad > w->bad ? bad : w->bad;
            }
        }
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            if (i + q * K_LANES < n) {
                w->scratch->id[i + q * K_LANES] = rank[q] < 0 ? -1 : (k_i32)id[q];
                w->scratch->rank[i + q * K_LANES] = rank[q];
            }
        }
    }
    k_syncwarp(k);
}

/* ---- numbers within a share ----------------------------------------------------------------- */

/* Lanes below this one, but not those more than `back` lanes below. */
static K_INLINE k_u32 just_below(struct k_thread *k, k_i32 back) {
    const k_u32 below = k_below(k);
    return back < K_LANES ? below & ~(below >> back) : below;
}

/* The lanes from `first` on, `num` of them. */
static K_INLINE k_u32 lane_mask(k_i32 first, k_i32 num) {
    return num == K_LANES ? ~0u : ((1u << num) - 1u) << first;
}

/* Whether this lane is the last of a mask that it is in. */
static K_INLINE k_bool is_last(const struct k_thread *k, k_u32 mask) {
    return mask >> k->lane == 1;
}

/* Numbers the selections of tokens [t, end), which are held: of each expert, and of each rank the
 * first of a token. */
static K_INLINE void number_ids(struct k_thread *k, const struct k_route_args *a,
                                struct share *w, k_i32 t, k_i32 end) {
    const k_i32 topk = a->topk, from = (t - w->held) * topk, to = (end - w->held) * topk;
    struct route_scratch *s = w->scratch;
    k_u32 *experts = w->counters, *ranks = w->counters + a->g.num_experts;
    k_i32 *ids = a->h.ids + (k_i64)w->held * topk;
    k_u32 *sel_index = a->h.sel_index + (k_i64)w->held * topk;
    k_i32 j = w->j; /* which of its token's */
    for (k_i32 base = from; base < to; base += K_LANES) {
        const k_i32 i = base + k->lane;
        const k_i32 id = i < to ? s->id[i] : -1, r = i < to ? s->rank[i] : -1;
        const k_u32 named = k_same(k, (k_u32)id), there = k_same(k, (k_u32)r);
        k_bool goes = r >= 0 && !(there & just_below(k, j));
        /* The part of its token that came before. */
        K_ROLLED for (k_i32 e = i - j; e < base; e++) {
            goes = goes && s->rank[e] != r;
        }
        const k_u32 rows = there & k_ballot(k, goes);
        k_u32 index = 0, slot = 0;
        if (id >= 0) {
            index = experts[id] + (k_u32)k_count(named & k_below(k));
        }
        if (goes) {
            slot = ranks[r] + (k_u32)k_count(rows & k_below(k));
        }
        k_syncwarp(k); /* all have read */
        if (id >= 0 && is_last(k, named)) {
            experts[id] = index + 1;
        }
        if (goes && is_last(k, rows)) {
            ranks[r] = slot + 1;
        }
        if (i < to) {
            ids[i] = id;
            sel_index[i] = index;
            s->id[i] = (k_i32)slot;
            s->rank[i] = goes ? r : -1;
        }
        k_syncwarp(k);
        j += w->j_on;
        j -= j >= topk ? topk : 0;
    }
}

/* The destinations of these tokens, ascending. */
static K_INLINE void write_dests(struct k_thread *k, const struct k_route_args *a,
                                 const struct share *w, k_i32 t, k_i32 end) {
    const k_i32 topk = a->topk, to = (end - w->held) * topk;
    const struct route_scratch *s = w->scratch;
    k_i32 token = t + w->token, j = w->j;
    K_ROLLED for (k_i32 i = (t - w->held) * topk + k->lane; i < to; i += K_LANES) {
        const k_i32 r = s->rank[i];
        k_i32 before = 0, num = 0, o = i - j;
        K_ROLLED for (; o + K_FETCH <= i - j + topk; o += K_FETCH) {
            K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
                before += (k_u32)s->rank[o + q] < (k_u32)r;
                num += s->rank[o + q] >= 0;
            }
        }
        K_ROLLED for (; o < i - j + topk; o++) {
            before += (k_u32)s->rank[o] < (k_u32)r;
            num += s->rank[o] >= 0;
        }
        if (r >= 0) {
            const k_i64 at = (k_i64)token * a->g.max_dests + before;
            a->h.dest_rank[at] = r;
            a->h.dest_slot[at] = (k_u32)s->id[i];
        }
        if (j == 0) {
            a->h.num_dests[token] = num;
        }
        token += w->tokens_on;
        j += w->j_on;
        if (j >= topk) {
            j -= topk;
            token++;
        }
    }
    k_syncwarp(k);
}

/* Both from a mask: a lane for each rank, of several tokens at once if that leaves room. */
static K_INLINE void number_mask(struct k_thread *k, const struct k_route_args *a,
                                 struct share *w, k_i32 t, k_i32 end) {
    const k_i32 ranks = a->g.num_ranks, wide = ranks < K_LANES ? ranks : K_LANES;
    const k_i32 many = (k_i32)((k_u32)K_LANES / (k_u32)wide);
    const k_i32 mine = (k_i32)((k_u32)k->lane / (k_u32)wide), j = k->lane - mine * wide;
    const k_u32 token = lane_mask(mine * wide % K_LANES, wide);
    k_u32 *counters = w->counters + a->g.num_experts;
    for (; t < end; t += many) {
        const k_bool has = mine < many && t + mine < end;
        k_i32 num = 0;
        for (k_i32 base = 0; base < ranks; base += wide) {
            const k_i32 r = base + j;
            k_bool goes = has && r < ranks;
            if (goes) {
                goes = *(const k_u8 *)k_at(&a->mask, t + mine, r) != 0;
            }
            const k_u32 all = k_ballot(k, goes), rows = all & k_same(k, (k_u32)r);
            const k_u32 slot = goes ? counters[r] + (k_u32)k_count(rows & k_below(k)) : 0;
            k_syncwarp(k);
            if (goes) {
                const k_i64 at = (k_i64)(t + mine) * a->g.max_dests + num +
                                 k_count(all & token & k_below(k));
                a->h.dest_rank[at] = r;
                a->h.dest_slot[at] = slot;
            }
            if (goes && is_last(k, rows)) {
                counters[r] = slot + 1;
            }
            num += k_count(all & token);
            k_syncwarp(k);
        }
        if (has && j == 0) {
            a->h.num_dests[t + mine] = num;
        }
    }
}

/* Everything of a share, numbered from its start. */
static K_FN void number_share(struct k_thread *k, const struct k_route_args *a,
                              struct share *w) {
    const k_i32 cols = num_columns(a), ranks = a->g.num_ranks, chans = a->g.num_channels;
    K_ROLLED for (k_i32 i = k->lane; i < cols; i += K_LANES) {
        w->counters[i] = 0;
    }
    k_syncwarp(k);
    for (k_i32 c = w->c0; c < w->c1; c++) {
        k_i32 t = channel_first(&a->channels, c);
        const k_i32 end = channel_first(&a->channels, c + 1);
        K_ROLLED for (k_i32 r = k->lane; r < ranks; r += K_LANES) {
            const k_u32 rows = w->counters[a->g.num_experts + r];
            w->second = c == w->c0 + 1 && r == k->lane ? rows : w->second;
            a->h.send_chan[(k_i64)r * (chans + 1) + c] = rows;
        }
        if (!a->id_bytes) {
            number_mask(k, a, w, t, end);
            continue;
        }
        while (t < end) {
            if (t >= w->held_end) {
                hold_tokens(k, a, w, t);
            }
            const k_i32 until = k_min(end, w->held_end);
            number_ids(k, a, w, t, until);
            write_dests(k, a, w, t, until);
            t = until;
        }
    }
    const k_u32 bad = k_most(k, w->bad);
    if (k->lane == 0) {
        w->counters[cols - 1] = bad;
    }
    k_syncwarp(k);
}

#endif
