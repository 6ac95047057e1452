"""Connections and transactions of one database, and what its errors mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection

from fairlead.core.errors import InvalidRequest, Unavailable
from fairlead.store import database
from fairlead.store.database import first_line


class Conflict(InvalidRequest):
    """The wish is well-formed, but not to be had as things stand."""


class Transactions:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.writing = engine.execution_options(writes=True)
        # SQLite lets one write at a time, and those who collide there sleep and try again.
        self._writer = Lock() if engine.dialect.name == "sqlite" else None

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reads(self) -> Iterator[Connection]:
        with self._told(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writes(self) -> Iterator[Connection]:
        with self._alone(), self._told(), self.writing.begin() as connection:
            yield connection

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A database that is gone, full or locked may be back: Unavailable. A value that it cannot take stays the error that it is."""
        driver = self.engine.dialect.loaded_dbapi
        try:
            yield
        except (DBAPIError, driver.Error, NoConnection) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            if isinstance(cause, (driver.DataError, driver.IntegrityError)):
                raise
            raise Unavailable(f"the store does not answer: {first_line(cause)}") from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._writer is None:
            yield
            return
        if not self._writer.acquire(timeout=database.BUSY_SECONDS):
            raise Unavailable("the store does not answer: others write for too long")
        try:
            yield
        finally:
            self._writer.release()
