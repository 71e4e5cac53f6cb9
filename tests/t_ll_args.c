/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * What low-latency calls refuse, ranks that differ, and a rank that does not come: each is one sentence
 * that names what was wrong.
 */
#include <stdio.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/ll.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define RANKS 2

static void arg(struct world *w, ep_status st, const char *words, const char *what) {
    world_fails(w, st, EP_ERR_ARG, words, what);
}

/* Each breaks one rule, before anything is sent. */
static void arguments(struct world *w) {
    const struct ll_step *s = w->ctx;
    struct ll_run r;
    struct ep_tensor t;

    ll_create(&r, w, s);
    const struct ep_ll_dispatch_args good = r.dispatch;
    const struct ep_ll_combine_args good_combine = r.combine;
#define BAD(words, what)                                                                       \
    do {                                                                                       \
        arg(w, ll_dispatch(&r, CALL_BOTH, NULL), words, what);                                 \
        r.dispatch = good;                                                                     \
    } while (0)
    r.dispatch.flags = 64;
    BAD("flags is 0x40", "unknown flags");
    r.dispatch.flags = EP_LL_SCALES_POWER_OF_2;
    BAD("only with EP_LL_FP8", "scales without a cast");
    r.dispatch.max_tokens = s->max_tokens + 1;
    BAD("max_tokens is|ll_max_tokens", "M above the group's");
    r.dispatch.max_tokens = 1;
    BAD("recv_x", "outputs of another M");
    r.dispatch.num_workers = -1;
    BAD("num_workers is -1", "workers");
    r.dispatch.handle = NULL;
    BAD("handle is NULL", "no handle");
    r.dispatch.recv_topk_ids = r.dispatch.recv_source;
    BAD("recv_topk_ids: expanded output has none", "ids of rows at experts");
    r.dispatch.num_experts = s->c.num_experts + 1;
    BAD("ep_ll_dispatch_args.num_experts", "more experts than the group has");
    t = r.t[LL_HANDLE];
    t.shape[0]--;
    r.dispatch.handle = &t;
    BAD("handle", "a handle that is too small");
    t = r.t[LL_HANDLE];
    t.data = (uint8_t *)t.data + 1;
    r.dispatch.handle = &t;
    BAD("handle", "a handle that is not aligned");
    t = *good.x;
    t.dtype = EP_F16;
    r.dispatch.x = &t;
    BAD("recv_x.dtype is EP_BF16, must be EP_F16", "rows of another type");
    r.dispatch.flags = EP_LL_FP8;
    r.dispatch.x = &t;
    BAD("x|EP_BF16", "a cast of another type");
    r.dispatch.flags = EP_LL_FP8;
    BAD("recv_x.dtype is EP_BF16, must be EP_F8E4M3", "a cast into other rows");
    t = *good.x;
    t.shape[1] = 192;
    r.dispatch.flags = EP_LL_FP8;
    r.dispatch.x = &t;
    t.stride[0] = 192;
    {
        struct ep_tensor y = r.t[LL_X];
        y.dtype = EP_F8E4M3;
        y.shape[1] = 192;
        r.dispatch.recv_x = &y;
        BAD("192", "half a group of channels");
    }
    r.dispatch.scales = good.topk_weights;
    BAD("max_scale_bytes", "scales that the group has no memory for");
    r.dispatch.flags = EP_LL_FP8;
    r.dispatch.scales = good.topk_weights;
    BAD("makes its own", "scales with a cast");
    r.dispatch.recv_x = NULL;
    BAD("recv_x is NULL", "no output");
    t = r.t[LL_X];
    t.data = good.x->data;
    r.dispatch.recv_x = &t;
    BAD("overlaps", "output over input");
    r.dispatch.recv_scales = &r.t[LL_SCALES];
    BAD("recv_scales", "scales of rows that are not cast");
#undef BAD
    r.combine.flags = 1;
    arg(w, ll_combine(&r, CALL_BOTH, NULL), "flags", "flags of combine");
    r.combine.flags = EP_LL_COMPACT;
    r.combine.topk_weights = &s->now[w->rank];
    arg(w, ll_combine(&r, CALL_BOTH, NULL), "topk_weights is given|summed already",
        "weights of rows that are summed");
    r.combine.topk_weights = NULL;
    r.combine.flags = EP_LL_EXACT;
    arg(w, ll_combine(&r, CALL_BOTH, NULL), "EP_GROUP_LL_EXACT", "a group without that memory");
    r.combine = good_combine;
    {
        struct ep_tensor x = r.answers, y = r.t[LL_Y];
        x.shape[1] = y.shape[1] = 200;
        r.combine.flags = EP_LL_LOGFMT;
        r.combine.x = &x;
        r.combine.out = &y;
        arg(w, ll_combine(&r, CALL_BOTH, NULL), "200 channels|EP_LL_LOGFMT|128",
            "LogFMT of part of a division");
    }
    r.combine = good_combine;
    r.combine.out = NULL;
    arg(w, ll_combine(&r, CALL_BOTH, NULL), "out is NULL", "no output of combine");
    r.combine = good_combine;
    t = s->now[w->rank];
    t.shape[0]--;
    r.combine.topk_weights = &t;
    arg(w, ll_combine(&r, CALL_BOTH, NULL), "shape[0]", "weights of fewer tokens");
    t = s->now[w->rank];
    t.shape[1]--;
    world_is(w, ll_dispatch(&r, CALL_BOTH, NULL), EP_OK, "dispatch");
    world_fails(w, ll_combine(&r, CALL_BOTH, NULL), EP_ERR_STATE, "no dispatch of this shape",
                "weights of fewer selections");
    r.combine = good_combine;
    ll_pass(&r, false);
    ll_destroy(&r);
}

