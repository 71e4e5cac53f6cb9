# SPDX-License-Identifier: MIT
"""How engines call deep_ep: their arguments, what they read, the order of their calls. Written from
a survey of vLLM 0.33, SGLang 0.5, Megatron-Core 0.19, NeMo Automodel 0.7, lmdeploy 0.18, rtp-llm."""
import gc
import importlib.metadata
import inspect
import weakref

import deep_ep
import pytest
import torch
from deep_ep import Buffer, Config
from deep_ep.utils import EventHandle, EventOverlap

from test_deep_ep_decode import Decode, M
from deep_ep_ranks import Batch, on_ranks, rank_pools  # noqa: F401


def bf16(x):
    return x.to(torch.bfloat16)


@on_ranks(4)
def test_vllm_high_throughput(group):
    assert not hasattr(deep_ep, "ElasticBuffer")  # its probe for the next generation
    cache = weakref.WeakValueDictionary()
    kwargs = dict(group=group, num_nvl_bytes=1 << 20, num_rdma_bytes=0, low_latency_mode=False,
                  num_qps_per_rank=1, explicitly_destroy=True)
    buffer = cache[tuple(kwargs)] = Buffer(**kwargs)
    Buffer.set_num_sms(min(24, 20))
    batches = [Batch(group, seed=s, tokens=t) for s, t in ((1, 24), (2, [0, 9, 0, 2]))]
    handles = []  # two micro-batches
    for b in batches:
        previous = buffer.capture()
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            topk_idx=b.topk_idx, num_experts=b.experts, previous_event=previous, async_finish=False,
            allocate_on_comm_stream=False)
        recv_x, ids, weights, counts, handle, event = buffer.dispatch(
            x=b.x, handle=None, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=b.topk_idx,
            topk_weights=b.topk_weights, expert_alignment=1, config=None, previous_event=previous,
            async_finish=True, allocate_on_comm_stream=False)
        if event.event is not None:
            event.current_stream_wait()
        ids = torch.where(ids == -1, -1, ids + b.rank * b.local)
        assert torch.equal(recv_x, b.received(b.xs)) and counts == b.counts()
        assert torch.equal((ids >= 0).sum(), torch.tensor(sum(counts)))
        handles.append(handle)
    for b, handle in zip(batches, handles):
        fused = bf16(b.received(b.xs).float() * 2)
        out, _, event = buffer.combine(x=fused, handle=handle, topk_weights=None,
                                       config=Buffer.get_combine_config(4),
                                       previous_event=buffer.capture(), async_finish=False,
                                       allocate_on_comm_stream=False)
        assert event.event is None and torch.equal(out, b.combined(lambda r, x: x * 2))
    buffer.destroy()
    del buffer
    gc.collect()
    assert not cache


@on_ranks(4)
def test_vllm_low_latency(group):
    b = Decode(group, hidden=512)
    hint = Buffer.get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank=M, hidden=512,
                                                 num_ranks=4, num_experts=16)
    buffer = Buffer(group=group, num_nvl_bytes=1 << 20, num_rdma_bytes=hint, low_latency_mode=True,
                    num_qps_per_rank=4, allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False,
                    explicitly_destroy=True, enable_shrink=False)
    (data, scales), count, handle, _, hook = buffer.low_latency_dispatch(
        b.x, b.topk_idx, M, 16, use_fp8=True, round_scale=False, use_ue8m0=False,
        async_finish=False, return_recv_hook=True)
    hook()
    rows = bf16(data.float() * scales.contiguous().repeat_interleave(128, dim=2))
    everywhere = torch.empty(64, 512, dtype=torch.bfloat16)
    out = everywhere[:len(b.x)]
    _, _, hook = buffer.low_latency_combine(b.answers(rows), b.topk_idx, b.topk_weights, handle,
                                            async_finish=False, zero_copy=False,
                                            return_recv_hook=True, out=out)
    hook()
    torch.testing.assert_close(out, b.sums(), rtol=0.1, atol=0.5)
    buffer.destroy()


