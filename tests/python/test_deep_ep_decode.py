# SPDX-License-Identifier: MIT
"""deep_ep, low-latency mode: shapes, strides, values, halves and events, on 4 ranks with gloo."""
import contextlib
import io
import time

import ep
import pytest  # noqa: F401
import torch
import torch.distributed as dist
from deep_ep import Buffer

from conftest import DEVICE
from deep_ep_ranks import Batch, impatient, on_ranks, rank_pools, raises  # noqa: F401

M = 32


class Decode(Batch):
    """A batch whose rows arrive once for each expert that selected them."""

    def __init__(self, group, tokens=(24, 0, 7, 32), hidden=256, most=M, **kw):
        super().__init__(group, tokens=list(tokens), hidden=hidden, **kw)
        self.most = most

    def rows_of(self, e):
        """(source rank, token, k) of the rows of local expert e, in order."""
        wanted = self.rank * self.local + e
        return [(s, t, k) for s in range(self.size) for t, k in
                (self.ids[s] == wanted).nonzero().tolist()]

    def answers(self, recv):
        """Every expert's answers, in the places of its rows: the row times its expert's number."""
        numbers = torch.arange(1, self.local + 1).view(-1, 1, 1) + self.rank * self.local
        return (recv.float() * numbers).to(torch.bfloat16)

    def sums(self, xs=None, weights=None):
        """What combine gives this rank: each rank's own sum rounded once, then the sum of them."""
        x = (self.x if xs is None else xs[self.rank]).float()
        weights = self.topk_weights if weights is None else weights
        out = torch.zeros_like(x)
        for r in range(self.size):
            y = torch.zeros_like(x)
            for k in range(self.ids[self.rank].size(1)):
                e = self.topk_idx[:, k]
                row = (x * (e + 1)[:, None]).to(torch.bfloat16).float() * weights[:, k, None]
                y += torch.where(((e >= 0) & (e // self.local == r))[:, None], row, 0.0)
            out += y.to(torch.bfloat16).float()
        return out.to(torch.bfloat16)

    def check(self, data, count, handle, xs):
        source, ranges = handle[0], handle[1]
        assert handle[2:] == (self.most, self.x.size(1), self.experts_total)
        for e in range(self.local):
            rows = self.rows_of(e)
            assert count[e] == len(rows)
            assert source[e, :len(rows)].tolist() == [t for _, t, _ in rows]
            for s in range(self.size):
                first, n = ranges[e, s].item() >> 32, ranges[e, s].item() & 0xffffffff
                assert [r[0] for r in rows[first:first + n]] == [s] * n
            for place, (s, t, _) in enumerate(rows):
                assert torch.equal(data[e, place], xs[s][t])

    @property
    def experts_total(self):
        return self.local * self.size


def quantised(x, power_of_2):
    """(rows as float8, scales) as DeepEP casts them."""
    parts = x.float().view(len(x), x.size(1) // 128, 128)
    amax = parts.abs().amax(2).clamp(min=1e-4)
    scale, factor = amax * torch.tensor(1 / 448), torch.tensor(448.0) / amax
    if power_of_2:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones(1), exponent - (mantissa == 0.5).int())
        factor = 1 / scale
    return (parts * factor[:, :, None]).to(torch.float8_e4m3fn).view(x.shape), scale


def buffer_of(group, hidden=256, experts=16):
    size = Buffer.get_low_latency_rdma_size_hint(M, hidden, group.size(), experts)
    return Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=experts // group.size())


@on_ranks(4)
def test_rows_and_answers_travel_in_one_call_in_halves_and_asynchronously(group):
    buffer, b = buffer_of(group), Decode(group)
    for way in ({}, {"return_recv_hook": True}, {"async_finish": True}, {}):
        data, count, handle, event, hook = buffer.low_latency_dispatch(
            b.x, b.topk_idx, M, 16, use_fp8=False, **way)
        end(way, event, hook)
        assert data.shape == (4, 4 * M, 256) and data.is_contiguous()
        assert data.dtype == torch.bfloat16 and count.dtype == torch.int32
        assert handle[0].shape == (4, 4 * M) and handle[0].dtype == torch.int32
        assert handle[1].shape == (4, 4) and handle[1].dtype == torch.int64
        b.check(data, count, handle, b.xs)
        kept = torch.empty(len(b.x), 256, dtype=torch.bfloat16)
        for out in (None, kept):  # a handle is combined again
            got, event, hook = buffer.low_latency_combine(b.answers(data), b.topk_idx, b.topk_weights,
                                                          handle, out=out, **way)
            end(way, event, hook)
            assert out is None or got is out
            assert torch.equal(got, b.sums())


def end(way, event, hook):
    """The event and the hook are what the way promises; waits by them."""
    assert (hook is not None) == ("return_recv_hook" in way)
    assert (event.event is not None) == ("async_finish" in way)
    if hook is not None:
        hook()
    elif event.event is not None:
        assert len(event.extra_tensors) > 2
        event.current_stream_wait()


@on_ranks(4)
def test_answers_travel_in_logfmt(group):
    buffer, b = buffer_of(group), Decode(group)
    for way in ({}, {"return_recv_hook": True}):
        data, _, handle, _, _ = buffer.low_latency_dispatch(b.x, b.topk_idx, M, 16, use_fp8=False)
        answers = b.answers(data)
        for scale in (2.0 ** 8, 2.0 ** -10):  # some channels are above 1: as they are; all are below
            got, event, hook = buffer.low_latency_combine(
                (answers.float() * scale).bfloat16(), b.topk_idx, b.topk_weights, handle,
                use_logfmt=True, **way)
            end(way, event, hook)
            got, want = got.double() / scale, b.sums().double()
            assert len(b.x) == 0 or torch.equal(got, want) == (scale > 1)
            assert (got - want).norm() <= 0.01 * want.norm()


@on_ranks(4)
def test_rows_are_cast_to_fp8_with_scales_column_major(group):
    for hidden in (512, 640):
        buffer, b = buffer_of(group), Decode(group, hidden=hidden)
        for power_of_2, packed in ((False, False), (True, False), (True, True)):
            (data, scales), count, handle, _, _ = buffer.low_latency_dispatch(
                b.x, b.topk_idx, M, 16, round_scale=power_of_2, use_ue8m0=packed)
            rows, groups = 4 * M, -(-hidden // 512) if packed else hidden // 128
            assert data.dtype == torch.float8_e4m3fn and data.shape == (4, rows, hidden)
            assert scales.shape == (4, rows, groups)
            assert scales.stride() == (groups * rows, 1, rows)
            assert scales.dtype == (torch.int32 if packed else torch.float32)
            cast = [quantised(x, power_of_2) for x in b.xs]
            b.check(data.view(torch.uint8), count, handle, [q.view(torch.uint8) for q, _ in cast])
            if packed:
                octets = torch.stack([scales >> 8 * j & 255 for j in range(4)], 3).flatten(2)
                scales = torch.ldexp(torch.ones(1), octets[:, :, :hidden // 128] - 127)
            b.check(scales, count, handle, [s for _, s in cast])


@on_ranks(4)
def test_received_rows_are_added_up_for_each_expert(group):
    buffer, b = buffer_of(group), Decode(group)
    totals = torch.tensor([5, 0, 0, 1], dtype=torch.int32)
    for way in ({}, {"return_recv_hook": True}, {"async_finish": True}):
        _, count, _, event, hook = buffer.low_latency_dispatch(
            b.x, b.topk_idx, M, 16, cumulative_local_expert_recv_stats=totals, **way)
        end(way, event, hook)
    assert torch.equal(totals, torch.tensor([5, 0, 0, 1]) + 3 * count)


@on_ranks(4)
def test_the_time_that_a_late_rank_was_waited_for_is_told(group):
    buffer, b, late = buffer_of(group), Decode(group), 2
    waits = [torch.zeros(4, dtype=torch.int64) for _ in range(2)]

    def dispatch(**stats):
        return buffer.low_latency_dispatch(b.x, b.topk_idx, M, 16, use_fp8=False, return_recv_hook=True,
                                           **stats)

    dispatch()[-1]()  # which makes the group
    if b.rank != late:
        data, _, handle, _, hook = dispatch(dispatch_wait_recv_cost_stats=waits[0])
    dist.barrier(group)
    if b.rank == late:
        time.sleep(0.2)
        data, _, handle, _, hook = dispatch(dispatch_wait_recv_cost_stats=waits[0])
    hook()
    dist.barrier(group)
    time.sleep(0.2 if b.rank == late else 0)
    buffer.low_latency_combine(b.answers(data), b.topk_idx, b.topk_weights, handle,
                               combine_wait_recv_cost_stats=waits[1])
    told = waits[0].tolist()
    assert told.pop(late) >= (0 if b.rank == late else 10_000_000) and told == [0] * 3
    assert b.rank == late or waits[1][late] > 10_000_000


@on_ranks(4)
def test_answers_are_taken_from_the_memory_that_the_handle_lends(group):
    buffer, batches = buffer_of(group), [Decode(group, seed=seed) for seed in (5, 6)]
    lent = []
    for b in batches:
        data, _, handle, _, _ = buffer.low_latency_dispatch(b.x, b.topk_idx, M, 16, use_fp8=False)
        raises(RuntimeError, "get_next_low_latency_combine_buffer", buffer.low_latency_combine, data,
               b.topk_idx, b.topk_weights, handle, zero_copy=True)
        answers = buffer.get_next_low_latency_combine_buffer(handle)
        assert answers.shape == data.shape and answers.dtype == torch.bfloat16
        answers[:] = b.answers(data)
        lent.append((handle, answers))
    for b, (handle, answers) in zip(batches, lent):  # each has its own, which stays
        assert buffer.get_next_low_latency_combine_buffer(handle).data_ptr() == answers.data_ptr()
        ignored = torch.full_like(answers, float("nan"))
        for _ in range(2):
            assert torch.equal(buffer.low_latency_combine(ignored, b.topk_idx, b.topk_weights, handle,
                                                          zero_copy=True)[0], b.sums())
        raises(RuntimeError, "shape", buffer.low_latency_combine, ignored[:, :, :128].contiguous(),
               b.topk_idx, b.topk_weights, handle, zero_copy=True)


@on_ranks(4)
def test_two_micro_batches_overlap_by_their_hooks(group):
    buffer = buffer_of(group)
    one, two = Decode(group, seed=5), Decode(group, tokens=(1, 30, 0, 8), seed=6)
    for _ in range(3):
        sent = [buffer.low_latency_dispatch(b.x, b.topk_idx, M, 16, use_fp8=False,
                                            return_recv_hook=True) for b in (one, two)]
        back = []
        for b, (data, count, handle, _, hook) in zip((one, two), sent):
            hook()
            b.check(data, count, handle, b.xs)
            back.append(buffer.low_latency_combine(b.answers(data), b.topk_idx, b.topk_weights,
                                                   handle, return_recv_hook=True))
        for b, (out, _, hook) in zip((one, two), back):
            hook()
            assert torch.equal(out, b.sums())


@on_ranks(4)
def test_shapes_that_deep_ep_has_not(group):
    buffer = buffer_of(group)
    for kw in (dict(hidden=128), dict(topk=14), dict(tokens=(600, 3, 0, 9), most=1024),
               dict(experts=48, tokens=(3, 1, 2, 5), most=5)):
        b = Decode(group, **kw)
        experts = b.experts_total
        data, count, handle, _, _ = buffer.low_latency_dispatch(b.x, b.topk_idx, b.most, experts,
                                                                use_fp8=False)
        b.check(data, count, handle, b.xs)
        out = buffer.low_latency_combine(b.answers(data), b.topk_idx, b.topk_weights, handle)[0]
        assert torch.equal(out, b.sums())


@on_ranks(4)
def test_both_modes_share_a_buffer(group):
    buffer, b = buffer_of(group), Decode(group)
    for _ in range(2):
        recv_x, _, _, _, handle, _ = b.dispatch(buffer)
        assert torch.equal(recv_x, b.received(b.xs))
        buffer.clean_low_latency_buffer(M, 256, 16)
        data, count, low, _, _ = buffer.low_latency_dispatch(b.x, b.topk_idx, M, 16, use_fp8=False)
        assert torch.equal(buffer.combine(recv_x, handle)[0], b.combined(lambda r, x: x))
        b.check(data, count, low, b.xs)
        low = (*low[:3], 512, low[4])  # TensorRT-LLM rebuilds the tuple with another hidden
        out = buffer.low_latency_combine(b.answers(data), b.topk_idx, b.topk_weights, low)[0]
        assert torch.equal(out, b.sums())


@on_ranks(4)
def test_bad_calls_name_the_argument(group):
    buffer, b = buffer_of(group), Decode(group, tokens=(24, 3, 7, 32))
    send, back = buffer.low_latency_dispatch, buffer.low_latency_combine
    good = dict(x=b.x, topk_idx=b.topk_idx, num_max_dispatch_tokens_per_rank=M, num_experts=16)
    send(**good)  # what was found good once is not taken for good
    for name, bad in (("x", b.x.float()), ("x", b.x[:, :100].contiguous()), ("x", b.x[:, ::2]),
                      ("x", torch.zeros(M + 1, 256, dtype=torch.bfloat16)),
                      ("topk_idx", torch.zeros(len(b.x) + 1, 4, dtype=torch.int64)),
                      ("x", torch.zeros(256, len(b.x), dtype=torch.bfloat16).t()),
                      ("topk_idx", b.topk_idx.float()), ("num_experts", 18),
                      ("cumulative_local_expert_recv_stats", torch.zeros(3)),
                      ("dispatch_wait_recv_cost_stats", torch.zeros(4, 4, dtype=torch.int64))):
        raises(RuntimeError, name, send, **{**good, name: bad})
    raises(RuntimeError, "round_scale", send, **good, use_ue8m0=True)
    raises(RuntimeError, "return_recv_hook", send, **good, async_finish=True, return_recv_hook=True)
    data, _, handle, _, _ = send(**good, use_fp8=False)
    good = dict(x=data, topk_idx=b.topk_idx, topk_weights=b.topk_weights, handle=handle)
    back(**good)
    for name, bad in (("x", data[0]), ("x", data.float()), ("x", data[:, :3].contiguous()),
                      ("topk_weights", b.topk_weights.double()), ("out", torch.zeros(3, 3)),
                      ("topk_idx", torch.zeros(len(b.x) + 1, 4, dtype=torch.int64)),
                      ("combine_wait_recv_cost_stats", torch.zeros(4, dtype=torch.int32)),
                      ("handle", handle[2:])):
        raises(RuntimeError, name, back, **{**good, name: bad})
    raises(RuntimeError, "return_recv_hook", back, **good, async_finish=True, return_recv_hook=True)
    raises(RuntimeError, "use_logfmt", back, **good, zero_copy=True, use_logfmt=True)
    plain = Buffer(group)
    normal = b.dispatch(plain)[4]
    raises(RuntimeError, "handle", back, **{**good, "handle": normal})
    raises(AttributeError, "low_latency_mode", plain.low_latency_dispatch, b.x, b.topk_idx, M, 16)
    raises(AttributeError, "low_latency_mode", plain.low_latency_combine, **good)
    raises(RuntimeError, "low_latency_mode", plain.clean_low_latency_buffer, M, 256, 16)


@on_ranks(4)
def test_a_masked_rank_is_left_out_and_taken_back(group):
    size = Buffer.get_low_latency_rdma_size_hint(M, 256, 4, 16)
    buffer, b = Buffer(group, 0, size, low_latency_mode=True, enable_shrink=True), Decode(group)
    masks = torch.full((4,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(masks)
    assert masks.tolist() == [0] * 4

    def pair():
        data, count, handle, _, _ = buffer.low_latency_dispatch(b.x, b.topk_idx, M, 16, use_fp8=False)
        return handle, buffer.low_latency_combine(b.answers(data), b.topk_idx, b.topk_weights,
                                                  handle)[0]
    assert torch.equal(pair()[1], b.sums())
    dist.barrier()  # a rank that is masked while it still waits ends that call without the others
    for r in range(4):  # ranks 0 to 2 and rank 3 part
        if (r == 3) != (group.rank() == 3):
            buffer.low_latency_update_mask_buffer(r, True)
    buffer.low_latency_query_mask_buffer(masks)
    assert masks.tolist() == ([1, 1, 1, 0] if group.rank() == 3 else [0, 0, 0, 1])
    handle, out = pair()
    seen = handle[1] & 0xffffffff
    assert not seen[:, masks.bool()].any() and seen[:, ~masks.bool()].any()
    kept = torch.where(masks[b.topk_idx.clamp(min=0) // 4].bool(), 0.0, b.topk_weights)
    assert torch.equal(out, b.sums(weights=kept))
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(masks)
    assert masks.tolist() == [0] * 4 and torch.equal(pair()[1], b.sums())
    buffer.clean_low_latency_buffer(M, 256, 16)
    assert torch.equal(pair()[1], b.sums())
    whole = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
    part = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size([4, 8]), 32, True)
    assert 0 < whole.numel() <= size and part.data_ptr() == whole.data_ptr() + 32
    for value in (0, 127):  # clean enough, whatever is in it
        dist.barrier()
        whole.fill_(value)
        if whole.is_cuda:
            torch.cuda.synchronize()
        dist.barrier()
        assert torch.equal(pair()[1], b.sums())
    raises(RuntimeError, "rank_to_mask is 4", buffer.low_latency_update_mask_buffer, 4, True)
    raises(RuntimeError, "mask_status", buffer.low_latency_query_mask_buffer, masks[:3])
    plain = buffer_of(group)
    raises(RuntimeError, "enable_shrink", plain.low_latency_query_mask_buffer, masks)


@on_ranks(4)
def test_a_rank_that_does_not_come_is_masked_and_said(group):
    buffer, b = Buffer(group, 0, 1 << 20, low_latency_mode=True, enable_shrink=True), Decode(group)

    def pair():
        data, count, handle, _, _ = buffer.low_latency_dispatch(b.x, b.topk_idx, M, 16, use_fp8=False)
        return buffer.low_latency_combine(b.answers(data), b.topk_idx, b.topk_weights, handle)[0]
    with impatient():
        assert torch.equal(pair(), b.sums())
    if b.rank != 3:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            out = pair()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
                pair()  # what a GPU has found a later call says
        assert said.getvalue().startswith("Warning: DeepEP timeout for ") and "rank 3" in said.getvalue()
        masks = torch.zeros(4, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(masks)
        assert masks.tolist() == [0, 0, 0, 1]
        kept = torch.where(b.topk_idx // 4 == 3, 0.0, b.topk_weights)
        assert torch.equal(out, b.sums(weights=kept))
    dist.barrier(group)
    buffer.low_latency_clean_mask_buffer()
    assert torch.equal(pair(), b.sums())
