/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Route, dispatch and combine captured in a CUDA graph and replayed with other routings and other
 * data in place: each replay gives what the reference says, compact, expanded and with a view of
 * the arena that is combined from where it lies. Dispatch is on a stream of its own, which joins the
 * capture. What may not be captured is refused.
 */
#include <stdio.h>
#include <string.h>

#include "src/cu/driver.h"
#include "tests/calls.h"
#include "tests/graph.h"
#include "tests/stage.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 4
#define TOKENS 16
#define TOPK 4
#define ALIGNMENT 8
#define NUM_ROUTINGS_HERE 5
#define TO_ONE_RANK 2 /* the routing that sends all there; the next sends nothing */
#define NUM_REPLAYS 20
#define NUM_INPUTS 9

/* Cases of the same shape with different routings and data. */
struct scene {
    struct test_case c[NUM_ROUTINGS_HERE];
    struct trial t[NUM_ROUTINGS_HERE];
    int64_t max_recv_rows; /* not 0: what all tokens to one rank exceed */
};

/* What the graph reads and writes: a run whose data is replaced before each replay. */
struct live {
    struct run run;
    struct ep_tensor in[NUM_INPUTS]; /* copies, so that cases stay as they are */
    struct ep_routing routing;
    struct ep_dispatch_args dispatch;
    struct ep_combine_args combine;
    struct stage stage[3];
};

/* ---- data ------------------------------------------------------------------------------ */

static void inputs_of(const struct run *r, const struct ep_tensor *in[NUM_INPUTS]) {
    const struct ep_tensor *all[NUM_INPUTS] = {
        &r->t->c->ids[r->w->rank], r->dispatch.x,      r->dispatch.scales,
        r->dispatch.topk_weights,  r->combine.x,       r->combine.weights,
        r->combine.topk_weights,   r->combine.bias[0], r->combine.bias[1]};

    memcpy(in, all, sizeof(all));
}

static size_t packed_bytes(const struct ep_tensor *t) {
    return (size_t)(t->shape[0] * (t->ndim == 2 ? t->shape[1] : 1)) *
           ep_dtype_bytes((ep_dtype)t->dtype);
}

/* The data of another run into the tensors of the graph. */
static void adopt(struct live *l, const struct run *from) {
    const struct ep_tensor *in[NUM_INPUTS];

    inputs_of(from, in);
    for (int i = 0; i < NUM_INPUTS; i++) {
        if (in[i] && in[i] != &from->view) {
            memcpy(l->in[i].data, in[i]->data, packed_bytes(in[i]));
        }
    }
    for (int i = 0; i < NUM_OUTPUTS; i++) {
        struct output *o = &l->run.out[i];
        if (o->got) {
            memcpy(o->want, from->out[i].want, o->bytes);
            memcpy(o->any, from->out[i].any, o->bytes);
        }
    }
    l->run.t = from->t;
    l->run.form = from->form;
    run_poison(&l->run, OUT_X, OUT_Y_TOPK);
}

static void live_create(struct live *l, struct world *w, const struct trial *t) {
    const struct ep_tensor *in[NUM_INPUTS], *at[NUM_INPUTS];
    const bool view = t->form[w->rank].arena;
    uint64_t arena;
    size_t arena_bytes;

    memset(l, 0, sizeof(*l));
    run_create(&l->run, w, t);
    l->run.combine.x = view ? &l->run.view : l->run.combine.x;
    inputs_of(&l->run, in);
    for (int i = 0; i < NUM_INPUTS; i++) {
        if (in[i] && in[i] != &l->run.view) {
            l->in[i] = *in[i];
            l->in[i].data = pool_zero(&l->run.pool, packed_bytes(in[i]));
        }
        at[i] = !in[i] ? NULL : in[i] == &l->run.view ? in[i] : &l->in[i];
    }
    case_routing(t->c, w->rank, &l->routing);
    l->routing.topk_ids = at[0];
    l->dispatch = l->run.dispatch;
    l->dispatch.x = at[1];
    l->dispatch.scales = at[2];
    l->dispatch.topk_weights = at[3];
    l->combine = l->run.combine;
    l->combine.x = at[4];
    l->combine.weights = at[5];
    l->combine.topk_weights = at[6];
    l->combine.bias[0] = at[7];
    l->combine.bias[1] = at[8];
    call_arena(w->group, &arena, &arena_bytes);
    for (int i = 0; i < 3; i++) {
        stage_begin(&l->stage[i], call_gpu(w->group), arena, arena_bytes);
    }
    stage_routing(&l->stage[0], &l->routing);
    stage_dispatch(&l->stage[1], &l->dispatch);
    if (view) { /* it has an address only when the dispatch is captured */
        l->combine.x = NULL;
    }
    stage_combine(&l->stage[2], &l->combine);
    if (view) {
        l->combine.x = &l->run.view;
    }
    for (int i = 0; i < 3; i++) {
        stage_lay(&l->stage[i]);
    }
}

