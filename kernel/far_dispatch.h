/* SPDX-License-Identifier: MIT */
/*
 * Dispatch between nodes: counts and bases by way of relays; a token's row once to each node that it goes
 * to; and what a relay does with what arrives. Function bodies for dispatch.k.c. The loop at the end is
 * run by warps of sending blocks, each for streams of its own: it waits only when none of them can go on.
 * Nothing here waits for a receiver: who lacks a credit goes on forwarding.
 */
#ifndef KERNEL_FAR_DISPATCH_H
#define KERNEL_FAR_DISPATCH_H

#include "kernel/dispatch_sidecar.h"
#include "kernel/far.h"

/* ---- control -------------------------------------------------------------------------------- */

/* One warp: this rank's counts messages, those for the ranks of a node in one, word by word. */
static K_FN k_bool post_far_counts(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    const struct k_far *f = a->far;
    const k_i32 words = g->count_words, chan_word = words - g->num_channels;
    for (k_i32 d = 0; d < f->nodes; d++) {
        if (d == f->own) {
            continue;
        }
        k_u32 *to = begin_message(k, f, f->to_node[d]);
        if (!to) {
            return 0;
        }
        const k_i32 all = node_ranks(f, d) * words;
        for (k_i32 i = k->lane; i < all; i += K_LANES) {
            const k_i32 p = f->ranks[f->first[d] + i / words], w = i % words;
            const k_i32 e = w - 1, c = w - chan_word, first = g->rank_first[p];
            k_u32 v = 0;
            if (w == 0) {
                v = a->h.send_count[p];
            } else if (c >= 0) {
                v = c < a->channels.num
                        ? a->h.send_chan[(k_i64)p * (g->num_channels + 1) + 1 + c]
                        : 0;
            } else if (e < g->rank_first[p + 1] - first) {
                v = a->h.send_expert[g->rank_expert[first + e]];
            }
            to[i] = v;
        }
        end_message(k, f, f->to_node[d], all);
    }
    return 1;
}

/* The words of a source's counts messages, at the ranks of its relay's node. */
static K_INLINE void relay_counts(struct k_thread *k, const struct k_far *f, k_i32 source,
                                  const k_u32 *from) {
    const struct k_group *g = k->g;
    const k_i32 words = g->count_words, all = node_ranks(f, f->own) * words;
    for (k_i32 i = k->lane; i < all; i += K_LANES) {
        k_post(k_peer_at(g, near_rank(f, i / words),
                         counts_offset(g, k->epoch, source) + 8ull * (k_u64)(i % words)),
               K_WORD(k->epoch, from[i]));
    }
}

/* One warp: what this rank says to ranks of other nodes, and what those say for which it is the relay.
 * They say it whatever others do, so that nobody waits for each other here. */
static K_FN k_bool exchange_far(struct k_thread *k, const struct k_dispatch_args *a,
                                const struct op_signature *sig) {
    const struct k_far *f = a->far;
    if (!post_far_ready(k, f, sig, K_WHERE(a->slot, a->channels.num), 0) ||
        ((a->flags & K_DO_COUNTS) && !post_far_counts(k, a))) {
        return 0;
    }
    for (k_i32 i = 0; i < f->num_sources; i++) {
        const k_i32 partner = f->from_source[i];
        const k_u32 *words = await_message(k, f, partner, K_PHASE_READY);
        if (!words) {
            return 0;
        }
        const k_u32 sig0 = relay_ready(k, f, i, words);
        if ((sig0 & 15u) != K_OP_DISPATCH || (sig0 & K_SIG_CACHED)) {
            continue; /* of another operation than this one, maybe: its ready message says so */
        }
        words = await_message(k, f, partner, K_PHASE_COUNTS);
        if (!words) {
            return 0;
        }
        relay_counts(k, f, f->partner[partner].rank, words);
    }
    return 1;
}

