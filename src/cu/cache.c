/* SPDX-License-Identifier: MIT */
/*
 * Compiled kernels on disk: one file per kernel, architecture and library, named by the hash of
 * all that decides what it holds. Owns the format of an entry and the rules for the folder. Any
 * thread and any process; a folder may be deleted at any time. Must not use a folder into which
 * others can write, nor an entry that others may have written, even earlier: what lies there runs on
 * the GPU. Must not fail because of the disk: without it kernels are compiled by every process.
 */
#include "src/cu/jit.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC "libepjit"
#define FORMAT 2
#define MAX_ENTRY_BYTES ((uint64_t)64 << 20)
#define NAME_BYTES 48
#define LOCK_POLL_NS (5 * EPI_NS_PER_MS)

/* An entry is this and the cubin. */
struct entry_head {
    char magic[8];
    uint32_t format;
    uint32_t nvrtc_version; /* that made it; for the log */
    struct epi_jit_key key;
    uint64_t cubin_bytes;
    uint64_t cubin_hash;
    uint64_t head_hash; /* of all before */
};

/* ---- keys --------------------------------------------------------------------------------- */

void epi_jit_key_begin(struct epi_jit_key *key) {
    key->hash = EPI_HASH_BEGIN;
    key->bytes = 0;
}

void epi_jit_key_add(struct epi_jit_key *key, const void *data, size_t bytes) {
    key->hash = epi_hash(key->hash, data, bytes);
    key->bytes += bytes;
}

static void name_of(char name[NAME_BYTES], const struct epi_jit_key *key, const char *tail) {
    epi_format(name, NAME_BYTES, "%016" PRIx64 "%s", key->hash, tail);
}

/* ---- the folder --------------------------------------------------------------------------- */

/* Logs why kernels are not kept, once for each reason and not for each kernel. */
static void report_unkept(enum epi_log_level level, const char *path, const char *why) {
    static _Atomic uint64_t reported;
    uint64_t hash = epi_hash(EPI_HASH_BEGIN, path, strlen(path) + 1);
    hash = epi_hash(hash, why, strlen(why));
    if (atomic_exchange(&reported, hash) != hash) {
        epi_log(level, "compiled kernels are not kept in %s: %s", path, why);
    }
}

int epi_open_at(int dir, const char *name, int flags) {
    epi_fd_begin();
    const int fd = epi_fd_keep(openat(dir, name, flags | O_CLOEXEC, 0600));
    errno = fd < 0 ? -fd : 0;
    return fd < 0 ? -1 : fd;
}

int epi_open_folder(const char *path, size_t given, int flags) {
    char part[EPI_CACHE_PATH_BYTES];
    for (size_t n = given + 1; n <= strlen(path); n++) {
        if (path[n] == '/' || path[n] == '\0') {
            epi_format(part, sizeof(part), "%.*s", (int)n, path);
            if (mkdir(part, 0700) != 0 && errno != EEXIST) {
                return -1;
            }
        }
    }
    size_t len = strlen(path);
    while (len > 1 && path[len - 1] == '/') { /* with which a link would be followed */
        len--;
    }
    epi_format(part, sizeof(part), "%.*s", (int)len, path);
    return epi_open_at(AT_FDCWD, part, O_RDONLY | O_DIRECTORY | flags);
}

const char *epi_not_ours_alone(int fd) {
    struct stat st;
    if (fstat(fd, &st) != 0) {
        return strerror(errno);
    }
    if (st.st_uid != geteuid()) {
        return "it belongs to another user";
    }
    if (st.st_mode & (S_IWGRP | S_IWOTH)) {
        return "others can write to it";
    }
    return S_ISREG(st.st_mode) && st.st_nlink > 1 ? "it has another name, too" : NULL;
}

/* "" when there is none. Returns how many characters of it the user gave: HOME must be there. */
static size_t choose_folder(char path[EPI_CACHE_PATH_BYTES]) {
    const char *named = epi_opt_str(EPI_OPT_JIT_CACHE);
    const char *xdg = epi_env("XDG_CACHE_HOME");
    const char *home = epi_env("HOME");
    const size_t room = EPI_CACHE_PATH_BYTES - sizeof("/.cache/libep");
    path[0] = '\0';
    if (named && strcmp(named, "off") == 0) {
        return 0;
    }
    if (named) { /* at most 1000 characters */
        epi_format(path, EPI_CACHE_PATH_BYTES, "%s", named);
    } else if (xdg && *xdg == '/' && strlen(xdg) < room) {
        epi_format(path, EPI_CACHE_PATH_BYTES, "%s/libep", xdg);
    } else if (home && *home == '/' && strlen(home) < room) {
        epi_format(path, EPI_CACHE_PATH_BYTES, "%s/.cache/libep", home);
        return strlen(home);
    } else {
        report_unkept(EPI_LOG_INFO, "any folder",
                      "EP_JIT_CACHE, XDG_CACHE_HOME and HOME name none");
    }
    return 0;
}

