/* SPDX-License-Identifier: MIT */
/*
 * ep.Prepared: a call whose keywords were read once. A later one gives nothing but arrays, which take the
 * places of the first one's, so it costs a fraction. Owns a copy of the call's arguments, with the place
 * of each tensor in the memory of an array, and memory that it lends to calls in place of their first
 * array. Called with the GIL, but for what lets go of a part.
 */
#include "binding.h"
#include "dlpack.h"

#include <string.h>

#define MAX_ARRAYS 8
#define MAX_PARTS 4

struct place {
    size_t field; /* of the struct: where it points to the tensor */
    int array;    /* in whose memory it lies; -1: it has none */
    int64_t offset;
    struct ep_tensor t;
    struct dl_type type; /* of a part */
    bool whole;          /* a part that is the first array, as a tensor of ours */
};
/* The memory of an array, held by those who use it: its parts, and who lends it, to one call at a time. */
struct block {
    struct block *next;
    PyObject *array;
    char *data;
    void *stream;
    atomic_int users;
};
struct part {
    struct dl_versioned lent;
    struct ep_tensor t;
    struct block *block;
};
struct prepared {
    PyObject_HEAD struct object *self; /* of the call; held */
    PyObject *make;                    /* makes first arrays; or NULL */
    struct block *blocks;              /* to be lent */
    struct dl_device device;           /* of the first array */
    struct call *call;
    size_t size;
    unsigned char fields[MAX_RECORD];
    struct ep_tensor arrays[MAX_ARRAYS];
    int devices[MAX_ARRAYS];
    struct place tensors[MAX_TENSORS], parts[MAX_PARTS];
    int num_arrays, num_tensors, num_parts;
};

/* What a call tells of itself instead of running. */
static struct prepared *preparing;

/* Bytes from the first element to the end of the last; 0: there are none. */
static int64_t extent(const struct ep_tensor *t) {
    int64_t last = 0;
    for (int i = 0; i < t->ndim; i++) {
        if (!t->shape[i]) {
            return 0;
        }
        last += (t->shape[i] - 1) * t->stride[i];
    }
    return (last + 1) * (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
}

static int find_place(const struct prepared *p, const char *name, struct place *to) {
    to->array = -1;
    for (int i = 0; i < p->num_arrays && extent(&to->t); i++) {
        const int64_t offset = (char *)to->t.data - (char *)p->arrays[i].data;
        if (offset >= 0 && offset + extent(&to->t) <= extent(&p->arrays[i])) {
            to->array = i;
            to->offset = offset;
            return 0;
        }
    }
    return extent(&to->t) ? epy_bad_argument("%s: lies in the memory of none of the %s", name,
                                             "arrays of the prepared call")
                          : 0;
}

bool epy_is_preparing(void) {
    return preparing;
}

int epy_prepare(const struct frame *f, struct call *call, const struct record *record) {
    struct prepared *p = preparing;
    if (!record || f->ints || f->stream || f->num_blanks || !f->self) {
        PyErr_Format(PyExc_TypeError, "%s() cannot be prepared with these keywords", f->name);
        return -1;
    }
    p->size = record->size;
    memcpy(p->fields, f->records[0], record->size);
    for (int i = 0; i < record->num_fields; i++) {
        const struct field *field = &record->fields[i];
        const bool tensor = field->kind == F_IN || field->kind == F_OUT;
        for (int j = 0; tensor && j < field->count; j++) {
            struct place *place = &p->tensors[p->num_tensors];
            const struct ep_tensor *t;
            place->field = field->offset + (size_t)j * sizeof(t);
            memcpy(&t, p->fields + place->field, sizeof(t));
            if (t) {
                place->t = *t;
                p->num_tensors++;
                if (find_place(p, field->name, place)) {
                    return -1;
                }
            }
        }
    }
    Py_INCREF((PyObject *)f->self);
    p->self = f->self;
    p->call = call;
    return 0;
}

static int read_arrays(struct prepared *p, PyObject *arrays) {
    const Py_ssize_t num = PyTuple_Size(arrays);
    if (num > MAX_ARRAYS) {
        PyErr_Format(PyExc_ValueError, "arrays: at most %d", MAX_ARRAYS);
        return -1;
    }
    for (; p->num_arrays < num; p->num_arrays++) {
        struct source s;
        const int told = epy_read_array(PyTuple_GetItem(arrays, p->num_arrays), "arrays",
                                        &p->arrays[p->num_arrays], &s);
        Py_XDECREF(s.hold); /* the caller holds the array */
        if (told) {
            return -1;
        }
        p->devices[p->num_arrays] = s.device;
        if (!p->num_arrays) {
            p->device = epy_dl_device(s.device, s.device_index);
        }
    }
    return 0;
}

static int read_parts(struct prepared *p, PyObject *parts) {
    const Py_ssize_t num = PyTuple_Size(parts);
    if (num > MAX_PARTS) {
        PyErr_Format(PyExc_ValueError, "parts: at most %d", MAX_PARTS);
        return -1;
    }
    for (; p->num_parts < num; p->num_parts++) {
        struct place *part = &p->parts[p->num_parts]; /* of the first array */
        part->t = p->arrays[0];
        part->whole = PyTuple_GetItem(parts, p->num_parts) == Py_None;
        if (part->whole) {
            continue;
        }
        if (epy_part_of(&part->t, PyTuple_GetItem(parts, p->num_parts), &part->offset)) {
            return -1;
        }
        epy_dl_of_dtype(part->t.dtype, &part->type);
    }
    return 0;
}

static int prepared_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    struct prepared *p = (struct prepared *)self;
    PyObject *method, *arrays, *parts, *keywords, *make = NULL;
    if (p->num_arrays || kwargs) {
        PyErr_SetString(PyExc_RuntimeError, "Prepared: is made once, of 4 or 5 arguments");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "OO!O!O!|O:Prepared", &method, &PyTuple_Type, &arrays,
                          &PyTuple_Type, &parts, &PyDict_Type, &keywords, &make) ||
        read_arrays(p, arrays) || read_parts(p, parts)) {
        return -1;
    }
    Py_XINCREF(make);
    p->make = make;
    PyObject *none = PyTuple_New(0);
    preparing = p;
    PyObject *told = none ? PyObject_Call(method, none, keywords) : NULL;
    preparing = NULL;
    Py_XDECREF(none);
    Py_XDECREF(told);
    if (told && !p->call) {
        PyErr_SetString(PyExc_TypeError, "method: cannot be prepared");
    }
    return told && p->call ? 0 : -1;
}

