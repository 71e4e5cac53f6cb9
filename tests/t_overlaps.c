/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Memory that arguments may not share, and shapes that reach further than memory does: refused by
 * name before anything is sent. Every output of dispatch and combine, of both modes, is laid on every
 * other tensor of the call; columns of one matrix are not an overlap. A product of shape, stride and element
 * that does not fit is an error, not a crash and not a smaller number.
 */
#include <stdio.h>
#include <string.h>

#include "src/ep/args.h"
#include "tests/tap.h"
#include "tests/world.h"

#define T 4
#define K 2
#define N 8 /* rows of outputs */
#define L 4

struct scene {
    /* A piece for each tensor, in the order of the rules; the largest is a low-latency handle. */
    _Alignas(16) unsigned char piece[EPI_MAX_TENSORS][4096];
    struct ep_tensor tensor[EPI_MAX_TENSORS];
    int32_t ids[T][K];
    struct ep_dispatch_args d;
    struct ep_combine_args c;
    struct ep_ll_dispatch_args ld;
    struct ep_ll_combine_args lc;
    ep_group *group;
    int64_t handle_bytes;
};

static void put(struct scene *s, const struct epi_rules *rules, void *args, const char *name,
                ep_dtype dtype, int64_t rows, int64_t cols) {
    for (int i = 0; i < rules->num; i++) {
        if (strcmp(rules->rule[i].name, name) == 0) {
            if (cols) {
                ep_tensor_2d(&s->tensor[i], dtype, s->piece[i], rows, cols);
            } else {
                ep_tensor_1d(&s->tensor[i], dtype, s->piece[i], rows);
            }
            epi_rule_set(&rules->rule[i], args, &s->tensor[i]);
        }
    }
}

static void make_dispatch(struct scene *s, bool expanded) {
    const struct epi_rules *r = &epi_dispatch_rules;
    s->d = (struct ep_dispatch_args)EP_DISPATCH_ARGS_INIT;
    put(s, r, &s->d, "x", EP_F32, T, 16);
    put(s, r, &s->d, "scales", EP_F32, T, 4);
    put(s, r, &s->d, "topk_weights", EP_F32, T, K);
    put(s, r, &s->d, "recv_x", EP_F32, N, 16);
    put(s, r, &s->d, "recv_scales", EP_F32, N, 4);
    put(s, r, &s->d, "recv_topk_weights", EP_F32, N, expanded ? 0 : K);
    put(s, r, &s->d, "recv_source", EP_I32, N, 2);
    put(s, r, &s->d, "expert_counts", EP_I32, 4, 0);
    put(s, r, &s->d, "num_rows", EP_I32, 1, 0);
    put(s, r, &s->d, "source_ends", EP_I32, 1, 0);
    put(s, r, &s->d, "expert_ends", EP_I32, 4, 0);
    if (expanded) {
        s->d.flags = EP_DISPATCH_EXPANDED;
        put(s, r, &s->d, "expert_offsets", EP_I32, 5, 0);
    } else {
        put(s, r, &s->d, "recv_topk_ids", EP_I32, N, K);
    }
}

static void make_combine(struct scene *s) {
    const struct epi_rules *r = &epi_combine_rules;
    s->c = (struct ep_combine_args)EP_COMBINE_ARGS_INIT;
    put(s, r, &s->c, "x", EP_F32, N, 16);
    put(s, r, &s->c, "weights", EP_F32, N, 0);
    put(s, r, &s->c, "topk_weights", EP_F32, N, K);
    put(s, r, &s->c, "bias[0]", EP_F32, T, 16);
    put(s, r, &s->c, "bias[1]", EP_F32, T, 16);
    put(s, r, &s->c, "out", EP_F32, T, 16);
    put(s, r, &s->c, "out_topk_weights", EP_F32, T, K);
}

