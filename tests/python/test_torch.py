# SPDX-License-Identifier: MIT
"""With torch: autograd, and ranks that are processes which meet over a gloo process group."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ep  # noqa: E402
import ep.torch  # noqa: E402
from conftest import DEVICE, E, H, K, T, Case  # noqa: E402


def tensor(array):
    return torch.from_numpy(array).to(DEVICE)


def generator(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


@pytest.mark.parametrize("expanded", [False, True])
def test_gradients_of_one_rank(ranks, expanded):
    """gradcheck, for which other ranks must not move meanwhile: a group of one."""
    def rank(group):
        handle = ep.Handle(group)
        handle.route(torch.tensor([[0, 1], [3, -1], [2, 2]], device=DEVICE))
        x = torch.randn(3, 4, generator=generator(1), device=DEVICE).requires_grad_()
        weights = torch.rand(3, 2, device=DEVICE).requires_grad_()
        options = dict(expanded=expanded, alignment=2 if expanded else 1, zero_gaps=expanded)

        def pair(x, weights):
            got = ep.torch.dispatch(handle, x, topk_weights=weights, **options)
            factor = got.topk_weights if expanded else got.topk_weights.sum(1)
            return ep.torch.combine(handle, got.x * factor[:, None], got)

        def weighted(x, factor):
            got = ep.torch.dispatch(handle, x, **options)
            return ep.torch.combine(handle, got.x, got, weights=factor[:got.rows])

        check = dict(eps=1e-2, atol=1e-2, rtol=1e-2, nondet_tol=0.0)
        assert torch.autograd.gradcheck(pair, (x, weights), **check)
        assert torch.autograd.gradcheck(weighted, (x, torch.rand(8, device=DEVICE).requires_grad_()), **check)

    ranks(1, rank, num_experts=4, max_tokens=3, max_topk=2, max_row_bytes=16, device=DEVICE)


def test_backward_of_each_is_the_other_across_ranks(ranks):
    """<dispatch(x), g> summed over the ranks is <x, gradient of x>, and so for combine."""
    case = Case(4, seed=21)

    def rank(group):
        r = group.rank
        handle = ep.Handle(group)
        handle.route(tensor(case.ids[r]))
        x = tensor(case.x[r]).requires_grad_()
        got = ep.torch.dispatch(handle, x)
        random = dict(generator=generator(r), device=DEVICE)
        g = torch.randint(-4, 5, got.x.shape, **random).float()
        got.x.backward(g)
        there, here = (got.x * g).sum().item(), (x * x.grad).sum().item()
        rows = got.x.detach().requires_grad_()
        y = ep.torch.combine(handle, rows, got)
        back = torch.randint(-4, 5, y.shape, **random).float()
        y.backward(back)
        return there, here, (y * back).sum().item(), (rows * rows.grad).sum().item()

    sums = np.array(ranks(4, rank, device=DEVICE)).sum(0)
    assert sums[0] == sums[1] and sums[2] == sums[3] and sums[0] and sums[2]


def test_a_torch_tensor_keeps_the_arena_of_a_destroyed_group(ranks):
    case = Case(2, seed=22)

    def rank(group):
        handle = ep.Handle(group)
        handle.route(tensor(case.ids[group.rank]))
        view = ep.Tensor()
        handle.dispatch(x=tensor(case.x[group.rank]), recv_x=view, flags=ep.DISPATCH_ARENA)
        answers = torch.from_dlpack(handle.arena(torch.bfloat16, H))
        assert answers.dtype == torch.bfloat16 and answers.data_ptr() == view.data_ptr()
        return torch.from_dlpack(view)

    for r, seen in enumerate(ranks(2, rank, device=DEVICE)):
        want = case.rows(r)  # on a GPU a view has room for the worst case
        assert (seen[:len(want)].cpu().numpy() == want).all()


def _process(rank, num, port):
    import torch.distributed as distributed
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                   world_size=num)
    case = Case(num, seed=23)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    group = ep.Group(num_experts=E, max_tokens=T, max_topk=K, max_row_bytes=4 * H, rank=rank,
                     num_ranks=num, allgather=ep.torch.allgather(), timeout_ms=60000, device=DEVICE)
    for _ in range(3):
        handle = ep.Handle(group)
        handle.route(tensor(case.ids[rank]))
        got = ep.dispatch(handle, tensor(case.x[rank]))
        assert (got.x.cpu().numpy() == case.rows(rank)).all()
        y = ep.combine(handle, got.x)
        assert (y.cpu().numpy() == case.x[rank] * case.copies(rank)).all()
    distributed.barrier()
    distributed.destroy_process_group()


def test_processes_meet_over_gloo():
    port = 20000 + (os.getpid() + 7000) % 20000
    torch.multiprocessing.spawn(_process, (2, port), nprocs=2)


def check_lending(prepare, stream, memory, x):
    """Memory that a prepared call lends is lent again when nothing of it is left, views included."""
    call = prepare(lambda: torch.full_like(memory, 7.0))
    one = call(stream, None, x)
    if ep.path_of(x) != "exchange":
        assert one == ()
        return
    two, where = call(stream, None, x), one[0].data_ptr()
    view = one[1][1:]
    del one
    three = call(stream, None, x)
    assert len({where, two[0].data_ptr(), three[0].data_ptr()}) == 3 and view.tolist() == [7]
    del view
    again = call(stream, None, x)
    assert again[0].data_ptr() == where
    del call, again, three
    assert two[1].tolist() == [7, 7]  # parts outlive the call
    with pytest.raises(TypeError, match="no array like the first"):
        prepare(lambda: memory[1:])(stream, None, x)


def test_a_prepared_call_does_the_same_with_other_arrays(ranks):
    case = Case(2, seed=3)

    def rank(group):
        handle, (x, other) = ep.Handle(group), (tensor(case.x[group.rank]).clone() for _ in range(2))
        other *= 2
        handle.route(tensor(case.ids[group.rank]))
        rows = len(case.received(group.rank))
        memory, again = (torch.full((rows + 1, H), 7.0, device=DEVICE) for _ in range(2))
        keywords = dict(x=x, recv_x=memory[:rows])
        handle.dispatch(**keywords)
        parts = (ep.I32, (3, H), 0), (ep.F32, (2,), 4 * H * rows), None
        call = ep.Prepared(handle.dispatch, (memory, x), parts, keywords)
        stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None
        assert call(stream, again, x.half()) is None and call(stream, again, x[1:]) is None
        assert call(stream, again[:, ::2], x) is None and (again == 7).all()
        made = call(stream, again, other)
        assert torch.equal(again[:rows], 2 * memory[:rows]) and (again[rows] == 7).all()
        if ep.path_of(x) == "exchange":
            address = again.data_ptr()
            del again  # which its parts keep
            assert [(t.dtype, t.shape, t.data_ptr() - address) for t in made] == [
                (torch.int32, (3, H), 0), (torch.float32, (2,), 4 * H * rows),
                ("f32", (rows + 1, H), 0)]
            assert call(stream, made[2], other) == ()  # the whole is an array, too
            assert made[1].tolist() == [7, 7]
        else:
            assert made == ()
        assert call(stream, None, x) is None
        check_lending(lambda make: ep.Prepared(handle.dispatch, (memory, x), parts, keywords, make),
                      stream, memory, x)
        with pytest.raises(ep.ArgumentError, match="x: lies in the memory of none"):
            ep.Prepared(handle.dispatch, (memory,), (), keywords)
        with pytest.raises(ValueError, match="is not in the"):
            ep.Prepared(handle.dispatch, (memory, x), ((ep.U8, (1 << 40,), 0),), keywords)
        with pytest.raises(TypeError, match="as many arrays"):
            call(stream, memory)
        with pytest.raises(TypeError, match="cannot be prepared"):  # it has no struct of tensors
            ep.Prepared(handle.counts, (), (), {})
        handle.destroy()
        with pytest.raises(ep.StateError):
            call(stream, memory, x)

    ranks(2, rank, device=DEVICE)


def test_the_bench_writes_what_it_measured(tmp_path):
    done = subprocess.run([sys.executable, "-m", "ep.bench", "--through", "ep", "--ranks", "1",
                           "--tokens", "2,9", "--hidden", "128", "--experts", "8", "--topk", "2",
                           "--ll-tokens", "4", "--iters", "2", "--warmup", "1", "--device", DEVICE,
                           "--json", str(tmp_path / "b.json")], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, timeout=400)
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(r["operation"], r["tokens"]) for r in rows] == \
        [(o, 2) for o in ("dispatch", "dispatch_cached", "combine", "ll_dispatch", "ll_combine")] + \
        [(o, 9) for o in ("dispatch", "dispatch_cached", "combine")]
    assert all(r["call_us"] > 0 and r["done_us"] > 0 for r in rows)
    assert all(r["device_us"] > 0 for r in rows if DEVICE == "cuda" and r["operation"] != "dispatch")
