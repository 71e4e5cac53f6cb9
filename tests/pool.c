/* SPDX-License-Identifier: MIT */
/*
 * The allocations of a test, declared in pool.h: an array of pointers to free.
 */
#include "tests/pool.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *pool_fill(struct pool *p, size_t bytes, int byte) {
    void *item = NULL;

    if (p->num_items == p->capacity) {
        p->capacity = p->capacity ? 2 * p->capacity : 16;
        p->items = realloc(p->items, p->capacity * sizeof(*p->items));
    }
    if (!p->items || posix_memalign(&item, 64, bytes ? bytes : 1)) {
        printf("Bail out! no memory for %zu bytes\n", bytes);
        exit(1);
    }
    memset(item, byte, bytes ? bytes : 1);
    p->items[p->num_items++] = item;
    return item;
}

void *pool_zero(struct pool *p, size_t bytes) {
    return pool_fill(p, bytes, 0);
}

void pool_free(struct pool *p) {
    for (size_t i = 0; i < p->num_items; i++) {
        free(p->items[i]);
    }
    free(p->items);
    memset(p, 0, sizeof(*p));
}