/* Of low-latency mode: compact output has tensors of its own. */
static void make_ll_dispatch(struct scene *s, bool compact) {
    const struct epi_rules *d = &epi_ll_dispatch_rules;
    const int64_t lists = compact ? 1 : L;
    s->ld = (struct ep_ll_dispatch_args)EP_LL_DISPATCH_ARGS_INIT;
    s->ld.flags = compact ? EP_LL_COMPACT : 0;
    put(s, d, &s->ld, "x", EP_BF16, T, 16);
    put(s, d, &s->ld, "scales", EP_F32, T, 4);
    put(s, d, &s->ld, "topk_ids", EP_I32, T, K);
    put(s, d, &s->ld, "topk_weights", EP_F32, T, K);
    put(s, d, &s->ld, "handle", EP_U8, s->handle_bytes, 0);
    put(s, d, &s->ld, "recv_x", EP_BF16, lists * T, 16);
    put(s, d, &s->ld, "recv_scales", EP_F32, lists * 4, T);
    put(s, d, &s->ld, "recv_source", EP_I32, lists * T, 0);
    put(s, d, &s->ld, "expert_counts", EP_I32, L, 0);
    put(s, d, &s->ld, "expert_totals", EP_I32, L, 0);
    put(s, d, &s->ld, "ranges", EP_I64, lists, 1);
    put(s, d, &s->ld, "wait_ns", EP_I64, 1, 0);
    if (compact) {
        put(s, d, &s->ld, "recv_topk_ids", EP_I32, T, K);
        put(s, d, &s->ld, "recv_topk_weights", EP_F32, T, K);
    }
}

static void make_ll_combine(struct scene *s) {
    const struct epi_rules *r = &epi_ll_combine_rules;
    s->lc = (struct ep_ll_combine_args)EP_LL_COMBINE_ARGS_INIT;
    put(s, r, &s->lc, "handle", EP_U8, s->handle_bytes, 0);
    put(s, r, &s->lc, "x", EP_BF16, L * T, 16);
    put(s, r, &s->lc, "topk_weights", EP_F32, T, K);
    put(s, r, &s->lc, "out", EP_BF16, T, 16);
    put(s, r, &s->lc, "wait_ns", EP_I64, 1, 0);
}

/* The call, in one step or in two. */
static ep_status call(struct scene *s, ep_handle *h, char which) {
    return which == 'l'   ? ep_ll_dispatch(s->group, &s->ld, NULL)
           : which == 'm' ? ep_ll_combine(s->group, &s->lc, NULL)
           : which == 'd' ? ep_dispatch(h, &s->d, NULL)
           : which == 'c' ? ep_combine(h, &s->c, NULL)
           : which == 'g' ? ep_combine_finish(h, &s->c, NULL)
                          : ep_dispatch_finish(h, &s->d, NULL);
}

static bool refused(ep_status st, const char *a, const char *b) {
    return st == EP_ERR_ARG && strstr(ep_last_error(), a) && strstr(ep_last_error(), b);
}

/* Lays each tensor on each other one of which one is an output: at its beginning, and so that its
 * last byte is the other's first. */
static void every_pair(struct scene *s, ep_handle *h, const struct epi_rules *rules, void *args,
                       char which, const char *what) {
    int pairs = 0, wrong = 0;
    for (int a = 0; a < rules->num; a++) {
        for (int b = 0; b < rules->num; b++) {
            const struct epi_rule *x = &rules->rule[a], *y = &rules->rule[b];
            if (a == b || !((x->role | y->role) & EPI_OUT) || !epi_rule_tensor(x, args) ||
                !epi_rule_tensor(y, args) ||
                ((which == 'f' || which == 'g') && !(x->role & EPI_OUT))) {
                continue;
            }
            const struct ep_tensor was = s->tensor[a];
            pairs++;
            s->tensor[a].data = s->piece[b];
            if (!refused(call(s, h, which), x->name, y->name)) {
                diag("%s: %s on %s: %s", what, x->name, y->name, ep_last_error());
                wrong++;
            }
            s->tensor[a] = was;
        }
    }
    ok(pairs > 10 && wrong == 0, "%s: %d pairs, %d not refused", what, pairs, wrong);
}

