"""int8: linear layers that hold their weights as bytes, and what that does to a model's logits.

Weights have a scale for each output, tokens (where they become bytes too) one for each token, found as they come; both are
symmetric, 127 times the scale is the largest number. Three ways to compute one, the first that this machine can do:
    PackedInt8     our own kernel over panels of bytes (kernels/gemm.cpp), with the gate of an MLP in its epilogue
    TorchInt8      torch's product of two int8 matrices: the same numbers, slower for few tokens
    WeightOnlyInt8 bytes become weights again in every call: on any device, for half the memory and no more speed

A scheme is a function like linear.prepare. Another one (int4 in groups; GPTQ and AWQ, whose checkpoints bring their
integers along) is another such function in decoder.PREPARE and a word in LlmSpec.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fairlead.core.errors import LoadError
from fairlead.llm import kernels
from fairlead.llm.linear import ACTIVATIONS, GATES, LANES, Activation, Add, Linear, PackedLinear, PlainLinear, gated, pack_bias

log = structlog.get_logger("fairlead.llm")

LEVELS = 127
MAX_ERROR = 0.5
"""Of the logits' size: int8 costs 1 to 5%; beyond this what was loaded is not the checkpoint's model any more."""
SMALL = 64
"""Outputs of a layer of the graph below which it stays as it is: a router's few, on which much depends."""

MAX_DEPTH = 128 << 10
"""Inputs of a layer that the kernel's sums hold."""

PROBE_TEXT = """\
The harbour master keeps a book in which every ship, its cargo and its draught are written down by hand. On Monday 14 March, at half \
past six, a barque of 480 tons came in on the tide: "She draws eleven feet," the pilot said, "and the bar has twelve." Was that enough? \
def depth(tide, bar): return tide - bar. If 7 boats leave and 12 return, how many are in port? There are five more than before."""
PROBE_TOKENS = 64


def prepare(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
    *,
    gate: Activation | Literal[""] = "",
    native: bool,
    fixed: bool = False,
) -> Linear:
    """As linear.prepare, in int8. Raises LoadError where a weight holds infinity or NaN."""
    given = [bias for bias in biases if bias is not None]
    if given and len(given) < len(weights):
        given = [bias if bias is not None else weight.new_zeros(len(weight)) for weight, bias in zip(weights, biases, strict=True)]
    on_cpu = weights[0].device.type == "cpu"
    if native and on_cpu and works(PackedInt8) and weights[0].shape[1] <= MAX_DEPTH:
        return PackedInt8(weights, given, gate)
    if fixed:  # torch's activations round the end of a tensor otherwise than its middle
        raise LoadError("`llm.deterministic` with `llm.quantization: int8` needs AVX-512 VNNI, which this processor does not have")
    if on_cpu and works(TorchInt8):
        return TorchInt8(weights, given, gate)
    return WeightOnlyInt8(weights, given, gate)


class PackedInt8(PackedLinear):
    """Our own kernel over bytes: see kernels/gemm.cpp."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], gate: Activation | Literal[""]) -> None:
        self.num_columns = len(weights[0]) if gate else sum(len(weight) for weight in weights)
        self.panels = bool(gate)
        self._gate = GATES[gate]
        rows = [weight.detach().contiguous() for weight in weights]
        if not gate and any(len(weight) % LANES for weight in rows[:-1]):
            rows = [torch.cat(rows)]
        self._packed, scales = torch.ops.fairlead.pack_int8(rows, bool(gate))
        self._scales = scales
        check_finite(scales, weights)
        self._bias = pack_bias(biases, alternate=bool(gate)) if biases else None
        multiply = torch.ops.fairlead.linear_int8.default
        self._multiply = lambda x_TK, packed, bias, num_columns, gate: multiply(x_TK, packed, scales, bias, num_columns, gate)


class TorchInt8:
    """Stock operators; a private one among them, hence `works`."""

    panels = False

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], gate: Activation | Literal[""]) -> None:
        self._bytes_KN, self._scales_N, self._bias, self._activation = _stored(weights, biases, gate)

    def __call__(self, x_TK: Tensor, add: Add | None = None) -> Tensor:
        bytes_TK, scales_T = quantize(x_TK)
        y_TN = torch._int_mm(bytes_TK, self._bytes_KN).float() * scales_T[:, None] * self._scales_N
        return _finished(y_TN, self._bias, self._activation, x_TK, add)


class WeightOnlyInt8:
    """Weights as bytes, tokens as they are: nothing that a device might lack. Not measured on CUDA."""

    panels = False

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], gate: Activation | Literal[""]) -> None:
        self._bytes_KN, self._scales_N, self._bias, self._activation = _stored(weights, biases, gate)

    def __call__(self, x_TK: Tensor, add: Add | None = None) -> Tensor:
        y_TN = (x_TK @ self._bytes_KN.to(x_TK.dtype)).float() * self._scales_N
        return _finished(y_TN, self._bias, self._activation, x_TK, add)


def quantize(rows_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 and the scale that they are multiples of, float32. A row with infinity or NaN has such a scale."""
    wide = rows_MK.float()
    most_M = wide.abs().amax(-1) if wide.shape[-1] else wide.new_zeros(len(wide))
    inverse_M = torch.where((most_M >= 1e-30) & most_M.isfinite(), LEVELS / most_M, 0.0)
    return (wide * inverse_M[:, None]).nan_to_num(0.0).round().to(torch.int8), most_M / LEVELS


def _stored(
    weights: Sequence[Tensor], biases: Sequence[Tensor], gate: Activation | Literal[""]
) -> tuple[Tensor, Tensor, Tensor | None, Activation | Literal[""]]:
    """Tensor by tensor, so that no second copy of all weights is made on the way."""
    parts = [quantize(weight.detach()) for weight in weights]
    scales_N = torch.cat([scales for _, scales in parts])
    check_finite(scales_N, weights)
    bias = torch.cat([bias.detach().float() for bias in biases]) if biases else None
    return torch.cat([bytes_NK for bytes_NK, _ in parts]).t(), scales_N, bias, gate


