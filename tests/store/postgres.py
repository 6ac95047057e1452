"""A private PostgreSQL for tests: its own cluster on a free port, of a user that is not root, gone afterwards."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

from fairlead.store.store import Store

USER = "postgres"
"""Debian's package makes this one. Only root needs it: PostgreSQL refuses to run as root."""
_numbers = count()


def binary(name: str) -> str:
    found = shutil.which(name) or next((str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "-o", "DPkg::Lock::Timeout=600", "postgresql"], check=True, capture_output=True)
        return binary(name)
    return found


class Postgres:
    def __init__(self, folder: Path, fsync: str) -> None:
        self.folder = folder
        self.fsync = fsync
        self.as_user: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self._with_tables = ""

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": self.fsync,
            "shared_buffers": "16MB",
            "max_connections": 50,
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        command = [binary("postgres"), "-D", str(self.folder), "-p", str(self.port), *settings]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **self.as_user)
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """At once, as a crash would."""
        if self.process is not None:
            self.process.send_signal(3)
            self.process.wait(30)
            self.process = None

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def bare_database(self, like: str = "template1") -> str:
        """The URL of an empty one."""
        name = f"fairlead_{next(_numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {like} STRATEGY file_copy")
        return self.url(name)

    def new_database(self) -> str:
        """The URL of one with all tables: made once, by the migrations, and copied from then on."""
        if not self._with_tables:
            url = self.bare_database()
            Store.open(url).close()
            self._with_tables = url.rpartition("/")[2]
        return self.bare_database(like=self._with_tables)

    def drop(self, url: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")


def _in_memory() -> str | None:
    """Each database is 450 files: on a busy disk, making and deleting them takes longer than the tests do."""
    shared = "/dev/shm"
    return shared if os.path.isdir(shared) and shutil.disk_usage(shared).free > 2 << 30 else None


@contextmanager
def private_postgres(fsync: str = "off") -> Iterator[Postgres]:
    parent = Path(tempfile.mkdtemp(prefix="fairlead-postgres-", dir=_in_memory()))
    postgres = Postgres(parent / "data", fsync)
    try:
        initdb = [binary("initdb"), "-D", str(postgres.folder), "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        if os.getuid() == 0:
            shutil.chown(parent, USER, USER)
        subprocess.run(initdb, check=True, capture_output=True, cwd="/", **postgres.as_user)
        postgres.start()
        yield postgres
    finally:
        postgres.stop()
        shutil.rmtree(parent, ignore_errors=True)
