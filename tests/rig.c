/* SPDX-License-Identifier: MIT */
/*
 * Declared in rig.h. Token t of rank r goes to experts t and t + 3 (modulo their number); element
 * h of its row is r * 10000 + t * 100 + h, so that every sum of a few of them is exact.
 */
#include "tests/rig.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "src/ep/group.h"
#include "tests/calls.h"
#include "tests/tap.h"

#define PAGE 4096
#define MOST_WORDS 128 /* of a message */
#define PAGE_ROWS (PAGE / (RIG_HIDDEN * 4))

int rig_scale(void) {
    const char *text = getenv("TAP_TIMEOUT_SCALE");
    int scale = text ? atoi(text) : 1;
    return scale > 0 ? scale : 1;
}

double rig_within(double seconds) {
    return rig_scale() > 1 ? 2 * rig_scale() * seconds : seconds;
}

bool rig_await(atomic_int *value, int least) {
    const double limit = tap_now() + 20.0 * rig_scale();
    while (atomic_load(value) < least) {
        if (tap_now() > limit) {
            return false;
        }
        tap_sleep_ms(1);
    }
    return true;
}

bool rig_is_sentence(const char *text) {
    const size_t len = strlen(text);
    return len > 10 && len < 400 && !strchr(text, '\n') && !strstr(text, "...");
}

/* ---- the layer ------------------------------------------------------------------------------ */

static float element(int rank, int token, int h) {
    return (float)(rank * 10000 + token * 100 + h);
}

static void *pages(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        printf("Bail out! no memory\n");
        exit(1);
    }
    return p;
}

static int warm = -1; /* the device that rig_warm has opened for this process's rank */

struct ep_group_config rig_tiny(int rank, int num_ranks, int timeout_ms) {
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;
    c.rank = rank;
    c.num_ranks = num_ranks;
    c.num_experts = num_ranks;
    c.max_tokens = 4;
    c.max_topk = 1;
    c.max_row_bytes = 16;
    c.timeout_ms = timeout_ms;
    return c;
}

void rig_config(struct ep_group_config *c, const struct rig_meeting *m, int rank,
                char address[32]) {
    static const int workers[] = {1, 2, 4, 1};
    *c = (struct ep_group_config)EP_GROUP_CONFIG_INIT;
    snprintf(address, 32, "127.0.0.1:%d", m->port);
    c->rank = m->world || m->port ? rank : -1;
    c->num_ranks = m->world || m->port ? m->num_ranks : -1;
    c->world = m->world;
    c->address = m->world || !m->port ? NULL : address;
    c->num_experts = RIG_EXPERTS * m->num_ranks;
    c->max_tokens = RIG_TOKENS;
    c->max_topk = RIG_TOPK;
    c->max_row_bytes = RIG_HIDDEN * 4;
    c->timeout_ms = m->timeout_ms;
    c->num_workers = workers[rank % 4];
    c->device_index = warm;
}

ep_status rig_group(struct rig *r, const struct rig_meeting *m, int rank) {
    struct ep_group_config c;
    char address[32];
    memset(r, 0, sizeof(*r));
    r->rank = rank;
    r->num_ranks = m->num_ranks;
    rig_config(&c, m, rank, address);
    return call_group_create(&r->group, &c);
}

ep_status rig_route(struct rig *r) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_status st = ep_handle_create(&r->handle, r->group, NULL);
    if (st != EP_OK) {
        return st;
    }
    r->x = pages(RIG_TOKENS * sizeof(*r->x));
    r->out = pages(RIG_TOKENS * sizeof(*r->out));
    r->recv = pages(RIG_MAX_ROWS * sizeof(*r->recv));
    for (int t = 0; t < RIG_TOKENS; t++) {
        for (int k = 0; k < RIG_TOPK; k++) {
            r->ids[t][k] = (t + 3 * k) % (RIG_EXPERTS * r->num_ranks);
        }
        for (int h = 0; h < RIG_HIDDEN; h++) {
            r->x[t][h] = element(r->rank, t, h);
        }
    }
    ep_tensor_2d(&ids, EP_I32, r->ids, RIG_TOKENS, RIG_TOPK);
    routing.topk_ids = &ids;
    return call_route(r->handle, &routing, NULL);
}

ep_status rig_create(struct rig *r, const struct rig_meeting *m, int rank) {
    ep_status st = rig_group(r, m, rank);
    return st == EP_OK ? rig_route(r) : st;
}

