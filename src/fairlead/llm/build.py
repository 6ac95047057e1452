"""From a checkpoint's folder to an engine that has computed its first steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from msgspec import structs

from fairlead.core.cgroups import cgroup_free_bytes
from fairlead.core.errors import LoadError
from fairlead.core.generation import EngineInfo, KvShare, Sampling
from fairlead.core.json_files import read_json
from fairlead.core.specs import LlmSpec, SpeculationSpec
from fairlead.llm.adapters import Adapters
from fairlead.llm.blocks import BlockPool
from fairlead.llm.checkpoint import open_checkpoint, some
from fairlead.llm.cuda.runner import CudaRunner, capture_graph
from fairlead.llm.cuda.sampler import CudaSampler
from fairlead.llm.decoder import LeanDecoder
from fairlead.llm.embedder import EmbeddingEngine
from fairlead.llm.engine import Engine
from fairlead.llm.load import Decoder, Loaded, load_decoder
from fairlead.llm.lora import Layout
from fairlead.llm.parsing.answers import AnswerFormat
from fairlead.llm.parsing.choose import choose_template
from fairlead.llm.runner import Runner
from fairlead.llm.sampler import Sampler
from fairlead.llm.scheduler import Chunk, Scheduler
from fairlead.llm.sequence import Sequence
from fairlead.llm.speculation.draft_model import DraftModel, check_same_tokens
from fairlead.llm.speculation.pace import Pace
from fairlead.llm.speculation.speculation import Speculation
from fairlead.llm.tokenizer import Tokenizer

USUAL_TOKENS = 2048
"""Of one sequence, where KV memory is sized for `max_num_seqs` of them."""
SHARE_OF_FREE = 0.25
SHARE_OF_DEVICE = 0.85
"""Of the memory of a CUDA device that is free when the weights are there; what a step computes on the way takes the rest."""


def task_of(folder: Path, spec: LlmSpec) -> Literal["generate", "embed", "score"]:
    """What the checkpoint is for: as `llm.task` says, else as its files do. Raises LoadError."""
    if spec.task != "auto":
        return spec.task
    if (folder / "modules.json").is_file():  # of sentence-transformers
        return "score" if is_cross_encoder(folder) else "embed"
    architecture = open_checkpoint(folder).architecture
    if architecture.endswith("ForSequenceClassification"):
        return "score"
    return "generate" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else "embed"


def is_cross_encoder(folder: Path) -> bool:
    """Whether it is sentence-transformers' folder of one."""
    path = folder / "config_sentence_transformers.json"
    return path.is_file() and read_json(path).get("model_type") == "CrossEncoder"


