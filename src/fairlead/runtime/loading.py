"""From a version's folder to a ModelVersion that has answered its warm-up."""

import asyncio
import contextlib
import os
from pathlib import Path

import structlog
from msgspec import structs

from fairlead.backends import Executable, Kind, detect, load_backend
from fairlead.backends.external import ENGINES
from fairlead.core.errors import FairleadError, LoadError
from fairlead.core.specs import EngineSpec, Isolation, LlmSpec, ModelSpec, SleepSpec, TensorSpec
from fairlead.core.tensors import Tensors
from fairlead.runtime.engine_instance import EngineInstance
from fairlead.runtime.engine_version import EngineVersion
from fairlead.runtime.external.instance import ExternalInstance
from fairlead.runtime.external.version import ExternalVersion
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.instances import Instance
from fairlead.runtime.kv_budget import KvBudget
from fairlead.runtime.local import LocalInstance
from fairlead.runtime.process import ProcessInstance
from fairlead.runtime.version import ModelVersion, Version
from fairlead.runtime.warmup import samples_of

log = structlog.get_logger("fairlead.runtime")


class WarmUpFailed(LoadError):
    """It was loaded, and did not answer its first requests."""


async def load_version(spec: ModelSpec, version: str, folder: Path, forkserver: ForkServer, kv: KvBudget | None = None) -> Version:
    """Load every instance and warm it up. `kv`: what engines take their KV memory from; None: nobody else's. Raises LoadError (or ConfigError) with one readable sentence."""
    kind, artefact = await asyncio.to_thread(detect, folder, spec)
    isolation = kind.isolation if spec.instances.isolation is Isolation.AUTO else spec.instances.isolation
    threads = spec.instances.threads or _threads_of_each(spec.instances.count)
    if spec.parameters and not kind.parameters:
        log.warning(
            "parameters have no effect on this kind of model", model=spec.name, backend=kind.name, parameters=sorted(spec.parameters)
        )
    _check_sections(spec, kind)
    if spec.sleep != SleepSpec() and (kind.external or not kind.engine):
        raise LoadError(f"`sleep` is for models with an engine of Fairlead's own, and this one is of kind {kind.name}")
    if kind.external:
        return await _load_external(engine_spec(spec, kind), version, artefact, kind)
    if kind.engine:
        return await _load_engine(engine_spec(spec, kind), version, artefact, kind, threads, forkserver, kv or KvBudget())
    served: list[ModelVersion] = []

    def changed() -> None:
        for each in served:
            each.instance_changed()

    instances: list[Instance]
    processes: list[ProcessInstance] = []
    if isolation is Isolation.PROCESS:
        processes = [ProcessInstance(spec, artefact, kind, threads, forkserver, changed) for _ in range(spec.instances.count)]
        told: Executable | ProcessInstance = processes[0]
        instances = list(processes)
    else:
        executables = await _load_here(kind, artefact, spec, threads)
        told = executables[0]
        instances = [LocalInstance(executable, spec.name, spec.instances.execution) for executable in executables]
    try:
        await asyncio.gather(*(process.start() for process in processes))
        complete = complete_spec(spec, kind, told.inputs, told.outputs, batches=told.batches, streams=told.streams)
        loaded = ModelVersion(complete, version, told.platform or kind.name, instances)
        served.append(loaded)
        loaded.example = told.example
        await _warm_up(loaded, told.example)
    except BaseException:
        await asyncio.gather(*(instance.close() for instance in instances))
        raise
    return loaded


async def _load_engine(
    spec: ModelSpec, version: str, artefact: Path, kind: Kind, threads: int, forkserver: ForkServer, kv: KvBudget
) -> EngineVersion:
    device = spec.instances.device
    async with contextlib.AsyncExitStack() as sized:
        share = None
        if kind.section == "llm":  # whose memory is sized: the next one is told what is left
            await sized.enter_async_context(kv.turn(device))
            share = kv.share(spec)
        replicas = [
            EngineInstance(spec, artefact, kind, threads, forkserver, _nobody_waits, version=version, kv=share)
            for _ in range(spec.instances.count)
        ]
        try:
            await asyncio.gather(*(replica.start() for replica in replicas))
            if spec.sleep.level == 1 and not all(replica.kv_bytes for replica in replicas):
                raise LoadError(
                    "`sleep.level` is 1, and this model has no KV memory that it could give back: leave the line out, or write 2"
                )
        except BaseException:
            await asyncio.gather(*(replica.close() for replica in replicas))
            raise
        holding = kv.hold(f"{spec.name}@{version}", device, sum(replica.kv_bytes for replica in replicas))
    try:
        loaded = EngineVersion(spec, version, kind.name, replicas, folder=artefact, holding=holding)
        await _warm_up(loaded, None)
    except BaseException:
        holding.forget()
        await asyncio.gather(*(replica.close() for replica in replicas))
        raise
    loaded.sleep.idle()
    return loaded


