/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Output as a view of the arena: compact and expanded, in turn through the slots, written by
 * the experts in place and combined from where it lies.
 */
#include <stdio.h>
#include <string.h>

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define NUM_SLOTS 3

/* The same routing and forms with other rows and other answers in each slot. */
struct scene {
    struct test_case c[NUM_SLOTS];
    struct trial t[NUM_SLOTS];
};

static void views(uint64_t seed) {
    for (int i = 0; i < 12; i++) {
        struct test_case c;
        struct trial t;
        char name[64];

        case_default(&c, 4, seed + (uint64_t)i);
        c.routing = (enum case_routing)(i % NUM_ROUTINGS);
        c.map = (enum case_map)(i % NUM_MAPS);
        c.row_dtype = i % 3 ? EP_F8E4M3 : EP_F32;
        case_build(&c);
        trial_init(&t, &c);
        for (int r = 0; r < 4; r++) {
            t.form[r].arena = true;
            t.form[r].expanded = i % 2;
            t.form[r].zero_gaps = i % 4 == 3;
            t.form[r].alignment = 1 + 4 * (i % 3);
        }
        trial_build(&t);
        snprintf(name, sizeof(name), "%s view", i % 2 ? "expanded" : "compact");
        trial_run(&t, i % 4 == 2, name);
        trial_free(&t);
        case_free(&c);
    }
}

/* Writes the answers into the handle's arena, after 0xFF over all that its owner may write. */
static void answer_in_place(struct run *r, ep_handle *handle, struct ep_tensor *view) {
    const struct trial *t = r->t;
    const size_t elem = ep_dtype_bytes((ep_dtype)t->dtype);
    const size_t bytes = (size_t)t->hidden * elem;
    const int64_t rows = t->recv[r->w->rank].num_rows;
    struct pool pool = {0};

    *view = (struct ep_tensor)EP_TENSOR_INIT;
    if (!world_is(r->w,
                  ep_handle_arena(handle, r->form->expanded ? EP_DISPATCH_EXPANDED : 0,
                                  (ep_dtype)t->dtype, t->hidden, view),
                  EP_OK, "ep_handle_arena") ||
        !world_check(r->w,
                     view->shape[0] >= rows && view->shape[1] == t->hidden &&
                         view->dtype == t->dtype && view->stride[1] == 1,
                     "ep_handle_arena: [%lld][%lld]", (long long)view->shape[0],
                     (long long)view->shape[1])) {
        return;
    }
    if (!world_check(r->w, view->stride[0] == view->shape[1], "the view has gaps")) {
        return;
    }
    const size_t all = (size_t)view->shape[0] * bytes;
    uint8_t *answers = pool_fill(&pool, all, 0xFF);
    memcpy(answers, t->answers[r->w->rank].x, (size_t)rows * bytes);
    call_write(r->w->group, view->data, answers, all);
    pool_free(&pool);
    r->combine.x = view;
}

/* A slack of NaN rows follows the answers: weights and top-k weights must be as long as x. */
static void shorten(struct run *r, struct ep_tensor *view) {
    view->shape[0] = r->t->recv[r->w->rank].num_rows;
}

static void in_place(struct world *w) {
    const struct scene *s = w->ctx;
    struct run r;
    struct ep_tensor view;
    ep_handle *handle = NULL;

    run_create(&r, w, &s->t[0]);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    for (int i = 0; i < 2 * NUM_SLOTS + 1; i++) {
        if (!world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "ep_dispatch")) {
            break;
        }
        run_check_dispatch(&r, handle);
        answer_in_place(&r, handle, &view);
        shorten(&r, &view);
        for (int n = 0; n < 2; n++) {
            if (world_is(w, run_combine(&r, handle, NULL), EP_OK,
                         "ep_combine from the arena")) {
                run_check_combine(&r);
            }
        }
    }
    run_free(&r);
    ep_handle_destroy(&handle);
}

/* NUM_SLOTS handles, each with a view that stays as it is until as many dispatches have passed;
 * then the answers go back from all of them. */
