/* SPDX-License-Identifier: MIT */
/*
 * One call, from Python's keywords to a struct of ep.h and back: the engine that the tables of
 * bindings.h feed. Owns the frame of a call. The GIL is not held while libep works, which may block;
 * a failed status becomes the exception that Python made for it.
 */
#include "binding.h"

#include <string.h>

static PyObject *make_error, *make_record; /* set by the package: functions */

PyObject *epy_set_hooks(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *error, *record;
    if (!PyArg_ParseTuple(args, "OO", &error, &record)) {
        return NULL;
    }
    Py_INCREF(error);
    Py_INCREF(record);
    Py_XDECREF(make_error);
    Py_XDECREF(make_record);
    make_error = error;
    make_record = record;
    Py_RETURN_NONE;
}

PyObject *epy_make_record(const char *name, PyObject *fields) {
    PyObject *made = fields ? PyObject_CallFunction(make_record, "sO", name, fields) : NULL;
    Py_XDECREF(fields);
    return made;
}

/* ---- errors ------------------------------------------------------------------------------- */

static PyObject *fields_of(const struct record *r, const void *from);

/* `of`: what ended the group, or what was lacking. */
static PyObject *set_error(ep_status st, PyObject *message, PyObject *of) {
    PyObject *error = message && of ? PyObject_CallFunction(make_error, "sOO",
                                                            ep_status_string(st), message, of)
                                    : NULL;
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    }
    Py_XDECREF(error);
    Py_XDECREF(message);
    Py_XDECREF(of);
    return NULL;
}

PyObject *epy_set_error(ep_status st, const char *message) {
    Py_INCREF(Py_None);
    return set_error(st, PyUnicode_FromString(message), Py_None);
}

PyObject *epy_raise(ep_status st, struct object *of) {
    const char *text = ep_last_error();
    PyObject *message = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
    struct ep_needs needs = EP_NEEDS_INIT;
    if (st == EP_ERR_CAPACITY && of && of->node && of->node->kind == NODE_HANDLE &&
        ep_handle_needs(of->node->ptr, &needs) == EP_OK) {
        return set_error(st, message,
                         epy_make_record("needs", fields_of(epy_needs_record, &needs)));
    }
    while (of && of->node && of->node->kind != NODE_GROUP) {
        of = of->parent;
    }
    struct ep_fault fault = EP_FAULT_INIT;
    if (of && of->node && ep_group_fault(of->node->ptr, &fault) == EP_OK &&
        fault.status != EP_OK) {
        return set_error(st, message,
                         epy_make_record("fault", fields_of(epy_fault_record, &fault)));
    }
    Py_INCREF(Py_None);
    return set_error(st, message, Py_None);
}

int epy_bad_argument(const char *format, const char *name, const char *word) {
    char text[256];
    PyOS_snprintf(text, sizeof(text), format, name, word);
    epy_set_error(EP_ERR_ARG, text);
    return -1;
}

/* ---- arguments ---------------------------------------------------------------------------- */

static int keep(struct frame *f, PyObject *o) {
    if (!f->holds && !(f->holds = PyList_New(0))) {
        return -1;
    }
    return PyList_Append(f->holds, o);
}

