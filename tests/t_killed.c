/* SPDX-License-Identifier: MIT */
/* class: timed, long */
/*
 * A rank is killed with SIGKILL, at rest and in every phase of dispatch and combine. Each survivor
 * gets EP_ERR_PEER within a second of the death, which names the dead; after that the group is
 * faulted, destroy is quick, nothing is left, and the survivors make a group of their own.
 */
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tests/calls.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define RANKS 4

enum moment {
    AT_REST,          /* before the first operation */
    DISPATCH_READY,   /* the victim has not called */
    DISPATCH_COUNTS,  /* it has said only that it is ready */
    DISPATCH_BASES,   /* it does not answer counts */
    DISPATCH_ROWS,    /* it has sent half of its rows */
    BETWEEN,          /* dispatch is done everywhere */
    COMBINE_READY,    /* the victim has not called combine */
    COMBINE_ANSWERS,  /* it has sent half of its answers */
    AFTERWARDS,       /* all is done */
    IN_DESTROY,       /* the survivors wait in destroy */
    QUEUED,           /* dispatch and combine of the survivors are on a stream */
    COUNTS_ASKED_FOR, /* the survivors are in ep_handle_counts */
    NUM_MOMENTS
};

static const char *const names[] = {
    "at rest",        "dispatch, ready", "dispatch, counts", "dispatch, bases",
    "dispatch, rows", "between",         "combine, ready",   "combine, answers",
    "afterwards",     "in destroy",      "on a stream",      "in ep_handle_counts"};

/* Shared by the ranks and the test. */
struct stage {
    struct rig_meeting meeting, survivors;
    enum moment moment;
    int victim;
    atomic_int here;    /* ranks that have their group */
    atomic_int trapped; /* the victim is where it is to die */
    atomic_int done;    /* survivors that have finished the steps before */
    atomic_int killed;  /* the time has been noted, the signal sent */
    double killed_at, told_at[RANKS], destroyed_in[RANKS];
};

static void hold(void *arg) {
    struct stage *s = arg;
    atomic_store(&s->trapped, 1);
    for (;;) {
        tap_sleep_ms(1000);
    }
}

/* ---- the victim ----------------------------------------------------------------------------- */

static int victim(struct stage *s, struct rig *r) {
    switch (s->moment) {
    case DISPATCH_COUNTS:
    case COUNTS_ASKED_FOR:
        rig_say(r, RIG_READY);
        break;
    case DISPATCH_BASES:
        rig_say(r, RIG_COUNTS);
        break;
    case DISPATCH_ROWS:
    case QUEUED:
        if (gpu_wanted()) { /* a process that dies between its kernels */
            rig_say(r, RIG_ROWS);
            break;
        }
        rig_trap(rig_middle_row(r), hold, s);
        rig_dispatch(r);
        break;
    case BETWEEN:
    case COMBINE_READY:
        ok(rig_dispatch(r) == EP_OK, "dispatch: %s", ep_last_error());
        break;
    case COMBINE_ANSWERS:
        ok(rig_dispatch(r) == EP_OK, "dispatch: %s", ep_last_error());
        if (gpu_wanted()) {
            rig_say(r, RIG_COMBINE_READY);
            break;
        }
        rig_trap(rig_middle_answer(r), hold, s);
        rig_combine(r);
        break;
    case AFTERWARDS:
        rig_pass(r);
        break;
    default:
        break;
    }
    hold(s);
    return 1;
}

/* ---- the survivors -------------------------------------------------------------------------- */

static ep_status counts_of_begun(struct rig *r) {
    struct ep_dispatch_args a = EP_DISPATCH_ARGS_INIT;
    struct ep_tensor x;
    int64_t rows;
    ep_tensor_2d(&x, EP_F32, r->x, RIG_TOKENS, RIG_HIDDEN);
    a.x = &x;
    ok(call_stream_create(&r->stream, r->group) == EP_OK, "a stream: %s", ep_last_error());
    ok(call_dispatch_begin(r->handle, &a, r->stream) == EP_OK, "begin: %s", ep_last_error());
    ep_status st = ep_handle_counts(r->handle, &rows, NULL, NULL);
    call_stream_sync(r->group, r->stream);
    return st;
}

