/* SPDX-License-Identifier: MIT */
/*
 * `ep bench`: how long dispatch and combine take between local ranks, against the speed at
 * which the same ranks can copy memory or, on GPUs, at which the link can carry rows.
 *
 * Owns the options and the sweep. Must not measure: a case does (bench_case.c).
 */
#include <stdlib.h>

#include "tools/bench.h"

struct outputs {
    bool json, csv, models;
    const char *sweep;
};

/* Shapes of models that people run; a sweep is made of each. */
static const struct {
    int64_t tokens, hidden, topk, experts;
} models[] = {
    {4096, 7168, 8, 256}, {4096, 3584, 16, 896}, {4096, 2880, 4, 128}, {16384, 1024, 6, 64}};
enum { NUM_MODELS = sizeof(models) / sizeof(models[0]) };

static int refuse_row(const struct bench_params *p) {
    struct bench_item items[BENCH_MAX_ITEMS];
    int num = bench_items(p, items);
    for (int i = 0; i < num; i++) {
        int dtype = items[i].dtype, bytes = (int)bench_row_bytes(p, dtype);
        if (bytes % EP_ROW_ALIGN != 0) {
            return args_refuse("ep bench",
                               "a row of --hidden %d %s is %d bytes, no multiple of %d",
                               (int)p->hidden, bench_dtype_names[dtype], bytes, EP_ROW_ALIGN);
        }
    }
    return -1;
}

static int refuse_params(const struct bench_params *p) {
    int status = refuse_row(p);
    if (status >= 0) {
        return status;
    }
    if (p->max_tokens > 0 && p->max_tokens < p->tokens) {
        return args_refuse("ep bench", "--max-tokens %d is less than --tokens %d",
                           (int)p->max_tokens, (int)p->tokens);
    }
    if (p->topk > p->experts) {
        return args_refuse("ep bench", "--topk %d is more than --experts %d", (int)p->topk,
                           (int)p->experts);
    }
    if (p->routing == BENCH_GROUPED &&
        (p->groups > p->experts || p->experts % p->groups != 0 || p->topk_groups > p->groups ||
         p->topk > p->topk_groups * (p->experts / p->groups))) {
        return args_refuse("ep bench", "--topk %d of %d of %d groups of --experts %d cannot be",
                           (int)p->topk, (int)p->topk_groups, (int)p->groups, (int)p->experts);
    }
    if (p->routing == BENCH_HALF && (p->topk + 1) / 2 > p->experts / p->ranks) {
        return args_refuse(
            "ep bench",
            "half routing: half of --topk %d is more than the experts of a rank, "
            "%d of %d",
            (int)p->topk, (int)(p->experts / p->ranks), (int)p->experts);
    }
    if (p->ll && p->hidden % 128 != 0) {
        return args_refuse("ep bench", "--mode ll: --hidden %d is no multiple of 128",
                           (int)p->hidden);
    }
    if (p->ll && (p->expanded || p->arena_only || p->memory_only || p->uncached ||
                  p->dtype == BENCH_F32)) {
        return args_refuse("ep bench",
                           "--mode ll has packed output of fp8 or bf16 rows: none of "
                           "--expanded, --arena, --copy, --uncached, --dtype f32");
    }
    if (p->device == BENCH_CUDA && p->expanded && p->arena_only) {
        return args_refuse("ep bench", "--device cuda measures expanded output in memory only");
    }
    if (p->arena_only && p->memory_only) {
        return args_refuse("ep bench", "--arena and --copy exclude each other");
    }
    return -1;
}

/* Case i: of a model, if they are asked for, what the sweep makes of it. */
static void set_case(struct bench_params *p, const struct outputs *to,
                     const struct sweep *sweep, int num_swept, int i) {
    if (to->models) {
        p->tokens = models[i / num_swept].tokens;
        p->hidden = models[i / num_swept].hidden;
        p->topk = models[i / num_swept].topk;
        p->experts = models[i / num_swept].experts;
    }
    sweep_set(sweep, i % num_swept, p);
}

