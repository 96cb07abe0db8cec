"""The connection to the catalog: SQLite in WAL mode, or PostgreSQL by URL.

Two rules give both backends the same behaviour. A write transaction takes the only write lock of the
catalog before it reads (SQLite: BEGIN IMMEDIATE, PostgreSQL: an advisory lock), so that reading, deciding
and writing is one step for every thread and process. A read transaction sees one consistent state and
waits for nobody.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from adapters_store.errors import CatalogUnavailable, InvalidValue
from adapters_store.migrate import migrate

# Another process may hold the write lock while it imports thousands of tasks.
_BUSY_TIMEOUT_S = 30.0
_ADVISORY_LOCK = 0x6D6872  # "mhr"


class Database:
    """The engine behind the catalog. `read` and `write` are the only ways to a session."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        # SQLite's own waiting is unfair: threads of one process queue up here instead.
        self._writing = threading.Lock()
        self._engine = _create_engine(url)
        self._write_engine = self._engine.execution_options(mhr_write=True)
        try:
            with self._translated():
                migrate(self._write_engine)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session over one consistent state. Raises CatalogUnavailable."""
        with self._translated(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that holds the write lock and commits at the end, or not at all. Raises CatalogUnavailable."""
        with self._translated(), self._writing, Session(self._write_engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A connection whose statements all see one state, for copying the whole catalog."""
        isolation: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self._translated(), self._engine.execution_options(**isolation).begin() as connection:
            yield connection

    def close(self) -> None:
        """Close all connections; nothing may use the database afterwards."""
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = str(error.orig) if isinstance(error, DBAPIError) else str(error)
            shown = self.url.render_as_string(hide_password=True)
            raise CatalogUnavailable(
                f"the catalog {shown} cannot be used: {cause.strip()}. {_remedy(cause)}"
            ) from error


def catalog_url(data_dir: Path, database_url: str | None) -> URL:
    """The URL of the catalog: SQLite in the data directory by default.

    Raises InvalidValue for a URL of another database than SQLite (a file) or PostgreSQL.
    """
    if database_url is None:
        return URL.create("sqlite", database=str(data_dir / "catalog.sqlite3"))
    try:
        url = make_url(database_url)
    except ArgumentError:
        raise InvalidValue("database_url", "the database URL cannot be read; " + _URL_FORMS) from None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:"):
        return url
    if url.drivername == "postgresql+psycopg":
        return url
    raise InvalidValue(
        "database_url", f"{url.render_as_string()} is no catalog that processes can share; " + _URL_FORMS
    )


_URL_FORMS = "use sqlite:////absolute/path/catalog.sqlite3 or postgresql://user:password@host:5432/name."


def _create_engine(url: URL) -> Engine:
    options: dict[str, Any] = {"hide_parameters": True}
    if url.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": _BUSY_TIMEOUT_S, "isolation_level": None}
    else:
        options["pool_pre_ping"] = True
    try:
        engine = create_engine(url, **options)
    except ModuleNotFoundError as error:
        raise CatalogUnavailable(
            f"a PostgreSQL catalog needs the driver psycopg ({error}). Install it: pip install 'psycopg[binary]'"
        ) from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "begin", _begin_postgresql)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    _enter_wal(connection)
    # What was answered to a user must outlast a power cut, so every commit reaches the disk.
    connection.execute("PRAGMA synchronous = FULL")


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Switch the file to WAL, once and for all; SQLite does not wait for others here, so this does."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("mhr_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("mhr_write", False):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(_BUSY_TIMEOUT_S * 1000)}")
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})


def _remedy(cause: str) -> str:
    if "locked" in cause or "lock timeout" in cause:
        return "Another process holds it for long; wait for it to finish or stop it."
    if "malformed" in cause or "not a database" in cause:
        return "The file is damaged; restore it from a backup."
    if "full" in cause or "No space" in cause:
        return "Free space on its disk."
    return "Check that the database is reachable and writable."
