/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * Arenas on a device, by a fake one: everybody reaches everybody's arena and board; what a device
 * cannot do sends all ranks' arenas to host memory; whoever runs out of memory, is late or is
 * killed takes all back, in time, and nothing is left. Arenas grow on all ranks or on none.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fake.h"
#include "tests/rig.h"
#include "tests/tap.h"

#define ARENA ((size_t)3 * 4096)
#define BOARD ((size_t)4096)
#define TIMEOUT_MS 20000

/* One group, and what is to become of it; shared by its ranks. */
struct scene {
    int num_ranks, kind;
    bool threads, no_device, no_boards;
    bool shares_none;   /* the table has no functions for other ranks' memory */
    size_t table_bytes; /* its size as it is told; 0: the true one */
    struct fake_trouble trouble;
    bool on_device;       /* expected */
    ep_status fails_with; /* expected of the ranks that are in trouble */
    bool alike;           /* and of all others, with the same text; else they say EP_ERR_PEER */
    const char *says;     /* contained in every message; or NULL */
    bool in_vain;         /* expected: all fail because of one who does not come */
    int timeout_ms, victim;
    struct fake_meeting meeting;
    atomic_int hung, arrived, done, num_failed;
    int num_walked;
};

static struct scene *new_scene(int num_ranks, bool threads) {
    static struct scene *only;
    only = only ? only : tap_shared(sizeof(*only));
    memset(only, 0, sizeof(*only));
    only->num_ranks = only->meeting.num_ranks = num_ranks;
    only->threads = threads;
    only->on_device = true;
    only->timeout_ms = TIMEOUT_MS * rig_scale();
    return only;
}

static ep_status make(struct scene *s, struct fake_seat *seat, struct fake_device *f,
                      struct epi_mem **mem) {
    struct epi_mem_config c = {.exchange = fake_exchange(seat),
                               .arena_bytes = ARENA,
                               .board_bytes = s->no_boards ? 0 : BOARD,
                               .threads = s->threads,
                               .device = s->no_device && !s->table_bytes ? NULL : &f->ops,
                               .arena_kind = s->kind};
    c.deadline = epi_deadline_after(s->timeout_ms * EPI_NS_PER_MS);
    return epi_mem_create(mem, &c);
}

/* This process has nothing of its devices, and no more than before of the system's. */
static bool check_clean(struct rig_footprint was, const char *name) {
    const struct fake_count c = fake_count();
    return ok(c.pieces == 0 && c.reserved == 0 && c.attached == 0 && c.wrong == 0,
              "%s: %d pieces, %d addresses and %d attachments are left, %d wrong calls", name,
              c.pieces, c.reserved, c.attached, c.wrong) &&
           ok(rig_same_footprint(was), "%s: nothing is left", name);
}

/* ---- everybody sees everybody's bytes ------------------------------------------------------- */

static bool barrier(struct fake_seat *seat) {
    char in = 0, out[FAKE_MAX_RANKS];
    const struct epi_exchange x = fake_exchange(seat);
    return ok(x.allgather(x.ctx, &in, 1, out) == EP_OK, "all are here: %s", ep_last_error());
}

static bool is_zero(const unsigned char *p, size_t bytes) {
    return p[0] == 0 && memcmp(p, p + 1, bytes - 1) == 0;
}

static unsigned char *kernel_arena(const struct epi_mem *mem, int r) {
    return (unsigned char *)(uintptr_t)epi_mem_arena_address(mem, r);
}

static unsigned char *kernel_board(const struct epi_mem *mem, int r) {
    return (unsigned char *)(uintptr_t)epi_mem_board_address(mem, r);
}

static unsigned char mark(int from, int to) {
    return (unsigned char)(1 + from * FAKE_MAX_RANKS + to);
}

