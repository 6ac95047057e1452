"""What is wanted of each registered model, and the loop in every server that brings it about.

The store says what is wanted; this server loads it beside what serves, and only then publishes other `Routes`, in one assignment.
What cannot be read or loaded changes nothing: the traffic goes on as it was last published.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import structlog
from msgspec import Struct, structs

from fairlead.core.errors import FairleadError, Unavailable
from fairlead.core.rollout import ShadowRules
from fairlead.core.routes import Routes, Shares
from fairlead.runtime.repository import Hosted, ModelRepository, State

log = structlog.get_logger("fairlead.control")

RETRY_SECONDS = 5.0
"""After which a champion that could not be loaded is tried again, at first."""
MAX_RETRY_SECONDS = 60.0
BEGIN_SECONDS = 60.0
"""That a server which starts waits for candidates."""


class Deployment(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is wanted of one model. Versions are numbers; 0: none."""

    champion: int = 0
    candidate: int = 0
    share: float = 0.0
    """Of the requests that name no version: the candidate's."""
    shadow: float = 0.0
    """Of the champion's requests: copied to the candidate."""
    sticky: Literal["session", "tenant", "request"] = "session"
    keep: tuple[int, ...] = ()
    """Loaded for an instant return."""
    rollout: str = ""
    """The one under way: its windows are wanted."""
    feedback: bool = False
    """Which version answered which request is wanted, too."""
    rules: ShadowRules = ShadowRules()
    load_seconds: float = 900.0

    @property
    def wanted(self) -> tuple[int, ...]:
        """Versions to be loaded, the most important first."""
        return tuple(dict.fromkeys(each for each in (self.champion, *self.keep, self.candidate) if each))


Deployments = Mapping[str, Deployment]


class Plan(Struct, frozen=True):
    """What follows from what is wanted and what is loaded."""

    routes: Routes
    load: tuple[tuple[str, int], ...] = ()
    release: tuple[tuple[str, int], ...] = ()


def plan(deployments: Deployments, loaded: Mapping[str, Collection[int]], published: Routes) -> Plan:
    """`loaded`: the versions that are hosted and can answer. A candidate is loaded only when its champion is, so that it never
    answers in the champion's place."""
    shares: dict[str, Shares] = {}
    load: list[tuple[str, int]] = []
    release: list[tuple[str, int]] = []
    for model in {**loaded, **deployments}:
        deployment = deployments.get(model, Deployment())
        there = loaded.get(model, ())
        mine = shares_of(deployment, there, published.shares.get(model, ()))
        if mine:
            shares[model] = mine
        wanted = deployment.wanted
        load += [
            (model, each)
            for each in wanted
            if each not in there and (each != deployment.candidate or not deployment.champion or deployment.champion in there)
        ]
        answering = {int(version) for version, share in mine if share}
        release += [(model, each) for each in there if each not in wanted and each not in answering]
    sticky = {model: deployments[model].sticky for model in shares if model in deployments}
    return Plan(Routes(shares=shares, sticky=sticky), tuple(load), tuple(release))


def shares_of(deployment: Deployment, loaded: Collection[int], before: Shares) -> Shares:
    """The traffic of one model. Until its champion is loaded: as it was before; else a version that is kept."""
    champion, candidate = deployment.champion, deployment.candidate
    if champion in loaded:
        if candidate and deployment.share and candidate in loaded:
            # The champion first: when the share grows, those who were with the candidate stay there
            return (str(champion), 1.0 - deployment.share), (str(candidate), deployment.share)
        return ((str(champion), 1.0),)
    if not champion:
        return ()
    there = tuple((version, share) for version, share in before if int(version) in loaded and share)
    if not there:
        there = tuple((str(each), 1.0) for each in deployment.keep if each in loaded)[:1]
    total = sum(share for _, share in there)
    return tuple((version, share / total) for version, share in there)


