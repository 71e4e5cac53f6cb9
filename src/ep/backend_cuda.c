/* SPDX-License-Identifier: MIT */
/*
 * Groups of CUDA ranks: the device of a rank, its memory in the words of src/mem, what kernels need
 * on the device, launches, and the thread that reports what kernels leave on the board.
 */
#include "src/ep/backend.h"

#include <stdlib.h>
#include <string.h>

#include "src/cu/cu.h"
#include "src/ep/cuda_memory.h"
#include "src/ep/cuda_sms.h"
#include "src/ep/group.h"
#include "src/ep/notices.h"

#define BOARD_BYTES 4096 /* of each rank */
#define WATCH_NS (100 * EPI_NS_PER_MS)

_Static_assert(sizeof(struct k_board) <= BOARD_BYTES, "a board has so much memory");

struct epi_cuda {
    struct epi_gpu *gpu;
    struct epi_cuda_sms sms;
    uint64_t tables, ctl;
    struct epi_notices notices; /* guarded by the group's mutex, as is `stop` */
    bool watching, stop;
    pthread_t watcher;
    pthread_cond_t stopping;
};

/* ---- choosing a device --------------------------------------------------------------------- */

static ep_status choose_device(ep_group *g) {
    int *index = &g->config.device_index;
    EPI_TRY(epi_cu_open());
    const char *local = epi_env("LOCAL_RANK");
    if (*index < 0) {
        *index = epi_cu_current_device();
    }
    if (*index < 0) {
        *index = (local && !g->config.world ? atoi(local) : g->rank) % epi_cu_num_devices();
    }
    return *index < epi_cu_num_devices()
               ? EP_OK
               : epi_fail(EP_ERR_ARG, "ep_group_config.device_index is %d, must be -1..%d",
                          *index, epi_cu_num_devices() - 1);
}

static bool wants_generic_mover(void) {
    const char *disable = epi_env("DISABLE_SM90_FEATURES");
    return disable && strcmp(disable, "0") != 0;
}

static ep_status open_device(ep_group *g) {
    struct epi_cuda *c = epi_alloc(sizeof(*c));
    if (!c) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a CUDA group");
    }
    g->cuda = c;
    epi_cond_init(&c->stopping);
    ep_status st = choose_device(g);
    if (st == EP_OK) {
        st = epi_gpu_create(&c->gpu, g->config.device_index, K_SCRATCH_BYTES(g->plan.max_dests),
                            wants_generic_mover());
    }
    if (st == EP_OK) {
        st = epi_gpu_load(c->gpu, EPI_KERNEL_SET_THROUGHPUT);
    }
    if (st == EP_OK && g->config.ll_max_tokens) {
        st = epi_gpu_load(c->gpu, EPI_KERNEL_SET_LOW_LATENCY);
    }
    if (st == EP_OK) {
        const struct epi_cu_device *d = epi_gpu_device(c->gpu);
        epi_log(EPI_LOG_INFO, "device %d: %s, sm_%d%d, %d SMs", d->index, d->name, d->major,
                d->minor, d->num_sms);
    }
    return st;
}

/* ---- memory --------------------------------------------------------------------------------- */

static void cuda_choose_memory(ep_group *g, struct epi_mem_config *m,
                               struct epi_mem_device *ops) {
    *ops = epi_cuda_memory(g->cuda->gpu);
    m->device = ops;
    m->board_bytes = BOARD_BYTES;
    m->arena_kind = (int)epi_opt_int(EPI_OPT_ARENA);
}

/* ---- what kernels read ---------------------------------------------------------------------- */

static ep_status cuda_place(ep_group *g, const void *from, size_t bytes, uint64_t *at) {
    struct epi_gpu *gpu = g->cuda->gpu;
    EPI_TRY(epi_gpu_reserve(gpu, at, bytes));
    const ep_status st = epi_gpu_in(gpu, *at, from, bytes);
    if (st != EP_OK) {
        epi_gpu_free(gpu, at);
    }
    return st;
}