/* One warp: bases, which a rank says when it has all counts. */
static K_FN k_bool exchange_far_bases(struct k_thread *k, const struct k_dispatch_args *a,
                                      k_u32 need) {
    const struct k_group *g = &a->g;
    const struct k_far *f = a->far;
    for (k_i32 d = 0; d < f->nodes; d++) {
        if (d == f->own) {
            continue;
        }
        k_u32 *to = begin_message(k, f, f->to_node[d]);
        if (!to) {
            return 0;
        }
        const k_i32 ranks = node_ranks(f, d);
        for (k_i32 l = k->lane; l < ranks; l += K_LANES) {
            to[2 * l] = a->h.recv_base[f->ranks[f->first[d] + l]];
            to[2 * l + 1] = need;
        }
        end_message(k, f, f->to_node[d], 2 * ranks);
    }
    for (k_i32 i = 0; i < f->num_sources; i++) {
        const k_i32 partner = f->from_source[i];
        const k_u32 *words = await_message(k, f, partner, K_PHASE_BASES);
        if (!words) {
            return 0;
        }
        for (k_i32 l = k->lane; l < 2 * node_ranks(f, f->own); l += K_LANES) {
            k_post(k_peer_at(g, near_rank(f, l / 2),
                             base_offset(g, k->epoch, f->partner[partner].rank) +
                                 8ull * (k_u64)(l % 2)),
                   K_WORD(k->epoch, words[l]));
        }
    }
    return 1;
}

/* ---- a stream of rows to a node -------------------------------------------------------------- */

/* The first token of lane i: lanes are runs of channels, cut by tokens. */
static K_INLINE k_i32 lane_first(const struct k_channels *n, k_i32 lanes, k_i32 i) {
    if (i == 0 || i == lanes) {
        return i == 0 ? 0 : n->tokens;
    }
    const k_i32 t = (k_i32)((k_i64)n->tokens * i / lanes);
    return t < n->tokens ? channel_first(n, channel_of(n, t)) : n->tokens;
}

/* Whether token t goes to node d; its entry, if that is wanted. */
static K_INLINE k_bool enter_token(const struct k_dispatch_args *a, k_i32 d, k_i32 t,
                                   k_u32 *entry) {
    const struct k_far *f = a->far;
    const k_i32 num = a->h.num_dests[t], ranks = node_ranks(f, d);
    k_bool goes = 0;
    if (entry) {
        entry[K_FAR_TOKEN] = (k_u32)t;
        entry[K_FAR_CHANNEL] = (k_u32)channel_of(&a->channels, t);
        for (k_i32 l = 0; l < ranks; l++) {
            entry[K_FAR_ENTRY + l] = K_FAR_NONE;
        }
    }
    for (k_i32 i = 0; i < num; i++) {
        const k_i64 at = (k_i64)t * a->g.max_dests + i;
        const k_i32 r = a->h.dest_rank[at];
        if (f->node[r] == d) {
            goes = 1;
            if (entry) {
                entry[K_FAR_ENTRY + f->local[r]] = a->h.dest_slot[at];
            }
        }
    }
    return goes;
}

/* Enters the next tokens for node d, `most` at most. Returns how many; *t goes on behind them. */
static K_FN k_i32 enter_tokens(struct k_thread *k, const struct k_dispatch_args *a, k_i32 d,
                               k_u32 *packet, k_i32 wide, k_i32 most, k_i32 *t, k_i32 end) {
    k_i32 rows = 0;
    while (rows < most && *t < end) {
        const k_i32 mine = *t + k->lane;
        const k_bool goes = mine < end && enter_token(a, d, mine, 0);
        k_u32 total = 0;
        const k_i32 at = rows + (k_i32)k_scan(k, goes, &total);
        if (goes && at < most) {
            enter_token(a, d, mine, entry_at(packet, wide, at));
        }
        const k_u32 stop = k_most(k, goes && at >= most ? ~(k_u32)mine : 0);
        *t = stop ? (k_i32)~stop : *t + K_LANES;
        rows = k_min(rows + (k_i32)total, most);
    }
    return rows;
}

