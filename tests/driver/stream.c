/* SPDX-License-Identifier: MIT */
/*
 * The driver's streams and events: a stream is a thread with a queue, an event a counter of
 * records; a capture is invalid from its beginning. Functions are called from any thread; what is
 * queued runs on its stream's. Must not know what the operations do.
 */
#include "tests/driver/driver.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#define POLL_US 20
#define CAPTURE_INVALIDATED 2
#define CU_CAPTURE_INVALIDATED 901

struct event {
    atomic_ullong recorded, passed;
    atomic_int users; /* the program, until it destroys it, and what is queued */
};

struct stream {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct op *first, **last;
    uint64_t added, ended;
    bool stop;
    atomic_bool captured;
    struct crew crew; /* of launches on this stream, one at a time */
};

static struct stream legacy;
static pthread_once_t legacy_once = PTHREAD_ONCE_INIT;

static void *stream_main(void *arg) {
    struct stream *s = arg;
    pthread_mutex_lock(&s->mutex);
    for (;;) {
        while (!s->first && !s->stop) {
            pthread_cond_wait(&s->changed, &s->mutex);
        }
        struct op *op = s->first;
        if (!op) {
            break;
        }
        s->first = op->next;
        s->last = s->first ? s->last : &s->first;
        pthread_mutex_unlock(&s->mutex);
        op->crew = &s->crew;
        op->run(op);
        free(op);
        pthread_mutex_lock(&s->mutex);
        s->ended++;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->mutex);
    return NULL;
}

static void stream_start(struct stream *s) {
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    s->last = &s->first;
    if (pthread_create(&s->thread, NULL, stream_main, s) != 0) {
        abort();
    }
}

static void legacy_start(void) {
    stream_start(&legacy);
}

static struct stream *stream_of(void *stream) {
    if (!stream) {
        pthread_once(&legacy_once, legacy_start);
        return &legacy;
    }
    return stream;
}

struct op *driver_op(void (*run)(struct op *op)) {
    struct op *op = calloc(1, sizeof(*op));
    if (!op) {
        abort();
    }
    op->run = run;
    return op;
}

int driver_queue(void *stream, struct op *op) {
    struct stream *s = stream_of(stream);
    pthread_mutex_lock(&s->mutex);
    *s->last = op;
    s->last = &op->next;
    s->added++;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    return 0;
}

DEFINE(cuStreamCreate, void **stream, unsigned flags) {
    struct stream *s = calloc(1, sizeof(*s));
    (void)flags;
    if (!s) {
        return CU_OUT_OF_MEMORY;
    }
    stream_start(s);
    *stream = s;
    return 0;
}
DEFINE(cuStreamCreateWithPriority, void **stream, unsigned flags, int priority) {
    (void)priority;
    return cuStreamCreate(stream, flags);
}
DEFINE(cuStreamDestroy_v2, void *stream) {
    struct stream *s = stream;
    pthread_mutex_lock(&s->mutex);
    s->stop = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    pthread_join(s->thread, NULL);
    driver_dismiss(&s->crew);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->mutex);
    free(s);
    return 0;
}
DEFINE(cuStreamSynchronize, void *stream) {
    struct stream *s = stream_of(stream);
    pthread_mutex_lock(&s->mutex);
    const uint64_t until = s->added;
    while (s->ended < until) {
        pthread_cond_wait(&s->changed, &s->mutex);
    }
    pthread_mutex_unlock(&s->mutex);
    return 0;
}
DEFINE(cuStreamGetCaptureInfo_v2, void *stream, int *status, uint64_t *id, void **graph,
       const void **dependencies, size_t *num) {
    (void)id, (void)graph, (void)dependencies, (void)num;
    *status = atomic_load(&stream_of(stream)->captured) ? CAPTURE_INVALIDATED : 0;
    return 0;
}
DEFINE(cuStreamBeginCapture_v2, void *stream, int mode) {
    (void)mode;
    atomic_store(&stream_of(stream)->captured, true);
    return 0;
}
DEFINE(cuStreamEndCapture, void *stream, void **graph) {
    *graph = NULL;
    atomic_store(&stream_of(stream)->captured, false);
    return CU_CAPTURE_INVALIDATED;
}

static void event_drop(struct event *e) {
    if (atomic_fetch_sub(&e->users, 1) == 1) {
        free(e);
    }
}
static void run_record(struct op *op) {
    struct event *e = op->to;
    atomic_store(&e->passed, op->value);
    event_drop(e);
}
static void run_wait(struct op *op) {
    struct event *e = op->to;
    while (atomic_load(&e->passed) < op->value) {
        usleep(POLL_US);
    }
    event_drop(e);
}
static void run_hold(struct op *op) {
    while (atomic_load((_Atomic uint32_t *)op->to) < op->value) {
        usleep(POLL_US);
    }
}
DEFINE(cuEventCreate, void **event, unsigned flags) {
    (void)flags;
    struct event *e = calloc(1, sizeof(*e));
    if (e) {
        atomic_store(&e->users, 1);
    }
    *event = e;
    return e ? 0 : CU_OUT_OF_MEMORY;
}
DEFINE(cuEventDestroy_v2, void *event) {
    event_drop(event);
    return 0;
}
DEFINE(cuEventRecord, void *event, void *stream) {
    struct event *e = event;
    struct op *op = driver_op(run_record);
    op->to = e;
    op->value = atomic_fetch_add(&e->recorded, 1) + 1;
    atomic_fetch_add(&e->users, 1);
    return driver_queue(stream, op);
}
DEFINE(cuEventQuery, void *event) {
    struct event *e = event;
    return atomic_load(&e->passed) >= atomic_load(&e->recorded) ? 0 : CU_NOT_READY;
}
DEFINE(cuEventElapsedTime, float *ms, void *a, void *b) {
    (void)a, (void)b;
    *ms = 0;
    return 0;
}
DEFINE(cuStreamWaitEvent, void *stream, void *event, unsigned flags) {
    struct event *e = event;
    struct op *op = driver_op(run_wait);
    (void)flags;
    op->to = e;
    op->value = atomic_load(&e->recorded);
    atomic_fetch_add(&e->users, 1);
    return driver_queue(stream, op);
}
DEFINE(cuStreamWaitValue32_v2, void *stream, uint64_t at, uint32_t value, unsigned flags) {
    struct op *op = driver_op(run_hold);
    (void)flags;
    op->to = (void *)(uintptr_t)at;
    op->value = value;
    return driver_queue(stream, op);
}
