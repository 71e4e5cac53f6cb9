/* SPDX-License-Identifier: MIT */
/* class: rest, long */
/*
 * Kernels compiled once (src/cu/jit.c), without a GPU: per process, per user, by several threads
 * and processes at once, and what happens when the disk, the memory or the compiler is not there.
 * The NVRTC of this machine does what needs a compiler; what compiles dozens of times runs in the
 * builds whose NVRTC is that of tests/driver. Each part runs in processes of its own: NVRTC stays
 * loaded.
 */
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/cu/jit.h"
#include "tests/gpu.h"
#include "tests/scratch.h"
#include "tests/tap.h"

#define DRIVER 99000 /* accepts whatever NVRTC is here */
#define ROUTE "kernel/route.k.c"

static const char *const defines[] = {"-DK_BLOCK_WARPS=8", NULL};
static const char *const files[] = {"kernel/dispatch.k.c", "kernel/combine.k.c", ROUTE};
static char nvrtc[PATH_MAX];

/* What ranks tell the test and each other. */
static struct shared {
    _Atomic int num_compiled, num_from_disk, num_from_memory, num_ready;
    size_t bytes;
    struct epi_jit_key hash; /* of the cubin */
} * shared;

/* NVRTC publishes what it makes once through atomics that an uninstrumented library hides from
 * ThreadSanitizer. Only what NVRTC itself touches is excused. */
__attribute__((visibility("default"))) const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void) {
    return "race:libnvrtc.so\n";
}

static ep_status get(const char *file, struct epi_jit_kernel *out) {
    return epi_jit_get(file, 90, defines, DRIVER, out);
}

static struct epi_jit_key hash_of(const struct epi_jit_kernel *k) {
    struct epi_jit_key hash;
    epi_jit_key_begin(&hash);
    epi_jit_key_add(&hash, k->cubin, k->bytes);
    return hash;
}

/* Adds up what this rank's process did. */
static struct epi_jit_info account(void) {
    struct epi_jit_info info;
    epi_jit_info(&info);
    shared->num_compiled += (int)info.num_compiled;
    shared->num_from_disk += (int)info.num_from_disk;
    shared->num_from_memory += (int)info.num_from_memory;
    return info;
}

static void set_environment(const char *folder) {
    unsetenv("EP_JIT_DUMP");
    setenv("EP_NVRTC_PATH", nvrtc, 1);
    setenv("EP_JIT_CACHE", folder, 1);
    setenv("EP_LOG", "info", 1);
    epi_log_reload();
}

static void in_processes(int num, int (*fn)(int, void *), const void *ctx, const char *what) {
    const struct epi_jit_key hash = shared->hash;
    const size_t bytes = shared->bytes;
    memset(shared, 0, sizeof(*shared));
    shared->hash = hash;
    shared->bytes = bytes;
    ok(tap_spawn_ranks(num, fn, (void *)(uintptr_t)ctx, 60) == 0, "%s", what);
}

/* ---- one process after the other ---------------------------------------------------------- */

static int cold(int rank, void *ctx) {
    struct epi_jit_kernel a, b;
    (void)rank;
    set_environment(ctx);
    const int fds = tap_num_fds();
    if (!ok(get(ROUTE, &a) == EP_OK && memcmp(a.cubin, "\177ELF", 4) == 0, "a cubin: %s",
            ep_last_error())) {
        return 1;
    }
    ok((uintptr_t)a.cubin % 64 == 0, "on a cache line of its own");
    ok(get(ROUTE, &b) == EP_OK && b.cubin == a.cubin && b.bytes == a.bytes, "once a process");
    struct epi_jit_info info = account();
    ok(info.num_compiled == 1 && info.num_from_disk == 0 && info.num_from_memory == 1,
       "compiled, then remembered");
    ok(info.nvrtc_version >= 12000 && strcmp(info.nvrtc_path, nvrtc) == 0, "by NVRTC");
    ok(strcmp(info.cache_folder, ctx) == 0, "and kept in the folder");
    ok(scratch_logged("NVRTC") == 1 && scratch_logged(nvrtc) == 1, "the log says which NVRTC");
    ok(scratch_count(ctx, "") == 1 && scratch_count(ctx, ".cubin") == 1, "one file is left");
    ok(tap_num_fds() <= fds + 1, "nothing stays open"); /* NVRTC may keep one */
    shared->bytes = a.bytes;
    shared->hash = hash_of(&a);
    return 0;
}

