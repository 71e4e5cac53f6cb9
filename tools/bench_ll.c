/* SPDX-License-Identifier: MIT */
/*
 * The operations of `ep bench --mode ll`: dispatch with packed output, combine in its forms, both as a
 * round trip, and their halves; and whether what they left is right.
 *
 * Owns what a rank needs beside its rows: outputs for the worst case, the handle, the experts'
 * answers. Runs in the ranks. Must not take time: it says what is timed, bench_clock.c how.
 */
#include "tools/bench.h"

#define OTHER_BYTES ((int64_t)64 << 20)

static int64_t num_local(const struct bench_params *p, int rank) {
    int64_t num = 0;
    for (int e = 0; e < p->experts; e++) {
        num += tool_expert_rank(e, (int)p->experts, (int)p->ranks) == rank;
    }
    return num;
}

/* Columns of scales start at multiples of 16 bytes. */
static int64_t pitch_of(const struct bench_params *p) {
    return (p->ranks * p->tokens + 3) / 4 * 4;
}

int64_t bench_ll_bytes(const struct bench_params *p, int rank) {
    int64_t rows = num_local(p, rank) * p->ranks * p->tokens;
    return OTHER_BYTES + rows * (4 * p->hidden + 4) +
           num_local(p, rank) * (p->hidden / 128 * pitch_of(p) * 4 + 4 + 8 * p->ranks);
}

static void *get(struct bench *b, int64_t num, int64_t bytes) {
    return b->gpu ? gpu_alloc(b->gpu, num, bytes) : bench_data_get(&b->d, num, bytes);
}

/* The small outputs, which are checked in host memory. */
static bool get_outputs(struct bench_ll_outputs *o, const struct bench_params *p, int64_t local,
                        void *(*from)(struct bench *b, int64_t num, int64_t bytes),
                        struct bench *b) {
    return (o->scales = from(b, local * (p->hidden / 128) * pitch_of(p), sizeof(*o->scales))) &&
           (o->source = from(b, local * p->ranks * p->tokens, sizeof(*o->source))) &&
           (o->counts = from(b, local, sizeof(*o->counts))) &&
           (o->ranges = from(b, local * p->ranks, sizeof(*o->ranges)));
}

static void *get_here(struct bench *b, int64_t num, int64_t bytes) {
    return bench_data_get(&b->d, num, bytes);
}

ep_status bench_ll_open(struct bench *b, int64_t handle_bytes) {
    struct bench_ll *ll = &b->ll;
    ll->local = num_local(b->p, b->rank->rank);
    ll->each = b->p->ranks * b->p->tokens;
    ll->handle_bytes = handle_bytes;
    int64_t rows = ll->local * ll->each, row_bytes = 2 * b->p->hidden;
    bool done = (ll->handle[0] = get(b, 1, handle_bytes)) &&
                (ll->handle[1] = get(b, 1, handle_bytes)) &&
                (ll->other = get(b, 1, OTHER_BYTES)) && (ll->recv = get(b, rows, row_bytes)) &&
                (ll->answers = get(b, rows, row_bytes)) &&
                get_outputs(&ll->at, b->p, ll->local, get, b) &&
                (b->p->no_check || get_outputs(&ll->here, b->p, ll->local, get_here, b));
    return done ? EP_OK : epi_fail(EP_ERR_NOMEM, "no memory for the output; lower --tokens");
}

/* ---- running them ------------------------------------------------------------------------- */

typedef ep_status dispatch_fn(ep_group *group, const struct ep_ll_dispatch_args *args,
                              void *stream);
typedef ep_status combine_fn(ep_group *group, const struct ep_ll_combine_args *args,
                             void *stream);

static ep_status call_dispatch(struct bench *b, dispatch_fn *fn, void *recv, bool cast) {
    const struct bench_params *p = b->p;
    struct bench_ll *ll = &b->ll;
    const int64_t rows = ll->local * ll->each;
    struct ep_tensor x, ids, weights, handle, recv_x, scales, source, counts, ranges;
    struct ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    ep_tensor_2d(&x, EP_BF16, b->at.x, p->tokens, p->hidden);
    ep_tensor_2d(&ids, EP_I32, b->at.ids, p->tokens, p->topk);
    ep_tensor_2d(&weights, EP_F32, b->at.weights, p->tokens, p->topk);
    ep_tensor_1d(&handle, EP_U8, ll->handle[b->link % 2], ll->handle_bytes);
    ep_tensor_2d(&recv_x, cast ? EP_F8E4M3 : EP_BF16, recv, rows, p->hidden);
    ep_tensor_2d(&scales, EP_F32, ll->at.scales, ll->local * (p->hidden / 128), ll->each);
    scales.stride[0] = pitch_of(p);
    ep_tensor_1d(&source, EP_I32, ll->at.source, rows);
    ep_tensor_1d(&counts, EP_I32, ll->at.counts, ll->local);
    ep_tensor_2d(&ranges, EP_I64, ll->at.ranges, ll->local, p->ranks);
    args.flags = cast ? EP_LL_FP8 : 0;
    args.x = &x;
    args.topk_ids = &ids;
    args.topk_weights = &weights;
    args.handle = &handle;
    args.recv_x = &recv_x;
    args.recv_scales = cast ? &scales : NULL;
    args.recv_source = &source;
    args.expert_counts = &counts;
    args.ranges = &ranges;
    return fn(b->group, &args, bench_stream(b));
}

