/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Rows are bytes to dispatch: every type, with every type and number of scales, from strided
 * inputs into strided, row-major or column-major outputs; ids of both types with any strides.
 */
#include <stdio.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

static const int row_dtypes[] = {EP_BF16, EP_F16, EP_F32, EP_F8E4M3, EP_F8E5M2,
                                 EP_U8,   EP_I16, EP_I32, EP_I64};
static const int scale_dtypes[] = {0,      EP_U8,  EP_F8E4M3, EP_F8E5M2, EP_BF16,
                                   EP_F16, EP_I16, EP_F32,    EP_I32};
static const int64_t num_scales[] = {1, 2, 3, 7, 16, 17, 56, 129};

static void types(uint64_t seed) {
    int n = 0;

    for (int row = 0; row < 9; row++) {
        bool good = true;
        char name[64];

        snprintf(name, sizeof(name), "rows of dtype %d with any scales", row_dtypes[row]);
        for (int scale = 0; scale < 9 && good; scale++, n++) {
            const struct form form = {.expanded = n % 3 == 2,
                                      .columns = n % 2,
                                      .padded = n / 2 % 2,
                                      .alignment = 1 + n % 4,
                                      .slack = n % 4,
                                      .id_dtype = n % 5 ? EP_I32 : EP_I64};
            struct test_case c;

            case_default(&c, 3, seed + (uint64_t)n);
            c.max_tokens = 20;
            c.row_dtype = row_dtypes[row];
            c.hidden = 16 / (int64_t)ep_dtype_bytes((ep_dtype)c.row_dtype) * (1 + n % 9);
            c.scale_dtype = scale_dtypes[scale];
            c.num_scales = scale ? num_scales[n % 8] : 0;
            c.scale_stride = (enum case_stride)(n % NUM_STRIDES);
            c.x_stride = (enum case_stride)(n / 2 % 2);
            good = trial_case(&c, &form, false, name);
        }
    }
}

static void strides(uint64_t seed) {
    for (int i = 0; i < 2 * NUM_STRIDES; i++) {
        const struct form form = {.id_dtype = i % 2 ? EP_I32 : EP_I64, .padded = true};
        struct test_case c;
        char name[64];

        case_default(&c, 4, seed + (uint64_t)i);
        c.id_dtype = i % 2 ? EP_I64 : EP_I32;
        c.id_stride = (enum case_stride)(i / 2);
        c.weight_stride = (enum case_stride)((i / 2 + 1) % NUM_STRIDES);
        c.x_stride = STRIDE_PADDED;
        snprintf(name, sizeof(name), "ids of dtype %d, stride kind %d", c.id_dtype, i / 2);
        trial_case(&c, &form, i == 3, name);
        case_default(&c, 3, seed + (uint64_t)i);
        c.mask = true;
        c.topk = 0;
        c.weights = false;
        c.mask_stride = (enum case_stride)(i / 2);
        snprintf(name, sizeof(name), "masks, stride kind %d", i / 2);
        trial_case(&c, &form, false, name);
    }
}

static void sizes(uint64_t seed) {
    static const int64_t bytes[] = {16, 32, 48, 112, 1024, 4112, 14336, 28672};

    for (size_t i = 0; i < sizeof(bytes) / sizeof(*bytes); i++) {
        const struct form form = {.id_dtype = EP_I64, .columns = true, .expanded = i % 2};
        struct test_case c;
        char name[64];

        case_default(&c, 2, seed + i);
        c.row_dtype = EP_U8;
        c.hidden = bytes[i];
        c.num_scales = 1 + bytes[i] / 128;
        c.scale_dtype = EP_F32;
        snprintf(name, sizeof(name), "rows of %lld bytes", (long long)bytes[i]);
        trial_case(&c, &form, i == 6, name);
    }
}

int main(void) {
    gpu_program();
    uint64_t seed = tap_seed();

    tap_deadline(300);
    types(seed);
    strides(seed + 1000);
    sizes(seed + 2000);
    return done_testing();
}
