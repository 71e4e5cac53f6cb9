/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Every argument of route, layout, dispatch and combine that breaks its rule: the right status,
 * a message that names the argument and its value, before anything is sent: the peer of a rank
 * that errs just waits for the right call.
 */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define TOKENS 3
#define TOPK 2
#define MAX_ROWS 6 /* both ranks' tokens at most */

/* Right arguments, to be spoiled one by one. Group: 2 ranks, 8 experts, 16 tokens, top-4. */
struct scene {
    int64_t ids[TOKENS][8];
    _Alignas(16) uint8_t x[17][512], scales[TOKENS][64], mask[17][2];
    float weights[TOKENS][TOPK];
    _Alignas(16) uint8_t recv_x[MAX_ROWS][512], recv_scales[MAX_ROWS][64], y[MAX_ROWS][512];
    _Alignas(16) uint8_t out[TOKENS][512], bias[TOKENS][512];
    int64_t recv_ids[MAX_ROWS][TOPK];
    float recv_weights[MAX_ROWS][TOPK], back[TOKENS][TOPK];
    int32_t source[MAX_ROWS][2], counts[8], offsets[9], num_rows[1];
    struct ep_tensor ids_t, mask_t, x_t, scales_t, weights_t, recv_x_t, recv_scales_t,
        recv_ids_t, recv_weights_t, source_t, counts_t, offsets_t, num_rows_t, y_t, yw_t, out_t,
        bias_t, back_t;
    struct ep_routing r;
    struct ep_dispatch_args d;
    struct ep_combine_args c;
};

static void scene_reset(struct scene *s) {
    memset(s, 0, sizeof(*s));
    for (int t = 0; t < TOKENS; t++) {
        s->ids[t][0] = t;
        s->ids[t][1] = 7 - t;
    }
    ep_tensor_2d(&s->ids_t, EP_I64, s->ids, TOKENS, TOPK);
    s->ids_t.stride[0] = 8;
    ep_tensor_2d(&s->mask_t, EP_U8, s->mask, TOKENS, 2);
    ep_tensor_2d(&s->x_t, EP_BF16, s->x, TOKENS, 64);
    ep_tensor_2d(&s->scales_t, EP_F32, s->scales, TOKENS, 2);
    ep_tensor_2d(&s->weights_t, EP_F32, s->weights, TOKENS, TOPK);
    ep_tensor_2d(&s->recv_x_t, EP_BF16, s->recv_x, MAX_ROWS, 64);
    ep_tensor_2d(&s->recv_scales_t, EP_F32, s->recv_scales, MAX_ROWS, 2);
    ep_tensor_2d(&s->recv_ids_t, EP_I64, s->recv_ids, MAX_ROWS, TOPK);
    ep_tensor_2d(&s->recv_weights_t, EP_F32, s->recv_weights, MAX_ROWS, TOPK);
    ep_tensor_2d(&s->source_t, EP_I32, s->source, MAX_ROWS, 2);
    ep_tensor_1d(&s->counts_t, EP_I32, s->counts, 4);
    ep_tensor_1d(&s->offsets_t, EP_I32, s->offsets, 5);
    ep_tensor_1d(&s->num_rows_t, EP_I32, s->num_rows, 1);
    ep_tensor_2d(&s->y_t, EP_BF16, s->y, MAX_ROWS, 64);
    ep_tensor_1d(&s->yw_t, EP_F32, s->recv_weights, MAX_ROWS);
    ep_tensor_2d(&s->out_t, EP_BF16, s->out, TOKENS, 64);
    ep_tensor_2d(&s->bias_t, EP_BF16, s->bias, TOKENS, 64);
    ep_tensor_2d(&s->back_t, EP_F32, s->back, TOKENS, TOPK);
    s->r = (struct ep_routing)EP_ROUTING_INIT;
    s->r.topk_ids = &s->ids_t;
    s->d = (struct ep_dispatch_args)EP_DISPATCH_ARGS_INIT;
    s->d.x = &s->x_t;
    s->d.scales = &s->scales_t;
    s->d.topk_weights = &s->weights_t;
    s->d.recv_x = &s->recv_x_t;
    s->d.recv_scales = &s->recv_scales_t;
    s->d.recv_topk_ids = &s->recv_ids_t;
    s->d.recv_topk_weights = &s->recv_weights_t;
    s->d.recv_source = &s->source_t;
    s->d.expert_counts = &s->counts_t;
    s->d.num_rows = &s->num_rows_t;
    s->c = (struct ep_combine_args)EP_COMBINE_ARGS_INIT;
    s->c.x = &s->y_t;
    s->c.weights = &s->yw_t;
    s->c.topk_weights = &s->recv_weights_t;
    s->c.bias[0] = &s->bias_t;
    s->c.out = &s->out_t;
    s->c.out_topk_weights = &s->back_t;
}

