/* SPDX-License-Identifier: MIT */
/*
 * Ranks that meet, for tests of src/boot: where, for how long they wait, and whether what they
 * formed works. Any thread or process may call these.
 */
#ifndef TESTS_MEET_H
#define TESTS_MEET_H

#include "src/boot/parts.h"

#define MEET_LONG_NS (30 * EPI_NS_PER_S)
#define MEET_SHORT_NS (800 * EPI_NS_PER_MS)

struct epi_deadline meet_in_time(void);
/* The last error's text holds `what`; says so if not. */
bool meet_says(const char *what);
struct epi_boot_config meet_config(char address[32], int port, int rank, int num_ranks);
ep_status meet_join(struct epi_boot **boot, int port, int rank, int num_ranks, const char *job,
                    int64_t timeout_ns);
/* What rank `rank` of a job that meets at that port of 127.0.0.1 knows. */
void meet_of(struct epi_meet *m, int port, int rank, int num_ranks, const char *job);
/* A connection to whoever listens at that place of the job's, once somebody does; -1: nobody. */
int meet_dial(const struct epi_meet *m, int place);

/* The group works: everyone's bytes arrive, in order. */
void meet_check_group(struct epi_boot *boot, int rank, int num_ranks);

#endif
