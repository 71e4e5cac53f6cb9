/* SPDX-License-Identifier: MIT */
/*
 * `ep predict`: what an operation costs on machines that are not here. It counts the bytes that cross
 * each GPU's link to its node and its NIC, and divides them by rates that it is given.
 *
 * Owns nothing and measures nothing. Must not print a number without the rate or the sentence it
 * comes from. Routing is uniform over the experts, so that every rank is like every other.
 */
#include <math.h>

#include "tools/tool.h"

struct shape {
    int64_t nodes, gpus, tokens, ll_tokens, hidden, topk, experts;
    int64_t groups; /* nodes that a token's experts may be on; 0: any */
    int bf16;       /* of dispatched rows; answers are always */
};
struct rates {
    int64_t link, net;               /* GB/s of a GPU, each way, as kernels reach them */
    int64_t start_us, ll_us, net_us; /* of an operation inside a node, each mode; one way */
};
struct load { /* bytes out of, and as many into, each GPU */
    double link, net;
};
/* How many ranks, and how many nodes, a token goes to, its own included. */
struct spread {
    double ranks, nodes;
};

/* The probability that top-k of `experts` has none of `of` them. */
static double misses(double experts, double of, int64_t topk) {
    double p = 1;
    for (int64_t i = 0; i < topk; i++) {
        p *= fmax(0, experts - of - (double)i) / (experts - (double)i);
    }
    return p;
}

static struct spread spread_of(const struct shape *s) {
    const double nodes = (double)s->nodes, ranks = nodes * (double)s->gpus;
    const double near = s->groups && s->groups < s->nodes ? (double)s->groups : nodes;
    const double experts = (double)s->experts, reach = experts * near / nodes;
    return (struct spread){ranks * near / nodes * (1 - misses(reach, experts / ranks, s->topk)),
                           near * (1 - misses(reach, experts / nodes, s->topk))};
}

/* libep's: a row to each rank of the token's node that wants it, one to each other such node, where
 * one of g GPUs takes it in and passes it on; answers come back the same way, summed by node. */
static struct load load_of(const struct shape *s, double tokens, double row) {
    const struct spread to = spread_of(s);
    const double n = (double)s->nodes, g = (double)s->gpus, each = tokens * row;
    const double near = to.ranks / n, far = to.ranks - near;
    return (struct load){each * (near * (g - 1) / g + far * (g - 1) / g),
                         each * to.nodes * (n - 1) / n};
}

/* DeepEP's low-latency mode: a row for each selection, over the NIC if it goes to another node. */
static struct load load_of_selections(const struct shape *s, double tokens, double row) {
    const double n = (double)s->nodes, ranks = n * (double)s->gpus;
    const double all = tokens * (double)s->topk * row;
    return (struct load){all * ((double)s->gpus - 1) / ranks, all * (n - 1) / n};
}

static double row_bytes(const struct shape *s, bool answer) {
    const double h = (double)s->hidden;
    return answer || s->bf16 ? 2 * h : h + h / 128 * 4;
}

static double us_of(double bytes, int64_t rate) {
    return bytes / (double)rate / 1e3; /* GB/s are 1000 bytes in a us */
}

static double bytes_us(const struct rates *r, const struct load *load) {
    return fmax(us_of(load->link, r->link), us_of(load->net, r->net));
}

/* What an operation waits for whatever its bytes: two ways over the network, from the source to the
 * GPU that takes rows in, and its word that they may come. */
static double wait_us(const struct shape *s, const struct rates *r, bool ll) {
    return (double)(ll ? r->ll_us : r->start_us) + (s->nodes > 1 ? 2 * (double)r->net_us : 0);
}

