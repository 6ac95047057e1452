"""From a checkpoint's folder to an engine that has computed its first steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch

from fairlead.core.cgroups import cgroup_free_bytes
from fairlead.core.errors import LoadError
from fairlead.core.generation import EngineInfo, Sampling
from fairlead.core.specs import LlmSpec
from fairlead.llm.blocks import BlockPool
from fairlead.llm.checkpoint import open_checkpoint
from fairlead.llm.decoder import LeanDecoder
from fairlead.llm.embedder import EmbeddingEngine
from fairlead.llm.engine import Engine
from fairlead.llm.load import Decoder, Loaded, load_decoder
from fairlead.llm.runner import Runner
from fairlead.llm.sampler import Sampler
from fairlead.llm.scheduler import Chunk, Scheduler
from fairlead.llm.sequence import Sequence
from fairlead.llm.tokenizer import Tokenizer

USUAL_TOKENS = 2048
"""Of one sequence, where KV memory is sized for `max_num_seqs` of them."""
SHARE_OF_FREE = 0.25


def task_of(folder: Path, spec: LlmSpec) -> Literal["generate", "embed"]:
    """What the checkpoint is for: as `llm.task` says, else as its files do. Raises LoadError."""
    if spec.task != "auto":
        return spec.task
    if (folder / "modules.json").is_file():  # of sentence-transformers
        return "embed"
    generates = open_checkpoint(folder).architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return "generate" if generates else "embed"


def build_generator(
    folder: Path, spec: LlmSpec, *, threads: int = 0, instances: int = 1, clock: Callable[[], float] = time.perf_counter
) -> tuple[Engine, Tokenizer, EngineInfo]:
    """`threads`: that compute, for a process that is the engine's own; 0 leaves all threads as they are. `instances`: of this
    model on this machine, which divide the memory for KV.

    Raises LoadError with one readable sentence.
    """
    if threads:
        torch.set_num_threads(threads)
    loaded = load_decoder(folder, spec)
    if threads:
        share_threads(loaded.decoder, threads)
    tokenizer = Tokenizer.load(folder, spec.chat_template)
    tokenizer.check_fits(loaded.decoder.vocab_size)
    num_blocks, max_model_len, reason = size_pool(loaded.decoder, spec, loaded.max_model_len, instances)
    runner = Runner(
        loaded.decoder,
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
    engine = Engine(
        runner,
        scheduler,
        Sampler(loaded.decoder.vocab_size),
        tokenizer,
        max_model_len=max_model_len,
        eos_ids=ends(loaded, tokenizer),
        defaults=loaded.defaults,
        clock=clock,
    )
    info = EngineInfo(
        tasks=("generate", "tokenize"),
        max_model_len=max_model_len,
        vocab_size=loaded.decoder.vocab_size,
        architecture=loaded.architecture,
        has_chat_template=tokenizer.has_chat_template,
        num_kv_blocks=num_blocks,
        block_size=spec.block_size,
        kv_block_bytes=block_bytes_of(loaded.decoder, spec),
        explain=(*loaded.explain, reason),
    )
    return engine, tokenizer, info


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


def block_bytes_of(decoder: Decoder, spec: LlmSpec) -> int:
    return spec.block_size * sum(shape.nbytes(decoder.dtype) for shape in decoder.layers)


def size_pool(decoder: Decoder, spec: LlmSpec, context: int, instances: int = 1) -> tuple[int, int, str]:
    """(blocks, longest sequence in tokens, why): KV memory from a budget in bytes. Raises LoadError where it cannot hold one
    sequence."""
    block_bytes = block_bytes_of(decoder, spec)
    if spec.kv_cache_bytes:
        budget, source = spec.kv_cache_bytes, "`kv_cache_bytes`"
    else:
        usual = spec.max_num_seqs * min(context, USUAL_TOKENS) // spec.block_size * block_bytes
        free = int(free_bytes() * SHARE_OF_FREE) // instances  # blocks become memory when they are used: the others' look free
        budget, source = min(usual, free), f"{spec.max_num_seqs} sequences of {min(context, USUAL_TOKENS)} tokens"
        if free < usual:
            source = f"{SHARE_OF_FREE:.0%} of the free memory" + (f" for {instances} instances" if instances > 1 else "")
        budget = max(budget, min(free, -(-context // spec.block_size) * block_bytes))  # one whole sequence, where that fits
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


def free_bytes() -> int:
    """Memory that is free on this machine, or in the container that this process is in."""
    available, left = psutil.virtual_memory().available, cgroup_free_bytes()
    return int(available if left is None else min(available, left))


def warm_up(runner: Runner, max_batch_tokens: int, max_model_len: int) -> None:
    """Compute a prompt and a token before anybody waits for an answer: memory is touched and kernels are chosen."""
    num = max(1, min(max_batch_tokens, max_model_len - 1, 64))
    sequence = Sequence(-1, [0] * (num + 1), Sampling())
    sequence.row, sequence.blocks = 0, list(range(-(-(num + 1) // runner.block_size)))
    runner.run([Chunk(sequence, 0, num, samples=False)])
    runner.run([Chunk(sequence, num, 1, samples=True)])
