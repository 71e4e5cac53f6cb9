/* SPDX-License-Identifier: MIT */
/*
 * The receiving half of dispatch: which rows a warp takes, and the one walk in which it unpacks
 * their sidecars and copies them. Function bodies for dispatch.k.c; all warps run them, those that
 * send afterwards. A warp waits only when it holds nothing that it could store.
 */
#ifndef KERNEL_DISPATCH_RECEIVE_H
#define KERNEL_DISPATCH_RECEIVE_H

#include "kernel/dispatch_output.h"

/* Which work receiving warps take, and how. Constant during an operation. */
struct intake {
    k_i32 channels;  /* the most that a source uses */
    k_i32 wide;      /* how many channels a source sends at once */
    k_i32 few;       /* parts of a channel so that there is one for each warp */
    k_i32 items;     /* parts of channels of a source */
    k_i32 most_rows; /* of a batch */
    k_i32 pieces;    /* of a row; 0: rows stay where they are */
    k_bool staged;   /* a batch's sidecars fit a stage */
    k_bool direct;   /* this rank's own rows are copied out of x */
};

/* Rows of one source that are unpacked together. */
struct batch {
    k_i32 source, rows;
    k_u32 first;
};

/* What a warp has taken and not begun. */
struct intake_feed {
    k_u32 row, end; /* the rows received that it has taken and not begun */
    k_u32 base;     /* the first row of their channel */
    k_i32 source, channel;
    k_i32 token; /* where the search for the token of the next own row goes on */
    k_u32 seen;  /* how many own rows of the channel lie before that */
};

/* What a receiving warp notes in its scratch; written by lane 0. Behind it lie the places of the
 * batch that is stored ([rows][topk] expanded rows), and the tokens of the batch that is loaded
 * ([rows], this rank's own). */
struct intake_notes {
    struct batch batch[2];
    struct intake_feed feed;
};

_Static_assert(sizeof(struct intake_notes) <= K_NOTE_BYTES, "a warp's notes fit their place");

static K_INLINE struct intake_notes *warp_intake_notes(struct k_thread *k) {
    return (struct intake_notes *)warp_scratch(k);
}

static K_INLINE k_i32 *warp_places(struct k_thread *k) {
    return (k_i32 *)((k_u8 *)warp_scratch(k) + K_NOTE_BYTES);
}

static K_INLINE k_i32 *warp_tokens(struct k_thread *k, const struct k_dispatch_args *a,
                                   const struct intake *w) {
    return warp_places(k) + w->most_rows * a->topk;
}

/*
 * Into how many parts the rows of a channel of the group are cut. A part is large enough that
 * finding it costs little beside copying it, unless there would not be one for each warp then.
 */
#define K_MOST_PARTS 4
#define K_PART_BYTES 28672

static K_INLINE k_i32 parts_in(const struct k_dispatch_args *a, const struct intake *w,
                               k_i32 group) {
    const k_i32 tokens = a->channels.size[group];
    const k_i32 bytes = a->recv_x.data ? k_min(a->row_bytes, 1 << 14) : 0;
    const k_i32 large = k_min(tokens, 1 << 16) * bytes / K_PART_BYTES;
    return k_min(k_max(k_max(large, w->few), 1), k_min(K_MOST_PARTS, tokens));
}

/* Of the channels, those of a group: of this rank's groups, the last with all that others have more. */
static K_INLINE k_i32 channels_in(const struct k_dispatch_args *a, const struct intake *w,
                                  k_i32 group) {
    const k_i32 each = a->channels.in_group;
    return group < K_CHANNEL_GROUPS - 1 ? each : w->channels - (K_CHANNEL_GROUPS - 1) * each;
}

