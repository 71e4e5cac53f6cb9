/* SPDX-License-Identifier: MIT */
/*
 * How many SMs an operation takes: the formula of docs/performance.md. Pure, so that a table can
 * test it.
 */
#ifndef EPI_SMS_H
#define EPI_SMS_H

#include <stdbool.h>

/* An operation, as far as the number of its SMs depends on it. */
struct epi_load {
    int row_bytes; /* 0: local work */
    int topk;
    bool expanded, answers; /* answers: a combine */
};

struct epi_sms {
    int send; /* saturate the link */
    int all;
};

/* `major`: of the device's compute capability; `nvlink`: how peers are reached. */
struct epi_sms epi_sms_for(int major, bool nvlink, int num_ranks, const struct epi_load *load);

#endif
