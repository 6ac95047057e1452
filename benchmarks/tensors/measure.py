"""CPU time and memory of a server's whole process tree, and of the machine."""

import contextlib
import resource
import uuid
from pathlib import Path

import psutil


class Tree:
    """Every process started with this tag in its environment, and their descendants."""

    def __init__(self) -> None:
        self.env = {"BENCH_TAG": uuid.uuid4().hex}
        self._tag = f"BENCH_TAG={self.env['BENCH_TAG']}".encode()
        self._seen: dict[int, psutil.Process] = {}

    def processes(self) -> list[psutil.Process]:
        for process in psutil.process_iter():
            # A process of another user's, or one that has just ended, is not ours.
            with contextlib.suppress(OSError, psutil.Error):
                if process.pid not in self._seen and self._tag in Path(f"/proc/{process.pid}/environ").read_bytes():
                    self._seen[process.pid] = process
        for process in list(self._seen.values()):
            with contextlib.suppress(psutil.Error):
                for child in process.children(recursive=True):
                    self._seen.setdefault(child.pid, child)
        return [p for p in self._seen.values() if _runs(p)]

    def cpu_seconds(self) -> float:
        """User, system and reaped children's seconds."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])
        return total

    def memory_mib(self) -> tuple[int, int]:
        """Sums over the processes: peak resident sizes, present proportional sizes."""
        peak = proportional = 0
        for process in self.processes():
            with contextlib.suppress(OSError):
                peak += _kib(f"/proc/{process.pid}/status", "VmHWM:")
                proportional += _kib(f"/proc/{process.pid}/smaps_rollup", "Pss:")
        return round(peak / 1024), round(proportional / 1024)

    def stop(self) -> None:
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=8)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=5)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _kib(path: str, field: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def machine_seconds() -> float:
    """Busy seconds of all processors since boot."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


def client_seconds() -> float:
    """CPU of the load generators that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
