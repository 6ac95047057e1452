"""What there is of each loaded version: its replicas, as metrics and the administration show them."""

from collections.abc import Iterator
from typing import Literal

from msgspec import Struct

from fairlead.runtime.engine_instance import EngineInstance
from fairlead.runtime.engine_version import EngineVersion
from fairlead.runtime.instances import Instance
from fairlead.runtime.lives import ReplicaProcess
from fairlead.runtime.version import ModelVersion, Version

State = Literal["ready", "starting", "failed", "asleep"]


class Replica(Struct, frozen=True, kw_only=True):
    """One execution slot of a version, now."""

    model: str
    version: str
    instance: int
    kind: Literal["inline", "process"]
    """In this server's process, or in one of its own."""
    pid: int | None
    """None while its process is being started again."""
    state: State
    reason: str
    """Why it cannot be started again; "" where nothing failed."""
    restarts: int
    in_flight: int
    device: str
    kv_blocks: int = 0
    kv_free: int = 0
    """Free, or holding nothing but prefix cache."""
    block_size: int = 0
    """Tokens."""
    running: int = 0
    waiting: int = 0
    """Sequences, or pictures, of an engine."""
    explain: tuple[str, ...] = ()
    """What its engine chose when it was loaded, and why."""


def replicas_of(version: Version) -> Iterator[Replica]:
    if isinstance(version, EngineVersion):
        for number, each in enumerate(version.instances):
            yield _engine_replica(version, number, each)
    elif isinstance(version, ModelVersion):
        for number, slot in enumerate(version.slots):
            yield _replica(version, number, slot.instance, in_flight=0 if slot.batch is None else len(slot.batch.entries))


def _replica(version: ModelVersion, number: int, instance: Instance, *, in_flight: int) -> Replica:
    in_process = isinstance(instance, ReplicaProcess)
    return Replica(
        model=version.name,
        version=version.version,
        instance=number,
        kind="process" if in_process else "inline",
        pid=instance.pid if isinstance(instance, ReplicaProcess) else None,
        state=_state(ready=instance.ready, down=instance.down),
        reason=instance.down,
        restarts=instance.restarts,
        in_flight=in_flight,
        device=version.spec.instances.device,
    )


def _engine_replica(version: EngineVersion, number: int, instance: EngineInstance) -> Replica:
    stats, info = instance.stats, instance.info if version.sleep.awake else None
    return Replica(
        model=version.name,
        version=version.version,
        instance=number,
        kind="process",
        pid=instance.pid,
        state=_state(ready=instance.ready, down=instance.down) if version.sleep.awake else "asleep",
        reason=instance.down if version.sleep.awake else version.sleep.refused,
        restarts=instance.restarts,
        in_flight=instance.num_in_flight,
        device=version.spec.instances.device,
        kv_blocks=stats.num_blocks or (info.num_kv_blocks if info is not None else 0),
        kv_free=stats.num_free_blocks if stats.num_blocks else (info.num_kv_blocks if info is not None else 0),
        block_size=info.block_size if info is not None else 0,
        running=stats.num_running,
        waiting=stats.num_waiting,
        explain=info.explain if info is not None else (),
    )


def _state(*, ready: bool, down: str) -> State:
    return "ready" if ready else "failed" if down else "starting"