/* Each rank has a byte at both ends of everybody's memory. Boards are written by hosts. */
static void write_marks(const struct scene *s, const struct epi_mem *mem, int rank) {
    for (int r = 0; r < s->num_ranks; r++) {
        kernel_arena(mem, r)[rank] = mark(rank, r);
        kernel_arena(mem, r)[ARENA - 1 - (size_t)rank] = mark(rank, r);
        if (!s->no_boards) {
            ((unsigned char *)epi_mem_board(mem, r))[rank] = mark(rank, r);
            kernel_board(mem, r)[BOARD - 1 - (size_t)rank] = mark(rank, r);
        }
    }
}

static bool has_marks(const struct scene *s, const unsigned char *p, size_t bytes, int to) {
    bool good = true;
    for (int r = 0; r < s->num_ranks; r++) {
        good = good && p[r] == mark(r, to) && p[bytes - 1 - (size_t)r] == mark(r, to);
    }
    return good && is_zero(p + s->num_ranks, bytes - 2 * (size_t)s->num_ranks);
}

static void check_marks(const struct scene *s, const struct epi_mem *mem) {
    for (int r = 0; r < s->num_ranks; r++) {
        const unsigned char *arena = epi_mem_arena(mem, r), *board = epi_mem_board(mem, r);
        ok(has_marks(s, kernel_arena(mem, r), ARENA, r), "arena %d", r);
        ok(s->on_device ? !arena : has_marks(s, arena, ARENA, r), "%d by the host", r);
        if (!s->no_boards) {
            ok(has_marks(s, board, BOARD, r), "board %d", r);
            ok(has_marks(s, kernel_board(mem, r), BOARD, r), "board %d by kernels", r);
        }
        if (s->no_device) {
            ok(arena == kernel_arena(mem, r) && board == kernel_board(mem, r), "one address");
            ok(arena == (unsigned char *)epi_mem_arena(mem, 0) + (size_t)r * ARENA, "in a row");
        } else {
            ok(board != kernel_board(mem, r), "boards are attached");
        }
    }
}

static void use(const struct scene *s, const struct epi_mem *mem, struct fake_seat *seat) {
    const int me = seat->rank;
    ok(epi_mem_on_device(mem) == s->on_device, "arenas are on the device: %d", s->on_device);
    ok(is_zero(kernel_arena(mem, me), ARENA), "the arena starts zeroed");
    ok(s->no_boards || is_zero(epi_mem_board(mem, me), BOARD), "and so does the board");
    if (barrier(seat)) {
        write_marks(s, mem, me);
        if (barrier(seat)) {
            check_marks(s, mem);
            barrier(seat);
        }
    }
}

/* ---- one group ------------------------------------------------------------------------------ */

static void expect(const struct scene *s, int rank, ep_status st) {
    if (s->in_vain) {
        /* Who is late in the last step finds that all have come to it, and that they have gone
         * only when it next calls. */
        ok(st == EP_ERR_TIMEOUT || st == EP_ERR_PEER || (st == EP_OK && rank == s->victim),
           "rank %d: %s (%s)", rank, ep_status_string(st), ep_last_error());
        return;
    }
    const bool mine = s->trouble.status[rank] == s->fails_with;
    const ep_status want =
        s->fails_with == EP_OK || mine || s->alike ? s->fails_with : EP_ERR_PEER;
    ok(st == want, "rank %d: %s instead of %s (%s)", rank, ep_status_string(st),
       ep_status_string(want), ep_last_error());
    if (st != EP_OK) {
        ok(rig_is_sentence(ep_last_error()), "a sentence: %s", ep_last_error());
        ok(!s->says || strstr(ep_last_error(), s->says), "\"%s\" in \"%s\"", s->says,
           ep_last_error());
    }
}

