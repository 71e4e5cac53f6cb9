/* SPDX-License-Identifier: MIT */
/*
 * Declared in storm.h: the life of one rank in a scene, by one thread; the victim's bad luck may
 * come from a second one. Every call is timed, every status must be one that the fault allows,
 * every output of a call that succeeded is compared with the reference.
 */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tests/calls.h"
#include "tests/rig.h"
#include "tests/storm.h"
#include "tests/tap.h"

/* What a call may take beyond the timeout, or where somebody died or gave up, beyond that. The
 * header says one second; machines are shared. */
#define GRACE_S 5.0
#define MOST_PENDING (2 * STORM_HANDLES + 1)

struct rank {
    const struct storm_scene *s;
    struct storm_shared *shared;
    struct world w;
    ep_handle *handle[STORM_HANDLES];
    struct run run[STORM_HANDLES];
    struct ll_run decode;
    void *stream;
    struct storm_step pending[MOST_PENDING]; /* queued on the stream, not looked at */
    int num_pending;
    bool over; /* a call has failed, or the rank leaves */
    pthread_t striker;
    bool has_striker;
};

/* ---- what a rank is told -------------------------------------------------------------------- */

static double struck_at(const struct rank *k) {
    return 1e-6 * (double)atomic_load(&k->shared->struck_us);
}

/* Not of the victim, who may have been stopped meanwhile. */
static void check_time(struct rank *k, double start, const char *what) {
    const double end = tap_now();
    const double from = struck_at(k) > start ? struck_at(k) : start;
    if (k->w.rank == k->s->victim) {
        return;
    }
    const double limit = rig_within(GRACE_S) + (k->s->is_short ? 1e-3 * k->s->timeout_ms : 0);
    world_check(&k->w, end - from < limit, "%s took %.2f s, %.2f s of them after the fault",
                what, end - start, end - from);
}

/* Whether the rank goes on. */
static bool told(struct rank *k, ep_status st, double start, const char *what) {
    const bool creating = !k->w.group;
    check_time(k, start, what);
    if (st == EP_OK) {
        return true;
    }
    /* By the test's own allgather that gave up; or because of what the victim left out itself. */
    const bool own = (creating && k->s->allgather && k->s->is_short && st == EP_ERR_SYSTEM) ||
                     (k->s->fault == STORM_MISMATCH && k->w.rank == k->s->victim &&
                      (st == EP_ERR_STATE || st == EP_ERR_ARG));
    world_check(&k->w, own || storm_may_tell(k->s, st), "%s: %s (%s)", what,
                ep_status_string(st), ep_last_error());
    world_check(&k->w, rig_is_sentence(ep_last_error()), "%s: %s says \"%s\"", what,
                ep_status_string(st), ep_last_error());
    k->over = true;
    return false;
}

/* ---- bad luck ------------------------------------------------------------------------------- */

static void sleep_us(int us) {
    const struct timespec t = {us / 1000000, us % 1000000 * 1000L};
    nanosleep(&t, NULL);
}

static void strike(struct rank *k) {
    const struct storm_scene *s = k->s;
    atomic_store(&k->shared->struck_us, (long long)(1e6 * tap_now()) + 1);
    switch (s->fault) {
    case STORM_DELAY:
        sleep_us(10 * s->delay_us);
        break;
    case STORM_LATE:
        sleep_us(1000 * s->timeout_ms + 300000 * rig_scale());
        break;
    case STORM_STOP:
    case STORM_STOP_LONG:
        kill(getpid(), SIGSTOP);
        break;
    case STORM_KILL:
        kill(getpid(), SIGKILL);
        break;
    case STORM_EXIT:
        _exit(0);
    case STORM_ABORT:
        world_check(&k->w, ep_group_abort(k->w.group) == EP_OK, "abort: %s", ep_last_error());
        break;
    default:
        break;
    }
}

static void *strike_later(void *arg) {
    struct rank *k = arg;
    sleep_us(k->s->delay_us);
    strike(k);
    return NULL;
}

/* Whether the fault is one that another thread of the process can do. */
static bool can_come_later(enum storm_fault f) {
    return f == STORM_STOP || f == STORM_STOP_LONG || f == STORM_KILL || f == STORM_EXIT ||
           f == STORM_ABORT;
}

static void have_bad_luck(struct rank *k) {
    if (k->s->async && can_come_later(k->s->fault)) {
        k->has_striker = pthread_create(&k->striker, NULL, strike_later, k) == 0;
    } else {
        strike(k);
    }
    k->over = k->s->fault == STORM_LEAVE;
}

/* ---- steps ---------------------------------------------------------------------------------- */

/* The test's own allgather; gives up where a rank does not come. */
struct meeting {
    const struct storm_scene *s;
    struct storm_cards *cards;
    int rank;
};

