/* SPDX-License-Identifier: MIT */
/*
 * route: from expert ids (or a token-in-rank mask) to the send side of a handle. Local to a rank.
 *
 * Every place is a stable prefix sum over tokens, so it depends on the routing alone. A warp takes
 * a route_run of whole channels and has a row of counters: of each expert and of each rank. It walks its
 * tokens in order, numbering the selections of each expert and the rows to each rank. Then its row
 * becomes what lies before it: what the earlier warps of the block hold_tokens, and the earlier blocks,
 * which tell their sums by words that carry their own value, so that blocks have no barrier. That
 * is added to all its numbers. No atomics.
 */
#include "kernel/op.h"

/* Selections that a warp holds in its scratch. */
#define K_HELD_SELECTIONS 128
/* What a lane asks for at once. */
#define K_FETCH (K_LANES == 1 ? 1 : 4)

struct route_scratch {
    k_i32 id
        [K_HELD_SELECTIONS]; /* of each selection, -1: none; once numbered: the number of its row */
    k_i32 rank
        [K_HELD_SELECTIONS]; /* -1: none; once numbered: nor if its token goes there anyway */
};

_Static_assert(sizeof(struct route_scratch) <= K_SCRATCH_BYTES(1), "route_scratch");
_Static_assert(K_HELD_SELECTIONS >= K_MAX_TOPK, "a batch holds a token");

/* Of the blocks, and the warps of each, those that have a share, and how this route_run marks words. */
struct team {
    k_i32 blocks, warps;
    k_u32 mark;
    k_u32 *rows; /* this block's counters: [warps + 1][K_ROUTE_COLUMNS], at last those of all */
};

