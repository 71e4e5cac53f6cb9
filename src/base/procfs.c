/* SPDX-License-Identifier: MIT */
/*
 * Small files that are read whole, and what the kernel says of a process in them.
 *
 * Owns nothing. Runs on any thread. Must not believe that a process is still there.
 */
#include "src/base/base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

size_t epi_read_text(const char *path, char *out, size_t bytes) {
    size_t len = 0;
    epi_fd_begin();
    int fd = epi_fd_keep(open(path, O_RDONLY | O_CLOEXEC));
    while (fd >= 0 && len < bytes - 1) {
        const ssize_t n = read(fd, out + len, bytes - 1 - len);
        if (n <= 0 && !(n < 0 && errno == EINTR)) {
            break;
        }
        len += n > 0 ? (size_t)n : 0;
    }
    out[len] = '\0';
    epi_fd_close(&fd);
    return len;
}

/* "PID (NAME) STATE PARENT GROUP SESSION ...", where a name may hold parentheses and blanks. */
bool epi_process_see(int pid, struct epi_process *out) {
    char path[64], text[1024];
    memset(out, 0, sizeof(*out));
    epi_format(path, sizeof(path), "/proc/%d/stat", pid);
    if (pid <= 0 || epi_read_text(path, text, sizeof(text)) == 0) {
        return false;
    }
    const char *name = strchr(text, '('), *rest = strrchr(text, ')');
    if (!name || !rest || rest < name) {
        return false;
    }
    out->pid = pid;
    epi_format(out->name, sizeof(out->name), "%.*s", (int)(rest - name - 1), name + 1);
    return sscanf(rest + 1,
                  " %c %d %d %d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d "
                  "%llu",
                  &out->state, &out->parent, &out->group, &out->session, &out->start) == 5;
}
