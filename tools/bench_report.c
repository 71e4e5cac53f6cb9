/* SPDX-License-Identifier: MIT */
/*
 * What `ep bench` says: the table for people, CSV, JSON, and the arithmetic behind them.
 *
 * Owns the formulas of the limits. Must not print a figure without what it is made of: time
 * first, then bytes, then the share of what memcpy reached in the same run.
 */
#include "tools/bench.h"

const char *const dtype_names[] = {"bf16", "fp8", "f32"};
const char *const routing_names[] = {"uniform", "grouped", "skewed", "half", "file"};
const ep_dtype bench_row_types[] = {EP_BF16, EP_F8E4M3, EP_F32};

static const char *const phase_names[NUM_PHASES][2] = {
    {"memcpy of rows", "memcpy"},
    {"route", "route"},
    {"dispatch to arena", "dispatch_arena"},
    {"dispatch to arena, cached", "dispatch_arena_cached"},
    {"dispatch to memory", "dispatch_memory"},
    {"dispatch to memory, cached", "dispatch_memory_cached"},
    {"combine from arena", "combine_arena"},
    {"combine from memory", "combine_memory"},
    {"", ""},
};

double bench_memcpy_rate(const struct bench_case *c) {
    return (double)(c->memcpy_bytes * c->p.ranks) / (double)c->p50[PHASE_MEMCPY];
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

/* T rows go in, N are received, R of them by other ranks, S selections are in expanded output. */
struct bench_line bench_line(const struct bench_case *c, enum bench_phase phase) {
    struct bench_line line = {phase_names[phase][0], phase_names[phase][1], "", 0, 0, 0, 0};
    bool combine = phase == PHASE_COMBINE_ARENA || phase == PHASE_COMBINE_MEMORY;
    bool arena = phase == PHASE_DISPATCH_ARENA || phase == PHASE_DISPATCH_ARENA_CACHED;
    if (phase == PHASE_ROUTE || phase == PHASE_MEMCPY) {
        return line;
    }
    int64_t t = c->p.ranks * c->p.tokens;
    int64_t n = bench_rows(c, false);
    int64_t r = bench_rows(c, true);
    int64_t s = c->selections;
    double bytes = (double)(combine ? c->answer_bytes : c->row_bytes + c->scale_bytes);
    if (c->p.expanded) {
        line.formula = combine ? "read S + write N + read N + write T"
                               : "read T + write N + read N + write S";
        line.limit_bytes = bytes * (double)(t + n + n + s);
    } else if (arena) {
        line.formula = "read T + write N";
        line.limit_bytes = bytes * (double)(t + n);
    } else if (combine) { /* answers of a rank to itself are read where they are */
        line.formula = "read R + write R + read N + write T";
        line.limit_bytes = bytes * (double)(r + r + n + t);
    } else {
        line.formula = "read T + write N + read N + write N";
        line.limit_bytes = bytes * (double)(t + n + n + n);
    }
    line.remote_bytes = bytes * (double)r;
    line.logical_bytes = bytes * (double)n / (double)c->p.ranks;
    line.limit_ns = line.limit_bytes / bench_memcpy_rate(c);
    return line;
}

struct text bench_groups(const struct bench_params *p) {
    struct text t = {""};
    if (p->routing == ROUTING_GROUPED) {
        snprintf(t.s, sizeof(t.s), " (%d of %d groups)", (int)p->topk_groups, (int)p->groups);
    }
    return t;
}

double bench_imbalance(const struct bench_case *c, bool expanded) {
    int64_t most = 0, sum = 0;
    for (int r = 0; r < c->p.ranks; r++) {
        int64_t rows = bench_output_rows(c, r, expanded);
        most = rows > most ? rows : most;
        sum += rows;
    }
    return (double)(most * c->p.ranks) / (double)sum;
}

static void print_heading(const struct bench_case *c) {
    const struct bench_params *p = &c->p;
    printf(
        "libep %s, host backend: %d ranks as %s on %d cores\n"
        "%d tokens per rank, hidden %d, %s, top-%d of %d experts, %s routing%s, %s output\n"
        "%d iterations after %d, seed %d, workers %d, data %s; arena %s per rank\n"
        "rows: T = %s in, N = %s received, R = %s of them by other ranks, S = %s selections;\n"
        "busiest rank %.2f x the mean\n\n",
        text_version().s, (int)p->ranks, p->threads ? "threads" : "processes", num_cores(),
        (int)p->tokens, (int)p->hidden, dtype_names[p->dtype], (int)p->topk, (int)p->experts,
        routing_names[p->routing], bench_groups(p).s, p->expanded ? "expanded" : "compact",
        (int)p->iters, (int)p->warmup, (int)p->seed, (int)p->workers,
        p->no_check ? "not checked" : "checked", text_bytes((double)c->arena_bytes).s,
        text_count(p->ranks * p->tokens).s, text_count(bench_rows(c, false)).s,
        text_count(bench_rows(c, true)).s, text_count(c->selections).s,
        bench_imbalance(c, p->expanded));
}

void report_text(const struct bench_case *c) {
    if (c->cuda) {
        cuda_report_text(c);
        return;
    }
    print_heading(c);
    printf("%-28s %9s %9s  %9s %9s  %9s %6s  %8s\n", "first call to last output", "p50", "p99",
           "moved", "remote", "limit", "share", "logical");
    for (int i = 0; i < NUM_PHASES; i++) {
        struct bench_line line = bench_line(c, (enum bench_phase)i);
        if (c->p50[i] == 0 || i == PHASE_MEMCPY) {
            continue;
        }
        printf("%-28s %9s %9s", line.name, text_ns((double)c->p50[i]).s,
               text_ns((double)c->p99[i]).s);
        if (line.limit_bytes > 0) {
            printf("  %9s %9s  %9s %4.0f %%  %8.2f", text_bytes(line.limit_bytes).s,
                   text_bytes(line.remote_bytes).s, text_ns(line.limit_ns).s,
                   100 * line.limit_ns / (double)c->p50[i],
                   line.logical_bytes / (double)c->p50[i]);
        }
        putchar('\n');
    }
    printf("\nmoved: bytes all ranks must read and write, of rows of %d + %d (dispatch) and %d "
           "(combine) bytes\n",
           (int)c->row_bytes, (int)c->scale_bytes, (int)c->answer_bytes);
    for (int i = 0; i < NUM_PHASES; i++) {
        struct bench_line line = bench_line(c, (enum bench_phase)i);
        if (c->p50[i] != 0 && line.limit_bytes > 0 && i != PHASE_DISPATCH_ARENA_CACHED &&
            i != PHASE_DISPATCH_MEMORY_CACHED) {
            printf("  %-20s %s\n", line.name, line.formula);
        }
    }
    printf(
        "limit: moved / %.2f GB/s, what memcpy of rows reached in this run, read + write, all "
        "ranks at once,\n       one thread each\n"
        "logical: GB/s as DeepEP counts: rows received per rank, its own included, over p50\n",
        bench_memcpy_rate(c));
}

/* ---- for programs: JSON members, whose names and values are the columns of the CSV ------- */

enum { MEMBERS_BYTES = 2048 };

/* Appends to a text of MEMBERS_BYTES. */
static void add(char *out, const char *fmt, ...) EPI_PRINTF(2, 3);
static void add(char *out, const char *fmt, ...) {
    size_t len = strlen(out);
    va_list args;
    va_start(args, fmt);
    vsnprintf(out + len, MEMBERS_BYTES - len, fmt, args);
    va_end(args);
}

static void case_members(const struct bench_case *c, char *out) {
    const struct bench_params *p = &c->p;
    snprintf(out, MEMBERS_BYTES, "\"mode\": \"%s\"", p->threads ? "threads" : "processes");
    if (!c->cuda) {
        add(out, ", \"dtype\": \"%s\"", dtype_names[p->dtype]);
    }
    add(out, ", \"routing\": \"%s\"", routing_names[p->routing]);
    if (!c->cuda) {
        add(out, ", \"output\": \"%s\"", p->expanded ? "expanded" : "compact");
    }
    add(out, ", \"checked\": %s", p->no_check ? "false" : "true");
    if (!c->cuda) {
        add(out, ", \"memcpy_gbs\": %.4f", bench_memcpy_rate(c));
    }
    const struct {
        const char *key;
        int64_t value;
        bool host; /* only */
    } numbers[] = {{"ranks", p->ranks, false},
                   {"tokens", p->tokens, false},
                   {"hidden", p->hidden, false},
                   {"topk", p->topk, false},
                   {"experts", p->experts, false},
                   {"groups", p->groups, false},
                   {"topk_groups", p->topk_groups, false},
                   {"iters", p->iters, false},
                   {"warmup", p->warmup, false},
                   {"workers", p->workers, false},
                   {"seed", p->seed, false},
                   {"row_bytes", c->row_bytes, true},
                   {"scale_bytes", c->scale_bytes, true},
                   {"answer_bytes", c->answer_bytes, true},
                   {"arena_bytes", c->arena_bytes, false},
                   {"rows", bench_rows(c, false), false},
                   {"remote_rows", bench_rows(c, true), false},
                   {"selections", c->selections, false}};
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        if (!c->cuda || !numbers[i].host) {
            add(out, ", \"%s\": %lld", numbers[i].key, (long long)numbers[i].value);
        }
    }
    if (c->cuda) {
        add(out, ", ");
        cuda_case_members(c, out + strlen(out), MEMBERS_BYTES - strlen(out));
    }
}

