/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the parser of control frames, the first thing that bytes from the network meet.
 *
 * The input is a stream: it is parsed frame by frame as a connection would. Checked beyond what
 * the sanitizers see: nothing is consumed past the end, a frame that is accepted encodes to the
 * very bytes it came from, and no verdict of -1 on a prefix is taken back by more bytes.
 * Half of the inputs have their header's check repaired, or the fuzzer would never get past it.
 */
#include <stdlib.h>
#include <string.h>

#include "src/base/base.h"
#include "src/boot/wire.h"
#include "tests/fuzz.h"

/* What is read from a frame's data is all that is in it. */
static void check_data(const struct epi_frame *frame) {
    uint8_t body[EPI_WIRE_PROOF_BYTES];
    struct epi_hello hello;
    struct epi_proof proof;
    struct epi_claim claim;
    switch (frame->type) {
    case EPI_FRAME_HELLO:
        epi_wire_get_hello(frame->data, &hello);
        epi_wire_put_hello(body, &hello);
        must(memcmp(body, frame->data, EPI_WIRE_HELLO_BYTES) == 0);
        return;
    case EPI_FRAME_PROOF:
        epi_wire_get_proof(frame->data, &proof);
        epi_wire_put_proof(body, &proof);
        must(memcmp(body, frame->data, EPI_WIRE_PROOF_BYTES) == 0);
        return;
    case EPI_FRAME_CLAIM:
        epi_wire_get_claim(frame->data, &claim);
        epi_wire_put_claim(body, &claim);
        must(memcmp(body + EPI_WIRE_PROOF_TAG_BYTES, frame->data + EPI_WIRE_PROOF_TAG_BYTES,
                    EPI_WIRE_CLAIM_BYTES - EPI_WIRE_PROOF_TAG_BYTES) == 0);
        return;
    default:
        return;
    }
}

static void check_frame(const uint8_t *buf, int used, const struct epi_frame *frame) {
    uint8_t header[EPI_WIRE_HEADER_BYTES];
    must((size_t)used == EPI_WIRE_HEADER_BYTES + frame->data_bytes);
    must(frame->data == buf + EPI_WIRE_HEADER_BYTES);
    epi_wire_header(header, frame);
    must(memcmp(header, buf, sizeof(header)) == 0);
    check_data(frame);
    for (int len = 0; len < used && len < 2 * EPI_WIRE_HEADER_BYTES; len++) {
        struct epi_frame part;
        must(epi_wire_parse(buf, (size_t)len, &part) == 0);
    }
}

static void parse_all(const uint8_t *buf, size_t bytes) {
    struct epi_frame frame;
    int used = 1;
    for (size_t at = 0; used > 0; at += (size_t)used) {
        used = epi_wire_parse(buf + at, bytes - at, &frame);
        must(used >= -1 && used <= (int)(bytes - at));
        if (used > 0) {
            check_frame(buf + at, used, &frame);
        }
    }
}

/* Makes a valid magic and check around whatever else the first header says. */
static void parse_repaired(const uint8_t *data, size_t bytes) {
    if (bytes < EPI_WIRE_HEADER_BYTES) {
        return;
    }
    uint8_t *copy = malloc(bytes);
    must(copy != NULL);
    memcpy(copy, data, bytes);
    struct epi_frame frame = {.type = (enum epi_frame_type)(data[4] % 17),
                              .seq = epi_get_u64(data + 8),
                              .status = (int32_t)epi_get_u32(data + 16),
                              .rank = epi_get_u32(data + 20),
                              .data_bytes = epi_get_u32(data + 24)};
    if (data[7] & 1) {
        frame.seq = 0;
        frame.status = -(int32_t)(data[16] % 16);
        frame.rank %= 2000;
        frame.data_bytes %= 600;
    }
    epi_wire_header(copy, &frame);
    parse_all(copy, bytes);
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    parse_all(data, bytes);
    parse_repaired(data, bytes);
    return 0;
}
