"""Structured output: what an answer must look like, compiled to a grammar, and which tokens it allows after those that are chosen.

llguidance parses; nothing here knows a step or a logit. Grammars are compiled where requests are read, once for all that ask for the
same; every answer has a Matcher of its own. The library cannot be interrupted, so that all it takes is bounded before it begins
(`schema.cleaned`, `schema.Written`) and by its own fuel (`LIMITS`).
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from fairlead.core.errors import InvalidRequest, Unsupported
from fairlead.core.generation import MAX_GUIDE_BYTES, Guide
from fairlead.llm.schema import MAX_LITERAL_CHARS, BadSchema, Written, cleaned, pointer_to, written_size
from fairlead.llm.tokenizer import Tokenizer

MAX_CACHED = 64
MAX_CACHED_BYTES = 4 << 20
"""Of the texts that cached grammars were made of."""
MAX_CHOICES = 10_000
MAX_RULES_BYTES = 32 << 10
"""Of a regular expression, or of a grammar without the schemas in it: what they force is spelled out again for every token."""
PLACE_SECONDS = 0.25
"""For which the place of an error is looked for."""
UNSATISFIABLE = "Unsatisfiable schema"
WHITESPACE = r"\x20|\n[\x20\t]{0,32}"
"""Between the pieces of a JSON text: on one line or pretty-printed. Unbounded, a model that prefers spaces would write nothing else."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=40_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""About 25 ms for one mask and 40 MB for one grammar at the very worst."""

_OPTIONS = re.compile(r"^[ \t]*[?!]?[A-Za-z_][\w-]*[ \t]*\[((?:[^\]\"]|\"[^\"]*\")*)\]", re.MULTILINE)
_UNHEEDED = re.compile(r"\b(stop|temperature)\s*=")
_TOKENS = re.compile(
    r"""(?://|\#)[^\n]*
    |(?P<string>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[a-z]*)
    |(?P<head>[?!]*(?P<name>[A-Za-z_][\w-]*)[ \t]*(?P<options>\[(?:[^\]"]|"[^"]*")*\])?[ \t]*:)
    |(?P<word>[A-Za-z_][\w-]*)
    |(?P<bracket>[()\[\]])
    |(?P<repeat>\{\s*\d*\s*,?\s*\d*\s*\}|~\s*\d+(?:\s*\.\.\s*\d+)?)""",
    re.VERBOSE,
)
_JSON = re.compile(r"%json\s*(?=\{)")


class Matcher:
    """How far one answer has come in its grammar. For one thread at a time."""

    __slots__ = ("_forced", "exhausted", "grammar", "inner", "num_tokens", "slow_seconds")

    def __init__(self, grammar: "Grammar", inner: LLMatcher) -> None:
        self.grammar = grammar
        self.inner = inner
        self.num_tokens = 0
        """Of the answer's tokens, those that it has seen."""
        self.slow_seconds = 0.0
        self.exhausted = ""
        """Why the answer must end, though its grammar could go on."""
        self._forced: list[int] | None = None
        """Tokens that must come next; None: not asked yet."""

    def follow(self, token_ids: Sequence[int], start: int) -> list[int]:
        """The answer so far, from `start` on; it only ever grows. Returns the tokens that must come next, whatever the model says,
        but for those that end it."""
        for token_id in token_ids[start + self.num_tokens :]:
            self.inner.consume_token(token_id)
            self.num_tokens += 1
            self._forced = None
        if self._forced is None:
            self._forced = self.inner.compute_ff_tokens()
        return self._before_end(self._forced) if self._forced else self._forced

    def takes(self, token_id: int) -> bool:
        """Whether it may come next. False as well where nothing is left but to end: then the mask tells how."""
        if self._forced is None:
            self._forced = self.inner.compute_ff_tokens()
        return token_id == self._forced[0] if self._forced else bool(self.inner.validate_tokens([token_id]))

    def allowed(self, draft: list[int]) -> list[int]:
        """A draft up to the first token that may not come there, or that ends the answer."""
        draft = self._before_end(draft)
        return draft[: self.inner.validate_tokens(draft)] if draft else []

    def _before_end(self, token_ids: list[int]) -> list[int]:
        ends = self.grammar.eos_ids
        return token_ids if ends.isdisjoint(token_ids) else token_ids[: min(token_ids.index(end) for end in ends if end in token_ids)]

    @property
    def error(self) -> str:
        """Why it can go no further; "" where it can."""
        if not self.inner.is_error():
            return self.exhausted
        self.grammar.spoilt = True
        return f"the answer cannot go on as its grammar demands: {_plain(self.inner.get_error())}"


