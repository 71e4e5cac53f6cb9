/* SPDX-License-Identifier: MIT */
/*
 * The kernel language: every word a .k.c file may use. One source, two worlds: as C11 a *warp* is
 * one host thread with one lane, under NVRTC and nvcc it is 32 CUDA lanes. lang_host.h and
 * lang_cuda*.h hold the bodies and are the only places with atomics, fences or assembly.
 *
 * Who am I      k->block, k->num_blocks, k->warp, k->num_warps, k->lane, K_LANES
 *               k_first(k), k_stride(k)  this warp's number in the grid and the number of warps
 * Entry         K_KERNEL(space, name, args) { body with k and a }
 * Shared memory k_shared(k), k_shared_bytes(k)   the block's, and how much it is on a GPU; else 0
 *               k_tally(p)               adds 1 to a sum there, which is read behind a barrier
 * Hand-offs     k_post(peer, w)          a word that carries its own value: no ordering
 *               k_publish(peer, w)       all this warp did before (after k_syncwarp) is visible to
 *                                        whoever awaits the word; one lane calls
 *               k_publish_four(peer, w0, w1, w2, w3)  the same with four words side by side
 *               k_publish_local(p, w)    the same within this rank
 *               k_await(k, p, e, ...)    all lanes call: wait until word *p (own memory; NULL:
 *                                        nothing) has epoch e; then what was published is visible
 *               k_await_word             the same for posted words, which order nothing
 *               k_await_rows(k, p, e, n, ...)  k_await, until the value is n at least
 *               k_arrived(k, p, e, n)    the same as a question: true if it need not wait
 *               k_all(k, ok)             the AND over a warp's lanes
 *               k_await_words, k_await_most   several posted words at once
 *               k_scan(k, x, &total)     sum of x over the lanes before this one, and over all
 *               k_most(k, x)             the largest x of a warp's lanes
 *               k_sum(k, x)              the sum of x over a warp's lanes
 *               k_from(k, x, lane)       the x of another lane
 *               k_ballot(k, yes)         the mask of the lanes that say yes
 *               k_same(k, x)             the mask of the lanes whose x is this lane's
 *               k_below(k), k_count(m)   the mask of lower lanes; how many lanes a mask has
 *               k_lowest(m)              the number of the lowest bit of 64 that is set
 *               k_syncwarp(k)            lanes of a warp; orders their memory
 *               k_barrier(k, ok)         warps of a block; the AND of all ok
 * Rows          k_mover_*                a pipeline of row copies: load, wait, store (each lane
 *                                        to a place of its own, or to address 0: nowhere),
 *                                        commit, retire (a stage can be used again), settle (a
 *                                        store can be published), end; or fill, filled and
 *                                        store_filled, for what the lanes write themselves; or
 *                                        view and filled, for what they read themselves once it
 *                                        was waited for; or gather and sum: a part of several
 *                                        rows, then k_reduce of it. K_IN_PLACE: nothing is copied
 *                                        into stages, so that a part may be a whole row
 *               k_reduce(k, ...)         sum of rows in float32 in the order given, rounded once
 *               k_zero(k, ...)           fills own memory
 *               k_load16(p), k_store16_to(peer, v)   16 bytes, at once; nowhere is allowed
 *               k_post16(peer, v)        16 bytes whose last word is a tag: they come whole
 *               k_take16(p, tag, &v)     reads them; false: their tag is another, and v is nothing
 * 8-bit floats  K_CASTERS, K_CAST_CHANNELS   lanes that cast a group together; channels of each
 *               k_group_most(k, x, n)    the largest x of n lanes that are side by side
 *               k_to_e4m3_pair(x, y)     two side by side: nearest even, saturating; NaN is 0x7f
 * Own words     k_load(p), k_store(p, w)  a word of this rank's, whole; they order nothing
 *               k_fetch_add(p, v)        adds, returns the old value, orders like release and acquire
 *               k_add(p, v)              adds to a sum that nobody waits for; orders nothing
 *               k_raise_to(p, v)         *p becomes v if that is more; orders nothing
 *               k_raise_old(p, v)        the same; returns the old value, and is a full fence
 *               k_take_next(k, p)        the warp takes the next number of a counter
 *               k_add_last(p, v)         adds, after all that this lane has done
 * Numbers       k_min(a, b), k_max(a, b)
 * Code          K_UNROLL, K_ROLLED       before a loop: its values are to stay in registers; it is
 *                                        short, and code must stay in its cache
 * Time          k_now(k), k_spin(k, ...) deadline and abort are inside
 * Arrays        k_at(array, row, column), k_row(array, row)   where that lies, of the caller's
 * Places        k_peer_at(g, rank, offset)  a byte of a rank's arena
 *               k_peer_plus(p, bytes)    further on
 *               k_pair_*                 two places at one rank: set, move on, and a part of one
 *               k_peer_own(address)      this rank's memory, to store to
 *               k_peer_for_lane0(k, p)   p for lane 0, nowhere for the others
 *               k_is_nowhere(p)          whether it is no place
 *               k_own(g, offset)         a byte of this rank's arena, to read
 *
 * Addresses: a pointer is this rank's own memory; a struct k_peer is memory of some rank's arena
 * (perhaps this one's), reached through its mapping, and stays a k_peer on its way to the store.
 * Scope of a hand-off follows from that type.
 * Waits happen only in k_await, k_spin and k_barrier.
 */
