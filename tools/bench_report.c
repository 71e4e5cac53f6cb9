/* SPDX-License-Identifier: MIT */
/*
 * What `ep bench` says: the table for people, CSV, JSON, and the arithmetic behind them.
 *
 * Owns the formulas of the limits. Must not print a figure without what it is made of: time
 * first, then bytes, then the share of what memcpy reached in the same run.
 */
#include "bench.h"

const char *const dtype_names[] = {"bf16", "fp8", "f32"};
const char *const routing_names[] = {"uniform", "grouped", "skewed", "file"};

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

static void print_heading(const struct bench_case *c) {
    const struct bench_params *p = &c->p;
    int64_t most = 0;
    for (int r = 0; r < p->ranks; r++) {
        most = c->output_rows[r] > most ? c->output_rows[r] : most;
    }
    int64_t rows = p->expanded ? c->selections : bench_rows(c, false);
    char groups[48] = "";
    if (p->routing == ROUTING_GROUPED) {
        snprintf(groups, sizeof groups, " (%d of %d groups)", (int)p->topk_groups,
                 (int)p->groups);
    }
    printf(
        "libep %s, host backend: %d ranks as %s on %d cores\n"
        "%d tokens per rank, hidden %d, %s, top-%d of %d experts, %s routing%s, %s output\n"
        "%d iterations after %d, seed %d, workers %d, data %s; arena %s per rank\n"
        "rows: T = %s in, N = %s received, R = %s of them by other ranks, S = %s selections;\n"
        "busiest rank %.2f x the mean\n\n",
        text_version().s, (int)p->ranks, p->threads ? "threads" : "processes", num_cores(),
        (int)p->tokens, (int)p->hidden, dtype_names[p->dtype], (int)p->topk, (int)p->experts,
        routing_names[p->routing], groups, p->expanded ? "expanded" : "compact", (int)p->iters,
        (int)p->warmup, (int)p->seed, (int)p->workers, p->no_check ? "not checked" : "checked",
        text_bytes((double)c->arena_bytes).s, text_count(p->ranks * p->tokens).s,
        text_count(bench_rows(c, false)).s, text_count(bench_rows(c, true)).s,
        text_count(c->selections).s, (double)(most * p->ranks) / (double)rows);
}

void report_text(const struct bench_case *c) {
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

static void case_members(const struct bench_case *c, char *out) {
    const struct bench_params *p = &c->p;
    int len = snprintf(
        out, MEMBERS_BYTES,
        "\"mode\": \"%s\", \"dtype\": \"%s\", \"routing\": \"%s\", \"output\": \"%s\", "
        "\"checked\": %s, \"memcpy_gbs\": %.4f",
        p->threads ? "threads" : "processes", dtype_names[p->dtype], routing_names[p->routing],
        p->expanded ? "expanded" : "compact", p->no_check ? "false" : "true",
        bench_memcpy_rate(c));
    static const char *const keys[] = {
        "ranks",       "tokens",       "hidden",      "topk",    "experts",     "groups",
        "topk_groups", "iters",        "warmup",      "workers", "seed",        "row_bytes",
        "scale_bytes", "answer_bytes", "arena_bytes", "rows",    "remote_rows", "selections"};
    const int64_t values[] = {p->ranks,
                              p->tokens,
                              p->hidden,
                              p->topk,
                              p->experts,
                              p->groups,
                              p->topk_groups,
                              p->iters,
                              p->warmup,
                              p->workers,
                              p->seed,
                              c->row_bytes,
                              c->scale_bytes,
                              c->answer_bytes,
                              c->arena_bytes,
                              bench_rows(c, false),
                              bench_rows(c, true),
                              c->selections};
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        len += snprintf(out + len, (size_t)(MEMBERS_BYTES - len), ", \"%s\": %lld", keys[i],
                        (long long)values[i]);
    }
}

static void phase_members(const struct bench_case *c, int phase, char *out) {
    struct bench_line line = bench_line(c, (enum bench_phase)phase);
    double ns = (double)c->p50[phase];
    snprintf(
        out, MEMBERS_BYTES,
        "\"phase\": \"%s\", \"p50_ns\": %.0f, \"p99_ns\": %lld, \"moved\": \"%s\", "
        "\"moved_bytes\": %.0f, \"remote_bytes\": %.0f, \"limit_ns\": %.0f, \"share\": %.4f, "
        "\"logical_gbs\": %.4f",
        line.key, ns, (long long)c->p99[phase], line.formula, line.limit_bytes,
        line.remote_bytes, line.limit_ns, line.limit_ns / ns, line.logical_bytes / ns);
}

/* `"key": value` members as a line of keys or of values. */
static void csv_members(FILE *out, const char *s, bool keys) {
    while (*s != '\0') {
        const char *colon = strstr(s, ": ");
        const char *end = strstr(colon, ", ");
        end = end != NULL ? end : colon + strlen(colon);
        fprintf(out, "%.*s", (int)((keys ? colon - 1 : end) - (keys ? s + 1 : colon + 2)),
                keys ? s + 1 : colon + 2);
        s = *end != '\0' ? end + 2 : end;
        fputc(*s != '\0' ? ',' : '\n', out);
    }
}

void report_csv(FILE *out, const struct bench_case *c, bool header) {
    char members[2 * MEMBERS_BYTES];
    for (int phase = header ? -1 : 0; phase < NUM_PHASES; phase++) {
        if (phase < 0 || c->p50[phase] != 0) {
            case_members(c, members);
            strcat(members, ", ");
            phase_members(c, phase < 0 ? 0 : phase, members + strlen(members));
            csv_members(out, members, phase < 0);
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
    for (int phase = 0; phase < NUM_PHASES; phase++) {
        if (c->p50[phase] != 0) {
            phase_members(c, phase, members);
            fprintf(out, "%s\n    {%s}", phase > 0 ? "," : "", members);
        }
    }
    fprintf(out, "]}");
}

void report_json(FILE *out, struct bench_case *const *cases, int num_cases) {
    fprintf(out, "{\"version\": \"%s\", \"backend\": \"host\", \"cores\": %d, \"knobs\": {",
            text_version().s, num_cores());
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
