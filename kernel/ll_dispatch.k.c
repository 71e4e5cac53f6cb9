/* SPDX-License-Identifier: MIT */
/*
 * ll_dispatch: a decode step's rows to the ranks of their experts, cast on the way if asked, and there
 * to their experts' rows. One kernel does either half or both; docs/decisions/0010 has the protocol.
 *
 *   counts   to every rank a header and how many selections each of its experts has here
 *   send     tokens' sidecars and rows to each rank that they go to, as packets (ll_row.h)
 *   receive  each row, or part of one, of each source: to the row of every expert of this rank
 */
#include "kernel/ll_receive.h"
#include "kernel/ll_send.h"

K_KERNEL(low_latency, dispatch, k_ll_dispatch_args) {
    struct ll_call c;
    if (!ll_begin(k, &a->g, &a->ll, a->flags, (k_i32)K_OP_LL_DISPATCH, &c)) {
        return;
    }
    ll_hello(k, &c);
    if (!c.sends && !ll_is_of_shape(k, a)) {
        return;
    }
    struct ll_shape s;
    ll_shape_of(a, &c, &s);
    k_bool ok = !c.sends || ll_send(k, a, &c, &s);
    if (c.receives) {
        ok = ll_receive(k, a, &c, &s, ok);
    }
    if (!ok) {
        ll_fail(k);
        k_store(&c.ll->ctl->lost, 1); /* for combines that are queued behind this */
    }
    const k_bool mends = ll_is_mender(k, &c);
    if (ok && mends) {
        ll_wipe(k, a, &c, &s);
    }
    ll_leave(k, &c);
}