#ifndef KERNEL_LANG_H
#define KERNEL_LANG_H

#include "kernel/abi.h"

struct k_peer {
    k_u64 address;
};

/* Of low-latency mode in a group with masks, what a warp knows; mask.h. */
struct k_mask_thread {
    const struct k_ll *ll; /* NULL: no masks */
    k_u64 kernel;          /* its number */
    k_i32 is_gone;    /* of a lane: a wait since this was set to 0 has ended without its peer */
    k_i32 gave_up;    /* the same since the kernel began */
    k_i32 is_mending; /* the others have left: masks of this kernel count, too */
};

#if defined(__CUDACC__)
#include "kernel/lang_cuda.h"
#else
#include "kernel/lang_host.h"
#endif

static K_INLINE k_i32 k_min(k_i32 a, k_i32 b) {
    return a < b ? a : b;
}

static K_INLINE k_i32 k_max(k_i32 a, k_i32 b) {
    return a > b ? a : b;
}

/* Where element (row, column) of an array of the caller's lies. */
static K_INLINE k_u64 k_at(const struct k_array *p, k_i64 row, k_i64 col) {
    return p->data + (k_u64)(row * p->s0 + col * p->s1);
}

static K_INLINE k_u64 k_row(const struct k_array *p, k_i64 row) {
    return p->data + (k_u64)(row * p->s0);
}

/* Byte `offset` of rank `rank`'s arena. */
static K_INLINE struct k_peer k_peer_at(const struct k_group *g, k_i32 rank, k_u64 offset) {
    struct k_peer p;
    p.address = g->peer[rank] + offset;
    return p;
}

static K_INLINE struct k_peer k_peer_plus(struct k_peer p, k_u64 bytes) {
    p.address += bytes;
    return p;
}

/* This rank's own memory as a place to store to, also outside of its arena; 0 is nowhere. */
static K_INLINE struct k_peer k_peer_own(k_u64 address) {
    struct k_peer p;
    p.address = address;
    return p;
}

/* A place for lane 0 only; the other lanes store nowhere. */
static K_INLINE struct k_peer k_peer_for_lane0(const struct k_thread *k, struct k_peer p) {
    p.address = k->lane == 0 ? p.address : 0;
    return p;
}

static K_INLINE k_bool k_is_nowhere(struct k_peer p) {
    return p.address == 0;
}

/* Byte `offset` of this rank's own arena, as memory to read. */
static K_INLINE k_u8 *k_own(const struct k_group *g, k_u64 offset) {
    return (k_u8 *)(g->peer[g->rank] + offset);
}

