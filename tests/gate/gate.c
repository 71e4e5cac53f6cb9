/* SPDX-License-Identifier: MIT */
/*
 * The gate: compiles every kernel for one GPU generation with NVRTC (opened at run time) or
 * with nvcc, without a GPU, and prints what each one needs. Headers are given to NVRTC in memory
 * under their full names, as the library does it, so a stray include fails here.
 *
 * Usage: gate nvrtc LIBNVRTC | nvcc NVCC  ARCH FILE.k.c... ; run from the root of the tree; ARCH
 * is 80, 90, ...
 * A kernel file may hold lines "gate: OPTIONS" in comments: it is compiled once with each
 * line's options instead of once without any. Local memory (a stack frame or spills) of any
 * function fails. The last line is "gate-WHAT: N passed, N failed, N skipped".
 */
#include <ctype.h>
#include <dlfcn.h>
#include <glob.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernel/kernels.h"
#include "src/cu/nvrtc.h"

#define MAX_OPTIONS 48

static int num_passed;
static int num_failed;

static struct epi_nvrtc nvrtc;

static struct {
    int num;
    const char **names;
    const char **texts;
} headers;

static void die(const char *what, const char *why) {
    fprintf(stderr, "gate: %s: %s\n", what, why);
    exit(1);
}

static char *read_stream(FILE *file) {
    size_t bytes = 0;
    size_t room = 1 << 16;
    char *text = malloc(room);

    while (text) {
        size_t got = fread(text + bytes, 1, room - 1 - bytes, file);

        bytes += got;
        text[bytes] = 0;
        if (got == 0) {
            return text;
        }
        if (bytes + 1 == room) {
            room *= 2;
            text = realloc(text, room);
        }
    }
    die("memory", "out of it");
    return NULL;
}

static char *read_file(const char *path) {
    FILE *file = fopen(path, "r");
    char *text;

    if (!file) {
        die(path, "cannot be read");
    }
    text = read_stream(file);
    fclose(file);
    return text;
}

static void load_headers(void) {
    glob_t found;

    if (glob("kernel/*.h", 0, NULL, &found) != 0) {
        return;
    }
    headers.num = (int)found.gl_pathc;
    headers.names = calloc(found.gl_pathc, sizeof(*headers.names));
    headers.texts = calloc(found.gl_pathc, sizeof(*headers.texts));
    for (int i = 0; i < headers.num; i++) {
        headers.names[i] = strdup(found.gl_pathv[i]);
        headers.texts[i] = read_file(found.gl_pathv[i]);
    }
    globfree(&found);
}