static K_INLINE struct intake intake_of(const struct k_thread *k,
                                        const struct k_dispatch_args *a, k_bool direct) {
    const struct k_group *g = &a->g;
    const k_i32 room = (g->scratch_bytes - K_NOTE_BYTES) / 4;
    const k_i32 senders = a->send_blocks ? (k_i32)a->send_blocks : 1;
    struct intake w;
    w.channels = k_max((k_i32)a->h.recv_channels[g->num_ranks], a->channels.num);
    w.few = 2 * k->num_blocks * k->num_warps / (g->num_ranks * w.channels);
    w.wide = k_min(senders * k->num_warps, w.channels);
    w.items = 0;
    for (k_i32 i = 0; i < K_CHANNEL_GROUPS; i++) {
        w.items += channels_in(a, &w, i) * parts_in(a, &w, i);
    }
    w.staged = g->side_stride <= a->stage_bytes;
    w.most_rows =
        k_min(room / (a->topk + 1), w.staged ? a->stage_bytes / g->side_stride : room);
    w.pieces = a->recv_x.data ? (a->row_bytes + a->stage_bytes - 1) / a->stage_bytes : 0;
    w.direct = direct;
    return w;
}

static K_INLINE k_bool is_direct(const struct k_dispatch_args *a, const struct intake *w,
                                 k_i32 source) {
    return w->direct && source == a->g.rank;
}

/* A part of a channel of a source. */
struct item {
    k_i32 source, channel, part, parts;
};

/*
 * Item i of all. This rank's own rows come first, while the peers' are on their way. Then the
 * peers' as they arrive: a source has `wide` channels of a group under way, so the first parts of
 * all of those, of all sources in turn, then the second parts.
 */
static K_INLINE struct item item_at(const struct k_dispatch_args *a, const struct intake *w,
                                    k_i32 i) {
    const k_i32 peers = a->g.num_ranks - 1, far = i - w->items;
    k_i32 at = far < 0 ? i : far / peers, first = 0, group = 0;
    struct item m;
    m.source = far < 0 ? a->g.rank : (a->g.rank + 1 + far % peers) % a->g.num_ranks;
    m.parts = parts_in(a, w, 0);
    K_ROLLED while (at >= channels_in(a, w, group) * m.parts) {
        at -= channels_in(a, w, group) * m.parts;
        first += channels_in(a, w, group);
        group++;
        m.parts = parts_in(a, w, group);
    }
    const k_i32 num = channels_in(a, w, group);
    const k_i32 wide = far < 0 ? 1 : k_min(w->wide, num);
    const k_i32 round = at / (wide * m.parts) * wide, width = k_min(wide, num - round);
    const k_i32 in = at - round * m.parts;
    m.channel = first + round + in % width;
    m.part = in / width;
    return m;
}

/* Rows for this warp, of the next item that has any; false: all were taken. */
static K_INLINE k_bool take_rows(struct k_thread *k, const struct k_dispatch_args *a,
                                 const struct intake *w, struct intake_feed *f) {
    const struct k_group *g = &a->g;
    while (f->row == f->end) {
        const k_i32 i = (k_i32)k_take_next(k, &g->ctl->taken[K_TAKEN_PARTS]);
        if (i >= g->num_ranks * w->items) {
            return 0;
        }
        const struct item m = item_at(a, w, i);
        k_u32 end = 0;
        channel_rows(g, &a->h, m.source, m.channel, &f->base, &end);
        f->row = f->base + (end - f->base) * (k_u32)m.part / (k_u32)m.parts;
        f->end = f->base + (end - f->base) * (k_u32)(m.part + 1) / (k_u32)m.parts;
        f->source = m.source;
        f->channel = m.channel;
        f->token = channel_first(&a->channels, m.channel);
        f->seen = 0;
    }
    return 1;
}

/* Whether token t has this rank among its destinations. */
static K_INLINE k_bool stays(const struct k_dispatch_args *a, k_i32 t) {
    const k_i32 num = a->h.num_dests[t];
    for (k_i32 i = 0; i < num; i++) {
        if (a->h.dest_rank[(k_i64)t * a->g.max_dests + i] == a->g.rank) {
            return 1;
        }
    }
    return 0;
}

/* The tokens of the next `rows` own rows. */
static K_FN void find_tokens(struct k_thread *k, const struct k_dispatch_args *a,
                             struct intake_feed *f, k_u32 rows, k_i32 *tokens) {
    const k_u32 first = f->row - f->base;
    for (;;) {
        const k_i32 t = f->token + k->lane;
        const k_bool is = t < a->tokens && stays(a, t);
        k_u32 total = 0;
        const k_u32 at = f->seen + k_scan(k, is, &total);
        if (is && at >= first && at < first + rows) {
            tokens[at - first] = t;
        }
        if (f->seen + total >= first + rows || f->token >= a->tokens) {
            return; /* these tokens may have rows of the next batch too */
        }
        f->seen += total;
        f->token += K_LANES;
    }
}

