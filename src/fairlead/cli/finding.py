"""What `fairlead doctor` finds."""

from collections.abc import Iterator
from enum import StrEnum

from msgspec import Struct


class State(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Works, with less than there could be."""
    PROBLEM = "problem"
    """What was asked for will not work."""


class Finding(Struct, frozen=True):
    area: str
    name: str
    state: State
    detail: str
    advice: str = ""
    """What to do about it."""


Findings = Iterator[Finding]
