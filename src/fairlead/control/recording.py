"""Golden examples from live traffic: what was asked and what was answered, without who asked and without what is private."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct, structs

from fairlead.control.checks import Golden, Question, Tensor, tensor_of
from fairlead.control.gates.asking import answer_of, finite
from fairlead.core.generation import Embed, Generate, Message
from fairlead.core.request import Request, Response
from fairlead.core.tensors import Tensors, nbytes_of

Redact = Callable[[str], str]
"""The same text without what is private."""


Positive = Annotated[int, Meta(ge=1)]
MAX_TENSOR_BYTES = 1 << 20
"""Of one request or answer: larger ones would hold up who offers them, and fill the file."""


class RecordingRules(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    every: Positive = 1
    """Each so-manieth of the requests that are offered."""
    max_examples: Positive = 100
    max_bytes: Positive = 16 << 20
    """Of all examples together, as JSON."""


class Skipped(Struct):
    """Requests that were looked at and did not become an example, by reason."""

    unsuitable: int = 0
    """Pictures, tools, several choices, token ids, answers with NaN, bytes that are no text: no golden example can say them."""
    repeated: int = 0
    private: int = 0
    """Their answer held what is private."""
    too_large: int = 0


class Recording:
    """Takes (request, responses) until it is full. `offer` only reads, and keeps copies.

    A question that is changed by redaction, or that was sampled by chance, has no answer that is known:
    it waits in `unanswered` until the champion was asked, once more, what `question` is now.
    """

    def __init__(self, rules: RecordingRules, redact: Redact) -> None:
        self.rules = rules
        self.examples: list[Golden] = []
        self.unanswered: list[Question] = []
        self.skipped = Skipped()
        self.num_bytes = 0
        self._redact = redact
        self._num_offered = 0
        self._seen: set[bytes] = set()

    @property
    def full(self) -> bool:
        return len(self.examples) + len(self.unanswered) >= self.rules.max_examples or self.num_bytes >= self.rules.max_bytes

    def offer(self, request: Request, responses: Sequence[Response]) -> None:
        """A request that was answered well."""
        self._num_offered += 1
        if self.full or (self._num_offered - 1) % self.rules.every:
            return
        if nbytes_of_all(request.inputs) > MAX_TENSOR_BYTES or any(nbytes_of_all(each.outputs) > MAX_TENSOR_BYTES for each in responses):
            self.skipped.too_large += 1
            return
        question = question_of(request)
        if question is None:
            self.skipped.unsuitable += 1
            return
        plain = redacted(question, self._redact)
        digest = hashlib.sha256(msgspec.json.encode(plain)).digest()
        if digest in self._seen:
            self.skipped.repeated += 1
            return
        if plain != question or not _repeatable(request):
            if self._fits(plain):
                self._seen.add(digest)
                self.unanswered.append(plain)
            return
        if self.answer(plain, responses):
            self._seen.add(digest)

    def answer(self, question: Question, responses: Sequence[Response]) -> bool:
        """Keep a question with its answer; of one that waited for it, too."""
        if question in self.unanswered:
            self.unanswered.remove(question)
            self.num_bytes -= len(msgspec.json.encode(question))
        example = example_of(question, responses)
        if example is None:
            self.skipped.unsuitable += 1
            return False
        if _answer_redacted(example, self._redact) != example:
            self.skipped.private += 1
            return False
        if self._fits(example):
            self.examples.append(example)
            return True
        return False

    def _fits(self, what: Question) -> bool:
        size = len(msgspec.json.encode(what))
        if self.num_bytes + size > self.rules.max_bytes:
            self.skipped.too_large += 1
            return False
        self.num_bytes += size
        return True


def nbytes_of_all(tensors: Tensors) -> int:
    return sum(nbytes_of(array) for array in tensors.values())


def question_of(request: Request) -> Question | None:
    """What was asked, without caller, tenant, session and ids; None where a golden example has no words for it."""
    prompt = request.prompt
    try:
        if prompt is None:
            if not request.inputs:
                return None
            inputs = tuple(tensor_of(name, array) for name, array in request.inputs.items())
            return Question(inputs=inputs, parameters=dict(request.parameters))
        if isinstance(prompt, Embed):
            return Question(embed=prompt.text) if prompt.text is not None and prompt.dimensions is None else None
        if not isinstance(prompt, Generate) or prompt.sampling.n > 1 or not prompt.add_special_tokens:
            return None
        if prompt.guide is not None or prompt.adapter:
            return None
        sampling = structs.replace(prompt.sampling, temperature=0.0, seed=None, logprobs=None, prompt_logprobs=None)
        if prompt.text is not None:
            return Question(prompt=prompt.text, sampling=sampling)
        chat = prompt.chat
        if (
            chat is None
            or chat.tools
            or chat.template_kwargs
            or chat.reasoning_effort
            or chat.continue_final_message
            or not chat.add_generation_prompt
        ):
            return None
        if any(message.tool_calls for message in chat.messages):
            return None
        return Question(chat=tuple(chat.messages), sampling=sampling)
    except ValueError:  # bytes that are no text
        return None


def example_of(question: Question, responses: Sequence[Response]) -> Golden | None:
    """None where the answer is none that can be compared later."""
    answer = answer_of(responses)
    fields = {name: getattr(question, name) for name in Question.__struct_fields__}
    try:
        if question.inputs:
            if not answer.outputs or not all(finite(array) for array in answer.outputs.values()):
                return None
            return Golden(**fields, outputs=tuple(tensor_of(name, array) for name, array in answer.outputs.items()))
        if question.embed is not None:
            if answer.vector is None or not finite(answer.vector):
                return None
            return Golden(**fields, vector=tuple(answer.vector.tolist()))
        return Golden(**fields, text=answer.text) if answer.text else None
    except ValueError:
        return None


def redacted(question: Question, redact: Redact) -> Question:
    """Every text of it."""
    return structs.replace(
        question,
        inputs=_tensors_redacted(question.inputs, redact),
        parameters={name: redact(value) if isinstance(value, str) else value for name, value in question.parameters.items()},
        chat=tuple(_message_redacted(message, redact) for message in question.chat),
        prompt=None if question.prompt is None else redact(question.prompt),
        embed=None if question.embed is None else redact(question.embed),
    )


def _answer_redacted(example: Golden, redact: Redact) -> Golden:
    return structs.replace(
        example, outputs=_tensors_redacted(example.outputs, redact), text=None if example.text is None else redact(example.text)
    )


def _tensors_redacted(tensors: tuple[Tensor, ...], redact: Redact) -> tuple[Tensor, ...]:
    return tuple(structs.replace(each, data=[redact(text) for text in each.data]) if each.datatype == "BYTES" else each for each in tensors)


def _message_redacted(message: Message, redact: Redact) -> Message:
    """A participant's name tells nothing that a model needs."""
    return structs.replace(message, name=None, content=None if message.content is None else redact(message.content))


def _repeatable(request: Request) -> bool:
    """Whether the same question gets the same answer: what was sampled by chance does not."""
    prompt = request.prompt
    return not isinstance(prompt, Generate) or prompt.sampling.greedy
