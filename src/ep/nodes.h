/* SPDX-License-Identifier: MIT */
/*
 * Which ranks share load and store: a node is a set of ranks of one host, or what EP_NODE_SIZE says.
 * The same on all ranks. Made once, when the ranks have met, and only read afterwards.
 */
#ifndef EPI_NODES_H
#define EPI_NODES_H

#include "src/base/base.h"

/* Nodes are numbered by their lowest ranks. */
struct epi_nodes {
    int num, own;      /* nodes; this rank's */
    int *node, *local; /* [num_ranks] of each rank: its node, its index there */
    int *first,
        *ranks; /* ranks[first[d]..first[d + 1]) are node d's, ascending; first: [num + 1] */
};

static inline int epi_node_ranks(const struct epi_nodes *n, int node) {
    return n->first[node + 1] - n->first[node];
}

/* Who acts for `source` in a node: the same on all ranks, and another for each of its neighbours. */
static inline int epi_relay(const struct epi_nodes *n, int source, int node) {
    return n->ranks[n->first[node] + n->local[source] % epi_node_ranks(n, node)];
}

/* Collective, all with the same status but for EP_ERR_NOMEM. EP_ERR_MISMATCH: EP_NODE_SIZE differs between
 * ranks, or puts ranks of two hosts into one node; EP_ERR_ARG: it does not say whose node is which. */
ep_status epi_nodes_create(struct epi_nodes *out, const struct epi_exchange *x);
void epi_nodes_free(struct epi_nodes *n);

#endif
