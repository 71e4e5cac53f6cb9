/* SPDX-License-Identifier: MIT */
/*
 * `ep run`: starts a program as the ranks of one job on this machine, or on several (hosts.c): then its
 * children are what runs `ep run` there, to which the key goes over their input, whose end says that this
 * one has ended.
 *
 * Owns the ranks' pipes, which the one thread polls while crew.c watches the processes. A rank
 * whose lines nobody takes waits, as with a pipe of its own. Must not mix two ranks' output within
 * a line, nor wait for the reader of its own output.
 */
#include "tools/tool.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINE_BYTES 16384
#define MARK_BYTES 32
#define SAY_BYTES 512
#define KILL_AFTER_NS (5 * EPI_NS_PER_S)
#define DRAIN_NS EPI_NS_PER_S /* for output of what has got a pipe and does not come from us */

struct pipe_end {
    int fd; /* -1: at its end */
    int write_fd;
    int rank;
    struct output *to;
    bool is_blocked; /* a line in it waits for room in the output */
    size_t len;
    char line[LINE_BYTES];
};

struct job {
    struct crew crew;
    int64_t port;
    char **program;
    struct hosts hosts; /* num 0: this machine */
    int *key_fd;        /* [hosts.num] where each hears the key ... */
    int *key_out;       /* ... and as long as these are open knows that we are here */
    bool is_part;       /* another `ep run` has started this one on its host */
    int num_all;        /* ranks, here and elsewhere */
    char address[256];  /* of rank 0 */
    char key[65];
    struct pipe_end *pipes;
    struct pollfd *polls;
    int first; /* whose lines are looked at first: all have their turn */
    struct output out, err;
    struct output *to_err; /* &out where both are one file, so that lines do not mix */
    bool output_failed;
    void (*old_sigpipe)(int);
    struct epi_deadline drained;
};

static bool print_line(const struct job *job, const struct pipe_end *p, size_t len) {
    char line[LINE_BYTES + MARK_BYTES];
    const int head = p->rank < 0 ? 0 : snprintf(line, MARK_BYTES, "[%d] ", p->rank);
    /* Some room is left for what ep run itself has to say; when all are being ended, what nobody
     * takes is lost. */
    if (!job->crew.ending && !output_has_room(p->to, (size_t)head + len + 1 + SAY_BYTES)) {
        return false;
    }
    memcpy(line + head, p->line, len);
    line[(size_t)head + len] = '\n';
    output_add(p->to, line, (size_t)head + len + 1);
    return true;
}

/* Prints the lines that are complete; of a full buffer or at the end also what there is. */
static void print_lines(const struct job *job, struct pipe_end *p) {
    p->is_blocked = false;
    while (p->len > 0 && !p->is_blocked) {
        char *newline = memchr(p->line, '\n', p->len);
        const size_t len = newline ? (size_t)(newline - p->line) : p->len;
        if (!newline && p->len < LINE_BYTES && p->fd >= 0) {
            return;
        }
        p->is_blocked = !print_line(job, p, len);
        if (!p->is_blocked) {
            const size_t used = len + (newline ? 1 : 0);
            p->len -= used;
            memmove(p->line, p->line + used, p->len);
        }
    }
}

static void read_pipe(struct pipe_end *p) {
    const ssize_t n = read(p->fd, p->line + p->len, LINE_BYTES - p->len);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    p->len += n > 0 ? (size_t)n : 0;
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

static bool open_pipes(void *arg) {
    struct job *job = arg;
    for (int i = 0; i < 2 * job->crew.num; i++) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) != 0) {
            return false;
        }
        fcntl(ends[0], F_SETFL, O_NONBLOCK);
        job->pipes[i].fd = ends[0];
        job->pipes[i].write_fd = ends[1];
    }
    for (int i = 0; i < job->hosts.num; i++) {
        int ends[2];
        const size_t bytes = sizeof(job->key) - 1;
        if (pipe2(ends, O_CLOEXEC) != 0 || write(ends[1], job->key, bytes) != (ssize_t)bytes) {
            return false;
        }
        job->key_fd[i] = ends[0];
        job->key_out[i] = ends[1];
    }
    return true;
}

