# SPDX-License-Identifier: MIT
"""ep.dispatch, ep.combine and the low-latency pair: outputs made here, by numpy and by torch."""
import numpy as np
import pytest

import ep
from conftest import DEVICE, E, H, K, T, Case


def from_numpy(name):
    if name == "numpy":
        return np.asarray, np.asarray
    torch = pytest.importorskip("torch")
    return lambda a: torch.from_numpy(a).to(DEVICE), lambda t: t.cpu().numpy()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("known_rows", [False, True])
def test_compact_output_is_made(ranks, library, known_rows):
    case = Case(2, seed=11)
    make, plain = from_numpy(library)

    def rank(group):
        r = group.rank
        handle = ep.Handle(group)
        handle.route(make(case.ids[r]))
        rows = 2 * T if known_rows else None
        got = ep.dispatch(handle, make(case.x[r]), topk_weights=make(case.weights[r]),
                          scales=make(case.weights[r][:, :2]), source=True, rows=rows)
        num = int(got.num_rows[0])
        assert num == len(case.received(r)) and got.rows == (rows or num)
        assert type(got.x) is type(make(case.x[r]))
        assert (plain(got.x)[:num] == case.rows(r)).all()
        ids, source, weights = (plain(a)[:num] for a in (got.topk_ids, got.source, got.topk_weights))
        for i, (s, t) in enumerate(case.received(r)):
            assert tuple(source[i]) == (s, t)
            here = case.ids[s][t] // case.local == r
            assert (ids[i] == np.where(here, case.ids[s][t] - r * case.local, -1)).all()
            assert (weights[i] == np.where(here, case.weights[s][t], 0)).all()
            assert (plain(got.scales)[i] == case.weights[s][t][:2]).all()
        counts = [sum((ids == e).sum() for _ in [0]) for e in range(case.local)]
        assert plain(got.expert_counts).tolist() == counts
        out, back = ep.combine(handle, got.x, topk_weights=got.topk_weights)
        assert (plain(out) == case.x[r] * case.copies(r)).all()
        assert (plain(back) == np.where(case.ids[r] >= 0, case.weights[r], 0)).all()

    ranks(2, rank, max_scale_bytes=8, device="cpu" if library == "numpy" else DEVICE)


def test_expanded_output_is_made(ranks):
    case = Case(2, seed=12)

    def rank(group):
        r = group.rank
        handle = ep.Handle(group)
        handle.route(case.ids[r])
        got = ep.dispatch(handle, case.x[r], topk_weights=case.weights[r], expanded=True, alignment=8,
                          zero_gaps=True)
        offsets = got.expert_offsets.tolist()
        assert offsets[-1] == got.rows == got.num_rows[0] and not any(o % 8 for o in offsets)
        for e in range(case.local):
            rows = [case.x[s][t] for s in range(2) for t in range(T) for k in range(K)
                    if case.ids[s][t][k] == r * case.local + e]
            assert got.expert_counts[e] == len(rows)
            assert (got.x[offsets[e]:offsets[e] + len(rows)] == np.array(rows).reshape(-1, H)).all()
            assert not got.x[offsets[e] + len(rows):offsets[e + 1]].any()
        out = ep.combine(handle, got.x, weights=np.full(got.rows, 2, np.float32))
        assert (out == 2 * case.x[r] * (case.ids[r] >= 0).sum(1, keepdims=True)).all()

    ranks(2, rank)


def test_output_of_unknown_libraries_is_refused(ranks):
    class Other:
        shape = (T, H)

        def __dlpack__(self, **keywords):
            return np.zeros((T, H), np.float32).__dlpack__(**keywords)

        def __dlpack_device__(self):
            return 1, 0

    def rank(group):
        handle = ep.Handle(group)
        handle.route(np.zeros((T, K), np.int64))
        with pytest.raises(TypeError, match="of torch and numpy, and not for .*Other"):
            ep.dispatch(handle, Other(), rows=2 * T)

    ranks(1, rank)


@pytest.mark.parametrize("fp8", ["", "fp8", "packed"])
@pytest.mark.parametrize("hook", [False, True])
def test_low_latency_pair(ranks, fp8, hook):
    torch = pytest.importorskip("torch")
    make, plain = from_numpy("torch")
    case, hidden = Case(2, seed=13), 1024
    options = dict(fp8=bool(fp8), power_of_2=fp8 == "packed", packed_scales=fp8 == "packed")

    def rank(group):
        r = group.rank
        x = make(case.x[r]).repeat(1, hidden // H).bfloat16()
        ids, weights = make(case.ids[r]), make(case.weights[r])
        got = ep.ll_dispatch(group, x, ids, topk_weights=weights, hook=hook, **options)
        if hook:
            got.hook()
            if DEVICE == "cpu":  # on a GPU the kernel refuses, and a later call tells
                with pytest.raises(ep.StateError):
                    got.hook()
        rows = got.x.float()
        assert rows.shape == (case.local, 2 * T, hidden)
        if fp8:
            scales = got.scales
            if fp8 == "packed":
                bits = scales.contiguous().view(torch.uint8).int() << 23
                scales = bits.view(torch.float32)
            rows = (rows.view(case.local, 2 * T, -1, 128) * scales.unsqueeze(-1)).flatten(2)
        for e in range(case.local):
            n, expected = int(got.expert_counts[e]), []
            for s in range(2):
                first, num = int(got.ranges[e, s]) >> 32, int(got.ranges[e, s]) & 0xffffffff
                chosen = [t for t in range(T) for k in range(K)
                          if case.ids[s][t][k] == r * case.local + e]
                assert got.source[e, first:first + num].tolist() == chosen
                expected += [case.x[s][t] for t in chosen]
            assert n == len(expected)
            seen = plain(rows[e, :n, :H])
            assert np.abs(seen - np.array(expected).reshape(-1, H)).max(initial=0) <= 0.5
            assert fp8 or (seen == np.array(expected).reshape(-1, H)).all()
        out = ep.ll_combine(group, rows.bfloat16(), got, hook=hook)
        if hook:
            out, receive = out
            receive()
        want = x.float() * (weights * (ids >= 0)).sum(1, keepdim=True)
        assert (out.float() - want).abs().max() < (1.5 if fp8 else 0.2)
        small = ep.ll_combine(group, (rows / 1024).bfloat16(), got, logfmt=True).float() * 1024
        assert (small - want).abs().max() < (1.7 if fp8 else 0.4)
        assert group.ll_status() is None

    ranks(2, rank, max_row_bytes=2 * hidden, ll_max_tokens=T, device=DEVICE)


def test_two_micro_batches_in_flight(ranks):
    make, _ = from_numpy("torch")
    case = Case(2, seed=14)

    def rank(group):
        r = group.rank
        x = [make(case.x[i ^ r]).repeat(1, 2).bfloat16() for i in range(2)]
        ids = [make(case.ids[i ^ r]) for i in range(2)]
        got = [ep.ll_dispatch(group, x[i], ids[i], hook=True, max_tokens=T) for i in range(2)]
        for g in got:
            g.hook()
        sums = [ep.ll_combine(group, g.x, g, hook=True) for g in got]
        for (out, receive), x_i, ids_i in zip(sums, x, ids):
            receive()
            assert (out == x_i * (ids_i >= 0).sum(1, keepdim=True)).all()

    ranks(2, rank, ll_max_tokens=2 * T, device=DEVICE)
