# SPDX-License-Identifier: MIT
"""What deep_ep has without a group: names, signatures, Config, sizes, events. No rank is started."""
import inspect
import os
import re
import subprocess
import sys
import weakref

import deep_ep
import deep_ep.buffer
import deep_ep.utils
import deep_ep_cpp
import ep
import pytest
import torch
from deep_ep import Buffer, Config

from conftest import DEVICE
from deep_ep_ranks import raises

V1 = {
    "__init__": "group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, "
                "num_qps_per_rank=24, allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, "
                "use_fabric=False, explicitly_destroy=False, enable_shrink=False, comm=None",
    "get_dispatch_layout": "topk_idx, num_experts, previous_event=None, async_finish=False, "
                           "allocate_on_comm_stream=False",
    "dispatch": "x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, "
                "is_token_in_rank=None, num_tokens_per_expert=None, topk_idx=None, "
                "topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None, "
                "previous_event=None, async_finish=False, allocate_on_comm_stream=False",
    "combine": "x, handle, topk_weights=None, bias=None, config=None, previous_event=None, "
               "async_finish=False, allocate_on_comm_stream=False",
    "low_latency_dispatch": "x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, "
                            "cumulative_local_expert_recv_stats=None, "
                            "dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False, "
                            "use_ue8m0=False, async_finish=False, return_recv_hook=False",
    "low_latency_combine": "x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, "
                           "async_finish=False, return_recv_hook=False, out=None, "
                           "combine_wait_recv_cost_stats=None",
    "get_next_low_latency_combine_buffer": "handle",
    "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank, hidden, num_experts",
    "get_local_buffer_tensor": "dtype, size=None, offset=0, use_rdma_buffer=False",
}


@pytest.mark.parametrize("method", V1)
def test_a_method_has_deep_eps_arguments_in_deep_eps_order(method):
    params = list(inspect.signature(getattr(Buffer, method)).parameters.values())[1:]
    ours = ", ".join(str(p) for p in params if p.kind is not p.KEYWORD_ONLY)
    assert ours == V1[method]


def test_the_names_are_those_of_one_generation():
    assert deep_ep.buffer.Buffer is Buffer and isinstance(Config, type)
    for name in ("EventHandle", "EventOverlap"):
        assert getattr(deep_ep, name) is getattr(deep_ep.utils, name)
    assert deep_ep_cpp.Config is Config and deep_ep_cpp.topk_idx_t is deep_ep.topk_idx_t
    assert deep_ep.topk_idx_t is torch.int64
    for name in ("ElasticBuffer", "EPHandle", "EPBuffer", "HybridEPBuffer", "__getattr__"):
        assert not hasattr(deep_ep, name)
    assert deep_ep.__version__ == "1.2.1+libep." + ep.__version__
    assert Buffer.is_sm90_compiled() and deep_ep_cpp.is_sm90_compiled()


def test_the_distribution_needs_exactly_this_libep():
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "../../python/deep_ep/pyproject.toml")) as f:
        text = f.read()
    assert f'version = "{ep.__version__}"' in text and f'"libep=={ep.__version__}"' in text


def test_another_owner_of_the_package_is_named(tmp_path):
    other = tmp_path / "sgl_deep_ep-0.1.2.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: sgl-deep-ep\nVersion: 0.1.2\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", "import deep_ep"], env=dict(os.environ, PYTHONPATH=path),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "the distribution sgl-deep-ep 0.1.2 is installed" in done.stderr


SCRIPT = """
import os, sys
import torch
fds = sorted(os.listdir('/proc/self/fd'))
import deep_ep
assert sorted(os.listdir('/proc/self/fd')) == fds and not torch.cuda.is_initialized()
assert deep_ep.topk_idx_t is torch.int32
ranks = []
for rank in (0, 1):
    ranks.append(os.fork())
    if not ranks[-1]:
        break
else:
    sys.exit(any(os.waitpid(pid, 0)[1] for pid in ranks))
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group('gloo', store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
buffer = deep_ep.Buffer(dist.group.WORLD)
ids = torch.tensor([[0], [1]], dtype=torch.int32)
per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 2)
x, *_, handle, _ = buffer.dispatch(torch.ones(2, 8), None, per_rank, None, in_rank, per_expert, ids,
                                   torch.ones(2, 1))
if rank:  # the other rank leaves without it
    out, _, event = buffer.combine(x, handle, async_finish=True)
"""


