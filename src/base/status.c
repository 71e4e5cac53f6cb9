/* SPDX-License-Identifier: MIT */
/*
 * The names of statuses and the text of the last error.
 *
 * Owns one fixed buffer per thread, so that reporting an error can neither fail nor touch
 * another thread's report. Runs on any thread.
 * Must not allocate, log or read the environment: it is what everything else fails into.
 */
#include "src/base/base.h"

#include <stdio.h>
#include <string.h>

static _Thread_local char error_text[EPI_ERROR_TEXT_BYTES];

static void format(char *out, size_t out_bytes, const char *fmt, va_list args) {
    int len = vsnprintf(out, out_bytes, fmt, args);
    if (len < 0) {
        out[0] = '\0';
    } else if ((size_t)len >= out_bytes && out_bytes >= 4) {
        memcpy(out + out_bytes - 4, "...", 4);
    }
}

void epi_format(char *out, size_t out_bytes, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    format(out, out_bytes, fmt, args);
    va_end(args);
}

ep_status epi_fail(ep_status st, const char *fmt, ...) {
    /* Formatted aside first: an argument may point into error_text. */
    char text[EPI_ERROR_TEXT_BYTES];
    va_list args;
    va_start(args, fmt);
    format(text, sizeof(text), fmt, args);
    va_end(args);
    memcpy(error_text, text, sizeof(text));
    /* Arguments are also what a peer or the environment has said; the text is for a terminal. */
    for (char *at = error_text; *at; at++) {
        if ((unsigned char)*at < 0x20 || *at == 0x7f) {
            *at = '?';
        }
    }
    return st;
}

void epi_clear_error(void) {
    error_text[0] = '\0';
}

const char *epi_error_text(void) {
    return error_text;
}

const char *ep_last_error(void) {
    return error_text;
}

const char *ep_status_string(ep_status status) {
    /* A switch without a default: the compiler names the status that was forgotten here. */
#define CASE(name)                                                                             \
    case name:                                                                                 \
        return #name
    switch (status) {
        CASE(EP_OK);
        CASE(EP_AGAIN);
        CASE(EP_ERR_ARG);
        CASE(EP_ERR_STATE);
        CASE(EP_ERR_CAPACITY);
        CASE(EP_ERR_NOMEM);
        CASE(EP_ERR_TIMEOUT);
        CASE(EP_ERR_PEER);
        CASE(EP_ERR_MISMATCH);
        CASE(EP_ERR_FAULTED);
        CASE(EP_ERR_UNSUPPORTED);
        CASE(EP_ERR_SYSTEM);
        CASE(EP_ERR_VERSION);
        CASE(EP_ERR_INTERRUPTED);
        CASE(EP_ERR_INTERNAL);
    }
#undef CASE
    return "unknown status";
}
