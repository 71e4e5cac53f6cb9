/* SPDX-License-Identifier: MIT */
/*
 * Reads what launchers leave in the environment: torchrun and `ep run`, Open MPI, PMIx, PMI
 * (MPICH, Intel MPI) and Slurm.
 *
 * Owns the order in which they are believed and the names of their variables. Runs on the
 * creating thread. Every value is checked here, so the rest of boot works with numbers.
 * Must not guess: what is missing, malformed or contradicted is named, together with what to set.
 * Nor may two jobs have one name: a job that nobody named has that of the process that started
 * its ranks (starter.c).
 */
#include "src/boot/parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Ports derived from the job: below the range from which Linux picks ports by itself. */
#define DERIVED_PORT_FIRST 20000
#define DERIVED_PORT_COUNT 12000

/* ---- rank and size ----------------------------------------------------------------------- */

enum launcher { BY_HAND, OPEN_MPI, PMIX, PMI, SLURM, SLURM_STEP, NUM_LAUNCHERS };

struct source {
    const char *name;
    const char *rank;
    const char *size[3]; /* the first that is set */
    const char *guard;   /* only believed when this is set too; NULL: always */
    const char *local;   /* how many ranks are on this host */
};

static const struct source sources[NUM_LAUNCHERS] = {
    [BY_HAND] = {"RANK and WORLD_SIZE", "RANK", {"WORLD_SIZE"}, NULL, "LOCAL_WORLD_SIZE"},
    [OPEN_MPI] = {"Open MPI",
                  "OMPI_COMM_WORLD_RANK",
                  {"OMPI_COMM_WORLD_SIZE"},
                  NULL,
                  "OMPI_COMM_WORLD_LOCAL_SIZE"},
    /* PMIx hands out the size by a call, not by a variable; under Slurm there is one. */
    [PMIX] = {"PMIx",
              "PMIX_RANK",
              {"PMIX_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"},
              NULL,
              NULL},
    [PMI] = {"PMI", "PMI_RANK", {"PMI_SIZE"}, NULL, "MPI_LOCALNRANKS"},
    [SLURM] = {"Slurm", "SLURM_PROCID", {"SLURM_STEP_NUM_TASKS"}, NULL, NULL},
    /* A batch script sees SLURM_PROCID=0 and SLURM_NTASKS although no task was launched; only
     * within a step do they speak of this process. */
    [SLURM_STEP] = {"Slurm", "SLURM_PROCID", {"SLURM_NTASKS"}, "SLURM_STEP_ID", NULL},
};

/* What one launcher says of this process. */
struct claim {
    bool is_made;
    int rank;
    int num_ranks;
    const char *size_name;
};

/* What the launchers say together. */
struct identity {
    struct claim claims[NUM_LAUNCHERS + 1]; /* the last: of nobody */
    int who;                                /* the launcher that is believed */
    int outer; /* one that started this process or its parent, and may differ; or NUM_LAUNCHERS */
};

static ep_status read_number(const char *name, const char *text, long min, long max, int *out) {
    int64_t value = 0;
    if (!epi_parse_int(text, 10, min, max, &value)) {
        return epi_fail(EP_ERR_ARG, "%s=\"%.40s\": it must be an integer in %ld..%ld", name,
                        text, min, max);
    }
    *out = (int)value;
    return EP_OK;
}

static const char *first_set(const char *const *names, size_t num, const char **name) {
    for (size_t i = 0; i < num && names[i]; i++) {
        const char *text = epi_env(names[i]);
        if (text) {
            *name = names[i];
            return text;
        }
    }
    return NULL;
}

static ep_status read_claim(const struct source *s, struct claim *c, const char **half) {
    const char *rank = epi_env(s->rank);
    const char *size = first_set(s->size, 3, &c->size_name);
    if (!rank || (s->guard && !epi_env(s->guard))) {
        return EP_OK;
    }
    if (!size) {
        *half = *half ? *half : s->rank;
        return EP_OK;
    }
    EPI_TRY(read_number(c->size_name, size, 1, EP_MAX_RANKS, &c->num_ranks));
    EPI_TRY(read_number(s->rank, rank, 0, c->num_ranks - 1, &c->rank));
    c->is_made = true;
    return EP_OK;
}

