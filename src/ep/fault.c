/* SPDX-License-Identifier: MIT */
/*
 * What ended a group: from the words that kernels, peers and the boot leave behind to a report a
 * person can act on. Called from any thread; must not block.
 */
#include "src/ep/tensor.h"
#include "src/ep/wires.h"

#include <string.h>

static k_u64 read_word(const k_u64 *p) {
    return atomic_load_explicit((const _Atomic k_u64 *)p, memory_order_acquire);
}

/* This rank's board; before there is memory a rank can only have been told of a death. */
static const struct k_board *own_board(const ep_group *g) {
    return atomic_load(&g->board);
}

void epi_group_open_board(ep_group *g) {
    atomic_store(&g->board, g->backend->board(g, g->rank));
    const int dead = atomic_load(&g->dead_rank);
    if (dead >= 0) {
        epi_group_died(g, dead);
    }
}

/* Low-latency operations of a group with masks go on without rank `gone`, of which rank `at` is told. */
static void tell_gone(struct k_board *at, int gone) {
    atomic_fetch_or((_Atomic k_u64 *)&at->gone[gone / 64], 1ull << gone % 64);
}

/* Not for kernels: what such a rank has sent may be on its way still. */
static void note_gone(ep_group *g, int rank) {
    atomic_fetch_or(&g->gone[rank / 64], 1ull << rank % 64);
}

void epi_group_died(ep_group *g, int rank) {
    struct k_board *board = atomic_load(&g->board);
    k_u64 zero = 0;
    note_gone(g, rank);
    if (board && g->config.flags & EP_GROUP_LL_MASKS) {
        tell_gone(board, rank);
    } else if (board) {
        atomic_compare_exchange_strong((_Atomic k_u64 *)&board->abort, &zero,
                                       K_ABORT_PACK(K_ERR_PEER, 0, rank, 0, 0, 0));
    }
}

/* A peer in ep_group_destroy leaves an abort word without a status, of the first operation that
 * it takes no part in. That is a fault only to a rank that issues such an operation. */
static bool is_goodbye(k_u64 w) {
    return w != 0 && K_ABORT_STATUS(w) == EP_OK;
}

bool epi_group_faulted(ep_group *g) {
    const struct k_board *b = own_board(g);
    const k_u64 told = read_word(&b->told);
    return read_word(&b->abort) != 0 || (told != 0 && !is_goodbye(told)) ||
           read_word(&b->failed) != 0;
}

bool epi_group_is_over(ep_group *g, uint64_t n) {
    const struct k_board *b = own_board(g);
    if (epi_masks_bar(g)) {
        return true;
    }
    if (g->backend->on_device) {
        /* Operations in graphs have no numbers here: kernels judge by their own. */
        return epi_group_faulted(g);
    }
    return read_word(&b->abort) != 0 || K_ABORT_ENDS(read_word(&b->told), (k_u32)n);
}

/*
 * On a device an operation's number is not its epoch there: graphs replay some that nobody has
 * issued, and what was captured may never run. So what a host raises about one ends all, as a
 * cancellation does, and has its status where the epoch would be.
 */
static k_u64 pack_fault(const ep_group *g, ep_status status, int subject, uint64_t n) {
    return n && g->backend->on_device
               ? K_ABORT_PACK(EP_ERR_INTERRUPTED, g->rank, subject, 0, 0, -(int)status)
               : K_ABORT_PACK((int)status, g->rank, subject, 0, 0, n);
}

static int status_in(const ep_group *g, k_u64 w) {
    const int status = K_ABORT_STATUS(w), raised = -(int)(w & 0xfffff);
    return g->backend->on_device && status == EP_ERR_INTERRUPTED && raised ? raised : status;
}

/* A fault says more than a goodbye, which it may replace. */
static void tell_board(struct k_board *board, k_u64 word) {
    _Atomic k_u64 *told = (_Atomic k_u64 *)&board->told;
    k_u64 zero = 0;
    if (is_goodbye(word)) {
        atomic_compare_exchange_strong(told, &zero, word);
    } else {
        atomic_store(told, word);
    }
}

/* The one way in which a host writes to the boards of others: this rank has `word` to say to all. Those of
 * other nodes, whose boards are not mapped here, hear it over the control connection. */
static void tell_peers(ep_group *g, k_u64 word) {
    for (int r = 0; r < g->num_ranks; r++) {
        if (r != g->rank && g->nodes.node[r] == g->nodes.own) {
            tell_board(g->backend->board(g, r), word);
        }
    }
    if (g->nodes.num > 1) {
        epi_boot_tell(g->boot, word);
    }
}

