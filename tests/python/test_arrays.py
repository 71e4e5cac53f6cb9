# SPDX-License-Identifier: MIT
"""How arrays are read: each of the three ways, and libep's own tensors."""
import gc

import numpy as np
import pytest

import ep
from conftest import E, H, K, T, Case


class Methods:
    """What torch's tensors had before they had functions in C."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype, self.is_cuda = array.shape, "torch." + str(array.dtype), False

    def data_ptr(self):
        return self.array.__array_interface__["data"][0]

    def stride(self):
        return tuple(s // self.array.itemsize for s in self.array.strides)


class Old:
    """An array whose __dlpack__ knows no keywords."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def with_torch(array):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array)


def with_old_torch(array):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array).as_subclass(
        type("OldTensor", (torch.Tensor,), {"__dlpack_c_exchange_api__": None}))


WAYS = [(np.asarray, "dlpack"), (Old, "dlpack"), (Methods, "methods"), (with_old_torch, "methods"),
        (with_torch, "exchange")]


@pytest.mark.parametrize("wrap, way", WAYS)
def test_every_way_reads_the_same(ranks, wrap, way):
    case = Case(2, seed=3)
    wrap(case.x[0])  # skips here, and not in a rank's thread
    if way == "exchange" and not hasattr(type(wrap(case.x[0])), "__dlpack_c_exchange_api__"):
        way = "methods"

    def rank(group):
        r = group.rank
        x = wrap(case.x[r])
        assert ep.path_of(x) == way
        handle = ep.Handle(group)
        columns = np.asfortranarray(case.ids[r])  # any strides
        handle.route(wrap(columns))
        got, out = np.zeros((2 * T, H), np.float32), np.zeros((T, H), np.float32)
        num_rows = np.zeros((), np.int32)
        handle.dispatch(x=x, recv_x=wrap(got), num_rows=wrap(num_rows))
        assert num_rows == len(case.received(r))
        assert (got[:num_rows] == case.rows(r)).all()
        handle.combine(x=wrap(got), out=wrap(out))
        assert (out == case.x[r] * case.copies(r)).all()

    ranks(2, rank)


@pytest.mark.parametrize("dtype, known", [
    ("uint8", "u8"), ("int8", "u8"), ("bool", "u8"), ("int16", "i16"), ("uint16", "i16"),
    ("int32", "i32"), ("int64", "i64"), ("float16", "f16"), ("float32", "f32")])
def test_types_of_elements(dtype, known):
    array = np.zeros((2, 3), dtype)
    for wrap in np.asarray, Methods:
        if wrap is np.asarray and dtype == "bool" and np.lib.NumpyVersion(np.__version__) < "1.25.0":
            continue
        tensor = ep.Tensor(wrap(array))
        assert (tensor.dtype, tensor.shape) == (known, (2, 3))
        assert tensor.data_ptr() == array.__array_interface__["data"][0]
    for wrap in np.asarray, Methods:
        with pytest.raises(TypeError, match="array: libep has no type"):
            ep.Tensor(wrap(np.zeros(3)))


def test_types_of_torch():
    torch = pytest.importorskip("torch")
    names = {"bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "f8e4m3",
             "float8_e5m2": "f8e5m2", "float8_e8m0fnu": "u8", "uint8": "u8", "bool": "u8"}
    for name, known in names.items():
        if not hasattr(torch, name):  # an older one
            continue
        tensor = torch.zeros(4, 16, dtype=torch.uint8)[:, :8].view(getattr(torch, name)) \
            if name.startswith("float8") else torch.zeros(4, 8, dtype=getattr(torch, name))
        assert ep.Tensor(tensor).dtype == known
        old = tensor.as_subclass(type("Old", (torch.Tensor,), {"__dlpack_c_exchange_api__": None}))
        assert (ep.path_of(old), ep.Tensor(old).dtype) == ("methods", known)
        assert ep.Tensor(old).data_ptr() == tensor.data_ptr()
        assert ep.Tensor(tensor, getattr(torch, name)).dtype == known
    with pytest.raises(TypeError, match="libep has no type"):
        ep.Tensor(torch.zeros(2, dtype=torch.complex64))


