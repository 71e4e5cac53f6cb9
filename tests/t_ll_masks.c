/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Masks of low-latency mode: ranks that are killed, stopped (also in the middle of a row), late, gone or
 * masked by the caller are left out and told apart; the others go on with the right bytes, and one
 * deadline holds for all. Then those that live come back. Operations of throughput mode are refused
 * meanwhile.
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tests/gpu.h"
#include "tests/ll.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define MOST 12
#define TIMEOUT_MS (2000 + 500 * rig_scale()) /* machines are shared */

struct scene {
    struct ll_step step;
    ep_world *world; /* of ranks that are threads */
    int port;
    atomic_int *place; /* [MOST] how far each rank has come; all processes share it */
};

struct rank {
    struct scene *s;
    struct world w;
    struct ll_run run;
};

static bool begin(struct rank *k, struct scene *s, int rank) {
    struct world_setup setup;
    char address[32];
    memset(k, 0, sizeof(*k));
    k->s = s;
    k->w = (struct world){.rank = rank, .num_ranks = s->step.c.num_ranks};
    ll_setup(&setup, &s->step);
    snprintf(address, sizeof(address), "127.0.0.1:%d", s->port);
    setup.config.rank = rank;
    setup.config.num_ranks = k->w.num_ranks;
    setup.config.world = s->world;
    setup.config.address = s->world ? NULL : address;
    setup.config.flags = EP_GROUP_LL_MASKS;
    setup.config.timeout_ms = 60000;
    setup.config.ll_timeout_ms = TIMEOUT_MS;
    setup.config.num_workers = 1 + rank % 3 * 2;
    if (!world_is(&k->w, call_group_create(&k->w.group, &setup.config), EP_OK, "create")) {
        return false;
    }
    ll_create(&k->run, &k->w, &s->step);
    return true;
}

static int end(struct rank *k) {
    ll_destroy(&k->run);
    call_group_destroy(&k->w.group);
    return k->w.bad;
}

static void say(struct rank *k, int place) {
    atomic_store(&k->s->place[k->w.rank], place);
}

/* Until those of `ranks` have come so far. */
static void await(const struct scene *s, unsigned ranks, int place) {
    for (int r = 0; r < MOST; r++) {
        while ((ranks >> r & 1) && atomic_load(&s->place[r]) < place) {
            tap_sleep_ms(1);
        }
    }
}

/* ---- what an operation gives without some ranks --------------------------------------------- */

/* Of ranks `absent` no counts have come; of ranks `torn` not all rows. */
static void without_rows(struct ll_run *r, unsigned absent, unsigned torn) {
    const struct ll_step *s = r->s;
    const int ranks = s->c.num_ranks;
    const size_t row = (size_t)s->c.hidden * 2;
    const int64_t each = (int64_t)ranks * s->max_tokens;
    for (int e = 0; e < ep_group_num_local_experts(r->w->group); e++) {
        int64_t from = e * each, to = from, range;
        for (int p = 0; p < ranks; p++) {
            memcpy(&range, r->want[LL_RANGES] + (e * ranks + p) * 8, 8);
            const int64_t num = range & 0xffffffff;
            int64_t now = absent >> p & 1 ? 0 : num;
            uint8_t *x = r->want[LL_X], *source = r->want[LL_SOURCE];
            memmove(x + (size_t)to * row, x + (size_t)from * row, (size_t)now * row);
            memmove(source + to * 4, source + from * 4, (size_t)now * 4);
            range = torn >> p & 1 ? 0 : (to - e * each) << 32 | now;
            memcpy(r->want[LL_RANGES] + (e * ranks + p) * 8, &range, 8);
            if (torn >> p & 1) {
                memset(x + (size_t)to * row, 0, (size_t)now * row);
                memset(source + to * 4, 0xFF, (size_t)now * 4);
            }
            from += num;
            to += now;
        }
        const int32_t count = (int32_t)(to - e * each);
        memcpy(r->want[LL_COUNTS] + e * 4, &count, 4);
        memset(r->want[LL_X] + (size_t)to * row, 0xA5, (size_t)(from - to) * row);
        memset(r->want[LL_SOURCE] + to * 4, 0xA5, (size_t)(from - to) * 4);
    }
    ll_expect(r, 1);
}

