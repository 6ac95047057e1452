"""What the decisions of a rollout come to in the store: deployments, stages, aliases and the audit log, all in one transaction."""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import msgspec
import structlog
from msgspec import Struct, field, structs

from fairlead.control.deployments import Deployment, Deployments
from fairlead.control.rollout import (
    Action,
    Member,
    Note,
    Promote,
    Publish,
    Reject,
    Release,
    Return,
    Rollout,
    standing,
)
from fairlead.core.errors import ConfigError
from fairlead.core.versions import CHALLENGER, CHAMPION, Stage
from fairlead.store.registry_rows import DeploymentRow, Move, RolloutRow
from fairlead.store.rows import AuditRow

log = structlog.get_logger("fairlead.control")

CONTROL = "control"
"""The actor of what a rollout decides by itself."""


class Changes(Struct, frozen=True, kw_only=True):
    deployments: Deployments = field(default_factory=dict)
    moves: tuple[Move, ...] = ()
    aliases: Mapping[tuple[str, str], int | None] = field(default_factory=dict)
    """(model, alias) → version; None: it is taken away."""
    audit: tuple[AuditRow, ...] = ()


def deployment_of(rollout: Rollout, member: Member) -> Deployment:
    """What is wanted of one model while the rollout is as it is."""
    policy, wanted = rollout.policy, standing(rollout)
    feedback = any(rule.name.startswith("feedback:") for rule in member.metrics)
    common = Deployment(
        sticky=policy.sticky, rollout=rollout.id, feedback=feedback, rules=policy.shadow, load_seconds=policy.breakers.load_seconds
    )
    match wanted:
        case Publish():
            return structs.replace(common, champion=member.champion, candidate=member.candidate, share=wanted.share, shadow=wanted.shadow)
        case Promote():
            keep = (member.champion,) if member.champion else ()
            return structs.replace(common, champion=member.candidate, keep=keep)
        case Release():
            return Deployment(champion=member.candidate, sticky=policy.sticky)
        case Return():
            return Deployment(champion=member.champion, sticky=policy.sticky)


def changes_of(rollout: Rollout, actions: Iterable[Action], promoted: bool, now: float) -> Changes:
    """`rollout` is as the actions leave it. `promoted`: the candidates were the champions before them."""
    deployments: dict[str, Deployment] = {}
    moves: dict[tuple[str, int], Move] = {}
    aliases: dict[tuple[str, str], int | None] = {}
    audit: list[AuditRow] = []

    def move(model: str, number: int, stage: Stage, reason: str = "") -> None:
        moves[model, number] = Move(model, number, stage, reason)

    for action in actions:
        if isinstance(action, Note):
            audit += [_entry(rollout, member, action, now) for member in rollout.members]
            continue
        if isinstance(action, Reject):
            move(action.model, action.version, Stage.REJECTED, action.reason)
            continue
        for member in rollout.members:
            model, champion, candidate = member.model, member.champion, member.candidate
            deployments[model] = deployment_of(rollout, member)
            if isinstance(action, Publish):
                aliases[model, CHALLENGER] = candidate
            elif isinstance(action, Promote):
                aliases[model, CHAMPION], aliases[model, CHALLENGER] = candidate, None
                move(model, candidate, Stage.SERVING, f"rollout {rollout.id}")
                if champion:
                    move(model, champion, Stage.VALIDATED, f"{model}@{candidate} took its place")
            elif isinstance(action, Return):
                aliases[model, CHALLENGER] = None
                if promoted:
                    aliases[model, CHAMPION] = champion or None
                    move(model, candidate, Stage.VALIDATED, f"{model}@{champion} is back" if champion else "returned")
                    if champion:
                        move(model, champion, Stage.SERVING, f"rollout {rollout.id} was rolled back")
    rejected = {(action.model, action.version): action for action in actions if isinstance(action, Reject)}
    for (model, number), action in rejected.items():
        move(model, number, Stage.REJECTED, action.reason)
    return Changes(deployments=deployments, moves=tuple(moves.values()), aliases=aliases, audit=tuple(audit))


def _entry(rollout: Rollout, member: Member, note: Note, now: float) -> AuditRow:
    details = {"rollout": rollout.id, "reason": note.reason, **note.details}
    return AuditRow(
        time=now, actor=note.actor or CONTROL, action=note.action, subject=f"{member.model}@{member.candidate}", details=details
    )


def rollout_row(rollout: Rollout, *, revision: int, now: float) -> RolloutRow:
    return RolloutRow(
        id=rollout.id,
        model=rollout.members[0].model,
        status=rollout.phase,
        state=msgspec.json.encode(rollout).decode(),
        created=rollout.created,
        updated=now,
        ended=rollout.ended,
        revision=revision,
    )


def rollout_of(row: RolloutRow) -> Rollout:
    """Raises ConfigError: it was written by another release."""
    try:
        return msgspec.json.decode(row.state, type=Rollout)
    except msgspec.DecodeError as error:
        raise ConfigError(f"rollout {row.id} cannot be read, is it of another release? {error}") from None


def deployment_row(model: str, deployment: Deployment, *, revision: int, actor: str, reason: str, now: float) -> DeploymentRow:
    return DeploymentRow(
        model=model,
        state=msgspec.to_builtins(deployment),
        versions=deployment.wanted,
        revision=revision,
        updated=now,
        actor=actor,
        reason=reason,
    )


def deployment_in(row: DeploymentRow) -> Deployment:
    """Raises ConfigError: it was written by another release."""
    try:
        return msgspec.convert(row.state, Deployment)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the deployment of `{row.model}` cannot be read, is it of another release? {error}") from None


def deployments_of(rows: Iterable[DeploymentRow]) -> Deployments:
    """Without those that cannot be read: the other models go on."""
    found = {}
    for row in rows:
        try:
            found[row.model] = deployment_in(row)
        except ConfigError as error:
            _note_unread(row.model, row.revision, error.message)
    return found


@lru_cache(maxsize=1000)
def _note_unread(model: str, revision: int, error: str) -> None:
    """Once, and not at every tick."""
    log.error("deployment_not_read", model=model, revision=revision, error=error, note="what is published of it stays")
