/* SPDX-License-Identifier: MIT */
/*
 * The summing half of combine: which rows a warp sums next, what their terms are, and the walk that
 * gathers and adds them. A row is a token's, or an answer that this rank owes and that is weighted
 * or expanded. Function bodies for combine.k.c; all warps run them. A warp waits for peers only
 * when it owes no answer.
 */
#ifndef KERNEL_COMBINE_SUM_H
#define KERNEL_COMBINE_SUM_H

#include "kernel/far_combine.h"

_Static_assert(sizeof(struct k_term) == K_TERM_BYTES, "a warp's scratch is terms");

/* A slice of a row to be summed: of an answer that this rank owes, or of a token's row. */
struct sum {
    struct k_peer to;
    k_i32 item;           /* the received row that is answered, or the token */
    k_i32 owner, channel; /* of an answer; the owner of a token's sum is K_NOBODY */
    k_i32 num;            /* terms */
    k_i32 bytes, part;    /* of the row; of each term, that a stage takes */
    k_i32 ends;           /* with it a part of so many answers has ended; 0: none */
    k_u8 last;            /* slice of its row */
};

#define K_NOBODY (-1)

/* Where a warp's rows come from. */
struct sum_feed {
    k_u8 answers, tokens; /* there may be more to take from the rank's counters */
    k_u8 eager;           /* tokens that can be summed come before answers */
    k_u8 early;           /* `go` is not here: no more than answers are begun */
    k_u32 row, end;       /* the answers taken that are not begun */
    k_i32 rows;           /* that were taken at once */
    k_i32 owner, channel;
    k_i32 token;        /* taken, not begun; or K_NOBODY */
    k_i32 from;         /* the byte of its row at which the slice begins */
    k_i32 answers_from; /* the same of the answers' rows */
};

/* What a warp notes in its scratch, as registers are for the sums. Written by lane 0. */
struct sum_notes {
    struct sum sum[2]; /* the one begun last, and the one before */
    struct sum_feed feed;
};

_Static_assert(sizeof(struct sum_notes) <= K_NOTE_BYTES, "a warp's notes fit their place");

static K_INLINE struct sum_notes *warp_sum_notes(struct k_thread *k) {
    return (struct sum_notes *)warp_scratch(k);
}

/* One of two sets; where terms do not fit a stage there is one, which takes all of the scratch. */
static K_INLINE struct k_term *warp_terms(struct k_thread *k, k_i32 set) {
    return (struct k_term *)((k_u8 *)warp_scratch(k) + K_NOTE_BYTES) + set * K_SUM_TERMS;
}

/* Into how many slices rows are cut, each for a warp: of equal bytes, but for the last. */
struct cut {
    k_i32 num, bytes;
};

/*
 * Tokens' rows are cut only of the last tokens, as many as there are warps, so that what is left to
 * do when the last answers arrive is little for each warp; finer where there are more warps than
 * tokens. Answers are cut where there are more warps than answers: a warp needs long for one.
 */
struct slices {
    k_i32 whole; /* tokens that are not cut */
    struct cut token, answer;
};

#define K_MOST_SLICES 8
#define K_LAST_SLICES 4
#define K_LEAST_SLICE_BYTES 4096
#if defined(K_LATE_MOVERS) /* check builds cut wherever they can */
#define K_ANSWERS_EACH 1000000
#define K_LEAST_ANSWER_BYTES 48
#define K_SLICE_UNIT 16
#else
#define K_ANSWERS_EACH 2
#define K_LEAST_ANSWER_BYTES 1024
#define K_SLICE_UNIT 512
#endif

static K_INLINE struct cut cut_row(const struct k_combine_args *a, k_i32 num) {
    const k_i32 units = (a->row_bytes + K_SLICE_UNIT - 1) / K_SLICE_UNIT;
    struct cut c = {1, a->row_bytes};
    if (num > 1) {
        c.bytes = (units + num - 1) / num * K_SLICE_UNIT;
        c.num = (a->row_bytes + c.bytes - 1) / c.bytes;
    }
    return c;
}

