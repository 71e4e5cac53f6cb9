/* SPDX-License-Identifier: MIT */
/*
 * Divides the SMs of a device among the ranks and groups of a process. Kernels of different ranks
 * wait for each other: if those of one group had all SMs of one device, and those of another all of
 * the next, both would wait for blocks that cannot begin. So what the live groups of a process may
 * take of a device at once is no more than it has. Owns the sums of what is promised; run by the
 * threads that create and destroy groups. Other processes are not seen: their kernels take turns
 * with ours.
 */
#include "src/ep/cuda_sms.h"

#include <string.h>
#include <unistd.h>

#include "src/cu/cu.h"

#define MAX_DEVICES 128

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int promised[MAX_DEVICES]; /* SMs of each device, to live groups; guarded by the mutex */

/* What each rank tells the others. */
struct seat {
    uint8_t uuid[16];
    int64_t process;
    int32_t asked; /* num_workers */
    int32_t taken; /* of its device, by other groups of its process */
};

/* Differs between processes, also of different containers. */
static int64_t process_id(void) {
    static _Atomic int64_t id;
    int64_t none = 0;
    atomic_compare_exchange_strong(&id, &none, epi_now_ns() ^ ((int64_t)getpid() << 40));
    return atomic_load(&id);
}

/* What a group wants that leaves it to the library: the formula's most, for rows of its size; in
 * low-latency mode all, as a row is not to wait for another. It is given
 * no more than half of what other groups have left, in low-latency mode two thirds, so that another
 * always finds some. */
static int wanted_sms(const ep_group *g, const struct epi_cu_device *d, bool nvlink) {
    const struct epi_load load = {g->config.max_row_bytes, g->config.max_topk, true, false};
    return g->config.ll_max_tokens ? d->num_sms
                                   : epi_sms_for(d->major, nvlink, g->num_ranks, &load).all;
}

/* Ranks of this process on this device. */
struct sharing {
    int ranks;
    int asked, num_asked; /* num_workers of those that say it */
    int taken, others;    /* by other groups; ranks on other devices */
};

static struct sharing count_sharing(const struct seat *all, int num, const struct seat *mine) {
    struct sharing s = {0};
    for (int r = 0; r < num; r++) {
        const bool here = memcmp(all[r].uuid, mine->uuid, sizeof(mine->uuid)) == 0;
        s.others += !here;
        if (here && all[r].process == mine->process) {
            s.ranks++;
            s.asked += all[r].asked;
            s.num_asked += all[r].asked > 0;
            s.taken = all[r].taken > s.taken ? all[r].taken : s.taken;
        }
    }
    return s;
}

static int one_at_least(int n) {
    return n < 1 ? 1 : n;
}

/* All ranks of the process on the device come to the same. */
static ep_status divide_sms(struct epi_cuda_sms *out, const ep_group *g,
                            const struct epi_cu_device *d, const struct sharing *s, int asked) {
    const int share = s->ranks > 1 ? d->num_sms / s->ranks / 2 : d->num_sms;
    const int most = one_at_least(share < K_MAX_BLOCKS ? share : K_MAX_BLOCKS);
    const int rest = d->num_sms - s->taken - s->asked, num_rest = s->ranks - s->num_asked;
    if (asked > most) {
        return epi_fail(
            EP_ERR_ARG,
            "ep_group_config.num_workers is %d, must be at most %d: device %d has %d "
            "SMs for %d rank(s) of this process",
            asked, most, d->index, d->num_sms, s->ranks);
    }
    if (rest < num_rest) {
        return epi_fail(EP_ERR_ARG,
                        "device %d has %d SMs, %d of them are promised to other groups of this "
                        "process, and this group's %d rank(s) on it ask for %d: lower "
                        "ep_group_config.num_workers, of the other groups too",
                        d->index, d->num_sms, s->taken, s->ranks, s->asked + num_rest);
    }
    const bool ll = g->config.ll_max_tokens > 0;
    out->local = most;
    out->promised = asked;
    if (!asked) {
        const int each = rest / num_rest, fair = one_at_least(ll ? 2 * each / 3 : each / 2),
                  want = wanted_sms(g, d, out->nvlink);
        out->promised = most < fair ? most : fair;
        out->promised = want < out->promised ? want : out->promised;
    }
    return EP_OK;
}

static int sms_taken(int device) {
    pthread_mutex_lock(&mutex);
    const int taken = promised[device];
    pthread_mutex_unlock(&mutex);
    return taken;
}

static ep_status take_sms(struct epi_cuda_sms *s, const struct epi_cu_device *d) {
    const int wanted_now = s->promised;
    pthread_mutex_lock(&mutex);
    const int taken = promised[s->device];
    const bool fits = taken + wanted_now <= d->num_sms;
    promised[s->device] += fits ? wanted_now : 0;
    pthread_mutex_unlock(&mutex);
    if (!fits) {
        s->promised = 0;
        return epi_fail(
            EP_ERR_ARG,
            "device %d has %d SMs, and another group of this process, created at the "
            "same time, was promised what this one needs: create them one after the "
            "other, or lower ep_group_config.num_workers",
            d->index, d->num_sms);
    }
    return EP_OK;
}

ep_status epi_cuda_sms_promise(struct epi_cuda_sms *out, const ep_group *g,
                               const struct epi_cu_device *d, const struct epi_exchange *x) {
    struct seat mine, *all = epi_alloc_array((size_t)g->num_ranks, sizeof(*all));
    ep_status st = EP_OK;
    memset(&mine, 0, sizeof(mine));
    memcpy(mine.uuid, d->uuid, sizeof(mine.uuid));
    mine.process = process_id();
    mine.asked = g->config.num_workers;
    if (!all) {
        st = epi_fail(EP_ERR_NOMEM, "no memory to compare %d ranks", g->num_ranks);
    } else if (d->index >= MAX_DEVICES) {
        st = epi_fail(EP_ERR_UNSUPPORTED, "device %d: a process can use the first %d", d->index,
                      MAX_DEVICES);
    } else {
        mine.taken = sms_taken(d->index);
    }
    st = epi_agree(x, st, "dividing the SMs");
    if (st == EP_OK) {
        st = x->allgather(x->ctx, &mine, sizeof(mine), all);
    }
    if (st == EP_OK) {
        const struct sharing s = count_sharing(all, g->num_ranks, &mine);
        *out = (struct epi_cuda_sms){.device = d->index,
                                     .nvlink = s.others == 0 || epi_mem_on_device(g->mem)};
        st = divide_sms(out, g, d, &s, mine.asked);
        st = st == EP_OK ? take_sms(out, d) : st;
    }
    epi_free(all);
    return st;
}

void epi_cuda_sms_give_back(struct epi_cuda_sms *s) {
    pthread_mutex_lock(&mutex);
    promised[s->device] -= s->promised;
    pthread_mutex_unlock(&mutex);
    s->promised = 0;
}
