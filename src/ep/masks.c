/* SPDX-License-Identifier: MIT */
/*
 * Masks of low-latency mode on the host side: the calls that set them, ask for them and meet without
 * them, and what is told of them. Kernels mask, in their own memory, and say on the board that there is
 * news; whoever asks next reads it and finds out what the masked process is doing. Any thread; the lock
 * is held while memory is read, never while anything is waited for.
 */
#include "src/ep/group.h"

#include <string.h>
#include <unistd.h>

struct known {
    struct epi_process process; /* of the rank, when the group was made */
    k_u64 mask;                 /* of which this is known: */
    int32_t why;                /* EP_LL_MASK_... */
    bool untold;
};

struct epi_masks {
    pthread_mutex_t lock;
    struct known *rank;     /* [R] */
    struct k_ll_peer *peer; /* [R] as last read */
};

ep_status epi_masks_create(ep_group *g, const struct epi_exchange *x) {
    const size_t ranks = (size_t)g->num_ranks;
    struct epi_process own, *all = NULL;
    ep_status st = EP_OK;
    if (!(g->config.flags & EP_GROUP_LL_MASKS)) {
        return EP_OK;
    }
    struct epi_masks *m = epi_alloc(sizeof(*m) + ranks * (sizeof(*m->rank) + sizeof(*m->peer)));
    all = epi_alloc_array(ranks, sizeof(*all));
    if (m && all) {
        pthread_mutex_init(&m->lock, NULL);
        m->rank = (struct known *)(m + 1);
        m->peer = (struct k_ll_peer *)(m->rank + ranks);
        g->masks = m;
        epi_process_see((int)getpid(), &own);
    } else {
        st = epi_fail(EP_ERR_NOMEM, "no memory for the masks of %d ranks", g->num_ranks);
        epi_free(m);
    }
    st = epi_agree(x, st, "preparing masks");
    if (st == EP_OK) {
        st = x->allgather(x->ctx, &own, sizeof(own), all);
    }
    for (size_t r = 0; st == EP_OK && r < ranks; r++) {
        m->rank[r].process = all[r];
    }
    epi_free(all);
    return st;
}

/* ---- what is known -------------------------------------------------------------------------- */

/* Of a rank that did not come in time. Ranks that are threads of this process are never stopped alone. */
static int32_t why_late(const struct epi_process *was) {
    struct epi_process now;
    if (!epi_process_see(was->pid, &now) || now.start != was->start || now.state == 'Z') {
        return was->pid ? EP_LL_MASK_GONE : EP_LL_MASK_LATE;
    }
    return now.state == 'T' || now.state == 't' ? EP_LL_MASK_STOPPED : EP_LL_MASK_LATE;
}

static void look_at(struct epi_masks *m, int rank) {
    struct known *r = &m->rank[rank];
    const k_u64 mask = m->peer[rank].mask;
    if (mask == r->mask) {
        return;
    }
    r->mask = mask;
    static const int32_t whys[] = {[0] = EP_LL_MASK_NONE,
                                   [K_LL_WHY_GONE] = EP_LL_MASK_GONE,
                                   [K_LL_WHY_MASKED_US] = EP_LL_MASK_BY_IT,
                                   [K_LL_WHY_CALLER] = EP_LL_MASK_BY_CALLER};
    const int why = K_LL_NOTED(mask);
    r->why = why == K_LL_WHY_LATE ? why_late(&r->process) : whys[why];
    r->untold = mask != 0 && why != K_LL_WHY_CALLER;
}

/* The lock is held. */
static ep_status read_news(ep_group *g) {
    struct epi_masks *m = g->masks;
    struct k_board *board = g->backend->board(g, g->rank);
    if (atomic_exchange((_Atomic k_u64 *)&board->mask_news, 0) == 0) {
        return EP_OK;
    }
    EPI_TRY(g->backend->read(g, m->peer, epi_masks_peers(g->ll_ctl),
                             (size_t)g->num_ranks * sizeof(*m->peer)));
    for (int r = 0; r < g->num_ranks; r++) {
        look_at(m, r);
    }
    return EP_OK;
}

