/* SPDX-License-Identifier: MIT */
/*
 * Which process started the ranks of a job that has no name.
 *
 * What MPICH's mpiexec, torchrun's static rendezvous or a loop in a script leave in the environment
 * is the same for every job, so two jobs would meet. But the ranks of one job have a process in
 * common that started them, and two jobs have two. That process is found by walking up from this
 * one, past whatever stands in between (`mpiexec -n 2 bash -c 'numactl ... program'`).
 *
 * Owns nothing; reads /proc. Runs on the creating thread. Must not guess: where there is no such
 * process, the caller says what to set.
 */
#include "src/boot/parts.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_ANCESTORS 64
#define CMDLINE_BYTES 4096
#define VALUE_BYTES 64

/* ---- one process ------------------------------------------------------------------------- */

static size_t read_command(int pid, char out[CMDLINE_BYTES]) {
    char path[64];
    epi_format(path, sizeof(path), "/proc/%d/cmdline", pid);
    return epi_read_text(path, out, CMDLINE_BYTES);
}

/* The value of a variable in the environment with which a process was started, cut to fit. */
static bool variable_of(int pid, const char *name, char *out, size_t bytes) {
    char chunk[4096];
    const size_t name_len = strlen(name);
    size_t at = 0; /* bytes of this entry that were seen */
    bool matches = true, done = false;
    char path[64];
    epi_format(path, sizeof(path), "/proc/%d/environ", pid);
    epi_fd_begin();
    int fd = epi_fd_keep(open(path, O_RDONLY | O_CLOEXEC));
    for (ssize_t n = 1; fd >= 0 && n > 0 && !done;) {
        n = read(fd, chunk, sizeof(chunk));
        for (ssize_t i = 0; i < n && !done; i++, at++) {
            const char c = chunk[i];
            if (at <= name_len) {
                matches = matches && c == (at < name_len ? name[at] : '=');
            } else if (matches && at - name_len - 1 < bytes) {
                out[at - name_len - 1] = c; /* the 0 at its end, too */
            }
            done = c == '\0' && matches && at > name_len;
            if (c == '\0' && !done) {
                at = (size_t)-1; /* 0 for the next byte */
                matches = true;
            }
        }
    }
    out[bytes - 1] = '\0';
    epi_fd_close(&fd);
    return done;
}

static bool was_started_with(int pid, const char *name, const char *value) {
    char found[VALUE_BYTES];
    return value && variable_of(pid, name, found, sizeof(found)) && strcmp(found, value) == 0;
}

/* The file that a process runs, without its folder. */
static bool program_of(int pid, char *out, size_t bytes) {
    char path[64];
    char target[1024];
    epi_format(path, sizeof(path), "/proc/%d/exe", pid);
    ssize_t len = readlink(path, target, sizeof(target) - 1);
    target[len > 0 ? len : 0] = '\0';
    const char *slash = strrchr(target, '/');
    epi_format(out, bytes, "%s", slash ? slash + 1 : target);
    return len > 0;
}

/* A shell that forked itself for a part of its script, as `( ... ) &` does: the same program with
 * the same arguments as its parent. */
static bool is_subshell(int pid, int parent) {
    static const char *const shells[] = {"bash", "dash", "sh",   "ash",
                                         "zsh",  "ksh",  "mksh", "busybox"};
    char program[64];
    char mine[CMDLINE_BYTES];
    char theirs[CMDLINE_BYTES];
    bool is_shell = false;
    bool is_known = program_of(pid, program, sizeof(program));
    for (size_t i = 0; i < sizeof(shells) / sizeof(shells[0]) && is_known; i++) {
        is_shell = is_shell || strncmp(program, shells[i], strlen(shells[i])) == 0;
    }
    if (!is_shell) {
        return false;
    }
    size_t len = read_command(pid, mine);
    return len > 0 && read_command(parent, theirs) == len && memcmp(mine, theirs, len) == 0;
}

/* Processes that adopt those whose parents have ended, and start the services of a system: to have
 * one of them in common says nothing. */
static bool adopts_anybody(const char *name) {
    static const char *const names[] = {"systemd",   "init",    "tini",      "docker-init",
                                        "dumb-init", "pause",   "catatonit", "s6-svscan",
                                        "runit",     "(sd-pam)"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(name, names[i]) == 0) {
            return true;
        }
    }
    return false;
}

/* ---- who started it ---------------------------------------------------------------------- */

