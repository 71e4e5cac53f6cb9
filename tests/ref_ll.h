/* SPDX-License-Identifier: MIT */
/*
 * The reference of what low-latency mode adds to tests/ref.h, the slow and obvious way: the cast of rows
 * to E4M3. Its rows at the experts are those of an expanded dispatch with alignment 1, each expert's
 * from row e * N on, and its combine is that of such rows with the weights of the dispatch.
 */
#ifndef TESTS_REF_LL_H
#define TESTS_REF_LL_H

#include <stdbool.h>
#include <stdint.h>

#include "tests/ref.h"

/* The code of E4M3 that is nearest to x, of two the even one; above 448 that of 448; NaN: 0x7f. */
uint8_t ref_to_e4m3(float x);
/* The number of a code; not for 0x7f and 0xff, which are NaN. */
float ref_from_e4m3(uint8_t code);

/* What an exact combine gives for rank's tokens, from an expanded dispatch: out [T][hidden]. */
void ref_combine_exact(const struct ref_problem *p, int rank, const struct ref_combine *c,
                       uint8_t *out);

/* One group of 128 channels: bf16 in, codes and the scale out. */
void ref_cast(const uint16_t x[128], bool power_of_2, uint8_t out[128], float *scale);

#endif
