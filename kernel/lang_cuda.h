/* SPDX-License-Identifier: MIT */
/*
 * The kernel language on NVIDIA GPUs, for NVRTC (no headers available) and nvcc, sm_80 and later.
 * All assembly is here. Hand-offs follow the PTX memory model: payload by generic stores or by
 * bulk copies that were waited for, then a release at system scope by one lane after __syncwarp
 * (release is cumulative); the reader polls with relaxed loads, then one fence at system scope
 * and a proxy fence, since what it reads next may be read by bulk copies.
 *
 * Rows move by TMA bulk copies through a ring in shared memory on sm_90 and later; with
 * K_MOVER_GENERIC, and on sm_80, by 16-byte loads and stores of the whole warp.
 */
#ifndef KERNEL_LANG_CUDA_H
#define KERNEL_LANG_CUDA_H

#include "kernel/abi.h"

#define K_LANES 32
#define K_UNROLL _Pragma("unroll")
#define K_ROLLED _Pragma("unroll 1")
#define K_INLINE __device__ __forceinline__
#define K_FN __device__ __forceinline__
#define K_COLD                                                                                 \
    __device__ __noinline__ /* takes no struct k_thread: that must stay in registers */
#if !defined(K_MOVER_GENERIC) && __CUDA_ARCH__ >= 900
#define K_MOVER_TMA 1
#endif
#if defined(K_BLOCK_WARPS)
#define K_BLOCK_THREADS (K_BLOCK_WARPS * 32)
#elif defined(K_MOVER_TMA)
#define K_BLOCK_THREADS 512
#else
#define K_BLOCK_THREADS 256 /* rows pass through registers */
#endif
typedef bool k_bool;

struct k_thread {
    k_i32 block, num_blocks, warp, num_warps, lane;
    k_i32 kind;
    k_u32 epoch;
    const struct k_group *g;
    const struct k_board *board;
};

#define K_KERNEL(name, args_t)                                                                 \
    static K_INLINE void name##_body(struct k_thread *k, const struct args_t *a);              \
    extern "C" __global__ void __launch_bounds__(K_BLOCK_THREADS, 1)                           \
        ep_##name(const __grid_constant__ struct args_t args) {                                \
        struct k_thread thread;                                                                \
        thread.block = (k_i32)blockIdx.x;                                                      \
        thread.num_blocks = (k_i32)gridDim.x;                                                  \
        thread.warp = (k_i32)(threadIdx.x >> 5);                                               \
        thread.num_warps = (k_i32)(blockDim.x >> 5);                                           \
        thread.lane = (k_i32)(threadIdx.x & 31u);                                              \
        name##_body(&thread, &args);                                                           \
    }                                                                                          \
    static K_INLINE void name##_body(struct k_thread *k, const struct args_t *a)

extern __shared__ __align__(128) k_u8 k_shared_memory[];

static K_INLINE void *k_shared(struct k_thread *k) {
    (void)k;
    return k_shared_memory;
}

static K_INLINE k_u64 k_shared_bytes(struct k_thread *k) {
    k_u32 bytes;
    (void)k;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

static K_INLINE k_i64 k_now(void) {
    k_u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return (k_i64)t;
}

/* ---- words ---------------------------------------------------------------------------------- */

static K_INLINE k_u64 k_peek(const k_u64 *p) {
    k_u64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

static K_INLINE void k_poke(k_u64 *p, k_u64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

static K_INLINE k_u64 k_add(k_u64 *p, k_u64 v) {
    k_u64 old;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
                 : "=l"(old)
                 : "l"(p), "l"(v)
                 : "memory");
    return old;
}

static K_INLINE void k_tally(k_u64 *p, k_u64 v) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

/* Lane 0 takes for the warp. */
static K_INLINE k_u64 k_take(struct k_thread *k, k_u64 *p) {
    k_u64 old = 0;
    if (k->lane == 0) {
        asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], 1;"
                     : "=l"(old)
                     : "l"(p)
                     : "memory");
    }
    return __shfl_sync(0xffffffffu, old, 0);
}

static K_INLINE k_bool k_claim(k_u64 *p) {
    k_u64 old;
    asm volatile("atom.acq_rel.gpu.global.cas.b64 %0, [%1], 0, 1;"
                 : "=l"(old)
                 : "l"(p)
                 : "memory");
    return old == 0;
}

static K_INLINE void k_lower(k_u64 *p, k_u64 v) {
    asm volatile("red.relaxed.gpu.global.min.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

static K_INLINE void k_max(k_u64 *p, k_u64 v) {
    asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

static K_INLINE void k_post(struct k_peer at, k_u64 word) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at.address), "l"(word) : "memory");
}

static K_INLINE void k_publish(struct k_peer at, k_u64 word) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at.address), "l"(word) : "memory");
}

/* System scope: the host may read the word as well. */
static K_INLINE void k_publish_local(k_u64 *at, k_u64 word) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(word) : "memory");
}

