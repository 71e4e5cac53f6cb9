/* SPDX-License-Identifier: MIT */
/*
 * The rendezvous: finds out how the ranks are to meet, makes them meet, and is what remains.
 *
 * Owns the boot object, which is a star of connections (processes), a session of a world
 * (threads), or nothing but itself (one rank). Runs on the creating thread; see boot.h for who
 * may call what. On failure everything is undone, and the other ranks are told where that is
 * possible.
 * Must not look at arguments twice: what gets past check() is used as it is.
 */
#include "src/boot/parts.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/random.h>

struct epi_boot {
    int rank;
    int num_ranks;
    struct epi_session *session; /* threads of a world */
    struct epi_star *star;       /* processes */
};

/* ---- arguments --------------------------------------------------------------------------- */

static ep_status check(const struct epi_boot_config *config) {
    bool from_env = !config->world && !config->allgather && !config->address;
    if (config->timeout_ns < 0) {
        return epi_fail(EP_ERR_ARG, "the timeout is negative");
    }
    if (from_env) {
        if (config->rank != -1 || config->num_ranks != -1) {
            return epi_fail(EP_ERR_ARG,
                            "rank %d and num_ranks %d are given, but no world, allgather or "
                            "address; to meet as the environment says, both must be -1",
                            config->rank, config->num_ranks);
        }
        return EP_OK;
    }
    int num_ranks = config->num_ranks;
    if (config->world && num_ranks == -1) {
        num_ranks = epi_world_num_ranks(config->world);
    }
    if (num_ranks < 1 || num_ranks > EP_MAX_RANKS) {
        return epi_fail(EP_ERR_ARG, "num_ranks is %d, it must be in 1..%d", num_ranks,
                        EP_MAX_RANKS);
    }
    if (config->rank < 0 || config->rank >= num_ranks) {
        return epi_fail(EP_ERR_ARG, "rank is %d, it must be in 0..%d", config->rank,
                        num_ranks - 1);
    }
    if (config->world && num_ranks != epi_world_num_ranks(config->world)) {
        return epi_fail(EP_ERR_ARG, "num_ranks is %d, but the world has %d", num_ranks,
                        epi_world_num_ranks(config->world));
    }
    return EP_OK;
}

/* ---- meeting by the caller's allgather --------------------------------------------------- */

/*
 * What each rank puts into the caller's allgather; rank 0's is the one that counts:
 *
 *      0          4         8      12          16      20     24     32
 *      +----------+---------+------+-----------+-------+------+------+--------------------
 *      | protocol | version | rank | num_ranks | status| port | job  | 8 x { family, 16 bytes }
 *      +----------+---------+------+-----------+-------+------+------+--------------------
 */
enum card_at {
    CARD_AT_PROTOCOL = 0,
    CARD_AT_VERSION = 4,
    CARD_AT_RANK = 8,
    CARD_AT_NUM_RANKS = 12,
    CARD_AT_STATUS = 16,
    CARD_AT_PORT = 20,
    CARD_AT_JOB = 24,
    CARD_AT_ADDRS = 32,
    CARD_ADDR_BYTES = 20,
    CARD_BYTES = CARD_AT_ADDRS + EPI_MEET_MAX_ADDRS * CARD_ADDR_BYTES
};
_Static_assert(CARD_BYTES == 192, "every rank must hand the same number of bytes over");

static void card_put_addr(uint8_t *p, const struct epi_addr *addr) {
    if (addr->ss.ss_family == AF_INET6) {
        epi_put_u32(p, 6);
        memcpy(p + 4, &((const struct sockaddr_in6 *)&addr->ss)->sin6_addr, 16);
    } else {
        epi_put_u32(p, 4);
        memcpy(p + 4, &((const struct sockaddr_in *)&addr->ss)->sin_addr, 4);
    }
}

static bool card_get_addr(const uint8_t *p, int port, struct epi_addr *out) {
    uint32_t family = epi_get_u32(p);
    epi_addr_any(port, family == 6, out);
    if (family == 6) {
        memcpy(&((struct sockaddr_in6 *)&out->ss)->sin6_addr, p + 4, 16);
    } else if (family == 4) {
        memcpy(&((struct sockaddr_in *)&out->ss)->sin_addr, p + 4, 4);
    }
    return family == 4 || family == 6;
}

