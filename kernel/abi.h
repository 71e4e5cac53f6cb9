/* SPDX-License-Identifier: MIT */
/*
 * What the library and its kernels share: the words by which ranks talk, the memory map of an
 * arena, and the arguments of each kernel. Included by C (src/, host kernels) and by the CUDA
 * compilers, so: plain types, positional layout, no library headers. Every struct that crosses
 * between compilers asserts its size at the end of this file.
 *
 * A *word* is 64 bits. It has one writer, is never reset, and says by its epoch for which operation
 * of the group its value holds. Of `progress` and `returned` the value counts rows: those numbered
 * below it, of the words' channel and of the source for the destination, are there.
 *
 *    63       32 31        0
 *   +-----------+-----------+
 *   | epoch     | value     |
 *   +-----------+-----------+
 */
#ifndef KERNEL_ABI_H
#define KERNEL_ABI_H

#include "kernel/lang_types.h"

/*
 * The number of the operation after number n, in 64 bits or in 32: an epoch is a number's low half,
 * and is never 0, which memory that nobody has written says. Two numbers are left out, because
 * words that are used in turn go by whether the epoch is odd.
 */
#define K_NEXT(n) ((n) + ((k_u32)((n) + 1) == 0xffffffffu ? 3u : 1u))

/* A word of 64 bits: of which operation (or handle) it is, and what it says. */
#define K_WORD(epoch, value) (((k_u64)(k_u32)(epoch) << 32) | (k_u32)(value))

#define K_MAX_RANKS 1024
#define K_MAX_TOPK 64
#define K_MAX_BLOCKS 256

/* Shared memory of a block: scratch for each warp (k_group.scratch_bytes: what it notes of its
 * work, then a reduction's terms; or what route holds of its selections), then a ring for each
 * warp's mover. */
#define K_TERM_BYTES 16
#define K_NOTE_BYTES 128
#define K_SCRATCH_BYTES(max_dests)                                                             \
    (((max_dests) > K_MAX_TOPK ? (max_dests) : K_MAX_TOPK) * K_TERM_BYTES + 2 * K_NOTE_BYTES)
/* Terms of a sum that a mover gathers at once; scratch holds two such sets. */
#define K_SUM_TERMS (K_MAX_TOPK / 2)
#define K_RING_HEAD 128 /* barriers of the stages, on GPUs */
#define K_RING_BYTES(stages, stage_bytes) (K_RING_HEAD + (stages) * (stage_bytes))

/* A row of route's counters: of each expert, of each rank, and the first bad selection. A block
 * has one for each warp and one more: in shared memory behind the scratch if the launch has so
 * much of it, else in the handle. */
#define K_ROUTE_COLUMNS(experts, ranks) ((experts) + (ranks) + 1)

/* ---- words ---------------------------------------------------------------------------------- */

/*
 * The ready message: "you may write into my arena for this operation, and this is what I take the
 * operation to be". One per (reader, writer), two of them used in turn: a writer is never two
 * operations ahead of a reader, because every operation waits for every peer's ready message.
 *
 *            63     32 31     16 15    13 12    6    5        4     3    0
 *           +---------+---------+--------+-------+---------+--------+------+
 *   word 0  | epoch   | counted | mapped | top-k | weights | cached | kind |   compared, as the next
 *           +---------+---------+--------+-------+---------+--------+------+   two, with the reader's
 *   word 1  | epoch   | dtype of rows : 4 | row bytes : 28               |
 *           +---------+--------------------------------------------------+
 *   word 2  | epoch   | dtype of scales : 4 | scale bytes of a row : 28  |
 *           +---------+--------------------------------------------------+
 *   word 3  | epoch   | where: channels : 16, slot : 16; or the first    |
 *           |         | landing row of a combine                         |
 *           +---------+--------------------------------------------------+
 *
 * `counted` names the routing: it is the operation that exchanged its counts (the low 16 bits of its
 * epoch). A rank's handles and those of others have nothing else in common. Where this operation
 * exchanges them it names the experts: E - 1, or, `mapped`, 16 bits of a hash of another map than the
 * default one. `channels` are those that the writer's tokens use: a counts message has as many.
 */
#define K_READY_WORDS 4
#define K_READY_STRIDE 8 /* words from one message to the next: its own 64 bytes */

#define K_OP_DISPATCH 1u
#define K_OP_COMBINE 2u
#define K_OP_LL_DISPATCH                                                                       \
    3u /* of low-latency mode, in which kernels count operations themselves */
