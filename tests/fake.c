/* SPDX-License-Identifier: MIT */
/*
 * The device that is not there, declared in fake.h. Owns the process's list of attached ranges.
 */
#include "tests/fake.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/tap.h"

/* ---- meeting -------------------------------------------------------------------------------- */

static ep_status await_rank(const struct fake_seat *seat, int rank, struct epi_deadline d) {
    struct fake_meeting *m = seat->meeting;
    while (atomic_load(&m->num_puts[rank]) < seat->num_rounds) {
        if (atomic_load(&m->gone[rank]) && atomic_load(&m->num_puts[rank]) < seat->num_rounds) {
            return epi_fail(EP_ERR_PEER, "rank %d has gone", rank);
        }
        if (epi_deadline_expired(d)) {
            return epi_fail(EP_ERR_TIMEOUT, "rank %d has not come", rank);
        }
        usleep(50);
    }
    return EP_OK;
}

/* The slots of a round are free again two rounds later: whoever has come to the one between has
 * read them. */
static ep_status allgather(void *ctx, const void *in, size_t bytes, void *out) {
    struct fake_seat *seat = ctx;
    struct fake_meeting *m = seat->meeting;
    const struct epi_deadline d = epi_deadline_after(seat->timeout_ns);
    ep_status st = EP_OK;

    if (bytes > FAKE_MAX_BYTES) {
        return epi_fail(EP_ERR_INTERNAL, "%zu bytes are too many for this test", bytes);
    }
    const int round = ++seat->num_rounds;
    memcpy(m->slot[round % 2][seat->rank], in, bytes);
    atomic_store(&m->num_puts[seat->rank], round);
    for (int r = 0; st == EP_OK && r < m->num_ranks; r++) {
        st = await_rank(seat, r, d);
        if (st == EP_OK) {
            memcpy((char *)out + (size_t)r * bytes, m->slot[round % 2][r], bytes);
        }
    }
    return st;
}

struct epi_exchange fake_exchange(struct fake_seat *seat) {
    struct epi_exchange x = {allgather, seat, seat->rank, seat->meeting->num_ranks};
    return x;
}

/* ---- the device ----------------------------------------------------------------------------- */

#define MAX_RANGES 16
#define FAKE_PAGE ((size_t)8192) /* of two of the host's */
#define STAMP UINT64_C(0x5eed5eed5eed5eed)

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static struct fake_count count;
static struct range {
    char *host, *alias;
    size_t bytes;
} ranges[MAX_RANGES];

struct fake_count fake_count(void) {
    pthread_mutex_lock(&mutex);
    const struct fake_count now = count;
    pthread_mutex_unlock(&mutex);
    return now;
}

static void add(int *what, int n) {
    pthread_mutex_lock(&mutex);
    *what += n;
    pthread_mutex_unlock(&mutex);
}

/* What is wrong with a call, if anything. */
static ep_status begin(struct fake_device *f, enum fake_op op) {
    static const char *const names[] = {"create", "admit", "import", "attach"};
    const struct fake_trouble *t = f->trouble;

    f->calls[op]++;
    if (epi_alloc_should_fail()) {
        return epi_fail(EP_ERR_NOMEM, "no memory for the fake's %s (injected)", names[op]);
    }
    if (!t || t->op != op || (f->calls[op] > 1 && !t->always)) {
        return EP_OK;
    }
    if (t->hangs[f->rank]) {
        atomic_store(f->hung, 1);
        for (;;) {
            pause();
        }
    }
    tap_sleep_ms(t->late_ms[f->rank]);
    return t->status[f->rank] == EP_OK
               ? EP_OK
               : epi_fail(t->status[f->rank], "the fake's %s does not want to", names[op]);
}

static void stamp(struct epi_mem_piece *out, void *p, size_t bytes) {
    *out = (struct epi_mem_piece){(uint64_t)(uintptr_t)p,
                                  {bytes, (uint64_t)(uintptr_t)p ^ STAMP, 0}};
}

static ep_status reserve(void *ctx, size_t bytes, struct epi_mem_piece *out, size_t *page) {
    const struct fake_device *f = ctx;
    bytes = (bytes + FAKE_PAGE - 1) / FAKE_PAGE * FAKE_PAGE;
    void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || f->ops.ctx != f) {
        return epi_fail(EP_ERR_NOMEM, "the fake has no %zu addresses", bytes);
    }
    stamp(out, p, bytes);
    out->own[2] = 1;
    *page = FAKE_PAGE;
    add(&count.reserved, 1);
    return EP_OK;
}

