/* SPDX-License-Identifier: MIT */
/*
 * `ep bench`: how long dispatch and combine take between local ranks, against the speed at
 * which the same ranks can copy memory or, on GPUs, at which the link can carry rows.
 *
 * Owns the options, the sweep and each case's memory; the ranks (bench_rank.c, bench_cuda.c)
 * fill it in.
 */
#include <stdlib.h>

#include "tools/bench.h"
#include "tools/gpu.h"

struct outputs {
    bool json, csv;
    const char *plot;
    const char *sweep;
};

static const int element_bytes[] = {2, 1, 4}; /* by enum bench_dtype */

int64_t bench_row_bytes(const struct bench_params *p, int dtype) {
    return p->hidden * element_bytes[dtype];
}

int64_t bench_scale_bytes(const struct bench_params *p, int dtype) {
    return dtype == DTYPE_FP8 ? (p->hidden + 127) / 128 * 4 : 0;
}

int64_t bench_answer_bytes(const struct bench_params *p, int dtype) {
    return p->hidden * (dtype == DTYPE_F32 ? 4 : 2);
}

/* The types of the rows that are sent, as bits. */
static unsigned dtypes_of(const struct bench_params *p) {
    return p->device == DEVICE_CUDA ? cuda_dtypes(p) : 1u << p->dtype;
}

static int refuse_row(const struct bench_params *p) {
    for (int dtype = 0; dtype <= DTYPE_F32; dtype++) {
        int bytes = (int)bench_row_bytes(p, dtype);
        if ((dtypes_of(p) >> dtype & 1) != 0 && bytes % EP_ROW_ALIGN != 0) {
            return args_refuse("ep bench",
                               "a row of --hidden %d %s is %d bytes, no multiple of %d",
                               (int)p->hidden, dtype_names[dtype], bytes, EP_ROW_ALIGN);
        }
    }
    return -1;
}

static int refuse_params(const struct bench_params *p) {
    int status = refuse_row(p);
    if (status >= 0) {
        return status;
    }
    if (p->topk > p->experts) {
        return args_refuse("ep bench", "--topk %d is more than --experts %d", (int)p->topk,
                           (int)p->experts);
    }
    if (p->routing == ROUTING_GROUPED &&
        (p->groups > p->experts || p->experts % p->groups != 0 || p->topk_groups > p->groups ||
         p->topk > p->topk_groups * (p->experts / p->groups))) {
        return args_refuse("ep bench", "--topk %d of %d of %d groups of --experts %d cannot be",
                           (int)p->topk, (int)p->topk_groups, (int)p->groups, (int)p->experts);
    }
    if (p->routing == ROUTING_HALF && (p->topk + 1) / 2 > p->experts / p->ranks) {
        return args_refuse(
            "ep bench",
            "half routing: half of --topk %d is more than the experts of a rank, "
            "%d of %d",
            (int)p->topk, (int)(p->experts / p->ranks), (int)p->experts);
    }
    if (p->device == DEVICE_CUDA && p->expanded && p->arena_only) {
        return args_refuse("ep bench", "--device cuda measures expanded output in memory only");
    }
    if (p->arena_only && p->memory_only) {
        return args_refuse("ep bench", "--arena and --copy exclude each other");
    }
    return -1;
}

/* Free memory against the plan and the ranks' own buffers, before anything is allocated. */
static int refuse_memory(const struct bench_case *c) {
    struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    bench_config(c, &config);
    ep_status st = ep_plan(&config, &plan);
    if (st != EP_OK) {
        fprintf(stderr, "ep bench: ep_plan: %s: %s\n", ep_status_string(st), ep_last_error());
        return 1;
    }
    int64_t row = c->row_bytes + c->answer_bytes;
    int64_t needed = c->p.ranks * (plan.arena_bytes + plan.local_bytes + plan.handle_bytes +
                                   c->p.tokens * row);
    for (int r = 0; r < c->p.ranks; r++) {
        needed += bench_output_rows(c, r, c->p.expanded) *
                  (c->answer_bytes + c->scale_bytes + 8 * c->p.topk);
    }
    if (free_memory_bytes() > 0 && needed > free_memory_bytes()) {
        fprintf(stderr,
                "ep bench: this needs %s of memory and %s are free; lower --tokens, "
                "--hidden or --ranks\n",
                text_bytes((double)needed).s, text_bytes((double)free_memory_bytes()).s);
        return 1;
    }
    return -1;
}