bool epi_cache_open(struct epi_cache *c) {
    const size_t given = choose_folder(c->path);
    const char *not_ours;
    c->dir = -1;
    if (!*c->path) {
        return false;
    }
    c->dir = epi_open_folder(c->path, given, 0);
    if (c->dir < 0) {
        report_unkept(EPI_LOG_INFO, c->path, strerror(errno));
    } else if ((not_ours = epi_not_ours_alone(c->dir)) != NULL) {
        char why[128];
        epi_format(why, sizeof(why), "%s; remove it and let libep make it, or set EP_JIT_CACHE",
                   not_ours);
        report_unkept(EPI_LOG_WARN, c->path, why);
    } else {
        return true;
    }
    epi_cache_close(c);
    return false;
}

void epi_cache_close(struct epi_cache *c) {
    epi_fd_close(&c->dir);
    c->path[0] = '\0';
}

/* ---- files -------------------------------------------------------------------------------- */

static int write_all(int fd, const char *data, size_t bytes) {
    while (bytes > 0) {
        const ssize_t n = write(fd, data, bytes);
        if (n < 0 && errno != EINTR) {
            return errno;
        }
        data += n > 0 ? n : 0;
        bytes -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

static bool read_all(int fd, char *data, size_t bytes) {
    while (bytes > 0) {
        const ssize_t n = read(fd, data, bytes);
        if (n == 0 || (n < 0 && errno != EINTR)) {
            return false;
        }
        data += n > 0 ? n : 0;
        bytes -= n > 0 ? (size_t)n : 0;
    }
    return true;
}

int epi_put_file(int dir, const char *name, const struct epi_piece *pieces, int num_pieces) {
    char temporary[256];
    int err = 0;
    epi_format(temporary, sizeof(temporary), "%s.%d-%" PRIx64 ".tmp", name, (int)getpid(),
               (uint64_t)epi_now_ns());
    int fd = epi_open_at(dir, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW);
    if (fd < 0) {
        return errno;
    }
    for (int i = 0; err == 0 && i < num_pieces; i++) {
        err = write_all(fd, pieces[i].data, pieces[i].bytes);
    }
    while (err == 0 && fdatasync(fd) != 0 && errno != EINVAL) {
        err = errno == EINTR ? 0 : errno; /* some disks say only now that they are full */
    }
    epi_fd_close(&fd);
    if (err == 0 && renameat(dir, temporary, dir, name) != 0) {
        err = errno;
    }
    if (err != 0) {
        unlinkat(dir, temporary, 0);
    }
    return err;
}

/* ---- entries ------------------------------------------------------------------------------ */

static uint64_t hash_of_head(const struct entry_head *h) {
    return epi_hash(EPI_HASH_BEGIN, h, offsetof(struct entry_head, head_hash));
}

const char *epi_cache_parse(const void *data, size_t bytes, const struct epi_jit_key *key,
                            struct epi_cache_entry *out) {
    struct entry_head h;
    if (bytes < sizeof(h) || bytes > MAX_ENTRY_BYTES) {
        return "it is no entry";
    }
    memcpy(&h, data, sizeof(h));
    if (memcmp(h.magic, MAGIC, sizeof(h.magic)) != 0 || h.format != FORMAT) {
        return "it is not of this format";
    }
    if (h.head_hash != hash_of_head(&h)) {
        return "its head is damaged";
    }
    if (memcmp(&h.key, key, sizeof(*key)) != 0) {
        return "it is of another kernel";
    }
    if (h.cubin_bytes != bytes - sizeof(h)) {
        return "it is cut short";
    }
    out->cubin = (const char *)data + sizeof(h);
    out->cubin_bytes = h.cubin_bytes;
    out->nvrtc_version = (int)h.nvrtc_version;
    return epi_hash(EPI_HASH_BEGIN, out->cubin, out->cubin_bytes) == h.cubin_hash
               ? NULL
               : "its kernel is damaged";
}

/* As epi_cache_read, of an open file; *why when it is bad. */
static ep_status read_entry(int fd, const struct epi_jit_key *key, struct epi_cubin *out,
                            int *nvrtc_version, const char **why) {
    struct epi_cache_entry entry;
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size <= 0 ||
        (uint64_t)st.st_size > MAX_ENTRY_BYTES) {
        *why = "it is no entry";
        return EP_AGAIN;
    }
    const size_t bytes = (size_t)st.st_size;
    struct epi_cubin c = {.data = epi_alloc(bytes)};
    if (!c.data) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a kernel of %zu bytes", bytes);
    }
    *why = read_all(fd, c.data, bytes) ? epi_cache_parse(c.data, bytes, key, &entry)
                                       : "it cannot be read";
    if (*why) {
        epi_cubin_free(&c);
        return EP_AGAIN;
    }
    c.bytes = entry.cubin_bytes;
    memmove(c.data, entry.cubin, c.bytes);
    *nvrtc_version = entry.nvrtc_version;
    *out = c;
    epi_cache_used(fd);
    return EP_OK;
}

