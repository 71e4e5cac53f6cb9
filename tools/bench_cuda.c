/* SPDX-License-Identifier: MIT */
/*
 * One rank of `ep bench --device cuda`: times each operation eagerly and as a graph, and checks
 * what the last of each left behind.
 *
 * Owns the rank's GPU, group and buffers. How time is taken: in every iteration the rank holds
 * its stream back, queues begin event, operation and end event, and meets the others at a barrier
 * in shared memory. Rank 0 names an instant, all wait for it on the one clock of the machine and
 * release their streams. The sample is begin to end, of the slowest rank.
 */
#include <sched.h>

#include "tools/bench.h"
#include "tools/gpu.h"

#define LEAD_NS (100 * EPI_NS_PER_US) /* from naming the instant to it: all must have seen it */

const char *const cuda_modes[NUM_MODES] = {"eager", "graph"};

#define DISPATCHES(fp8)                                                                        \
    {"dispatch_arena_cached",                                                                  \
     "dispatch to arena, cached",                                                              \
     CUDA_DISPATCH,                                                                            \
     fp8,                                                                                      \
     FORM_ARENA,                                                                               \
     true},                                                                                    \
        {"route_dispatch_arena",                                                               \
         "route + dispatch to arena",                                                          \
         CUDA_DISPATCH,                                                                        \
         fp8,                                                                                  \
         FORM_ARENA,                                                                           \
         false},                                                                               \
        {"dispatch_memory_cached",                                                             \
         "dispatch to memory, cached",                                                         \
         CUDA_DISPATCH,                                                                        \
         fp8,                                                                                  \
         FORM_MEMORY,                                                                          \
         true},                                                                                \
        {"route_dispatch_memory",                                                              \
         "route + dispatch to memory",                                                         \
         CUDA_DISPATCH,                                                                        \
         fp8,                                                                                  \
         FORM_MEMORY,                                                                          \
         false},                                                                               \
        {"dispatch_expanded_cached",                                                           \
         "dispatch expanded, cached",                                                          \
         CUDA_DISPATCH,                                                                        \
         fp8,                                                                                  \
         FORM_EXPANDED,                                                                        \
         true},                                                                                \
    {                                                                                          \
        "route_dispatch_expanded", "route + dispatch expanded", CUDA_DISPATCH, fp8,            \
            FORM_EXPANDED, false                                                               \
    }

const struct cuda_op cuda_ops[NUM_CUDA_OPS] = {
    {"route", "route", CUDA_ROUTE, false, FORM_MEMORY, true},
    DISPATCHES(true),
    DISPATCHES(false),
    {"combine_arena", "combine from arena", CUDA_COMBINE, false, FORM_ARENA, true},
    {"combine_memory", "combine from memory", CUDA_COMBINE, false, FORM_MEMORY, true},
    {"combine_expanded", "combine expanded, weighted", CUDA_COMBINE, false, FORM_EXPANDED,
     true},
};

/* ---- what is measured -------------------------------------------------------------------- */

int cuda_dtype(const struct bench_params *p, int op) {
    return cuda_ops[op].fp8 ? DTYPE_FP8 : p->dtype == DTYPE_F32 ? DTYPE_F32 : DTYPE_BF16;
}

struct text cuda_name(const struct bench_params *p, int op) {
    struct text t;
    bool typed = cuda_ops[op].kind != CUDA_ROUTE;
    snprintf(t.s, sizeof(t.s), "%s%s%s", typed ? dtype_names[cuda_dtype(p, op)] : "",
             typed ? " " : "", cuda_ops[op].name);
    return t;
}

bool cuda_measures(const struct bench_params *p, int op) {
    const struct cuda_op *o = &cuda_ops[op];
    if (o->kind == CUDA_ROUTE) {
        return true;
    }
    if (o->form == FORM_ARENA ? p->memory_only || p->expanded
                              : p->arena_only || (p->expanded && o->form != FORM_EXPANDED)) {
        return false;
    }
    if (o->kind == CUDA_COMBINE) {
        return true;
    }
    if (o->fp8 && o->form == FORM_EXPANDED && !p->expanded) {
        return false; /* only when asked for */
    }
    return (p->dtype < 0 || cuda_dtype(p, op) == p->dtype) && !(o->cached && p->uncached);
}

