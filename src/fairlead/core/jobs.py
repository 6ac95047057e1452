"""Words of jobs: stored requests that are answered later.

| status | means |
|---|---|
| queued | waits for a runner, or for its next try |
| active | a runner has leased it |
| aborting | its cancellation was asked for while it was active |
| aborted | cancelled, or its deadline passed before it started (`reason: expired`) |
| failed | it ended without a result: `reason` says why |
| complete | its result is there |

Names as in saq. `reason` of what ended otherwise than well is one of REASONS.
"""

from enum import StrEnum
from typing import Any, Literal

from msgspec import Struct

from fairlead.core.generation import Delta, Mode, Usage


class JobStatus(StrEnum):
    QUEUED = "queued"
    ACTIVE = "active"
    ABORTING = "aborting"
    ABORTED = "aborted"
    FAILED = "failed"
    COMPLETE = "complete"


ENDED = frozenset({JobStatus.ABORTED, JobStatus.FAILED, JobStatus.COMPLETE})
RUNNING = frozenset({JobStatus.ACTIVE, JobStatus.ABORTING})

JobReason = Literal[
    "",
    "cancelled",
    "expired",  # its start deadline passed: aborted, nothing was computed
    "timeout",  # its total deadline passed: failed
    "moderated-input",  # a filter blocks what it asks: failed, not billed
    "moderated-output",  # ... or its result: failed, not billed
    "invalid",  # the model refuses it: failed at once
    "forbidden",  # its key was revoked or its tenant disabled meanwhile
    "model-error",
    "replica-died",
    "unavailable",  # the model could not be reached until the tries were used up
    "storage",  # the artifact store could not take its result
]


class Artifact(Struct, frozen=True, kw_only=True):
    """A file that a job made, as its result names it."""

    key: str
    """Where it lies in the artifact store: unguessable."""
    content_type: str
    num_bytes: int
    sha256: str
    """In hex."""
    width: int = 0
    height: int = 0
    seed: int | None = None
    mode: Mode = "exact"


class PackedTensor(Struct, frozen=True, array_like=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes
    """Little-endian, row by row; BYTES as KServe writes them."""


class JobResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a complete job gives: of pictures their files, of texts and vectors the choices, of tensors the outputs, of another server's
    model its answer."""

    artifacts: tuple[Artifact, ...] = ()
    choices: tuple[Delta, ...] = ()
    """One whole Delta for each choice."""
    outputs: tuple[PackedTensor, ...] = ()
    raw: bytes = b""
    parameters: dict[str, Any] = {}
    usage: Usage | None = None
    version: str = ""
    """Of the model that answered."""
