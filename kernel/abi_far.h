/* SPDX-License-Identifier: MIT */
/*
 * What kernels of a group of several nodes know beside struct k_group: who is where, what a rank has in
 * its registered memory, and how its packets look. docs/decisions/0014 has the protocol.
 *
 * A rank's *partners* are those of other nodes with which it exchanges packets: its relays there, and the
 * ranks whose relay it is. Each way of (partner, lane) is a *stream*: packet n lies in slot n mod slots at
 * both ends, and may be written when packet n - slots was sent, and given back by a credit.
 */
#ifndef KERNEL_ABI_FAR_H
#define KERNEL_ABI_FAR_H

#include "kernel/abi_net.h"

/* What is put, by kind. A control message is for lane 0. */
#define K_PUT_PACKET 0u
#define K_PUT_CREDIT 1u
#define K_PUT_CONTROL 2u

/*
 * A packet: a head, `wide` more words, an entry for each row, and from the next multiple of 16 bytes on
 * the rows: of each, `bytes` bytes of its record from byte `from` on. A record is a row and what goes with
 * it: a dispatch's sidecar, an answer's top-k weights. Of records that are larger than a packet there is one,
 * in parts. The words of a dispatch's head and entries are one for each rank of the node it goes to, those
 * of answers are none.
 *
 *          0      1      2      3       4        5        5 + wide
 *        +------+------+------+-------+--------+--------+----------------------------+-----
 *   head | rows | last | from | bytes | place  | bases  | token | channel | slots    | ...
 *        +------+------+------+-------+--------+--------+----------------------------+-----
 *               of the        of each  of row 0 [wide]    of row 0             [wide]  row 1
 *               lane                   among    where the source's rows        its rows there,
 *                                      its      begin at each rank             by number; ~0: none
 */
#define K_FAR_ROWS 0
#define K_FAR_LAST 1
#define K_FAR_FROM 2
#define K_FAR_BYTES 3
#define K_FAR_PLACE 4
#define K_FAR_HEAD 5
#define K_FAR_TOKEN 0
#define K_FAR_CHANNEL 1
#define K_FAR_ENTRY 2
#define K_FAR_NONE (~0u)

/*
 * Control messages of a rank to its relay in a node, which posts their words at the node's ranks: in every
 * operation the words of a ready message, of which the last is another for each rank; where counts are
 * exchanged a counts message for each rank; and then each rank's bases.
 */
#define K_FAR_READY_WORDS (K_READY_WORDS - 1) /* and one for each rank of the node */

/* One way of (partner, lane). Of kernels' own memory; one warp at a time has it. */
struct k_stream {
    k_u32 next;  /* the number of the next packet, since the group began */
    k_u32 epoch; /* of the operation of which all packets have passed */
    k_u32 begun; /* of the operation that what follows is of */
    k_i32 at;    /* the next token, or row of the relay's list */
    k_i32 end;
    k_i32 part; /* byte of the record with which the next packet begins */
    k_i32 place;
    k_i32 pad;
};

struct k_partner {
    k_i32 rank;
    k_i32 theirs; /* which of its partners this rank is */
};

/* Offsets into arenas, and sizes, by the plan. */
struct k_far_map {
    k_u64 relayed;                /* [S][L][C] words: answers of (source, rank of this node) */
    k_u64 returned;               /* [N][C] words: tokens of the channel are answered */
    k_u64 relay_land, relay_side; /* [S][relay_rows] answers to be summed, their weights */
    k_u64 land, land_side;        /* [N][most_tokens] answers of nodes, their weights */
    k_u64 block_bytes;            /* of registered memory, for each partner */
    k_i32 relay_rows, most_tokens;
    k_i32 most_near;    /* L: ranks of the largest node */
    k_i32 most_sources; /* S: for which a rank is the relay */
    k_i32 packet_bytes, control_bytes;
    k_i32 lanes, slots;
};

struct k_far {
    k_i32 nodes, own; /* N, and this rank's */
    k_i32 num_partners, num_sources;
    k_u64 staging;              /* registered memory */
    const k_i32 *node, *local;  /* [R] of each rank: its node, its index there */
    const k_i32 *first, *ranks; /* [N + 1], [R] ranks by node: from first[d] on */
    const k_i32
        *relay; /* [R] who in this node acts for a rank of another; of its own: itself */
    const k_i32 *source;      /* [R] which of the sources of that relay it is */
    const k_i32 *to_node;     /* [N] which partner is this rank's relay there */
    const k_i32 *from_source; /* [S] which partner is each source */
    const struct k_partner *partner;
    struct k_stream *stream; /* [partners][lanes + 1][2]: out, in; at last those of control */
    k_u32 *where; /* [S][L] of this operation: what each source's ready message says */
    struct k_net net;
    struct k_far_map map;
};

/* The relay's list of the rows it has passed on lies so many bytes behind a handle's `sync`: [S][lanes]
 * pairs of a lane's first place and its rows; then [S][most_tokens] entries as packets have them. */
#define K_FAR_BEHIND 256

_Static_assert(sizeof(struct k_stream) == 32, "k_stream");
_Static_assert(sizeof(struct k_far_map) == 7 * 8 + 8 * 4, "k_far_map");
_Static_assert(sizeof(struct k_far) == 16 + 12 * 8 + 48 + 88, "k_far");

#endif
