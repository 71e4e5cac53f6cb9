/* SPDX-License-Identifier: MIT */
/*
 * The life of a group: meeting, agreeing, mapping memory, and the end. Owns what all operations
 * share. Run by the threads that call the API; the boot's control thread enters through on_dead
 * only. op.c has the order of operations, fault.c says what ended a group.
 */
#include "src/ep/wires.h"

#include <string.h>

/* A wait that lasts longer gets a line in the log, and so does one of half the timeout. */
#define LATE_NS (10 * EPI_NS_PER_S)
/* How long rank 0 stays for peers that are in an operation which has ended here. */
#define MOST_STAY_NS EPI_NS_PER_S

/* What must agree on all ranks, and how it is called in messages. */
#define AGREED_FIELDS(X)                                                                       \
    X(version)                                                                                 \
    X(device)                                                                                  \
    X(num_experts)                                                                             \
    X(expert_rank)                                                                             \
    X(max_tokens)                                                                              \
    X(max_topk)                                                                                \
    X(max_row_bytes)                                                                           \
    X(max_scale_bytes)                                                                         \
    X(num_slots)                                                                               \
    X(flags)                                                                                   \
    X(mask_routing)                                                                            \
    X(max_recv_rows)                                                                           \
    X(max_expanded_rows)                                                                       \
    X(most_tokens)                                                                             \
    X(most_recv_rows)                                                                          \
    X(ll_max_tokens)                                                                           \
    X(ll_timeout_ms)                                                                           \
    X(memory_limit_bytes)                                                                      \
    X(timeout_ms)

struct agreed {
#define X(f) int64_t f;
    AGREED_FIELDS(X)
#undef X
};

static const char *const agreed_names[] = {
#define X(f) #f,
    AGREED_FIELDS(X)
#undef X
};
#define NUM_AGREED (sizeof(agreed_names) / sizeof(agreed_names[0]))

static void fill_agreed(const ep_group *g, struct agreed *a) {
    const struct ep_group_config *c = &g->config;
    memset(a, 0, sizeof(*a));
    a->version = (int64_t)ep_version();
    a->device = c->device;
    a->num_experts = c->num_experts;
    a->max_tokens = c->max_tokens;
    a->max_topk = c->max_topk;
    a->max_row_bytes = c->max_row_bytes;
    a->max_scale_bytes = c->max_scale_bytes;
    a->num_slots = g->plan.num_slots;
    a->flags = c->flags;
    a->mask_routing = c->mask_routing != 0;
    a->max_recv_rows = g->plan.info.max_recv_rows;
    a->ll_max_tokens = c->ll_max_tokens;
    a->most_tokens = c->most_tokens;
    a->most_recv_rows = g->plan.most_recv_rows;
    a->ll_timeout_ms = c->ll_timeout_ms;
    a->max_expanded_rows = g->plan.info.max_expanded_rows;
    a->memory_limit_bytes = c->memory_limit_bytes;
    a->timeout_ms = g->timeout_ns / EPI_NS_PER_MS;
    a->expert_rank = (int64_t)(g->experts->hash >> 1);
}

static ep_status gather(void *ctx, const void *in, size_t bytes, void *out) {
    ep_group *g = ctx;
    return epi_boot_allgather(g->boot, in, bytes, out, epi_deadline_after(g->timeout_ns));
}

static struct epi_exchange exchange_of(ep_group *g) {
    struct epi_exchange x = {gather, g, g->rank, g->num_ranks};
    return x;
}

/* Where a field's value comes from, if not from the field alone. */
static const char *about_field(const char *name) {
    if (strcmp(name, "expert_rank") == 0) {
        return " (hash of the map)";
    }
    if (strcmp(name, "timeout_ms") == 0) {
        return " (EP_TIMEOUT_MS, where the field is 0)";
    }
    return strcmp(name, "device") == 0 ? " (0 is the host, 1 is CUDA)" : "";
}