/* The lines of a case: phases, or operations in both modes. */
static int num_lines(const struct bench_case *c) {
    return c->cuda ? NUM_CUDA_OPS * NUM_MODES : NUM_PHASES;
}

static bool is_measured(const struct bench_case *c, int i) {
    return (c->cuda ? c->cuda->result[i / NUM_MODES][i % NUM_MODES].p50_ns : c->p50[i]) != 0;
}

static void phase_members(const struct bench_case *c, int i, char *out) {
    if (c->cuda) {
        cuda_result_members(c, i / NUM_MODES, i % NUM_MODES, out, MEMBERS_BYTES);
        return;
    }
    struct bench_line line = bench_line(c, (enum bench_phase)i);
    double ns = (double)c->p50[i];
    snprintf(
        out, MEMBERS_BYTES,
        "\"phase\": \"%s\", \"p50_ns\": %.0f, \"p99_ns\": %lld, \"moved\": \"%s\", "
        "\"moved_bytes\": %.0f, \"remote_bytes\": %.0f, \"limit_ns\": %.0f, \"share\": %.4f, "
        "\"logical_gbs\": %.4f",
        line.key, ns, (long long)c->p99[i], line.formula, line.limit_bytes, line.remote_bytes,
        line.limit_ns, line.limit_ns / ns, line.logical_bytes / ns);
}

