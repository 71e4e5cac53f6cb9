/* SPDX-License-Identifier: MIT */
/*
 * The rig, declared in rig.h: devices, compilation, groups in device memory, launches, waiting.
 */
#include "tests/cuda/rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STUCK_SECONDS 10 /* after the kernels' own deadlines; what is left then is lost */

static const char *const files[3] = {"kernel/route.k.c", "kernel/dispatch.k.c",
                                     "kernel/combine.k.c"};
static const struct {
    const char *name;
    int file;
    size_t args_bytes;
} kernels[RIG_NUM_KERNELS] = {{"ep_route", 0, sizeof(struct k_route_args)},
                              {"ep_layout", 0, sizeof(struct k_layout_args)},
                              {"ep_dispatch", 1, sizeof(struct k_dispatch_args)},
                              {"ep_combine", 2, sizeof(struct k_combine_args)}};

double rig_now(void) {
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void rig_must(ep_status st, const char *what) {
    if (st != EP_OK) {
        printf("FATAL: %s: %s: %s\n", what, ep_status_string(st), ep_last_error());
        fflush(stdout);
        _exit(3); /* the driver may be beyond an orderly end */
    }
}

/* ---- compilation ----------------------------------------------------------------------- */

static ep_status open_compiler(struct epi_nvrtc **nvrtc, int max_major) {
    ep_status st = epi_nvrtc_open(nvrtc, max_major);

    if (st == EP_OK) {
        const int v = epi_nvrtc_version(*nvrtc);
        printf("NVRTC %d.%d from %s\n", v / 1000, v % 1000 / 10, epi_nvrtc_path(*nvrtc));
    }
    return st;
}

static ep_status compile(struct epi_nvrtc *nvrtc, int file, int arch, int warps, bool generic,
                         struct epi_cubin *out) {
    char define[32];
    const char *defines[] = {define, generic ? "-DK_MOVER_GENERIC" : NULL, NULL};

    snprintf(define, sizeof(define), "-DK_BLOCK_WARPS=%d", warps);
    return epi_nvrtc_compile(nvrtc, files[file], arch, defines, out);
}

/* What ptxas says of each kernel; the compiler's own remarks; local memory, if any. */
static void print_log(const char *log) {
    while (*log) {
        char line[256];
        const int length = (int)strcspn(log, "\n");
        const char *name;
        snprintf(line, sizeof(line), "%.*s", length, log);
        name = strstr(line, "entry function '");
        if (name) {
            printf("    %.*s:", (int)strcspn(name + 16, "'"), name + 16);
        } else if (strstr(line, "Used ")) {
            printf(" %s\n", strstr(line, "Used "));
        } else if (strstr(line, "stack frame") && !strstr(line, " 0 bytes stack frame")) {
            printf(" LOCAL MEMORY: %s\n   ", line);
        } else if (!strstr(line, "ptxas") && length > 0) {
            printf("    %s\n", line);
        }
        log += length + (log[length] == '\n');
    }
}

int rig_compile_only(void) {
    static const int archs[] = {80, 90, 100, 120};
    struct epi_nvrtc *nvrtc = NULL;
    int bad = 0, good = 0;

    rig_must(open_compiler(&nvrtc, 0), "the compiler");
    for (size_t a = 0; a < sizeof(archs) / sizeof(archs[0]); a++) {
        for (int i = 0; i < 6; i++) {
            struct epi_cubin c;
            const double start = rig_now();
            const bool generic = i >= 3;
            if (compile(nvrtc, i % 3, archs[a], 8, generic, &c) == EP_OK) {
                printf("sm_%d %s%s: cubin of %zu bytes in %.0f ms\n", archs[a], files[i % 3],
                       generic ? " generic" : "", c.bytes, 1e3 * (rig_now() - start));
                print_log(c.log);
                epi_cubin_free(&c);
                good++;
            } else {
                printf("sm_%d %s%s: %s\n", archs[a], files[i % 3], generic ? " generic" : "",
                       ep_last_error());
                bad++;
            }
        }
    }
    epi_nvrtc_close(&nvrtc);
    printf("%d passed, %d failed\n", good, bad);
    return bad;
}

static void load_on(struct rig *rig, struct rig_build *b, int d, const struct epi_cubin *c) {
    for (int f = 0; f < 3; f++) {
        rig_must(epi_cu_module_load(&rig->device[d], c[f].data, &b->module[d][f]), files[f]);
    }
    for (int i = 0; i < RIG_NUM_KERNELS; i++) {
        struct epi_cu_kernel *k = &b->kernel[d][i];
        rig_must(epi_cu_kernel_get(&rig->device[d], b->module[d][kernels[i].file],
                                   kernels[i].name, k),
                 kernels[i].name);
        if (d == 0) {
            printf("  %-12s %3d registers, %d bytes local, at most %d threads%s\n", k->name,
                   k->num_registers, k->local_bytes, k->max_threads,
                   k->local_bytes ? " (LOCAL MEMORY)" : "");
        }
    }
}

static struct rig_build *find_build(struct rig *rig, int warps) {
    for (int i = 0; i < rig->num_builds; i++) {
        if (rig->build[i].warps == warps) {
            return &rig->build[i];
        }
    }
    return NULL;
}

static struct rig_build *make_build(struct rig *rig, int warps) {
    struct rig_build *b = &rig->build[rig->num_builds];
    struct epi_cubin c[3];
    const double start = rig_now();
    const int arch = 10 * rig->device[0].major + rig->device[0].minor;

    if (rig->num_builds == (int)(sizeof(rig->build) / sizeof(rig->build[0]))) {
        printf("FATAL: more than %d different numbers of warps\n", rig->num_builds);
        exit(3);
    }
    memset(b, 0, sizeof(*b));
    b->warps = warps;
    for (int f = 0; f < 3; f++) {
        rig_must(compile(rig->nvrtc, f, arch, warps, rig->o.generic, &c[f]), files[f]);
    }
    printf("compiled for sm_%d, %d warps, %s mover in %.0f ms\n", arch, warps,
           rig->o.generic || arch < 90 ? "generic" : "TMA", 1e3 * (rig_now() - start));
    for (int d = 0; d < rig->num_devices; d++) {
        load_on(rig, b, d, c);
    }
    for (int f = 0; f < 3; f++) {
        epi_cubin_free(&c[f]);
    }
    rig->num_builds++;
    return b;
}

size_t rig_shared_bytes(const struct rig *rig, enum rig_kernel kernel) {
    const struct rig_shape *s = &rig->shape;
    const size_t scratch = (size_t)K_SCRATCH_BYTES(rig->o.num_ranks);
    const size_t ring = (size_t)K_RING_BYTES(s->stages, s->stage_bytes);

    return (size_t)s->warps * (scratch + (kernel < RIG_DISPATCH ? 0 : ring));
}

/* All ranks' blocks of a device must run at once: they wait for each other. */
static bool fits(struct rig *rig, const struct rig_build *b) {
    const struct rig_shape *s = &rig->shape;
    const int per_device = rig->o.multi_gpu ? 1 : rig->o.num_ranks;

    for (int i = 0; i < RIG_NUM_KERNELS; i++) {
        const size_t shared = rig_shared_bytes(rig, (enum rig_kernel)i);
        int blocks = 0;
        if (shared > (size_t)rig->device[0].max_shared_bytes) {
            printf("shape does not fit: %zu bytes of shared memory, the device has %d\n",
                   shared, rig->device[0].max_shared_bytes);
            return false;
        }
        rig_must(
            epi_cu_resident(&rig->device[0], &b->kernel[0][i], 32 * s->warps, shared, &blocks),
            "cuOccupancyMaxActiveBlocksPerMultiprocessor");
        if (blocks < per_device * s->blocks) {
            printf("shape does not fit: %s, %d ranks of %d blocks, the device holds %d\n",
                   kernels[i].name, per_device, s->blocks, blocks);
            return false;
        }
    }
    return true;
}

bool rig_use_shape(struct rig *rig, const struct rig_shape *shape) {
    struct rig_build *b;

    if (shape->blocks < 1 || shape->blocks > K_MAX_BLOCKS || shape->warps < 1 ||
        shape->warps > 32 || shape->stages < 1 || shape->stages > 8 ||
        shape->stage_bytes < 128 || shape->stage_bytes % 128 ||
        (shape->blocks > 1 &&
         (shape->send_blocks < 1 || shape->send_blocks >= shape->blocks))) {
        printf("no such shape: blocks %d, send %d (1..blocks-1), warps %d (1..32), stages %d "
               "(1..8), stage bytes %d (a multiple of 128)\n",
               shape->blocks, shape->send_blocks, shape->warps, shape->stages,
               shape->stage_bytes);
        return false;
    }
    b = find_build(rig, shape->warps);
    if (!b) {
        b = make_build(rig, shape->warps);
    }
    rig->shape = *shape;
    return fits(rig, b);
}

/* ---- devices --------------------------------------------------------------------------- */

static void print_device(const struct epi_cu_device *d) {
    printf("device %d: %s, sm_%d%d, %d SMs, %.1f GiB, %d bytes of shared memory per block%s\n",
           d->index, d->name, d->major, d->minor, d->num_sms,
           (double)d->memory_bytes / (1 << 30), d->max_shared_bytes,
           d->cooperative ? "" : ", no cooperative launch");
}

static void open_rank(struct rig *rig, int r) {
    struct rig_rank *k = &rig->rank[r];

    k->device = &rig->device[rig->o.multi_gpu ? r : 0];
    rig_must(epi_cu_stream_create(k->device, &k->stream), "stream");
    rig_must(epi_cu_stream_create(k->device, &k->spare), "stream");
    rig_must(epi_cu_event_create(k->device, &k->begin), "event");
    rig_must(epi_cu_event_create(k->device, &k->end), "event");
}

ep_status rig_open(struct rig *rig, const struct rig_options *o) {
    void *pinned = NULL;
    ep_status st;

    memset(rig, 0, sizeof(*rig));
    rig->o = *o;
    /* Kernels wait for kernels of other streams: nothing may be loaded late, and every stream
     * needs a queue of its own. Read by cuInit. */
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    st = epi_cu_open();
    if (st != EP_OK) {
        return st;
    }
    rig->num_devices = o->multi_gpu ? o->num_ranks : 1;
    if (epi_cu_num_devices() < rig->num_devices) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "%d ranks on GPUs of their own need %d devices, "
                        "there are %d",
                        o->num_ranks, rig->num_devices, epi_cu_num_devices());
    }
    printf("driver for CUDA %d.%d, %d devices\n", epi_cu_driver_version() / 1000,
           epi_cu_driver_version() % 1000 / 10, epi_cu_num_devices());
    for (int d = 0; d < rig->num_devices; d++) {
        rig_must(epi_cu_device_open(&rig->device[d], d), "device");
        print_device(&rig->device[d]);
    }
    for (int a = 0; a < rig->num_devices; a++) {
        for (int b = 0; b < rig->num_devices; b++) {
            if (a != b) {
                rig_must(epi_cu_peer(&rig->device[a], &rig->device[b]), "peer access");
            }
        }
    }
    rig->cooperative = o->cooperative < 0
                           ? (o->multi_gpu || o->num_ranks == 1) && rig->device[0].cooperative
                           : o->cooperative != 0;
    rig_must(
        epi_cu_alloc_host(&rig->device[0], &pinned, RIG_MAX_RANKS * sizeof(*rig->looked) + 64),
        "pinned memory");
    rig->looked = pinned;
    rig->gate = (uint32_t *)(rig->looked + RIG_MAX_RANKS);
    *rig->gate = 0;
    for (int r = 0; r < o->num_ranks; r++) {
        open_rank(rig, r);
    }
    rig_must(open_compiler(&rig->nvrtc, epi_cu_driver_version() / 1000), "the compiler");
    printf("%d ranks on %d device(s), launches %scooperative, deadline %lld ms\n", o->num_ranks,
           rig->num_devices, rig->cooperative ? "" : "not ", (long long)o->timeout_ms);
    return EP_OK;
}

