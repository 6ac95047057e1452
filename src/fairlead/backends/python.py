"""Custom Python: any class with an `infer` in the version folder's `model.py`."""

import asyncio
import importlib
import inspect
import itertools
import sys
import threading
import traceback
import types
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from fairlead.backends.base import Backend, Executable
from fairlead.backends.overlay import over_example, spec_of
from fairlead.core.errors import LoadError, ModelError
from fairlead.core.specs import Isolation, ModelSpec
from fairlead.core.tensors import Tensors, canonical


class Context(Struct, frozen=True, kw_only=True):
    """What a Python model is told when it is loaded."""

    name: str
    path: Path
    """The version folder, where its other files are."""
    parameters: dict[str, Any]
    """`parameters` of model.yaml."""
    device: str
    """`cpu`, `cuda` or `cuda:N`."""
    threads: int
    """How many threads its computations may use."""


class Model:
    """The optional base class of a Python model: says what may be written in `model.py`."""

    example: dict[str, Any] | None = None
    """Inputs that work, as arrays or lists by name: warm-up, dry run and schema at once. May be set in `load`."""
    batched: bool = True
    """The first dimension of all inputs and outputs is a batch. Never for generators."""

    def load(self, context: Context) -> None:
        """Called once, before the first `infer`."""

    def infer(self, inputs: dict[str, np.ndarray]) -> Any:
        """Outputs by name: arrays, lists, numbers or strings. `async def` and (async) generators are welcome too.

        The inputs are read-only and gone after the answer: copy what must be changed or kept.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Called once, after the last `infer`."""


class PythonBackend(Backend):
    def load(self, artefact: Path, spec: ModelSpec, threads: int) -> Executable:
        folder = artefact.parent
        context = Context(
            name=spec.name or folder.name, path=folder, parameters=spec.parameters, device=spec.instances.device, threads=threads
        )
        with _siblings_importable(folder, keep=spec.instances.isolation is not Isolation.THREAD):
            module = _execute(artefact, context.name)
            try:
                with _explained(artefact, "cannot be made"):
                    model = _model_class(module, artefact)()
                if callable(getattr(model, "load", None)):
                    with _explained(artefact, "`load` failed"):
                        if inspect.iscoroutine(started := model.load(context)):
                            started.close()
                            raise LoadError(f"{artefact}: `load` must be a plain method, not a coroutine")
                executable = _executable(model, module, context.name)
                try:
                    executable.learn(artefact, spec)
                except BaseException:
                    executable.close()
                    raise
            except BaseException:
                sys.modules.pop(module.__name__, None)
                raise
        return executable


