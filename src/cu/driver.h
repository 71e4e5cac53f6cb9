/* SPDX-License-Identifier: MIT */
/*
 * The driver's functions as this directory calls them: one list gives the fields, the loader and
 * the names in messages. Prototypes are ours, of the versions named; the numbers of attributes
 * and results are the driver's and never change.
 */
#ifndef EPI_CU_DRIVER_H
#define EPI_CU_DRIVER_H

#include "src/cu/cu.h"

struct cu_location { /* CUmemLocation */
    int type;
    int id;
};

struct cu_allocation { /* CUmemAllocationProp */
    int type;
    int handle_types;
    struct cu_location location;
    void *win32;
    unsigned char compression, rdma;
    unsigned short usage;
    unsigned char reserved[4];
};

struct cu_pool { /* CUmemPoolProps */
    int type;
    int handle_types;
    struct cu_location location;
    void *win32;
    size_t max_bytes;
    unsigned short usage;
    unsigned char reserved[54];
};

struct cu_access { /* CUmemAccessDesc */
    struct cu_location location;
    int flags;
};

_Static_assert(sizeof(struct cu_location) == 8, "CUmemLocation");
_Static_assert(sizeof(struct cu_allocation) == 32, "CUmemAllocationProp");
_Static_assert(offsetof(struct cu_allocation, location) == 8, "CUmemAllocationProp.location");
_Static_assert(offsetof(struct cu_allocation, win32) == 16, "win32HandleMetaData");
_Static_assert(offsetof(struct cu_allocation, usage) == 26, "CUmemAllocationProp.allocFlags");
_Static_assert(sizeof(struct cu_pool) == 88, "CUmemPoolProps");
_Static_assert(offsetof(struct cu_pool, max_bytes) == 24, "CUmemPoolProps.maxSize");
_Static_assert(sizeof(struct cu_access) == 12, "CUmemAccessDesc");
_Static_assert(offsetof(struct cu_access, flags) == 8, "CUmemAccessDesc.flags");

