/* SPDX-License-Identifier: MIT */
/*
 * Where the ranks meet: over an abstract Unix socket of this host, or over TCP with the job's key.
 *
 * Owns the choice between the two, the key, the sockets' names, and listening.
 * docs/decisions/0009-rendezvous.md says why. Runs on the creating thread.
 * Must not listen on an address that nobody named, nor go by a place that this user holds already.
 */
#include "src/boot/parts.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stddef.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#define NUM_NAMES 16 /* that are tried where other users hold some */
#define MAX_LOCAL_ADDRS 64
#define HELD_PAUSE_NS (5 * EPI_NS_PER_MS)
#define CLAIM_NS EPI_NS_PER_S /* for who holds the place to answer, and to go */
#define MAX_CLAIMS 100

static const char name_label[] = "libep name";

/* ---- addresses of this host -------------------------------------------------------------- */

static bool is_same_host(const struct epi_addr *a, const struct epi_addr *b) {
    if (a->ss.ss_family != b->ss.ss_family) {
        return false;
    }
    if (a->ss.ss_family == AF_INET6) {
        return memcmp(&((const struct sockaddr_in6 *)&a->ss)->sin6_addr,
                      &((const struct sockaddr_in6 *)&b->ss)->sin6_addr,
                      sizeof(struct in6_addr)) == 0;
    }
    return ((const struct sockaddr_in *)&a->ss)->sin_addr.s_addr ==
           ((const struct sockaddr_in *)&b->ss)->sin_addr.s_addr;
}

static bool is_loopback(const struct epi_addr *a) {
    if (a->ss.ss_family == AF_INET6) {
        const struct in6_addr *v6 = &((const struct sockaddr_in6 *)&a->ss)->sin6_addr;
        return IN6_IS_ADDR_LOOPBACK(v6) || (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr[12] == 127);
    }
    return ntohl(((const struct sockaddr_in *)&a->ss)->sin_addr.s_addr) >> 24 == 127;
}

static bool read_literal(const char *host, struct epi_addr *out) {
    memset(out, 0, sizeof(*out));
    struct sockaddr_in *v4 = (struct sockaddr_in *)&out->ss;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&out->ss;
    if (inet_pton(AF_INET, host, &v4->sin_addr) == 1) {
        out->ss.ss_family = AF_INET;
        out->len = sizeof(*v4);
        return true;
    }
    if (inet_pton(AF_INET6, host, &v6->sin6_addr) == 1) {
        out->ss.ss_family = AF_INET6;
        out->len = sizeof(*v6);
        return true;
    }
    return false;
}

/* NCCL's way to name interfaces: beginnings of names with commas between, or, behind '=', whole
 * names; '^' in front means all others. */
static bool is_named(const char *rule, const char *name) {
    const bool others = rule[0] == '^';
    rule += others;
    const bool whole = rule[0] == '=';
    rule += whole;
    bool found = false;
    while (*rule != '\0' && !found) {
        size_t len = strcspn(rule, ",");
        found = len > 0 && strncmp(rule, name, len) == 0 && (!whole || name[len] == '\0');
        rule += len;
        rule += *rule == ',';
    }
    return found != others;
}

static const char *interface_rule(const char **from) {
    const char *rule = epi_opt_str(EPI_OPT_IFNAME);
    *from = rule ? "EP_IFNAME" : "NCCL_SOCKET_IFNAME";
    return rule ? rule : epi_env("NCCL_SOCKET_IFNAME");
}

/* This host's addresses, of the interfaces that `rule` names, or all; -errno on failure. */
static int list_local(const char *rule, struct epi_addr *out, int max) {
    struct ifaddrs *list = NULL;
    if (epi_alloc_should_fail() || getifaddrs(&list) != 0) {
        return -ENOMEM;
    }
    int num = 0;
    for (struct ifaddrs *ifa = list; ifa && num < max; ifa = ifa->ifa_next) {
        int family = ifa->ifa_addr ? ifa->ifa_addr->sa_family : AF_UNSPEC;
        if ((family == AF_INET || family == AF_INET6) && (ifa->ifa_flags & IFF_UP) &&
            (!rule || is_named(rule, ifa->ifa_name))) {
            memset(&out[num], 0, sizeof(out[num]));
            out[num].len =
                family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
            memcpy(&out[num].ss, ifa->ifa_addr, out[num].len);
            num++;
        }
    }
    freeifaddrs(list);
    return num;
}

