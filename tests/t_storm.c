/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * The fault storm (storm.h): scenes of seeded bad luck, one after the other, in processes that
 * live on. After each the survivors make another group and use it, and a process holds what it
 * held before: descriptors, threads, arenas, allocations; over many scenes also memory and
 * mappings. A process that died is replaced. A scene that fails prints the EP_SEED that replays it
 * alone with EP_CASES=1; EP_STORM_FAULT=N draws one kind of fault only.
 */
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/rig.h"
#include "tests/storm.h"
#include "tests/tap.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SLOW_BUILD 1
#else
#define SLOW_BUILD 0
#endif

#define USUAL_SCENES 40
#define SLOW_SCENES 12
#define WARM_SCENES 20 /* until the allocator has what it keeps */
#define MOST_GROWTH_KB 8192
#define MOST_NEW_MAPS 24

/* A process of the crew. */
struct member {
    int place;
    int seen;                 /* the scene before its first */
    struct tap_ranks process; /* of one */
    bool runs;
};

static struct member crew[STORM_MAX_RANKS];
static struct storm_shared *shared; /* by all processes */
static int only_fault = -1;

/* ---- in a process of the crew --------------------------------------------------------------- */

struct memory {
    long rss_kb, maps;
};

static struct memory look_at_memory(void) {
    struct memory m = {0, 0};
    char line[512];
    malloc_trim(0); /* what was needed for a moment goes back */
    FILE *f = fopen("/proc/self/status", "re");
    while (f && fgets(line, sizeof(line), f)) {
        sscanf(line, "RssAnon: %ld", &m.rss_kb);
    }
    if (f) {
        fclose(f);
    }
    f = fopen("/proc/self/maps", "re");
    while (f && fgets(line, sizeof(line), f)) {
        m.maps += strchr(line, '\n') != NULL;
    }
    if (f) {
        fclose(f);
    }
    return m;
}

/* The group of those who are left: it works as if nothing had been. */
static void go_on(const struct storm_scene *s, ep_world *world, int rank) {
    const bool fewer = storm_is_lethal(s);
    const struct rig_meeting m = {s->num_ranks - fewer, shared->port[1], world,
                                  30000 * rig_scale()};
    struct rig r;
    const ep_status st = rig_create(&r, &m, rank - (fewer && rank > s->victim));
    if (ok(st == EP_OK, "rank %d: the next group: %s (%s)", rank, ep_status_string(st),
           ep_last_error())) {
        rig_pass(&r);
    }
    rig_destroy(&r);
}

static void await_all(atomic_int *value, int least) {
    while (atomic_load(value) < least) {
        tap_sleep_ms(1); /* the test's process watches the time */
    }
}

struct team {
    const struct storm_scene *s;
    ep_world *world[2]; /* NULL: ranks are processes */
};

static int rank_main(int rank, void *ctx) {
    const struct team *team = ctx;
    const struct storm_scene *s = team->s;
    const int bad = storm_rank(s, shared, team->world[0], rank);
    atomic_fetch_add(&shared->bad, bad);
    atomic_fetch_add(&shared->ended, 1);
    await_all(&shared->ended, s->num_ranks - storm_is_lethal(s));
    go_on(s, team->world[1], rank);
    return bad;
}

static void run_threads(struct team *team) {
    const int n = team->s->num_ranks;
    ok(ep_world_create(&team->world[0], n) == EP_OK, "a world: %s", ep_last_error());
    ok(ep_world_create(&team->world[1], n) == EP_OK, "a world: %s", ep_last_error());
    tap_run_threads(n, rank_main, team);
    ep_world_destroy(&team->world[1]);
    ep_world_destroy(&team->world[0]);
}

/* The place of a process among the ranks: no process is rank 0 for ever. */
static int rank_of(const struct storm_scene *s, int place) {
    return (place + (int)(s->seed % 5)) % s->num_ranks;
}

static bool takes_part(const struct storm_scene *s, int place) {
    return place < (s->threads ? 1 : s->num_ranks);
}

/* Scene number n, from 1 on. */
static void draw(struct storm_scene *s, int n) {
    storm_draw(s, shared->seed + (uint64_t)n - 1, only_fault, !gpu_processes(true),
               gpu_processes(false));
    if (storm_is_lethal(s) && rank_of(s, 0) == s->victim) {
        s->victim =
            rank_of(s, 1); /* who is first lives for ever, and is looked at for growth */
    }
}

static void run_scene(int place, int n) {
    struct storm_scene s;
    struct team team = {.s = &s};
    draw(&s, n);
    if (!takes_part(&s, place)) {
        return;
    }
    storm_build(&s);
    const struct rig_footprint was = rig_footprint();
    if (s.threads) {
        run_threads(&team);
    } else {
        rank_main(rank_of(&s, place), &team);
    }
    const int before = tap_num_failed();
    ok(rig_same_footprint(was), "process %d holds what it held before", place);
    atomic_fetch_add(&shared->bad, tap_num_failed());
    if (tap_num_failed() && !before) {
        diag("the footprint alone");
    }
    storm_free(&s);
    atomic_fetch_add(&shared->done, 1);
}

