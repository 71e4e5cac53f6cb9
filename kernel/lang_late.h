/* SPDX-License-Identifier: MIT */
/*
 * Row movers of check builds (K_LATE_MOVERS): loads are done by one helper thread; stores by two,
 * one that reads the stage and one that writes what the first has read; all of it some time after
 * it was asked for, and nothing but wait, retire, settle and drain orders it with the warp.
 * ThreadSanitizer then sees a missing one as a data race. The helpers belong to one mover, because
 * threads shared by movers would order warps that nothing else orders.
 */
#ifndef KERNEL_LANG_LATE_H
#define KERNEL_LANG_LATE_H

/* Implemented in src/run/late.c. */
struct epi_late;
struct epi_late *epi_late_start(void);
uint64_t epi_late_post(struct epi_late *late, void *dst, const void *src, size_t bytes);
/* The same in two steps: `reader` copies the source, then `writer`, at the same number of its own
 * queue, writes the copy to dst. Both serve nothing else. */
uint64_t epi_late_store(struct epi_late *reader, struct epi_late *writer, void *dst,
                        const void *src, size_t bytes);
void epi_late_await(struct epi_late *late, uint64_t ticket);
void epi_late_stop(struct epi_late *late); /* after all that was posted */

#define K_IN_PLACE 0

struct k_mover {
    k_u8 *ring;
    k_i32 stage_bytes;
    struct epi_late *loader, *reader, *writer;
    k_u32 loading; /* a bit for each stage */
    uint64_t loaded[K_MOVER_STAGES], stored;
    uint64_t committed[K_MOVER_STAGES]; /* the last store of a commit, the newest first */
};

static inline void k_mover_begin(struct k_thread *k, struct k_mover *m, void *ring,
                                 k_i32 stages, k_i32 stage_bytes) {
    (void)k, (void)stages;
    memset(m, 0, sizeof(*m));
    m->ring = (k_u8 *)ring + K_RING_HEAD;
    m->stage_bytes = stage_bytes;
    m->loader = epi_late_start();
    m->reader = epi_late_start();
    m->writer = epi_late_start();
}

static inline k_u8 *k_mover_stage(const struct k_mover *m, k_i32 stage) {
    return m->ring + (size_t)stage * (size_t)m->stage_bytes;
}

static inline void k_mover_load(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                const void *src, k_i32 bytes) {
    (void)k;
    m->loading |= 1u << stage;
    m->loaded[stage] = epi_late_post(m->loader, k_mover_stage(m, stage), src, (size_t)bytes);
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
    epi_late_await(m->loader, m->loaded[stage]);
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
    m->stored = epi_late_store(m->reader, m->writer, (void *)dst.address,
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
    (void)k;
    epi_late_await(m->reader, m->committed[newest]);
}

static inline void k_mover_settle(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)k;
#if defined(K_SKIP_SETTLE)
    if (newest > 0) { /* the last of a walk remains: what is missed is a publish too early */
        return;
    }
#endif
    epi_late_await(m->writer, m->committed[newest]);
}

static inline void k_mover_drain(struct k_thread *k, struct k_mover *m) {
    (void)k;
    epi_late_await(m->writer, m->stored);
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
        m->loaded[stage] =
            epi_late_post(m->loader, k_mover_stage(m, stage) + (size_t)j * (size_t)bytes,
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
    epi_late_stop(m->loader);
    epi_late_stop(m->reader);
    epi_late_stop(m->writer);
}

#endif
