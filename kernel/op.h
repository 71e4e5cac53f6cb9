/* SPDX-License-Identifier: MIT */
/*
 * What dispatch and combine have in common: the ready exchange that starts every operation, the
 * tables they index, and the places of their words. Written in the kernel language.
 */
#ifndef KERNEL_OP_H
#define KERNEL_OP_H

#include "kernel/lang.h"

/* What block 0 tells the others in k_ctl.go when control is over: begin, or leave, as rows do not
 * fit at some rank. */
#define K_GO 0u
#define K_GO_NEED 1u
/* What a warp notes beside these: it has not asked yet; or the operation has faulted. */
#define K_GO_UNASKED 2u
#define K_GO_FAULT 3u

/* The stage of a mover that is used after this one. */
static K_INLINE k_i32 next_stage(k_i32 stage, k_i32 stages) {
    return stage + 1 == stages ? 0 : stage + 1;
}

/* The first token of channel c; of channel number C: T. */
static K_INLINE k_i32 channel_first(const struct k_channels *n, k_i32 c) {
    k_i32 first = 0, group = 0;
    if (c >= n->num) {
        return n->tokens;
    }
    for (; group < K_CHANNEL_GROUPS - 1 && c >= n->in_group; group++) {
        first += n->in_group * n->size[group];
        c -= n->in_group;
    }
    return k_min(first + c * n->size[group], n->tokens);
}

/* The channel of token t < T, if every channel had `more` tokens than it has. */
static K_INLINE k_i32 channel_at(const struct k_channels *n, k_i32 t, k_i32 more) {
    k_i32 c = 0, group = 0;
    for (; group < K_CHANNEL_GROUPS - 1 && t >= n->in_group * (n->size[group] + more);
         group++) {
        t -= n->in_group * (n->size[group] + more);
        c += n->in_group;
    }
    return k_min(c + (k_i32)((k_u32)t / (k_u32)(n->size[group] + more)), n->num - 1);
}

static K_INLINE k_i32 channel_of(const struct k_channels *n, k_i32 t) {
    return channel_at(n, t, 0);
}

/* The rows of channel c of rank s among those received: [*r0, *r1), none past the source's last. */
static K_INLINE void channel_rows(const struct k_group *g, const struct k_handle *h, k_i32 s,
                                  k_i32 c, k_u32 *r0, k_u32 *r1) {
    const k_u32 *chan = h->recv_chan + (k_i64)s * (g->num_channels + 1) + c;
    const k_u32 base = h->recv_base[s];
    const k_bool has = (k_u32)c < h->recv_channels[s];
    *r0 = has ? base + chan[0] : base;
    *r1 = has ? base + chan[1] : base;
}

/*
 * The number of a warp that sends with all others of `blocks` blocks from first_block on: neighbours
 * are on different SMs, and all warps of the first block, which has control to do, come last.
 */
static K_INLINE k_i32 spread_first(const struct k_thread *k, k_i32 first_block, k_i32 blocks) {
    const k_i32 block = k->block - first_block, rest = blocks - 1;
    return block == 0 ? rest * k->num_warps + k->warp : k->warp * rest + block - 1;
}

/* The number of the next unit that no warp has taken, of `all`: those below `stride` went to a warp
 * each. Where there are no more, that is known without asking. */
static K_INLINE k_i32 take_beyond(struct k_thread *k, k_i32 stride, k_i32 all, k_u64 *taken) {
    return stride < all ? stride + (k_i32)k_take_next(k, taken) : all;
}

static K_INLINE k_u64 ready_offset(const struct k_group *g, k_u32 epoch, k_i32 writer) {
    return g->map.ready +
           8ull * K_READY_STRIDE * ((k_u64)(epoch & 1u) * (k_u64)g->num_ranks + (k_u64)writer);
}

static K_INLINE k_u64 counts_offset(const struct k_group *g, k_u32 epoch, k_i32 writer) {
    return g->map.counts + 8ull * (k_u64)g->count_words *
                               ((k_u64)(epoch & 1u) * (k_u64)g->num_ranks + (k_u64)writer);
}

static K_INLINE k_u64 base_offset(const struct k_group *g, k_u32 epoch, k_i32 writer) {
    return g->map.bases +
           8ull * K_BASE_WORDS * ((k_u64)(epoch & 1u) * (k_u64)g->num_ranks + (k_u64)writer);
}

