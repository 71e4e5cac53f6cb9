/* SPDX-License-Identifier: MIT */
/*
 * Checks of tensors: one place that knows how to say what is wrong with one. Pure.
 */
#include "src/ep/group.h"

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
        int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
        a.data = (k_u64)(uintptr_t)t->data;
        a.s0 = t->stride[0] * bytes;
        a.s1 = t->ndim > 1 ? t->stride[1] * bytes : 0;
    }
    return a;
}

static bool is_empty(const struct ep_tensor *t) {
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0) {
            return true;
        }
    }
    return false;
}

static ep_status check_layout(const char *name, const struct ep_tensor *t, uint32_t layout) {
    const int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
    const int last = t->ndim - 1;
    if (layout & EPI_DENSE) {
        int64_t dense = 1;
        for (int i = last; i >= 0; i--) {
            if (t->stride[i] != dense && t->shape[i] > 1) {
                return epi_fail(EP_ERR_ARG, "%s.stride[%d] is %lld, must be %lld (contiguous)",
                                name, i, (long long)t->stride[i], (long long)dense);
            }
            dense *= t->shape[i];
        }
    }
    if (layout & EPI_ROWS) {
        if (t->stride[last] != 1) {
            return epi_fail(EP_ERR_ARG, "%s.stride[%d] is %lld, must be 1 (rows contiguous)",
                            name, last, (long long)t->stride[last]);
        }
        if (t->shape[0] > 1 &&
            (t->stride[0] < t->shape[last] || t->stride[0] * bytes % EP_ROW_ALIGN != 0)) {
            return epi_fail(
                EP_ERR_ARG,
                "%s.stride[0] is %lld elements of %lld bytes, must be at least %lld "
                "and a multiple of %d bytes",
                name, (long long)t->stride[0], (long long)bytes, (long long)t->shape[last],
                EP_ROW_ALIGN);
        }
        if ((uintptr_t)t->data % EP_ROW_ALIGN != 0) {
            return epi_fail(EP_ERR_ARG, "%s.data is %p, must be aligned to %d bytes", name,
                            t->data, EP_ROW_ALIGN);
        }
    } else if (bytes > 0 && (uintptr_t)t->data % (uintptr_t)bytes != 0) {
        return epi_fail(EP_ERR_ARG, "%s.data is %p, must be aligned to its %lld-byte elements",
                        name, t->data, (long long)bytes);
    }
    return EP_OK;
}

ep_status epi_check_tensor(const char *name, const struct ep_tensor *t, int ndim, int64_t d0,
                           int64_t d1, uint32_t types, uint32_t layout) {
    if (t->size != sizeof(*t)) {
        return epi_fail(EP_ERR_VERSION, "%s.size is %u, this library's is %zu", name, t->size,
                        sizeof(*t));
    }
    if (t->dtype <= 0 || t->dtype >= NUM_DTYPES || (types & EPI_TYPE(t->dtype)) == 0) {
        char want[128] = "";
        size_t at = 0;
        for (int d = 1; d < NUM_DTYPES; d++) {
            if (types & EPI_TYPE(d)) {
                epi_format(want + at, sizeof(want) - at, "%s%s", at ? " or " : "",
                           dtypes[d].name);
                for (at = 0; want[at]; at++) {
                }
            }
        }
        return epi_fail(
            EP_ERR_ARG, "%s.dtype is %d (%s), must be %s", name, t->dtype,
            t->dtype > 0 && t->dtype < NUM_DTYPES ? dtypes[t->dtype].name : "unknown", want);
    }
    if (t->ndim != ndim) {
        return epi_fail(EP_ERR_ARG, "%s.ndim is %d, must be %d", name, t->ndim, ndim);
    }
    const int64_t want[2] = {d0, d1};
    for (int i = 0; i < ndim; i++) {
        if (t->shape[i] < 0 || (want[i] >= 0 && t->shape[i] != want[i])) {
            return epi_fail(EP_ERR_ARG, "%s.shape[%d] is %lld, must be %s%lld", name, i,
                            (long long)t->shape[i], want[i] < 0 ? "at least " : "",
                            want[i] < 0 ? 0LL : (long long)want[i]);
        }
    }
    if (!t->data && !is_empty(t)) {
        return epi_fail(EP_ERR_ARG, "%s.data is NULL and its shape is not empty", name);
    }
    return is_empty(t) ? EP_OK : check_layout(name, t, layout);
}

static void extent(const struct ep_tensor *t, uintptr_t *from, uintptr_t *to) {
    const int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
    int64_t low = 0, high = 0;
    for (int i = 0; i < t->ndim; i++) {
        int64_t reach = (t->shape[i] - 1) * t->stride[i];
        low += reach < 0 ? reach : 0;
        high += reach > 0 ? reach : 0;
    }
    *from = (uintptr_t)t->data + (uintptr_t)(low * bytes);
    *to = (uintptr_t)t->data + (uintptr_t)((high + 1) * bytes);
}

bool epi_overlap(const struct ep_tensor *a, const struct ep_tensor *b) {
    if (!a || !b || !a->data || !b->data || is_empty(a) || is_empty(b)) {
        return false;
    }
    uintptr_t a0, a1, b0, b1;
    extent(a, &a0, &a1);
    extent(b, &b0, &b1);
    return a0 < b1 && b0 < a1;
}
