/* SPDX-License-Identifier: MIT */
/*
 * Combine between nodes: the ranks of a node answer a token of another one at its relay, which adds their
 * answers up, ranks ascending and rounded once, and sends one row for all; the owner takes it in and adds
 * the nodes' up. Function bodies for combine.k.c. The loop at the end is run by warps of sending blocks
 * when their rank owes no answer that nobody has begun; what it waits for waits for nothing else.
 */
#ifndef KERNEL_FAR_COMBINE_H
#define KERNEL_FAR_COMBINE_H

#include "kernel/combine_send.h"

/* One warp: ready messages of this rank, and of those for which it is the relay. */
static K_FN k_bool exchange_far_ready(struct k_thread *k, const struct k_combine_args *a,
                                      const struct op_signature *sig) {
    const struct k_far *f = a->far;
    k_bool ok = post_far_ready(k, f, sig, 0, a->h.send_count);
    for (k_i32 i = 0; ok && i < f->num_sources; i++) {
        const k_u32 *words = await_message(k, f, f->from_source[i], K_PHASE_READY);
        ok = words != 0;
        if (ok) {
            relay_ready(k, f, i, words);
        }
    }
    return ok;
}

static K_INLINE k_i32 weights_bytes(const struct k_combine_args *a) {
    return (a->flags & K_DO_WEIGHTS) ? (4 * a->topk + 15) / 16 * 16 : 0;
}

/* ---- what a relay adds up --------------------------------------------------------------------- */

/* The relay's number of a row: it lies there in regions of answers and of their weights. */
static K_INLINE k_u64 relayed_row(const struct k_combine_args *a, k_i32 i, k_i32 l,
                                  k_u32 slot) {
    const struct k_far *f = a->far;
    return (k_u64)i * (k_u64)f->map.relay_rows + f->where[i * f->map.most_near + l] + slot;
}

/* Whether all ranks of the node that were sent the row have answered it. */
static K_INLINE k_bool is_answered(struct k_thread *k, const struct k_combine_args *a, k_i32 i,
                                   const k_u32 *entry) {
    const struct k_far *f = a->far;
    k_bool all = 1;
    for (k_i32 base = 0; all && base < node_ranks(f, f->own); base += K_LANES) {
        const k_i32 l = base + k->lane;
        const k_u32 slot = l < node_ranks(f, f->own) ? entry[K_FAR_ENTRY + l] : K_FAR_NONE;
        const k_u64 at =
            ((k_u64)i * (k_u64)f->map.most_near + (k_u64)l) * (k_u64)a->g.num_channels +
            entry[K_FAR_CHANNEL];
        all = k_arrived(
            k, slot != K_FAR_NONE ? (const k_u64 *)k_own(&a->g, f->map.relayed + 8 * at) : 0,
            k->epoch, slot + 1);
    }
    return all;
}

/* Bytes [from, from + bytes) of the node's answer and its weights. */
static K_INLINE void sum_record(struct k_thread *k, const struct k_combine_args *a, k_i32 i,
                                const k_u32 *entry, k_i32 from, k_i32 bytes, k_u8 *to) {
    const struct k_far *f = a->far;
    struct k_term *terms = (struct k_term *)warp_scratch(k);
    const k_i32 row = k_min(from + bytes, a->row_bytes) - from;
    const k_i32 first = (k_max(from, a->row_bytes) - a->row_bytes) / 4;
    const k_i32 end = (from + bytes - a->row_bytes) / 4;
    k_i32 num = 0;
    k_syncwarp(k);
    for (k_i32 l = 0; l < node_ranks(f, f->own); l++) {
        const k_u32 slot = entry[K_FAR_ENTRY + l];
        if (slot != K_FAR_NONE) {
            const k_u64 at = relayed_row(a, i, l, slot);
            if (k->lane == 0) {
                terms[num].row = k_own(&a->g, f->map.relay_land + at * (k_u64)a->row_bytes) +
                                 k_min(from, a->row_bytes);
                terms[num].weight = 1.0f;
            }
            num++;
        }
    }
    k_syncwarp(k);
    if (row > 0) {
        k_reduce(k, k_peer_own((k_u64)to), a->dtype, 0, row, terms, num);
    }
    k_f32 *weights = (k_f32 *)(void *)(to + k_max(row, 0));
    for (k_i32 j = first + k->lane; j < end; j += K_LANES) {
        k_f32 sum = 0.0f;
        for (k_i32 l = 0; j < a->topk && l < node_ranks(f, f->own); l++) {
            const k_u32 slot = entry[K_FAR_ENTRY + l];
            if (slot != K_FAR_NONE) {
                const k_u64 at = relayed_row(a, i, l, slot) * (k_u64)a->topk + (k_u64)j;
                sum = sum + *(const k_f32 *)k_own(&a->g, f->map.relay_side + 4 * at);
            }
        }
        weights[j - first] = sum;
    }
    k_syncwarp(k);
}

