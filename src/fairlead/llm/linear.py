"""Linear layers whose weights are prepared once, for the few tokens of a decode and the many of a prefill alike.

Three ways to compute one, the first that this machine can do:
    PackedLinear  our own kernel over panels of weights (kernels/gemm.cpp), with the gate of an MLP in its epilogue
    OneDnnLinear  oneDNN over weights in its own blocked layout; on processors with AMX the better one for bfloat16
    PlainLinear   F.linear
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from fairlead.core.errors import LoadError
from fairlead.llm import kernels
from fairlead.llm.cuda.layers import TritonLayers

log = structlog.get_logger("fairlead.llm")

Activation = Literal["silu", "gelu_tanh", "gelu"]
GATES: dict[str, int] = {"": 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
LANES = 16


Add = Callable[[Tensor, Tensor], None]
"""(y_TN, x_TK): adds to y in place."""


class Linear(Protocol):
    panels: bool
    """What `add` is given has the columns of two siblings in alternating panels of LANES, the last ones filled up; else they lie side
    by side."""

    def __call__(self, x_TK: Tensor, add: Add | None = None) -> Tensor:
        """y_TN in x's dtype. `add`: what low-rank adapters add to what the weights give, before the gate."""


class Prepare(Protocol):
    """`prepare` below, or another way to hold weights (llm/quant.py)."""

    def __call__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] = ...,
        *,
        gate: Activation | Literal[""] = ...,
        native: bool,
        fixed: bool = ...,
    ) -> Linear: ...


def prepare(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
    *,
    gate: Activation | Literal[""] = "",
    native: bool,
    fixed: bool = False,
) -> Linear:
    """One layer out of siblings [N_i, K] that read the same x: their outputs lie side by side.

    With a `gate` the siblings are the gate and up projections of an MLP, and the output is act(gate) * up.
    `native`: our own kernel may be used, where it is the fast one. `fixed`: it must be, since a row's bits then do not depend on
    the rows beside it; raises LoadError where it cannot.
    """
    dtype = weights[0].dtype
    if biases and any(bias is not None for bias in biases):
        given = [bias if bias is not None else weight.new_zeros(len(weight)) for weight, bias in zip(weights, biases, strict=True)]
    else:
        given = []
    on_cpu = weights[0].device.type == "cpu"
    if fixed:
        if not (native and on_cpu and kernels.load() and works(PackedLinear, dtype)):
            raise LoadError("`llm.deterministic` needs the C++ kernels' linear layers, which do not pass their test here")
        return PackedLinear(weights, given, gate)
    if native and on_cpu and prefers_own_kernel(dtype) and works(PackedLinear, dtype):
        return PackedLinear(weights, given, gate)
    if on_cpu and dtype == torch.bfloat16 and works(OneDnnLinear, dtype):
        return OneDnnLinear(weights, given, gate)
    return PlainLinear(weights, given, gate, layers=TritonLayers() if native and weights[0].is_cuda else None)


