/* SPDX-License-Identifier: MIT */
/*
 * What the kernels of low-latency mode have in common: numbers, slots and tags, the places of words and
 * rows, headers, and the ends of a kernel. Written in the kernel language. Nothing here hands anything
 * from one block of a rank to another: what two blocks must know, both compute.
 */
#ifndef KERNEL_LL_H
#define KERNEL_LL_H

#if !defined(K_MOVER_GENERIC)
#define K_MOVER_GENERIC 1 /* rows pass through registers */
#endif
#if defined(__CUDACC__)
#define K_WAITS_APART 1
#endif
#include "kernel/abi_ll.h"
#if !defined(K_BLOCK_WARPS) /* as src/run/gpu.c has it */
#define K_BLOCK_WARPS K_LL_WARPS
#define K_BLOCKS_PER_SM K_LL_BLOCKS
#endif
#include "kernel/lang.h"

/* What a kernel is about: set by ll_begin, the same for all its warps. */
struct ll_call {
    const struct k_ll *ll;
    k_u64 number, floor; /* floor: what the last barrier agreed; 0 without masks */
    k_i32 kind, slot;    /* kind: 0 dispatch, 1 combine */
    k_u32 tag;
    k_bool sends, receives;
    /* Of a combine, what it needs of the dispatch; all loads of a kernel's beginning are under way
     * together. */
    struct k_ll_head head; /* but for number[1] */
    k_u64 lost, taken[2];  /* of k_ll_ctl */
};

/* ---- places --------------------------------------------------------------------------------- */

/* The part of rank `of` in this operation's slot of a region. */
static K_INLINE k_u64 ll_part(const struct k_group *g, const struct ll_call *c,
                              const struct k_ll_region *r, k_i32 of) {
    return r->at + r->stride * ((k_u64)c->slot * (k_u64)g->num_ranks + (k_u64)of);
}

static K_INLINE const k_u64 *ll_own_words(const struct k_group *g, const struct ll_call *c,
                                          const struct k_ll_region *r, k_i32 of) {
    return (const k_u64 *)k_own(g, ll_part(g, c, r, of));
}

/* An array of the handle. */
static K_INLINE void *ll_in_handle(const struct k_ll *ll, k_u64 offset) {
    return (k_u8 *)ll->head + offset;
}

/* Element [source][token] of an array of the handle, which has `each` elements of a token. */
static K_INLINE k_i64 ll_row_of(const struct k_ll *ll, k_i32 source, k_i32 token, k_i32 each) {
    return ((k_i64)source * ll->group_tokens + token) * each;
}

/* In how many slices a row of `rows` rows travels, so that few rows keep many blocks busy. */
static K_INLINE k_i32 ll_slices(k_i32 rows) {
    return rows < 1 ? 1 : k_max(1, k_min(K_LL_MOST_SLICES, K_LL_CUT_BELOW / rows));
}

/* Bytes `from` to `end` of something that is cut into `parts` parts of whole `unit` bytes. */
struct ll_span {
    k_i32 from, end;
};

static K_INLINE struct ll_span ll_cut(k_i32 bytes, k_i32 unit, k_i32 parts, k_i32 part) {
    const k_i32 units = (bytes + unit - 1) / unit, each = (units + parts - 1) / parts * unit;
    struct ll_span s = {k_min(part * each, bytes), k_min((part + 1) * each, bytes)};
    return s;
}

/* A bit for each of the first `num` places that is at least `least`; the warp together. */
static K_INLINE k_u64 ll_mask_of(struct k_thread *k, const k_i32 *place, k_i32 num,
                                 k_i32 least) {
    k_u64 mask = 0;
    for (k_i32 base = 0; base < num; base += K_LANES) {
        const k_i32 i = base + k->lane;
        mask |= (k_u64)k_ballot(k, i < num && place[i] >= least) << base;
    }
    return mask;
}

/* ---- the ends of a kernel ------------------------------------------------------------------- */

static K_INLINE k_u64 ll_count(const k_u64 *counter) {
    return k_load(counter) >> K_LL_SHARE_BITS;
}

static K_INLINE k_u32 ll_share_of(const struct k_thread *k) {
    const k_u32 blocks = (k_u32)k->num_blocks, all = 1u << K_LL_SHARE_BITS;
    return all / blocks + ((k_u32)k->block < all % blocks ? 1u : 0u);
}