/* Their experts answer nothing. */
static void without_answers(struct ll_run *r, unsigned gone) {
    const struct ll_step *s = r->s;
    struct ref_problem p = s->c.problem;
    struct ref_input in[MOST];
    struct pool pool = {0};
    const uint8_t *none[2] = {NULL, NULL};
    const struct ref_combine c = {EP_BF16, s->c.hidden, s->recv, s->answers};
    const int64_t n = s->c.in[r->w->rank].num_tokens * p.topk;
    int64_t *ids = pool_zero(&pool, (size_t)n * 8);
    memcpy(in, p.in, (size_t)p.num_ranks * sizeof(in[0]));
    for (int64_t i = 0; i < n; i++) {
        const int64_t id = in[r->w->rank].ids[i];
        const bool kept = id >= 0 && id < p.num_experts && !(gone >> p.expert_rank[id] & 1);
        ids[i] = kept ? id : -1;
    }
    in[r->w->rank].ids = ids;
    p.in = in;
    ref_combine(&p, r->w->rank, &c, none, r->want[LL_Y], NULL);
    pool_free(&pool);
}

/* The experts' answers lie where the rows do. */
static void move_answers(struct ll_run *r, unsigned absent) {
    const struct ll_step *s = r->s;
    const int ranks = s->c.num_ranks;
    const size_t row = (size_t)s->c.hidden * 2;
    uint8_t *x = r->answers.data;
    for (int e = 0; e < ep_group_num_local_experts(r->w->group); e++) {
        int64_t from = (int64_t)e * ranks * s->max_tokens, to = from, range;
        for (int p = 0; p < ranks; p++) {
            memcpy(&range, r->want[LL_RANGES] + (e * ranks + p) * 8, 8);
            const int64_t num = range & 0xffffffff, now = absent >> p & 1 ? 0 : num;
            memmove(x + (size_t)to * row, x + (size_t)from * row, (size_t)now * row);
            from += num;
            to += now;
        }
    }
}

/* A round trip as it must be without `gone`, all of whom were masked before. */
static void pass_without(struct rank *k, unsigned gone) {
    struct ll_run r;
    ll_create(&r, &k->w, &k->s->step);
    move_answers(&r, gone);
    without_rows(&r, gone, 0);
    without_answers(&r, gone);
    ll_pass(&r, k->w.rank % 2);
    ll_destroy(&r);
}

/* ---- what is told --------------------------------------------------------------------------- */

static void reports(struct rank *k, int rank, int why) {
    struct ep_ll_mask m = EP_LL_MASK_INIT;
    world_is(&k->w, ep_ll_mask_report(k->w.group, rank, &m), EP_OK, "ep_ll_mask_report");
    world_check(&k->w, m.why == why, "rank %d is masked because of %d (\"%s\"), must be %d",
                rank, m.why, m.message, why);
    world_check(&k->w, why == EP_LL_MASK_NONE || rig_is_sentence(m.message),
                "the report says \"%s\"", m.message);
}

static void masks_are(struct rank *k, unsigned want) {
    int32_t masks[MOST];
    struct ep_tensor t;
    unsigned got = 0;
    ep_tensor_1d(&t, EP_I32, masks, k->w.num_ranks);
    world_is(&k->w, ep_ll_masks(k->w.group, &t, NULL), EP_OK, "ep_ll_masks");
    for (int r = 0; r < k->w.num_ranks; r++) {
        got |= (unsigned)(masks[r] == 1) << r;
    }
    world_check(&k->w, got == want, "masks are %#x, must be %#x", got, want);
}

static ep_status throughput(struct rank *k) {
    struct ep_dispatch_args d = EP_DISPATCH_ARGS_INIT;
    struct ep_tensor ids, x;
    struct ep_routing routing = EP_ROUTING_INIT;
    int32_t id[1] = {0};
    _Alignas(16) uint8_t row[16] = {0};
    ep_handle *h = NULL;
    ep_tensor_2d(&ids, EP_I32, id, 1, 1);
    ep_tensor_2d(&x, EP_U8, row, 1, 16);
    routing.topk_ids = &ids;
    d.x = &x;
    d.flags = EP_DISPATCH_ARENA;
    world_is(&k->w, ep_handle_create(&h, k->w.group, NULL), EP_OK, "a handle");
    world_is(&k->w, ep_handle_route(h, &routing, NULL), EP_OK, "route");
    const ep_status st = ep_dispatch(h, &d, NULL);
    ep_handle_destroy(&h);
    return st;
}

static void is_refused(struct rank *k, const char *words) {
    struct ep_fault fault = EP_FAULT_INIT;
    world_fails(&k->w, throughput(k), EP_ERR_PEER, words, "a throughput dispatch");
    world_is(&k->w, ep_group_fault(k->w.group, &fault), EP_OK, "ep_group_fault");
    world_check(&k->w, fault.status == EP_OK, "the group has faulted: %s", fault.message);
}

/* ---- scenes --------------------------------------------------------------------------------- */

static void build(struct scene *s, int ranks, int64_t hidden, int tokens) {
    ll_init(&s->step, ranks, tap_seed());
    s->step.c.hidden = hidden;
    s->step.c.max_tokens = s->step.max_tokens = tokens;
    s->step.c.tokens = TOKENS_MAX;
    ll_build(&s->step);
    s->port = tap_free_port();
    s->place = tap_shared(MOST * sizeof(*s->place));
}

