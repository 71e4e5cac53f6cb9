/* SPDX-License-Identifier: MIT */
/*
 * What can be known of CUDA without opening the driver: programs that never touch a GPU must not
 * pay for one. Owns a few functions of the driver that somebody else has loaded. Any thread. Must
 * not load or initialise anything.
 */
#include "src/cu/cu.h"

#include <dlfcn.h>
#include <link.h>
#include <stdatomic.h>

enum pointer_attribute { MEMORY_TYPE = 2, IS_MANAGED = 8, DEVICE_ORDINAL = 9 };
enum memory_type { MEMORY_HOST = 1, MEMORY_DEVICE = 2 };

static struct {
    int (*PointerGetAttributes)(unsigned, int *, void **, uint64_t);
    int (*CtxGetDevice)(int *);
    int (*DeviceGet)(int *, int);
} driver;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static atomic_bool is_found; /* `driver` is filled, for good */
/* How many libraries the process had loaded when the driver was last looked for in vain. */
static _Atomic uint64_t looked_after;

static int read_num_loaded(struct dl_phdr_info *info, size_t bytes, void *num) {
    (void)bytes;
    *(uint64_t *)num = info->dlpi_adds;
    return 1; /* the first knows it */
}

static bool look(void) {
    void *lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (!lib) {
        return false;
    }
    *(void **)&driver.PointerGetAttributes = dlsym(lib, "cuPointerGetAttributes");
    *(void **)&driver.CtxGetDevice = dlsym(lib, "cuCtxGetDevice");
    *(void **)&driver.DeviceGet = dlsym(lib, "cuDeviceGet");
    if (driver.PointerGetAttributes && driver.CtxGetDevice && driver.DeviceGet) {
        return true; /* and stays loaded */
    }
    dlclose(lib);
    return false;
}

/* Looks again only when a library has been loaded since. */
static bool find(void) {
    uint64_t num_loaded = 0;
    if (atomic_load_explicit(&is_found, memory_order_acquire)) {
        return true;
    }
    dl_iterate_phdr(read_num_loaded, &num_loaded);
    if (atomic_load(&looked_after) == num_loaded) {
        return false;
    }
    pthread_mutex_lock(&mutex);
    const bool found = atomic_load(&is_found) || look();
    if (found) {
        atomic_store_explicit(&is_found, true, memory_order_release);
    } else {
        atomic_store(&looked_after, num_loaded);
    }
    pthread_mutex_unlock(&mutex);
    return found;
}

enum epi_cu_pointer epi_cu_pointer(const void *p, int *device_index) {
    uint32_t type = 0, managed = 0;
    int ordinal = -1;
    int attributes[] = {MEMORY_TYPE, IS_MANAGED, DEVICE_ORDINAL};
    void *values[] = {&type, &managed, &ordinal};
    enum epi_cu_pointer kind = EPI_CU_POINTER_HOST;
    if (!find() ||
        driver.PointerGetAttributes(3, attributes, values, (uint64_t)(uintptr_t)p) != 0) {
        kind = EPI_CU_POINTER_UNKNOWN;
    } else if (managed) {
        kind = EPI_CU_POINTER_MANAGED;
    } else if (type == MEMORY_DEVICE) {
        kind = EPI_CU_POINTER_DEVICE;
    } else if (type == MEMORY_HOST) {
        kind = EPI_CU_POINTER_PINNED;
    }
    if (device_index) {
        *device_index =
            kind == EPI_CU_POINTER_DEVICE || kind == EPI_CU_POINTER_MANAGED ? ordinal : -1;
    }
    return kind;
}

int epi_cu_current_device(void) {
    int current, handle;
    if (!find() || driver.CtxGetDevice(&current) != 0) {
        return -1;
    }
    for (int i = 0; driver.DeviceGet(&handle, i) == 0; i++) {
        if (handle == current) {
            return i;
        }
    }
    return -1;
}
