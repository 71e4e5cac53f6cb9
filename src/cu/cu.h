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
    bool shareable;       /* its memory can be handed to other processes: see vmm.c */
    size_t memory_bytes;
    void *context;    /* retained */
    uint8_t uuid[16]; /* names it in every process; of a MIG device, the instance */
    char name[96];
};

ep_status epi_cu_device_open(struct epi_cu_device *out, int index);
void epi_cu_device_close(struct epi_cu_device *d);
/* Lets kernels of `d` use the memory of `other`. EP_ERR_UNSUPPORTED: there is no path. */
ep_status epi_cu_peer(const struct epi_cu_device *d, const struct epi_cu_device *other);

/* ---- peek.c: what can be known without opening the driver --------------------------------- */

/*
 * What a pointer is, for refusing those of the other kind. UNKNOWN: nobody has loaded the driver
 * into this process and initialised it; cheap then. Otherwise memory that CUDA does not know is
 * HOST. *device_index (may be NULL) is the device of DEVICE and MANAGED, else -1.
 */
enum epi_cu_pointer {
    EPI_CU_POINTER_UNKNOWN,
    EPI_CU_POINTER_HOST,
    EPI_CU_POINTER_PINNED, /* allocated by CUDA or registered */
    EPI_CU_POINTER_DEVICE,
    EPI_CU_POINTER_MANAGED
};
enum epi_cu_pointer epi_cu_pointer(const void *p, int *device_index);
/* The device of the calling thread's current context, or -1. */
int epi_cu_current_device(void);

/* ---- memory.c: memory, streams, events ---------------------------------------------------- */

ep_status epi_cu_alloc(const struct epi_cu_device *d, uint64_t *at, size_t bytes);
void epi_cu_free(const struct epi_cu_device *d, uint64_t *at);
/* Host memory that all devices reach at the same address. Does not wait; freeing does, for all that
 * the device has to do, and stops all launches meanwhile. So does epi_cu_free. */
ep_status epi_cu_alloc_host(const struct epi_cu_device *d, void **p, size_t bytes);
void epi_cu_free_host(const struct epi_cu_device *d, void **p);

/* A pool of its own, never destroyed: it keeps what is freed until it is trimmed, and no stream waits
 * for another because of it. EP_ERR_UNSUPPORTED: the device has none. */
ep_status epi_cu_pool_create(const struct epi_cu_device *d, void **pool);
/* What is free goes back to the device. */
void epi_cu_pool_trim(const struct epi_cu_device *d, void *pool);
/* In the order of the stream, which must not be under capture; others may be. Neither call waits
 * for anything. */
ep_status epi_cu_pool_alloc(const struct epi_cu_device *d, void *pool, void *stream,
                            uint64_t *at, size_t bytes);
void epi_cu_pool_free(const struct epi_cu_device *d, void *stream, uint64_t *at);

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

/* A stream that does not wait for the default stream; `high`: of the greatest priority. */
ep_status epi_cu_stream_create(const struct epi_cu_device *d, void **stream);
ep_status epi_cu_stream_create_high(const struct epi_cu_device *d, void **stream);
void epi_cu_stream_destroy(const struct epi_cu_device *d, void **stream);
ep_status epi_cu_stream_sync(const struct epi_cu_device *d, void *stream);
/* What is queued behind this waits until *word (of epi_cu_alloc_host) is `value` or more.
 * EP_ERR_UNSUPPORTED: the driver or the device cannot. */
ep_status epi_cu_stream_hold(const struct epi_cu_device *d, void *stream, uint32_t *word,
                             uint32_t value);
/* Which capture the stream is part of, as a number that no other capture of the process has had; 0:
 * none. EP_ERR_STATE: the capture has been invalidated, or this is the legacy default stream and
 * another stream, which it would wait for, is being captured; that capture stays valid. */
ep_status epi_cu_capture_id(const struct epi_cu_device *d, void *stream, uint64_t *id);

ep_status epi_cu_event_create(const struct epi_cu_device *d, void **event); /* with time */
ep_status epi_cu_event_create_plain(const struct epi_cu_device *d, void **event); /* without */
void epi_cu_event_destroy(const struct epi_cu_device *d, void **event);
ep_status epi_cu_event_record(const struct epi_cu_device *d, void *event, void *stream);
ep_status epi_cu_event_wait(const struct epi_cu_device *d, void *stream, void *event);
/* EP_AGAIN: what was recorded has not passed. Not for an event recorded in a capture. */
ep_status epi_cu_event_query(const struct epi_cu_device *d, void *event);
/* Microseconds from a to b, both passed. */
ep_status epi_cu_event_elapsed(const struct epi_cu_device *d, void *a, void *b, double *us);

/* ---- vmm.c: memory that other processes and devices of the host can map ------------------- */

/* Plain data: any thread of the process may use a copy. */
struct epi_cu_memory {
    uint64_t address;
    size_t bytes;    /* whole pages */
    uint64_t handle; /* CUmemGenericAllocationHandle; 0: these are addresses alone */
};

