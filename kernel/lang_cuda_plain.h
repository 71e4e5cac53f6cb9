/* SPDX-License-Identifier: MIT */
/*
 * The mover of sm_80, and of any GPU with K_MOVER_GENERIC: a stage is an address; rows pass through
 * registers when they are stored, 16 bytes for each lane. Part of lang_cuda.h.
 */
#ifndef KERNEL_LANG_CUDA_PLAIN_H
#define KERNEL_LANG_CUDA_PLAIN_H

#include "kernel/lang_cuda_sum.h"

#define K_MOVER_STAGES 4 /* each is an address in registers */
#define K_IN_PLACE 1

struct k_mover {
    k_u64 src[K_MOVER_STAGES];
    k_u8 *stages;
    k_i32 stage_bytes;
};

static K_INLINE void k_mover_begin(struct k_thread *k, struct k_mover *m, void *ring,
                                   k_i32 stages, k_i32 stage_bytes) {
    (void)k, (void)stages;
    m->stages = (k_u8 *)ring + K_RING_HEAD;
    m->stage_bytes = stage_bytes;
}

static K_INLINE void k_mover_load(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                  const void *src, k_i32 bytes) {
    (void)k, (void)bytes;
#pragma unroll
    for (k_i32 i = 0; i < K_MOVER_STAGES; i++) {
        if (i == stage) {
            m->src[i] = (k_u64)src;
        }
    }
}

static K_INLINE k_u32 *k_mover_fill(struct k_thread *k, struct k_mover *m, k_i32 stage) {
    (void)k;
    __syncwarp(); /* the last reads of the stage were plain loads */
    return (k_u32 *)(m->stages + (k_u64)stage * (k_u64)m->stage_bytes);
}

static K_INLINE void k_mover_filled(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
    __syncwarp();
}

static K_INLINE void k_mover_wait(struct k_thread *k, struct k_mover *m, k_i32 stage) {
    (void)k, (void)m, (void)stage;
}

static K_INLINE k_u64 k_mover_source(const struct k_mover *m, k_i32 stage) {
    k_u64 from = 0;
#pragma unroll
    for (k_i32 i = 0; i < K_MOVER_STAGES; i++) {
        if (i == stage) {
            from = m->src[i];
        }
    }
    return from;
}

static K_INLINE const void *k_mover_view(const struct k_mover *m, k_i32 stage) {
    return (const void *)k_mover_source(m, stage);
}

static K_INLINE void k_mover_gather(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                    const struct k_term *terms, k_i32 num, k_i32 from,
                                    k_i32 bytes) {
    (void)k, (void)m, (void)stage, (void)terms, (void)num, (void)from, (void)bytes;
}

static K_INLINE void k_mover_sum(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                 struct k_peer dst, k_i32 dtype, k_bool weighted, k_i32 bytes,
                                 const struct k_term *terms, k_i32 num) {
    (void)m, (void)stage;
    __syncwarp(); /* the lanes have written their terms */
    k_reduce(k, dst, dtype, weighted, bytes, terms, num);
}

/* The whole warp copies for one lane after the other. */
static K_INLINE void k_copy_for_lanes(struct k_thread *k, k_u64 from, struct k_peer dst,
                                      k_i32 bytes) {
    for (k_u32 left = __ballot_sync(0xffffffffu, dst.address != 0); left; left &= left - 1u) {
        const k_u64 to = __shfl_sync(0xffffffffu, dst.address, __ffs((int)left) - 1);
        k_i32 i = k->lane * 16;
        for (; i + 3 * 512 < bytes; i += 4 * 512) { /* four loads in flight */
            struct k_16 v0 = k_load16_any((const void *)(from + (k_u64)i));
            struct k_16 v1 = k_load16_any((const void *)(from + (k_u64)i + 512));
            struct k_16 v2 = k_load16_any((const void *)(from + (k_u64)i + 1024));
            struct k_16 v3 = k_load16_any((const void *)(from + (k_u64)i + 1536));
            k_store16(to + (k_u64)i, v0);
            k_store16(to + (k_u64)i + 512, v1);
            k_store16(to + (k_u64)i + 1024, v2);
            k_store16(to + (k_u64)i + 1536, v3);
        }
        for (; i < bytes; i += 512) {
            k_store16(to + (k_u64)i, k_load16_any((const void *)(from + (k_u64)i)));
        }
    }
}

static K_INLINE void k_mover_store(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                   struct k_peer dst, k_i32 bytes) {
    k_copy_for_lanes(k, k_mover_source(m, stage), dst, bytes);
}

static K_INLINE void k_mover_store_filled(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                          k_i32 from, struct k_peer dst, k_i32 bytes) {
    const k_u64 at = (k_u64)m->stages + (k_u64)stage * (k_u64)m->stage_bytes;
    k_copy_for_lanes(k, at + (k_u64)from, dst, bytes);
}

static K_INLINE void k_mover_commit(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
}

static K_INLINE void k_mover_retire(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)newest, (void)k, (void)m;
}

static K_INLINE void k_mover_settle(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)newest, (void)k, (void)m;
    __syncwarp(); /* plain stores: the release that follows waits for them */
}

static K_INLINE void k_mover_end(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
}

#endif