#define K_OP_LL_COMBINE 4u
#define K_OP_LL_MASKS 5u
#define K_SIG_CACHED (1u << 4)
#define K_SIG_WEIGHTS (1u << 5)
#define K_SIG_TOPK_SHIFT 6
#define K_SIG_MAPPED (1u << 13)
#define K_SIG_COUNTED_SHIFT 16
#define K_SIG_TYPE_SHIFT 28 /* of words 1 and 2 */
#define K_WHERE(slot, channels) ((k_u32)(slot) | (k_u32)(channels) << 16)
#define K_WHERE_SLOT(w) ((w)&0xffffu)
#define K_WHERE_CHANNELS(w) ((w) >> 16)
#define K_SIG_BYTES(w) ((w) & ((1u << K_SIG_TYPE_SHIFT) - 1u))
/* The dtypes as kernels get them, and what of that goes into words 1 and 2. */
#define K_TYPES(rows, scales) ((k_u32)(rows) << K_SIG_TYPE_SHIFT | (k_u32)(scales) << 24)
#define K_SIG_ROW_TYPE(types) ((types) & (15u << K_SIG_TYPE_SHIFT))
#define K_SIG_SCALE_TYPE(types) ((types) << 4)

/* The rows word of a source that has more tokens than max_tokens, and sends none: with T below. */
#define K_ROWS_EXCESS (1u << 31)

/* Bases, by which a rank answers counts: word 0 is the row at which the reader's rows start there,
 * word 1 the rows that the rank would need if all do not fit, else 0. */
#define K_BASE_WORDS 2

/*
 * A sidecar: what travels beside a row of a dispatch, [side_stride] bytes for each row of a slot.
 * It is 32-bit words, the same for all destinations of a token. A warp of the source writes it,
 * from a stage of its mover; the warp of the destination that takes the row out reads it.
 *
 *   word   0        1            1 + K        1 + 2 K      K_SIDE_SCALES
 *        +--------+------------+------------+------------+------------------+-------------+
 *        | token  | expert ids | indices    | weights    | scales           | 0 to a      |
 *        |        | [K] or -1  | [K]        | [K] float  | [scale_bytes]    | multiple of |
 *        +--------+------------+------------+------------+------------------+ 16 bytes    |
 *        of the    of all       within       only where    1, 2 or 4 bytes  |             |
 *        source    ranks        (source,     weights       each             +-------------+
 *                               expert)      travel
 *
 * Rows of sidecars lie side_stride bytes apart: K_SIDE_BYTES of the group's largest top-k and
 * scales.
 */
#define K_SIDE_IDS 1
#define K_SIDE_INDICES(topk) (1 + (topk))
#define K_SIDE_WEIGHTS(topk) (1 + 2 * (topk))
#define K_SIDE_SCALES(topk, weights) (1 + (topk) * ((weights) ? 3 : 2))
#define K_SIDE_BYTES(scales_word, scale_bytes)                                                 \
    ((4 * ((scales_word) + ((scale_bytes) + 3) / 4) + 15) / 16 * 16)

/* What a rank waits for; ep_fault.phase in words. */
#define K_PHASE_NONE 0
#define K_PHASE_READY 1
#define K_PHASE_COUNTS 2
#define K_PHASE_BASES 3
#define K_PHASE_ROWS 4
#define K_PHASE_ANSWERS 5
#define K_PHASE_SELF 6     /* another block of the same rank */
#define K_PHASE_CONSUMED 7 /* low-latency mode: that a peer has received an earlier operation */
#define K_PHASE_WEIGHTS 8  /* low-latency mode: those that a combine's caller gives */
#define K_PHASE_MEETING 9  /* and that it comes to a barrier */

/*
 * An abort word ends waits; struct k_board says who writes one. By bits:
 *
 *    63   62   56 55     48 47      38 37         27 26  24  23  22   20 19          0
 *   +----+-------+---------+----------+-------------+------+----+-------+-------------+
 *   | 1  | 0     | -status | reporter | subject + 1 | kind | 0  | phase | epoch mod   |
 *   |    |       |         | (rank)   | (rank or -1)| K_OP | 0  | K_PH. | 2^20        |
 *   +----+-------+---------+----------+-------------+------+----+-------+-------------+
 *
 * The epoch is that of the operation that faulted: an earlier one that is still on its way
 * somewhere may finish, because whoever reached a later one has sent all its rows. Death and
 * cancellation end all of them, and so does a fault of low-latency mode, whose numbers are others.
 */
