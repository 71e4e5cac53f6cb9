/* SPDX-License-Identifier: MIT */
/*
 * Declared in ll.h. Rows at the experts are those of the reference's expanded dispatch, which has them
 * one behind the other.
 */
#include "tests/ll.h"

#include <string.h>

#include "tests/ref_ll.h"
#include "tests/tap.h"

void ll_init(struct ll_step *s, int num_ranks, uint64_t seed) {
    memset(s, 0, sizeof(*s));
    case_default(&s->c, num_ranks, seed);
    s->c.hidden = 256;
    s->max_tokens = s->c.max_tokens;
}

/* Weights of all ranks for combine. */
static void build_weights(struct ll_step *s, uint64_t *state) {
    s->now = pool_zero(&s->pool, (size_t)s->c.num_ranks * sizeof(*s->now));
    for (int r = 0; r < s->c.num_ranks; r++) {
        const int64_t tokens = s->c.in[r].num_tokens, num = tokens * s->c.topk;
        float *w = pool_zero(&s->pool, (size_t)num * sizeof(*w));
        for (int64_t i = 0; i < num; i++) {
            w[i] = case_weight(state);
        }
        s->now[r] = case_tensor(&s->pool, EP_F32, w, tokens, s->c.topk, s->c.weight_stride);
    }
}

/*
 * Rows for LogFMT: each 512 channels of all rows alike of one sort. Every third has 128 that cannot be
 * encoded, for the reason `why`; of the rest 128 are near to each other, far apart, with zeros, or
 * denormal.
 */
static void fill_logs(uint16_t *x, int64_t n, int64_t hidden, int why, uint64_t *state) {
    for (int64_t i = 0; i < n; i++) {
        const int64_t part = i % hidden / 128, place = i % 128;
        const uint64_t bits = tap_rand(state);
        const int near = 110 + (int)(bits >> 16 & 7),
                  far = 1 + (int)((bits >> 16 & 0xff) * 7 / 16);
        const int exponent = part % 4 == 3 ? 0 : part % 4 == 1 ? far : near;
        x[i] = (uint16_t)((bits & 0x807f) | (unsigned)exponent << 7);
        x[i] = part % 4 == 2 && bits >> 60 < 5 ? 0 : x[i];
        if ((part / 4 + why) % 3 == 0 && part % 4 == why % 4) {
            const uint16_t odd[] = {0, 0x3b80, 0x3fc0, 0x7fc0, 0xff80};
            x[i] = why % 5 < 2 || place == 77 ? odd[why % 5] : x[i];
        }
    }
}

/* Answers of every expert for its rows. */
static void build_answers(struct ll_step *s, int rank, uint64_t *state) {
    const struct ref_recv *v = &s->recv[rank];
    struct ref_answers *a = &s->answers[rank];

    a->x = pool_zero(&s->pool, (size_t)(v->num_rows * s->c.hidden) * 2);
    a->weights = v->expanded ? v->weights : NULL; /* one row, which is summed */
    if (s->logfmt) {
        fill_logs((uint16_t *)(void *)a->x, v->num_rows * s->c.hidden, s->c.hidden,
                  (int)(s->c.data_seed % 60), state);
    } else {
        case_fill_finite(EP_BF16, a->x, v->num_rows * s->c.hidden, state);
    }
    if (!s->weights_now) {
        return;
    }
    a->weights = pool_zero(&s->pool, (size_t)v->num_rows * sizeof(float));
    for (int64_t i = 0; i < v->num_rows; i++) {
        const struct ep_tensor *t = &s->now[v->source[2 * i]];
        a->weights[i] =
            ((const float *)
                 t->data)[v->source[2 * i + 1] * t->stride[0] + v->selection[i] * t->stride[1]];
    }
}

