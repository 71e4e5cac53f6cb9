/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * The log beside a stderr that is closed, full, broken, too small or stopped: nobody waits, nobody
 * dies, what was lost is counted and said, and lines are whole. Lines that a stranger can cause at
 * will are limited. And no descriptor of the library is ever taken for stderr.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "src/base/base.h"
#include "tests/gpu.h"
#include "tests/tap.h"

static bool is_full(int fd) {
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    char block[4096];
    memset(block, '-', sizeof(block));
    while (write(fd, block, sizeof(block)) > 0) {
    }
    const bool full = errno == EAGAIN;
    while (write(fd, block, 1) > 0) {
    }
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK); /* as a program has it */
    return full;
}

/* Everything that can be read now, as a string. */
static void drain(int fd, char *out, size_t bytes) {
    size_t len = 0;
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    for (;;) {
        ssize_t n = read(fd, out + len, bytes - 1 - len);
        if (n <= 0) {
            break;
        }
        len = len + (size_t)n < bytes - 1 ? len + (size_t)n : 0;
    }
    out[len] = 0;
}

static int num_lines(const char *text, const char *with) {
    int n = 0;
    for (const char *p = text; (p = strstr(p, with)) != NULL; p++) {
        n++;
    }
    return n;
}

/* In a child, whose stderr is `fd`: logs 5 lines, and 0 if none of them made it wait. */
static int log_five(int fd) {
    dup2(fd, STDERR_FILENO);
    const double start = tap_now();
    for (int i = 0; i < 5; i++) {
        epi_log(EPI_LOG_WARN, "line %d", i);
    }
    return tap_now() - start < 20 ? 0 : 1;
}

/* How a child that runs `fn` ends; -1: it had not after 60 seconds. */
static int status_of(int (*fn)(int fd), int fd) {
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(60);
        _exit(fn(fd));
    }
    int status = -1;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? -1 : status;
}

static int after_full(int *ends) {
    char text[1 << 18];
    int bad = log_five(ends[1]);
    drain(ends[0], text, sizeof(text));
    bad += num_lines(text, "libep") != 0;
    epi_log(EPI_LOG_WARN, "there is room again");
    drain(ends[0], text, sizeof(text));
    const char *want = "libep: warn: 5 line(s) of the log were lost: stderr did not take them\n"
                       "libep: warn: there is room again\n";
    const char *at = strstr(text, "libep");
    return bad + (!at || strcmp(at, want) != 0);
}

static int full_pipe(int fd) {
    int ends[2];
    (void)fd;
    return pipe(ends) != 0 || !is_full(ends[1]) || after_full(ends);
}

static int full_socket(int fd) {
    int ends[2];
    (void)fd;
    return socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0 || !is_full(ends[1]) ||
           after_full(ends);
}

static int no_reader(int is_socket) {
    int ends[2];
    sigset_t pending;
    if ((is_socket ? socketpair(AF_UNIX, SOCK_STREAM, 0, ends) : pipe(ends)) != 0) {
        return 1;
    }
    close(ends[0]);
    signal(SIGPIPE, SIG_DFL);
    int bad = log_five(ends[1]);
    sigpending(&pending);
    bad += sigismember(&pending, SIGPIPE) != 0;
    /* One that was the program's own before is still there. */
    sigset_t pipe_only;
    sigemptyset(&pipe_only);
    sigaddset(&pipe_only, SIGPIPE);
    sigprocmask(SIG_BLOCK, &pipe_only, NULL);
    raise(SIGPIPE);
    epi_log(EPI_LOG_WARN, "to nobody");
    sigpending(&pending);
    return bad + !sigismember(&pending, SIGPIPE);
}

static int closed(int fd) {
    (void)fd;
    close(STDERR_FILENO);
    const double start = tap_now();
    epi_log(EPI_LOG_WARN, "to nobody");
    /* The reading end of a pipe takes the place: nothing may be put into that pipe. */
    int ends[2];
    char byte;
    if (pipe(ends) != 0 || ends[0] != STDERR_FILENO) {
        return 1;
    }
    epi_log(EPI_LOG_WARN, "to nobody");
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    return read(ends[0], &byte, 1) >= 0 || tap_now() - start > 20;
}

static int small_file(int fd) {
    const struct rlimit limit = {100, 100};
    signal(SIGXFSZ, SIG_DFL);
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) {
        return 1;
    }
    const int bad = log_five(fd);
    struct stat s;
    return bad + (fstat(fd, &s) != 0 || s.st_size != 100);
}

/* A terminal whose user has pressed Ctrl-S, seen from its program. */
static int stopped_terminal(int fd) {
    int slave = open(ptsname(fd), O_RDWR | O_NOCTTY);
    if (slave < 0 || tcflow(slave, TCOOFF) != 0) {
        return 1;
    }
    char text[8192];
    int bad = log_five(slave);
    drain(fd, text, sizeof(text));
    bad += num_lines(text, "line") != 0;
    tcflow(slave, TCOON);
    epi_log(EPI_LOG_WARN, "and on");
    tap_sleep_ms(20);
    drain(fd, text, sizeof(text));
    return bad + (num_lines(text, "5 line(s) of the log were lost") != 1 ||
                  num_lines(text, "and on") != 1);
}

