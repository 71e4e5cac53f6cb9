# SPDX-License-Identifier: MIT
"""
Config and the size hints.

The chunk sizes of a Config mean nothing to libep, whose memory has no rings and no credits; they
are checked as DeepEP checks them and kept. What remains of a Config is num_sms: how many SMs a call
may take. A size hint is what libep's own plan says for the shape that the caller names.
"""
import functools

import ep

# What a hint without a number of tokens or top-k assumes: the shape that is published everywhere.
HINT_TOKENS = 4096
HINT_TOPK = 8
NODE_RANKS = 8  # DeepEP's: ranks of a node in its handles


def host_check(holds, sentence):
    """DeepEP's host assertion: RuntimeError, here with a sentence that names the argument, or what
    makes one: calls that are made for every layer do not format what nobody reads."""
    if not holds:
        raise RuntimeError(sentence() if callable(sentence) else sentence)


def round_up(n, unit):
    return -(-n // unit) * unit


def first_recv_rows(num_ranks, tokens, topk):
    """Rows that a group has room for before it had to grow. The worst case, R * T, comes only when
    every token of every rank goes to one rank; with top-k far below R that is rare."""
    return tokens * min(num_ranks, 2 * topk)


def plan_bytes(**fields):
    return round_up(max(ep.plan(**fields).arena_bytes, 1), 128)


class Config:
    def __init__(self, num_sms=20, num_max_nvl_chunked_send_tokens=6,
                 num_max_nvl_chunked_recv_tokens=256, num_max_rdma_chunked_send_tokens=6,
                 num_max_rdma_chunked_recv_tokens=256):
        nvl_send, nvl_recv = num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens
        host_check(num_sms >= 0, f"num_sms is {num_sms}, must be at least 0")
        host_check(0 < nvl_send < nvl_recv,
                   f"num_max_nvl_chunked_send_tokens is {nvl_send}, must be above 0 and below "
                   f"num_max_nvl_chunked_recv_tokens, {nvl_recv}")
        host_check(0 < rdma_send <= rdma_recv // 2,
                   f"num_max_rdma_chunked_send_tokens is {rdma_send}, must be above 0 and at most "
                   f"half of num_max_rdma_chunked_recv_tokens, {rdma_recv}")
        self._num_sms = num_sms
        self._chunks = (nvl_send, nvl_recv, rdma_send, rdma_recv)

    def __repr__(self):
        return "deep_ep.Config(%d, %d, %d, %d, %d)" % ((self._num_sms,) + self._chunks)

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks, /):
        """Bytes of the arena for rows of hidden_bytes, 4096 tokens of each rank, top-8."""
        return plan_bytes(num_ranks=num_ranks, num_experts=num_ranks, max_tokens=HINT_TOKENS,
                          max_topk=HINT_TOPK, max_row_bytes=round_up(hidden_bytes, 16),
                          max_recv_rows=first_recv_rows(num_ranks, HINT_TOKENS, HINT_TOPK))

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks, /):
        """0: there is one arena, and the other hint has all of it."""
        return 0


def low_latency_bytes(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts):
    tokens = num_max_dispatch_tokens_per_rank
    return plan_bytes(num_ranks=num_ranks, num_experts=num_experts, max_tokens=tokens,
                      max_topk=HINT_TOPK, max_row_bytes=2 * hidden, ll_max_tokens=tokens)


# (chunk sizes of dispatch, of combine) by number of ranks, as DeepEP has them.
_DEFAULTS = {
    2: ((24, 256, 6, 128), (10, 256, 6, 128)),
    4: ((6, 256, 6, 128), (9, 256, 6, 128)),
    8: ((6, 256, 6, 128), (4, 256, 6, 128)),
    16: ((36, 288, 20, 128), (4, 288, 12, 128)),
    24: ((32, 288, 8, 128), (1, 288, 8, 128)),
    96: ((20, 480, 12, 128), (1, 480, 8, 128)),
    128: ((20, 560, 12, 128), (1, 560, 8, 128)),
    144: ((32, 720, 12, 128), (2, 720, 8, 128)),
    160: ((28, 720, 12, 128), (2, 720, 8, 128)),
}


@functools.lru_cache(None)
def default_config(num_sms, num_ranks, combine):
    """DeepEP's, or of a number of ranks that it does not know, that of the next one it does."""
    known = min((n for n in _DEFAULTS if n >= num_ranks), default=160)
    if num_ranks in (32, 48, 64):
        known = 24
    return Config(num_sms, *_DEFAULTS[known][combine])
