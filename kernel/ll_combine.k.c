/* SPDX-License-Identifier: MIT */
/*
 * ll_combine: the experts' answers of a decode step back to the owners of the tokens. One kernel does
 * either half or both; docs/decisions/0010 has the protocol. All that it needs of the dispatch is in the
 * handle.
 *
 *   send     a block for each received row, or for a slice of it: its experts' rows, weighed and
 *            summed in the order of k, to the owner; then a word for it. Exact: each of those rows,
 *            with a word of its own
 *   receive  a block for each token, or slice: the answers of the ranks it went to, ascending; exact:
 *            the rows of its selections, weighed, in the order of k
 */
#include "kernel/ll.h"
#include "kernel/ll_logfmt.h"

#define K_LL_EXACT_ROWS 4

static K_INLINE struct k_term *ll_terms(struct k_thread *k) {
    return (struct k_term *)ll_warp_scratch(k);
}
_Static_assert(K_MAX_TOPK * sizeof(struct k_term) <= K_SCRATCH_BYTES(1), "a warp's scratch");

/* The warp's part of a slice, in whole `unit` bytes. */
static K_INLINE struct ll_span ll_warp_part(const struct k_thread *k, struct ll_span slice,
                                            k_i32 unit) {
    struct ll_span part = ll_cut(slice.end - slice.from, unit, k->num_warps, k->warp);
    part.from += slice.from;
    part.end += slice.from;
    return part;
}

/* Read anew by those few who need it. */
static K_INLINE struct ll_header ll_combine_header(const struct k_ll_combine_args *a) {
    const struct k_ll_head *head = a->ll.head;
    struct ll_header h = {{head->signature | a->form, a->types, (k_u32)a->row_bytes,
                           K_LL_TAG(head->number[0]), (k_u32)a->ll.max_tokens}};
    return h;
}

/* ---- send ----------------------------------------------------------------------------------- */

/* Where a token's weights are in the region of their owner. */
static K_INLINE k_u64 ll_weights_at(const struct k_ll *ll, k_i32 t) {
    return 8ull * (k_u64)t * (k_u64)ll->group_topk;
}

/*
 * Weights that are given now go to the ranks that multiply by them, before this rank waits for anybody:
 * no send waits for a send that waits for it. What they overwrite was read by an answer that this
 * rank has received.
 */
static K_FN void ll_push_weights(struct k_thread *k, const struct k_ll_combine_args *a,
                                 const struct ll_call *c) {
    const struct k_ll *ll = &a->ll;
    const k_i32 *dest = (const k_i32 *)ll_in_handle(ll, ll->map.dest);
    const k_u64 part = ll_part(&a->g, c, &ll->map.weights, a->g.rank);
    for (k_i32 t = k->block; t < a->tokens; t += k->num_blocks) {
        for (k_i32 i = k->warp; i < a->topk; i += k->num_warps) {
            const k_i32 d = dest[(k_i64)t * ll->group_topk + i];
            for (k_i32 w = k->lane; d >= 0 && w < a->topk; w += K_LANES) {
                k_post(k_peer_at(&a->g, d, part + ll_weights_at(ll, t) + 8ull * (k_u64)w),
                       K_WORD(c->tag, *(const k_u32 *)k_at(&a->weights, t, w)));
            }
        }
    }
    /* Every rank gets the first word, by which it sees since when weights are here. */
    for (k_i32 p = k->lane; k_first(k, 0) == 0 && a->tokens > 0 && p < a->g.num_ranks;
         p += K_LANES) {
        k_bool goes = 0;
        K_ROLLED for (k_i32 i = 0; i < a->topk; i++) {
            goes = goes || dest[i] == p;
        }
        if (!goes) {
            k_post(k_peer_at(&a->g, p, part), K_WORD(c->tag, 0));
        }
    }
}

/* Rows of the experts that make up the answer for token t of an owner, from byte `from` on; -1: their
 * weights do not come. */
