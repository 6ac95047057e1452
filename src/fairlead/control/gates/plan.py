"""What a validation is about: the version on trial, and the champion it is held against."""

from typing import Literal

from msgspec import Struct

from fairlead.control.checks import Checks
from fairlead.core.specs import ModelSpec, TensorSpec


class Signature(Struct, frozen=True, kw_only=True):
    """What callers of a version rely on. As JSON it is the `signature` of its row in the registry."""

    platform: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    streams: bool = False
    batches: bool = True
    tasks: tuple[str, ...] = ()
    """Of an engine: generate, embed, tokenize, paint."""
    has_chat_template: bool = False
    embedding_size: int = 0
    max_model_len: int = 0


class Subject(Struct, frozen=True, kw_only=True):
    """A version that can be loaded."""

    spec: ModelSpec
    """With its name."""
    folder: str
    """Its own files on this machine, or its one bare artefact."""
    version: str = "1"


class Plan(Struct, frozen=True, kw_only=True):
    candidate: Subject
    checks: Checks = Checks()
    champion: Subject | None = None
    """Loaded beside the candidate where something is compared with it."""
    signature: Signature | None = None
    """The champion's, where it is known; else it is learned from `champion`."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Of the scratch process."""
