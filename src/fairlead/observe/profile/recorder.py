"""torch's own profiler, in the thread that computes: its operators, and the kernels of a device."""

import time
from typing import Any


class TorchRecorder:
    """`start` and `stop` in one thread, the one that computes; `write` anywhere. While it runs every operator costs a few microseconds more."""

    def __init__(self, *, shapes: bool, allocations: bool) -> None:
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile: Any = torch.profiler.profile(activities=activities, record_shapes=shapes, profile_memory=allocations)
        self._began = 0.0
        self.seconds = 0.0

    def start(self) -> None:
        self._profile.start()
        self._began = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._began
        self._profile.stop()

    def write(self, path: str) -> None:
        """As Chrome and Perfetto read it."""
        self._profile.export_chrome_trace(path)


def device_memory() -> dict[str, int]:
    """What torch holds of its devices' memory; {} without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    told: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        stats = torch.cuda.memory_stats(index)
        for name in (
            "allocated_bytes.all.current",
            "allocated_bytes.all.peak",
            "reserved_bytes.all.current",
            "num_alloc_retries",
            "num_ooms",
        ):
            told[f"cuda:{index} {name}"] = int(stats.get(name, 0))
    return told
