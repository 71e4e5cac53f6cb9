/* SPDX-License-Identifier: MIT */
/*
 * Kernels on a CUDA device: the device of one rank, its streams, the compiled kernels and their
 * launches. Owns the order of a rank's launches: each waits for the one before it, whatever
 * streams they are on, through one event; within a capture, through one of that capture. Those that
 * stand apart wait for the same piece of memory only, through an event of that. Streams
 * are never compared: one that was destroyed may give its handle to another, and the handle of a
 * thread's default stream is the same in every thread. Loaded kernels are kept for the life of the
 * process, once per device and shape, because loading some may wait for kernels that wait for this
 * thread. Must not look into a kernel's arguments, and never waits for a device.
 */
#include "src/run/gpu_memory.h"
#include "src/run/gpu_retire.h"

#include <string.h>

#include "kernel/abi.h"

#define MOST_WARPS 16
#define MOST_WARPS_GENERIC 8 /* rows pass through their registers */
#define STAGES 3
#define MOST_STAGES 8 /* as many as K_MOVER_STAGES of lang_cuda_tma.h */
#define MOST_STAGES_GENERIC 4
#define MOST_STAGE_BYTES 4096
#define LEAST_STAGE_BYTES 1024

/* One per set, device, number of warps and mover; guarded by `mutex`, freed never. */
struct loaded {
    enum epi_kernel_set set;
    int device, warps;
    bool generic;
    struct epi_cu_kernel kernel[EPI_KERNEL_COUNT]; /* those of the set */
    struct loaded *next;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct loaded *all_loaded;

#define NUM_CAPTURES 4 /* that may go on at the same time */

struct capture {
    uint64_t id;
    void *last; /* event: its newest launch */
};

struct epi_gpu {
    struct epi_cu_device device;
    struct epi_gpu_memory *memory;
    const struct loaded *loaded[EPI_NUM_KERNEL_SETS];
    struct epi_gpu_shape shape;
    bool generic; /* which mover */
    size_t shared_bytes;
    int scratch_bytes; /* of a warp */
    void *stream;      /* for overlap with the caller's work */
    void *control;     /* copies and fills that must not wait for kernels */
    void *made;        /* event: the newest piece of memory that nobody has waited for */
    struct epi_gpu_activity launches; /* outside of captures */
    void *forked; /* event: where the caller's stream was at the last fork; then what the launch
                      after that waits for */
    struct capture captures[NUM_CAPTURES];
    int next_capture;            /* whose place is taken next */
    struct capture *capture;     /* of the launch under way, or NULL, and ... */
    uint64_t capture_id;         /* ... its number */
    struct epi_gpu_apart *named; /* by the launch under way, or NULL ... */
    bool apart;                  /* ... which stands apart */
};

/* ---- kernels ---------------------------------------------------------------------------- */

static const struct {
    const char *symbol, *name, *file;
    enum epi_kernel_set set;
} kernels[EPI_KERNEL_COUNT] = {
#define ROW(NAME, name, file, args, set, symbol)                                               \
    {symbol, "ep_" #name, file, EPI_KERNEL_SET_##set},
    K_KERNELS(ROW)
#undef ROW
};

/* Where `file` is in files[num], or would come next. */
static int find_file(const char *const *files, int num, const char *file) {
    int i = 0;
    while (i < num && strcmp(files[i], file) != 0) {
        i++;
    }
    return i;
}

int epi_kernel_files(enum epi_kernel_set set, const char *files[EPI_KERNEL_COUNT]) {
    int num = 0;
    for (int i = 0; i < EPI_KERNEL_COUNT; i++) {
        if (kernels[i].set == set && find_file(files, num, kernels[i].file) == num) {
            files[num++] = kernels[i].file;
        }
    }
    return num;
}

/* The blocks into which the warps of an SM are divided. In low-latency mode there are several small ones,
 * each with a row of its own, that share nothing; all of them are on the SM at once. */
struct block {
    int warps, per_sm;
};

static struct block block_of(enum epi_kernel_set set, int warps) {
    struct block b = {warps, 1};
    if (set == EPI_KERNEL_SET_LOW_LATENCY && warps > K_LL_WARPS) {
        b.warps = K_LL_WARPS;
        b.per_sm = warps / K_LL_WARPS < K_LL_BLOCKS ? warps / K_LL_WARPS : K_LL_BLOCKS;
    }
    return b;
}

static ep_status load_kernels(const struct epi_cu_device *d, struct loaded *l) {
    char warps[32], blocks[32];
    const char *defines[] = {warps, blocks, l->generic ? "-DK_MOVER_GENERIC=1" : NULL, NULL};
    const char *files[EPI_KERNEL_COUNT];
    const int num = epi_kernel_files(l->set, files);
    struct epi_jit_kernel built[EPI_KERNEL_COUNT];
    void *module[EPI_KERNEL_COUNT] = {NULL};
    const struct block b = block_of(l->set, l->warps);
    epi_format(warps, sizeof(warps), "-DK_BLOCK_WARPS=%d", b.warps);
    epi_format(blocks, sizeof(blocks), "-DK_BLOCKS_PER_SM=%d", b.per_sm);
    ep_status st = epi_jit_get_all(files, num, d->major * 10 + d->minor, defines,
                                   epi_cu_driver_version(), built);
    for (int i = 0; st == EP_OK && i < num; i++) {
        st = epi_cu_module_load(d, built[i].cubin, &module[i]);
    }
    for (int i = 0; st == EP_OK && i < EPI_KERNEL_COUNT; i++) {
        if (kernels[i].set == l->set) {
            st = epi_cu_kernel_get(d, module[find_file(files, num, kernels[i].file)],
                                   kernels[i].symbol, kernels[i].name, &l->kernel[i]);
        }
    }
    for (int i = 0; st != EP_OK && i < num; i++) {
        epi_cu_module_unload(d, &module[i]);
    }
    return st;
}

/* Under the mutex. Loaded kernels keep their device open. */
static ep_status load_first(const struct epi_cu_device *d, struct loaded *l) {
    struct epi_cu_device keep;
    EPI_TRY(load_kernels(d, l));
    EPI_TRY(epi_cu_device_open(&keep, d->index)); /* and never closed */
    l->next = all_loaded;
    all_loaded = l;
    return EP_OK;
}

/* A set's kernels for a device, loaded by whoever comes first. */
static ep_status find_loaded(const struct epi_cu_device *d, enum epi_kernel_set set, int warps,
                             bool generic, const struct loaded **out) {
    ep_status st = EP_OK;
    pthread_mutex_lock(&mutex);
    struct loaded *l = all_loaded;
    while (l && (l->device != d->index || l->set != set || l->warps != warps ||
                 l->generic != generic)) {
        l = l->next;
    }
    if (!l) {
        l = epi_alloc(sizeof(*l));
        if (!l) {
            st = epi_fail(EP_ERR_NOMEM, "no memory for the kernels of device %d", d->index);
        } else {
            *l = (struct loaded){set, d->index, warps, generic, {{0}}, NULL};
            st = load_first(d, l);
        }
        if (st != EP_OK) {
            epi_free(l);
        }
    }
    pthread_mutex_unlock(&mutex);
    *out = l;
    return st;
}

ep_status epi_gpu_load(struct epi_gpu *g, enum epi_kernel_set set) {
    return find_loaded(&g->device, set, g->shape.warps, g->generic, &g->loaded[set]);
}

/* As many warps as leave each a ring of useful stages. */
static ep_status choose_shape(struct epi_gpu *g, int scratch_bytes) {
    const bool generic = g->generic;
    for (int warps = generic ? MOST_WARPS_GENERIC : MOST_WARPS; warps >= 1; warps /= 2) {
        const int each = g->device.max_shared_bytes / warps - scratch_bytes - K_RING_HEAD;
        const int stage = each / STAGES / 128 * 128;
        if (stage >= LEAST_STAGE_BYTES && (stage >= 2048 || warps <= 4)) {
            g->shape.warps = warps;
            g->scratch_bytes = scratch_bytes;
            g->shape.stages = STAGES;
            g->shape.most_stages = generic ? MOST_STAGES_GENERIC : MOST_STAGES;
            g->shape.stage_bytes = stage < MOST_STAGE_BYTES ? stage : MOST_STAGE_BYTES;
            g->shared_bytes =
                (size_t)warps *
                (size_t)(scratch_bytes + K_RING_BYTES(STAGES, g->shape.stage_bytes));
            return EP_OK;
        }
    }
    return epi_fail(EP_ERR_UNSUPPORTED,
                    "device %d has %d bytes of shared memory for a block, a warp needs %d: "
                    "lower the number of ranks",
                    g->device.index, g->device.max_shared_bytes,
                    scratch_bytes + K_RING_BYTES(STAGES, LEAST_STAGE_BYTES));
}

/* ---- create, destroy -------------------------------------------------------------------- */

static ep_status open_all(struct epi_gpu *g, int device, int scratch_bytes, bool generic) {
    EPI_TRY(epi_cu_device_open(&g->device, device));
    g->generic = generic || g->device.major < 9;
    EPI_TRY(choose_shape(g, scratch_bytes));
    EPI_TRY(epi_gpu_memory_open(&g->memory, device));
    EPI_TRY(epi_cu_stream_create_high(&g->device, &g->stream));
    EPI_TRY(epi_cu_stream_create(&g->device, &g->control));
    EPI_TRY(epi_cu_event_create_plain(&g->device, &g->made));
    EPI_TRY(epi_cu_event_create_plain(&g->device, &g->launches.last));
    for (int i = 0; i < NUM_CAPTURES; i++) {
        EPI_TRY(epi_cu_event_create_plain(&g->device, &g->captures[i].last));
    }
    return epi_cu_event_create_plain(&g->device, &g->forked);
}

ep_status epi_gpu_create(struct epi_gpu **out, int device, int scratch_bytes, bool generic) {
    struct epi_gpu *g = epi_alloc(sizeof(*g));
    if (!g) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a device");
    }
    epi_gpu_free_retired();
    ep_status st = open_all(g, device, scratch_bytes, generic);
    if (st != EP_OK) {
        epi_gpu_destroy(&g);
        return st;
    }
    g->launches.device = &g->device;
    epi_gpu_activity_begin(&g->launches);
    *out = g;
    return EP_OK;
}

/* What was given back on the stream is the pool's again, so that the last to leave can trim it. A
 * stream that shares its hardware queue with one that waits is not waited for. */
static void await_frees(struct epi_gpu *g) {
    const struct epi_deadline d = epi_deadline_after(100 * EPI_NS_PER_MS);
    if (!g->stream || !g->forked ||
        epi_cu_event_record(&g->device, g->forked, g->stream) != EP_OK) {
        return;
    }
    while (epi_cu_event_query(&g->device, g->forked) == EP_AGAIN && !epi_deadline_expired(d)) {
        epi_sleep_ns(20 * EPI_NS_PER_US);
    }
}

void epi_gpu_destroy(struct epi_gpu **gpu) {
    struct epi_gpu *g = *gpu;
    *gpu = NULL;
    if (g) {
        epi_gpu_activity_end(&g->launches);
        await_frees(g);
        epi_cu_event_destroy(&g->device, &g->forked);
        for (int i = 0; i < NUM_CAPTURES; i++) {
            epi_cu_event_destroy(&g->device, &g->captures[i].last);
        }
        epi_cu_event_destroy(&g->device, &g->launches.last);
        epi_cu_event_destroy(&g->device, &g->made);
        epi_cu_stream_destroy(&g->device, &g->control);
        epi_cu_stream_destroy(&g->device, &g->stream);
        epi_gpu_memory_close(&g->memory);
        epi_cu_device_close(&g->device);
        epi_free(g);
        epi_gpu_free_retired();
    }
}

ep_status epi_gpu_attach(struct epi_gpu *g, void *host, size_t bytes, uint64_t *address) {
    return epi_gpu_register(&g->device, host, bytes, address);
}

void epi_gpu_detach(void *host) {
    epi_gpu_unregister(host);
}

const struct epi_cu_device *epi_gpu_device(const struct epi_gpu *g) {
    return &g->device;
}

void *epi_gpu_stream(const struct epi_gpu *g) {
    return g->stream;
}

struct epi_gpu_shape epi_gpu_shape(const struct epi_gpu *g) {
    return g->shape;
}

/* ---- memory ----------------------------------------------------------------------------- */

ep_status epi_gpu_reserve(struct epi_gpu *g, uint64_t *at, size_t bytes) {
    uint64_t got = 0;
    EPI_TRY(
        epi_cu_pool_alloc(&g->device, epi_gpu_memory_pool(g->memory), g->control, &got, bytes));
    const ep_status st = epi_cu_event_record(&g->device, g->made, g->control);
    if (st != EP_OK) {
        epi_cu_pool_free(&g->device, g->control, &got);
        return st;
    }
    *at = got;
    return EP_OK;
}

static ep_status zero_at_once(struct epi_gpu *g, uint64_t at, size_t bytes) {
    EPI_TRY(epi_cu_fill(&g->device, g->control, at, 0, bytes));
    return epi_cu_stream_sync(&g->device, g->control);
}

ep_status epi_gpu_zero(struct epi_gpu *g, void *stream, uint64_t at, size_t bytes) {
    if (g->capture) { /* a graph would do it again and again */
        return zero_at_once(g, at, bytes);
    }
    EPI_TRY(epi_cu_event_wait(&g->device, stream, g->made));
    return epi_cu_fill(&g->device, stream, at, 0, bytes);
}

void epi_gpu_free(struct epi_gpu *g, uint64_t *at) {
    if (*at && atomic_load(
                   &g->launches.launched)) { /* not before the kernels that use it have ended */
        epi_cu_event_wait(&g->device, g->stream, g->launches.last);
    }
    if (*at) {
        epi_cu_pool_free(&g->device, g->stream, at);
    }
}

ep_status epi_gpu_take_chunk(struct epi_gpu *g, void **chunk) {
    return epi_gpu_memory_take(g->memory, chunk);
}

void epi_gpu_give_chunk(struct epi_gpu *g, void *chunk) {
    epi_gpu_memory_give(g->memory, chunk);
}

ep_status epi_gpu_in(struct epi_gpu *g, uint64_t to, const void *from, size_t bytes) {
    return epi_cu_copy_in(&g->device, g->control, to, from, bytes);
}

ep_status epi_gpu_out(struct epi_gpu *g, void *to, uint64_t from, size_t bytes) {
    return epi_cu_copy_out(&g->device, g->control, to, from, bytes);
}

/* ---- launches --------------------------------------------------------------------------- */

/* A capture that is new takes the place of the one that has had its own for longest. */
static ep_status begin_captured(struct epi_gpu *g, void *stream, uint64_t id) {
    for (int i = 0; i < NUM_CAPTURES; i++) {
        if (g->captures[i].id == id) {
            g->capture = &g->captures[i];
            return epi_cu_event_wait(&g->device, stream, g->capture->last);
        }
    }
    g->capture = &g->captures[g->next_capture];
    g->next_capture = (g->next_capture + 1) % NUM_CAPTURES;
    g->capture->id = 0; /* until something was launched in it */
    return EP_OK;
}

ep_status epi_gpu_begin(struct epi_gpu *g, void *stream, struct epi_gpu_apart *a, bool apart,
                        bool *capturing) {
    uint64_t id = 0;
    EPI_TRY(epi_cu_capture_id(&g->device, stream, &id));
    if (capturing) {
        *capturing = id != 0;
    }
    g->capture = NULL;
    g->named = NULL;
    if (id) {
        g->capture_id = id;
        return begin_captured(g, stream, id);
    }
    g->named = a;
    g->apart = apart;
    if (a && a->pending) {
        EPI_TRY(epi_cu_event_wait(&g->device, stream, a->event));
    }
    return (apart ? !a->pending && a->was_used : atomic_load(&g->launches.launched))
               ? epi_cu_event_wait(&g->device, stream, g->launches.last)
               : EP_OK;
}

/* Whether there are launches for `a` that the others are not behind. */
static void set_pending(struct epi_gpu *g, struct epi_gpu_apart *a, bool pending) {
    atomic_fetch_add(&g->launches.apart, (int)pending - (int)a->pending);
    a->pending = pending;
    a->was_used = !pending;
}

/* What was launched on the stream is the newest now. */
static ep_status record_launch(struct epi_gpu *g, void *stream) {
    struct capture *c = g->capture;
    struct epi_gpu_apart *a = g->named;
    g->capture = NULL;
    g->named = NULL;
    if (c) {
        c->id = g->capture_id;
        atomic_store(&g->launches.captured, true);
        return epi_cu_event_record(&g->device, c->last, stream);
    }
    if (a && g->apart) {
        set_pending(g, a, true);
        return epi_cu_event_record(&g->device, a->event, stream);
    }
    atomic_store(&g->launches.launched, true);
    EPI_TRY(epi_cu_event_record(&g->device, g->launches.last, stream));
    if (a) {
        set_pending(g, a, false);
    }
    return EP_OK;
}

ep_status epi_gpu_apart_create(struct epi_gpu *g, struct epi_gpu_apart *a) {
    *a = (struct epi_gpu_apart){NULL, false, false};
    return epi_cu_event_create_plain(&g->device, &a->event);
}

/* On a stream of its own, so that nobody waits here. */
void epi_gpu_apart_join(struct epi_gpu *g, struct epi_gpu_apart *a) {
    if (a->pending) {
        epi_gpu_launch_begin();
        if (epi_gpu_begin(g, g->stream, a, false, NULL) == EP_OK) {
            record_launch(g, g->stream);
        }
        epi_gpu_launch_end();
    }
}

void epi_gpu_apart_destroy(struct epi_gpu *g, struct epi_gpu_apart *a) {
    epi_gpu_apart_join(g, a);
    epi_cu_event_destroy(&g->device, &a->event);
}

static ep_status launch_and_record(struct epi_gpu *g, enum epi_kernel kernel, const void *args,
                                   int blocks, void *stream, bool join) {
    const enum epi_kernel_set set = kernels[kernel].set;
    const struct block b = block_of(set, g->shape.warps);
    const size_t least =
        (size_t)b.warps * ((size_t)g->scratch_bytes + (size_t)K_LL_STAGE_BYTES);
    const size_t ll_bytes = least < K_LL_SHARED_BYTES ? K_LL_SHARED_BYTES : least;
    const struct epi_cu_launch l = {
        .blocks = blocks * b.per_sm,
        .threads = 32 * b.warps,
        .shared_bytes = set == EPI_KERNEL_SET_LOW_LATENCY ? ll_bytes : g->shared_bytes,
        .stream = stream};
    EPI_TRY(epi_cu_launch(&g->device, &g->loaded[set]->kernel[kernel], &l, args));
    if (join) {
        EPI_TRY(epi_cu_event_wait(&g->device, stream, g->launches.last));
    }
    return record_launch(g, stream);
}

ep_status epi_gpu_launch(struct epi_gpu *g, enum epi_kernel kernel, const void *args,
                         int blocks, void *stream, bool join) {
    epi_gpu_launch_begin();
    const ep_status st = launch_and_record(g, kernel, args, blocks, stream, join);
    epi_gpu_launch_end();
    return st;
}

ep_status epi_gpu_is_capturing(struct epi_gpu *g, void *stream, bool *capturing) {
    uint64_t id = 0;
    ep_status st = epi_cu_capture_id(&g->device, stream, &id);
    *capturing = id != 0;
    return st;
}

ep_status epi_gpu_fork(struct epi_gpu *g, void *stream, struct epi_gpu_apart *a) {
    EPI_TRY(epi_cu_event_record(&g->device, g->forked, stream));
    EPI_TRY(epi_cu_event_wait(&g->device, g->stream, g->forked));
    EPI_TRY(epi_gpu_begin(g, g->stream, a, false, NULL));
    return epi_cu_event_record(&g->device, g->forked, g->stream);
}

ep_status epi_gpu_beside(struct epi_gpu *g, void *stream) {
    g->capture = NULL;
    g->named = NULL;
    return epi_cu_event_wait(&g->device, stream, g->forked);
}

ep_status epi_gpu_idle(struct epi_gpu *g) {
    return atomic_load(&g->launches.launched) ? epi_cu_event_query(&g->device, g->launches.last)
                                              : EP_OK;
}

bool epi_gpu_busy(const struct epi_gpu *g) {
    return epi_gpu_activity_goes_on(&g->launches);
}