void epi_group_told(ep_group *g, uint64_t word) {
    struct k_board *board = atomic_load(&g->board);
    if (is_goodbye(word)) {
        note_gone(g, K_ABORT_REPORTER(word));
    }
    if (board) {
        tell_board(board, word);
    }
}

uint64_t epi_group_raised(const ep_group *g) {
    const struct k_board *b = own_board(g);
    const k_u64 own = read_word(&b->abort), told = read_word(&b->told);
    /* Also what its node has told it, as rank 0 may leave before the others of it have. */
    const k_u64 w = own != 0 ? own : told;
    return is_goodbye(w) || (K_ABORT_STATUS(w) == K_ERR_PEER && K_ABORT_KIND(w) == 0) ? 0 : w;
}

bool epi_group_is_gone(const ep_group *g, int rank) {
    return (atomic_load(&g->gone[rank / 64]) >> rank % 64 & 1) != 0;
}

void epi_group_note_end(ep_group *g, uint64_t n) {
    atomic_store((_Atomic k_u64 *)&atomic_load(&g->board)->ended, n);
}

bool epi_group_has_ended(const ep_group *g, int rank, uint64_t n) {
    return read_word(&g->backend->board(g, rank)->ended) >= n;
}

void epi_group_set_orphan(ep_group *g, bool is_orphan) {
    struct k_board *b = atomic_load(&g->board);
    if (g->backend->on_device) { /* who looks after it knows whether it has work */
        atomic_store(&g->is_orphan, is_orphan);
        return;
    }
    pthread_mutex_lock(&g->mutex);
    const bool works = g->turns_ended < g->turns_issued;
    pthread_mutex_unlock(&g->mutex);
    if (b && !(is_orphan && works)) {
        atomic_store((_Atomic k_u64 *)&b->orphan_since, is_orphan ? (k_u64)epi_now_ns() : 0);
    }
}

void epi_group_leave(ep_group *g, uint64_t last) {
    for (int r = 0; g->masks && r < g->num_ranks; r++) {
        tell_gone(g->backend->board(g, r), g->rank);
    }
    tell_peers(g, K_ABORT_PACK(EP_OK, g->rank, g->rank, 0, 0, K_NEXT(last)));
}

const char *epi_phase_name(int phase) {
    static const char *const names[] = {"",        "ready", "counts",   "bases",   "rows",
                                        "answers", "self",  "consumed", "weights", "meeting"};
    return phase >= 0 && phase <= K_PHASE_MEETING ? names[phase] : "?";
}

const char *epi_operation_name(int op) {
    static const char *const names[] = {
        "operation",           "dispatch",           "combine", "low-latency dispatch",
        "low-latency combine", "low-latency barrier"};
    return op > 0 && op < 6 ? names[op] : names[0];
}

/* How two calls that name experts differ in them: k_group.experts. */
static void describe_experts(uint32_t a, uint32_t b, char *out, size_t bytes) {
    const uint32_t more = a & K_SIG_MAPPED ? 0 : 1;
    if ((a ^ b) & K_SIG_MAPPED) {
        epi_format(out, bytes, "the map of experts is %s here and %s there",
                   a & K_SIG_MAPPED ? "expert_rank" : "the default one",
                   b & K_SIG_MAPPED ? "expert_rank" : "the default one");
    } else {
        epi_format(out, bytes, "%s %u here and %u there",
                   more ? "num_experts is" : "expert_rank (its hash) is",
                   (a >> K_SIG_COUNTED_SHIFT) + more, (b >> K_SIG_COUNTED_SHIFT) + more);
    }
}