class PythonExecutable(Executable):
    platform = "python"

    def __init__(self, model: Any, module: types.ModuleType, name: str) -> None:
        self.model, self.module, self.name = model, module, name
        self.batches = not self.streams and bool(getattr(model, "batched", True))

    def learn(self, artefact: Path, spec: ModelSpec) -> None:
        """Inputs and outputs: from the example and a dry run with it, or as declared."""
        if self.streams and type(self.model).__dict__.get("batched"):
            raise LoadError(f"{artefact}: a model that yields answers a single request, it cannot be `batched`")
        given = getattr(self.model, "example", None)
        if given is None:
            if not spec.inputs or not spec.outputs:
                batch = "-1, " if self.batches else ""
                raise LoadError(
                    f"{artefact}: the model has no `example` to learn its inputs and outputs from; give it one (a dict of arrays by input name),"
                    f" or write in model.yaml, with your own names, datatypes and shapes:\n"
                    f"inputs:\n  - {{name: x, datatype: FP32, shape: [{batch}4]}}\noutputs:\n  - {{name: y, datatype: FP32, shape: [{batch}1]}}"
                )
            self.inputs, self.outputs = spec.inputs, spec.outputs
            self._check_declared_batch(artefact)
            return
        try:
            if not isinstance(given, dict) or not given:
                raise ValueError("it must be a dict of arrays by input name")
            example = {str(key): canonical(value).view() for key, value in given.items()}
        except ValueError as error:
            raise LoadError(f"{artefact}: wrong `example`: {error}") from None
        for array in example.values():
            array.flags.writeable = False
        rows = {array.shape[:1] for array in example.values()}
        if self.batches and (len(rows) > 1 or rows in ({()}, {(0,)})):
            shapes = ", ".join(f"{key} {list(array.shape)}" for key, array in example.items())
            raise LoadError(
                f"{artefact}: the example's inputs must share a first dimension, the batch ({shapes}); or set `batched = False`"
            )
        self.example = example
        with _explained(artefact, "`infer` failed on the example"):
            try:
                result = self._first(example)
            except ModelError as error:
                raise LoadError(f"{artefact}: {error.message}") from None
        try:
            self.inputs = over_example([spec_of(key, array, batches=self.batches) for key, array in example.items()], spec.inputs, "inputs")
            self.outputs = over_example(
                [spec_of(key, array, batches=self.batches) for key, array in result.items()], spec.outputs, "outputs"
            )
        except LoadError as error:
            raise LoadError(f"{artefact}: {error.message}") from None
        self._check_declared_batch(artefact)

    def close(self) -> None:
        try:
            if callable(getattr(self.model, "close", None)):
                self.model.close()
        finally:
            sys.modules.pop(self.module.__name__, None)

    def tensors(self, result: object, inputs: Tensors) -> Tensors:
        """What `infer` gave, as arrays of KServe's datatypes. Raises ModelError."""
        if not isinstance(result, dict):
            raise ModelError(f"model '{self.name}': `infer` must return a dict of arrays by output name, not {_describe(result)}")
        tensors: Tensors = {}
        for key, value in result.items():
            try:
                tensors[key] = canonical(value)
            except ValueError as error:
                raise ModelError(f"model '{self.name}': output '{key}': {error}") from None
        for spec in self.outputs:
            if spec.name not in tensors and not self.streams:
                raise ModelError(
                    f"model '{self.name}' did not return its output '{spec.name}', but {', '.join(map(repr, result)) or 'nothing'}"
                )
        if self.batches:
            rows = next(iter(inputs.values())).shape[:1]
            for key, array in tensors.items():
                if array.shape[:1] != rows:
                    raise ModelError(
                        f"model '{self.name}': output '{key}' has shape {list(array.shape)} for a batch of {rows[0]};"
                        " return one row for each row of the inputs, or set `batched = False`"
                    )
        return tensors

    def _first(self, example: Tensors) -> Tensors:
        """The first answer to the example."""
        raise NotImplementedError

    def _check_declared_batch(self, artefact: Path) -> None:
        for spec in (*self.inputs, *self.outputs) if self.batches else ():
            if spec.shape[:1] != (-1,):
                raise LoadError(
                    f"{artefact}: {spec.name!r} is declared as {list(spec.shape)}, but a batch needs -1 first; or set `batched = False`"
                )


class _Plain(PythonExecutable):
    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        return self.tensors(self.model.infer(inputs), inputs)

    def _first(self, example: Tensors) -> Tensors:
        return self.infer(example, None)


class _Coroutine(PythonExecutable):
    async def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Tensors:
        return self.tensors(await self.model.infer(inputs), inputs)

    def _first(self, example: Tensors) -> Tensors:
        return asyncio.run(self.infer(example, None))


class _Generator(PythonExecutable):
    streams = True

    def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> Iterator[Tensors]:
        with closing(self.model.infer(inputs)) as results:
            for result in results:
                yield self.tensors(result, inputs)

    def _first(self, example: Tensors) -> Tensors:
        with closing(self.infer(example, None)) as results:  # type: ignore[type-var]
            return next(results, {})


class _AsyncGenerator(PythonExecutable):
    streams = True

    async def infer(self, inputs: Tensors, outputs: frozenset[str] | None) -> AsyncIterator[Tensors]:
        async with aclosing(self.model.infer(inputs)) as results:
            async for result in results:
                yield self.tensors(result, inputs)

    def _first(self, example: Tensors) -> Tensors:
        async def first() -> Tensors:
            async with aclosing(self.infer(example, None)) as results:  # type: ignore[type-var]
                return await anext(results, {})

        return asyncio.run(first())


