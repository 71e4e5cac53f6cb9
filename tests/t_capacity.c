/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * More than there is room for: over max_tokens or max_recv_rows every rank gets EP_ERR_CAPACITY before
 * anything is sent; over an output's rows only the rank whose output it is. ep_handle_needs says
 * how much is needed, and the group goes on.
 */
#include <stdio.h>
#include <string.h>

#include "tests/calls.h"
#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 4
#define TOKENS 10

struct scene {
    struct test_case heavy_case, light_case;
    struct trial heavy, light; /* all tokens to one rank; few tokens */
    struct ep_needs needs;     /* of the heavy one ... */
    int64_t most;              /* ... in a group of such max_tokens */
};

static int busiest(const struct trial *t) {
    int best = 0;

    for (int r = 1; r < RANKS; r++) {
        best = t->recv[r].num_rows > t->recv[best].num_rows ? r : best;
    }
    return best;
}

static bool all_bytes(const void *data, size_t bytes, int value) {
    const uint8_t *p = data;

    for (size_t i = 0; i < bytes; i++) {
        if (p[i] != value) {
            return false;
        }
    }
    return true;
}

static void needs(struct world *w, ep_handle *handle, struct ep_needs want) {
    struct ep_needs n = EP_NEEDS_INIT;

    world_is(w, ep_handle_needs(handle, &n), EP_OK, "ep_handle_needs");
    world_check(w,
                n.max_tokens == want.max_tokens && n.max_recv_rows == want.max_recv_rows &&
                    n.output_rows == want.output_rows,
                "needs are %d tokens, %lld and %lld rows, not %d, %lld and %lld", n.max_tokens,
                (long long)n.max_recv_rows, (long long)n.output_rows, want.max_tokens,
                (long long)want.max_recv_rows, (long long)want.output_rows);
}

/* Counts are 0, ids and sources -1, for what is queued behind a dispatch that failed; nothing
 * from row `rows` on is written, or, when nothing has arrived, no row at all. */
static void left_in_bounds(struct run *r, int64_t rows, bool arrived) {
    for (int i = OUT_X; i <= OUT_NUM_ROWS; i++) {
        const struct output *o = &r->out[i];
        const uint8_t *data = o->t.data;
        const bool counts = i >= OUT_COUNTS, minus = i == OUT_IDS || i == OUT_SOURCE;
        size_t used;
        if (!data) {
            continue;
        }
        used = (size_t)((counts ? o->t.shape[0] : rows) * o->t.stride[0]) *
               ep_dtype_bytes((ep_dtype)o->t.dtype);
        world_check(r->w,
                    all_bytes(data + used, (size_t)(o->got + o->bytes - data) - used, 0xA5),
                    "output %d was written past its end", i);
        if (counts || minus) {
            world_check(r->w, all_bytes(data, used, counts ? 0 : 0xFF), "output %d: not %d", i,
                        counts ? 0 : -1);
        } else if (!arrived && i != OUT_WEIGHTS) {
            world_check(r->w, all_bytes(data, used, 0xA5), "output %d was written", i);
        }
    }
}

static void refused(struct run *r, ep_handle *handle) {
    char words[64];

    snprintf(words, sizeof(words), "%d|%d|max_recv_rows", RANKS * TOKENS, busiest(r->t));
    world_fails(r->w, run_dispatch(r, handle, NULL), EP_ERR_CAPACITY, words,
                "more rows than max_recv_rows");
    left_in_bounds(r, r->t->recv[r->w->rank].num_rows + r->form->slack, false);
    needs(r->w, handle, (struct ep_needs){.max_recv_rows = RANKS * TOKENS});
}

/* As a call, in two, or queued. */
static ep_status dispatch_heavy(struct run *r, ep_handle *handle, void *stream) {
    const struct ep_dispatch_args in = {sizeof(in), .x = r->dispatch.x,
                                        .topk_weights = r->dispatch.topk_weights};
    ep_status st = r->form->two_step ? call_dispatch_begin(handle, &in, stream)
                                     : run_dispatch(r, handle, stream);

    if (st == EP_OK && r->form->two_step) {
        return ep_handle_counts(handle, NULL, NULL, NULL);
    }
    return st == EP_OK && stream ? call_stream_sync(r->w->group, stream) : st;
}

