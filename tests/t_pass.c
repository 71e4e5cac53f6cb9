/* SPDX-License-Identifier: MIT */
/* class: timed, long */
/*
 * Shared memory goes from a process to another one of the same user and to nobody else: both ends
 * look at whose process the other is, what arrives is looked at before it is mapped, who is silent
 * keeps nobody waiting, and what fails is said by the rank that knows why, at once.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "src/mem/shared.h"
#include "tests/gpu.h"
#include "tests/rig.h"
#include "tests/scratch.h"
#include "tests/tap.h"

#define NOBODY 65534
#define BYTES ((size_t)3 * 4096)

static struct epi_deadline in_seconds(int s) {
    return epi_deadline_after(tap_scaled(s) * EPI_NS_PER_S);
}

static bool become_nobody(void) {
    return setgroups(0, NULL) == 0 && setresgid(NOBODY, NOBODY, NOBODY) == 0 &&
           setresuid(NOBODY, NOBODY, NOBODY) == 0;
}

static int new_memory(void) {
    ep_status st = EP_OK;
    const int fd = epi_memfd_create(BYTES, true, &st);
    ok(fd >= 3 && st == EP_OK, "shared memory: %s", st == EP_OK ? "" : ep_last_error());
    return fd;
}

/* Starts fn(arg) in a process; its status is told by ended_well. */
static pid_t start(int (*fn)(void *arg), void *arg) {
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        tap_become_rank(1);
        alarm((unsigned)tap_scaled(60));
        _exit(fn(arg));
    }
    return child;
}

static bool ended_well(pid_t child) {
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* ---- other users ---------------------------------------------------------------------------- */

struct meeting { /* shared by processes */
    uint8_t token[EPI_FD_TOKEN];
    atomic_int listens, connected, done;
};

/* Another user's process that pretends to be rank 0 and offers memory of its own. */
static int impostor(void *arg) {
    struct meeting *m = arg;
    ep_status st = EP_OK;
    if (!become_nobody()) {
        return 1;
    }
    int fd = epi_memfd_create(BYTES, true, &st), listener = epi_fd_listen(m->token, &st);
    atomic_store(&m->listens, 1);
    rig_await(&m->done, 1);
    return fd < 0 || listener < 0;
}

static void test_impostor(void) {
    struct meeting *m = tap_shared(sizeof(*m));
    ep_status st = EP_OK;
    const pid_t child = start(impostor, m);
    rig_await(&m->listens, 1);
    int s = epi_fd_connect(0, m->token, in_seconds(5), &st);
    ok(s < 0 && st == EP_ERR_UNSUPPORTED && strstr(ep_last_error(), "user 65534") &&
           strstr(ep_last_error(), "user 0"),
       "memory of another user's process is not fetched: %s", ep_last_error());
    atomic_store(&m->done, 1);
    ok(ended_well(child), "the impostor was there");
}

/* Another user's process that has learned the token. */
static int thief(void *arg) {
    struct meeting *m = arg;
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    char byte;
    if (!become_nobody()) {
        return 1;
    }
    memcpy(a.sun_path, "\0libep-", 7);
    for (int i = 0; i < 8; i++) {
        snprintf(a.sun_path + 7 + 2 * i, 3, "%02x", m->token[i]);
    }
    const socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 7 + 16);
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(s, (struct sockaddr *)&a, len) != 0) {
        return 2;
    }
    send(s, m->token, EPI_FD_TOKEN, MSG_NOSIGNAL); /* it may have been turned away by now */
    atomic_store(&m->connected, 1);
    return recv(s, &byte, 1, 0) > 0; /* a byte would come with the descriptor */
}

/* One that may have it; of this user. */
static int fetcher(void *arg) {
    struct meeting *m = arg;
    ep_status st = EP_OK;
    int s = epi_fd_connect(0, m->token, in_seconds(20), &st);
    int fd = s >= 0 ? epi_fd_receive(0, s, in_seconds(20), &st) : -1;
    return fd < 3 || epi_memfd_check(fd, BYTES, 0) != EP_OK;
}

