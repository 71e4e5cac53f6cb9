/* SPDX-License-Identifier: MIT */
/*
 * The rounds of an allgather as the place where they meet sees them. See rounds.c.
 */
#ifndef EPI_BOOT_ROUNDS_H
#define EPI_BOOT_ROUNDS_H

#include "src/base/base.h"

#define EPI_ROUND_TEXT_BYTES 200

struct epi_round {
    struct epi_round *next;
    uint64_t seq;
    size_t bytes;   /* of each rank */
    int first_rank; /* who set `bytes` */
    int num_in;
    int num_out; /* ranks that have taken the result, or given up; for worlds */
    bool is_mismatch;
    char text[EPI_ROUND_TEXT_BYTES]; /* the mismatch in words */
    bool *have;                      /* [num_ranks] */
    uint8_t *data;                   /* [num_ranks][bytes] */
};

struct epi_rounds {
    int num_ranks;
    struct epi_round *first;
};

/* Adds a rank's contribution, making the round if it is the first; NULL without memory. */
struct epi_round *epi_rounds_put(struct epi_rounds *rounds, uint64_t seq, int rank,
                                 const void *in, size_t bytes);
struct epi_round *epi_rounds_find(struct epi_rounds *rounds, uint64_t seq);
void epi_rounds_remove(struct epi_rounds *rounds, struct epi_round *round);
void epi_rounds_clear(struct epi_rounds *rounds);

/* "1, 3, 5-9" of those i < num with set[i] == value, cut with "..." to fit. */
void epi_rank_list(const bool *set, bool value, int num, char *out, size_t out_bytes);

#endif