static K_INLINE struct slices slices_of(const struct k_combine_args *a, k_i32 warps) {
    const k_i32 last = k_min(a->row_bytes / K_LEAST_SLICE_BYTES, K_LAST_SLICES);
    const k_i32 few = k_min(a->tokens > 0 ? warps / a->tokens : 1, K_MOST_SLICES);
    const k_i32 answers =
        k_max(reads_own_in_place(a) ? 1 : (k_i32)a->h.recv_base[a->g.num_ranks], 1);
    const k_i32 each = k_max(K_ANSWERS_EACH * warps / answers, k_min(3 * warps / answers, 2));
    struct slices s;
    s.whole = k_max(a->tokens - warps, 0);
    s.token = cut_row(a, k_max(few, last));
    s.answer = cut_row(a, k_min(each, a->row_bytes / K_LEAST_ANSWER_BYTES));
    return s;
}

/* The bytes of the slice that begins at byte `from`. */
static K_INLINE k_i32 slice_bytes(const struct k_combine_args *a, const struct cut *c,
                                  k_i32 from) {
    return k_min(c->bytes, a->row_bytes - from);
}

/* Whether every sum's terms fit a stage, so that rows follow each other through the ring. */
static K_INLINE k_bool is_staged(const struct k_combine_args *a) {
    k_i32 most = a->g.max_dests + (a->bias0.data != 0) + (a->bias1.data != 0);
    if ((a->flags & K_DO_EXPAND) && a->topk > most) {
        most = a->topk;
    }
    return most <= K_SUM_TERMS && 16 * most <= a->stage_bytes;
}

/* How many bytes of each of `num` terms go into a stage: where many, a multiple of what the lanes
 * read at once. */
static K_INLINE k_i32 part_bytes(const struct k_combine_args *a, k_i32 num, k_i32 bytes) {
    if (K_IN_PLACE || !is_staged(a)) {
        return bytes;
    }
    const k_i32 each = a->stage_bytes / (num > 1 ? num : 1);
    return k_min(each < 512 ? each & ~15 : each & ~511, bytes);
}

/* Rows of the experts' output, from byte `begin` on, that make up this rank's answer for received
 * row `row`. */
static K_INLINE k_i32 answer_terms(struct k_thread *k, const struct k_combine_args *a,
                                   k_u32 row, k_i32 begin, struct k_term *terms) {
    const k_bool wide = (a->flags & K_DO_EXPAND) != 0;
    k_i32 num = 0;
    for (k_i32 base = 0; base < (wide ? a->topk : 1); base += K_LANES) {
        const k_i32 j = base + k->lane;
        k_i32 from = -1;
        if (wide && j < a->topk) {
            from = a->h.expand_row[(k_i64)row * a->topk + j];
        } else if (!wide && j == 0) {
            from = (k_i32)row;
        }
        from = from < a->x_rows ? from : -1; /* as before `go` all of it may be of a fault */
        const k_u32 all = k_ballot(k, from >= 0);
        const k_i32 at = num + k_count(all & k_below(k));
        if (from >= 0) {
            terms[at].row = (const void *)(x_row(a, (k_u32)from) + (k_u64)begin);
            terms[at].weight =
                a->weights.data ? *(const k_f32 *)k_row(&a->weights, from) : 1.0f;
        }
        num += k_count(all);
    }
    return num;
}

static K_INLINE void begin_answer(struct k_thread *k, const struct k_combine_args *a,
                                  const struct cut *cut, k_bool early, struct sum_feed *f,
                                  struct sum *s, struct k_term *terms) {
    const k_i32 from = f->answers_from;
    s->owner = f->owner;
    s->channel = f->channel;
    s->item = (k_i32)f->row;
    if (!early) { /* before `go` nobody has said where answers go: place_begun */
        s->to = k_peer_plus(answer_place(a, f->owner, f->row), (k_u64)from);
    }
    s->bytes = slice_bytes(a, cut, from);
    s->num = answer_terms(k, a, f->row, from, terms);
    f->row++;
    s->ends = f->row == f->end ? f->rows : 0;
    s->last = from + s->bytes == a->row_bytes;
}

