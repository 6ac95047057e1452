"""A decoder of our own for the Llama family: fused projections, rotation by table, one flat batch [T, .] over the paged KV cache.

It computes what transformers' modules of these families compute, in a third of the operators: with native kernels nine a
layer, all of them in one call. It is built from the modules of a loaded model and trusted only after
`probe` has compared the two.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairlead.llm import linear, quant
from fairlead.llm.attention import AttentionKernel
from fairlead.llm.batch import AttentionSpec, LayerCache, LayerShape, StepBatch, new_cache
from fairlead.llm.cuda.layers import TritonLayers
from fairlead.llm.linear import LANES, Activation, Linear, PackedLinear, Prepare
from fairlead.llm.lora import Part, Site

FAMILIES = frozenset({"llama", "qwen2", "qwen3", "mistral", "smollm3", "granite", "olmo2"})
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
PREPARE: dict[str, Prepare] = {"off": linear.prepare, "int8": quant.prepare}
"""How linear layers are held, by `llm.quantization`."""
PROBE_TOKENS = 32
"""Positions that the probe computes, whatever the model's longest text."""
# These scale by the length of what is read, which a table by position cannot.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights. The norms stand before attention and MLP, or after them (OLMo 2)."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    """[D]: each head; [H D]: the whole projection (OLMo 2)."""
    k_norm: Tensor | None
    rotates: bool
    spec: AttentionSpec
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    inner_size: int
    """Of the MLP."""


