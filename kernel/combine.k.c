/* SPDX-License-Identifier: MIT */
/*
 * combine: the experts' answers back to the owners of the tokens, summed there.
 *
 *   control  block 0: ready words; each names the landing row for the reader's answers. Then `go`.
 *   send     per (owner, channel of the owner's tokens): the rows received from that owner are
 *            consecutive, and so are their landing rows: copied, or, when they are weighted or
 *            expanded, summed per row first. Then one word per (owner, channel).
 *   reduce   per own channel: await the word of every rank that answers in it, then sum each
 *            token's biases and answers, ranks ascending, in float32, rounded once.
 *
 * A rank's answers to itself do not travel: where they are plain rows they are read in place.
 * One warp can run all of it in this order: sending never waits for the reduction of a peer.
 */
#include "kernel/op.h"

_Static_assert(sizeof(struct k_term) == K_TERM_BYTES, "a warp's scratch is terms");

static K_INLINE k_bool reads_own_in_place(const struct k_combine_args *a) {
    return (a->flags & K_DO_REDUCE) == 0;
}

#define GO 0u
#define SKIP 1u

/* Rows of x that will be read; fewer in x are a fault of this rank, known only now. */
static K_FN k_bool check_rows(struct k_thread *k, const struct k_combine_args *a) {
    const k_i64 rows =
        (a->flags & K_DO_EXPAND) ? (k_i64)a->h.expert_start[a->g.num_local] : a->h.counts->rows;
    if (a->x_rows >= rows || a->h.counts->need) {
        return 1;
    }
    if (k->warp == 0 && k->lane == 0) {
        struct k_blame b = {K_ERR_ARG, K_PHASE_NONE,     a->g.rank,
                            0,         (k_u32)a->x_rows, (k_u32)rows};
        k_raise(k, 0, b);
    }
    return 0;
}

/* Block 0. Ends with `go`, unless the operation has faulted. */
static K_FN k_bool control(struct k_thread *k, const struct k_combine_args *a) {
    const struct k_group *g = &a->g;
    struct op_signature sig;
    sig.word0 = signature(k, a->flags, a->topk, a->handle_id);
    sig.word1 = (k_u32)a->row_bytes;
    sig.word2 = (k_u32)a->dtype;
    for (k_i32 i = k->warp; i < g->num_ranks; i += k->num_warps) {
        k_i32 p = (g->rank + i) % g->num_ranks;
        tell_ready(k, p, &sig, a->h.send_base[p]);
    }
    k_bool ok = check_rows(k, a) && await_all_ready(k, &sig, a->h.remote_slot);
    ok = k_barrier(k, ok);
    if (ok && k->warp == 0 && k->lane == 0) {
        k_publish_local(&g->ctl->go, K_WORD(k->epoch, a->h.counts->need ? SKIP : GO));
    }
    return ok;
}

/* ---- send ----------------------------------------------------------------------------------- */

/* Where row `row` (received from `owner`) lands: its number in the owner's landing region. */
static K_INLINE k_u64 landing_row(const struct k_combine_args *a, k_i32 owner, k_u32 row) {
    return (k_u64)a->h.remote_slot[owner] + (row - a->h.recv_base[owner]);
}

static K_INLINE k_u64 landing(const struct k_combine_args *a, k_u64 row) {
    return a->g.map.land + row * (k_u64)a->row_bytes;
}

static K_INLINE k_u64 x_row(const struct k_combine_args *a, k_u32 row) {
    return a->x.data + (k_u64)((k_i64)row * a->x.s0);
}

static K_FN void send_plain(struct k_thread *k, const struct k_combine_args *a,
                            struct k_mover *m, k_i32 owner, k_u32 r0, k_u32 r1) {
    const k_i32 pieces = (a->row_bytes + a->stage_bytes - 1) / a->stage_bytes, end = (k_i32)r1;
    const k_u64 to = k_peer_at(&a->g, owner, landing(a, landing_row(a, owner, r0))).address;
    struct walk in = begin_walk(k, m, (k_i32)r0), out = in;
    k_i32 ahead = 0;
    while (out.item < end) {
        if (in.item < end) {
            const k_i32 from = in.piece * a->stage_bytes;
            k_mover_retire(k, m, newest_stores(a->stages));
            k_mover_load(k, m, in.stage, (const void *)(x_row(a, (k_u32)in.item) + (k_u64)from),
                         at_most(a->row_bytes - from, a->stage_bytes));
            walk_on(&in, pieces, a->stages);
            ahead++;
        }
        if (ahead == most_ahead(a->stages) || in.item == end) {
            const k_i32 from = out.piece * a->stage_bytes;
            const k_u64 row = (k_u64)((k_u32)out.item - r0) * (k_u64)a->row_bytes;
            k_mover_wait(k, m, out.stage);
            k_mover_store(k, m, out.stage, one_lane(k, to + row + (k_u64)from),
                          at_most(a->row_bytes - from, a->stage_bytes));
            k_mover_commit(k, m);
            walk_on(&out, pieces, a->stages);
            ahead--;
        }
    }
}

