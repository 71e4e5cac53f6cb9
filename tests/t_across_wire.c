/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * What crosses between nodes: a token's row once to each node, and its answer once back, which is counted
 * in bytes. And a network that loses completions, here or there, in any order, late: an operation is right,
 * or ends with a fault that is told within its deadline; never a wrong byte, never a hang.
 */
#include <stdio.h>
#include <stdlib.h>

#include "src/ep/wires.h"

#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 4
#define STEPS 4

static void build(struct test_case *c, struct trial *t, uint64_t seed, int64_t hidden) {
    case_default(c, RANKS, seed);
    c->hidden = hidden;
    c->tokens = TOKENS_MAX;
    case_build(c);
    trial_init(t, c);
    t->back = true;
    t->dtype = c->row_dtype;
    t->hidden = hidden;
    trial_build(t);
}

static void destroy(struct test_case *c, struct trial *t) {
    trial_free(t);
    case_free(c);
}

/* ---- bytes ------------------------------------------------------------------------------ */

/* What was written is near `rows` rows, and far from a row for each rank. */
static void check_bytes(struct world *w, uint64_t bytes, int64_t rows, int64_t each,
                        const char *what) {
    const int64_t least = rows * each, most = least + least / 8 + 8192;
    world_check(w, (int64_t)bytes >= least && (int64_t)bytes <= most,
                "%s: %llu bytes are written, %lld..%lld are those of %lld rows", what,
                (unsigned long long)bytes, (long long)least, (long long)most, (long long)rows);
}

static void count_bytes(struct world *w) {
    const struct trial *t = w->ctx;
    const struct test_case *c = t->c;
    const int64_t each = (int64_t)c->problem.row_bytes;
    const int32_t *node = c->problem.node;
    int64_t out = 0, back = 0, flat = 0;
    ep_handle *handle = NULL;
    uint64_t bytes[3];
    struct run r;

    for (int s = 0; s < RANKS; s++) { /* two nodes of two ranks: s relays for s + 2 or s - 2 */
        for (int64_t i = 0; i < c->in[s].num_tokens; i++) {
            int goes = 0;
            for (int d = 0; d < RANKS; d++) {
                goes += node[d] != node[s] && ref_goes_to(&c->problem, s, i, d);
            }
            out += s == w->rank && goes;
            back += (s + 2) % RANKS == w->rank && goes;
            flat += s == w->rank ? goes : 0;
        }
    }
    run_create(&r, w, t);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    bytes[0] = epi_wires_counts(w->group->wires).bytes;
    world_is(w, run_dispatch(&r, handle, NULL), EP_OK, "ep_dispatch");
    world_barrier(w); /* all that is sent has been received */
    bytes[1] = epi_wires_counts(w->group->wires).bytes;
    world_barrier(w);
    world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine");
    world_barrier(w);
    bytes[2] = epi_wires_counts(w->group->wires).bytes;
    run_check_combine(&r);
    check_bytes(w, bytes[1] - bytes[0], out, each, "dispatch");
    check_bytes(w, bytes[2] - bytes[1], back, each, "combine");
    world_check(w, flat > out + out / 4, "the case tells one row per node from one per rank");
    ep_handle_destroy(&handle);
    run_free(&r);
}

/* ---- losses ----------------------------------------------------------------------------- */

static atomic_int num_right, num_faults;

static void lose(struct world *w) {
    const struct trial *t = w->ctx;
    ep_handle *handle = NULL;
    ep_status st;
    struct run r;

    run_create(&r, w, t);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    st = run_route(&r, handle, NULL);
    for (int i = 0; i < STEPS && st == EP_OK; i++) {
        st = run_dispatch(&r, handle, NULL);
        if (st == EP_OK && run_check_dispatch(&r, handle)) {
            st = run_combine(&r, handle, NULL);
        }
        if (st == EP_OK) {
            run_check_combine(&r);
        }
    }
    atomic_fetch_add(st == EP_OK ? &num_right : &num_faults, 1);
    world_check(
        w, st == EP_OK || st == EP_ERR_TIMEOUT || st == EP_ERR_PEER || st == EP_ERR_FAULTED,
        "%s: %s", ep_status_string(st), ep_last_error());
    ep_handle_destroy(&handle);
    run_free(&r);
}

int main(void) {
    const uint64_t seed = tap_seed();
    const double scale = tap_scaled(1);
    struct test_case c;
    struct trial t;
    struct world_setup s;

    tap_deadline(120);
    setenv("EP_TEST_NODES", "2", 1);
    setenv("EP_NET_PROVIDER", "fake:1", 1);
    build(&c, &t, seed, 2048);
    trial_setup(&s, &t);
    s.processes = false;
    s.host = true;
    s.body = count_bytes;
    ok(world_run(&s) == 0, "a row for each token and node crosses, each way");
    destroy(&c, &t);

    tap_expect_log("cannot be written to");
    tap_expect_log("it is alive but late");
    for (int i = 0; i < 5; i++) {
        char provider[64];
        snprintf(provider, sizeof(provider), "fake:%llu:%d",
                 (unsigned long long)(seed + (uint64_t)i), i > 0 ? i : 0);
        setenv("EP_NET_PROVIDER", provider, 1);
        build(&c, &t, seed + (uint64_t)i, 64);
        trial_setup(&s, &t);
        s.processes = false;
        s.host = true;
        s.config.timeout_ms = (int32_t)(1500 * scale);
        s.body = lose;
        const double start = tap_now();
        const int bad = world_run(&s);
        ok(bad == 0 && tap_now() - start < 40 * scale,
           "%s: all is right, or a fault is told in time: %.1f s", provider, tap_now() - start);
        destroy(&c, &t);
    }
    ok(atomic_load(&num_right) > 0 && atomic_load(&num_faults) > 0,
       "%d ranks have seen no fault, %d have seen one", atomic_load(&num_right),
       atomic_load(&num_faults));
    return done_testing();
}
