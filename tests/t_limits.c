/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * What bounds memory is seen before memory is taken: free memory, cgroups of both versions up the
 * tree, and ulimits. Create, handles and the tool refuse in a sentence that names the limit, and
 * nobody is killed. A program whose timer interrupts everything makes its group all the same.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "src/base/base.h"
#include "tests/gpu.h"
#include "tests/rig.h"
#include "tests/scratch.h"
#include "tests/tap.h"

#define MIB ((int64_t)1 << 20)

/* A sanitizer needs all the address space there is, and memory of its own. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
static const bool is_sanitized = true;
#else
static const bool is_sanitized = false;
#endif

/* ---- trees that are made up ----------------------------------------------------------------- */

static char root[256];
static int num_roots;

static void new_root(void) {
    snprintf(root, sizeof(root), "%s/root%d", scratch_folder(), num_roots++);
    scratch_make(root);
}

static void put(const char *path, const char *text) {
    char whole[512], folder[512];
    snprintf(whole, sizeof(whole), "%s%s", root, path);
    snprintf(folder, sizeof(folder), "%s", whole);
    *strrchr(folder, '/') = 0;
    scratch_make(folder);
    scratch_write(whole, text, strlen(text));
}

static void room_is(int64_t bytes, const char *limit, const char *what) {
    struct epi_room room;
    epi_room_below(root, EPI_ROOM_PRIVATE, &room);
    ok(room.bytes == bytes && strstr(room.limit, limit),
       "%s: %lld instead of %lld, left by \"%s\", not by \"%s\"", what, (long long)room.bytes,
       (long long)bytes, room.limit, limit);
}

static void test_trees(void) {
    new_root();
    room_is(INT64_MAX, "no limit", "nothing is said");
    put("/proc/meminfo", "MemTotal: 99999 kB\nMemFree: 1 kB\nMemAvailable:    2048 kB\n");
    room_is(2 * MIB, "free memory", "free memory");
    put("/proc/self/cgroup", "0::/user/job\n");
    room_is(2 * MIB, "free memory", "a group of which nothing is known");
    put("/sys/fs/cgroup/user/job/memory.max", "max\n");
    put("/sys/fs/cgroup/user/job/memory.current", "1000\n");
    room_is(2 * MIB, "free memory", "a group without a limit");
    put("/sys/fs/cgroup/user/job/memory.max", "1048576\n");
    put("/sys/fs/cgroup/user/job/memory.current", "1000000\n");
    room_is(48576, "cgroup /user/job (memory.max is 1048576)", "version 2");
    put("/sys/fs/cgroup/user/job/memory.stat",
        "anon 1\nfile 900000\ninactive_anon 7\ninactive_file 500000\nactive_file 200000\n");
    room_is(648576, "cgroup /user/job", "what can be taken back is free");
    put("/sys/fs/cgroup/user/memory.max", "500000\n");
    put("/sys/fs/cgroup/user/memory.current", "200000\n");
    room_is(300000, "cgroup /user (memory.max is 500000)", "a group further up");
    put("/sys/fs/cgroup/memory.max", "100\n");
    put("/sys/fs/cgroup/memory.current", "300000\n");
    room_is(0, "cgroup / (memory.max is 100)", "the uppermost, over its limit");

    new_root();
    put("/proc/meminfo", "MemAvailable: 8192 kB\n");
    put("/proc/self/cgroup",
        "5:cpu,cpuacct:/elsewhere\n4:devices,memory:/slurm/uid_1\n1:name=systemd:/\n0::/\n");
    put("/sys/fs/cgroup/memory/elsewhere/memory.limit_in_bytes", "1\n");
    put("/sys/fs/cgroup/memory/elsewhere/memory.usage_in_bytes", "1\n");
    put("/sys/fs/cgroup/memory/slurm/uid_1/memory.limit_in_bytes", "9223372036854771712\n");
    put("/sys/fs/cgroup/memory/slurm/uid_1/memory.usage_in_bytes", "5\n");
    room_is(8 * MIB, "free memory", "version 1 without a limit");
    put("/sys/fs/cgroup/memory/slurm/memory.limit_in_bytes", "4194304\n");
    put("/sys/fs/cgroup/memory/slurm/memory.usage_in_bytes", "1048576\n");
    put("/sys/fs/cgroup/memory/slurm/memory.stat", "cache 5\ntotal_inactive_file 1048576\n");
    room_is(4 * MIB, "cgroup /slurm (memory.limit_in_bytes is 4194304)", "version 1");

    new_root(); /* a container shows its own group as the root, by another name */
    put("/proc/meminfo", "MemAvailable: 8192 kB\n");
    put("/proc/self/cgroup", "4:memory:/docker/0123\n0::/../../other\n");
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "1048576\n");
    put("/sys/fs/cgroup/memory/memory.usage_in_bytes", "0\n");
    room_is(MIB, "cgroup / (memory", "a container of version 1");
    put("/sys/fs/cgroup/memory.max", "4096\n");
    put("/sys/fs/cgroup/memory.current", "0\n");
    room_is(4096, "cgroup / (memory.max", "a container of version 2");
}

