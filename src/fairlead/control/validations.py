"""The gates of registered versions: run here, kept in the registry, and what they say of a version's stage."""

import asyncio
import os
import time
from collections.abc import Callable

import msgspec

from fairlead.control.acts import deployments_of
from fairlead.control.checks import Checks
from fairlead.control.deployments import Deployment
from fairlead.control.gates.plan import Plan, Signature, Subject
from fairlead.control.gates.report import GateResult, Outcome, Report
from fairlead.control.registry import Registry
from fairlead.control.rollout import Rollout, Validated
from fairlead.control.validation import validate
from fairlead.core.errors import LoadError
from fairlead.core.versions import Stage
from fairlead.store.registry_rows import GateOutcome, GateRow, VersionRow
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store

MAX_AT_ONCE = 1
"""Validations of one server: they measure time and memory."""


class Validations:
    """Called from the event loop."""

    def __init__(self, store: Store, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.registry = registry
        self.clock = clock
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def of_rollout(self, rollout: Rollout) -> Validated:
        """All members, one after the other. Raises Unavailable."""
        for member in rollout.members:
            row = await asyncio.to_thread(self.store.registry.version, member.model, member.candidate)
            if row.stage is Stage.VALIDATED and await asyncio.to_thread(self._passed, row):
                continue
            report = await self.run(member.model, member.candidate, "control")
            if not report.ok:
                return Validated(ok=False, reason=report.reason, model=member.model)
        return Validated(ok=True)

    def _passed(self, row: VersionRow) -> bool:
        """Its latest run, if there was one, found nothing."""
        gates = self.store.registry.gates(row.model, row.number)
        return bool(gates) and all(gate.outcome in (GateOutcome.PASSED, GateOutcome.SKIPPED) for gate in gates if gate.run == gates[0].run)

    async def run(
        self, model: str, number: int, actor: str, on_gate: Callable[[GateResult], None] | None = None, *, run: str = ""
    ) -> Report:
        """Raises NotFound, Unavailable, ConfigError for checks that cannot be read. What is wrong with the version is in the report."""
        async with self._turns:
            row, plan, refused = await asyncio.to_thread(self._plan, model, number)
            report = await validate(plan, on_gate) if plan is not None else refused
            assert report is not None
            await asyncio.to_thread(self._keep, row, report, actor, run or f"run_{os.urandom(6).hex()}")
            return report

    def _plan(self, model: str, number: int) -> tuple[VersionRow, Plan | None, Report | None]:
        row = self.store.registry.version(model, number)
        checks = msgspec.convert(self.store.registry.model(model).checks, Checks)
        try:
            candidate = self._subject(row)
        except LoadError as error:
            return row, None, Report.not_loaded(model, str(number), error.message, self.clock())
        deployment = deployments_of(self.store.control.deployments()).get(model, Deployment())
        champion = signature = None
        if deployment.champion and deployment.champion != number:
            serving = self.store.registry.version(model, deployment.champion)
            champion = self._subject(serving)
            signature = msgspec.convert(serving.signature, Signature) if serving.signature else None
        return row, Plan(candidate=candidate, checks=checks, champion=champion, signature=signature), None

    def _subject(self, row: VersionRow) -> Subject:
        hosted = self.registry.hosted(row)
        return Subject(spec=hosted.spec, folder=str(hosted.fetch()), version=str(row.number))

    def _keep(self, row: VersionRow, report: Report, actor: str, run: str) -> None:
        now = self.clock()
        rows = [
            GateRow(
                model=row.model,
                number=row.number,
                run=run,
                gate=gate.gate,
                outcome=GateOutcome(gate.outcome),
                seconds=gate.seconds,
                details={"message": gate.message, **gate.details},
                time=now,
            )
            for gate in report.gates
        ]
        self.store.registry.add_gates(rows)
        if report.signature is not None:
            audit = self._audit(row, "version.signature", actor, "as it was loaded")
            self.store.registry.change_version(row.model, row.number, audit, signature=msgspec.to_builtins(report.signature))
        row = self.store.registry.version(row.model, row.number)
        if row.stage is not Stage.SERVING:
            if report.ok:
                self._move(row, Stage.VALIDATED, "all gates passed", actor)
            elif any(gate.outcome is Outcome.FAILED for gate in report.gates):  # else it is not the version's fault
                self._move(row, Stage.REJECTED, report.reason, actor)

    def _move(self, row: VersionRow, stage: Stage, reason: str, actor: str) -> None:
        self.store.registry.move(row.model, row.number, stage, reason, self._audit(row, "version.stage", actor, reason, stage=stage))

    def _audit(self, row: VersionRow, action: str, actor: str, reason: str, **details: str) -> AuditRow:
        return AuditRow(time=self.clock(), actor=actor, action=action, subject=row.ref, details={"reason": reason, **details})