void rig_destroy(struct rig *r) {
    call_stream_destroy(r->group, &r->stream);
    ep_handle_destroy(&r->handle);
    call_group_destroy(&r->group);
    if (r->x) {
        munmap(r->x, RIG_TOKENS * sizeof(*r->x));
        munmap(r->out, RIG_TOKENS * sizeof(*r->out));
        munmap(r->recv, RIG_MAX_ROWS * sizeof(*r->recv));
    }
    r->x = r->out = r->recv = NULL;
}

ep_status rig_dispatch(struct rig *r) {
    struct ep_dispatch_args a = EP_DISPATCH_ARGS_INIT;
    struct ep_tensor x, recv, source, num_rows;
    const int64_t rows = (int64_t)r->num_ranks * RIG_TOKENS;
    ep_tensor_2d(&x, EP_F32, r->x, RIG_TOKENS, RIG_HIDDEN);
    ep_tensor_2d(&recv, EP_F32, r->recv, rows, RIG_HIDDEN);
    ep_tensor_2d(&source, EP_I32, r->source, rows, 2);
    ep_tensor_1d(&num_rows, EP_I32, &r->num_rows, 1);
    a.x = &x;
    a.recv_x = &recv;
    a.recv_source = &source;
    a.num_rows = &num_rows;
    return call_dispatch(r->handle, &a, r->stream);
}

ep_status rig_combine(struct rig *r) {
    struct ep_combine_args a = EP_COMBINE_ARGS_INIT;
    struct ep_tensor x, out;
    ep_tensor_2d(&x, EP_F32, r->recv, (int64_t)r->num_ranks * RIG_TOKENS, RIG_HIDDEN);
    ep_tensor_2d(&out, EP_F32, r->out, RIG_TOKENS, RIG_HIDDEN);
    a.x = &x;
    a.out = &out;
    return call_combine(r->handle, &a, r->stream);
}

static int home(int token, int k, int num_ranks) {
    return (token + 3 * k) % (RIG_EXPERTS * num_ranks) / RIG_EXPERTS;
}

bool rig_dispatch_right(const struct rig *r) {
    int row = 0;
    for (int s = 0; s < r->num_ranks; s++) {
        for (int t = 0; t < RIG_TOKENS; t++) {
            if (home(t, 0, r->num_ranks) != r->rank && home(t, 1, r->num_ranks) != r->rank) {
                continue;
            }
            if (row >= r->num_rows || r->source[row][0] != s || r->source[row][1] != t ||
                r->recv[row][0] != element(s, t, 0) ||
                r->recv[row][RIG_HIDDEN - 1] != element(s, t, RIG_HIDDEN - 1)) {
                diag("rank %d: row %d of %d is not token %d of rank %d", r->rank, row,
                     r->num_rows, t, s);
                return false;
            }
            row++;
        }
    }
    return row == r->num_rows;
}

bool rig_combine_right(const struct rig *r) {
    for (int t = 0; t < RIG_TOKENS; t++) {
        const float times = home(t, 0, r->num_ranks) == home(t, 1, r->num_ranks) ? 1.0f : 2.0f;
        for (int h = 0; h < RIG_HIDDEN; h++) {
            if (r->out[t][h] != times * element(r->rank, t, h)) {
                diag("rank %d: out[%d][%d] is %g", r->rank, t, h, (double)r->out[t][h]);
                return false;
            }
        }
    }
    return true;
}

bool rig_pass(struct rig *r) {
    ep_status st = rig_dispatch(r);
    if (!ok(st == EP_OK && rig_dispatch_right(r), "dispatch: %s (%s)", ep_status_string(st),
            st == EP_OK ? "" : ep_last_error())) {
        ep_group_abort(r->group);
        return false;
    }
    st = rig_combine(r);
    return ok(st == EP_OK && rig_combine_right(r), "combine: %s (%s)", ep_status_string(st),
              st == EP_OK ? "" : ep_last_error());
}

/* ---- a rank that stops in the middle -------------------------------------------------------- */

/* Words of epoch `epoch` into rank p's arena. */
static void say(struct rig *r, int p, k_u64 offset, k_u32 epoch, const k_u32 *value, int n) {
    char *arena = (char *)(uintptr_t)epi_mem_arena_address(r->group->mem, p);
    k_u64 words[MOST_WORDS], *at = (k_u64 *)(void *)(arena + offset);
    for (int i = 0; i < n; i++) {
        words[i] = (k_u64)epoch << 32 | value[i];
    }
    if (gpu_wanted()) {
        call_write(r->group, at, words, (size_t)n * sizeof(*words));
        return;
    }
    for (int i = 0; i < n; i++) {
        __atomic_store_n(&at[i], words[i], __ATOMIC_RELEASE);
    }
}

