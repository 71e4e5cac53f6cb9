/* SPDX-License-Identifier: MIT */
/*
 * The sending half of dispatch: which tokens a warp sends, where their rows go, and the one walk
 * over all of them. Function bodies for dispatch.k.c; warps of sending blocks run them. Nothing
 * here waits for a receiver.
 */
#ifndef KERNEL_DISPATCH_SEND_H
#define KERNEL_DISPATCH_SEND_H

#include "kernel/dispatch_sidecar.h"
#include "kernel/far.h"

static K_INLINE k_bool serves(const struct k_dispatch_args *a, k_i32 whom, k_i32 d) {
    const k_bool near = !K_HAS_FAR(a) || is_near(a->far, d);
    return near && (whom == K_TO_ALL || (d == a->g.rank) == (whom == K_TO_SELF));
}

/* What a sending warp keeps in its scratch. */
#define K_NEAR_RANKS 24
#define K_TRACKED_RANKS 16
#define K_LISTED_TOKENS 64

/* A channel is announced in one part or two: part = 2 * channel + (it is the channel's last). */
struct send_token {
    k_i32 token, part, dests;
};

struct send_scratch {
    /* Where this rank's rows begin at the first ranks. */
    struct k_pair first[K_NEAR_RANKS];
    /* Of the rows for each rank, those before this one are stored. */
    k_u32 stored[K_TRACKED_RANKS];
    /* The same when the part ended that is announced next. */
    k_u32 announced[K_TRACKED_RANKS];
    struct send_token listed[K_LISTED_TOKENS];
};

_Static_assert(sizeof(struct send_scratch) <= K_SCRATCH_BYTES(1), "send_scratch");
_Static_assert(K_LANES == 1 || K_TRACKED_RANKS <= K_LANES, "a token's ranks are noted at once");
_Static_assert(K_LISTED_TOKENS > K_LANES + K_MOVER_STAGES + 1,
               "what is listed is still in use");

/*
 * The tokens that a warp sends, in order: those of its channels that have a destination to serve.
 * Its channels are number `first` and then, where warps take them in turn, the next that no other
 * has taken, else every `stride`th. Tokens are listed ahead of need, K_LANES at a time, because
 * nothing may wait for memory between two pieces.
 */
struct send_list {
    struct send_scratch *s;
    k_i32 whom, stride;
    k_bool in_turn;
    k_i32 channel; /* the one that is being listed */
    k_i32 at, end; /* its tokens that were not looked at yet */
    k_i32 middle;  /* its token with which the second part begins */
    k_i32 least;   /* a channel of fewer tokens has one part */
    k_i32 num;     /* tokens listed so far */
};

static K_INLINE const struct send_token *listed_token(const struct send_list *l, k_i32 i) {
    return &l->s->listed[(k_u32)i % K_LISTED_TOKENS];
}

/* How many destinations token t has; 0 if there is none to serve. */
static K_INLINE k_i32 dests_to_serve(const struct k_dispatch_args *a, k_i32 whom, k_i32 t) {
    const k_i32 num = a->h.num_dests[t];
    k_bool any = !K_HAS_FAR(a) && (whom == K_TO_ALL || (whom == K_TO_PEERS && num > 1));
    for (k_i32 i = 0; i < num && !any; i++) {
        any = serves(a, whom, a->h.dest_rank[(k_i64)t * a->g.max_dests + i]);
    }
    return any ? num : 0;
}

static K_INLINE void begin_channel(const struct k_dispatch_args *a, struct send_list *l,
                                   k_i32 c) {
    l->channel = c;
    l->at = channel_first(&a->channels, c);
    l->end = channel_first(&a->channels, c + 1);
    l->middle = l->end - l->at < l->least ? l->at : l->at + (l->end - l->at) / 2 + 1;
}