static K_INLINE k_i32 add_bias(struct k_thread *k, const struct k_array *bias, k_i32 t,
                               k_i32 from, struct k_term *terms, k_i32 num) {
    if (!bias->data) {
        return num;
    }
    if (k->lane == 0) {
        terms[num].row = (const k_u8 *)k_row(bias, t) + from;
        terms[num].weight = 1.0f;
    }
    return num + 1;
}

/*
 * Token f->token has been answered by every rank it was sent to; `wait`: until it has. Then its
 * terms are noted. Where they lie is looked up before that is known, and what may be past its
 * destinations read with their number: each read that waits for another one costs as much as the
 * sum of a piece.
 */
static K_FN k_bool has_answers(struct k_thread *k, const struct k_combine_args *a,
                               const struct sum_feed *f, k_bool wait, struct sum *s,
                               struct k_term *terms) {
    const struct k_group *g = &a->g;
    const k_i32 t = f->token, dests = a->h.num_dests[t], c = channel_of(&a->channels, t);
    k_i32 num = add_bias(k, &a->bias0, t, f->from, terms, 0);
    num = add_bias(k, &a->bias1, t, f->from, terms, num);
    for (k_i32 base = 0; base == 0 || base < dests; base += K_LANES) {
        const k_i32 i = base + k->lane;
        const k_i64 at = (k_i64)t * g->max_dests + i;
        const k_i32 rank = i < g->max_dests ? a->h.dest_rank[at] : 0;
        const k_u32 slot = i < g->max_dests ? a->h.dest_slot[at] : 0;
        const k_i32 d = i < dests ? rank : -1;
        const k_u64 *word = 0;
        if (d >= 0) {
            const void *row =
                d == g->rank && reads_own_in_place(a)
                    ? (const void *)x_row(a, a->h.recv_base[d] + slot)
                    : (const void *)k_own(g, landing(a, (k_u64)a->h.send_base[d] + slot));
            terms[num + i].row = (const k_u8 *)row + f->from;
            terms[num + i].weight = 1.0f;
            word = (const k_u64 *)k_own(g, channel_word(g, g->map.returned, d, c));
        }
        if (!(wait ? k_await_rows(k, word, k->epoch, slot + 1, d, K_PHASE_ANSWERS)
                   : k_arrived(k, word, k->epoch, slot + 1))) {
            k_syncwarp(k); /* what was noted may be written over, by other lanes */
            return 0;
        }
    }
    s->num = num + dests;
    return 1;
}

/* The same where there are nodes: their answers are terms. */
static K_FN k_bool has_node_answers(struct k_thread *k, const struct k_combine_args *a,
                                    const struct slices *cut, const struct sum_feed *f,
                                    k_bool wait, struct sum *s, struct k_term *terms) {
    const k_i32 t = f->token;
    const k_i32 bytes = t < cut->whole ? a->row_bytes : slice_bytes(a, &cut->token, f->from);
    if (!have_answered(k, a, t, wait)) {
        return 0;
    }
    const k_i32 num = add_bias(k, &a->bias0, t, f->from, terms, 0);
    s->num = node_terms(k, a, t, f->from, bytes, terms,
                        add_bias(k, &a->bias1, t, f->from, terms, num));
    return 1;
}

static K_INLINE k_bool is_answerable(struct k_thread *k, const struct k_combine_args *a,
                                     const struct slices *cut, const struct sum_feed *f,
                                     k_bool wait, struct sum *s, struct k_term *terms) {
    return K_HAS_FAR(a) ? has_node_answers(k, a, cut, f, wait, s, terms)
                        : has_answers(k, a, f, wait, s, terms);
}

static K_INLINE void begin_token(const struct k_combine_args *a, const struct slices *cut,
                                 struct sum_feed *f, struct sum *s) {
    const k_i32 t = f->token, from = f->from;
    s->owner = K_NOBODY;
    s->channel = 0;
    s->item = t;
    s->to = k_peer_own(k_row(&a->out, t) + (k_u64)from);
    s->bytes = t < cut->whole ? a->row_bytes : slice_bytes(a, &cut->token, from);
    s->last = from + s->bytes == a->row_bytes;
    f->token = K_NOBODY;
}