def test_import_opens_nothing_and_ranks_leave_without_destroy(tmp_path):
    env = dict(os.environ, TOPK_IDX_BITS="32", EP_DEVICE="cpu")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "store")], env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_num_sms_is_even_and_the_classs():
    raises(AssertionError, "num_sms is 3", Buffer.set_num_sms, 3)
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == 24 and repr(Buffer.get_dispatch_config(8)) == \
        "deep_ep.Config(24, 6, 256, 6, 128)"
    Buffer.set_num_sms(20)


def test_a_config_checks_its_chunks_as_deep_ep_does():
    assert repr(Config()) == "deep_ep.Config(20, 6, 256, 6, 256)"
    assert repr(Config(**{"num_sms": 8, "num_max_rdma_chunked_recv_tokens": 100})) == \
        "deep_ep.Config(8, 6, 256, 6, 100)"
    raises(RuntimeError, "num_sms is -1", Config, -1)
    raises(RuntimeError, "nvl_chunked_send_tokens is 256", Config, 20, 256, 256)
    raises(RuntimeError, "rdma_chunked_send_tokens is 65", Config, 20, 6, 256, 65, 128)
    raises(TypeError, "num_nics", Config, num_nics=2)


@pytest.mark.parametrize("ranks, dispatch, combine", [
    (2, "24, 256, 6, 128", "10, 256, 6, 128"), (4, "6, 256, 6, 128", "9, 256, 6, 128"),
    (8, "6, 256, 6, 128", "4, 256, 6, 128"), (16, "36, 288, 20, 128", "4, 288, 12, 128"),
    (24, "32, 288, 8, 128", "1, 288, 8, 128"), (32, "32, 288, 8, 128", "1, 288, 8, 128"),
    (48, "32, 288, 8, 128", "1, 288, 8, 128"), (64, "32, 288, 8, 128", "1, 288, 8, 128"),
    (96, "20, 480, 12, 128", "1, 480, 8, 128"), (128, "20, 560, 12, 128", "1, 560, 8, 128"),
    (144, "32, 720, 12, 128", "2, 720, 8, 128"), (160, "28, 720, 12, 128", "2, 720, 8, 128"),
    (1, "24, 256, 6, 128", "10, 256, 6, 128"), (12, "36, 288, 20, 128", "4, 288, 12, 128"),
    (1000, "28, 720, 12, 128", "2, 720, 8, 128")])
def test_every_number_of_ranks_has_a_default_config(ranks, dispatch, combine):
    assert repr(Buffer.get_dispatch_config(ranks)) == f"deep_ep.Config(20, {dispatch})"
    assert repr(Buffer.get_combine_config(ranks)) == f"deep_ep.Config(20, {combine})"


def test_size_hints_are_libeps_plan():
    config = Config(20)
    for ranks in (2, 8, 16, 64):
        small, large = (config.get_nvl_buffer_size_hint(n, ranks) for n in (2048, 14336))
        assert 0 < small < large and not small % 128
        assert config.get_rdma_buffer_size_hint(14336, ranks) == 0
    hint = Buffer.get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank=16, hidden=512,
                                                 num_ranks=4, num_experts=8)
    assert hint == Buffer.get_low_latency_rdma_size_hint(16, 512, 4, 8) > 2 * 4 * 16 * 512
    assert hint == deep_ep_cpp.get_low_latency_rdma_size_hint(16, 512, 4, 8)


def test_a_buffer_needs_a_group_or_a_comm():
    raises(ValueError, "group", Buffer, None)
    raises(TypeError, "num_nvl_peers", Buffer, None, num_nvl_peers=4)


class Alone:
    """A comm of mpi4py with one rank."""
    def Get_rank(self): return 0  # noqa: E704
    def Get_size(self): return 1  # noqa: E704
    def allgather(self, obj): return [obj]  # noqa: E704


def alone(**kw):
    return Buffer(None, comm=Alone(), **kw)