/*
 * Two places at one rank, each of which may be nowhere: of a row, and of what goes with it. One
 * type of two addresses, whose words take it by its own address: two k_peer in a struct, and words
 * that return it, are other machine code.
 */
struct k_pair {
    k_u64 first, second;
};

static K_INLINE void k_pair_set_first(struct k_pair *p, struct k_peer at) {
    p->first = at.address;
}

static K_INLINE void k_pair_set_second(struct k_pair *p, struct k_peer at) {
    p->second = at.address;
}

static K_INLINE void k_pair_move_first(struct k_pair *p, k_u64 bytes) {
    p->first += bytes;
}

static K_INLINE void k_pair_move_second(struct k_pair *p, k_u64 bytes) {
    p->second += bytes;
}

/* The first place from byte `from` on, of nowhere: nowhere. */
static K_INLINE struct k_peer k_pair_first(const struct k_pair *p, k_u64 from) {
    struct k_peer at = {p->first ? p->first + from : 0};
    return at;
}

static K_INLINE struct k_peer k_pair_second(const struct k_pair *p, k_u64 from) {
    struct k_peer at = {p->second ? p->second + from : 0};
    return at;
}

static K_INLINE k_i32 k_first(const struct k_thread *k, k_i32 first_block) {
    return (k->block - first_block) * k->num_warps + k->warp;
}

static K_INLINE k_i32 k_stride(const struct k_thread *k, k_i32 num_blocks) {
    return num_blocks * k->num_warps;
}

static K_INLINE struct k_board *k_board_of(const struct k_group *g, k_i32 rank) {
    return (struct k_board *)g->board[rank];
}

/* Whether this rank reaches the board of another: its host tells those of other nodes. */
#if defined(__CUDACC__) && !defined(K_NODES)
#define K_REACHES(g, rank) 1
#else
#define K_REACHES(g, rank) ((g)->board[rank] != 0)
#endif

/* A wait has become long: left on the board for the host to see and to log. */
static K_COLD void k_tell_late(const struct k_group *g, k_i32 kind, k_u64 word,
                               k_i64 waited_ns) {
    struct k_board *board = k_board_of(g, g->rank);
    k_store((k_u64 *)&board->waited_ns, (k_u64)waited_ns);
    k_store((k_u64 *)&board->waiting_kind, (k_u64)kind);
    k_publish_local(&board->waiting, word);
}

#if defined(__CUDACC__)
#define K_LATE(k, word, waited_ns) k_tell_late((k)->g, (k)->kind, word, waited_ns)
#else
#define K_LATE(k, word, waited_ns)                                                             \
    ((k)->hooks ? (k)->hooks->late : k_tell_late)((k)->g, (k)->kind, word, waited_ns)
#endif

#include "kernel/mask.h"

/*
 * Whether nobody is left that could bring the rank that is waited for to the operation. It may be on
 * its way from one thread to another, so that is looked at when the wait, and this, have lasted.
 */
#define K_ORPHAN_NS 1000000000
static K_INLINE k_bool k_is_orphan(const struct k_thread *k, k_i32 peer, k_i64 waited) {
    if (!k->kind || waited < K_ORPHAN_NS || !K_REACHES(k->g, peer)) {
        return 0;
    }
    const struct k_board *there = k_board_of(k->g, peer);
    const k_i64 since = (k_i64)k_load(&there->orphan_since),
                ran = (k_i64)k_load(&there->ran_ns);
    return since != 0 && (ran ? ran : k_now()) - since > K_ORPHAN_NS;
}

/* What ends an operation: who is to blame in which phase; of a mismatch also the two values and
 * which ready word they are. */
struct k_blame {
    k_i32 status, phase, subject, word;
    k_u32 mine, theirs;
};

/* Writes an abort word to the other ranks' boards. All that kernels write there passes through
 * this: a rank has mapped those of its node. */