static void close_write_ends(void *arg) {
    struct job *job = arg;
    for (int i = 0; i < 2 * job->crew.num; i++) {
        if (job->pipes[i].write_fd >= 0) {
            close(job->pipes[i].write_fd);
        }
        job->pipes[i].write_fd = -1;
    }
    for (int i = 0; i < job->hosts.num; i++) {
        close(job->key_fd[i]);
        if (job->crew.guard == 0) { /* only we say by them that we are here */
            close(job->key_out[i]);
        }
    }
}

static void become_rank(void *arg, int rank) {
    const struct job *job = arg;
    int null_fd = job->hosts.num > 0 ? job->key_fd[rank] : open("/dev/null", O_RDONLY);
    dup2(null_fd, 0);
    dup2(job->pipes[2 * rank].write_fd, 1);
    dup2(job->pipes[2 * rank + 1].write_fd, 2);
    if (null_fd > 2) {
        close(null_fd);
    }
    signal(SIGPIPE, job->old_sigpipe);
    if (job->hosts.num > 0) {
        hosts_exec(&job->hosts, rank, job->num_all, (int)job->port, job->program);
    }
    set_number("RANK", job->crew.first + rank);
    set_number("LOCAL_RANK", rank);
    execvp(job->program[0], job->program);
    int status = errno == ENOENT ? 127 : 126;
    dprintf(2, "ep run: cannot run %s: %s\n", job->program[0], strerror(errno));
    _exit(status);
}

/* By it ranks know each other; nobody else can guess it or see it. */
static bool set_key(struct job *job) {
    unsigned char key[32];
    size_t got = 0;
    while (job->is_part && got < sizeof(job->key) - 1) {
        const ssize_t n = read(0, job->key + got, sizeof(job->key) - 1 - got);
        if (n <= 0 && errno != EINTR) {
            return false;
        }
        got += n > 0 ? (size_t)n : 0;
    }
    if (!job->is_part && !epi_random(key, sizeof(key))) {
        return false;
    }
    for (size_t i = 0; !job->is_part && i < sizeof(key); i++) {
        snprintf(job->key + 2 * i, 3, "%02x", key[i]);
    }
    setenv("EP_JOB_KEY", job->key, 1);
    return true;
}

/* What all ranks find in their environment; rank and local rank are added after the fork. */
static void set_environment(const struct job *job) {
    char name[64];
    snprintf(name, sizeof(name), "run-%d-%llx", (int)getpid(),
             (unsigned long long)epi_now_ns());
    if (!job->is_part) {
        setenv("EP_JOB", name, 1);
    }
    setenv("MASTER_ADDR", job->address, 1);
    set_number("MASTER_PORT", job->port);
    unsetenv("EP_PORT");
    set_number("WORLD_SIZE", job->num_all);
    set_number("LOCAL_WORLD_SIZE", job->crew.num);
}

/* ---- watching ---------------------------------------------------------------------------- */

/* Only what went wrong first; a signal needs no words. */
static void say(void *arg, int rank, const char *text) {
    struct job *job = arg;
    char line[SAY_BYTES], others[48] = "";
    if (job->crew.status != 0 || job->crew.signal != 0) {
        return;
    }
    if (rank < 0 && job->crew.num_live > 0) {
        epi_format(others, sizeof(others), "; ending all ranks");
    } else if (job->crew.num_live > 0) {
        epi_format(others, sizeof(others), "; ending the other %d", job->crew.num_live);
    }
    if (job->hosts.num > 0 && rank >= 0) {
        epi_format(line, sizeof(line), "ep run: %.100s: %.200s%s\n", job->hosts.name[rank],
                   text, others);
    } else {
        epi_format(line, sizeof(line), "ep run: %.400s%s\n", text, others);
    }
    output_add(job->to_err, line, strlen(line));
    output_flush(job->to_err);
}

/* What nobody can read is not worth going on for; without stderr there is only the status. */
static void look_at_output(struct job *job) {
    char why[160];
    if (job->out.error != 0 && !job->output_failed) {
        job->output_failed = true;
        epi_format(why, sizeof(why), "cannot write to standard output: %s",
                   job->out.error == EBADF ? "it is closed" : strerror(job->out.error));
        crew_fail(&job->crew, job->out.error == EPIPE ? 128 + SIGPIPE : 1, why);
    }
}

