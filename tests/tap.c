/* SPDX-License-Identifier: MIT */
/*
 * The test support declared in tap.h. Owns the counters of the running test program and the
 * processes it forks. No thread is created behind the test's back: the watchdog is a signal,
 * and ranks write into memory files, so that nothing has to be drained while they run.
 */
#include "tests/tap.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_GROUPS 64

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int num_points;
static int num_failed;
static int in_rank = -1; /* which forked rank this process is */
static uint64_t seed_value;
static bool seed_known;
/* Process groups alive now; read by the watchdog's signal handler. */
static volatile pid_t groups[MAX_GROUPS];
static bool own_group;

static void line(const char *head, const char *fmt, va_list args) {
    char text[4096];

    vsnprintf(text, sizeof(text), fmt, args);
    for (char *p = text; *p; p++) {
        if (*p == '\n') {
            *p = ' ';
        }
    }
    printf("%s%s\n", head, text);
    fflush(stdout);
}

bool ok(bool cond, const char *fmt, ...) {
    char head[32];
    va_list args;

    pthread_mutex_lock(&lock);
    num_points++;
    num_failed += !cond;
    snprintf(head, sizeof(head), "%sok %d - ", cond ? "" : "not ", num_points);
    if (in_rank < 0 || !cond) {
        va_start(args, fmt);
        line(head, fmt, args);
        va_end(args);
    }
    pthread_mutex_unlock(&lock);
    return cond;
}

void diag(const char *fmt, ...) {
    va_list args;

    pthread_mutex_lock(&lock);
    va_start(args, fmt);
    line("# ", fmt, args);
    va_end(args);
    pthread_mutex_unlock(&lock);
}

void skip(int num, const char *fmt, ...) {
    char head[32];
    va_list args;

    pthread_mutex_lock(&lock);
    for (int i = 0; i < num; i++) {
        num_points++;
        snprintf(head, sizeof(head), "ok %d # SKIP ", num_points);
        va_start(args, fmt);
        line(head, fmt, args);
        va_end(args);
    }
    pthread_mutex_unlock(&lock);
}

void skip_all(const char *fmt, ...) {
    va_list args;

    va_start(args, fmt);
    line("1..0 # SKIP ", fmt, args);
    va_end(args);
    exit(0);
}

int done_testing(void) {
    int failed;

    pthread_mutex_lock(&lock);
    if (num_points == 0) {
        num_points = num_failed = 1;
        printf("not ok 1 - the program has no test point\n");
    }
    printf("1..%d\n", num_points);
    if (num_failed) {
        printf("# %d of %d failed\n", num_failed, num_points);
    }
    fflush(stdout);
    failed = num_failed;
    pthread_mutex_unlock(&lock);
    return failed ? 1 : 0;
}

void tap_expect_log(const char *text) {
    diag("expect-log: %s", text);
}

uint64_t tap_seed(void) {
    const char *text = getenv("EP_SEED");
    struct timespec now;

    if (!seed_known) {
        seed_known = true;
        if (text && *text) {
            seed_value = strtoull(text, NULL, 0);
        } else {
            clock_gettime(CLOCK_REALTIME, &now);
            seed_value =
                ((uint64_t)now.tv_sec * 1000003u + (uint64_t)now.tv_nsec) % 1000000000u;
        }
        diag("seed %llu", (unsigned long long)seed_value);
    }
    return seed_value;
}

