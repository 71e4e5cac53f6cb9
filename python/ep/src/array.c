/* SPDX-License-Identifier: MIT */
/*
 * Reads arrays of any library as struct ep_tensor: through the C functions that the type offers
 * (__dlpack_c_exchange_api__), else through torch's methods, else through __dlpack__. The first
 * costs some tens of nanoseconds, the last a capsule, which must be kept until the call is over.
 * Owns the cache of which type has which. Called with the GIL; must not import a library.
 */
#include "binding.h"
#include "dlpack.h"

#include <string.h>

enum way { WAY_NONE, WAY_EXCHANGE, WAY_METHODS, WAY_DLPACK };
static const char *const way_names[] = {"none", "exchange", "methods", "dlpack"};

/* ---- types of elements -------------------------------------------------------------------- */

static const struct {
    const char *name;
    ep_dtype dtype;
} dtype_names[] = {
    {"bf16", EP_BF16},
    {"f16", EP_F16},
    {"f32", EP_F32},
    {"f8e4m3", EP_F8E4M3},
    {"f8e5m2", EP_F8E5M2},
    {"u8", EP_U8},
    {"i16", EP_I16},
    {"i32", EP_I32},
    {"i64", EP_I64},
    {"bfloat16", EP_BF16},
    {"float16", EP_F16},
    {"half", EP_F16},
    {"float32", EP_F32},
    {"float8_e4m3fn", EP_F8E4M3},
    {"float8_e5m2", EP_F8E5M2},
    {"uint8", EP_U8},
    {"int8", EP_U8},
    {"bool", EP_U8},
    {"float8_e8m0fnu", EP_U8},
    {"float4_e2m1fn_x2", EP_U8},
    {"int16", EP_I16},
    {"uint16", EP_I16},
    {"int32", EP_I32},
    {"uint32", EP_I32},
    {"int64", EP_I64},
    {"uint64", EP_I64},
};
#define NUM_DTYPE_NAMES (sizeof(dtype_names) / sizeof(dtype_names[0]))
static PyObject *known_dtypes; /* other libraries' objects to numbers */

const char *epy_dtype_name(int dtype) {
    return dtype >= EP_BF16 && dtype <= EP_I64 ? dtype_names[dtype - 1].name : "none";
}

/* The last word of `torch.bfloat16`, `float32`, `<class 'numpy.float32'>`, `bf16`. */
static ep_dtype dtype_of_text(const char *text) {
    const char *dot = strrchr(text, '.');
    const char *word = dot ? dot + 1 : text;
    const size_t length = strcspn(word, "'>");
    for (size_t i = 0; i < NUM_DTYPE_NAMES; i++) {
        if (strlen(dtype_names[i].name) == length &&
            !strncmp(word, dtype_names[i].name, length)) {
            return dtype_names[i].dtype;
        }
    }
    return EP_DTYPE_NONE;
}

int epy_read_dtype(PyObject *dtype, const char *name, ep_dtype *out) {
    PyObject *known = known_dtypes ? PyDict_GetItemWithError(known_dtypes, dtype) : NULL;
    if (known) {
        *out = (ep_dtype)PyLong_AsLong(known);
        return 0;
    }
    PyErr_Clear();
    if (PyLong_Check(dtype)) {
        *out = (ep_dtype)PyLong_AsLong(dtype);
        return PyErr_Occurred() ? -1 : 0;
    }
    PyObject *text = PyObject_Str(dtype);
    PyObject *bytes = text ? PyUnicode_AsUTF8String(text) : NULL;
    Py_XDECREF(text);
    if (!bytes) {
        return -1;
    }
    *out = dtype_of_text(PyBytes_AsString(bytes));
    if (*out == EP_DTYPE_NONE) {
        PyErr_Format(PyExc_TypeError,
                     "%s: libep has no type for elements of %s; it has bf16, f16, f32, f8e4m3, "
                     "f8e5m2, u8, i16, i32 and i64",
                     name, PyBytes_AsString(bytes));
    } else {
        PyObject *number = PyLong_FromLong(*out);
        known_dtypes = known_dtypes ? known_dtypes : PyDict_New();
        if (!number || !known_dtypes || PyDict_SetItem(known_dtypes, dtype, number)) {
            PyErr_Clear(); /* it is asked again next time */
        }
        Py_XDECREF(number);
    }
    Py_DECREF(bytes);
    return *out == EP_DTYPE_NONE ? -1 : 0;
}

