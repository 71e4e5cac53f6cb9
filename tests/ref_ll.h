/* SPDX-License-Identifier: MIT */
/*
 * The reference of what low-latency mode adds to tests/ref.h, the slow and obvious way: the cast of rows
 * to E4M3, and LogFMT. Its rows at the experts are those of an expanded dispatch with alignment 1, each expert's
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

/* What a combine of bf16 gives for rank's tokens: out [T][hidden]. Returns how many blocks were encoded. */
int ref_combine_ll(const struct ref_problem *p, int rank, const struct ref_combine *c,
                   bool exact, bool logfmt, uint8_t *out);

/* What a row of bf16 has become when it arrives in LogFMT; returns how many blocks were encoded. */
int ref_logfmt(const uint16_t *x, int64_t hidden, float *out);

/* One group of 128 channels: bf16 in, codes and the scale out. */
void ref_cast(const uint16_t x[128], bool power_of_2, uint8_t out[128], float *scale);

#endif
