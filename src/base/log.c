/* SPDX-License-Identifier: MIT */
/*
 * The log: one line, one write(2), to stderr, so that lines of many ranks do not mix.
 *
 * Owns the process's log level (EP_LOG, read once), each thread's rank tag, and the count of lines
 * that stderr did not take. Runs on any thread and takes no lock. Preserves errno, so it may stand
 * between a system call and its report. The only file that writes to stderr.
 * Must not allocate, or let text that came from outside forge a second line. Nobody may be reading
 * stderr, or have closed it: a line that it does not take at once is lost and counted; it must
 * neither wait for a reader (but once for milliseconds) nor raise a signal.
 */
#include "src/base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINE_BYTES                                                                             \
    1024 /* with a notice less than PIPE_BUF: a pipe takes all of it or nothing */
#define NOTICE_BYTES 128
#define GRACE_MS 10 /* for a reader who is only slow; not again until he has read something */
#define LEVEL_UNREAD (-1)

static _Atomic int process_level = LEVEL_UNREAD;
static _Thread_local int thread_rank = -1;
static _Atomic uint64_t num_lost;
static _Atomic bool is_torn; /* stderr took the beginning of the last line only */

static const char *const level_names[] = {"error", "warn", "info", "debug"};

void epi_log_reload(void) {
    /* A malformed EP_LOG is itself logged from inside epi_opt_int: give that line a level. */
    atomic_store(&process_level, EPI_LOG_WARN);
    atomic_store(&process_level, (int)epi_opt_int(EPI_OPT_LOG));
}

bool epi_log_enabled(enum epi_log_level level) {
    if (atomic_load_explicit(&process_level, memory_order_relaxed) == LEVEL_UNREAD) {
        epi_log_reload();
    }
    return (int)level <= atomic_load_explicit(&process_level, memory_order_relaxed);
}

void epi_log_set_rank(int rank) {
    thread_rank = rank;
}

int epi_log_rank(void) {
    return thread_rank;
}

/* ---- writing -------------------------------------------------------------------------------- */

/* To a pipe or a terminal. Whether a write waits is a property of an open file, which is not ours
 * alone to change; so the same one is opened once more. */
