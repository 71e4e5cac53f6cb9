/* SPDX-License-Identifier: MIT */
/*
 * dispatch: rows to the ranks of their experts, and what arrives into the caller's tensors.
 *
 *   control   block 0: ready words; uncached: counts to every peer, bases back, everybody reads
 *             every answer, so all ranks know alike whether the rows fit. Then `go`.
 *   send      one copy per (token, destination) to its final row of the destination's slot, its
 *             sidecar beside it, and one progress word per (destination, channel). Where some
 *             blocks send and others receive, the receivers make the copies to this rank itself.
 *   receive   rows of a (source, channel), as far as its progress word says that they are here:
 *             unpack their sidecars, copy them out. All blocks do; those that send, afterwards.
 *             Where this rank's own rows are copied out they do not pass through the arena.
 *
 * A sidecar is 32-bit words: token, K expert ids, K indices within (source, expert), K weights if
 * they travel, then the scales' bytes. It is the same for all destinations of a token, so it is
 * made once, in a stage of the mover, and stored with the last piece of the row or like one.
 *
 * One warp can run all of it in this order: sending never waits for a receiver.
 */
#include "kernel/op.h"

#define GO 0u
#define SKIP 1u

static K_INLINE k_i32 side_scales_word(const struct k_dispatch_args *a) {
    return 1 + a->topk * ((a->flags & K_DO_WEIGHTS) ? 3 : 2);
}

/* ---- control -------------------------------------------------------------------------------- */

/*
 * A counts message: the rows, which bases depend on and which therefore go first and by themselves;
 * rows per expert of the destination; rows per channel. The latter two in parts of what a warp has
 * in flight at once.
 */
#define PART (K_MANY * K_LANES)

struct part {
    k_i32 word;       /* of the message, the lane's first */
    k_i32 first, num; /* of what the message holds: the lane's first, and how many there are */
    k_bool experts;   /* else channels */
};

static K_INLINE k_i32 parts_of(k_i32 words) {
    return (words + PART - 1) / PART;
}

static K_INLINE k_i32 num_parts(const struct k_group *g) {
    return parts_of(g->count_words - 1 - g->num_channels) + parts_of(g->num_channels);
}

/* A lane's words of part i of a message to rank p. */
static K_INLINE struct part part_of(const struct k_thread *k, k_i32 i, k_i32 p) {
    const struct k_group *g = k->g;
    const k_i32 chan_word = g->count_words - g->num_channels;
    const k_i32 of_experts = parts_of(chan_word - 1);
    struct part c;
    c.experts = i < of_experts;
    c.first = (c.experts ? i : i - of_experts) * PART + k->lane;
    c.num = c.experts ? g->rank_first[p + 1] - g->rank_first[p] : g->num_channels;
    c.word = c.first + (c.experts ? 1 : chan_word);
    return c;
}

/* One warp: its rows to every rank. */
static K_FN void tell_rows(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    K_ROLLED for (k_i32 p = k->lane; p < g->num_ranks; p += K_LANES) {
        k_post(k_peer_at(g, p, counts_offset(g, k->epoch, g->rank)),
               K_WORD(k->epoch, a->h.send_count[p]));
    }
}

