"""A checkpoint as a decoder: what the engine computes steps with."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fairlead.core.errors import LoadError
from fairlead.core.specs import LlmSpec
from fairlead.llm.attention import AttentionKernel, NativeAttention, choose
from fairlead.llm.batch import LayerCache, LayerShape, StepBatch, new_cache
from fairlead.llm.checkpoint import Checkpoint, choose_dtype, load_generator, open_checkpoint
from fairlead.llm.decoder import PREPARE, PROBE_TOKENS, LeanDecoder, probe
from fairlead.llm.graph import ATTENTION, GraphDecoder, check_config, freeze_rope, prove
from fairlead.llm.lora import Site
from fairlead.llm.quant import borrow, fidelity, probe_ids, quantize_graph


class Decoder(Protocol):
    """Computes one step."""

    layers: tuple[LayerShape, ...]
    """KV that its layers want, one `LayerCache` each."""
    vocab_size: int
    dtype: torch.dtype
    """Of KV and logits."""
    device: str
    native: bool
    """By our own kernels."""
    sites: tuple[Site, ...]
    """What LoRA adapters may add to."""

    def __call__(self, batch: StepBatch, cache: list[LayerCache]) -> torch.Tensor:
        """Logits [N, V] of `batch.logit_rows_N`; K and V of the batch's tokens are in `cache` afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A language model, ready to compute."""

    decoder: Decoder
    architecture: str
    max_model_len: int
    """The checkpoint's context, or less where `llm.max_model_len` says so."""
    eos_ids: tuple[int, ...]
    defaults: dict[str, float]
    """Sampling that generation_config.json asks for."""
    explain: tuple[str, ...]
    """What was chosen, and why."""


def load_decoder(folder: Path, spec: LlmSpec, *, device: str = "cpu") -> Loaded:
    """Check the checkpoint, load it, and take the lean decoder where it computes the same as transformers' graph.

    Raises LoadError with one sentence that names the file or what is not supported.
    """
    checkpoint = open_checkpoint(folder)
    check_config(checkpoint.config)
    max_model_len = choose_length(checkpoint, spec)
    dtype = choose_dtype(checkpoint.dtype, spec, device)
    kernel = choose_kernel(spec, device)
    model = load_generator(checkpoint, dtype, ATTENTION)
    if device != "cpu":
        model = model.to(device)
    rope = freeze_rope(model, max_model_len)
    decoder, why = choose_decoder(model, kernel, spec, max_model_len, probe_ids(folder, len(model.get_input_embeddings().weight)))
    return Loaded(
        decoder=decoder,
        architecture=checkpoint.architecture,
        max_model_len=max_model_len,
        eos_ids=checkpoint.eos_ids,
        defaults=checkpoint.defaults,
        explain=(
            f"weights: {checkpoint.num_bytes / 2**20:.0f} MiB of {_word(checkpoint.dtype)}, computed in {_word(dtype)}",
            *why,
            f"attention: {kernel.name} kernels",
            *(["deterministic: what is computed beside a request does not change a bit of its answer"] if spec.deterministic else []),
            *rope,
        ),
    )


def choose_length(checkpoint: Checkpoint, spec: LlmSpec) -> int:
    """Raises LoadError where more is wanted than the checkpoint has positions for."""
    context = getattr(checkpoint.config, "max_position_embeddings", None)
    if not context:
        if spec.max_model_len:
            return spec.max_model_len
        raise LoadError(f"{checkpoint.folder.name}/config.json has no `max_position_embeddings`: set `llm.max_model_len`")
    if spec.max_model_len > context:
        raise LoadError(
            f"`llm.max_model_len` is {spec.max_model_len}, but {checkpoint.folder.name}/config.json has positions for {context} tokens (`max_position_embeddings`)"
        )
    return int(spec.max_model_len or context)


