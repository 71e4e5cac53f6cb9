/* SPDX-License-Identifier: MIT */
/*
 * Main of a fuzzer built without libFuzzer: feeds it each file, the empty input, and seeded
 * mutants of the files. Usage: fuzz_x NUM_MUTANTS FILE...; the sanitizers are the judges.
 * Each input lies in a block of its exact size, so that a read past its end is seen.
 */
#include "tests/fuzz.h"
#include "tests/tap.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_BYTES (1 << 16)

static void feed(const uint8_t *data, size_t bytes) {
    uint8_t *copy = malloc(bytes ? bytes : 1);

    if (!copy) {
        exit(1);
    }
    memcpy(copy, data, bytes);
    LLVMFuzzerTestOneInput(copy, bytes);
    free(copy);
}

/* Flips, overwrites, cuts or repeats a piece; what it makes of `data` stays within MAX_BYTES. */
static size_t mutate(uint8_t *data, size_t bytes, uint64_t *state) {
    static const uint8_t edges[] = {0, 1, 0x7f, 0x80, 0xff};

    for (uint64_t n = 1 + tap_rand(state) % 4; n > 0; n--) {
        size_t at = bytes ? tap_rand(state) % bytes : 0;
        size_t span = 1 + tap_rand(state) % 8;

        switch (tap_rand(state) % 5) {
        case 0:
            if (bytes) {
                data[at] ^= (uint8_t)(1u << (tap_rand(state) % 8));
            }
            break;
        case 1:
            for (size_t i = at; i < bytes && i < at + span; i++) {
                data[i] = edges[tap_rand(state) % sizeof(edges)];
            }
            break;
        case 2:
            bytes = at;
            break;
        case 3:
            if (bytes + span <= MAX_BYTES) {
                memmove(data + at + span, data + at, bytes - at);
                bytes += span;
            }
            break;
        default:
            if (bytes < MAX_BYTES) {
                data[bytes++] = (uint8_t)tap_rand(state);
            }
            break;
        }
    }
    return bytes;
}

int main(int argc, char **argv) {
    static uint8_t data[MAX_BYTES + 16];
    static uint8_t mutant[MAX_BYTES + 16];
    long num_mutants = argc > 1 ? atol(argv[1]) : 0;
    uint64_t state = tap_seed();
    long num_fed = 1;

    feed(data, 0);
    for (int i = 2; i <= argc; i++) {
        size_t bytes = 0;

        if (i < argc) {
            FILE *file = fopen(argv[i], "rb");

            if (!file) {
                perror(argv[i]);
                return 1;
            }
            bytes = fread(data, 1, MAX_BYTES, file);
            fclose(file);
        } else if (argc > 2) {
            break; /* without any file the mutants grow from nothing */
        }
        feed(data, bytes);
        num_fed++;
        for (long m = 0; m < num_mutants; m++) {
            memcpy(mutant, data, bytes);
            feed(mutant, mutate(mutant, bytes, &state));
            num_fed++;
        }
    }
    printf("%ld inputs\n", num_fed);
    return 0;
}
