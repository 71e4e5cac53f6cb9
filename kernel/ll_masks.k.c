/* SPDX-License-Identifier: MIT */
/*
 * ll_masks: what a caller does with masks, in the order of its stream: to set one, to want one gone, to
 * ask for them, and the barrier of those who are not masked, which takes back who is wanted and agrees
 * the counters (docs/decisions/0010; tests/model has the protocol). One warp works.
 */
#include "kernel/ll.h"

/* Every operation that was sent has been received. */
static K_INLINE k_bool is_idle(const struct k_ll_ctl *ctl) {
    k_bool idle = 1;
    K_UNROLL for (k_i32 i = 0; i < K_LL_KINDS; i++) {
        const k_u64 sent = ll_count(&ctl->sent[i]);
        idle = idle && ll_count(&ctl->received[i][0]) == sent / 2 &&
               ll_count(&ctl->received[i][1]) == (sent + 1) / 2;
    }
    return idle;
}

/* ---- the barrier ---------------------------------------------------------------------------- */

struct meeting {
    k_u64 number, largest[K_LL_KINDS];
};

static K_INLINE const k_u64 *words_of(const struct k_ll *ll, const struct k_group *g, k_i32 p) {
    return (const k_u64 *)k_own(g, ll->map.meeting + 8ull * K_LL_MEETING * (k_u64)p);
}

static K_INLINE k_bool meets(const struct k_thread *k, k_i32 p) {
    return p != k->g->rank && k_load(&k->mask.ll->peers[p].mask) == 0;
}

/* Who is wanted is asked to come. */
static K_FN void begin_meeting(struct k_thread *k, struct meeting *m) {
    const struct k_ll *ll = k->mask.ll;
    m->number = k_load(&ll->ctl->meeting) + 1;
    for (k_i32 p = 0; p < k->g->num_ranks; p++) {
        struct k_ll_peer *peer = &ll->peers[p];
        if (k_load(&peer->wanted) != 0) {
            k_store(&peer->wanted, 0);
            k_store(&peer->mask, 0);
        }
    }
}

/* The largest counters that anybody has seen. Who has begun to meet is told that it is not masked any
 * more, before it is answered. */
static K_FN void hear_counters(struct k_thread *k, struct meeting *m) {
    const struct k_ll *ll = k->mask.ll;
    for (k_i32 p = 0; p < k->g->num_ranks; p++) {
        if (meets(k, p)) {
            const k_u64 *words = words_of(ll, k->g, p), theirs = k_acquire(words) >> 32;
            if (theirs != k_load(&ll->peers[p].answered)) {
                k_post(k_peer_at(k->g, p, ll->map.masked_by + 8ull * (k_u64)k->g->rank), 0);
                k_store(&ll->peers[p].answered, theirs);
            }
            K_UNROLL for (k_i32 i = 0; i < K_LL_KINDS; i++) {
                const k_u64 n = k_load(words + 1 + i);
                m->largest[i] = n > m->largest[i] ? n : m->largest[i];
            }
        }
    }
}

static K_FN void tell_counters(struct k_thread *k, const struct meeting *m) {
    const struct k_ll *ll = k->mask.ll;
    for (k_i32 p = 0; p < k->g->num_ranks; p++) {
        if (meets(k, p)) {
            const struct k_peer at =
                k_peer_at(k->g, p, ll->map.meeting + 8ull * K_LL_MEETING * (k_u64)k->g->rank);
            K_UNROLL for (k_i32 i = 0; i < K_LL_KINDS; i++) {
                k_post(k_peer_plus(at, 8ull * (k_u64)(1 + i)), m->largest[i]);
            }
            k_publish(at, K_WORD(m->number, k_load(&ll->peers[p].answered)));
        }
    }
}

/* Rank p has answered this meeting with the same counters, and has been told that this rank has them. */
static K_FN k_bool agrees(struct k_thread *k, const struct meeting *m, k_i32 p) {
    const k_u64 *words = words_of(k->mask.ll, k->g, p);
    const k_u64 w = k_acquire(words), theirs = w >> 32;
    k_bool same = theirs != 0 && (k_u32)w == (k_u32)m->number &&
                  theirs == k_load(&k->mask.ll->peers[p].answered);
    K_UNROLL for (k_i32 i = 0; i < K_LL_KINDS; i++) {
        same = same && k_load(words + 1 + i) == m->largest[i];
    }
    return same;
}

