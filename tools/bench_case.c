/* SPDX-License-Identifier: MIT */
/*
 * One case of `ep bench` as the parent sees it: whether it fits, which GPUs the ranks get,
 * what the link can do before and after, and what the samples of all ranks come to.
 *
 * Owns the case's memory, which the ranks share. Must not open the driver: it forks the ranks.
 */
#include <stdlib.h>

#include "tools/bench.h"

#define QUIET_SECONDS 30
#define QUIET_SECONDS_CUDA 180 /* kernels may have to be compiled first */

EPI_PRINTF(3, 4)
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

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

int64_t bench_most_rows(const struct bench_case *c, int64_t rank) {
    int64_t most = c->p.ll; /* which has its own outputs, and a row of these to check them */
    for (int i = 0; !c->p.ll && i < c->num_items; i++) {
        most = larger(most, bench_output_rows(c, rank, c->items[i].expanded));
    }
    return most;
}

void bench_config(const struct bench_case *c, struct ep_group_config *config) {
    const struct bench_params *p = &c->p;
    config->num_ranks = (int32_t)p->ranks;
    config->num_experts = (int32_t)p->experts;
    const int32_t most = (int32_t)larger(p->max_tokens, p->tokens);
    config->max_tokens = p->ll ? 1 : most;
    config->ll_max_tokens = p->ll ? most : 0;
    config->max_topk = (int32_t)p->topk;
    config->max_row_bytes = (int32_t)c->row_bytes;
    config->max_scale_bytes = (int32_t)c->scale_bytes;
    config->num_workers = (int32_t)p->workers;
    config->device = p->device == BENCH_CUDA ? EP_DEVICE_CUDA : EP_DEVICE_HOST;
    bool view = p->device == BENCH_HOST && p->expanded && !p->memory_only;
    config->flags = p->ll ? EP_GROUP_LL_EXACT : view ? EP_GROUP_EXPANDED_VIEW : 0;
    config->max_expanded_rows = view; /* 0 would be the worst case */
    for (int r = 0; r < p->ranks && view; r++) {
        config->max_expanded_rows =
            (int32_t)larger(config->max_expanded_rows, bench_output_rows(c, r, true));
    }
}

/* ---- before anything is allocated ---------------------------------------------------------- */

/* -1, or 1 after a complaint. */
static int choose_devices(struct bench_case *c, const struct gpu_look *look, bool quiet) {
    struct bench_gpus *gpus = &c->gpus;
    if (look->why[0] != '\0') {
        return refuse(c, quiet, "--device cuda: %s", look->why);
    }
    gpus->num_devices = c->p.ranks < look->num ? (int)c->p.ranks : look->num;
    gpus->driver_version = look->driver_version;
    gpus->all_reach = true;
    for (int r = 0; r < c->p.ranks; r++) {
        gpus->device[r] = gpu_of_rank(look, r);
    }
    for (int i = 0; i < gpus->num_devices; i++) {
        if (look->device[i].why[0] != '\0') {
            return refuse(c, quiet, "GPU %d: %s", i, look->device[i].why);
        }
        for (int j = 0; j < gpus->num_devices; j++) {
            gpus->all_reach = gpus->all_reach && look->reaches[i][j];
        }
    }
    gpu_describe(look, gpus->num_devices, gpus->devices, sizeof(gpus->devices));
    return -1;
}

/* Ids and samples, which are here once. */
static int64_t shared_bytes(const struct bench_case *c) {
    const struct bench_params *p = &c->p;
    return p->ranks * p->tokens * p->topk * (int64_t)sizeof(*c->ids) +
           c->num_items * BENCH_NUM_MODES * p->iters * p->ranks * (int64_t)sizeof(*c->samples);
}

/* The plan and the ranks' own buffers, on GPUs and here. Before there is a routing: without what is
 * received. `look` is
 * NULL for host ranks. */
