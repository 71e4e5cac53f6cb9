/* SPDX-License-Identifier: MIT */
/*
 * How much memory this process can still take: the least of what the machine, each memory cgroup
 * from its own to the root, and its resource limits leave. Whoever takes more is killed, or sees a
 * signal; so who takes much asks first, and says which limit it was.
 *
 * Owns no state. Runs on any thread. Reads files below a root, so that a test can make a tree up.
 * Must not count what a limit leaves as more than it is, nor guess where nothing is said.
 */
#include "src/base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#define PATH_BYTES 1024
#define FILE_BYTES                                                                             \
    8192 /* of a file that is read whole; what is looked for stands at its beginning */

/* The number after `key` at the beginning of a line; -1: there is none. */
static int64_t number_after(const char *text, const char *key) {
    const size_t len = strlen(key);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, len) == 0) {
            char *end;
            const long long n = strtoll(line + len, &end, 10);
            return end != line + len && n >= 0 ? n : -1;
        }
    }
    return -1;
}

static void lower(struct epi_room *out, int64_t bytes, const char *fmt, ...) EPI_PRINTF(3, 4);
static void lower(struct epi_room *out, int64_t bytes, const char *fmt, ...) {
    if (bytes < out->bytes) {
        va_list args;
        va_start(args, fmt);
        vsnprintf(out->limit, sizeof(out->limit), fmt, args);
        va_end(args);
        out->bytes = bytes > 0 ? bytes : 0;
        out->exact = false;
    }
}

/* ---- cgroups -------------------------------------------------------------------------------- */

/* What the files of version 1 and 2 are called. */
static const struct hierarchy {
    const char *mounted, *controller; /* as in /proc/self/cgroup */
    const char *limit, *usage, *inactive, *active;
} hierarchies[] = {
    {"/sys/fs/cgroup", "", "memory.max", "memory.current", "inactive_file ", "active_file "},
    {"/sys/fs/cgroup/unified", "", "memory.max", "memory.current", "inactive_file ",
     "active_file "},
    {"/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
     "total_inactive_file ", "total_active_file "},
};

static void look_at_group(const char *root, const struct hierarchy *h, const char *group,
                          struct epi_room *out) {
    char path[PATH_BYTES], text[FILE_BYTES];
    epi_format(path, sizeof(path), "%s%s%s/%s", root, h->mounted, group, h->limit);
    epi_read_text(path, text, sizeof(text));
    const int64_t limit = number_after(text, ""); /* "max" is none */
    epi_format(path, sizeof(path), "%s%s%s/%s", root, h->mounted, group, h->usage);
    epi_read_text(path, text, sizeof(text));
    const int64_t used = number_after(text, "");
    if (limit < 0 || used < 0) {
        return;
    }
    epi_format(path, sizeof(path), "%s%s%s/memory.stat", root, h->mounted, group);
    epi_read_text(path, text, sizeof(text));
    const int64_t inactive = number_after(text, h->inactive);
    const int64_t active = number_after(text, h->active);
    /* The kernel takes files' pages back before it kills; those in use only in part. */
    int64_t held = used - (inactive > 0 ? inactive : 0) - (active > 0 ? active / 2 : 0);
    held = held > 0 ? held : 0;
    lower(out, limit - held, "the memory limit of cgroup %.80s (%s is %lld)",
          *group ? group : "/", h->limit, (long long)limit);
}

/* The cgroup of this process in the hierarchy with that controller; false: it has none. */
static bool find_group(const char *groups, const char *controller, char out[PATH_BYTES]) {
    for (const char *line = groups; line && *line; line = strchr(line, '\n')) {
        line += *line == '\n';
        const char *names = strchr(line, ':');
        const char *path = names ? strchr(names + 1, ':') : NULL;
        const char *end = line + strcspn(line, "\n");
        if (!path || path > end) {
            continue;
        }
        char list[128];
        epi_format(list, sizeof(list), ",%.*s,", (int)(path - names - 1), names + 1);
        char wanted[32];
        epi_format(wanted, sizeof(wanted), ",%s,", controller);
        if (*controller ? strstr(list, wanted) != NULL : path == names + 1) {
            epi_format(out, PATH_BYTES, "%.*s", (int)(end - path - 1), path + 1);
            return true;
        }
    }
    return false;
}

