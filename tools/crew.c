/* SPDX-License-Identifier: MIT */
/*
 * N child processes: started, watched until the last has ended, and ended when one fails, a
 * signal comes or the time is over.
 *
 * Owns the guard (guard.c), which is the parent of the children, and all that comes of both: this
 * process, too, is given what the guard would leave behind if it were killed. One thread, which
 * takes signals through a signalfd. Must not know what the children are; must not wait for
 * anything that a signal cannot end.
 */
#include "tools/crew.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define KILL_NS (7 * EPI_NS_PER_S) /* for the guard to end everything */
#define LAST_NS EPI_NS_PER_S       /* for what is pending when all have ended */
#define PASS_MS 50

/* To all that comes from here but the guard, which must go on. */
static void signal_all(struct crew *crew, int sig) {
    const bool by_group = sig != SIGKILL && sig != SIGSTOP; /* the others it blocks */
    struct epi_process *below = NULL;
    if (by_group && crew->guard > 0) {
        kill(-crew->guard, sig);
    }
    const int num = processes_below(getpid(), crew->spared, crew->num_spared, &below);
    for (int i = 0; i < num; i++) {
        if (below[i].pid != crew->guard && !(by_group && below[i].group == crew->guard)) {
            kill(below[i].pid, sig);
        }
    }
    if (num < 0 && !by_group && crew->guard > 0) { /* no /proc */
        kill(-crew->guard, sig);
    }
    free(below);
}

/* 0: nothing is sent, but what has not ended when the grace is over is killed. */
static void end_all(struct crew *crew, int sig) {
    if (sig != 0) {
        signal_all(crew, sig);
        signal_all(crew, SIGCONT); /* who was stopped hears it, too */
    }
    if (!crew->ending) {
        crew->kill_at = epi_deadline_after(crew->grace_ns);
    }
    crew->ending = true;
    crew->timeout = epi_deadline_never();
    if (sig == SIGKILL && !crew->killed) {
        crew->killed = true;
        crew->kill_at = epi_deadline_after(KILL_NS);
        close(crew->control);
        crew->control = -1;
    }
}

EPI_PRINTF(4, 5)
static void complain(struct crew *crew, int i, int status, const char *fmt, ...) {
    char text[240];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    crew->say(crew->arg, i, text);
    crew->status = crew->status == 0 ? status : crew->status;
}

void crew_fail(struct crew *crew, int status, const char *why) {
    complain(crew, -1, status, "%s", why);
    if (!crew->ending) {
        end_all(crew, crew->soft_signal);
    }
}

static const char *what(const struct crew *crew) {
    return crew->what ? crew->what : "rank";
}

/* ---- what the guard tells -------------------------------------------------------------------- */

static void child_ended(struct crew *crew, int i, int status) {
    crew->num_live--;
    if (status == 0 || crew->killed) {
        return;
    }
    if (WIFSIGNALED(status)) {
        complain(crew, i, 128 + WTERMSIG(status), "%s %d was killed by signal %d (%s)",
                 what(crew), crew->first + i, WTERMSIG(status), strsignal(WTERMSIG(status)));
    } else {
        complain(crew, i, WEXITSTATUS(status), "%s %d exited with status %d", what(crew),
                 crew->first + i, WEXITSTATUS(status));
    }
    if (!crew->ending) {
        end_all(crew, crew->soft_signal);
    }
}

static void add_left(struct crew *crew, const struct report *report) {
    const size_t len = strlen(crew->left);
    if (crew->num_left++ < 4) {
        epi_format(crew->left + len, sizeof(crew->left) - len, "%s%s (%d)", len > 0 ? ", " : "",
                   report->name, report->index);
    }
}

