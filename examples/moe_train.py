#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
A small Mixture-of-Experts transformer, trained on text over several ranks, and in one process.

Attention and the rest are on every rank, each of which has its part of the batch; the experts are
spread over the ranks, and tokens travel to them by deep_ep, forward and backward. The same model with
the same batches is trained in one process without communication, and the losses have to be equal:
the sums are the same, but for the order in which float32 adds them.

    python examples/moe_train.py                      4 processes on CPUs, or one for each GPU
    python examples/moe_train.py --steps 10 --layers 1 --check 1e-3           seconds, for CI
"""
import argparse
import csv
import glob
import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from deep_ep import Buffer

EXPERTS, TOPK, DIM, HEADS, WIDTH, CONTEXT, BATCH = 8, 2, 64, 4, 128, 64, 16


class Dispatch(torch.autograd.Function):
    """Rows and weights to the ranks of the experts; backward, the gradients come back summed."""

    @staticmethod
    def forward(ctx, x, ids, weights, buffer):
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, EXPERTS)
        rows, ids, weights, _, ctx.handle, _ = buffer.dispatch(
            x, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert)
        ctx.buffer = buffer
        ctx.mark_non_differentiable(ids)
        return rows, ids, weights, ctx.handle

    @staticmethod
    def backward(ctx, grad_rows, _, grad_weights, __):
        grad_x, grad_weights, _ = ctx.buffer.combine(grad_rows.contiguous(), ctx.handle,
                                                     topk_weights=grad_weights.contiguous())
        return grad_x, None, grad_weights, None


class Combine(torch.autograd.Function):
    """Answers back to the tokens, summed; backward is a dispatch along the same handle."""

    @staticmethod
    def forward(ctx, answers, handle, buffer):
        ctx.handle, ctx.buffer = handle, buffer
        return buffer.combine(answers, handle)[0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None


class Experts(nn.Module):
    def __init__(self, rank, ranks, buffer):
        super().__init__()
        own = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        self.up = nn.Parameter((torch.randn(EXPERTS, DIM, WIDTH) / DIM ** 0.5)[own].clone())
        self.down = nn.Parameter((torch.randn(EXPERTS, WIDTH, DIM) / WIDTH ** 0.5)[own].clone())
        self.buffer = buffer

    def answers(self, rows, ids, weights):
        """Of each row the sum of this rank's experts that are in ids, weighted."""
        out = torch.zeros_like(rows)
        for e in range(len(self.up)):
            row, k = (ids == e).nonzero(as_tuple=True)
            y = F.silu(rows[row] @ self.up[e]) @ self.down[e]
            out = out.index_add(0, row, y * weights[row, k, None])
        return out

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, DIM)
        weights, ids = self.router(x).softmax(1).topk(TOPK)
        weights = weights / weights.sum(1, keepdim=True)
        if self.buffer is None:
            return self.answers(x, ids, weights).view(shape)
        rows, ids, weights, handle = Dispatch.apply(x, ids, weights, self.buffer)
        return Combine.apply(self.answers(rows, ids, weights), handle, self.buffer).view(shape)


class Block(nn.Module):
    def __init__(self, *where):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.experts = Experts(*where)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, DIM))
        return x + self.experts(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, layers, *where):
        super().__init__()
        self.token, self.place = nn.Embedding(256, DIM), nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.ModuleList(Block(*where) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 256, bias=False)

    def forward(self, text):
        x = self.token(text) + self.place.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Adam:
    """Written out, for torch's optimizers import for seconds."""

    def __init__(self, params, rate):
        self.params, self.rate, self.steps = list(params), rate, 0
        self.means = [torch.zeros_like(p) for p in self.params]
        self.squares = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for p, mean, square in zip(self.params, self.means, self.squares):
            mean.lerp_(p.grad, 0.1)
            square.lerp_(p.grad.square(), 0.01)
            root = (square / (1 - 0.99 ** self.steps)).sqrt() + 1e-8
            p -= self.rate / (1 - 0.9 ** self.steps) * mean / root
            p.grad = None