/* Neighbours on rank 0, as far apart as can be on others. */
static void build_values(struct ll_step *s) {
    for (int r = 0; r < s->c.num_ranks; r++) {
        uint16_t *const x[2] = {(uint16_t *)(uintptr_t)s->c.in[r].x, s->c.x[r].data};
        for (uint32_t i = 0; i < 65536; i++) {
            x[0][i] = x[1][i] = (uint16_t)(r ? i * 0x9E37u : i);
        }
    }
}

/* As if ranks that are gone had no tokens, and nobody selected their experts, nor one for which M of the
 * rank's selections are there already. */
static void leave_out(struct ll_step *s) {
    for (int r = 0; r < s->c.num_ranks; r++) {
        struct ref_input *in = &s->c.in[r];
        const int64_t num = in->num_tokens * s->c.topk;
        const int most = s->flags & EP_LL_COMPACT ? INT32_MAX : s->max_tokens;
        int64_t *ids = pool_zero(&s->pool, (size_t)num * sizeof(*ids));
        int *count = pool_zero(&s->pool, (size_t)s->c.num_experts * sizeof(*count));
        for (int64_t i = 0; i < num; i++) {
            const int64_t id = in->ids[i];
            const bool selected = id >= 0 && id < s->c.num_experts;
            const bool gone = selected && (s->gone >> s->c.problem.expert_rank[id] & 1);
            ids[i] = selected && (gone || count[id]++ >= most) ? -1 : id;
        }
        in->ids = ids;
        in->num_tokens = s->gone >> r & 1 ? 0 : in->num_tokens;
    }
}

void ll_build(struct ll_step *s) {
    const size_t ranks = (size_t)s->c.num_ranks;
    uint64_t state = s->c.data_seed + 7;

    s->c.id_stride = STRIDE_PACKED;
    case_build(&s->c);
    if (s->all_values) {
        build_values(s);
    }
    leave_out(s);
    build_weights(s, &state);
    s->recv = pool_zero(&s->pool, ranks * sizeof(*s->recv));
    s->answers = pool_zero(&s->pool, ranks * sizeof(*s->answers));
    s->y = pool_zero(&s->pool, ranks * sizeof(*s->y));
    for (int r = 0; r < s->c.num_ranks; r++) {
        ref_dispatch(&s->pool, &s->c.problem, r, !(s->flags & EP_LL_COMPACT), 1, &s->recv[r]);
        build_answers(s, r, &state);
    }
    const struct ref_combine in = {EP_BF16, s->c.hidden, s->recv, s->answers};
    for (int r = 0; r < s->c.num_ranks; r++) {
        const uint8_t *none[2] = {NULL, NULL};
        s->y[r] = pool_zero(&s->pool, (size_t)(s->c.in[r].num_tokens * s->c.hidden) * 2);
        if (s->exact || s->logfmt) {
            s->num_encoded +=
                ref_combine_ll(&s->c.problem, r, &in, s->exact, s->logfmt, s->y[r]);
        } else {
            ref_combine(&s->c.problem, r, &in, none, s->y[r], NULL);
        }
    }
}

void ll_free(struct ll_step *s) {
    pool_free(&s->pool);
    case_free(&s->c);
}

void ll_setup(struct world_setup *w, const struct ll_step *s) {
    world_defaults(w, s->c.num_ranks);
    w->config.num_experts = s->c.num_experts;
    w->config.expert_rank = s->c.expert_rank;
    w->config.max_tokens = 1;
    w->config.max_topk = s->c.topk;
    const int32_t rows = (int32_t)s->c.problem.row_bytes, answers = (int32_t)s->c.hidden * 2;
    w->config.max_row_bytes = rows > answers ? rows : answers;
    w->config.max_scale_bytes = (int32_t)s->c.problem.scale_bytes;
    w->config.ll_max_tokens = s->max_tokens;
    if (s->named_experts) { /* each rank has room for all of them */
        w->config.num_experts *= s->c.num_ranks;
        w->config.expert_rank = NULL;
    }
    w->config.flags = s->exact ? EP_GROUP_LL_EXACT : 0;
}

