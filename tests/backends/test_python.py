"""Custom Python models: `model.py`."""

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable
from contextlib import aclosing, closing
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import numpy as np
import pytest

from fairlead.core.errors import ModelError
from fairlead.core.specs import TensorSpec
from tests.backends.conftest import Load, Why

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(source: str) -> Path:
        (tmp_path / "model.py").write_text(dedent(source))
        return tmp_path

    return write


def x(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.float32)}


DOUBLING = """
    import numpy as np
    class Doubling:
        example = {"x": np.ones((2, 3), np.float32)}
        def infer(self, inputs):
            return {"y": inputs["x"] * 2, "sum": inputs["x"].sum(axis=1)}
"""


def test_the_example_is_schema_dry_run_and_warm_up(write: Write, load: Load) -> None:
    model = load(write(DOUBLING))
    assert model.inputs == (TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),)
    assert [(s.name, s.datatype, s.shape) for s in model.outputs] == [("y", "FP32", (-1, 3)), ("sum", "FP32", (-1,))]
    assert model.batches and not model.streams
    assert model.example is not None
    assert model.infer(model.example, None)["sum"].tolist() == [3.0, 3.0]
    assert model.infer({"x": np.ones((5, 3), np.float32)}, frozenset({"y"}))["y"].shape == (5, 3)


def test_the_base_class_gives_the_same(write: Write, load: Load) -> None:
    model = load(write("""
        from fairlead import Context, Model
        class Scaling(Model):
            def load(self, context: Context) -> None:
                self.factor = context.parameters["factor"]
                self.words = (context.path / "words.txt").exists(), context.device, context.name, context.threads
                self.example = {"x": [[1.0, 2.0]]}
            def infer(self, inputs):
                return {"y": inputs["x"] * self.factor}
    """), "parameters: {factor: 3}")  # fmt: skip
    assert model.infer({"x": np.array([[1.0, 2.0]])}, None)["y"].tolist() == [[3.0, 6.0]]
    assert model.model.words == (False, "cpu", "fraud", 1)  # type: ignore[attr-defined]


def test_import_fairlead_stays_light() -> None:
    code = "import sys, fairlead; assert 'numpy' not in sys.modules; from fairlead import Model; assert 'torch' not in sys.modules; print(Model.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "Model\n"


def test_lists_numbers_and_strings_become_tensors(write: Write, load: Load) -> None:
    model = load(write("""
        class Model:
            batched = False
            example = {"text": "héllo", "k": 3}
            def infer(self, inputs):
                return {"words": [inputs["text"].item().decode(), "b"], "k": inputs["k"].item(), "ok": True, "scores": [0.5]}
    """))  # fmt: skip
    assert [(s.name, s.datatype, s.shape) for s in model.inputs] == [("text", "BYTES", ()), ("k", "INT64", ())]
    assert [(s.name, s.datatype, s.shape) for s in model.outputs] == [
        ("words", "BYTES", (2,)),
        ("k", "INT64", ()),
        ("ok", "BOOL", ()),
        ("scores", "FP64", (1,)),
    ]
    assert not model.batches
    assert model.infer(model.example, None)["words"].tolist() == ["héllo".encode(), b"b"]


async def test_a_coroutine_is_awaited(write: Write, load: Load) -> None:
    folder = write("""
        import asyncio
        class Model:
            example = {"x": [1.0]}
            async def infer(self, inputs):
                await asyncio.sleep(0)
                return {"y": inputs["x"] + 1}
    """)
    model = await asyncio.to_thread(load, folder)
    assert inspect.iscoroutinefunction(model.infer)
    assert (await model.infer({"x": np.array([4.0])}, None))["y"].tolist() == [5.0]


def test_a_generator_streams_until_it_is_closed(write: Write, load: Load) -> None:
    model = load(write("""
        class Model:
            example = {"n": 2}
            left = 0
            def infer(self, inputs):
                try:
                    for i in range(inputs["n"].item()):
                        yield {"token": f"t{i}"}
                finally:
                    self.left += 1
    """))  # fmt: skip
    assert model.streams and not model.batches
    assert [(s.name, s.datatype, s.shape) for s in model.outputs] == [("token", "BYTES", ())]
    assert [r["token"].item() for r in model.infer({"n": np.array(3)}, None)] == [b"t0", b"t1", b"t2"]
    with closing(model.infer({"n": np.array(1_000_000)}, None)) as results:
        next(results)
    assert model.model.left == 3  # type: ignore[attr-defined]


