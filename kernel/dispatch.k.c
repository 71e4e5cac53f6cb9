/* SPDX-License-Identifier: MIT */
/*
 * dispatch: rows to the ranks of their experts, and what arrives into the caller's tensors.
 *
 *   control   block 0: ready words; uncached: counts to every peer, bases back, everybody reads
 *             every base, so all ranks know alike whether the rows fit. Then `go`.
 *   send      one copy per (token, destination) to its final row of the destination's slot, its
 *             sidecar beside it, and one progress word per (destination, channel). Where some
 *             blocks send and others receive, the receivers make the copies to this rank itself.
 *   receive   rows of a (source, channel), as far as its progress word says that they are here:
 *             unpack their sidecars, copy them out. All blocks do; those that send, afterwards.
 *             Where this rank's own rows are copied out they do not pass through the arena.
 *
 * A sidecar (abi.h draws it) is the same for all destinations of a token, so it is made once, in a
 * stage of the mover, and stored with the last piece of the row or like one.
 *
 * One warp can run all of it in this order: sending never waits for a receiver.
 */
/* gate: -UK_NODES */
/* gate: -DK_NODES=1 */
#include "kernel/dispatch_receive.h"
#include "kernel/dispatch_send.h"
#include "kernel/far_dispatch.h"

/* ---- control -------------------------------------------------------------------------------- */

/*
 * A counts message: the rows, which bases depend on and which therefore go first and by themselves;
 * rows per expert of the destination; rows per channel. The latter two in parts of what a warp has
 * in flight at once.
 */
#define K_COUNTS_PART (K_MANY * K_LANES)

struct part {
    k_i32 word;       /* of the message, the lane's first */
    k_i32 first, num; /* of what the message holds: the lane's first, and how many there are */
    k_bool experts;   /* else channels */
};

static K_INLINE k_i32 parts_of(k_i32 words) {
    return (words + K_COUNTS_PART - 1) / K_COUNTS_PART;
}

static K_INLINE k_i32 num_parts(const struct k_group *g) {
    return parts_of(g->count_words - 1 - g->num_channels) + parts_of(g->num_channels);
}

/* A lane's words of part i of a message to rank p from one whose tokens use `channels` of them. */
static K_INLINE struct part part_of(const struct k_thread *k, k_i32 i, k_i32 p,
                                    k_i32 channels) {
    const struct k_group *g = k->g;
    const k_i32 chan_word = g->count_words - g->num_channels;
    const k_i32 of_experts = parts_of(chan_word - 1);
    struct part c;
    c.experts = i < of_experts;
    c.first = (c.experts ? i : i - of_experts) * K_COUNTS_PART + k->lane;
    c.num = c.experts ? g->rank_first[p + 1] - g->rank_first[p] : channels;
    c.word = c.first + (c.experts ? 1 : chan_word);
    return c;
}

/* Whether rank p is told by this rank itself. */
static K_INLINE k_bool reaches(const struct k_dispatch_args *a, k_i32 p) {
    return !K_HAS_FAR(a) || is_near(a->far, p);
}

/* One warp: its rows to every rank. */
static K_FN void post_rows(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    K_ROLLED for (k_i32 p = k->lane; p < g->num_ranks; p += K_LANES) {
        if (reaches(a, p)) {
            k_post(k_peer_at(g, p, counts_offset(g, k->epoch, g->rank)),
                   K_WORD(k->epoch, a->h.send_count[p]));
        }
    }
}