/* Moves lines as far as they go, with which a pipe may be ready to be read again. */
static void move_lines(struct job *job) {
    const int num = 2 * job->crew.num;
    for (int i = 0; i < num; i++) {
        print_lines(job, &job->pipes[(job->first + i) % num]);
    }
    job->first = (job->first + 1) % num;
    output_flush(&job->out);
    output_flush(&job->err);
    look_at_output(job);
}

static void wait_once(void *arg, int watch_fd, int ms) {
    struct job *job = arg;
    const int num = 2 * job->crew.num;
    struct output *const outputs[] = {&job->out, &job->err};
    move_lines(job);
    for (int i = 0; i < num; i++) {
        const struct pipe_end *p = &job->pipes[i];
        job->polls[i] = (struct pollfd){.fd = p->is_blocked ? -1 : p->fd, .events = POLLIN};
    }
    for (int i = 0; i < 2; i++) {
        job->polls[num + i] =
            (struct pollfd){.fd = outputs[i]->len > 0 ? outputs[i]->fd : -1, .events = POLLOUT};
    }
    job->polls[num + 2] = (struct pollfd){.fd = watch_fd, .events = POLLIN};
    job->polls[num + 3] = (struct pollfd){.fd = job->is_part ? 0 : -1, .events = POLLIN};
    if (poll(job->polls, (nfds_t)num + 4, ms) > 0) {
        char more[64];
        if (job->polls[num + 3].revents != 0 && read(0, more, sizeof(more)) <= 0) {
            job->is_part = false;
            crew_fail(&job->crew, 128 + SIGHUP, "the connection to ep run has ended");
        }
        for (int i = 0; i < num; i++) {
            if (job->polls[i].revents != 0) {
                read_pipe(&job->pipes[i]);
            }
        }
        move_lines(job);
    }
}

/* Once all have ended: whether there is anything to print still. */
static bool is_printing(void *arg) {
    struct job *job = arg;
    bool open_pipes = false, lines = job->out.len > 0 || job->err.len > 0;
    if (job->drained.at_ns == INT64_MAX) {
        job->drained = epi_deadline_after(DRAIN_NS);
    }
    for (int i = 0; i < 2 * job->crew.num; i++) {
        open_pipes = open_pipes || job->pipes[i].fd >= 0;
        lines = lines || job->pipes[i].is_blocked;
    }
    return lines || (open_pipes && !epi_deadline_expired(job->drained));
}

static void open_outputs(struct job *job) {
    struct stat out, err;
    output_open(&job->out, 1);
    output_open(&job->err, 2);
    const bool same = fstat(1, &out) == 0 && fstat(2, &err) == 0 && out.st_dev == err.st_dev &&
                      out.st_ino == err.st_ino;
    job->to_err = same ? &job->out : &job->err;
    for (int i = 0; i < 2 * job->crew.num; i++) {
        job->pipes[i].fd = job->pipes[i].write_fd = -1;
        job->pipes[i].rank = job->hosts.num > 0 ? -1 : job->crew.first + i / 2;
        job->pipes[i].to = i % 2 == 0 ? &job->out : job->to_err;
    }
}

static int run(struct job *job) {
    struct rlimit files;
    rlim_t needed = (rlim_t)job->crew.num * 4 + 64;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < needed) {
        files.rlim_cur = needed < files.rlim_max ? needed : files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    set_environment(job);
    if (!set_key(job)) {
        fprintf(stderr, "ep run: %s: %s\n",
                job->is_part ? "no key came from the ep run that has started this one"
                             : "this host gives no random numbers",
                strerror(errno));
        return 1;
    }
    open_outputs(job);
    job->old_sigpipe = signal(SIGPIPE, SIG_IGN);
    job->drained = epi_deadline_never();
    crew_run(&job->crew);
    move_lines(job);
    output_close(&job->out);
    output_close(&job->err);
    const bool lost = job->out.lost > 0 || job->err.lost > 0;
    return job->crew.status != 0 ? job->crew.status : lost;
}

/* "FIRST/ALL/ADDRESS" of a part. */
static bool read_part(struct job *job, const char *text, int num_here) {
    int used = 0;
    job->is_part = true;
    return sscanf(text, "%d/%d/%255s%n", &job->crew.first, &job->num_all, job->address,
                  &used) == 3 &&
           text[used] == '\0' && job->crew.first >= 0 && job->num_all <= EP_MAX_RANKS &&
           job->crew.first + num_here <= job->num_all;
}

