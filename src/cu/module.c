/* SPDX-License-Identifier: MIT */
/*
 * Compiled kernels: loading, what the device says about them, launching. Owns nothing. Any
 * thread. Must not load anything at a launch: a kernel may be waiting for this one by then, and
 * loading can wait for the device.
 */
#include "src/cu/driver.h"

#define SHARED_SIZE_BYTES 1 /* attributes of a function */
#define MAX_DYNAMIC_SHARED_SIZE_BYTES 8

ep_status epi_cu_module_load(const struct epi_cu_device *d, const void *cubin, void **module) {
    CU_WITHIN(d, CU(ModuleLoadData, module, cubin));
}

void epi_cu_module_unload(const struct epi_cu_device *d, void **module) {
    CU_GIVE_BACK(d, module, epi_cu_driver.ModuleUnload(*module));
}

static ep_status find_function(const struct epi_cu_device *d, void *module, const char *symbol,
                               struct epi_cu_kernel *k) {
    int own_bytes = 0;
    const ep_status st = CU(ModuleGetFunction, &k->function, module, symbol);
    if (st != EP_OK) {
        return epi_fail(st, "kernel %s: %s", symbol, epi_error_text());
    }
    if (epi_cu_driver.FuncLoad) { /* with lazy loading the first launch would do this */
        EPI_TRY(CU(FuncLoad, k->function));
    }
    EPI_TRY(CU(FuncGetAttribute, &own_bytes, SHARED_SIZE_BYTES, k->function));
    return CU(FuncSetAttribute, k->function, MAX_DYNAMIC_SHARED_SIZE_BYTES,
              d->max_shared_bytes - own_bytes);
}

ep_status epi_cu_kernel_get(const struct epi_cu_device *d, void *module, const char *symbol,
                            const char *name, struct epi_cu_kernel *out) {
    struct epi_cu_kernel k = {0};
    epi_format(k.name, sizeof(k.name), "%s", name);
    EPI_TRY(epi_cu_enter(d));
    const ep_status st = find_function(d, module, symbol, &k);
    epi_cu_leave();
    EPI_TRY(st);
    *out = k;
    return EP_OK;
}

ep_status epi_cu_launch(const struct epi_cu_device *d, const struct epi_cu_kernel *k,
                        const struct epi_cu_launch *l, const void *args) {
    void *params[] = {(void *)(uintptr_t)args}; /* the driver only reads */
    ep_status st = epi_cu_enter(d);
    if (st == EP_OK) {
        st = CU(LaunchKernel, k->function, (unsigned)l->blocks, 1, 1, (unsigned)l->threads, 1,
                1, (unsigned)l->shared_bytes, l->stream, params, NULL);
        epi_cu_leave();
    }
    if (st != EP_OK) {
        return epi_fail(st, "%s, %d blocks of %d threads with %zu bytes of shared memory: %s",
                        k->name, l->blocks, l->threads, l->shared_bytes, epi_error_text());
    }
    return EP_OK;
}