/* 1 is killed, 2 stopped, 3 late; 0 and 4 go on. */
static int apart(int rank, void *ctx) {
    struct scene *s = ctx;
    const unsigned gone = 0xe, alive = 0x11;
    struct rank k;
    if (!begin(&k, s, rank)) {
        return 1;
    }
    ll_pass(&k.run, false);
    masks_are(&k, 0);
    say(&k, 1);
    if (rank == 1 || rank == 2) {
        kill(getpid(), rank == 1 ? SIGKILL : SIGSTOP);
    }
    if (rank > 0 && rank < 4) {
        await(s, alive, 3);
        return end(&k);
    }
    await(s, gone, 1);
    without_rows(&k.run, gone, 0);
    const ep_status st = ll_dispatch(&k.run, CALL_BOTH, NULL);
    world_check(&k.w, st == EP_ERR_PEER, "dispatch without rank 1: %s: %s",
                ep_status_string(st), ep_last_error());
    world_check(&k.w, strstr(ep_last_error(), "and without 2, 3"), "it says \"%s\"",
                ep_last_error());
    ll_check_dispatch(&k.run);
    reports(&k, 1, EP_LL_MASK_GONE);
    reports(&k, 2, EP_LL_MASK_STOPPED);
    reports(&k, 3, EP_LL_MASK_LATE);
    say(&k, 2);
    await(s, alive, 2);
    masks_are(&k, gone);
    is_refused(&k, "throughput mode need all ranks|rank 1 died");
    pass_without(&k, gone);
    pass_without(&k, gone);
    say(&k, 3);
    await(s, alive, 3);
    return end(&k);
}

/* Most ranks never come: they are waited for together. */
static int one_deadline(int rank, void *ctx) {
    struct scene *s = ctx;
    const unsigned alive = 3;
    struct rank k;
    if (!begin(&k, s, rank)) {
        return 1;
    }
    if (rank < 2) {
        const double start = tap_now();
        without_rows(&k.run, ~alive, 0);
        world_fails(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_ERR_TIMEOUT,
                    "alive but late", "dispatch");
        ll_check_dispatch(&k.run);
        const double took = tap_now() - start, limit = 1e-3 * TIMEOUT_MS;
        world_check(&k.w, took > 0.7 * limit && took < 5 * limit,
                    "ten ranks were waited for %.2f s, the deadline is %.2f s", took, limit);
        reports(&k, 2, EP_LL_MASK_LATE);
        say(&k, 1);
    }
    await(s, alive, 1);
    return end(&k);
}

/* Of several threads that read the row one does. */
static void stop(void *arg) {
    atomic_flag *first = arg;
    if (!atomic_flag_test_and_set(first)) {
        kill(getpid(), SIGSTOP);
    }
}

/* Rank 2 is stopped in the middle of a row. When the others have left it out, it is woken, and comes
 * back although its counters and theirs differ. */
static int back(int rank, void *ctx) {
    struct scene *s = ctx;
    const unsigned others = 3;
    atomic_flag stopped = ATOMIC_FLAG_INIT;
    struct rank k;
    struct ep_tensor memory;
    if (!begin(&k, s, rank)) {
        return 1;
    }
    ll_pass(&k.run, true);
    say(&k, 1);
    await(s, 7, 1);
    if (rank == 2) {
        const struct ep_tensor *x = k.run.dispatch.x;
        rig_trap((uint8_t *)x->data + x->shape[0] / 2 * x->stride[0] * 2 + 4096, stop,
                 &stopped);
        /* All that the others have sent to it is there. */
        world_is(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_OK, "dispatch when woken");
        ll_check_dispatch(&k.run);
        masks_are(&k, others);
        world_fails(&k.w, ep_ll_status(k.w.group), EP_ERR_PEER, "has masked rank 2", "status");
        reports(&k, 0, EP_LL_MASK_BY_IT);
        reports(&k, 1, EP_LL_MASK_BY_IT);
        is_refused(&k, "has masked rank 2");
        say(&k, 3);
    } else {
        without_rows(&k.run, 0, 4);
        world_fails(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_ERR_TIMEOUT,
                    "rank 2|rows|stopped", "dispatch");
        ll_check_dispatch(&k.run);
        reports(&k, 2, EP_LL_MASK_STOPPED);
        is_refused(&k, "rank 2");
        pass_without(&k, 4);
        world_is(&k.w, ll_dispatch(&k.run, CALL_SEND, NULL), EP_OK, "send");
        world_fails(&k.w, ep_ll_barrier(k.w.group, NULL), EP_ERR_STATE, "not received",
                    "barrier");
        world_is(&k.w, ll_dispatch(&k.run, CALL_RECV, NULL), EP_OK, "receive");
        say(&k, 2); /* now it is woken */
    }
    await(s, others, 2);
    await(s, 4, 3);
    world_is(&k.w, ep_ll_memory(k.w.group, &memory), EP_OK, "ep_ll_memory");
    memset(memory.data, 0, (size_t)memory.shape[0]);
    world_is(&k.w, ep_ll_unmask_rank(k.w.group, -1, NULL), EP_OK, "unmask");
    world_is(&k.w, ep_ll_barrier(k.w.group, NULL), EP_OK, "barrier");
    masks_are(&k, 0);
    reports(&k, (rank + 1) % 3, EP_LL_MASK_NONE);
    world_fails(&k.w, ll_combine(&k.run, CALL_BOTH, NULL), EP_ERR_STATE, "since the last",
                "combine of a handle from before");
    ll_destroy(&k.run);
    ll_create(&k.run, &k.w, &s->step);
    for (int i = 0; i < 3; i++) {
        ll_pass(&k.run, i % 2);
    }
    world_is(&k.w, throughput(&k), EP_OK, "throughput dispatch");
    return end(&k);
}

