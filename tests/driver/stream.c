/* SPDX-License-Identifier: MIT */
/*
 * The driver's streams and events: a stream is a thread with a queue, an event holds its last
 * record. What is queued on a captured stream goes to its capture, which graph.c has. Functions
 * are called from any thread; what is queued runs on its stream's. Must not know what the
 * operations do.
 *
 * Destroying a stream does not wait for its work, and the next stream that is created gets the same
 * handle. Handle 2 is another stream in every thread; 0 and 1 are the legacy default stream.
 */
#include "tests/driver/driver.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define POLL_US 20

/* What one cuEventRecord has queued, and what waits for it whatever the event records afterwards. */
struct record {
    atomic_int users; /* the event while it is its last, and what is queued */
    atomic_bool passed;
    atomic_llong passed_ns;
};

struct event {
    pthread_mutex_t mutex;     /* guards `last` */
    struct record *last;       /* NULL: none yet */
    atomic_bool captured;      /* it stands for ... */
    struct driver_point point; /* ... rather than for what a stream does */
};

struct queue {
    int device; /* -1: of all */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct op *first, **last;
    uint64_t added, ended;
    bool stop;
    uint64_t capture;
    struct crew crew;   /* of launches on this stream, one at a time */
    struct queue *next; /* of all that have a thread */
};

/* What a program holds. */
struct stream {
    struct queue *queue;
    struct stream *next; /* of those that can be given out again */
};

#define LEGACY ((void *)1)
#define PER_THREAD ((void *)2)

static struct queue *legacy;
static pthread_once_t legacy_once = PTHREAD_ONCE_INIT;
static _Thread_local struct queue *of_thread;
static pthread_mutex_t list_mutex = PTHREAD_MUTEX_INITIALIZER; /* guards the next two */
static struct queue *queues;
static struct stream *handles;
/* Calls under way that stop all work of a device. Where there are none no lock is taken, which
 * would order threads that a driver does not order. */
static atomic_int num_blocking;

static void queue_end(struct queue *s) {
    pthread_mutex_lock(&list_mutex);
    struct queue **at = &queues;
    while (*at != s) {
        at = &(*at)->next;
    }
    *at = s->next;
    pthread_mutex_unlock(&list_mutex);
    driver_dismiss(&s->crew);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->mutex);
    free(s);
}

static void *queue_main(void *arg) {
    struct queue *s = arg;
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
    queue_end(s);
    return NULL;
}

static struct queue *queue_start(int device) {
    pthread_t thread;
    struct queue *s = calloc(1, sizeof(*s));
    if (!s) {
        abort();
    }
    s->device = device;
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    s->last = &s->first;
    pthread_mutex_lock(&list_mutex);
    s->next = queues;
    queues = s;
    pthread_mutex_unlock(&list_mutex);
    if (pthread_create(&thread, NULL, queue_main, s) != 0) {
        abort();
    }
    pthread_setname_np(thread, "driver-stream");
    pthread_detach(thread);
    return s;
}

static void legacy_start(void) {
    legacy = queue_start(-1);
}

bool driver_is_legacy(const void *stream) {
    return !stream || stream == LEGACY;
}

static struct queue *queue_of(void *stream) {
    if (driver_is_legacy(stream)) {
        pthread_once(&legacy_once, legacy_start);
        return legacy;
    }
    if (stream == PER_THREAD) {
        of_thread = of_thread ? of_thread : queue_start(-1);
        return of_thread;
    }
    return ((struct stream *)stream)->queue;
}

const void *driver_stream(void *stream) {
    return queue_of(stream);
}

static bool is_busy(struct queue *s, int device) {
    pthread_mutex_lock(&s->mutex);
    const bool busy = (s->device < 0 || s->device == device) && s->ended < s->added;
    pthread_mutex_unlock(&s->mutex);
    return busy;
}

static bool any_busy(int device) {
    bool busy = false;
    pthread_mutex_lock(&list_mutex);
    for (struct queue *s = queues; s && !busy; s = s->next) {
        busy = is_busy(s, device);
    }
    pthread_mutex_unlock(&list_mutex);
    return busy;
}

void driver_stop_all(void) {
    const int device = driver_device();
    atomic_fetch_add_explicit(&num_blocking, 1, memory_order_relaxed);
    while (any_busy(device)) {
        usleep(POLL_US);
    }
    atomic_fetch_sub_explicit(&num_blocking, 1, memory_order_relaxed);
}

struct op *driver_op(void (*run)(struct op *op)) {
    struct op *op = calloc(1, sizeof(*op));
    if (!op) {
        abort();
    }
    op->run = run;
    return op;
}

uint64_t *driver_capture_of(void *stream) {
    return &queue_of(stream)->capture;
}

bool driver_is_captured(void *stream) {
    return driver_capture_open(*driver_capture_of(stream));
}

int driver_queue(void *stream, struct op *op) {
    struct queue *s = queue_of(stream);
    if (driver_capture_add(stream, op)) {
        return 0;
    }
    while (atomic_load_explicit(&num_blocking, memory_order_relaxed) > 0) {
        usleep(POLL_US);
    }
    pthread_mutex_lock(&s->mutex);
    *s->last = op;
    s->last = &op->next;
    s->added++;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    return 0;
}

