# SPDX-License-Identifier: MIT
"""What only a GPU has: streams, events, the allocator, graphs, kernels' names. Ranks are processes."""
import torch

import ep
import ep.torch
from deep_ep import Buffer, EventHandle, EventOverlap
from deep_ep_ranks import Batch, on_ranks, rank_pools, raises  # noqa: F401
from test_deep_ep_decode import Decode, M, buffer_of


def late(tensor):
    """A copy that the current stream makes after some milliseconds of other work."""
    a = torch.randn(2048, 2048)
    for _ in range(20):
        a = (a @ a).clamp(-1, 1)
    return tensor + (a[0, 0] * 0).to(tensor.dtype)


@on_ranks(2)
def test_calls_wait_for_the_stream_they_are_made_on(group):
    buffer, b = Buffer(group), Batch(group)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            recv_x, ids, weights, _, handle, _ = b.dispatch(buffer, x=late(b.x))
            out = buffer.combine(late(recv_x), handle)[0]
            again = buffer.dispatch(late(b.x), handle=handle)[0]
            assert torch.equal(recv_x, b.received(b.xs)) and torch.equal(again, recv_x)
            assert torch.equal(out, b.combined(lambda r, x: x))


@on_ranks(2)
def test_asynchronous_calls_wait_for_their_event_and_keep_their_memory(group):
    buffer, b = Buffer(group), Batch(group, tokens=200, hidden=1024)
    handle = b.dispatch(buffer)[4]
    want = b.received(b.xs)
    for given in (True, False):
        x = late(b.x)
        event = EventOverlap(EventHandle()) if given else None
        recv_x, *_, event = buffer.dispatch(x, handle=handle, previous_event=event, async_finish=True,
                                            allocate_on_comm_stream=given)
        del x
        torch.randn(200, 1024, dtype=torch.bfloat16)  # would take the memory of x
        event.current_stream_wait()
        y = late(recv_x)
        out, _, event = buffer.combine(y, handle, async_finish=True)
        del y
        torch.randn(len(want), 1024, dtype=torch.bfloat16)
        event.current_stream_wait()
        assert torch.equal(recv_x, want) and torch.equal(out, b.combined(lambda r, x: x))


@on_ranks(2)
def test_deterministic_torch_fills_outputs_before_they_are_written(group):
    buffer, b = Buffer(group), Batch(group)
    handle = b.dispatch(buffer)[4]
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            event = EventOverlap(EventHandle())
            torch.cuda._sleep(20_000_000)  # behind which the fill is
            recv_x, *_, done = buffer.dispatch(b.x, handle=handle, previous_event=event,
                                               async_finish=True)
            done.current_stream_wait()
            assert torch.equal(recv_x, b.received(b.xs))
            event = EventOverlap(EventHandle())
            torch.cuda._sleep(20_000_000)
            out, _, done = buffer.combine(recv_x, handle, previous_event=event, async_finish=True)
            done.current_stream_wait()
            assert torch.equal(out, b.combined(lambda r, x: x))
    finally:
        torch.use_deterministic_algorithms(False)


@on_ranks(2)
def test_a_hook_receives_on_the_stream_of_its_call(group):
    buffer, b, side = buffer_of(group), Decode(group, tokens=(24, 7)), torch.cuda.Stream()
    for _ in range(2):
        with torch.cuda.stream(side):
            data, count, handle, _, hook = buffer.low_latency_dispatch(
                late(b.x), b.topk_idx, M, 16, use_fp8=False, return_recv_hook=True)
        hook()  # on another stream, which does not wait for it
        torch.cuda.current_stream().wait_stream(side)
        b.check(data, count, handle, b.xs)


@on_ranks(2)
def test_throughput_calls_are_captured_and_replayed(group):
    buffer, b = Buffer(group), Batch(group)
    x, handle = b.x.clone(), b.dispatch(buffer)[4]
    buffer.combine(buffer.dispatch(x, handle=handle)[0], handle)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recv_x = buffer.dispatch(x, handle=handle)[0]
        out = buffer.combine(recv_x * 2, handle)[0]
        per_rank, _, per_expert, in_rank, _ = b.layout(buffer)
        fresh, *_ = buffer.dispatch(x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
                                    num_tokens_per_expert=per_expert, topk_idx=b.topk_idx,
                                    topk_weights=b.topk_weights, num_worst_tokens=2 * len(x))
    del handle  # what a graph uses lives on, whatever is collected and made
    larger = Batch(group, tokens=300, hidden=256)
    assert torch.equal(larger.dispatch(buffer)[0], larger.received(larger.xs))
    for seed in range(1, 6):
        other = Batch(group, seed=1)
        xs = [x * seed for x in other.xs]
        x.copy_(xs[b.rank])
        graph.replay()
        assert torch.equal(recv_x, b.received(xs)) and torch.equal(fresh[:len(recv_x)], recv_x)
        other.x = xs[b.rank]
        assert torch.equal(out, other.combined(lambda r, x: x * 2))


