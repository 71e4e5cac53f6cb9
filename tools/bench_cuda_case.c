/* SPDX-License-Identifier: MIT */
/*
 * A case of `ep bench --device cuda` as the parent sees it: which GPUs the ranks get, whether it
 * fits, what the link can do before and after, and what the samples say.
 *
 * Owns the memory of the samples. Must not open the driver: it forks the ranks.
 */
#include <stdlib.h>
#include <sys/mman.h>

#include "tools/bench.h"
#include "tools/gpu.h"

#define QUIET_SECONDS 180 /* kernels may have to be compiled first */

static int refuse(struct bench_case *c, bool quiet, const char *fmt, ...) EPI_PRINTF(3, 4);
static int refuse(struct bench_case *c, bool quiet, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(c->why, sizeof(c->why), fmt, args);
    va_end(args);
    if (!quiet) {
        fprintf(stderr, "ep bench: %s\n", c->why);
    }
    return 1;
}

/* -1, or 1 after a complaint. */
static int choose_devices(struct bench_case *c, const struct gpu_look *look, bool quiet) {
    struct bench_cuda *cuda = c->cuda;
    if (look->why[0] != '\0') {
        return refuse(c, quiet, "--device cuda: %s", look->why);
    }
    cuda->num_devices = c->p.ranks < look->num ? (int)c->p.ranks : look->num;
    cuda->driver_version = look->driver_version;
    cuda->all_reach = true;
    for (int r = 0; r < c->p.ranks; r++) {
        cuda->device[r] = gpu_of_rank(look, r);
    }
    for (int i = 0; i < cuda->num_devices; i++) {
        if (look->device[i].why[0] != '\0') {
            return refuse(c, quiet, "GPU %d: %s", i, look->device[i].why);
        }
        for (int j = 0; j < cuda->num_devices; j++) {
            cuda->all_reach = cuda->all_reach && look->reaches[i][j];
        }
    }
    gpu_describe(look, cuda->num_devices, cuda->devices, sizeof(cuda->devices));
    return -1;
}

/* Before anything is allocated: the plan and the ranks' own buffers, on GPUs and here. */
static int refuse_memory(struct bench_case *c, const struct gpu_look *look, bool quiet) {
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    int64_t on_device[GPU_MAX] = {0};
    int64_t here = 0;
    bench_config(c, &config);
    ep_status st = ep_plan(&config, &plan);
    if (st != EP_OK) {
        return refuse(c, quiet, "ep_plan: %s: %s", ep_status_string(st), ep_last_error());
    }
    for (int r = 0; r < c->p.ranks; r++) {
        int64_t rows = c->received_rows[r];
        if (cuda_expands(&c->p) && c->selected_rows[r] > rows) {
            rows = c->selected_rows[r];
        }
        int64_t own = (2 * c->p.tokens + rows) * (c->answer_bytes + c->scale_bytes + 64);
        on_device[c->cuda->device[r]] +=
            own + plan.arena_bytes + plan.local_bytes + plan.handle_bytes;
        here += c->p.no_check ? 0 : own;
    }
    for (int i = 0; i < c->cuda->num_devices; i++) {
        if (on_device[i] > look->device[i].memory_bytes) {
            return refuse(c, quiet,
                          "this needs %s of GPU %d, which has %s; lower --tokens, --hidden or "
                          "--ranks",
                          text_bytes((double)on_device[i]).s, i,
                          text_bytes((double)look->device[i].memory_bytes).s);
        }
    }
    if (free_memory_bytes() > 0 && here > free_memory_bytes()) {
        return refuse(c, quiet,
                      "checking needs %s of host memory and %s are free; lower --tokens or "
                      "--hidden, or give --no-check",
                      text_bytes((double)here).s, text_bytes((double)free_memory_bytes()).s);
    }
    return -1;
}

static void count_crossing(struct bench_case *c) {
    int64_t in[GPU_MAX] = {0}, out[GPU_MAX] = {0};
    const int *device = c->cuda->device;
    for (int i = 0; i < c->p.ranks; i++) {
        for (int j = 0; j < c->p.ranks; j++) {
            if (device[i] != device[j]) {
                out[device[i]] += c->traffic[i][j];
                in[device[j]] += c->traffic[i][j];
            }
        }
    }
    for (int i = 0; i < GPU_MAX; i++) {
        int64_t most = in[i] > out[i] ? in[i] : out[i];
        c->cuda->crossed_rows = most > c->cuda->crossed_rows ? most : c->cuda->crossed_rows;
    }
}

