/* SPDX-License-Identifier: MIT */
/*
 * An operation: what a call asks of kernels, from its arguments to its status. dispatch.c,
 * combine.c and route.c fill one in and give it to epi_op_issue; what is particular to a kind is
 * in a table of hooks, and everything else (number, turn, fault, launch, end) is in op.c, once.
 *
 * Order: operations that involve peers get turns when they are issued; each runs when the one before
 * it has ended, whatever streams they are on. Those of throughput mode also get numbers, 1, 2, ...
 * (K_NEXT), the same on all ranks: on the host the low half of the number is the operation's epoch in
 * the kernels; on a device the control block counts, because graphs replay operations that nobody has issued.
 */
#ifndef EPI_OP_H
#define EPI_OP_H

#include "src/ep/args.h"
#include "src/ep/backend.h"

struct epi_op;
struct epi_experts;

/*
 * The rule by which what happens to peers reaches an operation, and the other way round. In
 * throughput mode one fault ends the group (fault.c); another mode may mask the rank and go on.
 */
struct epi_fault_rule {
    /* EP_OK, or the status with which the operation ends, before or after its kernel. */
    ep_status (*check)(const struct epi_op *op);
    bool (*is_over)(const struct epi_op *op); /* there is nothing to wait for a turn for */
    /* It has its number and cannot be launched: peers count on it. */
    void (*not_launched)(const struct epi_op *op, ep_status st);
};
extern const struct epi_fault_rule epi_faults_end_group, epi_faults_end_ll;

/*
 * Hooks may be NULL. They run where the operation runs: for a call without a stream on the
 * caller's thread, else on the stream's; `issued` and `failed` on the caller's. On a device
 * nothing runs on the host after the launch, and only those two are called.
 */
struct epi_op_kind {
    enum epi_kernel kernel;
    const struct epi_fault_rule *faults; /* NULL: no peer takes part: no number, no turn */
    bool counts_itself; /* peers take part, and it has no number: its kernels keep their own */
    void (*issued)(struct epi_op *op);      /* under the mutex, with its number */
    ep_status (*before)(struct epi_op *op); /* in its turn: what is known only now */
    ep_status (*after)(struct epi_op *op);  /* from what the kernel left to a status */
    void (*clear)(struct epi_op *op);  /* refused before its kernel: outputs as if it failed */
    void (*failed)(struct epi_op *op); /* a call without a stream has */
};

#define EPI_OP_BEGIN 1u      /* the first of two calls that are one operation ... */
#define EPI_OP_FINISH 2u     /* ... and the second */
#define EPI_OP_CACHED 4u     /* counts are known from before */
#define EPI_OP_ARENA 8u      /* its output is a view: it has no capacity of its own */
#define EPI_OP_RAN 16u       /* its kernel has */
#define EPI_OP_OPEN 32u      /* this call is not to end the operation */
#define EPI_OP_DROPPED 64u   /* nobody reads what it receives */
#define EPI_OP_CAPTURED 128u /* it is in a graph; known before it is issued */

struct epi_op {
    const struct epi_op_kind *kind;
    ep_group *g;
    ep_handle *h;                /* NULL: it has none */
    struct epi_experts *experts; /* that its kernel reads; NULL: the group's own */
    uint64_t number;             /* of a kind with an epoch */
    uint64_t turn;
    struct epi_shape shape;
    uint32_t flags; /* EPI_OP_... */
    union {
        struct k_op op; /* the first fields of all: */
#define EPI_ARGS_OF(NAME, name, file, args, set, symbol) struct args name;
        K_KERNELS(EPI_ARGS_OF)
#undef EPI_ARGS_OF
    } args;
};
_Static_assert(sizeof(struct epi_op) <= EPI_TASK_BYTES, "a stream holds operations");

/* What the arguments of an operation of a routed handle are checked against. */
void epi_call_of(struct epi_call *c, const ep_handle *h, bool expanded);
/* Everything but its number and what is its kind's own; of a handle, which is routed, what it knows.
 * `asked`: workers of this call, 0: the group's. */
void epi_op_of_group(struct epi_op *op, const struct epi_op_kind *kind, ep_group *g, int asked,
                     const struct epi_load *load);
void epi_op_begin(struct epi_op *op, const struct epi_op_kind *kind, ep_handle *h, int asked,
                  const struct epi_load *load);
void epi_op_experts(struct epi_op *op, struct epi_experts *e);
/* Numbers it and launches or queues it. With stream NULL on the host the status is the operation's,
 * else that of enqueueing it. A device's peers are told if it cannot be launched. */
ep_status epi_op_issue(struct epi_op *op, void *stream);
/* On the host: the whole of an operation, in its turn; a task of a stream. */
ep_status epi_op_run(void *op);
/* On the host: an operation that its last call has left open is over. */
void epi_op_end(const struct epi_op *op);

/* ---- halves.c: a kind that can be called in two, `part` EPI_OP_BEGIN and EPI_OP_FINISH; 0: in one - */

/* EP_ERR_STATE while an operation of the group is between begin and finish. */
ep_status epi_check_not_open(const char *fn, const ep_group *g);
/* The same; but finish wants to find this kind begun with the handle. */
ep_status epi_half_admit(const char *fn, const ep_handle *h, const struct epi_op_kind *kind,
                         uint32_t part);
/* Before the handle changes: *flags is EPI_OP_CAPTURED or 0. EP_ERR_STATE: the stream of only one half
 * is being captured; or another error, if it takes no work. */
ep_status epi_half_stream(const char *fn, const ep_handle *h, uint32_t part, void *stream,
                          uint32_t *flags);
/* Finish: `c`, of which the form is known, also knows what begin has learnt, and its tensors. */
void epi_half_recall(struct epi_call *c, const ep_handle *h);
/* The tensors that it looks at. */
static inline uint32_t epi_half_roles(uint32_t part) {
    return (part != EPI_OP_FINISH ? EPI_IN : 0) |
           (part != EPI_OP_BEGIN ? EPI_OUT | EPI_LATE : 0);
}
/* Finish: what begin has issued, without what it has done. */
void epi_half_continue(struct epi_op *op, const ep_handle *h);
void epi_half_issued(const struct epi_op *op);
void epi_half_sent(struct epi_op *op);
/* It needs no finish. */
void epi_half_close(const ep_handle *h);
/* Ends what has begun and will not be finished, without what peers send, and waits for nobody. */
void epi_half_drop(ep_handle *h);

#endif
