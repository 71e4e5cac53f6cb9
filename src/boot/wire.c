/* SPDX-License-Identifier: MIT */
/*
 * Encoding and checking of control frames; wire.h draws them.
 *
 * Owns the rules: which types exist, which fields each may use, how long its data may be.
 * Everything here is pure and runs on any thread; tests/fuzz_wire.c drives epi_wire_parse.
 * Must not read beyond len, whatever the bytes say.
 */
#include "src/boot/wire.h"

#include "src/boot/boot.h"

#include <string.h>

enum header_at {
    AT_MAGIC = 0,
    AT_TYPE = 4,
    AT_ZERO = 6,
    AT_SEQ = 8,
    AT_STATUS = 16,
    AT_RANK = 20,
    AT_DATA_BYTES = 24,
    AT_CHECK = 28,
    AT_END = 32
};

enum hello_at { HELLO_AT_PROTOCOL = 0, HELLO_AT_NONCE = 4, HELLO_AT_END = 36 };

enum proof_at {
    PROOF_AT_PROTOCOL = 0,
    PROOF_AT_NONCE = 4,
    PROOF_AT_TAG = 36,
    PROOF_AT_END = 68
};

enum claim_at {
    CLAIM_AT_TAG = 0,
    CLAIM_AT_VERSION = 32,
    CLAIM_AT_NUM_RANKS = 36,
    CLAIM_AT_RANK = 40,
    CLAIM_AT_STATUS = 44,
    CLAIM_AT_PROCESS = 48,
    CLAIM_AT_END = 56
};

_Static_assert(AT_END == EPI_WIRE_HEADER_BYTES, "the header is as wire.h draws it");
_Static_assert(HELLO_AT_END == EPI_WIRE_HELLO_BYTES && PROOF_AT_END == EPI_WIRE_PROOF_BYTES &&
                   CLAIM_AT_END == EPI_WIRE_CLAIM_BYTES,
               "the handshake is as long as wire.h says");
_Static_assert(sizeof(struct epi_claim) + EPI_WIRE_PROOF_TAG_BYTES == EPI_WIRE_CLAIM_BYTES,
               "every field is encoded");
_Static_assert(EPI_BOOT_MAX_TOTAL_BYTES + EPI_WIRE_HEADER_BYTES <= INT32_MAX,
               "epi_wire_parse returns the size of a frame as an int");

static const uint8_t magic[4] = {'L', 'E', 'P', 'B'};

/* What a type may carry. The bound on the data bounds what a peer can make us hold. */
struct frame_rule {
    size_t min_data_bytes;
    size_t max_data_bytes;
    bool has_seq;
    bool has_rank;
    bool can_fail; /* status may be negative */
    bool must_fail;
};

static const struct frame_rule rules[] = {
    [EPI_FRAME_HELLO] = {EPI_WIRE_HELLO_BYTES, EPI_WIRE_HELLO_BYTES, false, false, false,
                         false},
    [EPI_FRAME_WELCOME] = {0, 0, false, false, false, false},
    [EPI_FRAME_START] = {0, 0, false, false, false, false},
    [EPI_FRAME_REJECT] = {0, EPI_WIRE_TEXT_BYTES, false, false, true, true},
    [EPI_FRAME_GATHER] = {0, EPI_BOOT_MAX_BYTES, true, false, false, false},
    [EPI_FRAME_RESULT] = {0, EPI_BOOT_MAX_TOTAL_BYTES, true, false, true, false},
    [EPI_FRAME_DEAD] = {0, EPI_WIRE_TEXT_BYTES, false, true, false, false},
    [EPI_FRAME_LEFT] = {0, 0, false, true, false, false},
    [EPI_FRAME_BYE] = {0, 0, false, false, false, false},
    [EPI_FRAME_ASK] = {0, 0, true, false, false, false},
    [EPI_FRAME_TELL] = {0, EPI_WIRE_TEXT_BYTES, true, false, false, false},
    [EPI_FRAME_FAULT] = {0, EPI_WIRE_TEXT_BYTES, false, false, true, true},
    [EPI_FRAME_PROOF] = {EPI_WIRE_PROOF_BYTES, EPI_WIRE_PROOF_BYTES, false, false, false,
                         false},
    [EPI_FRAME_CLAIM] = {EPI_WIRE_CLAIM_BYTES, EPI_WIRE_CLAIM_BYTES + EPI_WIRE_TEXT_BYTES,
                         false, false, false, false},
    [EPI_FRAME_BUSY] = {0, 0, false, false, false, false},
    [EPI_FRAME_WORD] = {0, 0, true, false, false, false},
};

