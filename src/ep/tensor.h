/* SPDX-License-Identifier: MIT */
/*
 * One tensor: what can be wrong with it, and the bytes that it covers. Pure.
 */
#ifndef EPI_TENSOR_H
#define EPI_TENSOR_H

#include "kernel/abi.h"
#include "src/base/base.h"

#define EPI_TYPE(d) (1u << (d))

/* Strides. */
enum epi_layout {
    EPI_LAYOUT_ANY,
    EPI_LAYOUT_ROWS, /* last stride 1, rows apart, aligned to EP_ROW_ALIGN */
    EPI_LAYOUT_DENSE,
    EPI_LAYOUT_COLUMNS /* first stride 1, columns apart, aligned to 16 bytes */
};

/* Bytes that a tensor covers: from low to high, in rows of `width` bytes that lie `pitch` apart, or
 * (pitch 0) anyhow. */
struct epi_extent {
    const char *name;
    bool output;
    uintptr_t low, high;
    uint64_t pitch, width;
};

const char *epi_dtype_name(int dtype); /* "unknown" for what is none */

/* EP_ERR_ARG, "name. ...", for a type that is not in the mask, or a shape that is not
 * [want[0]][want[1]]; -1: any length. */
ep_status epi_check_shape(const char *name, const struct ep_tensor *t, int ndim,
                          const int64_t want[2], uint32_t types);
/* After epi_check_shape: a row of t is a multiple of EP_ROW_ALIGN bytes, at most `most`. */
ep_status epi_check_row_bytes(const char *name, int64_t cols, int dtype, int64_t most);
/* After epi_check_shape: strides, alignment, and that all of it lies in the address space. */
ep_status epi_check_layout(const char *name, const struct ep_tensor *t, enum epi_layout layout);

bool epi_is_empty(const struct ep_tensor *t);
int epi_row_bytes(const struct ep_tensor *t); /* of a checked [rows][columns] */
/* Of a checked tensor. */
struct epi_extent epi_extent_of(const char *name, const struct ep_tensor *t, bool output);
/* Whether they may share a byte. Columns of one matrix, side by side, do not. */
bool epi_extents_overlap(const struct epi_extent *a, const struct epi_extent *b);

/* As kernels take it: address and strides in bytes. */
struct k_array epi_array(const struct ep_tensor *t);

#endif
