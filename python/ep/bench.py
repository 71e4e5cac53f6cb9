# SPDX-License-Identifier: MIT
"""`python -m ep.bench`: one workload through the deep_ep that is importable, and through ep.

Ranks are processes over gloo, on GPUs where torch has as many, else on the CPU. Each operation is
timed by the same code: until a call returns, of several in a row that nobody waits for; until the
slowest rank has its output; and on GPUs, for the GPU alone, in a chain that is queued while the stream
is held back, as `ep bench` tells it for libep without Python (docs/bench.md says how to compare). What
asks for counts waits for the GPU, and has no such time. Prints a table; --json writes all numbers,
--plot draws the latencies over the number of tokens (matplotlib).
"""
import argparse
import importlib
import importlib.util
import json
import os
import socket
import statistics
import sys
import time
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.distributed as distributed

import ep
import ep.torch

Operations = Dict[str, Callable[[], Any]]
IN_A_ROW = 32
HELD_CYCLES = 5_000_000  # of a GPU's clock: longer than a host takes to queue a chain


class Workload:
    """Seeded inputs of one rank."""

    def __init__(self, args: argparse.Namespace, tokens: int, rank: int, device: torch.device):
        generator = torch.Generator().manual_seed(1000 * tokens + rank)
        self.tokens = tokens
        self.x = torch.randn(tokens, args.hidden, generator=generator).bfloat16().to(device)
        scores = torch.rand(tokens, args.experts, generator=generator)
        self.ids = scores.topk(args.topk).indices.to(device)
        self.weights = torch.rand(tokens, args.topk, generator=generator).to(device)


class ThroughEp:
    def __init__(self, args: argparse.Namespace, rank: int, device: torch.device):
        most = max(args.tokens)
        self.group = ep.Group(
            num_experts=args.experts, max_tokens=most, max_topk=args.topk,
            max_row_bytes=2 * args.hidden, rank=rank, num_ranks=args.ranks,
            ll_max_tokens=min(most, args.ll_tokens), allgather=ep.torch.allgather(),
            device="cuda" if device.type == "cuda" else "host", device_index=device.index or 0)

    def operations(self, w: Workload, ll: bool) -> Operations:
        if ll:
            got = ep.ll_dispatch(self.group, w.x, w.ids, topk_weights=w.weights)
            out = torch.empty_like(w.x)
            rows, source = got.x.flatten(0, 1), got.source.flatten()
            return {"ll_dispatch": lambda: self.group.ll_dispatch(
                        x=w.x, topk_ids=w.ids, topk_weights=w.weights, handle=got.handle, recv_x=rows,
                        recv_source=source, expert_counts=got.expert_counts, ranges=got.ranges,
                        max_tokens=got.max_tokens),
                    "ll_combine": lambda: self.group.ll_combine(
                        x=rows, handle=got.handle, out=out, max_tokens=got.max_tokens)}
        handle = ep.Handle(self.group)
        handle.route(w.ids)
        first = ep.dispatch(handle, w.x)
        out = torch.empty_like(w.x)

        def routed() -> None:
            handle.route(w.ids)
            ep.dispatch(handle, w.x, topk_weights=w.weights)

        return {"dispatch": routed,
                "dispatch_cached": lambda: handle.dispatch(x=w.x, recv_x=first.x),
                "combine": lambda: handle.combine(x=first.x, out=out)}


