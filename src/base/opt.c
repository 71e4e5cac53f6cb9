/* SPDX-License-Identifier: MIT */
/*
 * The environment: the knobs of EPI_OPTS, and the few variables of others that say who and where
 * we are.
 *
 * Owns the parsing rules and the memory of which malformed values were already reported. Values are
 * read anew on every call, so a program (or a test) may change them until the object that uses them
 * is created. Called by the threads that create objects: getenv beside another thread's setenv is
 * not safe, so nothing may read the environment at a time that its caller has not chosen. The only
 * file that reads it.
 * Must not silently ignore a value: a malformed one is named, with its rule, in one warning.
 */
#include "src/base/base.h"

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/auxv.h>

struct opt_row {
    const char *name;
    enum epi_opt_kind kind;
    const char *def;
    int64_t min;
    int64_t max;
    const char *choices;
    const char *doc;
};

#define OPT_ROW(id, kind, def, min, max, choices, doc)                                         \
    {"EP_" #id, EPI_OPT_KIND_##kind, def, min, max, choices, doc},
static const struct opt_row rows[EPI_OPT_COUNT] = {EPI_OPTS(OPT_ROW)};
#undef OPT_ROW

/* The hash of the last malformed value reported per knob: one line per value, not per call. */
static _Atomic uint64_t reported[EPI_OPT_COUNT];

/* Who says what, where several launchers say it; src/boot/launch.c has the order. */
#define RANK_DOC "this process's rank, by its launcher"
#define SIZE_DOC "the number of ranks, by the launcher"
#define HERE_DOC "when it is the number of ranks, rank 0 is on this host"
#define JOB_DOC "the job's name where EP_JOB is not set"
#define HOST_DOC "its first host is rank 0's where MASTER_ADDR is not set"
#define NODES_DOC "when it is 1, rank 0 is on this host"
#define NVRTC_DOC "where NVRTC is looked for"

/* Names that are not ours, and what they are used for. */
static const struct foreign_row {
    const char *name;
    const char *doc;
} foreign_rows[] = {
    {"RANK", RANK_DOC},
    {"WORLD_SIZE", SIZE_DOC},
    {"LOCAL_RANK", "the CUDA device, unless the program chooses one"},
    {"LOCAL_WORLD_SIZE", HERE_DOC},
    {"MASTER_ADDR", "the host of rank 0"},
    {"MASTER_PORT", "rank 0 listens on the port after it where EP_PORT is not set"},
    {"TORCHELASTIC_RUN_ID", JOB_DOC},
    {"TORCHELASTIC_RESTART_COUNT", "part of that name"},
    {"OMPI_COMM_WORLD_RANK", RANK_DOC},
    {"OMPI_COMM_WORLD_SIZE", SIZE_DOC},
    {"OMPI_COMM_WORLD_LOCAL_SIZE", HERE_DOC},
    {"OMPI_MCA_ess_base_jobid", JOB_DOC},
    {"PMIX_RANK", RANK_DOC},
    {"PMIX_SIZE", SIZE_DOC},
    {"PMIX_NAMESPACE", JOB_DOC},
    {"PMI_RANK", RANK_DOC},
    {"PMI_SIZE", SIZE_DOC},
    {"PMI_JOBID", JOB_DOC},
    {"MPI_LOCALNRANKS", HERE_DOC},
    {"NCCL_SOCKET_IFNAME", "taken where EP_IFNAME is not set"},
    {"SLURM_PROCID", RANK_DOC},
    {"SLURM_NTASKS", SIZE_DOC},
    {"SLURM_STEP_NUM_TASKS", SIZE_DOC},
    {"SLURM_STEP_NODELIST", HOST_DOC},
    {"SLURM_NODELIST", HOST_DOC},
    {"SLURM_JOB_NODELIST", HOST_DOC},
    {"SLURM_JOB_ID", JOB_DOC},
    {"SLURM_JOBID", JOB_DOC},
    {"SLURM_STEP_ID", "part of that name; SLURM_PROCID is a rank's where it is set"},
    {"SLURM_STEPID", "part of that name"},
    {"SLURM_STEP_NUM_NODES", NODES_DOC},
    {"SLURM_NNODES", NODES_DOC},
    {"DISABLE_SM90_FEATURES", "set, and not 0: rows move as on sm_80"},
    {"HOME", "compiled kernels are kept below it where EP_JIT_CACHE is not set"},
    {"XDG_CACHE_HOME", "the same, before HOME"},
    {"CUDA_HOME", NVRTC_DOC},
    {"CUDA_PATH", NVRTC_DOC},
    {"VIRTUAL_ENV", NVRTC_DOC},
    {"CONDA_PREFIX", NVRTC_DOC},
};
#define NUM_FOREIGN (sizeof(foreign_rows) / sizeof(foreign_rows[0]))

bool epi_parse_int(const char *text, int base, int64_t min, int64_t max, int64_t *out) {
    char *end = NULL;
    errno = 0;
    long long value = strtoll(text, &end, base);
    if (errno != 0 || end == text || *end != '\0' || value < min || value > max) {
        return false;
    }
    *out = value;
    return true;
}

static bool parse_choice(const char *choices, const char *text, int64_t *out) {
    size_t text_len = strlen(text);
    int64_t index = 0;
    for (const char *p = choices;; index++) {
        size_t len = strcspn(p, "|");
        if (len == text_len && strncasecmp(p, text, len) == 0) {
            *out = index;
            return true;
        }
        if (p[len] == '\0') {
            return false;
        }
        p += len + 1;
    }
}

static bool parse(const struct opt_row *row, const char *text, int64_t *out) {
    *out = 0;
    switch (row->kind) {
    case EPI_OPT_KIND_INT:
        return epi_parse_int(text, strncasecmp(text, "0x", 2) == 0 ? 16 : 10, row->min,
                             row->max, out);
    case EPI_OPT_KIND_CHOICE:
        return parse_choice(row->choices, text, out);
    case EPI_OPT_KIND_STR:
    case EPI_OPT_KIND_SECRET:
        return (int64_t)strlen(text) >= row->min && (int64_t)strlen(text) <= row->max;
    }
    return false;
}

static void describe_rule(const struct opt_row *row, char *out, size_t bytes) {
    switch (row->kind) {
    case EPI_OPT_KIND_INT:
        if (row->max == INT64_MAX) {
            snprintf(out, bytes, "an integer of at least %" PRId64, row->min);
        } else {
            snprintf(out, bytes, "an integer in %" PRId64 "..%" PRId64, row->min, row->max);
        }
        break;
    case EPI_OPT_KIND_CHOICE:
        snprintf(out, bytes, "one of %s", row->choices);
        break;
    case EPI_OPT_KIND_STR:
    case EPI_OPT_KIND_SECRET:
        snprintf(out, bytes, "%" PRId64 "..%" PRId64 " characters", row->min, row->max);
        break;
    }
}

/* A value as it may be shown. */
static const char *shown(const struct opt_row *row, const char *text) {
    return row->kind == EPI_OPT_KIND_SECRET && text[0] != '\0' ? "(secret)" : text;
}

#define NUM_VARIABLES (EPI_OPT_COUNT + NUM_FOREIGN)

struct epi_environment {
    const char *text[NUM_VARIABLES]; /* of the knobs, then of the others; they follow */
};

static _Thread_local const struct epi_environment *borrowed;

static const char *variable_name(size_t variable) {
    return variable < EPI_OPT_COUNT ? rows[variable].name
                                    : foreign_rows[variable - EPI_OPT_COUNT].name;
}

/* Values name hosts, files and libraries: who has lent his rights to the program's user has not let
 * him choose those. */
static const char *read_variable(size_t variable) {
    static _Atomic bool said;
    const char *name = variable_name(variable);
    const char *text = secure_getenv(name);
    if (!text && getauxval(AT_SECURE) && getenv(name) && !atomic_exchange(&said, true)) {
        epi_log(EPI_LOG_WARN,
                "%s and all other variables are ignored: the program has rights that its user "
                "has not (setuid, file capabilities)",
                name);
    }
    return text && text[0] != '\0' ? text : NULL;
}

static const char *env_text(size_t variable) {
    return borrowed ? borrowed->text[variable] : read_variable(variable);
}

struct epi_environment *epi_environment_copy(void) {
    size_t bytes = sizeof(struct epi_environment);
    for (size_t i = 0; i < NUM_VARIABLES; i++) {
        const char *text = env_text(i);
        bytes += text ? strlen(text) + 1 : 0;
    }
    struct epi_environment *e = epi_alloc(bytes);
    char *at = (char *)(e + 1), *end = (char *)e + bytes;
    for (size_t i = 0; e && i < NUM_VARIABLES; i++) {
        const char *text = env_text(i);
        if (text && strlen(text) < (size_t)(end - at)) {
            e->text[i] = strcpy(at, text);
            at += strlen(text) + 1;
        }
    }
    return e;
}

void epi_environment_use(const struct epi_environment *e) {
    borrowed = e;
}

static void report_malformed(enum epi_opt opt, const char *text) {
    const struct opt_row *row = &rows[opt];
    /* Never 0: that is "nothing reported yet". */
    uint64_t hash = epi_hash(EPI_HASH_BEGIN, text, strlen(text)) | 1;
    if (atomic_exchange(&reported[opt], hash) == hash) {
        return;
    }
    char rule[128];
    describe_rule(row, rule, sizeof(rule));
    epi_log(EPI_LOG_WARN, "%s=\"%.64s\" is ignored: it must be %s; using %s", row->name,
            shown(row, text), rule, row->def ? row->def : "no value");
}

/* The text in force and its number; NULL when there is neither a value nor a default. */
static const char *effective(enum epi_opt opt, int64_t *number) {
    const struct opt_row *row = &rows[opt];
    *number = 0;
    const char *text = env_text(opt);
    if (text) {
        if (parse(row, text, number)) {
            return text;
        }
        report_malformed(opt, text);
    }
    if (row->def) {
        parse(row, row->def, number);
    }
    return row->def;
}

int64_t epi_opt_int(enum epi_opt opt) {
    int64_t number = 0;
    effective(opt, &number);
    return number;
}

const char *epi_opt_str(enum epi_opt opt) {
    int64_t number = 0;
    return effective(opt, &number);
}

void epi_opt_begin(void) {
    epi_log_enabled(EPI_LOG_ERROR); /* who asks for the first time reads the knob */
    epi_alloc_count();
}

bool epi_opt_is_malformed(enum epi_opt opt) {
    int64_t number = 0;
    const char *text = env_text(opt);
    return text && !parse(&rows[opt], text, &number);
}

size_t epi_opt_count(void) {
    return EPI_OPT_COUNT;
}

const struct epi_opt_info *epi_opt_info(size_t index) {
    static _Thread_local struct epi_opt_info info;
    if (index >= EPI_OPT_COUNT) {
        return NULL;
    }
    const struct opt_row *row = &rows[index];
    const char *text = env_text(index);
    int64_t number = 0;
    info.name = row->name;
    info.doc = row->doc;
    info.default_text = row->def ? row->def : "";
    describe_rule(row, info.rule, sizeof(info.rule));
    info.set = text != NULL;
    info.valid = !text || parse(row, text, &number);
    const char *value = info.set && info.valid ? text : info.default_text;
    snprintf(info.value, sizeof(info.value), "%s", shown(row, value));
    return &info;
}

const struct epi_opt_info *epi_foreign_info(size_t index) {
    static _Thread_local struct epi_opt_info info;
    if (index >= NUM_FOREIGN) {
        return NULL;
    }
    const char *text = env_text(EPI_OPT_COUNT + index);
    info.name = foreign_rows[index].name;
    info.doc = foreign_rows[index].doc;
    info.default_text = "";
    info.set = text != NULL;
    info.valid = true;
    epi_format(info.value, sizeof(info.value), "%s", text ? text : "");
    return &info;
}

const char *epi_env(const char *name) {
    for (size_t i = 0; i < NUM_FOREIGN; i++) {
        if (strcmp(name, foreign_rows[i].name) == 0) {
            return env_text(EPI_OPT_COUNT + i);
        }
    }
    epi_log(EPI_LOG_ERROR, "internal: variable %s is not in the list of opt.c", name);
    return NULL;
}
