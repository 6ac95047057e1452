"""The fork server: a process that has imported what replicas need, and forks them.

It has one thread and no event loop, so that a fork of it is a clean process. It reaps its children and reports how
they ended; when the gateway is gone, so are they.
"""

import asyncio
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

import structlog

from fairlead.core.errors import Unavailable
from fairlead.core.logs import Levels
from fairlead.observe.logs import journal
from fairlead.runtime.wire import Frame, Kind, Receiver, WireError, encode_frame

log = structlog.get_logger("fairlead.runtime")

MAX_FDS = 16
END_SECONDS = 5.0
"""How long children may take to end after the gateway has gone."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Libraries that start threads when they are imported would not survive the fork."""


class Process:
    """A replica process as the gateway sees it."""

    def __init__(self, pid: int, exited: "asyncio.Future[int | None]") -> None:
        self.pid = pid
        self.exited = exited
        """Its exit code, or the negative number of the signal; None if the fork server died and nobody can tell."""


class ForkServer:
    """The gateway's end. The server starts with the first `spawn`, and again with the first one after its death."""

    def __init__(self, log_level: str = "info", log_format: str = "auto", *, log_texts: bool = False, levels: Levels | None = None) -> None:
        """`levels`: of single rooms; `log_texts`: as `observe.logs.configure_logs` takes it."""
        self.restarts = 0
        """Deaths of the server itself; replicas that it started live on."""
        self.levels: Levels = levels or {}
        """What replicas begin with."""
        self._arguments = (log_level, log_format, *(("texts",) if log_texts else ()))
        self._starting = asyncio.Lock()
        self._server: _Server | None = None

    @property
    def pid(self) -> int | None:
        """None while no server runs."""
        return self._server.process.pid if self._server is not None else None

    async def spawn(self, descriptors: Sequence[int], modules: Sequence[str] = (), *, mark: str = "") -> Process:
        """Fork a replica that serves these descriptors, after importing `modules` (once). Raises Unavailable if that fails.

        `mark`: then the last descriptor is for what it prints, and this stands before lines of its log.
        """
        async with self._starting:
            if self._server is None:
                self._server = await self._start()
                self._server.set_levels(self.levels)
        return await self._server.spawn(descriptors, modules, mark=mark)

    def set_levels(self, levels: Levels) -> None:
        """For replicas that start from now on."""
        self.levels = levels
        if self._server is not None:
            with suppress(Unavailable):  # the next one begins with them
                self._server.set_levels(levels)

    def kill(self, process: Process) -> bool:
        """End it at once. False if it has ended, or if the server that forked it has: then nobody here can tell whose its pid is."""
        return self._server is not None and self._server.kill(process.pid)

    async def close(self) -> None:
        """End the server and whatever it still has forked."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.close()

    async def _start(self) -> "_Server":
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            command = [sys.executable, "-P", "-m", "fairlead.runtime", "forkserver", str(theirs.fileno()), *self._arguments]
            try:
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=asyncio.subprocess.DEVNULL, pass_fds=[theirs.fileno()], env={**os.environ, **ONE_THREAD}
                )
            except BaseException:
                ours.close()
                raise
        log.info("fork server started", pid=process.pid)
        return _Server(process, ours, self._died)

    def _died(self, server: "_Server") -> None:
        if self._server is server:
            self._server = None
            self.restarts += 1
            log.error("fork server died; the next replica starts another", pid=server.process.pid)


class _Server:
    """One running server. The socket carries descriptors, which an event loop's transports cannot send."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket, on_death: "Callable[[_Server], None]") -> None:
        self.process = process
        self._sock = sock
        self._on_death = on_death
        self._receiver = Receiver()
        self._spawning: deque[asyncio.Future[Process]] = deque()  # answered in order
        self._children: dict[int, Process] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._read)

    def set_levels(self, levels: Levels) -> None:
        """Raises Unavailable."""
        self._send(Frame(Kind.LEVELS, levels=levels))

    async def spawn(self, descriptors: Sequence[int], modules: Sequence[str], *, mark: str) -> Process:
        spawned: asyncio.Future[Process] = self._loop.create_future()
        self._send(Frame(Kind.SPAWN, modules=list(modules), num_fds=len(descriptors), mark=mark), descriptors)
        self._spawning.append(spawned)
        return await asyncio.shield(spawned)  # a caller that gives up must not shift the answers

    def kill(self, pid: int) -> bool:
        """False if it is not this server's child."""
        if pid not in self._children:
            return False
        self._send(Frame(Kind.KILL, pid=pid))
        return True

    async def close(self) -> None:
        self._lost()
        async with asyncio.timeout(2 * END_SECONDS):
            await self.process.wait()

    def _send(self, frame: Frame, descriptors: Sequence[int] = ()) -> None:
        data = b"".join(encode_frame(frame))
        try:
            sent = socket.send_fds(self._sock, [data], list(descriptors))
        except BlockingIOError:
            raise Unavailable("the fork server is overloaded") from None
        except OSError as error:
            self._lost()
            raise Unavailable(f"the fork server died: {error}") from None
        if sent < len(data):  # the rest of the frame has no way to follow
            self._lost()
            raise Unavailable("the fork server is overloaded")

    def _read(self) -> None:
        try:
            num = self._sock.recv_into(self._receiver.buffer())
            if num:
                for frame, _ in self._receiver.received(num):
                    self._on_frame(frame)
                return
        except BlockingIOError:
            return
        except (OSError, WireError) as error:
            log.error("fork server connection broken", reason=str(error))
        self._lost()

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind is Kind.SPAWNED and self._spawning:
            spawned = self._spawning.popleft()
            if frame.pid < 0:
                spawned.set_exception(Unavailable(f"the fork server cannot fork: {frame.message}"))
                return
            process = self._children[frame.pid] = Process(frame.pid, self._loop.create_future())
            spawned.set_result(process)
        elif frame.kind is Kind.EXITED and frame.pid in self._children:
            self._children.pop(frame.pid).exited.set_result(frame.status)
        else:
            raise WireError(f"unexpected {frame.kind.name}")

    def _lost(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for spawned in self._spawning:
            spawned.set_exception(Unavailable("the fork server died"))
            spawned.exception()  # somebody may have stopped waiting for it
        for process in self._children.values():
            process.exited.set_result(None)
        self._spawning.clear()
        self._children.clear()
        self._on_death(self)


# The server's process


def serve_forks(fd: int) -> int:
    """Until the gateway closes its end. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; it is for the gateway to drain
    _Forks(socket.socket(fileno=fd)).run()
    return 0


class _Forks:
    def __init__(self, gateway: socket.socket) -> None:
        self.gateway = gateway
        self.selector = selectors.DefaultSelector()
        self.woken, self.wake = socket.socketpair()
        self.woken.setblocking(False)
        self.wake.setblocking(False)
        self.receiver = Receiver()
        self.descriptors: deque[int] = deque()
        """Received with SPAWN frames, in order."""
        self.children: set[int] = set()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake.fileno())

    def run(self) -> None:
        importlib.import_module("fairlead.runtime.replica")
        gc.freeze()  # what exists now stays shared with the children
        self.selector.register(self.woken, selectors.EVENT_READ)
        self.selector.register(self.gateway, selectors.EVENT_READ)
        with suppress(ConnectionError):
            while True:
                ready = {key.fileobj for key, _ in self.selector.select()}
                if self.woken in ready:
                    for pid, status in self.reap():
                        self.send(Frame(Kind.EXITED, pid=pid, status=status))
                if self.gateway in ready and not self.read():
                    break
        # They see their own sockets end; those that compute on regardless are killed
        self.selector.unregister(self.gateway)
        deadline = time.monotonic() + END_SECONDS
        while self.children and (left := deadline - time.monotonic()) > 0:
            self.selector.select(left)
            self.reap()
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)

    def read(self) -> bool:
        """False at the end."""
        data, descriptors, _, _ = socket.recv_fds(self.gateway, len(self.receiver.buffer()), MAX_FDS)
        for fd in descriptors:
            os.set_inheritable(fd, False)
        self.descriptors.extend(descriptors)
        self.receiver.buffer()[: len(data)] = data
        for frame, _ in self.receiver.received(len(data)):
            if frame.kind is Kind.SPAWN:
                self.spawn(frame)
            elif frame.kind is Kind.LEVELS:
                journal().set_levels(frame.levels)
            elif frame.kind is Kind.KILL and frame.pid in self.children:
                os.kill(frame.pid, signal.SIGKILL)  # not yet reaped: the pid is still its own
        return bool(data)

    def send(self, frame: Frame) -> None:
        self.gateway.sendall(b"".join(encode_frame(frame)))

    def reap(self) -> list[tuple[int, int]]:
        """Pids and exit codes of the children that ended."""
        with suppress(BlockingIOError):
            while self.woken.recv(4096):
                pass
        ended = []
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self.children.discard(found[0])
                ended.append((found[0], os.waitstatus_to_exitcode(found[1])))
        return ended

    def spawn(self, frame: Frame) -> None:
        descriptors = [self.descriptors.popleft() for _ in range(frame.num_fds)]
        for module in frame.modules:
            if module not in sys.modules:
                try:
                    importlib.import_module(module)
                except Exception as error:  # the replica's own attempt will say why
                    log.warning("cannot preload", module=module, reason=str(error))
                gc.freeze()
        try:
            pid = os.fork()
        except OSError as error:
            self.send(Frame(Kind.SPAWNED, pid=-1, message=str(error)))
        else:
            if pid == 0:
                self.become_replica(descriptors, mark=frame.mark)
            self.children.add(pid)
            self.send(Frame(Kind.SPAWNED, pid=pid))
        for fd in descriptors:
            os.close(fd)

    def become_replica(self, descriptors: list[int], *, mark: str) -> NoReturn:
        from fairlead.runtime import replica  # not above: the gateway imports this file and does not need it

        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.selector.close()
            for mine in (self.gateway, self.woken, self.wake):
                mine.close()
            for later in self.descriptors:  # another replica's socket, held open here, would hide that one's death
                os.close(later)
            if mark:
                out = descriptors.pop()
                os.dup2(out, 1)
                os.dup2(out, 2)
                os.close(out)
                journal().to_machine(mark)
            code = replica.serve(descriptors)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            log.exception("replica failed")
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