static void cuda_displace(ep_group *g, uint64_t *at) {
    epi_gpu_free(g->cuda->gpu, at);
}

/* The group's tables, made in host memory, and its control block go to the device. */
static ep_status fill_tables(ep_group *g) {
    struct epi_cuda *c = g->cuda;
    EPI_TRY(cuda_place(g, g->tables, epi_plan_table_bytes(g->num_ranks), &c->tables));
    EPI_TRY(cuda_place(g, g->ctl, sizeof(*g->ctl), &c->ctl));
    EPI_TRY(epi_experts_place(g, g->experts));
    epi_experts_use(g->experts, &g->k);
    epi_group_tables(g, c->tables);
    g->k.ctl = (struct k_ctl *)(uintptr_t)c->ctl;
    return EP_OK;
}

static ep_status cuda_read_ctl(ep_group *g, struct k_ctl *out) {
    return epi_gpu_out(g->cuda->gpu, out, g->cuda->ctl, sizeof(*out));
}

static ep_status cuda_read_memory(ep_group *g, void *out, const void *at, size_t bytes) {
    return epi_gpu_out(g->cuda->gpu, out, (uint64_t)(uintptr_t)at, bytes);
}

/* Under the mutex. */
static ep_status take_memory(ep_handle *h, struct epi_handle_memory *m) {
    struct epi_cuda *c = h->group->cuda;
    uint64_t at = 0;
    EPI_TRY(epi_notice_take(&c->notices, c->gpu, &m->notice));
    ep_status st = h->apart.event ? EP_OK : epi_gpu_apart_create(c->gpu, &h->apart);
    st = st == EP_OK ? epi_gpu_reserve(c->gpu, &at, h->bytes) : st;
    if (st != EP_OK) {
        epi_notice_give(&c->notices, m->notice);
    }
    m->block = (void *)(uintptr_t)at;
    return st;
}

/* Nothing here waits for the device: the memory is zeroed by the first operation, on its stream. */
static ep_status cuda_make_handle(ep_handle *h) {
    ep_group *g = h->group;
    struct epi_handle_memory m = {0};
    pthread_mutex_lock(&g->mutex);
    const ep_status st = take_memory(h, &m);
    if (st != EP_OK && !h->memory.block) {
        epi_gpu_apart_destroy(g->cuda->gpu, &h->apart);
    }
    pthread_mutex_unlock(&g->mutex);
    EPI_TRY(st);
    h->memory = m;
    h->zeroed = false;
    epi_plan_handle(&g->config, &g->plan, &h->config, (uintptr_t)m.block, &h->k);
    h->k.notice = m.notice;
    return EP_OK;
}

/* All of a handle's memory: what a dispatch that ends early has not filled reads as nothing. */
static ep_status zero_first(struct epi_op *op, void *stream) {
    ep_handle *h = op->h;
    if (h && !h->zeroed) {
        EPI_TRY(epi_gpu_zero(op->g->cuda->gpu, stream, (uint64_t)(uintptr_t)h->memory.block,
                             h->bytes));
        h->zeroed = true;
    }
    return EP_OK;
}

static void cuda_drop_memory(ep_group *g, const struct epi_handle_memory *m) {
    uint64_t at = (uint64_t)(uintptr_t)m->block;
    pthread_mutex_lock(&g->mutex);
    epi_gpu_free(g->cuda->gpu, &at);
    epi_notice_give(&g->cuda->notices, m->notice);
    pthread_mutex_unlock(&g->mutex);
}

static void cuda_settle_handle(ep_handle *h) {
    ep_group *g = h->group;
    pthread_mutex_lock(&g->mutex);
    epi_gpu_apart_join(g->cuda->gpu, &h->apart);
    pthread_mutex_unlock(&g->mutex);
}

