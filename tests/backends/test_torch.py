"""TorchScript and torch.export."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from fairlead import save_torchscript
from fairlead.core.errors import ModelError
from fairlead.core.tensors import DTYPES
from tests.backends.conftest import Load, Why

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
DYNAMIC = torch.export.Dim.DYNAMIC


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 3)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.drop(self.linear(x))


class Two(torch.nn.Module):
    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"total": (ids * weights).sum(1), "weights": weights * 2}


class Fields(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Tuples(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Fields:
        return Fields(x, x + 1)


class Scan(torch.nn.Module):
    """Not a batch: the answer is one for all rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(0)


class Same(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def signature(specs: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(s.name, s.datatype, s.shape) for s in specs]


def trace(module: Any, *example: torch.Tensor, **options: Any) -> Any:
    return torch.jit.trace(module.eval(), example, **options)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def save(module: Any) -> Path:
        torch.jit.save(module, tmp_path / "model.pt")
        return tmp_path

    return save


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    def export(module: Any, *args: Any, kwargs: Any = None, **dynamic: Any) -> Path:
        program = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic or None)
        torch.export.save(program, tmp_path / "model.pt2")
        return tmp_path

    return export


Save = Callable[[Any], Path]
Export = Callable[..., Path]
ROWS = np.arange(20, dtype=np.float32).reshape(5, 4)


def test_a_traced_module_tells_its_inputs(save: Save, load: Load) -> None:
    net = Net()
    model = load(save(trace(net, torch.zeros(2, 4))))
    assert signature(model.inputs) == [("x", "FP32", (-1, 4))] and signature(model.outputs) == [("output0", "FP32", (-1, 3))]
    assert model.batches and model.platform == "pytorch_libtorch" and model.example is not None
    want = net(torch.from_numpy(ROWS)).detach().numpy()
    assert_array_equal(model.infer({"x": ROWS}, None)["output0"], want)
    assert model.infer({"x": ROWS[:1]}, frozenset({"output0"}))["output0"].shape == (1, 3)


def test_a_scripted_module_carries_the_example_that_it_was_saved_with(load: Load, tmp_path: Path) -> None:
    save_torchscript(torch.jit.script(Two()), tmp_path / "model.pt", {"weights": torch.ones(1, 2), "ids": np.array([[3, 4]])})
    model = load(tmp_path)
    assert signature(model.inputs) == [("ids", "INT64", (-1, 2)), ("weights", "FP32", (-1, 2))]
    assert signature(model.outputs) == [("total", "FP32", (-1,)), ("weights", "FP32", (-1, 2))]
    assert model.infer(model.example, None)["total"].tolist() == [7.0]
    assert model.infer(model.example, frozenset({"total"})).keys() == {"total"}


def test_without_an_example_the_lines_to_write_are_shown_and_work(
    save: Save, load: Load, why: Why, yaml_lines: Callable[[str], str]
) -> None:
    folder = save(torch.jit.script(Net()))
    message = why(folder)
    assert "carries no example" in message and "save_torchscript" in message
    model = load(folder, yaml_lines(message))
    assert (
        signature(model.inputs) == [("x", "FP32", (-1, 4))] and signature(model.outputs) == [("output0", "FP32", (-1, 3))] and model.batches
    )


def test_declared_names_are_taken_by_position(save: Save, load: Load, why: Why) -> None:
    folder = save(torch.jit.script(Two()))
    names = "inputs: [{name: INPUT__0, datatype: INT64, shape: [-1, 2]}, {name: INPUT__1, datatype: FP32, shape: [-1, 2]}]"
    model = load(folder, names)
    assert model.infer({"INPUT__0": np.array([[2, 3]]), "INPUT__1": np.ones((1, 2), np.float32)}, None)["total"].tolist() == [5.0]
    assert "declares 'ids', 'x', but `forward` takes 'ids', 'weights'" in why(
        folder, names.replace("INPUT__0", "ids").replace("INPUT__1", "x")
    )
    folder = save(trace(Net(), torch.zeros(2, 4)))
    model = load(
        folder,
        "inputs: [{name: INPUT__0, datatype: FP32, shape: [-1, 4]}]\noutputs: [{name: OUTPUT__0, datatype: FP32, shape: [-1, 3], labels: [a, b, c]}]",
    )
    assert model.infer({"INPUT__0": ROWS}, frozenset({"OUTPUT__0"}))["OUTPUT__0"].shape == (5, 3)
    assert model.outputs[0].labels == ("a", "b", "c")
    assert "but the example shows FP32 [2, 4]" in why(folder, "inputs: [{name: x, datatype: FP64, shape: [-1, 4]}]")
    assert "declares 2, but the artefact has 1" in why(folder, names)


