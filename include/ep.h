/* SPDX-License-Identifier: MIT */
/*
 * ep.h - libep, expert-parallel communication: the whole public interface.
 *
 * A Mixture-of-Experts layer sends each token to the few ranks that hold its experts (dispatch)
 * and brings the experts' answers back (combine). This header is the manual of the library that
 * does both; it is meant to be read from top to bottom. It is C99, it can be included from C++,
 * cffi parses it, and it knows neither CUDA nor torch: a stream is a void pointer.
 *
 * The life of a program:
 *
 *     struct ep_group_config cfg = EP_GROUP_CONFIG_INIT;
 *     cfg.num_experts = 256; cfg.max_tokens = 4096;
 *     cfg.max_topk = 8; cfg.max_row_bytes = 14336;
 *     ep_group *group;
 *     ep_group_create(&group, &cfg);                  // collective: all ranks meet
 *     ep_handle *handle;
 *     ep_handle_create(&handle, group, NULL);         // the routing of one micro-batch
 *     ep_handle_route(handle, &routing, stream);      // from expert ids, local
 *     ep_dispatch(handle, &dispatch_args, stream);    // collective: tokens go to their experts
 *     ...the experts compute...
 *     ep_combine(handle, &combine_args, stream);      // collective: answers come back, summed
 *     ep_handle_destroy(&handle);
 *     ep_group_destroy(&group);                       // waits for no other rank
 *
 * Words. A *rank* is one member of a *group*. A *token* is an index into a rank's input; its
 * bytes are a *row*. T is a rank's number of tokens, K the experts per token (top-k), E the
 * experts of the whole layer, L the experts of one rank, R the ranks of the group. A *handle*
 * is the routing of one micro-batch. The *arena* is the memory of a rank that its peers map.
 *
 * Rules that hold everywhere:
 *   - Every function returns an ep_status unless it cannot fail. Nothing aborts, exits or traps
 *     on a caller's argument. ep_last_error() says what was wrong, with the value and the rule.
 *   - Outputs are set on success only, unless an argument's comment says otherwise.
 *   - Structs start with their size. Initialise them with the EP_..._INIT macro of their name,
 *     so that fields added later are zero, which always means "as before" or "default".
 *   - What is stable, from the first release on: the functions, the values of enums and macros,
 *     and the fields of structs, which only grow at their end, by multiples of 8 bytes. A struct
 *     that is smaller than this library's is taken as if the rest were zero; a larger one if the
 *     rest is zero, else EP_ERR_VERSION; of an output as much is written as the caller's struct
 *     holds. struct ep_tensor does not grow: libep writes whole ones.
 *   - Destroy functions take the address of the pointer, clear it, accept NULL and cannot fail.
 *   - "Collective": every rank of the group calls it, in the same order relative to the other
 *     collective calls of that group. Arguments that must agree are named; libep checks them
 *     and returns EP_ERR_MISMATCH naming the field and the ranks where they do not.
 *   - "Enqueues": with a stream the call returns once the work is queued and the memory it
 *     names must stay valid until the stream has passed it; with stream NULL on a host group
 *     the work is done when the call returns.
 *   - The environment is read by what creates a group or a world, on the caller's thread, and never
 *     later, so that other threads may change it. A program with rights that its user has not
 *     (setuid, file capabilities) reads none of it.
 *   - The log (EP_LOG) goes to stderr. It neither waits for a reader nor raises a signal: lines
 *     that stderr does not take are lost, and their number is said when it does again.
 *   - Every wait has a deadline (ep_group_config.timeout_ms). Nothing waits for ever.
 *   - fork(): what a process has made stays its own. In a child (of fork(), or of clone() without
 *     shared memory) destroy functions free the child's copy and tell nobody, functions that return
 *     a status return EP_ERR_STATE, and the arena is not mapped: touching a view of it is SIGSEGV.
 *     The parent's group goes on as if there were no child, and its memory is given back when it is
 *     destroyed, whether or not children live. A child may make groups of its own, of host ranks.
 *     A world in which no rank was at fork() serves in the child, too.
 *     Between vfork() and exec nothing of libep may be called.
 *   - A group may be used from several threads, one call at a time per handle; calls that are
 *     collective must be issued in the same order on every rank, so threads have to agree on
 *     it.
 */
#ifndef EP_H
#define EP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EP_VERSION_MAJOR 0
#define EP_VERSION_MINOR 1
#define EP_VERSION_PATCH 0

/* Limits that no configuration lifts. */
#define EP_MAX_RANKS 1024
#define EP_MAX_TOPK 64
#define EP_ROW_ALIGN 16 /* bytes; a row's size is a multiple of it */

/* ---------------------------------------------------------------------------------------------
 * Status
 * ------------------------------------------------------------------------------------------ */

typedef enum ep_status {
    EP_OK = 0,
    EP_AGAIN = 1,             /* not yet; nothing is wrong, ask again */
    EP_ERR_ARG = -1,          /* an argument breaks its rule */
    EP_ERR_STATE = -2,        /* right call, wrong time (a handle used before its dispatch) */
    EP_ERR_CAPACITY = -3,     /* more tokens or rows than there is room for */
    EP_ERR_NOMEM = -4,        /* memory could not be had, or the plan exceeds its limit */
    EP_ERR_TIMEOUT = -5,      /* a living peer was waited for until the deadline */
    EP_ERR_PEER = -6,         /* a peer's process died or left */
    EP_ERR_MISMATCH = -7,     /* the ranks disagree about something they must agree on */
    EP_ERR_FAULTED = -8,      /* the group has faulted before; see ep_group_fault */
    EP_ERR_UNSUPPORTED = -9,  /* not on this machine or not in this build */
    EP_ERR_SYSTEM = -10,      /* the operating system refused something */
    EP_ERR_VERSION = -11,     /* a struct of a newer header asks for what this library lacks */
    EP_ERR_INTERRUPTED = -12, /* cancelled by ep_group_abort */
    EP_ERR_INTERNAL = -13     /* a bug of libep */
} ep_status;

/* The version of the library that is loaded: major * 10000 + minor * 100 + patch. */
uint32_t ep_version(void);

/* The name of a status, "EP_ERR_ARG". Never NULL; static. */
const char *ep_status_string(ep_status status);

/*
 * What went wrong in the last libep call of this thread that returned an error: one sentence
 * with the argument, its value and the rule, or the rank, the phase and the time waited. Never
 * NULL; empty if nothing failed. Valid until this thread's next libep call.
 */
const char *ep_last_error(void);

/* ---------------------------------------------------------------------------------------------
 * Tensors
 * ------------------------------------------------------------------------------------------ */

typedef enum ep_dtype {
    EP_DTYPE_NONE = 0,
    EP_BF16 = 1,
    EP_F16 = 2,
    EP_F32 = 3,
    EP_F8E4M3 = 4,
    EP_F8E5M2 = 5,
    EP_U8 = 6,  /* opaque bytes, e.g. packed FP4, UE8M0 scales; also masks (0 or not 0) */
    EP_I16 = 7, /* 16-bit scales of any meaning */
    EP_I32 = 8,
    EP_I64 = 9
} ep_dtype;

/* Bytes of one element, 0 for a value that is no dtype. */
size_t ep_dtype_bytes(ep_dtype dtype);

#define EP_MAX_DIMS 4

/*
 * Memory with a shape. The tensor is borrowed: libep reads the struct during the call and the
 * memory until the enqueued work is done, and owns neither. Strides are in elements. Where a
 * comment says "rows contiguous", the last stride must be 1, the rows must not overlap, and
 * each row must start at a multiple of EP_ROW_ALIGN bytes.
 */
struct ep_tensor {
    uint32_t size; /* sizeof(struct ep_tensor) */
    int32_t dtype; /* ep_dtype */
    void *data;    /* may be NULL when a dimension is 0 */
    int32_t ndim;  /* 1..EP_MAX_DIMS */
    int32_t reserved;
    int64_t shape[EP_MAX_DIMS];
    int64_t stride[EP_MAX_DIMS];
};
#define EP_TENSOR_INIT                                                                         \
    {                                                                                          \
        sizeof(struct ep_tensor), 0, NULL, 0, 0, {0}, {                                        \
            0                                                                                  \
        }                                                                                      \
    }