static void slots_in_turn(struct world *w) {
    const struct scene *s = w->ctx;
    struct run r[NUM_SLOTS];
    struct ep_tensor view[NUM_SLOTS];
    ep_handle *handle[NUM_SLOTS] = {NULL};

    for (int i = 0; i < NUM_SLOTS; i++) {
        run_create(&r[i], w, &s->t[i]);
        world_is(w, ep_handle_create(&handle[i], w->group, NULL), EP_OK, "ep_handle_create");
        world_is(w, run_route(&r[i], handle[i], NULL), EP_OK, "ep_handle_route");
    }
    for (int n = 0; n < 4 * NUM_SLOTS; n++) {
        const int i = n % NUM_SLOTS;
        world_is(w, run_dispatch(&r[i], handle[i], NULL), EP_OK, "ep_dispatch");
        for (int older = 0; older < NUM_SLOTS && older <= n; older++) {
            run_check_rows(&r[(n - older) % NUM_SLOTS], &r[(n - older) % NUM_SLOTS].view);
        }
    }
    for (int i = 0; i < NUM_SLOTS; i++) {
        answer_in_place(&r[i], handle[i], &view[i]);
        shorten(&r[i], &view[i]);
    }
    for (int i = NUM_SLOTS - 1; i >= 0; i--) {
        world_is(w, run_combine(&r[i], handle[i], NULL), EP_OK, "ep_combine from the arena");
        run_check_combine(&r[i]);
        run_free(&r[i]);
        ep_handle_destroy(&handle[i]);
    }
}

static void scene_create(struct scene *s, uint64_t seed, int variant) {
    static const int dtypes[] = {EP_BF16, EP_F32, EP_F16};
    struct form form = {.arena = true, .id_dtype = EP_I64, .num_bias = 1};

    form.expanded = variant % 2;
    form.weighted = variant / 2 % 2;
    form.alignment = variant % 4 == 3 ? 4 : 1;
    for (int i = 0; i < NUM_SLOTS; i++) {
        case_default(&s->c[i], 4, seed + (uint64_t)variant);
        s->c[i].data_seed += (uint64_t)i;
        s->c[i].row_dtype =
            variant % 3 ? EP_U8 : EP_BF16; /* answers of another type and size */
        case_build(&s->c[i]);
        trial_init(&s->t[i], &s->c[i]);
        trial_form(&s->t[i], &form);
        s->t[i].dtype = dtypes[variant % 3];
        s->t[i].hidden = variant % 3 == 2 ? 32 : 96;
        trial_build(&s->t[i]);
    }
}

static void run(uint64_t seed, int variant, void (*body)(struct world *w), const char *name) {
    struct scene s;
    struct world_setup setup;

    scene_create(&s, seed, variant);
    trial_setup(&setup, &s.t[0]);
    setup.config.num_slots = NUM_SLOTS;
    setup.processes = variant >= 4;
    setup.body = body;
    setup.ctx = &s;
    ok(world_run(&setup) == 0, "%s, variant %d", name, variant);
    for (int i = 0; i < NUM_SLOTS; i++) {
        trial_free(&s.t[i]);
        case_free(&s.c[i]);
    }
}

/* What ep_handle_arena refuses. */
static void refusals(struct world *w) {
    const struct scene *s = w->ctx;
    struct run r;
    struct ep_tensor view = EP_TENSOR_INIT;
    ep_handle *handle = NULL;

    run_create(&r, w, &s->t[0]);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_fails(w, ep_handle_arena(handle, 0, EP_BF16, 64, &view), EP_ERR_STATE, "dispatch",
                "the arena before a dispatch");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "ep_dispatch");
    world_fails(w, ep_handle_arena(handle, 0, EP_BF16, 64 * 1024, &view), EP_ERR_ARG,
                "131072|192", "rows longer than max_row_bytes");
    world_fails(w, ep_handle_arena(handle, 0, EP_BF16, 3, &view), EP_ERR_ARG, "16",
                "rows of 6 bytes");
    world_fails(w, ep_handle_arena(handle, EP_DISPATCH_EXPANDED, EP_BF16, 64, &view),
                EP_ERR_ARG, "EP_GROUP_EXPANDED_VIEW", "an expanded view without room for it");
    world_fails(w, ep_handle_arena(handle, 0, (ep_dtype)77, 64, &view), EP_ERR_ARG, "77",
                "no such dtype");
    r.dispatch.flags |= EP_DISPATCH_EXPANDED;
    r.dispatch.recv_topk_ids = NULL;
    r.dispatch.recv_topk_weights = NULL;
    world_fails(w, call_dispatch(handle, &r.dispatch, NULL), EP_ERR_ARG,
                "EP_GROUP_EXPANDED_VIEW", "dispatch into an expanded view without room for it");
    run_free(&r);
    trial_pass(w, &s->t[0], handle);
    ep_handle_destroy(&handle);
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();

    tap_deadline(180);
    views(seed);
    for (int variant = 0; variant < 6; variant++) {
        run(seed + 100, variant, in_place, "answers written in place");
        run(seed + 200, variant, slots_in_turn, "slots in turn");
    }
    run(seed + 300, 0, refusals, "refusals");
    return done_testing();
}