unsigned cuda_dtypes(const struct bench_params *p) {
    unsigned dtypes = 0;
    for (int op = 0; op < NUM_CUDA_OPS; op++) {
        dtypes |= cuda_measures(p, op) ? 1u << cuda_dtype(p, op) : 0;
    }
    return dtypes;
}

bool cuda_expands(const struct bench_params *p) {
    bool any = false;
    for (int op = 0; op < NUM_CUDA_OPS; op++) {
        any = any || (cuda_ops[op].form == FORM_EXPANDED && cuda_measures(p, op));
    }
    return any;
}

/* ---- a rank ------------------------------------------------------------------------------ */

struct bench {
    struct rank *rank;
    struct bench_case *c;
    const struct bench_params *p;
    struct bench_cuda *cuda;
    struct bench_data d;
    struct gpu *gpu;
    ep_group *group;
    ep_handle *handle;
    int op;
    struct text name;
    int64_t started_ns; /* the last instant that rank 0 named */
    /* Device memory, as large as the largest operation needs. */
    void *ids, *x, *scales, *weights, *recv, *recv_scales, *recv_ids, *recv_weights,
        *recv_source, *num_rows, *out;
    struct ep_tensor view; /* recv_x of the last dispatch */
};

static ep_status do_route(struct bench *b) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_tensor_2d(&ids, EP_I32, b->ids, b->p->tokens, b->p->topk);
    routing.topk_ids = &ids;
    return ep_handle_route(b->handle, &routing, gpu_stream(b->gpu));
}

static ep_status do_dispatch(struct bench *b, enum cuda_form form) {
    const struct bench_params *p = b->p;
    const struct bench_data *d = &b->d;
    struct ep_tensor x, scales, weights, recv_scales, recv_ids, recv_weights, source, num_rows;
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    bool expanded = form == FORM_EXPANDED;
    args.flags =
        (expanded ? EP_DISPATCH_EXPANDED : 0) | (form == FORM_ARENA ? EP_DISPATCH_ARENA : 0);
    ep_tensor_2d(&x, bench_row_types[d->dtype], b->x, p->tokens, p->hidden);
    ep_tensor_2d(&weights, EP_F32, b->weights, p->tokens, p->topk);
    ep_tensor_2d(&recv_ids, EP_I32, b->recv_ids, d->num_rows, p->topk);
    ep_tensor_2d(&recv_weights, EP_F32, b->recv_weights, d->num_rows, p->topk);
    if (expanded) {
        ep_tensor_1d(&recv_weights, EP_F32, b->recv_weights, d->num_rows);
    }
    ep_tensor_2d(&source, EP_I32, b->recv_source, d->num_rows, 2);
    ep_tensor_1d(&num_rows, EP_I32, b->num_rows, 1);
    ep_tensor_2d(&b->view, bench_row_types[d->dtype], b->recv, d->num_rows, p->hidden);
    args.x = &x;
    args.topk_weights = &weights;
    args.recv_x = &b->view;
    args.recv_topk_ids = expanded ? NULL : &recv_ids;
    args.recv_topk_weights = &recv_weights;
    args.recv_source = &source;
    args.num_rows = &num_rows;
    if (d->num_scales > 0) {
        ep_tensor_2d(&scales, EP_F32, b->scales, p->tokens, d->num_scales);
        ep_tensor_2d(&recv_scales, EP_F32, b->recv_scales, d->num_rows, d->num_scales);
        args.scales = &scales;
        args.recv_scales = &recv_scales;
    }
    return ep_dispatch(b->handle, &args, gpu_stream(b->gpu));
}