class PackedLinear:
    """Our own kernel: see kernels/gemm.cpp. Weights of one copy, whatever the number of tokens."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], gate: Activation | Literal[""]) -> None:
        self.num_columns = len(weights[0]) if gate else sum(len(weight) for weight in weights)
        self.panels = bool(gate)
        self._gate = GATES[gate]
        self._packed = torch.ops.fairlead.pack([weight.detach() for weight in weights], bool(gate))
        self._bias = pack_bias(biases, alternate=bool(gate)) if biases else None
        self._scales: Tensor | None = None
        self._multiply = torch.ops.fairlead.linear.default

    @property
    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None, int, int]:
        """Besides x: packed weights, scales where they are bytes, bias, columns, gate."""
        return self._packed, self._scales, self._bias, self.num_columns, self._gate

    def __call__(self, x_TK: Tensor, add: Add | None = None) -> Tensor:
        if add is not None and self._gate:
            both: Tensor = self._multiply(x_TK, self._packed, self._bias, len(self._packed) * LANES, GATES[""])
            add(both, x_TK)
            gated: Tensor = torch.ops.fairlead.gate_panels(both, self.num_columns, self._gate)
            return gated
        y_TN: Tensor = self._multiply(x_TK, self._packed, self._bias, self.num_columns, self._gate)
        if add is not None:
            add(y_TN, x_TK)
        return y_TN


def pack_bias(biases: Sequence[Tensor], *, alternate: bool) -> Tensor:
    """float32, of every column of the panels."""

    def panels(bias: Tensor) -> Tensor:
        return F.pad(bias.detach().float(), (0, -len(bias) % LANES))

    if not alternate:
        return panels(torch.cat([bias.detach() for bias in biases]))
    return torch.stack([panels(bias).view(-1, LANES) for bias in biases], 1).flatten()


class OneDnnLinear:
    """oneDNN over reordered weights: private operators of torch, hence `works`."""

    panels = False

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], gate: Activation | Literal[""]) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat([weight.detach() for weight in weights]), None)
        self._bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        self._activation = ACTIVATIONS[gate] if gate else None

    def __call__(self, x_TK: Tensor, add: Add | None = None) -> Tensor:
        y_TN: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self._weight, self._bias, "none", [], "")
        if add is not None:
            add(y_TN, x_TK)
        return gated(y_TN, self._activation) if self._activation else y_TN


class PlainLinear:
    """F.linear. A single weight is shared, not copied."""

    panels = False

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], gate: Activation | Literal[""], *, layers: TritonLayers | None = None
    ) -> None:
        """`layers`: whose kernel computes the gate."""
        self._weight = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
        self._bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        self._gated: Callable[[Tensor], Tensor] | None = None
        if gate:
            self._gated = (
                functools.partial(layers.gated, activation=gate) if layers else functools.partial(gated, activation=ACTIVATIONS[gate])
            )

    def __call__(self, x_TK: Tensor, add: Add | None = None) -> Tensor:
        y_TN = F.linear(x_TK, self._weight, self._bias)
        if add is not None:
            add(y_TN, x_TK)
        return self._gated(y_TN) if self._gated else y_TN


def gated(both: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = both.chunk(2, -1)
    return activation(gate) * up


def prefers_own_kernel(dtype: torch.dtype) -> bool:
    """Whether ours is the fast one: with AVX-512, unless AMX multiplies bfloat16.

    Measured on an Intel Xeon without AMX, 1 to 128 tokens, one thread: bfloat16 takes 1 / 1.3 to 1 / 1.8 of prepacked oneDNN's
    time, float32 between all of F.linear's (1 token, 128 tokens) and 1 / 2.6 (8 tokens).
    """
    if dtype not in {torch.float32, torch.bfloat16} or not kernels.load() or not torch.ops.fairlead.fast_linear():
        return False
    return dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()


@functools.cache
def works(kind: type[PackedLinear] | type[OneDnnLinear], dtype: torch.dtype) -> bool:
    """Whether this way of computing gives F.linear's results here; one line in the log if not."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tolerance = 2.0**-6 if dtype == torch.bfloat16 else 1e-5
    weights, biases = [random(96, 64), random(96, 64)], [random(96), random(96)]
    gates: tuple[Activation | Literal[""], ...] = ("", "silu")
    try:
        for gate in gates:
            ours, plain = kind(weights, biases, gate), PlainLinear([w.double() for w in weights], [b.double() for b in biases], gate)
            for num_tokens in (1, 5, 33):
                x_TK = random(num_tokens, 64)
                torch.testing.assert_close(ours(x_TK).double(), plain(x_TK.double()), rtol=tolerance, atol=64 * tolerance)
    except (AssertionError, RuntimeError, AttributeError) as error:
        log.warning(
            "a linear kernel is not used: it fails its test here", kernel=kind.__name__, dtype=str(dtype), error=str(error).split("\n")[0]
        )
        return False
    return True
