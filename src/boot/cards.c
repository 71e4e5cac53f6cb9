/* SPDX-License-Identifier: MIT */
/*
 * The caller's allgather, which ranks use once: each puts in a card that says who it is and how it
 * fares, rank 0's has the secret from which all make their key.
 *
 * Owns the cards. Runs on the creating thread.
 * Must not leave the caller's allgather out, whatever has failed: the others are in it.
 */
#include "src/boot/parts.h"

#include <string.h>
#include <unistd.h>

#define SECRET_BYTES 32

/*
 *      0          4         8      12          16       20    24     32       64
 *      +----------+---------+------+-----------+--------+-----+------+--------+----------
 *      | protocol | version | rank | num_ranks | status | uid | host | secret | text
 *      +----------+---------+------+-----------+--------+-----+------+--------+----------
 */
enum card_at {
    CARD_AT_PROTOCOL = 0,
    CARD_AT_VERSION = 4,
    CARD_AT_RANK = 8,
    CARD_AT_NUM_RANKS = 12,
    CARD_AT_STATUS = 16,
    CARD_AT_UID = 20,
    CARD_AT_HOST = 24,
    CARD_AT_SECRET = 32,
    CARD_AT_TEXT = 64,
    CARD_BYTES = 320
};
_Static_assert(CARD_AT_TEXT == CARD_AT_SECRET + SECRET_BYTES, "a card is as drawn");

static const uint8_t *card_of(const uint8_t *cards, int rank) {
    return cards + (size_t)rank * CARD_BYTES;
}

static void text_of(const uint8_t *card, char out[EPI_WIRE_TEXT_BYTES + 1]) {
    struct epi_frame frame = {.data = card + CARD_AT_TEXT,
                              .data_bytes = CARD_BYTES - CARD_AT_TEXT};
    frame.data_bytes = strnlen((const char *)frame.data, frame.data_bytes);
    epi_frame_text(&frame, out);
}

/* What is not said by a rank, but is wrong with the allgather or the versions. */
static ep_status check_cards(const struct epi_meet *meet, const uint8_t *cards) {
    static const uint8_t nothing[CARD_BYTES];
    for (int r = 0; r < meet->num_ranks; r++) {
        const uint8_t *card = card_of(cards, r);
        const uint32_t version = epi_get_u32(card + CARD_AT_VERSION);
        if (memcmp(card, nothing, CARD_BYTES) == 0) {
            return epi_fail(
                EP_ERR_SYSTEM,
                "rendezvous: the caller's allgather returned only zeros for rank %d", r);
        }
        if (epi_get_u32(card + CARD_AT_PROTOCOL) != EPI_WIRE_PROTOCOL ||
            version != epi_meet_version()) {
            return epi_fail(
                EP_ERR_VERSION,
                "rendezvous: rank %d runs libep %u, rank %d runs %u; all ranks must "
                "use the same libep",
                r, version, meet->rank, epi_meet_version());
        }
        if (epi_get_u32(card + CARD_AT_NUM_RANKS) != (uint32_t)meet->num_ranks) {
            return epi_fail(EP_ERR_MISMATCH,
                            "rendezvous: rank %d was told there are %u ranks, rank %d was told "
                            "%d",
                            r, epi_get_u32(card + CARD_AT_NUM_RANKS), meet->rank,
                            meet->num_ranks);
        }
        if (epi_get_u32(card + CARD_AT_RANK) != (uint32_t)r) {
            return epi_fail(EP_ERR_MISMATCH,
                            "rendezvous: the allgather returned rank %u's bytes at place %d",
                            epi_get_u32(card + CARD_AT_RANK), r);
        }
    }
    return EP_OK;
}

/* Whether all are of one user where that can be told. */
static ep_status check_cards_meet(const struct epi_meet *meet, const uint8_t *cards,
                                  bool *is_far) {
    const uint64_t host = epi_get_u64(card_of(cards, 0) + CARD_AT_HOST);
    const uint32_t uid = epi_get_u32(card_of(cards, 0) + CARD_AT_UID);
    for (int r = 1; r < meet->num_ranks; r++) {
        const uint64_t its_host = epi_get_u64(card_of(cards, r) + CARD_AT_HOST);
        const uint32_t its_uid = epi_get_u32(card_of(cards, r) + CARD_AT_UID);
        if (host != 0 && its_host != 0 && its_host != host) {
            *is_far = true;
        } else if (its_uid != uid) {
            return epi_fail(
                EP_ERR_MISMATCH,
                "rendezvous: rank %d runs as user %u, rank 0 as user %u; ranks of a "
                "host must be of one user",
                r, its_uid, uid);
        }
    }
    return EP_OK;
}

