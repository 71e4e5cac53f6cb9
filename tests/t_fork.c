/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * A rank forks a child: a data loader, a helper. Whatever the child does with what it inherited, the
 * parent's group goes on: destroy frees the child's copy and tells nobody, every other call is
 * refused in a sentence, nothing waits for threads that the child has not, and the child holds
 * neither memory nor connections of the group. It may make a group of its own.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "src/base/base.h"
#include "tests/gpu.h"
#include "tests/rig.h"
#include "tests/tap.h"
#include "tests/world.h"

/* What a child may inherit. */
struct heritage {
    ep_world *world;
    ep_group *group;
    ep_handle *handle;
    ep_stream *stream; /* of a host group, as is event */
    ep_event *event;
};

/* ---- every public function that returns a status -------------------------------------------- */

#define CALL(name, expression)                                                                 \
    static ep_status call_##name(struct heritage *h) {                                         \
        (void)h;                                                                               \
        return expression;                                                                     \
    }

static void no_task(void *arg) {
    (void)arg;
    abort();
}

static ep_status create_in_world(struct heritage *h) {
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;
    ep_group *group = NULL;
    c.world = h->world;
    c.rank = 0;
    c.num_ranks = -1;
    c.num_experts = c.max_tokens = c.max_topk = 1;
    c.max_row_bytes = 16;
    return ep_group_create(&group, &c);
}

static struct ep_plan_info plan = EP_PLAN_INFO_INIT;
static struct ep_fault fault = EP_FAULT_INIT;
static struct ep_group_stats stats = EP_GROUP_STATS_INIT;
static struct ep_dispatch_args dispatch = EP_DISPATCH_ARGS_INIT;
static struct ep_combine_args combine = EP_COMBINE_ARGS_INIT;
static struct ep_ll_dispatch_args ll_dispatch = EP_LL_DISPATCH_ARGS_INIT;
static struct ep_ll_combine_args ll_combine = EP_LL_COMBINE_ARGS_INIT;
static struct ep_ll_mask mask = EP_LL_MASK_INIT;
static struct ep_needs needs = EP_NEEDS_INIT;
static struct ep_tensor tensor = EP_TENSOR_INIT;
static struct ep_routing routing = EP_ROUTING_INIT;
static struct ep_layout layout = EP_LAYOUT_INIT;
static struct ep_tensor view = EP_TENSOR_INIT;
static ep_stream *no_stream;
static ep_event *no_event;
static ep_handle *no_handle;

CALL(plan, ep_group_plan(h->group, &plan))
CALL(abort, ep_group_abort(h->group))
CALL(fault, ep_group_fault(h->group, &fault))
CALL(stats, ep_group_stats(h->group, &stats))
CALL(stream_create, ep_stream_create(&no_stream, h->group))
CALL(event_create, ep_event_create(&no_event, h->group))
CALL(handle_create, ep_handle_create(&no_handle, h->group, NULL))
CALL(handle_status, ep_handle_status(h->handle))
CALL(handle_counts, ep_handle_counts(h->handle, NULL, NULL, NULL))
CALL(handle_arena, ep_handle_arena(h->handle, 0, EP_F32, RIG_HIDDEN, &view))
CALL(route, ep_handle_route(h->handle, &routing, NULL))
CALL(layout, ep_handle_layout(h->handle, &layout, NULL))
CALL(dispatch, ep_dispatch(h->handle, &dispatch, NULL))
CALL(dispatch_begin, ep_dispatch_begin(h->handle, &dispatch, NULL))
CALL(dispatch_finish, ep_dispatch_finish(h->handle, &dispatch, NULL))
CALL(dispatch_queued, ep_dispatch(h->handle, &dispatch, h->stream))
CALL(combine, ep_combine(h->handle, &combine, NULL))
CALL(ll_dispatch, ep_ll_dispatch(h->group, &ll_dispatch, NULL))
CALL(ll_dispatch_send, ep_ll_dispatch_send(h->group, &ll_dispatch, NULL))
CALL(ll_dispatch_recv, ep_ll_dispatch_recv(h->group, &ll_dispatch, NULL))
CALL(ll_combine, ep_ll_combine(h->group, &ll_combine, NULL))
CALL(ll_combine_send, ep_ll_combine_send(h->group, &ll_combine, NULL))
CALL(ll_combine_recv, ep_ll_combine_recv(h->group, &ll_combine, NULL))
CALL(ll_status, ep_ll_status(h->group))
CALL(ll_memory, ep_ll_memory(h->group, &tensor))
CALL(ll_mask, ep_ll_mask_rank(h->group, 1, NULL))
CALL(ll_unmask, ep_ll_unmask_rank(h->group, -1, NULL))
CALL(ll_masks, ep_ll_masks(h->group, &tensor, NULL))
CALL(ll_report, ep_ll_mask_report(h->group, 1, &mask))
CALL(ll_barrier, ep_ll_barrier(h->group, NULL))
CALL(combine_begin, ep_combine_begin(h->handle, &combine, NULL))
CALL(combine_finish, ep_combine_finish(h->handle, &combine, NULL))
CALL(grow, ep_group_grow(h->group, &needs))
CALL(needs, ep_handle_needs(h->handle, &needs))
CALL(stream_run, ep_stream_run(h->stream, no_task, NULL))
CALL(stream_sync, ep_stream_sync(h->stream))
CALL(stream_wait, ep_stream_wait(h->stream, h->event))
CALL(event_record, ep_event_record(h->event, h->stream))
CALL(event_query, ep_event_query(h->event))
CALL(event_sync, ep_event_sync(h->event))

