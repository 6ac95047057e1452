"""A database by its URL, with today's tables: SQLite, or PostgreSQL by psycopg."""

import math
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError

from fairlead.core.errors import ConfigError

HEAD = "0008"
"""The newest migration."""
VERSION_TABLE = "fairlead_version"
BUSY_SECONDS = 10.0
"""How long a writer waits for another one."""
CONNECT_SECONDS = 5
PING_SECONDS = 5.0
"""A connection that was not used for so long is tried before it is."""
MIGRATION_SECONDS = 300
"""How long a process waits for another one that brings the tables up to date."""
MIGRATION_LOCK = 0x6661_6972
"""PostgreSQL's advisory lock: any number that nobody else takes."""


def default_folder() -> Path:
    """The user's data folder, which is made if it is not there, for nobody else to read."""
    data = os.environ.get("XDG_DATA_HOME", "")
    folder = (Path(data) if os.path.isabs(data) else Path.home() / ".local/share") / "fairlead"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder} for the store: {error.strerror}. Set `store.url` to another place") from None
    return folder


def default_url() -> str:
    """A file in the user's data folder."""
    return f"sqlite:///{default_folder()}/fairlead.db"


def open_database(url: str) -> Engine:
    """Connect, and bring the tables up to date. Raises ConfigError."""
    parsed = _parse(url)
    shown = parsed.render_as_string(hide_password=True)
    try:
        engine = _sqlite(parsed) if parsed.drivername == "sqlite" else _postgresql(parsed)
        try:
            _migrate(engine, shown)
        except BaseException:
            engine.dispose()
            raise
    except (DBAPIError, sqlite3.Error) as error:
        raise ConfigError(f"cannot open the store {shown}: {first_line(error.orig if isinstance(error, DBAPIError) else error)}") from None
    return engine


def look_at(url: str) -> tuple[str, int]:
    """(version of its tables, number of keys) of a database that is left as it is; ("", 0) where there is nothing yet. Raises ConfigError."""
    parsed = _parse(url)
    try:
        engine = _sqlite_as_it_is(Path(str(parsed.database))) if parsed.drivername == "sqlite" else _postgresql(parsed)
        try:
            with engine.connect() as connection:
                version = _version(connection)
                keys = 0 if version is None else connection.exec_driver_sql("SELECT count(*) FROM keys").scalar_one()
                return version or "", keys
        finally:
            engine.dispose()
    except FileNotFoundError:
        return "", 0
    except (DBAPIError, sqlite3.Error) as error:
        raise ConfigError(
            f"cannot open the store {parsed.render_as_string(hide_password=True)}: {first_line(getattr(error, 'orig', error))}"
        ) from None


def first_line(error: BaseException | None) -> str:
    """What the driver said."""
    return str(error).strip().partition("\n")[0]


def _parse(url: str) -> URL:
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise ConfigError("`store.url` is no URL: write sqlite:///path/to/file or postgresql://user@host/database") from None
    match parsed.drivername:
        case "sqlite":
            if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
                raise ConfigError("`store.url` must name a file: sqlite:///path/to/file")
        case "postgresql" | "postgres" | "postgresql+psycopg":
            parsed = parsed.set(drivername="postgresql+psycopg")
        case other:
            raise ConfigError(f"`store.url`: `{other}` is not offered, only sqlite and postgresql")
    return parsed


def _sqlite(url: URL) -> Engine:
    path = Path(str(url.database))
    try:
        # Keys of signatures are in it: for nobody else to read, and SQLite gives its -wal and -shm files the same mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(f"cannot open the store {path}: {error.strerror}") from None
    engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        # The driver would begin a transaction at the first change only, and one that has read before cannot wait for another writer.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")

    try:
        _write_ahead(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _sqlite_as_it_is(path: Path) -> Engine:
    """Raises FileNotFoundError, and ConfigError where a server could not use it."""
    if not os.access(path if path.exists() else path.parent, os.R_OK | os.W_OK):
        raise ConfigError(f"cannot open the store {path}: this user may not write there, or there is no such folder")
    file = f"{path.resolve(strict=True).as_uri()}?mode=ro"
    return sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(file, uri=True, timeout=BUSY_SECONDS))


def _write_ahead(engine: Engine) -> None:
    """Readers do not wait for writers. Two that open a new file at once collide here without SQLite's own patience."""
    connection = engine.raw_connection()
    deadline = time.monotonic() + BUSY_SECONDS
    try:
        while True:
            try:
                connection.cursor().execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return
    finally:
        connection.close()


def _postgresql(url: URL) -> Engine:
    try:
        engine = sa.create_engine(
            url,
            hide_parameters=True,
            # A host that is gone without a word is noticed within seconds, not in the kernel's quarter of an hour.
            connect_args={"connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": 10_000, "keepalives_idle": 10},
        )
    except ModuleNotFoundError:
        raise ConfigError("a store in PostgreSQL needs psycopg: pip install 'fairlead[postgres]'") from None

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        # As long as SQLite's writers wait.
        connection.execute(f"SET lock_timeout = {int(BUSY_SECONDS * 1000)}")
        connection.commit()

    @sa.event.listens_for(engine, "checkin")
    def leave(_: Any, record: Any) -> None:
        record.info["left"] = time.monotonic()

    @sa.event.listens_for(engine, "checkout")
    def ping(connection: Any, record: Any, _: Any) -> None:
        # Each time would cost each transaction a round trip.
        if time.monotonic() - record.info.get("left", math.inf) > PING_SECONDS:
            try:
                connection.execute("SELECT 1")
                connection.rollback()
            except connection.Error:
                raise sa.exc.DisconnectionError from None  # which makes the pool open another

    return engine


# Migrations


def _migrate(engine: Engine, shown: str) -> None:
    with engine.connect() as connection:
        if _version(connection) == HEAD:
            return
    with engine.execution_options(writes=True).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {MIGRATION_SECONDS * 1000}")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
        # Another process may have done it meanwhile.
        version = _version(connection)
        if version != HEAD:
            _upgrade(connection, version, shown)


def _version(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar()


def _upgrade(connection: Connection, version: str | None, shown: str) -> None:
    # Imported here: a store that is up to date opens without it.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if version is not None and version not in known:
        raise ConfigError(f"the store {shown} was made by a newer Fairlead (its tables are of version {version}): upgrade this one")
    command.upgrade(config, "head")
