/* SPDX-License-Identifier: MIT */
/*
 * The driver's interface but for kernels: devices, streams, events and memory. Device memory is
 * ordinary memory, shareable memory a memfd, a stream a thread with a queue. Functions are called
 * from any thread; what is queued runs on its stream's. What devices do by themselves (time,
 * caches, capture) it does not do; a capture is invalid from its beginning.
 */
#include "tests/driver/driver.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define NUM_DEVICES 2
#define NUM_SMS 16        /* EP_TEST_SMS says otherwise */
#define SHARED_BYTES 6144 /* so that blocks have two warps */
#define POLL_US 20
#define CAPTURE_INVALIDATED 2
#define CU_CAPTURE_INVALIDATED 901
#define PAGE ((size_t)4096)
#define TOUCHED_BYTES                                                                          \
    ((size_t)1 << 18) /* of an allocation: the others are the kernel's zeros */

static int contexts[NUM_DEVICES];
static _Thread_local void *stack[16];
static _Thread_local int depth;

/* ---- devices -------------------------------------------------------------------------------- */

DEFINE(cuInit, unsigned flags) {
    return flags ? CU_INVALID_VALUE : 0;
}
DEFINE(cuDriverGetVersion, int *version) {
    *version = 13000;
    return 0;
}
DEFINE(cuGetErrorName, int result, const char **name) {
    *name = result == CU_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
    return 0;
}
DEFINE(cuGetErrorString, int result, const char **text) {
    (void)result;
    *text = "the driver for tests says no more";
    return 0;
}
DEFINE(cuDeviceGetCount, int *count) {
    *count = NUM_DEVICES;
    return 0;
}
DEFINE(cuDeviceGet, int *device, int index) {
    *device = index;
    return index < 0 || index >= NUM_DEVICES ? CU_INVALID_DEVICE : 0;
}
DEFINE(cuDeviceGetName, char *name, int bytes, int device) {
    snprintf(name, (size_t)bytes, "a device for tests, %d", device);
    return 0;
}
DEFINE(cuDeviceGetAttribute, int *value, int attribute, int device) {
    (void)device;
    const char *sms = getenv("EP_TEST_SMS");
    *value = attribute == 16   ? (sms ? atoi(sms) : NUM_SMS)
             : attribute == 75 ? 9
             : attribute == 76 ? 0
                               : 1;
    *value = attribute == 97 ? SHARED_BYTES : *value;
    return 0;
}
DEFINE(cuDeviceTotalMem_v2, size_t *bytes, int device) {
    (void)device;
    *bytes = (size_t)1 << 34;
    return 0;
}
DEFINE(cuDeviceGetUuid_v2, uint8_t *uuid, int device) {
    memset(uuid, device + 1, 16);
    return 0;
}
DEFINE(cuDeviceCanAccessPeer, int *can, int device, int peer) {
    *can = device != peer;
    return 0;
}
DEFINE(cuDevicePrimaryCtxRetain, void **context, int device) {
    *context = &contexts[device];
    return 0;
}
DEFINE(cuDevicePrimaryCtxRelease_v2, int device) {
    (void)device;
    return 0;
}
DEFINE(cuCtxPushCurrent_v2, void *context) {
    stack[depth++] = context;
    return 0;
}
DEFINE(cuCtxPopCurrent_v2, void **context) {
    *context = stack[--depth];
    return 0;
}
DEFINE(cuCtxGetDevice, int *device) {
    if (depth == 0) {
        return CU_INVALID_VALUE;
    }
    *device = (int)((int *)stack[depth - 1] - contexts);
    return 0;
}
DEFINE(cuCtxEnablePeerAccess, void *context, unsigned flags) {
    (void)context, (void)flags;
    return 0;
}
DEFINE(cuCtxGetStreamPriorityRange, int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}
DEFINE(cuThreadExchangeStreamCaptureMode, int *mode) {
    (void)mode;
    return 0;
}

/* ---- streams -------------------------------------------------------------------------------- */

struct event {
    atomic_ullong recorded, passed;
    atomic_int users; /* the program, until it destroys it, and what is queued */
};

struct stream {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct op *first, **last;
    uint64_t added, ended;
    bool stop;
    atomic_bool captured;
    struct crew crew; /* of launches on this stream, one at a time */
};

static struct stream legacy;
static pthread_once_t legacy_once = PTHREAD_ONCE_INIT;

