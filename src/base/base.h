/* SPDX-License-Identifier: MIT */
/*
 * The one header of layer 0: status and error text, log, knobs, time, hash, allocation, threads,
 * and how ranks agree. Every other directory may include it; it includes nothing of theirs but the
 * public ep.h.
 *
 * Threads: everything here may be called from any thread at any time, unless said otherwise.
 * Must not: block (except to sleep and to agree), depend on any other directory, or keep state that a
 * test cannot see (the allocation counters are readable, the log level can be reloaded).
 */
#ifndef EPI_BASE_H
#define EPI_BASE_H

#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "ep.h"

#define EPI_PRINTF(fmt_at, args_at) __attribute__((format(printf, fmt_at, args_at)))

/* ---- status.c: the calling thread's error text ------------------------------------------- */

#define EPI_ERROR_TEXT_BYTES 512

/* Stores the text for ep_last_error() and returns `st`, so that `return epi_fail(...)` reads
 * well. Control characters in it become '?'. Never allocates. An argument may be epi_error_text() itself: text can be wrapped. */
ep_status epi_fail(ep_status st, const char *fmt, ...) EPI_PRINTF(2, 3);
void epi_clear_error(void);
const char *epi_error_text(void); /* "" when there is none; the calling thread's own buffer */

/* Returns what `call` returned if that is not EP_OK: the error text stands already. */
#define EPI_TRY(call)                                                                          \
    do {                                                                                       \
        ep_status epi_try_status = (call);                                                     \
        if (epi_try_status != EP_OK) {                                                         \
            return epi_try_status;                                                             \
        }                                                                                      \
    } while (0)