/* Keeps the better figures; returns the faster of the two patterns. */
static double measure_link(struct bench_case *c) {
    struct bench_cuda *cuda = c->cuda;
    struct gpu_links links;
    if (!gpu_measure_links("ep bench", cuda->num_devices, false, &links)) {
        snprintf(cuda->links_why, sizeof(cuda->links_why), "%s", links.why);
        return 0;
    }
    cuda->in_turn = links.in_turn > cuda->in_turn ? links.in_turn : cuda->in_turn;
    cuda->at_once = links.at_once > cuda->at_once ? links.at_once : cuda->at_once;
    return links.in_turn > links.at_once ? links.in_turn : links.at_once;
}

/* ---- samples ----------------------------------------------------------------------------- */

/* An iteration lasts as long as its slowest rank. */
static int64_t slowest(const struct cuda_sample *s, int64_t ranks, int64_t *skew_ns) {
    int64_t ns = 0, first = s->released_ns, last = s->released_ns;
    for (int64_t r = 0; r < ranks; r++, s++) {
        ns = s->ns > ns ? s->ns : ns;
        first = s->released_ns < first ? s->released_ns : first;
        last = s->released_ns > last ? s->released_ns : last;
    }
    *skew_ns = last - first;
    return ns;
}

static bool reduce(struct bench_case *c) {
    struct bench_cuda *cuda = c->cuda;
    int64_t iters = c->p.iters;
    int num_skews = 0;
    int64_t *ns = malloc((size_t)iters * sizeof(*ns));
    int64_t *skews = malloc((size_t)(NUM_CUDA_OPS * NUM_MODES * iters) * sizeof(*skews));
    for (int op = 0; ns && skews && op < NUM_CUDA_OPS; op++) {
        for (int mode = 0; mode < NUM_MODES; mode++) {
            if (!cuda_measures(&c->p, op) || (mode == MODE_GRAPH && c->p.no_graph)) {
                continue;
            }
            for (int64_t i = 0; i < iters; i++) {
                ns[i] =
                    slowest(&cuda->samples[((op * NUM_MODES + mode) * iters + i) * c->p.ranks],
                            c->p.ranks, &skews[num_skews++]);
            }
            cuda->result[op][mode] =
                (struct cuda_result){.p50_ns = quantile(ns, (int)iters, 0.50),
                                     .p99_ns = quantile(ns, (int)iters, 0.99),
                                     .max_ns = quantile(ns, (int)iters, 1)};
        }
    }
    if (ns && skews) {
        cuda->skew_p50_ns = quantile(skews, num_skews, 0.50);
        cuda->skew_p99_ns = quantile(skews, num_skews, 0.99);
        cuda->skew_max_ns = quantile(skews, num_skews, 1);
    }
    bool done = ns && skews;
    free(ns);
    free(skews);
    return done;
}

int cuda_case(struct bench_case *c, bool quiet) {
    const struct gpu_look *look = gpu_look("ep bench");
    struct bench_cuda *cuda = ranks_memory(sizeof(*cuda));
    size_t num = (size_t)(NUM_CUDA_OPS * NUM_MODES * c->p.iters * c->p.ranks);
    if (!cuda || !(cuda->samples = ranks_memory(num * sizeof(*cuda->samples)))) {
        return refuse(c, quiet, "no memory for the samples");
    }
    c->cuda = cuda;
    int status = choose_devices(c, look, quiet);
    status = status < 0 ? refuse_memory(c, look, quiet) : status;
    if (status >= 0) {
        return status;
    }
    count_crossing(c);
    if (c->p.threads) { /* ranks that share a GPU: see "CUDA groups" in ep.h */
        setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    }
    cuda->first = quiet ? 0 : measure_link(c);
    struct ranks_job job = {.name = "ep bench",
                            .num_ranks = (int)c->p.ranks,
                            .threads = c->p.threads,
                            .quiet = quiet,
                            .timeout_s = quiet ? QUIET_SECONDS : 0,
                            .fn = cuda_rank,
                            .arg = c};
    status = ranks_run(&job);
    snprintf(c->why, sizeof(c->why), "%s", job.why);
    if (status != 0) {
        return status;
    }
    cuda->last = quiet ? 0 : measure_link(c);
    return reduce(c) ? 0 : refuse(c, quiet, "no memory for the samples");
}
