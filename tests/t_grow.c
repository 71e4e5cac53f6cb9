/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Growth: what a dispatch lacks, all ranks ask for, and the group has it behind the same addresses.
 * Handles of before go on with what they have, those that follow the group get more; what one rank
 * cannot have, no rank gets, and the group goes on as it was.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "src/base/base.h"
#include "src/cu/driver.h"
#include "tests/calls.h"
#include "tests/graph.h"
#include "tests/stage.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define RANKS 3
#define FEW 4 /* tokens */
#define STEPS 3
#define MOST 300
#define TIMEOUT_MS 2000

static const int step_tokens[STEPS] = {30, 31, MOST};

struct scene {
    struct test_case few_case, many_case[STEPS];
    struct trial few, many[STEPS];
};

static int64_t room(struct world *w) {
    struct ep_plan_info info = EP_PLAN_INFO_INIT;

    world_is(w, ep_group_plan(w->group, &info), EP_OK, "ep_group_plan");
    return info.max_recv_rows;
}

/* Dispatches, and lets the group grow, until it fits: tokens first, then perhaps rows. */
static void pass_by_growth(struct world *w, const struct trial *t, ep_handle *handle) {
    struct ep_needs needs = EP_NEEDS_INIT;
    struct run r;
    ep_status st = EP_ERR_CAPACITY;

    run_create(&r, w, t);
    for (int i = 0; st == EP_ERR_CAPACITY && i < 3; i++) {
        world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
        st = run_dispatch(&r, handle, NULL);
        if (st == EP_ERR_CAPACITY) {
            world_is(w, ep_handle_needs(handle, &needs), EP_OK, "ep_handle_needs");
            world_check(w, i > 0 || needs.max_tokens == t->c->max_tokens, "%d tokens",
                        needs.max_tokens);
            world_is(w, ep_group_grow(w->group, &needs), EP_OK, "ep_group_grow");
        }
    }
    if (world_is(w, st, EP_OK, "ep_dispatch of what has grown")) {
        run_check_dispatch(&r, handle);
        world_is(w, run_combine(&r, handle, NULL), EP_OK, "ep_combine");
        run_check_combine(&r);
    }
    run_free(&r);
}

/* On a device: a graph of before the group has grown, of a handle that is used otherwise, too. */
struct taken {
    struct stage stage[3];
    struct graph graph;
    void *stream;
};

static void capture(struct world *w, const struct run *r, ep_handle *handle, struct taken *g) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_dispatch_args d = r->dispatch;
    struct ep_combine_args c = r->combine;

    case_routing(r->t->c, w->rank, &routing);
    for (int i = 0; i < 3; i++) {
        stage_begin(&g->stage[i], call_gpu(w->group), 0, 0);
    }
    stage_routing(&g->stage[0], &routing);
    stage_dispatch(&g->stage[1], &d);
    stage_combine(&g->stage[2], &c);
    for (int i = 0; i < 3; i++) {
        stage_lay(&g->stage[i]);
        stage_copy_in(&g->stage[i]);
    }
    world_is(w, call_stream_create(&g->stream, w->group), EP_OK, "a stream");
    if (graph_begin(w, g->stream)) {
        world_is(w, ep_handle_route(handle, &routing, g->stream), EP_OK, "route");
        world_is(w, ep_dispatch(handle, &d, g->stream), EP_OK, "dispatch");
        world_is(w, ep_combine(handle, &c, g->stream), EP_OK, "combine");
        graph_end(w, g->stream, &g->graph);
    }
}

static void replay(struct world *w, struct run *r, struct taken *g) {
    run_poison(r, OUT_X, OUT_Y_TOPK);
    for (int i = 0; i < 3; i++) {
        stage_copy_in(&g->stage[i]);
    }
    if (graph_launch(w, &g->graph, g->stream)) {
        stage_copy_out(&g->stage[1], g->stream);
        stage_copy_out(&g->stage[2], g->stream);
        world_is(w, epi_cu_stream_sync(&call_gpu(w->group)->device, g->stream), EP_OK,
                 "replay");
        world_is(w, stage_check(&g->stage[1]), EP_OK, "dispatch in the replay");
        world_is(w, stage_check(&g->stage[2]), EP_OK, "combine in the replay");
        run_check_outputs(r);
        run_check_combine(r);
    }
}

