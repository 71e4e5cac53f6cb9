/* SPDX-License-Identifier: MIT */
/*
 * `ep bench --plot`: one SVG with a row per case, rows moved between ranks on the left and time
 * per phase on the right. No scripts, no fonts or styles from elsewhere.
 *
 * Owns the file it writes.
 */
#include <errno.h>

#include "tools/bench.h"

enum {
    WIDTH = 980,
    HEIGHT = 420,
    TOP = 96,
    MAP = 280,
    MAP_LEFT = 76,
    BAR_LEFT = 590,
    BAR = 260
};

static void heat_map(FILE *f, const struct bench_case *c, int y) {
    int n = (int)c->p.ranks;
    int64_t most = 1;
    for (int i = 0; i < n * n; i++) {
        most = c->traffic[i / n][i % n] > most ? c->traffic[i / n][i % n] : most;
    }
    double cell = (double)MAP / n;
    fprintf(f,
            "<text x='%d' y='%d' class='h'>rows from rank (down) to rank (across)</text>\n"
            "<text x='%d' y='%d'>darkest: %s rows</text>\n",
            MAP_LEFT, y + TOP - 30, MAP_LEFT, y + TOP + MAP + 20, text_count(most).s);
    for (int i = 0; i < n; i++) {
        double mid = (i + 0.5) * cell;
        if (n <= 16 || i % 8 == 0) {
            fprintf(f, "<text x='%d' y='%.1f' text-anchor='end'>%d</text>\n", MAP_LEFT - 8,
                    y + TOP + mid + 4, i);
            fprintf(f, "<text x='%.1f' y='%d' text-anchor='middle'>%d</text>\n", MAP_LEFT + mid,
                    y + TOP - 8, i);
        }
        for (int j = 0; j < n; j++) {
            double share = (double)c->traffic[i][j] / (double)most;
            fprintf(f,
                    "<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f' "
                    "fill='rgb(%d,%d,%d)' stroke='white'/>\n",
                    MAP_LEFT + j * cell, y + TOP + i * cell, cell, cell,
                    (int)(240 - 216 * share), (int)(246 - 156 * share),
                    (int)(250 - 96 * share));
            if (n <= 8) {
                fprintf(f, "<text x='%.1f' y='%.1f' text-anchor='middle' fill='%s'>%s</text>\n",
                        MAP_LEFT + (j + 0.5) * cell, y + TOP + (i + 0.5) * cell + 4,
                        share > 0.5 ? "white" : "#222", text_count(c->traffic[i][j]).s);
            }
        }
    }
}

static void bars(FILE *f, const struct bench_case *c, int y) {
    int64_t longest = 1;
    for (int i = PHASE_ROUTE; i < PHASE_MEMCPY_AGAIN; i++) {
        longest = c->p99[i] > longest ? c->p99[i] : longest;
    }
    fprintf(f,
            "<text x='%d' y='%d' class='h'>first call to last output: median, 99th percentile "
            "(line), limit (mark)</text>\n",
            BAR_LEFT - 180, y + TOP - 30);
    for (int i = PHASE_ROUTE, at = y + TOP; i < PHASE_MEMCPY_AGAIN; i++) {
        if (c->p50[i] == 0) {
            continue;
        }
        struct bench_line line = bench_line(c, (enum bench_phase)i);
        double scale = (double)BAR / (double)longest;
        double p50 = (double)c->p50[i] * scale;
        double p99 = (double)c->p99[i] * scale;
        fprintf(f, "<text x='%d' y='%d' text-anchor='end'>%s</text>\n", BAR_LEFT - 8, at + 17,
                line.name);
        fprintf(f, "<rect x='%d' y='%d' width='%.1f' height='24' fill='#185a9a'/>\n", BAR_LEFT,
                at, p50);
        fprintf(f, "<path d='M%.1f %dH%.1f' stroke='#185a9a' stroke-width='2'/>\n",
                BAR_LEFT + p50, at + 12, BAR_LEFT + p99);
        if (line.limit_ns > 0) {
            fprintf(f, "<path d='M%.1f %dv32' stroke='#e07b00' stroke-width='3'/>\n",
                    BAR_LEFT + line.limit_ns * scale, at - 4);
        }
        fprintf(f, "<text x='%.1f' y='%d'>%s</text>\n", BAR_LEFT + p99 + 8, at + 17,
                text_ns((double)c->p50[i]).s);
        at += 40;
    }
}

int svg_write(const char *path, struct bench_case *const *cases, int num_cases) {
    FILE *f = fopen(path, "w");
    if (!f) {
        fprintf(stderr, "ep bench: cannot write %s: %s\n", path, strerror(errno));
        return 1;
    }
    fprintf(f,
            "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' "
            "font-family='sans-serif' font-size='13'>\n<style>.h{font-weight:bold}</style>\n"
            "<rect width='100%%' height='100%%' fill='white'/>\n",
            WIDTH, HEIGHT * num_cases);
    for (int i = 0; i < num_cases; i++) {
        const struct bench_params *p = &cases[i]->p;
        fprintf(
            f,
            "<text x='24' y='%d' class='h' font-size='16'>ep bench: %d ranks, %d tokens each, "
            "hidden %d, %s, top-%d of %d experts, %s routing</text>\n",
            HEIGHT * i + 34, (int)p->ranks, (int)p->tokens, (int)p->hidden,
            dtype_names[p->dtype], (int)p->topk, (int)p->experts, routing_names[p->routing]);
        heat_map(f, cases[i], HEIGHT * i);
        bars(f, cases[i], HEIGHT * i);
    }
    fprintf(f, "</svg>\n");
    bool failed = ferror(f) != 0;
    return fclose(f) != 0 || failed;
}
