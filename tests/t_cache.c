/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Compiled kernels on disk (src/cu/cache.c): what an entry must look like to be believed, which
 * folders are used, and who makes an entry when several processes want it. Needs no compiler.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/cu/jit.h"
#include "tests/scratch.h"
#include "tests/tap.h"

#define CUBIN_BYTES 100

static unsigned char bytes_of_kernel[CUBIN_BYTES];
static const struct epi_cubin kernel = {bytes_of_kernel, CUBIN_BYTES, NULL, NULL};

static struct epi_jit_key key_of(const char *text) {
    struct epi_jit_key key;
    epi_jit_key_begin(&key);
    epi_jit_key_add(&key, text, strlen(text));
    return key;
}

/* In a process of its own, so that what it logs and leaves behind is its own. */
static void in_process(int (*fn)(int, void *), const char *what) {
    ok(tap_spawn_ranks(1, fn, NULL, 60) == 0, "%s", what);
}

static void set_folder(const char *folder) {
    setenv("EP_JIT_CACHE", folder, 1);
    setenv("EP_LOG", "info", 1);
    epi_log_reload();
}

static void test_key(void) {
    struct epi_jit_key key = key_of("a"), pieces;
    ok(key.hash == UINT64_C(0xaf63dc4c8601ec8c) && key.bytes == 1,
       "a key is a hash and a length");
    epi_jit_key_begin(&pieces);
    epi_jit_key_add(&pieces, "foo", 3);
    epi_jit_key_add(&pieces, "bar", 3);
    key = key_of("foobar");
    ok(memcmp(&key, &pieces, sizeof(key)) == 0, "and can be taken in pieces");
}

/* ---- entries ------------------------------------------------------------------------------ */

static bool reads(const struct epi_cache *c, const struct epi_jit_key *key) {
    struct epi_cubin got;
    int version = 0;
    if (epi_cache_read(c, key, false, &got, &version) != EP_OK) {
        return false;
    }
    bool same = got.bytes == CUBIN_BYTES && version == 13020 &&
                memcmp(got.data, kernel.data, CUBIN_BYTES) == 0;
    epi_cubin_free(&got);
    return same;
}

/* A folder with one entry, and the entry's file. */
static const char *one_entry(struct epi_cache *c, const char *folder,
                             const struct epi_jit_key *key) {
    set_folder(folder);
    epi_cache_open(c);
    epi_cache_write(c, key, &kernel, 13020);
    return scratch_find(folder, ".cubin");
}

static int entries(int rank, void *ctx) {
    const char *folder = scratch_path(scratch_folder(), "entries");
    const struct epi_jit_key key = key_of("one"), other = key_of("two");
    struct epi_cache c;
    size_t bytes = 0;
    (void)rank;
    (void)ctx;
    set_folder(folder);
    const int fds = tap_num_fds();
    const int64_t live = epi_alloc_live();
    ok(epi_cache_open(&c) && strcmp(c.path, folder) == 0, "the folder opens");
    ok(!reads(&c, &key) && scratch_logged("anew") == 0, "no entry is no event");
    ok(epi_cache_write(&c, &key, &kernel, 13020) && reads(&c, &key), "an entry is read back");
    ok(!reads(&c, &other), "under its key only");
    ok(scratch_count(folder, "") == 1, "one file holds it");
    const char *path = scratch_find(folder, ".cubin");
    char *good = scratch_read(path, &bytes);
    if (!ok(good && bytes > CUBIN_BYTES, "a head and the kernel")) {
        return 1;
    }
    int believed = 0;
    for (size_t i = 0; i < bytes; i++) {
        good[i] ^= 4;
        scratch_write(path, good, bytes);
        believed += reads(&c, &key);
        good[i] ^= 4;
        scratch_write(path, good, i);
        believed += reads(&c, &key);
    }
    scratch_write(path, good, bytes + 1);
    believed += reads(&c, &key);
    ok(believed == 0, "no flipped bit, no cut, no tail is believed");
    ok(scratch_logged("is made anew") == 2 * (int)bytes + 1, "each is logged");
    ok(epi_cache_write(&c, &key, &kernel, 13020) && reads(&c, &key), "and replaced");
    ok(rename(path, scratch_path(folder, "away")) == 0 &&
           epi_cache_write(&c, &other, &kernel, 13020) &&
           rename(scratch_find(folder, ".cubin"), path) == 0 && !reads(&c, &key),
       "an entry under another's name is not believed");
    epi_cache_close(&c);
    ok(tap_num_fds() == fds && epi_alloc_live() == live, "nothing stays open or allocated");
    free(good);
    return 0;
}

