/* SPDX-License-Identifier: MIT */
/*
 * The driver's memory: device memory is ordinary memory, shareable memory a memfd. It keeps the
 * ranges that programs hold, for their questions about pointers. Functions are called from any
 * thread; copies and fills run on their stream's. Caches and links it does not have.
 *
 * As measured on a GPU, what gives memory back wholly (cuMemFree, cuMemFreeHost,
 * cuMemHostUnregister) does not return while a stream of the device has work, and stops everybody's
 * launches meanwhile; what maps and unmaps, allocates and registers returns.
 */
#include "tests/driver/driver.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define VMM_PAGE ((size_t)1 << 16) /* smaller than a GPU's, so that small arenas have several */
#define TOUCHED_BYTES                                                                          \
    ((size_t)1 << 18) /* of an allocation: the others are the kernel's zeros */

enum { MOST_RANGES = 8192 };
static struct range {
    uintptr_t at;
    size_t bytes;
    int type, device; /* 1 host, 2 device */
    void *pool;       /* NULL: of none */
} ranges[MOST_RANGES];
static pthread_mutex_t ranges_mutex = PTHREAD_MUTEX_INITIALIZER;

static void note(const void *at, size_t bytes, int type) {
    pthread_mutex_lock(&ranges_mutex);
    for (int i = 0; i < MOST_RANGES; i++) {
        if (!ranges[i].at) {
            ranges[i] = (struct range){(uintptr_t)at, bytes, type, driver_device(), NULL};
            break;
        }
    }
    pthread_mutex_unlock(&ranges_mutex);
}

static void own(uint64_t at, void *pool) {
    pthread_mutex_lock(&ranges_mutex);
    for (int i = 0; i < MOST_RANGES; i++) {
        ranges[i].pool = ranges[i].at == at ? pool : ranges[i].pool;
    }
    pthread_mutex_unlock(&ranges_mutex);
}

static void *owner(uint64_t at) {
    void *pool = NULL;
    pthread_mutex_lock(&ranges_mutex);
    for (int i = 0; i < MOST_RANGES; i++) {
        pool = ranges[i].at == at ? ranges[i].pool : pool;
    }
    pthread_mutex_unlock(&ranges_mutex);
    return pool;
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
    pthread_mutex_lock(&ranges_mutex);
    for (int i = 0; i < MOST_RANGES; i++) {
        const struct range *r = &ranges[i];
        *available -= r->at && r->type == 2 && r->device == driver_device() ? r->bytes : 0;
    }
    pthread_mutex_unlock(&ranges_mutex);
    return 0;
}
static int allocate(uint64_t *at, size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 256, bytes) != 0) {
        return CU_OUT_OF_MEMORY;
    }
    memset(p, 0xcd, bytes < TOUCHED_BYTES ? bytes : TOUCHED_BYTES); /* it is not zeroed */
    note(p, bytes, 2);
    *at = (uint64_t)(uintptr_t)p;
    return 0;
}
DEFINE(cuMemAlloc_v2, uint64_t *at, size_t bytes) {
    const int unsafe = driver_unsafe();
    return unsafe ? unsafe : allocate(at, bytes);
}
DEFINE(cuMemAllocManaged, uint64_t *at, size_t bytes, unsigned flags) {
    (void)flags;
    return cuMemAlloc_v2(at, bytes);
}
static void release(uint64_t at) {
    forget((void *)(uintptr_t)at);
    free((void *)(uintptr_t)at);
}
DEFINE(cuMemFree_v2, uint64_t at) {
    const int unsafe = driver_unsafe();
    if (!unsafe) {
        driver_stop_all();
        release(at);
    }
    return unsafe;
}
DEFINE(cuMemHostAlloc, void **p, size_t bytes, unsigned flags) {
    const int unsafe = driver_unsafe();
    (void)flags;
    if (unsafe) {
        return unsafe;
    }
    if (posix_memalign(p, 4096, bytes) != 0) {
        return CU_OUT_OF_MEMORY;
    }
    note(*p, bytes, 1);
    return 0;
}
DEFINE(cuMemFreeHost, void *p) {
    const int unsafe = driver_unsafe();
    if (!unsafe) {
        driver_stop_all();
        forget(p);
        free(p);
    }
    return unsafe;
}
DEFINE(cuMemHostRegister_v2, void *p, size_t bytes, unsigned flags) {
    const int unsafe = driver_unsafe();
    (void)flags;
    if (!unsafe) {
        note(p, bytes, 1);
    }
    return unsafe;
}
DEFINE(cuMemHostUnregister, void *p) {
    const int unsafe = driver_unsafe();
    if (unsafe) {
        return unsafe;
    }
    driver_stop_all();
    return forget(p) ? 0 : CU_INVALID_VALUE;
}
DEFINE(cuMemHostGetDevicePointer_v2, uint64_t *at, void *p, unsigned flags) {
    (void)flags;
    *at = (uint64_t)(uintptr_t)p;
    return 0;
}
/* A pool lends what is freed on other streams and not passed, whose work the borrower then waits
 * for, unless it is told not to: here always, as where memory is short. Those who have nothing to
 * say about it have the device's own. */
