"""The loop that decides on rollouts, in one server of all that share a store, and what the others do meanwhile.

Every tick each server says how its versions stand and hands in what its gateway counted. Who holds the lease takes all of that to the state
machine (`control.rollout`) and does what it says: one transaction in the store, which every server follows. A return goes to this
server's own gateway before it goes to the store. None of it is in a request's way; while the store is gone, nothing goes forward,
but whoever held the lease last still takes traffic from a candidate that breaks.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from threading import Lock
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct, field, structs

from fairlead.control.acts import Changes, changes_of, deployment_of, deployment_row, deployments_of, rollout_of, rollout_row
from fairlead.control.deployments import Deployment, Deployments, Follower, ServerState
from fairlead.control.rollout import (
    ENDED,
    Action,
    Event,
    FeedbackSum,
    Loaded,
    Measured,
    Note,
    PairCount,
    Phase,
    Return,
    Rollout,
    Validated,
    advance,
    standing,
)
from fairlead.control.shadow import ShadowReport
from fairlead.core.errors import ConfigError, FairleadError, Unavailable
from fairlead.core.rollout import ControlSettings
from fairlead.core.window import Window
from fairlead.observe.counts import Counts
from fairlead.store.control import PURGE_ROWS, ControlStore
from fairlead.store.registry_rows import ExposureRow, RolloutRow, ServerRow
from fairlead.store.registry_rows import FeedbackSum as StoredSum
from fairlead.store.transactions import Conflict

log = structlog.get_logger("fairlead.control")

LEASE = "control"
REPORT_SECONDS = 5.0
"""How often a shadow's report is written while it grows."""
KEPT_SECONDS = 3600.0
"""How long a server that says nothing is remembered, and a window that nobody took."""
PURGE_SECONDS = 60.0
IDLE_PURGE_SECONDS = 3600.0
"""While no rollout is under way."""
SILENT = 4
"""Times the span after which a server counts as silent: then it is taken for dead."""
MAX_SENT = 10_000
"""Windows of other servers that are taken at once."""
MAX_EXPOSURES = 100_000
"""That wait for the store."""
MAX_ROWS = 5000
"""In one transaction."""


class Eyes(Protocol):
    """What the gateway saw since it was last asked."""

    def windows(self, now: float) -> Sequence[Window]: ...

    def exposures(self) -> Sequence[ExposureRow]: ...

    def shadows(self) -> Mapping[str, ShadowReport]:
        """By model."""


class Sent(Struct, kw_only=True, omit_defaults=True):
    """What one server saw of one model: a row of `windows`."""

    window: Window | None = None
    shadow: ShadowReport | None = None


class Seen(Struct):
    """What all servers saw, until it is decided upon."""

    windows: dict[str, Window] = field(default_factory=dict)
    shadows: dict[str, ShadowReport] = field(default_factory=dict)

    def take(self, models: Set[str]) -> "Seen":
        """What was seen of these, which is here no more."""
        windows = {model: self.windows.pop(model) for model in models if model in self.windows}
        return Seen(windows, {model: self.shadows.pop(model) for model in models if model in self.shadows})

    def merge(self, other: "Seen") -> None:
        for model in other.windows.keys() | other.shadows.keys():
            self.add(model, Sent(window=other.windows.get(model), shadow=other.shadows.get(model)))

    def add(self, model: str, sent: Sent) -> None:
        if sent.window is not None:
            if model in self.windows:
                self.windows[model].merge(sent.window)
            else:
                self.windows[model] = sent.window
        if sent.shadow is not None:
            if model in self.shadows:
                self.shadows[model].merge(sent.shadow)
            else:
                self.shadows[model] = sent.shadow


class _Returned(Struct, frozen=True):
    """A decision that the store does not know yet."""

    revision: int
    """Of the row that it was made upon."""
    rollout: Rollout
    actions: tuple[Action, ...]
    deployments: Deployments


