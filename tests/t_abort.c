/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Operations that end because somebody wants it so: ep_group_abort from another thread, Ctrl-C of
 * a whole job, a rank that exits or destroys its group while the others go on, an operation that is
 * begun and never finished. Nobody hangs, and everybody is told what happened.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/ll.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define RANKS 4

struct stage {
    struct rig_meeting meeting;
    int which;
    atomic_int here, go, done;
    double at; /* when it happened */
};

static struct stage *new_stage(int num_ranks, ep_world *world) {
    struct stage *s = tap_shared(sizeof(*s));
    s->meeting = (struct rig_meeting){num_ranks, tap_free_port(), world, 30000 * rig_scale()};
    return s;
}

static void check_run(int (*fn)(int, void *), struct stage *s, bool processes,
                      const char *name) {
    const char *kind = processes ? "processes" : "threads";
    bool skipped;
    const int failed = rig_run(s->meeting.num_ranks, processes, fn, s, &skipped);
    if (skipped) {
        skip(1, "%s: no ranks are %s in this run", name, kind);
    } else {
        ok(failed == 0, "%s, %s", name, kind);
    }
}

/* The same ranks as processes and as threads. */
static void run_both(int (*fn)(int, void *), int num_ranks, int which, const char *name) {
    ep_world *world = NULL;
    struct stage *s = new_stage(num_ranks, NULL);
    s->which = which;
    check_run(fn, s, true, name);
    ok(ep_world_create(&world, num_ranks) == EP_OK, "a world");
    s = new_stage(num_ranks, world);
    s->which = which;
    check_run(fn, s, false, name);
    ep_world_destroy(&world);
}

static bool create(struct rig *r, struct stage *s, int rank) {
    ep_status st = rig_create(r, &s->meeting, rank);
    ok(st == EP_OK, "create: %s (%s)", ep_status_string(st), ep_last_error());
    atomic_fetch_add(&s->here, 1);
    return rig_await(&s->here, s->meeting.num_ranks) && st == EP_OK;
}

/* The first failing call is told of it within a second, later ones are refused. */
static void check_end(struct stage *s, struct rig *r, ep_status st, ep_status want,
                      const char *words) {
    char text[512];
    const double took = tap_now() - s->at;
    snprintf(text, sizeof(text), "%s", ep_last_error());
    ok(st == want, "%s instead of %s (%s)", ep_status_string(st), ep_status_string(want), text);
    ok(rig_is_sentence(text) && strstr(text, words), "no \"%s\" in \"%s\"", words, text);
    ok(took < rig_within(1.0), "it took %.2f s", took);
    st = rig_dispatch(r);
    ok(st == EP_ERR_FAULTED, "then %s (%s)", ep_status_string(st), ep_last_error());
}

/* ---- ep_group_abort ------------------------------------------------------------------------- */

struct aborter {
    struct stage *stage;
    ep_group *group;
};

static void *abort_soon(void *arg) {
    struct aborter *a = arg;
    tap_sleep_ms(100);
    a->stage->at = tap_now();
    ok(ep_group_abort(a->group) == EP_OK, "ep_group_abort: %s", ep_last_error());
    return NULL;
}

/* Rank 1 does not come to the operation; rank 2 aborts while it waits, by another thread. */
static int aborted_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct rig r;
    struct ep_fault fault = EP_FAULT_INIT;
    ep_status st;
    if (!create(&r, s, rank)) {
        return 1;
    }
    if (s->which) { /* in a combine */
        ok(rig_dispatch(&r) == EP_OK, "dispatch: %s", ep_last_error());
    }
    if (rank == 1) {
        while (ep_group_fault(r.group, &fault) == EP_OK && fault.status == EP_OK) {
            tap_sleep_ms(1); /* a poll finds it out */
        }
    }
    pthread_t thread;
    struct aborter a = {s, r.group};
    if (rank == 2) {
        pthread_create(&thread, NULL, abort_soon, &a);
    }
    st = s->which ? rig_combine(&r) : rig_dispatch(&r);
    if (rank == 2) {
        pthread_join(thread, NULL);
    }
    check_end(s, &r, st, EP_ERR_INTERRUPTED, "rank 2 called ep_group_abort");
    ep_group_fault(r.group, &fault);
    ok(fault.status == EP_ERR_INTERRUPTED && fault.reporter == 2, "the fault: %s, reporter %d",
       ep_status_string(fault.status), fault.reporter);
    const double start = tap_now();
    rig_destroy(&r);
    ok(tap_now() - start < rig_within(1.5), "destroy took %.2f s", tap_now() - start);
    return 0;
}