async def test_an_async_generator_streams_until_it_is_closed(write: Write, load: Load) -> None:
    folder = write("""
        class Model:
            example = {"n": 2}
            left = 0
            async def infer(self, inputs):
                try:
                    for i in range(inputs["n"].item()):
                        yield {"i": i}
                finally:
                    self.left += 1
    """)
    model = await asyncio.to_thread(load, folder)
    assert model.streams and inspect.isasyncgenfunction(model.infer)
    async with aclosing(model.infer({"n": np.array(2)}, None)) as results:
        assert [r["i"].item() async for r in results] == [0, 1]
    async with aclosing(model.infer({"n": np.array(9)}, None)) as results:
        await anext(results)
    assert model.model.left == 3  # type: ignore[attr-defined]


def test_without_an_example_the_lines_to_write_are_shown_and_work(
    write: Write, load: Load, why: Why, yaml_lines: Callable[[str], str]
) -> None:
    folder = write("""
        class Model:
            def infer(self, inputs):
                return {"y": inputs["x"][:, :1]}
    """)
    message = why(folder)
    assert "no `example`" in message
    model = load(folder, yaml_lines(message))
    assert model.infer({"x": np.ones((2, 4), np.float32)}, None)["y"].shape == (2, 1)
    assert model.example is None


def test_declared_specs_generalise_the_example(write: Write, load: Load, why: Why) -> None:
    folder = write("""
        class Model:
            batched = False
            example = {"x": [1.0, 2.0, 3.0]}
            def infer(self, inputs):
                return {"y": inputs["x"]}
    """)
    assert load(folder, "inputs: [{name: x, datatype: FP64, shape: [-1]}]").inputs[0].shape == (-1,)
    assert "declares 'x' as FP32 [-1], but the example shows FP64 [3]" in why(folder, "inputs: [{name: x, datatype: FP32, shape: [-1]}]")
    assert "declares 'z', but the example has 'x'" in why(folder, "inputs: [{name: z, datatype: FP64, shape: [-1]}]")


def test_a_wrong_answer_names_the_model(write: Write, load: Load) -> None:
    model = load(write("""
        class Model:
            example = {"x": [1.0]}
            def infer(self, inputs):
                match inputs["x"][0]:
                    case 2.0: return [1.0]
                    case 3.0: return {"z": [1.0]}
                    case 4.0: return {"y": [1.0, 2.0]}
                    case 5.0: return {"y": [object()]}
                    case 6.0: return (i for i in range(3))
                return {"y": [1.0]}
    """))  # fmt: skip
    for value, says in (
        (2.0, "model 'fraud': `infer` must return a dict of arrays by output name, not list"),
        (3.0, "model 'fraud' did not return its output 'y', but 'z'"),
        (4.0, r"model 'fraud': output 'y' has shape \[2\] for a batch of 1"),
        (5.0, "model 'fraud': output 'y': a BYTES tensor holds str or bytes, not object"),
        (6.0, "not a generator"),
    ):
        with pytest.raises(ModelError, match=says):
            model.infer({"x": np.array([value])}, None)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nothing_of_the_sort\n", ":1: cannot be imported: ModuleNotFoundError: No module named 'nothing_of_the_sort'"),
        ("import triton_python_backend_utils as pb_utils\n", ": a TritonPythonModel must be ported: write a class Model with `load(self, context)`"),
        ("def f():\n    raise RuntimeError('no licence')\nf()\n", ":2: cannot be imported: RuntimeError: no licence"),
        ("class Model\n    pass\n", ":1: cannot be imported: SyntaxError: expected ':'"),
        ("import sys\nsys.exit(3)\n", ":2: cannot be imported: SystemExit: 3"),
        ("class Model:\n    pass\n", "has no class with an `infer(self, inputs)` method"),
        ("from fairlead import Model\n", "has no class with an `infer(self, inputs)` method"),
        ("class A:\n    def infer(self, i): ...\nclass B(A): ...\n", "has 2 classes with an `infer` (A, B); name the one to serve `Model`"),
        ("class Model:\n    def infer(self, i): ...\n    def load(self, context):\n        self.weights = open('/absent')\n", ":4: `load` failed: FileNotFoundError"),
        ("class Model:\n    def infer(self, i): ...\n    async def load(self, context): ...\n", "`load` must be a plain method"),
        ("class Model:\n    def __init__(self, size): ...\n    def infer(self, i): ...\n", "cannot be made: TypeError"),
        ("class Model:\n    example = {'x': [1.0]}\n    def infer(self, i):\n        return {'y': i['z']}\n", ":4: `infer` failed on the example: KeyError: 'z'"),
        ("class Model:\n    example = {'x': [1.0]}\n    def infer(self, i):\n        return None\n", "must return a dict of arrays by output name, not NoneType"),
        ("class Model:\n    example = {'x': [1.0]}\n    def infer(self, i):\n        return {'y': 1.0}\n", "return one row for each row of the inputs, or set `batched = False`"),
        ("class Model:\n    example = {'x': 1.0}\n    def infer(self, i): ...\n", "must share a first dimension, the batch (x []); or set `batched = False`"),
        ("class Model:\n    example = {'x': [1j]}\n    def infer(self, i): ...\n", "wrong `example`: NumPy dtype complex128 has no KServe datatype"),
        ("class Model:\n    example = [1.0]\n    def infer(self, i): ...\n", "wrong `example`: it must be a dict"),
        ("class Model:\n    batched = True\n    example = {'x': [1.0]}\n    def infer(self, i):\n        yield {}\n", "cannot be `batched`"),
    ],
)  # fmt: skip
def test_a_broken_model_is_one_sentence_with_its_place(write: Write, why: Why, source: str, says: str) -> None:
    folder = write(source)
    message = why(folder)
    assert says in message and message.startswith(f"{folder}/model.py") and "\n" not in message


