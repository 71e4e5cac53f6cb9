/* SPDX-License-Identifier: MIT */
/*
 * One rank of `ep bench`, and the two clocks by which it takes time: of the host around the
 * call, of the GPU between two events.
 *
 * Host: the ranks meet at a barrier, then only the library's call lies between two readings of
 * the one clock of the machine. What routes anew does so before that.
 * GPU: in every iteration the rank holds its stream back, queues begin event, operation and
 * end event, and meets the others at a barrier in shared memory. Rank 0 names an instant, all
 * wait for it on the machine's clock and release their streams. The time is begin to end, and
 * routing anew is part of the operation, because a graph holds both.
 *
 * Owns the rank's group, GPU and buffers. Runs in the ranks, one thread each.
 */
#include <sched.h>

#include "tools/bench.h"

#define LEAD_NS (100 * EPI_NS_PER_US) /* from naming the instant to it: all must have seen it */

const char *const bench_mode_names[BENCH_NUM_MODES] = {"eager", "graph"};

void *bench_stream(const struct bench *b) {
    return b->gpu ? gpu_stream(b->gpu) : NULL;
}

/* ---- of the host -------------------------------------------------------------------------- */

static ep_status host_open(struct bench *b) {
    b->at = b->d.at;
    return EP_OK;
}

static ep_status host_nothing(struct bench *b) {
    (void)b;
    return EP_OK;
}

static ep_status host_begin(struct bench *b, int mode) {
    (void)b, (void)mode;
    return EP_OK;
}

static ep_status host_time(struct bench *b, struct bench_sample *sample) {
    const struct bench_op *op = b->item->op;
    ep_status st = op->before ? bench_links(b, op->before) : bench_route_anew(b);
    rank_barrier(b->rank);
    int64_t start_ns = epi_now_ns();
    st = st == EP_OK ? bench_run(b) : st;
    *sample = (struct bench_sample){start_ns, epi_now_ns() - start_ns};
    return st == EP_OK ? bench_links(b, op->after) : st;
}

static ep_status host_fetch(struct bench *b) {
    b->d.rows = b->view.data;
    b->d.rows_stride = b->view.stride[0] * (int64_t)b->d.element;
    return EP_OK;
}

/* ---- of the GPU --------------------------------------------------------------------------- */

static void *get_of_gpu(void *gpu, int64_t num, int64_t bytes) {
    return gpu_alloc(gpu, num, bytes);
}

static ep_status cuda_open(struct bench *b) {
    const struct bench_buffers *host = &b->d.at;
    int64_t selections = b->p->tokens * b->p->topk, rows = bench_most_rows(b->c, b->rank->rank);
    EPI_TRY(gpu_open(&b->gpu, b->c->gpus.device[b->rank->rank]));
    b->at.ids = gpu_alloc(b->gpu, selections, sizeof(*host->ids));
    if (!b->at.ids || !bench_get_buffers(&b->at, b->c, rows, get_of_gpu, b->gpu)) {
        return EP_ERR_NOMEM;
    }
    EPI_TRY(gpu_in(b->gpu, b->at.ids, host->ids, selections * (int64_t)sizeof(*host->ids)));
    return gpu_in(b->gpu, b->at.weights, host->weights,
                  selections * (int64_t)sizeof(*host->weights));
}

static ep_status cuda_fill(struct bench *b) {
    const struct bench_data *d = &b->d;
    int64_t tokens = b->p->tokens;
    EPI_TRY(gpu_in(b->gpu, b->at.x, d->at.x, tokens * d->row_bytes));
    return gpu_in(b->gpu, b->at.scales, d->at.scales,
                  tokens * d->num_scales * (int64_t)sizeof(*d->at.scales));
}

static ep_status run_with_route(struct bench *b) {
    EPI_TRY(bench_route_anew(b));
    return bench_run(b);
}

static ep_status cuda_begin(struct bench *b, int mode) {
    if (mode != BENCH_GRAPH) {
        return EP_OK;
    }
    EPI_TRY(gpu_capture(b->gpu));
    ep_status st = run_with_route(b);
    char why[400];
    snprintf(why, sizeof(why), "%s", ep_last_error());
    ep_status ended = gpu_captured(b->gpu, &b->graph[b->more]);
    if (st != EP_OK) {
        return epi_fail(st, "%s", why);
    }
    if (ended == EP_OK && b->rank->rank == 0 && b->more == bench_is_difference(b->item->op)) {
        b->c->gpus.sms[b->index] = gpu_graph_sms(b->graph[b->more]);
    }
    return ended;
}