/* ---- an operation whose turn never comes ---------------------------------------------------- */

static void block(void *arg) {
    rig_await(arg, 1);
}

/* A dispatch sits behind the caller's own endless work on one stream; one on another stream waits
 * for its turn, and goes when the group is aborted. */
static int turn_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct rig r;
    ep_stream *blocked = NULL, *other = NULL;
    ep_handle *second = NULL, *first;
    if (!create(&r, s, rank)) {
        return 1;
    }
    first = r.handle;
    ok(ep_stream_create(&blocked, r.group) == EP_OK, "a stream: %s", ep_last_error());
    ok(ep_stream_create(&other, r.group) == EP_OK, "a stream: %s", ep_last_error());
    ok(ep_stream_run(blocked, block, &s->go) == EP_OK, "%s", ep_last_error());
    r.stream = blocked;
    ok(rig_dispatch(&r) == EP_OK, "queued: %s", ep_last_error());
    struct rig q; /* the same group with a handle of its own */
    q = r;
    ok(rig_route(&q) == EP_OK, "a second handle: %s", ep_last_error());
    second = q.handle;
    q.stream = other;
    ok(rig_dispatch(&q) == EP_OK, "queued: %s", ep_last_error());
    tap_sleep_ms(50);
    s->at = tap_now();
    ok(ep_group_abort(r.group) == EP_OK, "%s", ep_last_error());
    ep_status st = ep_stream_sync(other);
    ok(st == EP_ERR_INTERRUPTED && tap_now() - s->at < rig_within(1.0),
       "its turn: %s after %.2f s (%s)", ep_status_string(st), tap_now() - s->at,
       ep_last_error());
    atomic_store(&s->go, 1);
    st = ep_stream_sync(blocked);
    ok(st == EP_ERR_INTERRUPTED, "the blocked one: %s (%s)", ep_status_string(st),
       ep_last_error());
    ep_stream_destroy(&other);
    q.group = NULL;
    q.stream = NULL;
    r.handle = first;
    ok(second != first, "two handles");
    rig_destroy(&q);
    rig_destroy(&r);
    return 0;
}

/* ---- a rank that goes away ------------------------------------------------------------------ */

/* Rank 1 exits without a word (a process), the others are in an operation. */
static int exiting_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct rig r;
    if (!create(&r, s, rank)) {
        return 1;
    }
    rig_pass(&r);
    atomic_fetch_add(&s->go, 1);
    if (rank == s->which) {
        rig_await(&s->go, s->meeting.num_ranks);
        tap_sleep_ms(50);
        s->at = tap_now();
        syscall(SYS_exit_group, 0); /* a sanitizer's _exit takes a while */
    }
    char words[32];
    snprintf(words, sizeof(words), "rank %d died", s->which);
    check_end(s, &r, rig_dispatch(&r), EP_ERR_PEER, words);
    rig_destroy(&r);
    return 0;
}

/* One rank destroys its group, the others call dispatch. */
static int leaving_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct rig r;
    char words[64];
    if (!create(&r, s, rank)) {
        return 1;
    }
    rig_pass(&r);
    if (rank == s->which) {
        tap_sleep_ms(100);
        s->at = tap_now();
        rig_destroy(&r);
        ok(tap_now() - s->at < rig_within(2.5), "destroy took %.2f s", tap_now() - s->at);
        return 0;
    }
    ep_status st = rig_dispatch(&r);
    snprintf(words, sizeof(words), "rank %d has called ep_group_destroy", s->which);
    check_end(s, &r, st, EP_ERR_PEER, words);
    struct ep_fault fault = EP_FAULT_INIT;
    ep_group_fault(r.group, &fault);
    ok(fault.status == EP_ERR_PEER && fault.rank == s->which, "the fault: %s, rank %d",
       ep_status_string(fault.status), fault.rank);
    rig_destroy(&r);
    return 0;
}