static ep_status read_cards(const struct epi_meet *meet, const uint8_t *cards) {
    EPI_TRY(check_cards(meet, cards));
    for (int r = 0; r < meet->num_ranks; r++) {
        const uint8_t *card = card_of(cards, r);
        const int32_t status = (int32_t)epi_get_u32(card + CARD_AT_STATUS);
        if (status != EP_OK) {
            char text[EPI_WIRE_TEXT_BYTES + 1];
            text_of(card, text);
            return epi_fail(EP_ERR_PEER, "rendezvous: rank %d failed: %s", r, text);
        }
    }
    return EP_OK;
}

/* Rank 0 listens before anybody can come. */
static ep_status open_place(struct epi_meet *meet, uint8_t *card,
                            struct epi_listeners *listeners) {
    if (!epi_random(card + CARD_AT_SECRET, SECRET_BYTES)) {
        return epi_fail(EP_ERR_SYSTEM, "rendezvous: this host gives no random numbers");
    }
    epi_meet_choose_shared(meet, card + CARD_AT_SECRET, SECRET_BYTES);
    return epi_meet_listen(meet, listeners);
}

/* All cards, of which this rank's says how it fares. */
static ep_status exchange(const struct epi_boot_config *config, const struct epi_meet *meet,
                          ep_status own, uint8_t *card, uint8_t *cards) {
    char own_text[EPI_ERROR_TEXT_BYTES];
    epi_format(own_text, sizeof(own_text), "%s", epi_error_text());
    epi_put_u32(card + CARD_AT_STATUS, (uint32_t)own);
    if (own != EP_OK) {
        epi_format((char *)card + CARD_AT_TEXT, CARD_BYTES - CARD_AT_TEXT, "%s", own_text);
    }
    int rc = config->allgather(config->allgather_ctx, card, cards, CARD_BYTES);
    if (own != EP_OK) {
        return epi_fail(own, "%s", own_text);
    }
    return rc != 0
               ? epi_fail(EP_ERR_SYSTEM, "rendezvous: the caller's allgather returned %d", rc)
               : read_cards(meet, cards);
}

/* Ranks are on several hosts, as all of them know by now: rank 0 says where it is. */
static ep_status meet_far(const struct epi_boot_config *config, struct epi_meet *meet,
                          uint8_t *card, uint8_t *cards, struct epi_listeners *listeners) {
    char text[EPI_WIRE_TEXT_BYTES + 1];
    const ep_status own = meet->rank == 0
                              ? epi_meet_listen_far(listeners, (char *)card + CARD_AT_TEXT,
                                                    CARD_BYTES - CARD_AT_TEXT)
                              : EP_OK;
    EPI_TRY(exchange(config, meet, own, card, cards));
    text_of(card_of(cards, 0), text);
    return epi_meet_take_far(meet, text);
}

ep_status epi_cards_exchange(const struct epi_boot_config *config, struct epi_meet *meet,
                             ep_status own, struct epi_listeners *listeners) {
    uint8_t card[CARD_BYTES] = {0};
    bool is_far = false;
    uint8_t *cards = epi_alloc_array((size_t)meet->num_ranks, CARD_BYTES);
    if (!cards) {
        return epi_fail(EP_ERR_NOMEM, "rendezvous: no memory for %d ranks", meet->num_ranks);
    }
    epi_put_u32(card + CARD_AT_PROTOCOL, EPI_WIRE_PROTOCOL);
    epi_put_u32(card + CARD_AT_VERSION, epi_meet_version());
    epi_put_u32(card + CARD_AT_RANK, (uint32_t)meet->rank);
    epi_put_u32(card + CARD_AT_NUM_RANKS, (uint32_t)meet->num_ranks);
    epi_put_u32(card + CARD_AT_UID, (uint32_t)geteuid());
    epi_put_u64(card + CARD_AT_HOST, epi_this_host());
    meet->is_job_named = true;
    if (meet->rank == 0 && own == EP_OK) {
        own = open_place(meet, card, listeners);
    }
    ep_status st = exchange(config, meet, own, card, cards);
    if (st == EP_OK) {
        st = check_cards_meet(meet, cards, &is_far);
        epi_meet_choose_shared(meet, card_of(cards, 0) + CARD_AT_SECRET, SECRET_BYTES);
    }
    if (st == EP_OK && is_far) {
        st = meet_far(config, meet, card, cards, listeners);
    }
    epi_free(cards);
    return st;
}