/* In which field two headers of low-latency mode differ. */
static void describe_ll_mismatch(const struct k_fault *k, char *out, size_t bytes) {
    const uint32_t a = k->mine, b = k->theirs, differ = a ^ b;
    const bool combine = k->kind == EP_OP_LL_COMBINE;
    const char *const names[] = {
        NULL, NULL, combine ? "bytes of a row of out are" : "bytes of a row of x are",
        "number of the dispatch is", "max_tokens is"};
    if (k->word == 1 && K_SIG_ROW_TYPE(differ)) {
        epi_format(out, bytes, "rows are of type %s here and %s there",
                   epi_dtype_name((int)(a >> K_SIG_TYPE_SHIFT)),
                   epi_dtype_name((int)(b >> K_SIG_TYPE_SHIFT)));
    } else if (k->word == 1) {
        epi_format(out, bytes, "scales of a row are %d of type %s here and %d of type %s there",
                   K_LL_NUM_SCALES(a), epi_dtype_name((int)(a >> 24 & 15)), K_LL_NUM_SCALES(b),
                   epi_dtype_name((int)(b >> 24 & 15)));
    } else if (k->word == 3 && !combine) {
        describe_experts(a, b, out, bytes);
    } else if (k->word > 0 && k->word < K_LL_COMPARED) {
        epi_format(out, bytes, "%s %u here and %u there", names[k->word], a, b);
    } else if (differ >> K_LL_SIG_TOPK_SHIFT) {
        epi_format(out, bytes, "top-k is %u here and %u there", a >> K_LL_SIG_TOPK_SHIFT,
                   b >> K_LL_SIG_TOPK_SHIFT);
    } else {
        const struct {
            uint32_t bit;
            const char *name;
        } form[] = {{K_LL_SIG_WEIGHTS, "top-k weights are"},
                    {K_LL_SIG_CAST, "EP_LL_FP8 is"},
                    {K_LL_SIG_POWER_OF_2, "EP_LL_SCALES_POWER_OF_2 is"},
                    {K_LL_SIG_WEIGHTS_NOW, "top-k weights are"},
                    {K_LL_SIG_EXACT, "EP_LL_EXACT is"},
                    {K_LL_SIG_COMPACT, "EP_LL_COMPACT is"},
                    {K_LL_SIG_LOGFMT, "EP_LL_LOGFMT is"}};
        int i = 0;
        while (!(differ & form[i].bit)) {
            i++;
        }
        epi_format(out, bytes, "%s %s here and %s there", form[i].name,
                   a & form[i].bit ? "given" : "absent", b & form[i].bit ? "given" : "absent");
    }
}

/* In which field two ready messages differ. */
static void describe_mismatch(const struct k_fault *k, char *out, size_t bytes) {
    const uint32_t a = k->mine, b = k->theirs;
    if (k->kind >= EP_OP_LL_DISPATCH) {
        describe_ll_mismatch(k, out, bytes);
    } else if (k->word > 0) {
        const char *what = k->word == 1 ? "row" : "scale";
        if (K_SIG_BYTES(a) != K_SIG_BYTES(b)) {
            epi_format(out, bytes, "%s bytes are %u here and %u there", what, K_SIG_BYTES(a),
                       K_SIG_BYTES(b));
        } else {
            epi_format(out, bytes, "%ss are of type %s here and %s there", what,
                       epi_dtype_name((int)(a >> K_SIG_TYPE_SHIFT)),
                       epi_dtype_name((int)(b >> K_SIG_TYPE_SHIFT)));
        }
    } else if ((a & 15) != (b & 15)) {
        epi_format(out, bytes, "it is a %s here and a %s there",
                   epi_operation_name((int)(a & 15)), epi_operation_name((int)(b & 15)));
    } else if ((a ^ b) & K_SIG_CACHED) {
        epi_format(out, bytes, "the handle's routing is %s here and %s there",
                   a & K_SIG_CACHED ? "cached" : "new", b & K_SIG_CACHED ? "cached" : "new");
    } else if ((a ^ b) & K_SIG_MAPPED ||
               ((a ^ b) >> K_SIG_COUNTED_SHIFT && !(a & K_SIG_CACHED))) {
        describe_experts(a, b, out, bytes);
    } else if ((a ^ b) >> K_SIG_COUNTED_SHIFT) {
        epi_format(out, bytes,
                   "the handle was first dispatched in operation %u here and in %u there",
                   a >> K_SIG_COUNTED_SHIFT, b >> K_SIG_COUNTED_SHIFT);
    } else if ((a ^ b) & K_SIG_WEIGHTS) {
        epi_format(out, bytes, "top-k weights are %s here and %s there",
                   a & K_SIG_WEIGHTS ? "given" : "absent",
                   b & K_SIG_WEIGHTS ? "given" : "absent");
    } else {
        epi_format(out, bytes, "top-k is %u here and %u there", (a >> K_SIG_TOPK_SHIFT) & 127,
                   (b >> K_SIG_TOPK_SHIFT) & 127);
    }
}

static void describe_orphan(struct ep_fault *f) {
    epi_format(f->message, sizeof(f->message),
               "rank %d died: no thread that has used its group is left, and none has called "
               "ep_group_destroy (noticed by rank %d)",
               f->rank, f->reporter);
}

