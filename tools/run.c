/* SPDX-License-Identifier: MIT */
/*
 * `ep run`: starts a program as the ranks of one job on this machine.
 *
 * Owns one process group: its leader is a guard that does nothing but kill the group when this
 * process is gone, even by SIGKILL, so that no rank and no child of a rank is left behind. One
 * thread polls the ranks' pipes and, through a signalfd, the signals. Must not mix two ranks'
 * output within a line.
 */
#include "tools/tool.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
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
    int64_t num_ranks;
    int64_t port;
    int64_t timeout_s;
    char **program;
    pid_t guard; /* also the process group */
    pid_t *pids; /* 0: has ended */
    struct pipe_end *pipes;
    struct pollfd *polls;
    int num_live;
    int status; /* the exit status to be */
    bool ending;
    struct epi_deadline kill_at;
    struct epi_deadline timeout;
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

/* The guard holds the reading end of a pipe whose only writer is this process. */
static int start_guard(struct job *job) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) {
        return -1;
    }
    job->guard = fork();
    if (job->guard == 0) {
        sigset_t all;
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, NULL);
        setpgid(0, 0);
        close(ends[1]);
        char byte;
        while (read(ends[0], &byte, 1) < 0) {
        }
        kill(0, SIGKILL);
        _exit(0);
    }
    close(ends[0]);
    if (job->guard > 0) {
        setpgid(job->guard, job->guard);
    }
    return job->guard > 0 ? 0 : -1;
}

static void set_number(const char *name, int64_t n) {
    char text[24];
    snprintf(text, sizeof(text), "%lld", (long long)n);
    setenv(name, text, 1);
}

static void become_rank(const struct job *job, int rank, const int out[2], const int err[2],
                        const sigset_t *mask, pid_t parent) {
    setpgid(0, job->guard);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
        _exit(1);
    }
    int null_fd = open("/dev/null", O_RDONLY);
    dup2(null_fd, 0);
    dup2(out[1], 1);
    dup2(err[1], 2);
    if (null_fd > 2) {
        close(null_fd);
    }
    set_number("RANK", rank);
    set_number("LOCAL_RANK", rank);
    sigprocmask(SIG_SETMASK, mask, NULL);
    execvp(job->program[0], job->program);
    int status = errno == ENOENT ? 127 : 126;
    dprintf(2, "ep run: cannot run %s: %s\n", job->program[0], strerror(errno));
    _exit(status);
}

static int start_rank(struct job *job, int rank, const sigset_t *mask) {
    int out[2];
    int err[2];
    pid_t parent = getpid();
    if (pipe2(out, O_CLOEXEC) != 0) {
        return -1;
    }
    if (pipe2(err, O_CLOEXEC) != 0) {
        close(out[0]);
        close(out[1]);
        return -1;
    }
    pid_t pid = fork();
    if (pid == 0) {
        become_rank(job, rank, out, err, mask, parent);
    }
    if (pid > 0) {
        setpgid(pid, job->guard); /* here too, so that no signal comes before it */
    }
    close(out[1]);
    close(err[1]);
    struct pipe_end *p = &job->pipes[2 * rank];
    p[0] = (struct pipe_end){.fd = out[0], .out_fd = 1, .rank = rank};
    p[1] = (struct pipe_end){.fd = err[0], .out_fd = 2, .rank = rank};
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    fcntl(err[0], F_SETFL, O_NONBLOCK);
    job->pids[rank] = pid > 0 ? pid : 0;
    job->num_live += pid > 0;
    return pid > 0 ? 0 : -1;
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
    set_number("WORLD_SIZE", job->num_ranks);
    set_number("LOCAL_WORLD_SIZE", job->num_ranks);
}

/* ---- ending ------------------------------------------------------------------------------ */

static void end_all(struct job *job, int sig) {
    kill(-job->guard, sig); /* the guard blocks all but SIGKILL */
    if (!job->ending) {
        job->kill_at = epi_deadline_after(KILL_AFTER_NS);
    }
    job->ending = true;
    job->timeout = epi_deadline_never();
}

static void rank_ended(struct job *job, int rank, int status) {
    job->pids[rank] = 0;
    job->num_live--;
    if (status == 0 || job->ending) {
        if (job->status == 0 && status != 0) {
            job->status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
        }
        return;
    }
    char others[48] = "";
    if (job->num_live > 0) {
        snprintf(others, sizeof(others), "; ending the other %d", job->num_live);
    }
    if (WIFSIGNALED(status)) {
        job->status = 128 + WTERMSIG(status);
        fprintf(stderr, "ep run: rank %d was killed by signal %d (%s)%s\n", rank,
                WTERMSIG(status), strsignal(WTERMSIG(status)), others);
    } else {
        job->status = WEXITSTATUS(status);
        fprintf(stderr, "ep run: rank %d exited with status %d%s\n", rank, job->status, others);
    }
    end_all(job, SIGTERM);
}