/* Rank 0: listens on a port of the kernel's choice and writes where. */
static ep_status card_open(struct epi_meet *meet, uint8_t *card, int *listen_fd) {
    uint64_t nonce = 0;
    epi_format(meet->where, sizeof(meet->where), "a port of the system's choice");
    EPI_TRY(epi_meet_listen(meet, listen_fd));
    int port = epi_sock_port(*listen_fd);
    int num = epi_addr_local(port, meet->addrs, EPI_MEET_MAX_ADDRS);
    bool has_nonce = getrandom(&nonce, sizeof(nonce), 0) == (ssize_t)sizeof(nonce);
    if (port < 0 || num <= 0 || !has_nonce) {
        epi_sock_close(listen_fd);
        return epi_fail(EP_ERR_SYSTEM, "rendezvous: rank 0 cannot find an address of its host");
    }
    meet->job ^= nonce;
    epi_put_u32(card + CARD_AT_PORT, (uint32_t)port);
    epi_put_u64(card + CARD_AT_JOB, meet->job);
    for (int i = 0; i < num; i++) {
        card_put_addr(card + CARD_AT_ADDRS + i * CARD_ADDR_BYTES, &meet->addrs[i]);
    }
    return EP_OK;
}

static ep_status cards_check(const struct epi_meet *meet, const uint8_t *cards) {
    for (int r = 0; r < meet->num_ranks; r++) {
        const uint8_t *card = cards + (size_t)r * CARD_BYTES;
        if (epi_get_u32(card + CARD_AT_PROTOCOL) != EPI_WIRE_PROTOCOL ||
            epi_get_u32(card + CARD_AT_VERSION) != epi_meet_version()) {
            return epi_fail(
                EP_ERR_VERSION,
                "rendezvous: rank %d runs libep %u, rank %d runs %u; all ranks must "
                "use the same libep",
                r, epi_get_u32(card + CARD_AT_VERSION), meet->rank, epi_meet_version());
        }
        if (epi_get_u32(card + CARD_AT_NUM_RANKS) != (uint32_t)meet->num_ranks) {
            return epi_fail(EP_ERR_MISMATCH,
                            "rendezvous: rank %d was told there are %u ranks, rank %d was told "
                            "%d",
                            r, epi_get_u32(card + CARD_AT_NUM_RANKS), meet->rank,
                            meet->num_ranks);
        }
        if (epi_get_u32(card + CARD_AT_RANK) != (uint32_t)r) {
            return epi_fail(EP_ERR_MISMATCH,
                            "rendezvous: the allgather returned rank %u's bytes at place %d",
                            epi_get_u32(card + CARD_AT_RANK), r);
        }
    }
    for (int r = 0; r < meet->num_ranks; r++) {
        int32_t status = (int32_t)epi_get_u32(cards + (size_t)r * CARD_BYTES + CARD_AT_STATUS);
        if (status != EP_OK) {
            return epi_fail(EP_ERR_PEER, "rendezvous: rank %d failed: %s%s", r,
                            ep_status_string((ep_status)status),
                            r == 0 && status == EP_ERR_SYSTEM ? ", it could not listen" : "");
        }
    }
    return EP_OK;
}

static void cards_read(struct epi_meet *meet, const uint8_t *card) {
    int port = (int)(epi_get_u32(card + CARD_AT_PORT) & 0xffff);
    meet->job = epi_get_u64(card + CARD_AT_JOB);
    meet->num_addrs = 0;
    for (int i = 0; i < EPI_MEET_MAX_ADDRS; i++) {
        const uint8_t *p = card + CARD_AT_ADDRS + i * CARD_ADDR_BYTES;
        meet->num_addrs += card_get_addr(p, port, &meet->addrs[meet->num_addrs]);
    }
    if (meet->num_addrs > 0) {
        char text[EPI_ADDR_TEXT_BYTES];
        epi_addr_text(&meet->addrs[0], text);
        epi_format(meet->where, sizeof(meet->where), "%s", text);
    }
}