static void no_mode(struct world *w) {
    struct ep_ll_dispatch_args d = EP_LL_DISPATCH_ARGS_INIT;
    struct ep_ll_combine_args c = EP_LL_COMBINE_ARGS_INIT;

    world_fails(w, ep_ll_dispatch(w->group, &d, NULL), EP_ERR_UNSUPPORTED, "ll_max_tokens 0",
                "dispatch");
    world_fails(w, ep_ll_combine_recv(w->group, &c, NULL), EP_ERR_UNSUPPORTED,
                "ll_max_tokens 0", "combine");
    world_is(w, ep_ll_status(w->group), EP_OK, "ep_ll_status");
    world_is(w, ep_ll_dispatch(NULL, &d, NULL), EP_ERR_ARG, "no group");
    world_is(w, ep_ll_dispatch(w->group, NULL, NULL), EP_ERR_ARG, "no arguments");
    world_is(w, ep_ll_status(NULL), EP_ERR_ARG, "no group");
}

/* ---- ranks that differ ---------------------------------------------------------------------- */

enum difference {
    TOPK,
    MAX_TOKENS,
    HIDDEN,
    WEIGHTS,
    CAST,
    POWER_OF_2,
    TYPE,
    SCALES,
    EXPERTS,
    COMPACT,
    WEIGHTS_NOW,
    EXACT,
    LOGFMT,
    NUM_DIFFERENCES
};
static const char *const difference_words[] = {
    "top-k is",       "max_tokens is",    "bytes of a row",        "weights are",
    "EP_LL_FP8 is|",  "POWER_OF_2 is",    "rows are of type EP_|", "scales of a row are",
    "num_experts is", "EP_LL_COMPACT is", "weights are",           "EP_LL_EXACT is",
    "EP_LL_LOGFMT is"};

struct odd {
    struct ll_step s[2]; /* of rank 0 and of rank 1 */
    enum difference what;
};