static void describe_mask(const ep_group *g, int rank, struct ep_ll_mask *out) {
    const struct epi_masks *m = g->masks;
    const k_u64 waited = m->peer[rank].waited;
    memset(out, 0, sizeof(*out));
    out->size = sizeof(*out);
    out->why = m->rank[rank].why;
    if (out->why == EP_LL_MASK_NONE) {
        return;
    }
    out->operation = (int32_t)(waited & 0xffff);
    out->waited_ms = (int64_t)(waited >> 32);
    epi_format(out->phase, sizeof(out->phase), "%s",
               epi_phase_name((int)(waited >> 16 & 0xffff)));
    switch (out->why) {
    case EP_LL_MASK_GONE:
        epi_format(out->message, sizeof(out->message), "rank %d died or has left the group",
                   rank);
        break;
    case EP_LL_MASK_BY_IT:
        epi_format(out->message, sizeof(out->message), "rank %d has masked rank %d", rank,
                   g->rank);
        break;
    case EP_LL_MASK_BY_CALLER:
        epi_format(out->message, sizeof(out->message), "rank %d was masked by ep_ll_mask_rank",
                   rank);
        break;
    default:
        epi_format(out->message, sizeof(out->message),
                   "rank %d was waited for by rank %d in a %s, phase %s, for %lld ms: %s", rank,
                   g->rank, epi_operation_name(out->operation), out->phase,
                   (long long)out->waited_ms,
                   out->why == EP_LL_MASK_STOPPED ? "its process is stopped (SIGSTOP)"
                                                  : "it is alive but late");
    }
}

static bool is_peers_fault(int why) {
    return why == EP_LL_MASK_GONE || why == EP_LL_MASK_BY_IT;
}

ep_status epi_masks_tell(ep_group *g) {
    struct epi_masks *m = g->masks;
    struct ep_ll_mask first;
    char more[128] = "";
    int num = 0;
    if (!m) {
        return EP_OK;
    }
    pthread_mutex_lock(&m->lock);
    ep_status st = read_news(g);
    for (int r = 0; st == EP_OK && r < g->num_ranks; r++) {
        struct known *k = &m->rank[r];
        if (k->untold && num++ == 0) {
            describe_mask(g, r, &first);
        } else if (k->untold) {
            const size_t at = strlen(more);
            epi_format(more + at, sizeof(more) - at, "%s %d", num == 2 ? "; and without" : ",",
                       r);
        }
        k->untold = false;
    }
    pthread_mutex_unlock(&m->lock);
    return st != EP_OK || num == 0
               ? st
               : epi_fail(is_peers_fault(first.why) ? EP_ERR_PEER : EP_ERR_TIMEOUT,
                          "%s: the call was completed without it, and it is masked%s",
                          first.message, more);
}

bool epi_masks_bar(const ep_group *g) {
    return g->masks &&
           (atomic_load(&g->dead_rank) >= 0 ||
            atomic_load((_Atomic k_u64 *)&g->backend->board(g, g->rank)->masked) != 0);
}

ep_status epi_masks_refuse(ep_group *g) {
    struct ep_ll_mask what = {.why = EP_LL_MASK_NONE};
    if (!epi_masks_bar(g)) {
        return EP_OK;
    }
    pthread_mutex_lock(&g->masks->lock);
    const ep_status st = read_news(g);
    for (int r = 0; st == EP_OK && what.why == EP_LL_MASK_NONE && r < g->num_ranks; r++) {
        describe_mask(g, r, &what);
    }
    pthread_mutex_unlock(&g->masks->lock);
    if (st == EP_OK && what.why == EP_LL_MASK_NONE) {
        epi_format(what.message, sizeof(what.message), "rank %d died",
                   atomic_load(&g->dead_rank));
    }
    return st != EP_OK
               ? st
               : epi_fail(EP_ERR_PEER, "operations of throughput mode need all ranks: %s",
                          what.message);
}

/* ---- calls ---------------------------------------------------------------------------------- */

struct masks_args {
    struct ep_tensor *masks;
};

static const struct epi_rule rules[] = {{EPI_FIELD(masks_args, masks, k_ll_masks_args, masks),
                                         EPI_OUT | EPI_REQUIRED, EPI_DIMS(R, NONE),
                                         EPI_TYPE(EP_I32), EPI_AS(NONE, DENSE), 0}};
EPI_RULES(epi_ll_masks_rules, rules);