static void over_max_tokens(struct world *w) {
    struct scene *s = w->ctx;
    const int64_t own = s->heavy_case.in[w->rank].num_tokens;
    struct run r;
    ep_handle *heavy = NULL, *light = NULL;
    void *stream = NULL;
    char words[64];

    snprintf(words, sizeof(words), "%d tokens|max_tokens%s", s->needs.max_tokens,
             s->needs.max_recv_rows ? "|max_recv_rows" : "");
    world_is(w, ep_handle_create(&heavy, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, ep_handle_create(&light, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    run_create(&r, w, &s->heavy);
    for (int i = 0; i < 4; i++) {
        struct ep_layout layout = EP_LAYOUT_INIT;
        void *on = i % 2 ? stream : NULL;
        if (i != 1) { /* what was queued counts as dispatched till it is asked about */
            world_is(w, run_route(&r, heavy, on), EP_OK, "ep_handle_route");
        }
        world_is(w, call_layout(heavy, &layout, on), own > s->most ? EP_ERR_CAPACITY : EP_OK,
                 "ep_handle_layout");
        world_fails(w, dispatch_heavy(&r, heavy, on), EP_ERR_CAPACITY, words,
                    "too many tokens");
        if (!r.form->two_step) {
            left_in_bounds(&r, r.t->recv[w->rank].num_rows + r.form->slack, false);
        }
        needs(w, heavy, s->needs);
        trial_pass(w, &s->light, light);
        needs(w, light, (struct ep_needs){0});
    }
    run_free(&r);
    trial_pass(w, &s->light, heavy);
    call_stream_destroy(w->group, &stream);
    ep_handle_destroy(&heavy);
    ep_handle_destroy(&light);
}

static void over_max_recv_rows(struct world *w) {
    struct scene *s = w->ctx;
    struct ep_fault fault = EP_FAULT_INIT;
    struct run r;
    ep_handle *heavy = NULL, *light = NULL;

    world_is(w, ep_handle_create(&heavy, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, ep_handle_create(&light, w->group, NULL), EP_OK, "ep_handle_create");
    run_create(&r, w, &s->heavy);
    world_is(w, run_route(&r, heavy, NULL), EP_OK, "ep_handle_route");
    for (int i = 0; i < 3; i++) {
        refused(&r, heavy);
        world_fails(w, run_combine(&r, heavy, NULL), EP_ERR_STATE, "dispatch",
                    "combine of a dispatch that was refused");
        trial_pass(w, &s->light, light);
    }
    run_free(&r);
    trial_pass(w, &s->light, heavy); /* the handle itself is as good as new */
    world_is(w, ep_group_fault(w->group, &fault), EP_OK, "ep_group_fault");
    world_check(w, fault.status == EP_OK, "the group is faulted: %s", fault.message);
    ep_handle_destroy(&heavy);
    ep_handle_destroy(&light);
}

/* Begun, too large, and left: the handle goes before anyone has looked, early or late. */
static void left_begun(struct world *w) {
    struct scene *s = w->ctx;
    struct ep_dispatch_args in = EP_DISPATCH_ARGS_INIT;
    struct run r;
    ep_handle *heavy = NULL, *light = NULL;
    void *stream = NULL;

    world_is(w, ep_handle_create(&light, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    run_create(&r, w, &s->heavy);
    in.x = r.dispatch.x;
    in.topk_weights = r.dispatch.topk_weights;
    for (int i = 0; i < 6; i++) {
        const int64_t late_ns = 800 * EPI_NS_PER_MS;
        if (i == 5 && w->rank == 1) { /* nobody's counts are known before */
            epi_sleep_ns(late_ns);
        }
        world_is(w, ep_handle_create(&heavy, w->group, NULL), EP_OK, "ep_handle_create");
        world_is(w, run_route(&r, heavy, NULL), EP_OK, "ep_handle_route");
        world_is(w, call_dispatch_begin(heavy, &in, stream), EP_OK, "ep_dispatch_begin");
        tap_sleep_ms((w->rank + i) % 3 ? 0 : 20);
        const int64_t start_ns = epi_now_ns();
        ep_handle_destroy(&heavy);
        world_check(w, epi_now_ns() - start_ns < late_ns / 2, "destroy waited for %lld ms",
                    (long long)(epi_now_ns() - start_ns) / 1000000);
        trial_pass(w, &s->light, light);
    }
    run_free(&r);
    call_stream_destroy(w->group, &stream);
    ep_handle_destroy(&light);
}

/* Every output one row too short: on error only bytes within it may have changed. */
static void shorten(struct ep_dispatch_args *args, struct ep_tensor *copies, int64_t rows) {
    struct ep_tensor **t[] = {&args->recv_x, &args->recv_scales, &args->recv_topk_ids,
                              &args->recv_topk_weights, &args->recv_source};

    for (int i = 0; i < 5; i++) {
        if (*t[i]) {
            copies[i] = **t[i];
            copies[i].shape[0] = rows;
            *t[i] = &copies[i];
        }
    }
}

static void small_output(struct world *w) {
    struct scene *s = w->ctx;
    const struct trial *t = &s->light;
    const int victim = busiest(t);
    const int64_t rows = t->recv[victim].num_rows - 1;
    struct ep_tensor copies[5];
    struct run r;
    ep_handle *handle = NULL;

    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    run_create(&r, w, t);
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    for (int i = 0; i < 3; i++) {
        const struct ep_dispatch_args whole = r.dispatch;
        char words[32];

        snprintf(words, sizeof(words), "%lld|rows", (long long)rows + 1);
        if (w->rank == victim) {
            shorten(&r.dispatch, copies, rows);
            world_fails(w, run_dispatch(&r, handle, NULL), EP_ERR_CAPACITY, words,
                        "output one row too short");
            left_in_bounds(&r, rows, true);
            needs(w, handle, (struct ep_needs){.output_rows = rows + 1});
        } else if (world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "beside it")) {
            run_check_dispatch(&r, handle);
        }
        r.dispatch = whole;
        if (world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "again, large enough")) {
            run_check_dispatch(&r, handle);
        }
        if (world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine")) {
            run_check_combine(&r);
        }
    }
    run_free(&r);
    ep_handle_destroy(&handle);
}

/* An expanded view shorter than the output, on one rank. */
static void small_expanded_view(struct world *w) {
    struct scene *s = w->ctx;
    const struct trial *t = &s->light;
    struct run r;
    ep_handle *handle = NULL;

    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    run_create(&r, w, t);
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    r.dispatch.alignment = w->rank == 1 ? 1000 : 0; /* 4 groups of 1000 rows */
    if (w->rank == 1) {
        world_fails(w, run_dispatch(&r, handle, NULL), EP_ERR_CAPACITY, "4000", "a short view");
    } else {
        world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "beside it");
        run_check_dispatch(&r, handle);
    }
    r.dispatch.alignment = 0;
    world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "again, without alignment");
    run_check_dispatch(&r, handle);
    world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine");
    run_check_combine(&r);
    run_free(&r);
    ep_handle_destroy(&handle);
}

/* Offsets that 31 or 32 bits cannot name are refused, with the rows that would be needed. */
#define MANY_EXPERTS 65536

static void more_rows_than_offsets_can_name(struct world *w) {
    static int32_t ids[MANY_EXPERTS / 64][64], offsets[MANY_EXPERTS + 1];
    static const struct {
        int alignment;
        const char *says;
    } cases[] = {{65536, "4294967296 rows"}, {32768, "2147483648 rows"}, {1, NULL}};
    _Alignas(16) static uint8_t x[MANY_EXPERTS / 64][16], got[MANY_EXPERTS][16];
    int32_t num_rows = -1;
    struct ep_tensor ids_t, x_t, got_t, offsets_t, num_t, out_t;
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_combine_args combine = EP_COMBINE_ARGS_INIT;
    ep_handle *handle = NULL;

    for (int e = 0; e < MANY_EXPERTS; e++) {
        ids[e / 64][e % 64] = e;
    }
    ep_tensor_2d(&ids_t, EP_I32, ids, MANY_EXPERTS / 64, 64);
    ep_tensor_2d(&x_t, EP_F32, x, MANY_EXPERTS / 64, 4);
    ep_tensor_2d(&got_t, EP_F32, got, MANY_EXPERTS, 4);
    ep_tensor_2d(&out_t, EP_F32, x, MANY_EXPERTS / 64, 4);
    ep_tensor_1d(&offsets_t, EP_I32, offsets, MANY_EXPERTS + 1);
    ep_tensor_1d(&num_t, EP_I32, &num_rows, 1);
    routing.topk_ids = &ids_t;
    combine.x = &got_t;
    combine.out = &out_t;
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, ep_handle_route(handle, &routing, NULL), EP_OK, "ep_handle_route");
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct ep_dispatch_args d = EP_DISPATCH_ARGS_INIT;
        d.flags = EP_DISPATCH_EXPANDED | EP_DISPATCH_ZERO_GAPS;
        d.alignment = cases[i].alignment;
        d.x = &x_t;
        d.recv_x = &got_t;
        d.expert_offsets = &offsets_t;
        d.num_rows = &num_t;
        const bool fits = !cases[i].says;
        world_fails(w, ep_dispatch(handle, &d, NULL), fits ? EP_OK : EP_ERR_CAPACITY,
                    fits ? "" : cases[i].says, "ep_dispatch");
        world_fails(w, ep_combine(handle, &combine, NULL), fits ? EP_OK : EP_ERR_ARG,
                    fits ? "" : "x.shape[0]", "ep_combine");
        world_check(w, num_rows == (fits ? MANY_EXPERTS : 0), "num_rows is %d", num_rows);
        for (int e = 0; e <= MANY_EXPERTS; e++) {
            if (!world_check(w, offsets[e] == (fits ? e : 0), "offset %d is %d", e,
                             offsets[e])) {
                break;
            }
        }
    }
    ep_handle_destroy(&handle);
}