static int read_int(const char *name, enum kind kind, void *to, PyObject *value) {
    PyObject *number = PyNumber_Index(value);
    int overflow = 0;
    const long long v = number ? PyLong_AsLongLongAndOverflow(number, &overflow) : -1;
    Py_XDECREF(number);
    if (v == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (overflow || (kind == F_I32 && v != (int32_t)v) || (kind == F_U32 && v != (uint32_t)v) ||
        (kind == F_U64 && v < 0)) {
        return epy_bad_argument("%s: is outside of what %s holds", name,
                                kind == F_U32   ? "32 bits without a sign"
                                : kind == F_I32 ? "32 bits"
                                                : "64 bits");
    }
    if (kind == F_I64 || kind == F_U64) {
        *(int64_t *)to = v;
    } else {
        *(int32_t *)to = (int32_t)v;
    }
    return 0;
}

/* A tensor of a call: on the device of its group. */
static int read_tensor(struct frame *f, const char *name, bool out, struct ep_tensor **to,
                       PyObject *value) {
    struct source s = {0};
    if (Py_TYPE(value) == epy_tensor_type) {
        struct tensor *t = (struct tensor *)value;
        *to = &t->t;
        if (out && !t->base) {
            if (f->num_blanks == (int)(sizeof(f->blanks) / sizeof(f->blanks[0]))) {
                return epy_bad_argument("%s: %s", name, "too many tensors to be filled in");
            }
            f->blanks[f->num_blanks++] = t;
            return 0;
        }
        s.device = t->device;
        s.device_index = t->device_index;
    } else {
        if (f->num_tensors == MAX_TENSORS) {
            return epy_bad_argument("%s: is one tensor more than %s", name, "a call may have");
        }
        *to = &f->tensors[f->num_tensors++];
        const int told = epy_read_array(value, name, *to, &s);
        if (s.hold) {
            const int kept = keep(f, s.hold);
            Py_DECREF(s.hold);
            if (kept) {
                return -1;
            }
        }
        if (told) {
            return -1;
        }
    }
    if (out && s.read_only) {
        return epy_bad_argument("%s: is read only, and %s", name, "the call writes it");
    }
    if (s.device >= 0 && f->self && s.device != f->self->device) {
        return epy_bad_argument(s.device == EP_DEVICE_CUDA
                                    ? "%s: lies on a GPU, and the group is one of host memory%s"
                                    : "%s: lies in host memory, and the group is one of GPUs%s",
                                name, "");
    }
    if (s.device == EP_DEVICE_CUDA && !f->source.exchange) {
        f->source = s;
    }
    return 0;
}

static int read_ints(struct frame *f, const char *name, const int32_t **to, PyObject *value) {
    const Py_ssize_t n = PySequence_Size(value);
    if (n < 0) {
        return -1;
    }
    f->num_ints = n;
    f->ints = calloc((size_t)n + 1, sizeof(int32_t));
    if (!f->ints) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(value, i);
        const int told = item ? read_int(name, F_I32, &f->ints[i], item) : -1;
        Py_XDECREF(item);
        if (told) {
            return -1;
        }
    }
    *to = f->ints;
    return 0;
}

static int read_text(struct frame *f, const char *name, const char **to, PyObject *value) {
    PyObject *bytes = PyUnicode_Check(value) ? PyUnicode_AsUTF8String(value) : NULL;
    if (!bytes) {
        return PyErr_Occurred() ? -1 : epy_bad_argument("%s: must be a %s", name, "str");
    }
    *to = PyBytes_AsString(bytes);
    const int kept = keep(f, bytes);
    Py_DECREF(bytes);
    return kept;
}

/* A stream of the caller's: of a host group only libep's, for any other number would be taken for
 * one's address. */
static int read_stream(struct frame *f, void **to, PyObject *value) {
    f->has_stream = true;
    if (epy_is(value, NODE_STREAM)) {
        struct object *s = (struct object *)value;
        struct object *group = f->self;
        while (group && group->parent && !epy_is((PyObject *)group, NODE_GROUP)) {
            group = group->parent;
        }
        if (!epy_ready(s)) {
            return -1;
        }
        if (s->parent != group) {
            return epy_bad_argument("%s: is %s", "stream", "a stream of another group");
        }
        f->stream = s;
        *to = s->node->ptr;
        return 0;
    }
    if (f->self && f->self->device == EP_DEVICE_HOST) {
        return epy_bad_argument("%s: a host group takes None or %s", "stream",
                                "an ep.Stream of its own");
    }
    PyObject *number =
        PyLong_Check(value) ? value : PyObject_GetAttrString(value, "cuda_stream");
    if (!number) {
        return -1;
    }
    *to = PyLong_AsVoidPtr(number);
    if (number != value) {
        Py_DECREF(number);
    }
    return PyErr_Occurred() ? -1 : 0;
}

