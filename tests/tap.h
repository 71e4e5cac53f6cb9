/* SPDX-License-Identifier: MIT */
/*
 * TAP for the test programs: test points, seeds, a watchdog, and ranks as processes or threads.
 * A test includes this file, calls ok() and ends with `return done_testing();`.
 *
 * Any thread and any forked rank may call ok(): in a rank only failures are printed, and they
 * turn the rank's exit status bad. All timeouts are multiplied by TAP_TIMEOUT_SCALE (the
 * sanitizer runs set it). The process that forks ranks must do so from its main thread, since
 * ranks die with the thread that forked them.
 */
#ifndef TESTS_TAP_H
#define TESTS_TAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define TAP_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

/* One test point; returns cond, so that a test can stop early. */
bool ok(bool cond, const char *fmt, ...) TAP_PRINTF(2, 3);
/* A comment line; shown by the runner when the test fails. */
void diag(const char *fmt, ...) TAP_PRINTF(1, 2);
/* Counts num_points points as skipped, each with the reason. */
void skip(int num_points, const char *fmt, ...) TAP_PRINTF(2, 3);
/* The whole program is skipped: prints the plan with the reason and exits 0. */
void skip_all(const char *fmt, ...) TAP_PRINTF(1, 2);
/* Prints the plan; the value to return from main. */
int done_testing(void);
/* This program will log a warning or error containing text; any other one fails the test. */
void tap_expect_log(const char *text);

/* EP_SEED, or one taken from the clock; printed as "# seed N" by the first call. */
uint64_t tap_seed(void);
/* splitmix64: the next of a sequence that depends on *state alone. */
uint64_t tap_rand(uint64_t *state);
/* How many times the usual number of random cases to try: TAP_EFFORT, else 1 (soak sets 20). */
int tap_effort(void);
/* TAP_EFFORT=quick, the inner loop: of what can be varied at length, a few. */
bool tap_quick(void);
/* Seconds of a monotonic clock. */
double tap_now(void);
void tap_sleep_ms(int ms);

/* The program is killed with everything it started if it has not ended after so many seconds.
 * Replaces an earlier deadline. */
void tap_deadline(int seconds);

/* ---- for tap_ranks.c ---- */

int tap_scaled(int seconds); /* by TAP_TIMEOUT_SCALE */
/* Called, in a signal handler, when the deadline has passed. */
void tap_on_deadline(void (*fn)(void));
/* This process is from now on a rank: its points are its own, and it has no deadline. */
void tap_become_rank(int rank);
int tap_num_failed(void);

/* ---- ranks ---- */

/* Zeroed memory that this process and the ranks it forks later share; never freed. */
void *tap_shared(size_t bytes);
/* A TCP port p of 127.0.0.1 that was free a moment ago, as was p + 1; no other test program gets p
 * while this one runs. */
int tap_free_port(void);
/* Descriptors this process has open now, but for those that hold ports. */
int tap_num_fds(void);

/* Runs fn(rank, ctx) in num_ranks processes of one new process group; fn returns 0 when good.
 * After timeout_s the group is killed. On failure every rank's output is printed. Returns the
 * number of ranks that failed. */
int tap_spawn_ranks(int num_ranks, int (*fn)(int rank, void *ctx), void *ctx, int timeout_s);

/* The same in steps, for tests that signal ranks. */
struct tap_ranks {
    int num_ranks;
    pid_t group;
    pid_t *pid;
    int *status;    /* as waitpid() gives it; -1 while the rank runs */
    int *sent;      /* last signal the test sent, 0 if none */
    int *output_fd; /* stdout and stderr of the rank together */
    bool timed_out;
};

/* Returns 0, or -1 with nothing started. */
int tap_ranks_start(struct tap_ranks *t, int num_ranks, int (*fn)(int rank, void *ctx),
                    void *ctx);
int tap_ranks_signal(struct tap_ranks *t, int rank, int sig);
/* Waits for one rank only; true when it has ended. */
bool tap_ranks_wait_one(struct tap_ranks *t, int rank, int timeout_s);
/* Waits for all, kills what is left, frees everything but status (call tap_ranks_free).
 * A rank that died of a signal the test sent, or was left stopped by the test, has not failed.
 * Returns the number of failed ranks. */
int tap_ranks_wait(struct tap_ranks *t, int timeout_s);
/* What the rank has printed so far, as a string to free(). Before tap_ranks_wait() only. */
char *tap_ranks_output(struct tap_ranks *t, int rank);
void tap_ranks_free(struct tap_ranks *t);

/* Runs fn(rank, ctx) in num_ranks threads of this process, returns how many did not return 0. */
int tap_run_threads(int num_ranks, int (*fn)(int rank, void *ctx), void *ctx);

#endif
