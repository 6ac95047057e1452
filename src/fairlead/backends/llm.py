"""Language models and embedders: Fairlead's own engines on a thread of their own, with a tokenizer before them."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from fairlead.backends.base import Deliver, EngineBackend
from fairlead.core.errors import FairleadError, InvalidRequest, ShuttingDown, Unsupported
from fairlead.core.generation import Delta, Detokenize, Embed, EngineInfo, EngineStats, Generate, Prompt, Tokenize, Usage
from fairlead.core.specs import ModelSpec
from fairlead.llm.build import build_embedder, build_generator, task_of
from fairlead.llm.embedder import EmbeddingEngine
from fairlead.llm.engine import Engine
from fairlead.llm.tokenizer import Tokenizer

log = structlog.get_logger("fairlead.llm")


class LlmBackend(EngineBackend):
    def load_engine(self, artefact: Path, spec: ModelSpec, threads: int) -> "EngineThread":
        started = time.perf_counter()
        engine: Engine | EmbeddingEngine
        if task_of(artefact, spec.llm) == "embed":
            engine, tokenizer, info = build_embedder(artefact, spec.llm, threads=threads)
        else:
            engine, tokenizer, info = build_generator(artefact, spec.llm, threads=threads)
        for line in info.explain:
            log.info("explain", model=spec.name, chosen=line)
        log.info("engine loaded", model=spec.name, seconds=round(time.perf_counter() - started, 2))
        return EngineThread(engine, tokenizer, info)


BACKEND = LlmBackend()


class EngineThread:
    """Implements `backends.base.Engine`: prompts become tokens here, and wait for the engine's thread to take them."""

    def __init__(self, engine: Engine | EmbeddingEngine, tokenizer: Tokenizer, info: EngineInfo) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.info = info
        self._inbox: deque[Callable[[], None]] = deque()
        self._woken = threading.Event()
        self._closing = False
        self._step_started = 0.0
        self._answers: list[tuple[int, Delta | FairleadError]] = []  # without a step: of the engine's thread alone
        self._live: set[int] = set()

    # From the event loop

    def submit(self, work: int, prompt: Prompt, *, priority: int, arrived: float, deadline: float) -> None:
        self._post(lambda: self._add(work, prompt, {"priority": priority, "arrived": arrived, "deadline": deadline}))

    def cancel(self, work: int) -> None:
        def cancel() -> None:
            self._live.discard(work)
            self.engine.abort(work)

        self._post(cancel)

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
                break
            if not self.engine.has_work and not self._inbox:
                self._woken.wait()
        deliver([(work, ShuttingDown("the model was unloaded before it answered")) for work in self._live])

    def _add(self, work: int, prompt: Prompt, when: dict[str, Any]) -> None:
        self._live.add(work)
        try:
            answer = self._take(work, prompt, when)
        except FairleadError as error:
            self._answers.append((work, error))
        except Exception as error:
            log.exception("request failed before it was queued")
            self._answers.append((work, InvalidRequest(f"the prompt cannot be read: {type(error).__name__}: {error}")))
        else:
            if answer is not None:
                self._answers.append((work, answer))

    def _take(self, work: int, prompt: Prompt, when: dict[str, Any]) -> Delta | None:
        """Queue a prompt, or answer one that needs no step. Raises FairleadError."""
        engine = self.engine
        match prompt:
            case Generate() if isinstance(engine, Engine):
                ids = self._ids(prompt)
                engine.add(work, ids, prompt.sampling, salt=prompt.salt, stream=prompt.stream, **when)
            case Generate():
                raise Unsupported("this model embeds: it does not generate text")
            case Embed() if isinstance(engine, EmbeddingEngine):
                ids = prompt.token_ids if prompt.token_ids is not None else self.tokenizer.encode(prompt.text or "")
                engine.add(work, ids, prompt.dimensions, **when)
            case Embed():
                raise Unsupported("this model generates: it does not embed (`llm: {task: embed}` in its model.yaml makes it)")
            case Tokenize():
                ids = self._ids(prompt)
                return Delta(token_ids=ids, tokens=self.tokenizer.pieces(ids), finish_reason="stop", usage=Usage(prompt_tokens=len(ids)))
            case Detokenize(token_ids=ids):
                size = self.info.vocab_size
                if any(not 0 <= token_id < size for token_id in ids):
                    raise InvalidRequest(f"`tokens` holds token ids outside the vocabulary of {size}")
                return Delta(text=self.tokenizer.decode(ids, skip_special_tokens=False), finish_reason="stop", usage=Usage())
        return None

    def _ids(self, prompt: Generate | Tokenize) -> list[int]:
        """Raises InvalidRequest, also where not exactly one form of prompt is given."""
        if isinstance(prompt, Generate) and prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.chat is not None:
            return self.tokenizer.encode_chat(prompt.chat)
        return self.tokenizer.encode(prompt.text or "", add_special_tokens=prompt.add_special_tokens)
