/* SPDX-License-Identifier: MIT */
/* class: rest, long */
/*
 * Random cases in random forms against the reference, byte by byte: EP_CASES of them, or the
 * number below times TAP_EFFORT. A failing case prints the EP_SEED that replays it alone (with
 * EP_CASES=1).
 */
#include <stdlib.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

#if defined(__SANITIZE_THREAD__)
#define MANY_CASES 150
#elif defined(__SANITIZE_ADDRESS__)
#define MANY_CASES 500
#else
#define MANY_CASES 1500
#endif

#define FEW_CASES 100

/* A pass, then cached dispatches and combines, and now and then a new routing. */
static void body(struct world *w) {
    const struct trial *t = w->ctx;
    uint64_t s = t->c->seed; /* the same on all ranks */
    ep_handle *handle = NULL;
    struct run r;

    if (!world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create")) {
        return;
    }
    trial_pass(w, t, handle);
    run_create(&r, w, t);
    for (int64_t n = case_rand(&s, 4); n > 0; n--) {
        if (case_rand(&s, 3) == 0) {
            world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
        }
        if (world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "ep_dispatch, again")) {
            run_check_dispatch(&r, handle);
        }
        for (int64_t m = case_rand(&s, 3); m > 0; m--) {
            if (world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine, again")) {
                run_check_combine(&r);
            }
        }
    }
    run_free(&r);
    ep_handle_destroy(&handle);
}

static bool one_case(uint64_t seed) {
    struct test_case c;
    struct trial t;
    struct world_setup s;
    char what[512];
    bool good;

    case_random(&c, seed);
    case_build(&c);
    trial_init(&t, &c);
    trial_random(&t, seed + 1);
    trial_build(&t);
    trial_setup(&s, &t);
    s.config.num_workers = (int)(seed % 4);
    s.processes = seed % 16 == 7;
    s.body = body;
    good = world_run(&s) == 0;
    if (!good) {
        case_describe(&c, what, sizeof(what));
        diag("%s, combine %lld x dtype %d", what, (long long)t.hidden, t.dtype);
        for (int r = 0; r < c.num_ranks; r++) {
            const struct form *f = &t.form[r];
            diag("rank %d: T %lld%s%s%s%s%s, alignment %d, slack %lld, biases %d, workers %d",
                 r, (long long)c.in[r].num_tokens, f->expanded ? ", expanded" : "",
                 f->arena ? ", view" : "", f->two_step ? ", two steps" : "",
                 f->padded ? ", padded" : "", f->weighted ? ", weighted" : "", f->alignment,
                 (long long)f->slack, f->num_bias, f->num_workers);
        }
    }
    trial_free(&t);
    case_free(&c);
    return good;
}

int main(void) {
    gpu_program();
    const char *text = getenv("EP_CASES");
    const int usual = gpu_wanted() || tap_quick() ? FEW_CASES : MANY_CASES;
    const int cases = text && atoi(text) > 0 ? atoi(text) : usual * tap_effort();
    const uint64_t seed = tap_seed();
    int failed = 0;

    tap_deadline(120 + cases);
    for (int i = 0; i < cases && failed < 5; i++) {
        if (!one_case(seed + (uint64_t)i)) {
            failed++;
            diag("to replay: EP_SEED=%llu EP_CASES=1",
                 (unsigned long long)(seed + (uint64_t)i));
        }
    }
    ok(failed == 0, "%d random cases", cases);
    return done_testing();
}