/* `"key": value` members as a line of keys or of values. */
static void csv_members(FILE *out, const char *s, bool keys) {
    while (*s != '\0') {
        const char *colon = strstr(s, ": ");
        const char *end = strstr(colon, ", ");
        end = end ? end : colon + strlen(colon);
        fprintf(out, "%.*s", (int)((keys ? colon - 1 : end) - (keys ? s + 1 : colon + 2)),
                keys ? s + 1 : colon + 2);
        s = *end != '\0' ? end + 2 : end;
        fputc(*s != '\0' ? ',' : '\n', out);
    }
}

void report_csv(FILE *out, const struct bench_case *c, bool header) {
    char members[2 * MEMBERS_BYTES];
    for (int i = header ? -1 : 0; i < num_lines(c); i++) {
        if (i < 0 || is_measured(c, i)) {
            case_members(c, members);
            strcat(members, ", ");
            phase_members(c, i < 0 ? 0 : i, members + strlen(members));
            csv_members(out, members, i < 0);
        }
    }
}

static void json_case(FILE *out, const struct bench_case *c) {
    char members[MEMBERS_BYTES];
    int64_t ranks = c->p.ranks;
    case_members(c, members);
    fprintf(out, "{%s,\n   \"rows_from_to\": [", members);
    for (int64_t i = 0; i < ranks * ranks; i++) {
        fprintf(out, "%s%lld%s", i % ranks == 0 ? "[" : "",
                (long long)c->traffic[i / ranks][i % ranks],
                i % ranks < ranks - 1   ? ", "
                : i + 1 < ranks * ranks ? "], "
                                        : "]");
    }
    fprintf(out, "],\n   \"phases\": [");
    for (int i = 0, num = 0; i < num_lines(c); i++) {
        if (is_measured(c, i)) {
            phase_members(c, i, members);
            fprintf(out, "%s\n    {%s}", num++ > 0 ? "," : "", members);
        }
    }
    fprintf(out, "]}");
}

void report_json(FILE *out, struct bench_case *const *cases, int num_cases) {
    bool cuda = num_cases > 0 && cases[0]->cuda;
    fprintf(out, "{\"version\": \"%s\", \"backend\": \"%s\", \"cores\": %d, \"knobs\": {",
            text_version().s, cuda ? "cuda" : "host", num_cores());
    for (size_t i = 0; i < epi_opt_count(); i++) {
        fprintf(out, "%s\"%s\": ", i > 0 ? ", " : "", epi_opt_info(i)->name);
        text_json(out, epi_opt_info(i)->value);
    }
    fprintf(out, "},\n \"cases\": [");
    for (int i = 0; i < num_cases; i++) {
        fprintf(out, "%s\n  ", i > 0 ? "," : "");
        json_case(out, cases[i]);
    }
    fprintf(out, "]}\n");
}
