/* SPDX-License-Identifier: MIT */
/*
 * dispatch: rows to the ranks of their experts, and what arrives into the caller's tensors.
 *
 *   control   block 0: ready words; uncached: counts to every peer, bases back, everybody reads
 *             every answer, so all ranks know alike whether the rows fit. Then `go`.
 *   send      one copy per (token, destination) to its final row of the destination's slot, its
 *             sidecar beside it, then one progress word per (destination, channel). Where some
 *             blocks send and others receive, the receivers make the copies to this rank itself.
 *   receive   per (source, channel): await its progress word, unpack sidecars, copy rows out.
 *
 * A sidecar is 32-bit words: token, K expert ids, K indices within (source, expert), K weights if
 * they travel, then the scales' bytes. It is the same for all destinations of a token, so it is
 * made once, in a stage of the mover, and stored like a piece of the row.
 *
 * One warp can run all of it in this order: sending never waits for a receiver.
 */
#include "kernel/op.h"

#define GO 0u
#define SKIP 1u

static K_INLINE k_i32 side_scales_word(const struct k_dispatch_args *a) {
    return 1 + a->topk * ((a->flags & K_DO_WEIGHTS) ? 3 : 2);
}

/* ---- control -------------------------------------------------------------------------------- */

static K_FN void tell_counts(struct k_thread *k, const struct k_dispatch_args *a, k_i32 p) {
    const struct k_group *g = &a->g;
    const k_i32 first = g->rank_first[p], num_local = g->rank_first[p + 1] - first;
    const k_i32 chan0 = g->count_words - g->num_channels;
    const k_u64 at = counts_offset(g, k->epoch, g->rank);
    const k_u32 *chan = a->h.send_chan + (k_i64)p * (g->num_channels + 1);
    for (k_i32 i = k->lane; i < g->count_words; i += K_LANES) {
        k_u32 v = 0;
        if (i == 0) {
            v = a->h.send_count[p];
        } else if (i >= chan0) {
            v = chan[i - chan0];
        } else if (i <= num_local) {
            v = a->h.send_expert[g->rank_expert[first + i - 1]];
        }
        k_post(k_peer_at(g, p, at + 8ull * (k_u64)i), K_WORD(k->epoch, v));
    }
}

static K_FN k_bool await_counts(struct k_thread *k, const struct k_dispatch_args *a,
                                k_i32 src) {
    const struct k_group *g = &a->g;
    const struct k_handle *h = &a->h;
    const k_i32 chan0 = g->count_words - g->num_channels;
    const k_u64 *words = (const k_u64 *)k_own(g, counts_offset(g, k->epoch, src));
    k_u32 *chan = h->recv_chan + (k_i64)src * (g->num_channels + 1);
    for (k_i32 base = 0; base < g->count_words; base += K_LANES) {
        k_i32 i = base + k->lane;
        k_u32 v = 0;
        if (!k_await_word(k, i < g->count_words ? words + i : 0, k->epoch, src, K_PHASE_COUNTS,
                          &v)) {
            return 0;
        }
        if (i == 0) {
            h->recv_count[src] = v;
            chan[g->num_channels] = v;
        }
        if (i >= chan0 && i < g->count_words) {
            chan[i - chan0] = v;
        } else if (i >= 1 && i <= g->num_local) {
            h->recv_expert[(k_i64)src * g->num_local + i - 1] = v;
        }
    }
    return 1;
}

/* Bases for every source, by one lane; returns the rows of all. */
static K_FN k_i64 place_sources(const struct k_dispatch_args *a) {
    k_u64 sum = 0;
    for (k_i32 s = 0; s < a->g.num_ranks; s++) {
        a->h.recv_base[s] = (k_u32)sum;
        sum += a->h.recv_count[s];
    }
    a->h.recv_base[a->g.num_ranks] = (k_u32)sum;
    return (k_i64)sum;
}

/* The warp answers rank p: where p's rows start here, and what this rank lacks. */
static K_FN void tell_base(struct k_thread *k, const struct k_dispatch_args *a, k_i32 p,
                           k_u32 need) {
    if (k->lane < K_ANSWER_WORDS || K_LANES == 1) {
        k_u64 at = answer_offset(&a->g, k->epoch, a->g.rank);
        for (k_i32 i = k->lane; i < K_ANSWER_WORDS; i += K_LANES) {
            k_post(k_peer_at(&a->g, p, at + 8ull * (k_u64)i),
                   K_WORD(k->epoch, i == 0 ? a->h.recv_base[p] : need));
        }
    }
}

