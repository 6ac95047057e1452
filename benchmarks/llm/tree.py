"""An engine's process and its descendants: memory, processor time, a pause while another is measured."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

STOP_SECONDS = 10


class Tree:
    """Leads a session of its own; `process` may be started with any of Popen's arguments."""

    def __init__(self, command: list[str], **options: object) -> None:
        self.started = time.perf_counter()
        self.process = subprocess.Popen(command, start_new_session=True, **options)
        self._seen: dict[int, psutil.Process] = {}

    def processes(self) -> list[psutil.Process]:
        """Those that run; one that lost its parent is still known."""
        with contextlib.suppress(psutil.Error):
            root = self._seen.setdefault(self.process.pid, psutil.Process(self.process.pid))
            for child in root.children(recursive=True):
                self._seen.setdefault(child.pid, child)
        return [process for process in self._seen.values() if _runs(process)]

    def memory_bytes(self) -> int:
        """What they occupy together: a page that several of them share counts once (PSS)."""
        return sum(_of_each(self.processes(), lambda process: process.memory_full_info().pss))

    def cpu_seconds(self) -> float:
        return sum(_of_each(self.processes(), lambda process: sum(process.cpu_times()[:4])))

    def precede(self) -> None:
        list(_of_each(self.processes(), precede))

    def pause(self) -> None:
        list(_of_each(self.processes(), psutil.Process.suspend))

    def resume(self) -> None:
        list(_of_each(self.processes(), psutil.Process.resume))

    def stop(self) -> None:
        """Every process has ended when it returns."""
        processes = self.processes()
        list(_of_each(processes, psutil.Process.resume))
        list(_of_each(processes, psutil.Process.terminate))
        _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
        list(_of_each(alive, psutil.Process.kill))
        psutil.wait_procs(alive, timeout=STOP_SECONDS)
        self.process.wait(STOP_SECONDS)


def precede(process: psutil.Process, nice: int = -20) -> None:
    """Before the machine's other work: by niceness, and where Linux groups processes by session, by the group's. Needs root."""
    for thread in process.threads():  # niceness is a thread's own
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, thread.id, nice)
    with contextlib.suppress(OSError):
        Path(f"/proc/{process.pid}/autogroup").write_text(str(nice))


def _of_each(processes: list[psutil.Process], ask: Callable[[psutil.Process], object]) -> Iterator:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            yield ask(process)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class Meter:
    """Over a block: wall seconds, and the processors' worth of work that was neither the engine's nor ours.

    What a hypervisor gives to other machines (steal) counts as such work.
    """

    def __init__(self, tree: Tree | None = None) -> None:
        self.tree = tree

    def __enter__(self) -> "Meter":
        self._machine, self._ours = _machine_seconds(), self._own_seconds()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        machine, ours = _machine_seconds() - self._machine, self._own_seconds() - self._ours
        self.other_cores = round(max(0.0, machine - ours) / self.seconds, 3)

    def _own_seconds(self) -> float:
        own = sum(psutil.Process().cpu_times()[:2])
        return own + (self.tree.cpu_seconds() if self.tree else 0.0)


def _machine_seconds() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal
