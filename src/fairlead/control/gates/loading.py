"""Does it load, and does it answer at all?"""

import time

from fairlead.control.gates.asking import ask
from fairlead.control.gates.report import Verdict, failed, passed, skipped
from fairlead.control.gates.trial import Trial
from fairlead.core.errors import FairleadError
from fairlead.runtime.loading import WarmUpFailed


async def load(trial: Trial) -> Verdict:
    began = time.perf_counter()
    try:
        await trial.load()
    except WarmUpFailed as error:
        trial.warm_up_error = error.message
        return passed("it was loaded")
    except FairleadError as error:
        return failed(error.message)
    seconds = time.perf_counter() - began
    return passed(f"{trial.candidate.platform}, loaded and warm in {seconds:.1f} s", platform=trial.candidate.platform)


async def warm_up(trial: Trial) -> Verdict:
    """What loading itself asks are the samples of model.yaml, or the model's own example; beside them the first given question."""
    if trial.warm_up_error:
        return failed(trial.warm_up_error)
    given = trial.given()
    requests = given[:1] or trial.questions()[:1]
    if not requests:
        return skipped("there is no question: give golden examples, a data set, or `warmup` in model.yaml")
    try:
        answer = await ask(trial.candidate, requests[0], trial.rules.request_seconds)
    except FairleadError as error:
        if given:
            return failed(f"its first question is not answered: {error.message}")
        return skipped(f"a made-up question is not answered ({error.message}): give golden examples, a data set, or `warmup` in model.yaml")
    return passed(f"its first answer took {answer.seconds * 1000:.3g} ms", first_seconds=answer.seconds)
