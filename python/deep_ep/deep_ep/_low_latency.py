# SPDX-License-Identifier: MIT
"""
Low-latency mode of Buffer: dispatch and combine in one call or in two halves, of which the second
is the hook. Outputs have the size of the worst case; nothing here waits for the device.
"""
import functools
import math

import ep
import torch

from . import _layout
from ._config import host_check, round_up
from ._runtime import Routing, is_capturing
from .utils import EventHandle, EventOverlap


def refuse(**switched_on):
    for name, on in switched_on.items():
        if on:
            raise NotImplementedError(f"{name} is switched on, and this version of libep has it not: "
                                      f"leave it at its default")


def _numbers(name, tensor, dtype, length):
    host_check(tensor.dtype == dtype and tensor.shape == (length,),
               lambda: f"{name} is {tensor.dtype} {list(tensor.shape)}, must be {dtype} [{length}]")
    return tensor


def _like(x, shape, dtype):
    """Of one element: what torch.empty_like makes outputs of this shape from, contiguous, in half the
    time that torch.empty takes."""
    return x.new_empty(1, dtype=dtype).expand(shape)


def _pieces(small, parts):
    """As a prepared call makes them, where it was none, and for older torch."""
    types = {ep.I32: (torch.int32, 4), ep.I64: (torch.int64, 8)}
    return [small] + [
        small[offset:offset + math.prod(shape) * types[dtype][1]].view(types[dtype][0]).view(shape)
        for dtype, shape, offset in parts[1:]]


MASKING = ep.TimeoutError_, ep.PeerError


class Shape:
    """What calls of one shape have in common. `prepared`: the calls themselves, by name, which find out
    whether arrays are like those that check() has seen. `lends`: those have memory for what is
    small."""

    lends, small, parts = False, None, ()

    def __init__(self, **common):
        self.common, self.prepared = common, {}


class DispatchShape(Shape):
    """The outputs, where each begins in the memory that they share (bytes), and keywords to libep."""

    def __init__(self, group, x, most, num_experts, use_fp8, round_scale, use_ue8m0):
        super().__init__(
            max_tokens=most, num_experts=num_experts,
            flags=(ep.LL_FP8 if use_fp8 else 0) | (ep.LL_SCALES_POWER_OF_2 if round_scale else 0))
        ranks, hidden = group.ep.num_ranks, x.size(1)
        local, rows = num_experts // ranks, ranks * most
        self.tokens, self.rows = x.size(0), rows
        self.data = _like(x, (local, rows, hidden), torch.float8_e4m3fn if use_fp8 else x.dtype)
        self.flat, self.scales = (local * rows, hidden), None
        if use_fp8:  # columns of one group of channels each start at a multiple of 16 bytes
            groups = round_up(hidden, 512) // 512 if use_ue8m0 else hidden // 128
            room = round_up(rows, 4)
            self.scales = x.new_empty(1, dtype=torch.int32 if use_ue8m0 else torch.float32)
            self.seen = (local, rows, groups), (groups * room, 1, room)
            self.columns = (local * groups, rows), (room, 1)
        # One allocation for what is small: the memory of libep's handle, and these.
        self.memory = (group.plan.ll_handle_bytes,)
        ranges = round_up(group.plan.ll_handle_bytes, 16)
        count = ranges + 8 * local * ranks
        source = count + 4 * round_up(local, 4)
        size = (source + 4 * local * rows,)
        self.small, self.lends = _like(x, size, torch.uint8), ep.path_of(x) == "exchange"
        self.parts = (None, (ep.I32, (local,), count), (ep.I32, (local, rows), source),
                      (ep.I64, (local, ranks), ranges))
        self.lines = (local * rows,), source

    @staticmethod
    def check(x, topk_idx, *_):
        host_check(x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16 and
                   x.size(1) % 128 == 0,
                   lambda: f"x is {x.dtype} {list(x.shape)} of strides {x.stride()}, must be "
                   f"contiguous bfloat16 [tokens, hidden] with hidden a multiple of 128")
        _layout.check_ids(topk_idx, x.size(0))

    def keywords(self, small, x, topk_idx, data, scales=None):
        count, source, ranges = (ep.Tensor(small, *part) for part in self.parts[1:])
        return dict(
            self.common, x=x, topk_ids=topk_idx, handle=ep.Tensor(small, "u8", self.memory),
            recv_x=ep.Tensor(data, None, self.flat), expert_counts=count, ranges=ranges,
            recv_source=ep.Tensor(small, ep.I32, *self.lines),
            recv_scales=None if scales is None else scales.as_strided(*self.columns))


