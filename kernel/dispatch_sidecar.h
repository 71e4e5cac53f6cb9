/* SPDX-License-Identifier: MIT */
/*
 * What travels beside a row of a dispatch: the words of a sidecar, which abi.h draws, where each
 * comes from, and how row and sidecar are cut into pieces. Function bodies for dispatch.k.c, where
 * both the sending warps and those that copy this rank's own rows use them. Nothing here waits.
 */
#ifndef KERNEL_DISPATCH_SIDECAR_H
#define KERNEL_DISPATCH_SIDECAR_H

#include "kernel/op.h"

/* The word of a sidecar at which scales begin. */
static K_INLINE k_i32 side_scales_word(const struct k_dispatch_args *a) {
    return K_SIDE_SCALES(a->topk, a->flags & K_DO_WEIGHTS);
}

/* What travels of a token, in pieces that fit a stage: the row, then its sidecar, which shares
 * the stage of the row's last piece if both fit. */
struct send_shape {
    k_i32 row_pieces, pieces;     /* how many the row has, and row and sidecar together */
    k_i32 row_end;                /* the bytes of the row's last piece */
    k_i32 side_piece;             /* the first piece that has a part of the sidecar */
    k_i32 side_at;                /* the byte of its stage at which such a part begins */
    k_i32 side_words, side_bytes; /* the sidecar's; the bytes with those that fill it up */
    k_i32 scales;                 /* the first word of scales */
    k_i32 direct;                 /* words before this one are copies of words in memory */
};

static K_INLINE struct send_shape shape_of(const struct k_dispatch_args *a) {
    const k_i32 scale_bytes = a->num_scales * a->scale_bytes;
    /* Narrow scales can be copied in words where they lie as in the sidecar. */
    const k_bool whole =
        a->scale_bytes == 4 ||
        (a->scales.s1 == a->scale_bytes && ((a->scales.data | (k_u64)a->scales.s0) & 3u) == 0);
    struct send_shape s;
    s.scales = side_scales_word(a);
    s.direct = s.scales + (whole ? scale_bytes / 4 : 0);
    s.side_words = s.scales + (scale_bytes + 3) / 4;
    s.side_bytes = K_SIDE_BYTES(s.scales, scale_bytes);
    s.row_pieces = (a->row_bytes + a->stage_bytes - 1) / a->stage_bytes;
    s.row_end = a->row_bytes - (s.row_pieces - 1) * a->stage_bytes;
    s.pieces = s.row_pieces;
    s.side_piece = s.row_pieces - 1;
    s.side_at = s.row_end;
    if (s.row_end + s.side_bytes > a->stage_bytes) {
        s.pieces += (s.side_bytes + a->stage_bytes - 1) / a->stage_bytes;
        s.side_piece = s.row_pieces;
        s.side_at = 0;
    }
    return s;
}

/* Four bytes of token t's scales, narrower than a word, from byte `byte` on; past the end zeros. */
static K_INLINE k_u32 scales_word(const struct k_dispatch_args *a, k_i32 t, k_i32 byte) {
    k_u32 word = 0;
    for (k_i32 b = 0; b < 4; b += a->scale_bytes) {
        const k_i32 j = a->scale_bytes == 2 ? (byte + b) / 2 : byte + b;
        if (j < a->num_scales) {
            const k_u64 at = k_at(&a->scales, t, j);
            const k_u32 v = a->scale_bytes == 2 ? *(const k_u16 *)at : *(const k_u8 *)at;
            word |= v << (8 * b);
        }
    }
    return word;
}

/* Where word w of token 0's sidecar lies in memory; 0: nowhere. */
static K_INLINE k_u64 find_word(const struct k_dispatch_args *a, const struct send_shape *s,
                                k_i32 w) {
    const k_i32 topk = a->topk;
    k_u64 at = 0;
    if (w >= s->direct || w < K_SIDE_IDS) {
        at = 0;
    } else if (w >= s->scales) {
        at = a->scales.data +
             (k_u64)((k_i64)(w - s->scales) * (a->scale_bytes == 4 ? a->scales.s1 : 4));
    } else if (w >= K_SIDE_WEIGHTS(topk)) {
        at = a->weights.data + (k_u64)((k_i64)(w - K_SIDE_WEIGHTS(topk)) * a->weights.s1);
    } else if (w >= K_SIDE_INDICES(topk)) {
        at = (k_u64)(a->h.sel_index + (w - K_SIDE_INDICES(topk)));
    } else {
        at = (k_u64)(a->h.ids + (w - K_SIDE_IDS));
    }
    return at;
}

/* Word w of token t's sidecar, which lies at `at` for token 0; of what is not in memory as a word
 * only the token's number. */
static K_INLINE k_u32 read_word(const struct k_dispatch_args *a, const struct send_shape *s,
                                k_u64 at, k_i32 t, k_i32 w) {
    const k_i64 stride = w >= s->scales                 ? a->scales.s0
                         : w >= K_SIDE_WEIGHTS(a->topk) ? a->weights.s0
                                                        : 4 * (k_i64)a->topk;
    return at ? *(const k_u32 *)(at + (k_u64)(t * stride)) : w == 0 ? (k_u32)t : 0;
}

/* Word w of token t's sidecar, whatever it is made from. */
static K_INLINE k_u32 side_word(const struct k_dispatch_args *a, const struct send_shape *s,
                                k_i32 t, k_i32 w) {
    return w < s->direct ? read_word(a, s, find_word(a, s, w), t, w)
                         : scales_word(a, t, 4 * (w - s->scales));
}

#endif