/* One rank's part, threads and processes; nothing may be left when its process has no more. */
static int play_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct fake_seat seat = {&s->meeting, rank, 0, s->timeout_ms * EPI_NS_PER_MS};
    struct fake_device f;
    struct epi_mem *mem = NULL;
    const struct rig_footprint was = s->threads ? (struct rig_footprint){0} : rig_footprint();

    fake_device(&f, rank, &s->trouble, &s->hung);
    f.ops.size = s->table_bytes ? s->table_bytes : f.ops.size;
    if (s->shares_none) {
        f.ops.admit = NULL;
        f.ops.import = NULL;
    }
    const ep_status st = make(s, &seat, &f, &mem);
    atomic_store(&s->meeting.gone[rank], st != EP_OK);
    expect(s, rank, st);
    ok((mem != NULL) == (st == EP_OK), "the output is set on success only");
    ok(s->kind != EPI_MEM_HOST || f.calls[FAKE_CREATE] == 0, "nothing is asked of the device");
    if (mem && !s->in_vain) {
        use(s, mem, &seat);
    }
    epi_mem_destroy(&mem);
    ok(!mem, "destroy clears the pointer");
    if (!s->threads) {
        check_clean(was, "rank");
    }
    /* The device of a thread must outlive all of them: the last undoes it all. */
    atomic_fetch_add(&s->arrived, 1);
    return s->threads && !rig_await(&s->arrived, s->num_ranks);
}

static void play(struct scene *s, const char *name) {
    if (s->threads) {
        const struct rig_footprint was = rig_footprint();
        const struct fake_count before = fake_count();
        ok(tap_run_threads(s->num_ranks, play_rank, s) == 0, "threads: %s", name);
        const struct fake_count c = fake_count();
        if (s->fails_with == EP_OK && s->on_device && !s->in_vain) {
            ok(c.created - before.created == s->num_ranks &&
                   c.admitted - before.admitted == s->num_ranks * (s->num_ranks - 1) &&
                   c.imported == before.imported,
               "%s: each made its own and admitted the others", name);
        }
        check_clean(was, name);
    } else {
        ok(tap_spawn_ranks(s->num_ranks, play_rank, s, 60) == 0, "processes: %s", name);
    }
}

/* ---- what goes well ------------------------------------------------------------------------- */

static void test_good(void) {
    for (int i = 0; i < 24; i++) {
        char name[64];
        struct scene *s = new_scene(i % 3 == 0 ? 1 : i % 3 == 1 ? 2 : 4, i / 12);
        s->no_boards = i / 3 % 2;
        s->no_device = i / 6 % 2;
        s->on_device = !s->no_device;
        snprintf(name, sizeof(name), "%d ranks, %s, %s boards", s->num_ranks,
                 s->no_device ? "no device" : "arenas on the device",
                 s->no_boards ? "no" : "with");
        play(s, name);
    }
    for (int i = 0; i < 2; i++) {
        struct scene *s = new_scene(3, i);
        s->kind = EPI_MEM_HOST;
        s->on_device = false;
        play(s, "arenas in host memory by choice");
        s = new_scene(3, i);
        s->kind = EPI_MEM_DEVICE;
        play(s, "arenas on the device by choice");
    }
}

/* What a table lacks, the device cannot do; what it has beyond ours is not looked at. */
static void test_table(void) {
    for (int i = 0; i < 2; i++) {
        struct scene *s = new_scene(3, i);
        s->table_bytes = sizeof(struct epi_mem_device) + 64;
        play(s, "a table that is longer than ours");
        s = new_scene(3, i);
        s->no_device = true; /* that anything could be asked of */
        s->table_bytes = offsetof(struct epi_mem_device, reserve);
        s->on_device = false;
        play(s, "a table that ends before its functions");
        s = new_scene(3, i);
        s->shares_none = true;
        s->on_device = false;
        play(s, "a table without admit and import");
        s = new_scene(3, i);
        s->shares_none = true;
        s->kind = EPI_MEM_DEVICE;
        s->fails_with = EP_ERR_UNSUPPORTED;
        s->alike = true;
        s->says = "cannot map the memory of rank";
        play(s, "nor is there another way");
    }
}

/* ---- what a device cannot do, and what it has no memory for --------------------------------- */

enum { VICTIM_ALL = -1 };

static const enum fake_op ops[] = {FAKE_CREATE, FAKE_ADMIT, FAKE_IMPORT, FAKE_ATTACH};

