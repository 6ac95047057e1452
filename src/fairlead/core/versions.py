"""Words of the registry: how a version is named, and the stages of its life."""

import re
from enum import StrEnum

from msgspec import Struct

from fairlead.core.errors import InvalidRequest

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ALIAS_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
CHAMPION = "champion"
"""The alias of the version that serves: moved by control alone."""
CHALLENGER = "challenger"
"""The alias of the version that a rollout tries: moved by control alone."""


class Stage(StrEnum):
    STAGED = "staged"
    """Its artefacts are kept; nothing is known of it yet."""
    VALIDATED = "validated"
    """It passed its gates: it may get traffic."""
    SERVING = "serving"
    """It is a deployment's champion."""
    RETIRED = "retired"
    """It will not serve again; its artefacts may be deleted."""
    REJECTED = "rejected"
    """A gate or a rollout found it worse. Validated once more it may come back."""


MOVES: dict[Stage, frozenset[Stage]] = {
    Stage.STAGED: frozenset((Stage.VALIDATED, Stage.REJECTED, Stage.RETIRED)),
    Stage.VALIDATED: frozenset((Stage.SERVING, Stage.VALIDATED, Stage.REJECTED, Stage.RETIRED)),
    Stage.SERVING: frozenset((Stage.SERVING, Stage.VALIDATED, Stage.REJECTED)),
    Stage.REJECTED: frozenset((Stage.VALIDATED, Stage.REJECTED, Stage.RETIRED)),
    Stage.RETIRED: frozenset(),
}
"""Where each stage may go. A champion that is replaced is validated again, so that it can come back."""


class Ref(Struct, frozen=True):
    """`fraud`, `fraud@7` or `fraud@champion`, as it was written."""

    model: str
    version: int = 0
    """0: none was named."""
    alias: str = ""

    def __str__(self) -> str:
        end = str(self.version) if self.version else self.alias
        return f"{self.model}@{end}" if end else self.model


def parse_ref(text: str) -> Ref:
    """Raises InvalidRequest."""
    model, at, end = text.partition("@")
    check_model_name(model)
    if not at:
        return Ref(model)
    if end.isascii() and end.isdigit() and len(end) < 10 and int(end) > 0:
        return Ref(model, version=int(end))
    if ALIAS_NAME.fullmatch(end):
        return Ref(model, alias=end)
    raise InvalidRequest(f"{text!r} names no version: write {model}@7 or {model}@champion")


def check_model_name(name: str) -> str:
    """Raises InvalidRequest."""
    if not MODEL_NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no model's name: letters, digits, `.`, `_` and `-`, at most 128, the first a letter or a digit")
    return name