/* Answers are sent, as a rule, and not all have come, when a rank dies. */
static ep_status combine_in_two(struct rig *r) {
    struct ep_combine_args in = EP_COMBINE_ARGS_INIT, out = EP_COMBINE_ARGS_INIT;
    struct ep_tensor x, y;
    ep_tensor_2d(&x, EP_F32, r->recv, (int64_t)r->num_ranks * RIG_TOKENS, RIG_HIDDEN);
    ep_tensor_2d(&y, EP_F32, r->out, RIG_TOKENS, RIG_HIDDEN);
    in.x = &x;
    out.out = &y;
    const ep_status st = call_combine_begin(r->handle, &in, NULL);
    return st == EP_OK ? call_combine_finish(r->handle, &out, NULL) : st;
}

/* Makes the call that fails, after the ones that do not. */
static ep_status failing_call(struct stage *s, struct rig *r) {
    ep_status st;
    if (s->moment == AFTERWARDS) {
        rig_pass(r);
    } else if (s->moment >= BETWEEN && s->moment < AFTERWARDS) {
        st = rig_dispatch(r);
        ok(st == EP_OK && rig_dispatch_right(r), "dispatch: %s (%s)", ep_status_string(st),
           ep_last_error());
    }
    atomic_fetch_add(&s->done, 1);
    switch (s->moment) {
    case AT_REST:
    case BETWEEN:
    case AFTERWARDS:
        rig_await(&s->killed, 1);
        tap_sleep_ms(300); /* the call finds it out at once */
        return s->moment == BETWEEN ? rig_combine(r) : rig_dispatch(r);
    case COMBINE_READY:
    case COMBINE_ANSWERS:
        return s->moment == COMBINE_ANSWERS && r->rank % 2 ? combine_in_two(r) : rig_combine(r);
    case QUEUED:
        ok(call_stream_create(&r->stream, r->group) == EP_OK, "a stream: %s", ep_last_error());
        ok(rig_dispatch(r) == EP_OK && rig_combine(r) == EP_OK, "queued: %s", ep_last_error());
        return call_stream_sync(r->group, r->stream);
    case COUNTS_ASKED_FOR:
        return counts_of_begun(r);
    default:
        return rig_dispatch(r);
    }
}

static void check_fault(struct stage *s, struct rig *r, ep_status st) {
    struct ep_fault fault = EP_FAULT_INIT;
    char text[512], who[32];
    snprintf(text, sizeof(text), "%s", ep_last_error());
    snprintf(who, sizeof(who), "rank %d died", s->victim);
    ok(st == EP_ERR_PEER, "%s instead of EP_ERR_PEER (%s)", ep_status_string(st), text);
    ok(rig_is_sentence(text) && strstr(text, who), "the message is \"%s\"", text);
    ok(ep_group_fault(r->group, &fault) == EP_OK, "ep_group_fault: %s", ep_last_error());
    ok(fault.status == EP_ERR_PEER && fault.rank == s->victim && fault.reporter == r->rank &&
           fault.epoch >= 1,
       "the fault: status %d, rank %d, reporter %d, epoch %u", fault.status, fault.rank,
       fault.reporter, fault.epoch);
    ok(rig_is_sentence(fault.message) && strstr(fault.message, who), "its message is \"%s\"",
       fault.message);
    call_stream_destroy(r->group, &r->stream);
    for (int i = 0; i < 3; i++) {
        st = rig_dispatch(r);
        ok(st == EP_ERR_FAULTED && strstr(ep_last_error(), who), "then %s (%s)",
           ep_status_string(st), ep_last_error());
        st = rig_combine(r);
        ok(st == EP_ERR_FAULTED || st == EP_ERR_STATE, "then %s (%s)", ep_status_string(st),
           ep_last_error());
    }
    ok(rig_gpu_works(r), "the GPU can be used after the fault");
}

static void survivor(struct stage *s, struct rig *r) {
    double start;
    if (s->moment == IN_DESTROY) {
        atomic_fetch_add(&s->done, 1);
        rig_destroy(r);
        s->told_at[r->rank] = tap_now();
        return;
    }
    ep_status st = failing_call(s, r);
    s->told_at[r->rank] = tap_now();
    check_fault(s, r, st);
    start = tap_now();
    rig_destroy(r);
    s->destroyed_in[r->rank] = tap_now() - start;
}