static K_INLINE k_f32 weight_of(const struct k_combine_args *a, k_u32 row) {
    return a->weights.data
               ? *(const k_f32 *)(a->weights.data + (k_u64)((k_i64)row * a->weights.s0))
               : 1.0f;
}

/* Rows of the experts' output that make up this rank's answer for received row `row`. */
static K_FN k_i32 answer_terms(struct k_thread *k, const struct k_combine_args *a, k_u32 row,
                               struct k_term *terms) {
    k_i32 num = 0;
    if ((a->flags & K_DO_EXPAND) == 0) {
        if (k->lane == 0) {
            terms[0].row = (const void *)x_row(a, row);
            terms[0].weight = weight_of(a, row);
        }
        return 1;
    }
    for (k_i32 j = 0; j < a->topk; j++) {
        const k_i32 from = a->h.expand_row[(k_i64)row * a->topk + j];
        if (from >= 0) {
            if (k->lane == 0) {
                terms[num].row = (const void *)x_row(a, (k_u32)from);
                terms[num].weight = weight_of(a, (k_u32)from);
            }
            num++;
        }
    }
    return num;
}

static K_FN void send_reduced(struct k_thread *k, const struct k_combine_args *a, k_i32 owner,
                              k_u32 r0, k_u32 r1) {
    struct k_term *terms = (struct k_term *)warp_scratch(k);
    for (k_u32 row = r0; row < r1; row++) {
        const k_i32 num = answer_terms(k, a, row, terms);
        k_syncwarp(k);
        k_reduce(k, k_peer_at(&a->g, owner, landing(a, landing_row(a, owner, row))), a->dtype,
                 a->weights.data != 0, a->row_bytes, terms, num);
        k_syncwarp(k);
    }
}

/* Top-k weights of the answers, [row][K] float32 beside the landing rows. */
static K_FN void send_weights(struct k_thread *k, const struct k_combine_args *a, k_i32 owner,
                              k_u32 r0, k_u32 r1) {
    const struct k_array *w = &a->topk_weights;
    for (k_u32 row = r0; row < r1; row++) {
        const k_u64 to =
            a->g.map.land_side + landing_row(a, owner, row) * 4ull * (k_u64)a->topk;
        for (k_i32 j = k->lane; j < a->topk; j += K_LANES) {
            k_f32 v = 0.0f;
            if ((a->flags & K_DO_EXPAND) == 0) {
                v = *(const k_f32 *)(w->data + (k_u64)((k_i64)row * w->s0 + (k_i64)j * w->s1));
            } else {
                const k_i32 from = a->h.expand_row[(k_i64)row * a->topk + j];
                if (from >= 0) {
                    v = *(const k_f32 *)(w->data + (k_u64)((k_i64)from * w->s0));
                }
            }
            k_store_u32(k_peer_at(&a->g, owner, to + 4ull * (k_u64)j), k_bits(v));
        }
    }
}

static K_FN void send_channel(struct k_thread *k, const struct k_combine_args *a,
                              struct k_mover *m, k_i32 owner, k_i32 c) {
    const struct k_group *g = &a->g;
    const k_u32 *chan = a->h.recv_chan + (k_i64)owner * (g->num_channels + 1) + c;
    const k_u32 r0 = a->h.recv_base[owner] + chan[0], r1 = a->h.recv_base[owner] + chan[1];
    if (r0 == r1) {
        return;
    }
    if (a->flags & K_DO_REDUCE) {
        send_reduced(k, a, owner, r0, r1);
    } else if (owner != g->rank) {
        send_plain(k, a, m, owner, r0, r1);
    }
    if (a->flags & K_DO_WEIGHTS) {
        send_weights(k, a, owner, r0, r1);
    }
    k_mover_drain(k, m);
    k_syncwarp(k);
    if (k->lane == 0) {
        k_publish(k_peer_at(g, owner, channel_word(g, g->map.returned, g->rank, c)),
                  K_WORD(k->epoch, r1 - r0));
        k_add(owner == g->rank ? &g->ctl->local_bytes : &g->ctl->remote_bytes,
              (k_u64)(r1 - r0) * (k_u64)a->row_bytes);
    }
}

/* ---- reduce --------------------------------------------------------------------------------- */

static K_INLINE k_i32 add_bias(struct k_thread *k, const struct k_array *bias, k_i32 t,
                               struct k_term *terms, k_i32 num) {
    if (!bias->data) {
        return num;
    }
    if (k->lane == 0) {
        terms[num].row = (const void *)(bias->data + (k_u64)((k_i64)t * bias->s0));
        terms[num].weight = 1.0f;
    }
    return num + 1;
}

