/* SPDX-License-Identifier: MIT */
/*
 * How fast rows can cross between GPUs: what the copy engines reach, all GPUs at once or a pair
 * alone. This is the limit that `ep bench` and `ep doctor` print.
 *
 * Owns buffers and streams on every GPU, in a child process that ends with the measurement.
 * All streams are held back until all copies are queued, and are released by one store, so that
 * neither launches nor a late GPU are measured.
 */
#include "tools/gpu.h"

#include "src/cu/cu.h"

#define BUFFER_BYTES ((int64_t)128 << 20) /* of each GPU, to send and to receive */
#define LINKS_SECONDS 120

enum { ROUNDS = 4, REPEATS = 6, SMALL_REPEATS = 21, SMALL_BYTES = 8 };

struct rig {
    struct gpu_links *out;
    int num;
    struct epi_cu_device device[GPU_MAX];
    uint64_t from[GPU_MAX], to[GPU_MAX];
    /* Of device i: [i][0] begins and ends; [i][k] sends to device i + k when all go at once. */
    void *stream[GPU_MAX][GPU_MAX];
    void *begin[GPU_MAX], *end[GPU_MAX], *done[GPU_MAX][GPU_MAX];
    uint32_t *word; /* pinned */
    uint32_t held;
};

/* The k-th other GPU of i; at any time each receives from one only. */
static int other(const struct rig *rig, int i, int k) {
    return (i + k) % rig->num;
}

static ep_status open_device(struct rig *rig, int i) {
    struct epi_cu_device *d = &rig->device[i];
    EPI_TRY(epi_cu_device_open(d, i));
    EPI_TRY(epi_cu_alloc(d, &rig->from[i], (size_t)BUFFER_BYTES));
    EPI_TRY(epi_cu_alloc(d, &rig->to[i], (size_t)BUFFER_BYTES));
    EPI_TRY(epi_cu_event_create(d, &rig->begin[i]));
    EPI_TRY(epi_cu_event_create(d, &rig->end[i]));
    for (int k = 0; k < rig->num; k++) {
        EPI_TRY(epi_cu_stream_create(d, &rig->stream[i][k]));
        EPI_TRY(epi_cu_event_create(d, &rig->done[i][k]));
    }
    EPI_TRY(epi_cu_fill(d, rig->stream[i][0], rig->from[i], i + 1, (size_t)BUFFER_BYTES));
    return epi_cu_stream_sync(d, rig->stream[i][0]);
}

static ep_status open_all(struct rig *rig) {
    void *word = NULL;
    for (int i = 0; i < rig->num; i++) {
        EPI_TRY(open_device(rig, i));
    }
    for (int i = 0; i < rig->num * rig->num; i++) {
        int from = i / rig->num, to = i % rig->num;
        if (from != to) { /* without a path the driver copies through the host */
            epi_cu_peer(&rig->device[from], &rig->device[to]);
        }
    }
    EPI_TRY(epi_cu_alloc_host(&rig->device[0], &word, sizeof(*rig->word)));
    rig->word = word;
    *rig->word = 0;
    return EP_OK;
}

/* ---- what is timed ------------------------------------------------------------------------ */

enum pattern { IN_TURN, AT_ONCE, PAIR, SMALL };

struct task {
    enum pattern pattern;
    int from, to; /* PAIR, SMALL: the only one that sends; else all do */
};

static ep_status queue_all(struct rig *rig, int i, bool at_once) {
    const struct epi_cu_device *d = &rig->device[i];
    int64_t part = BUFFER_BYTES / (rig->num - 1) / 16 * 16;
    for (int k = 1; k < rig->num && at_once; k++) {
        EPI_TRY(epi_cu_event_wait(d, rig->stream[i][k], rig->begin[i]));
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int k = 1; k < rig->num; k++) {
            uint64_t at = (uint64_t)(part * (k - 1));
            EPI_TRY(epi_cu_copy(d, rig->stream[i][at_once ? k : 0],
                                rig->to[other(rig, i, k)] + at, rig->from[i] + at,
                                (size_t)part));
        }
    }
    for (int k = 1; k < rig->num && at_once; k++) {
        EPI_TRY(epi_cu_event_record(d, rig->done[i][k], rig->stream[i][k]));
        EPI_TRY(epi_cu_event_wait(d, rig->stream[i][0], rig->done[i][k]));
    }
    return EP_OK;
}

static ep_status queue_pair(struct rig *rig, const struct task *task) {
    const struct epi_cu_device *d = &rig->device[task->from];
    bool small = task->pattern == SMALL;
    for (int round = 0; round < (small ? 1 : ROUNDS); round++) {
        EPI_TRY(epi_cu_copy(d, rig->stream[task->from][0], rig->to[task->to],
                            rig->from[task->from],
                            (size_t)(small ? SMALL_BYTES : BUFFER_BYTES)));
    }
    return EP_OK;
}

static bool takes_part(const struct task *task, int i) {
    return task->pattern == IN_TURN || task->pattern == AT_ONCE || i == task->from;
}

