/* SPDX-License-Identifier: MIT */
/*
 * What `ep bench` says about a case to people: the table, and the arithmetic behind it.
 *
 * Must not print a figure without what it is made of: time first, then bytes, then the share
 * of what the same bytes take at the rate that memcpy (host) or the link (GPUs) reached in
 * this run; DeepEP's figure for comparison.
 */
#include "tools/bench.h"

static bool on_gpus(const struct bench_case *c) {
    return c->p.device == BENCH_CUDA;
}

/* ---- arithmetic --------------------------------------------------------------------------- */

double bench_rate(const struct bench_case *c) {
    if (on_gpus(c)) {
        return c->gpus.first > c->gpus.last ? c->gpus.first : c->gpus.last;
    }
    return (double)(c->memcpy_bytes * c->p.ranks) / (double)c->result[0][BENCH_EAGER].p50_ns;
}

int64_t bench_rows(const struct bench_case *c, bool remote) {
    int64_t sum = 0;
    for (int64_t i = 0; i < c->p.ranks; i++) {
        for (int64_t j = 0; j < c->p.ranks; j++) {
            sum += remote && i == j ? 0 : c->traffic[i][j];
        }
    }
    return sum;
}

static double imbalance(const struct bench_case *c, bool expanded) {
    int64_t most = 0, sum = 0;
    for (int r = 0; r < c->p.ranks; r++) {
        int64_t rows = bench_output_rows(c, r, expanded);
        most = rows > most ? rows : most;
        sum += rows;
    }
    return sum > 0 ? (double)(most * c->p.ranks) / (double)sum : 1;
}

/* The sum of the rows that a formula names by their capital letters. */
static double moved_rows(const struct bench_case *c, const char *formula) {
    int64_t sum = 0;
    for (const char *s = formula; *s != '\0'; s++) {
        sum += *s == 'T'   ? c->p.ranks * c->p.tokens
               : *s == 'N' ? bench_rows(c, false)
               : *s == 'R' ? bench_rows(c, true)
               : *s == 'S' ? c->selections
                           : 0;
    }
    return (double)sum;
}

/* What an operation of 1 MB or more for each peer should take at most on GPUs: so long, and so often the
 * larger of what the link and of what a GPU's memory needs for its bytes. */
#define GOAL_NS 22000
#define GOAL_TIMES 1.15

/* Bytes are those of rows and scales; ids and weights are not counted. */
bool bench_line(const struct bench_case *c, int index, int mode, struct bench_line *l) {
    const struct bench_item *item = &c->items[index];
    const struct bench_result *result = &c->result[index][mode];
    const struct bench_op *op = item->op;
    double bytes =
        (double)(bench_row_bytes(&c->p, item->dtype) + bench_scale_bytes(&c->p, item->dtype));
    *l = (struct bench_line){.item = item, .result = result, .index = index, .mode = mode};
    l->ns = (double)result->p50_ns;
    l->moved = item->expanded ? op->moved_expanded : op->moved;
    l->moved = l->moved ? l->moved : "";
    if (l->moved[0] != '\0') {
        l->moved_bytes = bytes * moved_rows(c, l->moved);
        /* A combine sends back what the dispatch brought: the most in or out is the same. */
        if (op->answers) {
            double answer = (double)bench_row_bytes(&c->p, BENCH_BF16);
            l->moved_bytes += answer * moved_rows(c, op->answers);
            bytes += answer;
        }
        bytes = op->before ? 0 : bytes; /* it finds its rows here */
        l->remote_bytes = bytes * (double)bench_rows(c, true);
        l->crossed_bytes = bytes * (double)c->gpus.crossed_rows;
        l->logical = bytes * (double)bench_rows(c, false) / (double)c->p.ranks / l->ns;
    }
    if (bench_rate(c) > 0) {
        l->limit_ns = (on_gpus(c) ? l->crossed_bytes : l->moved_bytes) / bench_rate(c);
    }
    if (l->limit_ns > 0 && c->gpus.local > 0 && !bench_is_ll(op)) {
        const double local = l->moved_bytes / c->gpus.num_devices / c->gpus.local;
        l->goal_ns = GOAL_NS + GOAL_TIMES * (local > l->limit_ns ? local : l->limit_ns);
    }
    const struct bench_op *before = index > 0 ? c->items[index - 1].op : op;
    if (!op->cached && before->cached && before->form == op->form && before->kind == op->kind) {
        l->extra_ns = l->ns - (double)c->result[index - 1][mode].p50_ns;
    }
    return result->p50_ns != 0;
}

