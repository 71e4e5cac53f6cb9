/* SPDX-License-Identifier: MIT */
/*
 * The driver's devices and contexts, with what it says of itself. A context is a number; each
 * thread has a stack of them. Functions are called from any thread. Must not know of streams.
 */
#include "tests/driver/driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NUM_DEVICES 2
#define NUM_SMS 16        /* EP_TEST_SMS says otherwise */
#define SHARED_BYTES 6144 /* so that blocks have two warps */

static int contexts[NUM_DEVICES];
static _Thread_local void *stack[16];
static _Thread_local int depth;

DEFINE(cuInit, unsigned flags) {
    return flags ? CU_INVALID_VALUE : 0;
}
DEFINE(cuDriverGetVersion, int *version) {
    *version = 13000;
    return 0;
}
DEFINE(cuGetErrorName, int result, const char **name) {
    *name = result == CU_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
    return 0;
}
DEFINE(cuGetErrorString, int result, const char **text) {
    (void)result;
    *text = "the driver for tests says no more";
    return 0;
}
DEFINE(cuDeviceGetCount, int *count) {
    *count = NUM_DEVICES;
    return 0;
}
DEFINE(cuDeviceGet, int *device, int index) {
    *device = index;
    return index < 0 || index >= NUM_DEVICES ? CU_INVALID_DEVICE : 0;
}
DEFINE(cuDeviceGetName, char *name, int bytes, int device) {
    snprintf(name, (size_t)bytes, "a device for tests, %d", device);
    return 0;
}
DEFINE(cuDeviceGetAttribute, int *value, int attribute, int device) {
    (void)device;
    const char *sms = getenv("EP_TEST_SMS");
    *value = attribute == 16    ? (sms ? atoi(sms) : NUM_SMS)
             : attribute == 75  ? 9
             : attribute == 76  ? 0
             : attribute == 97  ? SHARED_BYTES
             : attribute == 133 ? 0 /* MPS */
                                : 1;
    return 0;
}
DEFINE(cuDeviceTotalMem_v2, size_t *bytes, int device) {
    (void)device;
    *bytes = (size_t)1 << 34;
    return 0;
}
DEFINE(cuDeviceGetUuid_v2, uint8_t *uuid, int device) {
    memset(uuid, device + 1, 16);
    return 0;
}
DEFINE(cuDeviceCanAccessPeer, int *can, int device, int peer) {
    *can = device != peer;
    return 0;
}
DEFINE(cuDevicePrimaryCtxRetain, void **context, int device) {
    *context = &contexts[device];
    return 0;
}
DEFINE(cuDevicePrimaryCtxRelease_v2, int device) {
    (void)device;
    return 0;
}
DEFINE(cuCtxPushCurrent_v2, void *context) {
    stack[depth++] = context;
    return 0;
}
DEFINE(cuCtxPopCurrent_v2, void **context) {
    *context = stack[--depth];
    return 0;
}
DEFINE(cuCtxSetCurrent, void *context) {
    depth += depth == 0;
    stack[depth - 1] = context;
    return 0;
}
DEFINE(cuCtxGetDevice, int *device) {
    if (depth == 0) {
        return CU_INVALID_VALUE;
    }
    *device = (int)((int *)stack[depth - 1] - contexts);
    return 0;
}
int driver_device(void) {
    int device = 0;
    cuCtxGetDevice(&device);
    return device;
}
DEFINE(cuCtxEnablePeerAccess, void *context, unsigned flags) {
    (void)context, (void)flags;
    return 0;
}
DEFINE(cuCtxGetStreamPriorityRange, int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}
