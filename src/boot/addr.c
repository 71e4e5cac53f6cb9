/* SPDX-License-Identifier: MIT */
/*
 * Addresses: read from text, resolved from a name.
 *
 * Owns nothing. Runs on any thread. Only epi_addr_resolve may block, when a name server is slow.
 */
#include "src/boot/parts.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <string.h>

bool epi_addr_split(const char *text, char host[256], int *port) {
    const char *colon = strrchr(text, ':');
    if (!colon || colon == text) {
        return false;
    }
    const char *from = text;
    size_t len = (size_t)(colon - text);
    if (text[0] == '[') {
        if (colon[-1] != ']') {
            return false;
        }
        from = text + 1;
        len -= 2;
    } else if (memchr(text, ':', len)) {
        return false; /* a bare IPv6 address: which colon begins the port is anyone's guess */
    }
    int64_t value = 0;
    if (len == 0 || len > 255 || !epi_parse_int(colon + 1, 10, 1, 65535, &value)) {
        return false;
    }
    memcpy(host, from, len);
    host[len] = '\0';
    *port = (int)value;
    return true;
}

static void set_port(struct epi_addr *addr, int port) {
    if (addr->ss.ss_family == AF_INET6) {
        ((struct sockaddr_in6 *)&addr->ss)->sin6_port = htons((uint16_t)port);
    } else {
        ((struct sockaddr_in *)&addr->ss)->sin_port = htons((uint16_t)port);
    }
}

const char *epi_addr_resolve(const char *host, int port, struct epi_addr *out, int max,
                             int *num, bool *is_name) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST};
    struct addrinfo *list = NULL;
    int err = getaddrinfo(host, NULL, &hints, &list);
    *is_name = err != 0;
    if (err != 0) {
        hints.ai_flags = AI_ADDRCONFIG;
        err = getaddrinfo(host, NULL, &hints, &list);
    }
    if (err != 0 && strcmp(host, "localhost") == 0) {
        /* Minimal containers have no /etc/hosts; and AI_ADDRCONFIG does not count loopback. */
        hints.ai_flags = AI_NUMERICHOST;
        err = getaddrinfo("127.0.0.1", NULL, &hints, &list);
    }
    if (err != 0) {
        return err == EAI_SYSTEM ? strerror(errno) : gai_strerror(err);
    }
    *num = 0;
    for (struct addrinfo *ai = list; ai && *num < max; ai = ai->ai_next) {
        if (ai->ai_family == AF_INET || ai->ai_family == AF_INET6) {
            memset(&out[*num], 0, sizeof(out[*num]));
            memcpy(&out[*num].ss, ai->ai_addr, ai->ai_addrlen);
            out[*num].len = ai->ai_addrlen;
            set_port(&out[*num], port);
            *num += 1;
        }
    }
    freeaddrinfo(list);
    return *num > 0 ? NULL : "the name has no IPv4 or IPv6 address";
}

void epi_addr_text(const struct epi_addr *addr, char out[EPI_ADDR_TEXT_BYTES]) {
    char host[INET6_ADDRSTRLEN] = "?";
    if (addr->ss.ss_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)&addr->ss;
        inet_ntop(AF_INET6, &v6->sin6_addr, host, sizeof(host));
        epi_format(out, EPI_ADDR_TEXT_BYTES, "[%s]:%d", host, ntohs(v6->sin6_port));
    } else {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)&addr->ss;
        inet_ntop(AF_INET, &v4->sin_addr, host, sizeof(host));
        epi_format(out, EPI_ADDR_TEXT_BYTES, "%s:%d", host, ntohs(v4->sin_port));
    }
}
