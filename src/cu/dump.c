/* SPDX-License-Identifier: MIT */
/*
 * EP_JIT_DUMP: what was compiled, for people. Owns the names of the files: per kernel
 * KERNEL.sm_ARCH.KEY.cu, .ptx, .cubin and .log (what the compiler and ptxas said: registers,
 * local memory), and the texts that the .cu includes under their own names, so that it compiles
 * again with -I FOLDER. The machine code is what `nvdisasm -c KERNEL.sm_ARCH.KEY.cubin` says. Any
 * thread; processes may dump to one folder at a time. Must not make a compilation fail, nor write to
 * where a link leads or into a folder of others.
 */
#include "src/cu/jit.h"
#include "src/cu/nvrtc.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

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

/* -1, and the log says why. */
static int open_ours(const char *path, size_t given) {
    int dir = epi_open_folder(path, given, O_NOFOLLOW);
    const char *why = dir >= 0                             ? epi_not_ours_alone(dir)
                      : errno == ELOOP || errno == ENOTDIR ? "it is no folder, or a link"
                                                           : strerror(errno);
    if (!why) {
        return dir;
    }
    epi_log(EPI_LOG_WARN, "EP_JIT_DUMP=%s: nothing is written to it: %s", path, why);
    epi_fd_close(&dir);
    return -1;
}

/* All texts, kernel/NAME below the folder; returns that of the kernel. */
static const char *put_texts(const struct epi_jit_request *r) {
    char folder[EPI_CACHE_PATH_BYTES + 16];
    const char *source = "";
    epi_format(folder, sizeof(folder), "%s/kernel", r->dump);
    int below = open_ours(folder, strlen(r->dump));
    for (const struct epi_kernel_text *t = epi_kernel_texts; t->name; t++) {
        const struct epi_piece text = {t->text, strlen(t->text)};
        if (below >= 0) {
            put(r, below, t->name + strlen("kernel/"), &text, 1);
        }
        source = strcmp(t->name, r->file) == 0 ? t->text : source;
    }
    epi_fd_close(&below);
    return source;
}

void epi_jit_dump(const struct epi_jit_request *r, const struct epi_cubin *cubin,
                  int nvrtc_version) {
    int dir = open_ours(r->dump, 0);
    if (dir < 0) {
        return;
    }
    char head[2048], stem[128], name[160];
    const char *base = strrchr(r->file, '/');
    const char *source = put_texts(r);
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
    epi_fd_close(&dir);
}
