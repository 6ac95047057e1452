"""Language models and embedders: Fairlead's own engines on a thread of their own, with a tokenizer on another before them."""

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import structlog
from msgspec import structs

from fairlead.backends.base import Deliver, EngineBackend
from fairlead.core.errors import FairleadError, InvalidRequest, LoadError, ShuttingDown, Unsupported
from fairlead.core.generation import Delta, Detokenize, Embed, EngineInfo, EngineStats, Generate, Paint, Prompt, Tokenize, Usage
from fairlead.core.specs import ModelSpec
from fairlead.llm.build import build_embedder, build_generator, task_of
from fairlead.llm.embedder import EmbeddingEngine
from fairlead.llm.engine import Answer, Engine
from fairlead.llm.tokenizer import Tokenizer

log = structlog.get_logger("fairlead.llm")


class LlmBackend(EngineBackend):
    def load_engine(self, artefact: Path, spec: ModelSpec, threads: int) -> "EngineThread":
        started = time.perf_counter()
        if spec.instances.device != "cpu":
            raise LoadError(f"`instances.device: {spec.instances.device}` cannot be heeded: language models compute on `cpu` for now")
        engine: Engine | EmbeddingEngine
        if task_of(artefact, spec.llm) == "embed":
            engine, tokenizer, info = build_embedder(artefact, spec.llm, threads=threads)
        else:
            engine, tokenizer, info = build_generator(artefact, spec.llm, threads=threads, instances=spec.instances.count)
        for line in info.explain:
            log.info("explain", model=spec.name, chosen=line)
        log.info("engine loaded", model=spec.name, seconds=round(time.perf_counter() - started, 2))
        return EngineThread(engine, tokenizer, info)


BACKEND = LlmBackend()


class EngineThread:
    """Implements `backends.base.Engine`. Two threads: prompts become tokens in one, so that a long text holds up no step,
    and wait for the other, which computes the steps, to take them."""

    def __init__(self, engine: Engine | EmbeddingEngine, tokenizer: Tokenizer, info: EngineInfo) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.info = info
        self._prompts: SimpleQueue[tuple[int, Prompt, dict[str, Any]] | None] = SimpleQueue()
        self._inbox: deque[Callable[[], None]] = deque()
        self._woken = threading.Event()
        self._closing = False
        self._step_started = 0.0
        self._answers: list[Answer] = []  # without a step: of the engine's thread alone
        self._live: set[int] = set()
        """Works from their submission to their end; every thread looks and discards, none but the event loop's adds."""

    # From the event loop

    def submit(self, work: int, prompt: Prompt, *, priority: int, arrived: float, deadline: float) -> None:
        self._live.add(work)
        self._prompts.put((work, prompt, {"priority": priority, "arrived": arrived, "deadline": deadline}))

    def cancel(self, work: int) -> None:
        self._live.discard(work)
        self._post(partial(self.engine.abort, work))

    def close(self) -> None:
        self._closing = True
        self._woken.set()

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def step_seconds(self) -> float:
        started = self._step_started
        return time.perf_counter() - started if started else 0.0

    def _post(self, order: Callable[[], None]) -> None:
        self._inbox.append(order)
        self._woken.set()

    # In the engine's thread

    def run(self, deliver: Deliver) -> None:
        threading.Thread(target=self._tokenize, name="tokenizer", daemon=True).start()
        try:
            self._compute(deliver)
        finally:
            self._prompts.put(None)
        deliver([(work, ShuttingDown("the model was unloaded before it answered")) for work in list(self._live)])

    def _compute(self, deliver: Deliver) -> None:
        while True:
            self._woken.clear()
            while self._inbox:
                self._inbox.popleft()()
            if self.engine.has_work and not self._closing:
                self._step_started = time.perf_counter()
                self._answers += self.engine.step()
                self._step_started = 0.0
            if self._answers:
                answers, self._answers = self._answers, []
                for work, answer in answers:
                    if isinstance(answer, FairleadError) or answer.usage is not None:
                        self._live.discard(work)
                deliver(answers)
            if self._closing:
                return
            if not self.engine.has_work and not self._inbox:
                self._woken.wait()

    def _take(self, work: int, read: Generate | Embed | Delta | FairleadError, when: dict[str, Any]) -> None:
        """Queue a prompt of token ids, or pass on an answer that needs no step."""
        engine = self.engine
        if work not in self._live:  # cancelled while it was read
            return
        try:
            match read:
                case Generate(token_ids=list(ids)) if isinstance(engine, Engine):
                    engine.add(work, ids, read.sampling, salt=read.salt, stream=read.stream, **when)
                case Embed(token_ids=list(ids)) if isinstance(engine, EmbeddingEngine):
                    engine.add(work, ids, read.dimensions, **when)
                case Delta() | FairleadError():
                    self._answers.append((work, read))
        except Exception as error:
            self._answers.append((work, _refusal(error)))

    # In the tokenizer's thread

    def _tokenize(self) -> None:
        while (asked := self._prompts.get()) is not None:
            work, prompt, when = asked
            if work not in self._live or self._closing:
                continue
            read: Generate | Embed | Delta | FairleadError
            try:
                read = self._read(prompt)
            except Exception as error:
                read = _refusal(error)
            self._post(partial(self._take, work, read, when))

    def _read(self, prompt: Prompt) -> Generate | Embed | Delta:
        """The prompt as token ids, or the answer to one that needs no step. Raises FairleadError."""
        match prompt:
            case Generate():
                if not isinstance(self.engine, Engine):
                    raise Unsupported("this model embeds: it does not generate text")
                return structs.replace(prompt, token_ids=self._ids(prompt))
            case Embed():
                if not isinstance(self.engine, EmbeddingEngine):
                    raise Unsupported("this model generates: it does not embed (`llm: {task: embed}` in its model.yaml makes it)")
                return (
                    prompt if prompt.token_ids is not None else structs.replace(prompt, token_ids=self.tokenizer.encode(prompt.text or ""))
                )
            case Tokenize():
                ids = self._ids(prompt)
                return Delta(token_ids=ids, tokens=self.tokenizer.pieces(ids), finish_reason="stop", usage=Usage(prompt_tokens=len(ids)))
            case Detokenize(token_ids=ids):
                size = self.info.vocab_size
                if any(not 0 <= token_id < size for token_id in ids):
                    raise InvalidRequest(f"`tokens` holds token ids outside the vocabulary of {size}")
                return Delta(text=self.tokenizer.decode(ids, skip_special_tokens=False), finish_reason="stop", usage=Usage())
            case Paint():
                raise Unsupported("this is a language model: it does not make pictures")

    def _ids(self, prompt: Generate | Tokenize) -> list[int]:
        """Raises InvalidRequest, also where not exactly one form of prompt is given."""
        if isinstance(prompt, Generate) and prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.chat is not None:
            return self.tokenizer.encode_chat(prompt.chat)
        return self.tokenizer.encode(prompt.text or "", add_special_tokens=prompt.add_special_tokens)


def _refusal(error: Exception) -> FairleadError:
    """What the caller is told of a prompt that could not be taken."""
    if isinstance(error, FairleadError):
        return error
    log.error("request failed before it was queued", exc_info=error)
    return InvalidRequest(f"the prompt cannot be read: {type(error).__name__}: {error}")
