/* SPDX-License-Identifier: MIT */
/*
 * Ranks of this very program: forked processes, or threads of one forked process.
 *
 * Owns the processes it forks and the memory by which they report. The parent runs no rank: it
 * waits, ticks, and ends all when one fails, so that a crash or a hang of the library costs a
 * message and not the program. Must not leave a process behind: ranks die with their parent.
 */
#include "tools/tool.h"

#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define GRACE_NS (3 * EPI_NS_PER_S) /* for the others to say what they saw of a failed rank */
#define POLL_NS (10 * EPI_NS_PER_MS)

struct ranks_shared {
    pthread_barrier_t barrier;
    char address[32];
    char job[48];
    char error[EP_MAX_RANKS][480]; /* each written by its rank before it ends */
};

static volatile sig_atomic_t got_signal;

static void on_signal(int sig) {
    got_signal = sig;
}

void *ranks_memory(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return p != MAP_FAILED ? p : NULL;
}

static bool port_is_free(int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return false;
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    bool is_free = bind(fd, (struct sockaddr *)&at, sizeof(at)) == 0 && listen(fd, 1) == 0;
    close(fd);
    return is_free;
}

/* Below the range from which the kernel takes ports for outgoing connections. */
int free_port(void) {
    uint64_t state = (uint64_t)epi_now_ns() ^ (uint64_t)getpid() << 40;
    for (int i = 0; i < 200; i++) {
        int port = 20000 + (int)(rand_next(&state) % 6000) * 2;
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

static void child_main(struct ranks_job *job, struct ranks_shared *shared, int index,
                       pid_t parent) {
    signal(SIGINT, SIG_IGN); /* the parent ends us */
    signal(SIGTERM, SIG_DFL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
        _exit(1);
    }
    struct rank rank = {.rank = index, .num_ranks = job->num_ranks, .shared = shared};
    rank.address = shared->address;
    _exit(job->threads ? run_threads(job, shared) : job->fn(&rank, job->arg));
}

/* ---- in the parent ----------------------------------------------------------------------- */

static void complain(struct ranks_job *job, const char *fmt, ...) EPI_PRINTF(2, 3);
static void complain(struct ranks_job *job, const char *fmt, ...) {
    char line[640];
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof(line), fmt, args);
    va_end(args);
    if (job->why[0] == '\0') {
        snprintf(job->why, sizeof(job->why), "%.500s", line);
    }
    if (!job->quiet) {
        fprintf(stderr, "%s%s: %s\n", isatty(STDOUT_FILENO) ? "\n" : "", job->name, line);
    }
}

static void report(struct ranks_job *job, struct ranks_shared *shared, int index, int status) {
    if (WIFSIGNALED(status)) {
        complain(job, "rank %d was killed by signal %d (%s)", index, WTERMSIG(status),
                 strsignal(WTERMSIG(status)));
        return;
    }
    bool said = false;
    for (int i = job->threads ? 0 : index; i < (job->threads ? job->num_ranks : index + 1);
         i++) {
        if (shared->error[i][0] != '\0') {
            complain(job, "rank %d: %s", i, shared->error[i]);
            said = true;
        }
    }
    if (!said) {
        complain(job, "rank %d exited with status %d", index, WEXITSTATUS(status));
    }
}

/* Waits for all; the first failure gives the others GRACE_NS. Returns how many failed. */
static int supervise(struct ranks_job *job, struct ranks_shared *shared, pid_t *pids, int num) {
    struct epi_deadline end = epi_deadline_never();
    if (job->timeout_s > 0) {
        end = epi_deadline_after(job->timeout_s * EPI_NS_PER_S);
    }
    bool ended = false;
    int num_failed = 0;
    for (int live = num; live > 0;) {
        for (int i = 0; i < num; i++) {
            int status = 0;
            if (pids[i] == 0 || waitpid(pids[i], &status, WNOHANG) != pids[i]) {
                continue;
            }
            pids[i] = 0;
            live--;
            if (status != 0 && !ended) {
                report(job, shared, i, status);
                end = epi_deadline_min(end, epi_deadline_after(GRACE_NS));
                num_failed++;
            }
        }
        if (live > 0 && !ended && (got_signal != 0 || epi_deadline_expired(end))) {
            if (got_signal != 0) {
                complain(job, "ended by signal %d (%s)", got_signal, strsignal(got_signal));
            } else if (num_failed == 0) {
                complain(job, "not done after %d s", job->timeout_s);
            }
            num_failed += num_failed == 0;
            ended = true;
            for (int i = 0; i < num; i++) {
                if (pids[i] != 0) {
                    kill(pids[i], SIGKILL);
                }
            }
        }
        if (live > 0) {
            if (job->tick && !ended) {
                job->tick(job->arg);
            }
            epi_sleep_ns(POLL_NS);
        }
    }
    return num_failed;
}

static int start_all(struct ranks_job *job, struct ranks_shared *shared, pid_t *pids, int num) {
    pid_t parent = getpid();
    fflush(NULL);
    for (int i = 0; i < num; i++) {
        pids[i] = fork();
        if (pids[i] == 0) {
            child_main(job, shared, i, parent);
        }
        if (pids[i] < 0) {
            complain(job, "cannot start rank %d: %s", i, strerror(errno));
            for (int k = 0; k < i; k++) {
                kill(pids[k], SIGKILL);
                waitpid(pids[k], NULL, 0);
            }
            return 1;
        }
    }
    return 0;
}

int ranks_run(struct ranks_job *job) {
    struct ranks_shared *shared = ranks_memory(sizeof(*shared));
    pid_t *pids = calloc((size_t)job->num_ranks, sizeof(*pids));
    int port = free_port();
    job->why[0] = '\0';
    if (!shared || !pids || port == 0) {
        complain(job, "%s", port == 0 ? "no free TCP port on this machine" : "no memory");
        free(pids);
        return 1;
    }
    pthread_barrierattr_t attr;
    pthread_barrierattr_init(&attr);
    pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&shared->barrier, &attr, (unsigned)job->num_ranks);
    snprintf(shared->address, sizeof(shared->address), "127.0.0.1:%d", port);
    snprintf(shared->job, sizeof(shared->job), "ep-%d-%llx", (int)getpid(),
             (unsigned long long)epi_now_ns());
    struct sigaction act = {.sa_handler = on_signal};
    struct sigaction old_int;
    struct sigaction old_term;
    got_signal = 0;
    sigaction(SIGINT, &act, &old_int);
    sigaction(SIGTERM, &act, &old_term);
    int num = job->threads ? 1 : job->num_ranks;
    int failed = start_all(job, shared, pids, num);
    if (failed == 0) {
        failed = supervise(job, shared, pids, num);
    }
    sigaction(SIGINT, &old_int, NULL);
    sigaction(SIGTERM, &old_term, NULL);
    free(pids);
    munmap(shared, sizeof(*shared));
    return got_signal != 0 ? 128 + got_signal : failed != 0;
}