/* Lists token i + 1 at least, if the channel has it. */
static K_INLINE void list_beyond(struct k_thread *k, const struct k_dispatch_args *a,
                                 struct send_list *l, k_i32 i) {
    while (l->num <= i + 1 && l->at < l->end) {
        const k_i32 t = l->at + k->lane;
        const k_i32 dests = t < l->end ? dests_to_serve(a, l->whom, t) : 0;
        const k_u32 all = k_ballot(k, dests > 0), before = (k_u32)k_count(all & k_below(k));
        if (dests > 0) {
            struct send_token *to = &l->s->listed[((k_u32)l->num + before) % K_LISTED_TOKENS];
            to->token = t;
            to->part = 2 * l->channel + (t >= l->middle);
            to->dests = dests;
        }
        k_syncwarp(k);
        l->num += k_count(all);
        l->at += K_LANES;
    }
}

static K_INLINE void next_channel(struct k_thread *k, const struct k_dispatch_args *a,
                                  struct send_list *l) {
    begin_channel(a, l,
                  l->in_turn ? take_beyond(k, l->stride, a->channels.num,
                                           &a->g.ctl->taken[K_TAKEN_CHANNELS])
                             : l->channel + l->stride);
}

/* Where this rank's rows begin at rank d, and their sidecars. */
static K_INLINE struct k_pair first_place(const struct k_dispatch_args *a, k_i32 d) {
    const struct k_map *map = &a->g.map;
    const k_u64 slot = K_WHERE_SLOT(a->h.remote_where[d]), row = a->h.remote_base[d];
    struct k_pair p;
    k_pair_set_first(
        &p, k_peer_at(&a->g, d,
                      map->recv + slot * map->recv_slot_bytes + row * (k_u64)a->row_bytes));
    k_pair_set_second(
        &p, k_peer_at(&a->g, d,
                      map->side + slot * map->side_slot_bytes + row * (k_u64)a->g.side_stride));
    return p;
}

static K_INLINE struct send_list begin_list(struct k_thread *k, const struct k_dispatch_args *a,
                                            k_i32 whom, k_i32 first, k_i32 stride,
                                            k_i32 row_pieces) {
    struct send_list l = {0};
    l.s = (struct send_scratch *)warp_scratch(k);
    l.whom = whom;
    l.stride = stride;
    l.in_turn = whom != K_TO_SELF;
    l.least = a->g.num_ranks <= K_TRACKED_RANKS ? K_TWO_PARTS / row_pieces : a->tokens + 1;
    begin_channel(a, &l, first);
    for (k_i32 d = k->lane; d < K_TRACKED_RANKS; d += K_LANES) {
        l.s->stored[d] = 0;
    }
    k_syncwarp(k);
    return l;
}

/* Ready messages and bases are here. */
static K_INLINE void note_places(struct k_thread *k, const struct k_dispatch_args *a,
                                 const struct send_list *l) {
    for (k_i32 d = k->lane; d < k_min(a->g.num_ranks, K_NEAR_RANKS); d += K_LANES) {
        l->s->first[d] = first_place(a, d);
    }
    k_syncwarp(k);
}

/* The places of a row at rank d and of its sidecar; it is number `slot` of this rank's rows for it.
 * Nowhere where d is not served. */
static K_INLINE struct k_pair place_at(const struct k_dispatch_args *a,
                                       const struct send_list *l, k_i32 d, k_u32 slot) {
    struct k_pair p = {0, 0};
    if (d >= 0 && serves(a, l->whom, d)) {
        p = d < K_NEAR_RANKS ? l->s->first[d] : first_place(a, d);
        if (d < K_TRACKED_RANKS) {
            l->s->stored[d] = slot + 1;
        }
        k_pair_move_first(&p, (k_u64)slot * (k_u64)a->row_bytes);
        k_pair_move_second(&p, (k_u64)slot * (k_u64)a->g.side_stride);
    }
    return p;
}

/* What a lane reads of a token before its turn: its destination, and words of the sidecar as far
 * as they fit. */
#define K_WORDS_AHEAD 4

struct token_ahead {
    k_i32 dests_read, words_read; /* how many tokens' destinations and words have been read */
    k_i32 rank;                   /* the destination of the last of the former; -1: none */
    k_u32 slot;                   /* its row's number among this rank's rows for that rank */
    k_u32 word[K_WORDS_AHEAD];    /* the words of the last of the latter */
    k_u64 source[K_WORDS_AHEAD];  /* where those of token 0 lie */
};

