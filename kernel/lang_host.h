/* SPDX-License-Identifier: MIT */
/*
 * The kernel language on the host: a warp is one thread with one lane, a block a team of such
 * threads. Hand-offs are release stores and acquire loads on the word itself, because
 * ThreadSanitizer does not model free-standing fences; that is what makes it a checker of the
 * protocol. src/run creates the threads; with K_LATE_MOVERS (check builds) rows are copied late,
 * so that a missing wait, retire or settle is a data race it can see, and words are told late.
 *
 * K_WEAKEN_PUBLISH, K_SKIP_WAIT and K_SKIP_SETTLE break the language on purpose: tests that must
 * fail use them to prove that the checker works.
 */
#ifndef KERNEL_LANG_HOST_H
#define KERNEL_LANG_HOST_H

#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "kernel/abi.h"

#define K_LANES 1
#define K_UNROLL
#define K_ROLLED
#define K_FN __attribute__((unused))
#define K_COLD __attribute__((unused, noinline))
#define K_INLINE inline __attribute__((always_inline, unused))
typedef bool k_bool;

/* A block: shared by its warps; allocated and zeroed by src/run before the kernel starts. */
struct k_team {
    k_u32 arrived, generation;
    k_u32 bad[2]; /* by generation parity */
    void *shared;
};

struct k_thread {
    k_i32 block, num_blocks, warp, num_warps, lane;
    k_i32 kind;
    k_u32 epoch;
    const struct k_group *g;
    struct k_team *team;
    const struct k_hooks *hooks; /* NULL: what they would be told is left on the board */
    struct k_mask_thread mask;
};

typedef void (*k_entry_fn)(struct k_thread *k, const void *args);

#define K_KERNEL(space, name, args_t)                                                          \
    void k_entry_##args_t(struct k_thread *k, const void *args);                               \
    static void name##_body(struct k_thread *k, const struct args_t *a);                       \
    void k_entry_##args_t(struct k_thread *k, const void *args) {                              \
        name##_body(k, (const struct args_t *)args);                                           \
    }                                                                                          \
    static void name##_body(struct k_thread *k, const struct args_t *a)

static K_INLINE void *k_shared(struct k_thread *k) {
    return k->team->shared;
}

/* Memory is all the same here: nothing is put there for being nearer. */
static K_INLINE k_u64 k_shared_bytes(struct k_thread *k) {
    (void)k;
    return 0;
}

static K_INLINE void k_tally(k_u32 *sum) {
    __atomic_fetch_add(sum, 1, __ATOMIC_RELAXED);
}