/* Part i of the message to rank p; all is read before anything is posted. */
static K_FN void post_counts(struct k_thread *k, const struct k_dispatch_args *a, k_i32 p,
                             k_i32 i) {
    const struct k_group *g = &a->g;
    const struct part c = part_of(k, i, p, a->channels.num);
    const struct k_peer to =
        k_peer_at(g, p, counts_offset(g, k->epoch, g->rank) + 8ull * (k_u64)c.word);
    k_u32 v[K_MANY];
    if (c.experts) {
        const k_i32 *expert = g->rank_expert + g->rank_first[p] + c.first;
        K_UNROLL for (k_i32 j = 0; j < K_MANY; j++) {
            v[j] = c.first + j * K_LANES < c.num ? (k_u32)expert[j * K_LANES] : 0;
        }
        K_UNROLL for (k_i32 j = 0; j < K_MANY; j++) {
            v[j] = c.first + j * K_LANES < c.num ? a->h.send_expert[v[j]] : 0;
        }
    } else {
        const k_u32 *chan = a->h.send_chan + (k_i64)p * (g->num_channels + 1) + 1 + c.first;
        K_UNROLL for (k_i32 j = 0; j < K_MANY; j++) {
            v[j] = c.first + j * K_LANES < c.num ? chan[j * K_LANES] : 0;
        }
    }
    K_UNROLL for (k_i32 j = 0; j < K_MANY; j++) {
        if (c.first + j * K_LANES < c.num) {
            k_post(k_peer_plus(to, 8ull * (k_u64)(j * K_LANES)), K_WORD(k->epoch, v[j]));
        }
    }
}

/* The last ready word of rank `src`: one that does not come to the operation is late with that. */
static K_INLINE const k_u64 *arrival_of(const struct k_thread *k, k_i32 src) {
    return (const k_u64 *)k_own(k->g, ready_offset(k->g, k->epoch, src)) + K_READY_WORDS - 1;
}

/* Part i of the message from rank `src`. */
static K_FN k_bool await_counts(struct k_thread *k, const struct k_dispatch_args *a, k_i32 src,
                                k_i32 i) {
    const struct k_group *g = &a->g;
    k_u32 v[K_MANY], where = 0;
    if (!k_await_word(k, arrival_of(k, src), k->epoch, src, K_PHASE_READY, &where)) {
        return 0;
    }
    const struct part c = part_of(k, i, g->rank, (k_i32)K_WHERE_CHANNELS(where));
    const k_u64 *words = (const k_u64 *)k_own(g, counts_offset(g, k->epoch, src)) + c.word;
    const k_i32 left = c.num > c.first ? (c.num - c.first + K_LANES - 1) / K_LANES : 0;
    k_u32 *to = c.experts ? a->h.recv_expert + (k_i64)src * c.num
                          : a->h.recv_chan + (k_i64)src * (g->num_channels + 1) + 1;
    if (!k_await_words(k, words, K_LANES, k_min(left, K_MANY), k->epoch, src, K_PHASE_COUNTS,
                       v)) {
        return 0;
    }
    K_UNROLL for (k_i32 j = 0; j < K_MANY; j++) {
        if (j < left) {
            to[c.first + j * K_LANES] = v[j];
        }
    }
    return 1;
}

/* The rows from rank `src`, or of none; all lanes call. They come before its ready message, so
 * that is not awaited first; but if it is not there, it is what the rank is late with. */
static K_FN k_bool await_rows(struct k_thread *k, k_i32 src, k_u32 *rows) {
    const struct k_group *g = k->g;
    k_bool ok = 1;
    if (src < g->num_ranks) {
        const k_u64 *word = (const k_u64 *)k_own(g, counts_offset(g, k->epoch, src));
        const k_u64 *arrival = arrival_of(k, src);
        struct k_spinner s = K_SPINNER;
        k_u64 w = k_load(word);
        while (ok && (k_u32)(w >> 32) != k->epoch) {
            const k_bool arrived = (k_u32)(k_load(arrival) >> 32) == k->epoch;
            ok = k_spin(k, &s, src, arrived ? K_PHASE_COUNTS : K_PHASE_READY);
            w = k_load(word);
        }
        ok = ok || (k_u32)(w >> 32) == k->epoch;
        *rows = (k_u32)w;
    }
    return k_all(k, ok);
}

