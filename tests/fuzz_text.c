/* SPDX-License-Identifier: MIT */
/*
 * Fuzzes what people write for `ep bench`: files of expert ids and --sweep. The input is how many
 * experts there are and how many ids are wanted, then the text, which is read as both.
 *
 * Checked beyond what the sanitizers see: a refusal has a printable reason; ids are within their
 * bounds, the same with room for all of them and with room for some; every case of a sweep sets
 * each of its fields to a number that may be there.
 */
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz.h"
#include "tools/bench.h"

#define MAX_IDS 4096

static void check_why(const char *why) {
    must(*why != '\0');
    for (; *why; why++) {
        must((unsigned char)*why >= ' ' && *why != 127);
    }
}

static void check_ids(const char *text, size_t bytes, int64_t num_experts, int64_t room) {
    static int32_t all[MAX_IDS], some[MAX_IDS];
    char why[256] = "";
    const int64_t num = routing_parse(text, bytes, num_experts, all, MAX_IDS, why, sizeof(why));
    must(num >= -1 && num <= (int64_t)bytes);
    must(routing_parse(text, bytes, num_experts, some, room, why, sizeof(why)) == num);
    if (num < 0) {
        check_why(why);
    }
    for (int64_t i = 0; i < num && i < MAX_IDS; i++) {
        must(all[i] >= -1 && all[i] < num_experts);
        must(i >= room || some[i] == all[i]);
    }
}

static void check_sweep(const char *text) {
    struct sweep sweep;
    char why[256] = "";
    const int num = sweep_parse(text, &sweep, why, sizeof(why));
    must(num == -1 || (num >= 1 && num <= SWEEP_MAX_CASES));
    if (num < 0) {
        check_why(why);
    }
    for (int i = 0; i < num; i++) {
        struct bench_params p;
        memset(&p, 0, sizeof(p));
        sweep_set(&sweep, i, &p);
        must(p.tokens >= 0 && p.tokens <= 1 << 20 && p.hidden >= 0 && p.hidden <= 1 << 20);
        must(p.topk >= 0 && p.topk <= EP_MAX_TOPK && p.ranks >= 0 &&
             p.ranks <= BENCH_MAX_RANKS);
        must(p.experts >= 0 && p.experts <= 1 << 16);
        must(p.tokens + p.hidden + p.topk + p.ranks + p.experts > 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    if (bytes < 2) {
        return 0;
    }
    const int64_t num_experts = data[0] ? data[0] : INT32_MAX, room = data[1];
    char *text = malloc(bytes - 1);
    must(text != NULL);
    memcpy(text, data + 2, bytes - 2);
    text[bytes - 2] = '\0';
    check_ids((const char *)data + 2, bytes - 2, num_experts, room);
    check_sweep(text);
    free(text);
    return 0;
}
