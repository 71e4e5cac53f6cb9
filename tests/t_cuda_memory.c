/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * EP_ARENA=host: the arenas of a CUDA group lie in pinned host memory, for devices that cannot
 * reach each other's. The results are those of the reference, as with arenas on the devices. And what a
 * driver refuses of memory that is mapped piece by piece, be it a GPU's or the one for tests.
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

/* Piece by piece at reserved addresses; what cannot be is refused, and changes nothing. */
static int pieces(int rank, void *ctx) {
    struct gpu *gpu = gpu_open(gpu_index(rank), false);
    const struct epi_cu_device *d = &gpu->device;
    const struct cu_driver *cu = &epi_cu_driver;
    struct epi_cu_memory all, a, b;
    size_t page = 0;
    char bytes[4] = "";

    (void)ctx;
    gpu_must(epi_cu_memory_reserve(d, 3, &all, &page), "addresses");
    ok(all.bytes == page, "whole pages");
    epi_cu_memory_release(d, &all);
    gpu_must(epi_cu_memory_reserve(d, 3 * page, &all, &page), "addresses");
    gpu_must(epi_cu_memory_create(d, all.address, page, &a), "a piece");
    gpu_must(epi_cu_memory_create(d, all.address + page, page, &b), "another");
    gpu_must(epi_cu_enter(d), "the device's context");
    ok(cu->MemMap(all.address + page, page, 0, a.handle, 0) != 0, "where another is");
    ok(cu->MemMap(all.address + 2 * page, page, page, a.handle, 0) != 0, "from its middle on");
    ok(cu->MemMap(all.address + 2 * page, 2 * page, 0, a.handle, 0) != 0, "more than there is");
    ok(cu->MemMap(all.address + 2 * page, page / 2, 0, a.handle, 0) != 0, "half a page");
    ok(cu->MemUnmap(all.address, page / 2) != 0, "half of a mapping");
    ok(cu->MemAddressFree(all.address, page) != 0, "a part of what is reserved");
    epi_cu_leave();
    gpu_must(epi_cu_fill(d, gpu->stream, all.address + page - 2, 7, 4), "over both pieces");
    gpu_must(epi_cu_copy_out(d, gpu->stream, bytes, all.address + page - 2, 4), "and back");
    ok(bytes[0] == 7 && bytes[3] == 7, "pieces side by side are as one");
    epi_cu_memory_release(d, &a);
    gpu_must(epi_cu_memory_create(d, all.address, page, &a), "a piece where one was");
    gpu_must(epi_cu_copy_out(d, gpu->stream, bytes, all.address + page - 2, 4), "read");
    ok(bytes[0] == 0 && bytes[3] == 7, "is zeros, and the other is what it was");
    epi_cu_memory_release(d, &a);
    epi_cu_memory_release(d, &b);
    epi_cu_memory_release(d, &all);
    gpu_close(&gpu);
    return 0;
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
    ok(gpu_run_ranks(1, gpu_processes(false), pieces, NULL, 60) == 0,
       "pieces at reserved addresses");
    for (int processes = 0; processes < gpu_ways(); processes++) {
        run(seed, &compact, processes, "compact");
        run(seed + 1, &expanded, processes, "expanded");
        run(seed + 2, &view, processes, "a view of the arena");
        run(seed + 3, &two_step, processes, "in two steps");
    }
    return done_testing();
}
