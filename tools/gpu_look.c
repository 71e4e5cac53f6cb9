/* SPDX-License-Identifier: MIT */
/*
 * What GPUs there are, which of them reach each other, and what compiles kernels for them.
 *
 * Owns the one answer of the process. It is found in a child, because this process may have to
 * fork ranks; a child that crashes or hangs in a driver is an answer too.
 */
#include "tools/gpu.h"

#include <glob.h>
#include <unistd.h>

#include "src/cu/cu.h"

#define LOOK_SECONDS 120 /* a driver that initialises many GPUs takes its time */

enum attribute { COMPUTE_MODE = 20, MPS_ENABLED = 133 };
enum { COMPUTE_MODE_EXCLUSIVE_PROCESS = 3 };

static int count(const char *pattern) {
    glob_t found;
    int num = 0;
    if (glob(pattern, 0, NULL, &found) == 0) {
        num = (int)found.gl_pathc;
        globfree(&found);
    }
    return num;
}

static void look_at_modes(struct gpu_look *look, int index, int handle) {
    int (*get)(int *, int, int) = NULL;
    int mode = 0, mps = 0;
    *(void **)&get = gpu_driver_function("cuDeviceGetAttribute");
    get(&mode, COMPUTE_MODE, handle);
    get(&mps, MPS_ENABLED, handle); /* older drivers do not know it */
    look->device[index].exclusive = mode == COMPUTE_MODE_EXCLUSIVE_PROCESS;
    look->mps = look->mps || mps != 0;
}

static void look_at_devices(struct gpu_look *look) {
    struct epi_cu_device devices[GPU_MAX];
    for (int i = 0; i < look->num; i++) {
        struct gpu_device *to = &look->device[i];
        struct epi_cu_device *d = &devices[i];
        *d = (struct epi_cu_device){0};
        if (epi_cu_device_open(d, i) != EP_OK) {
            snprintf(to->why, sizeof(to->why), "%.200s", ep_last_error());
            continue;
        }
        snprintf(to->name, sizeof(to->name), "%s", d->name);
        to->major = d->major;
        to->minor = d->minor;
        to->num_sms = d->num_sms;
        to->memory_bytes = (int64_t)d->memory_bytes;
        to->shares_memory = d->shareable;
        look_at_modes(look, i, d->handle);
    }
    for (int i = 0; i < look->num; i++) {
        for (int j = 0; j < look->num; j++) {
            look->reaches[i][j] = devices[i].context && devices[j].context &&
                                  (i == j || epi_cu_peer(&devices[i], &devices[j]) == EP_OK);
        }
    }
    for (int i = 0; i < look->num; i++) {
        epi_cu_device_close(&devices[i]);
    }
}

/* The search that a group makes when it finds no compiled kernels, and where it keeps them. */
static void look_at_compiler(struct gpu_look *look) {
    struct epi_nvrtc *nvrtc = NULL;
    struct epi_jit_info jit;
    if (epi_nvrtc_open(&nvrtc, look->driver_version / 1000) == EP_OK) {
        snprintf(look->compiler, sizeof(look->compiler), "%s", epi_nvrtc_path(nvrtc));
        look->compiler_version = epi_nvrtc_version(nvrtc);
        epi_nvrtc_close(&nvrtc);
    } else {
        snprintf(look->compiler_why, sizeof(look->compiler_why), "%.400s", ep_last_error());
    }
    epi_jit_info(&jit);
    snprintf(look->cache_folder, sizeof(look->cache_folder), "%s", jit.cache_folder);
}

static int look_child(struct rank *rank, void *arg) {
    struct gpu_look *look = arg;
    (void)rank;
    look->num_present = count("/proc/driver/nvidia/gpus/*");
    if (look->num_present == 0) {
        look->num_present = count("/dev/nvidia[0-9]*");
    }
    if (epi_cu_open() != EP_OK) {
        snprintf(look->why, sizeof(look->why), "%.400s", ep_last_error());
        return 0;
    }
    look->driver_version = epi_cu_driver_version();
    look->num = epi_cu_num_devices() < GPU_MAX ? epi_cu_num_devices() : GPU_MAX;
    look_at_devices(look);
    look_at_compiler(look);
    bool any = false;
    for (int i = 0; i < look->num; i++) {
        any = any || look->device[i].why[0] == '\0';
    }
    if (!any) {
        snprintf(look->why, sizeof(look->why), "%s", look->device[0].why);
    }
    return 0;
}

const struct gpu_look *gpu_look(const char *name) {
    static struct gpu_look nothing = {.why = "no memory"};
    static struct gpu_look *look;
    if (!look && (look = ranks_memory(sizeof(*look)))) {
        struct ranks_job job = {.name = name,
                                .num_ranks = 1,
                                .quiet = true,
                                .timeout_s = LOOK_SECONDS,
                                .fn = look_child,
                                .arg = look};
        if (ranks_run(&job) != 0) {
            snprintf(look->why, sizeof(look->why),
                     "looking for GPUs failed, perhaps in the driver (%.400s)", job.why);
        }
    }
    return look ? look : &nothing;
}

int gpu_of_rank(const struct gpu_look *look, int rank) {
    return look->num > 0 ? rank % look->num : 0;
}

void gpu_describe(const struct gpu_look *look, int num, char *out, size_t room) {
    size_t len = 0;
    out[0] = '\0';
    for (int i = 0; i < num && len < room; i++) {
        const struct gpu_device *d = &look->device[i];
        int same = 0, before = 0;
        for (int j = 0; j < num; j++) {
            bool equal = strcmp(look->device[j].name, d->name) == 0;
            same += equal;
            before += equal && j < i;
        }
        if (before == 0) {
            len += (size_t)snprintf(out + len, room - len, "%s%d x %s (sm_%d%d, %d SMs)",
                                    len > 0 ? ", " : "", same, d->name, d->major, d->minor,
                                    d->num_sms);
        }
    }
}
