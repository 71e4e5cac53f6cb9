/* SPDX-License-Identifier: MIT */
/*
 * combine: the experts' answers back to the owners of the tokens, summed there.
 *
 *   control  block 0: ready words; each names the landing row for the reader's answers. Then `go`.
 *   send     per (owner, channel of the owner's tokens): the rows received from that owner are
 *            consecutive, and so are their landing rows. Plain rows are copied by the sending
 *            blocks in one walk; each (owner, channel) gets its word when its stores are
 *            complete, while later ones are on their way.
 *   sum      a token's biases and answers, ranks ascending, once every rank that answers in its
 *            channel has; and, where rows are weighted or expanded, first the answers that this
 *            rank owes: those all blocks make. In float32, rounded once per sum.
 *
 * A rank's answers to itself do not travel: where they are plain rows they are read in place.
 * In two calls, one kernel does all but the tokens' sums, and another those; what a rank owes is made
 * by the first alone.
 *
 * One warp can run all of it in this order: nobody waits for a peer's answer while there is an
 * answer of this rank that nobody has begun.
 */
/* gate: -UK_NODES */
/* gate: -DK_NODES=1 */
#include "kernel/combine_send.h"
#include "kernel/combine_sum.h"

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
static K_FN k_bool combine_control(struct k_thread *k, const struct k_combine_args *a) {
    const struct k_group *g = &a->g;
    struct op_signature sig;
    sig.word0 = signature(k, a->flags, a->topk, &a->h);
    sig.word1 = (k_u32)a->row_bytes | K_SIG_ROW_TYPE(a->types);
    sig.word2 = 0;
    for (k_i32 i = k->warp; i < g->num_ranks; i += k->num_warps) {
        k_i32 p = (g->rank + i) % g->num_ranks;
        if (!K_HAS_FAR(a) || is_near(a->far, p)) {
            post_ready(k, p, &sig, a->h.send_base[p]);
        }
    }
    k_bool ok = check_rows(k, a);
    if (K_HAS_FAR(a)) {
        ok = ok && (k->warp != k->num_warps - 1 || exchange_far_ready(k, a, &sig));
        for (k_i32 i = k->warp; ok && i < g->num_ranks; i += k->num_warps) {
            const k_i32 p = far_order(a->far, i, g->num_ranks);
            ok = await_ready(k, p, &sig, &a->h.remote_where[p]);
        }
    } else {
        ok = ok && await_all_ready(k, &sig, a->h.remote_where);
    }
    ok = k_barrier(k, ok);
    if (ok && k->warp == 0 && k->lane == 0) {
        k_store(&g->ctl->taken[K_TAKEN_TOKENS], 0);
        k_publish_local(&g->ctl->go, K_WORD(k->epoch, a->h.counts->need ? K_GO_NEED : K_GO));
    }
    return ok;
}

/* ---- entry ---------------------------------------------------------------------------------- */

static K_FN k_bool combine_run(struct k_thread *k, const struct k_combine_args *a) {
    const k_bool sends = (a->flags & K_DO_SEND) != 0, receives = (a->flags & K_DO_RECV) != 0;
    const k_bool both = sends && receives && k->num_blocks > 1;
    const k_i32 senders = both ? (k_i32)a->send_blocks : k->num_blocks;
    const k_bool sums = sends && (a->flags & K_DO_REDUCE) != 0; /* made by all blocks */
    k_u32 go = K_GO_UNASKED;
    if (sends && k->block == 0 && !combine_control(k, a)) {
        return 0;
    }
    struct k_mover m;
    k_mover_begin(k, &m, warp_ring(k, a->stages, a->stage_bytes), a->stages, a->stage_bytes);
    const k_bool away = k->block < senders; /* if all blocks do, they do the rest as well */
    if (sends && away && !sums) {
        send_plain(k, a, &m, spread_first(k, 0, senders), k_stride(k, senders), &go);
    }
    if (sends && !sums && !(away && both) && may_send(k, &go)) {
        const k_i32 from = both ? senders : 0;
        send_own(k, a, k_first(k, from), k_stride(k, k->num_blocks - from));
    }
    const k_bool far = K_HAS_FAR(a) && sends;
    k_bool ok = !far || may_send(k, &go);
    struct sum_feed f = {0};
    if (far && sums) { /* what it owes goes before all that nodes wait for */
        f.answers = 1;
        f.token = K_NOBODY;
        k_syncwarp(k);
        if (k->lane == 0) {
            warp_sum_notes(k)->feed = f;
        }
        ok = ok && sum_rows(k, a, &m, k_stride(k, k->num_blocks), &go);
    }
    if (ok && far && away) {
        ok = far_combine(k, a, &m, spread_first(k, 0, senders), k_stride(k, senders));
    }
    f.answers = sums && !far;
    f.tokens = receives;
    f.eager = both && !away;
    f.token = K_NOBODY;
    f.early = f.answers && !a->h.counts->need;
    k_syncwarp(k); /* the scratch was used for sending */
    if (k->lane == 0) {
        warp_sum_notes(k)->feed = f;
    }
    k_syncwarp(k);
    ok = ok && sum_rows(k, a, &m, k_stride(k, k->num_blocks), &go);
    if (ok && sends && k_first(k, 0) == 0) {
        count_sent_answers(k, a);
    }
    k_mover_end(k, &m);
    if (go == K_GO_NEED) {
        k_fail_op(k, K_END_NEED);
        ok = 1;
    }
    return ok;
}

K_KERNEL(throughput, combine, k_combine_args) {
    const k_bool receives = (a->flags & K_DO_RECV) != 0;
    k_enter(k, &a->g, K_OP_COMBINE);
    if (a->flags & K_DO_DROP) { /* nobody will look at the answers */
        end_dropped(k);
        return;
    }
    if (!combine_run(k, a)) {
        k_fail_op(k, K_END_FAULT);
    }
    if (k_is_last_out(k, receives)) {
        if (k->lane == 0 && (a->flags & K_DO_SEND)) { /* the next takes before `go` */
            k_store(&a->g.ctl->taken[K_TAKEN_ANSWERS], 0);
        }
        await_sender(k, a->flags);
        k_finish_kernel(k, receives);
        tell_sent(k, receives);
    }
}