static K_INLINE struct token_ahead begin_read_ahead(struct k_thread *k,
                                                    const struct k_dispatch_args *a,
                                                    const struct send_shape *s) {
    struct token_ahead n = {0, 0, -1, 0, {0}, {0}};
    for (k_i32 i = 0; i < K_WORDS_AHEAD; i++) {
        n.source[i] = find_word(a, s, k->lane + i * K_LANES);
    }
    return n;
}

/*
 * Where in the circle of a token's destinations a warp begins, in 32nds of the circle, so that all
 * links are in use at any time. Of two neighbouring ranks one begins a quarter of the circle after
 * the other, so that they are not at the same destination; of two warps a third, by a number that
 * has no divisor in common with 32, so that 32 warps begin at 32 different places.
 */
#define K_CIRCLE 32
#define K_WARP_TURN 11
#define K_RANK_TURN 8

/* Destination number i of a listed token, as this warp counts them. */
static K_INLINE void read_dest(struct k_thread *k, const struct k_dispatch_args *a,
                               const struct send_token *t, k_i32 i, struct token_ahead *n) {
    const k_i32 turn =
        ((k->warp * K_WARP_TURN + a->g.rank * K_RANK_TURN) % K_CIRCLE * t->dests) / K_CIRCLE;
    const k_i32 at = i + turn < t->dests ? i + turn : i + turn - t->dests;
    n->rank = -1;
    n->slot = 0;
    if (i < t->dests) {
        n->rank = a->h.dest_rank[(k_i64)t->token * a->g.max_dests + at];
        n->slot = a->h.dest_slot[(k_i64)t->token * a->g.max_dests + at];
    }
}

/*
 * Reads ahead of the piece that is stored next. All is read at once after a token's first piece,
 * its sidecar and the next one's destinations, as waiting for one read may be waiting for all.
 */
static K_INLINE void read_ahead(struct k_thread *k, const struct k_dispatch_args *a,
                                const struct send_shape *s, const struct send_list *l,
                                const struct walk *out, struct token_ahead *n) {
    const k_bool begun = out->piece > 0;
    if (n->dests_read < l->num && n->dests_read == out->item + begun) {
        read_dest(k, a, listed_token(l, n->dests_read), k->lane, n);
        n->dests_read++;
    }
    if (n->words_read < l->num && n->words_read == out->item && (begun || s->pieces == 1)) {
        const k_i32 t = listed_token(l, n->words_read)->token;
        for (k_i32 i = 0; i < K_WORDS_AHEAD; i++) {
            n->word[i] = read_word(a, s, n->source[i], t, k->lane + i * K_LANES);
        }
        n->words_read++;
    }
}

/* Part `part` of a sidecar into its stage, by the lanes. */
static K_INLINE void fill_side(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, const struct send_shape *s, k_i32 t,
                               k_i32 part, k_i32 stage, const struct token_ahead *n) {
    const k_i32 first = part * (a->stage_bytes / 4);
    const k_i32 end = k_min(s->side_bytes / 4, first + a->stage_bytes / 4);
    k_u32 *out = k_mover_fill(k, m, stage) + s->side_at / 4;
    k_i32 ready = 0;
    if (part == 0) {
        ready = K_WORDS_AHEAD * K_LANES;
        for (k_i32 i = 0; i < K_WORDS_AHEAD; i++) {
            const k_i32 w = k->lane + i * K_LANES;
            if (w < end) {
                out[w] = n->word[i];
            }
        }
    }
    K_ROLLED
    for (k_i32 w = first + ready + k->lane; w < end; w += K_LANES) {
        out[w - first] = read_word(a, s, find_word(a, s, w), t, w);
    }
    if (s->direct < s->side_words) { /* scales that are not in memory as words */
        const k_i32 from = s->direct > first ? s->direct : first;
        k_syncwarp(k);
        K_ROLLED
        for (k_i32 w = from + k->lane; w < k_min(s->side_words, end); w += K_LANES) {
            out[w - first] = scales_word(a, t, 4 * (w - s->scales));
        }
    }
}

