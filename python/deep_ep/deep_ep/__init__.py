# SPDX-License-Identifier: MIT
"""
DeepEP's Python interface on top of libep.

Engines that import deep_ep (vLLM, SGLang, Megatron-Core, NeMo, lmdeploy, rtp-llm) run on it
unchanged, on GPUs and, with CPU tensors, without one. What differs from DeepEP, and why, is in
docs/coming-from-deepep.md. Importing needs no GPU and no process group, and opens nothing.
"""
import os as _os
from importlib import metadata as _metadata

import ep as _ep
import torch as _torch

_bits = _os.environ.get("TOPK_IDX_BITS", _os.environ.get("EP_NUM_TOPK_IDX_BITS", "64"))
topk_idx_t = _torch.int32 if _bits == "32" else _torch.int64

from ._config import Config  # noqa: E402
from .utils import EventHandle, EventOverlap  # noqa: E402
from .buffer import Buffer  # noqa: E402

__version__ = "1.2.1+libep." + _ep.__version__

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]

for _name in ("deep_ep", "sgl-deep-ep"):
    try:
        _other = _metadata.version(_name)
    except _metadata.PackageNotFoundError:
        continue
    import warnings as _warnings
    _warnings.warn(f"the distribution {_name} {_other} is installed beside libep-deepep, and both own "
                   f"the package deep_ep: uninstall one of them, then install the other again")