class ThroughDeepEp:
    def __init__(self, args: argparse.Namespace, rank: int, device: torch.device):
        deep_ep = importlib.import_module("deep_ep")
        self.args, most = args, min(max(args.tokens), args.ll_tokens)
        world = distributed.group.WORLD
        size = deep_ep.Buffer.get_low_latency_rdma_size_hint(most, args.hidden, args.ranks,
                                                             args.experts)
        config = deep_ep.Buffer.get_dispatch_config(args.ranks)
        self.buffer = deep_ep.Buffer(
            world, config.get_nvl_buffer_size_hint(2 * args.hidden, args.ranks), size,
            low_latency_mode=True, num_qps_per_rank=max(1, args.experts // args.ranks))
        self.most = most

    def operations(self, w: Workload, ll: bool) -> Operations:
        b, experts = self.buffer, self.args.experts
        if ll:
            def ll_dispatch() -> Any:
                return b.low_latency_dispatch(w.x, w.ids, self.most, experts, use_fp8=False)

            got = ll_dispatch()
            return {"ll_dispatch": ll_dispatch,
                    "ll_combine": lambda: b.low_latency_combine(got[0], w.ids, w.weights, got[2])}

        def routed() -> Any:
            per_rank, per_node, per_expert, in_rank, _ = b.get_dispatch_layout(w.ids, experts)
            return b.dispatch(w.x, topk_idx=w.ids, topk_weights=w.weights,
                              num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
                              num_tokens_per_expert=per_expert, is_token_in_rank=in_rank)

        first = routed()
        return {"dispatch": routed,
                "dispatch_cached": lambda: b.dispatch(w.x, handle=first[4]),
                "combine": lambda: b.combine(first[0], first[4])}


def measure(call: Callable[[], Any], args: argparse.Namespace, device: torch.device) -> Any:
    """Microseconds until a call returns, and until the slowest rank is done: medians."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    returned, done = [], []
    for i in range(args.warmup + args.iters):
        wait()
        distributed.barrier()
        begin = time.perf_counter()
        call()
        wait()
        end = time.perf_counter()
        for _ in range(IN_A_ROW):
            call()
        if i >= args.warmup:
            returned.append(1e6 * (time.perf_counter() - end) / IN_A_ROW)
            done.append(1e6 * (end - begin))
    times = torch.tensor([returned, done])
    distributed.all_reduce(times, op=distributed.ReduceOp.MAX)
    return [statistics.median(t.tolist()) for t in times]


def device_time(call: Callable[[], Any], args: argparse.Namespace) -> Optional[float]:
    """Microseconds of one operation on the GPU; None where the host did not queue a chain in time."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for i in range(args.warmup + args.iters):
        torch.cuda.synchronize()
        distributed.barrier()
        torch.cuda._sleep(HELD_CYCLES)
        call()  # behind which the ranks are together
        begin.record()
        for _ in range(IN_A_ROW):
            call()
        end.record()
        in_time = not begin.query()
        end.synchronize()
        if in_time and i >= args.warmup:
            times.append(1e3 * begin.elapsed_time(end) / IN_A_ROW)
    slowest = torch.tensor([statistics.median(times) if times else float("nan")])
    distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
    return None if slowest.isnan() else round(slowest.item(), 2)


def _rank(rank: int, args: argparse.Namespace, port: int) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                   world_size=args.ranks)
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rows: List[Dict[str, Any]] = []
    for name, through in (("deep_ep", ThroughDeepEp), ("ep", ThroughEp)):
        if name not in args.through:
            continue
        library = through(args, rank, device)
        for tokens in args.tokens:
            w = Workload(args, tokens, rank, device)
            for ll in (False, True) if tokens <= args.ll_tokens else (False,):
                for operation, call in library.operations(w, ll).items():
                    call_us, done_us = measure(call, args, device)
                    rows.append(dict(through=name, operation=operation, tokens=tokens,
                                     call_us=round(call_us, 2), done_us=round(done_us, 2)))
                    if device.type == "cuda" and operation != "dispatch":
                        rows[-1]["device_us"] = device_time(call, args)
    if rank == 0:
        report(args, rows)
    distributed.barrier()
    distributed.destroy_process_group()


def report(args: argparse.Namespace, rows: List[Dict[str, Any]]) -> None:
    print(f"{'through':8} {'operation':16} {'tokens':>7} {'call, us':>10} {'done, us':>10} "
          f"{'device, us':>10}")
    for r in rows:
        device = r.get("device_us")
        print(f"{r['through']:8} {r['operation']:16} {r['tokens']:7} {r['call_us']:10.1f} "
              f"{r['done_us']:10.1f} {'-' if device is None else device:>10}")
    about = dict(vars(args), ep=ep.__version__, torch=torch.__version__)
    if "deep_ep" in args.through:
        about["deep_ep"] = getattr(sys.modules["deep_ep"], "__version__", "unknown")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(dict(about=about, rows=rows), f, indent=1)
    if args.plot:
        draw(args, rows)


def draw(args: argparse.Namespace, rows: List[Dict[str, Any]]) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = list(dict.fromkeys(r["operation"] for r in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.6 * len(names), 3.6), squeeze=False)
    for axes, name in zip(panels[0], names):
        for through, color in (("ep", "#185a9a"), ("deep_ep", "#e07b00")):
            points = [r for r in rows if r["operation"] == name and r["through"] == through]
            for key, style in (("done_us", "-o"), ("call_us", ":")):
                axes.plot([r["tokens"] for r in points], [r[key] for r in points], style,
                          color=color, label=f"{through}, {key[:-3]}", markersize=3)
        axes.set(title=name, xlabel="tokens per rank", xscale="log", yscale="log")
        axes.grid(color="#dddddd", linewidth=0.6)
    panels[0][0].set_ylabel("us, the slowest rank")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"{args.ranks} ranks on {args.device}, hidden {args.hidden}, top-{args.topk} of "
                    f"{args.experts} experts", fontsize=10)
    figure.tight_layout()
    figure.savefig(args.plot, dpi=130)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m ep.bench", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")],
                   default=[1, 16, 128, 1024], help="per rank, 1,16,128,1024")
    p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--topk", type=int, default=8)
    p.add_argument("--experts", type=int, default=64)
    p.add_argument("--ll-tokens", type=int, default=128, help="most tokens of low-latency mode")
    p.add_argument("--iters", type=int, default=30)
    p.add_argument("--warmup", type=int, default=5)
    p.add_argument("--device", choices=["cuda", "cpu"])
    p.add_argument("--through", type=lambda s: s.split(","), help="deep_ep,ep; else what there is")
    p.add_argument("--json")
    p.add_argument("--plot")
    args = p.parse_args()
    if not args.device:
        args.device = "cuda" if torch.cuda.device_count() >= args.ranks else "cpu"
    if not args.through:
        found = importlib.util.find_spec("deep_ep") is not None
        args.through = ["deep_ep", "ep"] if found else ["ep"]
    if args.plot and not importlib.util.find_spec("matplotlib"):
        p.error("--plot needs matplotlib: pip install matplotlib")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if args.ranks == 1:
        _rank(0, args, port)
    else:
        torch.multiprocessing.spawn(_rank, (args, port), nprocs=args.ranks)


if __name__ == "__main__":
    main()
