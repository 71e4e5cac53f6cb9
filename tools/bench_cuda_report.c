/* SPDX-License-Identifier: MIT */
/*
 * What `ep bench --device cuda` says: the table for people and the members of CSV and JSON.
 *
 * Owns the arithmetic behind them. Must not print a rate without the time it is of: time from
 * call to usable output first, then the bytes that crossed the link as a share of what the link
 * reached in the same run, then DeepEP's figure for comparison.
 */
#include "tools/bench.h"

double cuda_link_rate(const struct bench_case *c) {
    return c->cuda->first > c->cuda->last ? c->cuda->first : c->cuda->last;
}

/* Of rows and scales; ids and weights are not counted. */
static double bytes_of_row(const struct bench_case *c, int op) {
    int dtype = cuda_dtype(&c->p, op);
    return (double)(bench_row_bytes(&c->p, dtype) + bench_scale_bytes(&c->p, dtype));
}

/* A combine sends back what the dispatch brought, so the most in or out is the same. */
static double crossed_bytes(const struct bench_case *c, int op) {
    return cuda_ops[op].kind == CUDA_ROUTE
               ? 0
               : (double)c->cuda->crossed_rows * bytes_of_row(c, op);
}

static double limit_ns(const struct bench_case *c, int op) {
    double rate = cuda_link_rate(c);
    return rate > 0 ? crossed_bytes(c, op) / rate : 0;
}

static double logical_rate(const struct bench_case *c, int op, double ns) {
    double rows = (double)bench_rows(c, false) / (double)c->p.ranks;
    return cuda_ops[op].kind == CUDA_ROUTE ? 0 : rows * bytes_of_row(c, op) / ns;
}

/* What route and the exchange of counts add to a dispatch; 0: not known, or not asked. */
static double extra_ns(const struct bench_case *c, int op, int mode) {
    bool uncached = cuda_ops[op].kind == CUDA_DISPATCH && !cuda_ops[op].cached;
    double cached_ns = uncached ? (double)c->cuda->result[op - 1][mode].p50_ns : 0;
    return cached_ns > 0 ? (double)c->cuda->result[op][mode].p50_ns - cached_ns : 0;
}

/* ---- for people -------------------------------------------------------------------------- */

static void print_link(const struct bench_case *c) {
    const struct bench_cuda *cuda = c->cuda;
    if (cuda->num_devices < 2) {
        printf("link: all ranks are on one GPU, so nothing crosses a link\n");
    } else if (cuda_link_rate(c) == 0) {
        printf("link: not measured (%s)\n",
               cuda->links_why[0] != '\0' ? cuda->links_why : "not asked");
    } else {
        printf("link: %.0f GB/s per GPU and direction, all GPUs sending to all others by copy "
               "engine\n      (before %.0f, after %.0f;",
               cuda_link_rate(c), cuda->first, cuda->last);
        if (cuda->at_once > 0) {
            printf(" one receiver after the other %.0f, to all at once %.0f)\n", cuda->in_turn,
                   cuda->at_once);
        } else {
            printf(" no SM takes part)\n");
        }
    }
    if (!cuda->all_reach) {
        printf("      GPUs that cannot reach each other: arenas lie in pinned host memory, and "
               "rows cross\n      PCIe; see `%s doctor`\n",
               tool_program);
    }
}

