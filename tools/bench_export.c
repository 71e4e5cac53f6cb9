/* SPDX-License-Identifier: MIT */
/*
 * What `ep bench` says about cases to programs: CSV and JSON. Both are made of the same
 * members, a line of them for each operation and mode: the names of JSON are the columns of
 * CSV.
 *
 * Must not rename or reorder a member: others read them.
 */
#include "tools/bench.h"

struct members {
    char s[4096];
};

EPI_PRINTF(3, 4)
static void add(struct members *m, const char *key, const char *fmt, ...) {
    size_t len = strlen(m->s);
    va_list args;
    len += (size_t)snprintf(m->s + len, sizeof(m->s) - len, "%s\"%s\": ", len > 0 ? ", " : "",
                            key);
    va_start(args, fmt);
    vsnprintf(m->s + len, sizeof(m->s) - len, fmt, args);
    va_end(args);
}

static void add_int(struct members *m, const char *key, int64_t n) {
    add(m, key, "%lld", (long long)n);
}

static void add_bool(struct members *m, const char *key, bool b) {
    add(m, key, "%s", b ? "true" : "false");
}

static void add_gpus(struct members *m, const struct bench_case *c) {
    const struct bench_gpus *gpus = &c->gpus;
    char devices[sizeof(gpus->devices)];
    snprintf(devices, sizeof(devices), "%s", gpus->devices);
    for (char *s = devices; *s != '\0'; s++) {
        *s = *s == ',' ? ';' : *s; /* a comma would end a CSV column */
    }
    add(m, "devices", "\"%s\"", devices);
    add_int(m, "num_devices", gpus->num_devices);
    add_int(m, "driver", gpus->driver_version);
    add_bool(m, "peer_access", gpus->all_reach);
    add_bool(m, "held", gpus->held);
    add(m, "link_gbs", "%.2f", bench_rate(c));
    add(m, "link_before_gbs", "%.2f", gpus->first);
    add(m, "link_after_gbs", "%.2f", gpus->last);
    add(m, "local_gbs", "%.2f", gpus->local);
    add(m, "link_in_turn_gbs", "%.2f", gpus->in_turn);
    add(m, "link_at_once_gbs", "%.2f", gpus->at_once);
    add_int(m, "skew_p50_ns", gpus->skew_p50_ns);
    add_int(m, "skew_p99_ns", gpus->skew_p99_ns);
    add_int(m, "skew_max_ns", gpus->skew_max_ns);
    add_int(m, "crossed_rows", gpus->crossed_rows);
}

static void add_case(struct members *m, const struct bench_case *c) {
    const struct bench_params *p = &c->p;
    bool host = c->p.device == BENCH_HOST;
    add(m, "mode", "\"%s\"", p->threads ? "threads" : "processes");
    if (host) {
        add(m, "dtype", "\"%s\"", bench_types(p));
    }
    add(m, "routing", "\"%s\"", bench_routing_names[p->routing]);
    if (host) {
        add(m, "output", "\"%s\"", p->ll ? "packed" : p->expanded ? "expanded" : "compact");
    }
    add_bool(m, "checked", !p->no_check);
    if (host) {
        add(m, "memcpy_gbs", "%.4f", bench_rate(c));
    }
    add_int(m, "ranks", p->ranks);
    add_int(m, "tokens", p->tokens);
    add_int(m, "max_tokens", p->max_tokens > 0 ? p->max_tokens : p->tokens);
    add_int(m, "hidden", p->hidden);
    add_int(m, "topk", p->topk);
    add_int(m, "experts", p->experts);
    add_int(m, "groups", p->groups);
    add_int(m, "topk_groups", p->topk_groups);
    add_int(m, "iters", p->iters);
    add_int(m, "warmup", p->warmup);
    add_int(m, "workers", p->workers);
    add_int(m, "seed", p->seed);
    if (host) {
        add_int(m, "row_bytes", bench_row_bytes(p, bench_main_dtype(p)));
        add_int(m, "scale_bytes", c->scale_bytes);
        add_int(m, "answer_bytes", c->row_bytes);
    }
    add_int(m, "arena_bytes", c->arena_bytes);
    add_int(m, "rows", bench_rows(c, false));
    add_int(m, "remote_rows", bench_rows(c, true));
    add_int(m, "selections", c->selections);
    if (!host) {
        add_gpus(m, c);
    }
}

