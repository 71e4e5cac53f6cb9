/* SPDX-License-Identifier: MIT */
/*
 * Declared in calls.h. Knows of each CUDA group which share of a device its rank has, and which
 * calls are queued and not yet looked at.
 */
#include "tests/calls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/ep/group.h"
#include "tests/stage.h"

#define MAX_GROUPS 256 /* alive in one process */

/* A call on its way: queued, or between begin and finish. */
struct call {
    struct stage stage;
    ep_group *group;
    ep_handle *handle; /* NULL: of low-latency mode */
    void *stream;
    bool begun;
    struct call *next;
};

struct record {
    const ep_group *group; /* NULL: free */
    struct gpu *gpu;
    struct call *calls; /* the newest first */
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards all records */
static struct record records[MAX_GROUPS];

/* The group's record, or with NULL a free one; NULL: there is none. */
static struct record *find(const ep_group *group) {
    for (int i = 0; i < MAX_GROUPS; i++) {
        if (records[i].group == group) {
            return &records[i];
        }
    }
    return NULL;
}

struct gpu *call_gpu(const ep_group *group) {
    if (!group || !gpu_wanted()) {
        return NULL; /* without the mutex, which would order what ThreadSanitizer looks at */
    }
    pthread_mutex_lock(&mutex);
    const struct record *r = find(group);
    struct gpu *gpu = r ? r->gpu : NULL;
    pthread_mutex_unlock(&mutex);
    return gpu;
}

/* ---- groups -------------------------------------------------------------------------------- */

ep_status call_group_create(ep_group **out, const struct ep_group_config *config) {
    struct ep_group_config c = *config;

    if (!gpu_wanted()) {
        return ep_group_create(out, config);
    }
    const int index = config->device_index < 0 ? gpu_index(config->rank) : config->device_index;
    struct gpu *gpu = gpu_open(index, config->world != NULL);
    c.device = EP_DEVICE_CUDA;
    c.device_index = gpu->device.index;
    const ep_status st = ep_group_create(out, &c);
    if (st != EP_OK) {
        gpu_close(&gpu);
        return st;
    }
    pthread_mutex_lock(&mutex);
    struct record *r = find(NULL);
    if (!r) {
        printf("Bail out! more than %d groups\n", MAX_GROUPS);
        exit(1);
    }
    *r = (struct record){.group = *out, .gpu = gpu};
    pthread_mutex_unlock(&mutex);
    return st;
}

static void free_calls(struct call *c) {
    while (c) {
        struct call *next = c->next;
        stage_end(&c->stage);
        free(c);
        c = next;
    }
}

void call_group_destroy(ep_group **group) {
    struct record was = {0};

    if (!gpu_wanted() || !*group) {
        ep_group_destroy(group);
        return;
    }
    pthread_mutex_lock(&mutex);
    struct record *r = find(*group);
    if (r) { /* before another group has the same address */
        was = *r;
        memset(r, 0, sizeof(*r));
    }
    pthread_mutex_unlock(&mutex);
    ep_group_destroy(group);
    free_calls(was.calls);
    gpu_close(&was.gpu);
}

void call_arena(const ep_group *group, uint64_t *at, size_t *bytes) {
    *at = epi_mem_arena_address(group->mem, group->rank);
    *bytes = (size_t)group->plan.length;
}

/* ---- what was found ------------------------------------------------------------------------ */

ep_status call_found(ep_handle *h) {
    struct ep_fault fault = EP_FAULT_INIT;
    char text[EPI_ERROR_TEXT_BYTES];
    ep_status st = ep_handle_status(h);

    if (st == EP_ERR_CAPACITY) {
        /* Rows that fit nowhere: the handle counts as not dispatched once this was told, too. */
        snprintf(text, sizeof(text), "%s", ep_last_error());
        ep_handle_counts(h, NULL, NULL, NULL);
        return epi_fail(st, "%s", text);
    }
    if (st != EP_OK) {
        return st;
    }
    st = ep_group_fault(h->group, &fault);
    return st == EP_OK && fault.status != EP_OK
               ? epi_fail((ep_status)fault.status, "%s", fault.message)
               : st;
}

/* ---- calls --------------------------------------------------------------------------------- */

/* NULL: the group is a host group, or there is none. */
static struct call *new_group_call(ep_group *group, ep_handle *h, void *stream) {
    struct gpu *gpu = group ? call_gpu(group) : NULL;
    uint64_t arena;
    size_t arena_bytes;

