"""Examples whose answer is known."""

import re
from typing import Any

import numpy as np

from fairlead.control.checks import Golden, GoldenRule
from fairlead.control.gates.asking import Answer, ask_all, request_of, shown
from fairlead.control.gates.report import Verdict, failed, passed, skipped
from fairlead.control.gates.trial import Trial
from fairlead.core.errors import FairleadError

NUM_SHOWN = 10


async def golden(trial: Trial) -> Verdict:
    examples, rule = trial.checks.golden, trial.rules.golden
    if not examples:
        return skipped("there are no golden examples")
    requests = [request_of(each, trial.candidate.name) for each in examples]
    answers = await ask_all(trial.candidate, requests, trial.rules.request_seconds)
    wrong = []
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True), start=1):
        why = answer.message if isinstance(answer, FairleadError) else difference(example, answer, rule)
        if why:
            wrong.append({"example": example.name or f"number {number}", "why": why})
    agreement = 1 - len(wrong) / len(examples)
    details: dict[str, Any] = {"examples": len(examples), "agreement": agreement, "wrong": wrong[:NUM_SHOWN]}
    if agreement < rule.min_agreement:
        first = wrong[0]
        return failed(
            f"{len(wrong)} of {len(examples)} examples are answered otherwise, first {first['example']}: {first['why']}", **details
        )
    note = f", {len(wrong)} of them otherwise" if wrong else ""
    return passed(f"{len(examples)} examples are answered{note}", **details)


def difference(example: Golden, answer: Answer, rule: GoldenRule) -> str:
    """How an answer differs from the one that is known, as one sentence; "" where it does not."""
    if example.text is not None:
        return _text_difference(example, answer.text)
    if example.vector:
        return _vector_difference(np.asarray(example.vector), answer.vector, rule.min_cosine)
    rtol = rule.rtol if example.rtol is None else example.rtol
    atol = rule.atol if example.atol is None else example.atol
    for tensor in example.outputs:
        got = answer.outputs.get(tensor.name)
        if got is None:
            return f"there is no output '{tensor.name}'"
        if why := array_difference(tensor.array(), got, rtol, atol):
            return f"output '{tensor.name}' {why}"
    return ""


def _text_difference(example: Golden, text: str) -> str:
    want, got = (example.text or "").strip(), text.strip()
    match example.match:
        case "contains" if want not in got:
            return f"the answer {shown(got)!r} does not contain {shown(want)!r}"
        case "regex" if re.search(want, got) is None:
            return f"the answer {shown(got)!r} does not match {shown(want)!r}"
        case "exact" if want != got:
            return f"the answer is {shown(got)!r} instead of {shown(want)!r}"
    return ""


def _vector_difference(want: np.ndarray, got: np.ndarray | None, min_cosine: float) -> str:
    if got is None or got.shape != want.shape:
        return f"the vector has {0 if got is None else len(got)} components instead of {len(want)}"
    norm = float(np.linalg.norm(want) * np.linalg.norm(got))
    cosine = float(want @ got) / norm if norm > 0 else float(np.array_equal(want, got))
    return "" if cosine >= min_cosine else f"the vector's cosine is {cosine:.6g}, less than {min_cosine:g}"


def array_difference(want: np.ndarray, got: np.ndarray, rtol: float, atol: float) -> str:
    """The end of a sentence that begins with what they are; "" where they agree."""
    if want.shape != got.shape:
        return f"has shape {list(got.shape)} instead of {list(want.shape)}"
    if want.dtype.kind == "O" or got.dtype.kind == "O":
        same = want == got
        if bool(np.all(same)):
            return ""
        at = int(np.argmin(np.asarray(same, bool).reshape(-1)))
        return f"is {shown(str(got.reshape(-1)[at]))} instead of {shown(str(want.reshape(-1)[at]))} at {at}"
    if np.issubdtype(want.dtype, np.integer) or want.dtype == np.bool_:
        rtol = atol = 0.0
    a, b = want.astype(np.float64), got.astype(np.float64)
    close = np.isclose(b, a, rtol=rtol, atol=atol, equal_nan=True)
    if bool(close.all()):
        return ""
    worst = int(np.argmax(np.where(close, -1.0, np.nan_to_num(np.abs(a - b), nan=np.inf)).reshape(-1)))
    return f"is {b.reshape(-1)[worst]:.8g} instead of {a.reshape(-1)[worst]:.8g} at {worst}"