/* Posts word i of this rank's bases to rank p. Each lane has a rank of its own. */
static K_INLINE void post_base(struct k_thread *k, const struct k_dispatch_args *a, k_i32 p,
                               k_i32 i, k_u32 value) {
    if (reaches(a, p)) {
        k_post(k_peer_at(&a->g, p, base_offset(&a->g, k->epoch, a->g.rank) + 8ull * (k_u64)i),
               K_WORD(k->epoch, value));
    }
}

/* One warp, a lane for each source: their rows, and where those start here, which it is told at
 * once; then, when the rows of all are known, what this rank lacks if they do not fit. All ranks
 * learn here, too, of sources with too many tokens, of which the most is marked. */
static K_FN k_bool place_sources(struct k_thread *k, const struct k_dispatch_args *a,
                                 k_u32 *go) {
    const struct k_group *g = &a->g;
    const struct k_handle *h = &a->h;
    k_u64 sum = 0;
    k_bool excess = 0;
    if (k->lane == 0) {
        h->counts->need = h->counts->tokens = 0;
    }
    k_syncwarp(k);
    K_ROLLED for (k_i32 first = 0; first < g->num_ranks; first += K_LANES) {
        const k_i32 s = first + k->lane;
        k_u32 rows = 0, total = 0;
        if (!await_rows(k, s, &rows)) {
            return 0;
        }
        if (rows & K_ROWS_EXCESS) {
            k_raise_to(&h->counts->tokens, K_NEED_PACK(rows & ~K_ROWS_EXCESS, s));
            k_raise_to(&h->counts->need, K_NEED_PACK(0, s));
            excess = 1;
            rows = 0;
        }
        const k_u32 base = (k_u32)sum + k_scan(k, rows, &total);
        if (s < g->num_ranks) {
            post_base(k, a, s, 0, base);
            h->recv_count[s] = rows;
            h->recv_base[s] = base;
            h->recv_chan[(k_i64)s * (g->num_channels + 1)] = 0;
        }
        sum += total;
    }
    const k_u32 need = (k_i64)sum > g->max_recv_rows ? (k_u32)sum : 0u;
    K_ROLLED for (k_i32 p = k->lane; p < g->num_ranks; p += K_LANES) {
        post_base(k, a, p, 1, need);
    }
    if (k->lane == 0) {
        h->recv_base[g->num_ranks] = (k_u32)sum;
        h->counts->rows = (k_i64)sum;
    }
    *go = k_all(k, !excess) ? K_GO : K_GO_NEED;
    return !K_HAS_FAR(a) || exchange_far_bases(k, a, need);
}

/* The same warp awaits every base. It marks in counts->need the largest unmet need, if there is
 * any, and says so in `go`. */
static K_FN k_bool await_bases(struct k_thread *k, const struct k_dispatch_args *a, k_u32 *go) {
    const struct k_group *g = &a->g;
    k_bool fits = 1;
    K_ROLLED for (k_i32 first = 0; first < g->num_ranks; first += K_LANES) {
        const k_i32 p = first + k->lane;
        const k_bool has = p < g->num_ranks;
        const k_u64 *words = (const k_u64 *)k_own(g, base_offset(g, k->epoch, has ? p : 0));
        k_u32 v[K_MANY];
        if (!k_await_words(k, words, 1, has ? K_BASE_WORDS : 0, k->epoch, p, K_PHASE_BASES,
                           v)) {
            return 0;
        }
        if (has) {
            a->h.remote_base[p] = v[0];
        }
        if (has && v[1]) {
            k_raise_to(&a->h.counts->need, K_NEED_PACK(v[1], p));
            fits = 0;
        }
    }
    *go = k_all(k, fits) ? *go : K_GO_NEED;
    return 1;
}

/* What has arrived, to a host that may be waiting for it. A graph replays old tickets, which must
 * not hide a newer one. */
static K_INLINE void report_counts(struct k_thread *k, const struct k_dispatch_args *a) {
    struct k_counts *counts = a->h.counts, *notice = a->h.notice;
    const k_u32 told = (k_u32)(k_load(&counts->known) >> 32);
    const k_u32 ticket = told && (k_i32)(told - a->ticket) > 0 ? told : a->ticket;
    if (notice != counts) {
        k_store(&counts->known, K_WORD(ticket, k->epoch));
        notice->rows = counts->rows;
        notice->need = counts->need;
        notice->tokens = counts->tokens;
    }
    k_publish_local(&notice->known, K_WORD(ticket, k->epoch));
}

