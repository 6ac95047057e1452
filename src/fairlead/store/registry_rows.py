"""What the store keeps of models' versions and of rollouts, one frozen Struct for a row of each table. Times are seconds since 1970 (UTC)."""

from enum import StrEnum
from typing import Any

from msgspec import Struct

from fairlead.core.versions import Stage


class ModelRow(Struct, frozen=True, kw_only=True):
    name: str
    created: float
    description: str = ""
    tags: dict[str, str] = {}
    checks: dict[str, Any] = {}
    """What its versions' gates ask."""
    next_version: int = 1
    """Numbers below were given, and are never given again."""


class VersionRow(Struct, frozen=True, kw_only=True):
    """One version. What it is (digest, spec, files) never changes; what is known of it does."""

    model: str
    number: int = 0
    """0: the next one, of a row that is to be added."""
    digest: str
    """SHA-256 of spec and files, in hex: a model has the same content once."""
    spec: str
    """As in `model.yaml`."""
    files: dict[str, tuple[int, str]]
    """Path within the folder → bytes, SHA-256 in hex."""
    location: str
    """URL of the folder that holds the files."""
    bytes: int
    """Of all the files."""
    backend: str = ""
    signature: dict[str, Any] = {}
    """Inputs and outputs of the completed spec; {}: not validated yet."""
    stage: Stage = Stage.STAGED
    reason: str = ""
    """Why it is in this stage."""
    provenance: dict[str, Any] = {}
    """Who, source, git_commit, parent, metrics, licence, framework, ..."""
    tags: dict[str, str] = {}
    signed_by: str = ""
    """The name of the key; "": nobody signed it."""
    signature_text: str = ""
    """Ed25519, in base64."""
    created: float
    moved: float = 0.0
    """When it came to its stage; of one that is to be added, when it is."""

    @property
    def ref(self) -> str:
        """`fraud@7`."""
        return f"{self.model}@{self.number}"


class Move(Struct, frozen=True):
    """A version's change of stage."""

    model: str
    number: int
    stage: Stage
    reason: str = ""


class AliasRow(Struct, frozen=True, kw_only=True):
    model: str
    alias: str
    number: int
    updated: float
    actor: str


class GateOutcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Not asked for."""
    ERROR = "error"
    """It did not come to an end."""


class GateRow(Struct, frozen=True, kw_only=True):
    """What one gate of one validation run said."""

    model: str
    number: int
    run: str
    gate: str
    outcome: GateOutcome
    seconds: float
    details: dict[str, Any] = {}
    time: float
    id: int = 0
    """Given by the store."""


class DeploymentRow(Struct, frozen=True, kw_only=True):
    """What is wanted of a model."""

    model: str
    state: dict[str, Any]
    """Control's own; the store does not look into it."""
    versions: tuple[int, ...] = ()
    """Those that it names: they are neither retired nor deleted meanwhile."""
    revision: int = 0
    """Grows with every change. Of a row that is to be put: that of the row it replaces, 0 where there is none."""
    updated: float
    actor: str
    reason: str = ""


class RolloutRow(Struct, frozen=True, kw_only=True):
    id: str
    model: str
    """The one that it was started for, of several."""
    status: str
    state: str
    """JSON, control's own."""
    created: float
    updated: float
    ended: float | None = None
    revision: int = 0
    """Grows with every change. Of a row that is to be saved: that of the row it replaces."""


class LeaseRow(Struct, frozen=True, kw_only=True):
    name: str
    holder: str
    until: float


class ServerRow(Struct, frozen=True, kw_only=True):
    id: str
    seen: float
    """When it last told."""
    state: dict[str, Any]
    """Model → version → state, reason, restarts."""


class WindowRow(Struct, frozen=True, kw_only=True):
    server: str
    model: str
    time: float
    data: bytes
    """Control's own."""
    id: int = 0
    """Given by the store."""


class ExposureRow(Struct, frozen=True, kw_only=True, gc=False):
    """Which version answered a request of a rollout that waits for feedback."""

    request_id: str
    model: str
    version: str
    rollout: str
    time: float


class Taken(StrEnum):
    """What became of one piece of feedback."""

    TAKEN = "taken"
    SAME = "same"
    """It was posted before, with this value."""
    CONFLICT = "conflict"
    """It was posted before, with another value, which stays."""
    UNKNOWN = "unknown"
    """No rollout knows the request."""


class FeedbackRow(Struct, frozen=True, kw_only=True):
    request_id: str
    name: str
    value: float
    time: float
    model: str
    version: str
    rollout: str
    actor: str
    id: int = 0
    """Given by the store: the newest is the greatest."""


class FeedbackSum(Struct, frozen=True, kw_only=True):
    """All feedback of one name to one version in a rollout."""

    model: str
    version: str
    name: str
    num: int
    sum: float
    squares: float
    """Sum of the squares."""