/* What a warp has to do: channels [c0, c1), which are tokens [t0, t1). */
struct share {
    k_i32 c0, c1, t0, t1;
    k_i32 held, held_end;  /* the tokens in the scratch */
    k_i32 token, j;        /* selections: where in a table of them this lane begins, */
    k_i32 tokens_on, j_on; /* and how far it is to its next */
    k_u32 bad;             /* ~ the first bad selection that this lane has seen, or 0 */
    k_u32 second;          /* the lane's rank's counter where the second channel began */
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
    const k_u32 token = wide == K_LANES ? ~0u : ((1u << wide) - 1u) << (mine * wide % K_LANES);
    k_u32 *counters = w->counters + a->g.num_experts;
    for (; t < end; t += many) {
        const k_bool has = mine < many && t + mine < end;
        k_i32 num = 0;
        for (k_i32 base = 0; base < ranks; base += wide) {
            const k_i32 r = base + j;
            k_bool goes = has && r < ranks;
            if (goes) {
                goes = *(const k_u8 *)(a->mask.data + (k_u64)((k_i64)(t + mine) * a->mask.s0 +
                                                              (k_i64)r * a->mask.s1)) != 0;
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

/* ---- sums over shares ----------------------------------------------------------------------- */

/* The block's sums, for the blocks after it. */
static K_FN void post_sums(struct k_thread *k, const struct k_route_args *a,
                           const struct team *team) {
    const k_i32 cols = num_columns(a), first = k->warp * K_LANES + k->lane;
    K_ROLLED for (k_i32 col = first; col < cols; col += k->num_warps * K_LANES) {
        const k_u32 *at = team->rows + col;
        k_u32 sum = 0;
        K_ROLLED for (k_i32 w = 0; w < team->warps; w += K_FETCH) {
            K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
                sum = add_column(a, col, sum, w + q < team->warps ? at[q * cols] : 0);
            }
            at += K_FETCH * cols;
        }
        k_store(&a->h.totals[k->block * (k_i64)cols + col], K_WORD(team->mark, sum));
    }
}

/* What the blocks before this one hold_tokens of a column. */
static K_FN k_bool await_sums(struct k_thread *k, const struct k_route_args *a,
                              const struct team *team, k_i32 col, k_u32 *before) {
    const k_i32 cols = num_columns(a);
    const k_u64 *words = a->h.totals + col;
    k_bool ok = 1;
    K_ROLLED for (k_i32 b = 0; ok && b < k->block; b += K_MANY) {
        const k_i32 n = col < cols ? k_min(k->block - b, K_MANY) : 0;
        k_u32 sum[K_MANY];
        ok = k_await_words(k, words + (k_i64)b * cols, cols, n, team->mark, k->g->rank,
                           K_PHASE_SELF, sum);
        K_UNROLL for (k_i32 i = 0; i < K_MANY; i++) {
            *before = i < n ? add_column(a, col, *before, sum[i]) : *before;
        }
    }
    return ok;
}

/* Turns a column of the block's counters into what lies before each, and the sum of all. */
static K_INLINE void sum_column(const struct k_route_args *a, const struct team *team,
                                k_i32 col, k_u32 before) {
    const k_i32 cols = num_columns(a);
    k_u32 *at = team->rows + col;
    K_ROLLED for (k_i32 w = 0; w < team->warps; w += K_FETCH) {
        k_u32 n[K_FETCH];
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            n[q] = w + q < team->warps ? at[q * cols] : 0;
        }
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            if (w + q < team->warps) {
                at[q * cols] = before;
            }
            before = add_column(a, col, before, n[q]);
        }
        at += K_FETCH * cols;
    }
    team->rows[team->warps * cols + col] = before;
}

static K_FN k_bool sum_up(struct k_thread *k, const struct k_route_args *a,
                          const struct team *team) {
    const k_i32 cols = num_columns(a);
    k_bool ok = k_barrier(k, 1);
    if (k->block < team->blocks - 1) {
        post_sums(k, a, team);
    }
    for (k_i32 base = k->warp * K_LANES; ok && base < cols; base += k->num_warps * K_LANES) {
        k_u32 before = 0;
        ok = await_sums(k, a, team, base + k->lane, &before);
        if (ok && base + k->lane < cols) {
            sum_column(a, team, base + k->lane, before);
        }
    }
    return k_barrier(k, ok);
}

/* Adds to the slots of a token what lies before the share. What is past its destinations is read
 * too, rather than to wait for their number first. */
static K_INLINE void shift_slots(const struct k_route_args *a, const k_u32 *ranks, k_i32 t) {
    const k_i32 dests = a->g.max_dests, num = a->h.num_dests[t];
    const k_i32 *dest_rank = a->h.dest_rank + (k_i64)t * dests;
    k_u32 *dest_slot = a->h.dest_slot + (k_i64)t * dests;
    K_ROLLED for (k_i32 d = 0; d == 0 || d < num; d += K_FETCH) {
        k_i32 rank[K_FETCH];
        k_u32 slot[K_FETCH];
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            rank[q] = d + q < dests ? dest_rank[d + q] : 0;
            slot[q] = d + q < dests ? dest_slot[d + q] : 0;
        }
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            slot[q] += d + q < num ? ranks[rank[q]] : 0;
        }
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            if (d + q < num) {
                dest_slot[d + q] = slot[q];
            }
        }
    }
}

/* Adds to a share's numbers what lies before it: a lane takes several selections at once, and a
 * token with its destinations. */