static ep_dtype dtype_of_dl(struct dl_type type) {
    const int bits = type.bits * type.lanes;
    switch (type.code) {
    case DL_INT:
    case DL_UINT:
        return bits == 8    ? EP_U8
               : bits == 16 ? EP_I16
               : bits == 32 ? EP_I32
               : bits == 64 ? EP_I64
                            : EP_DTYPE_NONE;
    case DL_FLOAT:
        return bits == 16 ? EP_F16 : bits == 32 ? EP_F32 : EP_DTYPE_NONE;
    case DL_BFLOAT:
        return bits == 16 ? EP_BF16 : EP_DTYPE_NONE;
    case DL_E4M3FN:
        return EP_F8E4M3;
    case DL_E5M2:
        return EP_F8E5M2;
    case DL_BOOL:
    case DL_E8M0:
    case DL_FP4:
        return bits == 8 ? EP_U8 : EP_DTYPE_NONE;
    default:
        return EP_DTYPE_NONE;
    }
}

/* ---- which type has which way ------------------------------------------------------------- */

static struct known_type {
    PyTypeObject *type; /* held */
    enum way way;
    const struct dl_exchange *exchange;
} known_types[16];

static bool has(PyObject *o, const char *name) {
    PyObject *found = PyObject_GetAttrString(o, name);
    if (!found) {
        PyErr_Clear();
    }
    Py_XDECREF(found);
    return found;
}

static const struct dl_exchange *exchange_of(PyTypeObject *type) {
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    const struct dl_exchange *e =
        capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    PyErr_Clear();
    Py_XDECREF(capsule);
    while (e && e->version.major != 1) {
        e = e->older;
    }
    return e && e->to_tensor ? e : NULL;
}

static struct known_type way_of(PyObject *array) {
    PyTypeObject *type = Py_TYPE(array);
    const size_t num = sizeof(known_types) / sizeof(known_types[0]);
    size_t i = 0;
    for (; i < num && known_types[i].type; i++) {
        if (known_types[i].type == type) {
            return known_types[i];
        }
    }
    struct known_type k = {type, WAY_NONE, exchange_of(type)};
    if (k.exchange) {
        k.way = WAY_EXCHANGE;
    } else if (has((PyObject *)type, "data_ptr") && has((PyObject *)type, "stride")) {
        k.way = WAY_METHODS;
    } else if (has((PyObject *)type, "__dlpack__")) {
        k.way = WAY_DLPACK;
    }
    if (k.way != WAY_NONE && i < num) {
        Py_INCREF(type);
        known_types[i] = k;
    }
    return k;
}

const struct dl_exchange *epy_exchange_of(PyObject *array) {
    return way_of(array).exchange;
}

PyObject *epy_path_of(PyObject *module, PyObject *array) {
    (void)module;
    const bool own = Py_TYPE(array) == epy_tensor_type;
    return PyUnicode_FromString(own ? "tensor" : way_names[way_of(array).way]);
}

/* ---- the three ways ----------------------------------------------------------------------- */

int epy_bad_dims(const char *name, long long ndim) {
    PyErr_Format(PyExc_ValueError, "%s: has %lld dimensions; at most %d are known", name, ndim,
                 EP_MAX_DIMS);
    return -1;
}

