/* SPDX-License-Identifier: MIT */
/*
 * Tensors of libep's own, ep.Tensor: memory of a group that a call has filled in, which other libraries
 * take by DLPack; or another library's array in another type and shape, for arguments. And parts of such
 * an array as arrays of its library. Called with the GIL, but for what lets go of lent memory.
 */
#include "binding.h"
#include "dlpack.h"

#include <string.h>

PyTypeObject *epy_tensor_type;

void epy_dl_of_dtype(int dtype, struct dl_type *type) {
    static const uint8_t codes[] = {0,       DL_BFLOAT, DL_FLOAT, DL_FLOAT, DL_E4M3FN,
                                    DL_E5M2, DL_UINT,   DL_INT,   DL_INT,   DL_INT};
    type->code = codes[dtype];
    type->bits = (uint8_t)(8 * ep_dtype_bytes((ep_dtype)dtype));
    type->lanes = 1;
}

/* What is contiguous, from its byte `offset` on, in another shape and type. */
static int set_shape(struct ep_tensor *t, ep_dtype dtype, PyObject *shape, long long offset) {
    const int64_t bytes = (int64_t)ep_dtype_bytes((ep_dtype)t->dtype);
    const int64_t size = (int64_t)ep_dtype_bytes(dtype);
    int64_t room = bytes, need = size;
    if (!size) {
        PyErr_Format(PyExc_ValueError, "dtype: %d is none of libep's", (int)dtype);
        return -1;
    }
    for (int i = t->ndim; i-- > 0; room *= t->shape[i]) {
        if (t->shape[i] > 1 && t->stride[i] * bytes != room) {
            PyErr_SetString(PyExc_ValueError, "array: is not contiguous, and gets a shape");
            return -1;
        }
    }
    t->ndim = (int32_t)PyTuple_Size(shape);
    if (t->ndim < 1 || t->ndim > EP_MAX_DIMS) {
        return PyErr_Occurred() ? -1 : epy_bad_dims("shape", t->ndim);
    }
    bool fits = offset >= 0 && offset <= room;
    for (int i = t->ndim; i-- > 0; need *= t->shape[i]) {
        t->stride[i] = need / size;
        t->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        fits =
            fits && t->shape[i] >= 0 && (!t->shape[i] || need <= (room - offset) / t->shape[i]);
        if (!fits) {
            PyErr_Format(PyExc_ValueError,
                         "shape: %R from byte %lld on is not in the %lld bytes of the array",
                         shape, offset, (long long)room);
            return -1;
        }
    }
    t->data = t->data ? (char *)t->data + offset : NULL;
    t->dtype = dtype;
    return 0;
}

int epy_part_of(struct ep_tensor *t, PyObject *part, int64_t *at) {
    PyObject *shape;
    int dtype;
    long long offset;
    if (!PyArg_ParseTuple(part, "iO!L", &dtype, &PyTuple_Type, &shape, &offset) ||
        set_shape(t, (ep_dtype)dtype, shape, offset)) {
        return -1;
    }
    *at = offset;
    return 0;
}

static int tensor_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *words[] = {"array", "dtype", "shape", "offset", NULL};
    struct tensor *t = (struct tensor *)self;
    PyObject *array = NULL, *type = NULL, *shape = NULL;
    long long offset = 0;
    if (t->t.size) {
        PyErr_SetString(PyExc_RuntimeError, "Tensor: is made already");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OOO!L:Tensor", words, &array, &type,
                                     &PyTuple_Type, &shape, &offset)) {
        return -1;
    }
    t->t.size = sizeof(t->t);
    if (!array || array == Py_None) {
        return 0;
    }
    struct source s;
    if (epy_read_array(array, "array", &t->t, &s)) {
        Py_XDECREF(s.hold);
        return -1;
    }
    t->hold = s.hold;
    t->base = array;
    Py_INCREF(array);
    t->device = s.device;
    t->device_index = s.device_index;
    ep_dtype dtype = (ep_dtype)t->t.dtype;
    if (type && type != Py_None && epy_read_dtype(type, "dtype", &dtype)) {
        return -1;
    }
    if (shape) {
        return set_shape(&t->t, dtype, shape, offset);
    }
    if (ep_dtype_bytes(dtype) != ep_dtype_bytes((ep_dtype)t->t.dtype)) {
        PyErr_Format(PyExc_ValueError, "dtype: elements of %s cannot be seen as %s",
                     epy_dtype_name(t->t.dtype), epy_dtype_name(dtype));
        return -1;
    }
    t->t.dtype = dtype;
    return 0;
}