static K_FN void shift_share(struct k_thread *k, const struct k_route_args *a,
                             const struct share *w) {
    const struct k_handle *h = &a->h;
    const k_u32 *experts = w->counters, *ranks = w->counters + a->g.num_experts;
    const k_i32 topk = a->id_bytes ? a->topk : 0, sels = (w->t1 - w->t0) * topk;
    const k_i32 *ids = h->ids + (k_i64)w->t0 * topk;
    k_u32 *sel_index = h->sel_index + (k_i64)w->t0 * topk;
    k_i32 t = w->t0 + k->lane;
    K_ROLLED for (k_i32 i = k->lane; i < sels || t < w->t1; i += K_FETCH * K_LANES) {
        k_i32 id[K_FETCH];
        k_u32 index[K_FETCH];
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            id[q] = i + q * K_LANES < sels ? ids[i + q * K_LANES] : -1;
            index[q] = i + q * K_LANES < sels ? sel_index[i + q * K_LANES] : 0;
        }
        if (t < w->t1) {
            shift_slots(a, ranks, t);
        }
        t += K_LANES;
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            index[q] += id[q] >= 0 ? experts[id[q]] : 0;
        }
        K_UNROLL for (k_i32 q = 0; q < K_FETCH; q++) {
            if (id[q] >= 0) {
                sel_index[i + q * K_LANES] = index[q];
            }
        }
    }
    K_ROLLED for (k_i32 c = w->c0; c < w->c1; c++) {
        K_ROLLED for (k_i32 r = k->lane; r < a->g.num_ranks; r += K_LANES) {
            k_u32 *at = h->send_chan + (k_i64)r * (a->g.num_channels + 1) + c;
            const k_u32 own = c == w->c0 ? 0 : c == w->c0 + 1 && r == k->lane ? w->second : *at;
            *at = own + ranks[r];
        }
    }
}

/* To the host: the routing is done, and the first bad selection if there is one. */
static K_INLINE void report_routing(const struct k_route_args *a) {
    struct k_counts *notice = a->h.notice;
    const k_u64 first = a->h.bad[0];
    if (first == ~0ull) { /* one word, which nothing has to come before */
        k_store(&notice->routed, K_WORD(a->h.tag, a->ticket));
        return;
    }
    const k_u64 at = a->ids.data + (k_u64)((k_i64)(first / (k_u64)a->topk) * a->ids.s0 +
                                           (k_i64)(first % (k_u64)a->topk) * a->ids.s1);
    notice->bad_id = a->id_bytes == 8 ? *(const k_i64 *)at : *(const k_i32 *)at;
    notice->bad = first;
    notice->bad_of = a->h.tag;
    k_publish_local(&notice->routed, K_WORD(a->h.tag, a->ticket));
}

/* The warps of the last block: all there is, and, one of them, where each rank's answers land. */
static K_FN void finish_route(struct k_thread *k, const struct k_route_args *a,
                              const struct team *team, const k_u32 *counters) {
    const struct k_handle *h = &a->h;
    const k_i32 chans = a->g.num_channels, experts = a->g.num_experts, ranks = a->g.num_ranks;
    k_u32 base = 0;
    const k_i32 first_expert = k->warp * K_LANES + k->lane;
    K_ROLLED for (k_i32 e = first_expert; e < experts; e += team->warps * K_LANES) {
        h->send_expert[e] = counters[e];
    }
    if (k->warp != team->warps - 1) {
        return;
    }
    K_ROLLED for (k_i32 first = 0; first < ranks; first += K_LANES) {
        const k_i32 r = first + k->lane;
        const k_u32 rows = r < ranks ? counters[experts + r] : 0;
        k_u32 total = 0;
        const k_u32 before = k_scan(k, rows, &total);
        if (r < ranks) {
            h->send_count[r] = rows;
            h->send_base[r] = base + before;
            h->send_chan[(k_i64)r * (chans + 1) + chans] = rows;
        }
        base += total;
    }
    if (k->lane == 0) {
        const k_u32 bad = counters[experts + ranks];
        h->send_base[ranks] = base;
        h->bad[0] = bad ? (k_u64)~bad : ~0ull;
        /* All blocks have told their sums, so they have read it. */
        k_store(&h->sync[0], team->mark);
    }
    if (k->lane == 0) {
        report_routing(a);
    }
}

/* ---- entry ---------------------------------------------------------------------------------- */