/* Fills in a contiguous tensor of one or two dimensions; cannot fail, checked where used. */
void ep_tensor_1d(struct ep_tensor *t, ep_dtype dtype, void *data, int64_t n);
void ep_tensor_2d(struct ep_tensor *t, ep_dtype dtype, void *data, int64_t rows, int64_t cols);

/* ---------------------------------------------------------------------------------------------
 * Group
 * ------------------------------------------------------------------------------------------ */

typedef struct ep_group ep_group;
typedef struct ep_world ep_world;
typedef struct ep_handle ep_handle;
typedef struct ep_stream ep_stream;
typedef struct ep_event ep_event;

#define EP_DEVICE_HOST 0 /* ranks are processes or threads, memory is ordinary memory */
#define EP_DEVICE_CUDA 1 /* ranks own CUDA devices */

/*
 * The meeting place of ranks that are threads of one process. Created once, passed to every
 * rank's ep_group_create, destroyed after every group made from it. Owned by the caller.
 *
 * A rank of a world lives as long as one of the threads that have made calls for its group (create,
 * handles, route, operations) and while it has work queued. When the last of them has ended without
 * ep_group_destroy, peers that wait for the rank get EP_ERR_PEER after a second or two. A
 * thread that takes a group over therefore makes a call for it before the other ends, or soon.
 * EP_ERR_ARG: num_ranks outside 1..EP_MAX_RANKS. EP_ERR_NOMEM.
 */
ep_status ep_world_create(ep_world **out, int num_ranks);
void ep_world_destroy(ep_world **world);

/*
 * The caller's own allgather: gathers `bytes` bytes of every rank into out[num_ranks][bytes],
 * in rank order. Returns 0 on success. Called a few times during ep_group_create, by its
 * thread.
 */
typedef int (*ep_allgather_fn)(void *ctx, const void *in, void *out, size_t bytes);

/* Flags of ep_group_config. */
#define EP_GROUP_EXPANDED_VIEW 1u /* room in the arena for expanded output as a view */
#define EP_GROUP_LL_EXACT 2u /* room for answers of low-latency combines with EP_LL_EXACT */
#define EP_GROUP_LL_MASKS 4u /* low-latency operations go on without ranks that are gone */

/*
 * How a group is made. Ranks meet in one of four ways, the first that is set:
 *   world      threads of one process; rank is the caller's
 *   allgather  the caller's communication; rank and num_ranks are the caller's
 *   address    "host:port" or "[v6]:port" where rank 0 listens, the same on all ranks; rank and
 *              num_ranks are the caller's
 *   none       the environment of the launcher: RANK, WORLD_SIZE, MASTER_ADDR and EP_PORT (or
 *              MASTER_PORT + 1), as set by `ep run` and torchrun, or the variables of Open MPI,
 *              PMIx and Slurm. rank and num_ranks must be -1.
 * Processes of one host meet over an abstract Unix socket, whose kernel tells each side which user
 * the other is: only processes of one user meet, in one network namespace, and no port is opened.
 * Where the address is not a loopback address and the launcher does not say that all ranks are on
 * this host, they do so, too, unless EP_JOB_KEY is set: then over TCP, where both sides prove that they hold
 * it (16 to 200 characters, the same on all ranks; it does not travel), and rank 0 listens
 * on those addresses of its host that the name resolves to and whose interface EP_IFNAME names. Where
 * the launcher says that there are several hosts they meet over TCP without it, and a warning says what
 * that means. An allgather gives ranks of several hosts a key by itself; it is then called twice, and
 * rank 0 listens on its host's addresses (of EP_IFNAME) at a port of the kernel's choice.
 * By the environment no two jobs meet: a job is named by its launcher's id (torchrun's run id, Open
 * MPI's, PMIx's or Slurm's), and where there is none (MPICH, Intel MPI, torchrun's static rendezvous,
 * RANK set by hand) by the process that started its ranks, which is found past shells and programs
 * in between. If nothing starts them all, such as two terminals, EP_JOB must name the job. Of
 * launchers that disagree the innermost is believed (ARCHITECTURE.md has the table), except that
 * RANK and WORLD_SIZE of one rank, in the ranks of another launcher, are EP_ERR_ARG.
 * MASTER_ADDR may have blanks, brackets, "tcp://" or a port around it; it is not needed where the
 * launcher says that all ranks are on this host.
 * A rank whose configuration is refused says so to the others, where it is known who they are.
 * Everything from `num_experts` on must agree on all ranks, unless it says otherwise.
 */
struct ep_group_config {
    uint32_t size;
    uint32_t flags;       /* EP_GROUP_... */
    int32_t device;       /* EP_DEVICE_... */
    int32_t rank;         /* -1: from the environment */
    int32_t num_ranks;    /* -1: from the environment */
    int32_t device_index; /* CUDA: the device of this rank, as the process numbers them. -1:
                                  that of the calling thread's current context, or where it has
                                  none, LOCAL_RANK or else rank, modulo the visible devices */
    ep_world *world;      /* borrowed until the group is destroyed */
    ep_allgather_fn allgather; /* used during create only */
    void *allgather_ctx;
    const char *address;        /* borrowed during create */
    const char *job;            /* two jobs with different names never meet; NULL: EP_JOB or
                                     the launcher's job id. 1 to 200 characters. By the
                                     environment it is added to those: groups made at the same
                                     time by threads of a process need different names */
    int32_t num_experts;        /* E >= 1; calls may name fewer, and another map */
    int32_t max_tokens;         /* per rank and operation, >= 1 */
    int32_t max_topk;           /* 1..EP_MAX_TOPK; or 0 if every routing is a mask */
    int32_t max_row_bytes;      /* of dispatch and of combine; a multiple of EP_ROW_ALIGN */
    int32_t max_scale_bytes;    /* per row; 0: no scales */
    int32_t num_slots;          /* arena views that may be alive at once; 0: 2 */
    const int32_t *expert_rank; /* [E] the rank that holds each expert, any map; borrowed during
                                     create. NULL: E / R experts to each rank in order, the
                                     first E % R ranks one more */
    int64_t max_recv_rows;      /* rows one rank can receive in one dispatch; 0: the worst case,
                                     R * max_tokens */
    int64_t max_expanded_rows;  /* rows of an expanded view; 0: the worst case. Only with
                                     EP_GROUP_EXPANDED_VIEW */
    int64_t memory_limit_bytes; /* create refuses a larger arena; 0: no limit */
    int64_t timeout_ms;         /* how long a living peer is waited for; 0: EP_TIMEOUT_MS or
                                     100000; at least 100 */
    int32_t num_workers;        /* host: threads that run a rank's kernels, CUDA: SMs; 0: the
                                     library's choice (docs/performance.md has the formula).
                                     May differ between ranks */
    int32_t mask_routing;       /* not 0: handles may be routed by a mask (memory for up to R
                                     destinations per token instead of min(R, K)) */
    int32_t ll_max_tokens;      /* the most tokens per rank of a low-latency operation; 0: the
                                     group has no low-latency mode, and no memory for it */
    int32_t reserved;
    int64_t ll_timeout_ms; /* with EP_GROUP_LL_MASKS: how long a low-latency operation waits for
                                a rank before it masks it; 0: timeout_ms */
    int64_t most_tokens;   /* ceiling of max_tokens for ep_group_grow; 0: it does not grow */
    int64_t
        most_recv_rows; /* the same of max_recv_rows; 0: that stays, or stays the worst case */
};
#define EP_GROUP_CONFIG_INIT                                                                   \
    {                                                                                          \
        sizeof(struct ep_group_config), 0, 0, -1, -1, -1, NULL, NULL, NULL, NULL, NULL, 0, 0,  \
            0, 0, 0, 0, NULL, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0                                  \
    }

