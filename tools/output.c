/* SPDX-License-Identifier: MIT */
/*
 * Lines to a descriptor that may not be read just now: what cannot be written at once waits in a
 * bounded queue.
 *
 * Owns the queue, and a description of its own of a pipe or a terminal, so that whoever else has the
 * same one is not made to see it non-blocking. One thread. Must not wait, nor be killed by a
 * reader that has gone: SIGPIPE is ignored by the caller.
 */
#include "tools/tool.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

void output_open(struct output *o, int fd) {
    struct stat st;
    o->fd = fd;
    o->owned = o->is_pipe = o->is_socket = false;
    o->error = 0;
    o->lost = 0;
    o->len = 0;
    if (fstat(fd, &st) != 0) {
        o->error = errno;
        return;
    }
    o->is_socket = S_ISSOCK(st.st_mode);
    o->is_pipe = S_ISFIFO(st.st_mode) || isatty(fd);
    if (o->is_pipe) {
        char path[32];
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        const int own = open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
        o->owned = own >= 0;
        o->fd = own >= 0 ? own : fd;
    }
}

void output_close(struct output *o) {
    if (o->owned) {
        close(o->fd);
    }
    o->owned = false;
}

bool output_has_room(const struct output *o, size_t bytes) {
    return o->error != 0 || sizeof(o->bytes) - o->len >= bytes;
}

void output_add(struct output *o, const char *bytes, size_t len) {
    if (o->error != 0 || sizeof(o->bytes) - o->len < len) {
        o->lost++;
        return;
    }
    memcpy(o->bytes + o->len, bytes, len);
    o->len += len;
}

/* As many whole lines as a pipe takes at once or not at all, so that they do not mix with those of
 * another writer. */
static size_t piece_of(const char *bytes, size_t len) {
    const char *end = len > PIPE_BUF ? memrchr(bytes, '\n', PIPE_BUF) : NULL;
    return end ? (size_t)(end - bytes) + 1 : len < PIPE_BUF ? len : PIPE_BUF;
}

static ssize_t write_some(const struct output *o, const char *bytes, size_t len) {
    struct pollfd fd = {.fd = o->fd, .events = POLLOUT};
    if (o->is_socket) {
        return send(o->fd, bytes, len, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    if (!o->is_pipe) {
        return write(o->fd, bytes, len);
    }
    if (!o->owned && poll(&fd, 1, 0) <= 0) { /* it could not be opened anew: it may block */
        errno = EAGAIN;
        return -1;
    }
    return write(o->fd, bytes, piece_of(bytes, len));
}

void output_flush(struct output *o) {
    size_t at = 0;
    while (at < o->len && o->error == 0) {
        const ssize_t n = write_some(o, o->bytes + at, o->len - at);
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            break;
        }
        if (n < 0 && errno != EINTR) {
            o->error = errno;
            o->lost++;
            o->len = at = 0;
        }
        at += n > 0 ? (size_t)n : 0;
    }
    memmove(o->bytes, o->bytes + at, o->len - at);
    o->len -= at;
}