/* An iteration lasts from the first rank's call to the last rank's output: where ranks share a
 * core, the one that has to wait for its turn would otherwise seem to be fast. */
static void reduce_times(struct bench_case *c, int64_t *ns) {
    const struct bench_time *t = c->times;
    for (int phase = 0; phase < NUM_PHASES; phase++) {
        for (int64_t i = 0; i < c->p.iters; i++) {
            int64_t first = t->start_ns, last = t->end_ns;
            for (int64_t r = 0; r < c->p.ranks; r++, t++) {
                first = t->start_ns < first ? t->start_ns : first;
                last = t->end_ns > last ? t->end_ns : last;
            }
            ns[i] = last - first;
        }
        c->p50[phase] = quantile(ns, (int)c->p.iters, 0.50);
        c->p99[phase] = quantile(ns, (int)c->p.iters, 0.99);
    }
    if (c->p50[PHASE_MEMCPY_AGAIN] < c->p50[PHASE_MEMCPY]) {
        c->p50[PHASE_MEMCPY] = c->p50[PHASE_MEMCPY_AGAIN];
        c->p99[PHASE_MEMCPY] = c->p99[PHASE_MEMCPY_AGAIN];
    }
    c->p50[PHASE_MEMCPY_AGAIN] = 0;
}

static int host_case(struct bench_case *c, bool quiet) {
    const struct bench_params *p = &c->p;
    int64_t *ns = malloc((size_t)p->iters * sizeof(*ns));
    c->times = ranks_memory((size_t)(NUM_PHASES * p->iters * p->ranks) * sizeof(*c->times));
    if (!c->times || !ns) {
        fprintf(stderr, "ep bench: no memory for the times\n");
        return 1;
    }
    int64_t pass_bytes = 2 * p->tokens * c->row_bytes;
    int64_t passes = ((int64_t)32 << 20) / pass_bytes;
    c->memcpy_bytes = pass_bytes * (passes > 1 ? passes : 1);
    int status = refuse_memory(c);
    if (status >= 0) {
        return status;
    }
    struct ranks_job job = {.name = "ep bench",
                            .num_ranks = (int)p->ranks,
                            .threads = p->threads,
                            .quiet = quiet,
                            .timeout_s = quiet ? 30 : 0,
                            .fn = bench_rank,
                            .arg = c};
    status = ranks_run(&job);
    snprintf(c->why, sizeof(c->why), "%s", job.why);
    reduce_times(c, ns);
    free(ns);
    return status;
}

int bench_case(const struct bench_params *p, bool quiet, struct bench_case **out) {
    struct bench_case *c = ranks_memory(sizeof(*c));
    size_t num_ids = (size_t)(p->ranks * p->tokens * p->topk);
    if (!c || !(c->ids = ranks_memory(num_ids * sizeof(*c->ids)))) {
        fprintf(stderr, "ep bench: no memory for the ids\n");
        return 1;
    }
    c->p = *p;
    for (int dtype = 0; dtype <= DTYPE_F32; dtype++) { /* host ranks send one type only */
        if (dtypes_of(p) >> dtype & 1) {
            int64_t row = bench_row_bytes(p, dtype), scale = bench_scale_bytes(p, dtype);
            int64_t answer = bench_answer_bytes(p, dtype);
            c->row_bytes = row > c->row_bytes ? row : c->row_bytes;
            c->scale_bytes = scale > c->scale_bytes ? scale : c->scale_bytes;
            c->answer_bytes = answer > c->answer_bytes ? answer : c->answer_bytes;
        }
    }
    int status = routing_make(c);
    if (status != 0) {
        return status;
    }
    status = p->device == DEVICE_CUDA ? cuda_case(c, quiet) : host_case(c, quiet);
    *out = c;
    return status;
}

/* ---- the sweep --------------------------------------------------------------------------- */

enum { MAX_AXES = 5, MAX_VALUES = 16, MAX_CASES = 256 };

struct axis {
    int64_t *target;
    int64_t values[MAX_VALUES];
    int num;
};

