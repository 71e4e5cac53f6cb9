/* SPDX-License-Identifier: MIT */
/*
 * What kernels of a group of several nodes are told of them: which ranks are near, who relays for whom,
 * and where their streams of packets are. Run by the threads that create and destroy groups; kernels alone
 * write to the streams. The protocol is in docs/decisions/0014.
 */
#include "src/ep/group.h"
#include "src/ep/wires.h"

/* Which of the sources of its relay in `node` a rank of another node is. */
static int source_number(const struct epi_nodes *n, int rank, int node) {
    int number = 0;
    for (int r = 0; r < rank; r++) {
        number += n->node[r] != node && epi_relay(n, r, node) == epi_relay(n, rank, node);
    }
    return number;
}

/* The partners of `rank`, ascending; returns how many, and which of them `other` is. */
static int find_partners(const struct epi_nodes *n, int num_ranks, int rank, int other,
                         int *which) {
    int num = 0;
    for (int r = 0; r < num_ranks; r++) {
        if (n->node[r] != n->node[rank] &&
            (epi_relay(n, rank, n->node[r]) == r || epi_relay(n, r, n->node[rank]) == rank)) {
            *which = r == other ? num : *which;
            num++;
        }
    }
    return num;
}

static void fill_partners(const ep_group *g, struct k_far *f, struct k_partner *partner,
                          k_i32 *to_node, k_i32 *from_source) {
    const struct epi_nodes *n = &g->nodes;
    for (int r = 0; r < g->num_ranks; r++) {
        int number = -1, theirs = -1;
        find_partners(n, g->num_ranks, g->rank, r, &number);
        if (number < 0) {
            continue;
        }
        find_partners(n, g->num_ranks, r, g->rank, &theirs);
        partner[number] = (struct k_partner){r, theirs};
        f->num_partners = number + 1;
        if (epi_relay(n, g->rank, n->node[r]) == r) {
            to_node[n->node[r]] = number;
        }
        if (epi_relay(n, r, n->own) == g->rank) {
            from_source[source_number(n, r, n->own)] = number;
            f->num_sources++;
        }
    }
}

ep_status epi_far_create(ep_group *g) {
    const struct epi_nodes *n = &g->nodes;
    const struct k_far_map *m = &g->plan.far;
    const size_t ranks = (size_t)g->num_ranks, nodes = (size_t)n->num;
    const size_t sources = (size_t)m->most_sources, partners = nodes - 1 + sources;
    const size_t streams = partners * (size_t)(m->lanes + 1) * 2;
    g->far = epi_alloc(sizeof(*g->far) + streams * sizeof(struct k_stream) +
                       partners * sizeof(struct k_partner) +
                       (5 * ranks + 2 * nodes + 1 + sources) * 4 +
                       sources * (size_t)m->most_near * 4);
    if (!g->far) {
        return epi_fail(EP_ERR_NOMEM, "no memory for tables of %d nodes%s", n->num,
                        epi_alloc_why());
    }
    struct k_far *f = g->far;
    struct k_partner *partner;
    k_i32 *node, *local, *order, *relay, *source, *first, *to_node, *from_source;
    f->stream = (struct k_stream *)(f + 1);
    f->partner = partner = (struct k_partner *)(f->stream + streams);
    f->node = node = (k_i32 *)(partner + partners);
    f->local = local = node + ranks;
    f->ranks = order = local + ranks;
    f->relay = relay = order + ranks;
    f->source = source = relay + ranks;
    f->first = first = source + ranks;
    f->to_node = to_node = first + nodes + 1;
    f->from_source = from_source = to_node + nodes;
    f->where = (k_u32 *)(from_source + sources);
    f->nodes = n->num;
    f->own = n->own;
    f->map = *m;
    f->net = *epi_wires_net(g->wires);
    f->staging = (k_u64)(uintptr_t)epi_wires_staging(g->wires);
    for (int r = 0; r < g->num_ranks; r++) {
        const bool near = n->node[r] == n->own;
        node[r] = n->node[r];
        local[r] = n->local[r];
        order[r] = n->ranks[r];
        relay[r] = near ? r : epi_relay(n, r, n->own);
        source[r] = near ? -1 : source_number(n, r, n->own);
    }
    for (int d = 0; d <= n->num; d++) {
        first[d] = n->first[d];
    }
    fill_partners(g, f, partner, to_node, from_source);
    return EP_OK;
}
