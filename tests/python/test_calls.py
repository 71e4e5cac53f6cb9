# SPDX-License-Identifier: MIT
"""The methods that are ep.h's functions: keywords, values, errors, with numpy alone."""
import threading
import time

import numpy as np
import pytest

import ep
from conftest import E, H, K, T, Case


def test_the_whole_header_is_bound():
    assert ep.unbound == []
    assert ep.BF16 == 1 and ep.DISPATCH_EXPANDED == 1 and ep.MAX_TOPK == 64
    assert ep.__version__ == ep.version()


def test_documentation_of_methods_is_the_headers():
    assert "Collective; enqueues" in ep.Handle.dispatch.__doc__
    assert "rows contiguous" in ep.Handle.dispatch.__doc__


def test_a_plan_is_made_without_a_group():
    plan = ep.plan(num_ranks=4, num_experts=8, max_tokens=16, max_topk=2, max_row_bytes=128)
    assert plan.max_recv_rows == 64 and plan.arena_bytes > plan.recv_bytes > 0
    assert ep.plan(num_ranks=4, num_experts=8, max_tokens=16, max_topk=2, max_row_bytes=128,
                   expert_rank=[0, 1, 2, 3, 0, 1, 2, 3]) == plan


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_rows_arrive_and_come_back(ranks, num_ranks):
    case = Case(num_ranks)

    def rank(group):
        r = group.rank
        assert (group.num_ranks, group.num_local_experts, group.device) == \
            (num_ranks, case.local, "host")
        handle = ep.Handle(group)
        handle.route(topk_ids=case.ids[r])
        assert handle.status()
        in_rank = np.empty((T, num_ranks), np.uint8)
        per_rank = np.empty(num_ranks, np.int32)
        handle.layout(token_in_rank=in_rank, tokens_per_rank=per_rank)
        assert (in_rank.sum(1, keepdims=True) == case.copies(r)).all()
        assert (per_rank == in_rank.sum(0)).all()
        handle.dispatch_begin(x=case.x[r], topk_weights=case.weights[r])
        counts = handle.counts()
        assert counts.rows == len(case.received(r)) == sum(counts.rows_per_source)
        got = np.empty((counts.rows, H), np.float32)
        source = np.empty((counts.rows, 2), np.int32)
        weights = np.empty((counts.rows, K), np.float32)
        handle.dispatch_finish(recv_x=got, recv_source=source, recv_topk_weights=weights)
        assert (got == case.rows(r)).all()
        assert [tuple(row) for row in source.tolist()] == case.received(r)
        out = np.empty((T, H), np.float32)
        handle.combine(x=got, out=out, bias=(case.x[r], None))
        assert (out == case.x[r] * (case.copies(r) + 1)).all()
        stats = group.stats()
        assert stats.num_dispatches == stats.num_combines == 1
        assert group.fault() is None

    ranks(num_ranks, rank)


def test_a_call_names_what_is_wrong(ranks):
    def rank(group):
        handle = ep.Handle(group, max_tokens=4)
        x = np.zeros((4, H), np.float32)
        with pytest.raises(TypeError, match="dispatch.. has no keyword 'y'; it has: .*recv_x"):
            handle.dispatch(x=x, y=1)
        with pytest.raises(TypeError, match="by keyword"):
            handle.dispatch(x)
        with pytest.raises(ep.StateError, match="routed") as told:
            handle.dispatch(x=x, recv_x=x.copy())
        assert told.value.status == "EP_ERR_STATE" and told.value.fault is None
        with pytest.raises(ep.ArgumentError, match="topk_ids"):
            handle.route( topk_ids=x)
        with pytest.raises(ValueError, match="alignment: is outside"):
            handle.dispatch(x=x, alignment=1 << 40)
        with pytest.raises(TypeError, match="integer"):
            handle.dispatch(x=x, alignment=1.5)
        with pytest.raises(TypeError, match="x: .*list.* is no tensor"):
            handle.dispatch(x=[1, 2])
        with pytest.raises(ep.ArgumentError, match="max_tokens"):
            ep.Handle(group, max_tokens=T + 1)
        with pytest.raises(ep.ArgumentError, match="a host group takes None or an ep.Stream"):
            handle.route(np.zeros((4, K), np.int64), stream=7)
        with pytest.raises(ep.ArgumentError, match="expert_rank: must have as many items as num"):
            handle.route(np.zeros((4, K), np.int64), num_experts=3, expert_rank=[0, 0])
        handle.route(np.zeros((4, K), np.int64), num_experts=3, expert_rank=[0, 0, 0])
        assert handle.num_local_experts == 3 and group.num_local_experts == E
        handle.dispatch(x=x)
        assert handle.counts().rows_per_expert == [4 * K, 0, 0]
        with pytest.raises(ep.ArgumentError, match="token 0"):
            handle.route(np.full((4, K), E, np.int64))

    ranks(1, rank)
    with pytest.raises(ep.ArgumentError, match="num_experts"):
        ep.plan(num_ranks=1)
    with pytest.raises(ep.ArgumentError, match="device: must be"):
        ep.Group(device="tpu")
    with pytest.raises(ep.ArgumentError, match="expert_rank"):
        ep.Group(num_experts=4, expert_rank=[0, 0], rank=0, num_ranks=1, world=ep.World(1))


