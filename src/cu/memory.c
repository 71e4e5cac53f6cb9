/* SPDX-License-Identifier: MIT */
/*
 * Memory, streams and events of a device. Owns nothing: what is created here is the caller's to
 * free, with the device it came from. Any thread. Copies of pageable memory go through the stream
 * too and are waited for, because our streams are not ordered with the default stream.
 */
#include "src/cu/driver.h"

#define HOST_ALLOC_PORTABLE 1u
#define HOST_ALLOC_DEVICEMAP 2u
#define STREAM_NON_BLOCKING 1u
#define WAIT_VALUE_GEQ 0u
#define EVENT_DISABLE_TIMING 2u
#define ALLOCATION_TYPE_PINNED 1
#define LOCATION_TYPE_DEVICE 1
#define POOL_REUSE_ALLOW_INTERNAL_DEPENDENCIES 3
#define POOL_RELEASE_THRESHOLD 4

enum capture_status { CAPTURE_NONE, CAPTURE_ACTIVE, CAPTURE_INVALIDATED };

/* Of the device, or of a pool in the order of the stream. */
static ep_status alloc(const struct epi_cu_device *d, void *pool, void *stream, uint64_t *at,
                       size_t bytes) {
    const char *where = pool ? "in the pool of" : "on";
    const size_t most = bytes ? bytes : 1;
    uint64_t got = 0;
    int mode;
    if (epi_alloc_should_fail()) {
        return epi_fail(EP_ERR_NOMEM, "no memory %s device %d (%zu bytes, injected)", where,
                        d->index, bytes);
    }
    EPI_TRY(epi_cu_enter_relaxed(d, &mode));
    const ep_status st =
        pool ? CU(MemAllocFromPoolAsync, &got, most, pool, stream) : CU(MemAlloc, &got, most);
    epi_cu_leave_relaxed(mode);
    if (st == EP_ERR_NOMEM) {
        return epi_fail(st, "no memory %s device %d (%zu bytes): %s", where, d->index, bytes,
                        epi_error_text());
    }
    EPI_TRY(st);
    *at = got;
    return EP_OK;
}

ep_status epi_cu_alloc(const struct epi_cu_device *d, uint64_t *at, size_t bytes) {
    return alloc(d, NULL, NULL, at, bytes);
}

void epi_cu_free(const struct epi_cu_device *d, uint64_t *at) {
    CU_GIVE_BACK(d, at, epi_cu_driver.MemFree(*at));
}

ep_status epi_cu_alloc_host(const struct epi_cu_device *d, void **p, size_t bytes) {
    void *got = NULL;
    int mode;
    if (epi_alloc_should_fail()) {
        return epi_fail(EP_ERR_NOMEM, "no pinned memory (%zu bytes, injected)", bytes);
    }
    EPI_TRY(epi_cu_enter_relaxed(d, &mode));
    const ep_status st =
        CU(MemHostAlloc, &got, bytes ? bytes : 1, HOST_ALLOC_PORTABLE | HOST_ALLOC_DEVICEMAP);
    epi_cu_leave_relaxed(mode);
    EPI_TRY(st);
    *p = got;
    return EP_OK;
}

void epi_cu_free_host(const struct epi_cu_device *d, void **p) {
    CU_GIVE_BACK(d, p, epi_cu_driver.MemFreeHost(*p));
}

/* By default a pool gives memory back at every synchronisation, and lends what another stream has
 * freed and not passed, whose work the borrower then waits for. */
static ep_status create_pool(const struct epi_cu_device *d, void **pool) {
    const struct cu_pool props = {.type = ALLOCATION_TYPE_PINNED,
                                  .location = {LOCATION_TYPE_DEVICE, d->handle}};
    uint64_t keep = UINT64_MAX;
    int no = 0;
    EPI_TRY(CU(MemPoolCreate, pool, &props));
    EPI_TRY(CU(MemPoolSetAttribute, *pool, POOL_RELEASE_THRESHOLD, &keep));
    return CU(MemPoolSetAttribute, *pool, POOL_REUSE_ALLOW_INTERNAL_DEPENDENCIES, &no);
}

ep_status epi_cu_pool_create(const struct epi_cu_device *d, void **pool) {
    CU_WITHIN_RELAXED(d, create_pool(d, pool));
}

void epi_cu_pool_trim(const struct epi_cu_device *d, void *pool) {
    int mode;
    if (epi_cu_enter_relaxed(d, &mode) == EP_OK) {
        epi_cu_driver.MemPoolTrimTo(pool, 0);
        epi_cu_leave_relaxed(mode);
    }
}

ep_status epi_cu_pool_alloc(const struct epi_cu_device *d, void *pool, void *stream,
                            uint64_t *at, size_t bytes) {
    return alloc(d, pool, stream, at, bytes);
}

void epi_cu_pool_free(const struct epi_cu_device *d, void *stream, uint64_t *at) {
    int mode;
    if (*at && epi_cu_enter_relaxed(d, &mode) == EP_OK) {
        epi_cu_driver.MemFreeAsync(*at, stream);
        epi_cu_leave_relaxed(mode);
    }
    *at = 0;
}

static ep_status then_sync(ep_status copied, void *stream) {
    EPI_TRY(copied);
    return CU(StreamSynchronize, stream);
}

