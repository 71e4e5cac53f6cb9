/* SPDX-License-Identifier: MIT */
/*
 * Declared in stage.h. The images of a stage lie in one piece of memory, so that one copy brings
 * them all; what is no image is guard.
 */
#include "tests/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/ep/args.h"

#define ALIGN 256
#define GUARD 256 /* bytes between images, at least */
#define GUARD_BYTE 0x5A

void stage_begin(struct stage *s, struct gpu *gpu, uint64_t keep, size_t keep_bytes) {
    memset(s, 0, sizeof(*s));
    s->gpu = gpu;
    s->keep_lo = (uintptr_t)keep;
    s->keep_hi = (uintptr_t)keep + keep_bytes;
}

/* Bytes from a tensor's first element to the end of its last. Any nonsense has a number. */
static size_t extent(const struct ep_tensor *t) {
    const size_t elem = ep_dtype_bytes((ep_dtype)t->dtype);
    int64_t last = 0;

    if (!t->data || t->ndim < 1) {
        return 0;
    }
    for (int i = 0; i < t->ndim && i < EP_MAX_DIMS; i++) {
        if (t->shape[i] <= 0) {
            return 0;
        }
        last += (t->shape[i] - 1) * t->stride[i];
    }
    return last < 0 ? 0 : (size_t)(last + 1) * (elem ? elem : 1);
}

struct ep_tensor *stage_tensor(struct stage *s, const struct ep_tensor *t, bool output,
                               const char *name) {
    if (!t) {
        return NULL;
    }
    if (s->num_items == STAGE_MAX_TENSORS) {
        printf("Bail out! more than %d tensors in a call\n", STAGE_MAX_TENSORS);
        exit(1);
    }
    struct stage_item *item = &s->item[s->num_items++];
    *item = (struct stage_item){.name = name, .output = output, .image = *t};
    item->lo = (uintptr_t)t->data;
    item->hi = item->lo + extent(t);
    return &item->image;
}

void stage_all(struct stage *s, const struct epi_rules *rules, void *args, uint32_t is) {
    for (int i = 0; i < rules->num; i++) {
        const struct epi_rule *r = &rules->rule[i];
        if (epi_rule_holds(r, EPI_ANY, is)) {
            epi_rule_set(r, args,
                         stage_tensor(s, epi_rule_tensor(r, args), r->role & EPI_OUT, r->name));
        }
    }
}

void stage_routing(struct stage *s, struct ep_routing *r) {
    stage_all(s, &epi_route_rules, r, 0);
}

void stage_layout(struct stage *s, struct ep_layout *l) {
    stage_all(s, &epi_layout_rules, l, 0);
}

void stage_dispatch(struct stage *s, struct ep_dispatch_args *a) {
    /* The tensor of a view is the caller's, which libep fills in. */
    stage_all(s, &epi_dispatch_rules, a, a->flags & EP_DISPATCH_ARENA ? EPI_ARENA : 0);
}

void stage_combine(struct stage *s, struct ep_combine_args *a) {
    stage_all(s, &epi_combine_rules, a, 0);
}

/* ---- where images lie ---------------------------------------------------------------------- */

static bool is_kept(const struct stage *s, const struct stage_item *item) {
    return item->lo >= s->keep_lo && item->lo < s->keep_hi;
}

static int by_address(const void *a, const void *b) {
    const struct stage_span *x = a, *y = b;

    return x->lo < y->lo ? -1 : x->lo > y->lo;
}

/* One span for all tensors that share a byte; ascending. */
static void make_spans(struct stage *s) {
    int n = 0, last = 0;

    for (int i = 0; i < s->num_items; i++) {
        const struct stage_item *item = &s->item[i];
        if (item->hi > item->lo && !is_kept(s, item)) {
            s->span[n++] = (struct stage_span){item->lo, item->hi, 0, item->output, 0};
        }
    }
    qsort(s->span, (size_t)n, sizeof(*s->span), by_address);
    for (int i = 1; i < n; i++) {
        struct stage_span *at = &s->span[last], *next = &s->span[i];
        if (next->lo < at->hi) {
            at->hi = next->hi > at->hi ? next->hi : at->hi;
            at->written = at->written || next->written;
        } else {
            s->span[++last] = *next;
        }
    }
    s->num_spans = n ? last + 1 : 0;
}

static const struct stage_span *span_of(const struct stage *s, const struct stage_item *item) {
    for (int i = 0; i < s->num_spans; i++) {
        if (item->lo >= s->span[i].lo && item->hi <= s->span[i].hi) {
            return &s->span[i];
        }
    }
    return NULL;
}

static uint64_t base(const struct stage *s) {
    return s->pinned ? (uint64_t)(uintptr_t)s->piece.host : s->piece.device;
}

/* The driver aligns an allocation; in front of an image there is what its tensor is off by. */
static size_t own_offset(const struct stage_span *span) {
    return span->lo % EP_ROW_ALIGN;
}

static void add_own_memory(struct stage *s) {
    for (int i = 0; i < s->num_spans; i++) {
        struct stage_span *span = &s->span[i];
        gpu_must(
            epi_cu_alloc(&s->gpu->device, &span->own, own_offset(span) + (span->hi - span->lo)),
            "device memory");
    }
}

