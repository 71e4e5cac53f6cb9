/* SPDX-License-Identifier: MIT */
/*
 * Maps the memory of all ranks of the host, and chooses where arenas lie. Owns the mapping. Called
 * by the threads that create and destroy groups; every step is collective, so that a rank that
 * fails takes the others back with it.
 */
#include "src/mem/shared.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LEAST_BYTES ((size_t)4096) /* are mapped also where there is nothing to share */

struct epi_mem {
    struct epi_mapping *map;
    struct epi_mem_config c;      /* its deadline is over */
    struct epi_mem_device device; /* all NULL: there is none */
    struct epi_mem_use whole;     /* of an arena that does not grow */
    uint32_t process;             /* that made it */
    bool on_device;               /* the arenas */
};

ep_status epi_mem_agree(const struct epi_mem_config *c, ep_status mine, const char *step) {
    return c->alike    ? epi_agree_alike(&c->exchange, mine, step)
           : c->device ? epi_agree_optional(&c->exchange, mine, step)
                       : epi_agree(&c->exchange, mine, step);
}

static size_t arena_at(const struct epi_mem *mem, int index) {
    return (size_t)index * mem->c.arena_bytes;
}

/* In the shared memory: arenas, if they are there, and boards. */
static size_t arenas_end(const struct epi_mem *mem) {
    return mem->on_device ? 0 : arena_at(mem, mem->c.num_ranks);
}

static size_t board_at(const struct epi_mem *mem, int index) {
    return arenas_end(mem) + (size_t)index * mem->c.board_bytes;
}

/* ---- the mapping ---------------------------------------------------------------------------- */

/* What the device knows goes when it has forgotten that. In a forked process nothing is mapped, and
 * something else may be in its place. */
static void unmap(struct epi_mapping *m, const struct epi_mem_device *d, bool forked) {
    char *base = m->base;
    uint64_t at = 0;
    while (m->attached) {
        struct epi_attached *a = m->attached;
        m->attached = a->next;
        if (!forked && a->at > at) {
            munmap(base + at, a->at - at);
        }
        if (!forked) {
            d->detach(d->ctx, base + a->at, a->end - a->at);
        }
        at = a->end;
        epi_free(a);
    }
    if (!forked && base && at < m->bytes) {
        munmap(base + at, m->bytes - at);
    }
}

static void free_arena(struct epi_arena *a, const struct epi_mem_device *d, bool forked) {
    while (forked && a->backed) {
        struct epi_backed *b = a->backed;
        a->backed = b->next;
        epi_free(b);
    }
    if (!forked) {
        epi_device_release(d, a);
    }
}

static void mapping_release(struct epi_mapping *m, const struct epi_mem_device *d,
                            bool forked) {
    if (!m || atomic_fetch_sub(&m->users, 1) != 1) {
        return;
    }
    for (int r = 0; r < m->num_arenas; r++) {
        free_arena(&m->arena[r], d, forked);
    }
    unmap(m, d, forked);
    epi_fd_close(&m->fd);
    epi_free(m);
}

static ep_status map_shared(struct epi_mapping *m, int fd, size_t bytes) {
    errno = ENOMEM;
    if (!epi_alloc_should_fail()) {
        m->base = epi_map_shared(fd, bytes);
    }
    if (!m->base) {
        const int err = errno;
        struct epi_room room;
        char left[256] = "";
        if (err == ENOMEM && !epi_room_has(EPI_ROOM_SHARED, bytes, &room)) {
            epi_format(left, sizeof(left), ": %lld are left by %s", (long long)room.bytes,
                       room.limit);
        }
        return epi_fail(EP_ERR_NOMEM, "cannot map %zu bytes of arenas: %s%s", bytes,
                        strerror(err), left);
    }
    madvise(m->base, bytes, MADV_HUGEPAGE); /* where shared memory may use them */
    m->bytes = bytes;
    m->address = (uint64_t)(uintptr_t)m->base;
    return EP_OK;
}