/* Of addrs[0..*num-1] keeps those of this host (and of the named interfaces). 0 or -errno. */
static int keep_local(const char *rule, struct epi_addr *addrs, int *num) {
    struct epi_addr local[MAX_LOCAL_ADDRS];
    int num_local = list_local(rule, local, MAX_LOCAL_ADDRS);
    int kept = 0;
    for (int i = 0; i < *num; i++) {
        bool is_here = !rule && is_loopback(&addrs[i]);
        for (int j = 0; j < num_local && !is_here; j++) {
            is_here = is_same_host(&addrs[i], &local[j]);
        }
        for (int j = 0; j < kept && is_here; j++) { /* names are listed twice, too */
            is_here = !is_same_host(&addrs[i], &addrs[j]);
        }
        if (is_here) {
            addrs[kept++] = addrs[i];
        }
    }
    *num = kept;
    return num_local < 0 ? num_local : 0;
}

/* ---- the choice -------------------------------------------------------------------------- */

void epi_addr_unix(const char *name, struct epi_addr *out) {
    struct sockaddr_un *un = (struct sockaddr_un *)&out->ss;
    memset(out, 0, sizeof(*out));
    un->sun_family = AF_UNIX;
    size_t bytes = strlen(name);
    bytes = bytes < sizeof(un->sun_path) - 1 ? bytes : sizeof(un->sun_path) - 1;
    memcpy(un->sun_path + 1, name, bytes); /* a leading 0 makes it abstract */
    out->len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + bytes);
}

/* The name's number k; those who do not hold the key cannot know it. */
static void unix_name(const struct epi_meet *meet, int k, char out[64]) {
    struct epi_hmac h;
    uint8_t port[4];
    uint8_t hash[EPI_SHA256_BYTES];
    epi_put_u32(port, (uint32_t)meet->port);
    epi_hmac_begin(&h, meet->key.bytes, sizeof(meet->key.bytes));
    epi_hmac_add(&h, name_label, sizeof(name_label));
    epi_hmac_add(&h, port, sizeof(port));
    epi_hmac_end(&h, hash);
    epi_format(out, 64, "libep-%u-%016llx-%d", (unsigned)geteuid(),
               (unsigned long long)epi_get_u64(hash), k);
}

static void say_where(struct epi_meet *meet) {
    char name[64];
    const bool is_v6 = strchr(meet->host, ':') != NULL;
    if (meet->over_tcp) {
        epi_format(meet->where, sizeof(meet->where), is_v6 ? "[%s]:%d" : "%s:%d", meet->host,
                   meet->port);
        return;
    }
    unix_name(meet, 0, name);
    if (meet->host[0] == '\0') {
        epi_format(meet->where, sizeof(meet->where), "the Unix socket @%s", name);
    } else {
        epi_format(meet->where, sizeof(meet->where),
                   is_v6 ? "[%s]:%d (the Unix socket @%s)" : "%s:%d (the Unix socket @%s)",
                   meet->host, meet->port, name);
    }
}

static ep_status check_is_here(const struct epi_meet *meet, const struct epi_addr *literal) {
    struct epi_addr addr = *literal;
    int num = 1;
    if (keep_local(NULL, &addr, &num) < 0 || num == 1) {
        return EP_OK; /* or it is not known */
    }
    if (meet->rank == 0) {
        return epi_fail(EP_ERR_ARG,
                        "rank 0 runs here, but %s, which is to be the address of its host, is "
                        "not one of this host's",
                        meet->host);
    }
    return epi_fail(
        EP_ERR_ARG,
        "rank 0 is at %s, which is not this host, and over a network only ranks that hold a "
        "key meet: set EP_JOB_KEY to the same secret of 16 or more characters on all ranks",
        meet->host);
}

ep_status epi_meet_choose(struct epi_meet *meet, const char *job) {
    struct epi_addr literal;
    const char *secret = epi_opt_str(EPI_OPT_JOB_KEY);
    if (!secret && epi_opt_is_malformed(EPI_OPT_JOB_KEY)) {
        return epi_fail(EP_ERR_ARG, "EP_JOB_KEY is set, but it must have 16..200 characters");
    }
    epi_key_make(&meet->key, secret, secret ? strlen(secret) : 0, job);
    const bool is_literal = read_literal(meet->host, &literal);
    const bool is_near = meet->launch.is_local || strcmp(meet->host, "localhost") == 0 ||
                         (is_literal && is_loopback(&literal));
    meet->over_tcp = (secret || meet->launch.is_spread) && !is_near;
    meet->may_be_far = !meet->over_tcp && !is_near;
    say_where(meet);
    if (meet->over_tcp && !secret && meet->rank == 0) {
        epi_log(
            EPI_LOG_WARN,
            "ranks of several hosts meet at %s without a key: whoever reaches that port and "
            "knows the job's name can join and read and write the ranks' memory; set "
            "EP_JOB_KEY to the same secret of 16 or more characters on all ranks",
            meet->where);
    }
    return meet->may_be_far && is_literal ? check_is_here(meet, &literal) : EP_OK;
}

