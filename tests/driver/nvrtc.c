/* SPDX-License-Identifier: MIT */
/*
 * A compiler of CUDA kernels that compiles nothing: what src/cu/nvrtc.h lists, for tests of what is
 * around a compiler (the cache, its locks, its failures) and for groups on our driver, which finds
 * kernels by their names alone. A "cubin" follows from the source, its headers, its name and the
 * options, so that different questions have different answers and the same one has the same. The
 * kernel does not compile where K_BLOCK_WARPS is no number, as with the real one. Owns the programs
 * that its caller holds; any thread may call, each with programs of its own. Must not need libep:
 * it is loaded as the real one is, by EP_NVRTC_PATH.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "src/cu/nvrtc.h"

#define DECLARE(result, name, args) __attribute__((visibility("default"))) result name args;
NVRTC_SYMBOLS(DECLARE)

enum { SUCCESS = 0, OUT_OF_MEMORY = 1, INVALID_INPUT = 3, COMPILATION = 6 };
#define CUBIN_BYTES 4096
/* As long as others need to come and wait for the same kernel. */
#define COMPILE_NS 20000000

struct nvrtc_program {
    uint64_t hash;
    char name[128]; /* of the kernel: "route" */
    char ptx[256];  /* empty: not compiled */
    char log[256];
};

/* FNV-1a, with the end of the text. */
static void add(struct nvrtc_program *p, const char *text) {
    do {
        p->hash = (p->hash ^ (uint8_t)*text) * 0x100000001b3u;
    } while (*text++);
}

int nvrtcVersion(int *major, int *minor) {
    *major = 13;
    *minor = 0;
    return SUCCESS;
}

const char *nvrtcGetErrorString(int result) {
    return result == SUCCESS         ? "NVRTC_SUCCESS"
           : result == OUT_OF_MEMORY ? "NVRTC_ERROR_OUT_OF_MEMORY"
           : result == COMPILATION   ? "NVRTC_ERROR_COMPILATION"
                                     : "NVRTC_ERROR_INVALID_INPUT";
}

int nvrtcCreateProgram(program_t *out, const char *source, const char *name, int num_headers,
                       const char *const *headers, const char *const *header_names) {
    const char *slash = strrchr(name, '/');
    struct nvrtc_program *p = calloc(1, sizeof(*p));
    if (!p) {
        return OUT_OF_MEMORY;
    }
    p->hash = 0xcbf29ce484222325u;
    add(p, source);
    add(p, name);
    for (int i = 0; i < num_headers; i++) {
        add(p, headers[i]);
        add(p, header_names[i]);
    }
    snprintf(p->name, sizeof(p->name), "%s", slash ? slash + 1 : name);
    p->name[strcspn(p->name, ".")] = '\0';
    *out = p;
    return SUCCESS;
}

int nvrtcDestroyProgram(program_t *program) {
    free(*program);
    *program = NULL;
    return SUCCESS;
}

int nvrtcCompileProgram(program_t p, int num_options, const char *const *options) {
    static const char warps[] = "-DK_BLOCK_WARPS=";
    nanosleep(&(struct timespec){.tv_nsec = COMPILE_NS}, NULL);
    for (int i = 0; i < num_options; i++) {
        const char *value = options[i] + sizeof(warps) - 1;
        add(p, options[i]);
        if (strncmp(options[i], warps, sizeof(warps) - 1) == 0 &&
            strspn(value, "0123456789") != strlen(value)) {
            snprintf(p->log, sizeof(p->log), "%s.k.c(1): error: expected an expression\n\n%s\n",
                     p->name, "1 error detected in the compilation.");
            return COMPILATION;
        }
    }
    snprintf(p->log, sizeof(p->log), "ptxas info    : Used 32 registers\n");
    snprintf(p->ptx, sizeof(p->ptx),
             "// %016llx\n.visible .entry _ZN7deep_ep10throughput%zu%sE()\n{\n}\n",
             (unsigned long long)p->hash, strlen(p->name), p->name);
    return SUCCESS;
}

int nvrtcGetProgramLogSize(program_t p, size_t *bytes) {
    *bytes = strlen(p->log) + 1;
    return SUCCESS;
}

int nvrtcGetProgramLog(program_t p, char *log) {
    memcpy(log, p->log, strlen(p->log) + 1);
    return SUCCESS;
}

int nvrtcGetPTXSize(program_t p, size_t *bytes) {
    *bytes = strlen(p->ptx) + 1;
    return p->ptx[0] ? SUCCESS : INVALID_INPUT;
}

int nvrtcGetPTX(program_t p, char *ptx) {
    memcpy(ptx, p->ptx, strlen(p->ptx) + 1);
    return p->ptx[0] ? SUCCESS : INVALID_INPUT;
}

int nvrtcGetCUBINSize(program_t p, size_t *bytes) {
    *bytes = CUBIN_BYTES;
    return p->ptx[0] ? SUCCESS : INVALID_INPUT;
}

int nvrtcGetCUBIN(program_t p, char *cubin) {
    uint64_t state = p->hash;
    memcpy(cubin, "\177ELF", 4);
    for (int i = 4; i < CUBIN_BYTES; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        cubin[i] = (char)(state >> 56);
    }
    return p->ptx[0] ? SUCCESS : INVALID_INPUT;
}