static K_FN k_i32 ll_answer_terms(struct k_thread *k, const struct k_ll_combine_args *a,
                                  const struct ll_call *c, k_i32 owner, k_i32 t, k_i32 from,
                                  struct k_term *terms) {
    const struct k_ll *ll = &a->ll;
    const k_i64 first = ll_row_of(ll, owner, t, ll->group_topk);
    const k_bool now = (a->form & K_LL_SIG_WEIGHTS_NOW) != 0;
    const k_u64 *words = (const k_u64 *)k_own(
        &a->g, ll_part(&a->g, c, &ll->map.weights, owner) + ll_weights_at(ll, t));
    const k_i32 *place = (const k_i32 *)ll_in_handle(ll, ll->map.place) + first;
    const k_f32 *weight = (const k_f32 *)ll_in_handle(ll, ll->map.weight) + first;
    k_i32 num = 0;
    for (k_i32 base = 0; base < ll->group_topk; base += K_LANES) {
        const k_i32 i = base + k->lane, row = i < ll->group_topk ? place[i] : -1;
        k_u32 all = 0, given = 0;
        const k_i32 at = num + (k_i32)k_scan(k, row >= 0, &all);
        if (now && !k_await_word(k, row >= 0 ? words + i : 0, c->tag, owner, K_PHASE_WEIGHTS,
                                 &given)) {
            /* An owner that gives none has said so in its header. */
            const struct ll_header h = ll_combine_header(a);
            ll_await_header(k, c, ll_own_words(&a->g, c, &ll->map.header, owner), owner, &h,
                            &all);
            return -1;
        }
        if (row >= 0) {
            terms[at].row = (const k_u8 *)k_row(&a->x, row) + from;
            terms[at].weight = now ? k_float(given) : weight[i];
        }
        num += (k_i32)all;
    }
    k_syncwarp(k);
    return num;
}

/* The landing place of an answer of this rank at its owner. */
static K_INLINE struct k_peer ll_answer_at(const struct k_ll_combine_args *a,
                                           const struct ll_call *c, k_i32 owner, k_i64 answer) {
    return k_peer_at(&a->g, owner,
                     ll_part(&a->g, c, &a->ll.map.answers, a->g.rank) +
                         (k_u64)answer * (k_u64)a->ll.wire_bytes);
}

/* Exact: the warp's part of all rows of the experts of a received row, several on their way at once. */
static K_FN void ll_send_exact(struct k_thread *k, const struct k_ll_combine_args *a,
                               const struct ll_call *c, k_i32 owner, k_i64 first,
                               const k_i32 *place, struct ll_span part) {
    for (k_i32 at = part.from + 16 * k->lane; at < part.end; at += 16 * K_LANES) {
        for (k_i32 base = 0; base < a->ll.head->topk; base += K_LL_EXACT_ROWS) {
            struct k_16 v[K_LL_EXACT_ROWS] = {{0, 0, 0, 0}};
            K_UNROLL for (k_i32 i = 0; i < K_LL_EXACT_ROWS; i++) {
                const k_i32 row = base + i < a->ll.head->topk ? place[base + i] : K_LL_NOWHERE;
                if (row >= 0) {
                    v[i] = k_load16((const void *)(k_row(&a->x, row) + (k_u64)at));
                }
            }
            K_UNROLL for (k_i32 i = 0; i < K_LL_EXACT_ROWS; i++) {
                if (base + i < a->ll.head->topk && place[base + i] != K_LL_NOWHERE) {
                    k_store16_to(
                        k_peer_plus(ll_answer_at(a, c, owner, first + base + i), (k_u64)at),
                        v[i]);
                }
            }
        }
    }
}

/* Behind a warp's terms, for all warps of the block: the bytes of its block, in rounds by turns. */
static K_INLINE k_i32 *ll_told(struct k_thread *k, k_i32 warp, k_i32 turn) {
    return (k_i32 *)((k_u8 *)k_shared(k) + (k_u64)warp * (k_u64)k->g->scratch_bytes +
                     K_MAX_TOPK * sizeof(struct k_term)) +
           turn;
}

