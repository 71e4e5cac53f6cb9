/* SPDX-License-Identifier: MIT */
/*
 * The row mover of check builds, in place of the host's own (kernel/lang_host.h includes it where
 * K_LATE_MOVERS names it). Loads are made by one helper; stores by two, one that reads the stage
 * and one that writes what the first has read; all of it some time after it was asked for, and
 * nothing but wait, retire, settle and the mover's end orders it with the warp. ThreadSanitizer
 * then sees a missing one as a data race. tests/late/late.c says what a helper is.
 */
#ifndef TESTS_LATE_MOVER_H
#define TESTS_LATE_MOVER_H

enum k_late_helper { K_LATE_LOADER, K_LATE_READER, K_LATE_WRITER, K_LATE_HELPERS };

/* The helpers of the calling thread, which have nothing to do. */
struct k_late;
struct k_late *k_late_begin(void);
/* Posts a load to the loader or a store to the reader. A store's number is the same for reader and
 * writer; number 0 is none, and has always been made. */
k_u64 k_late_post(struct k_late *late, enum k_late_helper who, void *dst, const void *src,
                  size_t bytes);
void k_late_await(struct k_late *late, enum k_late_helper who, k_u64 ticket);
void k_late_end(struct k_late *late); /* awaits all that was posted */

#define K_IN_PLACE 0

struct k_mover {
    k_u8 *ring;
    k_i32 stage_bytes;
    struct k_late *late;
    k_u32 loading; /* a bit for each stage */
    k_u64 loaded[K_MOVER_STAGES], stored;
    k_u64 committed[K_MOVER_STAGES]; /* the last store of a commit, the newest first */
};

static inline void k_mover_begin(struct k_thread *k, struct k_mover *m, void *ring,
                                 k_i32 stages, k_i32 stage_bytes) {
    (void)k, (void)stages;
    memset(m, 0, sizeof(*m));
    m->ring = (k_u8 *)ring + K_RING_HEAD;
    m->stage_bytes = stage_bytes;
    m->late = k_late_begin();
}

static inline k_u8 *k_mover_stage(const struct k_mover *m, k_i32 stage) {
    return m->ring + (size_t)stage * (size_t)m->stage_bytes;
}

static inline void k_mover_load(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                const void *src, k_i32 bytes) {
    (void)k;
    m->loading |= 1u << stage;
    m->loaded[stage] =
        k_late_post(m->late, K_LATE_LOADER, k_mover_stage(m, stage), src, (size_t)bytes);
}

static inline k_u32 *k_mover_fill(struct k_thread *k, struct k_mover *m, k_i32 stage) {
    (void)k;
    return (k_u32 *)(void *)k_mover_stage(m, stage);
}

static inline void k_mover_filled(struct k_thread *k, struct k_mover *m) {
    (void)k, (void)m;
}

static inline void k_mover_wait(struct k_thread *k, struct k_mover *m, k_i32 stage) {
    (void)k;
    m->loading &= ~(1u << stage);
#if !defined(K_SKIP_WAIT)
    k_late_await(m->late, K_LATE_LOADER, m->loaded[stage]);
#endif
}

static inline void k_mover_store_filled(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                        k_i32 from, struct k_peer dst, k_i32 bytes) {
    (void)k;
    if (!dst.address) {
        return;
    }
    volatile const k_u8 *first = k_mover_stage(m, stage) + from;
    (void)*first; /* the warp itself relies on the load, as the reader does */
    m->stored = k_late_post(m->late, K_LATE_READER, (void *)dst.address,
                            k_mover_stage(m, stage) + from, (size_t)bytes);
}

static inline void k_mover_store(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                 struct k_peer dst, k_i32 bytes) {
    k_mover_store_filled(k, m, stage, 0, dst, bytes);
}

static inline void k_mover_commit(struct k_thread *k, struct k_mover *m) {
    (void)k;
    memmove(m->committed + 1, m->committed, sizeof(m->committed) - sizeof(m->committed[0]));
    m->committed[0] = m->stored;
}

static inline void k_mover_retire(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)k, (void)m, (void)newest;
#if !defined(K_SKIP_RETIRE)
    k_late_await(m->late, K_LATE_READER, m->committed[newest]);
#endif
}

static inline void k_mover_settle(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)k;
#if defined(K_SKIP_SETTLE)
    if (newest > 0) { /* the last of a walk remains: what is missed is a publish too early */
        return;
    }
#endif
    k_late_await(m->late, K_LATE_WRITER, m->committed[newest]);
}

static inline const void *k_mover_view(const struct k_mover *m, k_i32 stage) {
    return k_mover_stage(m, stage);
}

static inline void k_mover_gather(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                  const struct k_term *terms, k_i32 num, k_i32 from,
                                  k_i32 bytes) {
    (void)k;
    m->loading |= 1u << stage;
    for (k_i32 j = 0; j < num; j++) {
        m->loaded[stage] = k_late_post(m->late, K_LATE_LOADER,
                                       k_mover_stage(m, stage) + (size_t)j * (size_t)bytes,
                                       (const k_u8 *)terms[j].row + from, (size_t)bytes);
    }
}

static inline void k_mover_sum(struct k_thread *k, struct k_mover *m, k_i32 stage,
                               struct k_peer dst, k_i32 dtype, k_bool weighted, k_i32 bytes,
                               const struct k_term *terms, k_i32 num) {
    struct k_term staged[K_SUM_TERMS];
    for (k_i32 j = 0; j < num; j++) {
        staged[j] = terms[j];
        staged[j].row = k_mover_stage(m, stage) + (size_t)j * (size_t)bytes;
    }
    k_reduce(k, dst, dtype, weighted, bytes, staged, num);
}

static inline void k_mover_end(struct k_thread *k, struct k_mover *m) {
    (void)k;
    if (m->loading) { /* on a GPU it would arrive in memory that is another block's by then */
        __builtin_trap();
    }
    k_late_end(m->late);
}

#endif
