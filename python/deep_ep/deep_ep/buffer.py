# SPDX-License-Identifier: MIT
"""
Buffer: DeepEP's class. Argument checks, allocation of outputs and streams are here; what moves is
libep's work (`ep`), and groups are _runtime's.

Errors are of DeepEP's classes: what its Python asserts is an AssertionError, what its C++ asserts a
RuntimeError, and libep's own errors are RuntimeErrors, too.
"""
import os

import ep
import torch

from . import _layout
from ._config import default_config, host_check, low_latency_bytes, round_up
from ._low_latency import LowLatency
from ._runtime import Routing, Runtime, is_capturing
from .utils import EventHandle, EventOverlap, check_nvlink_connections


def _gather_of(group, comm):
    """(rank, ranks, all-gather of objects) of a process group of any backend, or an mpi4py comm."""
    if group is not None:
        def gather(obj):
            out = [None] * group.size()
            torch.distributed.all_gather_object(out, obj, group)
            return out
        return group.rank(), group.size(), gather
    if comm is not None:
        return comm.Get_rank(), comm.Get_size(), comm.allgather
    raise ValueError("Buffer needs a group (of torch.distributed) or a comm (of mpi4py)")


class Buffer(LowLatency):
    num_sms = 20

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False,
                 num_qps_per_rank=24, allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False,
                 use_fabric=False, explicitly_destroy=False, enable_shrink=False, comm=None):
        """
        Collective. The sizes are kept for callers that read them, and allocate nothing: libep's
        memory is made by the first call, which knows what it needs. num_qps_per_rank and the
        allow_... and use_... switches choose between ways that libep chooses between itself.
        """
        check_nvlink_connections(group)
        rank, size, gather = _gather_of(group, comm)
        host_check(num_nvl_bytes >= 0, f"num_nvl_bytes is {num_nvl_bytes}, must be at least 0")
        host_check(num_rdma_bytes >= 0, f"num_rdma_bytes is {num_rdma_bytes}, must be at least 0")
        self.rank = rank
        self.group_size = size
        self.group = group if group is not None else comm
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime = None
        runtime = Runtime(rank, size, gather, low_latency_mode, enable_shrink)
        if low_latency_mode or runtime.get_num_rdma_ranks() > 1:
            assert num_qps_per_rank > 0, f"num_qps_per_rank is {num_qps_per_rank}, must be above 0"
            self.nvshmem_qp_depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
        self._zero = torch.zeros(1, dtype=torch.int32, device=runtime.device)
        self.runtime = runtime

    def destroy(self):
        """Frees what the Buffer has; waits for no other rank. Handles stay valid."""
        assert self.explicitly_destroy, "destroy() needs a Buffer made with explicitly_destroy=True"
        self._alive().close()
        self.runtime = None

    def __del__(self):
        if getattr(self, "explicitly_destroy", False) and getattr(self, "runtime", None) is not None:
            print("WARNING: destroy() was not called before DeepEP buffer destruction, which can leak "
                  "resources.")

    def _alive(self):
        host_check(self.runtime is not None, "this Buffer was destroyed")
        return self.runtime

    # ------------------------------------------------------------------ class and static methods

    @staticmethod
    def is_sm90_compiled():
        return True

    @staticmethod
    def set_num_sms(new_num_sms):
        """The SMs of calls without a Config. At 20, DeepEP's default, libep chooses by its formula."""
        assert new_num_sms % 2 == 0, f"num_sms is {new_num_sms}, must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture():
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks,
                                       num_experts):
        return low_latency_bytes(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks):
        return default_config(Buffer.num_sms, num_ranks, combine=False)

    @staticmethod
    def get_combine_config(num_ranks):
        return default_config(Buffer.num_sms, num_ranks, combine=True)

    @staticmethod
    def _unpack_bias(bias):
        if isinstance(bias, torch.Tensor):
            return bias, None
        if isinstance(bias, tuple):
            assert len(bias) == 2, f"bias is a tuple of {len(bias)}, must be of 2"
            return bias
        return None, None

    # ------------------------------------------------------------------------- instance helpers

    def get_comm_stream(self):
        """The stream of asynchronous calls; on a CPU torch's own, which stands for all."""
        return self._alive().comm_stream or torch.cpu.current_stream()

    def get_local_buffer_tensor(self, dtype, size=None, offset=0, use_rdma_buffer=False):
        """The memory that low-latency rows travel through, from its byte `offset` on; engines clear
        it after a fault, which is allowed while nothing is in flight, and needless. Before there is
        any, and of throughput mode, whose memory no caller may write to, zeroed memory of the size
        that the Buffer was made with."""
        runtime = self._alive()
        group = runtime._group
        if use_rdma_buffer and group is not None and group.needs["ll_max_tokens"]:
            view = ep.Tensor()
            group.ep.ll_memory(view=view)
            flat = torch.from_dlpack(view)
        else:
            num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
            flat = torch.zeros(num_bytes, dtype=torch.uint8, device=runtime.device)
        flat = flat[offset:]
        flat = flat[:flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return flat
        assert flat.numel() >= size.numel(), (f"size has {size.numel()} elements, the buffer holds "
                                              f"{flat.numel()}")
        return flat[:size.numel()].view(size)

    def _workers(self, given, config):
        """num_workers of a call: of a CUDA group the SMs that the caller allows, 0: libep's choice."""
        return config._num_sms if self.runtime.cuda and (given or config._num_sms != 20) else 0

    # --------------------------------------------------------------------------- throughput mode

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False,
                            allocate_on_comm_stream=False):
        """(num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank,
        event). Local."""
        runtime = self._alive()
        _layout.check_ids(topk_idx)
        host_check(num_experts > 0, f"num_experts is {num_experts}, must be above 0")
        call = runtime.call(previous_event, async_finish, allocate_on_comm_stream)
        if not (runtime.cuda and async_finish):
            if async_finish and call.before is not None:
                call.before.current_stream_wait()
            out = runtime.layout(topk_idx, num_experts)
        else:
            with torch.cuda.stream(call.stream):
                out = runtime.layout(topk_idx, num_experts)
            for t in out:  # it all came from the comm stream's memory
                if t is not None:
                    t.record_stream(call.compute)
        return out + (call.end(None, None, topk_idx),)

    def dispatch(self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None,
                 is_token_in_rank=None, num_tokens_per_expert=None, topk_idx=None,
                 topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None,
                 previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle,
        event). Collective."""
        runtime = self._alive()
        x, scales = x if isinstance(x, tuple) else (x, None)
        given = config is not None
        config = config if given else self.get_dispatch_config(self.group_size)
        workers = self._workers(given, config)
        if handle is not None:
            assert topk_idx is None and topk_weights is None, \
                "topk_idx and topk_weights must be None in a dispatch with a handle"
            call = runtime.call(previous_event, async_finish, allocate_on_comm_stream)
            return self._dispatch_again(call, x, scales, Routing.find(handle), workers)
        _check_rows("x", x)
        host_check(scales is None or (scales.dim() == 2 and scales.size(0) == x.size(0)),
                   lambda: f"x[1], the scales, must be [{x.size(0)}, scales of a row]")
        for name, tensor in (("num_tokens_per_rank", num_tokens_per_rank),
                             ("is_token_in_rank", is_token_in_rank),
                             ("num_tokens_per_expert", num_tokens_per_expert)):
            assert tensor is not None, f"{name} must be given in a dispatch without a handle"
        _check_layout(x.size(0), self.group_size, is_token_in_rank, num_tokens_per_expert)
        host_check((topk_idx is None) == (topk_weights is None),
                   "topk_idx and topk_weights must be given both or neither")
        if topk_idx is not None:
            _layout.check_ids(topk_idx, x.size(0))
            host_check(topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape,
                       lambda: f"topk_weights is {topk_weights.dtype} {list(topk_weights.shape)}, "
                       f"must be float32 {list(topk_idx.shape)}, as topk_idx")
        host_check(not num_worst_tokens or topk_idx is not None,
                   "num_worst_tokens needs topk_idx and topk_weights")
        call = runtime.call(previous_event, async_finish, allocate_on_comm_stream)
        args = dict(x=x, scales=scales, topk_weights=topk_weights, num_workers=workers)
        needs = dict(num_experts=num_tokens_per_expert.size(0),
                     max_topk=topk_idx.size(1) if topk_idx is not None else 0,
                     max_row_bytes=x.size(1) * max(x.element_size(), 2),
                     max_scale_bytes=scales.size(1) * scales.element_size() if scales is not None
                     else 0, mask_routing=int(topk_idx is None))
        mine = slice(*_experts_of(self.rank, needs["num_experts"], self.group_size))
        with runtime.lock:
            routing, out, counts = self._send(call, args, needs, topk_idx, is_token_in_rank,
                                              num_worst_tokens)
        if counts is not None and topk_idx is None:
            # Nobody but tests dispatches without ids: the counts go by way of the process group.
            every = runtime.gather(num_tokens_per_expert.tolist())
            counts = [sum(of_rank) for of_rank in zip(*(c[mine] for c in every))]
        elif counts is not None:
            counts = counts[:mine.stop - mine.start]
        event = call.end(routing.group, routing.ep.status, x, scales, topk_idx, topk_weights,
                         is_token_in_rank, *out.values())
        recv_x = out["recv_x"] if scales is None else (out["recv_x"], out["recv_scales"])
        return (recv_x, out["recv_topk_ids"], out["recv_topk_weights"],
                [] if counts is None else [round_up(n, expert_alignment) for n in counts],
                self._handle(routing, is_token_in_rank, out, config._num_sms // 2), event)

    def internode_dispatch(self, x, handle=None, num_tokens_per_rank=None,
                           num_tokens_per_rdma_rank=None, is_token_in_rank=None,
                           num_tokens_per_expert=None, topk_idx=None, topk_weights=None,
                           expert_alignment=1, num_worst_tokens=0, config=None,
                           previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        assert config is not None, "config must be given to internode_dispatch"
        return self.dispatch(x, handle, num_tokens_per_rank, num_tokens_per_rdma_rank,
                             is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights,
                             expert_alignment, num_worst_tokens, config, previous_event,
                             async_finish, allocate_on_comm_stream)

    def _dispatch_again(self, call, x, scales, routing, workers):
        if x.dim() != 2 or x.size(0) != routing.tokens:  # libep checks the rest
            raise RuntimeError(f"x is {list(x.shape)}, the handle is of {routing.tokens} tokens")
        self.runtime.keep_if_captured(routing)
        with call.allocating:
            recv_x = x.new_empty((routing.rows, x.size(1)))
            recv_scales = None if scales is None else scales.new_empty((routing.rows, scales.size(1)))
        routing.ep.dispatch(x=x, scales=scales, recv_x=recv_x, recv_scales=recv_scales,
                            num_workers=workers, stream=call.stream_of(routing.group))
        event = call.end(routing.group, routing.ep.status, x, scales, recv_x, recv_scales)
        return (recv_x if scales is None else (recv_x, recv_scales)), None, None, None, None, event

    def _send(self, call, args, needs, topk_idx, is_token_in_rank, worst):
        """A dispatch without a handle: (routing, outputs, counts per expert or None). Nobody asks the
        others for their tokens: libep tells all ranks what was lacking, and all make a larger group."""
        x, runtime = args["x"], self.runtime
        capturing = runtime.cuda and is_capturing()
        where = dict(topk_ids=topk_idx) if topk_idx is not None else \
            dict(token_in_rank=is_token_in_rank)
        group = runtime.group_for(x.size(0), **needs)
        while True:
            stream = call.stream_of(group)
            routing = Routing(group, ep.Handle(
                group.ep, max_tokens=min(max(x.size(0), 1), group.needs["max_tokens"]),
                max_topk=needs["max_topk"],
                flags=ep.HANDLE_LENIENT_IDS), x.size(0), worst)
            runtime.keep_if_captured(routing)
            routing.ep.route(num_experts=needs["num_experts"], stream=stream, **where)
            if capturing:
                host_check(worst, "a dispatch without a handle waits for its counts, which a captured "
                                  "one cannot: give num_worst_tokens")
                out = self._outputs(call, args, topk_idx, worst)
                routing.ep.dispatch(stream=stream, **args, **out)
                return routing, out, None
            try:
                routing.ep.dispatch_begin(stream=stream, **args)
                counts = routing.ep.counts()
            except ep.CapacityError as error:
                # Every rank has it, nothing was sent: all make a larger group, and all try again.
                lacks = error.needs
                group = runtime.grow(dict(needs, max_tokens=lacks.max_tokens,
                                          max_recv_rows=lacks.max_recv_rows), error)
                continue
            except (ep.TimeoutError_, ep.FaultedError) as error:
                if error.fault is not None and error.fault.status != "EP_ERR_TIMEOUT":
                    raise
                which = "timeout (dispatch CPU)" if runtime.get_num_rdma_ranks() > 1 else \
                    "CPU recv timeout"
                raise RuntimeError(f"DeepEP error: {which}: {error}") from error
            routing.rows = worst or counts.rows
            out = self._outputs(call, args, topk_idx, routing.rows)
            routing.ep.dispatch_finish(stream=stream, num_workers=args["num_workers"], **out)
            host_check(counts.rows <= routing.rows, lambda: f"num_worst_tokens is {worst}, and "
                       f"{counts.rows} rows come")  # a GPU itself tells it later
            return routing, out, None if worst else counts.rows_per_expert

    def _outputs(self, call, args, topk_idx, rows):
        x, scales = args["x"], args["scales"]
        with call.allocating:
            return dict(
                recv_x=x.new_empty((rows, x.size(1))),
                recv_scales=None if scales is None else scales.new_empty((rows, scales.size(1))),
                recv_topk_ids=None if topk_idx is None else
                topk_idx.new_empty((rows, topk_idx.size(1))),
                recv_topk_weights=None if topk_idx is None else
                args["topk_weights"].new_empty((rows, topk_idx.size(1))),
                recv_source=self._zero.new_empty((rows, 2)),
                source_ends=self._zero.new_empty(self.group_size))

    def _handle(self, routing, in_rank, out, channels):
        """A tuple of DeepEP's shapes. What its callers read is there: the ends of the sources' rows,
        the rows' tokens, is_token_in_rank. The rest is zeros without memory of their own."""
        ranks, ends, source = self.group_size, out["source_ends"], out["recv_source"]
        zeros = self._zero.expand
        nodes = self.runtime.get_num_rdma_ranks()
        if nodes == 1:
            mine = routing.mark((ends[:, None].expand(ranks, ranks), zeros(ranks, channels),
                                 zeros(ranks, channels), source[:, 1], zeros(routing.tokens, ranks)))
            return mine[:4] + (in_rank,) + mine[4:]
        return (in_rank,) + routing.mark((
            zeros(nodes, channels), zeros(ranks, channels), zeros(nodes, channels), zeros(nodes),
            zeros(ranks, channels), ends, source.view(torch.uint8), zeros(routing.tokens, nodes),
            zeros(source.size(0), 8)))

    def combine(self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None,
                async_finish=False, allocate_on_comm_stream=False):
        """(combined_x, combined_topk_weights, event). Collective."""
        runtime = self._alive()
        routing = Routing.find(handle)
        host_check(routing.ep is not None, "handle is of low_latency_dispatch, not of dispatch")
        if x.dim() != 2 or x.size(0) != routing.rows:  # libep checks the rest
            raise RuntimeError(f"x is {list(x.shape)}, must have {routing.rows} rows, as recv_x of the "
                               "handle")
        bias = self._unpack_bias(bias)
        for i, b in enumerate(bias):
            if b is not None:
                host_check(b.shape == (routing.tokens, x.size(1)) and b.dtype == x.dtype and
                           b.is_contiguous(), lambda: f"bias_{i} must be contiguous {x.dtype} "
                           f"[{routing.tokens}, {x.size(1)}]")
        if topk_weights is not None:
            host_check(topk_weights.dim() == 2 and topk_weights.size(0) == x.size(0) and
                       topk_weights.dtype == torch.float32,
                       lambda: f"topk_weights must be float32 [{x.size(0)}, topk]")
            topk_weights = topk_weights.contiguous()
        call = runtime.call(previous_event, async_finish, allocate_on_comm_stream)
        runtime.keep_if_captured(routing)
        with call.allocating:
            out = x.new_empty((routing.tokens, x.size(1)))
            out_weights = None if topk_weights is None else \
                topk_weights.new_empty((routing.tokens, topk_weights.size(1)))
        given = config is not None
        config = config if given else self.get_combine_config(self.group_size)
        routing.ep.combine(x=x, topk_weights=topk_weights, bias=bias, out=out,
                           out_topk_weights=out_weights, num_workers=self._workers(given, config),
                           stream=call.stream_of(routing.group))
        event = call.end(routing.group, routing.ep.status, x, topk_weights, *bias, out, out_weights)
        return out, out_weights, event

    def internode_combine(self, x, handle, topk_weights=None, bias=None, config=None,
                          previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        assert config is not None, "config must be given to internode_combine"
        return self.combine(x, handle, topk_weights, bias, config, previous_event, async_finish,
                            allocate_on_comm_stream)


def _experts_of(rank, num_experts, num_ranks):
    each, more = divmod(num_experts, num_ranks)
    first = rank * each + min(rank, more)
    return first, first + each + (rank < more)


def _check_rows(name, x):
    if x.dim() != 2 or not x.is_contiguous() or x.size(1) * x.element_size() % 16:
        raise RuntimeError(f"{name} is {x.dtype} {list(x.shape)} of strides {x.stride()}, must be "
                           f"contiguous [tokens, hidden] with rows of a multiple of 16 bytes")


def _check_layout(tokens, num_ranks, is_token_in_rank, num_tokens_per_expert):
    host_check(is_token_in_rank.dtype == torch.bool and is_token_in_rank.is_contiguous() and
               is_token_in_rank.shape == (tokens, num_ranks),
               lambda: f"is_token_in_rank is {is_token_in_rank.dtype} "
               f"{list(is_token_in_rank.shape)}, must be contiguous bool [{tokens}, {num_ranks}]")
    host_check(num_tokens_per_expert.dim() == 1 and num_tokens_per_expert.dtype == torch.int32,
               lambda: f"num_tokens_per_expert is {num_tokens_per_expert.dtype} "
               f"{list(num_tokens_per_expert.shape)}, must be int32 [experts]")