/* The monotonic clock, which src/base/time.c reads, too. */
static K_INLINE k_i64 k_now(void) {
    struct timespec now = {0, 0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (k_i64)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- words ---------------------------------------------------------------------------------- */

static K_INLINE k_u64 k_load(const k_u64 *p) {
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static K_INLINE void k_store(k_u64 *p, k_u64 v) {
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}

/* Atomically adds and returns the old value; orders like a release and an acquire. */
static K_INLINE k_u64 k_fetch_add(k_u64 *p, k_u64 v) {
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}

/* Adds to a sum that nobody waits for: orders nothing. */
static K_INLINE void k_add(k_u64 *p, k_u64 v) {
    __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}

/* Adds to a sum; whoever sees it sees what was done before. */
static K_INLINE void k_add_last(k_u64 *p, k_u64 v) {
    __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
}

/* The next number of a counter that all warps of a rank share; orders nothing. */
static K_INLINE k_u64 k_take_next(struct k_thread *k, k_u64 *p) {
    (void)k;
    return __atomic_fetch_add(p, 1, __ATOMIC_RELAXED);
}

/* True for the first caller. */
static K_INLINE k_bool k_claim(k_u64 *p) {
    k_u64 zero = 0;
    return __atomic_compare_exchange_n(p, &zero, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* *p = max(*p, v), atomically; returns what it was. */
static K_INLINE k_u64 k_raise_as(k_u64 *p, k_u64 v, int order) {
    k_u64 old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, old < v ? v : old, false, order,
                                        __ATOMIC_RELAXED)) {
    }
    return old;
}

static K_INLINE void k_raise_to(k_u64 *p, k_u64 v) {
    k_raise_as(p, v, __ATOMIC_RELAXED);
}

/* Orders like a full fence, and so in one order with those of all. */
static K_INLINE k_u64 k_raise_old(k_u64 *p, k_u64 v) {
    return k_raise_as(p, v, __ATOMIC_SEQ_CST);
}

/* In check builds a warp may take its time before it tells something, by words in any order, so that
 * others come to find what it did before, and not yet this. */
#if defined(K_LATE_MOVERS)
void k_late_hesitate(void);
#define K_HESITATE() k_late_hesitate()
#else
#define K_HESITATE()
#endif

static K_INLINE void k_post(struct k_peer at, k_u64 word) {
    K_HESITATE();
    __atomic_store_n((k_u64 *)at.address, word, __ATOMIC_RELAXED);
}

#if defined(K_WEAKEN_PUBLISH)
#define K_PUBLISH_ORDER __ATOMIC_RELAXED
#else
#define K_PUBLISH_ORDER __ATOMIC_RELEASE
#endif

static K_INLINE void k_publish(struct k_peer at, k_u64 word) {
    K_HESITATE();
    __atomic_store_n((k_u64 *)at.address, word, K_PUBLISH_ORDER);
}

static K_INLINE void k_publish_four(struct k_peer at, k_u64 w0, k_u64 w1, k_u64 w2, k_u64 w3) {
    const k_u64 words[4] = {w0, w1, w2, w3};
    for (k_u64 i = 0; i < 4; i++) {
        const struct k_peer next = {at.address + 8 * i};
        k_publish(next, words[i]);
    }
}

static K_INLINE void k_publish_local(k_u64 *at, k_u64 word) {
    K_HESITATE();
    __atomic_store_n(at, word, __ATOMIC_RELEASE);
}

static K_INLINE k_u64 k_acquire(const k_u64 *p) {
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static K_INLINE k_bool k_all(struct k_thread *k, k_bool ok) {
    (void)k;
    return ok;
}

static K_INLINE k_u32 k_scan(struct k_thread *k, k_u32 x, k_u32 *total) {
    (void)k;
    *total = x;
    return 0;
}

/* ---- masks of lanes: of the only one --------------------------------------------------------- */

static K_INLINE k_u32 k_ballot(struct k_thread *k, k_bool yes) {
    (void)k;
    return yes;
}

static K_INLINE k_u32 k_same(struct k_thread *k, k_u32 x) {
    (void)k, (void)x;
    return 1;
}

static K_INLINE k_u32 k_below(struct k_thread *k) {
    (void)k;
    return 0;
}

static K_INLINE k_i32 k_count(k_u32 mask) {
    return (k_i32)(mask & 1u);
}

static K_INLINE k_u32 k_most(struct k_thread *k, k_u32 x) {
    (void)k;
    return x;
}

static K_INLINE k_u32 k_sum(struct k_thread *k, k_u32 x) {
    (void)k;
    return x;
}

static K_INLINE k_u32 k_from(struct k_thread *k, k_u32 x, k_i32 lane) {
    (void)k, (void)lane;
    return x;
}

static K_INLINE k_i32 k_lowest(k_u64 mask) {
    return __builtin_ctzll(mask);
}

/* After polling: what the words announced is visible; here the load was an acquire. */
static K_INLINE void k_acquired(struct k_thread *k) {
    (void)k;
}

static K_INLINE void k_syncwarp(struct k_thread *k) {
    (void)k;
}

/* ---- waiting -------------------------------------------------------------------------------- */

struct k_spinner {
    k_i64 since, look; /* when the wait began; how long it may last before the next look */
    k_u32 turns;
    k_i64 last;   /* when it last looked at the clock */
    k_i64 idle;   /* since when it leaves the core to others */
    k_u64 ran;    /* what a CUDA rank's host said when it looked first */
    k_bool again; /* it was granted the time once more (mask.h) */
    k_bool sure;  /* what is awaited was looked at since a reason was found to end the wait */
};

/* How long a wait yields; then it naps, for a part of what it has lasted, in these bounds. */
#define K_YIELD_NS 300000
#define K_NAP_NS 50000
#define K_MOST_NAP_NS 1000000

/*
 * Passes a moment; true when it is time to look at the clock. Yields early, because ranks may
 * outnumber cores by far, and sleeps once a wait is long: where many threads wait on few cores their
 * yields and short naps are what keeps those busy that they wait for.
 */
static K_INLINE k_bool k_pause(struct k_spinner *s) {
    s->turns++;
    if (s->turns < 64) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        return false;
    }
    const k_i64 now = k_now();
    s->idle = s->idle ? s->idle : now;
    if (now - s->idle < K_YIELD_NS) {
        sched_yield();
        return (s->turns & 31) == 0;
    }
    const k_i64 part = (now - s->idle) / 8;
    struct timespec nap = {0, part < K_NAP_NS        ? K_NAP_NS
                              : part < K_MOST_NAP_NS ? part
                                                     : K_MOST_NAP_NS};
    nanosleep(&nap, NULL);
    return true;
}

/* Naps are far shorter, also where ranks outnumber cores. The more of the deadline one look can
 * count, the more a wait loses each time that its process is stopped. */
#define K_MOST_STEP_NS 250000000

/*
 * How long the wait has lasted at time `now`. Who looks at the clock much later than it meant to did
 * not run: it was stopped, perhaps with all its peers, and is not late for that. Such a step counts
 * for a part of the deadline only; not for nothing, so that a wait ends however rarely it may run.
 */
static inline __attribute__((unused)) k_i64 k_waited(struct k_spinner *s, k_i64 now,
                                                     k_i64 timeout_ns) {
    const k_i64 most = timeout_ns / 3 < K_MOST_STEP_NS ? timeout_ns / 3 : K_MOST_STEP_NS;
    if (s->since == 0) {
        s->since = now;
    } else if (now - s->last > most) {
        s->since += now - s->last - most;
    }
    s->last = now;
    return now - s->since;
}

static inline __attribute__((unused)) k_bool k_barrier(struct k_thread *k, k_bool ok) {
    struct k_team *t = k->team;
    if (k->num_warps == 1) {
        return ok;
    }
    k_u32 gen = __atomic_load_n(&t->generation, __ATOMIC_ACQUIRE);
    if (!ok) {
        __atomic_store_n(&t->bad[gen & 1], 1, __ATOMIC_RELAXED);
    }
    if (__atomic_fetch_add(&t->arrived, 1, __ATOMIC_ACQ_REL) == (k_u32)k->num_warps - 1) {
        __atomic_store_n(&t->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&t->bad[(gen + 1) & 1], 0, __ATOMIC_RELAXED);
        __atomic_store_n(&t->generation, gen + 1, __ATOMIC_RELEASE);
    } else {
        struct k_spinner s = {0};
        while (__atomic_load_n(&t->generation, __ATOMIC_ACQUIRE) == gen) {
            k_pause(&s); /* every warp of the block arrives: its own waits have deadlines */
        }
    }
    return __atomic_load_n(&t->bad[gen & 1], __ATOMIC_RELAXED) == 0;
}

/* ---- rows ----------------------------------------------------------------------------------- */

#define K_MOVER_STAGES 8

/* One summand of a reduction: a row and how often it counts. */
struct k_term {
    const void *row;
    k_f32 weight;
    k_i32 pad;
};

static K_INLINE void k_reduce(struct k_thread *k, struct k_peer dst, k_i32 dtype,
                              k_bool weighted, k_i32 bytes, const struct k_term *terms,
                              k_i32 num);

/* A check build brings its own mover: K_LATE_MOVERS is the path of the header. */
#if defined(K_LATE_MOVERS)
#define K_QUOTED_AS_IS(path) #path
#define K_QUOTED(path) K_QUOTED_AS_IS(path)
#include K_QUOTED(K_LATE_MOVERS)
#else
#define K_IN_PLACE 1

struct k_mover {
    const void *src[K_MOVER_STAGES];
    k_u8 *ring;
    k_i32 stage_bytes;
};

static K_INLINE void k_mover_begin(struct k_thread *k, struct k_mover *m, void *ring,
                                   k_i32 stages, k_i32 stage_bytes) {
    (void)k, (void)stages;
    m->ring = (k_u8 *)ring + K_RING_HEAD;
    m->stage_bytes = stage_bytes;
}

static K_INLINE void k_mover_load(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                  const void *src, k_i32 bytes) {
    (void)k, (void)bytes;
    m->src[stage] = src;
}

/* The memory of a stage, for the warp's lanes to write what is not loaded; then filled, then
 * store_filled. */
static K_INLINE k_u32 *k_mover_fill(struct k_thread *k, struct k_mover *m, k_i32 stage) {
    (void)k;
    return (k_u32 *)(void *)(m->ring + (size_t)stage * (size_t)m->stage_bytes);
}

static K_INLINE void k_mover_filled(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
}

static K_INLINE void k_mover_wait(struct k_thread *k, struct k_mover *m, k_i32 stage) {
    (void)k, (void)m, (void)stage;
}

static K_INLINE void k_mover_store(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                   struct k_peer dst, k_i32 bytes) {
    (void)k;
    if (dst.address) {
        memcpy((void *)dst.address, m->src[stage], (size_t)bytes);
    }
}

/* What the lanes have written from byte `from` of the stage on. */
static K_INLINE void k_mover_store_filled(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                          k_i32 from, struct k_peer dst, k_i32 bytes) {
    (void)k;
    if (dst.address) {
        const k_u8 *at = m->ring + (size_t)stage * (size_t)m->stage_bytes + from;
        memcpy((void *)dst.address, at, (size_t)bytes);
    }
}

static K_INLINE void k_mover_commit(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
}

static K_INLINE void k_mover_retire(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)newest, (void)k, (void)m;
}

static K_INLINE void k_mover_settle(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)newest, (void)k, (void)m;
}

/* What was loaded or filled, for the lanes to read. */
static K_INLINE const void *k_mover_view(const struct k_mover *m, k_i32 stage) {
    return m->src[stage];
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
    k_reduce(k, dst, dtype, weighted, bytes, terms, num);
}

static K_INLINE void k_mover_end(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
}
#endif

/* ---- arithmetic ----------------------------------------------------------------------------- */

static K_INLINE k_u32 k_bits(k_f32 x) {
    k_u32 u;
    memcpy(&u, &x, 4);
    return u;
}

static K_INLINE k_f32 k_float(k_u32 u) {
    k_f32 x;
    memcpy(&x, &u, 4);
    return x;
}

static K_INLINE k_f32 k_from_bf16(k_u16 h) {
    return k_float((k_u32)h << 16);
}

/* Round to nearest even; a NaN becomes 0x7fff, as the hardware conversion does. */
static K_INLINE k_u16 k_to_bf16(k_f32 x) {
    k_u32 u = k_bits(x);
    k_u32 r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (k_u16)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : r);
}

