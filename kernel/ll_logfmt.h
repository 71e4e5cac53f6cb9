/* SPDX-License-Identifier: MIT */
/*
 * LogFMT-10: answers of a low-latency combine in 10 bits for each channel. Function bodies for
 * ll_combine.k.c; which bytes a row becomes is a function of the row alone.
 *
 * A *division* is 128 channels: its metadata is their largest magnitude (low half) and their least, as
 * bf16. A *block* is 1024 channels where rows are whole ones, else 512; the last may be short. A block
 * is encoded if in each of its divisions the largest is below 1 and the least is less, else it stays
 * bf16. A row is the metadata of all divisions, then the blocks back to back.
 *
 *   la, li   log2 of the largest and of the least, which counts as 2^-32 of the largest if it is smaller
 *   code     0 is 0; 1 to 511 are 2^li to 2^la, in equal steps of the exponent; a channel has the
 *            nearest, with its sign beside it
 *   16 channels are five words: code j at bit 9 * j, sign j at bit 144 + j
 *
 * Logarithms are whole multiples of 2^-K_LOG_BITS, the nearest ones, which tests compare with those of
 * the C library for every bf16; all else is IEEE arithmetic without contraction. So the bytes are the
 * same in both worlds, and what they decode to.
 */
#ifndef KERNEL_LL_LOGFMT_H
#define KERNEL_LL_LOGFMT_H

#include "kernel/ll.h"

#define K_LOG_BITS 16
#define K_LOG_LANES (K_LANES < 8 ? 1 : 8)       /* share a division */
#define K_LOG_DIVISIONS (K_LANES / K_LOG_LANES) /* are in a warp's hands at once: a step */
#define K_LOG_STEP (256 * K_LOG_DIVISIONS)      /* bytes of bf16 in them */
#define K_LOG_GROUPS (8 / K_LOG_LANES)          /* of 16 channels, in a lane's part of a step */

/* ---- numbers -------------------------------------------------------------------------------- */

/* log2 of the bf16 whose bits without sign these are; 0: less than that of any other by far. */
static K_INLINE k_i32 ll_log2(k_u32 bits) {
    const k_bool normal = bits >= 0x80;
    const k_u32 u = normal ? bits << 16 : k_bits((k_f32)(k_i32)bits);
    const k_f32 z = k_float((u & 0x7fffffu) | 0x3f800000u) - 1.0f;
    const k_f32 y =
        ((((((1033.30859375f * z - 5262.8125f) * z + 12792.9296875f) * z - 21393.693359375f) *
               z +
           31045.234375f) *
              z -
          47225.65625f) *
             z +
         94546.7421875f) *
        z;
    return ((k_i32)(u >> 23) - (normal ? 127 : 260)) * (1 << K_LOG_BITS) + (k_i32)(y + 0.5f);
}

/* 2^(e * 2^-23), e negative. */
static K_INLINE k_f32 ll_exp2(k_i32 e) {
    const k_f32 z = k_float(((k_u32)e & 0x7fffffu) | 0x3f800000u) - 1.0f;
    const k_f32 y =
        ((((0.0018671309808269143f * z + 0.009017027914524078f) * z + 0.05579991638660431f) *
              z +
          0.24016444385051727f) *
             z +
         0.6931512951850891f) *
            z +
        1.0f;
    /* By way of normal numbers, as the least are none. */
    return k_float(k_bits(y) + ((k_u32)((e >> 23) + 64) << 23)) * 5.421010862427522e-20f;
}

struct ll_log {
    k_i32 least, span; /* li, la - li */
};

static K_INLINE struct ll_log ll_log_of(k_u32 meta) {
    const k_i32 most = ll_log2(meta & 0xffffu);
    struct ll_log log = {k_max(ll_log2(meta >> 16), most - (32 << K_LOG_BITS)), 0};
    log.span = most - log.least;
    return log;
}

/* A NaN or an infinity is above 1 by its bits. */
static K_INLINE k_bool ll_log_fits(k_u32 meta) {
    return (meta & 0xffffu) < 0x3f80u && meta >> 16 < (meta & 0xffffu);
}

/* 16 channels, two in each word of v. */
static K_INLINE void ll_encode(struct ll_log log, const k_u32 *v, k_u32 *w) {
    /* Half way between two codes is so much less than half way between their exponents. */
    const k_f32 span = (k_f32)log.span, by = 510.0f / span;
    const k_f32 bend = span * 2.59230064e-09f;
    K_UNROLL for (k_i32 i = 0; i < 5; i++) {
        w[i] = 0;
    }
    K_UNROLL for (k_i32 i = 0; i < 16; i++) {
        const k_u32 x = v[i / 2] >> (16 * (i & 1));
        const k_f32 at = (k_f32)(ll_log2(x & 0x7fffu) - log.least) * by + (1.5f - bend);
        const k_u32 code = at < 0.0f ? 0u : (k_u32)at;
        w[9 * i / 32] |= code << (9 * i % 32);
        if (9 * i % 32 > 23) {
            w[9 * i / 32 + 1] |= code >> (32 - 9 * i % 32);
        }
        w[4] |= (x >> 15 & 1u) << (16 + i);
    }
}