void ll_steps_build(struct ll_steps *all, int num_ranks, uint64_t seed) {
    static const int64_t hidden[LL_STEPS] = {256, 640, 128, 256};
    static const int tokens[LL_STEPS] = {12, 5, 16, 1};

    all->seed = seed;
    for (int i = 0; i < LL_STEPS; i++) {
        struct ll_step *s = &all->s[i];
        ll_init(s, num_ranks, seed + (uint64_t)i);
        s->c.hidden = hidden[i];
        s->c.max_tokens = tokens[i];
        s->max_tokens = tokens[i] + i;
        s->c.tokens = i == 0 ? TOKENS_MIXED : TOKENS_MAX;
        s->c.routing = i == 2 ? ROUTE_DUPLICATES : ROUTE_UNIFORM;
        s->c.topk = i == 1 ? 2 : 4;
        s->flags = i % 2 ? EP_LL_FP8 : 0;
        s->c.row_dtype = i == 2 ? EP_U8 : EP_BF16;
        s->c.num_scales = i == 2 ? 9 : 0;
        s->c.scale_dtype = EP_U8;
        s->c.weights = i != 3;
        s->weights_now = i == 1 || i == 3;
        s->exact = i == 1 || i == 2;
        s->logfmt = i == 1 || i == 3;
        s->flags |= i == 0 ? EP_LL_COMPACT : 0;
        s->num_workers = i == 2 ? 1 : 0;
        ll_build(s);
    }
}

void ll_steps_free(struct ll_steps *all) {
    for (int i = 0; i < LL_STEPS; i++) {
        ll_free(&all->s[i]);
    }
}

void ll_steps_setup(struct world_setup *w, struct ll_steps *all, void (*body)(struct world *)) {
    ll_setup(w, &all->s[1]); /* which has the longest rows */
    w->config.ll_max_tokens = 20;
    w->config.max_topk = 4;
    w->config.max_tokens = 16;
    w->config.max_scale_bytes = 9;
    w->body = body;
    w->ctx = all;
}

/* ---- a rank's buffers ----------------------------------------------------------------------- */

static void add(struct ll_run *r, int what, int dtype, int64_t rows, int64_t cols) {
    r->bytes[what] = (size_t)(rows * cols) * ep_dtype_bytes((ep_dtype)dtype);
    r->got[what] = pool_fill(&r->pool, r->bytes[what], 0xA5);
    r->want[what] = pool_fill(&r->pool, r->bytes[what], 0xA5);
    if (cols == 1) {
        ep_tensor_1d(&r->t[what], (ep_dtype)dtype, r->got[what], rows);
    } else {
        ep_tensor_2d(&r->t[what], (ep_dtype)dtype, r->got[what], rows, cols);
    }
}

static int scale_dtype(const struct ll_step *s) {
    return s->packed ? EP_I32 : s->c.num_scales ? s->c.scale_dtype : EP_F32;
}

/* Of an expert. */
static int64_t scale_columns(const struct ll_step *s) {
    const int64_t groups = s->c.hidden / 128;
    return s->packed ? (groups + 3) / 4 : s->c.num_scales ? s->c.num_scales : groups;
}

static int64_t each(const struct ll_step *s) {
    return (int64_t)s->c.num_ranks * s->max_tokens;
}

/* Columns are padded to multiples of 16 bytes. */
static int64_t pitch(const struct ll_step *s) {
    const int64_t in_16 = 16 / (int64_t)ep_dtype_bytes((ep_dtype)scale_dtype(s));
    return (each(s) + in_16 - 1) / in_16 * in_16;
}