@dataclass(frozen=True, slots=True)
class Family:
    """Where the families differ beyond their weights."""

    norm_after: bool = False
    """OLMo 2: what attention and MLP give is normed, not what they read; its norm rounds after the weight."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0


class LeanDecoder:
    """Decodes a StepBatch; see Decoder in llm/load.py."""

    def __init__(
        self,
        *,
        embedding: Tensor,
        layers: list[Layer],
        norm: Tensor,
        head: Linear,
        rope_LD: tuple[Tensor, Tensor],
        num_heads: int,
        shape: LayerShape,
        eps: float,
        family: Family,
        kernel: AttentionKernel,
    ) -> None:
        """`rope_LD`: cosines and sines of every position's first half of angles, float32 [max_model_len, D / 2]."""
        self.layers = (shape,) * len(layers)
        self.vocab_size = len(embedding)
        self.dtype = embedding.dtype
        self.device = str(embedding.device)
        self.kernel = kernel
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._cos_LD, self._sin_LD = rope_LD
        self._num_heads = num_heads
        self._eps = eps
        self._family = family
        self.native = kernel.name == "native"
        self.sites = tuple(site for i, layer in enumerate(layers) for site in _sites(i, layer, embedding.shape[1], num_heads, shape))
        whole_norms = any(layer.q_norm is not None and layer.q_norm.numel() != shape.k_size for layer in layers)
        self._add_norm, self._add_normed, self._rope_store = _between(kernel, whole_norms=whole_norms)
        self._whole = self._bind()

    @property
    def max_model_len(self) -> int:
        """Positions that the rotation's table holds."""
        return len(self._cos_LD)

    @classmethod
    def from_graph(
        cls, model: Any, kernel: AttentionKernel, *, max_model_len: int = 0, prepare: Prepare = linear.prepare
    ) -> "LeanDecoder | str":
        """The decoder of a transformers *ForCausalLM, or why there is none.

        It shares embedding and norm weights with the model (until `let_go`) and holds packed copies of the projections: drop it once
        `probe` is content. `max_model_len` 0: the checkpoint's context. `prepare`: one of PREPARE. Raises LoadError where it does.
        """
        reason = unsupported(model)
        if reason:
            return reason
        config, body = model.config, model.model
        attention = body.layers[0].self_attn
        head_size = attention.head_dim
        prepare = functools.partial(prepare, native=kernel.name in {"native", "triton"}, fixed=kernel.fixed)
        rope_LD = rope_table(body.rotary_emb, max_model_len or config.max_position_embeddings, body.embed_tokens.weight)
        if isinstance(rope_LD, str):
            return rope_LD
        if 2 * rope_LD[0].shape[1] != head_size:
            return f"rotates {2 * rope_LD[0].shape[1]} of a head's {head_size} elements"
        norm_after = config.model_type == "olmo2"
        return cls(
            embedding=body.embed_tokens.weight.detach(),
            layers=[_layer(layer, config, prepare, norm_after=norm_after) for layer in body.layers],
            norm=body.norm.weight.detach(),
            head=prepare([model.lm_head.weight], [model.lm_head.bias]),
            rope_LD=rope_LD,
            num_heads=config.num_attention_heads,
            shape=LayerShape(config.num_key_value_heads, head_size, head_size),
            eps=body.norm.variance_epsilon,
            family=Family(
                norm_after=norm_after,
                embedding_multiplier=getattr(config, "embedding_multiplier", 1.0),
                residual_multiplier=getattr(config, "residual_multiplier", 1.0),
                logits_divisor=getattr(config, "logits_scaling", 1.0),
            ),
            kernel=kernel,
        )

    def let_go(self) -> None:
        """Copy what is shared with the model that it was made of: one vector of it would keep all its files mapped."""

        def copied(weight: Tensor | None) -> Any:
            return None if weight is None else weight.clone()

        shared = ("attention_norm", "mlp_norm", "q_norm", "k_norm")
        self._embedding, self._norm = copied(self._embedding), copied(self._norm)
        self._layers = [replace(layer, **{name: copied(getattr(layer, name)) for name in shared}) for layer in self._layers]
        self._whole = self._bind()

    def _bind(self) -> Any:
        """The same decoder as one call (kernels/decoder.cpp); None where not all of it is computed by our C++ kernels."""
        linears = [self._head, *(each for layer in self._layers for each in (layer.qkv, layer.out, layer.gate_up, layer.down))]
        if self.kernel.name != "native" or self._family.norm_after or not all(isinstance(each, PackedLinear) for each in linears):
            return None

        def operands(each: Linear) -> Any:
            assert isinstance(each, PackedLinear)
            return each.operands

        def bound(layer: Layer) -> tuple[Any, ...]:
            spec = layer.spec
            attends = (spec.scale, spec.window, spec.softcap, spec.sinks_H)
            own = (layer.attention_norm, operands(layer.qkv), layer.q_norm, layer.k_norm, layer.rotates, attends)
            return (*own, operands(layer.out), layer.mlp_norm, operands(layer.gate_up), operands(layer.down))

        family = self._family
        return torch.classes.fairlead.Decoder(
            self._embedding,
            [bound(layer) for layer in self._layers],
            self._norm,
            operands(self._head),
            self._cos_LD,
            self._sin_LD,
            self._num_heads,
            self._eps,
            (family.embedding_multiplier, family.residual_multiplier, family.logits_divisor),
            self.kernel.fixed,
        )

    @property
    def writes_ahead(self) -> bool:
        """Whether it has `write_ahead`."""
        return self._whole is not None

    def write_ahead(
        self, logits_NV: Tensor, positions_N: Tensor, tables_NB: Tensor, nums: list[int], num_ids: int, cache: list[LayerCache]
    ) -> list[list[int]]:
        """By place, the likeliest of the first `num_ids` tokens: after `logits_NV`, then for the first `nums[0]` sequences, whose
        tokens go to `positions_N`, then for the first `nums[1]`, ..."""
        keys, values = [layer.k for layer in cache], [layer.v for layer in cache]
        ids_PN = self._whole.write_ahead(logits_NV, positions_N, tables_NB, nums, num_ids, keys, values)
        return ids_PN.tolist()  # type: ignore[no-any-return]

    def __call__(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Logits [N, V] of the rows that `batch` asks for; K and V of all its tokens go to `cache`."""
        operands = None if batch.laid is None else batch.laid.operands
        if self._whole is not None and (batch.laid is None or operands is not None):
            logits_NV: Tensor = self._whole.decode(
                batch.input_ids_T, batch.positions_T, batch.slots_T, batch.query_starts_S1, batch.context_lens_S, batch.block_tables_SB,
                batch.logit_rows_N, [layer.k for layer in cache], [layer.v for layer in cache], operands,
            )  # fmt: skip
            return logits_NV
        x_TC = F.embedding(batch.input_ids_T, self._embedding)
        if self._family.embedding_multiplier != 1:
            x_TC *= self._family.embedding_multiplier
        h_NC = self._norm_after(x_TC, batch, cache) if self._family.norm_after else self._norm_before(x_TC, batch, cache)
        logits_NV = self._head(h_NC)
        return logits_NV if self._family.logits_divisor == 1 else logits_NV.div_(self._family.logits_divisor)

    def _norm_before(self, x_TC: Tensor, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Llama's order: x += attention(norm(x)); x += mlp(norm(x)). Each sum is taken together with the norm that reads it."""
        eps, scale, add_norm = self._eps, self._family.residual_multiplier, self._add_norm
        y_TC = None
        last, laid = len(self._layers) - 1, batch.laid
        for i, layer in enumerate(self._layers):
            h_TC = add_norm(x_TC, y_TC, layer.attention_norm, eps, scale, True)
            a_TC = self._attend(i, layer, h_TC, batch, cache[i])
            if i == last:
                x_TC, a_TC = wanted(x_TC, batch), wanted(a_TC, batch)
            if laid is None:
                h_TC = add_norm(x_TC, layer.out(a_TC), layer.mlp_norm, eps, scale, True)
                y_TC = layer.down(layer.gate_up(h_TC))
            else:
                out, gate_up, down = laid.adds(SITES * i + 1, 3, wanted=i == last)
                h_TC = add_norm(x_TC, layer.out(a_TC, out), layer.mlp_norm, eps, scale, True)
                y_TC = layer.down(layer.gate_up(h_TC, gate_up), down)
        h_NC: Tensor = add_norm(x_TC, y_TC, self._norm, eps, scale, True)
        return h_NC

    def _norm_after(self, x_TC: Tensor, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """OLMo 2's order: x += norm(attention(x)); x += norm(mlp(x))."""
        last, laid = len(self._layers) - 1, batch.laid
        for i, layer in enumerate(self._layers):
            a_TC = self._attend(i, layer, x_TC, batch, cache[i])
            if i == last:
                x_TC, a_TC = wanted(x_TC, batch), wanted(a_TC, batch)
            out, gate_up, down = (None, None, None) if laid is None else laid.adds(SITES * i + 1, 3, wanted=i == last)
            self._add_normed(x_TC, layer.out(a_TC, out), layer.attention_norm, self._eps, False)
            self._add_normed(x_TC, layer.down(layer.gate_up(x_TC, gate_up), down), layer.mlp_norm, self._eps, False)
        h_NC: Tensor = self._add_norm(x_TC, None, self._norm, self._eps, 1.0, False)
        return h_NC

    def _attend(self, index: int, layer: Layer, h_TC: Tensor, batch: StepBatch, cache: LayerCache) -> Tensor:
        """Heads side by side, [T, H D]."""
        qkv = layer.qkv(h_TC) if batch.laid is None else layer.qkv(h_TC, *batch.laid.adds(SITES * index, 1))
        num_heads, num_kv_heads, size = self._num_heads, cache.k.shape[1], cache.k.shape[3]
        cos_LD, sin_LD = (self._cos_LD, self._sin_LD) if layer.rotates else (None, None)
        round_first = not self._family.norm_after
        if self._rope_store is not None:
            self._rope_store(
                qkv, batch.positions_T, batch.slots_T, cos_LD, sin_LD, cache.k, cache.v,
                layer.q_norm, layer.k_norm, num_heads, self._eps, round_first,
            )  # fmt: skip
            q_THD = qkv.view(len(qkv), -1, size)[:, :num_heads]
        else:
            q, k, v = qkv.split([num_heads * size, num_kv_heads * size, num_kv_heads * size], 1)
            q_THD = head_norm(q, layer.q_norm, size, self._eps, round_first)
            k_TKD = head_norm(k, layer.k_norm, size, self._eps, round_first)
            if cos_LD is not None and sin_LD is not None:
                cos_T1D, sin_T1D = cos_LD[batch.positions_T, None], sin_LD[batch.positions_T, None]
                q_THD, k_TKD = rotate(q_THD, cos_T1D, sin_T1D), rotate(k_TKD, cos_T1D, sin_T1D)
            self.kernel.store(k_TKD, v.reshape(len(v), num_kv_heads, size), cache, batch.slots_T)
        return self.kernel.attend(q_THD, cache, batch, layer.spec).flatten(1)


SITES = 4
"""Of a layer: what adapters may add to."""


def _sites(index: int, layer: Layer, hidden: int, num_heads: int, shape: LayerShape) -> tuple[Site, Site, Site, Site]:
    """As transformers names what is fused here."""
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    heads, keys, values = num_heads * shape.k_size, shape.num_kv_heads * shape.k_size, shape.num_kv_heads * shape.v_size
    inner = layer.inner_size
    up, step = (LANES, 2 * LANES) if layer.gate_up.panels else (inner, LANES)
    return (
        (
            Part(f"{attention}.q_proj", hidden, heads),
            Part(f"{attention}.k_proj", hidden, keys, heads),
            Part(f"{attention}.v_proj", hidden, values, heads + keys),
        ),
        (Part(f"{attention}.o_proj", heads, hidden),),
        (Part(f"{mlp}.gate_proj", hidden, inner, 0, step), Part(f"{mlp}.up_proj", hidden, inner, up, step)),
        (Part(f"{mlp}.down_proj", inner, hidden),),
    )


def _between(
    kernel: AttentionKernel, *, whole_norms: bool
) -> tuple[Callable[..., Tensor], Callable[..., None], Callable[..., None] | None]:
    """What stands between the projections: add_norm, add_normed, and rope_store where one kernel does it."""
    if kernel.name == "native":
        ops = torch.ops.fairlead
        return ops.add_norm.default, ops.add_normed.default, ops.rope_store.default
    if kernel.name == "triton":
        layers = TritonLayers()
        return layers.add_norm, layers.add_normed, None if whole_norms else layers.rope_store
    return add_norm, add_normed, None


def wanted(x_TC: Tensor, batch: StepBatch) -> Tensor:
    """The rows whose logits are wanted: nothing after the last layer's attention reads another row."""
    return x_TC if len(x_TC) == 1 == len(batch.logit_rows_N) else x_TC.index_select(0, batch.logit_rows_N)


# ---- the steps between the projections in torch's own operators, as kernels/gemm.cpp has them


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """Over the last dimension; rounded to x's dtype before the weight, as transformers' LlamaRMSNorm, or after it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype) if round_first else (weight * wide).to(x.dtype)


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, scale: float, round_first: bool) -> Tensor:
    """x += scale * y in place, then the norm of x."""
    if y is not None:
        x += y if scale == 1 else y * scale
    return rms_norm(x, weight, eps, round_first)


def add_normed(x: Tensor, y: Tensor, weight: Tensor, eps: float, round_first: bool) -> None:
    """x += norm(y) in place."""
    x += rms_norm(y, weight, eps, round_first)


def head_norm(x: Tensor, weight: Tensor | None, size: int, eps: float, round_first: bool) -> Tensor:
    """Heads of a projection, [T, H D] to [T, H, D], each or all together normed."""
    heads = x.reshape(len(x), -1, size)
    if weight is None:
        return heads
    if weight.numel() == size:
        return rms_norm(heads, weight, eps, round_first)
    return rms_norm(x, weight, eps, round_first).view_as(heads)


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotary embedding (RoFormer) in the halves layout, computed in float32."""
    a, b = x_THD.float().chunk(2, -1)
    return torch.cat([a * cos_T1D - b * sin_T1D, b * cos_T1D + a * sin_T1D], -1).to(x_THD.dtype)


# ---- reading a transformers model


def unsupported(model: Any) -> str:
    """Why the lean decoder cannot stand in for the model; "" if it can."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"the lean decoder has no {config.model_type}"
    if config.hidden_act not in ACTIVATIONS:
        return f"activation {config.hidden_act}"
    parameters = config.rope_parameters or {}
    if parameters.get("rope_type", "default") in LENGTH_DEPENDENT_ROPE:
        return f"rope type {parameters['rope_type']}"
    for name, module in model.named_modules():
        if name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
    weight = model.model.embed_tokens.weight
    kinds = {(parameter.dtype, parameter.device) for parameter in model.parameters()}
    if len(kinds) > 1:
        return f"parameters of several dtypes or devices: {', '.join(sorted(f'{dtype} on {device}' for dtype, device in kinds))}"
    if weight.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        return f"weights of {weight.dtype}"
    if weight.dtype == torch.float16 and weight.device.type == "cpu":
        return "float16 on CPU"
    return ""


def rope_table(rotary_emb: Any, num_positions: int, weight: Tensor) -> tuple[Tensor, Tensor] | str:
    """Cosines and sines [L, D / 2] in float32, as the model's own module gives them in its dtype for positions 0 to L - 1."""
    halves: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        for start in range(0, num_positions, 4096):
            positions = torch.arange(start, min(num_positions, start + 4096), device=weight.device)
            cos, sin = (angles[0].float() for angles in rotary_emb(weight[:1], position_ids=positions[None]))
            (cos, cos_again), (sin, sin_again) = cos.chunk(2, -1), sin.chunk(2, -1)
            if not (torch.equal(cos, cos_again) and torch.equal(sin, sin_again)):
                return "rotary angles whose halves differ"
            halves.append((cos.clone(), sin.clone()))
        return torch.cat([cos for cos, _ in halves]).contiguous(), torch.cat([sin for _, sin in halves]).contiguous()


def _layer(module: Any, config: Any, prepare: Callable[..., Linear], *, norm_after: bool) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    if norm_after:
        norms = module.post_attention_layernorm, module.post_feedforward_layernorm
    else:
        norms = module.input_layernorm, module.post_attention_layernorm
    # Mistral says it of all layers in its config, the others of each layer.
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    return Layer(
        attention_norm=norms[0].weight.detach(),
        qkv=prepare([q.weight, k.weight, v.weight], [q.bias, k.bias, v.bias]),
        q_norm=attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
        rotates=bool(getattr(attention, "use_rope", True)),
        spec=AttentionSpec(scale=attention.scaling, window=window or 0),
        out=prepare([attention.o_proj.weight], [attention.o_proj.bias]),
        mlp_norm=norms[1].weight.detach(),
        gate_up=prepare(
            [mlp.gate_proj.weight, mlp.up_proj.weight],
            [mlp.gate_proj.bias, mlp.up_proj.bias],
            gate=ACTIVATIONS[config.hidden_act],
        ),
        down=prepare([mlp.down_proj.weight], [mlp.down_proj.bias]),
        inner_size=mlp.down_proj.in_features,
    )


# ---- the probe


def probe(model: Any, decoder: LeanDecoder) -> str:
    """Run both on the same random tokens, the model at once and the decoder in three steps: "" or why they are not the same."""
    num_tokens, block_size = PROBE_TOKENS, 16
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(decoder.vocab_size, (num_tokens,), generator=generator).to(decoder.device)
    implementation = model.config._attn_implementation
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        try:
            graph_logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
        finally:
            model.set_attn_implementation(implementation)
        cache = new_cache(decoder.layers, 4, block_size, decoder.dtype, decoder.device)
        steps = ((0, 21), (21, 31), (31, num_tokens))
        lean_logits_TV = torch.cat([decoder(_probe_step(ids_T, begin, end, block_size), cache) for begin, end in steps])
    return matches(graph_logits_TV, lean_logits_TV)


def _probe_step(ids_T: Tensor, begin: int, end: int, block_size: int) -> StepBatch:
    """Tokens `begin` to `end` of one sequence whose blocks are 2 and 0."""
    device = ids_T.device
    positions_T = torch.arange(begin, end, device=device)
    table = torch.tensor([[2, 0]], dtype=torch.int32, device=device)
    return StepBatch(
        input_ids_T=ids_T[begin:end],
        positions_T=positions_T,
        slots_T=table[0].long()[positions_T // block_size] * block_size + positions_T % block_size,
        query_starts_S1=torch.tensor([0, end - begin], dtype=torch.int32, device=device),
        context_lens_S=torch.tensor([end], dtype=torch.int32, device=device),
        block_tables_SB=table,
        logit_rows_N=torch.arange(end - begin, device=device),
        max_query_len=end - begin,
        max_context_len=end,
    )


def matches(graph_logits_NV: Tensor, lean_logits_NV: Tensor) -> str:
    """What differs beyond the rounding of their dtype, or ""; every row by itself, and every clear winner."""
    graph, lean = graph_logits_NV.float(), lean_logits_NV.float()
    if graph.shape != lean.shape:
        return f"logits of shape {tuple(lean.shape)}, not {tuple(graph.shape)}"
    # bfloat16 keeps 8 bits: two orders of the same sums drift apart by 1 to 3% over the layers of a model.
    tolerance = 1e-3 if graph_logits_NV.dtype == torch.float32 else 0.1
    size_N = graph.square().mean(-1).sqrt()
    drift = float(((graph - lean).square().mean(-1).sqrt() / size_N).max())
    # Not `>`: NaN is a difference.
    if not drift <= tolerance:
        return f"logits differ by {drift:.2g} of their size, where {tolerance:.2g} may be rounding"
    best_two = graph.topk(2, -1).values
    clear_N = best_two[:, 0] - best_two[:, 1] > 4 * tolerance * size_N
    if not torch.equal(graph.argmax(-1)[clear_N], lean.argmax(-1)[clear_N]):
        return "logits are alike, but other tokens win"
    return ""