/* What was captured goes on as it was, also when the handle has got more since. */
static void grow_beside_a_graph(struct world *w) {
    const struct scene *s = w->ctx;
    const struct epi_cu_device *d = &call_gpu(w->group)->device;
    const struct ep_needs needs = {sizeof(needs), MOST, RANKS * MOST, 0};
    struct taken g = {.stream = NULL};
    ep_handle *handle = NULL;
    struct run r;

    run_create(&r, w, &s->few);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    if (world_is(w, epi_cu_enter(d), EP_OK, "the device's context")) {
        capture(w, &r, handle, &g);
        replay(w, &r, &g);
        world_is(w, ep_group_grow(w->group, &needs), EP_OK, "ep_group_grow");
        replay(w, &r, &g);
        for (int i = 0; i < 2; i++) {
            trial_pass(w, &s->many[STEPS - 1], handle);
            replay(w, &r, &g);
        }
        graph_destroy(w, &g.graph);
        epi_cu_leave();
    }
    call_stream_destroy(w->group, &g.stream);
    ep_handle_destroy(&handle);
    for (int i = 0; i < 3; i++) {
        stage_end(&g.stage[i]);
    }
    run_free(&r);
}

static void grow(struct world *w) {
    const struct scene *s = w->ctx;
    const struct ep_handle_config small = {sizeof(small), FEW, 0, 0};
    struct ep_needs beyond = EP_NEEDS_INIT;
    struct run kept;
    ep_handle *old = NULL, *follows = NULL, *limited = NULL;
    void *stream = NULL;

    world_is(w, ep_handle_create(&old, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, ep_handle_create(&follows, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, ep_handle_create(&limited, w->group, &small), EP_OK, "ep_handle_create");
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    run_create(&kept, w, &s->few);
    world_is(w, run_route(&kept, old, NULL), EP_OK, "ep_handle_route");
    world_is(w, run_dispatch(&kept, old, NULL), EP_OK, "ep_dispatch");
    for (int i = 0; i < STEPS; i++) {
        pass_by_growth(w, &s->many[i], follows);
        trial_pass(w, &s->few, limited);
        world_is(w, run_combine(&kept, old, NULL), EP_OK, "combine of before");
        run_check_combine(&kept);
        world_is(w, run_dispatch(&kept, old, stream), EP_OK, "cached dispatch of before");
        world_is(w, call_stream_sync(w->group, stream), EP_OK, "a stream");
        run_check_outputs(&kept);
    }
    beyond.max_tokens = w->rank == 1 ? MOST + 1 : 0;
    world_fails(w, ep_group_grow(w->group, &beyond), EP_ERR_ARG, "301|300|most_tokens",
                "more than the ceiling");
    trial_pass(w, &s->many[STEPS - 1], old);
    run_free(&kept);
    call_stream_destroy(w->group, &stream);
    ep_handle_destroy(&old);
    ep_handle_destroy(&follows);
    ep_handle_destroy(&limited);
}

/* One does not come; later all do, and it is too late. */
static void one_does_not_come(struct world *w) {
    const struct scene *s = w->ctx;
    const struct ep_needs needs = {sizeof(needs), 30, 0, 0};
    ep_handle *handle = NULL;

    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    if (w->rank != 1) {
        world_fails(w, ep_group_grow(w->group, &needs), EP_ERR_TIMEOUT, "1", "without rank 1");
    }
    world_barrier(w);
    if (w->rank == 1) {
        world_is(w, ep_group_grow(w->group, &needs), EP_ERR_TIMEOUT, "when nobody is there");
    }
    world_barrier(w);
    trial_pass(w, &s->few, handle);
    world_fails(w, ep_group_grow(w->group, &needs), EP_ERR_STATE, "earlier", "again");
    trial_pass(w, &s->few, handle);
    ep_handle_destroy(&handle);
}

static void begun(struct world *w) {
    const struct scene *s = w->ctx;
    const struct ep_needs needs = {sizeof(needs), 30, 0, 0};
    struct ep_dispatch_args in = EP_DISPATCH_ARGS_INIT;
    struct run r;
    ep_handle *handle = NULL;

    run_create(&r, w, &s->few);
    in.x = r.dispatch.x;
    in.topk_weights = r.dispatch.topk_weights;
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    world_is(w, run_route(&r, handle, NULL), EP_OK, "ep_handle_route");
    world_is(w, call_dispatch_begin(handle, &in, NULL), EP_OK, "ep_dispatch_begin");
    world_fails(w, ep_group_grow(w->group, &needs), EP_ERR_STATE, "begun", "between the two");
    ep_handle_destroy(&handle);
    world_is(w, ep_group_grow(w->group, &needs), EP_OK, "ep_group_grow");
    run_free(&r);
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    trial_pass(w, &s->many[0], handle);
    ep_handle_destroy(&handle);
}

/* The descriptor of the process's shared memory, or -1. */
static int memory_fd(void) {
    for (int fd = 0; fd < 1024; fd++) {
        char path[64], to[64] = "";
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        if (readlink(path, to, sizeof(to) - 1) > 0 && strstr(to, "memfd:libep")) {
            return fd;
        }
    }
    return -1;
}

/* Nothing to grow with: in shared memory no descriptor of that, of a device none for a new piece. */
struct lack {
    int fd, kept;
    struct rlimit most;
};

static void take_away(struct lack *l) {
    const int none = open("/dev/null", O_RDONLY | O_CLOEXEC);
    l->fd = memory_fd();
    getrlimit(RLIMIT_NOFILE, &l->most);
    if (l->fd < 0) {
        const struct rlimit few = {(rlim_t)none, l->most.rlim_max};
        setrlimit(RLIMIT_NOFILE, &few);
    } else {
        l->kept = fcntl(l->fd, F_DUPFD_CLOEXEC, 0);
        dup2(none, l->fd);
    }
    close(none);
}

static void bring_back(const struct lack *l) {
    setrlimit(RLIMIT_NOFILE, &l->most);
    if (l->fd >= 0) {
        dup2(l->kept, l->fd);
        close(l->kept);
    }
}

/* Whether what is taken away is missed: some sandboxes do not mind that limit, and ranks of a GPU that are
 * threads need no descriptors. */
static bool is_missed(void) {
    struct lack lack;
    if (!gpu_wanted()) {
        return true;
    }
    take_away(&lack);
    const int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    bring_back(&lack);
    if (fd >= 0) {
        close(fd);
    }
    return fd < 0 && gpu_processes(true);
}

/* One process cannot, and says so to all. */
static void nothing_at_one(struct world *w) {
    const struct scene *s = w->ctx;
    const struct ep_needs needs = {sizeof(needs), 30, 0, 0};
    const int64_t rows = room(w);
    ep_handle *handle = NULL;
    struct lack lack;

    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    for (int i = 0; i < 2; i++) {
        if (w->rank == 1) {
            take_away(&lack);
        }
        const ep_status st = ep_group_grow(w->group, &needs);
        world_check(w, st != EP_OK && (w->rank == 1 || strstr(ep_last_error(), "rank ")),
                    "%s: %s", ep_status_string(st), ep_last_error());
        world_check(w, gpu_wanted() || st == EP_ERR_NOMEM, "%s", ep_status_string(st));
        world_check(w, room(w) == rows, "%lld rows", (long long)room(w));
        if (w->rank == 1) {
            bring_back(&lack);
        }
        trial_pass(w, &s->few, handle);
    }
    world_is(w, ep_group_grow(w->group, &needs), EP_OK, "ep_group_grow");
    trial_pass(w, &s->many[0], handle);
    ep_handle_destroy(&handle);
}

static void run(struct scene *s, void (*body)(struct world *w), bool processes, int64_t rows,
                const char *name) {
    struct world_setup setup;

    trial_setup(&setup, &s->many[STEPS - 1]);
    setup.config.max_tokens = FEW;
    setup.config.most_tokens = MOST;
    setup.config.max_recv_rows = rows;
    setup.config.most_recv_rows = rows ? RANKS * MOST : 0;
    setup.config.num_slots = 3;
    setup.config.timeout_ms = body == one_does_not_come ? TIMEOUT_MS : 0;
    setup.body = body;
    setup.ctx = s;
    setup.processes = processes;
    ok(world_run(&setup) == 0, "%s, %s", name, processes ? "processes" : "threads");
}

static void build(struct test_case *c, struct trial *t, int tokens, uint64_t seed,
                  const struct form *form) {
    case_default(c, RANKS, seed);
    c->max_tokens = tokens;
    c->num_scales = 3;
    c->scale_dtype = EP_F32;
    case_build(c);
    trial_init(t, c);
    trial_form(t, form);
    trial_build(t);
}

int main(void) {
    static const struct form forms[] = {{.id_dtype = EP_I64},
                                        {.id_dtype = EP_I64, .expanded = true, .arena = true}};
    gpu_program();
    const uint64_t seed = tap_seed();
    struct scene s;

    tap_deadline(150);
    for (int f = 0; f < 2; f++) {
        build(&s.few_case, &s.few, FEW, seed + (uint64_t)f, &forms[f]);
        for (int i = 0; i < STEPS; i++) {
            build(&s.many_case[i], &s.many[i], step_tokens[i], seed + 2 + (uint64_t)i,
                  &forms[f]);
        }
        run(&s, grow, f == 0, f == 0 ? RANKS * FEW : 0, f ? "grow, a view" : "grow, rows too");
        if (f == 0) {
            if (gpu_wanted()) {
                run(&s, grow_beside_a_graph, false, RANKS * FEW, "grow beside a graph");
            }
            run(&s, begun, false, 0, "not while a dispatch has begun");
            run(&s, one_does_not_come, false, 0, "one does not come");
            run(&s, one_does_not_come, true, 0, "one does not come");
            if (is_missed()) {
                run(&s, nothing_at_one, true, 0, "nothing at one rank");
            } else {
                skip(1, "a rank that lacks what it needs to grow");
            }
        }
        for (int i = 0; i < STEPS; i++) {
            trial_free(&s.many[i]);
            case_free(&s.many_case[i]);
        }
        trial_free(&s.few);
        case_free(&s.few_case);
    }
    return done_testing();
}
