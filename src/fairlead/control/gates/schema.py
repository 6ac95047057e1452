"""May who asks the champion go on asking the candidate, unchanged?"""

import msgspec

from fairlead.control.gates.plan import Signature
from fairlead.control.gates.report import Verdict, failed, passed, skipped
from fairlead.control.gates.trial import Trial, signature_of
from fairlead.core.specs import TensorSpec


async def schema(trial: Trial) -> Verdict:
    champion = await trial.champions_signature()
    if champion is None:
        return skipped("there is no champion whose callers must be served")
    breaks = breaking_changes(champion, signature_of(trial.candidate))
    details = {"changes": breaks, "champion": msgspec.to_builtins(champion)}
    if not breaks:
        return passed("every request that the champion takes is taken, and every output is there")
    if trial.rules.breaking:
        return passed(f"breaking, as declared: {'; '.join(breaks)}", **details)
    return failed(f"{'; '.join(breaks)} (declare it with `breaking: true` if that is meant)", **details)


def breaking_changes(champion: Signature, candidate: Signature) -> list[str]:
    """What callers of the champion would notice, one sentence each."""
    found = []
    theirs = {each.name: each for each in candidate.inputs}
    for before in champion.inputs:
        found += _narrower_input(before, theirs.pop(before.name, None))
    found += [f"input '{each.name}' is new, and not optional" for each in theirs.values() if not each.optional]
    outputs = {each.name: each for each in candidate.outputs}
    for before in champion.outputs:
        found += _wider_output(before, outputs.get(before.name))
    if champion.streams != candidate.streams:
        found.append("it answers in pieces" if candidate.streams else "it no longer answers in pieces")
    if champion.batches and not candidate.batches:
        found.append("it takes no batches any more")
    if gone := sorted(set(champion.tasks) - set(candidate.tasks)):
        found.append(f"it does not {' or '.join(gone)} any more")
    if champion.has_chat_template and not candidate.has_chat_template:
        found.append("it has no chat template any more")
    if champion.embedding_size != candidate.embedding_size and champion.embedding_size:
        found.append(f"its vectors have {candidate.embedding_size} components instead of {champion.embedding_size}")
    if 0 < candidate.max_model_len < champion.max_model_len:
        found.append(f"its context is {candidate.max_model_len} tokens instead of {champion.max_model_len}")
    return found


def _narrower_input(before: TensorSpec, now: TensorSpec | None) -> list[str]:
    name = f"input '{before.name}'"
    if now is None:
        return [f"{name} is gone"]
    found = []
    if now.datatype != before.datatype:
        found.append(f"{name} is {now.datatype} instead of {before.datatype}")
    if len(now.shape) != len(before.shape) or any(new not in (-1, old) for new, old in zip(now.shape, before.shape, strict=False)):
        found.append(f"{name} has shape {list(now.shape)} instead of {list(before.shape)}")
    if before.optional and not now.optional:
        found.append(f"{name} is not optional any more")
    return found


def _wider_output(before: TensorSpec, now: TensorSpec | None) -> list[str]:
    name = f"output '{before.name}'"
    if now is None:
        return [f"{name} is gone"]
    found = []
    if now.datatype != before.datatype:
        found.append(f"{name} is {now.datatype} instead of {before.datatype}")
    if len(now.shape) != len(before.shape) or any(old not in (-1, new) for new, old in zip(now.shape, before.shape, strict=False)):
        found.append(f"{name} has shape {list(now.shape)} instead of {list(before.shape)}")
    if before.labels and now.labels != before.labels:
        found.append(f"{name} has other labels, or in another order")
    return found