/* The next piece of a token takes a stage; a part of the row is loaded into it. */
static K_INLINE void begin_piece(struct k_thread *k, const struct k_dispatch_args *a,
                                 struct k_mover *m, const struct send_shape *s,
                                 const struct send_list *l, const struct walk *in) {
    k_mover_retire(k, m, newest_stores(a->stages));
    if (in->piece < s->row_pieces) {
        const k_i64 t = listed_token(l, in->item)->token;
        const k_u64 from = (k_u64)(in->piece * a->stage_bytes);
        k_mover_load(k, m, in->stage, (const void *)(k_row(&a->x, t) + from),
                     in->piece == s->row_pieces - 1 ? s->row_end : a->stage_bytes);
    }
}

/* The same piece to every destination of the token, one for each lane. `place` is kept from the
 * token's first piece to its last. */
static K_INLINE void end_piece(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, const struct send_shape *s,
                               const struct send_list *l, const struct walk *out,
                               struct k_pair *place, const struct token_ahead *next) {
    const struct send_token *t = listed_token(l, out->item);
    const k_bool row = out->piece < s->row_pieces, side = out->piece >= s->side_piece;
    const k_i32 row_from = out->piece * a->stage_bytes;
    const k_i32 side_from = (out->piece - s->side_piece) * a->stage_bytes;
    if (out->piece == 0) {
        *place = place_at(a, l, next->rank, next->slot);
    }
    if (side) {
        fill_side(k, a, m, s, t->token, out->piece - s->side_piece, out->stage, next);
        k_mover_filled(k, m);
    }
    if (row) {
        k_mover_wait(k, m, out->stage);
    }
    struct k_pair p = *place;
    k_i32 base = 0;
    K_ROLLED
    do {
        if (row) {
            k_mover_store(k, m, out->stage, k_pair_first(&p, (k_u64)row_from),
                          out->piece == s->row_pieces - 1 ? s->row_end : a->stage_bytes);
        }
        if (side) {
            k_mover_store_filled(k, m, out->stage, s->side_at,
                                 k_pair_second(&p, (k_u64)side_from),
                                 k_min(s->side_bytes - side_from, a->stage_bytes));
        }
        base += K_LANES;
        if (base < t->dests) { /* more than lanes */
            struct token_ahead far;
            read_dest(k, a, t, base + k->lane, &far);
            p = place_at(a, l, far.rank, far.slot);
        }
    } while (base < t->dests);
    k_mover_commit(k, m);
}

/* A part has ended: which rows it announces. */
static K_INLINE void end_part(struct k_thread *k, const struct k_dispatch_args *a,
                              const struct send_list *l, k_i32 part) {
    if (part % 2 == 0) {
        k_syncwarp(k);
        for (k_i32 d = k->lane; d < a->g.num_ranks; d += K_LANES) {
            l->s->announced[d] = l->s->stored[d];
        }
        k_syncwarp(k);
    }
}

/*
 * Whether a part has rows for the lane's i-th rank after this one, and serves it; then where it is
 * announced, and the word: that all rows before its end have arrived, counted from the source's first.
 */
static K_INLINE k_bool announcement(struct k_thread *k, const struct k_dispatch_args *a,
                                    const struct send_list *l, k_i32 part, k_i32 i,
                                    struct k_peer *to, k_u64 *word) {
    const struct k_group *g = &a->g;
    const k_i32 c = part / 2, next = g->rank + 1 + i,
                d = next < g->num_ranks ? next : next - g->num_ranks;
    if (i >= g->num_ranks || !serves(a, l->whom, d)) {
        return 0;
    }
    const k_u32 *chan = a->h.send_chan + (k_i64)d * (g->num_channels + 1) + c;
    const k_u32 before = chan[0], rows = part % 2 ? chan[1] : l->s->announced[d];
    *to = k_peer_at(g, d, channel_word(g, g->map.progress, g->rank, c));
    *word = K_WORD(k->epoch, rows);
    return rows > before;
}

