/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Finding NVRTC (src/cu/find.c): which of several is taken, what is passed over, and what is said
 * when there is none. The places are links to the one NVRTC of this machine. Each part runs in a
 * process of its own, because a library once found stays loaded.
 */
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/cu/cu.h"
#include "tests/gpu.h"
#include "tests/scratch.h"
#include "tests/tap.h"

static char nvrtc[PATH_MAX]; /* the one there is */
static int major;
static char soname[32];

static void in_process(int (*fn)(int, void *), const char *what) {
    ok(tap_spawn_ranks(1, fn, NULL, 60) == 0, "%s", what);
}

static void set_environment(void) {
    static const char *const names[] = {"EP_NVRTC_PATH", "VIRTUAL_ENV", "CONDA_PREFIX",
                                        "CUDA_HOME", "CUDA_PATH"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        unsetenv(names[i]);
    }
    setenv("EP_LOG", "debug", 1);
    epi_log_reload();
}

/* A folder with a libnvrtc.so.MAJOR in it that is really `file`; returns the path of that. */
static const char *place(const char *folder, const char *file) {
    const char *path =
        scratch_path(scratch_make(scratch_path(scratch_folder(), folder)), soname);
    if (access(path, F_OK) != 0 && symlink(file, path) != 0) {
        printf("Bail out! no link %s\n", path);
        exit(1);
    }
    return path;
}

static bool takes(const char *path) {
    struct epi_nvrtc *n = NULL;
    ep_status st = epi_nvrtc_open(&n, major);
    bool good = st == EP_OK && strcmp(epi_nvrtc_path(n), path) == 0 &&
                epi_nvrtc_version(n) / 1000 == major;
    if (!good) {
        diag("wanted %s, got %s", path, st == EP_OK ? epi_nvrtc_path(n) : ep_last_error());
    }
    epi_nvrtc_close(&n);
    return good;
}

static bool says(int max_major, const char *text) {
    struct epi_nvrtc *n = NULL;
    bool good = epi_nvrtc_open(&n, max_major) == EP_ERR_UNSUPPORTED && !n &&
                strstr(ep_last_error(), text);
    if (!good) {
        diag("wanted \"%s\" in: %s", text, ep_last_error());
    }
    return good;
}

/* A library that is not NVRTC, under the name of its file. */
static char *other_library(void) {
    Dl_info info;
    void *lib = dlopen("libm.so.6", RTLD_NOW);
    void *at = lib ? dlsym(lib, "cbrt") : NULL;
    return at && dladdr(at, &info) ? realpath(info.dli_fname, NULL) : NULL;
}

/* ---- the parts ---------------------------------------------------------------------------- */

static int named_file(int rank, void *ctx) {
    const char *path = place("named", nvrtc);
    (void)rank;
    (void)ctx;
    setenv("CUDA_HOME", scratch_path(scratch_folder(), "toolkit"), 1);
    place("toolkit/lib64", nvrtc);
    setenv("EP_NVRTC_PATH", path, 1);
    ok(takes(path), "EP_NVRTC_PATH is taken");
    ok(scratch_logged("info: NVRTC") == 1 && scratch_logged(path) == 1, "the log names it");
    ok(scratch_logged("builtins") == 0, "its builtins are beside what the link leads to");
    return 0;
}

static int named_folder(int rank, void *ctx) {
    const char *path = place("named", nvrtc);
    (void)rank;
    (void)ctx;
    setenv("EP_NVRTC_PATH", scratch_path(scratch_folder(), "named"), 1);
    ok(takes(path), "EP_NVRTC_PATH may be a folder");
    return 0;
}

static int named_wrongly(int rank, void *ctx) {
    char *odd = other_library();
    const char *path = scratch_path(scratch_folder(), "named-wrongly");
    (void)rank;
    (void)ctx;
    setenv("CUDA_HOME", scratch_path(scratch_folder(), "toolkit"), 1);
    place("toolkit/lib64", nvrtc);
    setenv("EP_NVRTC_PATH", path, 1);
    ok(says(13, "pip install nvidia-cuda-nvrtc==13.*, or a CUDA toolkit, brings libnvrtc.so.12 "
                "to .13"),
       "the text says what brings it");
    ok(says(12, "pip install nvidia-cuda-nvrtc-cu12, or"), "for a driver of CUDA 12");
    ok(says(0, "pip install nvidia-cuda-nvrtc, or"), "for any");
    ok(says(13, path), "it names what was tried");
    ok(says(13, scratch_make(path)), "also when it is an empty folder");
    if (odd) {
        setenv("EP_NVRTC_PATH", odd, 1);
        ok(says(13, "it lacks nvrtcVersion"), "another library is not NVRTC");
    }
    setenv("EP_NVRTC_PATH", nvrtc, 1);
    ok(says(major - 1, "the driver may not load"), "nor may it be newer than the driver");
    ok(scratch_logged("info:") == 0 && scratch_logged("warn:") == 0, "all else is for debug");
    free(odd);
    return 0;
}

