/* SPDX-License-Identifier: MIT */
/* mutants: 500 */
/*
 * Fuzzes how memory is passed between processes: what stands in for the message with the descriptor,
 * and the greetings by which ranks find each other's sockets. The input says what is sent: bytes,
 * descriptors of some kind, or nothing; then changes of sound greetings.
 *
 * Checked beyond what the sanitizers see: a descriptor comes with EP_OK and only then; a failure is
 * one printable sentence; of all that was sent, nothing stays open but what was handed over.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "src/mem/shared.h"
#include "tests/fuzz.h"

#define MAX_FDS 4
#define MAX_RANKS 5
#define VERDICT_BYTES 200 /* a greeting is shorter */

struct input {
    struct fuzz_input data;
    int rank, num_ranks;
};

static void check_text(ep_status st) {
    must((st == EP_OK) == (epi_error_text()[0] == '\0'));
    for (const char *text = epi_error_text(); *text; text++) {
        must((unsigned char)*text >= ' ' && *text != 127);
    }
}

/* Nothing but this program's own is open: the lowest free descriptor is always the same. */
static void check_descriptors(void) {
    static int lowest = -1;
    const int probe = dup(0);
    lowest = lowest < 0 ? probe : lowest;
    must(probe < 0 || probe == lowest);
    if (probe >= 0) {
        close(probe);
    }
}

static int open_something(uint8_t kind) {
    const int fd = kind % 3 == 0   ? memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING)
                   : kind % 3 == 1 ? open("/dev/null", O_RDWR | O_CLOEXEC)
                                   : open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    must(fd >= 0);
    if (kind % 3 == 0) {
        must(ftruncate(fd, kind & 8 ? 4096 : kind) == 0);
        must(fcntl(fd, F_ADD_SEALS, kind & 16 ? F_SEAL_SHRINK : 0) == 0);
    }
    return fd;
}

/* ---- the message ---------------------------------------------------------------------------- */

static void send_message(struct input *in, int to) {
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(MAX_FDS * sizeof(int))] = {0};
    int fds[MAX_FDS];
    uint8_t bytes[8];
    const int num = fuzz_next(&in->data) % (MAX_FDS + 1);
    struct iovec io = {bytes, fuzz_next(&in->data) % sizeof(bytes)};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1};
    for (size_t i = 0; i < io.iov_len; i++) {
        bytes[i] = fuzz_next(&in->data);
    }
    for (int i = 0; i < num; i++) {
        fds[i] = open_something(fuzz_next(&in->data));
    }
    if (num) {
        m.msg_control = control;
        m.msg_controllen = CMSG_SPACE((size_t)num * sizeof(int));
        struct cmsghdr *h = CMSG_FIRSTHDR(&m);
        h->cmsg_level = SOL_SOCKET;
        h->cmsg_type = SCM_RIGHTS;
        h->cmsg_len = CMSG_LEN((size_t)num * sizeof(int));
        memcpy(CMSG_DATA(h), fds, (size_t)num * sizeof(int));
    }
    if (io.iov_len) {
        must(sendmsg(to, &m, MSG_NOSIGNAL) > 0);
    }
    for (int i = 0; i < num; i++) {
        close(fds[i]);
    }
}

static void check_message(struct input *in) {
    const bool is_silent = fuzz_next(&in->data) % 8 == 7;
    ep_status st = EP_OK;
    int pair[2];
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    send_message(in, pair[0]);
    if (!is_silent) {
        shutdown(pair[0], SHUT_WR);
    }
    int fd = epi_fd_receive(1, pair[1], epi_deadline_after(EPI_NS_PER_MS), &st);
    must((fd >= 0) == (st == EP_OK));
    check_text(st);
    epi_fd_close(&fd);
    close(pair[0]);
    close(pair[1]);
}

/* ---- greetings ------------------------------------------------------------------------------ */

static ep_status gather(void *ctx, const void *mine, size_t bytes, void *out) {
    struct input *in = ctx;
    uint8_t *all = out;
    for (int r = 0; r < in->num_ranks; r++) {
        memset(all + (size_t)r * bytes, 0, bytes); /* a verdict: it went well */
        if (r == in->rank || bytes < VERDICT_BYTES) {
            memcpy(all + (size_t)r * bytes, mine, bytes);
        }
    }
    while (bytes < VERDICT_BYTES && in->data.left) {
        uint8_t *one = all + (size_t)(fuzz_next(&in->data) % in->num_ranks) * bytes;
        const size_t from = fuzz_next(&in->data) % bytes, len = fuzz_next(&in->data) % 32;
        for (size_t i = 0; i < len; i++) {
            const uint8_t byte = fuzz_next(&in->data);
            if (from + i < bytes) {
                one[from + i] = byte;
            }
        }
    }
    return EP_OK;
}

static void check_greetings(struct input *in) {
    const uint8_t how = fuzz_next(&in->data);
    struct epi_share share;
    in->num_ranks = 2 + how % (MAX_RANKS - 1);
    in->rank = (how >> 2) % in->num_ranks;
    const struct epi_mem_config c = {.exchange = {gather, in, in->rank, in->num_ranks},
                                     .deadline = epi_deadline_after(EPI_NS_PER_MS)};
    const int num_sources = how & 0x80 ? in->num_ranks : 1;
    epi_clear_error();
    const ep_status own = how & 0x40 ? epi_fail(EP_ERR_NOMEM, "no memory") : EP_OK;
    const ep_status st = epi_share_open(&share, &c, num_sources, own);
    must(own == EP_OK || st == own);
    check_text(st);
    epi_share_close(&share);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    struct input in = {.data = {data, bytes}};
    setenv("EP_LOG", "error", 1);
    epi_clear_error();
    check_descriptors();
    const int64_t live = epi_alloc_live();
    check_message(&in);
    check_greetings(&in);
    must(epi_alloc_live() == live);
    check_descriptors();
    return 0;
}
