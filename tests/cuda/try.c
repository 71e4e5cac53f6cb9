/* SPDX-License-Identifier: MIT */
/*
 * cuda_try: the library's kernels on GPUs, before the library runs there itself. Several ranks
 * live in this one process: all on device 0, or each on a device of its own. Checks every output
 * bit by bit against the plain C reference, then measures. Built by `make build/cuda_try`, which
 * needs no CUDA; run by scripts/gpu.sh. See --help.
 *
 * Exit status: 0 good; 1 something differs; 2 usage; 3 a call of the driver failed; 4 a kernel
 * did not end; 77 there is no GPU, with the reason.
 */
#include "tests/cuda/try.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/tap.h"

#define MAX_SHAPES 64

struct options {
    struct rig_options rig;
    struct rig_shape shape;            /* for checks */
    int tokens, hidden, topk, experts; /* 0: the default of the step */
    int seeds, iterations, warmup;
    bool time, checks, compile_only;
    struct rig_shape sweep[MAX_SHAPES];
    int num_sweep;
};

static const char usage[] =
    "usage: cuda_try [OPTION...]\n"
    "  --ranks N          ranks in this process, 1..8 (4)\n"
    "  --multi-gpu        rank r on device r; else all ranks on device 0\n"
    "  --mover generic|tma   how rows move (tma; sm_80 always moves generically)\n"
    "  --cooperative 0|1  cooperative launches (1 where a device has one rank)\n"
    "  --blocks B --send S --warps W --stages N --stage-bytes N   the shape of launches in "
    "checks\n"
    "                     (16, half of the blocks, 8, 3, 8192)\n"
    "  --tokens N --hidden H --topk K --experts E   one shape for all checks, and for --time\n"
    "                     (checks: a list of shapes; --time: 4096 7168 8 256)\n"
    "  --seeds N          random cases after the fixed ones (8)\n"
    "  --timeout-ms N     deadline of every wait in a kernel (2000)\n"
    "  --time             measure after the checks;  --no-checks  measure only\n"
    "  --sweep LIST       shapes to measure: blocks:send:warps:stages:stageKiB,...\n"
    "  --iterations N --warmup N   (20, 5)\n"
    "  --compile-only     compile all kernels for all architectures; needs no GPU\n";

/* ---- checks ---------------------------------------------------------------------------- */

/* One case of the fixed list: hidden in elements, 0 to be put in by row_bytes. */
struct fixed {
    const char *name;
    int row_dtype;
    int64_t row_bytes; /* negative: that many stages */
    int scale_dtype;
    int64_t num_scales;
    int tokens, experts, topk;
    enum case_routing routing;
    enum case_map map;
    enum case_tokens spread;
};

static const struct fixed fixed[] = {
    {"bf16, rows smaller than a stage", EP_BF16, 1024, 0, 0, 64, 64, 8, ROUTE_UNIFORM, MAP_EVEN,
     TOKENS_MIXED},
    {"bf16, rows of one stage", EP_BF16, -1, 0, 0, 96, 256, 8, ROUTE_UNIFORM, MAP_EVEN,
     TOKENS_MIXED},
    {"bf16, rows of two stages", EP_BF16, -2, 0, 0, 50, 256, 8, ROUTE_HOLES, MAP_EVEN,
     TOKENS_MAX},
    {"bf16, hidden 7168", EP_BF16, 14336, 0, 0, 96, 256, 8, ROUTE_UNIFORM, MAP_EVEN,
     TOKENS_MIXED},
    {"f16, 16 bytes more than a stage", EP_F16, 8208, 0, 0, 40, 128, 4, ROUTE_SKEWED,
     MAP_UNEVEN, TOKENS_MIXED},
    {"f32, one unit", EP_F32, 16, 0, 0, 100, 64, 8, ROUTE_DUPLICATES, MAP_RANDOM, TOKENS_MIXED},
    {"f32, 20 KB", EP_F32, 20480, 0, 0, 33, 64, 8, ROUTE_UNIFORM, MAP_EMPTY_RANK, TOKENS_MAX},
    {"fp8 with float scales, hidden 7168", EP_F8E4M3, 7168, EP_F32, 56, 96, 256, 8,
     ROUTE_UNIFORM, MAP_EVEN, TOKENS_MIXED},
    {"fp8 with byte scales, hidden 9232", EP_F8E4M3, 9232, EP_U8, 73, 60, 64, 8, ROUTE_GROUPS,
     MAP_EVEN, TOKENS_MIXED},
    {"one expert", EP_BF16, 2048, 0, 0, 80, 64, 8, ROUTE_ONE_EXPERT, MAP_EVEN, TOKENS_MAX},
    {"one rank", EP_BF16, 2048, EP_BF16, 16, 80, 64, 8, ROUTE_ONE_RANK, MAP_EVEN, TOKENS_MIXED},
    {"top-1", EP_BF16, 4096, 0, 0, 70, 64, 1, ROUTE_UNIFORM, MAP_RANDOM, TOKENS_MIXED},
    {"top-64", EP_BF16, 512, 0, 0, 20, 256, 64, ROUTE_UNIFORM, MAP_EVEN, TOKENS_MIXED},
    {"one token", EP_BF16, 14336, 0, 0, 16, 64, 8, ROUTE_UNIFORM, MAP_EVEN, TOKENS_ONE},
    {"no tokens", EP_BF16, 1024, 0, 0, 16, 64, 8, ROUTE_UNIFORM, MAP_EVEN, TOKENS_NONE},
    {"nowhere", EP_BF16, 1024, 0, 0, 32, 64, 8, ROUTE_NOWHERE, MAP_EVEN, TOKENS_MIXED},
    {"many channels", EP_BF16, 256, 0, 0, 1500, 64, 8, ROUTE_UNIFORM, MAP_EVEN, TOKENS_MIXED},
};