static void differ(struct world *w) {
    const struct odd *o = w->ctx;
    struct ll_run r;
    struct ep_fault fault = EP_FAULT_INIT;

    const bool combine = o->what >= WEIGHTS_NOW;

    ll_create(&r, w, &o->s[w->rank]);
    if (combine) {
        world_is(w, ll_dispatch(&r, CALL_BOTH, NULL), EP_OK, "dispatch");
    }
    const ep_status st =
        combine ? ll_combine(&r, CALL_BOTH, NULL) : ll_dispatch(&r, CALL_BOTH, NULL);
    world_is(w, ep_group_fault(w->group, &fault), EP_OK, "ep_group_fault");
    /* Whoever is second may hear of the first one's fault before it has compared anything. */
    const bool noticed = fault.reporter == w->rank;
    world_fails(w, st, EP_ERR_MISMATCH,
                noticed ? difference_words[o->what] : "ended the group: EP_ERR_MISMATCH", "it");
    world_check(w,
                fault.operation == (combine ? EP_OP_LL_COMBINE : EP_OP_LL_DISPATCH) &&
                    fault.rank == (noticed ? 1 - w->rank : w->rank),
                "operation %d, rank %d: %s", fault.operation, fault.rank, fault.message);
    world_check(w,
                !noticed || strstr(fault.message, "ranks 0 and 1") ||
                    strstr(fault.message, "ranks 1 and 0"),
                "both are named: %s", fault.message);
    world_is(w, ll_dispatch(&r, CALL_BOTH, NULL), EP_ERR_FAULTED, "after it");
    ll_destroy(&r);
}

static void differences(uint64_t seed) {
    for (int i = 0; i < NUM_DIFFERENCES; i++) {
        struct world_setup w;
        struct odd o = {.what = (enum difference)i};
        for (int r = 0; r < 2; r++) {
            struct ll_step *s = &o.s[r];
            ll_init(s, RANKS, seed);
            s->c.topk = i == TOPK && r ? 2 : 4;
            s->c.hidden = i == HIDDEN && r ? 128 : 256;
            s->max_tokens += i == MAX_TOKENS && r;
            s->c.weights = !(i == WEIGHTS && r);
            s->c.row_dtype = i == TYPE && r ? EP_F16 : EP_BF16;
            s->c.scale_dtype = EP_U8;
            s->c.num_scales = i == SCALES ? 4 - r : 0;
            s->weights_now = i == WEIGHTS_NOW && r;
            s->exact = i == EXACT && !r;
            s->logfmt = i == LOGFMT && r;
            s->named_experts = i == EXPERTS;
            s->c.num_experts -= i == EXPERTS && r;
            s->flags = i == CAST         ? (r ? EP_LL_FP8 : 0)
                       : i == POWER_OF_2 ? EP_LL_FP8 | (r ? EP_LL_SCALES_POWER_OF_2 : 0)
                                         : 0;
            s->flags |= i == COMPACT && r ? EP_LL_COMPACT : 0;
            ll_build(s);
        }
        ll_setup(&w, &o.s[0]);
        w.config.ll_max_tokens++;
        w.body = differ;
        w.ctx = &o;
        ok(world_run(&w) == 0, "ranks differ: %s", difference_words[i]);
        ll_free(&o.s[0]);
        ll_free(&o.s[1]);
    }
}

/* ---- a rank that does not come -------------------------------------------------------------- */

/* No rows, whatever was there before. */
static void empty(struct ll_run *r, const char *what) {
    for (int i = LL_COUNTS; i <= LL_RANGES; i++) {
        for (size_t b = 0; b < r->bytes[i]; b++) {
            if (!world_check(r->w, r->got[i][b] == 0, "%s: byte %zu of %s is %u, must be 0",
                             what, b, i == LL_COUNTS ? "expert_counts" : "ranges",
                             r->got[i][b])) {
                break;
            }
        }
    }
}

static void late(struct world *w) {
    struct ll_run r, behind;
    struct ep_fault fault = EP_FAULT_INIT;
    void *stream = NULL;

    ll_create(&r, w, w->ctx);
    ll_create(&behind, w, w->ctx);
    world_is(w, call_stream_create(&stream, w->group), EP_OK, "a stream");
    if (w->rank == 0) {
        world_is(w, ll_dispatch(&r, CALL_BOTH, stream), EP_OK, "dispatch without rank 1");
        world_is(w, ll_dispatch(&behind, CALL_BOTH, stream), EP_OK, "another behind it");
        world_fails(w, call_stream_sync(w->group, stream), EP_ERR_TIMEOUT,
                    "rank 1|low-latency dispatch|counts", "dispatch without rank 1");
        ep_group_fault(w->group, &fault);
        world_check(w,
                    fault.status == EP_ERR_TIMEOUT && fault.rank == 1 &&
                        strcmp(fault.phase, "counts") == 0,
                    "fault %d, rank %d, phase %s", fault.status, fault.rank, fault.phase);
        empty(&r, "what timed out");
        empty(&behind, "what was queued behind it");
    }
    world_barrier(w);
    if (w->rank == 1) {
        world_check(w, ll_dispatch(&r, CALL_BOTH, NULL) != EP_OK, "dispatch of who was late");
    }
    call_stream_destroy(w->group, &stream);
    ll_destroy(&behind);
    ll_destroy(&r);
}

