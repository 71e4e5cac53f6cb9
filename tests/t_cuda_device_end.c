/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * A process that has made, used and destroyed many CUDA groups holds what it held before: the
 * device's memory is back, and no descriptor, thread or shared memory is left.
 */
#include <stdio.h>

#include "src/cu/driver.h"
#include "tests/calls.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define RANKS 2
#define GROUPS 20
#define WARM_GROUPS 2         /* what is made once and kept is there after them */
#define SLACK_BYTES (2 << 20) /* the driver's own, of one piece of its memory */

struct stage {
    struct rig_meeting meeting;
    atomic_int arrived;
};

static void meet(struct stage *s, int *meetings) {
    const int all = ++*meetings * RANKS;

    atomic_fetch_add(&s->arrived, 1);
    rig_await(&s->arrived, all);
}

static int64_t free_bytes(const struct gpu *gpu) {
    int (*info)(size_t *, size_t *);
    size_t left = 0, all = 0;

    *(void **)&info = gpu_symbol("cuMemGetInfo_v2");
    gpu_must(epi_cu_enter(&gpu->device), "the device's context");
    gpu_must(epi_cu_result(info(&left, &all), "cuMemGetInfo"), "cuMemGetInfo");
    epi_cu_leave();
    return (int64_t)left;
}

static void one_life(struct stage *s, int rank) {
    struct rig r;
    const ep_status st = rig_create(&r, &s->meeting, rank);

    if (ok(st == EP_OK, "create: %s (%s)", ep_status_string(st), ep_last_error())) {
        rig_pass(&r);
    }
    rig_destroy(&r);
}

/* What a process holds. */
struct holding {
    int64_t free_bytes;
    int fds;
    struct rig_footprint other;
};

static void look(const struct gpu *gpu, struct holding *h) {
    h->free_bytes = free_bytes(gpu);
    h->fds = tap_num_fds();
    h->other = rig_footprint();
}

static void compare(const struct gpu *gpu, const struct holding *was) {
    const int64_t left = free_bytes(gpu);
    const int fds = tap_num_fds();

    ok(left >= was->free_bytes - SLACK_BYTES, "of %lld free bytes %lld are left",
       (long long)was->free_bytes, (long long)left);
    ok(fds == was->fds, "descriptors %d -> %d", was->fds, fds);
    ok(rig_same_footprint(was->other), "nothing is left");
}

/* All ranks are in a meeting while the process is looked at. */
static int rank_main(int rank, void *ctx) {
    struct stage *s = ctx;
    const bool looks = rank == 0 || !s->meeting.world;
    struct gpu *gpu = gpu_open(gpu_index(rank), false);
    struct holding was = {0};
    int meetings = 0;

    rig_warm(rank);
    for (int n = 0; n <= WARM_GROUPS + GROUPS; n++) {
        if (n == WARM_GROUPS || n == WARM_GROUPS + GROUPS) {
            meet(s, &meetings);
            if (looks && n == WARM_GROUPS) {
                look(gpu, &was);
            } else if (looks) {
                compare(gpu, &was);
            }
            meet(s, &meetings);
        }
        if (n < WARM_GROUPS + GROUPS) {
            one_life(s, rank);
        }
    }
    gpu_close(&gpu);
    return 0;
}

static void run(bool processes) {
    struct stage *s = tap_shared(sizeof(*s));
    const char *kind = processes ? "processes" : "threads";
    bool skipped;

    s->meeting = (struct rig_meeting){RANKS, tap_free_port(), NULL, 30000 * rig_scale()};
    if (!processes && !ok(ep_world_create(&s->meeting.world, RANKS) == EP_OK, "a world")) {
        return;
    }
    const int failed = rig_run(RANKS, processes, rank_main, s, &skipped);
    if (skipped) {
        skip(1, "no ranks are %s in this run", kind);
    } else {
        ok(failed == 0, "%d groups, %s", GROUPS, kind);
    }
    ep_world_destroy(&s->meeting.world);
}

int main(void) {
    gpu_only();

    tap_deadline(180);
    run(false);
    run(true);
    return done_testing();
}
