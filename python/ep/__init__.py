# SPDX-License-Identifier: MIT
"""libep: expert-parallel communication. Rows of tokens to the ranks of their experts, and back.

    import ep
    group = ep.Group(num_experts=256, max_tokens=4096, max_topk=8, max_row_bytes=14336)
    handle = ep.Handle(group)
    handle.route(topk_ids=topk_ids)
    received = ep.dispatch(handle, x)              # rows of all ranks for this rank's experts
    y = ep.combine(handle, experts(received.x))    # their answers, summed per token

World, Group, Handle, Stream and Event are ep.h's objects, one to one: the keywords of a method are
the fields of its struct, a tensor is one of torch, or anything with __dlpack__, None is NULL, and
the documentation of a method is the header's. Errors are exceptions with libep's own sentence.
dispatch, combine, ll_dispatch and ll_combine make the outputs as well. ep.torch has both as functions
that autograd knows.

`stream` is None, an ep.Stream (host groups), or a CUDA stream as a number or an object of torch's; a
CUDA group's work goes by default to the stream on which the tensors' library works. What a call on an
ep.Stream uses is kept alive until it has run; of CUDA streams that is the caller's to see to.

Importing this opens nothing and needs no device.
"""
import atexit as _atexit
from types import TracebackType as _TracebackType
from typing import Any as _Any, Optional as _Optional, Type as _Type

from . import _ep
from ._ep import *  # noqa: F401,F403  (EP_BF16 of the header is ep.BF16, and so on)
from ._ep import (
    Tensor as Tensor, plan as plan, version as version)
from ._errors import (
    ArgumentError as ArgumentError, CapacityError as CapacityError,
    Counts as Counts, Error as Error, Fault as Fault,
    FaultedError as FaultedError, InternalError as InternalError,
    InterruptedError_ as InterruptedError_, MismatchError as MismatchError,
    OutOfMemoryError as OutOfMemoryError, PeerError as PeerError, Plan as Plan,
    StateError as StateError, Stats as Stats, SystemError_ as SystemError_,
    TimeoutError_ as TimeoutError_, UnsupportedError as UnsupportedError,
    VersionError as VersionError, make_error as _make_error,
    make_record as _make_record)
from ._operations import (
    LowLatency as LowLatency, Received as Received, combine as combine,
    dispatch as dispatch, ll_combine as ll_combine, ll_dispatch as ll_dispatch)

__version__ = _ep.version()
_ep.set_hooks(_make_error, _make_record)
_atexit.register(_ep.leave)


class World(_ep._World):
    __doc__ = _ep._World.__doc__
    __slots__ = ("__weakref__",)


class Group(_ep._Group):
    __doc__ = _ep._Group.__doc__
    __slots__ = ("__weakref__",)

    def fault(self) -> _Optional[Fault]:
        """What ended the group, or None."""
        fault = super().fault()
        return None if fault.status == "EP_OK" else fault

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: _Optional[_Type[BaseException]], value: _Optional[BaseException],
                 trace: _Optional[_TracebackType]) -> None:
        self.destroy()


class Handle(_ep._Handle):
    __doc__ = _ep._Handle.__doc__
    __slots__ = ("tokens", "topk", "__weakref__")

    def route(self, topk_ids: _Any = None, token_in_rank: _Any = None, stream: _Any = None,
              **fields: _Any) -> None:
        super().route(topk_ids=topk_ids, token_in_rank=token_in_rank, stream=stream, **fields)
        routing = token_in_rank if topk_ids is None else topk_ids
        shape = routing.shape if hasattr(routing, "shape") else Tensor(routing).shape
        self.tokens: int = shape[0]
        self.topk: int = 0 if topk_ids is None else shape[1]

    route.__doc__ = _ep._Handle.route.__doc__


class Stream(_ep._Stream):
    __doc__ = _ep._Stream.__doc__
    __slots__ = ("__weakref__",)


class Event(_ep._Event):
    __doc__ = _ep._Event.__doc__
    __slots__ = ("__weakref__",)


def doctor() -> bool:
    """Says what works on this machine, what is missing and how to get it. Whether all is well."""
    from .__main__ import (
    run as run)
    return run(["doctor"]) == 0