static double print_operation(const char *name, const struct shape *s, const struct rates *r,
                              bool ll, bool answer) {
    const double tokens = (double)(ll ? s->ll_tokens : s->tokens);
    const struct load load = load_of(s, tokens, row_bytes(s, answer));
    const double link = us_of(load.link, r->link), net = us_of(load.net, r->net);
    const double wait = wait_us(s, r, ll), bytes = fmax(link, net);
    printf("%-22s %9.2f %8.1f %9.2f %8.1f %8.1f %9.1f  %s\n", name, load.link / 1e6, link,
           load.net / 1e6, net, wait, wait + bytes,
           wait > bytes ? "hand-offs"
           : net > link ? "network"
                        : "link");
    return wait + bytes;
}

/* 0, or 1: no group can be so. */
static int print_memory(const struct shape *s) {
    const double most = spread_of(s).ranks * (double)s->tokens * 1.25;
    struct ep_group_config c = EP_GROUP_CONFIG_INIT;
    struct ep_plan_info plan = EP_PLAN_INFO_INIT;
    c.num_ranks = (int32_t)(s->nodes * s->gpus);
    c.num_experts = (int32_t)s->experts;
    c.max_tokens = (int32_t)s->tokens;
    c.max_topk = (int32_t)s->topk;
    c.max_row_bytes = (int32_t)(2 * s->hidden);
    c.max_scale_bytes = (int32_t)(s->hidden / 128 * 4);
    c.max_recv_rows = (int64_t)fmin(ceil(most), (double)(c.num_ranks * s->tokens));
    c.ll_max_tokens = (int32_t)s->ll_tokens;
    if (ep_plan(&c, &plan) != EP_OK) {
        fprintf(stderr, "ep predict: %s\n", ep_last_error());
        return 1;
    }
    printf("memory of a rank: %s, of which %s are for %lld received rows (1.25 times what "
           "comes),\n"
           "%s for answers, %s for low-latency mode of %lld tokens.\n",
           text_bytes((double)plan.arena_bytes).s,
           text_bytes((double)(plan.recv_bytes + plan.sidecar_bytes)).s,
           (long long)plan.max_recv_rows, text_bytes((double)plan.combine_bytes).s,
           text_bytes((double)plan.ll_bytes).s, (long long)s->ll_tokens);
    return 0;
}

static int predict(const struct shape *s, const struct rates *r) {
    const struct spread to = spread_of(s);
    printf("%lld ranks on %lld nodes; a token goes to %.2f ranks on %.2f nodes, its own "
           "included.\n",
           (long long)(s->nodes * s->gpus), (long long)s->nodes, to.ranks, to.nodes);
    if (print_memory(s)) {
        return 1;
    }
    printf("\n%-22s %9s %8s %9s %8s %8s %9s  held by\n", "of each GPU", "link, MB", "us",
           "net, MB", "us", "wait, us", "time, us");
    double sum =
        print_operation(s->bf16 ? "dispatch, BF16" : "dispatch, FP8", s, r, false, false);
    sum += print_operation("combine, BF16", s, r, false, true);
    double ll = print_operation("low-latency dispatch", s, r, true, false);
    ll += print_operation("low-latency combine", s, r, true, true);
    printf("\nboth ways: %.0f us for %lld tokens, %.0f us for %lld in low-latency mode.\n", sum,
           (long long)s->tokens, ll, (long long)s->ll_tokens);
    printf("by: link %lld GB/s, net %lld GB/s, each way, as reached; wait: %lld us in a node "
           "(%lld "
           "in\nlow-latency mode)%s. The time is wait + the longer of both us.\n",
           (long long)r->link, (long long)r->net, (long long)r->start_us, (long long)r->ll_us,
           s->nodes > 1 ? " and two ways over the network" : "");
    if (s->nodes > 1) {
        printf("one way over the network: %lld us.\n", (long long)r->net_us);
    }
    return 0;
}

/* ---- beside what DeepEP has published ------------------------------------------------------ */

/* H800, 8 to a node, a CX7 of 400 Gb/s for each: GB/s in throughput mode, us in the other. */
static const struct {
    int64_t ranks;
    int dispatch, combine;
    bool ll;
} published[] = {
    {8, 153, 158, false},  {16, 43, 43, false},   {32, 58, 57, false},  {64, 51, 50, false},
    {8, 77, 114, true},    {16, 118, 195, true},  {32, 155, 273, true}, {64, 173, 314, true},
    {128, 192, 369, true}, {256, 194, 360, true},
};