static void describe_own(const ep_group *g, struct ep_fault *f) {
    const struct k_fault *k = &own_board(g)->fault;
    f->status = k->status;
    f->rank = k->subject;
    f->reporter = k->reporter;
    f->operation = k->kind;
    f->epoch = k->epoch;
    f->waited_ms = k->waited_ns / EPI_NS_PER_MS;
    epi_format(f->phase, sizeof(f->phase), "%s", epi_phase_name(k->phase));
    if (k->status == K_ERR_MISMATCH) {
        char what[128];
        describe_mismatch(k, what, sizeof(what));
        epi_format(f->message, sizeof(f->message),
                   "ranks %d and %d disagree in operation %u (%s): %s", g->rank, k->subject,
                   k->epoch, epi_operation_name(k->kind), what);
    } else if (k->status == K_ERR_PEER) {
        describe_orphan(f);
    } else if (k->status == K_ERR_ARG) {
        epi_format(f->message, sizeof(f->message),
                   "rank %d, operation %u (%s): x.shape[0] is %u, must be at least the %u rows "
                   "received",
                   k->subject, k->epoch, epi_operation_name(k->kind), k->mine, k->theirs);
    } else {
        epi_format(
            f->message, sizeof(f->message),
            "rank %d was waited for by rank %d in operation %u (%s), phase %s, for %lld ms: "
            "it is alive but late",
            k->subject, g->rank, k->epoch, epi_operation_name(k->kind), f->phase,
            (long long)f->waited_ms);
    }
}

/* From an abort word: what a peer, the boot or the caller said. */
static void describe_word(ep_group *g, k_u64 w, struct ep_fault *f) {
    const uint64_t told = atomic_load(&g->fault_told);
    f->status = is_goodbye(w) ? EP_ERR_PEER : status_in(g, w);
    f->rank = K_ABORT_SUBJECT(w);
    f->reporter = K_ABORT_REPORTER(w);
    f->operation = K_ABORT_KIND(w);
    const k_u64 failed = read_word(&own_board(g)->failed);
    f->epoch = (uint32_t)(failed ? failed >> 32 : told ? told : K_NEXT(g->issued));
    epi_format(f->phase, sizeof(f->phase), "%s", epi_phase_name(K_ABORT_PHASE(w)));
    if (is_goodbye(w)) {
        f->reporter = g->rank;
        epi_format(f->message, sizeof(f->message),
                   "rank %d has called ep_group_destroy and takes no part in operation %u of "
                   "rank %d",
                   f->rank, f->epoch, g->rank);
    } else if (f->status == EP_ERR_PEER && K_ABORT_KIND(w) != 0) {
        describe_orphan(f); /* a kernel has noticed it */
    } else if (f->status == EP_ERR_PEER) {
        f->reporter = g->rank; /* each rank's boot tells it */
        epi_format(f->message, sizeof(f->message), "rank %d died%s%s (noticed by rank %d)",
                   f->rank, g->dead_why[0] ? ": " : "", g->dead_why, f->reporter);
    } else if (f->status == EP_ERR_TIMEOUT && K_ABORT_KIND(w) == 0) {
        const char *why = f->reporter == g->rank ? epi_wires_why(g->wires, f->rank) : "";
        epi_format(f->message, sizeof(f->message),
                   "rank %d cannot write to rank %d over the network%s%s", f->reporter, f->rank,
                   why[0] ? ": " : "", why);
    } else if (f->status == EP_ERR_INTERRUPTED) {
        epi_format(f->message, sizeof(f->message), "rank %d called ep_group_abort",
                   f->reporter);
    } else {
        epi_format(f->message, sizeof(f->message),
                   "rank %d ended the group: %s in %s%s%s, about rank %d", f->reporter,
                   ep_status_string((ep_status)f->status),
                   f->operation == EP_OP_NONE ? "an operation"
                                              : epi_operation_name(f->operation),
                   f->phase[0] ? ", phase " : "", f->phase, f->rank);
    }
}

void epi_group_describe(ep_group *g, struct ep_fault *f) {
    memset(f, 0, sizeof(*f));
    f->size = sizeof(*f);
    f->rank = f->reporter = -1;
    const struct k_board *b = own_board(g);
    const k_u64 own = read_word(&b->abort), peer = read_word(&b->told);
    const bool in_time = !atomic_load(&g->fault_told) && read_word(&b->failed) == 0;
    if (own == 0 && (peer == 0 || (is_goodbye(peer) && in_time))) {
        return;
    }
    /* Only kernels name a kind in the rank's own word, after they have filled in their account,
     * which is the fullest. */
    if (K_ABORT_KIND(own) != 0) {
        describe_own(g, f);
    } else {
        describe_word(g, own ? own : peer, f);
    }
}

/* Operation n returns the fault, perhaps as the first. */
static bool note_told(ep_group *g, uint64_t n) {
    pthread_mutex_lock(&g->mutex);
    const bool first = atomic_load(&g->fault_told) == 0;
    if (first) {
        atomic_store(&g->fault_told, n);
        g->fault_last = g->issued;
    }
    pthread_mutex_unlock(&g->mutex);
    return first;
}

