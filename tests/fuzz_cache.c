/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes what is read from disk and run on a GPU: an entry of the kernel cache. The input is the
 * key that is looked for (16 bytes) and the file.
 *
 * Checked beyond what the sanitizers see: what is accepted lies within the file, and a change of
 * any one byte of an accepted file makes it refused, with a reason, as does any other key.
 */
#include <stdlib.h>
#include <string.h>

#include "src/cu/jit.h"
#include "tests/fuzz.h"

#define MOST_CHANGES 64
#define HEAD_BYTES 56 /* its hash is at the end of it */

static void check_changes(const uint8_t *file, size_t bytes, const struct epi_jit_key *key) {
    struct epi_cache_entry entry;
    uint8_t *copy = malloc(bytes);
    must(copy != NULL);
    memcpy(copy, file, bytes);
    for (size_t at = 0; at < bytes; at += 1 + bytes / MOST_CHANGES) {
        copy[at] ^= (uint8_t)(1 + at % 255);
        must(epi_cache_parse(copy, bytes, key, &entry) != NULL);
        copy[at] = file[at];
    }
    must(epi_cache_parse(copy, bytes - 1, key, &entry) != NULL);
    const struct epi_jit_key other = {key->hash ^ 1, key->bytes};
    must(epi_cache_parse(copy, bytes, &other, &entry) != NULL);
    free(copy);
}

static void check(const uint8_t *file, size_t bytes, const struct epi_jit_key *key) {
    struct epi_cache_entry entry = {NULL, 0, 0};
    const char *why = epi_cache_parse(file, bytes, key, &entry);
    if (why) {
        must(*why != '\0');
        return;
    }
    must(entry.cubin >= (const char *)file);
    must(entry.cubin + entry.cubin_bytes == (const char *)file + bytes);
    check_changes(file, bytes, key);
}

/* The same with a head that has the right hash, past which mutants hardly get. */
static void check_repaired(const uint8_t *file, size_t bytes, const struct epi_jit_key *key) {
    if (bytes < HEAD_BYTES) {
        return;
    }
    uint8_t *copy = malloc(bytes);
    must(copy != NULL);
    memcpy(copy, file, bytes);
    const uint64_t hash = epi_hash(EPI_HASH_BEGIN, copy, HEAD_BYTES - sizeof(hash));
    memcpy(copy + HEAD_BYTES - sizeof(hash), &hash, sizeof(hash));
    check(copy, bytes, key);
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    struct epi_jit_key key = {0, 0};
    if (bytes < sizeof(key)) {
        check(data, bytes, &key);
        return 0;
    }
    memcpy(&key, data, sizeof(key));
    check(data + sizeof(key), bytes - sizeof(key), &key);
    check_repaired(data + sizeof(key), bytes - sizeof(key), &key);
    return 0;
}
