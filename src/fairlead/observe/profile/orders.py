"""What the gateway asks of a replica process that is looked at, and what it answers."""

from typing import Annotated

from msgspec import Meta, Struct


class ProfileOrder(Struct, omit_defaults=True):
    seconds: Annotated[float, Meta(gt=0, le=120)]
    stacks: bool = False
    """Take them in the process itself: nobody else may."""
    torch_seconds: float = 0.0
    """Of these, how long torch records its operators; 0: not at all."""
    shapes: bool = False
    """Those of the operators' inputs, too."""
    allocations: bool = False
    """What operators allocate."""
    folder: str = ""
    """For files that are too large for an answer."""


class ReplicaProfile(Struct, omit_defaults=True):
    stacks: str = ""
    """Collapsed: `thread;function;function 12`, a line each."""
    num_samples: int = 0
    trace: str = ""
    """Name of a file in Chrome's trace format."""
    trace_seconds: float = 0.0
    device_memory: dict[str, int] = {}
    """What torch tells of its device's memory."""
    notes: list[str] = []
    """What could not be had, and why."""
