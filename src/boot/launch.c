/* SPDX-License-Identifier: MIT */
/*
 * Reads what launchers leave in the environment: torchrun and `ep run`, Open MPI, PMIx, PMI
 * (MPICH, Intel MPI) and Slurm.
 *
 * Owns the order in which they are believed and the names of their variables. Runs on the
 * creating thread. Every value is checked here, so the rest of boot works with numbers.
 * Must not guess: what is missing or malformed is named, together with what to set.
 */
#include "src/boot/parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Ports derived from the job: below the range from which Linux picks ports by itself. */
#define DERIVED_PORT_FIRST 20000
#define DERIVED_PORT_COUNT 12000

struct source {
    const char *name;
    const char *rank;
    const char *size[3]; /* the first that is set */
    const char *guard;   /* only believed when this is set too; NULL: always */
};

static const struct source sources[] = {
    {"RANK and WORLD_SIZE", "RANK", {"WORLD_SIZE"}, NULL},
    {"Open MPI", "OMPI_COMM_WORLD_RANK", {"OMPI_COMM_WORLD_SIZE"}, NULL},
    /* PMIx hands out the size by a call, not by a variable; under Slurm there is one. */
    {"PMIx", "PMIX_RANK", {"PMIX_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"}, NULL},
    {"PMI", "PMI_RANK", {"PMI_SIZE"}, NULL},
    {"Slurm", "SLURM_PROCID", {"SLURM_STEP_NUM_TASKS"}, NULL},
    /* A batch script sees SLURM_PROCID=0 and SLURM_NTASKS although no task was launched; only
     * within a step do they speak of this process. */
    {"Slurm", "SLURM_PROCID", {"SLURM_NTASKS"}, "SLURM_STEP_ID"},
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

static ep_status read_identity(struct epi_launch *out, const char **from) {
    const char *half = NULL;
    for (size_t i = 0; i < sizeof(sources) / sizeof(sources[0]); i++) {
        const struct source *s = &sources[i];
        const char *size_name = NULL;
        const char *rank = epi_env(s->rank);
        const char *size = first_set(s->size, 3, &size_name);
        if (!rank || (s->guard && !epi_env(s->guard))) {
            continue;
        }
        if (!size) {
            half = half ? half : s->rank;
            continue;
        }
        *from = s->name;
        EPI_TRY(read_number(size_name, size, 1, EP_MAX_RANKS, &out->num_ranks));
        return read_number(s->rank, rank, 0, out->num_ranks - 1, &out->rank);
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

bool epi_launch_first_host(const char *list, char *out, size_t out_bytes) {
    size_t prefix = strcspn(list, "[,");
    const char *number = "";
    size_t number_len = 0;
    if (list[prefix] == '[') {
        number = list + prefix + 1;
        number_len = strcspn(number, "-,]");
        const char *close = strchr(number, ']');
        if (number_len == 0 || !close) {
            return false;
        }
        /* A suffix or a second bracket ("r[1-2]n[3-4]") follows for every host alike. */
        const char *rest = close + 1;
        if (*rest != '\0' && *rest != ',') {
            char tail[256];
            int len = snprintf(out, out_bytes, "%.*s%.*s", (int)prefix, list, (int)number_len,
                               number);
            return len > 0 && (size_t)len < out_bytes &&
                   epi_launch_first_host(rest, tail, sizeof(tail)) &&
                   (size_t)snprintf(out + len, out_bytes - (size_t)len, "%s", tail) <
                       out_bytes - (size_t)len;
        }
    }
    int len = snprintf(out, out_bytes, "%.*s%.*s", (int)prefix, list, (int)number_len, number);
    return len > 0 && (size_t)len < out_bytes;
}

static bool equals_size(const char *name, int num) {
    const char *text = epi_env(name);
    return text && strtol(text, NULL, 10) == num;
}

static bool is_all_local(int num_ranks) {
    static const char *const node_counts[] = {"SLURM_STEP_NUM_NODES", "SLURM_NNODES"};
    const char *name = NULL;
    const char *nodes = first_set(node_counts, 2, &name);
    return num_ranks == 1 || equals_size("LOCAL_WORLD_SIZE", num_ranks) ||
           equals_size("OMPI_COMM_WORLD_LOCAL_SIZE", num_ranks) ||
           equals_size("MPI_LOCALNRANKS", num_ranks) || (nodes && strcmp(nodes, "1") == 0);
}

static ep_status read_host(struct epi_launch *out, const char **from) {
    static const char *const lists[] = {"SLURM_STEP_NODELIST", "SLURM_NODELIST",
                                        "SLURM_JOB_NODELIST"};
    const char *host = epi_env("MASTER_ADDR");
    if (host) {
        *from = "MASTER_ADDR";
        if (strlen(host) >= sizeof(out->host)) {
            return epi_fail(EP_ERR_ARG, "MASTER_ADDR is longer than %zu characters",
                            sizeof(out->host) - 1);
        }
        epi_format(out->host, sizeof(out->host), "%s", host);
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

static ep_status read_port(const struct epi_job *job, struct epi_launch *out,
                           const char **from) {
    int64_t port = epi_opt_int(EPI_OPT_PORT);
    const char *master = epi_env("MASTER_PORT");
    *from = "EP_PORT";
    if (port == 0 && master) {
        /* MASTER_PORT itself belongs to the launcher's own store. */
        int value = 0;
        EPI_TRY(read_number("MASTER_PORT", master, 1, 65534, &value));
        port = value + 1;
        *from = "MASTER_PORT + 1";
    }
    if (port == 0) {
        port = DERIVED_PORT_FIRST + (int64_t)(job->id % DERIVED_PORT_COUNT);
        *from = "derived from the job";
    }
    out->ports[0] = (int)port;
    out->num_ports = 1;
    return EP_OK;
}

ep_status epi_launch_read(struct epi_job *job, struct epi_launch *out) {
    const char *who = "";
    const char *host = "";
    const char *port = "";
    EPI_TRY(read_identity(out, &who));
    out->is_local = is_all_local(out->num_ranks);
    EPI_TRY(read_host(out, &host));
    EPI_TRY(read_port(job, out, &port));
    epi_log(EPI_LOG_INFO, "rank %d of %d from %s; rank 0 at %s (%s) port %d (%s); job: %s",
            out->rank, out->num_ranks, who, out->host, host, out->ports[0], port, job->from);
    return EP_OK;
}

static void name_job(struct epi_job *job, const char *from, const char *first,
                     const char *second) {
    epi_format(job->from, sizeof(job->from), "%s", from);
    epi_format(job->name, sizeof(job->name), "%s=%s%s%s", from, first, second ? "." : "",
               second ? second : "");
}

ep_status epi_launch_job(const char *name, struct epi_job *out) {
    static const char *const ids[][2] = {
        {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"},
        {"PMIX_NAMESPACE", NULL},
        {"OMPI_MCA_ess_base_jobid", NULL},
        {"PMI_JOBID", NULL},
        {"SLURM_JOB_ID", "SLURM_STEP_ID"},
        {"SLURM_JOBID", "SLURM_STEPID"},
    };
    const char *given = name ? name : epi_opt_str(EPI_OPT_JOB);
    memset(out, 0, sizeof(*out));
    epi_format(out->from, sizeof(out->from), "unnamed");
    if (given) {
        name_job(out, "EP_JOB", given, NULL);
        out->is_named = true;
    }
    for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]) && !given; i++) {
        given = epi_env(ids[i][0]);
        if (given) {
            name_job(out, ids[i][0], given, ids[i][1] ? epi_env(ids[i][1]) : NULL);
            /* torchrun's static rendezvous calls every job "none". */
            out->is_named = strcmp(given, "none") != 0;
            out->is_public = true;
        }
    }
    out->id = epi_hash(EPI_HASH_BEGIN, out->name, strlen(out->name));
    return EP_OK;
}
