/* SPDX-License-Identifier: MIT */
/*
 * What the subcommands of `ep` share: options, numbers for people, and local ranks.
 *
 * A subcommand is one function like main, whose result is the exit status: 0 good, 1 it did not
 * work, 2 wrong usage, 128 + n ended by signal n. Complaints go to stderr, all else to stdout.
 */
#ifndef TOOLS_TOOL_H
#define TOOLS_TOOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "ep.h"
#include "src/base/base.h"

extern const char *tool_program; /* as it was called: "build/ep" */
extern int tool_output_error;    /* errno of the first flush of stdout that failed */

int cmd_run(int argc, char **argv);
int cmd_demo(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_predict(int argc, char **argv);
int cmd_doctor(int argc, char **argv);
int cmd_env(int argc, char **argv);

/* ---- args.c: options ------------------------------------------------------------------ */

enum opt_kind { OPT_FLAG, OPT_INT, OPT_TEXT, OPT_CHOICE };

struct opt {
    const char *name; /* "tokens", given as --tokens N or --tokens=N */
    char letter;      /* 'n' for -n N; 0: none */
    enum opt_kind kind;
    void *value;      /* FLAG: bool, INT: int64_t, TEXT: const char *, CHOICE: int (index) */
    int64_t min, max; /* INT */
    const char *meta; /* "N"; CHOICE: "bf16|fp8|f32" */
    const char *help;
};

struct command {
    const char *name;  /* "ep bench" */
    const char *usage; /* "[options]" */
    const char *about;
    const struct opt *opts;
    int num_opts;
};

/* -1: go on, with *rest the index of the first argument that is no option, if these belong to the
 * command; `rest` NULL: there may be none. Otherwise the exit status: --help was printed (0) or an
 * argument was refused and named (2). */
int args_parse(const struct command *command, int argc, char **argv, int *rest);
/* Prints "NAME: text; see NAME --help" to stderr and returns 2. */
int args_refuse(const char *name, const char *fmt, ...) EPI_PRINTF(2, 3);

/* ---- text.c: numbers and strings for people and programs ------------------------------- */

struct text {
    char s[48];
};
struct text text_ns(double ns);       /* "53.1 ms" */
struct text text_bytes(double bytes); /* "211.9 MB", powers of ten */
struct text text_count(int64_t n);    /* "14,812" */
struct text text_version(void);       /* of the library */
/* Prints a sentence in lines of 92 columns; all but the first are indented. */
void text_wrap(const char *s, int indent);
void text_json(FILE *out, const char *s); /* a JSON string, quotes included */
/* The q-tool_quantile (0..1) of n numbers, by nearest rank; sorts them. 0 when n is 0. */
int64_t tool_quantile(int64_t *values, int n, double q);
/* splitmix64: every random number of the tool comes from a seed. */
uint64_t tool_rand(uint64_t *state);
uint64_t tool_rand_hash(uint64_t a, uint64_t b);
/* A bar on a terminal, nothing elsewhere; done >= total ends the line. */
void tool_progress(const char *what, int64_t done, int64_t total);
/* Flushes stdout; false: it failed, and main.c will say so at the end. */
bool tool_flush(void);
int tool_num_cores(void);
/* The rank of an expert in the default map of ep.h. */
int tool_expert_rank(int expert, int num_experts, int num_ranks);

static inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &wide, sizeof(f));
    return f;
}

