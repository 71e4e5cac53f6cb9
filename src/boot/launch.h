/* SPDX-License-Identifier: MIT */
/*
 * What the launcher's environment says: who I am, where rank 0 is, which job this is.
 * See launch.c.
 */
#ifndef EPI_BOOT_LAUNCH_H
#define EPI_BOOT_LAUNCH_H

#include "src/base/base.h"

struct epi_launch {
    int rank;
    int num_ranks;
    char host[256];
    int port;
};

struct epi_job {
    uint64_t id;    /* hash of the name and where the name came from */
    bool is_named;  /* false: nobody gave a name, so id is the same for all such jobs */
    char from[128]; /* for the log */
};

/* `name` is the caller's, NULL: EP_JOB or the launcher's. */
void epi_launch_job(const char *name, struct epi_job *out);
ep_status epi_launch_read(const struct epi_job *job, struct epi_launch *out);
/* The first host of a Slurm node list: "node[03-07,9]" is "node03". False: not understood. */
bool epi_launch_first_host(const char *list, char *out, size_t out_bytes);

#endif
