"""How often it is right, on rows with known labels, in all and for each class."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct, field

from fairlead.control.checks import AccuracyRule, Dataset
from fairlead.control.gates.asking import Answer, ask_all, request_of, rows_of, shown
from fairlead.control.gates.report import Verdict, failed, passed, skipped
from fairlead.control.gates.trial import ChampionMissing, Trial
from fairlead.core.errors import FairleadError, InvalidRequest
from fairlead.core.specs import ModelSpec
from fairlead.runtime.version import Version

NUM_SHOWN = 20
"""Classes in a report: the worst."""
HIGHER_IS_BETTER = {"accuracy": True, "r2": True, "mae": False, "rmse": False}


class Score(Struct, frozen=True, kw_only=True):
    value: float
    rows: int
    classes: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Class → its rows, and the share of them that is right."""


async def accuracy(trial: Trial) -> Verdict:
    rule, dataset = trial.rules.accuracy, trial.checks.dataset
    if rule is None:
        return skipped("checks.yaml has no `accuracy`")
    if dataset is None:
        return skipped("there is no data set: dataset.jsonl or dataset.npz")
    seconds = trial.rules.request_seconds
    mine = await score_of(trial.candidate, dataset, rule, seconds)
    theirs = None
    if trial.has_champion and (rule.margin is not None or rule.class_margin is not None):
        try:
            theirs = await score_of(await trial.champion(), dataset, rule, seconds)
        except FairleadError as error:
            if not trial.rules.breaking:
                raise ChampionMissing(f"the champion does not answer the data set: {error.message}") from None
    return judged(rule, mine, theirs)


async def score_of(version: Version, dataset: Dataset, rule: AccuracyRule, seconds: float) -> Score:
    """Raises FairleadError: of what the version raises, or where the data set does not fit it."""
    truth = dataset.labels.array()
    if dataset.questions:
        if rule.metric != "accuracy":
            raise InvalidRequest(f"answers in words have no `{rule.metric}`")
        answers = await _answers(version, [request_of(each, version.name) for each in dataset.questions], seconds)
        told = np.asarray([answer.text.strip().casefold() for answer in answers], object)
        return _scored(rule, np.asarray([text(label).strip().casefold() for label in truth], object), told)
    requests = rows_of(version.spec, {name: array.array() for name, array in dataset.inputs.items()})
    answers = await _answers(version, [request for request, _ in requests], seconds)
    name = output_of(version.spec, rule.output)
    parts = []
    for (_, num_rows), answer in zip(requests, answers, strict=True):
        array = answer.outputs.get(name)
        if array is None:
            raise InvalidRequest(f"there is no output '{name}'")
        parts.append(array if version.spec.batches else _one_row(array, num_rows))
    spec = version.spec.output(name)
    return _scored(rule, truth, predicted(np.concatenate(parts), spec.labels if spec else (), truth, rule))


async def _answers(version: Version, requests: Sequence[Any], seconds: float) -> list[Answer]:
    """Raises the first error."""
    answers = []
    for each in await ask_all(version, requests, seconds):
        if isinstance(each, FairleadError):
            raise each
        answers.append(each)
    return answers


def _one_row(array: np.ndarray, num_rows: int) -> np.ndarray:
    """Of an answer to a single row, with or without a first dimension of its own."""
    return array if array.ndim and array.shape[0] == num_rows else array[None]


def output_of(spec: ModelSpec, name: str) -> str:
    """Raises InvalidRequest."""
    names = [each.name for each in spec.outputs]
    if not name and len(names) == 1:
        return names[0]
    if name not in names:
        what = f"no output '{name}'" if name else "several outputs"
        raise InvalidRequest(f"the version has {what}: name one of {', '.join(names)} in `accuracy.output`")
    return name


def predicted(output: np.ndarray, labels: tuple[str, ...], truth: np.ndarray, rule: AccuracyRule) -> np.ndarray:
    """One value a row: a number of `metric`, or a class as `truth` names them. Raises InvalidRequest."""
    values = output.reshape(len(output), -1)
    if rule.metric != "accuracy":
        if values.shape[1] != 1 or values.dtype.kind == "O":
            raise InvalidRequest(f"`{rule.metric}` needs an output of one number a row, not of shape {list(output.shape)}")
        return values[:, 0].astype(np.float64)
    if values.dtype.kind == "O" and values.shape[1] == 1:
        return np.array(values[:, 0])
    indices = _indices(values, two=len(labels) == 2 or (truth.dtype.kind != "O" and set(np.unique(truth).tolist()) <= {0, 1}))
    if truth.dtype.kind != "O":
        return indices
    if not labels or indices.max() >= len(labels) or indices.min() < 0:
        raise InvalidRequest("the data set's labels are texts: give the output its `labels` in model.yaml, by index")
    return np.asarray([labels[index].encode() for index in indices], object)


