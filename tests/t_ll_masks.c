/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Masks of low-latency mode: ranks that are killed, stopped (also in the middle of a row), late, gone or
 * masked by the caller are left out and told apart; the others go on with the right bytes, in every form of
 * rows and sums, and one deadline holds for all. Then those that live come back. Operations of throughput mode are refused
 * meanwhile.
 * On GPUs those that no signal or trap is for.
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tests/gpu.h"
#include "tests/ll.h"
#include "tests/ref_ll.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define MOST 12
#define TOKENS 6
#define TIMEOUT_MS (2000 + 500 * rig_scale()) /* machines are shared */

struct scene {
    struct ll_step step, without, alone; /* the two: with ranks that are gone */
    ep_world *world;                     /* of ranks that are threads */
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
    setup.config.flags |= EP_GROUP_LL_MASKS;
    setup.config.timeout_ms = 60000;
    setup.config.ll_timeout_ms = TIMEOUT_MS;
    setup.config.num_workers = gpu_wanted() ? 0 : 1 + rank % 3 * 2;
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

/* For calls that tests do not stage: where a device has several ranks, the rank's own. */
static void *stream_of(const struct rank *k) {
    return gpu_wanted() ? call_gpu(k->w.group)->stream : NULL;
}

static void is_done(struct rank *k, ep_status st, const char *what) {
    world_is(&k->w, st, EP_OK, what);
    if (gpu_wanted()) {
        world_is(&k->w, call_stream_sync(k->w.group, stream_of(k)), EP_OK, what);
    }
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

/* Of the matrix or list that is output `what`, line `row`; scales: column by column. */
static void fill(struct ll_run *r, int what, int64_t row, int byte) {
    const struct ep_tensor *t = &r->t[what];
    const size_t elem = ep_dtype_bytes((ep_dtype)t->dtype);
    const size_t bytes = t->ndim == 1 ? elem : (size_t)t->shape[1] * elem;
    if (r->bytes[what]) {
        memset(r->want[what] + (size_t)(row * t->stride[0]) * elem, byte, bytes);
    }
}

/* Counts of rank `from` have come, but not all rows. */
static void tear(struct ll_run *r, int from) {
    const int ranks = r->w->num_ranks;
    const struct ep_tensor *scales = &r->t[LL_SCALES];
    const size_t elem = ep_dtype_bytes((ep_dtype)scales->dtype);
    const int64_t lists = r->t[LL_RANGES].shape[0], each = (int64_t)ranks * r->s->max_tokens;
    const int64_t columns = lists ? scales->shape[0] / lists : 0;
    for (int64_t list = 0; list < lists; list++) {
        int64_t range;
        uint8_t *at = r->want[LL_RANGES] + (list * ranks + from) * 8;
        memcpy(&range, at, 8);
        memset(at, 0, 8);
        for (int64_t i = range >> 32; i < (range >> 32) + (range & 0xffffffff); i++) {
            fill(r, LL_X, list * each + i, 0);
            fill(r, LL_IDS, list * each + i, 0xFF);
            fill(r, LL_WEIGHTS, list * each + i, 0);
            fill(r, LL_SOURCE, list * each + i, 0xFF);
            for (int64_t c = list * columns;
                 r->dispatch.recv_scales && c < (list + 1) * columns; c++) {
                memset(r->want[LL_SCALES] + (size_t)(c * scales->stride[0] + i) * elem, 0,
                       elem);
            }
        }
    }
}

/* The experts of rank `from` do not answer. */
static void without_answers(struct ll_run *r, int from) {
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
        const bool kept = id >= 0 && id < p.num_experts && p.expert_rank[id] != from;
        ids[i] = kept ? id : -1;
    }
    in[r->w->rank].ids = ids;
    p.in = in;
    if (s->exact || s->logfmt) {
        ref_combine_ll(&p, r->w->rank, &c, s->exact, s->logfmt, r->want[LL_Y]);
    } else {
        ref_combine(&p, r->w->rank, &c, none, r->want[LL_Y], NULL);
    }
    pool_free(&pool);
}

/* A round trip of those whom `step` leaves, all others masked before. */
static void pass_without(struct rank *k, const struct ll_step *step) {
    struct ll_run r;
    ll_create(&r, &k->w, step);
    ll_pass(&r, k->w.rank % 2);
    ll_destroy(&r);
}

/* A dispatch that leaves out those whom `step` has not. */
static void dispatch_without(struct rank *k, const struct ll_step *step, ep_status want,
                             const char *words) {
    struct ll_run r;
    ll_create(&r, &k->w, step);
    world_fails(&k->w, ll_dispatch(&r, CALL_BOTH, NULL), want, words,
                "a dispatch without ranks");
    ll_check_dispatch(&r);
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
    int32_t own[MOST], *masks = own;
    struct gpu_piece pinned;
    struct ep_tensor t;
    unsigned got = 0;
    if (gpu_wanted()) {
        gpu_take(call_gpu(k->w.group), sizeof(own), &pinned);
        masks = (int32_t *)(void *)pinned.host;
    }
    ep_tensor_1d(&t, EP_I32, masks, k->w.num_ranks);
    is_done(k, ep_ll_masks(k->w.group, &t, stream_of(k)), "ep_ll_masks");
    for (int r = 0; r < k->w.num_ranks; r++) {
        got |= (unsigned)(masks[r] == 1) << r;
    }
    if (gpu_wanted()) {
        gpu_give(call_gpu(k->w.group), &pinned);
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
    world_is(&k->w, call_route(h, &routing, NULL), EP_OK, "route");
    const ep_status st = call_dispatch(h, &d, NULL);
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

/* What a step is, beside ranks and tokens. */
struct form {
    const char *name;
    int64_t hidden;
    uint32_t flags;
    bool exact, weights_now, opaque;
};

static void build_step(struct ll_step *step, int ranks, const struct form *f, unsigned gone) {
    ll_init(step, ranks, tap_seed());
    step->c.hidden = f->hidden;
    step->c.max_tokens = step->max_tokens = TOKENS;
    step->c.tokens = TOKENS_MAX;
    step->c.row_dtype = f->opaque ? EP_U8 : EP_BF16;
    step->c.num_scales = f->opaque ? 5 : 0;
    step->c.scale_dtype = EP_I16;
    step->flags = f->flags;
    step->packed = (f->flags & EP_LL_SCALES_POWER_OF_2) != 0;
    step->exact = f->exact;
    step->weights_now = f->weights_now;
    step->gone = gone;
    ll_build(step);
}

static void build(struct scene *s, int ranks, const struct form *f, unsigned gone) {
    build_step(&s->step, ranks, f, 0);
    build_step(&s->without, ranks, f, gone);
    build_step(&s->alone, ranks, f, ~gone);
    s->port = tap_free_port();
    s->place = tap_shared(MOST * sizeof(*s->place));
}

static void free_scene(struct scene *s) {
    ll_free(&s->step);
    ll_free(&s->without);
    ll_free(&s->alone);
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
    dispatch_without(&k, &s->without, EP_ERR_PEER, "rank 1|and without 2, 3");
    reports(&k, 1, EP_LL_MASK_GONE);
    reports(&k, 2, EP_LL_MASK_STOPPED);
    reports(&k, 3, EP_LL_MASK_LATE);
    say(&k, 2);
    await(s, alive, 2);
    masks_are(&k, gone);
    is_refused(&k, "throughput mode need all ranks|rank 1 died");
    pass_without(&k, &s->without);
    pass_without(&k, &s->without);
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
        dispatch_without(&k, &s->without, EP_ERR_TIMEOUT, "alive but late");
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
        rig_trap((uint8_t *)x->data + (x->shape[0] - 1) * x->stride[0] * 2 + 4096, stop,
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
        tear(&k.run, 2);
        world_fails(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_ERR_TIMEOUT,
                    "rank 2|rows|stopped", "dispatch");
        ll_check_dispatch(&k.run);
        reports(&k, 2, EP_LL_MASK_STOPPED);
        is_refused(&k, "rank 2");
        pass_without(&k, &s->without);
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
    is_done(&k, ep_ll_unmask_rank(k.w.group, -1, stream_of(&k)), "unmask");
    is_done(&k, ep_ll_barrier(k.w.group, stream_of(&k)), "barrier");
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
        pass_without(&k, &s->alone);
    } else {
        is_done(&k, ep_ll_mask_rank(k.w.group, 3, stream_of(&k)), "mask");
        reports(&k, 3, EP_LL_MASK_BY_CALLER);
        say(&k, 2);
        pass_without(&k, &s->without);
        pass_without(&k, &s->without);
        world_is(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_OK, "one dispatch more");
    }
    say(&k, 3);
    await(s, 15, 3); /* on a busy machine they come to this at times that are far apart */
    is_done(&k, ep_ll_unmask_rank(k.w.group, -1, stream_of(&k)), "unmask");
    is_done(&k, ep_ll_barrier(k.w.group, stream_of(&k)), "barrier");
    ll_destroy(&k.run);
    ll_create(&k.run, &k.w, &s->step);
    ll_pass(&k.run, true);
    world_is(&k.w, throughput(&k), EP_OK, "throughput dispatch");
    if (rank != 3) {
        dispatch_without(&k, &s->without, EP_ERR_PEER, "rank 3 died or has left");
    }
    return end(&k);
}

/* ---- every form ----------------------------------------------------------------------------- */

static const struct form forms[] = {
    {.name = "one row per rank", .hidden = 2048, .flags = EP_LL_COMPACT},
    {.name = "exact", .hidden = 2048, .exact = true},
    {.name = "rows as they are, with scales", .hidden = 4096, .opaque = true},
    {.name = "weights at combine", .hidden = 2048, .weights_now = true},
    {.name = "E4M3",
     .hidden = 2048,
     .flags = EP_LL_FP8 | EP_LL_SCALES_POWER_OF_2,
     .exact = true,
     .weights_now = true},
};
#define NUM_FORMS ((int)(sizeof(forms) / sizeof(forms[0])))
#define TORN 3 /* a rank */

static void await_the_others(void *scene) {
    await(scene, 7, 2);
}

/* A rank is late in the middle of a row; comes back; and then does not answer. */
static int in_form(int rank, void *ctx) {
    struct scene *s = ctx;
    struct rank k;
    if (!begin(&k, s, rank)) {
        return 1;
    }
    ll_pass(&k.run, rank % 2);
    say(&k, 1);
    await(s, 15, 1);
    if (rank == TORN) {
        const struct ep_tensor *x = k.run.dispatch.x; /* of rows of 4 KiB */
        rig_trap((uint8_t *)x->data + TOKENS / 2 * 4096 + 2048, await_the_others, s);
        world_is(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_OK, "a late dispatch");
        ll_check_dispatch(&k.run);
        masks_are(&k, 7);
        world_fails(&k.w, ep_ll_status(k.w.group), EP_ERR_PEER, "has masked rank 3", "status");
    } else {
        tear(&k.run, TORN);
        world_fails(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_ERR_TIMEOUT, "rank 3|rows",
                    "a torn dispatch");
        ll_check_dispatch(&k.run);
        pass_without(&k, &s->without);
    }
    say(&k, 2);
    await(s, 15, 2);
    is_done(&k, ep_ll_unmask_rank(k.w.group, -1, stream_of(&k)), "unmask");
    is_done(&k, ep_ll_barrier(k.w.group, stream_of(&k)), "barrier");
    ll_destroy(&k.run);
    ll_create(&k.run, &k.w, &s->step);
    world_is(&k.w, ll_dispatch(&k.run, CALL_BOTH, NULL), EP_OK, "dispatch");
    ll_check_dispatch(&k.run);
    if (rank != TORN) {
        without_answers(&k.run, TORN);
        world_fails(&k.w, ll_combine(&k.run, CALL_BOTH, NULL), EP_ERR_TIMEOUT, "rank 3",
                    "a combine without answers");
        ll_check_combine(&k.run);
        say(&k, 3);
    }
    await(s, 7, 3);
    return end(&k);
}

/* In a process for each form, as a process has one trap. */
static int form_main(int i, void *ctx) {
    struct scene *s = (struct scene *)ctx + i;
    ep_world_create(&s->world, 4);
    const int failed = tap_run_threads(4, in_form, s);
    ep_world_destroy(&s->world);
    return failed;
}

static void in_every_form(void) {
    static struct scene s[NUM_FORMS];
    struct tap_ranks t;
    for (int i = 0; i < NUM_FORMS; i++) {
        build(&s[i], 4, &forms[i], 1u << TORN);
    }
    ok(tap_ranks_start(&t, NUM_FORMS, form_main, s) == 0, "a process for each form");
    tap_ranks_wait(&t, 60 * rig_scale());
    for (int i = 0; i < NUM_FORMS; i++) {
        ok(t.status[i] == 0, "torn, left out and back: %s", forms[i].name);
        free_scene(&s[i]);
    }
    tap_ranks_free(&t);
}

/* ---- the test's own process ----------------------------------------------------------------- */

static void processes(struct scene *s, int ranks, int64_t hidden, unsigned gone,
                      int (*fn)(int rank, void *ctx), const char *name) {
    const struct form plain = {.hidden = hidden};
    struct tap_ranks t;
    build(s, ranks, &plain, gone);
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
    free_scene(s);
}

static void threads(struct scene *s, int ranks, unsigned gone, int (*fn)(int rank, void *ctx),
                    const char *name) {
    const struct form plain = {.hidden = 256};
    build(s, ranks, &plain, gone);
    const bool processes = gpu_processes(false);
    if (!processes) {
        ep_world_create(&s->world, ranks);
    }
    ok(gpu_run_ranks(ranks, processes, fn, s, 60 * rig_scale()) == 0, "%s", name);
    ep_world_destroy(&s->world);
    free_scene(s);
}

int main(void) {
    gpu_program();
    static struct scene s[4];
    tap_deadline(120 * rig_scale());
    tap_expect_log(" died: ");
    tap_expect_log("alive but late");
    if (gpu_wanted()) {
        threads(&s[2], 4, 0xc, one_deadline, "one deadline for two ranks");
        threads(&s[3], 4, 8, by_caller, "masked by the caller, back, and gone");
        return done_testing();
    }
    processes(&s[0], 5, 256, 0xe, apart, "killed, stopped and late ranks are told apart");
    processes(&s[1], 3, 4096, 4, back, "a rank that was stopped in a row is back");
    threads(&s[2], 12, 0xffc, one_deadline, "one deadline for ten ranks");
    threads(&s[3], 4, 8, by_caller, "masked by the caller, back, and gone");
    in_every_form();
    return done_testing();
}
