/* SPDX-License-Identifier: MIT */
/*
 * The protocol of low-latency mode for one kind of operation: numbers, slots, words, consumed words,
 * masks and the mask-aware barrier, as docs/decisions/0010-low-latency.md describes them. Kinds share
 * nothing but masks, so one is enough. scripts/model.sh runs it, and variants that must fail.
 *
 * Each rank is a process that runs its kernels one after the other: sends, receives in any order, or
 * both in one. What blocks of a kernel do at the same time is one sequence here, which only waits
 * more. A row is two cells and a word, so that half a row can be seen; or (PACKETS) each cell says itself
 * that it is there. A rank can be paused anywhere
 * and woken later, once; whoever waits for it may then run into the deadline and mask it.
 *
 * Checked: assertions (a row that is taken is the row of its number and whole; after un-masking the
 * counters agree), and that no rank is left waiting (an invalid end state).
 *
 *   RANKS    2 or 3
 *   OPS      sends of each rank before the barrier
 *   MORE     sends behind it
 *   PAUSES   1: a rank may be paused, and masked; 0: none
 *   PACKETS  a dispatch; else a combine
 *   WEIGHTS  a send waits for words (weights) that the others' sends of its number bring
 *   WHO      the rank that may be; else any
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef OPS
#define OPS 3
#endif
#ifndef MORE
#define MORE 2
#endif
#ifndef PAUSES
#define PAUSES 0
#endif

#define NONE 255
#define SLOT(n) ((n) & 1)

#ifdef TWO_WRITERS /* a place of each slot that all sources share */
#define PLACE(dst, src, n) ((dst) * RANKS * 2 + SLOT(n))
#else
#define PLACE(dst, src, n) (((dst) * RANKS + (src)) * 2 + SLOT(n))
#endif
#define WORD(dst, src, n) (((dst) * RANKS + (src)) * 2 + SLOT(n))
#define PAIR(a, b) ((a) * RANKS + (b))

/* At dst, written by src. */
byte head[RANKS * RANKS * 2], tail[RANKS * RANKS * 2]; /* of a row: ROW */
#define ROW(n, src) ((n) * RANKS + (src))
byte word[RANKS * RANKS * 2];
byte consumed[RANKS * RANKS * 2]; /* WORD(src, dst, n): dst has received n */
bool masked_by[RANKS * RANKS];    /* PAIR(me, p): p has masked me */

#ifdef WEIGHTS
byte weighed[RANKS * RANKS * 2];
#endif

/* A rank's own. */
byte sent[RANKS];
byte received[RANKS * 2]; /* how many of each slot */
byte floor_of[RANKS];     /* sends up to two above it wait for no consumed word */
bool mask[RANKS * RANKS]; /* PAIR(me, p) */

/* The barrier: at b, written by a: PAIR(b, a). */
byte meeting[RANKS * RANKS], echo[RANKS * RANKS], largest[RANKS * RANKS];
byte my_meeting[RANKS], my_largest[RANKS];
bool met[RANKS]; /* has left the barrier */

bool paused[RANKS];
byte pauses_left = PAUSES;

#define IS_MASKED(me, p) mask[PAIR(me, p)]
/* Whoever waits for p may see the deadline pass: p does not run, or does not talk to me. */
#define MAY_EXPIRE(me, p) (paused[p] || masked_by[PAIR(me, p)])

/* In every step of a rank: it runs. */
#define RUNS(me) (!paused[me])

inline set_mask(me, p) {
    mask[PAIR(me, p)] = true;
    masked_by[PAIR(p, me)] = true
}

/* The last number of a slot that me has received, after `floor`. */
#define LAST_OF(me, s)                                                                         \
    (received[me * 2 + s] == 0 -> 0 : received[me * 2 + s] * 2 - s)

/* The start of every kernel: masks that others have told, and what earlier kernels have received. */
inline begin_kernel(me, p) {
    p = 0;
    do
    :: p < RANKS ->
        if
        :: masked_by[PAIR(me, p)] -> mask[PAIR(me, p)] = true
        :: else
        fi;
        if
        :: !IS_MASKED(me, p) ->
            consumed[WORD(p, me, 0)] = LAST_OF(me, 0);
            consumed[WORD(p, me, 1)] = LAST_OF(me, 1)
        :: else
        fi;
        p++
    :: else -> break
    od;
    p = 0
}

