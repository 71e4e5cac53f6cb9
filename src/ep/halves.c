/* SPDX-License-Identifier: MIT */
/*
 * Operations in two calls: begin sends, finish receives what peers send. They are two issues of one
 * number, and nothing else of the group is issued between them. Here is what a kind that can be
 * called so has in common: dispatch and combine. Run by the threads that call the API and, where a
 * comment says so, by those of streams.
 */
#include "src/ep/group.h"

static const char *kind_name(const struct epi_op *op) {
    return op->kind->kernel == EPI_KERNEL_COMBINE ? "combine" : "dispatch";
}

ep_status epi_check_not_open(const char *fn, const ep_group *g) {
    return g->open_handle
               ? epi_fail(EP_ERR_STATE, "%s: a %s of this group has begun and not finished", fn,
                          kind_name(&g->open_handle->open_op))
               : EP_OK;
}

ep_status epi_half_admit(const char *fn, const ep_handle *h, const struct epi_op_kind *kind,
                         uint32_t part) {
    if (part != EPI_OP_FINISH) {
        return epi_check_not_open(fn, h->group);
    }
    return h->group->open_handle == h && h->open_op.kind == kind
               ? EP_OK
               : epi_fail(EP_ERR_STATE,
                          "%s: nothing that it finishes has begun with this handle: call "
                          "begin first",
                          fn);
}

ep_status epi_half_stream(const char *fn, const ep_handle *h, uint32_t part, void *stream,
                          uint32_t *flags) {
    bool capturing = false;
    EPI_TRY(h->group->backend->is_capturing(h->group, stream, &capturing));
    *flags = capturing ? EPI_OP_CAPTURED : 0;
    return part == EPI_OP_FINISH && (h->open_op.flags & EPI_OP_CAPTURED) != *flags
               ? epi_fail(EP_ERR_STATE,
                          "%s: the stream is%s being captured, and that of begin was%s: both "
                          "go into the graph, or none",
                          fn, capturing ? "" : " not", capturing ? " not" : "")
               : EP_OK;
}

void epi_half_recall(struct epi_call *c, const ep_handle *h) {
    const uint32_t form = c->is;
    *c = h->open_call;
    c->is = form | (c->is & (EPI_NO_SCALES | EPI_NO_WEIGHTS));
}

void epi_half_continue(struct epi_op *op, const ep_handle *h) {
    *op = h->open_op;
    op->flags = EPI_OP_FINISH | EPI_OP_CACHED;
    op->args.op.flags &= ~(K_DO_SEND | K_DO_COUNTS);
}

/* Under the group's mutex. */
void epi_half_issued(const struct epi_op *op) {
    ep_group *g = op->g;
    if (op->flags & EPI_OP_BEGIN) {
        g->open_handle = op->h;
        op->h->open_op = *op;
    } else if ((op->flags & EPI_OP_FINISH) && g->open_handle == op->h) {
        g->open_handle = NULL;
    }
}

/* On the host, by whoever runs the operation. */
void epi_half_sent(struct epi_op *op) {
    if (op->flags & EPI_OP_BEGIN) {
        pthread_mutex_lock(&op->g->mutex);
        op->h->sent = op->turn;
        op->flags |= op->h->dropped ? 0 : EPI_OP_OPEN;
        pthread_cond_broadcast(&op->g->turn);
        pthread_mutex_unlock(&op->g->mutex);
    }
}

void epi_half_close(const ep_handle *h) {
    ep_group *g = h->group;
    pthread_mutex_lock(&g->mutex);
    g->open_handle = g->open_handle == h ? NULL : g->open_handle;
    pthread_mutex_unlock(&g->mutex);
}

/* On a device behind the kernel that sends, on its stream; on the host what began may be queued still,
 * and ends the operation itself then. */
void epi_half_drop(ep_handle *h) {
    ep_group *g = h->group;
    struct epi_op op;
    pthread_mutex_lock(&g->mutex);
    const bool open = g->open_handle == h, sent = h->sent == h->open_op.turn;
    h->dropped = open;
    g->open_handle = open ? NULL : g->open_handle;
    pthread_mutex_unlock(&g->mutex);
    if (open && (h->open_op.flags & EPI_OP_CAPTURED)) {
        return; /* nothing has run */
    }
    if (open && g->backend->on_device) {
        epi_half_continue(&op, h);
        op.flags |= EPI_OP_DROPPED;
        op.args.op.flags |= K_DO_DROP;
        epi_op_issue(&op, g->backend->stream(g));
    } else if (open && sent) {
        epi_op_end(&h->open_op);
    }
}
