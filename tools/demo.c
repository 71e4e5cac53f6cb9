/* SPDX-License-Identifier: MIT */
/*
 * `ep demo`: a Mixture-of-Experts layer over real text, spread over processes, and checked.
 *
 * Owns the text, its rows and the memory in which the ranks leave their results. The parent
 * draws the bar, then computes the whole layer alone and compares. Each rank holds its experts
 * only. Answers are written over the received rows in the arena and sent from there: no copy.
 */
#include "tool.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "moe.h"

#define ROW_BYTES (MOE_HIDDEN * 2)
#define TOLERANCE 0.02 /* of the largest value, against float64 */

enum phase { ROUTER, ROUTE, DISPATCH, EXPERTS, COMBINE, NUM_PHASES };
static const char *const phase_names[NUM_PHASES] = {"router (arithmetic)", "route", "dispatch",
                                                    "experts (arithmetic)", "combine"};

struct rank_report {
    int64_t ns[NUM_PHASES];
    int64_t rows_remote;       /* rows sent to other ranks: one per token and rank */
    int64_t selections_remote; /* experts chosen on other ranks */
    int64_t selections_here;   /* rows this rank's experts computed */
    int64_t arena_bytes;
};

struct shared {
    _Atomic int64_t tokens_done;
    struct rank_report rank[EP_MAX_RANKS];
    int64_t expert_load[MOE_EXPERTS]; /* each written by the rank that holds the expert */
};

struct demo {
    int64_t num_ranks;
    int64_t num_tokens; /* 0: the whole text */
    int64_t batch;      /* tokens per rank and step */
    const char *file;
    uint16_t *x;   /* [tokens][hidden] */
    uint16_t *out; /* [tokens][hidden], shared */
    struct shared *shared;
    int64_t num_steps;
};

/* ---- the text ---------------------------------------------------------------------------- */

static char *read_text(const char *path, size_t *num_bytes) {
    FILE *file = fopen(path, "rb");
    size_t room = (size_t)4 << 20;
    char *text = file != NULL ? malloc(room) : NULL;
    *num_bytes = text != NULL ? fread(text, 1, room, file) : 0;
    if (file != NULL) {
        fclose(file);
    }
    return text;
}

/* The next word, number or punctuation mark as a hash; 0 at the end. */
static uint64_t next_word(const char *text, size_t num_bytes, size_t *at) {
    while (*at < num_bytes && isspace((unsigned char)text[*at])) {
        ++*at;
    }
    uint64_t hash = 0;
    size_t start = *at;
    while (*at < num_bytes && (*at == start || (isalnum((unsigned char)text[*at]) &&
                                                isalnum((unsigned char)text[start])))) {
        hash = rand_hash(hash + 1, (unsigned char)text[(*at)++]);
    }
    return hash;
}

/* Fills in x from the first file that can be read; a short text is read again. */
static bool load_text(struct demo *demo) {
    static const char *const files[] = {
        "/usr/share/common-licenses/GPL-3",  "/usr/share/common-licenses/Apache-2.0",
        "/usr/share/doc/base-files/README",  "/usr/share/doc/bash/copyright",
        "/usr/share/licenses/glibc/COPYING", "/usr/include/stdlib.h"};
    size_t num_bytes = 0;
    char *text = NULL;
    for (size_t i = 0; i < sizeof files / sizeof files[0] && num_bytes == 0; i++) {
        const char *path = demo->file != NULL ? demo->file : files[i];
        free(text);
        text = read_text(path, &num_bytes);
        if (num_bytes > 0 || demo->file != NULL) {
            demo->file = path;
            break;
        }
    }
    size_t at = 0;
    int64_t num_words = 0;
    while (next_word(text, num_bytes, &at) != 0) {
        num_words++;
    }
    if (num_words > 0) {
        demo->num_tokens = demo->num_tokens > 0 ? demo->num_tokens : num_words;
        demo->x = malloc((size_t)demo->num_tokens * ROW_BYTES);
    }
    uint64_t before = 0;
    at = 0;
    for (int64_t t = 0; demo->x != NULL && t < demo->num_tokens; t++) {
        uint64_t word = next_word(text, num_bytes, &at);
        if (word == 0) {
            at = 0;
            word = next_word(text, num_bytes, &at);
        }
        moe_embed(word, before, demo->x + t * MOE_HIDDEN);
        before = word;
    }
    free(text);
    return demo->x != NULL;
}