static void live_free(struct live *l) {
    for (int i = 0; i < 3; i++) {
        stage_end(&l->stage[i]);
    }
    run_free(&l->run);
}

/* ---- graphs ---------------------------------------------------------------------------- */

/* A graph, the streams it is captured from, and what is called beside it. */
struct taken {
    void *stream, *second, *beside;
    ep_handle *other;
    struct graph graph;
};

/* In one call, or in two on different streams. What cannot be in a graph says so, and the capture goes
 * on. */
static void dispatch(struct world *w, struct live *l, ep_handle *handle,
                     const struct taken *g) {
    struct ep_dispatch_args in = l->dispatch, out = l->dispatch;

    if (!l->run.form->two_step) {
        world_is(w, ep_dispatch(handle, &in, g->second), EP_OK, "dispatch in a capture");
    } else {
        out.x = out.scales = out.topk_weights = NULL;
        world_is(w, ep_dispatch_begin(handle, &in, g->second), EP_OK, "begin in a capture");
        world_fails(w, ep_dispatch_finish(handle, &out, g->beside), EP_ERR_STATE,
                    "captured|the graph", "finish in no capture");
        world_is(w, ep_dispatch_finish(handle, &out, g->stream), EP_OK, "finish in a capture");
        l->dispatch.recv_x = out.recv_x;
    }
    world_fails(w, ep_handle_counts(handle, NULL, NULL, NULL), EP_ERR_STATE, "captured",
                "counts of a captured dispatch");
}

static void combine(struct world *w, struct live *l, ep_handle *handle, const struct taken *g) {
    struct ep_combine_args in = l->combine, out = l->combine;

    if (!l->run.form->two_step) {
        world_is(w, ep_combine(handle, &in, g->stream), EP_OK, "combine in a capture");
        return;
    }
    in.bias[0] = in.bias[1] = NULL;
    in.out = in.out_topk_weights = NULL;
    out.x = out.weights = out.topk_weights = NULL;
    world_is(w, ep_combine_begin(handle, &in, g->stream), EP_OK, "combine's begin");
    world_fails(w, ep_combine_finish(handle, &out, g->beside), EP_ERR_STATE,
                "captured|the graph", "combine's finish in no capture");
    world_is(w, ep_combine_finish(handle, &out, g->stream), EP_OK, "combine's finish");
}

/* No replay could lack tokens: a graph is not made of what has more than max_tokens. */
static void too_many_tokens(struct world *w, struct live *l, const struct taken *g) {
    struct ep_tensor ids = *l->routing.topk_ids, x = *l->dispatch.x;
    struct ep_dispatch_args many = EP_DISPATCH_ARGS_INIT;
    struct ep_routing routing = l->routing;

    ids.shape[0] = x.shape[0] = TOKENS + 1;
    routing.topk_ids = &ids;
    many.x = &x;
    world_fails(w, ep_handle_route(g->other, &routing, g->stream), EP_ERR_ARG,
                "max_tokens|in a capture", "route of too many tokens in a capture");
    world_is(w, ep_handle_route(g->other, &routing, g->beside), EP_OK, "in no capture");
    world_fails(w, ep_dispatch(g->other, &many, g->stream), EP_ERR_STATE, "max_tokens",
                "dispatch of too many tokens in a capture");
}

/* Dispatch is on a stream that joins the capture; the order of the calls joins the two again, also
 * where a call between them is in no capture. */