/* Row `row` of expert e: what the reference has as row i. */
static void want_cast(struct ll_run *r, int e, int64_t row, const uint8_t *x) {
    const struct ll_step *s = r->s;
    const int64_t groups = s->c.hidden / 128, columns = scale_columns(s);
    uint8_t *out = r->want[LL_X] + (e * each(s) + row) * s->c.hidden;

    for (int64_t g = 0; g < groups; g++) {
        uint16_t group[128];
        float scale;
        memcpy(group, x + g * 256, 256);
        ref_cast(group, (s->flags & EP_LL_SCALES_POWER_OF_2) != 0, out + g * 128, &scale);
        const int64_t column = e * columns + (s->packed ? g / 4 : g);
        uint8_t *at = r->want[LL_SCALES] + (column * pitch(s) + row) * 4;
        if (!s->packed) {
            memcpy(at, &scale, 4);
            continue;
        }
        uint32_t bits;
        memcpy(&bits, &scale, 4);
        if (g % 4 == 0) {
            memset(at, 0, 4);
        }
        at[g % 4] = (uint8_t)(bits >> 23);
    }
}

static void want_row(struct ll_run *r, int e, int64_t row, int64_t i) {
    const struct ll_step *s = r->s;
    const struct ref_recv *v = &s->recv[r->w->rank];
    const size_t bytes = (size_t)s->c.hidden * 2, own = s->c.problem.row_bytes;
    const int64_t at = e * each(s) + row;

    if (s->flags & EP_LL_FP8) {
        want_cast(r, e, row, v->x + (size_t)i * bytes);
    } else {
        memcpy(r->want[LL_X] + (size_t)at * own, v->x + (size_t)i * own, own);
    }
    for (int64_t j = 0; j < s->c.num_scales; j++) {
        const size_t elem = ep_dtype_bytes((ep_dtype)s->c.scale_dtype);
        const int64_t column = e * s->c.num_scales + j;
        memcpy(r->want[LL_SCALES] + (size_t)(column * pitch(s) + row) * elem,
               v->scales + (size_t)(i * s->c.num_scales + j) * elem, elem);
    }
    memcpy(r->want[LL_SOURCE] + at * 4, &v->source[2 * i + 1], 4);
    memcpy((uint8_t *)r->answers.data + (size_t)at * bytes,
           s->answers[r->w->rank].x + (size_t)i * bytes, bytes);
}

/* Of compact output: which experts the row is for. */
static void want_selections(struct ll_run *r, int64_t i) {
    const struct ll_step *s = r->s;
    const struct ref_recv *v = &s->recv[r->w->rank];
    for (int64_t k = i * s->c.topk; k < (i + 1) * s->c.topk; k++) {
        const int32_t id = (int32_t)v->ids[k];
        memcpy(r->want[LL_IDS] + k * 4, &id, 4);
        if (v->weights) {
            memcpy(r->want[LL_WEIGHTS] + k * 4, &v->weights[k], 4);
        }
    }
}

/* A list of rows: `num` from row `first` of the reference on. */
static void want_list(struct ll_run *r, int list, int64_t first, int64_t num) {
    const struct ll_step *s = r->s;
    const struct ref_recv *v = &s->recv[r->w->rank];
    int64_t row = 0;

    for (int src = 0; src < s->c.num_ranks; src++) {
        const int64_t begin = row;
        while (row < num && v->source[2 * (first + row)] == src) {
            want_row(r, list, row, first + row);
            if (!v->expanded) {
                want_selections(r, row);
            }
            row++;
        }
        const int64_t range = begin << 32 | (row - begin);
        memcpy(r->want[LL_RANGES] + (list * s->c.num_ranks + src) * 8, &range, 8);
    }
}

