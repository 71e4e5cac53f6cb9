# SPDX-License-Identifier: MIT
"""dispatch and combine as functions that autograd knows: each is the backward of the other.

    received = ep.torch.dispatch(handle, x, topk_weights=weights)
    y = ep.torch.combine(handle, experts(received.x), received)

Backward is collective, too: all ranks run it, in the same order. A handle must not be routed again
before the backward of what it has dispatched.
"""
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from . import _operations
from ._operations import Received


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, topk_weights: Optional[Tensor], handle: Any, got: Received,
                options: Any) -> Tuple[Tensor, Optional[Tensor]]:
        made = _operations.dispatch(handle, x, topk_weights=topk_weights, **options)
        for name in Received.__slots__[:-1]:
            setattr(got, name, getattr(made, name))
        ctx.handle, ctx.stream, ctx.ids = handle, options.get("stream"), made.topk_ids
        return got.x, got.topk_weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_weights: Any) -> Any:
        if not ctx.needs_input_grad[1]:
            grad_weights = None
        elif ctx.ids is not None:  # selections of other ranks arrived as zeros
            grad_weights = grad_weights.masked_fill(ctx.ids < 0, 0)
        back = _operations.combine(
            ctx.handle, grad.contiguous(), stream=ctx.stream,
            topk_weights=None if grad_weights is None else grad_weights.contiguous())
        x, weights = (back, None) if grad_weights is None else back
        return x, weights, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Optional[Tensor], handle: Any, got: Received,
                stream: Any) -> Tensor:
        ctx.save_for_backward(x if weights is not None else None, weights)
        ctx.handle, ctx.got, ctx.stream = handle, got, stream
        return _operations.combine(handle, x, weights=weights, stream=stream)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weights = ctx.saved_tensors
        rows = _operations.dispatch(ctx.handle, grad.contiguous(), rows=ctx.got.rows,
                                    expanded=ctx.got.expanded, alignment=ctx.got.alignment,
                                    zero_gaps=ctx.got.expanded, stream=ctx.stream).x
        if weights is None:
            return rows, None, None, None, None
        grad_weights = (rows.float() * x.float()).sum(1) if ctx.needs_input_grad[1] else None
        return rows * weights.to(rows.dtype)[:, None], grad_weights, None, None, None


def dispatch(handle: Any, x: Tensor, *, topk_weights: Optional[Tensor] = None,
             **options: Any) -> Received:
    """ep.dispatch, whose x and topk_weights have gradients."""
    got = Received()
    x_out, weights_out = _Dispatch.apply(x, topk_weights, handle, got, options)
    got.x, got.topk_weights = x_out, weights_out
    return got


def combine(handle: Any, x: Tensor, received: Received, *, weights: Optional[Tensor] = None,
            stream: Any = None) -> Tensor:
    """ep.combine of the answers to `received`, differentiable in x and in weights."""
    return _Combine.apply(x, weights, handle, received, stream)


def allgather(group: Any = None) -> Any:
    """What ep.Group takes as `allgather`: over a process group of torch, of any backend."""
    import torch.distributed as distributed

    def gather(data: bytes) -> Any:
        all_data = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(all_data, data, group=group)
        return all_data

    return gather
