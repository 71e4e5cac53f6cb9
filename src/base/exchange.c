/* SPDX-License-Identifier: MIT */
/*
 * Agreement among ranks on how a step went, on top of whatever gathers their data. Called by the
 * threads that create and destroy groups; must not be called where a peer may not call it too.
 */
#include "src/base/base.h"

#include <string.h>

#define VERDICT_TEXT 252
#define PIECES 4096 /* bytes that are heard at once, of all ranks together */

_Static_assert(PIECES >= EP_MAX_RANKS * sizeof(int32_t),
               "every rank's status is heard at once");

/* What rank `who` says, in as many pieces as it takes to hear all ranks: nobody needs memory for it. */
static ep_status hear_rank(const struct epi_exchange *x, int who, const char mine[VERDICT_TEXT],
                           char text[VERDICT_TEXT]) {
    char pieces[PIECES];
    const size_t most = sizeof(pieces) / (size_t)x->num_ranks;
    for (size_t at = 0; at < VERDICT_TEXT; at += most) {
        const size_t bytes = VERDICT_TEXT - at < most ? VERDICT_TEXT - at : most;
        EPI_TRY(x->allgather(x->ctx, mine + at, bytes, pieces));
        memcpy(text + at, pieces + (size_t)who * bytes, bytes);
    }
    text[VERDICT_TEXT - 1] = 0;
    return EP_OK;
}

/* The ranks could not be asked, for the reason in epi_error_text(). */
static ep_status unheard(ep_status st, ep_status mine, const char *text) {
    if (mine == EP_ERR_UNSUPPORTED || mine == EP_ERR_PEER) {
        /* What could not be reached was perhaps its owner's who has given up: that is in `st`. */
        return epi_fail(st, "%s; before that: %s", epi_error_text(), text);
    }
    return mine == EP_OK ? st : epi_fail(mine, "%s", text);
}

/* With `optional`, EP_ERR_UNSUPPORTED is everybody's verdict where nothing worse happened. Which rank
 * is heard, all find alike. */
static ep_status agree(const struct epi_exchange *x, ep_status mine, const char *step,
                       bool optional, bool alike) {
    int32_t all[EP_MAX_RANKS];
    const int32_t own = mine;
    char said[VERDICT_TEXT] = "", text[VERDICT_TEXT];
    int without = -1, worse = -1, cause = -1;
    if (mine != EP_OK) {
        epi_format(said, sizeof(said), "%s", epi_error_text());
    }
    ep_status st = x->allgather(x->ctx, &own, sizeof(own), all);
    for (int r = st == EP_OK ? x->num_ranks - 1 : -1; r >= 0; r--) {
        if (optional && all[r] == EP_ERR_UNSUPPORTED) {
            without = r;
        } else if (all[r] != EP_OK) {
            worse = r;
            cause = all[r] != EP_ERR_PEER ? r : cause;
        }
    }
    const int who = cause >= 0 ? cause : worse >= 0 ? worse : without;
    st = st == EP_OK && who >= 0 ? hear_rank(x, who, said, text) : st;
    if (st != EP_OK) {
        return unheard(st, mine, said);
    }
    if (who < 0) {
        return EP_OK;
    }
    if (worse < 0) {
        return *text ? epi_fail(EP_ERR_UNSUPPORTED, "%s", text)
                     : epi_fail(EP_ERR_UNSUPPORTED, "%s is not possible on rank %d", step, who);
    }
    /* What this rank missed of a peer is told better by who knows why. */
    if (mine == EP_OK || (optional && mine == EP_ERR_UNSUPPORTED) ||
        (mine == EP_ERR_PEER && cause >= 0)) {
        return epi_fail(alike ? (ep_status)all[who] : EP_ERR_PEER,
                        "%s failed on rank %d: %s: %s", step, who,
                        ep_status_string((ep_status)all[who]), text);
    }
    return mine;
}

ep_status epi_agree(const struct epi_exchange *x, ep_status mine, const char *step) {
    return agree(x, mine, step, false, false);
}

ep_status epi_agree_alike(const struct epi_exchange *x, ep_status mine, const char *step) {
    return agree(x, mine, step, false, true);
}

ep_status epi_agree_optional(const struct epi_exchange *x, ep_status mine, const char *step) {
    return agree(x, mine, step, true, false);
}
