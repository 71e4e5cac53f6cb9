/* SPDX-License-Identifier: MIT */
/*
 * Declared in storm.h: a scene is drawn, built and described. Pure but for memory; every process
 * of a storm draws the same scene from the same seed.
 */
#include "tests/storm.h"

#include <stdio.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define LONG_TIMEOUT_MS 30000
#define SHORT_TIMEOUT_MS 600

static const char *const fault_names[] = {
    "nothing",  "a delay",          "a short stop", "SIGKILL",  "an exit",
    "an abort", "an early destroy", "a mismatch",   "lateness", "a long stop"};
static const char *const call_names[] = {
    "create", "handles and route", "route", "dispatch", "combine", "decode", "destroy"};

bool storm_is_lethal(const struct storm_scene *s) {
    return s->fault == STORM_KILL || s->fault == STORM_EXIT;
}

bool storm_may_tell(const struct storm_scene *s, ep_status st) {
    if (s->is_short && (st == EP_ERR_TIMEOUT || st == EP_ERR_PEER || st == EP_ERR_FAULTED)) {
        return true;
    }
    switch (s->fault) {
    case STORM_KILL:
    case STORM_EXIT:
    case STORM_LEAVE:
        return st == EP_OK || st == EP_ERR_PEER || st == EP_ERR_FAULTED;
    case STORM_ABORT:
        return st == EP_OK || st == EP_ERR_INTERRUPTED || st == EP_ERR_FAULTED;
    case STORM_MISMATCH:
        return st == EP_OK || st == EP_ERR_MISMATCH || st == EP_ERR_FAULTED;
    default:
        return st == EP_OK;
    }
}

/* ---- drawing -------------------------------------------------------------------------------- */

/* A fault, as often as there are numbers of it. */
static enum storm_fault draw_fault(uint64_t *s, bool threads) {
    static const uint8_t of_processes[] = {0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9};
    static const uint8_t of_threads[] = {0, 1, 1, 5, 5, 5, 6, 6, 7, 7, 7, 8};
    return (enum storm_fault)(threads ? of_threads[case_rand(s, sizeof(of_threads))]
                                      : of_processes[case_rand(s, sizeof(of_processes))]);
}

static void add_step(struct storm_scene *s, enum storm_call call, int handle) {
    s->steps[s->num_steps++] = (struct storm_step){call, handle};
}

static void draw_steps(struct storm_scene *s, uint64_t *state) {
    bool dispatched[STORM_HANDLES] = {false};
    add_step(s, STORM_CREATE, 0);
    add_step(s, STORM_HANDLES_ROUTED, 0);
    for (int64_t n = 2 + case_rand(state, STORM_MAX_STEPS - 4); n > 0; n--) {
        const int h = (int)case_rand(state, STORM_HANDLES);
        const int64_t what = case_rand(state, 8);
        if (s->decodes && (what == 4 || what == 5)) {
            add_step(s, STORM_DECODE, 0);
        } else if (!dispatched[h] || what < 3) {
            dispatched[h] = true;
            add_step(s, STORM_DISPATCH, h);
        } else if (what == 3) {
            dispatched[h] = false;
            add_step(s, STORM_ROUTE, h);
        } else {
            add_step(s, STORM_COMBINE, h);
        }
    }
    add_step(s, STORM_DESTROY, 0);
}

/* Before which step; not where the fault would be none. */
static int draw_moment(const struct storm_scene *s, uint64_t *state) {
    const int first = s->fault == STORM_ABORT || s->fault == STORM_LEAVE ? 1 : 0;
    const int last = s->num_steps - 1 - (s->fault == STORM_LEAVE || s->fault == STORM_MISMATCH);
    return first + (int)case_rand(state, last - first + 1);
}

static void draw_cases(struct storm_scene *s, uint64_t *state) {
    struct test_case *c = s->c;
    case_random(&c[0], tap_rand(state));
    c[0].num_ranks = s->num_ranks;
    c[0].max_tokens = c[0].max_tokens > 64 ? 64 : c[0].max_tokens;
    c[0].topk = c[0].topk > 16 ? 16 : c[0].topk;
    /* A row can be shorter. */
    c[0].hidden += EP_ROW_ALIGN / (int64_t)ep_dtype_bytes((ep_dtype)c[0].row_dtype);
    for (int h = 1; h < STORM_HANDLES; h++) {
        c[h] = c[0];
        c[h].data_seed = tap_rand(state);
        c[h].routing = (enum case_routing)case_rand(state, NUM_ROUTINGS);
        if (c[0].map == MAP_EVEN) { /* any other map comes from the seed */
            c[h].seed = tap_rand(state);
        }
    }
}