/* Channel i of 16; `step`: between two codes, in 2^-23. */
static K_INLINE k_f32 ll_decode(struct ll_log log, k_f32 step, const k_u32 *w, k_i32 i) {
    const k_i32 at = 9 * i / 32, bit = 9 * i % 32;
    const k_u32 code = (w[at] >> bit | (bit > 23 ? w[at + 1] << (32 - bit) : 0u)) & 0x1ffu;
    const k_i32 up = (k_i32)((k_f32)((k_i32)code - 1) * step + 0.5f);
    const k_f32 x = ll_exp2(log.least * (1 << (23 - K_LOG_BITS)) + up);
    return code == 0 ? 0.0f : k_float(k_bits(x) | (w[4] >> (16 + i) & 1u) << 31);
}

/* ---- blocks --------------------------------------------------------------------------------- */

/* Bytes of bf16 in each block of a row but the last. */
static K_INLINE k_i32 ll_log_block_bytes(k_i32 row_bytes) {
    return row_bytes % 2048 ? 1024 : 2048;
}

/* Of bf16 or codes. */
static K_INLINE k_i32 ll_log_bytes(k_i32 bf16_bytes, k_bool encoded) {
    return bf16_bytes / 8 * (encoded ? 5 : 8);
}

/* acc[0..15] += weight * the channels in q. */
static K_INLINE void ll_log_add(k_f32 *acc, const k_u32 *q, k_f32 weight) {
    K_UNROLL for (k_i32 i = 0; i < 8; i++) {
        acc[2 * i] = acc[2 * i] + k_float(q[i] << 16) * weight;
        acc[2 * i + 1] = acc[2 * i + 1] + k_float(q[i] & 0xffff0000u) * weight;
    }
}

static K_INLINE void ll_log_round(const k_f32 *acc, k_u32 *v) {
    K_UNROLL for (k_i32 i = 0; i < 8; i++) {
        v[i] = (k_u32)k_to_bf16(acc[2 * i]) | (k_u32)k_to_bf16(acc[2 * i + 1]) << 16;
    }
}

/* ---- a warp's block on its way ----------------------------------------------------------------- */

/* Makes bytes from to end of a row in the stage: the sum of the terms, rounded. Sends the metadata to
 * where the row begins. Whether they are to be encoded. */
