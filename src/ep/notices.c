/* SPDX-License-Identifier: MIT */
/*
 * Declared in notices.h. Owns the chunks that a group has taken; they go back to the device's when
 * the group ends. Run by the threads that create and destroy handles, under the group's mutex, also
 * while a stream is being captured.
 */
#include "src/ep/notices.h"

#include <string.h>

#define NOTICE_BYTES 64 /* two of them share no cache line */
#define NUM_IN_CHUNK (EPI_GPU_CHUNK_BYTES / NOTICE_BYTES)

_Static_assert(sizeof(struct k_counts) <= NOTICE_BYTES, "a notice is counts");

struct epi_notice_chunk {
    char *memory;
    int num_taken;
    bool taken[NUM_IN_CHUNK];
    struct epi_notice_chunk *next;
};

static ep_status add_notices(struct epi_notices *n, struct epi_gpu *gpu) {
    void *memory = NULL;
    struct epi_notice_chunk *c = epi_alloc(sizeof(*c));
    if (!c) {
        return epi_fail(EP_ERR_NOMEM, "no memory for what kernels tell of handles");
    }
    const ep_status st = epi_gpu_take_chunk(gpu, &memory);
    if (st != EP_OK) {
        epi_free(c);
        return st;
    }
    c->memory = memory;
    c->next = n->first;
    n->first = c;
    return EP_OK;
}

ep_status epi_notice_take(struct epi_notices *n, struct epi_gpu *gpu, struct k_counts **out) {
    struct epi_notice_chunk *c = n->first;
    while (c && c->num_taken == NUM_IN_CHUNK) {
        c = c->next;
    }
    if (!c) {
        EPI_TRY(add_notices(n, gpu));
        c = n->first;
    }
    int i = 0;
    while (c->taken[i]) {
        i++;
    }
    c->taken[i] = true;
    c->num_taken++;
    *out = (void *)(c->memory + (size_t)i * NOTICE_BYTES);
    memset(*out, 0, sizeof(**out));
    return EP_OK;
}

void epi_notice_give(struct epi_notices *n, struct k_counts *notice) {
    const char *at = (const char *)notice;
    struct epi_notice_chunk *c = n->first;
    while (at < c->memory || at >= c->memory + EPI_GPU_CHUNK_BYTES) {
        c = c->next;
    }
    c->taken[(at - c->memory) / NOTICE_BYTES] = false;
    c->num_taken--;
}

void epi_notices_free(struct epi_notices *n, struct epi_gpu *gpu) {
    while (n->first) {
        struct epi_notice_chunk *c = n->first;
        n->first = c->next;
        epi_gpu_give_chunk(gpu, c->memory);
        epi_free(c);
    }
}
