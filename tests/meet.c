/* SPDX-License-Identifier: MIT */
/* Ranks that meet: the helpers of meet.h. Owns nothing; test points are those of the caller. */
#include "tests/meet.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/tap.h"

struct epi_deadline meet_in_time(void) {
    return epi_deadline_after(MEET_LONG_NS);
}

bool meet_says(const char *what) {
    bool found = strstr(ep_last_error(), what) != NULL;
    if (!found) {
        diag("\"%s\" does not say \"%s\"", ep_last_error(), what);
    }
    return found;
}

struct epi_boot_config meet_config(char address[32], int port, int rank, int num_ranks) {
    snprintf(address, 32, "127.0.0.1:%d", port);
    return (struct epi_boot_config){
        .rank = rank, .num_ranks = num_ranks, .address = address, .timeout_ns = MEET_LONG_NS};
}

ep_status meet_join(struct epi_boot **boot, int port, int rank, int num_ranks, const char *job,
                    int64_t timeout_ns) {
    char address[32];
    struct epi_boot_config config = meet_config(address, port, rank, num_ranks);
    config.job = job;
    config.timeout_ns = timeout_ns;
    return epi_boot_create(boot, &config);
}

void meet_of(struct epi_meet *m, int port, int rank, int num_ranks, const char *job) {
    struct epi_job id;
    memset(m, 0, sizeof(*m));
    m->rank = rank;
    m->num_ranks = num_ranks;
    m->timeout_ns = MEET_LONG_NS;
    m->deadline = epi_deadline_after(MEET_LONG_NS);
    m->port = port;
    snprintf(m->host, sizeof(m->host), "127.0.0.1");
    epi_launch_job(job, &id);
    m->is_job_named = id.is_named;
    ok(epi_meet_choose(m, id.name) == EP_OK, "where to meet: %s", ep_last_error());
}

int meet_dial(const struct epi_meet *m, int place) {
    struct epi_addr places[EPI_MEET_MAX_ADDRS];
    int num = 0;
    epi_meet_places(m, places, &num);
    for (int i = 0; i < 4000 && place < num; i++) {
        int fd = socket(places[place].ss.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 &&
            connect(fd, (struct sockaddr *)&places[place].ss, places[place].len) == 0) {
            return fd;
        }
        close(fd);
        tap_sleep_ms(5);
    }
    return -1;
}

void meet_check_group(struct epi_boot *boot, int rank, int num_ranks) {
    int mine[2] = {rank, rank * 7};
    int all[64][2];
    ok(epi_boot_rank(boot) == rank && epi_boot_num_ranks(boot) == num_ranks, "who I am");
    for (int i = 0; i < 5; i++) {
        ep_status st = epi_boot_allgather(boot, mine, sizeof(mine), all, meet_in_time());
        ok(st == EP_OK, "allgather: %s", ep_last_error());
        for (int r = 0; r < num_ranks; r++) {
            ok(all[r][0] == r && all[r][1] == r * 7, "rank %d's bytes are in place", r);
        }
        ok(epi_boot_barrier(boot, meet_in_time()) == EP_OK, "barrier: %s", ep_last_error());
    }
}
