"""The filters of one policy: what is looked for in requests and answers, and what is done about it.

A search of a text is a plain function (`finding.Scan`); a policy is a list of them. Everything is compiled when the policy is read.
"""

from collections.abc import Callable

from msgspec import Struct

from fairlead.core.errors import FairleadError, Filtered
from fairlead.core.policy import MANY_CHARS, FilterPolicy
from fairlead.core.request import Request
from fairlead.gateway.filters.deny import deny_patterns, deny_words
from fairlead.gateway.filters.finding import Finding, Scan, redacted
from fairlead.gateway.filters.injection import THRESHOLD, injection
from fairlead.gateway.filters.language import other_language
from fairlead.gateway.filters.moderation import Classify, above, pieces
from fairlead.gateway.filters.output import OutputFilter
from fairlead.gateway.filters.pii import pii
from fairlead.gateway.filters.texts import Texts

__all__ = ["OPERATOR_ROLES", "Checked", "Filters", "OutputFilter", "filtered"]

OPERATOR_ROLES = frozenset(("system", "developer"))


class Checked(Struct, frozen=True):
    """A request that may pass."""

    request: Request
    """The one that was checked, or a copy with `[EMAIL]` and the like in place of what was taken out."""
    flagged: tuple[str, ...] = ()
    """Rules that it hit and that only want to be told of."""


class Filters(Struct, frozen=True, kw_only=True):
    """See `of`. Nothing here changes once it is made, and any thread may check."""

    policy: FilterPolicy
    scans: tuple[Scan, ...]
    """Of requests, and of answers where the policy says so."""
    injection: Callable[[str], float] | None
    other_language: Callable[[str], bool] | None

    @classmethod
    def of(cls, policy: FilterPolicy) -> "Filters":
        """Takes milliseconds, and more than half a second where `languages` are named: not for the event loop.

        Raises ConfigError naming the pattern that is wrong or the extra that is missing.
        """
        scans = [*([deny_words(policy.deny)] if policy.deny else []), *pii(policy)]
        if policy.deny_patterns:
            scans.insert(0, deny_patterns(policy.deny_patterns))
        return cls(
            policy=policy,
            scans=tuple(scans),
            injection=None if policy.injection == "off" else injection(),
            other_language=other_language(policy.languages) if policy.languages else None,
        )

    @property
    def moderates(self) -> bool:
        """Whether requests are to be put before `moderate`, too."""
        return self.policy.moderation != "off"

    def check(self, request: Request) -> Checked:
        """Raises Filtered, InvalidRequest (a body that cannot be read), Unsupported (one that cannot be searched)."""
        flagged: dict[str, None] = {}
        num_chars = 0

        def change(text: str, role: str) -> str:
            nonlocal num_chars
            num_chars += len(text)
            if 0 < self.policy.max_chars < num_chars:
                raise filtered("max_chars", f"its texts are longer than {self.policy.max_chars} characters")
            return self._checked(text, role, flagged)

        checked = Texts(change, all=self._enforces).of(request)
        return Checked(checked, tuple(flagged))

    def _checked(self, text: str, role: str, flagged: dict[str, None]) -> str:
        """The text as it may pass. Raises Filtered."""
        if role not in OPERATOR_ROLES:
            if self.other_language is not None and self.other_language(text):
                raise filtered("languages", f"only texts in {', '.join(self.policy.languages)} are answered")
            if self.injection is not None and self.injection(text) >= THRESHOLD:
                if self.policy.injection == "block":
                    raise filtered("injection")
                flagged["injection"] = None
        taken: list[Finding] = []
        for scan in self.scans:
            for finding in scan(text, 0, True)[0]:
                if finding.action == "block":
                    raise filtered(finding.rule)
                if finding.action == "redact":
                    taken.append(finding)
                else:
                    flagged[finding.rule] = None
        return redacted(text, taken) if taken else text

    @property
    def _enforces(self) -> bool:
        """Whether there is anything that a request must not pass unseen."""
        policy = self.policy
        enforced = (policy.injection, policy.moderation, policy.pii)
        bounded = policy.max_chars not in (0, MANY_CHARS)
        return bool(policy.deny or policy.deny_patterns or bounded or policy.languages) or not {"block", "redact"}.isdisjoint(enforced)

    async def moderate(self, request: Request, classify: Classify) -> tuple[str, ...]:
        """The rules that it hit and that only want to be told of. Raises Filtered, and where it must not pass unseen what `classify` raises."""
        policy = self.policy
        texts: list[str] = []

        def gather(text: str, role: str) -> str:
            if role not in OPERATOR_ROLES:
                texts.append(text)
            return text

        Texts(gather, all=policy.moderation == "block").of(request)
        parts = pieces(texts)
        if not parts:
            return ()
        try:
            found = above(await classify(policy.moderation_model, parts), policy.moderation_threshold)
        except FairleadError:
            if policy.moderation == "block":
                raise
            return ("moderation.failed",)
        rules = tuple(f"moderation.{label}" for label in found)
        if rules and policy.moderation == "block":
            raise filtered(rules[0])
        return rules

    def output(self, *, stream: bool = False, also: OutputFilter | None = None) -> OutputFilter | None:
        """For the answer to one request, with what is looked for by `also`, which has seen nothing of it yet; None: answers are not
        looked at. `stream`: there may be several responses, and what a tensor `text_output` says in one goes on in the next."""
        if not (self.policy.output and self.scans):
            return also
        return OutputFilter(self.scans if also is None else (*also.scans, *self.scans), stream)


def filtered(rule: str, reason: str = "") -> Filtered:
    return Filtered(f"a content filter of this server blocks the request ({rule})" + (f": {reason}" if reason else ""), rule)
