/* SPDX-License-Identifier: MIT */
/*
 * Sockets as the rendezvous needs them: not blocking, closed on exec and in forked children,
 * with a quick verdict on peers whose host has vanished. See sock.c.
 */
#ifndef EPI_BOOT_SOCK_H
#define EPI_BOOT_SOCK_H

#include <sys/socket.h>

#include "src/base/base.h"

#define EPI_ADDR_TEXT_BYTES 72

struct epi_addr {
    struct sockaddr_storage ss;
    socklen_t len;
};

/* Splits "host:port" or "[v6]:port"; host must hold 256 bytes. False: not of that form. */
bool epi_addr_split(const char *text, char host[256], int *port);
/* Fills up to max addresses; 0, or why not in words. is_name: the host is not a literal. */
const char *epi_addr_resolve(const char *host, int port, struct epi_addr *out, int max,
                             int *num, bool *is_name);
/* This host's addresses, loopback last; the number filled in, -errno on failure. */
int epi_addr_local(int port, struct epi_addr *out, int max);
/* The wildcard of both families, for a listener. */
void epi_addr_any(int port, bool v6, struct epi_addr *out);
void epi_addr_text(const struct epi_addr *addr, char out[EPI_ADDR_TEXT_BYTES]);

/* A descriptor, or -errno. */
int epi_sock_listen(const struct epi_addr *addr);
int epi_sock_accept(int listen_fd, struct epi_addr *from);
int epi_sock_connect(const struct epi_addr *addr, struct epi_deadline deadline);
int epi_sock_port(int fd);
/* An eventfd that is, as the sockets are, closed in forked children. */
int epi_sock_kicker(void);
void epi_sock_close(int *fd); /* -1 is fine; sets *fd to -1 */

/* Bytes the peer's kernel has not acknowledged yet. */
bool epi_sock_has_unacked(int fd);
/* The peer's kernel has been silent for seconds although it owes an answer. A stopped process
 * is not silent: its kernel answers. */
bool epi_sock_vanished(int fd);

#endif