/* One field of a tensor, a pointer to a tensor or a number of the arguments is set to value. */
enum field { DTYPE, NDIM, ROWS, COLS, STRIDE0, STRIDE1, DATA_NULL, POINTER_NULL, NUMBER };

struct rule {
    const char *words; /* that the message must have: the argument, the value, the limit */
    size_t at;         /* offset in the scene */
    enum field field;
    int64_t value;
};

#define AT(member) offsetof(struct scene, member)

static const struct rule routing_rules[] = {
    {"topk_ids|token_in_rank", AT(r.topk_ids), POINTER_NULL, 0},
    {"topk_ids|EP_F32", AT(ids_t), DTYPE, EP_F32},
    {"topk_ids|1", AT(ids_t), NDIM, 1},
    {"topk_ids|0", AT(ids_t), NDIM, 0},
    {"topk_ids|5", AT(ids_t), NDIM, EP_MAX_DIMS + 1},
    {"topk_ids|-1", AT(ids_t), ROWS, -1},
    {"topk_ids|5|4", AT(ids_t), COLS, 5},
    {"topk_ids|NULL", AT(ids_t), DATA_NULL, 0},
    {"8|token 2|k 1", AT(ids[2][1]), NUMBER, 8},
    {"-2|token 1|k 0", AT(ids[1][0]), NUMBER, -2},
    {"100|token 0|k 1", AT(ids[0][1]), NUMBER, 100},
    {NULL, 0, DTYPE, 0},
};

static const struct rule dispatch_rules[] = {
    {"x|NULL", AT(d.x), POINTER_NULL, 0},
    {"x|NULL", AT(x_t), DATA_NULL, 0},
    {"x|4|3", AT(x_t), ROWS, 4},
    {"x|120|16", AT(x_t), COLS, 60},
    {"x|272|256|max_row_bytes", AT(x_t), COLS, 136},
    {"x|0", AT(x_t), COLS, 0},
    {"x|2", AT(x_t), STRIDE1, 2},
    {"x|99", AT(x_t), DTYPE, 99},
    {"x|1", AT(x_t), NDIM, 1},
    {"scales|2|3", AT(scales_t), ROWS, 2},
    {"scales|36|32|max_scale_bytes", AT(scales_t), COLS, 9},
    {"scales|160|32|max_scale_bytes", AT(scales_t), COLS, 40},
    {"scales|EP_I64", AT(scales_t), DTYPE, EP_I64},
    {"topk_weights|EP_F16", AT(weights_t), DTYPE, EP_F16},
    {"topk_weights|1|2", AT(weights_t), COLS, 1},
    {"topk_weights|4|3", AT(weights_t), ROWS, 4},
    {"flags", AT(d.flags), NUMBER, 1 << 20},
    {"alignment|-1", AT(d.alignment), NUMBER, -1},
    {"num_workers|-4", AT(d.num_workers), NUMBER, -4},
    {"recv_x|EP_F16|EP_BF16", AT(recv_x_t), DTYPE, EP_F16},
    {"recv_x|32|64", AT(recv_x_t), COLS, 32},
    {"recv_x|2", AT(recv_x_t), STRIDE1, 2},
    {"recv_x|32", AT(recv_x_t), STRIDE0, 32},
    {"recv_x|NULL", AT(recv_x_t), DATA_NULL, 0},
    {"recv_scales|EP_I32|EP_F32", AT(recv_scales_t), DTYPE, EP_I32},
    {"recv_scales|1|2", AT(recv_scales_t), COLS, 1},
    {"recv_scales|3", AT(recv_scales_t), STRIDE0, 3},
    {"recv_scales|5|6", AT(recv_scales_t), ROWS, 5},
    {"recv_scales|scales", AT(d.scales), POINTER_NULL, 0},
    {"recv_scales|2", AT(d.flags), NUMBER, EP_DISPATCH_SCALES_COLUMN_MAJOR},
    {"recv_topk_ids|EP_F32", AT(recv_ids_t), DTYPE, EP_F32},
    {"recv_topk_ids|4|2", AT(recv_ids_t), COLS, 4},
    {"recv_topk_weights|EP_BF16", AT(recv_weights_t), DTYPE, EP_BF16},
    {"recv_topk_weights|topk_weights", AT(d.topk_weights), POINTER_NULL, 0},
    {"recv_source|EP_I64", AT(source_t), DTYPE, EP_I64},
    {"recv_source|3|2", AT(source_t), COLS, 3},
    {"recv_source|4|6", AT(source_t), ROWS, 4},
    {"expert_counts|3|4", AT(counts_t), ROWS, 3},
    {"expert_counts|EP_I64", AT(counts_t), DTYPE, EP_I64},
    {"expert_counts|2", AT(counts_t), STRIDE0, 2},
    {"num_rows|2|1", AT(num_rows_t), ROWS, 2},
    {"num_rows|EP_I64", AT(num_rows_t), DTYPE, EP_I64},
    {NULL, 0, DTYPE, 0},
};

