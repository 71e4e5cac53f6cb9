/* SPDX-License-Identifier: MIT */
/*
 * Rows in pieces of 16 bytes, and casts to 8-bit floats, on the host. Part of lang_host.h.
 */
#ifndef KERNEL_LANG_HOST_CAST_H
#define KERNEL_LANG_HOST_CAST_H

#include "kernel/lang_host.h"

#include "kernel/lang_e4m3.h"

struct k_16 {
    k_u32 x, y, z, w;
};

static K_INLINE struct k_16 k_load16(const void *p) {
    struct k_16 v;
    memcpy(&v, p, 16);
    return v;
}

static K_INLINE void k_store16_to(struct k_peer at, struct k_16 v) {
    if (at.address) {
        memcpy((void *)at.address, &v, 16);
    }
}

/* One lane casts a whole group. */
#define K_CASTERS 1
#define K_CAST_CHANNELS 128
#define K_AHEAD 16

static K_INLINE k_u32 k_group_most(struct k_thread *k, k_u32 x, k_i32 lanes) {
    (void)k, (void)lanes;
    return x;
}

static K_INLINE k_u32 k_to_e4m3_pair(k_f32 x, k_f32 y) {
    return (k_u32)k_to_e4m3_by_bits(x) | (k_u32)k_to_e4m3_by_bits(y) << 8;
}

static K_INLINE void k_store_cast(struct k_peer at, const k_u32 *four) {
    if (at.address) {
        memcpy((void *)at.address, four, K_CAST_CHANNELS);
    }
}

#endif
