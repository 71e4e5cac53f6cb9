/* SPDX-License-Identifier: MIT */
/*
 * Structs of other versions, and what the tables of tensors are good for. See args.h; the tables
 * are with their operations, and tensor.c checks one tensor.
 */
#include "src/ep/args.h"

#include <string.h>

#include "src/ep/backend.h"
#include "src/ep/group.h"
#include "src/ep/tensor.h"

/* What claims another size is not a struct of any version: its size was never set. */
#define MOST_STRUCT_BYTES 1024
#define LEAST_STRUCT_BYTES 8

/* ---- structs that may be of another version ------------------------------------------------- */

ep_status epi_check_size(const char *tag, uint32_t size, size_t bytes) {
    if (size >= LEAST_STRUCT_BYTES && size <= MOST_STRUCT_BYTES && size % 8 == 0) {
        return EP_OK;
    }
    return epi_fail(EP_ERR_VERSION,
                    "%s.size is %u, this library's is %zu: initialise it with the EP_..._INIT "
                    "macro of its name",
                    tag, size, bytes);
}

ep_status epi_take(const char *tag, void *copy, const void *from, size_t bytes) {
    uint32_t size;
    memcpy(&size, from, sizeof(size));
    EPI_TRY(epi_check_size(tag, size, bytes));
    for (size_t i = bytes; i < size; i++) {
        if (((const unsigned char *)from)[i]) {
            return epi_fail(EP_ERR_VERSION,
                            "%s.size is %u, this library's is %zu, and byte %zu is set: the "
                            "header is newer than the library and asks for what it lacks",
                            tag, size, bytes, i);
        }
    }
    memset(copy, 0, bytes);
    memcpy(copy, from, size < bytes ? size : bytes);
    return EP_OK;
}

ep_status epi_give(const char *tag, void *to, const void *from, size_t bytes) {
    uint32_t size;
    memcpy(&size, to, sizeof(size));
    EPI_TRY(epi_check_size(tag, size, bytes));
    memcpy((char *)to + sizeof(size), (const char *)from + sizeof(size),
           (size < bytes ? size : bytes) - sizeof(size));
    return EP_OK;
}

/* ---- rules ---------------------------------------------------------------------------------- */

struct ep_tensor *epi_rule_tensor(const struct epi_rule *rule, const void *args) {
    struct ep_tensor *t;
    memcpy(&t, (const char *)args + rule->field, sizeof(t));
    return t;
}

void epi_rule_set(const struct epi_rule *rule, void *args, struct ep_tensor *t) {
    memcpy((char *)args + rule->field, &t, sizeof(t));
}

bool epi_rule_holds(const struct epi_rule *rule, uint32_t roles, uint32_t is) {
    return (rule->role & roles) && !((rule->role & EPI_NOT_ARENA) && (is & EPI_ARENA));
}

/* ---- a call --------------------------------------------------------------------------------- */

void epi_call_experts(struct epi_call *c, const struct epi_experts *e) {
    c->dim[EPI_DIM_E] = e->num;
    c->dim[EPI_DIM_L] = e->num_local;
    c->dim[EPI_DIM_L_END] = e->num_local + 1;
}

void epi_call_begin(struct epi_call *c, const ep_group *g) {
    memset(c, 0, sizeof(*c));
    for (int i = 0; i < EPI_NUM_DIMS; i++) {
        c->dim[i] = -1;
    }
    c->group = g;
    c->dim[EPI_DIM_1] = 1;
    c->dim[EPI_DIM_2] = 2;
    epi_call_experts(c, g->experts);
    c->dim[EPI_DIM_R] = g->num_ranks;
    c->dim[EPI_DIM_NODES] = g->nodes.num;
    c->dim[EPI_DIM_CHANNELS] = g->plan.info.num_channels;
}

/* Why the call has no such tensor. */
static ep_status check_wanted(const struct epi_call *c, const struct epi_rule *r) {
    const uint32_t why = r->never & c->is;
    if (why & EPI_EXPANDED) {
        return epi_fail(EP_ERR_ARG, "%s: expanded output has none", r->name);
    }
    if (why & EPI_COMPACT) {
        return epi_fail(EP_ERR_ARG, "%s: compact output has none, ask for expanded", r->name);
    }
    if (why & EPI_BY_MASK) {
        return epi_fail(EP_ERR_ARG, "%s: a handle routed by a mask knows no selections",
                        r->name);
    }
    if (why) {
        return epi_fail(EP_ERR_ARG, "%s is given and %s is not", r->name,
                        why & EPI_NO_SCALES ? "scales" : "topk_weights");
    }
    return EP_OK;
}

