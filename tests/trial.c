/* SPDX-License-Identifier: MIT */
/*
 * Trials, declared in trial.h: what the ranks ask for and what the reference answers, and the
 * few lines that run one on a group of its own. The buffers of a rank are in run.c.
 */
#include "tests/trial.h"

#include <string.h>

#include "tests/gpu.h"
#include "tests/tap.h"

void trial_init(struct trial *t, const struct test_case *c) {
    const size_t ranks = (size_t)c->num_ranks;
    const struct form plain = {.alignment = 1, .id_dtype = EP_I64};

    *t = (struct trial){.c = c, .dtype = EP_BF16, .hidden = 64, .back = c->weights};
    t->form = pool_zero(&t->pool, ranks * sizeof(*t->form));
    t->recv = pool_zero(&t->pool, ranks * sizeof(*t->recv));
    t->answers = pool_zero(&t->pool, ranks * sizeof(*t->answers));
    t->y = pool_zero(&t->pool, ranks * sizeof(*t->y));
    t->y_topk = pool_zero(&t->pool, ranks * sizeof(*t->y_topk));
    t->bias[0] = pool_zero(&t->pool, ranks * sizeof(*t->y));
    t->bias[1] = pool_zero(&t->pool, ranks * sizeof(*t->y));
    trial_form(t, &plain);
}

void trial_form(struct trial *t, const struct form *form) {
    for (int r = 0; r < t->c->num_ranks; r++) {
        t->form[r] = *form;
    }
}

void trial_random(struct trial *t, uint64_t seed) {
    static const int dtypes[] = {EP_BF16, EP_F16, EP_F32};
    uint64_t s = seed;

    t->dtype = dtypes[case_rand(&s, 3)];
    t->hidden =
        EP_ROW_ALIGN / (int64_t)ep_dtype_bytes((ep_dtype)t->dtype) * (1 + case_rand(&s, 20));
    t->back = t->c->topk && case_rand(&s, 2);
    for (int r = 0; r < t->c->num_ranks; r++) {
        struct form *f = &t->form[r];
        f->expanded = !t->c->mask && case_rand(&s, 2);
        f->zero_gaps = case_rand(&s, 2);
        f->arena = case_rand(&s, 3) == 0;
        f->columns = case_rand(&s, 2);
        f->two_step = case_rand(&s, 3) == 0;
        f->padded = case_rand(&s, 2);
        f->weighted = case_rand(&s, 2);
        f->num_bias = (int)case_rand(&s, 3);
        f->alignment = (int32_t)(case_rand(&s, 2) ? 1 + case_rand(&s, 20) : 0);
        f->slack = case_rand(&s, 2) ? case_rand(&s, 40) : 0;
        f->id_dtype = case_rand(&s, 2) ? EP_I32 : EP_I64;
        f->num_workers = (int)case_rand(&s, 4);
        f->skip = case_rand(&s, 2) ? 0 : (unsigned)case_rand(&s, 1 << NUM_OUTPUTS);
        f->skip &= ~(1u << OUT_Y);
    }
}

/* Random answers for the rows of a rank; NaN where combine must not look. */
static void build_answers(struct trial *t, int rank, uint64_t *s) {
    const struct ref_recv *v = &t->recv[rank];
    const int64_t n = v->num_rows;
    const int64_t per_row = v->expanded ? 1 : t->c->topk;
    const size_t row_bytes = (size_t)t->hidden * ep_dtype_bytes((ep_dtype)t->dtype);
    struct ref_answers *a = &t->answers[rank];

    a->x = pool_zero(&t->pool, (size_t)n * row_bytes);
    a->weights = t->form[rank].weighted ? pool_zero(&t->pool, (size_t)n * 4) : NULL;
    a->topk_weights = t->back ? pool_zero(&t->pool, (size_t)(n * per_row) * 4) : NULL;
    case_fill_finite(t->dtype, a->x, n * t->hidden, s);
    for (int64_t i = 0; i < n * per_row && a->topk_weights; i++) {
        a->topk_weights[i] = case_weight(s);
    }
    for (int64_t i = 0; i < n; i++) {
        const bool gap = v->source[2 * i] < 0;
        if (a->weights) {
            a->weights[i] = case_weight(s);
        }
        if (gap) {
            memset(a->x + (size_t)i * row_bytes, 0xFF, row_bytes);
        }
        if (gap && a->weights) {
            memset(&a->weights[i], 0xFF, 4);
        }
        if (gap && a->topk_weights) {
            memset(&a->topk_weights[i], 0xFF, 4);
        }
    }
}

/* What combine must give a rank. */
static void build_result(struct trial *t, int rank) {
    const struct ref_combine in = {t->dtype, t->hidden, t->recv, t->answers};
    const int64_t tokens = t->c->in[rank].num_tokens;
    const size_t bytes = (size_t)(tokens * t->hidden) * ep_dtype_bytes((ep_dtype)t->dtype);
    const uint8_t *bias[2] = {t->bias[0][rank], t->bias[1][rank]};

    t->y[rank] = pool_zero(&t->pool, bytes);
    t->y_topk[rank] = t->back ? pool_zero(&t->pool, (size_t)(tokens * t->c->topk) * 4) : NULL;
    ref_combine(&t->c->problem, rank, &in, bias, t->y[rank], t->y_topk[rank]);
}

