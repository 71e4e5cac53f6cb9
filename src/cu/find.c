/* SPDX-License-Identifier: MIT */
/*
 * Finding NVRTC. Owns the order in which places are tried and the libraries that were opened,
 * which are never unloaded, because they keep threads and memory of their own. Any thread. Must
 * not look anywhere but where EP_NVRTC_PATH says, if it is set.
 *
 * Without it: what the process has loaded already, of any major version that the driver accepts;
 * then, newest major version first, NVIDIA's wheels in the Python environment, CUDA_HOME and
 * CUDA_PATH, the loader's path, /usr/local/cuda.
 */
#include "src/cu/cu.h"
#include "src/cu/nvrtc.h"

#include <dlfcn.h>
#include <glob.h>
#include <limits.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define NEWEST_MAJOR 15 /* to be looked for where the driver does not say */
#define OLDEST_MAJOR 12
#define MAX_PACKAGES 8
#define PATTERN_BYTES 1024

struct search {
    int newest;              /* major version that may be taken */
    struct epi_nvrtc *nvrtc; /* filled by the candidate that is taken */
    char why[PATTERN_BYTES]; /* the last candidate was not; "" when there was none */
    int num_packages;        /* folders of Python packages, as patterns for glob */
    char packages[MAX_PACKAGES][PATTERN_BYTES];
};

/* ---- candidates --------------------------------------------------------------------------- */

/* What keeps the loaded library from being used; NULL: nothing, and s->nvrtc is filled. */
static const char *wrong_with_library(const struct search *s, void *lib) {
    struct epi_nvrtc *n = s->nvrtc;
    int major = 0, minor = 0;
#define LOAD(result, name, args)                                                               \
    *(void **)&n->name = dlsym(lib, #name);                                                    \
    if (!n->name) {                                                                            \
        return "it lacks " #name;                                                              \
    }
    NVRTC_SYMBOLS(LOAD)
#undef LOAD
    if (n->nvrtcVersion(&major, &minor) != 0) {
        return "its nvrtcVersion fails";
    }
    if (major > s->newest) {
        return "the driver may not load what so new a compiler makes";
    }
    if (major < OLDEST_MAJOR) {
        return "it is older than 12.0";
    }
    n->version = major * 1000 + minor * 10;
    return NULL;
}

static bool take_library(struct search *s, const char *path, int flags) {
    void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL | flags);
    if (!lib && !(flags & RTLD_NOLOAD) && strchr(path, '/')) {
        epi_format(s->why, sizeof(s->why), "%s", dlerror());
        epi_log(EPI_LOG_DEBUG, "NVRTC: %s", s->why);
    }
    const char *why = lib ? wrong_with_library(s, lib) : NULL;
    if (why) {
        epi_format(s->why, sizeof(s->why), "%s: %s", path, why);
        epi_log(EPI_LOG_DEBUG, "NVRTC: %s is not used: %s", path, why);
    }
    return lib && !why;
}

static bool take_glob(struct search *s, const char *pattern) {
    glob_t found;
    bool taken = false;
    if (glob(pattern, 0, NULL, &found) == 0) {
        for (size_t i = 0; !taken && i < found.gl_pathc; i++) {
            taken = take_library(s, found.gl_pathv[i], 0);
        }
        globfree(&found);
    }
    return taken;
}

/* FOLDER/libnvrtc.so.MAJOR, where the folder may be a pattern and may be NULL. */
static bool take_in(struct search *s, const char *folder, const char *below, int major) {
    char pattern[PATTERN_BYTES];
    if (!folder) {
        return false;
    }
    epi_format(pattern, sizeof(pattern), "%s%s/libnvrtc.so.%d", folder, below, major);
    return take_glob(s, pattern);
}

/* ---- the packages of the running Python ---------------------------------------------------- */

static void note_packages(struct search *s, const char *fmt, int length, const char *path) {
    char pattern[PATTERN_BYTES];
    epi_format(pattern, sizeof(pattern), fmt, length, path);
    for (int i = 0; i < s->num_packages; i++) {
        if (strcmp(s->packages[i], pattern) == 0) {
            return;
        }
    }
    if (s->num_packages < MAX_PACKAGES) {
        memcpy(s->packages[s->num_packages++], pattern, sizeof(pattern));
    }
}

/* Extension modules lie in the folder that is wanted (site-packages, dist-packages), and
 * libtorch, libpython and the interpreter's own modules where they lead to it. */
static int note_loaded(struct dl_phdr_info *info, size_t bytes, void *ctx) {
    struct search *s = ctx;
    const char *path = info->dlpi_name;
    const char *at;
    (void)bytes;
    if (path && (at = strstr(path, "-packages/")) != NULL) {
        note_packages(s, "%.*s-packages", (int)(at - path), path);
    } else if (path && (at = strstr(path, "/torch/lib/libtorch")) != NULL) {
        note_packages(s, "%.*s", (int)(at - path), path);
    } else if (path && (at = strstr(path, "/lib-dynload/")) != NULL) {
        note_packages(s, "%.*s/*-packages", (int)(at - path), path);
    } else if (path && (at = strstr(path, "/libpython3")) != NULL) {
        note_packages(s, "%.*s/python3*/*-packages", (int)(at - path), path);
    }
    return 0;
}

static void note_environment(struct search *s, const char *variable) {
    const char *home = epi_env(variable);
    if (home) {
        note_packages(s, "%.*s/lib/python3*/*-packages", (int)strlen(home), home);
    }
}

/* ---- places ------------------------------------------------------------------------------- */

static bool take_loaded(struct search *s) {
    char name[32];
    for (int major = s->newest; major >= OLDEST_MAJOR; major--) {
        epi_format(name, sizeof(name), "libnvrtc.so.%d", major);
        if (take_library(s, name, RTLD_NOLOAD)) {
            return true;
        }
    }
    return false;
}