/* A background process of a terminal that stops those that write to it. */
static int in_background(int fd) {
    setsid();
    int slave = open(ptsname(fd), O_RDWR); /* the session's terminal */
    struct termios t;
    if (slave < 0 || tcgetattr(slave, &t) != 0) {
        return 1;
    }
    t.c_lflag |= TOSTOP;
    if (tcsetattr(slave, TCSANOW, &t) != 0) {
        return 1;
    }
    const pid_t child = fork();
    if (child == 0) {
        setpgid(0, 0);
        _exit(log_five(slave));
    }
    setpgid(child, child);
    int status = 0;
    waitpid(child, &status, WUNTRACED);
    kill(child, SIGKILL);
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

static void test_stderr(void) {
    ok(status_of(closed, -1) == 0, "closed: lines go nowhere");
    ok(status_of(full_pipe, -1) == 0, "a full pipe: nobody waits, and lost lines are counted");
    ok(status_of(full_socket, -1) == 0, "a full socket likewise");
    ok(status_of(no_reader, 0) == 0, "a pipe without a reader raises no signal");
    ok(status_of(no_reader, 1) == 0, "nor does a socket");
    FILE *file = tmpfile();
    ok(file && status_of(small_file, fileno(file)) == 0, "a limit on files raises no signal");
    ok(status_of(log_five, open("/dev/full", O_WRONLY | O_CLOEXEC)) == 0,
       "a full disk is none");
    int terminal = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (terminal < 0 || grantpt(terminal) != 0 || unlockpt(terminal) != 0) {
        skip(2, "no terminal can be made: %s", strerror(errno));
        return;
    }
    ok(status_of(stopped_terminal, terminal) == 0, "a stopped terminal is not waited for");
    ok(status_of(in_background, terminal) == 0, "nor one for which we are in the background");
}

/* Many writers of one pipe, whose reader is slow: each line that comes is whole. */
static void test_whole_lines(void) {
    enum { WRITERS = 4, LINES = 300 };
    int ends[2];
    char *text = calloc(1, 1 << 20), filler[700];
    size_t len = 0;
    memset(filler, 'x', sizeof(filler) - 1);
    filler[sizeof(filler) - 1] = 0;
    if (!text || pipe(ends) != 0) {
        ok(false, "no pipe");
        return;
    }
    fflush(NULL);
    for (int w = 0; w < WRITERS; w++) {
        if (fork() == 0) {
            dup2(ends[1], STDERR_FILENO);
            for (int i = 0; i < LINES; i++) {
                epi_log(EPI_LOG_WARN, "%d %s end", w, filler);
            }
            _exit(0);
        }
    }
    close(ends[1]);
    for (ssize_t n = 1; n > 0 && len < (1 << 20) - 5000; len += (size_t)(n > 0 ? n : 0)) {
        n = read(ends[0], text + len, 4096);
    }
    while (wait(NULL) > 0) {
    }
    close(ends[0]);
    int whole = 0, bad = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        const size_t n = strlen(line);
        const bool data = strncmp(line, "libep: warn: ", 13) == 0 && n > 700 &&
                          strcmp(line + n - 6, "xx end") == 0;
        whole += data;
        bad += !data && !strstr(line, "of the log were lost");
    }
    free(text);
    ok(whole > WRITERS && bad == 0, "%d lines of %d are whole, %d are not", whole,
       WRITERS * LINES, bad);
}

static struct epi_log_kind kind;

static int flood(int fd) {
    dup2(fd, STDERR_FILENO);
    for (int i = 0; i < 5000; i++) {
        epi_log_some(&kind, EPI_LOG_WARN, "stranger %d", i);
    }
    kind.window -= 1; /* as if the time had passed */
    epi_log_some(&kind, EPI_LOG_WARN, "stranger again");
    return 0;
}

static void test_limit(void) {
    int ends[2];
    char text[8192];
    const bool piped = pipe(ends) == 0;
    ok(piped && status_of(flood, ends[1]) == 0, "5000 lines of one kind");
    drain(ends[0], text, sizeof(text));
    const int n = num_lines(text, "stranger");
    ok(n >= EPI_LOG_SOME && n <= 3 * EPI_LOG_SOME + 1, "are %d", n);
    ok(num_lines(text, "only counted for a while") >= 1 && strstr(text, "more like this were"),
       "and it is said how many were left out");
    close(ends[0]);
    close(ends[1]);
}

/* Ranks whose program has no descriptors 0 to 2. */
static int without_stdio(int fd) {
    enum { MOST = 16 };
    int fds[MOST];
    (void)fd;
    close(0);
    close(1);
    close(2);
    int bad = 0;
    for (int i = 0; i < MOST; i++) {
        epi_fd_begin();
        fds[i] = epi_fd_keep(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        bad += fds[i] < 3 || fcntl(fds[i], F_GETFD) != FD_CLOEXEC;
    }
    bad += fcntl(0, F_GETFD) != -1 || fcntl(1, F_GETFD) != -1 || fcntl(2, F_GETFD) != -1;
    for (int i = 0; i < MOST; i++) {
        epi_fd_close(&fds[i]);
        bad += fds[i] != -1;
    }
    epi_fd_begin();
    return bad + (epi_fd_keep((errno = EMFILE, -1)) != -EMFILE);
}

int main(void) {
    gpu_never("the log");
    tap_deadline(120);
    unsetenv("EP_LOG");
    test_stderr();
    test_whole_lines();
    test_limit();
    ok(status_of(without_stdio, -1) == 0, "descriptors of the library are above stderr");
    return done_testing();
}
