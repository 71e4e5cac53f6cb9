# SPDX-License-Identifier: MIT
"""Ranks as threads of this process: each test runs a function on all of them and fails with the first
exception of any. Nothing here waits longer than DEADLINE_S.

EP_TEST_DEVICE=cuda runs what has torch's tensors on GPUs; what has numpy's stays on the CPU."""
import contextlib
import os
import threading
import traceback

import numpy as np
import pytest

import ep

DEADLINE_S = 60
DEVICE = os.environ.get("EP_TEST_DEVICE", "cpu")
os.environ["EP_DEVICE"] = DEVICE
collect_ignore = [] if DEVICE == "cuda" else ["test_deep_ep_cuda.py"]
E, T, K, H = 8, 24, 3, 64


def pytest_collection_modifyitems(items):
    """First what forks ranks, which a process that has used a GPU cannot do."""
    items.sort(key=lambda item: "rank_pools" not in item.fixturenames)


def place(rank, device):
    """What a group is told of it, and the rank's stream, which no other may share: kernels of ranks
    wait for each other."""
    if device == "cpu":
        return {}, contextlib.nullcontext()
    import torch
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return dict(device=device, device_index=torch.cuda.current_device()), \
        torch.cuda.stream(torch.cuda.Stream())


def run_ranks(num, function, device="cpu", **config):
    """function(group) on `num` threads; their results, by rank."""
    world = ep.World(num)
    config = dict(dict(num_experts=E, max_tokens=T, max_topk=K, max_row_bytes=4 * H,
                       timeout_ms=60000), **config)
    results, errors = [None] * num, []

    def rank(r):
        try:
            where, stream = place(r, device)
            with stream, ep.Group(rank=r, num_ranks=num, world=world, **where, **config) as group:
                results[r] = function(group)
        except BaseException:  # noqa: B902  (told by the main thread)
            errors.append(f"rank {r}: {traceback.format_exc()}")

    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), f"a rank did not end in {DEADLINE_S} s; {errors}"
    assert not errors, "\n".join(errors)
    return results


class Case:
    """Seeded inputs of all ranks, and what comes of them: plain loops over numpy arrays."""

    def __init__(self, num_ranks, seed=1):
        rng = np.random.default_rng(seed)
        self.num_ranks, self.local = num_ranks, E // num_ranks
        self.ids = [rng.integers(-1, E, (T, K)) for _ in range(num_ranks)]
        self.x = [rng.integers(-8, 9, (T, H)).astype(np.float32) for _ in range(num_ranks)]
        self.weights = [rng.random((T, K), dtype=np.float32) for _ in range(num_ranks)]

    def goes_to(self, source, token, rank):
        return any(e >= 0 and e // self.local == rank for e in self.ids[source][token])

    def received(self, rank):
        """(source, token) of each row of the compact form."""
        return [(s, t) for s in range(self.num_ranks) for t in range(T)
                if self.goes_to(s, t, rank)]

    def rows(self, rank):
        return np.array([self.x[s][t] for s, t in self.received(rank)]).reshape(-1, H)

    def copies(self, rank):
        """To how many ranks each token of `rank` goes, [T, 1]."""
        return np.array([[sum(self.goes_to(rank, t, r) for r in range(self.num_ranks))]
                         for t in range(T)], np.float32)


@pytest.fixture
def ranks():
    return run_ranks