@on_ranks(2)
def test_low_latency_calls_are_captured_with_their_hooks(group):
    buffer, b = buffer_of(group), Decode(group, tokens=(24, 7))
    x = b.x.clone()

    def step():
        data, count, handle, _, hook = buffer.low_latency_dispatch(
            x, b.topk_idx, M, 16, use_fp8=False, return_recv_hook=True)
        hook()
        y = b.answers(data)
        out, _, hook = buffer.low_latency_combine(y, b.topk_idx, b.topk_weights, handle,
                                                  return_recv_hook=True)
        hook()
        return data, count, handle, out
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        data, count, handle, out = step()
    for factor in (1, 2, 4, -1, 8):
        xs = [x * factor for x in b.xs]
        x.copy_(xs[b.rank])
        graph.replay()
        b.check(data, count, handle, xs)
        assert torch.equal(out, b.sums(xs))
        assert torch.equal(step()[3], out)  # calls between the replays


@on_ranks(2)
def test_tensors_of_the_cpu_are_refused_in_a_sentence(group):
    buffer, b = Buffer(group), Batch(group)
    handle = b.dispatch(buffer)[4]
    raises(RuntimeError, "x: lies in host memory", buffer.dispatch, b.x.cpu(), handle=handle)
    raises(RuntimeError, "topk_ids: lies in host memory", buffer.get_dispatch_layout,
           b.topk_idx.cpu(), 16)
    assert torch.equal(buffer.dispatch(b.x, handle=handle)[0], b.received(b.xs))


@on_ranks(2)
def test_older_torch_s_tensors_work_on_their_current_stream(group):
    """A capture on a side stream fails if any work goes elsewhere."""
    old = type("Old", (torch.Tensor,), {"__dlpack_c_exchange_api__": None})
    b = Batch(group)
    eps = ep.Group(num_experts=16, max_tokens=24, max_topk=4, max_row_bytes=128, rank=b.rank, num_ranks=2,
                   allgather=ep.torch.allgather(group), device="cuda",
                   device_index=torch.cuda.current_device())
    handle, rows = ep.Handle(eps), torch.zeros(48, 64, dtype=torch.bfloat16)
    out = torch.zeros_like(b.x)
    x, ids, rows, out = (t.as_subclass(old) for t in (b.x, b.topk_idx, rows, out))
    assert ep.path_of(x) == "methods"
    handle.route(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        handle.dispatch(x=x, recv_x=rows)
        handle.combine(x=rows, out=out)
    graph.replay()
    assert torch.equal(out.as_subclass(torch.Tensor), b.combined(lambda r, x: x))
    torch.cuda.synchronize()
    del graph
    eps.destroy()


@on_ranks(2)
def test_profilers_see_deep_eps_names(group):
    buffer, b = buffer_of(group), Decode(group, tokens=(24, 7))
    handle = b.dispatch(buffer)[4]

    def names(call):
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        return [e.key for e in seen.key_averages() if "deep_ep::" in e.key], len(seen.key_averages())

    def decode():
        data, _, handle, _, hook = buffer.low_latency_dispatch(b.x, b.topk_idx, M, 16, use_fp8=False,
                                                               return_recv_hook=True)
        hook()
        buffer.low_latency_combine(data, b.topk_idx, b.topk_weights, handle, return_recv_hook=True)[2]()

    def pair():
        buffer.combine(buffer.dispatch(b.x, handle=handle)[0], handle)
    for call, space in ((decode, "low_latency"), (pair, "throughput")):
        found, _ = names(call)
        for word in ("dispatch", "combine"):
            assert [f"deep_ep::{space}::{word}(" in n for n in found].count(True) == 1, found
        assert len(found) == 2, found
    found, _ = names(lambda: b.layout(buffer))
    assert sorted(n.split("(")[0] for n in found) == ["deep_ep::throughput::layout",
                                                      "deep_ep::throughput::route"]