static int set_dl(const char *name, const struct dl_tensor *d, struct ep_tensor *t,
                  struct source *s) {
    if (d->ndim < 0 || d->ndim > EP_MAX_DIMS) {
        return epy_bad_dims(name, d->ndim);
    }
    t->dtype = dtype_of_dl(d->type);
    if (t->dtype == EP_DTYPE_NONE) {
        PyErr_Format(
            PyExc_TypeError,
            "%s: libep has no type for elements of DLPack's code %d with %d bits and %d "
            "lanes",
            name, d->type.code, d->type.bits, d->type.lanes);
        return -1;
    }
    t->data = d->data ? (char *)d->data + d->byte_offset : NULL;
    t->ndim = d->ndim ? d->ndim : 1; /* a scalar is one element */
    t->shape[0] = t->stride[0] = 1;
    int64_t step = 1;
    for (int i = d->ndim - 1; i >= 0; i--) {
        t->shape[i] = d->shape[i];
        t->stride[i] = d->strides ? d->strides[i] : step;
        step *= d->shape[i];
    }
    s->device_index = d->device.index;
    switch (d->device.type) {
    case DL_CPU:
        s->device = EP_DEVICE_HOST;
        return 0;
    case DL_CUDA:
        s->device = EP_DEVICE_CUDA;
        return 0;
    case DL_CUDA_HOST:
    case DL_CUDA_MANAGED:
        s->device = -1;
        return 0;
    default:
        PyErr_Format(
            PyExc_TypeError,
            "%s: lies on a device of DLPack's kind %d; libep knows the CPU (1) and CUDA "
            "(2)",
            name, d->device.type);
        return -1;
    }
}

static int read_ints(PyObject *array, const char *attribute, bool call, int64_t *to) {
    PyObject *got = call ? PyObject_CallMethod(array, attribute, NULL)
                         : PyObject_GetAttrString(array, attribute);
    const Py_ssize_t n = got ? PySequence_Size(got) : -1;
    for (Py_ssize_t i = 0; i < n && i < EP_MAX_DIMS; i++) {
        PyObject *item = PySequence_GetItem(got, i);
        to[i] = item ? PyLong_AsLongLong(item) : -1;
        Py_XDECREF(item);
    }
    Py_XDECREF(got);
    return PyErr_Occurred() ? -1 : (int)n;
}

static int read_methods(PyObject *array, const char *name, struct ep_tensor *t,
                        struct source *s) {
    ep_dtype dtype = EP_DTYPE_NONE;
    PyObject *type = PyObject_GetAttrString(array, "dtype");
    const int told = type ? epy_read_dtype(type, name, &dtype) : -1;
    Py_XDECREF(type);
    if (told) {
        return -1;
    }
    t->dtype = dtype;
    PyObject *address = PyObject_CallMethod(array, "data_ptr", NULL);
    t->data = address ? PyLong_AsVoidPtr(address) : NULL;
    Py_XDECREF(address);
    PyObject *cuda = PyErr_Occurred() ? NULL : PyObject_GetAttrString(array, "is_cuda");
    const int is_cuda = cuda ? PyObject_IsTrue(cuda) : -1;
    Py_XDECREF(cuda);
    t->ndim = is_cuda < 0 ? -1 : read_ints(array, "shape", false, t->shape);
    if (t->ndim < 0 || read_ints(array, "stride", true, t->stride) < 0) {
        return -1;
    }
    if (t->ndim > EP_MAX_DIMS) {
        return epy_bad_dims(name, t->ndim);
    }
    if (!t->ndim) {
        t->ndim = 1;
        t->shape[0] = t->stride[0] = 1;
    }
    s->device = is_cuda ? EP_DEVICE_CUDA : EP_DEVICE_HOST;
    if (is_cuda) {
        PyObject *index = PyObject_CallMethod(array, "get_device", NULL);
        s->device_index = index ? (int)PyLong_AsLong(index) : 0;
        Py_XDECREF(index);
    }
    return PyErr_Occurred() ? -1 : 0;
}

/* Calls array.__dlpack__: as the newest, which may be read only, and without its synchronizing with
 * a stream of ours; as older libraries know it, if they know no better. */
