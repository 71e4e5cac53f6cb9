/* SPDX-License-Identifier: MIT */
/*
 * Runs, declared in trial.h: the buffers of one rank for one trial, the two calls, and the
 * comparison byte by byte with what the reference says. Used by one thread at a time.
 */
#include <string.h>

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define GUARD 256 /* bytes on both sides of an output */
#define POISON 0xA5

static const char *const output_names[] = {
    "recv_x",        "recv_scales",     "recv_topk_ids", "recv_topk_weights", "recv_source",
    "expert_counts", "expert_offsets",  "source_ends",   "expert_ends",       "num_rows",
    "out",           "out_topk_weights"};

/* ---- images of outputs ----------------------------------------------------------------- */

static struct output *output_create(struct run *r, enum trial_output which, int dtype,
                                    int64_t rows, int64_t cols, int64_t stride0,
                                    int64_t stride1) {
    struct output *o = &r->out[which];
    const size_t elem = ep_dtype_bytes((ep_dtype)dtype);
    const int64_t span = (rows ? (rows - 1) * stride0 : 0) + (cols ? (cols - 1) * stride1 : 0);

    ep_tensor_2d(&o->t, (ep_dtype)dtype, NULL, rows, cols);
    o->t.stride[0] = stride0;
    o->t.stride[1] = stride1;
    o->bytes = 2 * GUARD + (size_t)(span + 1) * elem;
    o->got = pool_fill(&r->pool, o->bytes, POISON);
    o->want = pool_fill(&r->pool, o->bytes, POISON);
    o->any = pool_zero(&r->pool, o->bytes);
    o->t.data = rows && cols ? o->got + GUARD : NULL;
    return o;
}

/* A packed output of one (cols 0) or two dimensions. */
static struct output *output_plain(struct run *r, enum trial_output which, int dtype,
                                   int64_t rows, int64_t cols) {
    struct output *o =
        output_create(r, which, dtype, rows, cols ? cols : 1, cols ? cols : 1, 1);

    if (!cols) {
        o->t.ndim = 1;
        o->t.stride[0] = 1;
        o->t.shape[1] = o->t.stride[1] = 0;
    }
    return o;
}

/* The wanted value of one row, packed; NULL: all bytes zero or, with any, not looked at. */
static void want_row(struct output *o, int64_t row, const void *packed, bool any) {
    const size_t elem = ep_dtype_bytes((ep_dtype)o->t.dtype);
    const bool one = o->t.ndim == 1;
    const int64_t cols = one ? 1 : o->t.shape[1];

    for (int64_t j = 0; j < cols; j++) {
        const size_t at =
            GUARD + (size_t)(row * o->t.stride[0] + (one ? 0 : j * o->t.stride[1])) * elem;
        if (any) {
            memset(o->any + at, 1, elem);
        } else if (packed) {
            memcpy(o->want + at, (const uint8_t *)packed + (size_t)j * elem, elem);
        } else {
            memset(o->want + at, 0, elem);
        }
    }
}

static bool output_check(struct run *r, enum trial_output which) {
    const struct output *o = &r->out[which];

    for (size_t i = 0; i < o->bytes; i++) {
        if (o->got[i] != o->want[i] && !o->any[i]) {
            const int64_t at = (int64_t)i - GUARD;
            const int64_t elem = (int64_t)ep_dtype_bytes((ep_dtype)o->t.dtype);
            return world_check(
                r->w, false,
                "%s: byte %lld (element %lld, strides %lld %lld) is %02x, not %02x",
                output_names[which], (long long)at, (long long)(at / elem),
                (long long)o->t.stride[0], (long long)o->t.stride[1], o->got[i], o->want[i]);
        }
    }
    return true;
}

void run_poison(struct run *r, enum trial_output from, enum trial_output to) {
    for (int i = (int)from; i <= (int)to; i++) {
        if (r->out[i].got) {
            memset(r->out[i].got, POISON, r->out[i].bytes);
        }
    }
}

/* ---- dispatch -------------------------------------------------------------------------- */

static bool wanted(const struct run *r, enum trial_output which) {
    return !(r->form->skip & 1u << which);
}

static int64_t padding(const struct run *r, int dtype) {
    return r->form->padded ? 48 / (int64_t)ep_dtype_bytes((ep_dtype)dtype) : 0;
}

