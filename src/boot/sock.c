/* SPDX-License-Identifier: MIT */
/*
 * Sockets as the rendezvous needs them.
 *
 * Owns nothing. Runs on any thread.
 * Must not block, nor set TCP_USER_TIMEOUT: it also fires when the peer has merely stopped reading,
 * which a stopped process does.
 */
#include "src/boot/parts.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* ---- sockets ----------------------------------------------------------------------------- */

/* An idle connection to a vanished host ends after 2 + 3 * 1 s; one with bytes on the way is
 * epi_sock_vanished's. Failure to set an option is no reason to fail. */
static void set_options(int fd) {
    const int on = 1;
    const int idle_s = 2;
    const int interval_s = 1;
    const int num_probes = 3;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &num_probes, sizeof(num_probes));
}

static int open_stream(int family) {
    if (epi_alloc_should_fail()) {
        return -EMFILE;
    }
    epi_fd_begin();
    return epi_fd_keep(socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
}

int epi_sock_listen(const struct epi_addr *addr) {
    int fd = open_stream(addr->ss.ss_family);
    if (fd < 0) {
        return fd;
    }
    const int on = 1;
    const int off = 0;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (addr->ss.ss_family == AF_INET6) {
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
    }
    if (bind(fd, (const struct sockaddr *)&addr->ss, addr->len) != 0 ||
        listen(fd, SOMAXCONN) != 0) {
        int err = errno;
        epi_fd_close(&fd);
        return -err;
    }
    return fd;
}

int epi_sock_accept(int listen_fd, struct epi_addr *from) {
    if (epi_alloc_should_fail()) {
        return -EMFILE;
    }
    memset(from, 0, sizeof(*from));
    from->len = sizeof(from->ss);
    epi_fd_begin();
    int fd = epi_fd_keep(accept4(listen_fd, (struct sockaddr *)&from->ss, &from->len,
                                 SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd >= 0 && from->ss.ss_family != AF_UNIX) {
        set_options(fd);
    }
    return fd;
}

bool epi_sock_is_same_user(int fd, int *uid, int *pid) {
    struct ucred who = {.uid = (uid_t)-1};
    socklen_t len = sizeof(who);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &len) != 0) {
        return false;
    }
    *uid = (int)who.uid;
    *pid = (int)who.pid;
    return who.uid == geteuid();
}

/* Both ends the same socket: TCP does that when one dials a free port of the own host that the
 * kernel has just picked as the port to dial from. Nobody is listening there. */
static bool is_self_connected(int fd) {
    struct sockaddr_storage ends[2];
    socklen_t len[2] = {sizeof(ends[0]), sizeof(ends[1])};
    memset(ends, 0, sizeof(ends));
    return getsockname(fd, (struct sockaddr *)&ends[0], &len[0]) == 0 &&
           getpeername(fd, (struct sockaddr *)&ends[1], &len[1]) == 0 && len[0] == len[1] &&
           memcmp(&ends[0], &ends[1], len[0]) == 0;
}

static int finish_connect(int fd, struct epi_deadline deadline) {
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    for (;;) {
        int n = poll(&p, 1, epi_deadline_left_ms(deadline));
        if (n > 0) {
            break;
        }
        if (n == 0 && epi_deadline_expired(deadline)) {
            return ETIMEDOUT;
        }
        if (n < 0 && errno != EINTR) {
            return errno;
        }
    }
    int err = 0;
    socklen_t len = sizeof(err);
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) != 0) {
        return errno;
    }
    return err;
}

int epi_sock_connect(const struct epi_addr *addr, struct epi_deadline deadline) {
    int fd = open_stream(addr->ss.ss_family);
    if (fd < 0) {
        return fd;
    }
    int err = 0;
    if (connect(fd, (const struct sockaddr *)&addr->ss, addr->len) != 0) {
        err = errno == EINPROGRESS || errno == EINTR ? finish_connect(fd, deadline) : errno;
    }
    if (err == 0 && is_self_connected(fd)) {
        err = ECONNREFUSED;
    }
    if (err != 0) {
        epi_fd_close(&fd);
        return -err;
    }
    if (addr->ss.ss_family != AF_UNIX) {
        set_options(fd);
    }
    return fd;
}

int epi_sock_kicker(void) {
    if (epi_alloc_should_fail()) {
        return -EMFILE;
    }
    epi_fd_begin();
    return epi_fd_keep(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

bool epi_sock_has_unacked(int fd) {
    int bytes = 0;
    return ioctl(fd, SIOCOUTQ, &bytes) == 0 && bytes > 0;
}

bool epi_sock_vanished(int fd) {
    struct tcp_info info = {0};
    socklen_t len = sizeof(info);
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) != 0) {
        return false;
    }
    /* Four doublings of the kernel's 0.2 s are 3 s of sending the same bytes in vain. When the
     * peer reads nothing, only window probes go out; the count starts anew with each answer. */
    bool bytes_lost = info.tcpi_unacked > 0 && info.tcpi_retransmits >= 4;
    bool probes_lost = info.tcpi_unacked == 0 && info.tcpi_probes >= 4;
    return (bytes_lost || probes_lost) && info.tcpi_last_ack_recv >= 3000;
}
