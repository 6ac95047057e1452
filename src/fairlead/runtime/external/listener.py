"""Who listens at the port that an engine was given: it, or a stranger who took the port before the engine came to it."""

import socket
from collections.abc import Collection, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any, NamedTuple

import psutil

CONNECT_SECONDS = 1.0
ANY = ("0.0.0.0", "::", "::ffff:0.0.0.0")


class Owner(StrEnum):
    """Of a port."""

    NOBODY = "nobody"
    OURS = "ours"
    STRANGER = "stranger"
    UNKNOWN = "unknown"


class Listening(NamedTuple):
    """A process that listens there."""

    pid: int | None
    """None: the system does not tell."""
    began: float
    """Seconds since 1970; 0.0 where the system does not tell."""


def judged(seen: Sequence[Listening], family: Collection[int], began: float, *, apart: bool, hidden: bool) -> Owner:
    """Whose it is. `began`: when the engine was started. `apart`: others may listen on its behalf (a container's proxy, say), who were
    started by whom we do not know, but not before it was. `hidden`: not all of its family can be looked at."""
    others = [each for each in seen if each.pid not in family]
    if any(0.0 < each.began < began for each in others):
        return Owner.STRANGER
    if not others:
        return Owner.OURS if seen else Owner.UNKNOWN
    if len(others) == len(seen) and (apart or (hidden and all(each.pid is None for each in others))):
        return Owner.UNKNOWN
    return Owner.STRANGER


def owner_of(host: str, port: int, keeper: int, began: float, *, apart: bool) -> Owner:
    """`keeper`: the process that the engine and all that it started descend from. Blocks: it may look at all processes."""
    with socket.socket() as probe:
        probe.settimeout(CONNECT_SECONDS)
        if probe.connect_ex((host, port)):
            return Owner.NOBODY
    hidden = False
    try:
        holders = {each.pid for each in psutil.net_connections("tcp") if _is_there(each, host, port)}
    except psutil.AccessDenied:  # macOS tells it root only
        holders, hidden = set(), True
    # Only now, so that what it has started meanwhile is among them.
    family, ours = set[int](), False
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(keeper).children(recursive=True):
            family.add(process.pid)
            try:
                ours = ours or any(_is_there(each, host, port) for each in process.net_connections("tcp"))
            except psutil.AccessDenied:
                hidden = True
            except psutil.NoSuchProcess:
                pass
    seen = [Listening(pid, began_of(pid)) for pid in holders - family if pid is None or psutil.pid_exists(pid)]
    if ours or holders & family:
        seen.append(Listening(next(iter(family)), began))
    return judged(seen, family, began, apart=apart, hidden=hidden)


def began_of(pid: int | None) -> float:
    """When a process was started; 0.0 where the system does not tell."""
    if pid is None:
        return 0.0
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def _is_there(connection: Any, host: str, port: int) -> bool:
    at = connection.laddr
    return connection.status == psutil.CONN_LISTEN and at.port == port and at.ip in (host, f"::ffff:{host}", *ANY)