#ifdef NO_CONSUMED
#define IS_FREE(me, p, n) true
#elif defined(WRONG_PARITY)
#define IS_FREE(me, p, n)                                                                      \
    ((n) <= floor_of[me] + 1 || consumed[WORD(me, p, (n) + 1)] == (n) - 1)
#else
#define IS_FREE(me, p, n)                                                                      \
    ((n) <= floor_of[me] + 2 || consumed[WORD(me, p, n)] == (n) - 2)
#endif

/* Weights go before all waits of a send; what they overwrite was read by an answer received here. */
#ifdef WEIGHTS
#define IS_FED(me, p, n) (weighed[WORD(me, p, n)] == (n))
inline push_weights(me, p, n) {
    p = 0;
    do
    :: p < RANKS -> weighed[WORD(p, me, n)] = n; p++
    :: else -> break
    od;
    p = 0
}
#else
#define IS_FED(me, p, n) true
#endif
#define MAY_ANSWER(me, p, n) (IS_FREE(me, p, n) && IS_FED(me, p, n))

/* To all ranks. Nobody sees half of what a rank sends to itself. */
inline send_half(me, p, n) {
#if defined(WEIGHTS) && !defined(WEIGHTS_LAST)
    atomic { RUNS(me); push_weights(me, p, n) };
#endif
    do
    :: atomic { p < RANKS && RUNS(me) && p != me && IS_MASKED(me, p) -> p++ }
    :: atomic { p == me && RUNS(me) ->
           head[PLACE(me, me, n)] = ROW(n, me);
           tail[PLACE(me, me, n)] = ROW(n, me);
           word[WORD(me, me, n)] = n;
           p++ }
    :: atomic { p < RANKS && RUNS(me) && p != me && !IS_MASKED(me, p) && MAY_ANSWER(me, p, n) ->
#ifdef WORD_FIRST
           word[WORD(p, me, n)] = n };
       atomic { RUNS(me); head[PLACE(p, me, n)] = ROW(n, me) };
       atomic { RUNS(me); tail[PLACE(p, me, n)] = ROW(n, me); p++ }
#else
           head[PLACE(p, me, n)] = ROW(n, me) };
       atomic { RUNS(me); tail[PLACE(p, me, n)] = ROW(n, me) };
       atomic { RUNS(me); word[WORD(p, me, n)] = n; p++ }
#endif
    :: atomic { p < RANKS && RUNS(me) && p != me && !IS_MASKED(me, p) && !MAY_ANSWER(me, p, n) &&
                MAY_EXPIRE(me, p) -> set_mask(me, p); p++ }
    :: atomic { p == RANKS && RUNS(me) -> p = 0; break }
    od
#ifdef WEIGHTS_LAST
    ; atomic { RUNS(me); push_weights(me, p, n) }
#endif
}

inline receive_half(me, p, n) {
    do
    :: atomic { p < RANKS && RUNS(me) && p != me && IS_MASKED(me, p) -> p++ }
    :: atomic { p == me && RUNS(me) -> assert(word[WORD(me, me, n)] == n);
           assert(head[PLACE(me, me, n)] == ROW(n, me) && tail[PLACE(me, me, n)] == ROW(n, me));
           p++ }
#ifdef PACKETS /* the tail's first: they come in any order */
    :: atomic { p < RANKS && RUNS(me) && p != me && !IS_MASKED(me, p) &&
                tail[PLACE(me, p, n)] == ROW(n, p) };
       if
       :: atomic { RUNS(me) && head[PLACE(me, p, n)] == ROW(n, p) -> p++ }
       :: atomic { RUNS(me) && head[PLACE(me, p, n)] != ROW(n, p) && MAY_EXPIRE(me, p) ->
              set_mask(me, p); p++ }
       fi
    :: atomic { p < RANKS && RUNS(me) && p != me && !IS_MASKED(me, p) &&
                tail[PLACE(me, p, n)] != ROW(n, p) && MAY_EXPIRE(me, p) -> set_mask(me, p); p++ }
#else
    :: atomic { p < RANKS && RUNS(me) && p != me && !IS_MASKED(me, p) &&
                word[WORD(me, p, n)] == n -> assert(head[PLACE(me, p, n)] == ROW(n, p)) };
       atomic { RUNS(me); assert(tail[PLACE(me, p, n)] == ROW(n, p)); p++ }
    :: atomic { p < RANKS && RUNS(me) && p != me && !IS_MASKED(me, p) &&
                word[WORD(me, p, n)] != n && MAY_EXPIRE(me, p) -> set_mask(me, p); p++ }
#endif
    :: atomic { p == RANKS && RUNS(me) -> received[me * 2 + SLOT(n)]++; p = 0; break }
    od
}

