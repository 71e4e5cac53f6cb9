/* SPDX-License-Identifier: MIT */
/*
 * Groups of host ranks: kernels are threads of the rank's pool, arenas and boards lie in the shared
 * memory of the host, and a handle's memory is the process's own.
 */
#include "src/ep/backend.h"

#include <sched.h>
#include <string.h>

#include "src/cu/cu.h"
#include "src/ep/group.h"

#define MOST_WORKERS 8 /* unless the caller or EP_WORKERS says more */

static int choose_workers(const ep_group *g) {
    if (g->config.num_workers) {
        return g->config.num_workers;
    }
    int64_t knob = epi_opt_int(EPI_OPT_WORKERS);
    if (knob) {
        return (int)knob;
    }
    cpu_set_t cpus;
    int cores = sched_getaffinity(0, sizeof(cpus), &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
    int share = cores / g->num_ranks;
    return share < 1 ? 1 : share > MOST_WORKERS ? MOST_WORKERS : share;
}

static const struct k_hooks hooks = {.size = sizeof(hooks), .late = epi_group_late};

static ep_status open_pool(ep_group *g) {
    g->workers = g->most_workers = choose_workers(g);
    return epi_run_create(&g->run, g->workers, epi_plan_warp_bytes(&g->config, &g->plan),
                          &hooks);
}

static void host_choose_memory(ep_group *g, struct epi_mem_config *m,
                               struct epi_mem_device *device) {
    (void)g;
    (void)m;
    (void)device;
}

static ep_status host_prepare(ep_group *g, const struct epi_exchange *x) {
    (void)g;
    (void)x;
    return EP_OK;
}

/* Operations have deadlines, but what the caller queued before them may have none. */
static bool host_settle(ep_group *g) {
    const struct epi_deadline d = epi_deadline_after(g->timeout_ns);
    while (atomic_load(&g->num_held) > 0 && !epi_deadline_expired(d)) {
        epi_sleep_ns(50 * EPI_NS_PER_US);
    }
    return atomic_load(&g->num_held) == 0;
}

static void host_stop(ep_group *g) {
    epi_run_destroy(&g->run);
}

static void close_nothing(ep_group *g) {
    (void)g;
}

static struct k_board *host_board(const ep_group *g, int rank) {
    return (void *)((char *)epi_mem_arena(g->mem, rank) + g->plan.map.board);
}

static uint64_t host_board_address(const ep_group *g, int rank) {
    return (uint64_t)(uintptr_t)host_board(g, rank);
}

/* Kernels may be running: each word by itself. What is no words they do not write meanwhile. */
static ep_status host_read_memory(ep_group *g, void *out, const void *at, size_t bytes) {
    const size_t words = bytes / sizeof(k_u64);
    const _Atomic k_u64 *from = at;
    (void)g;
    for (size_t i = 0; i < words; i++) {
        const k_u64 w = atomic_load_explicit(&from[i], memory_order_relaxed);
        memcpy((k_u64 *)out + i, &w, sizeof(w));
    }
    memcpy((k_u64 *)out + words, from + words, bytes % sizeof(k_u64));
    return EP_OK;
}

static ep_status host_read_ctl(ep_group *g, struct k_ctl *out) {
    return host_read_memory(g, out, g->ctl, sizeof(*out));
}

static ep_status host_make_handle(ep_handle *h) {
    const ep_group *g = h->group;
    void *block = epi_alloc(h->bytes);
    if (!block) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a handle (%zu bytes)%s", h->bytes,
                        epi_alloc_why());
    }
    epi_plan_handle(&g->config, &g->plan, &h->config, (uintptr_t)block, &h->k);
    h->memory.block = h->memory.own_block = block;
    h->memory.notice = h->k.notice;
    return EP_OK;
}

static void host_drop_memory(ep_group *g, const struct epi_handle_memory *m) {
    (void)g;
    epi_free(m->block);
}

/* Operations have told their callers. */
static ep_status host_take_findings(ep_handle *h) {
    (void)h;
    return EP_OK;
}

static ep_status host_check_place(const ep_group *g, const char *name,
                                  const struct ep_tensor *t) {
    int device = -1;
    (void)g;
    return epi_cu_pointer(t->data, &device) != EPI_CU_POINTER_DEVICE
               ? EP_OK
               : epi_fail(EP_ERR_ARG,
                          "%s.data is memory of CUDA device %d: a host group takes ordinary "
                          "memory",
                          name, device);
}

static void *no_stream(const ep_group *g) {
    (void)g;
    return NULL;
}

static struct epi_shape host_shape(const ep_group *g, int asked, const struct epi_load *load) {
    const int workers = asked < g->most_workers ? asked : g->most_workers;
    const struct epi_grid grid = epi_run_grid(workers);
    const struct epi_shape s = {workers, grid.send_blocks, EPI_HOST_STAGES,
                                epi_plan_stage_bytes(load->row_bytes)};
    return s;
}

static ep_status host_is_capturing(ep_group *g, void *stream, bool *capturing) {
    (void)g;
    (void)stream;
    *capturing = false;
    return EP_OK;
}

/* Before the operation has a number: what is numbered is sure to be queued. */
static ep_status reserve(struct epi_op *op, void *stream) {
    (void)op;
    return epi_stream_reserve(stream);
}

static ep_status submit(struct epi_op *op, void *stream) {
    if (op->experts) {
        epi_experts_hold(op->experts);
    }
    if (op->h) {
        epi_handle_hold(op->h);
        atomic_fetch_add(&op->h->pending, 1);
    }
    return epi_stream_submit(stream, epi_op_run, op, sizeof(*op));
}

const struct epi_backend epi_backend_host = {
    .size = sizeof(struct epi_backend),
    .on_device = false,
    .open = open_pool,
    .choose_memory = host_choose_memory,
    .prepare = host_prepare,
    .settle = host_settle,
    .stop = host_stop,
    .close = close_nothing,
    .board = host_board,
    .board_address = host_board_address,
    .read_ctl = host_read_ctl,
    .read = host_read_memory,
    .make_handle = host_make_handle,
    .drop_memory = host_drop_memory,
    .take_findings = host_take_findings,
    .check_place = host_check_place,
    .stream = no_stream,
    .shape = host_shape,
    .is_capturing = host_is_capturing,
    .order = reserve,
    .submit = submit,
};