@on_ranks(4)
def test_sglang_normal_then_low_latency(group):
    config = Config(**{"num_sms": 20, "num_max_nvl_chunked_send_tokens": 8,
                       "num_max_nvl_chunked_recv_tokens": 256})
    hidden, nvl, rdma = 256, 0, Buffer.get_low_latency_rdma_size_hint(M, 256, 4, 16)
    for c in (config, Buffer.get_combine_config(4)):
        nvl = max(nvl, c.get_nvl_buffer_size_hint(2 * hidden, 4))
        rdma = max(rdma, c.get_rdma_buffer_size_hint(2 * hidden, 4))
    buffer = Buffer(group, nvl, rdma, low_latency_mode=True, num_qps_per_rank=max(Buffer.num_sms, 4),
                    allow_mnnvl=True, use_fabric=True)
    assert (buffer.low_latency_mode, buffer.group_size) == (True, 4)
    b = Decode(group, hidden=hidden)
    previous = Buffer.capture()
    *layout, previous = buffer.get_dispatch_layout(
        b.topk_idx, 16, previous_event=previous, async_finish=True,
        allocate_on_comm_stream=previous is not None)
    packed = [torch.arange(2 * len(x), dtype=torch.int32).view(2, -1).t() for x in b.xs]
    fp8 = [x.to(torch.float8_e4m3fn) for x in b.xs]
    recv, ids, _, counts, handle, event = buffer.dispatch(
        (fp8[b.rank], packed[b.rank]), topk_idx=b.topk_idx, topk_weights=b.topk_weights,
        num_tokens_per_rank=layout[0], num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3], num_tokens_per_expert=layout[2], previous_event=previous,
        async_finish=True, allocate_on_comm_stream=True, expert_alignment=128, config=config)
    event.current_stream_wait()
    assert torch.equal(recv[1], b.received(packed)) and counts == b.counts(128)
    out, _, event = buffer.combine(b.received(b.xs), handle, async_finish=True,
                                   previous_event=Buffer.capture(), allocate_on_comm_stream=True,
                                   config=None)
    event.current_stream_wait()
    assert torch.equal(out, b.combined(lambda r, x: x))
    buffer.clean_low_latency_buffer(M, hidden, 16)
    for hooked in (True, False):
        data, count, handle, event, hook = buffer.low_latency_dispatch(
            b.x, b.topk_idx, M, 16, use_fp8=False, async_finish=not hooked, return_recv_hook=hooked)
        hook() if hooked else event.current_stream_wait()
        out, event, hook = buffer.low_latency_combine(
            x=b.answers(data), topk_idx=b.topk_idx, topk_weights=b.topk_weights, handle=handle,
            async_finish=not hooked, return_recv_hook=hooked)
        hook() if hooked else event.current_stream_wait()
        assert torch.equal(out, b.sums())