/* Every rank compares everybody with rank 0, so all find the same difference. */
static ep_status check_agreement(ep_group *g) {
    struct agreed mine;
    fill_agreed(g, &mine);
    struct agreed *all = epi_alloc_array((size_t)g->num_ranks, sizeof(*all));
    ep_status st = EP_OK;
    if (!all) {
        return epi_fail(EP_ERR_NOMEM, "no memory to compare %d ranks", g->num_ranks);
    }
    st = gather(g, &mine, sizeof(mine), all);
    for (int r = 1; st == EP_OK && r < g->num_ranks; r++) {
        for (size_t i = 0; st == EP_OK && i < NUM_AGREED; i++) {
            int64_t a, b;
            memcpy(&a, (const char *)&all[0] + i * sizeof(a), sizeof(a));
            memcpy(&b, (const char *)&all[r] + i * sizeof(b), sizeof(b));
            if (a != b) {
                st = epi_fail(EP_ERR_MISMATCH,
                              "ranks disagree in ep_group_config.%s: %lld on rank 0, %lld on "
                              "rank %d%s",
                              agreed_names[i], (long long)a, (long long)b, r,
                              about_field(agreed_names[i]));
            }
        }
    }
    epi_free(all);
    return st;
}

void epi_group_tables(ep_group *g, uint64_t at) {
    g->ll_ctl = (struct k_ll_ctl *)(uintptr_t)at;
    g->k.peer = (const k_u64 *)(epi_masks_peers(g->ll_ctl) + g->num_ranks);
    g->k.board = g->k.peer + g->num_ranks;
}

/* What kernels index, in host memory. */
static ep_status make_tables(ep_group *g) {
    const size_t bytes = epi_plan_table_bytes(g->num_ranks);
    g->tables = epi_alloc(bytes);
    if (!g->tables) {
        return epi_fail(EP_ERR_NOMEM, "no memory for the group's tables (%zu bytes)", bytes);
    }
    epi_group_tables(g, (uintptr_t)g->tables);
    return epi_experts_create(&g->experts, g, g->config.num_experts, g->config.expert_rank);
}

static void fill_kernel_group(ep_group *g) {
    struct k_group *k = &g->k;
    k->rank = g->rank;
    k->num_ranks = g->num_ranks;
    epi_experts_use(g->experts, k);
    k->num_channels = g->plan.info.num_channels;
    k->count_words = g->plan.count_words;
    k->side_stride = (k_i32)g->plan.info.sidecar_row_bytes;
    k->max_dests = g->plan.max_dests;
    k->scratch_bytes = K_SCRATCH_BYTES(g->plan.max_dests);
    k->max_recv_rows = g->plan.info.max_recv_rows;
    k->ctl = g->ctl;
    k->map = g->plan.map;
    k_u64 *peer = (k_u64 *)g->k.peer, *board = peer + g->num_ranks;
    for (int r = 0; r < g->num_ranks; r++) {
        const bool near = g->nodes.node[r] == g->nodes.own;
        peer[r] = near ? epi_mem_arena_address(g->mem, r) : 0;
        board[r] = near ? g->backend->board_address(g, r) : 0;
    }
    ((struct k_ll_ctl *)g->tables)->timeout_ns =
        g->config.ll_timeout_ms ? g->config.ll_timeout_ms * EPI_NS_PER_MS : g->timeout_ns;
    g->ctl->timeout_ns = g->timeout_ns;
    g->ctl->late_ns = g->timeout_ns / 2 < LATE_NS ? g->timeout_ns / 2 : LATE_NS;
}

/* On the boot's thread, perhaps before create knows this rank's number. */
static void on_dead(void *ctx, int rank, const char *why) {
    ep_group *g = ctx;
    int none = -1;
    if (atomic_compare_exchange_strong(&g->dead_rank, &none, rank)) {
        epi_format(g->dead_why, sizeof(g->dead_why), "%s", why ? why : "");
        epi_group_died(g, rank);
    }
}

/* The same, or on the thread of the rank that says it. */
static void on_told(void *ctx, uint64_t word) {
    epi_group_told(ctx, word);
}

static struct epi_boot_config meeting_of(const struct ep_group_config *config) {
    return (struct epi_boot_config){.rank = config->rank,
                                    .num_ranks = config->num_ranks,
                                    .address = config->address,
                                    .allgather = config->allgather,
                                    .allgather_ctx = config->allgather_ctx,
                                    .world = config->world,
                                    .job = config->job};
}

