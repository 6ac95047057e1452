"""Checks as files in a folder.

```
checks.yaml     Rules: floors, budgets, tolerances
golden.jsonl    a Golden in each line: a question, and what must come back
dataset.jsonl   a row in each line, with its `label`; or dataset.npz: an array for each input, and `labels`
safety.jsonl    a SafetyPrompt in each line
```
Every file may be missing, and no other is allowed: a name with a slip in it must not pass for a gate.
"""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from fairlead.control.checks import Checks, Dataset, Golden, Packed, Question, Rules, SafetyPrompt, packed
from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError
from fairlead.core.tensors import to_bytes_array

T = TypeVar("T")

RULES, GOLDEN, SAFETY = "checks.yaml", "golden.jsonl", "safety.jsonl"
LINES, ARRAYS = "dataset.jsonl", "dataset.npz"
LABELS = "labels"
"""The array of dataset.npz that holds the labels."""
MAX_BYTES = 256 << 20
"""Of each file."""


class _Row(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of dataset.jsonl with tensors."""

    inputs: dict[str, Any]
    """By input: one row, nested lists."""
    label: str | int | float


class _TextRow(Question, frozen=True, kw_only=True):
    """A line of dataset.jsonl with a `chat` or `prompt`."""

    label: str | int | float


def read_checks(folder: Path) -> Checks:
    """Raises ConfigError that names the file and the line."""
    try:
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    except OSError as error:
        raise ConfigError(f"the checks in {folder} cannot be read: {error.strerror}") from None
    known = (RULES, GOLDEN, LINES, ARRAYS, SAFETY)
    if strange := sorted(names - set(known)):
        raise ConfigError(f"{folder / strange[0]} is no file of checks: there are {', '.join(known)}")
    if not names:
        raise ConfigError(f"{folder} holds no checks: {', '.join(known)}")
    if {LINES, ARRAYS} <= names:
        raise ConfigError(f"{folder} holds both {LINES} and {ARRAYS}: keep one of them")
    dataset = None
    if LINES in names:
        dataset = _dataset_of_lines(folder / LINES)
    elif ARRAYS in names:
        dataset = _dataset_of_arrays(folder / ARRAYS)
    return Checks(
        rules=read_yaml(_text(folder / RULES), Rules, str(folder / RULES)) if RULES in names else Rules(),
        golden=tuple(each for _, each in _lines(folder / GOLDEN, Golden)) if GOLDEN in names else (),
        dataset=dataset,
        safety=tuple(each for _, each in _lines(folder / SAFETY, SafetyPrompt)) if SAFETY in names else (),
    )


def write_golden(path: Path, examples: Sequence[Golden]) -> None:
    """As `read_checks` reads them."""
    path.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in examples))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None


def _lines(path: Path, type_: type[T]) -> Iterator[tuple[int, T]]:
    """(line, what stands in it) of all that are not blank. Raises ConfigError."""
    decoder = msgspec.json.Decoder(type_)
    number = 0
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}:{number}: {error}") from None


def _dataset_of_lines(path: Path) -> Dataset:
    rows = list(_lines(path, msgspec.Raw))
    if not rows:
        raise ConfigError(f"{path} holds no row")
    with_tensors = b'"inputs"' in bytes(rows[0][1])
    type_: type[_Row] | type[_TextRow] = _Row if with_tensors else _TextRow
    decoded: list[tuple[int, Any]] = list(_lines(path, type_))
    labels = [row.label for _, row in decoded]
    if not with_tensors:
        for number, row in decoded:
            if not row.generates:
                raise ConfigError(f"{path}:{number}: a row has `inputs`, a `chat` or a `prompt`")
        questions = tuple(Question(chat=row.chat, prompt=row.prompt, sampling=row.sampling) for _, row in decoded)
        return _dataset(path, labels=labels, questions=questions)
    names = list(decoded[0][1].inputs)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for number, row in decoded:
        if row.inputs.keys() != columns.keys():
            raise ConfigError(f"{path}:{number}: a row with {sorted(row.inputs)}, where the first has {sorted(names)}")
        for name, value in row.inputs.items():
            try:
                array = np.asarray(value)
            except ValueError:
                raise ConfigError(f"{path}:{number}: `{name}` is no array: its lists have different lengths") from None
            if columns[name] and array.shape != columns[name][0].shape:
                raise ConfigError(
                    f"{path}:{number}: `{name}` has shape {list(array.shape)}, in the first row {list(columns[name][0].shape)}"
                )
            columns[name].append(array)
    return _dataset(path, labels=labels, inputs={name: np.stack(arrays) for name, arrays in columns.items()})


def _dataset_of_arrays(path: Path) -> Dataset:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, np.ndarray] = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(f"{path} is no .npz of plain arrays: {error}") from None
    if LABELS not in arrays:
        raise ConfigError(f"{path} has no array `{LABELS}`; it has: {', '.join(arrays) or 'none'}")
    labels = arrays.pop(LABELS)
    return _dataset(path, labels=labels, inputs=arrays)


def _dataset(path: Path, *, labels: Any, inputs: dict[str, np.ndarray] | None = None, questions: tuple[Question, ...] = ()) -> Dataset:
    try:
        return Dataset(labels=_labels(labels), inputs={name: packed(array) for name, array in (inputs or {}).items()}, questions=questions)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _labels(labels: Any) -> Packed:
    if isinstance(labels, list) and len({isinstance(each, str) for each in labels}) > 1:
        raise ValueError("labels are all numbers or all texts")
    array = np.asarray(labels)
    return packed(to_bytes_array(array.astype(object)) if array.dtype.kind in "US" else array)