/* The send half of a combine ends without weights that it was to get. */
static void late_weights(struct world *w) {
    struct ll_run r;
    struct ep_fault fault = EP_FAULT_INIT;

    ll_create(&r, w, w->ctx);
    r.combine.topk_weights = &r.s->now[w->rank];
    world_is(w, ll_dispatch(&r, CALL_BOTH, NULL), EP_OK, "dispatch");
    if (w->rank == 0) {
        world_fails(w, ll_combine(&r, CALL_SEND, NULL), EP_ERR_TIMEOUT, "rank 1|weights",
                    "combine without rank 1");
        ep_group_fault(w->group, &fault);
        world_check(w, fault.rank == 1 && strcmp(fault.phase, "weights") == 0,
                    "rank %d, phase %s", fault.rank, fault.phase);
    }
    world_barrier(w);
    ll_destroy(&r);
}

/* It has sent all, and left: whoever is still receiving gets it. */
static void leaves(struct world *w) {
    struct ll_run r;

    ll_create(&r, w, w->ctx);
    world_is(w, ll_dispatch(&r, CALL_SEND, NULL), EP_OK, "send");
    if (w->rank == 0) {
        tap_sleep_ms(50); /* rank 1 is in ep_group_destroy */
        world_is(w, ll_dispatch(&r, CALL_RECV, NULL), EP_OK, "receive");
        ll_check_dispatch(&r);
    }
    ll_destroy(&r);
}

/* It leaves without having sent. A combine is queued behind the dispatch that finds this out, of a handle
 * that holds anything. */
static void quits(struct world *w) {
    struct ll_run r;
    void *stream;

    ll_create(&r, w, w->ctx);
    if (w->rank == 0 && world_is(w, call_stream_create(&stream, w->group), EP_OK, "stream")) {
        world_is(w, ll_dispatch(&r, CALL_BOTH, stream), EP_OK, "dispatch");
        const ep_status queued = ll_combine(&r, CALL_BOTH, stream);
        const ep_status found = call_stream_sync(w->group, stream);
        world_check(w, found == EP_ERR_PEER || queued == EP_ERR_PEER, "%s, %s",
                    ep_status_string(queued), ep_status_string(found));
        call_stream_destroy(w->group, &stream);
    } else {
        tap_sleep_ms(50);
    }
    ll_destroy(&r);
}

static void run(struct ll_step *s, void (*body)(struct world *), const char *name) {
    struct world_setup w;

    ll_setup(&w, s);
    w.config.timeout_ms = 500 * rig_scale();
    w.config.ll_max_tokens = body == no_mode ? 0 : w.config.ll_max_tokens;
    w.body = body;
    w.ctx = s;
    ok(world_run(&w) == 0, "%s", name);
}

int main(void) {
    gpu_program();
    struct ll_step s;
    const uint64_t seed = tap_seed();

    tap_deadline(120);
    tap_expect_log("it is alive but late");
    ll_init(&s, RANKS, seed);
    s.c.tokens = TOKENS_MAX;
    ll_build(&s);
    run(&s, arguments, "arguments");
    run(&s, no_mode, "a group without low-latency mode");
    run(&s, late, "a rank that does not come");
    run(&s, late_weights, "weights of a rank that does not come");
    run(&s, leaves, "a rank that has sent all and left");
    run(&s, quits, "a rank that has left without sending");
    ll_free(&s);
    differences(seed + 1);
    return done_testing();
}