/* Every rank takes part in the callback, and says so if it has failed: the others are in it. */
static ep_status meet_by_callback(const struct epi_boot_config *config, struct epi_meet *meet,
                                  ep_status own, int *listen_fd) {
    uint8_t card[CARD_BYTES] = {0};
    char own_text[EPI_ERROR_TEXT_BYTES];
    uint8_t *cards = epi_alloc_array((size_t)meet->num_ranks, CARD_BYTES);
    if (!cards) {
        return epi_fail(EP_ERR_NOMEM, "rendezvous: no memory for %d ranks", meet->num_ranks);
    }
    epi_put_u32(card + CARD_AT_PROTOCOL, EPI_WIRE_PROTOCOL);
    epi_put_u32(card + CARD_AT_VERSION, epi_meet_version());
    epi_put_u32(card + CARD_AT_RANK, (uint32_t)meet->rank);
    epi_put_u32(card + CARD_AT_NUM_RANKS, (uint32_t)meet->num_ranks);
    meet->is_job_named = true;
    if (meet->rank == 0 && own == EP_OK) {
        own = card_open(meet, card, listen_fd);
    }
    epi_put_u32(card + CARD_AT_STATUS, (uint32_t)own);
    epi_format(own_text, sizeof(own_text), "%s", epi_error_text());
    int rc = config->allgather(config->allgather_ctx, card, cards, CARD_BYTES);
    ep_status st = own != EP_OK ? epi_fail(own, "%s", own_text) : EP_OK;
    if (st == EP_OK && rc != 0) {
        st = epi_fail(EP_ERR_SYSTEM, "rendezvous: the caller's allgather returned %d", rc);
    }
    if (st == EP_OK) {
        st = cards_check(meet, cards);
    }
    if (st == EP_OK) {
        cards_read(meet, cards);
    }
    epi_free(cards);
    return st;
}

/* ---- meeting over TCP -------------------------------------------------------------------- */

static ep_status read_config(const struct epi_boot_config *config, struct epi_meet *meet) {
    struct epi_job job;
    EPI_TRY(epi_launch_job(config->job, &job));
    meet->rank = config->rank;
    meet->num_ranks = config->num_ranks;
    meet->job = job.id;
    meet->is_job_named = job.is_named;
    if (config->allgather) {
        return EP_OK;
    }
    if (config->address) {
        if (!epi_addr_split(config->address, meet->host, &meet->port)) {
            return epi_fail(EP_ERR_ARG,
                            "address is \"%.100s\", it must be \"host:port\" or \"[v6]:port\" "
                            "with a port in 1..65535",
                            config->address);
        }
    } else {
        struct epi_launch launch = {0};
        EPI_TRY(epi_launch_read(&job, &launch));
        meet->job = job.id;
        meet->is_job_named = job.is_named;
        meet->rank = launch.rank;
        meet->num_ranks = launch.num_ranks;
        meet->port = launch.ports[0];
        memcpy(meet->host, launch.host, sizeof(meet->host));
    }
    bool is_v6 = strchr(meet->host, ':') != NULL;
    epi_format(meet->where, sizeof(meet->where), is_v6 ? "[%s]:%d" : "%s:%d", meet->host,
               meet->port);
    return EP_OK;
}

static ep_status star_start(struct epi_star *star) {
    if (star->rank == 0) {
        epi_meet_start(star->conns, star->num_ranks);
    }
    int err = epi_star_run(star);
    if (err == 0) {
        return EP_OK;
    }
    ep_status st = epi_fail(EP_ERR_SYSTEM, "rendezvous: cannot start the control thread: %s",
                            strerror(err));
    if (star->rank == 0) {
        epi_meet_reject_all(star->conns, star->num_ranks, EP_ERR_PEER,
                            "rank 0 failed: it cannot start its control thread");
    } else {
        epi_conn_send(&star->conns[0], &(struct epi_frame){.type = EPI_FRAME_BYE});
        epi_conn_flush(&star->conns[0]);
    }
    return st;
}

static ep_status meet_over_tcp(struct epi_boot *boot, const struct epi_boot_config *config,
                               struct epi_meet *meet) {
    int listen_fd = -1;
    struct epi_star *star = NULL;
    ep_status st = epi_star_make(&star, meet->rank, meet->num_ranks);
    if (config->allgather) {
        st = meet_by_callback(config, meet, st, &listen_fd);
    } else if (meet->rank == 0 && st == EP_OK) {
        st = epi_meet_listen(meet, &listen_fd);
    }
    if (st == EP_OK) {
        star->on_dead = config->on_dead;
        star->on_dead_ctx = config->on_dead_ctx;
        st = meet->rank == 0 ? epi_meet_root(meet, listen_fd, star->conns)
                             : epi_meet_peer(meet, &star->conns[0]);
    }
    epi_sock_close(&listen_fd);
    if (st == EP_OK) {
        st = star_start(star);
    }
    if (st != EP_OK && star) {
        epi_star_free(star);
        star = NULL;
    }
    boot->star = star;
    return st;
}