static void create_rows(struct run *r, const struct ref_recv *v, int64_t n) {
    const struct test_case *c = r->t->c;
    struct output *o;

    if (wanted(r, OUT_X) && !r->form->arena) {
        o = output_create(r, OUT_X, c->row_dtype, n, c->hidden,
                          c->hidden + padding(r, c->row_dtype), 1);
        for (int64_t i = 0; i < v->num_rows; i++) {
            if (v->source[2 * i] >= 0 || r->form->zero_gaps) {
                want_row(o, i, v->x + (size_t)i * c->problem.row_bytes, false);
            }
        }
        r->dispatch.recv_x = &o->t;
    }
    if (wanted(r, OUT_X) && r->form->arena) {
        r->dispatch.recv_x = &r->view;
    }
    if (v->scales && wanted(r, OUT_SCALES)) {
        const int64_t elem = (int64_t)ep_dtype_bytes((ep_dtype)c->scale_dtype);
        const int64_t column = (n * elem + 15) / 16 * 16 / elem + 16 / elem;
        o = r->form->columns
                ? output_create(r, OUT_SCALES, c->scale_dtype, n, c->num_scales, 1, column)
                : output_plain(r, OUT_SCALES, c->scale_dtype, n, c->num_scales);
        for (int64_t i = 0; i < v->num_rows; i++) {
            want_row(o, i, v->scales + (size_t)i * c->problem.scale_bytes,
                     v->source[2 * i] < 0);
        }
        r->dispatch.recv_scales = &o->t;
    }
}

/* Ids, weights and sources: also the rows past the received ones have a value. */
static void create_sidecars(struct run *r, const struct ref_recv *v, int64_t n) {
    const struct test_case *c = r->t->c;
    const int k = c->topk;
    int32_t narrow[EP_MAX_TOPK];
    int64_t wide[EP_MAX_TOPK];
    const int32_t none[2] = {-1, -1};

    if (!v->expanded && k && wanted(r, OUT_IDS)) {
        struct output *o = output_plain(r, OUT_IDS, r->form->id_dtype, n, k);
        for (int64_t i = 0; i < n; i++) {
            for (int j = 0; j < k; j++) {
                wide[j] = i < v->num_rows ? v->ids[i * k + j] : -1;
                narrow[j] = (int32_t)wide[j];
            }
            want_row(o, i, r->form->id_dtype == EP_I64 ? (void *)wide : narrow, false);
        }
        r->dispatch.recv_topk_ids = &o->t;
    }
    if (v->weights && wanted(r, OUT_WEIGHTS)) {
        struct output *o = output_plain(r, OUT_WEIGHTS, EP_F32, n, v->expanded ? 0 : k);
        for (int64_t i = 0; i < n; i++) {
            const float *from = &v->weights[v->expanded ? i : i * k];
            want_row(o, i, i < v->num_rows ? from : NULL, false);
        }
        r->dispatch.recv_topk_weights = &o->t;
    }
    if (wanted(r, OUT_SOURCE)) {
        struct output *o = output_plain(r, OUT_SOURCE, EP_I32, n, 2);
        for (int64_t i = 0; i < n; i++) {
            want_row(o, i, i < v->num_rows ? &v->source[2 * i] : none, false);
        }
        r->dispatch.recv_source = &o->t;
    }
}

/* An int32 output of n numbers; NULL: it is not asked for. */
static struct ep_tensor *create_numbers(struct run *r, enum trial_output which,
                                        const int32_t *values, int64_t n) {
    if (!wanted(r, which)) {
        return NULL;
    }
    struct output *o = output_plain(r, which, EP_I32, n, 0);
    for (int64_t i = 0; i < n; i++) {
        want_row(o, i, &values[i], false);
    }
    return &o->t;
}

static void create_counts(struct run *r, const struct ref_recv *v) {
    const int32_t rows = (int32_t)v->num_rows;
    struct ep_dispatch_args *d = &r->dispatch;

    if (!r->t->c->mask) {
        d->expert_counts = create_numbers(r, OUT_COUNTS, v->counts, v->num_local);
        d->expert_ends = create_numbers(r, OUT_EXPERT_ENDS, v->expert_ends, v->num_local);
    }
    if (v->expanded) {
        d->expert_offsets = create_numbers(r, OUT_OFFSETS, v->offsets, v->num_local + 1);
    }
    d->source_ends = create_numbers(r, OUT_SOURCE_ENDS, v->source_ends, r->w->num_ranks);
    d->num_rows = create_numbers(r, OUT_NUM_ROWS, &rows, 1);
}

static void create_dispatch(struct run *r) {
    const struct test_case *c = r->t->c;
    const struct ref_recv *v = &r->t->recv[r->w->rank];
    const int64_t n = v->num_rows + r->form->slack;

    r->dispatch = (struct ep_dispatch_args)EP_DISPATCH_ARGS_INIT;
    r->view = (struct ep_tensor)EP_TENSOR_INIT;
    r->dispatch.flags = (r->form->expanded ? EP_DISPATCH_EXPANDED : 0) |
                        (r->form->arena ? EP_DISPATCH_ARENA : 0) |
                        (r->form->zero_gaps && r->form->expanded ? EP_DISPATCH_ZERO_GAPS : 0) |
                        (r->form->columns ? EP_DISPATCH_SCALES_COLUMN_MAJOR : 0);
    r->dispatch.alignment = r->form->alignment;
    r->dispatch.num_workers = r->form->num_workers;
    r->dispatch.x = &c->x[r->w->rank];
    r->dispatch.scales = c->num_scales ? &c->scales[r->w->rank] : NULL;
    r->dispatch.topk_weights = c->weights ? &c->topk_weights[r->w->rank] : NULL;
    create_rows(r, v, n);
    create_sidecars(r, v, n);
    create_counts(r, v);
}

