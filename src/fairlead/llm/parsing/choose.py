"""Which response template a model has: its own, one of ours that its chat template tells, or one that model.yaml names."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from fairlead.core.errors import LoadError
from fairlead.llm.parsing.template import FormatSpec, ResponseTemplate, template_of

FORMATS = ("harmony", "deepseek", "mistral-args", "mistral", "glm", "qwen3-xml", "llama3", "hermes", "think")
"""The files of `formats/`, in the order in which a chat template is compared with them."""
_FOLDER = Path(__file__).parent / "formats"


@cache
def shipped(name: str) -> tuple[ResponseTemplate, FormatSpec]:
    """One of FORMATS."""
    data = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return template_of(name, data), msgspec.convert(data, FormatSpec)


def choose_template(wanted: str, folder: Path, own: Any, chat_templates: Sequence[str]) -> tuple[ResponseTemplate | None, str]:
    """The template, and why, in words; None: answers are text.

    `wanted`: `llm.response_template`; `own`: what tokenizer_config.json has under that name. Raises LoadError.
    """
    if wanted == "off":
        return None, "off, as `llm.response_template` says: answers are text"
    if wanted in FORMATS:
        return shipped(wanted)[0], f"{wanted}, as `llm.response_template` says"
    if wanted != "auto":
        return _read(wanted, folder), f"{wanted}, as `llm.response_template` says"
    trouble = ""
    if own is not None:
        try:
            return template_of("the tokenizer's own", own), "the tokenizer's own"
        except ValueError as error:
            trouble = f" (the tokenizer's own cannot be used: {error})"
    for name in FORMATS:
        template, spec = shipped(name)
        if any(all(mark in text for mark in marks) for text in chat_templates for marks in spec.found_by):
            return template, f"{name}, which the chat template tells{trouble}"
    return None, f"none: no known format in the chat template, so that answers are text{trouble}"


def _read(wanted: str, folder: Path) -> ResponseTemplate:
    path = folder / wanted
    try:
        return template_of(wanted, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        names = ", ".join(FORMATS)
        raise LoadError(
            f"`llm.response_template: {wanted}` is neither auto, off nor one of {names}, and {path} is no file in the model's folder"
        ) from None
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} is no response template: {error}") from error
