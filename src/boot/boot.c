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

#include <string.h>

struct epi_boot {
    uint32_t process; /* that made it */
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

/* ---- processes --------------------------------------------------------------------------- */

static ep_status read_config(const struct epi_boot_config *config, struct epi_meet *meet) {
    struct epi_job job;
    struct epi_launch *launch = &meet->launch;
    EPI_TRY(epi_launch_job(config->job, &job));
    meet->rank = config->rank;
    meet->num_ranks = config->num_ranks;
    if (config->allgather) {
        return EP_OK; /* the cards have all that is needed */
    }
    if (config->address) {
        const char *why = epi_addr_parse(config->address, meet->host, &meet->port);
        if (why || meet->port == 0) {
            return epi_fail(EP_ERR_ARG,
                            "address is \"%.100s\", it must be \"host:port\" or \"[v6]:port\" "
                            "with a port in 1..65535: %s",
                            config->address, why ? why : "it has none");
        }
    } else {
        EPI_TRY(epi_launch_read(&job, launch));
        meet->rank = launch->rank;
        meet->num_ranks = launch->num_ranks;
        meet->port = launch->ports[0];
        memcpy(meet->host, launch->host, sizeof(meet->host));
    }
    meet->is_job_named = job.is_named;
    return meet->num_ranks == 1 ? EP_OK : epi_meet_choose(meet, job.name);
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

/* Rank 0: all who have come are of this job, as far as anybody can tell. */
static ep_status check_ranks(const struct epi_meet *meet, struct epi_conn *conns) {
    ep_status st = epi_launch_check(&meet->launch);
    if (st != EP_OK) {
        epi_meet_reject_all(conns, meet->num_ranks, st, epi_error_text());
    }
    return st;
}

static ep_status meet_processes(struct epi_boot *boot, const struct epi_boot_config *config,
                                struct epi_meet *meet) {
    struct epi_listeners listeners = {0};
    struct epi_star *star = NULL;
    ep_status st = epi_star_make(&star, meet->rank, meet->num_ranks);
    if (config->allgather) {
        st = epi_cards_exchange(config, meet, st, &listeners);
    } else if (meet->rank == 0 && st == EP_OK) {
        st = epi_meet_listen(meet, &listeners);
    }
    if (st == EP_OK) {
        star->on_dead = config->on_dead;
        star->on_told = config->on_told;
        star->ctx = config->ctx;
        st = meet->rank == 0 ? epi_meet_root(meet, &listeners, star->conns)
                             : epi_meet_peer(meet, &star->conns[0]);
    }
    if (st == EP_OK && meet->rank == 0) {
        st = check_ranks(meet, star->conns);
    }
    epi_listeners_close(&listeners);
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

/* ---- a rank that cannot come ------------------------------------------------------------- */

/* Rank 0 tells whoever comes, another rank tells rank 0, which tells all. */
static void come_and_say(struct epi_meet *meet) {
    struct epi_listeners listeners = {0};
    struct epi_conn conn;
    if (meet->rank != 0) {
        epi_conn_init(&conn, -1, 0, 0);
        epi_meet_peer(meet, &conn);
        return;
    }
    const int num_ranks = meet->num_ranks;
    struct epi_conn *conns = epi_alloc_array((size_t)num_ranks, sizeof(*conns));
    for (int r = 0; conns && r < num_ranks; r++) {
        epi_conn_init(&conns[r], -1, r, 0);
    }
    if (conns && epi_meet_listen(meet, &listeners) == EP_OK) {
        epi_meet_root(meet, &listeners, conns);
    }
    epi_listeners_close(&listeners);
    epi_free(conns);
}

static void say_failed(const struct epi_boot_config *config, struct epi_meet *meet,
                       ep_status st, const char *text) {
    struct epi_listeners listeners = {0};
    const bool from_env = !config->allgather && !config->address;
    if ((from_env && (config->rank != -1 || config->num_ranks != -1)) ||
        read_config(config, meet) != EP_OK || meet->num_ranks < 2 ||
        meet->num_ranks > EP_MAX_RANKS) {
        return; /* there is nobody to be told, or nobody knows where */
    }
    meet->timeout_ns = EPI_MEET_SAY_FAILED_NS;
    meet->deadline = epi_deadline_after(meet->timeout_ns);
    meet->has_failed = true;
    epi_format(meet->failed, sizeof(meet->failed), "%s%s",
               meet->rank == 0 ? "rank 0 failed: " : "", text);
    if (config->allgather && meet->rank >= 0 && meet->rank < meet->num_ranks) {
        epi_fail(st, "%s", text);
        epi_cards_exchange(config, meet, st, &listeners);
    } else if (!config->allgather) {
        come_and_say(meet);
    }
}

ep_status epi_boot_say_failed(const struct epi_boot_config *config, ep_status st) {
    char text[EPI_ERROR_TEXT_BYTES];
    epi_format(text, sizeof(text), "%s", epi_error_text());
    if (config->world) {
        epi_world_fail(config->world, config->rank, text);
    } else {
        struct epi_meet *meet = epi_alloc(sizeof(*meet));
        if (meet) {
            say_failed(config, meet, st, text);
        }
        epi_free(meet);
    }
    return epi_fail(st, "%s", text);
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
        EPI_TRY(epi_world_join(config->world, config->rank, timeout_ns, &boot->session));
        epi_world_listen(boot->session, boot->rank, config->on_told, config->ctx);
        return EP_OK;
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
        st = meet_processes(boot, config, meet);
        epi_log_set_rank(outer_rank);
    }
    epi_free(meet);
    return st;
}

ep_status epi_boot_create(struct epi_boot **out, const struct epi_boot_config *config) {
    ep_status st = check(config);
    if (st != EP_OK) {
        return epi_boot_say_failed(config, st);
    }
    struct epi_boot *boot = epi_alloc(sizeof(*boot));
    if (!boot) {
        return epi_boot_say_failed(config, epi_fail(EP_ERR_NOMEM, "rendezvous: no memory"));
    }
    boot->process = epi_process();
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
    if (boot->session && !epi_is_forked(boot->process)) {
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

void epi_boot_tell(struct epi_boot *boot, uint64_t word) {
    if (boot->session) {
        epi_world_tell(boot->session, boot->rank, word);
    } else if (boot->star) {
        epi_star_tell(boot->star, word);
    }
}

ep_status epi_boot_barrier(struct epi_boot *boot, struct epi_deadline deadline) {
    return epi_boot_allgather(boot, NULL, 0, NULL, deadline);
}
