/* SPDX-License-Identifier: MIT */
/*
 * What differs between groups of host ranks and of CUDA ranks: one table each. Everything else of
 * src/ep is the same for both and asks the table, never which of them it is.
 *
 * A table begins with its size; functions behind it are not there.
 */
#ifndef EPI_BACKEND_H
#define EPI_BACKEND_H

#include "src/ep/sms.h"
#include "src/mem/mem.h"
#include "src/run/run.h"

struct epi_op;
struct epi_handle_memory;

/* How an operation is launched. Workers: threads of a host rank, blocks of a CUDA rank. */
struct epi_shape {
    int workers, send_blocks, stages, stage_bytes;
};

struct epi_backend {
    size_t size;
    /* Operations run on a device: the host does not see them run and learns from a handle's notice
     * what they found, and graphs may replay some that nobody has issued. Else a call without a
     * stream returns when its operation has ended. */
    bool on_device;

    /* Create, in this order: what needs this rank alone; how src/mem gets memory (*device is
     * filled in, or m->device stays NULL); with memory, what kernels read. */
    ep_status (*open)(ep_group *g);
    void (*choose_memory)(ep_group *g, struct epi_mem_config *m, struct epi_mem_device *device);
    ep_status (*prepare)(ep_group *g, const struct epi_exchange *x);
    /* Destroy: false if operations have not ended in time; then, before the memory goes; after. */
    bool (*settle)(ep_group *g);
    void (*stop)(ep_group *g);
    void (*close)(ep_group *g);

    /* Rank r's board as this process sees it, and as kernels do. */
    struct k_board *(*board)(const ep_group *g, int rank);
    uint64_t (*board_address)(const ep_group *g, int rank);
    ep_status (*read_ctl)(ep_group *g, struct k_ctl *out);
    /* Memory of kernels; waits for the copy only. */
    ep_status (*read)(ep_group *g, void *out, const void *at, size_t bytes);
    /* Copies tables to where kernels read them, and gives that memory back; NULL: they read the
     * host's. Waits for the copy only. */
    ep_status (*place)(ep_group *g, const void *from, size_t bytes, uint64_t *at);
    void (*displace)(ep_group *g, uint64_t *at);
    /* Kernels' memory of a handle, and k, perhaps not for the first time. */
    ep_status (*make_handle)(ep_handle *h);
    void (*drop_memory)(ep_group *g, const struct epi_handle_memory *m);
    /* What else a handle has of a device; NULL: nothing. Settle: what was launched for it apart from all
     * others counts as launched, as if it had not been apart. */
    void (*settle_handle)(ep_handle *h);
    void (*drop_handle)(ep_handle *h);
    /* What enqueued work has found out about a handle since it was last asked; EP_AGAIN: the
     * routing is not known yet. */
    ep_status (*take_findings)(ep_handle *h);
    /* EP_ERR_ARG for memory of the other kind of group. */
    ep_status (*check_place)(const ep_group *g, const char *name, const struct ep_tensor *t);
    /* The caller's stream for work beside its own; NULL: there is none. */
    void *(*stream)(const ep_group *g);

    /* `asked` workers, 0: as many as the load wants. */
    struct epi_shape (*shape)(const ep_group *g, int asked, const struct epi_load *load);
    ep_status (*is_capturing)(ep_group *g, void *stream, bool *capturing);
    /* Under the group's mutex: the stream is known to take work, and a device's waits for the
     * operation before this one; then, of a device, the operation goes to it. */
    ep_status (*order)(struct epi_op *op, void *stream);
    ep_status (*launch)(struct epi_op *op, void *stream);
    /* Of the host, after the mutex: runs the operation or queues it. */
    ep_status (*submit)(struct epi_op *op, void *stream);
};

extern const struct epi_backend epi_backend_host, epi_backend_cuda;

/* `wanted` workers of a call; 0: the group's. */
struct epi_shape epi_group_shape(const ep_group *g, int wanted, const struct epi_load *load);

#endif
