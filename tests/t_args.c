/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Every argument that breaks its rule: the right status, a message that names the argument and
 * its value, nothing sent and nothing written, and a group that goes on. This file: groups and
 * handles; operations are in t_args_operations.c.
 */
#include <stddef.h>
#include <string.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/trial.h"

/* ---- configuration --------------------------------------------------------------------- */

static const int32_t bad_map[8] = {0, 1, 0, 2, 0, 1, 1, 0};
static const int32_t negative_map[8] = {0, 1, 0, 1, 0, -1, 1, 0};

/* A field set to a value that breaks its rule, and words that the message must have. */
struct rule {
    const char *words;
    size_t at, bytes; /* of the field */
    int64_t value;
};

#define FIELD(name)                                                                            \
    offsetof(struct ep_group_config, name), sizeof(((struct ep_group_config *)0)->name)

static const struct rule rules[] = {
    {"num_experts|0", FIELD(num_experts), 0},
    {"max_tokens|-3", FIELD(max_tokens), -3},
    {"max_topk|65|64", FIELD(max_topk), EP_MAX_TOPK + 1},
    {"max_topk|-1", FIELD(max_topk), -1},
    {"max_topk|mask_routing", FIELD(max_topk), 0},
    {"max_row_bytes|0", FIELD(max_row_bytes), 0},
    {"max_row_bytes|24|16", FIELD(max_row_bytes), 24},
    {"max_scale_bytes|-1", FIELD(max_scale_bytes), -1},
    {"num_slots|-2", FIELD(num_slots), -2},
    {"expert_rank[3]|2", FIELD(expert_rank), (int64_t)(intptr_t)bad_map},
    {"expert_rank[5]|-1", FIELD(expert_rank), (int64_t)(intptr_t)negative_map},
    {"max_recv_rows|-5", FIELD(max_recv_rows), -5},
    {"max_expanded_rows|EP_GROUP_EXPANDED_VIEW", FIELD(max_expanded_rows), 10},
    {"memory_limit_bytes|-1", FIELD(memory_limit_bytes), -1},
    {"timeout_ms|99|100", FIELD(timeout_ms), 99},
    {"num_workers|-1", FIELD(num_workers), -1},
    {"num_ranks|1025|1024", FIELD(num_ranks), EP_MAX_RANKS + 1},
    {"num_ranks|0", FIELD(num_ranks), 0},
    {"flags", FIELD(flags), 1 << 30},
};

static struct ep_group_config valid_config(void) {
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;

    c.num_ranks = 2;
    c.num_experts = 8;
    c.max_tokens = 16;
    c.max_topk = 4;
    c.max_row_bytes = 256;
    c.device = gpu_wanted() ? EP_DEVICE_CUDA : EP_DEVICE_HOST;
    return c;
}

static bool says(ep_status got, ep_status want, const char *words) {
    struct world w = {0}; /* a rank of no group, for its checks */

    return world_fails(&w, got, want, words, words);
}

static void configurations(ep_world *world) {
    for (size_t i = 0; i < sizeof(rules) / sizeof(*rules); i++) {
        struct ep_group_config c = valid_config();
        struct ep_plan_info info = EP_PLAN_INFO_INIT;
        ep_group *group = NULL;
        bool plan_good;

        memcpy((char *)&c + rules[i].at, &rules[i].value, rules[i].bytes); /* little endian */
        plan_good = says(ep_plan(&c, &info), EP_ERR_ARG, rules[i].words);
        c.world = world;
        c.rank = 0;
        ok(says(ep_group_create(&group, &c), EP_ERR_ARG, rules[i].words) && !group && plan_good,
           "configuration: %s", rules[i].words);
    }
}