static void set_status(struct scene *s, int victim, ep_status st) {
    for (int r = 0; r < s->num_ranks; r++) {
        if (victim == VICTIM_ALL || victim == r) {
            s->trouble.status[r] = st;
        }
    }
}

/* Whether the call is made at all; of threads, rank 0 attaches for all. */
static bool is_called(const struct scene *s, int victim) {
    return s->trouble.op == FAKE_ATTACH  ? !s->threads || victim <= 0
           : s->trouble.op == FAKE_ADMIT ? s->threads
                                         : s->trouble.op == FAKE_CREATE || !s->threads;
}

static struct scene *trouble(bool threads, int op, int victim, ep_status st) {
    struct scene *s = new_scene(3, threads);
    s->trouble.op = ops[op];
    set_status(s, victim, st);
    if (st == EP_ERR_NOMEM && s->trouble.op == FAKE_ATTACH && threads) {
        s->trouble.status[1] = s->trouble.status[2] = EP_OK; /* they are not asked */
    }
    return s;
}

static void test_trouble(void) {
    static const int victims[] = {0, 2, VICTIM_ALL};
    for (int i = 0; i < 2 * 4 * 3; i++) {
        const int threads = i % 2, op = i / 2 % 4, victim = victims[i / 8];
        char name[64];
        struct scene *s = trouble(threads, op, victim, EP_ERR_UNSUPPORTED);
        const bool felt = is_called(s, victim);
        snprintf(name, sizeof(name), "call %d unsupported on rank %d", op, victim);
        s->on_device = !felt;
        play(s, name);

        s = trouble(threads, op, victim, EP_ERR_UNSUPPORTED);
        s->kind = EPI_MEM_DEVICE;
        s->fails_with = felt ? EP_ERR_UNSUPPORTED : EP_OK;
        s->alike = true;
        s->says = "does not want to";
        play(s, name);

        s = trouble(threads, op, victim, EP_ERR_NOMEM);
        s->fails_with = felt ? EP_ERR_NOMEM : EP_OK;
        s->says = "does not want to";
        snprintf(name, sizeof(name), "no memory for call %d on rank %d", op, victim);
        play(s, name);
    }
}

static void test_worse(void) {
    for (int i = 0; i < 2; i++) {
        struct scene *s = trouble(i, 0, 0, EP_ERR_UNSUPPORTED);
        s->trouble.status[1] = EP_ERR_NOMEM;
        s->fails_with = EP_ERR_NOMEM;
        s->says = "does not want to";
        play(s, "no memory on rank 1 is worse than unsupported on rank 0");
        s = trouble(i, 3, 0, EP_ERR_UNSUPPORTED);
        s->trouble.always = true;
        s->fails_with = EP_ERR_UNSUPPORTED;
        s->alike = true;
        s->says = "attach does not want to";
        play(s, "host memory that the device cannot reach either");
    }
}

/* The warning, in the log of rank 0 alone. */
static void test_warning(void) {
    struct tap_ranks ranks;
    struct scene *s = trouble(false, 2, 2, EP_ERR_UNSUPPORTED);
    s->on_device = false;
    if (!ok(tap_ranks_start(&ranks, 3, play_rank, s) == 0, "ranks start")) {
        return;
    }
    for (int r = 0; r < 3; r++) {
        ok(tap_ranks_wait_one(&ranks, r, 60), "rank %d ends", r);
        char *text = tap_ranks_output(&ranks, r);
        const bool told = strstr(text, "rank 2 cannot map the memory of rank 0: the fake's "
                                       "import does not want to; arenas lie in pinned host "
                                       "memory, which is as fast as PCIe") != NULL;
        ok(told == (r == 0), "rank %d says: %s", r, text);
        free(text);
    }
    ok(tap_ranks_wait(&ranks, 60) == 0, "all is well");
    tap_ranks_free(&ranks);
}

/* ---- growth --------------------------------------------------------------------------------- */

#define GROWN ((size_t)9 * 4096)
enum { NUM_USES = 3 };

/* Parts that share pages with their neighbours, one that needs more than one, and one that only comes
 * to be. */
