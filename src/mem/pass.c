/* SPDX-License-Identifier: MIT */
/*
 * Passes a descriptor from the rank that has it to the other processes of the host, over an
 * abstract Unix socket whose name nobody can guess. Strangers are dropped: another user's process
 * by its credentials, anybody who does not know the token by that. Nothing appears in the file
 * system.
 */
#include "src/mem/shared.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static socklen_t token_address(struct sockaddr_un *a, const uint8_t token[EPI_FD_TOKEN]) {
    static const char hex[] = "0123456789abcdef";
    memset(a, 0, sizeof(*a));
    a->sun_family = AF_UNIX;
    char *at = a->sun_path + 1; /* a leading NUL makes it abstract */
    memcpy(at, "libep-", 6);
    at += 6;
    for (int i = 0; i < 8; i++) { /* the other bytes of the token are the secret */
        *at++ = hex[token[i] >> 4];
        *at++ = hex[token[i] & 15];
    }
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + 6 + 16);
}

static bool wait_for(int fd, short events, struct epi_deadline deadline) {
    for (;;) {
        struct pollfd p = {fd, events, 0};
        int n = poll(&p, 1, epi_deadline_left_ms(deadline));
        if (n > 0) {
            return true;
        }
        if (n == 0 || errno != EINTR) {
            return false;
        }
    }
}

int epi_fd_listen(uint8_t token[EPI_FD_TOKEN], ep_status *st) {
    if (epi_alloc_should_fail()) {
        *st = epi_fail(EP_ERR_NOMEM, "no memory for a socket (injected)");
        return -1;
    }
    if (getrandom(token, EPI_FD_TOKEN, 0) != EPI_FD_TOKEN) {
        *st = epi_fail(EP_ERR_SYSTEM, "getrandom: %s", strerror(errno));
        return -1;
    }
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un a;
    socklen_t len = token_address(&a, token);
    if (s < 0 || bind(s, (struct sockaddr *)&a, len) != 0 || listen(s, EP_MAX_RANKS) != 0) {
        *st = epi_fail(EP_ERR_SYSTEM, "cannot listen on a Unix socket: %s", strerror(errno));
        if (s >= 0) {
            close(s);
        }
        return -1;
    }
    return s;
}

static bool is_ours(int c, const uint8_t token[EPI_FD_TOKEN], struct epi_deadline deadline) {
    struct ucred who;
    socklen_t len = sizeof(who);
    uint8_t said[EPI_FD_TOKEN];
    if (getsockopt(c, SOL_SOCKET, SO_PEERCRED, &who, &len) != 0 || who.uid != geteuid()) {
        return false;
    }
    return wait_for(c, POLLIN, deadline) &&
           recv(c, said, sizeof(said), MSG_WAITALL | MSG_DONTWAIT) == (ssize_t)sizeof(said) &&
           memcmp(said, token, sizeof(said)) == 0;
}

static bool send_fd(int c, int fd) {
    char byte = 1;
    struct iovec io = {&byte, 1};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
    struct msghdr m = {.msg_iov = &io,
                       .msg_iovlen = 1,
                       .msg_control = control,
                       .msg_controllen = sizeof(control)};
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    h->cmsg_level = SOL_SOCKET;
    h->cmsg_type = SCM_RIGHTS;
    h->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(h), &fd, sizeof(fd));
    return sendmsg(c, &m, MSG_NOSIGNAL) == 1;
}

ep_status epi_fd_serve(int listener, const uint8_t token[EPI_FD_TOKEN], int fd, int count,
                       struct epi_deadline deadline) {
    while (count > 0) {
        if (!wait_for(listener, POLLIN, deadline)) {
            return epi_fail(
                EP_ERR_UNSUPPORTED,
                "%d rank(s) did not fetch the shared memory: they are on another host "
                "or in another container; this version joins ranks of one host",
                count);
        }
        int c = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (c < 0) {
            if (errno == EINTR || errno == ECONNABORTED) {
                continue;
            }
            return epi_fail(EP_ERR_SYSTEM, "cannot accept on a Unix socket: %s",
                            strerror(errno));
        }
        if (is_ours(c, token, deadline)) {
            send_fd(c, fd); /* who is gone by now is missed by all in the next step */
            count--;
        }
        close(c);
    }
    return EP_OK;
}

static int receive_fd(int s) {
    char byte;
    struct iovec io = {&byte, 1};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct msghdr m = {.msg_iov = &io,
                       .msg_iovlen = 1,
                       .msg_control = control,
                       .msg_controllen = sizeof(control)};
    if (recvmsg(s, &m, MSG_CMSG_CLOEXEC) != 1) {
        return -1;
    }
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    int fd = -1;
    if (h && h->cmsg_type == SCM_RIGHTS && h->cmsg_len == CMSG_LEN(sizeof(int))) {
        memcpy(&fd, CMSG_DATA(h), sizeof(fd));
    }
    return fd;
}

int epi_fd_connect(int source, const uint8_t token[EPI_FD_TOKEN], struct epi_deadline deadline,
                   ep_status *st) {
    if (epi_alloc_should_fail()) {
        *st = epi_fail(EP_ERR_NOMEM, "no memory for a socket (injected)");
        return -1;
    }
    struct sockaddr_un a;
    socklen_t len = token_address(&a, token);
    /* Connecting waits only where more ranks come than the listener's queue holds. */
    const int64_t us = epi_deadline_left_ns(deadline) / EPI_NS_PER_US + 1;
    const struct timeval limit = {(time_t)(us / 1000000), (suseconds_t)(us % 1000000)};
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (s < 0) {
        *st = epi_fail(EP_ERR_SYSTEM, "cannot open a Unix socket: %s", strerror(errno));
        return -1;
    }
    setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    if (connect(s, (struct sockaddr *)&a, len) != 0) {
        *st = epi_fail(
            EP_ERR_UNSUPPORTED,
            "cannot reach rank %d's shared memory (%s): this rank is on another host or "
            "in another container; this version joins ranks of one host",
            source, strerror(errno));
    } else if (send(s, token, EPI_FD_TOKEN, MSG_NOSIGNAL) != EPI_FD_TOKEN) {
        *st = epi_fail(EP_ERR_PEER, "cannot ask rank %d for the shared memory: %s", source,
                       strerror(errno));
    } else {
        return s;
    }
    close(s);
    return -1;
}

int epi_fd_receive(int source, int s, struct epi_deadline deadline, ep_status *st) {
    int fd = wait_for(s, POLLIN, deadline) ? receive_fd(s) : -1;
    if (fd < 0) {
        *st = epi_fail(EP_ERR_PEER,
                       "rank %d did not pass the shared memory (another user's job?)", source);
    }
    return fd;
}