struct pool {
    bool dependencies;
    atomic_int freed; /* and not passed */
};
static struct pool of_device = {.dependencies = true};

DEFINE(cuMemPoolCreate, void **pool, const struct cu_pool *props) {
    struct pool *p = calloc(1, sizeof(*p));
    if (!p || props->type != 1 || props->location.type != 1) {
        free(p);
        return CU_INVALID_VALUE;
    }
    p->dependencies = true;
    *pool = p;
    return 0;
}
DEFINE(cuMemPoolSetAttribute, void *pool, int attribute, void *value) {
    struct pool *p = pool;
    if (attribute < 1 || attribute > 4) {
        return CU_INVALID_VALUE;
    }
    p->dependencies = attribute == 3 ? *(int *)value != 0 : p->dependencies;
    return 0;
}
DEFINE(cuMemPoolTrimTo, void *pool, size_t bytes) {
    (void)pool, (void)bytes;
    return 0;
}
static void run_await_freed(struct op *op) {
    struct pool *p = op->to;
    while (atomic_load(&p->freed) > 0) {
        usleep(20);
    }
}
/* Graphs that allocate are not done here. */
DEFINE(cuMemAllocFromPoolAsync, uint64_t *at, size_t bytes, void *pool, void *stream) {
    struct pool *p = pool;
    if (driver_is_captured(stream)) {
        return CU_NOT_SUPPORTED;
    }
    if (p->dependencies && atomic_load(&p->freed) > 0) {
        struct op *op = driver_op(run_await_freed);
        op->to = p;
        driver_queue(stream, op);
    }
    const int result = allocate(at, bytes);
    if (result == 0) {
        own(*at, p);
    }
    return result;
}
DEFINE(cuMemAllocAsync, uint64_t *at, size_t bytes, void *stream) {
    return cuMemAllocFromPoolAsync(at, bytes, &of_device, stream);
}
static void run_free(struct op *op) {
    struct pool *p = (void *)(uintptr_t)op->value;
    release((uint64_t)(uintptr_t)op->to);
    atomic_fetch_sub(&p->freed, 1);
}
DEFINE(cuMemFreeAsync, uint64_t at, void *stream) {
    struct pool *p = owner(at);
    if (driver_is_captured(stream) || !p) {
        return CU_NOT_SUPPORTED;
    }
    struct op *op = driver_op(run_free);
    op->to = (void *)(uintptr_t)at;
    op->value = (uint64_t)(uintptr_t)p;
    atomic_fetch_add(&p->freed, 1);
    return driver_queue(stream, op);
}
/* ---- addresses, and memory behind them ------------------------------------------------------- */

/* Addresses that are reserved, and what is mapped there; guarded by ranges_mutex. */
enum { MOST_PLACES = 4096 };
static struct place {
    uint64_t at;
    size_t bytes;
    bool mapped; /* else reserved */
} places[MOST_PLACES];

static bool whole_pages(uint64_t at, size_t bytes) {
    return bytes && at % VMM_PAGE == 0 && bytes % VMM_PAGE == 0;
}

/* How many bytes of the range are mapped; -1 if some mapping lies in it in part. */
static int64_t mapped_within(uint64_t at, size_t bytes) {
    int64_t sum = 0;
    for (int i = 0; i < MOST_PLACES; i++) {
        const struct place *p = &places[i];
        if (!p->bytes || !p->mapped || p->at >= at + bytes || at >= p->at + p->bytes) {
            continue;
        }
        if (p->at < at || p->at + p->bytes > at + bytes) {
            return -1;
        }
        sum += (int64_t)p->bytes;
    }
    return sum;
}

static bool is_reserved(uint64_t at, size_t bytes) {
    bool is = false;
    for (int i = 0; i < MOST_PLACES; i++) {
        const struct place *p = &places[i];
        is = is || (p->bytes && !p->mapped && at >= p->at && at + bytes <= p->at + p->bytes);
    }
    return is;
}

static int add_place(uint64_t at, size_t bytes, bool mapped) {
    for (int i = 0; i < MOST_PLACES; i++) {
        if (!places[i].bytes) {
            places[i] = (struct place){at, bytes, mapped};
            return 0;
        }
    }
    return CU_OUT_OF_MEMORY;
}