static const struct epi_mem_use at_first[NUM_USES] = {
    {0, 4096, 4096, 1}, {4096, 12288, 1000, 2}, {28672, 8192, 0, 1}};
static const struct epi_mem_use in_the_end[NUM_USES] = {
    {0, 4096, 4096, 1}, {4096, 12288, 12288, 2}, {28672, 8192, 8192, 1}};

/* Every byte that is used has its rank's value, or 0 where it is new. */
static bool has_bytes(const unsigned char *arena, const struct epi_mem_use *use,
                      unsigned char value, const struct epi_mem_use *before) {
    bool good = true;
    for (int i = 0; i < NUM_USES; i++) {
        for (uint64_t p = 0; p < use[i].parts; p++) {
            const unsigned char *part = arena + use[i].at + p * use[i].stride;
            for (uint64_t b = 0; b < use[i].used; b++) {
                good = good && part[b] == (before && b >= before[i].used ? 0 : value);
            }
        }
    }
    return good;
}

static void fill_bytes(unsigned char *arena, const struct epi_mem_use *use,
                       unsigned char value) {
    for (int i = 0; i < NUM_USES; i++) {
        for (uint64_t p = 0; p < use[i].parts; p++) {
            memset(arena + use[i].at + p * use[i].stride, value, use[i].used);
        }
    }
}

static int growing_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    struct fake_seat seat = {&s->meeting, rank, 0, s->timeout_ms * EPI_NS_PER_MS};
    const struct epi_deadline late = epi_deadline_after(s->timeout_ms * EPI_NS_PER_MS);
    struct fake_device f;
    struct epi_mem *mem = NULL;
    const int next = (rank + 1) % s->num_ranks;
    const struct epi_mem_config c = {.exchange = fake_exchange(&seat),
                                     .arena_bytes = GROWN,
                                     .use = at_first,
                                     .num_uses = NUM_USES,
                                     .threads = s->threads,
                                     .device = s->no_device ? NULL : &f.ops,
                                     .deadline = late};
    fake_device(&f, rank, NULL, &s->hung);
    ok(epi_mem_create(&mem, &c) == EP_OK, "create: %s", ep_last_error());
    ok(epi_mem_on_device(mem) == s->on_device, "on the device: %d", s->on_device);
    fill_bytes(kernel_arena(mem, rank), at_first, (unsigned char)(rank + 1));
    f.trouble = &s->trouble;
    memset(f.calls, 0, sizeof(f.calls));
    if (s->fails_with != EP_OK) {
        const struct fake_count before = fake_count();
        const ep_status st = epi_mem_grow(mem, late, at_first, in_the_end);
        ok(st == s->fails_with && strstr(ep_last_error(), s->says), "%s: %s",
           ep_status_string(st), ep_last_error());
        barrier(&seat);
        ok(s->threads || fake_count().pieces == before.pieces, "what was new is given back");
    }
    ok(epi_mem_grow(mem, late, at_first, in_the_end) == EP_OK, "grow: %s", ep_last_error());
    ok(has_bytes(kernel_arena(mem, next), in_the_end, (unsigned char)(next + 1), at_first),
       "what was there is there, the rest is zeros");
    barrier(&seat);
    fill_bytes(kernel_arena(mem, next), in_the_end, (unsigned char)(100 + rank));
    barrier(&seat);
    ok(has_bytes(kernel_arena(mem, rank), in_the_end,
                 (unsigned char)(100 + (rank + s->num_ranks - 1) % s->num_ranks), NULL),
       "and all of it is a neighbour's to write");
    barrier(&seat);
    epi_mem_destroy(&mem);
    return s->threads && !barrier(&seat);
}