static K_INLINE void k_write_boards(const struct k_group *g, k_u64 code) {
    for (k_i32 p = 0; p < g->num_ranks; p++) {
        if (p != g->rank && K_REACHES(g, p)) {
            struct k_peer told = {(k_u64)&k_board_of(g, p)->told};
            k_publish(told, code);
        }
    }
}

/* Ends every wait of this rank and tells the peers. The first caller's account is kept. */
static K_COLD void k_raise_at(const struct k_group *g, k_i32 kind, k_u32 epoch, k_i64 waited_ns,
                              struct k_blame b) {
    struct k_board *board = k_board_of(g, g->rank);
    struct k_fault *f = &board->fault;
    if (!k_claim(&g->ctl->fault_claim)) {
        return;
    }
    f->status = b.status;
    f->subject = b.subject;
    f->reporter = g->rank;
    f->kind = kind;
    f->phase = b.phase;
    f->epoch = epoch;
    f->waited_ns = waited_ns;
    f->mine = b.mine;
    f->theirs = b.theirs;
    f->word = b.word;
    const k_u64 code = K_ABORT_PACK(b.status, g->rank, b.subject, kind, b.phase, epoch);
    if (k_load(&board->abort) == 0) { /* a death that the boot has told of says more */
        k_publish_local(&board->abort, code);
    }
    k_store(&g->ctl->abort, code);
    k_write_boards(g, code);
}

static K_INLINE void k_raise(struct k_thread *k, k_i64 waited_ns, struct k_blame b) {
    k_raise_at(k->g, k->kind, k->epoch, waited_ns, b);
}

/* How often a wait looks at the board. An operation that goes well is over before. */
#define K_LOOK_NS 1000000
#if defined(__CUDACC__)
#define K_SPINNER                                                                              \
    { 0, K_LOOK_NS, 0, 0, 0, 0 }
#else
#define K_SPINNER                                                                              \
    { 0, K_LOOK_NS, 0, 0, 0, 0, 0, 0 }
#endif

/*
 * A GPU goes on while its host is stopped, perhaps with all others: what counts of a wait is no more
 * than the time that the host says it has run, which it says every K_BEAT_NS at least.
 */
#define K_BEAT_NS 250000000
static K_INLINE k_i64 k_counted(struct k_spinner *s, k_i64 waited, k_u64 ran) {
    s->ran = s->ran ? s->ran : ran;
    const k_i64 most = (k_i64)(ran - s->ran) + K_BEAT_NS;
    if (ran == 0 || waited <= most) {
        return waited;
    }
    s->since += waited - most;
    return most;
}

/*
 * Whether abort word w, which a peer has told, ends a wait for `peer`. In low-latency mode every fault
 * does, as its numbers are not those of throughput operations; and that `peer` itself is in destroy,
 * as it has sent all that it ever will, or that an operation of this rank has ended for that, as it
 * does on the others, which go no further. With masks a peer is left out for being in destroy.
 */
static K_INLINE k_bool k_ends(const struct k_thread *k, k_u64 w, k_i32 peer) {
    if (k->kind < (k_i32)K_OP_LL_DISPATCH) {
        return K_ABORT_ENDS(w, k->epoch);
    }
    return w != 0 && (K_ABORT_STATUS(w) != 0 ||
                      (!k->mask.ll && (K_ABORT_SUBJECT(w) == peer ||
                                       k_load(&k_board_of(k->g, k->g->rank)->failed) != 0)));
}

/* Only in groups with masks; in others a death is an abort word. */
static K_INLINE k_bool k_has_gone(const struct k_thread *k, k_i32 peer) {
    const struct k_board *board = k_board_of(k->g, k->g->rank);
    return (k_load(&board->gone[peer / 64]) >> (peer % 64) & 1u) != 0;
}

/* One more turn of a wait for which masks hold: false when it ends without its peer. `looks`: it is time
 * to look at what is further away. */
