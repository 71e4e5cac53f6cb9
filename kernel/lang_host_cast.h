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

/* The last word makes the others visible. */
static K_INLINE void k_post16(struct k_peer at, struct k_16 v) {
    K_HESITATE();
    memcpy((void *)at.address, &v, 12);
    __atomic_store_n((k_u32 *)(at.address + 12), v.w, __ATOMIC_RELEASE);
}

static K_INLINE k_bool k_take16(const void *p, k_u32 tag, struct k_16 *v) {
    const k_bool here = __atomic_load_n((const k_u32 *)p + 3, __ATOMIC_ACQUIRE) == tag;
    if (here) { /* else its writer may be at it */
        memcpy(v, p, 12);
        v->w = tag;
    }
    return here;
}

/* One lane casts a whole group. */
#define K_CASTERS 1
#define K_CAST_CHANNELS 128

static K_INLINE k_u32 k_group_most(struct k_thread *k, k_u32 x, k_i32 lanes) {
    (void)k, (void)lanes;
    return x;
}

static K_INLINE k_u32 k_to_e4m3_pair(k_f32 x, k_f32 y) {
    return (k_u32)k_to_e4m3_by_bits(x) | (k_u32)k_to_e4m3_by_bits(y) << 8;
}

#endif
