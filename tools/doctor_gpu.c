/* SPDX-License-Identifier: MIT */
/*
 * What `ep doctor` says about GPUs: the driver, each device, what compiles kernels, whether
 * the devices reach each other and how fast, and a checked dispatch and combine on all of
 * them.
 *
 * Owns nothing that lasts. Says also where less holds than ep.h promises. Must not call a
 * missing GPU a failure, and must not open the driver: children do.
 */
#include "tools/bench.h"
#include "tools/doctor.h"

enum { TINY_TOKENS = 128, TINY_HIDDEN = 7168 }; /* a step of decoding */

static void add_devices(struct doctor *d) {
    const struct gpu_look *look = d->look;
    for (int i = 0; i < look->num; i++) {
        const struct gpu_device *g = &look->device[i];
        if (g->why[0] != '\0') {
            doctor_add(d, "GPU", "broken", "%s", g->why);
            continue;
        }
        doctor_add(
            d, "GPU", g->exclusive || !g->shares_memory ? "low" : "ok",
            "%d: %s, sm_%d%d, %d SMs, %s%s%s", i, g->name, g->major, g->minor, g->num_sms,
            text_bytes((double)g->memory_bytes).s,
            g->exclusive ? "; takes one process at a time, so ranks cannot share it and "
                           "another program can lock them out (nvidia-smi -c 0)"
                         : "",
            g->shares_memory
                ? ""
                : "; its memory cannot be handed to other processes as file descriptors, "
                  "so arenas lie in pinned host memory (WSL, some virtual machines)");
    }
    if (look->num_present > look->num) {
        doctor_add(d, "visible GPUs", "low",
                   "%d of the %d in this machine: CUDA_VISIBLE_DEVICES or the container hides "
                   "the others; ranks use only what their process sees, and nothing is said "
                   "here about the rest",
                   look->num, look->num_present);
    }
}

static void add_compiler(struct doctor *d) {
    const struct gpu_look *look = d->look;
    if (look->compiler[0] == '\0') {
        doctor_add(d, "NVRTC", "missing",
                   "kernels that are not in the cache cannot be compiled: %s",
                   look->compiler_why);
    } else {
        doctor_add(d, "NVRTC", "ok", "%d.%d, %s", look->compiler_version / 1000,
                   look->compiler_version % 1000 / 10, look->compiler);
    }
    if (look->cache_folder[0] == '\0') {
        doctor_add(d, "kernel cache", "low",
                   "there is no folder for compiled kernels that can be written (HOME, "
                   "XDG_CACHE_HOME or EP_JIT_CACHE): every process compiles anew");
    } else {
        doctor_add(d, "kernel cache", "ok",
                   "%s (to see a kernel's machine code, set EP_JIT_DUMP to a folder and call "
                   "nvdisasm -c FILE.cubin; it comes with the CUDA toolkit, or by pip install "
                   "nvidia-cuda-nvdisasm)",
                   look->cache_folder);
    }
}

static void add_links(struct doctor *d) {
    const struct gpu_look *look = d->look;
    int num_apart = 0, first = 0, second = 0;
    for (int i = 0; i < look->num * look->num; i++) {
        if (!look->reaches[i / look->num][i % look->num] && i / look->num < i % look->num) {
            first = num_apart == 0 ? i / look->num : first;
            second = num_apart == 0 ? i % look->num : second;
            num_apart++;
        }
    }
    if (look->num < 2) {
        doctor_add(d, "links between GPUs", "ok", "there is one GPU; ranks on it share it");
        return;
    }
    if (num_apart > 0) {
        doctor_add(
            d, "links between GPUs", "low",
            "%d pair%s cannot reach each other's memory, the first is %d and %d (a dot in "
            "the table): the arenas of a group with such a pair all lie in pinned host "
            "memory, so every row crosses PCIe twice (some 50 GB/s at best); see "
            "nvidia-smi topo -m, and choose GPUs by CUDA_VISIBLE_DEVICES",
            num_apart, num_apart > 1 ? "s" : "", first, second);
    } else {
        doctor_add(d, "links between GPUs", "ok",
                   "every GPU reaches the memory of every other");
    }
    if (!gpu_measure_links("ep doctor", look->num, true, &d->links)) {
        doctor_add(d, "copies between GPUs", "broken", "%s", d->links.why);
        d->links.num = 0;
        return;
    }
    double rate = d->links.in_turn > d->links.at_once ? d->links.in_turn : d->links.at_once;
    doctor_add(
        d, "copies between GPUs", "ok",
        "%.0f GB/s per GPU and direction when all send to all by copy engine; pairs alone "
        "are in the table below",
        rate);
}

/* What a group promises and this machine does not keep. */
static void add_promises(struct doctor *d) {
    if (d->look->mps) {
        doctor_add(
            d, "MPS", "low",
            "active: processes on a GPU go through one server, so a rank that is killed "
            "inside a kernel can end the others on that GPU, and only ranks on other GPUs "
            "get EP_ERR_PEER; stop it (echo quit | nvidia-cuda-mps-control) unless ranks "
            "have to share GPUs");
    } else {
        doctor_add(d, "MPS", "ok", "not active: a rank that is killed takes no other with it");
    }
    doctor_add(
        d, "faults of hardware", "note",
        "not covered anywhere: an uncorrectable error of memory or NVLink (an Xid in the "
        "kernel's log) may end every process that uses that GPU or maps its memory; "
        "processes that live get EP_ERR_PEER or EP_ERR_TIMEOUT");
}