/* The part that has ended is published: its stores are complete then. What that needs is read while
 * they are on their way. */
static K_INLINE void publish_pending(struct k_thread *k, const struct k_dispatch_args *a,
                                     struct k_mover *m, const struct send_list *l,
                                     struct pending *p) {
    struct k_peer to = {0};
    k_u64 word = 0;
    k_bool has = announcement(k, a, l, p->unit, k->lane, &to, &word);
    k_mover_settle(k, m, p->newer);
    K_ROLLED for (k_i32 i = k->lane;;) {
        if (has) {
            k_publish(to, word);
        }
        i += K_LANES;
        if (i >= a->g.num_ranks) {
            break;
        }
        has = announcement(k, a, l, p->unit, i, &to, &word);
    }
    p->unit = -1;
}

/* Pieces that were begun will not be sent; what is loaded of them may still be on its way. */
static K_INLINE void drop_pieces(struct k_thread *k, const struct k_dispatch_args *a,
                                 struct k_mover *m, const struct send_shape *s,
                                 struct walk *out, k_i32 ahead) {
    K_ROLLED for (; ahead > 0; ahead--) {
        if (out->piece < s->row_pieces) {
            k_mover_wait(k, m, out->stage);
        }
        walk_on(out, s->pieces, a->stages);
    }
}

/*
 * All channels of a warp in one walk: rows and sidecars are read once and stored to all their
 * destinations; each part of a channel is published when its stores are complete. *go is as for
 * may_send.
 */
static K_FN void send_channels(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, k_i32 whom, k_i32 first, k_i32 stride,
                               k_u32 *go) {
    const struct send_shape s = shape_of(a);
    struct send_list l = begin_list(k, a, whom, first, stride, s.row_pieces);
    struct walk in = begin_walk(k, m, 0), out = in; /* over listed tokens */
    struct pending p = {-1, 0};
    struct k_pair place = {0, 0};
    struct token_ahead next = begin_read_ahead(k, a, &s);
    k_i32 ahead = 0;
    k_bool placed = 0;
    for (;;) {
        k_i32 ended = -1;
        list_beyond(k, a, &l, in.item); /* where in.item is l.num, its channel has no more */
        read_ahead(k, a, &s, &l, &out, &next);
        if (in.item < l.num) {
            begin_piece(k, a, m, &s, &l, &in);
            walk_on(&in, s.pieces, a->stages);
            ahead++;
        }
        if (ahead < most_ahead(a->stages) && in.item < l.num) {
            continue;
        }
        if (!placed) {
            if (!may_send(k, go)) {
                drop_pieces(k, a, m, &s, &out, ahead);
                return;
            }
            note_places(k, a, &l);
            placed = 1;
        }
        if (out.item < l.num) {
            end_piece(k, a, m, &s, &l, &out, &place, &next);
            const k_i32 part = listed_token(&l, out.item)->part;
            walk_on(&out, s.pieces, a->stages);
            if (out.piece == 0 &&
                (out.item == l.num || listed_token(&l, out.item)->part != part)) {
                ended = part;
            }
            p.newer++;
            ahead--;
        }
        if (pending_is_due(&p, ended >= 0 || out.item == l.num)) {
            publish_pending(k, a, m, &l, &p);
        }
        if (ended >= 0) {
            end_part(k, a, &l, ended);
            p.unit = ended;
            p.newer = 0;
        }
        if (in.item == l.num && ahead <= K_FEW_AHEAD) {
            if (l.channel < a->channels.num) {
                next_channel(k, a, &l);
            } else if (out.item == l.num && p.unit < 0) {
                return;
            }
        }
    }
}

/* One warp: what this operation sends, for ep_group_stats. */
static K_FN void count_sent_rows(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    for (k_i32 d = k->lane; d < g->num_ranks; d += K_LANES) {
        const k_u32 rows = a->h.send_count[d];
        k_add(d == g->rank ? &g->ctl->local_bytes : &g->ctl->remote_bytes,
              (k_u64)rows * (k_u64)a->row_bytes);
        k_add(&g->ctl->rows_sent, rows);
    }
}

#endif