static int rank_main(int rank, void *ctx) {
    struct stage *s = ctx;
    rig_warm(rank);
    const struct rig_footprint was = rig_footprint();
    struct rig r;
    ep_status st = rig_create(&r, &s->meeting, rank);
    if (!ok(st == EP_OK, "create: %s (%s)", ep_status_string(st), ep_last_error())) {
        return 1;
    }
    atomic_fetch_add(&s->here, 1);
    rig_await(&s->here, RANKS);
    if (rank == s->victim) {
        return victim(s, &r);
    }
    survivor(s, &r);
    ok(rig_same_footprint(was), "nothing is left");
    st = rig_create(&r, &s->survivors, rank - (rank > s->victim));
    ok(st == EP_OK, "a group of survivors: %s (%s)", ep_status_string(st), ep_last_error());
    if (st == EP_OK) {
        rig_pass(&r);
        ok(rig_gpu_works(&r), "the GPU can be used beside a group");
        rig_destroy(&r);
    }
    ok(rig_same_footprint(was), "nothing is left of the second group");
    return 0;
}

/* ---- the test ------------------------------------------------------------------------------- */

static bool nothing_in_shm(void) {
    DIR *dir = opendir("/dev/shm");
    struct dirent *e;
    bool none = true;
    while (dir && (e = readdir(dir))) {
        none = none && !strstr(e->d_name, "libep");
    }
    if (dir) {
        closedir(dir);
    }
    return none;
}

static void check_times(struct stage *s, const char *name) {
    double worst = 0, slowest = 0;
    for (int r = 0; r < RANKS; r++) {
        if (r != s->victim) {
            const double took = s->told_at[r] - s->killed_at;
            worst = s->told_at[r] == 0 ? 1e9 : took > worst ? took : worst;
            slowest = s->destroyed_in[r] > slowest ? s->destroyed_in[r] : slowest;
        }
    }
    ok(worst < rig_within(1.0), "%s: the last survivor was told after %.0f ms", name,
       1e3 * worst);
    ok(slowest < rig_within(1.5), "%s: the slowest destroy took %.0f ms", name, 1e3 * slowest);
}

struct killing {
    struct stage *s;
    struct tap_ranks ranks;
    char name[64];
};

static bool begin(struct killing *k, enum moment moment, int who) {
    struct stage *s = k->s = tap_shared(sizeof(*s));
    snprintf(k->name, sizeof(k->name), "rank %d killed %s", who, names[moment]);
    s->moment = moment;
    s->victim = who;
    s->meeting = (struct rig_meeting){RANKS, tap_free_port(), NULL, 30000 * rig_scale()};
    s->survivors = (struct rig_meeting){RANKS - 1, tap_free_port(), NULL, 30000 * rig_scale()};
    return ok(tap_ranks_start(&k->ranks, RANKS, rank_main, s) == 0, "%s: started", k->name);
}

static void kill_victim(struct killing *k) {
    rig_await(&k->s->trapped, 1);
    rig_await(&k->s->done, RANKS - 1);
    tap_sleep_ms(50 * rig_scale()); /* the others come to where they wait */
    k->s->killed_at = tap_now();
    tap_ranks_signal(&k->ranks, k->s->victim, SIGKILL);
    atomic_store(&k->s->killed, 1);
}

static void check_end(struct killing *k) {
    bool ended = true;
    for (int r = 0; r < RANKS; r++) {
        ended = tap_ranks_wait_one(&k->ranks, r, 30) && ended;
    }
    ok(ended && kill(-k->ranks.group, 0) != 0 && errno == ESRCH, "%s: no process is left",
       k->name);
    ok(tap_ranks_wait(&k->ranks, 1) == 0, "%s: the survivors agree", k->name);
    tap_ranks_free(&k->ranks);
    check_times(k->s, k->name);
    ok(nothing_in_shm(), "%s: no shared memory is left", k->name);
}