/* All warps of block 0: every answer. Marks in counts->need the largest unmet need. */
static K_FN k_bool await_bases(struct k_thread *k, const struct k_dispatch_args *a) {
    struct k_counts *counts = a->h.counts;
    k_bool ok = 1;
    for (k_i32 p = k->warp; ok && p < a->g.num_ranks; p += k->num_warps) {
        const k_u64 *words = (const k_u64 *)k_own(&a->g, answer_offset(&a->g, k->epoch, p));
        k_u32 base = 0, need = 0;
        ok = k_await_word(k, words, k->epoch, p, K_PHASE_BASES, &base) &&
             k_await_word(k, words + 1, k->epoch, p, K_PHASE_BASES, &need);
        if (ok && k->lane == 0) {
            a->h.remote_base[p] = base;
            if (need) {
                k_max(&counts->need, K_NEED_PACK(need, p));
            }
        }
    }
    return ok;
}

static K_FN k_bool exchange_counts(struct k_thread *k, const struct k_dispatch_args *a) {
    struct k_counts *counts = a->h.counts;
    k_bool ok = 1;
    for (k_i32 s = k->warp; ok && s < a->g.num_ranks; s += k->num_warps) {
        ok = await_counts(k, a, s);
    }
    ok = k_barrier(k, ok);
    if (ok && k->warp == 0 && k->lane == 0) {
        counts->need = 0;
        counts->rows = place_sources(a);
    }
    if (!k_barrier(k, ok)) {
        return 0;
    }
    const k_u32 need = counts->rows > a->g.max_recv_rows ? (k_u32)counts->rows : 0u;
    for (k_i32 p = k->warp; p < a->g.num_ranks; p += k->num_warps) {
        tell_base(k, a, p, need);
    }
    ok = await_bases(k, a);
    ok = k_barrier(k, ok);
    if (ok && k->warp == 0 && k->lane == 0) {
        struct k_counts *notice = a->h.notice;
        if (notice != counts) {
            notice->rows = counts->rows;
            notice->need = counts->need;
        }
        k_publish_local(&notice->known, K_WORD(a->ticket, 0));
    }
    return ok;
}

/* Block 0. Ends with `go`, unless the operation has faulted. */
static K_FN k_bool control(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    struct op_signature sig;
    sig.word0 = signature(k, a->flags, a->topk, a->handle_id);
    sig.word1 = (k_u32)a->row_bytes;
    sig.word2 = (k_u32)(a->num_scales * a->scale_bytes);
    for (k_i32 i = k->warp; i < g->num_ranks; i += k->num_warps) {
        k_i32 p = (g->rank + i) % g->num_ranks;
        tell_ready(k, p, &sig, (k_u32)a->slot);
        if (a->flags & K_DO_COUNTS) {
            tell_counts(k, a, p);
        }
    }
    k_bool ok = await_all_ready(k, &sig, a->h.remote_slot);
    ok = k_barrier(k, ok);
    if (ok && (a->flags & K_DO_COUNTS)) {
        ok = exchange_counts(k, a);
    }
    if (ok && k->warp == 0 && k->lane == 0) {
        k_publish_local(&g->ctl->go, K_WORD(k->epoch, a->h.counts->need ? SKIP : GO));
    }
    return ok;
}

/* ---- send ----------------------------------------------------------------------------------- */

static K_INLINE k_u64 row_place(const struct k_dispatch_args *a, k_i32 d, k_u32 row) {
    return a->g.map.recv + (k_u64)a->h.remote_slot[d] * a->g.map.recv_slot_bytes +
           (k_u64)row * (k_u64)a->row_bytes;
}

static K_INLINE k_u64 side_place(const struct k_dispatch_args *a, k_i32 d, k_u32 row) {
    return a->g.map.side + (k_u64)a->h.remote_slot[d] * a->g.map.side_slot_bytes +
           (k_u64)row * (k_u64)a->g.side_stride;
}

