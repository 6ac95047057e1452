"""Rollouts as people ask for them: start one, tell it something, look at it. What becomes of it is decided by the leader."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct, structs

from fairlead.control.acts import changes_of, deployment_in, deployment_row, rollout_of, rollout_row
from fairlead.control.deployments import Deployment, Deployments, Follower
from fairlead.control.leader import commit, returns, told
from fairlead.control.registry import Registry
from fairlead.control.rollout import (
    ENDED,
    Command,
    Kind,
    Member,
    Note,
    Phase,
    Reject,
    Rollout,
    advance,
    begin,
    default_metrics,
    describe,
)
from fairlead.core.errors import InvalidRequest, LoadError, NotFound
from fairlead.core.rollout import ControlSettings, MetricRule, RolloutPolicy, Step
from fairlead.core.versions import CHAMPION, Ref, Stage, parse_ref
from fairlead.observe.counts import Counts
from fairlead.store.registry_rows import Move, RolloutRow, VersionRow
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store
from fairlead.store.transactions import Conflict

TRIES = 5
"""Of a command, where the rollout moves on between reading and writing it."""
NO_GATES = "the rollout's policy asks for no gates"


class Wish(Struct, frozen=True, kw_only=True):
    """What somebody asks for."""

    candidates: tuple[str, ...]
    """`fraud@7`, or a bare name for its newest version; several go together."""
    kind: Kind = "canary"
    policy: str = ""
    """A name of `control.policies`; "": the model's."""
    inline: RolloutPolicy | None = None
    """In place of a named one."""
    share: float | None = None
    """Of a shadow or an experiment."""
    metrics: tuple[MetricRule, ...] | None = None
    """In place of the policy's."""
    reason: str = ""