/* From here on all who have met count alike. Even, so that both slots begin anew. */
static K_FN void end_meeting(struct k_thread *k, const struct meeting *m) {
    struct k_ll_ctl *ctl = k->mask.ll->ctl;
    struct k_board *board = k_board_of(k->g, k->g->rank);
    k_bool masked = 0;
    K_UNROLL for (k_i32 i = 0; i < K_LL_KINDS; i++) {
        const k_u64 n = m->largest[i] + (m->largest[i] & 1);
        k_store(&ctl->sent[i], n << K_LL_SHARE_BITS);
        k_store(&ctl->received[i][0], n / 2 << K_LL_SHARE_BITS);
        k_store(&ctl->received[i][1], n / 2 << K_LL_SHARE_BITS);
        k_store(&ctl->floor[i], n);
    }
    for (k_i32 p = 0; p < k->g->num_ranks; p++) {
        masked = masked || k_load(&k->mask.ll->peers[p].mask) != 0;
    }
    k_store(&ctl->meeting, m->number);
    k_store(&board->masked, masked);
    k_publish_local(&board->mask_news, 1);
}

/* By one lane. A rank that does not come within the deadline is masked. */
static K_FN k_bool ll_meet(struct k_thread *k) {
    struct k_ll_ctl *ctl = k->mask.ll->ctl;
    struct meeting m = {0, {ll_count(&ctl->sent[0]), ll_count(&ctl->sent[1])}};
    struct k_spinner s = K_SPINNER;
    k_bool ok = 1, all = 0;
    begin_meeting(k, &m);
    while (ok && !all) {
        all = 1;
        hear_counters(k, &m);
        tell_counters(k, &m);
        for (k_i32 p = 0; ok && p < k->g->num_ranks; p++) {
            if (meets(k, p) && !agrees(k, &m, p)) {
                all = 0;
                k->mask.is_gone = 0;
                ok = k_spin(k, &s, p, K_PHASE_MEETING) || k->mask.is_gone;
                if (k->mask.is_gone) { /* it may still meet, for the next barrier to see */
                    k_store(&k->mask.ll->peers[p].answered, 0);
                }
            }
        }
    }
    if (ok) {
        end_meeting(k, &m);
    }
    return ok;
}

/* ---- what else ------------------------------------------------------------------------------ */

/* Rank a->rank, or all that are masked. */
static K_FN void want_back(struct k_thread *k, const struct k_ll_masks_args *a) {
    for (k_i32 p = 0; p < k->g->num_ranks; p++) {
        if (a->rank < 0 || p == a->rank) {
            k_store(&a->ll.peers[p].wanted, k_load(&a->ll.peers[p].mask) != 0);
        }
    }
}

static K_FN void show_masks(struct k_thread *k, const struct k_ll_masks_args *a) {
    for (k_i32 p = k->lane; p < k->g->num_ranks; p += K_LANES) {
        *(k_i32 *)k_row(&a->masks, p) = k_load(&a->ll.peers[p].mask) != 0;
    }
}

static K_FN void ll_masks_run(struct k_thread *k, const struct k_ll_masks_args *a) {
    if (a->what == K_LL_ASK) {
        show_masks(k, a);
    } else if (k->lane == 0 && a->what == K_LL_MASK) {
        k_store(&a->ll.peers[a->rank].wanted, 0);
        k_mask(k->g, &a->ll, k->mask.kernel, k->kind, a->rank, K_PHASE_NONE, K_LL_WHY_CALLER,
               0);
    } else if (k->lane == 0 && a->what == K_LL_UNMASK) {
        want_back(k, a);
    } else if (k->lane == 0 && a->what == K_LL_BARRIER && !ll_meet(k)) {
        ll_fail(k);
    }
}

K_KERNEL(low_latency, masks, k_ll_masks_args) {
    k->g = &a->g;
    k->kind = (k_i32)K_OP_LL_MASKS;
    k->epoch = 0;
    ll_enter(k, &a->ll);
    if (a->what == K_LL_BARRIER && !is_idle(a->ll.ctl)) {
        ll_refuse(k, K_REFUSED_BARRIER);
        return;
    }
    k->epoch = (k_u32)k->mask.kernel;
    if (k->block == 0 && k->warp == 0) {
        ll_hear(k, a->what != K_LL_BARRIER);
        ll_masks_run(k, a);
    }
    k_barrier(k, 1);
    if (k->warp == 0 && k->lane == 0) {
        k_add_last(&a->ll.ctl->kernels, ll_share_of(k));
    }
}
