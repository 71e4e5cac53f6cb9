/* SPDX-License-Identifier: MIT */
/*
 * Finds the nodes of a group: each rank says where it runs and what its EP_NODE_SIZE is, and all
 * conclude the same from that. Run by the threads that create groups.
 */
#include "src/ep/nodes.h"

#include <stdlib.h>
#include <string.h>

#define SIZE_TEXT 200 /* of EP_NODE_SIZE */

struct place {
    struct epi_host_hint host;
    char sizes[SIZE_TEXT + 8]; /* "": by hosts */
};

static bool same_host(const struct place *a, const struct place *b) {
    return memcmp(&a->host, &b->host, sizeof(a->host)) == 0;
}

static ep_status check_alike(const struct place *all, int num_ranks) {
    for (int r = 1; r < num_ranks; r++) {
        if (memcmp(all[r].sizes, all[0].sizes, SIZE_TEXT) != 0) {
            return epi_fail(EP_ERR_MISMATCH,
                            "ranks disagree in EP_NODE_SIZE: it is \"%.40s\" on rank 0 and "
                            "\"%.40s\" on rank %d",
                            all[0].sizes, all[r].sizes, r);
        }
    }
    return EP_OK;
}

/* One number repeats; several say it for each node, and are all. */
static ep_status impose(struct epi_nodes *n, const struct place *all, int num_ranks) {
    const char *at = all[0].sizes;
    const bool repeats = !strchr(at, ',');
    int rank = 0;
    for (n->num = 0; *at; n->num++) {
        char *end;
        const long size = strtol(at, &end, 10);
        const bool fits =
            size >= 1 && (repeats ? size <= EP_MAX_RANKS : size <= num_ranks - rank);
        if (*at < '0' || *at > '9' || !fits || (*end && *end != ',')) {
            break;
        }
        for (int i = 0; i < size && rank < num_ranks; i++, rank++) {
            n->node[rank] = n->num;
            if (!same_host(&all[rank], &all[rank - i])) {
                return epi_fail(
                    EP_ERR_MISMATCH,
                    "EP_NODE_SIZE=%.40s puts ranks %d and %d into one node, and they "
                    "are on different hosts",
                    all[0].sizes, rank - i, rank);
            }
        }
        at = *end && end[1] ? end + 1 : *end ? end : repeats && rank < num_ranks ? at : end;
    }
    return *at || rank < num_ranks
               ? epi_fail(
                     EP_ERR_ARG,
                     "EP_NODE_SIZE is \"%.40s\", it must be the number of ranks of each node, "
                     "or those of all nodes with commas between, which make %d",
                     all[0].sizes, num_ranks)
               : EP_OK;
}

static void go_by_hosts(struct epi_nodes *n, const struct place *all, int num_ranks) {
    for (int r = 0; r < num_ranks; r++) {
        int like = 0;
        while (!same_host(&all[like], &all[r])) {
            like++;
        }
        n->node[r] = like < r ? n->node[like] : n->num++;
    }
}

static void sort_ranks(struct epi_nodes *n, int num_ranks) {
    int at = 0;
    for (int d = 0; d < n->num; d++) {
        n->first[d] = at;
        for (int r = 0; r < num_ranks; r++) {
            if (n->node[r] == d) {
                n->local[r] = at - n->first[d];
                n->ranks[at++] = r;
            }
        }
    }
    n->first[n->num] = at;
}

static ep_status hear_places(const struct epi_exchange *x, struct place *all) {
    struct place mine;
    const char *sizes = epi_opt_str(EPI_OPT_NODE_SIZE);
    memset(&mine, 0, sizeof(mine));
    epi_host_hint(&mine.host);
    epi_format(mine.sizes, sizeof(mine.sizes), "%s", sizes ? sizes : "");
    return x->allgather(x->ctx, &mine, sizeof(mine), all);
}

ep_status epi_nodes_create(struct epi_nodes *out, const struct epi_exchange *x) {
    const size_t ranks = (size_t)x->num_ranks;
    struct epi_nodes n = {.node = epi_alloc_array(4 * ranks + 1, sizeof(int))};
    struct place *all = epi_alloc_array(ranks, sizeof(*all));
    ep_status st =
        n.node && all
            ? hear_places(x, all)
            : epi_fail(EP_ERR_NOMEM, "no memory to find the nodes of %d ranks", x->num_ranks);
    st = st == EP_OK ? check_alike(all, x->num_ranks) : st;
    if (st == EP_OK) {
        n.local = n.node + ranks;
        n.ranks = n.local + ranks;
        n.first = n.ranks + ranks;
        if (all[0].sizes[0]) {
            st = impose(&n, all, x->num_ranks);
        } else {
            go_by_hosts(&n, all, x->num_ranks);
        }
    }
    if (st == EP_OK) {
        sort_ranks(&n, x->num_ranks);
        n.own = n.node[x->rank];
        *out = n;
    } else {
        epi_free(n.node);
    }
    epi_free(all);
    return st;
}

void epi_nodes_free(struct epi_nodes *n) {
    epi_free(n->node);
    *n = (struct epi_nodes){0};
}