static K_INLINE k_f32 k_from_f16(k_u16 h) {
    /* The exponent is rebased by a multiplication, which also makes denormals right. */
    k_u32 sign = (k_u32)(h & 0x8000u) << 16, mag = (k_u32)(h & 0x7fffu) << 13;
    k_f32 x = k_float(mag) * k_float(0x77800000u); /* 2^112 */
    k_u32 u = mag >= 0x0f800000u ? mag | 0x7f800000u : k_bits(x);
    return k_float(sign | u);
}

static K_INLINE k_u16 k_to_f16(k_f32 f) {
    k_u32 u = k_bits(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) {
        return 0x7fff;
    }
    if (u >= 0x47800000u) {
        return (k_u16)(sign | 0x7c00u);
    }
    if (u < 0x38800000u) { /* denormal: let the float adder round at the right bit */
        k_f32 d = k_float(u) + 0.5f;
        return (k_u16)(sign | (k_bits(d) - 0x3f000000u));
    }
    k_u32 r = u - 0x38000000u; /* rebias; a carry of the rounding may reach infinity, rightly */
    r = (r + 0xfffu + ((r >> 13) & 1u)) >> 13;
    return (k_u16)(sign | r);
}

#define K_REDUCE_CHUNK 256

static inline __attribute__((unused)) void k_reduce_chunk(k_u8 *dst, k_i32 dtype,
                                                          const struct k_term *terms, k_i32 num,
                                                          k_i32 from, k_i32 n) {
    k_f32 acc[K_REDUCE_CHUNK];
    for (k_i32 i = 0; i < n; i++) {
        acc[i] = 0.0f;
    }
    for (k_i32 j = 0; j < num; j++) {
        const k_f32 w = terms[j].weight;
        const k_u16 *h = (const k_u16 *)terms[j].row + from;
        const k_f32 *f = (const k_f32 *)terms[j].row + from;
        if (dtype == K_BF16) {
            for (k_i32 i = 0; i < n; i++) {
                acc[i] += k_from_bf16(h[i]) * w;
            }
        } else if (dtype == K_F16) {
            for (k_i32 i = 0; i < n; i++) {
                acc[i] += k_from_f16(h[i]) * w;
            }
        } else {
            for (k_i32 i = 0; i < n; i++) {
                acc[i] += f[i] * w;
            }
        }
    }
    k_u16 *oh = (k_u16 *)dst + from;
    k_f32 *of = (k_f32 *)dst + from;
    if (dtype == K_BF16) {
        for (k_i32 i = 0; i < n; i++) {
            oh[i] = k_to_bf16(acc[i]);
        }
    } else if (dtype == K_F16) {
        for (k_i32 i = 0; i < n; i++) {
            oh[i] = k_to_f16(acc[i]);
        }
    } else {
        for (k_i32 i = 0; i < n; i++) {
            of[i] = acc[i];
        }
    }
}