/* ---- the interface ----------------------------------------------------------------------- */

static ep_status meet_all(struct epi_boot *boot, const struct epi_boot_config *config) {
    int64_t timeout_ns = config->timeout_ns;
    if (timeout_ns == 0) {
        timeout_ns = epi_opt_int(EPI_OPT_TIMEOUT_MS) * EPI_NS_PER_MS;
    }
    if (config->world) {
        boot->rank = config->rank;
        boot->num_ranks = epi_world_num_ranks(config->world);
        return epi_world_join(config->world, config->rank, timeout_ns, &boot->session);
    }
    struct epi_meet *meet = epi_alloc(sizeof(*meet));
    if (!meet) {
        return epi_fail(EP_ERR_NOMEM, "rendezvous: no memory");
    }
    meet->timeout_ns = timeout_ns;
    meet->deadline = epi_deadline_after(timeout_ns);
    ep_status st = read_config(config, meet);
    boot->rank = meet->rank;
    boot->num_ranks = meet->num_ranks;
    if (st == EP_OK && meet->num_ranks > 1) {
        int outer_rank = epi_log_rank();
        epi_log_set_rank(meet->rank);
        st = meet_over_tcp(boot, config, meet);
        epi_log_set_rank(outer_rank);
    }
    epi_free(meet);
    return st;
}

/* The other threads of a world wait for this one: they learn at once that it is in vain. */
static ep_status fail_before_joining(const struct epi_boot_config *config, ep_status st) {
    char text[EPI_ERROR_TEXT_BYTES];
    if (!config->world) {
        return st;
    }
    epi_format(text, sizeof(text), "%s", epi_error_text());
    epi_boot_world_fail(config->world, config->rank, text);
    return epi_fail(st, "%s", text);
}

ep_status epi_boot_create(struct epi_boot **out, const struct epi_boot_config *config) {
    ep_status st = check(config);
    if (st != EP_OK) {
        return fail_before_joining(config, st);
    }
    struct epi_boot *boot = epi_alloc(sizeof(*boot));
    if (!boot) {
        return fail_before_joining(config, epi_fail(EP_ERR_NOMEM, "rendezvous: no memory"));
    }
    st = meet_all(boot, config);
    if (st != EP_OK) {
        epi_free(boot);
        return st;
    }
    *out = boot;
    return EP_OK;
}

void epi_boot_destroy(struct epi_boot **boot_ptr) {
    if (!boot_ptr || !*boot_ptr) {
        return;
    }
    struct epi_boot *boot = *boot_ptr;
    *boot_ptr = NULL;
    if (boot->session) {
        epi_world_leave(boot->session, boot->rank);
    }
    if (boot->star) {
        epi_star_free(boot->star);
    }
    epi_free(boot);
}

int epi_boot_rank(const struct epi_boot *boot) {
    return boot->rank;
}

int epi_boot_num_ranks(const struct epi_boot *boot) {
    return boot->num_ranks;
}

bool epi_boot_is_threads(const struct epi_boot *boot) {
    return boot->session != NULL;
}

ep_status epi_boot_allgather(struct epi_boot *boot, const void *in, size_t bytes, void *out,
                             struct epi_deadline deadline) {
    if (bytes > EPI_BOOT_MAX_BYTES ||
        bytes * (size_t)boot->num_ranks > EPI_BOOT_MAX_TOTAL_BYTES) {
        return epi_fail(EP_ERR_ARG, "allgather: %zu bytes of each of %d ranks are too many",
                        bytes, boot->num_ranks);
    }
    if (boot->session) {
        return epi_world_allgather(boot->session, boot->rank, in, bytes, out, deadline);
    }
    if (boot->star) {
        return epi_star_allgather(boot->star, in, bytes, out, deadline);
    }
    if (bytes > 0) {
        memmove(out, in, bytes);
    }
    return EP_OK;
}

ep_status epi_boot_barrier(struct epi_boot *boot, struct epi_deadline deadline) {
    return epi_boot_allgather(boot, NULL, 0, NULL, deadline);
}
