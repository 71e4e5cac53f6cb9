/* SPDX-License-Identifier: MIT */
/*
 * The driver's functions as this directory calls them: one list gives the fields, the loader and
 * the names in messages. Prototypes are ours, of the versions named; the numbers of attributes
 * and results are the driver's and never change.
 */
#ifndef EPI_CU_DRIVER_H
#define EPI_CU_DRIVER_H

#include "src/cu/cu.h"

struct cu_attribute { /* CUlaunchAttribute */
    int id;
    int pad;
    union {
        int cooperative;
        uint64_t room[8];
    } value;
};

struct cu_config { /* CUlaunchConfig */
    unsigned grid[3], block[3];
    unsigned shared_bytes;
    void *stream;
    struct cu_attribute *attributes;
    unsigned num_attributes;
};

_Static_assert(sizeof(struct cu_attribute) == 72, "CUlaunchAttribute");
_Static_assert(sizeof(struct cu_config) == 56, "CUlaunchConfig");

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
    X(DeviceCanAccessPeer, "cuDeviceCanAccessPeer", (int *, int, int))                         \
    X(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void **, int))                      \
    X(DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int))                          \
    X(CtxPushCurrent, "cuCtxPushCurrent_v2", (void *))                                         \
    X(CtxPopCurrent, "cuCtxPopCurrent_v2", (void **))                                          \
    X(CtxEnablePeerAccess, "cuCtxEnablePeerAccess", (void *, unsigned))                        \
    X(MemAlloc, "cuMemAlloc_v2", (uint64_t *, size_t))                                         \
    X(MemFree, "cuMemFree_v2", (uint64_t))                                                     \
    X(MemHostAlloc, "cuMemHostAlloc", (void **, size_t, unsigned))                             \
    X(MemFreeHost, "cuMemFreeHost", (void *))                                                  \
    X(MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (uint64_t, const void *, size_t, void *))       \
    X(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void *, uint64_t, size_t, void *))             \
    X(MemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", (uint64_t, uint64_t, size_t, void *))           \
    X(MemsetD8Async, "cuMemsetD8Async", (uint64_t, unsigned char, size_t, void *))             \
    X(StreamCreate, "cuStreamCreate", (void **, unsigned))                                     \
    X(StreamDestroy, "cuStreamDestroy_v2", (void *))                                           \
    X(StreamQuery, "cuStreamQuery", (void *))                                                  \
    X(StreamSynchronize, "cuStreamSynchronize", (void *))                                      \
    X(StreamWaitEvent, "cuStreamWaitEvent", (void *, void *, unsigned))                        \
    X(EventCreate, "cuEventCreate", (void **, unsigned))                                       \
    X(EventDestroy, "cuEventDestroy_v2", (void *))                                             \
    X(EventRecord, "cuEventRecord", (void *, void *))                                          \
    X(EventElapsedTime, "cuEventElapsedTime", (float *, void *, void *))                       \
    X(ModuleLoadData, "cuModuleLoadData", (void **, const void *))                             \
    X(ModuleUnload, "cuModuleUnload", (void *))                                                \
    X(ModuleGetFunction, "cuModuleGetFunction", (void **, void *, const char *))               \
    X(FuncGetAttribute, "cuFuncGetAttribute", (int *, int, void *))                            \
    X(FuncSetAttribute, "cuFuncSetAttribute", (void *, int, int))                              \
    X(OccupancyMaxActiveBlocks, "cuOccupancyMaxActiveBlocksPerMultiprocessor",                 \
      (int *, void *, int, size_t))                                                            \
    X(LaunchKernelEx, "cuLaunchKernelEx", (const struct cu_config *, void *, void **, void **))

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
#define CU_NO_BINARY_FOR_GPU 209
#define CU_PEER_ACCESS_UNSUPPORTED 217
#define CU_NOT_READY 600
#define CU_PEER_ACCESS_ALREADY_ENABLED 704
#define CU_COOPERATIVE_LAUNCH_TOO_LARGE 720
#define CU_NOT_SUPPORTED 801
#define CU_SYSTEM_DRIVER_MISMATCH 803

/* error.c: EP_OK for CU_SUCCESS, EP_AGAIN for CU_NOT_READY, else a text with the call. */
ep_status epi_cu_result(int result, const char *call);
#define CU(name, ...) epi_cu_result(epi_cu_driver.name(__VA_ARGS__), "cu" #name)

/* Makes the device's context current and back; each successful enter has its leave. */
ep_status epi_cu_enter(const struct epi_cu_device *d);
void epi_cu_leave(void);

#endif