/* Word of (writer, channel) in `progress` or `returned`. */
static K_INLINE k_u64 channel_word(const struct k_group *g, k_u64 region, k_i32 writer,
                                   k_i32 c) {
    return region + 8ull * ((k_u64)writer * (k_u64)g->num_channels + (k_u64)c);
}

/* Word 0 of a ready message. */
static K_INLINE k_u32 signature(const struct k_thread *k, k_u32 flags, k_i32 topk,
                                const struct k_handle *h) {
    const k_u32 fixed = (k_u32)k->kind | ((flags & K_DO_WEIGHTS) ? K_SIG_WEIGHTS : 0u) |
                        ((k_u32)topk << K_SIG_TOPK_SHIFT);
    return (flags & K_DO_COUNTS)
               ? fixed | k->g->experts
               : fixed | K_SIG_CACHED |
                     ((k_u32)k_load(&h->counts->known) << K_SIG_COUNTED_SHIFT);
}

/* The words of a ready message that must agree. Not an array: it must stay in registers. */
struct op_signature {
    k_u32 word0, word1, word2;
};

static K_INLINE k_u32 signature_word(const struct op_signature *s, k_i32 i) {
    return i == 0 ? s->word0 : i == 1 ? s->word1 : s->word2;
}

/* Lane 0 tells rank p: write to `where` of my arena for this operation, described by sig. */
static K_INLINE void post_ready(struct k_thread *k, k_i32 p, const struct op_signature *sig,
                                k_u32 where) {
    if (k->lane == 0) {
        const struct k_group *g = k->g;
        /* Published: what this rank read from the region before comes before p's writes to it. */
        k_publish_four(k_peer_at(g, p, ready_offset(g, k->epoch, g->rank)),
                       K_WORD(k->epoch, sig->word0), K_WORD(k->epoch, sig->word1),
                       K_WORD(k->epoch, sig->word2), K_WORD(k->epoch, where));
    }
}

/*
 * Waits for `go` unless this warp has; false: nothing may be sent. What a warp sends first it loads
 * before that: only places at the peers, and counters that warps share, hold no sooner.
 */
static K_INLINE k_bool may_send(struct k_thread *k, k_u32 *go) {
    if (*go == K_GO_UNASKED) {
        k_u32 word = 0;
        const k_bool ok = k_await(k, &k->g->ctl->go, k->epoch, k->g->rank, K_PHASE_SELF, &word);
        *go = ok ? word : K_GO_FAULT;
    }
    return *go == K_GO;
}

/*
 * The warp awaits rank p's ready message; its last word goes to *where. False after a fault, which
 * a signature that differs from `sig` also is.
 */
static K_FN k_bool await_ready(struct k_thread *k, k_i32 p, const struct op_signature *sig,
                               k_u32 *where) {
    const k_u64 *words = (const k_u64 *)k_own(k->g, ready_offset(k->g, k->epoch, p));
    k_bool ok = 1;
    for (k_i32 base = 0; ok && base < K_READY_WORDS; base += K_LANES) {
        const k_i32 i = base + k->lane;
        k_u32 value = 0;
        ok = k_await(k, i < K_READY_WORDS ? words + i : 0, k->epoch, p, K_PHASE_READY, &value);
        const k_bool differs = i < 3 && value != signature_word(sig, i);
        if (ok && differs) {
            struct k_blame b = {K_ERR_MISMATCH,         K_PHASE_READY, p, i,
                                signature_word(sig, i), value};
            k_raise(k, 0, b);
        }
        if (i == 3) {
            *where = value;
        }
        ok = k_all(k, ok && !differs);
    }
    return ok; /* and p's reads of what this rank may now write to are over */
}

/* All warps of a block: all peers' ready messages. `wheres` [R] receives their last words. */
static K_FN k_bool await_all_ready(struct k_thread *k, const struct op_signature *sig,
                                   k_u32 *wheres) {
    k_bool ok = 1;
    for (k_i32 p = k->warp; ok && p < k->g->num_ranks; p += k->num_warps) {
        ok = await_ready(k, p, sig, &wheres[p]);
    }
    return ok;
}

/* Of the last warp out of a kernel that only receives: the one that sends may have a warp that starts
 * late, and takes its epoch from memory then. */
static K_INLINE void await_sender(struct k_thread *k, k_u32 flags) {
    k_u32 left = 0;
    if ((flags & (K_DO_SEND | K_DO_RECV)) == K_DO_RECV &&
        !k_await(k, &k->g->ctl->sent, k->epoch, k->g->rank, K_PHASE_SELF, &left)) {
        k_fail_op(k, K_END_FAULT);
    }
}