/* ---- a rank ------------------------------------------------------------------------------ */

struct worker {
    struct demo *demo;
    struct rank *rank;
    struct rank_report *report;
    struct moe moe;
    ep_group *group;
    ep_handle *handle;
    int32_t *ids;         /* [batch][topk] */
    float *weights;       /* [batch][topk] */
    uint16_t *shared_out; /* [batch][hidden] */
    float *recv_weights;  /* [max rows] */
    int64_t max_rows;
    int32_t offsets[MOE_EXPERTS + 1];
};

/* Adds the time since *from to a phase and moves *from on. */
static void lap(struct worker *w, enum phase phase, int64_t *from) {
    int64_t now_ns = epi_now_ns();
    w->report->ns[phase] += now_ns - *from;
    *from = now_ns;
}

static void count_remote(struct worker *w, int num) {
    for (int t = 0; t < num; t++) {
        uint64_t seen[EP_MAX_RANKS / 64] = {0};
        for (int k = 0; k < MOE_TOPK; k++) {
            int owner = expert_owner(w->ids[t * MOE_TOPK + k], MOE_EXPERTS, w->rank->num_ranks);
            if (owner != w->rank->rank) {
                w->report->selections_remote++;
                w->report->rows_remote += (seen[owner / 64] >> owner % 64 & 1) == 0;
                seen[owner / 64] |= UINT64_C(1) << owner % 64;
            }
        }
    }
}

static void compute_experts(struct worker *w, const struct ep_tensor *rows) {
    int32_t *offsets = w->offsets;
    for (int i = 0; i < w->moe.num; i++) {
        uint16_t *x = (uint16_t *)rows->data + (int64_t)offsets[i] * MOE_HIDDEN;
        int num = offsets[i + 1] - offsets[i];
        moe_expert(&w->moe, w->moe.first + i, x, num, x);
        w->demo->shared->expert_load[w->moe.first + i] += num;
        w->report->selections_here += num;
    }
}

static ep_status do_route(struct worker *w, int num) {
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_tensor ids;
    ep_tensor_2d(&ids, EP_I32, w->ids, num, MOE_TOPK);
    routing.topk_ids = &ids;
    return ep_handle_route(w->handle, &routing, NULL);
}

/* *rows becomes a view of the arena: this rank's rows, grouped by expert. */
static ep_status do_dispatch(struct worker *w, const uint16_t *x, int num,
                             struct ep_tensor *rows) {
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    struct ep_tensor rows_in, weights, recv_weights, offsets;
    ep_tensor_2d(&rows_in, EP_BF16, (void *)(uintptr_t)x, num, MOE_HIDDEN);
    ep_tensor_2d(&weights, EP_F32, w->weights, num, MOE_TOPK);
    ep_tensor_1d(&recv_weights, EP_F32, w->recv_weights, w->max_rows);
    ep_tensor_1d(&offsets, EP_I32, w->offsets, w->moe.num + 1);
    args.flags = EP_DISPATCH_EXPANDED | EP_DISPATCH_ARENA;
    args.x = &rows_in;
    args.topk_weights = &weights;
    args.recv_x = rows;
    args.recv_topk_weights = &recv_weights;
    args.expert_offsets = &offsets;
    return ep_dispatch(w->handle, &args, NULL);
}

/* out = shared expert + weighted sum of the answers, which lie where the rows were. */
static ep_status do_combine(struct worker *w, const struct ep_tensor *rows, uint16_t *out,
                            int num) {
    struct ep_combine_args args = EP_COMBINE_ARGS_INIT;
    struct ep_tensor weights, shared_out, result;
    ep_tensor_1d(&weights, EP_F32, w->recv_weights, rows->shape[0]);
    ep_tensor_2d(&shared_out, EP_BF16, w->shared_out, num, MOE_HIDDEN);
    ep_tensor_2d(&result, EP_BF16, out, num, MOE_HIDDEN);
    args.x = rows;
    args.weights = &weights;
    args.bias[0] = &shared_out;
    args.out = &result;
    return ep_combine(w->handle, &args, NULL);
}

