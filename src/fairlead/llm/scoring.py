"""Scores: how well one text answers another, one number for each pair, from a cross-encoder that reads both together.

Reads checkpoints of `...ForSequenceClassification` with one label, plain or as sentence-transformers saves a CrossEncoder, and gives the
scores that its `predict` gives.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fairlead.core.errors import ContextExceeded, InvalidRequest, LoadError
from fairlead.core.json_files import read_json
from fairlead.core.specs import LlmSpec
from fairlead.llm.checkpoint import Checkpoint, choose_dtype, load_model, open_checkpoint, quiet
from fairlead.llm.embedder import Pair
from fairlead.llm.pooling import buckets, check_config, longest_text

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Sigmoid": torch.sigmoid,
    "Identity": lambda scores: scores,
    "Tanh": torch.tanh,
}
"""By the last word of what the files name, torch's modules."""


class ScoringModel:
    """Pairs in, scores out. Not thread-safe: one batch at a time."""

    dimensions = 1
    """To the embedding engine a score is a vector of one number."""

    def __init__(
        self, model: Any, activation: str, *, typed: bool, max_length: int, architecture: str, explain: tuple[str, ...] = ()
    ) -> None:
        """`activation`: of ACTIVATIONS. `typed`: the model is told which tokens are of which text."""
        self.model = model
        self.activation = activation
        self.max_length = max_length
        """Tokens of both texts together."""
        self.architecture = architecture
        self.explain = explain
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self._pad_id = model.config.pad_token_id or 0
        self._typed = typed

    def check(self, pair: Pair) -> None:
        """Raises InvalidRequest for a pair that cannot be scored."""
        if len(pair) > self.max_length:
            raise ContextExceeded(
                f"this model's maximum context length is {self.max_length} tokens, but the two texts have {len(pair)} together: "
                "shorten one, or set `truncate_prompt_tokens`"
            )
        if not pair.ids:
            raise InvalidRequest("both texts are empty")

    def embed(self, pairs: Sequence[Pair]) -> np.ndarray:
        """float32 [len(pairs), 1]. Raises InvalidRequest."""
        for pair in pairs:
            self.check(pair)
        scores = np.empty((len(pairs), 1), np.float32)
        activate = ACTIVATIONS[self.activation]
        with torch.inference_mode():
            for batch in buckets([len(pair) for pair in pairs]):
                logits_S1 = self._forward([pairs[i] for i in batch]).float()
                raw_S1 = torch.tensor([[pairs[i].raw] for i in batch])
                scores[batch] = torch.where(raw_S1, logits_S1, activate(logits_S1)).numpy()
        return scores

    def _forward(self, pairs: list[Pair]) -> torch.Tensor:
        longest = max(map(len, pairs))
        lens_S = torch.tensor([len(pair) for pair in pairs])
        mask_ST = (torch.arange(longest) < lens_S[:, None]).to(torch.int64)
        inputs = {"input_ids": _padded([pair.ids for pair in pairs], self._pad_id, longest), "attention_mask": mask_ST}
        if self._typed:
            inputs["token_type_ids"] = _padded([pair.types for pair in pairs], 0, longest)
        logits: torch.Tensor = self.model(**inputs).logits
        return logits


def _padded(rows: list[list[int]], value: int, length: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


# Reading a folder


def load_scoring(folder: Path, spec: LlmSpec) -> ScoringModel:
    """Raises LoadError with one sentence that names the file or what is not supported."""
    checkpoint = open_checkpoint(folder)
    check_config(checkpoint, "scores come from an encoder")
    who = f"{checkpoint.architecture} ({checkpoint.config.model_type})"
    if not checkpoint.architecture.endswith("ForSequenceClassification"):
        raise LoadError(f"{who} is not supported: scores of pairs come from a model of ...ForSequenceClassification")
    if checkpoint.config.num_labels != 1:
        raise LoadError(f"{who} has {checkpoint.config.num_labels} labels: a score needs a model with one")
    activation, source = read_activation(checkpoint)
    dtype = choose_dtype(checkpoint.dtype, spec, "cpu")
    model = load_model(transformers.AutoModelForSequenceClassification, checkpoint, dtype, None)
    max_length = longest_text(checkpoint, model, spec)
    loaded = ScoringModel(
        model,
        activation,
        typed="token_type_ids" in _input_names(folder),
        max_length=max_length,
        architecture=checkpoint.architecture,
        explain=(
            f"weights: {checkpoint.num_bytes / 2**20:.0f} MiB, computed in {str(dtype).removeprefix('torch.')}",
            f"scores: {activation} of the logit ({source})",
            f"pairs of at most {max_length} tokens together",
        ),
    )
    _try(loaded)
    return loaded


def _input_names(folder: Path) -> Sequence[str]:
    """What the model is given, as transformers decides it: by the class of the tokenizer, unless a file says it. Raises LoadError."""
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever somebody else's files make it raise
        raise LoadError(f"{folder.name} has a tokenizer that transformers cannot load: {error}") from error
    names: Sequence[str] = tokenizer.model_input_names
    return names


def read_activation(checkpoint: Checkpoint) -> tuple[str, str]:
    """(its name in ACTIVATIONS, the file that says so), as sentence-transformers looks for it. Raises LoadError."""
    folder, config = checkpoint.folder, checkpoint.config
    named: list[tuple[Any, str]] = []
    name = "config_sentence_transformers.json"
    if (folder / name).is_file():
        content = read_json(folder / name)
        if content.get("default_prompt_name"):
            raise LoadError(f"{folder.name}/{name}: `default_prompt_name` is not supported for models that score")
        named.append((content.get("activation_fn"), name))
    named.append(((getattr(config, "sentence_transformers", None) or {}).get("activation_fn"), "config.json"))
    named.append((getattr(config, "sbert_ce_default_activation_function", None), "config.json"))
    for path, source in named:
        if path is None:
            continue
        kind = str(path).rpartition(".")[2]
        if kind not in ACTIVATIONS or not str(path).startswith("torch."):
            raise LoadError(f"{folder.name}/{source}: the activation {path!r} is not supported: {', '.join(ACTIVATIONS)} of torch are")
        return kind, source
    return "Sigmoid", "usual for one label"


def _try(model: ScoringModel) -> None:
    """Two pairs of different length: what is wrong with the graph shows now and not to the first caller. Raises LoadError."""
    pairs = [Pair([1] * length, [0] * length, raw=True) for length in (1, min(2, model.max_length))]
    try:
        with quiet():
            scores = model.embed(pairs)
    except Exception as error:  # whatever a graph of somebody else's raises
        raise LoadError(f"{model.architecture} is not supported: its graph fails ({type(error).__name__}: {error})") from error
    if not np.isfinite(scores).all():
        raise LoadError(f"{model.architecture} gives scores that are not finite: its weights are damaged")