/* For public functions: refuses an argument that is NULL, by the name it has in ep.h. */
#define EPI_NOT_NULL(fn, arg)                                                                  \
    if (!(arg)) {                                                                              \
        return epi_fail(EP_ERR_ARG, fn ": " #arg " is NULL");                                  \
    }

/* snprintf for texts that may be cut: the compiler need not warn, the end is marked "...". */
void epi_format(char *out, size_t out_bytes, const char *fmt, ...) EPI_PRINTF(3, 4);

/* ---- log.c ------------------------------------------------------------------------------- */

enum epi_log_level { EPI_LOG_ERROR, EPI_LOG_WARN, EPI_LOG_INFO, EPI_LOG_DEBUG };

/* One line, one write(2), to stderr. Control characters in the text become '?'. Neither waits nor
 * raises a signal, whatever stderr is: a line that it does not take is lost, which the next says. */
void epi_log(enum epi_log_level level, const char *fmt, ...) EPI_PRINTF(2, 3);

/* The same for lines that a stranger can cause as often as he likes: so many of one kind in so much
 * time; what is left out is counted, and the next line of the kind says how many. */
#define EPI_LOG_SOME 10
#define EPI_LOG_SOME_NS (10 * EPI_NS_PER_S)
struct epi_log_kind { /* static, all 0 */
    _Atomic int64_t window;
    _Atomic uint32_t num, left_out;
};
void epi_log_some(struct epi_log_kind *kind, enum epi_log_level level, const char *fmt, ...)
    EPI_PRINTF(3, 4);

bool epi_log_enabled(enum epi_log_level level);
void epi_log_set_rank(int rank); /* the calling thread's tag; -1 is none */
int epi_log_rank(void);
void epi_log_reload(void); /* reads EP_LOG again; it is otherwise read once per process */

/* ---- opt.c: the environment -------------------------------------------------------------- */

/*
 * The one table of knobs: X(id, kind, default, min, max, choices, doc), variable EP_<id>.
 *   INT     min <= value <= max, decimal or 0x
 *   STR     min <= strlen(value) <= max
 *   SECRET  likewise; never shown
 *   CHOICE  one of `choices`; epi_opt_int gives its index
 * An empty variable counts as unset. A default of NULL (STR only) means "no value".
 */
#define EPI_OPTS(X)                                                                            \
    X(LOG, CHOICE, "warn", 0, 0, "error|warn|info|debug", "what is logged to stderr")          \
    X(TIMEOUT_MS, INT, "100000", 100, 86400000, NULL,                                          \
      "how long a wait for a living peer may last, in milliseconds")                           \
    X(PORT, INT, "0", 0, 65535, NULL, "rendezvous port of rank 0; 0 means MASTER_PORT + 1")    \
    X(JOB, STR, NULL, 1, 200, NULL, "name of the job; two jobs of different names never meet") \
    X(JOB_KEY, SECRET, NULL, 16, 200, NULL,                                                    \
      "the job's secret, the same on all ranks: who has it is believed to be one of them. "    \
      "`ep run` makes one; needed where ranks meet over a network")                            \
    X(IFNAME, STR, NULL, 1, 200, NULL,                                                         \
      "interfaces on which rank 0 listens over TCP: beginnings of names, as in "               \
      "NCCL_SOCKET_IFNAME, which is taken where this is not set")                              \
    X(WORKERS, INT, "0", 0, 1024, NULL, "host worker threads per rank; 0 chooses")             \
    X(NVRTC_PATH, STR, NULL, 1, 1000, NULL,                                                    \
      "the libnvrtc.so that compiles kernels, or its folder; no other is looked for")          \
    X(JIT_CACHE, STR, NULL, 1, 1000, NULL,                                                     \
      "folder that keeps compiled kernels, off for none; else libep in XDG_CACHE_HOME or in "  \
      "HOME/.cache")                                                                           \
    X(JIT_DUMP, STR, NULL, 1, 1000, NULL,                                                      \
      "folder for each kernel's text, PTX, cubin (nvdisasm -c FILE shows its machine code) "   \
      "and compiler report; compiles them anew")                                               \
    X(ARENA, CHOICE, "auto", 0, 0, "auto|device|host",                                         \
      "where the arenas of CUDA groups lie: host is pinned host memory")                       \
    X(NODE_SIZE, STR, NULL, 1, 200, NULL,                                                      \
      "ranks of a node, or those of each with commas between; else ranks of a host are one")   \
    X(NET_PROVIDER, STR, NULL, 1, 47, NULL,                                                    \
      "the provider of libfabric between nodes, or fake; else the first that can be used, as " \
      "`ep doctor` lists them")                                                                \
    X(NET_IFNAME, STR, NULL, 1, 63, NULL,                                                      \
      "the interface between nodes, as `ep doctor` lists them (eth0, mlx5_0)")                 \
    X(TEST_ALLOC_FAIL, INT, "0", 0, INT64_MAX, NULL,                                           \
      "for tests: the n-th allocation of the process fails; 0 is off")

#define EPI_OPT_ENUM(id, kind, def, min, max, choices, doc) EPI_OPT_##id,
enum epi_opt { EPI_OPTS(EPI_OPT_ENUM) EPI_OPT_COUNT };
#undef EPI_OPT_ENUM

enum epi_opt_kind {
    EPI_OPT_KIND_INT,
    EPI_OPT_KIND_STR,
    EPI_OPT_KIND_SECRET,
    EPI_OPT_KIND_CHOICE
};

struct epi_opt_info {
    const char *name;
    const char *doc;
    const char *default_text; /* "" when there is no default */
    char rule[128];           /* what a value must look like, for people */
    char value[256];          /* the value in force, "" when none */
    bool set;                 /* the variable is in the environment */
    bool valid;               /* false: it is set and malformed, so the default is in force */
};

/*
 * Reads the knobs that are looked at for the rest of the process's life (EP_LOG,
 * EP_TEST_ALLOC_FAIL), once; what creates a group or a world calls it on its caller's thread. All
 * others are read by the caller's create, and nothing reads the environment later or on a thread of
 * this library: the program may be changing it there.
 */
void epi_opt_begin(void);

/* A copy of all variables that are read here, for threads that do a part of the caller's create: such
 * a thread uses it, until it uses NULL, instead of the environment. NULL: no memory; epi_free it. */
struct epi_environment *epi_environment_copy(void);
void epi_environment_use(const struct epi_environment *e);

/* Read the environment on every call. A malformed value is replaced by the default and logged
 * once per value. epi_opt_int is for INT and CHOICE (index). In a program with rights that its user
 * has not (setuid, file capabilities) the environment counts as empty. */
int64_t epi_opt_int(enum epi_opt opt);
const char *epi_opt_str(enum epi_opt opt); /* NULL when unset and without a default */
/* It is set, but malformed: for those that cannot do without what was meant. */
bool epi_opt_is_malformed(enum epi_opt opt);

/* For `ep env`. The result belongs to the calling thread and lasts until its next call;
 * NULL when `index` is out of range. */
size_t epi_opt_count(void);
const struct epi_opt_info *epi_opt_info(size_t index);
/* The same of the variables that are not ours; they have no default and no rule. */
const struct epi_opt_info *epi_foreign_info(size_t index);

/* A whole text as a number of that base in min..max; false, and *out as it was: it is none. */
bool epi_parse_int(const char *text, int base, int64_t min, int64_t max, int64_t *out);

/* A variable that is not ours: one of those listed in opt.c (of launchers, of CUDA, HOME). NULL when
 * it is unset or empty; the log says so when it is not listed. */
const char *epi_env(const char *name);

/* ---- time.c ------------------------------------------------------------------------------ */

#define EPI_NS_PER_US INT64_C(1000)
#define EPI_NS_PER_MS INT64_C(1000000)
#define EPI_NS_PER_S INT64_C(1000000000)

struct epi_deadline {
    int64_t
        at_ns; /* on a clock that stands still while the process is stopped; INT64_MAX: never */
};

int64_t epi_now_ns(void);
int64_t epi_ran_ns(void);                           /* the clock of deadlines */
struct epi_deadline epi_deadline_after(int64_t ns); /* saturates; negative is already expired */
struct epi_deadline epi_deadline_never(void);
struct epi_deadline epi_deadline_min(struct epi_deadline a, struct epi_deadline b);
bool epi_deadline_expired(struct epi_deadline d);
int64_t epi_deadline_left_ns(struct epi_deadline d); /* >= 0 */
/* For poll: at most a tenth of a second, unless it is never (INT_MAX): look again then. Rounded up. */
int epi_deadline_left_ms(struct epi_deadline d);
void epi_sleep_ns(int64_t ns); /* the whole time, whatever signals come */

/* A condition variable for epi_cond_wait. 0 or errno. */
int epi_cond_init(pthread_cond_t *cond);
/* False when the deadline has passed; may wake early, as condition variables do. */
bool epi_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, struct epi_deadline d);