static void say_ready(struct rig *r, int p, k_u32 epoch, k_u32 signature, k_u32 where) {
    const struct k_group *k = &r->group->k;
    const k_u64 turn = (k_u64)((int)(epoch & 1) * r->num_ranks + r->rank);
    const k_u32 words[K_READY_WORDS] = {signature | RIG_TOPK << K_SIG_TOPK_SHIFT,
                                        RIG_HIDDEN * 4 | K_SIG_ROW_TYPE(K_TYPES(EP_F32, 0)), 0,
                                        where};
    say(r, p, k->map.ready + 8 * turn * K_READY_STRIDE, epoch, words, K_READY_WORDS);
}

/* `rows` selections of the peer's first expert, all in this rank's first channel. */
static void say_counts(struct rig *r, int p, k_u32 rows) {
    const struct k_group *k = &r->group->k;
    const k_u64 turn = (k_u64)(r->num_ranks + r->rank);
    k_u32 words[MOST_WORDS] = {rows, rows};
    if (k->count_words > MOST_WORDS) {
        printf("Bail out! a message of %d words\n", k->count_words);
        exit(1);
    }
    for (int c = 0; c < k->num_channels; c++) { /* prefix sums */
        words[k->count_words - k->num_channels + c] = rows;
    }
    say(r, p, k->map.counts + 8 * turn * (k_u64)k->count_words, 1, words, k->count_words);
}

void rig_say(struct rig *r, enum rig_said what) {
    const struct k_group *k = &r->group->k;
    for (int p = 0; p < r->num_ranks; p++) {
        if (what == RIG_COMBINE_READY) {
            say_ready(r, p, 2, K_OP_COMBINE | K_SIG_CACHED | 1u << K_SIG_COUNTED_SHIFT, 0);
            continue;
        }
        say_ready(r, p, 1, K_OP_DISPATCH | k->experts, K_WHERE(0, k->num_channels));
        if (what != RIG_READY) {
            say_counts(r, p, what == RIG_ROWS);
        }
        if (what == RIG_ROWS) {
            const k_u32 base[K_BASE_WORDS] = {(k_u32)(p * RIG_TOKENS), 0};
            const k_u64 turn = (k_u64)(r->num_ranks + r->rank);
            say(r, p, k->map.bases + 8 * turn * K_BASE_WORDS, 1, base, K_BASE_WORDS);
        }
    }
}

static struct {
    char *page;
    void (*fn)(void *);
    void *arg;
} trap;

static void on_segv(int sig, siginfo_t *info, void *context) {
    char *page = trap.page;
    (void)context;
    if (!page || (char *)info->si_addr < page || (char *)info->si_addr >= page + PAGE) {
        signal(sig, SIG_DFL); /* another one: it comes again, and ends the program */
        return;
    }
    trap.fn(trap.arg);
    mprotect(page, PAGE, PROT_READ | PROT_WRITE);
}

void *rig_middle_row(struct rig *r) {
    return r->x[2 * PAGE_ROWS]; /* channels are sent in order, to all ranks */
}

void *rig_middle_answer(struct rig *r) {
    /* Rows are ordered by owner, two pages each; owners are answered in turn, from the next on. */
    return r->recv[((r->rank + 1) % r->num_ranks * 2 + 1) * PAGE_ROWS];
}

void rig_trap(void *row, void (*fn)(void *arg), void *arg) {
    struct sigaction action = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO};
    trap.page = (char *)((uintptr_t)row & ~(uintptr_t)(PAGE - 1));
    trap.fn = fn;
    trap.arg = arg;
    sigaction(SIGSEGV, &action, NULL);
    mprotect(trap.page, PAGE, PROT_NONE);
}

/* ---- runs ------------------------------------------------------------------------------------ */

int rig_run(int num_ranks, bool processes, int (*fn)(int rank, void *ctx), void *ctx,
            bool *skipped) {
    *skipped = gpu_processes(processes) != processes;
    return *skipped ? 0 : gpu_run_ranks(num_ranks, processes, fn, ctx, RIG_SECONDS);
}

bool rig_gpu_works(const struct rig *r) {
    struct gpu *gpu = call_gpu(r->group);
    return !gpu || gpu_works(gpu);
}

/* ---- what a process holds ------------------------------------------------------------------- */

static int num_entries(const char *path) {
    DIR *dir = opendir(path);
    int num = 0;
    while (dir && readdir(dir)) {
        num++;
    }
    if (dir) {
        closedir(dir);
    }
    return num - 2;
}

