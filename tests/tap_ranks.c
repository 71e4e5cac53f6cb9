/* SPDX-License-Identifier: MIT */
/*
 * The ranks of a test program: processes that are forked, watched, signalled and in the end killed,
 * and threads. Owns those processes. Ranks write into memory files, so that nothing has to be
 * drained while they run.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/tap.h"

#define MAX_GROUPS 64

/* Process groups alive now; read by the watchdog's signal handler. */
static volatile pid_t groups[MAX_GROUPS];

static void note_group(pid_t from, pid_t to) {
    for (int i = 0; i < MAX_GROUPS; i++) {
        if (groups[i] == from) {
            groups[i] = to;
            return;
        }
    }
}

static void kill_groups(void) {
    for (int i = 0; i < MAX_GROUPS; i++) {
        if (groups[i] > 0) {
            kill(-groups[i], SIGKILL);
        }
    }
}

/* The life of a rank: waits until all are forked, runs fn, exits through exit() so that leak
 * checks and coverage see it. */
static void rank_main(int rank, int gate, int output, pid_t parent, int (*fn)(int, void *),
                      void *ctx) {
    char byte;
    int rc;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
        _exit(1);
    }
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    close(output);
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (read(gate, &byte, 1) < 0 && errno == EINTR) {
    }
    close(gate);
    tap_become_rank(rank);
    memset((void *)groups, 0, sizeof(groups));
    rc = fn(rank, ctx);
    fflush(NULL);
    if (rc == 0 && tap_num_failed()) {
        rc = 1;
    }
    exit(rc == 0 ? 0 : (rc & 0xff) ? rc & 0xff : 1);
}

static int open_output(void) {
    int fd = memfd_create("rank-output", MFD_CLOEXEC);

    return fd;
}

int tap_ranks_start(struct tap_ranks *t, int n, int (*fn)(int, void *), void *ctx) {
    pid_t parent = getpid();
    int gate[2];

    memset(t, 0, sizeof(*t));
    t->num_ranks = n;
    t->pid = calloc((size_t)n, sizeof(*t->pid));
    t->status = calloc((size_t)n, sizeof(*t->status));
    t->sent = calloc((size_t)n, sizeof(*t->sent));
    t->output_fd = calloc((size_t)n, sizeof(*t->output_fd));
    if (!t->pid || !t->status || !t->sent || !t->output_fd || pipe(gate) != 0) {
        tap_ranks_free(t);
        return -1;
    }
    fflush(NULL);
    for (int r = 0; r < n; r++) {
        t->status[r] = -1;
        t->output_fd[r] = open_output();
        t->pid[r] = t->output_fd[r] < 0 ? -1 : fork();
        if (t->pid[r] == 0) {
            close(gate[1]);
            for (int other = 0; other < r; other++) {
                close(t->output_fd[other]);
            }
            rank_main(r, gate[0], t->output_fd[r], parent, fn, ctx);
        }
        if (t->pid[r] < 0) {
            diag("cannot start rank %d: %s", r, strerror(errno));
            if (t->group > 0) {
                kill(-t->group, SIGKILL);
            }
            for (int other = 0; other < r; other++) {
                waitpid(t->pid[other], NULL, 0);
                close(t->output_fd[other]);
            }
            close(gate[0]);
            close(gate[1]);
            tap_ranks_free(t);
            return -1;
        }
        /* Ranks wait at the gate, so the parent alone can do this before they run. */
        t->group = r == 0 ? t->pid[0] : t->group;
        setpgid(t->pid[r], t->group);
    }
    note_group(0, t->group);
    tap_on_deadline(kill_groups);
    close(gate[0]);
    close(gate[1]);
    return 0;
}

int tap_ranks_signal(struct tap_ranks *t, int rank, int sig) {
    t->sent[rank] = sig;
    return t->status[rank] == -1 ? kill(t->pid[rank], sig) : -1;
}

static bool ended(struct tap_ranks *t, int rank) {
    int status;

    if (t->status[rank] == -1 && waitpid(t->pid[rank], &status, WNOHANG) == t->pid[rank]) {
        t->status[rank] = status;
    }
    return t->status[rank] != -1;
}

bool tap_ranks_wait_one(struct tap_ranks *t, int rank, int timeout_s) {
    double limit = tap_now() + tap_scaled(timeout_s);

    while (!ended(t, rank)) {
        if (tap_now() > limit) {
            return false;
        }
        tap_sleep_ms(2);
    }
    return true;
}

static bool is_failure(const struct tap_ranks *t, int rank) {
    int status = t->status[rank];

    if (WIFEXITED(status)) {
        return WEXITSTATUS(status) != 0;
    }
    if (t->sent[rank] == SIGSTOP && WTERMSIG(status) == SIGKILL) {
        return t->timed_out;
    }
    return t->sent[rank] == 0 || WTERMSIG(status) != t->sent[rank];
}

