/* SPDX-License-Identifier: MIT */
/*
 * The library's calls as tests make them, the same for both kinds of groups. On a host group each
 * is the plain call. On a CUDA group tensors in ordinary memory are staged (stage.h), and with
 * stream NULL the call uses the rank's own stream, waits for it, and returns what a host group
 * would: what the enqueued work has found, or the fault of the group.
 *
 * With a stream (of call_stream_create) the call returns when all is queued; what it has found
 * and its outputs come with call_stream_sync.
 */
#ifndef TESTS_CALLS_H
#define TESTS_CALLS_H

#include "ep.h"
#include "tests/gpu.h"

/* A CUDA group if gpu_wanted(), on the device that gpu.h says; whatever config->device is. */
ep_status call_group_create(ep_group **out, const struct ep_group_config *config);
void call_group_destroy(ep_group **group);
/* What the rank has of its device; NULL for a host group. */
struct gpu *call_gpu(const ep_group *group);
/* For a stage: the arena of this rank, whose views are on the device already. */
void call_arena(const ep_group *group, uint64_t *at, size_t *bytes);

ep_status call_route(ep_handle *h, const struct ep_routing *r, void *stream);
ep_status call_layout(ep_handle *h, const struct ep_layout *l, void *stream);
ep_status call_dispatch(ep_handle *h, const struct ep_dispatch_args *a, void *stream);
ep_status call_dispatch_begin(ep_handle *h, const struct ep_dispatch_args *a, void *stream);
ep_status call_dispatch_finish(ep_handle *h, const struct ep_dispatch_args *a, void *stream);
ep_status call_combine(ep_handle *h, const struct ep_combine_args *a, void *stream);
ep_status call_combine_begin(ep_handle *h, const struct ep_combine_args *a, void *stream);
ep_status call_combine_finish(ep_handle *h, const struct ep_combine_args *a, void *stream);

/* Of low-latency mode: all of an operation, or a half. */
enum call_half { CALL_BOTH, CALL_SEND, CALL_RECV };
ep_status plain_ll_dispatch(ep_group *g, const struct ep_ll_dispatch_args *a,
                            enum call_half half, void *stream);
ep_status plain_ll_combine(ep_group *g, const struct ep_ll_combine_args *a, enum call_half half,
                           void *stream); /* these two stage nothing: a is the call's own */
ep_status call_ll_dispatch(ep_group *g, const struct ep_ll_dispatch_args *a,
                           enum call_half half, void *stream);
ep_status call_ll_combine(ep_group *g, const struct ep_ll_combine_args *a, enum call_half half,
                          void *stream);

ep_status call_stream_create(void **stream, ep_group *group);
/* The first thing that was found since the last time, of any call on the stream. */
ep_status call_stream_sync(ep_group *group, void *stream);
void call_stream_destroy(ep_group *group, void **stream);
/* What enqueued work has found out about a handle or its group; for the caller's own streams. */
ep_status call_found(ep_handle *h);

/* Memory that may be the arena's, for a look or a change by the host. */
void call_read(const ep_group *group, void *to, const void *from, size_t bytes);
void call_write(const ep_group *group, void *to, const void *from, size_t bytes);

#endif