static int allgather(void *ctx, const void *in, void *out, size_t bytes) {
    const struct meeting *m = ctx;
    struct storm_cards *c = m->cards;
    const double limit =
        tap_now() + (m->s->is_short ? 1e-3 * m->s->timeout_ms : rig_within(20.0));
    if (bytes > STORM_CARD_BYTES) {
        return 7;
    }
    const int turn = atomic_load(&c->calls[m->rank]);
    memcpy(c->card[turn % 2][m->rank], in, bytes);
    atomic_store(&c->calls[m->rank], turn + 1);
    for (int r = 0; r < m->s->num_ranks; r++) {
        while (atomic_load(&c->calls[r]) <= turn) {
            if (tap_now() > limit) {
                return 1;
            }
            tap_sleep_ms(1);
        }
        memcpy((uint8_t *)out + (size_t)r * bytes, c->card[turn % 2][r], bytes);
    }
    return 0;
}

static void create(struct rank *k, ep_world *world, bool wrong) {
    const struct storm_scene *s = k->s;
    struct ep_group_config c = s->config;
    struct meeting meeting = {s, &k->shared->cards, k->w.rank};
    char address[32];
    snprintf(address, sizeof(address), "127.0.0.1:%d", k->shared->port[0]);
    c.rank = k->w.rank;
    c.world = world;
    c.allgather = !world && s->allgather ? allgather : NULL;
    c.allgather_ctx = &meeting;
    c.address = world || s->allgather ? NULL : address;
    c.num_workers = gpu_wanted() ? 0 : s->habits[k->w.rank].num_workers;
    c.max_tokens += wrong;
    const double start = tap_now();
    ep_group *group = NULL;
    const ep_status st = call_group_create(&group, &c);
    if (told(k, st, start, "ep_group_create")) {
        k->w.group = group;
        for (int h = 0; h < STORM_HANDLES; h++) {
            run_create(&k->run[h], &k->w, &s->t[h]);
        }
        ll_create(&k->decode, &k->w, &s->ll);
        if (s->habits[k->w.rank].stream) {
            told(k, call_stream_create(&k->stream, group), tap_now(), "ep_stream_create");
        }
    }
}

static void route_all(struct rank *k) {
    for (int h = 0; h < STORM_HANDLES && !k->over; h++) {
        told(k, ep_handle_create(&k->handle[h], k->w.group, NULL), tap_now(),
             "ep_handle_create");
    }
    for (int h = 0; h < STORM_HANDLES && !k->over; h++) {
        const double start = tap_now();
        told(k, run_route(&k->run[h], k->handle[h], NULL), start, "ep_handle_route");
    }
}

/* In one call, or in two with a look at the counts between them. */
static void dispatch(struct rank *k, int h) {
    struct run *r = &k->run[h];
    struct ep_dispatch_args in = EP_DISPATCH_ARGS_INIT, out = r->dispatch;
    int64_t rows = 0;
    double start = tap_now();
    run_poison(r, OUT_X, OUT_NUM_ROWS);
    if (!r->form->two_step) {
        told(k, call_dispatch(k->handle[h], &out, k->stream), start, "ep_dispatch");
        return;
    }
    in.x = out.x;
    in.scales = out.scales;
    in.topk_weights = out.topk_weights;
    in.num_workers = out.num_workers;
    out.x = out.scales = out.topk_weights = NULL;
    if (!told(k, call_dispatch_begin(k->handle[h], &in, k->stream), start,
              "ep_dispatch_begin")) {
        return;
    }
    start = tap_now();
    if (!told(k, ep_handle_counts(k->handle[h], &rows, NULL, NULL), start,
              "ep_handle_counts")) {
        return;
    }
    start = tap_now();
    told(k, call_dispatch_finish(k->handle[h], &out, k->stream), start, "ep_dispatch_finish");
}

static void check(struct rank *k, struct storm_step step) {
    struct run *r = &k->run[step.handle];
    const int bad = k->w.bad;
    if (step.call == STORM_DISPATCH) {
        run_check_outputs(r);
    } else if (step.call == STORM_DECODE) {
        ll_check_dispatch(&k->decode);
        ll_check_combine(&k->decode);
    } else {
        run_check_combine(r);
    }
    world_check(&k->w, k->w.bad == bad, "wrong bytes of a %s of handle %d that succeeded",
                step.call == STORM_DISPATCH ? "dispatch"
                : step.call == STORM_DECODE ? "decode step"
                                            : "combine",
                step.handle);
}

/* A dispatch and its combine; in halves on ranks with odd numbers. */
static void decode(struct rank *k) {
    const int halves = 1 + k->w.rank % 2;
    for (int i = 0; i < 2 * halves && !k->over; i++) {
        const enum call_half half = halves == 1 ? CALL_BOTH : i % 2 ? CALL_RECV : CALL_SEND;
        const bool combines = i >= halves;
        const double start = tap_now();
        told(k, (combines ? ll_combine : ll_dispatch)(&k->decode, half, k->stream), start,
             combines ? "ep_ll_combine" : "ep_ll_dispatch");
    }
}

/* Awaits what is queued, and looks at it if it went well. */
static void settle(struct rank *k) {
    if (k->stream) {
        const double start = tap_now();
        told(k, call_stream_sync(k->w.group, k->stream), start, "ep_stream_sync");
    }
    for (int i = 0; i < k->num_pending && !k->over; i++) {
        check(k, k->pending[i]);
    }
    k->num_pending = 0;
}

