/* SPDX-License-Identifier: MIT */
/*
 * The lives of libep's objects in Python. A node is one of them, counted by whoever needs it; a
 * struct object is the Python object that made it. Owns the list of groups that the end of the
 * interpreter leaves. The lists are guarded by the GIL, the counts are atomic: memory that another
 * library holds comes back on any thread.
 *
 * Garbage collection and the end of the interpreter wait for no peer: what may take a while is then
 * destroyed by a thread of its own.
 */
#include "binding.h"

#include <pthread.h>
#include <string.h>
#include <time.h>

#define MOST_LEAVING_MS 250

static atomic_bool left;       /* the interpreter ends: Python is called no more */
static atomic_int num_leaving; /* threads that destroy something */
static struct object *groups;  /* and worlds */

bool epy_has_left(void) {
    return atomic_load(&left);
}

_Thread_local bool epy_on_stream;

/* ---- nodes -------------------------------------------------------------------------------- */

static struct node *new_node(enum node_kind kind, void *ptr, struct node *parent) {
    struct node *n = calloc(1, sizeof(*n));
    if (n) {
        n->kind = kind;
        n->ptr = ptr;
        n->parent = parent;
        atomic_init(&n->holders, 1);
        if (parent) {
            epy_hold(parent);
        }
    }
    return n;
}

void epy_hold(struct node *node) {
    atomic_fetch_add(&node->holders, 1);
}

static void destroy_ptr(enum node_kind kind, void *ptr) {
    switch (kind) {
    case NODE_WORLD:
        ep_world_destroy((ep_world **)&ptr);
        break;
    case NODE_GROUP:
        ep_group_destroy((ep_group **)&ptr);
        break;
    case NODE_HANDLE:
        ep_handle_destroy((ep_handle **)&ptr);
        break;
    case NODE_STREAM:
        ep_stream_destroy((ep_stream **)&ptr);
        break;
    case NODE_EVENT:
        ep_event_destroy((ep_event **)&ptr);
        break;
    }
}

/* Without the GIL, or with it where nothing waits. */
static void free_node(struct node *n) {
    struct node *parent = n->parent;
    destroy_ptr(n->kind, n->ptr);
    if (n->used && !atomic_load(&left)) {
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(n->used);
        PyGILState_Release(state);
    }
    free(n);
    if (parent) {
        epy_let_go(parent, true);
    }
}

static void *free_on_thread(void *n) {
    free_node(n);
    atomic_fetch_sub(&num_leaving, 1);
    return NULL;
}

void epy_let_go(struct node *n, bool wait) {
    if (atomic_fetch_sub(&n->holders, 1) != 1 || (atomic_load(&left) && !wait)) {
        return;
    }
    const bool takes_time = n->kind == NODE_GROUP || n->kind == NODE_STREAM;
    pthread_t thread;
    atomic_fetch_add(&num_leaving, 1);
    if (!wait && takes_time && !pthread_create(&thread, NULL, free_on_thread, n)) {
        pthread_detach(thread);
        return;
    }
    free_on_thread(n);
}

/* ---- objects ------------------------------------------------------------------------------ */

bool epy_is(PyObject *o, enum node_kind kind) {
    return PyObject_TypeCheck(o, epy_types[kind]);
}

bool epy_ready(struct object *o) {
    if (o->node && !atomic_load(&left)) {
        return true;
    }
    epy_set_error(EP_ERR_STATE, o->node ? "the interpreter is ending: its groups were left"
                                        : "the object was destroyed, or never made");
    return false;
}

static void unlink_object(struct object *o) {
    struct object **head = o->parent ? &o->parent->children : &groups;
    if (o->next) {
        o->next->prev = o->prev;
    }
    if (o->prev) {
        o->prev->next = o->next;
    } else if (*head == o) {
        *head = o->next;
    }
    o->next = o->prev = NULL;
}

/* What has no parent (worlds, and groups of processes) is in the list of all. */
int epy_adopt(struct object *o, enum node_kind kind, void *ptr, struct object *parent) {
    o->node = new_node(kind, ptr, parent ? parent->node : NULL);
    if (!o->node) {
        destroy_ptr(kind, ptr);
        PyErr_NoMemory();
        return -1;
    }
    struct object **head = parent ? &parent->children : &groups;
    Py_XINCREF((PyObject *)parent);
    o->parent = parent;
    o->device = parent ? parent->device : EP_DEVICE_HOST;
    o->next = *head;
    if (o->next) {
        o->next->prev = o;
    }
    *head = o;
    return 0;
}

