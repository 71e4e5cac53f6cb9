/* SPDX-License-Identifier: MIT */
/*
 * Inside the product layer: what a group and a handle are, and the calls between its files.
 * api.c checks arguments and calls these; it does nothing else.
 */
#ifndef EPI_GROUP_H
#define EPI_GROUP_H

#include <stdatomic.h>

#include "src/boot/boot.h"
#include "src/ep/plan.h"
#include "src/mem/mem.h"
#include "src/run/run.h"

/*
 * Order: operations get numbers when they are issued, 1, 2, ...; each runs when the one before it
 * has ended, whatever streams they are on. The number is the operation's epoch in the kernels.
 */
struct ep_group {
    struct ep_group_config config; /* pointers in it are not kept, except world */
    struct epi_plan plan;
    struct epi_boot *boot;
    struct epi_mem *mem;
    struct epi_run *run;   /* of a host group ... */
    struct epi_cuda *cuda; /* ... or all that a CUDA group has instead */
    int rank, num_ranks, num_local;
    int workers, most_workers; /* of an operation: by default (CUDA, 0: by formula), at most */
    int64_t timeout_ns;
    struct k_group k;
    void *tables;      /* the arrays that k points to, or a copy of them in host memory */
    struct k_ctl *ctl; /* of a host group */
    _Atomic(struct k_board *) board; /* this rank's, once there is memory */

    pthread_mutex_t mutex;
    pthread_cond_t turn;
    uint64_t issued, ended; /* operations */
    ep_handle *begun;       /* dispatch between begin and finish */
    int next_slot, next_handle, num_handles;

    atomic_ullong fault_told; /* the operation that returned the fault; 0: none has yet */
    uint64_t fault_last;      /* issued by then */
    atomic_int dead_rank;     /* -1, or who died */
    char dead_why[96];
};

enum epi_dispatch_part { EPI_DISPATCH_ALL, EPI_DISPATCH_BEGIN, EPI_DISPATCH_FINISH };

/* What an operation moves, as far as its SMs depend on it. */
struct epi_load {
    int row_bytes; /* 0: local work */
    int topk;
    bool expanded, answers;
};

/* How it is launched. Workers: threads of a host rank, blocks of a CUDA rank. */
struct epi_shape {
    int workers, send_blocks, stages, stage_bytes;
};

/* A dispatch on its way through a stream. */
struct epi_dispatch_task {
    ep_handle *h;
    struct k_dispatch_args args;
    uint64_t number;
    struct epi_shape shape;
    enum epi_dispatch_part part;
    bool cached; /* counts are known from before */
    bool arena;  /* recv_x is a view: it has no capacity of its own */
    bool ran;
};

struct ep_handle {
    ep_group *group;
    struct ep_handle_config config;
    int id;
    struct k_handle k;       /* of a CUDA group: addresses of the device */
    void *block;             /* that k points into */
    struct k_counts *notice; /* what kernels tell the host */
    int notice_slot;         /* of a CUDA group */
    atomic_int pending;      /* pieces of work queued and not ended */

    /* As issued; the calling thread's view. */
    int tokens, topk;
    bool by_mask, routed, dispatched;
    uint64_t counted_by; /* operation that exchanged this routing's counts */
    int slot;            /* of the last dispatch */
    bool expanded;       /* form of the last dispatch */
    int32_t x_dtype;     /* of the last dispatch's rows ... */
    int64_t x_cols;      /* ... and their elements */
    int32_t scales_dtype;
    uint32_t routed_by;             /* CUDA: ticket of the last route ... */
    bool captured;                  /* ... and whether what was last enqueued is in a graph */
    struct epi_dispatch_task begun; /* between begin and finish */
    atomic_bool unfit; /* the last uncached dispatch did not fit anywhere: nothing arrived */
};

/* ---- group.c -------------------------------------------------------------------------------- */

/* A rank that fails before it meets the others tells those that are threads of its world. */
ep_status epi_fail_to_come(const struct ep_group_config *config, ep_status st);
ep_status epi_group_create(ep_group **out, const struct ep_group_config *config);
void epi_group_destroy(ep_group **group);

/* The group's fault as a status for operation n, with its text: the fault itself for the first to
 * ask and all that were issued by then, EP_ERR_FAULTED for later ones. EP_OK: n can go on. */
ep_status epi_group_check(ep_group *g, uint64_t n);
/* EP_ERR_FAULTED if an operation has returned the fault: nothing new is begun. */
ep_status epi_group_refuse(ep_group *g);
/* The same for the operation that would come next, which then returns the fault itself. */
ep_status epi_group_refuse_next(ep_group *g);
/* Whether the kernels, a peer or the boot have raised a fault. Not one: a peer in destroy. */
bool epi_group_faulted(ep_group *g);
/* Whether operation n is not to go on: after a fault, or without a peer that has left. */
bool epi_group_ends(ep_group *g, uint64_t n);
void epi_group_describe(ep_group *g, struct ep_fault *f);
/* Ends all waits of this rank, and of the peers from operation n on (all: 0). Operation n returns
 * the status itself. */