static void side_by_side(struct scene *s, ep_handle *h) {
    static _Alignas(16) int32_t both[N][2 * K];
    make_dispatch(s, false);
    s->d.recv_topk_ids->data = both;
    s->d.recv_topk_weights->data = &both[0][K];
    s->d.recv_topk_ids->stride[0] = s->d.recv_topk_weights->stride[0] = 2 * K;
    ok(ep_dispatch(h, &s->d, NULL) == EP_OK, "ids and weights as columns of one matrix: %s",
       ep_last_error());
    s->d.recv_topk_weights->data = &both[0][K - 1];
    ok(refused(ep_dispatch(h, &s->d, NULL), "recv_topk_weights", "recv_topk_ids"),
       "and where a column is common: %s", ep_last_error());
}

/* A column of one element beside rows, and a matrix that is stored column by column, each second
 * row of another. */
static void column_beside_rows(struct scene *s, ep_handle *h) {
    static _Alignas(16) float both[N][20];
    static int32_t ids[K][2][N];
    make_dispatch(s, true);
    s->d.recv_x->data = both;
    s->d.recv_topk_weights->data = &both[0][16];
    s->d.recv_x->stride[0] = s->d.recv_topk_weights->stride[0] = 20;
    ok(ep_dispatch(h, &s->d, NULL) == EP_OK, "a weight behind each row: %s", ep_last_error());
    s->d.recv_topk_weights->data = &both[0][15];
    ok(refused(ep_dispatch(h, &s->d, NULL), "recv_topk_weights", "recv_x"),
       "and one within each: %s", ep_last_error());
    make_dispatch(s, false);
    s->d.recv_topk_ids->data = ids;
    s->d.recv_topk_weights->data = &ids[0][1];
    for (int i = 0; i < 2; i++) {
        struct ep_tensor *t = i ? s->d.recv_topk_ids : s->d.recv_topk_weights;
        t->stride[0] = 1;
        t->stride[1] = 2 * N;
    }
    ok(ep_dispatch(h, &s->d, NULL) == EP_OK, "columns of ids and weights in turn: %s",
       ep_last_error());
    s->d.recv_topk_weights->data = &ids[0][0][N - 1];
    ok(refused(ep_dispatch(h, &s->d, NULL), "recv_topk_weights", "recv_topk_ids"),
       "and one that reaches into another: %s", ep_last_error());
}

/* ---- shapes and strides that no memory has -------------------------------------------------- */

static const int64_t wild[] = {INT64_MAX,
                               INT64_MIN,
                               INT64_MAX / 2,
                               (INT64_C(1) << 62) + 8,
                               (INT64_C(1) << 62) + 16,
                               (INT64_C(1) << 61) + 4,
                               (INT64_C(1) << 61) + 100000,
                               INT64_C(1) << 40,
                               -1};
#define NUM_WILD (sizeof(wild) / sizeof(wild[0]))

/* Puts a wild number in each place of each tensor: it is refused, by the name of the tensor or of
 * another that should be as long. Left out is what a call may have: any stride of a dimension of one
 * element, and strides that some memory could have. */
static void every_number(struct scene *s, ep_handle *h, const struct epi_rules *rules,
                         void *args, char which, const char *what) {
    int tried = 0, wrong = 0;
    for (int a = 0; a < rules->num; a++) {
        struct ep_tensor *t = epi_rule_tensor(&rules->rule[a], args);
        for (int place = 0; t && place < 2 * t->ndim; place++) {
            for (size_t i = 0; i < NUM_WILD; i++) {
                const struct ep_tensor was = *t;
                const int dim = place / 2;
                *(place % 2 ? &t->stride[dim] : &t->shape[dim]) = wild[i];
                const bool may = place % 2 && was.shape[dim] < 2;
                const bool real = place % 2 && (wild[i] == -1 || wild[i] == INT64_C(1) << 40);
                if (!may && !real && ++tried && call(s, h, which) != EP_ERR_ARG) {
                    diag("%s: %s, %s[%d] %lld: %s", what, rules->rule[a].name,
                         place % 2 ? "stride" : "shape", dim, (long long)wild[i],
                         ep_last_error());
                    wrong++;
                }
                *t = was;
            }
        }
    }
    ok(tried > 100 && wrong == 0, "%s: %d wild numbers, %d not refused", what, tried, wrong);
}