/* Four bytes of token t's scales, from byte `byte` on; past the end zeros. */
static K_INLINE k_u32 scales_word(const struct k_dispatch_args *a, k_i32 t, k_i32 byte) {
    k_u32 word = 0;
    for (k_i32 b = 0; b < 4; b += a->scale_bytes) {
        k_i32 j = (byte + b) / a->scale_bytes;
        if (j >= a->num_scales) {
            break;
        }
        k_u64 at = a->scales.data + (k_u64)((k_i64)t * a->scales.s0 + (k_i64)j * a->scales.s1);
        k_u32 v = a->scale_bytes == 4   ? *(const k_u32 *)at
                  : a->scale_bytes == 2 ? *(const k_u16 *)at
                                        : *(const k_u8 *)at;
        word |= v << (8 * b);
    }
    return word;
}

/* Word w of the sidecar of token t. */
static K_INLINE k_u32 side_word(const struct k_dispatch_args *a, k_i32 t, k_i32 w) {
    const k_i32 scales = side_scales_word(a);
    if (w == 0) {
        return (k_u32)t;
    }
    if (w >= scales) {
        return scales_word(a, t, 4 * (w - scales));
    }
    const k_i32 kind = (w - 1) / a->topk, j = (w - 1) % a->topk;
    const k_i64 at = (k_i64)t * a->topk + j;
    if (kind == 0) {
        return (k_u32)a->h.ids[at];
    }
    if (kind == 1) {
        return a->h.sel_index[at];
    }
    return *(const k_u32 *)(a->weights.data +
                            (k_u64)((k_i64)t * a->weights.s0 + (k_i64)j * a->weights.s1));
}

/* What travels of a token, in pieces that fit a stage: the row, then its sidecar. */
struct send_shape {
    k_i32 row_pieces, pieces; /* of the row; of both */
    k_i32 side_words, side_bytes;
};

static K_INLINE struct send_shape shape_of(const struct k_dispatch_args *a) {
    struct send_shape s;
    s.side_words = side_scales_word(a) + (a->num_scales * a->scale_bytes + 3) / 4;
    s.side_bytes = (4 * s.side_words + 15) / 16 * 16;
    s.row_pieces = (a->row_bytes + a->stage_bytes - 1) / a->stage_bytes;
    s.pieces = s.row_pieces + (s.side_bytes + a->stage_bytes - 1) / a->stage_bytes;
    return s;
}

/* The next piece of a token into its stage: loaded, or written by the lanes. */
static K_INLINE void begin_piece(struct k_thread *k, const struct k_dispatch_args *a,
                                 struct k_mover *m, const struct send_shape *s,
                                 const struct walk *in) {
    const k_i32 t = in->item;
    k_mover_retire(k, m, newest_stores(a->stages));
    if (in->piece < s->row_pieces) {
        const k_i32 from = in->piece * a->stage_bytes;
        k_mover_load(k, m, in->stage,
                     (const void *)(a->x.data + (k_u64)((k_i64)t * a->x.s0) + (k_u64)from),
                     at_most(a->row_bytes - from, a->stage_bytes));
        return;
    }
    const k_i32 first = (in->piece - s->row_pieces) * (a->stage_bytes / 4);
    k_u32 *out = k_mover_fill(k, m, in->stage);
    for (k_i32 i = k->lane; i < a->stage_bytes / 4 && first + i < s->side_bytes / 4;
         i += K_LANES) {
        out[i] = first + i < s->side_words ? side_word(a, t, first + i) : 0;
    }
    k_mover_filled(k, m);
}

/* Which destinations a pass over the tokens serves. Blocks that send keep the link busy; where
 * others receive, those also copy what stays here. */
#define TO_ALL 0
#define TO_PEERS 1
#define TO_SELF 2

static K_INLINE k_bool serves(const struct k_dispatch_args *a, k_i32 whom, k_i32 d) {
    return whom == TO_ALL || (d == a->g.rank) == (whom == TO_SELF);
}

/* Where one destination of a token takes its row and its sidecar; 0: there is none. */
struct place {
    k_u64 row, side;
};