#define K_ABORT_PACK(status, reporter, subject, kind, phase, epoch)                            \
    ((1ull << 63) | ((k_u64)(k_u8)(-(status)) << 48) | ((k_u64)(reporter) << 38) |             \
     ((k_u64)((subject) + 1) << 27) | ((k_u64)(kind) << 24) | ((k_u64)(phase) << 20) |         \
     ((k_u64)(epoch)&0xfffff))
#define K_ABORT_STATUS(w) (-(k_i32)(((w) >> 48) & 0xff))
#define K_ABORT_REPORTER(w) ((k_i32)(((w) >> 38) & 0x3ff))
#define K_ABORT_SUBJECT(w) ((k_i32)(((w) >> 27) & 0x7ff) - 1)
#define K_ABORT_KIND(w) ((k_i32)(((w) >> 24) & 0x7))
#define K_ABORT_PHASE(w) ((k_i32)(((w) >> 20) & 0xf))
/* Whether abort word w ends operation `epoch`. */
#define K_ABORT_ENDS(w, epoch)                                                                 \
    ((w) != 0 && (K_ABORT_STATUS(w) == K_ERR_PEER || K_ABORT_STATUS(w) == K_ERR_INTERRUPTED || \
                  K_ABORT_KIND(w) >= (k_i32)K_OP_LL_DISPATCH ||                                \
                  (((k_u32)(epoch) - (k_u32)((w)&0xfffff)) & 0xfffff) < 0x80000))

/* Statuses that kernels raise; the values of ep_status. */
#define K_ERR_ARG (-1)
#define K_ERR_TIMEOUT (-5)
#define K_ERR_PEER (-6)
#define K_ERR_MISMATCH (-7)
#define K_ERR_INTERRUPTED (-12)

/* ---- a rank's own memory -------------------------------------------------------------------- */

/* The first fault of a rank, written once by the warp that claims it (k_ctl.fault_claim). */
struct k_fault {
    k_i32 status;
    k_i32 subject;
    k_i32 reporter;
    k_i32 kind;
    k_i32 phase;
    k_u32 epoch;
    k_i64 waited_ns;
    k_u32 mine, theirs; /* of a mismatch: the two values */
    k_i32 word;         /* of a mismatch: the word of the ready message */
    k_i32 pad;
};

/*
 * A rank's board: what ends its waits, and what its kernels have to tell its host. In host memory
 * on every backend, mapped by all ranks of the host, so that hosts can write to it whatever their
 * devices do. Kernels look at it when they look at the clock, which is seldom.
 */
struct k_board {
    k_u64 told;    /* an abort word by the peer that faults first */
    k_u64 abort;   /* an abort word by this rank: its kernels, its boot, its caller */
    k_u64 failed;  /* {epoch | 1}: the last operation that ended early */
    k_u64 waiting; /* {epoch | phase : 16 | peer : 16} of the last wait that became long */
    k_i64 waited_ns;
    k_i64 waiting_kind;
    struct k_fault fault; /* holds where `abort` names a kind */
    k_u64
        refused; /* {kind | K_REFUSED_...}: a call of low-latency mode did nothing; 0 once told */
    k_u64 ended;  /* of a host rank: its last operation that has ended */
    k_u64 ran_ns; /* of a CUDA rank: how long its host has run, again and again; else 0 */
    k_u64
        orphan_since; /* of one that is a thread: k_now(), or ran_ns, when its last thread ended;
                           or 0 */
    k_u64 gone[K_MAX_RANKS /
               64];  /* bits, by hosts of groups with masks: who is dead, or has left */
    k_u64 masked;    /* not 0: there is a mask ... */
    k_u64 mask_news; /* ... and masks have changed; 0 once the host has looked */
};

/* How an operation ended that did not end well; k_ctl.how_ended. */
#define K_END_FAULT 1u
#define K_END_NEED 2u /* rows did not fit the memory for them (k_counts.need); none was sent */
#define K_END_OVER 3u /* more came than this rank's outputs hold (k_counts.over) */

