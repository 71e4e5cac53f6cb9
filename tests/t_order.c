/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * A group destroyed before its handle: said in the log, and nothing worse happens. The log line is
 * checked here, by catching standard error.
 */
#include <string.h>
#include <unistd.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/world.h"

static ep_handle *left; /* alive for good: its group is gone */

static void body(struct world *w) {
    world_is(w, ep_handle_create(&left, w->group, NULL), EP_OK, "ep_handle_create");
}

int main(void) {
    gpu_program();
    struct world_setup s;
    char text[1024] = "";
    int ends[2];

    tap_deadline(60);
    world_defaults(&s, 1);
    s.body = body;
    const int saved = dup(STDERR_FILENO);
    ok(pipe(ends) == 0 && dup2(ends[1], STDERR_FILENO) >= 0, "standard error is caught");
    const int failed = world_run(&s);
    dup2(saved, STDERR_FILENO);
    close(ends[1]);
    ok(failed == 0, "the group is destroyed");
    ok(read(ends[0], text, sizeof(text) - 1) > 0 && strstr(text, "1 handle(s)"),
       "the log counts the handles that are alive");
    close(ends[0]);
    close(saved);
    return done_testing();
}