static void print_chain(const struct bench_case *c) {
    if (c->p.ll) {
        printf(
            "low latency: an operation's time is that of a chain, without the host between its "
            "links, by\n       their number (%d); of a half what a second one takes behind the "
            "first, the other\n       halves outside of the time; cold: what 4 take behind "
            "others that write 128 MiB\n",
            BENCH_CHAIN);
    }
}

/* ---- for people: host --------------------------------------------------------------------- */

static struct text groups_text(const struct bench_params *p) {
    struct text t = {""};
    if (p->routing == BENCH_GROUPED) {
        snprintf(t.s, sizeof(t.s), " (%d of %d groups)", (int)p->topk_groups, (int)p->groups);
    }
    return t;
}

static void print_rows(const struct bench_case *c) {
    printf("rows: T = %s in, N = %s received, R = %s of them by other ranks, S = %s "
           "selections;\n",
           text_count(c->p.ranks * c->p.tokens).s, text_count(bench_rows(c, false)).s,
           text_count(bench_rows(c, true)).s, text_count(c->selections).s);
}

static void host_heading(const struct bench_case *c) {
    const struct bench_params *p = &c->p;
    printf("libep %s, host backend: %d ranks as %s on %d cores\n"
           "%d tokens per rank, hidden %d, %s, top-%d of %d experts, %s routing%s, %s output\n"
           "%d iterations after %d, seed %d, workers %d, data %s; arena %s per rank\n",
           text_version().s, (int)p->ranks, p->threads ? "threads" : "processes",
           tool_num_cores(), (int)p->tokens, (int)p->hidden, bench_types(p), (int)p->topk,
           (int)p->experts, bench_routing_names[p->routing], groups_text(p).s,
           p->ll         ? "packed"
           : p->expanded ? "expanded"
                         : "compact",
           (int)p->iters, (int)p->warmup, (int)p->seed, (int)p->workers,
           p->no_check ? "not checked" : "checked", text_bytes((double)c->arena_bytes).s);
    print_rows(c);
    printf("busiest rank %.2f x the mean\n\n", imbalance(c, p->expanded));
}

static void host_line(const struct bench_case *c, const struct bench_line *l) {
    printf("%-28s %9s %9s", bench_item_name(&c->p, l->item).s, text_ns(l->ns).s,
           text_ns((double)l->result->p99_ns).s);
    if (l->moved_bytes > 0) {
        printf("  %9s %9s  %9s %4.0f %%  %8.2f", text_bytes(l->moved_bytes).s,
               text_bytes(l->remote_bytes).s, text_ns(l->limit_ns).s, 100 * l->limit_ns / l->ns,
               l->logical);
    }
    putchar('\n');
}

static void print_row_bytes(const struct bench_case *c) {
    int row = (int)bench_row_bytes(&c->p, c->p.ll ? BENCH_FP8 : c->p.dtype);
    int scales = (int)bench_scale_bytes(&c->p, c->p.ll ? BENCH_FP8 : c->p.dtype);
    printf("\nmoved: bytes all ranks must read and write, of rows of %d + %d (%s) and %d (%s) "
           "bytes\n",
           row, scales, c->p.ll ? "fp8" : "dispatch", (int)c->row_bytes,
           c->p.ll ? "bf16" : "combine");
}

static void host_text(const struct bench_case *c) {
    struct bench_line l;
    host_heading(c);
    printf("%-28s %9s %9s  %9s %9s  %9s %6s  %8s\n", "first call to last output", "p50", "p99",
           "moved", "remote", "limit", "share", "logical");
    for (int i = 0; i < c->num_items; i++) {
        if (bench_line(c, i, BENCH_EAGER, &l) && l.item->op->kind != BENCH_COPY) {
            host_line(c, &l);
        }
    }
    print_row_bytes(c);
    for (int i = 0; i < c->num_items; i++) {
        if (bench_line(c, i, BENCH_EAGER, &l) && l.moved_bytes > 0 &&
            (l.item->op->kind != BENCH_DISPATCH || !l.item->op->cached)) {
            const char *answers = l.item->op->answers;
            printf("  %-*s %s%s%s\n", c->p.ll ? 28 : 20, bench_item_name(&c->p, l.item).s,
                   l.moved, answers ? "; bf16: " : "", answers ? answers : "");
        }
    }
    printf(
        "limit: moved / %.2f GB/s, what memcpy of rows reached in this run, read + write, all "
        "ranks at once,\n       one thread each\n"
        "logical: GB/s as DeepEP counts: rows received per rank, its own included, over p50\n",
        bench_rate(c));
    print_chain(c);
}

/* ---- for people: GPUs --------------------------------------------------------------------- */

