# SPDX-License-Identifier: MIT
"""
Events. On a GPU an EventHandle is a CUDA event. On a CPU the calling thread is the current stream:
what it has done is done, and only work that a Buffer runs on its own stream (async_finish) has yet
to come; waiting for it blocks the thread and raises what went wrong.
"""
import os

import torch


def on_cuda():
    """Whether Buffers work on CUDA tensors: EP_DEVICE (cpu or cuda), or else whether torch can."""
    choice = os.environ.get("EP_DEVICE", "")
    if choice not in ("", "cpu", "cuda"):
        raise RuntimeError(f"EP_DEVICE is {choice!r}, must be cpu or cuda")
    return choice == "cuda" or (not choice and torch.cuda.is_available())


class EventHandle:
    """A point in the current stream, recorded when it is made."""

    def __init__(self):
        self._event = None  # torch.cuda.Event; on a CPU ep.Event, None: passed when made
        self._group = None  # on a CPU: whose event it is
        self._check = None  # on a CPU: raises what the work has found
        if on_cuda():
            self._event = torch.cuda.Event()
            self._event.record()

    @classmethod
    def _of(cls, event, group=None, check=None):
        self = cls.__new__(cls)
        self._event, self._group, self._check = event, group, check
        return self

    def current_stream_wait(self):
        if isinstance(self._event, torch.cuda.Event):
            torch.cuda.current_stream().wait_event(self._event)
        elif self._event is not None:
            self._event.sync()
            if self._check is not None:
                self._check()


class EventOverlap:
    """An EventHandle or None, with tensors that must live until it has passed. As a context
    manager it waits at the end."""

    def __init__(self, event=None, extra_tensors=None):
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self):
        assert self.event is not None, "this EventOverlap has no event: its call was not async"
        self.event.current_stream_wait()

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc_value, traceback):
        if self.event is not None:
            self.event.current_stream_wait()


def check_nvlink_connections(group):
    """Nothing to refuse: libep works between PCIe GPUs of any number, through the memory of the
    host where they cannot reach each other."""