static bool differ(const struct claim *a, const struct claim *b) {
    return a->is_made && b->is_made && (a->rank != b->rank || a->num_ranks != b->num_ranks);
}

/* "RANK=0 and WORLD_SIZE=1 say rank 0 of 1, PMI_RANK=2 and PMI_SIZE=4 say rank 2 of 4" */
static void contradiction(const struct identity *id, int a, int b, char out[300]) {
    const struct claim *x = &id->claims[a], *y = &id->claims[b];
    epi_format(
        out, 300,
        "%s=%d and %s=%d say that this is rank %d of %d, but %s=%d and %s=%d say rank %d of "
        "%d",
        sources[a].rank, x->rank, x->size_name, x->num_ranks, x->rank, x->num_ranks,
        sources[b].rank, y->rank, y->size_name, y->num_ranks, y->rank, y->num_ranks);
}

static ep_status contradicts(const struct identity *id, int a, int b) {
    char text[300];
    contradiction(id, a, b, text);
    return epi_fail(EP_ERR_ARG, "%s: unset those that are not about this process", text);
}

/* srun starts ranks, or the daemons of another launcher, which start the ranks. */
static bool is_of_srun(int launcher) {
    const char *space = epi_env("PMIX_NAMESPACE");
    return launcher >= SLURM || (launcher == PMI && epi_env("PMI_JOBID")) ||
           (launcher == PMIX && space && strncmp(space, "slurm.", 6) == 0);
}

/* Of the launchers that set variables of their own: the innermost, which is not srun. */
static ep_status choose_launcher(const struct identity *id, int *out) {
    *out = NUM_LAUNCHERS;
    for (int by_srun = 0; by_srun < 2; by_srun++) {
        for (int i = OPEN_MPI; i < NUM_LAUNCHERS; i++) {
            if (!id->claims[i].is_made || is_of_srun(i) != (by_srun == 1)) {
                continue;
            }
            if (*out == NUM_LAUNCHERS) {
                *out = i;
            } else if (!by_srun && differ(&id->claims[*out], &id->claims[i])) {
                return contradicts(id, *out, i);
            }
        }
    }
    return EP_OK;
}

/*
 * RANK and WORLD_SIZE are set for each rank by torchrun and `ep run`, with the LOCAL_ ones, or by a
 * program that starts ranks itself, perhaps in each of another launcher's. But they may also be
 * those of a pod, in which another launcher has started ranks: that would be as many groups of one
 * rank, and nobody would notice. Larger groups notice, since several come as the same rank.
 */
static ep_status judge_by_hand(const struct identity *id) {
    const struct claim *mine = &id->claims[BY_HAND], *other = &id->claims[id->outer];
    const char *local = epi_env("LOCAL_WORLD_SIZE");
    int64_t num_local = 0;
    char text[300];
    if (local && epi_parse_int(local, 10, 1, EP_MAX_RANKS, &num_local) &&
        num_local > mine->num_ranks) {
        return epi_fail(
            EP_ERR_ARG,
            "WORLD_SIZE=%d, but LOCAL_WORLD_SIZE=%.40s: WORLD_SIZE must be the number "
            "of ranks, not of hosts",
            mine->num_ranks, local);
    }
    if (id->outer == NUM_LAUNCHERS || !differ(mine, other) ||
        mine->num_ranks > other->num_ranks) {
        return EP_OK;
    }
    const bool is_launched = local && epi_env("LOCAL_RANK");
    if (mine->num_ranks == 1 && !is_launched) {
        return contradicts(id, BY_HAND, id->outer);
    }
    if (mine->num_ranks == 1 || !is_launched) {
        contradiction(id, BY_HAND, id->outer, text);
        epi_log(EPI_LOG_WARN, "%s; RANK and WORLD_SIZE are believed", text);
    }
    return EP_OK;
}

static ep_status read_identity(struct identity *id) {
    const char *half = NULL;
    memset(id, 0, sizeof(*id));
    for (int i = 0; i < NUM_LAUNCHERS; i++) {
        EPI_TRY(read_claim(&sources[i], &id->claims[i], &half));
    }
    EPI_TRY(choose_launcher(id, &id->outer));
    id->who = id->claims[BY_HAND].is_made ? BY_HAND : id->outer;
    if (id->who == BY_HAND) {
        return judge_by_hand(id);
    }
    if (id->who < NUM_LAUNCHERS) {
        return EP_OK;
    }
    if (half) {
        return epi_fail(EP_ERR_ARG,
                        "%s is set, but nothing says how many ranks there are; set RANK and "
                        "WORLD_SIZE, or start the program with `ep run`",
                        half);
    }
    return epi_fail(EP_ERR_ARG, "the environment does not say which rank this is; start the "
                                "program with `ep run -n N program`, torchrun, mpirun or srun, "
                                "or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT");
}