static bool take_toolkit(struct search *s, const char *home, int major) {
    return take_in(s, home, "/lib64", major) || take_in(s, home, "/lib", major) ||
           take_in(s, home, "/targets/*/lib", major);
}

static bool take_major(struct search *s, int major) {
    char name[32];
    for (int i = 0; i < s->num_packages; i++) {
        /* nvidia/cuda_nvrtc/lib of CUDA 12, nvidia/cu13/lib since. */
        if (take_in(s, s->packages[i], "/nvidia/*/lib", major)) {
            return true;
        }
    }
    epi_format(name, sizeof(name), "libnvrtc.so.%d", major);
    return take_in(s, epi_env("CONDA_PREFIX"), "/lib", major) ||
           take_toolkit(s, epi_env("CUDA_HOME"), major) ||
           take_toolkit(s, epi_env("CUDA_PATH"), major) || take_library(s, name, 0) ||
           take_toolkit(s, "/usr/local/cuda*", major);
}

static bool take_anywhere(struct search *s) {
    if (take_loaded(s)) {
        return true;
    }
    note_environment(s, "VIRTUAL_ENV");
    note_environment(s, "CONDA_PREFIX");
    dl_iterate_phdr(note_loaded, s);
    for (int major = s->newest; major >= OLDEST_MAJOR; major--) {
        if (take_major(s, major)) {
            return true;
        }
    }
    return false;
}

/* A library or the folder of one. */
static bool take_named(struct search *s, const char *path) {
    struct stat st;
    if (stat(path, &st) != 0 || !S_ISDIR(st.st_mode)) {
        return take_library(s, path, 0);
    }
    for (int major = s->newest; major >= OLDEST_MAJOR; major--) {
        if (take_in(s, path, "", major)) {
            return true;
        }
    }
    return false;
}

/* The text names what brings it; where EP_NVRTC_PATH led comes last, as it may be long. */
static ep_status absent(const struct search *s, int max_major, const char *named) {
    char package[64], versions[48], detail[2 * PATTERN_BYTES] = "";
    if (max_major == 0) {
        epi_format(package, sizeof(package), "nvidia-cuda-nvrtc");
        epi_format(versions, sizeof(versions), "libnvrtc.so.%d or later", OLDEST_MAJOR);
    } else if (max_major == OLDEST_MAJOR) {
        epi_format(package, sizeof(package), "nvidia-cuda-nvrtc-cu%d", OLDEST_MAJOR);
        epi_format(versions, sizeof(versions), "libnvrtc.so.%d", OLDEST_MAJOR);
    } else {
        epi_format(package, sizeof(package), "nvidia-cuda-nvrtc==%d.*", max_major);
        epi_format(versions, sizeof(versions), "libnvrtc.so.%d to .%d", OLDEST_MAJOR,
                   max_major);
    }
    if (named && *s->why) {
        epi_format(detail, sizeof(detail), "; EP_NVRTC_PATH: %s", s->why);
    } else if (named) {
        epi_format(detail, sizeof(detail), "; EP_NVRTC_PATH=%s holds none", named);
    }
    return epi_fail(EP_ERR_UNSUPPORTED,
                    "NVRTC, which compiles the kernels, was not found (pip install %s, or a "
                    "CUDA toolkit, brings %s)%s",
                    package, versions, detail);
}

/* NVRTC opens its builtins by a bare name, which works only if the loader's path holds them or
 * they are loaded already: they lie beside the file itself. */
static void load_builtins(const struct epi_nvrtc *n) {
    char file[PATH_MAX], path[PATH_MAX + 64];
    const char *slash = realpath(n->path, file) ? strrchr(file, '/') : NULL;
    epi_format(path, sizeof(path), "%.*slibnvrtc-builtins.so.%d.%d",
               slash ? (int)(slash + 1 - file) : 0, file, n->version / 1000,
               n->version % 1000 / 10);
    if (!dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        epi_log(EPI_LOG_DEBUG, "NVRTC: its builtins are not beside it: %s", dlerror());
    }
}

ep_status epi_nvrtc_open(struct epi_nvrtc **out, int max_major) {
    const char *named = epi_opt_str(EPI_OPT_NVRTC_PATH);
    struct search s = {.newest = max_major ? max_major : NEWEST_MAJOR};
    Dl_info info;
    s.nvrtc = epi_alloc(sizeof(*s.nvrtc));
    if (!s.nvrtc) {
        return epi_fail(EP_ERR_NOMEM, "no memory for the compiler");
    }
    if (!(named ? take_named(&s, named) : take_anywhere(&s))) {
        epi_free(s.nvrtc);
        return absent(&s, max_major, named);
    }
    if (dladdr(*(void **)&s.nvrtc->nvrtcVersion, &info) && info.dli_fname) {
        epi_format(s.nvrtc->path, sizeof(s.nvrtc->path), "%s", info.dli_fname);
    }
    load_builtins(s.nvrtc);
    epi_log(EPI_LOG_INFO, "NVRTC %d.%d from %s", s.nvrtc->version / 1000,
            s.nvrtc->version % 1000 / 10, s.nvrtc->path);
    *out = s.nvrtc;
    return EP_OK;
}

void epi_nvrtc_close(struct epi_nvrtc **nvrtc) {
    epi_free(*nvrtc);
    *nvrtc = NULL;
}

const char *epi_nvrtc_path(const struct epi_nvrtc *nvrtc) {
    return nvrtc->path;
}

int epi_nvrtc_version(const struct epi_nvrtc *nvrtc) {
    return nvrtc->version;
}
