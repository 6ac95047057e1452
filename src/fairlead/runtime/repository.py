"""Every model that is served: what is there, what is loaded, and which version answers."""

import asyncio
import ctypes
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, suppress
from enum import StrEnum
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import structlog
from msgspec import Struct, field

from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError, FairleadError, InvalidRequest, LoadError, NotFound, ShuttingDown, Unavailable, Unsupported
from fairlead.core.generation import EngineInfo
from fairlead.core.logs import Levels
from fairlead.core.request import Request, Response, Sink
from fairlead.core.specs import EngineSpec, ModelSpec
from fairlead.observe.metrics import Metrics
from fairlead.runtime.engine_version import EngineVersion
from fairlead.runtime.external.version import ExternalVersion
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.kv_budget import KvBudget
from fairlead.runtime.loading import load_version
from fairlead.runtime.source import Listing, Source, choose_versions, default_cache
from fairlead.runtime.triton_config import spec_from_triton, triton_config
from fairlead.runtime.version import Ticket, Version

log = structlog.get_logger("fairlead.repository")


class Control(StrEnum):
    """Who decides what is loaded (Triton's --model-control-mode)."""

    NONE = "none"
    """Everything, once, at the start."""
    POLL = "poll"
    """What the sources hold, looked at again and again."""
    EXPLICIT = "explicit"
    """What is asked for through the API."""


class State(StrEnum):
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


class IndexEntry(Struct, frozen=True):
    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class Hosted(Struct, frozen=True, eq=False):
    """A version that comes from no source: who hosts it says what it is."""

    spec: ModelSpec
    """With the model's name."""
    fetch: Callable[[], Path]
    """Its folder (or bare file) on this machine. Blocks. Raises LoadError."""
    edition: str
    """As ModelRepository.edition."""


class RepositorySettings(Struct, frozen=True, kw_only=True):
    sources: tuple[str, ...]
    control: Control = Control.NONE
    poll_seconds: float = 15.0
    load: tuple[str, ...] = ()
    """Models loaded at the start in explicit mode; `*` for all."""
    strict_readiness: bool = False
    """Ready only while every model that should be loaded is, and answers: none is being started again."""
    drain_timeout: float = 30.0
    load_concurrency: int = 4
    kv_cache_bytes: dict[str, int] = field(default_factory=dict)
    """As `runtime.kv_budget.KvBudget` takes it."""
    cache_folder: Path = field(default_factory=default_cache)


class _Model:
    """What is known of one name."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.versions: dict[int, Version] = {}
        self.stamps: dict[int, str] = {}
        """What each loaded version was loaded from."""
        self.editions: dict[int, str] = {}
        """The same, without what differs between copies on two machines."""
        self.states: dict[int, tuple[State, str]] = {}
        self.reason = ""
        """Why nothing of it could be loaded, where that is no single version's fault."""
        self.attempted: str | None = None
        """The listing that was last loaded or tried, for polling."""
        self.seen: str | None = None
        self.given: list[Path] = []
        """Folders of files that came with explicit loads; a replica that is started again reads its artefact anew."""
        self.hosted = False
        """Its versions are loaded and unloaded by `host` and `release`, and by nobody else."""
        self.default = 0
        """The version that answers where none is named; 0, and where that is not loaded: the highest."""


class _Served(Struct):
    """The ready versions of one name; replaced whole."""

    by_version: dict[str, Version]
    default: Version
    external: bool
    """All of them are other engines', which take bodies as they came."""


