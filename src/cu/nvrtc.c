/* SPDX-License-Identifier: MIT */
/*
 * NVRTC, the run-time compiler: finding it, and making a cubin from the kernel texts that the
 * library holds. Owns the opened library, which is never unloaded, because it keeps threads and
 * thread-local state of its own. Compilations may run at the same time on several threads. Must
 * not be called by an operation: kernels are compiled when a group is created.
 */
#include "src/cu/cu.h"

#include <dlfcn.h>
#include <glob.h>
#include <string.h>

#define NEWEST_MAJOR 15 /* to be looked for where the driver does not say */
#define OLDEST_MAJOR 12
#define MAX_OPTIONS 24
#define MAX_HEADERS 32
#define PATH_BYTES 1024

/* build/gen/kernel_text.c; the last has name NULL. */
struct epi_kernel_text {
    const char *name;
    const char *text;
};
extern const struct epi_kernel_text epi_kernel_texts[];

typedef struct nvrtc_program *program_t;
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
    X(int, nvrtcGetCUBINSize, (program_t, size_t *))                                           \
    X(int, nvrtcGetCUBIN, (program_t, char *))

struct epi_nvrtc {
#define FIELD(ret, name, args) ret(*name) args;
    NVRTC_SYMBOLS(FIELD)
#undef FIELD
    int version;
    char path[PATH_BYTES];
};

/* ---- finding it --------------------------------------------------------------------------- */

static void *open_glob(const char *pattern) {
    glob_t found;
    void *lib = NULL;
    if (glob(pattern, 0, NULL, &found) == 0) {
        for (size_t i = 0; !lib && i < found.gl_pathc; i++) {
            lib = dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_LOCAL);
        }
        globfree(&found);
    }
    return lib;
}

