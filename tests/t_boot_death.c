/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * After the ranks have met: who dies is noticed by all within a second, who is only stopped is
 * not called dead, who leaves is not either, and no collective outlives its deadline.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "src/boot/boot.h"
#include "tests/gpu.h"
#include "tests/tap.h"

#define NUM_RANKS 4
#define LONG_NS (60 * EPI_NS_PER_S)
#define SHORT_NS (700 * EPI_NS_PER_MS)

/* Shared by the ranks and the test. */
struct stage {
    int port;
    int victim;
    bool in_allgather; /* the others wait in a collective when it happens */
    bool has_child;    /* the victim has forked a process that lives on */
    _Atomic int num_ready;
    _Atomic int go;
    _Atomic int num_dead_calls[NUM_RANKS];   /* by observer */
    _Atomic int last_dead[NUM_RANKS];        /* by observer */
    _Atomic int64_t dead_at_ns[NUM_RANKS];   /* by observer */
    _Atomic int64_t failed_at_ns[NUM_RANKS]; /* when its allgather came back */
    _Atomic int child;
};

struct observer {
    struct stage *stage;
    int rank;
};

static bool says(const char *what) {
    bool found = strstr(ep_last_error(), what) != NULL;
    if (!found) {
        diag("\"%s\" does not say \"%s\"", ep_last_error(), what);
    }
    return found;
}

static void on_dead(void *ctx, int rank, const char *why) {
    struct observer *o = ctx;
    ok(why && why[0] != '\0', "there is a reason");
    o->stage->last_dead[o->rank] = rank;
    o->stage->dead_at_ns[o->rank] = epi_now_ns();
    o->stage->num_dead_calls[o->rank]++;
}

static struct epi_boot *join(struct stage *s, struct observer *o, int rank, int num_ranks) {
    char address[32];
    struct epi_boot *boot = NULL;
    *o = (struct observer){s, rank};
    snprintf(address, sizeof(address), "127.0.0.1:%d", s->port);
    struct epi_boot_config config = {.rank = rank,
                                     .num_ranks = num_ranks,
                                     .address = address,
                                     .timeout_ns = LONG_NS,
                                     .on_dead = on_dead,
                                     .ctx = o};
    ok(epi_boot_create(&boot, &config) == EP_OK, "create: %s", ep_last_error());
    return boot;
}

static bool wait_until(_Atomic int *value, int at_least) {
    for (int i = 0; i < 20000 && *value < at_least; i++) {
        tap_sleep_ms(2);
    }
    return *value >= at_least;
}

static struct stage *new_stage(void) {
    struct stage *s = tap_shared(sizeof(*s));
    s->port = tap_free_port();
    return s;
}

/* ---- killed ---- */

static int kill_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct observer o;
    char bytes[100] = {0};
    char all[NUM_RANKS][100];
    char name[16];
    struct epi_boot *boot = join(s, &o, rank, NUM_RANKS);
    ok(epi_boot_barrier(boot, epi_deadline_after(LONG_NS)) == EP_OK, "all are here");
    if (rank == s->victim && s->has_child) {
        pid_t child = fork();
        if (child == 0) {
            sleep(60); /* holds whatever it inherited */
            _exit(0);
        }
        s->child = child;
    }
    s->num_ready++;
    if (rank == s->victim) {
        pause();
    }
    snprintf(name, sizeof(name), "rank %d", s->victim);
    if (!s->in_allgather) {
        wait_until(&s->num_dead_calls[rank], 1);
    }
    ep_status st =
        epi_boot_allgather(boot, bytes, sizeof(bytes), all, epi_deadline_after(LONG_NS));
    s->failed_at_ns[rank] = epi_now_ns();
    ok(st == EP_ERR_PEER && says(name) && says("died"), "the allgather names it");
    wait_until(&s->num_dead_calls[rank], 1);
    st = epi_boot_barrier(boot, epi_deadline_after(LONG_NS));
    ok(st == EP_ERR_PEER && says(name), "so do later ones");
    wait_until(&s->go, 1); /* nobody leaves before all have seen it */
    epi_boot_destroy(&boot);
    ok(s->num_dead_calls[rank] == 1 && s->last_dead[rank] == s->victim, "one call, for it");
    return 0;
}