static PyObject *export_array(PyObject *array) {
    PyObject *method = PyObject_GetAttrString(array, "__dlpack__");
    PyObject *none = PyTuple_New(0);
    PyObject *device = NULL, *got = NULL, *keywords = NULL;
    if (method && none) {
        device = PyObject_CallMethod(array, "__dlpack_device__", NULL);
        int kind = DL_CPU, index = 0;
        if (!device || !PyArg_ParseTuple(device, "ii", &kind, &index)) {
            PyErr_Clear();
        }
        keywords = kind == DL_CPU
                       ? Py_BuildValue("{s:(ii)}", "max_version", 1, 0)
                       : Py_BuildValue("{s:(ii),s:i}", "max_version", 1, 0, "stream", -1);
        got = keywords ? PyObject_Call(method, none, keywords) : NULL;
        if (!got && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyDict_DelItemString(keywords, "max_version");
            got = PyObject_Call(method, none, keywords);
        }
    }
    Py_XDECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(device);
    Py_XDECREF(keywords);
    return got;
}

static int read_dlpack(PyObject *array, const char *name, struct ep_tensor *t,
                       struct source *s) {
    s->hold = export_array(array);
    if (!s->hold) {
        return -1;
    }
    const struct dl_tensor *d = NULL;
    if (PyCapsule_IsValid(s->hold, "dltensor_versioned")) {
        const struct dl_versioned *v = PyCapsule_GetPointer(s->hold, "dltensor_versioned");
        if (v->version.major == 1) {
            d = &v->tensor;
            s->read_only = v->flags & 1;
        }
    } else if (PyCapsule_IsValid(s->hold, "dltensor")) {
        d = &((struct dl_managed *)PyCapsule_GetPointer(s->hold, "dltensor"))->tensor;
    }
    if (!d) {
        PyErr_Format(PyExc_TypeError, "%s: its __dlpack__ returns nothing of DLPack 0 or 1",
                     name);
        return -1;
    }
    return set_dl(name, d, t, s);
}

int epy_read_array(PyObject *array, const char *name, struct ep_tensor *t, struct source *s) {
    memset(s, 0, sizeof(*s));
    memset(t, 0, sizeof(*t));
    t->size = sizeof(*t);
    const struct tensor *own = (struct tensor *)array;
    if (Py_TYPE(array) == epy_tensor_type && (own->node || own->base)) {
        *t = own->t;
        s->device = own->device;
        s->device_index = own->device_index;
        return 0;
    }
    const struct known_type k = way_of(array);
    if (k.way == WAY_EXCHANGE) {
        struct dl_tensor d;
        s->exchange = k.exchange;
        return k.exchange->to_tensor(array, &d) ? -1 : set_dl(name, &d, t, s);
    }
    if (k.way == WAY_METHODS) {
        return read_methods(array, name, t, s);
    }
    if (k.way == WAY_DLPACK) {
        return read_dlpack(array, name, t, s);
    }
    PyErr_Format(PyExc_TypeError,
                 "%s: %R is no tensor; one of torch, or anything else with __dlpack__ is", name,
                 (PyObject *)Py_TYPE(array));
    return -1;
}

int epy_current_stream(const struct source *s, void **stream) {
    const struct dl_exchange *e = s->exchange;
    if (e && e->current_stream) {
        return e->current_stream(DL_CUDA, s->device_index, stream);
    }
    /* Torch before it had such functions; another library's arrays go to the default stream. */
    PyObject *torch = PyDict_GetItemString(PyImport_GetModuleDict(), "torch");
    PyObject *cuda = torch ? PyObject_GetAttrString(torch, "cuda") : NULL;
    PyObject *now =
        cuda ? PyObject_CallMethod(cuda, "current_stream", "i", s->device_index) : NULL;
    PyObject *number = now ? PyObject_GetAttrString(now, "cuda_stream") : NULL;
    *stream = number ? PyLong_AsVoidPtr(number) : NULL;
    Py_XDECREF(number);
    Py_XDECREF(now);
    Py_XDECREF(cuda);
    return PyErr_Occurred() ? -1 : 0;
}