static bool capture(struct world *w, struct live *l, ep_handle *handle, struct taken *g) {
    const struct epi_cu_device *d = &call_gpu(w->group)->device;
    void *stream = g->stream, *second = g->second, *routed = NULL;
    gpu_must(epi_cu_event_create(d, &routed), "an event");
    if (!graph_begin(w, stream)) {
        return false;
    }
    world_is(w, ep_handle_route(handle, &l->routing, stream), EP_OK, "route in a capture");
    too_many_tokens(w, l, g);
    world_is(w, epi_cu_event_record(d, routed, stream), EP_OK, "record in a capture");
    world_is(w, epi_cu_event_wait(d, second, routed), EP_OK, "wait in a capture");
    dispatch(w, l, handle, g);
    world_is(w, ep_handle_route(g->other, &l->routing, g->beside), EP_OK,
             "route, in no capture");
    combine(w, l, handle, g);
    const bool ended = graph_end(w, stream, &g->graph);
    epi_cu_event_destroy(d, &routed);
    gpu_must(epi_cu_stream_sync(d, g->beside), "waiting");
    return ended;
}

static bool replay(struct world *w, struct live *l, ep_handle *handle, const struct graph *g,
                   void *stream, bool too_many) {
    struct gpu *gpu = call_gpu(w->group);

    for (int i = 0; i < 3; i++) {
        stage_copy_in(&l->stage[i]);
    }
    if (!graph_launch(w, g, stream)) {
        return false;
    }
    for (int i = 0; i < 3; i++) {
        stage_copy_out(&l->stage[i], stream);
    }
    if (!world_is(w, epi_cu_stream_sync(&gpu->device, stream), EP_OK, "waiting")) {
        return false;
    }
    if (too_many) {
        const int32_t *rows = l->run.dispatch.num_rows->data;
        stage_check(&l->stage[1]);
        return world_fails(w, ep_handle_status(handle), EP_ERR_CAPACITY, "max_recv_rows",
                           "a replay that does not fit") &&
               world_check(w, *rows == 0, "num_rows is %d", *rows);
    }
    if (!world_is(w, call_found(handle), EP_OK, "a replay")) {
        return false;
    }
    for (int i = 0; i < 3; i++) {
        world_is(w, stage_check(&l->stage[i]), EP_OK, "what the graph wrote");
    }
    return run_check_outputs(&l->run) && run_check_combine(&l->run);
}

/* A replay after newer calls on the same handle hides nothing of them. */
static void newer_than_the_graph(struct world *w, struct live *l, ep_handle *handle,
                                 const struct taken *g) {
    const struct epi_cu_device *d = &call_gpu(w->group)->device;

    world_is(w, ep_handle_route(handle, &l->routing, g->stream), EP_OK, "a newer route");
    world_is(w, ep_dispatch(handle, &l->dispatch, g->stream), EP_OK, "a newer dispatch");
    graph_launch(w, &g->graph, g->stream);
    world_is(w, epi_cu_stream_sync(d, g->stream), EP_OK, "waiting");
    world_is(w, ep_handle_counts(handle, NULL, NULL, NULL), EP_OK, "counts after a replay");
    world_is(w, ep_handle_status(handle), EP_OK, "status after a replay");
}

