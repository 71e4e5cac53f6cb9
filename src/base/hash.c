/* SPDX-License-Identifier: MIT */
/*
 * The hash of this library: FNV-1a of 64 bits.
 *
 * It tells apart what is honest: the names of jobs, the texts of kernels, damage to a file, the
 * arguments of ranks. Ranks compare its values and files on disk hold them, so it must not change
 * without a new version. It is no defence against somebody who makes two texts collide. Pure, for
 * any thread.
 */
#include "src/base/base.h"

uint64_t epi_hash(uint64_t hash, const void *data, size_t bytes) {
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++) {
        hash = (hash ^ p[i]) * UINT64_C(0x100000001b3);
    }
    return hash;
}
