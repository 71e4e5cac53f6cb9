/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Whose memory a tensor may be. A CUDA group refuses ordinary memory and that of another device,
 * in each argument, by name; a host group refuses device memory; pinned and managed memory will
 * do. One rank, so that a call that is refused leaves nobody waiting.
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/cu/driver.h"
#include "tests/calls.h"
#include "tests/stage.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define MANAGED_GLOBAL 1u

/* An argument that is a pointer to a tensor. */
struct place {
    const char *name;
    size_t at; /* of the pointer, in the arguments' struct */
};

#define IN(type, field)                                                                        \
    { #field, offsetof(struct type, field) }

static const struct place routing_places[] = {IN(ep_routing, topk_ids), {NULL, 0}};
static const struct place mask_places[] = {IN(ep_routing, token_in_rank), {NULL, 0}};
static const struct place layout_places[] = {
    IN(ep_layout, tokens_per_rank),   IN(ep_layout, tokens_per_node),
    IN(ep_layout, tokens_per_expert), IN(ep_layout, token_in_rank),
    IN(ep_layout, channel_prefix),    {NULL, 0}};
static const struct place dispatch_places[] = {IN(ep_dispatch_args, x),
                                               IN(ep_dispatch_args, scales),
                                               IN(ep_dispatch_args, topk_weights),
                                               IN(ep_dispatch_args, recv_x),
                                               IN(ep_dispatch_args, recv_scales),
                                               IN(ep_dispatch_args, recv_topk_ids),
                                               IN(ep_dispatch_args, recv_topk_weights),
                                               IN(ep_dispatch_args, recv_source),
                                               IN(ep_dispatch_args, expert_counts),
                                               IN(ep_dispatch_args, expert_offsets),
                                               IN(ep_dispatch_args, num_rows),
                                               IN(ep_dispatch_args, source_ends),
                                               IN(ep_dispatch_args, expert_ends),
                                               {NULL, 0}};
static const struct place combine_places[] = {IN(ep_combine_args, x),
                                              IN(ep_combine_args, weights),
                                              IN(ep_combine_args, topk_weights),
                                              IN(ep_combine_args, bias[0]),
                                              IN(ep_combine_args, bias[1]),
                                              IN(ep_combine_args, out),
                                              IN(ep_combine_args, out_topk_weights),
                                              {NULL, 0}};

/* All arguments of all calls. */
struct args {
    struct ep_routing r;
    struct ep_layout l;
    struct ep_dispatch_args d;
    struct ep_combine_args c;
};

struct layout_memory {
    int32_t per_rank[1], per_node[1], per_expert[64], prefix[64];
    uint8_t in_rank[1024];
    struct ep_tensor t[5];
};

static void set_layout(struct args *a, struct world *w, const struct test_case *c,
                       struct layout_memory *m) {
    struct ep_plan_info info = EP_PLAN_INFO_INIT;

    world_is(w, ep_group_plan(w->group, &info), EP_OK, "ep_group_plan");
    ep_tensor_1d(&m->t[0], EP_I32, m->per_rank, 1);
    ep_tensor_1d(&m->t[1], EP_I32, m->per_node, 1);
    ep_tensor_1d(&m->t[2], EP_I32, m->per_expert, c->num_experts);
    ep_tensor_2d(&m->t[3], EP_U8, m->in_rank, c->in[0].num_tokens, 1);
    ep_tensor_2d(&m->t[4], EP_I32, m->prefix, 1, info.num_channels);
    a->l = (struct ep_layout)EP_LAYOUT_INIT;
    a->l.tokens_per_rank = &m->t[0];
    a->l.tokens_per_node = &m->t[1];
    a->l.tokens_per_expert = c->mask ? NULL : &m->t[2];
    a->l.token_in_rank = &m->t[3];
    a->l.channel_prefix = &m->t[4];
}

/* The arguments with tensors of the run, in ordinary memory. */
static void set_args(struct args *a, struct run *r, struct layout_memory *m) {
    case_routing(r->t->c, 0, &a->r);
    a->d = r->dispatch;
    a->c = r->combine;
    set_layout(a, r->w, r->t->c, m);
}

/* Images of all of them, one stage for each call. */
static void stage_args(struct args *a, struct stage s[4], struct gpu *gpu, bool pinned) {
    for (int i = 0; i < 4; i++) {
        stage_begin(&s[i], gpu, 0, 0);
        s[i].pinned = pinned;
    }
    stage_routing(&s[0], &a->r);
    stage_layout(&s[1], &a->l);
    stage_dispatch(&s[2], &a->d);
    stage_combine(&s[3], &a->c);
    for (int i = 0; i < 4; i++) {
        stage_lay(&s[i]);
        stage_copy_in(&s[i]);
    }
}

static ep_status call(struct args *a, ep_handle *h, char which, void *stream) {
    return which == 'r'   ? ep_handle_route(h, &a->r, stream)
           : which == 'l' ? ep_handle_layout(h, &a->l, stream)
           : which == 'd' ? ep_dispatch(h, &a->d, stream)
           : which == 'b' ? ep_dispatch_begin(h, &a->d, stream)
                          : ep_combine(h, &a->c, stream);
}

static void *part(struct args *a, char which) {
    return which == 'r'   ? (void *)&a->r
           : which == 'l' ? (void *)&a->l
           : which == 'c' ? (void *)&a->c
                          : (void *)&a->d;
}

/* Each argument of a call in turn comes from `wrong`, the others from `right`. */
static void each(struct world *w, const struct args *right, struct args *wrong, ep_handle *h,
                 char which, const struct place *places) {
    struct gpu *gpu = call_gpu(w->group);

    for (int i = 0; places[i].name; i++) {
        struct args a = *right;
        char words[64], what[64];
        char *to = (char *)part(&a, which) + places[i].at;
        const char *from = (const char *)part(wrong, which) + places[i].at;
        struct ep_tensor *t;
        memcpy(&t, from, sizeof(t));
        if (!t || (which == 'b' && i > 2)) { /* begin looks at the inputs only */
            continue;
        }
        memcpy(to, from, sizeof(t));
        snprintf(words, sizeof(words), "%s.data", places[i].name);
        snprintf(what, sizeof(what), "%c: %s", which, places[i].name);
        world_fails(w, call(&a, h, which, gpu ? gpu->stream : NULL), EP_ERR_ARG, words, what);
    }
}

static void all_calls(struct world *w, const struct trial *t, const struct args *right,
                      struct args *wrong) {
    struct gpu *gpu = call_gpu(w->group);
    void *stream = gpu ? gpu->stream : NULL;
    struct args a = *right;
    ep_handle *h = NULL;

    world_is(w, ep_handle_create(&h, w->group, NULL), EP_OK, "ep_handle_create");
    each(w, right, wrong, h, 'r', t->c->mask ? mask_places : routing_places);
    world_is(w, call(&a, h, 'r', stream), EP_OK, "route");
    each(w, right, wrong, h, 'l', layout_places);
    each(w, right, wrong, h, 'd', dispatch_places);
    each(w, right, wrong, h, 'b', dispatch_places);
    world_is(w, call(&a, h, 'd', stream), EP_OK, "dispatch");
    each(w, right, wrong, h, 'c', combine_places);
    world_is(w, call(&a, h, 'c', stream), EP_OK, "combine");
    if (gpu) {
        world_is(w, epi_cu_stream_sync(&gpu->device, stream), EP_OK, "waiting");
    }
    ep_handle_destroy(&h);
}

/* The right calls alone; what they give is compared. */
static void pass(struct world *w, struct run *r, struct args *a, struct stage s[4]) {
    struct gpu *gpu = call_gpu(w->group);
    static const char order[] = "rldc";
    ep_handle *h = NULL;

    world_is(w, ep_handle_create(&h, w->group, NULL), EP_OK, "ep_handle_create");
    for (int i = 0; i < 4; i++) {
        world_is(w, call(a, h, order[i], gpu->stream), EP_OK, "a call");
        stage_copy_out(&s[i], gpu->stream);
    }
    world_is(w, epi_cu_stream_sync(&gpu->device, gpu->stream), EP_OK, "waiting");
    world_is(w, call_found(h), EP_OK, "what was found");
    for (int i = 0; i < 4; i++) {
        world_is(w, stage_check(&s[i]), EP_OK, "what was written");
    }
    run_check_dispatch(r, h);
    run_check_combine(r);
    ep_handle_destroy(&h);
}

/* Rows from managed memory, which the host writes directly. */
static void managed(struct world *w, struct run *r, struct args *a, struct stage s[4]) {
    struct gpu *gpu = call_gpu(w->group);
    int (*alloc)(uint64_t *, size_t, unsigned);
    int (*release)(uint64_t);
    const struct ep_tensor *staged = a->d.x;
    struct ep_tensor x = *r->dispatch.x;
    const size_t bytes = (size_t)x.shape[0] * r->t->c->problem.row_bytes;
    uint64_t at = 0;

    *(void **)&alloc = gpu_symbol("cuMemAllocManaged");
    *(void **)&release = gpu_symbol("cuMemFree_v2");
    world_is(w, epi_cu_enter(&gpu->device), EP_OK, "the device's context");
    world_is(w, epi_cu_result(alloc(&at, bytes, MANAGED_GLOBAL), "cuMemAllocManaged"), EP_OK,
             "managed memory");
    memcpy((void *)(uintptr_t)at, x.data, bytes);
    x.data = (void *)(uintptr_t)at;
    a->d.x = &x;
    for (int i = 0; i < 4; i++) {
        stage_copy_in(&s[i]);
    }
    pass(w, r, a, s);
    a->d.x = staged;
    release(at);
    epi_cu_leave();
}

static void of_another_device(struct world *w, const struct trial *t, const struct args *right,
                              struct args *wrong) {
    const int own = call_gpu(w->group)->device.index;
    struct stage s[4];

    if (epi_cu_num_devices() < 2) {
        skip(1, "one device: no memory of another one");
        return;
    }
    struct gpu *other = gpu_open(own == 0 ? 1 : 0, true);
    stage_args(wrong, s, other, false);
    all_calls(w, t, right, wrong);
    for (int i = 0; i < 4; i++) {
        stage_end(&s[i]);
    }
    gpu_close(&other);
    ok(w->bad == 0, "memory of another device is refused");
}

static void on_device(struct world *w) {
    const struct trial *t = w->ctx;
    struct gpu *gpu = call_gpu(w->group);
    struct layout_memory m;
    struct args host, wrong, staged;
    struct stage s[4];
    struct run r;

    run_create(&r, w, t);
    set_args(&host, &r, &m);
    staged = wrong = host;
    stage_args(&staged, s, gpu, false);
    all_calls(w, t, &staged, &host);
    ok(w->bad == 0, "ordinary memory is refused");
    for (int i = 0; i < 4; i++) {
        run_poison(&r, OUT_X, OUT_Y_TOPK);
        stage_copy_in(&s[i]);
    }
    pass(w, &r, &staged, s);
    ok(w->bad == 0, "device memory");
    if (!t->c->mask) {
        run_poison(&r, OUT_X, OUT_Y_TOPK);
        managed(w, &r, &staged, s);
        ok(w->bad == 0, "managed memory");
    }
    of_another_device(w, t, &staged, &wrong);
    for (int i = 0; i < 4; i++) {
        stage_end(&s[i]);
    }
    run_poison(&r, OUT_X, OUT_Y_TOPK);
    stage_args(&host, s, gpu, true);
    pass(w, &r, &host, s);
    ok(w->bad == 0, "pinned memory");
    for (int i = 0; i < 4; i++) {
        stage_end(&s[i]);
    }
    run_free(&r);
}

static void on_host(struct world *w) {
    const struct trial *t = w->ctx;
    struct gpu *gpu = gpu_open(gpu_index(0), true);
    struct layout_memory m;
    struct args host, staged;
    struct stage s[4];
    struct run r;

    run_create(&r, w, t);
    set_args(&host, &r, &m);
    staged = host;
    stage_args(&staged, s, gpu, false);
    all_calls(w, t, &host, &staged);
    ok(w->bad == 0, "a host group refuses device memory");
    for (int i = 0; i < 4; i++) {
        stage_end(&s[i]);
    }
    run_free(&r);
    gpu_close(&gpu);
}

static void run(uint64_t seed, const struct form *form, bool mask, const char *name) {
    struct test_case c;
    struct trial t;
    struct world_setup s;

    case_default(&c, 1, seed);
    c.tokens = TOKENS_MAX;
    c.mask = mask;
    c.topk = mask ? 0 : c.topk;
    c.weights = !mask;
    c.num_scales = 4;
    c.scale_dtype = EP_F32;
    case_build(&c);
    trial_init(&t, &c);
    trial_form(&t, form);
    trial_build(&t);
    trial_setup(&s, &t);
    s.body = on_device;
    ok(world_run(&s) == 0, "a CUDA group, %s", name);
    s.body = on_host;
    s.host = true;
    ok(world_run(&s) == 0, "a host group, %s", name);
    trial_free(&t);
    case_free(&c);
}

int main(void) {
    setenv("EP_TEST_RANKS", "threads", 1); /* one rank, in this process */
    gpu_only();
    static const struct form compact = {.id_dtype = EP_I64, .weighted = true, .num_bias = 2};
    static const struct form expanded = {
        .id_dtype = EP_I64, .expanded = true, .zero_gaps = true, .alignment = 4};
    uint64_t seed = tap_seed();

    tap_deadline(120);
    run(seed, &compact, false, "compact");
    run(seed + 1, &expanded, false, "expanded");
    run(seed + 2, &compact, true, "by mask");
    return done_testing();
}