/* Rank 0, and in a job beside it rank 3; where a rank takes seconds to start, one of the two. */
static void kill_at(int m) {
    struct killing k[2];
    const int num = gpu_wanted() ? 1 : 2;
    for (int i = 0; i < num; i++) {
        if (!begin(&k[i], (enum moment)m, num == 2 ? 3 * i : m % 2 ? 3 : 0)) {
            return;
        }
    }
    for (int i = 0; i < num; i++) {
        kill_victim(&k[i]);
    }
    for (int i = 0; i < num; i++) {
        check_end(&k[i]);
    }
}

/* ---- while the group forms ------------------------------------------------------------------ */

struct birth {
    struct rig_meeting meeting;
    int victim, delay_us;
    atomic_int here;    /* ranks whose device is open */
    atomic_int created; /* survivors that got a group */
};

static void *kill_later(void *arg) {
    const struct birth *b = arg;
    struct timespec t = {0, b->delay_us * 1000L};
    nanosleep(&t, NULL);
    kill(getpid(), SIGKILL);
    return NULL;
}

static int born_rank(int rank, void *ctx) {
    struct birth *b = ctx;
    rig_warm(rank);
    const struct rig_footprint was = rig_footprint();
    struct rig r;
    pthread_t thread;
    if (gpu_wanted()) { /* opening a device takes far longer than the group does */
        atomic_fetch_add(&b->here, 1);
        rig_await(&b->here, b->meeting.num_ranks);
    }
    if (rank == b->victim) {
        pthread_create(&thread, NULL, kill_later, b);
    }
    const double start = tap_now();
    ep_status st = rig_create(&r, &b->meeting, rank);
    const double took = tap_now() - start;
    if (rank == b->victim) {
        hold(&(struct stage){.victim = rank});
    }
    ok(st == EP_OK || st == EP_ERR_PEER || st == EP_ERR_TIMEOUT, "create: %s (%s)",
       ep_status_string(st), ep_last_error());
    ok(took < 1e-3 * b->meeting.timeout_ms + rig_within(1.5), "create took %.2f s", took);
    if (st == EP_OK) {
        atomic_fetch_add(&b->created, 1);
        st = rig_dispatch(&r);
        ok(st == EP_ERR_PEER, "dispatch: %s (%s)", ep_status_string(st), ep_last_error());
    } else {
        ok(rig_is_sentence(ep_last_error()), "the message is \"%s\"", ep_last_error());
    }
    rig_destroy(&r);
    ok(rig_same_footprint(was), "nothing is left");
    return 0;
}

#define AT_ONCE 4

/* Jobs of three ranks, several of them at a time. On a GPU, where ranks are slow to start, four in all. */
static void kill_at_birth(void) {
    const int timeout = gpu_wanted() ? 4000 : 700; /* kernels are loaded meanwhile */
    const int step = gpu_wanted() ? 3 : 1, num = gpu_wanted() ? 1 : AT_ONCE;
    for (int first = 0; first < 12; first += num * step) {
        struct tap_ranks ranks[AT_ONCE];
        struct birth *b = tap_shared(AT_ONCE * sizeof(*b));
        for (int i = 0; i < num; i++) {
            b[i].meeting =
                (struct rig_meeting){3, tap_free_port(), NULL, timeout * rig_scale()};
            b[i].victim = (first + i) % 2 ? 0 : 2;
            b[i].delay_us = (gpu_wanted() ? 30000 : 3000) * (first + i) * rig_scale();
            ok(tap_ranks_start(&ranks[i], 3, born_rank, &b[i]) == 0, "three ranks begin");
        }
        for (int i = 0; i < num; i++) {
            ok(tap_ranks_wait(&ranks[i], 30) == 1,
               "rank %d killed %d us after it began; %d survivors had a group by then",
               b[i].victim, b[i].delay_us, atomic_load(&b[i].created));
            tap_ranks_free(&ranks[i]);
        }
    }
}

int main(void) {
    gpu_program();
    if (!gpu_processes(true)) {
        skip_all("ranks that are processes, and all are threads in this run");
    }
    tap_deadline(gpu_wanted() ? 200 : 110);
    kill_at_birth();
    tap_expect_log(" died: ");
    tap_expect_log("dropped a connection"); /* killed while it was meeting the others */
    for (int m = 0; m < NUM_MOMENTS; m++) {
        kill_at(m);
    }
    return done_testing();
}
