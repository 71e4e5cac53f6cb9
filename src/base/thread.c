/* SPDX-License-Identifier: MIT */
/*
 * Starting threads the way a library must: quiet towards the program it lives in.
 *
 * Owns nothing: the caller joins what it started. A thread of ours blocks every asynchronous
 * signal, so that the program's handlers run on the program's threads; faults (SIGSEGV and its
 * kin) and profiling stay deliverable, because they belong to the thread that causes them.
 * Must not be the only place that counts on a thread's existing: starting one can fail.
 */
#include "src/base/base.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

int epi_thread_start(pthread_t *thread, void *(*run)(void *), void *arg, const char *name) {
    static const int deliverable[] = {SIGSEGV, SIGBUS, SIGFPE,  SIGILL,
                                      SIGTRAP, SIGSYS, SIGABRT, SIGPROF};
    if (epi_alloc_should_fail()) {
        return EAGAIN;
    }
    sigset_t blocked;
    sigset_t before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof(deliverable) / sizeof(deliverable[0]); i++) {
        sigdelset(&blocked, deliverable[i]);
    }
    /* A thread inherits the mask of its creator: set it here, so no signal slips in between. */
    int err = pthread_sigmask(SIG_BLOCK, &blocked, &before);
    if (err != 0) {
        return err;
    }
    err = pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (err == 0) {
        char short_name[16] = {0}; /* the kernel's limit, the final 0 included */
        strncpy(short_name, name, sizeof(short_name) - 1);
        pthread_setname_np(*thread, short_name);
    }
    return err;
}
