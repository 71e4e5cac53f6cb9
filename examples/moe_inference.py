#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
A Mixture-of-Experts layer the way serving engines run it, over deep_ep.

Prefill sends many tokens in throughput mode; decode sends a few at a time in low-latency mode, as two
micro-batches, so that one travels while the experts work on the other. Both are compared with the
same layer computed by each rank alone.

    python examples/moe_inference.py                  4 processes on CPUs, or one for each GPU
    torchrun --nproc-per-node 8 examples/moe_inference.py
"""
import argparse
import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deep_ep import Buffer

HIDDEN, WIDTH, EXPERTS, TOPK = 256, 128, 16, 4


class Layer:
    """The weights of all experts; a rank's own are numbers first..first + local."""

    def __init__(self, rank, ranks, device):
        gen = torch.Generator().manual_seed(0)
        self.local, self.first = EXPERTS // ranks, rank * (EXPERTS // ranks)
        self.router = (torch.randn(HIDDEN, EXPERTS, generator=gen) / 20).to(device)
        self.up = (torch.randn(EXPERTS, HIDDEN, WIDTH, generator=gen) / 25).to(device)
        self.down = (torch.randn(EXPERTS, WIDTH, HIDDEN, generator=gen) / 20).to(device)

    def route(self, x):
        weights, ids = (x.float() @ self.router).softmax(1).topk(TOPK)
        return ids, (weights / weights.sum(1, keepdim=True)).contiguous()

    def expert(self, e, rows):
        """Of one expert and its rows, or of several, each with its own."""
        return torch.nn.functional.silu(rows.float() @ self.up[e]) @ self.down[e]

    def weighted(self, rows, ids, weights, first):
        """Of each row the weighted answers of the experts in ids, which count from `first`."""
        out = torch.zeros(rows.shape, device=rows.device)
        for e in ids.unique().tolist():
            if e >= 0:
                row, k = (ids == e).nonzero(as_tuple=True)
                answers = self.expert(first + e, rows[row])
                out.index_add_(0, row, answers * weights[row, k, None])
        return out.bfloat16()

    def alone(self, x):
        return self.weighted(x, *self.route(x), first=0)


def prefill(buffer, layer, x):
    ids, weights = layer.route(x)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        ids, EXPERTS, previous_event=Buffer.capture(), async_finish=True,
        allocate_on_comm_stream=True)
    rows, local_ids, local_weights, counts, handle, event = buffer.dispatch(
        x, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert, previous_event=event, async_finish=True,
        allocate_on_comm_stream=True)
    event.current_stream_wait()
    answers = layer.weighted(rows, local_ids, local_weights, layer.first)
    return buffer.combine(answers, handle)[0]


def decode(buffer, layer, batches, most):
    """All batches, each a generator that yields where another may run: after every send."""
    def steps(x):
        ids, weights = layer.route(x)
        rows, counts, handle, _, hook = buffer.low_latency_dispatch(
            x, ids, most, EXPERTS, use_fp8=False, return_recv_hook=True)
        yield
        hook()
        own = slice(layer.first, layer.first + layer.local)
        answers = layer.expert(own, rows).bfloat16()
        out, _, hook = buffer.low_latency_combine(answers, ids, weights, handle,
                                                  return_recv_hook=True)
        yield
        hook()
        done.append(out)

    done, waiting = [], [steps(x) for x in batches]
    while waiting:
        waiting = [s for s in waiting if next(s, StopIteration) is not StopIteration]
    return done


def difference(ours, alone):
    return ((ours.float() - alone.float()).norm() / alone.float().norm()).item()


def work(rank, ranks, args):
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    nccl = cuda and ranks <= torch.cuda.device_count()  # which takes one rank of a GPU
    dist.init_process_group("nccl" if nccl else "gloo", rank=rank, world_size=ranks)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    layer = Layer(rank, ranks, device)
    size = Buffer.get_low_latency_rdma_size_hint(args.most, HIDDEN, ranks, EXPERTS)
    buffer = Buffer(dist.group.WORLD, 0, size, low_latency_mode=True,
                    num_qps_per_rank=layer.local, explicitly_destroy=True)
    gen = torch.Generator().manual_seed(1 + rank)

    def tokens(n):
        return torch.randn(n, HIDDEN, generator=gen).to(device).bfloat16()

    worst, start = 0.0, time.perf_counter()
    for _ in range(args.steps):
        x = tokens(args.tokens - rank)  # the ranks have different numbers of tokens
        worst = max(worst, difference(prefill(buffer, layer, x), layer.alone(x)))
    middle = time.perf_counter()
    for _ in range(args.steps):
        batches = [tokens(args.most - rank), tokens(args.most)]
        for x, out in zip(batches, decode(buffer, layer, batches, args.most)):
            worst = max(worst, difference(out, layer.alone(x)))
    end = time.perf_counter()
    said = [None] * ranks
    dist.all_gather_object(said, worst)
    if rank == 0:
        print(f"prefill: {args.steps} batches of {args.tokens} tokens, {middle - start:.2f} s; "
              f"decode: {args.steps} pairs of {args.most}, {end - middle:.2f} s; "
              f"from each rank alone it differs by {max(said):.1e}, relative")
    assert max(said) < 1e-2, "the layer over ranks is not the layer of one rank"
    buffer.destroy()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="of a rank in a prefill batch")
    parser.add_argument("--most", type=int, default=16, help="of a rank in a decode batch")
    args = parser.parse_args()
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), args)
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    mp.start_processes(work, (args.ranks, args), nprocs=args.ranks,
                       start_method="spawn" if torch.cuda.is_available() else "fork")


if __name__ == "__main__":
    main()
