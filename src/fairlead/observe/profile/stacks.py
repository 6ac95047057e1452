"""Stacks of functions and how often each was seen: `thread;function (file);function (file) 12`, as flame graphs are made of."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from types import FrameType
from typing import NamedTuple

MAX_STACKS = 20_000
"""Different ones of a process: what is seen beyond these is only counted."""
MAX_FRAMES = 200
MAX_TEXT_CHARS = 4 << 20
WAITS = frozenset(("threading.py", "queue.py", "selectors.py", "socket.py", "subprocess.py"))
"""A thread whose innermost function is there does nothing but wait."""

Stacks = Counter[str]


class Hot(NamedTuple):
    function: str
    own: float
    """Share of the samples in which it was the innermost one."""
    total: float
    """Share of those in which it was anywhere."""


def parsed(text: str) -> Stacks:
    """What is no such line is left out; so is what is too much."""
    stacks: Stacks = Counter()
    for line in text[:MAX_TEXT_CHARS].splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and count.isdecimal() and (stack in stacks or len(stacks) < MAX_STACKS):
            stacks[stack] += int(count)
    return stacks


def written(stacks: Mapping[str, int]) -> str:
    return "".join(f"{stack} {count}\n" for stack, count in stacks.items())


def hottest(stacks: Mapping[str, int], limit: int = 10) -> list[Hot]:
    """By their own share."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for stack, count in stacks.items():
        _, *frames = stack.split(";")
        if frames:
            own[frames[-1]] += count
        for frame in set(frames):
            total[frame] += count
    whole = sum(stacks.values()) or 1
    return [Hot(name, count / whole, total[name] / whole) for name, count in own.most_common(limit)]


class StackSampler:
    """Looks at all threads of this process, from a thread of its own: where another process may not. It waits for the interpreter's lock as
    they do, so that it sees less of threads that hold it for long, and nothing of native code."""

    def __init__(self, rate: float = 100.0) -> None:
        self.interval = 1.0 / rate
        self.stacks: Stacks = Counter()
        self.num_samples = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="profiler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(10.0)

    def _run(self) -> None:
        due = time.perf_counter()
        while not self._ended.wait(max(due - time.perf_counter(), 0.0)):
            due = max(due + self.interval, time.perf_counter())
            self.sample()

    def sample(self) -> None:
        """All threads once."""
        self.num_samples += 1
        mine, names = threading.get_ident(), {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident == mine or _waits(frame):
                continue
            stack = stack_of(frame, names.get(ident, "thread"))
            if stack in self.stacks or len(self.stacks) < MAX_STACKS:
                self.stacks[stack] += 1


def _waits(frame: FrameType) -> bool:
    return PurePath(frame.f_code.co_filename).name in WAITS


def stack_of(frame: FrameType | None, thread: str) -> str:
    names: list[str] = []
    while frame is not None and len(names) < MAX_FRAMES:
        code = frame.f_code
        names.append(f"{code.co_qualname} ({PurePath(code.co_filename).name}:{code.co_firstlineno})")
        frame = frame.f_back
    return ";".join(name.replace(";", ",").replace("\n", " ") for name in (thread, *reversed(names)))
