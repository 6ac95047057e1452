"""What a shadow found: pairs of answers, compared as they come, and what they come to."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from heapq import nlargest
from typing import Literal

import numpy as np
import structlog
from msgspec import Struct, field

from fairlead.control.compare.classes import Calibration, Classes, probabilities
from fairlead.control.compare.numbers import Numbers
from fairlead.control.compare.pictures import Pictures
from fairlead.control.compare.texts import Texts, choices
from fairlead.control.compare.vectors import Vectors, unit_vectors
from fairlead.control.compare.verdict import FAR, SAME, Verdict, worse
from fairlead.control.sequential import Interval, rate_interval
from fairlead.core.generation import Embed, Generate, Paint, Picture, Score
from fairlead.core.request import Request, Response
from fairlead.core.rollout import ShadowRules
from fairlead.core.watch import Pair
from fairlead.core.window import Histogram, add, bucket_of, edge_of, quantile_bucket

log = structlog.get_logger("fairlead.control")

NUM_WORST = 20
MAX_SHOWN_CHARS = 400
MARGIN_CHARS = 1000
"""Looked at beyond what is shown of a longer text, so that what is private is found as a whole."""
MAX_SHOWN_VALUES = 16
MAX_ERRORS = 20
"""Kinds of them that are told apart."""
MAX_OUTPUTS = 64
MAX_UNLABELLED = 10_000
"""Answers that wait for what was true."""
ALPHA = 0.05

Decision = Literal["agree", "disagree", "not enough"]
Redact = Callable[[str], str]


class Disagreement(Struct, frozen=True, kw_only=True):
    """One pair, as it may be shown: without ids, without who asked, its texts redacted."""

    distance: float
    note: str
    """What differs."""
    asked: str
    champion: str
    candidate: str


class ShadowReport(Struct, kw_only=True, omit_defaults=True):
    """What pairs of one model came to in a span. Those of several servers and spans add up."""

    model: str
    champion: str
    candidate: str
    """Versions."""
    begin: float
    end: float
    """Seconds since 1970."""
    num_pairs: int = 0
    """The candidate answered, and it can be told whether as the champion did."""
    num_agree: int = 0
    """Of these."""
    num_failed: int = 0
    """The candidate gave an error, where the champion had answered."""
    num_untold: int = 0
    """Both answered, but sampled texts that nobody scored are neither alike nor not."""
    champion_latency: Histogram = field(default_factory=dict)
    candidate_latency: Histogram = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, Numbers] = field(default_factory=dict)
    """By output."""
    classes: dict[str, Classes] = field(default_factory=dict)
    vectors: dict[str, Vectors] = field(default_factory=dict)
    exact: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By output: how many, how many the same."""
    texts: Texts = field(default_factory=Texts)
    pictures: Pictures = field(default_factory=Pictures)
    labelled: dict[str, tuple[Calibration, Calibration]] = field(default_factory=dict)
    """By output, the champion's and the candidate's: of requests for which feedback said what was true."""
    worst: list[Disagreement] = field(default_factory=list)

    def merge(self, other: "ShadowReport") -> None:
        """Pairs of other versions are not added: of two that differ, the later one stays."""
        if (other.champion, other.candidate) != (self.champion, self.candidate):
            if other.begin > self.begin:
                for name in self.__struct_fields__:
                    setattr(self, name, getattr(other, name))
            return
        self.begin, self.end = min(self.begin, other.begin), max(self.end, other.end)
        self.num_pairs += other.num_pairs
        self.num_agree += other.num_agree
        self.num_failed += other.num_failed
        self.num_untold += other.num_untold
        add(self.champion_latency, other.champion_latency)
        add(self.candidate_latency, other.candidate_latency)
        for error, count in other.errors.items():
            self.add_error(error, count)
        for name, numbers in other.numbers.items():
            self.numbers.setdefault(name, Numbers()).merge(numbers)
        for name, classes in other.classes.items():
            self.classes.setdefault(name, Classes()).merge(classes)
        for name, vectors in other.vectors.items():
            self.vectors.setdefault(name, Vectors()).merge(vectors)
        for name, (num, same) in other.exact.items():
            own = self.exact.get(name, (0, 0))
            self.exact[name] = own[0] + num, own[1] + same
        self.texts.merge(other.texts)
        self.pictures.merge(other.pictures)
        for name, both in other.labelled.items():
            for mine, theirs in zip(self.labelled.setdefault(name, (Calibration(), Calibration())), both, strict=True):
                mine.merge(theirs)
        self.worst = nlargest(NUM_WORST, (*self.worst, *other.worst), key=lambda each: each.distance)

    def add_error(self, error: str, count: int = 1) -> None:
        if error not in self.errors and len(self.errors) >= MAX_ERRORS:
            error = "(other)"
        self.errors[error] = self.errors.get(error, 0) + count

    def agreement(self, alpha: float = ALPHA) -> Interval:
        """Share of the copies that were answered as the champion did, and where it may lie: true at all times at once."""
        return rate_interval(self.num_agree, self.num_pairs + self.num_failed, alpha)

    def decision(self, rules: ShadowRules, alpha: float = ALPHA) -> Decision:
        found = self.agreement(alpha)
        if found.low is not None and found.low >= rules.min_agreement:
            return "agree"
        return "disagree" if found.high is not None and found.high < rules.min_agreement else "not enough"

    def describe(self, rules: ShadowRules, alpha: float = ALPHA) -> dict[str, object]:
        """For people and JSON."""
        found = self.agreement(alpha)
        parts: dict[str, object] = {
            **{name: {"kind": "numbers", **each.describe()} for name, each in self.numbers.items()},
            **{name: {"kind": "classes", **each.describe()} for name, each in self.classes.items()},
            **{name: {"kind": "vectors", **each.describe()} for name, each in self.vectors.items()},
            **{name: {"kind": "exact", "values": num, "same": same / max(num, 1)} for name, (num, same) in self.exact.items()},
        }
        if self.texts.num:
            parts["text"] = {"kind": "texts", **self.texts.describe()}
        if self.pictures.num:
            parts["picture"] = {"kind": "pictures", **self.pictures.describe()}
        labelled = {name: [each.describe() for each in both] for name, both in self.labelled.items()}
        return {
            "model": self.model,
            "champion": self.champion,
            "candidate": self.candidate,
            "decision": self.decision(rules, alpha),
            "agreement": {"value": found.value, "low": found.low, "high": found.high, "least": rules.min_agreement},
            "pairs": self.num_pairs,
            "agree": self.num_agree,
            "failed": self.num_failed,
            "untold": self.num_untold,
            "seconds": {"champion": quantiles(self.champion_latency), "candidate": quantiles(self.candidate_latency)},
            "errors": dict(self.errors),
            "outputs": parts,
            "labelled": labelled,
            "worst": [
                {"distance": each.distance, "note": each.note, "asked": each.asked, "champion": each.champion, "candidate": each.candidate}
                for each in self.worst
            ],
        }


