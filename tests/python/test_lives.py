# SPDX-License-Identifier: MIT
"""When objects end: by hand, by garbage collection, with the interpreter, in a child of fork()."""
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import ep
from conftest import H, K, T, Case


def alone(**config):
    return ep.Group(**dict(dict(num_experts=4, max_tokens=T, max_topk=K, max_row_bytes=4 * H, rank=0,
                                num_ranks=1, world=ep.World(1)), **config))


def test_objects_have_weak_references_and_hold_what_they_need():
    group = alone()
    handle, stream = ep.Handle(group), ep.Stream(group)
    seen = weakref.ref(group), weakref.ref(handle), weakref.ref(stream)
    del group
    handle.route(np.zeros((T, K), np.int64), stream=stream)
    stream.sync()
    assert handle.group is seen[0]()
    del handle, stream
    gc.collect()
    assert [s() for s in seen] == [None] * 3


def test_destroy_takes_what_was_made_from_it_and_may_be_repeated():
    world = ep.World(1)
    group = alone(world=world)
    handle, event = ep.Handle(group), ep.Event(group)
    with pytest.raises(ep.StateError, match="alive"):
        world.destroy()
    group.destroy()
    group.destroy()
    world.destroy()
    for call in handle.status, event.query, group.stats, lambda: group.rank:
        with pytest.raises(ep.StateError, match="destroyed"):
            call()
    with pytest.raises(ep.StateError):
        ep.Handle(group)


def test_a_handle_in_a_cycle_is_collected():
    class Mine(ep.Handle):
        pass

    group = alone()
    handle = Mine(group)
    handle.itself = handle
    seen = weakref.ref(handle)
    del handle
    gc.collect()
    assert seen() is None
    group.destroy()


def test_handles_go_in_any_order_on_each_rank(ranks):
    case = Case(2)

    def rank(group):
        r = group.rank
        handles, rows = [], np.zeros((2 * T, H), np.float32)
        for _ in range(40):
            handles.append(ep.Handle(group))
            handles[-1].route(case.ids[r])
            handles[-1].dispatch(x=case.x[r], recv_x=rows)
            if r == 0 and len(handles) % 10 == 0:
                del handles[:3]
                gc.collect()
            if r == 1 and len(handles) > 30:
                del handles[5:30:2]
        out = np.zeros((T, H), np.float32)
        handles[-1].combine(x=rows, out=out)
        assert (out == case.x[r] * case.copies(r)).all()

    ranks(2, rank)


def test_collection_waits_for_no_peer(ranks):
    """Rank 0's last operation is one that rank 1 never joins, queued on a stream."""
    def rank(group):
        if group.rank == 1:
            over.wait(30)
            return
        stream, handle = ep.Stream(group), ep.Handle(group)
        handle.route(np.zeros((T, K), np.int64))
        handle.dispatch(x=np.zeros((T, H), np.float32), recv_x=np.zeros((2 * T, H), np.float32),
                        stream=stream)
        begin = time.monotonic()
        del stream, handle
        gc.collect()
        assert time.monotonic() - begin < 5
        over.set()

    over = threading.Event()
    ranks(2, rank)


def test_a_handle_collected_between_begin_and_finish(ranks):
    case = Case(2, seed=9)

    def rank(group):
        r, handle = group.rank, ep.Handle(group)
        handle.route(case.ids[r])
        handle.dispatch_begin(x=case.x[r])
        if r == 0:
            del handle
        else:
            rows = np.zeros((handle.counts().rows, H), np.float32)
            handle.dispatch_finish(recv_x=rows)
            assert (rows == case.rows(r)).all()
        handle = ep.Handle(group)
        handle.route(case.ids[r])
        got = ep.dispatch(handle, case.x[r])
        assert (got.x == case.rows(r)).all()

    ranks(2, rank)


def test_destroy_during_a_call_of_another_thread_is_refused(ranks):
    def rank(group):
        if group.rank == 1:
            over.wait(30)
            return
        handle = ep.Handle(group)
        handle.route(np.zeros((T, K), np.int64))

        def waits():
            with pytest.raises(ep.Error) as told:
                handle.dispatch(x=np.zeros((T, H), np.float32))
            ended.append(told.value.status)

        thread = threading.Thread(target=waits)
        thread.start()
        refused = []
        deadline = time.monotonic() + 30
        while not refused and time.monotonic() < deadline:
            try:
                handle.destroy() if thread.is_alive() and ready(group) else time.sleep(0.01)
            except ep.StateError as error:
                refused.append(str(error))
        group.abort()
        thread.join(30)
        assert refused and "another thread is in a call" in refused[0]
        assert ended == ["EP_ERR_INTERRUPTED"]
        over.set()

    def ready(group):  # the call has begun: nothing counts as an operation before that
        time.sleep(0.2)
        return True

    over, ended = threading.Event(), []
    ranks(2, rank)


