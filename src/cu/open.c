/* SPDX-License-Identifier: MIT */
/*
 * The driver, what its results mean, and its devices. Owns the table of the driver's functions,
 * filled once per process and never emptied, and the retained primary contexts. Any thread; callers
 * that open at the same time wait for the first. Must not keep a context current behind the
 * caller's back, nor log a result: whoever returns the status to a user does.
 */
#include "src/cu/driver.h"

#include <dlfcn.h>
#include <stdatomic.h>

#define CU_CUDA_VERSION_MIN 12000
#define CAPTURE_MODE_RELAXED 2

enum device_attribute {
    MULTIPROCESSOR_COUNT = 16,
    COMPUTE_CAPABILITY_MAJOR = 75,
    COMPUTE_CAPABILITY_MINOR = 76,
    MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
    HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103
};

struct cu_driver epi_cu_driver;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static bool is_open;
static _Atomic uint32_t opened_by; /* the process; 0: none. Not guarded: it may be a parent */
static int driver_version, num_devices;

/* ---- results ------------------------------------------------------------------------------ */

static ep_status status_of(int result) {
    switch (result) {
    case CU_INVALID_VALUE:
        return EP_ERR_INTERNAL; /* arguments were checked before they came here */
    case CU_OUT_OF_MEMORY:
        return EP_ERR_NOMEM;
    case CU_NO_DEVICE:
    case CU_NO_BINARY_FOR_GPU:
    case CU_PEER_ACCESS_UNSUPPORTED:
    case CU_NOT_SUPPORTED:
    case CU_SYSTEM_DRIVER_MISMATCH:
        return EP_ERR_UNSUPPORTED;
    default:
        return EP_ERR_SYSTEM;
    }
}

ep_status epi_cu_result(int result, const char *call) {
    const char *name = NULL, *text = NULL;
    if (result == CU_SUCCESS) {
        return EP_OK;
    }
    if (result == CU_NOT_READY) {
        return EP_AGAIN;
    }
    epi_cu_driver.GetErrorName(result, &name);
    epi_cu_driver.GetErrorString(result, &text);
    return epi_fail(status_of(result), "%s returned %s (%d): %s", call,
                    name ? name : "an unknown error", result,
                    text ? text : "the driver has no text for it");
}

/* ---- opening ------------------------------------------------------------------------------ */

static ep_status load_symbols(void *lib) {
#define LOAD(name, symbol, args) *(void **)&epi_cu_driver.name = dlsym(lib, symbol);
    CU_SYMBOLS(LOAD)
    CU_OPTIONAL_SYMBOLS(LOAD)
#undef LOAD
#define CHECK(name, symbol, args)                                                              \
    if (!epi_cu_driver.name) {                                                                 \
        return epi_fail(EP_ERR_UNSUPPORTED,                                                    \
                        "NVIDIA's driver library has no %s: a driver for CUDA 12.0 or "        \
                        "later is needed",                                                     \
                        symbol);                                                               \
    }
    CU_SYMBOLS(CHECK)
#undef CHECK
    return EP_OK;
}

static ep_status start_driver(void *lib) {
    EPI_TRY(load_symbols(lib));
    EPI_TRY(CU(Init, 0));
    EPI_TRY(CU(DriverGetVersion, &driver_version));
    EPI_TRY(CU(DeviceGetCount, &num_devices));
    if (driver_version < CU_CUDA_VERSION_MIN) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "the driver is for CUDA %d.%d, at least 12.0 is needed",
                        driver_version / 1000, driver_version % 1000 / 10);
    }
    if (num_devices == 0) {
        return epi_fail(EP_ERR_UNSUPPORTED, "the driver shows no device to this process "
                                            "(CUDA_VISIBLE_DEVICES?)");
    }
    return EP_OK;
}

static ep_status open_driver(void) {
    void *lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!lib) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "NVIDIA's driver library cannot be loaded (%s): is the driver "
                        "installed?",
                        dlerror());
    }
    const ep_status st = start_driver(lib);
    if (st != EP_OK) {
        dlclose(lib);
    }
    return st;
}