/* The next packet of answers to source number i. */
static K_FN k_i32 answer_packet(struct k_thread *k, const struct k_combine_args *a, k_i32 i,
                                k_i32 lane, struct far_blame *why) {
    const struct k_far *f = a->far;
    const k_i32 partner = f->from_source[i], each = K_FAR_ENTRY + node_ranks(f, f->own);
    const struct packing p = packing_of(f, 0, a->row_bytes + weights_bytes(a));
    const k_u32 *list = (const k_u32 *)((k_u64)a->h.sync + K_FAR_BEHIND);
    const k_u32 *lanes = list + 2 * (i * f->map.lanes + lane);
    const k_u32 *entries =
        list + 2 * f->map.most_sources * f->map.lanes + (k_i64)i * f->map.most_tokens * each;
    struct k_stream *stream = far_stream(f, partner, lane, K_STREAM_OUT), s = *stream;
    if (s.epoch == k->epoch) {
        return K_FAR_OVER;
    }
    if (s.begun != k->epoch) {
        s.begun = k->epoch;
        s.at = s.place = (k_i32)lanes[0];
        s.end = (k_i32)(lanes[0] + lanes[1]);
        s.part = 0;
    }
    why->rank = f->partner[partner].rank;
    why->phase = K_PHASE_CONSUMED;
    if (!far_has_slot(k, f, partner, K_PUT_PACKET, lane, s.next)) {
        return K_FAR_WAITS;
    }
    const k_i32 rows = k_min(k_max(p.rows, 1), s.end - s.at);
    const k_i32 bytes = p.rows ? p.record : k_min(p.record - s.part, p.room);
    for (; s.place < s.at + rows; s.place++) { /* those before it have been answered */
        const k_u32 *e = entries + (k_i64)s.place * each;
        if (!is_answered(k, a, i, e)) {
            for (k_i32 l = 0; l < node_ranks(f, f->own); l++) {
                why->rank = e[K_FAR_ENTRY + l] != K_FAR_NONE ? near_rank(f, l) : why->rank;
            }
            why->phase = K_PHASE_ANSWERS;
            set_stream(k, stream, s);
            return K_FAR_WAITS;
        }
    }
    k_u32 *packet =
        (k_u32 *)(f->staging + far_slot(f, partner, K_PUT_PACKET, lane, K_STREAM_OUT, s.next));
    const k_bool whole = s.part + bytes == p.record || rows == 0;
    const k_bool last = whole && s.at + rows == s.end;
    k_u8 *to = (k_u8 *)packet + table_bytes(0, rows);
    write_head(k, packet, rows, last, s.part, bytes, s.at);
    for (k_i32 j = 0; j < rows; j++) {
        const k_u32 *e = entries + (k_i64)(s.at + j) * each;
        if (k->lane == 0) {
            entry_at(packet, 0, j)[K_FAR_TOKEN] = e[K_FAR_TOKEN];
            entry_at(packet, 0, j)[K_FAR_CHANNEL] = e[K_FAR_CHANNEL];
        }
        sum_record(k, a, i, e, s.part, bytes, to + (k_i64)j * bytes);
    }
    far_put(k, f, partner, K_PUT_PACKET, lane, s.next,
            (k_u64)table_bytes(0, rows) + (k_u64)rows * (k_u64)bytes);
    s.next++;
    s.part = whole ? 0 : s.part + bytes;
    s.at += whole ? rows : 0;
    s.epoch = last ? k->epoch : s.epoch;
    set_stream(k, stream, s);
    return K_FAR_MOVED;
}

/* ---- what the owner takes in ------------------------------------------------------------------- */

static K_INLINE k_u64 node_row(const struct k_combine_args *a, k_i32 d, k_i32 t) {
    return (k_u64)d * (k_u64)a->far->map.most_tokens + (k_u64)t;
}

static K_INLINE k_u64 node_word(const struct k_combine_args *a, k_i32 d, k_i32 c) {
    return a->far->map.returned + 8ull * ((k_u64)d * (k_u64)a->g.num_channels + (k_u64)c);
}