def choose_kernel(spec: LlmSpec, device: str) -> AttentionKernel:
    """Raises LoadError where `deterministic` is wanted and cannot be had."""
    kernel = choose(spec.kernels, device)
    if not spec.deterministic:
        return kernel
    if spec.decoder == "graph":
        raise LoadError("`llm.deterministic` needs the lean decoder, and `llm.decoder` is graph")
    if not isinstance(kernel, NativeAttention):
        raise LoadError(f"`llm.deterministic` needs the C++ kernels on a CPU, and this model computes by {kernel.name} kernels on {device}")
    return NativeAttention(fixed=True)


def choose_decoder(
    model: Any, kernel: AttentionKernel, spec: LlmSpec, max_model_len: int, text: tuple[torch.Tensor, str]
) -> tuple[Decoder, list[str]]:
    """The lean decoder where it is wanted and its logits match transformers'; and why, in words.

    `text`: tokens on which a quantised decoder is compared with what it was before, and what they are. Raises LoadError.
    """
    reason = "as `llm.decoder` says"
    if spec.decoder != "graph":
        lean = functools.partial(LeanDecoder.from_graph, model, kernel, max_model_len=max(max_model_len, PROBE_TOKENS))
        # What is quantised is compared with what was found to be right: a decoder that borrows the model's weights.
        decoder = lean(prepare=PREPARE["off"] if spec.quantization == "off" else borrow)
        reason = decoder if isinstance(decoder, str) else probe(model, decoder)
        if not reason:
            assert isinstance(decoder, LeanDecoder)
            why = ["decoder: lean: its logits match those of transformers' graph"]
            if spec.quantization == "off":
                if kernel.name == "native":  # its linear layers are copies
                    decoder.let_go()
                return decoder, why
            began = time.perf_counter()
            before_NV = logits_of(decoder, text[0])
            quantized = lean(prepare=PREPARE[spec.quantization])
            assert isinstance(quantized, LeanDecoder)
            found = fidelity(before_NV, logits_of(quantized, text[0]), text[1])
            quantized.let_go()
            why.append(f"quantization: {spec.quantization}, all but the embeddings, in {time.perf_counter() - began:.1f} s: {found}")
            return quantized, why
        for key, wanted in (("decoder: lean", spec.decoder == "lean"), ("deterministic", spec.deterministic)):
            if wanted:
                raise LoadError(f"`llm.{key}` cannot compute this checkpoint ({reason}): leave the line out")
    graph = GraphDecoder(model, kernel)
    prove(graph)
    why = [f"decoder: transformers' graph: {reason}"]
    if spec.quantization != "off":
        began = time.perf_counter()
        before_NV = logits_of(graph, text[0])
        share = quantize_graph(model, native=kernel.name == "native")
        found = fidelity(before_NV, logits_of(graph, text[0]), text[1])
        why.append(
            f"quantization: {spec.quantization}, linear layers with {share:.0%} of the parameters, in {time.perf_counter() - began:.1f} s: {found}"
        )
    return graph, why


def logits_of(decoder: Decoder, ids_T: torch.Tensor) -> torch.Tensor:
    """[T, V] of one text, computed in one step."""
    num_tokens, block_size = len(ids_T), 16
    num_blocks = -(-num_tokens // block_size)
    ids_T = ids_T.to(decoder.device)
    positions_T = torch.arange(num_tokens, device=decoder.device)
    batch = StepBatch(
        input_ids_T=ids_T,
        positions_T=positions_T,
        slots_T=positions_T,
        query_starts_S1=torch.tensor([0, num_tokens], dtype=torch.int32, device=decoder.device),
        context_lens_S=torch.tensor([num_tokens], dtype=torch.int32, device=decoder.device),
        block_tables_SB=torch.arange(num_blocks, dtype=torch.int32, device=decoder.device)[None],
        logit_rows_N=positions_T,
        max_query_len=num_tokens,
        max_context_len=num_tokens,
    )
    with torch.inference_mode():
        return decoder(batch, new_cache(decoder.layers, num_blocks, block_size, decoder.dtype, decoder.device))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