/* Send n is legal: its slot has been received here. */
#define MAY_SEND(me) (received[me * 2 + SLOT(sent[me] + 1)] == sent[me] / 2)
#define IN_FLIGHT(me, n)                                                                       \
    ((n) > 0 && (n) <= sent[me] && received[me * 2 + SLOT(n)] == ((n) - 1) / 2)

#if RANKS == 2
#define LEFT_OUT(me) masked_by[PAIR(me, 1 - me)]
#else
#define LEFT_OUT(me) (masked_by[PAIR(me, (me + 1) % 3)] && masked_by[PAIR(me, (me + 2) % 3)])
#endif

/* Kernels until `most` sends are received; a rank that is masked by all others may do fewer before
 * the barrier. */
inline run_kernels(me, p, n, most) {
    do
    :: atomic { RUNS(me) && sent[me] < most && MAY_SEND(me) -> /* a send half, or all of it */
           n = sent[me] + 1;
           begin_kernel(me, p) };
       send_half(me, p, n);
       if
       :: true
#ifndef HALVES_ONLY
       :: receive_half(me, p, n)
#endif
       fi;
       sent[me]++
    :: atomic { RUNS(me) && IN_FLIGHT(me, sent[me]) -> /* the newest */
           n = sent[me];
           begin_kernel(me, p) };
       receive_half(me, p, n)
    :: atomic { RUNS(me) && sent[me] > 1 && IN_FLIGHT(me, sent[me] - 1) -> /* the one before */
           n = sent[me] - 1;
           begin_kernel(me, p) };
       receive_half(me, p, n)
    :: atomic { RUNS(me) && (sent[me] == most || (!met[me] && LEFT_OUT(me))) &&
                received[me * 2] == sent[me] / 2 &&
                received[me * 2 + 1] == (sent[me] + 1) / 2 -> n = 0; break }
    od
}

/* Who has begun to meet is told that it is not masked any more, before it is answered. */
inline post_meeting(me, p) {
    if
    :: meeting[PAIR(me, p)] != 0 -> masked_by[PAIR(p, me)] = false
    :: else
    fi;
    meeting[PAIR(p, me)] = my_meeting[me];
    largest[PAIR(p, me)] = my_largest[me];
    echo[PAIR(p, me)] = meeting[PAIR(me, p)]
}
#define POSTED(me, p)                                                                          \
    (meeting[PAIR(p, me)] == my_meeting[me] && largest[PAIR(p, me)] == my_largest[me] &&       \
     echo[PAIR(p, me)] == meeting[PAIR(me, p)])
/* p has answered this meeting with the same counters, and knows that I have. */
#ifdef LEAVE_EARLY
#define HAS_ANSWERED(me, p) true
#else
#define HAS_ANSWERED(me, p) POSTED(me, p)
#endif
#define AGREES(me, p)                                                                          \
    (p == me || lost[p] ||                                                                     \
     (meeting[PAIR(me, p)] != 0 && echo[PAIR(me, p)] == my_meeting[me] &&                      \
      largest[PAIR(me, p)] == my_largest[me] && HAS_ANSWERED(me, p)))

#if RANKS == 2
#define ALL_AGREE(me) (AGREES(me, 0) && AGREES(me, 1))
#else
#define ALL_AGREE(me) (AGREES(me, 0) && AGREES(me, 1) && AGREES(me, 2))
#endif

