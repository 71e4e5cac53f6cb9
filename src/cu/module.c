/* SPDX-License-Identifier: MIT */
/*
 * Compiled kernels: loading, what the device says about them, launching. Owns nothing. Any
 * thread. Must not load anything at a launch: a kernel may be waiting for this one by then, and
 * loading can wait for the device.
 */
#include "src/cu/driver.h"

#include <string.h>

enum function_attribute {
    MAX_THREADS_PER_BLOCK = 0,
    SHARED_SIZE_BYTES = 1,
    LOCAL_SIZE_BYTES = 3,
    NUM_REGS = 4,
    MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
};

#define LAUNCH_COOPERATIVE 2

ep_status epi_cu_module_load(const struct epi_cu_device *d, const void *cubin, void **module) {
    ep_status st = epi_cu_enter(d);
    if (st == EP_OK) {
        st = CU(ModuleLoadData, module, cubin);
        epi_cu_leave();
    }
    return st;
}

void epi_cu_module_unload(const struct epi_cu_device *d, void **module) {
    if (*module && epi_cu_enter(d) == EP_OK) {
        epi_cu_driver.ModuleUnload(*module);
        epi_cu_leave();
    }
    *module = NULL;
}

static ep_status get_kernel(const struct epi_cu_device *d, void *module,
                            struct epi_cu_kernel *k) {
    ep_status st = CU(ModuleGetFunction, &k->function, module, k->name);
    if (st != EP_OK) {
        return epi_fail(st, "kernel %s: %s", k->name, epi_error_text());
    }
    if (epi_cu_driver.FuncLoad) { /* with lazy loading the first launch would do this */
        st = CU(FuncLoad, k->function);
    }
    const struct {
        int attribute;
        int *to;
    } wanted[] = {{MAX_THREADS_PER_BLOCK, &k->max_threads},
                  {SHARED_SIZE_BYTES, &k->static_shared_bytes},
                  {LOCAL_SIZE_BYTES, &k->local_bytes},
                  {NUM_REGS, &k->num_registers}};
    for (size_t i = 0; st == EP_OK && i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        st = CU(FuncGetAttribute, wanted[i].to, wanted[i].attribute, k->function);
    }
    if (st == EP_OK) {
        st = CU(FuncSetAttribute, k->function, MAX_DYNAMIC_SHARED_SIZE_BYTES,
                d->max_shared_bytes - k->static_shared_bytes);
    }
    return st;
}

ep_status epi_cu_kernel_get(const struct epi_cu_device *d, void *module, const char *name,
                            struct epi_cu_kernel *out) {
    struct epi_cu_kernel k;
    memset(&k, 0, sizeof(k));
    epi_format(k.name, sizeof(k.name), "%s", name);
    ep_status st = epi_cu_enter(d);
    if (st == EP_OK) {
        st = get_kernel(d, module, &k);
        epi_cu_leave();
    }
    if (st == EP_OK) {
        *out = k;
    }
    return st;
}

ep_status epi_cu_resident(const struct epi_cu_device *d, const struct epi_cu_kernel *k,
                          int threads, size_t shared_bytes, int *blocks) {
    int per_sm = 0;
    ep_status st = epi_cu_enter(d);
    if (st == EP_OK) {
        st = CU(OccupancyMaxActiveBlocks, &per_sm, k->function, threads, shared_bytes);
        epi_cu_leave();
    }
    if (st == EP_OK) {
        *blocks = per_sm * d->num_sms;
    }
    return st;
}

ep_status epi_cu_launch(const struct epi_cu_device *d, const struct epi_cu_kernel *k,
                        const struct epi_cu_launch *l, const void *args) {
    struct cu_attribute attribute;
    struct cu_config c;
    void *params[] = {(void *)(uintptr_t)args}; /* the driver only reads */
    memset(&attribute, 0, sizeof(attribute));
    memset(&c, 0, sizeof(c));
    attribute.id = LAUNCH_COOPERATIVE;
    attribute.value.cooperative = 1;
    c.grid[0] = (unsigned)l->blocks;
    c.block[0] = (unsigned)l->threads;
    c.grid[1] = c.grid[2] = c.block[1] = c.block[2] = 1;
    c.shared_bytes = (unsigned)l->shared_bytes;
    c.stream = l->stream;
    c.attributes = &attribute;
    c.num_attributes = l->cooperative ? 1 : 0;
    ep_status st = epi_cu_enter(d);
    if (st == EP_OK) {
        st = CU(LaunchKernelEx, &c, k->function, params, NULL);
        epi_cu_leave();
    }
    if (st != EP_OK) {
        return epi_fail(st, "%s, %d blocks of %d threads with %zu bytes of shared memory: %s",
                        k->name, l->blocks, l->threads, l->shared_bytes, epi_error_text());
    }
    return EP_OK;
}
