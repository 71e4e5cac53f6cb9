/* SPDX-License-Identifier: MIT */
/*
 * The mover of sm_90 and later: bulk copies through a ring of stages in shared memory, by one lane
 * in, by every lane that has a destination out. Part of lang_cuda.h.
 */
#ifndef KERNEL_LANG_CUDA_TMA_H
#define KERNEL_LANG_CUDA_TMA_H

#include "kernel/lang_cuda_sum.h"

#define K_MOVER_STAGES 8
#define K_IN_PLACE 0

struct k_mover {
    k_u32 ring; /* shared address of stage 0 */
    k_u32 bars; /* shared address of the stages' barriers, 8 bytes each */
    k_i32 stage_bytes;
    k_u32 phases; /* a bit per stage */
};

/* The ring's first 128 bytes hold the barriers. */
static K_INLINE void k_mover_begin(struct k_thread *k, struct k_mover *m, void *ring,
                                   k_i32 stages, k_i32 stage_bytes) {
    /* Through a shuffle, so that it stays in a register: else it is found anew at each use. */
    m->bars = __shfl_sync(0xffffffffu, (k_u32)__cvta_generic_to_shared(ring), 0);
    m->ring = m->bars + (k_u32)K_RING_HEAD;
    m->stage_bytes = stage_bytes;
    m->phases = 0;
    if (k->lane == 0) {
        for (k_i32 i = 0; i < stages; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(m->bars + 8u * i)
                         : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncwarp();
}

static K_INLINE void k_mover_load(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                  const void *src, k_i32 bytes) {
    if (k->lane == 0) {
        k_u32 bar = m->bars + 8u * (k_u32)stage;
        k_u32 dst = m->ring + (k_u32)stage * (k_u32)m->stage_bytes;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
                     "r"(bytes)
                     : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1], %2, [%3];" ::"r"(dst),
                     "l"(src), "r"(bytes), "r"(bar)
                     : "memory");
    }
}

/* The stage was retired: its last stores have read it. A load may be writing another part. */
static K_INLINE k_u32 *k_mover_fill(struct k_thread *k, struct k_mover *m, k_i32 stage) {
    (void)k;
    __syncwarp();
    return (k_u32 *)__cvta_shared_to_generic(m->ring + (k_u32)stage * (k_u32)m->stage_bytes);
}

/*
 * What lanes have read and written in stages themselves is before the copies that follow. Reads,
 * too: a barrier alone orders only what goes through the generic proxy, so a copy into the stage
 * might overtake them (seen elsewhere as rows of a combine that were wrong now and then).
 */
static K_INLINE void k_mover_filled(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
}

static K_INLINE void k_mover_wait(struct k_thread *k, struct k_mover *m, k_i32 stage) {
    (void)k;
    k_u32 bar = m->bars + 8u * (k_u32)stage, parity = (m->phases >> stage) & 1u, done = 0;
    while (!done) { /* every lane, as every lane may store */
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(bar), "r"(parity)
                     : "memory");
    }
    m->phases ^= 1u << stage;
}

/* Each lane stores the stage to a place of its own, or, at address 0, nowhere. */
static K_INLINE void k_mover_store_filled(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                          k_i32 from, struct k_peer dst, k_i32 bytes) {
    (void)k;
    if (dst.address) {
        k_u32 src = m->ring + (k_u32)stage * (k_u32)m->stage_bytes + (k_u32)from;
        asm volatile(
            "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst.address),
            "r"(src), "r"(bytes)
            : "memory");
    }
}

static K_INLINE void k_mover_store(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                   struct k_peer dst, k_i32 bytes) {
    k_mover_store_filled(k, m, stage, 0, dst, bytes);
}

static K_INLINE void k_mover_commit(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* All stores but those of the newest `newest` (0 or 1) commits have read their stages. */
static K_INLINE void k_mover_retire(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)k, (void)m;
    if (newest) {
        asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    } else {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    __syncwarp();
}

/*
 * All stores but those of the newest `newest` commits are complete and may be published. Groups
 * are counted per thread and end in order; every lane commits as often as the others, with or
 * without a store, so the same number means the same pieces to all of them. Each lane waits for
 * its own stores, which makes them visible to it, and fences what they wrote from the async to
 * the generic proxy; __syncwarp then puts all of that before the release of the lane that
 * publishes. What is newer is not waited for and not covered. Beyond 3, more is waited for.
 */
static K_INLINE void k_mover_settle(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)k, (void)m;
    if (newest >= 3) {
        asm volatile("cp.async.bulk.wait_group 3;" ::: "memory");
    } else if (newest == 2) {
        asm volatile("cp.async.bulk.wait_group 2;" ::: "memory");
    } else if (newest == 1) {
        asm volatile("cp.async.bulk.wait_group 1;" ::: "memory");
    } else {
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    asm volatile("fence.proxy.async.global;" ::: "memory");
    __syncwarp();
}

static K_INLINE const void *k_mover_view(const struct k_mover *m, k_i32 stage) {
    return (const void *)__cvta_shared_to_generic(m->ring +
                                                  (k_u32)stage * (k_u32)m->stage_bytes);
}

/* A lane for each term, all on the stage's one barrier. Copies may complete before lane 0 has said
 * how much to expect: its arrival is still pending then. */
static K_INLINE void k_mover_gather(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                    const struct k_term *terms, k_i32 num, k_i32 from,
                                    k_i32 bytes) {
    const k_u32 bar = m->bars + 8u * (k_u32)stage;
    const k_u32 dst = m->ring + (k_u32)stage * (k_u32)m->stage_bytes;
    k_mover_filled(k, m); /* all lanes have read what the stage held, and written their terms */
    if (k->lane == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
                     "r"(num * bytes)
                     : "memory");
    }
#pragma unroll 1
    for (k_i32 j = k->lane; j < num; j += K_LANES) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1], %2, [%3];" ::"r"(dst + (k_u32)(j * bytes)),
                     "l"((k_u64)terms[j].row + (k_u64)from), "r"(bytes), "r"(bar)
                     : "memory");
    }
}