/* One micro-batch: num tokens, which may be 0 here while other ranks have some left. */
static int step(struct worker *w, const uint16_t *x, uint16_t *out, int num) {
    struct ep_tensor rows = EP_TENSOR_INIT;
    int64_t from = epi_now_ns();
    moe_route(&w->moe, x, num, w->ids, w->weights);
    lap(w, ROUTER, &from);
    ep_status st = do_route(w, num);
    lap(w, ROUTE, &from);
    st = st == EP_OK ? do_dispatch(w, x, num, &rows) : st;
    lap(w, DISPATCH, &from);
    if (st != EP_OK) {
        return rank_fail(w->rank, st, "route and dispatch");
    }
    compute_experts(w, &rows);
    moe_expert(&w->moe, MOE_SHARED, x, num, w->shared_out);
    lap(w, EXPERTS, &from);
    st = do_combine(w, &rows, out, num);
    lap(w, COMBINE, &from);
    count_remote(w, num);
    return st == EP_OK ? 0 : rank_fail(w->rank, st, "combine");
}

/* What it allocates goes with the process. */
static int worker_open(struct worker *w) {
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    rank_config(w->rank, &config);
    config.flags = EP_GROUP_EXPANDED_VIEW;
    config.num_experts = MOE_EXPERTS;
    config.max_tokens = (int32_t)w->demo->batch;
    config.max_topk = MOE_TOPK;
    config.max_row_bytes = ROW_BYTES;
    ep_status st = ep_group_create(&w->group, &config);
    st = st == EP_OK ? ep_handle_create(&w->handle, w->group, NULL) : st;
    st = st == EP_OK ? ep_group_plan(w->group, &plan) : st;
    if (st != EP_OK) {
        return rank_fail(w->rank, st, "creating the group");
    }
    int first = 0;
    while (expert_owner(first, MOE_EXPERTS, w->rank->num_ranks) < w->rank->rank) {
        first++;
    }
    size_t batch = (size_t)w->demo->batch;
    w->report->arena_bytes = plan.arena_bytes;
    w->max_rows = plan.max_expanded_rows;
    w->ids = malloc(sizeof *w->ids * batch * MOE_TOPK);
    w->weights = malloc(sizeof *w->weights * batch * MOE_TOPK);
    w->shared_out = malloc(batch * ROW_BYTES);
    w->recv_weights = malloc(sizeof *w->recv_weights * (size_t)w->max_rows);
    if (!moe_create(&w->moe, first, ep_group_num_local_experts(w->group)) || w->ids == NULL ||
        w->weights == NULL || w->shared_out == NULL || w->recv_weights == NULL) {
        return rank_fail(w->rank, EP_OK, "no memory");
    }
    return 0;
}

static int demo_rank(struct rank *rank, void *arg) {
    struct demo *demo = arg;
    struct worker w = {.demo = demo, .rank = rank, .report = &demo->shared->rank[rank->rank]};
    int failed = worker_open(&w);
    int64_t first = demo->num_tokens * rank->rank / rank->num_ranks;
    int64_t end = demo->num_tokens * (rank->rank + 1) / rank->num_ranks;
    for (int64_t i = 0; i < demo->num_steps && failed == 0; i++) {
        int num = (int)(end - first < demo->batch ? end - first : demo->batch);
        failed = step(&w, demo->x + first * MOE_HIDDEN, demo->out + first * MOE_HIDDEN, num);
        first += num;
        atomic_fetch_add(&demo->shared->tokens_done, num);
    }
    ep_handle_destroy(&w.handle);
    ep_group_destroy(&w.group);
    return failed;
}

/* ---- the parent -------------------------------------------------------------------------- */