static void guard_ended(struct crew *crew) {
    close(crew->reports);
    crew->reports = -1;
    while (waitpid(crew->guard, NULL, 0) < 0 && errno == EINTR) {
    }
    crew->guard = 0;
    if (crew->num_live > 0 && !crew->killed) {
        complain(crew, -1, 1, "the process that watches the ranks was killed");
    } else if (crew->num_left > 0 && !crew->killed) {
        char text[240];
        epi_format(text, sizeof(text), "ended what ranks had left running: %s%s", crew->left,
                   crew->num_left > 4 ? ", ..." : "");
        crew->say(crew->arg, -1, text);
    }
    crew->num_live = 0;
    if (!processes_end(crew->spared, crew->num_spared)) {
        complain(crew, -1, 1, "some processes that ranks have started cannot be ended");
    }
    if (crew->ending) {
        crew->kill_at = epi_deadline_min(crew->kill_at, epi_deadline_after(LAST_NS));
    }
}

static void read_reports(struct crew *crew) {
    struct report report;
    ssize_t n = -1;
    while (crew->reports >= 0 && (n = read(crew->reports, &report, sizeof(report))) > 0) {
        if (report.what == REPORT_STARTED) {
            crew->all_started = true;
        } else if (report.what == REPORT_ENDED) {
            child_ended(crew, report.index, report.status);
        } else if (report.what == REPORT_LEFT) {
            add_left(crew, &report);
        } else {
            crew->num_live -= crew->num - report.index;
            complain(crew, report.index, 1, "cannot start %s %d: %s", what(crew),
                     crew->first + report.index, strerror(report.status));
            end_all(crew, SIGKILL);
        }
    }
    if (crew->reports >= 0 && n == 0) {
        guard_ended(crew);
    }
}

/* ---- signals --------------------------------------------------------------------------------- */

static struct epi_deadline later(struct epi_deadline d, int64_t ns) {
    d.at_ns += d.at_ns != INT64_MAX ? ns : 0;
    return d;
}

/* Stops the children and then this process, as the terminal asks; the time until somebody lets it go
 * on does not count. */
static void suspend(struct crew *crew) {
    const int64_t from_ns = epi_now_ns();
    sigset_t stop;
    sigemptyset(&stop);
    sigaddset(&stop, SIGTSTP);
    signal_all(crew, SIGSTOP);
    signal_all(crew, SIGSTOP); /* also what was just being started */
    raise(SIGTSTP);
    sigprocmask(SIG_UNBLOCK, &stop, NULL); /* here it stops */
    sigprocmask(SIG_BLOCK, &stop, NULL);
    crew->timeout = later(crew->timeout, epi_now_ns() - from_ns);
    crew->kill_at = later(crew->kill_at, epi_now_ns() - from_ns);
    signal_all(crew, SIGCONT);
}

static void take_signals(struct crew *crew, int signal_fd) {
    struct signalfd_siginfo info;
    while (read(signal_fd, &info, sizeof(info)) == sizeof(info)) {
        const int sig = (int)info.ssi_signo;
        if (sig == SIGTSTP) {
            suspend(crew);
        } else if (sig == SIGCONT || sig == SIGUSR1 || sig == SIGUSR2) {
            signal_all(crew, sig);
        } else {
            const bool again = crew->signal == sig;
            crew->signal = sig;
            complain(crew, -1, 128 + sig, "ended by signal %d (%s)", sig, strsignal(sig));
            end_all(crew, again || crew->soft_signal == 0 ? SIGKILL : sig);
        }
    }
}

/* ---- the whole ------------------------------------------------------------------------------- */

static bool is_pending(const struct crew *crew) {
    return crew->pending && !crew->killed && crew->pending(crew->arg);
}

static void watch(struct crew *crew, int watch_fd, int signal_fd) {
    while (crew->reports >= 0 || is_pending(crew)) {
        const struct epi_deadline next = epi_deadline_min(crew->timeout, crew->kill_at);
        const int ms = epi_deadline_left_ms(next);
        const bool is_short = crew->killed || crew->reports < 0;
        crew->wait(crew->arg, watch_fd, is_short && ms > PASS_MS ? PASS_MS : ms);
        read_reports(crew);
        if (crew->all_started) {
            take_signals(crew, signal_fd);
        }
        if (!crew->ending && epi_deadline_expired(crew->timeout)) {
            complain(crew, -1, 124, "not done after %lld s", (long long)crew->timeout_s);
            end_all(crew, crew->soft_signal != 0 ? crew->soft_signal : SIGKILL);
        }
        if (crew->killed && crew->reports >= 0) { /* also what was just being started */
            signal_all(crew, SIGKILL);
            kill(crew->guard, epi_deadline_expired(crew->kill_at) ? SIGKILL : SIGCONT);
        } else if (crew->ending && epi_deadline_expired(crew->kill_at)) {
            end_all(crew, SIGKILL);
        }
    }
}