/* The answers are the rows, where the dispatch has left them. */
static ep_status do_combine(struct bench *b, enum cuda_form form) {
    struct ep_combine_args args = EP_COMBINE_ARGS_INIT;
    struct ep_tensor weights, out;
    ep_tensor_1d(&weights, EP_F32, b->recv_weights, b->view.shape[0]);
    ep_tensor_2d(&out, bench_row_types[b->d.dtype], b->out, b->p->tokens, b->p->hidden);
    args.x = &b->view;
    args.weights = form == FORM_EXPANDED ? &weights : NULL;
    args.out = &out;
    return ep_combine(b->handle, &args, gpu_stream(b->gpu));
}

static ep_status do_op(struct bench *b) {
    const struct cuda_op *o = &cuda_ops[b->op];
    ep_status st = EP_OK;
    if (o->kind == CUDA_ROUTE || !o->cached) {
        st = do_route(b);
    }
    if (o->kind == CUDA_DISPATCH && st == EP_OK) {
        st = do_dispatch(b, o->form);
    } else if (o->kind == CUDA_COMBINE) {
        st = do_combine(b, o->form);
    }
    return st;
}

/* What the enqueued work has found, now that it has ended. */
static ep_status settled(struct bench *b) {
    ep_status st = gpu_sync(b->gpu);
    for (int i = 0; st == EP_OK && i < 1000; i++) {
        st = ep_handle_status(b->handle);
        if (st != EP_AGAIN) {
            return st;
        }
        epi_sleep_ns(EPI_NS_PER_MS);
        st = EP_OK;
    }
    return st == EP_OK ? epi_fail(EP_ERR_TIMEOUT, "the handle's counts did not come") : st;
}

/* Fresh rows, and before a cached dispatch or a combine the dispatch that it rests on. */
static ep_status prepare(struct bench *b, int mode) {
    const struct cuda_op *o = &cuda_ops[b->op];
    struct bench_data *d = &b->d;
    int64_t tokens = b->p->tokens;
    data_use(d, b->name.s, (uint64_t)(b->op * NUM_MODES + mode), cuda_dtype(b->p, b->op),
             o->form == FORM_EXPANDED);
    ep_status st = gpu_in(b->gpu, b->x, d->x, tokens * d->row_bytes);
    if (st == EP_OK && d->num_scales > 0) {
        st = gpu_in(b->gpu, b->scales, d->scales,
                    tokens * d->num_scales * (int64_t)sizeof(*d->scales));
    }
    if (st == EP_OK) {
        rank_barrier(b->rank); /* no GPU waits while another rank still makes its rows */
    }
    if (st == EP_OK && o->cached && o->kind != CUDA_ROUTE) {
        st = do_route(b);
        st = st == EP_OK ? do_dispatch(b, o->form) : st;
        st = st == EP_OK ? settled(b) : st;
    }
    return st;
}

/* ---- time -------------------------------------------------------------------------------- */

/* Returns when the stream was released. */
static int64_t leave_together(struct bench *b) {
    int64_t at;
    rank_barrier(b->rank);
    if (b->rank->rank == 0) {
        atomic_store(&b->cuda->start_ns, epi_now_ns() + LEAD_NS);
    }
    while ((at = atomic_load(&b->cuda->start_ns)) == b->started_ns) {
        sched_yield();
    }
    b->started_ns = at;
    while (epi_now_ns() < at) {
    }
    gpu_release(b->gpu);
    return epi_now_ns();
}

static ep_status iterate(struct bench *b, struct gpu_graph *graph, struct cuda_sample *sample) {
    bool held = gpu_hold(b->gpu);
    if (b->rank->rank == 0) {
        b->cuda->held = held;
    }
    if (!held) {
        sample->released_ns = leave_together(b);
    }
    ep_status st = gpu_mark(b->gpu, GPU_BEGIN);
    if (st == EP_OK) {
        st = graph ? gpu_replay(b->gpu, graph) : do_op(b);
    }
    st = st == EP_OK ? gpu_mark(b->gpu, GPU_END) : st;
    if (st != EP_OK) {
        gpu_release(b->gpu); /* and the others wait at the barrier until they are ended */
        return st;
    }
    if (held) {
        sample->released_ns = leave_together(b);
    }
    st = gpu_sync(b->gpu);
    return st == EP_OK ? gpu_elapsed_ns(b->gpu, &sample->ns) : st;
}