static K_INLINE k_bool k_spin_masked(struct k_thread *k, struct k_spinner *s, k_i32 peer,
                                     k_i32 phase, k_i64 waited, k_bool looks) {
    struct k_mask_thread *m = &k->mask;
    /* This rank's own blocks have deadlines. */
    if (peer == k->g->rank || (!looks && k_load(&m->ll->peers[peer].mask) == 0)) {
        return 1;
    }
    K_HESITATE();
    const k_i32 what =
        k_mask_look(k->g, m->ll, m->kernel, k->kind, peer, phase, waited, s->again,
                    k_has_gone(k, peer) || k_is_orphan(k, peer, waited), s->sure);
    s->sure = what == K_MASK_LOOK_AGAIN;
    if (what == K_MASK_WAIT_AGAIN) {
        s->since = s->look = 0;
        s->ran = 0;
        s->again = 1;
    }
    if (what == K_MASK_LEAVE_OUT) {
        m->gave_up = m->is_gone = 1;
    }
    return what != K_MASK_LEAVE_OUT;
}

/* One more turn of a wait that began at s->since: false when it must end. Called by one lane. */
static K_FN k_bool k_spin(struct k_thread *k, struct k_spinner *s, k_i32 peer, k_i32 phase) {
    struct k_ctl *ctl = k->g->ctl;
    const k_bool due = k_pause(s); /* time is looked at every now and then only */
    /* And in low-latency mode on a GPU whatever is not awaited, as each read is a trip to memory. In
     * throughput mode that trip keeps hundreds of warps from asking all the time for the same words. */
    if ((due || K_LANES == 1 || k->kind < (k_i32)K_OP_LL_DISPATCH) &&
        k_load(&ctl->abort) != 0) {
        return 0;
    }
    if (!due) {
        return 1;
    }
    k_i64 waited =
        k_waited(s, k_now(), k->mask.ll ? k->mask.ll->ctl->timeout_ns : ctl->timeout_ns);
    /* The board is further away than the memory that is awaited. Who works alone (kind 0) goes on
     * when others have left. */
    const k_bool looks = k->kind && waited >= s->look;
    if (looks) {
        const struct k_board *board = k_board_of(k->g, k->g->rank);
        waited = k_counted(s, waited, k_load(&board->ran_ns));
        s->look = waited + K_LOOK_NS;
        if (k_load(&board->abort) != 0 || k_ends(k, k_load(&board->told), peer) ||
            (!k->mask.ll && k_has_gone(k, peer))) {
            return 0;
        }
    }
    /* A block that waits for another of its rank is not the one to say for whom. */
    if (waited > ctl->late_ns && phase != K_PHASE_SELF) {
        K_LATE(k, K_WORD(k->epoch, ((k_u32)phase << 16) | (k_u32)peer), waited);
    }
    if (k->mask.ll) {
        return k_spin_masked(k, s, peer, phase, waited, looks);
    }
    if (k_is_orphan(k, peer, waited)) {
        struct k_blame b = {K_ERR_PEER, phase, peer, 0, 0, 0};
        k_raise(k, waited, b);
        return 0;
    }
    if (waited > (phase == K_PHASE_SELF ? 2 : 1) * ctl->timeout_ns) {
        struct k_blame b = {K_ERR_TIMEOUT, phase, peer, 0, 0, 0};
        k_raise(k, waited, b);
        return 0;
    }
    return 1;
}

/*
 * A wait whose word had not come at the first look: until its tag is `epoch` or `or_epoch`. The word, or
 * one of another tag: the wait has ended without it. `acquires` is a constant where this is called.
 */