static K_INLINE struct place find_place(const struct k_dispatch_args *a, k_i32 whom, k_i32 t,
                                        k_i32 i, k_i32 num, k_i32 turn) {
    struct place p = {0, 0};
    const k_i64 at = (k_i64)t * a->g.max_dests + (i + turn) % num; /* spreads the warps */
    const k_i32 d = i < num ? a->h.dest_rank[at] : -1;
    if (d >= 0 && serves(a, whom, d)) {
        const k_u32 to = a->h.remote_base[d] + a->h.dest_slot[at];
        p.row = k_peer_at(&a->g, d, row_place(a, d, to)).address;
        p.side = k_peer_at(&a->g, d, side_place(a, d, to)).address;
    }
    return p;
}

/* The same piece to every destination of the token, one for each lane. `place` is kept from the
 * token's first piece to its last. */
static K_INLINE void end_piece(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, const struct send_shape *s, k_i32 whom,
                               const struct walk *out, struct place *place, k_i32 *num) {
    const k_bool row = out->piece < s->row_pieces;
    const k_i32 from = (row ? out->piece : out->piece - s->row_pieces) * a->stage_bytes;
    const k_i32 bytes = at_most((row ? a->row_bytes : s->side_bytes) - from, a->stage_bytes);
    if (out->piece == 0) {
        *num = a->h.num_dests[out->item];
        *place = find_place(a, whom, out->item, k->lane, *num, a->g.rank + k->warp);
    }
    if (row) {
        k_mover_wait(k, m, out->stage);
    }
    for (k_i32 base = 0; base < *num; base += K_LANES) {
        if (*num > K_LANES) {
            *place = find_place(a, whom, out->item, base + k->lane, *num, a->g.rank + k->warp);
        }
        const k_u64 to = row ? place->row : place->side;
        k_mover_store(k, m, out->stage, own_memory(to ? to + (k_u64)from : 0), bytes);
    }
    k_mover_commit(k, m);
}

/* The first token from t on that has a destination to serve. */
static K_INLINE k_i32 next_token(const struct k_dispatch_args *a, k_i32 whom, k_i32 t,
                                 k_i32 t1) {
    for (; t < t1; t++) {
        const k_i32 num = a->h.num_dests[t];
        k_bool any = 0;
        for (k_i32 i = 0; i < num && !any; i++) {
            any = whom != TO_SELF || a->h.dest_rank[(k_i64)t * a->g.max_dests + i] == a->g.rank;
        }
        if (any) {
            break;
        }
    }
    return t;
}

/* Rows and sidecars of tokens [t0, t1): each is made once and stored to all its destinations. */
static K_FN void send_tokens(struct k_thread *k, const struct k_dispatch_args *a,
                             struct k_mover *m, k_i32 whom, k_i32 t0, k_i32 t1) {
    const struct send_shape s = shape_of(a);
    struct walk in = begin_walk(k, m, next_token(a, whom, t0, t1)), out = in;
    struct place place = {0, 0};
    k_i32 ahead = 0, num = 0;
    while (out.item < t1) {
        if (in.item < t1) {
            begin_piece(k, a, m, &s, &in);
            walk_on(&in, s.pieces, a->stages);
            in.item = in.piece == 0 ? next_token(a, whom, in.item, t1) : in.item;
            ahead++;
        }
        if (ahead == most_ahead(a->stages) || in.item == t1) {
            end_piece(k, a, m, &s, whom, &out, &place, &num);
            walk_on(&out, s.pieces, a->stages);
            out.item = out.piece == 0 ? next_token(a, whom, out.item, t1) : out.item;
            ahead--;
        }
    }
}

static K_FN void send_channel(struct k_thread *k, const struct k_dispatch_args *a,
                              struct k_mover *m, k_i32 whom, k_i32 c) {
    const struct k_group *g = &a->g;
    k_i32 t0, t1;
    channel_tokens(a->tokens, g->num_channels, c, &t0, &t1);
    if (t0 == t1) {
        return;
    }
    send_tokens(k, a, m, whom, t0, t1);
    k_mover_drain(k, m);
    k_syncwarp(k);
    for (k_i32 i = k->lane; i < g->num_ranks; i += K_LANES) {
        const k_i32 d = (g->rank + 1 + i) % g->num_ranks;
        const k_u32 *chan = a->h.send_chan + (k_i64)d * (g->num_channels + 1) + c;
        const k_u32 rows = serves(a, whom, d) ? chan[1] - chan[0] : 0;
        if (rows) {
            k_publish(k_peer_at(g, d, channel_word(g, g->map.progress, g->rank, c)),
                      K_WORD(k->epoch, rows));
            k_add(d == g->rank ? &g->ctl->local_bytes : &g->ctl->remote_bytes,
                  (k_u64)rows * (k_u64)a->row_bytes);
            k_add(&g->ctl->rows_sent, rows);
        }
    }
}