static int refuse_memory(struct bench_case *c, const struct gpu_look *look, bool quiet) {
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    struct epi_room room;
    epi_room(EPI_ROOM_SHARED, &room);
    const int64_t have = room.bytes;
    int64_t on_device[GPU_MAX] = {0}, here = shared_bytes(c);
    bench_config(c, &config);
    ep_status st = ep_plan(&config, &plan);
    if (st != EP_OK) {
        return refuse(c, quiet, "ep_plan: %s: %s", ep_status_string(st), ep_last_error());
    }
    for (int r = 0; r < c->p.ranks; r++) {
        int64_t own = (2 * c->p.tokens + bench_most_rows(c, r)) *
                      (c->row_bytes + c->scale_bytes + 8 * c->p.topk);
        int64_t all = own + plan.arena_bytes + plan.local_bytes + plan.handle_bytes;
        all += c->p.ll ? bench_ll_bytes(&c->p, r) + plan.ll_handle_bytes : 0;
        on_device[look ? c->gpus.device[r] : 0] += all;
        here += look && c->p.no_check ? 0 : look ? own : all;
    }
    for (int i = 0; look && i < c->gpus.num_devices; i++) {
        if (on_device[i] > look->device[i].memory_bytes) {
            return refuse(c, quiet,
                          "this needs %s of GPU %d, which has %s; lower --tokens, --hidden or "
                          "--ranks",
                          text_bytes((double)on_device[i]).s, i,
                          text_bytes((double)look->device[i].memory_bytes).s);
        }
    }
    if (here > have && look) {
        return refuse(c, quiet,
                      "checking needs %s of host memory and %s are left by %s; lower --tokens "
                      "or --hidden, or give --no-check",
                      text_bytes((double)here).s, text_bytes((double)have).s, room.limit);
    }
    if (here > have) {
        return refuse(c, quiet,
                      "this needs %s of memory and %s are left by %s; lower --tokens, "
                      "--hidden or --ranks",
                      text_bytes((double)here).s, text_bytes((double)have).s, room.limit);
    }
    return -1;
}

static void count_crossing(struct bench_case *c) {
    int64_t in[GPU_MAX] = {0}, out[GPU_MAX] = {0};
    const int *device = c->gpus.device;
    for (int i = 0; i < c->p.ranks; i++) {
        for (int j = 0; j < c->p.ranks; j++) {
            if (device[i] != device[j]) {
                out[device[i]] += c->traffic[i][j];
                in[device[j]] += c->traffic[i][j];
            }
        }
    }
    for (int i = 0; i < GPU_MAX; i++) {
        c->gpus.crossed_rows = larger(c->gpus.crossed_rows, larger(in[i], out[i]));
    }
}

/* Keeps the better figures; returns the faster of the two patterns. */
static double measure_link(struct bench_case *c) {
    struct bench_gpus *gpus = &c->gpus;
    struct gpu_links links;
    if (!gpu_measure_links("ep bench", gpus->num_devices, false, &links)) {
        snprintf(gpus->links_why, sizeof(gpus->links_why), "%s", links.why);
        return 0;
    }
    gpus->in_turn = links.in_turn > gpus->in_turn ? links.in_turn : gpus->in_turn;
    gpus->at_once = links.at_once > gpus->at_once ? links.at_once : gpus->at_once;
    gpus->local = links.local > gpus->local ? links.local : gpus->local;
    return links.in_turn > links.at_once ? links.in_turn : links.at_once;
}

/* ---- samples ------------------------------------------------------------------------------- */

/* How long an iteration took, and how far apart its ranks began. Of the whole: where ranks
 * share a core, the one that has to wait for its turn would otherwise seem to be fast. */
static int64_t iteration_ns(const struct bench_case *c, const struct bench_sample *s,
                            int64_t *skew_ns) {
    int64_t first = s->start_ns, last = s->start_ns, end = 0, slowest = 0;
    for (int64_t r = 0; r < c->p.ranks; r++, s++) {
        first = s->start_ns < first ? s->start_ns : first;
        last = larger(last, s->start_ns);
        end = larger(end, s->start_ns + s->ns);
        slowest = larger(slowest, s->ns);
    }
    *skew_ns = last - first;
    return c->clock->whole ? end - first : slowest;
}