static void meeting(ep_world *world) {
    struct ep_group_config c = valid_config();
    struct ep_plan_info info = EP_PLAN_INFO_INIT;
    ep_group *group = NULL;
    ep_world *none = NULL;

    ok(says(ep_world_create(&none, 0), EP_ERR_ARG, "0") &&
           says(ep_world_create(&none, EP_MAX_RANKS + 1), EP_ERR_ARG, "1025") &&
           says(ep_world_create(NULL, 2), EP_ERR_ARG, "NULL") && !none,
       "ep_world_create");
    ep_world_destroy(&none);
    ep_world_destroy(NULL);
    c.world = world;
    c.rank = 2;
    ok(says(ep_group_create(&group, &c), EP_ERR_ARG, "rank|2"), "rank 2 of 2");
    c.rank = -1;
    ok(says(ep_group_create(&group, &c), EP_ERR_ARG, "rank|-1"), "rank -1 with a world");
    c.rank = 0;
    c.num_ranks = 3;
    ok(says(ep_group_create(&group, &c), EP_ERR_ARG, "num_ranks|3|2"), "3 ranks, world of 2");
    c.num_ranks = 2;
    c.device = 7;
    ok(says(ep_group_create(&group, &c), EP_ERR_ARG, "device|7"), "device 7");
    c.device = valid_config().device;
    c.world = NULL;
    c.address = "no port";
    ok(says(ep_group_create(&group, &c), EP_ERR_ARG, "address|no port"),
       "an address of no port");
    c = valid_config();
    c.size = 4;
    ok(says(ep_plan(&c, &info), EP_ERR_VERSION, "4") &&
           says(ep_group_create(&group, &c), EP_ERR_VERSION, "4"),
       "ep_group_config without a size");
    c = valid_config();
    info.size = 0;
    ok(says(ep_plan(&c, &info), EP_ERR_VERSION, "ep_plan_info"), "ep_plan_info without one");
    ok(says(ep_plan(NULL, &info), EP_ERR_ARG, "NULL") &&
           says(ep_plan(&c, NULL), EP_ERR_ARG, "NULL") &&
           says(ep_group_create(NULL, &c), EP_ERR_ARG, "NULL") &&
           says(ep_group_create(&group, NULL), EP_ERR_ARG, "NULL") && !group,
       "NULL");
}

/* ---- what takes a group or a handle ---------------------------------------------------- */

static void handles(struct world *w) {
    struct ep_handle_config c = EP_HANDLE_CONFIG_INIT;
    ep_handle *h = NULL;

    world_fails(w, ep_handle_create(NULL, w->group, NULL), EP_ERR_ARG, "NULL", "no handle");
    world_fails(w, ep_handle_create(&h, NULL, NULL), EP_ERR_ARG, "group|NULL", "no group");
    c.max_tokens = 17;
    world_fails(w, ep_handle_create(&h, w->group, &c), EP_ERR_ARG, "max_tokens|17|16",
                "tokens");
    c = (struct ep_handle_config)EP_HANDLE_CONFIG_INIT;
    c.max_topk = 5;
    world_fails(w, ep_handle_create(&h, w->group, &c), EP_ERR_ARG, "max_topk|5|4", "top-k");
    c.max_topk = -1;
    world_fails(w, ep_handle_create(&h, w->group, &c), EP_ERR_ARG, "max_topk|-1", "top-k");
    c = (struct ep_handle_config)EP_HANDLE_CONFIG_INIT;
    c.flags = 8;
    world_fails(w, ep_handle_create(&h, w->group, &c), EP_ERR_ARG, "flags", "flags");
    c = (struct ep_handle_config)EP_HANDLE_CONFIG_INIT;
    c.size--;
    world_fails(w, ep_handle_create(&h, w->group, &c), EP_ERR_VERSION, "ep_handle_config",
                "size");
    world_check(w, !h, "the handle was set");
    ep_handle_destroy(&h);
    ep_handle_destroy(NULL);
}

static void streams(struct world *w) {
    ep_stream *stream = NULL;
    ep_event *event = NULL;

    world_fails(w, ep_stream_create(&stream, NULL), EP_ERR_ARG, "NULL", "ep_stream_create");
    world_fails(w, ep_stream_sync(NULL), EP_ERR_ARG, "NULL", "ep_stream_sync");
    world_fails(w, ep_event_create(&event, NULL), EP_ERR_ARG, "NULL", "ep_event_create");
    world_fails(w, ep_event_query(NULL), EP_ERR_ARG, "NULL", "ep_event_query");
    if (gpu_wanted()) {
        world_fails(w, ep_stream_create(&stream, w->group), EP_ERR_UNSUPPORTED, "CUDA",
                    "ep_stream_create");
        world_fails(w, ep_event_create(&event, w->group), EP_ERR_UNSUPPORTED, "CUDA",
                    "ep_event_create");
        world_check(w, ep_group_stream(w->group) != NULL, "ep_group_stream");
        return;
    }
    world_check(w, !ep_group_stream(w->group), "ep_group_stream");
    world_is(w, ep_stream_create(&stream, w->group), EP_OK, "ep_stream_create");
    world_fails(w, ep_stream_run(stream, NULL, NULL), EP_ERR_ARG, "NULL", "ep_stream_run");
    world_fails(w, ep_stream_wait(stream, NULL), EP_ERR_ARG, "NULL", "ep_stream_wait");
    world_fails(w, ep_event_record(NULL, stream), EP_ERR_ARG, "NULL", "ep_event_record");
    ep_stream_destroy(&stream);
}