static void wild_pairs(struct scene *s, ep_handle *h) {
    int wrong = 0;
    for (size_t i = 0; i < NUM_WILD; i++) {
        make_dispatch(s, false);
        s->tensor[0].shape[1] = s->d.recv_x->shape[1] = wild[i]; /* of x */
        wrong += !refused(ep_dispatch(h, &s->d, NULL), "x", "");
        make_dispatch(s, false);
        s->tensor[1].shape[1] = s->d.recv_scales->shape[1] = wild[i];
        wrong += !refused(ep_dispatch(h, &s->d, NULL), "scales", "");
        struct ep_tensor view = EP_TENSOR_INIT;
        wrong += ep_handle_arena(h, 0, EP_F32, wild[i], &view) != EP_ERR_ARG;
    }
    ok(wrong == 0, "rows, scales and views of wild lengths, input and output alike");
}

/* So many rows in each tensor that has one for each token or received row, with a stride that no
 * element is found by. */
static void idle_strides(const struct epi_rules *rules, void *args, int64_t rows,
                         int64_t stride) {
    for (int i = 0; i < rules->num; i++) {
        const uint8_t dim = rules->rule[i].dim[0];
        struct ep_tensor *t = epi_rule_tensor(&rules->rule[i], args);
        if (t && (dim == EPI_DIM_T || dim == EPI_DIM_ROWS)) {
            t->shape[0] = rows;
        }
        if (t && t->shape[0] < 2) {
            t->stride[0] = stride;
        }
    }
}

static void few_rows(struct scene *s, ep_handle *h, int64_t rows) {
    struct ep_routing r = EP_ROUTING_INIT;
    struct ep_tensor ids;
    int wrong = 0;
    ep_tensor_2d(&ids, EP_I32, s->ids, rows, K);
    r.topk_ids = &ids;
    for (size_t i = 0; i < NUM_WILD; i++) {
        ids.stride[0] = wild[i];
        wrong += ep_handle_route(h, &r, NULL) != EP_OK;
        make_dispatch(s, false);
        idle_strides(&epi_dispatch_rules, &s->d, rows, wild[i]);
        wrong += ep_dispatch(h, &s->d, NULL) != EP_OK;
        make_combine(s);
        idle_strides(&epi_combine_rules, &s->c, rows, wild[i]);
        wrong += ep_combine(h, &s->c, NULL) != EP_OK;
    }
    ok(wrong == 0, "%lld rows, with any stride from one to the next", (long long)rows);
}

/* Low-latency mode, each operation in one call; a receive alone is told of more scales than the group
 * has. */
