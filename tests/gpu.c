/* SPDX-License-Identifier: MIT */
/*
 * Declared in gpu.h: whether there are GPUs, where ranks live so that they can use them, and the
 * memory and streams that a rank has of its device.
 */
#include "tests/gpu.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/tap.h"

#define CHUNK_BYTES ((size_t)64 << 20) /* more than nearly all calls need */
#define ALIGN 256
#define TIMEOUT_SCALE "2" /* contexts of processes take a while to begin and to end */

static bool wanted;
static pid_t forker; /* the process that must not open the driver; 0: none */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct gpu *unused; /* guarded by mutex */

/* ---- programs ------------------------------------------------------------------------------ */

static const char *variable(const char *name) {
    const char *text = getenv(name);

    return text && *text ? text : NULL;
}

/* Whether a variable is `yes` and not `no`, its other value and default. */
static bool chosen(const char *name, const char *yes, const char *no) {
    const char *text = variable(name);

    if (text && strcmp(text, yes) != 0 && strcmp(text, no) != 0) {
        printf("Bail out! %s is \"%s\", must be %s or %s\n", name, text, yes, no);
        exit(1);
    }
    return text && strcmp(text, yes) == 0;
}

static bool ranks_are(const char *what) {
    return chosen("EP_TEST_RANKS", what, strcmp(what, "threads") ? "threads" : "processes");
}

struct probe {
    int num_devices;
    char why[EPI_ERROR_TEXT_BYTES];
};

static void count_devices(struct probe *p) {
    p->num_devices = epi_cu_open() == EP_OK ? epi_cu_num_devices() : 0;
    snprintf(p->why, sizeof(p->why), "%s", p->num_devices ? "" : ep_last_error());
}

/* How many devices there are, found out by a process of its own where this one will fork. */
static struct probe probe_devices(void) {
    struct probe p = {0, "the driver could not be tried"};
    int ends[2];

    if (ranks_are("threads")) {
        count_devices(&p);
        return p;
    }
    fflush(NULL);
    if (pipe(ends) != 0) {
        return p;
    }
    const pid_t pid = fork();
    if (pid == 0) {
        count_devices(&p);
        _exit(write(ends[1], &p, sizeof(p)) != (ssize_t)sizeof(p));
    }
    close(ends[1]);
    if (pid > 0) {
        struct probe got;
        if (read(ends[0], &got, sizeof(got)) == (ssize_t)sizeof(got)) {
            p = got;
        }
        waitpid(pid, NULL, 0);
    }
    close(ends[0]);
    return p;
}

static void want(void) {
    /* Read when the driver is opened: kernels of all ranks of a process must run at once. */
    setenv("CUDA_MODULE_LOADING", "EAGER", 0);
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    setenv("TAP_TIMEOUT_SCALE", TIMEOUT_SCALE, 0);
    const struct probe p = probe_devices();
    if (p.num_devices == 0) {
        skip_all("no CUDA device: %s", p.why);
    }
    wanted = true;
    forker = ranks_are("threads") ? 0 : getpid();
}

void gpu_program(void) {
    if (chosen("EP_TEST_DEVICE", "cuda", "host")) {
        want();
    }
}

void gpu_only(void) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    if (!getenv("EP_TEST_DRIVER")) {
        skip_all("CUDA groups only; the driver and this sanitizer do not go together");
    }
#endif
    want();
}

void gpu_never(const char *why) {
    if (chosen("EP_TEST_DEVICE", "cuda", "host")) {
        skip_all("host groups only: %s", why);
    }
}

bool gpu_wanted(void) {
    return wanted;
}

bool gpu_may_open(void) {
    return wanted && getpid() != forker;
}

void gpu_forks_nothing(void) {
    forker = 0;
}

bool gpu_processes(bool processes) {
    return wanted && ranks_are("threads")     ? false
           : wanted && ranks_are("processes") ? true
                                              : processes;
}

int gpu_ways(void) {
    return gpu_processes(false) == gpu_processes(true) ? 1 : 2;
}

struct threads {
    int num_ranks;
    int (*fn)(int rank, void *ctx);
    void *ctx;
};

static int run_threads(int rank, void *arg) {
    const struct threads *t = arg;

    (void)rank;
    return tap_run_threads(t->num_ranks, t->fn, t->ctx);
}

int gpu_run_ranks(int num_ranks, bool processes, int (*fn)(int rank, void *ctx), void *ctx,
                  int timeout_s) {
    struct threads t = {num_ranks, fn, ctx};

    if (processes) {
        return tap_spawn_ranks(num_ranks, fn, ctx, timeout_s);
    }
    return !wanted || gpu_may_open() ? tap_run_threads(num_ranks, fn, ctx)
                                     : tap_spawn_ranks(1, run_threads, &t, timeout_s);
}

void gpu_must(ep_status st, const char *what) {
    if (st != EP_OK) {
        printf("Bail out! %s: %s: %s\n", what, ep_status_string(st), ep_last_error());
        fflush(stdout);
        _exit(1); /* the driver may be beyond an orderly end */
    }
}

void gpu_nvrtc(char path[PATH_MAX]) {
    FILE *found = popen("scripts/find.sh nvrtc", "r");
    char line[1024] = "";
    if (found && fgets(line, sizeof(line), found)) {
        line[strcspn(line, "\n")] = '\0';
    }
    if (found) {
        pclose(found);
    }
    if (!*line || !realpath(line, path)) {
        skip_all("no NVRTC here");
    }
}

void *gpu_symbol(const char *name) {
    void *lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    void *symbol = lib ? dlsym(lib, name) : NULL;

    if (!symbol) {
        printf("Bail out! the driver has no %s\n", name);
        exit(1);
    }
    return symbol;
}