def _indices(values: np.ndarray, *, two: bool) -> np.ndarray:
    """Classes by index, of [row, score of each class], [row, score of class 1] or [row, class]. Raises InvalidRequest."""
    scores = values.dtype.kind == "f" or values.dtype.name == "bfloat16"
    if values.shape[1] > 1:
        if not scores:
            raise InvalidRequest(f"an output of {values.shape[1]} {values.dtype} a row tells no class")
        return np.array(np.argmax(values.astype(np.float64), axis=1))
    column = values[:, 0].astype(np.float64)
    if scores and two:
        return (column > 0.5).astype(np.int64)
    if not np.array_equal(column, np.rint(column)):
        raise InvalidRequest("an output of one fraction a row tells a class only where there are two")
    return column.astype(np.int64)


def text(label: Any) -> str:
    return label.decode(errors="replace") if isinstance(label, bytes) else f"{label:g}" if isinstance(label, float) else str(label)


def _scored(rule: AccuracyRule, truth: np.ndarray, told: np.ndarray) -> Score:
    if len(told) != len(truth):
        raise InvalidRequest(f"{len(truth)} rows are answered by {len(told)}")
    if rule.metric != "accuracy":
        return Score(value=regression(rule.metric, truth.astype(np.float64), told.astype(np.float64)), rows=len(truth))
    right = np.asarray(truth == told, bool)
    classes = {}
    for label in np.unique(truth):
        mine = right[truth == label]
        classes[text(label)] = (len(mine), float(mine.mean()))
    return Score(value=float(right.mean()), rows=len(truth), classes=classes)


def regression(metric: str, truth: np.ndarray, told: np.ndarray) -> float:
    errors = told - truth
    match metric:
        case "mae":
            return float(np.abs(errors).mean())
        case "rmse":
            return float(np.sqrt((errors**2).mean()))
    spread = float(((truth - truth.mean()) ** 2).sum())
    return 1 - float((errors**2).sum()) / spread if spread > 0 else float("-inf")


def judged(rule: AccuracyRule, mine: Score, theirs: Score | None) -> Verdict:
    better = HIGHER_IS_BETTER[rule.metric]
    details: dict[str, Any] = {"rows": mine.rows, rule.metric: mine.value, "classes": _worst(mine)}
    wrong = []
    if not np.isfinite(mine.value):
        wrong.append(f"its {rule.metric} is {mine.value}")
    if rule.floor is not None and mine.value < rule.floor:
        wrong.append(f"its {rule.metric} is {mine.value:.4g}, less than {rule.floor:g}")
    if rule.ceiling is not None and mine.value > rule.ceiling:
        wrong.append(f"its {rule.metric} is {mine.value:.4g}, more than {rule.ceiling:g}")
    looked_at = {label: share for label, (rows, share) in mine.classes.items() if rows >= rule.class_rows}
    for label, share in sorted(looked_at.items(), key=lambda item: item[1]):
        if rule.class_floor is not None and share < rule.class_floor:
            wrong.append(f"of class {shown(label)!r} {share:.1%} are right, less than {rule.class_floor:.1%}")
    if theirs is not None:
        details["champion"] = theirs.value
        worse = theirs.value - mine.value if better else mine.value - theirs.value
        if rule.margin is not None and worse > rule.margin:
            wrong.append(f"its {rule.metric} is {mine.value:.4g}, the champion's {theirs.value:.4g}: worse by more than {rule.margin:g}")
        for label, share in looked_at.items():
            before = theirs.classes.get(label, (0, 0.0))[1]
            if rule.class_margin is not None and before - share > rule.class_margin:
                wrong.append(
                    f"of class {shown(label)!r} {share:.1%} are right, of the champion's answers {before:.1%}: less by more than {rule.class_margin:.1%}"
                )
    if wrong:
        return failed("; ".join(wrong[:5]), **details)
    beside = f", the champion's {theirs.value:.4g}" if theirs is not None else ""
    return passed(f"its {rule.metric} is {mine.value:.4g} on {mine.rows} rows{beside}", **details)


def _worst(score: Score) -> dict[str, float]:
    shares = {shown(label, 60): share for label, (_, share) in score.classes.items()}
    return dict(sorted(shares.items(), key=lambda item: item[1])[:NUM_SHOWN])
