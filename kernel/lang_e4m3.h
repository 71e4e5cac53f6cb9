/* SPDX-License-Identifier: MIT */
/*
 * float32 to E4M3 by its bits: for the host, and for GPUs that have no instruction for it. Rounds to
 * nearest even, saturates to 448; a NaN is 0x7f, as the hardware conversion makes it. Part of
 * lang_host.h and lang_cuda.h.
 */
#ifndef KERNEL_LANG_E4M3_H
#define KERNEL_LANG_E4M3_H

static K_INLINE k_u8 k_to_e4m3_by_bits(k_f32 x) {
    const k_u32 u = k_bits(x), sign = (u >> 24) & 0x80u;
    const k_u32 mag = u & 0x7fffffffu;
    if (mag > 0x7f800000u) {
        return 0x7f;
    }
    if (mag >= 0x43e80000u) { /* 464, half way to what would come after 448 */
        return (k_u8)(sign | 0x7eu);
    }
    if (mag < 0x3c800000u) { /* below 2^-6: multiples of 2^-9, by the float adder's rounding */
        const k_f32 d = k_float(mag) + 16384.0f;
        return (k_u8)(sign | (k_bits(d) - 0x46800000u));
    }
    const k_u32 r = mag - 0x3c000000u; /* rebias: 2^-6 has exponent 1 */
    return (k_u8)(sign | ((r + 0x7ffffu + ((r >> 20) & 1u)) >> 20));
}

#endif