/* With the experts of the first handle, which the group has room for, if it selects any. */
static void draw_decode(struct storm_scene *s, uint64_t *state) {
    struct ll_step *ll = &s->ll;
    ll_init(ll, s->num_ranks, s->c[0].seed);
    ll->c.data_seed = tap_rand(state);
    ll->c.num_experts = s->c[0].num_experts;
    ll->c.map = s->c[0].map;
    ll->c.topk = s->c[0].topk > 2 ? s->c[0].topk : 2;
    ll->named_experts = true;
    ll->weights_now = case_rand(state, 2);
    ll->flags = case_rand(state, 2) ? EP_LL_FP8 : 0;
}

static void draw_habits(struct storm_scene *s, uint64_t *state) {
    for (int r = 0; r < s->num_ranks; r++) {
        struct storm_habit *h = &s->habits[r];
        h->stream = case_rand(state, 2);
        h->eager = case_rand(state, 2);
        h->num_workers = 1 + (int)case_rand(state, 5);
    }
}

void storm_draw(struct storm_scene *s, uint64_t seed, int only_fault, bool only_threads,
                bool only_processes) {
    uint64_t state = seed;
    memset(s, 0, sizeof(*s));
    s->seed = seed;
    s->num_ranks = 2 + (int)case_rand(&state, case_rand(&state, 3) ? 3 : STORM_MAX_RANKS - 1);
    s->threads = (case_rand(&state, 3) == 0 || only_threads) && !only_processes;
    s->allgather = case_rand(&state, 4) == 0;
    s->fault = draw_fault(&state, s->threads);
    s->fault = only_fault >= 0 ? (enum storm_fault)only_fault : s->fault;
    s->victim = (int)case_rand(&state, s->num_ranks);
    s->decodes = !gpu_wanted();
    draw_steps(s, &state);
    s->step = draw_moment(s, &state);
    s->async = case_rand(&state, 2);
    s->delay_us = (int)case_rand(&state, 4000);
    s->is_short = s->fault == STORM_LATE || s->fault == STORM_STOP_LONG ||
                  (storm_is_lethal(s) && s->step == 0);
    /* A short one is waited for again and again. */
    s->timeout_ms = s->is_short ? SHORT_TIMEOUT_MS * (rig_scale() < 5 ? rig_scale() : 5)
                                : LONG_TIMEOUT_MS * rig_scale();
    draw_habits(s, &state);
    draw_cases(s, &state);
    draw_decode(s, &state);
}

/* ---- data ----------------------------------------------------------------------------------- */

static void widen(struct ep_group_config *c, const struct ep_group_config *by) {
    c->flags |= by->flags;
    c->max_row_bytes =
        by->max_row_bytes > c->max_row_bytes ? by->max_row_bytes : c->max_row_bytes;
    if (by->max_expanded_rows > c->max_expanded_rows) {
        c->max_expanded_rows = by->max_expanded_rows;
    }
}

void storm_build(struct storm_scene *s) {
    for (int h = 0; h < STORM_HANDLES; h++) {
        struct world_setup setup;
        case_build(&s->c[h]);
        trial_init(&s->t[h], &s->c[h]);
        trial_random(&s->t[h], s->seed + (uint64_t)h);
        trial_build(&s->t[h]);
        trial_setup(&setup, &s->t[h]);
        if (h == 0) {
            s->config = setup.config;
        }
        widen(&s->config, &setup.config);
    }
    ll_build(&s->ll);
    s->config.ll_max_tokens = s->decodes ? s->ll.max_tokens : 0;
    if (s->config.max_row_bytes < 2 * s->ll.c.hidden) {
        s->config.max_row_bytes = 2 * (int32_t)s->ll.c.hidden;
    }
    if (s->config.max_topk < s->ll.c.topk) {
        s->config.max_topk = s->ll.c.topk;
    }
    s->config.num_ranks = s->num_ranks;
    s->config.timeout_ms = s->timeout_ms;
}

void storm_free(struct storm_scene *s) {
    ll_free(&s->ll);
    for (int h = 0; h < STORM_HANDLES; h++) {
        trial_free(&s->t[h]);
        case_free(&s->c[h]);
    }
}

void storm_describe(const struct storm_scene *s, char *text, size_t bytes) {
    size_t at = (size_t)snprintf(
        text, bytes, "seed %llu: %d %s, meeting %s, %s at rank %d %s step %d, timeout %d ms:",
        (unsigned long long)s->seed, s->num_ranks, s->threads ? "threads" : "processes",
        s->threads     ? "in a world"
        : s->allgather ? "by allgather"
                       : "at a port",
        fault_names[s->fault], s->victim, s->async ? "after the begin of" : "before", s->step,
        s->timeout_ms);
    for (int i = 0; i < s->num_steps && at < bytes; i++) {
        at += (size_t)snprintf(text + at, bytes - at, "%s %s %d", i ? "," : "",
                               call_names[s->steps[i].call], s->steps[i].handle);
    }
}