static void queries(struct world *w) {
    struct ep_plan_info info = EP_PLAN_INFO_INIT;
    struct ep_group_stats stats = EP_GROUP_STATS_INIT;
    struct ep_fault fault = EP_FAULT_INIT;

    world_check(w,
                ep_group_rank(NULL) <= 0 && ep_group_num_ranks(NULL) <= 0 &&
                    ep_group_num_local_experts(NULL) <= 0 && ep_group_device_index(NULL) == -1,
                "queries of no group");
    world_check(w, (ep_group_device_index(w->group) >= 0) == gpu_wanted(),
                "ep_group_device_index");
    world_check(w, !ep_handle_num_local_experts(NULL), "ep_handle_num_local_experts");
    world_check(w, ep_group_num_local_experts(w->group) == 4, "ep_group_num_local_experts");
    world_fails(w, ep_group_plan(NULL, &info), EP_ERR_ARG, "NULL", "ep_group_plan");
    world_fails(w, ep_group_stats(w->group, NULL), EP_ERR_ARG, "NULL", "ep_group_stats");
    world_fails(w, ep_group_fault(NULL, &fault), EP_ERR_ARG, "NULL", "ep_group_fault");
    info.size = stats.size = fault.size = 4;
    world_fails(w, ep_group_plan(w->group, &info), EP_ERR_VERSION, "ep_plan_info", "size");
    world_fails(w, ep_group_stats(w->group, &stats), EP_ERR_VERSION, "ep_group_stats", "size");
    world_fails(w, ep_group_fault(w->group, &fault), EP_ERR_VERSION, "ep_fault", "size");
    world_fails(w, ep_handle_status(NULL), EP_ERR_ARG, "NULL", "ep_handle_status");
    world_check(w, !ep_group_stream(NULL), "the stream of no group");
    streams(w);
    ep_stream_destroy(NULL);
    ep_event_destroy(NULL);
    ep_group_destroy(NULL);
}

static void tensors_and_strings(void) {
    struct ep_tensor t = {0};
    int x;

    ep_tensor_2d(&t, EP_F16, &x, 3, 5);
    ok(t.size == sizeof(t) && t.dtype == EP_F16 && t.data == &x && t.ndim == 2 &&
           t.shape[0] == 3 && t.shape[1] == 5 && t.stride[0] == 5 && t.stride[1] == 1,
       "ep_tensor_2d");
    ep_tensor_1d(&t, EP_I64, &x, 7);
    ok(t.ndim == 1 && t.shape[0] == 7 && t.stride[0] == 1, "ep_tensor_1d");
    ok(ep_dtype_bytes(EP_DTYPE_NONE) == 0 && ep_dtype_bytes((ep_dtype)99) == 0 &&
           ep_dtype_bytes(EP_F8E4M3) == 1 && ep_dtype_bytes(EP_BF16) == 2 &&
           ep_dtype_bytes(EP_I32) == 4 && ep_dtype_bytes(EP_I64) == 8,
       "ep_dtype_bytes");
    ok(!strcmp(ep_status_string(EP_ERR_ARG), "EP_ERR_ARG") &&
           !strcmp(ep_status_string(EP_OK), "EP_OK") &&
           !strcmp(ep_status_string(EP_ERR_INTERNAL), "EP_ERR_INTERNAL") &&
           ep_status_string((ep_status)-99) != NULL,
       "ep_status_string");
    ok(ep_version() == EP_VERSION_MAJOR * 10000 + EP_VERSION_MINOR * 100 + EP_VERSION_PATCH,
       "ep_version");
}

int main(void) {
    gpu_program();
    ep_world *world = NULL;
    struct world_setup s;

    tap_seed();
    tap_deadline(60);
    ok(!strcmp(ep_last_error(), ""), "no error before the first call");
    ok(ep_world_create(&world, 2) == EP_OK, "ep_world_create");
    configurations(world);
    meeting(world);
    ep_world_destroy(&world);
    ok(!world, "the world's pointer is NULL");
    world_defaults(&s, 2);
    s.body = handles;
    ok(world_run(&s) == 0, "ep_handle_create");
    s.body = queries;
    ok(world_run(&s) == 0, "queries, streams and events");
    tensors_and_strings();
    return done_testing();
}