static void look_at_groups(const char *root, struct epi_room *out) {
    char path[PATH_BYTES], groups[FILE_BYTES], group[PATH_BYTES];
    epi_format(path, sizeof(path), "%s/proc/self/cgroup", root);
    epi_read_text(path, groups, sizeof(groups));
    for (size_t i = 0; i < sizeof(hierarchies) / sizeof(hierarchies[0]); i++) {
        if (!find_group(groups, hierarchies[i].controller, group)) {
            continue;
        }
        if (strstr(group, "/..")) { /* outside of what this namespace shows */
            group[0] = '\0';
        }
        /* A container may see its own group as the root, under a name that leads nowhere: those
         * that are not there say nothing. */
        for (char *end = group + strlen(group); end; end = strrchr(group, '/')) {
            *end = '\0';
            look_at_group(root, &hierarchies[i], group, out);
        }
    }
}

/* ---- limits of the process ------------------------------------------------------------------ */

static bool has_limit(int resource, int64_t *out) {
    struct rlimit r;
    if (getrlimit(resource, &r) != 0 || r.rlim_cur == RLIM_INFINITY ||
        r.rlim_cur > (rlim_t)INT64_MAX) {
        return false;
    }
    *out = (int64_t)r.rlim_cur;
    return true;
}

static void look_at_limits(const char *root, enum epi_room_kind kind, struct epi_room *out) {
    char path[PATH_BYTES], text[FILE_BYTES];
    int64_t limit;
    epi_format(path, sizeof(path), "%s/proc/self/status", root);
    epi_read_text(path, text, sizeof(text));
    const int64_t before = out->bytes;
    const int64_t address_kib = number_after(text, "VmSize:");
    const int64_t data_kib = number_after(text, "VmData:");
    if (kind != EPI_ROOM_LENGTH && has_limit(RLIMIT_AS, &limit)) {
        lower(out, limit - (address_kib > 0 ? address_kib : 0) * 1024,
              "the limit on address space (ulimit -v)");
    }
    if (kind == EPI_ROOM_PRIVATE && has_limit(RLIMIT_DATA, &limit)) {
        lower(out, limit - (data_kib > 0 ? data_kib : 0) * 1024,
              "the limit on data (ulimit -d)");
    }
    if (kind != EPI_ROOM_PRIVATE && has_limit(RLIMIT_FSIZE, &limit)) {
        lower(out, limit, "the limit on the size of files (ulimit -f)");
    }
    out->exact = out->bytes < before;
}

void epi_room_below(const char *root, enum epi_room_kind kind, struct epi_room *out) {
    char path[PATH_BYTES], text[FILE_BYTES];
    out->bytes = INT64_MAX;
    epi_format(out->limit, sizeof(out->limit), "no limit that is known");
    epi_format(path, sizeof(path), "%s/proc/meminfo", root);
    epi_read_text(path, text, sizeof(text));
    const int64_t kib = number_after(text, "MemAvailable:");
    if (kind != EPI_ROOM_LENGTH && kib >= 0 && kib <= INT64_MAX / 1024) {
        lower(out, kib * 1024, "the machine's free memory");
    }
    if (kind != EPI_ROOM_LENGTH) {
        look_at_groups(root, out);
    }
    look_at_limits(root, kind, out);
}

void epi_room(enum epi_room_kind kind, struct epi_room *out) {
    epi_room_below("", kind, out);
}

/* ---- taking much ---------------------------------------------------------------------------- */

/* Of what all share, others need some besides. */
#define SPARE_BYTES ((int64_t)4 << 20)
/* Ranks take at the same time: each may take so much of what it has seen before it looks again. */
#define SHARE 16

bool epi_room_has(enum epi_room_kind kind, uint64_t bytes, struct epi_room *room) {
    epi_room(kind, room);
    const uint64_t spare = room->exact                             ? 0
                           : bytes / SHARE < (uint64_t)SPARE_BYTES ? bytes / SHARE
                                                                   : (uint64_t)SPARE_BYTES;
    return room->bytes == INT64_MAX ||
           (bytes <= (uint64_t)room->bytes && spare <= (uint64_t)room->bytes - bytes);
}

uint64_t epi_room_step(const struct epi_room *room) {
    const int64_t step = room->bytes / SHARE;
    return (uint64_t)(step > SPARE_BYTES ? step : SPARE_BYTES);
}
