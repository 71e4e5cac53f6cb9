/* SPDX-License-Identifier: MIT */
/*
 * All that knows CUDA. L1: devices and their memory, streams, events, compiled kernels and their
 * launches, in the library's own words; no CUDA header is needed to build and no CUDA library to
 * load. The driver and NVRTC are opened when the first caller asks for them.
 *
 * Calls may come from any thread. Each works in the primary context of the device it is given and
 * leaves the caller's current context as it was. A device address is an integer, a stream or an
 * event a void pointer (CUstream, CUevent). Nothing here synchronises a whole device.
 */
#ifndef EPI_CU_H
#define EPI_CU_H

#include "src/base/base.h"

/* ---- open.c: the driver and its devices --------------------------------------------------- */

/* Opens the driver, once per process. EP_ERR_UNSUPPORTED: there is none, or no device. */
ep_status epi_cu_open(void);
int epi_cu_driver_version(void); /* 13000 is 13.0; 0 before epi_cu_open */
int epi_cu_num_devices(void);

struct epi_cu_device {
    int index, handle;
    int major, minor; /* compute capability */
    int num_sms;
    int max_shared_bytes; /* dynamic shared memory that a block can opt in to */
    bool cooperative;
    size_t memory_bytes;
    void *context; /* retained */
    char name[96];
};

ep_status epi_cu_device_open(struct epi_cu_device *out, int index);
void epi_cu_device_close(struct epi_cu_device *d);
/* Lets kernels of `d` use the memory of `other`. EP_ERR_UNSUPPORTED: there is no path. */
ep_status epi_cu_peer(const struct epi_cu_device *d, const struct epi_cu_device *other);

/* ---- memory.c: memory, streams, events ---------------------------------------------------- */

ep_status epi_cu_alloc(const struct epi_cu_device *d, uint64_t *at, size_t bytes);
void epi_cu_free(const struct epi_cu_device *d, uint64_t *at);
/* Host memory that all devices reach at the same address. */
ep_status epi_cu_alloc_host(const struct epi_cu_device *d, void **p, size_t bytes);
void epi_cu_free_host(const struct epi_cu_device *d, void **p);

/* In the order of the stream. `in` and `out` return when the bytes have been copied, the others
 * at once. */
ep_status epi_cu_copy_in(const struct epi_cu_device *d, void *stream, uint64_t to,
                         const void *from, size_t bytes);
ep_status epi_cu_copy_out(const struct epi_cu_device *d, void *stream, void *to, uint64_t from,
                          size_t bytes);
ep_status epi_cu_copy(const struct epi_cu_device *d, void *stream, uint64_t to, uint64_t from,
                      size_t bytes);
ep_status epi_cu_copy_out_async(const struct epi_cu_device *d, void *stream, void *pinned,
                                uint64_t from, size_t bytes);
ep_status epi_cu_fill(const struct epi_cu_device *d, void *stream, uint64_t at, int byte,
                      size_t bytes);

/* A stream that does not wait for the default stream. */
ep_status epi_cu_stream_create(const struct epi_cu_device *d, void **stream);
void epi_cu_stream_destroy(const struct epi_cu_device *d, void **stream);
ep_status epi_cu_stream_query(const struct epi_cu_device *d, void *stream); /* or EP_AGAIN */
ep_status epi_cu_stream_sync(const struct epi_cu_device *d, void *stream);
/* What is queued behind this waits until *word (of epi_cu_alloc_host) is `value` or more.
 * EP_ERR_UNSUPPORTED: the driver or the device cannot. */
ep_status epi_cu_stream_hold(const struct epi_cu_device *d, void *stream, uint32_t *word,
                             uint32_t value);

ep_status epi_cu_event_create(const struct epi_cu_device *d, void **event); /* with time */
void epi_cu_event_destroy(const struct epi_cu_device *d, void **event);
ep_status epi_cu_event_record(const struct epi_cu_device *d, void *event, void *stream);
ep_status epi_cu_event_wait(const struct epi_cu_device *d, void *stream, void *event);
/* Microseconds from a to b, both passed. */
ep_status epi_cu_event_elapsed(const struct epi_cu_device *d, void *a, void *b, double *us);

/* ---- module.c: compiled kernels ----------------------------------------------------------- */

struct epi_cu_kernel {
    void *function;
    int num_registers, local_bytes, static_shared_bytes, max_threads;
    char name[48];
};

/* Loads a cubin into the device, now and not at the first launch. */
ep_status epi_cu_module_load(const struct epi_cu_device *d, const void *cubin, void **module);
void epi_cu_module_unload(const struct epi_cu_device *d, void **module);
/* The kernel opts in to all dynamic shared memory that the device has for it. */
ep_status epi_cu_kernel_get(const struct epi_cu_device *d, void *module, const char *name,
                            struct epi_cu_kernel *out);
/* Blocks of this shape that an idle device holds at once. */
ep_status epi_cu_resident(const struct epi_cu_device *d, const struct epi_cu_kernel *k,
                          int threads, size_t shared_bytes, int *blocks);

struct epi_cu_launch {
    int blocks, threads;
    size_t shared_bytes; /* dynamic */
    /* The device starts all blocks together or none. Kernels that wait for other kernels of the
     * same device must not ask for it: it may make them run one after the other. */
    bool cooperative;
    void *stream;
};
/* `args` is the kernel's only parameter, copied before this returns. */
ep_status epi_cu_launch(const struct epi_cu_device *d, const struct epi_cu_kernel *k,
                        const struct epi_cu_launch *l, const void *args);

/* ---- nvrtc.c: the compiler ---------------------------------------------------------------- */

struct epi_nvrtc;

/* Where to look. Any may be NULL or 0. The library that the process has loaded already is tried
 * first, then these, then the loader's path and /usr/local/cuda; the newest wins. */
struct epi_nvrtc_search {
    const char *path; /* a libnvrtc.so or the folder that holds it; nothing else is tried */
    const char *home; /* a toolkit: home/lib64 */
    const char *venv; /* a Python environment with NVIDIA's wheels */
    int max_major;    /* of the driver: what a newer NVRTC makes it may not load */
};

/* EP_ERR_UNSUPPORTED: there is none; the text says what to install. */
ep_status epi_nvrtc_open(struct epi_nvrtc **out, const struct epi_nvrtc_search *where);
void epi_nvrtc_close(struct epi_nvrtc **nvrtc);
const char *epi_nvrtc_path(const struct epi_nvrtc *nvrtc);
int epi_nvrtc_version(const struct epi_nvrtc *nvrtc); /* 13000 is 13.0 */

struct epi_cubin {
    void *data;
    size_t bytes;
    char *log; /* what the compiler and ptxas said; "" at least */
};

/*
 * Compiles a kernel text that the library holds ("kernel/dispatch.k.c") for sm_`arch`, with
 * `defines` ("-DK_BLOCK_WARPS=8", NULL ends them). On failure *out is empty, the error text is
 * the compiler's first line of complaint and the whole log is logged.
 */
ep_status epi_nvrtc_compile(struct epi_nvrtc *nvrtc, const char *file, int arch,
                            const char *const *defines, struct epi_cubin *out);
void epi_cubin_free(struct epi_cubin *c);

#endif
