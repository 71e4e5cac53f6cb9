/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * In two steps. Dispatch: begin sends, the counts are known, finish writes output of exactly the
 * right size. Combine: begin sends the answers, finish adds them up. Beside ranks that do it in one,
 * cached, on two streams, and in the wrong order.
 */
#include <stdatomic.h>
#include <stdio.h>

#include "src/base/base.h"

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

/* From number `first` on, `num` of them. */
static void forms(uint64_t seed, int first, int num) {
    for (int i = first; i < first + num; i++) {
        struct test_case c;
        struct trial t;
        char name[96];

        case_default(&c, 4, seed + (uint64_t)i);
        c.routing = (enum case_routing)(i % NUM_ROUTINGS);
        c.num_scales = 3;
        c.scale_dtype = EP_F32;
        case_build(&c);
        trial_init(&t, &c);
        for (int r = 0; r < 4; r++) {
            t.form[r].two_step = i % 3 || r % 2; /* i % 3 == 0: some ranks in one call */
            t.form[r].expanded = i % 2;
            t.form[r].zero_gaps = i % 4 == 1;
            t.form[r].alignment = 1 + i;
            t.form[r].arena = i % 5 == 4;
            t.form[r].weighted = i % 4 > 1;
            t.form[r].num_bias = i % 3;
        }
        t.back = i % 3 > 0;
        trial_build(&t);
        snprintf(name, sizeof(name), "%s%s%s", i % 2 ? "expanded" : "compact",
                 i % 5 == 4 ? ", view" : "", i % 3 ? "" : ", beside ranks in one call");
        trial_run(&t, i % 6 == 5, name);
        trial_free(&t);
        case_free(&c);
    }
}

/* Begin and finish again on a handle that knows its counts. */
static void cached(struct world *w) {
    const struct trial *t = w->ctx;
    struct run r;
    ep_handle *handle = NULL;

    run_create(&r, w, t);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    for (int i = 0; i < 4; i++) {
        if (world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "begin and finish")) {
            run_check_dispatch(&r, handle);
        }
        if (world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine")) {
            run_check_combine(&r);
        }
    }
    run_free(&r);
    ep_handle_destroy(&handle);
}

static void held(void *arg) {
    atomic_int *go = arg;
    while (!atomic_load(go)) {
        epi_sleep_ns(EPI_NS_PER_MS);
    }
}

/* Each half is on a stream of its own; on the host finish comes to be run before begin. */
static void two_streams(struct world *w) {
    const struct trial *t = w->ctx;
    void *first = NULL, *second = NULL;
    struct run r;
    ep_handle *handle = NULL;

    run_create(&r, w, t);
    world_is(w, call_stream_create(&first, w->group), EP_OK, "a stream");
    world_is(w, call_stream_create(&second, w->group), EP_OK, "another stream");
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    for (int i = 0; i < 4; i++) {
        atomic_int go = 0;
        const bool combines = i % 2;
        if (!gpu_wanted()) {
            world_is(w, ep_stream_run(first, held, &go), EP_OK, "held");
        }
        run_poison(&r, OUT_X, OUT_Y_TOPK);
        world_is(w,
                 combines ? call_combine_begin(handle, &r.combine, first)
                          : call_dispatch_begin(handle, &r.dispatch, first),
                 EP_OK, "begin");
        world_is(w,
                 combines ? call_combine_finish(handle, &r.combine, second)
                          : call_dispatch_finish(handle, &r.dispatch, second),
                 EP_OK, "finish");
        epi_sleep_ns(5 * EPI_NS_PER_MS);
        atomic_store(&go, 1);
        world_is(w, call_stream_sync(w->group, second), EP_OK, "finish, on its stream");
        world_is(w, call_stream_sync(w->group, first), EP_OK, "begin, on its stream");
        combines ? run_check_combine(&r) : run_check_outputs(&r);
    }
    if (!gpu_wanted()) { /* combine begins before the stream has come to dispatch's finish */
        atomic_int go = 0;
        run_poison(&r, OUT_X, OUT_Y_TOPK);
        world_is(w, call_dispatch_begin(handle, &r.dispatch, first), EP_OK, "begin");
        world_is(w, call_stream_sync(w->group, first), EP_OK, "begin");
        world_is(w, ep_stream_run(first, held, &go), EP_OK, "held");
        world_is(w, call_dispatch_finish(handle, &r.dispatch, first), EP_OK, "finish");
        world_is(w, run_combine(&r, handle, first), EP_OK, "combine");
        atomic_store(&go, 1);
        world_is(w, call_stream_sync(w->group, first), EP_OK, "both");
        run_check_outputs(&r);
        run_check_combine(&r);
    }
    ep_handle_destroy(&handle);
    call_stream_destroy(w->group, &first);
    call_stream_destroy(w->group, &second);
    run_free(&r);
}

