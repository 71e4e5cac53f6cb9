/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * A rank whose configuration is wrong, so that it cannot come, tells the others: they have its
 * sentence at once and do not wait for it. However ranks meet, and whichever rank it is.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ep.h"
#include "tests/gpu.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define NUM_RANKS 3
#define TIMEOUT_MS 30000
#define CARD_ROOM 4096

enum way { BY_ADDRESS, BY_ENVIRONMENT, BY_ALLGATHER, AS_THREADS };
enum mistake { ROW_BYTES, TIMEOUT, TOPK, RANK };

struct scene {
    enum way way;
    enum mistake mistake;
    int victim; /* the rank that is wrong */
    int late;   /* a rank that comes last, or -1 */
    int port;
    ep_world *world;
    pthread_barrier_t barrier;
    unsigned char cards[NUM_RANKS * CARD_ROOM];
};

static const char *const mistakes[] = {"max_row_bytes is 72", "timeout_ms is 50",
                                       "max_topk is 100", "rank is 7, it must be in 0..2"};

struct caller {
    struct scene *scene;
    int rank;
};

static int allgather(void *ctx, const void *in, void *out, size_t bytes) {
    struct caller *c = ctx;
    if (bytes > CARD_ROOM) {
        return 1;
    }
    memcpy(c->scene->cards + (size_t)c->rank * bytes, in, bytes);
    pthread_barrier_wait(&c->scene->barrier);
    memcpy(out, c->scene->cards, bytes * NUM_RANKS);
    pthread_barrier_wait(&c->scene->barrier);
    return 0;
}

static void say(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof(text), "%d", value);
    setenv(name, text, 1);
}

static void configure(struct ep_group_config *c, struct scene *s, struct caller *caller,
                      char address[32]) {
    *c = (struct ep_group_config)EP_GROUP_CONFIG_INIT;
    snprintf(address, 32, "127.0.0.1:%d", s->port);
    c->rank = caller->rank;
    c->num_ranks = NUM_RANKS;
    c->num_experts = 6;
    c->max_tokens = 4;
    c->max_topk = 1;
    c->max_row_bytes = 64;
    c->timeout_ms = TIMEOUT_MS;
    c->world = s->world;
    if (s->way == BY_ADDRESS) {
        c->address = address;
    } else if (s->way == BY_ALLGATHER) {
        c->allgather = allgather;
        c->allgather_ctx = caller;
    } else if (s->way == BY_ENVIRONMENT) {
        say("RANK", caller->rank);
        say("WORLD_SIZE", NUM_RANKS);
        say("LOCAL_WORLD_SIZE", NUM_RANKS);
        setenv("MASTER_ADDR", "127.0.0.1", 1);
        say("MASTER_PORT", s->port);
        setenv("EP_JOB", "one that fails", 1);
        c->rank = c->num_ranks = -1;
    }
    if (caller->rank == s->victim) {
        c->max_row_bytes = s->mistake == ROW_BYTES ? 72 : c->max_row_bytes;
        c->timeout_ms = s->mistake == TIMEOUT ? 50 : c->timeout_ms;
        c->max_topk = s->mistake == TOPK ? 100 : c->max_topk;
        c->rank = s->mistake == RANK ? 7 : c->rank;
    }
}

static int failing_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct caller caller = {s, rank};
    struct ep_group_config c;
    ep_group *group = NULL;
    char address[32];
    configure(&c, s, &caller, address);
    if (rank == s->late) {
        tap_sleep_ms(300);
    }
    const double start = tap_now();
    const ep_status st = ep_group_create(&group, &c);
    const double took = tap_now() - start;
    ok(st == (rank == s->victim ? EP_ERR_ARG : EP_ERR_PEER) && !group &&
           strstr(ep_last_error(), mistakes[s->mistake]),
       "rank %d: %s: %s", rank, ep_status_string(st), ep_last_error());
    ok(took < rig_within(10), "at once: %.1f s", took);
    return 0;
}

/* All at the same time: some ranks of theirs wait for a moment. */
int main(void) {
    static const struct {
        enum way way;
        enum mistake mistake;
        int victim, late;
        const char *what;
    } cases[] = {
        {BY_ADDRESS, ROW_BYTES, 1, 2, "rank 1, by address; rank 2 comes when it is over"},
        {BY_ADDRESS, TIMEOUT, 2, 0, "rank 2, by address; rank 0 is late"},
        {BY_ADDRESS, TOPK, 0, 1, "rank 0, by address"},
        {BY_ADDRESS, RANK, 1, -1, "a rank that cannot be, by address"},
        {BY_ENVIRONMENT, TOPK, 1, -1, "rank 1, by environment"},
        {BY_ENVIRONMENT, ROW_BYTES, 0, -1, "rank 0, by environment"},
        {BY_ALLGATHER, TIMEOUT, 1, -1, "rank 1, by the caller's allgather"},
        {BY_ALLGATHER, TOPK, 0, -1, "rank 0, by the caller's allgather"}};
    enum { NUM_CASES = sizeof(cases) / sizeof(cases[0]) };
    gpu_never("how ranks meet");
    tap_deadline(60);
    struct tap_ranks ranks[NUM_CASES];
    for (int i = 0; i < NUM_CASES; i++) {
        struct scene *s = tap_shared(sizeof(*s));
        pthread_barrierattr_t attr;
        s->way = cases[i].way;
        s->mistake = cases[i].mistake;
        s->victim = cases[i].victim;
        s->late = cases[i].late;
        s->port = tap_free_port();
        pthread_barrierattr_init(&attr);
        pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
        pthread_barrier_init(&s->barrier, &attr, NUM_RANKS);
        if (!ok(tap_ranks_start(&ranks[i], NUM_RANKS, failing_rank, s) == 0, "started")) {
            return done_testing();
        }
    }
    for (int i = 0; i < NUM_CASES; i++) {
        ok(tap_ranks_wait(&ranks[i], 50) == 0, "%s", cases[i].what);
        tap_ranks_free(&ranks[i]);
    }
    for (int i = 0; i < 2; i++) {
        struct scene s = {
            .way = AS_THREADS, .mistake = i == 0 ? ROW_BYTES : RANK, .victim = 1, .late = 2};
        ok(ep_world_create(&s.world, NUM_RANKS) == EP_OK &&
               tap_run_threads(NUM_RANKS, failing_rank, &s) == 0,
           "as threads: %s", mistakes[s.mistake]);
        ep_world_destroy(&s.world);
    }
    return done_testing();
}
