# SPDX-License-Identifier: MIT
"""deep_ep, throughput mode: what every element of every return tuple holds, on 4 ranks with gloo."""
import gc
import logging
import threading

import deep_ep
import ep
import pytest
import torch
from deep_ep import Buffer, Config, EventHandle, EventOverlap

from conftest import DEVICE
from deep_ep_ranks import Batch, generator, impatient, on_ranks, rank_pools, raises  # noqa: F401


def answer(rank, x):
    """What the experts of a rank make of a row."""
    return x * (rank + 1)


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), (a, b)


def check_pair(buffer, batch, **kw):
    """Dispatch, experts, combine; everything compared with plain torch."""
    recv_x, ids, weights, counts, handle, event = batch.dispatch(buffer, **kw)
    same(recv_x, batch.received(batch.xs))
    same(ids, batch.local_ids())
    same(weights, batch.local_weights())
    assert counts == batch.counts() and event.event is None
    out, out_weights, event = buffer.combine(answer(batch.rank, recv_x), handle, topk_weights=weights)
    same(out, batch.combined(answer))
    torch.testing.assert_close(out_weights, batch.topk_weights * (batch.topk_idx >= 0), rtol=0, atol=0)
    assert event.event is None
    return handle


@on_ranks(4)
def test_layout_counts_tokens_per_rank_and_expert(group):
    buffer = Buffer(group)
    for experts, tokens in ((16, [24, 0, 7, 1]), (18, 24), (3, 24)):
        b = Batch(group, tokens=tokens, experts=experts, topk=min(4, experts))
        b.topk_idx[:1] = experts + 5  # counts as not selected
        per_rank, per_node, per_expert, in_rank, event = b.layout(buffer)
        owner = [r for r in range(4) for _ in range(experts // 4 + (r < experts % 4))]
        goes = torch.zeros(len(b.x), 4, dtype=torch.bool)
        for t, row in enumerate(b.topk_idx.tolist()):
            for e in row:
                if 0 <= e < experts:
                    goes[t, owner[e]] = True
        same(in_rank, goes)
        same(per_rank, goes.sum(0, dtype=torch.int32))
        same(per_expert, torch.tensor([(b.topk_idx == e).sum() for e in range(experts)]).int())
        assert per_node is None and event.event is None and in_rank.is_contiguous()
    async_event = b.layout(buffer, async_finish=True)[4]
    assert async_event.event is not None
    async_event.current_stream_wait()


@on_ranks(4)
def test_rows_ids_weights_and_counts_arrive_in_order(group):
    buffer = Buffer(group, 1 << 20)
    for tokens in (24, [24, 0, 7, 1], 0):
        for kw in ({}, {"hidden": 8}, {"topk": 1}, {"topk": 13}, {"dtype": torch.float16},
                   {"dtype": torch.float32}):
            check_pair(buffer, Batch(group, tokens=tokens, **kw))
    b = Batch(group)
    assert b.dispatch(buffer, expert_alignment=8)[3] == b.counts(8)
    one = b.dispatch(buffer, topk_idx=b.topk_idx.int())
    same(one[1], b.local_ids().int())


@on_ranks(4)
def test_a_handle_is_a_tuple_of_deep_eps_shapes(group):
    buffer, b, r = Buffer(group), Batch(group, tokens=[24, 3, 7, 1]), group.rank()
    in_rank = b.layout(buffer)[3]
    recv_x, _, _, _, handle, _ = b.dispatch(buffer, config=Config(12))
    n, t = len(recv_x), len(b.x)
    assert type(handle) is tuple
    assert [list(h.shape) for h in handle] == [[4, 4], [4, 6], [4, 6], [n], [t, 4], [t, 4]]
    assert [h.dtype for h in handle] == [torch.int32] * 4 + [torch.bool, torch.int32]
    ends = [sum(int(b.goes[s][:, r].sum()) for s in range(i + 1)) for i in range(4)]
    assert [handle[0][i][r].item() for i in range(4)] == ends
    assert handle[3].tolist() == [token for _, token in b.rows]
    same(handle[4], in_rank)


@on_ranks(4)
def test_a_handle_serves_again_and_outside_its_tuple(group):
    buffer, b = Buffer(group), Batch(group)
    recv_x, _, weights, _, handle, _ = b.dispatch(buffer)
    other = Batch(group, seed=2)
    for turn in range(3):
        rebuilt = list(handle)
        rebuilt[turn] = None
        again = buffer.dispatch(other.x, handle=tuple(rebuilt), topk_idx=None, topk_weights=None)
        assert again[1:5] == (None,) * 4 and again[5].event is None
        same(again[0], b.received(other.xs))
        out, none, _ = buffer.combine(answer(b.rank, recv_x), tuple(rebuilt))
        same(out, b.combined(answer))
        assert none is None
    raises(RuntimeError, "handle is none", buffer.combine, recv_x, tuple(h.clone() for h in handle))


@on_ranks(4)
def test_biases_are_added_once_for_each_token(group):
    buffer, b = Buffer(group), Batch(group, tokens=[24, 0, 7, 1])
    recv_x, _, _, _, handle, _ = b.dispatch(buffer)
    one, two = torch.randn_like(b.x), torch.randn_like(b.x)
    y = answer(b.rank, recv_x)
    same(buffer.combine(y, handle, bias=one)[0], b.combined(answer, one))
    same(buffer.combine(y, handle, bias=(one, two))[0], b.combined(answer, one, two))
    same(buffer.combine(y, handle, bias=(None, two))[0], b.combined(answer, two))
    same(buffer.combine(y, handle, bias=[one, two])[0], b.combined(answer))  # as DeepEP: no tuple


@on_ranks(4)
def test_quantised_rows_travel_with_their_scales(group):
    buffer = Buffer(group)
    for scale_type in (torch.float32, torch.int32):
        for turned in (False, True):
            b = Batch(group, tokens=[24, 0, 7, 1], hidden=256)
            xs = [x.float().to(torch.float8_e4m3fn) for x in b.xs]
            scales = [(x.float().view(len(x), 2, 128).abs().sum(2) * 100).to(scale_type) for x in b.xs]
            mine = scales[b.rank].t().contiguous().t() if turned else scales[b.rank]
            recv, _, _, counts, handle, _ = b.dispatch(buffer, x=(xs[b.rank], mine))
            assert type(recv) is tuple and recv[0].dtype == torch.float8_e4m3fn
            same(recv[0].view(torch.uint8), b.received([x.view(torch.uint8) for x in xs]))
            same(recv[1], b.received(scales))
            assert recv[1].is_contiguous() and counts == b.counts()
            again = buffer.dispatch((xs[b.rank], mine), handle=handle)[0]
            same(again[1], recv[1])
            same(buffer.combine(b.received(b.xs), handle)[0], b.combined(lambda r, x: x))


@on_ranks(4)
def test_worst_case_output_needs_no_counts(group):
    buffer, b = Buffer(group), Batch(group, tokens=[24, 0, 7, 1])
    exact = b.dispatch(buffer)
    n, worst = len(exact[0]), 64
    recv_x, ids, weights, counts, handle, event = b.dispatch(buffer, num_worst_tokens=worst)
    assert counts == [] and len(recv_x) == len(ids) == len(weights) == len(handle[3]) == worst
    for got, want in zip((recv_x, ids, weights), exact):
        same(got[:n], want)
    assert (ids[n:] == -1).all()
    assert [e.item() for e in handle[0][:, b.rank]] == [e.item() for e in exact[4][0][:, b.rank]]
    same(buffer.dispatch(b.x, handle=handle)[0][:n], exact[0])
    same(buffer.combine(answer(b.rank, recv_x), handle)[0], b.combined(answer))
    raises(RuntimeError, "rows", b.dispatch, buffer, num_worst_tokens=2)
    raises(RuntimeError, "num_worst_tokens needs topk_idx", b.dispatch, buffer, topk_idx=None,
           topk_weights=None, num_worst_tokens=worst)


@on_ranks(4)
def test_the_layout_alone_routes_tokens_without_ids(group):
    buffer, b = Buffer(group), Batch(group, tokens=[24, 0, 7, 1])
    recv_x, ids, weights, counts, handle, _ = b.dispatch(buffer, topk_idx=None, topk_weights=None)
    same(recv_x, b.received(b.xs))
    assert ids is None and weights is None and counts == b.counts()
    same(buffer.combine(answer(b.rank, recv_x), handle)[0], b.combined(answer))
    check_pair(buffer, b)


@on_ranks(4)
def test_asynchronous_calls_end_with_their_event(group):
    buffer, b = Buffer(group), Batch(group)
    check_pair(buffer, b)
    for allocate in (False, True):
        *layout, event = b.layout(buffer, previous_event=EventOverlap(EventHandle()),
                                  async_finish=True, allocate_on_comm_stream=allocate)
        recv_x, ids, weights, _, handle, event = buffer.dispatch(
            b.x, None, *(layout[i] for i in (0, 1, 3, 2)), b.topk_idx, b.topk_weights,
            previous_event=event, async_finish=True, allocate_on_comm_stream=allocate)
        event.current_stream_wait()
        same(recv_x, b.received(b.xs))
        same(ids, b.local_ids())
        y = answer(b.rank, recv_x)
        with buffer.combine(y, handle, topk_weights=weights, async_finish=True)[2]:
            del y  # what a queued call uses lives until it has run
        events = []
        for _ in range(5):
            out, _, event = buffer.combine(answer(b.rank, recv_x), handle, async_finish=True,
                                           previous_event=events[-1] if events else None)
            events.append(event)
        events[-1].current_stream_wait()
        same(out, b.combined(answer))
        recv_x, *_, event = buffer.dispatch(b.x, handle=handle, async_finish=True)
        again, *_, last = buffer.dispatch(b.x, handle=handle, previous_event=event)
        assert last.event is None
        same(again, recv_x)
    raises(RuntimeError, "allocate_on_comm_stream", buffer.combine, recv_x, handle,
           allocate_on_comm_stream=True)
    buffer.combine(recv_x, handle, previous_event=object())  # no .event: as none given


@on_ranks(4)
def test_larger_calls_make_a_larger_group_and_old_handles_stay(group):
    buffer, r = Buffer(group), group.rank()
    first = Batch(group)
    handle = check_pair(buffer, first)
    for kw in (dict(hidden=512), dict(topk=9), dict(experts=64), dict(tokens=[3, 500, 9, 70]),
               dict(tokens=[3, 500, 9, 1200]), dict(tokens=[2000, 1, 1, 0], hidden=1024)):
        check_pair(buffer, Batch(group, **kw))
        recv_x = buffer.dispatch(first.x, handle=handle)[0]
        same(buffer.combine(answer(r, recv_x), handle)[0], first.combined(answer))


@on_ranks(4)
def test_a_dispatch_asks_nobody_for_tokens_and_says_once_that_it_is_repeated(group):
    buffer, asked, said = Buffer(group), [], []
    check_pair(buffer, Batch(group))
    gather = buffer.runtime.gather
    buffer.runtime.gather = lambda obj: asked.append(obj) or gather(obj)
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("deep_ep").addHandler(handler)
    for tokens in [3, 0, 9, 7], [1, 64, 2, 2]:
        check_pair(buffer, Batch(group, tokens=tokens))
    assert not asked
    libep = buffer.runtime._group.ep
    for tokens in [3, 500, 9, 70], [0, 2, 1200, 9]:
        check_pair(buffer, Batch(group, tokens=tokens))
        # 512 tokens are within what the group's addresses are for
        assert (buffer.runtime._group.ep is libep) == (not asked) == (max(tokens) == 500)
    b = Batch(group, tokens=[1, 1, 2500, 0])
    recv_x = b.dispatch(buffer, num_worst_tokens=2502)[0]
    same(recv_x[:len(b.rows)], b.received(b.xs))
    logging.getLogger("deep_ep").removeHandler(handler)
    assert asked and sum(record.levelno == logging.WARNING for record in said) == (group.rank() == 0)


@on_ranks(2)
def test_where_memory_cannot_grow_in_place_a_larger_group_is_made(group):
    buffer, b, whole = Buffer(group), Batch(group), ep.Group

    def fixed(**config):
        if "most_tokens" in config:
            raise ep.UnsupportedError("the device has other addresses for host memory")
        return whole(**config)
    ep.Group = fixed
    try:
        handle = check_pair(buffer, b)
        check_pair(buffer, Batch(group, tokens=[3, 500]))
    finally:
        ep.Group = whole
    same(buffer.dispatch(b.x, handle=handle)[0], b.received(b.xs))


@on_ranks(4)
def test_handles_and_buffers_go_in_any_order(group):
    b, r = Batch(group), group.rank()
    buffers = [Buffer(group), Buffer(group)]
    handles = [b.dispatch(buffers[i % 2])[4] for i in range(12)]
    recv_x = b.received(b.xs)
    order = torch.randperm(12, generator=generator(r)).tolist()
    for i in order[:8]:  # each rank frees others, then all use one that none may have freed
        if i:
            handles[i] = None
    gc.collect()
    same(buffers[0].combine(answer(r, recv_x), handles[0])[0], b.combined(answer))
    handles = handles[:1]
    del buffers[0]  # a handle outlives its buffer, and serves through another one
    gc.collect()
    same(buffers[0].combine(answer(r, recv_x), handles[0])[0], b.combined(answer))
    again = buffers[0].dispatch(b.x, handle=handles[0])[0]
    same(again, recv_x)


@on_ranks(4)
def test_two_threads_take_turns_with_two_micro_batches(group):
    buffer = Buffer(group)
    batches = [Batch(group, seed=3), Batch(group, tokens=[5, 0, 60, 9], seed=4)]
    turn, failed = [threading.Semaphore(1), threading.Semaphore(0)], []

    def work(i):
        try:
            for _ in range(4):
                turn[i].acquire()
                recv_x, _, _, _, handle, _ = batches[i].dispatch(buffer)
                turn[1 - i].release()
                y = answer(group.rank(), recv_x)
                turn[i].acquire()
                same(buffer.combine(y, handle)[0], batches[i].combined(answer))
                turn[1 - i].release()
        except BaseException as error:
            failed.append(error)
            turn[1 - i].release()
    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not failed, failed


@on_ranks(4)
def test_default_configs_come_from_the_instance(group):
    buffer, b, asked = Buffer(group), Batch(group), []

    class Other(Buffer):
        @staticmethod
        def get_dispatch_config(num_ranks):
            asked.append(num_ranks)
            return Config(8)
    assert len(b.dispatch(Other(group))[4][1][0]) == 4 and asked == [4]
    handle = b.dispatch(buffer)[4]
    same(buffer.internode_combine(b.received(b.xs), handle, config=Config())[0],
         b.combined(lambda r, x: x))
    same(buffer.internode_dispatch(b.x, handle=handle, config=Config())[0], b.received(b.xs))
    raises(AssertionError, "config", buffer.internode_dispatch, b.x, handle=handle)
    raises(AssertionError, "config", buffer.internode_combine, b.x, handle)


@on_ranks(4)
def test_bad_calls_name_the_argument_and_leave_the_buffer_usable(group):
    buffer, b = Buffer(group), Batch(group)
    handle = check_pair(buffer, b)
    layout = b.layout(buffer)
    given = dict(num_tokens_per_rank=layout[0], is_token_in_rank=layout[3],
                 num_tokens_per_expert=layout[2], topk_idx=b.topk_idx, topk_weights=b.topk_weights)
    for name in ("num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert"):
        raises(AssertionError, name, buffer.dispatch, b.x, **{**given, name: None})
    raises(AssertionError, "topk_idx", buffer.dispatch, b.x, handle=handle, topk_idx=b.topk_idx)
    for name, bad in (("topk_weights", None), ("topk_weights", b.topk_weights.double()),
                      ("topk_weights", b.topk_weights[:, :2]), ("topk_idx", b.topk_idx[:5]),
                      ("topk_idx", b.topk_idx.float()), ("topk_idx", b.topk_idx[0]),
                      ("topk_idx", b.topk_idx.t().contiguous().t()),
                      ("is_token_in_rank", layout[3][:5]), ("is_token_in_rank", layout[3].int()),
                      ("num_tokens_per_expert", layout[2].long())):
        raises(RuntimeError, name, buffer.dispatch, b.x, **{**given, name: bad})
    for bad in (b.x[:, :7].contiguous(), b.x[:, ::2], b.x[0], b.x.view(2, -1, 64)):
        raises(RuntimeError, "x is torch.bfloat16", buffer.dispatch, bad, **given)
    raises(RuntimeError, "x[1], the scales", buffer.dispatch, (b.x, torch.ones(3, 1)), **given)
    for bad in b.x[0], b.x[:, :7].contiguous(), b.x.t().contiguous().t():
        raises(RuntimeError, "x", buffer.dispatch, bad, handle=handle)
    raises(RuntimeError, "x is [5, 64]", buffer.dispatch, b.x[:5], handle=handle)
    raises(RuntimeError, "topk_idx", buffer.get_dispatch_layout, b.topk_idx.float(), 16)
    raises(RuntimeError, "num_experts is 0", buffer.get_dispatch_layout, b.topk_idx, 0)
    recv_x = b.received(b.xs)
    raises(RuntimeError, "x is [1, 64]", buffer.combine, recv_x[:1], handle)
    raises(RuntimeError, "topk_weights", buffer.combine, recv_x, handle, topk_weights=recv_x)
    raises(RuntimeError, "bias_0", buffer.combine, recv_x, handle, bias=b.x[:3])
    raises(RuntimeError, "bias_1", buffer.combine, recv_x, handle, bias=(b.x, b.x.float()))
    raises(AssertionError, "bias", buffer.combine, recv_x, handle, bias=(b.x,))
    raises(RuntimeError, "x", buffer.combine, recv_x.view(torch.int16), handle)
    raises(TypeError, "num_nodes", buffer.dispatch, b.x, num_nodes=1)
    check_pair(buffer, b)


@on_ranks(4)
def test_a_rank_that_does_not_come_is_told_in_deep_eps_words(group):
    buffer, b = Buffer(group), Batch(group)
    with impatient():  # the first call makes the group
        b.dispatch(buffer)
    if b.rank != 3:
        error = raises(RuntimeError, "DeepEP error: CPU recv timeout", b.dispatch, buffer)
        assert "rank 3" in str(error)
    torch.distributed.barrier(group)


@on_ranks(4)
def test_ranks_that_make_different_buffers_are_told(group):
    raises(RuntimeError, f"rank 1 {DEVICE}, low latency", Buffer, group,
           low_latency_mode=group.rank() == 1)


class Comm:
    """What deep_ep uses of an mpi4py communicator, over the process group."""
    def __init__(self, group):
        self.group = group

    def Get_rank(self):
        return self.group.rank()

    def Get_size(self):
        return self.group.size()

    def allgather(self, obj):
        out = [None] * self.group.size()
        torch.distributed.all_gather_object(out, obj, group=self.group)
        return out


@on_ranks(3)
def test_three_ranks_meet_by_an_mpi_communicator(group):
    comm = Comm(group)
    buffer = Buffer(None, 0, 0, comm=comm)
    assert buffer.group is comm
    check_pair(buffer, Batch(group, experts=12, tokens=[4, 0, 9]))


@on_ranks(16)
def test_ranks_of_two_nodes_have_deep_eps_other_handle(group):
    buffer, b = Buffer(group, 1 << 20, 1 << 20), Batch(group, tokens=5, experts=32)
    assert buffer.runtime.get_num_rdma_ranks() == 2 and buffer.nvshmem_qp_depth == 1024
    per_node = b.layout(buffer)[1]
    goes = b.goes[b.rank].view(-1, 2, 8).any(2)
    same(per_node, goes.sum(0, dtype=torch.int32))
    handle = check_pair(buffer, b)
    n = len(b.rows)
    assert [list(h.shape) for h in handle] == [
        [5, 16], [2, 10], [16, 10], [2, 10], [2], [16, 10], [16], [n, 8], [5, 2], [n, 8]]
    assert handle[7].dtype == torch.uint8 and handle[0].dtype == torch.bool
    ends = [sum(s <= i for s, _ in b.rows) for i in range(16)]
    assert handle[-4].tolist() == ends
    raises(RuntimeError, "low_latency_mode", buffer.low_latency_dispatch, b.x, b.topk_idx, 8, 32)