/* p does not run, or has left without me. */
#define GIVES_UP(me, p) (paused[p] || (met[p] && mask[PAIR(p, me)]))
/* Of two that talk to each other after the barrier. */
#define SAME_COUNT(me, p)                                                                      \
    (!met[p] || mask[PAIR(me, p)] || mask[PAIR(p, me)] || floor_of[p] == floor_of[me])

/* With all ranks, whoever was masked. */
inline barrier(me, p) {
    atomic {
        RUNS(me);
        my_meeting[me]++;
        my_largest[me] = sent[me];
        p = 0;
        do /* all are wanted back */
        :: p < RANKS -> mask[PAIR(me, p)] = false; p++
        :: else -> break
        od;
        p = 0
    };
    do
    :: atomic { RUNS(me) && me != 0 && !lost[0] && !POSTED(me, 0) -> post_meeting(me, 0) }
    :: atomic { RUNS(me) && me != 1 && !lost[1] && !POSTED(me, 1) -> post_meeting(me, 1) }
    :: atomic { RUNS(me) && me != 0 && !lost[0] && largest[PAIR(me, 0)] > my_largest[me] ->
           my_largest[me] = largest[PAIR(me, 0)] }
    :: atomic { RUNS(me) && me != 1 && !lost[1] && largest[PAIR(me, 1)] > my_largest[me] ->
           my_largest[me] = largest[PAIR(me, 1)] }
    :: atomic { RUNS(me) && me != 0 && !AGREES(me, 0) && GIVES_UP(me, 0) ->
           lost[0] = true }
    :: atomic { RUNS(me) && me != 1 && !AGREES(me, 1) && GIVES_UP(me, 1) ->
           lost[1] = true }
#if RANKS == 3
    :: atomic { RUNS(me) && me != 2 && !lost[2] && !POSTED(me, 2) -> post_meeting(me, 2) }
    :: atomic { RUNS(me) && me != 2 && !lost[2] && largest[PAIR(me, 2)] > my_largest[me] ->
           my_largest[me] = largest[PAIR(me, 2)] }
    :: atomic { RUNS(me) && me != 2 && !AGREES(me, 2) && GIVES_UP(me, 2) ->
           lost[2] = true }
#endif
    :: atomic { RUNS(me) && ALL_AGREE(me) ->
           p = 0;
           do
           :: p < RANKS && lost[p] -> set_mask(me, p); p++
           :: p < RANKS && !lost[p] -> p++
           :: else -> break
           od;
           my_largest[me] = my_largest[me] + (my_largest[me] & 1);
           sent[me] = my_largest[me];
           received[me * 2] = sent[me] / 2;
           received[me * 2 + 1] = sent[me] / 2;
           floor_of[me] = sent[me];
           met[me] = true;
           assert(SAME_COUNT(me, 0) && SAME_COUNT(me, 1) && SAME_COUNT(me, RANKS - 1));
           p = 0;
           break }
    od
}

proctype rank(byte me) {
    byte p, n;
    bool lost[RANKS];
    run_kernels(me, p, n, OPS);
#if MORE > 0
#ifdef UNMASK_ALONE
    atomic {
        RUNS(me);
        p = 0;
        do
        :: p < RANKS -> mask[PAIR(me, p)] = false; masked_by[PAIR(me, p)] = false; p++
        :: else -> break
        od;
        p = 0;
        floor_of[me] = sent[me];
        met[me] = true
    };
#else
    barrier(me, p);
#endif
    run_kernels(me, p, n, floor_of[me] + MORE)
#endif
}

/* Pauses a rank, and wakes it. */
proctype fate() {
    byte who;
end:
    do
    :: atomic { pauses_left > 0 -> pauses_left--; 
#ifdef WHO
                who = WHO;
#else
                select(who : 0..(RANKS - 1));
#endif
                paused[who] = true };
       atomic { true -> paused[who] = false }
    od
}

init {
    atomic {
        byte r = 0;
        do
        :: r < RANKS -> run rank(r); r++
        :: else -> break
        od;
#if PAUSES > 0
        run fate()
#endif
    }
}