void rig_close(struct rig *rig) {
    void *pinned = rig->looked;

    rig_free_group(rig);
    for (int r = 0; r < rig->o.num_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        epi_cu_event_destroy(k->device, &k->begin);
        epi_cu_event_destroy(k->device, &k->end);
        epi_cu_stream_destroy(k->device, &k->stream);
        epi_cu_stream_destroy(k->device, &k->spare);
        free(k->item);
    }
    for (int i = 0; i < rig->num_builds; i++) {
        for (int d = 0; d < rig->num_devices; d++) {
            for (int f = 0; f < 3; f++) {
                epi_cu_module_unload(&rig->device[d], &rig->build[i].module[d][f]);
            }
        }
    }
    epi_cu_free_host(&rig->device[0], &pinned);
    epi_nvrtc_close(&rig->nvrtc);
    for (int d = 0; d < rig->num_devices; d++) {
        epi_cu_device_close(&rig->device[d]);
    }
}

/* ---- memory ---------------------------------------------------------------------------- */

uint64_t rig_alloc(struct rig *rig, int rank, size_t bytes) {
    struct rig_rank *k = &rig->rank[rank];

    if (k->num_items == k->max_items) {
        k->max_items = k->max_items ? 2 * k->max_items : 64;
        k->item = realloc(k->item, (size_t)k->max_items * sizeof(*k->item));
    }
    if (!k->item) {
        printf("FATAL: no memory\n");
        exit(3);
    }
    k->item[k->num_items] = 0;
    rig_must(epi_cu_alloc(k->device, &k->item[k->num_items], bytes), "device memory");
    return k->item[k->num_items++];
}