static bool nvrtc_is_mapped(void) {
    char line[4096];
    FILE *maps = fopen("/proc/self/maps", "r");
    bool found = false;
    while (maps && fgets(line, sizeof(line), maps)) {
        found = found || strstr(line, "libnvrtc") != NULL;
    }
    if (maps) {
        fclose(maps);
    }
    return found;
}

static int warm(int rank, void *ctx) {
    struct epi_jit_kernel k;
    (void)rank;
    set_environment(ctx);
    setenv("EP_NVRTC_PATH", "/nowhere", 1);
    const int fds = tap_num_fds();
    if (!ok(get(ROUTE, &k) == EP_OK, "warm: %s", ep_last_error())) {
        return 1;
    }
    const struct epi_jit_key hash = hash_of(&k);
    ok(k.bytes == shared->bytes && memcmp(&hash, &shared->hash, sizeof(hash)) == 0,
       "the same cubin");
    struct epi_jit_info info = account();
    ok(info.num_compiled == 0 && info.num_from_disk == 1, "comes from disk");
    ok(info.nvrtc_version == 0 && !*info.nvrtc_path && !nvrtc_is_mapped(), "without NVRTC");
    ok(tap_num_fds() == fds, "nothing stays open");
    return 0;
}

static int other_questions(int rank, void *ctx) {
    static const char *const others[] = {"-DK_BLOCK_WARPS=4", NULL};
    struct epi_jit_kernel k;
    (void)rank;
    set_environment(ctx);
    setenv("EP_NVRTC_PATH", "/nowhere", 1);
    ok(epi_jit_get(ROUTE, 90, others, DRIVER, &k) != EP_OK, "other defines: another kernel");
    ok(epi_jit_get(ROUTE, 80, defines, DRIVER, &k) != EP_OK, "another architecture");
    ok(epi_jit_get(ROUTE, 90, defines, DRIVER + 1000, &k) != EP_OK, "a newer driver");
    ok(epi_jit_get(files[0], 90, defines, DRIVER, &k) != EP_OK, "another file");
    ok(epi_jit_get(ROUTE, 90, defines, DRIVER + 10, &k) == EP_OK, "a minor version is nothing");
    return 0;
}

/* An entry that is not as it was left. */
static int repaired(int rank, void *ctx) {
    struct epi_jit_kernel k;
    (void)rank;
    set_environment(ctx);
    if (!ok(get(ROUTE, &k) == EP_OK && k.bytes == shared->bytes, "%s", ep_last_error())) {
        return 1;
    }
    ok(account().num_compiled == 1 && scratch_logged("is made anew") == 1, "one line says so");
    ok(scratch_count(ctx, "") == 1, "one file is left");
    return 0;
}

static void test_damage(const char *folder) {
    const char *path = scratch_find(folder, ".cubin");
    static const char *const kinds[] = {"with a flipped bit", "that is cut short",
                                        "that is empty"};
    for (int i = 0; i < 3; i++) {
        size_t bytes = 0, again = 0;
        char *good = scratch_read(path, &bytes), *other;
        if (!ok(good && bytes > 1000, "there is an entry")) {
            free(good);
            return;
        }
        good[1000] ^= (char)(i == 0);
        scratch_write(path, good, i == 0 ? bytes : i == 1 ? bytes - 1 : 0);
        good[1000] ^= (char)(i == 0);
        in_processes(1, repaired, folder, "an entry is made anew");
        other = scratch_read(path, &again);
        ok(other && again == bytes && memcmp(good, other, bytes) == 0, "as one %s", kinds[i]);
        free(good);
        free(other);
    }
}

