/* SPDX-License-Identifier: MIT */
/*
 * Passes a descriptor from the rank that has it to the other processes of the host, over an
 * abstract Unix socket whose name nobody can guess. Both ends ask the kernel whose process the other
 * is: another user's gets nothing, and nothing is taken from him. Of this user's, only who knows the
 * token is served. Nothing appears in the file system.
 *
 * Called by the threads that create groups. Must not wait for anybody beyond the deadline, nor let
 * one who connects and is silent keep others waiting.
 */
#include "src/mem/shared.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CLIENT_NS EPI_NS_PER_S /* a rank's token is there before it is served */
#define MOST_CLIENTS 64        /* connected and not yet heard */
#define RETRY_NS EPI_NS_PER_MS /* where the system has a queue that is full */

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
        if (n == 0 ? epi_deadline_expired(deadline) : errno != EINTR) {
            return false;
        }
    }
}

static int open_socket(ep_status *st) {
    if (epi_alloc_should_fail()) {
        *st = epi_fail(EP_ERR_NOMEM, "no memory for a socket (injected)");
        return -1;
    }
    epi_fd_begin();
    const int s = epi_fd_keep(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (s < 0) {
        *st = epi_fail(EP_ERR_SYSTEM, "cannot open a Unix socket: %s%s", strerror(-s),
                       s == -EMFILE ? " (ulimit -n)" : "");
    }
    return s;
}

/* Whether the process at the other end is this user's. *uid is whose it is; -1: nobody knows. */
static bool is_same_user(int s, int64_t *uid) {
    struct ucred who;
    socklen_t len = sizeof(who);
    const bool known = getsockopt(s, SOL_SOCKET, SO_PEERCRED, &who, &len) == 0;
    *uid = known ? (int64_t)who.uid : -1;
    return known && who.uid == geteuid();
}

int epi_fd_listen(uint8_t token[EPI_FD_TOKEN], ep_status *st) {
    int s = open_socket(st);
    if (s < 0) {
        return -1;
    }
    struct sockaddr_un a;
    const char *what = "getrandom";
    bool good = epi_random(token, EPI_FD_TOKEN);
    if (good) {
        const socklen_t len = token_address(&a, token);
        what = "cannot listen on a Unix socket";
        good = bind(s, (struct sockaddr *)&a, len) == 0 && listen(s, EP_MAX_RANKS) == 0;
    }
    if (!good) {
        *st = epi_fail(EP_ERR_SYSTEM, "%s: %s", what, strerror(errno));
        epi_fd_close(&s);
    }
    return s;
}

/* ---- serving -------------------------------------------------------------------------------- */

struct client {
    int fd;
    size_t got;
    uint8_t said[EPI_FD_TOKEN];
    struct epi_deadline deadline;
};

struct serving {
    int listener;
    const uint8_t *token;
    int fd;           /* what is passed */
    int count;        /* to so many more */
    int64_t stranger; /* a user whose process was turned away; -1: none */
    int num_clients;
    struct client client[MOST_CLIENTS]; /* the oldest first */
};

static void drop_client(struct serving *s, int i) {
    epi_fd_close(&s->client[i].fd);
    s->num_clients--;
    memmove(&s->client[i], &s->client[i + 1],
            (size_t)(s->num_clients - i) * sizeof(s->client[0]));
}

/* 0, or an errno: ETOOMANYREFS where too many are on their way at once. */
static int send_fd(int c, int fd) {
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
    ssize_t n;
    do {
        n = sendmsg(c, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    return n == 1 ? 0 : errno;
}

/* Reads of the token what is there, and serves who has said all of it. True: he is not done. */
static bool hear(struct serving *s, struct client *c, struct epi_deadline deadline) {
    const ssize_t n = recv(c->fd, c->said + c->got, sizeof(c->said) - c->got, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return true;
    }
    c->got += n > 0 ? (size_t)n : 0;
    if (n > 0 && c->got < sizeof(c->said)) {
        return true;
    }
    if (n > 0 && memcmp(c->said, s->token, sizeof(c->said)) == 0) {
        while (send_fd(c->fd, s->fd) == ETOOMANYREFS && !epi_deadline_expired(deadline)) {
            epi_sleep_ns(RETRY_NS); /* until others have taken theirs */
        }
        s->count--; /* who is gone by now is missed by all in the next step */
    }
    return false;
}

/* Takes in who waits. A rank has said its token by now, so that it is served at once; the oldest of
 * those who are silent makes room for who comes. */
static ep_status accept_all(struct serving *s, struct epi_deadline deadline) {
    while (s->count > 0) {
        epi_fd_begin();
        int c = epi_fd_keep(accept4(s->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK));
        int64_t uid;
        if (c == -EAGAIN || c == -EWOULDBLOCK) {
            break;
        }
        if ((c == -EMFILE || c == -ENFILE) && s->num_clients > 0) {
            drop_client(s, 0);
            continue;
        }
        if (c == -EINTR || c == -ECONNABORTED) {
            continue;
        }
        if (c < 0) {
            return epi_fail(EP_ERR_SYSTEM, "%s: %s%s",
                            c == -EMFILE ? "no descriptor is left to pass the shared memory"
                                         : "cannot accept on a Unix socket",
                            strerror(-c), c == -EMFILE ? " (ulimit -n)" : "");
        }
        if (!is_same_user(c, &uid)) {
            static struct epi_log_kind strangers;
            epi_log_some(&strangers, EPI_LOG_WARN,
                         "a process of user %lld that asked for this group's shared memory was "
                         "turned away",
                         (long long)uid);
            s->stranger = uid;
            epi_fd_close(&c);
            continue;
        }
        if (s->num_clients == MOST_CLIENTS) {
            drop_client(s, 0);
        }
        s->client[s->num_clients++] =
            (struct client){.fd = c, .deadline = epi_deadline_after(CLIENT_NS)};
        if (!hear(s, &s->client[s->num_clients - 1], deadline)) {
            drop_client(s, s->num_clients - 1);
        }
    }
    return EP_OK;
}

/* Waits until something happens, and lets it. */
static ep_status serve_some(struct serving *s, struct epi_deadline deadline) {
    struct pollfd polls[MOST_CLIENTS + 1];
    struct epi_deadline until = deadline;
    polls[0] = (struct pollfd){s->listener, POLLIN, 0};
    for (int i = 0; i < s->num_clients; i++) {
        polls[i + 1] = (struct pollfd){s->client[i].fd, POLLIN, 0};
        until = epi_deadline_min(until, s->client[i].deadline);
    }
    if (poll(polls, (nfds_t)s->num_clients + 1, epi_deadline_left_ms(until)) < 0) {
        return errno == EINTR ? EP_OK : epi_fail(EP_ERR_SYSTEM, "poll: %s", strerror(errno));
    }
    for (int i = s->num_clients - 1; i >= 0 && s->count > 0; i--) {
        const bool stays = polls[i + 1].revents == 0 || hear(s, &s->client[i], deadline);
        if (!stays || epi_deadline_expired(s->client[i].deadline)) {
            drop_client(s, i);
        }
    }
    return polls[0].revents && s->count > 0 ? accept_all(s, deadline) : EP_OK;
}

static ep_status fail_unfetched(const struct serving *s) {
    char stranger[64] = "";
    if (s->stranger >= 0) {
        epi_format(stranger, sizeof(stranger), " (a process of user %lld was turned away)",
                   (long long)s->stranger);
    }
    return epi_fail(
        EP_ERR_UNSUPPORTED,
        "%d rank(s) of this node did not fetch the shared memory%s: they are on another "
        "host or in another container",
        s->count, stranger);
}

ep_status epi_fd_serve(int listener, const uint8_t token[EPI_FD_TOKEN], int fd, int count,
                       struct epi_deadline deadline) {
    struct serving s = {
        .listener = listener, .token = token, .fd = fd, .count = count, .stranger = -1};
    ep_status st = EP_OK;
    while (st == EP_OK && s.count > 0) {
        st = epi_deadline_expired(deadline) ? fail_unfetched(&s) : serve_some(&s, deadline);
    }
    while (s.num_clients > 0) {
        drop_client(&s, s.num_clients - 1);
    }
    return st;
}

/* ---- fetching ------------------------------------------------------------------------------- */

int epi_fd_connect(int source, const uint8_t token[EPI_FD_TOKEN], struct epi_deadline deadline,
                   ep_status *st) {
    struct sockaddr_un a;
    const socklen_t len = token_address(&a, token);
    int64_t uid;
    int err = 0, s = open_socket(st);
    if (s < 0) {
        return -1;
    }
    /* It waits only where more ranks come than the listener's queue holds. */
    while ((err = connect(s, (struct sockaddr *)&a, len) == 0 ? 0 : errno) == EINTR ||
           (err == EAGAIN && !epi_deadline_expired(deadline))) {
        epi_sleep_ns(err == EAGAIN ? RETRY_NS : 0);
    }
    if (err) {
        *st = epi_fail(
            EP_ERR_UNSUPPORTED,
            "cannot reach rank %d's shared memory (%s): this rank is on another host or "
            "in another container, and both are to be of one node",
            source, strerror(err));
    } else if (!is_same_user(s, &uid)) {
        *st =
            epi_fail(EP_ERR_UNSUPPORTED,
                     "rank %d's shared memory is offered by a process of user %lld, and this "
                     "one is user %u's: nothing is taken from it; ranks of a group are of one "
                     "user",
                     source, (long long)uid, (unsigned)geteuid());
    } else if (send(s, token, EPI_FD_TOKEN, MSG_NOSIGNAL) != EPI_FD_TOKEN) {
        *st = epi_fail(EP_ERR_PEER, "cannot ask rank %d for the shared memory: %s", source,
                       strerror(errno));
    } else {
        return s;
    }
    epi_fd_close(&s);
    return -1;
}

/* The descriptor that waits on the socket; else -1 and what there is instead. */
static int receive_fd(int s, const char **why) {
    char byte;
    struct iovec io = {&byte, 1};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct msghdr m = {.msg_iov = &io,
                       .msg_iovlen = 1,
                       .msg_control = control,
                       .msg_controllen = sizeof(control)};
    int fd = -1;
    epi_fd_begin();
    ssize_t n;
    do {
        n = recvmsg(s, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    const int err = errno;
    struct cmsghdr *h = n == 1 ? CMSG_FIRSTHDR(&m) : NULL;
    if (h && h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS &&
        h->cmsg_len == CMSG_LEN(sizeof(int))) {
        memcpy(&fd, CMSG_DATA(h), sizeof(fd));
    }
    fd = epi_fd_keep(fd);
    *why = n == 1 && (m.msg_flags & MSG_CTRUNC)
               ? "this process has no descriptor left (ulimit -n)"
           : n < 0 ? strerror(err)
                   : "it has closed the connection";
    return fd;
}

int epi_fd_receive(int source, int s, struct epi_deadline deadline, ep_status *st) {
    const char *why = "it does not answer";
    int fd = wait_for(s, POLLIN, deadline) ? receive_fd(s, &why) : -1;
    if (fd < 0) {
        *st = epi_fail(strstr(why, "ulimit") ? EP_ERR_SYSTEM : EP_ERR_PEER,
                       "rank %d did not pass the shared memory: %s", source, why);
    }
    return fd < 0 ? -1 : fd;
}
