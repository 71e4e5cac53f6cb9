/* SPDX-License-Identifier: MIT */
/*
 * Kernels compiled once: per process, through the list here, and per user, through cache.c.
 * Owns the list and the process's one compiler, both for the life of the process. Any thread;
 * those that want the same kernel wait for the first, those that want different ones compile in
 * parallel. Must not look for NVRTC while memory or disk has the kernel, so the key of a kernel
 * holds all that decides what it does (texts, options, architecture, library, what the driver
 * allows) but not which NVRTC made it: that is a note in the entry.
 */
#include "src/cu/jit.h"
#include "src/cu/nvrtc.h"

#include <stdio.h>
#include <string.h>

struct kernel {
    struct kernel *next;
    struct epi_jit_key key; /* with the dump folder: what is dumped is compiled for it */
    bool busy;              /* a thread is getting it */
    int num_waiting;        /* threads that need it to be here still */
    struct epi_cubin cubin; /* data is NULL: not yet got */
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER; /* a kernel is busy no more */
static struct kernel *kernels;

static _Atomic uint64_t num_compiled, num_from_disk, num_from_memory;

static pthread_mutex_t compiler_mutex = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static struct epi_nvrtc *compiler;

/* ---- keys --------------------------------------------------------------------------------- */

static void add_text(struct epi_jit_key *key, const char *text) {
    epi_jit_key_add(key, text, strlen(text) + 1);
}

static void make_key(struct epi_jit_request *r) {
    static const char *const always[] = {NVRTC_OPTIONS};
    char head[96];
    struct epi_jit_key *key = &r->key;
    epi_jit_key_begin(key);
    epi_format(head, sizeof(head), "libep %d.%d.%d, sm_%d, NVRTC up to %d", EP_VERSION_MAJOR,
               EP_VERSION_MINOR, EP_VERSION_PATCH, r->arch, r->max_major);
    add_text(key, head);
    add_text(key, r->file);
    for (size_t i = 0; i < sizeof(always) / sizeof(always[0]); i++) {
        add_text(key, always[i]);
    }
    for (const char *const *d = r->defines; d && *d; d++) {
        add_text(key, *d);
    }
    for (const struct epi_kernel_text *t = epi_kernel_texts; t->name; t++) {
        add_text(key, t->name);
        add_text(key, t->text);
    }
}

/* ---- from the compiler and from disk ------------------------------------------------------ */

/* The process's compiler, found by the first caller. */
static ep_status get_compiler(int max_major, struct epi_nvrtc **out) {
    ep_status st = EP_OK;
    pthread_mutex_lock(&compiler_mutex);
    if (!compiler) {
        st = epi_nvrtc_open(&compiler, max_major);
    } else if (max_major && compiler->version / 1000 > max_major) {
        st = epi_fail(EP_ERR_INTERNAL, "the process compiles with NVRTC %d, a driver takes %d",
                      compiler->version / 1000, max_major);
    }
    *out = compiler;
    pthread_mutex_unlock(&compiler_mutex);
    return st;
}

static ep_status compile(const struct epi_jit_request *r, struct epi_cubin *out,
                         int *nvrtc_version) {
    const int64_t start_ns = epi_now_ns();
    struct epi_nvrtc *nvrtc;
    EPI_TRY(get_compiler(r->max_major, &nvrtc));
    EPI_TRY(epi_nvrtc_compile(nvrtc, r->file, r->arch, r->defines, out));
    *nvrtc_version = nvrtc->version;
    epi_log(EPI_LOG_INFO, "%s for sm_%d: compiled in %d ms", r->file, r->arch,
            (int)((epi_now_ns() - start_ns) / EPI_NS_PER_MS));
    if (r->dump) {
        epi_jit_dump(r, out, *nvrtc_version);
    }
    /* Who asked is served with the cubin alone. */
    epi_free(out->ptx);
    epi_free(out->log);
    out->ptx = out->log = NULL;
    num_compiled++;
    return EP_OK;
}

static ep_status read_disk(const struct epi_cache *cache, const struct epi_jit_request *r,
                           bool quiet, struct epi_cubin *out) {
    int version = 0;
    EPI_TRY(epi_cache_read(cache, &r->key, quiet, out, &version));
    epi_log(EPI_LOG_INFO, "%s for sm_%d: from %s, where NVRTC %d.%d left it", r->file, r->arch,
            cache->path, version / 1000, version % 1000 / 10);
    num_from_disk++;
    return EP_OK;
}

/* From disk, or compiled and put there. */
static ep_status obtain(const struct epi_jit_request *r, struct epi_cubin *out) {
    struct epi_cache cache;
    const bool on_disk = epi_cache_open(&cache);
    const bool readable = on_disk && !r->dump;
    int lock = -1, version = 0;
    ep_status st = readable ? read_disk(&cache, r, false, out) : EP_AGAIN;
    if (readable && st == EP_AGAIN) {
        lock = epi_cache_lock(&cache, &r->key);
        st = read_disk(&cache, r, true, out); /* from whoever held the lock */
    }
    if (st == EP_AGAIN) {
        st = compile(r, out, &version);
        if (st == EP_OK && on_disk) {
            epi_cache_write(&cache, &r->key, out, version);
        }
    }
    epi_cache_unlock(&cache, &r->key, lock);
    epi_cache_close(&cache);
    return st;
}

/* ---- memory ------------------------------------------------------------------------------- */

/* Under the mutex: the kernel of that key, a new one if need be; NULL: no memory. */
static struct kernel *find_kernel(const struct epi_jit_key *key) {
    struct kernel *k = kernels;
    while (k && memcmp(&k->key, key, sizeof(*key)) != 0) {
        k = k->next;
    }
    if (!k && (k = epi_alloc(sizeof(*k))) != NULL) {
        k->key = *key;
        k->next = kernels;
        kernels = k;
    }
    return k;
}

/* Under the mutex: a kernel that could not be got and that nobody waits for. */
static void drop_kernel(struct kernel *k) {
    struct kernel **at = &kernels;
    while (*at != k) {
        at = &(*at)->next;
    }
    *at = k->next;
    epi_free(k);
}

/* Under the mutex, which is let go meanwhile. After a failure the next that waits tries. */
static ep_status get_kernel(struct kernel *k, const struct epi_jit_request *r) {
    struct epi_cubin cubin = {0};
    k->num_waiting++;
    while (k->busy) {
        pthread_cond_wait(&changed, &mutex);
    }
    k->num_waiting--;
    if (k->cubin.data) {
        num_from_memory++;
        return EP_OK;
    }
    k->busy = true;
    pthread_mutex_unlock(&mutex);
    const ep_status st = obtain(r, &cubin);
    pthread_mutex_lock(&mutex);
    k->busy = false;
    k->cubin = cubin;
    pthread_cond_broadcast(&changed);
    return st;
}

ep_status epi_jit_get(const char *file, int arch, const char *const *defines,
                      int driver_version, struct epi_jit_kernel *out) {
    struct epi_jit_request r = {
        file, arch, defines, driver_version / 1000, epi_opt_str(EPI_OPT_JIT_DUMP), {0, 0}};
    make_key(&r);
    struct epi_jit_key key = r.key;
    if (r.dump) {
        add_text(&key, r.dump);
    }
    pthread_mutex_lock(&mutex);
    struct kernel *k = find_kernel(&key);
    ep_status st = k ? get_kernel(k, &r) : epi_fail(EP_ERR_NOMEM, "no memory for a kernel");
    if (st == EP_OK) {
        out->cubin = k->cubin.data;
        out->bytes = k->cubin.bytes;
    } else if (k && !k->busy && k->num_waiting == 0) {
        drop_kernel(k);
    }
    pthread_mutex_unlock(&mutex);
    return st;
}

/* ---- several ------------------------------------------------------------------------------ */

struct job {
    const char *file;
    int arch;
    const char *const *defines;
    int driver_version, rank;
    const struct epi_environment *environment; /* of who asked */
    struct epi_jit_kernel kernel;
    ep_status st;
    char text[EPI_ERROR_TEXT_BYTES];
    pthread_t thread;
    bool started;
};

static void *run_job(void *arg) {
    struct job *j = arg;
    epi_log_set_rank(j->rank);
    epi_environment_use(j->environment);
    j->st = epi_jit_get(j->file, j->arch, j->defines, j->driver_version, &j->kernel);
    epi_environment_use(NULL);
    epi_format(j->text, sizeof(j->text), "%s", epi_error_text());
    return NULL;
}

ep_status epi_jit_get_all(const char *const *files, int num_files, int arch,
                          const char *const *defines, int driver_version,
                          struct epi_jit_kernel *out) {
    ep_status st = EP_OK;
    struct job *jobs = epi_alloc_array((size_t)num_files, sizeof(*jobs));
    struct epi_environment *environment = epi_environment_copy();
    if (!jobs || !environment) {
        epi_free(jobs);
        epi_free(environment);
        return epi_fail(EP_ERR_NOMEM, "no memory for %d kernels", num_files);
    }
    for (int i = 0; i < num_files; i++) {
        struct job *j = &jobs[i];
        j->file = files[i];
        j->arch = arch;
        j->defines = defines;
        j->driver_version = driver_version;
        j->rank = epi_log_rank();
        j->environment = environment;
        j->started = i > 0 && epi_thread_start(&j->thread, run_job, j, "ep-compile") == 0;
    }
    for (int i = 0; i < num_files; i++) { /* the first, and those that got no thread */
        if (!jobs[i].started) {
            run_job(&jobs[i]);
        }
    }
    for (int i = 0; i < num_files; i++) {
        if (jobs[i].started) {
            pthread_join(jobs[i].thread, NULL);
        }
        if (st == EP_OK && jobs[i].st != EP_OK) {
            st = epi_fail(jobs[i].st, "%s", jobs[i].text);
        }
    }
    for (int i = 0; st == EP_OK && i < num_files; i++) {
        out[i] = jobs[i].kernel;
    }
    epi_free(jobs);
    epi_free(environment);
    return st;
}

void epi_jit_info(struct epi_jit_info *out) {
    struct epi_cache cache;
    memset(out, 0, sizeof(*out));
    if (epi_cache_open(&cache)) {
        epi_format(out->cache_folder, sizeof(out->cache_folder), "%s", cache.path);
    }
    epi_cache_close(&cache);
    pthread_mutex_lock(&compiler_mutex);
    if (compiler) {
        out->nvrtc_version = compiler->version;
        epi_format(out->nvrtc_path, sizeof(out->nvrtc_path), "%s", compiler->path);
    }
    pthread_mutex_unlock(&compiler_mutex);
    out->num_compiled = num_compiled;
    out->num_from_disk = num_from_disk;
    out->num_from_memory = num_from_memory;
}
