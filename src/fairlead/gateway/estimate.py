"""How much a request will take, before it is known."""

from typing import NamedTuple

import msgspec

from fairlead.core.generation import Chat, Detokenize, Embed, Generate, Paint, Score, Tokenize, Usage
from fairlead.core.request import Request
from fairlead.core.tensors import nbytes_of
from fairlead.gateway.reuse.keys import CHOOSES

CHARS_PER_TOKEN = 4.0
"""Of a prompt in most tokenizers' English; the truth corrects it when the answer is there."""
PICTURE_SIZE, PICTURE_STEPS = 512, 30
"""Of pictures that leave it to the model: what it does tells."""
TOKENS_PER_MESSAGE = 4
"""What a chat template adds to each turn."""


class Work(NamedTuple):
    usage: Usage | None
    """None for tensors."""
    rows: int


def estimate(request: Request, default_output_tokens: int, *, batches: bool = True) -> Work:
    """From what the request says: the length of its texts and the most that it may be answered, or its rows.

    `batches`: the model's tensors have a batch dimension.
    """
    raw, prompt = request.raw, request.prompt
    if isinstance(prompt, Generate):
        sampling = prompt.sampling
        wanted = default_output_tokens if sampling.max_tokens is None else sampling.max_tokens
        return Work(Usage(prompt_tokens=_tokens(prompt.text, prompt.token_ids, prompt.chat), completion_tokens=wanted * sampling.n), 0)
    if isinstance(prompt, Embed):
        return Work(Usage(prompt_tokens=_tokens(prompt.text, prompt.token_ids, None)), 0)
    if isinstance(prompt, Score):
        return Work(Usage(prompt_tokens=_tokens_of(len(prompt.text) + len(prompt.pair))), 0)
    if isinstance(prompt, Paint):
        n, width, height = prompt.n, prompt.width or PICTURE_SIZE, prompt.height or PICTURE_SIZE
        return Work(Usage(megapixels=n * width * height / 1e6, num_pictures=n, num_steps=n * (prompt.num_steps or PICTURE_STEPS)), 0)
    if prompt is not None:
        return Work(Usage(), 0)
    if raw is None:
        array = next(iter(request.inputs.values()), None)
        return Work(None, array.shape[0] if batches and array is not None and array.ndim else 1)
    if not raw.path.startswith("/v1/"):
        return Work(None, raw.num_rows)
    wanted = 0
    if raw.path in CHOOSES:
        wanted = default_output_tokens if raw.max_tokens is None else raw.max_tokens
    return Work(Usage(prompt_tokens=_tokens_of(raw.prompt_chars), completion_tokens=wanted * raw.num_choices), 0)


def _tokens(text: str | None, token_ids: list[int] | None, chat: Chat | None) -> int:
    if token_ids is not None:
        return len(token_ids)
    if chat is not None:
        return _tokens_of(_chat_chars(chat)) + TOKENS_PER_MESSAGE * len(chat.messages)
    return _tokens_of(len(text or ""))


def _tokens_of(num_chars: int) -> int:
    return int(num_chars / CHARS_PER_TOKEN) + 1


def _chat_chars(chat: Chat) -> int:
    """Of its messages, and of its tools as JSON."""
    told = sum(len(message.content or "") + len(message.reasoning or "") for message in chat.messages)
    called = [message.tool_calls for message in chat.messages if message.tool_calls]
    return told + (len(msgspec.json.encode((called, chat.tools))) if called or chat.tools else 0)


def num_chars(request: Request) -> int:
    """Of its texts, about; of tensors, their bytes."""
    prompt = request.prompt
    if request.raw is not None:
        return len(request.raw.body)
    if prompt is None:
        return sum(nbytes_of(array) for array in request.inputs.values() if array.dtype.kind == "O")
    if isinstance(prompt, (Generate, Tokenize)) and prompt.chat is not None:
        return _chat_chars(prompt.chat)
    if isinstance(prompt, Paint):
        return len(prompt.text) + len(prompt.negative)
    if isinstance(prompt, Score):
        return len(prompt.text) + len(prompt.pair)
    return 0 if isinstance(prompt, Detokenize) else len(prompt.text or "")
