/* SPDX-License-Identifier: MIT */
/* class: exclusive */
/*
 * Many ranks as threads: 64 at full function, 1024 with 8 tokens each, 256 in low-latency mode; under
 * sanitizers, to which threads are what costs most, 256 and 16. On one GPU ranks share its SMs: 8 of
 * them. Prints the memory that the plan asks for and the largest that
 * the process had.
 */
#include <stdio.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/ll.h"
#include "tests/tap.h"
#include "tests/trial.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define MANY 256
#define LL_MANY 16
#else
#define MANY EP_MAX_RANKS
#define LL_MANY 256
#endif

static long peak_mib(void) {
    FILE *f = fopen("/proc/self/status", "r");
    char line[256];
    long kib = 0;

    while (f && fgets(line, sizeof(line), f)) {
        sscanf(line, "VmHWM: %ld", &kib);
    }
    if (f) {
        fclose(f);
    }
    return kib / 1024;
}

static void tune(struct ep_group_config *config, int rank, void *ctx) {
    (void)rank;
    (void)ctx;
    config->num_workers = 1;
    config->timeout_ms = 600000;
}

static void run(struct test_case *c, uint64_t form_seed, bool plain, const char *name) {
    struct trial t;
    struct world_setup s;
    struct ep_plan_info info = EP_PLAN_INFO_INIT;
    struct ep_group_config config;
    double start;

    case_build(c);
    trial_init(&t, c);
    if (!plain) {
        trial_random(&t, form_seed);
    }
    for (int r = 0; r < c->num_ranks; r++) {
        t.form[r].num_workers = 0;
    }
    t.hidden = 16;
    trial_build(&t);
    trial_setup(&s, &t);
    s.tune = tune;
    config = s.config;
    config.num_ranks = s.num_ranks;
    ok(ep_plan(&config, &info) == EP_OK, "%s: ep_plan", name);
    diag("%s: %d arenas of %.1f KiB, %.1f KiB of each rank's own, %.1f KiB per handle", name,
         s.num_ranks, (double)info.arena_bytes / 1024, (double)info.local_bytes / 1024,
         (double)info.handle_bytes / 1024);
    start = tap_now();
    ok(world_run(&s) == 0, "%s", name);
    diag("%s: %.1f s, at most %ld MiB", name, tap_now() - start, peak_mib());
    trial_free(&t);
    case_free(c);
}

int main(void) {
    gpu_program();
    const int some = gpu_wanted() ? 8 : 64;
    uint64_t seed = tap_seed();
    struct test_case c;
    char name[32];
    double start;

    tap_deadline(300);
    tap_expect_log("alive but late"); /* ranks outnumber cores by far: 10 s may well pass */
    for (int i = 0; i < 3; i++) {
        case_default(&c, some, seed + (uint64_t)i);
        c.num_experts = 4 * some;
        c.topk = 8;
        c.max_tokens = 32;
        c.map = i == 1 ? MAP_EMPTY_RANK : MAP_EVEN;
        c.routing = i == 2 ? ROUTE_GROUPS : ROUTE_UNIFORM;
        c.num_scales = 4;
        c.scale_dtype = EP_F32;
        snprintf(name, sizeof(name), "%d ranks", some);
        run(&c, seed + 10 + (uint64_t)i, i == 0, name);
    }
    if (gpu_wanted()) {
        skip(2, "host groups only: %d ranks", MANY);
        return done_testing();
    }
    if (tap_quick()) {
        return done_testing();
    }
    case_default(&c, MANY, seed + 4);
    c.num_experts = MANY;
    c.topk = 8;
    c.max_tokens = 8;
    c.hidden = 16;
    snprintf(name, sizeof(name), "%d ranks", MANY);
    run(&c, seed + 20, true, name);
    struct ll_step l;
    ll_init(&l, LL_MANY, seed + 2);
    l.c.num_experts = LL_MANY;
    l.c.max_tokens = l.max_tokens = 8;
    snprintf(name, sizeof(name), "%d ranks, low latency", LL_MANY);
    start = tap_now();
    ll_case(&l, false, name);
    diag("%s: %.1f s, at most %ld MiB", name, tap_now() - start, peak_mib());
    return done_testing();
}
