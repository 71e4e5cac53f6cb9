/* SPDX-License-Identifier: MIT */
/*
 * EP_JIT_DUMP: what was compiled, for people. Owns the names of the files: per kernel
 * KERNEL.sm_ARCH.KEY.cu, .ptx, .cubin and .log (what the compiler and ptxas said: registers,
 * local memory), and the texts that the .cu includes under their own names, so that it compiles
 * again with -I FOLDER. And .sass, the machine code, where the toolkit's nvdisasm is found in PATH
 * or below CUDA_HOME: a process, because no library reads a cubin. Any thread; processes may dump
 * to one folder at a time. Must not make a compilation fail.
 */
#include "src/cu/jit.h"
#include "src/cu/nvrtc.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static void put(const struct epi_jit_request *r, int dir, const char *name,
                const struct epi_piece *pieces, int num_pieces) {
    const int err = epi_put_file(dir, name, pieces, num_pieces);
    if (err != 0) {
        epi_log(EPI_LOG_WARN, "%s/%s cannot be written: %s", r->dump, name, strerror(err));
    }
}

/* What the .cu begins with. */
static void describe(const struct epi_jit_request *r, int nvrtc_version, char *out,
                     size_t bytes) {
    static const char *const always[] = {NVRTC_OPTIONS};
    size_t n = 0;
    epi_format(out, bytes, "// %s, compiled by NVRTC %d.%d for sm_%d with", r->file,
               nvrtc_version / 1000, nvrtc_version % 1000 / 10, r->arch);
    for (size_t i = 0; i < sizeof(always) / sizeof(always[0]); i++) {
        n = strlen(out);
        epi_format(out + n, bytes - n, " %s", always[i]);
    }
    for (const char *const *d = r->defines; d && *d; d++) {
        n = strlen(out);
        epi_format(out + n, bytes - n, " %s", *d);
    }
    n = strlen(out);
    epi_format(out + n, bytes - n, "\n");
}

/* All texts, kernel/NAME below the folder; returns that of the kernel. */
static const char *put_texts(const struct epi_jit_request *r, int dir) {
    char folder[EPI_CACHE_PATH_BYTES + 16];
    const char *source = "";
    epi_format(folder, sizeof(folder), "%s/kernel", r->dump);
    const int below = epi_open_folder(folder, strlen(r->dump), 0777);
    for (const struct epi_kernel_text *t = epi_kernel_texts; t->name; t++) {
        const struct epi_piece text = {t->text, strlen(t->text)};
        put(r, dir, t->name, &text, 1);
        source = strcmp(t->name, r->file) == 0 ? t->text : source;
    }
    if (below >= 0) {
        close(below);
    }
    return source;
}

/* Runs `nvdisasm -c FOLDER/cubin` into a descriptor. Returns 0, an errno, or -1: it failed. */
static int run_nvdisasm(const char *folder, const char *cubin, int out) {
    char path[EPI_CACHE_PATH_BYTES + 160], program[EPI_CACHE_PATH_BYTES] = "nvdisasm";
    const char *home = epi_env("CUDA_HOME");
    posix_spawn_file_actions_t actions;
    pid_t child;
    int status = 0;
    epi_format(path, sizeof(path), "%s/%s", folder, cubin);
    char *const argv[] = {program, (char[]){"-c"}, path, NULL};
    int err = posix_spawn_file_actions_init(&actions);
    if (err != 0) {
        return err;
    }
    err = posix_spawn_file_actions_adddup2(&actions, out, STDOUT_FILENO);
    err = err ? err : posix_spawnp(&child, program, &actions, NULL, argv, environ);
    if (err != 0 && home) {
        epi_format(program, sizeof(program), "%s/bin/nvdisasm", home);
        err = posix_spawn(&child, program, &actions, NULL, argv, environ);
    }
    posix_spawn_file_actions_destroy(&actions);
    while (err == 0 && waitpid(child, &status, 0) < 0) { /* ECHILD: who knows how it ended */
        err = errno == EINTR ? 0 : errno;
    }
    return err ? err : status ? -1 : 0;
}

/* STEM.sass from STEM.cubin, or a line that says why there is none. */
static void disassemble(const struct epi_jit_request *r, int dir, const char *stem) {
    char cubin[160], sass[160], part[192];
    epi_format(cubin, sizeof(cubin), "%s.cubin", stem);
    epi_format(sass, sizeof(sass), "%s.sass", stem);
    epi_format(part, sizeof(part), "%s.%d.tmp", sass, (int)getpid());
    const int out = openat(dir, part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    int err = out < 0 ? errno : run_nvdisasm(r->dump, cubin, out);
    if (out >= 0) {
        close(out);
        if (err == 0 && renameat(dir, part, dir, sass) != 0) {
            err = errno;
        }
        if (err != 0) {
            unlinkat(dir, part, 0);
        }
    }
    if (err == ENOENT || err == EACCES || err == ENOTDIR) {
        epi_log(EPI_LOG_INFO,
                "no %s: nvdisasm of the CUDA toolkit is neither in PATH nor in CUDA_HOME/bin",
                sass);
    } else if (err != 0) {
        epi_log(EPI_LOG_WARN, "no %s/%s: %s", r->dump, sass,
                err > 0 ? strerror(err) : "nvdisasm failed");
    }
}

void epi_jit_dump(const struct epi_jit_request *r, const struct epi_cubin *cubin,
                  int nvrtc_version) {
    const int dir = epi_open_folder(r->dump, 0, 0777);
    if (dir < 0) {
        epi_log(EPI_LOG_WARN, "EP_JIT_DUMP=%s cannot be written to: %s", r->dump,
                strerror(errno));
        return;
    }
    char head[2048], stem[128], name[160];
    const char *base = strrchr(r->file, '/');
    const char *source = put_texts(r, dir);
    base = base ? base + 1 : r->file;
    describe(r, nvrtc_version, head, sizeof(head));
    epi_format(stem, sizeof(stem), "%.*s.sm_%d.%08" PRIx32, (int)strcspn(base, "."), base,
               r->arch, (uint32_t)r->key.hash);
    const struct {
        const char *tail;
        struct epi_piece pieces[2];
    } files[] = {{"cu", {{head, strlen(head)}, {source, strlen(source)}}},
                 {"ptx", {{cubin->ptx, strlen(cubin->ptx)}, {NULL, 0}}},
                 {"cubin", {{cubin->data, cubin->bytes}, {NULL, 0}}},
                 {"log", {{cubin->log, strlen(cubin->log)}, {NULL, 0}}}};
    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        epi_format(name, sizeof(name), "%s.%s", stem, files[i].tail);
        put(r, dir, name, files[i].pieces, 2);
    }
    disassemble(r, dir, stem);
    close(dir);
}
