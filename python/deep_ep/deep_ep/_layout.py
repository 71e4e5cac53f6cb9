# SPDX-License-Identifier: MIT
"""
The layout of a batch: how many of its tokens go where. Local, on the current stream: by libep where
there is a group with room for the batch, else by torch, for the first layout is asked for before
there is a group. Dispatch does not need it: libep computes what it needs from the ids themselves.
"""
import torch

from ._config import NODE_RANKS, host_check

IDS = (torch.int32, torch.int64)


def check_ids(topk_idx, tokens=None):
    host_check(topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype in IDS,
               lambda: f"topk_idx is {topk_idx.dtype} {list(topk_idx.shape)} of strides "
               f"{topk_idx.stride()}, must be contiguous [tokens, topk] of int64 or int32")
    host_check(tokens is None or topk_idx.size(0) == tokens,
               lambda: f"topk_idx has {topk_idx.size(0)} rows, must have {tokens}, as x")


def rank_of(experts, num_experts, num_ranks):
    """libep's map: E / R experts to each rank in order, the first E % R ranks one more. The id E,
    which stands for no expert, gives R."""
    each, more = divmod(num_experts, num_ranks)
    if not more:
        return experts // each
    rest = (experts - more * (each + 1)).div(max(each, 1), rounding_mode="floor") + more
    rank = torch.where(experts < more * (each + 1), experts // (each + 1), rest)
    return rank.masked_fill_(experts == num_experts, num_ranks)


def layout(topk_idx, num_experts, num_ranks, handle):
    """(tokens per rank, per node or None, per expert, which goes where), by a handle of libep's, or by
    torch where that is None."""
    per_rank, per_expert, in_rank = _by_torch(topk_idx, num_experts, num_ranks) if handle is None \
        else _by_handle(topk_idx, num_experts, num_ranks, handle)
    per_node = None
    if num_ranks > NODE_RANKS:
        short = -num_ranks % NODE_RANKS
        nodes = torch.nn.functional.pad(in_rank, (0, short)).view(len(in_rank), -1, NODE_RANKS)
        per_node = nodes.any(2).sum(0, dtype=torch.int32)
    return per_rank, per_node, per_expert, in_rank


def _by_handle(topk_idx, num_experts, num_ranks, handle):
    handle.route(topk_ids=topk_idx, num_experts=num_experts)
    per_rank = topk_idx.new_empty(num_ranks, dtype=torch.int32)
    per_expert = topk_idx.new_empty(num_experts, dtype=torch.int32)
    in_rank = topk_idx.new_empty((topk_idx.size(0), num_ranks), dtype=torch.bool)
    handle.layout(tokens_per_rank=per_rank, tokens_per_expert=per_expert, token_in_rank=in_rank)
    return per_rank, per_expert, in_rank


def _by_torch(topk_idx, num_experts, num_ranks):
    tokens, dev = topk_idx.size(0), topk_idx.device
    chosen = (topk_idx >= 0) & (topk_idx < num_experts)
    experts = torch.where(chosen, topk_idx, num_experts).long()
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=dev)
    ones = torch.ones((), dtype=torch.int32, device=dev).expand(experts.numel())
    per_expert.scatter_add_(0, experts.view(-1), ones)
    ranks = rank_of(experts, num_experts, num_ranks)
    in_rank = torch.zeros(tokens, num_ranks + 1, dtype=torch.bool, device=dev)
    in_rank = in_rank.scatter_(1, ranks, True)[:, :num_ranks].contiguous()
    return in_rank.sum(0, dtype=torch.int32), per_expert[:num_experts], in_rank