def test_each_status_has_a_class():
    names = [n for n in vars(ep) if n.startswith("ERR_")]
    assert len(names) == 13
    for name in names:
        error = ep._errors.make_error("EP_" + name, "5 rows are needed", None)
        assert isinstance(error, ep.Error) and type(error) is not ep.Error, name
    assert issubclass(ep.TimeoutError_, TimeoutError) and issubclass(ep.PeerError, ConnectionError)
    lacking = ep._errors.make_error("EP_ERR_CAPACITY", "", ep._errors.make_record(
        "needs", dict(max_tokens=3, max_recv_rows=5, output_rows=0)))
    assert lacking.rows_needed == 5 and lacking.needs.max_tokens == 3 and lacking.fault is None


def test_rows_that_do_not_fit_are_counted(ranks):
    def rank(group):
        handle = ep.Handle(group)
        handle.route(np.zeros((T, K), np.int64))
        x = np.ones((T, H), np.float32)
        if group.rank == 1:
            handle.dispatch(x=x)
            return
        with pytest.raises(ep.CapacityError, match="outputs hold 7") as told:
            handle.dispatch(x=x, recv_x=np.zeros((7, H), np.float32))
        assert told.value.rows_needed == 2 * T and group.fault() is None

    ranks(2, rank)

    def crowded(group):
        handle = ep.Handle(group)
        handle.route(np.zeros((T, K), np.int64))
        with pytest.raises(ep.CapacityError, match="max_recv_rows") as told:
            handle.dispatch(x=np.ones((T, H), np.float32))
        assert told.value.rows_needed == 2 * T

    ranks(2, crowded, max_recv_rows=T)

    def long(group):
        handle = ep.Handle(group)
        tokens = T + 3 * group.rank
        handle.route(np.zeros((tokens, K), np.int64))
        with pytest.raises(ep.CapacityError, match="max_tokens") as told:
            handle.dispatch(x=np.ones((tokens, H), np.float32))
        needs = told.value.needs
        assert (needs.max_tokens, needs.max_recv_rows, needs.output_rows) == (T + 3, 0, 0)
        assert handle.needs() == needs

    ranks(2, long)

    def grown(group):
        handle = ep.Handle(group)
        tokens = T + 3 * group.rank
        for n in range(2):
            handle.route(np.zeros((tokens, K), np.int64))
            x, got = np.ones((tokens, H), np.float32), np.zeros((2 * T + 3, H), np.float32)
            if n == 0:
                with pytest.raises(ep.CapacityError, match="ep_group_grow") as told:
                    handle.dispatch(x=x, recv_x=got)
                group.grow(**vars(told.value.needs))
        handle.dispatch(x=x, recv_x=got)
        assert handle.counts().rows == (0 if group.rank else 2 * T + 3)

    ranks(2, grown, most_tokens=T + 8)