static const struct call {
    const char *name;
    ep_status (*fn)(struct heritage *h);
    bool host_only;
} calls[] = {
    {"ep_group_create", create_in_world, true},
    {"ep_group_plan", call_plan, false},
    {"ep_group_abort", call_abort, false},
    {"ep_group_fault", call_fault, false},
    {"ep_group_stats", call_stats, false},
    {"ep_stream_create", call_stream_create, true},
    {"ep_event_create", call_event_create, true},
    {"ep_handle_create", call_handle_create, false},
    {"ep_handle_status", call_handle_status, false},
    {"ep_handle_counts", call_handle_counts, false},
    {"ep_handle_arena", call_handle_arena, false},
    {"ep_handle_route", call_route, false},
    {"ep_handle_layout", call_layout, false},
    {"ep_dispatch", call_dispatch, false},
    {"ep_dispatch", call_dispatch_queued, false},
    {"ep_dispatch_begin", call_dispatch_begin, false},
    {"ep_dispatch_finish", call_dispatch_finish, false},
    {"ep_combine", call_combine, false},
    {"ep_ll_dispatch", call_ll_dispatch, false},
    {"ep_ll_dispatch_send", call_ll_dispatch_send, false},
    {"ep_ll_dispatch_recv", call_ll_dispatch_recv, false},
    {"ep_ll_combine", call_ll_combine, false},
    {"ep_ll_combine_send", call_ll_combine_send, false},
    {"ep_ll_combine_recv", call_ll_combine_recv, false},
    {"ep_ll_status", call_ll_status, false},
    {"ep_ll_memory", call_ll_memory, false},
    {"ep_ll_mask_rank", call_ll_mask, false},
    {"ep_ll_unmask_rank", call_ll_unmask, false},
    {"ep_ll_masks", call_ll_masks, false},
    {"ep_ll_mask_report", call_ll_report, false},
    {"ep_ll_barrier", call_ll_barrier, false},
    {"ep_combine_begin", call_combine_begin, false},
    {"ep_combine_finish", call_combine_finish, false},
    {"ep_group_grow", call_grow, false},
    {"ep_handle_needs", call_needs, false},
    {"ep_stream_run", call_stream_run, true},
    {"ep_stream_sync", call_stream_sync, true},
    {"ep_stream_wait", call_stream_wait, true},
    {"ep_event_record", call_event_record, true},
    {"ep_event_query", call_event_query, true},
    {"ep_event_sync", call_event_sync, true},
};

static int try_calls(struct heritage *h) {
    int bad = 0;
    for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
        if ((calls[i].host_only && !h->stream) ||
            (calls[i].fn == create_in_world && !h->world)) {
            continue;
        }
        const ep_status st = calls[i].fn(h);
        const bool good = st == EP_ERR_STATE && strstr(ep_last_error(), "before fork()") &&
                          strncmp(ep_last_error(), calls[i].name, strlen(calls[i].name)) == 0;
        if (!good) {
            fprintf(stderr, "# child: %s: %s (%s)\n", calls[i].name, ep_status_string(st),
                    ep_last_error());
        }
        bad += !good;
    }
    return bad;
}

static void free_all(struct heritage *h) {
    ep_event_destroy(&h->event);
    ep_stream_destroy(&h->stream);
    ep_handle_destroy(&h->handle);
    ep_group_destroy(&h->group);
    ep_world_destroy(&h->world);
}

/* Shared memory of the library that this process has mapped or open. */
static int num_held(void) {
    char path[64], link[256];
    int held = rig_footprint().arenas;
    for (int fd = 3; fd < 1024; fd++) {
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        const ssize_t n = readlink(path, link, sizeof(link) - 1);
        link[n > 0 ? n : 0] = 0;
        held += strstr(link, "memfd:libep") != NULL;
    }
    return held;
}

/* ---- children ------------------------------------------------------------------------------- */

