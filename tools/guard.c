/* SPDX-License-Identifier: MIT */
/*
 * The process between `ep` and the children of a crew, and what it takes to find everything that
 * comes of them.
 *
 * The guard starts the children, tells how each has ended, and is the one to whom the kernel gives
 * what they leave behind, in sessions of their own too. It ends all of that when the last child has
 * ended, or when `ep` is gone, even by SIGKILL. One thread, which takes no signal: those are for
 * the children. Must not print: it tells crew.c.
 */
#include "tools/crew.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define LEFT_NS EPI_NS_PER_S /* for what children leave behind, to end by itself */
#define END_NS (5 * EPI_NS_PER_S)
#define PASS_NS (5 * EPI_NS_PER_MS)

/* ---- finding processes --------------------------------------------------------------------- */

/* All processes of the machine that can be seen; -1 without /proc. */
static int read_all(struct epi_process **out) {
    DIR *dir = opendir("/proc");
    int num = 0, room = 0;
    *out = NULL;
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (num == room) {
            room = room > 0 ? 2 * room : 256;
            struct epi_process *more = realloc(*out, (size_t)room * sizeof(*more));
            if (!more) {
                break;
            }
            *out = more;
        }
        num += epi_process_see(atoi(e->d_name), &(*out)[num]);
    }
    if (dir) {
        closedir(dir);
    }
    return num > 0 ? num : -1;
}

int processes_below(pid_t root, const pid_t *spared, int num_spared, struct epi_process **out) {
    const int num = read_all(out);
    struct epi_process *all = *out;
    int found = 0;
    pid_t parent = root;
    for (int next = 0; num > 0;) {
        for (int i = found; i < num; i++) { /* those that are found are moved to the front */
            bool is_spared = false;
            for (int s = 0; s < num_spared; s++) {
                is_spared = is_spared || all[i].pid == spared[s];
            }
            if (all[i].parent == parent && !is_spared) {
                const struct epi_process p = all[i];
                all[i] = all[found];
                all[found++] = p;
            }
        }
        if (next == found) {
            break;
        }
        parent = all[next++].pid;
    }
    return num < 0 ? -1 : found;
}

bool processes_end(const pid_t *spared, int num_spared) {
    const struct epi_deadline limit = epi_deadline_after(END_NS);
    for (int num_empty = 0; num_empty < 2;) {
        struct epi_process *below = NULL;
        int num = processes_below(getpid(), spared, num_spared, &below), num_alive = 0;
        for (int i = 0; i < num; i++) {
            kill(below[i].pid, SIGKILL);
            num_alive += below[i].state != 'Z';
        }
        free(below);
        pid_t pid;
        while ((pid = waitpid(-1, NULL, WNOHANG)) > 0) {
        }
        if ((pid < 0 && errno == ECHILD) || num < 0) {
            return num >= 0;
        }
        if (epi_deadline_expired(limit)) {
            return false;
        }
        num_empty = num_alive == 0 ? num_empty + 1 : 0;
        epi_sleep_ns(PASS_NS);
    }
    return true;
}

/* ---- the guard ------------------------------------------------------------------------------- */

struct guard {
    struct crew *crew;
    pid_t *pids; /* 0: has ended */
    int num_live;
    int control, reports, signals;
    struct epi_deadline left_at;
};

static void tell(const struct guard *g, struct report report) {
    while (write(g->reports, &report, sizeof(report)) < 0 && errno == EINTR) {
    }
}

static void start_child(const struct guard *g, int i, pid_t guard, const sigset_t *mask) {
    setpgid(0, guard);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != guard) {
        _exit(1);
    }
    close(g->control);
    close(g->reports);
    close(g->signals);
    sigprocmask(SIG_SETMASK, mask, NULL);
    g->crew->child(g->crew->arg, i);
    _exit(1);
}

static void start_children(struct guard *g, const sigset_t *mask) {
    const pid_t self = getpid();
    for (int i = 0; i < g->crew->num; i++) {
        g->pids[i] = fork();
        if (g->pids[i] == 0) {
            start_child(g, i, self, mask);
        }
        if (g->pids[i] < 0) {
            tell(g, (struct report){.what = REPORT_FAILED, .index = i, .status = errno});
            g->pids[i] = 0;
            break;
        }
        setpgid(g->pids[i], self); /* here too, so that no signal comes before it */
        g->num_live++;
    }
    if (g->crew->started) {
        g->crew->started(g->crew->arg);
    }
    tell(g, (struct report){.what = REPORT_STARTED});
}

/* False: there is no process any more that came from here. */
static bool reap(struct guard *g) {
    int status = 0;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        for (int i = 0; i < g->crew->num; i++) {
            if (g->pids[i] == pid) {
                g->pids[i] = 0;
                g->num_live--;
                tell(g, (struct report){.what = REPORT_ENDED, .index = i, .status = status});
            }
        }
    }
    if (g->num_live == 0 && g->left_at.at_ns == INT64_MAX) {
        g->left_at = epi_deadline_after(LEFT_NS);
    }
    return pid == 0;
}

static void tell_left(const struct guard *g) {
    struct epi_process *below = NULL;
    const int num = processes_below(getpid(), NULL, 0, &below);
    for (int i = 0; i < num; i++) {
        struct report report = {.what = REPORT_LEFT, .index = below[i].pid};
        memcpy(report.name, below[i].name, sizeof(report.name));
        if (below[i].state != 'Z') {
            tell(g, report);
        }
    }
    free(below);
}

void guard_run(struct crew *crew, int control, int reports, const sigset_t *mask) {
    struct guard g = {.crew = crew,
                      .pids = calloc((size_t)crew->num, sizeof(*g.pids)),
                      .control = control,
                      .reports = reports,
                      .left_at = epi_deadline_never()};
    sigset_t all, child;
    sigfillset(&all);
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_SETMASK, &all, NULL);
    signal(SIGCHLD, SIG_DFL);
    setpgid(0, 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_PDEATHSIG, SIGCONT); /* a child may have stopped its whole group */
    g.signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    if (!g.pids || g.signals < 0) {
        tell(&g, (struct report){.what = REPORT_FAILED, .status = errno});
        _exit(1);
    }
    start_children(&g, mask);
    while (reap(&g)) {
        struct signalfd_siginfo info;
        struct pollfd fds[] = {{.fd = g.signals, .events = POLLIN}, {.fd = control}};
        poll(fds, 2, epi_deadline_left_ms(g.left_at));
        while (read(g.signals, &info, sizeof(info)) > 0) {
        }
        const bool left = epi_deadline_expired(g.left_at) && reap(&g);
        if (left) {
            tell_left(&g);
        }
        if (left || fds[1].revents != 0) { /* nobody holds the other end any more */
            if (!processes_end(NULL, 0)) {
                kill(0, SIGKILL);
            }
            break;
        }
    }
    _exit(0);
}