/* Whether the array is like the one that was prepared; where its memory is. */
static bool is_like(const struct prepared *p, int i, PyObject *array, char **data) {
    const struct ep_tensor *want = &p->arrays[i];
    struct ep_tensor t;
    struct source s;
    const int told = epy_read_array(array, "array", &t, &s);
    if (told || s.hold) {
        PyErr_Clear(); /* the call itself will name it */
        Py_XDECREF(s.hold);
        return false;
    }
    *data = t.data;
    const size_t dims = (size_t)t.ndim * sizeof(int64_t);
    return t.dtype == want->dtype && t.ndim == want->ndim && s.device == p->devices[i] &&
           !memcmp(t.shape, want->shape, dims) && !memcmp(t.stride, want->stride, dims);
}

/* ---- memory --------------------------------------------------------------------------------- */

static void let_go(struct block *b) {
    if (atomic_fetch_sub(&b->users, 1) == 1 && Py_IsInitialized()) {
        const PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(b->array);
        PyGILState_Release(state);
        free(b);
    }
}

/* Whoever has taken a part is on any thread, with the GIL or without. */
static void let_go_of_part(struct dl_versioned *lent) {
    struct part *part = lent->context;
    let_go(part->block);
    free(part);
}

/* With one user; `array` has one more holder. */
static struct block *block_of(PyObject *array, char *data, void *stream) {
    struct block *b = malloc(sizeof(*b));
    if (!b) {
        PyErr_NoMemory();
        return NULL;
    }
    Py_INCREF(array);
    *b = (struct block){NULL, array, data, stream, 1};
    return b;
}

/* A part is used on the stream of its call, or behind it: who comes later on that may have it. */
static struct block *lend(struct prepared *p, void *stream) {
    struct block *b = p->blocks;
    while (b && (b->stream != stream || atomic_load(&b->users) != 1)) {
        b = b->next;
    }
    if (!b) {
        PyObject *array = PyObject_CallFunction(p->make, NULL);
        char *data;
        b = array && is_like(p, 0, array, &data) ? block_of(array, data, stream) : NULL;
        if (array && !b && !PyErr_Occurred()) {
            PyErr_SetString(PyExc_TypeError, "make: returns no array like the first");
        }
        Py_XDECREF(array);
        if (!b) {
            return NULL;
        }
        b->next = p->blocks;
        p->blocks = b;
    }
    atomic_fetch_add(&b->users, 1);
    return b;
}

static void let_go_of_whole(PyObject *hold) {
    let_go(PyCapsule_GetPointer(hold, NULL));
}

static PyObject *make_whole(const struct prepared *p, struct block *b) {
    const allocfunc make = (allocfunc)PyType_GetSlot(epy_tensor_type, Py_tp_alloc);
    struct tensor *t = (struct tensor *)make(epy_tensor_type, 0);
    PyObject *hold = t ? PyCapsule_New(b, NULL, let_go_of_whole) : NULL;
    if (!hold) {
        Py_XDECREF((PyObject *)t);
        return NULL;
    }
    atomic_fetch_add(&b->users, 1);
    t->t = p->arrays[0];
    t->t.data = b->data;
    t->device = p->devices[0];
    t->device_index = p->device.index;
    t->base = b->array;
    Py_INCREF(t->base);
    t->hold = hold;
    return (PyObject *)t;
}