void epi_group_raise(ep_group *g, ep_status status, int subject, uint64_t n);
/* Tells the peers that this rank takes no part in operations after `last`. */
void epi_group_leave(ep_group *g, uint64_t last);
/* There is memory: from now on boards are read and written. */
void epi_group_hang_board(ep_group *g);
/* A rank has died; from any thread. */
void epi_group_died(ep_group *g, int rank);
void epi_group_log_late(const ep_group *g, k_i32 kind, k_u64 word, k_i64 waited_ns);
/* A kernel's wait has become long; `word` is {epoch | phase : 16 | peer : 16}. */
void epi_group_late(const struct k_group *g, k_i32 kind, k_u64 word, k_i64 waited_ns);

/* Blocks until the operation before number n has ended, or until n has nothing to wait for. */
void epi_group_await_turn(ep_group *g, uint64_t n);
/* Operation n has ended. `ran`: its kernel did, so its epoch is counted already. */
void epi_group_end(ep_group *g, uint64_t n, bool ran);

/* ---- handle.c, dispatch.c, combine.c -------------------------------------------------------- */

ep_status epi_handle_create(ep_handle **out, ep_group *g,
                            const struct ep_handle_config *config);
void epi_handle_destroy(ep_handle **handle);
ep_status epi_handle_route(ep_handle *h, const struct ep_routing *r, void *stream);
ep_status epi_handle_layout(ep_handle *h, const struct ep_layout *l, void *stream);
ep_status epi_handle_status(ep_handle *h);
ep_status epi_handle_counts(ep_handle *h, int64_t *rows, int32_t *per_source,
                            int32_t *per_expert);
ep_status epi_handle_arena(ep_handle *h, uint32_t flags, ep_dtype dtype, int64_t cols,
                           struct ep_tensor *view);
/* EP_ERR_CAPACITY for rows that do not fit max_recv_rows somewhere. */
ep_status epi_unfit(const struct k_counts *c, int64_t max_recv_rows);

ep_status epi_dispatch(ep_handle *h, const struct ep_dispatch_args *a, void *stream,
                       enum epi_dispatch_part part);
/* Ends a dispatch that has begun and will not be finished: its rows arrive and are not read. */
void epi_dispatch_drop(ep_handle *h);
ep_status epi_combine(ep_handle *h, const struct ep_combine_args *a, void *stream);

/* ---- cuda.c: CUDA groups -------------------------------------------------------------------- */

/* Of both kinds of groups. `wanted` is what the call asks for, 0: the group's. */
struct epi_shape epi_group_shape(const ep_group *g, int wanted, const struct epi_load *load);

/* In the order of create: the device and its kernels; the table for src/mem; then SMs; what kernels
 * read; the thread that reports. */
ep_status epi_cuda_open(ep_group *g);
void epi_cuda_memory(ep_group *g, struct epi_mem_config *m, struct epi_mem_device *ops);
ep_status epi_cuda_limit_workers(ep_group *g, const struct epi_exchange *x);
ep_status epi_cuda_fill(ep_group *g);
ep_status epi_cuda_watch(ep_group *g);
/* And of destroy: operations have ended, or not in time; before the memory goes; after it. */
bool epi_cuda_settle(ep_group *g);
void epi_cuda_stop(ep_group *g);
void epi_cuda_close(ep_group *g);

/* SMs by the formula of docs/performance.md: those that saturate the link, and all. Pure. */
struct epi_sms {
    int send, all;
};
struct epi_sms epi_cuda_sms(int major, bool nvlink, int num_ranks, const struct epi_load *load);
struct epi_shape epi_cuda_shape(const ep_group *g, int wanted, const struct epi_load *load);
struct epi_gpu *epi_cuda_gpu(const ep_group *g);
/* Under the group's mutex: launches a kernel behind the last one. */
ep_status epi_cuda_run(ep_group *g, enum epi_kernel kernel, const void *args, int blocks,
                       void *stream, bool *capturing);
ep_status epi_cuda_handle(ep_handle *h);
void epi_cuda_drop_handle(ep_handle *h);
/* Copies device memory of the group's own; waits for the copy only. */
ep_status epi_cuda_read(ep_group *g, void *out, const void *at, size_t bytes);
ep_status epi_cuda_read_ctl(ep_group *g, struct k_ctl *out);
/* EP_ERR_ARG for memory of the other kind of group; of both kinds. */
ep_status epi_cuda_check_place(const ep_group *g, const char *name, const struct ep_tensor *t);

/* ---- tensor.c ------------------------------------------------------------------------------- */

struct k_array epi_array(const struct ep_tensor *t);
/* "name: ..." errors for a tensor that is not [d0][d1] (-1: any) of a type in the mask. */
#define EPI_TYPE(d) (1u << (d))
#define EPI_ANY_STRIDE 1u
#define EPI_ROWS 2u /* last stride 1, rows 16-byte aligned */
#define EPI_DENSE 4u
ep_status epi_check_tensor(const char *name, const struct ep_tensor *t, int ndim, int64_t d0,
                           int64_t d1, uint32_t types, uint32_t layout);
bool epi_overlap(const struct ep_tensor *a, const struct ep_tensor *b);

#endif
