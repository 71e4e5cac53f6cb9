/* SPDX-License-Identifier: MIT */
/*
 * Agreement among ranks on how a step went, on top of whatever gathers their data. Called by the
 * threads that create and destroy groups; must not be called where a peer may not call it too.
 */
#include "src/base/exchange.h"

#include <stdio.h>
#include <string.h>

#define VERDICT_TEXT 252

struct verdict {
    int32_t status;
    char text[VERDICT_TEXT];
};

ep_status epi_agree(const struct epi_exchange *x, ep_status mine, const char *step) {
    struct verdict v;
    memset(&v, 0, sizeof(v));
    v.status = mine;
    if (mine != EP_OK) {
        epi_format(v.text, sizeof(v.text), "%s", epi_error_text());
    }
    struct verdict *all = epi_alloc_array((size_t)x->num_ranks, sizeof(v));
    if (!all) {
        return epi_fail(EP_ERR_NOMEM, "%s: no memory to hear %d ranks", step, x->num_ranks);
    }
    ep_status st = x->allgather(x->ctx, &v, sizeof(v), all);
    if (st == EP_OK) {
        st = mine;
        for (int r = 0; st == EP_OK && r < x->num_ranks; r++) {
            if (all[r].status != EP_OK) {
                all[r].text[VERDICT_TEXT - 1] = 0;
                st = epi_fail(EP_ERR_PEER, "%s failed on rank %d: %s: %s", step, r,
                              ep_status_string((ep_status)all[r].status), all[r].text);
            }
        }
    } else if (mine != EP_OK && mine != EP_ERR_UNSUPPORTED && mine != EP_ERR_PEER) {
        /* What could not be reached was perhaps its owner's who has given up: that is in st. */
        st = epi_fail(mine, "%s", v.text);
    }
    epi_free(all);
    return st;
}