static PyObject *make_part(const struct prepared *p, const struct dl_exchange *e,
                           struct block *b, const struct place *place) {
    struct part *part = malloc(sizeof(*part));
    void *made = NULL;
    if (!part) {
        return PyErr_NoMemory();
    }
    part->t = place->t;
    part->block = b;
    part->lent = (struct dl_versioned){{1, 0},
                                       part,
                                       let_go_of_part,
                                       0,
                                       {b->data + place->offset, p->device, part->t.ndim,
                                        place->type, part->t.shape, part->t.stride, 0}};
    atomic_fetch_add(&b->users, 1);
    if (e->from_managed(&part->lent, &made)) {
        let_go_of_part(&part->lent);
    }
    return made;
}

static PyObject *make_parts(const struct prepared *p, const struct dl_exchange *e,
                            struct block *b) {
    const int num = e && e->from_managed ? p->num_parts : 0;
    PyObject *made = PyTuple_New(num);
    for (int i = 0; made && i < num; i++) {
        PyObject *part =
            p->parts[i].whole ? make_whole(p, b) : make_part(p, e, b, &p->parts[i]);
        if (!part || PyTuple_SetItem(made, i, part)) {
            Py_DECREF(made);
            made = NULL;
        }
    }
    return made;
}

static void prepared_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    struct prepared *p = (struct prepared *)self;
    while (p->blocks) {
        struct block *b = p->blocks;
        p->blocks = b->next;
        let_go(b);
    }
    Py_XDECREF(p->make);
    Py_XDECREF((PyObject *)p->self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *run(const struct prepared *p, PyObject *stream, char *const *data,
                     struct block *b, const struct dl_exchange *e) {
    struct frame f;
    memset(&f, 0, offsetof(struct frame, records));
    memset(&f.num_tensors, 0, sizeof(f) - offsetof(struct frame, num_tensors));
    f.name = p->call->name;
    f.self = p->self;
    memcpy(f.records[0], p->fields, p->size);
    for (int i = 0; i < p->num_tensors; i++) {
        const struct place *place = &p->tensors[i];
        const struct ep_tensor *at = &f.tensors[i];
        f.tensors[i] = place->t;
        f.tensors[i].data = place->array < 0 ? NULL : data[place->array] + place->offset;
        memcpy(f.records[0] + place->field, &at, sizeof(at));
    }
    for (int i = 0; i < p->call->num_params; i++) {
        const bool record = p->call->params[i].kind == F_RECORD;
        f.arguments[i] = record              ? (void *)f.records[0]
                         : stream == Py_None ? NULL
                                             : PyLong_AsVoidPtr(stream);
    }
    if (PyErr_Occurred() || !epy_ready(f.self)) {
        return NULL;
    }
    const ep_status st = epy_run(&f, p->call);
    return st == EP_OK ? make_parts(p, e, b) : epy_raise(st, f.self);
}

/* (stream, array, ...): the parts, or None where an array is not like the one that was prepared. */
static PyObject *prepared_call(PyObject *self, PyObject *args, PyObject *kwargs) {
    struct prepared *p = (struct prepared *)self;
    char *data[MAX_ARRAYS];
    if ((kwargs && PyDict_Size(kwargs)) || !p->call || !p->num_arrays ||
        PyTuple_Size(args) != p->num_arrays + 1) {
        PyErr_SetString(PyExc_TypeError,
                        "a prepared call takes a stream, and as many arrays as it had");
        return NULL;
    }
    PyObject *stream = PyTuple_GetItem(args, 0), *first = PyTuple_GetItem(args, 1);
    const bool lends = first == Py_None && p->make;
    for (int i = lends; i < p->num_arrays; i++) {
        if (!is_like(p, i, PyTuple_GetItem(args, i + 1), &data[i])) {
            return Py_BuildValue("");
        }
    }
    struct block *b = lends ? lend(p, stream == Py_None ? NULL : PyLong_AsVoidPtr(stream))
                            : block_of(first, data[0], NULL);
    if (!b) {
        return NULL;
    }
    data[0] = b->data;
    PyObject *made = run(p, stream, data, b, epy_exchange_of(b->array));
    let_go(b);
    return made;
}

PyTypeObject *epy_make_prepared_type(void) {
    static PyType_Slot slots[] = {
        {Py_tp_doc,
         "Prepared(method, arrays, parts, keywords, make=None): the method's call with these "
         "keywords, whose tensors all lie in the arrays. Called with a stream, a number or "
         "None, "
         "and other such arrays it does the same with those: returns None where one is not "
         "alike, "
         "else a tuple of parts of the first array, each a type, a shape and a byte, as arrays "
         "of "
         "its library, or None: all of it as an ep.Tensor; which is empty where that has no "
         "functions for it. With `make` the "
         "first "
         "array may be None: it is then one that make() has returned, and which is lent again "
         "when all parts of it are gone, to calls on the same stream."},
        {Py_tp_init, (void *)prepared_init},
        {Py_tp_new, (void *)PyType_GenericNew},
        {Py_tp_dealloc, (void *)prepared_dealloc},
        {Py_tp_call, (void *)prepared_call},
        {0, NULL},
    };
    static PyType_Spec spec = {"ep.Prepared", sizeof(struct prepared), 0, Py_TPFLAGS_DEFAULT,
                               slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}