static void tick(void *arg) {
    struct demo *demo = arg;
    progress("layer", atomic_load(&demo->shared->tokens_done), demo->num_tokens);
}

static void print_times(const struct demo *demo) {
    int n = (int)demo->num_ranks;
    printf("  %-28s %12s %14s\n", "time per phase, all steps", "median rank", "slowest rank");
    for (int p = 0; p < NUM_PHASES; p++) {
        int64_t ns[EP_MAX_RANKS];
        for (int r = 0; r < n; r++) {
            ns[r] = demo->shared->rank[r].ns[p];
        }
        int64_t median = quantile(ns, n, 0.5);
        printf("    %-26s %12s %14s\n", phase_names[p], text_ns((double)median).s,
               text_ns((double)ns[n - 1]).s);
    }
    if (num_cores() < n) {
        printf("    (%d ranks share %d cores: waiting for a peer's turn counts as dispatch or "
               "combine)\n",
               n, num_cores());
    }
}

static void print_traffic(const struct demo *demo) {
    int64_t rows = 0, selections = 0, all = 0, busiest = 0, busiest_expert = 0;
    for (int r = 0; r < demo->num_ranks; r++) {
        const struct rank_report *report = &demo->shared->rank[r];
        rows += report->rows_remote;
        selections += report->selections_remote;
        all += report->selections_here;
        busiest = report->selections_here > busiest ? report->selections_here : busiest;
    }
    for (int e = 0; e < MOE_EXPERTS; e++) {
        int64_t load = demo->shared->expert_load[e];
        busiest_expert = load > busiest_expert ? load : busiest_expert;
    }
    double fewer = rows > 0 ? (double)selections / (double)rows : 1;
    printf("\n  %-28s %s; %s rows computed by experts\n", "tokens",
           text_count(demo->num_tokens).s, text_count(all).s);
    printf("  %-28s %s, one per token and rank; one per expert: %s, %.1f x\n",
           "rows to other ranks", text_count(rows).s, text_count(selections).s, fewer);
    printf("  %-28s %s, there and back; with one row per expert: %s\n", "bytes between ranks",
           text_bytes(2.0 * (double)rows * ROW_BYTES).s,
           text_bytes(2.0 * (double)selections * ROW_BYTES).s);
    printf("  %-28s busiest rank %.2f x the mean, busiest expert %.1f x\n", "imbalance",
           (double)(busiest * demo->num_ranks) / (double)all,
           (double)(busiest_expert * MOE_EXPERTS) / (double)all);
    printf("  %-28s %s per rank, as planned before it was allocated\n", "arena",
           text_bytes((double)demo->shared->rank[0].arena_bytes).s);
}

/* The same layer in this process alone. Prints the verdict; 0 when it matched. */
static int check(const struct demo *demo) {
    int64_t from_ns = epi_now_ns();
    struct moe moe = {0};
    if (!moe_create(&moe, 0, MOE_EXPERTS)) {
        fprintf(stderr, "ep demo: no memory for the check\n");
        return 1;
    }
    double max_error = 0, largest = 0;
    int64_t differ = 0;
    for (int64_t t = 0; t < demo->num_tokens; t++) {
        const uint16_t *out = demo->out + t * MOE_HIDDEN;
        uint16_t y[MOE_HIDDEN];
        double exact[MOE_HIDDEN];
        moe_dense(&moe, demo->x + t * MOE_HIDDEN, (int)demo->num_ranks, y, exact);
        for (int h = 0; h < MOE_HIDDEN; h++) {
            double error = fabs((double)bf16_to_float(out[h]) - exact[h]);
            max_error = error > max_error || isnan(error) ? error : max_error;
            largest = fmax(largest, fabs(exact[h]));
            differ += out[h] != y[h];
        }
        if (t % 64 == 63 || t + 1 == demo->num_tokens) {
            progress("checking", t + 1, demo->num_tokens);
        }
    }
    moe_destroy(&moe);
    bool passed = differ == 0 && max_error <= TOLERANCE * largest;
    printf("\n  check: the whole layer in one process (%s)\n",
           text_ns((double)(epi_now_ns() - from_ns)).s);
    printf("    the same roundings         %s of %s values differ in any bit (allowed: 0)\n",
           text_count(differ).s, text_count(demo->num_tokens * MOE_HIDDEN).s);
    printf("    float64, no roundings      largest error %.4f, %.2f %% of the largest value "
           "(allowed: %.0f %%)\n",
           max_error, 100 * max_error / largest, 100 * TOLERANCE);
    printf("  %s\n", passed ? "PASS" : "FAIL: across ranks the layer gives other results");
    return passed ? 0 : 1;
}

