/* SPDX-License-Identifier: MIT */
/*
 * Checks, declared in check.h. The buffers, the images of what must be in them and the expected
 * values are those of the host tests (tests/trial.h): here they are mirrored in device memory,
 * and the kernels are launched by hand.
 */
#include "tests/cuda/check.h"

#include <stdio.h>
#include <string.h>

#include "tests/tap.h"

#define NUM_TRIALS 6

int num_passed, num_failed;

bool check(bool good, const char *fmt, ...) {
    va_list args;

    num_passed += good;
    num_failed += !good;
    if (!good) {
        printf("FAILED: ");
        va_start(args, fmt);
        vprintf(fmt, args);
        va_end(args);
        printf("\n");
        fflush(stdout);
    }
    return good;
}

/* ---- tensors in device memory ---------------------------------------------------------- */

struct k_array array_at(const struct ep_tensor *t, uint64_t at) {
    const int64_t elem = (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
    const struct k_array a = {at, t->stride[0] * elem, t->ndim > 1 ? t->stride[1] * elem : 0};

    return a;
}

struct k_array mirror(struct rig *rig, int rank, const struct ep_tensor *t) {
    const size_t elem = ep_dtype_bytes((ep_dtype)t->dtype);
    const struct k_array none = {0, 0, 0};
    size_t last = 0;

    if (!elem) {
        return none;
    }
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0) { /* nothing is read; there is an array all the same */
            return array_at(t, rig_alloc(rig, rank, 16));
        }
        last += (size_t)((t->shape[i] - 1) * t->stride[i]);
    }
    const uint64_t at = rig_alloc(rig, rank, (last + 1) * elem);
    rig_in(rig, rank, at, t->data, (last + 1) * elem);
    return array_at(t, at);
}

/* ---- arguments of kernels, as src/ep fills them ---------------------------------------- */

void fill_route(const struct rig *rig, int rank, const struct test_case *c,
                const struct inputs *in, struct k_route_args *a) {
    memset(a, 0, sizeof(*a));
    a->g = rig->rank[rank].g;
    a->h = rig->rank[rank].h;
    a->tokens = (k_i32)c->in[rank].num_tokens;
    a->topk = c->topk;
    a->id_bytes = c->mask ? 0 : c->id_dtype == EP_I64 ? 8 : 4;
    a->ids = in->ids;
    a->mask = in->mask;
}

void fill_dispatch(const struct rig *rig, int rank, const struct test_case *c,
                   const struct inputs *in, bool cached, int slot, struct k_dispatch_args *a) {
    memset(a, 0, sizeof(*a));
    a->g = rig->rank[rank].g;
    a->h = rig->rank[rank].h;
    a->flags =
        K_DO_SEND | K_DO_RECV | (cached ? 0 : K_DO_COUNTS) | (c->weights ? K_DO_WEIGHTS : 0);
    a->send_blocks = (k_u32)rig->shape.send_blocks;
    a->tokens = (k_i32)c->in[rank].num_tokens;
    a->topk = c->topk;
    a->row_bytes = (k_i32)c->problem.row_bytes;
    a->num_scales = (k_i32)c->num_scales;
    a->scale_bytes = c->num_scales ? (k_i32)ep_dtype_bytes((ep_dtype)c->scale_dtype) : 1;
    a->slot = slot;
    a->alignment = 1;
    a->id_bytes = 4;
    a->stages = rig->shape.stages;
    a->stage_bytes =
        a->row_bytes < rig->shape.stage_bytes ? a->row_bytes : rig->shape.stage_bytes;
    a->capacity = a->x_rows = INT32_MAX;
    a->x = in->x;
    a->scales = in->scales;
    a->weights = in->weights;
}

void fill_combine(const struct rig *rig, int rank, const struct test_case *c, int dtype,
                  int64_t hidden, struct k_combine_args *a) {
    memset(a, 0, sizeof(*a));
    a->g = rig->rank[rank].g;
    a->h = rig->rank[rank].h;
    a->send_blocks = (k_u32)rig->shape.send_blocks;
    a->tokens = (k_i32)c->in[rank].num_tokens;
    a->topk = c->topk;
    a->row_bytes = (k_i32)(hidden * (int64_t)ep_dtype_bytes((ep_dtype)dtype));
    a->dtype = dtype;
    a->stages = rig->shape.stages;
    a->stage_bytes =
        a->row_bytes < rig->shape.stage_bytes ? a->row_bytes : rig->shape.stage_bytes;
}

/* ---- one trial: what the ranks ask for in one dispatch and one combine ------------------ */

