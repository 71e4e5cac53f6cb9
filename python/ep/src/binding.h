/* SPDX-License-Identifier: MIT */
/*
 * What the files of the extension module ep._ep share. The limited API of Python 3.8 only, so that
 * one build serves every later Python. Everything here is called with the GIL, unless it says
 * otherwise.
 */
#ifndef EP_BINDING_H
#define EP_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "ep.h"

struct dl_exchange;
struct dl_type;
struct dl_device;

#define MAX_RECORD 512 /* bytes of the largest struct of ep.h that is bound */
#define MAX_TENSORS 24 /* tensors of one call */
#define MAX_PARAMS 4

/* What a field of a struct, or a parameter, is in Python. */
enum kind {
    F_NONE,
    F_I32,
    F_U32,
    F_I64,
    F_U64,
    F_IN,  /* a tensor that is read */
    F_OUT, /* a tensor that is written, or a blank one that is filled in */
    F_STR,
    F_TEXT, /* characters inside the struct; results only */
    F_DEVICE,
    F_DTYPE,
    F_STATUS,
    F_I32S,      /* a sequence of ints */
    F_ALLGATHER, /* a callable; the void pointer after it is its context */
    F_WORLD,
    F_STREAM,
    F_EVENT,
    F_WHERE,     /* `void *stream` */
    F_RECORD,    /* a struct that is read: its fields are keywords */
    F_RESULT,    /* a struct that is filled in: the call's value */
    F_RESULT_I64 /* a number that is filled in: the call's value */
};

struct field {
    const char *name;
    enum kind kind;
    int count; /* of an array of tensors */
    size_t offset;
    PyObject *key; /* the name, interned */
};
struct record {
    const char *name;
    size_t size;
    const void *init;
    struct field *fields;
    int num_fields;
};
struct param {
    const char *name;
    enum kind kind;
    struct record *record;
    PyObject *key;
};
struct call {
    const char *name;
    struct param *params;
    int num_params;
    ep_status (*run)(void *self, void **arguments);
    bool tells; /* EP_OK and EP_AGAIN are its value, True and False */
};

/*
 * One of libep's objects, counted: by the Python object that made it, by what was made from it, and
 * by views of its memory that other libraries hold. The last to let go destroys it, without the GIL
 * or with it: where that may take a while, and nobody has asked to wait, on a thread of its own.
 */
struct node {
    enum node_kind { NODE_WORLD, NODE_GROUP, NODE_HANDLE, NODE_STREAM, NODE_EVENT } kind;
    void *ptr;
    struct node *parent;
    atomic_int holders;
    /* Of a stream: what its queued calls use, in their order, and how many of them have run. */
    PyObject *used;
    long long first_used;
    atomic_llong num_run;
};
struct node *epy_node(enum node_kind kind, struct node *parent);
void epy_hold(struct node *node);
void epy_let_go(struct node *node, bool wait);

/* A World, Group, Handle, Stream or Event. */
struct object {
    PyObject_HEAD struct node *node; /* NULL: not made yet, or destroyed */
    struct object *parent;           /* held: the group of a handle, the world of a group */
    struct object *children;         /* of a group or world, not held */
    struct object *next, *prev;
    int busy; /* calls that are under way */
    int device;
    int ll_max_tokens; /* of a group */
};
extern PyTypeObject *epy_types[NODE_EVENT + 1];
extern _Thread_local bool epy_on_stream; /* a stream runs Python on this thread */
bool epy_has_left(void);
PyObject *epy_leave(PyObject *module, PyObject *unused);
PyObject *epy_destroy(PyObject *self, PyObject *unused);
void epy_dealloc(PyObject *self);
int epy_traverse(PyObject *self, visitproc visit, void *arg);
/* Whether it can be called; sets StateError if not. */
bool epy_ready(struct object *o);
bool epy_is(PyObject *o, enum node_kind kind);

