/* SPDX-License-Identifier: MIT */
/*
 * The sending half of combine: where answers land, which plain ones a warp sends, and the one walk
 * over them. Function bodies for combine.k.c; any warp of a sending block runs them. Nothing here
 * waits for an answer of a peer.
 */
#ifndef KERNEL_COMBINE_SEND_H
#define KERNEL_COMBINE_SEND_H

#include "kernel/far.h"

static K_INLINE k_bool reads_own_in_place(const struct k_combine_args *a) {
    return (a->flags & K_DO_REDUCE) == 0;
}

/* Where row `row` (received from `owner`) lands: its number in the owner's landing region. */
static K_INLINE k_u64 landing_row(const struct k_combine_args *a, k_i32 owner, k_u32 row) {
    return (k_u64)a->h.remote_where[owner] + (row - a->h.recv_base[owner]);
}

static K_INLINE k_u64 landing(const struct k_combine_args *a, k_u64 row) {
    return a->g.map.land + row * (k_u64)a->row_bytes;
}

/* That place. Of an owner in another node: at its relay, which adds up what the node answers. */
static K_INLINE struct k_peer answer_place(const struct k_combine_args *a, k_i32 owner,
                                           k_u32 row) {
    const k_u64 at = landing_row(a, owner, row);
    if (K_HAS_FAR(a) && !is_near(a->far, owner)) {
        const struct k_far *f = a->far;
        const k_u64 first = (k_u64)f->source[owner] * (k_u64)f->map.relay_rows;
        return k_peer_at(&a->g, f->relay[owner],
                         f->map.relay_land + (first + at) * (k_u64)a->row_bytes);
    }
    return k_peer_at(&a->g, owner, landing(a, at));
}

static K_INLINE k_u64 x_row(const struct k_combine_args *a, k_u32 row) {
    return k_row(&a->x, row);
}

static K_INLINE k_i32 num_answers(const struct k_combine_args *a, k_i32 whom) {
    const k_i32 ranks = a->g.num_ranks;
    return (whom == K_TO_PEERS ? ranks - 1 : 1) * (k_i32)a->h.recv_channels[ranks];
}

/* Whose answer `item` is, of which channel (those of a channel are neighbours), and the rows
 * received that it is made from: [*r0, *r1). */
static K_INLINE void find_answer(const struct k_combine_args *a, k_i32 whom, k_i32 item,
                                 k_i32 *owner, k_i32 *c, k_u32 *r0, k_u32 *r1) {
    const k_i32 ranks = a->g.num_ranks;
    const k_i32 owners = whom == K_TO_PEERS ? ranks - 1 : 1;
    const k_i32 d = a->g.rank + (whom == K_TO_PEERS) + item % owners;
    *owner = d < ranks ? d : d - ranks;
    *c = item / owners;
    channel_rows(&a->g, &a->h, *owner, *c, r0, r1);
}

/* The word, and where lane 0 publishes it, that of the rows received from `owner` those of channel c
 * before `end` are answered. It counts from the first row of that owner, so that it is the slot of the
 * last answer there is, plus 1. Looked up before what it is to come after is awaited. */
static K_INLINE k_u64 answers_word(struct k_thread *k, const struct k_combine_args *a,
                                   k_i32 owner, k_i32 c, k_u32 end, struct k_peer *to) {
    const struct k_group *g = &a->g;
    if (K_HAS_FAR(a) && !is_near(a->far, owner)) {
        const struct k_far *f = a->far;
        const k_u64 from =
            (k_u64)f->source[owner] * (k_u64)f->map.most_near + (k_u64)f->local[g->rank];
        *to = k_peer_at(g, f->relay[owner],
                        f->map.relayed + 8 * (from * (k_u64)g->num_channels + (k_u64)c));
    } else {
        *to = k_peer_at(g, owner, channel_word(g, g->map.returned, g->rank, c));
    }
    return K_WORD(k->epoch, end - a->h.recv_base[owner]);
}

static K_INLINE void publish_answers(struct k_thread *k, struct k_peer to, k_u64 word) {
    if (k->lane == 0) {
        k_publish(to, word);
    }
}

/* Top-k weights of the answers, [row][K] float32 beside the landing rows. */
static K_FN void send_weights(struct k_thread *k, const struct k_combine_args *a, k_i32 owner,
                              k_u32 r0, k_u32 r1) {
    const struct k_array *w = &a->topk_weights;
    const k_i32 topk = a->topk, num = (k_i32)(r1 - r0) * topk;
    k_u64 to = a->g.map.land_side + landing_row(a, owner, r0) * 4ull * (k_u64)topk;
    k_i32 whom = owner;
    if (K_HAS_FAR(a) && !is_near(a->far, owner)) {
        const struct k_far_map *m = &a->far->map;
        const k_u64 first = (k_u64)a->far->source[owner] * (k_u64)m->relay_rows;
        whom = a->far->relay[owner];
        to += m->relay_side - a->g.map.land_side + first * 4ull * (k_u64)topk;
    }
    for (k_i32 i = k->lane; i < num; i += K_LANES) {
        const k_i64 row = (k_i64)r0 + i / topk;
        const k_i32 j = i % topk;
        k_f32 v = 0.0f;
        if ((a->flags & K_DO_EXPAND) == 0) {
            v = *(const k_f32 *)k_at(w, row, j);
        } else {
            const k_i32 from = a->h.expand_row[row * topk + j];
            if (from >= 0) {
                v = *(const k_f32 *)k_row(w, from);
            }
        }
        k_store_u32(k_peer_at(&a->g, whom, to + 4ull * (k_u64)i), k_bits(v));
    }
}