/* ---- without a folder --------------------------------------------------------------------- */

static int wide_folder(int rank, void *ctx) {
    struct epi_jit_kernel k;
    (void)rank;
    set_environment(scratch_make(ctx));
    chmod(ctx, 0777);
    ok(get(ROUTE, &k) == EP_OK && get(ROUTE, &k) == EP_OK, "%s", ep_last_error());
    ok(scratch_logged("warn") == 1 && scratch_logged(ctx) == 1, "one warning names it");
    ok(scratch_count(ctx, "") == 0 && !*account().cache_folder, "nothing is put there");
    return 0;
}

static int read_only_home(int rank, void *ctx) {
    struct epi_jit_kernel k;
    (void)rank;
    set_environment("");
    unsetenv("XDG_CACHE_HOME");
    setenv("HOME", scratch_make(ctx), 1);
    chmod(ctx, 0500);
    scratch_obey_permissions();
    ok(get(ROUTE, &k) == EP_OK && get(ROUTE, &k) == EP_OK, "%s", ep_last_error());
    ok(scratch_logged("warn") == 0 && scratch_logged(ctx) == 1, "one line names it");
    ok(!*account().cache_folder, "there is no folder");
    return 0;
}

static int no_compiler(int rank, void *ctx) {
    struct epi_jit_kernel k = {NULL, 0};
    (void)rank;
    set_environment(ctx);
    setenv("EP_NVRTC_PATH", "/nowhere/libnvrtc.so", 1);
    ok(epi_jit_get(ROUTE, 90, defines, 13000, &k) == EP_ERR_UNSUPPORTED && !k.cubin,
       "there is no compiler");
    ok(strstr(ep_last_error(), "EP_NVRTC_PATH: /nowhere/libnvrtc.so") &&
           strstr(ep_last_error(), "pip install nvidia-cuda-nvrtc==13.*,"),
       "one sentence says what brings it: %s", ep_last_error());
    ok(epi_jit_get(ROUTE, 90, defines, 12040, &k) == EP_ERR_UNSUPPORTED &&
           strstr(ep_last_error(), "pip install nvidia-cuda-nvrtc-cu12,"),
       "for this driver: %s", ep_last_error());
    ok(scratch_count(ctx, "") == 0, "nothing is left");
    setenv("EP_NVRTC_PATH", nvrtc, 1);
    ok(get(ROUTE, &k) == EP_OK, "it is looked for again: %s", ep_last_error());
    ok(epi_jit_get(ROUTE, 90, defines, 11000, &k) == EP_ERR_INTERNAL, "one per process");
    return 0;
}

static int does_not_compile(int rank, void *ctx) {
    static const char *const wrong[] = {"-DK_BLOCK_WARPS=none", NULL};
    struct epi_jit_kernel k = {NULL, 0};
    (void)rank;
    set_environment(ctx);
    ok(epi_jit_get(ROUTE, 90, wrong, DRIVER, &k) == EP_ERR_UNSUPPORTED && !k.cubin &&
           strstr(ep_last_error(),
                  ROUTE " does not compile (--gpu-architecture=sm_90, NVRTC") &&
           strstr(ep_last_error(), "error: expected an expression"),
       "one sentence with the compiler's: %s", ep_last_error());
    ok(scratch_logged("error: expected") == 1 && scratch_logged("libep: error: 1 error") == 1,
       "the log has all of the compiler's lines");
    ok(scratch_count(ctx, ".cubin") == 0 && account().num_compiled == 0, "nothing is left");
    return 0;
}

/* ---- at the same time --------------------------------------------------------------------- */

