"""A checkpoint as a decoder: what the engine computes steps with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fairlead.core.errors import LoadError
from fairlead.core.specs import LlmSpec
from fairlead.llm.attention import AttentionKernel, choose
from fairlead.llm.batch import LayerCache, LayerShape, StepBatch
from fairlead.llm.checkpoint import Checkpoint, choose_dtype, load_generator, open_checkpoint
from fairlead.llm.graph import ATTENTION, GraphDecoder, check_config, freeze_rope, prove


class Decoder(Protocol):
    """Computes one step."""

    layers: tuple[LayerShape, ...]
    """KV that its layers want, one `LayerCache` each."""
    vocab_size: int
    dtype: torch.dtype
    """Of KV and logits."""
    device: str

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
    """Check the checkpoint, load it, prove that it computes right, and take the lean decoder where it computes the same.

    Raises LoadError with one sentence that names the file or what is not supported.
    """
    checkpoint = open_checkpoint(folder)
    check_config(checkpoint.config)
    max_model_len = choose_length(checkpoint, spec)
    dtype = choose_dtype(checkpoint.dtype, spec, device)
    kernel = choose(spec.kernels, device)
    model = load_generator(checkpoint, dtype, ATTENTION)
    if device != "cpu":
        model = model.to(device)
    rope = freeze_rope(model, max_model_len)
    graph = GraphDecoder(model, kernel)
    prove(graph)
    decoder, why = choose_decoder(graph, kernel, spec)
    return Loaded(
        decoder=decoder,
        architecture=checkpoint.architecture,
        max_model_len=max_model_len,
        eos_ids=checkpoint.eos_ids,
        defaults=checkpoint.defaults,
        explain=(
            f"weights: {checkpoint.num_bytes / 2**20:.0f} MiB of {_word(checkpoint.dtype)}, computed in {_word(dtype)}",
            f"attention: {kernel.name} kernels",
            *rope,
            why,
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


def choose_decoder(graph: GraphDecoder, kernel: AttentionKernel, spec: LlmSpec) -> tuple[Decoder, str]:
    """The lean decoder where it is wanted and its logits match the graph's; and the reason in words. Raises LoadError."""
    if spec.decoder == "graph":
        return graph, "decoder: transformers' graph, as `llm.decoder` says"
    lean, reason = _lean(graph, kernel)
    if lean is not None:
        return lean, f"decoder: lean ({reason})"
    if spec.decoder == "lean":
        raise LoadError(f"`llm.decoder: lean` cannot compute this checkpoint: {reason}")
    return graph, f"decoder: transformers' graph ({reason})"


def _lean(graph: GraphDecoder, kernel: AttentionKernel) -> tuple[Decoder | None, str]:
    try:
        from fairlead.llm import decoder
    except ImportError:
        return None, "there is no lean decoder yet"
    lean: Any = decoder.LeanDecoder.from_graph(graph.model, kernel)
    return lean, "its logits match the graph's"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
