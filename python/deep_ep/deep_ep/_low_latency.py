# SPDX-License-Identifier: MIT
"""
Low-latency mode of Buffer: dispatch and combine in one call or in two halves, of which the second
is the hook. Outputs have the size of the worst case; nothing here waits for the device.
"""
import ep
import torch

from . import _layout
from ._config import host_check, round_up
from ._runtime import Routing
from .utils import EventHandle, EventOverlap


def refuse(**switched_on):
    for name, on in switched_on.items():
        if on:
            raise NotImplementedError(f"{name} is switched on, and this version of libep has it not: "
                                      f"leave it at its default")


class LowLatency:
    """The half of Buffer that decodes."""

    def _low_latency(self, method):
        runtime = self._alive()
        if not self.low_latency_mode:
            raise (RuntimeError if hasattr(self, "nvshmem_qp_depth") else AttributeError)(
                f"{method} needs a Buffer made with low_latency_mode=True")
        return runtime

    def _check_waits(self, name, waits):
        host_check(waits is None or (waits.dtype == torch.int64 and
                                     waits.shape == (self.group_size,)),
                   f"{name} must be int64 [{self.group_size}]")

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
                             cumulative_local_expert_recv_stats=None,
                             dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False,
                             use_ue8m0=False, async_finish=False, return_recv_hook=False, *,
                             use_nvfp4=False, x_global_scale=None):
        """(recv_x, recv_count, handle, event, hook). Collective."""
        runtime = self._low_latency("low_latency_dispatch")
        refuse(use_nvfp4=use_nvfp4, x_global_scale=x_global_scale is not None)
        self._check_waits("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats)
        most, ranks = num_max_dispatch_tokens_per_rank, self.group_size
        host_check(x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16 and
                   x.size(1) % 128 == 0,
                   lambda: f"x is {x.dtype} {list(x.shape)} of strides {x.stride()}, must be "
                   f"contiguous bfloat16 [tokens, hidden] with hidden a multiple of 128")
        host_check(x.size(0) <= most, lambda: f"x has {x.size(0)} rows, "
                   f"num_max_dispatch_tokens_per_rank is {most}")
        _layout.check_ids(topk_idx, x.size(0))
        host_check(num_experts > 0 and num_experts % ranks == 0,
                   lambda: f"num_experts is {num_experts}, must be a multiple of the {ranks} ranks")
        host_check(round_scale or not use_ue8m0, "use_ue8m0 needs round_scale")
        host_check(not (async_finish and return_recv_hook),
                   "async_finish and return_recv_hook must not both be set")
        local, rows, hidden = num_experts // ranks, ranks * most, x.size(1)
        totals = cumulative_local_expert_recv_stats
        host_check(totals is None or (totals.dtype == torch.int32 and totals.shape == (local,)),
                   lambda: f"cumulative_local_expert_recv_stats must be int32 [{local}]")

        group = runtime.group_for(max_tokens=most, num_experts=num_experts, max_topk=topk_idx.size(1),
                                  max_row_bytes=2 * hidden, ll_max_tokens=most)
        dev = x.device
        data = torch.empty((local, rows, hidden), device=dev,
                           dtype=torch.float8_e4m3fn if use_fp8 else torch.bfloat16)
        scales = None
        if use_fp8:  # columns of one group of channels each start at a multiple of 16 bytes
            groups = round_up(hidden, 512) // 512 if use_ue8m0 else hidden // 128
            scales = torch.empty((local, groups, round_up(rows, 4)), device=dev,
                                 dtype=torch.int32 if use_ue8m0 else torch.float32)
        count = torch.empty(local, dtype=torch.int32, device=dev)
        source = torch.empty((local, rows), dtype=torch.int32, device=dev)
        ranges = torch.empty((local, ranks), dtype=torch.int64, device=dev)
        memory = torch.empty(group.plan.ll_handle_bytes, dtype=torch.uint8, device=dev)
        args = dict(
            x=x.detach(), topk_ids=topk_idx, handle=memory, recv_x=data.view(local * rows, hidden),
            recv_scales=None if scales is None else
            scales.view(local * groups, -1)[:, :rows], recv_source=source.view(-1),
            expert_counts=count, ranges=ranges, expert_totals=totals, max_tokens=most,
            wait_ns=dispatch_wait_recv_cost_stats, num_experts=num_experts,
            flags=(ep.LL_FP8 if use_fp8 else 0) | (ep.LL_SCALES_POWER_OF_2 if round_scale else 0))
        Routing(group, None, x.size(0), rows, memory).mark((source, ranges))
        recv_x = data if scales is None else (data, scales[:, :, :rows].transpose(1, 2))
        event, hook = self._run(group, "ll_dispatch", args, async_finish, return_recv_hook)
        return recv_x, count, (source, ranges, most, hidden, num_experts), event, hook

    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False,
                            zero_copy=False, async_finish=False, return_recv_hook=False, out=None,
                            combine_wait_recv_cost_stats=None, *, overlap=False, src_signals=None,
                            src_signal_expect_value=0):
        """(combined_x, event, hook). Collective."""
        self._low_latency("low_latency_combine")
        host_check(not (zero_copy and use_logfmt), "zero_copy and use_logfmt must not both be set")
        refuse(overlap=overlap, src_signals=src_signals is not None)
        self._check_waits("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats)
        routing = Routing.find(handle)
        host_check(routing.memory is not None, "handle is of dispatch, not of low_latency_dispatch")
        most, num_experts = handle[2], handle[4]
        local, rows, tokens = num_experts // self.group_size, routing.rows, routing.tokens
        host_check(x.dim() == 3 and x.is_contiguous() and x.dtype == torch.bfloat16 and
                   x.shape[:2] == (local, rows),
                   lambda: f"x is {x.dtype} {list(x.shape)} of strides {x.stride()}, must be "
                   f"contiguous bfloat16 [{local}, {rows}, hidden]")
        if zero_copy:
            host_check(routing.answers is not None and routing.answers.shape == x.shape,
                       lambda: "zero_copy needs get_next_low_latency_combine_buffer of this handle "
                       f"before, and an x of its shape, not {list(x.shape)}")
            x = routing.answers
        _layout.check_ids(topk_idx, tokens)
        host_check(topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape,
                   lambda: f"topk_weights is {topk_weights.dtype} {list(topk_weights.shape)}, must "
                   f"be float32 {list(topk_idx.shape)}, as topk_idx")
        host_check(not (async_finish and return_recv_hook),
                   "async_finish and return_recv_hook must not both be set")
        hidden = x.size(2)
        if out is None:
            out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
        host_check(out.shape == (tokens, hidden) and out.dtype == x.dtype and out.is_contiguous(),
                   lambda: f"out must be contiguous bfloat16 [{tokens}, {hidden}]")
        args = dict(handle=routing.memory, x=x.detach().view(local * rows, hidden),
                    topk_weights=topk_weights, out=out, max_tokens=most,
                    wait_ns=combine_wait_recv_cost_stats, num_experts=num_experts,
                    flags=ep.LL_LOGFMT if use_logfmt else 0)
        event, hook = self._run(routing.group, "ll_combine", args, async_finish, return_recv_hook)
        return out, event, hook

    def get_next_low_latency_combine_buffer(self, handle):
        """Where the answers for a combine with zero_copy go: the same memory for as long as the handle
        lives. Combine reads answers where they lie, so any other tensor travels as directly."""
        self._low_latency("get_next_low_latency_combine_buffer")
        routing = Routing.find(handle)
        host_check(routing.memory is not None, "handle is of dispatch, not of low_latency_dispatch")
        if routing.answers is None:
            routing.answers = torch.empty((handle[4] // self.group_size, routing.rows, handle[3]),
                                          dtype=torch.bfloat16, device=routing.memory.device)
        return routing.answers

    def _run(self, group, name, args, async_finish, return_recv_hook):
        """(event, hook) of an operation. With a hook, both halves run on the stream that is current
        now; the hook holds all tensors, and so does the event of an asynchronous call."""
        runtime = self.runtime
        stream = runtime.current_stream()
        runtime.keep_if_captured(group)

        def call(method, **kw):
            self._masking(group, getattr(group.ep, method), **kw)

        if return_recv_hook:
            call(name + "_send", stream=stream, **args)
            return EventOverlap(), lambda: call(name + "_recv", stream=stream, **args)
        if not async_finish:
            call(name, stream=stream, **args)
            return EventOverlap(), None
        if runtime.cuda:
            runtime.comm_stream.wait_stream(torch.cuda.current_stream())
            call(name, stream=runtime.comm_stream, **args)
            passed = torch.cuda.Event()
            passed.record(runtime.comm_stream)
            event = EventHandle._of(passed)
        else:
            call(name, stream=group.host_stream(), **args)
            event = group.host_event(lambda: call("ll_status"))
        return EventOverlap(event, tuple(t for t in args.values()
                                         if isinstance(t, torch.Tensor))), None

    # ------------------------------------------------------------------------- shrinking: masks

    def _masking(self, group, method, **kw):
        """The call; with enable_shrink, that it has masked a rank is printed, as DeepEP does."""
        try:
            method(**kw)
        except (ep.TimeoutError_, ep.PeerError) as error:
            if not self.enable_shrink or group.ep.fault() is not None:
                raise
            print(f"Warning: DeepEP timeout for rank {self.rank}: {error}", flush=True)

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