static int place(struct job *job, char *hosts, const char *part, int num_ranks) {
    job->crew.num = job->num_all = num_ranks;
    snprintf(job->address, sizeof(job->address), "127.0.0.1");
    if (part && !read_part(job, part, num_ranks)) {
        return args_refuse("ep run", "--part %s is none of %d ranks", part, num_ranks);
    }
    if (hosts && (!hosts_read(&job->hosts, hosts) || job->hosts.num > num_ranks)) {
        return args_refuse("ep run",
                           "--hosts takes names with commas between, and no more than "
                           "there are ranks (-n)");
    }
    if (hosts) {
        snprintf(job->address, sizeof(job->address), "%s", hosts_address(&job->hosts));
        job->crew.num = job->hosts.num;
        job->crew.what = "part";
    }
    return -1;
}

int cmd_run(int argc, char **argv) {
    int64_t num_ranks = 4;
    const char *hosts = NULL, *part = NULL;
    static struct job job;
    job = (struct job){.crew = {.soft_signal = SIGTERM,
                                .grace_ns = KILL_AFTER_NS,
                                .prepare = open_pipes,
                                .child = become_rank,
                                .started = close_write_ends,
                                .pending = is_printing,
                                .wait = wait_once,
                                .say = say,
                                .arg = &job},
                       .hosts.ssh = "ssh"};
    const struct opt opts[] = {
        {"ranks", 'n', OPT_INT, &num_ranks, 1, EP_MAX_RANKS, "N", "how many ranks"},
        {"port", 'p', OPT_INT, &job.port, 0, 65534, "P",
         "MASTER_PORT; 0 takes a free one. Ranks meet at MASTER_PORT + 1"},
        {"timeout", 't', OPT_INT, &job.crew.timeout_s, 0, 1000000, "S",
         "end all ranks after S seconds, with status 124; 0 never"},
        {"hosts", 'H', OPT_TEXT, &hosts, 0, 0, "A,B",
         "start them on these hosts by ssh, the first ranks on the first; ep and the program "
         "have "
         "the same paths there, and the ranks find the first by its name as it is here"},
        {"ssh", 0, OPT_TEXT, &job.hosts.ssh, 0, 0, "CMD",
         "what is called with a host and a command in place of ssh"},
        {"part", 0, OPT_TEXT, &part, 0, 0, "F/N/A",
         "what --hosts starts on a host: its ranks are F and up of N, rank 0 is at A; the key "
         "is "
         "read from standard input"},
    };
    const struct command command = {
        .name = "ep run",
        .usage = "[-n N] [options] [--] program [args]",
        .about =
            "Starts N copies of a program on this machine, or on several, as the ranks of one "
            "job, with RANK, "
            "LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, EP_JOB and "
            "EP_JOB_KEY set, so that ep_group_create finds its peers. Every line of output is "
            "marked "
            "with its rank; standard input is empty. When one rank fails, the others are "
            "ended (SIGTERM, SIGKILL after 5 s) and its status, or 128 + signal, is the "
            "result. SIGINT, SIGTERM, SIGHUP and SIGQUIT end the ranks, twice by SIGKILL; "
            "SIGUSR1, SIGUSR2 and Ctrl-Z reach them, too. What ranks leave running is ended.",
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
    status = place(&job, hosts ? strdup(hosts) : NULL, part, (int)num_ranks);
    if (status >= 0) {
        return status;
    }
    job.program = argv + rest;
    job.port = job.port != 0 ? job.port : tool_free_port();
    size_t num = (size_t)job.crew.num;
    job.pipes = calloc(2 * num, sizeof(*job.pipes));
    job.polls = calloc(2 * num + 4, sizeof(*job.polls));
    job.key_fd = calloc(2 * num, sizeof(*job.key_fd));
    job.key_out = job.key_fd + num;
    if (!job.pipes || !job.polls || !job.key_fd || job.port == 0) {
        fprintf(stderr, "ep run: %s\n", job.port == 0 ? "no free TCP port" : "no memory");
        return 1;
    }
    status = run(&job);
    free(job.pipes);
    free(job.polls);
    free(job.key_fd);
    return status;
}
