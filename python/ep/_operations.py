# SPDX-License-Identifier: MIT
"""The operations with outputs of the right size, made by the library of the inputs.

Nothing here decides anything: shapes follow from ep.h. Further fields of a call's struct
(`num_workers`, ...) are passed on as keywords.
"""
import sys
from typing import Any, Callable, Optional, Sequence, Tuple

from . import _ep

Array = Any


def _empty(like: Array, shape: Sequence[int], dtype: Optional[str] = None) -> Array:
    """A new array where `like` is and of its type, or of the type named."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(shape, dtype=getattr(torch, dtype) if dtype else like.dtype,
                           device=like.device)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(like, numpy.ndarray):
        return numpy.empty(shape, dtype=dtype or like.dtype)
    raise TypeError(f"outputs are made for arrays of torch and numpy, and not for {type(like)!r}: "
                    "call the method of the handle or group, and give it the outputs")


class Received:
    """What a dispatch has brought; what does not apply is None.

    x [rows, H], scales [rows, S]; topk_ids [rows, K]: each selection's index among this rank's
    experts, or -1; topk_weights; source [rows, 2]: rank and token; expert_counts [L];
    expert_offsets [L + 1] of the expanded form; num_rows [1]. `rows` is the room in the outputs. For
    the order of the rows see Handle.dispatch.
    """

    __slots__ = ("x", "scales", "topk_ids", "topk_weights", "source", "expert_counts",
                 "expert_offsets", "num_rows", "rows", "expanded", "alignment", "__weakref__")
    x: Array
    scales: Array
    topk_ids: Array
    topk_weights: Array
    source: Array
    expert_counts: Array
    expert_offsets: Array
    num_rows: Array
    rows: int
    expanded: bool
    alignment: int


def _make_outputs(got: Received, local: int, topk: int, x: Array, scales: Optional[Array],
                  topk_weights: Optional[Array], source: bool) -> None:
    rows = got.rows
    got.x = _empty(x, (rows, x.shape[1]))
    got.scales = None if scales is None else _empty(scales, (rows, scales.shape[1]))
    compact = topk and not got.expanded
    got.topk_ids = _empty(x, (rows, topk), "int64") if compact else None
    got.topk_weights = None
    if topk_weights is not None:
        got.topk_weights = _empty(topk_weights, (rows,) if got.expanded else (rows, topk))
    got.source = _empty(x, (rows, 2), "int32") if source else None
    numbers = _empty(x, (2 * local + 2,), "int32")  # small outputs share one allocation
    got.num_rows = numbers[:1]
    got.expert_counts = numbers[1:1 + local] if topk else None
    got.expert_offsets = numbers[1 + local:] if got.expanded else None


def dispatch(handle: Any, x: Array, *, scales: Optional[Array] = None,
             topk_weights: Optional[Array] = None, expanded: bool = False, alignment: int = 1,
             rows: Optional[int] = None, source: bool = False, zero_gaps: bool = False,
             stream: Any = None, **fields: Any) -> Received:
    """Sends rows to the ranks of their experts and receives those of the others. Collective.

    Without `rows` the outputs have exactly the rows that come, and this waits until it is known how
    many; with it they have room for so many, nothing waits, and a CUDA graph may capture the call:
    `num_rows` and `expert_counts` say how many there are. `zero_gaps`: see DISPATCH_ZERO_GAPS.
    """
    got = Received()
    got.expanded, got.alignment, got.rows = expanded, alignment, rows or 0
    inputs = dict(fields, x=x, scales=scales, topk_weights=topk_weights, stream=stream)
    if rows is None:
        handle.dispatch_begin(**inputs)
        counts = handle.counts()
        got.rows = counts.rows
        if expanded:
            got.rows = sum(-(-n // alignment) * alignment for n in counts.rows_per_expert)
    _make_outputs(got, handle.num_local_experts, handle.topk, x, scales, topk_weights, source)
    outputs = dict(recv_x=got.x, recv_scales=got.scales, recv_topk_ids=got.topk_ids,
                   recv_topk_weights=got.topk_weights, recv_source=got.source,
                   expert_counts=got.expert_counts, expert_offsets=got.expert_offsets,
                   num_rows=got.num_rows, alignment=alignment, stream=stream,
                   flags=expanded * _ep.DISPATCH_EXPANDED + zero_gaps * _ep.DISPATCH_ZERO_GAPS)
    if rows is None:
        handle.dispatch_finish(**outputs)
    else:
        handle.dispatch(**dict(inputs, **outputs))
    return got


def combine(handle: Any, x: Array, *, weights: Optional[Array] = None,
            topk_weights: Optional[Array] = None, bias: Any = None, out: Optional[Array] = None,
            stream: Any = None, **fields: Any) -> Any:
    """Brings the experts' answers back and sums them per token. Collective. Returns the sums
    [tokens, H]; where topk_weights is given, also what came back of those [tokens, K]."""
    if out is None:
        out = _empty(x, (handle.tokens, x.shape[1]))
    back = None
    if topk_weights is not None:
        back = _empty(topk_weights, (handle.tokens, handle.topk))
    handle.combine(x=x, weights=weights, topk_weights=topk_weights, bias=bias, out=out,
                   out_topk_weights=back, stream=stream, **fields)
    return out if back is None else (out, back)


class LowLatency:
    """What a low-latency dispatch brings, in room for the worst case.

    x [L, N, H] of N = ranks * max_tokens rows for each local expert, of which expert_counts [L] are
    filled; scales [L, N, S] or None; source [L, N]: each row's token at its rank; ranges [L, ranks].
    With `hook` all of this is valid only when hook() has been called, once. Give it to ll_combine.
    """

    __slots__ = ("x", "scales", "source", "expert_counts", "ranges", "handle", "hook", "tokens",
                 "max_tokens", "__weakref__")
    x: Array
    scales: Array
    source: Array
    expert_counts: Array
    ranges: Array
    handle: Array
    hook: Optional[Callable[[], None]]
    tokens: int
    max_tokens: int


def _scales_for(x: Array, experts: int, columns: int, rows: int, packed: bool) -> Tuple[Array, Array]:
    """The scales as the call takes them, [L * S][N] with rows at multiples of 16 bytes, and the same
    memory as [L, N, S]."""
    room = -(-rows // 4) * 4
    memory = _empty(x, (experts * columns, room), "int32" if packed else "float32")
    seen = memory.reshape((experts, columns, room))[:, :, :rows]
    return memory[:, :rows], seen.swapaxes(1, 2)


def ll_dispatch(group: Any, x: Array, topk_ids: Array, *,
                topk_weights: Optional[Array] = None, fp8: bool = False,
                power_of_2: bool = False, packed_scales: bool = False,
                max_tokens: Optional[int] = None, hook: bool = False, stream: Any = None,
                **fields: Any) -> LowLatency:
    """Low-latency dispatch. Collective; waits for nothing on the host. With `hook` it only sends, and
    hook() of the result receives: in between nothing works for it, neither on the device nor here.
    `fp8` casts rows to E4M3 with a scale for 128 channels; see LL_FP8 and LL_SCALES_POWER_OF_2."""
    got = LowLatency()
    got.tokens, got.max_tokens = x.shape[0], max_tokens or group.ll_max_tokens
    local, rows, hidden = group.num_local_experts, group.num_ranks * got.max_tokens, x.shape[1]
    memory = _empty(x, (local * rows, hidden), "float8_e4m3fn" if fp8 else None)
    got.x = memory.reshape((local, rows, hidden))
    scales = got.scales = None
    if fp8:
        columns = -(-hidden // 512) if packed_scales else hidden // 128
        scales, got.scales = _scales_for(x, local, columns, rows, packed_scales)
    numbers = _empty(x, (local * rows + local,), "int32")
    got.source = numbers[:local * rows].reshape((local, rows))
    got.expert_counts = numbers[local * rows:]
    got.ranges = _empty(x, (local, group.num_ranks), "int64")
    got.handle = _empty(x, (group.plan().ll_handle_bytes,), "uint8")
    args = dict(fields, x=x, topk_ids=topk_ids, topk_weights=topk_weights, handle=got.handle,
                recv_x=memory, recv_scales=scales, recv_source=numbers[:local * rows],
                expert_counts=got.expert_counts, ranges=got.ranges, max_tokens=got.max_tokens,
                flags=fp8 * _ep.LL_FP8 + power_of_2 * _ep.LL_SCALES_POWER_OF_2, stream=stream)
    got.hook = _in_halves(hook, group.ll_dispatch, group.ll_dispatch_send, group.ll_dispatch_recv,
                          args)
    return got


def ll_combine(group: Any, x: Array, received: LowLatency, *, out: Optional[Array] = None,
               logfmt: bool = False, hook: bool = False, stream: Any = None, **fields: Any) -> Any:
    """The answers [L, N, H] back to the owners of the tokens, summed there. Collective. Returns the
    sums, or with `hook` the sums and the function that receives them. `logfmt`: in 10 bits for each
    channel, see LL_LOGFMT."""
    if out is None:
        out = _empty(x, (received.tokens, x.shape[-1]))
    args = dict(fields, handle=received.handle, x=x.reshape((-1, x.shape[-1])), out=out,
                max_tokens=received.max_tokens, stream=stream,
                flags=fields.get("flags", 0) | logfmt * _ep.LL_LOGFMT)
    then = _in_halves(hook, group.ll_combine, group.ll_combine_send, group.ll_combine_recv, args)
    return (out, then) if hook else out


def _in_halves(hook: bool, whole: Callable[..., None], send: Callable[..., None],
               recv: Callable[..., None], args: Any) -> Optional[Callable[[], None]]:
    if not hook:
        whole(**args)
        return None
    send(**args)
    return lambda: recv(**args)