static void set_case(const struct options *o, const struct fixed *f, struct test_case *c) {
    const int64_t stage = o->shape.stage_bytes;
    const int64_t row = f->row_bytes < 0 ? -f->row_bytes * stage : f->row_bytes;

    case_default(c, o->rig.num_ranks, 1000 + (uint64_t)(f - fixed));
    c->row_dtype = f->row_dtype;
    c->hidden = row / (int64_t)ep_dtype_bytes((ep_dtype)f->row_dtype);
    c->scale_dtype = f->scale_dtype;
    c->num_scales = f->num_scales;
    c->max_tokens = o->tokens ? o->tokens : f->tokens;
    c->num_experts = o->experts ? o->experts : f->experts;
    c->topk = o->topk ? o->topk : f->topk;
    c->routing = f->routing;
    c->map = f->map;
    c->tokens = f->spread;
    if (f->num_scales) {
        c->scale_stride = STRIDE_PADDED;
    }
    if (o->hidden) {
        c->hidden = o->hidden;
    }
}

/* False: a rank has faulted. */
static bool check_all(struct rig *rig, const struct options *o) {
    static struct test_case c; /* large */
    const int num_fixed = (int)(sizeof(fixed) / sizeof(fixed[0]));
    bool alive = true;

    for (int i = 0; alive && i < num_fixed; i++) {
        set_case(o, &fixed[i], &c);
        case_build(&c);
        alive = check_case(rig, &c, fixed[i].name);
        case_free(&c);
    }
    for (int i = 0; alive && i < o->seeds; i++) {
        char name[64];
        case_random(&c, 4242 + (uint64_t)i);
        c.num_ranks = o->rig.num_ranks;
        snprintf(name, sizeof(name), "random %d", i);
        case_build(&c);
        alive = check_case(rig, &c, name);
        case_free(&c);
    }
    return alive;
}

/* ---- options --------------------------------------------------------------------------- */

static void bad_usage(const char *why, const char *what) {
    printf("cuda_try: %s %s\n%s", why, what, usage);
    exit(2);
}

static int number(const char *text, int min, int max) {
    char *end;
    const long n = strtol(text, &end, 10);

    if (end == text || *end || n < min || n > max) {
        bad_usage("no such number:", text);
    }
    return (int)n;
}

static void parse_sweep(struct options *o, char *text) {
    char *item, *rest = text;

    while ((item = strsep(&rest, ",")) != NULL) {
        struct rig_shape s;
        int used = 0;
        if (!*item) {
            continue;
        }
        if (o->num_sweep == MAX_SHAPES ||
            sscanf(item, "%d:%d:%d:%d:%d%n", &s.blocks, &s.send_blocks, &s.warps, &s.stages,
                   &s.stage_bytes, &used) != 5 ||
            item[used]) {
            bad_usage("not blocks:send:warps:stages:stageKiB, or too many:", item);
        }
        s.stage_bytes *= 1024;
        o->sweep[o->num_sweep++] = s;
    }
}

enum {
    O_RANKS = 256,
    O_MULTI,
    O_MOVER,
    O_COOP,
    O_BLOCKS,
    O_SEND,
    O_WARPS,
    O_STAGES,
    O_STAGE_BYTES,
    O_TOKENS,
    O_HIDDEN,
    O_TOPK,
    O_EXPERTS,
    O_SEEDS,
    O_TIMEOUT,
    O_TIME,
    O_NO_CHECKS,
    O_SWEEP,
    O_ITERATIONS,
    O_WARMUP,
    O_COMPILE,
    O_HELP
};

static const struct option names[] = {{"ranks", 1, NULL, O_RANKS},
                                      {"multi-gpu", 0, NULL, O_MULTI},
                                      {"mover", 1, NULL, O_MOVER},
                                      {"cooperative", 1, NULL, O_COOP},
                                      {"blocks", 1, NULL, O_BLOCKS},
                                      {"send", 1, NULL, O_SEND},
                                      {"warps", 1, NULL, O_WARPS},
                                      {"stages", 1, NULL, O_STAGES},
                                      {"stage-bytes", 1, NULL, O_STAGE_BYTES},
                                      {"tokens", 1, NULL, O_TOKENS},
                                      {"hidden", 1, NULL, O_HIDDEN},
                                      {"topk", 1, NULL, O_TOPK},
                                      {"experts", 1, NULL, O_EXPERTS},
                                      {"seeds", 1, NULL, O_SEEDS},
                                      {"timeout-ms", 1, NULL, O_TIMEOUT},
                                      {"time", 0, NULL, O_TIME},
                                      {"no-checks", 0, NULL, O_NO_CHECKS},
                                      {"sweep", 1, NULL, O_SWEEP},
                                      {"iterations", 1, NULL, O_ITERATIONS},
                                      {"warmup", 1, NULL, O_WARMUP},
                                      {"compile-only", 0, NULL, O_COMPILE},
                                      {"help", 0, NULL, O_HELP},
                                      {NULL, 0, NULL, 0}};