/* A wait has ended without what it waited for: the group has faulted. */
static K_INLINE void ll_fail(struct k_thread *k) {
    if (k->lane == 0) {
        k_publish_local(&k_board_of(k->g, k->g->rank)->failed, K_WORD(k->epoch, 1));
    }
}

static K_INLINE void ll_leave(struct k_thread *k, const struct ll_call *c) {
    struct k_ll_ctl *ctl = c->ll->ctl;
    k_barrier(k, 1);
    if (k->warp != 0 || k->lane != 0) {
        return;
    }
    const k_u64 share = ll_share_of(k);
    if (k->mask.ll) {
        k_add_last(&ctl->kernels, share);
    }
    if (c->receives && k->mask.ll) {
        k_add_last(&ctl->received[c->kind][c->slot], share); /* ll_is_mender acquires it */
    } else if (c->receives) {
        k_add(&ctl->received[c->kind][c->slot], share);
    }
    if (c->sends) {
        k_add(&ctl->sent[c->kind], share);
    }
}

/* The number of the last operation of a slot of which this rank has received `count`. */
static K_INLINE k_u64 ll_last(k_u64 count, k_i32 slot) {
    return count == 0 ? 0 : 2 * count - (k_u64)slot;
}

/*
 * One warp tells all ranks what the kernels before this one have received, so that they may write
 * there again. Everything that those read is before this, in the order of the stream.
 */
static K_FN void ll_tell_consumed(struct k_thread *k, const struct k_ll *ll) {
    const struct k_group *g = k->g;
    k_u64 word[2 * K_LL_KINDS];
    K_UNROLL for (k_i32 i = 0; i < 2 * K_LL_KINDS; i++) {
        const k_u64 n = ll_last(ll_count(&ll->ctl->received[i / 2][i & 1]), i & 1);
        word[i] = n ? K_WORD(K_LL_TAG(n), 1) : 0;
    }
    for (k_i32 p = k->lane; p < g->num_ranks; p += K_LANES) {
        k_publish_four(
            k_peer_at(g, p, ll->map.consumed + 8ull * 2 * K_LL_KINDS * (k_u64)g->rank), word[0],
            word[1], word[2], word[3]);
    }
}

static K_INLINE k_bool ll_refuse(struct k_thread *k, k_u32 why) {
    if (k->block == 0 && k->warp == 0 && k->lane == 0) {
        k_store((k_u64 *)&k_board_of(k->g, k->g->rank)->refused, K_WORD(k->kind, why));
    }
    return 0;
}

/* How many operations of its slot come before number n. */
static K_INLINE k_u64 ll_before(k_u64 n) {
    return (n - 1) / 2;
}

/* ---- masks ---------------------------------------------------------------------------------- */

/* What a warp knows of masks when the kernel begins. */
static K_INLINE void ll_enter(struct k_thread *k, const struct k_ll *ll) {
    k->mask.ll = ll->peers ? ll : 0;
    k->mask.kernel = ll->peers ? ll_count(&ll->ctl->kernels) + 1 : 0;
    k->mask.is_gone = k->mask.gave_up = k->mask.is_mending = 0;
}

/* Before this kernel began. */
static K_INLINE k_bool ll_was_masked(const struct k_thread *k, k_u64 mask) {
    return mask != 0 && mask < K_LL_NOTE(k->mask.kernel, 0);
}

/* Nothing is sent to rank p or awaited from there: it was left out before this kernel, and for the warp
 * that leaves last also in it. */
static K_INLINE k_bool ll_is_masked(const struct k_thread *k, k_i32 p) {
    const k_u64 mask = k->mask.ll ? k_load(&k->mask.ll->peers[p].mask) : 0;
    return k->mask.is_mending ? mask != 0 : ll_was_masked(k, mask);
}

/* Of some lane, mask.is_gone. */
static K_INLINE k_bool ll_any_gone(struct k_thread *k) {
    return k->mask.ll && k_ballot(k, k->mask.is_gone) != 0;
}

/* One warp, when the kernel begins: what each peer has said of its waits so far is not about this kernel;
 * and who has masked this rank is masked too, from the next kernel on, unless this is a barrier. */
