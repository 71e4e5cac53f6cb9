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

/* Whether all can meet on this host. */
static ep_status check_cards_meet(const struct epi_meet *meet, const uint8_t *cards) {
    const uint64_t host = epi_get_u64(card_of(cards, 0) + CARD_AT_HOST);
    const uint32_t uid = epi_get_u32(card_of(cards, 0) + CARD_AT_UID);
    for (int r = 1; r < meet->num_ranks; r++) {
        const uint64_t its_host = epi_get_u64(card_of(cards, r) + CARD_AT_HOST);
        const uint32_t its_uid = epi_get_u32(card_of(cards, r) + CARD_AT_UID);
        if (host != 0 && its_host != 0 && its_host != host) {
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "rendezvous: rank %d is on another host, or in another network "
                            "namespace, than rank 0; this version joins ranks of one host",
                            r);
        }
        if (its_uid != uid) {
            return epi_fail(EP_ERR_MISMATCH,
                            "rendezvous: rank %d runs as user %u, rank 0 as user %u; all ranks "
                            "must be of one user",
                            r, its_uid, uid);
        }
    }
    return EP_OK;
}

static ep_status read_cards(struct epi_meet *meet, const uint8_t *cards) {
    EPI_TRY(check_cards(meet, cards));
    for (int r = 0; r < meet->num_ranks; r++) {
        const uint8_t *card = card_of(cards, r);
        const int32_t status = (int32_t)epi_get_u32(card + CARD_AT_STATUS);
        if (status != EP_OK) {
            char text[EPI_WIRE_TEXT_BYTES + 1];
            struct epi_frame frame = {.data = card + CARD_AT_TEXT,
                                      .data_bytes = CARD_BYTES - CARD_AT_TEXT};
            frame.data_bytes = strnlen((const char *)frame.data, frame.data_bytes);
            epi_frame_text(&frame, text);
            return epi_fail(EP_ERR_PEER, "rendezvous: rank %d failed: %s", r, text);
        }
    }
    EPI_TRY(check_cards_meet(meet, cards));
    epi_meet_choose_shared(meet, card_of(cards, 0) + CARD_AT_SECRET, SECRET_BYTES);
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

ep_status epi_cards_exchange(const struct epi_boot_config *config, struct epi_meet *meet,
                             ep_status own, struct epi_listeners *listeners) {
    uint8_t card[CARD_BYTES] = {0};
    char own_text[EPI_ERROR_TEXT_BYTES];
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
    epi_put_u32(card + CARD_AT_STATUS, (uint32_t)own);
    epi_format(own_text, sizeof(own_text), "%s", own != EP_OK ? epi_error_text() : "");
    epi_format((char *)card + CARD_AT_TEXT, CARD_BYTES - CARD_AT_TEXT, "%s", own_text);
    int rc = config->allgather(config->allgather_ctx, card, cards, CARD_BYTES);
    ep_status st = own != EP_OK ? epi_fail(own, "%s", own_text) : EP_OK;
    if (st == EP_OK && rc != 0) {
        st = epi_fail(EP_ERR_SYSTEM, "rendezvous: the caller's allgather returned %d", rc);
    }
    if (st == EP_OK) {
        st = read_cards(meet, cards);
    }
    epi_free(cards);
    return st;
}
