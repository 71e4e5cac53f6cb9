/* SPDX-License-Identifier: MIT */
/*
 * The part of abi.h that lies between kernels and the thread that writes to other nodes for them
 * (src/proxy): a ring of what is to be written, and words that say what was. docs/decisions/0014 has
 * the protocol that they are for.
 */
#ifndef KERNEL_ABI_NET_H
#define KERNEL_ABI_NET_H

#include "kernel/lang_types.h"

/*
 * An entry of the ring: 32 bytes in memory that kernels and the proxy share. Whoever has taken ticket t
 * from the counter fills entry t mod entries, word 0 last, which alone says that it is there.
 *
 *           63         32 31   22 21  14 13   12 11      0
 *          +-------------+-------+------+-------+---------+
 *   word 0 | ticket + 1  | peer  | lane | kind  | number  |
 *          +-------------+-------+------+-------+---------+    what arrives is the low half, with the
 *   word 1 | offset in this rank's region                 |    sender in place of the peer
 *          +----------------------------------------------+
 *   word 2 | offset in the peer's region                  |
 *          +----------------------------------------------+
 *   word 3 | bytes                                        |
 *          +----------------------------------------------+
 *
 * Writes of a (peer, lane, kind) are numbered from 0. Number n may begin when n - slots has been sent; so
 * there are never more on their way than entries, and nobody has to ask whether an entry is free: of any
 * `entries` tickets one was sent, so the proxy, which goes by tickets, has taken all before it; and who
 * saw that took a ticket since, from a counter that orders.
 */
struct k_put_entry {
    k_u64 word[4];
};

#define K_PUT_PEER_BITS 10
#define K_PUT_LANE_BITS 8
#define K_PUT_KIND_BITS 2
#define K_PUT_NUMBER_BITS 12
#define K_PUT_KINDS (1u << K_PUT_KIND_BITS)
#define K_PUT_WHAT(peer, lane, kind, number)                                                   \
    ((k_u32)(peer) << 22 | (k_u32)(lane) << 14 | (k_u32)(kind) << K_PUT_NUMBER_BITS |          \
     ((k_u32)(number) & ((1u << K_PUT_NUMBER_BITS) - 1u)))
#define K_PUT_PEER(what) ((k_u32)(what) >> 22)
#define K_PUT_LANE(what) ((k_u32)(what) >> 14 & ((1u << K_PUT_LANE_BITS) - 1u))
#define K_PUT_KIND(what) ((k_u32)(what) >> K_PUT_NUMBER_BITS & (K_PUT_KINDS - 1u))
#define K_PUT_NUMBER(what) ((k_u32)(what) & ((1u << K_PUT_NUMBER_BITS) - 1u))

/* What kernels get. Addresses of memory that the proxy shares, but for `tickets`. */
struct k_net {
    k_u64 ring; /* [entries] struct k_put_entry */
    k_u64
        sent; /* [peers][lanes][kinds][slots] words: the last write of the slot was sent, and ... */
    k_u64 arrived; /* ... the last one of that peer has arrived: {number of 12 bits + 1 | 0} */
    k_u64 tickets; /* a counter in the rank's own memory */
    k_u32 entries; /* a power of two */
    k_u32 peers, lanes, slots; /* slots: a power of two */
};

/* The word of a write, in `sent` or `arrived`. */
#define K_PUT_WORD(n, what)                                                                    \
    ((((k_u64)K_PUT_PEER(what) * (n)->lanes + K_PUT_LANE(what)) * K_PUT_KINDS +                \
      K_PUT_KIND(what)) *                                                                      \
         (n)->slots +                                                                          \
     (K_PUT_NUMBER(what) & ((n)->slots - 1u)))
#define K_PUT_DONE(what) K_WORD(K_PUT_NUMBER(what) + 1u, 0)

_Static_assert(sizeof(struct k_put_entry) == 32, "k_put_entry");
_Static_assert(sizeof(struct k_net) == 48, "k_net");
_Static_assert(K_PUT_PEER_BITS + K_PUT_LANE_BITS + K_PUT_KIND_BITS + K_PUT_NUMBER_BITS == 32,
               "what arrives has 32 bits");

#endif
