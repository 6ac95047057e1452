"""What credentials prove: a subject; or why they prove nothing."""

from typing import TypeGuard

from msgspec import Struct

from fairlead.core.errors import Unauthenticated
from fairlead.core.policy import Scope

INVALID = "the key, token or certificate that was shown is not valid"
"""One text for unknown, revoked, expired and forged ones: who guesses learns nothing."""

MAX_NAME_CHARS = 255


class Refused(Unauthenticated):
    """`kind` is for the operator's metrics, never for the caller."""

    def __init__(self, kind: str, message: str = INVALID) -> None:
        super().__init__(message)
        self.kind = kind


class Subject(Struct, frozen=True, kw_only=True, eq=False):
    """Who a token or a certificate speaks for, before the tenant's policy is known."""

    tenant: str
    project: str = "default"
    key: str
    """The subject of the token, the common name of the certificate."""
    qos_class: str | None = None
    """None: its tenant's."""
    scopes: frozenset[Scope] = frozenset({Scope.INFER})
    expires: float
    """Seconds since 1970, the leeway included."""


def is_name(text: object) -> TypeGuard[str]:
    """Whether it can name a tenant, project or key: it will stand in logs, metrics and file names of others."""
    return isinstance(text, str) and 0 < len(text) <= MAX_NAME_CHARS and text.isprintable() and text == text.strip()
