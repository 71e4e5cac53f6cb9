/* SPDX-License-Identifier: MIT */
/*
 * Addresses: read from text, resolved from a name.
 *
 * Owns nothing but the lookups of names that are under way. Runs on any thread. Must not wait
 * for a name server beyond the deadline.
 */
#include "src/boot/parts.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <string.h>
#include <strings.h>

/* ---- text -------------------------------------------------------------------------------- */

static bool is_blank(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* What is wrong with a host, or NULL. */
static const char *check_host(const char *host) {
    struct in_addr v4;
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
        "._-:%";
    if (host[0] == '\0') {
        return "it names no host";
    }
    if (host[strspn(host, allowed)] != '\0') {
        return "it must be the name or the address of a host, with nothing around it";
    }
    struct in6_addr v6;
    char bare[256];
    epi_format(bare, sizeof(bare), "%.*s", (int)strcspn(host, "%"), host);
    if (strchr(host, ':') && inet_pton(AF_INET6, bare, &v6) != 1) {
        return "it is no IPv6 address";
    }
    if (strchr(host, ':')
            ? v6.s6_addr[0] == 0xff
            : inet_pton(AF_INET, host, &v4) == 1 && ntohl(v4.s_addr) >> 28 >= 14) {
        return "it is no address of a host, but one for several or for none";
    }
    return NULL;
}

const char *epi_addr_parse(const char *text, char host[256], int *port) {
    size_t len = strlen(text);
    int64_t value = 0;
    for (; is_blank(*text); text++, len--) {
    }
    for (; len > 0 && is_blank(text[len - 1]); len--) {
    }
    if (len >= 6 && strncasecmp(text, "tcp://", 6) == 0) { /* as other libraries write it */
        text += 6;
        len -= 6;
        len -= len > 0 && text[len - 1] == '/';
    }
    if (len > 255) {
        return "it is longer than 255 characters";
    }
    char rest[256];
    memcpy(rest, text, len);
    rest[len] = '\0';
    char *end = rest[0] == '[' ? strchr(rest, ']') : rest + strcspn(rest, ":");
    const char *after = end;
    if (rest[0] == '[') {
        if (!end) {
            return "its bracket is not closed";
        }
        after = end + 1;
    } else if (strchr(end, ':') != strrchr(end, ':')) { /* a bare IPv6 address has no port */
        after = end = rest + len;
    }
    if (*after != '\0' && (*after != ':' || !epi_parse_int(after + 1, 10, 1, 65535, &value) ||
                           after[1] < '0' || after[1] > '9')) {
        return "what follows the host must be \":port\", with a port in 1..65535";
    }
    *end = '\0';
    memcpy(host, rest[0] == '[' ? rest + 1 : rest, (size_t)(end - rest) + (rest[0] != '['));
    *port = (int)value;
    return check_host(host);
}

bool epi_addr_is_loopback(const char *host) {
    struct in_addr v4;
    struct in6_addr v6;
    if (inet_pton(AF_INET, host, &v4) == 1) {
        return v4.s_addr == 0 || ntohl(v4.s_addr) >> 24 == 127;
    }
    if (inet_pton(AF_INET6, host, &v6) == 1) {
        return IN6_IS_ADDR_LOOPBACK(&v6) || IN6_IS_ADDR_UNSPECIFIED(&v6) ||
               (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127);
    }
    return strcasecmp(host, "localhost") == 0;
}

void epi_addr_set_port(struct epi_addr *addr, int port) {
    if (addr->ss.ss_family == AF_INET6) {
        ((struct sockaddr_in6 *)&addr->ss)->sin6_port = htons((uint16_t)port);
    } else {
        ((struct sockaddr_in *)&addr->ss)->sin_port = htons((uint16_t)port);
    }
}

/* ---- names ------------------------------------------------------------------------------- */

/* A name server may take as long as it likes, so another thread asks it: who wants to know waits
 * until its deadline, and the thread ends by itself. The last of the two frees the lookup. */
struct lookup {
    pthread_mutex_t lock;
    pthread_cond_t done;
    int refs;
    bool is_done;
    char host[256];
    struct addrinfo *list;
    int err;
    int system_err;
};

static void drop_lookup(struct lookup *l) {
    pthread_mutex_lock(&l->lock);
    bool is_last = --l->refs == 0;
    pthread_mutex_unlock(&l->lock);
    if (is_last) {
        if (l->list) {
            freeaddrinfo(l->list);
        }
        pthread_cond_destroy(&l->done);
        pthread_mutex_destroy(&l->lock);
        epi_free(l);
    }
}

static void *look_up(void *arg) {
    struct lookup *l = arg;
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_ADDRCONFIG};
    struct addrinfo *list = NULL;
    int err = getaddrinfo(l->host, NULL, &hints, &list);
    int system_err = errno;
    pthread_mutex_lock(&l->lock);
    l->list = err == 0 ? list : NULL;
    l->err = err;
    l->system_err = system_err;
    l->is_done = true;
    pthread_cond_signal(&l->done);
    pthread_mutex_unlock(&l->lock);
    drop_lookup(l);
    return NULL;
}