static void print_link(const struct bench_case *c) {
    const struct bench_gpus *gpus = &c->gpus;
    if (gpus->num_devices < 2) {
        printf("link: all ranks are on one GPU, so nothing crosses a link\n");
    } else if (bench_rate(c) == 0) {
        printf("link: not measured (%s)\n",
               gpus->links_why[0] != '\0' ? gpus->links_why : "not asked");
    } else {
        printf("link: %.0f GB/s per GPU and direction, all GPUs sending to all others by copy "
               "engine\n      (before %.0f, after %.0f;",
               bench_rate(c), gpus->first, gpus->last);
        if (gpus->at_once > 0) {
            printf(" one receiver after the other %.0f, to all at once %.0f)\n", gpus->in_turn,
                   gpus->at_once);
        } else {
            printf(" no SM takes part)\n");
        }
    }
    if (!gpus->all_reach) {
        printf("      GPUs that cannot reach each other: arenas lie in pinned host memory, and "
               "rows cross\n      PCIe; see `%s doctor`\n",
               tool_program);
    }
}

static void print_start(const struct bench_case *c) {
    const struct bench_gpus *gpus = &c->gpus;
    if (!gpus->held) {
        printf("start: streams cannot be held back here: times include the host's launches\n");
    } else if (c->p.ranks > 1) {
        printf("start: ranks are released within %.1f us of each other (median; p99 %.1f, most "
               "%.1f)\n",
               (double)gpus->skew_p50_ns / 1000, (double)gpus->skew_p99_ns / 1000,
               (double)gpus->skew_max_ns / 1000);
    }
    if (gpus->num_devices < c->p.ranks && !c->p.threads) {
        printf("turns: %d processes share %d GPU%s and take turns: times say nothing about "
               "speed\n",
               (int)c->p.ranks, gpus->num_devices, gpus->num_devices > 1 ? "s" : "");
    }
}

static void gpu_heading(const struct bench_case *c) {
    const struct bench_params *p = &c->p;
    const struct bench_gpus *gpus = &c->gpus;
    char workers[48] = "SMs: libep's choice";
    if (p->workers > 0) {
        snprintf(workers, sizeof(workers), "SMs: %d asked for", (int)p->workers);
    }
    printf("libep %s, CUDA backend: %d ranks as %s on %s, driver for CUDA %d.%d\n"
           "%d tokens per rank, hidden %d, top-%d of %d experts, %s routing%s\n"
           "%d iterations after %d, seed %d, %s, data %s; arena %s per rank\n",
           text_version().s, (int)p->ranks, p->threads ? "threads" : "processes", gpus->devices,
           gpus->driver_version / 1000, gpus->driver_version % 1000 / 10, (int)p->tokens,
           (int)p->hidden, (int)p->topk, (int)p->experts, bench_routing_names[p->routing],
           groups_text(p).s, (int)p->iters, (int)p->warmup, (int)p->seed, workers,
           p->no_check ? "not checked" : "checked", text_bytes((double)c->arena_bytes).s);
    print_rows(c);
    printf("busiest rank %.2f x the mean (expanded %.2f); at most %s rows cross into or out of "
           "one GPU\n",
           imbalance(c, false), imbalance(c, true), text_count(gpus->crossed_rows).s);
    print_link(c);
    print_start(c);
    putchar('\n');
}

static void gpu_line(const struct bench_case *c, const struct bench_line *l) {
    bool second = l->mode > 0 && c->result[l->index][l->mode - 1].p50_ns != 0;
    printf("%-34s %-5s %8.1f %8.1f %8.1f", second ? "" : bench_item_name(&c->p, l->item).s,
           bench_mode_names[l->mode], l->ns / 1000, (double)l->result->p99_ns / 1000,
           (double)l->result->max_ns / 1000);
    if (c->gpus.sms[l->index] > 0) {
        printf(" %4d", c->gpus.sms[l->index]);
    } else {
        printf(" %4s", "?");
    }
    if (l->limit_ns > 0) {
        printf(" %7.1f %4.0f %% %6.1f", l->limit_ns / 1000, 100 * l->limit_ns / l->ns,
               l->crossed_bytes / l->ns);
    } else if (l->moved_bytes > 0) {
        printf(" %7s %6s %6s", "-", "-", "-");
    }
    if (l->goal_ns > 0) {
        printf(" %6.1f", l->goal_ns / 1000);
    } else if (l->moved_bytes > 0) {
        printf(" %6s", "-");
    }
    if (l->moved_bytes > 0) {
        printf(" %7.1f", l->logical);
    }
    if (l->extra_ns != 0) {
        printf("  %+.1f us", l->extra_ns / 1000);
    }
    putchar('\n');
}