static K_FN k_bool ll_log_make(struct k_thread *k, const struct k_term *terms, k_i32 num,
                               k_i32 from, k_i32 end, struct k_peer row) {
    k_u32 *stage = (k_u32 *)ll_stage(k); /* the block in bf16, then as it travels */
    k_bool fits = 1;
    for (k_i32 step = from; step < end; step += K_LOG_STEP) {
        k_u32 most = 0, below = 0; /* 0x7fff less the least */
        const k_i32 first = step + k->lane * K_LOG_GROUPS * 32;
        for (k_i32 at = first; at < k_min(end, first + K_LOG_GROUPS * 32); at += 32) {
            k_f32 acc[16] = {0};
            k_u32 v[8];
            K_ROLLED for (k_i32 j = 0; j < num; j++) {
                const k_u8 *x = (const k_u8 *)terms[j].row + at;
                const struct k_16 lo = k_load16(x), hi = k_load16(x + 16);
                const k_u32 q[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
                ll_log_add(acc, q, terms[j].weight);
            }
            ll_log_round(acc, v);
            K_UNROLL for (k_i32 i = 0; i < 16; i++) {
                const k_u32 x = v[i / 2] >> (16 * (i & 1)) & 0x7fffu;
                most = x > most ? x : most;
                below = 0x7fffu - x > below ? 0x7fffu - x : below;
            }
            K_UNROLL for (k_i32 i = 0; i < 8; i++) {
                stage[(at - from) / 4 + i] = v[i];
            }
        }
        most = k_group_most(k, most, K_LOG_LANES);
        below = k_group_most(k, below, K_LOG_LANES);
        const k_u32 meta = most | (0x7fffu - below) << 16;
        fits = fits && (first >= end || ll_log_fits(meta));
        if (first < end && k->lane % K_LOG_LANES == 0) {
            k_store_u32(k_peer_plus(row, (k_u64)(first / 64)), meta);
            stage[K_LL_STAGE_BYTES / 4 - 8 + (first - from) / 256] = meta;
        }
    }
    return k_all(k, fits);
}

/* Sends the block of `bytes` of bf16 that ll_log_make has made. */
static K_FN void ll_log_store(struct k_thread *k, struct k_peer to, k_i32 bytes,
                              k_bool encoded) {
    k_u32 *stage = (k_u32 *)ll_stage(k); /* the block in bf16, then as it travels */
    const k_u32 *meta = stage + K_LL_STAGE_BYTES / 4 - 8;
    k_syncwarp(k);
    for (k_i32 step = 0; encoded && step < bytes; step += K_LOG_STEP) {
        for (k_i32 i = 0; i < K_LOG_GROUPS; i++) {
            const k_i32 at = step + (k->lane * K_LOG_GROUPS + i) * 32;
            k_u32 v[8], w[5];
            K_UNROLL for (k_i32 c = 0; c < 8; c++) {
                v[c] = stage[at / 4 + c];
            }
            if (at < bytes) {
                ll_encode(ll_log_of(meta[at / 256]), v, w);
            }
            k_syncwarp(k); /* codes take the place of what all lanes have read */
            K_UNROLL for (k_i32 c = 0; at < bytes && c < 5; c++) {
                stage[at / 32 * 5 + c] = w[c];
            }
            k_syncwarp(k);
        }
    }
    for (k_i32 i = k->lane; i < ll_log_bytes(bytes, encoded) / 4; i += K_LANES) {
        k_store_u32(k_peer_plus(to, 4ull * (k_u64)i), stage[i]);
    }
    k_syncwarp(k); /* the stage can be used again */
}

/* ---- sums of rows that have come ------------------------------------------------------------ */

/* Of each term the block in which byte `from` of bf16 is: where it begins in the row, and in bit 0 whether
 * it is encoded; in `pad`. Lanes share the terms. */
static K_FN void ll_log_find(struct k_thread *k, struct k_term *terms, k_i32 num, k_i32 from,
                             k_i32 row_bytes) {
    const k_i32 block = ll_log_block_bytes(row_bytes);
    k_syncwarp(k); /* the terms are written, and were read */
    for (k_i32 i = k->lane; i < num; i += K_LANES) {
        const k_u32 *meta = (const k_u32 *)terms[i].row;
        k_i32 at = row_bytes / 64;
        k_bool encoded = 0;
        for (k_i32 b = 0; b <= from; b += block) {
            at += b ? ll_log_bytes(block, encoded) : 0;
            encoded = 1;
            for (k_i32 d = b / 256; d < k_min(b + block, row_bytes) / 256; d++) {
                encoded &= ll_log_fits(meta[d]);
            }
        }
        terms[i].pad = at | encoded;
    }
    k_syncwarp(k);
}

/* acc[0..15] += weight * the codes in w. */
static K_INLINE void ll_log_add_codes(k_f32 *acc, k_u32 meta, const k_u32 *w, k_f32 weight) {
    const struct ll_log log = ll_log_of(meta);
    const k_f32 step = (k_f32)log.span * (k_f32)(1 << (23 - K_LOG_BITS)) / 510.0f;
    K_UNROLL for (k_i32 i = 0; i < 16; i++) {
        acc[i] = acc[i] + ll_decode(log, step, w, i) * weight;
    }
}

/* Bytes part.from to part.end of the sum of rows in LogFMT; from is where a step begins. */
static K_FN void ll_log_reduce(struct k_thread *k, struct k_peer out, k_i32 row_bytes,
                               struct ll_span part, struct k_term *terms, k_i32 num) {
    const k_i32 block = ll_log_block_bytes(row_bytes);
    for (k_i32 from = part.from; from < part.end; from += K_LOG_STEP) {
        ll_log_find(k, terms, num, from, row_bytes);
        K_ROLLED for (k_i32 i = 0; i < K_LOG_GROUPS; i++) {
            const k_i32 at = from + (k->lane * K_LOG_GROUPS + i) * 32;
            k_f32 acc[16] = {0};
            k_u32 v[8];
            K_ROLLED for (k_i32 j = 0; at < part.end && j < num; j++) {
                const k_bool encoded = terms[j].pad & 1;
                const k_u32 *meta = (const k_u32 *)terms[j].row;
                const k_u32 *w = meta + (terms[j].pad + ll_log_bytes(at % block, encoded)) / 4;
                K_UNROLL for (k_i32 c = 0; c < 8; c++) {
                    v[c] = c < 5 || !encoded ? w[c] : 0;
                }
                if (encoded) {
                    ll_log_add_codes(acc, meta[at / 256], v, terms[j].weight);
                } else {
                    ll_log_add(acc, v, terms[j].weight);
                }
            }
            if (at < part.end) {
                ll_log_round(acc, v);
                const struct k_16 lo = {v[0], v[1], v[2], v[3]}, hi = {v[4], v[5], v[6], v[7]};
                k_store16_to(k_peer_plus(out, (k_u64)at), lo);
                k_store16_to(k_peer_plus(out, (k_u64)at + 16), hi);
            }
        }
    }
}

#endif