def _executable(model: Any, module: types.ModuleType, name: str) -> PythonExecutable:
    infer = inspect.unwrap(model.infer)
    if inspect.isasyncgenfunction(infer):
        return _AsyncGenerator(model, module, name)
    if inspect.isgeneratorfunction(infer):
        return _Generator(model, module, name)
    if inspect.iscoroutinefunction(infer):
        return _Coroutine(model, module, name)
    return _Plain(model, module, name)


_numbers = itertools.count(1)
_loading = threading.RLock()
_MARK = "__fairlead_sibling__"


def _execute(artefact: Path, name: str) -> types.ModuleType:
    """Run the file as a module of its own, so that versions live side by side. Raises LoadError."""
    module = types.ModuleType(f"fairlead_model_{''.join(c if c.isalnum() else '_' for c in name)}_{next(_numbers)}")
    module.__file__ = str(artefact)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    try:
        with _explained(artefact, "cannot be imported"):
            exec(compile(artefact.read_bytes(), str(artefact), "exec", dont_inherit=True), module.__dict__)
    except LoadError:
        del sys.modules[module.__name__]
        raise
    return module


def _model_class(module: types.ModuleType, artefact: Path) -> type:
    """The one class with an `infer`, or the one named Model. Raises LoadError."""
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and callable(getattr(value, "infer", None)) and value.infer is not Model.infer  # type: ignore[attr-defined]
    }
    if "Model" in classes:
        return classes["Model"]
    own = [value for value in classes.values() if value.__module__ == module.__name__]
    if len(own) == 1:
        return own[0]
    if own:
        raise LoadError(
            f"{artefact} has {len(own)} classes with an `infer` ({', '.join(c.__name__ for c in own)}); name the one to serve `Model`"
        )
    raise LoadError(f"{artefact} has no class with an `infer(self, inputs)` method")


@contextmanager
def _siblings_importable(folder: Path, *, keep: bool) -> Iterator[None]:
    """Modules next to `model.py` can be imported, each version its own.

    keep: also later, from within `infer`; for a process that is this model's own. Otherwise a late import fails
    rather than find another version's module.
    """
    with _loading:
        names = {item.stem for item in folder.iterdir() if item.suffix == ".py" or item.is_dir()}
        # a copy, for other threads import meanwhile
        _forget(name for name, module in sys.modules.copy().items() if name.partition(".")[0] in names and hasattr(module, _MARK))
        path, write_bytecode = str(folder), sys.dont_write_bytecode
        sys.path.insert(0, path)
        sys.dont_write_bytecode = True  # the version folder stays as it was copied
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.dont_write_bytecode = write_bytecode
            modules = sys.modules.copy()
            siblings = [name for name, module in modules.items() if _is_in(folder, module) and not name.startswith("fairlead_model_")]
            for name in siblings:
                setattr(modules[name], _MARK, path)
            if not keep:
                sys.path.remove(path)
                _forget(siblings)


def _forget(names: Any) -> None:
    for name in list(names):
        del sys.modules[name]


def _is_in(folder: Path, module: object) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and file.startswith(f"{folder}/")


@contextmanager
def _explained(artefact: Path, what: str) -> Iterator[None]:
    """Errors of the model's own code, as a LoadError with the last line of it that ran."""
    try:
        yield
    except LoadError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton_python_backend_utils":
            raise LoadError(
                f"{artefact}: a TritonPythonModel must be ported: write a class Model with `load(self, context)` for `initialize`"
                " and `infer(self, inputs)`, which takes and returns NumPy arrays by name, for `execute`; without pb_utils"
            ) from error
        last = traceback.format_exception_only(error)[-1].strip()
        place = str(artefact)
        if isinstance(error, SyntaxError):
            place = f"{error.filename}:{error.lineno}"
        else:
            for frame, line in traceback.walk_tb(error.__traceback__):
                if frame.f_code.co_filename.startswith(f"{artefact.parent}/"):
                    place = f"{frame.f_code.co_filename}:{line}"
        raise LoadError(f"{place}: {what}: {last}") from error


def _describe(value: object) -> str:
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        return "a generator (write `yield` in `infer` itself to stream)"
    if inspect.iscoroutine(value):
        value.close()
        return "a coroutine (write `async def infer`)"
    return type(value).__name__


BACKEND = PythonBackend()
