/* SPDX-License-Identifier: MIT */
/*
 * The frames of the control star: what they look like and how they are checked.
 *
 * Pure functions over bytes, for any thread and for the fuzzer. All numbers little-endian:
 *
 *      0         4      6      8                16       20      24           28       32
 *      +---------+------+------+----------------+--------+-------+------------+--------+----
 *      | "LEPB"  | type | zero | seq            | status | rank  | data_bytes | check  | data
 *      +---------+------+------+----------------+--------+-------+------------+--------+----
 *
 * `check` is the FNV-1a hash of the 28 bytes before it. A field a type does not use is 0. This
 * header and the first 8 bytes of HELLO never change, so that any two versions can tell each
 * other that they differ.
 * Must not allocate, or trust a length before it is checked against the limit of its type.
 */
#ifndef EPI_BOOT_WIRE_H
#define EPI_BOOT_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define EPI_WIRE_HEADER_BYTES 32
#define EPI_WIRE_HELLO_BYTES 24
#define EPI_WIRE_TEXT_BYTES 400 /* the longest text in a frame, without a final 0 */
#define EPI_WIRE_PROTOCOL 1u

enum epi_frame_type {
    EPI_FRAME_HELLO = 1,   /* to 0: who I am; data is a struct epi_hello */
    EPI_FRAME_WELCOME = 2, /* from 0: you are in, wait for the others */
    EPI_FRAME_START = 3,   /* from 0: all are here */
    EPI_FRAME_REJECT = 4,  /* from 0: status, text; the connection ends */
    EPI_FRAME_GATHER = 5,  /* to 0: seq, my bytes */
    EPI_FRAME_RESULT = 6,  /* from 0: seq, status 0 and everyone's bytes, or status and text */
    EPI_FRAME_DEAD = 7,    /* from 0: rank, text */
    EPI_FRAME_LEFT = 8,    /* from 0: rank */
    EPI_FRAME_BYE = 9,     /* both: I leave; nothing follows */
    EPI_FRAME_ASK = 10,    /* to 0: seq (0: the rendezvous): for whom do we wait? */
    EPI_FRAME_TELL = 11,   /* from 0: seq, text */
    EPI_FRAME_FAULT = 12   /* from 0: status, text: no collective can succeed any more */
};

struct epi_frame {
    enum epi_frame_type type;
    uint64_t seq;
    int32_t status;
    uint32_t rank;
    const uint8_t *data; /* into the parsed buffer */
    size_t data_bytes;
};

struct epi_hello {
    uint32_t protocol;
    uint32_t version; /* of libep: exactly equal versions work together */
    uint32_t num_ranks;
    uint32_t rank;
    uint64_t job;
};

/* Bytes consumed when a whole frame is at the start of buf, 0 when more are needed, -1 when
 * this is not, and cannot become, a frame. */
int epi_wire_parse(const uint8_t *buf, size_t len, struct epi_frame *out);
/* The header for a frame; its data is sent behind it. */
void epi_wire_header(uint8_t out[EPI_WIRE_HEADER_BYTES], const struct epi_frame *frame);

void epi_wire_put_hello(uint8_t out[EPI_WIRE_HELLO_BYTES], const struct epi_hello *hello);
/* Of a parsed HELLO frame, whose size epi_wire_parse has checked. */
void epi_wire_get_hello(const uint8_t *data, struct epi_hello *out);

/* What of a text goes into a frame. */
size_t epi_wire_text_bytes(const char *text);

void epi_put_u32(uint8_t *p, uint32_t v);
void epi_put_u64(uint8_t *p, uint64_t v);
uint32_t epi_get_u32(const uint8_t *p);
uint64_t epi_get_u64(const uint8_t *p);

#endif