static K_FN void ll_hear(struct k_thread *k, k_bool masks) {
    const struct k_ll *ll = k->mask.ll;
    for (k_i32 p = k->lane; p < k->g->num_ranks; p += K_LANES) {
        k_store(&ll->peers[p].heard, k_load(k_mask_word(k->g, ll->map.waits, p)));
        if (masks && k_load(k_mask_word(k->g, ll->map.masked_by, p)) != 0) {
            k_mask(k->g, ll, k->mask.kernel, k->kind, p, K_PHASE_NONE, K_LL_WHY_MASKED_US, 0);
        }
    }
}

/*
 * At the end of a kernel in which a warp has gone on without a peer: one of those warps stays until all
 * others have left, and then makes whole what some of them have done with that peer and others without.
 */
static K_FN k_bool ll_is_mender(struct k_thread *k, const struct ll_call *c) {
    if (!k->mask.ll || !c->receives) {
        return 0;
    }
    k_barrier(k, 1); /* the block's other warps are done, but for being menders */
    if (k_ballot(k, k->mask.gave_up) == 0) {
        return 0;
    }
    struct k_ll_ctl *ctl = c->ll->ctl;
    const k_u64 one = 1ull << K_LL_SHARE_BITS;
    k_bool mine = 0;
    if (k->lane == 0) {
        mine = k_raise_old(&ctl->mended, k->mask.kernel) < k->mask.kernel;
        struct k_spinner s = K_SPINNER;
        while (mine && (k_acquire(&ctl->received[c->kind][c->slot]) & (one - 1)) !=
                           ((one - ll_share_of(k)) & (one - 1))) {
            k_pause(&s); /* their waits have deadlines */
        }
    }
    k->mask.is_mending = k_ballot(k, mine) != 0;
    k_syncwarp(k);
    return k->mask.is_mending;
}

static K_INLINE void ll_read_dispatch(const struct k_ll *ll, struct ll_call *c) {
    const struct k_ll_head *h = ll->head; /* a warp may be writing number[1] */
    c->head.owner = h->owner;
    c->head.number[0] = h->number[0];
    c->head.tokens = h->tokens;
    c->head.topk = h->topk;
    c->head.max_tokens = h->max_tokens;
    c->head.signature = h->signature;
    c->head.experts = h->experts;
    c->lost = k_load(&ll->ctl->lost);
    c->taken[0] = ll_count(&ll->ctl->received[0][0]);
    c->taken[1] = ll_count(&ll->ctl->received[0][1]);
}

/*
 * The first thing that every warp does: which operation this is, and whether it is legal. All come to the
 * same answer, because nobody has left. False: nothing is to be done, nor counted.
 */
static K_FN k_bool ll_begin(struct k_thread *k, const struct k_group *g, const struct k_ll *ll,
                            k_u32 flags, k_i32 op, struct ll_call *c) {
    k->g = g;
    k->kind = op;
    k->epoch = 0;
    ll_enter(k, ll);
    c->ll = ll;
    c->kind = op == (k_i32)K_OP_LL_COMBINE ? 1 : 0;
    c->sends = (flags & K_LL_SEND) != 0;
    c->receives = (flags & K_LL_RECEIVE) != 0;
    if (c->kind) {
        ll_read_dispatch(ll, c);
    }
    const k_u64 sent = ll_count(&ll->ctl->sent[c->kind]),
                even = ll_count(&ll->ctl->received[c->kind][0]),
                odd = ll_count(&ll->ctl->received[c->kind][1]);
    if (c->sends) {
        c->number = sent + 1; /* and another warp may be writing the handle */
    } else {
        c->number = ll->head->owner == (k_u64)ll->ctl ? ll->head->number[c->kind] : 0;
    }
    c->floor = k->mask.ll ? k_load(&ll->ctl->floor[c->kind]) : 0;
    c->slot = (k_i32)(c->number & 1);
    c->tag = c->number ? K_LL_TAG(c->number) : 0;
    k->epoch = c->tag;
    if (c->number == 0 || c->number > sent + (c->sends ? 1 : 0) ||
        (c->slot ? odd : even) != ll_before(c->number)) {
        return ll_refuse(k, c->sends ? K_REFUSED_SEND : K_REFUSED_RECEIVE);
    }
    return 1;
}

/* By one warp that has little else to do: in a dispatch blocks at the start have rows and at the end
 * counts, in a combine nearly all have rows. */