static void *stream_main(void *arg) {
    struct stream *s = arg;
    pthread_mutex_lock(&s->mutex);
    for (;;) {
        while (!s->first && !s->stop) {
            pthread_cond_wait(&s->changed, &s->mutex);
        }
        struct op *op = s->first;
        if (!op) {
            break;
        }
        s->first = op->next;
        s->last = s->first ? s->last : &s->first;
        pthread_mutex_unlock(&s->mutex);
        op->crew = &s->crew;
        op->run(op);
        free(op);
        pthread_mutex_lock(&s->mutex);
        s->ended++;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->mutex);
    return NULL;
}

static void stream_start(struct stream *s) {
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    s->last = &s->first;
    if (pthread_create(&s->thread, NULL, stream_main, s) != 0) {
        abort();
    }
}

static void legacy_start(void) {
    stream_start(&legacy);
}

static struct stream *stream_of(void *stream) {
    if (!stream) {
        pthread_once(&legacy_once, legacy_start);
        return &legacy;
    }
    return stream;
}

struct op *driver_op(void (*run)(struct op *op)) {
    struct op *op = calloc(1, sizeof(*op));
    if (!op) {
        abort();
    }
    op->run = run;
    return op;
}

int driver_queue(void *stream, struct op *op) {
    struct stream *s = stream_of(stream);
    pthread_mutex_lock(&s->mutex);
    *s->last = op;
    s->last = &op->next;
    s->added++;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    return 0;
}

DEFINE(cuStreamCreate, void **stream, unsigned flags) {
    struct stream *s = calloc(1, sizeof(*s));
    (void)flags;
    if (!s) {
        return CU_OUT_OF_MEMORY;
    }
    stream_start(s);
    *stream = s;
    return 0;
}
DEFINE(cuStreamCreateWithPriority, void **stream, unsigned flags, int priority) {
    (void)priority;
    return cuStreamCreate(stream, flags);
}
DEFINE(cuStreamDestroy_v2, void *stream) {
    struct stream *s = stream;
    pthread_mutex_lock(&s->mutex);
    s->stop = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    pthread_join(s->thread, NULL);
    driver_dismiss(&s->crew);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->mutex);
    free(s);
    return 0;
}
DEFINE(cuStreamSynchronize, void *stream) {
    struct stream *s = stream_of(stream);
    pthread_mutex_lock(&s->mutex);
    const uint64_t until = s->added;
    while (s->ended < until) {
        pthread_cond_wait(&s->changed, &s->mutex);
    }
    pthread_mutex_unlock(&s->mutex);
    return 0;
}
DEFINE(cuStreamGetCaptureInfo_v2, void *stream, int *status, uint64_t *id, void **graph,
       const void **dependencies, size_t *num) {
    (void)id, (void)graph, (void)dependencies, (void)num;
    *status = atomic_load(&stream_of(stream)->captured) ? CAPTURE_INVALIDATED : 0;
    return 0;
}
DEFINE(cuStreamBeginCapture_v2, void *stream, int mode) {
    (void)mode;
    atomic_store(&stream_of(stream)->captured, true);
    return 0;
}
DEFINE(cuStreamEndCapture, void *stream, void **graph) {
    *graph = NULL;
    atomic_store(&stream_of(stream)->captured, false);
    return CU_CAPTURE_INVALIDATED;
}

static void event_drop(struct event *e) {
    if (atomic_fetch_sub(&e->users, 1) == 1) {
        free(e);
    }
}
static void run_record(struct op *op) {
    struct event *e = op->to;
    atomic_store(&e->passed, op->value);
    event_drop(e);
}
static void run_wait(struct op *op) {
    struct event *e = op->to;
    while (atomic_load(&e->passed) < op->value) {
        usleep(POLL_US);
    }
    event_drop(e);
}
static void run_hold(struct op *op) {
    while (atomic_load((_Atomic uint32_t *)op->to) < op->value) {
        usleep(POLL_US);
    }
}
DEFINE(cuEventCreate, void **event, unsigned flags) {
    (void)flags;
    struct event *e = calloc(1, sizeof(*e));
    if (e) {
        atomic_store(&e->users, 1);
    }
    *event = e;
    return e ? 0 : CU_OUT_OF_MEMORY;
}
DEFINE(cuEventDestroy_v2, void *event) {
    event_drop(event);
    return 0;
}
DEFINE(cuEventRecord, void *event, void *stream) {
    struct event *e = event;
    struct op *op = driver_op(run_record);
    op->to = e;
    op->value = atomic_fetch_add(&e->recorded, 1) + 1;
    atomic_fetch_add(&e->users, 1);
    return driver_queue(stream, op);
}
DEFINE(cuEventQuery, void *event) {
    struct event *e = event;
    return atomic_load(&e->passed) >= atomic_load(&e->recorded) ? 0 : CU_NOT_READY;
}
DEFINE(cuEventElapsedTime, float *ms, void *a, void *b) {
    (void)a, (void)b;
    *ms = 0;
    return 0;
}
DEFINE(cuStreamWaitEvent, void *stream, void *event, unsigned flags) {
    struct event *e = event;
    struct op *op = driver_op(run_wait);
    (void)flags;
    op->to = e;
    op->value = atomic_load(&e->recorded);
    atomic_fetch_add(&e->users, 1);
    return driver_queue(stream, op);
}
DEFINE(cuStreamWaitValue32_v2, void *stream, uint64_t at, uint32_t value, unsigned flags) {
    struct op *op = driver_op(run_hold);
    (void)flags;
    op->to = (void *)(uintptr_t)at;
    op->value = value;
    return driver_queue(stream, op);
}

