/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * EP_ARENA=host: the arenas of a CUDA group lie in pinned host memory, for devices that cannot
 * reach each other's. The results are those of the reference, as with arenas on the devices.
 */
#include <stdio.h>
#include <stdlib.h>

#include "src/cu/driver.h"
#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/trial.h"

#define MEMORY_TYPE 2 /* CU_POINTER_ATTRIBUTE_MEMORY_TYPE */
#define MEMORY_HOST 1u

/* Where the arena is, from a view of it. */
static void check_place(struct world *w, ep_handle *handle, const struct trial *t) {
    struct gpu *gpu = call_gpu(w->group);
    int (*ask)(void *, int, uint64_t);
    struct ep_tensor view = EP_TENSOR_INIT;
    unsigned type = 0;

    *(void **)&ask = gpu_symbol("cuPointerGetAttribute");
    world_is(w, ep_handle_arena(handle, 0, (ep_dtype)t->c->row_dtype, t->c->hidden, &view),
             EP_OK, "ep_handle_arena");
    if (world_is(w, epi_cu_enter(&gpu->device), EP_OK, "the device's context")) {
        world_is(w,
                 epi_cu_result(ask(&type, MEMORY_TYPE, (uint64_t)(uintptr_t)view.data),
                               "cuPointerGetAttribute"),
                 EP_OK, "cuPointerGetAttribute");
        epi_cu_leave();
    }
    world_check(w, type == MEMORY_HOST, "the arena is memory of type %u", type);
}

static void body(struct world *w) {
    const struct trial *t = w->ctx;
    ep_handle *handle = NULL;

    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "ep_handle_create");
    for (int i = 0; i < 3; i++) {
        trial_pass(w, t, handle);
    }
    check_place(w, handle, t);
    ep_handle_destroy(&handle);
}

static void run(uint64_t seed, const struct form *form, bool processes, const char *name) {
    struct test_case c;

    case_default(&c, 4, seed);
    c.max_tokens = 100;
    c.num_scales = 5;
    c.scale_dtype = EP_F32;
    c.row_dtype = EP_F8E4M3;
    c.hidden = 1040;
    trial_with(&c, form, body, processes, name);
}

int main(void) {
    static const struct form compact = {.id_dtype = EP_I64, .num_bias = 1};
    static const struct form expanded = {
        .id_dtype = EP_I64, .expanded = true, .alignment = 8, .weighted = true};
    static const struct form view = {.id_dtype = EP_I64, .arena = true};
    static const struct form two_step = {.id_dtype = EP_I64, .two_step = true};
    setenv("EP_ARENA", "host", 1);
    gpu_only();
    uint64_t seed = tap_seed();

    tap_deadline(120);
    for (int processes = 0; processes < gpu_ways(); processes++) {
        run(seed, &compact, processes, "compact");
        run(seed + 1, &expanded, processes, "expanded");
        run(seed + 2, &view, processes, "a view of the arena");
        run(seed + 3, &two_step, processes, "in two steps");
    }
    return done_testing();
}
