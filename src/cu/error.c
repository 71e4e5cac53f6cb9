/* SPDX-License-Identifier: MIT */
/*
 * From results of the driver to statuses with a text that names the call, the error and what the
 * driver says about it. Any thread. Must not log: whoever returns the status to a user does.
 */
#include "src/cu/driver.h"

static ep_status status_of(int result) {
    switch (result) {
    case CU_INVALID_VALUE:
        return EP_ERR_INTERNAL; /* arguments were checked before they came here */
    case CU_OUT_OF_MEMORY:
        return EP_ERR_NOMEM;
    case CU_NO_DEVICE:
    case CU_NO_BINARY_FOR_GPU:
    case CU_PEER_ACCESS_UNSUPPORTED:
    case CU_NOT_SUPPORTED:
    case CU_SYSTEM_DRIVER_MISMATCH:
        return EP_ERR_UNSUPPORTED;
    default:
        return EP_ERR_SYSTEM;
    }
}

ep_status epi_cu_result(int result, const char *call) {
    const char *name = NULL, *text = NULL;
    if (result == CU_SUCCESS) {
        return EP_OK;
    }
    if (result == CU_NOT_READY) {
        return EP_AGAIN;
    }
    epi_cu_driver.GetErrorName(result, &name);
    epi_cu_driver.GetErrorString(result, &text);
    return epi_fail(status_of(result), "%s returned %s (%d): %s", call,
                    name ? name : "an unknown error", result,
                    text ? text : "the driver has no text for it");
}
