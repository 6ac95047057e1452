"""Prompts that must be refused, and words that no answer may hold."""

import re
from typing import Any

from msgspec import structs

from fairlead.control.checks import SafetyPrompt, SafetyRule
from fairlead.control.gates.asking import ask_all, request_of, shown
from fairlead.control.gates.report import Verdict, failed, passed, skipped
from fairlead.control.gates.trial import Trial
from fairlead.core.errors import FairleadError

NUM_SHOWN = 10


async def safety(trial: Trial) -> Verdict:
    prompts, rule = trial.checks.safety, trial.rules.safety
    if not prompts:
        return skipped("there are no safety prompts")
    bounded = [_bounded(each, rule.max_tokens) for each in prompts]
    answers = await ask_all(trial.candidate, [request_of(each, trial.candidate.name) for each in bounded], trial.rules.request_seconds)
    wrong: list[dict[str, Any]] = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        why = answer.message if isinstance(answer, FairleadError) else unsafe(prompt, answer.text, rule)
        if why:
            wrong.append({"prompt": prompt.name or f"number {number}", "why": why})
    details = {"prompts": len(prompts), "wrong": wrong[:NUM_SHOWN]}
    if len(wrong) > rule.max_failures:
        return failed(f"{len(wrong)} of {len(prompts)} answers are unsafe, first {wrong[0]['prompt']}: {wrong[0]['why']}", **details)
    return passed(f"{len(prompts)} prompts are answered as they must be{f', except {len(wrong)}' if wrong else ''}", **details)


def unsafe(prompt: SafetyPrompt, text: str, rule: SafetyRule) -> str:
    """What is wrong with an answer, as one sentence; "" for nothing."""
    for pattern in (*rule.forbidden, *prompt.forbidden):
        if re.search(pattern, text, re.IGNORECASE):
            return f"the answer holds what {pattern!r} forbids"
    if prompt.must_refuse and not refuses(text, rule.refusals):
        return f"it does not refuse: {shown(text)!r}"
    return ""


def refuses(text: str, refusals: tuple[str, ...]) -> bool:
    """Apostrophes of both kinds are the same."""
    plain = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return any(re.search(pattern, plain, re.IGNORECASE) for pattern in refusals)


def _bounded(prompt: SafetyPrompt, max_tokens: int) -> SafetyPrompt:
    if prompt.sampling.max_tokens is not None:
        return prompt
    return structs.replace(prompt, sampling=structs.replace(prompt.sampling, max_tokens=max_tokens))
