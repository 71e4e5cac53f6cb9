/* SPDX-License-Identifier: MIT */
/*
 * Between crew.c and guard.c: what the guard tells, and how processes are found and ended.
 */
#ifndef TOOLS_CREW_H
#define TOOLS_CREW_H

#include <signal.h>
#include <sys/types.h>

#include "tools/tool.h"

enum report_what { REPORT_STARTED, REPORT_FAILED, REPORT_ENDED, REPORT_LEFT };

/* Short enough to be written at once. STARTED: all that could be. FAILED: child `index` and those after
 * it could not be started, for the reason `status`. ENDED: `status` as waitpid has it. LEFT: process
 * `index` was still there when its time was over, and is ended. */
struct report {
    int32_t what, index, status;
    char name[16];
};

/* The life of the guard, a child of `ep`: ends what it has started when nobody holds the other end of
 * `control` any more. Children get the signal mask. Does not return. */
void guard_run(struct crew *crew, int control, int reports, const sigset_t *mask);

/* The processes that come from `root`, parents first, without those spared and what comes from these.
 * *out is freed by the caller. -1: there is no /proc. */
int processes_below(pid_t root, const pid_t *spared, int num_spared, struct epi_process **out);
/* Kills all that comes from this process. False: not all of it has ended after a while. */
bool processes_end(const pid_t *spared, int num_spared);

#endif
