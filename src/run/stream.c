/* SPDX-License-Identifier: MIT */
/*
 * Streams and events of host groups. A stream is a thread and a ring of tasks whose arguments are
 * copied in. The ring grows, because whoever queues must not wait for what is queued. An event is a
 * counter of records: it has passed when as many records have run as were queued. Must not know what
 * the tasks do.
 */
#include "src/run/run.h"

#include <string.h>

#define FIRST_LENGTH 64

struct task {
    epi_task_fn fn;
    _Alignas(16) unsigned char arg[EPI_TASK_BYTES];
};

struct ep_stream {
    uint32_t process; /* that made it, and has its thread */
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t more, less; /* a task was added; a task has ended */
    uint64_t added, ended;     /* tasks since create; the ring holds the difference */
    uint64_t reserved;         /* tasks that will be added and for which there is room */
    uint64_t length;           /* of the ring */
    struct task *ring;
    bool stop, frees_itself;
    ep_status error; /* of the first task that failed since the last sync */
    char error_text[EPI_ERROR_TEXT_BYTES];
};

struct ep_event {
    uint32_t process; /* that made it */
    pthread_mutex_t mutex;
    pthread_cond_t passed_more;
    uint64_t recorded, passed;
    const ep_stream *stream; /* of the newest record; only compared */
    int refs;                /* the owner's and one per queued record or wait */
};

/* Whose thread this is. */
static _Thread_local const ep_stream *running;

static void stream_free(ep_stream *s) {
    if (!epi_is_forked(s->process)) { /* else somebody may seem to be waiting still */
        pthread_cond_destroy(&s->more);
        pthread_cond_destroy(&s->less);
        pthread_mutex_destroy(&s->mutex);
    }
    epi_free(s->ring);
    epi_free(s);
}

static void *stream_main(void *arg) {
    ep_stream *s = arg;
    running = s;
    pthread_mutex_lock(&s->mutex);
    for (;;) {
        while (s->added == s->ended && !s->stop) {
            pthread_cond_wait(&s->more, &s->mutex);
        }
        if (s->added == s->ended) {
            break;
        }
        struct task t = s->ring[s->ended % s->length]; /* the ring may grow while it runs */
        pthread_mutex_unlock(&s->mutex);
        epi_clear_error();
        ep_status st = t.fn(t.arg);
        pthread_mutex_lock(&s->mutex);
        if (st < 0 && s->error == EP_OK) {
            s->error = st;
            epi_format(s->error_text, sizeof(s->error_text), "%s", epi_error_text());
        }
        s->ended++;
        pthread_cond_broadcast(&s->less);
    }
    const bool mine = s->frees_itself;
    pthread_mutex_unlock(&s->mutex);
    if (mine) {
        stream_free(s);
    }
    return NULL;
}

/* The mutex is held. */
static ep_status lengthen(ep_stream *s) {
    const uint64_t length = 2 * s->length;
    struct task *ring = epi_alloc_array(length, sizeof(*ring));
    if (!ring) {
        return epi_fail(EP_ERR_NOMEM,
                        "no memory to queue more on a stream that holds %llu tasks",
                        (unsigned long long)(s->added - s->ended));
    }
    for (uint64_t i = s->ended; i < s->added; i++) {
        ring[i % length] = s->ring[i % s->length];
    }
    epi_free(s->ring);
    s->ring = ring;
    s->length = length;
    return EP_OK;
}

ep_status epi_stream_reserve(ep_stream *s) {
    ep_status st = EP_OK;
    if (s) {
        EPI_NOT_FORKED("queueing", "stream", s->process);
        pthread_mutex_lock(&s->mutex);
        if (s->added - s->ended + s->reserved == s->length) {
            st = lengthen(s);
        }
        s->reserved += st == EP_OK;
        pthread_mutex_unlock(&s->mutex);
    }
    return st;
}

