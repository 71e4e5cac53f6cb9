/* SPDX-License-Identifier: MIT */
/*
 * Images on a device of tensors that lie in ordinary memory. A call's arguments are staged: each
 * tensor is replaced by its image; copied in; after the call, copied out and checked: kernels
 * must not have written to inputs, nor to the guards around every image. Tensors that overlap
 * overlap in their images too, and an image is aligned as its tensor is.
 *
 * A stage belongs to one thread at a time and must not move; it may be copied in and out again
 * and again, at the same addresses.
 */
#ifndef TESTS_STAGE_H
#define TESTS_STAGE_H

#include "ep.h"
#include "tests/gpu.h"

#define STAGE_MAX_TENSORS 20

struct stage_item {
    const char *name;
    bool output;
    struct ep_tensor image;
    uintptr_t lo, hi; /* of the tensor; equal where it has no element */
};

/* Bytes of ordinary memory that one or several tensors cover. */
struct stage_span {
    uintptr_t lo, hi;
    size_t at; /* in the piece */
    bool written;
    uint64_t own; /* with EP_TEST_MEMORY=exact: device memory for it alone */
};

struct stage {
    struct gpu *gpu;
    bool pinned; /* set after stage_begin: images in pinned host memory, in any case */
    uintptr_t keep_lo, keep_hi; /* addresses of the device already */
    struct stage_item item[STAGE_MAX_TENSORS];
    int num_items;
    struct stage_span span[STAGE_MAX_TENSORS];
    int num_spans;
    struct gpu_piece piece;
};

/* Memory from keep on is the device's own and is left as it is; keep_bytes may be 0. */
void stage_begin(struct stage *s, struct gpu *gpu, uint64_t keep, size_t keep_bytes);
/* The image of a tensor (NULL for NULL), whose address holds after stage_lay. */
struct ep_tensor *stage_tensor(struct stage *s, const struct ep_tensor *t, bool output,
                               const char *name);
struct epi_rules;
/* All tensors that a call which `is` so (src/ep/args.h) has, by its kind's table, in place. */
void stage_all(struct stage *s, const struct epi_rules *rules, void *args, uint32_t is);
/* All tensors of a call's arguments, in place. A view of the arena stays what it is. */
void stage_routing(struct stage *s, struct ep_routing *r);
void stage_layout(struct stage *s, struct ep_layout *l);
void stage_dispatch(struct stage *s, struct ep_dispatch_args *a);
void stage_combine(struct stage *s, struct ep_combine_args *a);
/* Takes memory and gives the images their addresses. */
void stage_lay(struct stage *s);

/* Returns when it is done. Not in the order of the stream that the call is on. */
void stage_copy_in(struct stage *s);
/* Queued on the stream. */
void stage_copy_out(struct stage *s, void *stream);
/* When the stream has passed: outputs go to their tensors. EP_ERR_INTERNAL: a kernel wrote where
 * it must not. */
ep_status stage_check(const struct stage *s);
void stage_end(struct stage *s);

#endif