def test_an_array_seen_as_another_type(ranks):
    case = Case(1)

    def rank(group):
        handle = ep.Handle(group)
        handle.route(case.ids[0])
        bits = (case.x[0].view(np.uint32) >> 16).astype(np.uint16)  # small integers are exact
        got, out = np.zeros((T, H), np.uint16), np.zeros((T, H), np.uint16)
        handle.dispatch(x=bits, recv_x=got)
        handle.combine(x=ep.Tensor(got, "bf16"), out=ep.Tensor(out, "bf16"))
        expected = case.x[0] * case.copies(0)
        assert ((out.astype(np.uint32) << 16).view(np.float32) == expected).all()

    ranks(1, rank)
    with pytest.raises(ValueError, match="elements of f32 cannot be seen as bf16"):
        ep.Tensor(case.x[0], "bf16")


def test_parts_of_an_array_have_their_own_types_and_shapes(ranks):
    memory = np.zeros(100, np.int64)
    part = ep.Tensor(memory, "i32", (3, 4), 16)
    assert (part.dtype, part.shape, part.data_ptr() - memory.ctypes.data) == ("i32", (3, 4), 16)
    assert ep.Tensor(memory, "u8", (800,)).shape == (800,) and ep.Tensor(memory, None, (5, 20))
    assert ep.Tensor(memory, "u8", (0, 7), 700).shape == (0, 7)
    for shape, offset in (((801,), 0), ((3, 4), 800 - 47), ((2 ** 62, 2 ** 62), 0), ((-1,), 0), ((1,), -8),
                          ((1,), 2 ** 62)):
        with pytest.raises(ValueError, match="is not in the 800 bytes"):
            ep.Tensor(memory, "i32" if offset > 0 else "u8", shape, offset)
    with pytest.raises(ValueError, match="not contiguous"):
        ep.Tensor(memory[::2], None, (50,))
    with pytest.raises(ValueError, match="dtype: 99 is none"):
        ep.Tensor(memory, 99, (1,))
    with pytest.raises(ValueError, match="dimensions"):
        ep.Tensor(memory, None, (1, 1, 1, 1, 100))


def test_read_only_and_impossible_arrays_are_refused(ranks):
    def rank(group):
        handle = ep.Handle(group)
        handle.route(np.zeros((T, K), np.int64))
        x = np.zeros((T, H), np.float32)
        fixed = x.copy()
        fixed.flags.writeable = False
        with pytest.raises((ep.ArgumentError, BufferError), match="(?i)read.?only"):
            handle.dispatch(x=x, recv_x=fixed)
        with pytest.raises(ValueError, match="has 5 dimensions; at most 4"):
            handle.dispatch(x=np.zeros((1, 1, 1, 1, 1), np.float32))
        with pytest.raises(ep.ArgumentError, match="x: lies on a GPU"):
            elsewhere = Methods(x)
            elsewhere.is_cuda, elsewhere.get_device = True, lambda: 0
            handle.dispatch(x=elsewhere)

    ranks(1, rank)


@pytest.mark.skipif(not hasattr(np, "from_dlpack"), reason="numpy without from_dlpack")
def test_views_of_the_arena_outlive_the_group(ranks):
    case = Case(2, seed=5)

    def rank(group):
        r = group.rank
        handle = ep.Handle(group)
        handle.route(case.ids[r])
        view = ep.Tensor()
        handle.dispatch(x=case.x[r], recv_x=view, flags=ep.DISPATCH_ARENA)
        answers = handle.arena("f32", H)
        assert answers.data_ptr() == view.data_ptr() and answers.dtype == "f32"
        assert view.shape == (len(case.received(r)), H)
        seen = np.from_dlpack(view)
        out = np.zeros((T, H), np.float32)
        handle.combine(x=view, out=out)
        assert (out == case.x[r] * case.copies(r)).all()
        group.destroy()
        with pytest.raises(ep.StateError, match="destroyed"):
            handle.status()
        del view, answers, handle
        gc.collect()
        return seen

    for r, seen in enumerate(ranks(2, rank)):
        assert (seen == case.rows(r)).all()


def test_a_blank_tensor_is_not_exported():
    with pytest.raises(BufferError, match="blank"):
        ep.Tensor().__dlpack__()
