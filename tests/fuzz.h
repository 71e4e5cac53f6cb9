/* SPDX-License-Identifier: MIT */
/*
 * What fuzzers have in common: the entry that libFuzzer or tests/replay.c calls, a claim whose
 * failure is a finding, and an input that is taken byte by byte.
 */
#ifndef TESTS_FUZZ_H
#define TESTS_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static inline void must(bool cond) {
    if (!cond) {
        abort();
    }
}

struct fuzz_input {
    const uint8_t *at;
    size_t left;
};

/* The next byte; behind the end 0 for ever. */
static inline uint8_t fuzz_next(struct fuzz_input *in) {
    const uint8_t byte = in->left ? *in->at : 0;
    in->at += in->left > 0;
    in->left -= in->left > 0;
    return byte;
}

#endif