def test_two_threads_use_two_groups(ranks):
    case = Case(2, seed=7)

    def rank(group):
        handle, r = ep.Handle(group), group.rank
        handle.route(case.ids[r])
        for _ in range(50):
            got = ep.dispatch(handle, case.x[r])
            assert (ep.combine(handle, got.x) == case.x[r] * case.copies(r)).all()

    both = [threading.Thread(target=lambda: done.append(ranks(2, rank))) for _ in range(2)]
    done = []
    [t.start() for t in both]
    [t.join(60) for t in both]
    assert len(done) == 2


def run_python(text, *args):
    """A fresh interpreter; its output, which ends with what it was made to print."""
    done = subprocess.run([sys.executable, "-c", text] + list(args), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, timeout=240)
    assert done.returncode == 0, (done.returncode, done.stdout)
    return done.stdout


MAKE = """
import gc, os, sys, threading, time
import numpy as np
import ep
def make(r, n, **more):
    return ep.Group(num_experts=4, max_tokens=8, max_topk=1, max_row_bytes=64, rank=r, num_ranks=n,
                    timeout_ms=60000, **more)
ids, x = np.zeros((8, 1), np.int64), np.ones((8, 16), np.float32)
"""


def test_importing_starts_nothing_and_opens_nothing():
    out = run_python("""
import os, sys
before = set(os.listdir('/proc/self/fd'))
import ep
assert set(os.listdir('/proc/self/fd')) == before
assert len(os.listdir('/proc/self/task')) == 1
assert 'torch' not in sys.modules and 'numpy' not in sys.modules
print('good')""")
    assert out == "good\n"


def test_fork_after_import_and_with_a_group():
    out = run_python(MAKE + """
def use(group):
    handle = ep.Handle(group)
    handle.route(ids)
    return ep.combine(handle, ep.dispatch(handle, x).x).sum()
group = make(0, 1, world=ep.World(1))
child = os.fork()
if child == 0:
    try:
        use(group)
    except ep.StateError:
        del group
        gc.collect()
        os._exit(7 if use(make(0, 1, world=ep.World(1))) == 128 else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 7 << 8
assert use(group) == 128
print('good')""")
    assert out.endswith("good\n")


def test_the_interpreter_ends_without_destroy():
    """Two ranks as processes. One ends with everything alive, and an operation queued that the other
    will not join; the other is told that it left."""
    text = MAKE + """
rank = int(sys.argv[1])
group = make(rank, 2, address=sys.argv[2])
handle, stream = ep.Handle(group), ep.Stream(group)
handle.route(ids)
rows = np.zeros((16, 16), np.float32)
handle.dispatch(x=x, recv_x=rows)
view = ep.Tensor()
handle.dispatch(x=x, recv_x=view, flags=ep.DISPATCH_ARENA)
if rank == 0:
    handle.dispatch(x=x, recv_x=rows, stream=stream)
    print('ends')
else:
    time.sleep(0.5)
    try:
        handle.dispatch(x=x, recv_x=rows)
        handle.dispatch(x=x, recv_x=rows)
        print('nobody missed')
    except ep.Error as error:
        print(error.status)
"""
    address = f"127.0.0.1:{20000 + os.getpid() % 20000}"
    begin = time.monotonic()
    both = [subprocess.Popen([sys.executable, "-c", text, str(r), address], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, universal_newlines=True) for r in range(2)]
    said = [p.communicate(timeout=240)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0] == "ends\n" and said[1].split()[-1] == "EP_ERR_PEER", said
    assert time.monotonic() - begin < 30


def test_the_program_and_the_doctor_are_in_the_package():
    run = lambda *a: subprocess.run([sys.executable, "-m", "ep"] + list(a), timeout=240,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                    universal_newlines=True)
    assert "EP_TIMEOUT_MS" in run("env").stdout
    assert run("nonsense").returncode != 0
    out = run_python("import ep; assert ep.doctor()")
    assert "host backend works" in out


def test_the_lines_of_the_readme(tmp_path):
    readme = os.path.join(os.path.dirname(__file__), "..", "..", "README.md")
    with open(readme) as f:
        lines = f.read().split("```python\n")[1].split("```")[0]
    program = tmp_path / "lines.py"
    program.write_text("import numpy as np\n"
                       "topk_ids = np.arange(64).reshape(8, 8).T * 4\n"
                       "x = np.ones((8, 7168), np.float16)\n"
                       "experts = lambda received: received.x\n"
                       + lines + "assert (y == 2).all(), y\nprint('good')\n")
    done = subprocess.run([sys.executable, "-m", "ep", "run", "-n", "2", "--", sys.executable,
                           str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True, timeout=240)
    assert done.returncode == 0 and done.stdout.count("good") == 2, done.stdout