enum deed {
    TRY,
    TRY_AND_FREE,
    FREE,
    EXIT,
    OWN_GROUP,
    GRANDCHILD,
    TOUCH,
    UNANNOUNCED,
    NUM_DEEDS
};
static const char *const deed_names[] = {
    "tries every call",  "tries every call and frees all",     "frees all",
    "calls exit()",      "makes a group of its own",           "has a child that does both",
    "touches the arena", "is one that fork() knows nothing of"};

/* A group of this process alone: threads, so that it has a world, workers and streams. */
static int own_rank(int rank, void *ctx) {
    struct rig r;
    const bool good = rig_create(&r, ctx, rank) == EP_OK && rig_pass(&r) && rig_pass(&r);
    if (!good) {
        fprintf(stderr, "# child's own group: %s\n", ep_last_error());
    }
    rig_destroy(&r);
    return !good;
}

static ep_world *idle_world; /* in which no rank was at fork() */

/* A driver does not survive fork(): that is said, and it is not called. */
static int own_cuda_group(void) {
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;
    ep_group *group = NULL;
    int bad = ep_world_create(&c.world, 1) != EP_OK;
    c.device = EP_DEVICE_CUDA;
    c.rank = 0;
    c.num_experts = c.max_tokens = c.max_topk = 1;
    c.max_row_bytes = 16;
    bad += ep_group_create(&group, &c) != EP_ERR_UNSUPPORTED ||
           !strstr(ep_last_error(), "after fork()");
    ep_world_destroy(&c.world);
    return bad;
}

static int own_group(void) {
    if (gpu_wanted()) {
        return own_cuda_group();
    }
    struct rig_meeting m = {2, 0, idle_world, 20000 * rig_scale()};
    int bad = 0;
    if (idle_world) {
        bad += tap_run_threads(2, own_rank, &m);
    }
    bad += ep_world_create(&m.world, 2) != EP_OK;
    bad += tap_run_threads(2, own_rank, &m);
    ep_world_destroy(&m.world);
    return bad;
}

static int do_deed(struct heritage *h, enum deed deed) {
    const struct ep_tensor arena = view;
    int bad = num_held() != 0, status = 0;
    switch (deed) {
    case OWN_GROUP:
        bad += own_group() + try_calls(h) + own_group();
        break;
    case GRANDCHILD:
        bad += own_group();
        fflush(NULL);
        const pid_t child = fork();
        if (child == 0) {
            bad += try_calls(h);
            free_all(h);
            _exit(bad + own_group());
        }
        waitpid(child, &status, 0);
        bad += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
        break;
    case TOUCH:
        signal(SIGSEGV, SIG_DFL);
        *(volatile char *)arena.data = 1;
        bad = 1;
        break;
    case TRY:
    case TRY_AND_FREE:
    case UNANNOUNCED:
        bad += try_calls(h);
        break;
    default:
        break;
    }
    if (deed == FREE || deed == TRY_AND_FREE || deed == OWN_GROUP) {
        free_all(h);
        bad += h->group || h->handle || h->stream || h->event;
    }
    return bad;
}

/*
 * AddressSanitizer's allocator takes no notice of fork(): a lock that another thread held then stays
 * held in the child for ever. With it, the test's threads do not work while a child is made, and as
 * the library's own may, a child that hangs is tried again.
 */
#ifdef __SANITIZE_ADDRESS__
enum { WORK_WHILE_FORKING = 0, CHILD_S = 3, NUM_TRIES = 5 };
#else
enum { WORK_WHILE_FORKING = 1, CHILD_S = 60, NUM_TRIES = 1 };
#endif

static int have_child(const struct heritage *h, enum deed deed) {
    fflush(NULL);
    const pid_t child = deed == UNANNOUNCED
                            ? (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL)
                            : fork();
    if (child == 0) {
        struct heritage mine = *h;
        tap_become_rank(1); /* what it checks is told by how it ends */
        signal(SIGALRM, SIG_DFL);
        alarm((unsigned)tap_scaled(CHILD_S));
        const int bad = do_deed(&mine, deed);
        if (deed == EXIT) {
            exit(bad);
        }
        _exit(bad);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status;
}

static bool child_ends_well(const struct heritage *h, enum deed deed) {
    int status = have_child(h, deed);
    for (int i = 1; i < NUM_TRIES && WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM; i++) {
        status = have_child(h, deed);
    }
    if (deed == TOUCH && WIFSIGNALED(status)) {
        return WTERMSIG(status) == SIGSEGV;
    }
    return WIFEXITED(status) && (WEXITSTATUS(status) == 0) == (deed != TOUCH);
}

static bool may(enum deed deed) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    /* They catch SIGSEGV, count leaks at exit, and want to know of a process's birth. */
    return deed != TOUCH && deed != EXIT && deed != UNANNOUNCED;
#else
    return !gpu_wanted() || deed != TOUCH; /* there is no view */
#endif
}

/* ---- ranks ---------------------------------------------------------------------------------- */