void trial_rebuild(struct trial *t) {
    for (int r = 0; r < t->c->num_ranks; r++) {
        build_result(t, r);
    }
}

static void build_bias(struct trial *t, int rank, uint64_t *s) {
    const int64_t n = t->c->in[rank].num_tokens * t->hidden;

    for (int b = 0; b < t->form[rank].num_bias; b++) {
        t->bias[b][rank] = pool_zero(&t->pool, (size_t)n * ep_dtype_bytes((ep_dtype)t->dtype));
        case_fill_finite(t->dtype, t->bias[b][rank], n, s);
    }
}

void trial_build(struct trial *t) {
    uint64_t s = t->c->data_seed + 1;

    for (int r = 0; r < t->c->num_ranks; r++) {
        const struct form *f = &t->form[r];
        ref_dispatch(&t->pool, &t->c->problem, r, f->expanded, f->alignment ? f->alignment : 1,
                     &t->recv[r]);
        build_answers(t, r, &s);
        build_bias(t, r, &s);
    }
    trial_rebuild(t);
}

void trial_free(struct trial *t) {
    pool_free(&t->pool);
}

/* Every other group has room for more experts, by another map. */
static void set_experts(struct ep_group_config *config, const struct test_case *c) {
    int most = 1;

    for (int r = 0; r < c->num_ranks; r++) {
        const int local = ref_num_local(&c->problem, r);
        most = local > most ? local : most;
    }
    config->num_experts = c->num_experts;
    config->expert_rank = c->map == MAP_EVEN ? NULL : c->expert_rank;
    if (c->seed % 2) {
        config->num_experts = c->num_ranks * most + (int)(c->seed / 2 % 3);
        config->expert_rank = NULL;
    }
}

void trial_setup(struct world_setup *s, const struct trial *t) {
    const struct test_case *c = t->c;
    const size_t combine_bytes = (size_t)t->hidden * ep_dtype_bytes((ep_dtype)t->dtype);
    const size_t row_bytes = c->problem.row_bytes;
    struct ep_group_config *config = &s->config;

    world_defaults(s, c->num_ranks);
    set_experts(config, c);
    config->max_tokens = c->max_tokens;
    config->max_topk = c->topk;
    config->max_row_bytes = (int32_t)(row_bytes > combine_bytes ? row_bytes : combine_bytes);
    config->max_scale_bytes = (int32_t)c->problem.scale_bytes;
    config->mask_routing = c->mask;
    for (int r = 0; r < c->num_ranks; r++) {
        if (t->form[r].expanded && t->form[r].arena) {
            config->flags |= EP_GROUP_EXPANDED_VIEW;
        }
        if (t->recv[r].expanded && config->max_expanded_rows < t->recv[r].num_rows) {
            config->max_expanded_rows = t->recv[r].num_rows;
        }
    }
    if (!(config->flags & EP_GROUP_EXPANDED_VIEW)) {
        config->max_expanded_rows = 0;
    }
    s->body = trial_body;
    s->ctx = (void *)(uintptr_t)t;
}

void trial_pass(struct world *w, const struct trial *t, ep_handle *handle) {
    struct run r;

    run_create(&r, w, t);
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    if (world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "ep_dispatch")) {
        run_check_dispatch(&r, handle);
    }
    if (world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine")) {
        run_check_combine(&r);
    }
    run_free(&r);
}

void trial_body(struct world *w) {
    ep_handle *handle = NULL;

    if (world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create")) {
        trial_pass(w, w->ctx, handle);
    }
    ep_handle_destroy(&handle);
    world_check(w, !handle, "the handle's pointer is not NULL");
}

static bool run_body(const struct trial *t, void (*body)(struct world *w), bool processes,
                     const char *name) {
    char what[512];
    struct world_setup s;

    trial_setup(&s, t);
    s.body = body;
    s.processes = processes;
    case_describe(t->c, what, sizeof(what));
    if (!ok(world_run(&s) == 0, "%s, %s", name,
            gpu_processes(processes) ? "processes" : "threads")) {
        diag("%s", what);
        return false;
    }
    return true;
}

bool trial_run(const struct trial *t, bool processes, const char *name) {
    return run_body(t, trial_body, processes, name);
}

bool trial_with(struct test_case *c, const struct form *form, void (*body)(struct world *w),
                bool processes, const char *name) {
    struct trial t;
    bool good;

    case_build(c);
    trial_init(&t, c);
    trial_form(&t, form);
    trial_build(&t);
    good = run_body(&t, body, processes, name);
    trial_free(&t);
    case_free(c);
    return good;
}

bool trial_case(struct test_case *c, const struct form *form, bool processes,
                const char *name) {
    return trial_with(c, form, trial_body, processes, name);
}
