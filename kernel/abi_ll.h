/* SPDX-License-Identifier: MIT */
/*
 * The part of abi.h that is of low-latency mode: its regions of the arena, its headers and handles, and
 * the arguments of its kernels.
 */
#ifndef KERNEL_ABI_LL_H
#define KERNEL_ABI_LL_H

#include "kernel/abi.h"

/*
 * Operations of a kind are numbered by each rank from 1, in the order of its sends; number n uses slot
 * n & 1 and marks its words with the tag K_LL_TAG(n), which is never 0. Counters count kernels that
 * have left: every block adds its share of 1 << K_LL_SHARE_BITS as its last act, so the whole part of
 * one is the same for all warps of a kernel until the last of them has left. docs/decisions/0010 has
 * the protocol.
 */
#define K_LL_SHARE_BITS 20
#define K_LL_TAG(n) ((k_u32)(((n)-1) % 0xfffffffeull) + 1u)
#define K_LL_KINDS 2

/* In a rank's own memory. By kind: 0 dispatch, 1 combine. */
struct k_ll_ctl {
    k_u64 sent[K_LL_KINDS];
    k_u64 received[K_LL_KINDS][2]; /* by slot */
    k_u64 lost;                    /* not 0: a dispatch has failed; handles may hold anything */
    /* What follows is of groups with masks. */
    k_u64 kernels;           /* counts all of this mode, as the others count */
    k_u64 floor[K_LL_KINDS]; /* numbers that the last barrier has agreed; even */
    k_u64 meeting;           /* barriers so far */
    k_i64 timeout_ns;
    /* Of a half of a kernel (K_LL_HALF), the last in which ... */
    k_u64 expired; /* ... a wait has lasted for all of the deadline; all others end with it */
    k_u64 said;    /* ... others were told that this rank waits */
    k_u64
        mended; /* the last kernel in which a warp leaves last, to take out what is not whole */
};

/*
 * What a rank with masks knows of a peer; in its own memory, beside k_ll_ctl. A mask counts for the
 * kernels after the one that set it: all warps of a kernel agree on it.
 */
struct k_ll_peer {
    k_u64 mask;     /* 0, or {number of the kernel that set it, K_LL_WHY_...} */
    k_u64 waited;   /* {ms waited | phase : 16 | kind : 16} */
    k_u64 verdict;  /* {number of the kernel, K_LL_PENDING, ...}: whether the counts hold */
    k_u64 heard;    /* its word `waits` when the kernel began */
    k_u64 wanted;   /* it is to come back in the next barrier */
    k_u64 answered; /* the meeting of its that this rank has answered last */
};
#define K_LL_NOTE(kernel, what) ((k_u64)(kernel) << 3 | (k_u64)(what))
#define K_LL_NOTED(note) ((k_i32)((note)&7))
#define K_LL_WHY_GONE 1 /* it is dead, or in destroy */
#define K_LL_WHY_LATE 2
#define K_LL_WHY_MASKED_US 3
#define K_LL_WHY_CALLER 4
#define K_LL_PENDING 1
#define K_LL_PRESENT 2
#define K_LL_ABSENT 3
#define K_LL_HALF(kernel, phase)                                                               \
    (2 * (kernel) + ((phase) == K_PHASE_CONSUMED || (phase) == K_PHASE_WEIGHTS ? 0 : 1))

/* Why a kernel has done nothing; k_board.refused. */
#define K_REFUSED_SEND 1u    /* the operation two before it has not been received */
#define K_REFUSED_RECEIVE 2u /* its operation was not sent, or has been received */
#define K_REFUSED_HANDLE 3u  /* the handle is of no received dispatch, or of another shape */
#define K_REFUSED_BARRIER 4u /* something is in flight */

/* Two slots of a part for each rank, in every arena. */
struct k_ll_region {
    k_u64 at, stride; /* stride: bytes of a part */
};

/*
 * The header of a message, words that carry their own values. Of a dispatch the counts of the reader's
 * experts follow.
 *   0  what the call is: K_LL_SIG_...                 compared with the reader's, as the next four
 *   1  types, and how many scales a row has: K_TYPES
 *   2  bytes of a row of x
 *   3  k_group.experts; of a combine the number of its dispatch
 *   4  the most tokens of a call
 *   5  the sender's tokens
 *   6  those that go to the reader, if output is compact
 */
#define K_LL_HEADER 8
#define K_LL_COMPARED 5
#define K_LL_TOKENS 5
#define K_LL_ROWS 6
#define K_LL_SIG_TOPK_SHIFT 8
#define K_LL_SIG_WEIGHTS 1u
#define K_LL_SIG_CAST 2u /* rows are cast to E4M3, with a scale for each K_LL_GROUP channels */
#define K_LL_SIG_POWER_OF_2 4u  /* and scales are powers of two */
#define K_LL_SIG_WEIGHTS_NOW 8u /* of a combine: it brings the weights */
#define K_LL_SIG_EXACT 16u      /* of a combine: every expert's row travels as it is */
#define K_LL_SIG_COMPACT 32u    /* one row at the receiver, whatever its experts */
#define K_LL_SIG_LOGFMT 64u     /* of a combine: rows travel as kernel/ll_logfmt.h says */
#define K_LL_GROUP 128
#define K_LL_STAGE_BYTES                                                                       \
    (2048 + 32)       /* behind the scratch of each warp: a block in LogFMT, its metadata */