/* The fault, which there is, for operation n. */
static ep_status tell_fault(ep_group *g, uint64_t n) {
    struct ep_fault f;
    const bool first = note_told(g, n);
    epi_group_describe(g, &f);
    if (first) {
        epi_log(EPI_LOG_INFO, "group faulted: %s", f.message);
    }
    if (first || n <= g->fault_last) {
        return epi_fail((ep_status)f.status, "%s", f.message);
    }
    return epi_fail(EP_ERR_FAULTED, "the group has faulted: %s", f.message);
}

ep_status epi_group_check(ep_group *g, uint64_t n) {
    if (!epi_group_faulted(g)) {
        EPI_TRY(epi_masks_refuse(g));
    }
    return epi_group_is_over(g, n) ? tell_fault(g, n) : EP_OK;
}

static ep_status check_group(const struct epi_op *op) {
    return epi_group_check(op->g, op->number);
}

static bool is_group_over(const struct epi_op *op) {
    return epi_group_is_over(op->g, op->number);
}

static void raise_not_launched(const struct epi_op *op, ep_status st) {
    epi_group_raise(op->g, st, op->g->rank, op->number);
}

const struct epi_fault_rule epi_faults_end_group = {check_group, is_group_over,
                                                    raise_not_launched};

static uint64_t next_number(ep_group *g) {
    pthread_mutex_lock(&g->mutex);
    const uint64_t next = K_NEXT(g->issued);
    pthread_mutex_unlock(&g->mutex);
    return next;
}

/* Operations that count themselves: any fault ends them, and so does what an operation before them was
 * told, as peers stop there too. A peer in destroy has sent all that they wait for. */
static bool is_ll_over(const struct epi_op *op) {
    return epi_group_faulted(op->g) || atomic_load(&op->g->fault_told) != 0;
}

static ep_status check_ll(const struct epi_op *op) {
    return is_ll_over(op) ? tell_fault(op->g, next_number(op->g)) : EP_OK;
}

static void raise_ll_not_launched(const struct epi_op *op, ep_status st) {
    epi_group_raise(op->g, st, op->g->rank, next_number(op->g));
}

const struct epi_fault_rule epi_faults_end_ll = {check_ll, is_ll_over, raise_ll_not_launched};

ep_status epi_group_check_next(ep_group *g) {
    return epi_group_check(g, next_number(g));
}

ep_status epi_group_admit(ep_group *g) {
    struct ep_fault f;
    epi_life_join(g->life);
    if (g->backend->on_device) {
        return epi_group_faulted(g) ? epi_group_check_next(g) : EP_OK;
    }
    if (atomic_load(&g->fault_told) == 0) {
        return EP_OK;
    }
    epi_group_describe(g, &f);
    return epi_fail(EP_ERR_FAULTED, "the group has faulted: %s", f.message);
}

void epi_group_raise(ep_group *g, ep_status status, int subject, uint64_t n) {
    k_u64 zero = 0, code = pack_fault(g, status, subject, n);
    atomic_compare_exchange_strong((_Atomic k_u64 *)&own_board(g)->abort, &zero, code);
    if (n) {
        note_told(g, n);
    }
    tell_peers(g, code);
}

static void log_late(const struct k_group *k, k_i64 timeout_ns, k_i32 kind, k_u64 word,
                     k_i64 waited_ns) {
    epi_log(EPI_LOG_WARN,
            "rank %d has waited %.1f s for rank %u in operation %u (%s), phase %s: it is alive "
            "but late; the wait ends after %.1f s",
            k->rank, (double)waited_ns / 1e9, (unsigned)(word & 0xffff), (unsigned)(word >> 32),
            epi_operation_name(kind), epi_phase_name((int)(word >> 16 & 0xffff)),
            (double)timeout_ns / 1e9);
}

void epi_group_log_late(const ep_group *g, k_i32 kind, k_u64 word, k_i64 waited_ns) {
    log_late(&g->k, g->timeout_ns, kind, word, waited_ns);
}

void epi_group_late(const struct k_group *k, k_i32 kind, k_u64 word, k_i64 waited_ns) {
    struct k_board *board = (struct k_board *)(uintptr_t)k->board[k->rank];
    _Atomic k_u64 *last = (_Atomic k_u64 *)&board->waiting;
    k_u64 old = atomic_load_explicit(last, memory_order_relaxed);
    if (old >> 32 == word >> 32 || !atomic_compare_exchange_strong(last, &old, word)) {
        return; /* this operation has its line */
    }
    log_late(k, k->ctl->timeout_ns, kind, word, waited_ns);
}