static ep_status capture(struct bench *b, struct gpu_graph **graph) {
    ep_status st = gpu_capture(b->gpu);
    if (st != EP_OK) {
        return st;
    }
    st = do_op(b);
    char why[400];
    snprintf(why, sizeof(why), "%s", ep_last_error());
    ep_status ended = gpu_captured(b->gpu, graph);
    return st != EP_OK ? epi_fail(st, "%s", why) : ended;
}

/* ---- checks ------------------------------------------------------------------------------ */

static ep_status fetch_dispatch(struct bench *b, int32_t *num_rows) {
    struct bench_data *d = &b->d;
    int64_t n = d->num_rows;
    int64_t per_row = d->expanded ? 1 : b->p->topk;
    const struct {
        void *to;
        const void *from;
        int64_t bytes;
    } copies[] = {
        {num_rows, b->num_rows, sizeof(*num_rows)},
        {d->recv, b->view.data, n * d->row_bytes},
        {d->recv_source, b->recv_source, n * 2 * (int64_t)sizeof(*d->recv_source)},
        {d->recv_weights, b->recv_weights, n * per_row * (int64_t)sizeof(*d->recv_weights)},
        {d->recv_ids, b->recv_ids,
         d->expanded ? 0 : n * per_row * (int64_t)sizeof(*d->recv_ids)},
        {d->recv_scales, b->recv_scales, n * d->num_scales * (int64_t)sizeof(*d->recv_scales)},
    };
    ep_status st = EP_OK;
    for (size_t i = 0; i < sizeof(copies) / sizeof(copies[0]) && st == EP_OK; i++) {
        st = gpu_out(b->gpu, copies[i].to, copies[i].from, copies[i].bytes);
    }
    d->rows = d->recv;
    d->rows_stride = d->row_bytes;
    return st;
}

static int check(struct bench *b) {
    struct bench_data *d = &b->d;
    int32_t num_rows = 0;
    bool combine = cuda_ops[b->op].kind == CUDA_COMBINE;
    if (b->p->no_check || cuda_ops[b->op].kind == CUDA_ROUTE) {
        return 0;
    }
    ep_status st = combine ? gpu_out(b->gpu, d->out, b->out, b->p->tokens * d->answer_bytes)
                           : fetch_dispatch(b, &num_rows);
    if (st != EP_OK) {
        return rank_fail(b->rank, st, "fetching the output of %s", b->name.s);
    }
    if (combine) {
        return check_combine(d);
    }
    if (num_rows != d->num_rows) {
        return rank_fail(b->rank, EP_OK, "check: %s: num_rows is %d, not %lld", b->name.s,
                         num_rows, (long long)d->num_rows);
    }
    return check_dispatch(d);
}

/* ---- everything -------------------------------------------------------------------------- */