/* Forks the guard, between two pipes. */
static bool start_guard(struct crew *crew, const sigset_t *mask) {
    int control[2] = {-1, -1}, reports[2] = {-1, -1};
    if (pipe2(control, O_CLOEXEC) != 0 || pipe2(reports, O_CLOEXEC) != 0 ||
        (crew->guard = fork()) < 0) {
        for (int i = 0; i < 2; i++) {
            close(control[i]);
            close(reports[i]);
        }
        crew->guard = 0;
        return false;
    }
    if (crew->guard == 0) {
        close(control[1]);
        close(reports[0]);
        guard_run(crew, control[0], reports[1], mask);
    }
    setpgid(crew->guard, crew->guard);
    close(control[0]);
    close(reports[1]);
    fcntl(reports[0], F_SETFL, O_NONBLOCK);
    crew->control = control[1];
    crew->reports = reports[0];
    crew->num_live = crew->num;
    return true;
}

/* What this process had for children before: not ours. */
static void note_children(struct crew *crew) {
    struct epi_process *below = NULL;
    const int num = processes_below(getpid(), NULL, 0, &below);
    crew->spared = num > 0 ? calloc((size_t)num, sizeof(*crew->spared)) : NULL;
    for (int i = 0; i < num && crew->spared; i++) {
        crew->spared[crew->num_spared++] = below[i].pid;
    }
    free(below);
}

/* One that can be polled for both. */
static int join(int a, int b) {
    const int fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    return fd >= 0 && epoll_ctl(fd, EPOLL_CTL_ADD, a, &event) == 0 &&
                   epoll_ctl(fd, EPOLL_CTL_ADD, b, &event) == 0
               ? fd
               : -1;
}

void crew_run(struct crew *crew) {
    const int taken[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT, SIGUSR1, SIGUSR2};
    const size_t num_taken =
        sizeof(taken) / sizeof(taken[0]) - (crew->soft_signal == 0 ? 2 : 0);
    sigset_t handled, before;
    sigemptyset(&handled);
    for (size_t i = 0; i < num_taken; i++) {
        sigaddset(&handled, taken[i]);
    }
    crew->control = crew->reports = -1;
    crew->kill_at = epi_deadline_never();
    crew->timeout = crew->timeout_s > 0 ? epi_deadline_after(crew->timeout_s * EPI_NS_PER_S)
                                        : epi_deadline_never();
    fflush(NULL);
    note_children(crew);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    sigprocmask(SIG_BLOCK, &handled, &before);
    int signal_fd = -1, watch_fd = -1;
    if ((crew->prepare && !crew->prepare(crew->arg)) || !start_guard(crew, &before)) {
        complain(crew, -1, 1, "cannot start any rank: %s", strerror(errno));
    }
    if (crew->started) {
        crew->started(crew->arg);
    }
    if (crew->guard > 0) {
        signal_fd = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
        watch_fd = join(signal_fd, crew->reports);
        if (watch_fd < 0) {
            complain(crew, -1, 1, "cannot watch the ranks: %s", strerror(errno));
            end_all(crew, SIGKILL);
        }
    }
    watch(crew, watch_fd, signal_fd);
    if (crew->control >= 0) {
        close(crew->control);
    }
    close(watch_fd);
    close(signal_fd);
    free(crew->spared);
    prctl(PR_SET_CHILD_SUBREAPER, 0);
    sigprocmask(SIG_SETMASK, &before, NULL);
}
