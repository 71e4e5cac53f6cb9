/* SPDX-License-Identifier: MIT */
/*
 * How descriptors get from the ranks that have one to all others: the collective around pass.c.
 * Every step ends in agreement before the next one waits for anybody, so a source serves only
 * those whose connection and token are there already. Called by the threads that create groups.
 */
#include "src/mem/shared.h"

#include <string.h>
#include <unistd.h>

/* Longer than any scheduling delay; ranks on other hosts were already told apart by their hint. */
#define PASS_NS (10 * EPI_NS_PER_S)

struct epi_greeting {
    struct epi_host_hint hint;
    uint64_t user;
    uint8_t token[EPI_FD_TOKEN];
};

/* Names the ranks that are not where the first is: the same verdict on all that share memory. */
static ep_status check_hosts(const struct epi_greeting *all, const struct epi_mem_config *c) {
    char names[128] = "";
    const int first = epi_mem_rank(c, 0);
    int others = 0, foreign = first;
    for (int i = 1; i < c->num_ranks; i++) {
        const int r = epi_mem_rank(c, i);
        foreign = foreign != first || all[r].user == all[first].user ? foreign : r;
        if (memcmp(&all[r].hint, &all[first].hint, sizeof(all[first].hint)) != 0) {
            size_t len = strlen(names);
            epi_format(names + len, sizeof(names) - len, "%s%d", others++ ? ", " : "", r);
        }
    }
    if (foreign != first) {
        return epi_fail(
            EP_ERR_UNSUPPORTED,
            "rank %d runs as user %llu and rank %d as user %llu: ranks of a host are of one "
            "user",
            foreign, (unsigned long long)all[foreign].user, first,
            (unsigned long long)all[first].user);
    }
    if (others) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "rank(s) %s are on another host, or in another network namespace, than "
                        "rank %d, and cannot share memory with it",
                        names, first);
    }
    return EP_OK;
}

static ep_status greet(struct epi_share *s, const struct epi_mem_config *c, ep_status made) {
    const struct epi_exchange *x = &c->exchange;
    struct epi_greeting mine;
    ep_status st = made;
    memset(&mine, 0, sizeof(mine));
    epi_host_hint(&mine.hint);
    mine.user = (uint64_t)geteuid();
    if (st == EP_OK && epi_mem_index(c, x->rank) < s->num_sources) {
        s->listener = epi_fd_listen(mine.token, &st);
    }
    s->hello = epi_alloc_array((size_t)x->num_ranks, sizeof(*s->hello));
    s->socket = epi_alloc_array((size_t)s->num_sources, sizeof(*s->socket));
    for (int i = 0; s->socket && i < s->num_sources; i++) {
        s->socket[i] = -1;
    }
    if ((!s->hello || !s->socket) && st == EP_OK) {
        st = epi_fail(EP_ERR_NOMEM, "no memory to hear %d ranks", x->num_ranks);
    }
    EPI_TRY(epi_mem_agree(c, st, "allocating the arenas"));
    return x->allgather(x->ctx, &mine, sizeof(mine), s->hello);
}

ep_status epi_share_open(struct epi_share *s, const struct epi_mem_config *c, int num_sources,
                         ep_status made) {
    memset(s, 0, sizeof(*s));
    s->num_sources = num_sources;
    s->listener = -1;
    EPI_TRY(greet(s, c, made));
    ep_status st = check_hosts(s->hello, c);
    s->deadline = epi_deadline_min(c->deadline, epi_deadline_after(PASS_NS));
    for (int i = 0; st == EP_OK && i < num_sources; i++) {
        const int source = epi_mem_rank(c, i);
        if (source != c->exchange.rank) {
            s->socket[i] = epi_fd_connect(source, s->hello[source].token, s->deadline, &st);
        }
    }
    return epi_mem_agree(c, st, "reaching the arenas");
}

ep_status epi_share_pass(struct epi_share *s, const struct epi_mem_config *c, int *fds) {
    const int own = epi_mem_index(c, c->exchange.rank);
    ep_status st = EP_OK;
    if (s->listener >= 0) {
        st = epi_fd_serve(s->listener, s->hello[c->exchange.rank].token, fds[own],
                          c->num_ranks - 1, s->deadline);
        if (st != EP_OK) { /* who still waits hears it at once */
            epi_fd_close(&s->listener);
        }
    }
    for (int i = 0; st == EP_OK && i < s->num_sources; i++) {
        if (i != own) {
            fds[i] = epi_fd_receive(epi_mem_rank(c, i), s->socket[i], s->deadline, &st);
        }
    }
    return st;
}

void epi_share_close(struct epi_share *s) {
    for (int i = 0; s->socket && i < s->num_sources; i++) {
        epi_fd_close(&s->socket[i]);
    }
    epi_fd_close(&s->listener);
    epi_free(s->socket);
    epi_free(s->hello);
}