/* Returns when the stream was released. */
static int64_t leave_together(struct bench *b) {
    struct bench_gpus *gpus = &b->c->gpus;
    int64_t at;
    rank_barrier(b->rank);
    if (b->rank->rank == 0) {
        atomic_store(&gpus->start_ns, epi_now_ns() + LEAD_NS);
    }
    while ((at = atomic_load(&gpus->start_ns)) == b->started_ns) {
        sched_yield();
    }
    b->started_ns = at;
    while (epi_now_ns() < at) {
    }
    gpu_release(b->gpu);
    return epi_now_ns();
}

static ep_status cuda_time(struct bench *b, struct bench_sample *sample) {
    const struct bench_op *op = b->item->op;
    if (op->before) {
        EPI_TRY(bench_links(b, op->before));
        EPI_TRY(gpu_sync(b->gpu)); /* all ranks have, at the barrier */
    }
    bool held = gpu_hold(b->gpu);
    if (b->rank->rank == 0) {
        b->c->gpus.held = held;
    }
    if (!held) {
        sample->start_ns = leave_together(b);
    }
    ep_status st = gpu_mark(b->gpu, GPU_BEGIN);
    if (st == EP_OK) {
        struct gpu_graph *graph = b->graph[b->more];
        st = graph ? gpu_replay(b->gpu, graph) : run_with_route(b);
    }
    st = st == EP_OK ? gpu_mark(b->gpu, GPU_END) : st;
    if (st != EP_OK) {
        gpu_release(b->gpu); /* and the others wait at the barrier until they are ended */
        return st;
    }
    if (held) {
        sample->start_ns = leave_together(b);
    }
    EPI_TRY(gpu_sync(b->gpu));
    EPI_TRY(gpu_elapsed_ns(b->gpu, &sample->ns));
    return bench_links(b, op->after);
}

static ep_status cuda_settle(struct bench *b) {
    EPI_TRY(gpu_sync(b->gpu));
    if (b->p->ll) {
        return ep_ll_status(b->group);
    }
    for (int i = 0; i < 1000; i++) {
        ep_status st = ep_handle_status(b->handle);
        if (st != EP_AGAIN) {
            return st;
        }
        epi_sleep_ns(EPI_NS_PER_MS);
    }
    return epi_fail(EP_ERR_TIMEOUT, "the handle's counts did not come");
}

static ep_status cuda_fetch(struct bench *b) {
    struct bench_data *d = &b->d;
    if (b->item->op->kind == BENCH_COMBINE) {
        return gpu_out(b->gpu, d->at.out, b->at.out, b->p->tokens * d->row_bytes);
    }
    int64_t n = d->num_rows, per_row = d->expanded ? 1 : b->p->topk;
    const struct {
        void *to;
        const void *from;
        int64_t bytes;
    } copies[] = {
        {d->at.num_recv, b->at.num_recv, sizeof(*d->at.num_recv)},
        {d->at.recv, b->view.data, n * d->row_bytes},
        {d->at.recv_source, b->at.recv_source, n * 2 * (int64_t)sizeof(*d->at.recv_source)},
        {d->at.recv_weights, b->at.recv_weights, n * per_row * (int64_t)sizeof(float)},
        {d->at.recv_ids, b->at.recv_ids,
         d->expanded ? 0 : n * per_row * (int64_t)sizeof(int32_t)},
        {d->at.recv_scales, b->at.recv_scales, n * d->num_scales * (int64_t)sizeof(float)},
    };
    for (size_t i = 0; i < sizeof(copies) / sizeof(copies[0]); i++) {
        EPI_TRY(gpu_out(b->gpu, copies[i].to, copies[i].from, copies[i].bytes));
    }
    d->rows = d->at.recv;
    d->rows_stride = d->row_bytes;
    return EP_OK;
}

const struct bench_clock bench_clocks[] = {
    [BENCH_HOST] = {1, true, host_open, host_nothing, host_begin, host_time, host_nothing,
                    host_fetch},
    [BENCH_CUDA] = {2, false, cuda_open, cuda_fill, cuda_begin, cuda_time, cuda_settle,
                    cuda_fetch},
};