int epy_read_object(const char *name, enum node_kind kind, void **to, struct object **o,
                    PyObject *value) {
    static const char *const names[] = {"an ep.World", "an ep.Group", "an ep.Handle",
                                        "an ep.Stream", "an ep.Event"};
    if (!epy_is(value, kind)) {
        return epy_bad_argument("%s: must be %s", name, names[kind]);
    }
    if (!epy_ready((struct object *)value)) {
        return -1;
    }
    *to = ((struct object *)value)->node->ptr;
    if (o) {
        *o = (struct object *)value;
    }
    return 0;
}

static int read_device(const char *name, int32_t *to, PyObject *value) {
    if (PyLong_Check(value)) {
        return read_int(name, F_I32, to, value);
    }
    const bool host =
        PyUnicode_Check(value) && (!PyUnicode_CompareWithASCIIString(value, "host") ||
                                   !PyUnicode_CompareWithASCIIString(value, "cpu"));
    const bool cuda =
        PyUnicode_Check(value) && !PyUnicode_CompareWithASCIIString(value, "cuda");
    if (!host && !cuda) {
        return epy_bad_argument("%s: must be %s", name, "\"host\" or \"cuda\"");
    }
    *to = cuda ? EP_DEVICE_CUDA : EP_DEVICE_HOST;
    return 0;
}

static int read_tensors(struct frame *f, const char *name, bool out, int count, void *to,
                        PyObject *value) {
    struct ep_tensor **slots = to;
    if (count == 1 || !PyTuple_Check(value)) {
        return read_tensor(f, name, out, slots, value);
    }
    if (PyTuple_Size(value) > count) {
        return epy_bad_argument("%s: more tensors than %s", name, "the call takes");
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(value); i++) {
        PyObject *item = PyTuple_GetItem(value, i);
        if (item != Py_None && read_tensor(f, name, out, &slots[i], item)) {
            return -1;
        }
    }
    return 0;
}

int epy_set_value(struct frame *f, const char *name, enum kind kind, int count, void *to,
                  PyObject *value) {
    ep_dtype dtype;
    if (value == Py_None) {
        return 0;
    }
    switch (kind) {
    case F_I32:
    case F_U32:
    case F_I64:
    case F_U64:
        return read_int(name, kind, to, value);
    case F_IN:
    case F_OUT:
        return read_tensors(f, name, kind == F_OUT, count, to, value);
    case F_STR:
        return read_text(f, name, to, value);
    case F_DEVICE:
        return read_device(name, to, value);
    case F_DTYPE:
        if (epy_read_dtype(value, name, &dtype)) {
            return -1;
        }
        *(intptr_t *)to = dtype;
        return 0;
    case F_I32S:
        return read_ints(f, name, to, value);
    case F_ALLGATHER:
        if (!PyCallable_Check(value)) {
            return epy_bad_argument("%s: must be %s", name, "callable");
        }
        f->allgather = value;
        return 0;
    case F_WORLD:
        return epy_read_object(name, NODE_WORLD, to, &f->world, value);
    case F_STREAM:
        return epy_read_object(name, NODE_STREAM, to, &f->stream, value);
    case F_EVENT:
        return epy_read_object(name, NODE_EVENT, to, NULL, value);
    case F_WHERE:
        return read_stream(f, to, value);
    default:
        PyErr_Format(PyExc_TypeError, "%s: cannot be given", name);
        return -1;
    }
}

/* The name of a call as its errors say it. */
static int unknown_keyword(struct frame *f, const struct record *record, struct call *call,
                           PyObject *key) {
    PyObject *known = PyUnicode_FromString("");
    for (int i = 0; record && known && i < record->num_fields; i++) {
        PyObject *longer = PyUnicode_FromFormat("%U %s", known, record->fields[i].name);
        Py_DECREF(known);
        known = longer;
    }
    for (int i = 0; call && known && i < call->num_params; i++) {
        if (call->params[i].kind >= F_RECORD) {
            continue;
        }
        PyObject *longer = PyUnicode_FromFormat("%U %s", known, call->params[i].name);
        Py_DECREF(known);
        known = longer;
    }
    if (known) {
        PyErr_Format(PyExc_TypeError, "%s() has no keyword %R; it has:%U", f->name, key, known);
        Py_DECREF(known);
    }
    return -1;
}

static bool is_key(PyObject *key, PyObject *name) {
    return key == name || (PyUnicode_Check(key) && !PyUnicode_Compare(key, name));
}

