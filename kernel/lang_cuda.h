/* SPDX-License-Identifier: MIT */
/*
 * The kernel language on NVIDIA GPUs, for NVRTC (no headers available) and nvcc, sm_80 and later.
 * All assembly is here. Hand-offs follow the PTX memory model: payload by generic stores or by
 * bulk copies that were waited for, then a release at system scope by one lane after __syncwarp
 * (release is cumulative); the reader polls with acquire loads, and a proxy fence follows, since
 * what it reads next may be read by bulk copies.
 *
 * Here: threads, words, waiting. Sums are in lang_cuda_sum.h, the movers of rows in
 * lang_cuda_tma.h and, for sm_80 and K_MOVER_GENERIC, lang_cuda_plain.h.
 */
#ifndef KERNEL_LANG_CUDA_H
#define KERNEL_LANG_CUDA_H

#include "kernel/abi.h"

#define K_LANES 32
#define K_UNROLL _Pragma("unroll")
#define K_ROLLED _Pragma("unroll 1")
#define K_INLINE __device__ __forceinline__
#define K_FN __device__ __forceinline__
/* A cold function takes no struct k_thread: that must stay in registers. */
#define K_COLD __device__ __noinline__
#define K_HESITATE() /* of hosts */
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
#if !defined(K_BLOCKS_PER_SM)
#define K_BLOCKS_PER_SM 1
#endif
typedef bool k_bool;

struct k_thread {
    k_i32 block, num_blocks, warp, num_warps, lane;
    k_i32 kind;
    k_u32 epoch;
    const struct k_group *g;
    struct k_mask_thread mask;
};

#define K_KERNEL(space, name, args_t)                                                          \
    static K_INLINE void name##_body(struct k_thread *k, const struct args_t *a);              \
    namespace deep_ep {                                                                        \
    namespace space {                                                                          \
    __global__ void __launch_bounds__(K_BLOCK_THREADS, K_BLOCKS_PER_SM)                        \
        name(const __grid_constant__ struct args_t args) {                                     \
        struct k_thread thread;                                                                \
        thread.block = (k_i32)blockIdx.x;                                                      \
        thread.num_blocks = (k_i32)gridDim.x;                                                  \
        thread.warp = (k_i32)(threadIdx.x >> 5);                                               \
        thread.num_warps = (k_i32)(blockDim.x >> 5);                                           \
        thread.lane = (k_i32)(threadIdx.x & 31u);                                              \
        name##_body(&thread, &args);                                                           \
    }                                                                                          \
    }                                                                                          \
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

/* In shared memory. */
static K_INLINE void k_tally(k_u32 *sum) {
    asm volatile(
        "red.relaxed.cta.shared.add.u32 [%0], 1;" ::"r"((k_u32)__cvta_generic_to_shared(sum))
        : "memory");
}

static K_INLINE k_i64 k_now(void) {
    k_u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return (k_i64)t;
}

/* ---- words ---------------------------------------------------------------------------------- */

static K_INLINE k_u64 k_load(const k_u64 *p) {
    k_u64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

static K_INLINE void k_store(k_u64 *p, k_u64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

static K_INLINE k_u64 k_fetch_add(k_u64 *p, k_u64 v) {
    k_u64 old;
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
                 : "=l"(old)
                 : "l"(p), "l"(v)
                 : "memory");
    return old;
}

static K_INLINE void k_add(k_u64 *p, k_u64 v) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

static K_INLINE void k_add_last(k_u64 *p, k_u64 v) {
    asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

/* Lane 0 takes for the warp. */
static K_INLINE k_u64 k_take_next(struct k_thread *k, k_u64 *p) {
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

static K_INLINE void k_raise_to(k_u64 *p, k_u64 v) {
    asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

static K_INLINE k_u64 k_raise_old(k_u64 *p, k_u64 v) {
    k_u64 old;
    asm volatile("atom.acq_rel.gpu.global.max.u64 %0, [%1], %2;\n\tfence.sc.sys;"
                 : "=l"(old)
                 : "l"(p), "l"(v)
                 : "memory");
    return old;
}

static K_INLINE void k_post(struct k_peer at, k_u64 word) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at.address), "l"(word) : "memory");
}

static K_INLINE void k_publish(struct k_peer at, k_u64 word) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at.address), "l"(word) : "memory");
}

/* One fence in front of all: a releasing store behind the others would wait until those have
 * arrived, a round trip to the peer. */
static K_INLINE void k_publish_four(struct k_peer at, k_u64 w0, k_u64 w1, k_u64 w2, k_u64 w3) {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at.address), "l"(w0) : "memory");
    asm volatile("st.relaxed.sys.global.u64 [%0+8], %1;" ::"l"(at.address), "l"(w1) : "memory");
    asm volatile("st.relaxed.sys.global.u64 [%0+16], %1;" ::"l"(at.address), "l"(w2)
                 : "memory");
    asm volatile("st.relaxed.sys.global.u64 [%0+24], %1;" ::"l"(at.address), "l"(w3)
                 : "memory");
}

/* System scope: the host may read the word as well. */
static K_INLINE void k_publish_local(k_u64 *at, k_u64 word) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(word) : "memory");
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

static K_INLINE k_u32 k_sum(struct k_thread *k, k_u32 x) {
    (void)k;
    return __reduce_add_sync(0xffffffffu, x);
}

static K_INLINE k_u32 k_from(struct k_thread *k, k_u32 x, k_i32 lane) {
    (void)k;
    return __shfl_sync(0xffffffffu, x, lane);
}

static K_INLINE k_i32 k_lowest(k_u64 mask) {
    return __ffsll((long long)mask) - 1;
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
    k_u64 ran;    /* what the host said when it looked first */
    k_bool again; /* it was granted the time once more (mask.h) */
    k_bool sure;  /* what is awaited was looked at since a reason was found to end the wait */
};

static K_INLINE k_bool k_pause(struct k_spinner *s) {
    s->turns++;
    if (s->turns > 1024) {
        __nanosleep(100);
    }
    return (s->turns & 63u) == 0;
}

/* How long the wait has lasted at time `now`. */
static K_INLINE k_i64 k_waited(struct k_spinner *s, k_i64 now, k_i64 timeout_ns) {
    (void)timeout_ns;
    if (s->since == 0) {
        s->since = now;
    }
    return now - s->since;
}

static K_INLINE k_bool k_barrier(struct k_thread *k, k_bool ok) {
    (void)k;
    return __syncthreads_and(ok) != 0;
}

#include "kernel/lang_cuda_sum.h"

#if defined(K_MOVER_TMA)
#include "kernel/lang_cuda_tma.h"
#else
#include "kernel/lang_cuda_plain.h"
#endif

#endif