/* A caller masks a rank, and takes it back; then one destroys its group. */
static int by_caller(int rank, void *ctx) {
    struct scene *s = ctx;
    struct rank k;
    if (!begin(&k, s, rank)) {
        return 1;
    }
    ll_pass(&k.run, false);
    say(&k, 1);
    await(s, 15, 1);
    if (rank == 3) {
        await(s, 7, 2);
        masks_are(&k, 7);
        world_fails(&k.w, ep_ll_status(k.w.group), EP_ERR_PEER, "has masked rank 3", "status");
        reports(&k, 0, EP_LL_MASK_BY_IT);
        pass_without(&k, 7);
    } else {
        world_is(&k.w, ep_ll_mask_rank(k.w.group, 3, NULL), EP_OK, "mask");
        reports(&k, 3, EP_LL_MASK_BY_CALLER);
        say(&k, 2);
        pass_without(&k, 8);
        pass_without(&k, 8);
        world_is(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_OK, "one dispatch more");
    }
    world_is(&k.w, ep_ll_unmask_rank(k.w.group, -1, NULL), EP_OK, "unmask");
    world_is(&k.w, ep_ll_barrier(k.w.group, NULL), EP_OK, "barrier");
    ll_destroy(&k.run);
    ll_create(&k.run, &k.w, &s->step);
    ll_pass(&k.run, true);
    world_is(&k.w, throughput(&k), EP_OK, "throughput dispatch");
    if (rank != 3) {
        without_rows(&k.run, 8, 0);
        world_fails(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_ERR_PEER,
                    "rank 3 died or has left", "dispatch without the one that left");
        ll_check_dispatch(&k.run);
    }
    return end(&k);
}

/* ---- the test's own process ----------------------------------------------------------------- */

static void processes(struct scene *s, int ranks, int64_t hidden,
                      int (*fn)(int rank, void *ctx), const char *name) {
    struct tap_ranks t;
    build(s, ranks, hidden, 6);
    ok(tap_ranks_start(&t, ranks, fn, s) == 0, "the ranks start");
    if (fn == back) {
        await(s, 3, 2);
        tap_ranks_signal(&t, 2, SIGCONT);
    } else { /* it has stopped, and ends when it is woken */
        t.sent[1] = SIGKILL;
        await(s, 0x11, 3);
        tap_ranks_signal(&t, 2, SIGCONT);
    }
    ok(tap_ranks_wait(&t, 60 * rig_scale()) == 0, "%s", name);
    tap_ranks_free(&t);
    ll_free(&s->step);
}

static void threads(struct scene *s, int ranks, int (*fn)(int rank, void *ctx),
                    const char *name) {
    build(s, ranks, 256, 6);
    ep_world_create(&s->world, ranks);
    ok(tap_run_threads(ranks, fn, s) == 0, "%s", name);
    ep_world_destroy(&s->world);
    ll_free(&s->step);
}

int main(void) {
    gpu_never("ranks are stopped by signals, and one thread is many ranks");
    static struct scene s[4];
    tap_deadline(120 * rig_scale());
    tap_expect_log(" died: ");
    tap_expect_log("alive but late");
    processes(&s[0], 5, 256, apart, "killed, stopped and late ranks are told apart");
    processes(&s[1], 3, 4096, back, "a rank that was stopped in a row is back");
    threads(&s[2], 12, one_deadline, "one deadline for ten ranks");
    threads(&s[3], 4, by_caller, "masked by the caller, back, and gone");
    return done_testing();
}