ep_status epi_cache_read(const struct epi_cache *c, const struct epi_jit_key *key, bool quiet,
                         struct epi_cubin *out, int *nvrtc_version) {
    char name[NAME_BYTES];
    const char *why = NULL;
    ep_status st = EP_AGAIN;
    name_of(name, key, ".cubin");
    /* Not to hang on a pipe that somebody put there. */
    int fd = epi_open_at(c->dir, name, O_RDONLY | O_NONBLOCK | O_NOFOLLOW);
    if (fd >= 0) {
        const char *not_ours = epi_not_ours_alone(fd);
        if (not_ours) { /* whatever it holds: worth more than a line of the log's */
            epi_log(EPI_LOG_WARN, "%s/%s is not run: %s; remove it", c->path, name, not_ours);
        } else {
            st = read_entry(fd, key, out, nvrtc_version, &why);
        }
        epi_fd_close(&fd);
    } else if (errno != ENOENT) {
        why = strerror(errno);
    }
    if (why && !quiet) {
        epi_log(EPI_LOG_INFO, "%s/%s is made anew: %s", c->path, name, why);
    }
    return st;
}

bool epi_cache_write(const struct epi_cache *c, const struct epi_jit_key *key,
                     const struct epi_cubin *cubin, int nvrtc_version) {
    char name[NAME_BYTES];
    struct entry_head h;
    const struct epi_piece pieces[2] = {{&h, sizeof(h)}, {cubin->data, cubin->bytes}};
    memset(&h, 0, sizeof(h));
    memcpy(h.magic, MAGIC, sizeof(h.magic));
    h.format = FORMAT;
    h.nvrtc_version = (uint32_t)nvrtc_version;
    h.key = *key;
    h.cubin_bytes = cubin->bytes;
    h.cubin_hash = epi_hash(EPI_HASH_BEGIN, cubin->data, cubin->bytes);
    h.head_hash = hash_of_head(&h);
    name_of(name, key, ".cubin");
    const int err = epi_put_file(c->dir, name, pieces, 2);
    if (err != 0) {
        report_unkept(EPI_LOG_INFO, c->path, strerror(err));
    } else {
        epi_cache_tidy(c, name);
    }
    return err == 0;
}

int epi_cache_lock(const struct epi_cache *c, const struct epi_jit_key *key) {
    char name[NAME_BYTES];
    name_of(name, key, ".lock");
    int fd = epi_open_at(c->dir, name, O_RDWR | O_CREAT | O_NOFOLLOW);
    if (fd < 0) {
        report_unkept(EPI_LOG_INFO, c->path, strerror(errno));
        return -1;
    }
    const struct epi_deadline limit =
        epi_deadline_after(epi_opt_int(EPI_OPT_TIMEOUT_MS) * EPI_NS_PER_MS / 4);
    while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        if (errno == EINTR) {
            continue;
        }
        if (errno != EWOULDBLOCK || epi_deadline_expired(limit)) {
            epi_log(EPI_LOG_INFO, "%s/%s is not waited for any longer: %s", c->path, name,
                    errno == EWOULDBLOCK ? "another process holds it" : strerror(errno));
            epi_fd_close(&fd);
            return -1;
        }
        epi_sleep_ns(LOCK_POLL_NS);
    }
    return fd;
}

/* The file goes with the need for it: whoever comes now finds the entry and takes no lock, and
 * whoever waited on the old file looks for the entry before anything else. At worst, where there
 * is no entry after all, two make it. */
void epi_cache_unlock(const struct epi_cache *c, const struct epi_jit_key *key, int lock) {
    char name[NAME_BYTES];
    if (lock < 0) {
        return;
    }
    name_of(name, key, ".lock");
    unlinkat(c->dir, name, 0);
    flock(lock, LOCK_UN); /* a forked child may hold the file open still */
    epi_fd_close(&lock);
}
