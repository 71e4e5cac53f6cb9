/* SPDX-License-Identifier: MIT */
/*
 * NVRTC, the run-time compiler: making a cubin from the kernel texts that the library holds.
 * Owns nothing. Compilations may run at the same time on several threads, and then do run in
 * parallel. Must not be called by an operation: kernels are compiled when a group is created.
 */
#include "src/cu/cu.h"
#include "src/cu/nvrtc.h"

#include <string.h>

#define MAX_OPTIONS 24
#define MAX_HEADERS 32

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

/* -1: they are too many. */
static int fill_options(const char **options, const char *arch, const char *const *defines) {
    static const char *const always[] = {NVRTC_OPTIONS};
    int n = 0;
    options[n++] = arch;
    for (size_t i = 0; i < sizeof(always) / sizeof(always[0]); i++) {
        options[n++] = always[i];
    }
    for (; defines && *defines; defines++) {
        if (n == MAX_OPTIONS) {
            return -1;
        }
        options[n++] = *defines;
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
    size_t ptx_bytes = 0;
    int result = n->nvrtcGetCUBINSize(program, &c->bytes);
    if (result == 0) {
        result = n->nvrtcGetPTXSize(program, &ptx_bytes);
    }
    if (result == 0) {
        c->data = epi_alloc(c->bytes);
        c->ptx = epi_alloc(ptx_bytes + 1);
        if (!c->data || !c->ptx) {
            return epi_fail(EP_ERR_NOMEM, "no memory for a kernel of %zu bytes", c->bytes);
        }
        result = n->nvrtcGetCUBIN(program, c->data);
    }
    if (result == 0) {
        result = n->nvrtcGetPTX(program, c->ptx);
    }
    return result == 0 && c->bytes > 0 ? EP_OK
                                       : epi_fail(EP_ERR_UNSUPPORTED, "NVRTC made no cubin: %s",
                                                  n->nvrtcGetErrorString(result));
}

ep_status epi_nvrtc_compile(struct epi_nvrtc *n, const char *file, int arch,
                            const char *const *defines, struct epi_cubin *out) {
    const char *names[MAX_HEADERS], *texts[MAX_HEADERS], *options[MAX_OPTIONS];
    char arch_option[48];
    struct epi_cubin c = {0};
    program_t program = NULL;
    int num_headers;
    memset(out, 0, sizeof(*out));
    const char *source = texts_for(file, names, texts, &num_headers);
    if (!source) {
        return epi_fail(EP_ERR_INTERNAL, "the library holds no text of %s", file);
    }
    epi_format(arch_option, sizeof(arch_option), "--gpu-architecture=sm_%d", arch);
    const int num_options = fill_options(options, arch_option, defines);
    if (num_options < 0) {
        return epi_fail(EP_ERR_INTERNAL, "%s: more than %d options", file, MAX_OPTIONS);
    }
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
    epi_free(c->ptx);
    epi_free(c->log);
    memset(c, 0, sizeof(*c));
}