static K_INLINE void ll_hello(struct k_thread *k, const struct ll_call *c) {
    const k_i32 block = c->kind ? k->num_blocks - 1 : k->num_blocks * 5 / 8;
    if (k->block == block && k->warp == k->num_warps - 1) {
        ll_tell_consumed(k, c->ll);
        if (k->mask.ll) {
            ll_hear(k, 1);
        }
    }
}

/* ---- waits ---------------------------------------------------------------------------------- */

/* Until rank p has received what this operation's slot held before; p < 0: nobody in this lane. Where
 * mask.is_gone is set afterwards, nothing is to be sent there. */
static K_FN k_bool ll_await_free(struct k_thread *k, const struct ll_call *c, k_i32 p) {
    const struct k_group *g = k->g;
    const k_u64 *words = (const k_u64 *)k_own(g, c->ll->map.consumed);
    k_u32 value = 0;
    k->mask.is_gone = p >= 0 && ll_is_masked(k, p);
    if (c->number <= c->floor + 2) {
        return 1;
    }
    p = k->mask.is_gone ? -1 : p;
    return k_await(k, p < 0 ? 0 : words + p * 2 * K_LL_KINDS + c->kind * 2 + c->slot,
                   K_LL_TAG(c->number - 2), k_max(p, 0), K_PHASE_CONSUMED, &value);
}

/*
 * For how long from now on the first word of each other rank in region `r` is not here, those of all ranks
 * side by side (on the host of 64 at a time): added to `waits`, if the caller wants to know. `tokens`:
 * of ranks that have some, NULL: of all. One warp waits; whoever needs the words says what is wrong.
 */
static K_FN void ll_time_waits(struct k_thread *k, const struct ll_call *c,
                               const struct k_ll_region *r, k_i32 phase, const k_i32 *rows,
                               const struct k_array *waits) {
    const struct k_group *g = k->g;
    const k_i32 gave_up = k->mask.gave_up;
    k_bool ok = waits->data && k->block == k->num_blocks - 1 && k->warp == k->num_warps - 1;
    const k_i64 start = ok ? k_now() : 0;
    for (k_i32 base = k->lane; ok && base < g->num_ranks; base += 64 * K_LANES) {
        struct k_spinner s = K_SPINNER;
        k_u64 done = 0;
        for (;;) {
            k_i32 missing = -1;
            for (k_i32 i = 0, p = base; i < 64 && p < g->num_ranks; i++, p += K_LANES) {
                if (done >> i & 1) {
                    continue;
                }
                if (p != g->rank && (!rows || rows[p] > 0) &&
                    !(k->mask.ll && k_load(&k->mask.ll->peers[p].mask)) &&
                    (k_u32)(k_load(ll_own_words(g, c, r, p)) >> 32) != c->tag) {
                    missing = p;
                    continue;
                }
                done |= 1ull << i;
                if (s.turns) {
                    *(k_i64 *)k_row(waits, p) += k_now() - start;
                }
            }
            k->mask.is_gone = 0;
            if (missing < 0 || !ok) {
                break; /* after a failed wait all is looked at once more: who has sent may have left */
            }
            ok = k_spin(k, &s, missing, phase) || k->mask.is_gone;
        }
    }
    k->mask.gave_up = gave_up; /* nothing was left undone here */
    k_syncwarp(k);
}

/*
 * Until all ranks have received what this slot held before, where no masks tell them apart. By warps that
 * may have nothing to send, so a rank may have received this operation, too, before they look; more it
 * cannot have, as that needs what this kernel receives.
 */
static K_FN k_bool ll_await_all_free(struct k_thread *k, const struct ll_call *c) {
    const k_u64 *words = (const k_u64 *)k_own(k->g, c->ll->map.consumed);
    k_bool ok = 1;
    if (k->mask.ll || c->number <= 2) {
        return 1;
    }
    for (k_i32 base = 0; ok && base < k->g->num_ranks; base += K_LANES) {
        const k_i32 p = base + k->lane;
        const k_u64 *word = words + p * 2 * K_LL_KINDS + c->kind * 2 + c->slot;
        ok = k_await_either(k, p < k->g->num_ranks ? word : 0, K_LL_TAG(c->number - 2), c->tag,
                            p, K_PHASE_CONSUMED);
    }
    return ok;
}

