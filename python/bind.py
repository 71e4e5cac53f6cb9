#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""bind.py EP_H OUT: makes the tables of the extension module from the public header.

Writes OUT/bindings.h, which python/ep/src/call.c and objects.c include, and OUT/_ep.pyi. A struct
of ep.h becomes a record with its fields by name, a function that takes a group, a handle, a stream
or an event becomes a method whose keywords are those fields. What it does not understand it leaves
out and lists in `_ep.unbound`, which a test compares with nothing.
"""
import re
import sys
from pathlib import Path

OBJECTS = {"ep_world": "World", "ep_group": "Group", "ep_handle": "Handle",
           "ep_stream": "Stream", "ep_event": "Event"}
# Written by hand in python/ep/src: they make or end objects, call back, or fill arrays.
BY_HAND = re.compile(r"ep_(\w+_(create|destroy)|version|status_string|last_error|dtype_bytes|"
                     r"tensor_[12]d|stream_run|handle_counts|handle_arena)$")
FIELD_KINDS = {
    "int32_t": "I32", "uint32_t": "U32", "int64_t": "I64", "uint64_t": "U64",
    "const struct ep_tensor *": "IN", "struct ep_tensor *": "OUT", "const char *": "STR",
    "char": "TEXT", "ep_world *": "WORLD", "ep_allgather_fn": "ALLGATHER",
    "const int32_t *": "I32S",
}
VALUE_KINDS = {"int": "I32", "int32_t": "I32", "uint32_t": "U32", "int64_t": "I64",
               "ep_dtype": "DTYPE", "const struct ep_tensor *": "IN", "struct ep_tensor *": "OUT"}
SPECIAL = {("ep_group_config", "device"): "DEVICE", ("ep_fault", "status"): "STATUS"}
PYTHON = {"I32": "int", "U32": "int", "I64": "int", "U64": "int", "IN": "Array", "OUT": "Array",
          "STR": "str", "TEXT": "str", "I32S": "Sequence[int]",
          "ALLGATHER": "Callable[[bytes], Sequence[bytes]]", "DEVICE": "Union[str, int]",
          "STATUS": "str", "DTYPE": "Any", "WHERE": "StreamLike"}
PYTHON.update({cls.upper(): "_" + cls for cls in OBJECTS.values()})


def split_type(declaration):
    """`const struct ep_tensor *x` becomes its type, its name and the length of an array."""
    m = re.match(r"(.*?)(\w+)(?:\[(\w+)\])?$", " ".join(declaration.split()))
    return m.group(1).strip(), m.group(2), m.group(3)


class Header:
    def __init__(self, text):
        self.unbound = []
        self.defines = dict(re.findall(r"^#define (EP_\w+) (\d+)u?\b", text, re.M))
        text = re.sub(r"^[ \t]*#.*?(?<!\\)$", "", text, flags=re.M | re.S)
        self.enums = {}
        for body in re.findall(r"enum \w+ \{(.*?)\}", text, re.S):
            self.enums.update(re.findall(r"(EP_\w+) = (-?\d+)", body))
        self.records = {}
        self.comments = {}
        for comment, name, body in re.findall(
                r"(?:/\*((?:(?!\*/).)*)\*/\s*)?struct (ep_\w+) \{(.*?)\n\};", text, re.S):
            self.comments[name] = comment
            if name != "ep_tensor":
                self.records[name] = self.fields(name, body)
        self.functions = []
        prototype = re.compile(r"(?:/\*((?:(?!\*/).)*)\*/\s*)?^(ep_status|int|void \*) ?(ep_\w+)"
                           r"\(([^;{}]*?)\);", re.S | re.M)
        for comment, result, name, params in prototype.findall(text):
            self.comments[name] = comment
            if not BY_HAND.match(name):
                self.functions.append(self.function(comment, result, name, params))
        self.functions = [f for f in self.functions if f]

    def fields(self, record, body):
        found = []
        body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
        for declaration in filter(None, (d.strip() for d in body.split(";"))):
            kind, name, count = split_type(declaration)
            if name in ("size", "reserved", "allgather_ctx"):
                continue
            kind = SPECIAL.get((record, name), FIELD_KINDS.get(kind))
            if not kind:
                self.unbound.append(f"struct {record}: {declaration}")
                continue
            found.append((name, kind, count or "1"))
        return found

    def function(self, comment, result, name, params):
        """(class, method, result, parameters, comment), or None where it is beyond the tables."""
        params = [split_type(p) for p in params.replace("\n", " ").split(",")]
        first = params[0][0].replace("const ", "").rstrip(" *")
        cls = OBJECTS.get(first)
        taken = []
        for kind, word, _ in params[1 if cls else 0:]:
            record = re.match(r"(const )?struct (ep_\w+) \*$", kind)
            if kind == "void *" and word == "stream":
                taken.append(("WHERE", word, None))
            elif kind in VALUE_KINDS:
                taken.append((VALUE_KINDS[kind], word, None))
            elif record and record.group(2) in self.records:
                taken.append(("RECORD" if record.group(1) else "RESULT", word, record.group(2)))
            elif kind == "int64_t *":
                taken.append(("RESULT_I64", word, None))
            elif kind.rstrip(" *") in OBJECTS:
                taken.append((OBJECTS[kind.rstrip(" *")].upper(), word, None))
            else:
                self.unbound.append(f"{name}: {kind} {word}")
                return None
        if result != "ep_status" and (taken or not cls):
            self.unbound.append(f"{result} {name}")
            return None
        method = name[3:]
        if cls and method.startswith(cls.lower() + "_"):
            method = method[len(cls) + 1:]
        return cls, method, result, name, taken, comment


def plain(comment):
    """A comment of the header as the text of a docstring."""
    lines = [re.sub(r"^\s*\* ?", "", line).rstrip() for line in comment.strip("* \n").split("\n")]
    return "\n".join(lines).strip()


def quoted(text):
    return "\n".join('    "%s\\n"' % line.replace("\\", "\\\\").replace('"', '\\"')
                     for line in text.split("\n"))


ARGUMENT = {"I32": "(int32_t)(intptr_t)", "U32": "(uint32_t)(uintptr_t)", "I64": "(int64_t)(intptr_t)",
            "DTYPE": "(ep_dtype)(intptr_t)"}


def write_records(h, out):
    for name, fields in h.records.items():
        macro = name.upper() + "_INIT"
        out.append(f"static const struct {name} init_{name} = {macro};")
        out.append(f"static struct field fields_{name}[] = {{")
        for field, kind, count in fields:
            length = count if kind != "TEXT" else "1"
            out.append(f'    {{"{field}", F_{kind}, {length}, offsetof(struct {name}, {field}), NULL}},')
        out.append("};")
        out.append(f'static struct record record_{name} = {{"{name[3:]}", sizeof(struct {name}), '
                   f"&init_{name}, fields_{name}, {len(fields)}}};")
        out.append(f"_Static_assert(sizeof(struct {name}) <= MAX_RECORD, \"{name}\");")


def write_functions(h, out):
    methods = {}
    for cls, method, result, name, params, comment in h.functions:
        key = f"{(cls or 'module').lower()}_{method}"
        doc = "\n\n".join(filter(None, [plain(comment)] + [
            plain(h.comments[r]) for kind, _, r in params if r]))
        out.append(f"static const char doc_{key}[] =\n{quoted(doc)};")
        if result != "ep_status":
            made = "PyLong_FromVoidPtr" if result == "void *" else "PyLong_FromLong"
            out.append(f"static PyObject *m_{key}(PyObject *self, void *unused) {{\n"
                       f"    (void)unused;\n    struct object *o = (struct object *)self;\n"
                       f"    return epy_ready(o) ? {made}({name}(o->node->ptr)) : NULL;\n}}")
            methods.setdefault(cls + "_GETTERS", []).append(
                f'{{"{method}", m_{key}, NULL, doc_{key}, NULL}},')
            continue
        arguments = ["self"] if cls else []
        for i, (kind, _, _) in enumerate(params):
            arguments.append(f"{ARGUMENT.get(kind, '')}a[{i}]")
        out.append(f"static ep_status t_{key}(void *self, void **a) {{\n    (void)self;\n"
                   f"    (void)a;\n    return {name}({', '.join(arguments)});\n}}")
        out.append(f"static struct param p_{key}[] = {{")
        for kind, word, record in params:
            out.append(f'    {{"{word}", F_{kind}, {"&record_" + record if record else "NULL"}, NULL}},')
        out.append("    {NULL, F_NONE, NULL, NULL}};")
        told = "true" if "EP_AGAIN" in comment else "false"
        owner = f"{cls}." if cls else ""
        out.append(f'static struct call c_{key} = {{"{owner}{method}", p_{key}, {len(params)}, '
                   f"t_{key}, {told}}};")
        out.append(f"static PyObject *m_{key}(PyObject *self, PyObject *args, PyObject *kwargs) {{\n"
                   f"    return epy_call({'self' if cls else 'NULL'}, args, kwargs, &c_{key});\n}}"
                   if cls else
                   f"static PyObject *m_{key}(PyObject *self, PyObject *args, PyObject *kwargs) {{\n"
                   f"    (void)self;\n    return epy_call(NULL, args, kwargs, &c_{key});\n}}")
        methods.setdefault((cls or "MODULE") + "_METHODS", []).append(
            f'{{"{method}", (PyCFunction)(void (*)(void))m_{key}, METH_VARARGS | METH_KEYWORDS, '
            f"doc_{key}}},")
    for cls in list(OBJECTS.values()) + ["MODULE"]:
        for what in "_METHODS", "_GETTERS":
            rows = " \\\n    ".join(methods.get(cls + what, []))
            out.append(f"#define {(cls + what).upper()} {rows}")


def write_tables(h):
    out = ["/* Made by python/bind.py from include/ep.h. */"]
    write_records(h, out)
    out.append("static struct record *const all_records[] = {" + ", ".join(
        f"&record_{name}" for name in h.records) + "};")
    for name in "ep_group_config", "ep_handle_counts", "ep_handle_arena":
        out.append(f"static const char doc_{name}[] =\n{quoted(plain(h.comments[name]))};")
    write_functions(h, out)
    out.append("static struct call *const all_calls[] = {" + ", ".join(
        f"&c_{(c or 'module').lower()}_{m}" for c, m, r, *_ in h.functions if r == "ep_status") + "};")
    out.append("static const struct { const char *name; long value; } all_numbers[] = {")
    for name, value in list(h.enums.items()) + list(h.defines.items()):
        out.append(f'    {{"{name[3:]}", {value}}},')
    out.append("};")
    out.append("static const char *const all_unbound[] = {" +
               "".join(f'"{u}", ' for u in h.unbound) + "NULL};")
    return "\n".join(out) + "\n"


STUB_HEAD = '''# Made by python/bind.py from include/ep.h, whose comments are the documentation.
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

Array = Any  # a torch tensor, a Tensor, or anything with __dlpack__
StreamLike = Union[None, int, "_Stream", Any]

class Tensor:
    """Memory with a shape and one of libep's types. Without arguments: blank, to be filled in by a
    dispatch with DISPATCH_ARENA. With an array and a type: that array as another type of the same
    size, or a part of it from a byte on, for arguments of calls."""
    def __init__(self, array: Optional[Array] = ..., dtype: Any = ...,
                 shape: Optional[Tuple[int, ...]] = ..., offset: int = ...) -> None: ...
    @property
    def shape(self) -> Tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def data_ptr(self) -> int: ...
    def __dlpack__(self, *, stream: Any = ..., max_version: Any = ..., dl_device: Any = ...,
                   copy: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> Tuple[int, int]: ...

class Prepared:
    """The call of a method with these keywords, whose tensors all lie in the arrays. Called with a
    stream and other such arrays it does the same with those. None: one of them is not alike, and nothing
    was done. Else arrays that are parts of the first one's memory, of a type (ep.I32, ...), a shape, and
    from a byte on, or None, for all of it as a Tensor; or () where its library has no functions for that. With `make` the first array may be
    None: then it is one that make() has returned, lent again when all its parts are gone, to calls on the
    same stream."""
    def __init__(self, method: Any, arrays: Tuple[Array, ...],
                 parts: Tuple[Optional[Tuple[int, Tuple[int, ...], int]], ...],
                 keywords: Dict[str, Any],
                 make: Optional[Callable[[], Array]] = ...) -> None: ...
    def __call__(self, stream: Optional[int],
                 *arrays: Optional[Array]) -> Optional[Tuple[Any, ...]]: ...

unbound: List[str]
def path_of(array: Array) -> str: ...
def set_hooks(make_error: Callable[..., BaseException], make_record: Callable[..., Any]) -> None: ...
def leave() -> None: ...
def version() -> str: ...
'''
STUB_HAND = {
    "World": "    def __init__(self, num_ranks: int) -> None: ...\n",
    "Group": "    @property\n    def device(self) -> str: ...\n"
             "    @property\n    def ll_max_tokens(self) -> int: ...\n",
    "Handle": "    @property\n    def group(self) -> Any: ...\n"
              "    def counts(self) -> Any: ...\n"
              "    def arena(self, dtype: Any, cols: int, expanded: bool = ...) -> Tensor: ...\n",
    "Stream": "    def __init__(self, group: _Group) -> None: ...\n"
              "    def run(self, function: Callable[[], Any]) -> None: ...\n",
    "Event": "    def __init__(self, group: _Group) -> None: ...\n",
}


def keywords(h, params):
    words = []
    for kind, word, record in params:
        if kind == "RECORD":
            words += [f"{f}: Optional[{stub_type(k, n)}] = ..." for f, k, n in h.records[record]]
        elif not kind.startswith("RESULT"):
            words.append(f"{word}: {PYTHON[kind]} = ...")
    return ", ".join(["*"] + words) if words else ""


def stub_type(kind, count):
    return f"Tuple[{PYTHON[kind]}, ...]" if count != "1" and kind in ("IN", "OUT") else PYTHON[kind]


def write_stub(h):
    out = [STUB_HEAD]
    for name, value in list(h.enums.items()) + list(h.defines.items()):
        out.append(f"{name[3:]}: int")
    for cls in list(OBJECTS.values()) + [None]:
        indent = "    " if cls else ""
        if cls:
            out.append(f"class _{cls}:\n{STUB_HAND[cls]}    def destroy(self) -> None: ...")
        made = {"Group": "group_config", "Handle": "handle_config"}.get(cls)
        if made:
            words = keywords(h, [("RECORD", "", "ep_" + made)])
            group = "" if cls == "Group" else "group: _Group, "
            out.append(f"    def __init__(self, {group}{words}) -> None: ...")
        for owner, method, result, _, params, comment in h.functions:
            if owner != cls:
                continue
            if result != "ep_status":
                out.append(f"    @property\n    def {method}(self) -> int: ...")
                continue
            kinds = [kind for kind, _, _ in params]
            back = ("int" if "RESULT_I64" in kinds else "Any" if "RESULT" in kinds else
                    "bool" if "EP_AGAIN" in comment else "None")
            words = ", ".join(filter(None, ["self" if cls else "", keywords(h, params)]))
            out.append(f"{indent}def {method}({words}) -> {back}: ...")
    return "\n".join(out) + "\n"


def main(header, folder):
    h = Header(Path(header).read_text())
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "bindings.h").write_text(write_tables(h))
    (Path(folder) / "_ep.pyi").write_text(write_stub(h))


if __name__ == "__main__":
    main(*sys.argv[1:3])