static ep_status map_piece(int fd, uint64_t at, size_t bytes, struct epi_mem_piece *out) {
    void *p = mmap((void *)(uintptr_t)at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                   fd, 0);

    add(&count.wrong, bytes % FAKE_PAGE != 0);
    if (p == MAP_FAILED) {
        return epi_fail(EP_ERR_NOMEM, "the fake cannot map %zu bytes", bytes);
    }
    stamp(out, p, bytes);
    add(&count.pieces, 1);
    return EP_OK;
}

static ep_status create(void *ctx, uint64_t at, size_t bytes, struct epi_mem_piece *out,
                        int *fd_out) {
    ep_status st = begin(ctx, FAKE_CREATE);
    if (st != EP_OK) {
        return st;
    }
    int fd = memfd_create("libep-fake", MFD_CLOEXEC);
    st = fd >= 0 && ftruncate(fd, (off_t)bytes) == 0 ? map_piece(fd, at, bytes, out)
                                                     : epi_fail(EP_ERR_SYSTEM, "no memfd");
    if (st == EP_OK) {
        add(&count.created, 1);
    }
    if (st == EP_OK && fd_out) {
        *fd_out = fd;
    } else if (fd >= 0) {
        close(fd);
    }
    return st;
}

static bool is_piece(const struct epi_mem_piece *p) {
    const bool good = p->own[1] == (p->address ^ STAMP);
    if (!good) {
        add(&count.wrong, 1);
    }
    return good;
}

static ep_status admit(void *ctx, const struct epi_mem_piece *own, void *peer_ctx) {
    struct fake_device *f = ctx, *peer = peer_ctx;
    const ep_status st = begin(f, FAKE_ADMIT);
    if (st == EP_OK && is_piece(own)) {
        add(&count.admitted, 1);
        add(&count.wrong, peer->rank == f->rank || peer->ops.ctx != peer);
    }
    return st;
}

static ep_status import(void *ctx, int fd, uint64_t at, size_t bytes,
                        struct epi_mem_piece *out) {
    struct stat s;
    ep_status st = begin(ctx, FAKE_IMPORT);
    if (st != EP_OK) {
        return st;
    }
    if (fstat(fd, &s) != 0 || (size_t)s.st_size != bytes) {
        add(&count.wrong, 1);
        return epi_fail(EP_ERR_INTERNAL, "not a descriptor of the fake's");
    }
    st = map_piece(fd, at, bytes, out);
    if (st == EP_OK) {
        add(&count.imported, 1);
    }
    return st;
}

static void release(void *ctx, const struct epi_mem_piece *piece) {
    struct fake_device *f = ctx;
    if (is_piece(piece) && f->ops.ctx == f) {
        void *p = (void *)(uintptr_t)piece->address;
        add(piece->own[2] ? &count.reserved : &count.pieces, -1);
        if (piece->own[2]) {
            munmap(p, piece->own[0]);
        } else {
            mmap(p, piece->own[0], PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        }
    }
}

static bool overlaps(const struct range *a, const char *host, size_t bytes) {
    return a->host && host < a->host + a->bytes && a->host < host + bytes;
}

static ep_status attach(void *ctx, void *host, size_t bytes, uint64_t *address) {
    struct range *free_range = NULL;
    ep_status st = begin(ctx, FAKE_ATTACH);
    if (st != EP_OK) {
        return st;
    }
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < MAX_RANGES; i++) {
        count.wrong += overlaps(&ranges[i], host, bytes);
        free_range = ranges[i].host ? free_range : &ranges[i];
    }
    void *alias = free_range ? mremap(host, 0, bytes, MREMAP_MAYMOVE) : MAP_FAILED;
    if (alias == MAP_FAILED) {
        st = epi_fail(EP_ERR_SYSTEM, "the fake cannot map the same memory twice");
    } else {
        *free_range = (struct range){host, alias, bytes};
        count.attached++;
        *address = (uint64_t)(uintptr_t)alias;
    }
    pthread_mutex_unlock(&mutex);
    return st;
}

static void detach(void *ctx, void *host, size_t bytes) {
    struct fake_device *f = ctx;
    bool found = false;

    pthread_mutex_lock(&mutex);
    for (int i = 0; i < MAX_RANGES; i++) {
        if (ranges[i].host && ranges[i].host == (char *)host) {
            munmap(ranges[i].alias, ranges[i].bytes);
            ranges[i].host = NULL;
            count.attached--;
            found = true;
        }
    }
    count.wrong += !found || f->ops.ctx != f;
    munmap(host, bytes);
    pthread_mutex_unlock(&mutex);
}

void fake_device(struct fake_device *f, int rank, const struct fake_trouble *trouble,
                 atomic_int *hung) {
    memset(f, 0, sizeof(*f));
    f->rank = rank;
    f->trouble = trouble;
    f->hung = hung;
    f->ops = (struct epi_mem_device){sizeof(f->ops), f,       reserve, create, admit,
                                     import,         release, attach,  detach};
}
