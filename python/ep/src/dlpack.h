/* SPDX-License-Identifier: MIT */
/* The binary interface of DLPack 1.x, as far as it is used here: how array libraries tell each
 * other of memory. The layouts are the standard's. */
#ifndef EP_DLPACK_H
#define EP_DLPACK_H

#include <stdint.h>

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 };
enum {
    DL_INT = 0,
    DL_UINT = 1,
    DL_FLOAT = 2,
    DL_BFLOAT = 4,
    DL_BOOL = 6,
    DL_E4M3FN = 10,
    DL_E5M2 = 12,
    DL_E8M0 = 14,
    DL_FP4 = 17
};

struct dl_device {
    int32_t type;
    int32_t index;
};
struct dl_type {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};
struct dl_tensor {
    void *data;
    struct dl_device device;
    int32_t ndim;
    struct dl_type type;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
};
struct dl_version {
    uint32_t major;
    uint32_t minor;
};

/* In a capsule named "dltensor". */
struct dl_managed {
    struct dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *self);
};
/* In a capsule named "dltensor_versioned". */
struct dl_versioned {
    struct dl_version version;
    void *context;
    void (*deleter)(struct dl_versioned *self);
    uint64_t flags; /* bit 0: read only */
    struct dl_tensor tensor;
};
/* In a capsule named "dlpack_exchange_api", an attribute of an array's type. */
struct dl_exchange {
    struct dl_version version;
    struct dl_exchange *older;
    void *allocate;
    int (*to_managed)(void *array, struct dl_versioned **out);
    int (*from_managed)(struct dl_versioned *managed, void **array);
    int (*to_tensor)(void *array, struct dl_tensor *out);
    int (*current_stream)(int32_t device_type, int32_t device_index, void **stream);
};

#endif