def test_a_failed_load_leaves_no_module_behind(write: Write, why: Why) -> None:
    before = set(sys.modules)
    why(write("class Model:\n    example = {'x': [1.0]}\n    def infer(self, i): raise ValueError('no')\n"))
    assert not {name for name in set(sys.modules) - before if name.startswith("fairlead_model_")}


@pytest.mark.parametrize("isolation", ["auto", "thread"])
def test_two_versions_live_side_by_side_with_siblings_of_their_own(tmp_path: Path, load: Load, isolation: str) -> None:
    models = []
    for version in ("1", "2"):
        folder = tmp_path / version
        (folder / "shared_words").mkdir(parents=True)
        (folder / "shared_words" / "__init__.py").write_text(f"from shared_answer import ANSWER\nWORD = 'v{version}-' + ANSWER\n")
        (folder / "shared_answer.py").write_text(f"ANSWER = 'a{version}'\n")
        (folder / "model.py").write_text(
            "from dataclasses import dataclass\nfrom shared_words import WORD\n@dataclass\nclass Model:\n    word: str = WORD\n    example = {'x': [1]}\n    def infer(self, inputs):\n        return {'word': [self.word] * len(inputs['x'])}\n"
        )
        models.append(load(folder, f"instances: {{isolation: {isolation}}}"))
    assert [model.infer({"x": np.array([1])}, None)["word"].tolist() for model in models] == [[b"v1-a1"], [b"v2-a2"]]
    assert not list(tmp_path.rglob("__pycache__"))
    for model in models:
        model.close()
    assert ("shared_words" in sys.modules) == (isolation == "auto")
    for name in ("shared_words", "shared_answer"):
        sys.modules.pop(name, None)
    sys.path[:] = [entry for entry in sys.path if not entry.startswith(str(tmp_path))]


def test_what_other_threads_import_meanwhile_is_no_matter(write: Write, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(ModuleType):
        """A module in whose stead others come in whenever somebody looks at it."""

        def __getattr__(self, name: str) -> object:
            sys.modules[f"busy_{len(sys.modules)}"] = ModuleType("busy")
            raise AttributeError(name)

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "busy", Busy("busy"))
        try:
            model = load(write(DOUBLING))
        finally:
            for name in [name for name in sys.modules if name.startswith("busy_")]:
                del sys.modules[name]
    with closing(model):
        assert model.infer({"x": np.ones((1, 3), np.float32)}, None)["sum"].tolist() == [3]


def test_close_is_called_and_the_module_is_gone(write: Write, load: Load) -> None:
    folder = write("""
        class Model:
            closed = 0
            example = {"x": [1.0]}
            def infer(self, inputs):
                return {"y": inputs["x"]}
            def close(self):
                self.closed += 1
    """)
    model = load(folder)
    name = model.module.__name__  # type: ignore[attr-defined]
    assert name in sys.modules
    model.close()
    assert model.model.closed == 1 and name not in sys.modules  # type: ignore[attr-defined]


def test_the_example_stays_the_users_own(write: Write, load: Load) -> None:
    model = load(write("""
        import numpy as np
        TABLE = np.zeros((1, 2))
        class Model:
            example = {"x": TABLE}
            def infer(self, inputs):
                TABLE[0, 0] += 1
                return {"y": TABLE.copy()}
    """))  # fmt: skip
    assert model.infer({"x": np.zeros((1, 2))}, None)["y"].tolist() == [[2.0, 0.0]]
