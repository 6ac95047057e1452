"""Are the answers numbers at all, and do they depend on the question?"""

import hashlib

import numpy as np

from fairlead.control.checks import SanityRule
from fairlead.control.gates.asking import Answer, ask_all, finite
from fairlead.control.gates.report import Verdict, failed, passed, skipped, unknown
from fairlead.control.gates.trial import Trial
from fairlead.core.errors import FairleadError
from fairlead.core.pictures import decode
from fairlead.core.request import Request


async def sanity(trial: Trial) -> Verdict:
    rule = trial.rules.sanity
    if rule is None or not (rule.finite or rule.varied):
        return skipped("it is not asked for")
    given = trial.given()
    requests = given or trial.questions()
    if not requests:
        return skipped("there is no question: give golden examples, a data set, or `warmup` in model.yaml")
    found = await ask_all(trial.candidate, requests, trial.rules.request_seconds)
    errors = [each for each in found if isinstance(each, FairleadError)]
    if errors and given:
        return failed(f"{len(errors)} of {len(requests)} questions are not answered: {errors[0].message}")
    answers = [each for each in found if not isinstance(each, FairleadError)]
    if not answers:
        return unknown(f"no made-up question is answered ({errors[0].message}): give golden examples or a data set")
    return judged(rule, requests if given else [], answers)


def judged(rule: SanityRule, given: list[Request], answers: list[Answer]) -> Verdict:
    """`given`: the questions that somebody chose; of others, equal answers tell nothing."""
    if rule.finite and (bad := [why for answer in answers if (why := _infinite(answer))]):
        return failed(f"{len(bad)} of {len(answers)} answers hold NaN or infinity, in {bad[0]}", answers=len(answers), bad=len(bad))
    different = len({_digest_of_question(request) for request in given})
    if not rule.varied or different < 2:
        note = "" if not rule.varied else "; whether they vary cannot be told without different questions in the checks"
        return passed(f"{len(answers)} answers are finite{note}", answers=len(answers))
    if len({_digest(answer) for answer in answers}) == 1:
        return failed(f"the same answer comes to {different} different questions", questions=different)
    return passed(f"{len(answers)} answers are finite, and not all the same", answers=len(answers))


def _infinite(answer: Answer) -> str:
    """Where an answer holds no number; "" where nowhere."""
    for name, array in answer.outputs.items():
        if not finite(array):
            return f"output '{name}'"
    if answer.vector is not None and not finite(answer.vector):
        return "the vector"
    if not finite(np.asarray(answer.logprobs)):
        return "the log-probabilities"
    for picture in answer.pictures:  # what a decoder makes of NaN is one colour
        if np.ptp(np.asarray(decode(picture.data, "picture"))) == 0:
            return "the picture, which is of one colour"
    return ""


def _digest(answer: Answer) -> bytes:
    digest = hashlib.sha256(answer.text.encode())
    for name, array in sorted(answer.outputs.items()):
        _add(digest, name, array)
    if answer.vector is not None:
        _add(digest, "vector", answer.vector)
    for picture in answer.pictures:
        digest.update(np.asarray(decode(picture.data, "picture")).tobytes())  # the file itself names its seed
    return digest.digest()


def _digest_of_question(request: Request) -> bytes:
    digest = hashlib.sha256(repr(request.prompt).encode())
    for name, array in sorted(request.inputs.items()):
        _add(digest, name, array)
    return digest.digest()


def _add(digest: "hashlib._Hash", name: str, array: np.ndarray) -> None:
    digest.update(name.encode())
    digest.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else np.ascontiguousarray(array).tobytes())
