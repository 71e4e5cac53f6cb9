/* SPDX-License-Identifier: MIT */
/*
 * Memory of a test that is freed all at once. Every allocation is a malloc of its own, exactly
 * as long as asked for, so that AddressSanitizer sees the first byte past it. One thread at a
 * time per pool. Runs out of memory by ending the program: tests have no use for more.
 */
#ifndef TESTS_POOL_H
#define TESTS_POOL_H

#include <stddef.h>

struct pool {
    void **items; /* owned, as is what they point to */
    size_t num_items, capacity;
};

/* Zeroed, 64-byte aligned, or filled with `byte`. 0 bytes is a valid allocation. */
void *pool_zero(struct pool *p, size_t bytes);
void *pool_fill(struct pool *p, size_t bytes, int byte);
void pool_free(struct pool *p);

#endif
