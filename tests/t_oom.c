/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * Out of memory, at each allocation in turn (EP_TEST_ALLOC_FAIL walks them; threads, mappings,
 * sockets and shared memory count as allocations), while a group, its handle, streams and events
 * are made, used and destroyed. Whoever fails says EP_ERR_NOMEM in a sentence, its peers are told
 * and do not wait, nothing leaks, and the next attempt starts as if nothing had been. A walk ends
 * when an attempt needs fewer allocations than the one that is to fail.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/base/base.h"
#include "tests/gpu.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define RANKS 3
/* Where it is slow, every third allocation. */
#define STEP (tap_quick() ? 5 : rig_scale() > 1 ? 3 : 1)
#define TIMEOUT_MS (400 * (rig_scale() > 1 ? 2 : 1)) /* ranks that fail alone are waited for */

/* Shared by the ranks of a walk. */
struct walk {
    struct rig_meeting meeting;
    int victim; /* of processes, whose allocations are counted apart */
    atomic_int arrived;
    atomic_int failed;  /* calls of this attempt that did */
    atomic_int unready; /* ranks of this attempt that cannot take part in operations */
    atomic_int done;
    atomic_int num_felt, num_good; /* attempts in which a call failed, or none did */
    atomic_int num_nomem;
};

static void meet(struct walk *w, int *meetings) {
    const int all = ++*meetings * RANKS;
    atomic_fetch_add(&w->arrived, 1);
    rig_await(&w->arrived, all);
}

/* A call may fail for want of memory here (`mine`: it may be this rank that lacks it; descriptors
 * are the system's) or elsewhere; then it says so. */
static bool good(struct walk *w, ep_status st, bool mine, const char *what) {
    if (st == EP_OK) {
        return true;
    }
    atomic_fetch_add(&w->failed, 1);
    ok(rig_is_sentence(ep_last_error()), "%s: the message is \"%s\"", what, ep_last_error());
    ok((mine && st == EP_ERR_SYSTEM) || st == EP_ERR_NOMEM || st == EP_ERR_PEER ||
           st == EP_ERR_TIMEOUT,
       "%s: %s (%s)", what, ep_status_string(st), ep_last_error());
    atomic_fetch_add(&w->num_nomem, mine && st == EP_ERR_NOMEM);
    return false;
}

/* Streams and events belong to no peer. */
static void local_objects(struct walk *w, ep_group *group) {
    ep_stream *stream = NULL;
    ep_event *event = NULL;
    ep_status st = ep_stream_create(&stream, group);
    if (st == EP_OK) {
        st = ep_event_create(&event, group);
        if (st == EP_OK) {
            ok(ep_event_record(event, stream) == EP_OK, "record: %s", ep_last_error());
            ok(ep_stream_wait(stream, event) == EP_OK, "wait: %s", ep_last_error());
            ok(ep_event_sync(event) == EP_OK, "sync: %s", ep_last_error());
            ok(ep_stream_sync(stream) == EP_OK, "sync: %s", ep_last_error());
        }
    }
    if (st != EP_OK) {
        atomic_fetch_add(&w->failed, 1);
        ok(st == EP_ERR_NOMEM && rig_is_sentence(ep_last_error()), "stream or event: %s (%s)",
           ep_status_string(st), ep_last_error());
        ok(!stream || !event, "outputs are set on success only");
    }
    ep_event_destroy(&event);
    ep_stream_destroy(&stream);
}

/* Two dispatches and combines. The boot's thread may still be the one that lacks memory, and then
 * its peers count this rank as dead. In threads nothing else runs, and nothing is allocated. */
static void operations(struct walk *w, struct rig *r, bool mine, int *meetings) {
    const uint64_t count = epi_alloc_count();
    meet(w, meetings);
    for (int i = 0; i < 2; i++) {
        if (!good(w, rig_dispatch(r), mine, "ep_dispatch") ||
            !ok(rig_dispatch_right(r), "the rows are right") ||
            !good(w, rig_combine(r), mine, "ep_combine") ||
            !ok(rig_combine_right(r), "the sums are right")) {
            break;
        }
    }
    meet(w, meetings);
    ok(!w->meeting.world || epi_alloc_count() == count, "operations allocate nothing");
    meet(w, meetings);
}

/* One rank's whole life. All ranks come to both meetings, whatever failed. */
static void attempt(struct walk *w, int rank, bool mine, int *meetings) {
    struct rig r;
    const double start = tap_now();
    bool ready = good(w, rig_group(&r, &w->meeting, rank), mine, "ep_group_create");
    ok(tap_now() - start < 1e-3 * w->meeting.timeout_ms + rig_within(2.0), "create took %.2f s",
       tap_now() - start);
    ok(ready == (r.group != NULL), "the output is set on success only");
    if (ready) {
        local_objects(w, r.group);
        ready = good(w, rig_route(&r), mine, "ep_handle_create");
    }
    atomic_fetch_add(&w->unready, !ready);
    meet(w, meetings);
    if (atomic_load(&w->unready) == 0) {
        operations(w, &r, mine, meetings);
    }
    rig_destroy(&r);
    meet(w, meetings);
}

/* ---- ranks as processes --------------------------------------------------------------------- */

static int process_rank(int rank, void *ctx) {
    struct walk *w = ctx;
    const bool mine = rank == w->victim;
    int meetings = 0, n;
    for (n = 1; !atomic_load(&w->done); n += STEP) {
        const struct rig_footprint was = rig_footprint();
        const uint64_t until = epi_alloc_count() + (uint64_t)n;
        if (mine) {
            epi_alloc_fail_at(until);
        }
        attempt(w, rank, mine, &meetings);
        epi_alloc_fail_at(0);
        ok(rig_same_footprint(was), "allocation %d of rank %d: nothing is left", n, w->victim);
        if (mine) {
            const bool felt = atomic_load(&w->failed) > 0;
            atomic_fetch_add(felt ? &w->num_felt : &w->num_good, 1);
            atomic_store(&w->done, epi_alloc_count() < until);
        }
        meet(w, &meetings);
        atomic_store(&w->failed, 0);
        atomic_store(&w->unready, 0);
        meet(w, &meetings);
    }
    return 0;
}