/* "tokens=128,4096;hidden=2048,7168" into axes over fields of p. -1, or 2 after a complaint. */
static int parse_sweep(const char *text, struct bench_params *p, struct axis *axes, int *num) {
    const struct {
        const char *name;
        int64_t *target;
        int64_t max;
    } fields[] = {{"tokens", &p->tokens, 1 << 20},
                  {"hidden", &p->hidden, 1 << 20},
                  {"topk", &p->topk, EP_MAX_TOPK},
                  {"experts", &p->experts, 1 << 16},
                  {"ranks", &p->ranks, BENCH_MAX_RANKS}};
    for (const char *s = text; s && *s != '\0';) {
        struct axis *axis = &axes[*num];
        size_t len = strcspn(s, "=");
        int64_t max = 0;
        for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
            if (strlen(fields[i].name) == len && strncmp(s, fields[i].name, len) == 0) {
                axis->target = fields[i].target;
                max = fields[i].max;
            }
        }
        s += len;
        while (max > 0 && (*s == '=' || *s == ',') && axis->num < MAX_VALUES) {
            char *end = NULL;
            int64_t value = strtoll(s + 1, &end, 10);
            if (end == s + 1 || value < 1 || value > max) {
                break;
            }
            axis->values[axis->num++] = value;
            s = end;
        }
        if (axis->num == 0 || (*s != ';' && *s != '\0') || ++*num > MAX_AXES) {
            return args_refuse("ep bench",
                               "--sweep: cannot read \"%s\"; write for example "
                               "tokens=128,4096;hidden=2048,7168",
                               text);
        }
        s += *s == ';';
    }
    return -1;
}

static int bench(struct bench_params *p, const struct outputs *to) {
    static struct bench_case *cases[MAX_CASES];
    struct axis axes[MAX_AXES + 1] = {{0}};
    int num_axes = 0;
    int num_cases = 1;
    int status = parse_sweep(to->sweep, p, axes, &num_axes);
    for (int i = 0; i < num_axes; i++) {
        num_cases *= axes[i].num;
    }
    if (status < 0 && num_cases > MAX_CASES) {
        status =
            args_refuse("ep bench", "--sweep has %d cases, at most %d", num_cases, MAX_CASES);
    }
    for (int i = 0; i < num_cases && status <= 0; i++) {
        for (int a = num_axes - 1, rest = i; a >= 0; a--) {
            *axes[a].target = axes[a].values[rest % axes[a].num];
            rest /= axes[a].num;
        }
        status = refuse_params(p);
        status = status < 0 ? bench_case(p, false, &cases[i]) : status;
        if (status == 0 && to->csv) {
            report_csv(stdout, cases[i], i == 0);
        } else if (status == 0 && !to->json) {
            printf("%s", i > 0 ? "\n\n" : "");
            report_text(cases[i]);
        }
        fflush(stdout);
    }
    if (status == 0 && to->json) {
        report_json(stdout, cases, num_cases);
    }
    if (status == 0 && to->plot) {
        status = svg_write(to->plot, cases, num_cases);
    }
    return status;
}

static int set_routing(struct bench_params *p, const char *text) {
    if (strncmp(text, "file:", 5) == 0) {
        p->routing_file = text + 5;
        p->routing = ROUTING_FILE;
        return -1;
    }
    for (p->routing = 0; p->routing < ROUTING_FILE; p->routing++) {
        if (strcmp(text, routing_names[p->routing]) == 0) {
            return -1;
        }
    }
    return args_refuse(
        "ep bench", "--routing must be uniform, grouped, skewed, half or file:F, not %s", text);
}