/* ---- a rank ------------------------------------------------------------------------------- */

static int check(struct bench *b) {
    enum bench_kind kind = b->item->op->kind;
    if (b->p->no_check || kind == BENCH_COPY || kind == BENCH_ROUTE) {
        return 0;
    }
    if (bench_is_ll(b->item->op)) {
        return bench_ll_check(b);
    }
    ep_status st = b->c->clock->fetch(b);
    if (st != EP_OK) {
        return rank_fail(b->rank, st, "fetching the output of %s", b->d.what.s);
    }
    return kind == BENCH_COMBINE ? bench_check_combine(&b->d) : bench_check_dispatch(&b->d);
}

/* Of a difference both chains; never nothing, which would be no measurement. */
static ep_status time_once(struct bench *b, struct bench_sample *sample) {
    const struct bench_clock *clock = b->c->clock;
    struct bench_sample less;
    b->more = false;
    if (!bench_is_difference(b->item->op)) {
        return clock->time(b, sample);
    }
    EPI_TRY(clock->time(b, &less));
    b->more = true;
    EPI_TRY(clock->time(b, sample));
    sample->ns = sample->ns > less.ns ? sample->ns - less.ns : b->item->op->chain;
    return EP_OK;
}

static int measure(struct bench *b, int mode) {
    const struct bench_clock *clock = b->c->clock;
    struct bench_sample ignored;
    ep_status st = bench_prepare(b, mode);
    for (int more = bench_is_difference(b->item->op); more >= 0 && st == EP_OK; more--) {
        b->more = more;
        st = clock->begin(b, mode);
    }
    for (int64_t i = -b->p->warmup; i < b->p->iters && st == EP_OK; i++) {
        st = time_once(b, i < 0 ? &ignored
                                : bench_samples(b->c, b->index, mode, i) + b->rank->rank);
    }
    st = st == EP_OK ? clock->settle(b) : st;
    if (st != EP_OK) {
        return rank_fail(b->rank, st, "%s%s", b->d.what.s,
                         mode == BENCH_GRAPH ? " (as a graph)" : "");
    }
    int failed = check(b);
    gpu_graph_destroy(&b->graph[0]);
    gpu_graph_destroy(&b->graph[1]);
    return failed;
}

static ep_status open_all(struct bench *b) {
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    bool unused = b->p->device == BENCH_CUDA && b->p->no_check; /* host memory for the output */
    int64_t rows = unused ? 0 : bench_most_rows(b->c, b->rank->rank);
    bench_config(b->c, &config);
    rank_config(b->rank, &config);
    if (b->p->device == BENCH_CUDA) {
        config.device_index = b->c->gpus.device[b->rank->rank];
    }
    if (!bench_data_create(&b->d, b->rank, b->c, rows)) {
        return epi_fail(EP_ERR_NOMEM, "no host memory for the rows; lower --tokens");
    }
    EPI_TRY(b->c->clock->open(b));
    EPI_TRY(ep_group_create(&b->group, &config));
    EPI_TRY(ep_handle_create(&b->handle, b->group, NULL));
    EPI_TRY(ep_group_plan(b->group, &plan));
    if (b->rank->rank == 0) {
        b->c->arena_bytes = plan.arena_bytes;
    }
    return b->p->ll ? bench_ll_open(b, plan.ll_handle_bytes) : EP_OK;
}

int bench_rank(struct rank *rank, void *arg) {
    struct bench_case *c = arg;
    struct bench b = {.rank = rank, .c = c, .p = &c->p};
    ep_status st = open_all(&b);
    if (st != EP_OK && c->p.device == BENCH_CUDA) {
        return rank_fail(rank, st, "creating the group on GPU %d", c->gpus.device[rank->rank]);
    }
    if (st != EP_OK) {
        return rank_fail(rank, st, "creating the group");
    }
    for (b.index = 0; b.index < c->num_items; b.index++) {
        b.item = &c->items[b.index];
        for (int mode = 0; mode < (c->p.no_graph ? 1 : c->clock->num_modes); mode++) {
            if (measure(&b, mode) != 0) {
                return 1; /* the parent ends all; nobody waits for this rank to leave */
            }
        }
    }
    ep_handle_destroy(&b.handle);
    ep_group_destroy(&b.group);
    gpu_close(&b.gpu);
    bench_data_destroy(&b.d);
    return 0;
}