/* Rounds to nearest even; only finite numbers occur here. */
static inline uint16_t bf16_from_float(float f) {
    uint32_t wide;
    memcpy(&wide, &f, sizeof(wide));
    return (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

/* ---- file.c ---------------------------------------------------------------------------------- */

/* The first max_bytes of a file or a pipe, to be freed. NULL, and why: it cannot be read, or holds
 * nothing. */
char *tool_read_file(const char *path, size_t max_bytes, size_t *bytes, char *why,
                     size_t why_bytes);

/* ---- crew.c: child processes, watched until the last has ended --------------------------- */

struct crew {
    int num;
    const char *what; /* a child is called in words, with numbers from `first`; NULL: a rank */
    int first;
    int soft_signal; /* asks all to end when one has failed; 0: nothing but SIGKILL is sent, which
                          does not wait where a signal has come or the time is over */
    int64_t grace_ns;                /* from there to SIGKILL */
    int64_t timeout_s;               /* 0: none */
    bool (*prepare)(void *arg);      /* before the first child is started; may be NULL */
    void (*child)(void *arg, int i); /* in it; does not return */
    void (*started)(void *arg);      /* once all are, here and in their parent; may be NULL */
    bool (*pending)(void *arg);      /* something is to be waited for still when all have ended;
                                        may be NULL */
    /* Waits until watch_fd can be read, for so long, or for what else there is to do. */
    void (*wait)(void *arg, int watch_fd, int ms);
    /* What went wrong, with child i or (-1) with all. */
    void (*say)(void *arg, int i, const char *text);
    void *arg;
    /* crew.c's */
    pid_t guard; /* the children's parent, and their process group */
    int control, reports;
    int num_live;
    int status; /* of the first that went wrong: as a shell has it, 124 for the time-out */
    int signal; /* the last that came to this process to end it */
    bool all_started, ending, killed;
    struct epi_deadline kill_at, timeout;
    pid_t *spared; /* children that this process had before */
    int num_spared, num_left;
    char left[200];
};

void crew_run(struct crew *crew);
/* From `wait`: something else went wrong, so all are ended. */
void crew_fail(struct crew *crew, int status, const char *why);

/* ---- hosts.c: ranks on several hosts -------------------------------------------------------- */

struct hosts {
    int num;
    const char *name[EP_MAX_RANKS]; /* "host" or "user@host" */
    const char *ssh; /* a command, which is followed by a host and what to run there */
};

/* "a,b,c", which is cut. False: that is no list of hosts. */
bool hosts_read(struct hosts *h, char *list);
/* Where rank 0 is. */
const char *hosts_address(const struct hosts *h);
/* The first rank of host i. */
int hosts_first(const struct hosts *h, int num_ranks, int i);
/* This process becomes what starts the ranks of host i; does not return. */
void hosts_exec(const struct hosts *h, int i, int num_ranks, int port, char **program);

/* ---- output.c: lines to stdout and stderr, never waiting ----------------------------------- */

enum { OUTPUT_BYTES = 1 << 16 };

struct output {
    int fd;
    bool owned, is_socket, is_pipe;
    int error;    /* errno of the write that failed: all after it is lost */
    int64_t lost; /* lines */
    size_t len;   /* not written yet */
    char bytes[OUTPUT_BYTES];
};

void output_open(struct output *o, int fd);
void output_close(struct output *o);
/* Whether so many bytes can be added without losing them. */
bool output_has_room(const struct output *o, size_t bytes);
/* A whole line, or several. Without room they are lost. */
void output_add(struct output *o, const char *bytes, size_t len);
/* Writes what can be written at once. */
void output_flush(struct output *o);

/* ---- ranks.c: ranks of this program, as processes or as threads ------------------------- */

struct rank {
    int rank;
    int num_ranks;
    ep_world *world;     /* threads, else NULL */
    const char *address; /* processes */
    struct ranks_shared *shared;
};

struct ranks_job {
    const char *name; /* for complaints: "ep demo" */
    int num_ranks;
    bool threads;                            /* in one child process */
    bool quiet;                              /* complaints go to `why` only */
    int timeout_s;                           /* 0: none */
    int (*fn)(struct rank *rank, void *arg); /* 0 when good */
    void (*tick)(void *arg);                 /* the parent's, now and then; may be NULL */
    void *arg;                               /* what ranks write into it is in shared memory */
    char why[512];                           /* out: the first complaint */
};

/* Runs fn in every rank and returns an exit status. Nothing it started outlives it, whatever
 * happens; a SIGINT or SIGTERM ends the ranks and gives 128 + signal. */
int ranks_run(struct ranks_job *job);
/* Zeroed memory shared with the ranks forked later; freed with munmap. NULL when refused. */
void *ranks_memory(size_t bytes);
/* Rank, size and meeting place into a configuration. */
void rank_config(const struct rank *rank, struct ep_group_config *config);
/* Waits until all ranks are here. */
void rank_barrier(struct rank *rank);
/* Records what failed and returns 1. `st` EP_OK: the text alone. */
int rank_fail(struct rank *rank, ep_status st, const char *fmt, ...) EPI_PRINTF(3, 4);
/* A TCP port p such that p and p + 1 were free a moment ago; 0 if none was found. */
int tool_free_port(void);

#endif