static ep_status queue(struct rig *rig, const struct task *task, int i) {
    const struct epi_cu_device *d = &rig->device[i];
    epi_cu_stream_hold(d, rig->stream[i][0], rig->word, rig->held + 1);
    EPI_TRY(epi_cu_event_record(d, rig->begin[i], rig->stream[i][0]));
    if (task->pattern == PAIR || task->pattern == SMALL) {
        EPI_TRY(queue_pair(rig, task));
    } else {
        EPI_TRY(queue_all(rig, i, task->pattern == AT_ONCE));
    }
    return epi_cu_event_record(d, rig->end[i], rig->stream[i][0]);
}

/* Once: *us is the time of the slowest GPU. */
static ep_status run(struct rig *rig, const struct task *task, double *us) {
    ep_status st = EP_OK;
    *us = 0;
    for (int i = 0; i < rig->num && st == EP_OK; i++) {
        st = takes_part(task, i) ? queue(rig, task, i) : EP_OK;
    }
    rig->held++;
    atomic_store((_Atomic uint32_t *)rig->word, rig->held);
    for (int i = 0; i < rig->num && st == EP_OK; i++) {
        double mine = 0;
        if (takes_part(task, i)) {
            EPI_TRY(epi_cu_stream_sync(&rig->device[i], rig->stream[i][0]));
            EPI_TRY(epi_cu_event_elapsed(&rig->device[i], rig->begin[i], rig->end[i], &mine));
            *us = mine > *us ? mine : *us;
        }
    }
    return st;
}

/* The fastest of several, after one that does not count. */
static ep_status fastest_rate(struct rig *rig, struct task task, int64_t bytes, double *rate) {
    for (int i = 0; i < REPEATS; i++) {
        double us = 0;
        EPI_TRY(run(rig, &task, &us));
        double now = us > 0 ? (double)(ROUNDS * bytes) / (us * 1000) : 0;
        *rate = i > 0 && now > *rate ? now : *rate;
    }
    return EP_OK;
}

static ep_status median_small(struct rig *rig, struct task task, double *median) {
    int64_t ns[SMALL_REPEATS];
    for (int i = 0; i < SMALL_REPEATS; i++) {
        double us = 0;
        EPI_TRY(run(rig, &task, &us));
        ns[i] = (int64_t)(us * 1000);
    }
    *median = (double)tool_quantile(ns, SMALL_REPEATS, 0.5) / 1000;
    return EP_OK;
}

static ep_status measure(struct rig *rig, bool pairs) {
    struct gpu_links *out = rig->out;
    int64_t sent = BUFFER_BYTES / (rig->num - 1) / 16 * 16 * (rig->num - 1);
    EPI_TRY(fastest_rate(rig, (struct task){.pattern = IN_TURN}, sent, &out->in_turn));
    const struct task local = {PAIR, 0, 0};
    EPI_TRY(fastest_rate(rig, local, 2 * BUFFER_BYTES, &out->local));
    if (rig->num > 2) { /* two have no order to choose */
        EPI_TRY(fastest_rate(rig, (struct task){.pattern = AT_ONCE}, sent, &out->at_once));
    }
    for (int i = 0; i < rig->num * rig->num && pairs; i++) {
        int from = i / rig->num, to = i % rig->num;
        if (from != to) {
            struct task pair = {PAIR, from, to}, small = {SMALL, from, to};
            EPI_TRY(fastest_rate(rig, pair, BUFFER_BYTES, &out->rate[from][to]));
            EPI_TRY(median_small(rig, small, &out->small_us[from][to]));
        }
    }
    return EP_OK;
}

/* ---- the child ----------------------------------------------------------------------------- */

struct request {
    struct gpu_links links;
    bool pairs;
};

static int links_child(struct rank *rank, void *arg) {
    static struct rig rig; /* large; what it holds goes with the process */
    struct request *request = arg;
    (void)rank;
    rig.out = &request->links;
    rig.num = request->links.num;
    ep_status st = open_all(&rig);
    st = st == EP_OK ? measure(&rig, request->pairs) : st;
    if (st != EP_OK) {
        snprintf(request->links.why, sizeof(request->links.why), "%.400s", ep_last_error());
    }
    return 0;
}

bool gpu_measure_links(const char *name, int num, bool pairs, struct gpu_links *out) {
    struct request *request = ranks_memory(sizeof(*request));
    *out = (struct gpu_links){.num = num};
    if (!request || num < 2 || num > GPU_MAX) {
        snprintf(out->why, sizeof(out->why), "%s",
                 !request ? "no memory" : "there is no other GPU");
        return false;
    }
    request->links.num = num;
    request->pairs = pairs;
    struct ranks_job job = {.name = name,
                            .num_ranks = 1,
                            .quiet = true,
                            .timeout_s = LINKS_SECONDS,
                            .fn = links_child,
                            .arg = request};
    int status = ranks_run(&job);
    *out = request->links;
    if (status != 0 && out->why[0] == '\0') {
        snprintf(out->why, sizeof(out->why), "%.400s", job.why);
    }
    return out->why[0] == '\0';
}