static void print_heading(const struct bench_case *c) {
    const struct bench_params *p = &c->p;
    const struct bench_cuda *cuda = c->cuda;
    char workers[48] = "SMs: libep's choice";
    if (p->workers > 0) {
        snprintf(workers, sizeof(workers), "SMs: %d asked for", (int)p->workers);
    }
    printf("libep %s, CUDA backend: %d ranks as %s on %s, driver for CUDA %d.%d\n"
           "%d tokens per rank, hidden %d, top-%d of %d experts, %s routing%s\n"
           "%d iterations after %d, seed %d, %s, data %s; arena %s per rank\n"
           "rows: T = %s in, N = %s received, R = %s of them by other ranks, S = %s "
           "selections;\n"
           "busiest rank %.2f x the mean (expanded %.2f); at most %s rows cross into or out of "
           "one GPU\n",
           text_version().s, (int)p->ranks, p->threads ? "threads" : "processes", cuda->devices,
           cuda->driver_version / 1000, cuda->driver_version % 1000 / 10, (int)p->tokens,
           (int)p->hidden, (int)p->topk, (int)p->experts, routing_names[p->routing],
           bench_groups(p).s, (int)p->iters, (int)p->warmup, (int)p->seed, workers,
           p->no_check ? "not checked" : "checked", text_bytes((double)c->arena_bytes).s,
           text_count(p->ranks * p->tokens).s, text_count(bench_rows(c, false)).s,
           text_count(bench_rows(c, true)).s, text_count(c->selections).s,
           bench_imbalance(c, false), bench_imbalance(c, true),
           text_count(cuda->crossed_rows).s);
    print_link(c);
    if (!cuda->held) {
        printf("start: streams cannot be held back here: times include the host's launches\n");
    } else if (p->ranks > 1) {
        printf("start: ranks are released within %.1f us of each other (median; p99 %.1f, most "
               "%.1f)\n",
               (double)cuda->skew_p50_ns / 1000, (double)cuda->skew_p99_ns / 1000,
               (double)cuda->skew_max_ns / 1000);
    }
    if (cuda->num_devices < p->ranks && !p->threads) {
        printf("turns: %d processes share %d GPU%s and take turns: times say nothing about "
               "speed\n",
               (int)p->ranks, cuda->num_devices, cuda->num_devices > 1 ? "s" : "");
    }
    putchar('\n');
}

