# SPDX-License-Identifier: MIT
"""What libep's errors and results are in Python."""
from types import SimpleNamespace
from typing import Any, Dict, Optional, Type, Union


class Plan(SimpleNamespace):
    """What a configuration costs, to the byte: the fields of struct ep_plan_info."""


class Fault(SimpleNamespace):
    """What ended a group: the fields of struct ep_fault, `status` as a name."""

    def __str__(self) -> str:
        return f"{self.status} at rank {self.reporter}, about rank {self.rank}: {self.message}"


class Stats(SimpleNamespace):
    """Sums since the group was created: the fields of struct ep_group_stats."""


class Counts(SimpleNamespace):
    """What arrived: `rows`, and the lists `rows_per_source` and `rows_per_expert`."""


class Needs(SimpleNamespace):
    """What was lacking: the fields of struct ep_needs."""


class Error(RuntimeError):
    """A call of libep failed. The text is libep's own sentence."""

    status: str = ""
    fault: Optional[Fault] = None


class ArgumentError(Error, ValueError):
    """An argument breaks its rule; nothing was done."""


class StateError(Error):
    """The right call at the wrong time."""


class CapacityError(Error):
    """More tokens or rows than there is room for. `needs`: how many, of a handle's dispatch."""

    needs: Optional[Needs] = None

    @property
    def rows_needed(self) -> Optional[int]:
        """Rows for the outputs, or else for the group."""
        return (self.needs.output_rows or self.needs.max_recv_rows or None) if self.needs else None


class OutOfMemoryError(Error, MemoryError):
    """Memory could not be had, or the plan exceeds its limit."""


class TimeoutError_(Error, TimeoutError):
    """A living peer was waited for until the deadline."""


class PeerError(Error, ConnectionError):
    """A peer's process died or left."""


class MismatchError(Error):
    """The ranks disagree about something they must agree on."""


class FaultedError(Error):
    """The group has faulted before: `fault` says what ended it."""


class UnsupportedError(Error, NotImplementedError):
    """Not on this machine, or not in this build."""


class SystemError_(Error, OSError):
    """The operating system refused something."""


class VersionError(Error):
    """A newer interface was asked for something that this library lacks."""


class InterruptedError_(Error):
    """Cancelled by abort()."""


class InternalError(Error):
    """A bug of libep."""


BY_STATUS: Dict[str, Type[Error]] = {
    "EP_ERR_ARG": ArgumentError, "EP_ERR_STATE": StateError, "EP_ERR_CAPACITY": CapacityError,
    "EP_ERR_NOMEM": OutOfMemoryError, "EP_ERR_TIMEOUT": TimeoutError_, "EP_ERR_PEER": PeerError,
    "EP_ERR_MISMATCH": MismatchError, "EP_ERR_FAULTED": FaultedError,
    "EP_ERR_UNSUPPORTED": UnsupportedError, "EP_ERR_SYSTEM": SystemError_,
    "EP_ERR_VERSION": VersionError, "EP_ERR_INTERRUPTED": InterruptedError_,
    "EP_ERR_INTERNAL": InternalError,
}
RECORDS: Dict[str, Type[SimpleNamespace]] = {"plan_info": Plan, "fault": Fault, "group_stats": Stats,
                                             "counts": Counts, "needs": Needs}


def make_error(status: str, message: str, about: Union[Fault, Needs, None]) -> Error:
    error = BY_STATUS.get(status, Error)(message)
    error.status = status
    if isinstance(error, CapacityError) and isinstance(about, Needs):
        error.needs = about
    elif isinstance(about, Fault):
        error.fault = about
    return error


def make_record(name: str, fields: Dict[str, Any]) -> SimpleNamespace:
    return RECORDS.get(name, SimpleNamespace)(**fields)
