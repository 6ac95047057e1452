"""The texts of a request, wherever they stand in it, and the request with others in their place."""

import re
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct, structs

from fairlead.core.errors import InvalidRequest, Unsupported
from fairlead.core.generation import Chat, Detokenize, Generate, Message, Paint, Prompt, Score, Tokenize
from fairlead.core.request import Raw, Request
from fairlead.core.tensors import Tensors, object_array

MAX_DEPTH = 64
MAX_BINARY_BYTES = 1 << 16
"""An element of a BYTES tensor that is longer and no UTF-8 is a picture or the like: not searched."""
TEXT_KEYS = (
    "messages",
    "prompt",
    "suffix",
    "input",
    "inputs",
    "instructions",
    "system",
    "tools",
    "query",
    "documents",
    "text_input",
    "chat_template_kwargs",
    "chat_template",
    "functions",
    "function_call",
    "response_format",
    "prediction",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "parameters",
    "metadata",
    "extra_body",
)
"""Where a body that goes on to another server has its texts."""
UNREADABLE_KEYS = frozenset(("prompt_embeds", "prompt_token_ids", "input_ids", "token_ids"))
"""Other ways to say a prompt, which some servers know."""
_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
        $defs $ref additionalProperties allOf annotations anyOf arguments audio cache_control call_id citations const content
        custom data datatype default definitions defs description detail documents encrypted_content enum examples
        exclusiveMaximum exclusiveMinimum file format function grammar guided_json id image_url input input_audio input_schema
        inputs is_error items json json_schema maxItems maxLength maxProperties maximum messages minItems minLength
        minProperties minimum model multipleOf name not oneOf output parameters pattern patternProperties phase prefixItems
        properties query reasoning reasoning_content refusal regex required result role schema shape signature source status
        strict summary syntax system text text_input thinking title tool_call_id tool_calls tool_use_id tools type url
        """,
    )
)
"""Names of fields that protocols and JSON Schema give: nobody says anything by them."""
_NUMBERS = frozenset((int, float, bool, type(None)))
_MEDIA_KEYS = frozenset(("image_url", "input_audio", "file"))
_NO_KEYS = frozenset[str]()
_ROLE = frozenset(("role",))
_MEDIA_TYPES = frozenset((*_MEDIA_KEYS, "input_image", "input_file"))
"""Of parts of messages, which have no text under those keys: a tool's parameters may be called so as well."""

Change = Callable[[str, str], str]
"""(text, role of who says it or "") → the text to put in its place, the same object where nothing changes."""


