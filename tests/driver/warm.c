/* SPDX-License-Identifier: MIT */
/*
 * Fills the cache of compiled kernels (EP_JIT_CACHE) with what CUDA groups on the driver for tests
 * ask for: NVRTC does not work beside that driver. Status 77: there is no NVRTC.
 */
#include <stdio.h>

#include "src/cu/cu.h"
#include "src/run/run.h"

/* As in t_jit: what NVRTC makes once for all its threads. */
__attribute__((visibility("default"))) const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void) {
    return "race:libnvrtc.so\n";
}

int main(void) {
    const char *files[EPI_KERNEL_COUNT];
    const int num_files = epi_kernel_files(EPI_KERNEL_SET_THROUGHPUT, files);
    static const char *const defines[] = {"-DK_BLOCK_WARPS=2", NULL};
    struct epi_jit_kernel kernels[EPI_KERNEL_COUNT];
    const ep_status st = epi_jit_get_all(files, num_files, 90, defines, 13000, kernels);
    if (st != EP_OK) {
        printf("%s\n", ep_last_error());
    }
    return st == EP_OK ? 0 : st == EP_ERR_UNSUPPORTED ? 77 : 1;
}
