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
from fairlead.llm.decoder import PROBE_TOKENS, LeanDecoder, probe
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
    """Check the checkpoint, load it, and take the lean decoder where it computes the same as transformers' graph.

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
    decoder, why = choose_decoder(model, kernel, spec, max_model_len)
    return Loaded(
        decoder=decoder,
        architecture=checkpoint.architecture,
        max_model_len=max_model_len,
        eos_ids=checkpoint.eos_ids,
        defaults=checkpoint.defaults,
        explain=(
            f"weights: {checkpoint.num_bytes / 2**20:.0f} MiB of {_word(checkpoint.dtype)}, computed in {_word(dtype)}",
            f"decoder: {why}",
            f"attention: {kernel.name} kernels",
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


def choose_decoder(model: Any, kernel: AttentionKernel, spec: LlmSpec, max_model_len: int) -> tuple[Decoder, str]:
    """The lean decoder where it is wanted and its logits match transformers'; and why, in words. Raises LoadError."""
    reason = "as `llm.decoder` says"
    if spec.decoder != "graph":
        lean = LeanDecoder.from_graph(model, kernel, max_model_len=max(max_model_len, PROBE_TOKENS))
        reason = lean if isinstance(lean, str) else probe(model, lean)
        if not reason:
            assert isinstance(lean, LeanDecoder)
            return lean, "lean: its logits match those of transformers' graph"
        if spec.decoder == "lean":
            raise LoadError(f"`llm.decoder: lean` cannot compute this checkpoint ({reason}): leave the line out")
    graph = GraphDecoder(model, kernel)
    prove(graph)
    return graph, f"transformers' graph: {reason}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