static K_INLINE k_u64 k_wait_on(struct k_thread *k, const k_u64 *word, k_u32 epoch,
                                k_u32 or_epoch, k_i32 peer, k_i32 phase, k_bool acquires) {
    struct k_spinner s = K_SPINNER;
    const struct k_mask_thread before = k->mask;
    const k_i64 start = k_now();
    k_bool ok, here;
    k_u64 w;
    do {
        ok = k_spin(k, &s, peer, phase);
        w = k_load(word);
        here = (k_u32)(w >> 32) == epoch || (k_u32)(w >> 32) == or_epoch;
    } while (ok && !here);
    if (here) {
        k->mask =
            before; /* a peer that was left out meanwhile, as it has left us out, had sent it */
    }
    if (acquires) {
        k_acquire(word); /* once: on a GPU it empties the SM's first cache */
    }
    if (k->lane == 0) {
        k_add(&k->g->ctl->wait_ns, (k_u64)(k_now() - start));
    }
    return w;
}

#if defined(K_WAITS_APART)
/* The same as a function of its own, once in a kernel: a kernel of few microseconds fetches its
 * instructions while it runs, and would fetch past this at every wait. */
static K_COLD k_u64 k_wait_apart(const struct k_group *g, const struct k_ll *masks,
                                 k_u64 kernel, k_i32 kind, k_u32 own_epoch, const k_u64 *word,
                                 k_u32 epoch, k_u32 or_epoch, k_i32 peer, k_i32 phase,
                                 k_i32 lane) {
    struct k_thread t;
    t.g = g;
    t.kind = kind;
    t.epoch = own_epoch;
    t.lane = lane;
    t.mask.ll = masks;
    t.mask.kernel = kernel;
    t.mask.is_gone = t.mask.gave_up = t.mask.is_mending = 0;
    const k_u64 w = k_wait_on(&t, word, epoch, or_epoch, peer, phase, 1);
    const k_bool here = (k_u32)(w >> 32) == epoch || (k_u32)(w >> 32) == or_epoch;
    return here ? w : (k_u64)t.mask.is_gone;
}
#endif

static K_INLINE k_u64 k_wait(struct k_thread *k, const k_u64 *word, k_u32 epoch, k_u32 or_epoch,
                             k_i32 peer, k_i32 phase, k_bool acquires) {
#if defined(K_WAITS_APART)
    const k_u64 w = k_wait_apart(k->g, k->mask.ll, k->mask.kernel, k->kind, k->epoch, word,
                                 epoch, or_epoch, peer, phase, k->lane);
    const k_i32 gone = w >> 32 ? 0 : (k_i32)w;
    (void)acquires; /* it always does */
    k->mask.is_gone |= gone;
    k->mask.gave_up |= gone;
    return w;
#else
    return k_wait_on(k, word, epoch, or_epoch, peer, phase, acquires);
#endif
}

/* k_await and k_await_word; `acquires` is a constant where this is called. */
static K_INLINE k_bool k_await_as(struct k_thread *k, const k_u64 *word, k_u32 epoch,
                                  k_u32 or_epoch, k_i32 peer, k_i32 phase, k_u32 *value,
                                  k_bool acquires) {
    k_bool ok = 1;
    if (word) {
        k_u64 w = acquires ? k_acquire(word) : k_load(word);
        if ((k_u32)(w >> 32) != epoch && (k_u32)(w >> 32) != or_epoch) {
            w = k_wait(k, word, epoch, or_epoch, peer, phase, acquires);
            ok = (k_u32)(w >> 32) == epoch || (k_u32)(w >> 32) == or_epoch || k->mask.is_gone;
        }
        *value = (k_u32)w;
    }
    return k_all(k, ok);
}

/*
 * Waits until *word (this rank's memory) carries `epoch`; its value goes to *value. All lanes of
 * the warp call, each with its own word or NULL; the result is the AND over the warp. `peer` and
 * `phase` name what is awaited if it never comes. For posted words, which are their own data:
 * nothing else becomes visible.
 */
static K_FN k_bool k_await_word(struct k_thread *k, const k_u64 *word, k_u32 epoch, k_i32 peer,
                                k_i32 phase, k_u32 *value) {
    return k_await_as(k, word, epoch, epoch, peer, phase, value, 0);
}

/* The same for published words: after true, everything that their writers did before is visible
 * to the whole warp, also to its row movers. */
