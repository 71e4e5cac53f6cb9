/* SPDX-License-Identifier: MIT */
/*
 * A device that is not there, for tests of src/mem: its memory is a memfd, its addresses are this
 * process's own, and what host memory is attached to it appears at another address, as with CUDA.
 * Each call can be made to fail, to be late or to hang on a chosen rank. And a way for ranks,
 * threads or processes, to gather data, which notices those that have gone.
 */
#ifndef TESTS_FAKE_H
#define TESTS_FAKE_H

#include <stdatomic.h>

#include "src/mem/mem.h"

#define FAKE_MAX_RANKS 8
#define FAKE_MAX_BYTES 512 /* of a rank in one allgather */

/* In memory that all ranks share. Zero it before a group, when nobody is in it. */
struct fake_meeting {
    int num_ranks;
    atomic_int gone[FAKE_MAX_RANKS];     /* left, or known to be dead */
    atomic_int num_puts[FAKE_MAX_RANKS]; /* rounds that the rank has come to */
    unsigned char slot[2][FAKE_MAX_RANKS][FAKE_MAX_BYTES];
};

/* A rank's side of it. EP_ERR_PEER: somebody has gone; EP_ERR_TIMEOUT. Nothing is allocated. */
struct fake_seat {
    struct fake_meeting *meeting;
    int rank, num_rounds;
    int64_t timeout_ns;
};
struct epi_exchange fake_exchange(struct fake_seat *seat);

enum fake_op { FAKE_CREATE, FAKE_ADMIT, FAKE_IMPORT, FAKE_ATTACH, FAKE_NUM_OPS };

/* What goes wrong, by rank. */
struct fake_trouble {
    enum fake_op op;
    ep_status status[FAKE_MAX_RANKS]; /* EP_OK: nothing */
    bool always;                      /* else the first call only */
    int late_ms[FAKE_MAX_RANKS];
    bool hangs[FAKE_MAX_RANKS];
};

/* One rank's device. */
struct fake_device {
    int rank;
    const struct fake_trouble *trouble;
    atomic_int *hung; /* set when a call hangs */
    int calls[FAKE_NUM_OPS];
    struct epi_mem_device ops; /* its ctx is this struct */
};
void fake_device(struct fake_device *f, int rank, const struct fake_trouble *trouble,
                 atomic_int *hung);

/* What this process has of all its devices, and whether anything was done wrongly: released twice,
 * registered twice, or with data that is not its own. */
struct fake_count {
    int created, imported, admitted, pieces, reserved, attached,
        wrong; /* the first three since ever */
};
struct fake_count fake_count(void);

#endif
