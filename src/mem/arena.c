/* SPDX-License-Identifier: MIT */
/*
 * Maps the arenas of all ranks of the host. Called by the threads that create and destroy groups;
 * every step is collective, so that a rank that fails takes the others back with it.
 */
#include "src/mem/shared.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Longer than any scheduling delay; ranks on other hosts were already told apart by their hint. */
#define PASS_NS (10 * EPI_NS_PER_S)

/* One mapping of all arenas; threads of a process share it. */
struct mapping {
    void *base;
    size_t bytes;
    _Atomic int users;
};

struct epi_mem {
    struct mapping *map;
    size_t arena_bytes;
};

static void mapping_release(struct mapping *m) {
    if (m && atomic_fetch_sub(&m->users, 1) == 1) {
        munmap(m->base, m->bytes);
        epi_free(m);
    }
}

static struct mapping *mapping_create(int fd, size_t bytes, int users, ep_status *st) {
    struct stat s;
    if (fstat(fd, &s) != 0 || (size_t)s.st_size != bytes) {
        *st = epi_fail(EP_ERR_INTERNAL, "shared memory of %lld bytes, expected %zu",
                       (long long)s.st_size, bytes);
        return NULL;
    }
    struct mapping *m = epi_alloc(sizeof(*m));
    void *base = MAP_FAILED;
    if (m && !epi_alloc_should_fail()) {
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    } else {
        errno = ENOMEM;
    }
    if (base == MAP_FAILED) {
        epi_free(m);
        *st = epi_fail(EP_ERR_NOMEM, "cannot map %zu bytes of arenas: %s", bytes,
                       strerror(errno));
        return NULL;
    }
    madvise(base, bytes, MADV_HUGEPAGE); /* where shared memory may use them */
    m->base = base;
    m->bytes = bytes;
    atomic_init(&m->users, users);
    return m;
}

/* Rank 0 makes the memory, the other threads get the pointer. */
static ep_status map_threads(struct epi_mem *mem, const struct epi_mem_config *c,
                             size_t bytes) {
    const struct epi_exchange *x = &c->exchange;
    struct mapping *mine = NULL;
    ep_status st = EP_OK;
    if (x->rank == 0) {
        int fd = epi_memfd_create(bytes, &st);
        if (fd >= 0) {
            mine = mapping_create(fd, bytes, x->num_ranks, &st);
            close(fd);
        }
    }
    struct mapping **all = epi_alloc_array((size_t)x->num_ranks, sizeof(*all));
    if (!all && st == EP_OK) {
        st = epi_fail(EP_ERR_NOMEM, "no memory to hear %d ranks", x->num_ranks);
    }
    ep_status agreed = epi_agree(x, st, "mapping the arenas");
    if (agreed == EP_OK) {
        agreed = x->allgather(x->ctx, &mine, sizeof(mine), all);
    }
    if (agreed == EP_OK) {
        mem->map = all[0];
    } else if (mine) {
        /* When somebody did not come at all, nobody has got the pointer. After a timeout some may
         * yet get it; they fail in the next step and release their shares. */
        if (agreed != EP_ERR_TIMEOUT) {
            atomic_store(&mine->users, 1);
        }
        mapping_release(mine);
    }
    epi_free(all);
    return agreed;
}

struct greeting {
    struct epi_host_hint hint;
    uint8_t token[EPI_FD_TOKEN];
};

/* Names the ranks that are not where rank 0 is. */
static ep_status check_hosts(const struct greeting *all, int num_ranks) {
    char names[128] = "";
    int others = 0;
    for (int r = 1; r < num_ranks; r++) {
        if (memcmp(&all[r].hint, &all[0].hint, sizeof(all[0].hint)) != 0) {
            size_t len = strlen(names);
            epi_format(names + len, sizeof(names) - len, "%s%d", others++ ? ", " : "", r);
        }
    }
    if (others) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "rank(s) %s are on another host, or in another network namespace, than "
                        "rank 0; this version joins ranks of one host",
                        names);
    }
    return EP_OK;
}