static void test_thief(void) {
    struct meeting *m = tap_shared(sizeof(*m));
    ep_status st = EP_OK;
    int fd = new_memory(), listener = epi_fd_listen(m->token, &st);
    const pid_t thieving = start(thief, m);
    rig_await(&m->connected, 1);
    const pid_t fetching = start(fetcher, m);
    ok(epi_fd_serve(listener, m->token, fd, 1, in_seconds(20)) == EP_OK &&
           ended_well(fetching) && ended_well(thieving),
       "another user's process gets nothing, and is in nobody's way: %s", ep_last_error());
    const pid_t again = start(thief, m);
    ok(epi_fd_serve(listener, m->token, fd, 1, epi_deadline_after(EPI_NS_PER_S)) ==
               EP_ERR_UNSUPPORTED &&
           strstr(ep_last_error(), "user 65534 was turned away"),
       "and is named where nobody else came: %s", ep_last_error());
    ok(ended_well(again), "it got nothing");
    epi_fd_close(&listener);
    epi_fd_close(&fd);
}

/* One job whose rank 1 is another user's. */
static int mixed_rank(int rank, void *ctx) {
    struct rig r = {0};
    if (rank == 1 && !become_nobody()) {
        return 1;
    }
    const double start_s = tap_now();
    ok(rig_group(&r, ctx, rank) != EP_OK && rig_is_sentence(ep_last_error()),
       "rank %d: no group of two users: %s", rank, ep_last_error());
    ok(tap_now() - start_s < rig_within(25), "and none is waited for");
    rig_destroy(&r);
    return 0;
}

static void test_users(void) {
    struct rig_meeting m = {2, tap_free_port(), NULL, 1500 * rig_scale()};
    if (geteuid() != 0) {
        skip(7, "only root can start processes of other users");
        return;
    }
    test_impostor();
    test_thief();
    ok(tap_spawn_ranks(2, mixed_rank, &m, 60) == 0, "ranks of two users do not meet");
}

/* ---- silence, and too few descriptors ------------------------------------------------------- */

/* Processes of this user that connect and say nothing, or the wrong thing, or only half. */
static int silent(void *arg) {
    struct meeting *m = arg;
    ep_status st = EP_OK;
    uint8_t wrong[EPI_FD_TOKEN];
    memcpy(wrong, m->token, sizeof(wrong));
    wrong[EPI_FD_TOKEN - 1] ^= 1; /* the name is right, the secret is not */
    for (int i = 0; i < 100; i++) {
        if (epi_fd_connect(0, wrong, in_seconds(20), &st) < 0) {
            return 1;
        }
    }
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    memcpy(a.sun_path, "\0libep-", 7);
    for (int i = 0; i < 8; i++) {
        snprintf(a.sun_path + 7 + 2 * i, 3, "%02x", m->token[i]);
    }
    const socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 7 + 16);
    for (int i = 0; i < 100; i++) {
        int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (s < 0 || connect(s, (struct sockaddr *)&a, len) != 0 ||
            (i % 2 && send(s, m->token, 5, MSG_NOSIGNAL) != 5)) {
            return 1;
        }
    }
    atomic_store(&m->connected, 1);
    rig_await(&m->done, 1);
    return 0;
}

static void test_silent(void) {
    struct meeting *m = tap_shared(sizeof(*m));
    const struct rig_footprint was = rig_footprint();
    ep_status st = EP_OK;
    int fd = new_memory(), listener = epi_fd_listen(m->token, &st);
    const pid_t mute = start(silent, m);
    rig_await(&m->connected, 1);
    const pid_t fetching[2] = {start(fetcher, m), start(fetcher, m)};
    const double start_s = tap_now();
    st = epi_fd_serve(listener, m->token, fd, 2, in_seconds(30));
    ok(st == EP_OK && ended_well(fetching[0]) && ended_well(fetching[1]) &&
           tap_now() - start_s < rig_within(15),
       "200 silent processes keep nobody waiting: %s", st == EP_OK ? "" : ep_last_error());
    atomic_store(&m->done, 1);
    ok(ended_well(mute), "they were there");
    epi_fd_close(&listener);
    epi_fd_close(&fd);
    ok(rig_same_footprint(was), "nothing is left");
}

struct narrow {
    struct rig_meeting meeting;
    atomic_int here; /* ranks that have come to a limit, over all of them */
};