DEFINE(cuStreamCreate, void **stream, unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&list_mutex);
    struct stream *h = handles;
    handles = h ? h->next : NULL;
    pthread_mutex_unlock(&list_mutex);
    h = h ? h : calloc(1, sizeof(*h));
    if (!h) {
        return CU_OUT_OF_MEMORY;
    }
    h->queue = queue_start(driver_device());
    *stream = h;
    return 0;
}
DEFINE(cuStreamCreateWithPriority, void **stream, unsigned flags, int priority) {
    (void)priority;
    return cuStreamCreate(stream, flags);
}
DEFINE(cuStreamDestroy_v2, void *stream) {
    struct stream *h = stream;
    struct queue *s = h->queue;
    pthread_mutex_lock(&s->mutex);
    s->stop = true; /* its thread goes on to the end of the queue, and frees it */
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
    pthread_mutex_lock(&list_mutex);
    h->next = handles;
    handles = h;
    pthread_mutex_unlock(&list_mutex);
    return 0;
}
DEFINE(cuStreamSynchronize, void *stream) {
    struct queue *s = queue_of(stream);
    const int unsafe = driver_capture_spoil(s->capture) ? CAPTURE_UNSUPPORTED : driver_unsafe();
    if (unsafe) {
        return unsafe;
    }
    pthread_mutex_lock(&s->mutex);
    const uint64_t until = s->added;
    while (s->ended < until) {
        pthread_cond_wait(&s->changed, &s->mutex);
    }
    pthread_mutex_unlock(&s->mutex);
    return 0;
}

/* ---- events --------------------------------------------------------------------------------- */

static void record_drop(struct record *r) {
    if (r && atomic_fetch_sub(&r->users, 1) == 1) {
        free(r);
    }
}
/* The event's last record, which the caller drops; NULL where there is none. */
static struct record *record_of(struct event *e) {
    pthread_mutex_lock(&e->mutex);
    struct record *r = e->last;
    if (r) {
        atomic_fetch_add(&r->users, 1);
    }
    pthread_mutex_unlock(&e->mutex);
    return r;
}
static void run_record(struct op *op) {
    struct record *r = op->to;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    atomic_store(&r->passed_ns, now.tv_sec * 1000000000ll + now.tv_nsec);
    atomic_store(&r->passed, true);
    record_drop(r);
}
static void run_wait(struct op *op) {
    struct record *r = op->to;
    while (!atomic_load(&r->passed)) {
        usleep(POLL_US);
    }
    record_drop(r);
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
        pthread_mutex_init(&e->mutex, NULL);
    }
    *event = e;
    return e ? 0 : CU_OUT_OF_MEMORY;
}
DEFINE(cuEventDestroy_v2, void *event) {
    struct event *e = event;
    record_drop(e->last);
    pthread_mutex_destroy(&e->mutex);
    free(e);
    return 0;
}
/* A capture keeps the order in which operations came: it needs nothing for its own events. */
DEFINE(cuEventRecord, void *event, void *stream) {
    struct event *e = event;
    const bool captured = driver_is_captured(stream);
    if (captured) {
        e->point = driver_capture_point(stream);
    }
    atomic_store(&e->captured, captured);
    if (captured) {
        return 0;
    }
    struct record *r = calloc(1, sizeof(*r)), *before;
    if (!r) {
        return CU_OUT_OF_MEMORY;
    }
    atomic_store(&r->users, 2);
    struct op *op = driver_op(run_record);
    op->to = r;
    pthread_mutex_lock(&e->mutex);
    before = e->last;
    e->last = r;
    pthread_mutex_unlock(&e->mutex);
    record_drop(before);
    return driver_queue(stream, op);
}
DEFINE(cuEventQuery, void *event) {
    struct event *e = event;
    const int unsafe = driver_unsafe();
    if (unsafe || atomic_load(&e->captured)) {
        return unsafe ? unsafe : CAPTURED_EVENT;
    }
    struct record *r = record_of(e);
    const bool passed = !r || atomic_load(&r->passed);
    record_drop(r);
    return passed ? 0 : CU_NOT_READY;
}
DEFINE(cuEventElapsedTime, float *ms, void *a, void *b) {
    struct event *from = a, *to = b;
    if (atomic_load(&from->captured) || atomic_load(&to->captured)) {
        return CAPTURED_EVENT;
    }
    struct record *r[2] = {record_of(from), record_of(to)};
    const bool passed =
        r[0] && r[1] && atomic_load(&r[0]->passed) && atomic_load(&r[1]->passed);
    if (passed) {
        *ms = (float)((double)(atomic_load(&r[1]->passed_ns) - atomic_load(&r[0]->passed_ns)) /
                      1e6);
    }
    record_drop(r[0]);
    record_drop(r[1]);
    return passed ? 0 : CU_NOT_READY;
}
DEFINE(cuStreamWaitEvent, void *stream, void *event, unsigned flags) {
    struct event *e = event;
    (void)flags;
    if (atomic_load(&e->captured)) {
        return driver_capture_join(stream, &e->point);
    }
    struct record *r = record_of(e);
    if (driver_is_captured(stream) || !r) {
        record_drop(r);
        return r ? CAPTURE_ISOLATION : 0;
    }
    struct op *op = driver_op(run_wait);
    op->to = r;
    return driver_queue(stream, op);
}
DEFINE(cuStreamWaitValue32_v2, void *stream, uint64_t at, uint32_t value, unsigned flags) {
    struct op *op = driver_op(run_hold);
    (void)flags;
    op->to = (void *)(uintptr_t)at;
    op->value = value;
    return driver_queue(stream, op);
}
