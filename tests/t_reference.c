/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * The reference's own numbers: every f16 and bf16 survives the way to float and back, and every
 * float32 between two neighbours is rounded to the nearer one, ties to the even one.
 */
#include <math.h>
#include <string.h>

#include "ep.h"
#include "tests/gpu.h"
#include "tests/ref.h"
#include "tests/tap.h"

static uint16_t store(int dtype, float value) {
    uint16_t half;

    ref_store(dtype, value, &half);
    return half;
}

static float load(int dtype, uint16_t half) {
    return ref_load(dtype, &half);
}

/* Positive finite numbers in order: a number and the next one, and what lies between. */
static bool rounds_to_nearest(int dtype, uint16_t infinity) {
    for (uint16_t h = 0; h + 1 < infinity; h++) {
        const float low = load(dtype, h), high = load(dtype, (uint16_t)(h + 1));
        const float middle = low / 2 + high / 2;
        const uint16_t even = (uint16_t)(h + (h & 1));

        if (!(low < high) || store(dtype, low) != h || store(dtype, -low) != (h | 0x8000)) {
            return false;
        }
        if (middle - low == high - middle && (double)middle == ((double)low + high) / 2 &&
            (store(dtype, middle) != even || store(dtype, nextafterf(middle, 0)) != h ||
             store(dtype, nextafterf(middle, high)) != h + 1)) {
            return false;
        }
    }
    return true;
}

int main(void) {
    gpu_never("no device is in it");
    tap_deadline(60);
    tap_seed();
    ok(rounds_to_nearest(EP_F16, 0x7C00), "f16: to the nearest, ties to even, also denormals");
    ok(rounds_to_nearest(EP_BF16, 0x7F80),
       "bf16: to the nearest, ties to even, also denormals");
    ok(store(EP_F16, 65519.0f) == 0x7BFF && store(EP_F16, 65520.0f) == 0x7C00,
       "f16: rounds to infinity from halfway past the largest");
    ok(store(EP_F16, 0x1p-25f) == 0 && store(EP_F16, 0x1.8p-25f) == 1 &&
           store(EP_F16, 0x1p-40f) == 0,
       "f16: half of the smallest denormal is zero, more is not");
    ok(store(EP_BF16, 0x1.fffffep127f) == 0x7F80, "bf16: the largest float32 becomes infinity");
    ok(isnan(load(EP_F16, store(EP_F16, NAN))) && isnan(load(EP_BF16, store(EP_BF16, NAN))) &&
           store(EP_F16, -NAN) == 0x7FFF && store(EP_BF16, -NAN) == 0x7FFF,
       "NaN stays NaN, the one of GPUs");
    ok(store(EP_F16, -INFINITY) == 0xFC00 && store(EP_BF16, -INFINITY) == 0xFF80 &&
           isinf(load(EP_F16, 0x7C00)),
       "infinity stays infinity");
    ok(load(EP_F16, 0x3C00) == 1.0f && load(EP_BF16, 0x3F80) == 1.0f &&
           load(EP_F16, 0x0001) == 0x1p-24f && load(EP_F16, 0xC248) == -3.140625f,
       "a few numbers by hand");
    return done_testing();
}