    if (!gpu) {
        return NULL;
    }
    struct call *c = calloc(1, sizeof(*c));
    if (!c) {
        printf("Bail out! no memory\n");
        exit(1);
    }
    c->group = group;
    c->handle = h;
    c->stream = stream ? stream : gpu->stream;
    call_arena(group, &arena, &arena_bytes);
    stage_begin(&c->stage, gpu, arena, arena_bytes);
    return c;
}

static struct call *new_call(ep_handle *h, void *stream) {
    return new_group_call(h ? h->group : NULL, h, stream);
}

static void *lay(struct call *c) {
    stage_lay(&c->stage);
    stage_copy_in(&c->stage);
    return c->stream;
}

static void keep_call(struct call *c) {
    pthread_mutex_lock(&mutex);
    struct record *r = find(c->group);
    c->next = r->calls;
    r->calls = c;
    pthread_mutex_unlock(&mutex);
}

/* Takes the calls of a stream from the group's list, or those that are begun; oldest first. */
static struct call *take_calls(const ep_group *group, const void *stream, bool begun) {
    struct call *taken = NULL;

    pthread_mutex_lock(&mutex);
    struct record *r = find(group);
    for (struct call **at = &r->calls; *at;) {
        struct call *c = *at;
        if (c->begun == begun && (begun || c->stream == stream)) {
            *at = c->next;
            c->next = taken;
            taken = c;
        } else {
            at = &c->next;
        }
    }
    pthread_mutex_unlock(&mutex);
    return taken;
}

static ep_status found_by(const struct call *c) {
    struct ep_fault fault = EP_FAULT_INIT;

    if (c->handle) {
        return call_found(c->handle);
    }
    const ep_status st = ep_ll_status(c->group);
    if (st != EP_OK) {
        return st;
    }
    ep_group_fault(c->group, &fault);
    return fault.status == EP_OK ? EP_OK
                                 : epi_fail((ep_status)fault.status, "%s", fault.message);
}

/* After the library's call: it is queued, or waited for and looked at. */
static ep_status end_call(struct call *c, ep_status st, bool queued) {
    const struct epi_cu_device *d = &c->stage.gpu->device;

    c->next = NULL;
    if (st != EP_OK) {
        free_calls(c);
        return st;
    }
    stage_copy_out(&c->stage, c->stream);
    if (queued) {
        keep_call(c);
        return EP_OK;
    }
    gpu_must(epi_cu_stream_sync(d, c->stream), "waiting for a stream");
    st = found_by(c);
    const ep_status wrote = stage_check(&c->stage); /* worse than anything else */
    free_calls(c);
    return wrote != EP_OK ? wrote : st;
}

ep_status call_route(ep_handle *h, const struct ep_routing *r, void *stream) {
    struct call *c = r ? new_call(h, stream) : NULL;

    if (!c) {
        return ep_handle_route(h, r, stream);
    }
    struct ep_routing staged = *r;
    stage_routing(&c->stage, &staged);
    return end_call(c, ep_handle_route(h, &staged, lay(c)), stream != NULL);
}

ep_status call_layout(ep_handle *h, const struct ep_layout *l, void *stream) {
    struct call *c = l ? new_call(h, stream) : NULL;

    if (!c) {
        return ep_handle_layout(h, l, stream);
    }
    struct ep_layout staged = *l;
    stage_layout(&c->stage, &staged);
    return end_call(c, ep_handle_layout(h, &staged, lay(c)), stream != NULL);
}

ep_status call_dispatch(ep_handle *h, const struct ep_dispatch_args *a, void *stream) {
    struct call *c = a ? new_call(h, stream) : NULL;

    if (!c) {
        return ep_dispatch(h, a, stream);
    }
    struct ep_dispatch_args staged = *a;
    stage_dispatch(&c->stage, &staged);
    return end_call(c, ep_dispatch(h, &staged, lay(c)), stream != NULL);
}

/* The inputs are read until the stream has passed finish. */
static ep_status begun(struct call *c, ep_status st) {
    if (st != EP_OK) {
        free_calls(c);
        return st;
    }
    c->begun = true;
    keep_call(c);
    return EP_OK;
}

static ep_status end_begun(struct call *c, ep_status st, bool queued) {
    const ep_group *group = c->group;
    const ep_status end = end_call(c, st, queued);
    if (st == EP_OK && !queued) {
        free_calls(take_calls(group, NULL, true));
    }
    return end;
}

ep_status call_dispatch_begin(ep_handle *h, const struct ep_dispatch_args *a, void *stream) {
    struct call *c = a ? new_call(h, stream) : NULL;

    if (!c) {
        return ep_dispatch_begin(h, a, stream);
    }
    struct ep_dispatch_args staged = *a;
    stage_dispatch(&c->stage, &staged);
    const ep_status st = begun(c, ep_dispatch_begin(h, &staged, lay(c)));
    return st != EP_OK || stream ? st : ep_handle_counts(h, NULL, NULL, NULL);
}

ep_status call_dispatch_finish(ep_handle *h, const struct ep_dispatch_args *a, void *stream) {
    struct call *c = a ? new_call(h, stream) : NULL;

    if (!c) {
        return ep_dispatch_finish(h, a, stream);
    }
    struct ep_dispatch_args staged = *a;
    stage_dispatch(&c->stage, &staged);
    return end_begun(c, ep_dispatch_finish(h, &staged, lay(c)), stream != NULL);
}

ep_status call_combine(ep_handle *h, const struct ep_combine_args *a, void *stream) {
    struct call *c = a ? new_call(h, stream) : NULL;

    if (!c) {
        return ep_combine(h, a, stream);
    }
    struct ep_combine_args staged = *a;
    stage_combine(&c->stage, &staged);
    return end_call(c, ep_combine(h, &staged, lay(c)), stream != NULL);
}

ep_status call_combine_begin(ep_handle *h, const struct ep_combine_args *a, void *stream) {
    struct call *c = a ? new_call(h, stream) : NULL;

    if (!c) {
        return ep_combine_begin(h, a, stream);
    }
    struct ep_combine_args staged = *a;
    stage_combine(&c->stage, &staged);
    return begun(c, ep_combine_begin(h, &staged, lay(c)));
}

ep_status call_combine_finish(ep_handle *h, const struct ep_combine_args *a, void *stream) {
    struct call *c = a ? new_call(h, stream) : NULL;

    if (!c) {
        return ep_combine_finish(h, a, stream);
    }
    struct ep_combine_args staged = *a;
    stage_combine(&c->stage, &staged);
    return end_begun(c, ep_combine_finish(h, &staged, lay(c)), stream != NULL);
}

/* ---- low-latency mode ---------------------------------------------------------------------- */

ep_status plain_ll_dispatch(ep_group *g, const struct ep_ll_dispatch_args *a,
                            enum call_half half, void *stream) {
    ep_status (*const call[])(ep_group *, const struct ep_ll_dispatch_args *, void *) = {
        ep_ll_dispatch, ep_ll_dispatch_send, ep_ll_dispatch_recv};
    return call[half](g, a, stream);
}

ep_status plain_ll_combine(ep_group *g, const struct ep_ll_combine_args *a, enum call_half half,
                           void *stream) {
    ep_status (*const call[])(ep_group *, const struct ep_ll_combine_args *,
                              void *) = {ep_ll_combine, ep_ll_combine_send, ep_ll_combine_recv};
    return call[half](g, a, stream);
}

ep_status call_ll_dispatch(ep_group *g, const struct ep_ll_dispatch_args *a,
                           enum call_half half, void *stream) {
    struct call *c = a ? new_group_call(g, NULL, stream) : NULL;