/*
 * LogFMT: where a block begins depends on what those before it have become. So the warps take blocks of
 * the row (exact: of all rows) in rounds, and tell each other how long theirs are. Who does not go takes
 * part in that. False: weights do not come.
 */
static K_FN k_bool ll_send_logfmt(struct k_thread *k, const struct k_ll_combine_args *a,
                                  const struct ll_call *c, k_i32 owner, k_i32 t, k_i64 first,
                                  const k_i32 *place, k_bool goes) {
    const k_bool exact = (a->form & K_LL_SIG_EXACT) != 0;
    const k_i32 block = ll_log_block_bytes(a->row_bytes);
    const k_i32 each = (a->row_bytes + block - 1) / block;
    const k_i32 all = each * (exact ? a->ll.head->topk : 1);
    struct k_term *terms = ll_terms(k);
    const k_i32 num = !goes ? 0 : exact ? 1 : ll_answer_terms(k, a, c, owner, t, 0, terms);
    k_i32 at = 0;
    for (k_i32 base = 0; base < all; base += k->num_warps) {
        const k_i32 u = base + k->warp, turn = base / k->num_warps & 1;
        const k_i32 row = exact && u < all ? place[u / each] : 0;
        const k_bool has = goes && num >= 0 && u < all && row != K_LL_NOWHERE;
        const k_i32 from = u % each * block, end = k_min(from + block, a->row_bytes);
        const struct k_peer answer = ll_answer_at(a, c, owner, first + (has ? u / each : 0));
        k_bool encoded = 0;
        k_i32 mine = 0;
        if (exact && has && row >= 0 && k->lane == 0) {
            terms->row = (const void *)k_row(&a->x, row);
            terms->weight = 1.0f;
        }
        k_syncwarp(k);
        if (has) {
            encoded = ll_log_make(k, terms, row < 0 ? 0 : num, from, end, answer);
        }
        if (k->lane == 0) {
            *ll_told(k, k->warp, turn) = has ? ll_log_bytes(end - from, encoded) : 0;
        }
        k_barrier(k, 1);
        for (k_i32 w = 0; w < k->num_warps; w++) {
            at = (base + w) % each ? at : a->row_bytes / 64;
            mine = w == k->warp ? at : mine;
            at += *ll_told(k, w, turn);
        }
        if (has) {
            ll_log_store(k, k_peer_plus(answer, (k_u64)mine), end - from, encoded);
        }
    }
    return num >= 0;
}

static K_FN k_bool ll_answer_slice(struct k_thread *k, const struct k_ll_combine_args *a,
                                   const struct ll_call *c, k_i32 owner, k_i32 t, k_i32 slice,
                                   k_i32 slices) {
    const struct k_ll *ll = &a->ll;
    const k_i32 *place = (const k_i32 *)ll_in_handle(ll, ll->map.place) +
                         ll_row_of(ll, owner, t, ll->group_topk);
    if (ll_mask_of(k, place, ll->group_topk, K_LL_TOO_MANY) == 0) {
        return 1; /* it did not come here */
    }
    const struct ll_span part =
        ll_warp_part(k, ll_cut(a->row_bytes, 16, slices, slice), 16 * K_LANES);
    const k_bool exact = (a->form & K_LL_SIG_EXACT) != 0;
    const k_i64 first = exact ? (k_i64)t * a->ll.head->topk : t;
    k_bool ok = ll_await_one_free(k, c, k->lane == 0 ? owner : -1);
    const k_bool goes = ok && !ll_any_gone(k);
    if (a->form & K_LL_SIG_LOGFMT) {
        ok = ll_send_logfmt(k, a, c, owner, t, first, place, goes) && ok;
    } else if (goes && exact) {
        ll_send_exact(k, a, c, owner, first, place, part);
    } else if (goes && part.from < part.end) {
        struct k_term *terms = ll_terms(k);
        const k_i32 num = ll_answer_terms(k, a, c, owner, t, part.from, terms);
        ok = num >= 0;
        if (ok) {
            k_reduce(k, k_peer_plus(ll_answer_at(a, c, owner, t), (k_u64)part.from), K_BF16, 1,
                     part.end - part.from, terms, num);
        }
    }
    if (!k_barrier(k, ok)) {
        return 0;
    }
    if (k->mask.ll && !k_barrier(k, !ll_any_gone(k))) {
        return 1; /* the owner is left out */
    }
    for (k_i32 i = k->lane; k->warp == 0 && i < (exact ? a->ll.head->topk : 1); i += K_LANES) {
        if (!exact || place[i] != K_LL_NOWHERE) {
            const k_i64 word = (first + i) * K_LL_MOST_SLICES + slice;
            k_publish(
                k_peer_at(&a->g, owner,
                          ll_part(&a->g, c, &ll->map.answered, a->g.rank) + 8ull * (k_u64)word),
                K_WORD(c->tag, slices));
        }
    }
    return 1;
}

