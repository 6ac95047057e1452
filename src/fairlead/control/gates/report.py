"""What came of a validation."""

from enum import StrEnum
from typing import Any

from msgspec import Struct, field

from fairlead.control.gates.plan import Signature


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    """The version is at fault."""
    SKIPPED = "skipped"
    """It was not asked for, or could not be asked any more."""
    ERROR = "error"
    """It could not be found out: the checks, the champion or this machine are at fault. Never taken for passed."""


GATES = ("load", "warm_up", "schema", "golden", "sanity", "safety", "memory", "accuracy", "latency")
"""In this order: what needs the champion beside the candidate comes after what measures the candidate's memory."""


class GateResult(Struct, frozen=True, kw_only=True):
    gate: str
    outcome: Outcome
    message: str
    """One sentence."""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers and examples, JSON-able."""


def not_asked(gates: tuple[str, ...], last: GateResult) -> list[GateResult]:
    """What `last` made impossible."""
    return [GateResult(gate=gate, outcome=Outcome.SKIPPED, message=f"`{last.gate}` ended the validation") for gate in gates]


class Report(Struct, frozen=True, kw_only=True):
    model: str
    version: str
    gates: tuple[GateResult, ...]
    """All of GATES, in order."""
    signature: Signature | None = None
    """None where it did not load."""
    began: float = 0.0
    """Seconds since 1970."""
    seconds: float = 0.0
    log: str = ""
    """The end of what the version's processes wrote."""

    @classmethod
    def not_loaded(cls, model: str, version: str, why: str, now: float) -> "Report":
        """Of a version whose files cannot be had, or may not be loaded."""
        first = GateResult(gate=GATES[0], outcome=Outcome.FAILED, message=why)
        return cls(model=model, version=version, gates=(first, *not_asked(GATES[1:], first)), began=now)

    @property
    def ok(self) -> bool:
        return all(gate.outcome in (Outcome.PASSED, Outcome.SKIPPED) for gate in self.gates) and self.signature is not None

    @property
    def reason(self) -> str:
        """Why not, one sentence; "" where all is well. What the version is at fault for comes first."""
        wrong = [gate for outcome in (Outcome.FAILED, Outcome.ERROR) for gate in self.gates if gate.outcome is outcome]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return f"{wrong[0].gate}: {wrong[0].message}{more}" if wrong else ""


class Verdict(Struct, frozen=True):
    """What one gate found."""

    outcome: Outcome
    message: str
    details: dict[str, Any] = field(default_factory=dict)


def passed(message: str, **details: Any) -> Verdict:
    return Verdict(Outcome.PASSED, message, details)


def failed(message: str, **details: Any) -> Verdict:
    return Verdict(Outcome.FAILED, message, details)


def skipped(message: str, **details: Any) -> Verdict:
    return Verdict(Outcome.SKIPPED, message, details)


def unknown(message: str, **details: Any) -> Verdict:
    """An error that is not the version's."""
    return Verdict(Outcome.ERROR, message, details)
