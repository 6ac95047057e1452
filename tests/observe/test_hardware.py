"""Devices, asked by NVIDIA's library or by one that a test made up."""

import inspect
import threading

import pytest

from fairlead.observe.fake_nvml import FakeDevice, FakeNvml
from fairlead.observe.hardware import Device, Devices, Nvml, read_devices


def running(nvml: Nvml | None) -> Devices:
    devices = Devices(lambda: nvml)
    devices.start()
    assert devices.wait(30)
    return devices


def test_what_a_device_tells_is_shown_in_base_units():
    nvml = FakeNvml(FakeDevice("A", gpu=25, used=1 << 30, total=4 << 30, milliwatts=1500), FakeDevice("B"))
    devices = running(nvml)
    try:
        found = {(name, labels): value for name, labels, value in devices.samples()}
        assert found["fairlead_device_utilisation_ratio", ("0", "A")] == 0.25
        assert found["fairlead_device_memory_used_bytes", ("0", "A")] == 1 << 30
        assert found["fairlead_device_memory_bytes", ("0", "A")] == 4 << 30
        assert found["fairlead_device_power_watts", ("0", "A")] == 1.5
        assert found["fairlead_device_temperature_celsius", ("1", "B")] == 41
        assert nvml.open == 1
    finally:
        devices.stop()
    assert nvml.open == 0 and list(devices.samples()) == []


def test_a_device_that_does_not_tell_one_thing_tells_the_others():
    device = FakeDevice()
    device.gpu = None
    (told,) = read_devices(FakeNvml(device))
    assert told == Device(
        index=0,
        name="Fake H200",
        memory_used_bytes=60 << 30,
        memory_total_bytes=140 << 30,
        power_watts=350.0,
        temperature_celsius=41,
    )


@pytest.mark.parametrize("nvml", [None, FakeNvml(FakeDevice(), driver=False), FakeNvml()], ids=["no library", "no driver", "no device"])
def test_a_machine_without_devices_shows_none(nvml):
    devices = running(nvml)
    assert list(devices.samples()) == []
    devices.stop()


def test_a_driver_that_hangs_keeps_nobody_waiting():
    hangs = threading.Event()

    class Hanging(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:
            hangs.wait(60)
            return 0

    devices = Devices(lambda: Hanging(FakeDevice()))
    devices.start()
    assert list(devices.samples()) == []
    devices.stop()  # it waits a second for it, and no longer
    assert devices._thread.is_alive()
    hangs.set()
    devices._thread.join(30)


def test_the_fake_has_what_the_library_has():
    pynvml = pytest.importorskip("pynvml")
    asked = [name for name in vars(Nvml) if name.startswith("nvml")]
    assert asked
    for name in asked:
        theirs = list(inspect.signature(inspect.unwrap(getattr(pynvml, name))).parameters.values())
        ours = list(inspect.signature(getattr(FakeNvml(), name)).parameters)
        assert len([p for p in theirs if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]) == len(ours), name
    assert issubclass(pynvml.NVMLError, Exception) and pynvml.NVML_TEMPERATURE_GPU == FakeNvml.NVML_TEMPERATURE_GPU