async def _load_external(spec: ModelSpec, version: str, artefact: Path, kind: Kind) -> EngineVersion:
    """Engines of others: each is another process of its own, or a server that is there."""
    row = ENGINES[kind.name]
    instances = [ExternalInstance(spec, row, artefact, _nobody_waits, version=version) for _ in range(spec.instances.count)]
    try:
        async with asyncio.TaskGroup() as starting:
            for instance in instances:
                starting.create_task(instance.start())
        loaded = ExternalVersion(spec, version, kind.name, instances)
        await _warm_up(loaded, None)
    except BaseException as error:
        await asyncio.gather(*(instance.close() for instance in instances))
        if isinstance(error, ExceptionGroup):  # one that fails ends the others, which may take minutes to start
            raise error.exceptions[0] from None
        raise
    return loaded


def _check_sections(spec: ModelSpec, kind: Kind) -> None:
    """Raises LoadError for a section that says nothing to this kind."""
    if not kind.external:
        if spec.engine != EngineSpec():
            raise LoadError(
                f"`engine` is for models that somebody else's engine computes ({', '.join(ENGINES)}), and this one is of kind {kind.name}"
            )
        return
    if spec.llm != LlmSpec(task=spec.llm.task):
        raise LoadError(f"of `llm` an engine of kind {kind.name} heeds nothing but `task`: what it takes goes into `engine.args`")
    if spec.engine.url and spec.instances.count > 1:
        raise LoadError("`instances.count` is for engines that are started: several servers that are there are `upstreams` of the gateway")


def _nobody_waits() -> None:
    """Requests are refused while no replica is ready, so that a change of it starts nothing."""


def engine_spec(spec: ModelSpec, kind: Kind) -> ModelSpec:
    """What the operator declared, completed by what goes for every engine. Raises LoadError where they contradict each other."""
    if spec.instances.isolation is Isolation.THREAD:
        raise LoadError("an engine runs in a process of its own: leave `isolation` out, or write `isolation: process`")
    if spec.inputs or spec.outputs:
        raise LoadError("an engine's inputs and outputs are what they are for all of its kind: leave `inputs` and `outputs` out")
    batching = structs.replace(spec.batching, max_batch_size=0, preferred_batch_sizes=(), max_queue_delay=0.0)
    return spec.replace(backend=kind.name, batching=batching, streams=True)


def complete_spec(
    spec: ModelSpec, kind: Kind, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, batches: bool, streams: bool
) -> ModelSpec:
    """What the operator declared, completed by what the loaded artefact told. Raises LoadError where they contradict each other."""
    if spec.streams and not streams:
        raise LoadError("`streams` is declared but the model gives one response; make its `infer` a generator, or leave `streams` out")
    batching = spec.batching
    whole = all(tensor.shape[:1] == (-1,) for tensor in (*inputs, *outputs))
    if not (batches and whole) or streams:
        batching = structs.replace(batching, max_batch_size=0, preferred_batch_sizes=(), max_queue_delay=0.0)
    return spec.replace(backend=kind.name, inputs=inputs, outputs=outputs, batching=batching, streams=streams)


async def _load_here(kind: Kind, artefact: Path, spec: ModelSpec, threads: int) -> list[Executable]:
    def load() -> list[Executable]:
        backend = load_backend(kind.name)
        first = backend.load(artefact, spec, threads)
        if first.shareable:
            return [first] * spec.instances.count
        return [first, *(backend.load(artefact, spec, threads) for _ in range(spec.instances.count - 1))]

    return await asyncio.to_thread(load)


async def _warm_up(version: ModelVersion | EngineVersion, example: Tensors | None) -> None:
    try:
        await version.warm_up(samples_of(version.spec, example))
    except FairleadError as error:
        raise WarmUpFailed(f"warm-up failed: {error.message}") from None
    except TimeoutError:
        raise WarmUpFailed("warm-up did not answer in time") from None


def _threads_of_each(count: int) -> int:
    """Intra-op threads of one of `count` instances: the cores shared out, or what OMP_NUM_THREADS says."""
    declared = os.environ.get("OMP_NUM_THREADS", "")
    if declared.isdigit() and int(declared) > 0:
        return int(declared)
    return max(1, len(os.sched_getaffinity(0)) // count)