def test_a_buffer_has_the_attributes_that_engines_read():
    b = alone(num_nvl_bytes=256, num_rdma_bytes=512, low_latency_mode=True, num_qps_per_rank=1.5,
              use_fabric=True, allow_mnnvl=True)
    assert (b.rank, b.group_size, b.num_nvl_bytes, b.num_rdma_bytes) == (0, 1, 256, 512)
    assert isinstance(b.group, Alone) and b.low_latency_mode and not b.explicitly_destroy
    assert b.nvshmem_qp_depth == 1024 and not hasattr(alone(), "nvshmem_qp_depth")
    r = b.runtime
    assert (r.is_available(), r.get_num_rdma_ranks(), r.get_rdma_rank(), r.get_root_rdma_rank(True),
            r.get_local_device_id()) == (True, 1, 0, 0, 0 if DEVICE == "cuda" else -1)
    assert b.get_comm_stream() is not None and weakref.ref(b)() is b
    raises(AssertionError, "num_qps_per_rank", alone, low_latency_mode=True, num_qps_per_rank=0)
    raises(RuntimeError, "num_nvl_bytes", alone, num_nvl_bytes=-128)


def test_the_queue_depth_is_read_and_needless(monkeypatch):
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "2050")
    assert alone(low_latency_mode=True).nvshmem_qp_depth == 2050


def test_the_local_buffer_is_memory_of_its_size():
    b = alone(num_nvl_bytes=256, num_rdma_bytes=1024)
    whole = b.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
    assert whole.shape == (1024,) and not whole.zero_().any()
    assert b.get_local_buffer_tensor(torch.bfloat16).shape == (128,)
    assert b.get_local_buffer_tensor(torch.float32, torch.Size([4, 8]), 128).shape == (4, 8)
    raises(AssertionError, "size has 65", b.get_local_buffer_tensor, torch.float32, torch.Size([65]))


def test_destroy_is_for_those_that_asked_for_it(capfd):
    raises(AssertionError, "explicitly_destroy", alone().destroy)
    b = alone(explicitly_destroy=True)
    b.destroy()
    assert b.runtime is None
    raises(RuntimeError, "destroyed", b.destroy)
    raises(RuntimeError, "destroyed", b.get_dispatch_layout, torch.zeros(1, 1, dtype=torch.int64), 4)
    assert not capfd.readouterr().out
    alone(explicitly_destroy=True)
    assert re.match("WARNING: destroy.. was not called", capfd.readouterr().out)


def test_static_methods_and_init_can_be_replaced(monkeypatch):
    made, plain = [], Buffer.__init__

    def wrapped(self, *args, **kw):
        made.append(self)
        plain(self, *args, **kw)
    monkeypatch.setattr(Buffer, "__init__", wrapped)
    b = alone()
    assert made == [b]

    class Mine(Buffer):
        pass
    assert isinstance(Mine(None, comm=Alone()), Buffer)


def test_an_event_of_the_cpu_has_passed_when_it_is_made():
    event = Buffer.capture()
    assert isinstance(event, deep_ep.EventOverlap) and event.extra_tensors is None
    event.current_stream_wait()
    with deep_ep.EventOverlap(deep_ep.EventHandle()) as entered:
        assert entered.event is not None
    with deep_ep.EventOverlap() as entered:
        assert entered.event is None
    raises(AssertionError, "no event", deep_ep.EventOverlap().current_stream_wait)


def test_the_device_follows_its_variable(monkeypatch):
    monkeypatch.setenv("EP_DEVICE", "tpu")
    raises(RuntimeError, "EP_DEVICE is 'tpu'", alone)


def test_switches_that_are_not_built_are_refused_in_a_sentence():
    b = alone(low_latency_mode=True)
    x, ids = torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
    for switch in ({"use_nvfp4": True}, {"x_global_scale": torch.ones(())}):
        raises(NotImplementedError, next(iter(switch)), b.low_latency_dispatch, x, ids, 4, 4, **switch)
    for switch in ({"overlap": True}, {"src_signals": torch.ones(1)}):
        raises(NotImplementedError, next(iter(switch)), b.low_latency_combine, x, ids, ids, (), **switch)
    raises(TypeError, "opt_level", b.low_latency_dispatch, x, ids, 4, 4, opt_level=3)