static void load_nvrtc(const char *path) {
    char builtins[4096];
    const char *slash = strrchr(path, '/');
    void *lib;
    glob_t found;

    /* The builtins library lies beside it and is found only if it is loaded already. */
    snprintf(builtins, sizeof(builtins), "%.*s/libnvrtc-builtins.so*",
             (int)(slash ? slash - path : 1), slash ? path : ".");
    if (glob(builtins, 0, NULL, &found) == 0) {
        dlopen(found.gl_pathv[0], RTLD_NOW | RTLD_GLOBAL);
        globfree(&found);
    }
    lib = dlopen(path, RTLD_NOW);
    if (!lib) {
        die(path, dlerror());
    }
#define LOAD(ret, name, args)                                                                  \
    *(void **)&nvrtc.name = dlsym(lib, #name);                                                 \
    if (!nvrtc.name) {                                                                         \
        die(path, "lacks " #name);                                                             \
    }
    NVRTC_SYMBOLS(LOAD)
#undef LOAD
}

/* The number that stands right before `word` in `line`; -1 if word is not there. */
static long number_before(const char *line, const char *word) {
    const char *p = strstr(line, word);

    if (!p) {
        return -1;
    }
    while (p > line && p[-1] == ' ') {
        p--;
    }
    while (p > line && isdigit((unsigned char)p[-1])) {
        p--;
    }
    return strtol(p, NULL, 10);
}

struct usage {
    char name[256];
    bool is_entry;
    long local; /* stack frame and lmem bytes, spills included */
    long spilled;
    long registers;
    long shared;
};

static void report(const char *what, const char *arch, const char *variant,
                   const struct usage *u) {
    if (!u->name[0]) {
        return;
    }
    bool bad = u->local > 0 || u->spilled > 0;
    size_t bytes = strlen(u->name);
    const char *tail = bytes > 40 ? u->name + bytes - 40 : u->name;

    if (u->is_entry || bad) {
        printf("%-6s sm_%-4s %-40s %4ld regs %6ld B shared %5ld B local %5ld B spilled%s%s%s\n",
               what, arch, tail, u->registers, u->shared, u->local, u->spilled,
               *variant ? "  " : "", variant, bad ? "  FAILED: local memory" : "");
    }
}

/* Reads ptxas -v; returns how many kernels were seen, 0 also when the text has none. */
static int parse_ptxas(const char *what, const char *arch, const char *variant, char *text,
                       int *num_local) {
    struct usage u = {{0}, false, 0, 0, 0, 0};
    int num_kernels = 0;
    char *line;

    while ((line = strsep(&text, "\n")) != NULL) {
        char *p;
        long n;

        if ((p = strstr(line, "Compiling entry function '")) != NULL ||
            (p = strstr(line, "Function properties for ")) != NULL) {
            bool is_entry = p[0] == 'C';
            char name[256];

            snprintf(name, sizeof(name), "%s", p + (is_entry ? 26 : 24));
            name[strcspn(name, "' ")] = 0;
            if (strcmp(name, u.name) != 0) {
                report(what, arch, variant, &u);
                *num_local += u.local > 0 || u.spilled > 0;
                memset(&u, 0, sizeof(u));
                memcpy(u.name, name, sizeof(name));
            }
            u.is_entry |= is_entry;
            num_kernels += is_entry;
        }
        if ((n = number_before(line, "bytes stack frame")) >= 0) {
            u.local += n;
            u.spilled += number_before(line, "bytes spill stores") +
                         number_before(line, "bytes spill loads");
        }
        if ((n = number_before(line, "registers")) >= 0 && strstr(line, "Used")) {
            u.registers = n;
            n = number_before(line, "bytes smem");
            u.shared = n > 0 ? n : 0;
            n = number_before(line, "bytes lmem");
            u.local += n > 0 ? n : 0;
        }
    }
    report(what, arch, variant, &u);
    *num_local += u.local > 0 || u.spilled > 0;
    return num_kernels;
}

/* Splits `variant` at blanks into options; `storage` holds the pieces. */
static int split(const char *variant, char *storage, size_t bytes, const char **options,
                 int num) {
    char *rest = storage;
    char *word;

    snprintf(storage, bytes, "%s", variant);
    while ((word = strsep(&rest, " \t")) != NULL && num < MAX_OPTIONS) {
        if (*word) {
            options[num++] = word;
        }
    }
    return num;
}

/* Compiles with NVRTC; *log is to be freed. */
static bool compile_nvrtc(const char *path, const char *arch, const char *variant, char **log) {
    char arch_option[64];
    char storage[1024];
    static const char *const always[] = {NVRTC_OPTIONS};
    const char *options[MAX_OPTIONS] = {arch_option};
    int num = 1 + (int)(sizeof(always) / sizeof(always[0]));
    program_t program = NULL;
    char *source = read_file(path);
    size_t bytes = 0;
    int rc;

    memcpy(&options[1], always, sizeof(always));
    snprintf(arch_option, sizeof(arch_option), "--gpu-architecture=sm_%s", arch);
    num = split(variant, storage, sizeof(storage), options, num);
    *log = strdup("");
    rc = nvrtc.nvrtcCreateProgram(&program, source, path, headers.num, headers.texts,
                                  headers.names);
    if (rc == 0) {
        rc = nvrtc.nvrtcCompileProgram(program, num, options);
        if (nvrtc.nvrtcGetProgramLogSize(program, &bytes) == 0 && bytes > 1) {
            free(*log);
            *log = calloc(1, bytes + 1);
            nvrtc.nvrtcGetProgramLog(program, *log);
        }
        if (rc == 0) {
            rc = nvrtc.nvrtcGetCUBINSize(program, &bytes);
        }
        nvrtc.nvrtcDestroyProgram(&program);
    }
    if (rc != 0) {
        printf("nvrtc: %s\n", nvrtc.nvrtcGetErrorString(rc));
    }
    free(source);
    return rc == 0 && bytes > 0;
}

static bool compile_nvcc(const char *nvcc, const char *path, const char *arch,
                         const char *variant, char **log) {
    char command[4096];
    FILE *pipe;

    snprintf(command, sizeof(command),
             "'%s' -cubin -o /dev/null -x cu -arch=sm_%s -I. --fmad=false --ftz=false "
             "--prec-div=true --prec-sqrt=true -diag-error 1866 -Xptxas -v %s '%s' 2>&1",
             nvcc, arch, variant, path);
    pipe = popen(command, "r");
    if (!pipe) {
        die(nvcc, "cannot be run");
    }
    *log = read_stream(pipe);
    return pclose(pipe) == 0;
}

/* A kernel of the list that `path` does not have by its name, or NULL. */
static const char *missing(const char *path, const char *log) {
    static const char *const list[][2] = {
#define ROW(NAME, name, file, args, set, symbol) {file, "'" symbol "'"},
        K_KERNELS(ROW)};

    for (size_t i = 0; i < sizeof(list) / sizeof(list[0]); i++) {
        if (strcmp(list[i][0], path) == 0 && !strstr(log, list[i][1])) {
            return list[i][1];
        }
    }
    return NULL;
}

static void gate_one(const char *nvcc, const char *path, const char *arch,
                     const char *variant) {
    const char *what = nvcc ? "nvcc" : "nvrtc";
    char *log = NULL;
    bool good = nvcc ? compile_nvcc(nvcc, path, arch, variant, &log)
                     : compile_nvrtc(path, arch, variant, &log);
    char *copy = strdup(log);
    int num_local = 0;
    int num_kernels = good ? parse_ptxas(what, arch, variant, copy, &num_local) : 0;

    if (!good || num_kernels == 0) {
        printf("%-6s sm_%-4s %s %s: FAILED: %s\n%s\n", what, arch, path, variant,
               good ? "no kernel found in what ptxas prints" : "does not compile", log);
        good = false;
    }
    if (good && missing(path, log)) {
        printf("%s: FAILED: has no kernel %s\n", path, missing(path, log));
        good = false;
    }
    good = good && num_local == 0;
    num_passed += good;
    num_failed += !good;
    free(copy);
    free(log);
}

/* Compiles a file once per "gate:" line, or once. */
static void gate_file(const char *nvcc, const char *path, const char *arch) {
    char *text = read_file(path);
    char *rest = text;
    char *line;
    int num_variants = 0;

    while ((line = strsep(&rest, "\n")) != NULL) {
        char *p = strstr(line, "gate: ");

        if (p && strspn(line, " */") == (size_t)(p - line)) {
            char *end = strstr(p, "*/");

            if (end) {
                *end = 0;
            }
            gate_one(nvcc, path, arch, p + 6);
            num_variants++;
        }
    }
    if (num_variants == 0) {
        gate_one(nvcc, path, arch, "");
    }
    free(text);
}

int main(int argc, char **argv) {
    const char *nvcc = NULL;
    int major = 0;
    int minor = 0;

    if (argc < 4) {
        die("usage", "gate nvrtc LIBNVRTC | nvcc NVCC  ARCH FILE.k.c...");
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (strcmp(argv[1], "nvcc") == 0) {
        nvcc = argv[2];
    } else {
        load_headers();
        load_nvrtc(argv[2]);
        nvrtc.nvrtcVersion(&major, &minor);
        printf("nvrtc %d.%d, %s\n", major, minor, argv[2]);
    }
    for (int i = 4; i < argc; i++) {
        gate_file(nvcc, argv[i], argv[3]);
    }
    printf("gate-%s: %d passed, %d failed, 0 skipped\n", argv[1], num_passed, num_failed);
    return num_failed ? 1 : 0;
}
