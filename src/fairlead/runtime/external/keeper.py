"""The process between this server and an engine that it started: it ends the engine with all that the engine started, when it is told
to, and when this server is gone. Run as a file, without the package: it holds a few MiB.

python -I -S keeper.py STOP_SECONDS COMMAND...
standard input: a pipe; its end is the order to stop. Standard output: `pid N`, and at the end `exit CODE` (a signal's number is
negative). Standard error: the engine's, and its standard output too.
"""

import ctypes
import os
import select
import signal
import sys
import time
from contextlib import suppress

SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36
NOT_STARTED = 127
LAST_SECONDS = 5.0
"""For what was killed to be gone."""


def main() -> None:
    stop_seconds, command = float(sys.argv[1]), sys.argv[2:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal's, or a whole group's: the server says when
        signal.signal(number, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _control(SET_CHILD_SUBREAPER, 1)
    pid = _start(command)
    _tell(f"pid {pid}\n")
    status = _wait(pid, woken, 0, None)
    if status is None:
        _kill_group(pid, signal.SIGTERM)
        status = _wait(pid, woken, None, stop_seconds)
    _kill_group(pid, signal.SIGKILL)
    if status is None:
        status = _wait(pid, woken, None, LAST_SECONDS)
    _end_orphans()
    _tell(f"exit {'' if status is None else os.waitstatus_to_exitcode(status)}\n")


def _start(command: list[str]) -> int:
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        _control(SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(NOT_STARTED)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be started: {error.strerror}\n".encode())
    finally:
        os._exit(NOT_STARTED)


def _wait(pid: int, woken: int, order: int | None, seconds: float | None) -> int | None:
    """Its status; None where the order to stop comes first, or the time is over."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found == pid:
            return status
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            return None
        ready, _, _ = select.select([woken] if order is None else [woken, order], [], [], left)
        if woken in ready:
            os.read(woken, 512)
        if order is not None and order in ready and not os.read(order, 512):
            return None


def _end_orphans() -> None:
    """What the engine started and left behind became this process's child, whatever group it is in."""
    until = time.monotonic() + LAST_SECONDS
    children = f"/proc/self/task/{os.getpid()}/children"
    while time.monotonic() < until:
        with suppress(OSError), open(children) as listed:
            for pid in listed.read().split():
                with suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
        try:
            found, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not found:
            time.sleep(0.01)


def _kill_group(pid: int, number: int) -> None:
    with suppress(OSError):
        os.killpg(pid, number)


def _control(option: int, value: int) -> None:
    """Linux's prctl; nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _tell(line: str) -> None:
    with suppress(OSError):
        os.write(1, line.encode())


if __name__ == "__main__":
    main()
