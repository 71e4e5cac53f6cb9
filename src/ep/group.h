/* SPDX-License-Identifier: MIT */
/*
 * Inside the product layer: what a group and a handle are, and the calls between its files. The
 * public functions of operations are with their kinds, the others in api_*.c; they check their
 * arguments and call these.
 */
#ifndef EPI_GROUP_H
#define EPI_GROUP_H

#include <stdatomic.h>

#include "src/boot/boot.h"
#include "src/ep/args.h"
#include "src/ep/backend.h"
#include "src/ep/nodes.h"
#include "src/ep/op.h"
#include "src/ep/plan.h"

/* Which rank holds each expert, as kernels read it. The table is [E] the rank, [E] the index among its
 * experts, [E] experts grouped by rank, [R + 1] where each group starts. */
struct epi_experts {
    struct epi_experts *next; /* another map of the group */
    atomic_int users;         /* who will let go of it, see experts.c */
    bool captured;            /* by a graph, once */
    int num, num_local;
    bool is_default; /* the map is the default one of so many */
    uint64_t hash;   /* of the map */
    uint64_t at;     /* of the table, or of its copy in kernels' memory */
    k_i32 table[];
};

struct ep_group {
    struct ep_group_config config; /* pointers in it are not kept, except world */
    struct epi_plan plan;
    struct epi_boot *boot;
    struct epi_life *life; /* of a rank that is a thread */
    struct epi_mem *mem;
    const struct epi_backend *backend;
    struct epi_run *run; /* of the host's backend ... */
    struct epi_cuda
        *cuda;        /* ... and what the CUDA backend has instead; both know their own only */
    uint32_t process; /* that made it */
    int rank, num_ranks;
    struct epi_nodes nodes;
    struct epi_wires *wires;   /* of a group of several nodes; else NULL */
    struct k_far *far;         /* the same: what its kernels know of nodes */
    int workers, most_workers; /* of an operation: by default (CUDA, 0: by formula), at most */
    int64_t timeout_ns;
    struct k_group k;
    void *tables;                /* other arrays that k points to, or a copy in host memory */
    struct k_ll_ctl *ll_ctl;     /* kernels' memory */
    struct k_ctl *ctl;           /* of the host; on a device what its own began as */
    struct epi_experts *experts; /* of the configuration, then what routings have named */
    struct epi_masks *masks;     /* of a group with EP_GROUP_LL_MASKS; else NULL */
    _Atomic(struct k_board *) board; /* this rank's, once there is memory */

    pthread_mutex_t mutex;
    pthread_cond_t turn;
    uint64_t turns_issued, turns_ended; /* operations */
    uint64_t issued;                    /* those of throughput mode */
    ep_handle *open_handle;             /* whose operation is between begin and finish */
    int next_slot, num_handles;
    uint32_t last_tag;   /* of the handles so far */
    atomic_int num_held; /* handles that the caller has destroyed and operations still use */

    atomic_ullong fault_told; /* the operation that returned the fault; 0: none has yet */
    uint64_t fault_last;      /* issued by then */
    bool cannot_meet;         /* a growth has ended before all had come */
    atomic_bool is_orphan;    /* of a CUDA rank: none of its threads is left */
    atomic_int dead_rank;     /* -1, or who died */
    atomic_ullong
        gone[EP_MAX_RANKS / 64]; /* a bit for each that died, or left from another node */
    char dead_why[96];
};

/* Of a handle. Operations may still use what it had when they were queued, before it got more. */
struct epi_handle_memory {
    void *block;             /* that `k` of the handle points into */
    void *own_block;         /* the same where it is this process's memory */
    struct k_counts *notice; /* what kernels tell the host */
    struct epi_handle_memory *before;
};

struct ep_handle {
    ep_group *group;
    uint32_t process; /* that made it */
    struct ep_handle_config config;
    size_t bytes;      /* of kernels' memory ... */
    struct k_handle k; /* addresses of kernels' memory */
    struct epi_handle_memory memory;
    bool follows;               /* max_tokens are the group's */
    bool zeroed;                /* of a CUDA group: the block, which begins with any contents */
    struct epi_gpu_apart apart; /* the same: its routing and layout */
    atomic_int pending;         /* pieces of work queued and not ended */
    atomic_int refs;            /* the caller's and one for each of those */