class _Unlabelled(Struct, frozen=True):
    """Two answers to one request, until it is known what was true."""

    model: str
    versions: tuple[str, str]
    output: str
    champion: np.ndarray
    candidate: np.ndarray


class Comparer:
    """Compares pairs as they come, in whatever thread that is."""

    def __init__(
        self, rules_of: Callable[[str], ShadowRules], redact: Redact | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """`rules_of`: a model's. `redact`: what of a text may be shown; None: how long it is."""
        self._rules_of = rules_of
        self._redact = redact
        self._clock = clock
        self._lock = threading.Lock()
        self._reports: dict[str, ShadowReport] = {}
        self._versions: dict[str, tuple[str, str]] = {}
        """By model: those of the last pair, champion and candidate."""
        self._unlabelled: OrderedDict[str, _Unlabelled] = OrderedDict()
        """By request."""

    def add(self, pair: Pair) -> None:
        """Takes up to some ten milliseconds, of pictures. Texts are redacted outside of the lock, for which an event loop may wait."""
        versions = pair.champion_version, pair.candidate_version
        error = self._shown(pair.error) if pair.error else ""
        with self._lock:
            report = self._report(pair.model, versions)
            try:
                verdict = self._add(report, pair, error)
            finally:
                report.end = self._clock()
        if verdict is None:
            return
        shown = self._disagreement(pair, verdict)
        with self._lock:
            if self._versions[pair.model] == versions:  # else it is a report of others by now
                report = self._report(pair.model, versions)  # maybe the next one: the last may be in somebody's hands
                report.worst = nlargest(NUM_WORST, (*report.worst, shown), key=lambda each: each.distance)

    def label(self, request_id: str, truth: float) -> bool:
        """What was true of a request: the index of its class, or its number. Whether one of the pairs is of it."""
        with self._lock:
            found = self._unlabelled.pop(request_id, None)
            if found is None or self._versions[found.model] != found.versions:
                return False
            report = self._report(found.model, found.versions)
            ours, theirs = report.labelled.setdefault(found.output, (Calibration(), Calibration()))
            ours.add_row(found.champion, truth)
            theirs.add_row(found.candidate, truth)
            return True

    def take(self) -> dict[str, ShadowReport]:
        """By model: what came since the last time."""
        with self._lock:
            reports, self._reports = self._reports, {}
            return reports

    def _report(self, model: str, versions: tuple[str, str]) -> ShadowReport:
        self._versions[model] = versions
        found = self._reports.get(model)
        if found is None or (found.champion, found.candidate) != versions:
            now = self._clock()
            found = self._reports[model] = ShadowReport(model=model, champion=versions[0], candidate=versions[1], begin=now, end=now)
        return found

    def _add(self, report: ShadowReport, pair: Pair, error: str) -> Verdict | None:
        """What is to be shown as one of the worst."""
        add(report.champion_latency, {bucket_of(pair.champion_seconds): 1})
        if pair.error:
            report.num_failed += 1
            report.add_error(error)
            return None
        add(report.candidate_latency, {bucket_of(pair.candidate_seconds): 1})
        verdict = compare(report, pair, self._rules_of(pair.model))
        self._remember(pair)
        if verdict.agree is None:
            report.num_untold += 1
            return None
        report.num_pairs += 1
        report.num_agree += verdict.agree
        bad = not verdict.agree and (len(report.worst) < NUM_WORST or verdict.distance > report.worst[-1].distance)
        return verdict if bad else None

    def _remember(self, pair: Pair) -> None:
        """A row that feedback may come to say the truth of."""
        request = pair.request
        name = request.log_id or request.id
        if not name or not pair.champion or not pair.candidate:
            return
        for output, ours in pair.champion[0].outputs.items():
            theirs = pair.candidate[0].outputs.get(output)
            if theirs is None or ours.dtype.kind != "f" or ours.shape != theirs.shape or ours.shape[:1] != (1,):
                continue
            if ours.size == 1 or probabilities(ours):
                versions = pair.champion_version, pair.candidate_version
                self._unlabelled[name] = _Unlabelled(pair.model, versions, output, ours.reshape(-1).copy(), theirs.reshape(-1).copy())
                if len(self._unlabelled) > MAX_UNLABELLED:
                    self._unlabelled.popitem(last=False)
                return

    # What may be shown

    def _disagreement(self, pair: Pair, verdict: Verdict) -> Disagreement:
        return Disagreement(
            distance=verdict.distance,
            note=self._shown(verdict.note) if any_bytes(pair) else verdict.note,
            asked=self._asked(pair.request),
            champion=self._answer(pair.champion),
            candidate=self._answer(pair.candidate),
        )

    def _shown(self, text: str) -> str:
        """Redacted before it is cut: half of a secret is not found to be one, so the end of what was looked at is not shown."""
        if self._redact is None:
            return f"[{len(text)} characters]"
        looked_at = text[: MAX_SHOWN_CHARS + MARGIN_CHARS]
        shown = self._redact(looked_at)
        if len(looked_at) < len(text):
            return shown[:-MARGIN_CHARS][:MAX_SHOWN_CHARS] + "..."
        return shown if len(shown) <= MAX_SHOWN_CHARS else shown[:MAX_SHOWN_CHARS] + "..."

    def _asked(self, request: Request) -> str:
        prompt = request.prompt
        if prompt is None:
            return self._tensors(request.inputs)
        if isinstance(prompt, Generate) and prompt.chat is not None:
            return self._shown("\n".join(f"{each.role}: {each.content or ''}" for each in prompt.chat.messages))
        text = getattr(prompt, "text", None)
        return self._shown(text) if text else f"[{type(prompt).__name__.lower()} of tokens]"

    def _answer(self, responses: Sequence[Response]) -> str:
        if not responses:
            return ""
        if responses[0].delta is None:
            return self._tensors(responses[0].outputs)
        deltas = choices(responses)
        if deltas and deltas[0].text:
            return self._shown(deltas[0].text)
        picture = next((each.delta.picture for each in responses if each.delta is not None and each.delta.picture is not None), None)
        return "" if picture is None else f"[picture, {picture.width} x {picture.height}]"

    def _tensors(self, tensors: dict[str, np.ndarray]) -> str:
        parts = []
        for name, array in tensors.items():
            values = array.reshape(-1)[:MAX_SHOWN_VALUES].tolist()
            shown = [self._shown(each.decode("utf-8", "replace")) if isinstance(each, bytes) else f"{each:.6g}" for each in values]
            parts.append(f"{name} {list(array.shape)}: {', '.join(shown)}{', ...' if array.size > MAX_SHOWN_VALUES else ''}")
        return "; ".join(parts)


def compare(report: ShadowReport, pair: Pair, rules: ShadowRules) -> Verdict:
    """One pair, which has an answer of both; what is known of its kind is added to the report."""
    prompt, champion, candidate = pair.request.prompt, pair.champion, pair.candidate
    if isinstance(prompt, Generate):
        return report.texts.add(prompt, champion, candidate, pair.scores, rules)
    if isinstance(prompt, Embed):
        ours, theirs = vector_of(champion), vector_of(candidate)
        return report.vectors.setdefault("vector", Vectors()).add(ours, theirs, rules)
    if isinstance(prompt, Score):
        return report.numbers.setdefault("score", Numbers()).add(vector_of(champion), vector_of(candidate), rules)
    if isinstance(prompt, Paint):
        return paintings(report, champion, candidate, rules)
    if prompt is not None:
        return exactly(report, "tokens", [told(each) for each in champion] == [told(each) for each in candidate])
    if len(champion) != len(candidate):
        return Verdict(False, FAR, f"{len(candidate)} responses instead of {len(champion)}")
    verdict = SAME
    for one, other in zip(champion, candidate, strict=True):
        for name, array in one.outputs.items():
            if name not in other.outputs:
                verdict = worse(verdict, Verdict(False, FAR, f"no output '{name}'"))
                continue
            found = tensors(report, name, array, other.outputs[name], rules)
            verdict = worse(verdict, Verdict(found.agree, found.distance, f"'{name}': {found.note}" if found.note else ""))
    return verdict


def tensors(report: ShadowReport, name: str, ours: np.ndarray, theirs: np.ndarray, rules: ShadowRules) -> Verdict:
    """One output."""
    kind, other = kind_of(ours), kind_of(theirs)
    if kind != other:
        return Verdict(False, FAR, f"{theirs.dtype} instead of {ours.dtype}")
    known = len(report.numbers) + len(report.classes) + len(report.vectors) + len(report.exact) < MAX_OUTPUTS
    if kind == "floats":
        if probabilities(ours) and (ours.shape != theirs.shape or probabilities(theirs)):
            classes = report.classes.setdefault(name, Classes()) if known else report.classes.get(name, Classes())
            return classes.add_probabilities(ours, theirs)
        if unit_vectors(ours):
            vectors = report.vectors.setdefault(name, Vectors()) if known else report.vectors.get(name, Vectors())
            return vectors.add(ours, theirs, rules)
        numbers = report.numbers.setdefault(name, Numbers()) if known else report.numbers.get(name, Numbers())
        return numbers.add(ours, theirs, rules)
    if ours.size == (len(ours) if ours.ndim else 1) and not (kind == "bytes" and any(len(each) > 64 for each in ours.reshape(-1))):
        classes = report.classes.setdefault(name, Classes()) if known else report.classes.get(name, Classes())
        return classes.add_labels(ours, theirs)
    return exactly(report, name, ours.shape == theirs.shape and bool((ours == theirs).all()))


def exactly(report: ShadowReport, name: str, same: bool) -> Verdict:
    num, num_same = report.exact.get(name, (0, 0))
    report.exact[name] = num + 1, num_same + same
    return SAME if same else Verdict(False, 1.0, "something else")


def paintings(report: ShadowReport, champion: Sequence[Response], candidate: Sequence[Response], rules: ShadowRules) -> Verdict:
    ours, theirs = pictures_of(champion), pictures_of(candidate)
    if ours.keys() != theirs.keys():
        return Verdict(False, FAR, f"{len(theirs)} pictures instead of {len(ours)}")
    verdict = SAME
    for index, one in ours.items():
        try:
            verdict = worse(verdict, report.pictures.add(one, theirs[index], rules))
        except OSError:
            verdict = worse(verdict, Verdict(False, FAR, "a file that is no picture"))
    return verdict


def kind_of(array: np.ndarray) -> str:
    if array.dtype.kind == "O":
        return "bytes"
    return "floats" if array.dtype.kind in "fV" else "labels"


def vector_of(responses: Sequence[Response]) -> np.ndarray:
    data = b"".join(each.delta.vector for each in responses if each.delta is not None)
    return np.frombuffer(data, "<f4").reshape(1, -1)


def pictures_of(responses: Sequence[Response]) -> dict[int, Picture]:
    return {each.delta.index: each.delta.picture for each in responses if each.delta is not None and each.delta.picture is not None}


def told(response: Response) -> object:
    delta = response.delta
    return None if delta is None else (delta.text, delta.reasoning, delta.tool_calls, delta.token_ids, delta.tokens)


def any_bytes(pair: Pair) -> bool:
    """Whether what differs may be a text of somebody's."""
    return any(array.dtype.kind == "O" for response in (*pair.champion, *pair.candidate) for array in response.outputs.values())


def quantiles(latency: Histogram) -> dict[str, float | None]:
    return {name: edge_of(quantile_bucket(latency, q)) if latency else None for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}