static void far_beyond(void) {
    struct world_setup s;

    world_defaults(&s, 1);
    s.host = true;
    s.config.num_experts = MANY_EXPERTS;
    s.config.max_tokens = MANY_EXPERTS / 64;
    s.config.max_topk = 64;
    s.config.max_row_bytes = 16;
    s.config.num_workers = 3;
    s.body = more_rows_than_offsets_can_name;
    ok(world_run(&s) == 0, "more rows than offsets can name");
}

/* Room for the tokens of all ranks but one or two; and for all rows of the others but one, if they
 * are more than the light trial's. */
static void lack_tokens(struct scene *s, struct ep_group_config *c, const char *name) {
    const bool two = strstr(name, "two") != NULL, rows_too = strstr(name, "rows") != NULL;
    int64_t most = 0, second = 0, most_rows = 0;

    for (int r = 0; r < RANKS; r++) {
        const int64_t tokens = s->heavy_case.in[r].num_tokens;
        second = tokens > most ? most : tokens > second ? tokens : second;
        most = tokens > most ? tokens : most;
    }
    s->needs.max_tokens = (int32_t)most;
    c->max_tokens = (int32_t)(two && second > 4 ? second : most) - 1;
    s->most = c->max_tokens;
    for (int d = 0; d < RANKS; d++) {
        int64_t rows = 0;
        for (int r = 0; r < RANKS; r++) {
            const bool fits = s->heavy_case.in[r].num_tokens <= c->max_tokens;
            rows += fits ? s->heavy.recv[d].rows_per_source[r] : 0;
        }
        most_rows = rows > most_rows ? rows : most_rows;
    }
    if (rows_too && most_rows > RANKS * 4) {
        s->needs.max_recv_rows = most_rows;
        c->max_recv_rows = most_rows - 1;
    }
}