static int odd_entries(int rank, void *ctx) {
    const char *folder = scratch_path(scratch_folder(), "odd");
    const struct epi_jit_key key = key_of("one");
    struct epi_cache c;
    (void)rank;
    (void)ctx;
    const char *path = one_entry(&c, folder, &key);
    unlink(path);
    ok(mkfifo(path, 0600) == 0 && !reads(&c, &key), "a pipe is not waited for");
    ok(epi_cache_write(&c, &key, &kernel, 13020) && reads(&c, &key), "and replaced");
    rename(path, scratch_path(folder, "elsewhere"));
    ok(symlink("elsewhere", path) == 0 && !reads(&c, &key), "a link is not followed");
    ok(epi_cache_write(&c, &key, &kernel, 13020) && reads(&c, &key), "but replaced");
    unlink(path);
    ok(mkdir(path, 0700) == 0 && !reads(&c, &key), "a folder is no entry");
    ok(!epi_cache_write(&c, &key, &kernel, 13020) && scratch_logged("are not kept") == 1,
       "and what cannot be replaced is logged");
    rmdir(path);
    struct rlimit limit;
    getrlimit(RLIMIT_FSIZE, &limit);
    struct rlimit small = {64, limit.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    const bool written = epi_cache_write(&c, &key, &kernel, 13020);
    setrlimit(RLIMIT_FSIZE, &limit);
    ok(!written, "a full disk is survived");
    ok(scratch_count(folder, ".tmp") == 0 && scratch_count(folder, ".cubin") == 0,
       "and nothing is left half written");
    epi_cache_close(&c);
    return 0;
}

/* Each of these could be the work of somebody else, though what it holds is right. */
static int entries_of_others(int rank, void *ctx) {
    const char *folder = scratch_path(scratch_folder(), "others");
    const struct epi_jit_key key = key_of("one");
    struct epi_cache c;
    struct stat st;
    (void)rank;
    (void)ctx;
    const char *path = one_entry(&c, folder, &key);
    ok(stat(path, &st) == 0 && (st.st_mode & 07777) == 0600, "only its user can read an entry");
    chmod(path, 0620);
    ok(!reads(&c, &key), "one that the group can write to is not run");
    chmod(path, 0602);
    ok(!reads(&c, &key), "nor one that strangers can write to");
    ok(scratch_logged("is not run: others can write to it; remove it") == 2, "which is said");
    chmod(path, 0644);
    ok(reads(&c, &key), "one that others can read is");
    ok(link(path, scratch_path(folder, "second")) == 0 && !reads(&c, &key) &&
           scratch_logged("it has another name, too; remove it") == 1,
       "one with two names is not run");
    ok(epi_cache_write(&c, &key, &kernel, 13020) && reads(&c, &key), "but replaced");
    if (geteuid() == 0 && chown(path, 12345, 12345) == 0) {
        ok(!reads(&c, &key) && scratch_logged("it belongs to another user; remove it") == 1,
           "nor one of another user, in a folder that is now ours");
        ok(epi_cache_write(&c, &key, &kernel, 13020) && reads(&c, &key), "it is replaced, too");
    }
    epi_cache_close(&c);
    return 0;
}

/* A file of our names, last used so many days ago. */
static void leave(const char *folder, const char *name, int days) {
    const char *path = scratch_path(folder, name);
    struct timespec times[2];
    struct stat st;
    scratch_write(path, "x", 1);
    stat(path, &st);
    times[0] = times[1] = st.st_mtim;
    times[1].tv_sec -= (time_t)days * 86400;
    utimensat(AT_FDCWD, path, times, 0);
}

static int old_files(int rank, void *ctx) {
    const char *folder = scratch_path(scratch_folder(), "old");
    const struct epi_jit_key key = key_of("one"), other = key_of("two");
    struct epi_cache c;
    struct stat st;
    char name[64];
    (void)rank;
    (void)ctx;
    const char *mine = one_entry(&c, folder, &key);
    struct timespec times[2] = {{0, UTIME_OMIT}, {.tv_sec = 1000000000}};
    utimensat(AT_FDCWD, mine, times, 0);
    ok(reads(&c, &key) && stat(mine, &st) == 0 && st.st_mtime > 1000000000,
       "an entry that is read is young again");
    leave(folder, "0123456789abcdef.cubin", 100);
    leave(folder, "0123456789abcde0.cubin", 50);
    leave(folder, "0123456789abcdef.cubin.77-1f.tmp", 1);
    leave(folder, "0123456789abcde0.cubin.77-1f.tmp", 0);
    leave(folder, "0123456789abcdef.lock", 1);
    leave(folder, "notes.txt", 1000);
    leave(folder, "0123456789abcdef.cubin.old", 1000);
    epi_cache_write(&c, &other, &kernel, 13020);
    ok(scratch_count(folder, "") == 6 && scratch_count(folder, "def.cubin") == 0 &&
           scratch_count(folder, "de0.cubin") == 1 && scratch_count(folder, ".tmp") == 1,
       "entries that nobody has used for months go, with what writers left; the rest stays");
    for (int i = 0; i < 300; i++) {
        snprintf(name, sizeof(name), "%016x.cubin", i);
        leave(folder, name, 20);
    }
    epi_cache_write(&c, &other, &kernel, 13020);
    ok(scratch_count(folder, ".cubin") == 256, "more than 256 are not kept (%d)",
       scratch_count(folder, ".cubin"));
    ok(reads(&c, &key) && reads(&c, &other) && scratch_count(folder, "de0.cubin") == 0,
       "those that were used last");
    ok(scratch_count(folder, ".txt") == 1 && scratch_count(folder, ".old") == 1,
       "files that are not ours are left alone");
    epi_cache_close(&c);
    return 0;
}

static int no_memory(int rank, void *ctx) {
    const struct epi_jit_key key = key_of("one");
    struct epi_cache c;
    struct epi_cubin got;
    int version;
    (void)rank;
    (void)ctx;
    set_folder(scratch_path(scratch_folder(), "entries"));
    epi_cache_open(&c);
    epi_cache_write(&c, &key, &kernel, 13020);
    const int64_t live = epi_alloc_live();
    epi_alloc_fail_at(epi_alloc_count() + 1);
    ep_status st = epi_cache_read(&c, &key, false, &got, &version);
    epi_alloc_fail_at(0);
    ok(st == EP_ERR_NOMEM && epi_alloc_live() == live, "no memory is said, not hidden");
    ok(reads(&c, &key), "and is no harm to the entry");
    epi_cache_close(&c);
    return 0;
}

/* ---- folders ------------------------------------------------------------------------------ */

static bool opens(void) {
    struct epi_cache c;
    bool good = epi_cache_open(&c);
    epi_cache_close(&c);
    return good;
}

/* Whether the environment leads to this folder, with the mode it must have. */
static bool leads_to(const char *folder) {
    struct epi_cache c;
    struct stat st;
    bool good = epi_cache_open(&c) && strcmp(c.path, folder) == 0 && stat(folder, &st) == 0 &&
                (st.st_mode & 07777) == 0700;
    epi_cache_close(&c);
    return good;
}

static int folders(int rank, void *ctx) {
    const char *top = scratch_make(scratch_path(scratch_folder(), "folders"));
    const char *home = scratch_make(scratch_path(top, "home"));
    (void)rank;
    (void)ctx;
    setenv("HOME", home, 1);
    unsetenv("XDG_CACHE_HOME");
    unsetenv("EP_JIT_CACHE");
    ok(leads_to(scratch_path(home, ".cache/libep")), "HOME/.cache/libep, made for the user");
    setenv("XDG_CACHE_HOME", "cache", 1);
    ok(leads_to(scratch_path(home, ".cache/libep")), "a relative XDG_CACHE_HOME is none");
    setenv("XDG_CACHE_HOME", scratch_path(top, "xdg"), 1);
    ok(leads_to(scratch_path(top, "xdg/libep")), "XDG_CACHE_HOME/libep");
    setenv("EP_JIT_CACHE", scratch_path(top, "a/b//c/"), 1);
    ok(leads_to(scratch_path(top, "a/b//c/")), "EP_JIT_CACHE, and the folders above it");
    setenv("EP_JIT_CACHE", "off", 1);
    ok(!opens(), "off is none");
    ok(scratch_logged("libep") == 0, "all that is worth no line");
    set_folder(scratch_path(top, "file/below"));
    scratch_write(scratch_path(top, "file"), "", 0);
    ok(!opens() && !opens() && scratch_logged("are not kept in") == 1,
       "a folder below a file is one line");
    unsetenv("EP_JIT_CACHE");
    unsetenv("XDG_CACHE_HOME");
    setenv("HOME", scratch_path(top, "nobody"), 1);
    ok(!opens() && scratch_count(top, "nobody") == 0, "a HOME that is not there is not made");
    unsetenv("HOME");
    ok(!opens() && scratch_logged("HOME name none") == 1, "no HOME is no folder");
    ok(scratch_logged("warn") == 0, "nothing of this is worth a warning");
    return 0;
}

static int others_folders(int rank, void *ctx) {
    const char *wide = scratch_make(scratch_path(scratch_folder(), "wide"));
    const char *foreign = scratch_make(scratch_path(scratch_folder(), "foreign"));
    (void)rank;
    (void)ctx;
    set_folder(wide);
    chmod(wide, 0777);
    ok(!opens() && !opens(), "a folder that all can write to is not used");
    ok(scratch_logged("warn") == 1 && scratch_logged(wide) == 1 &&
           scratch_logged("remove it and let libep make it") == 1,
       "one warning names it, and does not ask to trust what lies in it");
    chmod(wide, 0720);
    ok(!opens(), "nor one that the group can write to");
    chmod(wide, 0702);
    ok(!opens(), "nor one that strangers can write to");
    chmod(wide, 0755);
    ok(opens(), "one that others can only read is used");
    set_folder(foreign);
    if (geteuid() == 0 && chown(foreign, 12345, 12345) == 0) {
        ok(!opens() && scratch_logged(foreign) == 1, "nor one that belongs to another");
    }
    return 0;
}

static int read_only(int rank, void *ctx) {
    const char *folder = scratch_path(scratch_folder(), "read-only");
    const struct epi_jit_key key = key_of("one"), other = key_of("two");
    struct epi_cache c;
    (void)rank;
    (void)ctx;
    one_entry(&c, folder, &key);
    chmod(folder, 0500);
    if (!scratch_obey_permissions()) {
        return 0;
    }
    ok(reads(&c, &key), "a folder that cannot be written to is read");
    ok(epi_cache_lock(&c, &other) == -1 && !epi_cache_write(&c, &other, &kernel, 13020),
       "but nothing is kept in it");
    ok(scratch_logged("are not kept in") == 1 && scratch_logged("warn") == 0, "one line");
    epi_cache_close(&c);
    set_folder(scratch_path(folder, "below"));
    ok(!opens() && scratch_logged("below") == 1, "nor can one be made in it");
    chmod(folder, 0700);
    return 0;
}

/* ---- dumps -------------------------------------------------------------------------------- */

static void dump_to(const char *folder) {
    static const struct epi_cubin all = {bytes_of_kernel, CUBIN_BYTES, "ptx", "log"};
    struct epi_jit_request r = {
        .file = "kernel/route.k.c", .arch = 90, .dump = folder, .key = key_of("one")};
    epi_jit_dump(&r, &all, 13020);
}

/* Whoever can name a file in the folder must not choose by it what is written to. */
static int dumps(int rank, void *ctx) {
    const char *top = scratch_make(scratch_path(scratch_folder(), "dumps"));
    const char *good = scratch_path(top, "good/"), *victim = scratch_path(top, "victim");
    const char *wide = scratch_make(scratch_path(top, "wide"));
    const char *below = scratch_make(scratch_path(top, "below"));
    char name[128];
    struct stat st;
    size_t bytes = 0;
    (void)rank;
    (void)ctx;
    dump_to(good);
    ok(scratch_count(good, ".ptx") == 1 && scratch_count(scratch_path(good, "kernel"), "") > 4,
       "a dump is made");
    const char *ptx = scratch_find(good, ".ptx");
    ok(stat(ptx, &st) == 0 && (st.st_mode & 07777) == 0600 && stat(good, &st) == 0 &&
           (st.st_mode & 07777) == 0700,
       "for its user alone");
    unlink(ptx);
    scratch_write(victim, "precious", 8);
    ok(symlink(victim, ptx) == 0, "a link where a file will be");
    dump_to(good);
    char *text = scratch_read(victim, &bytes);
    ok(bytes == 8 && memcmp(text, "precious", 8) == 0 && lstat(ptx, &st) == 0 &&
           S_ISREG(st.st_mode),
       "is replaced, not followed");
    free(text);
    snprintf(name, sizeof(name), "%s/", scratch_path(top, "link"));
    ok(symlink("below", scratch_path(top, "link")) == 0, "a link where the folder should be");
    dump_to(scratch_path(top, "link"));
    dump_to(name);
    ok(scratch_count(below, "") == 0 && scratch_logged("it is no folder, or a link") == 2,
       "is not followed");
    scratch_make(scratch_path(top, "half"));
    ok(symlink("../below", scratch_path(top, "half/kernel")) == 0, "nor one below it");
    dump_to(scratch_path(top, "half"));
    ok(scratch_count(below, "") == 0 && scratch_count(scratch_path(top, "half"), ".ptx") == 1,
       "while the rest is dumped");
    chmod(wide, 0777);
    dump_to(wide);
    ok(scratch_count(wide, "") == 0 && scratch_logged("others can write to it") == 1,
       "a folder that others can write to gets nothing");
    return 0;
}

/* ---- locks -------------------------------------------------------------------------------- */

static struct shared { volatile bool held, waiting; } * shared;

/* Rank 0 takes the lock and keeps it until it is told otherwise, or for ever. */
static int hold(int rank, void *ctx) {
    const struct epi_jit_key key = key_of("held");
    struct epi_cache c;
    (void)rank;
    (void)ctx;
    set_folder(scratch_path(scratch_folder(), "locks"));
    epi_cache_open(&c);
    int lock = epi_cache_lock(&c, &key);
    shared->held = lock >= 0;
    while (!shared->waiting) {
        tap_sleep_ms(1);
    }
    tap_sleep_ms(50);
    epi_cache_write(&c, &key, &kernel, 13020);
    epi_cache_unlock(&c, &key, lock);
    epi_cache_close(&c);
    return lock < 0;
}

static void test_locks(void) {
    const char *folder = scratch_path(scratch_folder(), "locks");
    const struct epi_jit_key key = key_of("held");
    struct tap_ranks ranks;
    struct epi_cache c;
    for (int round = 0; round < 3; round++) {
        const bool killed = round == 1, stopped = round == 2;
        memset(shared, 0, sizeof(*shared));
        scratch_remove(folder);
        tap_ranks_start(&ranks, 1, hold, NULL);
        while (!shared->held && !tap_ranks_wait_one(&ranks, 0, 0)) {
        }
        setenv("EP_JIT_CACHE", folder, 1);
        setenv("EP_TIMEOUT_MS", stopped ? "1200" : "100000", 1);
        epi_cache_open(&c);
        shared->waiting = round == 0;
        if (killed) {
            tap_ranks_signal(&ranks, 0, SIGKILL);
        }
        const double start = tap_now();
        const int lock = epi_cache_lock(&c, &key);
        const double seconds = tap_now() - start;
        if (round == 0) {
            ok(lock >= 0 && reads(&c, &key), "who waits finds what the holder made");
            epi_cache_unlock(&c, &key, lock);
            ok(scratch_count(folder, ".lock") == 0, "and no lock stays");
        } else if (killed) {
            ok(lock >= 0 && !reads(&c, &key), "a holder that dies gives the lock back");
            epi_cache_unlock(&c, &key, lock);
        } else {
            ok(lock == -1 && seconds >= 0.29, "nobody waits for ever (%.2f s)", seconds);
            shared->waiting = true;
        }
        epi_cache_close(&c);
        ok(tap_ranks_wait(&ranks, 20) == 0, "the holder ends");
        tap_ranks_free(&ranks);
    }
    unsetenv("EP_TIMEOUT_MS");
}

int main(void) {
    tap_deadline(100);
    for (int i = 0; i < CUBIN_BYTES; i++) {
        bytes_of_kernel[i] = (unsigned char)(i * 7);
    }
    shared = tap_shared(sizeof(*shared));
    scratch_folder();
    test_key();
    in_process(entries, "entries");
    in_process(odd_entries, "what else may lie where an entry should");
    tap_expect_log("is not run: ");
    in_process(entries_of_others, "entries of others");
    in_process(old_files, "what nobody needs");
    in_process(no_memory, "no memory");
    in_process(folders, "which folder");
    tap_expect_log("compiled kernels are not kept in");
    in_process(others_folders, "folders of others");
    in_process(read_only, "a folder to be read only");
    tap_expect_log("nothing is written to it");
    in_process(dumps, "dumps");
    test_locks();
    return done_testing();
}