ep_status epi_cu_copy_in(const struct epi_cu_device *d, void *stream, uint64_t to,
                         const void *from, size_t bytes) {
    if (bytes == 0) {
        return EP_OK;
    }
    CU_WITHIN_RELAXED(d, then_sync(CU(MemcpyHtoDAsync, to, from, bytes, stream), stream));
}

ep_status epi_cu_copy_out(const struct epi_cu_device *d, void *stream, void *to, uint64_t from,
                          size_t bytes) {
    if (bytes == 0) {
        return EP_OK;
    }
    CU_WITHIN_RELAXED(d, then_sync(CU(MemcpyDtoHAsync, to, from, bytes, stream), stream));
}

ep_status epi_cu_copy(const struct epi_cu_device *d, void *stream, uint64_t to, uint64_t from,
                      size_t bytes) {
    if (bytes == 0) {
        return EP_OK;
    }
    CU_WITHIN(d, CU(MemcpyDtoDAsync, to, from, bytes, stream));
}

ep_status epi_cu_copy_out_async(const struct epi_cu_device *d, void *stream, void *pinned,
                                uint64_t from, size_t bytes) {
    CU_WITHIN(d, CU(MemcpyDtoHAsync, pinned, from, bytes, stream));
}

ep_status epi_cu_fill(const struct epi_cu_device *d, void *stream, uint64_t at, int byte,
                      size_t bytes) {
    if (bytes == 0) {
        return EP_OK;
    }
    CU_WITHIN(d, CU(MemsetD8Async, at, (unsigned char)byte, bytes, stream));
}

ep_status epi_cu_stream_create(const struct epi_cu_device *d, void **stream) {
    CU_WITHIN(d, CU(StreamCreate, stream, STREAM_NON_BLOCKING));
}

static ep_status create_high(void **stream) {
    int least = 0, greatest = 0;
    EPI_TRY(CU(CtxGetStreamPriorityRange, &least, &greatest));
    return CU(StreamCreateWithPriority, stream, STREAM_NON_BLOCKING, greatest);
}

ep_status epi_cu_stream_create_high(const struct epi_cu_device *d, void **stream) {
    CU_WITHIN(d, create_high(stream));
}

void epi_cu_stream_destroy(const struct epi_cu_device *d, void **stream) {
    CU_GIVE_BACK(d, stream, epi_cu_driver.StreamDestroy(*stream));
}

ep_status epi_cu_stream_sync(const struct epi_cu_device *d, void *stream) {
    CU_WITHIN_RELAXED(d, CU(StreamSynchronize, stream));
}

ep_status epi_cu_stream_hold(const struct epi_cu_device *d, void *stream, uint32_t *word,
                             uint32_t value) {
    if (!epi_cu_driver.StreamWaitValue32) {
        return epi_fail(EP_ERR_UNSUPPORTED, "the driver has no cuStreamWaitValue32");
    }
    CU_WITHIN(d,
              CU(StreamWaitValue32, stream, (uint64_t)(uintptr_t)word, value, WAIT_VALUE_GEQ));
}

ep_status epi_cu_capture_id(const struct epi_cu_device *d, void *stream, uint64_t *id) {
    int status = CAPTURE_NONE;
    uint64_t got = 0;
    EPI_TRY(epi_cu_enter(d));
    const int result =
        epi_cu_driver.StreamGetCaptureInfo(stream, &status, &got, NULL, NULL, NULL);
    epi_cu_leave();
    if (result == CU_STREAM_CAPTURE_IMPLICIT) {
        return epi_fail(EP_ERR_STATE,
                        "the legacy default stream cannot be used while a stream that it waits "
                        "for is being captured: pass a stream of your own");
    }
    EPI_TRY(epi_cu_result(result, "cuStreamGetCaptureInfo"));
    if (status == CAPTURE_INVALIDATED) {
        return epi_fail(EP_ERR_STATE,
                        "the stream's capture was invalidated by an earlier error: end it "
                        "(cudaStreamEndCapture) before the stream is used");
    }
    *id = status == CAPTURE_ACTIVE ? got : 0;
    return EP_OK;
}

ep_status epi_cu_event_create(const struct epi_cu_device *d, void **event) {
    CU_WITHIN(d, CU(EventCreate, event, 0));
}

ep_status epi_cu_event_create_plain(const struct epi_cu_device *d, void **event) {
    CU_WITHIN(d, CU(EventCreate, event, EVENT_DISABLE_TIMING));
}

void epi_cu_event_destroy(const struct epi_cu_device *d, void **event) {
    CU_GIVE_BACK(d, event, epi_cu_driver.EventDestroy(*event));
}

ep_status epi_cu_event_record(const struct epi_cu_device *d, void *event, void *stream) {
    CU_WITHIN(d, CU(EventRecord, event, stream));
}

ep_status epi_cu_event_wait(const struct epi_cu_device *d, void *stream, void *event) {
    CU_WITHIN(d, CU(StreamWaitEvent, stream, event, 0));
}

ep_status epi_cu_event_query(const struct epi_cu_device *d, void *event) {
    CU_WITHIN_RELAXED(d, CU(EventQuery, event));
}

ep_status epi_cu_event_elapsed(const struct epi_cu_device *d, void *a, void *b, double *us) {
    float ms = 0;
    EPI_TRY(epi_cu_enter(d));
    const ep_status st = CU(EventElapsedTime, &ms, a, b);
    epi_cu_leave();
    EPI_TRY(st);
    *us = (double)ms * 1000;
    return EP_OK;
}
