/* SPDX-License-Identifier: MIT */
/*
 * Arguments of calls: structs of other versions of ep.h, and the tensors of each operation. An
 * operation has one table with a row for each tensor; from it come the checks of shape, type,
 * layout, overlap and place, the arrays that kernels get, and what tests put on a device. Pure but
 * for the place of memory, which the group's backend knows.
 */
#ifndef EPI_ARGS_H
#define EPI_ARGS_H

#include "src/ep/tensor.h"

/* ---- structs that may be of another version ------------------------------------------------- */

/*
 * A caller's struct as this library knows it: what a smaller one lacks is 0, and what a larger one
 * has beyond must be. EP_ERR_VERSION names the struct. The caller's is not looked at again, so
 * that a change of it during the call does no harm.
 */
#define EPI_TAKE(tag, copy, from) EPI_TRY(epi_take(#tag, copy, from, sizeof(struct tag)))
ep_status epi_take(const char *tag, void *copy, const void *from, size_t bytes);
/* EP_ERR_VERSION for a size that no version of the struct can have. */
ep_status epi_check_size(const char *tag, uint32_t size, size_t bytes);
/* Writes as much of `from` as the caller's struct holds; its size stays. */
#define EPI_GIVE(tag, to, from) epi_give(#tag, to, from, sizeof(struct tag))
ep_status epi_give(const char *tag, void *to, const void *from, size_t bytes);

/* ---- rules ---------------------------------------------------------------------------------- */

/* Lengths of dimensions. A length that the call does not know (-1) becomes that of the first
 * tensor that has it. */
enum epi_dim {
    EPI_DIM_NONE, /* there is no such dimension */
    EPI_DIM_1,
    EPI_DIM_2,
    EPI_DIM_T,
    EPI_DIM_K,
    EPI_DIM_E,
    EPI_DIM_L,
    EPI_DIM_L_END, /* L + 1 */
    EPI_DIM_R,
    EPI_DIM_NODES,
    EPI_DIM_CHANNELS,
    EPI_DIM_ROWS,   /* received rows that the outputs, or x of a combine, hold */
    EPI_DIM_HIDDEN, /* elements of a row */
    EPI_DIM_SCALES,
    EPI_DIM_LL_LISTS,   /* low-latency mode: lists of rows, L or of compact output 1 ... */
    EPI_DIM_LL_EACH,    /* ... rows of one, R * M ... */
    EPI_DIM_LL_ROWS,    /* ... and of all */
    EPI_DIM_LL_COLUMNS, /* columns of scales of all local experts */
    EPI_DIM_LL_HANDLE,  /* bytes */
    EPI_NUM_DIMS
};

/* The tensor whose type another must have; 0: none. */
enum epi_like { EPI_LIKE_NONE, EPI_LIKE_X, EPI_LIKE_SCALES, EPI_NUM_LIKES };

#define EPI_IN 1u
#define EPI_OUT 2u
#define EPI_REQUIRED 4u
#define EPI_ROW_BYTES 8u    /* a row is a multiple of EP_ROW_ALIGN, at most max_row_bytes */
#define EPI_SCALE_BYTES 16u /* scales of a row are at most max_scale_bytes */
#define EPI_NOT_ARENA 32u   /* not there where the library fills in a view of the arena */
#define EPI_FLAT 64u        /* without its last dimension where the form is expanded */
#define EPI_ADDRESS 128u    /* the kernel gets the address alone */
#define EPI_COLUMNS 256u    /* column-major where the call is EPI_COLUMN_MAJOR */
#define EPI_LATE 512u       /* an input of the second of two calls */
#define EPI_ANY (EPI_IN | EPI_OUT | EPI_LATE)

/* What a call is, as far as tensors depend on it; a rule lists what rules its tensor out. */
#define EPI_BY_MASK 1u
#define EPI_EXPANDED 2u
#define EPI_COMPACT 4u
#define EPI_NO_WEIGHTS 8u
#define EPI_NO_SCALES 16u
#define EPI_ARENA 32u
#define EPI_COLUMN_MAJOR 64u