static int wheels(int rank, void *ctx) {
    char *odd = other_library();
    (void)rank;
    (void)ctx;
    if (odd) {
        place("env/lib/python3.11/site-packages/nvidia/cu00/lib", odd);
    }
    const char *path = place("env/lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib", nvrtc);
    setenv("VIRTUAL_ENV", scratch_path(scratch_folder(), "env"), 1);
    setenv("CUDA_HOME", scratch_path(scratch_folder(), "toolkit"), 1);
    place("toolkit/lib64", nvrtc);
    ok(takes(path), "a wheel of the environment comes before a toolkit");
    ok(!odd || scratch_logged("is not used: it lacks") == 1, "what is no NVRTC is passed over");
    free(odd);
    return 0;
}

static int conda(int rank, void *ctx) {
    (void)rank;
    (void)ctx;
    const char *path = place("conda/lib/python3.13/site-packages/nvidia/cu13/lib", nvrtc);
    place("conda/lib", nvrtc);
    setenv("CONDA_PREFIX", scratch_path(scratch_folder(), "conda"), 1);
    ok(takes(path), "and one of conda's");
    return 0;
}

/* An extension module of a Python that no variable names. */
static int beside_module(int rank, void *ctx) {
    char *odd = other_library();
    size_t bytes = 0;
    char *data = odd ? scratch_read(odd, &bytes) : NULL;
    const char *packages = scratch_path(scratch_folder(), "py/lib/python3.12/dist-packages");
    const char *module =
        scratch_path(scratch_make(scratch_path(packages, "torch/lib")), "libtorch_python.so");
    const char *path = place("py/lib/python3.12/dist-packages/nvidia/cu13/lib", nvrtc);
    (void)rank;
    (void)ctx;
    if (data && scratch_write(module, data, bytes) && dlopen(module, RTLD_NOW | RTLD_LOCAL)) {
        ok(takes(path), "a wheel beside a loaded module");
    }
    free(data);
    free(odd);
    return 0;
}

static int toolkits(int rank, void *ctx) {
    const char *path = place("toolkit/lib64", nvrtc);
    (void)rank;
    (void)ctx;
    place("other-toolkit/lib64", nvrtc);
    setenv("CUDA_HOME", scratch_path(scratch_folder(), "toolkit"), 1);
    setenv("CUDA_PATH", scratch_path(scratch_folder(), "other-toolkit"), 1);
    ok(takes(path), "CUDA_HOME");
    return 0;
}

static int second_toolkit(int rank, void *ctx) {
    const char *path = place("other-toolkit/lib64", nvrtc);
    (void)rank;
    (void)ctx;
    setenv("CUDA_HOME", "/nowhere", 1);
    setenv("CUDA_PATH", scratch_path(scratch_folder(), "other-toolkit"), 1);
    ok(takes(path), "CUDA_PATH");
    return 0;
}

static int loaded(int rank, void *ctx) {
    char *odd = other_library();
    const char *path = place("loaded", nvrtc);
    (void)rank;
    (void)ctx;
    if (odd) { /* would be passed over, with a line in the log, if it were looked at */
        place("odd-toolkit/lib64", odd);
        setenv("CUDA_HOME", scratch_path(scratch_folder(), "odd-toolkit"), 1);
    }
    ok(dlopen(path, RTLD_NOW | RTLD_LOCAL) && takes(path) && scratch_logged("is not used") == 0,
       "what the process has loaded comes first");
    free(odd);
    return 0;
}

static int no_memory(int rank, void *ctx) {
    struct epi_nvrtc *n = NULL;
    (void)rank;
    (void)ctx;
    epi_alloc_fail_at(epi_alloc_count() + 1);
    ok(epi_nvrtc_open(&n, major) == EP_ERR_NOMEM && !n, "no memory for it");
    epi_alloc_fail_at(0);
    return 0;
}

int main(void) {
    gpu_nvrtc(nvrtc);
    const char *at = strstr(nvrtc, "libnvrtc.so.");
    major = at ? atoi(at + 12) : 0;
    snprintf(soname, sizeof(soname), "libnvrtc.so.%d", major);
    tap_deadline(60);
    scratch_folder();
    set_environment();
    in_process(named_file, "EP_NVRTC_PATH");
    in_process(named_folder, "EP_NVRTC_PATH, a folder");
    in_process(named_wrongly, "EP_NVRTC_PATH, wrong");
    in_process(wheels, "wheels");
    in_process(conda, "conda");
    in_process(beside_module, "no variable but a module");
    in_process(toolkits, "toolkits");
    in_process(second_toolkit, "a second toolkit");
    in_process(loaded, "loaded");
    in_process(no_memory, "no memory");
    return done_testing();
}