/* Bytes [from, from + bytes) of a token's record: its row, then its sidecar. */
static K_INLINE void pack_record(struct k_thread *k, const struct k_dispatch_args *a,
                                 struct k_mover *m, const struct send_shape *shape, k_i32 t,
                                 k_i32 from, k_i32 bytes, k_u8 *to) {
    const k_i32 row = k_min(from + bytes, a->row_bytes) - from;
    if (row > 0) {
        move_bytes(k, m, a->stages, a->stage_bytes,
                   (const void *)(k_row(&a->x, t) + (k_u64)from), row,
                   k_peer_for_lane0(k, k_peer_own((k_u64)to)));
    }
    const k_i32 first = (k_max(from, a->row_bytes) - a->row_bytes) / 4;
    k_u32 *side = (k_u32 *)(void *)(to + k_max(row, 0));
    for (k_i32 w = first + k->lane; w < (from + bytes - a->row_bytes) / 4; w += K_LANES) {
        side[w - first] = w < shape->side_words ? side_word(a, shape, t, w) : 0;
    }
}

/* The next packet of the lane to node d. */
static K_FN k_i32 send_packet(struct k_thread *k, const struct k_dispatch_args *a,
                              struct k_mover *m, k_i32 d, k_i32 lane, struct far_blame *why) {
    const struct k_far *f = a->far;
    const struct send_shape shape = shape_of(a);
    const k_i32 partner = f->to_node[d], ranks = node_ranks(f, d);
    struct k_stream *stream = far_stream(f, partner, lane, K_STREAM_OUT), s = *stream;
    const struct packing p = packing_of(f, ranks, a->row_bytes + shape.side_bytes);
    if (s.epoch == k->epoch) {
        return K_FAR_OVER;
    }
    if (s.begun != k->epoch) {
        s.begun = k->epoch;
        s.at = s.place = lane_first(&a->channels, f->map.lanes, lane);
        s.end = lane_first(&a->channels, f->map.lanes, lane + 1);
        s.part = 0;
    }
    why->rank = f->partner[partner].rank;
    why->phase = K_PHASE_CONSUMED;
    if (!far_has_slot(k, f, partner, K_PUT_PACKET, lane, s.next)) {
        return K_FAR_WAITS;
    }
    k_u32 *packet =
        (k_u32 *)(f->staging + far_slot(f, partner, K_PUT_PACKET, lane, K_STREAM_OUT, s.next));
    k_i32 after = s.at;
    const k_i32 rows = enter_tokens(k, a, d, packet, ranks, k_max(p.rows, 1), &after, s.end);
    const k_i32 bytes = p.rows ? p.record : k_min(p.record - s.part, p.room);
    const k_bool whole = s.part + bytes == p.record || rows == 0;
    k_i32 more = whole ? k_min(after, s.end) : s.end;
    k_syncwarp(k);
    /* The packet behind which there is no token is the last. */
    while (whole && more < s.end && !enter_token(a, d, more, 0)) {
        more++;
    }
    const k_bool last = whole && more == s.end;
    write_head(k, packet, rows, last, s.part, bytes, s.place);
    for (k_i32 l = k->lane; l < ranks; l += K_LANES) {
        packet[K_FAR_HEAD + l] = a->h.remote_base[f->ranks[f->first[d] + l]];
    }
    k_u8 *to = (k_u8 *)packet + table_bytes(ranks, rows);
    for (k_i32 i = 0; i < rows; i++) {
        pack_record(k, a, m, &shape, (k_i32)entry_at(packet, ranks, i)[K_FAR_TOKEN], s.part,
                    bytes, to + (k_i64)i * bytes);
    }
    k_mover_settle(k, m, 0);
    far_put(k, f, partner, K_PUT_PACKET, lane, s.next,
            (k_u64)table_bytes(ranks, rows) + (k_u64)rows * (k_u64)bytes);
    s.next++;
    s.part = whole ? 0 : s.part + bytes;
    s.at = whole ? more : s.at;
    s.place += whole ? rows : 0;
    s.epoch = last ? k->epoch : s.epoch;
    set_stream(k, stream, s);
    return K_FAR_MOVED;
}

/* ---- what a relay does with it ---------------------------------------------------------------- */

static K_INLINE k_u32 *relay_list(const struct k_dispatch_args *a) {
    return (k_u32 *)((k_u64)a->h.sync + K_FAR_BEHIND);
}