class Texts(Struct, frozen=True):
    """A walk through the texts of a request."""

    change: Change
    all: bool
    """Whether a request with a part that cannot be read must not pass."""

    def of(self, request: Request) -> Request:
        """The same object where nothing changed. Raises what `change` raises, InvalidRequest, Unsupported."""
        if request.raw is not None:
            raw = self._raw(request.raw)
            return request if raw is request.raw else structs.replace(request, raw=raw)
        if request.prompt is not None:
            prompt = self._prompt(request.prompt)
            return request if prompt is request.prompt else structs.replace(request, prompt=prompt)
        inputs, parameters = self._tensors(request.inputs), self._deep(request.parameters, "", 0)
        if inputs is request.inputs and parameters is request.parameters:
            return request
        return structs.replace(request, inputs=inputs, parameters=parameters)

    def _prompt(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, Detokenize):
            return prompt
        if isinstance(prompt, Paint):
            text, negative = self.change(prompt.text, ""), self.change(prompt.negative, "")
            same = text is prompt.text and negative is prompt.negative
            return prompt if same else structs.replace(prompt, text=text, negative=negative)
        if isinstance(prompt, Score):
            text, pair = self.change(prompt.text, ""), self.change(prompt.pair, "")
            same = text is prompt.text and pair is prompt.pair
            return prompt if same else structs.replace(prompt, text=text, pair=pair)
        if not isinstance(prompt, Tokenize) and prompt.token_ids is not None:
            self._unreadable("a prompt of token ids")
        if isinstance(prompt, (Generate, Tokenize)) and prompt.chat is not None:
            chat = self._chat(prompt.chat)
            return prompt if chat is prompt.chat else structs.replace(prompt, chat=chat)
        if prompt.text is None:
            return prompt
        text = self.change(prompt.text, "")
        return prompt if text is prompt.text else structs.replace(prompt, text=text)

    def _chat(self, chat: Chat) -> Chat:
        messages = [self._message(message) for message in chat.messages]
        tools = self._deep(chat.tools, "system", 0) if chat.tools else chat.tools
        arguments = self._deep(chat.template_kwargs, "system", 0) if chat.template_kwargs else chat.template_kwargs
        same = all(map(_is, messages, chat.messages))
        if same and tools is chat.tools and arguments is chat.template_kwargs:
            return chat
        return structs.replace(chat, messages=messages, tools=tools, template_kwargs=arguments)

    def _message(self, message: Message) -> Message:
        content = message.content if message.content is None else self.change(message.content, message.role)
        name = message.name if message.name is None else self.change(message.name, message.role)
        reasoning = message.reasoning if message.reasoning is None else self.change(message.reasoning, message.role)
        calls = message.tool_calls if message.tool_calls is None else self._deep(message.tool_calls, message.role, 0)
        if content is message.content and name is message.name and calls is message.tool_calls and reasoning is message.reasoning:
            return message
        return structs.replace(message, content=content, name=name, tool_calls=calls, reasoning=reasoning)

    def _tensors(self, tensors: Tensors) -> Tensors:
        changed = {name: self.elements(array) for name, array in tensors.items() if array.dtype.kind == "O"}
        if all(array is tensors[name] for name, array in changed.items()):
            return tensors
        return {**tensors, **changed}

    def elements(self, array: np.ndarray) -> np.ndarray:
        """Of a BYTES tensor."""
        before = array.reshape(-1).tolist()
        after = [self._element(element) for element in before]
        return array if all(map(_is, before, after)) else object_array(after, array.shape)

    def _element(self, element: bytes) -> bytes:
        try:
            text, encoding = element.decode(), "utf-8"
        except UnicodeDecodeError:
            if len(element) > MAX_BINARY_BYTES:
                return element
            text, encoding = element.decode("latin-1"), "latin-1"  # every byte a character, and back
        changed = self.change(text, "")
        return element if changed is text else changed.encode(encoding)

    def _raw(self, raw: Raw) -> Raw:
        head, rest = bytes(raw.body), b""
        if raw.header_length:
            size = int(raw.header_length) if raw.header_length.isdecimal() else -1
            if not 0 <= size <= len(head):
                raise InvalidRequest("Inference-Header-Content-Length is longer than the body")
            head, rest = head[:size], head[size:]
        body = parsed(head)
        if not isinstance(body, dict):
            raise InvalidRequest("the body must be a JSON object")
        for name in ("prompt", "input"):
            if _has_token_ids(body.get(name)):
                self._unreadable("a prompt of token ids")
        for name in UNREADABLE_KEYS & body.keys():
            self._unreadable(f"`{name}`")
        if rest and any(isinstance(each, dict) and each.get("datatype") == "BYTES" for each in _list(body.get("inputs"))):
            self._unreadable("a BYTES tensor in the binary form")
        changed = {name: self._deep(body[name], "", 0) for name in TEXT_KEYS if name in body}
        same = all(value is body[name] for name, value in changed.items())
        # of two fields with one name a parser may read either: then what was searched is what goes on
        if same and all(head.count(b'"%b"' % name.encode()) <= 1 for name in changed):
            return raw
        head = encoded({**body, **changed})
        return structs.replace(raw, body=head + rest, header_length=str(len(head)) if raw.header_length else "")

    def _deep(self, value: Any, role: str, depth: int) -> Any:
        """Every string within; names of fields too, which property names of a tool's parameters are."""
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} deep")
        if isinstance(value, str):
            return self.change(value, role)
        if isinstance(value, dict):
            own = value.get("role")
            role = own if isinstance(own, str) else role
            names = [name if name in _WORDS else self.change(name, role) for name in value]
            part = value.get("type")
            skipped = _MEDIA_KEYS if isinstance(part, str) and part in _MEDIA_TYPES else _NO_KEYS
            if isinstance(own, str):
                skipped = skipped | _ROLE
            parts = [each if name in skipped else self._deep(each, role, depth + 1) for name, each in value.items()]
            if all(map(_is, names, value)) and all(map(_is, parts, value.values())):
                return value
            if len(set(names)) < len(names):
                raise InvalidRequest("names of fields that a filter takes out leave two fields of one name")
            return dict(zip(names, parts, strict=True))
        if isinstance(value, (list, tuple)):
            if _NUMBERS.issuperset(map(type, value)):
                return value  # as long as tensors are
            items = [self._deep(each, role, depth + 1) for each in value]
            return value if all(map(_is, items, value)) else items
        return value

    def _unreadable(self, what: str) -> None:
        if self.all:
            raise Unsupported(f"{what} cannot be searched by the filters of this model: send text")


def parsed(body: bytes) -> Any:
    """Raises InvalidRequest."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is no JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} deep") from None


encoded = msgspec.json.encode


def _is(left: object, right: object) -> bool:
    return left is right


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _has_token_ids(value: Any) -> bool:
    """Alone, or among texts."""
    return isinstance(value, list) and any(isinstance(each, (int, float)) or _has_token_ids(each) for each in value)