class ModelRepository:
    """Called from the event loop only; blocking work goes to threads."""

    def __init__(self, settings: RepositorySettings, metrics: Metrics, forkserver: ForkServer | None = None) -> None:
        self.settings = settings
        self.metrics = metrics
        self.started = False
        self.any_external = False
        """Some version is computed by somebody else's engine."""
        self.readiness_changed = asyncio.Event()
        """Set, and replaced, whenever `ready` may have changed."""
        self._stopping = False
        self._sources: list[Source] = []
        self._models: dict[str, _Model] = {}
        self._listings: dict[str, tuple[Source, Listing]] = {}
        self._served: dict[str, _Served] = {}
        self._forkserver = forkserver or ForkServer()
        self.kv = KvBudget(settings.kv_cache_bytes)
        self._loading = asyncio.Semaphore(settings.load_concurrency)
        self._hosting = asyncio.Semaphore(settings.load_concurrency)
        """Slots of their own: a load from a source may take for ever."""
        self._hosts: WeakValueDictionary[tuple[str, int], asyncio.Lock] = WeakValueDictionary()
        """A version that is wanted again waits until its cancelled load has cleaned up."""
        self._draining: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None

    # Requests

    @property
    def stopping(self) -> bool:
        """New requests are refused."""
        return self._stopping

    @stopping.setter
    def stopping(self, stopping: bool) -> None:
        self._stopping = stopping
        self._note_readiness()

    def _note_readiness(self) -> None:
        self.readiness_changed.set()
        self.readiness_changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        if not self.started or self.stopping:
            return False
        if not self.settings.strict_readiness:
            return True
        for name, model in self._models.items():
            served = self._served.get(name)
            if model.hosted:  # a candidate, and what is kept, is nobody's to wait for
                if served is None or not (served.default.ready or sleeps(served.default)):
                    return False
            elif served is not None and not all(version.ready or sleeps(version) for version in served.by_version.values()):
                return False
        return not any(not self._models[name.partition("@")[0]].hosted for name in self.failures())

    def failures(self) -> dict[str, str]:
        """What should be loaded and is not: `name` or `name@version` → why."""
        failed = {}
        for name, model in self._models.items():
            if model.reason:
                failed[name] = model.reason
            for number, (_, reason) in model.states.items():
                if reason and reason != UNLOADED:
                    failed[f"{name}@{number}"] = reason
        return failed

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Queue a request for its one response; every error goes to the sink, possibly before this returns."""
        served = self._served.get(request.model)
        version = None if served is None else served.by_version.get(request.version) if request.version else served.default
        if version is None or self._stopping:
            return _refused(request, sink, self._missing(request.model, request.version))
        return version.submit(request, sink)

    async def infer(self, request: Request) -> AsyncGenerator[Response, None]:
        """The response, or the responses of a streaming model. Raises FairleadError; closing it cancels."""
        if self.stopping:
            raise self._missing(request.model, request.version)
        async with aclosing(self.find(request.model, request.version).infer(request)) as responses:
            async for response in responses:
                yield response

    def find(self, name: str, version: str = "") -> Version:
        """Raises NotFound in Triton's words."""
        served = self._served.get(name)
        found = None if served is None else served.by_version.get(version) if version else served.default
        if found is None:
            raise self._missing(name, version)
        return found

    def edition(self, name: str, version: str) -> str:
        """Tells what a loaded version was loaded from: another for files that were replaced, the same for a faithful copy of them
        on another machine. "" where that is not known."""
        model = self._models.get(name)
        return "" if model is None else model.editions.get(int(version), "")

    def engine_info(self, name: str, version: str = "") -> EngineInfo | None:
        """What a language model's engine tells of itself; None for other models. Raises NotFound."""
        found = self.find(name, version)
        return found.info if isinstance(found, EngineVersion) else None

    def external(self, name: str, version: str = "") -> bool:
        """That version of it, or all of them, are computed by engines of others: its bodies go on as they come."""
        served = self._served.get(name)
        if served is None:
            return False
        return isinstance(served.by_version.get(version), ExternalVersion) if version else served.external

    def adapters(self, name: str, version: str = "") -> tuple[str, ...]:
        """LoRA adapters that lie beside a loaded version's weights now. Blocks. Raises NotFound."""
        found = self.find(name, version)
        return found.adapters() if isinstance(found, EngineVersion) else ()

    def known(self, name: str) -> bool:
        return name in self._models or name in self._listings

    def versions(self, name: str) -> list[str]:
        """Loaded versions, ascending."""
        served = self._served.get(name)
        return list(served.by_version) if served else []

    def loaded(self) -> Iterator[Version]:
        """Every version that requests can reach."""
        for served in list(self._served.values()):
            yield from served.by_version.values()

    def set_log_levels(self, levels: Levels) -> None:
        """Of the processes that compute, now and later."""
        self._forkserver.set_levels(levels)
        for version in self.loaded():
            for process in version.processes:
                process.set_levels(levels)

    def _missing(self, name: str, version: str) -> FairleadError:
        if self.stopping:
            return ShuttingDown("Server is stopping, scheduler for model has stopped accepting new inference requests")
        prefix = f"Request for unknown model: '{name}'"
        model = self._models.get(name)
        if not self.known(name):
            return NotFound(f"{prefix} is not found")
        if version and self.versions(name):
            return NotFound(f"{prefix} version {version} is not found")
        if model is not None and any(state is State.LOADING for state, _ in model.states.values()):
            return Unavailable(f"{prefix} is still loading")
        return NotFound(f"{prefix} has no available versions")

    def index(self, *, ready: bool = False) -> list[IndexEntry]:
        entries = []
        for name in sorted({*self._models, *self._listings}):
            model = self._models.get(name)
            states = dict(sorted(model.states.items())) if model else {}
            for number, (state, reason) in states.items():
                if model is not None and state is State.READY and sleeps(model.versions.get(number)):
                    reason = "asleep"
                if not ready or state is State.READY:
                    entries.append(IndexEntry(name=name, version=str(number), state=state, reason=reason))
            if not states and not ready:
                reason = model.reason if model else ""
                entries.append(IndexEntry(name=name, state=State.UNAVAILABLE if reason else "", reason=reason))
        return entries

    # Sleep

    async def sleep(self, name: str, version: str, timeout: float, level: int = 0) -> list[EngineVersion]:
        """Put a version, or all that are loaded, to sleep; what runs has `timeout` seconds to end. `level` 0: as its `sleep.level`
        says. Raises NotFound or Unsupported."""
        versions = self._sleepers(name, version)
        for each in versions:
            each.sleep.check(level)
        await asyncio.gather(*(each.sleep.sleep(timeout, level) for each in versions))
        return versions

    async def wake(self, name: str, version: str) -> list[EngineVersion]:
        """Load again what sleeps. Raises NotFound, Unsupported or LoadError."""
        versions = self._sleepers(name, version)
        await asyncio.gather(*(each.sleep.wake() for each in versions))
        return versions

    def _sleepers(self, name: str, version: str) -> list[EngineVersion]:
        found = [self.find(name, each) for each in ([version] if version else self.versions(name) or [""])]
        engines = [each for each in found if isinstance(each, EngineVersion) and not isinstance(each, ExternalVersion)]
        if len(engines) < len(found):
            raise Unsupported(f"model '{name}' cannot sleep: only those with an engine of Fairlead's own can")
        return engines

    def statistics(self, name: str = "", version: str = "") -> list[dict[str, object]]:
        """Raises InvalidRequest, as Triton does, for a name or version that is not loaded."""
        if name:
            versions = [self.find(name, each) for each in self.versions(name) if version in ("", each)]
            if not versions:
                raise InvalidRequest(f"requested model '{name}' is not available")
        else:
            versions = [found for served in self._served.values() for found in served.by_version.values()]
        return [each.statistics() for each in versions]

    # Life

    async def start(self, then: Callable[[], Awaitable[None]] | None = None) -> None:
        """Load what the control mode asks for; `then` hosts what else there is, before the server is ready. Raises ConfigError where a
        source cannot be read at all."""
        settings = self.settings
        if settings.load and settings.control is not Control.EXPLICIT:
            raise ConfigError(f"models to load are named ({', '.join(settings.load)}), which only `--control explicit` heeds")
        self._sources = [Source(url, settings.cache_folder) for url in settings.sources]
        await self._scan()
        wanted = list(self._listings)
        if settings.control is Control.EXPLICIT and "*" not in settings.load:
            unknown = [name for name in settings.load if name not in self._listings]
            if unknown:
                raise ConfigError(
                    f"model '{unknown[0]}' is to be loaded but no source has it; there are: {', '.join(sorted(self._listings)) or 'none'}"
                )
            wanted = list(settings.load)
        await asyncio.gather(*(self._load_quietly(name) for name in wanted))
        if then is not None:
            await then()
        _settle_memory()
        self.started = True
        self._note_readiness()
        if settings.control is Control.POLL:
            self._poller = asyncio.create_task(self._poll(), name="repository-poll")

    async def stop(self, timeout: float | None = None) -> None:
        """Refuse new requests, let the others finish within `timeout` seconds (None: the drain timeout), release everything."""
        timeout = self.settings.drain_timeout if timeout is None else timeout
        self.stopping = True
        if self._poller is not None:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller
        versions = [version for model in self._models.values() for version in model.versions.values()]
        await asyncio.gather(*(self._drain(version, timeout) for version in versions), *self._draining)
        await self._forkserver.close()
        for model in self._models.values():
            _remove_given(model)

    async def load(self, name: str, config: str | None = None, files: dict[str, bytes] | None = None) -> None:
        """Load, or load again, one model (explicit mode). `config`: a model.yaml (JSON is YAML too), or
        Triton's ModelConfig as JSON, that replaces its own.

        `files`: `version/name` → content, replacing its own artefacts. Raises FairleadError with the reason.
        """
        self._must_be_explicit()
        if files and config is None:
            raise InvalidRequest("files can be given only together with a `config`")
        await self._scan()
        given = None
        if files:
            given = await asyncio.to_thread(_write_files, files)
            source = Source(str(given), self.settings.cache_folder)
            listing = next(iter((await asyncio.to_thread(source.scan)).values()), None)
            if listing is None:
                shutil.rmtree(given, ignore_errors=True)
                raise InvalidRequest("the given files hold no version folder; name them `1/model.onnx`")
            entry = (source, Listing(name=name, files=listing.files, root=listing.root))
        elif name in self._listings:
            entry = self._listings[name]
        else:
            raise NotFound(f"failed to load '{name}', failed to poll from model repository")
        model = self._models.setdefault(name, _Model())
        _check_not_hosted(name, model)
        if given is not None:
            model.given.append(given)
        spec = None
        if config is not None:
            triton = triton_config(config)
            spec = read_yaml(config, ModelSpec, "config") if triton is None else await asyncio.to_thread(_spec_from_triton, triton, *entry)
            if spec.name not in ("", name):
                raise InvalidRequest(
                    f"the config is of model '{spec.name}', but '{name}' is to be loaded; they must agree (or leave `name` out)"
                )
            if spec.engine != EngineSpec():
                raise InvalidRequest(
                    "`engine` cannot come with a request: its program would run here; write it into the repository's model.yaml"
                )
            spec = spec.replace(name=name)
        async with model.lock:
            await self._load(name, model, *entry, spec=spec, reload=config is not None)
        failed = [reason for _, reason in model.states.values() if reason and reason != UNLOADED]
        if model.reason or failed:
            raise LoadError(f"failed to load '{name}': {model.reason or failed[0]}")
        _remove_given(model, keep=given)

    async def unload(self, name: str) -> None:
        """Unload every version (explicit mode); returns once they are drained. Raises FairleadError."""
        self._must_be_explicit()
        model = self._models.get(name)
        if model is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        _check_not_hosted(name, model)
        async with model.lock:
            await self._unload(name, model)

    # Versions that are hosted

    async def host(self, name: str, number: int, hosted: Hosted, timeout: float) -> None:
        """Load a version beside those that serve, within so many seconds from when it is its turn. Raises LoadError; Unavailable while
        the server stops."""
        lock = self._hosts.setdefault((name, number), asyncio.Lock())
        async with lock:
            await self._host(name, number, hosted, timeout)

    async def _host(self, name: str, number: int, hosted: Hosted, timeout: float) -> None:
        model = self._models.get(name)
        if name in self._listings or (model is not None and not model.hosted):
            raise LoadError(f"a model repository of this server has a model '{name}', too: rename one of the two")
        if self.stopping:
            raise ShuttingDown("Server is stopping")
        if model is None:
            model = self._models[name] = _Model()
            model.hosted = True
        if number in model.versions:
            return

        async def load() -> Version:
            try:
                async with asyncio.timeout(timeout) as limit:
                    return await load_version(hosted.spec, str(number), await asyncio.to_thread(hosted.fetch), self._forkserver, self.kv)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise LoadError(f"it was not loaded within {timeout:g} s") from None

        try:
            version = await self._load_version(name, model, number, load, self._hosting)
        except BaseException:
            model.states.pop(number, None)
            self._forget_hosted(name)
            raise
        if self.stopping or self._models.get(name) is not model:  # released meanwhile
            model.states.pop(number, None)
            self._forget_hosted(name)
            if version is not None:
                self._retire(version)
            raise ShuttingDown("Server is stopping" if self.stopping else f"model '{name}' version {number} was released meanwhile")
        if version is None:
            raise LoadError(model.states[number][1])
        model.versions[number] = version
        model.editions[number] = hosted.edition
        self._publish(name, model)

    def release(self, name: str, number: int) -> None:
        """Unload a hosted version, as soon as its requests are answered."""
        model = self._models.get(name)
        if model is None or not model.hosted:
            return
        version = model.versions.pop(number, None)
        model.states.pop(number, None)
        model.editions.pop(number, None)
        if version is not None:
            self._publish(name, model)
            self._retire(version)
        self._forget_hosted(name)

    def prefer(self, name: str, number: int) -> None:
        """The version of a hosted model that answers where none is named, and no traffic share says otherwise."""
        model = self._models.get(name)
        if model is not None and model.hosted and model.default != number:
            model.default = number
            self._publish(name, model)

    def hosted(self) -> dict[str, dict[int, IndexEntry]]:
        """What is known of the hosted versions: loading, ready, or why not."""
        return {
            name: {
                number: IndexEntry(name=name, version=str(number), state=state, reason=reason)
                for number, (state, reason) in model.states.items()
            }
            for name, model in self._models.items()
            if model.hosted
        }

    def _forget_hosted(self, name: str) -> None:
        model = self._models.get(name)
        if model is not None and model.hosted and not model.versions and not model.states:
            del self._models[name]
            self._note_readiness()

    def _must_be_explicit(self) -> None:
        if self.stopping:
            raise ShuttingDown("Server is stopping")
        if self.settings.control is not Control.EXPLICIT:
            raise Unavailable("explicit model load / unload is not allowed if polling is enabled")

    # Loading

    async def _scan(self) -> None:
        found: dict[str, tuple[Source, Listing]] = {}
        for source in self._sources:
            for name, listing in (await asyncio.to_thread(source.scan)).items():
                if name in found:
                    log.error(
                        "model name stands in two sources; the first is served", model=name, first=found[name][0].url, second=source.url
                    )
                else:
                    found[name] = (source, listing)
        self._listings = found

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                await self.poll_once()
            except ConfigError as error:
                log.error("cannot look for changes", error=error.message)
            except Exception:
                log.exception("looking for changes failed")

    async def poll_once(self) -> None:
        """Compare the sources with what is loaded, and act. A model acts only once it has looked the same twice:
        a folder that is still being copied is left alone."""
        await self._scan()
        changed = []
        for name, (_, listing) in self._listings.items():
            model = self._models.setdefault(name, _Model())
            if model.hosted:
                continue
            stamp = _stamp(listing.files)
            if stamp != model.attempted and stamp == model.seen:
                changed.append(name)
            model.seen = stamp
        gone = [
            name
            for name, model in self._models.items()
            if name not in self._listings and not model.hosted and (model.versions or model.states)
        ]
        await asyncio.gather(*(self._load_quietly(name) for name in changed), *(self._unload_gone(name) for name in gone))

    async def _unload_gone(self, name: str) -> None:
        model = self._models[name]
        async with model.lock:
            await self._unload(name, model)
            del self._models[name]

    async def _load_quietly(self, name: str) -> None:
        """Load one of many: what goes wrong is kept in the index and the log."""
        model = self._models.setdefault(name, _Model())
        async with model.lock:
            try:
                await self._load(name, model, *self._listings[name])
            except FairleadError as error:
                model.reason = error.message
                self.metrics.loads[name, "failure"] += 1
                log.error("model not loaded", model=name, error=error.message)

    async def _load(
        self, name: str, model: _Model, source: Source, listing: Listing, *, spec: ModelSpec | None = None, reload: bool = False
    ) -> None:
        """Bring the loaded versions in line with the listing: load what is new beside what serves, swap, drain the old."""
        model.attempted = model.seen = _stamp(listing.files)
        model.reason = ""
        if spec is None:
            spec = await asyncio.to_thread(source.spec, listing)
        there = listing.versions()
        wanted = choose_versions(list(there), spec.version_policy)
        if not wanted:
            what = (
                f"version_policy wants {list(spec.version_policy.specific)}, there are {sorted(there)}"
                if there
                else "its folder holds no artefact"
            )
            raise LoadError(f"model '{name}' has no version to serve: {what}")
        stamps = {number: _stamp({**there[number], "spec": repr(spec)}) for number in wanted}
        fresh = [number for number in wanted if reload or number not in model.versions or model.stamps[number] != stamps[number]]
        for number in list(model.states):
            if number not in wanted and number not in model.versions:
                del model.states[number]

        async def load(number: int) -> Version:
            folder = await asyncio.to_thread(source.fetch, listing, number)
            return await load_version(spec, str(number), folder, self._forkserver, self.kv)

        loaded = await asyncio.gather(*(self._load_version(name, model, number, partial(load, number), self._loading) for number in fresh))
        retired: list[Version] = []
        for number, version in zip(fresh, loaded, strict=True):
            if version is not None:
                if number in model.versions:
                    retired.append(model.versions[number])
                model.versions[number] = version
                model.stamps[number] = stamps[number]
                model.editions[number] = _edition(there[number], spec)
        # What is no longer wanted goes only when something wanted serves in its stead.
        if any(number in model.versions for number in wanted):
            for number in [number for number in model.versions if number not in wanted]:
                retired.append(model.versions.pop(number))
                del model.stamps[number], model.editions[number]
                model.states[number] = (State.UNAVAILABLE, UNLOADED)
        self._publish(name, model)
        for version in retired:
            self._retire(version)

    async def _load_version(
        self, name: str, model: _Model, number: int, load: Callable[[], Coroutine[Any, Any, Version]], slots: asyncio.Semaphore
    ) -> Version | None:
        if number not in model.versions:
            model.states[number] = (State.LOADING, "")
        began = time.perf_counter()
        try:
            async with slots:
                version = await load()
        except FairleadError as error:
            reason = error.message
        except Exception as error:
            log.exception("model failed to load", model=name, version=number)
            reason = f"{type(error).__name__}: {error}"
        else:
            version.metrics.load_seconds = time.perf_counter() - began
            model.states[number] = (State.READY, "")
            self.metrics.loads[name, "success"] += 1
            log.info("model loaded", model=name, version=number, platform=version.platform, seconds=round(version.metrics.load_seconds, 3))
            return version
        # A version that serves goes on serving what it was loaded from before.
        model.states[number] = (State.READY if number in model.versions else State.UNAVAILABLE, reason)
        self.metrics.loads[name, "failure"] += 1
        log.error("model not loaded", model=name, version=number, error=reason)
        return None

    async def _unload(self, name: str, model: _Model) -> None:
        versions = dict(model.versions)
        model.versions.clear()
        model.stamps.clear()
        model.editions.clear()
        model.attempted = None
        model.reason = ""
        model.states = dict.fromkeys(versions, (State.UNLOADING, ""))
        self._publish(name, model)
        await asyncio.gather(*(self._drain(version, self.settings.drain_timeout) for version in versions.values()))
        model.states = dict.fromkeys(versions, (State.UNAVAILABLE, UNLOADED))
        versions.clear()
        _remove_given(model)
        await asyncio.to_thread(_settle_memory)
        log.info("model unloaded", model=name)

    def _publish(self, name: str, model: _Model) -> None:
        if model.versions:
            by_version = {str(number): model.versions[number] for number in sorted(model.versions)}
            for number, version in by_version.items():
                self.metrics.models[name, number] = version.metrics
            default = model.default if model.default in model.versions else max(model.versions)
            external = all(isinstance(version, ExternalVersion) for version in by_version.values())
            self._served[name] = _Served(by_version=by_version, default=model.versions[default], external=external)
        else:
            self._served.pop(name, None)
        self.any_external = any(isinstance(version, ExternalVersion) for version in self.loaded())
        self._note_readiness()

    async def _drain(self, version: Version, timeout: float) -> None:
        await version.drain(timeout)
        key = (version.name, version.version)
        if self.metrics.models.get(key) is version.metrics:
            del self.metrics.models[key]

    def _retire(self, version: Version) -> None:
        async def drain() -> None:
            await self._drain(version, self.settings.drain_timeout)
            await asyncio.to_thread(_settle_memory)

        task = asyncio.create_task(drain(), name=f"drain-{version.name}@{version.version}")
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)


