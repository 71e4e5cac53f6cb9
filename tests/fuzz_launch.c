/* SPDX-License-Identifier: MIT */
/* mutants: 500 */
/*
 * Fuzzes what launchers leave in the environment, addresses and lists of hosts. The input is lines
 * NAME=VALUE: a name that libep reads is set to the value, "job" and "address" are those of a
 * configuration, any other name stands for one that is read.
 *
 * Checked beyond what the sanitizers see: a refusal is one printable sentence, and only a refusal
 * has one; what is accepted is within its bounds; asked twice, the answer is the same.
 */
#include <stdlib.h>
#include <string.h>

#include "src/base/base.h"
#include "src/boot/parts.h"
#include "tests/fuzz.h"

#define MAX_TEXT 4096

/* The names of all variables that libep reads. */
static const char *name_of(size_t i) {
    static char *names[128];
    static size_t num;
    const size_t own = epi_opt_count();
    const struct epi_opt_info *info;
    while (num == 0 || names[num - 1]) {
        must(num < sizeof(names) / sizeof(names[0]));
        info = num < own ? epi_opt_info(num) : epi_foreign_info(num - own);
        names[num++] = info ? strdup(info->name) : NULL;
    }
    return names[i];
}

/* What decides how this program itself runs. */
static bool is_ours(const char *name) {
    return strcmp(name, "EP_LOG") == 0 || strncmp(name, "EP_TEST_", 8) == 0;
}

static void clear(void) {
    for (size_t i = 0; name_of(i); i++) {
        if (!is_ours(name_of(i))) {
            unsetenv(name_of(i));
        }
    }
}

static void set(const char *name, const char *value) {
    size_t num = 0;
    while (name_of(num) && strcmp(name_of(num), name) != 0) {
        num++;
    }
    if (!name_of(num)) {
        num = epi_hash(EPI_HASH_BEGIN, name, strlen(name)) % num;
    }
    if (!is_ours(name_of(num))) {
        setenv(name_of(num), value, 1);
    }
}

/* One printable sentence where st is an error, nothing where it is not. */
static void check_text(ep_status st) {
    const char *text = epi_error_text();
    must((st == EP_OK) == (text[0] == '\0'));
    for (; *text; text++) {
        must((unsigned char)*text >= ' ' && *text != 127);
    }
}

static void check_address(const char *text) {
    char host[256];
    int port = 0;
    const char *why = epi_addr_parse(text, host, &port);
    if (why) {
        must(*why != '\0');
        return;
    }
    const size_t len = strnlen(host, sizeof(host));
    must(len > 0 && len < sizeof(host) && port >= 0 && port <= 65535);
    must(strstr(text, host) != NULL);
}

static void check_host_list(const char *text) {
    char wide[256], narrow[9];
    if (epi_launch_first_host(text, wide, sizeof(wide))) {
        must(strnlen(wide, sizeof(wide)) < sizeof(wide) && wide[0] != '\0');
    }
    if (epi_launch_first_host(text, narrow, sizeof(narrow))) {
        must(strnlen(narrow, sizeof(narrow)) < sizeof(narrow));
        must(strcmp(wide, narrow) == 0);
    }
}

static ep_status read_all(const char *name, struct epi_job *job, struct epi_launch *launch) {
    memset(job, 0, sizeof(*job));
    memset(launch, 0, sizeof(*launch));
    epi_clear_error();
    EPI_TRY(epi_launch_job(name, job));
    return epi_launch_read(job, launch);
}

static void check_launch(const char *name) {
    static struct epi_job job, again_job;
    static struct epi_launch launch, again;
    const ep_status st = read_all(name, &job, &launch);
    must(st == EP_OK || st == EP_ERR_ARG);
    check_text(st);
    if (st == EP_OK) {
        must(launch.num_ranks >= 1 && launch.num_ranks <= EP_MAX_RANKS);
        must(launch.rank >= 0 && launch.rank < launch.num_ranks);
        must(strnlen(launch.host, sizeof(launch.host)) < sizeof(launch.host));
        must(launch.is_local || launch.host[0] != '\0');
        must(launch.num_ports <= EPI_LAUNCH_MAX_PORTS);
        must(launch.is_local || launch.num_ports > 0);
        for (int i = 0; i < launch.num_ports; i++) {
            must(launch.ports[i] >= 1 && launch.ports[i] <= 65535);
        }
        must(strnlen(job.name, sizeof(job.name)) < sizeof(job.name));
        must(strnlen(job.from, sizeof(job.from)) < sizeof(job.from));
        must(strnlen(launch.note, sizeof(launch.note)) < sizeof(launch.note));
    }
    must(read_all(name, &again_job, &again) == st);
    must(memcmp(&job, &again_job, sizeof(job)) == 0);
    must(st != EP_OK || memcmp(&launch, &again, sizeof(launch)) == 0);
}

/* Every knob: the default, or what its rule says. */
static void check_knobs(void) {
    for (size_t i = 0; i < epi_opt_count(); i++) {
        const struct epi_opt_info *info = epi_opt_info(i);
        must(strnlen(info->value, sizeof(info->value)) < sizeof(info->value));
        if (!info->valid) {
            must(strcmp(info->value, info->default_text) == 0);
        }
    }
    must(epi_opt_int(EPI_OPT_TIMEOUT_MS) >= 100 && epi_opt_int(EPI_OPT_PORT) >= 0);
    must(epi_opt_int(EPI_OPT_PORT) <= 65535 && epi_opt_int(EPI_OPT_ARENA) <= 2);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    static char text[MAX_TEXT + 1];
    const char *job = NULL;
    char *rest = text, *line;
    setenv("EP_LOG", "error", 1);
    bytes = bytes < MAX_TEXT ? bytes : MAX_TEXT;
    if (bytes) {
        memcpy(text, data, bytes);
    }
    text[bytes] = '\0';
    clear();
    while ((line = strsep(&rest, "\n")) != NULL) {
        char *value = strchr(line, '=');
        if (!value) {
            check_host_list(line);
            check_address(line);
            continue;
        }
        *value++ = '\0';
        if (strcmp(line, "job") == 0) {
            job = value;
        } else if (strcmp(line, "address") == 0) {
            check_address(value);
        } else {
            set(line, value);
            check_host_list(value);
        }
    }
    check_launch(job);
    check_knobs();
    return 0;
}