static void print_line(const struct bench_case *c, int op, int mode, bool named) {
    const struct cuda_result *r = &c->cuda->result[op][mode];
    double ns = (double)r->p50_ns;
    printf("%-34s %-5s %8.1f %8.1f %8.1f", named ? cuda_name(&c->p, op).s : "",
           cuda_modes[mode], ns / 1000, (double)r->p99_ns / 1000, (double)r->max_ns / 1000);
    if (c->cuda->sms[op] > 0) {
        printf(" %4d", c->cuda->sms[op]);
    } else {
        printf(" %4s", "?");
    }
    if (limit_ns(c, op) > 0) {
        printf(" %7.1f %4.0f %% %6.1f", limit_ns(c, op) / 1000, 100 * limit_ns(c, op) / ns,
               crossed_bytes(c, op) / ns);
    } else if (cuda_ops[op].kind != CUDA_ROUTE) {
        printf(" %7s %6s %6s", "-", "-", "-");
    }
    if (cuda_ops[op].kind != CUDA_ROUTE) {
        printf(" %7.1f", logical_rate(c, op, ns));
    }
    double extra = extra_ns(c, op, mode);
    if (extra != 0) {
        printf("  %+.1f us", extra / 1000);
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
    printf("       %s %s rows of %s bytes, %s\n", text_count(c->cuda->crossed_rows).s,
           dtype_names[dtype], each,
           text_bytes((double)(c->cuda->crossed_rows * (row + scales))).s);
}

static void print_legend(const struct bench_case *c) {
    printf("\ntimes: us from the release of all ranks to usable output, of the slowest rank of "
           "each iteration,\n       by events on the caller's stream\n");
    if (c->cuda->crossed_rows > 0 && cuda_link_rate(c) > 0) {
        printf("limit: us that the link needs for what crosses into or out of the busiest GPU, "
               "ids and weights\n       not counted:\n");
        for (int dtype = 0; dtype <= DTYPE_F32; dtype++) {
            if (cuda_dtypes(&c->p) >> dtype & 1) {
                print_limit_bytes(c, dtype);
            }
        }
        printf("share: limit / p50. GB/s: the same bytes / p50\n");
    }
    printf("DeepEP: GB/s as DeepEP counts: rows received per rank, its own included, over p50\n"
           "extra: what route and the first dispatch cost more than a cached dispatch\n");
}

void cuda_report_text(const struct bench_case *c) {
    print_heading(c);
    printf("%-34s %-5s %8s %8s %8s %4s %7s %6s %6s %7s  %s\n", "call to usable output, us", "",
           "p50", "p99", "max", "SMs", "limit", "share", "GB/s", "DeepEP", "extra");
    for (int op = 0; op < NUM_CUDA_OPS; op++) {
        bool named = true;
        for (int mode = 0; mode < NUM_MODES; mode++) {
            if (c->cuda->result[op][mode].p50_ns != 0) {
                print_line(c, op, mode, named);
                named = false;
            }
        }
    }
    print_legend(c);
}

/* ---- for programs ------------------------------------------------------------------------ */

void cuda_case_members(const struct bench_case *c, char *out, size_t room) {
    const struct bench_cuda *cuda = c->cuda;
    char devices[sizeof(cuda->devices)];
    for (size_t i = 0; i < sizeof(devices); i++) { /* a comma would end a CSV column */
        char ch = cuda->devices[i];
        devices[i] = ch;
        if (ch == ',') {
            devices[i] = ';';
        }
    }
    snprintf(out, room,
             "\"devices\": \"%s\", \"num_devices\": %d, \"driver\": %d, \"peer_access\": %s, "
             "\"held\": %s, \"link_gbs\": %.2f, \"link_before_gbs\": %.2f, \"link_after_gbs\": "
             "%.2f, \"link_in_turn_gbs\": %.2f, \"link_at_once_gbs\": %.2f, \"skew_p50_ns\": "
             "%lld, \"skew_p99_ns\": %lld, \"skew_max_ns\": %lld, \"crossed_rows\": %lld",
             devices, cuda->num_devices, cuda->driver_version,
             cuda->all_reach ? "true" : "false", cuda->held ? "true" : "false",
             cuda_link_rate(c), cuda->first, cuda->last, cuda->in_turn, cuda->at_once,
             (long long)cuda->skew_p50_ns, (long long)cuda->skew_p99_ns,
             (long long)cuda->skew_max_ns, (long long)cuda->crossed_rows);
}

void cuda_result_members(const struct bench_case *c, int op, int mode, char *out, size_t room) {
    const struct cuda_result *r = &c->cuda->result[op][mode];
    int dtype = cuda_dtype(&c->p, op);
    bool typed = cuda_ops[op].kind != CUDA_ROUTE;
    double ns = r->p50_ns > 0 ? (double)r->p50_ns : 1;
    snprintf(out, room,
             "\"phase\": \"%s\", \"dtype\": \"%s\", \"launch\": \"%s\", \"p50_ns\": %lld, "
             "\"p99_ns\": %lld, \"max_ns\": %lld, \"sms\": %d, \"row_bytes\": %lld, "
             "\"scale_bytes\": %lld, \"crossed_bytes\": %.0f, \"limit_ns\": %.0f, \"share\": "
             "%.4f, \"crossed_gbs\": %.3f, \"deepep_gbs\": %.3f, \"extra_ns\": %.0f",
             cuda_ops[op].key, typed ? dtype_names[dtype] : "", cuda_modes[mode],
             (long long)r->p50_ns, (long long)r->p99_ns, (long long)r->max_ns, c->cuda->sms[op],
             typed ? (long long)bench_row_bytes(&c->p, dtype) : 0,
             typed ? (long long)bench_scale_bytes(&c->p, dtype) : 0, crossed_bytes(c, op),
             limit_ns(c, op), limit_ns(c, op) / ns, crossed_bytes(c, op) / ns,
             logical_rate(c, op, ns), extra_ns(c, op, mode));
}