/* The next rows of the feed, once they have arrived. */
static K_FN k_i32 choose_batch(struct k_thread *k, const struct k_dispatch_args *a,
                               const struct intake *w, k_bool wait, struct intake_feed *f,
                               struct batch *b) {
    const struct k_group *g = &a->g;
    if (!take_rows(k, a, w, f)) {
        return K_NEXT_NONE;
    }
    b->source = f->source;
    b->first = f->row;
    b->rows = k_min((k_i32)(f->end - f->row), w->most_rows);
    if (is_direct(a, w, f->source)) {
        find_tokens(k, a, f, (k_u32)b->rows, warp_tokens(k, a, w));
    } else {
        const k_u64 *word =
            (const k_u64 *)k_own(g, channel_word(g, g->map.progress, f->source, f->channel));
        const k_u32 least = f->row + (k_u32)b->rows - a->h.recv_base[f->source];
        if (wait && !k_await_rows(k, word, k->epoch, least, f->source, K_PHASE_ROWS)) {
            return K_NEXT_FAILED;
        }
        if (!wait && !k_arrived(k, word, k->epoch, least)) {
            return K_NEXT_LATER;
        }
    }
    f->row += (k_u32)b->rows;
    return K_NEXT_READY;
}

/* The next rows that have arrived, noted as number `set`; `wait`: until they have. */
static K_FN k_i32 next_batch(struct k_thread *k, const struct k_dispatch_args *a,
                             const struct intake *w, k_bool wait, k_i32 set) {
    struct intake_notes *n = warp_intake_notes(k);
    k_syncwarp(k); /* no lane needs what was noted of the batch before the last */
    struct intake_feed f = n->feed;
    struct batch b = {0, 0, 0};
    const k_i32 next = choose_batch(k, a, w, wait, &f, &b);
    k_syncwarp(k);
    if (k->lane == 0) {
        n->feed = f;
        if (next == K_NEXT_READY) {
            n->batch[set] = b;
        }
    }
    k_syncwarp(k);
    return next;
}

/* Sidecars of a batch, side by side from `sides` on. Lanes take (row, selection) and (row, scale)
 * pairs, so that many rows are read at once. */
static K_FN void unpack_compact(struct k_thread *k, const struct k_dispatch_args *a,
                                const struct batch *b, const k_u32 *sides) {
    const k_i32 topk = a->topk, scales = a->num_scales, stride = a->g.side_stride / 4;
    const k_i64 first = b->first, room = a->capacity - first;
    const k_i32 rows = room < b->rows ? (room > 0 ? (k_i32)room : 0) : b->rows;
    for (k_i32 i = k->lane; a->recv_source.data && i < rows; i += K_LANES) {
        write_source(a, first + i, b->source, (k_i32)sides[i * stride]);
    }
    const k_bool selections = a->recv_ids.data || a->recv_weights.data;
    for (k_i32 i = k->lane; selections && i < rows * topk; i += K_LANES) {
        const k_i32 r = i / topk, j = i % topk;
        const k_u32 *side = sides + r * stride;
        const k_i32 local = local_expert(a, side, j);
        if (a->recv_ids.data) {
            write_id(a, first + r, j, local);
        }
        if (a->recv_weights.data) {
            *weight_at(a, first + r, j) =
                local >= 0 ? k_float(side[K_SIDE_WEIGHTS(topk) + j]) : 0.0f;
        }
    }
    for (k_i32 i = k->lane; a->recv_scales.data && i < rows * scales; i += K_LANES) {
        unpack_scale(a, sides + i / scales * stride, first + i / scales, i % scales);
    }
}

