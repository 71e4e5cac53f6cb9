/* SPDX-License-Identifier: MIT */
/*
 * Checks of tensors: one place that knows how to say what is wrong with one. Pure. Shapes and
 * strides are a caller's: a product of them is formed only when it is known to fit.
 */
#include "src/ep/tensor.h"

static const struct {
    const char *name;
    size_t bytes;
} dtypes[] = {
    [EP_DTYPE_NONE] = {"none", 0},  [EP_BF16] = {"EP_BF16", 2},
    [EP_F16] = {"EP_F16", 2},       [EP_F32] = {"EP_F32", 4},
    [EP_F8E4M3] = {"EP_F8E4M3", 1}, [EP_F8E5M2] = {"EP_F8E5M2", 1},
    [EP_U8] = {"EP_U8", 1},         [EP_I16] = {"EP_I16", 2},
    [EP_I32] = {"EP_I32", 4},       [EP_I64] = {"EP_I64", 8},
};
#define NUM_DTYPES ((int)(sizeof(dtypes) / sizeof(dtypes[0])))

size_t ep_dtype_bytes(ep_dtype dtype) {
    return (int)dtype > 0 && (int)dtype < NUM_DTYPES ? dtypes[dtype].bytes : 0;
}

const char *epi_dtype_name(int dtype) {
    return dtype >= 0 && dtype < NUM_DTYPES ? dtypes[dtype].name : "unknown";
}

void ep_tensor_1d(struct ep_tensor *t, ep_dtype dtype, void *data, int64_t n) {
    struct ep_tensor v = EP_TENSOR_INIT;
    v.dtype = (int32_t)dtype;
    v.data = data;
    v.ndim = 1;
    v.shape[0] = n;
    v.stride[0] = 1;
    *t = v;
}

void ep_tensor_2d(struct ep_tensor *t, ep_dtype dtype, void *data, int64_t rows, int64_t cols) {
    struct ep_tensor v = EP_TENSOR_INIT;
    v.dtype = (int32_t)dtype;
    v.data = data;
    v.ndim = 2;
    v.shape[0] = rows;
    v.shape[1] = cols;
    v.stride[0] = cols;
    v.stride[1] = 1;
    *t = v;
}

struct k_array epi_array(const struct ep_tensor *t) {
    struct k_array a = {0, 0, 0};
    if (t) {
        const k_u64 bytes = ep_dtype_bytes((ep_dtype)t->dtype);
        a.data = (k_u64)(uintptr_t)t->data;
        /* The stride of a dimension of one element may be any, and wraps around. */
        a.s0 = (k_i64)((k_u64)t->stride[0] * bytes);
        a.s1 = t->ndim > 1 ? (k_i64)((k_u64)t->stride[1] * bytes) : 0;
    }
    return a;
}

bool epi_is_empty(const struct ep_tensor *t) {
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0) {
            return true;
        }
    }
    return false;
}

int epi_row_bytes(const struct ep_tensor *t) {
    return (int)(t->shape[1] * (int64_t)ep_dtype_bytes((ep_dtype)t->dtype));
}

static ep_status check_type(const char *name, const struct ep_tensor *t, uint32_t types) {
    const bool known = t->dtype > 0 && t->dtype < NUM_DTYPES;
    char want[128] = "";
    size_t at = 0;
    if (known && (types & EPI_TYPE(t->dtype))) {
        return EP_OK;
    }
    for (int d = 1; d < NUM_DTYPES; d++) {
        if (types & EPI_TYPE(d)) {
            epi_format(want + at, sizeof(want) - at, "%s%s", at ? " or " : "", dtypes[d].name);
            for (at = 0; want[at]; at++) {
            }
        }
    }
    return epi_fail(EP_ERR_ARG, "%s.dtype is %d (%s), must be %s", name, t->dtype,
                    epi_dtype_name(t->dtype), want);
}