    /* As issued; the calling thread's view. */
    int tokens, topk;
    int excess; /* T where it is above the group's max_tokens, and `tokens` 0; else 0 */
    struct epi_experts *experts; /* of the last routing, or the group's */
    bool by_mask, routed, dispatched;
    uint64_t counted_by;       /* operation that exchanged this routing's counts */
    int slot;                  /* of the last dispatch */
    bool expanded;             /* form of the last dispatch */
    int32_t x_dtype;           /* of the last dispatch's rows ... */
    int64_t x_cols;            /* ... and their elements */
    uint32_t routed_by;        /* ticket of the last route ... */
    bool captured;             /* ... and whether what was last enqueued is in a graph */
    struct epi_op open_op;     /* what is between begin and finish ... */
    struct epi_call open_call; /* ... and what begin was called with */
    /* Host, guarded by the group's mutex: the turn of the begin that has run last; nobody will finish
     * what is open. */
    uint64_t sent;
    bool dropped;
    atomic_bool
        lacks_rows; /* the last uncached dispatch did not fit anywhere: nothing arrived */
    atomic_llong output_rows; /* that outputs of the last dispatch lacked room for; or 0 */
};

/* ---- group.c -------------------------------------------------------------------------------- */

/* A rank that fails before it meets the others tells those that are threads of its world. */
ep_status epi_fail_before_meeting(const struct ep_group_config *config, ep_status st);
ep_status epi_group_create(ep_group **out, const struct ep_group_config *config);
void epi_group_destroy(ep_group **group);
ep_status epi_group_grow(ep_group *g, const struct ep_needs *needs);
/* Tells kernels where the group's tables are: low-latency mode's, then the peers' addresses. */
void epi_group_tables(ep_group *g, uint64_t at);

/* ---- far.c ---------------------------------------------------------------------------------- */

/* With wires: what kernels are told of nodes. */
ep_status epi_far_create(ep_group *g);

/* ---- experts.c ------------------------------------------------------------------------------ */

/* A table in host memory, and its copy where kernels read it, if that is elsewhere. */
ep_status epi_experts_create(struct epi_experts **out, const ep_group *g, int num,
                             const int32_t *map);
ep_status epi_experts_place(ep_group *g, struct epi_experts *e);
/* Those of a call: num experts held as `map` says (NULL: the default map), or with 0 the group's. The
 * first call that names them makes their table. It stays until the call lets go of it. EP_ERR_ARG
 * names a field of `tag`. */
ep_status epi_experts_find(ep_group *g, const char *tag, int num, const int32_t *map,
                           struct epi_experts **out);
#define EPI_EXPERTS_UNUSED 8 /* kept, at most, that nobody uses */
static inline void epi_experts_hold(struct epi_experts *e) {
    atomic_fetch_add(&e->users, 1);
}
static inline void epi_experts_let_go(struct epi_experts *e) {
    atomic_fetch_sub(&e->users, 1);
}
/* For an operation's kernel. */
void epi_experts_use(const struct epi_experts *e, struct k_group *k);
void epi_experts_free(ep_group *g, bool forked);

/* ---- life.c --------------------------------------------------------------------------------- */

/* The threads of a rank that is a thread; NULL for other ranks. */
struct epi_life;
ep_status epi_life_create(struct epi_life **out, ep_group *g);
/* The group goes: the ends of threads say nothing any more. */
void epi_life_close(struct epi_life **life);
/* The calling thread makes a call for the group, and is one of the rank's from now on. */
void epi_life_join(struct epi_life *life);

/* ---- fault.c -------------------------------------------------------------------------------- */

/* The group's fault as a status for operation n, with its text: the fault itself for the first to
 * ask and all that were issued by then, EP_ERR_FAULTED for later ones. EP_OK: n can go on. */
ep_status epi_group_check(ep_group *g, uint64_t n);
/* The same for the operation that would come next. */
ep_status epi_group_check_next(ep_group *g);
/* Whether a call may begin, asked once and before its arguments are looked at. On the host a fault
 * that nobody was told yet is left to the operation, whose stream may tell it. */
ep_status epi_group_admit(ep_group *g);
/* Whether the kernels, a peer or the boot have raised a fault. Not one: a peer in destroy. */
bool epi_group_faulted(ep_group *g);
/* Whether operation n is not to go on: after a fault, or without a peer that has left. */
bool epi_group_is_over(ep_group *g, uint64_t n);
void epi_group_describe(ep_group *g, struct ep_fault *f);
/* Ends all waits of this rank, and of the peers from operation n on (all: 0). Operation n returns
 * the status itself. */
