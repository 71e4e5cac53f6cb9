/* SPDX-License-Identifier: MIT */
/*
 * The life of an operation: issue, turn, kernel, end. Run by the threads that call the API and by
 * those of streams. Must not know what an operation means: that is its kind's.
 */
#include "src/ep/op.h"

#include <string.h>

#include "src/ep/group.h"
#include "src/ep/wires.h"

/* How soon an operation that waits for its turn learns that it need not. */
#define TURN_NS (20 * EPI_NS_PER_MS)

void epi_op_of_group(struct epi_op *op, const struct epi_op_kind *kind, ep_group *g, int asked,
                     const struct epi_load *load) {
    memset(op, 0, sizeof(*op));
    op->kind = kind;
    op->g = g;
    op->shape = epi_group_shape(g, asked, load);
    op->args.op.g = g->k;
}

void epi_op_experts(struct epi_op *op, struct epi_experts *e) {
    op->experts = e;
    epi_experts_use(e, &op->args.op.g);
}

void epi_op_begin(struct epi_op *op, const struct epi_op_kind *kind, ep_handle *h, int asked,
                  const struct epi_load *load) {
    struct k_op *k = &op->args.op;
    epi_op_of_group(op, kind, h->group, asked, load);
    op->h = h;
    epi_op_experts(op, h->experts);
    k->h = h->k;
    k->tokens = h->tokens;
    k->topk = h->topk;
    k->row_bytes = load->row_bytes;
    k->send_blocks = (k_u32)op->shape.send_blocks;
    epi_plan_channels(&op->g->plan, h->tokens, &k->channels);
}

void epi_call_of(struct epi_call *c, const ep_handle *h, bool expanded) {
    epi_call_begin(c, h->group);
    epi_call_experts(c, h->experts);
    c->is = (h->by_mask ? EPI_BY_MASK : 0) | (expanded ? EPI_EXPANDED : EPI_COMPACT);
    c->dim[EPI_DIM_T] = h->excess ? h->excess : h->tokens;
    c->dim[EPI_DIM_K] = h->topk;
}

/* Under the mutex: an operation that the stream cannot take has no number, and no peer counts on it.
 * `numbered`: it has got one, now or before. */
static ep_status number_and_launch(struct epi_op *op, void *stream, bool *numbered) {
    ep_group *g = op->g;
    const struct epi_backend *b = g->backend;
    EPI_TRY(b->order(op, stream));
    if (op->kind->faults && !(op->flags & EPI_OP_FINISH)) {
        op->turn = ++g->turns_issued;
        if (!op->kind->counts_itself) {
            op->number = g->issued = K_NEXT(g->issued);
        }
    }
    *numbered = op->turn != 0;
    if (op->experts && (op->flags & EPI_OP_CAPTURED)) {
        op->experts->captured = true;
    }
    if (op->kind->issued) {
        op->kind->issued(op);
    }
    epi_half_issued(op);
    return b->launch ? b->launch(op, stream) : EP_OK;
}

ep_status epi_op_issue(struct epi_op *op, void *stream) {
    ep_group *g = op->g;
    const struct epi_op_kind *kind = op->kind;
    bool numbered = false;
    if (g->backend->on_device && kind->faults == &epi_faults_end_group &&
        !(op->flags & EPI_OP_FINISH)) {
        EPI_TRY(epi_masks_refuse(g)); /* on the host it has its number when it learns that */
    }
    pthread_mutex_lock(&g->mutex);
    ep_status st = number_and_launch(op, stream, &numbered);
    pthread_mutex_unlock(&g->mutex);
    if (st != EP_OK && numbered && !(op->flags & EPI_OP_DROPPED)) {
        kind->faults->not_launched(op, st);
    }
    const bool submits = st == EP_OK && g->backend->submit;
    if (submits) {
        st = g->backend->submit(op, stream);
    }
    if (st != EP_OK && g->backend->submit && (!stream || !submits)) {
        if (op->flags & EPI_OP_BEGIN) {
            epi_half_close(op->h);
        }
        if (kind->failed) {
            kind->failed(op);
        }
    }
    return st;
}

/* Begin may be on another stream than finish, and has ended the operation if it failed. */
static bool is_turn(const struct epi_op *op) {
    const ep_group *g = op->g;
    return g->turns_ended >= op->turn ||
           (g->turns_ended == op->turn - 1 &&
            (!(op->flags & EPI_OP_FINISH) || op->h->sent == op->turn));
}

/* Blocks until the operation before this one has ended, or until it has nothing to wait for. */
static void await_turn(const struct epi_op *op) {
    ep_group *g = op->g;
    pthread_mutex_lock(&g->mutex);
    /* Every operation that runs has a deadline; one whose stream never comes to it has none. */
    while (!is_turn(op) && !op->kind->faults->is_over(op)) {
        epi_cond_wait(&g->turn, &g->mutex, epi_deadline_after(TURN_NS));
    }
    pthread_mutex_unlock(&g->mutex);
}

void epi_op_end(const struct epi_op *op) {
    ep_group *g = op->g;
    pthread_mutex_lock(&g->mutex);
    if (g->turns_ended < op->turn) {
        /* If it comes before its turn, one before it may be in its kernel. */
        if (op->number && g->turns_ended == op->turn - 1) {
            atomic_store((_Atomic k_u64 *)&g->ctl->epoch, (uint32_t)op->number);
        }
        g->turns_ended = op->turn;
        if (op->number) {
            epi_group_note_end(g, op->number);
        }
        pthread_cond_broadcast(&g->turn);
    }
    pthread_mutex_unlock(&g->mutex);
}

static ep_status check_op(const struct epi_op *op) {
    return op->kind->faults ? op->kind->faults->check(op) : EP_OK;
}

static ep_status run_kernel(struct epi_op *op) {
    const struct epi_op_kind *kind = op->kind;
    if (kind->before) {
        EPI_TRY(kind->before(op));
    }
    if (op->g->wires) {
        epi_wires_wake(op->g->wires);
    }
    (kind->faults ? epi_run_kernel : epi_run_local)(op->g->run, kind->kernel, &op->args,
                                                    op->shape.workers);
    op->flags |= EPI_OP_RAN;
    EPI_TRY(check_op(op));
    return kind->after ? kind->after(op) : EP_OK;
}

ep_status epi_op_run(void *arg) {
    struct epi_op *op = arg;
    ep_handle *h = op->h;
    const struct epi_op_kind *kind = op->kind;
    if (kind->faults) {
        await_turn(op);
    }
    ep_status st = check_op(op);
    if (st == EP_OK) {
        st = run_kernel(op);
    }
    if (st == EP_OK) {
        epi_half_sent(op);
    }
    if (st != EP_OK && !(op->flags & EPI_OP_RAN) && kind->clear) {
        kind->clear(op);
    }
    if (kind->faults && !(op->flags & EPI_OP_OPEN)) {
        epi_op_end(op);
    }
    if (op->experts) {
        epi_experts_let_go(op->experts);
    }
    if (h) {
        atomic_fetch_sub(&h->pending, 1);
        epi_handle_release(h);
    }
    return st;
}