/* Every step ends in agreement before the next one waits for anybody: rank 0 serves only those
 * whose connection and token are there already. */
static ep_status pass_memory(struct epi_mem *mem, const struct epi_mem_config *c, size_t bytes,
                             const struct greeting *root, int listener, int *fd) {
    const struct epi_exchange *x = &c->exchange;
    const struct epi_deadline pass = epi_deadline_min(c->deadline, epi_deadline_after(PASS_NS));
    ep_status st = EP_OK;
    int s = x->rank == 0 ? -1 : epi_fd_connect(root->token, pass, &st);
    st = epi_agree(x, st, "reaching the arenas");
    if (st == EP_OK) {
        if (x->rank == 0) {
            st = epi_fd_serve(listener, root->token, *fd, x->num_ranks - 1, pass);
        } else {
            *fd = epi_fd_receive(s, pass, &st);
        }
        if (st == EP_OK) {
            mem->map = mapping_create(*fd, bytes, 1, &st);
        }
        st = epi_agree(x, st, "sharing the arenas");
    }
    if (s >= 0) {
        close(s);
    }
    return st;
}

static ep_status map_processes(struct epi_mem *mem, const struct epi_mem_config *c,
                               size_t bytes) {
    const struct epi_exchange *x = &c->exchange;
    struct greeting hello;
    memset(&hello, 0, sizeof(hello));
    epi_host_hint(&hello.hint);
    ep_status st = EP_OK;
    int fd = -1, listener = -1;
    if (x->rank == 0) {
        fd = epi_memfd_create(bytes, &st);
        if (fd >= 0) {
            listener = epi_fd_listen(hello.token, &st);
        }
    }
    struct greeting *all = epi_alloc_array((size_t)x->num_ranks, sizeof(*all));
    if (!all && st == EP_OK) {
        st = epi_fail(EP_ERR_NOMEM, "no memory to hear %d ranks", x->num_ranks);
    }
    st = epi_agree(x, st, "allocating the arenas");
    if (st == EP_OK) {
        st = x->allgather(x->ctx, &hello, sizeof(hello), all);
    }
    if (st == EP_OK) {
        st = check_hosts(all, x->num_ranks); /* the same verdict on every rank */
    }
    if (st == EP_OK) {
        st = pass_memory(mem, c, bytes, &all[0], listener, &fd);
    }
    if (fd >= 0) {
        close(fd);
    }
    if (listener >= 0) {
        close(listener);
    }
    epi_free(all);
    return st;
}

ep_status epi_mem_create(struct epi_mem **out, const struct epi_mem_config *config) {
    const struct epi_exchange *x = &config->exchange;
    struct epi_mem *mem = epi_alloc(sizeof(*mem));
    ep_status st = EP_OK;
    if (!mem) {
        st = epi_fail(EP_ERR_NOMEM, "no memory to map arenas");
    } else if (config->arena_bytes > PTRDIFF_MAX / (size_t)x->num_ranks) {
        st = epi_fail(EP_ERR_NOMEM, "%d arenas of %zu bytes are more than can be addressed",
                      x->num_ranks, config->arena_bytes);
    }
    st = epi_agree(x, st, "mapping the arenas");
    if (st == EP_OK) {
        size_t bytes = config->arena_bytes * (size_t)x->num_ranks;
        mem->arena_bytes = config->arena_bytes;
        st = config->threads ? map_threads(mem, config, bytes)
                             : map_processes(mem, config, bytes);
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
        mapping_release((*mem)->map);
        epi_free(*mem);
        *mem = NULL;
    }
}

void *epi_mem_arena(const struct epi_mem *mem, int rank) {
    return (uint8_t *)mem->map->base + (size_t)rank * mem->arena_bytes;
}