/* out[t]: one sum over the token's biases and answers. */
static K_FN void reduce_token(struct k_thread *k, const struct k_combine_args *a, k_i32 t) {
    struct k_term *terms = (struct k_term *)warp_scratch(k);
    const struct k_group *g = &a->g;
    k_i32 num = add_bias(k, &a->bias0, t, terms, 0);
    num = add_bias(k, &a->bias1, t, terms, num);
    const k_i32 dests = a->h.num_dests[t];
    for (k_i32 i = 0; i < dests; i++) {
        const k_i64 at = (k_i64)t * g->max_dests + i;
        const k_i32 d = a->h.dest_rank[at];
        const k_u32 slot = a->h.dest_slot[at];
        if (k->lane == 0) {
            terms[num].row =
                d == g->rank && reads_own_in_place(a)
                    ? (const void *)x_row(a, a->h.recv_base[d] + slot)
                    : (const void *)k_own(g, landing(a, (k_u64)a->h.send_base[d] + slot));
            terms[num].weight = 1.0f;
        }
        num++;
    }
    k_syncwarp(k);
    k_reduce(k, own_memory(a->out.data + (k_u64)((k_i64)t * a->out.s0)), a->dtype, 0,
             a->row_bytes, terms, num);
    k_syncwarp(k);
}

static K_FN void sum_weights(struct k_thread *k, const struct k_combine_args *a, k_i32 t) {
    const struct k_group *g = &a->g;
    for (k_i32 j = k->lane; j < a->topk; j += K_LANES) {
        k_f32 sum = 0.0f;
        for (k_i32 i = 0; i < a->h.num_dests[t]; i++) {
            const k_i64 at = (k_i64)t * g->max_dests + i;
            const k_u64 row = (k_u64)a->h.send_base[a->h.dest_rank[at]] + a->h.dest_slot[at];
            const k_f32 *w =
                (const k_f32 *)k_own(g, g->map.land_side + row * 4ull * (k_u64)a->topk);
            sum = sum + w[j];
        }
        *(k_f32 *)(a->out_weights.data +
                   (k_u64)((k_i64)t * a->out_weights.s0 + (k_i64)j * a->out_weights.s1)) = sum;
    }
}

/* Every rank that answers in channel c has answered. */
static K_FN k_bool await_answers(struct k_thread *k, const struct k_combine_args *a, k_i32 c) {
    const struct k_group *g = &a->g;
    for (k_i32 base = 0; base < g->num_ranks; base += K_LANES) {
        const k_i32 d = base + k->lane;
        const k_u64 *word = 0;
        k_u32 rows = 0;
        if (d < g->num_ranks) {
            const k_u32 *chan = a->h.send_chan + (k_i64)d * (g->num_channels + 1) + c;
            if (chan[0] != chan[1]) {
                word = (const k_u64 *)k_own(g, channel_word(g, g->map.returned, d, c));
            }
        }
        if (!k_await(k, word, k->epoch, d, K_PHASE_ANSWERS, &rows)) {
            return 0;
        }
    }
    return 1;
}

/* Warps take tokens in turn, not channels: all of them work on what has just arrived, and little
 * is left to do when the last answer has. */
static K_FN k_bool reduce(struct k_thread *k, const struct k_combine_args *a, k_i32 warp,
                          k_i32 warps) {
    const struct k_group *g = &a->g;
    const k_i32 per = (a->tokens + g->num_channels - 1) / g->num_channels; /* of a channel */
    k_i32 arrived = -1;
    for (k_i32 t = warp; t < a->tokens; t += warps) {
        const k_i32 c = t / per;
        if (c != arrived && !await_answers(k, a, c)) {
            return 0;
        }
        arrived = c;
        reduce_token(k, a, t);
        if (a->out_weights.data) {
            sum_weights(k, a, t);
        }
    }
    return 1;
}

/* ---- entry ---------------------------------------------------------------------------------- */

static K_FN k_bool run(struct k_thread *k, const struct k_combine_args *a) {
    const struct k_group *g = &a->g;
    const k_bool both = k->num_blocks > 1;
    const k_i32 senders = both ? (k_i32)a->send_blocks : k->num_blocks;
    const k_i32 first_reduce = both ? senders : 0;
    k_u32 go = 0;
    if (k->block == 0 && !control(k, a)) {
        return 0;
    }
    if (!k_await(k, &g->ctl->go, k->epoch, g->rank, K_PHASE_SELF, &go)) {
        return 0;
    }
    if (go == SKIP) {
        k_ends(k, K_END_SKIP);
        return 1;
    }
    struct k_mover m;
    k_mover_begin(k, &m, warp_ring(k, a->stages, a->stage_bytes), a->stages, a->stage_bytes);
    if (k->block < senders) {
        const k_i64 items = (k_i64)g->num_ranks * g->num_channels;
        for (k_i64 i = k_first(k, 0); i < items; i += k_stride(k, senders)) {
            const k_i32 owner = (g->rank + 1 + (k_i32)(i % g->num_ranks)) % g->num_ranks;
            send_channel(k, a, &m, owner, (k_i32)(i / g->num_ranks));
        }
    }
    k_mover_end(k, &m);
    return k->block < first_reduce ||
           reduce(k, a, k_first(k, first_reduce), k_stride(k, k->num_blocks - first_reduce));
}

K_KERNEL(combine, k_combine_args) {
    k_enter(k, &a->g, K_OP_COMBINE);
    if (!run(k, a)) {
        k_ends(k, K_END_FAULT);
    }
    if (k_last_out(k, 1)) {
        k_leave(k, 1);
    }
}