class Grammar:
    """A compiled guide. Its matchers share what they learn of it."""

    __slots__ = ("_inner", "eos_ids", "spoilt")

    def __init__(self, inner: LLMatcher, eos_ids: frozenset[int]) -> None:
        self._inner = inner
        self.eos_ids = eos_ids
        self.spoilt = False
        """A matcher came to one of its bounds, which the others share: the next request compiles it anew."""

    def matcher(self) -> Matcher:
        return Matcher(self, self._inner.deep_copy())


class Grammars:
    """Compiles guides for one model's vocabulary. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int], *, enabled: bool = True) -> None:
        """`vocab_size`: of the model's logits, which may be more than the tokenizer's."""
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.num_hits = self.num_misses = 0
        self.compile_seconds = 0.0
        self.refusal = self._refusal(enabled)
        """Why this model takes no guides; "" where it does."""
        self._vocabulary: LLTokenizer | None = None
        self._cached: OrderedDict[tuple[str, str], Grammar | str] = OrderedDict()
        """By kind and text; for one that cannot be compiled, what is wrong with it."""
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._making = threading.Lock()

    def _refusal(self, enabled: bool) -> str:
        if not enabled:
            return "`llm.guides` of this model is off"
        if self.tokenizer.spelling == "other":
            return "its tokenizer spells text in a way that grammars cannot follow"
        if not self.eos_ids:
            return "it has no token that ends an answer"
        return ""

    @property
    def explained(self) -> str:
        """The line that a load tells."""
        return f"structured output: {'off, ' + self.refusal if self.refusal else 'llguidance, compiled when first asked for'}"

    def known(self, guide: Guide) -> bool:
        """`compile` answers at once."""
        found = self._cached.get(self._key(guide))
        return bool(self.refusal) or _is_whole(found)

    def compile(self, guide: Guide) -> Grammar:
        """Raises InvalidRequest that names the guide's parameter and, of a schema, the place in it; Unsupported for a model that
        takes no guides."""
        if self.refusal:
            raise Unsupported(f"this model gives no structured output: {self.refusal}")
        key = self._key(guide)
        with self._lock:
            found = self._cached.get(key)
            if _is_whole(found):
                self._cached.move_to_end(key)
                self.num_hits += 1
            else:
                found = None
        if found is None:
            started = time.perf_counter()
            try:
                found = Grammar(self._compiled(guide), self.eos_ids)
            except InvalidRequest as error:
                found = error.message
            self._remember(key, found, time.perf_counter() - started)
        if isinstance(found, str):
            raise InvalidRequest(f"`{guide.parameter}` cannot be followed: {found}")
        return found

    def _key(self, guide: Guide) -> tuple[str, str]:
        return (guide.kind, guide.text)

    def _remember(self, key: tuple[str, str], found: Grammar | str, seconds: float) -> None:
        with self._lock:
            self.num_misses += 1
            self.compile_seconds += seconds
            if key not in self._cached:
                self._cached_bytes += len(key[1])
            self._cached[key] = found
            self._cached.move_to_end(key)
            while len(self._cached) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
                (_, text), _ = self._cached.popitem(last=False)
                self._cached_bytes -= len(text)

    def _compiled(self, guide: Guide) -> LLMatcher:
        try:
            num_bytes = len(guide.text.encode())
        except UnicodeEncodeError:
            raise InvalidRequest("it is no text: it holds half a character") from None
        if num_bytes > MAX_GUIDE_BYTES:
            raise InvalidRequest(f"it has {num_bytes} bytes, and at most {MAX_GUIDE_BYTES} are allowed")
        match guide.kind:
            case "json":
                return self._of_schema(guide.text)
            case "regex":
                _check_size(guide.text)
                written_size(guide.text)
                return self._matcher(LLMatcher.grammar_from_regex(guide.text))
            case "choice":
                return self._matcher(_of_lark(_choice(guide.text)))
            case "lark":
                return self._matcher(_of_lark(_checked_lark(guide.text)))

    def _of_schema(self, text: str) -> LLMatcher:
        clean = cleaned(_read_json(text))
        try:
            return self._matcher(_of_schema(clean))
        except InvalidRequest as error:
            raise BadSchema(self._place(clean, error.message), error.message) from None

    def _place(self, schema: dict[str, Any], complaint: str) -> str:
        """The innermost of its schemas that cannot be compiled on its own, for the same reason; as far as it is found soon."""
        shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        until, at, below = time.monotonic() + PLACE_SECONDS, "", list(_parts(schema, shared))
        while below:
            inner, part = below.pop(0)
            if time.monotonic() > until:
                break
            try:
                self._matcher(_of_schema({**part, **shared}))
            except InvalidRequest as error:
                if error.message == complaint or (error.message.startswith(UNSATISFIABLE) and complaint.startswith(UNSATISFIABLE)):
                    at, complaint = at + inner, error.message
                    below = list(_parts(part, {}))
        return at

    def _matcher(self, grammar: str) -> LLMatcher:
        """Raises InvalidRequest, also where nothing can match it."""
        matcher = LLMatcher(self._words(), grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what is wrong at the very beginning shows here, and all its answers begin so
        if matcher.is_error():
            raise InvalidRequest(_plain(matcher.get_error()))
        return matcher

    def _words(self) -> LLTokenizer:
        """The vocabulary, which takes a while to read: made when the first guide comes."""
        with self._making:
            if self._vocabulary is None:
                try:
                    words = LLTokenizer(self.tokenizer.backend.to_str(), n_vocab=self.vocab_size, eos_token=sorted(self.eos_ids))
                except ValueError as error:
                    self.refusal = f"its tokenizer cannot be read by llguidance: {error}"
                    raise Unsupported(f"this model gives no structured output: {self.refusal}") from error
                self._vocabulary = words
            return self._vocabulary


def _is_whole(found: "Grammar | str | None") -> bool:
    """What the cache has answers a request."""
    return found is not None and not (isinstance(found, Grammar) and found.spoilt)


def _of_schema(schema: dict[str, Any]) -> str:
    options = {"whitespace_pattern": WHITESPACE, "coerce_one_of": False, "lenient": False}
    return msgspec.json.encode({"grammars": [{"json_schema": {**schema, "x-guidance": options}}]}).decode()


def _of_lark(text: str) -> str:
    """Never the text itself: one that begins with a brace would be read as something else."""
    return msgspec.json.encode({"grammars": [{"lark_grammar": text}]}).decode()


def _read_json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except RecursionError:
        raise InvalidRequest("it is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"it is not valid JSON: {error}") from None


def _choice(text: str) -> str:
    """One terminal: as many rules would be as many ways to begin."""
    choices = _read_json(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise InvalidRequest("expected an array of texts")
    if len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"{len(choices)} choices, and at most {MAX_CHOICES} are allowed")
    for each in choices:
        if len(each) > MAX_LITERAL_CHARS:
            raise InvalidRequest(f"a choice of {len(each)} characters, and at most {MAX_LITERAL_CHARS} are allowed")
    return "start: CHOICE\nCHOICE: " + "\n | ".join(json.dumps(each, ensure_ascii=False) for each in dict.fromkeys(choices)) + "\n"


def _checked_lark(text: str) -> str:
    """With the schemas in it cleaned. Raises InvalidRequest for what would not be heeded."""
    for options in _OPTIONS.finditer(text):
        if unheeded := _UNHEEDED.search(options[1]):
            raise InvalidRequest(f"the option `{unheeded[1]}` of a rule is not supported")
    rules, schemas, end = [], [], 0
    for found in _JSON.finditer(text):
        if found.start() < end:  # within a schema
            continue
        try:
            schema, after = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            raise InvalidRequest("a schema after `%json` is not valid JSON") from None
        schemas.append(msgspec.json.encode({**cleaned(schema), "x-guidance": {"whitespace_pattern": WHITESPACE}}).decode())
        rules.append(text[end : found.end()])
        end = after
    rules.append(text[end:])
    _check_size("".join(rules))
    _check_lexemes("".join(rules))
    return "".join(chain.from_iterable(zip_longest(rules, schemas, fillvalue="")))


def _check_size(text: str) -> None:
    """Raises InvalidRequest."""
    if (size := len(text.encode())) > MAX_RULES_BYTES:
        raise InvalidRequest(f"it has {size} bytes, and at most {MAX_RULES_BYTES} are allowed")


def _check_lexemes(text: str) -> None:
    """Each becomes one automaton, with every terminal that it leads to written out, which rules are not. Raises InvalidRequest."""
    bodies: dict[str, list[re.Match[str]]] = {}
    lexemes: list[str] = []
    for token in _TOKENS.finditer(text):
        if token.lastgroup == "head":
            name = token["name"]
            body = bodies.setdefault(name, [])
            if token["options"] and not _is_terminal(name):  # `[lazy]` and the like
                lexemes.append(name)
        elif token.lastgroup is not None and bodies:
            body.append(token)
    sizes: dict[str, int] = {}

    def size_of(name: str) -> int:
        if name not in sizes:
            sizes[name] = 0  # one that leads to itself is refused later
            sizes[name] = _written(bodies.get(name, ()), size_of)
        return sizes[name]

    whole = Written()
    for name, tokens in bodies.items():
        if name not in lexemes and not _is_terminal(name):
            _written(tokens, lambda _: 0, in_rule=True)
            lexemes += (token[0] for token in tokens if token.lastgroup == "word" and _is_terminal(token[0]))
            for token in tokens:
                whole.add(_own_size(token), 0)
    try:
        for name in dict.fromkeys(lexemes):
            whole.add(size_of(name), 0)
    except RecursionError:
        raise InvalidRequest("its terminals lead to each other too deeply") from None


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _own_size(token: re.Match[str]) -> int:
    """Of a literal or a regular expression. Raises InvalidRequest."""
    match token.lastgroup:
        case "string":
            return len(token[0].encode()) - 2
        case "regex":
            return written_size(token[0][1:].rpartition("/")[0])
    return 0


def _written(tokens: Iterable[re.Match[str]], size_of: Callable[[str], int], *, in_rule: bool = False) -> int:
    """`in_rule`: what is repeated is not written out, only counted. Raises InvalidRequest."""
    written = Written()
    for token in tokens:
        match token.lastgroup:
            case "bracket":
                written.bracket("(" if token[0] in "([" else ")")
            case "repeat":
                written.repeat(token[0])
            case "word":
                size = size_of(token[0]) if _is_terminal(token[0]) else 0
                written.add(size, size)
            case _:
                size = 1 if in_rule else _own_size(token)
                written.add(size, size)
    return written.total


def _parts(schema: dict[str, Any], shared: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The schemas right in one that it cannot do without, and the `shared` ones, with their pointers."""
    required = schema.get("required", ())
    named = {"properties": {key: each for key, each in schema.get("properties", {}).items() if key in required}, **shared}
    for name, schemas in named.items():
        for key, each in schemas.items():
            if isinstance(each, dict):
                yield pointer_to(f"/{name}", key), each
    for name in ("patternProperties", "properties"):
        for key, each in schema.get(name, {}).items():
            if isinstance(each, dict) and key not in named.get(name, {}):
                yield pointer_to(f"/{name}", key), each
    for name in ("items", "additionalProperties"):
        if isinstance(each := schema.get(name), dict):
            yield f"/{name}", each
    for name in ("prefixItems", "allOf", "anyOf", "oneOf"):
        for number, each in enumerate(schema.get(name, ())):
            if isinstance(each, dict):
                yield f"/{name}/{number}", each


def _plain(complaint: str) -> str:
    """The library's words on one line, without what only its authors read."""
    if complaint.startswith("panic"):
        return "the grammar library fails on it"
    if complaint.startswith("NoExtension"):
        return "nothing can match it"
    text = " ".join(complaint.replace("<non-verbose/>", "").split())
    return text if len(text) <= 300 else f"{text[:300]}..."