/* By all warps, for what the block stores behind its next barrier. `sends`: this warp stores before. */
static K_INLINE k_bool ll_await_block_free(struct k_thread *k, const struct ll_call *c,
                                           k_bool sends) {
    return (k->warp != k->num_warps - 1 && !sends) || ll_await_all_free(k, c);
}

/* The same for one rank of each lane, with masks. */
static K_INLINE k_bool ll_await_one_free(struct k_thread *k, const struct ll_call *c, k_i32 p) {
    k->mask.is_gone = 0;
    return !k->mask.ll || ll_await_free(k, c, p);
}

/* What must agree, as words of a header. */
struct ll_header {
    k_u32 compared[K_LL_COMPARED];
};

static K_INLINE void ll_post_header(struct k_thread *k, const struct ll_call *c,
                                    struct k_peer at, const struct ll_header *h, k_u32 tokens,
                                    k_u32 rows) {
    if (k->lane == 0) {
        K_UNROLL for (k_i32 i = 0; i < K_LL_COMPARED; i++) {
            k_post(k_peer_plus(at, 8ull * (k_u64)i), K_WORD(c->tag, h->compared[i]));
        }
        k_post(k_peer_plus(at, 8ull * K_LL_TOKENS), K_WORD(c->tag, tokens));
        k_post(k_peer_plus(at, 8ull * K_LL_ROWS), K_WORD(c->tag, rows));
    }
}

/* Each lane awaits the header at `at` of a rank p of its own (NULL: none) and compares. Of a rank that
 * is gone it says 0. */
static K_FN k_bool ll_await_header(struct k_thread *k, const struct ll_call *c, const k_u64 *at,
                                   k_i32 p, const struct ll_header *h, k_u32 *tokens) {
    k_u32 value[K_LL_TOKENS + 1] = {0};
    k_bool same = 1;
    const k_i32 phase = c->kind ? K_PHASE_ANSWERS : K_PHASE_COUNTS;
    if (!k_await_most(k, K_LL_TOKENS + 1, at, 1, at ? K_LL_TOKENS + 1 : 0, c->tag, p, phase,
                      value)) {
        return 0;
    }
    at = k->mask.is_gone ? 0 : at;
    K_UNROLL for (k_i32 i = 0; i < K_LL_COMPARED; i++) {
        if (at && same && value[i] != h->compared[i]) {
            struct k_blame b = {K_ERR_MISMATCH, phase, p, i, h->compared[i], value[i]};
            k_raise(k, 0, b);
            same = 0;
        }
    }
    *tokens = k->mask.is_gone ? 0 : value[K_LL_TOKENS];
    return k_all(k, same);
}

/* Waits until all slices of a row are here, whose words begin at `words` and say how many they are; each
 * lane for a row of its own, NULL: none. */
static K_FN k_bool ll_await_slices(struct k_thread *k, const struct ll_call *c,
                                   const k_u64 *words, k_i32 p, k_i32 phase) {
    k_u32 slices = 0;
    k_bool ok = k_await(k, words, c->tag, p, phase, &slices);
    const k_i32 most = (k_i32)k_most(k, slices);
    for (k_i32 i = 1; ok && i < most; i++) {
        k_u32 value = 0;
        ok = k_await(k, i < (k_i32)slices ? words + i : 0, c->tag, p, phase, &value);
    }
    return ok;
}

/* This warp's number from the grid's end, where blocks are without rows if there are few. */
static K_INLINE k_i32 ll_last_first(const struct k_thread *k) {
    return (k->num_blocks - 1 - k->block) * k->num_warps + k->warp;
}

/* The first 1,280 bytes of the block's shared memory, or of the warp's. */
static K_INLINE void *ll_warp_scratch(struct k_thread *k) {
    return (k_u8 *)k_shared(k) + (k_u64)k->warp * (k_u64)k->g->scratch_bytes;
}

/* K_LL_STAGE_BYTES of the warp, behind the scratch of all, where kernels that have movers have rings. */
static K_INLINE void *ll_stage(struct k_thread *k) {
    return (k_u8 *)k_shared(k) + (k_u64)k->num_warps * (k_u64)k->g->scratch_bytes +
           (k_u64)k->warp * K_LL_STAGE_BYTES;
}

#endif
