/* SPDX-License-Identifier: MIT */
/*
 * The module ep._ep: its types, what of them the tables do not make, and its functions. Owns the
 * types. Importing it opens nothing, starts nothing and looks for no device.
 */
#include "binding.h"

#include <string.h>

/* The tables are tables of this module alone. */
#include "bindings.h"

struct record *const epy_fault_record = &record_ep_fault;
struct record *const epy_needs_record = &record_ep_needs;

/* ---- groups and handles ------------------------------------------------------------------- */

/* ep_allgather_fn over a callable. */
struct gathering {
    PyObject *function;
    int num_ranks;
    PyThreadState
        *thread; /* of the thread that creates the group, which calls it without the GIL */
};
static int gather(const struct gathering *g, const void *in, char *out, size_t bytes) {
    PyObject *all =
        PyObject_CallFunction(g->function, "y#", (const char *)in, (Py_ssize_t)bytes);
    const Py_ssize_t n = all ? PySequence_Size(all) : -1;
    if (n >= 0 && n != g->num_ranks) {
        PyErr_Format(PyExc_ValueError, "allgather: returned %zd items for %d ranks", n,
                     g->num_ranks);
    }
    for (int i = 0; i < g->num_ranks && !PyErr_Occurred(); i++) {
        PyObject *item = PySequence_GetItem(all, i);
        char *data = NULL;
        Py_ssize_t length = 0;
        if (item && !PyBytes_AsStringAndSize(item, &data, &length)) {
            if ((size_t)length == bytes) {
                memcpy(out + (size_t)i * bytes, data, bytes);
            } else {
                PyErr_Format(PyExc_ValueError,
                             "allgather: item %d has %zd bytes and not the %zu that were given",
                             i, length, bytes);
            }
        }
        Py_XDECREF(item);
    }
    Py_XDECREF(all);
    return PyErr_Occurred() ? -1 : 0;
}

static int gather_with_gil(void *context, const void *in, void *out, size_t bytes) {
    struct gathering *g = context;
    PyEval_RestoreThread(g->thread);
    const int told = gather(g, in, out, bytes);
    g->thread = PyEval_SaveThread();
    return told;
}

static int init_group(PyObject *self, PyObject *args, PyObject *kwargs) {
    struct object *o = (struct object *)self;
    struct frame f;
    memset(&f, 0, sizeof(f));
    f.name = "Group";
    memcpy(f.records[0], &init_ep_group_config, sizeof(init_ep_group_config));
    struct ep_group_config *config = (struct ep_group_config *)f.records[0];
    if (o->node) {
        epy_set_error(EP_ERR_STATE, "Group: is made already");
        return -1;
    }
    int told = epy_read_keywords(&f, &record_ep_group_config, NULL, args, kwargs);
    struct gathering m = {f.allgather, config->num_ranks, NULL};
    if (f.allgather) {
        config->allgather = gather_with_gil;
        config->allgather_ctx = &m;
    }
    if (!told) {
        ep_group *group = NULL;
        m.thread = PyEval_SaveThread();
        const ep_status st = ep_group_create(&group, config);
        PyEval_RestoreThread(m.thread);
        if (st != EP_OK && !PyErr_Occurred()) {
            epy_raise(st, NULL);
        }
        told = st == EP_OK ? epy_adopt(o, NODE_GROUP, group, f.world) : -1;
        o->device = config->device;
        o->ll_max_tokens = config->ll_max_tokens;
    }
    epy_end_frame(&f);
    return told;
}

static int init_handle(PyObject *self, PyObject *args, PyObject *kwargs) {
    struct object *o = (struct object *)self;
    struct frame f;
    memset(&f, 0, sizeof(f));
    f.name = "Handle";
    memcpy(f.records[0], &init_ep_handle_config, sizeof(init_ep_handle_config));
    PyObject *group = PyTuple_Size(args) == 1 ? PyTuple_GetItem(args, 0) : NULL;
    void *ptr = NULL;
    int told = o->node  ? epy_bad_argument("%s: is %s", "Handle", "made already")
               : !group ? epy_bad_argument("%s: takes %s", "Handle",
                                           "a group, and the rest by keyword")
                        : epy_read_object("group", NODE_GROUP, &ptr, NULL, group);
    if (!told) {
        f.self = (struct object *)group;
        told = epy_read_keywords(&f, &record_ep_handle_config, NULL, NULL, kwargs);
    }
    if (!told) {
        ep_handle *handle = NULL;
        const ep_status st =
            ep_handle_create(&handle, ptr, (const struct ep_handle_config *)f.records[0]);
        if (st != EP_OK) {
            epy_raise(st, (struct object *)group);
        }
        told = st == EP_OK ? epy_adopt(o, NODE_HANDLE, handle, (struct object *)group) : -1;
    }
    epy_end_frame(&f);
    return told;
}

