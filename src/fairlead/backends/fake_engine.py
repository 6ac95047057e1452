"""An engine without a model: it answers with the words of its prompt, one word a step.

The in-memory twin of a language model, for tests of everything around one. Tests register it with
`BACKENDS[KIND.name] = KIND`; no artefact is ever detected as it. `parameters` of its model.yaml: `step_seconds` (how long a
step takes), `num_blocks`, `max_model_len`, `chat_template: false`. Words of a prompt that it obeys instead of echoing:

| word | does |
|---|---|
| !forever | the words that follow again and again, until `max_tokens` |
| !raise | the step fails on this request, and on no other |
| !crash | the process ends with exit code 7 |
| !hang | a step that never ends |
| !seize | a step that never ends and holds the interpreter's lock |
| !break | the engine gives itself up |

In a request that is `parsed`, so that reasoning and tool calls stand apart, it obeys these where they stand, too:

| words | do |
|---|---|
| !reason … !answer | the words between come as reasoning |
| !call NAME {…} | a call of the tool NAME with these arguments, in pieces; the answer ends with `tool_calls` |

A LoRA adapter, whose folder in the model's `loras` needs no more than an adapter_config.json, is the word `<NAME>` before the answer.
"""

import json
import math
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from copy import copy
from itertools import count, cycle
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np

from fairlead.backends.base import Deliver, Engine, EngineBackend, Kind
from fairlead.core.adapters import adapter_names
from fairlead.core.errors import (
    ContextExceeded,
    FairleadError,
    InvalidRequest,
    LoadError,
    ModelError,
    NotFound,
    QueueFull,
    ShuttingDown,
    TimeoutExpired,
    Unsupported,
)
from fairlead.core.generation import (
    Chat,
    Delta,
    Detokenize,
    Embed,
    EngineInfo,
    EngineStats,
    FinishReason,
    Generate,
    KvShare,
    Paint,
    Phase,
    Prompt,
    Sampling,
    Score,
    Tokenize,
    TokenLogprob,
    ToolCall,
    Usage,
    add_calls,
)
from fairlead.core.specs import Isolation, ModelSpec
from fairlead.observe.metrics import Histogram
from fairlead.observe.table import SECONDS

KIND = Kind(
    name="fake_engine",
    module="fairlead.backends.fake_engine",
    requires=(),
    extra="",
    isolation=Isolation.PROCESS,
    files=(),
    engine=True,
    parameters=True,
)
EMBEDDING_SIZE = 8
BLOCK_SIZE = 16
BLOCK_BYTES = BLOCK_SIZE << 10
LOGPROB = -0.5
COMMANDS = frozenset({"!forever", "!raise", "!crash", "!hang", "!seize", "!break"})
CRASH_EXIT = 7
WORD = re.compile(r"\s*\S+\s*")

Answer = tuple[int, Delta | FairleadError]


class FakeEngineBackend(EngineBackend):
    def load_engine(self, artefact: Path, spec: ModelSpec, threads: int, version: str = "", kv: KvShare | None = None) -> Engine:
        return FakeEngine(spec, folder=artefact, kv=kv)


BACKEND = FakeEngineBackend()


class _Said(NamedTuple):
    """A word of an answer, and as what it comes."""

    word: str
    reasoned: bool = False
    call: ToolCall | None = None


class _Choice:
    """One of the n answers: all its pieces are known from the beginning, one goes out a step."""

    def __init__(self, pieces: Iterator[Delta]) -> None:
        self.pieces = pieces
        self.whole: Delta | None = None
        """What was computed of an answer that is not streamed."""
        self.last_at = 0.0


class _Running:
    """A request, from its arrival on."""

    def __init__(
        self, work: int, prompt: Generate | Embed | Score, words: list[str], *, priority: int, arrived: float, deadline: float
    ) -> None:
        self.work = work
        self.prompt = prompt
        self.words = words
        self.order = (priority, arrived, work)
        self.arrived = arrived
        self.deadline = deadline
        self.choices: list[_Choice] = []
        self.num_blocks = 0
        self.num_generated = self.num_reasoned = 0
        self.cached_tokens = 0
        self.began = self.first_at = 0.0

    def phases(self, now: float) -> list[Phase]:
        """As an engine tells them."""
        began, first_at = self.began - self.arrived, (self.first_at or now) - self.arrived
        phases = [Phase("waiting", 0.0, began), Phase("prefill", began, first_at - began, 1, len(self.words) - self.cached_tokens, 1)]
        if isinstance(self.prompt, Generate):
            phases.append(Phase("decode", first_at, now - self.arrived - first_at, self.num_generated, self.num_generated, 1))
        return phases


