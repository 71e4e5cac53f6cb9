/* SPDX-License-Identifier: MIT */
/*
 * TAP, seeds, the watchdog and what else tap.h has for a test program as such; its ranks are in
 * tap_ranks.c. Owns the counters of the running program. No thread is created behind the test's
 * back: the watchdog is a signal.
 */
#include "tests/tap.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int num_points;
static int num_failed;
static int in_rank = -1; /* which forked rank this process is */
static uint64_t seed_value;
static bool seed_known;
static bool own_group;
static void (*volatile kill_ranks)(void); /* by the watchdog's signal handler */

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

/* What libfabric keeps for good, or forgets itself. */
__attribute__((visibility("default"))) const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) {
    return "leak:libfabric.so";
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

int tap_scaled(int seconds) {
    const char *text = getenv("TAP_TIMEOUT_SCALE");
    int scale = text ? atoi(text) : 1;

    return seconds * (scale > 0 ? scale : 1);
}

static void on_alarm(int sig) {
    static const char text[] = "\nBail out! the test program passed its deadline\n";
    ssize_t n = write(STDOUT_FILENO, text, sizeof(text) - 1);

    (void)sig;
    (void)n;
    if (kill_ranks) {
        kill_ranks();
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
    alarm((unsigned)tap_scaled(seconds));
}

void tap_on_deadline(void (*fn)(void)) {
    kill_ranks = fn;
}

void tap_become_rank(int rank) {
    struct sigaction action = {.sa_handler = SIG_DFL};

    sigaction(SIGALRM, &action, NULL);
    alarm(0);
    in_rank = rank;
    own_group = false;
    num_points = num_failed = 0;
}

int tap_num_failed(void) {
    return num_failed;
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

static int num_held; /* descriptors that hold ports */

/* Nobody listens at a port where ranks of one host meet, so two test programs at a time could take
 * the same one for theirs, and their ranks meet. A name that all test programs know holds it. */
static bool hold_port(int port) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int len =
        snprintf(name.sun_path + 1, sizeof(name.sun_path) - 1, "libep-test-port-%d", port);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 ||
        bind(fd, (struct sockaddr *)&name,
             (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)len)) != 0) {
        close(fd);
        return false;
    }
    num_held++;
    return true;
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
        if (good && hold_port(port)) {
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
    return num - 3 - num_held; /* ".", ".." and the directory itself */
}