def build_generator(
    folder: Path,
    spec: LlmSpec,
    *,
    threads: int = 0,
    instances: int = 1,
    device: str = "cpu",
    kv: KvShare | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Engine, Tokenizer, EngineInfo]:
    """`threads`: that compute, for a process that is the engine's own; 0 leaves all threads as they are. `instances`: of this
    model on this machine, which divide the memory for KV. `device`: as torch names it. `kv`: what it may
    take of KV memory; None: by what is free.

    Raises LoadError with one readable sentence.
    """
    overlap = overlaps(spec, device)
    if threads:
        torch.set_num_threads(threads)
    loaded = load_decoder(folder, spec, device=device)
    if threads:
        share_threads(loaded.decoder, threads)
    tokenizer = Tokenizer.load(folder, spec.chat_template)
    tokenizer.check_fits(loaded.decoder.vocab_size)
    texts = [] if tokenizer.templates is None else tokenizer.templates.texts
    draft, drafts = load_draft(folder, spec, tokenizer, loaded.max_model_len, device=device)
    num_blocks, max_model_len, reason = size_pool(
        loaded.decoder, spec, loaded.max_model_len, instances, draft=draft.decoder if draft else None, share=kv
    )
    adapters, offered = open_adapters(folder, loaded.decoder, spec)
    runner = runner_for(
        loaded.decoder,
        graphs=spec.cuda_graphs,
        layout=None if adapters is None else adapters.layout,
        num_blocks=num_blocks,
        block_size=spec.block_size,
        max_num_seqs=spec.max_num_seqs,
        max_batch_tokens=spec.max_batch_tokens,
        max_model_len=max_model_len,
    )
    warm_up(runner, spec.max_batch_tokens, max_model_len)
    scheduler = Scheduler(
        BlockPool(num_blocks, spec.block_size, prefix_caching=spec.prefix_caching),
        max_num_seqs=spec.max_num_seqs,
        max_batch_tokens=spec.max_batch_tokens,
        max_waiting=spec.max_waiting,
        max_model_len=max_model_len,
    )
    speculation = build_speculation(scheduler, spec, loaded.decoder, draft, clock)
    if threads and draft is not None:
        share_threads(draft.decoder, threads)
    template, parsed = choose_template(spec.response_template, folder, tokenizer.response_template, texts)
    engine = Engine(
        runner,
        scheduler,
        Sampler(loaded.decoder.vocab_size, native=loaded.decoder.native) if device == "cpu" else CudaSampler(loaded.decoder.vocab_size),
        tokenizer,
        max_model_len=max_model_len,
        eos_ids=ends(loaded, tokenizer),
        guides=spec.guides,
        forced_tokens=spec.forced_tokens,
        answers=AnswerFormat(template, tokenizer),
        defaults=loaded.defaults,
        adapters=adapters,
        speculation=speculation,
        overlap=overlap,
        clock=clock,
    )
    overlapped = ["overlap: the next step is planned while one computes"] if overlap else []
    info = EngineInfo(
        tasks=("generate", "tokenize"),
        max_model_len=max_model_len,
        vocab_size=loaded.decoder.vocab_size,
        architecture=loaded.architecture,
        has_chat_template=tokenizer.has_chat_template,
        tools=engine.answers.calls_tools,
        structured_output=not engine.grammars.refusal,
        num_kv_blocks=num_blocks,
        block_size=spec.block_size,
        kv_block_bytes=block_bytes_of(loaded.decoder, spec) + (block_bytes_of(draft.decoder, spec) if draft else 0),
        explain=(*loaded.explain, reason, *drafts, *offered, *overlapped, engine.grammars.explained, f"response template: {parsed}"),
    )
    return engine, tokenizer, info


def runner_for(decoder: Decoder, *, graphs: bool, **sizes: Any) -> Runner:
    """`graphs`: steps on a CUDA device are captured, where our own decoder computes them."""
    if torch.device(decoder.device).type != "cuda":
        return Runner(decoder, **sizes)
    captures = graphs and isinstance(decoder, LeanDecoder) and decoder.kernel.name == "triton"
    return CudaRunner(decoder, **sizes, capture=capture_graph() if captures else None)


def overlaps(spec: LlmSpec, device: str) -> bool:
    """Whether the next step is planned while one computes. Raises LoadError where it cannot be."""
    drafts = spec.speculation.method != "off"
    if spec.overlap == "on" and drafts:
        raise LoadError("`llm.overlap: on` cannot be heeded with `llm.speculation`: drafts are guessed from tokens that are known")
    return spec.overlap == "on" or (spec.overlap == "auto" and device != "cpu" and not drafts)


def open_adapters(folder: Path, decoder: Decoder, spec: LlmSpec) -> tuple[Adapters | None, list[str]]:
    """(None where there may be none, what is to be told of them). Raises LoadError."""
    if not spec.lora_bytes:
        return None, []
    inside = folder / spec.loras
    if not spec.loras or not inside.resolve().is_relative_to(folder.resolve()) or inside.resolve() == folder.resolve():
        raise LoadError(f"`llm.loras` is {spec.loras!r}, and must be a folder in the model's")
    layout = Layout(decoder.sites, decoder.dtype, decoder.device, native=decoder.native and decoder.device == "cpu")
    adapters = Adapters(inside, layout, max_bytes=spec.lora_bytes, max_rank=spec.max_lora_rank)
    names = adapters.names()
    if not names:
        return adapters, []
    kernel = "our own kernel" if layout.native else "torch's operators"
    return adapters, [
        f"LoRA adapters: {some(list(names))} in {spec.loras}/, up to rank {spec.max_lora_rank} and {spec.lora_bytes / 2**20:.0f} MiB, by {kernel}"
    ]


