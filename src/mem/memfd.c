/* SPDX-License-Identifier: MIT */
/*
 * Makes the shared memory object: sealed against resizing, so that no peer can make another one's
 * access fail, and fully allocated, so that running out of memory is an error of create and not a
 * SIGBUS later. Called by rank 0's creating thread.
 */
#include "src/mem/shared.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int epi_memfd_create(size_t bytes, ep_status *st) {
    const int64_t have = epi_available_bytes();
    if (epi_alloc_should_fail()) {
        *st = epi_fail(EP_ERR_NOMEM, "no memory for arenas of %zu bytes (injected)", bytes);
        return -1;
    }
    if (have > 0 && bytes > (uint64_t)have) {
        *st = epi_fail(EP_ERR_NOMEM,
                       "the arenas of this host's ranks need %zu bytes and %lld are available: "
                       "lower max_recv_rows, num_slots, max_tokens or max_row_bytes",
                       bytes, (long long)have);
        return -1;
    }
    int fd = memfd_create("libep", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        *st = epi_fail(EP_ERR_SYSTEM, "memfd_create: %s", strerror(errno));
        return -1;
    }
    int err = ftruncate(fd, (off_t)bytes) != 0 ? errno : posix_fallocate(fd, 0, (off_t)bytes);
    if (err) {
        *st = epi_fail(
            EP_ERR_NOMEM,
            "cannot allocate %zu bytes for arenas: %s: lower max_recv_rows, num_slots, "
            "max_tokens or max_row_bytes",
            bytes, strerror(err));
    } else if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        *st = epi_fail(EP_ERR_SYSTEM, "cannot seal shared memory: %s", strerror(errno));
    } else {
        return fd;
    }
    close(fd);
    return -1;
}
