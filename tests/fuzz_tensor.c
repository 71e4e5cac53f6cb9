/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes the checks of tensors: descriptors whose shapes and strides lie around what 31, 32 and 61 to
 * 63 bits hold, beside good ones. Nothing is dereferenced. What is accepted is computed again, in 128
 * bits: no row is longer than the group's, every element lies in the address space, and no output
 * shares a byte with another tensor.
 *
 * An input is the operation and the kind of call, a byte each, and then for each tensor of the
 * operation's rules a record: dtype, dimensions, place (2 bytes), and eight numbers of 9 bytes.
 */
#include <stdlib.h>
#include <string.h>

#include "src/ep/group.h"
#include "tests/fuzz.h"

#define TOKENS 5
#define TOPK 3
#define NUMBER_BYTES 9
#define RECORD_BYTES (4 + 2 * EP_MAX_DIMS * NUMBER_BYTES)
#define MOST_ELEMENTS 64 /* of tensors that are compared byte by byte */

static ep_status any_place(const ep_group *g, const char *name, const struct ep_tensor *t) {
    (void)g, (void)name, (void)t;
    return EP_OK;
}

/* ---- from bytes to tensors --------------------------------------------------------------- */

/* The number that is wanted there, a small one, one near an edge, or any. */
static int64_t number(const uint8_t *at, int64_t wanted) {
    static const int64_t edges[] = {0,
                                    (int64_t)1 << 31,
                                    (int64_t)1 << 32,
                                    (int64_t)1 << 59,
                                    (int64_t)1 << 60,
                                    (int64_t)1 << 61,
                                    (int64_t)1 << 62,
                                    INT64_MAX,
                                    INT64_MIN};
    uint64_t raw;
    memcpy(&raw, at + 1, sizeof(raw));
    switch (at[0] % 4) {
    case 0:
        return wanted;
    case 1:
        return (int64_t)(raw % 40) - 4;
    case 2:
        return (int64_t)((uint64_t)edges[at[1] % 9] +
                         (uint64_t)(int64_t)(int8_t)at[2] * (at[3] | 1u));
    default:
        return (int64_t)raw;
    }
}

static void decode(const uint8_t *at, const struct epi_rule *r, const struct epi_call *c,
                   struct ep_tensor *t) {
    *t = (struct ep_tensor)EP_TENSOR_INIT;
    int type = at[0] % 16;
    for (int d = 1; type >= 10 && d < 10; d++) { /* mostly one that is allowed */
        type = r->types & EPI_TYPE(d) ? d : type;
    }
    const uint8_t *n = at + 4;
    int64_t dense = 1;
    t->dtype = type;
    const bool flat = (r->role & EPI_FLAT) && (c->is & EPI_EXPANDED);
    t->ndim = at[1] % 8 >= 6 ? at[1] % 7 - 1 : r->dim[1] == EPI_DIM_NONE || flat ? 1 : 2;
    t->data = (void *)(((uintptr_t)1 << 40) + 16 * ((uintptr_t)at[2] | (uintptr_t)at[3] << 8));
    t->data = at[3] == 255 ? (void *)(uintptr_t) - (intptr_t)at[2] : t->data;
    for (int i = EP_MAX_DIMS - 1; i >= 0; i--) {
        const int64_t known = i < 2 ? c->dim[r->dim[i]] : 1;
        t->shape[i] = number(n + i * NUMBER_BYTES, known < 0 ? 8 : known);
        t->stride[i] = number(n + (EP_MAX_DIMS + i) * NUMBER_BYTES, dense);
        dense = i < t->ndim ? (int64_t)((uint64_t)dense * (uint64_t)t->shape[i]) : dense;
    }
}

/* ---- what must hold of those that are accepted -------------------------------------------- */

struct range {
    __int128 low, high;
};

static struct range range_of(const struct ep_tensor *t) {
    const int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
    struct range r = {(__int128)(uintptr_t)t->data, (__int128)(uintptr_t)t->data + bytes};
    for (int i = 0; i < t->ndim; i++) {
        const __int128 far = (__int128)(t->shape[i] - 1) * t->stride[i] * bytes;
        *(far < 0 ? &r.low : &r.high) += far;
    }
    return r;
}

static int64_t num_elements(const struct ep_tensor *t) {
    __int128 n = 1;
    for (int i = 0; i < t->ndim && n <= MOST_ELEMENTS; i++) {
        n *= t->shape[i];
    }
    return n <= MOST_ELEMENTS ? (int64_t)n : MOST_ELEMENTS + 1;
}

