# SPDX-License-Identifier: MIT
"""Megatron-Core's own dispatcher, unchanged, on deep_ep: forward and backward, on 4 ranks with gloo.
Skipped only where the package megatron-core is not installed."""
import importlib
import importlib.util
import types

import pytest
import torch

import deep_ep
from conftest import DEVICE
from deep_ep_ranks import Batch, generator, on_ranks, rank_pools  # noqa: E402,F401

EXPERTS, TOPK = 16, 4
if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("the package megatron-core is not installed", allow_module_level=True)


def moe(module):
    return importlib.import_module("megatron.core.transformer.moe." + module)


if DEVICE == "cpu":  # once for all ranks; it uses the GPU, and then none could be forked
    moe("token_dispatcher")


def config():
    return types.SimpleNamespace(
        moe_router_dtype="fp32", moe_expert_capacity_factor=None, moe_permute_fusion=False,
        moe_deepep_num_sms=20, moe_flex_dispatcher_num_sms=None,  # 0.16, 0.19
        moe_router_padding_for_quantization=False, use_transformer_engine_op_fuser=False, fp8=None,
        fp4=None)


@on_ranks(4)
def test_fused_dispatch_and_combine(group):
    fused_a2a = moe("fused_a2a")
    assert fused_a2a.HAVE_DEEP_EP and fused_a2a.Buffer is deep_ep.Buffer
    for asynchronous in (False, True):
        b = Batch(group, tokens=[24, 1, 7, 9], topk=TOPK, experts=EXPERTS, dtype=torch.float32)
        x, probs = b.x.clone().requires_grad_(), b.topk_weights.clone().requires_grad_()
        recv_x, ids, recv_probs, counts, handle = fused_a2a.fused_dispatch(
            x, b.topk_idx, probs, EXPERTS, group, async_finish=asynchronous,
            allocate_on_comm_stream=asynchronous)
        assert torch.equal(recv_x, b.received(b.xs)) and counts.tolist() == b.counts()
        assert torch.equal(ids, b.local_ids()) and torch.equal(recv_probs, b.local_weights())
        y = recv_x * (recv_probs * (ids >= 0)).sum(1, keepdim=True)
        out, _ = fused_a2a.fused_combine(y, group, handle, async_finish=asynchronous,
                                         allocate_on_comm_stream=asynchronous)
        out.square().sum().backward()
        rx, rp = b.x.clone().requires_grad_(), b.topk_weights.clone().requires_grad_()
        want = rx * (rp * (b.topk_idx >= 0)).sum(1, keepdim=True)
        want.square().sum().backward()
        for ours, theirs in ((out, want), (x.grad, rx.grad), (probs.grad, rp.grad)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@on_ranks(4)
def test_the_deepep_manager(group):
    manager = moe("token_dispatcher")._DeepepManager(group=group, num_local_experts=EXPERTS // 4, router_topk=TOPK,
                                 num_experts=EXPERTS, config=config())
    for step in range(2):
        b = Batch(group, tokens=[24, 3, 7, 9], experts=EXPERTS, dtype=torch.float32, seed=step)
        logits = torch.randn(len(b.x), EXPERTS, generator=generator(b.rank))
        top = logits.topk(TOPK).indices
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, top, True)
        numbers = torch.arange(1.0, EXPERTS + 1)
        results = []
        for ours in (True, False):
            x = b.x.clone().requires_grad_()
            probs = (logits.softmax(1) * routing_map).requires_grad_()
            if ours:
                manager.setup_metadata(routing_map, probs)
                rows = manager.dispatch(x)
                rows, row_probs = manager.get_permuted_hidden_states_by_experts(rows)
                counts = manager.get_number_of_tokens_per_expert()
                mine = numbers[b.rank * 4:b.rank * 4 + 4]
                y = rows * (mine.repeat_interleave(counts) * row_probs)[:, None]
                out = manager.combine(manager.get_restored_hidden_states_by_experts(y))
            else:
                out = x * (probs * numbers).sum(1, keepdim=True)
            out.square().sum().backward()
            results.append((out, x.grad, probs.grad * routing_map))
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
