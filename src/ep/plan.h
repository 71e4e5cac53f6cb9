/* SPDX-License-Identifier: MIT */
/*
 * The plan of a group: shapes in, sizes and offsets out. Pure: no memory, no clock, no
 * environment, so that a table can test it and every rank computes the same.
 */
#ifndef EPI_PLAN_H
#define EPI_PLAN_H

#include "kernel/abi.h"
#include "src/base/base.h"
#include "src/ep/nodes.h"
#include "src/mem/mem.h"

/* Tokens of a channel, about: small enough that many warps share the work and rows are announced
 * early, large enough that announcing them costs nothing. Where tokens are no more than the warps
 * that can send, each is a channel, as a warp that had two would end last; unless there are so many
 * ranks that it is their words that cost. Check builds have channels of several tokens with fewer. */
#define EPI_CHANNEL_TOKENS 6
#define EPI_MAX_CHANNELS 640
#define EPI_LONE_RANKS 128
#if defined(K_LATE_MOVERS)
#define EPI_LONE_CHANNELS 12
#else
#define EPI_LONE_CHANNELS 256
#endif
#define EPI_MOST_TOKENS (1 << 24) /* of a rank, whatever it asks for */
/* Rows that gaps between experts may add to an expanded output, per expert. */
#define EPI_EXPANDED_SLACK 127

/* Stages of a host warp's ring. One holds a whole row, or, in check builds, pieces of it; and a
 * sidecar, or pieces of that, or the end of a row and a sidecar: sizes for which tests have all. */
#if defined(K_LATE_MOVERS)
#define EPI_HOST_STAGES 3
#define EPI_HOST_STAGE_MIN 192
#define EPI_HOST_STAGE_MAX 384
#else
#define EPI_HOST_STAGES 2
#define EPI_HOST_STAGE_MIN 1024
#define EPI_HOST_STAGE_MAX (1 << 24)
#endif
int epi_plan_stage_bytes(int row_bytes);

/* Between nodes. Packets of a stream that are on their way hide a round trip; they hold a few rows, or
 * parts of one. Check builds have small ones, so that rows come in parts. */
#define EPI_FAR_SLOTS 8
#define EPI_FAR_LANES 4
#if defined(K_LATE_MOVERS)
#define EPI_PACKET_MOST 1024
#else
#define EPI_PACKET_MOST 65536
#endif

#define EPI_MAX_USES 32

struct epi_plan {
    struct ep_plan_info info;
    struct k_map map;
    struct k_ll_map ll; /* regions of no bytes without low-latency mode */
    /* Offsets are for the ceilings: what of the arena the maxima use, and how long it is. */
    struct epi_mem_use use[EPI_MAX_USES];
    int num_uses; /* 0: all of it, for good */
    uint64_t length;
    int64_t most_recv_rows; /* as resolved */
    int num_ranks, num_slots;
    int max_local; /* the most experts any rank has */
    int max_dests; /* destinations a token can have */
    int count_words;
    /* Of a group of several nodes: offsets in the arena, and what a rank has for the network. */
    struct k_far_map far;
    int num_nodes;
    uint64_t net_bytes;       /* of memory that others write to */
    uint64_t net_write_bytes; /* the most that is written at once */
    int net_lanes, net_slots;
};

/* The rank of expert e under the default map: E / R each, the first E % R ranks one more. */
int epi_default_rank(int num_experts, int num_ranks, int e);

/* Checks the fields of `config` and computes the plan for num_ranks ranks of `nodes` (NULL: of one). EP_ERR_ARG,
 * EP_ERR_VERSION; EP_ERR_NOMEM when the arena exceeds memory_limit_bytes (*plan is complete). */
ep_status epi_plan(const struct ep_group_config *config, int num_ranks,
                   const struct epi_nodes *nodes, struct epi_plan *plan);

/* The same for larger maxima of a group that exists: nothing else of it changes. */
ep_status epi_plan_again(const struct ep_group_config *config, struct epi_plan *plan);
static inline bool epi_plan_grows(const struct ep_group_config *c) {
    return c->most_tokens || c->most_recv_rows;
}
static inline int epi_most_tokens(const struct ep_group_config *c) {
    return c->most_tokens ? c->most_tokens : c->max_tokens;
}

/* How T tokens are cut into as many of the group's channels as they need. */
void epi_plan_channels(const struct epi_plan *plan, int tokens, struct k_channels *out);

/* A row of a low-latency dispatch on the wire, as it travels: where its sidecar begins, and from one
 * to the next. */
struct epi_ll_wire {
    int row_at, bytes;
};
struct epi_ll_wire epi_plan_ll_wire(int row_bytes, int topk, int scale_bytes);
/* The same of an answer. */
int epi_plan_ll_answer_bytes(int row_bytes);

/* EP_ERR_ARG for a rank that is none in tag.expert_rank; NULL is the default map. */
ep_status epi_check_map(const char *tag, const int32_t *map, int num_experts, int num_ranks);

/* Ordinary memory of a rank: tables its kernels index, and those of each map of experts; shared memory of each worker. */
size_t epi_plan_table_bytes(int num_ranks);
size_t epi_plan_expert_bytes(int num_experts, int num_ranks);
size_t epi_plan_warp_bytes(const struct ep_group_config *config, const struct epi_plan *plan);

/* Memory of a handle for as much as `most` says: points the fields of *k into one block at `block`,
 * which may be memory of another device, and returns its bytes. */
size_t epi_plan_handle(const struct ep_group_config *config, const struct epi_plan *plan,
                       const struct ep_handle_config *most, uint64_t block, struct k_handle *k);

#endif