/* Part i of the message to rank p; all is read before anything is posted. */
static K_FN void tell_counts(struct k_thread *k, const struct k_dispatch_args *a, k_i32 p,
                             k_i32 i) {
    const struct k_group *g = &a->g;
    const struct part c = part_of(k, i, p);
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
        const k_u32 *chan = a->h.send_chan + (k_i64)p * (g->num_channels + 1) + c.first;
        K_UNROLL for (k_i32 j = 0; j < K_MANY; j++) {
            v[j] = c.first + j * K_LANES < c.num ? chan[j * K_LANES] : 0;
        }
    }
    K_UNROLL for (k_i32 j = 0; j < K_MANY; j++) {
        if (c.first + j * K_LANES < c.num) {
            k_post(own_memory(to.address + 8ull * (k_u64)(j * K_LANES)),
                   K_WORD(k->epoch, v[j]));
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
    const struct part c = part_of(k, i, g->rank);
    const k_u64 *words = (const k_u64 *)k_own(g, counts_offset(g, k->epoch, src)) + c.word;
    const k_i32 left = c.num > c.first ? (c.num - c.first + K_LANES - 1) / K_LANES : 0;
    k_u32 *to = c.experts ? a->h.recv_expert + (k_i64)src * c.num
                          : a->h.recv_chan + (k_i64)src * (c.num + 1);
    k_u32 v[K_MANY], ignored = 0;
    if (!k_await_word(k, arrival_of(k, src), k->epoch, src, K_PHASE_READY, &ignored) ||
        !k_await_words(k, words, K_LANES, at_most(left, K_MANY), k->epoch, src, K_PHASE_COUNTS,
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
        k_u64 w = k_poll(word);
        while (ok && (k_u32)(w >> 32) != k->epoch) {
            const k_bool arrived = (k_u32)(k_poll(arrival) >> 32) == k->epoch;
            ok = k_spin(k, &s, src, arrived ? K_PHASE_COUNTS : K_PHASE_READY);
            w = k_poll(word);
        }
        ok = ok || (k_u32)(w >> 32) == k->epoch;
        *rows = (k_u32)w;
    }
    return k_all(k, ok);
}

/* Posts word i of this rank's answers to the ranks: the lane's one to rank p. */
static K_INLINE void tell_answer(struct k_thread *k, const struct k_dispatch_args *a, k_i32 p,
                                 k_i32 i, k_u32 value) {
    k_post(k_peer_at(&a->g, p, answer_offset(&a->g, k->epoch, a->g.rank) + 8ull * (k_u64)i),
           K_WORD(k->epoch, value));
}

/* One warp, a lane for each source: their rows, and where those start here, which it is told at
 * once; then, when the rows of all are known, what this rank lacks if they do not fit. */
static K_FN k_bool place_sources(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    const struct k_handle *h = &a->h;
    k_u64 sum = 0;
    K_ROLLED for (k_i32 first = 0; first < g->num_ranks; first += K_LANES) {
        const k_i32 s = first + k->lane;
        k_u32 rows = 0, total = 0;
        if (!await_rows(k, s, &rows)) {
            return 0;
        }
        const k_u32 base = (k_u32)sum + k_scan(k, rows, &total);
        if (s < g->num_ranks) {
            tell_answer(k, a, s, 0, base);
            h->recv_count[s] = rows;
            h->recv_base[s] = base;
            h->recv_chan[(k_i64)s * (g->num_channels + 1) + g->num_channels] = rows;
        }
        sum += total;
    }
    const k_u32 need = (k_i64)sum > g->max_recv_rows ? (k_u32)sum : 0u;
    K_ROLLED for (k_i32 p = k->lane; p < g->num_ranks; p += K_LANES) {
        tell_answer(k, a, p, 1, need);
    }
    if (k->lane == 0) {
        h->recv_base[g->num_ranks] = (k_u32)sum;
        h->counts->rows = (k_i64)sum;
        h->counts->need = 0;
    }
    k_syncwarp(k);
    return 1;
}

/* The same warp: every answer. Marks in counts->need the largest unmet need; `go` says if any. */
static K_FN k_bool await_bases(struct k_thread *k, const struct k_dispatch_args *a, k_u32 *go) {
    const struct k_group *g = &a->g;
    k_bool fits = 1;
    K_ROLLED for (k_i32 first = 0; first < g->num_ranks; first += K_LANES) {
        const k_i32 p = first + k->lane;
        const k_bool has = p < g->num_ranks;
        const k_u64 *words = (const k_u64 *)k_own(g, answer_offset(g, k->epoch, has ? p : 0));
        k_u32 v[K_MANY];
        if (!k_await_words(k, words, 1, has ? K_ANSWER_WORDS : 0, k->epoch, p, K_PHASE_BASES,
                           v)) {
            return 0;
        }
        if (has) {
            a->h.remote_base[p] = v[0];
        }
        if (has && v[1]) {
            k_max(&a->h.counts->need, K_NEED_PACK(v[1], p));
            fits = 0;
        }
    }
    *go = k_all(k, fits) ? GO : SKIP;
    return 1;
}

/* What has arrived, to a host that may be waiting for it. */
static K_INLINE void tell_host(const struct k_dispatch_args *a) {
    struct k_counts *notice = a->h.notice;
    if (notice != a->h.counts) {
        notice->rows = a->h.counts->rows;
        notice->need = a->h.counts->need;
    }
    k_publish_local(&notice->known, K_WORD(a->ticket, 0));
}

/*
 * Block 0. Ends with `go`, unless the operation has faulted. The last warp does what others wait
 * for: rows, bases, answers. The rest, or it too if it is alone, share the other words.
 */
static K_FN k_bool control(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    const k_bool counts = (a->flags & K_DO_COUNTS) != 0, last = k->warp == k->num_warps - 1;
    const k_i32 items = g->num_ranks * (counts ? 1 + num_parts(g) : 1);
    const k_i32 readers = counts && k->num_warps > 1 ? k->num_warps - 1 : k->num_warps;
    struct op_signature sig;
    sig.word0 = signature(k, a->flags, a->topk, a->handle_id);
    sig.word1 = (k_u32)a->row_bytes;
    sig.word2 = (k_u32)(a->num_scales * a->scale_bytes);
    k_u32 go = last && !counts && a->h.counts->need ? SKIP : GO;
    if (counts && last) {
        tell_rows(k, a);
    }
    K_ROLLED for (k_i32 i = k->warp; i < items; i += k->num_warps) {
        const k_i32 p = (g->rank + i) % g->num_ranks;
        if (i < g->num_ranks) {
            tell_ready(k, p, &sig, (k_u32)a->slot);
        } else {
            tell_counts(k, a, p, i / g->num_ranks - 1);
        }
    }
    k_bool ok = 1;
    K_ROLLED for (k_i32 i = k->warp; ok && k->warp < readers && i < items; i += readers) {
        const k_i32 p = i % g->num_ranks;
        ok = i < g->num_ranks ? await_ready(k, p, &sig, &a->h.remote_slot[p])
                              : await_counts(k, a, p, i / g->num_ranks - 1);
    }
    if (ok && counts && last) {
        ok = place_sources(k, a) && await_bases(k, a, &go);
    }
    ok = k_barrier(k, ok);
    if (ok && last && k->lane == 0) {
        k_poke(&g->ctl->taken[1], 0);
        k_publish_local(&g->ctl->go, K_WORD(k->epoch, go));
    }
    if (ok && counts && k->warp == 0 && k->lane == 0) {
        tell_host(a);
    }
    return ok;
}

/* ---- send ----------------------------------------------------------------------------------- */

/* Which destinations a pass over the tokens serves. Blocks that send keep the link busy; where
 * others receive, those also copy what stays here. */
#define TO_ALL 0
#define TO_PEERS 1
#define TO_SELF 2

static K_INLINE k_bool serves(const struct k_dispatch_args *a, k_i32 whom, k_i32 d) {
    return whom == TO_ALL || (d == a->g.rank) == (whom == TO_SELF);
}

/* Where one destination of a token takes its row and its sidecar; 0: there is none. */
struct place {
    k_u64 row, side;
};

/* What a sending warp keeps in its scratch. */
#define NEAR_RANKS 24
#define LISTED_TOKENS 64

struct send_token {
    k_i32 token, channel, dests;
};

struct send_scratch {
    struct place first[NEAR_RANKS]; /* where this rank's rows begin at the first ranks */
    struct send_token listed[LISTED_TOKENS];
};

_Static_assert(sizeof(struct send_scratch) <= K_SCRATCH_BYTES(1), "send_scratch");
_Static_assert(LISTED_TOKENS > K_LANES + K_MOVER_STAGES + 1, "what is listed is still in use");

/*
 * The tokens that a warp sends, in order: those of its channels that have a destination to serve.
 * Its channels are number `first` and then, where warps take them in turn, the next that no other
 * has taken, else every `stride`th. Tokens are listed ahead of need, K_LANES at a time, because
 * nothing may wait for memory between two pieces.
 */
struct send_list {
    struct send_scratch *s;
    k_i32 whom, stride;
    k_bool in_turn;
    k_i32 channel, at, end; /* looked at now; its tokens that were not */
    k_i32 num;              /* tokens listed so far */
};

static K_INLINE const struct send_token *listed(const struct send_list *l, k_i32 i) {
    return &l->s->listed[(k_u32)i % LISTED_TOKENS];
}

/* How many destinations token t has; 0 if there is none to serve. */
static K_INLINE k_i32 dests_to_serve(const struct k_dispatch_args *a, k_i32 whom, k_i32 t) {
    const k_i32 num = a->h.num_dests[t];
    k_bool any = whom == TO_ALL || (whom == TO_PEERS && num > 1);
    for (k_i32 i = 0; i < num && !any; i++) {
        any = serves(a, whom, a->h.dest_rank[(k_i64)t * a->g.max_dests + i]);
    }
    return any ? num : 0;
}

static K_INLINE void begin_channel(const struct k_dispatch_args *a, struct send_list *l,
                                   k_i32 c) {
    l->channel = c;
    l->at = channel_first(&a->channels, c);
    l->end = channel_first(&a->channels, c + 1);
}

/* Lists token i + 1 at least, if there is one. */
static K_INLINE void list_beyond(struct k_thread *k, const struct k_dispatch_args *a,
                                 struct send_list *l, k_i32 i) {
    while (l->num <= i + 1 && l->channel < a->g.num_channels) {
        const k_i32 t = l->at + k->lane;
        const k_i32 dests = t < l->end ? dests_to_serve(a, l->whom, t) : 0;
        k_u32 total = 0;
        const k_u32 before = k_scan(k, dests > 0, &total);
        if (dests > 0) {
            struct send_token *to = &l->s->listed[((k_u32)l->num + before) % LISTED_TOKENS];
            to->token = t;
            to->channel = l->channel;
            to->dests = dests;
        }
        k_syncwarp(k);
        l->num += (k_i32)total;
        l->at += K_LANES;
        if (l->at >= l->end) {
            begin_channel(a, l,
                          l->in_turn ? l->stride + (k_i32)k_take(k, &a->g.ctl->taken[1])
                                     : l->channel + l->stride);
        }
    }
}

/* Where this rank's rows and their sidecars begin at rank d. */
static K_INLINE struct place first_place(const struct k_dispatch_args *a, k_i32 d) {
    const struct k_map *map = &a->g.map;
    const k_u64 slot = a->h.remote_slot[d], row = a->h.remote_base[d];
    struct place p;
    p.row =
        k_peer_at(&a->g, d, map->recv + slot * map->recv_slot_bytes + row * (k_u64)a->row_bytes)
            .address;
    p.side = k_peer_at(&a->g, d,
                       map->side + slot * map->side_slot_bytes + row * (k_u64)a->g.side_stride)
                 .address;
    return p;
}

static K_INLINE struct send_list begin_list(struct k_thread *k, const struct k_dispatch_args *a,
                                            k_i32 whom, k_i32 first, k_i32 stride) {
    struct send_list l = {
        (struct send_scratch *)warp_scratch(k), whom, stride, whom != TO_SELF, 0, 0, 0, 0};
    begin_channel(a, &l, first);
    for (k_i32 d = k->lane; d < at_most(a->g.num_ranks, NEAR_RANKS); d += K_LANES) {
        l.s->first[d] = first_place(a, d);
    }
    k_syncwarp(k);
    return l;
}

/* The place of a row at rank d: number `slot` of this rank's rows for it. */
static K_INLINE struct place place_at(const struct k_dispatch_args *a,
                                      const struct send_list *l, k_i32 d, k_u32 slot) {
    struct place p = {0, 0};
    if (d >= 0 && serves(a, l->whom, d)) {
        p = d < NEAR_RANKS ? l->s->first[d] : first_place(a, d);
        p.row += (k_u64)slot * (k_u64)a->row_bytes;
        p.side += (k_u64)slot * (k_u64)a->g.side_stride;
    }
    return p;
}

/* What travels of a token, in pieces that fit a stage: the row, then its sidecar, which shares
 * the stage of the row's last piece if both fit. */
struct send_shape {
    k_i32 row_pieces, pieces; /* of the row; of both */
    k_i32 row_end;            /* bytes of the row's last piece */
    k_i32 side_piece;         /* the first piece with a part of the sidecar ... */
    k_i32 side_at;            /* ... and where in their stages those parts begin */
    k_i32 side_words, side_bytes;
    k_i32 scales; /* the first word of scales */
    k_i32 direct; /* the words before this one are copies of words in memory */
};

static K_INLINE struct send_shape shape_of(const struct k_dispatch_args *a) {
    const k_i32 scale_bytes = a->num_scales * a->scale_bytes;
    /* Narrow scales can be copied in words where they lie as in the sidecar. */
    const k_bool whole =
        a->scale_bytes == 4 ||
        (a->scales.s1 == a->scale_bytes && ((a->scales.data | (k_u64)a->scales.s0) & 3u) == 0);
    struct send_shape s;
    s.scales = side_scales_word(a);
    s.direct = s.scales + (whole ? scale_bytes / 4 : 0);
    s.side_words = s.scales + (scale_bytes + 3) / 4;
    s.side_bytes = (4 * s.side_words + 15) / 16 * 16;
    s.row_pieces = (a->row_bytes + a->stage_bytes - 1) / a->stage_bytes;
    s.row_end = a->row_bytes - (s.row_pieces - 1) * a->stage_bytes;
    s.pieces = s.row_pieces;
    s.side_piece = s.row_pieces - 1;
    s.side_at = s.row_end;
    if (s.row_end + s.side_bytes > a->stage_bytes) {
        s.pieces += (s.side_bytes + a->stage_bytes - 1) / a->stage_bytes;
        s.side_piece = s.row_pieces;
        s.side_at = 0;
    }
    return s;
}

/* Four bytes of token t's scales, narrower than a word, from byte `byte` on; past the end zeros. */
static K_INLINE k_u32 scales_word(const struct k_dispatch_args *a, k_i32 t, k_i32 byte) {
    k_u32 word = 0;
    for (k_i32 b = 0; b < 4; b += a->scale_bytes) {
        const k_i32 j = a->scale_bytes == 2 ? (byte + b) / 2 : byte + b;
        if (j < a->num_scales) {
            const k_u64 at =
                a->scales.data + (k_u64)((k_i64)t * a->scales.s0 + (k_i64)j * a->scales.s1);
            const k_u32 v = a->scale_bytes == 2 ? *(const k_u16 *)at : *(const k_u8 *)at;
            word |= v << (8 * b);
        }
    }
    return word;
}

/* Where word w of token 0's sidecar lies in memory; 0: nowhere. */
static K_INLINE k_u64 find_word(const struct k_dispatch_args *a, const struct send_shape *s,
                                k_i32 w) {
    const k_i32 topk = a->topk;
    k_u64 at = 0;
    if (w >= s->direct || w < 1) {
        at = 0;
    } else if (w >= s->scales) {
        at = a->scales.data +
             (k_u64)((k_i64)(w - s->scales) * (a->scale_bytes == 4 ? a->scales.s1 : 4));
    } else if (w > 2 * topk) {
        at = a->weights.data + (k_u64)((k_i64)(w - 1 - 2 * topk) * a->weights.s1);
    } else if (w > topk) {
        at = (k_u64)(a->h.sel_index + (w - 1 - topk));
    } else {
        at = (k_u64)(a->h.ids + (w - 1));
    }
    return at;
}

/* Word w of token t's sidecar, which lies at `at` for token 0; of what is not in memory as a word
 * only the token's number. */
static K_INLINE k_u32 read_word(const struct k_dispatch_args *a, const struct send_shape *s,
                                k_u64 at, k_i32 t, k_i32 w) {
    const k_i64 stride = w >= s->scales    ? a->scales.s0
                         : w > 2 * a->topk ? a->weights.s0
                                           : 4 * (k_i64)a->topk;
    return at ? *(const k_u32 *)(at + (k_u64)(t * stride)) : w == 0 ? (k_u32)t : 0;
}

/* Word w of token t's sidecar, whatever it is made from. */
static K_INLINE k_u32 side_word(const struct k_dispatch_args *a, const struct send_shape *s,
                                k_i32 t, k_i32 w) {
    return w < s->direct ? read_word(a, s, find_word(a, s, w), t, w)
                         : scales_word(a, t, 4 * (w - s->scales));
}

/* What a lane reads of a token before its turn: its destination, and words of the sidecar as far
 * as they fit. */
#define WORDS_AHEAD 4

struct token_ahead {
    k_i32 dests_read, words_read; /* of so many tokens; these are the last one's: */
    k_i32 rank;                   /* -1: none */
    k_u32 slot;
    k_u32 word[WORDS_AHEAD];
    k_u64 source[WORDS_AHEAD];
};

static K_INLINE struct token_ahead
begin_ahead(struct k_thread *k, const struct k_dispatch_args *a, const struct send_shape *s) {
    struct token_ahead n = {0, 0, -1, 0, {0}, {0}};
    for (k_i32 i = 0; i < WORDS_AHEAD; i++) {
        n.source[i] = find_word(a, s, k->lane + i * K_LANES);
    }
    return n;
}

/* Destination number i of a listed token. Warps and ranks begin with different ones, so that all
 * links are in use at any time. */
static K_INLINE void read_dest(struct k_thread *k, const struct k_dispatch_args *a,
                               const struct send_token *t, k_i32 i, struct token_ahead *n) {
    const k_i32 turn = ((k->warp * 11 + a->g.rank * 8) % 32 * t->dests) / 32;
    const k_i32 at = i + turn < t->dests ? i + turn : i + turn - t->dests;
    n->rank = -1;
    n->slot = 0;
    if (i < t->dests) {
        n->rank = a->h.dest_rank[(k_i64)t->token * a->g.max_dests + at];
        n->slot = a->h.dest_slot[(k_i64)t->token * a->g.max_dests + at];
    }
}

/*
 * Reads ahead of the piece that is stored next. All is read at once after a token's first piece,
 * its sidecar and the next one's destinations, as waiting for one read may be waiting for all.
 */
static K_INLINE void read_ahead(struct k_thread *k, const struct k_dispatch_args *a,
                                const struct send_shape *s, const struct send_list *l,
                                const struct walk *out, struct token_ahead *n) {
    const k_bool begun = out->piece > 0;
    if (n->dests_read < l->num && n->dests_read == out->item + begun) {
        read_dest(k, a, listed(l, n->dests_read), k->lane, n);
        n->dests_read++;
    }
    if (n->words_read < l->num && n->words_read == out->item && (begun || s->pieces == 1)) {
        const k_i32 t = listed(l, n->words_read)->token;
        for (k_i32 i = 0; i < WORDS_AHEAD; i++) {
            n->word[i] = read_word(a, s, n->source[i], t, k->lane + i * K_LANES);
        }
        n->words_read++;
    }
}

/* Part `part` of a sidecar into its stage, by the lanes. */
static K_INLINE void fill_side(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, const struct send_shape *s, k_i32 t,
                               k_i32 part, k_i32 stage, const struct token_ahead *n) {
    const k_i32 first = part * (a->stage_bytes / 4);
    const k_i32 end = at_most(s->side_bytes / 4, first + a->stage_bytes / 4);
    k_u32 *out = k_mover_fill(k, m, stage) + s->side_at / 4;
    k_i32 ready = 0;
    if (part == 0) {
        ready = WORDS_AHEAD * K_LANES;
        for (k_i32 i = 0; i < WORDS_AHEAD; i++) {
            const k_i32 w = k->lane + i * K_LANES;
            if (w < end) {
                out[w] = n->word[i];
            }
        }
    }
    K_ROLLED
    for (k_i32 w = first + ready + k->lane; w < end; w += K_LANES) {
        out[w - first] = read_word(a, s, find_word(a, s, w), t, w);
    }
    if (s->direct < s->side_words) { /* scales that are not in memory as words */
        const k_i32 from = s->direct > first ? s->direct : first;
        k_syncwarp(k);
        K_ROLLED
        for (k_i32 w = from + k->lane; w < at_most(s->side_words, end); w += K_LANES) {
            out[w - first] = scales_word(a, t, 4 * (w - s->scales));
        }
    }
}

/* The next piece of a token takes a stage; a part of the row is loaded into it. */
static K_INLINE void begin_piece(struct k_thread *k, const struct k_dispatch_args *a,
                                 struct k_mover *m, const struct send_shape *s,
                                 const struct send_list *l, const struct walk *in) {
    k_mover_retire(k, m, newest_stores(a->stages));
    if (in->piece < s->row_pieces) {
        const k_i64 t = listed(l, in->item)->token;
        const k_u64 from = (k_u64)(in->piece * a->stage_bytes);
        k_mover_load(k, m, in->stage, (const void *)(a->x.data + (k_u64)(t * a->x.s0) + from),
                     in->piece == s->row_pieces - 1 ? s->row_end : a->stage_bytes);
    }
}

/* The same piece to every destination of the token, one for each lane. `place` is kept from the
 * token's first piece to its last. */
static K_INLINE void end_piece(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, const struct send_shape *s,
                               const struct send_list *l, const struct walk *out,
                               struct place *place, const struct token_ahead *next) {
    const struct send_token *t = listed(l, out->item);
    const k_bool row = out->piece < s->row_pieces, side = out->piece >= s->side_piece;
    const k_i32 row_from = out->piece * a->stage_bytes;
    const k_i32 side_from = (out->piece - s->side_piece) * a->stage_bytes;
    if (out->piece == 0) {
        *place = place_at(a, l, next->rank, next->slot);
    }
    if (side) {
        fill_side(k, a, m, s, t->token, out->piece - s->side_piece, out->stage, next);
        k_mover_filled(k, m);
    }
    if (row) {
        k_mover_wait(k, m, out->stage);
    }
    struct place p = *place;
    k_i32 base = 0;
    K_ROLLED
    do {
        if (row) {
            k_mover_store(k, m, out->stage, own_memory(p.row ? p.row + (k_u64)row_from : 0),
                          out->piece == s->row_pieces - 1 ? s->row_end : a->stage_bytes);
        }
        if (side) {
            k_mover_store_filled(k, m, out->stage, s->side_at,
                                 own_memory(p.side ? p.side + (k_u64)side_from : 0),
                                 at_most(s->side_bytes - side_from, a->stage_bytes));
        }
        base += K_LANES;
        if (base < t->dests) { /* more than lanes */
            struct token_ahead far;
            read_dest(k, a, t, base + k->lane, &far);
            p = place_at(a, l, far.rank, far.slot);
        }
    } while (base < t->dests);
    k_mover_commit(k, m);
}

/* The rows of channel c have arrived at the destinations served: all before its end, counted from
 * the source's first. */
static K_INLINE void publish_channel(struct k_thread *k, const struct k_dispatch_args *a,
                                     k_i32 whom, k_i32 c) {
    const struct k_group *g = &a->g;
    K_ROLLED
    for (k_i32 i = k->lane; i < g->num_ranks; i += K_LANES) {
        const k_i32 next = g->rank + 1 + i,
                    d = next < g->num_ranks ? next : next - g->num_ranks;
        const k_u32 *chan = a->h.send_chan + (k_i64)d * (g->num_channels + 1) + c;
        const k_u32 rows = serves(a, whom, d) ? chan[1] : 0;
        if (rows && rows != chan[0]) {
            k_publish(k_peer_at(g, d, channel_word(g, g->map.progress, g->rank, c)),
                      K_WORD(k->epoch, rows));
        }
    }
}

/* All channels of a warp in one walk: rows and sidecars are read once and stored to all their
 * destinations; each channel is published when its stores are complete. */
static K_FN void send_channels(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, k_i32 whom, k_i32 first, k_i32 stride) {
    const struct send_shape s = shape_of(a);
    struct send_list l = begin_list(k, a, whom, first, stride);
    struct walk in = begin_walk(k, m, 0), out = in; /* over listed tokens */
    struct pending p = {-1, 0};
    struct place place = {0, 0};
    struct token_ahead next = begin_ahead(k, a, &s);
    k_i32 ahead = 0;
    for (;;) {
        k_i32 ended = -1;
        list_beyond(k, a, &l, in.item); /* then what is compared with l.num below is true */
        if (out.item == l.num && p.unit < 0) {
            return;
        }
        read_ahead(k, a, &s, &l, &out, &next);
        if (in.item < l.num) {
            begin_piece(k, a, m, &s, &l, &in);
            walk_on(&in, s.pieces, a->stages);
            ahead++;
        }
        if (out.item < l.num && (ahead == most_ahead(a->stages) || in.item == l.num)) {
            end_piece(k, a, m, &s, &l, &out, &place, &next);
            const k_i32 c = listed(&l, out.item)->channel;
            walk_on(&out, s.pieces, a->stages);
            if (out.piece == 0 && (out.item == l.num || listed(&l, out.item)->channel != c)) {
                ended = c;
            }
            p.newer++;
            ahead--;
        }
        if (pending_is_due(&p, ended >= 0 || out.item == l.num)) {
            k_mover_settle(k, m, p.newer);
            publish_channel(k, a, whom, p.unit);
            p.unit = -1;
        }
        if (ended >= 0) {
            p.unit = ended;
            p.newer = 0;
        }
    }
}

/* One warp: what this operation sends, for ep_group_stats. */
static K_FN void count_sent(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    for (k_i32 d = k->lane; d < g->num_ranks; d += K_LANES) {
        const k_u32 rows = a->h.send_chan[(k_i64)d * (g->num_channels + 1) + g->num_channels];
        k_tally(d == g->rank ? &g->ctl->local_bytes : &g->ctl->remote_bytes,
                (k_u64)rows * (k_u64)a->row_bytes);
        k_tally(&g->ctl->rows_sent, rows);
    }
}

/* ---- receive -------------------------------------------------------------------------------- */

static K_INLINE void write_i32(const struct k_array *to, k_i64 i, k_i32 v) {
    if (to->data) {
        *(k_i32 *)(to->data + (k_u64)(i * to->s0)) = v;
    }
}

/* What a warp tells the others of its block. */
static K_INLINE k_u32 *warp_word(struct k_thread *k, k_i32 warp) {
    return (k_u32 *)((k_u8 *)k_shared(k) + (k_u64)warp * (k_u64)k->g->scratch_bytes);
}

/* All warps of a block: k_scan over all their lanes. The caller's next barrier ends the use of the
 * words. */
static K_FN k_u32 scan_block(struct k_thread *k, k_u32 x, k_u32 *total) {
    k_u32 sum = 0, lower = 0;
    const k_u32 before = k_scan(k, x, &sum);
    if (k->lane == 0) {
        *warp_word(k, k->warp) = sum;
    }
    k_barrier(k, 1);
    sum = 0;
    for (k_i32 w = k->lane; w < k->num_warps; w += K_LANES) {
        const k_u32 n = *warp_word(k, w);
        sum += n;
        lower += w < k->warp ? n : 0;
    }
    k_scan(k, lower, &lower);
    k_scan(k, sum, total);
    return lower + before;
}

static K_INLINE k_u32 aligned(const struct k_dispatch_args *a, k_u32 rows) {
    const k_u32 align = (k_u32)a->alignment;
    return (rows + align - 1) / align * align;
}

/* Block 0: rows per expert, where experts start in expanded output, and the small outputs. Each
 * lane takes a run of experts, of one if there are lanes enough. */
static K_FN k_bool prepare(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_handle *h = &a->h;
    const k_i32 num_local = a->g.num_local, ranks = a->g.num_ranks;
    const k_i32 me = k->warp * K_LANES + k->lane, all = k->num_warps * K_LANES;
    const k_i32 run = (num_local + all - 1) / all;
    const k_i32 first = at_most(me * run, num_local), end = at_most(first + run, num_local);
    k_u32 space = 0, total = 0;
    K_ROLLED for (k_i32 e = first; e < end; e++) {
        k_u32 rows = 0;
        for (k_i32 s = 0; s < ranks; s++) {
            rows += h->recv_expert[(k_i64)s * num_local + e];
        }
        h->expert_rows[e] = rows;
        write_i32(&a->expert_counts, e, (k_i32)rows);
        space += aligned(a, rows);
    }
    k_u32 start = scan_block(k, space, &total);
    K_ROLLED for (k_i32 e = first; e < end; e++) {
        k_u32 at = start;
        h->expert_start[e] = start;
        write_i32(&a->expert_offsets, e, (k_i32)start);
        for (k_i32 s = 0; s < ranks; s++) {
            h->expert_base[(k_i64)s * num_local + e] = at;
            at += h->recv_expert[(k_i64)s * num_local + e];
        }
        start += aligned(a, at - start);
    }
    if (me == 0) {
        const k_u32 rows = (a->flags & K_DO_EXPAND) ? total : h->recv_base[ranks];
        h->expert_start[num_local] = total;
        write_i32(&a->expert_offsets, num_local, (k_i32)total);
        write_i32(&a->num_rows, 0, (k_i32)rows);
        if (rows > a->capacity || (a->recv_x.data && rows > a->x_rows)) {
            h->notice->over = rows;
            k_ends(k, K_END_SHORT);
        }
    }
    k_syncwarp(k);
    k_bool ok = k_barrier(k, 1);
    if (me == 0) {
        k_poke(&a->g.ctl->taken[0], 0);
        k_publish_local(&a->g.ctl->go_recv, K_WORD(k->epoch, GO));
        k_tally(&a->g.ctl->rows_received, h->recv_base[ranks]);
    }
    return ok;
}

static K_INLINE k_u32 *side_of(const struct k_dispatch_args *a, k_u32 row) {
    return (k_u32 *)k_own(&a->g, a->g.map.side + (k_u64)a->slot * a->g.map.side_slot_bytes +
                                     (k_u64)row * (k_u64)a->g.side_stride);
}

static K_INLINE const k_u8 *row_of(const struct k_dispatch_args *a, k_u32 row) {
    return k_own(&a->g, a->g.map.recv + (k_u64)a->slot * a->g.map.recv_slot_bytes +
                            (k_u64)row * (k_u64)a->row_bytes);
}

/* Index among this rank's experts of selection j of a received row; -1: another rank's. */
static K_INLINE k_i32 local_expert(const struct k_dispatch_args *a, const k_u32 *side,
                                   k_i32 j) {
    const k_i32 id = (k_i32)side[1 + j], at = id >= 0 ? id : 0;
    const k_i32 rank = a->g.expert_rank[at], local = a->g.expert_local[at]; /* both at once */
    return id >= 0 && rank == a->g.rank ? local : -1;
}

/* Expanded row of selection j of a received row of source s, or -1. */
static K_INLINE k_i32 expanded_row(const struct k_dispatch_args *a, k_i32 s, const k_u32 *side,
                                   k_i32 j) {
    const k_i32 e = local_expert(a, side, j);
    return e < 0 ? -1
                 : (k_i32)(a->h.expert_base[(k_i64)s * a->g.num_local + e] +
                           side[1 + a->topk + j]);
}

/* Scale j of a row, from its sidecar to output row `to`. */
static K_INLINE void unpack_scale(const struct k_dispatch_args *a, const k_u32 *side, k_i64 to,
                                  k_i32 j) {
    const k_u8 *from = (const k_u8 *)(side + side_scales_word(a));
    const k_u64 at =
        a->recv_scales.data + (k_u64)(to * a->recv_scales.s0 + (k_i64)j * a->recv_scales.s1);
    if (a->scale_bytes == 4) {
        *(k_u32 *)at = ((const k_u32 *)from)[j];
    } else if (a->scale_bytes == 2) {
        *(k_u16 *)at = ((const k_u16 *)from)[j];
    } else {
        *(k_u8 *)at = from[j];
    }
}

static K_INLINE void write_source(const struct k_dispatch_args *a, k_i64 row, k_i32 rank,
                                  k_i32 token) {
    if (a->recv_source.data) {
        k_i32 *at = (k_i32 *)(a->recv_source.data + (k_u64)(row * a->recv_source.s0));
        at[0] = rank;
        at[1] = token;
    }
}

static K_INLINE void write_id(const struct k_dispatch_args *a, k_i64 row, k_i32 j, k_i32 id) {
    k_u64 at = a->recv_ids.data + (k_u64)(row * a->recv_ids.s0 + (k_i64)j * a->recv_ids.s1);
    if (a->id_bytes == 8) {
        *(k_i64 *)at = id;
    } else {
        *(k_i32 *)at = id;
    }
}

static K_INLINE k_f32 *weight_at(const struct k_dispatch_args *a, k_i64 row, k_i32 j) {
    return (k_f32 *)(a->recv_weights.data +
                     (k_u64)(row * a->recv_weights.s0 + (k_i64)j * a->recv_weights.s1));
}

/* Which work receiving warps take, and how. Constant during an operation. */
struct intake {
    k_i32 channels, parts, wide; /* a channel's rows are taken in so many parts; how many
                                    channels a source sends at once */
    k_i32 items;                 /* parts of channels of sources, of all */
    k_i32 most_rows;             /* of a batch */
    k_i32 pieces;                /* of a row; 0: rows stay where they are */
    k_bool staged;               /* a batch's sidecars fit a stage */
    k_bool direct;               /* this rank's own rows are copied out of x */
};

/* Rows of one source that are unpacked together. */
struct batch {
    k_i32 source, rows;
    k_u32 first;
};

/* What a warp has taken and not begun. */
struct feed {
    k_u32 row, end; /* rows ... */
    k_u32 base;     /* ... of a channel that begins here */
    k_i32 source, channel;
    k_i32 token; /* own rows: where to look for the next one's token, ... */
    k_u32 seen;  /* ... and the channel's own rows before that */
};

/* What a receiving warp notes in its scratch; written by lane 0. Behind it lie the places of the
 * batch that is stored ([rows][topk] expanded rows), and the tokens of the batch that is loaded
 * ([rows], this rank's own). */
struct notes {
    struct batch batch[2];
    struct feed feed;
};

_Static_assert(sizeof(struct notes) <= K_NOTE_BYTES, "notes");

static K_INLINE struct notes *warp_notes(struct k_thread *k) {
    return (struct notes *)warp_scratch(k);
}

static K_INLINE k_i32 *warp_places(struct k_thread *k) {
    return (k_i32 *)((k_u8 *)warp_scratch(k) + K_NOTE_BYTES);
}

static K_INLINE k_i32 *warp_tokens(struct k_thread *k, const struct k_dispatch_args *a,
                                   const struct intake *w) {
    return warp_places(k) + w->most_rows * a->topk;
}

static K_INLINE k_i32 at_least(k_i32 a, k_i32 b) {
    return a > b ? a : b;
}

/* A part is large enough that finding it costs little beside copying it, unless there would not be
 * one for each warp then. */
#define MOST_PARTS 4
#define INTAKE_BYTES 28672

static K_INLINE struct intake intake_of(const struct k_thread *k,
                                        const struct k_dispatch_args *a, k_bool direct) {
    const struct k_group *g = &a->g;
    const k_i32 room = (g->scratch_bytes - K_NOTE_BYTES) / 4;
    const k_i32 tokens = (a->tokens + g->num_channels - 1) / g->num_channels;
    const k_i32 bytes = a->recv_x.data ? at_most(a->row_bytes, 1 << 14) : 0;
    const k_i32 large = at_most(tokens, 1 << 16) * bytes / INTAKE_BYTES;
    const k_i32 few = 2 * k->num_blocks * k->num_warps / (g->num_ranks * g->num_channels);
    const k_i32 senders = a->send_blocks ? (k_i32)a->send_blocks : 1;
    struct intake w;
    w.channels = g->num_channels;
    w.parts =
        at_most(at_least(at_least(large, few), 1), at_most(MOST_PARTS, at_least(tokens, 1)));
    w.wide = at_most(senders * k->num_warps, w.channels);
    w.items = g->num_ranks * w.channels * w.parts;
    w.staged = g->side_stride <= a->stage_bytes;
    w.most_rows =
        at_most(room / (a->topk + 1), w.staged ? a->stage_bytes / g->side_stride : room);
    w.pieces = a->recv_x.data ? (a->row_bytes + a->stage_bytes - 1) / a->stage_bytes : 0;
    w.direct = direct;
    return w;
}

static K_INLINE k_bool is_direct(const struct k_dispatch_args *a, const struct intake *w,
                                 k_i32 source) {
    return w->direct && source == a->g.rank;
}

/*
 * Names item i: a part of a channel of a source. This rank's own rows come first, while the peers'
 * are on their way. Then the peers' as they arrive: a source has `wide` channels under way, so the
 * first parts of all of those, of all sources in turn, then the second parts.
 */
static K_INLINE void name_item(const struct k_dispatch_args *a, const struct intake *w, k_i32 i,
                               k_i32 *source, k_i32 *channel, k_i32 *part) {
    const k_i32 own = w->channels * w->parts, peers = a->g.num_ranks - 1;
    if (i < own) {
        *source = a->g.rank;
        *channel = i / w->parts;
        *part = i % w->parts;
        return;
    }
    const k_i32 at = (i - own) / peers, round = at / (w->wide * w->parts) * w->wide;
    const k_i32 width = at_most(w->wide, w->channels - round), in = at - round * w->parts;
    *source = (a->g.rank + 1 + (i - own) % peers) % a->g.num_ranks;
    *channel = round + in % width;
    *part = in / width;
}

/* Rows for this warp, of the next item that has any; false: all were taken. */
static K_INLINE k_bool take_rows(struct k_thread *k, const struct k_dispatch_args *a,
                                 const struct intake *w, struct feed *f) {
    const struct k_group *g = &a->g;
    while (f->row == f->end) {
        k_i32 source, channel, part;
        const k_i32 i = (k_i32)k_take(k, &g->ctl->taken[0]);
        if (i >= w->items) {
            return 0;
        }
        name_item(a, w, i, &source, &channel, &part);
        const k_u32 *chan = a->h.recv_chan + (k_i64)source * (g->num_channels + 1) + channel;
        const k_u32 rows = chan[1] - chan[0], base = a->h.recv_base[source] + chan[0];
        const k_u32 parts = (k_u32)w->parts;
        f->base = base;
        f->row = base + rows * (k_u32)part / parts;
        f->end = base + rows * (k_u32)(part + 1) / parts;
        f->source = source;
        f->channel = channel;
        f->token = channel_first(&a->channels, channel);
        f->seen = 0;
    }
    return 1;
}

/* Whether token t has this rank among its destinations. */
static K_INLINE k_bool stays(const struct k_dispatch_args *a, k_i32 t) {
    const k_i32 num = a->h.num_dests[t];
    for (k_i32 i = 0; i < num; i++) {
        if (a->h.dest_rank[(k_i64)t * a->g.max_dests + i] == a->g.rank) {
            return 1;
        }
    }
    return 0;
}

/* The tokens of the next `rows` own rows. */
static K_FN void find_tokens(struct k_thread *k, const struct k_dispatch_args *a,
                             struct feed *f, k_u32 rows, k_i32 *tokens) {
    const k_u32 first = f->row - f->base;
    for (;;) {
        const k_i32 t = f->token + k->lane;
        const k_bool is = t < a->tokens && stays(a, t);
        k_u32 total = 0;
        const k_u32 at = f->seen + k_scan(k, is, &total);
        if (is && at >= first && at < first + rows) {
            tokens[at - first] = t;
        }
        if (f->seen + total >= first + rows || f->token >= a->tokens) {
            return; /* these tokens may have rows of the next batch too */
        }
        f->seen += total;
        f->token += K_LANES;
    }
}

#define NEXT_READY 0
#define NEXT_LATER 1 /* there are rows, but they have not arrived */
#define NEXT_NONE 2
#define NEXT_FAILED 3

/* The next rows of the feed, once they have arrived. */
static K_FN k_i32 choose_batch(struct k_thread *k, const struct k_dispatch_args *a,
                               const struct intake *w, k_bool wait, struct feed *f,
                               struct batch *b) {
    const struct k_group *g = &a->g;
    if (!take_rows(k, a, w, f)) {
        return NEXT_NONE;
    }
    b->source = f->source;
    b->first = f->row;
    b->rows = at_most((k_i32)(f->end - f->row), w->most_rows);
    if (is_direct(a, w, f->source)) {
        find_tokens(k, a, f, (k_u32)b->rows, warp_tokens(k, a, w));
    } else {
        const k_u64 *word =
            (const k_u64 *)k_own(g, channel_word(g, g->map.progress, f->source, f->channel));
        const k_u32 least = f->row + (k_u32)b->rows - a->h.recv_base[f->source];
        if (wait && !k_await_rows(k, word, k->epoch, least, f->source, K_PHASE_ROWS)) {
            return NEXT_FAILED;
        }
        if (!wait && !k_arrived(k, word, k->epoch, least)) {
            return NEXT_LATER;
        }
    }
    f->row += (k_u32)b->rows;
    return NEXT_READY;
}

/* The next rows that have arrived, noted as number `set`; `wait`: until they have. */
static K_FN k_i32 next_batch(struct k_thread *k, const struct k_dispatch_args *a,
                             const struct intake *w, k_bool wait, k_i32 set) {
    struct notes *n = warp_notes(k);
    k_syncwarp(k); /* no lane needs what was noted of the batch before the last */
    struct feed f = n->feed;
    struct batch b = {0, 0, 0};
    const k_i32 next = choose_batch(k, a, w, wait, &f, &b);
    k_syncwarp(k);
    if (k->lane == 0) {
        n->feed = f;
        if (next == NEXT_READY) {
            n->batch[set] = b;
        }
    }
    k_syncwarp(k);
    return next;
}

/* Sidecars of a batch, side by side from `sides` on. Lanes take (row, selection) and (row, scale)
 * pairs, so that many rows are read at once. */
static K_FN void unpack_compact(struct k_thread *k, const struct k_dispatch_args *a,
                                const struct batch *b, const k_u32 *sides) {
    const k_i32 topk = a->topk, scales = a->num_scales, stride = a->g.side_stride / 4;
    const k_i64 first = b->first, room = a->capacity - first;
    const k_i32 rows = room < b->rows ? (room > 0 ? (k_i32)room : 0) : b->rows;
    for (k_i32 i = k->lane; a->recv_source.data && i < rows; i += K_LANES) {
        write_source(a, first + i, b->source, (k_i32)sides[i * stride]);
    }
    const k_bool selections = a->recv_ids.data || a->recv_weights.data;
    for (k_i32 i = k->lane; selections && i < rows * topk; i += K_LANES) {
        const k_i32 r = i / topk, j = i % topk;
        const k_u32 *side = sides + r * stride;
        const k_i32 local = local_expert(a, side, j);
        if (a->recv_ids.data) {
            write_id(a, first + r, j, local);
        }
        if (a->recv_weights.data) {
            *weight_at(a, first + r, j) = local >= 0 ? k_float(side[1 + 2 * topk + j]) : 0.0f;
        }
    }
    for (k_i32 i = k->lane; a->recv_scales.data && i < rows * scales; i += K_LANES) {
        unpack_scale(a, sides + i / scales * stride, first + i / scales, i % scales);
    }
}

/* The same, and the batch's places. */
static K_FN void unpack_expanded(struct k_thread *k, const struct k_dispatch_args *a,
                                 const struct batch *b, const k_u32 *sides, k_i32 *places) {
    const k_i32 topk = a->topk, scales = a->num_scales, stride = a->g.side_stride / 4;
    for (k_i32 i = k->lane; i < b->rows * topk; i += K_LANES) {
        const k_i32 r = i / topk, j = i % topk;
        const k_u32 *side = sides + r * stride;
        const k_i32 to = expanded_row(a, b->source, side, j);
        places[i] = to;
        a->h.expand_row[(k_i64)b->first * topk + i] = to;
        if (to >= 0 && to < a->capacity) {
            write_source(a, to, b->source, (k_i32)side[0]);
            if (a->recv_weights.data) {
                *weight_at(a, to, 0) = k_float(side[1 + 2 * topk + j]);
            }
        }
    }
    k_syncwarp(k);
    for (k_i32 i = k->lane; a->recv_scales.data && i < b->rows * scales; i += K_LANES) {
        const k_i32 r = i / scales;
        for (k_i32 j = 0; j < topk; j++) {
            const k_i32 to = places[r * topk + j];
            if (to >= 0 && to < a->capacity) {
                unpack_scale(a, sides + r * stride, to, i % scales);
            }
        }
    }
}

/* Where a walk over batches is: at a piece of a row, or, in row -1, at the batch's sidecars. */
struct intake_walk {
    k_i32 set, row, rows, piece, stage;
};

static K_INLINE void walk_intake(struct intake_walk *at, const struct intake *w, k_i32 stages) {
    at->stage = at->stage + 1 == stages ? 0 : at->stage + 1;
    if (at->row < 0) {
        at->row = w->pieces ? 0 : at->rows;
    } else if (++at->piece == w->pieces) {
        at->piece = 0;
        at->row++;
    }
}

/* Sidecars of own rows, made where others' are read from: in the stage, or where they would lie. */
static K_INLINE void make_sides(struct k_thread *k, const struct k_dispatch_args *a,
                                struct k_mover *m, const struct intake *w,
                                const struct batch *b, k_i32 stage) {
    const struct send_shape shape = shape_of(a);
    const k_i32 *tokens = warp_tokens(k, a, w), stride = a->g.side_stride / 4;
    k_u32 *out = w->staged ? k_mover_fill(k, m, stage) : side_of(a, b->first);
    for (k_i32 i = k->lane; i < b->rows * shape.side_words; i += K_LANES) {
        const k_i32 r = i / shape.side_words, word = i % shape.side_words;
        out[r * stride + word] = side_word(a, &shape, tokens[r], word);
    }
    k_mover_filled(k, m);
}

/* The next sidecars or piece of a row into a stage. */
static K_INLINE void take_in(struct k_thread *k, const struct k_dispatch_args *a,
                             struct k_mover *m, const struct intake *w,
                             const struct intake_walk *in) {
    const struct batch *b = &warp_notes(k)->batch[in->set];
    const k_bool direct = is_direct(a, w, b->source);
    const k_i32 from = in->piece * a->stage_bytes;
    k_mover_retire(k, m, newest_stores(a->stages));
    if (in->row >= 0) {
        const k_u8 *row = row_of(a, b->first + (k_u32)in->row);
        if (direct) {
            const k_i64 t = warp_tokens(k, a, w)[in->row];
            row = (const k_u8 *)(a->x.data + (k_u64)(t * a->x.s0));
        }
        k_mover_load(k, m, in->stage, row + from, at_most(a->row_bytes - from, a->stage_bytes));
    } else if (direct) {
        make_sides(k, a, m, w, b, in->stage);
    } else if (w->staged) {
        k_mover_load(k, m, in->stage, side_of(a, b->first), b->rows * a->g.side_stride);
    }
}

/* Stores a piece of a received row to its one or several places in the output. */
static K_INLINE void store_out(struct k_thread *k, const struct k_dispatch_args *a,
                               struct k_mover *m, const struct intake_walk *out) {
    const k_i32 from = out->piece * a->stage_bytes;
    const k_i32 bytes = at_most(a->row_bytes - from, a->stage_bytes);
    if (a->flags & K_DO_EXPAND) {
        const k_i32 *places = warp_places(k) + out->row * a->topk;
        for (k_i32 base = 0; base < a->topk; base += K_LANES) {
            const k_i32 j = base + k->lane;
            const k_i64 to = j < a->topk ? places[j] : -1;
            k_u64 at = 0;
            if (to >= 0 && to < a->x_rows) {
                at = a->recv_x.data + (k_u64)(to * a->recv_x.s0) + (k_u64)from;
            }
            k_mover_store(k, m, out->stage, own_memory(at), bytes);
        }
    } else {
        const k_i64 to = (k_i64)warp_notes(k)->batch[out->set].first + out->row;
        if (to < a->x_rows) {
            k_mover_store(
                k, m, out->stage,
                one_lane(k, a->recv_x.data + (k_u64)(to * a->recv_x.s0) + (k_u64)from), bytes);
        }
    }
}

/* What has been taken in goes to the output. */
static K_INLINE void give_out(struct k_thread *k, const struct k_dispatch_args *a,
                              struct k_mover *m, const struct intake *w,
                              const struct intake_walk *out) {
    if (out->row >= 0) {
        k_mover_wait(k, m, out->stage);
        store_out(k, a, m, out);
    } else {
        const struct batch *b = &warp_notes(k)->batch[out->set];
        const k_u32 *sides = side_of(a, b->first);
        if (w->staged && is_direct(a, w, b->source)) {
            sides = k_mover_fill(k, m, out->stage);
        } else if (w->staged) {
            k_mover_wait(k, m, out->stage);
            sides = (const k_u32 *)k_mover_view(m, out->stage);
        }
        k_syncwarp(k); /* all lanes have used the places of the batch before */
        if (a->flags & K_DO_EXPAND) {
            unpack_expanded(k, a, b, sides, warp_places(k));
        } else {
            unpack_compact(k, a, b, sides);
        }
    }
    k_mover_commit(k, m); /* of nothing, after sidecars: retire counts pieces */
}

/*
 * One walk over all that this warp takes, so that the next batch is on its way before the last is
 * stored. `in` is at most a batch ahead of `out`.
 */
static K_FN k_bool receive_rows(struct k_thread *k, const struct k_dispatch_args *a,
                                struct k_mover *m, const struct intake *w) {
    struct intake_walk in = {0, 0, 0, 0, 0}, out = in;
    k_i32 next = NEXT_READY, ahead = 0;
    k_syncwarp(k); /* the scratch was used for sending */
    if (k->lane == 0) {
        warp_notes(k)->feed.row = warp_notes(k)->feed.end = 0;
    }
    k_mover_retire(k, m, 0);
    while (next != NEXT_NONE || ahead > 0) {
        if (in.row == in.rows && next != NEXT_NONE && (ahead == 0 || in.set == out.set)) {
            next = next_batch(k, a, w, ahead == 0, 1 - in.set);
            if (next == NEXT_FAILED) {
                return 0;
            }
            if (next == NEXT_READY) {
                in.set = 1 - in.set;
                in.row = -1;
                in.rows = warp_notes(k)->batch[in.set].rows;
                out = ahead == 0 ? in : out;
            }
        }
        if (in.row < in.rows && ahead < most_ahead(a->stages)) {
            take_in(k, a, m, w, &in);
            walk_intake(&in, w, a->stages);
            ahead++;
        } else if (ahead > 0) {
            give_out(k, a, m, w, &out);
            walk_intake(&out, w, a->stages);
            ahead--;
            if (out.row == out.rows && out.set != in.set) {
                out.set = in.set;
                out.row = -1;
                out.rows = in.rows;
            }
        }
    }
    return 1;
}

/* Output rows that nothing arrived for: ids and sources -1, weights 0, gaps zero if asked. */
static K_FN void fill_row(struct k_thread *k, const struct k_dispatch_args *a, k_i64 row) {
    if (k->lane == 0) {
        write_source(a, row, -1, -1);
    }
    for (k_i32 j = k->lane; a->recv_ids.data && j < a->topk; j += K_LANES) {
        write_id(a, row, j, -1);
    }
    const k_i32 weights = (a->flags & K_DO_EXPAND) ? 1 : a->topk;
    for (k_i32 j = k->lane; a->recv_weights.data && j < weights; j += K_LANES) {
        *weight_at(a, row, j) = 0.0f;
    }
}

static K_FN void fill_gaps(struct k_thread *k, const struct k_dispatch_args *a, k_i32 warp,
                           k_i32 warps) {
    const struct k_handle *h = &a->h;
    for (k_i32 e = warp; e < a->g.num_local; e += warps) {
        for (k_i64 r = h->expert_start[e] + h->expert_rows[e]; r < h->expert_start[e + 1];
             r++) {
            if (r < a->capacity) {
                fill_row(k, a, r);
            }
            if ((a->flags & K_DO_ZERO_GAPS) && a->recv_x.data && r < a->x_rows) {
                k_zero(k, (void *)(a->recv_x.data + (k_u64)(r * a->recv_x.s0)), a->row_bytes);
            }
        }
    }
}

/* Fills what nothing arrives for; `warp` of `warps` that have nothing better to do at first. */
static K_FN void fill_rest(struct k_thread *k, const struct k_dispatch_args *a, k_i32 warp,
                           k_i32 warps) {
    k_i64 end = a->h.recv_base[a->g.num_ranks];
    if (a->flags & K_DO_EXPAND) {
        end = a->h.expert_start[a->g.num_local];
        fill_gaps(k, a, warp, warps);
    }
    const k_bool fills = a->recv_source.data || a->recv_ids.data || a->recv_weights.data;
    for (k_i64 r = end + warp; fills && r < a->capacity; r += warps) {
        fill_row(k, a, r);
    }
}

/* One warp, after a failure: counts and offsets 0, ids and sources -1, so that kernels behind
 * this one stay in bounds. */
static K_FN void clear_outputs(struct k_thread *k, const struct k_dispatch_args *a) {
    for (k_i32 e = k->lane; e <= a->g.num_local; e += K_LANES) {
        if (e < a->g.num_local) {
            write_i32(&a->expert_counts, e, 0);
        }
        write_i32(&a->expert_offsets, e, 0);
    }
    if (k->lane == 0) {
        write_i32(&a->num_rows, 0, 0);
    }
    const k_bool fills = a->recv_source.data || a->recv_ids.data || a->recv_weights.data;
    for (k_i64 r = 0; fills && r < a->capacity; r++) {
        fill_row(k, a, r);
    }
}

/* The blocks from first_block on receive from the beginning. */
static K_FN k_bool receive(struct k_thread *k, const struct k_dispatch_args *a,
                           struct k_mover *m, k_i32 first_block, k_bool direct) {
    const struct k_group *g = &a->g;
    k_u32 go = 0;
    if (!k_await(k, &g->ctl->go_recv, k->epoch, g->rank, K_PHASE_SELF, &go)) {
        return 0;
    }
    if (k->block >= first_block) {
        fill_rest(k, a, k_first(k, first_block), k_stride(k, k->num_blocks - first_block));
    }
    const struct intake w = intake_of(k, a, direct);
    return receive_rows(k, a, m, &w);
}

/* ---- entry ---------------------------------------------------------------------------------- */

/* False after a fault. */
static K_FN k_bool run(struct k_thread *k, const struct k_dispatch_args *a) {
    const struct k_group *g = &a->g;
    const k_bool sends = (a->flags & K_DO_SEND) != 0, receives = (a->flags & K_DO_RECV) != 0;
    /* Which blocks do what: with both parts the first send_blocks send, unless there is one. */
    const k_bool both = sends && receives && k->num_blocks > 1;
    const k_i32 senders = both ? (k_i32)a->send_blocks : k->num_blocks;
    const k_i32 first_recv = both ? senders : 0;
    /* Own rows that are copied out need not be sent. */
    const k_bool direct = sends && receives && a->recv_x.data != 0;
    k_u32 go = 0;
    if (k->block == 0 && sends && !control(k, a)) {
        return 0;
    }
    k_bool ok = k_await(k, &g->ctl->go, k->epoch, g->rank, K_PHASE_SELF, &go);
    if (k->block == 0) {
        ok = k_barrier(k, ok); /* its warps go on to `prepare` together, or not at all */
    }
    if (!ok) {
        return 0;
    }
    if (go == SKIP) {
        k_ends(k, K_END_SKIP);
        return 1;
    }
    if (k->block == 0 && receives && !prepare(k, a)) {
        return 0;
    }
    struct k_mover m;
    k_mover_begin(k, &m, warp_ring(k, a->stages, a->stage_bytes), a->stages, a->stage_bytes);
    if (sends && (k->block < senders || !direct)) { /* one place, as the code is large */
        const k_bool away = k->block < senders;
        const k_i32 from = away ? 0 : first_recv;
        send_channels(k, a, &m,
                      direct || (both && away) ? TO_PEERS
                      : both                   ? TO_SELF
                                               : TO_ALL,
                      k_first(k, from),
                      k_stride(k, away ? senders : k->num_blocks - first_recv));
    }
    if (sends && k_first(k, 0) == 0) {
        count_sent(k, a);
    }
    if (receives) {
        ok = receive(k, a, &m, first_recv, direct);
    }
    k_mover_end(k, &m);
    return ok;
}

K_KERNEL(dispatch, k_dispatch_args) {
    const k_bool receives = (a->flags & K_DO_RECV) != 0;
    k_enter(k, &a->g, K_OP_DISPATCH);
    if (a->flags & K_DO_NOTHING) {
        if (k->block == 0 && k->warp == 0) {
            clear_outputs(k, a);
        }
        return;
    }
    if (!run(k, a)) {
        k_ends(k, K_END_FAULT);
    }
    if (k_last_out(k, receives)) {
        const k_u32 ending = k_ending(k);
        if (ending && receives) {
            clear_outputs(k, a);
        }
        k_leave(k, receives || ending == K_END_SKIP); /* else another kernel receives */
    }
}