/* ---- receive -------------------------------------------------------------------------------- */

static K_INLINE void write_i32(const struct k_array *to, k_i64 i, k_i32 v) {
    if (to->data) {
        *(k_i32 *)(to->data + (k_u64)(i * to->s0)) = v;
    }
}

/* Block 0: rows per expert, where experts start in expanded output, and the small outputs. */
static K_FN k_bool prepare(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_handle *h = &a->h;
    const k_i32 num_local = a->g.num_local, ranks = a->g.num_ranks;
    const k_i32 me = k->warp * K_LANES + k->lane, all = k->num_warps * K_LANES;
    for (k_i32 e = me; e < num_local; e += all) {
        k_u32 sum = 0;
        for (k_i32 s = 0; s < ranks; s++) {
            sum += h->recv_expert[(k_i64)s * num_local + e];
        }
        h->expert_rows[e] = sum;
        write_i32(&a->expert_counts, e, (k_i32)sum);
    }
    k_barrier(k, 1);
    if (me == 0) {
        k_u32 start = 0;
        const k_u32 align = (k_u32)a->alignment;
        for (k_i32 e = 0; e < num_local; e++) {
            h->expert_start[e] = start;
            start += (h->expert_rows[e] + align - 1) / align * align;
        }
        h->expert_start[num_local] = start;
        k_i32 end = (a->flags & K_DO_EXPAND) ? (k_i32)start : (k_i32)h->recv_base[ranks];
        write_i32(&a->num_rows, 0, end);
        if (end > a->capacity || (a->recv_x.data && end > a->x_rows)) {
            h->notice->over = (k_u64)end;
            k_ends(k, K_END_SHORT);
        }
    }
    k_barrier(k, 1);
    for (k_i32 e = me; e <= num_local; e += all) {
        k_u32 at = h->expert_start[e];
        write_i32(&a->expert_offsets, e, (k_i32)at);
        for (k_i32 s = 0; e < num_local && s < ranks; s++) {
            h->expert_base[(k_i64)s * num_local + e] = at;
            at += h->recv_expert[(k_i64)s * num_local + e];
        }
    }
    k_syncwarp(k);
    k_bool ok = k_barrier(k, 1);
    if (me == 0) {
        k_add(&a->g.ctl->rows_received, h->recv_base[ranks]);
        k_publish_local(&a->g.ctl->go_recv, K_WORD(k->epoch, GO));
    }
    return ok;
}

static K_INLINE const k_u32 *side_of(const struct k_dispatch_args *a, k_u32 row) {
    return (const k_u32 *)k_own(&a->g, a->g.map.side +
                                           (k_u64)a->slot * a->g.map.side_slot_bytes +
                                           (k_u64)row * (k_u64)a->g.side_stride);
}

static K_INLINE const k_u8 *row_of(const struct k_dispatch_args *a, k_u32 row) {
    return k_own(&a->g, a->g.map.recv + (k_u64)a->slot * a->g.map.recv_slot_bytes +
                            (k_u64)row * (k_u64)a->row_bytes);
}

/* Index among this rank's experts of selection j of a received row; -1: another rank's. */
static K_INLINE k_i32 local_expert(const struct k_dispatch_args *a, const k_u32 *side,
                                   k_i32 j) {
    const k_i32 id = (k_i32)side[1 + j];
    return id >= 0 && a->g.expert_rank[id] == a->g.rank ? a->g.expert_local[id] : -1;
}

/* Expanded row of selection j of a received row of source s, or -1. */
static K_INLINE k_i32 expanded_row(const struct k_dispatch_args *a, k_i32 s, const k_u32 *side,
                                   k_i32 j) {
    const k_i32 e = local_expert(a, side, j);
    return e < 0 ? -1
                 : (k_i32)(a->h.expert_base[(k_i64)s * a->g.num_local + e] +
                           side[1 + a->topk + j]);
}

