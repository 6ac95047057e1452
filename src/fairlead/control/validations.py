"""The gates of registered versions: run here, kept in the registry, and what they say of a version's stage."""

import asyncio
import os
import time
from collections.abc import Callable

import msgspec
import structlog

from fairlead.control.acts import deployments_of
from fairlead.control.checks import Checks
from fairlead.control.deployments import Deployment
from fairlead.control.gates.plan import Plan, Signature, Subject
from fairlead.control.gates.report import GATES, GateResult, Outcome, Report
from fairlead.control.registry import Registry
from fairlead.control.rollout import Rollout, Validated
from fairlead.control.validation import validate
from fairlead.core.errors import FairleadError, LoadError, Unavailable
from fairlead.core.versions import Stage
from fairlead.store.registry_rows import GateOutcome, GateRow, VersionRow
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store

log = structlog.get_logger("fairlead.control")

MAX_AT_ONCE = 1
"""Validations of one server: they measure time and memory."""
MAX_BEGUN = 8
"""That somebody asked for, and that run or wait for their turn."""


class Validations:
    """Called from the event loop."""

    def __init__(self, store: Store, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.registry = registry
        self.clock = clock
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self._begun: set[asyncio.Task[None]] = set()

    def begin(self, model: str, number: int, actor: str) -> str:
        """The id of a run that goes on by itself, and whose gates say what came of it, were it that it failed. Raises Unavailable."""
        if len(self._begun) >= MAX_BEGUN:
            raise Unavailable(f"{MAX_BEGUN} validations run or wait here already")
        run = _new_run()
        task = asyncio.create_task(self._told(model, number, actor, run), name=f"validate-{model}@{number}")
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return run

    async def stop(self) -> None:
        """Give up those that were begun."""
        for task in self._begun:
            task.cancel()
        await asyncio.gather(*self._begun, return_exceptions=True)

    async def _told(self, model: str, number: int, actor: str, run: str) -> None:
        version = f"{model}@{number}"
        try:
            report = await self.run(model, number, actor, run=run)
        except FairleadError as error:
            log.error("not_validated", version=version, error=error.message)
            why = error.message
        except Exception as error:
            log.exception("not_validated", version=version)
            why = f"{type(error).__name__}: {error}"
        else:
            log.info("validated" if report.ok else "not_validated", version=version, reason=report.reason)
            return
        try:
            await asyncio.to_thread(self._keep_error, model, number, run, why)
        except FairleadError as error:
            log.error("gates_not_written", version=version, error=error.message)

    def _keep_error(self, model: str, number: int, run: str, why: str) -> None:
        """Whoever waits for the run's gates gets one."""
        if not self.store.registry.gates(model, number, run):
            failed = GateResult(gate=GATES[0], outcome=Outcome.ERROR, message=why)
            self.store.registry.add_gates([_gate_row(model, number, run, failed, self.clock())])

    async def of_rollout(self, rollout: Rollout) -> Validated:
        """All members, one after the other. Raises Unavailable."""
        for member in rollout.members:
            row = await asyncio.to_thread(self.store.registry.version, member.model, member.candidate)
            if row.stage is Stage.VALIDATED and await asyncio.to_thread(self._passed, row):
                continue
            report = await self.run(member.model, member.candidate, "control")
            if not report.ok:
                at_fault = any(gate.outcome is Outcome.FAILED for gate in report.gates)
                return Validated(ok=False, reason=report.reason, model=member.model, at_fault=at_fault)
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
            await asyncio.to_thread(self._keep, row, report, actor, run or _new_run())
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
        self.store.registry.add_gates([_gate_row(row.model, row.number, run, gate, now) for gate in report.gates])
        if report.signature is not None:
            audit = self._audit(row, "version.signature", actor, "as it was loaded")
            self.store.registry.change_version(row.model, row.number, audit, signature=msgspec.to_builtins(report.signature))
        row = self.store.registry.version(row.model, row.number)
        deployment = deployments_of(self.store.control.deployments()).get(row.model, Deployment())
        # What serves, is tried or is kept for a return stays what it is: its rollout decides.
        if row.number not in deployment.wanted:
            if report.ok:
                self._move(row, Stage.VALIDATED, "all gates passed", actor)
            elif any(gate.outcome is Outcome.FAILED for gate in report.gates):  # else it is not the version's fault
                self._move(row, Stage.REJECTED, report.reason, actor)

    def _move(self, row: VersionRow, stage: Stage, reason: str, actor: str) -> None:
        self.store.registry.move(row.model, row.number, stage, reason, self._audit(row, "version.stage", actor, reason, stage=stage))

    def _audit(self, row: VersionRow, action: str, actor: str, reason: str, **details: str) -> AuditRow:
        return AuditRow(time=self.clock(), actor=actor, action=action, subject=row.ref, details={"reason": reason, **details})


def _new_run() -> str:
    return f"run_{os.urandom(6).hex()}"


def _gate_row(model: str, number: int, run: str, gate: GateResult, now: float) -> GateRow:
    return GateRow(
        model=model,
        number=number,
        run=run,
        gate=gate.gate,
        outcome=GateOutcome(gate.outcome),
        seconds=gate.seconds,
        details={"message": gate.message, **gate.details},
        time=now,
    )