/* The last thing that a kernel which only sends does. */
static K_INLINE void tell_sent(struct k_thread *k, k_bool receives) {
    if (!receives && k->lane == 0) {
        k_publish_local(&k->g->ctl->sent, K_WORD(k->epoch, 1));
    }
}

/* Nobody will look at what comes. It may still come: what it is written to is given to peers again
 * when all of them have begun a later operation, and so have sent it. */
static K_INLINE void end_dropped(struct k_thread *k) {
    if (k->block == 0 && k->warp == 0 && k->lane == 0) {
        k_store(&k->g->ctl->epoch, k->epoch);
    }
}

/* Which ranks a pass over tokens or plain answers serves. Blocks that send keep the link busy;
 * where others receive, those also copy what stays here. */
#define K_TO_ALL 0
#define K_TO_PEERS 1
#define K_TO_SELF 2

/* What a warp that looks for its next rows finds. */
#define K_NEXT_READY 0
#define K_NEXT_LATER 1 /* there are some, but what they wait for has not arrived */
#define K_NEXT_NONE 2
#define K_NEXT_FAILED 3

/*
 * Work is taken in turn when so few pieces are left to send of what was taken before: late, so that
 * warps end together, and early enough to load it meanwhile.
 */
#define K_FEW_AHEAD 2

/* A walk over items cut into pieces, each of which takes the next stage of a mover. */
struct walk {
    k_i32 item, piece, stage;
};

/* A walk starts at stage 0, wherever the mover's last one ended: its stores are retired first. */
static K_INLINE struct walk begin_walk(struct k_thread *k, struct k_mover *m, k_i32 first) {
    struct walk w = {first, 0, 0};
    k_mover_retire(k, m, 0);
    return w;
}

static K_INLINE void walk_on(struct walk *w, k_i32 pieces, k_i32 stages) {
    w->piece++;
    if (w->piece == pieces) {
        w->piece = 0;
        w->item++;
    }
    w->stage = next_stage(w->stage, stages);
}

/*
 * Pieces begun and not ended, at most: with three stages or more one is left over, so that the
 * stores of the newest piece may still read theirs while the next is loaded.
 */
static K_INLINE k_i32 most_ahead(k_i32 stages) {
    return stages > 2 ? stages - 1 : stages;
}

static K_INLINE k_i32 newest_stores(k_i32 stages) {
    return stages > 2 ? 1 : 0;
}

/*
 * Sending is one walk over all units of work of a warp (the channels of a dispatch, the answers
 * of a combine), so that the next unit's loads do not wait for the last one's stores. A unit is
 * published when its stores are complete: a few commits after its last, when that is likely to
 * have come about by itself, or when the next unit ends, or the walk. Nothing that a peer does
 * can delay it.
 */
#define K_SETTLE_AFTER 3
_Static_assert(K_SETTLE_AFTER < K_MOVER_STAGES, "late movers remember so many commits");

struct pending {
    k_i32 unit;  /* all of it is stored, it is not published; -1: there is none */
    k_i32 newer; /* commits since its last */
};

static K_INLINE k_bool pending_is_due(const struct pending *p, k_bool at_once) {
    return p->unit >= 0 && (at_once || p->newer >= K_SETTLE_AFTER);
}

/*
 * A unit of so many pieces is published in two parts, as those who wait for it begin with the first
 * half: publishing costs as much as a few pieces. Answers only where a warp has few of them. Check
 * builds do it wherever they can.
 */
#if defined(K_LATE_MOVERS)
#define K_TWO_PARTS 2
#define K_FEW_ANSWERS 1000000
#else
#define K_TWO_PARTS 24
#define K_FEW_ANSWERS 8
#endif

/* The warp's scratch and the ring of its mover, in the block's shared memory. */
static K_INLINE void *warp_scratch(struct k_thread *k) {
    return (k_u8 *)k_shared(k) + (k_u64)k->warp * (k_u64)k->g->scratch_bytes;
}

static K_INLINE void *warp_ring(struct k_thread *k, k_i32 stages, k_i32 stage_bytes) {
    return (k_u8 *)k_shared(k) + (k_u64)k->num_warps * (k_u64)k->g->scratch_bytes +
           (k_u64)k->warp * (k_u64)K_RING_BYTES(stages, stage_bytes);
}

#endif