static int demo_run(struct demo *demo) {
    int64_t share = (demo->num_tokens + demo->num_ranks - 1) / demo->num_ranks;
    demo->num_steps = (share + demo->batch - 1) / demo->batch;
    demo->shared = ranks_memory(sizeof *demo->shared);
    demo->out = ranks_memory((size_t)demo->num_tokens * ROW_BYTES);
    if (demo->shared == NULL || demo->out == NULL) {
        fprintf(stderr, "ep demo: no memory for %s tokens\n", text_count(demo->num_tokens).s);
        return 1;
    }
    printf("ep demo: a Mixture-of-Experts layer of DeepSeek-V3's shape across %d processes\n\n",
           (int)demo->num_ranks);
    printf("  text   %s: %s tokens (words and punctuation)\n", demo->file,
           text_count(demo->num_tokens).s);
    printf(
        "  layer  %d experts and a shared one; a token goes to the best %d in the best %d of "
        "%d groups\n",
        MOE_EXPERTS, MOE_TOPK, MOE_TOPK_GROUPS, MOE_GROUPS);
    printf(
        "         hidden size %d, expert width %d (DeepSeek-V3: 7168, 2048), bfloat16 rows\n",
        MOE_HIDDEN, MOE_INTER);
    printf("  steps  %d, of up to %d tokens per rank: route, dispatch, compute, combine\n\n",
           (int)demo->num_steps, (int)demo->batch);
    struct ranks_job job = {.name = "ep demo",
                            .num_ranks = (int)demo->num_ranks,
                            .fn = demo_rank,
                            .tick = tick,
                            .arg = demo};
    int status = ranks_run(&job);
    if (status != 0) {
        return status;
    }
    tick(demo);
    print_times(demo);
    print_traffic(demo);
    return check(demo);
}

int cmd_demo(int argc, char **argv) {
    struct demo demo = {.num_ranks = 4, .batch = 128};
    const struct opt opts[] = {
        {"ranks", 'n', OPT_INT, &demo.num_ranks, 1, MOE_EXPERTS, "N", "how many processes"},
        {"file", 'f', OPT_TEXT, &demo.file, 0, 0, "F", "the text; default: one that is here"},
        {"tokens", 't', OPT_INT, &demo.num_tokens, 0, 1000000, "N",
         "how many tokens of it, in all; 0 is the whole text"},
        {"batch", 'b', OPT_INT, &demo.batch, 1, 8192, "N", "tokens per rank and step"},
    };
    const struct command command = {
        .name = "ep demo",
        .usage = "[options]",
        .about =
            "Runs a Mixture-of-Experts layer of DeepSeek-V3's shape, with narrower matrices, "
            "over real text: sigmoid router limited to groups, top-8 of 256 experts and a "
            "shared one. The text is split over processes that hold some of the experts "
            "each. Then the same layer is computed in one process; the exit status is 0 only "
            "if the results are the same.",
        .opts = opts,
        .num_opts = sizeof opts / sizeof opts[0],
    };
    int rest = 0;
    int status = args_parse(&command, argc, argv, &rest);
    if (status >= 0) {
        return status;
    }
    if (!load_text(&demo)) {
        fprintf(stderr, "ep demo: no words in %s; name a text with --file\n",
                demo.file != NULL ? demo.file : "any file tried");
        return 1;
    }
    status = demo_run(&demo);
    if (status == 0) {
        printf("\nNext: `%s bench` measures dispatch and combine at the real size.\n",
               tool_program);
    }
    free(demo.x);
    return status;
}