static void low_latency(struct scene *s, struct world *w) {
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    s->group = w->group;
    ok(ep_group_plan(w->group, &plan) == EP_OK &&
           plan.ll_handle_bytes <= (int64_t)sizeof(s->piece[0]),
       "a handle of %lld bytes", (long long)plan.ll_handle_bytes);
    s->handle_bytes = plan.ll_handle_bytes;
    make_ll_dispatch(s, true);
    every_pair(s, NULL, &epi_ll_dispatch_rules, &s->ld, 'l', "compact low-latency dispatch");
    make_ll_dispatch(s, false);
    every_pair(s, NULL, &epi_ll_dispatch_rules, &s->ld, 'l', "low-latency dispatch");
    every_number(s, NULL, &epi_ll_dispatch_rules, &s->ld, 'l', "low-latency dispatch");
    ok(ep_ll_dispatch_send(w->group, &s->ld, NULL) == EP_OK, "send: %s", ep_last_error());
    for (int64_t more = 5; more < INT64_C(1) << 40; more *= 1 << 12) {
        s->ld.recv_scales->shape[0] = more * L;
        s->ld.recv_scales->data = (void *)(uintptr_t)(1u << 20); /* far from all others */
        ok(refused(ep_ll_dispatch_recv(w->group, &s->ld, NULL), "scales", "max_scale_bytes"),
           "%lld scales are received: %s", (long long)more, ep_last_error());
    }
    make_ll_dispatch(s, false);
    ok(ep_ll_dispatch_recv(w->group, &s->ld, NULL) == EP_OK, "receive: %s", ep_last_error());
    memcpy(s->piece[0], s->ld.handle->data, (size_t)s->handle_bytes); /* combine's first */
    make_ll_combine(s);
    every_pair(s, NULL, &epi_ll_combine_rules, &s->lc, 'm', "low-latency combine");
    every_number(s, NULL, &epi_ll_combine_rules, &s->lc, 'm', "low-latency combine");
    ok(ep_ll_combine(w->group, &s->lc, NULL) == EP_OK, "the right one: %s", ep_last_error());
}

static void body(struct world *w) {
    static struct scene s;
    struct ep_routing r = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_handle *h = NULL;

    for (int t = 0; t < T; t++) {
        s.ids[t][0] = t;
        s.ids[t][1] = 3 - t;
    }
    ep_tensor_2d(&ids, EP_I32, s.ids, T, K);
    r.topk_ids = &ids;
    ok(ep_handle_create(&h, w->group, NULL) == EP_OK && ep_handle_route(h, &r, NULL) == EP_OK,
       "a routed handle: %s", ep_last_error());
    make_dispatch(&s, true);
    every_pair(&s, h, &epi_dispatch_rules, &s.d, 'd', "expanded dispatch");
    make_dispatch(&s, false);
    every_pair(&s, h, &epi_dispatch_rules, &s.d, 'd', "dispatch");
    every_number(&s, h, &epi_dispatch_rules, &s.d, 'd', "dispatch");
    ok(ep_dispatch_begin(h, &s.d, NULL) == EP_OK, "begin: %s", ep_last_error());
    every_pair(&s, h, &epi_dispatch_rules, &s.d, 'f', "finish, also on what begin reads");
    ok(ep_dispatch_finish(h, &s.d, NULL) == EP_OK, "finish: %s", ep_last_error());
    side_by_side(&s, h);
    column_beside_rows(&s, h);
    wild_pairs(&s, h);
    make_dispatch(&s, false);
    ok(ep_dispatch(h, &s.d, NULL) == EP_OK, "the right dispatch: %s", ep_last_error());
    make_combine(&s);
    every_pair(&s, h, &epi_combine_rules, &s.c, 'c', "combine");
    every_number(&s, h, &epi_combine_rules, &s.c, 'c', "combine");
    ok(ep_combine_begin(h, &s.c, NULL) == EP_OK, "begin: %s", ep_last_error());
    every_pair(&s, h, &epi_combine_rules, &s.c, 'g', "finish, also on what begin reads");
    ok(ep_combine_finish(h, &s.c, NULL) == EP_OK, "the right combine: %s", ep_last_error());
    few_rows(&s, h, 1);
    few_rows(&s, h, 0);
    ep_handle_destroy(&h);
    low_latency(&s, w);
}

int main(void) {
    struct world_setup s;

    tap_deadline(60);
    world_defaults(&s, 1);
    s.host = true;
    s.config.max_scale_bytes = 16;
    s.config.ll_max_tokens = T;
    s.body = body;
    ok(world_run(&s) == 0, "a group of one rank");
    return done_testing();
}
