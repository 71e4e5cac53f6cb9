/* SPDX-License-Identifier: MIT */
/*
 * The log: one line, one write(2), to stderr, so that lines of many ranks do not mix.
 *
 * Owns the process's log level (EP_LOG, read once) and each thread's rank tag. Runs on any
 * thread and takes no lock. Preserves errno, so it may stand between a system call and its
 * report. The only file that writes to stderr.
 * Must not allocate, block on a lock, or let text that came from outside forge a second line.
 */
#include "src/base/base.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

#define LINE_BYTES 1024
#define LEVEL_UNREAD (-1)

static _Atomic int process_level = LEVEL_UNREAD;
static _Thread_local int thread_rank = -1;

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

static size_t clamp_len(int len, size_t room) {
    if (len < 0) {
        return 0;
    }
    return (size_t)len < room ? (size_t)len : room - 1;
}

void epi_log(enum epi_log_level level, const char *fmt, ...) {
    int saved_errno = errno;
    if (!epi_log_enabled(level)) {
        errno = saved_errno;
        return;
    }
    char line[LINE_BYTES];
    size_t room = sizeof(line) - 1; /* the last byte is kept for the newline */
    size_t len = clamp_len(snprintf(line, room, "libep: %s: ", level_names[level]), room);
    if (thread_rank >= 0) {
        size_t left = room - len;
        len += clamp_len(snprintf(line + len, left, "[rank %d] ", thread_rank), left);
    }
    va_list args;
    va_start(args, fmt);
    len += clamp_len(vsnprintf(line + len, room - len, fmt, args), room - len);
    va_end(args);
    for (size_t i = 0; i < len; i++) {
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f) {
            line[i] = '?';
        }
    }
    line[len++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, len);
    (void)written; /* a closed stderr is the user's choice */
    errno = saved_errno;
}