static int bench(struct bench_params *p, const struct outputs *to) {
    static struct bench_case *cases[NUM_MODELS * SWEEP_MAX_CASES];
    struct sweep sweep = {0};
    char why[160];
    const int swept = to->sweep ? sweep_parse(to->sweep, &sweep, why, sizeof(why)) : 1;
    const int num_cases = swept * (to->models ? NUM_MODELS : 1);
    int status = -1;
    if (swept < 0) {
        return args_refuse("ep bench",
                           "--sweep: cannot read \"%s\": %s; write for example "
                           "tokens=128,4096;hidden=2048,7168",
                           to->sweep, why);
    }
    for (int i = 0; i < num_cases && status < 0; i++) { /* before any of them is measured */
        set_case(p, to, &sweep, swept, i);
        status = refuse_params(p);
    }
    for (int i = 0; i < num_cases && status <= 0; i++) {
        set_case(p, to, &sweep, swept, i);
        status = bench_case(p, false, &cases[i]);
        if (status == 0 && to->csv) {
            bench_report_csv(stdout, cases[i], i == 0);
        } else if (status == 0 && !to->json) {
            printf("%s", i > 0 ? "\n\n" : "");
            bench_report_text(cases[i]);
        }
        if (!tool_flush() && status == 0) {
            status = 1;
        }
    }
    if (status == 0 && to->json) {
        bench_report_json(stdout, cases, num_cases);
    } else if (status == 0 && !to->csv) {
        bench_report_growth(cases, num_cases);
    }
    return status;
}

static int set_routing(struct bench_params *p, const char *text) {
    if (strncmp(text, "file:", 5) == 0) {
        p->routing_file = text + 5;
        p->routing = BENCH_FROM_FILE;
        return -1;
    }
    for (p->routing = 0; p->routing < BENCH_FROM_FILE; p->routing++) {
        if (strcmp(text, bench_routing_names[p->routing]) == 0) {
            return -1;
        }
    }
    return args_refuse(
        "ep bench", "--routing must be uniform, grouped, skewed, half or file:F, not %s", text);
}

/* What depends on the device, where it was not given. -1, or an exit status after a complaint. */
static int set_defaults(struct bench_params *p) {
    bool cuda = p->device == BENCH_CUDA;
    p->tokens = p->tokens > 0 ? p->tokens : p->ll ? 128 : 4096;
    p->experts = p->experts > 0 ? p->experts : p->ll ? 288 : 256;
    p->dtype = p->dtype < 0 && !cuda && !p->ll ? BENCH_BF16 : p->dtype;
    p->iters = p->iters > 0 ? p->iters : cuda ? 200 : p->ll ? 5 : 20;
    p->warmup = p->warmup >= 0 ? p->warmup : cuda ? 20 : p->ll ? 1 : 3;
    if (p->ranks == 0 && cuda) {
        const struct gpu_look *look = gpu_look("ep bench");
        if (look->why[0] != '\0') {
            fprintf(stderr, "ep bench: --device cuda: %s\n", look->why);
            return 1;
        }
        p->ranks = look->num;
    }
    p->ranks = p->ranks > 0 ? p->ranks : 4;
    return -1;
}

static const char about[] =
    "Times route, dispatch and combine between ranks of this machine, checks every byte, and "
    "compares with the time that memcpy needs in the same run for the bytes that the phase "
    "must "
    "read and write. A time runs from the first rank's call to the last rank's usable output. "
    "With --device cuda the ranks are on GPUs: FP8 and BF16, into arena and memory, compact "
    "and "
    "expanded, cached and not, eager and as a graph, against what the link carries in the same "
    "run. --dtype, --arena, --copy, --expanded and --uncached then choose among these. --mode "
    "ll "
    "times low-latency dispatch, combine, round trip and halves instead.";

static struct bench_params params = {.hidden = 7168,
                                     .topk = 8,
                                     .groups = 8,
                                     .topk_groups = 4,
                                     .dtype = -1, /* this and what is left out: set_defaults */
                                     .warmup = -1,
                                     .seed = 1};
static struct outputs outputs;
static const char *routing = "uniform";

