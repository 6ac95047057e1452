"""Language models and embedders: Fairlead's own engines on a thread of their own, with a tokenizer on another before them."""

import time
from pathlib import Path
from typing import NamedTuple

import structlog
import torch
from msgspec import structs

from fairlead.backends.base import EngineBackend
from fairlead.backends.engine_thread import EngineThread, When
from fairlead.core.errors import InvalidRequest, LoadError, NotFound, Unsupported
from fairlead.core.generation import Delta, Detokenize, Embed, EngineInfo, Generate, Guide, KvShare, Paint, Prompt, Score, Tokenize, Usage
from fairlead.core.specs import ModelSpec
from fairlead.llm.adapters import Use
from fairlead.llm.build import build_embedder, build_generator, build_scorer, task_of
from fairlead.llm.embedder import EmbeddingEngine, Pair
from fairlead.llm.engine import Engine
from fairlead.llm.grammar import Grammar
from fairlead.llm.parsing.answers import Parsing, own_guides
from fairlead.llm.parsing.guide import needs_grammar
from fairlead.llm.tokenizer import Tokenizer

log = structlog.get_logger("fairlead.llm")


class LlmBackend(EngineBackend):
    def load_engine(self, artefact: Path, spec: ModelSpec, threads: int, version: str = "", kv: KvShare | None = None) -> "LlmThread":
        started = time.perf_counter()
        device, task = spec.instances.device, task_of(artefact, spec.llm)
        if device != "cpu":
            check_device(device, task)
        engine: Engine | EmbeddingEngine
        match task:
            case "embed":
                engine, tokenizer, info = build_embedder(artefact, spec.llm, threads=threads)
            case "score":
                engine, tokenizer, info = build_scorer(artefact, spec.llm, threads=threads)
            case "generate":
                engine, tokenizer, info = build_generator(
                    artefact, spec.llm, threads=threads, instances=spec.instances.count, device=device, kv=kv
                )
        for line in info.explain:
            log.info("explain", model=spec.name, chosen=line)
        log.info("engine loaded", model=spec.name, seconds=round(time.perf_counter() - started, 2))
        return LlmThread(engine, tokenizer, info)


BACKEND = LlmBackend()