/* Rank 0 has a descriptor for its memory, and none for who fetches it. */
static int narrow_rank(int rank, void *ctx) {
    struct narrow *n = ctx;
    struct ep_group_config c;
    ep_group *group = NULL;
    char address[32];
    bool said = false;
    /* The highest limit under which it fails while it passes memory is somewhere among these. */
    for (int spare = 2; spare <= 12 && !group; spare++) {
        struct rig_meeting one = n->meeting;
        one.port += spare;
        atomic_fetch_add(&n->here, 1); /* where one has failed at once the other waits still */
        rig_await(&n->here, 2 * (spare - 1));
        const int open = tap_num_fds();
        struct rlimit all, few;
        getrlimit(RLIMIT_NOFILE, &all);
        few = all;
        few.rlim_cur = (rlim_t)(open + spare);
        if (rank == 0) {
            setrlimit(RLIMIT_NOFILE, &few);
        }
        rig_config(&c, &one, rank, address);
        const double start_s = tap_now();
        const ep_status st = ep_group_create(&group, &c);
        setrlimit(RLIMIT_NOFILE, &all);
        if (st != EP_OK && strstr(ep_last_error(), "shared memory") &&
            strstr(ep_last_error(), "ulimit -n")) {
            said = true;
            ok(tap_now() - start_s < rig_within(5), "rank %d is told at once: %s", rank,
               ep_last_error());
        }
    }
    ok(said && group, "rank %d: descriptors that lack are named, also to others", rank);
    ep_group_destroy(&group);
    return 0;
}

static void test_narrow(void) {
    struct narrow *n = tap_shared(sizeof(*n));
    n->meeting = (struct rig_meeting){2, tap_free_port(), NULL, 1500 * rig_scale()};
    tap_expect_log("dropped");
    ok(tap_spawn_ranks(2, narrow_rank, n, 110) == 0, "too few descriptors");
}

/* ---- what arrives --------------------------------------------------------------------------- */

static void refused(int fd, size_t bytes, const char *why) {
    ok(epi_memfd_check(fd, bytes, 3) == EP_ERR_PEER && strstr(ep_last_error(), why) &&
           strstr(ep_last_error(), "rank 3") && rig_is_sentence(ep_last_error()),
       "%s: %s", why, ep_last_error());
}

static void test_arrived(void) {
    char path[64];
    snprintf(path, sizeof(path), "%s", scratch_path(scratch_folder(), "file"));
    int fd = new_memory();
    ok(epi_memfd_check(fd, BYTES, 0) == EP_OK, "what was made here is right");
    refused(fd, BYTES + 4096, "it has 12288 bytes, and 16384 are needed");
    if (geteuid() == 0) {
        ok(fchown(fd, NOBODY, NOBODY) == 0, "it is given away");
        refused(fd, BYTES, "it belongs to user 65534");
    } else {
        skip(2, "only root can give files away");
    }
    epi_fd_close(&fd);
    int loose = memfd_create("loose", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ok(loose >= 0 && ftruncate(loose, (off_t)BYTES) == 0 &&
           fcntl(loose, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SEAL) == 0,
       "memory that can be cut");
    refused(loose, BYTES, "it can still be made smaller");
    close(loose);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ok(file >= 0 && ftruncate(file, (off_t)BYTES) == 0, "a file");
    refused(file, BYTES, "it is no memory but a file");
    close(file);
    int ends[2];
    ok(pipe(ends) == 0, "a pipe");
    refused(ends[0], BYTES, "it is no memory but a file");
    close(ends[0]);
    close(ends[1]);
}

/* ---- a sandbox ------------------------------------------------------------------------------ */

/* The system call fails as the profiles of containers make it. */
static int forbidden(void *arg) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_memfd_create, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const struct sock_fprog program = {4, code};
    ep_status st = EP_OK;
    (void)arg;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        return 0;
    }
    const bool good = epi_memfd_create(BYTES, true, &st) == -1 && st == EP_ERR_SYSTEM &&
                      strstr(ep_last_error(), "seccomp") &&
                      strstr(ep_last_error(), "memfd_create") &&
                      rig_is_sentence(ep_last_error());
    if (!good) {
        fprintf(stderr, "# %s\n", ep_last_error());
    }
    return !good;
}

int main(void) {
    gpu_never("how host memory is passed");
    tap_deadline(150);
    tap_expect_log("was turned away");
    test_arrived();
    ok(ended_well(start(forbidden, NULL)), "a sandbox that forbids memfd_create is told what");
    test_silent();
    test_users();
    test_narrow();
    return done_testing();
}