static int crew_main(int rank, void *ctx) {
    const struct member *me = ctx;
    mallopt(M_ARENA_MAX, 1); /* else what is kept depends on which threads asked for how much */
    const int place = me->place;
    struct memory warm = {0, 0}, now;
    int seen = me->seen + rank, num = 0; /* it is the only rank of its kind: 0 */
    if (gpu_wanted()) {
        rig_warm(-1);
    }
    for (int n; (n = atomic_load(&shared->number)) >= 0;) {
        if (n == seen) {
            tap_sleep_ms(1);
            continue;
        }
        seen = n;
        run_scene(place, n);
        warm = ++num == WARM_SCENES ? look_at_memory() : warm;
    }
    now = look_at_memory();
    /* Sanitizers keep what was freed, drivers threads. */
    if (num >= 2 * WARM_SCENES && !SLOW_BUILD && !gpu_wanted()) {
        ok(now.rss_kb < warm.rss_kb + MOST_GROWTH_KB && now.maps < warm.maps + MOST_NEW_MAPS,
           "process %d in %d scenes: memory %ld -> %ld KiB, mappings %ld -> %ld", place, num,
           warm.rss_kb, now.rss_kb, warm.maps, now.maps);
    }
    return atomic_load(&shared->bad) > 0; /* so that all say what they have to say */
}

/* ---- the test's own process ----------------------------------------------------------------- */

static bool end_member(struct member *m, int sig) {
    bool good = true;
    if (m->runs) {
        m->process.sent[0] = sig;
        good = tap_ranks_wait(&m->process, 20) == 0;
        tap_ranks_free(&m->process);
    }
    m->runs = false;
    return good;
}

static bool start_member(int place) {
    struct member *m = &crew[place];
    m->place = place;
    m->seen = m->runs ? m->seen : atomic_load(&shared->number);
    m->runs = m->runs || tap_ranks_start(&m->process, 1, crew_main, &m->place) == 0;
    return m->runs;
}

/* Lets the victim run again when it has been stopped for long enough; again and again, because
 * it may stop only after it has said so. */
static void resume(const struct storm_scene *s, struct member *victim) {
    const long long struck = atomic_load(&shared->struck_us);
    if ((s->fault != STORM_STOP && s->fault != STORM_STOP_LONG) || !struck) {
        return;
    }
    const double stopped = tap_now() - 1e-6 * (double)struck;
    if (s->fault == STORM_STOP ? stopped > 1e-5 * s->delay_us
                               : atomic_load(&shared->ended) == s->num_ranks - 1 ||
                                     stopped > 2e-3 * s->timeout_ms + rig_within(2.0)) {
        kill(victim->process.pid[0], SIGCONT);
    }
}

static struct member *victim_of(const struct storm_scene *s) {
    for (int p = 0; p < s->num_ranks; p++) {
        if (!s->threads && rank_of(s, p) == s->victim) {
            return &crew[p];
        }
    }
    return &crew[0];
}

static bool watch(const struct storm_scene *s) {
    const double limit = tap_now() + (double)STORM_SECONDS * rig_scale();
    const int all = s->threads ? 1 : s->num_ranks - storm_is_lethal(s);
    while (atomic_load(&shared->done) < all && tap_now() < limit) {
        resume(s, victim_of(s));
        tap_sleep_ms(1);
    }
    if (atomic_load(&shared->done) < all) {
        diag("after %d s %d ranks are done with the group, %d of %d processes with the scene",
             STORM_SECONDS * rig_scale(), atomic_load(&shared->ended),
             atomic_load(&shared->done), all);
        return false;
    }
    return atomic_load(&shared->bad) == 0;
}

static bool play(int n) {
    struct storm_scene s;
    char text[1024];
    bool good = true;
    draw(&s, n);
    shared->port[0] = tap_free_port();
    shared->port[1] = tap_free_port();
    atomic_store(&shared->struck_us, 0);
    atomic_store(&shared->ended, 0);
    atomic_store(&shared->done, 0);
    memset(shared->cards.calls, 0, sizeof(shared->cards.calls));
    for (int p = 0; p < s.num_ranks; p++) {
        good = good && (!takes_part(&s, p) || start_member(p));
    }
    atomic_store(&shared->number, n);
    good = good && watch(&s);
    if (storm_is_lethal(&s)) {
        good = end_member(victim_of(&s), s.fault == STORM_KILL ? SIGKILL : 0) && good;
    }
    if (!good) {
        storm_describe(&s, text, sizeof(text));
        diag("%s", text);
        diag("to replay: EP_SEED=%llu EP_CASES=1", (unsigned long long)s.seed);
    }
    return good;
}

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
}

int main(void) {
    gpu_program();
    const uint64_t seed = tap_seed();
    const int usual = SLOW_BUILD || gpu_wanted() || tap_quick() ? SLOW_SCENES : USUAL_SCENES;
    const int num = number("EP_CASES", usual * tap_effort());
    bool good = true, ended = true;
    only_fault = number("EP_STORM_FAULT", -1);
    shared = tap_shared(sizeof(*shared));
    shared->seed = seed;
    tap_deadline(60 + 4 * num);
    tap_expect_log(" died: ");
    tap_expect_log("dropped a connection"); /* killed while it was meeting the others */
    tap_expect_log("has waited");
    for (int n = 1; n <= num && good; n++) {
        good = play(n);
    }
    atomic_store(&shared->number, -1);
    for (int p = 0; p < STORM_MAX_RANKS; p++) {
        ended = end_member(&crew[p], 0) && ended;
    }
    ok(good, "%d scenes: everybody is told in time, no byte is wrong, the next group works",
       num);
    ok(ended, "nothing is left behind, and nothing has grown");
    return done_testing();
}