/* ---- limits of a process -------------------------------------------------------------------- */

static bool refused(ep_status st, const char *limit) {
    const bool good = st == EP_ERR_NOMEM && strstr(ep_last_error(), limit);
    if (!good) {
        fprintf(stderr, "# %s instead of \"%s\": %s\n", ep_status_string(st), limit,
                ep_last_error());
    }
    return good;
}

/* A group of one rank whose arena has so many rows of 1 MiB. */
static ep_status make_group(ep_group **group, ep_world *world, int rows) {
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;
    c.world = world;
    c.rank = 0;
    c.num_ranks = 1;
    c.num_experts = c.max_topk = c.num_slots = c.num_workers = 1;
    c.max_tokens = rows;
    c.max_row_bytes = 1 << 20;
    return ep_group_create(group, &c);
}

static int with_limit(int resource, rlim_t limit, const char *name) {
    ep_world *world = NULL;
    ep_group *group = NULL;
    const struct rlimit r = {limit, limit};
    int bad = ep_world_create(&world, 1) != EP_OK || setrlimit(resource, &r) != 0;
    bad += !refused(make_group(&group, world, 64), name);
    bad += make_group(&group, world, 2) != EP_OK; /* less fits, and the refusal left nothing */
    ep_group_destroy(&group);
    ep_world_destroy(&world);
    return bad;
}

static int small_files(void) {
    signal(SIGXFSZ, SIG_DFL);
    return with_limit(RLIMIT_FSIZE, (rlim_t)(40 * MIB),
                      "the limit on the size of files (ulimit");
}

static int small_space(void) {
    char text[4096];
    long long kib = 0;
    epi_read_text("/proc/self/status", text, sizeof(text));
    const char *at = strstr(text, "VmSize:");
    kib = at ? atoll(at + 7) : 0;
    return with_limit(RLIMIT_AS, (rlim_t)(kib * 1024 + 100 * MIB),
                      "the limit on address space");
}

static int small_data(void) {
    const struct rlimit r = {(rlim_t)(60 * MIB), (rlim_t)(60 * MIB)};
    if (setrlimit(RLIMIT_DATA, &r) != 0) {
        return 1;
    }
    void *p = epi_alloc((size_t)(200 * MIB));
    const bool good = !p && (strstr(epi_alloc_why(), "ulimit -d") || !*epi_alloc_why());
    epi_free(p);
    return !good;
}

static int run_child(int rank, void *ctx) {
    int (*const *fn)(void) = ctx;
    (void)rank;
    return (*fn)();
}

/* In a thread of a process of its own, of which nothing may be left. */
static bool in_child(int (*fn)(void)) {
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        tap_become_rank(0);
        alarm((unsigned)tap_scaled(60));
        const struct rig_footprint was = rig_footprint();
        const int failed = tap_run_threads(1, run_child, &fn);
        _exit(failed + !rig_same_footprint(was));
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status)) {
        diag("it died of signal %d", WTERMSIG(status));
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void test_ulimits(void) {
    ok(in_child(small_files), "ulimit -f raises no signal, and is named");
    if (is_sanitized) {
        skip(2, "a sanitizer needs all the address space there is");
        return;
    }
    ok(in_child(small_space), "ulimit -v is named");
    ok(in_child(small_data), "ulimit -d is named");
}

/* ---- a cgroup ------------------------------------------------------------------------------- */

static char group_path[300], group_procs[400];
static bool version_2;

static bool write_to(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    const bool good = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0) {
        close(fd);
    }
    return good;
}

/* A cgroup of 96 MiB below this process's own, where that may be made. */
static bool make_cgroup(void) {
    char text[4096], limit[400], amount[32];
    epi_read_text("/proc/self/cgroup", text, sizeof(text));
    const char *v1 = strstr(text, ":memory:"), *v2 = strstr(text, "0::");
    const char *at = v1 ? v1 + 8 : v2 ? v2 + 3 : NULL;
    version_2 = !v1;
    if (!at) {
        return false;
    }
    const int len = (int)strcspn(at, "\n");
    snprintf(group_path, sizeof(group_path), "/sys/fs/cgroup%s%.*s/libep-t_limits-%d",
             version_2 ? "" : "/memory", len > 1 ? len : 0, at, (int)getpid());
    snprintf(limit, sizeof(limit), "%s/%s", group_path,
             version_2 ? "memory.max" : "memory.limit_in_bytes");
    snprintf(group_procs, sizeof(group_procs), "%s/cgroup.procs", group_path);
    snprintf(amount, sizeof(amount), "%lld", (long long)(96 * MIB));
    return mkdir(group_path, 0755) == 0 && write_to(limit, amount);
}