/* What depends on the device, where it was not given. -1, or an exit status after a complaint. */
static int set_defaults(struct bench_params *p, const struct outputs *to) {
    bool cuda = p->device == DEVICE_CUDA;
    if (cuda && to->plot) {
        return args_refuse("ep bench", "--plot draws host ranks only; take --csv or --json");
    }
    p->dtype = p->dtype < 0 && !cuda ? DTYPE_BF16 : p->dtype;
    p->iters = p->iters > 0 ? p->iters : cuda ? 200 : 20;
    p->warmup = p->warmup >= 0 ? p->warmup : cuda ? 20 : 3;
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
    "run. --dtype, --arena, --copy, --expanded and --uncached then choose among these.";

int cmd_bench(int argc, char **argv) {
    struct bench_params p = {.tokens = 4096,
                             .hidden = 7168,
                             .topk = 8,
                             .experts = 256,
                             .groups = 8,
                             .topk_groups = 4,
                             .dtype = -1, /* this and what is left out: set_defaults */
                             .warmup = -1,
                             .seed = 1};
    struct outputs to = {0};
    const char *routing = "uniform";
    const struct opt opts[] = {
        {"device", 'd', OPT_CHOICE, &p.device, 0, 0, "host|cuda", "where ranks and rows are"},
        {"ranks", 'n', OPT_INT, &p.ranks, 1, BENCH_MAX_RANKS, "N",
         "how many ranks (4; cuda: one per GPU)"},
        {"threads", 0, OPT_FLAG, &p.threads, 0, 0, NULL, "ranks are threads, not processes"},
        {"tokens", 't', OPT_INT, &p.tokens, 1, 1 << 20, "T", "tokens per rank"},
        {"hidden", 0, OPT_INT, &p.hidden, 1, 1 << 20, "H", "elements of a row"},
        {"dtype", 0, OPT_CHOICE, &p.dtype, 0, 0, "bf16|fp8|f32",
         "rows of dispatch; fp8 has scales per 128 and answers in bf16 (bf16; cuda: bf16 and "
         "fp8)"},
        {"topk", 'k', OPT_INT, &p.topk, 1, EP_MAX_TOPK, "K", "experts per token"},
        {"experts", 'e', OPT_INT, &p.experts, 1, 1 << 16, "E", "experts of the layer"},
        {"routing", 0, OPT_TEXT, &routing, 0, 0, "R",
         "uniform, grouped, skewed (Zipf), half (of all rows go to rank 0), or file:F with K "
         "ids per token"},
        {"groups", 0, OPT_INT, &p.groups, 1, 1 << 16, "G", "grouped: groups of experts"},
        {"topk-groups", 0, OPT_INT, &p.topk_groups, 1, 1 << 16, "N",
         "grouped: groups per token"},
        {"expanded", 0, OPT_FLAG, &p.expanded, 0, 0, NULL,
         "output grouped by expert, one row per selection, weighted combine"},
        {"arena", 0, OPT_FLAG, &p.arena_only, 0, 0, NULL, "views of the arena only"},
        {"copy", 0, OPT_FLAG, &p.memory_only, 0, 0, NULL, "the caller's own memory only"},
        {"uncached", 0, OPT_FLAG, &p.uncached, 0, 0, NULL, "no dispatch on a cached handle"},
        {"iters", 'i', OPT_INT, &p.iters, 1, 100000, "N",
         "measured iterations (20; cuda: 200)"},
        {"warmup", 'w', OPT_INT, &p.warmup, 0, 100000, "N",
         "iterations before them (3; cuda: 20)"},
        {"workers", 0, OPT_INT, &p.workers, 0, 1024, "N",
         "threads per rank, or SMs; 0: libep's choice"},
        {"no-graph", 0, OPT_FLAG, &p.no_graph, 0, 0, NULL, "cuda: eager only"},
        {"seed", 0, OPT_INT, &p.seed, 0, INT64_MAX, "N", "of the routing"},
        {"no-check", 0, OPT_FLAG, &p.no_check, 0, 0, NULL, "do not check the data"},
        {"sweep", 0, OPT_TEXT, &to.sweep, 0, 0, "S",
         "several cases: tokens=128,4096;hidden=2048,7168 (also topk, experts, ranks)"},
        {"json", 0, OPT_FLAG, &to.json, 0, 0, NULL, "print JSON"},
        {"csv", 0, OPT_FLAG, &to.csv, 0, 0, NULL, "print CSV, a line per case and phase"},
        {"plot", 0, OPT_TEXT, &to.plot, 0, 0, "F.svg", "draw traffic and time per phase"},
    };
    const struct command command = {
        .name = "ep bench",
        .usage = "[options]",
        .about = about,
        .opts = opts,
        .num_opts = sizeof(opts) / sizeof(opts[0]),
    };
    int rest = 0;
    int status = args_parse(&command, argc, argv, &rest);
    status = status < 0 ? set_routing(&p, routing) : status;
    status = status < 0 ? set_defaults(&p, &to) : status;
    return status < 0 ? bench(&p, &to) : status;
}
