# SPDX-License-Identifier: MIT
"""The names of DeepEP's extension module. Here it is Python: what is compiled is in `ep`."""
from deep_ep import Config, topk_idx_t
from deep_ep._config import low_latency_bytes as get_low_latency_rdma_size_hint
from deep_ep._runtime import Runtime as Buffer
from deep_ep.utils import EventHandle


def is_sm90_compiled():
    return True


__all__ = ["Buffer", "Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled",
           "topk_idx_t"]