static K_INLINE k_i32 ll_tokens_from(const struct k_ll *ll, k_i32 source) {
    return ((const k_i32 *)ll_in_handle(ll, ll->map.count))[source];
}

/* By the tokens that it may answer; LogFMT's rows are not cut, as their blocks lie one behind the other. */
static K_FN k_i32 ll_answer_slices(struct k_thread *k, const struct k_ll_combine_args *a) {
    k_u32 rows = 0;
    for (k_i32 p = k->lane; p < a->g.num_ranks; p += K_LANES) {
        rows += (k_u32)ll_tokens_from(&a->ll, p);
    }
    rows = k_sum(k, rows);
    return a->form & K_LL_SIG_LOGFMT ? 1 : ll_slices((k_i32)rows);
}

static K_FN k_bool ll_combine_send(struct k_thread *k, const struct k_ll_combine_args *a,
                                   const struct ll_call *c) {
    const struct k_group *g = &a->g;
    const k_i32 slices = ll_answer_slices(k, a);
    k_i32 before = 0, unit = k->block; /* of all, which are dealt to the blocks */
    if (k_first(k, 0) == 0 && k->lane == 0) {
        a->ll.head->number[1] = c->number;
    }
    const k_bool weighs =
        (a->form & (K_LL_SIG_WEIGHTS_NOW | K_LL_SIG_EXACT)) == K_LL_SIG_WEIGHTS_NOW;
    if (weighs) {
        ll_push_weights(k, a, c);
    }
    k_bool ok = ll_await_block_free(k, c, ll_last_first(k) < g->num_ranks);
    for (k_i32 p = ll_last_first(k); ok && p < g->num_ranks; p += k_stride(k, k->num_blocks)) {
        ok = ll_await_one_free(k, c, k->lane == 0 ? p : -1);
        if (ok && !k->mask.is_gone) {
            const struct ll_header h = ll_combine_header(a);
            ll_post_header(k, c, k_peer_at(g, p, ll_part(g, c, &a->ll.map.header, g->rank)), &h,
                           0, 0);
        }
    }
    ok = k_barrier(k, ok);
    if (ok && weighs) {
        ll_time_waits(k, c, &a->ll.map.weights, K_PHASE_WEIGHTS,
                      (const k_i32 *)ll_in_handle(&a->ll, a->ll.map.count), &a->wait_ns);
    }
    for (k_i32 i = 0; ok && i < g->num_ranks; i++) {
        const k_i32 owner = (g->rank + 1 + i) % g->num_ranks;
        const k_i32 units = ll_is_masked(k, owner) ? 0 : ll_tokens_from(&a->ll, owner) * slices;
        for (; ok && unit < before + units; unit += k->num_blocks) {
            const k_i32 u = unit - before;
            ok = ll_answer_slice(k, a, c, owner, u / slices, u % slices, slices);
        }
        before += units;
    }
    return ok;
}

