"""Embeddings: one vector for a text, pooled from what an encoder or a decoder makes of its tokens.

Reads sentence-transformers' folders (`modules.json`: Transformer, Pooling, Normalize) and plain checkpoints, and gives the
vectors that sentence-transformers' `encode` gives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from msgspec import Struct

from fairlead.core.errors import ContextExceeded, InvalidRequest, LoadError
from fairlead.core.json_files import read_json
from fairlead.core.specs import LlmSpec
from fairlead.llm.checkpoint import Checkpoint, choose_dtype, load_model, open_checkpoint, quiet

Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

OLD_MODES: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of sentence-transformers before 6, in the order in which several are joined."""

HEADS = ("pooler.", "lm_head.", "cls.", "classifier.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "predictions.")
"""Parts on top of a body that pooling does not use: a checkpoint may have them or not."""

MAX_BATCH_TOKENS = 4096
"""Of one forward, padding included."""
MAX_PADDING = 0.25
"""Share of the longest text by which another of the same forward may be shorter: padding costs as much as tokens."""


class _Module(Struct):
    """A row of modules.json."""

    type: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a folder says that its vectors are made."""

    modes: tuple[Mode, ...]
    """Several are joined one after another."""
    normalize: bool
    source: str
    """The file that says so, or why it was chosen."""


class PoolingModel:
    """Token ids in, vectors out. Not thread-safe: one batch at a time."""

    def __init__(self, model: Any, pooling: Pooling, *, max_length: int, architecture: str, explain: tuple[str, ...] = ()) -> None:
        self.model = model
        self.pooling = pooling
        self.max_length = max_length
        """Tokens of one text."""
        self.architecture = architecture
        self.explain = explain
        config = model.config.get_text_config()
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self.dimensions: int = config.hidden_size * len(pooling.modes)
        """Length of a vector."""
        pad_id = getattr(config, "pad_token_id", None) or 0
        self._pad_id = pad_id if 0 <= pad_id < self.vocab_size else 0  # -1 says that there is none; the mask hides any

    def check(self, ids: Sequence[int]) -> None:
        """Raises InvalidRequest for a text that cannot be embedded."""
        if not ids:
            raise InvalidRequest("the input is empty: it must have at least one token")
        if len(ids) > self.max_length:
            raise ContextExceeded(
                f"this model's maximum context length is {self.max_length} tokens, but the input has {len(ids)}: shorten it"
            )
        if max(ids) >= self.vocab_size or min(ids) < 0:
            raise InvalidRequest(f"the input holds token ids outside the vocabulary of {self.vocab_size}")

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [len(texts), dimensions]. Raises InvalidRequest."""
        for ids in texts:
            self.check(ids)
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        with torch.inference_mode():
            for batch in buckets([len(ids) for ids in texts]):
                vectors[batch] = self._forward([texts[i] for i in batch]).float().cpu().numpy()
        return vectors

    def _forward(self, texts: list[Sequence[int]]) -> torch.Tensor:
        lens_S = torch.tensor([len(ids) for ids in texts])
        longest = int(lens_S.max())
        ids_ST = torch.tensor([[*ids, *[self._pad_id] * (longest - len(ids))] for ids in texts])
        mask_ST = (torch.arange(longest) < lens_S[:, None]).to(torch.int64)
        device = self.model.device
        ids_ST, mask_ST = ids_ST.to(device), mask_ST.to(device)
        hidden_STC = self.model(input_ids=ids_ST, attention_mask=mask_ST).last_hidden_state
        pooled_SC = torch.cat([pool(hidden_STC.float(), mask_ST, mode) for mode in self.pooling.modes], -1)
        return F.normalize(pooled_SC, dim=-1) if self.pooling.normalize else pooled_SC


def pool(hidden_STC: torch.Tensor, mask_ST: torch.Tensor, mode: Mode) -> torch.Tensor:
    """[S, C] of texts padded on the right; `mask_ST` is 1 for their tokens."""
    weights_ST1 = mask_ST.to(hidden_STC.dtype)[:, :, None]
    lens_S1 = weights_ST1.sum(1)
    match mode:
        case "cls":
            return hidden_STC[:, 0]
        case "lasttoken":
            return hidden_STC[torch.arange(len(hidden_STC), device=hidden_STC.device), mask_ST.sum(1) - 1]
        case "max":
            return hidden_STC.masked_fill(weights_ST1 == 0, float("-inf")).amax(1)
        case "mean":
            return (hidden_STC * weights_ST1).sum(1) / lens_S1
        case "mean_sqrt_len_tokens":
            return (hidden_STC * weights_ST1).sum(1) / lens_S1.sqrt()
        case "weightedmean":
            weights_ST1 = weights_ST1 * torch.arange(1, mask_ST.shape[1] + 1, device=mask_ST.device)[:, None]
            return (hidden_STC * weights_ST1).sum(1) / weights_ST1.sum(1)


def buckets(lens: Sequence[int], max_tokens: int = MAX_BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of texts that run together: of like length, within `max_tokens` with the padding; each at least alone."""
    batch: list[int] = []
    for i in sorted(range(len(lens)), key=lambda i: -lens[i]):
        if batch and ((len(batch) + 1) * lens[batch[0]] > max_tokens or lens[i] < (1 - MAX_PADDING) * lens[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# Reading a folder


def load_pooling(folder: Path, spec: LlmSpec, *, device: str = "cpu") -> PoolingModel:
    """Raises LoadError with one sentence that names the file or what is not supported."""
    checkpoint = open_checkpoint(folder)
    check_config(checkpoint, "embeddings come from an encoder or a decoder")
    pooling = read_pooling(folder, checkpoint.config)
    dtype = choose_dtype(checkpoint.dtype, spec, device)
    model = load_model(transformers.AutoModel, checkpoint, dtype, None, optional=HEADS)
    if device != "cpu":
        model = model.to(device)
    max_length = longest_text(checkpoint, model, spec)
    loaded = PoolingModel(
        model,
        pooling,
        max_length=max_length,
        architecture=checkpoint.architecture,
        explain=(
            f"weights: {checkpoint.num_bytes / 2**20:.0f} MiB, computed in {str(dtype).removeprefix('torch.')}",
            f"pooling: {' and '.join(pooling.modes)}{', normalised' if pooling.normalize else ''} ({pooling.source})",
            f"texts of at most {max_length} tokens",
        ),
    )
    _try(loaded)
    return loaded


def check_config(checkpoint: Checkpoint, needed: str) -> None:
    """Raises LoadError."""
    config = checkpoint.config
    who = f"{checkpoint.architecture} ({config.model_type})"
    if config.is_encoder_decoder:
        raise LoadError(f"{who} is not supported: {needed}, and it has an encoder and a decoder")
    if config.get_text_config() is not config:
        raise LoadError(f"{who} is not supported: it is multimodal; serve a checkpoint of its text model alone")


def _try(model: PoolingModel) -> None:
    """Two texts of different length: what is wrong with the graph shows now and not to the first caller. Raises LoadError."""
    short, long = [[1] * n for n in (1, min(2, model.max_length))]
    try:
        with quiet():
            vectors = model.embed([short, long])
    except Exception as error:  # whatever a graph of somebody else's raises
        raise LoadError(f"{model.architecture} is not supported: its graph fails ({type(error).__name__}: {error})") from error
    if not np.isfinite(vectors).all():
        raise LoadError(f"{model.architecture} gives vectors that are not finite: its weights are damaged")


def read_pooling(folder: Path, config: Any) -> Pooling:
    """What modules.json asks for; without one, the mean of an encoder or the last token of a decoder. Raises LoadError."""
    path = folder / "modules.json"
    if not path.exists():
        causal = config.architectures[0].endswith(("ForCausalLM", "LMHeadModel")) or getattr(config, "is_decoder", False)
        mode: Mode = "lasttoken" if causal else "mean"
        return Pooling((mode,), normalize=True, source=f"no modules.json: usual for {'a decoder' if causal else 'an encoder'}")
    try:
        modules = msgspec.json.decode(path.read_bytes(), type=list[_Module])
    except (msgspec.DecodeError, OSError) as error:
        raise LoadError(f"{folder.name}/modules.json: {error}") from error
    kinds = [module.type.rpartition(".")[2] for module in modules]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise LoadError(
                f"{folder.name}/modules.json has a {kind} module, which is not supported: Transformer, Pooling and Normalize are"
            )
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise LoadError(
            f"{folder.name}/modules.json must list a Transformer, a Pooling and at most a Normalize module, not {', '.join(kinds)}"
        )
    if modules[0].path not in ("", "."):
        raise LoadError(
            f"{folder.name}/modules.json has its Transformer in {modules[0].path!r}, which is not supported: it must lie in the folder itself"
        )
    modes = _read_modes(folder / modules[1].path / "config.json")
    return Pooling(modes, normalize="Normalize" in kinds, source="modules.json")


def _read_modes(path: Path) -> tuple[Mode, ...]:
    raw = read_json(path)
    asked = raw.get("pooling_mode", [mode for key, mode in OLD_MODES.items() if raw.get(key)] or "mean")
    modes = (asked,) if isinstance(asked, str) else tuple(asked)
    for mode in modes:
        if mode not in get_args(Mode):
            raise LoadError(f"{path.parent.name}/config.json: the pooling mode {mode!r} is not supported: {', '.join(get_args(Mode))} are")
    return modes


def longest_text(checkpoint: Checkpoint, model: Any, spec: LlmSpec) -> int:
    """In tokens: the least of what the files say. Raises LoadError where more is wanted."""
    folder = checkpoint.folder
    known = [_positions(checkpoint.config, model)]
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        if (folder / name).exists():
            length = read_json(folder / name).get(key)
            known.append(int(length) if length and length < 1e9 else None)  # tokenizers without a bound say 1e30
    longest = min((length for length in known if length), default=0) or spec.max_model_len
    if not longest:
        raise LoadError(f"{folder.name} does not say how long a text may be: set `llm.max_model_len`")
    if spec.max_model_len > longest:
        raise LoadError(
            f"`llm.max_model_len` is {spec.max_model_len}, but the checkpoint {folder.name} takes texts of at most {longest} tokens"
        )
    return spec.max_model_len or longest


def _positions(config: Any, model: Any) -> int | None:
    """Tokens that the model has positions for."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from the padding's id on
        if positions and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - int(module.padding_idx) - 1
    return positions
