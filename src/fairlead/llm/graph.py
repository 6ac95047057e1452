"""The universal path: transformers' own model graph, with attention over our paged KV.

transformers lets attention be registered by name (`AttentionInterface`); no mask function is registered for it, so that
the models build none. A step is one flat batch `[1, T]` of all sequences' tokens; positions tell them apart for the
rotary embedding, the block tables for attention. Whatever else looks along the sequence (convolutions, recurrent states,
chunked or biased attention) would be silently wrong in such a batch: `check_config`, `dry_run` and `prove` refuse it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from fairlead.core.errors import LoadError
from fairlead.llm.attention import AttentionKernel
from fairlead.llm.batch import AttentionSpec, LayerCache, LayerShape, StepBatch, new_cache
from fairlead.llm.checkpoint import quiet
from fairlead.llm.lora import Part, Site

ATTENTION = "fairlead"
"""Our name in transformers' table of attention functions."""

NEUTRAL = frozenset({"cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "position_embeddings", "position_ids", "s_aux"})
"""Tensors that models hand to the attention function and that change nothing for it, or that are honoured."""


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, with its names: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, Dv]."""
    return module.fairlead_attention(module, query, key, value, attention_mask, kwargs), None


AttentionInterface.register(ATTENTION, _attend)


@dataclass(slots=True)
class _Call:
    """One call of the attention function, as every forward repeats it in the same place."""

    layer: int
    """Index of the layer's cache."""
    stores: bool
    """False: it reads K and V that an earlier layer has stored (gemma3n, gemma4)."""
    spec: AttentionSpec


class _Recorder:
    """Stands in for attention in the dry run: notes who calls with what, answers with shapes that fit."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.shapes: list[LayerShape] = []
        self.layer_ids: list[int | None] = []
        """`layer_idx` of the module of every call."""
        self.refused = ""
        self._stored: list[tuple[torch.Tensor, torch.Tensor]] = []  # kept alive, so that an address names one of them

    def __call__(self, module: Any, query: Any, key: Any, value: Any, mask: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        self.layer_ids.append(getattr(module, "layer_idx", None))
        self.refused = self.refused or _refusal(module, query, key, mask, kwargs)
        owner = next((i for i, (k, v) in enumerate(self._stored) if _same(k, key) and _same(v, value)), None)
        if owner is None:
            self._stored.append((key, value))
            self.shapes.append(LayerShape(key.shape[1], key.shape[3], value.shape[3]))
        layer = len(self.shapes) - 1 if owner is None else owner
        self.calls.append(_Call(layer, owner is None, _spec(module, query, kwargs)))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride())


def _refusal(module: Any, query: Any, key: Any, mask: Any, kwargs: dict[str, Any]) -> str:
    """Why this call cannot be answered as transformers means it; "" where it can."""
    who = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        return f"{who} attends to tokens that come later"
    if query.shape[2] != key.shape[2] or query.shape[0] != 1:
        return f"{who} attends to other tokens than its own sequence's"
    if query.shape[1] % key.shape[1]:
        return f"{who} has {query.shape[1]} query heads, which {key.shape[1]} key-value heads do not divide"
    if mask is not None:
        return f"{who} brings an attention mask of its own"
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in NEUTRAL:
            return f"{who} passes `{name}` to its attention, which is not supported"
    return ""


def _spec(module: Any, query: Any, kwargs: dict[str, Any]) -> AttentionSpec:
    scale, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
    # a caller that passes None means it: in exaone4's full layers the module still has the window of the sliding ones
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    return AttentionSpec(
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        window=int(window or 0),
        softcap=float(kwargs.get("softcap") or 0.0),
        sinks_H=None if sinks is None else sinks.detach().reshape(-1).float(),
    )


@dataclass(slots=True)
class _Paged:
    """Attention of one decoder while a step runs. The n-th call of a forward is the n-th of the dry run."""

    kernel: AttentionKernel
    calls: list[_Call]
    dtype: torch.dtype
    batch: StepBatch | None = None
    cache: list[LayerCache] = field(default_factory=list)
    at: int = 0

    def __call__(self, module: Any, query: Any, key: Any, value: Any, mask: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        call, batch = self.calls[self.at], self.batch
        self.at += 1
        assert batch is not None, "a model of the engine is called through its decoder"
        layer = self.cache[call.layer]
        if call.stores:
            k_TKD, v_TKE = key[0].transpose(0, 1), value[0].transpose(0, 1)
            self.kernel.store(k_TKD.to(self.dtype), v_TKE.to(self.dtype), layer, batch.slots_T)
        q_THD = query[0].transpose(0, 1).to(self.dtype)
        return self.kernel.attend(q_THD, layer, batch, call.spec)[None].to(query.dtype)


class GraphDecoder:
    """A transformers model as the engine's decoder. Not thread-safe: one step at a time."""

    def __init__(self, model: Any, kernel: AttentionKernel) -> None:
        """Raises LoadError where the model cannot be computed in flat batches."""
        calls, self.layers = _record(model)
        self.model = model
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.dtype: torch.dtype = model.dtype
        self.device = str(model.device)
        self.native = kernel.name == "native"
        self._paged = _Paged(kernel, calls, self.dtype)
        _answer_with(model, self._paged)
        self.sites: tuple[Site, ...] = tuple((part,) for part in _linears(model))
        self._hooked = False

    def __call__(self, batch: StepBatch, cache: list[LayerCache]) -> torch.Tensor:
        """Logits [N, V] of `batch.logit_rows_N`; K and V of the batch's tokens are in `cache` afterwards."""
        paged = self._paged
        paged.batch, paged.cache, paged.at = batch, cache, 0
        if batch.laid is not None and not self._hooked:
            self._hook()
        try:
            logits_1NV = self.model(
                input_ids=batch.input_ids_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                logits_to_keep=batch.logit_rows_N,
            ).logits
        finally:
            paged.batch, paged.cache = None, []
        return logits_1NV[0]

    def _hook(self) -> None:
        """From the first step with an adapter on: until then no layer pays for being asked."""
        self._hooked = True
        for site, (part,) in enumerate(self.sites):
            self.model.get_submodule(part.name).register_forward_hook(partial(self._add, site, part))

    def _add(self, site: int, part: Part, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        batch = self._paged.batch
        if batch is None or batch.laid is None:
            return
        (add,) = batch.laid.adds(site, 1)
        if add is not None:
            add(output.view(-1, part.num_outputs), args[0].reshape(-1, part.num_inputs).contiguous())


def _linears(model: Any) -> Iterator[Part]:
    """Every linear layer but the one that gives the logits."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            yield Part(name, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            yield Part(name, module.nx, module.nf)


def dry_run(model: Any) -> tuple[LayerShape, ...]:
    """KV of the layers that attend, from one tiny forward. Raises LoadError that names what does not fit flat batches."""
    return _record(model)[1]


def _record(model: Any) -> tuple[list[_Call], tuple[LayerShape, ...]]:
    recorder = _Recorder()
    with quiet():
        model.set_attn_implementation(ATTENTION)
    _answer_with(model, recorder)
    ids, rows = torch.zeros(1, 3, dtype=torch.int64, device=model.device), torch.tensor([0, 2], device=model.device)
    with torch.inference_mode(), quiet():
        logits = _forward(model, ids, rows)
    config = model.config.get_text_config()
    if missing := _not_reached(config, recorder.layer_ids):
        raise LoadError(f"{_name(model)} is not supported: {missing} not attend through transformers' attention interface")
    if recorder.refused:
        raise LoadError(f"{_name(model)} is not supported: {recorder.refused}")
    if logits.shape[:2] != (1, 2):
        raise LoadError(f"{_name(model)} is not supported: it gives logits for {logits.shape[1]} tokens where 2 were asked for")
    return recorder.calls, tuple(recorder.shapes)


def _forward(model: Any, ids_ST: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    positions_ST = torch.arange(ids_ST.shape[1], device=ids_ST.device).expand_as(ids_ST)
    try:
        logits: torch.Tensor = model(input_ids=ids_ST, position_ids=positions_ST, use_cache=False, logits_to_keep=rows_N).logits
    except Exception as error:  # whatever a graph of somebody else's raises
        raise LoadError(f"{_name(model)} is not supported: its graph fails on a flat batch ({type(error).__name__}: {error})") from error
    return logits


def _not_reached(config: Any, reached: list[int | None]) -> str:
    """The layers that did not call the attention function, in words that a verb closes; "" where every one did."""
    total = config.num_hidden_layers
    missing = sorted(set(range(total)) - set(reached)) if None not in reached else list(range(len(reached), total))
    if not missing:
        return ""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    names = sorted({kinds[i] for i in missing if i < len(kinds)})
    which = f"its {total} layers" if len(missing) == total else f"{_numbered(missing)} of {total}"
    return which + (f" ({', '.join(names)})" if names else "") + (" does" if len(missing) == 1 else " do")


def _numbered(layers: list[int], most: int = 8) -> str:
    more = ", ..." if len(layers) > most else ""
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers[:most])) + more


def _answer_with(model: Any, attention: _Recorder | _Paged) -> None:
    """Every module knows who answers its calls, so that several models live in one process without a global."""
    for module in model.modules():
        module.fairlead_attention = attention


def _name(model: Any) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"


# What flat batches would get wrong without a sign


def check_config(config: Any) -> None:
    """Raises LoadError for what a look at config.json tells, before any weights are read."""
    who = f"{config.architectures[0] if config.architectures else type(config).__name__} ({config.model_type})"
    if config.is_encoder_decoder:
        raise LoadError(f"{who} is not supported: it has an encoder and a decoder, and only decoders generate here")
    parts = [name for name in ("vision_config", "audio_config", "speech_config") if getattr(config, name, None) is not None]
    if parts or config.get_text_config() is not config:
        raise LoadError(
            f"{who} is not supported: it is multimodal ({', '.join(parts) or 'it has a text_config'}); serve a checkpoint of its text model alone"
        )
    if any("mrope_section" in rope for rope in _ropes(config).values()):
        raise LoadError(f"{who} is not supported: its rotary embedding has several positions for each token (M-RoPE)")
    layer_types = getattr(config, "layer_types", None) or []
    if "chunked_attention" in layer_types or getattr(config, "attention_chunk_size", None):
        chunked = [i for i, kind in enumerate(layer_types) if kind == "chunked_attention"] or range(config.num_hidden_layers)
        raise LoadError(
            f"{who} is not supported: {_numbered(list(chunked))} of {config.num_hidden_layers} attend in chunks (`attention_chunk_size`)"
        )


def freeze_rope(model: Any, max_model_len: int) -> list[str]:
    """Fix rotary frequencies that transformers chooses anew in every forward, from the longest position of the whole batch.

    Returns what was chosen. Raises LoadError where no fixed choice is right up to `max_model_len`.
    """
    chosen: set[str] = set()
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        if isinstance(types, str) and _changes(types):
            chosen.add(_freeze(module, types, "", max_model_len))
            module.rope_type = "default"
        elif isinstance(types, dict):
            chosen |= {_freeze(module, types[layer], layer, max_model_len) for layer in types if _changes(types[layer])}
            module.rope_type = {layer: "default" if _changes(types[layer]) else types[layer] for layer in types}
    return sorted(chosen)


def _changes(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _freeze(module: Any, rope_type: str, layer_type: str, max_model_len: int) -> str:
    if "dynamic" in rope_type:
        unscaled = int(module.original_max_seq_len)
        if max_model_len > unscaled:
            raise LoadError(
                f"its rotary embedding is scaled by the length of each text (`rope_type: dynamic`) beyond {unscaled} tokens, which is not supported: set `llm.max_model_len` to at most {unscaled}"
            )
        return f"rotary embedding: its dynamic scaling never applies up to {max_model_len} tokens"
    rope = _ropes(module.config)[layer_type]
    original = int(rope["original_max_position_embeddings"])
    if max_model_len <= original:
        return f"rotary embedding: longrope's short factors, for at most {original} tokens"
    if "long_mscale" in rope:
        raise LoadError(
            f"its rotary embedding scales attention by the length of each text beyond {original} tokens, which is not supported: set `llm.max_model_len` to at most {original}"
        )
    frequencies = getattr(module, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, frequencies.device, seq_len=original + 1, layer_type=layer_type or None)
    frequencies.copy_(long)
    return (
        f"rotary embedding: longrope's long factors for texts of every length; an `llm.max_model_len` of at most {original} takes the short"
    )


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary parameters by layer type; under "" where all layers share them."""
    ropes = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in ropes or "rope_type" in ropes or not ropes:
        return {"": ropes}
    return {name: rope for name, rope in ropes.items() if rope}


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest distance of a token's logits as a share of their spread. Rounding gives about 1e-6 in float32 and 0.02 in
bfloat16, one token of a neighbour's that leaks in about 1."""


def prove(decoder: GraphDecoder) -> None:
    """Hold flat, chunked, shuffled batches against transformers' own attention on the same few tokens.

    Two sequences share a step and one of them comes in two chunks, so that whatever looks along the flat batch shows.
    Raises LoadError where the logits differ.
    """
    model, vocab = decoder.model, decoder.vocab_size
    one, other = texts = torch.randint(vocab, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), quiet():
        model.set_attn_implementation("eager")
        try:
            whole_STV = _forward(model, texts.to(decoder.device), torch.arange(8, device=decoder.device))
        finally:
            model.set_attn_implementation(ATTENTION)
        cache = new_cache(decoder.layers, 3, 16, decoder.dtype, decoder.device)
        decoder(_probe_batch([one[:4]], [0], [2], decoder.device), cache)
        found = decoder(_probe_batch([one[4:], other], [4, 0], [2, 1], decoder.device), cache).float()
    wanted = torch.cat([whole_STV[0, 4:], whole_STV[1]]).float()
    spread = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
    distance = float(((found - wanted).norm(dim=-1) / spread.clamp_min(1e-6)).max())
    if not distance <= TOLERANCE[decoder.dtype]:  # also where it is not a number
        raise LoadError(
            f"{_name(model)} is not supported: in a batch of several texts its logits differ from those of each text alone (by {distance:.2g} of their spread)"
        )


def _probe_batch(texts: list[torch.Tensor], starts: list[int], blocks: list[int], device: str) -> StepBatch:
    """One block of 16 for each text, of which `start` tokens were computed before."""
    lens = [len(text) for text in texts]
    positions = [torch.arange(start, start + num) for start, num in zip(starts, lens, strict=True)]
    ends = torch.tensor(lens).cumsum(0)
    return StepBatch(
        torch.cat(texts).to(device),
        torch.cat(positions).to(device),
        torch.cat([block * 16 + position for block, position in zip(blocks, positions, strict=True)]).to(device),
        torch.cat([torch.zeros(1), ends]).to(device, torch.int32),
        torch.tensor([start + num for start, num in zip(starts, lens, strict=True)], dtype=torch.int32, device=device),
        torch.tensor([[block] for block in blocks], dtype=torch.int32, device=device),
        torch.arange(int(ends[-1]), device=device),
        max_query_len=max(lens),
        max_context_len=max(start + num for start, num in zip(starts, lens, strict=True)),
    )