/* One rank is early in destroy: that is no fault to those that are only a little behind. */
static int early_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct rig r;
    struct ep_fault fault = EP_FAULT_INIT;
    if (!create(&r, s, rank)) {
        return 1;
    }
    rig_pass(&r);
    if (rank != 0) {
        tap_sleep_ms(100 * rank);
        ok(ep_group_fault(r.group, &fault) == EP_OK && fault.status == EP_OK,
           "no fault: %s (%s)", ep_status_string(fault.status), fault.message);
    }
    const double start = tap_now();
    rig_destroy(&r);
    ok(tap_now() - start < rig_within(2.5), "destroy took %.2f s", tap_now() - start);
    return 0;
}

struct decode {
    struct ll_step s;
    bool
        behind; /* the step of one rank, and only that, is queued behind what all others end with */
    atomic_int go;
};

static void queue_dispatch(struct world *w, ep_handle **h, void *stream) {
    struct ep_dispatch_args a = EP_DISPATCH_ARGS_INIT;
    struct decode *d = w->ctx;
    struct ep_routing routing;
    case_routing(&d->s.c, w->rank, &routing);
    a.flags = EP_DISPATCH_ARENA;
    a.x = &d->s.c.x[w->rank];
    world_is(w, ep_handle_create(h, w->group, NULL), EP_OK, "a handle");
    world_is(w, call_route(*h, &routing, NULL), EP_OK, "route");
    if (!gpu_wanted()) { /* until it is known that it has left */
        world_is(w, ep_stream_run(stream, block, &d->go), EP_OK, "held");
    }
    world_is(w, call_dispatch(*h, &a, stream), EP_OK, "queued");
}

/* Rank 1 leaves; nobody waits for the timeout, whomever of the others it waits for first. */
static void decode_without(struct world *w) {
    struct decode *d = w->ctx;
    const bool leaves = w->rank == 1;
    ep_handle *h = NULL;
    void *stream = NULL;
    struct ll_run r;
    ll_create(&r, w, &d->s);
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    if (!leaves && d->behind) {
        queue_dispatch(w, &h, stream);
    }
    if (!leaves && (!d->behind || w->rank == w->num_ranks - 1)) {
        world_is(w, ll_dispatch(&r, CALL_BOTH, stream), EP_OK, "queued");
    }
    world_barrier(w);
    if (!leaves) {
        const double start = tap_now();
        tap_sleep_ms(50);
        atomic_store(&d->go, 1);
        world_fails(w, call_stream_sync(w->group, stream), EP_ERR_PEER,
                    "rank 1 has called ep_group_destroy", "what a rank has left");
        world_check(w, tap_now() - start < rig_within(4.0), "it took %.2f s",
                    tap_now() - start);
    }
    call_stream_destroy(w->group, &stream);
    ep_handle_destroy(&h);
    ll_destroy(&r);
}

static void leaves_decode(int num_ranks, bool behind, const char *name) {
    struct decode d = {.behind = behind};
    struct world_setup w;
    ll_init(&d.s, num_ranks, 1);
    ll_build(&d.s);
    ll_setup(&w, &d.s);
    w.config.num_workers = gpu_wanted() ? 0 : 1; /* it waits for one after the other */
    w.body = decode_without;
    w.ctx = &d;
    ok(world_run(&w) == 0, "%s", name);
    ll_free(&d.s);
}

/* ---- begun and dropped ---------------------------------------------------------------------- */