static void add_host_line(struct members *m, const struct bench_case *c,
                          const struct bench_line *l) {
    add(m, "phase", "\"%s\"", bench_item_key(&c->p, l->item).s);
    add_int(m, "p50_ns", l->result->p50_ns);
    add_int(m, "p99_ns", l->result->p99_ns);
    add(m, "moved", "\"%s\"", l->moved);
    add(m, "moved_bytes", "%.0f", l->moved_bytes);
    add(m, "remote_bytes", "%.0f", l->remote_bytes);
    add(m, "limit_ns", "%.0f", l->limit_ns);
    add(m, "share", "%.4f", l->limit_ns / l->ns);
    add(m, "logical_gbs", "%.4f", l->logical);
}

static void add_gpu_line(struct members *m, const struct bench_case *c,
                         const struct bench_line *l) {
    int dtype = l->item->dtype;
    bool typed = l->item->op->kind != BENCH_ROUTE;
    add(m, "phase", "\"%s\"", bench_item_key(&c->p, l->item).s);
    add(m, "dtype", "\"%s\"", typed ? bench_dtype_names[dtype] : "");
    add(m, "launch", "\"%s\"", bench_mode_names[l->mode]);
    add_int(m, "p50_ns", l->result->p50_ns);
    add_int(m, "p99_ns", l->result->p99_ns);
    add_int(m, "max_ns", l->result->max_ns);
    add_int(m, "sms", c->gpus.sms[l->index]);
    add_int(m, "row_bytes", typed ? bench_row_bytes(&c->p, dtype) : 0);
    add_int(m, "scale_bytes", typed ? bench_scale_bytes(&c->p, dtype) : 0);
    add(m, "crossed_bytes", "%.0f", l->crossed_bytes);
    add(m, "limit_ns", "%.0f", l->limit_ns);
    add(m, "share", "%.4f", l->limit_ns / l->ns);
    add(m, "goal_ns", "%.0f", l->goal_ns);
    add(m, "crossed_gbs", "%.3f", l->crossed_bytes / l->ns);
    add(m, "deepep_gbs", "%.3f", l->logical);
    add(m, "extra_ns", "%.0f", l->extra_ns);
}

/* Of line i, where it was measured. */
static bool add_line(struct members *m, const struct bench_case *c, int i) {
    struct bench_line l;
    if (!bench_line(c, i / BENCH_NUM_MODES, i % BENCH_NUM_MODES, &l)) {
        return false;
    }
    if (c->p.device == BENCH_CUDA) {
        add_gpu_line(m, c, &l);
    } else {
        add_host_line(m, c, &l);
    }
    return true;
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

void bench_report_csv(FILE *out, const struct bench_case *c, bool header) {
    for (int i = 0; i < c->num_items * BENCH_NUM_MODES; i++) {
        struct members m = {""};
        add_case(&m, c);
        if (add_line(&m, c, i)) {
            if (header) {
                csv_members(out, m.s, true);
            }
            header = false;
            csv_members(out, m.s, false);
        }
    }
}

static void json_case(FILE *out, const struct bench_case *c) {
    struct members m = {""};
    int64_t ranks = c->p.ranks;
    add_case(&m, c);
    fprintf(out, "{%s,\n   \"rows_from_to\": [", m.s);
    for (int64_t i = 0; i < ranks * ranks; i++) {
        fprintf(out, "%s%lld%s", i % ranks == 0 ? "[" : "",
                (long long)c->traffic[i / ranks][i % ranks],
                i % ranks < ranks - 1   ? ", "
                : i + 1 < ranks * ranks ? "], "
                                        : "]");
    }
    fprintf(out, "],\n   \"phases\": [");
    for (int i = 0, num = 0; i < c->num_items * BENCH_NUM_MODES; i++) {
        m.s[0] = '\0';
        if (add_line(&m, c, i)) {
            fprintf(out, "%s\n    {%s}", num++ > 0 ? "," : "", m.s);
        }
    }
    fprintf(out, "]}");
}

void bench_report_json(FILE *out, struct bench_case *const *cases, int num_cases) {
    bool cuda = num_cases > 0 && cases[0]->p.device == BENCH_CUDA;
    fprintf(out, "{\"version\": \"%s\", \"backend\": \"%s\", \"cores\": %d, \"knobs\": {",
            text_version().s, cuda ? "cuda" : "host", tool_num_cores());
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