static int measure(struct bench *b, int mode) {
    const struct bench_params *p = b->p;
    struct gpu_graph *graph = NULL;
    struct cuda_sample ignored;
    struct cuda_sample *samples =
        b->cuda->samples + (b->op * NUM_MODES + mode) * p->iters * p->ranks + b->rank->rank;
    ep_status st = prepare(b, mode);
    if (st == EP_OK && mode == MODE_GRAPH) {
        st = capture(b, &graph);
    }
    if (st == EP_OK && graph && b->rank->rank == 0) {
        b->cuda->sms[b->op] = gpu_graph_sms(graph);
    }
    for (int64_t i = -p->warmup; i < p->iters && st == EP_OK; i++) {
        st = iterate(b, graph, i < 0 ? &ignored : &samples[i * p->ranks]);
    }
    st = st == EP_OK ? settled(b) : st;
    if (st != EP_OK) {
        return rank_fail(b->rank, st, "%s (%s)", b->name.s, cuda_modes[mode]);
    }
    int failed = check(b);
    gpu_graph_destroy(&graph);
    return failed;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static ep_status allocate(struct bench *b) {
    const struct bench_params *p = b->p;
    int64_t rows = b->c->received_rows[b->rank->rank];
    int64_t row_bytes = b->c->answer_bytes;
    if (cuda_expands(p)) {
        rows = larger(rows, b->c->selected_rows[b->rank->rank]);
    }
    const struct {
        void **to;
        int64_t num, bytes;
    } wanted[] = {{&b->ids, p->tokens * p->topk, sizeof(int32_t)},
                  {&b->weights, p->tokens * p->topk, sizeof(float)},
                  {&b->x, p->tokens, row_bytes},
                  {&b->scales, p->tokens, b->c->scale_bytes},
                  {&b->out, p->tokens, row_bytes},
                  {&b->recv, rows, p->arena_only ? 0 : row_bytes},
                  {&b->recv_scales, rows, b->c->scale_bytes},
                  {&b->recv_ids, rows * p->topk, sizeof(int32_t)},
                  {&b->recv_weights, rows * p->topk, sizeof(float)},
                  {&b->recv_source, rows * 2, sizeof(int32_t)},
                  {&b->num_rows, 1, sizeof(int32_t)}};
    for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
        *wanted[i].to = gpu_alloc(b->gpu, wanted[i].num, wanted[i].bytes);
        if (!*wanted[i].to) {
            return EP_ERR_NOMEM;
        }
    }
    return data_create(&b->d, b->rank, b->c, p->no_check ? 0 : rows, cuda_dtypes(p))
               ? EP_OK
               : epi_fail(EP_ERR_NOMEM, "no host memory for the rows");
}

static ep_status open_all(struct bench *b) {
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    int64_t selections = b->p->tokens * b->p->topk;
    bench_config(b->c, &config);
    rank_config(b->rank, &config);
    config.device_index = b->cuda->device[b->rank->rank];
    ep_status st = gpu_open(&b->gpu, config.device_index);
    st = st == EP_OK ? allocate(b) : st;
    st = st == EP_OK ? ep_group_create(&b->group, &config) : st;
    st = st == EP_OK ? ep_handle_create(&b->handle, b->group, NULL) : st;
    if (st == EP_OK && b->rank->rank == 0) {
        ep_group_plan(b->group, &plan);
        b->c->arena_bytes = plan.arena_bytes;
    }
    st = st == EP_OK ? gpu_in(b->gpu, b->ids, b->c->ids + b->rank->rank * selections,
                              selections * (int64_t)sizeof(*b->c->ids))
                     : st;
    return st == EP_OK ? gpu_in(b->gpu, b->weights, b->d.weights,
                                selections * (int64_t)sizeof(*b->d.weights))
                       : st;
}

int cuda_rank(struct rank *rank, void *arg) {
    struct bench_case *c = arg;
    struct bench b = {.rank = rank, .c = c, .p = &c->p, .cuda = c->cuda};
    ep_status st = open_all(&b);
    if (st != EP_OK) {
        return rank_fail(rank, st, "creating the group on GPU %d", c->cuda->device[rank->rank]);
    }
    for (b.op = 0; b.op < NUM_CUDA_OPS; b.op++) {
        b.name = cuda_name(b.p, b.op);
        for (int mode = 0; mode < NUM_MODES && cuda_measures(b.p, b.op); mode++) {
            if (mode == MODE_GRAPH && c->p.no_graph) {
                continue;
            }
            if (measure(&b, mode) != 0) {
                return 1; /* the parent ends all; nobody waits for this rank to leave */
            }
        }
    }
    ep_handle_destroy(&b.handle);
    ep_group_destroy(&b.group);
    gpu_close(&b.gpu);
    data_destroy(&b.d);
    return 0;
}