class CombineShape(Shape):
    def __init__(self, group, x, topk_idx, rows, most, num_experts, use_logfmt):
        super().__init__(max_tokens=most, num_experts=num_experts,
                         flags=ep.LL_LOGFMT if use_logfmt else 0)
        local = num_experts // group.ep.num_ranks
        self.places, self.topk, self.memory = (local, rows), topk_idx.shape, (group.plan.ll_handle_bytes,)
        self.check(x)
        self.flat, self.out = (local * rows, x.size(2)), _like(x, (topk_idx.size(0), x.size(2)), x.dtype)

    def check(self, x, topk_weights=None, *_):
        host_check(x.dim() == 3 and x.is_contiguous() and x.dtype == torch.bfloat16 and
                   x.shape[:2] == self.places,
                   lambda: f"x is {x.dtype} {list(x.shape)} of strides {x.stride()}, must be "
                   f"contiguous bfloat16 {list(self.places)} and hidden")
        host_check(topk_weights is None or (topk_weights.dtype == torch.float32 and
                                            topk_weights.shape == self.topk),
                   lambda: f"topk_weights is {topk_weights.dtype} {list(topk_weights.shape)}, must "
                   f"be float32 {list(self.topk)}, as topk_idx")

    def keywords(self, small, x, topk_weights, out):
        return dict(self.common, x=ep.Tensor(x, None, self.flat), topk_weights=topk_weights, out=out,
                    handle=ep.Tensor(small, "u8", self.memory))