static const char *const reasons[] = {
    ['a'] = "The GB/s count rows that stay on their GPU, one in eight. The others keep NVLink "
            "busy for "
            "84 to 86 % of the time; the rest is copying into rings and out of them.",
    ['b'] = "The GB/s count a row for each node of a token, its own included: here half of "
            "these rows "
            "never see the NIC. NVLink bounds, over which rows are passed on to the ranks of a "
            "node.",
    ['c'] = "The NIC bounds, and is busy for 86 to 89 % of the time. The GB/s are above its 50 "
            "where the "
            "rows for a token's own node, which are counted, outweigh what is left.",
    ['d'] = "NVLink is busy for half to two thirds of the time. The rest, 34 to 36 us, is "
            "there without any "
            "bytes: launches, first bytes, flags.",
    ['e'] = "The NIC's time, and the same hand-offs with a way over the network: 40 to 57 us "
            "at every "
            "number of ranks.",
    ['f'] = "76 and 94 us beside the NIC's time. Bytes and messages hardly grow from 64 ranks "
            "on, where it "
            "is 57, and 256 ranks take less than 128: what is left is the fabric's.",
};

static char reason_of(const struct shape *s, bool ll, double gap, const double busy[2]) {
    if (ll) {
        return s->nodes == 1 ? 'd' : gap < 60 ? 'e' : 'f';
    }
    return s->nodes == 1 ? 'a' : busy[0] > busy[1] ? 'b' : 'c';
}

static void print_published(size_t i, bool answer, const struct rates *r) {
    const bool ll = published[i].ll;
    const int said = answer ? published[i].combine : published[i].dispatch;
    struct shape s = {published[i].ranks / 8, 8, 4096, 128, 7168, 8, 256, ll ? 0 : 4, 0};
    const struct spread to = spread_of(&s);
    const double row = row_bytes(&s, answer), tokens = (double)(ll ? s.ll_tokens : s.tokens);
    const struct load mine = load_of(&s, tokens, row);
    const struct load load =
        ll ? load_of_selections(&s, tokens, row + (answer ? 0 : 16)) : mine;
    const double logical = tokens * row * (s.nodes > 1 ? to.nodes : to.ranks);
    const double us = ll ? said : us_of(logical, said);
    const double busy[2] = {us_of(load.link, r->link), us_of(load.net, r->net)};
    const double gap = us - bytes_us(r, &load);
    const char why = reason_of(&s, ll, gap, busy);
    printf("%4lld %-8s %5d %-4s %7.0f %8.0f %3.0f %% %7.0f %3.0f %% %7.0f  (%c) %9.0f\n",
           (long long)published[i].ranks, answer ? "combine" : "dispatch", said,
           ll ? "us" : "GB/s", us, busy[0], 100 * busy[0] / us, busy[1], 100 * busy[1] / us,
           gap, why, wait_us(&s, r, ll) + bytes_us(r, &mine));
}

static int compare(void) {
    const struct rates h800 = {160, 50, 22, 15, 5}, *r = &h800;
    printf(
        "DeepEP V1 as published: H800, NVLink %lld GB/s, a NIC of %lld GB/s for each GPU, "
        "hidden "
        "7168, top-8 of 256,\nFP8 rows, BF16 answers; 4096 tokens, at most 4 nodes for each, "
        "or 128 tokens and any node\nin low-latency mode. Times are us.\n",
        (long long)r->link, (long long)r->net);
    for (size_t i = 0; i < sizeof(published) / sizeof(published[0]); i++) {
        if (i == 0 || published[i].ll != published[i - 1].ll) {
            printf("\n%s\n%4s %-8s %10s %7s %14s %13s %7s %4s %9s\n",
                   published[i].ll ? "low-latency mode" : "throughput mode", "EP", "",
                   "published", "time", "NVLink busy", "NIC busy", "gap", "why", "libep");
        }
        print_published(i, false, r);
        print_published(i, true, r);
    }
    printf("\n");
    for (char why = 'a'; why <= 'f'; why++) {
        printf("(%c) ", why);
        text_wrap(reasons[(int)why], 4);
        printf("\n");
    }
    text_wrap("gap: the time less that of the busier link. libep: what is predicted for it by "
              "the same "
              "rates, with its waits; in low-latency mode it sends a row for each node, not "
              "for each selection.",
              0);
    printf("\n");
    return 0;
}

