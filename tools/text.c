/* SPDX-License-Identifier: MIT */
/*
 * Numbers and strings for people and programs, the tool's random numbers, and small facts.
 *
 * Owns nothing but the progress bar's line on the terminal. Must not print a bar where nobody
 * watches: a log file gets none.
 */
#include "tools/tool.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

/* Three digits and a unit. Of the first unit there are only whole numbers if so said. */
static struct text in_units(double n, const char *const *units, int last, bool whole) {
    struct text t;
    int unit = 0;
    while (n >= 999.5 && unit < last) {
        n /= 1000;
        unit++;
    }
    int digits = n < 10 ? 2 : n < 100 ? 1 : 0;
    snprintf(t.s, sizeof(t.s), "%.*f %s", whole && unit == 0 ? 0 : digits, n, units[unit]);
    return t;
}

struct text text_ns(double ns) {
    static const char *const units[] = {"ns", "us", "ms", "s"};
    return in_units(ns, units, 3, false);
}

struct text text_bytes(double bytes) {
    static const char *const units[] = {"B", "KB", "MB", "GB", "TB"};
    return in_units(bytes, units, 4, true);
}

struct text text_count(int64_t n) {
    char digits[24];
    int len = snprintf(digits, sizeof(digits), "%lld", (long long)n);
    struct text t;
    int out = 0;
    for (int i = 0; i < len; i++) {
        t.s[out++] = digits[i];
        if ((len - 1 - i) % 3 == 0 && i + 1 < len && digits[i] != '-') {
            t.s[out++] = ',';
        }
    }
    t.s[out] = '\0';
    return t;
}

struct text text_version(void) {
    struct text t;
    uint32_t v = ep_version();
    snprintf(t.s, sizeof(t.s), "%u.%u.%u", v / 10000, v / 100 % 100, v % 100);
    return t;
}

void text_wrap(const char *s, int indent) {
    while (*s != '\0') {
        int len = (int)strlen(s);
        for (int i = 92 - indent; len > 92 - indent && i > 0; i--) {
            len = s[i] == ' ' ? i : len;
        }
        printf("%.*s\n", len, s);
        s += len + (s[len] == ' ');
        printf("%*s", *s != '\0' ? indent : 0, "");
    }
}

void text_json(FILE *out, const char *s) {
    fputc('"', out);
    for (; *s != '\0'; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\') {
            fprintf(out, "\\%c", c);
        } else if (c < 0x20 || c >= 0x7f) {
            fprintf(out, "\\u%04x", c);
        } else {
            fputc(c, out);
        }
    }
    fputc('"', out);
}

static int compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a;
    int64_t y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

int64_t tool_quantile(int64_t *values, int n, double q) {
    if (n == 0) {
        return 0;
    }
    qsort(values, (size_t)n, sizeof(*values), compare);
    int at = (int)(q * n + 0.999999) - 1;
    return values[at < 0 ? 0 : at < n ? at : n - 1];
}

uint64_t tool_rand(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

uint64_t tool_rand_hash(uint64_t a, uint64_t b) {
    uint64_t state = a * UINT64_C(0xd1342543de82ef95) ^ b;
    return tool_rand(&state);
}

void tool_progress(const char *what, int64_t done, int64_t total) {
    enum { WIDTH = 32 };
    static const char full[] = "################################";
    static int64_t shown = -1;
    struct pollfd out = {.fd = STDOUT_FILENO, .events = POLLOUT};
    if (!isatty(STDOUT_FILENO) || total <= 0 || done == shown ||
        (done < total && poll(&out, 1, 0) <= 0)) { /* Ctrl-S: nobody waits for it here */
        return;
    }
    shown = done;
    int filled = (int)(done * WIDTH / total);
    printf("\r  %-9s [%.*s%*s] %3d %%", what, filled, full, WIDTH - filled, "",
           (int)(done * 100 / total));
    if (done >= total) {
        printf("\r%*s\r", WIDTH + 24, "");
    }
    tool_flush();
}

bool tool_flush(void) {
    const bool good = fflush(stdout) == 0;
    tool_output_error = good || tool_output_error != 0 ? tool_output_error : errno;
    return good;
}

int tool_num_cores(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set)
                                                        : (int)sysconf(_SC_NPROCESSORS_ONLN);
}

int tool_expert_rank(int expert, int num_experts, int num_ranks) {
    int each = num_experts / num_ranks;
    int more = num_experts % num_ranks; /* the first ranks hold each + 1 */
    int border = more * (each + 1);
    return expert < border ? expert / (each + 1) : more + (expert - border) / each;
}
