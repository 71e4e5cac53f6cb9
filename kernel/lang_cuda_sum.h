/* SPDX-License-Identifier: MIT */
/*
 * Rows in pieces of 16 bytes, and their sums: float32, rounded once. Part of lang_cuda.h.
 */
#ifndef KERNEL_LANG_CUDA_SUM_H
#define KERNEL_LANG_CUDA_SUM_H

#include "kernel/lang_cuda.h"

struct k_16 {
    k_u32 x, y, z, w;
};

static K_INLINE struct k_16 k_load16(const void *p) {
    struct k_16 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

static K_INLINE void k_store16_to(struct k_peer at, struct k_16 v) {
    if (at.address) {
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at.address), "r"(v.x),
                     "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
    }
}

/*
 * 16 bytes whose last word says what they are: they are written and read whole. Own memory is read, to
 * which a peer may be writing.
 */
static K_INLINE void k_post16(struct k_peer at, struct k_16 v) {
    const k_u64 lo = (k_u64)v.y << 32 | v.x, hi = (k_u64)v.w << 32 | v.z;
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1203
    asm volatile("{\n\t.reg .b128 v;\n\tmov.b128 v, {%1, %2};\n\t"
                 "st.relaxed.sys.global.b128 [%0], v;\n\t}" ::"l"(at.address),
                 "l"(lo), "l"(hi)
                 : "memory");
#else /* older assemblers know no b128; it is the same instruction of the GPU */
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(at.address), "l"(lo),
                 "l"(hi)
                 : "memory");
#endif
}

static K_INLINE k_bool k_take16(const void *p, k_u32 tag, struct k_16 *v) {
    k_u64 lo, hi;
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1203
    asm volatile("{\n\t.reg .b128 v;\n\tld.relaxed.sys.global.b128 v, [%2];\n\t"
                 "mov.b128 {%0, %1}, v;\n\t}"
                 : "=l"(lo), "=l"(hi)
                 : "l"(p)
                 : "memory");
#else
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(lo), "=l"(hi)
                 : "l"(p)
                 : "memory");
#endif
    v->x = (k_u32)lo;
    v->y = (k_u32)(lo >> 32);
    v->z = (k_u32)hi;
    v->w = (k_u32)(hi >> 32);
    return v->w == tag;
}