static const struct rule combine_rules[] = {
    {"x|NULL", AT(c.x), POINTER_NULL, 0},
    {"out|NULL", AT(c.out), POINTER_NULL, 0},
    {"x|EP_U8", AT(y_t), DTYPE, EP_U8},
    {"x|2", AT(y_t), STRIDE1, 2},
    {"out|32|64", AT(out_t), COLS, 32},
    {"out|EP_F16|EP_BF16", AT(out_t), DTYPE, EP_F16},
    {"out|2|3", AT(out_t), ROWS, 2},
    {"bias|4|3", AT(bias_t), ROWS, 4},
    {"bias|EP_F32|EP_BF16", AT(bias_t), DTYPE, EP_F32},
    {"weights|5|6", AT(yw_t), ROWS, 5},
    {"weights|EP_BF16", AT(yw_t), DTYPE, EP_BF16},
    {"topk_weights|1|2", AT(recv_weights_t), COLS, 1},
    {"out_topk_weights|4|2", AT(back_t), COLS, 4},
    {"out_topk_weights|EP_I32", AT(back_t), DTYPE, EP_I32},
    {"out_topk_weights|topk_weights", AT(c.topk_weights), POINTER_NULL, 0},
    {"flags|1", AT(c.flags), NUMBER, 1},
    {"num_workers|-1", AT(c.num_workers), NUMBER, -1},
    {NULL, 0, DTYPE, 0},
};

static void spoil(struct scene *s, const struct rule *rule) {
    char *at = (char *)s + rule->at;
    struct ep_tensor *t = (struct ep_tensor *)(void *)at;

    switch (rule->field) {
    case DTYPE:
        t->dtype = (int32_t)rule->value;
        break;
    case NDIM:
        t->ndim = (int32_t)rule->value;
        break;
    case ROWS:
    case COLS:
        t->shape[rule->field - ROWS] = rule->value;
        break;
    case STRIDE0:
    case STRIDE1:
        t->stride[rule->field - STRIDE0] = rule->value;
        break;
    case DATA_NULL:
        t->data = NULL;
        break;
    case POINTER_NULL:
        memset(at, 0, sizeof(void *));
        break;
    default:
        memcpy(at, &rule->value, 4); /* little endian; ids are small */
        if (rule->value < 0 && rule->at < AT(x)) {
            memset(at + 4, 0xFF, 4);
        }
    }
}

static void expanded(struct scene *s) {
    s->d.flags = EP_DISPATCH_EXPANDED;
    s->d.recv_topk_ids = NULL;
    s->d.recv_topk_weights = &s->yw_t;
    s->d.expert_offsets = &s->offsets_t;
}

/* Rules of a dispatch that take more than one change; returns the words, NULL at the end. */
static const char *spoil_dispatch(struct scene *s, int i) {
    switch (i) {
    case 0:
        s->recv_x_t.data = (uint8_t *)s->x + 256; /* x has 384 bytes */
        return "recv_x|overlap";
    case 1:
        s->recv_scales_t.data = s->scales;
        return "recv_scales|overlap";
    case 2:
        s->d.flags = EP_DISPATCH_SCALES_COLUMN_MAJOR;
        s->recv_scales_t.stride[0] = 1;
        s->recv_scales_t.stride[1] = 7;
        return "recv_scales|7|16";
    case 3:
        expanded(s);
        s->d.recv_topk_ids = &s->recv_ids_t;
        return "recv_topk_ids|expanded";
    case 4:
        expanded(s);
        s->d.flags = 0;
        s->d.recv_topk_weights = NULL;
        return "expert_offsets|expanded";
    case 5:
        expanded(s);
        s->offsets_t.shape[0] = 4;
        return "expert_offsets|4|5";
    case 6:
        expanded(s);
        s->d.recv_topk_weights = &s->recv_weights_t;
        return "recv_topk_weights|2";
    case 7:
        s->x_t.data = (uint8_t *)s->x + 2;
        return "x|16";
    case 8:
        s->recv_x_t.data = (uint8_t *)s->recv_x + 8;
        return "recv_x|16";
    default:
        return NULL;
    }
}