/* A tensor of libep's: see _ep.pyi. */
struct tensor {
    PyObject_HEAD struct ep_tensor t;
    struct node *node; /* whose memory it is */
    int device;        /* EP_DEVICE_... */
    int device_index;
    PyObject *base; /* or the array whose memory it is, with what keeps that exported */
    PyObject *hold;
};
extern PyTypeObject *epy_tensor_type;
PyTypeObject *epy_make_tensor_type(void);

/* What reading an array has found out beside its ep_tensor. */
struct source {
    int device; /* EP_DEVICE_..., -1: both can use it */
    int device_index;
    bool read_only;
    const void *exchange; /* the functions of its library, where it has them */
    PyObject *hold;       /* new; NULL if nothing has to be kept */
};
const struct dl_exchange *epy_exchange_of(PyObject *array); /* NULL: it has none */
int epy_bad_dims(const char *name, long long ndim);
int epy_read_array(PyObject *array, const char *name, struct ep_tensor *t, struct source *s);
/* The stream on which the array's library works at present. */
int epy_current_stream(const struct source *s, void **stream);
int epy_read_dtype(PyObject *dtype, const char *name, ep_dtype *out);
const char *epy_dtype_name(int dtype);
PyObject *epy_path_of(PyObject *module, PyObject *array);
/* A part of an array's memory, of which `t` is the whole: of a type, a shape, and from a byte on. */
int epy_part_of(struct ep_tensor *t, PyObject *part, int64_t *at);
void epy_dl_of_dtype(int dtype, struct dl_type *type);
struct dl_device epy_dl_device(int device, int index);

/* The arguments of one call, from Python's to C's. */
struct frame {
    const char *name;
    struct object *self;
    _Alignas(16) unsigned char records[2][MAX_RECORD];
    struct ep_tensor tensors[MAX_TENSORS];
    int num_tensors;
    struct tensor *blanks[4]; /* to be filled in */
    int num_blanks;
    PyObject *holds; /* what must live as long as the call's work; NULL or a list */
    void *arguments[MAX_PARAMS];
    struct source source; /* of the first tensor on a device */
    bool has_stream;
    struct object *stream, *world;
    PyObject *allgather;
    int32_t *ints;
    Py_ssize_t num_ints;
};
/* Reads `kwargs` into frame->records[0] as the fields of `record`, and `extra` parameters into
 * frame->arguments. 0, or -1 with an exception; epy_end_frame in either case. */
int epy_read_keywords(struct frame *f, struct record *record, struct call *call, PyObject *args,
                      PyObject *kwargs);
void epy_end_frame(struct frame *f);
int epy_set_value(struct frame *f, const char *name, enum kind kind, int count, void *to,
                  PyObject *value);

/* A view that a call has filled in lives as long as its group's memory. */
void epy_fill_in(struct tensor *t, struct object *group);
/* Calls libep, without the GIL. */
ep_status epy_run(struct frame *f, const struct call *call);
/* Whether calls are not to run, but to be kept by epy_prepare. */
bool epy_is_preparing(void);
int epy_prepare(const struct frame *f, struct call *call, const struct record *record);
PyTypeObject *epy_make_prepared_type(void);
PyObject *epy_call(PyObject *self, PyObject *args, PyObject *kwargs, struct call *call);
/* Sets the exception for a failed status, of the last call of this thread. Returns NULL. */
PyObject *epy_raise(ep_status st, struct object *of);
PyObject *epy_set_error(ep_status st, const char *message);
/* ArgumentError of a format with two words; -1. */
int epy_bad_argument(const char *format, const char *name, const char *word);
int epy_read_object(const char *name, enum node_kind kind, void **to, struct object **o,
                    PyObject *value);
PyObject *epy_make_record(const char *name, PyObject *fields);
PyObject *epy_set_hooks(PyObject *module, PyObject *args);
extern struct record *const epy_fault_record, *const epy_needs_record;
/* Ties a new object to what it was made from. */
int epy_adopt(struct object *o, enum node_kind kind, void *ptr, struct object *parent);
/* Keeps `used` until what is queued on the stream now has run. */
int epy_keep_until_run(struct object *stream, PyObject *used);
void epy_forget_run(struct node *stream);

#endif