class _Heard(Struct, frozen=True):
    """From the store, at one tick of who decides."""

    rollouts: Sequence[RolloutRow]
    deployments: Deployments
    servers: Sequence[ServerRow]
    silent: Sequence[ServerRow]
    """Said nothing for a while, and may be answering requests all the same."""
    sent: Sequence[tuple[str, Sent]]
    unread: Set[str]
    """Models of which a window could not be read."""
    feedback: Mapping[str, Mapping[str, Sequence[FeedbackSum]]]
    """Rollout → model."""


class Leader:
    """Called from the event loop only."""

    def __init__(
        self,
        *,
        server: str,
        store: ControlStore,
        follower: Follower,
        eyes: Eyes,
        validate: Callable[[Rollout], Awaitable[Validated]],
        settings: ControlSettings,
        counts: Counts,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`server`: this one's id. `validate`: runs the gates of every member; cancelled where the rollout ends meanwhile."""
        self.server = server
        self.store = store
        self.follower = follower
        self.eyes = eyes
        self.validate = validate
        self.settings = settings
        self.counts = counts
        self.clock = clock
        self.leads = False
        self._seen = Seen()
        self._known: dict[str, RolloutRow] = {}
        """Rollouts under way, as they were last read or saved."""
        self._returned: dict[str, _Returned] = {}
        """Done here while the store could not be told."""
        self._alone: dict[str, Rollout] = {}
        """What the breakers counted while the store is gone, by rollout."""
        self._exposures: deque[ExposureRow] = deque(maxlen=MAX_EXPOSURES)
        self._writing_exposures = Lock()
        self._told: tuple[float, ServerState] = (0.0, {})
        """When this server said how its versions stand, and what it said."""
        self._validating: dict[str, asyncio.Task[Validated]] = {}
        self._reports: dict[str, dict[str, ShadowReport]] = {}
        self._reported_at: dict[str, float] = {}
        self._restarts: dict[tuple[str, str, str], int] = {}
        """(rollout, server, model) → deaths of the candidate's replicas before the rollout saw it."""
        self._purged_at = 0.0
        self._ticking = asyncio.Lock()
        self._stopped = False

    def rollouts(self) -> Iterator[Rollout]:
        """Those under way, where this server decides."""
        for row in list(self._known.values()):
            with suppress(ConfigError):  # one of another release
                yield rollout_of(row)

    async def run(self) -> None:
        """For ever."""
        while True:
            began = time.monotonic()
            await self.tick(self.clock())
            await asyncio.sleep(max(self.settings.tick_seconds - (time.monotonic() - began), 0.05))

    async def stop(self) -> None:
        async with self._ticking:
            self._stopped = True
        tasks, self._validating = list(self._validating.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.leads:
            try:
                await asyncio.to_thread(self.store.drop, LEASE, self.server)
            except Unavailable:
                log.warning("lease_not_dropped", note="another server takes over when it has run out")

    async def tick(self, now: float) -> None:
        async with self._ticking:
            if not self._stopped:
                await self._tick(now)

    async def _tick(self, now: float) -> None:
        fresh = {window.model: window for window in self.eyes.windows(now)}
        for model, window in fresh.items():
            self._seen.add(model, Sent(window=window))
        for model, report in self.eyes.shadows().items():
            self._seen.add(model, Sent(shadow=report))
        try:
            heard = await asyncio.to_thread(self._turn, now, self.follower.state())
            if heard is None:
                self._stand_down()
                await self._hand_in(now)
                return
            self.leads = True
            self._alone.clear()
            await self._decide(heard, self.clock())
        except Unavailable as error:
            self.counts.add("fairlead_control_store_failures_total")
            log.warning("control_without_store", error=error.message, note="nothing goes forward until it answers")
            if self.leads:
                self._decide_alone(fresh, now)

    def _stand_down(self) -> None:
        """Another server decides, or there is nothing to decide: what was begun or done here alone is not this server's any more."""
        self.leads = False
        for returned in self._returned.values():
            self.follower.forget(returned.deployments)
        for task in self._validating.values():
            task.cancel()
        for kept in (self._returned, self._validating, self._known, self._alone, self._reports, self._reported_at, self._restarts):
            kept.clear()

    def _turn(self, now: float, state: ServerState) -> _Heard | None:
        """Say how things stand here. Returns what there is to decide upon, where this server is to decide.

        A server that has no registered model writes nothing, and nobody holds the lease while no rollout is under way.
        """
        store = self.store
        told_at, told = self._told
        if state != told or (state and now - told_at >= self._alive_seconds / 3):
            store.beat(self.server, msgspec.to_builtins(state), now)
            self._told = now, state
        self.write_exposures()
        rollouts = store.running() if self.settings.decide else ()
        if not rollouts:
            if self.leads:
                store.drop(LEASE, self.server)
            if state and now - self._purged_at > IDLE_PURGE_SECONDS:
                self._purge(now)
            return None
        if not store.take(LEASE, self.server, now, self.settings.lease_seconds):
            return None
        if now - self._purged_at > PURGE_SECONDS:
            self._purge(now)
        feedback = {}
        for row in rollouts:
            with suppress(ConfigError):  # one that cannot be read is told of where it is decided upon
                if any(rule.name.startswith("feedback:") for member in rollout_of(row).members for rule in member.metrics):
                    feedback[row.id] = _by_model(store.feedback_sums(row.id))
        alive, known = now - self._alive_seconds, store.servers(now - SILENT * self._alive_seconds)
        deployments = read_deployments(store)
        sent, unread = [], set()
        for window in store.take_windows(MAX_SENT):  # last: what was taken is nowhere else
            try:
                sent.append((window.model, msgspec.msgpack.decode(window.data, type=Sent)))
            except msgspec.DecodeError as error:
                log.error("window_not_read", model=window.model, server=window.server, error=str(error), note="is it of another release?")
                unread.add(window.model)
        return _Heard(
            rollouts=rollouts,
            deployments=deployments,
            servers=[row for row in known if row.seen >= alive],
            silent=[row for row in known if row.seen < alive],
            sent=sent,
            unread=unread,
            feedback=feedback,
        )

    def write_exposures(self) -> None:
        """Which version answered which request, so that feedback on them is known. Blocks. Raises Unavailable."""
        with self._writing_exposures:
            self._exposures.extend(self.eyes.exposures())
            while self._exposures:
                some = [self._exposures.popleft() for _ in range(min(len(self._exposures), MAX_ROWS))]
                try:
                    self.store.add_exposures(some)
                except Unavailable:
                    self._exposures.extendleft(reversed(some))
                    raise

    def _purge(self, now: float) -> None:
        deleted = self.store.purge(
            exposures_before=now - self.settings.feedback_seconds,
            windows_before=now - KEPT_SECONDS,
            servers_before=now - KEPT_SECONDS,
        )
        if deleted < PURGE_ROWS:  # else there is more
            self._purged_at = now

    @property
    def _alive_seconds(self) -> float:
        """A server that said nothing for so long does not count."""
        return max(self.settings.lease_seconds, 3 * self.settings.tick_seconds)

    async def _hand_in(self, now: float) -> None:
        """To who decides."""
        seen, self._seen = self._seen, Seen()
        rows = []
        for model in {**seen.windows, **seen.shadows}:
            sent = Sent(window=seen.windows.get(model), shadow=seen.shadows.get(model))
            if sent.shadow is not None or (sent.window is not None and sent.window.tallies):
                rows.append((model, msgspec.msgpack.encode(sent)))
        if not rows:
            return
        try:
            await asyncio.to_thread(self.store.add_windows, self.server, rows, now)
        except Unavailable:
            self._seen.merge(seen)
            raise

    # Deciding

    async def _decide(self, heard: _Heard, now: float) -> None:
        for model, sent in heard.sent:
            self._seen.add(model, sent)
        self._known = {row.id: row for row in heard.rollouts}
        self._forget_ended()
        concerned: set[str] = set()
        for row in heard.rollouts:
            seen = Seen()
            try:
                rollout = rollout_of(row)
                models = {member.model for member in rollout.members}
                concerned |= models
                seen = self._seen.take(models)
                await self._decide_one(row, rollout, heard, seen, now)
            except (Unavailable, Conflict) as error:
                self._seen.merge(seen)  # nothing came of it
                if isinstance(error, Unavailable):
                    raise
                if (await asyncio.to_thread(self.store.rollout, row.id)).revision == row.revision:
                    log.error("rollout_stuck", rollout=row.id, error=error.message)
                else:  # somebody's command came between: the next tick sees what it made of it
                    log.debug("rollout_moved_on", rollout=row.id, error=error.message)
            except FairleadError as error:  # others go on
                log.error("rollout_stuck", rollout=row.id, error=error.message)
        # of models that no rollout is about any more nothing is kept
        self._seen = self._seen.take(concerned)

    async def _decide_one(self, row: RolloutRow, rollout: Rollout, heard: _Heard, seen: Seen, now: float) -> None:
        returned = self._returned.pop(row.id, None)
        if returned is not None and returned.revision == row.revision:
            await self._commit(row, rollout, returned.rollout, returned.actions, now)
            return
        if returned is not None:  # another server decided meanwhile, and knew more
            self.follower.forget(returned.deployments)
        if not _stands(rollout, heard.deployments):  # whoever decided before did not come to it
            note = Note("rollout.follow", "what it wants was not in force")
            await self._commit(row, rollout, rollout, (standing(rollout), note), now)
            return
        new, actions = _advanced(rollout, self._events(rollout, heard, seen, now), now)
        if new != rollout or actions:
            await self._commit(row, rollout, new, actions, now)
        try:
            await self._report(rollout, seen, now)
        except Unavailable as error:  # what was decided stands
            log.warning("report_not_written", rollout=rollout.id, error=error.message)

    def _events(self, rollout: Rollout, heard: _Heard, seen: Seen, now: float) -> list[Event]:
        models = [member.model for member in rollout.members]
        windows = {model: seen.windows[model] for model in models if model in seen.windows}
        if rollout.phase is Phase.VALIDATING:
            return self._gates(rollout)
        restarts = {model: self._num_restarts(rollout, model, heard.servers) for model in models}
        if rollout.phase is Phase.LOADING:
            return [Measured(windows=windows, restarts=restarts), self._loaded(rollout, heard.servers)]
        return [
            Measured(
                windows=None if heard.unread & set(models) else windows,
                restarts=restarts,
                feedback=heard.feedback.get(rollout.id, {}),
                pairs={model: _pair_count(seen.shadows[model]) for model in models if model in seen.shadows},
                incomplete=any(model in row.state for row in heard.silent for model in models),
            )
        ]

    def _gates(self, rollout: Rollout) -> list[Event]:
        """Begin them, or hear what came of them."""
        task = self._validating.get(rollout.id)
        if task is None:
            coroutine = self.validate(rollout)
            self._validating[rollout.id] = asyncio.ensure_future(coroutine)
            return []
        if not task.done():
            return []
        del self._validating[rollout.id]
        try:
            return [task.result()]
        except Unavailable:
            raise
        except FairleadError as error:
            return [Validated(ok=False, reason=error.message, at_fault=False)]
        except Exception as error:
            log.exception("validation_failed", rollout=rollout.id)
            return [Validated(ok=False, reason=f"the gates could not be run: {type(error).__name__}: {error}", at_fault=False)]

    def _loaded(self, rollout: Rollout, servers: Sequence[ServerRow]) -> Loaded:
        for member in rollout.members:
            for id, state in self._states(servers).items():
                version = state.get(member.model, {}).get(str(member.candidate))
                if version is not None and version.state == "failed":
                    return Loaded(ready=False, failed=f"on {id}: {version.reason}", model=member.model)
        ready = all(
            (version := state.get(member.model, {}).get(str(member.candidate))) is not None and version.state == "ready"
            for member in rollout.members
            for state in self._states(servers).values()
        )
        return Loaded(ready=ready)

    def _states(self, servers: Sequence[ServerRow]) -> dict[str, ServerState]:
        states = {row.id: msgspec.convert(row.state, ServerState) for row in servers}
        states[self.server] = self.follower.state()
        return states

    def _num_restarts(self, rollout: Rollout, model: str, servers: Sequence[ServerRow]) -> int:
        candidate = next(str(member.candidate) for member in rollout.members if member.model == model)
        most = 0
        for id, state in self._states(servers).items():
            version = state.get(model, {}).get(candidate)
            if version is not None:
                before = self._restarts.setdefault((rollout.id, id, model), version.restarts)
                if version.restarts < before:  # it was loaded anew
                    before = self._restarts[rollout.id, id, model] = 0
                most = max(most, version.restarts - before)
        return most

    def _forget_ended(self) -> None:
        for id in [id for id in self._validating if id not in self._known or self._known[id].status != Phase.VALIDATING]:
            self._validating.pop(id).cancel()
        for id in [id for id in self._returned if id not in self._known]:
            self.follower.forget(self._returned.pop(id).deployments)
        for kept in (self._reports, self._reported_at):
            for id in [id for id in kept if id not in self._known]:
                del kept[id]
        for key in [key for key in self._restarts if key[0] not in self._known]:
            del self._restarts[key]

    # Acting

    async def _commit(self, row: RolloutRow, old: Rollout, new: Rollout, actions: tuple[Action, ...], now: float) -> None:
        """Raises Conflict, Unavailable; a return has been done on this server nevertheless."""
        changes = changes_of(new, actions, old.phase is Phase.PROMOTED, now)
        if returns(actions):
            self.follower.assume(changes.deployments)
        try:
            saved = await self._save(row, new, changes, now)
        except Unavailable:
            if returns(actions):
                self._returned[row.id] = _Returned(row.revision, new, actions, changes.deployments)
            raise
        except Conflict as conflict:
            if not returns(actions) or (await asyncio.to_thread(self.store.rollout, row.id)).revision != row.revision:
                raise
            # Somebody moved a version to where it cannot come back from: traffic goes before order in the registry.
            log.error("stages_not_moved", rollout=row.id, error=conflict.message)
            self.follower.assume(changes.deployments)
            saved = await self._save(row, new, structs.replace(changes, moves=()), now)
        self._known[row.id] = saved
        if new.phase in ENDED:
            self.counts.add("fairlead_rollouts_total", row.model, new.phase)
        told(new, actions)

    async def _save(self, row: RolloutRow, new: Rollout, changes: Changes, now: float) -> RolloutRow:
        if not changes.deployments:
            return await asyncio.to_thread(commit, self.store, rollout_row(new, revision=row.revision, now=now), changes, now)
        async with self.follower.reading:
            try:
                saved = await asyncio.to_thread(commit, self.store, rollout_row(new, revision=row.revision, now=now), changes, now)
            except Conflict:
                self.follower.forget(changes.deployments)
                raise
            self.follower.settle(changes.deployments)
        return saved

    def _decide_alone(self, fresh: Mapping[str, Window], now: float) -> None:
        """Without the store: of what this server saw alone, only what takes traffic from a candidate is done.

        The tests look at all that was seen since the store is gone; the breakers at each tick's as well, for the good answers
        of a long time would hide what breaks now.
        """
        for id, row in self._known.items():
            try:
                rollout = rollout_of(row)
            except ConfigError:
                continue  # it is told of where the store answers
            if id in self._returned or rollout.phase not in (Phase.PROGRESSING, Phase.PAUSED, Phase.PROMOTED):
                continue
            models = [member.model for member in rollout.members]
            windows = {model: self._seen.windows[model] for model in models if model in self._seen.windows}
            restarts = {model: self._num_restarts(rollout, model, ()) for model in models}
            # what was seen stays, for when the store is back
            new, actions = advance(rollout, Measured(windows=windows, restarts=restarts), now)
            if not returns(actions):
                counted = self._alone.get(id, rollout).counted
                breaking = structs.replace(rollout, counted=counted, measurement=structs.replace(rollout.measurement, began=now))
                new, actions = advance(breaking, Measured(windows=fresh, restarts=restarts), now)
                self._alone[id] = new
            if returns(actions):
                deployments = changes_of(new, actions, rollout.phase is Phase.PROMOTED, now).deployments
                self._returned[id] = _Returned(row.revision, new, actions, deployments)
                self.follower.assume(deployments)
                told(new, actions)

    async def _report(self, rollout: Rollout, seen: Seen, now: float) -> None:
        """What its shadow found goes to the store, now and then, and at the end."""
        for member in rollout.members:
            found = seen.shadows.get(member.model)
            if found is None:
                continue
            reports = self._reports.setdefault(rollout.id, {})
            if member.model not in reports:
                stored = await asyncio.to_thread(self.store.report, rollout.id)
                reports.update(msgspec.json.decode(stored, type=dict[str, ShadowReport]) if stored else {})
            if member.model in reports:
                reports[member.model].merge(found)
            else:
                reports[member.model] = found
        has_ended = self._known[rollout.id].status in ENDED
        if rollout.id in self._reports and (has_ended or now - self._reported_at.get(rollout.id, 0.0) >= REPORT_SECONDS):
            self._reported_at[rollout.id] = now
            await asyncio.to_thread(self.store.put_report, rollout.id, msgspec.json.encode(self._reports[rollout.id]).decode())


def commit(store: ControlStore, row: RolloutRow, changes: Changes, now: float) -> RolloutRow:
    """All of it, or none: the rollout, what is wanted, stages, aliases, the audit log. Blocks. Raises Conflict, Unavailable."""
    actor = changes.audit[0].actor if changes.audit else "control"
    reason = str(changes.audit[0].details.get("reason", "")) if changes.audit else ""
    revisions = {each.model: each.revision for each in store.deployments()} if changes.deployments else {}
    deployments = [
        deployment_row(model, deployment, revision=revisions.get(model, 0), actor=actor, reason=reason, now=now)
        for model, deployment in changes.deployments.items()
    ]
    saved = store.commit(rollout=row, deployments=deployments, moves=changes.moves, aliases=changes.aliases, audits=changes.audit)
    assert saved is not None
    return saved


def read_deployments(store: ControlStore) -> Deployments:
    """Blocks. Raises Unavailable."""
    return deployments_of(store.deployments())


def _advanced(rollout: Rollout, events: Iterable[Event], now: float) -> tuple[Rollout, tuple[Action, ...]]:
    actions: list[Action] = []
    for event in events:
        rollout, more = advance(rollout, event, now)
        actions += more
    return rollout, tuple(actions)


def told(rollout: Rollout, actions: Iterable[Action]) -> None:
    for action in actions:
        if isinstance(action, Note):
            candidates = [f"{member.model}@{member.candidate}" for member in rollout.members]
            log.info(action.action.replace(".", "_"), rollout=rollout.id, candidates=candidates, reason=action.reason, **action.details)


def returns(actions: Iterable[Action]) -> bool:
    return any(isinstance(action, Return) for action in actions)


def _stands(rollout: Rollout, deployments: Deployments) -> bool:
    """What is wanted is what this rollout wants."""
    return rollout.phase is Phase.VALIDATING or all(
        deployments.get(member.model, Deployment()) == deployment_of(rollout, member) for member in rollout.members
    )


def _by_model(sums: Iterable[StoredSum]) -> dict[str, list[FeedbackSum]]:
    found: dict[str, list[FeedbackSum]] = {}
    for each in sums:
        found.setdefault(each.model, []).append(FeedbackSum(each.version, each.name, each.num, each.sum, each.squares))
    return found


def _pair_count(report: ShadowReport) -> PairCount:
    return PairCount(num_pairs=report.num_pairs, num_agree=report.num_agree, num_failed=report.num_failed)
