/* SPDX-License-Identifier: MIT */
/*
 * route: from expert ids (or a token-in-rank mask) to the send side of a handle. Local to a rank.
 *
 * Every place is a stable prefix sum over tokens, so it depends on the routing alone. A warp takes
 * a run of whole channels and has a row of counters: of each expert and of each rank. It walks its
 * tokens in order, numbering the selections of each expert and the rows to each rank. Then its row
 * becomes what lies before it: what the earlier warps of the block hold, and the earlier blocks,
 * which tell their sums by words that carry their own value, so that blocks have no barrier. That
 * is added to all its numbers. No atomics.
 */
#include "kernel/route_number.h"

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

/* What the blocks before this one hold of a column. */
static K_FN k_bool await_sums(struct k_thread *k, const struct k_route_args *a,
                              const struct team *team, k_i32 col, k_u32 *before) {
    const k_i32 cols = num_columns(a);
    const k_u64 *words = a->h.totals + col;
    k_bool ok = 1;
    K_ROLLED for (k_i32 b = 0; ok && b < k->block; b += K_MOST_MANY) {
        const k_i32 n = col < cols ? k_min(k->block - b, K_MOST_MANY) : 0;
        k_u32 sum[K_MOST_MANY];
        ok = k_await_most(k, K_MOST_MANY, words + (k_i64)b * cols, cols, n, team->mark,
                          k->g->rank, K_PHASE_SELF, sum);
        K_UNROLL for (k_i32 i = 0; i < K_MOST_MANY; i++) {
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

/* To the host: the routing is done, and the first bad selection if there is one. A graph replays
 * old tickets, which must not hide a newer one. */
static K_INLINE void report_routing(const struct k_route_args *a, k_u64 first, k_u64 told) {
    struct k_counts *notice = a->h.notice;
    const k_bool newer =
        (k_u32)(told >> 32) == a->h.tag && (k_i32)((k_u32)told - a->ticket) > 0;
    const k_u64 routed = newer ? told : K_WORD(a->h.tag, a->ticket);
    k_store(&a->h.counts->routed, routed);
    if (first == ~0ull) { /* one word, which nothing has to come before */
        k_store(&notice->routed, routed);
        return;
    }
    const k_u64 at =
        k_at(&a->ids, (k_i64)(first / (k_u64)a->topk), (k_i64)(first % (k_u64)a->topk));
    notice->bad_id = a->id_bytes == 8 ? *(const k_i64 *)at : *(const k_i32 *)at;
    notice->bad = K_WORD(a->h.tag, first + 1);
    k_publish_local(&notice->routed, routed);
}

/* The warps of the last block: all there is, and, one of them, where each rank's answers land. */
static K_FN void finish_route(struct k_thread *k, const struct k_route_args *a,
                              const struct team *team, const k_u32 *counters) {
    const struct k_handle *h = &a->h;
    const k_i32 chans = a->g.num_channels, experts = a->g.num_experts, ranks = a->g.num_ranks;
    k_u32 base = 0;
    const k_i32 first_expert = k->warp * K_LANES + k->lane;
    const k_u64 told = k_load(&h->counts->routed); /* on its way while the rest is done */
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
            h->send_count[r] = a->excess ? K_ROWS_EXCESS | a->excess : rows;
            h->send_base[r] = base + before;
            h->send_chan[(k_i64)r * (chans + 1) + a->channels.num] = rows;
        }
        base += total;
    }
    if (k->lane == 0) {
        const k_u32 bad = counters[experts + ranks];
        const k_u64 first = bad ? (k_u64)~bad : ~0ull;
        h->send_base[ranks] = base;
        h->bad[0] = first;
        /* All blocks have told their sums, so they have read it. */
        k_store(&h->sync[0], team->mark);
        report_routing(a, first, told);
    }
}

/* ---- entry ---------------------------------------------------------------------------------- */

/* There is a channel for every warp that takes part; blocks are filled one after the other. */
static K_INLINE struct team make_team(struct k_thread *k, const struct k_route_args *a) {
    struct team team;
    const k_u32 chans = (k_u32)a->channels.num, warps = (k_u32)k->num_warps;
    team.mark = (k_u32)k_load(&a->h.sync[0]) + 1u;
    team.blocks =
        k_min(k_min(k->num_blocks, K_MAX_BLOCKS), (k_i32)((chans + warps - 1) / warps));
    team.warps = k_min(k->num_warps, (k_i32)(chans / (k_u32)team.blocks));
    team.rows = 0;
    return team;
}

/* Where a share begins before which there is so much work: a channel is as much as K_CHANNEL_WORK
 * tokens. Divisions are what a warp has most to wait for here. */
#define K_CHANNEL_WORK 3

static K_INLINE k_i32 first_channel(const struct k_channels *n, k_i32 work, k_i32 all_work) {
    return work >= all_work ? n->num : channel_at(n, work, K_CHANNEL_WORK);
}

static K_INLINE struct share make_share(struct k_thread *k, const struct k_route_args *a,
                                        const struct team *team) {
    struct share w;
    const k_i32 all = team->blocks * team->warps;
    const k_i32 number = k->block * team->warps + k->warp;
    const k_i32 work = a->channels.tokens + K_CHANNEL_WORK * a->channels.num;
    const k_i32 each = (k_i32)((k_u32)(work + all - 1) / (k_u32)all);
    const k_u32 topk = (k_u32)(a->id_bytes ? a->topk : 1);
    w.c0 = first_channel(&a->channels, number * each, work);
    w.c1 = number + 1 == all ? a->channels.num
                             : first_channel(&a->channels, (number + 1) * each, work);
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

K_KERNEL(throughput, route, k_route_args) {
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