/*
 * Into how many parts the answers of a channel are cut, each for a warp: a sum is long, and whoever
 * takes a whole channel ends long after the others. Finer parts would cost more takes than they save.
 */
#define K_MOST_ANSWER_PARTS 4

/* The answers of a part that has any, and of which slice; false: all were taken. */
static K_INLINE k_bool take_answers(struct k_thread *k, const struct k_combine_args *a,
                                    const struct cut *cut, struct sum_feed *f) {
    const struct k_group *g = &a->g;
    while (f->answers && f->row == f->end) {
        const k_i32 taken = (k_i32)k_take_next(k, &g->ctl->taken[K_TAKEN_ANSWERS]);
        const k_i32 number = taken / cut->num;
        const k_i32 parts = k_min(a->channels.size[0], K_MOST_ANSWER_PARTS);
        const k_i32 i = number / parts;
        const k_u32 part = (k_u32)(number % parts);
        if (i >= g->num_ranks * (k_i32)a->h.recv_channels[g->num_ranks]) {
            f->answers = 0;
            break;
        }
        k_u32 first, end;
        f->owner = (g->rank + 1 + i % g->num_ranks) % g->num_ranks;
        f->channel = i / g->num_ranks;
        channel_rows(g, &a->h, f->owner, f->channel, &first, &end);
        if (end < first || end > g->max_recv_rows) {
            end = first; /* tables of a fault, read before `go`: it does not take place */
        }
        f->row = first + (end - first) * part / (k_u32)parts;
        f->end = first + (end - first) * (part + 1) / (k_u32)parts;
        f->rows = (k_i32)(f->end - f->row);
        f->answers_from = taken % cut->num * cut->bytes;
    }
    return f->row < f->end;
}

static K_INLINE k_bool take_token(struct k_thread *k, const struct k_combine_args *a,
                                  const struct slices *cut, struct sum_feed *f) {
    if (f->tokens && f->token == K_NOBODY) {
        const k_i32 i = (k_i32)k_take_next(k, &a->g.ctl->taken[K_TAKEN_TOKENS]),
                    cuts = i - cut->whole;
        const k_i32 t = cuts < 0 ? i : cut->whole + cuts / cut->token.num;
        f->tokens = t < a->tokens;
        f->token = f->tokens ? t : K_NOBODY;
        f->from = cuts < 0 ? 0 : cuts % cut->token.num * cut->token.bytes;
    }
    return f->token != K_NOBODY;
}

/* May wait only when the warp owes nothing: answers are made before that, and all that it began
 * are sent. */
static K_FN k_i32 choose_sum(struct k_thread *k, const struct k_combine_args *a,
                             const struct slices *cut, k_bool wait, struct sum_feed *f,
                             struct sum *s, struct k_term *terms) {
    const k_bool early = f->early;
    f->early = 0;
    const k_bool first = f->eager && !early && f->row == f->end && take_token(k, a, cut, f) &&
                         is_answerable(k, a, cut, f, 0, s, terms);
    if (!first && take_answers(k, a, &cut->answer, f)) {
        begin_answer(k, a, &cut->answer, early, f, s, terms);
        return K_NEXT_READY;
    }
    if (early) {
        return K_NEXT_LATER;
    }
    if (!first && !take_token(k, a, cut, f)) {
        return K_NEXT_NONE;
    }
    if (!first && !is_answerable(k, a, cut, f, wait, s, terms)) {
        return wait ? K_NEXT_FAILED : K_NEXT_LATER;
    }
    begin_token(a, cut, f, s);
    return K_NEXT_READY;
}

