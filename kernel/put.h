/* SPDX-License-Identifier: MIT */
/*
 * How a kernel writes to another node. This body hands the write to the proxy; one that rings the NIC's
 * own doorbell needs the same slots and words. Written in the kernel language.
 */
#ifndef KERNEL_PUT_H
#define KERNEL_PUT_H

#include "kernel/abi_net.h"
#include "kernel/lang.h"

/*
 * One lane, for bytes that its warp has settled: write them from `from` in this rank's region to `to` in
 * the peer's. The caller has seen that number - slots of these was sent.
 */
static K_INLINE void k_put(const struct k_net *n, k_u32 what, k_u64 from, k_u64 to,
                           k_u64 bytes) {
    const k_u64 ticket = k_fetch_add((k_u64 *)n->tickets, 1);
    const struct k_peer at =
        k_peer_own(n->ring + (ticket & (n->entries - 1u)) * sizeof(struct k_put_entry));
    k_post(k_peer_plus(at, 8), from);
    k_post(k_peer_plus(at, 16), to);
    k_post(k_peer_plus(at, 24), bytes);
    k_publish(at, K_WORD(ticket + 1, what));
}

#endif
