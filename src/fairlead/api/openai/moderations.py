"""`/v1/moderations`: what comes in, and a classifier's probabilities as OpenAI's answer.

The categories are the labels of the model that answers, no more: of what it was not trained to see nothing is said.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from fairlead.api.openai.errors import BadParameter

DEFAULT_MODEL = "moderation"
"""Of a request that names none."""
THRESHOLD = 0.5
"""From which on a text is flagged."""
MAX_INPUTS = 128
"""Texts in one request."""


class InputPart(Struct, kw_only=True, forbid_unknown_fields=True):
    type: str
    text: str | None = None
    image_url: Any = None


class ModerationBody(Struct, kw_only=True, forbid_unknown_fields=True):
    prompt_parameter: ClassVar[str] = "input"

    input: str | Annotated[list[str | InputPart], Meta(max_length=MAX_INPUTS)]
    model: str | None = None

    def texts(self) -> list[str]:
        """One for each result. The parts of a message are one text. Raises BadParameter."""
        if isinstance(self.input, str):
            return [self.input]
        if not self.input:
            raise BadParameter("Invalid 'input': empty array. Expected an array with minimum length 1.", "input", "empty_array")
        texts = [each for each in self.input if isinstance(each, str)]
        parts = [each for each in self.input if isinstance(each, InputPart)]
        if texts and parts:
            raise BadParameter("Invalid 'input': expected a string, an array of strings, or an array of objects.", "input", "invalid_type")
        for number, part in enumerate(parts):
            if part.type != "text" or part.text is None:
                where = f"input[{number}].type"
                raise BadParameter(f"Invalid value for '{where}': this model reads text only, not {part.type!r}.", where, "invalid_value")
        return texts or ["\n".join(part.text or "" for part in parts)]


class ModerationResult(Struct):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]


class Moderations(Struct):
    id: str
    model: str
    results: list[ModerationResult]


def moderations(model: str, probabilities: Sequence[Mapping[str, float]]) -> Moderations:
    """From a classifier's probabilities of each of its labels, for each text."""
    return Moderations(id=f"modr-{uuid.uuid4().hex}", model=model, results=[_result(each) for each in probabilities])


def _result(probabilities: Mapping[str, float]) -> ModerationResult:
    categories = {label: probability >= THRESHOLD for label, probability in probabilities.items()}
    applied: dict[str, list[Literal["text"]]] = {label: ["text"] for label in probabilities}
    return ModerationResult(any(categories.values()), categories, dict(probabilities), applied)
