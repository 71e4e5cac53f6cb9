/* SPDX-License-Identifier: MIT */
/*
 * How a row of a low-latency dispatch travels: as packets of 16 bytes, 12 of the row and the tag of its
 * operation, each stored at once. A packet that has the tag is whole, so nothing is published behind a row,
 * and its stores need not have ended before the receiver may be told: that is a trip to the peer less.
 *
 *   packet of a selection   expert at the receiver or -1 | index | weight | tag      [K], K_LL_NONE in
 *                           the first: the token does not come
 *   words of scales         {tag, 4 bytes of scales}
 *   batches of a row        96 pieces of 16 bytes become 128 packets, so that lane j has three whole pieces
 *                           and four whole packets: j, 32 + j, 64 + j; the last word of each goes into
 *                           packet 96 + j. Pieces behind the row's end are not sent.
 */
#ifndef KERNEL_LL_ROW_H
#define KERNEL_LL_ROW_H

#include "kernel/ll.h"

#define K_LL_RUN                                                                               \
    (K_CAST_CHANNELS / 16) /* neighbours that a lane takes, of a group that it casts */
#define K_LL_JOBS 32       /* places j of a batch */

/* A lane's pieces of a batch, for n < K_LL_RUN: r * 32 + j + n, r < 3. */
struct ll_pieces {
    struct k_16 v[3 * K_LL_RUN];
};

static K_INLINE k_i32 ll_num_batches(k_i32 wire_bytes) {
    return (wire_bytes + K_LL_BATCH_BYTES - 1) / K_LL_BATCH_BYTES;
}

/* The piece's byte in a row. */
static K_INLINE k_i32 ll_piece_at(k_i32 batch, k_i32 j, k_i32 i) {
    return K_LL_BATCH_BYTES * batch + 16 * (i / K_LL_RUN * K_LL_JOBS + j + i % K_LL_RUN);
}

static K_INLINE void ll_load_pieces(k_u64 row, k_i32 row_bytes, k_i32 batch, k_i32 j,
                                    struct ll_pieces *p) {
    K_UNROLL for (k_i32 i = 0; i < 3 * K_LL_RUN; i++) {
        const k_i32 at = ll_piece_at(batch, j, i);
        const struct k_16 none = {0, 0, 0, 0};
        p->v[i] = at < row_bytes ? k_load16((const void *)(row + (k_u64)at)) : none;
    }
}

static K_INLINE void ll_store_pieces(k_u64 row, k_i32 row_bytes, k_i32 batch, k_i32 j,
                                     const struct ll_pieces *p) {
    K_UNROLL for (k_i32 i = 0; i < 3 * K_LL_RUN; i++) {
        const k_i32 at = ll_piece_at(batch, j, i);
        if (at < row_bytes) {
            k_store16_to(k_peer_own(row + (k_u64)at), p->v[i]);
        }
    }
}

/* To a place of packets, which is that of the row's first batch. */
static K_INLINE void ll_post_pieces(struct k_peer to, k_i32 row_bytes, k_i32 batch, k_i32 j,
                                    const struct ll_pieces *p, k_u32 tag) {
    const struct k_peer at = k_peer_plus(to, (k_u64)(K_LL_BATCH_WIRE * batch + 16 * j));
    K_UNROLL for (k_i32 n = 0; n < K_LL_RUN; n++) {
        K_UNROLL for (k_i32 r = 0; r < 3; r++) {
            const struct k_16 v = p->v[r * K_LL_RUN + n], packet = {v.x, v.y, v.z, tag};
            if (ll_piece_at(batch, j, r * K_LL_RUN + n) < row_bytes) {
                k_post16(k_peer_plus(at, (k_u64)(16 * (r * K_LL_JOBS + n))), packet);
            }
        }
        const struct k_16 rest = {p->v[n].w, p->v[K_LL_RUN + n].w, p->v[2 * K_LL_RUN + n].w,
                                  tag};
        if (ll_piece_at(batch, j, n) < row_bytes) {
            k_post16(k_peer_plus(at, (k_u64)(16 * (3 * K_LL_JOBS + n))), rest);
        }
    }
}

/* Until the packet at `at` is of this operation, or is not awaited any more: mask.is_gone. By one lane. */
static K_INLINE k_bool ll_await_packet(struct k_thread *k, const struct ll_call *c,
                                       const k_u8 *at, k_i32 source) {
    const k_u64 w = k_wait(k, (const k_u64 *)(at + 8), c->tag, c->tag, source, K_PHASE_ROWS, 1);
    return (k_u32)(w >> 32) == c->tag || k->mask.is_gone;
}

/* Waits for a lane's pieces of a batch whose packets begin at `row`. Where mask.is_gone is set afterwards
 * they are not here. */
static K_INLINE k_bool ll_take_pieces(struct k_thread *k, const struct ll_call *c,
                                      const k_u8 *row, k_i32 row_bytes, k_i32 batch, k_i32 j,
                                      k_i32 source, struct ll_pieces *p) {
    const k_u8 *at = row + (k_u64)(K_LL_BATCH_WIRE * batch + 16 * j);
    k_bool ok = 1;
    for (;;) {
        const k_u8 *missing = 0;
        K_UNROLL for (k_i32 n = 0; n < K_LL_RUN; n++) {
            struct k_16 rest = {0, 0, 0, 0};
            const k_u8 *last = at + 16 * (3 * K_LL_JOBS + n);
            if (ll_piece_at(batch, j, n) < row_bytes && !k_take16(last, c->tag, &rest)) {
                missing = last;
            }
            const k_u32 w[3] = {rest.x, rest.y, rest.z};
            K_UNROLL for (k_i32 r = 0; r < 3; r++) {
                struct k_16 *v = &p->v[r * K_LL_RUN + n];
                const k_u8 *from = at + 16 * (r * K_LL_JOBS + n);
                if (ll_piece_at(batch, j, r * K_LL_RUN + n) < row_bytes &&
                    !k_take16(from, c->tag, v)) {
                    missing = from;
                }
                v->w = w[r];
            }
        }
        if (!missing || !ok || k->mask.is_gone) {
            break;
        }
        ok = ll_await_packet(k, c, missing, source);
    }
    return k_all(k, ok);
}

/* Waits for selection i's packet of a sidecar, of each lane its own; i < 0: none. */
static K_INLINE k_bool ll_take_selection(struct k_thread *k, const struct ll_call *c,
                                         const k_u8 *side, k_i32 i, k_i32 source,
                                         struct k_16 *packet) {
    k_bool ok = 1;
    if (i >= 0 && !k_take16(side + 16 * i, c->tag, packet)) {
        ok = ll_await_packet(k, c, side + 16 * i, source);
        k_take16(side + 16 * i, c->tag, packet);
    }
    return k_all(k, ok);
}

#endif
