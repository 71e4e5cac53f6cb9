/* SPDX-License-Identifier: MIT */
/*
 * Row movers of check builds (K_LATE_MOVERS): loads are done by one helper thread, stores by
 * another, some time after they were asked for, and nothing but wait, retire and drain orders
 * them with the warp. ThreadSanitizer then sees a missing one as a data race. The helpers belong
 * to one mover, because threads shared by movers would order warps that nothing else orders.
 */
#ifndef KERNEL_LANG_LATE_H
#define KERNEL_LANG_LATE_H

/* Implemented in src/run/late.c. */
struct epi_late;
struct epi_late *epi_late_start(void);
uint64_t epi_late_post(struct epi_late *late, void *dst, const void *src, size_t bytes);
void epi_late_await(struct epi_late *late, uint64_t ticket);
void epi_late_stop(struct epi_late *late); /* after all that was posted */

struct k_mover {
    k_u8 *ring;
    k_i32 stage_bytes;
    struct epi_late *loader, *storer;
    uint64_t loaded[K_MOVER_STAGES], stored;
    uint64_t committed[2]; /* the last store of the newest commit, and of the one before */
};

static inline void k_mover_begin(struct k_thread *k, struct k_mover *m, void *ring,
                                 k_i32 stages, k_i32 stage_bytes) {
    (void)k, (void)stages;
    memset(m, 0, sizeof(*m));
    m->ring = (k_u8 *)ring + K_RING_HEAD;
    m->stage_bytes = stage_bytes;
    m->loader = epi_late_start();
    m->storer = epi_late_start();
}

static inline k_u8 *k_mover_stage(const struct k_mover *m, k_i32 stage) {
    return m->ring + (size_t)stage * (size_t)m->stage_bytes;
}

static inline void k_mover_load(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                const void *src, k_i32 bytes) {
    (void)k;
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
#if !defined(K_SKIP_WAIT)
    epi_late_await(m->loader, m->loaded[stage]);
#else
    (void)m, (void)stage;
#endif
}

static inline void k_mover_store(struct k_thread *k, struct k_mover *m, k_i32 stage,
                                 struct k_peer dst, k_i32 bytes) {
    (void)k;
    if (!dst.address) {
        return;
    }
    volatile const k_u8 *first = k_mover_stage(m, stage);
    (void)*first; /* the warp itself relies on the load, as the storer does */
    m->stored =
        epi_late_post(m->storer, (void *)dst.address, k_mover_stage(m, stage), (size_t)bytes);
}

static inline void k_mover_commit(struct k_thread *k, struct k_mover *m) {
    (void)k;
    m->committed[1] = m->committed[0];
    m->committed[0] = m->stored;
}

static inline void k_mover_retire(struct k_thread *k, struct k_mover *m, k_i32 newest) {
    (void)k;
    epi_late_await(m->storer, m->committed[newest]);
}

static inline void k_mover_drain(struct k_thread *k, struct k_mover *m) {
    (void)k;
    epi_late_await(m->storer, m->stored);
}

static inline void k_mover_end(struct k_thread *k, struct k_mover *m) {
    (void)k;
    epi_late_stop(m->loader);
    epi_late_stop(m->storer);
}

#endif