/* ---- where rank 0 is --------------------------------------------------------------------- */

/* Appends `len` characters; false when they do not fit. */
static bool append(char *out, size_t out_bytes, size_t *at, const char *from, size_t len) {
    if (len >= out_bytes - *at) {
        return false;
    }
    memcpy(out + *at, from, len);
    *at += len;
    out[*at] = '\0';
    return true;
}

bool epi_launch_first_host(const char *list, char *out, size_t out_bytes) {
    size_t at = 0;
    /* A suffix or a second bracket ("r[1-2]n[3-4]") follows for every host alike. */
    while (*list != '\0' && *list != ',') {
        size_t len = strcspn(list, "[,");
        if (!append(out, out_bytes, &at, list, len)) {
            return false;
        }
        list += len;
        if (*list != '[') {
            continue;
        }
        len = strcspn(++list, "-,]");
        const char *close = strchr(list, ']');
        if (len == 0 || !close || !append(out, out_bytes, &at, list, len)) {
            return false;
        }
        list = close + 1;
    }
    return at > 0;
}

static bool equals_size(const char *name, int num) {
    const char *text = epi_env(name);
    return text && strtol(text, NULL, 10) == num;
}

static bool is_all_local(const struct identity *id, int num_ranks, bool *is_spread) {
    static const char *const node_counts[] = {"SLURM_STEP_NUM_NODES", "SLURM_NNODES"};
    const int launchers[] = {id->who, id->outer};
    const char *name = NULL;
    if (num_ranks == 1) {
        return true;
    }
    for (int i = 0; i < 2; i++) { /* another launcher's where it started the same ranks */
        const char *local = id->claims[launchers[i]].num_ranks == num_ranks
                                ? sources[launchers[i]].local
                                : NULL;
        if (local && epi_env(local)) {
            *is_spread = !equals_size(local, num_ranks);
            return !*is_spread;
        }
    }
    const char *nodes = first_set(node_counts, 2, &name);
    *is_spread = nodes && strcmp(nodes, "1") != 0;
    return nodes && !*is_spread;
}

/* MASTER_ADDR; where it has a port, *port is MASTER_PORT's. */
static ep_status read_master(const char *text, struct epi_launch *out, int *port) {
    int master = 0;
    const char *why = epi_addr_parse(text, out->host, port);
    if (why) {
        return epi_fail(EP_ERR_ARG, "MASTER_ADDR=\"%.100s\": %s", text, why);
    }
    const char *other = epi_env("MASTER_PORT");
    if (*port && other) {
        EPI_TRY(read_number("MASTER_PORT", other, 1, 65535, &master));
        if (master != *port) {
            return epi_fail(EP_ERR_ARG,
                            "MASTER_ADDR=\"%.100s\" has port %d, but MASTER_PORT=%d", text,
                            *port, master);
        }
    }
    return EP_OK;
}

static ep_status read_host(const struct identity *id, struct epi_launch *out, int *port,
                           const char **from) {
    static const char *const lists[] = {"SLURM_STEP_NODELIST", "SLURM_NODELIST",
                                        "SLURM_JOB_NODELIST"};
    const char *host = epi_env("MASTER_ADDR");
    out->is_local = is_all_local(id, out->num_ranks, &out->is_spread);
    if (host && !out->is_local) {
        *from = "MASTER_ADDR";
        EPI_TRY(read_master(host, out, port));
        out->is_local = epi_addr_is_loopback(out->host);
        return EP_OK;
    }
    if (out->is_local) {
        *from = "all ranks are on this host";
        epi_format(out->host, sizeof(out->host), "127.0.0.1");
        return EP_OK;
    }
    const char *list = first_set(lists, 3, from);
    if (!list) {
        return epi_fail(EP_ERR_ARG, "MASTER_ADDR is not set: it must name the host of rank 0");
    }
    if (!epi_launch_first_host(list, out->host, sizeof(out->host))) {
        return epi_fail(EP_ERR_ARG,
                        "%s=\"%.80s\" is not understood; set MASTER_ADDR to the host "
                        "of rank 0",
                        *from, list);
    }
    return EP_OK;
}

