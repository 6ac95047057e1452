"""Which of several places takes a request: pure functions of what is under way at each.

Work is counted in tokens, or rows where there are none: cost = (prompt tokens to compute before it, and its own that the place
does not hold already) + (tokens or rows to answer, its own too), divided by the place's weight.
"""

from array import array
from collections.abc import Sequence
from math import exp, log

import msgspec
from msgspec import Struct

from fairlead.core.generation import Chat, Embed, Generate, Score
from fairlead.core.request import Request
from fairlead.core.routes import unit

CHARS_PER_TOKEN = 4
BLOCK_ENDS = (*range(256, 4096, 256), *range(4096, 32768 + 1, 1024))
"""Prompts are compared in pieces that end at these bytes; what comes after the last does not count."""
LONGEST_PREFIX = BLOCK_ENDS[-1]
LONGEST_ANSWER = 256
"""Tokens that an answer is thought to have at most: few are as long as they may be."""


class Size(Struct, frozen=True):
    """What a request costs, as far as can be told before."""

    prompt: int
    answer: int


class Load:
    """What is under way at a place."""

    __slots__ = ("answers", "in_flight", "prompts")

    def __init__(self) -> None:
        self.in_flight = 0
        self.prompts = 0
        """Tokens of prompts whose answers have not begun, without those that the place held."""
        self.answers = 0


def size_of(request: Request) -> Size:
    prompt, raw = request.prompt, request.raw
    if isinstance(prompt, Generate):
        sampling = prompt.sampling
        wanted = sampling.max_tokens
        answer = LONGEST_ANSWER if wanted is None else min(wanted, LONGEST_ANSWER)
        return Size(_num_tokens(prompt), answer * sampling.n)
    if isinstance(prompt, Embed):
        return Size(_num_tokens(prompt), 1)
    if isinstance(prompt, Score):
        return Size((len(prompt.text) + len(prompt.pair)) // CHARS_PER_TOKEN, 1)
    if raw is not None and not raw.num_rows:
        answer = LONGEST_ANSWER if raw.max_tokens is None else min(raw.max_tokens, LONGEST_ANSWER)
        generates = not raw.path.endswith("/embeddings")
        return Size(raw.prompt_chars // CHARS_PER_TOKEN, answer * raw.num_choices if generates else 1)
    return Size(0, raw.num_rows if raw is not None else request.num_rows)


def _num_tokens(prompt: Generate | Embed) -> int:
    if prompt.token_ids is not None:
        return len(prompt.token_ids)
    if prompt.text is not None:
        return len(prompt.text) // CHARS_PER_TOKEN
    if isinstance(prompt, Generate) and prompt.chat is not None:
        return sum(len(message.content or "") for message in prompt.chat.messages) // CHARS_PER_TOKEN
    return 0


def cost(load: Load, size: Size, overlap: int, weight: float) -> float:
    """`overlap`: tokens of the prompt that the place holds."""
    return (load.prompts + max(size.prompt - overlap, 0) + load.answers + size.answer) / weight


def pick(costs: Sequence[float], scale: float, temperature: float, random: float) -> int:
    """The index of the lowest cost, mostly: one that is `temperature * scale` higher is taken e times less often.

    Several gateways that know the same would otherwise all run to the same place.
    """
    best = min(costs)
    if temperature <= 0.0:
        ties = [index for index, each in enumerate(costs) if each == best]
        return ties[int(random * len(ties))]
    unit_cost = max(temperature * scale, 1e-9)
    odds = [exp((best - each) / unit_cost) for each in costs]
    point = random * sum(odds)
    for index, each in enumerate(odds):
        point -= each
        if point < 0:
            return index
    return odds.index(max(odds))


def rendezvous(key: bytes, places: Sequence[tuple[str, float]]) -> int:
    """The index of the place, of (id, weight), that a key belongs to. A place that comes or goes moves only its own keys."""
    scores = [weight / -log(unit(key + b"\0" + name.encode()) or 1e-300) for name, weight in places]
    return scores.index(max(scores))


# Prefixes


def blocks_of(request: Request) -> list[int]:
    """Hashes of how the prompt begins, each of all that stands before it too; [] for what has no prompt, or a short one."""
    prompt, raw = request.prompt, request.raw
    if isinstance(prompt, Generate):
        return _chain(_beginning(prompt), prompt.salt)
    return _chain(raw.prefix, "") if raw is not None and raw.prefix else []


def _beginning(prompt: Generate) -> bytes:
    if prompt.text is not None:
        return prompt.text[:LONGEST_PREFIX].encode()
    if prompt.token_ids is not None:
        # As many bytes for a token as of text
        return array("I", [each & 0xFFFFFFFF for each in prompt.token_ids[: LONGEST_PREFIX // CHARS_PER_TOKEN]]).tobytes()
    return _rendered(prompt.chat) if prompt.chat is not None else b""


def _rendered(chat: Chat) -> bytes:
    """Not as the model's template does it, but equal where that is. Tools stand first, as most templates have them."""
    parts = [msgspec.json.encode(chat.tools)] if chat.tools else []
    length = 0
    for message in chat.messages:
        parts.append(f"\n{message.role}\n{(message.content or '')[:LONGEST_PREFIX]}".encode())
        length += len(parts[-1])
        if length >= LONGEST_PREFIX:
            break
    return b"".join(parts)


def _chain(beginning: bytes, salt: str) -> list[int]:
    chain = []
    before, begin, length = hash(salt), 0, len(beginning)
    for end in BLOCK_ENDS:
        if end > length:
            break
        before = hash((before, beginning[begin:end]))
        chain.append(before)
        begin = end
    return chain


class Prefixes:
    """Which places computed which blocks last: an estimate of what their prefix caches hold.

    Bounded: blocks that were not asked for among the latest `max_blocks / 2` are forgotten.
    """

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, max_blocks: int = 1 << 15) -> None:
        self._half = max_blocks // 2
        self._young: dict[int, int] = {}
        """Block → the places that hold it, a bit for each."""
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def held(self, blocks: Sequence[int]) -> list[int]:
        """For each leading block that any one place holds together with all before it: those places, a bit for each."""
        young, old = self._young, self._old
        found = []
        alive = -1
        for block in blocks:
            alive &= young.get(block) or old.get(block, 0)
            if not alive:
                break
            found.append(alive)
        return found

    def record(self, blocks: Sequence[int], place: int) -> None:
        """A place (its bit's number) computes these, or has them."""
        young, old = self._young, self._old
        bit = 1 << place
        for block in blocks:
            young[block] = (young.get(block) or old.pop(block, 0)) | bit
        if len(young) > self._half:
            self._young, self._old = {}, young

    def forget(self, place: int) -> None:
        """It was started again, or is gone: it holds nothing."""
        keep = ~(1 << place)
        for generation in (self._young, self._old):
            for block in [block for block, places in generation.items() if not places & keep]:
                del generation[block]
            for block, places in generation.items():
                generation[block] = places & keep


def overlap_of(held: Sequence[int], place: int) -> int:
    """Tokens, of what `Prefixes.held` found, that a place holds. It holds fewer and fewer of them, from the first on."""
    low, high = 0, len(held)
    while low < high:
        middle = (low + high) // 2
        if held[middle] >> place & 1:
            low = middle + 1
        else:
            high = middle
    return BLOCK_ENDS[low - 1] // CHARS_PER_TOKEN if low else 0
