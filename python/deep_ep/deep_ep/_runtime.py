# SPDX-License-Identifier: MIT
"""
What stands behind a Buffer: libep's group, which is made when the first collective call has said
what it needs, grows where it lies when a dispatch has more tokens or rows, and is made again, larger,
when a call needs more of anything else; the streams; and what a handle's tensors stand for.
docs/decisions/0011-groups-of-deep-ep.md has the reasons.

All ranks decide alike to make a group: by what must be the same on all of them (experts, top-k, the
bytes of a row, the tokens of low-latency calls), or by EP_ERR_CAPACITY, which libep returns on all
ranks. They then exchange what each needs, by the process group.
"""
import contextlib
import logging
import threading

import ep
import torch

from ._config import NODE_RANKS, first_recv_rows, host_check
from ._layout import layout
from .utils import EventHandle, EventOverlap, on_cuda

log = logging.getLogger("deep_ep")
# Torch's own wrapper costs as much again.
is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)


# A group takes addresses for so many times its tokens and rows, and memory when it grows.
GROWTH = 8


class Routing:
    """What the tensors of a handle stand for: a handle of libep, or of a low-latency dispatch the
    memory that its combine needs, and answers for that if the caller has asked for a place to put
    them; and the rows of its inputs and outputs. The group lives as long as a handle of it."""

    __slots__ = ("group", "ep", "tokens", "rows", "memory", "answers")

    def __init__(self, group, ep_handle, tokens, rows, memory=None):
        self.group, self.ep, self.tokens, self.rows = group, ep_handle, tokens, rows
        self.memory, self.answers = memory, None

    def mark(self, tensors):
        """Lets find() come from any of these tensors to the routing, whatever tuple they are in."""
        for t in tensors:
            t.libep_routing = self
        return tensors

    @staticmethod
    def find(handle):
        for t in handle:
            routing = getattr(t, "libep_routing", None)
            if routing is not None:
                return routing
        raise RuntimeError("handle is none that dispatch() of this package has returned: none of its "
                           "elements is a tensor of such a handle (copies of them do not count)")


class Group:
    """A group of libep, with the stream that asynchronous calls of a host group run on."""

    def __init__(self, runtime, needs):
        tokens, rows = GROWTH * needs["max_tokens"], GROWTH * needs["max_recv_rows"]
        most = dict(max_tokens=tokens, max_recv_rows=min(rows, runtime.size * tokens))
        where = dict(rank=runtime.rank, num_ranks=runtime.size, allgather=runtime.gather,
                     device="cuda" if runtime.cuda else "host", device_index=runtime.device_index,
                     flags=ep.GROUP_LL_MASKS if runtime.masks else 0, **needs)
        try:
            self.ep, self.most = ep.Group(most_tokens=tokens, most_recv_rows=most["max_recv_rows"],
                                          **where), most
        except ep.UnsupportedError:  # GPUs that have other addresses for host memory than the host
            self.ep, self.most = ep.Group(**where), needs
        self.needs = needs
        self.plan = self.ep.plan()
        self.shapes = {}  # what low-latency calls of one shape have in common
        self._stream = self._layouts = None

    def holds(self, needs):
        return all(self.needs[name] >= n for name, n in needs.items())

    def grow(self, needs):
        """Where it lies: handles stay valid. Collective."""
        self.ep.grow(max_tokens=needs["max_tokens"], max_recv_rows=needs["max_recv_rows"])
        self.needs, self.plan = needs, self.ep.plan()

    def layouts(self):
        """The handle that layouts are computed with, one after the other."""
        if self._layouts is None:
            self._layouts = ep.Handle(self.ep, flags=ep.HANDLE_LENIENT_IDS)
        return self._layouts

    def host_stream(self):
        if self._stream is None:
            self._stream = ep.Stream(self.ep)
        return self._stream

    def host_event(self, check):
        """Marks the end of the work on the host stream, which keeps alive what it uses."""
        event = ep.Event(self.ep)
        event.record(self._stream)
        return EventHandle._of(event, self, check)