/* An operation's median as a graph, where that was measured, else eager. */
static double median_ns(const struct bench_case *c, const char *key, int dtype) {
    for (int i = 0; i < c->num_items; i++) {
        const struct bench_result *r = c->result[i];
        if (strcmp(c->items[i].op->key, key) == 0 && c->items[i].dtype == dtype) {
            return (double)(r[BENCH_GRAPH].p50_ns > 0 ? r[BENCH_GRAPH] : r[BENCH_EAGER]).p50_ns;
        }
    }
    return 0;
}

static void try_groups(struct doctor *d) {
    struct bench_params p = {.ranks = d->look->num > 1 ? d->look->num : 2,
                             .tokens = TINY_TOKENS,
                             .hidden = TINY_HIDDEN,
                             .topk = 8,
                             .experts = 16 * GPU_MAX,
                             .groups = 1,
                             .topk_groups = 1,
                             .iters = 20,
                             .warmup = 5,
                             .seed = 1,
                             .device = BENCH_CUDA,
                             .dtype = -1};
    struct bench_case *c = NULL;
    int64_t start_ns = epi_now_ns();
    if (bench_case(&p, true, &c) != 0) {
        doctor_add(d, "CUDA mode", "broken", "%s",
                   c && c->why[0] != '\0' ? c->why : "no memory");
        return;
    }
    doctor_add(
        d, "CUDA mode", "ok",
        "%d ranks as processes on %d GPU%s met, dispatched, combined and checked every "
        "value, eagerly and in graphs, in %s; %d tokens of %d each: fp8 dispatch %s, bf16 "
        "dispatch %s, bf16 combine %s%s",
        (int)p.ranks, c->gpus.num_devices, c->gpus.num_devices > 1 ? "s" : "",
        text_ns((double)(epi_now_ns() - start_ns)).s, TINY_TOKENS, TINY_HIDDEN,
        text_ns(median_ns(c, "dispatch_memory_cached", BENCH_FP8)).s,
        text_ns(median_ns(c, "dispatch_memory_cached", BENCH_BF16)).s,
        text_ns(median_ns(c, "combine_memory", BENCH_BF16)).s,
        p.ranks > c->gpus.num_devices ? " (taking turns on the GPU)" : "");
}

void doctor_gpu(struct doctor *d) {
    d->look = gpu_look("ep doctor");
    if (d->look->driver_version == 0) {
        doctor_add(d, "CUDA mode", "missing",
                   "costs nothing unless ranks are to be on GPUs: %s", d->look->why);
        return;
    }
    doctor_add(d, "NVIDIA driver", "ok", "for CUDA %d.%d; %d GPU%s visible",
               d->look->driver_version / 1000, d->look->driver_version % 1000 / 10,
               d->look->num, d->look->num == 1 ? "" : "s");
    add_devices(d);
    add_compiler(d);
    if (d->look->why[0] != '\0') {
        doctor_add(d, "CUDA mode", "missing", "%s", d->look->why);
        return;
    }
    add_links(d);
    add_promises(d);
    try_groups(d);
}

/* ---- the table of links ------------------------------------------------------------------- */

void doctor_gpu_print(const struct doctor *d) {
    const struct gpu_links *l = &d->links;
    if (l->num == 0) {
        return;
    }
    printf("\nCopies from one GPU (down) to another (across), a pair alone: GB/s, and the time "
           "of 8 bytes\nfrom the start of the copy to its end event in us; by copy engine\n\n"
           "  from\\to ");
    for (int j = 0; j < l->num; j++) {
        printf("%12d", j);
    }
    for (int i = 0; i < l->num; i++) {
        printf("\n  %7d ", i);
        for (int j = 0; j < l->num; j++) {
            char cell[48] = "-";
            if (i != j) {
                snprintf(cell, sizeof(cell), "%s%.0f/%.1f", d->look->reaches[i][j] ? "" : ".",
                         l->rate[i][j], l->small_us[i][j]);
            }
            printf("%12s", cell);
        }
    }
    putchar('\n');
}

void doctor_gpu_json(const struct doctor *d) {
    const struct gpu_links *l = &d->links;
    printf(",\n \"gpus\": %d, \"links\": [", d->look ? d->look->num : 0);
    for (int i = 0, num = 0; i < l->num * l->num; i++) {
        int from = i / l->num, to = i % l->num;
        if (from != to) {
            printf("%s\n  {\"from\": %d, \"to\": %d, \"peer_access\": %s, \"gbs\": %.2f, "
                   "\"small_us\": %.2f}",
                   num++ > 0 ? "," : "", from, to,
                   d->look->reaches[from][to] ? "true" : "false", l->rate[from][to],
                   l->small_us[from][to]);
        }
    }
    printf("]");
}
