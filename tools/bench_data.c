/* SPDX-License-Identifier: MIT */
/*
 * What ranks of `ep bench` send, and whether what they got is right: byte by byte for dispatch,
 * value by value for combine.
 *
 * Owns the buffers of one rank, in host memory: host ranks hand them to the library, ranks on
 * GPUs copy from and to them. Must not call the library.
 */
#include "tools/bench.h"

#define TABLE_STARTS 4096

static void fill_table(char *table, size_t element, int64_t num) {
    for (int64_t i = 0; i < num; i++) {
        int v = (int)(tool_rand_hash(7, (uint64_t)i) % 31) - 15;
        if (element == 1) {
            table[i] = (char)(v + 15);
        } else if (element == 2) {
            ((uint16_t *)(void *)table)[i] = bf16_from_float((float)v);
        } else {
            ((float *)(void *)table)[i] = (float)v;
        }
    }
}

static double read_number(const char *at, size_t element) {
    return element == 4 ? (double)*(const float *)(const void *)at
                        : (double)bf16_to_float(*(const uint16_t *)(const void *)at);
}

/* Rounds a sum as combine does when it leaves a rank. */
static double rounded(double sum, size_t element) {
    return element == 4 ? sum : (double)bf16_to_float(bf16_from_float((float)sum));
}

/* Where in the table the row of a token begins, in elements. */
static int64_t start_of(const struct bench_data *d, int64_t source, int64_t token) {
    uint64_t row = (uint64_t)(source * d->p->tokens + token);
    return (int64_t)(tool_rand_hash(row, d->salt) % TABLE_STARTS);
}

const char *bench_row_of(const struct bench_data *d, int64_t source, int64_t token,
                         size_t element) {
    return d->table[element] + start_of(d, source, token) * (int64_t)element;
}

static float scale_of(const struct bench_data *d, int64_t source, int64_t token, int64_t i) {
    return (float)((start_of(d, source, token) + i) % 1021);
}

static float weight_of(int64_t k) {
    return k % 2 == 0 ? 1.0f : 0.5f; /* exact in every sum here */
}

static int owner_of(const struct bench_data *d, int32_t id) {
    return id < 0 ? -1 : tool_expert_rank(id, (int)d->p->experts, (int)d->p->ranks);
}

/* ---- checks ------------------------------------------------------------------------------ */

/* Row i of the output must be that of (source, token), chosen as k (expanded). */
static bool row_is_right(const struct bench_data *d, int64_t i, int64_t source, int64_t token,
                         int64_t k) {
    const struct bench_params *p = d->p;
    bool right = i < d->num_rows && d->at.recv_source[2 * i] == source &&
                 d->at.recv_source[2 * i + 1] == token &&
                 memcmp(d->rows + i * d->rows_stride,
                        bench_row_of(d, source, token, d->element), (size_t)d->row_bytes) == 0;
    for (int64_t s = 0; right && s < d->num_scales; s++) {
        right = d->at.recv_scales[i * d->num_scales + s] == scale_of(d, source, token, s);
    }
    const int32_t *ids = d->c->ids + (source * p->tokens + token) * p->topk;
    for (int64_t j = 0; right && !d->expanded && j < p->topk; j++) {
        bool here = owner_of(d, ids[j]) == d->rank->rank;
        right = d->at.recv_ids[i * p->topk + j] == (here ? ids[j] - d->first_expert : -1) &&
                d->at.recv_weights[i * p->topk + j] == (here ? weight_of(j) : 0);
    }
    return right && (!d->expanded || d->at.recv_weights[i] == weight_of(k));
}

/* Every row in the one order that ep.h allows. */
int bench_check_dispatch(struct bench_data *d) {
    const struct bench_params *p = d->p;
    int64_t i = 0;
    if (*d->at.num_recv != d->num_rows) {
        return rank_fail(d->rank, EP_OK, "check: %s: num_rows is %d, not %lld", d->what.s,
                         *d->at.num_recv, (long long)d->num_rows);
    }
    for (int64_t e = 0; e < (d->expanded ? p->experts : 1); e++) {
        for (int64_t t = 0; t < p->ranks * p->tokens; t++) {
            bool once = false;
            for (int64_t k = 0; k < p->topk && !once; k++) {
                int32_t id = d->c->ids[t * p->topk + k];
                if ((d->expanded && id != e) || owner_of(d, id) != d->rank->rank) {
                    continue;
                }
                if (!row_is_right(d, i, t / p->tokens, t % p->tokens, k)) {
                    return rank_fail(
                        d->rank, EP_OK,
                        "check: row %lld of %s is not that of rank %lld, token %lld",
                        (long long)i, d->what.s, (long long)(t / p->tokens),
                        (long long)(t % p->tokens));
                }
                i++;
                once = !d->expanded;
            }
        }
    }
    return 0;
}

/* LogFMT encodes rows below 1, and with zeroes among them no nearer than by 1/31. */
#define LOGFMT_SCALE (1.0 / 4096)
#define LOGFMT_ERROR 0.05

static bool is_sum(const struct bench_data *d, double got, double sum, size_t element) {
    const double error = got / LOGFMT_SCALE - sum, most = LOGFMT_ERROR * (sum < 0 ? -sum : sum);
    return d->flags & EP_LL_LOGFMT ? error <= most && -error <= most
                                   : got == rounded(sum, element);
}

