/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the agreement of ranks: the verdicts that come from the other ranks by whatever gathers
 * them, which may be the caller's own allgather. The input is how many ranks there are, which one
 * this is and how it fared; then, for each call of the allgather, whether it succeeds, and what the
 * ranks give: a byte that says how that begins, a status, other bytes.
 *
 * Checked: no verdict but EP_OK of all is EP_OK; a rank that failed gets its own status; a step
 * that can be done without is so for all ranks or for none; every failure is printable.
 */
#include <stdlib.h>
#include <string.h>

#include "src/base/base.h"
#include "tests/fuzz.h"

#define MAX_RANKS 17
#define MAX_BYTES 512 /* of one rank's contribution */

struct call {
    struct fuzz_input *in;
    int rank, num_ranks, num;
    bool failed;
    int32_t
        status[MAX_RANKS]; /* what each of the first contributions is, as exchange.c reads it */
};

/* Another rank's contribution: mostly a sound one with some text, sometimes any bytes. */
static void contribute(struct fuzz_input *in, uint8_t *out, size_t bytes) {
    const uint8_t how = fuzz_next(in);
    const size_t len = how & 1 ? bytes : fuzz_next(in);
    int32_t status = -(int32_t)(how >> 1 & 15);
    memset(out, how & 0x20 ? 0xff : 0, bytes);
    for (size_t i = 0; i < len && i < bytes; i++) {
        out[i] = fuzz_next(in);
    }
    if (!(how & 0x40) && bytes >= sizeof(status)) {
        memmove(out + sizeof(status), out, bytes - sizeof(status));
        memcpy(out, &status, sizeof(status));
    }
}

static ep_status gather(void *ctx, const void *mine, size_t bytes, void *out) {
    struct call *c = ctx;
    must(bytes > 0 && bytes <= MAX_BYTES);
    c->num++;
    if (fuzz_next(c->in) % 8 == 7) {
        c->failed = true;
        return epi_fail(EP_ERR_TIMEOUT, "not all ranks came");
    }
    for (int r = 0; r < c->num_ranks; r++) {
        uint8_t *at = (uint8_t *)out + (size_t)r * bytes;
        if (r == c->rank) {
            memcpy(at, mine, bytes);
        } else {
            contribute(c->in, at, bytes);
        }
        if (c->num == 1) {
            memcpy(&c->status[r], at, sizeof(c->status[r]));
        }
    }
    return EP_OK;
}

static void check(const struct call *c, ep_status mine, ep_status st, bool optional) {
    int num_bad = 0, num_without = 0;
    for (int r = 0; r < c->num_ranks; r++) {
        num_bad += c->status[r] != EP_OK;
        num_without += c->status[r] == EP_ERR_UNSUPPORTED;
    }
    for (const char *text = epi_error_text(); *text; text++) {
        must((unsigned char)*text >= ' ' && *text != 127);
    }
    must((st == EP_OK) == (epi_error_text()[0] == '\0'));
    must(c->num == 1 || num_bad > 0);
    if (c->failed) {
        must(st != EP_OK);
        return;
    }
    must((st == EP_OK) == (num_bad == 0));
    if (optional) {
        must((st == EP_ERR_UNSUPPORTED) == (num_without > 0 && num_without == num_bad));
    } else {
        must(mine == EP_OK || st == mine);
    }
}

static void agree(struct fuzz_input *in, bool optional) {
    const uint8_t head = fuzz_next(in), how = fuzz_next(in);
    struct call c = {.in = in, .num_ranks = 1 + head % MAX_RANKS};
    c.rank = (head / MAX_RANKS) % c.num_ranks;
    const struct epi_exchange x = {gather, &c, c.rank, c.num_ranks};
    const ep_status mine = (ep_status) - (how % 14);
    epi_clear_error();
    if (mine != EP_OK) {
        epi_fail(mine, how & 0x80 ? "%s" : "this rank: %s", "no memory for 7 bytes");
    }
    check(&c, mine,
          optional ? epi_agree_optional(&x, mine, "the step") : epi_agree(&x, mine, "the step"),
          optional);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    struct fuzz_input in = {data, bytes};
    for (int i = 0; i < 4; i++) {
        agree(&in, i % 2);
    }
    return 0;
}