/* k_load16 from global or shared memory. */
static K_INLINE struct k_16 k_load16_any(const void *p) {
    struct k_16 v;
    asm volatile("ld.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

static K_INLINE void k_store16(k_u64 p, struct k_16 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

struct k_term {
    const void *row;
    k_f32 weight;
    k_i32 pad;
};

static K_INLINE k_u32 k_bits(k_f32 x) {
    return __float_as_uint(x);
}

static K_INLINE k_f32 k_float(k_u32 u) {
    return __uint_as_float(u);
}

/* ---- 8-bit floats: 8 lanes cast a group ------------------------------------------------------- */

#define K_CASTERS 8
#define K_CAST_CHANNELS 16

#include "kernel/lang_e4m3.h"

static K_INLINE k_u32 k_group_most(struct k_thread *k, k_u32 x, k_i32 lanes) {
    (void)k;
#pragma unroll
    for (k_i32 d = lanes / 2; d > 0; d /= 2) {
        x = max(x, __shfl_xor_sync(0xffffffffu, x, d));
    }
    return x;
}

static K_INLINE k_u32 k_to_e4m3_pair(k_f32 x, k_f32 y) {
#if __CUDA_ARCH__ >= 890
    k_u16 two;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(y), "f"(x));
    return two;
#else
    return (k_u32)k_to_e4m3_by_bits(x) | (k_u32)k_to_e4m3_by_bits(y) << 8;
#endif
}

static K_INLINE k_f32 k_from_bf16(k_u16 h) {
    return __uint_as_float((k_u32)h << 16);
}

static K_INLINE k_u16 k_to_bf16(k_f32 x) {
    k_u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

static K_INLINE k_f32 k_from_f16(k_u16 h) {
    k_f32 x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}

static K_INLINE k_u16 k_to_f16(k_f32 x) {
    k_u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

/* Pieces of 16 bytes that a lane has in flight at once, to cover the latency of memory. With a
 * ring of stages this is for more terms than a stage holds only. */
#if defined(K_MOVER_TMA)
#define K_REDUCE_PIECES 1
#elif __CUDA_ARCH__ >= 1000
#define K_REDUCE_PIECES 2 /* four do not fit the registers of 16 warps there */
#else
#define K_REDUCE_PIECES 4
#endif

/* acc += row * weight for one piece; the products are left out where all weights are 1. */
static K_INLINE void k_add_piece(k_f32 *acc, struct k_16 v, k_i32 dtype, k_bool weighted,
                                 k_f32 w) {
    const k_u32 u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (k_i32 q = 0; q < 4; q++) {
        if (dtype == K_F32) {
            const k_f32 x = __uint_as_float(u[q]);
            acc[q] = acc[q] + (weighted ? x * w : x);
        } else {
            const k_f32 lo = dtype == K_BF16 ? __uint_as_float(u[q] << 16)
                                             : k_from_f16((k_u16)(u[q] & 0xffffu));
            const k_f32 hi = dtype == K_BF16 ? __uint_as_float(u[q] & 0xffff0000u)
                                             : k_from_f16((k_u16)(u[q] >> 16));
            acc[2 * q] = acc[2 * q] + (weighted ? lo * w : lo);
            acc[2 * q + 1] = acc[2 * q + 1] + (weighted ? hi * w : hi);
        }
    }
}

static K_INLINE k_u32 k_pack2(k_i32 dtype, k_f32 a, k_f32 b) {
    return dtype == K_BF16 ? (k_u32)k_to_bf16(a) | ((k_u32)k_to_bf16(b) << 16)
                           : (k_u32)k_to_f16(a) | ((k_u32)k_to_f16(b) << 16);
}

static K_INLINE struct k_16 k_round_piece(const k_f32 *acc, k_i32 dtype) {
    struct k_16 o;
    if (dtype == K_F32) {
        o.x = k_bits(acc[0]);
        o.y = k_bits(acc[1]);
        o.z = k_bits(acc[2]);
        o.w = k_bits(acc[3]);
    } else {
        o.x = k_pack2(dtype, acc[0], acc[1]);
        o.y = k_pack2(dtype, acc[2], acc[3]);
        o.z = k_pack2(dtype, acc[4], acc[5]);
        o.w = k_pack2(dtype, acc[6], acc[7]);
    }
    return o;
}

static K_INLINE void k_load_pieces(struct k_16 *v, const void *row, k_i32 base, k_i32 bytes) {
#pragma unroll
    for (k_i32 p = 0; p < K_REDUCE_PIECES; p++) {
        if (base + p * 512 < bytes) {
            v[p] = k_load16((const k_u8 *)row + base + p * 512);
        }
    }
}

/* One body per type: `dtype` and `weighted` are constants where this is called. */
static K_INLINE void k_reduce_as(k_i32 lane, k_u64 dst, k_i32 dtype, k_bool weighted,
                                 k_i32 bytes, const struct k_term *terms, k_i32 num) {
#pragma unroll 1
    for (k_i32 base = lane * 16; base < bytes; base += 512 * K_REDUCE_PIECES) {
        k_f32 acc[K_REDUCE_PIECES][8];
        struct k_16 v[K_REDUCE_PIECES], next[K_REDUCE_PIECES];
#pragma unroll
        for (k_i32 p = 0; p < K_REDUCE_PIECES; p++) {
#pragma unroll
            for (k_i32 q = 0; q < 8; q++) {
                acc[p][q] = 0.0f;
            }
        }
        if (num > 0) {
            k_load_pieces(v, terms[0].row, base, bytes);
        }
#pragma unroll 1
        for (k_i32 j = 0; j < num; j++) {
            if (j + 1 < num) { /* on their way while these are added */
                k_load_pieces(next, terms[j + 1].row, base, bytes);
            }
#pragma unroll
            for (k_i32 p = 0; p < K_REDUCE_PIECES; p++) {
                if (base + p * 512 < bytes) {
                    k_add_piece(acc[p], v[p], dtype, weighted, terms[j].weight);
                }
                v[p] = next[p];
            }
        }
#pragma unroll
        for (k_i32 p = 0; p < K_REDUCE_PIECES; p++) {
            if (base + p * 512 < bytes) {
                k_store16(dst + (k_u64)base + (k_u64)(p * 512), k_round_piece(acc[p], dtype));
            }
        }
    }
}

static K_INLINE void k_reduce(struct k_thread *k, struct k_peer dst, k_i32 dtype,
                              k_bool weighted, k_i32 bytes, const struct k_term *terms,
                              k_i32 num) {
#if defined(K_MOVER_TMA)
    (void)weighted; /* one small body: these are the sums of very many terms */
    k_reduce_as(k->lane, dst.address, dtype, 1, bytes, terms, num);
#else
    if (dtype == K_BF16) {
        if (weighted) {
            k_reduce_as(k->lane, dst.address, K_BF16, 1, bytes, terms, num);
        } else {
            k_reduce_as(k->lane, dst.address, K_BF16, 0, bytes, terms, num);
        }
    } else if (dtype == K_F16) {
        k_reduce_as(k->lane, dst.address, K_F16, 1, bytes, terms, num);
    } else {
        k_reduce_as(k->lane, dst.address, K_F32, 1, bytes, terms, num);
    }
#endif
}

static K_INLINE void k_zero(struct k_thread *k, void *dst, k_i32 bytes) {
    struct k_16 zero = {0, 0, 0, 0};
    for (k_i32 i = k->lane * 16; i < bytes; i += 512) {
        k_store16((k_u64)dst + (k_u64)i, zero);
    }
}

static K_INLINE void k_store_u32(struct k_peer at, k_u32 v) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(at.address), "r"(v) : "memory");
}

#endif