/* Addresses for pages of memory: *page bytes are what the device maps at once. EP_ERR_UNSUPPORTED: it
 * has no such memory. */
ep_status epi_cu_memory_reserve(const struct epi_cu_device *d, size_t bytes,
                                struct epi_cu_memory *out, size_t *page);
/* Memory at some of them: whole pages, zeroed, read-write for `d`. EP_ERR_NOMEM says how much it has. */
ep_status epi_cu_memory_create(const struct epi_cu_device *d, uint64_t at, size_t bytes,
                               struct epi_cu_memory *out);
/* Another device of this process may use it too, at the same address. EP_ERR_UNSUPPORTED: there is
 * no path. */
ep_status epi_cu_memory_admit(const struct epi_cu_memory *m, const struct epi_cu_device *d);
/* A descriptor for another process, the caller's to close. */
ep_status epi_cu_memory_export(const struct epi_cu_memory *m, int *fd);
/* Maps what another process has exported, with the same `bytes`, for `d` at reserved addresses; the
 * descriptor stays the caller's, and the memory lives until all who map it have released it.
 * EP_ERR_UNSUPPORTED: there is no path. */
ep_status epi_cu_memory_import(const struct epi_cu_device *d, int fd, uint64_t at, size_t bytes,
                               struct epi_cu_memory *out);
/* Created or imported; then what was reserved. `d` is any device of the process. */
void epi_cu_memory_release(const struct epi_cu_device *d, const struct epi_cu_memory *m);

/* Host memory that exists already, such as a shared mapping, for kernels: pinned, for all devices
 * of the process at the same *address. A range can be registered once in a process, and stays so
 * while the context it was registered in lives. */
ep_status epi_cu_register(const struct epi_cu_device *d, void *p, size_t bytes,
                          uint64_t *address);
void epi_cu_unregister(const struct epi_cu_device *d, void *p);

/* ---- module.c: compiled kernels ----------------------------------------------------------- */

struct epi_cu_kernel {
    void *function;
    char name[48];
};

/* Loads a cubin into the device, now and not at the first launch. */
ep_status epi_cu_module_load(const struct epi_cu_device *d, const void *cubin, void **module);
void epi_cu_module_unload(const struct epi_cu_device *d, void **module);
/* The kernel opts in to all dynamic shared memory that the device has for it. `name` is what errors
 * call it. */
ep_status epi_cu_kernel_get(const struct epi_cu_device *d, void *module, const char *symbol,
                            const char *name, struct epi_cu_kernel *out);

struct epi_cu_launch {
    int blocks, threads;
    size_t shared_bytes; /* dynamic */
    void *stream;
};
/* `args` is the kernel's only parameter, copied before this returns. */
ep_status epi_cu_launch(const struct epi_cu_device *d, const struct epi_cu_kernel *k,
                        const struct epi_cu_launch *l, const void *args);

/* ---- find.c: the compiler ----------------------------------------------------------------- */

struct epi_nvrtc;

/* Where EP_NVRTC_PATH says (a libnvrtc.so or the folder of one), else wherever NVRTC usually is;
 * find.c has the order. `max_major` is the driver's, because it may not load what a newer NVRTC
 * makes; 0: unknown. EP_ERR_UNSUPPORTED: there is none; the text says what to install. */
ep_status epi_nvrtc_open(struct epi_nvrtc **out, int max_major);
void epi_nvrtc_close(struct epi_nvrtc **nvrtc);
const char *epi_nvrtc_path(const struct epi_nvrtc *nvrtc);
int epi_nvrtc_version(const struct epi_nvrtc *nvrtc); /* 13000 is 13.0 */

/* ---- nvrtc.c: one compilation ------------------------------------------------------------- */

struct epi_cubin {
    void *data;
    size_t bytes;
    char *ptx; /* what ptxas made it from */
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

/* ---- jit.c: kernels compiled once --------------------------------------------------------- */

/* Belongs to the process and is never freed: a process uses few, of some 100 KB each. */
struct epi_jit_kernel {
    const void *cubin;
    size_t bytes;
};

/*
 * The cubin of a kernel text of the library: from memory, from disk, or compiled now, which is
 * when NVRTC is looked for. Several threads and several processes that ask for the same at the
 * same time compile it once. `driver_version` is epi_cu_driver_version(); 0: unknown. For when a
 * group is created, never for an operation: it may take seconds.
 */
ep_status epi_jit_get(const char *file, int arch, const char *const *defines,
                      int driver_version, struct epi_jit_kernel *out);
/* Several files at the same time, each on a thread of its own; all of out[] or, with the error of
 * the first that failed, none. */
ep_status epi_jit_get_all(const char *const *files, int num_files, int arch,
                          const char *const *defines, int driver_version,
                          struct epi_jit_kernel *out);

struct epi_jit_info {
    int nvrtc_version;       /* 0: none was needed so far */
    char nvrtc_path[1024];   /* "" likewise */
    char cache_folder[1024]; /* where kernels would be kept now; "": in memory only */
    uint64_t num_compiled, num_from_disk, num_from_memory;
};
void epi_jit_info(struct epi_jit_info *out);

#endif