/* Scale j of a row, from its sidecar to output row `to`. */
static K_INLINE void unpack_scale(const struct k_dispatch_args *a, const k_u32 *side, k_i64 to,
                                  k_i32 j) {
    const k_u8 *from = (const k_u8 *)(side + side_scales_word(a));
    const k_u64 at =
        a->recv_scales.data + (k_u64)(to * a->recv_scales.s0 + (k_i64)j * a->recv_scales.s1);
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
        k_i32 *at = (k_i32 *)(a->recv_source.data + (k_u64)(row * a->recv_source.s0));
        at[0] = rank;
        at[1] = token;
    }
}

static K_INLINE void write_id(const struct k_dispatch_args *a, k_i64 row, k_i32 j, k_i32 id) {
    k_u64 at = a->recv_ids.data + (k_u64)(row * a->recv_ids.s0 + (k_i64)j * a->recv_ids.s1);
    if (a->id_bytes == 8) {
        *(k_i64 *)at = id;
    } else {
        *(k_i32 *)at = id;
    }
}

static K_INLINE k_f32 *weight_at(const struct k_dispatch_args *a, k_i64 row, k_i32 j) {
    return (k_f32 *)(a->recv_weights.data +
                     (k_u64)(row * a->recv_weights.s0 + (k_i64)j * a->recv_weights.s1));
}

/* Sidecars of rows [r0, r1) of source s. Lanes take (row, selection) and (row, scale) pairs, so
 * that many rows are read at once. */
static K_FN void unpack_compact(struct k_thread *k, const struct k_dispatch_args *a, k_i32 s,
                                k_u32 r0, k_u32 r1) {
    const k_i32 topk = a->topk, scales = a->num_scales;
    if ((k_i64)r1 > a->capacity) {
        r1 = (k_i64)r0 < a->capacity ? (k_u32)a->capacity : r0;
    }
    const k_i32 rows = (k_i32)(r1 - r0);
    for (k_i32 i = k->lane; a->recv_source.data && i < rows; i += K_LANES) {
        write_source(a, r0 + i, s, (k_i32)side_of(a, r0 + (k_u32)i)[0]);
    }
    const k_bool selections = a->recv_ids.data || a->recv_weights.data;
    for (k_i32 i = k->lane; selections && i < rows * topk; i += K_LANES) {
        const k_u32 row = r0 + (k_u32)(i / topk);
        const k_i32 j = i % topk;
        const k_u32 *side = side_of(a, row);
        const k_i32 local = local_expert(a, side, j);
        if (a->recv_ids.data) {
            write_id(a, row, j, local);
        }
        if (a->recv_weights.data) {
            *weight_at(a, row, j) = local >= 0 ? k_float(side[1 + 2 * topk + j]) : 0.0f;
        }
    }
    for (k_i32 i = k->lane; a->recv_scales.data && i < rows * scales; i += K_LANES) {
        const k_u32 row = r0 + (k_u32)(i / scales);
        unpack_scale(a, side_of(a, row), row, i % scales);
    }
}

static K_FN void unpack_expanded(struct k_thread *k, const struct k_dispatch_args *a, k_i32 s,
                                 k_u32 r0, k_u32 r1) {
    const k_i32 rows = (k_i32)(r1 - r0), topk = a->topk, scales = a->num_scales;
    for (k_i32 i = k->lane; i < rows * topk; i += K_LANES) {
        const k_u32 row = r0 + (k_u32)(i / topk);
        const k_i32 j = i % topk;
        const k_u32 *side = side_of(a, row);
        const k_i32 to = expanded_row(a, s, side, j);
        a->h.expand_row[(k_i64)row * topk + j] = to;
        if (to >= 0 && to < a->capacity) {
            write_source(a, to, s, (k_i32)side[0]);
            if (a->recv_weights.data) {
                *weight_at(a, to, 0) = k_float(side[1 + 2 * topk + j]);
            }
        }
    }
    for (k_i32 i = k->lane; a->recv_scales.data && i < rows * scales; i += K_LANES) {
        const k_u32 *side = side_of(a, r0 + (k_u32)(i / scales));
        for (k_i32 j = 0; j < topk; j++) {
            const k_i32 to = expanded_row(a, s, side, j);
            if (to >= 0 && to < a->capacity) {
                unpack_scale(a, side, to, i % scales);
            }
        }
    }
}

