"""Every way to compute a linear layer gives the same numbers, whatever the shape."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from fairlead.llm import kernels, linear
from fairlead.llm.linear import OneDnnLinear, PackedLinear, PlainLinear, prepare

# What float64 of the rounded inputs may differ by: the rounding of the output, and of float32 sums.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2.0**-8, 1e-3)}
NUM_TOKENS = (1, 2, 3, 4, 7, 8, 11, 12, 13, 16, 24, 25, 31, 32, 48, 61, 70)
SHAPES = [(1, 1), (7, 3), (16, 32), (31, 33), (48, 100), (100, 257), (130, 64), (515, 96)]

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(params=[PackedLinear, OneDnnLinear, PlainLinear])
def kind(request):
    if request.param is PackedLinear and not kernels.load():
        pytest.skip(kernels.load().reason)
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Waking a second one costs more than these layers, the more so on a busy machine."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num)


@pytest.fixture
def native_threads():
    """The kernels' own number of threads, as it was."""
    if not kernels.load():
        pytest.skip(kernels.load().reason)
    num = torch.ops.fairlead.num_threads()
    yield
    torch.ops.fairlead.set_num_threads(num)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@both_dtypes
@pytest.mark.parametrize(("num_columns", "size"), SHAPES)
def test_a_layer_of_any_shape(kind, num_columns, size, dtype):
    weight, bias = random(num_columns, size, dtype=dtype) / size**0.5, random(num_columns, dtype=dtype)
    plain, biased = kind([weight], [], ""), kind([weight], [bias], "")
    rtol, atol = TOLERANCE[dtype]

    for num_tokens in NUM_TOKENS:
        x = random(num_tokens, size, dtype=dtype)
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(plain(x).double(), exact, rtol=rtol, atol=atol)
        torch.testing.assert_close(biased(x).double(), exact + bias.double(), rtol=rtol, atol=atol)


@both_dtypes
def test_threads_share_the_work(native_threads, dtype):
    torch.ops.fairlead.set_num_threads(1)
    layer = PackedLinear([random(1030, 512, dtype=dtype)], [], "")
    batches = [random(num_tokens, 512, dtype=dtype) for num_tokens in (1, 5, 40, 200)]
    alone = [layer(x) for x in batches]

    torch.ops.fairlead.set_num_threads(3)

    for x, expected in zip(batches, alone, strict=True):
        assert torch.equal(layer(x), expected)


def test_callers_at_the_same_time_do_not_wait_for_each_other(native_threads):
    torch.ops.fairlead.set_num_threads(3)
    layer = PackedLinear([random(1030, 512, dtype=torch.float32)], [], "")
    batches = [random(num_tokens, 512, dtype=torch.float32) for num_tokens in (1, 5, 40)]
    alone = [layer(x) for x in batches]

    with ThreadPoolExecutor(4) as callers:
        together = list(callers.map(layer, batches * 20))

    assert all(torch.equal(y, expected) for y, expected in zip(together, alone * 20, strict=True))


def test_a_forked_process_has_threads_of_its_own(native_threads):
    torch.ops.fairlead.set_num_threads(2)
    layer, x = PackedLinear([random(1030, 512, dtype=torch.float32)], [], ""), random(40, 512, dtype=torch.float32)
    expected = layer(x)

    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(layer(x), expected) for _ in range(20)) else 1)

    assert os.waitpid(child, 0)[1] == 0


@both_dtypes
def test_siblings_lie_side_by_side(kind, dtype):
    weights, biases = [random(n, 40, dtype=dtype) / 6 for n in (50, 9, 23)], [random(n, dtype=dtype) for n in (50, 9, 23)]
    layer = kind(weights, biases, "")
    rtol, atol = TOLERANCE[dtype]

    for num_tokens in (1, 6, 33):
        x = random(num_tokens, 40, dtype=dtype)
        exact = torch.cat([x.double() @ w.double().T + b.double() for w, b in zip(weights, biases, strict=True)], 1)
        torch.testing.assert_close(layer(x).double(), exact, rtol=rtol, atol=atol)


