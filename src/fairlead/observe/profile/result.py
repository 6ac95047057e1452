"""What looking at a model for some seconds has found."""

from typing import Literal

from msgspec import Struct

from fairlead.observe.profile.kernels import Kernel
from fairlead.observe.profile.layers import Answer
from fairlead.observe.profile.memory import MemoryPoint
from fairlead.observe.profile.stacks import Hot

Kind = Literal["cpu", "torch", "memory"]
KINDS: tuple[Kind, ...] = ("cpu", "torch", "memory")


class ProcessProfile(Struct):
    pid: int
    name: str
    """`server`, `replica 0`, ..."""
    sampler: Literal["py-spy", "in-process", ""] = ""
    """Who took its stacks; "" for nobody."""
    num_samples: int = 0
    gil_share: float | None = None
    """Of the time in which one of its threads held the interpreter's lock; null where that is not known."""
    top: list[Hot] = []
    stacks: str = ""
    """Collapsed, as flame graphs are made of."""
    memory: list[MemoryPoint] = []
    device_memory: dict[str, int] = {}
    kernels: list[Kernel] = []
    kernel_seconds: float = 0.0
    """How long torch recorded."""
    trace: bytes = b""
    """Chrome's trace format, compressed by gzip; base64 in JSON."""


class Profile(Struct):
    model: str
    version: str
    began: float
    """Seconds since 1970."""
    seconds: float
    kinds: list[Kind]
    answer: Answer
    processes: list[ProcessProfile]
    notes: list[str]
    """What could not be had, and why."""