/* An answer of plain rows. They land one behind the other; where they also lie so, they are cut
 * into pieces as if they were one row. */
struct answer {
    struct k_peer to; /* its first landing row */
    k_u32 row, rows;
    k_i32 owner, channel;
    k_i32 line_bytes; /* of a row; where all are cut as one, of all */
    k_i32 pad;
};

#define K_LISTED_ANSWERS 16
_Static_assert(K_LISTED_ANSWERS * sizeof(struct answer) <= K_SCRATCH_BYTES(1), "answers");
_Static_assert(K_LISTED_ANSWERS > K_MOVER_STAGES + 4, "what is listed is still in use");

/*
 * The answers that a warp sends, noted in its scratch: number `first`, then the next that no warp
 * of the rank has taken. So warps that the link serves better send more, and all end at about the
 * same time.
 */
struct answer_list {
    struct answer *answers;
    k_i32 next;   /* the number taken last */
    k_i32 stride; /* the numbers below this one went to a warp each without being taken */
    k_i32 items;  /* how many numbers there are */
    k_i32 num;    /* answers listed so far */
};

static K_INLINE const struct answer *listed_answer(const struct answer_list *l, k_i32 i) {
    return &l->answers[(k_u32)i % K_LISTED_ANSWERS];
}

static K_INLINE void list_answer(struct k_thread *k, const struct k_combine_args *a,
                                 struct answer_list *l, k_i32 owner, k_i32 c, k_u32 row,
                                 k_u32 rows) {
    if (k->lane == 0) {
        struct answer *to = &l->answers[(k_u32)l->num % K_LISTED_ANSWERS];
        const k_u64 all = (k_u64)rows * (k_u64)a->row_bytes;
        const k_bool dense = a->x.s0 == a->row_bytes && all < (1u << 30);
        to->owner = owner;
        to->row = row;
        to->rows = rows;
        to->channel = c;
        to->line_bytes = dense ? (k_i32)all : a->row_bytes;
    }
    l->num++;
}

/* The answers listed from number `first` on get their places: the ready messages are here. */
static K_INLINE void place_answers(struct k_thread *k, const struct k_combine_args *a,
                                   struct answer_list *l, k_i32 first) {
    for (k_i32 i = first; k->lane == 0 && i < l->num; i++) {
        struct answer *u = &l->answers[(k_u32)i % K_LISTED_ANSWERS];
        u->to = answer_place(a, u->owner, u->row);
    }
    k_syncwarp(k);
}

/* Lists what was taken, if it has rows, and x has those: before `go` the tables may be those of a
 * dispatch that has faulted. */
static K_INLINE void list_taken(struct k_thread *k, const struct k_combine_args *a,
                                struct answer_list *l) {
    k_i32 owner, c;
    k_u32 r0, r1;
    find_answer(a, K_TO_PEERS, l->next, &owner, &c, &r0, &r1);
    const k_bool halves =
        l->items / K_FEW_ANSWERS < l->stride &&
        (k_u64)(r1 - r0) * (k_u64)a->row_bytes >= K_TWO_PARTS * (k_u64)a->stage_bytes;
    const k_u32 middle = halves ? r0 + (r1 - r0 + 1) / 2 : r1;
    if (r0 >= r1 || r1 > a->x_rows) {
        return; /* too few in x is what block 0 finds, too */
    }
    list_answer(k, a, l, owner, c, r0, middle - r0);
    if (middle != r1) {
        list_answer(k, a, l, owner, c, middle, r1 - middle);
    }
    k_syncwarp(k);
}

static K_INLINE void take_next(struct k_thread *k, const struct k_combine_args *a,
                               struct answer_list *l) {
    const k_i32 before = l->num;
    l->next = take_beyond(k, l->stride, l->items, &a->g.ctl->taken[K_TAKEN_ANSWERS]);
    if (l->next < l->items) {
        list_taken(k, a, l);
        place_answers(k, a, l, before);
    }
}

/* A walk over listed answers: byte `from` of a line. */
struct answer_walk {
    k_i32 item, line, from, stage;
};

static K_INLINE void walk_answer(struct answer_walk *w, const struct k_combine_args *a,
                                 const struct answer *u) {
    w->from += a->stage_bytes;
    if (w->from >= u->line_bytes) {
        w->from = 0;
        w->line++;
        if (w->line == (u->line_bytes == a->row_bytes ? (k_i32)u->rows : 1)) {
            w->line = 0;
            w->item++;
        }
    }
    w->stage = next_stage(w->stage, a->stages);
}

