/* SPDX-License-Identifier: MIT */
/*
 * Memory of a device that other processes and devices of the host can map, by virtual memory
 * management and POSIX file descriptors, and host memory made known to devices. Owns nothing. Any
 * thread. Must not synchronise a device, nor end a capture that is under way on another stream.
 */
#include "src/cu/driver.h"

#include <string.h>

#define ALLOCATION_TYPE_PINNED 1
#define HANDLE_TYPE_POSIX_FILE_DESCRIPTOR 1
#define LOCATION_TYPE_DEVICE 1
#define GRANULARITY_MINIMUM 0
#define ACCESS_READ_WRITE 3
#define STREAM_NON_BLOCKING 1u
#define HOST_REGISTER_PORTABLE 1u
#define HOST_REGISTER_DEVICEMAP 2u

/* Of the calls by which memory is shared: whatever says that there is no way, be it the hardware,
 * the container or another device's absence, is EP_ERR_UNSUPPORTED, for there are other ways. */
static ep_status path_result(int result, const char *call) {
    const ep_status st = epi_cu_result(result, call);
    switch (result) {
    case CU_INVALID_VALUE:
    case CU_INVALID_DEVICE:
    case CU_MAP_FAILED:
    case CU_OPERATING_SYSTEM:
    case CU_NOT_PERMITTED:
        return epi_fail(EP_ERR_UNSUPPORTED, "%s", epi_error_text());
    default:
        return st;
    }
}
#define PATH(name, ...) path_result(epi_cu_driver.name(__VA_ARGS__), "cu" #name)

static struct cu_allocation allocation_on(const struct epi_cu_device *d) {
    return (struct cu_allocation){.type = ALLOCATION_TYPE_PINNED,
                                  .handle_types = HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                  .location = {LOCATION_TYPE_DEVICE, d->handle}};
}

static ep_status grant(const struct epi_cu_memory *m, const struct epi_cu_device *d) {
    const struct cu_access access = {{LOCATION_TYPE_DEVICE, d->handle}, ACCESS_READ_WRITE};
    return PATH(MemSetAccess, m->address, m->bytes, &access, 1);
}

/* Undoes what there is of it. */
static void undo(const struct epi_cu_memory *m, bool is_mapped) {
    if (is_mapped) {
        epi_cu_driver.MemUnmap(m->address, m->bytes);
    }
    if (m->handle) {
        epi_cu_driver.MemRelease(m->handle);
    }
}

/* Puts m->handle at its address; undoes all of `m` if it cannot. */
static ep_status map(const struct epi_cu_device *d, const struct epi_cu_memory *m) {
    ep_status st = PATH(MemMap, m->address, m->bytes, 0, m->handle, 0);
    const bool is_mapped = st == EP_OK;
    st = is_mapped ? grant(m, d) : st;
    if (st != EP_OK) {
        undo(m, is_mapped);
    }
    return st;
}

static ep_status reserve_pages(const struct epi_cu_device *d, struct epi_cu_memory *m,
                               size_t *page) {
    const struct cu_allocation a = allocation_on(d);
    EPI_TRY(CU(MemGetAllocationGranularity, page, &a, GRANULARITY_MINIMUM));
    m->bytes = (m->bytes + *page - 1) / *page * *page;
    return CU(MemAddressReserve, &m->address, m->bytes, 0, 0, 0);
}

ep_status epi_cu_memory_reserve(const struct epi_cu_device *d, size_t bytes,
                                struct epi_cu_memory *out, size_t *page) {
    struct epi_cu_memory m = {.bytes = bytes ? bytes : 1};
    int mode;
    if (!d->shareable) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "device %d (%s) cannot share its memory by file descriptors", d->index,
                        d->name);
    }
    EPI_TRY(epi_cu_enter_relaxed(d, &mode));
    const ep_status st = reserve_pages(d, &m, page);
    epi_cu_leave_relaxed(mode);
    EPI_TRY(st);
    *out = m;
    return EP_OK;
}

/* On a stream of its own, so that it waits for nothing else, and nothing for it. */
static ep_status zero(const struct epi_cu_memory *m) {
    void *stream = NULL;
    EPI_TRY(CU(StreamCreate, &stream, STREAM_NON_BLOCKING));
    ep_status st = CU(MemsetD8Async, m->address, 0, m->bytes, stream);
    if (st == EP_OK) {
        st = CU(StreamSynchronize, stream);
    }
    epi_cu_driver.StreamDestroy(stream);
    return st;
}