static K_INLINE void k_mover_end(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncwarp();
}

#define K_SUM_PIECES 2

static K_INLINE struct k_16 k_load16_shared(k_u32 p) {
    struct k_16 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(p)
                 : "memory");
    return v;
}

static K_INLINE void k_load_chunk(struct k_16 *v, k_u32 at, k_i32 pieces) {
#pragma unroll
    for (k_i32 p = 0; p < pieces; p++) {
        v[p] = k_load16_shared(at + (k_u32)(p * 512));
    }
}

/* A lane's 16 bytes of `pieces` times 512: the terms lie `stride` apart in shared memory. Two are
 * on their way at once. */
static K_INLINE void k_sum_chunk(k_u32 at, k_u64 dst, k_i32 dtype, k_bool weighted,
                                 k_i32 stride, const struct k_term *terms, k_i32 num,
                                 k_i32 pieces) {
    k_f32 acc[K_SUM_PIECES][8];
    struct k_16 v[K_SUM_PIECES], next[K_SUM_PIECES];
    k_i32 j = 0;
#pragma unroll
    for (k_i32 p = 0; p < pieces; p++) {
#pragma unroll
        for (k_i32 q = 0; q < 8; q++) {
            acc[p][q] = 0.0f;
        }
    }
#pragma unroll 1
    for (; j + 1 < num; j += 2) {
        k_load_chunk(v, at, pieces);
        k_load_chunk(next, at + (k_u32)stride, pieces);
        const k_f32 w = weighted ? terms[j].weight : 1.0f;
        const k_f32 next_w = weighted ? terms[j + 1].weight : 1.0f;
#pragma unroll
        for (k_i32 p = 0; p < pieces; p++) {
            k_add_piece(acc[p], v[p], dtype, weighted, w);
            k_add_piece(acc[p], next[p], dtype, weighted, next_w);
        }
        at += 2u * (k_u32)stride;
    }
    if (j < num) {
        k_load_chunk(v, at, pieces);
        const k_f32 w = weighted ? terms[j].weight : 1.0f;
#pragma unroll
        for (k_i32 p = 0; p < pieces; p++) {
            k_add_piece(acc[p], v[p], dtype, weighted, w);
        }
    }
#pragma unroll
    for (k_i32 p = 0; p < pieces; p++) {
        k_store16(dst + (k_u64)(p * 512), k_round_piece(acc[p], dtype));
    }
}

/* One body per type, as k_reduce_as. */
static K_INLINE void k_sum_as(k_i32 lane, k_u32 src, k_u64 dst, k_i32 dtype, k_bool weighted,
                              k_i32 bytes, const struct k_term *terms, k_i32 num) {
    k_i32 base = lane * 16;
#pragma unroll 1
    for (; base - lane * 16 + 512 * K_SUM_PIECES <= bytes; base += 512 * K_SUM_PIECES) {
        k_sum_chunk(src + (k_u32)base, dst + (k_u64)base, dtype, weighted, bytes, terms, num,
                    K_SUM_PIECES);
    }
#pragma unroll 1
    for (; base < bytes; base += 512) {
        k_sum_chunk(src + (k_u32)base, dst + (k_u64)base, dtype, weighted, bytes, terms, num,
                    1);
    }
}

/* What was gathered, by plain loads: the next gather into the stage begins with a fence. */
static K_INLINE void k_mover_sum(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                 struct k_peer dst, k_i32 dtype, k_bool weighted, k_i32 bytes,
                                 const struct k_term *terms, k_i32 num) {
    const k_u32 src = m->ring + (k_u32)stage * (k_u32)m->stage_bytes;
    if (dtype == K_BF16) {
        if (weighted) {
            k_sum_as(k->lane, src, dst.address, K_BF16, 1, bytes, terms, num);
        } else {
            k_sum_as(k->lane, src, dst.address, K_BF16, 0, bytes, terms, num);
        }
    } else if (dtype == K_F16) {
        k_sum_as(k->lane, src, dst.address, K_F16, 1, bytes, terms, num);
    } else {
        k_sum_as(k->lane, src, dst.address, K_F32, 1, bytes, terms, num);
    }
}

#endif