/* ---- hash.c ------------------------------------------------------------------------------ */

#define EPI_HASH_BEGIN UINT64_C(0xcbf29ce484222325)

/* Goes on with a hash, so that data can be hashed in pieces; EPI_HASH_BEGIN is that of no bytes. */
uint64_t epi_hash(uint64_t hash, const void *data, size_t bytes);

/* ---- host.c ------------------------------------------------------------------------------ */

/* What says that two processes may share a host: kernel boot and network namespace. A hint that
 * saves waiting; the proof is the descriptor that arrives. */
struct epi_host_hint {
    uint64_t boot;
    uint64_t net_inode;
};
void epi_host_hint(struct epi_host_hint *out);

/* ---- sha256.c ---------------------------------------------------------------------------- */

#define EPI_SHA256_BYTES 32

struct epi_sha256 {
    uint32_t state[8];
    uint64_t num_bytes; /* added so far */
    uint8_t block[64];  /* the last num_bytes % 64 of them */
};

struct epi_hmac {
    struct epi_sha256 inner, outer;
};

/* Data is added in pieces of any size; after the end the state must be begun anew. */
void epi_sha256_begin(struct epi_sha256 *s);
void epi_sha256_add(struct epi_sha256 *s, const void *data, size_t bytes);
void epi_sha256_end(struct epi_sha256 *s, uint8_t out[EPI_SHA256_BYTES]);

/* HMAC-SHA-256: who does not hold the key can neither make nor check it. */
void epi_hmac_begin(struct epi_hmac *h, const void *key, size_t key_bytes);
void epi_hmac_add(struct epi_hmac *h, const void *data, size_t bytes);
void epi_hmac_end(struct epi_hmac *h, uint8_t out[EPI_SHA256_BYTES]);

/* Bytes that nobody can guess. False, and errno: the system has none. */
bool epi_random(void *out, size_t bytes);

/* Whether both are equal, in a time that does not tell how far they are. */
bool epi_same_bytes(const void *a, const void *b, size_t bytes);

/* ---- alloc.c ----------------------------------------------------------------------------- */

/* Zeroed, 64-byte aligned; NULL on failure, which the caller reports. 0 bytes is a valid,
 * unique allocation. */
void *epi_alloc(size_t bytes);
void *epi_alloc_array(size_t num, size_t item_bytes); /* NULL also when the product overflows */
void epi_free(void *p);                               /* NULL is fine */

/* Counts one allocation and says whether EP_TEST_ALLOC_FAIL wants it to fail. epi_alloc asks
 * by itself; call it before mmap, memfd_create, socket and the like. */
bool epi_alloc_should_fail(void);
void epi_alloc_fail_at(
    uint64_t nth);              /* as EP_TEST_ALLOC_FAIL, which is read once; 0: none does */
uint64_t epi_alloc_count(void); /* allocations asked for so far, the injected one included */
int64_t epi_alloc_live(void);   /* epi_alloc'ed and not yet freed */

/* Why the calling thread's last epi_alloc had no memory, to end a sentence with; or "". */
const char *epi_alloc_why(void);

/* ---- room.c ------------------------------------------------------------------------------ */