/* X(field, symbol, arguments) */
#define CU_SYMBOLS(X)                                                                          \
    X(Init, "cuInit", (unsigned))                                                              \
    X(DriverGetVersion, "cuDriverGetVersion", (int *))                                         \
    X(GetErrorName, "cuGetErrorName", (int, const char **))                                    \
    X(GetErrorString, "cuGetErrorString", (int, const char **))                                \
    X(DeviceGetCount, "cuDeviceGetCount", (int *))                                             \
    X(DeviceGet, "cuDeviceGet", (int *, int))                                                  \
    X(DeviceGetName, "cuDeviceGetName", (char *, int, int))                                    \
    X(DeviceGetAttribute, "cuDeviceGetAttribute", (int *, int, int))                           \
    X(DeviceTotalMem, "cuDeviceTotalMem_v2", (size_t *, int))                                  \
    X(DeviceGetUuid, "cuDeviceGetUuid_v2", (uint8_t *, int))                                   \
    X(DeviceCanAccessPeer, "cuDeviceCanAccessPeer", (int *, int, int))                         \
    X(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void **, int))                      \
    X(DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int))                          \
    X(CtxPushCurrent, "cuCtxPushCurrent_v2", (void *))                                         \
    X(CtxPopCurrent, "cuCtxPopCurrent_v2", (void **))                                          \
    X(CtxEnablePeerAccess, "cuCtxEnablePeerAccess", (void *, unsigned))                        \
    X(CtxGetStreamPriorityRange, "cuCtxGetStreamPriorityRange", (int *, int *))                \
    X(ThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int *))           \
    X(MemGetInfo, "cuMemGetInfo_v2", (size_t *, size_t *))                                     \
    X(MemAlloc, "cuMemAlloc_v2", (uint64_t *, size_t))                                         \
    X(MemFree, "cuMemFree_v2", (uint64_t))                                                     \
    X(MemHostAlloc, "cuMemHostAlloc", (void **, size_t, unsigned))                             \
    X(MemFreeHost, "cuMemFreeHost", (void *))                                                  \
    X(MemHostRegister, "cuMemHostRegister_v2", (void *, size_t, unsigned))                     \
    X(MemHostUnregister, "cuMemHostUnregister", (void *))                                      \
    X(MemHostGetDevicePointer, "cuMemHostGetDevicePointer_v2", (uint64_t *, void *, unsigned)) \
    X(MemPoolCreate, "cuMemPoolCreate", (void **, const struct cu_pool *))                     \
    X(MemPoolSetAttribute, "cuMemPoolSetAttribute", (void *, int, void *))                     \
    X(MemPoolTrimTo, "cuMemPoolTrimTo", (void *, size_t))                                      \
    X(MemAllocFromPoolAsync, "cuMemAllocFromPoolAsync", (uint64_t *, size_t, void *, void *))  \
    X(MemFreeAsync, "cuMemFreeAsync", (uint64_t, void *))                                      \
    X(MemGetAllocationGranularity, "cuMemGetAllocationGranularity",                            \
      (size_t *, const struct cu_allocation *, int))                                           \
    X(MemCreate, "cuMemCreate",                                                                \
      (uint64_t *, size_t, const struct cu_allocation *, unsigned long long))                  \
    X(MemRelease, "cuMemRelease", (uint64_t))                                                  \
    X(MemAddressReserve, "cuMemAddressReserve",                                                \
      (uint64_t *, size_t, size_t, uint64_t, unsigned long long))                              \
    X(MemAddressFree, "cuMemAddressFree", (uint64_t, size_t))                                  \
    X(MemMap, "cuMemMap", (uint64_t, size_t, size_t, uint64_t, unsigned long long))            \
    X(MemUnmap, "cuMemUnmap", (uint64_t, size_t))                                              \
    X(MemSetAccess, "cuMemSetAccess", (uint64_t, size_t, const struct cu_access *, size_t))    \
    X(MemExportToShareableHandle, "cuMemExportToShareableHandle",                              \
      (void *, uint64_t, int, unsigned long long))                                             \
    X(MemImportFromShareableHandle, "cuMemImportFromShareableHandle",                          \
      (uint64_t *, void *, int))                                                               \
    X(MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (uint64_t, const void *, size_t, void *))       \
    X(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void *, uint64_t, size_t, void *))             \
    X(MemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", (uint64_t, uint64_t, size_t, void *))           \
    X(MemsetD8Async, "cuMemsetD8Async", (uint64_t, unsigned char, size_t, void *))             \
    X(StreamCreate, "cuStreamCreate", (void **, unsigned))                                     \
    X(StreamCreateWithPriority, "cuStreamCreateWithPriority", (void **, unsigned, int))        \
    X(StreamDestroy, "cuStreamDestroy_v2", (void *))                                           \
    X(StreamSynchronize, "cuStreamSynchronize", (void *))                                      \
    X(StreamWaitEvent, "cuStreamWaitEvent", (void *, void *, unsigned))                        \
    X(StreamGetCaptureInfo, "cuStreamGetCaptureInfo_v2",                                       \
      (void *, int *, uint64_t *, void **, const void **, size_t *))                           \
    X(EventCreate, "cuEventCreate", (void **, unsigned))                                       \
    X(EventDestroy, "cuEventDestroy_v2", (void *))                                             \
    X(EventRecord, "cuEventRecord", (void *, void *))                                          \
    X(EventQuery, "cuEventQuery", (void *))                                                    \
    X(EventElapsedTime, "cuEventElapsedTime", (float *, void *, void *))                       \
    X(ModuleLoadData, "cuModuleLoadData", (void **, const void *))                             \
    X(ModuleUnload, "cuModuleUnload", (void *))                                                \
    X(ModuleGetFunction, "cuModuleGetFunction", (void **, void *, const char *))               \
    X(FuncGetAttribute, "cuFuncGetAttribute", (int *, int, void *))                            \
    X(FuncSetAttribute, "cuFuncSetAttribute", (void *, int, int))                              \
    X(LaunchKernel, "cuLaunchKernel",                                                          \
      (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *,   \
       void **, void **))

/* May be missing. */
#define CU_OPTIONAL_SYMBOLS(X)                                                                 \
    X(FuncLoad, "cuFuncLoad", (void *))                                                        \
    X(StreamWaitValue32, "cuStreamWaitValue32_v2", (void *, uint64_t, uint32_t, unsigned))

struct cu_driver {
#define CU_FIELD(name, symbol, args) int(*name) args;
    CU_SYMBOLS(CU_FIELD)
    CU_OPTIONAL_SYMBOLS(CU_FIELD)
#undef CU_FIELD
};
extern struct cu_driver epi_cu_driver; /* filled by epi_cu_open */

/* CUresult */
#define CU_SUCCESS 0
#define CU_INVALID_VALUE 1
#define CU_OUT_OF_MEMORY 2
#define CU_NO_DEVICE 100
#define CU_INVALID_DEVICE 101
#define CU_MAP_FAILED 205
#define CU_NO_BINARY_FOR_GPU 209
#define CU_PEER_ACCESS_UNSUPPORTED 217
#define CU_OPERATING_SYSTEM 304
#define CU_NOT_READY 600
#define CU_PEER_ACCESS_ALREADY_ENABLED 704
#define CU_NOT_PERMITTED 800
#define CU_NOT_SUPPORTED 801
#define CU_SYSTEM_DRIVER_MISMATCH 803
#define CU_STREAM_CAPTURE_IMPLICIT 906

/* open.c: EP_OK for CU_SUCCESS, EP_AGAIN for CU_NOT_READY, else a text with the call, the error
 * and what the driver says about it. */
ep_status epi_cu_result(int result, const char *call);
#define CU(name, ...) epi_cu_result(epi_cu_driver.name(__VA_ARGS__), "cu" #name)

/* Makes the device's context current and back; each successful enter has its leave. */
ep_status epi_cu_enter(const struct epi_cu_device *d);
void epi_cu_leave(void);
/* The same for calls that would otherwise end every capture that any thread has begun, although no
 * graph has to do with them: the thread's capture mode is relaxed meanwhile. *mode is for the
 * leave. */
ep_status epi_cu_enter_relaxed(const struct epi_cu_device *d, int *mode);
void epi_cu_leave_relaxed(int mode);

/* Returns what `call` returns within the device's context. */
#define CU_WITHIN(d, call)                                                                     \
    do {                                                                                       \
        EPI_TRY(epi_cu_enter(d));                                                              \
        const ep_status within_status = (call);                                                \
        epi_cu_leave();                                                                        \
        return within_status;                                                                  \
    } while (0)

/* The same with the thread's capture mode relaxed. */
#define CU_WITHIN_RELAXED(d, call)                                                             \
    do {                                                                                       \
        int within_mode;                                                                       \
        EPI_TRY(epi_cu_enter_relaxed(d, &within_mode));                                        \
        const ep_status within_status = (call);                                                \
        epi_cu_leave_relaxed(within_mode);                                                     \
        return within_status;                                                                  \
    } while (0)

/* Gives *held back by `call`, which cannot fail, if there is anything. */
#define CU_GIVE_BACK(d, held, call)                                                            \
    do {                                                                                       \
        if (*(held) && epi_cu_enter(d) == EP_OK) {                                             \
            call;                                                                              \
            epi_cu_leave();                                                                    \
        }                                                                                      \
        *(held) = 0;                                                                           \
    } while (0)

#endif