static void tensor_dealloc(PyObject *self) {
    struct tensor *t = (struct tensor *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (t->node) {
        epy_let_go(t->node, false);
    }
    Py_XDECREF(t->base);
    Py_XDECREF(t->hold);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *tensor_shape(PyObject *self, void *unused) {
    (void)unused;
    const struct ep_tensor *t = &((struct tensor *)self)->t;
    PyObject *shape = PyTuple_New(t->ndim);
    for (int i = 0; shape && i < t->ndim; i++) {
        PyTuple_SetItem(shape, i, PyLong_FromLongLong(t->shape[i]));
    }
    return shape;
}
static PyObject *tensor_dtype(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(epy_dtype_name(((struct tensor *)self)->t.dtype));
}
static PyObject *tensor_data_ptr(PyObject *self, PyObject *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(((struct tensor *)self)->t.data);
}

struct dl_device epy_dl_device(int device, int index) {
    const bool cuda = device == EP_DEVICE_CUDA;
    return (struct dl_device){cuda ? DL_CUDA : DL_CPU, cuda ? index : 0};
}
static struct dl_device tensor_device(const struct tensor *t) {
    return epy_dl_device(t->device, t->device_index);
}
static PyObject *tensor_dlpack_device(PyObject *self, PyObject *unused) {
    (void)unused;
    const struct dl_device d = tensor_device((struct tensor *)self);
    return Py_BuildValue("ii", (int)d.type, (int)d.index);
}

/* What another library holds of our memory: it lets go on any thread, with or without the GIL. */
struct lent {
    union {
        struct dl_managed old;
        struct dl_versioned versioned;
    } u;
    int64_t shape[EP_MAX_DIMS], stride[EP_MAX_DIMS];
    struct node *node;
};
static void give_back(struct lent *l) {
    epy_let_go(l->node, false);
    free(l);
}
static void old_deleter(struct dl_managed *m) {
    give_back(m->context);
}
static void versioned_deleter(struct dl_versioned *v) {
    give_back(v->context);
}
/* A capsule that nobody took has its name still. */
static void unused_capsule(PyObject *capsule) {
    struct dl_managed *m = PyCapsule_IsValid(capsule, "dltensor")
                               ? PyCapsule_GetPointer(capsule, "dltensor")
                               : NULL;
    struct dl_versioned *v = PyCapsule_IsValid(capsule, "dltensor_versioned")
                                 ? PyCapsule_GetPointer(capsule, "dltensor_versioned")
                                 : NULL;
    if (m || v) {
        give_back(m ? m->context : v->context);
    }
}

static PyObject *tensor_dlpack(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *words[] = {"stream", "max_version", "dl_device", "copy", NULL};
    struct tensor *t = (struct tensor *)self;
    PyObject *stream = NULL, *newest = NULL, *device = NULL, *copy = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OOOO:__dlpack__", words, &stream, &newest,
                                     &device, &copy)) {
        return NULL;
    }
    if (!t->node) {
        PyErr_SetString(PyExc_BufferError, "only memory of a group is exported; this tensor is "
                                           "blank, or another library's");
        return NULL;
    }
    int major = 0, minor = 0;
    if (newest && newest != Py_None && !PyArg_ParseTuple(newest, "ii", &major, &minor)) {
        return NULL;
    }
    struct lent *l = calloc(1, sizeof(*l));
    if (!l) {
        return PyErr_NoMemory();
    }
    memcpy(l->shape, t->t.shape, sizeof(l->shape));
    memcpy(l->stride, t->t.stride, sizeof(l->stride));
    l->node = t->node;
    struct dl_tensor d = {t->t.data, tensor_device(t), t->t.ndim, {0, 0, 0},
                          l->shape,  l->stride,        0};
    epy_dl_of_dtype(t->t.dtype, &d.type);
    if (major >= 1) {
        l->u.versioned = (struct dl_versioned){{1, 0}, l, versioned_deleter, 0, d};
    } else {
        l->u.old = (struct dl_managed){d, l, old_deleter};
    }
    PyObject *capsule =
        PyCapsule_New(&l->u, major >= 1 ? "dltensor_versioned" : "dltensor", unused_capsule);
    if (!capsule) {
        free(l);
        return NULL;
    }
    epy_hold(t->node);
    return capsule;
}

PyTypeObject *epy_make_tensor_type(void) {
    static PyMethodDef methods[] = {
        {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS,
         "The memory, for other libraries."},
        {"__dlpack_device__", tensor_dlpack_device, METH_NOARGS, "Where the memory is."},
        {"data_ptr", tensor_data_ptr, METH_NOARGS, "The address of the first element."},
        {NULL, NULL, 0, NULL},
    };
    static PyGetSetDef getters[] = {
        {"shape", tensor_shape, NULL, "The dimensions.", NULL},
        {"dtype", tensor_dtype, NULL, "The name of the elements' type.", NULL},
        {NULL, NULL, NULL, NULL, NULL},
    };
    static PyType_Slot slots[] = {
        {Py_tp_doc,
         "Tensor(array=None, dtype=None, shape=None, offset=0): memory with a shape and one of "
         "libep's types, for arguments of calls. Blank, to be filled in by a dispatch with "
         "DISPATCH_ARENA; or an array seen as another type of the same size; or with a shape, "
         "a tuple, a contiguous array seen as that from its byte `offset` on."},
        {Py_tp_init, (void *)tensor_init},
        {Py_tp_new, (void *)PyType_GenericNew},
        {Py_tp_dealloc, (void *)tensor_dealloc},
        {Py_tp_methods, methods},
        {Py_tp_getset, getters},
        {0, NULL},
    };
    static PyType_Spec spec = {"ep.Tensor", sizeof(struct tensor), 0, Py_TPFLAGS_DEFAULT,
                               slots};
    return (PyTypeObject *)PyType_FromSpec(&spec);
}
