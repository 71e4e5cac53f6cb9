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

/* What a file holds; points into it. NULL, or what is wrong with it. */
struct epi_cache_entry {
    const char *cubin;
    size_t cubin_bytes;
    int nvrtc_version;
};
const char *epi_cache_parse(const void *data, size_t bytes, const struct epi_jit_key *key,
                            struct epi_cache_entry *out);

/* EP_AGAIN: there is no entry, or a bad one, which is logged unless `quiet`, or one that others may
 * have written, which is always logged. */
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
/* Makes the file under another name and renames it; only its user can read it. 0 or an errno value. */
int epi_put_file(int dir, const char *name, const struct epi_piece *pieces, int num_pieces);
/* openat by the rules of base.h, with close-on-exec; what it makes is for its user alone. -1, errno. */
int epi_open_at(int dir, const char *name, int flags);
/* Opens a folder; makes what is missing of it below the first `given` characters, for its user
 * alone. `flags` may be O_NOFOLLOW: the folder itself is no link. -1, errno. */
int epi_open_folder(const char *path, size_t given, int flags);
/* Why others may have changed what an open folder or file holds; NULL: they cannot. */
const char *epi_not_ours_alone(int fd);

/* ---- tidy.c ------------------------------------------------------------------------------- */

/* Removes what nobody has used for long, and what a writer that was killed has left. Entry `written`
 * has just been made. Never waits. */
void epi_cache_tidy(const struct epi_cache *c, const char *written);
void epi_cache_used(int fd); /* an entry that was read is young again */

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