/* The next packet of a lane of answers from node d. */
static K_FN k_i32 take_in_packet(struct k_thread *k, const struct k_combine_args *a,
                                 struct k_mover *m, k_i32 d, k_i32 lane,
                                 struct far_blame *why) {
    const struct k_far *f = a->far;
    const k_i32 partner = f->to_node[d];
    struct k_stream *stream = far_stream(f, partner, lane, K_STREAM_IN), s = *stream;
    if (s.epoch == k->epoch) {
        return K_FAR_OVER;
    }
    why->rank = f->partner[partner].rank;
    why->phase = K_PHASE_ANSWERS;
    if (!far_has_packet(k, f, partner, lane, s.next)) {
        return K_FAR_WAITS;
    }
    k_u32 *packet =
        (k_u32 *)(f->staging + far_slot(f, partner, K_PUT_PACKET, lane, K_STREAM_IN, s.next));
    const k_i32 rows = (k_i32)packet[K_FAR_ROWS], from = (k_i32)packet[K_FAR_FROM];
    const k_i32 bytes = (k_i32)packet[K_FAR_BYTES];
    const k_bool last = packet[K_FAR_LAST] != 0;
    const k_i32 row = k_min(from + bytes, a->row_bytes) - from;
    const k_i32 first = (k_max(from, a->row_bytes) - a->row_bytes) / 4;
    const k_u8 *record = (const k_u8 *)packet + table_bytes(0, rows);
    for (k_i32 j = 0; j < rows; j++, record += bytes) {
        const k_u64 at = node_row(a, d, (k_i32)entry_at(packet, 0, j)[K_FAR_TOKEN]);
        if (row > 0) {
            const k_u64 to = f->map.land + at * (k_u64)a->row_bytes + (k_u64)from;
            move_bytes(k, m, a->stages, a->stage_bytes, record, row,
                       k_peer_for_lane0(k, k_peer_at(&a->g, a->g.rank, to)));
        }
        const k_u32 *weights = (const k_u32 *)(const void *)(record + k_max(row, 0));
        for (k_i32 w = first + k->lane; w < k_min((from + bytes - a->row_bytes) / 4, a->topk);
             w += K_LANES) {
            k_store_u32(k_peer_at(&a->g, a->g.rank,
                                  f->map.land_side + 4 * (at * (k_u64)a->topk + (k_u64)w)),
                        weights[w - first]);
        }
    }
    k_mover_settle(k, m, 0);
    k_syncwarp(k);
    if (k->lane == 0 && from + bytes == a->row_bytes + weights_bytes(a)) {
        for (k_i32 j = 0; j < rows; j++) {
            const k_u32 *e = entry_at(packet, 0, j);
            k_publish(k_peer_at(&a->g, a->g.rank, node_word(a, d, (k_i32)e[K_FAR_CHANNEL])),
                      K_WORD(k->epoch, e[K_FAR_TOKEN] + 1));
        }
    }
    far_give_back(k, f, partner, lane, s.next);
    s.next++;
    s.epoch = last ? k->epoch : s.epoch;
    set_stream(k, stream, s);
    return K_FAR_MOVED;
}

/* A warp's streams, number `first` and every `stride`th, until all are over. False after a fault. */
static K_FN k_bool far_combine(struct k_thread *k, const struct k_combine_args *a,
                               struct k_mover *m, k_i32 first, k_i32 stride) {
    const struct k_far *f = a->far;
    const k_i32 lanes = f->map.lanes, in = f->nodes * lanes;
    const k_i32 all = in + f->num_sources * lanes;
    const struct k_spinner fresh = K_SPINNER;
    struct k_spinner s = fresh;
    for (;;) {
        k_bool moved = 0, over = 1;
        struct far_blame why = {k->g->rank, K_PHASE_SELF}, mine = why;
        for (k_i32 i = first; i < all; i += stride) {
            const k_i32 at = i < in ? i : i - in;
            if (i < in && at / lanes == f->own) {
                continue;
            }
            const k_i32 look = i < in ? take_in_packet(k, a, m, at / lanes, at % lanes, &mine)
                                      : answer_packet(k, a, at / lanes, at % lanes, &mine);
            moved = moved || look == K_FAR_MOVED;
            if (look != K_FAR_OVER) {
                why = over ? mine : why;
                over = 0;
            }
        }
        if (over) {
            return 1;
        }
        if (moved) {
            s = fresh;
        } else if (!k_all(k, k_spin(k, &s, why.rank, why.phase))) {
            return 0;
        }
    }
}

/* ---- the owner's sums --------------------------------------------------------------------------- */

