"""Text to token ids and back, and a chat to text, equal to what transformers' AutoTokenizer makes of a tokenizer.json.

It stands on the `tokenizers` library alone: transformers takes seconds to import.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fairlead.core.errors import InvalidRequest, LoadError
from fairlead.core.generation import Chat, Message

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""What a chat template is always told: not for `template_kwargs`."""
SWITCHES = ("enable_thinking", "thinking")
"""By which templates without degrees of reasoning are told whether the model shall reason."""
SHORT_IDS = "alphanumeric strings with length 9"
"""What templates say that refuse calls with other ids (Mistral's)."""
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where the final message ends in the rendered chat; transformers' own."""

Spelling = Literal["bytes", "byte_fallback", "other"]
"""How the vocabulary spells text: GPT-2's letters for bytes; sentencepiece's, with a token for each byte beside them; or
something that only the library's decoder knows (WordPiece, suffixes)."""


class Tokenizer:
    """The tokenizer of one checkpoint. Safe to use from several threads."""

    def __init__(self, backend: Backend, *, source: str = "tokenizer.json", templates: "ChatTemplates | None" = None) -> None:
        """`source`: the file it came from, for messages."""
        self.backend = backend
        self.source = source
        self.templates = templates
        self.response_template: Any = None
        """As tokenizer_config.json has it."""
        self.special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """The largest id and one."""
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.spelling, self.strips_first_space = _spelling(backend)
        self.byte_ids = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)} if self.spelling == "byte_fallback" else {}
        self.byte_ids.pop(None, None)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path | str, chat_template: str = "") -> "Tokenizer":
        """Read tokenizer.json and what stands beside it.

        `chat_template`: a file in `folder` to use in place of the checkpoint's own template.
        Raises LoadError, which names the file.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        backend = _read_backend(path)
        config = _read_json(folder / "tokenizer_config.json")
        named = _named_tokens(folder, config)
        _add_tokens(backend, folder, config, named)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        tokenizer = cls(backend, source=str(path), templates=_read_templates(folder, config, named, chat_template))
        tokenizer.response_template = config.get("response_template")
        tokenizer.bos_id = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
        tokenizer.eos_id = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        return tokenizer

    def check_fits(self, vocab_size: int, weights: str = "config.json") -> None:
        """Raises LoadError where a token has an id that the model has no embedding for."""
        if self.vocab_size > vocab_size:
            raise LoadError(
                f"{self.source} has token ids up to {self.vocab_size - 1} ({self.backend.id_to_token(self.vocab_size - 1)!r}), "
                f"but the model has only {vocab_size} embedding rows (`vocab_size` in {weights}): they are not of one checkpoint"
            )

    def vocabulary(self) -> dict[str, int]:
        """Every token as it is spelled, and its id."""
        return self.backend.get_vocab(with_added_tokens=True)

    # Encode

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`add_special_tokens`: those that tokenizer.json's post-processor puts first and last; what tokenizer_config.json says
        of them (`add_bos_token`) does not count, as in transformers 5."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pair(self, text: str, pair: str, limit: int | None = None) -> tuple[list[int], list[int]]:
        """(ids, type of each) of two texts in one row. `limit`: tokens at most; the longer text is cut first, at its end, until both are
        of one length. Raises InvalidRequest for a limit that leaves nothing of them."""
        both = self.backend.encode(text, pair)
        if limit is None or len(both) <= limit:
            return both.ids, both.type_ids
        room = limit - self.backend.num_special_tokens_to_add(True)
        if room < 1:
            raise InvalidRequest(f"`truncate_prompt_tokens` is {limit}: it must leave room for more than the special tokens")
        first, second = (self.backend.encode(each, add_special_tokens=False) for each in (text, pair))
        for encoding, length in zip((first, second), cut_lengths(len(first), len(second), room), strict=True):
            encoding.truncate(length)
        both = self.backend.post_process(first, second, True)
        return both.ids, both.type_ids

    def encode_chat(self, chat: Chat) -> list[int]:
        """Raises InvalidRequest. The template writes the special tokens itself."""
        return self.encode(self.render(chat), add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        return self.templates is not None

    def render(self, chat: Chat) -> str:
        """The text of a chat. Raises InvalidRequest."""
        if self.templates is None:
            raise InvalidRequest(
                "this model has no chat template: send a plain prompt to /v1/completions, or set `chat_template` in model.yaml's "
                "`llm` section to a Jinja file in the model's folder"
            )
        return self.templates.render(chat)

    # Decode

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, id: int) -> bytes:
        """What the token stands for inside a text; nothing for an id that the vocabulary does not have."""
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._spell(id)
        return known

    def token_text(self, id: int) -> str:
        """`token_bytes` as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(id).decode(errors="replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The tokens as the vocabulary spells them."""
        return [self.backend.id_to_token(id) or "" for id in ids]

    def _spell(self, id: int) -> bytes:
        piece = self.backend.id_to_token(id)
        if piece is None:
            return b""
        if self.spelling == "bytes":
            try:
                return bytes(BYTE_OF_LETTER[letter] for letter in piece)
            except KeyError:  # an added token, spelled as it is
                return piece.encode()
        if id in self.byte_ids:
            return bytes([self.byte_ids[id]])
        if self.spelling == "other":
            piece = piece.removeprefix("##").replace("</w>", " ")
        return piece.replace("▁", " ").encode()


def cut_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """Of two texts that are too long together; as transformers' `longest_first`."""
    short, long = min(first, second), max(first, second)
    if short * 2 > room:
        short, long = room // 2, room - room // 2
    else:
        long = room - short
    return (short, long) if first <= second else (long, short)


class ChatTemplates:
    """Jinja templates by name, rendered exactly as transformers does it.

    They come with checkpoints, which makes them untrusted code: they run in Jinja's sandbox and see plain data only.
    """

    def __init__(self, sources: Mapping[str, tuple[str, str]], named_tokens: Mapping[str, str]) -> None:
        """`sources`: (text, the file that it is from) by name; `default` is used, and `tool_use` where there are tools.

        Raises LoadError.
        """
        self.named_tokens = dict(named_tokens)
        self._sources = dict(sources)
        environment = _environment()
        self._templates: dict[str, jinja2.Template] = {}
        self._variables: dict[str, set[str]] = {}
        for name, (text, file) in sources.items():
            try:
                self._templates[name] = environment.from_string(text)
                self._variables[name] = jinja2.meta.find_undeclared_variables(environment.parse(text))
            except jinja2.TemplateSyntaxError as error:
                raise LoadError(f"{file}: the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        if len(self._templates) == 1:
            self._only = next(iter(self._templates))
        elif "default" in self._templates:
            self._only = "default"
        else:
            file = next(iter(sources.values()))[1]
            raise LoadError(f"{file}: has the chat templates {sorted(sources)}, none of them named `default`")

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self._sources.values()]

    @property
    def shows_tools(self) -> bool:
        return any("tools" in variables for variables in self._variables.values())

    def _effort(self, chat: Chat, variables: set[str]) -> dict[str, Any]:
        """Raises InvalidRequest."""
        if not chat.reasoning_effort:
            return {}
        switches = [name for name in SWITCHES if name in variables]
        if "reasoning_effort" not in variables and not switches:
            raise InvalidRequest("`reasoning_effort` cannot be heeded: this model's chat template knows nothing of it")
        if clash := {"reasoning_effort", *switches} & chat.template_kwargs.keys():
            raise InvalidRequest(f"`reasoning_effort` is set, and `{min(clash)}` among the chat template's arguments, too: set one of them")
        given: dict[str, Any] = dict.fromkeys(switches, chat.reasoning_effort != "none")
        return given | ({"reasoning_effort": chat.reasoning_effort} if "reasoning_effort" in variables else {})

    def render(self, chat: Chat) -> str:
        """Raises InvalidRequest: the template refused the chat, or failed on it."""
        if not chat.messages:
            raise InvalidRequest("`messages` must not be empty")
        if clash := RESERVED & chat.template_kwargs.keys():
            raise InvalidRequest(f"`{min(clash)}` must not be among the chat template's arguments: it has a field of its own")
        if chat.continue_final_message and chat.add_generation_prompt:
            raise InvalidRequest("`continue_final_message` and `add_generation_prompt` exclude each other")
        name = "tool_use" if chat.tools and "tool_use" in self._templates else self._only
        arguments = {**chat.template_kwargs, **self._effort(chat, self._variables[name])}
        messages = [_plain(message, short_ids=SHORT_IDS in self._sources[name][0]) for message in chat.messages]
        final = ""
        if chat.continue_final_message:
            final = _mark_end(messages[-1], self._sources[name][0])
        try:
            text = self._templates[name].render(
                {
                    **self.named_tokens,
                    **arguments,
                    "messages": messages,
                    "tools": chat.tools or None,
                    "documents": None,
                    "add_generation_prompt": chat.add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error.message or type(error).__name__}") from error
        except Exception as error:  # the template's expressions raise whatever Python's do
            raise InvalidRequest(f"the model's chat template fails on these messages: {type(error).__name__}: {error}") from error
        return _cut_at_end(text, final) if chat.continue_final_message else text


def _plain(message: Message, *, short_ids: bool) -> dict[str, Any]:
    """As templates want it: no key without a value, arguments of tool calls as data and not as JSON."""
    plain: dict[str, Any] = {name: value for name, value in msgspec.to_builtins(message).items() if value is not None}
    if message.reasoning is not None:  # templates know it by several names
        plain["reasoning_content"] = plain["thinking"] = message.reasoning
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    if short_ids:
        for call in plain.get("tool_calls", ()):
            call["id"] = _short(call.get("id"))
        if message.tool_call_id is not None:
            plain["tool_call_id"] = _short(message.tool_call_id)
    return plain


def _short(id: Any) -> str:
    return "".join(character for character in str(id) if character.isalnum())[-9:].rjust(9, "0")


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        raise InvalidRequest(f"`arguments` of the tool call {function.get('name', '')!r} are not valid JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(message: dict[str, Any], template: str) -> str:
    """Put the tag behind the final message's text and return the text. Raises InvalidRequest."""
    final = message.get("content")
    if final is None:
        raise InvalidRequest("`continue_final_message` is set, but the final message has no `content` to continue")
    if "content" not in template:
        raise InvalidRequest("`continue_final_message` is set, but the model's chat template does not read `content`")
    message["content"] = final + CONTINUE_TAG
    return str(final)


def _cut_at_end(text: str, final: str) -> str:
    tag = CONTINUE_TAG.strip()
    if final.strip() not in text or tag not in text:
        raise InvalidRequest("`continue_final_message` is set, but the model's chat template does not keep the final message as it is")
    at = text.rindex(tag)
    # a template that trims its messages has trimmed the tag's own space, and the one before it must go too
    return text[:at] if text.startswith(CONTINUE_TAG, at) else text[:at].rstrip()


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace)
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what an assistant said, for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` that takes no underscored name, which could reach CPython's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` may be an attribute
        self, *args = args  # type: ignore[assignment]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"chat templates cannot store {name!r} in a namespace: it starts with an underscore")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


# Files


def _read_backend(path: Path) -> Backend:
    if not path.is_file():
        others = [
            name for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json") if (path.parent / name).is_file()
        ]
        convert = f"transformers.AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained({str(path.parent)!r})"
        had = f"{path.parent} has only {', '.join(others)}: make it once with {convert}" if others else "the checkpoint has no tokenizer"
        raise LoadError(f"{path} is missing: {had}")
    try:
        return Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise LoadError(f"{path} is no tokenizer: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} must hold a JSON object")
    return content


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like. special_tokens_map.json counts where the config has no list of added tokens (older files)."""
    named: dict[str, str] = {}
    legacy = {} if "added_tokens_decoder" in config else _read_json(folder / "special_tokens_map.json")
    for name in NAMED_TOKENS:
        value = legacy.get(name, config.get(name))
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            named[name] = value
    return named


def _add_tokens(backend: Backend, folder: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens that the files beside tokenizer.json add to it, or declare special. Raises LoadError.

    A named token that no file gives an id is left out: the model has no embedding for it.
    """
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    path = folder / "tokenizer_config.json"
    declared: list[tuple[int, AddedToken]] = []
    try:
        for id, fields in config.get("added_tokens_decoder", {}).items():
            declared.append((int(id), AddedToken(**{name: value for name, value in fields.items() if name != "__type"})))
    except (TypeError, ValueError, AttributeError) as error:
        raise LoadError(f"{path}: `added_tokens_decoder` is not of id and token: {error}") from error
    if "added_tokens_decoder" not in config:
        path = folder / "added_tokens.json"
        special = set(named.values())
        for text, id in _read_json(path).items():
            if backend.token_to_id(text) is None:
                declared.append((id, AddedToken(text, normalized=text not in special, special=text in special)))
    for id, token in sorted(declared, key=lambda pair: pair[0]):
        if repr(token) in known:
            continue
        backend.add_tokens([token])
        if (given := backend.token_to_id(token.content)) != id:
            raise LoadError(f"{path} gives {token.content!r} the id {id}, but in {folder / 'tokenizer.json'} it has the id {given}")
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for text in named.values():
        if text not in special and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _read_templates(folder: Path, config: Mapping[str, Any], named: Mapping[str, str], chosen: str) -> ChatTemplates | None:
    """The chosen file, else chat_template.jinja with additional_chat_templates/, else what tokenizer_config.json holds."""
    sources: dict[str, tuple[str, str]] = {}
    try:
        if chosen:
            sources["default"] = ((folder / chosen).read_text(encoding="utf-8"), str(folder / chosen))
            return ChatTemplates(sources, named)
        own = folder / "chat_template.jinja"
        if own.is_file():
            sources["default"] = (own.read_text(encoding="utf-8"), str(own))
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = (path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise LoadError(f"{folder / chosen}, which `chat_template` names, is missing") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"a chat template in {folder} cannot be read: {error}") from error
    if not sources:
        sources = _templates_in(config.get("chat_template"), folder / "tokenizer_config.json")
    return ChatTemplates(sources, named) if sources else None


def _templates_in(value: Any, path: Path) -> dict[str, tuple[str, str]]:
    """`chat_template` of a config: nothing, a text, or a list of named texts."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": (value, str(path))}
    try:
        return {str(entry["name"]): (str(entry["template"]), str(path)) for entry in value}
    except (TypeError, KeyError) as error:
        raise LoadError(f"{path}: `chat_template` must be a text or a list of name and template") from error


# Spelling


def _letters() -> dict[str, int]:
    """GPT-2's: printable Latin-1 letters stand for themselves, the other bytes for the letters from U+0100 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_LETTER = _letters()


def _spelling(backend: Backend) -> tuple[Spelling, bool]:
    """How the decoder reads tokens, and whether it drops a space at the very start."""
    if backend.decoder is None:
        return "other", False
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "bytes", False
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or (steps[0]["pattern"], steps[0]["content"]) != ({"String": "▁"}, " "):
        return "other", False
    match steps[3:]:
        case []:
            return "byte_fallback", False
        case [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return "byte_fallback", True
    return "other", False