/* The next row to sum, noted as number `set`, and its terms. */
static K_FN k_i32 next_sum(struct k_thread *k, const struct k_combine_args *a,
                           const struct slices *cut, k_bool wait, k_i32 set) {
    struct sum_notes *n = warp_sum_notes(k);
    k_syncwarp(k); /* no lane needs what was noted of the row before the last */
    struct sum_feed f = n->feed;
    struct sum s = {0};
    const k_i32 next = choose_sum(k, a, cut, wait, &f, &s, warp_terms(k, set));
    s.part = part_bytes(a, s.num, s.bytes);
    k_syncwarp(k);
    if (k->lane == 0) {
        n->feed = f;
        if (next == K_NEXT_READY) {
            n->sum[set] = s;
        }
    }
    k_syncwarp(k);
    return next;
}

static K_FN void sum_weights(struct k_thread *k, const struct k_combine_args *a, k_i32 t) {
    const struct k_group *g = &a->g;
    for (k_i32 j = k->lane; j < a->topk; j += K_LANES) {
        k_f32 sum = 0.0f;
        if (K_HAS_FAR(a)) {
            *(k_f32 *)k_at(&a->out_weights, t, j) = node_weights(a, t, j);
            continue;
        }
        for (k_i32 i = 0; i < a->h.num_dests[t]; i++) {
            const k_i64 at = (k_i64)t * g->max_dests + i;
            const k_u64 row = (k_u64)a->h.send_base[a->h.dest_rank[at]] + a->h.dest_slot[at];
            const k_f32 *w =
                (const k_f32 *)k_own(g, g->map.land_side + row * 4ull * (k_u64)a->topk);
            sum = sum + w[j];
        }
        *(k_f32 *)k_at(&a->out_weights, t, j) = sum;
    }
}

/* A slice of so many more answers of a channel is made, of `slices`: who makes the last announces
 * them all. */
static K_INLINE void count_answers(struct k_thread *k, const struct k_combine_args *a,
                                   k_i32 owner, k_i32 c, k_i32 rows, k_i32 slices) {
    k_u64 *answered = a->h.answered + (k_i64)owner * a->g.num_channels + c;
    k_u32 first, end;
    channel_rows(&a->g, &a->h, owner, c, &first, &end);
    const k_u64 all = (k_u64)(end - first) * (k_u64)slices;
    struct k_peer to;
    const k_u64 word = answers_word(k, a, owner, c, end, &to);
    k_syncwarp(k);
    if (k->lane == 0 && k_fetch_add(answered, (k_u64)rows) + (k_u64)rows == all) {
        k_store(answered, 0);
        publish_answers(k, to, word);
    }
}

/* A slice is summed; an answer's weights go with its last. */
static K_INLINE void end_sum(struct k_thread *k, const struct k_combine_args *a,
                             const struct slices *cut, const struct sum *s) {
    if (s->owner == K_NOBODY) {
        if (s->last && a->out_weights.data) {
            sum_weights(k, a, s->item);
        }
        return;
    }
    if (s->last && (a->flags & K_DO_WEIGHTS)) {
        send_weights(k, a, s->owner, (k_u32)s->item, (k_u32)s->item + 1);
    }
    if (s->ends) {
        count_answers(k, a, s->owner, s->channel, s->ends, cut->answer.num);
    }
}

/* The part of row `set` that begins at byte `from`, from its stage. Returns its bytes. */
static K_INLINE k_i32 sum_part(struct k_thread *k, const struct k_combine_args *a,
                               struct k_mover *m, k_i32 set, k_i32 from, k_i32 stage) {
    const struct sum *s = &warp_sum_notes(k)->sum[set];
    const struct k_term *terms = warp_terms(k, set);
    const k_bool weighted = s->owner != K_NOBODY && a->weights.data != 0;
    const k_i32 bytes = k_min(s->part, s->bytes - from), num = s->num;
    const struct k_peer to = k_peer_plus(s->to, (k_u64)from);
    if (is_staged(a)) {
        k_mover_wait(k, m, stage);
        k_mover_sum(k, m, stage, to, a->dtype, weighted, bytes, terms, num);
    } else {
        k_syncwarp(k);
        k_reduce(k, to, a->dtype, weighted, bytes, terms, num);
        k_syncwarp(k);
    }
    return bytes;
}