static bool is_pending(const struct rank *k, struct storm_step step) {
    for (int i = 0; i < k->num_pending; i++) {
        if (k->pending[i].call == step.call && k->pending[i].handle == step.handle) {
            return true;
        }
    }
    return false;
}

static void operate(struct rank *k, struct storm_step step) {
    const int h = step.handle;
    const double start = tap_now();
    if (is_pending(k, step) || step.call == STORM_ROUTE) {
        settle(k);
    }
    if (k->over) {
        return;
    }
    if (step.call == STORM_ROUTE) {
        told(k, run_route(&k->run[h], k->handle[h], k->stream), start, "ep_handle_route");
        return;
    }
    if (step.call == STORM_DISPATCH) {
        dispatch(k, h);
    } else if (step.call == STORM_DECODE) {
        decode(k);
    } else {
        told(k, run_combine(&k->run[h], k->handle[h], k->stream), start, "ep_combine");
    }
    if (!k->over) {
        k->pending[k->num_pending++] = step;
        if (!k->stream || k->s->habits[k->w.rank].eager) {
            settle(k);
        }
    }
}

/* Rows of another size than the others', and no output. */
static void dispatch_others(struct rank *k, int h) {
    struct ep_dispatch_args a = EP_DISPATCH_ARGS_INIT;
    struct ep_tensor x = *k->run[h].dispatch.x;
    const double start = tap_now();
    x.shape[1] -= EP_ROW_ALIGN / (int64_t)ep_dtype_bytes((ep_dtype)x.dtype);
    a.x = &x;
    settle(k);
    if (!k->over) {
        told(k, call_dispatch(k->handle[h], &a, k->stream), start, "another ep_dispatch");
    }
}

/* Something else than the others do. */
static void mistake(struct rank *k, ep_world *world, struct storm_step step) {
    switch (step.call) {
    case STORM_CREATE:
        create(k, world, true);
        break;
    case STORM_HANDLES_ROUTED: /* what is local is no mistake */
        route_all(k);
        break;
    case STORM_DISPATCH:
        dispatch_others(k, step.handle);
        break;
    case STORM_COMBINE:
        operate(k, (struct storm_step){STORM_DISPATCH, step.handle});
        break;
    case STORM_DECODE: /* without the weights that the others give */
        k->decode.dispatch.topk_weights = NULL;
        operate(k, step);
        break;
    default: /* a route that is left out */
        break;
    }
}

static void take_step(struct rank *k, ep_world *world, int i) {
    const bool unlucky = k->w.rank == k->s->victim && i == k->s->step;
    const struct storm_step step = k->s->steps[i];
    if (unlucky) {
        have_bad_luck(k);
    }
    if (k->over || step.call == STORM_DESTROY) {
        return;
    }
    if (unlucky && k->s->fault == STORM_MISMATCH) {
        mistake(k, world, step);
    } else if (step.call == STORM_CREATE) {
        create(k, world, false);
    } else if (step.call == STORM_HANDLES_ROUTED) {
        route_all(k);
    } else {
        operate(k, step);
    }
}

/* What has ended a group is told in the same words to whoever asks. */
static void check_fault(struct rank *k) {
    struct ep_fault fault = EP_FAULT_INIT;
    world_check(&k->w, ep_group_fault(k->w.group, &fault) == EP_OK, "ep_group_fault: %s",
                ep_last_error());
    world_check(&k->w, storm_may_tell(k->s, (ep_status)fault.status), "the fault is %s: %s",
                ep_status_string((ep_status)fault.status), fault.message);
    world_check(&k->w, fault.status == EP_OK || rig_is_sentence(fault.message),
                "the fault says \"%s\"", fault.message);
}

static void finish(struct rank *k) {
    if (k->has_striker) {
        pthread_join(k->striker, NULL); /* a lethal one does not end */
    }
    if (!k->w.group) {
        return;
    }
    if (k->over) {
        check_fault(k);
    }
    double start = tap_now();
    call_stream_destroy(k->w.group, &k->stream);
    for (int h = 0; h < STORM_HANDLES; h++) {
        ep_handle_destroy(&k->handle[h]);
    }
    check_time(k, start, "destroying stream and handles");
    start = tap_now();
    call_group_destroy(&k->w.group);
    check_time(k, start, "ep_group_destroy");
    for (int h = 0; h < STORM_HANDLES; h++) {
        run_free(&k->run[h]);
    }
    ll_destroy(&k->decode);
}

int storm_rank(const struct storm_scene *s, struct storm_shared *shared, ep_world *world,
               int rank) {
    struct rank k = {.s = s, .shared = shared};
    k.w = (struct world){.rank = rank, .num_ranks = s->num_ranks};
    for (int i = 0; i < s->num_steps && !k.over; i++) {
        take_step(&k, world, i);
    }
    if (!k.over && k.w.group) {
        settle(&k);
    }
    if (rank == s->victim && storm_is_lethal(s) && !k.has_striker) {
        strike(&k); /* it had failed before its turn came */
    }
    finish(&k);
    return k.w.bad;
}
