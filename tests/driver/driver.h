/* SPDX-License-Identifier: MIT */
/*
 * A CUDA driver for tests, without a GPU: built as libcuda.so.1 and found through
 * LD_LIBRARY_PATH. A launch runs the host bodies of our kernels, a thread for each warp, so that
 * all of the library that only CUDA groups use runs under sanitizers where there is no GPU. api.c
 * has devices, memory.c memory, stream.c streams and events, graph.c captures and graphs, launch.c
 * kernels; this is what they share.
 */
#ifndef TESTS_DRIVER_H
#define TESTS_DRIVER_H

#include "kernel/kernels.h"
#include "kernel/lang.h"
#include "src/cu/driver.h"

#define API __attribute__((visibility("default")))
#define DEFINE(name, ...)                                                                      \
    API int name(__VA_ARGS__);                                                                 \
    API int name(__VA_ARGS__)

/* CUresult, of captures: the library has sentences of its own for none of these. */
enum {
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
};

/* The threads that run the warps of a stream's launches. */
struct crew {
    struct hand **hand;
    int num;
};

/* Something queued on a stream. */
struct op {
    struct op *next;
    void (*run)(struct op *op); /* on the stream's thread */
    struct crew *crew;          /* the stream's, when it runs */
    void *to;
    const void *from;
    size_t bytes;
    uint64_t value;
    int blocks, warps, shared_bytes; /* of a launch, with the kernel's arguments behind */
    k_entry_fn entry;
    _Alignas(16) unsigned char args[K_MAX_ARG_BYTES];
};

struct op *driver_op(void (*run)(struct op *op)); /* zeros */
/* The stream runs `op` after what was queued before, and frees it; a captured stream keeps it. */
int driver_queue(void *stream, struct op *op);
/* The number of the newest capture that the stream was in; 0: none. Only who uses the stream may
 * read or write it. */
uint64_t *driver_capture_of(void *stream);
bool driver_is_captured(void *stream);
bool driver_is_legacy(const void *stream);
/* What two handles of one stream have in common. */
const void *driver_stream(void *stream);
/* As some calls of the driver do: returns when no stream of the thread's device has work, and lets
 * nobody queue any meanwhile. */
void driver_stop_all(void);

/* Whether capture `id` goes on. */
bool driver_capture_open(uint64_t id);
/* Adds `op` to the stream's capture, unless that has ended or is none: then it is false. */
bool driver_capture_add(void *stream, struct op *op);

/* What an event of a capture stands for. */
struct driver_point {
    const void *stream;
    uint64_t capture, num_steps; /* how many the capture had before it */
};
struct driver_point driver_capture_point(void *stream);
/* A stream that waits for a point of a capture takes part in it. */
int driver_capture_join(void *stream, const struct driver_point *at);

/* A call that no capture survives: the capture is invalid, unless it has ended: then it is false. */
bool driver_capture_spoil(uint64_t id);
/* For each call that the driver does not allow while there are captures, unless the thread's mode
 * is relaxed: the error, which the captures have too, or 0. */
int driver_unsafe(void);

/* Of the thread's context; 0 without one. */
int driver_device(void);

/* A stream that has ended leaves its threads to others. */
void driver_dismiss(struct crew *crew);

#endif
