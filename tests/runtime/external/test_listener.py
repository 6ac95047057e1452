"""Whose a port is: the engine's, a stranger's, or not to be known."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from fairlead.runtime.external.listener import Listening, Owner, began_of, judged, owner_of

BEGAN = 1000.0
ENGINE = Listening(7, BEGAN)
OLDER, YOUNGER, UNTOLD = Listening(8, 900.0), Listening(9, 1001.0), Listening(None, 0.0)


@pytest.mark.parametrize(
    ("seen", "apart", "hidden", "owner"),
    [
        ((ENGINE,), False, False, Owner.OURS),
        ((ENGINE,), False, True, Owner.OURS),
        ((OLDER,), False, False, Owner.STRANGER),
        ((OLDER,), True, True, Owner.STRANGER),
        ((YOUNGER,), False, False, Owner.STRANGER),
        ((YOUNGER,), True, False, Owner.UNKNOWN),  # a container's proxy
        ((UNTOLD,), False, False, Owner.STRANGER),  # another user's
        ((UNTOLD,), True, False, Owner.UNKNOWN),
        ((UNTOLD,), False, True, Owner.UNKNOWN),
        ((YOUNGER,), False, True, Owner.STRANGER),
        ((ENGINE, YOUNGER), True, False, Owner.STRANGER),  # both listen, and the kernel chooses who is asked
        ((ENGINE, UNTOLD), True, True, Owner.STRANGER),
        ((), False, True, Owner.UNKNOWN),
    ],
)
def test_only_what_is_known_to_be_the_engine_is_taken_for_it(seen: Any, owner: Owner, *, apart: bool, hidden: bool) -> None:
    assert judged(seen, {7}, BEGAN, apart=apart, hidden=hidden) is owner


@pytest.fixture
def port() -> Iterator[int]:
    """Of a socket of this process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_what_listens_is_found_among_all_processes(port: int) -> None:
    parent, now = os.getppid(), began_of(os.getpid()) + 1.0
    assert owner_of("127.0.0.1", port, parent, now, apart=False) is Owner.OURS
    assert owner_of("127.0.0.1", port, os.getpid(), now, apart=True) is Owner.STRANGER  # nobody is its own child
    assert owner_of("127.0.0.1", port, 0x7FFFFFFF, now, apart=False) is Owner.STRANGER  # whoever kept the engine is gone
    assert began_of(0x7FFFFFFF) == began_of(None) == 0.0


def test_where_nobody_listens_nobody_is_looked_for(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_connections", lambda kind: pytest.fail("looked"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert owner_of("127.0.0.1", taken.getsockname()[1], os.getppid(), 0.0, apart=False) is Owner.NOBODY


def test_where_the_system_tells_of_ones_own_processes_only_that_will_do(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: str) -> Any:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", refused)
    assert owner_of("127.0.0.1", port, os.getppid(), 0.0, apart=False) is Owner.OURS
    assert owner_of("127.0.0.1", port, os.getpid(), 0.0, apart=False) is Owner.UNKNOWN


def test_one_that_is_gone_by_now_is_nobody(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that shared the engine's socket for a moment, say."""
    told = [each._replace(pid=0x7FFFFFFF) for each in psutil.net_connections("tcp") if each.laddr.port == port]
    assert told
    monkeypatch.setattr(psutil, "net_connections", lambda kind: told)
    assert owner_of("127.0.0.1", port, os.getppid(), 0.0, apart=False) is Owner.OURS


def test_a_port_of_every_address_is_this_one_too(port: int) -> None:
    with socket.create_server(("", 0)) as everywhere:
        number = everywhere.getsockname()[1]
        assert owner_of("127.0.0.1", number, os.getppid(), 0.0, apart=False) is Owner.OURS