/* On the last rank, whose rows nobody gets before the others have let go of theirs. */
static void hold_rows(void *arg) {
    struct stage *s = arg;
    ok(rig_await(&s->done, 2), "the handles of two ranks are destroyed without its rows");
}

static void hold_stream(void *arg) {
    struct stage *s = arg;
    rig_await(&s->go, 1);
}

/* Begins and destroys the handle, on a host's rank 1 before the stream has come to it. */
static void begin_and_drop(struct rig *r, struct stage *s) {
    struct ep_dispatch_args a = EP_DISPATCH_ARGS_INIT;
    struct ep_combine_args c = EP_COMBINE_ARGS_INIT;
    struct ep_tensor x, y;
    void *stream = NULL;
    ep_tensor_2d(&x, EP_F32, r->x, RIG_TOKENS, RIG_HIDDEN);
    ep_tensor_2d(&y, EP_F32, r->recv, (int64_t)r->num_ranks * RIG_TOKENS, RIG_HIDDEN);
    a.x = &x;
    c.x = &y;
    if (r->rank == 1 && !gpu_wanted()) {
        ok(call_stream_create(&stream, r->group) == EP_OK, "a stream");
        ok(ep_stream_run(stream, hold_stream, s) == EP_OK, "held");
    }
    ok((s->which ? call_combine_begin(r->handle, &c, stream)
                 : call_dispatch_begin(r->handle, &a, stream)) == EP_OK,
       "begin: %s", ep_last_error());
    ep_handle_destroy(&r->handle);
    atomic_fetch_add(&s->go, r->rank);
    atomic_fetch_add(&s->done, 1);
    call_stream_destroy(r->group, &stream);
}

/* Ranks 0 and 1 destroy the handle of a dispatch, or a combine, that has begun, and wait for nobody: the
 * others succeed, and so do the operations after it. */
static int dropping_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct rig r, next;
    if (!create(&r, s, rank)) {
        return 1;
    }
    if (s->which) {
        ok(rig_dispatch(&r) == EP_OK, "dispatch: %s", ep_last_error());
    }
    if (rank == RANKS - 1 && !gpu_wanted()) {
        rig_trap(s->which ? rig_middle_answer(&r) : rig_middle_row(&r), hold_rows, s);
    }
    if (rank < 2) {
        begin_and_drop(&r, s);
    } else if (s->which) {
        ok(rig_combine(&r) == EP_OK && rig_combine_right(&r), "combine: %s", ep_last_error());
    } else {
        ep_status st = rig_dispatch(&r);
        ok(st == EP_OK && rig_dispatch_right(&r), "dispatch: %s", ep_last_error());
    }
    next = r;
    ep_handle_destroy(&r.handle);
    ok(rig_route(&next) == EP_OK, "route: %s", ep_last_error());
    rig_pass(&next);
    rig_pass(&next);
    ep_group *group = r.group;
    next.group = NULL;
    rig_destroy(&next);
    r.group = NULL;
    rig_destroy(&r);
    call_group_destroy(&group);
    return 0;
}

/* ---- Ctrl-C --------------------------------------------------------------------------------- */

/* What `ep run` starts: a rank that works until it is ended. */
static int job_rank(void) {
    struct rig_meeting meeting = {RANKS, 0, NULL, 30000 * rig_scale()};
    struct rig r;
    gpu_forks_nothing();
    if (rig_create(&r, &meeting, 0) != EP_OK) {
        printf("create: %s\n", ep_last_error());
        return 1;
    }
    for (int i = 0; rig_dispatch(&r) == EP_OK && rig_combine(&r) == EP_OK; i++) {
        if (i == 10) {
            printf("up %d\n", (int)getpid());
            fflush(stdout);
        }
    }
    printf("ended: %s\n", ep_last_error());
    return 1;
}