static K_FN k_bool k_await(struct k_thread *k, const k_u64 *word, k_u32 epoch, k_i32 peer,
                           k_i32 phase, k_u32 *value) {
    const k_bool ok = k_await_as(k, word, epoch, epoch, peer, phase, value, 1);
    k_acquired(k);
    return ok;
}

/* k_await for a word that may be a step further already: of tag `epoch` or `or_epoch`. */
static K_FN k_bool k_await_either(struct k_thread *k, const k_u64 *word, k_u32 epoch,
                                  k_u32 or_epoch, k_i32 peer, k_i32 phase) {
    k_u32 value = 0;
    const k_bool ok = k_await_as(k, word, epoch, or_epoch, peer, phase, &value, 1);
    k_acquired(k);
    return ok;
}

/* Words that a lane has in flight at once, of a kernel that needs registers for more; at most. */
#define K_MANY 12
#define K_MOST_MANY 14

/*
 * k_await_word for `num` (0 to `most`, a constant where this is called) posted words of one peer, the first
 * at `at`, each `step` words behind the one before: all are asked for at once, then again those that have
 * not come.
 */
static K_INLINE k_bool k_await_most(struct k_thread *k, k_i32 most, const k_u64 *at, k_i64 step,
                                    k_i32 num, k_u32 epoch, k_i32 peer, k_i32 phase,
                                    k_u32 *value) {
    k_u64 w[K_MOST_MANY];
    k_bool ok = 1, all = 1;
    K_UNROLL for (k_i32 i = 0; i < most; i++) {
        w[i] = i < num ? k_load(at + i * step) : K_WORD(epoch, 0);
    }
    K_UNROLL for (k_i32 i = 0; i < most; i++) {
        all = all && (k_u32)(w[i] >> 32) == epoch;
    }
#if defined(K_WAITS_APART)
    K_UNROLL for (k_i32 i = 0; i < most; i++) {
        if (ok && (k_u32)(w[i] >> 32) != epoch) {
            w[i] = k_wait(k, at + i * step, epoch, epoch, peer, phase, 0);
            ok = (k_u32)(w[i] >> 32) == epoch || k->mask.is_gone;
        }
    }
#else
    if (!all) {
        struct k_spinner s = K_SPINNER;
        const struct k_mask_thread before = k->mask;
        const k_i64 start = k_now();
        do {
            ok = k_spin(k, &s, peer, phase);
            K_UNROLL for (k_i32 i = 0; i < most; i++) {
                if ((k_u32)(w[i] >> 32) != epoch) {
                    w[i] = k_load(at + i * step);
                }
            }
            all = 1;
            K_UNROLL for (k_i32 i = 0; i < most; i++) {
                all = all && (k_u32)(w[i] >> 32) == epoch;
            }
        } while (ok && !all);
        if (all) {
            k->mask = before; /* as in k_wait_on */
        }
        if (k->lane == 0) {
            k_add(&k->g->ctl->wait_ns, (k_u64)(k_now() - start));
        }
        ok = ok || all || k->mask.is_gone;
    }
#endif
    K_UNROLL for (k_i32 i = 0; i < most; i++) {
        value[i] = (k_u32)w[i];
    }
    return k_all(k, ok);
}

/* The same for up to K_MANY words. */
static K_FN k_bool k_await_words(struct k_thread *k, const k_u64 *at, k_i64 step, k_i32 num,
                                 k_u32 epoch, k_i32 peer, k_i32 phase, k_u32 *value) {
    return k_await_most(k, K_MANY, at, step, num, epoch, peer, phase, value);
}

/* The operation does not end well, for the reason K_END_...; said before k_is_last_out. */
static K_INLINE void k_fail_op(struct k_thread *k, k_u32 how) {
    if (k->lane == 0) {
        k_store(&k->g->ctl->how_ended, K_WORD(k->epoch, how));
    }
}