static int set_keyword(struct frame *f, struct record *record, struct call *call, PyObject *key,
                       PyObject *value, int *next) {
    /* Keywords come in the order of the struct more often than not. */
    for (int i = 0, n = record ? record->num_fields : 0; i < n; i++) {
        struct field *field = &record->fields[(*next + i) % n];
        if (is_key(key, field->key)) {
            *next = (*next + i + 1) % n;
            return epy_set_value(f, field->name, field->kind, field->count,
                                 f->records[0] + field->offset, value);
        }
    }
    for (int i = 0; call && i < call->num_params; i++) {
        const struct param *p = &call->params[i];
        if (p->kind < F_RECORD && is_key(key, p->key)) {
            return epy_set_value(f, p->name, p->kind, 1, &f->arguments[i], value);
        }
    }
    return unknown_keyword(f, record, call, key);
}

/* A sequence is as long as ep.h says, or libep would read beyond it: one for each of num_experts. */
static int check_ints(struct frame *f, const struct record *record) {
    for (int i = 0; f->ints && i < record->num_fields; i++) {
        const struct field *field = &record->fields[i];
        if (!strcmp(field->name, "num_experts") &&
            *(int32_t *)(f->records[0] + field->offset) != f->num_ints) {
            return epy_bad_argument("%s: must have as many items as %s says", "expert_rank",
                                    field->name);
        }
    }
    return 0;
}

int epy_read_keywords(struct frame *f, struct record *record, struct call *call, PyObject *args,
                      PyObject *kwargs) {
    int next = 0, param = 0;
    for (Py_ssize_t i = 0, n = args ? PyTuple_Size(args) : 0; i < n; i++, param++) {
        while (call && param < call->num_params && call->params[param].kind >= F_RECORD) {
            param++;
        }
        if (record || !call || param >= call->num_params) {
            PyErr_Format(PyExc_TypeError, "%s() takes %s", f->name,
                         record ? "its arguments by keyword" : "fewer arguments");
            return -1;
        }
        const struct param *p = &call->params[param];
        if (epy_set_value(f, p->name, p->kind, 1, &f->arguments[param],
                          PyTuple_GetItem(args, i))) {
            return -1;
        }
    }
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (kwargs && PyDict_Next(kwargs, &at, &key, &value)) {
        if (set_keyword(f, record, call, key, value, &next)) {
            return -1;
        }
    }
    return check_ints(f, record);
}

void epy_end_frame(struct frame *f) {
    Py_XDECREF(f->holds);
    free(f->ints);
}

/* ---- results ------------------------------------------------------------------------------ */

static PyObject *field_value(const struct field *field, const char *from) {
    switch (field->kind) {
    case F_I32:
        return PyLong_FromLong(*(const int32_t *)from);
    case F_U32:
        return PyLong_FromUnsignedLong(*(const uint32_t *)from);
    case F_I64:
        return PyLong_FromLongLong(*(const int64_t *)from);
    case F_U64:
        return PyLong_FromUnsignedLongLong(*(const uint64_t *)from);
    case F_TEXT:
        return PyUnicode_DecodeUTF8(from, (Py_ssize_t)strlen(from), "replace");
    case F_STATUS:
        return PyUnicode_FromString(ep_status_string(*(const int32_t *)from));
    default:
        Py_RETURN_NONE;
    }
}

static PyObject *fields_of(const struct record *r, const void *from) {
    PyObject *fields = PyDict_New();
    for (int i = 0; fields && i < r->num_fields; i++) {
        PyObject *v = field_value(&r->fields[i], (const char *)from + r->fields[i].offset);
        if (!v || PyDict_SetItem(fields, r->fields[i].key, v)) {
            Py_DECREF(fields);
            fields = NULL;
        }
        Py_XDECREF(v);
    }
    return fields;
}

static PyObject *result_of(struct frame *f, const struct call *call, ep_status st) {
    for (int i = 0; i < call->num_params; i++) {
        const struct param *p = &call->params[i];
        if (p->kind == F_RESULT) {
            return epy_make_record(p->record->name, fields_of(p->record, f->arguments[i]));
        }
        if (p->kind == F_RESULT_I64) {
            return PyLong_FromLongLong(*(int64_t *)f->arguments[i]);
        }
    }
    if (call->tells) {
        return PyBool_FromLong(st == EP_OK);
    }
    Py_RETURN_NONE;
}