/* The same, and the batch's places. */
static K_FN void unpack_expanded(struct k_thread *k, const struct k_dispatch_args *a,
                                 const struct batch *b, const k_u32 *sides, k_i32 *places) {
    const k_i32 topk = a->topk, scales = a->num_scales, stride = a->g.side_stride / 4;
    for (k_i32 i = k->lane; i < b->rows * topk; i += K_LANES) {
        const k_i32 r = i / topk, j = i % topk;
        const k_u32 *side = sides + r * stride;
        const k_i32 to = expanded_row(a, b->source, side, j);
        places[i] = to;
        a->h.expand_row[(k_i64)b->first * topk + i] = to;
        if (to >= 0 && to < a->capacity) {
            write_source(a, to, b->source, (k_i32)side[0]);
            if (a->recv_weights.data) {
                *weight_at(a, to, 0) = k_float(side[K_SIDE_WEIGHTS(topk) + j]);
            }
        }
    }
    k_syncwarp(k);
    for (k_i32 i = k->lane; a->recv_scales.data && i < b->rows * scales; i += K_LANES) {
        const k_i32 r = i / scales;
        for (k_i32 j = 0; j < topk; j++) {
            const k_i32 to = places[r * topk + j];
            if (to >= 0 && to < a->capacity) {
                unpack_scale(a, sides + r * stride, to, i % scales);
            }
        }
    }
}

/* Where a walk over batches is: at a piece of a row, or, in row -1, at the batch's sidecars. */
struct intake_walk {
    k_i32 set, row, rows, piece, stage;
};

static K_INLINE void walk_intake(struct intake_walk *at, const struct intake *w, k_i32 stages) {
    at->stage = next_stage(at->stage, stages);
    if (at->row < 0) {
        at->row = w->pieces ? 0 : at->rows;
    } else if (++at->piece == w->pieces) {
        at->piece = 0;
        at->row++;
    }
}

/* Sidecars of own rows, made where others' are read from: in the stage, or where they would lie. */
static K_INLINE void make_sides(struct k_thread *k, const struct k_dispatch_args *a,
                                struct k_mover *m, const struct intake *w,
                                const struct batch *b, k_i32 stage) {
    const struct send_shape shape = shape_of(a);
    const k_i32 *tokens = warp_tokens(k, a, w), stride = a->g.side_stride / 4;
    k_u32 *out = w->staged ? k_mover_fill(k, m, stage) : received_side(a, b->first);
    for (k_i32 i = k->lane; i < b->rows * shape.side_words; i += K_LANES) {
        const k_i32 r = i / shape.side_words, word = i % shape.side_words;
        out[r * stride + word] = side_word(a, &shape, tokens[r], word);
    }
    k_mover_filled(k, m);
}

/* The next sidecars or piece of a row into a stage. */
static K_INLINE void load_step(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, const struct intake *w,
                               const struct intake_walk *in) {
    const struct batch *b = &warp_intake_notes(k)->batch[in->set];
    const k_bool direct = is_direct(a, w, b->source);
    const k_i32 from = in->piece * a->stage_bytes;
    k_mover_retire(k, m, newest_stores(a->stages));
    if (in->row >= 0) {
        const k_u8 *row = received_row(a, b->first + (k_u32)in->row);
        if (direct) {
            const k_i64 t = warp_tokens(k, a, w)[in->row];
            row = (const k_u8 *)k_row(&a->x, t);
        }
        k_mover_load(k, m, in->stage, row + from, k_min(a->row_bytes - from, a->stage_bytes));
    } else if (direct) {
        make_sides(k, a, m, w, b, in->stage);
    } else if (w->staged) {
        k_mover_load(k, m, in->stage, received_side(a, b->first), b->rows * a->g.side_stride);
    }
}

/* Stores a piece of a received row to its one or several places in the output. */
static K_INLINE void store_piece(struct k_thread *k, const struct k_dispatch_args *a,
                                 struct k_mover *m, const struct intake_walk *out) {
    const k_i32 from = out->piece * a->stage_bytes;
    const k_i32 bytes = k_min(a->row_bytes - from, a->stage_bytes);
    if (a->flags & K_DO_EXPAND) {
        const k_i32 *places = warp_places(k) + out->row * a->topk;
        for (k_i32 base = 0; base < a->topk; base += K_LANES) {
            const k_i32 j = base + k->lane;
            const k_i64 to = j < a->topk ? places[j] : -1;
            k_u64 at = 0;
            if (to >= 0 && to < a->x_rows) {
                at = k_row(&a->recv_x, to) + (k_u64)from;
            }
            k_mover_store(k, m, out->stage, k_peer_own(at), bytes);
        }
    } else {
        const k_i64 to = (k_i64)warp_intake_notes(k)->batch[out->set].first + out->row;
        if (to < a->x_rows) {
            const k_u64 at = k_row(&a->recv_x, to) + (k_u64)from;
            k_mover_store(k, m, out->stage, k_peer_for_lane0(k, k_peer_own(at)), bytes);
        }
    }
}