struct pass {
    struct rig *rig;
    const struct trial *t;
    const char *name; /* of the case and the trial */
    bool cached;
    int slot;
    struct world w[RIG_MAX_RANKS];
    struct run run[RIG_MAX_RANKS];
    const struct inputs *in; /* [R] */
    uint64_t at[RIG_MAX_RANKS][NUM_OUTPUTS];
    struct k_dispatch_args dispatch[RIG_MAX_RANKS];
    struct k_combine_args combine[RIG_MAX_RANKS];
};

static const char *const output_names[NUM_OUTPUTS] = {
    "recv_x",      "recv_scales",     "recv_topk_ids",  "recv_topk_weights",
    "recv_source", "expert_counts",   "expert_offsets", "num_rows",
    "out",         "out_topk_weights"};

/* Device memory for an output that the run made; absent ones give an absent array. */
static struct k_array output_array(struct pass *p, int rank, enum trial_output which) {
    const struct output *o = &p->run[rank].out[which];
    const struct k_array none = {0, 0, 0};

    if (!o->got) {
        return none;
    }
    if (!p->at[rank][which]) {
        p->at[rank][which] = rig_alloc(p->rig, rank, o->bytes);
    }
    rig_fill(p->rig, rank, p->at[rank][which], RIG_POISON, o->bytes);
    return array_at(&o->t, p->at[rank][which] + (uint64_t)((uint8_t *)o->t.data - o->got));
}

static uint64_t view_at(const struct pass *p, int rank) {
    const struct k_map *m = &p->rig->plan.map;
    const bool expanded = p->t->form[rank].expanded;

    return p->rig->rank[rank].arena + (expanded ? m->expanded : m->recv) +
           (uint64_t)p->slot * (expanded ? m->expanded_slot_bytes : m->recv_slot_bytes);
}

static void dispatch_args(struct pass *p, int rank) {
    const struct form *f = &p->t->form[rank];
    const struct test_case *c = p->t->c;
    struct k_dispatch_args *a = &p->dispatch[rank];
    const int64_t capacity = p->t->recv[rank].num_rows + f->slack;
    bool any = false;

    fill_dispatch(p->rig, rank, c, &p->in[rank], p->cached, p->slot, a);
    a->flags |= f->expanded ? K_DO_EXPAND : 0;
    a->flags |= f->expanded && f->zero_gaps ? K_DO_ZERO_GAPS : 0;
    a->alignment = f->expanded && f->alignment ? f->alignment : 1;
    a->id_bytes = f->id_dtype == EP_I64 ? 8 : 4;
    a->recv_x = output_array(p, rank, OUT_X);
    a->recv_scales = output_array(p, rank, OUT_SCALES);
    a->recv_ids = output_array(p, rank, OUT_IDS);
    a->recv_weights = output_array(p, rank, OUT_WEIGHTS);
    a->recv_source = output_array(p, rank, OUT_SOURCE);
    a->expert_counts = output_array(p, rank, OUT_COUNTS);
    a->expert_offsets = output_array(p, rank, OUT_OFFSETS);
    a->num_rows = output_array(p, rank, OUT_NUM_ROWS);
    any = a->recv_x.data || a->recv_scales.data || a->recv_ids.data || a->recv_weights.data ||
          a->recv_source.data;
    a->capacity = a->x_rows = any ? capacity : INT32_MAX;
    if (p->run[rank].dispatch.recv_x == &p->run[rank].view) {
        const struct ep_plan_info *i = &p->rig->plan.info;
        a->x_rows = f->expanded ? i->max_expanded_rows : i->max_recv_rows;
        if (f->expanded) {
            a->recv_x = (struct k_array){view_at(p, rank), a->row_bytes, 1};
        }
    }
}