void epi_meet_choose_shared(struct epi_meet *meet, const void *secret, size_t bytes) {
    epi_key_make(&meet->key, secret, bytes, "");
    say_where(meet);
}

/* Over TCP, the ports that rank 0 may have: an address names one. */
static int num_ports(const struct epi_meet *meet) {
    return meet->launch.num_ports > 0 ? meet->launch.num_ports : 1;
}

static int port_of(const struct epi_meet *meet, int index) {
    return meet->launch.num_ports > 0 ? meet->launch.ports[index] : meet->port;
}

static const char *resolve(const struct epi_meet *meet, struct epi_addr *out, int *num) {
    bool is_name;
    return epi_addr_resolve(meet->host, meet->port, meet->deadline, out, EPI_MEET_MAX_ADDRS,
                            num, &is_name);
}

const char *epi_meet_places(const struct epi_meet *meet,
                            struct epi_addr out[EPI_MEET_MAX_ADDRS], int *num) {
    struct epi_addr found[EPI_MEET_MAX_ADDRS];
    int num_found = 0;
    *num = meet->num_given;
    memcpy(out, meet->given, (size_t)meet->num_given * sizeof(*out));
    if (meet->num_given > 0) {
        return NULL;
    }
    if (meet->over_tcp) {
        const char *why = resolve(meet, found, &num_found);
        for (int p = 0; !why && p < num_ports(meet); p++) {
            for (int i = 0; i < num_found && *num < EPI_MEET_MAX_ADDRS; i++) {
                out[*num] = found[i];
                epi_addr_set_port(&out[*num], port_of(meet, p));
                *num += 1;
            }
        }
        return why;
    }
    for (; *num < NUM_NAMES; *num += 1) {
        char name[64];
        unix_name(meet, *num, name);
        epi_addr_unix(name, &out[*num]);
    }
    return NULL;
}

void epi_meet_doubt(const struct epi_meet *meet, struct epi_deadline deadline, char out[200]) {
    struct epi_addr addrs[EPI_MEET_MAX_ADDRS];
    bool is_name;
    int num = 0;
    out[0] = '\0';
    if (!meet->may_be_far) {
        return;
    }
    const char *why = epi_addr_resolve(meet->host, meet->port, deadline, addrs,
                                       EPI_MEET_MAX_ADDRS, &num, &is_name);
    if (why) {
        epi_format(out, 200, "the name %.80s cannot be resolved: %s", meet->host, why);
    } else if (keep_local(NULL, addrs, &num) == 0 && num == 0) {
        epi_format(out, 200,
                   "%.60s is not this host: ranks of several hosts need EP_JOB_KEY, the same "
                   "secret on all",
                   meet->host);
    }
}

/* ---- listening --------------------------------------------------------------------------- */

static ep_status fail_to_listen(const struct epi_meet *meet, const char *where, int err) {
    const char *advice = "";
    if (err == EADDRINUSE) {
        advice = ": a program listens there, or has a connection from there; choose another "
                 "port (EP_PORT, or the address)";
    } else if (err == EACCES) {
        advice = "; choose a port of 1024 or above (EP_PORT, or the address)";
    } else if (err == EMFILE) {
        advice = "; raise the limit of open files (ulimit -n)";
    }
    return epi_fail(EP_ERR_SYSTEM, "rendezvous: rank %d cannot listen on %s: %s%s", meet->rank,
                    where, strerror(err), advice);
}

enum holder { HOLDER_NOBODY, HOLDER_OTHER_USER, HOLDER_THIS_PROCESS, HOLDER_OTHER_PROCESS };

/* Who holds a name that cannot be had. */
static enum holder find_holder(const struct epi_addr *addr, int *pid) {
    int uid = -1;
    int fd = epi_sock_connect(addr, epi_deadline_after(0));
    if (fd == -ECONNREFUSED) {
        return HOLDER_NOBODY;
    }
    bool is_ours = fd >= 0 && epi_sock_is_same_user(fd, &uid, pid);
    epi_fd_close(&fd);
    if (!is_ours) {
        return HOLDER_OTHER_USER;
    }
    return *pid == (int)getpid() ? HOLDER_THIS_PROCESS : HOLDER_OTHER_PROCESS;
}