ep_status epi_cu_open(void) {
    ep_status st = EP_OK;
    const uint32_t by = atomic_load(&opened_by);
    if (by && epi_is_forked(by)) {
        return epi_fail(
            EP_ERR_UNSUPPORTED,
            "this process was forked from one that uses CUDA, and CUDA does not work "
            "after fork(): start processes that use it by exec (Python: spawn)");
    }
    pthread_mutex_lock(&mutex);
    if (!is_open) {
        st = open_driver();
        is_open = st == EP_OK;
        atomic_store(&opened_by, is_open ? epi_process() : 0);
    }
    pthread_mutex_unlock(&mutex);
    return st;
}

int epi_cu_driver_version(void) {
    return driver_version;
}

int epi_cu_num_devices(void) {
    return num_devices;
}

ep_status epi_cu_enter(const struct epi_cu_device *d) {
    return CU(CtxPushCurrent, d->context);
}

void epi_cu_leave(void) {
    void *context;
    epi_cu_driver.CtxPopCurrent(&context);
}

ep_status epi_cu_enter_relaxed(const struct epi_cu_device *d, int *mode) {
    *mode = CAPTURE_MODE_RELAXED;
    EPI_TRY(epi_cu_enter(d));
    const ep_status st = CU(ThreadExchangeStreamCaptureMode, mode);
    if (st != EP_OK) {
        epi_cu_leave();
    }
    return st;
}

void epi_cu_leave_relaxed(int mode) {
    epi_cu_driver.ThreadExchangeStreamCaptureMode(&mode);
    epi_cu_leave();
}

static ep_status read_attributes(struct epi_cu_device *d) {
    int vmm = 0, fds = 0;
    const struct {
        int attribute;
        int *to;
    } wanted[] = {{MULTIPROCESSOR_COUNT, &d->num_sms},
                  {COMPUTE_CAPABILITY_MAJOR, &d->major},
                  {COMPUTE_CAPABILITY_MINOR, &d->minor},
                  {MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &d->max_shared_bytes},
                  {VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, &vmm},
                  {HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, &fds}};
    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        EPI_TRY(CU(DeviceGetAttribute, wanted[i].to, wanted[i].attribute, d->handle));
    }
    d->shareable = vmm && fds;
    return EP_OK;
}

ep_status epi_cu_device_open(struct epi_cu_device *out, int index) {
    struct epi_cu_device d = {.index = index};
    EPI_TRY(epi_cu_open());
    if (index < 0 || index >= num_devices) {
        return epi_fail(EP_ERR_UNSUPPORTED, "there is no CUDA device %d: %d are visible", index,
                        num_devices);
    }
    EPI_TRY(CU(DeviceGet, &d.handle, index));
    EPI_TRY(CU(DeviceGetName, d.name, (int)sizeof(d.name), d.handle));
    EPI_TRY(CU(DeviceTotalMem, &d.memory_bytes, d.handle));
    EPI_TRY(CU(DeviceGetUuid, d.uuid, d.handle));
    EPI_TRY(read_attributes(&d));
    if (d.major < 8) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "device %d (%s) has compute capability %d.%d, at least 8.0 is needed",
                        index, d.name, d.major, d.minor);
    }
    EPI_TRY(CU(DevicePrimaryCtxRetain, &d.context, d.handle));
    *out = d;
    return EP_OK;
}

void epi_cu_device_close(struct epi_cu_device *d) {
    if (d->context) {
        epi_cu_driver.DevicePrimaryCtxRelease(d->handle);
    }
    d->context = NULL;
}

ep_status epi_cu_peer(const struct epi_cu_device *d, const struct epi_cu_device *other) {
    int can = 0;
    EPI_TRY(CU(DeviceCanAccessPeer, &can, d->handle, other->handle));
    if (!can) {
        return epi_fail(
            EP_ERR_UNSUPPORTED,
            "device %d cannot reach the memory of device %d (see nvidia-smi topo -m)", d->index,
            other->index);
    }
    EPI_TRY(epi_cu_enter(d));
    const int result = epi_cu_driver.CtxEnablePeerAccess(other->context, 0);
    epi_cu_leave();
    return result == CU_PEER_ACCESS_ALREADY_ENABLED
               ? EP_OK
               : epi_cu_result(result, "cuCtxEnablePeerAccess");
}