static void combine_args(struct pass *p, int rank) {
    const struct trial *t = p->t;
    const struct form *f = &t->form[rank];
    const struct ref_recv *v = &t->recv[rank];
    struct k_combine_args *a = &p->combine[rank];
    const struct run *r = &p->run[rank];

    fill_combine(p->rig, rank, t->c, t->dtype, t->hidden, a);
    if (f->arena && v->num_rows * a->row_bytes <=
                        (int64_t)(f->expanded ? p->rig->plan.map.expanded_slot_bytes
                                              : p->rig->plan.map.recv_slot_bytes)) {
        a->x = (struct k_array){view_at(p, rank), a->row_bytes, 1};
        rig_in(p->rig, rank, a->x.data, t->answers[rank].x,
               (size_t)(v->num_rows * a->row_bytes));
    } else {
        a->x = mirror(p->rig, rank, &r->answers);
    }
    if (r->combine.weights) {
        a->weights = mirror(p->rig, rank, r->combine.weights);
    }
    if (r->combine.topk_weights) {
        a->topk_weights = mirror(p->rig, rank, r->combine.topk_weights);
    }
    if (r->combine.bias[0]) {
        a->bias0 = mirror(p->rig, rank, r->combine.bias[0]);
    }
    if (r->combine.bias[1]) {
        a->bias1 = mirror(p->rig, rank, r->combine.bias[1]);
    }
    a->out = output_array(p, rank, OUT_Y);
    a->out_weights = output_array(p, rank, OUT_Y_TOPK);
    a->flags = (f->expanded ? K_DO_EXPAND : 0) | (t->back ? K_DO_WEIGHTS : 0) |
               (f->expanded || a->weights.data ? K_DO_REDUCE : 0);
}

/* Byte by byte; prints the first that differs. */
static bool output_is(struct pass *p, int rank, enum trial_output which) {
    const struct output *o = &p->run[rank].out[which];
    const int64_t elem = (int64_t)ep_dtype_bytes((ep_dtype)o->t.dtype);
    const int64_t front = (uint8_t *)o->t.data - o->got;
    size_t num = 0, first = 0;

    rig_out(p->rig, rank, o->got, p->at[rank][which], o->bytes);
    for (size_t i = 0; i < o->bytes; i++) {
        if (o->got[i] != o->want[i] && !o->any[i]) {
            first = num++ ? first : i;
        }
    }
    if (num) {
        const int64_t at = ((int64_t)first - front) / elem;
        const int64_t row = o->t.stride[0] ? at / o->t.stride[0] : 0;
        printf(
            "    rank %d, %s [%lld][%lld] of dtype %d: %zu bytes of %zu differ, the first at "
            "%lld (element %lld; row %lld, column %lld if rows are apart by %lld): "
            "%02x instead of %02x\n",
            rank, output_names[which], (long long)o->t.shape[0], (long long)o->t.shape[1],
            o->t.dtype, num, o->bytes, (long long)first - (long long)front, (long long)at,
            (long long)row, (long long)(at - row * o->t.stride[0]), (long long)o->t.stride[0],
            o->got[first], o->want[first]);
    }
    return num == 0;
}

static bool view_is(struct pass *p, int rank) {
    const struct ref_recv *v = &p->t->recv[rank];
    const size_t bytes = p->t->c->problem.row_bytes;
    struct pool pool = {0};
    uint8_t *got = pool_zero(&pool, (size_t)v->num_rows * bytes);
    bool good = true;

    rig_out(p->rig, rank, got, view_at(p, rank), (size_t)v->num_rows * bytes);
    for (int64_t i = 0; good && i < v->num_rows; i++) {
        const uint8_t *a = got + (size_t)i * bytes, *b = v->x + (size_t)i * bytes;
        size_t at = 0;
        if ((v->source[2 * i] < 0 && !p->t->form[rank].zero_gaps) || !memcmp(a, b, bytes)) {
            continue;
        }
        while (a[at] == b[at]) {
            at++;
        }
        printf(
            "    rank %d, view row %lld of %lld (source %d, token %d), byte %zu: %02x instead "
            "of %02x\n",
            rank, (long long)i, (long long)v->num_rows, v->source[2 * i], v->source[2 * i + 1],
            at, a[at], b[at]);
        good = false;
    }
    pool_free(&pool);
    return good;
}

static bool outputs_are(struct pass *p, enum trial_output from, enum trial_output to) {
    bool good = true;

    for (int r = 0; r < p->rig->o.num_ranks; r++) {
        for (int i = (int)from; i <= (int)to; i++) {
            if (p->run[r].out[i].got) {
                good = output_is(p, r, (enum trial_output)i) && good;
            }
        }
        if (from == OUT_X && p->run[r].dispatch.recv_x == &p->run[r].view) {
            good = view_is(p, r) && good;
        }
    }
    return good;
}