static __int128 element(const struct ep_tensor *t, int64_t i) {
    __int128 at = (__int128)(uintptr_t)t->data;
    for (int d = t->ndim - 1; d >= 0; d--) {
        at += (__int128)(i % t->shape[d]) * t->stride[d] *
              (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
        i /= t->shape[d];
    }
    return at;
}

static bool share_bytes(const struct ep_tensor *a, const struct ep_tensor *b) {
    const int64_t na = num_elements(a), nb = num_elements(b);
    if (na > MOST_ELEMENTS || nb > MOST_ELEMENTS) {
        return false; /* too many to look at */
    }
    for (int64_t i = 0; i < na; i++) {
        for (int64_t j = 0; j < nb; j++) {
            const __int128 x = element(a, i), y = element(b, j);
            if (x < y + (int64_t)ep_dtype_bytes((ep_dtype)b->dtype) &&
                y < x + (int64_t)ep_dtype_bytes((ep_dtype)a->dtype)) {
                return true;
            }
        }
    }
    return false;
}

static void check_accepted(const struct epi_call *c, const struct epi_rules *rules,
                           const void *args, uint32_t roles) {
    for (int i = 0; i < rules->num; i++) {
        const struct epi_rule *r = &rules->rule[i];
        const struct ep_tensor *t = epi_rule_tensor(r, args);
        if (!t || !epi_rule_holds(r, roles, c->is) || num_elements(t) == 0) {
            continue;
        }
        const __int128 row =
            t->ndim > 1 ? (__int128)t->shape[1] * (int64_t)ep_dtype_bytes((ep_dtype)t->dtype)
                        : 0;
        const struct range at = range_of(t);
        must(t->data && at.low >= 0 && at.high <= (__int128)UINTPTR_MAX + 1);
        must(!(r->role & EPI_ROW_BYTES) || row <= c->group->config.max_row_bytes);
        must(!(r->role & EPI_SCALE_BYTES) || row <= c->group->config.max_scale_bytes);
        for (int j = 0; j < i; j++) {
            const struct epi_rule *other = &rules->rule[j];
            const struct ep_tensor *u = epi_rule_tensor(other, args);
            if (u && epi_rule_holds(other, roles, c->is) && num_elements(u) > 0 &&
                ((r->role | other->role) & EPI_OUT)) {
                must(!share_bytes(t, u));
            }
        }
    }
}

/* ---- one input --------------------------------------------------------------------------- */

static ep_group *make_group(void) {
    static struct epi_backend backend = {.size = sizeof(backend), .check_place = any_place};
    static struct ep_group group;
    const struct ep_group_config config = EP_GROUP_CONFIG_INIT;
    group.config = config;
    group.config.num_experts = 6;
    group.config.max_tokens = 16;
    group.config.max_topk = 4;
    group.config.max_row_bytes = 256;
    group.config.max_scale_bytes = 32;
    group.num_ranks = 2;
    group.backend = &backend;
    must(epi_experts_create(&group.experts, &group, 6, NULL) == EP_OK);
    must(epi_plan(&group.config, group.num_ranks, NULL, &group.plan) == EP_OK);
    return &group;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    static const struct {
        const struct epi_rules *rules;
        uint32_t roles;
        bool routed;
    } ops[] = {{&epi_route_rules, EPI_IN, false},
               {&epi_layout_rules, EPI_OUT, true},
               {&epi_dispatch_rules, EPI_IN | EPI_OUT, true},
               {&epi_combine_rules, EPI_ANY, true},
               {&epi_ll_dispatch_rules, EPI_IN | EPI_OUT, false},
               {&epi_ll_combine_rules, EPI_IN | EPI_OUT, false}};
    static ep_group *group;
    void *args[128] = {0};
    struct epi_op op;
    struct ep_tensor t[EPI_MAX_TENSORS];
    struct epi_call c;
    if (bytes < 2) {
        return 0;
    }
    const size_t which = data[0] % (sizeof(ops) / sizeof(ops[0]));
    group = group ? group : make_group();
    epi_call_begin(&c, group);
    const struct epi_rules *rules = ops[which].rules;
    const uint32_t roles = ops[which].roles;
    c.is = data[1] & ~(EPI_EXPANDED | EPI_COMPACT);
    c.is |= data[1] & EPI_EXPANDED ? EPI_EXPANDED : EPI_COMPACT;
    c.dim[EPI_DIM_LL_EACH] = 2 * TOKENS;
    c.dim[EPI_DIM_LL_LISTS] = 3;
    c.dim[EPI_DIM_LL_ROWS] = 3 * 2 * TOKENS;
    c.dim[EPI_DIM_LL_HANDLE] = 64;
    if (ops[which].routed) {
        c.dim[EPI_DIM_T] = TOKENS;
        c.dim[EPI_DIM_K] = TOPK;
    }
    for (int i = 0; i < rules->num; i++) {
        const size_t at = 2 + (size_t)i * RECORD_BYTES;
        if (at + RECORD_BYTES <= bytes && data[at] < 240) {
            decode(data + at, &rules->rule[i], &c, &t[i]);
            epi_rule_set(&rules->rule[i], args, &t[i]);
        }
    }
    if (epi_args_check(&c, rules, args, roles) == EP_OK) {
        check_accepted(&c, rules, args, roles);
        epi_args_fill(&c, rules, args, roles, &op.args);
    } else {
        must(epi_error_text()[0] != 0);
    }
    if (bytes >= 2 + NUMBER_BYTES) {
        const int64_t cols = number(data + 2, 8);
        const ep_status st = epi_check_row_bytes("view", cols, data[0] % 16, 256);
        must(st != EP_OK || (cols > 0 && cols <= 256));
    }
    return 0;
}