static pid_t start_job(int *out) {
    char self[4096], tool[4096 + 8];
    const ssize_t len = readlink("/proc/self/exe", self, sizeof(self) - 1);
    int ends[2];
    if (len <= 0 || pipe(ends) != 0) {
        return -1;
    }
    self[len] = 0;
    snprintf(tool, sizeof(tool), "%s", self);
    for (int i = 0; i < 2; i++) { /* DIR/tests/t_abort -> DIR/ep */
        *strrchr(tool, '/') = 0;
    }
    strcat(tool, "/ep");
    pid_t pid = fork();
    if (pid == 0) {
        char num[16];
        signal(SIGINT, SIG_DFL);
        alarm(0);
        dup2(ends[1], 1);
        close(ends[0]);
        close(ends[1]);
        snprintf(num, sizeof(num), "%d", RANKS);
        execl(tool, "ep", "run", "-n", num, "--", self, "rank", (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    *out = ends[0];
    return pid;
}

static void interrupted_job(void) {
    char line[256];
    pid_t rank[RANKS] = {0};
    int out = -1, up = 0, status = 0, left = 0;
    pid_t job = start_job(&out);
    if (!ok(job > 0, "ep run started")) {
        return;
    }
    FILE *f = fdopen(out, "r");
    while (up < RANKS && f && fgets(line, sizeof(line), f)) {
        int r, pid;
        if (sscanf(line, "[%d] up %d", &r, &pid) == 2 && r >= 0 && r < RANKS) {
            rank[r] = pid;
            up++;
        } else {
            diag("%s", line);
        }
    }
    ok(up == RANKS, "%d ranks are at work", up);
    kill(job, SIGINT);
    const double start = tap_now();
    waitpid(job, &status, 0);
    ok(WIFEXITED(status) && WEXITSTATUS(status) == 130, "the job ends with status 130 (0x%x)",
       (unsigned)status);
    ok(tap_now() - start < rig_within(2.0), "at once: %.2f s", tap_now() - start);
    for (int r = 0; r < RANKS; r++) {
        left += rank[r] > 0 && (kill(rank[r], 0) == 0 || errno != ESRCH);
    }
    ok(left == 0, "%d ranks are left", left);
    while (f && fgets(line, sizeof(line), f)) {
        diag("%s", line);
    }
    if (f) {
        fclose(f);
    }
}

/* A process whose exit status is not the failure. */
static void exits(int who, int num_ranks) {
    struct stage *s = new_stage(num_ranks, NULL);
    s->which = who;
    check_run(exiting_rank, s, true, who ? "rank 1 exits without a word" : "rank 0 does");
}

int main(int argc, char **argv) {
    gpu_program();
    if (argc > 1 && strcmp(argv[1], "rank") == 0) {
        return job_rank();
    }
    tap_deadline(110);
    tap_expect_log(" died: ");
    rig_warm(-1);
    /* A process takes seconds to begin and to end on a GPU, and those of one GPU take turns: where
     * all ranks are processes there, there are fewer, and of two runs that are alike the second. */
    const bool slow = gpu_processes(false);
    const int ranks = slow ? 3 : RANKS;
    /* First what makes a device keep the kernels of both modes. */
    leaves_decode(ranks, false, "a rank leaves before a decode step");
    const struct rig_footprint was = rig_footprint();
    for (int which = slow; which < 2; which++) {
        run_both(aborted_rank, ranks, which, which ? "abort in combine" : "abort in dispatch");
    }
    if (gpu_wanted()) {
        skip(3, "host groups only: an operation whose turn never comes, on an ep_stream");
    } else {
        run_both(turn_rank, 1, 0, "an operation whose turn never comes");
    }
    for (int who = 1; who >= slow; who--) {
        exits(who, ranks);
        run_both(leaving_rank, ranks, who,
                 who ? "rank 1 destroys early" : "rank 0 destroys early");
    }
    leaves_decode(ranks, true, "and before what a decode step is queued behind");
    run_both(early_rank, ranks, 0, "rank 0 is first in destroy");
    run_both(dropping_rank, ranks, 0, "a dispatch is begun and dropped");
    run_both(dropping_rank, ranks, 1, "a combine is begun and dropped");
    interrupted_job();
    ok(rig_same_footprint(was), "nothing is left");
    return done_testing();
}