static void put_u16(uint8_t *p, uint16_t v) {
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

void epi_put_u32(uint8_t *p, uint32_t v) {
    put_u16(p, (uint16_t)v);
    put_u16(p + 2, (uint16_t)(v >> 16));
}

void epi_put_u64(uint8_t *p, uint64_t v) {
    epi_put_u32(p, (uint32_t)v);
    epi_put_u32(p + 4, (uint32_t)(v >> 32));
}

static uint16_t get_u16(const uint8_t *p) {
    return (uint16_t)(p[0] | (uint16_t)p[1] << 8);
}

uint32_t epi_get_u32(const uint8_t *p) {
    return get_u16(p) | (uint32_t)get_u16(p + 2) << 16;
}

uint64_t epi_get_u64(const uint8_t *p) {
    return epi_get_u32(p) | (uint64_t)epi_get_u32(p + 4) << 32;
}

static uint32_t header_check(const uint8_t *header) {
    uint32_t hash = 0x811c9dc5u;
    for (int i = 0; i < AT_CHECK; i++) {
        hash = (hash ^ header[i]) * 0x01000193u;
    }
    return hash;
}

static bool obeys(const struct frame_rule *rule, const struct epi_frame *f) {
    if (f->status > 0 || f->status < EP_ERR_INTERNAL) {
        return false;
    }
    if ((f->status != 0 && !rule->can_fail) || (f->status == 0 && rule->must_fail)) {
        return false;
    }
    /* A failure carries a text, whatever its success would carry. */
    size_t max_bytes = f->status != 0 ? EPI_WIRE_TEXT_BYTES : rule->max_data_bytes;
    return f->data_bytes >= rule->min_data_bytes && f->data_bytes <= max_bytes &&
           (f->seq == 0 || rule->has_seq) && (f->rank == 0 || rule->has_rank) &&
           f->rank < EP_MAX_RANKS;
}

int epi_wire_parse(const uint8_t *buf, size_t len, struct epi_frame *out) {
    if (len == 0) {
        return 0;
    }
    if (memcmp(buf, magic, len < sizeof(magic) ? len : sizeof(magic)) != 0) {
        return -1; /* a stranger is known by its first byte */
    }
    if (len < EPI_WIRE_HEADER_BYTES) {
        return 0;
    }
    uint16_t type = get_u16(buf + AT_TYPE);
    if (epi_get_u32(buf + AT_CHECK) != header_check(buf) || get_u16(buf + AT_ZERO) != 0 ||
        type < EPI_FRAME_HELLO || type > EPI_FRAME_WORD) {
        return -1;
    }
    struct epi_frame frame = {
        .type = (enum epi_frame_type)type,
        .seq = epi_get_u64(buf + AT_SEQ),
        .status = (int32_t)epi_get_u32(buf + AT_STATUS),
        .rank = epi_get_u32(buf + AT_RANK),
        .data = buf + EPI_WIRE_HEADER_BYTES,
        .data_bytes = epi_get_u32(buf + AT_DATA_BYTES),
    };
    if (!obeys(&rules[type], &frame)) {
        return -1;
    }
    if (len - EPI_WIRE_HEADER_BYTES < frame.data_bytes) {
        return 0;
    }
    *out = frame;
    return (int)(EPI_WIRE_HEADER_BYTES + frame.data_bytes);
}

void epi_wire_header(uint8_t out[EPI_WIRE_HEADER_BYTES], const struct epi_frame *frame) {
    memcpy(out + AT_MAGIC, magic, sizeof(magic));
    put_u16(out + AT_TYPE, (uint16_t)frame->type);
    put_u16(out + AT_ZERO, 0);
    epi_put_u64(out + AT_SEQ, frame->seq);
    epi_put_u32(out + AT_STATUS, (uint32_t)frame->status);
    epi_put_u32(out + AT_RANK, frame->rank);
    epi_put_u32(out + AT_DATA_BYTES, (uint32_t)frame->data_bytes);
    epi_put_u32(out + AT_CHECK, header_check(out));
}

void epi_wire_put_hello(uint8_t out[EPI_WIRE_HELLO_BYTES], const struct epi_hello *hello) {
    epi_put_u32(out + HELLO_AT_PROTOCOL, hello->protocol);
    memcpy(out + HELLO_AT_NONCE, hello->nonce, sizeof(hello->nonce));
}

void epi_wire_get_hello(const uint8_t *data, struct epi_hello *out) {
    out->protocol = epi_get_u32(data + HELLO_AT_PROTOCOL);
    memcpy(out->nonce, data + HELLO_AT_NONCE, sizeof(out->nonce));
}

void epi_wire_put_proof(uint8_t out[EPI_WIRE_PROOF_BYTES], const struct epi_proof *proof) {
    epi_put_u32(out + PROOF_AT_PROTOCOL, proof->protocol);
    memcpy(out + PROOF_AT_NONCE, proof->nonce, sizeof(proof->nonce));
    memcpy(out + PROOF_AT_TAG, proof->tag, sizeof(proof->tag));
}

void epi_wire_get_proof(const uint8_t *data, struct epi_proof *out) {
    out->protocol = epi_get_u32(data + PROOF_AT_PROTOCOL);
    memcpy(out->nonce, data + PROOF_AT_NONCE, sizeof(out->nonce));
    memcpy(out->tag, data + PROOF_AT_TAG, sizeof(out->tag));
}

void epi_wire_put_claim(uint8_t out[EPI_WIRE_CLAIM_BYTES], const struct epi_claim *claim) {
    memset(out + CLAIM_AT_TAG, 0, EPI_WIRE_PROOF_TAG_BYTES);
    epi_put_u32(out + CLAIM_AT_VERSION, claim->version);
    epi_put_u32(out + CLAIM_AT_NUM_RANKS, claim->num_ranks);
    epi_put_u32(out + CLAIM_AT_RANK, claim->rank);
    epi_put_u32(out + CLAIM_AT_STATUS, (uint32_t)claim->status);
    epi_put_u64(out + CLAIM_AT_PROCESS, claim->process);
}

void epi_wire_get_claim(const uint8_t *data, struct epi_claim *out) {
    out->version = epi_get_u32(data + CLAIM_AT_VERSION);
    out->num_ranks = epi_get_u32(data + CLAIM_AT_NUM_RANKS);
    out->rank = epi_get_u32(data + CLAIM_AT_RANK);
    out->status = (int32_t)epi_get_u32(data + CLAIM_AT_STATUS);
    out->process = epi_get_u64(data + CLAIM_AT_PROCESS);
}

size_t epi_wire_text_bytes(const char *text) {
    size_t bytes = strlen(text);
    return bytes < EPI_WIRE_TEXT_BYTES ? bytes : EPI_WIRE_TEXT_BYTES;
}