/* One warp: how many channels each source uses, of which its ready message told, and the most. */
static K_INLINE void note_channels(struct k_thread *k, const struct k_handle *h, k_i32 ranks) {
    k_u32 most = 0;
    for (k_i32 s = k->lane; s < ranks; s += K_LANES) {
        const k_u32 n = K_WHERE_CHANNELS(h->remote_where[s]);
        h->recv_channels[s] = n;
        most = n > most ? n : most;
    }
    most = k_most(k, most);
    if (k->lane == 0) {
        h->recv_channels[ranks] = most;
    }
}

/*
 * Block 0. Ends with `go`, unless the operation has faulted. The last warp does what others wait
 * for: rows, bases, answers. The rest, or it too if it is alone, share the other words.
 */
static K_FN k_bool dispatch_control(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    const k_bool counts = (a->flags & K_DO_COUNTS) != 0, last = k->warp == k->num_warps - 1;
    const k_i32 items = g->num_ranks * (counts ? 1 + num_parts(g) : 1);
    const k_i32 readers = counts && k->num_warps > 1 ? k->num_warps - 1 : k->num_warps;
    struct op_signature sig;
    sig.word0 = signature(k, a->flags, a->topk, &a->h);
    sig.word1 = (k_u32)a->row_bytes | K_SIG_ROW_TYPE(a->types);
    sig.word2 = (k_u32)(a->num_scales * a->scale_bytes) | K_SIG_SCALE_TYPE(a->types);
    k_u32 go = last && !counts && a->h.counts->need ? K_GO_NEED : K_GO;
    if (counts && last) {
        post_rows(k, a);
    }
    K_ROLLED for (k_i32 i = k->warp; i < items; i += k->num_warps) {
        const k_i32 p = (g->rank + i) % g->num_ranks;
        if (!reaches(a, p)) {
            continue; /* its relay tells it */
        }
        if (i < g->num_ranks) {
            post_ready(k, p, &sig, K_WHERE(a->slot, a->channels.num));
        } else {
            post_counts(k, a, p, i / g->num_ranks - 1);
        }
    }
    k_bool ok = !K_HAS_FAR(a) || !last || exchange_far(k, a, &sig);
    K_ROLLED for (k_i32 i = k->warp; ok && k->warp < readers && i < items; i += readers) {
        const k_i32 p = K_HAS_FAR(a) ? far_order(a->far, i, g->num_ranks) : i % g->num_ranks;
        ok = i < g->num_ranks ? await_ready(k, p, &sig, &a->h.remote_where[p])
                              : await_counts(k, a, p, i / g->num_ranks - 1);
    }
    if (ok && counts && last) {
        ok = place_sources(k, a, &go) && await_bases(k, a, &go);
    }
    ok = k_barrier(k, ok);
    if (ok && last && k->lane == 0) {
        k_store(&g->ctl->taken[K_TAKEN_CHANNELS], 0);
        k_publish_local(&g->ctl->go, K_WORD(k->epoch, go));
    }
    if (ok && counts && last) {
        note_channels(k, &a->h, g->num_ranks);
    }
    if (ok && counts && k->warp == 0 && k->lane == 0) {
        report_counts(k, a);
    }
    return ok;
}

/* ---- entry ---------------------------------------------------------------------------------- */

/*
 * To whom a block sends. Where a kernel sends and receives, its first send_blocks blocks send and
 * the others receive from the start, unless there is one block (`both`: there are more). This
 * rank's own rows need not be sent where they are copied out of x (`direct`).
 *
 *   kernel               block           sends to      together with
 *   receives only        any             nobody
 *   sends only           any             K_TO_ALL      all blocks
 *   both, direct         first, or only  K_TO_PEERS    the first blocks
 *                        other           nobody
 *   both, not direct     only            K_TO_ALL
 *                        first           K_TO_PEERS    the first blocks
 *                        other           K_TO_SELF     the other blocks
 */