@both_dtypes
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("width", [16, 40, 88])
def test_a_gate_opens_its_sibling(kind, gate, width, dtype):
    weights, biases = (
        [random(width, 24 + i, dtype=dtype)[:, :24] / 3 for i in range(2)],
        [random(width + i, dtype=dtype)[:width] for i in range(2)],
    )
    layer = kind(weights, biases, gate)
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2.0**-6, 1e-2)

    for num_tokens in NUM_TOKENS:
        x = random(num_tokens, 24, dtype=dtype) * 3
        opened, up = (x.double() @ w.double().T + b.double() for w, b in zip(weights, biases, strict=True))
        torch.testing.assert_close(layer(x).double(), linear.ACTIVATIONS[gate](opened) * up, rtol=rtol, atol=atol)


@both_dtypes
def test_large_numbers_do_not_break_the_gate(kind, dtype):
    weights = [torch.eye(16, dtype=dtype), torch.ones(16, 16, dtype=dtype)]
    x = torch.zeros(2, 16, dtype=dtype)
    x[0, 0], x[1, 0] = 300.0, -300.0

    shut = kind(weights, [], "silu")(x)

    assert shut[0, 0] == 90000 if dtype == torch.float32 else abs(shut[0, 0] - 90000) < 400
    assert abs(shut[1, 0]) < 1e-20
    assert torch.isfinite(shut).all()


@both_dtypes
def test_rows_do_not_depend_on_their_neighbours(dtype):
    if not kernels.load():
        pytest.skip(kernels.load().reason)
    layer = PackedLinear([random(100, 64, dtype=dtype)], [], "")
    x = random(40, 64, dtype=dtype)

    together = layer(x)

    for begin, end in ((0, 1), (4, 6), (7, 10), (4, 36), (39, 40)):
        assert torch.equal(together[begin:end], layer(x[begin:end]))


def test_views_and_empty_batches(kind):
    weight, x = random(20, 12, dtype=torch.float32), random(6, 30, dtype=torch.float32)
    layer = kind([weight], [], "")

    torch.testing.assert_close(layer(x[:, 9:21]), F.linear(x[:, 9:21], weight))
    assert layer(x[:0, :12]).shape == (0, 20)


@both_dtypes
def test_the_layer_is_chosen_by_what_the_machine_can_do(monkeypatch, dtype):
    weight = random(32, 16, dtype=dtype)
    assert not isinstance(prepare([weight], native=False), PackedLinear)
    if kernels.load() and torch.ops.fairlead.fast_linear() and not torch.cpu._is_amx_tile_supported():
        assert isinstance(prepare([weight], native=True), PackedLinear)

    monkeypatch.setattr(linear, "prefers_own_kernel", lambda dtype: False)
    assert not isinstance(prepare([weight], native=True), PackedLinear)
    monkeypatch.setattr(linear, "works", lambda kind, dtype: False)
    assert isinstance(prepare([weight], native=True), PlainLinear)


class Liar(PackedLinear):
    """Computes something else."""

    def __init__(self, weights, biases, gate):
        self.weight = torch.cat(list(weights)) + 1

    def __call__(self, x):
        return F.linear(x, self.weight)


def test_a_kernel_that_computes_something_else_is_not_used():
    assert not linear.works(Liar, torch.float32)
    assert linear.works(OneDnnLinear, torch.bfloat16)


def test_weights_that_do_not_fit_are_refused():
    if not kernels.load():
        pytest.skip(kernels.load().reason)
    layer = PackedLinear([random(20, 12, dtype=torch.float32)], [], "")

    with pytest.raises(RuntimeError, match="x has 13 columns, the weights 12"):
        layer(random(2, 13, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="weights' type"):
        layer(random(2, 12, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="one shape alternate"):
        PackedLinear([random(20, 12, dtype=torch.float32)], [], "silu")
