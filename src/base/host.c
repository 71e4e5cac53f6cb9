/* SPDX-License-Identifier: MIT */
/*
 * What tells hosts apart: the kernel's boot and the network namespace.
 *
 * Owns nothing. Runs on any thread. A hint: that two processes share memory is proved by passing a
 * descriptor; where hints differ they cannot.
 */
#include "src/base/base.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

void epi_host_hint(struct epi_host_hint *out) {
    memset(out, 0, sizeof(*out));
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (f) {
        char text[40];
        if (fgets(text, sizeof(text), f)) {
            out->boot = epi_hash(EPI_HASH_BEGIN, text, strlen(text));
        }
        fclose(f);
    }
    struct stat s;
    if (stat("/proc/self/ns/net", &s) == 0) {
        out->net_inode = (uint64_t)s.st_ino;
    }
}