static const struct opt opts[] = {
    {"device", 'd', OPT_CHOICE, &params.device, 0, 0, "host|cuda", "where ranks and rows are"},
    {"mode", 'm', OPT_CHOICE, &params.ll, 0, 0, "throughput|ll", "which operations"},
    {"ranks", 'n', OPT_INT, &params.ranks, 1, BENCH_MAX_RANKS, "N",
     "how many ranks (4; cuda: one per GPU)"},
    {"threads", 0, OPT_FLAG, &params.threads, 0, 0, NULL, "ranks are threads, not processes"},
    {"tokens", 't', OPT_INT, &params.tokens, 1, 1 << 20, "T",
     "tokens per rank (4096; ll: 128)"},
    {"max-tokens", 0, OPT_INT, &params.max_tokens, 1, 1 << 20, "T",
     "tokens that the group is planned for (as many as there are)"},
    {"hidden", 0, OPT_INT, &params.hidden, 1, 1 << 20, "H", "elements of a row"},
    {"dtype", 0, OPT_CHOICE, &params.dtype, 0, 0, "bf16|fp8|f32",
     "rows of dispatch; fp8 has scales per 128 and answers in bf16 (bf16; cuda: bf16 and "
     "fp8)"},
    {"topk", 'k', OPT_INT, &params.topk, 1, EP_MAX_TOPK, "K", "experts per token"},
    {"experts", 'e', OPT_INT, &params.experts, 1, 1 << 16, "E",
     "experts of the layer (256; ll: 288)"},
    {"routing", 0, OPT_TEXT, &routing, 0, 0, "R",
     "uniform, grouped, skewed (Zipf), half (of all rows go to rank 0), or file:F with K "
     "ids per token"},
    {"groups", 0, OPT_INT, &params.groups, 1, 1 << 16, "G", "grouped: groups of experts"},
    {"topk-groups", 0, OPT_INT, &params.topk_groups, 1, 1 << 16, "N",
     "grouped: groups per token"},
    {"expanded", 0, OPT_FLAG, &params.expanded, 0, 0, NULL,
     "output grouped by expert, one row per selection, weighted combine"},
    {"arena", 0, OPT_FLAG, &params.arena_only, 0, 0, NULL, "views of the arena only"},
    {"copy", 0, OPT_FLAG, &params.memory_only, 0, 0, NULL, "the caller's own memory only"},
    {"uncached", 0, OPT_FLAG, &params.uncached, 0, 0, NULL, "no dispatch on a cached handle"},
    {"iters", 'i', OPT_INT, &params.iters, 1, 100000, "N",
     "measured iterations (20; cuda: 200; ll on the host: 5)"},
    {"warmup", 'w', OPT_INT, &params.warmup, 0, 100000, "N",
     "iterations before them (3; cuda: 20; ll on the host: 1)"},
    {"workers", 0, OPT_INT, &params.workers, 0, 1024, "N",
     "threads per rank, or SMs; 0: libep's choice"},
    {"no-graph", 0, OPT_FLAG, &params.no_graph, 0, 0, NULL, "cuda: eager only"},
    {"seed", 0, OPT_INT, &params.seed, 0, INT64_MAX, "N", "of the routing"},
    {"no-check", 0, OPT_FLAG, &params.no_check, 0, 0, NULL, "do not check the data"},
    {"sweep", 0, OPT_TEXT, &outputs.sweep, 0, 0, "S",
     "several cases: tokens=128,4096;hidden=2048,7168 (also topk, experts, ranks)"},
    {"models", 0, OPT_FLAG, &outputs.models, 0, 0, NULL,
     "several cases: shapes of models that people run; --sweep is made of each"},
    {"json", 0, OPT_FLAG, &outputs.json, 0, 0, NULL, "print JSON"},
    {"csv", 0, OPT_FLAG, &outputs.csv, 0, 0, NULL, "print CSV, a line per case and phase"},
};

int cmd_bench(int argc, char **argv) {
    const struct command command = {
        .name = "ep bench",
        .usage = "[options]",
        .about = about,
        .opts = opts,
        .num_opts = sizeof(opts) / sizeof(opts[0]),
    };
    int status = args_parse(&command, argc, argv, NULL);
    status = status < 0 ? set_routing(&params, routing) : status;
    status = status < 0 ? set_defaults(&params) : status;
    return status < 0 ? bench(&params, &outputs) : status;
}