/* Whether nodes have answered the token as k_await_rows or k_arrived says. */
static K_INLINE k_bool have_answered(struct k_thread *k, const struct k_combine_args *a,
                                     k_i32 t, k_bool wait) {
    const struct k_group *g = &a->g;
    const struct k_far *f = a->far;
    const k_i32 c = channel_of(&a->channels, t);
    for (k_i32 i = 0; i < a->h.num_dests[t]; i++) {
        const k_i64 at = (k_i64)t * g->max_dests + i;
        const k_i32 r = a->h.dest_rank[at];
        const k_bool near = is_near(f, r);
        const k_u64 *word = (const k_u64 *)k_own(
            g, near ? channel_word(g, g->map.returned, r, c) : node_word(a, f->node[r], c));
        const k_u32 least = near ? a->h.dest_slot[at] + 1 : (k_u32)t + 1;
        const k_i32 whom = near ? r : f->partner[f->to_node[f->node[r]]].rank;
        if (!(wait ? k_await_rows(k, word, k->epoch, least, whom, K_PHASE_ANSWERS)
                   : k_arrived(k, word, k->epoch, least))) {
            return 0;
        }
    }
    return 1;
}

/* Notes a term of a token's sum. */
static K_INLINE k_i32 note_term(struct k_thread *k, struct k_term *terms, k_i32 num,
                                const k_u8 *row) {
    if (k->lane == 0) {
        terms[num].row = row;
        terms[num].weight = 1.0f;
    }
    return num + 1;
}

/*
 * The terms of a token that nodes have answered, behind `num` others: a row of each node, ascending. That of
 * this node is made here if several of its ranks have answered and there are other terms: bytes
 * [from, from + bytes) of it.
 */
static K_FN k_i32 node_terms(struct k_thread *k, const struct k_combine_args *a, k_i32 t,
                             k_i32 from, k_i32 bytes, struct k_term *terms, k_i32 num) {
    const struct k_group *g = &a->g;
    const struct k_far *f = a->far;
    const k_i32 dests = a->h.num_dests[t];
    const k_i32 *rank = a->h.dest_rank + (k_i64)t * g->max_dests;
    k_bool others = num > 0;
    for (k_i32 i = 0; i < dests; i++) {
        others = others || !is_near(f, rank[i]);
    }
    for (k_i32 d = 0; d < f->nodes; d++) {
        k_i32 of = 0; /* this node */
        for (k_i32 i = 0; i < dests; i++) {
            const k_u32 slot = a->h.dest_slot[(k_i64)t * g->max_dests + i];
            const k_i32 r = rank[i];
            if (f->node[r] != d || (d != f->own && of > 0)) {
                continue;
            }
            const k_u64 at = d != f->own ? f->map.land + node_row(a, d, t) * (k_u64)a->row_bytes
                                         : landing(a, (k_u64)a->h.send_base[r] + slot);
            const k_u8 *row = r == g->rank && reads_own_in_place(a)
                                  ? (const k_u8 *)x_row(a, a->h.recv_base[r] + slot)
                                  : k_own(g, at);
            note_term(k, terms, num + of, row + from);
            of++;
        }
        if (d == f->own && of > 1 && others) {
            const k_u64 to = f->map.land + node_row(a, d, t) * (k_u64)a->row_bytes;
            k_syncwarp(k);
            k_reduce(k, k_peer_at(g, g->rank, to + (k_u64)from), a->dtype, 0, bytes,
                     terms + num, of);
            k_syncwarp(k);
            k_acquired(k); /* what lanes have stored is read by the mover */
            note_term(k, terms, num, k_own(g, to) + from);
            of = 1;
        }
        num += of;
    }
    return num;
}

/* The sum of a token's weights for selection j: of nodes, of which each is the sum of its ranks. */
static K_INLINE k_f32 node_weights(const struct k_combine_args *a, k_i32 t, k_i32 j) {
    const struct k_group *g = &a->g;
    const struct k_far *f = a->far;
    const k_i32 dests = a->h.num_dests[t];
    k_f32 sum = 0.0f;
    for (k_i32 d = 0; d < f->nodes; d++) {
        k_f32 of = 0.0f;
        k_bool any = 0;
        for (k_i32 i = 0; i < dests; i++) {
            const k_i64 at = (k_i64)t * g->max_dests + i;
            const k_i32 r = a->h.dest_rank[at];
            if (f->node[r] != d || (d != f->own && any)) {
                continue;
            }
            const k_u64 row =
                d != f->own ? node_row(a, d, t) : (k_u64)a->h.send_base[r] + a->h.dest_slot[at];
            const k_u64 region = d != f->own ? f->map.land_side : g->map.land_side;
            of = of + *(const k_f32 *)k_own(g, region + 4 * (row * (k_u64)a->topk + (k_u64)j));
            any = 1;
        }
        sum = any ? sum + of : sum;
    }
    return sum;
}

#endif