/* What may not happen between begin and finish, and before begin. */
static void wrong_order(struct world *w) {
    const struct trial *t = w->ctx;
    struct ep_dispatch_args in = EP_DISPATCH_ARGS_INIT;
    struct run r;
    ep_handle *handle = NULL, *other = NULL;

    run_create(&r, w, t);
    in.x = r.dispatch.x;
    in.topk_weights = r.dispatch.topk_weights;
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, ep_handle_create(&other, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    world_is(w, run_route(&r, other, NULL), EP_OK, "ep_handle_route");
    world_fails(w, call_dispatch_finish(handle, &r.dispatch, NULL), EP_ERR_STATE, "beg",
                "finish without begin");
    world_is(w, call_dispatch_begin(handle, &in, NULL), EP_OK, "ep_dispatch_begin");
    world_fails(w, call_dispatch_begin(handle, &in, NULL), EP_ERR_STATE, "finish",
                "begin twice");
    world_fails(w, run_route(&r, handle, NULL), EP_ERR_STATE, "finish", "route in between");
    world_fails(w, call_dispatch(other, &r.dispatch, NULL), EP_ERR_STATE, "finish",
                "dispatch of another handle in between");
    world_fails(w, run_combine(&r, other, NULL), EP_ERR_STATE, "", "combine in between");
    world_is(w, call_dispatch_finish(handle, &r.dispatch, NULL), EP_OK, "ep_dispatch_finish");
    run_check_dispatch(&r, handle);
    world_fails(w, call_dispatch_finish(handle, &r.dispatch, NULL), EP_ERR_STATE, "beg",
                "finish twice");
    world_fails(w, call_combine_finish(handle, &r.combine, NULL), EP_ERR_STATE,
                "ep_combine_finish|begin", "combine's finish without begin");
    world_is(w, call_combine_begin(handle, &r.combine, NULL), EP_OK, "ep_combine_begin");
    world_fails(w, call_combine_begin(handle, &r.combine, NULL), EP_ERR_STATE,
                "a combine|finish", "combine's begin twice");
    world_fails(w, run_route(&r, handle, NULL), EP_ERR_STATE, "finish", "route in between");
    world_fails(w, call_dispatch(other, &r.dispatch, NULL), EP_ERR_STATE, "a combine|finish",
                "dispatch of another handle in between");
    world_fails(w, call_dispatch_finish(handle, &r.dispatch, NULL), EP_ERR_STATE, "begin",
                "the other operation's finish");
    world_is(w, ep_handle_counts(handle, NULL, NULL, NULL), EP_OK, "counts in between");
    world_is(w, call_combine_finish(handle, &r.combine, NULL), EP_OK, "ep_combine_finish");
    run_check_combine(&r);
    world_fails(w, call_combine_finish(handle, &r.combine, NULL), EP_ERR_STATE, "begin",
                "combine's finish twice");
    run_free(&r);
    trial_pass(w, t, other);
    ep_handle_destroy(&handle);
    ep_handle_destroy(&other);
}

static void both(struct world *w) {
    cached(w);
    two_streams(w);
    wrong_order(w);
}

static void run(uint64_t seed, void (*body)(struct world *w), const char *name) {
    const struct form form = {.two_step = true, .id_dtype = EP_I64, .num_bias = 1};
    struct test_case c;

    case_default(&c, 4, seed);
    trial_with(&c, &form, body, false, name);
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();

    tap_deadline(120);
    if (gpu_processes(false)) { /* which take seconds to begin and to end on a GPU */
        forms(seed, 3, 2);
        run(seed + 100, both, "cached, and in the wrong order");
        return done_testing();
    }
    forms(seed, 0, 12);
    run(seed + 100, cached, "cached");
    run(seed + 102, two_streams, "on two streams");
    run(seed + 101, wrong_order, "in the wrong order");
    return done_testing();
}