void rig_free_items(struct rig *rig) {
    for (int r = 0; r < rig->o.num_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        while (k->num_items > 0) {
            epi_cu_free(k->device, &k->item[--k->num_items]);
        }
    }
}

void rig_in(struct rig *rig, int rank, uint64_t to, const void *from, size_t bytes) {
    struct rig_rank *k = &rig->rank[rank];
    rig_must(epi_cu_copy_in(k->device, k->stream, to, from, bytes), "copy to the device");
}

void rig_out(struct rig *rig, int rank, void *to, uint64_t from, size_t bytes) {
    struct rig_rank *k = &rig->rank[rank];
    rig_must(epi_cu_copy_out(k->device, k->stream, to, from, bytes), "copy to the host");
}

void rig_fill(struct rig *rig, int rank, uint64_t at, int byte, size_t bytes) {
    struct rig_rank *k = &rig->rank[rank];
    rig_must(epi_cu_fill(k->device, k->stream, at, byte, bytes), "fill");
}

void rig_poison_arena(struct rig *rig, int rank, bool all) {
    const struct k_map *m = &rig->plan.map;
    const struct ep_plan_info *i = &rig->plan.info;
    const uint64_t at = rig->rank[rank].arena;

    if (all) {
        rig_fill(rig, rank, at + m->recv, RIG_ROW_POISON, (size_t)i->recv_bytes);
        rig_fill(rig, rank, at + m->side, RIG_POISON, (size_t)i->sidecar_bytes);
        rig_fill(rig, rank, at + m->expanded, RIG_ROW_POISON, (size_t)i->expanded_bytes);
    }
    rig_fill(rig, rank, at + m->land, RIG_ROW_POISON, (size_t)i->combine_bytes);
}