uint64_t tap_rand(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int tap_effort(void) {
    const char *text = getenv("TAP_EFFORT");
    int effort = text ? atoi(text) : 1;

    return effort > 0 ? effort : 1;
}

bool tap_quick(void) {
    const char *text = getenv("TAP_EFFORT");

    return text && strcmp(text, "quick") == 0;
}

double tap_now(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void tap_sleep_ms(int ms) {
    struct timespec left = {ms / 1000, (long)(ms % 1000) * 1000000};

    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
}

static int scaled(int seconds) {
    const char *text = getenv("TAP_TIMEOUT_SCALE");
    int scale = text ? atoi(text) : 1;

    return seconds * (scale > 0 ? scale : 1);
}

static void on_alarm(int sig) {
    static const char text[] = "\nBail out! the test program passed its deadline\n";
    ssize_t n = write(STDOUT_FILENO, text, sizeof(text) - 1);

    (void)sig;
    (void)n;
    for (int i = 0; i < MAX_GROUPS; i++) {
        if (groups[i] > 0) {
            kill(-groups[i], SIGKILL);
        }
    }
    if (own_group) {
        kill(0, SIGKILL);
    }
    _exit(124);
}

void tap_deadline(int seconds) {
    struct sigaction action = {.sa_handler = on_alarm};

    /* A group of its own lets the watchdog kill all; on a terminal Ctrl-C must keep working. */
    if (!own_group && !isatty(STDIN_FILENO) && !isatty(STDOUT_FILENO)) {
        own_group = setpgid(0, 0) == 0 || getpgrp() == getpid();
        prctl(PR_SET_PDEATHSIG, SIGKILL);
    }
    sigaction(SIGALRM, &action, NULL);
    alarm((unsigned)scaled(seconds));
}

void *tap_shared(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED) {
        printf("Bail out! no shared memory: %s\n", strerror(errno));
        exit(1);
    }
    return p;
}

/* A listening port, 0 for any; the socket stays open in *fd. */
static int bind_port(int port, int *fd) {
    struct sockaddr_in addr = {.sin_family = AF_INET};
    socklen_t bytes = sizeof(addr);

    addr.sin_port = htons((uint16_t)port);
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    *fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*fd < 0 || bind(*fd, (struct sockaddr *)&addr, sizeof(addr)) != 0 ||
        getsockname(*fd, (struct sockaddr *)&addr, &bytes) != 0) {
        return -1;
    }
    return ntohs(addr.sin_port);
}

int tap_free_port(void) {
    for (int tries = 0; tries < 100; tries++) {
        int first = -1;
        int second = -1;
        int port = bind_port(0, &first);
        bool good = port > 0 && port < 65535 && bind_port(port + 1, &second) > 0;

        if (first >= 0) {
            close(first);
        }
        if (second >= 0) {
            close(second);
        }
        if (good) {
            return port;
        }
    }
    printf("Bail out! no free port\n");
    exit(1);
}

int tap_num_fds(void) {
    DIR *dir = opendir("/proc/self/fd");
    int num = 0;

    if (!dir) {
        return -1;
    }
    while (readdir(dir)) {
        num++;
    }
    closedir(dir);
    return num - 3; /* ".", ".." and the directory itself */
}

static void note_group(pid_t from, pid_t to) {
    for (int i = 0; i < MAX_GROUPS; i++) {
        if (groups[i] == from) {
            groups[i] = to;
            return;
        }
    }
}

/* The life of a rank: waits until all are forked, runs fn, exits through exit() so that leak
 * checks and coverage see it. */
static void rank_main(int rank, int gate, int output, pid_t parent, int (*fn)(int, void *),
                      void *ctx) {
    struct sigaction action = {.sa_handler = SIG_DFL};
    char byte;
    int rc;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
        _exit(1);
    }
    sigaction(SIGALRM, &action, NULL);
    alarm(0);
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    close(output);
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (read(gate, &byte, 1) < 0 && errno == EINTR) {
    }
    close(gate);
    in_rank = rank;
    own_group = false;
    num_points = num_failed = 0;
    memset((void *)groups, 0, sizeof(groups));
    rc = fn(rank, ctx);
    fflush(NULL);
    if (rc == 0 && num_failed) {
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
    double limit = tap_now() + scaled(timeout_s);

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
    double limit = tap_now() + scaled(timeout_s);
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
        diag("ranks still running after %d s; killing them", scaled(timeout_s));
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