/* Before its memory: what was launched apart is waited for with that. */
static void cuda_drop_handle(ep_handle *h) {
    ep_group *g = h->group;
    pthread_mutex_lock(&g->mutex);
    epi_gpu_apart_destroy(g->cuda->gpu, &h->apart);
    pthread_mutex_unlock(&g->mutex);
}

/* ---- operations ----------------------------------------------------------------------------- */

/* With few SMs, half of them send. */
static struct epi_shape cuda_shape(const ep_group *g, int asked, const struct epi_load *load) {
    const struct epi_gpu_shape s = epi_gpu_shape(g->cuda->gpu);
    const int channels = (g->plan.info.num_channels + s.warps - 1) / s.warps;
    const int row = (load->row_bytes + 127) / 128 * 128;
    const struct epi_sms sms = epi_sms_for(epi_gpu_device(g->cuda->gpu)->major,
                                           g->cuda->sms.nvlink, g->num_ranks, load);
    const int all = asked ? asked : load->row_bytes ? sms.all : channels;
    const int most = load->row_bytes ? g->most_workers : g->cuda->sms.local;
    struct epi_shape out = {all < most ? all : most, 0, s.stages, s.stage_bytes};
    const int half = (out.workers + 1) / 2;
    out.send_blocks = half < sms.send ? half : sms.send;
    if (load->answers && (load->expanded || row > s.stage_bytes)) {
        out.stages = 2; /* larger ones: each is for a part of every term of a sum */
        out.stage_bytes = s.stages * s.stage_bytes / 2;
    } else if (row > 0 && row < out.stage_bytes) { /* short rows: more of them under way */
        const int fit = s.stages * s.stage_bytes / row;
        out.stage_bytes = row;
        out.stages = fit < s.most_stages ? fit : s.most_stages;
    }
    return out;
}

static ep_status cuda_is_capturing(ep_group *g, void *stream, bool *capturing) {
    return epi_gpu_is_capturing(g->cuda->gpu, stream, capturing);
}

/* A begun dispatch sends on the group's own stream, so that finish can receive on the caller's at
 * the same time: neither before the operation that came before both. In a graph both are on the
 * caller's, one behind the other: the group's own is not to become a part of a capture. */
static bool is_beside(const struct epi_op *op, uint32_t part) {
    return (op->flags & part) && !(op->flags & EPI_OP_CAPTURED);
}

static void *stream_of(const struct epi_op *op, void *stream) {
    return is_beside(op, EPI_OP_BEGIN) ? epi_gpu_stream(op->g->cuda->gpu) : stream;
}

static ep_status order(struct epi_op *op, void *stream) {
    struct epi_gpu *gpu = op->g->cuda->gpu;
    struct epi_gpu_apart *apart = op->h ? &op->h->apart : NULL;
    bool capturing = false;
    if (is_beside(op, EPI_OP_FINISH)) {
        return epi_gpu_beside(gpu, stream);
    }
    if (is_beside(op, EPI_OP_BEGIN)) {
        return epi_gpu_fork(gpu, stream, apart);
    }
    /* What no peer takes part in writes nothing but the handle. */
    EPI_TRY(epi_gpu_begin(gpu, stream, apart, !op->kind->faults, &capturing));
    op->flags |= capturing ? EPI_OP_CAPTURED : 0;
    return zero_first(op, stream);
}

static ep_status launch(struct epi_op *op, void *stream) {
    struct epi_gpu *gpu = op->g->cuda->gpu;
    const struct epi_shape *s = &op->shape;
    const bool finish = is_beside(op, EPI_OP_FINISH);
    const int rest = s->workers > s->send_blocks ? s->workers - s->send_blocks : 1;
    const int blocks = is_beside(op, EPI_OP_BEGIN) ? s->send_blocks
                       : finish                    ? rest
                                                   : s->workers;
    stream = stream_of(op, stream);
    return epi_gpu_launch(gpu, op->kind->kernel, &op->args, blocks, stream, finish);
}