/* ---- memory --------------------------------------------------------------------------------- */

enum { MOST_RANGES = 4096 };
static struct range {
    uintptr_t at;
    size_t bytes;
    int type, device; /* 1 host, 2 device */
} ranges[MOST_RANGES];
static pthread_mutex_t ranges_mutex = PTHREAD_MUTEX_INITIALIZER;

static int current(void) {
    int device = 0;
    cuCtxGetDevice(&device);
    return device;
}

static void note(const void *at, size_t bytes, int type) {
    pthread_mutex_lock(&ranges_mutex);
    for (int i = 0; i < MOST_RANGES; i++) {
        if (!ranges[i].at) {
            ranges[i] = (struct range){(uintptr_t)at, bytes, type, current()};
            break;
        }
    }
    pthread_mutex_unlock(&ranges_mutex);
}

static size_t forget(const void *at) {
    size_t bytes = 0;
    pthread_mutex_lock(&ranges_mutex);
    for (int i = 0; i < MOST_RANGES; i++) {
        if (ranges[i].at == (uintptr_t)at && bytes == 0) {
            bytes = ranges[i].bytes;
            ranges[i].at = 0;
        }
    }
    pthread_mutex_unlock(&ranges_mutex);
    return bytes;
}

DEFINE(cuPointerGetAttributes, unsigned num, int *attributes, void **data, uint64_t p) {
    int type = 0, device = -1;
    pthread_mutex_lock(&ranges_mutex);
    for (int i = 0; i < MOST_RANGES; i++) {
        if (ranges[i].at && p - ranges[i].at < ranges[i].bytes) {
            type = ranges[i].type;
            device = ranges[i].device;
        }
    }
    pthread_mutex_unlock(&ranges_mutex);
    for (unsigned i = 0; i < num; i++) {
        *(int *)data[i] = attributes[i] == 2 ? type : attributes[i] == 9 ? device : 0;
    }
    return 0;
}
DEFINE(cuPointerGetAttribute, void *data, int attribute, uint64_t p) {
    return cuPointerGetAttributes(1, &attribute, &data, p);
}
DEFINE(cuMemGetInfo_v2, size_t *available, size_t *total) {
    *available = *total = (size_t)1 << 34;
    return 0;
}
DEFINE(cuMemAlloc_v2, uint64_t *at, size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 256, bytes) != 0) {
        return CU_OUT_OF_MEMORY;
    }
    memset(p, 0xcd, bytes < TOUCHED_BYTES ? bytes : TOUCHED_BYTES); /* it is not zeroed */
    note(p, bytes, 2);
    *at = (uint64_t)(uintptr_t)p;
    return 0;
}
DEFINE(cuMemAllocManaged, uint64_t *at, size_t bytes, unsigned flags) {
    (void)flags;
    return cuMemAlloc_v2(at, bytes);
}
DEFINE(cuMemFree_v2, uint64_t at) {
    forget((void *)(uintptr_t)at);
    free((void *)(uintptr_t)at);
    return 0;
}
DEFINE(cuMemHostAlloc, void **p, size_t bytes, unsigned flags) {
    (void)flags;
    if (posix_memalign(p, 4096, bytes) != 0) {
        return CU_OUT_OF_MEMORY;
    }
    note(*p, bytes, 1);
    return 0;
}
DEFINE(cuMemFreeHost, void *p) {
    forget(p);
    free(p);
    return 0;
}
DEFINE(cuMemHostRegister_v2, void *p, size_t bytes, unsigned flags) {
    (void)flags;
    note(p, bytes, 1);
    return 0;
}
DEFINE(cuMemHostUnregister, void *p) {
    return forget(p) ? 0 : CU_INVALID_VALUE;
}
DEFINE(cuMemHostGetDevicePointer_v2, uint64_t *at, void *p, unsigned flags) {
    (void)flags;
    *at = (uint64_t)(uintptr_t)p;
    return 0;
}
DEFINE(cuMemAllocAsync, uint64_t *at, size_t bytes, void *stream) {
    (void)stream;
    return cuMemAlloc_v2(at, bytes);
}
static void run_free(struct op *op) {
    cuMemFree_v2((uint64_t)(uintptr_t)op->to);
}
DEFINE(cuMemFreeAsync, uint64_t at, void *stream) {
    struct op *op = driver_op(run_free);
    op->to = (void *)(uintptr_t)at;
    return driver_queue(stream, op);
}
DEFINE(cuMemGetAllocationGranularity, size_t *bytes, const struct cu_allocation *a, int kind) {
    (void)a, (void)kind;
    *bytes = PAGE;
    return 0;
}
/* A handle is a descriptor; 0 is none, so it is counted from 1. */
DEFINE(cuMemCreate, uint64_t *handle, size_t bytes, const struct cu_allocation *a,
       unsigned long long flags) {
    const int fd = memfd_create("device", MFD_CLOEXEC);
    (void)a, (void)flags;
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) {
        return CU_OUT_OF_MEMORY;
    }
    *handle = (uint64_t)fd + 1;
    return 0;
}
DEFINE(cuMemRelease, uint64_t handle) {
    return close((int)handle - 1) ? CU_INVALID_VALUE : 0;
}
DEFINE(cuMemAddressReserve, uint64_t *at, size_t bytes, size_t align, uint64_t wanted,
       unsigned long long flags) {
    void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    (void)align, (void)wanted, (void)flags;
    *at = (uint64_t)(uintptr_t)p;
    return p == MAP_FAILED ? CU_OUT_OF_MEMORY : 0;
}
DEFINE(cuMemAddressFree, uint64_t at, size_t bytes) {
    return munmap((void *)(uintptr_t)at, bytes) ? CU_INVALID_VALUE : 0;
}
DEFINE(cuMemMap, uint64_t at, size_t bytes, size_t offset, uint64_t handle,
       unsigned long long flags) {
    (void)flags;
    void *p = mmap((void *)(uintptr_t)at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                   (int)handle - 1, (off_t)offset);
    if (p == MAP_FAILED) {
        return CU_MAP_FAILED;
    }
    note(p, bytes, 2);
    return 0;
}
DEFINE(cuMemUnmap, uint64_t at, size_t bytes) {
    void *p = (void *)(uintptr_t)at;
    forget(p);
    return mmap(p, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
                   MAP_FAILED
               ? CU_INVALID_VALUE
               : 0;
}
DEFINE(cuMemSetAccess, uint64_t at, size_t bytes, const struct cu_access *access, size_t num) {
    (void)at, (void)bytes, (void)access, (void)num;
    return 0;
}
DEFINE(cuMemExportToShareableHandle, void *fd, uint64_t handle, int type,
       unsigned long long flags) {
    (void)type, (void)flags;
    *(int *)fd = fcntl((int)handle - 1, F_DUPFD_CLOEXEC, 3);
    return *(int *)fd < 0 ? CU_OPERATING_SYSTEM : 0;
}
DEFINE(cuMemImportFromShareableHandle, uint64_t *handle, void *fd, int type) {
    const int own = fcntl((int)(intptr_t)fd, F_DUPFD_CLOEXEC, 3);
    (void)type;
    *handle = (uint64_t)own + 1;
    return own < 0 ? CU_OPERATING_SYSTEM : 0;
}

static void run_copy(struct op *op) {
    memcpy(op->to, op->from, op->bytes);
}
static void run_fill(struct op *op) {
    memset(op->to, (int)op->value, op->bytes);
}
static int queue_copy(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    struct op *op = driver_op(run_copy);
    op->to = (void *)(uintptr_t)to;
    op->from = (const void *)(uintptr_t)from;
    op->bytes = bytes;
    return driver_queue(stream, op);
}
DEFINE(cuMemcpyHtoDAsync_v2, uint64_t to, const void *from, size_t bytes, void *stream) {
    return queue_copy(to, (uint64_t)(uintptr_t)from, bytes, stream);
}
DEFINE(cuMemcpyDtoHAsync_v2, void *to, uint64_t from, size_t bytes, void *stream) {
    return queue_copy((uint64_t)(uintptr_t)to, from, bytes, stream);
}
DEFINE(cuMemcpyDtoDAsync_v2, uint64_t to, uint64_t from, size_t bytes, void *stream) {
    return queue_copy(to, from, bytes, stream);
}
DEFINE(cuMemsetD8Async, uint64_t at, unsigned char byte, size_t bytes, void *stream) {
    struct op *op = driver_op(run_fill);
    op->to = (void *)(uintptr_t)at;
    op->value = byte;
    op->bytes = bytes;
    return driver_queue(stream, op);
}