ep_status epi_check_scale_bytes(const ep_group *g, int64_t num, int dtype) {
    const int64_t most = g->config.max_scale_bytes;
    const int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)dtype);
    const bool fits = num <= INT64_MAX / bytes;
    if (fits && num * bytes <= most) {
        return EP_OK;
    }
    return epi_fail(EP_ERR_ARG,
                    "scales: %lld per row are %lld bytes%s, must be at most %lld "
                    "(max_scale_bytes)",
                    (long long)num, (long long)(fits ? num * bytes : INT64_MAX),
                    fits ? "" : " and more", (long long)most);
}

static ep_status check_tensor(struct epi_call *c, const struct epi_rule *r,
                              const struct ep_tensor *t) {
    const bool flat = (r->role & EPI_FLAT) && (c->is & EPI_EXPANDED);
    const int ndim = r->dim[1] == EPI_DIM_NONE || flat ? 1 : 2;
    const int64_t want[2] = {c->dim[r->dim[0]], c->dim[r->dim[1]]};
    const bool columns = (r->role & EPI_COLUMNS) && (c->is & EPI_COLUMN_MAJOR);
    EPI_TRY(epi_check_shape(r->name, t, ndim, want,
                            c->like[r->like] ? c->like[r->like] : r->types));
    if (r->role & EPI_ROW_BYTES) {
        EPI_TRY(epi_check_row_bytes(r->name, t->shape[1], t->dtype,
                                    c->group->config.max_row_bytes));
    }
    if (r->role & EPI_SCALE_BYTES) {
        EPI_TRY(epi_check_scale_bytes(c->group, t->shape[1], t->dtype));
    }
    EPI_TRY(epi_check_layout(r->name, t, columns ? EPI_LAYOUT_COLUMNS : r->layout));
    for (int i = 0; i < ndim; i++) {
        c->dim[r->dim[i]] = t->shape[i];
    }
    if (r->like != EPI_LIKE_NONE) {
        c->like[r->like] = EPI_TYPE(t->dtype);
    }
    return EP_OK;
}

static ep_status check_overlaps(const struct epi_call *c) {
    for (int b = 1; b < c->num_seen; b++) {
        for (int a = 0; a < b; a++) {
            const struct epi_extent *x = &c->seen[a], *y = &c->seen[b];
            if ((x->output || y->output) && epi_extents_overlap(x, y)) {
                const bool second = y->output; /* named first: what would be written */
                return epi_fail(EP_ERR_ARG, "%s overlaps %s", second ? y->name : x->name,
                                second ? x->name : y->name);
            }
        }
    }
    return EP_OK;
}

static ep_status check_places(const struct epi_call *c, const struct epi_rules *rules,
                              const void *args, uint32_t roles) {
    for (int i = 0; i < rules->num; i++) {
        const struct epi_rule *r = &rules->rule[i];
        const struct ep_tensor *t = epi_rule_tensor(r, args);
        if (epi_rule_holds(r, roles, c->is) && t && t->data) {
            EPI_TRY(c->group->backend->check_place(c->group, r->name, t));
        }
    }
    return EP_OK;
}

ep_status epi_args_check(struct epi_call *c, const struct epi_rules *rules, void *args,
                         uint32_t roles) {
    for (int i = 0; i < rules->num; i++) {
        const struct epi_rule *r = &rules->rule[i];
        const struct ep_tensor *t = epi_rule_tensor(r, args);
        if (!epi_rule_holds(r, roles, c->is)) {
            continue;
        }
        if (!t && (r->role & EPI_REQUIRED)) {
            return epi_fail(EP_ERR_ARG, "%s is NULL", r->name);
        }
        if (t) {
            EPI_TRY(check_wanted(c, r));
            EPI_TRY(epi_take(r->name, &c->copy[i], t, sizeof(*t)));
            epi_rule_set(r, args, &c->copy[i]);
            EPI_TRY(check_tensor(c, r, &c->copy[i]));
            c->seen[c->num_seen] = epi_extent_of(r->name, &c->copy[i], r->role & EPI_OUT);
            c->num_seen += c->seen[c->num_seen].high > 0;
        }
    }
    EPI_TRY(check_overlaps(c));
    return check_places(c, rules, args, roles);
}

void epi_args_fill(const struct epi_call *c, const struct epi_rules *rules, const void *args,
                   uint32_t roles, void *kernel_args) {
    for (int i = 0; i < rules->num; i++) {
        const struct epi_rule *r = &rules->rule[i];
        const struct ep_tensor *t = epi_rule_tensor(r, args);
        const struct k_array array = epi_array(t);
        if (epi_rule_holds(r, roles, c->is) && t) {
            memcpy((char *)kernel_args + r->to, &array,
                   r->role & EPI_ADDRESS ? sizeof(array.data) : sizeof(array));
        }
    }
}
