/* SPDX-License-Identifier: MIT */
/*
 * `ep run`: starts a program as the ranks of one job on this machine.
 *
 * Owns the ranks' pipes, which the one thread polls while crew.c watches the processes. Must
 * not mix two ranks' output within a line.
 */
#include "tools/tool.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#define LINE_BYTES 16384
#define KILL_AFTER_NS (5 * EPI_NS_PER_S)
#define DRAIN_NS EPI_NS_PER_S /* for output of what has left the group and lives on */

struct pipe_end {
    int fd;     /* -1: at its end */
    int out_fd; /* 1 or 2 */
    int rank;
    size_t len;
    char line[LINE_BYTES];
};

struct job {
    struct crew crew;
    int64_t port;
    char **program;
    struct pipe_end *pipes;
    struct pollfd *polls;
    int write_ends[2]; /* of the rank that is being started: out, err */
};

static void write_all(int fd, const char *bytes, size_t len) {
    while (len > 0) {
        ssize_t n = write(fd, bytes, len);
        if (n < 0 && errno != EINTR && errno != EAGAIN) {
            return;
        }
        bytes += n > 0 ? n : 0;
        len -= n > 0 ? (size_t)n : 0;
    }
}

static void print_line(const struct pipe_end *p, size_t len) {
    char out[LINE_BYTES + 32];
    int head = snprintf(out, 32, "[%d] ", p->rank);
    memcpy(out + head, p->line, len);
    out[(size_t)head + len] = '\n';
    write_all(p->out_fd, out, (size_t)head + len + 1);
}

/* Reads what there is and prints the lines that are complete; at the end also the last one. */
static void read_pipe(struct pipe_end *p) {
    ssize_t n = read(p->fd, p->line + p->len, LINE_BYTES - p->len);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    p->len += n > 0 ? (size_t)n : 0;
    char *newline;
    while ((newline = memchr(p->line, '\n', p->len))) {
        size_t len = (size_t)(newline - p->line);
        print_line(p, len);
        p->len -= len + 1;
        memmove(p->line, newline + 1, p->len);
    }
    if (p->len == LINE_BYTES || (n <= 0 && p->len > 0)) {
        print_line(p, p->len);
        p->len = 0;
    }
    if (n <= 0) {
        close(p->fd);
        p->fd = -1;
    }
}

/* ---- starting ---------------------------------------------------------------------------- */

static void set_number(const char *name, int64_t n) {
    char text[24];
    snprintf(text, sizeof(text), "%lld", (long long)n);
    setenv(name, text, 1);
}

static bool open_pipes(void *arg, int rank) {
    struct job *job = arg;
    struct pipe_end *p = &job->pipes[2 * rank];
    for (int i = 0; i < 2; i++) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) != 0) {
            return false;
        }
        fcntl(ends[0], F_SETFL, O_NONBLOCK);
        p[i] = (struct pipe_end){.fd = ends[0], .out_fd = i + 1, .rank = rank};
        job->write_ends[i] = ends[1];
    }
    return true;
}

static void close_write_ends(void *arg, int rank) {
    struct job *job = arg;
    (void)rank;
    close(job->write_ends[0]);
    close(job->write_ends[1]);
}

static void become_rank(void *arg, int rank) {
    const struct job *job = arg;
    int null_fd = open("/dev/null", O_RDONLY);
    dup2(null_fd, 0);
    dup2(job->write_ends[0], 1);
    dup2(job->write_ends[1], 2);
    if (null_fd > 2) {
        close(null_fd);
    }
    set_number("RANK", rank);
    set_number("LOCAL_RANK", rank);
    execvp(job->program[0], job->program);
    int status = errno == ENOENT ? 127 : 126;
    dprintf(2, "ep run: cannot run %s: %s\n", job->program[0], strerror(errno));
    _exit(status);
}

/* What all ranks find in their environment; rank and local rank are added after the fork. */
static void set_environment(const struct job *job) {
    char name[64];
    snprintf(name, sizeof(name), "run-%d-%llx", (int)getpid(),
             (unsigned long long)epi_now_ns());
    setenv("EP_JOB", name, 1);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    set_number("MASTER_PORT", job->port);
    unsetenv("EP_PORT");
    set_number("WORLD_SIZE", job->crew.num);
    set_number("LOCAL_WORLD_SIZE", job->crew.num);
}

/* ---- watching ---------------------------------------------------------------------------- */