static int in_cgroup(void) {
    ep_world *world = NULL;
    ep_group *group = NULL;
    ep_handle *handle = NULL;
    if (!write_to(group_procs, "0")) {
        return 99;
    }
    int bad = ep_world_create(&world, 1) != EP_OK;
    bad += !refused(make_group(&group, world, 128), "the memory limit of cgroup");
    bad += make_group(&group, world, 8) != EP_OK;
    bad += ep_handle_create(&handle, group, NULL) != EP_OK;
    void *p = epi_alloc((size_t)(200 * MIB));
    bad += p || !strstr(epi_alloc_why(), "cgroup");
    epi_free(p);
    struct epi_room room;
    epi_room(EPI_ROOM_SHARED, &room);
    bad += room.bytes > 96 * MIB || !strstr(room.limit, "cgroup");
    ep_handle_destroy(&handle);
    ep_group_destroy(&group);
    ep_world_destroy(&world);
    return bad;
}

static void test_cgroup(void) {
    if (is_sanitized) {
        skip(1, "a sanitizer takes more memory than it is allowed here");
        return;
    }
    if (!make_cgroup()) {
        skip(1, "no cgroup with a limit on memory can be made here: %s", strerror(errno));
    } else {
        ok(in_child(in_cgroup), "in a cgroup create refuses, and nobody is killed");
    }
    if (group_path[0]) {
        for (int i = 0; rmdir(group_path) != 0 && errno == EBUSY && i < 100; i++) {
            tap_sleep_ms(10);
        }
    }
}

/* ---- no memfd_create ------------------------------------------------------------------------ */

/* As in a sandbox: the system call fails, for good. */
static int in_sandbox(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_memfd_create, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    const struct sock_fprog filter = {sizeof(code) / sizeof(code[0]), code};
    ep_world *world = NULL;
    ep_group *group = NULL;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) {
        return 99;
    }
    int bad = ep_world_create(&world, 1) != EP_OK;
    bad += make_group(&group, world, 2) != EP_ERR_SYSTEM ||
           !strstr(ep_last_error(), "the system refuses memfd_create");
    ep_world_destroy(&world);
    return bad;
}

/* ---- a timer -------------------------------------------------------------------------------- */

static atomic_int ticks;

static void tick(int sig) {
    const int kept = errno;
    (void)sig;
    atomic_fetch_add(&ticks, 1);
    errno = kept;
}

/* As of a profiler, a thousand times a second and without SA_RESTART. */
static int ticking_rank(int rank, void *ctx) {
    const struct itimerval often = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    struct sigaction a = {.sa_handler = tick};
    struct ep_group_config c;
    struct rig_meeting *m = ctx;
    char address[32];
    sigaction(SIGALRM, &a, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    for (int i = 0; i < 3; i++) {
        ep_group *group = NULL;
        rig_config(&c, m, rank, address);
        c.max_tokens = 64; /* of 1 MiB: longer than a tick */
        c.max_row_bytes = 1 << 20;
        c.num_slots = 1;
        ok(ep_group_create(&group, &c) == EP_OK, "%d: a group: %s", i, ep_last_error());
        ep_group_destroy(&group);
    }
    struct rig r;
    bool works = rig_create(&r, m, rank) == EP_OK;
    for (int i = 0; works && i < 6; i++) {
        tap_sleep_ms(i % 2 == rank ? 20 : 0); /* the other waits, in each operation */
        works = rig_pass(&r);
    }
    ok(works, "and one that works");
    rig_destroy(&r);
    setitimer(ITIMER_REAL, &never, NULL);
    ok(atomic_load(&ticks) > 20, "%d ticks", atomic_load(&ticks));
    return 0;
}

static void test_timer(void) {
#ifdef __SANITIZE_THREAD__
    skip(1, "the threads of late movers take signals, which ThreadSanitizer calls a race");
    return;
#endif
    struct rig_meeting m = {2, tap_free_port(), NULL, 30000 * rig_scale()};
    ok(tap_spawn_ranks(2, ticking_rank, &m, 60) == 0,
       "signals that interrupt calls do no harm");
}

int main(void) {
    gpu_never("the memory of host ranks");
    tap_deadline(150);
    test_trees();
    test_ulimits();
    test_cgroup();
    ok(in_child(in_sandbox), "a sandbox without memfd_create is named");
    test_timer();
    return done_testing();
}