static const char *spoil_combine(struct scene *s, int i) {
    switch (i) {
    case 0:
        s->out_t.data = (uint8_t *)s->y + 640; /* its last row */
        return "out|overlap|x";
    case 1:
        s->out_t.data = s->bias;
        return "out|overlap|bias";
    case 2:
        s->y_t.shape[1] = s->out_t.shape[1] = s->bias_t.shape[1] = 63;
        return "x|126|16";
    case 3:
        s->y_t.shape[1] = s->out_t.shape[1] = s->bias_t.shape[1] = 136;
        return "x|272|256|max_row_bytes";
    case 4:
        if (gpu_wanted()) { /* found by the enqueued work: see short_answers */
            return NULL;
        }
        s->y_t.shape[0] = s->recv_weights_t.shape[0] = s->yw_t.shape[0] = 1;
        return "x|1|6";
    default:
        return NULL;
    }
}

/* ---- the calls ------------------------------------------------------------------------- */

static ep_status call(struct scene *s, ep_handle *handle, char which) {
    return which == 'r'   ? call_route(handle, &s->r, NULL)
           : which == 'd' ? call_dispatch(handle, &s->d, NULL)
                          : call_combine(handle, &s->c, NULL);
}

/* The host of a CUDA group knows where a bad id is, and not which. */
static const char *words_of(const char *words) {
    return gpu_wanted() && strstr(words, "token ") ? "topk_ids[|treated as -1" : words;
}

/* Each rule of a table, then those of a function; which: r(oute), d(ispatch), c(ombine). */
static void each(struct world *w, struct scene *s, ep_handle *handle, char which,
                 const struct rule *rules, const char *(*more)(struct scene *s, int i)) {
    char what[128];

    for (const struct rule *rule = rules; rule->words; rule++) {
        scene_reset(s);
        spoil(s, rule);
        snprintf(what, sizeof(what), "%c %d: %s", which, (int)(rule - rules), rule->words);
        world_fails(w, call(s, handle, which), EP_ERR_ARG, words_of(rule->words), what);
    }
    for (int i = 0; more; i++) {
        const char *words;

        scene_reset(s);
        words = more(s, i);
        if (!words) {
            break;
        }
        snprintf(what, sizeof(what), "%c more %d: %s", which, i, words);
        world_fails(w, call(s, handle, which), EP_ERR_ARG, words_of(words), what);
    }
    scene_reset(s);
}

/* What a mask needs, and an id that does not fit in 32 bits. */
static const char *spoil_routing(struct scene *s, int i) {
    switch (i) {
    case 0:
        s->r.token_in_rank = &s->mask_t;
        return "topk_ids|token_in_rank";
    case 1:
        s->r.topk_ids = NULL;
        s->r.token_in_rank = &s->mask_t;
        return "token_in_rank|mask_routing";
    case 2:
        s->ids[0][1] = INT64_C(1) << 32;
        return "4294967296|token 0|k 1";
    case 3:
        s->ids[1][0] = s->ids[2][1] = 55; /* the first of several */
        return "55|token 1|k 0";
    default:
        return NULL;
    }
}

