# SPDX-License-Identifier: MIT
"""
Ranks for the tests of deep_ep, and what dispatch and combine have to give, in plain torch.

A module's ranks are processes, forked once from the process of pytest, which has imported torch and
deep_ep but used neither; they meet in a gloo group. A test under @on_ranks runs on each of them with
that group. A rank that fails or hangs ends its module's ranks; the next test gets new ones.
"""
import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
import unittest.mock

import pytest
import torch
import torch.distributed as dist

import deep_ep  # noqa: F401: before the fork
from conftest import DEVICE

fork = multiprocessing.get_context("fork")
SECONDS = 90


def _serve(rank, size, pipe, folder):
    os.environ.setdefault("EP_TIMEOUT_MS", "30000")
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.set_default_device(DEVICE)
    gc.freeze()  # what the parent has imported is no garbage, and its memory is shared
    torch.manual_seed(rank)
    dist.init_process_group("gloo", store=dist.FileStore(os.path.join(folder, "store"), size),
                            rank=rank, world_size=size)
    while True:
        try:
            module, name = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            getattr(sys.modules[module], name).on_rank(dist.group.WORLD)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
            os._exit(1)  # peers that wait for this rank are told at once


class Ranks:
    def __init__(self, size):
        self.size, self.members = size, []

    def start(self):
        folder = tempfile.mkdtemp(prefix="deep_ep_")
        for rank in range(self.size):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_serve, args=(rank, self.size, theirs, folder), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))

    def stop(self):
        for process, _ in self.members:
            process.kill()
            process.join()
        self.members = []

    def run(self, module, name):
        if not self.members:
            self.start()
        for _, pipe in self.members:
            pipe.send((module, name))
        failed = []
        for rank, (_, pipe) in enumerate(self.members):
            try:
                said = pipe.recv() if pipe.poll(SECONDS) else f"no answer within {SECONDS} s"
            except EOFError:
                said = "the process ended"
            if said:
                failed.append(f"rank {rank}: {said}")
        if failed:
            self.stop()
            pytest.fail("\n".join(failed), pytrace=False)


@pytest.fixture(scope="module")
def rank_pools():
    pools = {}
    yield pools
    for pool in pools.values():
        pool.stop()


def generator(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


def on_ranks(size):
    def decorate(fn):
        def test(rank_pools):
            rank_pools.setdefault(size, Ranks(size)).run(fn.__module__, fn.__name__)
        test.on_rank = fn
        test.__name__, test.__doc__ = fn.__name__, fn.__doc__
        return test
    return decorate


class Batch:
    """The tokens of all ranks, the same on each of them, and what rank `rank` must receive."""

    def __init__(self, group, tokens=24, hidden=64, topk=4, experts=16, dtype=torch.bfloat16, seed=1):
        self.rank, self.size, self.experts = group.rank(), group.size(), experts
        self.local = max(experts // self.size, 1)
        gen = generator(seed)
        count = tokens if isinstance(tokens, (list, tuple)) else [tokens] * self.size
        self.xs, self.ids, self.weights = [], [], []
        for n in count:
            self.xs.append(torch.randn(n, hidden, generator=gen).to(dtype))
            ids = torch.rand(n, experts, generator=gen).argsort(1)[:, :topk].contiguous()
            ids[torch.rand(n, topk, generator=gen) < 0.15] = -1
            if n > 2:
                ids[1] = -1
            self.ids.append(ids)
            self.weights.append(torch.rand(n, topk, generator=gen))
        self.x, self.topk_idx, self.topk_weights = (a[self.rank] for a in
                                                    (self.xs, self.ids, self.weights))
        self.goes = [torch.stack([((i // self.local == r) & (i >= 0)).any(1)
                                  for r in range(self.size)], 1) for i in self.ids]
        self.rows = [(s, t) for s in range(self.size)
                     for t in self.goes[s][:, self.rank].nonzero()[:, 0].tolist()]

    def received(self, per_source):
        """The rows of a list of tensors, one for each source, that this rank receives."""
        parts = [per_source[s][self.goes[s][:, self.rank]] for s in range(self.size)]
        return torch.cat(parts)

    def local_ids(self):
        ids = self.received(self.ids)
        mine = (ids >= 0) & (ids // self.local == self.rank)
        return torch.where(mine, ids - self.rank * self.local, -1)

    def local_weights(self):
        return self.received(self.weights) * (self.local_ids() >= 0)

    def counts(self, alignment=1):
        ids = self.local_ids()
        return [-(-int((ids == e).sum()) // alignment) * alignment for e in range(self.local)]

    def combined(self, answer, *bias):
        """The sum over the ranks, ascending, that each token of this rank was sent to."""
        acc = torch.zeros_like(self.x, dtype=torch.float32)
        for b in bias:
            acc += b.float()
        for r in range(self.size):
            goes = self.goes[self.rank][:, r]
            acc[goes] += answer(r, self.x)[goes].float()
        return acc.to(self.x.dtype)

    def layout(self, buffer, **kw):
        return buffer.get_dispatch_layout(self.topk_idx, self.experts, **kw)

    def dispatch(self, buffer, x=None, **kw):
        per_rank, per_node, per_expert, in_rank, _ = self.layout(buffer)
        kw.setdefault("topk_idx", self.topk_idx)
        kw.setdefault("topk_weights", self.topk_weights)
        return buffer.dispatch(self.x if x is None else x, num_tokens_per_rank=per_rank,
                               num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank,
                               num_tokens_per_expert=per_expert, **kw)


@contextlib.contextmanager
def impatient():
    """Groups made in here wait for a rank for four seconds."""
    with unittest.mock.patch.dict(os.environ, EP_TIMEOUT_MS="4000"):
        yield


def raises(kind, words, call, *args, **kw):
    """The call raises exactly what DeepEP's would be caught as, and names what was wrong."""
    with pytest.raises(kind) as caught:
        call(*args, **kw)
    assert words in str(caught.value), str(caught.value)
    return caught.value
