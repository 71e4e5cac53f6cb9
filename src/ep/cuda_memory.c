/* SPDX-License-Identifier: MIT */
/*
 * The memory of a CUDA device in the words of src/mem: arenas as pieces that peers map, boards as
 * host memory that the device knows. The context of each call is the rank's struct epi_gpu.
 */
#include "src/ep/cuda_memory.h"

#include "src/cu/cu.h"
#include "src/run/run.h"

static const struct epi_cu_device *device_of(void *ctx) {
    return epi_gpu_device(ctx);
}

static struct epi_mem_piece piece_of(const struct epi_cu_memory *m) {
    const struct epi_mem_piece p = {m->address, {m->bytes, m->handle, 0}};
    return p;
}

static struct epi_cu_memory memory_of(const struct epi_mem_piece *p) {
    const struct epi_cu_memory m = {p->address, p->own[0], p->own[1]};
    return m;
}

static ep_status reserve_memory(void *ctx, size_t bytes, struct epi_mem_piece *out,
                                size_t *page) {
    struct epi_cu_memory m;
    EPI_TRY(epi_cu_memory_reserve(device_of(ctx), bytes, &m, page));
    *out = piece_of(&m);
    return EP_OK;
}

static ep_status create_memory(void *ctx, uint64_t at, size_t bytes, struct epi_mem_piece *out,
                               int *fd) {
    struct epi_cu_memory m;
    ep_status st = epi_cu_memory_create(device_of(ctx), at, bytes, &m);
    if (st == EP_OK && fd) {
        st = epi_cu_memory_export(&m, fd);
        if (st != EP_OK) {
            epi_cu_memory_release(device_of(ctx), &m);
        }
    }
    if (st == EP_OK) {
        *out = piece_of(&m);
    }
    return st;
}

static ep_status import_memory(void *ctx, int fd, uint64_t at, size_t bytes,
                               struct epi_mem_piece *out) {
    struct epi_cu_memory m;
    ep_status st = epi_cu_memory_import(device_of(ctx), fd, at, bytes, &m);
    if (st == EP_OK) {
        *out = piece_of(&m);
    }
    return st;
}

static ep_status admit_peer(void *ctx, const struct epi_mem_piece *own, void *peer_ctx) {
    const struct epi_cu_memory m = memory_of(own);
    (void)ctx;
    return epi_cu_memory_admit(&m, device_of(peer_ctx));
}

static void release_memory(void *ctx, const struct epi_mem_piece *piece) {
    const struct epi_cu_memory m = memory_of(piece);
    epi_cu_memory_release(device_of(ctx), &m);
}

static ep_status attach_host(void *ctx, void *host, size_t bytes, uint64_t *address) {
    return epi_gpu_attach(ctx, host, bytes, address);
}

static void detach_host(void *ctx, void *host, size_t bytes) {
    (void)ctx, (void)bytes; /* which are noted */
    epi_gpu_detach(host);
}

struct epi_mem_device epi_cuda_memory(struct epi_gpu *gpu) {
    return (struct epi_mem_device){.size = sizeof(struct epi_mem_device),
                                   .ctx = gpu,
                                   .reserve = reserve_memory,
                                   .create = create_memory,
                                   .admit = admit_peer,
                                   .import = import_memory,
                                   .release = release_memory,
                                   .attach = attach_host,
                                   .detach = detach_host};
}