static void versions(struct world *w, struct scene *s, ep_handle *handle) {
    /* The tail is what lies behind it in the scene; call_route's copy would have none. */
    s->r.size += 8;
    world_fails(w, ep_handle_route(handle, &s->r, NULL), EP_ERR_VERSION, "ep_routing", "route");
    scene_reset(s);
    s->ids_t.size = 0;
    world_fails(w, call_route(handle, &s->r, NULL), EP_ERR_VERSION, "topk_ids", "tensor");
    scene_reset(s);
    s->d.size--;
    world_fails(w, call_dispatch(handle, &s->d, NULL), EP_ERR_VERSION, "ep_dispatch_args",
                "args");
    scene_reset(s);
    s->recv_x_t.size = 1;
    world_fails(w, call_dispatch(handle, &s->d, NULL), EP_ERR_VERSION, "recv_x", "tensor");
    scene_reset(s);
    s->c.size = 4000;
    world_fails(w, call_combine(handle, &s->c, NULL), EP_ERR_VERSION, "ep_combine_args",
                "args");
    scene_reset(s);
    world_fails(w, call_dispatch(NULL, &s->d, NULL), EP_ERR_ARG, "handle|NULL", "no handle");
    world_fails(w, call_dispatch(handle, NULL, NULL), EP_ERR_ARG, "args|NULL", "no args");
    world_fails(w, call_combine(NULL, &s->c, NULL), EP_ERR_ARG, "handle|NULL", "no handle");
    world_fails(w, call_combine(handle, NULL, NULL), EP_ERR_ARG, "args|NULL", "no args");
    world_fails(w, call_route(NULL, &s->r, NULL), EP_ERR_ARG, "handle|NULL", "no handle");
    world_fails(w, call_route(handle, NULL, NULL), EP_ERR_ARG, "routing|NULL", "nothing");
}

/* A handle of its own limits, below the group's. */
static void small_handle(struct world *w, struct scene *s) {
    struct ep_handle_config config = EP_HANDLE_CONFIG_INIT;
    struct ep_tensor one = *s->r.topk_ids; /* again and again */
    struct ep_routing r = s->r;
    ep_handle *handle = NULL;

    config.max_tokens = 2;
    world_is(w, ep_handle_create(&handle, w->group, &config), EP_OK, "ep_handle_create");
    world_fails(w, call_route(handle, &s->r, NULL), EP_ERR_ARG, "topk_ids|3|2", "tokens");
    one.shape[0] = (1 << 24) + 1;
    one.stride[0] = 0;
    r.topk_ids = &one;
    world_fails(w, call_route(handle, &r, NULL), EP_ERR_ARG, "topk_ids|16777217|2",
                "tokens that no group has room for");
    ep_handle_destroy(&handle);
    config.max_tokens = 0;
    config.max_topk = 1;
    world_is(w, ep_handle_create(&handle, w->group, &config), EP_OK, "ep_handle_create");
    world_fails(w, call_route(handle, &s->r, NULL), EP_ERR_ARG, "topk_ids|2|1", "top-k");
    ep_handle_destroy(&handle);
}

static void layouts(struct world *w, struct scene *s, ep_handle *handle) {
    struct ep_layout layout = EP_LAYOUT_INIT;
    struct ep_tensor t;

    layout.tokens_per_rank = layout.tokens_per_expert = NULL;
    ep_tensor_1d(&t, EP_I32, s->counts, 3);
    layout.tokens_per_rank = &t;
    world_fails(w, call_layout(handle, &layout, NULL), EP_ERR_ARG, "tokens_per_rank|3|2",
                "layout");
    layout.tokens_per_rank = NULL;
    layout.tokens_per_expert = &t;
    ep_tensor_1d(&t, EP_I64, s->recv_ids, 8);
    world_fails(w, call_layout(handle, &layout, NULL), EP_ERR_ARG, "tokens_per_expert|EP_I64",
                "layout");
    layout.tokens_per_expert = NULL;
    layout.token_in_rank = &t;
    ep_tensor_2d(&t, EP_U8, s->recv_x, TOKENS, 3);
    world_fails(w, call_layout(handle, &layout, NULL), EP_ERR_ARG, "token_in_rank|3|2",
                "layout");
    layout.size = 12;
    world_fails(w, call_layout(handle, &layout, NULL), EP_ERR_VERSION, "ep_layout", "size");
}

/* Used before its time; a route that failed leaves the handle unrouted, except on a device,
 * where it is found out later and the id counts as -1. */
static void states(struct world *w, struct scene *s, ep_handle *handle) {
    int64_t rows;

    for (int i = 0; i < (gpu_wanted() ? 1 : 2); i++) {
        world_fails(w, call_dispatch(handle, &s->d, NULL), EP_ERR_STATE, "rout", "not routed");
        world_fails(w, call_combine(handle, &s->c, NULL), EP_ERR_STATE, "dispatch",
                    "not dispatched");
        world_fails(w, ep_handle_counts(handle, &rows, NULL, NULL), EP_ERR_STATE, "dispatch",
                    "not dispatched");
        if (i == 0) {
            world_is(w, call_route(handle, &s->r, NULL), EP_OK, "ep_handle_route");
            s->ids[1][1] = 77;
            world_fails(w, call_route(handle, &s->r, NULL), EP_ERR_ARG, "77", "a bad id");
            scene_reset(s);
        }
    }
}