/* What is reserved has to be given back as it was. */
static bool take_reserved(uint64_t at, size_t bytes) {
    for (int i = 0; i < MOST_PLACES; i++) {
        if (places[i].bytes == bytes && places[i].at == at && !places[i].mapped) {
            places[i].bytes = 0;
            return true;
        }
    }
    return false;
}

static bool no_memory_at(uint64_t at, size_t bytes) {
    return mmap((void *)(uintptr_t)at, bytes, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

DEFINE(cuMemGetAllocationGranularity, size_t *bytes, const struct cu_allocation *a, int kind) {
    (void)a, (void)kind;
    *bytes = VMM_PAGE;
    return 0;
}
/* A handle is a descriptor; 0 is none, so it is counted from 1. */
DEFINE(cuMemCreate, uint64_t *handle, size_t bytes, const struct cu_allocation *a,
       unsigned long long flags) {
    if (!whole_pages(0, bytes) || a->type != 1 || a->location.type != 1 || flags) {
        return CU_INVALID_VALUE;
    }
    const int fd = memfd_create("device", MFD_CLOEXEC);
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
    if (!whole_pages(0, bytes) || align || wanted || flags) {
        return CU_INVALID_VALUE;
    }
    char *p = mmap(NULL, bytes + VMM_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        return CU_OUT_OF_MEMORY;
    }
    const size_t before = (VMM_PAGE - (uintptr_t)p % VMM_PAGE) % VMM_PAGE;
    if (before) {
        munmap(p, before);
    }
    munmap(p + before + bytes, VMM_PAGE - before);
    *at = (uint64_t)(uintptr_t)(p + before);
    pthread_mutex_lock(&ranges_mutex);
    const int result = add_place(*at, bytes, false);
    pthread_mutex_unlock(&ranges_mutex);
    return result;
}
DEFINE(cuMemAddressFree, uint64_t at, size_t bytes) {
    pthread_mutex_lock(&ranges_mutex);
    const bool good = mapped_within(at, bytes) == 0 && take_reserved(at, bytes);
    pthread_mutex_unlock(&ranges_mutex);
    return good && munmap((void *)(uintptr_t)at, bytes) == 0 ? 0 : CU_INVALID_VALUE;
}
/* All of a piece of memory or its beginning, where nothing is. Nobody can use it until it is given access. */
DEFINE(cuMemMap, uint64_t at, size_t bytes, size_t offset, uint64_t handle,
       unsigned long long flags) {
    struct stat s;
    int result = CU_INVALID_VALUE;
    pthread_mutex_lock(&ranges_mutex);
    if (whole_pages(at, bytes) && offset == 0 && !flags && is_reserved(at, bytes) &&
        mapped_within(at, bytes) == 0 && fstat((int)handle - 1, &s) == 0 &&
        (size_t)s.st_size >= bytes) {
        const void *p = mmap((void *)(uintptr_t)at, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED,
                             (int)handle - 1, 0);
        result = p == MAP_FAILED ? CU_MAP_FAILED : add_place(at, bytes, true);
    }
    pthread_mutex_unlock(&ranges_mutex);
    if (result == 0) {
        note((void *)(uintptr_t)at, bytes, 2);
    }
    return result;
}
DEFINE(cuMemUnmap, uint64_t at, size_t bytes) {
    pthread_mutex_lock(&ranges_mutex);
    const bool good = whole_pages(at, bytes) && mapped_within(at, bytes) == (int64_t)bytes;
    for (int i = 0; good && i < MOST_PLACES; i++) {
        if (places[i].mapped && places[i].at >= at && places[i].at < at + bytes) {
            places[i].bytes = 0;
            places[i].mapped = false;
        }
    }
    pthread_mutex_unlock(&ranges_mutex);
    if (good) {
        forget((void *)(uintptr_t)at);
    }
    return good && no_memory_at(at, bytes) ? 0 : CU_INVALID_VALUE;
}
DEFINE(cuMemSetAccess, uint64_t at, size_t bytes, const struct cu_access *access, size_t num) {
    pthread_mutex_lock(&ranges_mutex);
    const bool good = whole_pages(at, bytes) && num == 1 && access->location.type == 1 &&
                      access->flags == 3 && mapped_within(at, bytes) == (int64_t)bytes;
    pthread_mutex_unlock(&ranges_mutex);
    return good && mprotect((void *)(uintptr_t)at, bytes, PROT_READ | PROT_WRITE) == 0
               ? 0
               : CU_INVALID_VALUE;
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