#define K_LL_WARPS 4  /* of a block on a GPU, at most */
#define K_LL_BLOCKS 3 /* that share an SM, at most: so many have registers enough */
#define K_LL_SHARED_BYTES 28672 /* of a block, at least: sums of 4,800 experts, and more */
#define K_LL_MOST_SLICES 8      /* of an answer */
#define K_LL_CUT_BELOW 128      /* tokens: answers of so many or more are not cut */
#define K_LL_BATCH_BYTES 1536   /* of a row, which travel as K_LL_BATCH_WIRE: kernel/ll_row.h */
#define K_LL_BATCH_WIRE 2048
#define K_LL_NONE 0xfffffffeu /* in place of an expert: the token does not come */

#define K_LL_MEETING 4 /* words */

/* Where a selection has no row at its expert: it is another rank's, or more than M of its source were
 * there before it. Of those alone the row is answered all the same. */
#define K_LL_NOWHERE (-2)
#define K_LL_TOO_MANY (-1)

struct k_ll_map {
    struct k_ll_region counts; /* a dispatch's header and counts, by source */
    struct k_ll_region header; /* a combine's, by answering rank */
    /* K_LL_MOST_SLICES words for each token, or exact for each selection, by answering rank. */
    struct k_ll_region answered;
    struct k_ll_region weights; /* words: those given at combine, [token][K], by owner */
    struct k_ll_region rows;    /* [token] sidecar and row as ll_row.h has them, by source */
    struct k_ll_region answers; /* [tokens][row] or [tokens][K][row], by answering rank */
    k_u64 consumed;  /* [R][4] words by writer: {kind, slot} whose operation it has received */
    k_u64 masked_by; /* [R] by writer: not 0: it has masked this rank */
    k_u64 waits; /* [R] by writer: K_LL_HALF of its kernel in which a wait has become long */
    k_u64
        meeting; /* [R][K_LL_MEETING] by writer: {its meeting | the reader's that it answers}, then
                        the largest number of each kind that it has seen */
    /* In a handle, from its start. */
    k_u64 dest;   /* [tokens][K] the ranks that a token goes to, ascending, then -1 */
    k_u64 chosen; /* [tokens][K] the rank of each selection, or -1 */
    k_u64 given;  /* [tokens][K] weights of the dispatch, or 1 */
    k_u64 count;  /* [R] tokens of each source */
    k_u64
        place; /* [R][tokens][K] their rows at this rank's experts, in the order of k; or K_LL_... */
    k_u64 weight; /* [R][tokens][K] */
};

/* A handle begins with this; memory of the caller's. */
struct k_ll_head {
    k_u64 owner;              /* what ll.ctl is */
    k_u64 number[K_LL_KINDS]; /* of its dispatch, of its last combine */
    k_i32 tokens, topk, max_tokens;
    k_u32 signature;
    k_i32 row_bytes, row_at, wire_bytes; /* of x; and of a row on the wire */
    k_u32 types;
    k_u32 experts, pad; /* what k_group.experts was */
};

struct k_ll {
    struct k_ll_ctl *ctl;
    struct k_ll_head *head;
    struct k_ll_peer *peers; /* [R]; NULL: a group without masks */
    struct k_ll_map map;
    k_i32 group_tokens, group_topk; /* by which handles are laid out */
    k_i32 max_tokens;               /* of this call */
    k_i32 wire_bytes;               /* from one row to the next on the wire, of a send */
};

#define K_LL_SEND 1u /* flags: the halves that the kernel does */
#define K_LL_RECEIVE 2u

/* `types` of their fields has the number of a row's scales in its lowest bits. */
#define K_LL_NUM_SCALES(types) ((k_i32)((types)&0xffffffu))

struct k_ll_dispatch_args {
    K_OP_FIELDS
    struct k_ll ll;
    k_u32 signature; /* K_LL_SIG_... */
    k_i32 id_bytes;
    k_i32 packed_scales; /* four exponents in a word */
    k_i32 row_at;        /* where a row's packets begin, behind its sidecar, of a send */
    k_i32 scale_bytes;   /* of one that comes with the rows; 0: there are none */
    k_i32 recv_id_bytes;
    struct k_array x, scales, ids, weights;
    struct k_array recv_x, recv_scales, recv_ids, recv_weights, recv_source, expert_counts,
        expert_totals, ranges, wait_ns;
};

struct k_ll_combine_args {
    K_OP_FIELDS
    struct k_ll ll;
    k_u32 form; /* K_LL_SIG_... that this combine adds to its dispatch's */
    k_u32 pad;
    struct k_array x, weights, out, wait_ns;
};

/* What a caller wants of masks. */
#define K_LL_ASK 0
#define K_LL_MASK 1
#define K_LL_UNMASK 2
#define K_LL_BARRIER 3

struct k_ll_masks_args {
    K_OP_FIELDS
    struct k_ll ll;
    k_i32 what, rank;     /* of K_LL_UNMASK: -1: all */
    struct k_array masks; /* [R] int32 */
};

_Static_assert(sizeof(struct k_ll_map) == 6 * 16 + 10 * 8, "k_ll_map");
_Static_assert(sizeof(struct k_ll_head) == 64, "k_ll_head");
_Static_assert(sizeof(struct k_ll) == 24 + sizeof(struct k_ll_map) + 16, "k_ll");
_Static_assert(sizeof(struct k_ll_dispatch_args) ==
                   sizeof(struct k_op) + sizeof(struct k_ll) + 24 + 13 * 24,
               "k_ll_dispatch_args");
_Static_assert(sizeof(struct k_ll_combine_args) ==
                   sizeof(struct k_op) + sizeof(struct k_ll) + 8 + 4 * 24,
               "k_ll_combine_args");
_Static_assert(sizeof(struct k_ll_masks_args) ==
                   sizeof(struct k_op) + sizeof(struct k_ll) + 8 + 24,
               "k_ll_masks_args");

#endif