/* What this process can still take, without swapping, and what it is that leaves no more: a limit's
 * name, to go on with "are left by". INT64_MAX: nothing is known that would bound it. */
struct epi_room {
    int64_t bytes;
    char limit[192];
    bool exact; /* it bounds this process alone */
};
/* Own memory; memory of a memfd; and its length, whatever memory is behind it. */
enum epi_room_kind { EPI_ROOM_PRIVATE, EPI_ROOM_SHARED, EPI_ROOM_LENGTH };
void epi_room(enum epi_room_kind kind, struct epi_room *out);
/* The same with the files of `root`/proc and `root`/sys. */
void epi_room_below(const char *root, enum epi_room_kind kind, struct epi_room *out);

/* Who takes much asks for the whole before, and then for the rest after each step: others take, too,
 * and memory that is not there shows when it is touched, by a kill. */
bool epi_room_has(enum epi_room_kind kind, uint64_t bytes, struct epi_room *room);
uint64_t epi_room_step(const struct epi_room *room); /* bytes until one has to ask again */

/* ---- procfs.c ---------------------------------------------------------------------------- */

/* The beginning of a file, up to bytes - 1 of it, and a 0; how many. 0 and "" when there is none. */
size_t epi_read_text(const char *path, char *out, size_t bytes);

struct epi_process {
    int pid, parent, group, session;
    char state;               /* 'Z': has ended */
    unsigned long long start; /* ticks since boot: no two processes have number and start */
    char name[20];
};

/* False: it is not there, or cannot be seen. */
bool epi_process_see(int pid, struct epi_process *out);

/* ---- fork.c ------------------------------------------------------------------------------ */

/* The number of this process, another one in each child of fork(): what an object remembers of
 * who made it. */
uint32_t epi_process(void);
/* Whether this process is not the one of that number, but was forked from it: locks may be held by
 * threads that are not here, and shared memory is not here. For operations: costs a load. */
bool epi_is_forked(uint32_t made_by);

/* For public functions: refuses what was made before fork(). */
#define EPI_NOT_FORKED(fn, what, made_by)                                                      \
    if (epi_is_forked(made_by)) {                                                              \
        return epi_fail(EP_ERR_STATE,                                                          \
                        "%s: the %s was made before fork(): it belongs to the "                \
                        "process that made it, which alone can use it",                        \
                        fn, what);                                                             \
    }

/*
 * Every descriptor is opened as epi_fd_begin(); fd = epi_fd_keep(socket(...)): above 2, so that
 * nobody takes it for stderr, and closed in children of fork(). Returns it or -errno. A descriptor
 * is closed by epi_fd_close, which sets it to -1; -1 is fine. No fork() falls between begin and
 * keep: what stands there must not block.
 */
void epi_fd_begin(void);
int epi_fd_keep(int fd);
void epi_fd_close(int *fd);

/* Maps shared memory, which a child of fork() then has not: it cannot write into it, nor keep it
 * alive. NULL, and errno, on failure; a child must not unmap it. */
void *epi_map_shared(int fd, size_t bytes);

/* ---- thread.c ---------------------------------------------------------------------------- */

/* 0 or an errno value. The new thread takes no asynchronous signals: those are the caller's
 * threads' business. `name` is cut to 15 characters. Asks epi_alloc_should_fail. */
int epi_thread_start(pthread_t *thread, void *(*run)(void *), void *arg, const char *name);

/* ---- exchange.c -------------------------------------------------------------------------- */

/* How a layer that is not told about src/boot gathers small data from all ranks: the group hands
 * it this. Collective; `out` is [num_ranks][bytes]. */
struct epi_exchange {
    ep_status (*allgather)(void *ctx, const void *in, size_t bytes, void *out);
    void *ctx;
    int rank, num_ranks;
};

/*
 * Ends a step that ranks take each for itself: `mine` is how it went here, with its text in
 * epi_error_text(). Returns EP_OK when it went well everywhere, `mine` where it did not, and on
 * the other ranks EP_ERR_PEER (or the first rank's status where that says more) naming it.
 */
ep_status epi_agree(const struct epi_exchange *x, ep_status mine, const char *step);

/*
 * As epi_agree, for a step that can be done without: where nothing worse than EP_ERR_UNSUPPORTED
 * happened, every rank returns that, with the text of the first rank it happened to. No rank
 * returns EP_ERR_UNSUPPORTED unless all do.
 */
/* With the status of the rank that failed on all of them. */
ep_status epi_agree_alike(const struct epi_exchange *x, ep_status mine, const char *step);
ep_status epi_agree_optional(const struct epi_exchange *x, ep_status mine, const char *step);

#endif
