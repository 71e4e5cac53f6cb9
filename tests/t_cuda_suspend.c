/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * A GPU goes on while its host is stopped. A job that is stopped as a whole for longer than its
 * timeout, with a kernel that waits for a peer, goes on as if nothing had been. Stopped are all threads
 * but the one that does it, which is the late rank's, and the driver's where that is the one for tests.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/calls.h"
#include "tests/tap.h"
#include "tests/world.h"

#define RANKS 2
#define TIMEOUT_MS 1500
#define MOST_THREADS 512

/* Nothing in the child asks for memory: at the fork a thread may have had the allocator's lock. */
static bool is_host(int process, int tid) {
    char path[64], name[16] = "";

    snprintf(path, sizeof(path), "/proc/%d/task/%d/comm", process, tid);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const bool known = fd >= 0 && read(fd, name, sizeof(name) - 1) > 0;
    if (fd >= 0) {
        close(fd);
    }
    return known && strncmp(name, "driver-", 7) != 0;
}

/* A debugger of the threads, which go on when it ends. */
static int hold(int process, const int *tids, int num, int ms) {
    int held = 0;

    for (int i = 0; i < num; i++) {
        if (is_host(process, tids[i])) {
            held += ptrace(PTRACE_SEIZE, tids[i], NULL, NULL) == 0 &&
                    ptrace(PTRACE_INTERRUPT, tids[i], NULL, NULL) == 0;
        }
    }
    tap_sleep_ms(ms);
    return held;
}

/* Stops the other threads of this process for so long; returns how many. */
static int stop_others(int ms) {
    static int tids[MOST_THREADS];
    const int self = (int)syscall(SYS_gettid), process = getpid();
    DIR *tasks = opendir("/proc/self/task");
    int num = 0, status = 0, go[2];

    for (struct dirent *e = tasks ? readdir(tasks) : NULL; e; e = readdir(tasks)) {
        const int tid = atoi(e->d_name);
        if (tid > 0 && tid != self && num < MOST_THREADS) {
            tids[num++] = tid;
        }
    }
    if (tasks) {
        closedir(tasks);
    }
    if (pipe(go) != 0) {
        return 0;
    }
    const pid_t child = fork();
    if (child == 0) {
        char c;
        _exit(read(go[0], &c, 1) == 1 ? hold(process, tids, num, ms) : 0);
    }
    prctl(PR_SET_PTRACER, child, 0, 0, 0); /* where debuggers must be allowed */
    const bool told = write(go[1], "", 1) == 1;
    waitpid(child, &status, 0);
    close(go[0]);
    close(go[1]);
    return told && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

static void one_dispatch(struct world *w) {
    int32_t ids[2] = {0, 4};
    _Alignas(16) uint8_t x[2][16] = {{1}, {2}}, got[2 * RANKS][16];
    struct ep_tensor ids_t, x_t, got_t;
    struct ep_routing routing = EP_ROUTING_INIT;
    struct ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_handle *handle = NULL;

    ep_tensor_2d(&ids_t, EP_I32, ids, 2, 1);
    ep_tensor_2d(&x_t, EP_U8, x, 2, 16);
    ep_tensor_2d(&got_t, EP_U8, got, 2 * RANKS, 16);
    routing.topk_ids = &ids_t;
    args.x = &x_t;
    args.recv_x = &got_t;
    world_is(w, ep_handle_create(&handle, w->group, NULL), EP_OK, "a handle");
    world_is(w, call_route(handle, &routing, NULL), EP_OK, "route");
    world_barrier(w);
    if (w->rank == 1) {
        tap_sleep_ms(200); /* the other's kernel waits */
        world_check(w, stop_others(2 * TIMEOUT_MS) > 0, "no thread was stopped");
    }
    world_is(w, call_dispatch(handle, &args, NULL), EP_OK,
             "a dispatch of a job that was stopped");
    world_check(w, got[w->rank][0] != 0, "rows have come");
    ep_handle_destroy(&handle);
}

int main(void) {
    struct world_setup s;

    gpu_only();
    tap_deadline(120);
    tap_expect_log("alive but late");
    world_defaults(&s, RANKS);
    s.config.timeout_ms = TIMEOUT_MS;
    s.body = one_dispatch;
    ok(world_run(&s) == 0, "a job that was stopped as a whole while a kernel waited goes on");
    return done_testing();
}