static ep_status dispatch(struct bench *b, dispatch_fn *fn) {
    return call_dispatch(b, fn, b->ll.recv, b->item->dtype == BENCH_FP8);
}

static ep_status combine(struct bench *b, combine_fn *fn) {
    struct bench_ll *ll = &b->ll;
    const uint32_t flags = b->item->op->flags;
    struct ep_tensor handle, x, out, weights;
    struct ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    ep_tensor_1d(&handle, EP_U8, ll->handle[b->link % 2], ll->handle_bytes);
    ep_tensor_2d(&weights, EP_F32, b->at.weights, b->p->tokens, b->p->topk);
    args.flags = flags & ~BENCH_LL_WEIGHTS;
    args.topk_weights = flags & BENCH_LL_WEIGHTS ? &weights : NULL;
    ep_tensor_2d(&x, EP_BF16, ll->answers, ll->local * ll->each, b->p->hidden);
    ep_tensor_2d(&out, EP_BF16, b->at.out, b->p->tokens, b->p->hidden);
    args.handle = &handle;
    args.x = &x;
    args.out = &out;
    return fn(b->group, &args, bench_stream(b));
}

/* The answers are rows as a BF16 dispatch brings them, also where the one that is timed casts. */
ep_status bench_ll_prepare(struct bench *b) {
    for (b->link = 0; b->link < 2; b->link++) {
        EPI_TRY(call_dispatch(b, ep_ll_dispatch, b->ll.answers, false));
    }
    return b->c->clock->settle(b);
}

ep_status bench_ll_other(struct bench *b) {
    const bool beside = b->item->op->joins;
    for (int byte = 0; byte < 2; byte++) {
        if (b->gpu) {
            EPI_TRY(
                (beside ? gpu_fill_beside : gpu_fill)(b->gpu, b->ll.other, byte, OTHER_BYTES));
        } else {
            memset(b->ll.other, byte, OTHER_BYTES);
        }
    }
    return EP_OK;
}

ep_status bench_ll_dispatch(struct bench *b) {
    return dispatch(b, ep_ll_dispatch);
}
ep_status bench_ll_dispatch_send(struct bench *b) {
    return dispatch(b, ep_ll_dispatch_send);
}
ep_status bench_ll_dispatch_recv(struct bench *b) {
    return dispatch(b, ep_ll_dispatch_recv);
}
ep_status bench_ll_combine(struct bench *b) {
    return combine(b, ep_ll_combine);
}
ep_status bench_ll_combine_send(struct bench *b) {
    return combine(b, ep_ll_combine_send);
}
ep_status bench_ll_combine_recv(struct bench *b) {
    return combine(b, ep_ll_combine_recv);
}
ep_status bench_ll_trip(struct bench *b) {
    EPI_TRY(bench_ll_dispatch(b));
    return bench_ll_combine(b);
}

/* Of two micro-batches, of which one is on its way while the other is sent or received. */
ep_status bench_ll_two_trips(struct bench *b) {
    ep_status (*const halves[])(struct bench *) = {
        bench_ll_dispatch_send, bench_ll_dispatch_recv, bench_ll_combine_send,
        bench_ll_combine_recv};
    const int link = b->link;
    for (int i = 0; i < 8; i++) {
        b->link = i % 2;
        EPI_TRY(halves[i / 2](b));
    }
    b->link = link;
    return EP_OK;
}

/* ---- checks ------------------------------------------------------------------------------- */

static float e4m3_value(int code) {
    int exponent = code >> 3, fraction = code & 7;
    return exponent == 0 ? (float)fraction / 512
                         : (float)(8 + fraction) * (float)(1 << exponent) / 1024;
}

/* The nearest of all values, of two the one with the even code. */
static uint8_t e4m3_nearest(float v) {
    float size = v < 0 ? -v : v;
    int code = 0;
    while (code < 126 && (e4m3_value(code + 1) <= size)) {
        code++;
    }
    float below = size - e4m3_value(code);
    float above = code < 126 ? e4m3_value(code + 1) - size : below + 1;
    code += above < below || (above == below && code % 2 == 1);
    return (uint8_t)(code | (v < 0 ? 0x80 : 0));
}

/* A group of 128 of a row as the sender must cast it. Rows are of whole numbers from -15 to 15. */
static float cast_group(const uint16_t *x, uint8_t *out) {
    float amax = 1e-4f;
    uint8_t code[31];
    for (int i = 0; i < 128; i++) {
        float v = bf16_to_float(x[i]), size = v < 0 ? -v : v;
        amax = size > amax ? size : amax;
    }
    for (int v = -15; v <= 15; v++) {
        code[v + 15] = e4m3_nearest((float)v * (448.0f / amax));
    }
    for (int i = 0; i < 128; i++) {
        out[i] = code[(int)bf16_to_float(x[i]) + 15];
    }
    return amax * (1.0f / 448.0f);
}