    if (!c) {
        return plain_ll_dispatch(g, a, half, stream);
    }
    struct ep_ll_dispatch_args staged = *a;
    stage_all(&c->stage, &epi_ll_dispatch_rules, &staged, 0);
    return end_call(c, plain_ll_dispatch(g, &staged, half, lay(c)), stream != NULL);
}

ep_status call_ll_combine(ep_group *g, const struct ep_ll_combine_args *a, enum call_half half,
                          void *stream) {
    struct call *c = a ? new_group_call(g, NULL, stream) : NULL;

    if (!c) {
        return plain_ll_combine(g, a, half, stream);
    }
    struct ep_ll_combine_args staged = *a;
    stage_all(&c->stage, &epi_ll_combine_rules, &staged, 0);
    return end_call(c, plain_ll_combine(g, &staged, half, lay(c)), stream != NULL);
}

/* ---- streams ------------------------------------------------------------------------------- */

ep_status call_stream_create(void **stream, ep_group *group) {
    struct gpu *gpu = call_gpu(group);
    ep_stream *made = NULL;

    if (gpu) {
        return epi_cu_stream_create(&gpu->device, stream);
    }
    const ep_status st = ep_stream_create(&made, group);
    *stream = made;
    return st;
}

ep_status call_stream_sync(ep_group *group, void *stream) {
    struct gpu *gpu = call_gpu(group);
    char text[EPI_ERROR_TEXT_BYTES] = "";
    ep_status first = EP_OK;

    if (!gpu) {
        return ep_stream_sync(stream);
    }
    gpu_must(epi_cu_stream_sync(&gpu->device, stream), "waiting for a stream");
    struct call *calls = take_calls(group, stream, false);
    for (struct call *c = calls; c; c = c->next) {
        ep_status st = found_by(c);
        const ep_status wrote = stage_check(&c->stage);
        st = wrote != EP_OK ? wrote : st;
        if (first == EP_OK && st != EP_OK) {
            first = st;
            snprintf(text, sizeof(text), "%s", ep_last_error());
        }
    }
    free_calls(calls);
    return first == EP_OK ? EP_OK : epi_fail(first, "%s", text);
}

void call_stream_destroy(ep_group *group, void **stream) {
    struct gpu *gpu = group ? call_gpu(group) : NULL;
    ep_stream *made = gpu ? NULL : *stream;

    if (gpu && *stream) {
        epi_cu_stream_sync(&gpu->device, *stream);
        free_calls(take_calls(group, *stream, false));
        epi_cu_stream_destroy(&gpu->device, stream);
    } else {
        ep_stream_destroy(&made);
    }
    *stream = NULL;
}

/* ---- memory -------------------------------------------------------------------------------- */

void call_read(const ep_group *group, void *to, const void *from, size_t bytes) {
    struct gpu *gpu = call_gpu(group);

    if (gpu) {
        gpu_must(
            epi_cu_copy_out(&gpu->device, gpu->stream, to, (uint64_t)(uintptr_t)from, bytes),
            "reading the arena");
    } else {
        memcpy(to, from, bytes);
    }
}

void call_write(const ep_group *group, void *to, const void *from, size_t bytes) {
    struct gpu *gpu = call_gpu(group);

    if (gpu) {
        gpu_must(
            epi_cu_copy_in(&gpu->device, gpu->stream, (uint64_t)(uintptr_t)to, from, bytes),
            "writing to the arena");
    } else {
        memcpy(to, from, bytes);
    }
}