/* Only what went wrong first; a signal needs no words. */
static void say(void *arg, int rank, const char *text) {
    const struct job *job = arg;
    char others[48] = "";
    if (rank < 0) {
        snprintf(others, sizeof(others), "; ending all ranks");
    } else if (job->crew.num_live > 0) {
        snprintf(others, sizeof(others), "; ending the other %d", job->crew.num_live);
    }
    if (job->crew.status == 0 && job->crew.signal == 0) {
        fprintf(stderr, "ep run: %s%s\n", text, others);
    }
}

/* Polls pipes (and signals, unless signal_fd is -1) once. False: every pipe is at its end. */
static bool poll_once(struct job *job, int signal_fd, int ms) {
    int num = job->crew.num * 2;
    bool open_pipes = false;
    for (int i = 0; i < num; i++) {
        job->polls[i] = (struct pollfd){.fd = job->pipes[i].fd, .events = POLLIN};
        open_pipes = open_pipes || job->pipes[i].fd >= 0;
    }
    job->polls[num] = (struct pollfd){.fd = signal_fd, .events = POLLIN};
    if (!open_pipes && signal_fd < 0) {
        return false;
    }
    if (poll(job->polls, (nfds_t)num + 1, ms) > 0) {
        for (int i = 0; i < num; i++) {
            if (job->polls[i].revents != 0) {
                read_pipe(&job->pipes[i]);
            }
        }
    }
    return open_pipes;
}

static void wait_once(void *arg, int signal_fd, int ms) {
    poll_once(arg, signal_fd, ms);
}

static int run(struct job *job) {
    struct rlimit files;
    rlim_t needed = (rlim_t)job->crew.num * 2 + 64;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < needed) {
        files.rlim_cur = needed < files.rlim_max ? needed : files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    set_environment(job);
    for (int i = 0; i < 2 * job->crew.num; i++) {
        job->pipes[i].fd = -1;
    }
    crew_run(&job->crew);
    struct epi_deadline drained = epi_deadline_after(DRAIN_NS);
    while (poll_once(job, -1, epi_deadline_left_ms(drained)) &&
           !epi_deadline_expired(drained)) {
    }
    return job->crew.status;
}

int cmd_run(int argc, char **argv) {
    int64_t num_ranks = 4;
    struct job job = {.crew = {.soft_signal = SIGTERM,
                               .grace_ns = KILL_AFTER_NS,
                               .prepare = open_pipes,
                               .child = become_rank,
                               .started = close_write_ends,
                               .wait = wait_once,
                               .say = say,
                               .arg = &job}};
    const struct opt opts[] = {
        {"ranks", 'n', OPT_INT, &num_ranks, 1, EP_MAX_RANKS, "N", "how many ranks"},
        {"port", 'p', OPT_INT, &job.port, 0, 65534, "P",
         "MASTER_PORT; 0 takes a free one. Ranks meet at MASTER_PORT + 1"},
        {"timeout", 't', OPT_INT, &job.crew.timeout_s, 0, 1000000, "S",
         "end all ranks after S seconds, with status 124; 0 never"},
    };
    const struct command command = {
        .name = "ep run",
        .usage = "[-n N] [options] [--] program [args]",
        .about =
            "Starts N copies of a program on this machine as the ranks of one job, with RANK, "
            "LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and EP_JOB "
            "set, so that ep_group_create finds its peers. Every line of output is marked "
            "with its rank; standard input is empty. When one rank fails, the others are "
            "ended (SIGTERM, SIGKILL after 5 s) and its status, or 128 + signal, is the "
            "result.",
        .opts = opts,
        .num_opts = sizeof(opts) / sizeof(opts[0]),
    };
    int rest = 0;
    int status = args_parse(&command, argc, argv, &rest);
    if (status >= 0) {
        return status;
    }
    if (rest >= argc) {
        return args_refuse(command.name, "no program to run");
    }
    job.program = argv + rest;
    job.port = job.port != 0 ? job.port : tool_free_port();
    job.crew.num = (int)num_ranks;
    size_t num = (size_t)num_ranks;
    job.pipes = calloc(2 * num, sizeof(*job.pipes));
    job.polls = calloc(2 * num + 1, sizeof(*job.polls));
    if (!job.pipes || !job.polls || job.port == 0) {
        fprintf(stderr, "ep run: %s\n", job.port == 0 ? "no free TCP port" : "no memory");
        return 1;
    }
    status = run(&job);
    free(job.pipes);
    free(job.polls);
    return status;
}