/* False: a rank has faulted. */
static bool run_dispatches(struct pass *p) {
    struct rig *rig = p->rig;
    char what[192];

    for (int r = 0; r < rig->o.num_ranks; r++) {
        rig_poison_arena(rig, r, true);
        dispatch_args(p, r);
    }
    rig_wait(rig, "before dispatch");
    for (int r = 0; r < rig->o.num_ranks; r++) {
        struct k_dispatch_args a = p->dispatch[r];
        if (p->t->form[r].two_step) { /* begin, then finish */
            a.flags &= ~K_DO_RECV;
            rig_launch(rig, r, RIG_DISPATCH, &a);
            a.flags = p->dispatch[r].flags & ~(K_DO_SEND | K_DO_COUNTS);
        }
        rig_launch(rig, r, RIG_DISPATCH, &a);
    }
    rig->epoch++;
    snprintf(what, sizeof(what), "%s, %s dispatch", p->name, p->cached ? "cached" : "uncached");
    const bool sound = rig_sound(rig, what);
    return check(sound && outputs_are(p, OUT_X, OUT_NUM_ROWS), "%s", what) || sound;
}

static bool run_combines(struct pass *p) {
    struct rig *rig = p->rig;
    char what[192];

    for (int r = 0; r < rig->o.num_ranks; r++) {
        rig_poison_arena(rig, r, false);
        combine_args(p, r);
    }
    rig_wait(rig, "before combine");
    for (int r = 0; r < rig->o.num_ranks; r++) {
        rig_launch(rig, r, RIG_COMBINE, &p->combine[r]);
    }
    rig->epoch++;
    snprintf(what, sizeof(what), "%s, combine", p->name);
    const bool sound = rig_sound(rig, what);
    return check(sound && outputs_are(p, OUT_Y, OUT_Y_TOPK), "%s", what) || sound;
}

static bool run_trial(struct rig *rig, const struct trial *t, const struct inputs *in,
                      bool cached, int slot, const char *name) {
    static struct pass p; /* large */
    bool alive;

    memset(&p, 0, sizeof(p));
    p.rig = rig;
    p.t = t;
    p.name = name;
    p.cached = cached;
    p.slot = slot;
    p.in = in;
    for (int r = 0; r < rig->o.num_ranks; r++) {
        p.w[r].rank = r;
        p.w[r].num_ranks = rig->o.num_ranks;
        run_create(&p.run[r], &p.w[r], t);
    }
    alive = run_dispatches(&p) && run_combines(&p);
    for (int r = 0; r < rig->o.num_ranks; r++) {
        run_free(&p.run[r]);
    }
    return alive;
}

/* ---- route and layout ------------------------------------------------------------------ */

static bool layout_is(struct rig *rig, const struct test_case *c, int rank, const uint64_t *at,
                      struct pool *pool) {
    const size_t ranks = (size_t)c->num_ranks;
    const size_t bytes[4] = {ranks * 4, 4, (size_t)c->num_experts * 4,
                             (size_t)c->in[rank].num_tokens * ranks};
    static const char *const names[4] = {"tokens_per_rank", "tokens_per_node",
                                         "tokens_per_expert", "token_in_rank"};
    struct ref_layout l;
    bool good = true;

    ref_layout(pool, &c->problem, rank, &l);
    const void *const want[4] = {l.tokens_per_rank, &l.num_sent, l.tokens_per_expert,
                                 l.token_in_rank};
    for (int i = 0; i < 4; i++) {
        uint8_t *got = pool_zero(pool, bytes[i]);
        rig_out(rig, rank, got, at[i], bytes[i]);
        for (size_t j = 0; !(c->mask && i == 2) && j < bytes[i]; j++) {
            if (got[j] != ((const uint8_t *)want[i])[j]) {
                printf("    rank %d, %s: byte %zu is %02x instead of %02x\n", rank, names[i], j,
                       got[j], ((const uint8_t *)want[i])[j]);
                good = false;
                break;
            }
        }
    }
    return good;
}

/* All ranks route, and say where their tokens go. */
static bool route_all(struct rig *rig, const struct test_case *c, const struct inputs *in,
                      const char *name) {
    uint64_t at[RIG_MAX_RANKS][4];
    struct pool pool = {0};
    char what[192];
    bool good = true;

    for (int r = 0; r < rig->o.num_ranks; r++) {
        const uint64_t node = rig_alloc(rig, r, 4 * RIG_MAX_RANKS);
        struct k_route_args a;
        struct k_layout_args l;
        memset(&l, 0, sizeof(l));
        rig_fill(rig, r, node, 0, 4 * RIG_MAX_RANKS);
        at[r][0] = rig_alloc(rig, r, 4 * RIG_MAX_RANKS);
        at[r][1] = rig_alloc(rig, r, 4);
        at[r][2] = rig_alloc(rig, r, 4 * (size_t)c->num_experts);
        at[r][3] = rig_alloc(rig, r, (size_t)(c->max_tokens * c->num_ranks));
        fill_route(rig, r, c, &in[r], &a);
        rig_launch(rig, r, RIG_ROUTE, &a);
        l.g = a.g;
        l.h = a.h;
        l.tokens = a.tokens;
        l.topk = a.topk;
        l.num_nodes = 1;
        l.rank_node = (const k_i32 *)(uintptr_t)node;
        l.tokens_per_rank = at[r][0];
        l.tokens_per_node = at[r][1];
        l.tokens_per_expert = at[r][2];
        l.token_in_rank = at[r][3];
        rig_launch(rig, r, RIG_LAYOUT, &l);
    }
    snprintf(what, sizeof(what), "%s, route and layout", name);
    const bool sound = rig_sound(rig, what);
    for (int r = 0; sound && r < rig->o.num_ranks; r++) {
        good = layout_is(rig, c, r, at[r], &pool) && good;
    }
    pool_free(&pool);
    return check(sound && good, "%s", what) || sound;
}