/* What the warps of a rank take in turn; k_ctl.taken holds the next number of each. */
enum k_taken {
    K_TAKEN_PARTS = 0,    /* dispatch: parts of channels that are received */
    K_TAKEN_CHANNELS = 1, /* dispatch: channels that are sent */
    K_TAKEN_ANSWERS = 2,  /* combine: (owner, channel) whose answers are sent; parts of sums */
    K_TAKEN_TOKENS = 3,   /* combine: tokens that are summed, or slices of their rows */
    K_NUM_TAKEN = 4
};

/* Control block of a rank: lives in its own memory, read and written by its own kernels. */
struct k_ctl {
    k_u64 epoch;       /* of the last operation that has ended */
    k_u64 abort;       /* not 0: stop waiting; this rank's kernels have faulted */
    k_u64 go;          /* {epoch | K_GO...}: the exchange is done, handle arrays are filled */
    k_u64 go_recv;     /* {epoch | ..}: offsets of the output are known */
    k_u64 out[2];      /* warps that have left: a kernel that only sends, any other */
    k_u64 sent;        /* {epoch | 1}: the kernel that only sends has left */
    k_u64 how_ended;   /* {epoch | K_END_...} of an operation that did not end well */
    k_u64 fault_claim; /* 0, then 1 */
    k_u64 taken[K_NUM_TAKEN]; /* set to 0 before go or go_recv; of answers, when all are made */
    k_i64 timeout_ns;
    k_i64 late_ns; /* a wait that lasts longer is worth a line in the log */
    k_u64 wait_ns;
    k_u64 rows_sent, rows_received, remote_bytes, local_bytes;
    k_i64 begun_ns;   /* when the current kernel began */
    k_u64 op_ns[2];   /* in kernels of dispatch, of combine */
    k_u64 num_ops[2]; /* ended */
};

/* Byte offsets into every arena; the same on all ranks. */
struct k_map {
    k_u64 board;                 /* struct k_board, where arenas are host memory */
    k_u64 ready;                 /* [2][R][K_READY_STRIDE] words, by writer */
    k_u64 counts;                /* [2][R][count_words] words, by writer; channels come last */
    k_u64 bases;                 /* [2][R][K_BASE_WORDS] words, by writer */
    k_u64 progress;              /* [R][C] words: dispatched rows of (source, channel) */
    k_u64 returned;              /* [R][C] words: combined rows of (rank, channel) */
    k_u64 recv, recv_slot_bytes; /* [slots][rows][row bytes of the operation] */
    k_u64 side, side_slot_bytes; /* [slots][rows][side_stride] */
    k_u64 expanded, expanded_slot_bytes;
    k_u64 land;      /* [combine rows][row bytes of the operation] */
    k_u64 land_side; /* [combine rows][max top-k] float32 */
};

/* Everything about a group that its kernels need: constant after create, but for the experts, which
 * are those of the operation's routing. */
struct k_group {
    k_i32 rank, num_ranks;
    k_i32 num_experts, num_local; /* E, and L of this rank */
    k_i32 num_channels;           /* C */
    k_i32 count_words;            /* of one counts message: 1 + max L + C */
    k_i32 side_stride;            /* bytes */
    k_i32 max_dests;              /* destinations a token can have */
    k_i32 scratch_bytes;          /* of shared memory, per warp */
    k_u32 experts;                /* how a ready message names them */
    k_i64 max_recv_rows;
    const k_u64 *peer;         /* [R] address of each rank's arena as mapped here */
    const k_u64 *board;        /* [R] the same of its board */
    const k_i32 *expert_rank;  /* [E] */
    const k_i32 *expert_local; /* [E] index among its rank's experts */
    const k_i32 *rank_expert;  /* [E] expert ids grouped by rank, ascending */
    const k_i32 *rank_first;   /* [R + 1] start of each rank's group in rank_expert */
    struct k_ctl *ctl;
    struct k_map map;
};

#define K_NEED_PACK(rows, rank) (((k_u64)(rows) << 16) | (k_u64)(0xffff - (rank)))
#define K_NEED_ROWS(need) ((k_i64)((need) >> 16))
#define K_NEED_RANK(need) (0xffff - (k_i32)((need)&0xffff))

/* Counts the host may wait for while the kernel runs. Tickets of calls never get smaller. */
struct k_counts {
    k_u64 known; /* {ticket | epoch of the operation}: rows and need hold */
    k_i64 rows;
    k_u64 need;   /* not 0: nothing was sent; K_NEED_PACK of the rank that lacks most rows */
    k_u64 tokens; /* the same of most tokens, where that is above max_tokens; else 0 */
    k_u64 over;   /* {tag | rows}: outputs were too small; the rows needed */
    k_u64 bad;    /* {tag | 1 + (t * K + k)}: the first bad selection of a routing; 0: none */
    k_i64 bad_id; /* the id of that selection */
    k_u64 routed; /* {tag | ticket}: bad holds */
};

