/* SPDX-License-Identifier: MIT */
/*
 * Time: the monotonic clock, deadlines, sleeping, and waiting on a condition with a deadline.
 *
 * Owns what was left out of the clock of deadlines. Runs on any thread. The only file that reads a clock, so that a wait can be
 * traced to one place. Deadlines are absolute: handing one down a call chain cannot stretch it.
 * Must not use the wall clock: a wait must survive its being set.
 */
#include "src/base/base.h"

#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdatomic.h>

int64_t epi_now_ns(void) {
    struct timespec now = {0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * EPI_NS_PER_S + now.tv_nsec;
}

/*
 * The clock of deadlines: that of epi_now_ns without the time in which this process did not run.
 * Every wait looks at it several times a second, so that a longer step means that the process was
 * stopped, or that nobody was waiting. Such a step counts as MOST_STEP_NS.
 */
#define MOST_STEP_NS (250 * EPI_NS_PER_MS)
#define NAP_NS (100 * EPI_NS_PER_MS) /* of a wait, at most */
#define MOST_TRIES 100000            /* a forked child may find the flag set for good */

static atomic_flag is_stepping = ATOMIC_FLAG_INIT; /* guards the two */
static _Atomic int64_t last_ns, skipped_ns;

static int64_t deadline_clock(void) {
    for (int i = 0; i < MOST_TRIES && atomic_flag_test_and_set(&is_stepping); i++) {
        if (i == MOST_TRIES - 1) {
            return epi_now_ns() - atomic_load(&skipped_ns);
        }
        sched_yield();
    }
    const int64_t now_ns = epi_now_ns(), step_ns = now_ns - atomic_load(&last_ns);
    if (step_ns > MOST_STEP_NS && atomic_load(&last_ns) != 0) {
        atomic_fetch_add(&skipped_ns, step_ns - MOST_STEP_NS);
    }
    atomic_store(&last_ns, now_ns);
    const int64_t at_ns = now_ns - atomic_load(&skipped_ns);
    atomic_flag_clear(&is_stepping);
    return at_ns;
}

int64_t epi_ran_ns(void) {
    return deadline_clock();
}

struct epi_deadline epi_deadline_after(int64_t ns) {
    int64_t now_ns = deadline_clock();
    if (ns > INT64_MAX - now_ns) {
        return epi_deadline_never();
    }
    return (struct epi_deadline){.at_ns = ns > 0 ? now_ns + ns : now_ns};
}

struct epi_deadline epi_deadline_never(void) {
    return (struct epi_deadline){.at_ns = INT64_MAX};
}

struct epi_deadline epi_deadline_min(struct epi_deadline a, struct epi_deadline b) {
    return a.at_ns < b.at_ns ? a : b;
}

int64_t epi_deadline_left_ns(struct epi_deadline d) {
    if (d.at_ns == INT64_MAX) {
        return INT64_MAX;
    }
    int64_t now_ns = deadline_clock();
    return d.at_ns > now_ns ? d.at_ns - now_ns : 0;
}

bool epi_deadline_expired(struct epi_deadline d) {
    return epi_deadline_left_ns(d) == 0;
}

int epi_deadline_left_ms(struct epi_deadline d) {
    int64_t left_ns = epi_deadline_left_ns(d);
    if (left_ns == INT64_MAX) {
        return INT_MAX;
    }
    left_ns = left_ns < NAP_NS ? left_ns : NAP_NS;
    return (int)(left_ns / EPI_NS_PER_MS + (left_ns % EPI_NS_PER_MS != 0));
}

static struct timespec to_timespec(int64_t ns) {
    return (struct timespec){.tv_sec = (time_t)(ns / EPI_NS_PER_S),
                             .tv_nsec = (long)(ns % EPI_NS_PER_S)};
}

void epi_sleep_ns(int64_t ns) {
    if (ns <= 0) {
        return;
    }
    const int64_t now_ns = epi_now_ns();
    struct timespec until = to_timespec(ns < INT64_MAX - now_ns ? now_ns + ns : INT64_MAX);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {
    }
}

int epi_cond_init(pthread_cond_t *cond) {
    pthread_condattr_t attr;
    int err = pthread_condattr_init(&attr);
    if (err != 0) {
        return err;
    }
    err = pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    if (err == 0) {
        err = pthread_cond_init(cond, &attr);
    }
    pthread_condattr_destroy(&attr);
    return err;
}

bool epi_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, struct epi_deadline d) {
    if (d.at_ns == INT64_MAX) {
        pthread_cond_wait(cond, mutex);
        return true;
    }
    const int64_t left_ns = epi_deadline_left_ns(d);
    const struct timespec until =
        to_timespec(epi_now_ns() + (left_ns < NAP_NS ? left_ns : NAP_NS));
    return pthread_cond_timedwait(cond, mutex, &until) != ETIMEDOUT || !epi_deadline_expired(d);
}