ep_status epi_stream_submit(ep_stream *s, epi_task_fn fn, const void *arg, size_t bytes) {
    if (bytes > EPI_TASK_BYTES) {
        return epi_fail(EP_ERR_INTERNAL, "task of %zu bytes", bytes);
    }
    if (!s) {
        _Alignas(16) unsigned char copy[EPI_TASK_BYTES];
        memcpy(copy, arg, bytes);
        return fn(copy);
    }
    pthread_mutex_lock(&s->mutex);
    struct task *t = &s->ring[s->added % s->length];
    t->fn = fn;
    memcpy(t->arg, arg, bytes);
    s->added++;
    s->reserved--;
    pthread_cond_signal(&s->more);
    pthread_mutex_unlock(&s->mutex);
    return EP_OK;
}

ep_status epi_stream_create(ep_stream **out) {
    ep_stream *s = epi_alloc(sizeof(*s));
    struct task *ring = epi_alloc_array(FIRST_LENGTH, sizeof(*ring));
    if (!s || !ring) {
        epi_free(ring);
        epi_free(s);
        return epi_fail(EP_ERR_NOMEM, "no memory for a stream (%zu bytes)",
                        sizeof(*s) + FIRST_LENGTH * sizeof(*ring));
    }
    s->process = epi_process();
    s->ring = ring;
    s->length = FIRST_LENGTH;
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->more, NULL);
    pthread_cond_init(&s->less, NULL);
    int err = epi_thread_start(&s->thread, stream_main, s, "ep-stream");
    if (err) {
        stream_free(s);
        return epi_fail(EP_ERR_NOMEM, "cannot start a stream's thread: %s", strerror(err));
    }
    *out = s;
    return EP_OK;
}

void ep_stream_destroy(ep_stream **stream) {
    ep_stream *s = stream ? *stream : NULL;
    if (!s) {
        return;
    }
    *stream = NULL;
    if (epi_is_forked(s->process)) {
        stream_free(s);
        return;
    }
    const bool own = running == s; /* a function that it runs cannot wait for its end */
    if (own) {
        pthread_detach(s->thread);
    }
    const pthread_t thread = s->thread;
    pthread_mutex_lock(&s->mutex);
    s->stop = true;
    s->frees_itself = own;
    pthread_cond_signal(&s->more);
    pthread_mutex_unlock(&s->mutex);
    if (!own) {
        pthread_join(thread, NULL);
        stream_free(s);
    }
}

ep_status ep_stream_sync(ep_stream *stream) {
    EPI_NOT_NULL("ep_stream_sync", stream);
    EPI_NOT_FORKED("ep_stream_sync", "stream", stream->process);
    if (running == stream) {
        return epi_fail(EP_ERR_STATE,
                        "ep_stream_sync: called by a function that this stream runs, "
                        "which would wait for itself");
    }
    pthread_mutex_lock(&stream->mutex);
    uint64_t until = stream->added;
    while (stream->ended < until) {
        pthread_cond_wait(&stream->less,
                          &stream->mutex); /* tasks end: their waits have deadlines */
    }
    ep_status st = stream->error;
    if (st != EP_OK) {
        epi_fail(st, "%s", stream->error_text);
        stream->error = EP_OK;
    }
    pthread_mutex_unlock(&stream->mutex);
    return st;
}

struct call {
    void (*fn)(void *);
    void *arg;
};

static ep_status run_call(void *arg) {
    struct call *c = arg;
    c->fn(c->arg);
    return EP_OK;
}

ep_status ep_stream_run(ep_stream *stream, void (*fn)(void *), void *arg) {
    EPI_NOT_NULL("ep_stream_run", stream);
    EPI_NOT_NULL("ep_stream_run", fn);
    EPI_NOT_FORKED("ep_stream_run", "stream", stream->process);
    struct call c = {fn, arg};
    EPI_TRY(epi_stream_reserve(stream));
    return epi_stream_submit(stream, run_call, &c, sizeof(c));
}

/* ---- events --------------------------------------------------------------------------------- */

ep_status epi_event_create(ep_event **out) {
    ep_event *e = epi_alloc(sizeof(*e));
    if (!e) {
        return epi_fail(EP_ERR_NOMEM, "no memory for an event");
    }
    pthread_mutex_init(&e->mutex, NULL);
    pthread_cond_init(&e->passed_more, NULL);
    e->process = epi_process();
    e->refs = 1;
    *out = e;
    return EP_OK;
}

