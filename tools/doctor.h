/* SPDX-License-Identifier: MIT */
/*
 * What the parts of `ep doctor` share: the list of findings.
 */
#ifndef TOOLS_DOCTOR_H
#define TOOLS_DOCTOR_H

#include "tools/gpu.h"
#include "tools/tool.h"

enum { MAX_FINDINGS = 48 };

struct finding {
    const char *what;
    const char *state; /* "ok", "missing", "low", "broken", "note" */
    char text[600];    /* one sentence: what is here, or the cost and the cure */
};

struct doctor {
    struct finding findings[MAX_FINDINGS];
    int num;
    const struct gpu_look *look; /* NULL: nobody has looked */
    struct gpu_links links;      /* num is 0: not measured */
};

void doctor_add(struct doctor *d, const char *what, const char *state, const char *fmt, ...)
    EPI_PRINTF(4, 5);

/* doctor_gpu.c: everything about GPUs. One finding where there are none. */
void doctor_gpu(struct doctor *d);
/* The table of links, for people and as members of the JSON object; nothing without GPUs. */
void doctor_gpu_print(const struct doctor *d);
void doctor_gpu_json(const struct doctor *d);

#endif