/*
 * A handle: the routing of one micro-batch. T tokens, D = group's max_dests, C channels, of which
 * the prefix sums hold for as many as the source's tokens use.
 * Filled by `route` (the send side) and by an uncached dispatch (the receive side).
 */
struct k_handle {
    /* send side */
    k_i32 *num_dests;   /* [T] */
    k_i32 *dest_rank;   /* [T][D] ascending */
    k_u32 *dest_slot;   /* [T][D] index of the row among this rank's rows for that rank */
    k_i32 *ids;         /* [T][K] expert id or -1 */
    k_u32 *sel_index;   /* [T][K] index among this rank's selections of that expert */
    k_u32 *send_count;  /* [R] */
    k_u32 *send_base;   /* [R + 1] exclusive prefix: where a rank's answers land */
    k_u32 *send_chan;   /* [R][C + 1] exclusive prefix over channels */
    k_u32 *send_expert; /* [E] */
    k_u32 *counters;    /* [C + blocks][K_ROUTE_COLUMNS] scratch of route */
    k_u64 *totals;      /* [blocks][K_ROUTE_COLUMNS] words of route: its blocks' sums */
    k_u64 *bad;         /* [1] first bad selection (t * K + k), or ~0 */
    /* receive side */
    k_u32 *recv_count;    /* [R] */
    k_u32 *recv_base;     /* [R + 1] exclusive prefix: first row of each source */
    k_u32 *recv_chan;     /* [R][C + 1] exclusive prefix over the source's channels */
    k_u32 *recv_channels; /* [R + 1] channels that each source uses; the most of them */
    k_u32 *recv_expert;   /* [R][L] selections by source */
    k_u32 *expert_base;   /* [R][L] expanded: first row of (source, expert) */
    k_u32 *expert_start;  /* [L + 1] expanded: aligned starts, end */
    k_u32 *expert_rows;   /* [L] */
    k_u32 *remote_base;   /* [R] row at which this rank's rows start at each peer */
    k_u32 *remote_where;  /* [R] what each peer's ready message said: `where` */
    k_u64 *answered;      /* [R][C] combine: answers that are summed; 0 between operations */
    k_i32 *expand_row;    /* [rows that can come][K] expanded row of a selection, or -1 */
    struct k_counts *counts;
    struct k_counts *notice; /* the same for the host to read; may be `counts` itself */
    k_u64 *sync;             /* [1] how often route has run: the epoch of `totals` */
    k_u32 tag, pad;          /* tells it from the handle that had its notice before */
};

/* ---- kernel arguments ----------------------------------------------------------------------- */

/* Where a 2-D array lies; strides in bytes. */
struct k_array {
    k_u64 data; /* address, 0: absent */
    k_i64 s0, s1;
};

/*
 * Channels: contiguous runs of tokens, which depend on T alone, never on blocks or warps. T tokens use
 * `num` of the group's C. They come in groups of `in_group` and get smaller from one to the next, so
 * that what is under way at the end of an operation is small: what warps take last ends at about the
 * same time, and little of it is left to receive. The last channel has what the others leave.
 */
#define K_CHANNEL_GROUPS 5

struct k_channels {
    k_i32 tokens, num;
    k_i32 in_group, size[K_CHANNEL_GROUPS]; /* tokens of a channel */
};

#define K_DO_SEND 1u   /* control and send part */
#define K_DO_RECV 2u   /* receive part; the operation ends with this kernel */
#define K_DO_COUNTS 4u /* uncached: exchange counts */
#define K_DO_EXPAND 8u /* expanded output or input */
#define K_DO_ZERO_GAPS 16u
#define K_DO_WEIGHTS 64u  /* top-k weights travel */
#define K_DO_REDUCE 128u  /* combine: rows are weighted or expanded, summed before sending */
#define K_DO_NOTHING 256u /* after a fault: only leave the outputs as after a failure */
#define K_DO_DROP 512u    /* only ends the operation, unless the kernel that sent has */
#define K_DO_BEHIND 2048u /* receives behind the kernel that sent, unless that has ended it */
#define K_DO_WIDE 1024u   /* expanded output might need more rows than 32 bits can count */