def check_device(device: str, task: str) -> None:
    """Raises LoadError where a model of the task cannot compute there."""
    if task != "generate":
        raise LoadError(f"`instances.device: {device}` cannot be heeded: models that {task} compute on `cpu` for now")
    kind, _, index = device.partition(":")
    if kind != "cuda":
        raise LoadError(f"`instances.device: {device}` cannot be heeded: language models compute on `cpu` or `cuda`")
    if int(index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise LoadError(f"`instances.device: {device}` cannot be heeded: torch {torch.__version__} finds {found} CUDA devices")


class Ready(NamedTuple):
    """What is read of a request to generate."""

    prompt: Generate
    """As token ids."""
    adapter: Use | None = None
    grammar: Grammar | None = None
    parsing: Parsing | None = None


class LlmThread(EngineThread):
    """What its reader does is tokenize."""

    def __init__(self, engine: Engine | EmbeddingEngine, tokenizer: Tokenizer, info: EngineInfo) -> None:
        super().__init__(engine, info)
        self.engine = engine
        self.tokenizer = tokenizer

    def add(self, work: int, read: Ready | Embed | Pair, when: When) -> None:
        match self.engine, read:
            case Engine() as engine, Ready(Generate(token_ids=list(ids)) as prompt, adapter, grammar, parsing):
                sampling, salt, stream = prompt.sampling, prompt.salt, prompt.stream
                engine.add(work, ids, sampling, salt=salt, stream=stream, adapter=adapter, grammar=grammar, parsing=parsing, **when)
            case EmbeddingEngine() as engine, Embed(token_ids=list(ids)):
                engine.add(work, ids, read.dimensions, **when)
            case EmbeddingEngine() as engine, Pair():
                engine.add(work, read, None, **when)

    def sleep(self) -> None:
        if isinstance(self.engine, EmbeddingEngine):
            super().sleep()
        else:
            self.engine.sleep()

    def wake(self) -> None:
        if isinstance(self.engine, EmbeddingEngine):
            super().wake()
        else:
            self.engine.wake()

    def takes_long(self, prompt: Prompt) -> bool:
        """A grammar must be compiled first."""
        if not isinstance(prompt, Generate) or not isinstance(self.engine, Engine):
            return False
        tools = [] if prompt.chat is None else prompt.chat.tools
        if tools:
            return prompt.guide is not None or needs_grammar(tools, prompt.tool_choice)
        forms = self.engine.answers.forms(prompt)
        return bool(forms) and not any(map(self.engine.grammars.known, forms))

    def read(self, prompt: Prompt) -> Ready | Embed | Pair | Delta:
        """The prompt as token ids, or the answer to one that needs no step."""
        match prompt:
            case Generate():
                if not isinstance(self.engine, Engine):
                    raise Unsupported(f"this model {self._does}: it does not generate text")
                return self._ready(self.engine, prompt)
            case Embed():
                if "embed" not in self.info.tasks:
                    wish = " (`llm: {task: embed}` in its model.yaml makes it)" * isinstance(self.engine, Engine)
                    raise Unsupported(f"this model {self._does}: it does not embed{wish}")
                return (
                    prompt if prompt.token_ids is not None else structs.replace(prompt, token_ids=self.tokenizer.encode(prompt.text or ""))
                )
            case Score(text=text, pair=pair, max_tokens=limit):
                if "score" not in self.info.tasks:
                    raise Unsupported(f"this model {self._does}: it does not score pairs of texts")
                room = self.info.max_model_len
                return Pair(*self.tokenizer.encode_pair(text, pair, None if limit is None else min(limit or room, room)), raw=prompt.raw)
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

    @property
    def _does(self) -> str:
        return "generates" if isinstance(self.engine, Engine) else "scores pairs of texts" if "score" in self.info.tasks else "embeds"

    def _ready(self, engine: Engine, prompt: Generate) -> Ready:
        adapter = self._adapter(prompt.adapter) if prompt.adapter else None
        if prompt.token_ids is not None or prompt.chat is None:
            grammar = engine.grammars.compile(prompt.guide) if prompt.guide is not None else None
            return Ready(structs.replace(prompt, token_ids=self._ids(prompt)), adapter, grammar)
        rendered = self.tokenizer.render(prompt.chat)
        parsing, guide = engine.answers.read(prompt, rendered)
        grammar = self._grammar(engine, prompt, guide) if guide is not None else None
        ids = self.tokenizer.encode(rendered, add_special_tokens=False)
        return Ready(structs.replace(prompt, token_ids=ids), adapter, grammar, parsing)

    def _grammar(self, engine: Engine, prompt: Generate, guide: Guide) -> Grammar:
        try:
            return engine.grammars.compile(guide)
        except InvalidRequest:
            for own in own_guides(prompt):  # whichever of them is at fault tells it better
                engine.grammars.compile(own)
            raise

    def _adapter(self, name: str) -> Use:
        """Raises NotFound, ModelError or Unavailable."""
        adapters = self.engine.adapters if isinstance(self.engine, Engine) else None
        if adapters is None:
            raise NotFound(f"the model has no adapter '{name[:64]}': `llm.lora_bytes` is 0")
        return adapters.take(name)

    def _ids(self, prompt: Generate | Tokenize) -> list[int]:
        """Raises InvalidRequest, also where not exactly one form of prompt is given."""
        if isinstance(prompt, Generate) and prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.chat is not None:
            return self.tokenizer.encode_chat(prompt.chat)
        return self.tokenizer.encode(prompt.text or "", add_special_tokens=prompt.add_special_tokens)