static ep_status meet(ep_group *g) {
    struct epi_boot_config b = meeting_of(&g->config);
    b.timeout_ns = g->timeout_ns;
    b.on_dead = on_dead;
    b.on_told = on_told;
    b.ctx = g;
    ep_status st = epi_boot_create(&g->boot, &b);
    if (st == EP_OK) {
        g->rank = epi_boot_rank(g->boot);
        g->num_ranks = epi_boot_num_ranks(g->boot);
        epi_log_set_rank(g->rank);
    }
    return st;
}

struct epi_shape epi_group_shape(const ep_group *g, int wanted, const struct epi_load *load) {
    return g->backend->shape(g, wanted ? wanted : g->workers, load);
}

/* What a group of several nodes cannot do in this version. */
static ep_status check_nodes(const ep_group *g) {
    const struct ep_group_config *c = &g->config;
    const char *what = c->device == EP_DEVICE_CUDA ? "device is EP_DEVICE_CUDA"
                       : c->ll_max_tokens          ? "ll_max_tokens is set (low-latency mode)"
                       : c->most_tokens || c->most_recv_rows
                           ? "most_tokens or most_recv_rows is set (growth)"
                           : NULL;
    return !what || g->nodes.num == 1
               ? EP_OK
               : epi_fail(EP_ERR_UNSUPPORTED,
                          "the group's ranks are of %d nodes, and %s: this version cannot do "
                          "that between nodes",
                          g->nodes.num, what);
}

/* Everything that needs this rank alone. */
static ep_status make_local(ep_group *g) {
    EPI_TRY(check_nodes(g));
    EPI_TRY(epi_plan(&g->config, g->num_ranks, &g->nodes, &g->plan));
    EPI_TRY(make_tables(g));
    return g->backend->open(g);
}

static ep_status make_memory(ep_group *g, const struct epi_exchange *x) {
    struct epi_mem_device device;
    struct epi_mem_config m;
    memset(&m, 0, sizeof(m));
    m.exchange = *x;
    m.ranks = g->nodes.ranks + g->nodes.first[g->nodes.own];
    m.num_ranks = epi_node_ranks(&g->nodes, g->nodes.own);
    m.arena_bytes = (size_t)g->plan.length;
    m.use = g->plan.num_uses ? g->plan.use : NULL;
    m.num_uses = g->plan.num_uses;
    m.threads = epi_boot_is_threads(g->boot);
    m.deadline = epi_deadline_after(g->timeout_ns);
    g->backend->choose_memory(g, &m, &device);
    return epi_mem_create(&g->mem, &m);
}

/* With memory: what kernels read, and the boards. */
static ep_status make_readable(ep_group *g, const struct epi_exchange *x) {
    fill_kernel_group(g);
    epi_group_open_board(g);
    if (epi_boot_is_threads(g->boot)) {
        EPI_TRY(epi_life_create(&g->life, g));
        epi_life_join(g->life);
    }
    EPI_TRY(epi_masks_create(g, x));
    return g->backend->prepare(g, x);
}

static ep_status form(ep_group *g) {
    EPI_TRY(meet(g));
    const struct epi_exchange x = exchange_of(g);
    EPI_TRY(epi_nodes_create(&g->nodes, &x));
    EPI_TRY(epi_agree(&x, make_local(g), "creating the group"));
    EPI_TRY(check_agreement(g));
    EPI_TRY(make_memory(g, &x));
    EPI_TRY(epi_wires_create(&g->wires, g, &x));
    if (g->nodes.num > 1) {
        EPI_TRY(epi_agree(&x, epi_far_create(g), "making tables of nodes"));
    }
    EPI_TRY(make_readable(g, &x));
    return epi_boot_barrier(g->boot, epi_deadline_after(g->timeout_ns));
}

static void free_group(ep_group *g) {
    epi_life_close(&g->life); /* before its board goes */
    epi_wires_stop(g->wires);
    epi_boot_destroy(&g->boot); /* before others: its thread calls on_dead */
    g->backend->stop(g);
    epi_wires_free(&g->wires, false);
    epi_experts_free(g, false);
    epi_mem_destroy(&g->mem);
    g->backend->close(g);
    epi_free(g->tables);
    epi_free(g->masks);
    epi_free(g->ctl);
    epi_free(g->far);
    epi_nodes_free(&g->nodes);
    pthread_cond_destroy(&g->turn);
    pthread_mutex_destroy(&g->mutex);
    epi_free(g);
}