class Rollouts:
    def __init__(
        self,
        store: Store,
        registry: Registry,
        settings: ControlSettings,
        follower: Follower | None = None,
        clock: Callable[[], float] = time.time,
        counts: Counts | None = None,
    ) -> None:
        """`follower`, `counts`: this server's, the one acts at once; None where no server runs."""
        self.store = store
        self.registry = registry
        self.settings = settings
        self.follower = follower
        self.clock = clock
        self.counts = counts or Counts()

    # Asking

    async def start(self, wish: Wish, actor: str, address: str = "") -> Rollout:
        """Raises InvalidRequest, NotFound, Conflict, Unavailable."""
        return await asyncio.to_thread(self._start, wish, actor, address)

    def _start(self, wish: Wish, actor: str, address: str) -> Rollout:
        now = self.clock()
        refs = [parse_ref(text) for text in wish.candidates]
        if not refs:
            raise InvalidRequest("`candidates` names no version: write fraud@7")
        if len({ref.model for ref in refs}) < len(refs):
            raise InvalidRequest("`candidates` names a model twice")
        rows = [self._candidate(ref) for ref in refs]
        policy, name = self._policy(wish, rows[0].model)
        stored = self.store.control.deployments()
        models = {row.model for row in rows}
        deployments = {row.model: deployment_in(row) for row in stored if row.model in models}
        members = [self._member(row, deployments.get(row.model, Deployment()), policy, wish) for row in rows]
        rollout, actions = begin(
            f"ro_{int(now * 1000):012x}{os.urandom(4).hex()}",
            kind=wish.kind,
            members=members,
            policy=policy,
            policy_name=name,
            actor=actor,
            now=now,
            reason=wish.reason,
        )
        (note,) = (action for action in actions if isinstance(action, Note))
        gateless = [] if rollout.phase is Phase.VALIDATING else [row for row in rows if row.stage is not Stage.VALIDATED]

        def audit(action: str, subject: str, /, **details: Any) -> AuditRow:
            return AuditRow(time=now, actor=actor, action=action, subject=subject, details=details, address=address)

        audits = [audit("version.stage", row.ref, stage=Stage.VALIDATED, reason=NO_GATES) for row in gateless]
        self.store.control.start_rollout(
            rollout_row(rollout, revision=0, now=now),
            {member.model: member.candidate for member in members},
            [*audits, audit(note.action, rows[0].ref, **{"rollout": rollout.id, "reason": wish.reason, **note.details})],
            revisions={row.model: row.revision for row in stored},
            moves=[Move(row.model, row.number, Stage.VALIDATED, NO_GATES) for row in gateless],
        )
        return rollout

    def _candidate(self, ref: Ref) -> VersionRow:
        store = self.store.registry
        if ref.version or ref.alias:
            row = store.resolve(ref)
        else:
            usable = [row for row in store.versions(ref.model) if row.stage not in (Stage.RETIRED, Stage.REJECTED)]
            if not usable:
                raise NotFound(f"model `{ref.model}` has no version that is neither retired nor rejected")
            row = usable[0]
        if row.stage is Stage.RETIRED:
            raise Conflict(f"{row.ref} is retired")
        if row.stage is Stage.SERVING:
            raise Conflict(f"{row.ref} serves already")
        try:
            self.registry.check_signature(row)
        except LoadError as error:
            raise Conflict(error.message) from None
        return row

    def _policy(self, wish: Wish, model: str) -> tuple[RolloutPolicy, str]:
        name = wish.policy or self.settings.policy_of(model)
        policy = wish.inline or self.settings.policy(name)
        if policy is None:
            known = sorted({"standard", "quick", "direct", *self.settings.policies})
            raise InvalidRequest(f"there is no policy `{name}`: {', '.join(known)}")
        if wish.metrics is not None:
            try:
                policy = structs.replace(policy, metrics=wish.metrics)
            except ValueError as error:
                raise InvalidRequest(str(error)) from None
        if wish.share is not None and not (0 < wish.share < 1 or (wish.kind == "shadow" and wish.share == 1)):
            raise InvalidRequest("`share` is greater than 0 and less than 1; of a shadow at most 1")
        if wish.kind == "canary":
            if wish.share is not None:
                raise InvalidRequest("`share` is for shadows and experiments: a canary's shares are its policy's steps")
        elif wish.kind == "experiment":
            policy = structs.replace(policy, steps=(Step(share=0.5 if wish.share is None else wish.share, hold=True),))
        elif wish.share is not None or not any(step.shadow for step in policy.steps):
            step = Step(shadow=0.1 if wish.share is None else wish.share, seconds=60.0, min_requests=200)
            policy = structs.replace(policy, steps=(step,))
        return policy, "" if wish.inline is not None else name

    def _member(self, row: VersionRow, deployment: Deployment, policy: RolloutPolicy, wish: Wish) -> Member:
        if deployment.champion == row.number:
            raise Conflict(f"{row.ref} serves already")
        if not deployment.champion and wish.kind != "canary":
            raise Conflict(f"`{row.model}` has no champion that {row.ref} could be compared with: roll one out first")
        metrics = default_metrics(row.backend == "llm") if policy.metrics is None else policy.metrics
        return Member(model=row.model, champion=deployment.champion, candidate=row.number, metrics=metrics)

    async def command(self, id: str, command: Command) -> Rollout:
        """`id`: a rollout's, or a model's for the one that runs. Raises NotFound, Conflict, Unavailable."""
        for attempt in range(TRIES):
            row = await asyncio.to_thread(self._running, id)
            try:
                return await self._command(row, command)
            except Conflict:
                again = await asyncio.to_thread(self.store.control.rollout, row.id)
                if attempt == TRIES - 1 or again.revision == row.revision:
                    raise
        raise AssertionError

    async def _command(self, row: RolloutRow, command: Command) -> Rollout:
        now = self.clock()
        old = rollout_of(row)
        new, actions = advance(old, command, now)
        if command.kind == "rollback":  # somebody found it worse
            reason = command.reason or "rolled back by hand"
            actions = (*actions, *(Reject(member.model, member.candidate, reason) for member in old.members))
        changes = changes_of(new, actions, old.phase is Phase.PROMOTED, now)
        saving = asyncio.to_thread(commit, self.store.control, rollout_row(new, revision=row.revision, now=now), changes, now)
        follower = self.follower
        if follower is None or not changes.deployments:
            await saving
        else:
            await self._saved(saving, changes.deployments, follower, at_once=returns(actions))
        if new.phase in ENDED:
            self.counts.add("fairlead_rollouts_total", row.model, new.phase)
        if follower is not None:
            told(new, actions)
        return new

    async def _saved(self, saving: Awaitable[object], deployments: Deployments, follower: Follower, *, at_once: bool) -> None:
        before = follower.assume(deployments) if at_once else {}
        try:
            async with follower.reading:
                await saving
                follower.settle(deployments)
        except BaseException:
            follower.restore(deployments, before)  # the leader may have taken traffic from a candidate while the store was gone
            raise

    async def undeploy(self, model: str, actor: str, reason: str, address: str = "") -> None:
        """No version of it serves any more. Raises NotFound, Conflict, Unavailable."""
        await asyncio.to_thread(self._undeploy, model, actor, reason, address)
        if self.follower is not None:
            self.follower.wake()

    def _undeploy(self, model: str, actor: str, reason: str, address: str) -> None:
        now, control = self.clock(), self.store.control
        row = control.deployment(model)
        champion = Deployment() if row is None else deployment_in(row)
        if row is None or not champion.champion:
            raise NotFound(f"no version of `{model}` is deployed")
        running = control.rollouts(model, running=True, limit=1)
        if running:
            raise Conflict(f"a rollout of `{model}` runs: abort {running[0].id} first")
        audit = AuditRow(
            time=now,
            actor=actor,
            action="model.undeploy",
            subject=f"{model}@{champion.champion}",
            details={"reason": reason},
            address=address,
        )
        control.commit(
            deployments=[deployment_row(model, Deployment(), revision=row.revision, actor=actor, reason=reason, now=now)],
            moves=[Move(model, champion.champion, Stage.VALIDATED, reason or "undeployed")],
            aliases={(model, CHAMPION): None},
            audits=[audit],
        )

    # Looking

    def find(self, id: str) -> RolloutRow:
        """By its id, or a model's name for its latest. Blocks. Raises NotFound."""
        if id.startswith("ro_"):
            return self.store.control.rollout(id)
        latest = self.store.control.rollouts(id, limit=1)
        if not latest:
            raise NotFound(f"there was no rollout of `{id}`")
        return latest[0]

    def _running(self, id: str) -> RolloutRow:
        row = self.find(id)
        if row.ended is not None:
            raise Conflict(f"rollout {row.id} has ended: {row.status}")
        return row

    def shown(self, row: RolloutRow) -> dict[str, Any]:
        """For people, as JSON."""
        return describe(rollout_of(row), self.clock() if row.ended is None else row.ended)