ep_status run_route(struct run *r, ep_handle *handle, void *stream) {
    struct ep_routing routing;

    case_routing(r->t->c, r->w->rank, &routing);
    return call_route(handle, &routing, stream);
}

static bool check_handle_counts(struct run *r, ep_handle *handle) {
    const struct ref_recv *v = &r->t->recv[r->w->rank];
    const size_t ranks = (size_t)r->w->num_ranks, local = (size_t)v->num_local;
    struct pool pool = {0};
    int32_t *per_source = pool_fill(&pool, ranks * 4, POISON);
    int32_t *per_expert = pool_fill(&pool, local * 4, POISON);
    int64_t rows = -1, sum = 0;
    bool good;

    for (size_t i = 0; i < ranks; i++) {
        sum += v->rows_per_source[i];
    }
    good = world_is(
        r->w, ep_handle_counts(handle, &rows, per_source, r->t->c->mask ? NULL : per_expert),
        EP_OK, "ep_handle_counts");
    good = good && world_check(r->w, rows == sum, "counts: %lld rows, not %lld",
                               (long long)rows, (long long)sum);
    good = good && world_check(r->w, !memcmp(per_source, v->rows_per_source, ranks * 4),
                               "counts: rows_per_source");
    good = good && world_check(r->w, r->t->c->mask || !memcmp(per_expert, v->counts, local * 4),
                               "counts: rows_per_expert");
    pool_free(&pool);
    return good;
}

ep_status run_dispatch(struct run *r, ep_handle *handle, void *stream) {
    struct ep_dispatch_args in = EP_DISPATCH_ARGS_INIT, out = r->dispatch;
    ep_status st;

    run_poison(r, OUT_X, OUT_NUM_ROWS);
    if (!r->form->two_step) {
        return call_dispatch(handle, &r->dispatch, stream);
    }
    in.x = out.x;
    in.scales = out.scales;
    in.topk_weights = out.topk_weights;
    in.num_workers = out.num_workers;
    out.x = out.scales = out.topk_weights = NULL;
    st = call_dispatch_begin(handle, &in, stream);
    if (st == EP_OK) {
        check_handle_counts(r, handle);
        st = call_dispatch_finish(handle, &out, stream);
    }
    return st;
}

/* The view may be memory of a device. */
static bool check_row_bytes(struct run *r, const struct ep_tensor *rows) {
    const struct ref_recv *v = &r->t->recv[r->w->rank];
    const size_t bytes = r->t->c->problem.row_bytes;
    const size_t stride =
        (size_t)rows->stride[0] * ep_dtype_bytes((ep_dtype)r->t->c->row_dtype);
    const size_t all = v->num_rows ? (size_t)(v->num_rows - 1) * stride + bytes : 0;
    struct pool pool = {0};
    uint8_t *copy = pool_fill(&pool, all, POISON);
    bool good = true;

    if (all) {
        call_read(r->w->group, copy, rows->data, all);
    }
    for (int64_t i = 0; good && i < v->num_rows; i++) {
        if (v->source[2 * i] < 0 && !r->form->zero_gaps) {
            continue;
        }
        good = world_check(r->w,
                           !memcmp(copy + (size_t)i * stride, v->x + (size_t)i * bytes, bytes),
                           "view: row %lld of %lld", (long long)i, (long long)v->num_rows);
    }
    pool_free(&pool);
    return good;
}

bool run_check_rows(struct run *r, const struct ep_tensor *rows) {
    const struct ref_recv *v = &r->t->recv[r->w->rank];

    return world_check(r->w,
                       rows->dtype == r->t->c->row_dtype && rows->ndim == 2 &&
                           rows->shape[0] >= v->num_rows && rows->shape[1] == r->t->c->hidden &&
                           rows->stride[1] == 1 && (uintptr_t)rows->data % EP_ROW_ALIGN == 0,
                       "view: dtype %d, [%lld][%lld], strides %lld %lld", rows->dtype,
                       (long long)rows->shape[0], (long long)rows->shape[1],
                       (long long)rows->stride[0], (long long)rows->stride[1]) &&
           check_row_bytes(r, rows);
}