class Runtime:
    """The ranks of a Buffer and their newest group. Also deep_ep_cpp.Buffer."""

    def __init__(self, rank, size, gather, low_latency_mode, masks):
        self.rank, self.size, self.gather, self.masks = rank, size, gather, masks
        self.cuda = on_cuda()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else \
            torch.device("cpu")
        self.device_index = self.device.index if self.cuda else -1
        self.comm_stream = torch.cuda.Stream(priority=-1) if self.cuda else None
        self.lock = threading.RLock()
        self._group = None
        self._told = False  # that a dispatch was repeated
        self._captured = set()
        self._plain = PlainCall(self.current_stream)
        kinds = gather(self.device.type + (", low latency" if low_latency_mode else "") +
                       (", shrink" if masks else ""))
        host_check(len(set(kinds)) == 1, "the ranks make different Buffers: " + "; ".join(
            f"rank {r} {kind}" for r, kind in enumerate(kinds)))

    def current_stream(self):
        """As a number: what an object costs, a call without events need not pay."""
        return torch._C._cuda_getCurrentRawStream(self.device_index) if self.cuda else None

    def call(self, previous_event, async_finish, allocate_on_comm_stream):
        """A normal-mode call: most are plain, and shall not pay for what they do not use."""
        if previous_event is None and not async_finish and not allocate_on_comm_stream:
            return self._plain
        return Call(self, previous_event, async_finish, allocate_on_comm_stream)

    def keep_if_captured(self, used):
        """A graph is replayed when the objects of its capture, and larger groups, have come and gone:
        what its operations use must live on."""
        if self.cuda and is_capturing():
            self._captured.add(used)

    def is_available(self):
        return True

    def get_num_rdma_ranks(self):
        return -(-self.size // NODE_RANKS)

    def get_rdma_rank(self):
        return self.rank // NODE_RANKS

    def get_root_rdma_rank(self, is_global):
        return self.rank % NODE_RANKS if is_global else 0

    def get_local_device_id(self):
        return self.device_index

    def group_for(self, tokens=0, **needs):
        """The newest group if it has room for what is the same on all ranks, else a larger one, which
        all of them make, and then also for this rank's tokens."""
        group = self._group
        return group if group is not None and group.holds(needs) else \
            self.grow(dict(needs, max_tokens=max(tokens, needs.get("max_tokens", 0))))

    def layout(self, topk_idx, num_experts):
        tokens, topk = topk_idx.shape
        with self.lock:
            group = self._group
            known = group is not None and group.holds(
                dict(num_experts=num_experts, max_tokens=tokens, max_topk=topk))
            self.keep_if_captured(group)
            return layout(topk_idx, num_experts, self.size, group.layouts() if known else None)

    def grow(self, needs, lacking=None):
        """A group with room for more; `lacking` is what an operation of the last one has raised."""
        host_check(not (self.cuda and is_capturing()),
                   "this call needs a larger group of libep (" + _text(needs) + "), which cannot be "
                   "made while a graph is captured: do the call once before the capture")
        group, old = self._group, self._group.needs if self._group else {}
        # What a dispatch lacks all ranks know; what a new group is for, each rank has to say.
        agreed = self._agreed(old, needs)
        in_place = lacking is not None and all(agreed[n] <= group.most[n]
                                               for n in ("max_tokens", "max_recv_rows"))
        if in_place:
            group.grow(agreed)
        else:
            agreed = self._agreed(old, *self.gather(needs))
            group = self._group = Group(self, agreed)
        if self.rank == 0:
            said, self._told = self._told, self._told or lacking is not None
            log.log(logging.WARNING if self._told and not said else logging.INFO,
                    "%s group of libep: %s; its arena has %d bytes on each rank%s",
                    "grew the" if in_place else "made a larger" if old else "made a", _text(agreed),
                    group.plan.arena_bytes,
                    f" (a dispatch is repeated: {lacking})" if lacking else "")
        return group

    def _agreed(self, *needs):
        """The largest of all, and some room: tokens differ from call to call, and groups are to be
        few."""
        most = {name: max(n.get(name, 0) for n in needs) for name in (
            "num_experts", "max_tokens", "max_topk", "max_row_bytes", "max_scale_bytes",
            "ll_max_tokens", "mask_routing", "max_recv_rows")}
        tokens = most["max_tokens"] = max(64, 1 << (most["max_tokens"] - 1).bit_length())
        worst = self.size * tokens
        most["max_recv_rows"] = worst if most["mask_routing"] else min(worst, max(
            most["max_recv_rows"], first_recv_rows(self.size, tokens, most["max_topk"])))
        return most

    def close(self):
        self._group = None


def _text(needs):
    return ", ".join(f"{name} {n}" for name, n in needs.items() if n)


AS_IT_IS = contextlib.nullcontext()


class PlainCall:
    """A normal-mode call that runs on the current stream and has no event."""

    allocating = AS_IT_IS

    def __init__(self, current_stream):
        self._current_stream = current_stream

    def stream_of(self, group):
        return self._current_stream()

    def end(self, group, check, *uses):
        return EventOverlap()


class Call:
    """
    Where any other runs and what it returns as its event. An asynchronous call runs on the comm
    stream, behind previous_event or else behind all that the current stream has; one behind an event
    runs on the current stream.
    """

    def __init__(self, runtime, previous_event, async_finish, allocate_on_comm_stream):
        before = getattr(previous_event, "event", None)
        host_check(not allocate_on_comm_stream or (before is not None and async_finish),
                   "allocate_on_comm_stream needs a previous_event with an event, and async_finish")
        self.runtime, self.before, self.is_async = runtime, before, async_finish
        self.allocating = AS_IT_IS
        self.compute = self.stream = None
        if not runtime.cuda:
            if before is not None and not async_finish:
                before.current_stream_wait()
            return
        if before is None and not async_finish:
            self.stream = runtime.current_stream()
            return
        self.compute = torch.cuda.current_stream()
        self.stream = runtime.comm_stream if async_finish else self.compute
        if before is not None:
            self.stream.wait_event(before._event)
        elif async_finish:
            self.stream.wait_stream(self.compute)
        self.on_comm = allocate_on_comm_stream
        if allocate_on_comm_stream:
            self.allocating = torch.cuda.stream(runtime.comm_stream)
        elif async_finish and torch.are_deterministic_algorithms_enabled():
            self.allocating = self._filled()

    @contextlib.contextmanager
    def _filled(self):
        """Deterministic torch fills what it allocates, on the current stream: before libep writes it."""
        yield
        self.stream.wait_stream(self.compute)

    def stream_of(self, group):
        """The `stream` argument of libep's calls."""
        if self.runtime.cuda or not self.is_async:
            return self.stream
        stream, before, self.before = group.host_stream(), self.before, None
        if before is not None and before._event is not None:
            if before._group is group:
                stream.wait(before._event)
            else:
                before.current_stream_wait()
        return stream

    def end(self, group, check, *uses):
        """The EventOverlap of the call, which uses these tensors (None and tuples among them)."""
        if not self.is_async:
            return EventOverlap()
        if not self.runtime.cuda:
            return EventOverlap(group.host_event(check) if group else EventHandle())
        for t in uses:
            if t is not None:
                t.record_stream(self.stream)
                if self.on_comm:
                    t.record_stream(self.compute)
        event = torch.cuda.Event()
        event.record(self.stream)
        return EventOverlap(EventHandle._of(event))