/* Without a name of the job, who waits there may be left over from the last: it is told that there
 * is a newer rank 0, and goes. */
static void claim_place(const struct epi_meet *meet, const struct epi_addr *addr) {
    struct epi_conn conn;
    struct epi_meet brief = *meet;
    brief.deadline = epi_deadline_min(meet->deadline, epi_deadline_after(CLAIM_NS));
    int fd = epi_sock_connect(addr, brief.deadline);
    if (fd >= 0 && epi_meet_peer_over(&brief, fd, &conn) == EP_OK) {
        epi_conn_close(&conn);
    }
}

static ep_status listen_on_name(const struct epi_meet *meet, const struct epi_addr *addr,
                                struct epi_listeners *out, bool *is_taken) {
    int pid = 0;
    int num_claims = 0;
    for (;;) {
        int fd = epi_sock_listen(addr);
        if (fd >= 0) {
            out->fds[out->num++] = fd;
            return EP_OK;
        }
        if (fd != -EADDRINUSE) {
            return fail_to_listen(meet, meet->where, -fd);
        }
        enum holder holder = find_holder(addr, &pid);
        if (holder == HOLDER_OTHER_USER) {
            *is_taken = true;
            return EP_OK;
        }
        if (holder == HOLDER_OTHER_PROCESS && meet->launch.by_hand && num_claims < MAX_CLAIMS &&
            !epi_deadline_expired(meet->deadline)) {
            num_claims++;
            claim_place(meet, addr);
        } else if (holder == HOLDER_OTHER_PROCESS) {
            return epi_fail(
                EP_ERR_SYSTEM,
                "rendezvous: process %d waits at %s already, as rank 0 of this job; "
                "end it, or give the jobs different names (EP_JOB) or addresses",
                pid, meet->where);
        }
        if (epi_deadline_expired(meet->deadline)) {
            return epi_fail(EP_ERR_TIMEOUT,
                            "rendezvous: another group of this process has been forming at %s "
                            "for %.1f s; groups that are made at the same time need different "
                            "names (ep_group_config.job)",
                            meet->where, (double)meet->timeout_ns / 1e9);
        }
        epi_sleep_ns(HELD_PAUSE_NS); /* nobody: it has just been given back */
    }
}

static ep_status listen_on_unix(const struct epi_meet *meet, struct epi_listeners *out) {
    struct epi_addr addrs[EPI_MEET_MAX_ADDRS];
    int num = 0;
    epi_meet_places(meet, addrs, &num);
    for (int k = 0; k < num; k++) {
        bool is_taken = false;
        EPI_TRY(listen_on_name(meet, &addrs[k], out, &is_taken));
        if (!is_taken && k > 0) {
            epi_log(EPI_LOG_WARN, "rendezvous: another user holds %s and %d more like it",
                    meet->where, k - 1);
        }
        if (!is_taken) {
            return EP_OK;
        }
    }
    return epi_fail(
        EP_ERR_SYSTEM,
        "rendezvous: another user of this host holds %s and its %d like; set EP_JOB "
        "to another name, or EP_JOB_KEY to the same secret on all ranks",
        meet->where, num - 1);
}

/* All or none: an address left to somebody else is one at which ranks would find him. */
static ep_status listen_on_port(const struct epi_meet *meet, struct epi_addr *addrs, int num,
                                int port, int *err, struct epi_listeners *out) {
    *err = 0;
    for (int i = 0; i < num; i++) {
        char text[EPI_ADDR_TEXT_BYTES];
        epi_addr_set_port(&addrs[i], port);
        int fd = epi_sock_listen(&addrs[i]);
        if (fd < 0) {
            *err = -fd;
            epi_addr_text(&addrs[i], text);
            epi_listeners_close(out);
            return fail_to_listen(meet, text, -fd);
        }
        out->fds[out->num++] = fd;
    }
    return EP_OK;
}