static void test_growth(void) {
    static const enum fake_op calls[] = {FAKE_NUM_OPS, FAKE_CREATE, FAKE_ADMIT, FAKE_IMPORT};
    for (int i = 0; i < 2 * 4; i++) {
        const int threads = i % 2, victim = i / 2 % 2 * 2;
        struct scene *s = new_scene(3, threads);
        const struct rig_footprint was = rig_footprint();
        s->trouble.op = calls[i / 2];
        s->no_device = i == 1;
        s->on_device = !s->no_device;
        s->says = "does not want to";
        if (s->trouble.op != FAKE_NUM_OPS && is_called(s, victim)) {
            s->fails_with = EP_ERR_NOMEM;
            set_status(s, victim, EP_ERR_NOMEM);
        }
        if (threads) {
            ok(tap_run_threads(3, growing_rank, s) == 0, "threads grow, trouble %d", i / 2);
        } else {
            ok(tap_spawn_ranks(3, growing_rank, s, 60) == 0, "processes grow, trouble %d",
               i / 2);
        }
        check_clean(was, "growth");
    }
}

/* ---- each allocation fails in turn ---------------------------------------------------------- */

/* Create and destroy; whoever fails leaves. Returns whether it did. */
static bool attempt(struct scene *s, int rank) {
    struct fake_seat seat = {&s->meeting, rank, 0, s->timeout_ms * EPI_NS_PER_MS};
    struct fake_device f;
    struct epi_mem *mem = NULL;
    fake_device(&f, rank, NULL, &s->hung);
    const ep_status st = make(s, &seat, &f, &mem);
    ok(st == EP_OK || st == EP_ERR_NOMEM || st == EP_ERR_PEER, "%s (%s)", ep_status_string(st),
       ep_last_error());
    ok(st == EP_OK || rig_is_sentence(ep_last_error()), "a sentence: %s", ep_last_error());
    atomic_store(&s->meeting.gone[rank], 1);
    epi_mem_destroy(&mem);
    if (s->threads) {
        atomic_fetch_add(&s->arrived, 1);
        rig_await(&s->arrived, s->num_ranks);
    }
    return st != EP_OK;
}

static int attempt_thread(int rank, void *ctx) {
    return attempt(ctx, rank);
}

static void walk_threads(void) {
    int num_failed = 0, n = 1;
    for (bool more = true; more; n++) {
        struct scene *s = new_scene(3, true);
        const struct rig_footprint was = rig_footprint();
        const uint64_t until = epi_alloc_count() + (uint64_t)n;
        epi_alloc_fail_at(until);
        const int failed = tap_run_threads(3, attempt_thread, s);
        epi_alloc_fail_at(0);
        more = epi_alloc_count() >= until;
        num_failed += failed > 0;
        ok(failed == 0 || failed == 3, "allocation %d: %d ranks fail", n, failed);
        check_clean(was, "threads: an allocation failed");
    }
    ok(num_failed >= 20 && num_failed >= n - 4, "%d of %d allocations were felt", num_failed,
       n);
}

/* Processes come to all meetings, whatever failed. */
static void meet(struct scene *s, int *meetings) {
    atomic_fetch_add(&s->arrived, 1);
    ok(rig_await(&s->arrived, ++*meetings * s->num_ranks), "all have come");
}

static int walk_rank(int rank, void *ctx) {
    struct scene *s = ctx;
    int meetings = 0;
    for (int n = 1; !atomic_load(&s->done); n++) {
        const struct rig_footprint was = rig_footprint();
        const uint64_t until = epi_alloc_count() + (uint64_t)n;
        if (rank == s->victim) {
            memset(&s->meeting, 0, sizeof(s->meeting));
            s->meeting.num_ranks = s->num_ranks;
            epi_alloc_fail_at(until);
        }
        meet(s, &meetings);
        const bool failed = attempt(s, rank);
        epi_alloc_fail_at(0);
        check_clean(was, "an allocation failed");
        meet(s, &meetings);
        atomic_fetch_add(&s->num_failed, failed);
        if (rank == s->victim) {
            s->num_walked = n;
            atomic_store(&s->done, epi_alloc_count() < until);
        }
        meet(s, &meetings);
    }
    return 0;
}