struct scene {
    struct rig_meeting meeting;
    bool while_running; /* an operation of another thread is under way */
    atomic_bool forked; /* ranks that are threads: rank 1 has had its children */
};

static int children(const struct heritage *h, const char *when) {
    int bad = 0;
    for (int deed = 0; deed < NUM_DEEDS; deed++) {
        if (may(deed)) {
            bad += !ok(child_ends_well(h, deed), "%s: a child %s", when, deed_names[deed]);
        }
    }
    return bad;
}

struct worker {
    struct rig *rig;
    int bad, passes;
};

static void *pass_on(void *arg) {
    struct worker *w = arg;
    for (int i = 0; i < w->passes; i++) {
        w->bad += !rig_pass(w->rig);
    }
    return NULL;
}

static int forking_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    const bool host = !gpu_wanted();
    struct rig r;
    struct heritage h = {.world = s->meeting.world};
    ok(rig_create(&r, &s->meeting, rank) == EP_OK && rig_pass(&r), "rank %d: a group: %s", rank,
       ep_last_error());
    h.group = r.group;
    h.handle = r.handle;
    if (host) {
        ok(ep_stream_create(&h.stream, r.group) == EP_OK &&
               ep_event_create(&h.event, r.group) == EP_OK &&
               ep_event_record(h.event, h.stream) == EP_OK &&
               ep_handle_arena(r.handle, 0, EP_F32, RIG_HIDDEN, &view) == EP_OK,
           "a stream, an event and a view");
    }
    struct worker w = {&r, 0, s->while_running ? 60 : 5};
    pthread_t thread;
    if (s->while_running && pthread_create(&thread, NULL, pass_on, &w) == 0) {
        for (int i = 0; rank == 1 && i < 6; i++) {
            ok(child_ends_well(&h, TRY_AND_FREE), "a child of a busy rank");
        }
        pthread_join(thread, NULL);
    } else {
        if (rank == 1) {
            children(&h, s->meeting.world ? "threads" : "processes");
            atomic_store(&s->forked, true);
        }
        while (s->meeting.world && !WORK_WHILE_FORKING && !atomic_load(&s->forked)) {
            tap_sleep_ms(2);
        }
        pass_on(&w);
    }
    ok(w.bad == 0, "rank %d: the group goes on, %d passes are wrong", rank, w.bad);
    ep_event_destroy(&h.event);
    ep_stream_destroy(&h.stream);
    const double start_s = tap_now();
    rig_destroy(&r);
    ok(tap_now() - start_s < rig_within(10), "and ends as it should");
    return 0;
}

/* The parent that a data loader outlives: what it had is given back while the child lives. */
static int outlived(int rank, void *ctx) {
    const struct scene *s = ctx;
    struct rig r;
    int go[2];
    ok(rig_create(&r, &s->meeting, rank) == EP_OK && pipe(go) == 0, "a group");
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        char byte;
        close(go[1]);
        const ssize_t n = read(go[0], &byte, 1); /* until the parent has destroyed it */
        _exit(n != 0 || num_held() != 0);
    }
    rig_destroy(&r);
    ok(num_held() == 0, "nothing is left in the parent");
    close(go[0]);
    close(go[1]);
    int status = 0;
    waitpid(child, &status, 0);
    ok(WIFEXITED(status) && WEXITSTATUS(status) == 0, "nor in its child");
    return 0;
}

int main(void) {
#ifdef __SANITIZE_THREAD__
    skip_all("ThreadSanitizer does not follow children of processes with threads");
#endif
    gpu_program();
    tap_deadline(200);
    tap_expect_log("alive but late");
    struct scene processes = {{2, tap_free_port(), NULL, 20000 * rig_scale()}, false, false};
    struct scene busy = {{2, tap_free_port(), NULL, 20000 * rig_scale()}, true, false};
    struct scene alone = {{1, tap_free_port(), NULL, 20000 * rig_scale()}, false, false};
    ok(tap_spawn_ranks(2, forking_rank, &processes, 100) == 0, "ranks that are processes");
    if (gpu_wanted()) {
        return done_testing();
    }
    if (WORK_WHILE_FORKING) {
        ok(tap_spawn_ranks(2, forking_rank, &busy, 100) == 0,
           "ranks that are busy in a thread");
    }
    ok(tap_spawn_ranks(1, outlived, &alone, 100) == 0, "a child that outlives the group");
    struct scene threads = {{2, 0, NULL, 20000 * rig_scale()}, false, false};
    ok(ep_world_create(&threads.meeting.world, 2) == EP_OK &&
           ep_world_create(&idle_world, 2) == EP_OK,
       "two worlds");
    ok(tap_run_threads(2, forking_rank, &threads) == 0, "ranks that are threads");
    ep_world_destroy(&threads.meeting.world);
    ep_world_destroy(&idle_world);
    return done_testing();
}
