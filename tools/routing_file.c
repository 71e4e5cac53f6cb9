/* SPDX-License-Identifier: MIT */
/*
 * What `ep bench` reads that people write: expert ids from a file, and the text of --sweep.
 *
 * Owns nothing: pure functions of a text. Must not believe half of it: the first thing that
 * is not as it should be is named with its place, and nothing is used.
 */
#include "tools/bench.h"

#include <ctype.h>
#include <stddef.h>

static bool is_separator(char c) {
    return c == ' ' || c == ',' || c == ';' || c == '\t' || c == '\r' || c == '\n';
}

/* The piece of text in quotes, with '?' for what cannot be printed. */
static struct text quoted(const char *s, size_t len) {
    struct text t;
    size_t n = 0;
    for (t.s[n++] = '"'; n <= len && n < sizeof(t.s) - 5; n++) {
        t.s[n] = isprint((unsigned char)s[n - 1]) ? s[n - 1] : '?';
    }
    snprintf(t.s + n, sizeof(t.s) - n, "%s\"", n <= len ? "..." : "");
    return t;
}

/* A whole number without sign but '-'; false also where it would not fit. */
static bool parse_number(const char *s, size_t len, int64_t min, int64_t max, int64_t *out) {
    const size_t sign = len > 0 && s[0] == '-' ? 1 : 0;
    int64_t value = 0;
    for (size_t i = sign; i < len; i++) {
        if (s[i] < '0' || s[i] > '9' || value > INT32_MAX) {
            return false;
        }
        value = value * 10 + (s[i] - '0');
    }
    value = sign ? -value : value;
    *out = value;
    return len > sign && value >= min && value <= max;
}

int64_t routing_parse(const char *text, size_t bytes, int64_t num_experts, int32_t *ids,
                      int64_t room, char *why, size_t why_bytes) {
    int64_t num = 0, line = 1, id = 0;
    size_t line_at = 0;
    for (size_t at = 0; at < bytes;) {
        if (is_separator(text[at])) {
            line += text[at] == '\n';
            line_at = text[at] == '\n' ? at + 1 : line_at;
            at++;
            continue;
        }
        size_t len = 0;
        while (at + len < bytes && !is_separator(text[at + len])) {
            len++;
        }
        if (!parse_number(text + at, len, -1, num_experts - 1, &id)) {
            epi_format(why, why_bytes,
                       "line %lld, column %zu: %s is no expert id: they are whole numbers in "
                       "-1..%lld",
                       (long long)line, at - line_at + 1, quoted(text + at, len).s,
                       (long long)num_experts - 1);
            return -1;
        }
        if (num < room) {
            ids[num] = (int32_t)id;
        }
        num++;
        at += len;
    }
    return num;
}

/* ---- --sweep --------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    size_t at; /* in struct bench_params */
    int64_t max;
} sweep_fields[] = {{"tokens", offsetof(struct bench_params, tokens), 1 << 20},
                    {"hidden", offsetof(struct bench_params, hidden), 1 << 20},
                    {"topk", offsetof(struct bench_params, topk), EP_MAX_TOPK},
                    {"experts", offsetof(struct bench_params, experts), 1 << 16},
                    {"ranks", offsetof(struct bench_params, ranks), BENCH_MAX_RANKS}};
enum { NUM_SWEEP_FIELDS = sizeof(sweep_fields) / sizeof(sweep_fields[0]) };

/* The values after "NAME=", as far as the next ';'. */
static bool parse_values(const char *s, size_t len, int64_t max, struct sweep_axis *axis,
                         char *why, size_t why_bytes) {
    for (const char *end = s + len;; s++) {
        size_t n = 0;
        while (s + n < end && s[n] != ',') {
            n++;
        }
        if (axis->num == SWEEP_MAX_VALUES) {
            epi_format(why, why_bytes, "more than %d values", SWEEP_MAX_VALUES);
            return false;
        }
        if (!parse_number(s, n, 1, max, &axis->values[axis->num])) {
            epi_format(why, why_bytes, "%s is no number in 1..%lld", quoted(s, n).s,
                       (long long)max);
            return false;
        }
        axis->num++;
        s += n;
        if (s == end) {
            return true;
        }
    }
}

int sweep_parse(const char *text, struct sweep *out, char *why, size_t why_bytes) {
    int num_cases = 1;
    memset(out, 0, sizeof(*out));
    for (const char *s = text;; s++) {
        const size_t len = strcspn(s, ";"), name_len = strcspn(s, "=;");
        int field = 0;
        while (field < NUM_SWEEP_FIELDS &&
               (strlen(sweep_fields[field].name) != name_len ||
                strncmp(s, sweep_fields[field].name, name_len) != 0)) {
            field++;
        }
        if (field == NUM_SWEEP_FIELDS || s[name_len] != '=') {
            epi_format(why, why_bytes,
                       "%s does not begin with tokens=, hidden=, topk=, experts= "
                       "or ranks=",
                       quoted(s, len).s);
            return -1;
        }
        struct sweep_axis *axis = &out->axes[out->num++];
        for (int i = 0; i < out->num - 1; i++) {
            if (out->axes[i].at == sweep_fields[field].at) {
                epi_format(why, why_bytes, "%s is there twice", sweep_fields[field].name);
                return -1;
            }
        }
        axis->at = sweep_fields[field].at;
        if (!parse_values(s + name_len + 1, len - name_len - 1, sweep_fields[field].max, axis,
                          why, why_bytes)) {
            return -1;
        }
        num_cases *= axis->num;
        s += len;
        if (*s == '\0') {
            break;
        }
    }
    if (num_cases > SWEEP_MAX_CASES) {
        epi_format(why, why_bytes, "it has %d cases, at most %d", num_cases, SWEEP_MAX_CASES);
        return -1;
    }
    return num_cases;
}

void sweep_set(const struct sweep *sweep, int index, struct bench_params *p) {
    for (int a = sweep->num - 1; a >= 0; a--) {
        const struct sweep_axis *axis = &sweep->axes[a];
        memcpy((char *)p + axis->at, &axis->values[index % axis->num], sizeof(int64_t));
        index /= axis->num;
    }
}