/* dst = round(0 + terms[0] * w0 + terms[1] * w1 + ...), elementwise, in that order. `weighted`
 * says that some weight is not 1. */
static K_INLINE void k_reduce(struct k_thread *k, struct k_peer dst, k_i32 dtype,
                              k_bool weighted, k_i32 bytes, const struct k_term *terms,
                              k_i32 num) {
    (void)k, (void)weighted;
    k_i32 n = dtype == K_F32 ? bytes / 4 : bytes / 2;
    for (k_i32 i = 0; i < n; i += K_REDUCE_CHUNK) {
        k_reduce_chunk((k_u8 *)dst.address, dtype, terms, num, i,
                       n - i < K_REDUCE_CHUNK ? n - i : K_REDUCE_CHUNK);
    }
}

/* All lanes of the warp fill n bytes (a multiple of 16) of own memory with zeros. */
static K_INLINE void k_zero(struct k_thread *k, void *dst, k_i32 bytes) {
    (void)k;
    memset(dst, 0, (size_t)bytes);
}

#include "kernel/lang_host_cast.h"

/* A plain store to an arena; ordered by the next k_publish of this warp. */
static K_INLINE void k_store_u32(struct k_peer at, k_u32 v) {
    *(k_u32 *)at.address = v;
}

#endif