/* master: MASTER_PORT, as far as it is known. */
static ep_status read_ports(const struct epi_job *job, struct epi_launch *out, int master,
                            const char **from) {
    int port = (int)epi_opt_int(EPI_OPT_PORT);
    const char *text = epi_env("MASTER_PORT");
    *from = "EP_PORT";
    if (port > 0) { /* the user's choice: there is no other */
        out->ports[out->num_ports++] = port;
        return EP_OK;
    }
    *from = "derived from the job";
    if (text) {
        EPI_TRY(read_number("MASTER_PORT", text, 1, 65535, &master));
    }
    if (master > 0 && master < 65535) {
        /* MASTER_PORT itself belongs to the launcher's own store. The next may be another's. */
        out->ports[out->num_ports++] = master + 1;
        *from = "MASTER_PORT + 1";
    }
    for (uint64_t hash = job->id; out->num_ports < EPI_LAUNCH_MAX_PORTS;) {
        port = DERIVED_PORT_FIRST + (int)(hash % DERIVED_PORT_COUNT);
        hash = epi_hash(hash, &port, sizeof(port));
        if (port != master) {
            out->ports[out->num_ports++] = port;
        }
    }
    return EP_OK;
}

/* ---- which job this is ------------------------------------------------------------------- */

/* What launchers call the job, and what they add when they start it anew. */
struct job_id {
    int launcher;
    const char *first;
    const char *second;
};