static void event_release(ep_event *e) {
    pthread_mutex_lock(&e->mutex);
    int refs = --e->refs;
    pthread_mutex_unlock(&e->mutex);
    if (refs == 0) {
        pthread_cond_destroy(&e->passed_more);
        pthread_mutex_destroy(&e->mutex);
        epi_free(e);
    }
}

void ep_event_destroy(ep_event **event) {
    if (event && *event) {
        if (epi_is_forked((*event)->process)) {
            epi_free(*event);
        } else {
            event_release(*event);
        }
        *event = NULL;
    }
}

struct mark {
    ep_event *event;
    uint64_t number;
};

static ep_status run_record(void *arg) {
    struct mark *m = arg;
    pthread_mutex_lock(&m->event->mutex);
    if (m->event->passed < m->number) {
        m->event->passed = m->number;
    }
    pthread_cond_broadcast(&m->event->passed_more);
    pthread_mutex_unlock(&m->event->mutex);
    event_release(m->event);
    return EP_OK;
}

static void await_mark(ep_event *e, uint64_t number) {
    pthread_mutex_lock(&e->mutex);
    while (e->passed < number) {
        pthread_cond_wait(&e->passed_more, &e->mutex);
    }
    pthread_mutex_unlock(&e->mutex);
}

static ep_status run_wait(void *arg) {
    struct mark *m = arg;
    await_mark(m->event, m->number);
    event_release(m->event);
    return EP_OK;
}

/* Queues fn for the newest record of the event, which is counted here if it is `new`. */
static ep_status submit_mark(ep_stream *stream, epi_task_fn fn, ep_event *event, bool new) {
    EPI_TRY(epi_stream_reserve(stream));
    pthread_mutex_lock(&event->mutex);
    event->recorded += new;
    event->stream = new ? stream : event->stream;
    struct mark m = {event, event->recorded};
    event->refs++;
    pthread_mutex_unlock(&event->mutex);
    return epi_stream_submit(stream, fn, &m, sizeof(m));
}

ep_status ep_event_record(ep_event *event, ep_stream *stream) {
    EPI_NOT_NULL("ep_event_record", event);
    EPI_NOT_NULL("ep_event_record", stream);
    EPI_NOT_FORKED("ep_event_record", "event", event->process);
    EPI_NOT_FORKED("ep_event_record", "stream", stream->process);
    return submit_mark(stream, run_record, event, true);
}

ep_status ep_stream_wait(ep_stream *stream, ep_event *event) {
    EPI_NOT_NULL("ep_stream_wait", event);
    EPI_NOT_NULL("ep_stream_wait", stream);
    EPI_NOT_FORKED("ep_stream_wait", "event", event->process);
    EPI_NOT_FORKED("ep_stream_wait", "stream", stream->process);
    return submit_mark(stream, run_wait, event, false);
}

ep_status ep_event_query(ep_event *event) {
    EPI_NOT_NULL("ep_event_query", event);
    EPI_NOT_FORKED("ep_event_query", "event", event->process);
    pthread_mutex_lock(&event->mutex);
    ep_status st = event->passed >= event->recorded ? EP_OK : EP_AGAIN;
    pthread_mutex_unlock(&event->mutex);
    return st;
}

ep_status ep_event_sync(ep_event *event) {
    EPI_NOT_NULL("ep_event_sync", event);
    EPI_NOT_FORKED("ep_event_sync", "event", event->process);
    pthread_mutex_lock(&event->mutex);
    uint64_t number = event->recorded;
    const bool is_later = running && running == event->stream && event->passed < number;
    pthread_mutex_unlock(&event->mutex);
    if (is_later) {
        return epi_fail(EP_ERR_STATE,
                        "ep_event_sync: called by a function of the stream on which "
                        "the event lies, before it: it would wait for itself");
    }
    await_mark(event, number);
    return EP_OK;
}
