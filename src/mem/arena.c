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
    size_t arena_bytes, board_bytes;
    uint32_t process; /* that made it */
    int rank, num_ranks;
    bool on_device;               /* the arenas */
    struct epi_mem_device device; /* all NULL: there is none */
};

ep_status epi_mem_agree(const struct epi_mem_config *c, ep_status mine, const char *step) {
    return c->device ? epi_agree_optional(&c->exchange, mine, step)
                     : epi_agree(&c->exchange, mine, step);
}

/* ---- the mapping ---------------------------------------------------------------------------- */

static void mapping_release(struct epi_mapping *m, const struct epi_mem_device *d,
                            bool forked) {
    if (!m || atomic_fetch_sub(&m->users, 1) != 1) {
        return;
    }
    if (forked) { /* nothing of it is mapped here, and something else may be in its place */
        epi_fd_close(&m->fd);
        epi_free(m);
        return;
    }
    for (int r = 0; r < m->num_pieces; r++) {
        if (m->piece[r].address) {
            d->release(d->ctx, &m->piece[r]);
        }
    }
    if (m->attached) {
        d->detach(d->ctx, m->base, m->bytes);
    } else {
        munmap(m->base, m->bytes);
    }
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

/* Of `fd`, for so many users; known to the device if there is one. */
static struct epi_mapping *mapping_create(const struct epi_mem *mem, int fd, size_t bytes,
                                          int users, ep_status *st) {
    const struct epi_mem_device *d = &mem->device;
    const int num_pieces = mem->on_device ? mem->num_ranks : 0;
    struct epi_mapping *m =
        epi_alloc(sizeof(*m) + (size_t)num_pieces * sizeof(struct epi_mem_piece));
    if (!m) {
        *st = epi_fail(EP_ERR_NOMEM, "no memory to map arenas");
        return NULL;
    }
    m->num_pieces = num_pieces;
    m->fd = -1;
    atomic_init(&m->users, users);
    *st = map_shared(m, fd, bytes);
    if (*st == EP_OK && d->attach) {
        *st = d->attach(d->ctx, m->base, bytes, &m->address);
        m->attached = *st == EP_OK;
        if (*st != EP_OK) {
            epi_fail(*st, "rank %d cannot show the shared memory to its device: %s", mem->rank,
                     epi_error_text());
            munmap(m->base, bytes);
        }
    }
    if (*st != EP_OK) {
        epi_free(m);
        return NULL;
    }
    return m;
}

/* What `now` has more than `was` (NULL: nothing) of the arena that begins at `base`. */
static ep_status back(int fd, uint64_t base, const struct epi_mem_use *was,
                      const struct epi_mem_use *now, int num_uses) {
    for (int i = 0; i < num_uses; i++) {
        const uint64_t from = was ? was[i].used : 0;
        for (uint64_t part = 0; part < now[i].parts; part++) {
            EPI_TRY(epi_memfd_allocate(fd, base + now[i].at + part * now[i].stride + from,
                                       now[i].used - from));
        }
    }
    return EP_OK;
}

static int make_fd(const struct epi_mem_config *c, size_t bytes, ep_status *st) {
    int fd = epi_memfd_create(bytes, !c->use, st);
    for (int r = 0; fd >= 0 && c->use && *st == EP_OK && r < c->exchange.num_ranks; r++) {
        *st = back(fd, (uint64_t)r * c->arena_bytes, NULL, c->use, c->num_uses);
    }
    if (*st != EP_OK) {
        epi_fd_close(&fd);
    }
    return fd;
}

/* The descriptor is needed no longer, unless arenas grow. */
static void keep_fd(struct epi_mapping *m, const struct epi_mem_config *c, int *fd) {
    if (m && c->use) {
        m->fd = *fd;
        *fd = -1;
    }
    epi_fd_close(fd);
}

/* Rank 0 makes the memory, the other threads get the pointer. */
static ep_status map_threads(struct epi_mem *mem, const struct epi_mem_config *c,
                             size_t bytes) {
    const struct epi_exchange *x = &c->exchange;
    struct epi_mapping *mine = NULL;
    ep_status st = EP_OK;
    if (x->rank == 0) {
        int fd = make_fd(c, bytes, &st);
        if (fd >= 0) {
            mine = mapping_create(mem, fd, bytes, x->num_ranks, &st);
            keep_fd(mine, c, &fd);
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
        mem->map = all[0];
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
    if (c->exchange.rank == 0) {
        fd = make_fd(c, bytes, &st);
    }
    st = epi_share_open(&share, c, 1, st);
    if (st == EP_OK) {
        st = epi_share_pass(&share, c, &fd);
        if (st == EP_OK && c->exchange.rank != 0) {
            st = epi_memfd_check(fd, bytes, 0);
        }
        if (st == EP_OK) {
            mem->map = mapping_create(mem, fd, bytes, 1, &st);
        }
        st = epi_mem_agree(c, st, "sharing the arenas");
    }
    epi_share_close(&share);
    keep_fd(mem->map, c, &fd);
    return st;
}

/* ---- a group's memory ----------------------------------------------------------------------- */

/* In the shared memory: arenas, if they are there, and boards. */
static size_t arenas_end(const struct epi_mem *mem) {
    return mem->on_device ? 0 : (size_t)mem->num_ranks * mem->arena_bytes;
}

static ep_status build(struct epi_mem *mem, const struct epi_mem_config *c, bool on_device) {
    mem->on_device = on_device;
    const size_t boards = (size_t)mem->num_ranks * mem->board_bytes;
    size_t bytes = arenas_end(mem) + boards;
    if (bytes == 0) {
        bytes = LEAST_BYTES;
    }
    ep_status st = c->threads ? map_threads(mem, c, bytes) : map_processes(mem, c, bytes);
    if (st == EP_OK && on_device) {
        st = epi_device_arenas(mem->map, c);
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
    const int num_ranks = config->exchange.num_ranks;
    const size_t most = PTRDIFF_MAX / (size_t)num_ranks;
    struct epi_mem *mem = epi_alloc(sizeof(*mem));
    struct epi_mem_config own = *config;
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
        mem->rank = config->exchange.rank;
        mem->num_ranks = num_ranks;
        mem->arena_bytes = config->arena_bytes;
        mem->board_bytes = config->board_bytes;
        if (config->device) {
            const size_t bytes = config->device->size;
            memcpy(&mem->device, config->device,
                   bytes < sizeof(mem->device) ? bytes : sizeof(mem->device));
            own.device = &mem->device;
        }
        st = build_best(mem, &own);
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

/* ---- where things are ----------------------------------------------------------------------- */

static size_t arena_at(const struct epi_mem *mem, int rank) {
    return (size_t)rank * mem->arena_bytes;
}

static size_t board_at(const struct epi_mem *mem, int rank) {
    return arenas_end(mem) + (size_t)rank * mem->board_bytes;
}

ep_status epi_mem_grow(struct epi_mem *mem, const struct epi_mem_use *was,
                       const struct epi_mem_use *now, int num_uses) {
    const ep_status st = epi_alloc_should_fail()
                             ? epi_fail(EP_ERR_NOMEM, "no memory for a larger arena (injected)")
                             : back(mem->map->fd, arena_at(mem, mem->rank), was, now, num_uses);
    if (st != EP_OK) {
        epi_mem_shrink(mem, was, now, num_uses);
    }
    return st;
}

void epi_mem_shrink(struct epi_mem *mem, const struct epi_mem_use *was,
                    const struct epi_mem_use *now, int num_uses) {
    for (int i = 0; i < num_uses; i++) {
        for (uint64_t part = 0; part < now[i].parts; part++) {
            const uint64_t at = arena_at(mem, mem->rank) + now[i].at + part * now[i].stride;
            epi_memfd_release(mem->map->fd, at + was[i].used, at + now[i].used);
        }
    }
}

bool epi_mem_on_device(const struct epi_mem *mem) {
    return mem->on_device;
}

void *epi_mem_arena(const struct epi_mem *mem, int rank) {
    return mem->on_device ? NULL : (uint8_t *)mem->map->base + arena_at(mem, rank);
}

void *epi_mem_board(const struct epi_mem *mem, int rank) {
    return (uint8_t *)mem->map->base + board_at(mem, rank);
}

uint64_t epi_mem_arena_address(const struct epi_mem *mem, int rank) {
    return mem->on_device ? mem->map->piece[rank].address
                          : mem->map->address + arena_at(mem, rank);
}

uint64_t epi_mem_board_address(const struct epi_mem *mem, int rank) {
    return mem->map->address + board_at(mem, rank);
}