/* What arrived: rows, rows_per_source, rows_per_expert. */
static PyObject *handle_counts(PyObject *self, PyObject *unused) {
    (void)unused;
    struct object *o = (struct object *)self;
    if (!epy_ready(o)) {
        return NULL;
    }
    const ep_group *group = o->parent->node->ptr;
    const int num_ranks = ep_group_num_ranks(group);
    const int num_experts = ep_handle_num_local_experts(o->node->ptr);
    int64_t rows = 0;
    int32_t *counts = calloc((size_t)(num_ranks + num_experts) + 1, sizeof(int32_t));
    if (!counts) {
        return PyErr_NoMemory();
    }
    o->busy++;
    PyThreadState *thread = PyEval_SaveThread();
    const ep_status st = ep_handle_counts(o->node->ptr, &rows, counts, counts + num_ranks);
    PyEval_RestoreThread(thread);
    o->busy--;
    PyObject *result = NULL;
    if (st == EP_OK) {
        PyObject *sources = PyList_New(num_ranks), *experts = PyList_New(num_experts);
        for (int i = 0; sources && i < num_ranks; i++) {
            PyList_SetItem(sources, i, PyLong_FromLong(counts[i]));
        }
        for (int i = 0; experts && i < num_experts; i++) {
            PyList_SetItem(experts, i, PyLong_FromLong(counts[num_ranks + i]));
        }
        result = epy_make_record("counts", Py_BuildValue("{s:L,s:N,s:N}", "rows",
                                                         (long long)rows, "rows_per_source",
                                                         sources, "rows_per_expert", experts));
    } else {
        epy_raise(st, o);
    }
    free(counts);
    return result;
}

static PyObject *handle_arena(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *words[] = {"dtype", "cols", "expanded", NULL};
    struct object *o = (struct object *)self;
    PyObject *type;
    long long cols;
    int expanded = 0;
    ep_dtype dtype;
    if (!epy_ready(o) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "OL|p:arena", words, &type, &cols,
                                     &expanded) ||
        epy_read_dtype(type, "dtype", &dtype)) {
        return NULL;
    }
    struct tensor *t = (struct tensor *)PyObject_CallObject((PyObject *)epy_tensor_type, NULL);
    if (!t) {
        return NULL;
    }
    const ep_status st =
        ep_handle_arena(o->node->ptr, expanded ? EP_DISPATCH_EXPANDED : 0, dtype, cols, &t->t);
    if (st != EP_OK) {
        Py_DECREF(t);
        return epy_raise(st, o);
    }
    epy_fill_in(t, o->parent);
    return (PyObject *)t;
}

static PyObject *handle_group(PyObject *self, void *unused) {
    (void)unused;
    PyObject *group = (PyObject *)((struct object *)self)->parent;
    group = group ? group : Py_None;
    Py_INCREF(group);
    return group;
}
static PyObject *group_device(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(((struct object *)self)->device == EP_DEVICE_CUDA ? "cuda"
                                                                                  : "host");
}
static PyObject *group_ll_max_tokens(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(((struct object *)self)->ll_max_tokens);
}

/* ---- worlds, streams, events -------------------------------------------------------------- */

static int init_world(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *words[] = {"num_ranks", NULL};
    struct object *o = (struct object *)self;
    int num_ranks;
    ep_world *world = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i:World", words, &num_ranks)) {
        return -1;
    }
    if (o->node) {
        return epy_bad_argument("%s: is %s", "World", "made already");
    }
    const ep_status st = ep_world_create(&world, num_ranks);
    if (st != EP_OK) {
        epy_raise(st, NULL);
        return -1;
    }
    return epy_adopt(o, NODE_WORLD, world, NULL);
}