/* Stores a piece of a received row to its one or several places in the output. */
static K_INLINE void store_out(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, const struct walk *out, k_i32 s) {
    const k_u32 row = (k_u32)out->item;
    const k_i32 from = out->piece * a->stage_bytes;
    const k_i32 bytes = at_most(a->row_bytes - from, a->stage_bytes);
    if (a->flags & K_DO_EXPAND) {
        const k_u32 *side = side_of(a, row);
        for (k_i32 base = 0; base < a->topk; base += K_LANES) {
            const k_i32 j = base + k->lane;
            const k_i64 to = j < a->topk ? expanded_row(a, s, side, j) : -1;
            k_u64 at = 0;
            if (to >= 0 && to < a->x_rows) {
                at = a->recv_x.data + (k_u64)(to * a->recv_x.s0) + (k_u64)from;
            }
            k_mover_store(k, m, out->stage, own_memory(at), bytes);
        }
    } else if ((k_i64)row < a->x_rows) {
        k_mover_store(
            k, m, out->stage,
            one_lane(k, a->recv_x.data + (k_u64)((k_i64)row * a->recv_x.s0) + (k_u64)from),
            bytes);
    }
    k_mover_commit(k, m);
}

static K_FN void copy_out(struct k_thread *k, const struct k_dispatch_args *a,
                          struct k_mover *m, k_i32 s, k_u32 r0, k_u32 r1) {
    const k_i32 pieces = (a->row_bytes + a->stage_bytes - 1) / a->stage_bytes, end = (k_i32)r1;
    struct walk in = begin_walk(k, m, (k_i32)r0), out = in;
    k_i32 ahead = 0;
    while (out.item < end) {
        if (in.item < end) {
            const k_i32 from = in.piece * a->stage_bytes;
            k_mover_retire(k, m, newest_stores(a->stages));
            k_mover_load(k, m, in.stage, row_of(a, (k_u32)in.item) + from,
                         at_most(a->row_bytes - from, a->stage_bytes));
            walk_on(&in, pieces, a->stages);
            ahead++;
        }
        if (ahead == most_ahead(a->stages) || in.item == end) {
            k_mover_wait(k, m, out.stage);
            store_out(k, a, m, &out, s);
            walk_on(&out, pieces, a->stages);
            ahead--;
        }
    }
}

static K_FN k_bool receive_channel(struct k_thread *k, const struct k_dispatch_args *a,
                                   struct k_mover *m, k_i32 s, k_i32 c) {
    const struct k_group *g = &a->g;
    const k_u32 *chan = a->h.recv_chan + (k_i64)s * (g->num_channels + 1) + c;
    const k_u32 r0 = a->h.recv_base[s] + chan[0], r1 = a->h.recv_base[s] + chan[1];
    if (r0 == r1) {
        return 1;
    }
    k_u32 rows = 0;
    const k_u64 *word = (const k_u64 *)k_own(g, channel_word(g, g->map.progress, s, c));
    if (!k_await(k, word, k->epoch, s, K_PHASE_ROWS, &rows)) {
        return 0;
    }
    if (a->flags & K_DO_EXPAND) {
        unpack_expanded(k, a, s, r0, r1);
    } else {
        unpack_compact(k, a, s, r0, r1);
    }
    if (a->recv_x.data) {
        copy_out(k, a, m, s, r0, r1);
    }
    return 1;
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
    for (k_i32 e = warp; e < a->g.num_local; e += warps) {
        for (k_i64 r = h->expert_start[e] + h->expert_rows[e]; r < h->expert_start[e + 1];
             r++) {
            if (r < a->capacity) {
                fill_row(k, a, r);
            }
            if ((a->flags & K_DO_ZERO_GAPS) && a->recv_x.data && r < a->x_rows) {
                k_zero(k, (void *)(a->recv_x.data + (k_u64)(r * a->recv_x.s0)), a->row_bytes);
            }
        }
    }
}