static void test_kill(int victim, bool in_allgather, bool has_child, const char *what) {
    struct stage *s = new_stage();
    struct tap_ranks ranks;
    s->victim = victim;
    s->in_allgather = in_allgather;
    s->has_child = has_child;
    if (!ok(tap_ranks_start(&ranks, NUM_RANKS, kill_rank, s) == 0, "%s: started", what)) {
        return;
    }
    wait_until(&s->num_ready, NUM_RANKS);
    tap_sleep_ms(50);
    const int64_t most_ms = 2000 * tap_scaled(1), killed_ns = epi_now_ns();
    tap_ranks_signal(&ranks, victim, SIGKILL);
    for (int r = 0; r < NUM_RANKS; r++) {
        if (r == victim) {
            continue;
        }
        wait_until(&s->num_dead_calls[r], 1);
        int64_t took_ms = (s->dead_at_ns[r] - killed_ns) / EPI_NS_PER_MS;
        ok(s->num_dead_calls[r] == 1 && took_ms < most_ms, "%s: rank %d saw it after %lld ms",
           what, r, (long long)took_ms);
        for (int i = 0; i < 1000 && s->failed_at_ns[r] == 0; i++) {
            tap_sleep_ms(2);
        }
        took_ms = (s->failed_at_ns[r] - killed_ns) / EPI_NS_PER_MS;
        ok(took_ms < most_ms, "%s: its allgather came back after %lld ms", what,
           (long long)took_ms);
    }
    s->go = 1;
    ok(tap_ranks_wait(&ranks, 30) == 0, "%s: the survivors agree", what);
    tap_ranks_free(&ranks);
    if (s->child > 0) {
        kill(s->child, SIGKILL);
    }
}

/* ---- stopped ---- */

/* Half a megabyte each: more than socket buffers hold, so that the stopped rank's window closes
 * while rank 0 sends. */
#define LARGE_BYTES ((size_t)512 << 10)
#define NUM_LARGE 8

static int stop_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct observer o;
    unsigned char *mine = malloc(LARGE_BYTES);
    unsigned char *all = malloc(LARGE_BYTES * NUM_RANKS);
    struct epi_boot *boot = join(s, &o, rank, NUM_RANKS);
    ok(epi_boot_barrier(boot, epi_deadline_after(LONG_NS)) == EP_OK, "all are here");
    memset(mine, 'a' + rank, LARGE_BYTES);
    s->num_ready++;
    for (int i = 0; i < NUM_LARGE; i++) {
        if (rank == s->victim && i == 1) {
            s->go = 1;
            raise(SIGSTOP); /* the test lets us go on */
        }
        ep_status st =
            epi_boot_allgather(boot, mine, LARGE_BYTES, all, epi_deadline_after(LONG_NS));
        ok(st == EP_OK, "a stopped rank is waited for: %s", ep_last_error());
        for (int r = 0; st == EP_OK && r < NUM_RANKS; r++) {
            ok(all[(size_t)r * LARGE_BYTES] == 'a' + r &&
                   all[(size_t)(r + 1) * LARGE_BYTES - 1] == 'a' + r,
               "bytes of rank %d", r);
        }
    }
    epi_boot_destroy(&boot);
    ok(s->num_dead_calls[rank] == 0, "nobody was called dead");
    free(mine);
    free(all);
    return 0;
}

/* Rank 0 answers, and the answer is far larger than the buffers of the rank that is stopped
 * after it has asked. */
static int stop_while_sent_to_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct observer o;
    unsigned char *mine = calloc(1, EPI_BOOT_MAX_BYTES);
    unsigned char *all = malloc(EPI_BOOT_MAX_BYTES * 16);
    struct epi_boot *boot = join(s, &o, rank, 16);
    ok(epi_boot_barrier(boot, epi_deadline_after(LONG_NS)) == EP_OK, "all are here");
    if (rank != s->victim) {
        tap_sleep_ms(300);
        if (rank == 0) {
            s->go = 1; /* the victim has sent its bytes and waits: stop it now */
            while (s->go == 1) {
                tap_sleep_ms(2);
            }
        }
    }
    ep_status st =
        epi_boot_allgather(boot, mine, EPI_BOOT_MAX_BYTES, all, epi_deadline_after(LONG_NS));
    ok(st == EP_OK, "the answer arrives: %s", ep_last_error());
    ok(epi_boot_barrier(boot, epi_deadline_after(LONG_NS)) == EP_OK, "and all go on");
    epi_boot_destroy(&boot);
    free(mine);
    free(all);
    return s->num_dead_calls[0] != 0;
}

