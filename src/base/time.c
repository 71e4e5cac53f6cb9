/* SPDX-License-Identifier: MIT */
/*
 * Time: the monotonic clock, deadlines, sleeping, and waiting on a condition with a deadline.
 *
 * Owns no state. Runs on any thread. The only file that reads a clock, so that a wait can be
 * traced to one place. Deadlines are absolute: handing one down a call chain cannot stretch it.
 * Must not use the wall clock: a wait must survive its being set.
 */
#include "src/base/base.h"

#include <errno.h>
#include <limits.h>

int64_t epi_now_ns(void) {
    struct timespec now = {0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * EPI_NS_PER_S + now.tv_nsec;
}

struct epi_deadline epi_deadline_after(int64_t ns) {
    int64_t now_ns = epi_now_ns();
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
    int64_t now_ns = epi_now_ns();
    return d.at_ns > now_ns ? d.at_ns - now_ns : 0;
}

bool epi_deadline_expired(struct epi_deadline d) {
    return epi_deadline_left_ns(d) == 0;
}

int epi_deadline_left_ms(struct epi_deadline d) {
    int64_t left_ns = epi_deadline_left_ns(d);
    int64_t left_ms = left_ns / EPI_NS_PER_MS + (left_ns % EPI_NS_PER_MS != 0);
    return left_ms < INT_MAX ? (int)left_ms : INT_MAX;
}

static struct timespec to_timespec(int64_t ns) {
    return (struct timespec){.tv_sec = (time_t)(ns / EPI_NS_PER_S),
                             .tv_nsec = (long)(ns % EPI_NS_PER_S)};
}

void epi_sleep_ns(int64_t ns) {
    if (ns <= 0) {
        return;
    }
    struct timespec until = to_timespec(epi_deadline_after(ns).at_ns);
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
    struct timespec until = to_timespec(d.at_ns > 0 ? d.at_ns : 0);
    return pthread_cond_timedwait(cond, mutex, &until) != ETIMEDOUT;
}