/* A Stream or Event of a group. */
static int init_of_group(PyObject *self, PyObject *args, PyObject *kwargs,
                         enum node_kind kind) {
    static char *words[] = {"group", NULL};
    struct object *o = (struct object *)self, *group = NULL;
    PyObject *of;
    void *ptr, *made = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", words, &of) ||
        epy_read_object("group", NODE_GROUP, &ptr, &group, of)) {
        return -1;
    }
    if (o->node) {
        return epy_bad_argument("%s: is %s", "object", "made already");
    }
    const ep_status st = kind == NODE_STREAM ? ep_stream_create((ep_stream **)&made, ptr)
                                             : ep_event_create((ep_event **)&made, ptr);
    if (st != EP_OK) {
        epy_raise(st, group);
        return -1;
    }
    return epy_adopt(o, kind, made, group);
}
static int init_stream(PyObject *self, PyObject *args, PyObject *kwargs) {
    return init_of_group(self, args, kwargs, NODE_STREAM);
}
static int init_event(PyObject *self, PyObject *args, PyObject *kwargs) {
    return init_of_group(self, args, kwargs, NODE_EVENT);
}

/* On the stream's thread. */
static void run_python(void *function) {
    if (epy_has_left()) {
        return;
    }
    PyGILState_STATE state = PyGILState_Ensure();
    epy_on_stream = true;
    PyObject *result = PyObject_CallObject(function, NULL);
    if (!result) {
        PyErr_WriteUnraisable(function);
    }
    Py_XDECREF(result);
    epy_on_stream = false;
    PyGILState_Release(state);
}
static PyObject *stream_run(PyObject *self, PyObject *function) {
    struct object *o = (struct object *)self;
    if (!epy_ready(o)) {
        return NULL;
    }
    const ep_status st = ep_stream_run(o->node->ptr, run_python, function);
    if (st != EP_OK) {
        return epy_raise(st, o);
    }
    if (epy_keep_until_run(o, function)) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- the module --------------------------------------------------------------------------- */

PyTypeObject *epy_types[NODE_EVENT + 1];

#define KEYWORDS(f) (PyCFunction)(void (*)(void))(f), METH_VARARGS | METH_KEYWORDS
#define DESTROY                                                                                \
    {"destroy", epy_destroy, METH_NOARGS,                                                      \
     "Gives it back now, with all that was made from it. Garbage collection does so, too, "    \
     "and "                                                                                    \
     "waits for nobody."},
#define END                                                                                    \
    { NULL, NULL, 0, NULL }
#define GETTERS_END                                                                            \
    { NULL, NULL, NULL, NULL, NULL }

static PyMethodDef world_methods[] = {DESTROY WORLD_METHODS END};
static PyMethodDef group_methods[] = {DESTROY GROUP_METHODS END};
static PyMethodDef handle_methods[] = {
    DESTROY HANDLE_METHODS{"counts", handle_counts, METH_NOARGS, doc_ep_handle_counts},
    {"arena", KEYWORDS(handle_arena), doc_ep_handle_arena},
    END};
static PyMethodDef stream_methods[] = {
    DESTROY STREAM_METHODS{"run", stream_run, METH_O,
                           "Queues a call of a function without arguments."},
    END};
static PyMethodDef event_methods[] = {DESTROY EVENT_METHODS END};
static PyGetSetDef world_getters[] = {WORLD_GETTERS GETTERS_END};
static PyGetSetDef group_getters[] = {
    GROUP_GETTERS{"device", group_device, NULL, "\"host\" or \"cuda\".", NULL},
    {"ll_max_tokens", group_ll_max_tokens, NULL, "As the group was made.", NULL},
    GETTERS_END};
static PyGetSetDef handle_getters[] = {
    HANDLE_GETTERS{"group", handle_group, NULL, "The group it was made from.", NULL},
    GETTERS_END};
static PyGetSetDef stream_getters[] = {STREAM_GETTERS GETTERS_END};
static PyGetSetDef event_getters[] = {EVENT_GETTERS GETTERS_END};

static const struct {
    const char *name;
    const char *doc;
    int (*init)(PyObject *, PyObject *, PyObject *);
    PyMethodDef *methods;
    PyGetSetDef *getters;
} types[] = {
    [NODE_WORLD] = {"ep._ep._World", "The meeting place of ranks that are threads.", init_world,
                    world_methods, world_getters},
    [NODE_GROUP] = {"ep._ep._Group", doc_ep_group_config, init_group, group_methods,
                    group_getters},
    [NODE_HANDLE] = {"ep._ep._Handle", "The routing of one micro-batch.", init_handle,
                     handle_methods, handle_getters},
    [NODE_STREAM] = {"ep._ep._Stream", "A host group's queue of work: one thread.", init_stream,
                     stream_methods, stream_getters},
    [NODE_EVENT] = {"ep._ep._Event", "A point in a stream of a host group.", init_event,
                    event_methods, event_getters},
};

static PyObject *version(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    const unsigned v = ep_version();
    return PyUnicode_FromFormat("%u.%u.%u", v / 10000, v / 100 % 100, v % 100);
}

static PyMethodDef module_methods[] = {
    MODULE_METHODS{"set_hooks", epy_set_hooks, METH_VARARGS,
                   "set_hooks(make_error, make_record): what makes exceptions and results."},
    {"leave", epy_leave, METH_NOARGS, "Leaves all groups, when the interpreter ends."},
    {"path_of", epy_path_of, METH_O, "How tensors of this type are read."},
    {"version", version, METH_NOARGS, "The version of the library within."},
    END};

static int add_type(PyObject *module, const char *name, PyTypeObject *type) {
    Py_XINCREF(type);
    return type ? PyModule_AddObject(module, name, (PyObject *)type) : -1;
}

static int add_types(PyObject *module) {
    for (int kind = NODE_WORLD; kind <= NODE_EVENT; kind++) {
        PyType_Slot slots[] = {
            {Py_tp_doc, (void *)types[kind].doc},   {Py_tp_init, (void *)types[kind].init},
            {Py_tp_new, (void *)PyType_GenericNew}, {Py_tp_dealloc, (void *)epy_dealloc},
            {Py_tp_traverse, (void *)epy_traverse}, {Py_tp_methods, types[kind].methods},
            {Py_tp_getset, types[kind].getters},    {0, NULL},
        };
        PyType_Spec spec = {types[kind].name, sizeof(struct object), 0,
                            Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
                            slots};
        epy_types[kind] = (PyTypeObject *)PyType_FromSpec(&spec);
        if (add_type(module, strrchr(types[kind].name, '.') + 1, epy_types[kind])) {
            return -1;
        }
    }
    epy_tensor_type = epy_make_tensor_type();
    return add_type(module, "Tensor", epy_tensor_type) ||
                   add_type(module, "Prepared", epy_make_prepared_type())
               ? -1
               : 0;
}

/* Names of keywords, so that they are found by their address. */
static void intern_names(void) {
    for (size_t r = 0; r < sizeof(all_records) / sizeof(all_records[0]); r++) {
        for (int i = 0; i < all_records[r]->num_fields; i++) {
            struct field *field = &all_records[r]->fields[i];
            field->key = PyUnicode_InternFromString(field->name);
        }
    }
    for (size_t c = 0; c < sizeof(all_calls) / sizeof(all_calls[0]); c++) {
        for (int i = 0; i < all_calls[c]->num_params; i++) {
            struct param *p = &all_calls[c]->params[i];
            p->key = PyUnicode_InternFromString(p->name);
        }
    }
}

static int add_values(PyObject *module) {
    for (size_t i = 0; i < sizeof(all_numbers) / sizeof(all_numbers[0]); i++) {
        if (PyModule_AddIntConstant(module, all_numbers[i].name, all_numbers[i].value)) {
            return -1;
        }
    }
    PyObject *unbound = PyList_New(0);
    for (int i = 0; unbound && all_unbound[i]; i++) {
        PyObject *text = PyUnicode_FromString(all_unbound[i]);
        if (!text || PyList_Append(unbound, text)) {
            return -1;
        }
        Py_DECREF(text);
    }
    return unbound ? PyModule_AddObject(module, "unbound", unbound) : -1;
}

PyMODINIT_FUNC PyInit__ep(void) {
    static struct PyModuleDef def = {PyModuleDef_HEAD_INIT,
                                     "ep._ep",
                                     "libep, as ep.h has it.",
                                     -1,
                                     module_methods,
                                     NULL,
                                     NULL,
                                     NULL,
                                     NULL};
    PyObject *module = PyModule_Create(&def);
    intern_names();
    if (module && (add_types(module) || add_values(module) || PyErr_Occurred())) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
