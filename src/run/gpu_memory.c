/* SPDX-License-Identifier: MIT */
/*
 * What the ranks of a process have of one device's memory: a pool, and pinned chunks of host memory
 * for what kernels tell. Both belong to the process and are never destroyed, because that would
 * wait for every stream of the device and stop everybody's launches; chunks are kept for the next
 * to ask, and the pool gives its memory back when the last rank has gone. Any thread.
 */
#include "src/run/gpu_memory.h"

#include <string.h>

/* Of one device; all under the mutex. */
struct epi_gpu_memory {
    struct epi_cu_device device; /* open for good */
    void *pool;
    int users;
    void *chunk; /* those that are free; each begins with the address of the next */
    struct epi_gpu_memory *next;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct epi_gpu_memory *all;

static ep_status add_memory(int device) {
    struct epi_gpu_memory *m = epi_alloc(sizeof(*m));
    if (!m) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a device");
    }
    ep_status st = epi_cu_device_open(&m->device, device);
    if (st == EP_OK) {
        st = epi_cu_pool_create(&m->device, &m->pool);
    }
    if (st != EP_OK) {
        epi_cu_device_close(&m->device);
        epi_free(m);
        return st;
    }
    m->next = all;
    all = m;
    return EP_OK;
}

static struct epi_gpu_memory *find_memory(int device) {
    struct epi_gpu_memory *m = all;
    while (m && m->device.index != device) {
        m = m->next;
    }
    return m;
}

ep_status epi_gpu_memory_open(struct epi_gpu_memory **out, int device) {
    ep_status st = EP_OK;
    pthread_mutex_lock(&mutex);
    if (!find_memory(device)) {
        st = add_memory(device);
    }
    if (st == EP_OK) {
        *out = find_memory(device);
        (*out)->users++;
    }
    pthread_mutex_unlock(&mutex);
    return st;
}

void epi_gpu_memory_close(struct epi_gpu_memory **memory) {
    struct epi_gpu_memory *m = *memory;
    *memory = NULL;
    if (m) {
        pthread_mutex_lock(&mutex);
        if (--m->users == 0) {
            epi_cu_pool_trim(&m->device, m->pool);
        }
        pthread_mutex_unlock(&mutex);
    }
}

void *epi_gpu_memory_pool(const struct epi_gpu_memory *m) {
    return m->pool;
}

ep_status epi_gpu_memory_take(struct epi_gpu_memory *m, void **chunk) {
    pthread_mutex_lock(&mutex);
    void *got = m->chunk;
    if (got) {
        memcpy(&m->chunk, got, sizeof(m->chunk));
    }
    pthread_mutex_unlock(&mutex);
    if (!got) {
        EPI_TRY(epi_cu_alloc_host(&m->device, &got, EPI_GPU_CHUNK_BYTES));
    }
    memset(got, 0, EPI_GPU_CHUNK_BYTES);
    *chunk = got;
    return EP_OK;
}

void epi_gpu_memory_give(struct epi_gpu_memory *m, void *chunk) {
    pthread_mutex_lock(&mutex);
    memcpy(chunk, &m->chunk, sizeof(m->chunk));
    m->chunk = chunk;
    pthread_mutex_unlock(&mutex);
}