def load_draft(
    folder: Path, spec: LlmSpec, tokenizer: Tokenizer, max_model_len: int, *, device: str = "cpu"
) -> tuple[Loaded | None, list[str]]:
    """(the draft model where there is one, what is to be told of speculation). Raises LoadError."""
    wanted = spec.speculation
    if wanted.method == "off":
        return None, []
    if wanted.method == "ngram":
        return None, [f"speculation: up to {wanted.num_tokens} tokens that followed before in the same text"]
    places = (folder, folder.parent, folder.parent.parent)
    found = next((place / wanted.draft for place in places if (place / wanted.draft / "config.json").is_file()), None)
    if found is None:
        raise LoadError(
            f"`llm.speculation.draft` is {wanted.draft!r}, and there is no checkpoint of that name in the version's folder, the model's or the repository"
        )
    check_same_tokens(tokenizer, Tokenizer.load(found), wanted.draft)
    context = getattr(open_checkpoint(found).config, "max_position_embeddings", None) or max_model_len
    own = structs.replace(
        spec,
        max_model_len=min(context, max_model_len),
        decoder="graph" if spec.decoder == "graph" else "auto",
        speculation=SpeculationSpec(),
    )
    draft = load_decoder(found, own, device=device)
    tokenizer.check_fits(draft.decoder.vocab_size, f"{wanted.draft}/config.json")
    return draft, [
        f"speculation: up to {wanted.num_tokens} tokens of the draft model in {wanted.draft}",
        *(f"draft model: {line}" for line in draft.explain),
    ]


def build_speculation(
    scheduler: Scheduler, spec: LlmSpec, decoder: Decoder, draft: Loaded | None, clock: Callable[[], float]
) -> Speculation | None:
    """None where it is off. `decoder`: of the model itself."""
    if spec.speculation.method == "off":
        return None
    if clock is time.perf_counter and decoder.device == "cpu":
        clock = time.thread_time  # the processor's time, which stands still while other work has the core
    model = None
    if draft is not None:
        max_model_len = min(scheduler.max_model_len, draft.max_model_len)
        runner = runner_for(
            draft.decoder,
            graphs=False,
            num_blocks=scheduler.pool.num_blocks,
            block_size=spec.block_size,
            max_num_seqs=spec.max_num_seqs,
            max_batch_tokens=spec.max_batch_tokens,
            max_model_len=scheduler.max_model_len,
        )
        warm_up(runner, spec.max_batch_tokens, max_model_len)
        model = DraftModel(
            runner,
            scheduler.pool,
            vocab_size=decoder.vocab_size,
            max_batch_tokens=spec.max_batch_tokens,
            max_model_len=max_model_len,
            clock=clock,
        )
    return Speculation(Pace(spec.speculation.num_tokens), max_model_len=scheduler.max_model_len, model=model, clock=clock)


