# SPDX-License-Identifier: MIT
"""
The layout of a batch: how many of its tokens go where. Local, of torch operations on the current
stream, for it is asked for before there is a group. Dispatch does not need it: libep computes what
it needs from the ids themselves.
"""
import torch

from ._config import NODE_RANKS, host_check

IDS = (torch.int32, torch.int64)


def check_ids(topk_idx, tokens=None):
    host_check(topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype in IDS,
               f"topk_idx is {topk_idx.dtype} {list(topk_idx.shape)} of strides {topk_idx.stride()}, "
               f"must be contiguous [tokens, topk] of int64 or int32")
    host_check(tokens is None or topk_idx.size(0) == tokens,
               f"topk_idx has {topk_idx.size(0)} rows, must have {tokens}, as x")


def rank_of(experts, num_experts, num_ranks):
    """libep's map: E / R experts to each rank in order, the first E % R ranks one more. The id E,
    which stands for no expert, gives R."""
    each, more = divmod(num_experts, num_ranks)
    if not more:
        return experts // each
    rest = (experts - more * (each + 1)).div(max(each, 1), rounding_mode="floor") + more
    rank = torch.where(experts < more * (each + 1), experts // (each + 1), rest)
    return rank.masked_fill_(experts == num_experts, num_ranks)


def layout(topk_idx, num_experts, num_ranks):
    tokens, dev = topk_idx.size(0), topk_idx.device
    chosen = (topk_idx >= 0) & (topk_idx < num_experts)
    experts = torch.where(chosen, topk_idx, num_experts).long()
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=dev)
    ones = torch.ones((), dtype=torch.int32, device=dev).expand(experts.numel())
    per_expert.scatter_add_(0, experts.view(-1), ones)
    ranks = rank_of(experts, num_experts, num_ranks)
    in_rank = torch.zeros(tokens, num_ranks + 1, dtype=torch.bool, device=dev)
    in_rank = in_rank.scatter_(1, ranks, True)[:, :num_ranks].contiguous()
    per_node = None
    if num_ranks > NODE_RANKS:
        short = -num_ranks % NODE_RANKS
        nodes = torch.nn.functional.pad(in_rank, (0, short)).view(tokens, -1, NODE_RANKS)
        per_node = nodes.any(2).sum(0, dtype=torch.int32)
    return (in_rank.sum(0, dtype=torch.int32), per_node, per_expert[:num_experts], in_rank)
