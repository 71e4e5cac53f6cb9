/* SPDX-License-Identifier: MIT */
/*
 * Ranks for tests, declared in world.h: the way they meet, their life and their checks. Ranks
 * are threads with an ep_world, or processes that meet at an address of this host. Groups are
 * CUDA groups where gpu.h says so.
 */
#include "tests/world.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/calls.h"
#include "tests/tap.h"

#define RANK_SECONDS 240

/* Ranks that have come to a barrier so far; of the group that runs now, in shared memory. */
static atomic_int *arrived;

struct meeting {
    const struct world_setup *setup;
    ep_world *world; /* threads */
    char address[32];
};

bool world_check(struct world *w, bool good, const char *fmt, ...) {
    char text[1024];
    va_list args;

    if (!good) {
        va_start(args, fmt);
        vsnprintf(text, sizeof(text), fmt, args);
        va_end(args);
        if (w->bad++ < 10) {
            diag("rank %d of %d: %s", w->rank, w->num_ranks, text);
        }
    }
    return good;
}

bool world_is(struct world *w, ep_status got, ep_status want, const char *what) {
    const bool good = got == want;

    world_check(w, good, "%s: %s instead of %s (%s)", what, ep_status_string(got),
                ep_status_string(want), ep_last_error());
    if (!good && want == EP_OK && w->group) {
        ep_group_abort(w->group);
    }
    return good;
}

bool world_fails(struct world *w, ep_status got, ep_status want, const char *words,
                 const char *what) {
    char message[512], list[256], *save = NULL;
    bool good;

    snprintf(message, sizeof(message), "%s", ep_last_error());
    snprintf(list, sizeof(list), "%s", words);
    good = world_is(w, got, want, what);
    for (char *word = strtok_r(list, "|", &save); good && word;
         word = strtok_r(NULL, "|", &save)) {
        good = world_check(w, strstr(message, word) != NULL, "%s: no \"%s\" in \"%s\"", what,
                           word, message);
    }
    return good;
}

bool world_nodes(int num_ranks, char *sizes, size_t bytes, int32_t *node) {
    const char *wanted = getenv("EP_TEST_NODES");
    const int nodes = wanted ? atoi(wanted) : 1;
    size_t at = 0;

    for (int first = 0, i = nodes; nodes > 1 && first < num_ranks && i > 0; i--) {
        const int left = num_ranks - first, size = i == 1 ? left : (left + 1) / 2;
        at += (size_t)snprintf(sizes + at, bytes - at, "%s%d", first ? "," : "", size);
        for (int r = first; r < first + size; r++) {
            node[r] = nodes - i;
        }
        first += size;
    }
    return at > 0;
}

void world_barrier(struct world *w) {
    const int all = ++w->barriers * w->num_ranks;

    atomic_fetch_add(arrived, 1);
    while (atomic_load(arrived) < all) {
        tap_sleep_ms(1);
    }
}

void world_defaults(struct world_setup *s, int num_ranks) {
    const char *scale = getenv("TAP_TIMEOUT_SCALE");
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;

    config.num_experts = 4 * num_ranks;
    config.max_tokens = 16;
    config.max_topk = 4;
    config.max_row_bytes = 256;
    config.timeout_ms = 30000 * (scale && atoi(scale) > 0 ? atoi(scale) : 1);
    *s = (struct world_setup){.config = config, .num_ranks = num_ranks};
}

static int rank_main(int rank, void *arg) {
    const struct meeting *m = arg;
    const struct world_setup *s = m->setup;
    struct world w = {.rank = rank, .num_ranks = s->num_ranks, .ctx = s->ctx};
    struct ep_group_config config = s->config;
    ep_status st;

    config.rank = rank;
    config.num_ranks = s->num_ranks;
    config.world = m->world;
    config.address = m->world ? NULL : m->address;
    if (s->tune) {
        s->tune(&config, rank, s->ctx);
    }
    st = s->host ? ep_group_create(&w.group, &config) : call_group_create(&w.group, &config);
    world_fails(&w, st, s->create, s->create_says ? s->create_says : "", "ep_group_create");
    if (st == EP_OK) {
        world_check(&w, ep_group_rank(w.group) == rank, "ep_group_rank");
        world_check(&w, ep_group_num_ranks(w.group) == s->num_ranks, "ep_group_num_ranks");
        if (s->body) {
            s->body(&w);
        }
        call_group_destroy(&w.group);
    }
    world_check(&w, !w.group, "the group's pointer is not NULL");
    return w.bad;
}

int world_run(const struct world_setup *s) {
    struct meeting m = {.setup = s};
    const bool processes = s->host ? s->processes : gpu_processes(s->processes);
    char sizes[256];
    int32_t node[EP_MAX_RANKS];
    int failed;

    if (world_nodes(s->num_ranks, sizes, sizeof(sizes), node)) {
        setenv("EP_NODE_SIZE", sizes, 1);
    }
    arrived = arrived ? arrived : tap_shared(sizeof(*arrived));
    atomic_store(arrived, 0);
    if (processes) {
        snprintf(m.address, sizeof(m.address), "127.0.0.1:%d", tap_free_port());
        return gpu_run_ranks(s->num_ranks, true, rank_main, &m, RANK_SECONDS);
    }
    if (ep_world_create(&m.world, s->num_ranks) != EP_OK) {
        diag("ep_world_create: %s", ep_last_error());
        return s->num_ranks;
    }
    failed = s->host ? tap_run_threads(s->num_ranks, rank_main, &m)
                     : gpu_run_ranks(s->num_ranks, false, rank_main, &m, RANK_SECONDS);
    ep_world_destroy(&m.world);
    return failed;
}