static bool find_starter(int pid, const char *name, const char *value, bool by_hand,
                         struct epi_starter *out) {
    struct epi_process self, p;
    memset(out, 0, sizeof(*out));
    if (!epi_process_see(pid, &self)) {
        return false;
    }
    int at = self.parent;
    for (int i = 0; i < MAX_ANCESTORS; i++) {
        if (!epi_process_see(at, &p)) {
            return false;
        }
        bool between = was_started_with(at, name, value) ||
                       (by_hand && p.parent > 0 && is_subshell(at, p.parent));
        if (!between) {
            out->pid = at;
            out->start = p.start;
            epi_format(out->name, sizeof(out->name), "%s", p.name);
            if (adopts_anybody(p.name)) {
                /* A script that has ended: what it started is still a group of processes. */
                out->pid = -self.group;
                out->start = (unsigned long long)self.session;
            }
            return true;
        }
        at = p.parent;
    }
    return false;
}

bool epi_starter_find(const char *name, bool by_hand, struct epi_starter *out) {
    return find_starter((int)getpid(), name, epi_env(name), by_hand, out);
}

void epi_starter_text(const struct epi_starter *starter, char *out, size_t bytes) {
    if (starter->pid < 0) {
        epi_format(out, bytes, "process group %d", -starter->pid);
    } else {
        epi_format(out, bytes, "process %d (%s)", starter->pid, starter->name);
    }
}

uint64_t epi_starter_namespace(void) {
    char text[64] = "";
    ssize_t len = readlink("/proc/self/ns/pid", text, sizeof(text) - 1);
    return epi_hash(EPI_HASH_BEGIN, text, len > 0 ? (size_t)len : 0);
}

/* ---- others that claim the same rank ----------------------------------------------------- */

struct census {
    char program[VALUE_BYTES];
    struct epi_starter starter;
    int num_ranks;
    int *first; /* [num_ranks] a process that was started as this rank; 0: none seen */
};

/* The rank with which a process was started: it runs the program that this one runs, for the same
 * job, was started by the same process, and is no child of that rank. -1: it is none such. */
static int rank_of(const struct census *c, int pid) {
    static const char *const same[] = {"WORLD_SIZE", "MASTER_PORT"};
    char text[VALUE_BYTES];
    struct epi_process p;
    struct epi_starter starter;
    int64_t rank = -1;
    if (!program_of(pid, text, sizeof(text)) || strcmp(text, c->program) != 0 ||
        !variable_of(pid, "RANK", text, sizeof(text)) ||
        !epi_parse_int(text, 10, 0, c->num_ranks - 1, &rank) || !epi_process_see(pid, &p) ||
        was_started_with(p.parent, "RANK", text) ||
        !find_starter(pid, "RANK", text, true, &starter) || starter.pid != c->starter.pid ||
        starter.start != c->starter.start) {
        return -1;
    }
    for (size_t i = 0; i < sizeof(same) / sizeof(same[0]); i++) {
        const char *value = epi_env(same[i]);
        if (value && !was_started_with(pid, same[i], value)) {
            return -1;
        }
    }
    return (int)rank;
}

static ep_status count(struct census *c, int pid) {
    int rank = rank_of(c, pid);
    if (rank < 0) {
        return EP_OK;
    }
    if (c->first[rank] == 0) {
        c->first[rank] = pid;
        return EP_OK;
    }
    char who[64];
    epi_starter_text(&c->starter, who, sizeof(who));
    return epi_fail(
        EP_ERR_MISMATCH,
        "rendezvous: processes %d and %d were both started as rank %d of %d by %s, and "
        "the launcher names no job: they are of two jobs, or one was left over: end "
        "it, or give each job a name of its own (EP_JOB)",
        c->first[rank] < pid ? c->first[rank] : pid,
        c->first[rank] < pid ? pid : c->first[rank], rank, c->num_ranks, who);
}

ep_status epi_starter_census(const struct epi_starter *starter, int num_ranks) {
    struct census c = {.starter = *starter, .num_ranks = num_ranks};
    ep_status st = EP_OK;
    c.first = epi_alloc_array((size_t)num_ranks, sizeof(*c.first));
    if (!c.first) {
        return epi_fail(EP_ERR_NOMEM, "rendezvous: no memory for %d ranks", num_ranks);
    }
    DIR *all = opendir("/proc");
    if (all && program_of((int)getpid(), c.program, sizeof(c.program))) {
        const struct dirent *entry;
        while (st == EP_OK && (entry = readdir(all))) {
            int64_t pid = 0;
            if (epi_parse_int(entry->d_name, 10, 1, INT32_MAX, &pid)) {
                st = count(&c, (int)pid);
            }
        }
    }
    if (all) {
        closedir(all);
    }
    epi_free(c.first);
    return st;
}