/* ---- a rank's share of a device ------------------------------------------------------------ */

int gpu_index(int rank) {
    const char *local = variable("LOCAL_RANK") ? variable("LOCAL_RANK") : variable("RANK");

    if (chosen("EP_TEST_ONE_GPU", "1", "0")) {
        return 0;
    }
    gpu_must(epi_cu_open(), "the driver");
    return (rank >= 0 ? rank : local ? atoi(local) : 0) % epi_cu_num_devices();
}

enum gpu_memory gpu_memory(void) {
    static const char *const names[] = {"device", "pinned", "exact"};
    const char *text = variable("EP_TEST_MEMORY");

    for (int i = 0; text && i < 3; i++) {
        if (strcmp(text, names[i]) == 0) {
            return (enum gpu_memory)i;
        }
    }
    if (text) {
        printf("Bail out! EP_TEST_MEMORY is \"%s\", must be device, pinned or exact\n", text);
        exit(1);
    }
    return GPU_DEVICE;
}

static void add_chunk(struct gpu *g, size_t bytes) {
    struct gpu_chunk *c = &g->chunk[g->num_chunks];

    if (g->num_chunks == GPU_MAX_CHUNKS) {
        printf("Bail out! more than %d chunks of GPU memory\n", GPU_MAX_CHUNKS);
        exit(1);
    }
    *c = (struct gpu_chunk){.bytes = bytes > CHUNK_BYTES ? bytes : CHUNK_BYTES};
    gpu_must(epi_cu_alloc_host(&g->device, &c->host, c->bytes), "pinned memory");
    c->device = (uint64_t)(uintptr_t)c->host;
    if (gpu_memory() != GPU_PINNED) {
        gpu_must(epi_cu_alloc(&g->device, &c->device, c->bytes), "device memory");
    }
    g->num_chunks++;
}

static struct gpu *find_unused(int index, bool own_stream) {
    pthread_mutex_lock(&mutex);
    struct gpu **at = &unused, *g;
    while (*at && ((*at)->device.index != index || (*at)->own_stream != own_stream)) {
        at = &(*at)->next;
    }
    g = *at;
    if (g) {
        *at = g->next;
        g->next = NULL;
    }
    pthread_mutex_unlock(&mutex);
    return g;
}

struct gpu *gpu_open(int index, bool own_stream) {
    if (!gpu_may_open()) {
        printf("Bail out! the driver is opened by a process that forks ranks\n");
        exit(1);
    }
    struct gpu *g = find_unused(index, own_stream);
    if (g) {
        return g;
    }
    g = calloc(1, sizeof(*g));
    if (!g) {
        printf("Bail out! no memory\n");
        exit(1);
    }
    pthread_mutex_init(&g->mutex, NULL);
    g->own_stream = own_stream;
    gpu_must(epi_cu_device_open(&g->device, index), "the device");
    if (own_stream) {
        gpu_must(epi_cu_stream_create(&g->device, &g->stream), "a stream");
    }
    add_chunk(g, CHUNK_BYTES);
    return g;
}

void gpu_close(struct gpu **gpu) {
    struct gpu *g = *gpu;

    *gpu = NULL;
    if (g) {
        for (int i = 0; i < g->num_chunks; i++) {
            g->chunk[i].used = 0;
            g->chunk[i].num_pieces = 0;
        }
        pthread_mutex_lock(&mutex);
        g->next = unused;
        unused = g;
        pthread_mutex_unlock(&mutex);
    }
}

void gpu_take(struct gpu *g, size_t bytes, struct gpu_piece *piece) {
    int i = 0;

    bytes = (bytes + ALIGN - 1) / ALIGN * ALIGN;
    pthread_mutex_lock(&g->mutex);
    while (i < g->num_chunks && g->chunk[i].bytes - g->chunk[i].used < bytes) {
        i++;
    }
    if (i == g->num_chunks) {
        add_chunk(g, bytes);
    }
    struct gpu_chunk *c = &g->chunk[i];
    *piece = (struct gpu_piece){(uint8_t *)c->host + c->used, c->device + c->used, bytes, i};
    c->used += bytes;
    c->num_pieces++;
    pthread_mutex_unlock(&g->mutex);
}

void gpu_give(struct gpu *g, struct gpu_piece *piece) {
    pthread_mutex_lock(&g->mutex);
    struct gpu_chunk *c = &g->chunk[piece->chunk];
    if (piece->host && --c->num_pieces == 0) {
        c->used = 0;
    }
    piece->host = NULL;
    pthread_mutex_unlock(&g->mutex);
}

bool gpu_works(struct gpu *g) {
    uint8_t bytes[1000];
    uint64_t at = 0;
    void *stream = NULL;
    ep_status st = epi_cu_alloc(&g->device, &at, sizeof(bytes));

    memset(bytes, 0, sizeof(bytes));
    st = st == EP_OK ? epi_cu_stream_create(&g->device, &stream) : st;
    st = st == EP_OK ? epi_cu_fill(&g->device, stream, at, 0x3C, sizeof(bytes)) : st;
    st = st == EP_OK ? epi_cu_copy_out(&g->device, stream, bytes, at, sizeof(bytes)) : st;
    for (size_t i = 0; st == EP_OK && i < sizeof(bytes); i++) {
        st = bytes[i] == 0x3C ? EP_OK : epi_fail(EP_ERR_INTERNAL, "wrong bytes");
    }
    epi_cu_stream_destroy(&g->device, &stream);
    epi_cu_free(&g->device, &at);
    if (st != EP_OK) {
        diag("device %d: %s", g->device.index, ep_last_error());
    }
    return st == EP_OK;
}
