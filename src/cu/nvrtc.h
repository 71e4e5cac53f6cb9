/* SPDX-License-Identifier: MIT */
/*
 * NVRTC's functions as this directory calls them, and what is the same in every compilation: one
 * list gives the fields, the loader and the names in messages. Prototypes are ours; they have not
 * changed since CUDA 11. Must not need the rest of the library: the gate (tests/gate) includes it.
 */
#ifndef EPI_CU_NVRTC_H
#define EPI_CU_NVRTC_H

#include <stddef.h>

typedef struct nvrtc_program *program_t;

/* X(result, symbol, arguments) */
#define NVRTC_SYMBOLS(X)                                                                       \
    X(int, nvrtcVersion, (int *, int *))                                                       \
    X(const char *, nvrtcGetErrorString, (int))                                                \
    X(int, nvrtcCreateProgram,                                                                 \
      (program_t *, const char *, const char *, int, const char *const *,                      \
       const char *const *))                                                                   \
    X(int, nvrtcDestroyProgram, (program_t *))                                                 \
    X(int, nvrtcCompileProgram, (program_t, int, const char *const *))                         \
    X(int, nvrtcGetProgramLogSize, (program_t, size_t *))                                      \
    X(int, nvrtcGetProgramLog, (program_t, char *))                                            \
    X(int, nvrtcGetPTXSize, (program_t, size_t *))                                             \
    X(int, nvrtcGetPTX, (program_t, char *))                                                   \
    X(int, nvrtcGetCUBINSize, (program_t, size_t *))                                           \
    X(int, nvrtcGetCUBIN, (program_t, char *))

struct epi_nvrtc {
#define NVRTC_FIELD(result, name, args) result(*name) args;
    NVRTC_SYMBOLS(NVRTC_FIELD)
#undef NVRTC_FIELD
    int version;     /* 13000 is 13.0 */
    char path[1024]; /* as it was found */
};

/* Arithmetic as on the host; what would be dropped in silence is an error; ptxas reports. */
#define NVRTC_OPTIONS                                                                          \
    "--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true",       \
        "-diag-error=1866", "--ptxas-options=-v"

/* build/gen/kernel_text.c: headers and kernels; the last has name NULL. */
struct epi_kernel_text {
    const char *name;
    const char *text;
};
extern const struct epi_kernel_text epi_kernel_texts[];

#endif