static void set_option(struct options *o, int which, char *v) {
    switch (which) {
    case O_RANKS:
        o->rig.num_ranks = number(v, 1, RIG_MAX_RANKS);
        break;
    case O_MULTI:
        o->rig.multi_gpu = true;
        break;
    case O_MOVER:
        if (strcmp(v, "generic") != 0 && strcmp(v, "tma") != 0) {
            bad_usage("no such mover:", v);
        }
        o->rig.generic = strcmp(v, "generic") == 0;
        break;
    case O_COOP:
        o->rig.cooperative = number(v, 0, 1);
        break;
    case O_BLOCKS:
        o->shape.blocks = number(v, 1, K_MAX_BLOCKS);
        break;
    case O_SEND:
        o->shape.send_blocks = number(v, 1, K_MAX_BLOCKS);
        break;
    case O_WARPS:
        o->shape.warps = number(v, 1, 32);
        break;
    case O_STAGES:
        o->shape.stages = number(v, 1, 8);
        break;
    case O_STAGE_BYTES:
        o->shape.stage_bytes = number(v, 128, 1 << 18);
        break;
    case O_TOKENS:
        o->tokens = number(v, 1, 1 << 20);
        break;
    case O_HIDDEN:
        o->hidden = number(v, 16, 1 << 20);
        break;
    case O_TOPK:
        o->topk = number(v, 1, EP_MAX_TOPK);
        break;
    case O_EXPERTS:
        o->experts = number(v, 1, 4096);
        break;
    case O_SEEDS:
        o->seeds = number(v, 0, 100000);
        break;
    case O_TIMEOUT:
        o->rig.timeout_ms = number(v, 1, 600000);
        break;
    case O_TIME:
        o->time = true;
        break;
    case O_NO_CHECKS:
        o->checks = false;
        o->time = true;
        break;
    case O_SWEEP:
        parse_sweep(o, v);
        break;
    case O_ITERATIONS:
        o->iterations = number(v, 1, 1000);
        break;
    case O_WARMUP:
        o->warmup = number(v, 0, 1000);
        break;
    case O_COMPILE:
        o->compile_only = true;
        break;
    case O_HELP:
        fputs(usage, stdout);
        exit(0);
    default:
        bad_usage("see above:", "");
    }
}

static void parse(int argc, char **argv, struct options *o) {
    int which;

    *o = (struct options){
        .rig = {.num_ranks = 4, .cooperative = -1, .timeout_ms = 2000},
        .shape = {.blocks = 16, .warps = 8, .stages = 3, .stage_bytes = 8192},
        .seeds = 8,
        .iterations = 20,
        .warmup = 5,
        .checks = true,
    };
    while ((which = getopt_long(argc, argv, "", names, NULL)) != -1) {
        set_option(o, which, optarg);
    }
    if (optind < argc) {
        bad_usage("unknown argument:", argv[optind]);
    }
    if (o->shape.send_blocks == 0) {
        o->shape.send_blocks = (o->shape.blocks + 1) / 2;
    }
    if (o->num_sweep == 0) {
        o->sweep[o->num_sweep++] = o->shape;
    }
}

int main(int argc, char **argv) {
    static struct rig rig; /* large */
    static struct options o;
    bool alive = true;

    setvbuf(stdout, NULL, _IOLBF, 0);
    parse(argc, argv, &o);
    if (o.compile_only) {
        return rig_compile_only() ? 1 : 0;
    }
    if (rig_open(&rig, &o.rig) != EP_OK) {
        printf("skip: %s\n", ep_last_error());
        return 77;
    }
    if (o.checks) {
        if (!rig_use_shape(&rig, &o.shape)) {
            return 2;
        }
        alive = check_all(&rig, &o);
    }
    if (o.time && alive) {
        const struct timing t = {
            .num_tokens = o.tokens ? o.tokens : 4096,
            .hidden = o.hidden ? o.hidden : 7168,
            .topk = o.topk ? o.topk : 8,
            .num_experts = o.experts ? o.experts : 256,
            .warmup = o.warmup,
            .iterations = o.iterations,
            .shapes = o.sweep,
            .num_shapes = o.num_sweep,
        };
        alive = time_all(&rig, &t);
    }
    if (!alive) {
        check(false, "stopped early");
    }
    printf("%d passed, %d failed\n", num_passed, num_failed);
    fflush(stdout);
    if (!alive) {
        _exit(1); /* peers may still be writing: an orderly end is not safe */
    }
    rig_close(&rig);
    return num_failed ? 1 : 0;
}