class LowLatency:
    """The half of Buffer that decodes. What calls cost before their kernels run is the time of a
    decoding step, so what a call has in common with an earlier one of its group is not checked, and
    not computed, again."""

    def _low_latency(self, method):
        runtime = self._alive()
        if not self.low_latency_mode:
            raise (RuntimeError if hasattr(self, "nvshmem_qp_depth") else AttributeError)(
                f"{method} needs a Buffer made with low_latency_mode=True")
        return runtime

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
                             cumulative_local_expert_recv_stats=None,
                             dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False,
                             use_ue8m0=False, async_finish=False, return_recv_hook=False, *,
                             use_nvfp4=False, x_global_scale=None):
        """(recv_x, recv_count, handle, event, hook). Collective."""
        if use_nvfp4 or x_global_scale is not None:
            refuse(use_nvfp4=use_nvfp4, x_global_scale=x_global_scale is not None)
        group = None if self.runtime is None else self.runtime._group
        key = x.shape, num_max_dispatch_tokens_per_rank, num_experts, use_fp8, round_scale, use_ue8m0
        shape = None if group is None else group.shapes.get(key)
        if shape is None:
            group, shape = self._dispatch_shape(key, x, topk_idx)
        totals, waits, more = cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats, {}
        if totals is not None:
            more["expert_totals"] = _numbers("cumulative_local_expert_recv_stats", totals, torch.int32,
                                             num_experts // self.group_size)
        if waits is not None:
            more["wait_ns"] = _numbers("dispatch_wait_recv_cost_stats", waits, torch.int64,
                                       self.group_size)
        recv_x = torch.empty_like(shape.data)
        arrays = None, x, topk_idx, recv_x
        if shape.scales is not None:
            scales = shape.scales.new_empty_strided(*shape.seen)
            recv_x, arrays = (recv_x, scales), arrays + (scales,)
        (memory, count, source, ranges), event, hook = self._run(
            group, shape, "ll_dispatch", arrays, more, async_finish, return_recv_hook)
        source.libep_routing = ranges.libep_routing = Routing(group, None, shape.tokens, shape.rows,
                                                              memory)
        return recv_x, count, (source, ranges, num_max_dispatch_tokens_per_rank, shape.flat[1],
                               num_experts), event, hook

    def _dispatch_shape(self, key, x, topk_idx):
        _, most, num_experts, use_fp8, round_scale, use_ue8m0 = key
        runtime, ranks = self._low_latency("low_latency_dispatch"), self.group_size
        DispatchShape.check(x, topk_idx)
        host_check(x.size(0) <= most, lambda: f"x has {x.size(0)} rows, "
                   f"num_max_dispatch_tokens_per_rank is {most}")
        host_check(num_experts > 0 and num_experts % ranks == 0,
                   lambda: f"num_experts is {num_experts}, must be a multiple of the {ranks} ranks")
        host_check(round_scale or not use_ue8m0, "use_ue8m0 needs round_scale")
        group = runtime.group_for(max_tokens=most, num_experts=num_experts, max_topk=topk_idx.size(1),
                                  max_row_bytes=2 * x.size(1), ll_max_tokens=most)
        group.shapes[key] = shape = DispatchShape(group, x, most, num_experts, use_fp8, round_scale,
                                                  use_ue8m0)
        return group, shape

    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False,
                            zero_copy=False, async_finish=False, return_recv_hook=False, out=None,
                            combine_wait_recv_cost_stats=None, *, overlap=False, src_signals=None,
                            src_signal_expect_value=0):
        """(combined_x, event, hook). Collective."""
        if overlap or src_signals is not None:
            refuse(overlap=overlap, src_signals=src_signals is not None)
        routing, waits = Routing.find(handle), combine_wait_recv_cost_stats
        if self.runtime is None or not self.low_latency_mode:
            self._low_latency("low_latency_combine")
        key = x.shape, topk_idx.shape, topk_idx.dtype, routing.tokens, handle[2], handle[4], use_logfmt
        shape = routing.group.shapes.get(key) or self._combine_shape(key, routing, x, topk_idx)
        if zero_copy:
            host_check(not use_logfmt, "zero_copy and use_logfmt must not both be set")
            host_check(routing.answers is not None and routing.answers.shape == x.shape,
                       lambda: "zero_copy needs get_next_low_latency_combine_buffer of this handle "
                       f"before, and an x of its shape, not {list(x.shape)}")
            x = routing.answers
        more = {} if waits is None else dict(wait_ns=_numbers(
            "combine_wait_recv_cost_stats", waits, torch.int64, self.group_size))
        if out is None:
            out = torch.empty_like(shape.out)
        _, event, hook = self._run(routing.group, shape, "ll_combine",
                                   (routing.memory, x, topk_weights, out), more, async_finish,
                                   return_recv_hook)
        return out, event, hook

    def _combine_shape(self, key, routing, x, topk_idx):
        *_, tokens, most, num_experts, use_logfmt = key
        host_check(routing.memory is not None, "handle is of dispatch, not of low_latency_dispatch")
        _layout.check_ids(topk_idx, tokens)
        routing.group.shapes[key] = shape = CombineShape(routing.group, x, topk_idx, routing.rows, most,
                                                         num_experts, use_logfmt)
        return shape

    def get_next_low_latency_combine_buffer(self, handle):
        """Where the answers for a combine with zero_copy go: the same memory for as long as the handle
        lives. Combine reads answers where they lie, so any other tensor travels as directly."""
        self._low_latency("get_next_low_latency_combine_buffer")
        routing = Routing.find(handle)
        host_check(routing.memory is not None, "handle is of dispatch, not of low_latency_dispatch")
        if routing.answers is None:
            routing.answers = torch.empty((handle[4] // self.group_size, routing.rows, handle[3]),
                                          dtype=torch.bfloat16, device=self.runtime.device)
        return routing.answers

    def _run(self, group, shape, name, arrays, more, async_finish, return_recv_hook):
        """(parts of small memory, event, hook) of an operation. With a hook, both halves run on the
        stream that is current now; the hook holds all tensors, and so does an asynchronous event."""
        runtime, parts = self.runtime, shape.parts
        captured = runtime.cuda and is_capturing()
        if captured:
            runtime.keep_if_captured(group)
        # Memory that is lent is for one stream, and not a graph's; what masks has to give its own.
        if arrays[0] is None and (captured or async_finish or self.enable_shrink or not shape.lends):
            arrays = (torch.empty_like(shape.small),) + arrays[1:]
        if async_finish:
            host_check(not return_recv_hook, "async_finish and return_recv_hook must not both be set")
            return self._run_asynchronously(group, shape, name, arrays, more)
        stream = runtime.current_stream()
        if not return_recv_hook:
            return self._call(group, shape, name, stream, arrays, more, parts), EventOverlap(), None
        made = self._call(group, shape, name + "_send", stream, arrays, more, parts)
        arrays = arrays if arrays[0] is not None else (made[0],) + arrays[1:]

        def receive():
            self._call(group, shape, name + "_recv", stream, arrays, more, ())

        return made, EventOverlap(), receive

    def _run_asynchronously(self, group, shape, name, arrays, more):
        runtime, parts = self.runtime, shape.parts
        if runtime.cuda:
            runtime.comm_stream.wait_stream(torch.cuda.current_stream())
            made = self._call(group, shape, name, runtime.comm_stream.cuda_stream, arrays, more, parts)
            passed = torch.cuda.Event()
            passed.record(runtime.comm_stream)
            event = EventHandle._of(passed)
        else:
            made = self._call(group, shape, name, group.host_stream(), arrays, more, parts)
            event = group.host_event(lambda: self._masking(group, group.ep.ll_status))
        return made, EventOverlap(event, arrays + tuple(more.values())), None

    def _call(self, group, shape, name, stream, arrays, more, parts):
        """The parts that the call has made. The first of a shape is prepared, the others give nothing but
        arrays. With enable_shrink, that the call has masked a rank is printed, as DeepEP does."""
        if more:
            arrays, key = arrays + tuple(more.values()), (name, *more)
        else:
            key = name
        prepared, made = shape.prepared.get(key), None
        try:
            if prepared is not None and not isinstance(stream, ep.Stream):
                made = prepared(stream, *arrays)
            if made is None:
                shape.check(*arrays[1:])
                if arrays[0] is None:
                    arrays = (torch.empty_like(shape.small),) + arrays[1:]
                keywords = dict(shape.keywords(*arrays[:len(arrays) - len(more)]), **more)
                method = getattr(group.ep, name)
                shape.prepared[key] = ep.Prepared(method, arrays, parts, keywords,
                                                  functools.partial(torch.empty_like, shape.small))
                method(stream=stream, **keywords)
        except MASKING as error:
            self._tell_masked(group, error)
        return made or (_pieces(arrays[0], parts) if parts else ())

    def _tell_masked(self, group, error):
        if not self.enable_shrink or group.ep.fault() is not None:
            raise error
        print(f"Warning: DeepEP timeout for rank {self.rank}: {error}", flush=True)

    def _masking(self, group, method, **kw):
        try:
            method(**kw)
        except MASKING as error:
            self._tell_masked(group, error)

    # ------------------------------------------------------------------------- shrinking: masks

    def _shrinking(self, method):
        runtime = self._low_latency(method)
        host_check(self.enable_shrink, f"{method} needs a Buffer made with enable_shrink=True")
        return runtime._group, dict(stream=runtime.current_stream())

    def low_latency_update_mask_buffer(self, rank_to_mask, mask=False):
        """Masks a rank here, from the next call on, or wants it back at the next cleaning."""
        group, where = self._shrinking("low_latency_update_mask_buffer")
        host_check(0 <= rank_to_mask < self.group_size, f"rank_to_mask is {rank_to_mask}, must be "
                                                        f"below {self.group_size}")
        host_check(group is not None, "low_latency_update_mask_buffer comes after the first call of "
                                      "low_latency_dispatch, which makes the masks")
        if mask:
            group.ep.ll_mask_rank(rank=rank_to_mask, **where)
        else:
            group.ep.ll_unmask_rank(rank=rank_to_mask, **where)

    def low_latency_query_mask_buffer(self, mask_status):
        """Writes which ranks are masked here, 1 or 0."""
        group, where = self._shrinking("low_latency_query_mask_buffer")
        host_check(mask_status.dtype == torch.int32 and mask_status.shape == (self.group_size,),
                   f"mask_status must be int32 [{self.group_size}]")
        if group is None:
            mask_status.zero_()
        else:
            group.ep.ll_masks(masks=mask_status, **where)

    def low_latency_clean_mask_buffer(self):
        """Takes all ranks back: collective, for they meet. Who does not come is masked again."""
        group, where = self._shrinking("low_latency_clean_mask_buffer")
        if group is not None:
            group.ep.ll_unmask_rank(rank=-1, **where)
            self._masking(group, group.ep.ll_barrier, **where)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
        """Nothing to clean: throughput operations never touch what low latency uses. With
        enable_shrink the ranks meet, and take back those that they want back."""
        host_check(self.low_latency_mode,
                   "clean_low_latency_buffer needs a Buffer made with low_latency_mode=True")
        if self.enable_shrink and self.runtime._group is not None:
            group, where = self._shrinking("clean_low_latency_buffer")
            self._masking(group, group.ep.ll_barrier, **where)
