"""A server's control without its doors: a real store, registry and repository, a virtual clock, and a gateway that is told what it saw."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fairlead.control.deployments import Follower
from fairlead.control.leader import Leader, read_deployments
from fairlead.control.registry import Actor, Draft, Registry
from fairlead.control.rollout import Command, Phase, Rollout, Validated
from fairlead.control.rollouts import Rollouts, Wish
from fairlead.control.shadow import ShadowReport
from fairlead.core.request import Request
from fairlead.core.rollout import ControlSettings, RegistrySettings, RolloutPolicy
from fairlead.core.routes import Routes
from fairlead.core.window import Tally, Window
from fairlead.observe.counts import Counts
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import Hosted, ModelRepository, RepositorySettings
from fairlead.store.registry_rows import ExposureRow, VersionRow
from fairlead.store.store import Store

MODEL = """
import numpy as np

class Model:
    example = {{"x": np.zeros((1, 2), np.float32)}}

    def infer(self, inputs):
        return {{"y": inputs["x"] + {add}}}
"""
BROKEN = "raise ImportError('no such thing')\n"
IN_A_THREAD = "instances: {isolation: thread}\n"
ME = Actor("somebody")


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeEyes:
    """What the gateway saw, as it is told."""

    def __init__(self) -> None:
        self.seen: list[Window] = []
        self.exposed: list[ExposureRow] = []
        self.reports: dict[str, ShadowReport] = {}

    def windows(self, now: float) -> Sequence[Window]:
        seen, self.seen = self.seen, []
        return seen

    def exposures(self) -> Sequence[ExposureRow]:
        exposed, self.exposed = self.exposed, []
        return exposed

    def shadows(self) -> Mapping[str, ShadowReport]:
        reports, self.reports = self.reports, {}
        return reports

    def see(self, model: str, now: float, **versions: Tally) -> None:
        """`v6=Tally(...)`."""
        tallies = {name.removeprefix("v"): {"standard": tally} for name, tally in versions.items()}
        self.seen.append(Window(model=model, begin=now - 1, end=now, tallies=tallies))


class House:
    """One server."""

    def __init__(self, store: Store, folder: Path, clock: Clock, policies: dict[str, RolloutPolicy], name: str = "a") -> None:
        self.store = store
        self.clock = clock
        self.name = name
        self.folder = folder
        self.settings = ControlSettings(policies=policies, registry=RegistrySettings(url=str(folder / "registry")))
        self.registry = Registry(store, self.settings.registry, cache_folder=folder / "cache", now=clock)
        self.repository = ModelRepository(RepositorySettings(sources=(), drain_timeout=5.0, cache_folder=folder / "cache"), Metrics())
        self.published: list[Routes] = []
        self.follower = Follower(
            read=lambda: read_deployments(store.control),
            hosted=self.hosted,
            repository=self.repository,
            publish=lambda routes, _: self.published.append(routes),
            poll_seconds=1.0,
        )
        self.eyes = FakeEyes()
        self.counts = Counts()
        self.findings = Validated(ok=True)
        self.leader = self.new_leader()
        self.rollouts = Rollouts(store, self.registry, self.settings, self.follower, clock)

    def new_leader(self) -> Leader:
        """As of a process that was started again."""
        return Leader(
            server=self.name,
            store=self.store.control,
            follower=self.follower,
            eyes=self.eyes,
            validate=self.validate,
            settings=self.settings,
            counts=self.counts,
            clock=self.clock,
        )

    async def validate(self, rollout: Rollout) -> Validated:
        """What the gates found; a version is validated as they do it."""
        from fairlead.core.versions import Stage
        from fairlead.store.rows import AuditRow

        for member in rollout.members:
            stage = Stage.VALIDATED if self.findings.ok else Stage.REJECTED
            audit = AuditRow(time=self.clock(), actor="control", action="version.stage", subject=f"{member.model}@{member.candidate}")
            await asyncio.to_thread(self.store.registry.move, member.model, member.candidate, stage, self.findings.reason, audit)
        return self.findings

    def hosted(self, model: str, number: int) -> Hosted:
        return self.registry.hosted(self.store.registry.version(model, number))

    def add(self, model: str, adds: float | None) -> VersionRow:
        """A version that adds a number; None: one that cannot be loaded."""
        source = self.folder / "sources" / f"{model}-{adds}"
        (source / "1").mkdir(parents=True, exist_ok=True)
        (source / "1" / "model.py").write_text(BROKEN if adds is None else MODEL.format(add=adds))
        (source / "model.yaml").write_text(IN_A_THREAD)
        return self.registry.add(str(source), model, Draft(), ME)[0]

    async def start(self, *candidates: str, policy: str = "", kind: str = "canary", share: float | None = None) -> Rollout:
        return await self.rollouts.start(Wish(candidates=candidates, policy=policy, kind=kind, share=share), "somebody")  # type: ignore[arg-type]

    async def command(self, id: str, kind: str, reason: str = "") -> Rollout:
        return await self.rollouts.command(id, Command(kind=kind, actor="somebody", reason=reason))  # type: ignore[arg-type]

    async def tick(self, seconds: float = 1.0) -> None:
        """Time passes, and everything that follows from the tick happens."""
        self.clock.now += seconds
        await self.leader.tick(self.clock())
        await self.follow()

    async def follow(self) -> None:
        await self.follower.read()
        while self.follower._loads:
            await asyncio.wait(list(self.follower._loads.values()))

    async def until(self, id: str, *phases: Phase, ticks: int = 20) -> Rollout:
        for _ in range(ticks):
            rollout = self.rollout(id)
            if rollout.phase in phases:
                return rollout
            await self.tick()
        raise AssertionError(f"{self.rollout(id).phase}: {self.rollout(id).reason}")

    def rollout(self, id: str) -> Rollout:
        from fairlead.control.acts import rollout_of

        return rollout_of(self.rollouts.find(id))

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        return {model: dict(shares) for model, shares in self.published[-1].shares.items()} if self.published else {}

    async def ask(self, model: str, version: str = "") -> float:
        request = Request(model=model, version=version, inputs={"x": np.zeros((1, 2), np.float32)})
        (answer,) = [response async for response in self.repository.infer(request)]
        return float(answer.outputs["y"][0, 0])

    async def close(self) -> None:
        await self.leader.stop()
        await self.follower.stop()
        await self.repository.stop()