static void walk_processes(int victim) {
    struct scene *s = new_scene(3, false);
    s->victim = victim;
    ok(tap_spawn_ranks(3, walk_rank, s, 100) == 0,
       "processes: each allocation of rank %d failed in turn", victim);
    const int failed = atomic_load(&s->num_failed), walked = s->num_walked;
    ok(failed % 3 == 0 && walked >= 20 && failed / 3 >= walked - 3,
       "%d attempts: %d ranks felt it, always all of them", walked, failed);
}

/* ---- late, and killed ----------------------------------------------------------------------- */

static void test_late(void) {
    for (int i = 0; i < 2 * 4; i++) {
        struct scene *s = new_scene(3, i % 2);
        s->trouble.op = ops[i / 2];
        s->victim = s->trouble.op == FAKE_ATTACH ? 0 : 1;
        if (!is_called(s, s->victim)) {
            continue;
        }
        s->timeout_ms = 300 * rig_scale();
        s->trouble.late_ms[s->victim] = 2 * s->timeout_ms;
        s->in_vain = true;
        play(s, "one is later than the others wait");
    }
}

/* Survivors may have made it before the death, or not. */
static int hunted_rank(int rank, void *ctx) {
    const struct rig_footprint was = rig_footprint();
    attempt(ctx, rank);
    check_clean(was, "a rank was killed");
    return 0;
}

/* Kills the victim once it hangs, or after `delay_ms`. What notices deaths is played here. */
static void hunt(struct scene *s, int (*rank_main)(int, void *), int delay_ms,
                 const char *name) {
    struct tap_ranks ranks;
    bool in_time = true;
    if (!ok(tap_ranks_start(&ranks, s->num_ranks, rank_main, s) == 0, "ranks start")) {
        return;
    }
    if (delay_ms < 0) {
        ok(rig_await(&s->hung, 1), "%s: rank %d hangs", name, s->victim);
    } else {
        tap_sleep_ms(delay_ms);
    }
    tap_ranks_signal(&ranks, s->victim, SIGKILL);
    ok(tap_ranks_wait_one(&ranks, s->victim, 20), "%s: the victim is dead", name);
    atomic_store(&s->meeting.gone[s->victim], 1);
    const double start = tap_now();
    for (int r = 0; r < s->num_ranks; r++) {
        in_time = tap_ranks_wait_one(&ranks, r, 20) && in_time;
    }
    const double took = tap_now() - start;
    ok(in_time && took < rig_within(3.0), "%s: the others return in %.2f s", name, took);
    ok(tap_ranks_wait(&ranks, 20) == 0, "%s: and nothing is left of them", name);
    tap_ranks_free(&ranks);
}

static void test_killed(uint64_t seed) {
    static const enum fake_op where[] = {FAKE_CREATE, FAKE_IMPORT, FAKE_ATTACH};
    for (int i = 0; i < 6; i++) {
        char name[64];
        struct scene *s = new_scene(4, false);
        s->victim = i % 2 ? 3 : 0;
        s->trouble.op = where[i / 2];
        s->trouble.hangs[s->victim] = true;
        s->in_vain = true;
        snprintf(name, sizeof(name), "rank %d is killed in call %d", s->victim, where[i / 2]);
        hunt(s, play_rank, -1, name);
    }
    for (int i = 0; i < (tap_quick() ? 3 : 12 * tap_effort()); i++) {
        char name[64];
        struct scene *s = new_scene(4, false);
        s->victim = (int)(tap_rand(&seed) % 4);
        const int delay_ms = (int)(tap_rand(&seed) % (uint64_t)(30 * rig_scale()));
        snprintf(name, sizeof(name), "rank %d is killed after %d ms", s->victim, delay_ms);
        hunt(s, hunted_rank, delay_ms, name);
    }
}

int main(void) {
    const uint64_t seed = tap_seed();

    tap_deadline(110);
    tap_expect_log("arenas lie in pinned host memory");
    test_good();
    test_table();
    test_trouble();
    test_worse();
    test_warning();
    test_growth();
    walk_threads();
    walk_processes(1);
    walk_processes(0);
    test_late();
    test_killed(seed);
    return done_testing();
}