static struct lookup *begin_lookup(const char *host) {
    struct lookup *l = epi_alloc(sizeof(*l));
    if (!l) {
        return NULL;
    }
    epi_format(l->host, sizeof(l->host), "%s", host);
    l->refs = 2;
    pthread_mutex_init(&l->lock, NULL);
    epi_cond_init(&l->done);
    pthread_t thread;
    if (epi_thread_start(&thread, look_up, l, "ep-resolve") != 0) {
        l->refs = 1;
        drop_lookup(l);
        return NULL;
    }
    pthread_detach(thread);
    return l;
}

static void take_addresses(const struct addrinfo *list, int port, struct epi_addr *out, int max,
                           int *num) {
    *num = 0;
    for (const struct addrinfo *ai = list; ai && *num < max; ai = ai->ai_next) {
        if (ai->ai_family == AF_INET || ai->ai_family == AF_INET6) {
            memset(&out[*num], 0, sizeof(out[*num]));
            memcpy(&out[*num].ss, ai->ai_addr, ai->ai_addrlen);
            out[*num].len = ai->ai_addrlen;
            epi_addr_set_port(&out[*num], port);
            *num += 1;
        }
    }
}

static const char *resolve_name(const char *host, int port, struct epi_deadline deadline,
                                struct epi_addr *out, int max, int *num) {
    const char *why = NULL;
    struct lookup *l = begin_lookup(host);
    if (!l) {
        return "no memory to resolve its name";
    }
    pthread_mutex_lock(&l->lock);
    while (!l->is_done && epi_cond_wait(&l->done, &l->lock, deadline)) {
    }
    if (!l->is_done) {
        why = "the name server does not answer";
    } else if (l->err != 0) {
        why = l->err == EAI_SYSTEM ? strerror(l->system_err) : gai_strerror(l->err);
    } else {
        take_addresses(l->list, port, out, max, num);
        why = *num > 0 ? NULL : "the name has no IPv4 or IPv6 address";
    }
    pthread_mutex_unlock(&l->lock);
    drop_lookup(l);
    return why;
}

const char *epi_addr_resolve(const char *host, int port, struct epi_deadline deadline,
                             struct epi_addr *out, int max, int *num, bool *is_name) {
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST};
    struct addrinfo *list = NULL;
    *is_name = getaddrinfo(host, NULL, &hints, &list) != 0;
    if (*is_name) {
        const char *why = resolve_name(host, port, deadline, out, max, num);
        /* Minimal containers have no /etc/hosts; and AI_ADDRCONFIG does not count loopback. */
        if (!why || strcmp(host, "localhost") != 0 ||
            getaddrinfo("127.0.0.1", NULL, &hints, &list) != 0) {
            return why;
        }
    }
    take_addresses(list, port, out, max, num);
    freeaddrinfo(list);
    return NULL;
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