def test_declared_outputs_stand_where_zeros_are_no_input(save: Save, load: Load, why: Why) -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if float(x.sum()) == 0.0:
                raise ValueError("all zeros")
            return x * 2

    folder = save(torch.jit.script(Picky()))
    declared = "inputs: [{name: x, datatype: FP32, shape: [-1, 2]}]"
    assert "fails on its first inputs" in why(folder, declared) and "\n" not in why(folder, declared)
    model = load(folder, declared + "\noutputs: [{name: y, datatype: FP32, shape: [-1, 2]}]")
    assert model.infer({"x": np.ones((1, 2), np.float32)}, None)["y"].tolist() == [[2.0, 2.0]]


def test_open_dimensions_are_open_in_the_outputs_too(save: Save, load: Load) -> None:
    folder = save(trace(Same(), torch.zeros(1, 3, 5)))
    model = load(folder, "inputs: [{name: x, datatype: FP32, shape: [-1, 3, -1]}]")
    assert model.inputs[0].shape == model.outputs[0].shape == (-1, 3, -1)
    model = load(save(torch.jit.script(Same())), "inputs: [{name: x, datatype: FP32, shape: [-1, -1]}]")
    assert model.outputs[0].shape == (-1, -1)


def test_a_module_that_mixes_its_rows_is_no_batch(save: Save, load: Load) -> None:
    model = load(save(trace(Scan(), torch.zeros(2, 4))))
    assert (
        not model.batches and signature(model.inputs) == [("x", "FP32", (2, 4))] and signature(model.outputs) == [("output0", "FP32", (4,))]
    )


def test_named_tuples_name_their_outputs(save: Save, load: Load) -> None:
    model = load(save(torch.jit.script(Tuples())), "inputs: [{name: x, datatype: FP32, shape: [-1]}]")
    assert [spec.name for spec in model.outputs] == ["first", "second"]