static ep_status after(struct epi_op *op) {
    EPI_TRY(epi_ll_tell_refused(op->g));
    return op->args.ll_masks.what == K_LL_BARRIER ? epi_masks_tell(op->g) : EP_OK;
}

static const struct epi_op_kind masks_kind = {.kernel = EPI_KERNEL_LL_MASKS,
                                              .faults = &epi_faults_end_ll,
                                              .counts_itself = true,
                                              .after = after};

static ep_status check_masks(const char *fn, ep_group *g) {
    EPI_NOT_FORKED(fn, "group", g->process);
    return g->masks ? EP_OK
                    : epi_fail(EP_ERR_UNSUPPORTED,
                               "%s: the group was created without EP_GROUP_LL_MASKS", fn);
}

static ep_status check_rank(const char *fn, const ep_group *g, int rank, int least) {
    return rank < least || rank >= g->num_ranks || rank == g->rank
               ? epi_fail(EP_ERR_ARG,
                          "%s: rank is %d, must be %d..%d and not %d, which is the caller's",
                          fn, rank, least, g->num_ranks - 1, g->rank)
               : EP_OK;
}

static ep_status issue(ep_group *g, int what, int rank, const struct ep_tensor *tensor,
                       void *stream) {
    struct masks_args a = {(struct ep_tensor *)tensor};
    struct epi_call c;
    struct epi_op op;
    const struct epi_load load = {0, g->config.max_topk, true, false};
    EPI_TRY(epi_group_admit(g));
    epi_call_begin(&c, g);
    if (what == K_LL_ASK) {
        EPI_TRY(epi_args_check(&c, &epi_ll_masks_rules, &a, EPI_OUT));
    }
    epi_op_of_group(&op, &masks_kind, g, 1, &load);
    epi_ll_fill(&op, &op.args.ll_masks.ll, 0);
    op.args.ll_masks.what = what;
    op.args.ll_masks.rank = rank;
    if (what == K_LL_ASK) {
        epi_args_fill(&c, &epi_ll_masks_rules, &a, EPI_OUT, &op.args.ll_masks);
    }
    return epi_op_issue(&op, stream);
}

ep_status ep_ll_mask_rank(ep_group *group, int rank, void *stream) {
    EPI_NOT_NULL("ep_ll_mask_rank", group);
    EPI_TRY(check_masks("ep_ll_mask_rank", group));
    EPI_TRY(check_rank("ep_ll_mask_rank", group, rank, 0));
    return issue(group, K_LL_MASK, rank, NULL, stream);
}

ep_status ep_ll_unmask_rank(ep_group *group, int rank, void *stream) {
    EPI_NOT_NULL("ep_ll_unmask_rank", group);
    EPI_TRY(check_masks("ep_ll_unmask_rank", group));
    EPI_TRY(check_rank("ep_ll_unmask_rank", group, rank, -1));
    return issue(group, K_LL_UNMASK, rank, NULL, stream);
}

ep_status ep_ll_masks(ep_group *group, struct ep_tensor *masks, void *stream) {
    EPI_NOT_NULL("ep_ll_masks", group);
    EPI_TRY(check_masks("ep_ll_masks", group));
    return issue(group, K_LL_ASK, 0, masks, stream);
}

ep_status ep_ll_barrier(ep_group *group, void *stream) {
    EPI_NOT_NULL("ep_ll_barrier", group);
    EPI_TRY(check_masks("ep_ll_barrier", group));
    return issue(group, K_LL_BARRIER, 0, NULL, stream);
}

ep_status ep_ll_mask_report(ep_group *group, int rank, struct ep_ll_mask *report) {
    struct ep_ll_mask r;
    EPI_NOT_NULL("ep_ll_mask_report", group);
    EPI_NOT_NULL("ep_ll_mask_report", report);
    EPI_TRY(check_masks("ep_ll_mask_report", group));
    EPI_TRY(check_rank("ep_ll_mask_report", group, rank, 0));
    pthread_mutex_lock(&group->masks->lock);
    const ep_status st = read_news(group);
    describe_mask(group, rank, &r);
    pthread_mutex_unlock(&group->masks->lock);
    EPI_TRY(st);
    return EPI_GIVE(ep_ll_mask, report, &r);
}