char *tap_ranks_output(struct tap_ranks *t, int rank) {
    off_t bytes = lseek(t->output_fd[rank], 0, SEEK_CUR);
    char *text = calloc(1, (size_t)(bytes > 0 ? bytes : 0) + 1);

    if (text && bytes > 0 && pread(t->output_fd[rank], text, (size_t)bytes, 0) < 0) {
        text[0] = 0;
    }
    return text;
}

/* On failure everything the ranks said; otherwise what the library logged, on stderr, where
 * the runner looks for unannounced warnings. */
static void print_output(struct tap_ranks *t, int rank, bool any_failed) {
    char *text = tap_ranks_output(t, rank);
    char *rest = text;
    char *piece;

    while (rest && (piece = strsep(&rest, "\n")) != NULL) {
        if (!*piece) {
            continue;
        }
        if (any_failed) {
            diag("[rank %d] %s", rank, piece);
        }
        if (strncmp(piece, "ep: ", 4) == 0 || strncmp(piece, "libep", 5) == 0) {
            fprintf(stderr, "%s\n", piece);
        }
    }
    free(text);
}

static void print_end(const struct tap_ranks *t, int rank) {
    int status = t->status[rank];

    if (WIFSIGNALED(status)) {
        diag("[rank %d] died of signal %d (%s)%s", rank, WTERMSIG(status),
             strsignal(WTERMSIG(status)), is_failure(t, rank) ? "" : ", sent by the test");
    } else {
        diag("[rank %d] exit status %d", rank, WEXITSTATUS(status));
    }
}

int tap_ranks_wait(struct tap_ranks *t, int timeout_s) {
    double limit = tap_now() + tap_scaled(timeout_s);
    int failed = 0;

    for (;;) {
        bool all = true;

        for (int r = 0; r < t->num_ranks; r++) {
            all &= ended(t, r) || t->sent[r] == SIGSTOP;
        }
        t->timed_out = !all && tap_now() > limit;
        if (all || t->timed_out) {
            break;
        }
        tap_sleep_ms(2);
    }
    if (t->timed_out) {
        diag("ranks still running after %d s; killing them", tap_scaled(timeout_s));
        for (int r = 0; r < t->num_ranks; r++) {
            if (t->status[r] == -1) {
                diag("[rank %d] was still running", r);
            }
        }
    }
    kill(-t->group, SIGKILL); /* also children of ranks */
    for (int r = 0; r < t->num_ranks; r++) {
        while (t->status[r] == -1 && waitpid(t->pid[r], &t->status[r], 0) < 0 &&
               errno == EINTR) {
        }
        failed += is_failure(t, r);
    }
    note_group(t->group, 0);
    for (int r = 0; r < t->num_ranks; r++) {
        if (failed) {
            print_end(t, r);
        }
        print_output(t, r, failed != 0);
        close(t->output_fd[r]);
    }
    free(t->output_fd);
    free(t->pid);
    free(t->sent);
    t->output_fd = t->sent = NULL;
    t->pid = NULL;
    return failed;
}

void tap_ranks_free(struct tap_ranks *t) {
    free(t->pid);
    free(t->status);
    free(t->sent);
    free(t->output_fd);
    memset(t, 0, sizeof(*t));
}

int tap_spawn_ranks(int n, int (*fn)(int, void *), void *ctx, int timeout_s) {
    struct tap_ranks t;
    int failed;

    if (tap_ranks_start(&t, n, fn, ctx) != 0) {
        return n;
    }
    failed = tap_ranks_wait(&t, timeout_s);
    tap_ranks_free(&t);
    return failed;
}

struct thread_rank {
    int rank;
    int result;
    int (*fn)(int, void *);
    void *ctx;
    pthread_t thread;
    bool started;
};

static void *thread_main(void *arg) {
    struct thread_rank *r = arg;

    r->result = r->fn(r->rank, r->ctx);
    return NULL;
}

int tap_run_threads(int n, int (*fn)(int, void *), void *ctx) {
    struct thread_rank *ranks = calloc((size_t)n, sizeof(*ranks));
    int failed = 0;

    if (!ranks) {
        return n;
    }
    for (int r = 0; r < n; r++) {
        ranks[r] = (struct thread_rank){.rank = r, .result = -1, .fn = fn, .ctx = ctx};
        ranks[r].started = pthread_create(&ranks[r].thread, NULL, thread_main, &ranks[r]) == 0;
        if (!ranks[r].started) {
            diag("cannot start thread %d", r);
        }
    }
    for (int r = 0; r < n; r++) {
        if (ranks[r].started) {
            pthread_join(ranks[r].thread, NULL);
        }
        if (ranks[r].result != 0) {
            diag("[rank %d] returned %d", r, ranks[r].result);
            failed++;
        }
    }
    free(ranks);
    return failed;
}