static void body(struct world *w) {
    struct pool pool = {0};
    struct scene *s = pool_zero(&pool, sizeof(*s));
    ep_handle *handle = NULL;

    scene_reset(s);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    states(w, s, handle);
    each(w, s, handle, 'r', routing_rules, spoil_routing);
    small_handle(w, s);
    world_is(w, call_route(handle, &s->r, NULL), EP_OK, "ep_handle_route");
    layouts(w, s, handle);
    /* Rank 1 makes the right call at once, and waits in it while rank 0 errs. */
    if (w->rank == 0) {
        each(w, s, handle, 'd', dispatch_rules, spoil_dispatch);
        versions(w, s, handle);
    }
    world_is(w, call_dispatch(handle, &s->d, NULL), EP_OK, "ep_dispatch");
    if (w->rank == 0) {
        each(w, s, handle, 'c', combine_rules, spoil_combine);
    }
    world_is(w, call_combine(handle, &s->c, NULL), EP_OK, "ep_combine");
    ep_handle_destroy(&handle);
    pool_free(&pool);
}

/* On a device only the kernel of combine knows how many rows there must be: a fault. */
static void short_answers(struct world *w) {
    struct pool pool = {0};
    struct scene *s = pool_zero(&pool, sizeof(*s));
    struct ep_fault fault = EP_FAULT_INIT;
    ep_handle *handle = NULL;

    scene_reset(s);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, call_route(handle, &s->r, NULL), EP_OK, "ep_handle_route");
    world_is(w, call_dispatch(handle, &s->d, NULL), EP_OK, "ep_dispatch");
    world_barrier(w); /* the fault ends the group, also for who has not yet looked at a call */
    if (w->rank == 0) {
        s->y_t.shape[0] = s->recv_weights_t.shape[0] = s->yw_t.shape[0] = 1;
    }
    world_fails(w, call_combine(handle, &s->c, NULL), EP_ERR_ARG,
                w->rank == 0 ? "x.shape[0] is 1|6" : "rank 0", "too few rows");
    world_is(w, ep_group_fault(w->group, &fault), EP_OK, "ep_group_fault");
    world_check(w, fault.status == EP_ERR_ARG && fault.rank == 0, "the fault: %d, rank %d",
                fault.status, fault.rank);
    world_fails(w, call_combine(handle, &s->c, NULL), EP_ERR_FAULTED, "rank 0", "then");
    ep_handle_destroy(&handle);
    pool_free(&pool);
}

/* With the flag, an id that does not exist is no selection. */
static void lenient(struct world *w) {
    const struct trial *t = w->ctx;
    struct ep_handle_config config = EP_HANDLE_CONFIG_INIT;
    ep_handle *handle = NULL;

    config.flags = EP_HANDLE_LENIENT_IDS;
    world_is(w, ep_handle_create(&handle, w->group, &config), EP_OK, "ep_handle_create");
    trial_pass(w, t, handle);
    ep_handle_destroy(&handle);
}

static bool run_lenient(uint64_t seed, bool expanded) {
    struct test_case c;
    struct trial t;
    struct world_setup s;
    bool good;

    case_default(&c, 3, seed);
    c.id_stride = STRIDE_PACKED;
    case_build(&c);
    for (int r = 0; r < 3; r++) {
        int64_t *ids = c.ids[r].data; /* the library's; the reference has its own */
        int64_t *known = (int64_t *)(uintptr_t)c.in[r].ids;
        for (int64_t i = r; i < c.in[r].num_tokens * c.topk; i += 3) {
            ids[i] = known[i] = i % 2 ? INT64_MAX - i : -2 - i;
        }
    }
    trial_init(&t, &c);
    t.form[1].expanded = expanded;
    trial_build(&t);
    trial_setup(&s, &t);
    s.body = lenient;
    good = world_run(&s) == 0;
    trial_free(&t);
    case_free(&c);
    return good;
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();
    struct world_setup s;

    tap_deadline(60);
    world_defaults(&s, 2);
    s.config.max_scale_bytes = 32;
    s.body = body;
    ok(world_run(&s) == 0, "threads");
    s.processes = true;
    ok(world_run(&s) == 0, "processes");
    if (gpu_wanted()) {
        s.body = short_answers;
        s.processes = false;
        ok(world_run(&s) == 0, "combine with too few rows");
    }
    ok(run_lenient(seed, false), "lenient ids");
    ok(run_lenient(seed + 1, true), "lenient ids, expanded on one rank");
    return done_testing();
}