/* ---- groups ---------------------------------------------------------------------------- */

/* As make_tables of src/ep/group.c: one block, here with device addresses. */
static void make_tables(struct rig *rig, int r) {
    const struct ep_group_config *c = &rig->config;
    const size_t ranks = (size_t)rig->o.num_ranks, experts = (size_t)c->num_experts;
    const size_t bytes = epi_plan_table_bytes(c, rig->o.num_ranks);
    struct rig_rank *k = &rig->rank[r];
    k_u64 *peer = calloc(1, bytes);
    k_i32 *rank = (k_i32 *)(peer + ranks), *local = rank + experts, *of = local + experts;
    k_i32 *first = of + experts;
    k_i32 at = 0;

    for (size_t p = 0; p < ranks; p++) {
        peer[p] = rig->rank[p].arena;
    }
    for (int e = 0; e < c->num_experts; e++) {
        rank[e] = c->expert_rank ? c->expert_rank[e]
                                 : epi_default_rank(c->num_experts, rig->o.num_ranks, e);
        first[rank[e] + 1]++;
    }
    for (size_t p = 0; p < ranks; p++) {
        first[p + 1] += first[p];
    }
    for (int p = 0; p < rig->o.num_ranks; p++) {
        for (int e = 0; e < c->num_experts; e++) {
            if (rank[e] == p) {
                local[e] = at - first[p];
                of[at++] = e;
            }
        }
    }
    k->g.num_local = first[r + 1] - first[r];
    rig_must(epi_cu_alloc(k->device, &k->tables, bytes), "tables");
    rig_in(rig, r, k->tables, peer, bytes);
    k->g.peer = (const k_u64 *)(uintptr_t)k->tables;
    k->g.expert_rank = (const k_i32 *)(uintptr_t)(k->tables + 8 * ranks);
    k->g.expert_local = k->g.expert_rank + experts;
    k->g.rank_expert = k->g.expert_local + experts;
    k->g.rank_first = k->g.rank_expert + experts;
    free(peer);
}