static K_FN k_bool receive(struct k_thread *k, const struct k_dispatch_args *a,
                           struct k_mover *m, k_i32 warp, k_i32 warps) {
    const struct k_group *g = &a->g;
    k_u32 go = 0;
    if (!k_await(k, &g->ctl->go_recv, k->epoch, g->rank, K_PHASE_SELF, &go)) {
        return 0;
    }
    for (k_i64 i = warp; i < (k_i64)g->num_ranks * g->num_channels; i += warps) {
        const k_i32 s = (g->rank + (k_i32)(i % g->num_ranks)) % g->num_ranks;
        if (!receive_channel(k, a, m, s, (k_i32)(i / g->num_ranks))) {
            return 0;
        }
    }
    k_i64 end = a->h.recv_base[g->num_ranks];
    if (a->flags & K_DO_EXPAND) {
        end = a->h.expert_start[g->num_local];
        fill_gaps(k, a, warp, warps);
    }
    const k_bool fills = a->recv_source.data || a->recv_ids.data || a->recv_weights.data;
    for (k_i64 r = end + warp; fills && r < a->capacity; r += warps) {
        fill_row(k, a, r);
    }
    return 1;
}

/* One warp, after a failure: counts and offsets 0, ids and sources -1, so that kernels behind
 * this one stay in bounds. */
static K_FN void clear_outputs(struct k_thread *k, const struct k_dispatch_args *a) {
    for (k_i32 e = k->lane; e <= a->g.num_local; e += K_LANES) {
        if (e < a->g.num_local) {
            write_i32(&a->expert_counts, e, 0);
        }
        write_i32(&a->expert_offsets, e, 0);
    }
    if (k->lane == 0) {
        write_i32(&a->num_rows, 0, 0);
    }
    const k_bool fills = a->recv_source.data || a->recv_ids.data || a->recv_weights.data;
    for (k_i64 r = 0; fills && r < a->capacity; r++) {
        fill_row(k, a, r);
    }
}

/* ---- entry ---------------------------------------------------------------------------------- */

/* False after a fault. */
static K_FN k_bool run(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    const k_bool sends = (a->flags & K_DO_SEND) != 0, receives = (a->flags & K_DO_RECV) != 0;
    /* Which blocks do what: with both parts the first send_blocks send, unless there is one. */
    const k_bool both = sends && receives && k->num_blocks > 1;
    const k_i32 senders = both ? (k_i32)a->send_blocks : k->num_blocks;
    const k_i32 first_recv = both ? senders : 0;
    k_u32 go = 0;
    if (k->block == 0 && sends && !control(k, a)) {
        return 0;
    }
    k_bool ok = k_await(k, &g->ctl->go, k->epoch, g->rank, K_PHASE_SELF, &go);
    if (k->block == 0) {
        ok = k_barrier(k, ok); /* its warps go on to `prepare` together, or not at all */
    }
    if (!ok) {
        return 0;
    }
    if (go == SKIP) {
        k_ends(k, K_END_SKIP);
        return 1;
    }
    if (k->block == 0 && receives && !prepare(k, a)) {
        return 0;
    }
    struct k_mover m;
    k_mover_begin(k, &m, warp_ring(k, a->stages, a->stage_bytes), a->stages, a->stage_bytes);
    if (sends && k->block < senders) {
        for (k_i32 c = k_first(k, 0); c < g->num_channels; c += k_stride(k, senders)) {
            send_channel(k, a, &m, both ? TO_PEERS : TO_ALL, c);
        }
    }
    if (receives && k->block >= first_recv) {
        const k_i32 warps = k_stride(k, k->num_blocks - first_recv);
        for (k_i32 c = k_first(k, first_recv); both && c < g->num_channels; c += warps) {
            send_channel(k, a, &m, TO_SELF, c);
        }
        ok = receive(k, a, &m, k_first(k, first_recv), warps);
    }
    k_mover_end(k, &m);
    return ok;
}

K_KERNEL(dispatch, k_dispatch_args) {
    const k_bool receives = (a->flags & K_DO_RECV) != 0;
    k_enter(k, &a->g, K_OP_DISPATCH);
    if (a->flags & K_DO_NOTHING) {
        if (k->block == 0 && k->warp == 0) {
            clear_outputs(k, a);
        }
        return;
    }
    if (!run(k, a)) {
        k_ends(k, K_END_FAULT);
    }
    if (k_last_out(k, receives)) {
        const k_u32 ending = k_ending(k);
        if (ending && receives) {
            clear_outputs(k, a);
        }
        k_leave(k, receives || ending == K_END_SKIP); /* else another kernel receives */
    }
}
