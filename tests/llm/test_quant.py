"""int8: layers within its rounding of what they were, whatever the weights; and a model that still answers as it did."""

import gc
from pathlib import Path

import pytest
import torch

from fairlead.cli.demo_models.tiny.checks import CHAT
from fairlead.core.errors import LoadError
from fairlead.core.specs import LlmSpec
from fairlead.llm import kernels, linear, quant
from fairlead.llm.load import load_decoder, logits_of
from fairlead.llm.quant import BorrowedLinear, PackedInt8, TorchInt8, WeightOnlyInt8, fidelity, prepare, quantize
from tests.llm.tiny import tiny_checkpoint

NUM_TOKENS = (1, 2, 3, 4, 8, 12, 13, 25, 40)
SHAPES = [(1, 1), (7, 3), (16, 32), (48, 100), (100, 257), (515, 96), (32, 1028)]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
"""Of the largest output, beside what int8 itself costs."""


@pytest.fixture(params=[PackedInt8, TorchInt8, WeightOnlyInt8])
def kind(request):
    if request.param is PackedInt8 and not (kernels.load() and torch.ops.fairlead.fast_int8()):
        pytest.skip(kernels.load().reason or "no AVX-512 VNNI")
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What is left of it as bytes, float64."""
    as_bytes, scales = quantize(x)
    return as_bytes.double() * scales.double()[:, None]


def of_int8(kind: type, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The layer of rounded operands, exactly."""
    return (x.double() if kind is WeightOnlyInt8 else rounded(x)) @ rounded(weight).T


@both_dtypes
@pytest.mark.parametrize(("num_columns", "size"), SHAPES)
def test_a_layer_is_that_of_the_rounded_weights_and_tokens(kind, num_columns, size, dtype):
    weight, bias = random(num_columns, size, dtype=dtype), random(num_columns, dtype=dtype)
    plain, biased = kind([weight], [], ""), kind([weight], [bias], "")

    for num_tokens in NUM_TOKENS:
        x = random(num_tokens, size, dtype=dtype)
        exact = of_int8(kind, x, weight)
        atol = (2 if kind is WeightOnlyInt8 else 1) * TOLERANCE[dtype] * float(exact.abs().max() + 1)
        torch.testing.assert_close(plain(x).double(), exact, rtol=0, atol=atol)
        torch.testing.assert_close(biased(x).double(), exact + bias.double(), rtol=0, atol=2 * atol)


@both_dtypes
def test_siblings_and_gates_are_near_what_they_were(kind, dtype):
    for sizes in ((50, 9, 23), (32, 16, 16)):
        weights = [random(n, 72, dtype=dtype) for n in sizes]
        siblings, before = kind(weights, [], ""), BorrowedLinear(weights, [], "")
        for num_tokens in (1, 7, 30):
            x = random(num_tokens, 72, dtype=dtype)
            assert (siblings(x) - before(x)).norm() < 0.02 * before(x).norm()
    for gate in ("silu", "gelu_tanh", "gelu"):
        weights, biases = [random(40, 72 + i, dtype=dtype)[:, :72] for i in range(2)], [random(40 + i, dtype=dtype)[:40] for i in range(2)]
        gated, before = kind(weights, biases, gate), BorrowedLinear(weights, biases, gate)
        for num_tokens in NUM_TOKENS:
            x = random(num_tokens, 72, dtype=dtype)
            assert (gated(x) - before(x)).norm() < 0.03 * before(x).norm()


@both_dtypes
def test_channels_and_tokens_of_very_different_size_do_not_harm_each_other(kind, dtype):
    weight, x = random(40, 64, dtype=dtype), random(6, 64, dtype=dtype)
    weight *= 10.0 ** torch.linspace(-12, 12, 40)[:, None].to(dtype)
    x *= 10.0 ** torch.linspace(-6, 6, 6)[:, None].to(dtype)

    y, before = kind([weight], [], "")(x).double(), x.double() @ weight.double().T

    assert ((y - before).abs() < 0.05 * x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)).all()


def test_sums_of_very_many_products_do_not_overflow(kind):
    size = 100_000
    x = torch.ones(13, size)
    x[1] = -1.0

    y = kind([torch.ones(20, size)], [], "")(x)

    torch.testing.assert_close(y, x[:, :1].expand(-1, 20) * size, rtol=1e-4, atol=0)


def test_zeros_are_zeros_and_what_is_no_number_does_not_look_like_one(kind):
    weight = random(20, 36)
    weight[3] = 0.0
    weight[4] = 1e-42  # the inverse of its scale would be infinite
    layer = kind([weight], [], "")
    x = random(5, 36)
    x[1] = 0.0
    x[2, 7], x[3, 7] = float("inf"), float("nan")

    y = layer(x)

    assert (y[:, 3:5][[0, 1, 4]].abs() < 1e-30).all()
    assert (y[1] == 0).all()
    assert not torch.isfinite(y[2:4, 5:]).any()
    torch.testing.assert_close(y[[0, 4]], layer(x[[0, 4]]))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_no_numbers_are_refused(kind, value):
    weight = random(20, 36)
    weight[5, 6] = value

    with pytest.raises(LoadError, match=r"a weight of the shape \[20, 36\] holds infinity or NaN"):
        kind([random(20, 36), weight], [], "silu")


