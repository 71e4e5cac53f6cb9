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
 * header and the first 4 bytes of HELLO and PROOF never change, so that any two versions can tell
 * each other that they differ. docs/decisions/0009-rendezvous.md draws the handshake's data.
 * Must not allocate, or trust a length before it is checked against the limit of its type.
 */
#ifndef EPI_BOOT_WIRE_H
#define EPI_BOOT_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define EPI_WIRE_HEADER_BYTES 32
#define EPI_WIRE_NONCE_BYTES 32
#define EPI_WIRE_PROOF_TAG_BYTES 32 /* of HMAC-SHA-256 */
#define EPI_WIRE_HELLO_BYTES 36
#define EPI_WIRE_PROOF_BYTES 68
#define EPI_WIRE_CLAIM_BYTES 56 /* a text may follow */
#define EPI_WIRE_TEXT_BYTES 400 /* the longest text in a frame, without a final 0 */
#define EPI_WIRE_PROTOCOL 3u    /* of the handshake and of what follows */

enum epi_frame_type {
    EPI_FRAME_HELLO = 1,   /* to 0: a nonce; data is a struct epi_hello */
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
    EPI_FRAME_FAULT = 12,  /* from 0: status, text: no collective can succeed any more */
    EPI_FRAME_PROOF = 13,  /* from 0: data is a struct epi_proof */
    EPI_FRAME_CLAIM = 14,  /* to 0: who I am, with my proof; a struct epi_claim and a text */
    EPI_FRAME_BUSY = 15,   /* from 0: another group of your process forms here: come again */
    EPI_FRAME_WORD = 16    /* both: seq is what a rank says to all others; 0 passes it on */
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
    uint8_t nonce[EPI_WIRE_NONCE_BYTES];
};

struct epi_proof {
    uint32_t protocol;
    uint8_t nonce[EPI_WIRE_NONCE_BYTES];
    uint8_t tag[EPI_WIRE_PROOF_TAG_BYTES];
};

/* Behind its proof, which is the first EPI_WIRE_PROOF_TAG_BYTES. */
struct epi_claim {
    uint32_t version; /* of libep: exactly equal versions work together */
    uint32_t num_ranks;
    uint32_t rank;
    int32_t status;   /* not 0: this rank has failed, as the text says */
    uint64_t process; /* the same number in all claims of a process */
};

/* Bytes consumed when a whole frame is at the start of buf, 0 when more are needed, -1 when
 * this is not, and cannot become, a frame. */
int epi_wire_parse(const uint8_t *buf, size_t len, struct epi_frame *out);
/* The header for a frame; its data is sent behind it. */
void epi_wire_header(uint8_t out[EPI_WIRE_HEADER_BYTES], const struct epi_frame *frame);

/* The data of a frame of that type; the getters take that of a parsed one, whose size
 * epi_wire_parse has checked. Of a claim without its proof and text. */
void epi_wire_put_hello(uint8_t out[EPI_WIRE_HELLO_BYTES], const struct epi_hello *hello);
void epi_wire_get_hello(const uint8_t *data, struct epi_hello *out);
void epi_wire_put_proof(uint8_t out[EPI_WIRE_PROOF_BYTES], const struct epi_proof *proof);
void epi_wire_get_proof(const uint8_t *data, struct epi_proof *out);
void epi_wire_put_claim(uint8_t out[EPI_WIRE_CLAIM_BYTES], const struct epi_claim *claim);
void epi_wire_get_claim(const uint8_t *data, struct epi_claim *out);

/* What of a text goes into a frame. */
size_t epi_wire_text_bytes(const char *text);

void epi_put_u32(uint8_t *p, uint32_t v);
void epi_put_u64(uint8_t *p, uint64_t v);
uint32_t epi_get_u32(const uint8_t *p);
uint64_t epi_get_u64(const uint8_t *p);

#endif