/* What a configuration costs, to the byte, before anything is allocated. */
struct ep_plan_info {
    uint32_t size;
    int32_t num_channels;   /* parts in which a rank's tokens travel, at most */
    int64_t control_bytes;  /* of the arena: words by which ranks talk */
    int64_t recv_bytes;     /* of the arena: received rows, all slots */
    int64_t sidecar_bytes;  /* of the arena: ids, weights, scales of received rows */
    int64_t combine_bytes;  /* of the arena: answers on their way back */
    int64_t expanded_bytes; /* of the arena: expanded views, all slots */
    int64_t arena_bytes;   /* the sum of the above and ll_bytes, rounded up to whole pages; of a
                                   group that can grow more addresses are taken, and on a
                                   GPU pages (2 MiB) are whole at the end of each part */
    int64_t local_bytes;   /* ordinary memory of a rank for tables and num_workers workers
                                   (0: one), without handles */
    int64_t handle_bytes;  /* memory of the largest handle (ep_handle_plan) */
    int64_t max_recv_rows; /* as resolved */
    int64_t max_expanded_rows; /* as resolved, 0 without EP_GROUP_EXPANDED_VIEW */
    int64_t max_combine_rows;  /* answers one rank can receive */
    int64_t sidecar_row_bytes; /* stride of a row's sidecar */
    int64_t ll_bytes;          /* of the arena: low-latency mode */
    int64_t ll_handle_bytes;   /* memory of the caller's for each low-latency dispatch */
};
#define EP_PLAN_INFO_INIT                                                                      \
    { sizeof(struct ep_plan_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/*
 * Computes the plan of a configuration whose num_ranks is set (rank and the way to meet are not
 * looked at) and are of one node: where they are of several, each has memory for packets, and more for
 * answers. Local, pure, not blocking. EP_ERR_ARG: a field breaks its rule.
 * EP_ERR_NOMEM: the arena would exceed memory_limit_bytes; the message says which field to
 * lower; *info is filled in all the same.
 */
ep_status ep_plan(const struct ep_group_config *config, struct ep_plan_info *info);

/*
 * Creates a group. Collective and blocking. On failure *out is untouched and nothing is left.
 * EP_ERR_ARG, EP_ERR_VERSION: the configuration. EP_ERR_MISMATCH: ranks differ in a field that
 * must agree (all ranks get it). EP_ERR_TIMEOUT: not all ranks came; the message names the
 * missing. EP_ERR_SYSTEM: e.g. the address is in use. EP_ERR_NOMEM: the message names what leaves
 * too little, free memory, the limit of a cgroup (containers, batch systems) or a ulimit.
 * EP_ERR_PEER: a rank failed or died while the group formed. EP_ERR_UNSUPPORTED: the device or
 * topology is not available, or ranks of one host are of several users; the message says what is
 * missing and how to get it. Signals, also those of a timer, do no harm.
 * No wait for other ranks in here lasts longer than timeout_ms and 2 seconds: those are for
 * learning who is missing, and for parting from a rank that does not answer. A rank whose own
 * arguments are wrong tries for up to 2 seconds to tell the others, where the address is known.
 */
ep_status ep_group_create(ep_group **out, const struct ep_group_config *config);

/*
 * Destroys a group and frees all it owns. Every rank does, when it likes: a rank does not wait
 * for the others to call it, so several groups may be destroyed in any order. It waits for its
 * own operations that are queued, at most as long as the timeout (after ep_group_abort, until they
 * have ended with that), and to part with its peers, at most two seconds. What this rank has sent still reaches the peers; an operation that one of
 * them issues afterwards ends there with EP_ERR_PEER. Handles, streams and events of the group
 * must have been destroyed before. Safe after any fault.
 */
void ep_group_destroy(ep_group **group);

/* Local, not blocking; 0 or -1 for NULL. The device is the one that a CUDA group has chosen, -1 of a
 * host group. */
int ep_group_rank(const ep_group *group);
int ep_group_num_ranks(const ep_group *group);
int ep_group_num_local_experts(const ep_group *group); /* by the group's own map */
int ep_group_device_index(const ep_group *group);

/* The plan the group was made with. Local. EP_ERR_ARG, EP_ERR_VERSION. */
ep_status ep_group_plan(const ep_group *group, struct ep_plan_info *info);

/*
 * A CUDA group's own stream (CUstream), of the highest priority: for work that is to overlap with
 * the caller's. Owned by the group. NULL for a host group.
 */
void *ep_group_stream(const ep_group *group);

/*
 * Ends every wait of this group, here and at the peers, with EP_ERR_INTERRUPTED. Local, not
 * blocking, callable from any thread (not from a signal handler). The group is faulted after
 * it.
 */
ep_status ep_group_abort(ep_group *group);

/* What ended a group. `status` is EP_OK while nothing has. */
struct ep_fault {
    uint32_t size;
    int32_t status;    /* ep_status of the first fault */
    int32_t rank;      /* the rank that died, is late or disagrees; -1: none in particular */
    int32_t reporter;  /* the rank that noticed first */
    int32_t operation; /* EP_OP_... in which it was noticed */
    uint32_t epoch;    /* number of that operation in the group, from 1 */
    int64_t waited_ms; /* how long the reporter had waited */
    char phase[32];    /* what it waited for: "ready", "counts", "bases", "rows", "answers",
                          "consumed", "meeting" */
    char message[256]; /* one sentence */
};
#define EP_FAULT_INIT                                                                          \
    {                                                                                          \
        sizeof(struct ep_fault), 0, 0, 0, 0, 0, 0, {0}, {                                      \
            0                                                                                  \
        }                                                                                      \
    }

#define EP_OP_NONE 0
#define EP_OP_DISPATCH 1
#define EP_OP_COMBINE 2
#define EP_OP_LL_DISPATCH 3
#define EP_OP_LL_COMBINE 4
#define EP_OP_LL_BARRIER 5

/*
 * The group's fault, if any. Local, not blocking, callable at any time from any thread: a poll.
 * After a fault every operation returns EP_ERR_FAULTED; the group can only be destroyed.
 */
ep_status ep_group_fault(ep_group *group, struct ep_fault *fault);

/* Sums since the group was created, of operations that have finished. */
struct ep_group_stats {
    uint32_t size;
    uint32_t reserved;
    uint64_t num_dispatches;
    uint64_t num_combines;
    uint64_t rows_sent;         /* dispatch: rows that left for any rank, this one included */
    uint64_t rows_received;     /* dispatch */
    uint64_t remote_bytes_sent; /* payload to other ranks, dispatch and combine */
    uint64_t local_bytes_sent;  /* payload to this rank itself */
    uint64_t wait_ns;     /* time this rank's kernels waited for peers, summed over warps */
    uint64_t dispatch_ns; /* time inside dispatch kernels, one operation at a time */
    uint64_t combine_ns;  /* time inside combine kernels */
};
#define EP_GROUP_STATS_INIT                                                                    \
    { sizeof(struct ep_group_stats), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* Local, not blocking. */
ep_status ep_group_stats(ep_group *group, struct ep_group_stats *stats);

/* ---------------------------------------------------------------------------------------------
 * Streams and events of host groups
 *
 * A host group has the same asynchrony as a GPU: work is queued on streams, runs in order on
 * each, and streams are ordered among each other by events. A CUDA group takes a CUstream where
 * a function has `stream` (NULL: the legacy default stream; the call returns when the work is
 * queued), and CUDA's own events; ep_stream and ep_event are not for it.
 * ------------------------------------------------------------------------------------------ */

/* Creates a stream: one thread that runs what is queued, in order. Local.
 * EP_ERR_UNSUPPORTED: the group is not a host group. EP_ERR_NOMEM, EP_ERR_SYSTEM. */
ep_status ep_stream_create(ep_stream **out, ep_group *group);

/* Waits for the queued work, then frees the stream. Called by a function that the stream itself
 * runs it does not wait: the stream goes when all that is queued has run. */
void ep_stream_destroy(ep_stream **stream);

/* Queues a call of fn(arg). Local, not blocking: any number of calls, operations, records and
 * waits may be queued. EP_ERR_NOMEM. */
ep_status ep_stream_run(ep_stream *stream, void (*fn)(void *arg), void *arg);

/*
 * Blocks until all that was queued so far has run. Returns the first error of the operations
 * queued since the last synchronisation, with its text in ep_last_error(). EP_ERR_STATE: called
 * by a function that the stream itself runs.
 */
ep_status ep_stream_sync(ep_stream *stream);

/* An event marks a point in a stream. Created unrecorded, which counts as passed. Local.
 * EP_ERR_UNSUPPORTED: the group is not a host group. EP_ERR_NOMEM. */
ep_status ep_event_create(ep_event **out, ep_group *group);
void ep_event_destroy(ep_event **event);
/* Marks the end of what is queued on `stream` now; may be called again. Not blocking.
 * EP_ERR_NOMEM. */
ep_status ep_event_record(ep_event *event, ep_stream *stream);
/* EP_OK: passed; EP_AGAIN: not yet. Not blocking. */
ep_status ep_event_query(ep_event *event);
/* Blocks the caller until the event has passed. EP_ERR_STATE: called by a function of the very
 * stream on which the event lies, before it. */
ep_status ep_event_sync(ep_event *event);
/* What is queued on `stream` after this call runs after the event has passed. Not blocking.
 * EP_ERR_NOMEM. */
ep_status ep_stream_wait(ep_stream *stream, ep_event *event);

/* ---------------------------------------------------------------------------------------------
 * Routing: handle and layout
 * ------------------------------------------------------------------------------------------ */

/*
 * CUDA groups, beside the rules above:
 *   - One process per GPU, several processes on one GPU, or several ranks in one process (threads,
 *     ep_world), on GPUs of their own or on one, whose SMs they then share.
 *   - Set CUDA_DEVICE_MAX_CONNECTIONS=32 before the process first uses CUDA. With fewer hardware
 *     queues a stream may stand behind another that waits: an operation behind one of a rank of the
 *     same process, which waits for it; ep_group_stats, ep_handle_counts with rows_per_source or
 *     rows_per_expert, and a new handle's first operation behind a stream that the caller holds.
 *   - Kernels of groups and ranks wait for each other, so all that the live groups of a process may
 *     run at once on a device must fit there. Create promises a rank num_workers SMs, or, where that
 *     is 0, what the formula wants for rows of max_row_bytes, at most half of what other groups
 *     leave; EP_ERR_ARG says what was promised to whom. Processes do not see each other: where
 *     several share a GPU by MPS, let num_workers of all of them have a sum of at most its SMs.
 *   - Operations of several groups on one stream run in the order of the calls: it must be the same
 *     on all ranks, as if they were of one group. Otherwise give each group a stream.
 *   - Calls of CUDA that wait for all streams of a device (cudaFree, cudaFreeHost,
 *     cudaHostUnregister, cudaDeviceSynchronize, loading a module, which the first launch of a
 *     kernel does without CUDA_MODULE_LOADING=EAGER, an allocator that empties its cache) wait for
 *     operations there, and hold up the launches of all threads meanwhile. Where ranks are threads
 *     that share a GPU, or whose GPUs have peer access enabled, such a call of one rank after
 *     another's collective call and before its own ends with the timeout of both. libep makes such
 *     calls in ep_group_create and ep_group_destroy only: to load kernels that the process has not
 *     loaded for the device, and to give memory back when no group of the process has anything
 *     under way or captured.
 *   - Tensors are memory that the group's device can use: its own, managed, or pinned host memory;
 *     anything else is EP_ERR_ARG. A host group refuses device memory.
 *   - Kernels are compiled when a group is created, at the latest; no operation compiles,
 *     allocates or waits for the device, but the first routing that names other experts.
 *   - What the enqueued work finds out (a bad expert id, rows that did not fit) is told by
 *     ep_handle_status and ep_handle_counts, a fault also by ep_group_fault and by the next
 *     operation. Work on the stream goes on in bounds.
 *   - Graphs: ep_handle_route, ep_handle_layout, dispatch and combine (in one call or two) may be
 *     captured and replayed; routing and data may change between replays, shapes and addresses not.
 *     Every rank replays alike. A replay is ordered with the group's other operations by its stream
 *     only, and two operations of a group must not run at the same time on one rank. The handle and
 *     the group must outlive the graph and its replays, which destroy does not wait for. Handles may
 *     be created and destroyed meanwhile, which is no part of the graph; groups must not;
 *     ep_handle_counts is refused.
 *   - Rows move by bulk copies on sm_90 and later, through registers on older GPUs, or on any with
 *     DISABLE_SM90_FEATURES=1 in the environment when the group is created.
 *   - After a fault of the group the process can use its GPU as before.
 */

/* What a handle must be able to hold; zero means the group's maximum. */
struct ep_handle_config {
    uint32_t size;
    int32_t max_tokens; /* at most the group's */
    int32_t max_topk;   /* at most the group's */
    uint32_t flags;     /* EP_HANDLE_... */
};
#define EP_HANDLE_CONFIG_INIT                                                                  \
    { sizeof(struct ep_handle_config), 0, 0, 0 }

/* Count an id outside 0..E-1 as not selected instead of as an error. */
#define EP_HANDLE_LENIENT_IDS 1u

/*
 * Creates a handle: memory for the routing of one micro-batch, allocated here and never later.
 * Local: each rank creates and destroys handles as it likes. What must agree is when a routing
 * was first dispatched: a cached dispatch or a combine takes on every rank a handle whose counts
 * were exchanged by the same operation of the group, else it is EP_ERR_MISMATCH. config may be
 * NULL. Any number of handles may be alive. Does not wait for a device. The group must outlive
 * the handle.
 * EP_ERR_ARG, EP_ERR_VERSION: the configuration. EP_ERR_NOMEM.
 */
ep_status ep_handle_create(ep_handle **out, ep_group *group,
                           const struct ep_handle_config *config);

/* Memory that such a handle would take: the less, the fewer tokens and experts per token it must
 * hold. Local, not blocking. EP_ERR_ARG, EP_ERR_VERSION: the configuration. */
ep_status ep_handle_plan(const ep_group *group, const struct ep_handle_config *config,
                         int64_t *bytes);

/* Frees the handle. Local, not blocking: operations that were enqueued end as if it were still
 * there, and its memory goes when they have. An operation that has begun and not finished ends without
 * what it would receive, for which nobody waits; the peers' ends as if that was received. */
void ep_handle_destroy(ep_handle **handle);

/*
 * What the work that was enqueued for this handle has found so far. Local, not blocking.
 * EP_OK: nothing is wrong. EP_AGAIN: the routing or the counts of the last call are not known
 * yet. EP_ERR_ARG: an id outside 0..E-1, which was treated as -1. EP_ERR_CAPACITY: tokens or
 * rows that did not fit the group's maxima somewhere (nothing was sent; told until the handle is routed
 * again), or this rank's outputs (told once, as are ids; also by ep_handle_counts). Or the group's fault.
 * Of a host group only what ep_stream_sync has not told yet; calls without a stream tell
 * themselves.
 */
ep_status ep_handle_status(ep_handle *handle);

/*
 * Where the tokens of this rank go. Set topk_ids, or token_in_rank, not both.
 *   topk_ids       [T][K] EP_I32 or EP_I64, any strides. Global expert ids; -1 = not selected.
 *                  An expert named twice by a token counts twice for that expert; the row still
 *                  travels once per rank.
 *   token_in_rank  [T][R] EP_U8, any strides: not 0 = the token goes to that rank. Needs
 *                  mask_routing in the group's configuration; gives no expert counts and no
 *                  expanded output.
 *   num_experts    E of this routing, at most the group's; 0: the group's number and map. E, L and
 *                  expert ids mean this one wherever the handle is used
 *   expert_rank    [E] the rank that holds each expert; borrowed during the call. NULL: the default
 *                  map, as in ep_group_config. No rank may hold more experts than one does in the
 *                  group's map
 * The experts must agree on all ranks: the first dispatch compares E, or a hash of 16 bits of a map
 * that is not the default one. The group keeps a table of a number or map, 12 bytes for each expert,
 * while a handle that was last routed with it lives, or for good if a call with it was captured, and of
 * the others the 8 that were named last; a CUDA group copies a new one to the device in this call, also
 * in a capture, and waits for the copy.
 */
struct ep_routing {
    uint32_t size;
    int32_t num_experts;
    const struct ep_tensor *topk_ids;
    const struct ep_tensor *token_in_rank;
    const int32_t *expert_rank;
};
#define EP_ROUTING_INIT                                                                        \
    { sizeof(struct ep_routing), 0, NULL, NULL, NULL }

/*
 * Computes the routing of a micro-batch into the handle, which may have been routed before. T above
 * the group's max_tokens is no error yet, unless the stream is being captured, because the peers count
 * on this rank: its dispatch tells all of them (EP_ERR_CAPACITY), and ids are not looked at.
 * Local; enqueues on `stream`; on a GPU it may run beside operations of other handles. The ids are
 * copied: they may change once the stream has passed.
 * EP_ERR_ARG: shape, type, T over the handle's max_tokens, experts; or an id outside 0..E-1 (and not -1): the
 * message names token and k. The ids are looked at by the enqueued work: with stream NULL the error is
 * returned here and the handle is left unrouted; with a stream it is returned by
 * ep_stream_sync, and the operations queued behind it treat that id as -1, so that peers are
 * not kept waiting and nothing is written out of bounds.
 * EP_ERR_STATE: an operation between begin and finish uses the handle.
 */
ep_status ep_handle_route(ep_handle *handle, const struct ep_routing *routing, void *stream);

/* L by the handle's last routing; by the group's map if there was none. Local; 0 for NULL. */
int ep_handle_num_local_experts(const ep_handle *handle);

/*
 * The local counts of a routed handle, as tensors. Each may be NULL.
 *   tokens_per_rank    [R] EP_I32: tokens with at least one expert on that rank
 *   tokens_per_node    [N] EP_I32: the same per node; N = ep_group_num_nodes()
 *   tokens_per_expert  [E] EP_I32: selections of each expert
 *   token_in_rank      [T][R] EP_U8: 1 where the token goes to the rank
 *   channel_prefix     [R][C] EP_I32: rows for that rank in channels 0..c; C = num_channels of
 *                      the plan
 */
struct ep_layout {
    uint32_t size;
    uint32_t reserved;
    struct ep_tensor *tokens_per_rank;
    struct ep_tensor *tokens_per_node;
    struct ep_tensor *tokens_per_expert;
    struct ep_tensor *token_in_rank;
    struct ep_tensor *channel_prefix;
};
#define EP_LAYOUT_INIT                                                                         \
    { sizeof(struct ep_layout), 0, NULL, NULL, NULL, NULL, NULL }

/*
 * Nodes of the group: sets of ranks that share load and store. Ranks of a host (and of its network
 * namespace) are a node, or EP_NODE_SIZE says it: N for runs of N ranks, or "2,3,1" for one run each;
 * the same on all ranks. Local. Between nodes a token's row travels once to each node, and one answer
 * back. This version makes groups of host ranks on several nodes for throughput mode: not of CUDA ranks, for
 * low-latency mode or to grow, which are EP_ERR_UNSUPPORTED.
 */
int ep_group_num_nodes(const ep_group *group);

/* Writes the layout of a routed handle. Local; enqueues on `stream`. All outputs contiguous.
 * EP_ERR_STATE: the handle is not routed. EP_ERR_ARG: type or shape of an output. EP_ERR_CAPACITY: it
 * was routed with more tokens than max_tokens. */
ep_status ep_handle_layout(ep_handle *handle, const struct ep_layout *layout, void *stream);

/*
 * What arrived. Blocks until the counts of the handle's last uncached dispatch are known here
 * (not until its rows are). Each pointer may be NULL. Not for a dispatch that was captured in a
 * graph: read num_rows and expert_counts.
 *   rows             rows this rank receives: one per (source rank, token) that selected it
 *   rows_per_source  [R]
 *   rows_per_expert  [L] selections of each local expert of the routing, all sources
 * EP_ERR_STATE: the handle was not dispatched since it was routed, or captured. EP_ERR_TIMEOUT: its
 * stream did not come to the dispatch within twice the group's timeout; the group has not faulted,
 * and the call may be repeated. Errors as of ep_handle_status.
 */
ep_status ep_handle_counts(ep_handle *handle, int64_t *rows, int32_t *rows_per_source,
                           int32_t *rows_per_expert);

/*
 * What was lacking where a handle's last dispatch, or a call that asked about it, has returned
 * EP_ERR_CAPACITY; 0: nothing of that kind. Known alike on all ranks, but for output_rows.
 */
struct ep_needs {
    uint32_t size;
    int32_t max_tokens; /* the most tokens of a rank, more than max_tokens */
    int64_t
        max_recv_rows;   /* the most rows for a rank, more than max_recv_rows; without those of
                                   ranks that have too many tokens */
    int64_t output_rows; /* rows for this rank's outputs, which held fewer */
};
#define EP_NEEDS_INIT                                                                          \
    { sizeof(struct ep_needs), 0, 0, 0 }

/* Local, not blocking. */
ep_status ep_handle_needs(ep_handle *handle, struct ep_needs *needs);

/*
 * Raises max_tokens and max_recv_rows to what the needs of any rank say (0: nothing is wanted), up to
 * the ceilings in ep_group_config; output_rows is not looked at. Collective and blocking, between
 * operations: no thread of this rank makes another call for the group meanwhile. Nothing moves: views,
 * and handles with what they hold, stay as they are. A handle whose max_tokens is the group's gets room
 * for more in its next ep_handle_route, which may then be EP_ERR_NOMEM, and has what it had until it
 * is destroyed.
 * Graphs keep the maxima of their capture; this call is none that can be captured, and waits for no
 * stream.
 * All ranks return alike, and after a failure of any nothing has changed: EP_ERR_ARG: more than a
 * ceiling. EP_ERR_STATE: an operation has begun and is not finished. EP_ERR_NOMEM: memory, or
 * memory_limit_bytes; EP_ERR_UNSUPPORTED, EP_ERR_SYSTEM: what a device or the system refuses besides.
 * EP_ERR_TIMEOUT names who has not come; the group goes on as it was, and every later call is
 * EP_ERR_STATE. EP_ERR_PEER, EP_ERR_FAULTED.
 */
ep_status ep_group_grow(ep_group *group, const struct ep_needs *needs);

/* ---------------------------------------------------------------------------------------------
 * Dispatch
 * ------------------------------------------------------------------------------------------ */

/*
 * Row order of the output:
 *   compact   one row per (token, this rank), by source rank, then token. Two runs give the
 *             same bytes: no row's place depends on timing.
 *   expanded  one row per (token, selection of a local expert), grouped by local expert in
 *             ascending id; within it by source rank, token, k. The group of expert e starts at
 *             expert_offsets[e], a multiple of `alignment`.
 */
#define EP_DISPATCH_EXPANDED 1u
/* recv_x becomes a view of the arena (zero-copy): libep fills in the tensor. The view is valid,
 * and may be written by its owner, until num_slots further dispatches were issued. Calls take the
 * slots in turn; a dispatch in a graph keeps that of its capture, and every replay ends the views of
 * all dispatches in that slot, its own included. */
#define EP_DISPATCH_ARENA 2u
/* Expanded: rows of recv_x between the end of an expert's group and the next start are zeroed;
 * else they are left as they were. */
#define EP_DISPATCH_ZERO_GAPS 4u
/* recv_scales is [rows][S] with stride[0] == 1 and stride[1] * element a multiple of 16. */
#define EP_DISPATCH_SCALES_COLUMN_MAJOR 8u

/*
 * Inputs, of this rank's T tokens:
 *   x             [T][H], rows contiguous, any dtype; H * element a multiple of EP_ROW_ALIGN
 *   scales        [T][S] of a 1-, 2- or 4-byte dtype, any strides; or NULL
 *   topk_weights  [T][K] EP_F32, any strides; or NULL
 * Outputs, whose first dimension N is the caller's capacity in rows, the same for all of them:
 *   recv_x             [N][H], rows contiguous, dtype of x; with EP_DISPATCH_ARENA set by libep
 *                      ([rows][H]; with a stream, [max rows][H])
 *   recv_scales        [N][S] dtype of scales, row-major contiguous or column-major as flagged
 *   recv_topk_ids      [N][K] EP_I32 or EP_I64: compact only. Index of the expert among this
 *                      rank's experts, -1 where the selection is another rank's. Rows past the
 *                      last received one are filled with -1
 *   recv_topk_weights  compact [N][K], expanded [N]; EP_F32. 0 where the id is -1, in gaps and
 *                      past the last row
 *   recv_source        [N][2] EP_I32: source rank and token; -1 in gaps and past the last row
 *   expert_counts      [L] EP_I32: rows of each local expert (selections)
 *   expert_offsets     [L+1] EP_I32: expanded only. Start of each group, last: end of the
 *                      output, which is aligned too
 *   num_rows           [1] EP_I32: rows received (compact) or end of the output (expanded).
 *                      Output that would need 2^31 rows or more is EP_ERR_CAPACITY
 *   source_ends        [R] EP_I32: where the rows of each source end in the compact order
 *   expert_ends        [L] EP_I32: expanded: where the rows of each expert end, its start and its
 *                      count. compact: the sum of the counts up to and with it, each rounded up to
 *                      `alignment`
 * A dispatch that fails once it is under way leaves counts, offsets, ends and num_rows 0, ids and
 * sources -1, so that work queued behind it stays in bounds.
 * Any output may be NULL. The types and bytes of a row of x and of its scales, K, and whether
 * topk_weights is given must agree on all ranks; T, the output form, alignment and outputs are
 * each rank's own.
 */
struct ep_dispatch_args {
    uint32_t size;
    uint32_t flags;    /* EP_DISPATCH_... */
    int32_t alignment; /* of expert groups, in rows; 0: 1. Of compact output: of expert_ends */
    int32_t num_workers; /* of this call; 0: the group's */
    const struct ep_tensor *x;
    const struct ep_tensor *scales;
    const struct ep_tensor *topk_weights;
    struct ep_tensor *recv_x;
    struct ep_tensor *recv_scales;
    struct ep_tensor *recv_topk_ids;
    struct ep_tensor *recv_topk_weights;
    struct ep_tensor *recv_source;
    struct ep_tensor *expert_counts;
    struct ep_tensor *expert_offsets;
    struct ep_tensor *num_rows;
    struct ep_tensor *source_ends;
    struct ep_tensor *expert_ends;
};
#define EP_DISPATCH_ARGS_INIT                                                                  \
    {                                                                                          \
        sizeof(struct ep_dispatch_args), 0, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL,    \
            NULL, NULL, NULL, NULL, NULL, NULL                                                 \
    }

/*
 * Sends this rank's rows to the ranks of their experts and receives those of the others.
 * Collective; enqueues on `stream`. The first dispatch after ep_handle_route exchanges counts;
 * later ones on the same handle are "cached" and skip that (all ranks alike).
 * EP_ERR_ARG: type, shape, stride, alignment, or an output that shares memory with an input or
 * another output (columns of one matrix, side by side, do not); before anything is sent.
 * EP_ERR_STATE: handle not routed, or captured with more tokens than max_tokens. EP_ERR_CAPACITY: a
 * rank has more tokens than max_tokens, or more rows arrive somewhere than max_recv_rows (returned on
 * all ranks, nothing was sent), or here than the outputs hold (nothing past them is written; the other
 * ranks succeed, and the handle counts as dispatched on all); ep_handle_needs says how many are needed; the group goes on. EP_ERR_MISMATCH,
 * EP_ERR_TIMEOUT, EP_ERR_PEER, EP_ERR_FAULTED: see ep_group_fault. With a stream, what is found
 * by the enqueued work is returned by ep_stream_sync and by the next call on the group.
 */
ep_status ep_dispatch(ep_handle *handle, const struct ep_dispatch_args *args, void *stream);

/*
 * The same in two steps, for output of exactly the right size: begin sends (it looks at the
 * inputs only), ep_handle_counts says how many rows come, finish receives into the outputs
 * (it looks at the outputs, flags and alignment only). Other operations of the group are
 * refused in between with EP_ERR_STATE. A CUDA group sends on its own stream, from where `stream`
 * is at begin; finish receives on its `stream` beside it and blocks until the counts are known;
 * the inputs must not change until the stream has passed finish. In a capture both are captured, into
 * the same graph (else EP_ERR_STATE): begin sends on its own `stream`, finish receives behind it, and
 * does not block: its outputs have room for what comes, or nothing past them is written.
 * In a group of several nodes begin also waits for the rows that this rank passes on, so for the others' begin.
 */
ep_status ep_dispatch_begin(ep_handle *handle, const struct ep_dispatch_args *args,
                            void *stream);
ep_status ep_dispatch_finish(ep_handle *handle, const struct ep_dispatch_args *args,
                             void *stream);

/*
 * The arena memory of the handle's last dispatch as a tensor of another type: the place for
 * experts to write their answers for a zero-copy combine. [max rows][cols]; compact slot, or
 * with EP_DISPATCH_EXPANDED in `flags` the expanded one. Same lifetime as the view of the
 * dispatch.
 */
ep_status ep_handle_arena(ep_handle *handle, uint32_t flags, ep_dtype dtype, int64_t cols,
                          struct ep_tensor *view);

/* ---------------------------------------------------------------------------------------------
 * Combine
 * ------------------------------------------------------------------------------------------ */

/*
 * Inputs, and then outputs:
 *   x             [n][H] EP_BF16, EP_F16 or EP_F32, rows contiguous: one row per row of the
 *                 handle's last dispatch, in its form (compact or expanded) and order. n at
 *                 least the rows received; rows past them are not read. A view of the arena or
 *                 ordinary memory
 *   weights       [n] EP_F32 or NULL: row i of x counts weights[i] times
 *   topk_weights  [n][K] (compact) or [n] (expanded) EP_F32, or NULL: sent back alongside
 *   bias          [T][H] dtype of x, rows contiguous, each or both NULL: added once per token
 *   out           [T][H] dtype of x, rows contiguous
 *   out_topk_weights  [T][K] EP_F32: sum over the ranks of what they sent back per selection
 * The outputs share no memory with each other or with an input: nothing is done in place.
 *
 * out[t] = round(0 + bias0 + bias1 + sum over ranks r that t was sent to, ascending, of y_r),
 * added in that order in float32 and rounded once to nearest even. y_r is the row of x; where
 * it is weighted or expanded, y_r is that rank's own sum (from 0 on, over k ascending, each row
 * times its weight, float32) rounded once to the dtype. A token that was sent nowhere yields
 * its biases, or zeros. A NaN in BF16 or F16 becomes 0x7fff. out_topk_weights sums what each
 * rank sent back for a selection, also for selections of other ranks, where a dispatch has put
 * zeros.
 *
 * In a group of several nodes the ranks of a node are summed first, y_d = round(0 + sum over the ranks r of
 * node d that t was sent to, ascending, of y_r), and then biases and nodes, ascending, likewise:
 * round(0 + bias0 + bias1 + sum of y_d). Top-k weights are summed in the same order, in float32.
 */
struct ep_combine_args {
    uint32_t size;
    uint32_t flags;      /* 0 */
    int32_t num_workers; /* of this call; 0: the group's */
    int32_t reserved;
    const struct ep_tensor *x;
    const struct ep_tensor *weights;
    const struct ep_tensor *topk_weights;
    const struct ep_tensor *bias[2];
    struct ep_tensor *out;
    struct ep_tensor *out_topk_weights;
};
#define EP_COMBINE_ARGS_INIT                                                                   \
    { sizeof(struct ep_combine_args), 0, 0, 0, NULL, NULL, NULL, {NULL, NULL}, NULL, NULL }

/*
 * Brings the experts' answers back and sums them per token. Collective; enqueues on `stream`.
 * A handle may be combined any number of times after its dispatch. The backward of a dispatch
 * is a combine, the backward of a combine is a cached dispatch. H, dtype and whether
 * topk_weights is given must agree on all ranks. Errors as for ep_dispatch.
 */
ep_status ep_combine(ep_handle *handle, const struct ep_combine_args *args, void *stream);

/*
 * The same in two steps, to the bit, on all ranks or on some: begin sends the answers (it looks at all
 * inputs but bias), finish adds up those that come (it looks at bias and the outputs). Begin is
 * collective, as is ep_combine. Other operations of the group, and a routing of the handle, are refused
 * in between with EP_ERR_STATE. The inputs must not change until the stream has passed finish, as
 * answers of this rank to itself are read where they are. Both enqueue, on one stream or two, and
 * neither blocks beyond that: a CUDA group sends on its own stream, from where `stream` is at begin,
 * beside what is queued there next. In a capture both are captured, into the same graph (else
 * EP_ERR_STATE), and begin sends on its own `stream`. Errors as for ep_combine.
 * In a group of several nodes begin also waits for the answers of others' begin, as far as they cross.
 */
ep_status ep_combine_begin(ep_handle *handle, const struct ep_combine_args *args, void *stream);
ep_status ep_combine_finish(ep_handle *handle, const struct ep_combine_args *args,
                            void *stream);

/* ---------------------------------------------------------------------------------------------
 * Low-latency mode
 *
 * For decode: few tokens, every microsecond counts. There is no handle to create and nothing to
 * route, no counts are read by the host, and no memory is allocated: outputs have the size of the
 * worst case, and what combine needs to know is kept in memory of the caller's. A row travels once
 * per rank and is copied to its experts there. One call does all of an operation, or two calls
 * its halves: between them nothing works for it, neither on the device nor on the host.
 *
 *     cfg.ll_max_tokens = 128;                              // when the group is created
 *     ep_ll_dispatch_send(group, &d, stream);               // collective
 *     ...work that overlaps with the transfer...
 *     ep_ll_dispatch_recv(group, &d, stream);
 *     ...the experts compute, from recv_x and expert_counts...
 *     ep_ll_combine(group, &c, stream);
 *
 * M is max_tokens of the call, N = R * M the rows that each local expert can receive.
 *
 *   - Sends (or whole calls) are collective: in one order on all ranks, among themselves and with
 *     throughput operations. A receive may come at any place after its send.
 *   - Of each kind two operations may be between send and receive, so two micro-batches can be in
 *     flight. A send whose kind's last but one was not received is EP_ERR_STATE, and so is a
 *     second receive, or a receive before its send; nothing is written then. Throughput operations
 *     between the halves are legal.
 *   - T, K and M may differ from call to call; M, K, types and bytes of rows and
 *     scales, and flags must agree on all ranks. Nothing is written past a count.
 *   - All may be captured in CUDA graphs, in any number, and replayed in any order and as often as
 *     wanted, together with calls that are not captured, if all ranks do the same.
 *   - Host groups: with stream NULL a call returns when its work is done and tells how it ended. Else
 *     what enqueued work finds is told by ep_stream_sync, of a CUDA group by ep_ll_status.
 * ------------------------------------------------------------------------------------------ */

/* Rows travel and arrive as EP_F8E4M3, cast from EP_BF16 by the sender in groups of 128 channels: a
 * group's scale s = amax * (1 / 448), amax the largest magnitude but at least 1e-4; a channel
 * becomes x * (448 / amax), rounded to nearest even and saturated at 448. float32 throughout. A
 * NaN is 0x7f and does not count for amax; of a group with an infinity that is 0x7f and the rest
 * 0. */
#define EP_LL_FP8 1u
/* With EP_LL_FP8: s is rounded up to a power of two, at most 2^127, and x multiplied by its
 * reciprocal. */
#define EP_LL_SCALES_POWER_OF_2 2u
/* For experts that expand rows themselves: a rank gets one row of a token, whatever its experts there,
 * and answers one, which it has summed. Of dispatch and combine, on all ranks alike. */
#define EP_LL_COMPACT 8u

/*
 * Inputs, looked at by the send half, of this rank's T tokens:
 *   x             [T][H], rows contiguous, any dtype, T at most M: bytes that travel as they are,
 *                 packed FP4 too; a row is a multiple of EP_ROW_ALIGN bytes. With EP_LL_FP8
 *                 EP_BF16, H a multiple of 128
 *   scales        [T][S] of a 1-, 2- or 4-byte dtype, any strides, that go with the rows; or NULL.
 *                 At most max_scale_bytes of a row; none with EP_LL_FP8
 *   num_experts, expert_rank  E and the map of this call, as in ep_routing, in both halves and in
 *                 combine: the same on all ranks. L is what the map gives this rank
 *   topk_ids      [T][K] EP_I32 or EP_I64, contiguous. Global expert ids; an id outside 0..E-1 is
 *                 not selected. An expert named twice gets the row twice; but without EP_LL_COMPACT
 *                 those beyond the first M of this rank's selections of an expert, for which it has
 *                 no rows, are not selected either
 *   topk_weights  [T][K] EP_F32, any strides, or NULL: by which combine multiplies, unless it is
 *                 given others
 * In and out, both halves, and combine:
 *   handle        [ll_handle_bytes of the plan] EP_U8, contiguous, at a multiple of 16 bytes: what
 *                 later calls need. The send writes it from nothing; it may be moved when nothing
 *                 uses it, and must not change until the last combine
 * Outputs, looked at by the receive half; each may be NULL; with EP_LL_COMPACT there is one list of
 * rows, so write 1 for L in the shapes of all but expert_counts and expert_totals:
 *   recv_x        [L * N][H] dtype of x, or EP_F8E4M3 with EP_LL_FP8, rows contiguous; required.
 *                 Rows e * N .. of local expert e: by source rank, token, k, without gaps.
 *                 EP_LL_COMPACT: all rows by source rank, token
 *   recv_scales   column g of expert e is row e * S + g of an [L * S][N] matrix whose rows start at
 *                 multiples of 16 bytes. Without EP_LL_FP8 dtype of scales. With it EP_F32: the
 *                 scales s, S = H / 128; or EP_I32, powers of two only: their exponents + 127 as
 *                 bytes, four to an element, the lowest first, S = H / 512 rounded up, bytes to
 *                 spare 0
 *   recv_source   [L * N] EP_I32: each row's token at its source rank
 *   recv_topk_ids      EP_LL_COMPACT only: [N][K] EP_I32 or EP_I64, any strides. Index of the expert
 *                 among this rank's, -1 where the selection is another rank's
 *   recv_topk_weights  EP_LL_COMPACT only: [N][K] EP_F32, any strides; 0 where the id is -1
 *   expert_counts [L] EP_I32: rows of each local expert (selections)
 *   ranges        [L][R] EP_I64: rows of each source << 0, the first of them (from 0) << 32
 *   expert_totals [L] EP_I32: to which each expert's rows are added, by replays too
 *   wait_ns       [R] EP_I64: to which is added, once per operation and by replays too, for how many
 *                 nanoseconds each other rank's counts were not here since the receive began (behind
 *                 its own send, where one call does both); ranks are waited for side by side
 */
struct ep_ll_dispatch_args {
    uint32_t size;
    uint32_t flags;      /* EP_LL_... */
    int32_t max_tokens;  /* M; 0: the group's ll_max_tokens, which is the most */
    int32_t num_workers; /* of this call; 0: the group's */
    const struct ep_tensor *x;
    const struct ep_tensor *topk_ids;
    const struct ep_tensor *topk_weights;
    struct ep_tensor *handle;
    struct ep_tensor *recv_x;
    struct ep_tensor *recv_scales;
    struct ep_tensor *recv_source;
    struct ep_tensor *expert_counts;
    struct ep_tensor *ranges;
    struct ep_tensor *expert_totals;
    const struct ep_tensor *scales;
    int32_t num_experts;
    int32_t reserved;
    const int32_t *expert_rank;
    struct ep_tensor *recv_topk_ids;
    struct ep_tensor *recv_topk_weights;
    struct ep_tensor *wait_ns;
};
#define EP_LL_DISPATCH_ARGS_INIT                                                               \
    {                                                                                          \
        sizeof(struct ep_ll_dispatch_args), 0, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, \
            NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, NULL, NULL                               \
    }

/*
 * Rows to the ranks of their experts: all of it, or its halves, which are given the same struct.
 * Enqueues on `stream`. EP_ERR_ARG: type, shape, stride, alignment, overlap; before anything is
 * sent. EP_ERR_STATE as above. EP_ERR_UNSUPPORTED: the group has no ll_max_tokens.
 * EP_ERR_MISMATCH, EP_ERR_TIMEOUT, EP_ERR_PEER, EP_ERR_FAULTED: see ep_group_fault. After a
 * fault each local expert's count is 0, with ranges of 0, or the true one, so kernels that were
 * queued behind the receive stay in bounds; other outputs hold anything.
 */
ep_status ep_ll_dispatch(ep_group *group, const struct ep_ll_dispatch_args *args, void *stream);
ep_status ep_ll_dispatch_send(ep_group *group, const struct ep_ll_dispatch_args *args,
                              void *stream);
ep_status ep_ll_dispatch_recv(ep_group *group, const struct ep_ll_dispatch_args *args,
                              void *stream);

/* In a group with EP_GROUP_LL_EXACT: every expert's row travels as it is, so sums are rounded once;
 * that takes K rows of a token across the link where else one of each rank would do. */
#define EP_LL_EXACT 4u
/*
 * LogFMT-10: the row of an answer that travels, also to this rank itself, has 10 bits for a channel
 * where that can be told apart, with all other flags and weights. H is a multiple of 128. Channels
 * are taken in blocks of 1024 where H is a multiple of that, else of 512, the last perhaps shorter.
 * A block is encoded if in every 128 of its channels the largest magnitude is below 1 and some other is
 * less; else it travels as it is. Of 128 channels a and b are log2 of the largest and the least
 * magnitude, b at least a - 32: a channel becomes the nearest of +-2^(b + i * s), s = (a - b) / 510, i
 * 0..510, and 0 where +-2^(b - s) would be nearer; but for 2^-16 in an exponent. As that number it is
 * added in float32, the same on every backend.
 */
#define EP_LL_LOGFMT 16u

/*
 *   x       [L * N][H] EP_BF16, rows contiguous: the answers, in the rows of recv_x (L: 1 with
 *           EP_LL_COMPACT); rows past a count are not read. Looked at by the send half, which reads
 *           the rows where they are: no copy is made of them
 *   handle  of a dispatch that was received, with the same M, T and experts; H may be another
 *   topk_weights  [T][K] EP_F32, any strides, or NULL: those of the dispatch. Given on all ranks or on
 *           none, in both halves, which both read them
 *   out     [T][H] EP_BF16, rows contiguous; looked at by the receive half
 *   wait_ns [R] EP_I64, or NULL: as of ep_ll_dispatch, of each rank's answers; and by the send half,
 *           but with EP_LL_EXACT, of the topk_weights that are given there
 *
 * out[t] = round(0 + sum over the ranks r that t was sent to, ascending, of y_r), where y_r is
 * round(0 + sum over the selections k of t at r, ascending, of weight[k] * row) with the weights
 * given here, else those of the dispatch, else 1; with EP_LL_EXACT round(0 + sum over k, ascending,
 * of weight[k] * row); with EP_LL_COMPACT y_r is the row of x. In float32, to nearest even; products are rounded before they are added. A token that was sent nowhere yields zeros. A NaN becomes 0x7fff.
 */
struct ep_ll_combine_args {
    uint32_t size;
    uint32_t flags;      /* EP_LL_EXACT or EP_LL_COMPACT, and EP_LL_LOGFMT */
    int32_t max_tokens;  /* as of the dispatch */
    int32_t num_workers; /* of this call; 0: the group's */
    struct ep_tensor *handle;
    const struct ep_tensor *x;
    struct ep_tensor *out;
    const struct ep_tensor *topk_weights;
    int32_t num_experts;
    int32_t reserved;
    const int32_t *expert_rank;
    struct ep_tensor *wait_ns;
};
#define EP_LL_COMBINE_ARGS_INIT                                                                \
    { sizeof(struct ep_ll_combine_args), 0, 0, 0, NULL, NULL, NULL, NULL, 0, 0, NULL, NULL }

/*
 * Answers back to the owners of the tokens, and summed there: all of it, or its halves. A handle may be
 * combined again when its last combine was received. Enqueues on `stream`. Errors as of
 * ep_ll_dispatch; EP_ERR_STATE also if the handle is of no received dispatch of this shape.
 */
ep_status ep_ll_combine(ep_group *group, const struct ep_ll_combine_args *args, void *stream);
ep_status ep_ll_combine_send(ep_group *group, const struct ep_ll_combine_args *args,
                             void *stream);
ep_status ep_ll_combine_recv(ep_group *group, const struct ep_ll_combine_args *args,
                             void *stream);

/*
 * What enqueued work of low-latency mode has found and nobody was told yet: EP_OK, EP_ERR_STATE for
 * a call that did nothing (told once), or the group's fault. Local, not blocking.
 */
ep_status ep_ll_status(ep_group *group);

/* ---------------------------------------------------------------------------------------------
 * Masks of low-latency mode, of groups with EP_GROUP_LL_MASKS
 *
 * A rank that dies, destroys its group or does not come within ll_timeout_ms does not end the group:
 * low-latency operations are completed without it. It is *masked*: from the next call on nothing is
 * sent to it and nothing awaited from it. Each rank has its own masks; a rank that is masked is told,
 * and masks whoever has done so. Of a masked rank
 *   - a dispatch has counts of 0. Where they had come, but not all rows, its rows are zeros, recv_source
 *     -1 and ranges 0, and counts stay; so it is for all of its rows, also those that had come
 *   - a combine leaves its answers out of the sum; weights are not scaled up
 * The call that masks returns EP_ERR_TIMEOUT (the rank is late, or stopped) or EP_ERR_PEER (it is gone,
 * or has masked this rank), once, although all outputs are set; of enqueued work ep_stream_sync and
 * ep_ll_status tell it. One deadline holds for all waits of a half, however many ranks are gone; it is
 * doubled for ranks that have said that they wait for others themselves. No wait is longer.
 * While a rank is masked or dead, operations of throughput mode return EP_ERR_PEER; one that is under
 * way then ends the group, as a rank does that is late for one.
 *
 * To come back: ep_ll_unmask_rank on both sides, then ep_ll_barrier on all ranks that are to go on.
 * ------------------------------------------------------------------------------------------ */

#define EP_LL_MASK_NONE 0
#define EP_LL_MASK_GONE 1    /* its process died, or it has called ep_group_destroy */
#define EP_LL_MASK_STOPPED 2 /* it did not come in time: its process was stopped (SIGSTOP) */
#define EP_LL_MASK_LATE 3    /* it did not come in time, and runs */
#define EP_LL_MASK_BY_IT 4   /* it has masked this rank */
#define EP_LL_MASK_BY_CALLER 5

/* Why a rank is masked, as found out when this rank's host learnt of it. */
struct ep_ll_mask {
    uint32_t size;
    int32_t why;       /* EP_LL_MASK_... */
    int32_t operation; /* EP_OP_LL_... that masked it */
    int32_t reserved;
    int64_t waited_ms;
    char phase[32];    /* what was waited for, as in ep_fault */
    char message[256]; /* one sentence */
};
#define EP_LL_MASK_INIT                                                                        \
    {                                                                                          \
        sizeof(struct ep_ll_mask), 0, 0, 0, 0, {0}, {                                          \
            0                                                                                  \
        }                                                                                      \
    }

/*
 * Masks a rank, in the order of `stream`. Enqueues; may be captured. EP_ERR_ARG: this rank itself, or
 * none of the group. EP_ERR_UNSUPPORTED, as of all here: the group has no masks.
 */
ep_status ep_ll_mask_rank(ep_group *group, int rank, void *stream);
/* Wants the rank back (-1: all that are masked) at the next ep_ll_barrier. Enqueues. */
ep_status ep_ll_unmask_rank(ep_group *group, int rank, void *stream);
/* Which ranks are masked: masks is [R] EP_I32, contiguous, 1 or 0. Enqueues; may be captured. */
ep_status ep_ll_masks(ep_group *group, struct ep_tensor *masks, void *stream);
/* Local, not blocking. */
ep_status ep_ll_mask_report(ep_group *group, int rank, struct ep_ll_mask *report);

/*
 * The memory of this rank that rows and answers of low-latency mode travel through, as EP_U8: while
 * nothing is in flight, here and at the peers, it may be filled with anything; nothing need. Local, not
 * blocking.
 */
ep_status ep_ll_memory(ep_group *group, struct ep_tensor *view);

/*
 * A meeting of the ranks that have not masked each other, and of those that want each other back:
 * collective among them, enqueues on `stream`. Who does not come within twice ll_timeout_ms is masked,
 * and told as by an operation. From here on all who have met count their operations alike: handles of
 * before are refused. EP_ERR_STATE: an operation was sent and not received here.
 */
ep_status ep_ll_barrier(ep_group *group, void *stream);

#ifdef __cplusplus
}
#endif

#endif
