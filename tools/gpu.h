/* SPDX-License-Identifier: MIT */
/*
 * GPUs as the subcommands see them: which there are, how they are linked, and the GPU of one
 * rank with its memory, a stream, a clock and graphs. Of tools/ only gpu*.c know CUDA.
 *
 * A process that has opened the driver cannot fork ranks that use it. So the process that
 * starts ranks never opens it: what it wants to know is found out by a child (gpu_look,
 * gpu_measure_links).
 */
#ifndef TOOLS_GPU_H
#define TOOLS_GPU_H

#include "tools/tool.h"

enum { GPU_MAX = 16 };

/* ---- gpu_look.c: what there is --------------------------------------------------------- */

struct gpu_device {
    char why[240]; /* why it cannot be used; "": it can */
    char name[96];
    int major, minor; /* compute capability */
    int num_sms;
    int64_t memory_bytes;
    bool shares_memory; /* with other processes, by file descriptors */
    bool exclusive;     /* takes one process at a time */
};

struct gpu_look {
    char why[480];      /* why there can be no CUDA groups here; "": there can */
    int driver_version; /* 13000 is 13.0 */
    int num;            /* devices that are visible, at most GPU_MAX */
    int num_present;    /* devices of this machine, visible or not; 0: unknown */
    bool mps;           /* processes on them go through one server */
    struct gpu_device device[GPU_MAX];
    bool reaches[GPU_MAX][GPU_MAX]; /* [from][to], and itself */
    char compiler[1024]; /* the file of NVRTC; "": none, which costs nothing while all
                                       kernels are in the cache */
    char compiler_why[480];
    int compiler_version;
    char cache_folder[1024]; /* of compiled kernels; "": none */
};

/* Looks once; any later call returns the same. `name` is who asks: "ep bench". */
const struct gpu_look *gpu_look(const char *name);
/* The GPU of a rank: ranks go round the visible ones. */
int gpu_of_rank(const struct gpu_look *look, int rank);
/* "4 x NVIDIA H200 (sm_90, 132 SMs)" of the first num devices; those of other kinds are added. */
void gpu_describe(const struct gpu_look *look, int num, char *out, size_t room);

/* ---- gpu_links.c: how fast rows can cross ----------------------------------------------- */

/* By the copy engines: no SM takes part. Rates are bytes per ns (GB/s), per GPU and direction. */
struct gpu_links {
    char why[480];
    int num;
    /* All GPUs send to all others at the same time, for the same time: each to one other after
     * the other, or to all at once. */
    double in_turn, at_once;
    double local; /* a GPU copies within its memory: bytes read and written */
    /* [from][to], one pair alone: a large copy; the time of 8 bytes. */
    double rate[GPU_MAX][GPU_MAX], small_us[GPU_MAX][GPU_MAX];
};

/* Of the first num devices; false, with the reason in out->why, if it could not be done. */
bool gpu_measure_links(const char *name, int num, bool pairs, struct gpu_links *out);

/* ---- gpu.c: the GPU of one rank --------------------------------------------------------- */

struct gpu;
struct gpu_graph;

/* Functions return a status, with a text in ep_last_error(). One thread uses a GPU object. */
ep_status gpu_open(struct gpu **out, int device);
void gpu_close(struct gpu **gpu); /* with all memory it gave */
/* A function of the driver that src/cu does not use, once it is loaded. NULL: it has none. */
void *gpu_driver_function(const char *name);
void *gpu_stream(const struct gpu *gpu);

/* Memory of the device, freed by gpu_close. NULL: none, see ep_last_error(). */
void *gpu_alloc(struct gpu *gpu, int64_t num, int64_t bytes);
/* The same of pinned host memory, which the host and kernels reach. */
void *gpu_alloc_pinned(struct gpu *gpu, size_t bytes);
/* In the order of the stream; they return when the bytes have been copied. */
ep_status gpu_in(struct gpu *gpu, void *to, const void *from, int64_t bytes);
ep_status gpu_out(struct gpu *gpu, void *to, const void *from, int64_t bytes);
ep_status gpu_sync(struct gpu *gpu);
/* Enqueues only. */
ep_status gpu_fill(struct gpu *gpu, void *to, int byte, int64_t bytes);
/* Beside what is queued on the stream from now on until gpu_join, before which all of it has ended. */
ep_status gpu_fill_beside(struct gpu *gpu, void *to, int byte, int64_t bytes);
ep_status gpu_join(struct gpu *gpu);

/* What is queued on the stream from now on waits for gpu_release. False: it cannot be done here.
 * Between the two nothing may wait for the stream. */
bool gpu_hold(struct gpu *gpu);
void gpu_release(struct gpu *gpu); /* a store: takes effect within about a microsecond */

enum gpu_mark { GPU_BEGIN, GPU_END };
ep_status gpu_mark(struct gpu *gpu, enum gpu_mark mark); /* the place in the stream */
ep_status gpu_elapsed_ns(struct gpu *gpu, int64_t *ns);  /* from begin to end, both passed */

/* What is queued between the two becomes a graph instead. */
ep_status gpu_capture(struct gpu *gpu);
ep_status gpu_captured(struct gpu *gpu, struct gpu_graph **out);
ep_status gpu_replay(struct gpu *gpu, struct gpu_graph *graph);
void gpu_graph_destroy(struct gpu_graph **graph);
/* Blocks of the graph's largest kernel, one to an SM; 0: unknown. */
int gpu_graph_sms(const struct gpu_graph *graph);

#endif