/* What has been taken in goes to the output. */
static K_INLINE void store_step(struct k_thread *k, const struct k_dispatch_args *a,
                                struct k_mover *m, const struct intake *w,
                                const struct intake_walk *out) {
    if (out->row >= 0) {
        k_mover_wait(k, m, out->stage);
        store_piece(k, a, m, out);
    } else {
        const struct batch *b = &warp_intake_notes(k)->batch[out->set];
        const k_u32 *sides = received_side(a, b->first);
        if (w->staged && is_direct(a, w, b->source)) {
            sides = k_mover_fill(k, m, out->stage);
        } else if (w->staged) {
            k_mover_wait(k, m, out->stage);
            sides = (const k_u32 *)k_mover_view(m, out->stage);
        }
        k_syncwarp(k); /* all lanes have used the places of the batch before */
        if (a->flags & K_DO_EXPAND) {
            unpack_expanded(k, a, b, sides, warp_places(k));
        } else {
            unpack_compact(k, a, b, sides);
        }
        k_mover_filled(k, m); /* read: the stage may be loaded again */
    }
    k_mover_commit(k, m); /* of nothing, after sidecars: retire counts pieces */
}

/*
 * One walk over all that this warp takes, so that the next batch is on its way before the last is
 * stored. `in` is at most a batch ahead of `out`.
 */
static K_FN k_bool receive_rows(struct k_thread *k, const struct k_dispatch_args *a,
                                struct k_mover *m, const struct intake *w) {
    struct intake_walk in = {0, 0, 0, 0, 0}, out = in;
    k_i32 next = K_NEXT_READY, ahead = 0;
    k_syncwarp(k); /* the scratch was used for sending */
    if (k->lane == 0) {
        warp_intake_notes(k)->feed.row = warp_intake_notes(k)->feed.end = 0;
    }
    k_mover_retire(k, m, 0);
    while (next != K_NEXT_NONE || ahead > 0) {
        if (in.row == in.rows && next != K_NEXT_NONE && (ahead == 0 || in.set == out.set)) {
            next = next_batch(k, a, w, ahead == 0, 1 - in.set);
            if (next == K_NEXT_FAILED) {
                return 0;
            }
            if (next == K_NEXT_READY) {
                in.set = 1 - in.set;
                in.row = -1;
                in.rows = warp_intake_notes(k)->batch[in.set].rows;
                out = ahead == 0 ? in : out;
            }
        }
        if (in.row < in.rows && ahead < most_ahead(a->stages)) {
            load_step(k, a, m, w, &in);
            walk_intake(&in, w, a->stages);
            ahead++;
        } else if (ahead > 0) {
            store_step(k, a, m, w, &out);
            walk_intake(&out, w, a->stages);
            ahead--;
            if (out.row == out.rows && out.set != in.set) {
                out.set = in.set;
                out.row = -1;
                out.rows = in.rows;
            }
        }
    }
    return 1;
}

/* The blocks from first_block on receive from the beginning. */
static K_FN k_bool receive(struct k_thread *k, const struct k_dispatch_args *a,
                           struct k_mover *m, k_i32 first_block, k_bool direct) {
    const struct k_group *g = &a->g;
    k_u32 go = 0;
    if (!k_await(k, &g->ctl->go_recv, k->epoch, g->rank, K_PHASE_SELF, &go)) {
        return 0;
    }
    if (k->block >= first_block) {
        fill_rest(k, a, k_first(k, first_block), k_stride(k, k->num_blocks - first_block));
    }
    const struct intake w = intake_of(k, a, direct);
    return receive_rows(k, a, m, &w);
}

#endif