void epi_group_raise(ep_group *g, ep_status status, int subject, uint64_t n);
/* Of a host group: operation n has ended here; and whether it has at a rank. */
void epi_group_note_end(ep_group *g, uint64_t n);
bool epi_group_has_ended(const ep_group *g, int rank, uint64_t n);
/* No thread of this rank is left, unless it has work under way; or there is one again. */
void epi_group_set_orphan(ep_group *g, bool is_orphan);
/* Tells the peers that this rank takes no part in operations after `last`. */
void epi_group_leave(ep_group *g, uint64_t last);
/* There is memory: from now on boards are read and written. */
void epi_group_open_board(ep_group *g);
/* A rank of another node has said this to all. */
void epi_group_told(ep_group *g, uint64_t word);
/* What this rank, or its node, has raised and other nodes have to know; 0: nothing. */
uint64_t epi_group_raised(const ep_group *g);
/* Whether a rank has died, or left from another node. */
bool epi_group_is_gone(const ep_group *g, int rank);
/* A rank has died; from any thread. */
void epi_group_died(ep_group *g, int rank);
/* A wait has become long; `word` is {epoch | phase : 16 | peer : 16}. */
void epi_group_log_late(const ep_group *g, k_i32 kind, k_u64 word, k_i64 waited_ns);
/* From a kernel on the host: the same, once for each operation. */
void epi_group_late(const struct k_group *g, k_i32 kind, k_u64 word, k_i64 waited_ns);

const char *epi_phase_name(int phase);
const char *epi_operation_name(int op);

/* ---- masks.c -------------------------------------------------------------------------------- */

struct epi_masks;
/* Nothing, unless the group has masks. Collective. */
ep_status epi_masks_create(ep_group *g, const struct epi_exchange *x);
/* Of whom low-latency operations have gone on without, as a status, once; EP_OK: there is no news. */
ep_status epi_masks_tell(ep_group *g);
/* Whether there is a mask or a dead rank, so that operations of throughput mode are refused. */
bool epi_masks_bar(const ep_group *g);
/* The same as a status. */
ep_status epi_masks_refuse(ep_group *g);
/* Behind the control block of low-latency mode, wherever that lies. */
static inline struct k_ll_peer *epi_masks_peers(struct k_ll_ctl *ctl) {
    return (struct k_ll_peer *)(ctl + 1);
}

/* ---- ll.c ----------------------------------------------------------------------------------- */

/* What all kernels of low-latency mode are given. */
void epi_ll_fill(struct epi_op *op, struct k_ll *ll, int max_tokens);
/* EP_ERR_STATE for a kernel that has refused its call, once. */
ep_status epi_ll_tell_refused(ep_group *g);

/* ---- handle.c ------------------------------------------------------------------------------- */

ep_status epi_handle_create(ep_handle **out, ep_group *g,
                            const struct ep_handle_config *config);
/* Memory that a handle's kernels use. */
size_t epi_handle_bytes(const ep_group *g, const struct ep_handle_config *config);
void epi_handle_destroy(ep_handle **handle);
/* Room for what the group has grown to, before it is routed. */
ep_status epi_handle_fit(ep_handle *h);
/* It is routed with these, which it lets go of later. */
void epi_handle_take_experts(ep_handle *h, struct epi_experts *e);
/* It stays until this is released, also if the caller destroys it. */
void epi_handle_hold(ep_handle *h);
void epi_handle_release(ep_handle *h);
ep_status epi_handle_status(ep_handle *h);
ep_status epi_handle_counts(ep_handle *h, int64_t *rows, int32_t *per_source,
                            int32_t *per_expert);
/* Blocks until the counts of the last uncached dispatch are known; EP_ERR_CAPACITY: it did not fit
 * and is over. Or what else enqueued work has found. `rows` may be NULL. */
ep_status epi_handle_await_fit(ep_handle *h, int64_t *rows);
ep_status epi_handle_arena(const ep_handle *h, uint32_t flags, ep_dtype dtype, int64_t cols,
                           struct ep_tensor *view);
/* EP_ERR_CAPACITY for tokens or rows that do not fit the group's maxima somewhere. */
ep_status epi_fail_need(ep_group *g, const struct k_counts *c);
void epi_handle_needs(const ep_handle *h, struct ep_needs *needs);
/* Whether a word {ticket | ..} of a notice is that of `ticket`. */
bool epi_is_known(const k_u64 *word, uint64_t ticket);

/* ---- route.c -------------------------------------------------------------------------------- */

/* EP_ERR_ARG for selection `number` (t * topk + k) of a routing; `then` ends the sentence. */
ep_status epi_bad_selection(const ep_handle *h, int topk, uint64_t number, int64_t id,
                            const char *then);

#endif
