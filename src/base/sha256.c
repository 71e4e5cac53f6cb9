/* SPDX-License-Identifier: MIT */
/*
 * SHA-256 (FIPS 180-4) and HMAC-SHA-256 (RFC 2104): how a rank proves that it holds the job's key
 * without saying it; and random bytes, of which keys and questions are made.
 *
 * Owns nothing: the state is the caller's. Pure, for any thread. tests/t_sha256.c has the
 * published vectors. Here it hashes a few hundred bytes per connection, so it is written to be
 * read, not to be fast.
 * Must not branch on, or index by, what is secret: neither the hash nor epi_same_bytes does.
 */
#include "src/base/base.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>

#define BLOCK_BYTES 64
#define NUM_ROUNDS 64

/* The first 32 bits of the fractional parts of the cube roots of the first 64 primes. */
static const uint32_t round_constants[NUM_ROUNDS] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
    0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
    0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
    0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
    0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
    0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
    0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
    0xc67178f2};

static uint32_t rotate(uint32_t x, int by) {
    return x >> by | x << (32 - by);
}

static void expand(uint32_t w[NUM_ROUNDS], const uint8_t block[BLOCK_BYTES]) {
    for (int i = 0; i < 16; i++) {
        const uint8_t *p = block + 4 * i;
        w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
    }
    for (int i = 16; i < NUM_ROUNDS; i++) {
        uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
}

static void compress(uint32_t state[8], const uint8_t block[BLOCK_BYTES]) {
    uint32_t w[NUM_ROUNDS];
    uint32_t v[8]; /* a to h of the standard */
    expand(w, block);
    memcpy(v, state, sizeof(v));
    for (int i = 0; i < NUM_ROUNDS; i++) {
        uint32_t s1 = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
        uint32_t choice = (v[4] & v[5]) ^ (~v[4] & v[6]);
        uint32_t t1 = v[7] + s1 + choice + round_constants[i] + w[i];
        uint32_t s0 = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
        uint32_t majority = (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]);
        memmove(v + 1, v, 7 * sizeof(v[0]));
        v[4] += t1;
        v[0] = t1 + s0 + majority;
    }
    for (int i = 0; i < 8; i++) {
        state[i] += v[i];
    }
}

void epi_sha256_begin(struct epi_sha256 *s) {
    /* The first 32 bits of the fractional parts of the square roots of the first 8 primes. */
    static const uint32_t first[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memset(s, 0, sizeof(*s));
    memcpy(s->state, first, sizeof(first));
}

void epi_sha256_add(struct epi_sha256 *s, const void *data, size_t bytes) {
    const uint8_t *p = data;
    while (bytes > 0) {
        size_t used = (size_t)(s->num_bytes % BLOCK_BYTES);
        size_t part = BLOCK_BYTES - used < bytes ? BLOCK_BYTES - used : bytes;
        memcpy(s->block + used, p, part);
        s->num_bytes += part;
        p += part;
        bytes -= part;
        if (used + part == BLOCK_BYTES) {
            compress(s->state, s->block);
        }
    }
}

void epi_sha256_end(struct epi_sha256 *s, uint8_t out[EPI_SHA256_BYTES]) {
    static const uint8_t padding[BLOCK_BYTES] = {0x80};
    uint64_t num_bits = s->num_bytes * 8;
    uint8_t length[8];
    for (int i = 0; i < 8; i++) {
        length[i] = (uint8_t)(num_bits >> (56 - 8 * i));
    }
    /* One byte 0x80, then zeros until 8 bytes of the block are left for the length. */
    size_t used = (size_t)(s->num_bytes % BLOCK_BYTES);
    epi_sha256_add(s, padding, used < 56 ? 56 - used : 120 - used);
    epi_sha256_add(s, length, sizeof(length));
    for (int i = 0; i < EPI_SHA256_BYTES; i++) {
        out[i] = (uint8_t)(s->state[i / 4] >> (24 - 8 * (i % 4)));
    }
}

void epi_hmac_begin(struct epi_hmac *h, const void *key, size_t key_bytes) {
    uint8_t pad[BLOCK_BYTES] = {0};
    if (key_bytes > BLOCK_BYTES) {
        epi_sha256_begin(&h->inner);
        epi_sha256_add(&h->inner, key, key_bytes);
        epi_sha256_end(&h->inner, pad);
    } else if (key_bytes > 0) {
        memcpy(pad, key, key_bytes);
    }
    for (int i = 0; i < BLOCK_BYTES; i++) {
        pad[i] ^= 0x36;
    }
    epi_sha256_begin(&h->inner);
    epi_sha256_add(&h->inner, pad, sizeof(pad));
    for (int i = 0; i < BLOCK_BYTES; i++) {
        pad[i] ^= 0x36 ^ 0x5c;
    }
    epi_sha256_begin(&h->outer);
    epi_sha256_add(&h->outer, pad, sizeof(pad));
}

void epi_hmac_add(struct epi_hmac *h, const void *data, size_t bytes) {
    epi_sha256_add(&h->inner, data, bytes);
}

void epi_hmac_end(struct epi_hmac *h, uint8_t out[EPI_SHA256_BYTES]) {
    epi_sha256_end(&h->inner, out);
    epi_sha256_add(&h->outer, out, EPI_SHA256_BYTES);
    epi_sha256_end(&h->outer, out);
}

bool epi_random(void *out, size_t bytes) {
    size_t have = 0;
    while (have < bytes) {
        const ssize_t n = getrandom((uint8_t *)out + have, bytes - have, 0);
        if (n < 0 && errno != EINTR) {
            return false;
        }
        have += n > 0 ? (size_t)n : 0;
    }
    return true;
}

bool epi_same_bytes(const void *a, const void *b, size_t bytes) {
    const volatile uint8_t *p = a;
    const volatile uint8_t *q = b;
    uint8_t differ = 0;
    for (size_t i = 0; i < bytes; i++) {
        differ |= (uint8_t)(p[i] ^ q[i]);
    }
    return differ == 0;
}
