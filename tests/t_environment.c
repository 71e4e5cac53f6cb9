/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * When the environment is read: on the caller's thread in what creates a group or a world, and never
 * in another call or on a thread of the library, because the program may be changing it there. And
 * not at all in a program with rights that its user has not.
 */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "src/base/base.h"
#include "tests/gpu.h"
#include "tests/rig.h"
#include "tests/scratch.h"
#include "tests/tap.h"

/* The library's calls come here: all of this program is linked to these. */
static atomic_int num_reads, num_foreign;
static _Thread_local bool in_create; /* this thread is the caller of a create */

static void note(const char *name) {
    if (strncmp(name, "EP_", 3) == 0 && strncmp(name, "EP_TEST_R", 9) != 0) {
        atomic_fetch_add(&num_reads, 1);
        atomic_fetch_add(&num_foreign, !in_create);
    }
}

typedef char *(*read_fn)(const char *name);

char *getenv(const char *name) {
    note(name);
    return ((read_fn)dlsym(RTLD_NEXT, "getenv"))(name);
}

char *secure_getenv(const char *name) {
    note(name);
    return ((read_fn)dlsym(RTLD_NEXT, "secure_getenv"))(name);
}

static void check_reads(bool some, const char *when) {
    const int reads = atomic_exchange(&num_reads, 0),
              foreign = atomic_exchange(&num_foreign, 0);
    ok((reads > 0) == some && foreign == 0,
       "%s: the environment is read %d times, %d elsewhere", when, reads, foreign);
}

static void ranks_body(int rank, const struct rig_meeting *m) {
    struct rig r = {0};
    in_create = true;
    ep_status st = rig_group(&r, m, rank);
    in_create = false;
    ok(st == EP_OK, "a group: %s", ep_last_error());
    check_reads(true, "create");
    ok(rig_route(&r) == EP_OK, "a handle: %s", ep_last_error());
    for (int i = 0; i < 3; i++) {
        rig_pass(&r);
    }
    ep_stream *stream = NULL;
    ep_event *event = NULL;
    ok(ep_stream_create(&stream, r.group) == EP_OK && ep_event_create(&event, r.group) == EP_OK,
       "a stream and an event");
    r.stream = stream;
    ok(rig_dispatch(&r) == EP_OK && rig_combine(&r) == EP_OK &&
           ep_event_record(event, stream) == EP_OK && ep_stream_sync(stream) == EP_OK,
       "are used: %s", ep_last_error());
    ok(rig_dispatch_right(&r) && rig_combine_right(&r), "right rows and sums");
    ep_event_destroy(&event);
    check_reads(false, "handles, operations, streams");
    rig_destroy(&r); /* its stream, too */
    check_reads(false, "destroy");
}

static int process_rank(int rank, void *ctx) {
    atomic_store(&num_reads, 0);
    atomic_store(&num_foreign, 0);
    ranks_body(rank, ctx);
    return 0;
}

/* A program of another user that anybody may run with that user's rights. */
static void test_setuid(const char *self) {
    const char *folder = scratch_folder();
    const char *copy = scratch_path(folder, "setuid");
    char command[4096];
#ifdef __SANITIZE_ADDRESS__
    skip(1, "LeakSanitizer does not work in a setuid program");
    return;
#endif
    if (geteuid() != 0) {
        skip(1, "a setuid program of another user can be made by root only");
        return;
    }
    chmod(folder, 0755);
    snprintf(command, sizeof(command),
             "cp '%s' '%s' && chown 65534 '%s' && chmod 4755 '%s' && EP_TIMEOUT_MS=4321 '%s' "
             "setuid 2>'%s/log'; test $? = 7 && grep -q 'EP_TIMEOUT_MS and all other' '%s/log'",
             self, copy, copy, copy, copy, folder, folder);
    const int status = system(command);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        ok(true, "a setuid program does not believe the environment, and says so");
    } else {
        snprintf(command, sizeof(command), "'%s' probe", copy);
        const int probe = system(command);
        if (WIFEXITED(probe) && WEXITSTATUS(probe) == 9) {
            skip(1, "setuid programs get no rights in %s", folder);
        } else {
            ok(false, "a setuid program believes the environment");
        }
    }
}

int main(int argc, char **argv) {
    if (argc > 1) { /* started by test_setuid */
        if (geteuid() == getuid()) {
            return 9;
        }
        return epi_opt_int(EPI_OPT_TIMEOUT_MS) == 100000 ? 7 : 1;
    }
    gpu_never("when a host group reads the environment");
    tap_deadline(100);
    struct rig_meeting m = {2, tap_free_port(), NULL, 20000 * rig_scale()};
    ok(tap_spawn_ranks(2, process_rank, &m, 60) == 0, "ranks that are processes");
    test_setuid(argv[0]);
    return done_testing();
}