/* Places of a row of the packet and of its sidecar at the rank of this node with index l. */
static K_INLINE struct k_pair place_near(const struct k_dispatch_args *a, k_i32 l,
                                         const k_u32 *packet, const k_u32 *entry) {
    const struct k_map *map = &a->g.map;
    struct k_pair p = {0, 0};
    if (l < node_ranks(a->far, a->far->own) && entry[K_FAR_ENTRY + l] != K_FAR_NONE) {
        const k_i32 r = near_rank(a->far, l);
        const k_u64 slot = K_WHERE_SLOT(a->h.remote_where[r]);
        const k_u64 row = (k_u64)packet[K_FAR_HEAD + l] + entry[K_FAR_ENTRY + l];
        k_pair_set_first(
            &p, k_peer_at(&a->g, r,
                          map->recv + slot * map->recv_slot_bytes + row * (k_u64)a->row_bytes));
        k_pair_set_second(&p, k_peer_at(&a->g, r,
                                        map->side + slot * map->side_slot_bytes +
                                            row * (k_u64)a->g.side_stride));
    }
    return p;
}

/* A part of a record to all ranks of the node that it is for. */
static K_INLINE void forward_record(struct k_thread *k, const struct k_dispatch_args *a,
                                    struct k_mover *m, const k_u32 *packet, const k_u32 *entry,
                                    const k_u8 *record) {
    const k_i32 from = (k_i32)packet[K_FAR_FROM], bytes = (k_i32)packet[K_FAR_BYTES];
    const k_i32 row = k_min(from + bytes, a->row_bytes) - from;
    for (k_i32 base = 0; base < node_ranks(a->far, a->far->own); base += K_LANES) {
        const struct k_pair p = place_near(a, base + k->lane, packet, entry);
        if (row > 0) {
            move_bytes(k, m, a->stages, a->stage_bytes, record, row,
                       k_pair_first(&p, (k_u64)from));
        }
        if (from + bytes > a->row_bytes) {
            const k_i32 first = k_max(from, a->row_bytes) - a->row_bytes;
            move_bytes(k, m, a->stages, a->stage_bytes, record + k_max(row, 0),
                       from + bytes - a->row_bytes - first, k_pair_second(&p, (k_u64)first));
        }
    }
}

/* The rows of a packet are stored: each rank of the node is told, as the source would tell it. */
static K_INLINE void publish_forwarded(struct k_thread *k, const struct k_dispatch_args *a,
                                       k_i32 source, k_u32 *packet) {
    const struct k_group *g = &a->g;
    const k_i32 wide = node_ranks(a->far, a->far->own), rows = (k_i32)packet[K_FAR_ROWS];
    for (k_i32 l = k->lane; l < wide; l += K_LANES) {
        for (k_i32 i = 0, c = -1, stored = 0; i <= rows; i++) {
            const k_u32 *e = entry_at(packet, wide, i);
            const k_bool has = i < rows && e[K_FAR_ENTRY + l] != K_FAR_NONE;
            if (stored && (i == rows || (has && (k_i32)e[K_FAR_CHANNEL] != c))) {
                k_publish(k_peer_at(g, near_rank(a->far, l),
                                    channel_word(g, g->map.progress, source, c)),
                          K_WORD(k->epoch, stored));
            }
            if (has) {
                c = (k_i32)e[K_FAR_CHANNEL];
                stored = (k_i32)e[K_FAR_ENTRY + l] + 1;
            }
        }
    }
}

/* Which rows there were, for the combine that answers them. */
static K_INLINE void list_forwarded(struct k_thread *k, const struct k_dispatch_args *a,
                                    k_i32 i, k_i32 lane, const struct k_stream *s,
                                    k_u32 *packet) {
    const struct k_far_map *m = &a->far->map;
    const k_i32 wide = node_ranks(a->far, a->far->own), each = K_FAR_ENTRY + wide;
    k_u32 *list = relay_list(a), *lanes = list + 2 * (i * m->lanes + lane);
    k_u32 *rows = list + 2 * m->most_sources * m->lanes +
                  ((k_i64)i * m->most_tokens + (k_i32)packet[K_FAR_PLACE]) * each;
    for (k_i32 w = k->lane; w < (k_i32)packet[K_FAR_ROWS] * each; w += K_LANES) {
        rows[w] = entry_at(packet, wide, 0)[w];
    }
    if (packet[K_FAR_LAST] && k->lane == 0) {
        lanes[0] = (k_u32)s->place;
        lanes[1] = packet[K_FAR_PLACE] + packet[K_FAR_ROWS] - (k_u32)s->place;
    }
}