static int at_once(int rank, void *ctx) {
    struct epi_jit_kernel k;
    (void)rank;
    set_environment(ctx);
    shared->num_ready++;
    while (shared->num_ready < 4) {
        tap_sleep_ms(1);
    }
    ok(get(ROUTE, &k) == EP_OK && k.bytes == shared->bytes, "%s", ep_last_error());
    account();
    return 0;
}

static int one_thread(int rank, void *ctx) {
    struct epi_jit_kernel *out = ctx;
    return get(rank % 2 ? ROUTE : files[1], &out[rank]) != EP_OK;
}

static int threads(int rank, void *ctx) {
    struct epi_jit_kernel k[8];
    (void)rank;
    set_environment(ctx);
    ok(tap_run_threads(8, one_thread, k) == 0, "8 threads have their kernels");
    for (int i = 2; i < 8; i++) {
        ok(k[i].cubin == k[i - 2].cubin, "the same as the others'");
    }
    struct epi_jit_info info = account();
    ok(info.num_compiled == 2 && info.num_from_memory == 6, "each compiled once");
    return 0;
}

static int all(int rank, void *ctx) {
    static const char *const with_odd[] = {ROUTE, "kernel/none.k.c", ROUTE};
    struct epi_jit_kernel k[3] = {{NULL, 0}}, one;
    (void)rank;
    set_environment(ctx);
    double start = tap_now();
    ok(epi_jit_get_all(files, 3, 90, defines, DRIVER, k) == EP_OK, "%s", ep_last_error());
    printf("TIME cold %.0f ms\n", 1e3 * (tap_now() - start));
    ok(get(ROUTE, &one) == EP_OK && one.cubin == k[2].cubin, "each where it was asked for");
    ok(scratch_logged("ms") == 3 + 1, "each compiled once"); /* and the line above */
    memset(k, 0, sizeof(k));
    ok(epi_jit_get_all(with_odd, 3, 90, defines, DRIVER, k) == EP_ERR_INTERNAL && !k[0].cubin &&
           strstr(ep_last_error(), "kernel/none.k.c"),
       "all or none: %s", ep_last_error());
    return 0;
}

static int all_warm(int rank, void *ctx) {
    struct epi_jit_kernel k[3];
    (void)rank;
    set_environment(ctx);
    double start = tap_now();
    ok(epi_jit_get_all(files, 3, 90, defines, DRIVER, k) == EP_OK, "%s", ep_last_error());
    const double seconds = tap_now() - start;
    ok(account().num_from_disk == 3, "from disk");
    ok(seconds < 0.5, "in %.3f s", seconds);
    return 0;
}

/* ---- dumps -------------------------------------------------------------------------------- */

static bool holds(const char *folder, const char *tail, const char *text) {
    size_t bytes = 0;
    char *data = scratch_read(scratch_find(folder, tail), &bytes);
    bool good = data && memmem(data, bytes, text, strlen(text));
    free(data);
    return good;
}

static int dumped(int rank, void *ctx) {
    const char *dump = scratch_path(scratch_folder(), "dump/route");
    struct epi_jit_kernel k;
    (void)rank;
    set_environment(ctx); /* has the kernel */
    setenv("EP_JIT_DUMP", dump, 1);
    ok(get(ROUTE, &k) == EP_OK && account().num_compiled == 1, "compiled for the dump");
    ok(scratch_count(dump, "") == 5 && scratch_count(dump, ".tmp") == 0,
       "four files and texts");
    ok(holds(dump, ".cu", "-DK_BLOCK_WARPS=8") && holds(dump, ".cu", "#include"), "text");
    ok(holds(dump, ".ptx", ".entry _ZN7deep_ep10throughput5routeE"), "PTX");
    ok(holds(dump, ".cubin", "\177ELF"), "cubin");
    ok(holds(dump, ".log", "registers"), "report");
    ok(holds(scratch_path(dump, "kernel"), "op.h", "kernel/"), "headers");
    ok(get(ROUTE, &k) == EP_OK && account().num_compiled == 1, "once is enough");
    setenv("EP_JIT_DUMP", scratch_path(nvrtc, "below"), 1);
    ok(get(ROUTE, &k) == EP_OK && scratch_logged("EP_JIT_DUMP=") == 1, "or not at all");
    return 0;
}