ep_status epi_fail_before_meeting(const struct ep_group_config *config, ep_status st) {
    const struct epi_boot_config b = meeting_of(config);
    return epi_boot_say_failed(&b, st);
}

ep_status epi_group_create(ep_group **out, const struct ep_group_config *config) {
    ep_group *g = epi_alloc(sizeof(*g));
    struct k_ctl *ctl = epi_alloc(sizeof(*ctl));
    if (!g || !ctl) {
        epi_free(g);
        epi_free(ctl);
        return epi_fail_before_meeting(config, epi_fail(EP_ERR_NOMEM, "no memory for a group"));
    }
    g->process = epi_process();
    g->config = *config;
    g->backend = config->device == EP_DEVICE_CUDA ? &epi_backend_cuda : &epi_backend_host;
    g->ctl = ctl;
    g->timeout_ns =
        (config->timeout_ms ? config->timeout_ms : epi_opt_int(EPI_OPT_TIMEOUT_MS)) *
        EPI_NS_PER_MS;
    atomic_init(&g->dead_rank, -1);
    pthread_mutex_init(&g->mutex, NULL);
    epi_cond_init(&g->turn);
    ep_status st = form(g);
    g->config.expert_rank = NULL; /* borrowed during create only */
    g->config.address = g->config.job = NULL;
    if (st != EP_OK) {
        free_group(g);
        return st;
    }
    *out = g;
    return EP_OK;
}

/* ---- growth --------------------------------------------------------------------------------- */

static ep_status check_growth(ep_group *g, const struct ep_needs *want) {
    EPI_TRY(epi_check_not_open("ep_group_grow", g));
    if (g->nodes.num > 1) {
        return epi_fail(
            EP_ERR_UNSUPPORTED,
            "ep_group_grow: the group's ranks are of %d nodes: it cannot grow in this "
            "version",
            g->nodes.num);
    }
    if (want->max_tokens < 0 || want->max_tokens > epi_most_tokens(&g->config) ||
        want->max_recv_rows < 0 || want->max_recv_rows > g->plan.most_recv_rows) {
        return epi_fail(EP_ERR_ARG,
                        "%d tokens and %lld received rows are wanted, and the ceilings are %d "
                        "(most_tokens) and %lld (most_recv_rows)",
                        want->max_tokens, (long long)want->max_recv_rows,
                        epi_most_tokens(&g->config), (long long)g->plan.most_recv_rows);
    }
    return epi_group_admit(g);
}

/* The largest that any rank wants. */
static ep_status agree_needs(ep_group *g, struct ep_needs *want) {
    struct ep_needs *all = epi_alloc_array((size_t)g->num_ranks, sizeof(*all));
    const struct epi_exchange x = exchange_of(g);
    ep_status st =
        all ? EP_OK : epi_fail(EP_ERR_NOMEM, "no memory to hear %d ranks", g->num_ranks);
    st = epi_agree_alike(&x, st == EP_OK ? check_growth(g, want) : st, "ep_group_grow");
    st = st == EP_OK ? gather(g, want, sizeof(*want), all) : st;
    for (int r = 0; st == EP_OK && r < g->num_ranks; r++) {
        want->max_tokens =
            all[r].max_tokens > want->max_tokens ? all[r].max_tokens : want->max_tokens;
        want->max_recv_rows = all[r].max_recv_rows > want->max_recv_rows ? all[r].max_recv_rows
                                                                         : want->max_recv_rows;
    }
    epi_free(all);
    return st;
}

static ep_status grow_group(ep_group *g, struct ep_needs *want) {
    struct ep_group_config c = g->config;
    struct epi_plan plan = g->plan;
    EPI_TRY(agree_needs(g, want));
    c.max_tokens = want->max_tokens > c.max_tokens ? want->max_tokens : c.max_tokens;
    if (c.max_recv_rows && want->max_recv_rows > c.max_recv_rows) {
        c.max_recv_rows = want->max_recv_rows;
    }
    EPI_TRY(epi_plan_again(&c, &plan)); /* the same on all ranks */
    if (plan.info.arena_bytes > g->plan.info.arena_bytes) {
        EPI_TRY(epi_mem_grow(g->mem, epi_deadline_after(g->timeout_ns), g->plan.use, plan.use));
    }
    pthread_mutex_lock(&g->mutex);
    g->config = c;
    g->plan = plan;
    g->k.max_recv_rows = plan.info.max_recv_rows;
    pthread_mutex_unlock(&g->mutex);
    return EP_OK;
}