static ssize_t write_once_more_opened(const char *text, size_t bytes) {
    int fd = open("/proc/self/fd/2", O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    ssize_t n = -1;
    if (fd > STDERR_FILENO) {
        n = write(fd, text, bytes);
    } else {
        /* It is another user's, or there is no /proc: what fits into it now is written. */
        struct pollfd p = {STDERR_FILENO, POLLOUT, 0};
        if (poll(&p, 1, 0) == 1 && (p.revents & POLLOUT)) {
            n = write(STDERR_FILENO, text, bytes);
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    return n;
}

static ssize_t write_now(const char *text, size_t bytes) {
    const int flags = fcntl(STDERR_FILENO, F_GETFL);
    struct stat s;
    if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY || fstat(STDERR_FILENO, &s) != 0) {
        return -1; /* closed; or not for writing, which opening it once more could change */
    }
    if (S_ISSOCK(s.st_mode)) {
        return send(STDERR_FILENO, text, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    if ((S_ISFIFO(s.st_mode) || S_ISCHR(s.st_mode)) && !(flags & O_NONBLOCK)) {
        return write_once_more_opened(text, bytes);
    }
    return write(STDERR_FILENO, text, bytes);
}

/* Without the signals of a reader that has gone, of a limit on the size of files, and of a terminal
 * on which this process is in the background. Only what came of this write is taken back. */
static ssize_t write_quietly(const char *text, size_t bytes, bool may_wait) {
    const struct timespec now = {0, 0};
    sigset_t raised, before, pending;
    sigemptyset(&raised);
    sigaddset(&raised, SIGPIPE);
    sigaddset(&raised, SIGXFSZ);
    sigemptyset(&pending);
    sigset_t blocked = raised;
    sigaddset(&blocked, SIGTTOU);
    pthread_sigmask(SIG_BLOCK, &blocked, &before);
    sigpending(&pending);
    ssize_t n = write_now(text, bytes);
    if (n < 0 && errno == EAGAIN && may_wait) {
        struct pollfd p = {STDERR_FILENO, POLLOUT, 0};
        poll(&p, 1, GRACE_MS);
        n = write_now(text, bytes);
    }
    if (sigismember(&pending, SIGPIPE)) {
        sigdelset(&raised, SIGPIPE);
    }
    if (sigismember(&pending, SIGXFSZ)) {
        sigdelset(&raised, SIGXFSZ);
    }
    while (n < 0 && sigtimedwait(&raised, NULL, &now) < 0 && errno == EINTR) {
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return n;
}

/* A whole line, after a word on those that were lost before it. */
static void put_line(const char *line, size_t bytes) {
    char text[NOTICE_BYTES + LINE_BYTES];
    const uint64_t lost = atomic_exchange(&num_lost, 0);
    const bool torn = atomic_exchange(&is_torn, false);
    size_t head = 0;
    if (torn) {
        text[head++] = '\n';
    }
    if (lost) {
        head += (size_t)snprintf(
            text + head, NOTICE_BYTES - head,
            "libep: warn: %llu line(s) of the log were lost: stderr did not take them\n",
            (unsigned long long)lost);
    }
    memcpy(text + head, line, bytes);
    const ssize_t n = write_quietly(text, head + bytes, lost == 0);
    if (n != (ssize_t)(head + bytes)) {
        atomic_store(&is_torn, n > 0 || torn);
        atomic_fetch_add(&num_lost, lost + 1);
    }
}

/* ---- a line --------------------------------------------------------------------------------- */

static size_t clamp_len(int len, size_t room) {
    if (len < 0) {
        return 0;
    }
    return (size_t)len < room ? (size_t)len : room - 1;
}

/* `more` ends the line, however long the rest is. */
static void log_line(enum epi_log_level level, const char *more, const char *fmt,
                     va_list args) {
    char line[LINE_BYTES];
    const size_t tail = strlen(more);
    size_t room = sizeof(line) - 1 - tail; /* the last byte is kept for the newline */
    size_t len = clamp_len(snprintf(line, room, "libep: %s: ", level_names[level]), room);
    if (thread_rank >= 0) {
        size_t left = room - len;
        len += clamp_len(snprintf(line + len, left, "[rank %d] ", thread_rank), left);
    }
    len += clamp_len(vsnprintf(line + len, room - len, fmt, args), room - len);
    memcpy(line + len, more, tail);
    len += tail;
    for (size_t i = 0; i < len; i++) {
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f) {
            line[i] = '?';
        }
    }
    line[len++] = '\n';
    put_line(line, len);
}

void epi_log(enum epi_log_level level, const char *fmt, ...) {
    const int saved_errno = errno;
    if (epi_log_enabled(level)) {
        va_list args;
        va_start(args, fmt);
        log_line(level, "", fmt, args);
        va_end(args);
    }
    errno = saved_errno;
}

void epi_log_some(struct epi_log_kind *kind, enum epi_log_level level, const char *fmt, ...) {
    const int saved_errno = errno;
    const int64_t window = epi_now_ns() / EPI_LOG_SOME_NS + 1;
    int64_t seen = atomic_load(&kind->window);
    if (seen != window && atomic_compare_exchange_strong(&kind->window, &seen, window)) {
        atomic_store(&kind->num, 0);
    }
    const uint32_t num = atomic_fetch_add(&kind->num, 1) + 1;
    if (num > EPI_LOG_SOME) {
        atomic_fetch_add(&kind->left_out, 1);
    } else if (epi_log_enabled(level)) {
        char more[96] = "";
        const uint32_t left_out = atomic_exchange(&kind->left_out, 0);
        if (left_out) {
            epi_format(more, sizeof(more), " (%u more like this were left out)", left_out);
        } else if (num == EPI_LOG_SOME) {
            epi_format(more, sizeof(more), " (more like this are only counted for a while)");
        }
        va_list args;
        va_start(args, fmt);
        log_line(level, more, fmt, args);
        va_end(args);
    }
    errno = saved_errno;
}
