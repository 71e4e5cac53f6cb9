/* SPDX-License-Identifier: MIT */
/*
 * `ep demo`: a Mixture-of-Experts layer over real text, spread over processes, and checked.
 *
 * Owns the text, its rows and the memory in which the ranks (rank.c) leave their results.
 * The parent draws the bar, then computes the whole layer alone and compares.
 */
#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "examples/demo/demo.h"

#define MAX_TEXT_BYTES ((size_t)4 << 20) /* of a longer one, so much is used */
#define TOLERANCE 0.02                   /* of the largest value, against float64 */

static const char *const phase_names[NUM_PHASES] = {"router (arithmetic)", "route", "dispatch",
                                                    "experts (arithmetic)", "combine"};

/* ---- the text ---------------------------------------------------------------------------- */

/* The next word, number or punctuation mark as a hash; 0 at the end. */
static uint64_t next_word(const char *text, size_t num_bytes, size_t *at) {
    while (*at < num_bytes && isspace((unsigned char)text[*at])) {
        ++*at;
    }
    uint64_t hash = 0;
    size_t start = *at;
    while (*at < num_bytes && (*at == start || (isalnum((unsigned char)text[*at]) &&
                                                isalnum((unsigned char)text[start])))) {
        hash = tool_rand_hash(hash + 1, (unsigned char)text[(*at)++]);
    }
    return hash;
}

/* Fills in x from the first file that can be read; a short text is read again. False, and why. */
static bool load_text(struct demo *demo, char *why, size_t why_bytes) {
    static const char *const files[] = {
        "/usr/share/common-licenses/GPL-3",  "/usr/share/common-licenses/Apache-2.0",
        "/usr/share/doc/base-files/README",  "/usr/share/doc/bash/copyright",
        "/usr/share/licenses/glibc/COPYING", "/usr/include/stdlib.h"};
    size_t num_bytes = 0;
    char *text = NULL;
    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]) && num_bytes == 0; i++) {
        const char *path = demo->file ? demo->file : files[i];
        free(text);
        text = tool_read_file(path, MAX_TEXT_BYTES, &num_bytes, why, why_bytes);
        if (text || demo->file) {
            demo->file = path;
            break;
        }
    }
    if (!text) {
        return false;
    }
    demo->is_cut = num_bytes == MAX_TEXT_BYTES;
    size_t at = 0;
    int64_t num_words = 0;
    while (next_word(text, num_bytes, &at) != 0) {
        num_words++;
    }
    epi_format(why, why_bytes, num_words > 0 ? "no memory" : "there is no word in it");
    if (num_words > 0) {
        demo->num_tokens = demo->num_tokens > 0 ? demo->num_tokens : num_words;
        demo->x = malloc((size_t)demo->num_tokens * ROW_BYTES);
    }
    uint64_t before = 0;
    at = 0;
    for (int64_t t = 0; demo->x && t < demo->num_tokens; t++) {
        uint64_t word = next_word(text, num_bytes, &at);
        if (word == 0) {
            at = 0;
            word = next_word(text, num_bytes, &at);
        }
        moe_embed(word, before, demo->x + t * MOE_HIDDEN);
        before = word;
    }
    free(text);
    return demo->x;
}

/* ---- the parent -------------------------------------------------------------------------- */

static void tick(void *arg) {
    struct demo *demo = arg;
    tool_progress("layer", atomic_load(&demo->shared->tokens_done), demo->num_tokens);
}

