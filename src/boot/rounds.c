/* SPDX-License-Identifier: MIT */
/*
 * The rounds of an allgather, where they meet: at rank 0 of a star, or in a world.
 *
 * Owns the contributions until the round is removed. A round is known by its sequence number:
 * each rank counts its own calls, so a rank that gave up on one round meets the others in the
 * next. Has no lock: the star's or the world's is held around every call.
 * Must not decide when a round is over; its users differ in that.
 */
#include "src/boot/parts.h"

#include <string.h>

static struct epi_round *make(struct epi_rounds *rounds, uint64_t seq, int rank, size_t bytes) {
    struct epi_round *round = epi_alloc(sizeof(*round));
    if (!round) {
        return NULL;
    }
    size_t num_ranks = (size_t)rounds->num_ranks;
    round->have = epi_alloc_array(num_ranks, sizeof(*round->have));
    round->data = epi_alloc_array(num_ranks, bytes);
    if (!round->have || !round->data) {
        epi_free(round->have);
        epi_free(round->data);
        epi_free(round);
        return NULL;
    }
    round->seq = seq;
    round->bytes = bytes;
    round->first_rank = rank;
    round->next = rounds->first;
    rounds->first = round;
    return round;
}

struct epi_round *epi_rounds_find(struct epi_rounds *rounds, uint64_t seq) {
    struct epi_round *round = rounds->first;
    while (round && round->seq != seq) {
        round = round->next;
    }
    return round;
}

struct epi_round *epi_rounds_put(struct epi_rounds *rounds, uint64_t seq, int rank,
                                 const void *in, size_t bytes) {
    struct epi_round *round = epi_rounds_find(rounds, seq);
    if (!round) {
        round = make(rounds, seq, rank, bytes);
    }
    if (!round) {
        return NULL;
    }
    if (round->bytes != bytes) {
        if (!round->is_mismatch) {
            epi_format(round->text, sizeof(round->text),
                       "allgather: rank %d gave %zu bytes, rank %d gave %zu", round->first_rank,
                       round->bytes, rank, bytes);
        }
        round->is_mismatch = true;
    } else if (bytes > 0) {
        memcpy(round->data + (size_t)rank * bytes, in, bytes);
    }
    round->num_in += !round->have[rank];
    round->have[rank] = true;
    return round;
}

void epi_rounds_remove(struct epi_rounds *rounds, struct epi_round *round) {
    struct epi_round **at = &rounds->first;
    while (*at != round) {
        at = &(*at)->next;
    }
    *at = round->next;
    epi_free(round->have);
    epi_free(round->data);
    epi_free(round);
}

void epi_rounds_clear(struct epi_rounds *rounds) {
    while (rounds->first) {
        epi_rounds_remove(rounds, rounds->first);
    }
}

void epi_rank_list(const bool *set, bool value, int num, char *out, size_t out_bytes) {
    size_t len = 0;
    out[0] = '\0';
    for (int i = 0; i < num; i++) {
        if (set[i] != value) {
            continue;
        }
        int last = i;
        while (last + 1 < num && set[last + 1] == value) {
            last++;
        }
        char item[32];
        const char *comma = len > 0 ? ", " : "";
        if (last > i + 1) {
            epi_format(item, sizeof(item), "%s%d-%d", comma, i, last);
        } else {
            last = i;
            epi_format(item, sizeof(item), "%s%d", comma, i);
        }
        size_t item_len = strlen(item);
        if (len + item_len + 4 >= out_bytes) {
            epi_format(out + len, out_bytes - len, "...");
            return;
        }
        memcpy(out + len, item, item_len + 1);
        len += item_len;
        i = last;
    }
}