class Dispatch(torch.autograd.Function):
    """The autograd function of the Megatron family."""

    @staticmethod
    def forward(ctx, x, ids, weights, experts, buffer, replay):
        previous = EventOverlap(EventHandle())
        *layout, event = buffer.get_dispatch_layout(ids, experts, previous_event=previous,
                                                    async_finish=True, allocate_on_comm_stream=True)
        if replay is not None:  # activations are computed again: the routing is known
            recv_x, _, _, _, _, event = buffer.dispatch(x, handle=replay, previous_event=event,
                                                        async_finish=True)
            ids = weights = None
            handle = replay
        else:
            recv_x, ids, weights, _, handle, event = buffer.dispatch(
                x, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=layout[0],
                num_tokens_per_rdma_rank=layout[1], num_tokens_per_expert=layout[2],
                is_token_in_rank=layout[3], previous_event=event, async_finish=True,
                allocate_on_comm_stream=True)
        event.current_stream_wait()
        ctx.handle, ctx.buffer = handle, buffer
        return recv_x, ids, weights, handle

    @staticmethod
    def backward(ctx, grad_x, _, grad_weights, __):
        weights = None if grad_weights is None else grad_weights.float()
        grad_x, grad_weights, event = ctx.buffer.combine(grad_x.contiguous(), ctx.handle,
                                                         topk_weights=weights, async_finish=True,
                                                         previous_event=Buffer.capture())
        event.current_stream_wait()
        return grad_x, None, grad_weights, None, None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, handle, buffer):
        ctx.handle, ctx.buffer = handle, buffer
        return buffer.combine(x, handle=handle)[0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None


def layer(b, buffer, x, weights, replay=None):
    """x + the weighted experts, each of which multiplies by its number."""
    recv_x, ids, recv_weights, handle = Dispatch.apply(x, b.topk_idx, weights, b.experts, buffer,
                                                       replay)
    if replay is not None:
        ids, recv_weights = b.local_ids(), b.local_weights()
    factor = ((ids + 1 + b.rank * b.local) * recv_weights * (ids >= 0)).sum(1, keepdim=True)
    return Combine.apply(recv_x * factor, handle, buffer), handle


def local_layer(b, x, weights):
    factor = ((b.topk_idx + 1) * weights * (b.topk_idx >= 0)).sum(1, keepdim=True)
    return x * factor


@on_ranks(4)
def test_megatron_and_nemo_train_through_the_pair(group):
    assert Buffer.is_sm90_compiled() and deep_ep.__version__
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("deep_ep")  # NeMo then takes __version__
    buffer = Buffer(group, 1 << 20, 0, explicitly_destroy=True)
    for layers in (1, 6):
        b = Batch(group, dtype=torch.float32, seed=layers)
        got, want = ((b.x.clone().requires_grad_(), b.topk_weights.clone().requires_grad_())
                     for _ in range(2))
        x, y = got[0], want[0]
        for _ in range(layers):  # many handles live until the backward has used them
            x = layer(b, buffer, x, got[1])[0] / 32
            y = local_layer(b, y, want[1]) / 32
        torch.testing.assert_close(x, y)
        x.square().sum().backward()
        y.square().sum().backward()
        for ours, theirs in zip(got, want):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    # NeMo replays the dispatch of a layer through its handle when activations are recomputed.
    x = b.x.clone().requires_grad_()
    out, handle = layer(b, buffer, x, b.topk_weights)
    again, _ = layer(b, buffer, x, b.topk_weights, replay=handle)
    torch.testing.assert_close(again, out)
    again.sum().backward()
    buffer.destroy()


@on_ranks(4)
def test_gradients_of_the_pair_are_those_of_a_linear_map(group):
    buffer, b = Buffer(group), Batch(group, tokens=3, hidden=4, dtype=torch.float32)
    x = b.x.clone().requires_grad_()
    # All ranks must call alike, so one number after another is moved, on all ranks together.
    assert torch.autograd.gradcheck(
        lambda x: layer(b, buffer, x, b.topk_weights)[0], (x,), eps=1e-2, atol=1e-2, rtol=1e-2,
        nondet_tol=0)


@on_ranks(4)
def test_megatron_makes_its_buffer_again_while_handles_live(group):
    buffer, b = Buffer(group, 1 << 10, 0), Batch(group)
    handle = b.dispatch(buffer)[4]
    assert buffer.group == group and buffer.num_nvl_bytes < 1 << 12 and buffer.num_rdma_bytes == 0
    buffer = Buffer(group, 1 << 12, 0)  # the old one goes by garbage collection
    grad = buffer.combine(b.received(b.xs), handle)[0]
    assert torch.equal(grad, b.combined(lambda r, x: x))


@on_ranks(4)
def test_lmdeploy_retries_without_the_keywords_it_is_refused(group):
    Buffer.set_num_sms(20)
    tried = []

    def build(**kw):
        tried.append(kw)
        return Buffer(group, 1 << 20, 1 << 20, low_latency_mode=True, num_qps_per_rank=20, **kw)
    try:
        buffer = build(allow_mnnvl=True, explicitly_destroy=True)
    except TypeError:
        buffer = build()
    assert len(tried) == 1 and isinstance(buffer, Buffer)
    buffer.set_num_sms(20)
    assert buffer.group is group and buffer.num_rdma_bytes == 1 << 20
    b = Batch(group)
    b.dispatch(buffer)
    buffer.clean_low_latency_buffer(M, 64, 16)
    buffer.destroy()


@on_ranks(4)
def test_rtp_llm_passes_a_float_and_probes_for_its_fork(group):
    buffer = Buffer(group, 0, 1 << 20, low_latency_mode=True, num_qps_per_rank=16 / 4)
    assert not hasattr(Buffer, "get_low_latency_rdma_size_hint_m2n")
    assert buffer.get_comm_stream() is not None
    assert "topk_idx" in inspect.signature(buffer.low_latency_dispatch).parameters
