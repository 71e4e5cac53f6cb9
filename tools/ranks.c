/* SPDX-License-Identifier: MIT */
/*
 * Ranks of this very program: forked processes, or threads of one forked process.
 *
 * Owns the memory by which ranks report. The parent runs no rank: crew.c watches them and ends
 * all when one fails, so that a crash or a hang of the library costs a message and not the
 * program.
 */
#include "tools/tool.h"

#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define GRACE_NS (3 * EPI_NS_PER_S) /* for the others to say what they saw of a failed rank */
#define TICK_MS 10

struct ranks_shared {
    pthread_barrier_t barrier;
    char address[32];
    char job[48];
    char error[EP_MAX_RANKS][480]; /* each written by its rank before it ends */
};

void *ranks_memory(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return p != MAP_FAILED ? p : NULL;
}

static bool port_is_free(int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return true; /* nobody can listen at all; ranks of one host need no port */
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    bool is_free = bind(fd, (struct sockaddr *)&at, sizeof(at)) == 0 && listen(fd, 1) == 0;
    close(fd);
    return is_free;
}

/* Below the range from which the kernel takes ports for outgoing connections. */
int tool_free_port(void) {
    uint64_t state = (uint64_t)epi_now_ns() ^ (uint64_t)getpid() << 40;
    for (int i = 0; i < 200; i++) {
        int port = 20000 + (int)(tool_rand(&state) % 6000) * 2;
        if (port_is_free(port) && port_is_free(port + 1)) {
            return port;
        }
    }
    return 0;
}

void rank_config(const struct rank *rank, struct ep_group_config *config) {
    config->rank = rank->rank;
    config->num_ranks = rank->num_ranks;
    config->world = rank->world;
    config->address = rank->address;
    config->job = rank->shared->job;
}

void rank_barrier(struct rank *rank) {
    pthread_barrier_wait(&rank->shared->barrier);
}

int rank_fail(struct rank *rank, ep_status st, const char *fmt, ...) {
    char *out = rank->shared->error[rank->rank];
    size_t room = sizeof(rank->shared->error[0]);
    if (out[0] != '\0') {
        return 1;
    }
    char detail[400] = "";
    if (st != EP_OK) {
        snprintf(detail, sizeof(detail), ": %s: %s", ep_status_string(st), ep_last_error());
    }
    va_list args;
    va_start(args, fmt);
    int len = vsnprintf(out, room, fmt, args);
    va_end(args);
    if (len >= 0 && (size_t)len < room) {
        snprintf(out + len, room - (size_t)len, "%s", detail);
    }
    return 1;
}

struct parent {
    struct crew crew;
    struct ranks_job *job;
    struct ranks_shared *shared;
};

/* ---- in the children --------------------------------------------------------------------- */

struct thread_rank {
    struct rank rank;
    struct ranks_job *job;
    pthread_t thread;
    int result;
};

static void *thread_main(void *arg) {
    struct thread_rank *t = arg;
    t->result = t->job->fn(&t->rank, t->job->arg);
    if (t->result != 0) {
        epi_sleep_ns(GRACE_NS); /* the others may wait for this one at the barrier */
        _exit(1);
    }
    return NULL;
}

static int run_threads(struct ranks_job *job, struct ranks_shared *shared) {
    struct rank first = {.num_ranks = job->num_ranks, .shared = shared};
    ep_status st = ep_world_create(&first.world, job->num_ranks);
    if (st != EP_OK) {
        return rank_fail(&first, st, "ep_world_create");
    }
    struct thread_rank *all = calloc((size_t)job->num_ranks, sizeof(*all));
    for (int i = 0; all && i < job->num_ranks; i++) {
        all[i] = (struct thread_rank){.rank = first, .job = job};
        all[i].rank.rank = i;
        if (epi_thread_start(&all[i].thread, thread_main, &all[i], "rank") != 0) {
            return rank_fail(&first, EP_OK, "cannot start thread %d", i);
        }
    }
    for (int i = 0; all && i < job->num_ranks; i++) {
        pthread_join(all[i].thread, NULL);
    }
    free(all);
    ep_world_destroy(&first.world);
    return !all;
}

static void child_main(void *arg, int index) {
    struct parent *p = arg;
    struct rank rank = {.rank = index, .num_ranks = p->job->num_ranks, .shared = p->shared};
    signal(SIGINT, SIG_IGN); /* the parent ends us */
    signal(SIGTERM, SIG_DFL);
    rank.address = p->shared->address;
    _exit(p->job->threads ? run_threads(p->job, p->shared) : p->job->fn(&rank, p->job->arg));
}

/* ---- in the parent ----------------------------------------------------------------------- */

EPI_PRINTF(2, 3)
static void complain(struct ranks_job *job, const char *fmt, ...) {
    char line[640];
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof(line), fmt, args);
    va_end(args);
    if (job->why[0] == '\0') {
        snprintf(job->why, sizeof(job->why), "%.500s", line);
    }
    if (!job->quiet) { /* signals are not taken meanwhile, so nobody is waited for */
        char text[720];
        struct output err;
        epi_format(text, sizeof(text), "%s%s: %s\n", isatty(STDOUT_FILENO) ? "\n" : "",
                   job->name, line);
        output_open(&err, STDERR_FILENO);
        output_add(&err, text, strlen(text));
        output_flush(&err);
        output_close(&err);
    }
}

/* In the words of the ranks of child `index`, if they have left any. */
static void say(void *arg, int index, const char *text) {
    struct parent *p = arg;
    int first = p->job->threads ? 0 : index;
    int end = p->job->threads ? p->job->num_ranks : index + 1;
    bool said = false;
    for (int i = first; i < end && index >= 0; i++) {
        if (p->shared->error[i][0] != '\0') {
            complain(p->job, "rank %d: %s", i, p->shared->error[i]);
            said = true;
        }
    }
    if (!said) {
        complain(p->job, "%s", text);
    }
}

static void wait_and_tick(void *arg, int watch_fd, int ms) {
    struct parent *p = arg;
    struct pollfd fd = {.fd = watch_fd, .events = POLLIN};
    if (p->job->tick && !p->crew.killed) {
        p->job->tick(p->job->arg);
    }
    poll(&fd, 1, ms < TICK_MS ? ms : TICK_MS);
}

int ranks_run(struct ranks_job *job) {
    struct ranks_shared *shared = ranks_memory(sizeof(*shared));
    int port = tool_free_port();
    job->why[0] = '\0';
    if (!shared || port == 0) {
        complain(job, "%s", port == 0 ? "no free TCP port on this machine" : "no memory");
        return 1;
    }
    pthread_barrierattr_t attr;
    pthread_barrierattr_init(&attr);
    pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&shared->barrier, &attr, (unsigned)job->num_ranks);
    snprintf(shared->address, sizeof(shared->address), "127.0.0.1:%d", port);
    snprintf(shared->job, sizeof(shared->job), "ep-%d-%llx", (int)getpid(),
             (unsigned long long)epi_now_ns());
    struct parent p = {.crew = {.num = job->threads ? 1 : job->num_ranks,
                                .grace_ns = GRACE_NS,
                                .timeout_s = job->timeout_s,
                                .child = child_main,
                                .wait = wait_and_tick,
                                .say = say,
                                .arg = &p},
                       .job = job,
                       .shared = shared};
    crew_run(&p.crew);
    munmap(shared, sizeof(*shared));
    return p.crew.signal != 0 ? 128 + p.crew.signal : p.crew.status != 0;
}