static void handle_signal(struct job *job, int signal_fd) {
    struct signalfd_siginfo info;
    while (read(signal_fd, &info, sizeof(info)) == sizeof(info)) {
        int sig = (int)info.ssi_signo;
        if (sig != SIGCHLD) {
            bool again = job->ending && job->status == 128 + sig;
            job->status = job->status == 0 ? 128 + sig : job->status;
            end_all(job, again ? SIGKILL : sig);
        }
    }
    for (int i = 0; i < job->num_ranks; i++) {
        int status = 0;
        if (job->pids[i] != 0 && waitpid(job->pids[i], &status, WNOHANG) == job->pids[i]) {
            rank_ended(job, i, status);
        }
    }
}

static void check_deadlines(struct job *job) {
    if (!job->ending && epi_deadline_expired(job->timeout)) {
        fprintf(stderr, "ep run: not done after %lld s; ending all ranks\n",
                (long long)job->timeout_s);
        job->status = 124;
        end_all(job, SIGTERM);
    }
    if (job->ending && epi_deadline_expired(job->kill_at)) {
        kill(-job->guard, SIGKILL);
        job->kill_at = epi_deadline_never();
    }
}

/* Polls pipes (and signals, unless signal_fd is -1) once. False: every pipe is at its end. */
static bool poll_once(struct job *job, int signal_fd, struct epi_deadline deadline) {
    int num = (int)job->num_ranks * 2;
    bool open_pipes = false;
    for (int i = 0; i < num; i++) {
        job->polls[i] = (struct pollfd){.fd = job->pipes[i].fd, .events = POLLIN};
        open_pipes = open_pipes || job->pipes[i].fd >= 0;
    }
    job->polls[num] = (struct pollfd){.fd = signal_fd, .events = POLLIN};
    if (!open_pipes && signal_fd < 0) {
        return false;
    }
    if (poll(job->polls, (nfds_t)num + 1, epi_deadline_left_ms(deadline)) > 0) {
        for (int i = 0; i < num; i++) {
            if (job->polls[i].revents != 0) {
                read_pipe(&job->pipes[i]);
            }
        }
    }
    return open_pipes;
}

static int supervise(struct job *job, int signal_fd) {
    while (job->num_live > 0) {
        poll_once(job, signal_fd, epi_deadline_min(job->timeout, job->kill_at));
        handle_signal(job, signal_fd);
        check_deadlines(job);
    }
    kill(-job->guard, SIGKILL); /* what the ranks started and left, and the guard */
    waitpid(job->guard, NULL, 0);
    struct epi_deadline drained = epi_deadline_after(DRAIN_NS);
    while (poll_once(job, -1, drained) && !epi_deadline_expired(drained)) {
    }
    return job->status;
}

static int run(struct job *job) {
    struct rlimit files;
    rlim_t needed = (rlim_t)job->num_ranks * 2 + 64;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < needed) {
        files.rlim_cur = needed < files.rlim_max ? needed : files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    sigset_t handled;
    sigset_t before;
    sigemptyset(&handled);
    sigaddset(&handled, SIGCHLD);
    sigaddset(&handled, SIGINT);
    sigaddset(&handled, SIGTERM);
    sigaddset(&handled, SIGHUP);
    sigprocmask(SIG_BLOCK, &handled, &before);
    int signal_fd = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signal_fd < 0 || start_guard(job) != 0) {
        fprintf(stderr, "ep run: cannot start: %s\n", strerror(errno));
        return 1;
    }
    set_environment(job);
    for (int i = 0; i < 2 * job->num_ranks; i++) {
        job->pipes[i].fd = -1;
    }
    for (int i = 0; i < job->num_ranks && !job->ending; i++) {
        if (start_rank(job, i, &before) != 0) {
            fprintf(stderr, "ep run: cannot start rank %d: %s\n", i, strerror(errno));
            job->status = 1;
            end_all(job, SIGKILL);
        }
    }
    return supervise(job, signal_fd);
}

int cmd_run(int argc, char **argv) {
    struct job job = {.num_ranks = 4};
    const struct opt opts[] = {
        {"ranks", 'n', OPT_INT, &job.num_ranks, 1, EP_MAX_RANKS, "N", "how many ranks"},
        {"port", 'p', OPT_INT, &job.port, 0, 65534, "P",
         "MASTER_PORT; 0 takes a free one. Ranks meet at MASTER_PORT + 1"},
        {"timeout", 't', OPT_INT, &job.timeout_s, 0, 1000000, "S",
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
        .takes_rest = true,
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
    job.port = job.port != 0 ? job.port : free_port();
    job.kill_at = epi_deadline_never();
    job.timeout = job.timeout_s > 0 ? epi_deadline_after(job.timeout_s * EPI_NS_PER_S)
                                    : epi_deadline_never();
    size_t num = (size_t)job.num_ranks;
    job.pids = calloc(num, sizeof(*job.pids));
    job.pipes = calloc(2 * num, sizeof(*job.pipes));
    job.polls = calloc(2 * num + 1, sizeof(*job.polls));
    if (!job.pids || !job.pipes || !job.polls || job.port == 0) {
        fprintf(stderr, "ep run: %s\n", job.port == 0 ? "no free TCP port" : "no memory");
        return 1;
    }
    status = run(&job);
    free(job.pids);
    free(job.pipes);
    free(job.polls);
    return status;
}