/* There is a channel for every warp that takes part; blocks are filled one after the other. */
static K_INLINE struct team make_team(struct k_thread *k, const struct k_route_args *a) {
    struct team team;
    const k_u32 chans = (k_u32)a->g.num_channels, warps = (k_u32)k->num_warps;
    team.mark = (k_u32)k_load(&a->h.sync[0]) + 1u;
    team.blocks =
        k_min(k_min(k->num_blocks, K_MAX_BLOCKS), (k_i32)((chans + warps - 1) / warps));
    team.warps = k_min(k->num_warps, (k_i32)(chans / (k_u32)team.blocks));
    team.rows = 0;
    return team;
}

/* Where share `number` of `all` begins: as much work for each, of which a channel is as much as
 * K_CHANNEL_WORK tokens. */
#define K_CHANNEL_WORK 3

static K_INLINE k_i32 first_channel(const struct k_channels *n, k_i32 number, k_i32 all) {
    const k_i32 work = n->tokens + K_CHANNEL_WORK * n->num;
    const k_i32 each = (k_i32)((k_u32)work / (k_u32)all), rest = work - each * all;
    const k_i32 at = each * number + (k_i32)((k_u32)(rest * number) / (k_u32)all);
    return number == all ? n->num : channel_at(n, at, K_CHANNEL_WORK);
}

static K_INLINE struct share make_share(struct k_thread *k, const struct k_route_args *a,
                                        const struct team *team) {
    struct share w;
    const k_i32 all = team->blocks * team->warps;
    const k_i32 number = k->block * team->warps + k->warp;
    const k_u32 topk = (k_u32)(a->id_bytes ? a->topk : 1);
    w.c0 = first_channel(&a->channels, number, all);
    w.c1 = first_channel(&a->channels, number + 1, all);
    w.t0 = channel_first(&a->channels, w.c0);
    w.t1 = channel_first(&a->channels, w.c1);
    w.held = w.held_end = 0;
    w.token = (k_i32)((k_u32)k->lane / topk);
    w.j = k->lane - w.token * (k_i32)topk;
    w.tokens_on = (k_i32)(K_LANES / topk);
    w.j_on = K_LANES - w.tokens_on * (k_i32)topk;
    w.bad = w.second = 0;
    w.counters = team->rows + k->warp * num_columns(a);
    w.scratch = (struct route_scratch *)warp_scratch(k);
    return w;
}

static K_INLINE void route_run(struct k_thread *k, const struct k_route_args *a,
                               const struct team *team) {
    const k_bool works = k->warp < team->warps, alone = team->blocks * team->warps == 1;
    struct share w = make_share(k, a, team);
    if (works) {
        number_share(k, a, &w);
    }
    if (!alone && !sum_up(k, a, team)) {
        return;
    }
    if (works && !alone) {
        shift_share(k, a, &w);
    }
    if (works && k->block == team->blocks - 1) {
        finish_route(k, a, team, team->rows + (alone ? 0 : team->warps * num_columns(a)));
    }
}

K_KERNEL(route, k_route_args) {
    k_enter(k, &a->g, 0);
    struct team team = make_team(k, a);
    const k_i32 counters = (team.warps + 1) * num_columns(a);
    const k_u64 scratch = (k_u64)k->num_warps * (k_u64)a->g.scratch_bytes;
    if (k->block >= team.blocks) {
        return;
    }
    /* Two bodies, so that each knows where its counters are. */
    if (scratch + 4ull * (k_u64)counters <= k_shared_bytes(k)) {
        team.rows = (k_u32 *)((k_u8 *)k_shared(k) + scratch);
        route_run(k, a, &team);
    } else {
        team.rows = a->h.counters + k->block * (k_i64)counters;
        route_run(k, a, &team);
    }
}

static K_INLINE k_i32 node_of(const struct k_layout_args *a, k_i32 rank) {
    return a->rank_node ? a->rank_node[rank] : 0;
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
                hit = hit || node_of(a, h->dest_rank[(k_i64)t * a->g.max_dests + j]) == n;
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