static const struct job_id job_ids[] = {
    {BY_HAND, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"},
    {OPEN_MPI, "PMIX_NAMESPACE", NULL},
    {OPEN_MPI, "OMPI_MCA_ess_base_jobid", NULL},
    {PMIX, "PMIX_NAMESPACE", NULL},
    {PMI, "PMI_JOBID", NULL},
    {SLURM, "SLURM_JOB_ID", "SLURM_STEP_ID"},
    {SLURM, "SLURM_JOBID", "SLURM_STEPID"},
};
#define NUM_JOB_IDS (sizeof(job_ids) / sizeof(job_ids[0]))

static ep_status add_to_name(struct epi_job *job, const char *what, const char *value) {
    size_t at = strlen(job->name);
    int len =
        snprintf(job->name + at, sizeof(job->name) - at, "%s%s=%s", at ? ";" : "", what, value);
    if (len < 0 || (size_t)len >= sizeof(job->name) - at) {
        return epi_fail(EP_ERR_ARG, "%s=\"%.40s...\" is too long for the name of a job", what,
                        value);
    }
    job->id = epi_hash(EPI_HASH_BEGIN, job->name, strlen(job->name));
    return EP_OK;
}

/* What the caller or EP_JOB says. One of a wrong length is not ignored: the job would have no name. */
static ep_status add_given(struct epi_job *job, const char *given, const char *from) {
    if (!given) {
        return EP_OK;
    }
    const size_t len = strlen(given);
    if (len == 0 || len > EPI_JOB_GIVEN_BYTES) {
        return epi_fail(EP_ERR_ARG,
                        "%s=\"%.40s%s\" has %zu characters: a job's name has 1 to %d", from,
                        given, len > 40 ? "..." : "", len, EPI_JOB_GIVEN_BYTES);
    }
    job->is_named = true;
    epi_format(job->from, sizeof(job->from), "%s", from);
    return add_to_name(job, "job", given);
}

static ep_status add_ep_job(struct epi_job *job) {
    if (epi_opt_is_malformed(EPI_OPT_JOB)) {
        return epi_fail(EP_ERR_ARG, "EP_JOB is longer than %d characters", EPI_JOB_GIVEN_BYTES);
    }
    return add_given(job, epi_opt_str(EPI_OPT_JOB), "EP_JOB");
}

/* The id that a launcher gave, if it is one: torchrun's static rendezvous calls every job "none". */
static ep_status add_id(struct epi_job *job, int launcher, bool *found) {
    for (size_t i = 0; i < NUM_JOB_IDS && !*found; i++) {
        const struct job_id *id = &job_ids[i];
        const char *first = epi_env(id->first);
        const char *second = id->second ? epi_env(id->second) : NULL;
        if (id->launcher != launcher || !first) {
            continue;
        }
        *found = strcmp(first, "none") != 0;
        if (*found && !job->is_named) {
            epi_format(job->from, sizeof(job->from), "%s", id->first);
        }
        EPI_TRY(add_to_name(job, id->first, first));
        if (second) {
            EPI_TRY(add_to_name(job, id->second, second));
        }
    }
    job->is_named = job->is_named || *found;
    return EP_OK;
}

ep_status epi_launch_job(const char *given, struct epi_job *out) {
    bool found = false;
    memset(out, 0, sizeof(*out));
    out->given = given;
    epi_format(out->from, sizeof(out->from), "unnamed");
    if (given) {
        return add_given(out, given, "job");
    }
    EPI_TRY(add_ep_job(out));
    for (int i = 0; i < NUM_LAUNCHERS && !out->is_named; i++) {
        EPI_TRY(add_id(out, i, &found));
    }
    return EP_OK;
}

/* The job has the name of who started it. */
static ep_status add_starter(const struct identity *id, struct epi_job *job,
                             struct epi_launch *out) {
    char who[64];
    char text[128];
    out->by_hand = id->who == BY_HAND;
    if (!epi_starter_find(sources[id->who].rank, out->by_hand, &out->starter)) {
        return epi_fail(
            EP_ERR_ARG,
            "nothing in the environment names this job, and the process that started "
            "this one cannot be seen: set EP_JOB to a name of the job, the same on "
            "all ranks");
    }
    epi_starter_text(&out->starter, who, sizeof(who));
    epi_format(text, sizeof(text), "%d.%llu.%llx", out->starter.pid, out->starter.start,
               (unsigned long long)epi_starter_namespace());
    EPI_TRY(add_to_name(job, "starter", text));
    epi_format(job->from, sizeof(job->from), "%s", who);
    epi_format(out->note, sizeof(out->note),
               "the launcher names no job, so only ranks started by %s meet here; if others "
               "belong to it, set EP_JOB to a name of the job on all ranks",
               who);
    job->is_named = true;
    return EP_OK;
}

/*
 * All that tells this job from others. Ranks that meet by the environment have a launcher in common,
 * so its id is part of the name even where the user has given one; unless it started but a shell or
 * a program that has started the ranks.
 */
static ep_status name_job(const struct identity *id, struct epi_job *job,
                          struct epi_launch *out) {
    const struct claim *other = &id->claims[id->outer];
    const bool is_nested = id->who == BY_HAND && other->num_ranks != out->num_ranks;
    const char *given = job->given;
    bool found = false;
    memset(job, 0, sizeof(*job));
    EPI_TRY(add_ep_job(job));
    if (id->who == BY_HAND) {
        EPI_TRY(add_id(job, BY_HAND, &found));
    }
    if (!found && !(is_nested && (job->is_named || other->num_ranks == 1))) {
        EPI_TRY(add_id(job, id->outer == SLURM_STEP ? SLURM : id->outer, &found));
    }
    if (!job->is_named && out->num_ranks > 1) {
        EPI_TRY(add_starter(id, job, out));
    }
    return add_given(job, given, "job");
}

ep_status epi_launch_read(struct epi_job *job, struct epi_launch *out) {
    struct identity id;
    const char *host = "";
    const char *port = "";
    int master = 0;
    memset(out, 0, sizeof(*out));
    EPI_TRY(read_identity(&id));
    out->rank = id.claims[id.who].rank;
    out->num_ranks = id.claims[id.who].num_ranks;
    EPI_TRY(read_host(&id, out, &master, &host));
    EPI_TRY(name_job(&id, job, out));
    EPI_TRY(read_ports(job, out, master, &port));
    epi_log(EPI_LOG_INFO, "rank %d of %d from %s; rank 0 at %s (%s) port %d (%s); job: %s",
            out->rank, out->num_ranks, sources[id.who].name, out->host, host, out->ports[0],
            port, job->from);
    return EP_OK;
}

ep_status epi_launch_check(const struct epi_launch *launch) {
    return launch->by_hand ? epi_starter_census(&launch->starter, launch->num_ranks) : EP_OK;
}