def read_text(path):
    if path:
        names = [path]
    else:  # this project's own pages
        root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
        names = sorted(glob.glob(os.path.join(root, "*.md")) +
                       glob.glob(os.path.join(root, "docs", "**", "*.md"), recursive=True))
    data = b"".join(open(name, "rb").read() for name in names)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def train(rank, ranks, args, text, buffer, device, show):
    """The loss of every step, averaged over the ranks."""
    torch.manual_seed(0)
    model = Model(args.layers, rank, ranks, buffer).to(device)
    spread = {p for block in model.blocks for p in (block.experts.up, block.experts.down)}
    optimizer = Adam(model.parameters(), rate=1e-3)
    gen, losses = torch.Generator().manual_seed(1), []
    for step in range(args.steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=gen)
        own = starts[rank * BATCH // ranks:(rank + 1) * BATCH // ranks]
        batch = torch.stack([text[s:s + CONTEXT + 1] for s in own]).to(device)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        loss = loss.detach()
        if ranks > 1:
            # An expert has had the tokens of all ranks; of the rest each rank has its own's part.
            rest = [p.grad for p in model.parameters() if p not in spread] + [loss]
            flat = torch.cat([g.flatten() for g in rest])
            dist.all_reduce(flat)
            for g, part in zip(rest, flat.split([g.numel() for g in rest])):
                g.copy_(part.view(g.shape))
            for g in [p.grad for p in spread] + rest:
                g /= ranks
        optimizer.step()
        losses.append(loss.item())
        if show and (sys.stderr.isatty() or step + 1 == args.steps):
            bar = "#" * (40 * (step + 1) // args.steps)
            sys.stderr.write(f"\r{ranks} rank{'s' * (ranks > 1):1} [{bar:40}] {step + 1}/{args.steps} "
                             f"loss {losses[-1]:.3f}" + "\n" * (step + 1 == args.steps))
    return losses


def work(rank, ranks, args):
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    nccl = cuda and ranks <= torch.cuda.device_count()  # which takes one rank of a GPU
    dist.init_process_group("nccl" if nccl else "gloo", rank=rank, world_size=ranks)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    buffer = Buffer(dist.group.WORLD, explicitly_destroy=True)
    text = read_text(args.text)
    losses = train(rank, ranks, args, text, buffer, device, show=rank == 0)
    if rank == 0:
        compare(args, losses, train(0, 1, args, text, None, device, show=True))
    dist.barrier()
    buffer.destroy()
    dist.destroy_process_group()


def compare(args, ours, alone):
    apart = max(abs(a - b) for a, b in zip(ours, alone))
    print(f"loss after {args.steps} steps: {ours[-1]:.4f} over ranks, {alone[-1]:.4f} in one process; "
          f"the largest difference of a step is {apart:.1e}")
    if args.out:
        with open(args.out + ".csv", "w", newline="") as f:
            csv.writer(f).writerows([("step", "ranks", "one_process"),
                                     *zip(range(args.steps), ours, alone)])
        try:
            import matplotlib
        except ImportError:
            print(f"no plot: matplotlib is not installed; the losses are in {args.out}.csv")
        else:
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
            plt.plot(alone, label="one process", linewidth=3, alpha=0.5)
            plt.plot(ours, label="experts over ranks", linewidth=1)
            plt.xlabel("step"), plt.ylabel("loss"), plt.legend()
            plt.savefig(args.out + ".png", dpi=120)
    assert apart <= args.check, f"the losses differ by {apart:.1e}, more than {args.check:.0e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--text", help="a file to learn from; default: this project's pages")
    parser.add_argument("--out", help="where the losses go: OUT.csv, and OUT.png by matplotlib")
    parser.add_argument("--check", type=float, default=0.05, help="by how much losses may differ")
    args = parser.parse_args()
    if BATCH % args.ranks or EXPERTS % args.ranks:
        parser.error(f"--ranks must divide {BATCH} and {EXPERTS}")
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