static int num_arenas(void) {
    FILE *f = fopen("/proc/self/maps", "re");
    char line[512];
    int num = 0;
    while (f && fgets(line, sizeof(line), f)) {
        num += strstr(line, "memfd:libep") != NULL;
    }
    if (f) {
        fclose(f);
    }
    return num;
}

/* Threads that the library has named. */
static int num_named_threads(void) {
    DIR *dir = opendir("/proc/self/task");
    struct dirent *e;
    int num = 0;
    while (dir && (e = readdir(dir))) {
        char path[300], name[32] = "";
        snprintf(path, sizeof(path), "/proc/self/task/%s/comm", e->d_name);
        FILE *f = e->d_name[0] == '.' ? NULL : fopen(path, "re");
        if (f) {
            num += fgets(name, sizeof(name), f) && strncmp(name, "ep-", 3) == 0;
            fclose(f);
        }
    }
    if (dir) {
        closedir(dir);
    }
    return num;
}

/* Descriptors of device files, of which a driver opens more as it likes; `told`: all are printed. */
static int num_device_fds(bool told) {
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *e;
    int num = 0;
    while (dir && (e = readdir(dir))) {
        char path[300], to[300];
        snprintf(path, sizeof(path), "/proc/self/fd/%s", e->d_name);
        const ssize_t n = e->d_name[0] == '.' ? 0 : readlink(path, to, sizeof(to) - 1);
        to[n > 0 ? n : 0] = 0;
        num += n > 0 && strncmp(to, "/dev/nvidia", 11) == 0;
        if (told && n > 0) {
            diag("descriptor %s is %s", e->d_name, to);
        }
    }
    if (dir) {
        closedir(dir);
    }
    return num;
}

static struct rig_footprint look(void) {
    struct rig_footprint now = {tap_num_fds() - num_device_fds(false),
                                gpu_may_open() ? num_named_threads()
                                               : num_entries("/proc/self/task"),
                                num_arenas(), epi_alloc_live()};
    return now;
}

static void *nothing(void *arg) {
    return arg;
}

/* A group of one rank: what is kept of a device is there after it. */
static void warm_device(int index) {
    struct rig_meeting m = {.num_ranks = 1, .timeout_ms = 30000 * rig_scale()};
    struct ep_group_config c;
    ep_group *group = NULL;
    char address[32];
    gpu_must(ep_world_create(&m.world, 1), "a world");
    rig_config(&c, &m, 0, address);
    c.device = EP_DEVICE_CUDA;
    c.device_index = index;
    gpu_must(ep_group_create(&group, &c), "a group of one rank");
    ep_group_destroy(&group);
    ep_world_destroy(&m.world);
}

void rig_warm(int rank) {
    if (gpu_may_open() && rank >= 0) {
        struct gpu *gpu = gpu_open(gpu_index(rank), false);
        warm = gpu->device.index;
        warm_device(warm);
        gpu_close(&gpu);
    } else if (gpu_may_open()) {
        gpu_must(epi_cu_open(), "the driver");
        for (int d = 0; d < epi_cu_num_devices() && gpu_index(d) == d; d++) {
            warm_device(d);
        }
    }
}

struct rig_footprint rig_footprint(void) {
    pthread_t thread;
    /* A sanitizer starts a thread of its own with the first of ours. */
    if (pthread_create(&thread, NULL, nothing, NULL) == 0) {
        pthread_join(thread, NULL);
    }
    struct rig_footprint was = look();
    for (int i = 0; i < 100; i++) { /* the joined thread may linger for a moment */
        tap_sleep_ms(1);
        struct rig_footprint now = look();
        was.threads = now.threads < was.threads ? now.threads : was.threads;
        if (i >= 2 && now.threads == was.threads) {
            break;
        }
    }
    return was;
}

bool rig_same_footprint(struct rig_footprint was) {
    struct rig_footprint now = look();
    for (int i = 0; i < 500 && now.threads > was.threads; i++) {
        tap_sleep_ms(2);
        now = look();
    }
    if (now.fds != was.fds || now.threads != was.threads || now.arenas != was.arenas ||
        now.allocs != was.allocs) {
        diag(
            "descriptors %d -> %d, threads %d -> %d, arenas %d -> %d, allocations %lld -> %lld",
            was.fds, now.fds, was.threads, now.threads, was.arenas, now.arenas,
            (long long)was.allocs, (long long)now.allocs);
        num_device_fds(true);
        return false;
    }
    return true;
}