/* The next piece of an answer into a stage. */
static K_INLINE void load_answer(struct k_thread *k, const struct k_combine_args *a,
                                 struct k_mover *m, const struct answer_list *l,
                                 struct answer_walk *in) {
    const struct answer *u = listed_answer(l, in->item);
    const k_u64 from = x_row(a, u->row + (k_u32)in->line) + (k_u64)in->from;
    k_mover_retire(k, m, newest_stores(a->stages));
    k_mover_load(k, m, in->stage, (const void *)from,
                 k_min(u->line_bytes - in->from, a->stage_bytes));
    walk_answer(in, a, u);
}

/* The next piece from its stage to where the answer lands. Returns which answer ended, or -1. */
static K_INLINE k_i32 store_answer(struct k_thread *k, const struct k_combine_args *a,
                                   struct k_mover *m, const struct answer_list *l,
                                   struct answer_walk *out) {
    const k_i32 item = out->item;
    const struct answer *u = listed_answer(l, item);
    const struct k_peer to =
        k_peer_plus(u->to, (k_u64)out->line * (k_u64)a->row_bytes + (k_u64)out->from);
    k_mover_wait(k, m, out->stage);
    k_mover_store(k, m, out->stage, k_peer_for_lane0(k, to),
                  k_min(u->line_bytes - out->from, a->stage_bytes));
    k_mover_commit(k, m);
    walk_answer(out, a, u);
    return out->item != item ? item : -1;
}

/*
 * Plain answers to peers in one walk; each is published when its stores are complete. *go is as for
 * may_send: before that, x is read only as far as it must reach for the operation to take place.
 */
static K_FN void send_plain(struct k_thread *k, const struct k_combine_args *a,
                            struct k_mover *m, k_i32 first, k_i32 stride, k_u32 *go) {
    struct answer_list l = {(struct answer *)warp_scratch(k), first, stride,
                            num_answers(a, K_TO_PEERS), 0};
    struct answer_walk in = {0, 0, 0, 0}, out = in;
    struct pending p = {-1, 0};
    k_i32 ahead = 0;
    k_bool placed = 0;
    k_mover_retire(k, m, 0);
    if (first < l.items && !a->h.counts->need) {
        list_taken(k, a, &l);
    }
    for (;;) {
        k_i32 ended = -1;
        if (in.item < l.num) {
            load_answer(k, a, m, &l, &in);
            ahead++;
        }
        if (ahead < most_ahead(a->stages) && in.item < l.num) {
            continue;
        }
        if (!placed) {
            if (!may_send(k, go)) {
                for (; ahead > 0; ahead--) { /* none may be on its way when the warp leaves */
                    k_mover_wait(k, m, out.stage);
                    out.stage = next_stage(out.stage, a->stages);
                }
                return;
            }
            place_answers(k, a, &l, 0);
            placed = 1;
        }
        if (out.item < l.num) {
            ended = store_answer(k, a, m, &l, &out);
            p.newer++;
            ahead--;
        }
        if (pending_is_due(&p, ended >= 0 || out.item == l.num)) {
            const struct answer *u = listed_answer(&l, p.unit);
            struct k_peer to;
            const k_u64 word = answers_word(k, a, u->owner, u->channel, u->row + u->rows, &to);
            if (a->flags & K_DO_WEIGHTS) {
                send_weights(k, a, u->owner, u->row, u->row + u->rows);
            }
            k_mover_settle(k, m, p.newer);
            publish_answers(k, to, word);
            p.unit = -1;
        }
        if (ended >= 0) {
            p.unit = ended;
            p.newer = 0;
        }
        if (in.item == l.num && ahead <= K_FEW_AHEAD) {
            if (l.next < l.items) {
                take_next(k, a, &l);
            } else if (out.item == l.num && p.unit < 0) {
                return;
            }
        }
    }
}

/* Plain answers of this rank to itself, which lie where they are read: their weights and words. */
static K_FN void send_own(struct k_thread *k, const struct k_combine_args *a, k_i32 first,
                          k_i32 stride) {
    for (k_i32 i = first; i < num_answers(a, K_TO_SELF); i += stride) {
        k_i32 owner, c;
        k_u32 r0, r1;
        struct k_peer to;
        find_answer(a, K_TO_SELF, i, &owner, &c, &r0, &r1);
        const k_u64 word = answers_word(k, a, owner, c, r1, &to);
        if (a->flags & K_DO_WEIGHTS) {
            send_weights(k, a, owner, r0, r1);
        }
        k_syncwarp(k);
        if (r0 != r1) {
            publish_answers(k, to, word);
        }
    }
}

/* One warp: what this operation sends, for ep_group_stats. */
static K_FN void count_sent_answers(struct k_thread *k, const struct k_combine_args *a) {
    const struct k_group *g = &a->g;
    for (k_i32 d = k->lane; d < g->num_ranks; d += K_LANES) {
        k_add(d == g->rank ? &g->ctl->local_bytes : &g->ctl->remote_bytes,
              (k_u64)(a->h.recv_base[d + 1] - a->h.recv_base[d]) * (k_u64)a->row_bytes);
    }
}

#endif