@pytest.mark.parametrize(
    "datatype", ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16"]
)
def test_every_datatype_goes_through_without_a_copy_or_a_warning(save: Save, load: Load, datatype: str) -> None:
    model = load(save(torch.jit.script(Same())), f"inputs: [{{name: x, datatype: {datatype}, shape: [-1, 2]}}]")
    rows = np.frombuffer((np.arange(6).reshape(3, 2) % 2).astype(DTYPES[datatype]).tobytes(), DTYPES[datatype]).reshape(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.infer({"x": rows}, None)["output0"]
    assert result.dtype == rows.dtype and np.shares_memory(result.view(np.uint8), rows.view(np.uint8))
    assert_array_equal(result.view(np.uint8), rows.view(np.uint8))
    assert signature(model.outputs) == [("output0", datatype, (-1, 2))]


def test_an_exported_program_tells_everything(export: Export, load: Load) -> None:
    net = Net()
    model = load(export(net, torch.zeros(3, 4), x={0: torch.export.Dim("batch")}))
    assert signature(model.inputs) == [("x", "FP32", (-1, 4))] and signature(model.outputs) == [("output0", "FP32", (-1, 3))]
    assert model.batches and model.platform == "pytorch_export"
    assert model.example is not None and model.example["x"].shape == (3, 4)
    np.testing.assert_allclose(model.infer({"x": ROWS}, None)["output0"], net(torch.from_numpy(ROWS)).detach().numpy(), rtol=1e-6)


def test_an_exported_program_with_keywords_constants_and_a_dict(export: Export, load: Load, why: Why) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, factor: int, *, shift: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": x * factor + shift, "shift": shift.bool()}

    batch = torch.export.Dim("batch")
    folder = export(Scaled(), torch.zeros(2, 4), 3, kwargs={"shift": torch.ones(2, 4)}, x={0: batch}, factor=None, shift={0: batch})
    model = load(folder)
    assert signature(model.inputs) == [("x", "FP32", (-1, 4)), ("shift", "FP32", (-1, 4))]
    assert signature(model.outputs) == [("y", "FP32", (-1, 4)), ("shift", "BOOL", (-1, 4))]
    assert_array_equal(model.infer({"x": ROWS, "shift": ROWS}, frozenset({"y"}))["y"], ROWS * 4)
    model = load(folder, "inputs: [{name: a, datatype: FP32, shape: [-1, 4]}, {name: b, datatype: FP32, shape: [-1, 4]}]")
    assert_array_equal(model.infer({"a": ROWS, "b": ROWS}, None)["y"], ROWS * 4)
    assert "declares 'x' as FP64, but the artefact has FP32" in why(folder, "inputs: [{name: x, datatype: FP64, shape: [-1, 4]}]")


def test_a_program_that_insists_on_two_rows_serves_one(export: Export, load: Load) -> None:
    model = load(export(Net(), torch.zeros(3, 4), x={0: DYNAMIC}))
    assert model.batches
    assert_array_equal(model.infer({"x": ROWS[:1]}, None)["output0"], model.infer({"x": ROWS[:2]}, None)["output0"][:1])


def test_a_program_of_fixed_shape_is_no_batch(export: Export, load: Load) -> None:
    model = load(export(Net(), torch.zeros(3, 4)))
    assert not model.batches and model.inputs[0].shape == (3, 4) and model.outputs[0].shape == (3, 3)


def test_a_program_for_few_rows_asks_for_small_batches(export: Export, load: Load, why: Why, yaml_lines: Callable[[str], str]) -> None:
    folder = export(Net(), torch.zeros(3, 4), x={0: torch.export.Dim("batch", max=16)})
    message = why(folder)
    assert "exported for at most 16 rows, but batches may have 64" in message
    assert load(folder, yaml_lines(message)).batches


def test_bf16_goes_through_an_exported_program(export: Export, load: Load) -> None:
    model = load(export(Same(), torch.zeros(2, 4, dtype=torch.bfloat16), x={0: torch.export.Dim("batch")}))
    rows = ROWS.astype(ml_dtypes.bfloat16)
    assert model.outputs[0].datatype == "BF16"
    assert_array_equal(model.infer({"x": rows}, None)["output0"], rows)


def test_a_module_is_served_in_eval_mode(load: Load, tmp_path: Path) -> None:
    save_torchscript(torch.jit.script(Net().train()), tmp_path / "model.pt", {"x": ROWS})
    model = load(tmp_path)
    assert_array_equal(model.infer({"x": ROWS}, None)["output0"], model.infer({"x": ROWS}, None)["output0"])


def test_an_output_that_is_no_tensor_is_a_clear_error(save: Save, load: Load) -> None:
    class Words(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x, "word"

    declared = "inputs: [{name: x, datatype: FP32, shape: [-1]}]\noutputs: [{name: y, datatype: FP32, shape: [-1]}]"
    with pytest.raises(ModelError, match="output 'output1' is a str"):
        load(save(torch.jit.script(Words())), declared)


def test_weights_without_a_program_are_refused_with_advice(why: Why, tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "model.pt")
    assert "holds a state dict or a pickled module (weights, not a program); export the module" in why(tmp_path)
    torch.save(Net().state_dict(), tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert "is a pickle of torch.save (weights, not a program)" in why(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_cut_or_damaged_archive_is_refused(save: Save, export: Export, why: Why, suffix: str) -> None:
    folder = save(trace(Net(), torch.zeros(2, 4))) if suffix == ".pt" else export(Net(), torch.zeros(2, 4))
    whole = (folder / f"model{suffix}").read_bytes()
    for part in (0.0, 0.01, 0.5, 0.99):
        (folder / f"model{suffix}").write_bytes(whole[: int(len(whole) * part)])
        assert f"model{suffix} is truncated" in why(folder)
        assert f"model{suffix} is truncated" in why(folder, f"backend: {'torchscript' if suffix == '.pt' else 'torch_export'}")
    for name in (b"__torch__.py", b"models/model.json"):
        if (at := whole.find(name)) > 0:
            (folder / f"model{suffix}").write_bytes(whole[: at + 40] + bytes(60) + whole[at + 100 :])
            message = why(folder)
            assert f"model{suffix} is not a whole" in message and "\n" not in message


def test_a_device_that_is_not_there_and_strings_are_refused(save: Save, why: Why) -> None:
    folder = save(trace(Net(), torch.zeros(2, 4)))
    assert "`device: cuda:99` is not there" in why(folder, "instances: {device: 'cuda:99'}")
    assert "'x' is declared as BYTES, but torch has no tensors of strings" in why(
        folder, "inputs: [{name: x, datatype: BYTES, shape: [-1]}]"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_answers_are_the_same(save: Save, export: Export, load: Load) -> None:
    net = Net().eval()
    want = net(torch.from_numpy(ROWS)).detach().numpy()
    for folder in (save(trace(net, torch.zeros(2, 4))), export(net, torch.zeros(3, 4), x={0: torch.export.Dim("batch")})):
        for device in ("cuda", "cuda:0"):
            backend = "torchscript" if (folder / "model.pt2").exists() is False else "torch_export"
            model = load(folder, f"backend: {backend}\ninstances: {{device: '{device}'}}")
            np.testing.assert_allclose(model.infer({"x": ROWS}, None)["output0"], want, rtol=1e-3, atol=1e-3)
