/* SPDX-License-Identifier: MIT */
/*
 * Expert ids for `ep bench`: uniform, limited to groups, skewed, half of all for one rank, or
 * replayed from a file.
 *
 * Owns nothing: it fills in the case. The same seed gives the same ids everywhere, and all
 * ranks' ids are made in one place, so that each rank can tell what it must receive.
 */
#include <math.h>
#include <stdlib.h>

#include "tools/bench.h"

#define MAX_FILE_BYTES (256 << 20)

const char *const bench_routing_names[] = {"uniform", "grouped", "skewed", "half", "file"};

static int32_t best_of(const double *score, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) {
        best = score[i] > score[best] ? i : best;
    }
    return (int32_t)best;
}

/* Leaves only the scores of the best groups, by the sum of a group's two best (DeepSeek-V3). */
static void limit_to_groups(const struct bench_params *p, double *score, double *group) {
    int64_t each = p->experts / p->groups;
    for (int64_t g = 0; g < p->groups; g++) {
        double first = 0, second = 0;
        for (int64_t i = g * each; i < (g + 1) * each; i++) {
            second = fmax(second, fmin(first, score[i]));
            first = fmax(first, score[i]);
        }
        group[g] = first + second;
    }
    for (int64_t i = 0; i < p->topk_groups; i++) {
        group[best_of(group, p->groups)] = INFINITY * -1;
    }
    for (int64_t i = 0; i < p->experts; i++) {
        score[i] = group[i / each] < 0 ? score[i] : 0;
    }
}

/* Random scores, the K best. Skewed: the i-th most popular expert is wanted i times less often
 * than the first; a random shuffle says which is which. */
static int make_random(struct bench_case *c) {
    const struct bench_params *p = &c->p;
    size_t num = (size_t)(p->experts + p->groups);
    double *score = malloc(2 * num * sizeof(*score));
    double *rarity = score + num;
    uint64_t state = (uint64_t)p->seed;
    for (int64_t i = 0; score && i < p->experts; i++) {
        int64_t at = (int64_t)(tool_rand(&state) % (uint64_t)(i + 1));
        rarity[i] = rarity[at];
        rarity[at] = p->routing == BENCH_SKEWED ? (double)(i + 1) : 1;
    }
    for (int64_t t = 0; score && t < p->ranks * p->tokens; t++) {
        for (int64_t i = 0; i < p->experts; i++) {
            double u = ((double)(tool_rand(&state) >> 11) + 1) / (double)(UINT64_C(1) << 53);
            score[i] = p->routing == BENCH_SKEWED ? -1 / (rarity[i] * log(u)) : u;
        }
        if (p->routing == BENCH_GROUPED) {
            limit_to_groups(p, score, score + p->experts);
        }
        for (int64_t k = 0; k < p->topk; k++) {
            int32_t id = best_of(score, p->experts);
            c->ids[t * p->topk + k] = id;
            score[id] = -1;
        }
    }
    free(score);
    return !score;
}

/* Half of a token's experts are rank 0's, the others all of one other rank: rank 0 receives half
 * of all rows and computes half of all selections. */
static int make_half(struct bench_case *c) {
    const struct bench_params *p = &c->p;
    double *score = malloc((size_t)p->experts * sizeof(*score));
    uint64_t state = (uint64_t)p->seed;
    for (int64_t t = 0; score && t < p->ranks * p->tokens; t++) {
        int64_t half = p->ranks > 1 ? (p->topk + (t & 1)) / 2 : p->topk;
        int second = p->ranks > 1 ? 1 + (int)(tool_rand(&state) % (uint64_t)(p->ranks - 1)) : 0;
        for (int64_t i = 0; i < p->experts; i++) {
            score[i] = (double)(tool_rand(&state) >> 11);
        }
        for (int64_t k = 0; k < p->topk; k++) {
            int owner = k < half ? 0 : second;
            int64_t best = -1;
            for (int64_t i = 0; i < p->experts; i++) {
                if (tool_expert_rank((int)i, (int)p->experts, (int)p->ranks) == owner &&
                    (best < 0 || score[i] > score[best])) {
                    best = i;
                }
            }
            c->ids[t * p->topk + k] = (int32_t)best;
            score[best] = -1;
        }
    }
    free(score);
    return !score;
}

/* Ids as numbers, K to a token, rank after rank; begins again when the file is short. */
static int read_file(struct bench_case *c) {
    const struct bench_params *p = &c->p;
    const int64_t num = p->ranks * p->tokens * p->topk;
    char why[200];
    size_t bytes = 0;
    char *text = tool_read_file(p->routing_file, MAX_FILE_BYTES, &bytes, why, sizeof(why));
    int64_t num_read = -1;
    if (text && bytes == MAX_FILE_BYTES) {
        epi_format(why, sizeof(why), "it is larger than %d MB", MAX_FILE_BYTES >> 20);
    } else if (text) {
        num_read = routing_parse(text, bytes, p->experts, c->ids, num, why, sizeof(why));
    }
    free(text);
    if (num_read == 0 || num_read % p->topk > 0) {
        epi_format(why, sizeof(why),
                   "%lld expert ids are no multiple of --topk %d, one or more",
                   (long long)num_read, (int)p->topk);
        num_read = -1;
    }
    if (num_read < 0) {
        fprintf(stderr, "ep bench: --routing file:%s: %s\n", p->routing_file, why);
        return 1;
    }
    for (int64_t i = num_read; i < num; i++) {
        c->ids[i] = c->ids[i - num_read];
    }
    return 0;
}

/* What the ids mean: rows between ranks, and rows of each rank's output in either form. */
static void count_traffic(struct bench_case *c) {
    const struct bench_params *p = &c->p;
    for (int64_t t = 0; t < p->ranks * p->tokens; t++) {
        uint64_t seen = 0;
        for (int64_t k = 0; k < p->topk; k++) {
            int32_t id = c->ids[t * p->topk + k];
            if (id >= 0) {
                int owner = tool_expert_rank(id, (int)p->experts, (int)p->ranks);
                seen |= UINT64_C(1) << owner;
                c->selections++;
                c->selected_rows[owner]++;
            }
        }
        for (int64_t r = 0; r < p->ranks; r++) {
            c->traffic[t / p->tokens][r] += (int64_t)(seen >> r & 1);
            c->received_rows[r] += (int64_t)(seen >> r & 1);
        }
    }
}

int bench_routing(struct bench_case *c) {
    int failed = c->p.routing == BENCH_FROM_FILE ? read_file(c)
                 : c->p.routing == BENCH_HALF    ? make_half(c)
                                                 : make_random(c);
    if (failed == 0) {
        count_traffic(c);
    }
    return failed;
}