/* Bytes of the mapping that the device does not know yet. Kernels find all of it by one address. */
static ep_status attach(struct epi_mapping *m, const struct epi_mem_device *d, uint64_t at,
                        uint64_t end) {
    struct epi_attached **next = &m->attached;
    while (at < end) {
        while (*next && (*next)->end <= at) {
            next = &(*next)->next;
        }
        if (*next && (*next)->at <= at) { /* of a growth that has failed */
            at = (*next)->end;
            continue;
        }
        struct epi_attached *a = epi_alloc(sizeof(*a));
        uint64_t address = 0;
        if (!a) {
            return epi_fail(EP_ERR_NOMEM, "no memory to note what the device knows");
        }
        *a = (struct epi_attached){at, *next && (*next)->at < end ? (*next)->at : end, *next};
        const ep_status st =
            d->attach(d->ctx, (char *)m->base + a->at, (size_t)(a->end - a->at), &address);
        if (st != EP_OK) {
            epi_free(a);
            return st;
        }
        m->address = m->attached ? m->address : address - a->at;
        at = a->end;
        *next = a;
        if (m->address != address - a->at) {
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "the device has other addresses for host memory "
                            "than the host: arenas there cannot grow");
        }
    }
    return EP_OK;
}

/* Calls `visit` for each run of pages of the shared memory that arenas `from` to `to` need more
 * than before. */
static ep_status each_run(const struct epi_mem *mem, int from, int to,
                          const struct epi_mem_use *was, const struct epi_mem_use *now,
                          ep_status (*visit)(void *ctx, uint64_t at, uint64_t end), void *ctx) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    for (int r = from; r < to; r++) {
        struct epi_runs w = {was, now, mem->c.num_uses, page, 0, 0, 0};
        uint64_t at, bytes;
        while (epi_next_run(&w, &at, &bytes)) {
            EPI_TRY(visit(ctx, arena_at(mem, r) + at, arena_at(mem, r) + at + bytes));
        }
    }
    return EP_OK;
}

static ep_status allocate(void *ctx, uint64_t at, uint64_t end) {
    return epi_memfd_allocate(*(const int *)ctx, at, end - at);
}

static ep_status punch(void *ctx, uint64_t at, uint64_t end) {
    epi_memfd_release(*(const int *)ctx, at, end);
    return EP_OK;
}

struct shown {
    struct epi_mapping *map;
    const struct epi_mem *mem;
};

static ep_status show(void *ctx, uint64_t at, uint64_t end) {
    const struct shown *s = ctx;
    const ep_status st = attach(s->map, &s->mem->device, at, end);
    return st == EP_OK ? EP_OK
                       : epi_fail(st, "rank %d cannot show the shared memory to its device: %s",
                                  s->mem->c.exchange.rank, epi_error_text());
}

/* Arenas grow in the shared memory, of which the rest is holes. */
static bool has_holes(const struct epi_mem *mem) {
    return !mem->on_device && mem->c.use != &mem->whole;
}

/* Of `fd`, for so many users; known to the device if there is one. */
static struct epi_mapping *mapping_create(const struct epi_mem *mem, int fd, size_t bytes,
                                          int users, ep_status *st) {
    const struct epi_mem_device *d = &mem->device;
    const int num_ranks = mem->c.num_ranks, num_arenas = mem->on_device ? num_ranks : 0;
    struct epi_mapping *m =
        epi_alloc(sizeof(*m) + (size_t)num_arenas * sizeof(struct epi_arena));
    struct shown all = {m, mem};
    if (!m) {
        *st = epi_fail(EP_ERR_NOMEM, "no memory to map arenas");
        return NULL;
    }
    m->num_arenas = num_arenas;
    m->fd = -1;
    atomic_init(&m->users, users);
    *st = map_shared(m, fd, bytes);
    if (*st == EP_OK && d->attach) {
        *st =
            has_holes(mem) ? each_run(mem, 0, num_ranks, NULL, mem->c.use, show, &all) : EP_OK;
        *st = *st == EP_OK ? show(&all, has_holes(mem) ? arenas_end(mem) : 0, bytes) : *st;
    }
    if (*st != EP_OK) {
        unmap(m, d, false);
        epi_free(m);
        return NULL;
    }
    return m;
}

static int make_fd(const struct epi_mem *mem, size_t bytes, ep_status *st) {
    int fd = epi_memfd_create(bytes, !has_holes(mem), st);
    if (fd >= 0 && has_holes(mem)) {
        *st = each_run(mem, 0, mem->c.num_ranks, NULL, mem->c.use, allocate, &fd);
        *st = *st == EP_OK ? allocate(&fd, arenas_end(mem), bytes) : *st;
    }
    if (*st != EP_OK) {
        epi_fd_close(&fd);
    }
    return fd;
}

/* The descriptor is needed no longer, unless arenas grow. */
static void keep_fd(const struct epi_mem *mem, struct epi_mapping *m, int *fd) {
    if (m && has_holes(mem)) {
        m->fd = *fd;
        *fd = -1;
    }
    epi_fd_close(fd);
}