int cmd_predict(int argc, char **argv) {
    struct shape s = {1, 8, 4096, 128, 7168, 8, 256, 0, 0};
    struct rates r = {344, 50, 22, 15, 5};
    bool deepep = false;
    const struct opt opts[] = {
        {"nodes", 0, OPT_INT, &s.nodes, 1, EP_MAX_RANKS, "N", "nodes"},
        {"gpus", 0, OPT_INT, &s.gpus, 1, EP_MAX_RANKS, "N", "GPUs of a node, a rank each"},
        {"tokens", 't', OPT_INT, &s.tokens, 1, 1 << 20, "N", "tokens of a rank"},
        {"ll-tokens", 0, OPT_INT, &s.ll_tokens, 1, 1 << 20, "N",
         "the same in low-latency mode"},
        {"hidden", 0, OPT_INT, &s.hidden, 128, 1 << 20, "N", "channels of a row"},
        {"topk", 'k', OPT_INT, &s.topk, 1, EP_MAX_TOPK, "N", "experts of a token"},
        {"experts", 'e', OPT_INT, &s.experts, 1, 65536, "N", "experts"},
        {"groups", 0, OPT_INT, &s.groups, 0, EP_MAX_RANKS, "N",
         "nodes that a token's experts may be on, 0: any"},
        {"dtype", 0, OPT_CHOICE, &s.bf16, 0, 0, "fp8|bf16", "dispatched rows"},
        {"link", 0, OPT_INT, &r.link, 1, 100000, "GB/s",
         "of a GPU to its node; 344: 4 H200, measured"},
        {"net", 0, OPT_INT, &r.net, 1, 100000, "GB/s", "of a GPU's NIC"},
        {"start-us", 0, OPT_INT, &r.start_us, 0, 1000000, "US",
         "an operation without bytes, measured"},
        {"ll-us", 0, OPT_INT, &r.ll_us, 0, 1000000, "US", "the same in low-latency mode"},
        {"net-us", 0, OPT_INT, &r.net_us, 0, 1000000, "US",
         "one way over the network, assumed"},
        {"deepep", 0, OPT_FLAG, &deepep, 0, 0, NULL,
         "by itself: DeepEP's published figures, and why"},
    };
    const struct command command = {
        .name = "ep predict",
        .usage = "[--nodes N] [--gpus N] [options]",
        .about = "Memory, bytes over each link and time of each phase, and what holds it, on "
                 "so many "
                 "nodes, for uniform routing; docs/predict.md has what it was compared with.",
        .opts = opts,
        .num_opts = sizeof(opts) / sizeof(opts[0]),
    };
    const int status = args_parse(&command, argc, argv, NULL);
    if (status >= 0) {
        return status;
    }
    if (s.nodes * s.gpus > EP_MAX_RANKS) {
        return args_refuse("ep predict", "--nodes %lld with --gpus %lld are more than %d ranks",
                           (long long)s.nodes, (long long)s.gpus, EP_MAX_RANKS);
    }
    if (s.topk > s.experts || s.hidden % 128) {
        return args_refuse("ep predict", s.hidden % 128 ? "--hidden must be a multiple of 128"
                                                        : "--topk is larger than --experts");
    }
    if (deepep && argc > 2) {
        return args_refuse("ep predict",
                           "--deepep is for one machine and takes no other option");
    }
    return deepep ? compare() : predict(&s, &r);
}
