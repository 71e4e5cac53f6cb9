/* SPDX-License-Identifier: MIT */
/*
 * What jit.c, cache.c and dump.c share: the key of a compiled kernel, its entry on disk, and
 * files that appear whole or not at all. Nobody else includes this but tests.
 */
#ifndef EPI_CU_JIT_H
#define EPI_CU_JIT_H

#include "src/cu/cu.h"

/* The hash (epi_hash) and the length of all that decides what a compilation gives. */
struct epi_jit_key {
    uint64_t hash, bytes;
};
void epi_jit_key_begin(struct epi_jit_key *key);
void epi_jit_key_add(struct epi_jit_key *key, const void *data, size_t bytes);

/* ---- cache.c ------------------------------------------------------------------------------ */

#define EPI_CACHE_PATH_BYTES 1024

struct epi_cache {
    int dir;
    char path[EPI_CACHE_PATH_BYTES];
};

/* The folder of EP_JIT_CACHE, XDG_CACHE_HOME or HOME, made if need be. False, and path is "":
 * kernels are kept in memory only; unless EP_JIT_CACHE=off asked for it, the log says why. */
bool epi_cache_open(struct epi_cache *c);
void epi_cache_close(struct epi_cache *c);

/* EP_AGAIN: there is no entry, or a bad one, which is logged unless `quiet`. */
ep_status epi_cache_read(const struct epi_cache *c, const struct epi_jit_key *key, bool quiet,
                         struct epi_cubin *out, int *nvrtc_version);
/* False: it could not be kept, and the log says why. */
bool epi_cache_write(const struct epi_cache *c, const struct epi_jit_key *key,
                     const struct epi_cubin *cubin, int nvrtc_version);

/* The right to make an entry, among processes; whoever dies gives it back. -1: a quarter of
 * EP_TIMEOUT_MS has passed, or the folder has no locks; then everybody makes their own. */
int epi_cache_lock(const struct epi_cache *c, const struct epi_jit_key *key);
void epi_cache_unlock(const struct epi_cache *c, const struct epi_jit_key *key, int lock);

struct epi_piece {
    const void *data;
    size_t bytes;
};
/* Makes the file under another name and renames it. 0 or an errno value. */
int epi_put_file(int dir, const char *name, const struct epi_piece *pieces, int num_pieces);
/* Opens a folder; makes what is missing of it below the first `given` characters. -1, errno. */
int epi_open_folder(const char *path, size_t given, unsigned mode);

/* ---- dump.c ------------------------------------------------------------------------------- */

/* What is asked for. */
struct epi_jit_request {
    const char *file;
    int arch;
    const char *const *defines;
    int max_major;    /* of NVRTC; 0: unknown */
    const char *dump; /* EP_JIT_DUMP */
    struct epi_jit_key key;
};

/* Writes files named for kernel, architecture and key to r->dump. Only logs when it cannot. */
void epi_jit_dump(const struct epi_jit_request *r, const struct epi_cubin *cubin,
                  int nvrtc_version);

#endif