static void print_times(const struct demo *demo) {
    int n = (int)demo->num_ranks;
    printf("  %-28s %12s %14s\n", "time per phase, all steps", "median rank", "slowest rank");
    for (int p = 0; p < NUM_PHASES; p++) {
        int64_t ns[EP_MAX_RANKS];
        for (int r = 0; r < n; r++) {
            ns[r] = demo->shared->rank[r].ns[p];
        }
        int64_t median = tool_quantile(ns, n, 0.5);
        printf("    %-26s %12s %14s\n", phase_names[p], text_ns((double)median).s,
               text_ns((double)ns[n - 1]).s);
    }
    bool gpus = demo->gpus && demo->gpus->num < n;
    if (tool_num_cores() < n || gpus) {
        printf("    (%d ranks share %d %s: waiting for a peer's turn counts as dispatch or "
               "combine)\n",
               n, gpus ? demo->gpus->num : tool_num_cores(),
               !gpus                  ? "cores"
               : demo->gpus->num == 1 ? "GPU"
                                      : "GPUs");
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
            tool_progress("checking", t + 1, demo->num_tokens);
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

static void print_heading(const struct demo *demo) {
    char gpus[320] = "";
    if (demo->gpus) {
        int num = demo->gpus->num < demo->num_ranks ? demo->gpus->num : (int)demo->num_ranks;
        char names[256];
        gpu_describe(demo->gpus, num, names, sizeof(names));
        snprintf(gpus, sizeof(gpus), "\nwhose rows are on %s", names);
    }
    printf(
        "ep demo: a Mixture-of-Experts layer of DeepSeek-V3's shape across %d processes%s\n\n",
        (int)demo->num_ranks, gpus);
    printf("  text   %s%s: %s tokens (words and punctuation)\n", demo->file,
           demo->is_cut ? ", its first 4 MB" : "", text_count(demo->num_tokens).s);
    printf(
        "  layer  %d experts and a shared one; a token goes to the best %d in the best %d of "
        "%d groups\n",
        MOE_EXPERTS, MOE_TOPK, MOE_TOPK_GROUPS, MOE_GROUPS);
    printf(
        "         hidden size %d, expert width %d (DeepSeek-V3: 7168, 2048), bfloat16 rows\n",
        MOE_HIDDEN, MOE_INTER);
    printf("  steps  %d, of up to %d tokens per rank: route, dispatch, compute, combine\n\n",
           (int)demo->num_steps, (int)demo->batch);
}

static void print_without_gpus(const char *why) {
    char line[640];
    snprintf(line, sizeof(line), "are here but do not work, so without them (%s)", why);
    printf("  GPUs   ");
    text_wrap(line, 9);
    putchar('\n');
}

/* Runs the ranks. `quiet`: why it failed is in `why` only. */
static int run_ranks(struct demo *demo, bool quiet, char *why, size_t room) {
    memset(demo->shared, 0, sizeof(*demo->shared));
    struct ranks_job job = {.name = "ep demo",
                            .num_ranks = (int)demo->num_ranks,
                            .quiet = quiet,
                            .fn = demo_rank,
                            .tick = tick,
                            .arg = demo};
    int status = ranks_run(&job);
    snprintf(why, room, "%s", job.why);
    return status;
}

/* `may_fall_back`: GPUs were not asked for, so where they do not work host ranks do. */
static int demo_run(struct demo *demo, bool may_fall_back) {
    char why[512];
    const struct gpu_look *look = may_fall_back ? gpu_look("ep demo") : NULL;
    int64_t share = (demo->num_tokens + demo->num_ranks - 1) / demo->num_ranks;
    demo->num_steps = (share + demo->batch - 1) / demo->batch;
    demo->shared = ranks_memory(sizeof(*demo->shared));
    demo->out = ranks_memory((size_t)demo->num_tokens * ROW_BYTES);
    if (!demo->shared || !demo->out) {
        fprintf(stderr, "ep demo: no memory for %s tokens\n", text_count(demo->num_tokens).s);
        return 1;
    }
    print_heading(demo);
    if (look && !demo->gpus && look->num > 0) {
        print_without_gpus(look->why);
    }
    bool retry = may_fall_back && demo->gpus;
    int status = run_ranks(demo, retry, why, sizeof(why));
    if (retry && status == 1) {
        print_without_gpus(why);
        demo->gpus = NULL;
        status = run_ranks(demo, false, why, sizeof(why));
    }
    if (status != 0) {
        return status;
    }
    tick(demo);
    print_times(demo);
    print_traffic(demo);
    return check(demo);
}

int cmd_demo(int argc, char **argv) {
    enum { AUTO, HOST, CUDA };
    struct demo demo = {.num_ranks = 4, .batch = 128};
    int device = AUTO;
    const struct opt opts[] = {
        {"device", 'd', OPT_CHOICE, &device, 0, 0, "auto|host|cuda",
         "where rows are exchanged; auto: on GPUs if there are any that work"},
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
        .num_opts = sizeof(opts) / sizeof(opts[0]),
    };
    int status = args_parse(&command, argc, argv, NULL);
    if (status >= 0) {
        return status;
    }
    if (device != HOST) {
        demo.gpus = gpu_look(command.name);
        if (demo.gpus->why[0] != '\0' && device == CUDA) {
            fprintf(stderr, "ep demo: --device cuda: %s\n", demo.gpus->why);
            return 1;
        }
        demo.gpus = demo.gpus->why[0] == '\0' ? demo.gpus : NULL;
    }
    char why[160];
    if (!load_text(&demo, why, sizeof(why))) {
        fprintf(stderr, "ep demo: %s: %s; name a text with --file\n",
                demo.file ? demo.file : "none of the files tried can be read", why);
        return 1;
    }
    status = demo_run(&demo, device == AUTO);
    if (status == 0) {
        printf("\nNext: `%s bench%s` measures dispatch and combine at the real size.\n",
               tool_program, demo.gpus ? " --device cuda" : "");
    }
    free(demo.x);
    return status;
}