static bool is_busy(const struct object *o) {
    bool busy = o->busy;
    for (const struct object *c = o->children; c && !busy; c = c->next) {
        busy = is_busy(c);
    }
    return busy;
}

/* Takes the nodes of an object and of all below it, those below first: as `num` more of `nodes`, or
 * counts them where that is NULL. */
static int take_nodes(struct object *o, struct node **nodes, int num) {
    for (struct object *c = o->children; c; c = c->next) {
        num = take_nodes(c, nodes, num);
    }
    if (nodes && o->node) {
        nodes[num] = o->node;
        o->node = NULL;
    }
    return num + 1;
}

static int give_up(struct object *o, bool wait) {
    const int most = take_nodes(o, NULL, 0);
    struct node **nodes = calloc((size_t)most, sizeof(*nodes));
    if (!nodes) {
        PyErr_NoMemory();
        return -1;
    }
    take_nodes(o, nodes, 0);
    PyThreadState *thread = PyEval_SaveThread();
    for (int i = 0; i < most; i++) {
        if (nodes[i]) {
            epy_let_go(nodes[i], wait);
        }
    }
    PyEval_RestoreThread(thread);
    free(nodes);
    return 0;
}

PyObject *epy_destroy(PyObject *self, PyObject *unused) {
    (void)unused;
    struct object *o = (struct object *)self;
    if (o->node && o->node->kind == NODE_WORLD && o->children) {
        for (struct object *c = o->children; c; c = c->next) {
            if (c->node) {
                return epy_set_error(EP_ERR_STATE,
                                     "World.destroy: groups that were made from it are alive");
            }
        }
    }
    if (is_busy(o)) {
        return epy_set_error(
            EP_ERR_STATE, "destroy: another thread is in a call of the object, or of one that "
                          "was made from it; for a group, abort() ends such calls");
    }
    if (o->node && give_up(o, !epy_on_stream)) {
        return NULL;
    }
    Py_RETURN_NONE;
}

void epy_dealloc(PyObject *self) {
    struct object *o = (struct object *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    unlink_object(o);
    if (o->node) {
        epy_let_go(o->node, false);
    }
    Py_XDECREF((PyObject *)o->parent);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

int epy_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT((PyObject *)((struct object *)self)->parent);
    return 0;
}

/* ---- what queued work uses ---------------------------------------------------------------- */

static void count_run(void *node) {
    atomic_fetch_add(&((struct node *)node)->num_run, 1);
}

void epy_forget_run(struct node *n) {
    const long long num = atomic_load(&n->num_run) - n->first_used;
    if (n->used && num > 0) {
        n->first_used += num;
        PyList_SetSlice(n->used, 0, (Py_ssize_t)num, NULL);
    }
}

int epy_keep_until_run(struct object *stream, PyObject *used) {
    struct node *n = stream->node;
    if (!n->used && !(n->used = PyList_New(0))) {
        return -1;
    }
    epy_forget_run(n);
    if (PyList_Append(n->used, used)) {
        return -1;
    }
    const ep_status st = ep_stream_run(n->ptr, count_run, n);
    if (st != EP_OK) {
        epy_raise(st, stream);
        return -1;
    }
    return 0;
}

/* ---- the end of the interpreter ------------------------------------------------------------ */

/* Tells the peers, which takes no time where all is well; else it goes on without that. */
PyObject *epy_leave(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    struct object *o = groups;
    while (o) { /* from the first again, for others may have changed the list meanwhile */
        const bool leaves = o->node && !is_busy(o) && !give_up(o, false);
        o = leaves ? groups : o->next;
    }
    const struct timespec moment = {0, 1000000};
    PyThreadState *thread = PyEval_SaveThread();
    for (int ms = 0; ms < MOST_LEAVING_MS && atomic_load(&num_leaving); ms++) {
        nanosleep(&moment, NULL);
    }
    PyEval_RestoreThread(thread);
    atomic_store(&left, true);
    Py_RETURN_NONE;
}
