/* SPDX-License-Identifier: MIT */
/*
 * How many SMs the operations of a CUDA group may take: a promise to the group, kept while it
 * lives; see cuda_sms.c.
 */
#ifndef EPI_CUDA_SMS_H
#define EPI_CUDA_SMS_H

#include "src/ep/group.h"

struct epi_cu_device;

struct epi_cuda_sms {
    int device;   /* index */
    int promised; /* of it, to this rank; 0: none yet */
    int local;    /* that work without peers may take */
    bool nvlink;  /* peers are reached by it, or lie on this device */
};

/* Collective. EP_ERR_ARG: there are not so many, or other groups of the process have them. */
ep_status epi_cuda_sms_promise(struct epi_cuda_sms *out, const ep_group *g,
                               const struct epi_cu_device *d, const struct epi_exchange *x);
void epi_cuda_sms_give_back(struct epi_cuda_sms *s);

#endif
