/* SPDX-License-Identifier: MIT */
/*
 * What goes from the folder of compiled kernels: entries that nobody has used for long, as those of
 * versions that are no more, and files of writers that were killed. Owns the ages and the
 * numbers. It happens when an entry is written, which took a compilation, in one process at a
 * time. Must not remove a file that this library has not named, nor wait.
 */
#include "src/cu/jit.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define S_PER_HOUR 3600
#define S_PER_DAY (24 * S_PER_HOUR)
#define UNUSED_S (60 * S_PER_DAY) /* an entry */
#define LEFT_S S_PER_HOUR         /* what is only there while somebody works */
#define MAX_ENTRIES 256           /* more than any set of GPUs and versions in use needs */
#define MAX_LOOKED_AT 512         /* names in one go */

struct kept {
    time_t used;
    char name[24];
};

enum name_kind { NAME_OTHER, NAME_ENTRY, NAME_LEFT };

/* "0123456789abcdef.cubin" is an entry; with another ending it is what a writer works with. */
static enum name_kind kind_of(const char *name) {
    size_t digits = 0;
    while (isxdigit((unsigned char)name[digits])) {
        digits++;
    }
    if (digits != 16) {
        return NAME_OTHER;
    }
    if (strcmp(name + digits, ".cubin") == 0) {
        return NAME_ENTRY;
    }
    const size_t len = strlen(name);
    const bool is_left =
        strcmp(name + digits, ".lock") == 0 || (strncmp(name + digits, ".cubin.", 7) == 0 &&
                                                len > 4 && strcmp(name + len - 4, ".tmp") == 0);
    return is_left ? NAME_LEFT : NAME_OTHER;
}

static int compare_used(const void *a, const void *b) {
    const time_t x = ((const struct kept *)a)->used, y = ((const struct kept *)b)->used;
    return (x > y) - (x < y);
}

static void tidy(int dir_fd, DIR *dir, time_t now) {
    struct kept kept[MAX_LOOKED_AT];
    int num = 0;
    struct dirent *e;
    struct stat st;
    for (int i = 0; i < MAX_LOOKED_AT && (e = readdir(dir)); i++) {
        const enum name_kind kind = kind_of(e->d_name);
        if (kind == NAME_OTHER || fstatat(dir_fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0 ||
            S_ISDIR(st.st_mode)) {
            continue;
        }
        if (st.st_mtime < now - (kind == NAME_ENTRY ? UNUSED_S : LEFT_S)) {
            unlinkat(dir_fd, e->d_name, 0);
        } else if (kind == NAME_ENTRY) {
            kept[num].used = st.st_mtime;
            epi_format(kept[num++].name, sizeof(kept[0].name), "%s", e->d_name);
        }
    }
    qsort(kept, (size_t)num, sizeof(kept[0]), compare_used);
    for (int i = 0; i < num - MAX_ENTRIES; i++) {
        unlinkat(dir_fd, kept[i].name, 0);
    }
}

void epi_cache_tidy(const struct epi_cache *c, const char *written) {
    struct stat st; /* the folder's own clock, wherever its disk is */
    int fd = epi_open_at(c->dir, ".", O_RDONLY | O_DIRECTORY);
    if (fd >= 0 && fstatat(fd, written, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
        flock(fd, LOCK_EX | LOCK_NB) == 0) {
        const int own = fcntl(fd, F_DUPFD_CLOEXEC, 3); /* closedir closes it */
        DIR *dir = own >= 0 ? fdopendir(own) : NULL;
        if (dir) {
            tidy(own, dir, st.st_mtime);
            closedir(dir);
        } else if (own >= 0) {
            close(own);
        }
        flock(fd, LOCK_UN); /* a forked child may hold it open still */
    }
    epi_fd_close(&fd);
}

void epi_cache_used(int fd) {
    const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_NOW}};
    futimens(fd, times);
}