static ep_status no_memory(const struct epi_cu_device *d, size_t bytes) {
    size_t available = 0, total = 0;
    epi_cu_driver.MemGetInfo(&available, &total);
    return epi_fail(EP_ERR_NOMEM,
                    "device %d (%s) has %zu of %zu bytes free and an arena needs %zu: lower "
                    "max_recv_rows, num_slots, max_tokens or max_row_bytes",
                    d->index, d->name, available, total, bytes);
}

static ep_status create(const struct epi_cu_device *d, struct epi_cu_memory *m) {
    const struct cu_allocation a = allocation_on(d);
    EPI_TRY(PATH(MemCreate, &m->handle, m->bytes, &a, 0));
    EPI_TRY(map(d, m));
    const ep_status st = zero(m);
    if (st != EP_OK) {
        undo(m, true);
    }
    return st;
}

ep_status epi_cu_memory_create(const struct epi_cu_device *d, uint64_t at, size_t bytes,
                               struct epi_cu_memory *out) {
    struct epi_cu_memory m = {at, bytes, 0};
    int mode;
    EPI_TRY(epi_cu_enter_relaxed(d, &mode));
    ep_status st = epi_alloc_should_fail() ? EP_ERR_NOMEM : create(d, &m);
    if (st == EP_ERR_NOMEM) {
        st = no_memory(d, bytes);
    }
    epi_cu_leave_relaxed(mode);
    EPI_TRY(st);
    *out = m;
    return EP_OK;
}

ep_status epi_cu_memory_admit(const struct epi_cu_memory *m, const struct epi_cu_device *d) {
    CU_WITHIN_RELAXED(d, grant(m, d));
}

ep_status epi_cu_memory_export(const struct epi_cu_memory *m, int *fd) {
    int got = -1;
    EPI_TRY(PATH(MemExportToShareableHandle, &got, m->handle, HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                 0));
    *fd = got;
    return EP_OK;
}

static ep_status import(const struct epi_cu_device *d, int fd, struct epi_cu_memory *m) {
    EPI_TRY(PATH(MemImportFromShareableHandle, &m->handle, (void *)(uintptr_t)fd,
                 HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    return map(d, m);
}

ep_status epi_cu_memory_import(const struct epi_cu_device *d, int fd, uint64_t at, size_t bytes,
                               struct epi_cu_memory *out) {
    struct epi_cu_memory m = {at, bytes, 0};
    int mode;
    if (epi_alloc_should_fail()) {
        return epi_fail(EP_ERR_NOMEM, "no memory to map an arena of %zu bytes (injected)",
                        bytes);
    }
    EPI_TRY(epi_cu_enter_relaxed(d, &mode));
    const ep_status st = import(d, fd, &m);
    epi_cu_leave_relaxed(mode);
    EPI_TRY(st);
    *out = m;
    return EP_OK;
}

void epi_cu_memory_release(const struct epi_cu_device *d, const struct epi_cu_memory *m) {
    int mode;
    if (m->address && epi_cu_enter_relaxed(d, &mode) == EP_OK) {
        if (m->handle) {
            undo(m, true);
        } else {
            epi_cu_driver.MemAddressFree(m->address, m->bytes);
        }
        epi_cu_leave_relaxed(mode);
    }
}

/* ---- host memory ---------------------------------------------------------------------------- */

static ep_status pin(void *p, size_t bytes, uint64_t *address) {
    EPI_TRY(CU(MemHostRegister, p, bytes, HOST_REGISTER_PORTABLE | HOST_REGISTER_DEVICEMAP));
    const ep_status st = CU(MemHostGetDevicePointer, address, p, 0);
    if (st != EP_OK) {
        epi_cu_driver.MemHostUnregister(p);
    }
    return st;
}

ep_status epi_cu_register(const struct epi_cu_device *d, void *p, size_t bytes,
                          uint64_t *address) {
    uint64_t got = 0;
    int mode;
    if (epi_alloc_should_fail()) {
        return epi_fail(EP_ERR_NOMEM, "no memory to pin %zu bytes (injected)", bytes);
    }
    EPI_TRY(epi_cu_enter_relaxed(d, &mode));
    const ep_status st = pin(p, bytes, &got);
    epi_cu_leave_relaxed(mode);
    if (st != EP_OK) {
        return epi_fail(st, "cannot pin %zu bytes of host memory for device %d: %s", bytes,
                        d->index, epi_error_text());
    }
    *address = got;
    return EP_OK;
}

void epi_cu_unregister(const struct epi_cu_device *d, void *p) {
    int mode;
    if (epi_cu_enter_relaxed(d, &mode) == EP_OK) {
        epi_cu_driver.MemHostUnregister(p);
        epi_cu_leave_relaxed(mode);
    }
}