/* Row `row` of local expert e must be that of (rank, token). */
static bool row_is_right(const struct bench *b, int64_t e, int64_t row, const char *got,
                         int64_t rank, int64_t token) {
    const struct bench_params *p = b->p;
    const struct bench_ll *ll = &b->ll;
    const char *want = bench_row_of(&b->d, rank, token, 2);
    bool right = ll->here.source[e * ll->each + row] == token;
    if (b->item->dtype != BENCH_FP8) {
        return right && memcmp(got, want, (size_t)(2 * p->hidden)) == 0;
    }
    for (int64_t g = 0; right && g < p->hidden / 128; g++) {
        uint8_t cast[128];
        float scale = cast_group((const uint16_t *)(const void *)want + g * 128, cast);
        right = memcmp(got + g * 128, cast, 128) == 0 &&
                ll->here.scales[(e * (p->hidden / 128) + g) * pitch_of(p) + row] == scale;
    }
    return right;
}

static ep_status fetch(const struct bench *b, void *to, const void *from, int64_t bytes) {
    if (b->gpu) {
        return gpu_out(b->gpu, to, from, bytes);
    }
    memcpy(to, from, (size_t)bytes);
    return EP_OK;
}

static ep_status fetch_outputs(const struct bench *b) {
    const struct bench_params *p = b->p;
    const struct bench_ll *ll = &b->ll;
    const int64_t scales = ll->local * (p->hidden / 128) * pitch_of(p);
    EPI_TRY(fetch(b, ll->here.scales, ll->at.scales, scales * (int64_t)sizeof(float)));
    EPI_TRY(fetch(b, ll->here.source, ll->at.source,
                  ll->local * ll->each * (int64_t)sizeof(int32_t)));
    EPI_TRY(fetch(b, ll->here.counts, ll->at.counts, ll->local * (int64_t)sizeof(int32_t)));
    return fetch(b, ll->here.ranges, ll->at.ranges,
                 ll->local * p->ranks * (int64_t)sizeof(int64_t));
}

/* All rows of local expert e, by source, token, k, and where those of each source begin. */
static int check_expert(struct bench *b, int64_t e) {
    const struct bench_params *p = b->p;
    const struct bench_ll *ll = &b->ll;
    const int64_t row_bytes = p->hidden * (b->item->dtype == BENCH_FP8 ? 1 : 2);
    const int64_t per_rank = p->tokens * p->topk;
    const int32_t *ids = b->c->ids;
    int64_t row = 0;
    for (int64_t r = 0; r < p->ranks; r++) {
        int64_t first = row;
        for (int64_t i = r * per_rank; i < (r + 1) * per_rank; i++) {
            if (ids[i] != b->d.first_expert + e) {
                continue;
            }
            ep_status st =
                fetch(b, b->d.at.recv, ll->recv + (e * ll->each + row) * row_bytes, row_bytes);
            int64_t token = i % per_rank / p->topk;
            if (st != EP_OK || !row_is_right(b, e, row, b->d.at.recv, r, token)) {
                return rank_fail(b->rank, st,
                                 "check: row %lld of local expert %lld of %s is not that of "
                                 "rank %lld, token %lld",
                                 (long long)row, (long long)e, b->d.what.s, (long long)r,
                                 (long long)token);
            }
            row++;
        }
        if (ll->here.ranges[e * p->ranks + r] != (first << 32 | (row - first))) {
            return rank_fail(b->rank, EP_OK,
                             "check: %s: the range of rank %lld at local expert %lld is wrong",
                             b->d.what.s, (long long)r, (long long)e);
        }
    }
    if (ll->here.counts[e] != row) {
        return rank_fail(b->rank, EP_OK,
                         "check: %s: local expert %lld counts %d rows, not %lld", b->d.what.s,
                         (long long)e, ll->here.counts[e], (long long)row);
    }
    return 0;
}

int bench_ll_check(struct bench *b) {
    enum bench_kind kind = b->item->op->kind;
    ep_status st = kind != BENCH_LL_COMBINE ? fetch_outputs(b) : EP_OK;
    if (st == EP_OK && b->gpu) {
        st = fetch(b, b->d.at.out, b->at.out, b->p->tokens * 2 * b->p->hidden);
    }
    if (st != EP_OK) {
        return rank_fail(b->rank, st, "fetching the output of %s", b->d.what.s);
    }
    for (int64_t e = 0; kind != BENCH_LL_COMBINE && e < b->ll.local; e++) {
        if (check_expert(b, e) != 0) {
            return 1;
        }
    }
    return kind != BENCH_LL_DISPATCH ? bench_check_combine(&b->d) : 0;
}