static void *own_stream(const ep_group *g) {
    return epi_gpu_stream(g->cuda->gpu);
}

/* What kernels have found, told once. */
static ep_status cuda_take_findings(ep_handle *h) {
    struct k_counts *n = h->memory.notice;
    const uint64_t routed = atomic_load((const _Atomic k_u64 *)&n->routed);
    if (!h->captured && routed != K_WORD(h->k.tag, h->routed_by)) {
        return EP_AGAIN;
    }
    /* Kernels of a handle that is gone may still write to the notice it had. */
    const uint64_t bad = n->bad >> 32 == h->k.tag ? n->bad & UINT32_MAX : 0;
    const uint64_t over = n->over >> 32 == h->k.tag ? n->over & UINT32_MAX : 0;
    n->bad = n->over = 0;
    if (bad) {
        return epi_bad_selection(h, h->topk, bad - 1, n->bad_id, ": it was treated as -1");
    }
    if (over) {
        atomic_store(&h->output_rows, (int64_t)over);
        return epi_fail(EP_ERR_CAPACITY,
                        "%lld rows are needed and the outputs hold fewer: rows past them were "
                        "not written",
                        (long long)over);
    }
    return EP_OK;
}

static ep_status cuda_check_place(const ep_group *g, const char *name,
                                  const struct ep_tensor *t) {
    int device = -1;
    const enum epi_cu_pointer kind = epi_cu_pointer(t->data, &device);
    const int own = epi_gpu_device(g->cuda->gpu)->index;
    if (kind == EPI_CU_POINTER_HOST || kind == EPI_CU_POINTER_UNKNOWN) {
        return epi_fail(EP_ERR_ARG,
                        "%s.data is ordinary host memory: a CUDA group takes memory of its "
                        "device (%d), managed or pinned memory",
                        name, own);
    }
    if (kind == EPI_CU_POINTER_DEVICE && device != own) {
        return epi_fail(EP_ERR_ARG, "%s.data is memory of device %d, the group's device is %d",
                        name, device, own);
    }
    return EP_OK;
}

/* ---- the watcher ---------------------------------------------------------------------------- */

/* What kernels wait by: that this host runs, and since when nobody is left who could call it. */
static void beat(ep_group *g, struct k_board *b) {
    _Atomic k_u64 *since = (_Atomic k_u64 *)&b->orphan_since;
    const k_u64 ran = (k_u64)epi_ran_ns();
    const bool gone = atomic_load(&g->is_orphan) && !epi_gpu_busy(g->cuda->gpu);
    if (!gone || atomic_load(since) == 0) {
        atomic_store(since, gone ? ran : 0);
    }
    atomic_store((_Atomic k_u64 *)&b->ran_ns, ran);
}

/* Kernels cannot log: what they leave on the board is logged from here. */
static void *watch(void *arg) {
    ep_group *g = arg;
    struct epi_cuda *c = g->cuda;
    struct k_board *b = epi_mem_board(g->mem, g->rank);
    bool faulted = false;
    k_u64 late = 0;
    epi_log_set_rank(g->rank);
    pthread_mutex_lock(&g->mutex);
    while (!c->stop) {
        epi_cond_wait(&c->stopping, &g->mutex, epi_deadline_after(WATCH_NS));
        pthread_mutex_unlock(&g->mutex);
        beat(g, b);
        const k_u64 word = atomic_load((_Atomic k_u64 *)&b->waiting);
        if (word >> 32 != late >> 32) {
            late = word;
            epi_group_log_late(g, (k_i32)atomic_load((_Atomic k_u64 *)&b->waiting_kind), word,
                               (k_i64)atomic_load((_Atomic k_u64 *)&b->waited_ns));
        }
        if (!faulted && epi_group_faulted(g)) {
            struct ep_fault f;
            faulted = true;
            epi_group_describe(g, &f);
            epi_log(EPI_LOG_INFO, "group faulted: %s", f.message);
        }
        pthread_mutex_lock(&g->mutex);
    }
    pthread_mutex_unlock(&g->mutex);
    return NULL;
}