ep_status epi_group_grow(ep_group *g, const struct ep_needs *needs) {
    struct ep_needs want = *needs;
    if (g->cannot_meet) { /* the others count its meetings otherwise */
        return epi_fail(
            EP_ERR_STATE,
            "ep_group_grow: an earlier one has ended before all ranks had come: this "
            "group cannot grow any more");
    }
    const ep_status st = grow_group(g, &want);
    g->cannot_meet = g->cannot_meet || st == EP_ERR_TIMEOUT;
    return st;
}

/* ---- the end -------------------------------------------------------------------------------- */

/* The last operation that this rank has taken part in. */
static uint64_t last_operation(ep_group *g) {
    struct k_ctl ctl;
    pthread_mutex_lock(&g->mutex);
    uint64_t last = g->issued;
    pthread_mutex_unlock(&g->mutex);
    if (g->backend->on_device && g->backend->read_ctl(g, &ctl) == EP_OK) {
        last = ctl.epoch; /* graphs have run some that nobody has issued */
    }
    return last;
}

/* In a process that was forked from the one that made the group: the group lives on there, so
 * nobody is told; its threads and its memory are not here; and a mutex may be held for ever. What
 * a driver keeps is left alone: it may not be called here. */
static void free_forked(ep_group *g) {
    epi_boot_destroy(&g->boot);
    epi_run_destroy(&g->run);
    epi_mem_destroy(&g->mem);
    epi_free(g->cuda);
    epi_experts_free(g, true);
    epi_free(g->tables);
    epi_free(g->masks);
    epi_free(g->ctl);
    epi_wires_free(&g->wires, true);
    epi_free(g->far);
    epi_nodes_free(&g->nodes);
    epi_free(g);
}

/*
 * Rank 0's boot is the one that passes deaths on. A peer may still be in an operation that has ended
 * here: if another one dies now, it is to learn that. All have begun it, so this is soon over; who is
 * stopped in it is left to its deadline.
 */
static void await_peers_end(const ep_group *g, uint64_t last) {
    const bool serves = g->rank == 0 && !epi_boot_is_threads(g->boot) && !g->backend->on_device;
    const struct epi_deadline d =
        epi_deadline_after(g->timeout_ns < MOST_STAY_NS ? g->timeout_ns : MOST_STAY_NS);
    for (int r = 1; serves && r < g->num_ranks; r++) {
        while (g->nodes.node[r] == g->nodes.own && !epi_group_has_ended(g, r, last) &&
               atomic_load(&g->dead_rank) < 0 && !epi_deadline_expired(d)) {
            epi_sleep_ns(50 * EPI_NS_PER_US);
        }
    }
}

void epi_group_destroy(ep_group **group) {
    ep_group *g = *group;
    *group = NULL;
    if (epi_is_forked(g->process)) {
        free_forked(g);
        return;
    }
    epi_life_join(g->life); /* this thread's list forgets the groups that are gone */
    if (g->num_handles) {
        epi_log(EPI_LOG_WARN,
                "ep_group_destroy: %d handle(s) of the group are alive and must "
                "not be used or destroyed any more",
                g->num_handles);
    }
    const bool settled = g->backend->settle(g);
    if (!settled) {
        epi_log(EPI_LOG_WARN,
                "ep_group_destroy: operations of the group are still queued on a stream after "
                "%lld ms; its memory is left mapped",
                (long long)(g->timeout_ns / EPI_NS_PER_MS));
    }
    if (settled && !epi_group_faulted(g)) {
        /* Nobody waits for the others to come to this. What they need of the operations that have
         * ended here lies in their own arenas; what they still write to this rank's goes to pages
         * that stay as long as they map them. Whoever begins an operation that this rank will not
         * join is told. */
        const uint64_t last = last_operation(g);
        epi_group_leave(g, last);
        await_peers_end(g, last);
    }
    if (settled) {
        free_group(g);
    } else {
        epi_wires_stop(g->wires);
        epi_boot_destroy(&g->boot);
    }
}