struct k_far; /* abi_far.h */

/*
 * What the arguments of every kernel begin with, as fields of theirs: one member of another struct
 * there would change the machine code of kernels. Host code that serves all kernels reads them as a
 * struct k_op, in a union with the rest. What a kernel has no use for is 0.
 */
#define K_OP_FIELDS                                                                            \
    struct k_group g;                                                                          \
    struct k_handle h;                                                                         \
    struct k_channels channels;                                                                \
    k_u32 flags, send_blocks;                                                                  \
    k_u32 types; /* K_TYPES */                                                                 \
    k_i32 tokens, topk;                                                                        \
    k_i32 row_bytes;

struct k_op {
    K_OP_FIELDS
};

struct k_route_args {
    K_OP_FIELDS
    k_i32 id_bytes; /* 4 or 8; 0: by mask */
    k_i32 lenient;
    k_u32 ticket;        /* names this call to the host */
    k_u32 excess;        /* T where it is above max_tokens: nothing is routed; else 0 */
    struct k_array ids;  /* [T][K] */
    struct k_array mask; /* [T][R] bytes */
};

struct k_dispatch_args {
    K_OP_FIELDS
    k_i32 num_scales, scale_bytes; /* per row; bytes of one */
    k_i32 slot;
    k_i32 alignment;
    k_i32 id_bytes;            /* of recv_ids: 4 or 8 */
    k_i32 stages, stage_bytes; /* of each warp's mover */
    k_u32 ticket;              /* names this call to the host: k_counts.known */
    k_i64 capacity;            /* rows that the outputs beside recv_x hold */
    k_i64 x_rows;              /* rows that recv_x holds */
    struct k_array x, scales, weights;
    struct k_array recv_x, recv_scales, recv_ids, recv_weights, recv_source;
    struct k_array expert_counts, expert_offsets, num_rows, source_ends, expert_ends;
    const struct k_far *far; /* NULL: there is one node */
};

struct k_combine_args {
    K_OP_FIELDS
    k_i32 dtype; /* K_BF16, K_F16, K_F32 */
    k_i32 stages, stage_bytes;
    k_i32 pad;
    k_i64 x_rows; /* that x holds */
    struct k_array x, weights, topk_weights, bias0, bias1, out, out_weights;
    const struct k_far *far;
};

/* Layout tensors from a routed handle. */
struct k_layout_args {
    K_OP_FIELDS
    k_i32 num_nodes;
    k_i32 pad;
    const k_i32 *rank_node; /* [R], or NULL: all on node 0 */
    k_u64 tokens_per_rank, tokens_per_node, tokens_per_expert, token_in_rank, channel_prefix;
};

/*
 * What kernels on the host ask of whoever runs them: the only calls that leave kernel/. `size` is
 * that of the struct.
 */
struct k_hooks {
    k_u64 size;
    /* A wait has become long: K_WORD(epoch, phase << 16 | awaited rank). Called by any warp, again
     * and again while the wait goes on. */
    void (*late)(const struct k_group *g, k_i32 kind, k_u64 word, k_i64 waited_ns);
};

_Static_assert(sizeof(struct k_array) == 24, "k_array");
_Static_assert(sizeof(struct k_map) == 14 * 8, "k_map");
_Static_assert(sizeof(struct k_fault) == 48, "k_fault");
_Static_assert(sizeof(struct k_board) == 12 * 8 + K_MAX_RANKS / 8 + 48, "k_board");
_Static_assert(sizeof(struct k_group) == 48 + 56 + 112, "k_group");
_Static_assert(sizeof(struct k_handle) == 28 * 8, "k_handle");
_Static_assert(sizeof(struct k_op) == 216 + 224 + 32 + 24, "k_op");
_Static_assert(sizeof(struct k_route_args) == sizeof(struct k_op) + 16 + 48, "k_route_args");
_Static_assert(sizeof(struct k_layout_args) == sizeof(struct k_op) + 16 + 40, "k_layout_args");
_Static_assert(sizeof(struct k_dispatch_args) == sizeof(struct k_op) + 32 + 16 + 13 * 24 + 8,
               "k_dispatch_args");
_Static_assert(sizeof(struct k_combine_args) == sizeof(struct k_op) + 24 + 7 * 24 + 8,
               "k_combine_args");

#include "kernel/abi_far.h"
#include "kernel/abi_ll.h"

#endif
