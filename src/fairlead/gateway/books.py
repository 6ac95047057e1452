"""What is written down of every request that has ended: metrics, the watch, usage records."""

import time
from collections.abc import Callable

import structlog

from fairlead.core.errors import Filtered
from fairlead.core.generation import Embed, Generate, Score, Usage
from fairlead.core.request import Request
from fairlead.gateway.abuse import Abuse, Seen
from fairlead.gateway.ends import ended, status_of
from fairlead.gateway.usage import UsageLog
from fairlead.gateway.visit import Visit
from fairlead.observe.counts import Counts
from fairlead.store.rows import AuditRow, UsageRow

log = structlog.get_logger("fairlead.gateway")

NOTHING = Usage()
KINDS = {"/v1/chat/completions": "generate", "/v1/completions": "generate", "/v1/embeddings": "embed"}
"""Of bodies that are only passed on, by their path."""
MAX_NAME_CHARS = 256
"""Of what a caller calls its request."""


class Books:
    def __init__(self, counts: Counts, abuse: Abuse | None, usage: UsageLog | None, audit: Callable[[AuditRow], None]) -> None:
        self.counts = counts
        self.abuse = abuse
        self.usage = usage
        self.audit = audit

    def note(self, visit: Visit) -> None:
        """What became of a request, for the metrics, the watch and the usage records."""
        request, caller, error = visit.request, visit.caller, visit.error
        outcome, reason = ended(error)
        if error is not None:
            visit.status = status_of(error)
        elif visit.status >= 400:
            outcome, reason = "failure", "upstream-error"
        if outcome == "refused":
            self.counts.add("fairlead_gateway_refused_total", visit.course.label, reason)
        if visit.output is not None:
            for rule in visit.output.rules:
                self.counts.add("fairlead_gateway_filtered_total", visit.course.label, rule, "answer")
        if isinstance(error, Filtered) and not visit.answered:
            self.counts.add("fairlead_gateway_filtered_total", visit.course.label, error.rule, "request")
        took = visit.took.usage or NOTHING
        if self.abuse is not None and self.abuse.settings.action != "off" and visit.watched:
            self._note_abuse(visit, took, reason)
        take = request.booked or (None if self.usage is None else self.usage.add)
        if take is None:
            return
        take(
            UsageRow(
                time=time.time(),
                request_id=request.log_id or plain(request.id),
                tenant=caller.tenant,
                project=caller.project,
                key=caller.key,
                model=request.model if visit.course.known else "",
                version=plain(visit.version),
                qos_class=visit.qos_class,
                kind=kind_of(request),
                outcome=outcome,
                status=visit.status,
                reason=reason,
                requests=request.num_requests,
                input_tokens=took.prompt_tokens,
                cached_tokens=took.cached_tokens,
                output_tokens=took.completion_tokens,
                rows=visit.took.rows,
                megapixels=took.megapixels,
                compute_seconds=visit.compute_seconds,
                seconds=time.perf_counter() - visit.arrived,
                cost=visit.cost,
                cached=visit.reused,
                address=caller.address,
            )
        )

    def _note_abuse(self, visit: Visit, took: Usage, reason: str) -> None:
        assert self.abuse is not None
        caller, now, tokens = visit.caller, time.monotonic(), took.prompt_tokens + took.completion_tokens
        if visit.status < 400 and not reason and self.abuse.counts(caller.tenant, caller.key, caller.address, tokens, now):
            return
        seen = Seen(
            tenant=caller.tenant,
            key=caller.key,
            address=caller.address,
            status=visit.status,
            filtered=reason == "filtered",
            tokens=tokens,
            text=last_text(visit.request) if self.abuse.wants_text(caller.tenant, now) else "",
        )
        action = self.abuse.note(seen, now)
        if action is not None:
            log.warning("abuse", tenant=action.tenant, action=action.action, score=round(action.score, 2), reasons=action.reasons)
            details = {"score": action.score, "reasons": action.reasons, "seconds": action.until - action.since}
            self.audit(AuditRow(time=time.time(), actor="gateway", action=f"abuse.{action.action}", subject=action.tenant, details=details))


def kind_of(request: Request) -> str:
    """What was asked, in the same words wherever it is computed."""
    if request.prompt is not None:
        return type(request.prompt).__name__.lower()
    return "infer" if request.raw is None else KINDS.get(request.raw.path, "infer")


def plain(text: str) -> str:
    """As much of what a caller wrote as every database takes."""
    text = text[:MAX_NAME_CHARS]
    return text if text.isprintable() else "".join(filter(str.isprintable, text))


def last_text(request: Request) -> str:
    """What its user asked: the last message, or the text."""
    prompt = request.prompt
    if isinstance(prompt, Generate) and prompt.chat is not None:
        return (prompt.chat.messages[-1].content or "") if prompt.chat.messages else ""
    if isinstance(prompt, (Generate, Embed, Score)):
        return prompt.text or ""
    if request.raw is not None:
        return bytes(request.raw.prefix[-2048:]).decode("utf-8", "replace")
    return ""