/* The answers were the rows themselves: a token's sum is its row times what each rank adds. */
int bench_check_combine(struct bench_data *d) {
    const struct bench_params *p = d->p;
    size_t element = d->element;
    for (int64_t t = 0; t < p->tokens; t++) {
        const int32_t *ids = d->c->ids + (d->rank->rank * p->tokens + t) * p->topk;
        const char *row = bench_row_of(d, d->rank->rank, t, element);
        double factor[BENCH_MAX_RANKS] = {0};
        for (int64_t k = 0; k < p->topk; k++) {
            if (ids[k] >= 0) {
                double *f = &factor[owner_of(d, ids[k])];
                *f = d->expanded ? *f + (double)weight_of(k) : 1;
            }
        }
        for (int64_t h = 0; h < p->hidden; h++) {
            double v = read_number(row + h * (int64_t)element, element);
            double got =
                read_number(d->at.out + t * d->row_bytes + h * (int64_t)element, element);
            double sum = 0;
            for (int64_t r = 0; r < p->ranks; r++) {
                sum += d->flags & EP_LL_EXACT ? factor[r] * v
                       : factor[r] != 0       ? rounded(factor[r] * v, element)
                                              : 0;
            }
            if (!is_sum(d, got, sum, element)) {
                return rank_fail(d->rank, EP_OK,
                                 "check: %s: token %lld, column %lld is %g, not %g", d->what.s,
                                 (long long)t, (long long)h, got, sum);
            }
        }
    }
    return 0;
}

/* ---- buffers ----------------------------------------------------------------------------- */

void bench_data_use(struct bench_data *d, const struct bench_item *item, uint64_t salt) {
    const struct bench_params *p = d->p;
    d->what = bench_item_name(p, item);
    d->salt = salt;
    d->dtype = item->dtype;
    d->flags = item->op->flags;
    d->expanded = item->expanded;
    d->num_rows = bench_output_rows(d->c, d->rank->rank, item->expanded);
    d->row_bytes = bench_row_bytes(p, item->dtype);
    d->num_scales = bench_scale_bytes(p, item->dtype) / (int64_t)sizeof(float);
    d->element = (size_t)(d->row_bytes / p->hidden);
    for (int64_t t = 0; t < p->tokens; t++) {
        memcpy(d->at.x + t * d->row_bytes, bench_row_of(d, d->rank->rank, t, d->element),
               (size_t)d->row_bytes);
        for (int64_t i = 0; i < d->num_scales; i++) {
            d->at.scales[t * d->num_scales + i] = scale_of(d, d->rank->rank, t, i);
        }
    }
    for (int64_t i = 0; (d->flags & EP_LL_LOGFMT) && i < p->tokens * p->hidden; i++) {
        uint16_t *x = (uint16_t *)(void *)d->at.x + i;
        *x = bf16_from_float(bf16_to_float(*x) * (float)LOGFMT_SCALE);
    }
}

bool bench_get_buffers(struct bench_buffers *at, const struct bench_case *c, int64_t max_rows,
                       void *(*get)(void *from, int64_t num, int64_t bytes), void *from) {
    int64_t tokens = c->p.tokens, topk = c->p.topk;
    return (at->weights = get(from, tokens * topk, sizeof(*at->weights))) &&
           (at->x = get(from, tokens, c->row_bytes)) &&
           (at->scales = get(from, tokens, c->scale_bytes)) &&
           (at->out = get(from, tokens, c->row_bytes)) &&
           (at->recv = get(from, max_rows, c->row_bytes)) &&
           (at->recv_scales = get(from, max_rows, c->scale_bytes)) &&
           (at->recv_ids = get(from, max_rows * topk, sizeof(*at->recv_ids))) &&
           (at->recv_weights = get(from, max_rows * topk, sizeof(*at->recv_weights))) &&
           (at->recv_source = get(from, max_rows * 2, sizeof(*at->recv_source))) &&
           (at->num_recv = get(from, 1, sizeof(*at->num_recv)));
}

/* Zeroed, hence resident: no page fault is timed. */
void *bench_data_get(void *data, int64_t num, int64_t bytes) {
    struct bench_data *d = data;
    return d->owned[d->num_owned++] = epi_alloc_array((size_t)num, (size_t)bytes);
}

bool bench_data_create(struct bench_data *d, struct rank *rank, const struct bench_case *c,
                       int64_t max_rows) {
    const struct bench_params *p = &c->p;
    bool elements[5] = {false};
    *d = (struct bench_data){.rank = rank, .c = c, .p = p};
    for (int i = 0; i < c->num_items; i++) {
        elements[bench_row_bytes(p, c->items[i].dtype) / p->hidden] = true;
    }
    while (d->first_expert < p->experts && owner_of(d, d->first_expert) < rank->rank) {
        d->first_expert++;
    }
    d->at.ids = c->ids + rank->rank * p->tokens * p->topk;
    if (!bench_get_buffers(&d->at, c, max_rows, bench_data_get, d)) {
        return false;
    }
    for (int element = 1; element <= 4; element *= 2) {
        int64_t num = TABLE_STARTS + p->hidden;
        if (elements[element] && !(d->table[element] = bench_data_get(d, num, element))) {
            return false;
        }
        if (elements[element]) {
            fill_table(d->table[element], (size_t)element, num);
        }
    }
    for (int64_t i = 0; i < p->tokens * p->topk; i++) {
        d->at.weights[i] = weight_of(i % p->topk);
    }
    return true;
}

void bench_data_destroy(struct bench_data *d) {
    for (int i = 0; i < d->num_owned; i++) {
        epi_free(d->owned[i]);
    }
}
