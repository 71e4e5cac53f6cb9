/* SPDX-License-Identifier: MIT */
/*
 * N child processes: started, watched until the last has ended, and ended when one fails, a
 * signal comes or the time is over.
 *
 * Owns one process group: its leader is a guard that does nothing but kill the group when this
 * process is gone, even by SIGKILL, so that no child and no child of a child is left behind.
 * One thread, which takes signals through a signalfd. Must not know what the children are.
 */
#include "tools/tool.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

/* The guard holds the reading end of a pipe whose only writer is this process. */
static bool start_guard(struct crew *crew, int ends[2]) {
    if (pipe2(ends, O_CLOEXEC) != 0) {
        return false;
    }
    crew->guard = fork();
    if (crew->guard == 0) {
        sigset_t all;
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, NULL);
        setpgid(0, 0);
        close(ends[1]);
        char byte;
        while (read(ends[0], &byte, 1) < 0) {
        }
        kill(0, SIGKILL);
        _exit(0);
    }
    close(ends[0]);
    if (crew->guard > 0) {
        setpgid(crew->guard, crew->guard);
    }
    return crew->guard > 0;
}

/* 0: nothing is sent, but what has not ended when the grace is over is killed. */
static void end_all(struct crew *crew, int sig) {
    if (sig != 0) {
        kill(-crew->guard, sig); /* the guard blocks all but SIGKILL */
    }
    if (!crew->ending) {
        crew->kill_at = epi_deadline_after(crew->grace_ns);
    }
    crew->ending = true;
    crew->timeout = epi_deadline_never();
    if (sig == SIGKILL) {
        crew->killed = true;
        crew->kill_at = epi_deadline_never();
    }
}

EPI_PRINTF(4, 5)
static void complain(struct crew *crew, int i, int status, const char *fmt, ...) {
    char text[160];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    crew->say(crew->arg, i, text);
    crew->status = crew->status == 0 ? status : crew->status;
}

static bool start(struct crew *crew, int i, const sigset_t *mask) {
    pid_t parent = getpid();
    if (crew->prepare && !crew->prepare(crew->arg, i)) {
        return false;
    }
    pid_t pid = fork();
    if (pid == 0) {
        setpgid(0, crew->guard);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) {
            _exit(1);
        }
        sigprocmask(SIG_SETMASK, mask, NULL);
        crew->child(crew->arg, i);
        _exit(1);
    }
    int error = errno;
    if (pid > 0) {
        setpgid(pid, crew->guard); /* here too, so that no signal comes before it */
        crew->pids[i] = pid;
        crew->num_live++;
    }
    if (crew->started) {
        crew->started(crew->arg, i);
    }
    errno = error;
    return pid > 0;
}

static void take_signals(struct crew *crew, int signal_fd) {
    struct signalfd_siginfo info;
    while (read(signal_fd, &info, sizeof(info)) == sizeof(info)) {
        int sig = (int)info.ssi_signo;
        if (sig != SIGCHLD) {
            bool again = crew->signal == sig;
            crew->signal = sig;
            complain(crew, -1, 128 + sig, "ended by signal %d (%s)", sig, strsignal(sig));
            end_all(crew, again || crew->soft_signal == 0 ? SIGKILL : sig);
        }
    }
    for (int i = 0; i < crew->num; i++) {
        int status = 0;
        if (crew->pids[i] == 0 || waitpid(crew->pids[i], &status, WNOHANG) != crew->pids[i]) {
            continue;
        }
        crew->pids[i] = 0;
        crew->num_live--;
        if (status == 0 || crew->killed) {
            continue;
        }
        if (WIFSIGNALED(status)) {
            complain(crew, i, 128 + WTERMSIG(status), "rank %d was killed by signal %d (%s)", i,
                     WTERMSIG(status), strsignal(WTERMSIG(status)));
        } else {
            complain(crew, i, WEXITSTATUS(status), "rank %d exited with status %d", i,
                     WEXITSTATUS(status));
        }
        if (!crew->ending) {
            end_all(crew, crew->soft_signal);
        }
    }
}

static void watch(struct crew *crew, int signal_fd) {
    while (crew->num_live > 0) {
        struct epi_deadline next = epi_deadline_min(crew->timeout, crew->kill_at);
        crew->wait(crew->arg, signal_fd, epi_deadline_left_ms(next));
        take_signals(crew, signal_fd);
        if (!crew->ending && epi_deadline_expired(crew->timeout)) {
            complain(crew, -1, 124, "not done after %lld s", (long long)crew->timeout_s);
            end_all(crew, crew->soft_signal != 0 ? crew->soft_signal : SIGKILL);
        }
        if (crew->ending && epi_deadline_expired(crew->kill_at)) {
            end_all(crew, SIGKILL);
        }
    }
}

void crew_run(struct crew *crew) {
    const int taken[] = {SIGCHLD, SIGINT, SIGTERM, SIGHUP};
    sigset_t handled, before;
    int ends[2];
    sigemptyset(&handled);
    for (size_t i = 0; i < sizeof(taken) / sizeof(taken[0]); i++) {
        sigaddset(&handled, taken[i]);
    }
    crew->kill_at = epi_deadline_never();
    crew->timeout = crew->timeout_s > 0 ? epi_deadline_after(crew->timeout_s * EPI_NS_PER_S)
                                        : epi_deadline_never();
    fflush(NULL);
    sigprocmask(SIG_BLOCK, &handled, &before);
    crew->pids = calloc((size_t)crew->num, sizeof(*crew->pids));
    int signal_fd = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
    if (!crew->pids || signal_fd < 0 || !start_guard(crew, ends)) {
        complain(crew, -1, 1, "cannot start any rank: %s", strerror(errno));
    } else {
        for (int i = 0; i < crew->num && !crew->ending; i++) {
            if (!start(crew, i, &before)) {
                complain(crew, i, 1, "cannot start rank %d: %s", i, strerror(errno));
                end_all(crew, SIGKILL);
            }
        }
        watch(crew, signal_fd);
        kill(-crew->guard, SIGKILL); /* what the children started and left, and the guard */
        waitpid(crew->guard, NULL, 0);
        close(ends[1]);
    }
    close(signal_fd);
    free(crew->pids);
    sigprocmask(SIG_SETMASK, &before, NULL);
}