static void run(uint64_t seed, const struct form *form, void (*body)(struct world *w),
                const char *name) {
    struct scene s = {0};
    struct world_setup setup;
    const bool of_tokens = strstr(name, "max_tokens") != NULL;

    case_default(&s.heavy_case, RANKS, seed);
    s.heavy_case.max_tokens = of_tokens ? 400 : TOKENS;
    s.heavy_case.tokens = of_tokens ? TOKENS_MIXED : TOKENS_MAX;
    s.heavy_case.routing = ROUTE_ONE_RANK;
    case_default(&s.light_case, RANKS, seed + 1);
    s.light_case.max_tokens = body == small_expanded_view ? TOKENS : 4;
    s.light_case.tokens = TOKENS_MAX;
    case_build(&s.heavy_case);
    case_build(&s.light_case);
    trial_init(&s.heavy, &s.heavy_case);
    trial_init(&s.light, &s.light_case);
    trial_form(&s.heavy, form);
    trial_form(&s.light, form);
    trial_build(&s.heavy);
    trial_build(&s.light);
    trial_setup(&setup, &s.light);
    setup.config.max_tokens = TOKENS;
    if (of_tokens) {
        lack_tokens(&s, &setup.config, name);
    } else if (body != small_output && body != small_expanded_view) {
        setup.config.max_recv_rows = RANKS * TOKENS - 1;
    }
    setup.body = body;
    setup.ctx = &s;
    ok(world_run(&setup) == 0, "%s", name);
    trial_free(&s.heavy);
    trial_free(&s.light);
    case_free(&s.heavy_case);
    case_free(&s.light_case);
}

int main(void) {
    gpu_program();
    static const struct form compact = {.id_dtype = EP_I64, .slack = 1, .padded = true};
    static const struct form expanded = {
        .id_dtype = EP_I32, .expanded = true, .weighted = true};
    static const struct form view = {.expanded = true, .arena = true, .id_dtype = EP_I64};
    static const struct form two_step = {.id_dtype = EP_I64, .two_step = true};
    uint64_t seed = tap_seed();

    tap_deadline(120);
    run(seed, &compact, over_max_recv_rows, "over max_recv_rows, compact");
    run(seed + 1, &expanded, over_max_recv_rows, "over max_recv_rows, expanded");
    run(seed + 7, &compact, over_max_tokens, "over max_tokens on one rank, compact");
    run(seed + 8, &expanded, over_max_tokens,
        "over max_tokens on two ranks and max_recv_rows, expanded");
    run(seed + 9, &two_step, over_max_tokens, "over max_tokens and max_recv_rows, begun");
    run(seed + 6, &two_step, left_begun, "over max_recv_rows, begun and left");
    run(seed + 2, &compact, small_output, "small output, compact");
    run(seed + 3, &expanded, small_output, "small output, expanded");
    run(seed + 4, &two_step, small_output, "small output, two steps");
    run(seed + 5, &view, small_expanded_view, "small expanded view");
    if (!gpu_wanted()) {
        far_beyond();
    }
    return done_testing();
}
