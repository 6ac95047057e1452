"""The devices of this machine, as NVIDIA's management library (NVML) tells of them: pip install 'fairlead[gpu]'."""

from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import Any, Protocol, TypeVar

import structlog
from msgspec import Struct

from fairlead.observe.metrics import Sample

READ_SECONDS = 5.0
MILLI = 1e-3

T = TypeVar("T")

log = structlog.get_logger("fairlead.observe")


class Nvml(Protocol):
    """As much of `pynvml` as is asked here; `fake_nvml.FakeNvml` is another."""

    NVMLError: type[Exception]
    NVML_TEMPERATURE_GPU: int

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any) -> str: ...
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...
    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int: ...
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int: ...


def installed_nvml() -> Nvml | None:
    try:
        import pynvml
    except ImportError:
        return None
    found: Nvml = pynvml
    return found


class Device(Struct, frozen=True, kw_only=True):
    """As it was read last. None: this device does not tell."""

    index: int
    name: str
    utilisation: float | None = None
    """0..1."""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None


class Devices:
    """Read every READ_SECONDS by a thread of its own: a driver that hangs keeps nobody else waiting."""

    def __init__(self, find: Callable[[], Nvml | None] = installed_nvml) -> None:
        """`find`: None where the library is missing. Called in the thread."""
        self.devices: tuple[Device, ...] = ()
        """Of now; () where there are none, or none can be asked."""
        self._find = find
        self._stop = Event()
        self._read = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        self._thread = Thread(target=self._run, name="fairlead-devices", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def wait(self, timeout: float) -> bool:
        """Until they were read once, or found missing."""
        return self._read.wait(timeout)

    def _run(self) -> None:
        nvml = self._find()
        try:
            if nvml is not None and _begun(nvml):
                self._go_on(nvml)
        finally:
            self._read.set()

    def _go_on(self, nvml: Nvml) -> None:
        try:
            while True:
                self.devices = tuple(read_devices(nvml))
                self._read.set()
                if self._stop.wait(READ_SECONDS):
                    return
        finally:
            self.devices = ()
            told(nvml, nvml.nvmlShutdown)

    def samples(self) -> Iterator[Sample]:
        for device in self.devices:
            labels = (str(device.index), device.name)
            for name, value in (
                ("fairlead_device_utilisation_ratio", device.utilisation),
                ("fairlead_device_memory_used_bytes", device.memory_used_bytes),
                ("fairlead_device_memory_bytes", device.memory_total_bytes),
                ("fairlead_device_power_watts", device.power_watts),
                ("fairlead_device_temperature_celsius", device.temperature_celsius),
            ):
                if value is not None:
                    yield name, labels, value


def _begun(nvml: Nvml) -> bool:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:  # no driver: the usual case of a machine without a device
        log.debug("no_devices", error=str(error))
        return False
    return True


def told(nvml: Nvml, ask: Callable[[], T]) -> T | None:
    """None for what this device, or its driver, does not tell."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


def read_devices(nvml: Nvml) -> Iterator[Device]:
    for index in range(told(nvml, nvml.nvmlDeviceGetCount) or 0):
        handle = told(nvml, lambda index=index: nvml.nvmlDeviceGetHandleByIndex(index))  # type: ignore[misc]
        if handle is not None:
            yield _read_device(nvml, index, handle)


def _read_device(nvml: Nvml, index: int, handle: Any) -> Device:
    rates = told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    memory = told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    power = told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    name = told(nvml, lambda: nvml.nvmlDeviceGetName(handle))
    return Device(
        index=index,
        name=name or "",
        utilisation=None if rates is None else rates.gpu / 100,
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        power_watts=None if power is None else power * MILLI,
        temperature_celsius=told(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
    )