def test_low_rank_adapters_add_before_the_gate(kind):
    weights, x = [random(40, 72), random(40, 73)[:, :72]], random(3, 72)
    layer = kind(weights, [], "silu")

    def add(y: torch.Tensor, _: torch.Tensor) -> None:
        y += 1.0

    opened, up = (BorrowedLinear([weight], [], "")(x) + 1.0 for weight in weights)
    expected = torch.nn.functional.silu(opened) * up
    assert (layer(x, add) - expected).norm() < 0.03 * expected.norm()


def test_the_layer_is_chosen_by_what_the_machine_can_do(monkeypatch):
    if kernels.load() and torch.ops.fairlead.fast_int8():
        assert isinstance(prepare([random(32, 16)], native=True), PackedInt8)
    assert isinstance(prepare([random(32, 16)], native=False), TorchInt8)

    monkeypatch.setattr(quant, "works", lambda kind: kind is TorchInt8)
    assert isinstance(prepare([random(32, 16)], native=True), TorchInt8)
    with pytest.raises(LoadError, match=r"`llm.deterministic` with `llm.quantization: int8` needs AVX-512 VNNI"):
        prepare([random(32, 16)], native=True, fixed=True)
    monkeypatch.setattr(quant, "works", lambda kind: False)
    assert isinstance(prepare([random(32, 16)], native=True), WeightOnlyInt8)


class Liar(TorchInt8):
    def __call__(self, x, add=None):
        return super().__call__(x, add) * 1.05


def test_a_kernel_that_computes_something_else_is_not_used():
    assert not quant.works(Liar)
    assert quant.works(TorchInt8)


# ---- models


def test_off_is_what_it_was(monkeypatch):
    monkeypatch.setattr(quant, "prepare", None)  # nobody asks

    loaded = load_decoder(CHAT, LlmSpec(quantization="off"))

    assert not any(line.startswith("quantization") for line in loaded.explain)


@pytest.mark.parametrize("decoder", ["lean", "graph"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_quantised_model_says_nearly_the_same(decoder, kernels):
    ids = torch.arange(5, 60)
    before, after = (load_decoder(CHAT, LlmSpec(quantization=way, decoder=decoder, kernels=kernels)) for way in ("off", "int8"))

    found = fidelity(logits_of(before.decoder, ids), logits_of(after.decoder, ids), "numbers")

    assert 0.001 < found.error < 0.05
    assert found.agreement > 0.85
    (line,) = (line for line in after.explain if line.startswith("quantization"))
    assert "the same token wins at" in line
    assert "of 64 positions of a text" in line


def test_a_model_without_a_tokenizer_is_compared_on_random_tokens(tmp_path):
    folder = tiny_checkpoint(tmp_path, "qwen3")
    (folder / "tokenizer.json").unlink()

    assert any("of 64 positions of random tokens" in line for line in load_decoder(folder, LlmSpec(quantization="int8")).explain)


def test_the_graphs_layers_are_quantised_as_far_as_they_are_linear(tmp_path):
    shares = {}
    for name in ("mixtral", "gpt2", "phi3"):
        loaded = load_decoder(tiny_checkpoint(tmp_path / name, name), LlmSpec(quantization="int8"))
        (line,) = (line for line in loaded.explain if line.startswith("quantization"))
        shares[name] = int(line.partition("linear layers with ")[2].partition("%")[0])

    assert 10 < shares["mixtral"] < 60  # its experts are no layers of their own
    assert shares["gpt2"] > 60
    assert shares["phi3"] > 60
    with pytest.raises(LoadError, match="finds no linear layers in Sequential"):
        quant.quantize_graph(torch.nn.Sequential(torch.nn.Embedding(9, 9)), native=False)


def test_a_model_that_int8_ruins_is_refused(monkeypatch):
    class Broken(TorchInt8):
        def __call__(self, x, add=None):
            return super().__call__(x, add).flip(-1)

    monkeypatch.setattr(quant, "PackedInt8", Broken)
    monkeypatch.setattr(quant, "works", lambda kind: True)

    with pytest.raises(LoadError, match="`llm.quantization: int8` ruins this model: logits differ by"):
        load_decoder(CHAT, LlmSpec(quantization="int8"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
@pytest.mark.parametrize("quantization", ["off", "int8"])
def test_the_files_are_let_go(quantization, tmp_path):
    if not kernels.load():
        pytest.skip(kernels.load().reason)
    folder = tiny_checkpoint(tmp_path, "qwen3")

    loaded = load_decoder(folder, LlmSpec(quantization=quantization))
    gc.collect()

    assert loaded.decoder.vocab_size
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_borrowed_layers_are_those_of_the_checkpoint():
    weights, biases = [random(20, 12), random(20, 13)[:, :12]], [random(20), random(21)[:20]]
    x = random(4, 12)

    for gate in ("", "silu"):
        torch.testing.assert_close(BorrowedLinear(weights, biases, gate)(x), linear.PlainLinear(weights, biases, gate)(x))
