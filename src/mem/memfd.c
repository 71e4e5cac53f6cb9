/* SPDX-License-Identifier: MIT */
/*
 * Makes the shared memory object: sealed against resizing, so that no peer can make another one's
 * access fail, and fully allocated, so that running out of memory is an error of create and not a
 * SIGBUS or a kill later. Called by rank 0's creating thread, whom all of it is charged to; the
 * others look at what they have been passed before they map it.
 */
#include "src/mem/shared.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8u
#endif

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#define MOST_AT_ONCE ((uint64_t)64 << 20) /* signals are held back while it is allocated */
#define LOWER "lower max_recv_rows, num_slots, max_tokens or max_row_bytes"

static int open_with(unsigned flags) {
    int fd;
    do {
        epi_fd_begin();
        fd = epi_fd_keep(memfd_create("libep", MFD_CLOEXEC | MFD_ALLOW_SEALING | flags));
    } while (fd == -EINTR);
    return fd;
}

static int open_memfd(ep_status *st) {
    int fd = open_with(MFD_NOEXEC_SEAL);
    if (fd == -EINVAL) { /* a kernel that does not know the newest flag */
        fd = open_with(0);
    }
    if (fd == -EMFILE || fd == -ENFILE) {
        *st = epi_fail(EP_ERR_SYSTEM, "%s has no descriptor left for shared memory%s",
                       fd == -EMFILE ? "this process" : "the system",
                       fd == -EMFILE ? " (ulimit -n)" : "");
    } else if (fd == -EPERM || fd == -EACCES || fd == -ENOSYS) {
        *st =
            epi_fail(EP_ERR_SYSTEM,
                     "the system refuses memfd_create (%s), by which ranks share memory: allow "
                     "it in the profile of the sandbox or container (seccomp), or in "
                     "vm.memfd_noexec",
                     strerror(-fd));
    } else if (fd < 0) {
        *st = epi_fail(fd == -ENOMEM ? EP_ERR_NOMEM : EP_ERR_SYSTEM, "memfd_create: %s",
                       strerror(-fd));
    }
    return fd;
}

/* Allocates a part without being interrupted: a program's timer may come more often than this is
 * done, and what an interrupted call has allocated is given back. 0 or errno. */
static int allocate_part(int fd, uint64_t at, uint64_t bytes) {
    sigset_t all, before;
    int err;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    do {
        err = fallocate(fd, 0, (off_t)at, (off_t)bytes) == 0 ? 0 : errno;
    } while (err == EINTR);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return err;
}

static ep_status fail_room(uint64_t bytes, bool begun, const struct epi_room *room) {
    return epi_fail(
        EP_ERR_NOMEM,
        "the arenas of this host's ranks need %llu bytes%s, and %lld are left by %s: " LOWER
        "%s",
        (unsigned long long)bytes, begun ? ", of which some are allocated" : "",
        (long long)room->bytes, room->limit, room->exact ? ", or raise that limit" : "");
}

/* What the limit on files forbids raises a signal, so it is not tried. */
static ep_status resize(int fd, uint64_t bytes) {
    struct epi_room room;
    int err;
    if (!epi_room_has(EPI_ROOM_LENGTH, bytes, &room)) {
        return fail_room(bytes, false, &room);
    }
    do {
        err = ftruncate(fd, (off_t)bytes) == 0 ? 0 : errno;
    } while (err == EINTR);
    return err ? epi_fail(EP_ERR_NOMEM, "arenas of %llu bytes: %s: " LOWER,
                          (unsigned long long)bytes, strerror(err))
               : EP_OK;
}

ep_status epi_memfd_allocate(int fd, uint64_t from, uint64_t bytes) {
    uint64_t look_at = 0; /* when to ask what there is */
    struct epi_room room;
    int err = 0;
    for (uint64_t at = 0; !err && at < bytes;) {
        if (at >= look_at) {
            if (!epi_room_has(EPI_ROOM_SHARED, bytes - at, &room)) {
                return fail_room(bytes, at > 0, &room);
            }
            look_at = at + epi_room_step(&room);
        }
        const uint64_t rest = bytes - at;
        const uint64_t part = rest < MOST_AT_ONCE ? rest : MOST_AT_ONCE;
        err = allocate_part(fd, from + at, part);
        at += part;
    }
    return err ? epi_fail(EP_ERR_NOMEM, "cannot allocate %llu bytes for arenas: %s: " LOWER,
                          (unsigned long long)bytes, strerror(err))
               : EP_OK;
}

void epi_memfd_release(int fd, uint64_t at, uint64_t end) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE),
                   first = (at + page - 1) / page * page;
    end = end / page * page;
    if (first < end) {
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)first,
                  (off_t)(end - first));
    }
}

int epi_memfd_create(size_t bytes, bool whole, ep_status *st) {
    if (epi_alloc_should_fail()) {
        *st = epi_fail(EP_ERR_NOMEM, "no memory for arenas of %zu bytes (injected)", bytes);
        return -1;
    }
    int fd = open_memfd(st);
    if (fd < 0) {
        return -1;
    }
    *st = resize(fd, bytes);
    if (*st == EP_OK && whole) {
        *st = epi_memfd_allocate(fd, 0, bytes);
    }
    if (*st == EP_OK && fcntl(fd, F_ADD_SEALS, SEALS) != 0) {
        *st = epi_fail(EP_ERR_SYSTEM, "cannot seal shared memory: %s", strerror(errno));
    }
    if (*st != EP_OK) {
        epi_fd_close(&fd);
    }
    return fd;
}

ep_status epi_memfd_check(int fd, size_t bytes, int source) {
    char why[128] = "";
    struct stat s;
    const int seals = fcntl(fd, F_GET_SEALS);
    if (fstat(fd, &s) != 0) {
        epi_format(why, sizeof(why), "%s", strerror(errno));
    } else if (s.st_uid != geteuid()) {
        epi_format(why, sizeof(why), "it belongs to user %u, this process is of user %u",
                   (unsigned)s.st_uid, (unsigned)geteuid());
    } else if (!S_ISREG(s.st_mode) || s.st_nlink != 0 || seals < 0) {
        epi_format(why, sizeof(why), "it is no memory but a file");
    } else if ((seals & SEALS) != SEALS) {
        epi_format(why, sizeof(why), "it can still be made smaller");
    } else if (s.st_size < 0 || (uint64_t)s.st_size != bytes) {
        epi_format(why, sizeof(why), "it has %lld bytes, and %zu are needed",
                   (long long)s.st_size, bytes);
    }
    return why[0] ? epi_fail(EP_ERR_PEER, "what rank %d passed is not its shared memory: %s",
                             source, why)
                  : EP_OK;
}