/* The first makes the memory, the other threads get the pointer. */
static ep_status map_threads(struct epi_mem *mem, const struct epi_mem_config *c,
                             size_t bytes) {
    const struct epi_exchange *x = &c->exchange;
    struct epi_mapping *mine = NULL;
    ep_status st = EP_OK;
    if (x->rank == epi_mem_rank(c, 0)) {
        int fd = make_fd(mem, bytes, &st);
        if (fd >= 0) {
            mine = mapping_create(mem, fd, bytes, c->num_ranks, &st);
            keep_fd(mem, mine, &fd);
        }
    }
    struct epi_mapping **all = epi_alloc_array((size_t)x->num_ranks, sizeof(*all));
    if (!all && st == EP_OK) {
        st = epi_fail(EP_ERR_NOMEM, "no memory to hear %d ranks", x->num_ranks);
    }
    ep_status agreed = epi_mem_agree(c, st, "mapping the arenas");
    const bool told = agreed == EP_OK;
    if (told) {
        agreed = x->allgather(x->ctx, &mine, sizeof(mine), all);
    }
    if (agreed == EP_OK) {
        mem->map = all[epi_mem_rank(c, 0)];
    } else if (mine) {
        /* When somebody did not come at all, nobody has got the pointer. After a timeout some may
         * yet get it; they fail in the next step and release their shares. */
        if (!told || agreed != EP_ERR_TIMEOUT) {
            atomic_store(&mine->users, 1);
        }
        mapping_release(mine, &mem->device, false);
    }
    epi_free(all);
    return agreed;
}

static ep_status map_processes(struct epi_mem *mem, const struct epi_mem_config *c,
                               size_t bytes) {
    struct epi_share share;
    ep_status st = EP_OK;
    int fd = -1;
    const bool makes = c->exchange.rank == epi_mem_rank(c, 0);
    if (makes) {
        fd = make_fd(mem, bytes, &st);
    }
    st = epi_share_open(&share, c, 1, st);
    if (st == EP_OK) {
        st = epi_share_pass(&share, c, &fd);
        if (st == EP_OK && !makes) {
            st = epi_memfd_check(fd, bytes, epi_mem_rank(c, 0));
        }
        if (st == EP_OK) {
            mem->map = mapping_create(mem, fd, bytes, 1, &st);
        }
        st = epi_mem_agree(c, st, "sharing the arenas");
    }
    epi_share_close(&share);
    keep_fd(mem, mem->map, &fd);
    return st;
}

/* ---- a group's memory ----------------------------------------------------------------------- */

static ep_status build(struct epi_mem *mem, const struct epi_mem_config *c, bool on_device) {
    mem->on_device = on_device;
    size_t bytes = board_at(mem, c->num_ranks);
    if (bytes == 0) {
        bytes = LEAST_BYTES;
    }
    ep_status st = c->threads ? map_threads(mem, c, bytes) : map_processes(mem, c, bytes);
    if (st == EP_OK && on_device) {
        st = epi_device_reserve(mem->map, c);
    }
    if (st == EP_OK && on_device) {
        st = epi_device_back(mem->map, c, NULL, c->use);
    }
    if (st != EP_OK && mem->map) {
        char text[EPI_ERROR_TEXT_BYTES]; /* what releases may say is not what failed */
        epi_format(text, sizeof(text), "%s", epi_error_text());
        mapping_release(mem->map, &mem->device, false);
        mem->map = NULL;
        epi_fail(st, "%s", text);
    }
    return st;
}

/* On the device if it can be, else in host memory. That it cannot, all ranks know alike. */
static ep_status build_best(struct epi_mem *mem, const struct epi_mem_config *c) {
    char why[EPI_ERROR_TEXT_BYTES];
    if (!c->device || c->arena_kind == EPI_MEM_HOST) {
        return build(mem, c, false);
    }
    ep_status st = build(mem, c, true);
    if (st != EP_ERR_UNSUPPORTED || c->arena_kind == EPI_MEM_DEVICE) {
        return st;
    }
    epi_format(why, sizeof(why), "%s", epi_error_text());
    st = build(mem, c, false);
    if (st == EP_OK && c->exchange.rank == 0) {
        epi_log(EPI_LOG_WARN, "%s; arenas lie in pinned host memory, which is as fast as PCIe",
                why);
    }
    return st;
}