static ep_status start_watching(ep_group *g) {
    beat(g, epi_mem_board(g->mem, g->rank));
    const int err = epi_thread_start(&g->cuda->watcher, watch, g, "ep-watch");
    g->cuda->watching = err == 0;
    return err ? epi_fail(EP_ERR_NOMEM, "cannot start a thread: %s", strerror(err)) : EP_OK;
}

/* Once there is memory. */
static ep_status cuda_prepare(ep_group *g, const struct epi_exchange *x) {
    struct epi_cuda *c = g->cuda;
    ep_status st = epi_cuda_sms_promise(&c->sms, g, epi_gpu_device(c->gpu), x);
    if (st == EP_OK) {
        g->workers = g->config.num_workers;
        g->most_workers = c->sms.promised;
        st = fill_tables(g);
    }
    if (st == EP_OK) {
        st = start_watching(g);
    }
    return epi_agree(x, st, "preparing the device");
}

/* ---- the end -------------------------------------------------------------------------------- */

/* Kernels have deadlines, but what the caller queued before them may have none. */
static bool cuda_settle(ep_group *g) {
    const struct epi_deadline d = epi_deadline_after(g->timeout_ns);
    ep_status st;
    while ((st = epi_gpu_idle(g->cuda->gpu)) == EP_AGAIN && !epi_deadline_expired(d)) {
        epi_sleep_ns(20 * EPI_NS_PER_US);
    }
    return st != EP_AGAIN;
}

/* Of a group that may never have opened its device. */
static void cuda_stop(ep_group *g) {
    struct epi_cuda *c = g->cuda;
    if (!c) {
        return;
    }
    if (c->watching) {
        pthread_mutex_lock(&g->mutex);
        c->stop = true;
        pthread_cond_signal(&c->stopping);
        pthread_mutex_unlock(&g->mutex);
        pthread_join(c->watcher, NULL);
    }
    if (c->gpu) {
        epi_gpu_free(c->gpu, &c->tables);
        epi_gpu_free(c->gpu, &c->ctl);
        epi_notices_free(&c->notices, c->gpu);
    }
}

static void close_device(ep_group *g) {
    struct epi_cuda *c = g->cuda;
    if (!c) {
        return;
    }
    epi_cuda_sms_give_back(&c->sms);
    epi_gpu_destroy(&c->gpu);
    pthread_cond_destroy(&c->stopping);
    epi_free(c);
    g->cuda = NULL;
}

static struct k_board *cuda_board(const ep_group *g, int rank) {
    return epi_mem_board(g->mem, rank);
}

static uint64_t cuda_board_address(const ep_group *g, int rank) {
    return epi_mem_board_address(g->mem, rank);
}

const struct epi_backend epi_backend_cuda = {
    .size = sizeof(struct epi_backend),
    .on_device = true,
    .open = open_device,
    .choose_memory = cuda_choose_memory,
    .prepare = cuda_prepare,
    .settle = cuda_settle,
    .stop = cuda_stop,
    .close = close_device,
    .board = cuda_board,
    .board_address = cuda_board_address,
    .read_ctl = cuda_read_ctl,
    .read = cuda_read_memory,
    .place = cuda_place,
    .displace = cuda_displace,
    .make_handle = cuda_make_handle,
    .drop_memory = cuda_drop_memory,
    .settle_handle = cuda_settle_handle,
    .drop_handle = cuda_drop_handle,
    .take_findings = cuda_take_findings,
    .check_place = cuda_check_place,
    .stream = own_stream,
    .shape = cuda_shape,
    .is_capturing = cuda_is_capturing,
    .order = order,
    .launch = launch,
};