/* ---- the call ----------------------------------------------------------------------------- */

static struct record *set_up(struct frame *f, const struct call *call) {
    struct record *record = NULL;
    int num = 0;
    for (int i = 0; i < call->num_params; i++) {
        const struct param *p = &call->params[i];
        if (p->kind == F_RECORD || p->kind == F_RESULT) {
            /* What is read comes first in every function of ep.h. */
            memcpy(f->records[num], p->record->init, p->record->size);
            f->arguments[i] = f->records[num++];
            record = p->kind == F_RECORD ? p->record : record;
        } else if (p->kind == F_RESULT_I64) {
            f->arguments[i] = f->records[1];
        }
    }
    return record;
}

/* A CUDA group's work goes where the library of its tensors works, unless the caller says. */
static int choose_stream(struct frame *f, const struct call *call) {
    const bool wanted = !f->has_stream && f->source.device == EP_DEVICE_CUDA;
    for (int i = 0; i < call->num_params && wanted; i++) {
        if (call->params[i].kind == F_WHERE) {
            return epy_current_stream(&f->source, &f->arguments[i]);
        }
    }
    return 0;
}

ep_status epy_run(struct frame *f, const struct call *call) {
    void *ptr = f->self ? f->self->node->ptr : NULL;
    if (f->self) {
        f->self->busy++;
    }
    if (f->stream) {
        f->stream->busy++;
    }
    PyThreadState *thread = PyEval_SaveThread();
    const ep_status st = call->run(ptr, f->arguments);
    PyEval_RestoreThread(thread);
    if (f->self) {
        f->self->busy--;
    }
    if (f->stream) {
        f->stream->busy--;
    }
    return st;
}

void epy_fill_in(struct tensor *t, struct object *group) {
    if (t->node) {
        epy_let_go(t->node, false);
    }
    epy_hold(group->node);
    t->node = group->node;
    t->device = group->device;
    t->device_index = ep_group_device_index(group->node->ptr);
}

/* What queued work uses: the values of the keywords, and what keeps them exported. */
static int keep_for_queue(struct frame *f, PyObject *kwargs) {
    PyObject *values = kwargs ? PyDict_Values(kwargs) : NULL;
    if (kwargs && (!values || keep(f, values))) {
        Py_XDECREF(values);
        return -1;
    }
    Py_XDECREF(values);
    return f->holds ? epy_keep_until_run(f->stream, f->holds) : 0;
}

PyObject *epy_call(PyObject *self, PyObject *args, PyObject *kwargs, struct call *call) {
    struct frame f;
    memset(&f, 0, offsetof(struct frame, records));
    memset(&f.num_tensors, 0, sizeof(f) - offsetof(struct frame, num_tensors));
    f.name = call->name;
    f.self = (struct object *)self;
    if (self && !epy_ready(f.self)) {
        return NULL;
    }
    PyObject *result = NULL;
    struct record *record = set_up(&f, call);
    const int told = epy_read_keywords(&f, record, call, args, kwargs);
    if (!told && epy_is_preparing()) {
        result = epy_prepare(&f, call, record) ? NULL : Py_BuildValue("");
    } else if (!told && !choose_stream(&f, call)) {
        const ep_status st = epy_run(&f, call);
        if (st == EP_OK || st == EP_AGAIN) {
            for (int i = 0; i < f.num_blanks; i++) {
                epy_fill_in(f.blanks[i], epy_is(self, NODE_GROUP) ? f.self : f.self->parent);
            }
            result = result_of(&f, call, st);
        } else {
            epy_raise(st, f.self);
        }
        if (f.stream && record && keep_for_queue(&f, kwargs)) {
            Py_XDECREF(result);
            result = NULL;
        }
    }
    if (self && f.self->node && f.self->node->kind == NODE_STREAM) {
        epy_forget_run(f.self->node);
    }
    epy_end_frame(&f);
    return result;
}