/* ---- cases ----------------------------------------------------------------------------- */

/* What the ranks ask for, one after the other on the same handle. */
static void set_trial(struct trial *t, struct test_case *c, int number) {
    const bool summable =
        c->row_dtype == EP_BF16 || c->row_dtype == EP_F16 || c->row_dtype == EP_F32;
    struct form f = {.alignment = 1, .id_dtype = EP_I64};

    trial_init(t, c);
    t->dtype = summable ? c->row_dtype : EP_BF16;
    t->hidden = summable ? c->hidden : c->num_scales ? 1024 : 64;
    if (c->mask && number > 1) { /* counts of experts need ids */
        number = number == 3 ? 1 : NUM_TRIALS;
    }
    switch (number) {
    case 0: /* plain rows into memory */
        break;
    case 1: /* the view, answers from the view, two biases */
        f.arena = true;
        f.num_bias = 2;
        break;
    case 2: /* a row per selection */
        f.expanded = f.zero_gaps = f.weighted = f.columns = true;
        f.alignment = 8;
        break;
    case 3:
        f.expanded = f.arena = f.padded = f.weighted = true;
        f.num_bias = 1;
        f.slack = 5;
        f.id_dtype = EP_I32;
        break;
    default: /* each rank something else, or the same kind of thing in two steps */
        trial_random(t, c->seed + (uint64_t)number);
        return;
    }
    trial_form(t, &f);
}

/* A group that holds every trial. */
static void group_for(struct rig *rig, const struct trial *trials) {
    struct ep_group_config all;

    for (int i = 0; i < NUM_TRIALS; i++) {
        struct world_setup s;
        trial_setup(&s, &trials[i]);
        if (i == 0) {
            all = s.config;
            continue;
        }
        all.flags |= s.config.flags;
        if (all.max_row_bytes < s.config.max_row_bytes) {
            all.max_row_bytes = s.config.max_row_bytes;
        }
        if (all.max_expanded_rows < s.config.max_expanded_rows) {
            all.max_expanded_rows = s.config.max_expanded_rows;
        }
    }
    rig_group(rig, &all);
}

bool check_case(struct rig *rig, struct test_case *c, const char *name) {
    static struct trial trials[NUM_TRIALS];
    struct inputs in[RIG_MAX_RANKS];
    const int failed = num_failed;
    const double start = rig_now();
    char what[512], line[160];
    bool alive = true;

    case_describe(c, what, sizeof(what));
    for (int i = 0; i < NUM_TRIALS; i++) {
        set_trial(&trials[i], c, i);
        trial_build(&trials[i]);
    }
    group_for(rig, trials);
    for (int r = 0; r < rig->o.num_ranks; r++) {
        in[r].ids = mirror(rig, r, &c->ids[r]);
        in[r].mask = mirror(rig, r, &c->mask_t[r]);
        in[r].x = mirror(rig, r, &c->x[r]);
        in[r].scales = mirror(rig, r, &c->scales[r]);
        in[r].weights = mirror(rig, r, &c->topk_weights[r]);
    }
    for (int i = 0; alive && i < NUM_TRIALS; i++) {
        const bool routes = i == 0 || i == NUM_TRIALS - 1;
        snprintf(line, sizeof(line), "%s, form %d", name, i);
        alive = !routes || route_all(rig, c, in, line);
        alive = alive && run_trial(rig, &trials[i], in, !routes, i % rig->plan.num_slots, line);
    }
    for (int i = 0; i < NUM_TRIALS; i++) {
        trial_free(&trials[i]);
    }
    printf("%s %s (%.1f s): %s\n", num_failed == failed ? "ok    " : "FAILED", name,
           rig_now() - start, what);
    fflush(stdout);
    return alive;
}
