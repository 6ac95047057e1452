"""Texts of language models."""

import re
from collections.abc import Sequence

from msgspec import Struct

from fairlead.control.compare.verdict import SAME, Verdict
from fairlead.core.generation import Delta, Generate, TokenLogprob, add_calls
from fairlead.core.request import Response
from fairlead.core.rollout import ShadowRules

REFUSAL = re.compile(
    r"\b(?:I(?:['’]m| am) (?:very |really )?(?:sorry|afraid|unable|not able)|I (?:cannot|can['’]t|can not|won['’]t|must decline)"
    r"|(?:unable|not able) to (?:help|assist|comply|fulfil)|as an? (?:AI|language model))",
    re.IGNORECASE,
)
REFUSAL_CHARS = 200
"""Of an answer's beginning, in which a refusal is looked for."""


class Texts(Struct, kw_only=True, omit_defaults=True):
    """Answers to one prompt."""

    num: int = 0
    num_greedy: int = 0
    """At temperature 0: two versions that are alike say the same."""
    num_same: int = 0
    """Of those, but for white space."""
    champion_tokens: int = 0
    candidate_tokens: int = 0
    champion_cut: int = 0
    """Ended by max_tokens."""
    candidate_cut: int = 0
    champion_refusals: int = 0
    candidate_refusals: int = 0
    num_scored: int = 0
    scored_tokens: int = 0
    """Of the champion."""
    logprob: float = 0.0
    """Sum over these: the candidate's log-probability minus the champion's."""

    def add(
        self,
        prompt: Generate,
        champion: Sequence[Response],
        candidate: Sequence[Response],
        scores: tuple[Response, Response] | None,
        rules: ShadowRules,
    ) -> Verdict:
        ours, theirs = choices(champion), choices(candidate)
        self.num += 1
        for one, other in zip(ours, theirs, strict=False):
            self.champion_tokens += len(one.token_ids)
            self.candidate_tokens += len(other.token_ids)
            self.champion_cut += one.finish_reason == "length"
            self.candidate_cut += other.finish_reason == "length"
            self.champion_refusals += refuses(one.text)
            self.candidate_refusals += refuses(other.text)
        delta = self._score(ours, scores)
        greedy = prompt.sampling.greedy
        if greedy:
            same = len(ours) == len(theirs) and all(same_said(one, other) for one, other in zip(ours, theirs, strict=True))
            self.num_greedy += 1
            self.num_same += same
            if same:
                return SAME
        if delta is not None and not greedy:
            if delta >= -rules.max_logprob_drop:
                return Verdict(True, -delta)
            return Verdict(False, -delta, f"{-delta:.3g} nats a token less likely")
        if not greedy:
            return Verdict(None)
        says, instead = (ours or [Delta()])[0].text, (theirs or [Delta()])[0].text
        at = next((n for n, (a, b) in enumerate(zip(says, instead, strict=False)) if a != b), min(len(says), len(instead)))
        return Verdict(False, 1.0 - at / max(len(says), len(instead), 1), f"another text from character {at} on")

    def _score(self, ours: Sequence[Delta], scores: tuple[Response, Response] | None) -> float | None:
        """By how much a token of the champion's answer is likelier to the candidate."""
        if scores is None or len(ours) != 1:
            return None
        found = [suffix(each.delta.prompt_logprobs or (), ours[0]) for each in scores if each.delta is not None]
        if len(found) != 2 or found[0] is None or found[1] is None or not found[0][1]:
            return None
        difference, num = found[1][0] - found[0][0], found[0][1]
        self.num_scored += 1
        self.scored_tokens += num
        self.logprob += difference
        return difference / num

    def merge(self, other: "Texts") -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def describe(self) -> dict[str, object]:
        num = max(self.num, 1)
        found: dict[str, object] = {
            "texts": self.num,
            "mean_tokens": [self.champion_tokens / num, self.candidate_tokens / num],
            "cut_off": [self.champion_cut / num, self.candidate_cut / num],
            "refused": [self.champion_refusals / num, self.candidate_refusals / num],
        }
        if self.num_greedy:
            found["same_at_temperature_0"] = self.num_same / self.num_greedy
        if self.scored_tokens:
            found["logprob_delta"] = self.logprob / self.scored_tokens
        return found


def choices(responses: Sequence[Response]) -> list[Delta]:
    """The whole text of each choice."""
    whole: dict[int, Delta] = {}
    for response in responses:
        delta = response.delta
        if delta is None:
            continue
        own = whole.setdefault(delta.index, Delta(index=delta.index))
        own.text += delta.text
        add_calls(own.tool_calls, delta.tool_calls)
        own.token_ids = [*own.token_ids, *delta.token_ids] if own.token_ids else delta.token_ids
        own.finish_reason = delta.finish_reason or own.finish_reason
    return [whole[index] for index in sorted(whole)]


def same_said(one: Delta, other: Delta) -> bool:
    """The same text, but for white space, and the same calls; how it was reasoned does not count."""
    calls, others = ([(call.name, plain(call.arguments)) for call in each.tool_calls] for each in (one, other))
    return plain(one.text) == plain(other.text) and calls == others


def plain(text: str) -> str:
    return " ".join(text.split())


def refuses(text: str) -> bool:
    return REFUSAL.search(text[:REFUSAL_CHARS]) is not None


def suffix(tokens: Sequence[TokenLogprob | None], answer: Delta) -> tuple[float, int] | None:
    """Log-probability and number of the tokens that hold the answer, which what was scored ends with; None where it is not found."""
    data = b"".join(token.data if token is not None else b"" for token in tokens)
    wanted = answer.text.strip().encode()
    at = data.rfind(wanted) if wanted else -1
    if at < 0:
        return None
    total, num, begin = 0.0, 0, 0
    for token in tokens:
        end = begin + (len(token.data) if token is not None else 0)
        if token is not None and end > at and begin < at + len(wanted):
            total += token.logprob
            num += 1
        begin = end
    return total, num
