"""NVML for a machine without devices: the functions of `pynvml` that `hardware` asks, with what a test says they tell."""

from typing import Any, NamedTuple


class Rates(NamedTuple):
    gpu: int
    memory: int = 0


class Memory(NamedTuple):
    used: int
    total: int


class FakeError(Exception):
    """As NVMLError."""


class FakeDevice:
    def __init__(
        self, name: str = "Fake H200", *, gpu: int = 40, used: int = 60 << 30, total: int = 140 << 30, milliwatts: int = 350_000
    ) -> None:
        self.name = name
        self.gpu: int | None = gpu
        """None: not supported, as on a device that is cut into slices."""
        self.memory = Memory(used, total)
        self.milliwatts = milliwatts
        self.celsius = 41


class FakeNvml:
    NVMLError: type[Exception] = FakeError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *devices: FakeDevice, driver: bool = True) -> None:
        self.devices = list(devices)
        self.driver = driver
        self.open = 0
        """Begun and not shut down."""

    def nvmlInit(self) -> None:
        if not self.driver:
            raise FakeError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self.devices[index]

    def nvmlDeviceGetName(self, handle: FakeDevice) -> str:
        return handle.name

    def nvmlDeviceGetUtilizationRates(self, handle: FakeDevice) -> Rates:
        if handle.gpu is None:
            raise FakeError("Not Supported")
        return Rates(handle.gpu)

    def nvmlDeviceGetMemoryInfo(self, handle: FakeDevice) -> Memory:
        return handle.memory

    def nvmlDeviceGetPowerUsage(self, handle: FakeDevice) -> int:
        return handle.milliwatts

    def nvmlDeviceGetTemperature(self, handle: FakeDevice, sensor: int) -> int:
        return handle.celsius