/* How it ended: 0 well, or K_END_...; known to the warp that was last out. */
static K_INLINE k_u32 k_how_ended(const struct k_thread *k) {
    const k_u64 w = k_load(&k->g->ctl->how_ended);
    return (k_u32)(w >> 32) == k->epoch ? (k_u32)w : 0u;
}

static K_INLINE k_bool k_is_here(k_u64 w, k_u32 epoch, k_u32 rows) {
    return (k_u32)(w >> 32) == epoch && (k_u32)w >= rows;
}

/* k_await for a word that counts: until its value is at least `rows`. */
static K_FN k_bool k_await_rows(struct k_thread *k, const k_u64 *word, k_u32 epoch, k_u32 rows,
                                k_i32 peer, k_i32 phase) {
    k_bool ok = 1;
    if (word && !k_is_here(k_acquire(word), epoch, rows)) {
        struct k_spinner s = K_SPINNER;
        const k_i64 start = k_now();
        k_bool here = 0;
        do {
            ok = k_spin(k, &s, peer, phase);
            here = k_is_here(k_load(word), epoch, rows);
        } while (ok && !here);
        k_acquire(word);
        if (k->lane == 0) {
            k_add(&k->g->ctl->wait_ns, (k_u64)(k_now() - start));
        }
        ok = ok || here;
    }
    ok = k_all(k, ok);
    k_acquired(k);
    return ok;
}

/* Whether k_await_rows would return at once; true means as much as if it had. */
static K_FN k_bool k_arrived(struct k_thread *k, const k_u64 *word, k_u32 epoch, k_u32 rows) {
    const k_bool here = k_all(k, !word || k_is_here(k_acquire(word), epoch, rows));
    if (here) {
        k_acquired(k);
    }
    return here;
}

/*
 * Every warp's last step but one: true for the last of the grid, which sees all that the others
 * did. `part` is 0 for a kernel that only sends, whose operation another kernel ends, else 1.
 */
static K_FN k_bool k_is_last_out(struct k_thread *k, k_i32 part) {
    k_bool last = 1;
    k_syncwarp(k);
    if (k->lane == 0) {
        struct k_ctl *ctl = k->g->ctl;
        const k_u64 total = (k_u64)k->num_blocks * (k_u64)k->num_warps;
        last = k_fetch_add(&ctl->out[part], 1) == total - 1;
        if (last) {
            k_store(&ctl->out[part], 0);
        }
    }
    last = k_all(k, last);
    k_syncwarp(k);
    return last;
}

/* By the last warp out: the kernel has done its work; with `over` its operation has ended. */
static K_FN void k_finish_kernel(struct k_thread *k, k_bool over) {
    k_syncwarp(k);
    if (k->lane == 0) {
        struct k_ctl *ctl = k->g->ctl;
        const k_i32 op = k->kind == (k_i32)K_OP_COMBINE ? 1 : 0;
        const k_i64 begun = (k_i64)k_load((k_u64 *)&ctl->begun_ns);
        const k_u32 how = k_how_ended(k); /* both are on their way at once */
        k_add(&ctl->op_ns[op], (k_u64)(k_now() - begun));
        if (over) {
            k_add(&ctl->num_ops[op], 1);
            k_store(&ctl->epoch, k->epoch);
        }
        if (how == K_END_FAULT) {
            k_publish_local(&k_board_of(k->g, k->g->rank)->failed, K_WORD(k->epoch, 1));
        }
    }
}

/* The first thing a kernel does: epoch and where to look while waiting. */
static K_INLINE void k_enter(struct k_thread *k, const struct k_group *g, k_i32 kind) {
    k->g = g;
    k->kind = kind;
    k->epoch = K_NEXT((k_u32)k_load(&g->ctl->epoch));
    k->mask.ll = 0;
    k->mask.is_gone = 0;
    if (kind && k->block == 0 && k->warp == 0 && k->lane == 0) {
        k_store((k_u64 *)&g->ctl->begun_ns, (k_u64)k_now());
    }
}

#endif