/* Two groups, which differ in the rank that lacks memory; they run while threads do their walk. */
static struct walk *walks[2];
static struct tap_ranks walkers[2];

static bool start_processes(void) {
    bool good = true;
    for (int victim = 0; victim < 2; victim++) {
        struct walk *w = walks[victim] = tap_shared(sizeof(*w));
        w->victim = victim;
        w->meeting = (struct rig_meeting){RANKS, tap_free_port(), NULL, TIMEOUT_MS};
        good = ok(tap_ranks_start(&walkers[victim], RANKS, process_rank, w) == 0,
                  "processes: rank %d will lack memory", victim) &&
               good;
    }
    return good;
}

static void end_processes(void) {
    for (int victim = 0; victim < 2; victim++) {
        struct walk *w = walks[victim];
        const int failed = tap_ranks_wait(&walkers[victim], 100);
        const int felt = atomic_load(&w->num_felt), nomem = atomic_load(&w->num_nomem);
        tap_ranks_free(&walkers[victim]);
        ok(failed == 0, "processes: each allocation of rank %d failed in turn", victim);
        ok(felt * STEP >= 30 && nomem * STEP >= 20,
           "%d attempts felt it, %d calls had no memory", felt, nomem);
        ok(atomic_load(&w->num_good) > 0, "and %d attempts did not", atomic_load(&w->num_good));
    }
}

/* ---- ranks as threads, which share the count ------------------------------------------------ */

static int thread_rank(int rank, void *ctx) {
    int meetings = 0;
    attempt(ctx, rank, true, &meetings);
    return 0;
}

static void walk_threads(void) {
    struct walk *w = tap_shared(sizeof(*w));
    struct rig_footprint was = rig_footprint();
    ep_world *kept = NULL;
    int n = 1;
    bool worn = true;
    ok(ep_world_create(&kept, RANKS) == EP_OK, "a world that is used all the time");
    struct rig_footprint with = rig_footprint();
    for (bool more = true; more; n += STEP) {
        ep_world *world = NULL;
        const uint64_t until = epi_alloc_count() + (uint64_t)n;
        *w = (struct walk){.meeting = {RANKS, 0, NULL, TIMEOUT_MS}};
        epi_alloc_fail_at(until);
        ep_status st = ep_world_create(&world, RANKS);
        ok(st == EP_OK || (st == EP_ERR_NOMEM && !world && rig_is_sentence(ep_last_error())),
           "ep_world_create: %s (%s)", ep_status_string(st), ep_last_error());
        /* Every second attempt, and those without one, in the world that has seen failures. */
        w->meeting.world = world && n % 2 ? world : kept;
        tap_run_threads(RANKS, thread_rank, w);
        ep_world_destroy(&world);
        epi_alloc_fail_at(0);
        more = epi_alloc_count() >= until;
        ok(rig_same_footprint(with), "threads: allocation %d: nothing is left", n);
        /* And the next one in it succeeds. */
        *w = (struct walk){.meeting = {RANKS, 0, kept, 20000 * rig_scale()}};
        tap_run_threads(RANKS, thread_rank, w);
        worn = worn && atomic_load(&w->failed) == 0;
    }
    ok(worn, "threads: after each failure the world is as good as new");
    ok(n > 30, "threads: each of %d allocations has failed", n - 2);
    ep_world_destroy(&kept);
    ok(rig_same_footprint(was), "threads: nothing is left in the end");
}

/* ---- outputs of a call that fails ----------------------------------------------------------- */

static int count_rank(int rank, void *ctx) {
    struct rig r;
    int64_t rows = -7;
    int32_t per_source[1] = {-7}, per_expert[RIG_EXPERTS] = {-7, -7};
    ok(rig_create(&r, ctx, rank) == EP_OK && rig_dispatch(&r) == EP_OK, "a dispatch: %s",
       ep_last_error());
    epi_alloc_fail_at(epi_alloc_count() + 1);
    const ep_status st = ep_handle_counts(r.handle, &rows, per_source, per_expert);
    epi_alloc_fail_at(0);
    ok(st == EP_ERR_NOMEM && rows == -7 && per_source[0] == -7 && per_expert[0] == -7,
       "counts without memory are not told in part: %s, %d", ep_status_string(st),
       per_source[0]);
    ok(ep_handle_counts(r.handle, &rows, per_source, per_expert) == EP_OK &&
           rows == RIG_TOKENS && per_source[0] == RIG_TOKENS,
       "and are there with it: %s", ep_last_error());
    rig_destroy(&r);
    return 0;
}

static void counts_without_memory(void) {
    struct rig_meeting m = {1, 0, NULL, TIMEOUT_MS};
    ok(ep_world_create(&m.world, 1) == EP_OK, "a world: %s", ep_last_error());
    tap_run_threads(1, count_rank, &m);
    ep_world_destroy(&m.world);
}

int main(void) {
    gpu_never("what a host group allocates");
    tap_deadline(110);
    tap_expect_log(" died: ");
    tap_expect_log("dropped a connection");
    tap_expect_log("alive but late"); /* on a busy machine, the timeout is short */
    counts_without_memory();
    if (start_processes()) {
        walk_threads();
        end_processes();
    }
    return done_testing();
}
