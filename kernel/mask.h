/* SPDX-License-Identifier: MIT */
/*
 * Masks of low-latency mode, as far as waits have to do with them: when a wait ends without its peer, and
 * what is noted and told then. Part of the kernel language, for lang.h: all here is off the way of a wait
 * that goes well. Must not look at anything but words, and must not decide what a missing peer means to
 * an operation: ll.h does.
 */
#ifndef KERNEL_MASK_H
#define KERNEL_MASK_H

static K_INLINE const k_u64 *k_mask_word(const struct k_group *g, k_u64 region, k_i32 peer) {
    return (const k_u64 *)k_own(g, region + 8ull * (k_u64)peer);
}

/* The first to find that rank `peer` is to be left out says so: to later kernels, to the peer, which is
 * to do the same, and to the host. */
static K_COLD void k_mask(const struct k_group *g, const struct k_ll *ll, k_u64 kernel,
                          k_i32 kind, k_i32 peer, k_i32 phase, k_i32 why, k_i64 waited_ns) {
    struct k_ll_peer *p = &ll->peers[peer];
    struct k_board *board = k_board_of(g, g->rank);
    if (k_load(&p->mask) != 0 || k_raise_old(&p->mask, K_LL_NOTE(kernel, why)) != 0) {
        return;
    }
    k_store(&p->waited, (k_u64)(waited_ns / 1000000) << 32 | (k_u64)phase << 16 | (k_u64)kind);
    k_post(k_peer_at(g, peer, ll->map.masked_by + 8ull * (k_u64)g->rank), 1);
    k_publish_local(&board->masked, 1);
    k_publish_local(&board->mask_news, 1);
}

#define K_MASK_WAIT 0
#define K_MASK_WAIT_AGAIN 1 /* for as long as was waited so far */
#define K_MASK_LOOK_AGAIN 2
#define K_MASK_LEAVE_OUT 3

/*
 * Whether a wait for `peer` goes on. One deadline holds for all waits of a half of a kernel. But a peer
 * that has said meanwhile that it waits, perhaps for a third rank, gets as much time once more. And before
 * a peer is left out, the wait looks once more for what it has sent before it died, or masked this rank:
 * this process may have been stopped between its last look and now.
 */
static K_COLD k_i32 k_mask_look(const struct k_group *g, const struct k_ll *ll, k_u64 kernel,
                                k_i32 kind, k_i32 peer, k_i32 phase, k_i64 waited,
                                k_bool is_second, k_bool is_gone, k_bool is_sure) {
    struct k_ll_ctl *ctl = ll->ctl;
    struct k_ll_peer *p = &ll->peers[peer];
    const k_u64 half = K_LL_HALF(kernel, phase);
    k_i32 why = 0;
    if (k_load(&p->mask) != 0) {
        return K_MASK_LEAVE_OUT;
    }
    if (is_gone) {
        why = K_LL_WHY_GONE;
    } else if (phase != K_PHASE_MEETING &&
               k_load(k_mask_word(g, ll->map.masked_by, peer)) != 0) {
        why = K_LL_WHY_MASKED_US;
    } else if (waited > ctl->timeout_ns || (!is_second && k_load(&ctl->expired) >= half)) {
        if (!is_second && k_load(k_mask_word(g, ll->map.waits, peer)) != k_load(&p->heard)) {
            return K_MASK_WAIT_AGAIN;
        }
        k_raise_to(&ctl->expired, half);
        why = K_LL_WHY_LATE;
    } else if (waited > ctl->timeout_ns / 2 && k_load(&ctl->said) < half &&
               k_raise_old(&ctl->said, half) < half) {
        for (k_i32 r = 0; r < g->num_ranks; r++) {
            k_post(k_peer_at(g, r, ll->map.waits + 8ull * (k_u64)g->rank), half);
        }
    }
    if (why && is_sure) {
        k_mask(g, ll, kernel, kind, peer, phase, why, waited);
    }
    return !why ? K_MASK_WAIT : is_sure ? K_MASK_LEAVE_OUT : K_MASK_LOOK_AGAIN;
}

#endif