def test_an_abort_ends_the_waits_of_all_ranks_with_the_report(ranks):
    def rank(group):
        handle = ep.Handle(group)
        handle.route(np.zeros((T, K), np.int64))
        if group.rank == 0:
            time.sleep(0.05)
            group.abort()
        with pytest.raises((ep.InterruptedError_, ep.FaultedError)) as told:
            handle.dispatch(x=np.zeros((T, H), np.float32))
        assert told.value.fault.status == "EP_ERR_INTERRUPTED"
        assert "EP_ERR_INTERRUPTED at rank" in str(group.fault())
        with pytest.raises(ep.FaultedError):
            handle.dispatch(x=np.zeros((T, H), np.float32))

    ranks(2, rank)


def test_ranks_that_disagree_are_told_all(ranks):
    def rank(group):
        handle = ep.Handle(group)
        handle.route(np.zeros((T, K), np.int64))
        x = np.zeros((T, H), np.float32 if group.rank else np.int32)
        with pytest.raises(ep.MismatchError, match="type") as told:
            handle.dispatch(x=x)
        assert told.value.fault is None or told.value.fault.status == "EP_ERR_MISMATCH"

    ranks(2, rank)


def test_a_rank_that_left_is_told_as_peer_error(ranks):
    def rank(group):
        if group.rank == 1:
            return
        handle = ep.Handle(group)
        handle.route(np.zeros((T, K), np.int64))
        with pytest.raises(ep.PeerError) as told:
            handle.dispatch(x=np.zeros((T, H), np.float32))
        assert told.value.fault.rank == 1

    ranks(2, rank)


def test_ranks_meet_by_the_callers_allgather():
    num, parts, barrier = 3, {}, threading.Barrier(3)

    def create(r):
        def allgather(data):
            assert isinstance(data, bytes)
            parts[r] = data
            barrier.wait(30)
            everyone = [parts[i] for i in range(num)]
            barrier.wait(30)
            return everyone
        with ep.Group(num_experts=3, max_tokens=4, max_topk=1, max_row_bytes=64, rank=r,
                      num_ranks=num, allgather=allgather) as group:
            seen[r] = group.rank
            barrier.wait(30)

    seen = {}
    threads = [threading.Thread(target=create, args=(r,)) for r in range(num)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert seen == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize("answer, error, words", [
    (lambda data: [data], ValueError, "returned 1 items for 2 ranks"),
    (lambda data: [data, data[:-1]], ValueError, "item 1 has"),
    (lambda data: ["text", data], TypeError, "bytes"),
    (lambda data: 1 // 0, ZeroDivisionError, "zero"),
])
def test_a_wrong_allgather_is_its_callers_exception(answer, error, words):
    with pytest.raises(error, match=words):
        ep.Group(num_experts=1, max_tokens=4, max_topk=1, max_row_bytes=64, rank=0, num_ranks=2,
                 allgather=answer)


def test_streams_run_in_order_and_keep_what_they_use(ranks):
    case = Case(2)

    def rank(group):
        r = group.rank
        first, second = ep.Stream(group), ep.Stream(group)
        sent, gate, ran = ep.Event(group), threading.Event(), []
        assert sent.query()
        handle = ep.Handle(group)
        got = np.zeros((2 * T, H), np.float32)
        first.run(lambda: gate.wait(30))
        handle.route(case.ids[r].copy(), stream=first)
        handle.dispatch(x=case.x[r].copy(), recv_x=got, stream=first)  # alive only by the stream
        sent.record(first)
        second.wait(sent)
        out = np.zeros((T, H), np.float32)
        handle.combine(x=got, out=out, stream=second)
        second.run(lambda: ran.append(threading.current_thread()))
        assert not sent.query() and not ran
        gate.set()
        second.sync()
        assert sent.query() and ran and ran[0] is not threading.current_thread()
        assert (out == case.x[r] * case.copies(r)).all()
        with pytest.raises(ep.ArgumentError, match="another group"):
            handle.route(case.ids[r], stream=ep.Stream(alone))
        first.destroy()

    alone = ep.Group(num_experts=1, max_tokens=4, max_topk=1, max_row_bytes=64, rank=0, num_ranks=1,
                     world=ep.World(1))
    ranks(2, rank)