class _Failure(Struct):
    reason: str
    tries: int
    again_at: float
    passing: bool = False
    """It says nothing of the version: it could not be tried."""


class VersionState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one version stands on one server."""

    state: Literal["loading", "ready", "failed"]
    reason: str = ""
    restarts: int = 0
    """Deaths of its replicas since it was loaded."""


ServerState = dict[str, dict[str, VersionState]]
"""Model → version → how it stands."""


class Follower:
    """Called from the event loop only."""

    def __init__(
        self,
        *,
        read: Callable[[], Deployments],
        hosted: Callable[[str, int], Hosted],
        repository: ModelRepository,
        publish: Callable[[Routes, Deployments], None],
        poll_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read` and `hosted` block, and raise FairleadError. `publish`: called with every new snapshot, and what is wanted."""
        self._read = read
        self._hosted = hosted
        self._repository = repository
        self._publish = publish
        self._poll_seconds = poll_seconds
        self._clock = clock
        self.deployments: Deployments = {}
        self.routes = Routes()
        self.store_error = ""
        """Why what is wanted could not be read when it was last tried."""
        self.reading = asyncio.Lock()
        """Held by whoever changes what is wanted, so that nothing older is read meanwhile."""
        self._assumed: dict[str, Deployment] = {}
        self._loads: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._failures: dict[tuple[str, int], _Failure] = {}
        self._told: tuple[Routes, Deployments] | None = None
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """For ever."""
        while True:
            self._changed.clear()
            await self.read()
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def begin(self) -> None:
        """Before the server is ready: every champion is loaded, or has failed once. For candidates it waits a while, so that sessions find
        the side that they had; one that hangs keeps nobody waiting."""
        await self.read()
        deadline = self._clock() + BEGIN_SECONDS
        while self._loads:
            champions = any(number == self.wanted[model].champion for model, number in self._loads if model in self.wanted)
            patience = None if champions else max(deadline - self._clock(), 0.0)
            loaded, _ = await asyncio.wait(self._loads.values(), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not loaded:
                return

    def wake(self) -> None:
        """Something may have changed."""
        self._changed.set()

    async def read(self) -> None:
        """Ask the store what is wanted, and act on it."""
        async with self.reading:
            try:
                # What is wanted of a model is never deleted: one that is missing could not be read, and stays as it was
                self.deployments = {**self.deployments, **await asyncio.to_thread(self._read)}
            except Unavailable as error:
                if not self.store_error:
                    log.error("control_store_gone", error=error.message, note="the traffic goes on as it was published last")
                self.store_error = error.message
            else:
                if self.store_error:
                    log.info("control_store_back")
                self.store_error = ""
        self.reconcile()

    def assume(self, deployments: Deployments) -> Deployments:
        """Act on this now; the store will say the same once it was told. Stays in force until `settle`. Returns what was assumed of
        these models before, for `restore`."""
        before = {model: self._assumed[model] for model in deployments if model in self._assumed}
        self._assumed.update(deployments)
        self.reconcile()
        return before

    def restore(self, deployments: Deployments, before: Deployments) -> None:
        """The store was not told of what `assume` was called with. What others assumed since then stays."""
        for model, deployment in deployments.items():
            if self._assumed.get(model) is deployment:
                del self._assumed[model]
                if model in before:
                    self._assumed[model] = before[model]
        self.wake()

    def settle(self, deployments: Deployments) -> None:
        """The store was told."""
        for model, deployment in deployments.items():
            self._assumed.pop(model, None)
            self.deployments = {**self.deployments, model: deployment}
        self.reconcile()

    def forget(self, deployments: Deployments) -> None:
        """The store says something else about these models."""
        for model in deployments:
            self._assumed.pop(model, None)
        self.wake()

    @property
    def wanted(self) -> Deployments:
        return {**self.deployments, **self._assumed} if self._assumed else self.deployments

    def reconcile(self) -> None:
        """Publish what can be published, begin to load what is missing, release what nobody wants."""
        wanted, now = self.wanted, self._clock()
        loaded = self._loaded()
        found = plan(wanted, loaded, self.routes)
        if self._told is None or self._told[0] != found.routes or self._told[1] != wanted:
            self._told = found.routes, wanted
            self.routes = found.routes
            self._publish(found.routes, wanted)
        for model, deployment in wanted.items():
            if deployment.champion in loaded.get(model, ()):
                self._repository.prefer(model, deployment.champion)
        for model, number in found.release:
            self._repository.release(model, number)
        missing = set(found.load)
        for key in [key for key in self._loads if key not in missing]:
            self._loads.pop(key).cancel()
        for key in [key for key in self._failures if key not in missing]:
            del self._failures[key]
            if key[1] not in self._loaded().get(key[0], ()):
                self._repository.release(*key)
        for key in found.load:
            failure = self._failures.get(key)
            if key not in self._loads and (failure is None or now >= failure.again_at):
                self._loads[key] = asyncio.create_task(self._load(*key), name=f"host-{key[0]}@{key[1]}")

    def _loaded(self) -> dict[str, tuple[int, ...]]:
        return {
            model: tuple(number for number, entry in versions.items() if entry.state == State.READY)
            for model, versions in self._repository.hosted().items()
        }

    async def _load(self, model: str, number: int) -> None:
        key, deployment = (model, number), self.wanted.get(model, Deployment())
        try:
            hosted = await asyncio.to_thread(self._hosted, model, number)
            await self._repository.host(model, number, hosted, deployment.load_seconds)
        except Unavailable as error:
            self._note_delay(key, error.message)
        except FairleadError as error:
            self._note_failure(key, error.message, candidate=number == deployment.candidate)
        except Exception as error:
            log.exception("version_not_loaded", model=model, version=number)
            self._note_failure(key, f"{type(error).__name__}: {error}", candidate=number == deployment.candidate)
        else:
            self._failures.pop(key, None)
        finally:
            if self._loads.get(key) is asyncio.current_task():
                del self._loads[key]
        self.reconcile()

    def _note_failure(self, key: tuple[str, int], reason: str, *, candidate: bool) -> None:
        """A candidate gets one try: control must hear of it. Others are tried again and again."""
        tries = self._failures[key].tries + 1 if key in self._failures else 1
        pause = float("inf") if candidate else min(RETRY_SECONDS * 2.0 ** (tries - 1), MAX_RETRY_SECONDS)
        self._failures[key] = _Failure(reason, tries, self._clock() + pause)
        log.error("version_not_loaded", model=key[0], version=key[1], error=reason, tries=tries)

    def _note_delay(self, key: tuple[str, int], reason: str) -> None:
        """The store is gone for a moment, or the server stops: the version may be a good one."""
        again_at, before = self._clock() + RETRY_SECONDS, self._failures.get(key)
        self._failures[key] = _Failure(reason, 0, again_at, passing=True) if before is None else structs.replace(before, again_at=again_at)
        log.warning("version_not_loaded_yet", model=key[0], version=key[1], error=reason)

    def state(self) -> ServerState:
        """Of everything that is wanted here."""
        loaded = self._loaded()
        told: ServerState = {}
        for model, deployment in self.wanted.items():
            for number in deployment.wanted:
                told.setdefault(model, {})[str(number)] = self._state_of(model, number, number in loaded.get(model, ()))
        return told

    def _state_of(self, model: str, number: int, loaded: bool) -> VersionState:
        if loaded:
            return VersionState(state="ready", restarts=self._repository.find(model, str(number)).metrics.restarts())
        failure = self._failures.get((model, number))
        if failure is None:
            return VersionState(state="loading")
        return VersionState(state="loading" if failure.passing else "failed", reason=failure.reason)

    async def stop(self) -> None:
        """Give up what is being loaded."""
        loads, self._loads = list(self._loads.values()), {}
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