/* As fill_kernel_group of src/ep/group.c. */
static void fill_group(struct rig *rig, int r) {
    struct rig_rank *rank = &rig->rank[r];
    struct k_group *k = &rank->g;
    struct k_ctl ctl;

    k->rank = r;
    k->num_ranks = rig->o.num_ranks;
    k->num_experts = rig->config.num_experts;
    k->num_channels = rig->plan.info.num_channels;
    k->count_words = rig->plan.count_words;
    k->side_stride = (k_i32)rig->plan.info.sidecar_row_bytes;
    k->max_dests = rig->plan.max_dests;
    k->scratch_bytes = K_SCRATCH_BYTES(rig->plan.max_dests);
    k->max_recv_rows = rig->plan.info.max_recv_rows;
    k->map = rig->plan.map;
    memset(&ctl, 0, sizeof(ctl));
    ctl.timeout_ns = rig->o.timeout_ms * 1000000;
    ctl.late_ns = ctl.timeout_ns / 2;
    rig_must(epi_cu_alloc(rank->device, &rank->ctl, sizeof(ctl)), "control block");
    rig_in(rig, r, rank->ctl, &ctl, sizeof(ctl));
    k->ctl = (struct k_ctl *)(uintptr_t)rank->ctl;
}

static void make_handle(struct rig *rig, int r) {
    struct rig_rank *rank = &rig->rank[r];
    struct epi_handle_map m;

    epi_plan_handle(&rig->config, &rig->plan, &m);
    rig_must(epi_cu_alloc(rank->device, &rank->block, m.bytes), "handle");
    rig_fill(rig, r, rank->block, 0, m.bytes);
    epi_plan_carve(&rank->h, (char *)(uintptr_t)rank->block, &m);
}

void rig_free_group(struct rig *rig) {
    rig_free_items(rig);
    for (int r = 0; r < rig->o.num_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        epi_cu_free(k->device, &k->arena);
        epi_cu_free(k->device, &k->tables);
        epi_cu_free(k->device, &k->block);
        epi_cu_free(k->device, &k->ctl);
        memset(&k->g, 0, sizeof(k->g));
        memset(&k->h, 0, sizeof(k->h));
    }
}

void rig_group(struct rig *rig, const struct ep_group_config *config) {
    rig_free_group(rig);
    rig->config = *config;
    rig->epoch = 0;
    rig_must(epi_plan(&rig->config, rig->o.num_ranks, &rig->plan), "plan");
    for (int r = 0; r < rig->o.num_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        const size_t bytes = (size_t)rig->plan.info.arena_bytes;
        rig_must(epi_cu_alloc(k->device, &k->arena, bytes), "arena");
        rig_fill(rig, r, k->arena, 0, bytes);
        rig_poison_arena(rig, r, true);
    }
    for (int r = 0; r < rig->o.num_ranks; r++) {
        make_tables(rig, r);
        fill_group(rig, r);
        make_handle(rig, r);
    }
    rig_wait(rig, "making a group"); /* nobody writes to an arena that is still being filled */
}

/* ---- launching and waiting ------------------------------------------------------------- */

void rig_launch(struct rig *rig, int rank, enum rig_kernel kernel, const void *args) {
    const struct rig_build *b = find_build(rig, rig->shape.warps);
    const struct rig_rank *k = &rig->rank[rank];
    const struct epi_cu_launch l = {
        .blocks = rig->shape.blocks,
        .threads = 32 * rig->shape.warps,
        .shared_bytes = rig_shared_bytes(rig, kernel),
        .cooperative = rig->cooperative,
        .stream = k->stream,
    };

    rig_must(epi_cu_launch(k->device, &b->kernel[k->device->index][kernel], &l, args),
             "launch");
}

static const char *phase_name(int phase) {
    static const char *const names[] = {"none", "ready",   "counts", "bases",
                                        "rows", "answers", "self",   "?"};
    return names[phase & 7];
}