class FakeEngine:
    """Implements `backends.base.Engine`."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        folder: Path | None = None,
        kv: KvShare | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`clock`, `sleep`: of seconds; a virtual pair makes steps take no time."""
        parameters = spec.parameters
        self._loras = None if folder is None else folder / spec.llm.loras
        self._takes_adapters = spec.llm.lora_bytes > 0
        self.max_model_len: int = spec.llm.max_model_len or parameters.get("max_model_len", 4096)
        self.max_num_seqs, self.max_waiting = spec.llm.max_num_seqs, spec.llm.max_waiting
        self.step_time: float = parameters.get("step_seconds", 0.0)
        self.num_blocks: int = parameters.get("num_blocks", 1024)
        if spec.llm.kv_cache_bytes:
            self.num_blocks = spec.llm.kv_cache_bytes // BLOCK_BYTES
        elif kv is not None:
            self.num_blocks = min(self.num_blocks, kv.num_bytes // BLOCK_BYTES)
            if not self.num_blocks:
                raise LoadError(f"KV memory of {kv.num_bytes} bytes ({kv.why}) holds no block")
        task = spec.llm.task
        self.info = EngineInfo(
            tasks=("generate", "embed", "tokenize") if task == "auto" else (task, "tokenize"),
            max_model_len=self.max_model_len,
            vocab_size=1 << 20,
            architecture="FakeEngine",
            has_chat_template=parameters.get("chat_template", True),
            tools=parameters.get("chat_template", True),
            num_kv_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            kv_block_bytes=BLOCK_BYTES,
            embedding_size=EMBEDDING_SIZE,
        )
        self._clock, self._sleep = clock, sleep
        self._vocabulary: dict[str, int] = {}
        self._inbox: deque[Callable[[list[Answer]], None]] = deque()
        self._woken = threading.Event()
        self._closing = False
        self._step_started = 0.0
        self._waiting: list[_Running] = []
        self._running: list[_Running] = []
        self._prefixes: set[tuple[str, ...]] = set()
        self._stats = EngineStats(num_blocks=self.num_blocks, num_free_blocks=self.num_blocks)
        self._finished: Counter[str] = Counter()
        self._first_token, self._inter_token = Histogram(SECONDS), Histogram(SECONDS)
        self._queue_time, self._step_histogram = Histogram(SECONDS), Histogram(SECONDS)

    # From the event loop

    def submit(self, work: int, prompt: Prompt, *, priority: int, arrived: float, deadline: float) -> None:
        def add(answers: list[Answer]) -> None:
            try:
                answer = self._take(work, prompt, priority, arrived, deadline)
            except FairleadError as error:
                answers.append((work, error))
            else:
                if answer is not None:
                    answers.append((work, answer))

        self._post(add)

    def cancel(self, work: int) -> None:
        def drop(_: list[Answer]) -> None:
            self._finished["abort"] += any(each.work == work for each in (*self._waiting, *self._running))
            self._waiting = [each for each in self._waiting if each.work != work]
            self._running = [each for each in self._running if each.work != work]

        self._post(drop)

    def close(self) -> None:
        self._closing = True
        self._woken.set()

    def step_seconds(self) -> float:
        started = self._step_started
        return self._clock() - started if started else 0.0

    def stats(self) -> EngineStats:
        stats = self._stats
        stats.num_running, stats.num_waiting = len(self._running), len(self._waiting) + len(self._inbox)
        stats.num_free_blocks = self._num_free_blocks()
        stats.finished = dict(self._finished)
        stats.time_to_first_token, stats.inter_token = _told(self._first_token), _told(self._inter_token)
        stats.queue_time, stats.step_time = _told(self._queue_time), _told(self._step_histogram)
        return stats

    def between_steps(self, work: Callable[[], None]) -> None:
        self._post(lambda _: work())

    def sleep(self) -> None:
        self._prefixes.clear()

    def wake(self) -> None:
        """What it gave back is there."""

    def _post(self, order: Callable[[list[Answer]], None]) -> None:
        self._inbox.append(order)
        self._woken.set()

    # In the engine's thread

    def run(self, deliver: Deliver) -> None:
        while not self._closing:
            self._woken.clear()
            answers: list[Answer] = []
            while self._inbox:
                self._inbox[0](answers)
                self._inbox.popleft()
            if self._waiting or self._running:
                self._step_started = self._clock()
                self._step(answers)
                self._step_started = 0.0
            if answers:
                deliver(answers)
            if not (self._waiting or self._running or self._inbox or self._closing):
                self._woken.wait()
        deliver([(each.work, ShuttingDown("the model was unloaded before it answered")) for each in (*self._waiting, *self._running)])

    def _take(self, work: int, prompt: Prompt, priority: int, arrived: float, deadline: float) -> Delta | None:
        """Queue a prompt, or answer one that needs no step. Raises FairleadError."""
        match prompt:
            case Tokenize():
                words = self._words(prompt)
                return Delta(
                    token_ids=[self._id(word) for word in words], tokens=words, finish_reason="stop", usage=Usage(prompt_tokens=len(words))
                )
            case Detokenize(token_ids=ids):
                return Delta(text="".join(self._word(token_id) for token_id in ids), finish_reason="stop", usage=Usage())
        if isinstance(prompt, Paint):
            raise Unsupported("this model does not make pictures")
        if (task := type(prompt).__name__.lower()) not in self.info.tasks:
            raise Unsupported(f"this model {self.info.tasks[0]}s: it does not {task}{' text' * (task == 'generate')}")
        words = self._words(prompt)
        adapter = prompt.adapter if isinstance(prompt, Generate) else ""
        if adapter and (self._loras is None or not self._takes_adapters or adapter not in adapter_names(self._loras)):
            raise NotFound(f"the model has no adapter '{adapter[:64]}'")
        if not words:
            raise InvalidRequest("the prompt is empty: it must have at least one token")
        wanted = _wanted(prompt.sampling) if isinstance(prompt, Generate) else 0
        if len(words) + wanted > self.max_model_len:
            raise ContextExceeded(
                f"this model's maximum context length is {self.max_model_len} tokens, but {len(words) + wanted} were requested"
            )
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests wait already")
        self._waiting.append(_Running(work, prompt, words, priority=priority, arrived=arrived, deadline=deadline or math.inf))
        return None

    def _step(self, answers: list[Answer]) -> None:
        self._sleep(self.step_time)
        now = self._clock()
        self._admit(now, answers)
        self._stats.num_steps += 1
        for running in list(self._running):
            try:
                self._obey(running)
                self._advance(running, now, answers)
            except ModelError as error:
                self._stats.num_failed_steps += 1
                self._stats.num_quarantined += 1
                self._finished["error"] += 1
                self._running.remove(running)
                answers.append((running.work, error))
        self._step_histogram.observe(self._clock() - self._step_started)

    def _admit(self, now: float, answers: list[Answer]) -> None:
        """Start what waits, in order, as far as there are places and blocks."""
        for late in [each for each in self._waiting if each.deadline < now]:
            self._waiting.remove(late)
            answers.append((late.work, TimeoutExpired("Request timeout expired")))
        self._waiting.sort(key=lambda each: each.order)
        while self._waiting and len(self._running) < self.max_num_seqs:
            first = self._waiting[0]
            needed = -(-len(first.words) // BLOCK_SIZE)
            if self._running and needed > self._num_free_blocks():
                break
            self._running.append(self._waiting.pop(0))
            first.num_blocks = min(needed, self._num_free_blocks())
            first.cached_tokens = self._look_up(first)
            first.choices = [_Choice(self._pieces(first, index)) for index in range(_num_choices(first))]
            first.began = max(now - self.step_time, first.arrived)
            self._queue_time.observe(now - first.arrived)
            self._stats.num_prompt_tokens += len(first.words)

    def _advance(self, running: _Running, now: float, answers: list[Answer]) -> None:
        """One piece more of each of its answers."""
        prompt = running.prompt
        if not isinstance(prompt, Generate):
            self._running.remove(running)
            self._finished["stop"] += 1
            if isinstance(prompt, Score):
                data = np.array([_score(prompt, len(running.words))], "<f4").tobytes()
            else:
                vector = _embed(running.words)[: prompt.dimensions]
                data = (vector / np.linalg.norm(vector)).astype("<f4").tobytes()
            usage = Usage(prompt_tokens=len(running.words))
            answers.append((running.work, Delta(vector=data, finish_reason="stop", usage=usage, phases=running.phases(now))))
            return
        running.first_at = running.first_at or now
        for choice in list(running.choices):
            piece = next(choice.pieces)
            running.num_generated += len(piece.token_ids)
            running.num_reasoned += len(piece.token_ids) * bool(piece.reasoning)
            self._stats.num_generated_tokens += len(piece.token_ids)
            (self._inter_token if choice.last_at else self._first_token).observe(now - (choice.last_at or running.arrived))
            choice.last_at = now
            if not prompt.stream:
                choice.whole = piece = _joined(choice.whole, piece)
            if piece.finish_reason:
                running.choices.remove(choice)
                self._finished[piece.finish_reason] += 1
            if not running.choices:
                self._running.remove(running)
                piece.usage = Usage(
                    prompt_tokens=len(running.words),
                    completion_tokens=running.num_generated,
                    cached_tokens=running.cached_tokens,
                    reasoning_tokens=running.num_reasoned,
                )
                piece.phases = running.phases(now)
            if prompt.stream or piece.finish_reason:
                answers.append((running.work, piece))

    def _obey(self, running: _Running) -> None:
        commands = {word.strip() for word in running.words} & COMMANDS
        if "!raise" in commands:
            raise ModelError("the model failed on this request: it was asked to")
        if "!crash" in commands:
            os._exit(CRASH_EXIT)
        if "!hang" in commands:
            threading.Event().wait()
        if "!seize" in commands:
            sum(count())
        if "!break" in commands:
            raise RuntimeError("it was asked to break")

    def _num_free_blocks(self) -> int:
        return self.num_blocks - sum(each.num_blocks for each in self._running)

    def _look_up(self, running: _Running) -> int:
        """How many of its words stand at the beginning of an earlier prompt of the same salt, in whole blocks."""
        salt = running.prompt.salt if isinstance(running.prompt, Generate) else ""
        prefixes = [(salt, *running.words[:end]) for end in range(BLOCK_SIZE, len(running.words), BLOCK_SIZE)]
        hits = BLOCK_SIZE * sum(prefix in self._prefixes for prefix in prefixes)
        self._prefixes.update(prefixes)
        self._stats.num_prefix_queried_tokens += len(running.words)
        self._stats.num_prefix_hit_tokens += hits
        return hits

    # Words

    def _words(self, prompt: Prompt) -> list[str]:
        """With the white space that follows each. Raises InvalidRequest."""
        assert not isinstance(prompt, (Detokenize, Paint))
        if isinstance(prompt, Score):
            limit = None if prompt.max_tokens is None else prompt.max_tokens or self.max_model_len
            return WORD.findall(f"{prompt.text} {prompt.pair}")[:limit]
        if not isinstance(prompt, Tokenize) and prompt.token_ids is not None:
            return [self._word(token_id) for token_id in prompt.token_ids]
        text = prompt.text or ""
        if not isinstance(prompt, Embed) and prompt.chat is not None:
            if not self.info.has_chat_template:
                raise InvalidRequest("this model has no chat template")
            text = _render(prompt.chat)
        return WORD.findall(text)

    def _id(self, word: str) -> int:
        return self._vocabulary.setdefault(word, len(self._vocabulary))

    def _word(self, token_id: int) -> str:
        """Raises InvalidRequest."""
        if not 0 <= token_id < self.info.vocab_size:
            raise InvalidRequest(f"token id {token_id} is outside the vocabulary of {self.info.vocab_size}")
        return next((word for word, known in self._vocabulary.items() if known == token_id), f"<{token_id}> ")

    def _pieces(self, running: _Running, index: int) -> Iterator[Delta]:
        """The words of the answer as Deltas, the last with the reason why it is the last."""
        prompt = running.prompt
        assert isinstance(prompt, Generate)
        sampling = prompt.sampling
        limit = min(sampling.max_tokens or self.max_model_len, self.max_model_len - len(running.words))
        echoed = running.words if prompt.chat is None else WORD.findall(prompt.chat.messages[-1].content or "")
        said = list(_parsed(echoed, f"call_{running.work}_{index}")) if prompt.parsed else [_Said(word) for word in echoed]
        said = [each for each in said if each.word.strip() not in COMMANDS] or [_Said("nothing ")]
        if prompt.adapter:
            said.insert(0, _Said(f"<{prompt.adapter}> "))
        endless = sampling.ignore_eos or any(word.strip() == "!forever" for word in running.words)
        for number, (word, reasoned, call) in enumerate(cycle(said) if endless else said, 1):
            piece = self._piece(running, index, word, first=number == 1)
            stop, cut = _stopped(word, sampling)
            if reasoned or call is not None:
                piece.text, stop = "", ""
                piece.reasoning = word if reasoned else ""
                piece.tool_calls = [] if call is None else [copy(call)]
            elif stop:
                piece.text, piece.stop_reason = cut, stop
            elif self._id(word) in sampling.stop_token_ids:
                stop, piece.text, piece.stop_reason = word, "", self._id(word)
            piece.finish_reason = _reason(stop=bool(stop) or (not endless and number == len(said)), full=number == limit)
            if piece.finish_reason == "stop" and not stop and any(each.call for each in said):
                piece.finish_reason = "tool_calls"
            yield piece
            if piece.finish_reason:
                return

    def _piece(self, running: _Running, index: int, word: str, *, first: bool) -> Delta:
        assert isinstance(running.prompt, Generate)
        sampling = running.prompt.sampling
        piece = Delta(index=index, text=word, token_ids=[self._id(word)])
        if sampling.logprobs is not None:
            piece.logprobs = [self._logprob(word, sampling.logprobs)]
        if first and index == 0 and sampling.prompt_logprobs is not None:
            piece.prompt_logprobs = [None, *(self._logprob(each, sampling.prompt_logprobs) for each in running.words[1:])]
        return piece

    def _logprob(self, word: str, num_top: int) -> TokenLogprob:
        """The word itself first, then others that it has met."""
        ranked = [word, *(other for other in self._vocabulary if other != word)][:num_top]
        top = [TokenLogprob(self._id(each), each, each.encode(), LOGPROB * rank, rank) for rank, each in enumerate(ranked, 1)]
        return TokenLogprob(self._id(word), word, word.encode(), LOGPROB, 1, top)


def _told(histogram: Histogram) -> tuple[list[int], float]:
    return list(histogram.counts), histogram.sum


def _wanted(sampling: Sampling) -> int:
    return 1 if sampling.fits_context else sampling.max_tokens or 1


def _num_choices(running: _Running) -> int:
    return running.prompt.sampling.n if isinstance(running.prompt, Generate) else 0


def _render(chat: Chat) -> str:
    return " ".join(f"<{message.role}> {message.content or ''}" for message in chat.messages)


def _parsed(words: list[str], id: str) -> Iterator[_Said]:
    """`!reason`, `!answer` and `!call` heeded. `id`: of the answer's calls, before their numbers."""
    reasoned, index, at = False, 0, 0
    while at < len(words):
        word = words[at].strip()
        if word == "!call" and (call := _call_at(words, at + 1)) is not None:
            name, arguments, at = call
            yield _Said("!call ", call=ToolCall(index=index, id=f"{id}_{index}", name=name))
            for piece in WORD.findall(arguments):
                yield _Said(piece, call=ToolCall(index=index, arguments=piece))
            index += 1
            continue
        if word in ("!reason", "!answer"):
            reasoned = word == "!reason"
        else:
            yield _Said(words[at], reasoned)
        at += 1


def _call_at(words: list[str], at: int) -> tuple[str, str, int] | None:
    """(name, arguments, the place behind them) of the call that is written there."""
    for end in range(at + 2, len(words) + 1):
        arguments = "".join(words[at + 1 : end]).strip()
        try:
            if isinstance(json.loads(arguments), dict):
                return words[at].strip(), arguments, end
        except ValueError:
            continue
    return None


def _stopped(word: str, sampling: Sampling) -> tuple[str, str]:
    """(the stop string in `word`, or ""; what of the word still belongs to the answer). One that spans words is not seen."""
    for stop in sampling.stop:
        at = word.find(stop)
        if at >= 0:
            return stop, word[: at + len(stop) * sampling.include_stop_str_in_output]
    return "", word


def _reason(*, stop: bool, full: bool) -> FinishReason:
    return "stop" if stop else "length" if full else ""


def _joined(whole: Delta | None, piece: Delta) -> Delta:
    if whole is None:
        return piece
    whole.text += piece.text
    whole.reasoning += piece.reasoning
    add_calls(whole.tool_calls, piece.tool_calls)
    whole.token_ids += piece.token_ids
    if whole.logprobs is not None:
        whole.logprobs += piece.logprobs or []
    whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
    return whole


def _score(prompt: Score, num_words: int) -> float:
    """The share of the asked words that the other text has; raw: their number."""
    asked = prompt.text.split()
    found = len({*asked} & {*prompt.pair.split()[: num_words - len(asked)]})
    return float(found) if prompt.raw else found / max(len({*asked}), 1)


def _embed(words: list[str]) -> np.ndarray:
    """A count of words by the remainder of their checksum, none of it zero: [EMBEDDING_SIZE]."""
    vector = np.full(EMBEDDING_SIZE, 0.01)
    for word in words:
        vector[crc32(word.strip().encode()) % EMBEDDING_SIZE] += 1
    return vector