static void print_limit_bytes(const struct bench_case *c, int dtype) {
    int64_t row = bench_row_bytes(&c->p, dtype), scales = bench_scale_bytes(&c->p, dtype);
    char each[48];
    int len = snprintf(each, sizeof(each), "%lld", (long long)row);
    if (scales > 0) {
        snprintf(each + len, sizeof(each) - (size_t)len, " + %lld", (long long)scales);
    }
    printf("       %s %s rows of %s bytes, %s\n", text_count(c->gpus.crossed_rows).s,
           bench_dtype_names[dtype], each,
           text_bytes((double)(c->gpus.crossed_rows * (row + scales))).s);
}

static void gpu_legend(const struct bench_case *c) {
    printf("\ntimes: us from the release of all ranks to usable output, of the slowest rank of "
           "each iteration,\n       by events on the caller's stream\n");
    if (c->gpus.crossed_rows > 0 && bench_rate(c) > 0) {
        bool seen[BENCH_NUM_DTYPES] = {false};
        for (int i = 0; i < c->num_items; i++) {
            seen[c->items[i].dtype] = true;
        }
        printf("limit: us that the link needs for what crosses into or out of the busiest GPU, "
               "ids and weights\n       not counted:\n");
        for (int dtype = 0; dtype < BENCH_NUM_DTYPES; dtype++) {
            if (seen[dtype]) {
                print_limit_bytes(c, dtype);
            }
        }
        printf(
            "share: limit / p50. GB/s: the same bytes / p50\n"
            "goal: %d us + %.2f x the larger of the limit and of what is read and written by a "
            "GPU, at the\n      %.0f GB/s of a copy within its memory in this run\n",
            GOAL_NS / 1000, GOAL_TIMES, c->gpus.local);
    }
    print_chain(c);
    printf("DeepEP: GB/s as DeepEP counts: rows received per rank, its own included, over p50\n"
           "extra: what route and the first dispatch cost more than a cached dispatch\n");
}

static void gpu_text(const struct bench_case *c) {
    struct bench_line l;
    gpu_heading(c);
    printf("%-34s %-5s %8s %8s %8s %4s %7s %6s %6s %6s %7s  %s\n", "call to usable output, us",
           "", "p50", "p99", "max", "SMs", "limit", "share", "GB/s", "goal", "DeepEP", "extra");
    for (int i = 0; i < c->num_items * BENCH_NUM_MODES; i++) {
        if (bench_line(c, i / BENCH_NUM_MODES, i % BENCH_NUM_MODES, &l)) {
            gpu_line(c, &l);
        }
    }
    gpu_legend(c);
}

void bench_report_text(const struct bench_case *c) {
    if (on_gpus(c)) {
        gpu_text(c);
    } else {
        host_text(c);
    }
}

/* ---- of several cases ---------------------------------------------------------------------- */

static bool is_alike(const struct bench_params *a, const struct bench_params *b) {
    return a->hidden == b->hidden && a->topk == b->topk && a->experts == b->experts &&
           a->ranks == b->ranks;
}

/* The line through the medians of an item, eager: ns = *fixed + *each * tokens, with the least sum of
 * squares. False where there are no two numbers of tokens. */
static bool fit(struct bench_case *const *cases, int first, int num, int item, double *fixed,
                double *each) {
    double n = 0, t = 0, tt = 0, y = 0, ty = 0;
    for (int i = first; i < num; i++) {
        const double tokens = (double)cases[i]->p.tokens;
        const double ns = (double)cases[i]->result[item][BENCH_EAGER].p50_ns;
        if (is_alike(&cases[i]->p, &cases[first]->p)) {
            n += 1, t += tokens, tt += tokens * tokens, y += ns, ty += tokens * ns;
        }
    }
    const double spread = n * tt - t * t;
    *each = spread > 0 ? (n * ty - t * y) / spread : 0;
    *fixed = n > 0 ? (y - *each * t) / n : 0;
    return spread > 0;
}

void bench_report_growth(struct bench_case *const *cases, int num) {
    for (int first = 0; first < num; first++) {
        const struct bench_case *c = cases[first];
        double fixed = 0, each = 0;
        bool told = false;
        for (int i = 0; i < first; i++) {
            told = told || is_alike(&cases[i]->p, &c->p);
        }
        if (told || !fit(cases, first, num, 0, &fixed, &each)) {
            continue;
        }
        printf(
            "\n\nhow p50 grows with tokens, a straight line: hidden %d, top-%d of %d experts, "
            "%d ranks\n",
            (int)c->p.hidden, (int)c->p.topk, (int)c->p.experts, (int)c->p.ranks);
        for (int i = 0; i < c->num_items; i++) {
            fit(cases, first, num, i, &fixed, &each);
            if (c->items[i].op->kind != BENCH_COPY) {
                printf("%-34s %9.1f us + %8.2f us per 1000 tokens\n",
                       bench_item_name(&c->p, &c->items[i]).s, fixed / 1000, each);
            }
        }
    }
}