static void replay_all(struct world *w, struct live *l, ep_handle *handle, void *stream) {
    const struct scene *s = w->ctx;
    struct run from[NUM_ROUTINGS_HERE];
    struct taken g = {.stream = stream};

    for (int i = 0; i < NUM_ROUTINGS_HERE; i++) {
        run_create(&from[i], w, &s->t[i]);
        from[i].combine.x = from[i].form->arena ? &from[i].view : from[i].combine.x;
    }
    world_is(w, ep_handle_create(&g.other, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, call_stream_create(&g.second, w->group), EP_OK, "a stream");
    world_is(w, call_stream_create(&g.beside, w->group), EP_OK, "a stream");
    adopt(l, &from[0]);
    stage_copy_in(&l->stage[0]);
    bool go = capture(w, l, handle, &g);
    for (int i = 0; go && i < NUM_REPLAYS; i++) {
        const int which = s->max_recv_rows ? TO_ONE_RANK + i % 2 : 3 * i % NUM_ROUTINGS_HERE;
        const bool too_many = s->max_recv_rows && which == TO_ONE_RANK;
        adopt(l, &from[which]);
        go = world_check(w, replay(w, l, handle, &g.graph, stream, too_many), "replay %d", i);
        if (i == NUM_REPLAYS / 2 &&
            !s->max_recv_rows) { /* operations that are in no graph count as well */
            trial_pass(w, &s->t[1], g.other);
        }
    }
    if (go) {
        newer_than_the_graph(w, l, handle, &g);
    }
    graph_destroy(w, &g.graph);
    call_stream_destroy(w->group, &g.second);
    call_stream_destroy(w->group, &g.beside);
    ep_handle_destroy(&g.other);
    for (int i = 0; i < NUM_ROUTINGS_HERE; i++) {
        run_free(&from[i]);
    }
}

static void body(struct world *w) {
    const struct scene *s = w->ctx;
    struct gpu *gpu = call_gpu(w->group);
    struct pool pool = {0};
    struct live *l = pool_zero(&pool, sizeof(*l));
    ep_handle *handle = NULL;
    void *stream = NULL;

    live_create(l, w, &s->t[0]);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    if (world_is(w, epi_cu_enter(&gpu->device), EP_OK, "the device's context")) {
        replay_all(w, l, handle, stream);
        epi_cu_leave();
    }
    call_stream_destroy(w->group, &stream);
    ep_handle_destroy(&handle);
    live_free(l);
    pool_free(&pool);
}

/* ---- the test -------------------------------------------------------------------------- */

/* Answers are the received rows themselves. */
static void answer_with_rows(struct trial *t) {
    t->dtype = t->c->row_dtype;
    t->hidden = t->c->hidden;
    trial_build(t);
    for (int r = 0; r < RANKS; r++) {
        memcpy(t->answers[r].x, t->recv[r].x,
               (size_t)t->recv[r].num_rows * t->c->problem.row_bytes);
    }
    trial_rebuild(t);
}

static void scene_create(struct scene *s, uint64_t seed, const struct form *form) {
    static const enum case_routing routings[NUM_ROUTINGS_HERE] = {
        ROUTE_UNIFORM, ROUTE_HOLES, ROUTE_ONE_RANK, ROUTE_NOWHERE, ROUTE_DUPLICATES};
    const int64_t worst =
        form->expanded ? RANKS * TOKENS * TOPK + 4 * RANKS * ALIGNMENT : RANKS * TOKENS;

    for (int i = 0; i < NUM_ROUTINGS_HERE; i++) {
        struct test_case *c = &s->c[i];
        case_default(c, RANKS, seed + (uint64_t)i);
        c->max_tokens = TOKENS;
        c->tokens = TOKENS_MAX;
        c->topk = TOPK;
        c->routing = routings[i];
        c->num_scales = form->arena ? 0 : 3;
        c->scale_dtype = EP_F32;
        case_build(c);
        trial_init(&s->t[i], c);
        trial_form(&s->t[i], form);
        if (form->arena) {
            answer_with_rows(&s->t[i]);
        } else {
            trial_build(&s->t[i]);
        }
        for (int r = 0; r < RANKS; r++) {
            s->t[i].form[r].slack = worst - s->t[i].recv[r].num_rows;
        }
    }
}

static void run(uint64_t seed, const struct form *form, bool processes, int64_t max_recv_rows,
                const char *name) {
    struct scene s = {.max_recv_rows = max_recv_rows};
    struct world_setup setup;

    scene_create(&s, seed, form);
    trial_setup(&setup, &s.t[0]);
    setup.config.max_expanded_rows = 0;
    setup.config.max_recv_rows = max_recv_rows;
    setup.body = body;
    setup.ctx = &s;
    setup.processes = processes;
    ok(world_run(&setup) == 0, "%s: %d replays of one graph, %s", name, NUM_REPLAYS,
       gpu_processes(processes) ? "processes" : "threads");
    for (int i = 0; i < NUM_ROUTINGS_HERE; i++) {
        trial_free(&s.t[i]);
        case_free(&s.c[i]);
    }
}

int main(void) {
    gpu_only();
    static const struct form compact = {.id_dtype = EP_I64, .num_bias = 1};
    static const struct form expanded = {.id_dtype = EP_I64,
                                         .expanded = true,
                                         .zero_gaps = true,
                                         .alignment = ALIGNMENT,
                                         .two_step = true,
                                         .weighted = true};
    static const struct form view = {.id_dtype = EP_I32, .arena = true, .two_step = true};
    uint64_t seed = tap_seed();

    tap_deadline(180);
    run(seed, &compact, false, 0, "compact, the largest outputs");
    run(seed + 10, &expanded, false, 0, "expanded, begun and finished");
    run(seed + 20, &view, false, 0, "a view of the arena, begun and finished");
    run(seed + 30, &compact, true, 0, "compact, the largest outputs");
    run(seed + 50, &expanded, false, RANKS * TOKENS / 2, "more rows than fit, now and then");
    run(seed + 40, &view, true, 0, "a view of the arena");
    return done_testing();
}
