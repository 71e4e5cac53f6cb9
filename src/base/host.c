/* SPDX-License-Identifier: MIT */
/*
 * What tells hosts apart: the kernel's boot and the network namespace.
 *
 * Owns nothing. Runs on any thread. A hint: that two processes share memory is proved by passing a
 * descriptor; where hints differ they cannot.
 */
#include "src/base/base.h"

#include <string.h>
#include <sys/stat.h>

void epi_host_hint(struct epi_host_hint *out) {
    memset(out, 0, sizeof(*out));
    char text[40];
    epi_read_text("/proc/sys/kernel/random/boot_id", text, sizeof(text));
    out->boot = epi_hash(EPI_HASH_BEGIN, text, strlen(text));
    struct stat s;
    if (stat("/proc/self/ns/net", &s) == 0) {
        out->net_inode = (uint64_t)s.st_ino;
    }
}