struct epi_rule {
    const char *name; /* in messages */
    uint16_t field,
        to;         /* offsets: of the pointer in the public struct, of what a kernel gets */
    uint16_t role;  /* of EPI_ANY, and what else of the list above */
    uint8_t dim[2]; /* EPI_DIM_... */
    uint32_t types; /* EPI_TYPE of each that is allowed */
    uint8_t like;   /* EPI_LIKE_... */
    uint8_t layout; /* enum epi_layout */
    uint16_t never; /* EPI_BY_MASK, ...: the call has no such tensor */
};

#define EPI_MAX_TENSORS 16 /* of a call */

struct epi_rules {
    const struct epi_rule *rule;
    int num;
};

/* In route.c, dispatch.c, combine.c and ll.c. */
extern const struct epi_rules epi_route_rules, epi_layout_rules, epi_dispatch_rules,
    epi_combine_rules, epi_ll_dispatch_rules, epi_ll_combine_rules;

/* The first columns of a row, for field `f` of the struct that the caller fills in and for `to`
 * of the one that the kernel gets; and shorter words for the others. */
#define EPI_FIELD(ep_args, f, k_args, to)                                                      \
#f, offsetof(struct ep_args, f), offsetof(struct k_args, to)
#define EPI_DIMS(a, b)                                                                         \
    { EPI_DIM_##a, EPI_DIM_##b }
#define EPI_AS(like, layout) EPI_LIKE_##like, EPI_LAYOUT_##layout
#define EPI_RULES(name, table)                                                                 \
    const struct epi_rules name = {table, sizeof(table) / sizeof(table[0])};                   \
    _Static_assert(sizeof(table) / sizeof(table[0]) <= EPI_MAX_TENSORS, #table)

#define EPI_IDS (EPI_TYPE(EP_I32) | EPI_TYPE(EP_I64))
#define EPI_SUMMABLE (EPI_TYPE(EP_BF16) | EPI_TYPE(EP_F16) | EPI_TYPE(EP_F32))
#define EPI_SCALES                                                                             \
    (EPI_SUMMABLE | EPI_TYPE(EP_F8E4M3) | EPI_TYPE(EP_F8E5M2) | EPI_TYPE(EP_U8) |              \
     EPI_TYPE(EP_I16) | EPI_TYPE(EP_I32))
#define EPI_ROWS (EPI_SCALES | EPI_TYPE(EP_I64))

/* The tensor of a rule in its operation's arguments, or NULL; and another in its place. */
struct ep_tensor *epi_rule_tensor(const struct epi_rule *rule, const void *args);
void epi_rule_set(const struct epi_rule *rule, void *args, struct ep_tensor *t);
/* Whether a call that `is` so looks at the tensor for its `roles`. */
bool epi_rule_holds(const struct epi_rule *rule, uint32_t roles, uint32_t is);

/* ---- a call --------------------------------------------------------------------------------- */

/* What the tensors of one call are checked against, and what was learnt from them. */
struct epi_call {
    const ep_group *group;
    int64_t dim[EPI_NUM_DIMS];
    uint32_t like[EPI_NUM_LIKES]; /* EPI_TYPE; 0: not known yet */
    uint32_t is;                  /* EPI_BY_MASK, ... */
    struct ep_tensor copy[EPI_MAX_TENSORS];
    int num_seen;
    struct epi_extent seen[EPI_MAX_TENSORS]; /* those that have elements */
};

/* Knows the lengths of the group, and no others; E and L may be those of another map of experts. */
void epi_call_begin(struct epi_call *call, const ep_group *g);
struct epi_experts;
void epi_call_experts(struct epi_call *call, const struct epi_experts *e);

/* So many scales of a row are no more than the group has room for. */
ep_status epi_check_scale_bytes(const ep_group *g, int64_t num, int dtype);

/*
 * Checks the tensors of `args` whose role is among `roles` (those of EPI_ANY), and makes `args`, a
 * copy of the caller's struct, point to copies of them. EP_ERR_ARG names the first that breaks its
 * rule, and the value; an output shares no byte with any other tensor of the call. EP_ERR_VERSION.
 */
ep_status epi_args_check(struct epi_call *call, const struct epi_rules *rules, void *args,
                         uint32_t roles);
/* After the check: what the kernel gets for them. Absent tensors leave what is there. */
void epi_args_fill(const struct epi_call *call, const struct epi_rules *rules, const void *args,
                   uint32_t roles, void *kernel_args);

#endif