/* ---- receive -------------------------------------------------------------------------------- */

/* The answers for token t from byte `from` on, when they are here, but for ranks that are left out; -1:
 * they will not be. */
static K_FN k_i32 ll_token_terms(struct k_thread *k, const struct k_ll_combine_args *a,
                                 const struct ll_call *c, k_i32 t, k_i32 from,
                                 struct k_term *terms) {
    const struct k_group *g = &a->g;
    const struct k_ll *ll = &a->ll;
    const k_bool exact = (a->form & K_LL_SIG_EXACT) != 0;
    const k_i64 first = (k_i64)t * ll->group_topk;
    const k_i32 *dest =
        (const k_i32 *)ll_in_handle(ll, exact ? ll->map.chosen : ll->map.dest) + first;
    const k_f32 *given = (const k_f32 *)ll_in_handle(ll, ll->map.given) + first;
    k_i32 num = 0;
    for (k_i32 base = 0; base < ll->group_topk; base += K_LANES) {
        const k_i32 i = base + k->lane, d = i < ll->group_topk ? dest[i] : -1;
        const k_i32 p = d < 0 || ll_is_masked(k, d) ? -1 : d;
        const k_i64 answer = exact ? (k_i64)t * a->ll.head->topk + i : t;
        k_u32 all = 0;
        k->mask.is_gone = 0;
        const k_u64 *words = p >= 0 ? ll_own_words(g, c, &ll->map.answered, p) : 0;
        if (!ll_await_slices(k, c, words ? words + answer * K_LL_MOST_SLICES : 0, p,
                             K_PHASE_ANSWERS)) {
            return -1;
        }
        const k_bool here = p >= 0 && !k->mask.is_gone;
        const k_i32 at = num + (k_i32)k_scan(k, here, &all);
        if (here) {
            terms[at].row = k_own(g, ll_part(g, c, &ll->map.answers, p) +
                                         (k_u64)answer * (k_u64)ll->wire_bytes) +
                            from;
            terms[at].weight = !exact            ? 1.0f
                               : a->weights.data ? *(const k_f32 *)k_at(&a->weights, t, i)
                                                 : given[i];
        }
        num += (k_i32)all;
    }
    k_syncwarp(k);
    return num;
}

/* Bytes part.from to part.end of token t's sum. */
static K_FN k_bool ll_sum_part(struct k_thread *k, const struct k_ll_combine_args *a,
                               const struct ll_call *c, k_i32 t, struct ll_span part) {
    struct k_term *terms = ll_terms(k);
    const k_bool logfmt = (a->form & K_LL_SIG_LOGFMT) != 0;
    const k_i32 num = ll_token_terms(k, a, c, t, logfmt ? 0 : part.from, terms);
    if (num < 0) {
        return 0;
    }
    if (logfmt) {
        ll_log_reduce(k, k_peer_own(k_row(&a->out, t)), a->row_bytes, part, terms, num);
    } else {
        k_reduce(k, k_peer_own(k_row(&a->out, t) + (k_u64)part.from), K_BF16, 1,
                 part.end - part.from, terms, num); /* by 1, if not exact */
    }
    k_syncwarp(k);
    return 1;
}

/* Also from ranks that answer nothing a header is awaited: whoever differs is told so. Before any answer
 * is awaited, as one of a rank that differs may never come. */
static K_FN k_bool ll_await_headers(struct k_thread *k, const struct k_ll_combine_args *a,
                                    const struct ll_call *c) {
    const struct k_group *g = &a->g;
    k_bool ok = 1;
    for (k_i32 p = ll_last_first(k); ok && p < g->num_ranks; p += k_stride(k, k->num_blocks)) {
        const struct ll_header h = ll_combine_header(a);
        k_u32 tokens = 0;
        k->mask.is_gone = ll_is_masked(k, p);
        ok = ll_await_header(k, c, ll_own_words(g, c, &a->ll.map.header, p), p, &h, &tokens);
    }
    return ok;
}