/* ---- out of memory ------------------------------------------------------------------------ */

/* Lets the n-th allocation fail until a call has come through without. Several files: a thread
 * that cannot be started is no failure, and what the others got stays. */
static void walk(int num, const char *what) {
    struct epi_jit_kernel k[3];
    int failed = 0;
    for (uint64_t n = 1; n < 40; n++) {
        const bool opened = account().nvrtc_version != 0;
        const int64_t live = epi_alloc_live();
        const uint64_t nth = epi_alloc_count() + n;
        epi_alloc_fail_at(nth);
        ep_status st =
            num > 1 ? epi_jit_get_all(files, num, 90, defines, DRIVER, k) : get(ROUTE, k);
        epi_alloc_fail_at(0);
        if (epi_alloc_count() < nth) {
            ok(st == EP_OK && failed > 2, "%s: each of %d allocations may fail", what, failed);
            return;
        }
        failed++;
        const int stays = !opened && account().nvrtc_version != 0; /* the compiler */
        if (st != EP_ERR_NOMEM && !(num > 1 && st == EP_OK)) {
            ok(false, "%s: allocation %d: %s", what, (int)n, ep_status_string(st));
        } else if (num == 1 && epi_alloc_live() != live + stays) {
            ok(false, "%s: allocation %d is not cleaned up after", what, (int)n);
        }
    }
    ok(false, "%s: no end of allocations", what);
}

static int no_memory(int rank, void *ctx) {
    (void)rank;
    set_environment(ctx);
    walk(1, "compiled");
    return 0;
}

static int no_memory_warm(int rank, void *ctx) {
    (void)rank;
    set_environment(ctx);
    walk(3, "from disk");
    ok(account().num_compiled == 0, "never compiled");
    return 0;
}

/* ------------------------------------------------------------------------------------------- */

static void often_compiled(const char *folder, const char *fresh) {
    test_damage(folder);
    tap_expect_log("others can write to it");
    in_processes(1, wide_folder, scratch_path(scratch_folder(), "wide"), "folder of mode 0777");
    in_processes(1, read_only_home, scratch_path(scratch_folder(), "home"), "HOME read only");
    in_processes(1, no_compiler, scratch_path(scratch_folder(), "none"), "no NVRTC");
    tap_expect_log("error: expected an expression");
    tap_expect_log("1 error detected");
    in_processes(1, does_not_compile, scratch_path(scratch_folder(), "bad"), "a bad kernel");
    const char *together = scratch_path(scratch_folder(), "at-once");
    in_processes(4, at_once, together, "four processes at once");
    ok(shared->num_compiled == 1 && shared->num_from_disk == 3, "compile once, read thrice");
    in_processes(1, threads, "off", "eight threads at once");
    in_processes(1, no_memory, "off", "no memory while compiling");
    in_processes(1, no_memory_warm, fresh, "no memory while reading");
}

int main(void) {
    gpu_nvrtc(nvrtc);
    tap_deadline(110);
    shared = tap_shared(sizeof(*shared));
    const char *folder = scratch_path(scratch_folder(), "cache");
    in_processes(1, cold, folder, "the first time");
    in_processes(1, warm, folder, "the second time, in another process");
    in_processes(1, other_questions, folder, "what is not the same");
    tap_expect_log("nothing is written to it");
    in_processes(1, dumped, folder, "EP_JIT_DUMP");
    const char *fresh = scratch_path(scratch_folder(), "all");
    in_processes(1, all, fresh, "several kernels at once");
    in_processes(1, all_warm, fresh, "several kernels from disk");
    if (strstr(nvrtc, "/driver/libnvrtc.so")) {
        often_compiled(folder, fresh);
    }
    return done_testing();
}