static K_INLINE k_i32 whom_to_serve(k_bool both, k_bool direct, k_bool away) {
    return direct || (both && away) ? K_TO_PEERS : both ? K_TO_SELF : K_TO_ALL;
}

/* False after a fault. */
static K_FN k_bool dispatch_run(struct k_thread *k, const struct k_dispatch_args *a) {
    const k_bool sends = (a->flags & K_DO_SEND) != 0, receives = (a->flags & K_DO_RECV) != 0;
    const k_bool both = sends && receives && k->num_blocks > 1;
    const k_i32 senders = both ? (k_i32)a->send_blocks : k->num_blocks;
    const k_i32 first_recv = both ? senders : 0;
    const k_bool direct = sends && receives && a->recv_x.data != 0;
    k_u32 go = K_GO_UNASKED;
    k_bool ok = 1;
    if (k->block == 0) { /* its warps go on to `prepare_outputs` together, or not at all */
        ok = (!sends || dispatch_control(k, a)) && (may_send(k, &go) || go == K_GO_NEED);
        ok = k_barrier(k, ok) && (go == K_GO_NEED || !receives || prepare_outputs(k, a));
    }
    if (!ok) {
        return 0;
    }
    struct k_mover m;
    k_mover_begin(k, &m, warp_ring(k, a->stages, a->stage_bytes), a->stages, a->stage_bytes);
    const k_bool far = K_HAS_FAR(a) && sends && k->block < senders;
    if (far && may_send(k, &go)) { /* first, as it takes longest */
        far_dispatch(k, a, &m, spread_first(k, 0, senders), k_stride(k, senders), 0);
    }
    if (sends && (k->block < senders || !direct)) { /* one place, as the code is large */
        const k_bool away = k->block < senders;
        const k_i32 from = away ? 0 : first_recv;
        const k_i32 blocks = away ? senders : k->num_blocks - first_recv;
        send_channels(k, a, &m, whom_to_serve(both, direct, away),
                      spread_first(k, from, blocks), k_stride(k, blocks), &go);
    }
    ok = may_send(k, &go);
    if (ok && far) {
        ok = far_dispatch(k, a, &m, spread_first(k, 0, senders), k_stride(k, senders), 1);
    }
    if (ok && sends && k_first(k, 0) == 0) {
        count_sent_rows(k, a);
    }
    if (ok && receives) {
        ok = receive(k, a, &m, first_recv, direct);
    }
    if (go == K_GO_NEED) {
        k_fail_op(k, K_END_NEED);
        ok = 1;
    }
    k_mover_end(k, &m);
    return ok;
}

K_KERNEL(throughput, dispatch, k_dispatch_args) {
    const k_bool receives = (a->flags & K_DO_RECV) != 0;
    k_enter(k, &a->g, K_OP_DISPATCH);
    /* Behind a kernel that sent on this stream, and has ended the operation if rows did not fit. */
    const k_bool is_over = (a->flags & (K_DO_DROP | K_DO_BEHIND)) &&
                           (k_u32)(k_load(&a->g.ctl->sent) >> 32) != k->epoch;
    if (is_over || (a->flags & K_DO_NOTHING)) {
        if (k->block == 0 && k->warp == 0) {
            clear_outputs(k, a);
        }
        return;
    }
    if (a->flags & K_DO_DROP) {
        end_dropped(k);
        return;
    }
    if (!dispatch_run(k, a)) {
        k_fail_op(k, K_END_FAULT);
    }
    if (k_is_last_out(k, receives)) {
        await_sender(k, a->flags);
        const k_u32 how = k_how_ended(k);
        if (how && receives) {
            clear_outputs(k, a);
        }
        k_finish_kernel(k, receives || how == K_END_NEED); /* else another kernel receives */
        tell_sent(k, receives);
    }
}
