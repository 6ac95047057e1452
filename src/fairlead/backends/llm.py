"""Language models and embedders: Fairlead's own engines on a thread of their own, with a tokenizer on another before them."""

import time
from pathlib import Path

import structlog
from msgspec import structs

from fairlead.backends.base import EngineBackend
from fairlead.backends.engine_thread import EngineThread, When
from fairlead.core.errors import InvalidRequest, LoadError, Unsupported
from fairlead.core.generation import Delta, Detokenize, Embed, EngineInfo, Generate, Paint, Prompt, Tokenize, Usage
from fairlead.core.specs import ModelSpec
from fairlead.llm.build import build_embedder, build_generator, task_of
from fairlead.llm.embedder import EmbeddingEngine
from fairlead.llm.engine import Engine
from fairlead.llm.tokenizer import Tokenizer

log = structlog.get_logger("fairlead.llm")


class LlmBackend(EngineBackend):
    def load_engine(self, artefact: Path, spec: ModelSpec, threads: int, version: str = "") -> "LlmThread":
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
        return LlmThread(engine, tokenizer, info)


BACKEND = LlmBackend()


class LlmThread(EngineThread):
    """What its reader does is tokenize."""

    def __init__(self, engine: Engine | EmbeddingEngine, tokenizer: Tokenizer, info: EngineInfo) -> None:
        super().__init__(engine, info)
        self.engine = engine
        self.tokenizer = tokenizer

    def add(self, work: int, read: Generate | Embed, when: When) -> None:
        match self.engine, read:
            case Engine() as engine, Generate(token_ids=list(ids)):
                engine.add(work, ids, read.sampling, salt=read.salt, stream=read.stream, **when)
            case EmbeddingEngine() as engine, Embed(token_ids=list(ids)):
                engine.add(work, ids, read.dimensions, **when)

    def read(self, prompt: Prompt) -> Generate | Embed | Delta:
        """The prompt as token ids, or the answer to one that needs no step."""
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