static bool reduce(struct bench_case *c) {
    int iters = (int)c->p.iters, num_skews = 0;
    int64_t *ns = malloc((size_t)iters * sizeof(*ns));
    int64_t *skews = malloc((size_t)(c->num_items * BENCH_NUM_MODES * iters) * sizeof(*skews));
    bool done = ns && skews;
    for (int i = 0; done && i < c->num_items * BENCH_NUM_MODES; i++) {
        int item = i / BENCH_NUM_MODES, mode = i % BENCH_NUM_MODES;
        if (mode >= (c->p.no_graph ? 1 : c->clock->num_modes)) {
            continue;
        }
        for (int k = 0; k < iters; k++) {
            ns[k] = iteration_ns(c, bench_samples(c, item, mode, k), &skews[num_skews++]);
            ns[k] /= larger(c->items[item].op->chain, 1);
        }
        c->result[item][mode] = (struct bench_result){.p50_ns = tool_quantile(ns, iters, 0.50),
                                                      .p99_ns = tool_quantile(ns, iters, 0.99),
                                                      .max_ns = tool_quantile(ns, iters, 1)};
    }
    if (done) {
        c->gpus.skew_p50_ns = tool_quantile(skews, num_skews, 0.50);
        c->gpus.skew_p99_ns = tool_quantile(skews, num_skews, 0.99);
        c->gpus.skew_max_ns = tool_quantile(skews, num_skews, 1);
    }
    free(ns);
    free(skews);
    /* What is measured first and last counts once, the faster. */
    struct bench_result *first = &c->result[0][0], *again = &c->result[c->num_items - 1][0];
    if (c->items[0].op == c->items[c->num_items - 1].op) {
        *first = again->p50_ns < first->p50_ns ? *again : *first;
        *again = (struct bench_result){0};
    }
    return done;
}

/* ---- everything ---------------------------------------------------------------------------- */

static int run_ranks(struct bench_case *c, bool quiet) {
    bool cuda = c->p.device == BENCH_CUDA;
    struct ranks_job job = {.name = "ep bench",
                            .num_ranks = (int)c->p.ranks,
                            .threads = c->p.threads,
                            .quiet = quiet,
                            .fn = bench_rank,
                            .arg = c};
    if (quiet) {
        job.timeout_s = cuda ? QUIET_SECONDS_CUDA : QUIET_SECONDS;
    }
    if (cuda && c->p.threads) { /* ranks that share a GPU: see "CUDA groups" in ep.h */
        setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    }
    c->gpus.first = cuda && !quiet ? measure_link(c) : 0;
    int status = ranks_run(&job);
    snprintf(c->why, sizeof(c->why), "%s", job.why);
    if (status != 0) {
        return status;
    }
    c->gpus.last = cuda && !quiet ? measure_link(c) : 0;
    return reduce(c) ? 0 : refuse(c, quiet, "no memory for the samples");
}

/* Whatever depends on the parameters alone. */
static void set_up(struct bench_case *c, const struct bench_params *p) {
    c->p = *p;
    c->clock = &bench_clocks[p->device];
    c->num_items = bench_items(p, c->items);
    for (int i = 0; i < c->num_items; i++) {
        c->row_bytes = larger(c->row_bytes, bench_row_bytes(p, c->items[i].dtype));
        c->scale_bytes = larger(c->scale_bytes, bench_scale_bytes(p, c->items[i].dtype));
    }
    int64_t pass_bytes = 2 * p->tokens * bench_row_bytes(p, c->items[0].dtype);
    c->memcpy_bytes = pass_bytes * larger(((int64_t)32 << 20) / pass_bytes, 1);
}

int bench_case(const struct bench_params *p, bool quiet, struct bench_case **out) {
    const struct gpu_look *look = p->device == BENCH_CUDA ? gpu_look("ep bench") : NULL;
    struct bench_case *c = ranks_memory(sizeof(*c));
    if (!c) {
        fprintf(stderr, "ep bench: no memory\n");
        return 1;
    }
    *out = c;
    set_up(c, p);
    int status = look ? choose_devices(c, look, quiet) : -1;
    status = status < 0 ? refuse_memory(c, look, quiet) : status;
    if (status >= 0) {
        return status;
    }
    const size_t num_ids = (size_t)(p->ranks * p->tokens * p->topk);
    const size_t num = (size_t)(c->num_items * BENCH_NUM_MODES * p->iters * p->ranks);
    c->ids = ranks_memory(num_ids * sizeof(*c->ids));
    c->samples = ranks_memory(num * sizeof(*c->samples));
    if (!c->ids || !c->samples) {
        return refuse(c, quiet, "no memory for the ids and the samples");
    }
    status = bench_routing(c);
    if (status != 0) {
        return status;
    }
    status = refuse_memory(c, look, quiet);
    count_crossing(c);
    return status < 0 ? run_ranks(c, quiet) : status;
}
