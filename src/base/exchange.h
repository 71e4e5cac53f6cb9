/* SPDX-License-Identifier: MIT */
/*
 * How a layer that is not told about src/boot gathers small data from all ranks: the group hands
 * it this. Collective; `out` is [num_ranks][bytes].
 */
#ifndef EPI_EXCHANGE_H
#define EPI_EXCHANGE_H

#include "src/base/base.h"

struct epi_exchange {
    ep_status (*allgather)(void *ctx, const void *in, size_t bytes, void *out);
    void *ctx;
    int rank, num_ranks;
};

/*
 * Ends a step that ranks take each for itself: `mine` is how it went here, with its text in
 * epi_error_text(). Returns EP_OK when it went well everywhere, `mine` where it did not, and on
 * the other ranks EP_ERR_PEER (or the first rank's status where that says more) naming it.
 */
ep_status epi_agree(const struct epi_exchange *x, ep_status mine, const char *step);

/*
 * As epi_agree, for a step that can be done without: where nothing worse than EP_ERR_UNSUPPORTED
 * happened, every rank returns that, with the text of the first rank it happened to. No rank
 * returns EP_ERR_UNSUPPORTED unless all do.
 */
ep_status epi_agree_optional(const struct epi_exchange *x, ep_status mine, const char *step);

#endif