static void print_ctl(const struct k_ctl *c, int r) {
    const struct k_fault *f = &c->fault;

    printf("rank %d: epoch %llu, go {%llu, %llu}, go_recv {%llu, %llu}, warps out %llu, rows "
           "sent %llu received %llu, bytes remote %llu local %llu, waited %.3f ms\n",
           r, c->epoch, c->go >> 32, c->go & 0xffffffff, c->go_recv >> 32,
           c->go_recv & 0xffffffff, c->out, c->rows_sent, c->rows_received, c->remote_bytes,
           c->local_bytes, (double)c->wait_ns * 1e-6);
    if (c->abort) {
        printf("    abort word %016llx: status %d from rank %d about rank %d, kind %d, phase "
               "%s\n",
               c->abort, K_ABORT_STATUS(c->abort), K_ABORT_REPORTER(c->abort),
               K_ABORT_SUBJECT(c->abort), K_ABORT_KIND(c->abort),
               phase_name(K_ABORT_PHASE(c->abort)));
    }
    if (f->claim) {
        printf("    fault: status %d, subject %d, reporter %d, kind %d, phase %s, epoch %u, "
               "waited %.1f ms, mine %08x, theirs %08x, ready word %d\n",
               f->status, f->subject, f->reporter, f->kind, phase_name(f->phase), f->epoch,
               (double)f->waited_ns * 1e-6, f->mine, f->theirs, f->word);
    }
    if (c->waiting) {
        printf("    a long wait, in operation %u: phase %s, peer %d\n",
               (unsigned)(c->waiting >> 32), phase_name((int)(c->waiting >> 16 & 0xffff)),
               (int)(c->waiting & 0xffff));
    }
}

/* Reads the control blocks, on streams that no kernel blocks; false if even that hangs. */
static bool look(struct rig *rig) {
    const double start = rig_now();

    for (int r = 0; r < rig->o.num_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        if (epi_cu_copy_out_async(k->device, k->spare, &rig->looked[r], k->ctl,
                                  sizeof(struct k_ctl)) != EP_OK) {
            return false;
        }
    }
    for (int r = 0; r < rig->o.num_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        ep_status st;
        while ((st = epi_cu_stream_query(k->device, k->spare)) == EP_AGAIN) {
            if (rig_now() - start > 5) {
                return false;
            }
        }
        if (st != EP_OK) {
            return false;
        }
    }
    return true;
}

void rig_print_ranks(struct rig *rig) {
    if (!look(rig)) {
        printf("the control blocks cannot be read: %s\n", ep_last_error());
        return;
    }
    for (int r = 0; r < rig->o.num_ranks; r++) {
        print_ctl(&rig->looked[r], r);
    }
}

void rig_wait(struct rig *rig, const char *what) {
    const double start = rig_now();
    const double most = STUCK_SECONDS + 3e-3 * (double)rig->o.timeout_ms;

    for (int r = 0; r < rig->o.num_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        ep_status st;
        while ((st = epi_cu_stream_query(k->device, k->stream)) == EP_AGAIN) {
            if (rig_now() - start < most) {
                continue;
            }
            printf("FATAL: %s: rank %d's stream has not ended after %.0f s\n", what, r, most);
            rig_print_ranks(rig);
            fflush(stdout);
            _exit(4);
        }
        if (st != EP_OK) {
            printf("FATAL: %s: rank %d's stream: %s\n", what, r, ep_last_error());
            rig_print_ranks(rig);
            fflush(stdout);
            _exit(3);
        }
    }
}

bool rig_sound(struct rig *rig, const char *what) {
    bool good = true;

    rig_wait(rig, what);
    if (!look(rig)) {
        printf("%s: the control blocks cannot be read: %s\n", what, ep_last_error());
        return false;
    }
    for (int r = 0; r < rig->o.num_ranks; r++) {
        const struct k_ctl *c = &rig->looked[r];
        if (c->abort || c->fault.claim || c->out || (uint32_t)c->epoch != rig->epoch) {
            printf("%s: rank %d has faulted, or has ended %llu operations instead of %u\n",
                   what, r, c->epoch, rig->epoch);
            good = false;
        }
    }
    if (!good) {
        for (int r = 0; r < rig->o.num_ranks; r++) {
            print_ctl(&rig->looked[r], r);
        }
    }
    return good;
}

bool rig_hold(struct rig *rig) {
    rig->gate_value++;
    for (int r = 0; r < rig->o.num_ranks; r++) {
        struct rig_rank *k = &rig->rank[r];
        if (epi_cu_stream_hold(k->device, k->stream, rig->gate, rig->gate_value) != EP_OK) {
            rig_release(rig); /* for those that are held */
            return false;
        }
    }
    return true;
}

void rig_release(struct rig *rig) {
    *(volatile uint32_t *)rig->gate = rig->gate_value;
}