static K_INLINE k_u64 k_poll(const k_u64 *p) {
    return k_peek(p);
}

/* What the word's writer did before releasing it happens before what follows. No fence is needed
 * behind this, and none would be cheap: one also waits for this warp's own stores. */
static K_INLINE k_u64 k_acquire(const k_u64 *p) {
    k_u64 v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

static K_INLINE void k_syncwarp(struct k_thread *k) {
    (void)k;
    __syncwarp();
}

static K_INLINE k_bool k_all(struct k_thread *k, k_bool ok) {
    (void)k;
    return __all_sync(0xffffffffu, ok) != 0;
}

static K_INLINE k_u32 k_scan(struct k_thread *k, k_u32 x, k_u32 *total) {
    k_u32 sum = x;
#pragma unroll
    for (k_i32 d = 1; d < 32; d *= 2) {
        const k_u32 before = __shfl_up_sync(0xffffffffu, sum, (unsigned)d);
        sum += k->lane >= d ? before : 0u;
    }
    *total = __shfl_sync(0xffffffffu, sum, 31);
    return sum - x;
}

/* ---- masks of lanes -------------------------------------------------------------------------- */

static K_INLINE k_u32 k_ballot(struct k_thread *k, k_bool yes) {
    (void)k;
    return __ballot_sync(0xffffffffu, yes);
}

static K_INLINE k_u32 k_same(struct k_thread *k, k_u32 x) {
    (void)k;
    return __match_any_sync(0xffffffffu, x);
}

static K_INLINE k_u32 k_below(struct k_thread *k) {
    return (1u << k->lane) - 1u;
}

static K_INLINE k_i32 k_count(k_u32 mask) {
    return __popc(mask);
}

static K_INLINE k_u32 k_most(struct k_thread *k, k_u32 x) {
    (void)k;
    return __reduce_max_sync(0xffffffffu, x);
}

/* After polling by any lanes: what they have acquired goes on to the whole warp, and to the bulk
 * copies that it asks for. */
static K_INLINE void k_acquired(struct k_thread *k) {
    (void)k;
    __syncwarp();
#if defined(K_MOVER_TMA)
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

/* ---- waiting -------------------------------------------------------------------------------- */

struct k_spinner {
    k_i64 since, look; /* when the wait began; how long it may last before the next look */
    k_u32 turns;
};

static K_INLINE k_bool k_pause(struct k_spinner *s) {
    s->turns++;
    if (s->turns > 1024) {
        __nanosleep(100);
    }
    return (s->turns & 63u) == 0;
}

static K_INLINE k_bool k_barrier(struct k_thread *k, k_bool ok) {
    (void)k;
    return __syncthreads_and(ok) != 0;
}

/* ---- rows ----------------------------------------------------------------------------------- */

#if defined(K_MOVER_TMA)
#define K_MOVER_STAGES 8
#else
#define K_MOVER_STAGES 4 /* each is an address in registers */
#endif

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

/* The same from global or shared memory. */
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

static K_INLINE void k_reduce(struct k_thread *k, struct k_peer dst, k_i32 dtype,
                              k_bool weighted, k_i32 bytes, const struct k_term *terms,
                              k_i32 num);

#if defined(K_MOVER_TMA)
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

static K_INLINE void k_mover_filled(struct k_thread *k, struct k_mover *m) {
    (void)k;
    (void)m;
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
    (void)k;
    (void)m;
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* All stores but those of the newest `newest` (0 or 1) commits have read their stages. */
static K_INLINE void k_mover_retire(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)k;
    (void)m;
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
    (void)k;
    (void)m;
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

static K_INLINE void k_mover_drain(struct k_thread *k, struct k_mover *m) {
    (void)k;
    (void)m;
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
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
    __syncwarp(); /* all lanes have read what the stage held, and written their terms */
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
    k_mover_drain(k, m);
}

#else
#define K_IN_PLACE 1

struct k_mover {
    k_u64 src[K_MOVER_STAGES];
    k_u8 *stages;
    k_i32 stage_bytes;
};

static K_INLINE void k_mover_begin(struct k_thread *k, struct k_mover *m, void *ring,
                                   k_i32 stages, k_i32 stage_bytes) {
    (void)k;
    (void)stages;
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
    (void)k;
    (void)m;
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
    (void)newest;
    (void)k, (void)m;
}

static K_INLINE void k_mover_settle(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)newest;
    (void)k, (void)m;
    __syncwarp(); /* plain stores: the release that follows waits for them */
}

static K_INLINE void k_mover_drain(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
    __syncwarp();
}

static K_INLINE void k_mover_end(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
}
#endif

/* ---- arithmetic ----------------------------------------------------------------------------- */

static K_INLINE k_u32 k_bits(k_f32 x) {
    return __float_as_uint(x);
}

static K_INLINE k_f32 k_float(k_u32 u) {
    return __uint_as_float(u);
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

#if defined(K_MOVER_TMA)
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

/* What was gathered, by plain loads: the next gather into the stage begins with a __syncwarp. */
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
