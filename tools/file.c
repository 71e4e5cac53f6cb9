/* SPDX-License-Identifier: MIT */
/*
 * A whole file into memory: routing and text that people name.
 *
 * Owns nothing that lasts. Must not wait for ever on what is no file: a pipe is read as long as
 * something comes through it.
 */
#include "tools/tool.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define SILENCE_S 10

/* -1, and why. */
static int open_to_read(const char *path, char *why, size_t why_bytes) {
    struct stat st;
    const int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) {
        epi_format(why, why_bytes, "%s",
                   errno == ENOENT ? "there is no such file" : strerror(errno));
        return -1;
    }
    if (fstat(fd, &st) == 0 && (S_ISREG(st.st_mode) || S_ISFIFO(st.st_mode))) {
        return fd;
    }
    epi_format(why, why_bytes, "it is %s, not a file or a pipe",
               S_ISDIR(st.st_mode)    ? "a folder"
               : S_ISSOCK(st.st_mode) ? "a socket"
                                      : "a device");
    close(fd);
    return -1;
}

/* As read, but waits for a pipe; 0 also when it has been silent for too long, and why. */
static ssize_t read_some(int fd, char *to, size_t bytes, char *why, size_t why_bytes) {
    for (;;) {
        const ssize_t n = read(fd, to, bytes);
        if (n >= 0 || (errno != EAGAIN && errno != EINTR)) {
            return n;
        }
        struct pollfd pipe = {.fd = fd, .events = POLLIN};
        if (errno == EAGAIN && poll(&pipe, 1, SILENCE_S * 1000) == 0) {
            epi_format(why, why_bytes, "nothing has come through this pipe for %d s",
                       SILENCE_S);
            return 0;
        }
    }
}

char *tool_read_file(const char *path, size_t max_bytes, size_t *bytes, char *why,
                     size_t why_bytes) {
    const int fd = open_to_read(path, why, why_bytes);
    size_t room = 0, len = 0;
    char *text = NULL;
    ssize_t n = fd >= 0;
    why[0] = fd >= 0 ? '\0' : why[0];
    while (n > 0 && len < max_bytes) {
        if (len == room) {
            room = room == 0 ? 1 << 16 : 2 * room;
            room = room < max_bytes ? room : max_bytes;
            char *more = realloc(text, room);
            if (!more) {
                epi_format(why, why_bytes, "no memory for it");
                break;
            }
            text = more;
        }
        n = read_some(fd, text + len, room - len, why, why_bytes);
        len += n > 0 ? (size_t)n : 0;
    }
    if (n < 0) {
        epi_format(why, why_bytes, "%s", strerror(errno));
    } else if (fd >= 0 && len == 0 && why[0] == '\0') {
        epi_format(why, why_bytes, "it is empty, or a pipe into which nobody writes");
    }
    if (fd >= 0) {
        close(fd);
    }
    *bytes = len;
    if (why[0] != '\0') {
        free(text);
        text = NULL;
    }
    return text;
}