ep_status epi_check_shape(const char *name, const struct ep_tensor *t, int ndim,
                          const int64_t want[2], uint32_t types) {
    EPI_TRY(check_type(name, t, types));
    if (t->ndim != ndim) {
        return epi_fail(EP_ERR_ARG, "%s.ndim is %d, must be %d", name, t->ndim, ndim);
    }
    for (int i = 0; i < ndim; i++) {
        if (t->shape[i] < 0 || (want[i] >= 0 && t->shape[i] != want[i])) {
            return epi_fail(EP_ERR_ARG, "%s.shape[%d] is %lld, must be %s%lld", name, i,
                            (long long)t->shape[i], want[i] < 0 ? "at least " : "",
                            want[i] < 0 ? 0LL : (long long)want[i]);
        }
    }
    return !t->data && !epi_is_empty(t)
               ? epi_fail(EP_ERR_ARG, "%s.data is NULL and its shape is not empty", name)
               : EP_OK;
}

ep_status epi_check_row_bytes(const char *name, int64_t cols, int dtype, int64_t most) {
    const int64_t each = (int64_t)ep_dtype_bytes((ep_dtype)dtype);
    if (cols < 0 || cols > INT64_MAX / 8) {
        return epi_fail(EP_ERR_ARG,
                        "%s: a row of %lld elements, must be a multiple of %d bytes up to %lld "
                        "(max_row_bytes)",
                        name, (long long)cols, EP_ROW_ALIGN, (long long)most);
    }
    if (cols * each < EP_ROW_ALIGN || cols * each % EP_ROW_ALIGN || cols * each > most) {
        return epi_fail(
            EP_ERR_ARG,
            "%s: a row of %lld elements has %lld bytes, must be a multiple of %d up to "
            "%lld (max_row_bytes)",
            name, (long long)cols, (long long)(cols * each), EP_ROW_ALIGN, (long long)most);
    }
    return EP_OK;
}

/* Bytes from the first element to the lowest and to the end of the highest; false: they do not
 * fit. Not for an empty tensor. */
static bool reach(const struct ep_tensor *t, int64_t *low, int64_t *high) {
    const int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
    *low = 0;
    *high = bytes;
    for (int i = 0; i < t->ndim; i++) {
        int64_t far;
        if (__builtin_mul_overflow(t->shape[i] - 1, t->stride[i], &far) ||
            __builtin_mul_overflow(far, bytes, &far) ||
            __builtin_add_overflow(far < 0 ? *low : *high, far, far < 0 ? low : high)) {
            return false;
        }
    }
    return true;
}

static ep_status check_reach(const char *name, const struct ep_tensor *t) {
    const uintptr_t at = (uintptr_t)t->data;
    int64_t low, high;
    if (reach(t, &low, &high) && (uint64_t)0 - (uint64_t)low <= at &&
        (uint64_t)high <= UINT64_MAX - at) {
        return EP_OK;
    }
    return epi_fail(EP_ERR_ARG,
                    "%s reaches beyond the address space: shape {%lld, %lld}, strides {%lld, "
                    "%lld}",
                    name, (long long)t->shape[0], (long long)(t->ndim > 1 ? t->shape[1] : 1),
                    (long long)t->stride[0], (long long)(t->ndim > 1 ? t->stride[1] : 1));
}

static ep_status check_dense(const char *name, const struct ep_tensor *t) {
    int64_t dense = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->stride[i] != dense && t->shape[i] > 1) {
            return epi_fail(EP_ERR_ARG, "%s.stride[%d] is %lld, must be %lld (contiguous)",
                            name, i, (long long)t->stride[i], (long long)dense);
        }
        if (__builtin_mul_overflow(dense, t->shape[i], &dense)) {
            return check_reach(name, t);
        }
    }
    return EP_OK;
}