def _finished(y_TN: Tensor, bias: Tensor | None, gate: Activation | Literal[""], x_TK: Tensor, add: Add | None) -> Tensor:
    if bias is not None:
        y_TN = y_TN + bias
    y_TN = y_TN.to(x_TK.dtype)
    if add is not None:
        add(y_TN, x_TK)
    return gated(y_TN, ACTIVATIONS[gate]) if gate else y_TN


def check_finite(scales_N: Tensor, weights: Sequence[Tensor]) -> None:
    if not bool(scales_N.isfinite().all()):
        shapes = " or ".join(str(list(weight.shape)) for weight in weights if not bool(weight.isfinite().all()))
        raise LoadError(f"a weight of the shape {shapes} holds infinity or NaN, which int8 has no number for: the checkpoint is damaged")


@functools.cache
def works(kind: type[PackedInt8] | type[TorchInt8]) -> bool:
    """Whether this way of computing gives a layer's results here, as near as int8 can; one line in the log if not."""
    if kind is PackedInt8 and not (kernels.load() and torch.ops.fairlead.fast_int8()):
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights, biases = [random(96, 64), random(96, 64)], [random(96), random(96)]
    gates: tuple[Activation | Literal[""], ...] = ("", "silu")
    try:
        for gate in gates:
            ours, plain = kind(weights, biases, gate), PlainLinear(weights, biases, gate)
            for dtype in (torch.float32, torch.bfloat16):
                for num_tokens in (1, 5, 33):
                    x_TK = random(num_tokens, 64)
                    exact_TN = plain(x_TK)
                    error = float((ours(x_TK.to(dtype)).float() - exact_TN).norm() / exact_TN.norm())
                    assert error < 0.03, f"{error:.2g} off"
    except (AssertionError, RuntimeError, AttributeError) as error:
        log.warning("a linear kernel is not used: it fails its test here", kernel=kind.__name__, error=str(error).split("\n")[0])
        return False
    return True


# ---- transformers' graph


class _Int8Module(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Takes the place of a linear layer."""

    def __init__(self, layer: Linear, num_columns: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_columns = num_columns

    def forward(self, x: Tensor) -> Tensor:
        y_TN: Tensor = self.layer(x.reshape(-1, x.shape[-1]))
        return y_TN.view(*x.shape[:-1], self.num_columns)


def quantize_graph(model: Any, *, native: bool) -> float:
    """Replace the linear layers of a transformers model one after another; returns their share of all parameters.

    Raises LoadError where there are none: what is no module of its own, as experts, stays as it is.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    replaced = 0
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) not in {nn.Linear, Conv1D}:
                continue
            weight_NK = module.weight if type(module) is nn.Linear else module.weight.t()
            if len(weight_NK) >= SMALL:
                replaced += weight_NK.numel()
                setattr(parent, name, _Int8Module(prepare([weight_NK], [module.bias], native=native), len(weight_NK)))
    if not replaced:
        raise LoadError(f"`llm.quantization: int8` finds no linear layers in {type(model).__name__}: leave the line out")
    return float(replaced / total)


# ---- what it does to a model


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near the logits of a quantised model are to those that it had before."""

    error: float
    """Of their size."""
    agreement: float
    """Share of positions at which the same token wins."""
    num_tokens: int
    text: str

    def __str__(self) -> str:
        return f"logits differ by {self.error:.1%} of their size, the same token wins at {self.agreement:.0%} of {self.num_tokens} positions of {self.text}"


def fidelity(before_NV: Tensor, after_NV: Tensor, text: str) -> Fidelity:
    """Raises LoadError where what is left is not the model that it was."""
    before, after = before_NV.float(), after_NV.float()
    error = float((before - after).norm() / before.norm())
    same = float((before.argmax(-1) == after.argmax(-1)).float().mean())
    found = Fidelity(error, same, len(before), text)
    if not error <= MAX_ERROR:  # also where it is not a number
        raise LoadError(f"`llm.quantization: int8` ruins this model: {found}; leave the line out")
    return found


def probe_ids(folder: Path, vocab_size: int) -> tuple[Tensor, str]:
    """Tokens to compare logits on, and what they are: of a text, where the folder has a tokenizer."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            ids = [id for id in Tokenizer.from_file(str(path)).encode(PROBE_TEXT).ids if id < vocab_size]
        except Exception:  # a damaged one is told by whoever needs it
            ids = []
        if len(ids) > 1:
            return torch.tensor(ids[:PROBE_TOKENS]), "a text"
    return torch.randint(vocab_size, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)), "random tokens"


class BorrowedLinear:
    """F.linear over the checkpoint's own weights, none of them copied: what quantised layers are compared with."""

    panels = False

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], gate: Activation | Literal[""]) -> None:
        self._weights = [weight.detach() for weight in weights]
        self._biases = list(biases) or [None] * len(weights)
        self._activation = ACTIVATIONS[gate] if gate else None

    def __call__(self, x_TK: Tensor, add: Add | None = None) -> Tensor:
        parts = [F.linear(x_TK, weight, bias) for weight, bias in zip(self._weights, self._biases, strict=True)]
        y_TN = torch.cat(parts, -1)
        if add is not None:
            add(y_TN, x_TK)
        return gated(y_TN, self._activation) if self._activation else y_TN


def borrow(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
    *,
    gate: Activation | Literal[""] = "",
    native: bool,
    fixed: bool = False,
) -> Linear:
    return BorrowedLinear(weights, biases, gate)