ep_status epi_mem_create(struct epi_mem **out, const struct epi_mem_config *config) {
    const int num_ranks = config->ranks ? config->num_ranks : config->exchange.num_ranks;
    const size_t most = PTRDIFF_MAX / (size_t)num_ranks;
    struct epi_mem *mem = epi_alloc(sizeof(*mem));
    ep_status st = EP_OK;
    if (!mem) {
        st = epi_fail(EP_ERR_NOMEM, "no memory to map arenas");
    } else if (config->arena_bytes > most || config->board_bytes > most - config->arena_bytes) {
        st = epi_fail(EP_ERR_NOMEM, "%d arenas of %zu bytes are more than can be addressed",
                      num_ranks, config->arena_bytes);
    }
    st = epi_mem_agree(config, st, "mapping the arenas");
    if (st == EP_OK) {
        mem->process = epi_process();
        mem->c = *config;
        mem->c.num_ranks = num_ranks;
        if (!config->use) {
            mem->whole = (struct epi_mem_use){0, 0, config->arena_bytes, 1};
            mem->c.use = &mem->whole;
            mem->c.num_uses = 1;
        }
        if (config->device) {
            const size_t bytes = config->device->size;
            memcpy(&mem->device, config->device,
                   bytes < sizeof(mem->device) ? bytes : sizeof(mem->device));
            mem->c.device = &mem->device;
        }
        st = build_best(mem, &mem->c);
    }
    if (st != EP_OK) {
        epi_mem_destroy(&mem);
        return st;
    }
    *out = mem;
    return EP_OK;
}

void epi_mem_destroy(struct epi_mem **mem) {
    if (mem && *mem) {
        mapping_release((*mem)->map, &(*mem)->device, epi_is_forked((*mem)->process));
        epi_free(*mem);
        *mem = NULL;
    }
}

/* ---- growth --------------------------------------------------------------------------------- */

/* Owners allocate; when all have, devices are told: of threads' by one. What they may know keeps its
 * pages. */
static ep_status grow_shared(struct epi_mem *mem, const struct epi_mem_config *c,
                             const struct epi_mem_use *was, const struct epi_mem_use *now) {
    const int own = epi_mem_index(c, c->exchange.rank);
    struct shown all = {mem->map, mem};
    ep_status mine = epi_alloc_should_fail()
                         ? epi_fail(EP_ERR_NOMEM, "no memory for a larger arena (injected)")
                         : each_run(mem, own, own + 1, was, now, allocate, &mem->map->fd);
    ep_status st = epi_mem_agree(c, mine, "ep_group_grow");
    if (st != EP_OK && st != EP_ERR_TIMEOUT && !mem->device.attach) {
        each_run(mem, own, own + 1, was, now, punch, &mem->map->fd);
    }
    if (st == EP_OK && mem->device.attach) {
        mine = c->threads && own != 0 ? EP_OK
                                      : each_run(mem, 0, c->num_ranks, was, now, show, &all);
        st = epi_mem_agree(c, mine, "ep_group_grow");
    }
    return st;
}

ep_status epi_mem_grow(struct epi_mem *mem, struct epi_deadline deadline,
                       const struct epi_mem_use *was, const struct epi_mem_use *now) {
    struct epi_mem_config c = mem->c;
    c.deadline = deadline;
    c.alike = true;
    if (!mem->on_device) {
        return grow_shared(mem, &c, was, now);
    }
    const ep_status st = epi_device_back(mem->map, &c, was, now);
    if (st != EP_OK && st != EP_ERR_TIMEOUT) {
        char text[EPI_ERROR_TEXT_BYTES];
        epi_format(text, sizeof(text), "%s", epi_error_text());
        epi_device_drop(mem->map, &c, was, now);
        epi_fail(st, "%s", text);
    }
    return st;
}

/* ---- where things are ----------------------------------------------------------------------- */

bool epi_mem_on_device(const struct epi_mem *mem) {
    return mem->on_device;
}

void *epi_mem_arena(const struct epi_mem *mem, int rank) {
    return mem->on_device
               ? NULL
               : (uint8_t *)mem->map->base + arena_at(mem, epi_mem_index(&mem->c, rank));
}

void *epi_mem_board(const struct epi_mem *mem, int rank) {
    return (uint8_t *)mem->map->base + board_at(mem, epi_mem_index(&mem->c, rank));
}

uint64_t epi_mem_arena_address(const struct epi_mem *mem, int rank) {
    const int index = epi_mem_index(&mem->c, rank);
    return mem->on_device ? mem->map->arena[index].addresses.address
                          : mem->map->address + arena_at(mem, index);
}

uint64_t epi_mem_board_address(const struct epi_mem *mem, int rank) {
    return mem->map->address + board_at(mem, epi_mem_index(&mem->c, rank));
}