/* The library of one major version, where `w` says. */
static void *open_major(const struct epi_nvrtc_search *w, int major) {
    char path[PATH_BYTES];
    void *lib;
    if (w->path) {
        epi_format(path, sizeof(path), "%s/libnvrtc.so.%d", w->path, major);
        return dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    epi_format(path, sizeof(path), "libnvrtc.so.%d", major);
    lib = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!lib && w->home) {
        epi_format(path, sizeof(path), "%s/lib64/libnvrtc.so.%d", w->home, major);
        lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    if (!lib && w->venv) {
        epi_format(path, sizeof(path),
                   "%s/lib/python3*/site-packages/nvidia/*/lib/libnvrtc.so.%d", w->venv, major);
        lib = open_glob(path);
    }
    if (!lib) {
        epi_format(path, sizeof(path), "libnvrtc.so.%d", major);
        lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    if (!lib) {
        epi_format(path, sizeof(path), "/usr/local/cuda*/lib64/libnvrtc.so.%d", major);
        lib = open_glob(path);
    }
    return lib;
}

static ep_status find(const struct epi_nvrtc_search *w, void **lib) {
    const int newest = w->max_major ? w->max_major : NEWEST_MAJOR;
    *lib = NULL;
    if (w->path && strstr(w->path, ".so")) {
        *lib = dlopen(w->path, RTLD_NOW | RTLD_LOCAL);
        return *lib ? EP_OK
                    : epi_fail(EP_ERR_UNSUPPORTED, "NVRTC cannot be loaded: %s", dlerror());
    }
    for (int major = newest; !*lib && major >= OLDEST_MAJOR; major--) {
        *lib = open_major(w, major);
    }
    if (*lib) {
        return EP_OK;
    }
    if (w->path) {
        return epi_fail(EP_ERR_UNSUPPORTED, "there is no libnvrtc.so.%d to .%d in %s",
                        OLDEST_MAJOR, newest, w->path);
    }
    return epi_fail(EP_ERR_UNSUPPORTED,
                    "NVRTC was not found (libnvrtc.so.%d to .%d): pip install "
                    "nvidia-cuda-nvrtc, or a CUDA toolkit, brings it",
                    OLDEST_MAJOR, newest);
}

/* NVRTC opens its builtins by a bare name, which works only if the loader's path holds them or
 * they are loaded already: they lie beside it. */
static void load_builtins(const char *path) {
    char pattern[PATH_BYTES];
    const char *slash = strrchr(path, '/');
    if (slash) {
        epi_format(pattern, sizeof(pattern), "%.*s/libnvrtc-builtins.so*", (int)(slash - path),
                   path);
        open_glob(pattern);
    }
}

ep_status epi_nvrtc_open(struct epi_nvrtc **out, const struct epi_nvrtc_search *where) {
    void *lib;
    int major = 0, minor = 0;
    Dl_info info;
    ep_status st = find(where, &lib);
    if (st != EP_OK) {
        return st;
    }
    struct epi_nvrtc *n = epi_alloc(sizeof(*n));
    if (!n) {
        return epi_fail(EP_ERR_NOMEM, "no memory for the compiler");
    }
#define LOAD(ret, name, args)                                                                  \
    *(void **)&n->name = dlsym(lib, #name);                                                    \
    if (!n->name) {                                                                            \
        epi_free(n);                                                                           \
        return epi_fail(EP_ERR_UNSUPPORTED, "libnvrtc lacks " #name);                          \
    }
    NVRTC_SYMBOLS(LOAD)
#undef LOAD
    n->nvrtcVersion(&major, &minor);
    n->version = major * 1000 + minor * 10;
    if (dladdr(*(void **)&n->nvrtcVersion, &info) && info.dli_fname) {
        epi_format(n->path, sizeof(n->path), "%s", info.dli_fname);
    }
    load_builtins(n->path);
    epi_log(EPI_LOG_INFO, "NVRTC %d.%d from %s", major, minor, n->path);
    *out = n;
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

/* ---- compiling ---------------------------------------------------------------------------- */

/* The text of `file`, and all headers under their full names. */
static const char *texts_for(const char *file, const char **names, const char **texts,
                             int *num_headers) {
    const char *source = NULL;
    int n = 0;
    for (const struct epi_kernel_text *t = epi_kernel_texts; t->name; t++) {
        const size_t length = strlen(t->name);
        if (strcmp(t->name, file) == 0) {
            source = t->text;
        } else if (n < MAX_HEADERS && length > 2 && strcmp(t->name + length - 2, ".h") == 0) {
            names[n] = t->name;
            texts[n++] = t->text;
        }
    }
    *num_headers = n;
    return source;
}

/* The same as in the gate: arithmetic as on the host, and what would be dropped in silence is an
 * error. */
static int fill_options(const char **options, const char *arch, const char *const *defines) {
    static const char *const always[] = {
        "--std=c++17",      "--fmad=false",     "--ftz=false",       "--prec-div=true",
        "--prec-sqrt=true", "-diag-error=1866", "--ptxas-options=-v"};
    int n = 0;
    options[n++] = arch;
    for (size_t i = 0; i < sizeof(always) / sizeof(always[0]); i++) {
        options[n++] = always[i];
    }
    while (defines && *defines && n < MAX_OPTIONS) {
        options[n++] = *defines++;
    }
    return n;
}

static char *read_log(struct epi_nvrtc *n, program_t program) {
    size_t bytes = 0;
    n->nvrtcGetProgramLogSize(program, &bytes);
    char *log = epi_alloc(bytes + 1);
    if (log && bytes > 1) {
        n->nvrtcGetProgramLog(program, log);
    }
    return log;
}

/* One log line per line of the compiler's. */
static void log_lines(const char *text) {
    while (*text) {
        const int length = (int)strcspn(text, "\n");
        if (length) {
            epi_log(EPI_LOG_ERROR, "%.*s", length, text);
        }
        text += length + (text[length] == '\n');
    }
}

static ep_status complain(struct epi_nvrtc *n, int result, const char *file, const char *arch,
                          const char *log) {
    const char *line = log ? strstr(log, "error") : NULL;
    while (line && line > log && line[-1] != '\n') {
        line--;
    }
    if (!line) {
        line = log ? log : "";
    }
    log_lines(log ? log : "");
    return epi_fail(EP_ERR_UNSUPPORTED, "%s does not compile (%s, NVRTC %d.%d): %s: %.*s", file,
                    arch, n->version / 1000, n->version % 1000 / 10,
                    n->nvrtcGetErrorString(result), (int)strcspn(line, "\n"), line);
}

static ep_status take_cubin(struct epi_nvrtc *n, program_t program, struct epi_cubin *c) {
    int result = n->nvrtcGetCUBINSize(program, &c->bytes);
    if (result == 0 && c->bytes > 0) {
        c->data = epi_alloc(c->bytes);
        if (!c->data) {
            return epi_fail(EP_ERR_NOMEM, "no memory for a kernel of %zu bytes", c->bytes);
        }
        result = n->nvrtcGetCUBIN(program, c->data);
    }
    return result == 0 && c->bytes > 0 ? EP_OK
                                       : epi_fail(EP_ERR_UNSUPPORTED, "NVRTC made no cubin: %s",
                                                  n->nvrtcGetErrorString(result));
}

ep_status epi_nvrtc_compile(struct epi_nvrtc *n, const char *file, int arch,
                            const char *const *defines, struct epi_cubin *out) {
    const char *names[MAX_HEADERS], *texts[MAX_HEADERS], *options[MAX_OPTIONS];
    char arch_option[48];
    struct epi_cubin c;
    program_t program = NULL;
    int num_headers;
    memset(&c, 0, sizeof(c));
    memset(out, 0, sizeof(*out));
    const char *source = texts_for(file, names, texts, &num_headers);
    if (!source) {
        return epi_fail(EP_ERR_INTERNAL, "the library holds no text of %s", file);
    }
    epi_format(arch_option, sizeof(arch_option), "--gpu-architecture=sm_%d", arch);
    const int num_options = fill_options(options, arch_option, defines);
    int result = n->nvrtcCreateProgram(&program, source, file, num_headers, texts, names);
    if (result != 0) {
        return epi_fail(EP_ERR_UNSUPPORTED, "NVRTC refused %s: %s", file,
                        n->nvrtcGetErrorString(result));
    }
    result = n->nvrtcCompileProgram(program, num_options, options);
    c.log = read_log(n, program);
    ep_status st = result == 0 ? take_cubin(n, program, &c)
                               : complain(n, result, file, arch_option, c.log);
    n->nvrtcDestroyProgram(&program);
    if (st == EP_OK && !c.log) {
        st = epi_fail(EP_ERR_NOMEM, "no memory for the compiler's log");
    }
    if (st != EP_OK) {
        epi_cubin_free(&c);
        return st;
    }
    *out = c;
    return EP_OK;
}

void epi_cubin_free(struct epi_cubin *c) {
    epi_free(c->data);
    epi_free(c->log);
    memset(c, 0, sizeof(*c));
}