/* By the warp that leaves last: answers of ranks that this kernel has left out were added by some and not
 * by others. Of the tokens that went there they are left out altogether. */
static K_FN k_bool ll_sum_again(struct k_thread *k, const struct k_ll_combine_args *a,
                                const struct ll_call *c) {
    const struct k_ll *ll = &a->ll;
    for (k_i32 t = 0; t < a->tokens; t++) {
        const k_i32 *dest =
            (const k_i32 *)ll_in_handle(ll, ll->map.dest) + (k_i64)t * ll->group_topk;
        k_bool again = 0;
        for (k_i32 i = k->lane; i < a->ll.head->topk; i += K_LANES) {
            again = again || (dest[i] >= 0 && ll_is_masked(k, dest[i]));
        }
        const struct ll_span row = {0, a->row_bytes};
        if (k_ballot(k, again) != 0 && !ll_sum_part(k, a, c, t, row)) {
            return 0;
        }
    }
    return 1;
}

static K_FN k_bool ll_combine_receive(struct k_thread *k, const struct k_ll_combine_args *a,
                                      const struct ll_call *c) {
    const k_i32 slices = ll_slices(a->tokens);
    const k_i32 unit = a->form & K_LL_SIG_LOGFMT ? K_LOG_STEP : 16 * K_LANES;
    ll_time_waits(k, c, &a->ll.map.header, K_PHASE_ANSWERS, 0, &a->wait_ns);
    if (!ll_await_headers(k, a, c)) {
        return 0;
    }
    for (k_i32 u = k->block; u < a->tokens * slices; u += k->num_blocks) {
        const k_i32 t = u / slices;
        const struct ll_span part =
            ll_warp_part(k, ll_cut(a->row_bytes, unit, slices, u % slices), unit);
        if (part.from < part.end && !ll_sum_part(k, a, c, t, part)) {
            return 0;
        }
    }
    return 1;
}

/* ---- entry ---------------------------------------------------------------------------------- */

/* The handle is of a dispatch that was received here, and of this call's shape; a send knows no T. */
static K_FN k_bool ll_knows(struct k_thread *k, const struct k_ll_combine_args *a,
                            const struct ll_call *c) {
    const struct k_ll_head *h = &c->head;
    const k_u64 n = h->number[0];
    const k_bool good =
        h->owner == (k_u64)a->ll.ctl && n > (k->mask.ll ? k_load(&a->ll.ctl->floor[0]) : 0) &&
        (a->tokens < 0 || h->tokens == a->tokens) && (a->topk == 0 || h->topk == a->topk) &&
        h->experts == a->g.experts && ((h->signature ^ a->form) & K_LL_SIG_COMPACT) == 0 &&
        h->max_tokens == a->ll.max_tokens && (n & 1 ? c->taken[1] : c->taken[0]) > ll_before(n);
    return good || ll_refuse(k, K_REFUSED_HANDLE);
}

static K_FN void ll_combine_run(struct k_thread *k, const struct k_ll_combine_args *a,
                                const struct ll_call *c) {
    const k_bool ok = c->lost == 0 && (!c->sends || ll_combine_send(k, a, c)) &&
                      (!c->receives || ll_combine_receive(k, a, c));
    const k_bool mends = ll_is_mender(k, c);
    if (!ok || (mends && !ll_sum_again(k, a, c))) {
        ll_fail(k);
    }
    ll_leave(k, c);
}

K_KERNEL(low_latency, combine, k_ll_combine_args) {
    struct ll_call c;
    if (!ll_begin(k, &a->g, &a->ll, a->flags, (k_i32)K_OP_LL_COMBINE, &c)) {
        return;
    }
    ll_hello(k, &c);
    if (ll_knows(k, a, &c)) {
        ll_combine_run(k, a, &c);
    }
}