def ends(loaded: Loaded, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: those of the configs and, as in vLLM, the tokenizer's own, which chat models that were tuned
    without a new config end their turns with. Ids that the model has no logits for are left out."""
    return frozenset(id for id in (*loaded.eos_ids, tokenizer.eos_id) if id is not None and 0 <= id < loaded.decoder.vocab_size)


def share_threads(decoder: Decoder, threads: int) -> None:
    """Our kernels have a pool of their own; torch's operators between them would wake as many others beside it."""
    if isinstance(decoder, LeanDecoder) and decoder.native:
        torch.ops.fairlead.set_num_threads(threads)
        torch.set_num_threads(1)


def build_embedder(
    folder: Path, spec: LlmSpec, *, threads: int = 0, clock: Callable[[], float] = time.perf_counter
) -> tuple[EmbeddingEngine, Tokenizer, EngineInfo]:
    """As `build_generator`."""
    if threads:
        torch.set_num_threads(threads)
    from fairlead.llm.pooling import load_pooling  # a generator has no use for the encoders' modules

    refuse_of_generators(spec)
    model = load_pooling(folder, spec)
    tokenizer = Tokenizer.load(folder, spec.chat_template)
    tokenizer.check_fits(model.vocab_size)
    engine = EmbeddingEngine(
        model, max_batch_tokens=max(spec.max_batch_tokens, model.max_length), max_waiting=spec.max_waiting, clock=clock
    )
    info = EngineInfo(
        tasks=("embed", "tokenize"),
        max_model_len=model.max_length,
        vocab_size=model.vocab_size,
        architecture=model.architecture,
        embedding_size=model.dimensions,
        explain=model.explain,
    )
    return engine, tokenizer, info


def refuse_of_generators(spec: LlmSpec) -> None:
    """Raises LoadError for what only models that generate do."""
    wishes = (("quantization", spec.quantization != "off"), ("deterministic", spec.deterministic), ("overlap", spec.overlap == "on"))
    for key, wanted in wishes:
        if wanted:
            raise LoadError(f"`llm.{key}` is of models that generate: leave the line out")


def build_scorer(
    folder: Path, spec: LlmSpec, *, threads: int = 0, clock: Callable[[], float] = time.perf_counter
) -> tuple[EmbeddingEngine, Tokenizer, EngineInfo]:
    """As `build_generator`."""
    if threads:
        torch.set_num_threads(threads)
    from fairlead.llm.scoring import load_scoring

    refuse_of_generators(spec)
    model = load_scoring(folder, spec)
    tokenizer = Tokenizer.load(folder, spec.chat_template)
    tokenizer.check_fits(model.vocab_size)
    engine = EmbeddingEngine(
        model, max_batch_tokens=max(spec.max_batch_tokens, model.max_length), max_waiting=spec.max_waiting, clock=clock
    )
    info = EngineInfo(
        tasks=("score", "tokenize"),
        max_model_len=model.max_length,
        vocab_size=model.vocab_size,
        architecture=model.architecture,
        explain=model.explain,
    )
    return engine, tokenizer, info


def block_bytes_of(decoder: Decoder, spec: LlmSpec) -> int:
    return spec.block_size * sum(shape.nbytes(decoder.dtype) for shape in decoder.layers)


def size_pool(
    decoder: Decoder, spec: LlmSpec, context: int, instances: int = 1, *, draft: Decoder | None = None, share: KvShare | None = None
) -> tuple[int, int, str]:
    """(blocks, longest sequence in tokens, why): KV memory from a budget in bytes, that of a draft model included. `share`:
    of the server's budget for all engines; None: by what is free. Raises LoadError where it cannot hold one sequence."""
    block_bytes = block_bytes_of(decoder, spec) + (block_bytes_of(draft, spec) if draft is not None else 0)
    if spec.kv_cache_bytes:
        budget, source = spec.kv_cache_bytes, "`kv_cache_bytes`"
    else:
        usual = spec.max_num_seqs * min(context, USUAL_TOKENS) // spec.block_size * block_bytes
        budget, source = usual, f"{spec.max_num_seqs} sequences of {min(context, USUAL_TOKENS)} tokens"
        if share is None:
            part = SHARE_OF_FREE if decoder.device == "cpu" else SHARE_OF_DEVICE
            free = int(free_bytes(decoder.device) * part) // instances  # blocks become memory when they are used: the others' look free
            why = f"{part:.0%} of the free memory" + (f" for {instances} instances" if instances > 1 else "")
            share = KvShare(free, free, why)
        if share.num_bytes < usual:
            budget, source = share.num_bytes, share.why
        budget = max(budget, min(share.most, -(-context // spec.block_size) * block_bytes))  # one whole sequence, where that fits
    num_blocks = budget // block_bytes
    longest = min(context, num_blocks * spec.block_size)
    if longest < 2 or (spec.max_model_len and longest < spec.max_model_len):
        need = -(-(spec.max_model_len or 2) // spec.block_size) * block_bytes
        raise LoadError(
            f"KV memory of {budget} bytes ({source}) cannot hold one sequence of {spec.max_model_len or 2} tokens, which takes {need}: raise `llm.kv_cache_bytes` or lower `llm.max_model_len`"
        )
    reason = f"KV memory {num_blocks * block_bytes / 2**20:.0f} MiB: {num_blocks} blocks of {spec.block_size} tokens ({source})"
    if longest < context:
        reason += f"; sequences are bounded to {longest} of the checkpoint's {context} tokens"
    return num_blocks, longest, reason


def free_bytes(device: str = "cpu") -> int:
    """Memory that is free on the device, or on this machine, or in the container that this process is in."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    available, left = psutil.virtual_memory().available, cgroup_free_bytes()
    return int(available if left is None else min(available, left))


def warm_up(runner: Runner, max_batch_tokens: int, max_model_len: int) -> None:
    """Compute a prompt and a token before anybody waits for an answer: memory is touched and kernels are chosen."""
    num = max(1, min(max_batch_tokens, max_model_len - 1, 64))
    sequence = Sequence(-1, [0] * (num + 1), Sampling())
    sequence.row, sequence.blocks = 0, list(range(-(-(num + 1) // runner.block_size)))
    runner.run([Chunk(sequence, 0, num, samples=False)])
    runner.run([Chunk(sequence, num, 1, samples=True)])