bool run_check_outputs(struct run *r) {
    bool good = true;

    for (int i = OUT_X; i <= OUT_NUM_ROWS; i++) {
        if (r->out[i].got) {
            good = output_check(r, (enum trial_output)i) && good;
        }
    }
    if (r->dispatch.recv_x == &r->view) {
        good = run_check_rows(r, &r->view) && good;
    }
    return good;
}

bool run_check_dispatch(struct run *r, ep_handle *handle) {
    const bool good = run_check_outputs(r);

    return check_handle_counts(r, handle) && good;
}

/* ---- combine --------------------------------------------------------------------------- */

/* The answers and slack rows of NaN after them. */
static void create_answers(struct run *r) {
    const struct trial *t = r->t;
    const struct ref_recv *v = &t->recv[r->w->rank];
    const struct ref_answers *a = &t->answers[r->w->rank];
    const enum case_stride stride = r->form->padded ? STRIDE_PADDED : STRIDE_PACKED;
    const int64_t n = v->num_rows + r->form->slack, k = v->expanded ? 1 : t->c->topk;
    const size_t row_bytes = (size_t)t->hidden * ep_dtype_bytes((ep_dtype)t->dtype);
    uint8_t *x = pool_fill(&r->pool, (size_t)n * row_bytes, 0xFF);
    float *w = pool_fill(&r->pool, (size_t)n * 4, 0xFF);
    float *tw = pool_fill(&r->pool, (size_t)(n * k) * 4, 0xFF);

    memcpy(x, a->x, (size_t)v->num_rows * row_bytes);
    r->answers = case_tensor(&r->pool, t->dtype, x, n, t->hidden, stride);
    r->combine.x = &r->answers;
    if (a->weights) {
        memcpy(w, a->weights, (size_t)v->num_rows * 4);
        ep_tensor_1d(&r->weights, EP_F32, w, n);
        r->combine.weights = &r->weights;
    }
    if (a->topk_weights) {
        memcpy(tw, a->topk_weights, (size_t)(v->num_rows * k) * 4);
        ep_tensor_2d(&r->topk, EP_F32, tw, n, k);
        if (v->expanded) {
            ep_tensor_1d(&r->topk, EP_F32, tw, n);
        }
        r->combine.topk_weights = &r->topk;
    }
}

static void create_combine(struct run *r) {
    const struct trial *t = r->t;
    const int rank = r->w->rank;
    const int64_t tokens = t->c->in[rank].num_tokens;
    const size_t row_bytes = (size_t)t->hidden * ep_dtype_bytes((ep_dtype)t->dtype);
    struct output *o = output_create(r, OUT_Y, t->dtype, tokens, t->hidden,
                                     t->hidden + padding(r, t->dtype), 1);

    r->combine = (struct ep_combine_args)EP_COMBINE_ARGS_INIT;
    r->combine.num_workers = r->form->num_workers;
    r->combine.out = &o->t;
    create_answers(r);
    for (int b = 0; b < 2; b++) {
        if (t->bias[b][rank]) {
            r->bias[b] = case_tensor(&r->pool, t->dtype, t->bias[b][rank], tokens, t->hidden,
                                     r->form->padded ? STRIDE_PADDED : STRIDE_PACKED);
            r->combine.bias[b] = &r->bias[b];
        }
    }
    for (int64_t i = 0; i < tokens; i++) {
        want_row(o, i, t->y[rank] + (size_t)i * row_bytes, false);
    }
    if (t->back && wanted(r, OUT_Y_TOPK)) {
        o = output_plain(r, OUT_Y_TOPK, EP_F32, tokens, t->c->topk);
        for (int64_t i = 0; i < tokens; i++) {
            want_row(o, i, &t->y_topk[rank][i * t->c->topk], false);
        }
        r->combine.out_topk_weights = &o->t;
    }
}

ep_status run_combine(struct run *r, ep_handle *handle, void *stream) {
    struct ep_combine_args in = r->combine, out = r->combine;

    run_poison(r, OUT_Y, OUT_Y_TOPK);
    if (!r->form->two_step) {
        return call_combine(handle, &in, stream);
    }
    in.out = in.out_topk_weights = NULL;
    in.bias[0] = in.bias[1] = NULL;
    out.x = out.weights = out.topk_weights = NULL;
    const ep_status st = call_combine_begin(handle, &in, stream);
    return st == EP_OK ? call_combine_finish(handle, &out, stream) : st;
}

bool run_check_combine(struct run *r) {
    bool good = output_check(r, OUT_Y);

    return (!r->out[OUT_Y_TOPK].got || output_check(r, OUT_Y_TOPK)) && good;
}

void run_create(struct run *r, struct world *w, const struct trial *t) {
    *r = (struct run){.w = w, .t = t, .form = &t->form[w->rank]};
    create_dispatch(r);
    create_combine(r);
}

void run_free(struct run *r) {
    pool_free(&r->pool);
}