/* The part of row `set` that begins at byte `from`, into a stage. Returns its bytes. */
static K_INLINE k_i32 gather_part(struct k_thread *k, const struct k_combine_args *a,
                                  struct k_mover *m, k_i32 set, k_i32 from, k_i32 stage) {
    const struct sum *s = &warp_sum_notes(k)->sum[set];
    const k_i32 bytes = k_min(s->part, s->bytes - from);
    if (is_staged(a)) {
        k_mover_gather(k, m, stage, warp_terms(k, set), s->num, from, bytes);
    }
    return bytes;
}

/* The answer that was begun before `go` gets its place. */
static K_INLINE void place_begun(struct k_thread *k, const struct k_combine_args *a) {
    struct sum_notes *n = warp_sum_notes(k);
    struct sum *s = &n->sum[0];
    if (k->lane == 0) {
        s->to =
            k_peer_plus(answer_place(a, s->owner, (k_u32)s->item), (k_u64)n->feed.answers_from);
    }
    k_syncwarp(k);
}

/* Parts that were gathered will not be summed: none may be on its way when the warp leaves. */
static K_INLINE void drop_parts(struct k_thread *k, const struct k_combine_args *a,
                                struct k_mover *m, k_i32 stage, k_i32 ahead) {
    for (; is_staged(a) && ahead > 0; ahead--) {
        k_mover_wait(k, m, stage);
        stage = next_stage(stage, a->stages);
    }
}

/*
 * Sums rows until there are none. Parts are gathered as far ahead as there are stages, also of the
 * row after the one that is being summed. Rows whose terms may not fit a stage are summed by plain
 * loads, one after the other. *go is as for may_send: the first answers are gathered before that.
 */
static K_FN k_bool sum_rows(struct k_thread *k, const struct k_combine_args *a,
                            struct k_mover *m, k_i32 warps, k_u32 *go) {
    const struct slices cut = slices_of(a, warps);
    const k_bool staged = is_staged(a);
    k_i32 in = 1, gathered = 0, in_bytes = 0; /* of row `in` */
    k_i32 out = 1, summed = 0, out_bytes = 0; /* of row `out`: `in`, or the one before */
    k_i32 next = K_NEXT_READY, ahead = 0, load = 0, read = 0;
    k_bool placed = 0;
    k_mover_retire(k, m, 0);
    while (next != K_NEXT_NONE || ahead > 0) {
        const k_bool wants = gathered == in_bytes && next != K_NEXT_NONE &&
                             (ahead == 0 || (in == out && staged));
        if (gathered < in_bytes && ahead < a->stages) {
            gathered += gather_part(k, a, m, in, gathered, load);
            load = next_stage(load, a->stages);
            ahead++;
            continue;
        }
        if (!placed && !warp_sum_notes(k)->feed.early) {
            if (!may_send(k, go)) {
                drop_parts(k, a, m, read, ahead);
                return 0;
            }
            if (ahead > 0) {
                place_begun(k, a);
            }
            placed = 1;
        }
        if (wants) {
            const k_i32 set = staged ? 1 - in : 0;
            next = next_sum(k, a, &cut, ahead == 0, set);
            if (next == K_NEXT_FAILED) {
                return 0;
            }
            if (next == K_NEXT_READY) {
                in = set;
                in_bytes = warp_sum_notes(k)->sum[in].bytes;
                gathered = 0;
                if (ahead == 0) {
                    out = in;
                    out_bytes = in_bytes;
                    summed = 0;
                }
                continue;
            }
        }
        if (ahead > 0) {
            summed += sum_part(k, a, m, out, summed, read);
            read = next_stage(read, a->stages);
            ahead--;
            if (summed == out_bytes) {
                end_sum(k, a, &cut, &warp_sum_notes(k)->sum[out]);
                if (in != out) {
                    out = in;
                    out_bytes = in_bytes;
                    summed = 0;
                }
            }
        }
    }
    return 1;
}

#endif