/* The next packet of a lane of source number i. */
static K_FN k_i32 forward_packet(struct k_thread *k, const struct k_dispatch_args *a,
                                 struct k_mover *m, k_i32 i, k_i32 lane,
                                 struct far_blame *why) {
    const struct k_far *f = a->far;
    const k_i32 partner = f->from_source[i], source = f->partner[partner].rank;
    struct k_stream *stream = far_stream(f, partner, lane, K_STREAM_IN), s = *stream;
    if (s.epoch == k->epoch) {
        return K_FAR_OVER;
    }
    why->rank = source;
    why->phase = K_PHASE_ROWS;
    if (!far_has_packet(k, f, partner, lane, s.next)) {
        return K_FAR_WAITS;
    }
    k_u32 *packet =
        (k_u32 *)(f->staging + far_slot(f, partner, K_PUT_PACKET, lane, K_STREAM_IN, s.next));
    const k_i32 rows = (k_i32)packet[K_FAR_ROWS], wide = node_ranks(f, f->own);
    const k_i32 bytes = (k_i32)packet[K_FAR_BYTES];
    const k_bool last = packet[K_FAR_LAST] != 0;
    const k_u8 *from = (const k_u8 *)packet + table_bytes(wide, rows);
    for (k_i32 j = 0; j < rows; j++) {
        forward_record(k, a, m, packet, entry_at(packet, wide, j), from + (k_i64)j * bytes);
    }
    if (s.begun != k->epoch) {
        s.begun = k->epoch;
        s.place = (k_i32)packet[K_FAR_PLACE];
    }
    list_forwarded(k, a, i, lane, &s, packet);
    k_mover_settle(k, m, 0);
    k_syncwarp(k);
    if ((k_i32)packet[K_FAR_FROM] + bytes == a->row_bytes + shape_of(a).side_bytes) {
        publish_forwarded(k, a, source, packet);
    }
    far_give_back(k, f, partner, lane, s.next);
    s.next++;
    s.epoch = last ? k->epoch : s.epoch;
    set_stream(k, stream, s);
    return K_FAR_MOVED;
}

/*
 * A warp's streams, number `first` and every `stride`th: to nodes, and from sources. Until all of them are
 * over; or, where it does not `wait`, as far as they go. False after a fault.
 */
static K_FN k_bool far_dispatch(struct k_thread *k, const struct k_dispatch_args *a,
                                struct k_mover *m, k_i32 first, k_i32 stride, k_bool wait) {
    const struct k_far *f = a->far;
    const k_i32 lanes = f->map.lanes, out = f->nodes * lanes;
    const k_i32 all = out + f->num_sources * lanes;
    const struct k_spinner fresh = K_SPINNER;
    struct k_spinner s = fresh;
    for (;;) {
        k_bool moved = 0, over = 1;
        struct far_blame why = {k->g->rank, K_PHASE_SELF}, mine = why;
        for (k_i32 i = first; i < all; i += stride) {
            const k_i32 at = i < out ? i : i - out;
            if (i < out && at / lanes == f->own) {
                continue;
            }
            const k_i32 look = i < out ? send_packet(k, a, m, at / lanes, at % lanes, &mine)
                                       : forward_packet(k, a, m, at / lanes, at % lanes, &mine);
            moved = moved || look == K_FAR_MOVED;
            if (look != K_FAR_OVER) {
                why = over ? mine : why;
                over = 0;
            }
        }
        if (over || (!wait && !moved)) {
            return 1;
        }
        if (moved) {
            s = fresh;
        } else if (!k_all(k, k_spin(k, &s, why.rank, why.phase))) {
            return 0;
        }
    }
}

#endif