void ll_create(struct ll_run *r, struct world *w, const struct ll_step *s) {
    const int local = ref_num_local(&s->c.problem, w->rank);
    const struct ref_recv *v = &s->recv[w->rank];
    const int lists = v->expanded ? local : 1;
    const int64_t rows = lists * each(s);
    const bool cast = (s->flags & EP_LL_FP8) != 0;
    struct ep_plan_info info = EP_PLAN_INFO_INIT;

    memset(r, 0, sizeof(*r));
    r->w = w;
    r->s = s;
    world_is(w, ep_group_plan(w->group, &info), EP_OK, "ep_group_plan");
    add(r, LL_X, cast ? EP_F8E4M3 : s->c.row_dtype, rows, s->c.hidden);
    add(r, LL_SCALES, scale_dtype(s), lists * scale_columns(s), pitch(s));
    r->t[LL_SCALES].shape[1] = each(s);
    add(r, LL_IDS, EP_I32, v->expanded ? 0 : rows, s->c.topk);
    add(r, LL_WEIGHTS, EP_F32, v->expanded || !v->weights ? 0 : rows, s->c.topk);
    add(r, LL_SOURCE, EP_I32, rows, 1);
    add(r, LL_COUNTS, EP_I32, local, 1);
    add(r, LL_RANGES, EP_I64, lists, s->c.num_ranks);
    r->t[LL_RANGES].ndim = 2;
    r->t[LL_RANGES].shape[1] = s->c.num_ranks;
    r->t[LL_RANGES].stride[0] = s->c.num_ranks;
    r->t[LL_RANGES].stride[1] = 1;
    add(r, LL_TOTALS, EP_I32, local, 1);
    add(r, LL_HANDLE, EP_U8, info.ll_handle_bytes, 1);
    add(r, LL_Y, EP_BF16, s->c.in[w->rank].num_tokens, s->c.hidden);
    memcpy(r->want[LL_Y], s->y[w->rank], r->bytes[LL_Y]);
    /* Past the counts, NaN where combine must not look. */
    ep_tensor_2d(&r->answers, EP_BF16,
                 pool_fill(&r->pool, (size_t)(rows * s->c.hidden) * 2, 0xFF), rows,
                 s->c.hidden);
    memcpy(r->want[LL_COUNTS], v->counts, r->bytes[LL_COUNTS]);
    for (int i = 0; i < lists; i++) {
        want_list(r, i, v->expanded ? v->offsets[i] : 0,
                  v->expanded ? v->counts[i] : v->num_rows);
    }
    ll_expect(r, 1);
    r->dispatch = (struct ep_ll_dispatch_args)EP_LL_DISPATCH_ARGS_INIT;
    r->dispatch.flags = s->flags;
    r->dispatch.max_tokens = s->max_tokens;
    r->dispatch.num_experts = s->named_experts ? s->c.num_experts : 0;
    r->dispatch.expert_rank = s->named_experts ? s->c.expert_rank : NULL;
    r->dispatch.num_workers = s->num_workers;
    r->dispatch.x = &s->c.x[w->rank];
    r->dispatch.topk_ids = &s->c.ids[w->rank];
    r->dispatch.topk_weights = s->c.weights ? &s->c.topk_weights[w->rank] : NULL;
    r->dispatch.handle = &r->t[LL_HANDLE];
    r->dispatch.recv_x = &r->t[LL_X];
    r->dispatch.scales = s->c.num_scales ? &s->c.scales[w->rank] : NULL;
    r->dispatch.recv_scales = cast || s->c.num_scales ? &r->t[LL_SCALES] : NULL;
    r->dispatch.recv_topk_ids = v->expanded ? NULL : &r->t[LL_IDS];
    r->dispatch.recv_topk_weights = v->expanded || !v->weights ? NULL : &r->t[LL_WEIGHTS];
    r->dispatch.recv_source = &r->t[LL_SOURCE];
    r->dispatch.expert_counts = &r->t[LL_COUNTS];
    r->dispatch.ranges = &r->t[LL_RANGES];
    r->dispatch.expert_totals = &r->t[LL_TOTALS];
    r->combine = (struct ep_ll_combine_args)EP_LL_COMBINE_ARGS_INIT;
    r->combine.max_tokens = s->max_tokens;
    r->combine.num_experts = r->dispatch.num_experts;
    r->combine.expert_rank = r->dispatch.expert_rank;
    r->combine.flags = (s->exact ? EP_LL_EXACT : 0) | (s->logfmt ? EP_LL_LOGFMT : 0) |
                       (s->flags & EP_LL_COMPACT);
    r->combine.num_workers = s->num_workers;
    r->combine.handle = &r->t[LL_HANDLE];
    r->combine.x = &r->answers;
    r->combine.out = &r->t[LL_Y];
    r->combine.topk_weights = s->weights_now ? &s->now[w->rank] : NULL;
}