/* Three jobs at the same time: in each a rank is stopped for longer than a dead one would stay
 * unnoticed. */
static void test_stop(void) {
    static const struct {
        int num_ranks, victim;
        int (*fn)(int, void *);
        const char *what;
    } jobs[] = {
        {NUM_RANKS, 2, stop_rank, "a rank stopped for 7 s is not dead"},
        {NUM_RANKS, 0, stop_rank, "rank 0 stopped for 7 s is not dead"},
        {16, 1, stop_while_sent_to_rank, "a rank that reads nothing for 9 s is not dead"}};
    struct tap_ranks ranks[3];
    struct stage *s[3];
    for (int i = 0; i < 3; i++) {
        s[i] = new_stage();
        s[i]->victim = jobs[i].victim;
        if (!ok(tap_ranks_start(&ranks[i], jobs[i].num_ranks, jobs[i].fn, s[i]) == 0,
                "rank %d of %d will be stopped", jobs[i].victim, jobs[i].num_ranks)) {
            return;
        }
    }
    for (int i = 0; i < 3; i++) {
        wait_until(&s[i]->go, 1);
    }
    tap_ranks_signal(&ranks[2], s[2]->victim, SIGSTOP); /* the others stop themselves */
    s[2]->go = 2;
    tap_sleep_ms(7500);
    tap_ranks_signal(&ranks[0], s[0]->victim, SIGCONT);
    tap_ranks_signal(&ranks[1], s[1]->victim, SIGCONT);
    tap_sleep_ms(1500);
    tap_ranks_signal(&ranks[2], s[2]->victim, SIGCONT);
    for (int i = 0; i < 3; i++) {
        ok(tap_ranks_wait(&ranks[i], 60) == 0, "%s", jobs[i].what);
        tap_ranks_free(&ranks[i]);
    }
}

/* ---- goodbye, lateness, disagreement ---- */

/* `victim` leaves, the others are in an allgather. */
static int leave_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct observer o;
    char bytes[8] = {0};
    char all[NUM_RANKS][8];
    char text[40];
    struct epi_boot *boot = join(s, &o, rank, NUM_RANKS);
    ok(epi_boot_barrier(boot, epi_deadline_after(LONG_NS)) == EP_OK, "all are here");
    double start = tap_now();
    if (rank != s->victim) {
        snprintf(text, sizeof(text), "rank %d has left", s->victim);
        ep_status st = epi_boot_allgather(boot, bytes, 8, all, epi_deadline_after(LONG_NS));
        ok(st == EP_ERR_PEER && says(text), "who left is named");
        ok(tap_now() - start < 5.0, "at once");
        s->num_ready++;
        wait_until(&s->num_ready, NUM_RANKS - 1);
    }
    start = tap_now();
    epi_boot_destroy(&boot);
    ok(tap_now() - start < 3.0, "leaving takes no time");
    ok(s->num_dead_calls[rank] == 0, "who leaves has not died");
    return 0;
}

static int late_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct observer o;
    int all[NUM_RANKS];
    struct epi_boot *boot = join(s, &o, rank, NUM_RANKS);
    ok(epi_boot_barrier(boot, epi_deadline_after(LONG_NS)) == EP_OK, "all are here");
    if (rank == s->victim) {
        wait_until(&s->num_ready, NUM_RANKS - 1);
        ok(epi_boot_allgather(boot, &rank, sizeof(rank), all, epi_deadline_after(LONG_NS)) ==
               EP_OK,
           "all others have called");
    } else {
        ep_status st = epi_boot_allgather(boot, &rank, sizeof(rank), all,
                                          epi_deadline_after(SHORT_NS + rank * EPI_NS_PER_MS));
        ok(st == EP_ERR_TIMEOUT && says("missing: 2") && says("3 of 4"), "the late is named");
        s->num_ready++;
    }
    for (int i = 0; i < 20; i++) {
        int mine = rank * 100 + i;
        ep_status st =
            epi_boot_allgather(boot, &mine, sizeof(mine), all, epi_deadline_after(LONG_NS));
        bool right = st == EP_OK;
        for (int r = 0; right && r < NUM_RANKS; r++) {
            right = all[r] == r * 100 + i;
        }
        ok(right, "later calls meet their like: %s", ep_last_error());
    }
    epi_boot_destroy(&boot);
    return 0;
}