void stage_lay(struct stage *s) {
    size_t end = 0;

    make_spans(s);
    for (int i = 0; i < s->num_spans; i++) {
        struct stage_span *span = &s->span[i];
        span->at = (end + GUARD + ALIGN - 1) / ALIGN * ALIGN + span->lo % ALIGN;
        end = span->at + (span->hi - span->lo);
    }
    gpu_take(s->gpu, end + GUARD, &s->piece);
    if (gpu_memory() == GPU_EXACT && !s->pinned) {
        add_own_memory(s);
    }
    for (int i = 0; i < s->num_items; i++) {
        struct stage_item *item = &s->item[i];
        const struct stage_span *span = item->hi > item->lo ? span_of(s, item) : NULL;
        uint64_t at = base(s); /* of an image without elements */
        if (!item->image.data || is_kept(s, item)) {
            continue;
        }
        if (span) {
            at = span->own ? span->own + own_offset(span) : at + span->at;
            at += item->lo - span->lo;
        }
        item->image.data = (void *)(uintptr_t)at;
    }
}

/* ---- there and back ------------------------------------------------------------------------ */

/* Images are in the piece's device memory. */
static bool has_copies(const struct stage *s) {
    return base(s) != (uint64_t)(uintptr_t)s->piece.host &&
           (s->num_spans == 0 || !s->span[0].own);
}

void stage_copy_in(struct stage *s) {
    memset(s->piece.host, GUARD_BYTE, s->piece.bytes);
    for (int i = 0; i < s->num_spans; i++) {
        const struct stage_span *span = &s->span[i];
        memcpy(s->piece.host + span->at, (const void *)span->lo, span->hi - span->lo);
        if (span->own) {
            gpu_must(epi_cu_copy_in(&s->gpu->device, s->gpu->stream,
                                    span->own + own_offset(span), s->piece.host + span->at,
                                    span->hi - span->lo),
                     "copying in");
        }
    }
    if (has_copies(s)) {
        gpu_must(epi_cu_copy_in(&s->gpu->device, s->gpu->stream, base(s), s->piece.host,
                                s->piece.bytes),
                 "copying in");
    }
}

void stage_copy_out(struct stage *s, void *stream) {
    for (int i = 0; i < s->num_spans && s->span[i].own; i++) {
        const struct stage_span *span = &s->span[i];
        gpu_must(epi_cu_copy_out_async(&s->gpu->device, stream, s->piece.host + span->at,
                                       span->own + own_offset(span), span->hi - span->lo),
                 "copying out");
    }
    if (has_copies(s)) {
        gpu_must(epi_cu_copy_out_async(&s->gpu->device, stream, s->piece.host, base(s),
                                       s->piece.bytes),
                 "copying out");
    }
}

/* Which tensors lie in a span, for a message. */
static void name_span(const struct stage *s, const struct stage_span *span, char *text,
                      size_t bytes) {
    text[0] = 0;
    for (int i = 0; i < s->num_items; i++) {
        const struct stage_item *item = &s->item[i];
        const size_t used = strlen(text);
        if (span && item->hi > item->lo && item->lo >= span->lo && item->hi <= span->hi) {
            snprintf(text + used, bytes - used, "%s%s", used ? ", " : "", item->name);
        }
    }
}

static ep_status check_guard(const struct stage *s, size_t from, size_t to,
                             const struct stage_span *before, const struct stage_span *behind) {
    char a[128], b[128];

    for (size_t i = from; i < to; i++) {
        if (s->piece.host[i] != GUARD_BYTE) {
            name_span(s, before, a, sizeof(a));
            name_span(s, behind, b, sizeof(b));
            return epi_fail(EP_ERR_INTERNAL,
                            "a kernel wrote %zu bytes behind %s and %zu before %s", i - from,
                            a[0] ? a : "nothing", to - i, b[0] ? b : "nothing");
        }
    }
    return EP_OK;
}

static ep_status check_input(const struct stage *s, const struct stage_span *span) {
    const uint8_t *is = s->piece.host + span->at, *was = (const uint8_t *)span->lo;
    char name[128];

    for (size_t i = 0; i < span->hi - span->lo; i++) {
        if (is[i] != was[i]) {
            name_span(s, span, name, sizeof(name));
            return epi_fail(EP_ERR_INTERNAL, "a kernel wrote to %s, byte %zu", name, i);
        }
    }
    return EP_OK;
}

ep_status stage_check(const struct stage *s) {
    ep_status st = EP_OK;
    size_t end = 0;

    for (int i = 0; st == EP_OK && i <= s->num_spans; i++) {
        const bool last = i == s->num_spans;
        const struct stage_span *span = &s->span[i];
        st = check_guard(s, end, last ? s->piece.bytes : span->at, i ? span - 1 : NULL,
                         last ? NULL : span);
        if (st == EP_OK && !last && !span->written) {
            st = check_input(s, span);
        }
        end = last ? end : span->at + (span->hi - span->lo);
    }
    for (int i = 0; i < s->num_items; i++) {
        const struct stage_item *item = &s->item[i];
        const struct stage_span *span = item->hi > item->lo ? span_of(s, item) : NULL;
        if (item->output && span) {
            memcpy((void *)item->lo, s->piece.host + span->at + (item->lo - span->lo),
                   item->hi - item->lo);
        }
    }
    return st;
}

void stage_end(struct stage *s) {
    for (int i = 0; i < s->num_spans; i++) {
        epi_cu_free(&s->gpu->device, &s->span[i].own);
    }
    gpu_give(s->gpu, &s->piece);
}
