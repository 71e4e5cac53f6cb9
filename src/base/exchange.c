/* SPDX-License-Identifier: MIT */
/*
 * Agreement among ranks on how a step went, on top of whatever gathers their data. Called by the
 * threads that create and destroy groups; must not be called where a peer may not call it too.
 */
#include "src/base/base.h"

#include <stdio.h>
#include <string.h>

#define VERDICT_TEXT 252

struct verdict {
    int32_t status;
    char text[VERDICT_TEXT];
};

/* Everybody's verdicts, to be freed; NULL with the error in *st. */
static struct verdict *gather_verdicts(const struct epi_exchange *x, ep_status mine,
                                       const char *step, ep_status *st) {
    struct verdict v;
    memset(&v, 0, sizeof(v));
    v.status = mine;
    if (mine != EP_OK) {
        epi_format(v.text, sizeof(v.text), "%s", epi_error_text());
    }
    struct verdict *all = epi_alloc_array((size_t)x->num_ranks, sizeof(v));
    if (!all) {
        *st = epi_fail(EP_ERR_NOMEM, "%s: no memory to hear %d ranks", step, x->num_ranks);
        return NULL;
    }
    *st = x->allgather(x->ctx, &v, sizeof(v), all);
    if (*st == EP_OK) {
        return all;
    }
    if (mine == EP_ERR_UNSUPPORTED || mine == EP_ERR_PEER) {
        /* What could not be reached was perhaps its owner's who has given up: that is in *st. */
        *st = epi_fail(*st, "%s; before that: %s", epi_error_text(), v.text);
    } else if (mine != EP_OK) {
        *st = epi_fail(mine, "%s", v.text);
    }
    epi_free(all);
    return NULL;
}

static ep_status blame(struct verdict *all, int rank, const char *step, bool alike) {
    all[rank].text[VERDICT_TEXT - 1] = 0;
    return epi_fail(alike ? (ep_status)all[rank].status : EP_ERR_PEER,
                    "%s failed on rank %d: %s: %s", step, rank,
                    ep_status_string((ep_status)all[rank].status), all[rank].text);
}

/* With `optional`, EP_ERR_UNSUPPORTED is everybody's verdict where nothing worse happened. */
static ep_status agree(const struct epi_exchange *x, ep_status mine, const char *step,
                       bool optional, bool alike) {
    ep_status st;
    int without = -1, worse = -1, cause = -1;
    struct verdict *all = gather_verdicts(x, mine, step, &st);
    if (!all) {
        return st;
    }
    for (int r = x->num_ranks - 1; r >= 0; r--) {
        if (optional && all[r].status == EP_ERR_UNSUPPORTED) {
            without = r;
        } else if (all[r].status != EP_OK) {
            worse = r;
            cause = all[r].status != EP_ERR_PEER ? r : cause;
        }
    }
    st = mine;
    if (cause >= 0 && mine == EP_ERR_PEER) {
        /* What this rank missed of a peer is told better by who knows why. */
        st = blame(all, cause, step, alike);
    } else if (worse >= 0 && (mine == EP_OK || (optional && mine == EP_ERR_UNSUPPORTED))) {
        st = blame(all, cause >= 0 ? cause : worse, step, alike);
    } else if (worse < 0 && without >= 0) {
        const char *why = all[without].text;
        all[without].text[VERDICT_TEXT - 1] = 0;
        st = *why
                 ? epi_fail(EP_ERR_UNSUPPORTED, "%s", why)
                 : epi_fail(EP_ERR_UNSUPPORTED, "%s is not possible on rank %d", step, without);
    }
    epi_free(all);
    return st;
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
