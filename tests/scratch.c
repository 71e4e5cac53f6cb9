/* SPDX-License-Identifier: MIT */
/*
 * Files for tests, declared in scratch.h. Owns one folder per program; only the process that made
 * it removes it. Not for several threads.
 */
#include "tests/scratch.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_PATHS 400

static char folder[SCRATCH_PATH_BYTES];
static pid_t owner;

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *at) {
    (void)st;
    (void)kind;
    (void)at;
    return remove(path);
}

void scratch_remove(const char *path) {
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static void remove_folder(void) {
    if (getpid() == owner) {
        scratch_remove(folder);
    }
}

const char *scratch_folder(void) {
    const char *above = getenv("TMPDIR");
    if (!folder[0]) {
        above = above && *above ? above : "/tmp";
        if (snprintf(folder, sizeof(folder), "%s/ep-test-XXXXXX", above) >=
            (int)sizeof(folder)) {
            printf("Bail out! TMPDIR is too long a path: %s\n", above);
            exit(1);
        }
        if (!mkdtemp(folder)) {
            printf("Bail out! no folder %s: %s\n", folder, strerror(errno));
            exit(1);
        }
        owner = getpid();
        atexit(remove_folder);
    }
    return folder;
}

const char *scratch_path(const char *in, const char *name) {
    static char paths[MAX_PATHS][SCRATCH_PATH_BYTES];
    static int num;
    if (num == MAX_PATHS ||
        snprintf(paths[num], SCRATCH_PATH_BYTES, "%s/%s", in, name) >= SCRATCH_PATH_BYTES) {
        printf("Bail out! too many paths, or too long a one: %s/%s\n", in, name);
        exit(1);
    }
    return paths[num++];
}

const char *scratch_make(const char *path) {
    char part[SCRATCH_PATH_BYTES];
    for (const char *p = path; *p; p++) {
        if (p[1] == '/' || p[1] == '\0') {
            snprintf(part, sizeof(part), "%.*s", (int)(p + 1 - path), path);
            mkdir(part, 0755);
        }
    }
    return path;
}

/* Counts, and copies the name of the last to `found`, which has room for NAME_MAX. */
static int scan(const char *in, const char *tail, char *found) {
    DIR *dir = opendir(in);
    struct dirent *e;
    int num = 0;
    while (dir && (e = readdir(dir)) != NULL) {
        const size_t length = strlen(e->d_name);
        if (length >= strlen(tail) && strcmp(e->d_name + length - strlen(tail), tail) == 0 &&
            strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) {
            memcpy(found, e->d_name, length + 1);
            num++;
        }
    }
    if (dir) {
        closedir(dir);
    }
    return num;
}

int scratch_count(const char *in, const char *tail) {
    char found[256];
    return scan(in, tail, found);
}

const char *scratch_find(const char *in, const char *tail) {
    char found[256];
    return scan(in, tail, found) > 0 ? scratch_path(in, found) : "";
}

bool scratch_write(const char *path, const void *data, size_t bytes) {
    FILE *file = fopen(path, "w");
    bool good = file && fwrite(data, 1, bytes, file) == bytes;
    return file && fclose(file) == 0 && good;
}

char *scratch_read(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "r");
    struct stat st;
    char *data = NULL;
    if (file && fstat(fileno(file), &st) == 0) {
        data = calloc(1, (size_t)st.st_size + 1);
        *bytes = data ? fread(data, 1, (size_t)st.st_size, file) : 0;
    }
    if (file) {
        fclose(file);
    }
    return data;
}

bool scratch_obey_permissions(void) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    memset(data, 0, sizeof(data));
    return syscall(SYS_capset, &head, data) == 0;
}

int scratch_logged(const char *text) {
    static char output[1 << 18];
    const ssize_t bytes = pread(STDERR_FILENO, output, sizeof(output) - 1, 0);
    int num = 0;
    output[bytes > 0 ? bytes : 0] = '\0';
    for (const char *p = output; (p = strstr(p, text)) != NULL; p++) {
        num++;
    }
    return num;
}