static ep_status check_rows(const char *name, const struct ep_tensor *t) {
    const int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
    const int last = t->ndim - 1;
    if (t->stride[last] != 1) {
        return epi_fail(EP_ERR_ARG, "%s.stride[%d] is %lld, must be 1 (rows contiguous)", name,
                        last, (long long)t->stride[last]);
    }
    /* A product that wraps around keeps its remainder by a power of two. */
    if (t->shape[0] > 1 && (t->stride[0] < t->shape[last] ||
                            (uint64_t)t->stride[0] * (uint64_t)bytes % EP_ROW_ALIGN != 0)) {
        return epi_fail(EP_ERR_ARG,
                        "%s.stride[0] is %lld elements of %lld bytes, must be at least %lld "
                        "and a multiple of %d bytes",
                        name, (long long)t->stride[0], (long long)bytes,
                        (long long)t->shape[last], EP_ROW_ALIGN);
    }
    return (uintptr_t)t->data % EP_ROW_ALIGN
               ? epi_fail(EP_ERR_ARG, "%s.data is %p, must be aligned to %d bytes", name,
                          t->data, EP_ROW_ALIGN)
               : EP_OK;
}

static ep_status check_columns(const char *name, const struct ep_tensor *t) {
    const uint64_t bytes = ep_dtype_bytes((ep_dtype)t->dtype);
    if (t->stride[0] != 1 || t->stride[1] < t->shape[0] ||
        (uint64_t)t->stride[1] * bytes % 16 != 0) {
        return epi_fail(EP_ERR_ARG,
                        "%s strides are {%lld, %lld}, must be {1, at least %lld and a "
                        "multiple of 16 bytes} (column-major)",
                        name, (long long)t->stride[0], (long long)t->stride[1],
                        (long long)t->shape[0]);
    }
    return EP_OK;
}

ep_status epi_check_layout(const char *name, const struct ep_tensor *t,
                           enum epi_layout layout) {
    const uintptr_t bytes = ep_dtype_bytes((ep_dtype)t->dtype);
    if (epi_is_empty(t)) {
        return EP_OK;
    }
    if (layout == EPI_LAYOUT_DENSE) {
        EPI_TRY(check_dense(name, t));
    } else if (layout == EPI_LAYOUT_ROWS) {
        EPI_TRY(check_rows(name, t));
    } else if (layout == EPI_LAYOUT_COLUMNS) {
        EPI_TRY(check_columns(name, t));
    }
    if ((uintptr_t)t->data % bytes) {
        return epi_fail(EP_ERR_ARG, "%s.data is %p, must be aligned to its %zu-byte elements",
                        name, t->data, (size_t)bytes);
    }
    return check_reach(name, t);
}

/* The dimension along which the pieces of a tensor lie that are next to each other in memory: that of
 * the longer stride. */
static int dim_of_rows(const struct ep_tensor *t) {
    return t->ndim == 2 && t->shape[1] > 1 && t->stride[1] > t->stride[0] ? 1 : 0;
}

struct epi_extent epi_extent_of(const char *name, const struct ep_tensor *t, bool output) {
    const uint64_t bytes = ep_dtype_bytes((ep_dtype)t->dtype);
    struct epi_extent e = {name, output, 0, 0, 0, 0};
    int64_t low, high;
    if (t->data && !epi_is_empty(t) && reach(t, &low, &high)) {
        const int rows = dim_of_rows(t);
        const bool one = t->ndim == 1 || t->shape[1 - rows] == 1; /* element in a row */
        e.low = (uintptr_t)t->data + (uintptr_t)low;
        e.high = (uintptr_t)t->data + (uintptr_t)high;
        if (t->ndim <= 2 && t->stride[rows] > 0 && (one || t->stride[1 - rows] > 0)) {
            const int64_t last = one ? 0 : (t->shape[1 - rows] - 1) * t->stride[1 - rows];
            e.pitch = (uint64_t)t->stride[rows] * bytes; /* of one row: any */
            e.width = ((uint64_t)last + 1) * bytes;
        }
    }
    return e;
}

bool epi_extents_overlap(const struct epi_extent *a, const struct epi_extent *b) {
    if (a->low >= b->high || b->low >= a->high) {
        return false;
    }
    if (a->pitch == 0 || a->pitch != b->pitch || a->width > a->pitch || b->width > b->pitch) {
        return true;
    }
    /* Where b's rows begin within a's. */
    const uint64_t at = b->low >= a->low ? (b->low - a->low) % a->pitch
                                         : (a->pitch - (a->low - b->low) % a->pitch) % a->pitch;
    return at < a->width || at + b->width > a->pitch;
}
