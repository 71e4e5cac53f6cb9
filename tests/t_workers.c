/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * EP_WORKERS is how many threads carry a host group's operations when its caller does not say; one
 * of them is the caller's own. What the caller says comes first.
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/gpu.h"
#include "tests/tap.h"
#include "tests/world.h"

static int num_threads(void) {
    DIR *dir = opendir("/proc/self/task");
    int num = -2; /* "." and ".." */
    while (dir && readdir(dir)) {
        num++;
    }
    if (dir) {
        closedir(dir);
    }
    return num;
}

/* The least of a while: a thread that was joined may be listed for a moment longer. */
static void count(struct world *w) {
    int least = num_threads();
    for (int i = 0; i < 20; i++) {
        tap_sleep_ms(1);
        const int now = num_threads();
        least = now < least ? now : least;
    }
    *(int *)w->ctx = least;
}

/* How many threads the process of one rank has with a group; 0 if there is none. */
static int with_group(const char *knob, int num_workers) {
    struct world_setup s;
    int num = 0;
    world_defaults(&s, 1);
    s.host = true;
    s.config.num_workers = num_workers;
    s.body = count;
    s.ctx = &num;
    if (knob) {
        setenv("EP_WORKERS", knob, 1);
    } else {
        unsetenv("EP_WORKERS");
    }
    return world_run(&s) == 0 ? num : 0;
}

int main(void) {
    gpu_never("threads of host groups");
    tap_deadline(60);
    const int alone = with_group("1", 0);
    ok(alone > 0, "one worker is the caller: %d threads", alone);
    ok(with_group("4", 0) == alone + 3, "EP_WORKERS=4 has three more");
    ok(with_group("20", 0) == alone + 19, "and may be more than there are cores");
    ok(with_group("4", 2) == alone + 1, "the caller's own number comes first");
    const int chosen = with_group("0", 0);
    ok(chosen >= alone && chosen == with_group(NULL, 0), "0 chooses, as without it");
    tap_expect_log("EP_WORKERS");
    ok(with_group("many", 0) == chosen, "what is no number is named, and chooses too");
    return done_testing();
}
