/* SPDX-License-Identifier: MIT */
/* mutants: 500 */
/*
 * Fuzzes the cards that ranks hand to each other by the caller's allgather. The input is how many
 * ranks there are, which one this is and whether it has failed; then changes of sound cards: whose,
 * from which byte on, how many, the bytes.
 *
 * Checked beyond what the sanitizers see: sound cards are accepted; a refusal is one printable
 * sentence; a rank that has failed is told its own failure; no descriptor and no memory is left.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/boot/parts.h"
#include "tests/fuzz.h"

#define MAX_RANKS 5
#define AT_RANK 8 /* of a card, cards.c */

struct input {
    struct fuzz_input data;
    int rank, num_ranks, num_changes;
};

static int allgather(void *ctx, const void *mine, void *out, size_t bytes) {
    struct input *in = ctx;
    uint8_t *cards = out;
    for (int r = 0; r < in->num_ranks; r++) {
        memcpy(cards + (size_t)r * bytes, mine, bytes);
        epi_put_u32(cards + (size_t)r * bytes + AT_RANK, (uint32_t)r);
    }
    while (in->data.left) {
        uint8_t *card = cards + fuzz_next(&in->data) % in->num_ranks * bytes;
        const size_t from = fuzz_next(&in->data) + 256u * (fuzz_next(&in->data) & 1),
                     len = fuzz_next(&in->data);
        in->num_changes++;
        for (size_t i = 0; i < len; i++) {
            const uint8_t byte = fuzz_next(&in->data);
            if (from + i < bytes) {
                card[from + i] = byte;
            }
        }
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    struct input in = {{data, bytes}, 0, 0, 0};
    struct epi_listeners listeners = {0};
    const uint8_t how = fuzz_next(&in.data);
    in.num_ranks = 2 + how % (MAX_RANKS - 1);
    in.rank = (how >> 3) % in.num_ranks;
    const struct epi_boot_config config = {.allgather = allgather, .allgather_ctx = &in};
    struct epi_meet meet = {.rank = in.rank, .num_ranks = in.num_ranks};
    meet.timeout_ns = EPI_NS_PER_S;
    meet.deadline = epi_deadline_after(meet.timeout_ns);
    setenv("EP_LOG", "error", 1);
    epi_clear_error();
    const int64_t live = epi_alloc_live();
    const ep_status own = how & 0x80 ? epi_fail(EP_ERR_NOMEM, "no memory here") : EP_OK;
    const ep_status st = epi_cards_exchange(&config, &meet, own, &listeners);
    must(own == EP_OK || st == own);
    must(own != EP_OK || in.num_changes || st == EP_OK);
    must(st == EP_OK || epi_error_text()[0] != '\0');
    for (const char *text = epi_error_text(); *text; text++) {
        must((unsigned char)*text >= ' ' && *text != 127);
    }
    epi_listeners_close(&listeners);
    must(epi_alloc_live() == live);
    return 0;
}