UNLOADED = "unloaded"


def sleeps(version: Version | None) -> bool:
    return isinstance(version, EngineVersion) and not version.sleep.awake


class _Refused:
    """The ticket of a request that went nowhere."""

    done = True

    def cancel(self) -> None:
        pass


def _refused(request: Request, sink: Sink, error: FairleadError) -> Ticket:
    sink.close(error)
    return _Refused()


def _check_not_hosted(name: str, model: _Model) -> None:
    """Raises InvalidRequest."""
    if model.hosted:
        raise InvalidRequest(f"model '{name}' is deployed from the registry: `fairlead rollout` changes what serves")


def _spec_from_triton(config: dict[str, Any], source: Source, listing: Listing) -> ModelSpec:
    return spec_from_triton(config, "config", read=partial(source.text, listing))


def _stamp(files: dict[str, str]) -> str:
    return repr(sorted(files.items()))


def _edition(files: dict[str, str], spec: ModelSpec) -> str:
    contents = {path: stamp.rpartition(" ")[0] for path, stamp in files.items()}  # the last word is the inode
    return sha256(_stamp({**contents, "spec": repr(spec)}).encode()).hexdigest()[:16]


def _write_files(files: dict[str, bytes]) -> Path:
    """Files of an explicit load in a folder of their own. Raises InvalidRequest for a path that leaves it."""
    folder = Path(tempfile.mkdtemp(prefix="fairlead-load-"))
    for name, content in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or path == folder:
            shutil.rmtree(folder, ignore_errors=True)
            raise InvalidRequest(f"file '{name}' does not lie inside the model's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def _remove_given(model: _Model, keep: Path | None = None) -> None:
    for folder in model.given:
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
    model.given = [] if keep is None else [keep]


def _settle_memory() -> None:
    """After loading or unloading: free what is unreachable, and keep the collector away from what stays.

    Without it every full collection walks through all that the models' libraries imported, for tens of milliseconds,
    while requests wait. Freed heap pages go back to the system: allocators keep them otherwise.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