static ep_status listen_on_tcp(const struct epi_meet *meet, struct epi_listeners *out) {
    struct epi_addr addrs[EPI_MEET_MAX_ADDRS];
    int num = 0;
    const char *rule_from = NULL;
    const char *rule = interface_rule(&rule_from);
    const char *why = resolve(meet, addrs, &num);
    if (why) {
        return epi_fail(EP_ERR_SYSTEM, "rendezvous: rank 0 cannot resolve %s: %s", meet->host,
                        why);
    }
    int err = keep_local(rule, addrs, &num);
    if (err < 0) {
        return epi_fail(EP_ERR_SYSTEM, "rendezvous: cannot list this host's addresses: %s",
                        strerror(-err));
    }
    if (num == 0) {
        return epi_fail(EP_ERR_ARG,
                        "rank 0 runs here, but %s is not an address of this host%s%s%s%s",
                        meet->host, rule ? " on the interfaces that " : "",
                        rule ? rule_from : "", rule ? " names: " : "", rule ? rule : "");
    }
    for (int p = 0; p < num_ports(meet); p++) {
        ep_status st = listen_on_port(meet, addrs, num, port_of(meet, p), &err, out);
        if (err != EADDRINUSE || p == num_ports(meet) - 1) {
            return st;
        }
        epi_log(EPI_LOG_INFO, "%s; port %d is next", epi_error_text(), port_of(meet, p + 1));
    }
    return EP_OK;
}

static bool is_link_local(const struct epi_addr *a) {
    return a->ss.ss_family == AF_INET6 &&
           IN6_IS_ADDR_LINKLOCAL(&((const struct sockaddr_in6 *)&a->ss)->sin6_addr);
}

/* Those that do not fit in the text are left out, and closed. */
ep_status epi_meet_listen_far(struct epi_listeners *out, char *text, size_t bytes) {
    struct epi_addr addrs[MAX_LOCAL_ADDRS];
    const char *rule_from = NULL;
    const char *rule = interface_rule(&rule_from);
    const int num = list_local(rule, addrs, MAX_LOCAL_ADDRS);
    epi_listeners_close(out);
    text[0] = '\0';
    for (int i = 0; i < num && out->num < EPI_MEET_MAX_ADDRS; i++) {
        char one[EPI_ADDR_TEXT_BYTES];
        const size_t used = strlen(text);
        if (is_loopback(&addrs[i]) || is_link_local(&addrs[i])) {
            continue;
        }
        epi_addr_set_port(&addrs[i], 0);
        int fd = epi_sock_listen(&addrs[i]);
        addrs[i].len = sizeof(addrs[i].ss);
        if (fd < 0 || getsockname(fd, (struct sockaddr *)&addrs[i].ss, &addrs[i].len) != 0) {
            epi_fd_close(&fd);
            continue;
        }
        epi_addr_text(&addrs[i], one);
        if (used + strlen(one) + 2 > bytes) {
            epi_fd_close(&fd);
            break;
        }
        epi_format(text + used, bytes - used, "%s%s", used > 0 ? "," : "", one);
        out->fds[out->num++] = fd;
    }
    return out->num > 0
               ? EP_OK
               : epi_fail(
                     EP_ERR_SYSTEM,
                     "rendezvous: ranks are on several hosts, and rank 0's has no address on "
                     "which it can listen%s%s%s%s",
                     rule ? " of the interfaces that " : "", rule ? rule_from : "",
                     rule ? " names: " : "", rule ? rule : "");
}

ep_status epi_meet_take_far(struct epi_meet *meet, const char *text) {
    meet->over_tcp = true;
    epi_format(meet->where, sizeof(meet->where), "%s", text);
    for (size_t len; *text != '\0' && meet->num_given < EPI_MEET_MAX_ADDRS; text += len) {
        char one[EPI_ADDR_TEXT_BYTES], host[256];
        int port = 0;
        text += *text == ',';
        len = strcspn(text, ",");
        epi_format(one, sizeof(one), "%.*s", (int)len, text);
        struct epi_addr *addr = &meet->given[meet->num_given];
        if (epi_addr_parse(one, host, &port) || port == 0 || !read_literal(host, addr)) {
            return epi_fail(EP_ERR_SYSTEM,
                            "rendezvous: rank 0 says that it listens at \"%s\", which is no "
                            "address",
                            one);
        }
        epi_addr_set_port(addr, port);
        meet->num_given++;
    }
    return EP_OK;
}

ep_status epi_meet_listen(const struct epi_meet *meet, struct epi_listeners *out) {
    out->num = 0;
    return meet->over_tcp ? listen_on_tcp(meet, out) : listen_on_unix(meet, out);
}

void epi_listeners_close(struct epi_listeners *listeners) {
    while (listeners->num > 0) {
        epi_fd_close(&listeners->fds[--listeners->num]);
    }
}