void ll_expect(struct ll_run *r, int dispatches) {
    for (size_t b = 0; b < r->bytes[LL_TOTALS]; b += 4) {
        uint32_t count;
        memcpy(&count, r->want[LL_COUNTS] + b, 4);
        count = 0xA5A5A5A5u + (uint32_t)dispatches * count;
        memcpy(r->want[LL_TOTALS] + b, &count, 4);
    }
}

void ll_destroy(struct ll_run *r) {
    pool_free(&r->pool);
}

ep_status ll_dispatch(struct ll_run *r, enum call_half half, void *stream) {
    for (int i = LL_X; half != CALL_RECV && i <= LL_HANDLE; i++) {
        memset(r->got[i], 0xA5, r->bytes[i]);
    }
    return call_ll_dispatch(r->w->group, &r->dispatch, half, stream);
}

ep_status ll_combine(struct ll_run *r, enum call_half half, void *stream) {
    if (half != CALL_RECV) {
        memset(r->got[LL_Y], 0xA5, r->bytes[LL_Y]);
    }
    return call_ll_combine(r->w->group, &r->combine, half, stream);
}

static bool check(struct ll_run *r, int from, int to) {
    static const char *const names[] = {"recv_x",        "recv_scales",
                                        "recv_topk_ids", "recv_topk_weights",
                                        "recv_source",   "expert_counts",
                                        "ranges",        "expert_totals",
                                        "handle",        "out"};
    bool good = true;

    for (int i = from; i <= to; i++) {
        const bool same = memcmp(r->got[i], r->want[i], r->bytes[i]) == 0;
        for (size_t b = 0; !same && b < r->bytes[i]; b++) {
            if (r->got[i][b] != r->want[i][b]) {
                good = world_check(r->w, false, "%s: byte %zu of %zu is %u, must be %u",
                                   names[i], b, r->bytes[i], r->got[i][b], r->want[i][b]);
                break;
            }
        }
    }
    return good;
}

bool ll_check_dispatch(struct ll_run *r) {
    return check(r, LL_X, LL_TOTALS);
}

bool ll_check_combine(struct ll_run *r) {
    return check(r, LL_Y, LL_Y);
}

bool ll_pass(struct ll_run *r, bool halves) {
    bool good = true;

    for (int i = halves ? CALL_SEND : CALL_BOTH; i <= (halves ? CALL_RECV : CALL_BOTH); i++) {
        good =
            world_is(r->w, ll_dispatch(r, (enum call_half)i, NULL), EP_OK, "dispatch") && good;
    }
    good = ll_check_dispatch(r) && good;
    for (int i = halves ? CALL_SEND : CALL_BOTH; i <= (halves ? CALL_RECV : CALL_BOTH); i++) {
        good = world_is(r->w, ll_combine(r, (enum call_half)i, NULL), EP_OK, "combine") && good;
    }
    return ll_check_combine(r) && good;
}

static void body(struct world *w) {
    struct ll_run r;

    ll_create(&r, w, w->ctx);
    ll_pass(&r, false);
    ll_pass(&r, true);
    ll_destroy(&r);
}

bool ll_case(struct ll_step *s, bool processes, const char *name) {
    static int num;
    struct world_setup w;

    if (gpu_processes(false) &&
        num++ % 4) { /* which take seconds to begin and to end on a GPU */
        skip(1, "%s: of processes on GPUs one case in four runs", name);
        return true;
    }
    ll_build(s);
    ll_setup(&w, s);
    w.processes = processes;
    w.body = body;
    w.ctx = s;
    if (s->c.num_ranks > 8) { /* which take turns on few cores */
        w.config.num_workers = 1;
        w.config.timeout_ms = 600000;
    }
    const bool good = ok(world_run(&w) == 0, "%s", name);
    ll_free(s);
    return good;
}