static int mismatch_rank(int rank, void *ctx) {
    struct observer o;
    char bytes[64] = {0};
    char all[NUM_RANKS][64];
    struct epi_boot *boot = join(ctx, &o, rank, NUM_RANKS);
    for (int i = 0; i < 3; i++) {
        ep_status st = epi_boot_allgather(boot, bytes, rank == i ? 16 : 24, all,
                                          epi_deadline_after(LONG_NS));
        ok(st == EP_ERR_MISMATCH && says("16") && says("24"), "different sizes are found out");
        st = epi_boot_allgather(boot, bytes, 64, all, epi_deadline_after(LONG_NS));
        ok(st == EP_OK, "and the next call works: %s", ep_last_error());
    }
    ok(epi_boot_allgather(boot, bytes, EPI_BOOT_MAX_BYTES + 1, all,
                          epi_deadline_after(LONG_NS)) == EP_ERR_ARG,
       "too much is refused");
    epi_boot_destroy(&boot);
    return 0;
}

/* A process forked from a rank must not disturb it. */
static int fork_rank(int rank, void *ctx) {
    struct observer o;
    int all[2];
    struct epi_boot *boot = join(ctx, &o, rank, 2);
    ok(epi_boot_barrier(boot, epi_deadline_after(LONG_NS)) == EP_OK, "both are here");
    pid_t child = fork();
    if (child == 0) {
        int st =
            epi_boot_allgather(boot, &rank, sizeof(rank), all, epi_deadline_after(SHORT_NS));
        epi_boot_destroy(&boot);
        _exit(st == EP_ERR_STATE ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    ok(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child may not use it, but free it");
    ok(epi_boot_allgather(boot, &rank, sizeof(rank), all, epi_deadline_after(LONG_NS)) == EP_OK,
       "the parent goes on: %s", ep_last_error());
    epi_boot_destroy(&boot);
    return 0;
}

/* Rank 0 is stopped; rank 1 destroys its side all the same. */
static int bounded_rank(int rank, void *ctx) {
    struct stage *s = ctx;
    struct observer o;
    struct epi_boot *boot = join(s, &o, rank, 2);
    ok(epi_boot_barrier(boot, epi_deadline_after(LONG_NS)) == EP_OK, "both are here");
    if (rank == 0) {
        s->go = 1;
        pause();
    }
    wait_until(&s->go, 2);
    double start = tap_now();
    epi_boot_destroy(&boot);
    double took = tap_now() - start;
    ok(took < 2.0, "destroy ends although rank 0 is stopped: %.2f s", took);
    return 0;
}

static void test_leaving(void) {
    for (int victim = 0; victim < 2; victim++) {
        struct stage *s = new_stage();
        s->victim = victim;
        ok(tap_spawn_ranks(NUM_RANKS, leave_rank, s, 60) == 0, "rank %d leaves", victim);
    }
    struct stage *s = new_stage();
    s->victim = 2;
    ok(tap_spawn_ranks(NUM_RANKS, late_rank, s, 60) == 0, "a late rank");
    ok(tap_spawn_ranks(NUM_RANKS, mismatch_rank, new_stage(), 60) == 0, "sizes that differ");
    ok(tap_spawn_ranks(2, fork_rank, new_stage(), 60) == 0, "a rank that forks");

    struct tap_ranks ranks;
    s = new_stage();
    ok(tap_ranks_start(&ranks, 2, bounded_rank, s) == 0, "rank 0 will be stopped");
    wait_until(&s->go, 1);
    tap_ranks_signal(&ranks, 0, SIGSTOP);
    s->go = 2;
    ok(tap_ranks_wait(&ranks, 30) == 0, "destroy is bounded");
    tap_ranks_free(&ranks);
}

int main(void) {
    gpu_never("how ranks meet");
    tap_deadline(240);
    tap_expect_log(" died: ");
    test_leaving();
    test_kill(2, true, false, "rank 2 killed, in allgather");
    test_kill(3, false, false, "rank 3 killed, outside");
    test_kill(0, true, false, "rank 0 killed, in allgather");
    test_kill(0, false, false, "rank 0 killed, outside");
    test_kill(1, true, true, "rank 1 killed, its child lives");
    if (!tap_quick()) {
        test_stop();
    }
    return done_testing();
}
